"""Connecting: names, refusals, the deadline, and origins."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from typing import Any

import attrs
import httpx2
import pytest
import trio

from tests.support.shortage import ERRORS, no_descriptors, os_error
from tests.upstream.socket_server import (
    GET,
    OK,
    Server,
    answers,
    ask,
    closed_port,
    counts,
    open_pool,
    read_body,
)
from trigate.upstream.connect import Connection, NoDescriptor, Origin
from trigate.upstream.transport import SocketTransport


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_nobody_listens(host: str) -> None:
    """A refused connection is a `ConnectError` that says so."""
    async with SocketTransport() as transport:
        with pytest.raises(httpx2.ConnectError, match="refused"):
            await ask(transport, attrs.evolve(closed_port(), host=host))
        assert counts(transport) == (0, 0, 0)


@pytest.mark.parametrize("host", ["nobody.invalid", "a" * 70 + ".invalid", "1" * 300])
async def test_a_name_that_nobody_has(host: str) -> None:
    """A name that does not resolve, or cannot be a DNS name, is a `ConnectError`."""
    async with SocketTransport() as transport:
        with pytest.raises(httpx2.ConnectError, match=r"[a-z]{3}"):
            await ask(transport, Origin("http", host, 80))
        assert counts(transport) == (0, 0, 0)


async def test_a_name_is_looked_up() -> None:
    """A host name is resolved; an IPv6 address of it that does not accept does no harm."""
    async with open_pool(answers(OK)) as (server, transport):
        named = attrs.evolve(server.origin, host="localhost")
        for _ in range(2):
            async with transport.pool.open(named, GET) as response:
                assert response.socket is not None
                assert response.socket.gettimeout() == 0
                assert response.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert await read_body(response) == b"ok"
        assert server.opened == 1


async def test_a_connection_that_takes_too_long() -> None:
    """The connect timeout includes TLS: this server accepts, and never answers the handshake."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await trio.sleep_forever()

    async with open_pool(play) as (server, transport):
        silent = attrs.evolve(server.origin, scheme="https")
        with pytest.raises(httpx2.ConnectTimeout, match=r"0\.05 s"):
            async with transport.pool.open(silent, GET, connect_timeout_s=0.05):
                pass
        assert counts(transport) == (0, 0, 0)


# -- nothing can be opened --------------------------------------------------------------------------------------------


def _no_socket(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every new TCP socket fail with this error. (An accepted one has a descriptor already.)"""
    make = socket.socket.__init__

    def refuse(self: socket.socket, family: int = -1, type: int = -1, proto: int = -1, fileno: Any = None) -> None:
        if fileno is None and type == socket.SOCK_STREAM:
            raise os_error(name)
        make(self, family, type, proto, fileno)

    monkeypatch.setattr(socket.socket, "__init__", refuse)


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("checked", [False, True], ids=["", "checked"])
async def test_a_socket_that_cannot_be_opened(
    host: str, checked: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a `ConnectError`, and where the process is the reason, one that says so. The next connection succeeds."""
    async with open_pool(answers(OK), refuse=(lambda address: None) if checked else None) as (server, transport):
        origin = attrs.evolve(server.origin, host=host)
        with monkeypatch.context() as patch:
            _no_socket(name, patch)
            with pytest.raises(httpx2.ConnectError) as caught:
                await ask(transport, origin)
        assert isinstance(caught.value, NoDescriptor) is (name in ("EMFILE", "ENFILE", "ENOMEM"))
        assert counts(transport) == (0, 0, 0)
        assert await ask(transport, origin) == b"ok"


@pytest.mark.parametrize(
    "error", [*map(os_error, ERRORS), RuntimeError("can't start new thread"), socket.gaierror(-3, "Try again")], ids=str
)
@pytest.mark.parametrize("checked", [False, True], ids=["", "checked"])
async def test_a_resolver_that_fails(checked: bool, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a `ConnectError`, also where no thread can be started for it. The next connection succeeds."""
    async with open_pool(answers(OK), refuse=(lambda address: None) if checked else None) as (server, transport):
        named = attrs.evolve(server.origin, host="localhost")
        with monkeypatch.context() as patch:

            def refuse(*_: object, **__: object) -> Any:
                raise error

            patch.setattr(trio.to_thread, "run_sync", refuse)
            with pytest.raises(httpx2.ConnectError):
                await ask(transport, named)
        assert counts(transport) == (0, 0, 0)
        assert await ask(transport, named) == b"ok"


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is lowered below open files")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_no_descriptor_is_left(host: str) -> None:
    """A new connection takes the descriptor of an idle one, whichever pool has that. Without any, and also where it
    would be one of the last descriptors, it is a `NoDescriptor`."""
    async with open_pool(answers(OK)) as (server, idle), SocketTransport() as transport:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            origin = Origin("http", host, listener.getsockname()[1])
            assert await ask(idle, server.origin) == b"ok"
            for _ in range(40):
                stack.callback(os.close, os.dup(0))
            connections: list[Connection] = []

            async def connect_all() -> None:
                while True:
                    connections.append(await transport.pool._dial_in_slot(origin, 1.0))
                    stack.callback(connections[-1].close)

            with no_descriptors(), pytest.raises(NoDescriptor):
                await connect_all()
            assert counts(idle) == (0, 0, 0)
            assert len(connections) in (1, 2)  # it has the two descriptors of the idle connection
            with no_descriptors(spare=2), pytest.raises(NoDescriptor):
                await connect_all()
            assert len(connections) < 5
            with no_descriptors(spare=40), pytest.raises(NoDescriptor):
                await connect_all()
            assert len(connections) > 20


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://a.example/v1", Origin("http", "a.example", 80)),
        ("https://A.example:8443", Origin("https", "a.example", 8443)),
        ("http://[::1]:9/x", Origin("http", "::1", 9)),
        ("https://bücher.example/", Origin("https", "xn--bcher-kva.example", 443)),
    ],
)
def test_the_origin_of_a_url(url: str, origin: Origin) -> None:
    """The origin of a URL has its scheme, its host, and its port or the default one."""
    assert Origin.of(url) == origin
    assert hash(Origin.of(url)) == hash(origin)


@pytest.mark.parametrize("url", ["ftp://x/", "/v1", "http://", "x"])
def test_what_has_no_origin(url: str) -> None:
    """A URL without a host, or with another scheme than HTTP's, has no origin."""
    with pytest.raises(httpx2.UnsupportedProtocol):
        Origin.of(url)
