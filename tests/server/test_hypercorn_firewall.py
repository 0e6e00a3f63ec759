"""`trigate.server.hypercorn_firewall`: the packets that end a worker of hypercorn end one connection of it."""

from __future__ import annotations

import contextlib
import importlib
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any

import h2.config
import h2.connection
import hpack
import pytest
import trio
from hyperframe.frame import DataFrame, HeadersFrame

from tests.server.test_http1 import say
from trigate.server import hypercorn_firewall
from trigate.server.http1 import Message, Receive, Send

HELLO = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"
_GET = ((":method", "GET"), (":scheme", "http"), (":authority", "x"), (":path", "/early"))


def _preface() -> bytes:
    client = h2.connection.H2Connection(h2.config.H2Configuration())
    client.initiate_connection()
    return client.data_to_send()


def _headers(fields: Sequence[tuple[str | bytes, str | bytes]], *, end: bool = True) -> bytes:
    flags = ["END_HEADERS", *(["END_STREAM"] if end else [])]
    return HeadersFrame(1, hpack.Encoder().encode(fields), flags=flags).serialize()


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
KILLERS = {
    "a WebSocket upgrade with trailing bytes": (UPGRADE + b"trailing",),
    "a path that is not ASCII": (_preface() + _headers((*_GET[:3], (b":path", b"/\xff"))),),
    "a method that is not ASCII": (_preface() + _headers(((b":method", b"G\xc3T"), *_GET[1:])),),
    "CONNECT without a path": (_preface() + _headers(((":method", "CONNECT"), (":authority", "x:1"))),),
    "DATA for a stream that was answered": (
        _preface() + _headers(((":method", "POST"), *_GET[1:]), end=False),
        DataFrame(1, b"late").serialize(),
    ),
    "h2c with settings that are not base64": (
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: A\r\n\r\n",
    ),
}
"""What ends a worker of hypercorn 0.18. Each piece is sent after the answer to the one before it."""


async def app(scope: Message, receive: Receive, send: Send) -> None:
    """Answers ``/slow`` in two parts, and everything else at once; refuses WebSockets."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1000, "reason": None})
        return
    if scope["path"] != "/slow":
        await say(send, b"hello")
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"1", "more_body": True})
    await scope["state"]["go_on"].wait()
    await send({"type": "http.response.body", "body": b"2"})


@pytest.fixture
def original() -> Iterator[None]:
    """hypercorn's class is as it was, before and after the test."""
    server: Any = importlib.import_module("hypercorn.trio.tcp_server").TCPServer
    run = getattr(server.run, "__wrapped__", server.run)
    server.run = run
    yield
    server.run = run


@contextlib.asynccontextmanager
async def open_hypercorn(serve: Callable[..., Any]) -> AsyncIterator[tuple[int, trio.Event]]:
    """Serves `app` with hypercorn's own server; yields its port, and the event for which ``/slow`` waits."""
    from hypercorn.config import Config, Sockets
    from hypercorn.trio.run import worker_serve

    config = Config()
    config.accesslog = config.errorlog = None
    go_on = trio.Event()

    async def with_state(scope: Message, receive: Receive, send: Send, *_: object) -> None:
        if scope["type"] == "lifespan":
            scope["state"]["go_on"] = go_on
        await serve(scope, receive, send)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        async with trio.open_nursery() as nursery:
            sockets = Sockets([], [listening], [])
            wrapped: Any = with_state  # Any: hypercorn's AppWrapper
            await nursery.start(partial(worker_serve, wrapped, config, sockets=sockets))
            yield listening.getsockname()[1], go_on
            nursery.cancel_scope.cancel()


async def send_pieces(port: int, pieces: Sequence[bytes]) -> None:
    """Sends the pieces of a killer, and reads until the connection ends, or nothing more comes."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        with contextlib.suppress(trio.BrokenResourceError):
            for piece in pieces:
                await stream.send_all(piece)
                with trio.move_on_after(0.05):
                    while await stream.receive_some():
                        pass


@pytest.mark.parametrize("pieces", KILLERS.values(), ids=KILLERS)
async def test_a_killer_ends_its_connection_only(original: None, logs: Any, pieces: Sequence[bytes]) -> None:
    """While a stream is running, the packet arrives. The stream goes on, and new connections are served."""
    assert hypercorn_firewall.install()
    async with open_hypercorn(app) as (port, go_on):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(HELLO.replace(b"/hello", b"/slow"))
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
            await send_pieces(port, pieces)
            go_on.set()
            data = b""
            while not data.endswith(b"2"):
                more = await stream.receive_some()
                assert more
                data += more
            await stream.send_all(HELLO)
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
    [entry] = logs.named("connection_crashed")
    assert (entry["client"][0], entry["times"], entry["log_level"]) == ("127.0.0.1", 1, "warning")


@pytest.mark.parametrize("pieces", KILLERS.values(), ids=KILLERS)
async def test_without_the_firewall_it_is_a_killer(original: None, pieces: Sequence[bytes]) -> None:
    """The packets are still those that end hypercorn: where one does not, its workaround can go."""
    survived = False
    try:
        async with open_hypercorn(app) as (port, _):
            await send_pieces(port, pieces)
            await trio.sleep(0.5)
            survived = True
    except* Exception:
        pass
    assert not survived


async def test_many_crashes_are_one_line(original: None, logs: Any) -> None:
    """The log does not grow with what strangers send; and the second installation changes nothing."""
    assert hypercorn_firewall.install()
    assert hypercorn_firewall.install()
    async with open_hypercorn(app) as (port, _):
        for _ in range(3):
            await send_pieces(port, KILLERS["a path that is not ASCII"])
    assert len(logs.named("connection_crashed")) == 1


def test_nothing_is_wrapped_under_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where hypercorn's Trio server is not loaded, it is not loaded for this."""
    monkeypatch.delitem(sys.modules, "hypercorn.trio.tcp_server", raising=False)
    assert not hypercorn_firewall.install()
    assert "hypercorn.trio.tcp_server" not in sys.modules
