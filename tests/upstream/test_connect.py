"""Connecting: names, refusals, the deadline, and origins."""

from __future__ import annotations

import socket

import attrs
import httpx2
import pytest
import trio

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
from trigate.upstream.connect import Origin
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
