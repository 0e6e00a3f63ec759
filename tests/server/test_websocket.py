"""`trigate.server.websocket`: a client's WebSocket as ASGI has it, with a client that speaks it by hand."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)

from tests.server.test_http1 import open_connection
from tests.support.logs import Logs
from trigate.server import websocket


class Client:
    """A client of one WebSocket."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.protocol = WSConnection(ConnectionType.CLIENT)
        self._events: list[Event] = []

    async def send(self, *events: Event, split: bool = False) -> None:
        data = b"".join([self.protocol.send(event) for event in events])
        for piece in [data[at : at + 1] for at in range(len(data))] if split else [data]:
            await self.stream.send_all(piece)

    async def next(self) -> Event | None:
        """The next event; None = the connection has ended."""
        while not self._events:
            data = await self.stream.receive_some()
            if not data:
                return None
            self.protocol.receive_data(bytes(data))
            self._events += self.protocol.events()
        return self._events.pop(0)

    async def shake(self, **fields: Any) -> Event | None:
        await self.send(Request(host="x", target="/chat?a=b", **fields))
        return await self.next()


@contextlib.asynccontextmanager
async def open_client(app: Any) -> AsyncIterator[Client]:
    """A connection to an app."""
    async with open_connection(app) as stream:
        yield Client(stream)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Accepts, and sends back what it gets."""
    assert scope["type"] == "websocket"
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept", "subprotocol": None, "headers": [(b"x-a", b"b")]})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"], "bytes": message["bytes"]})
    echo.code = message["code"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("split", [False, True])
async def test_messages(autojump_clock: MockClock, split: bool) -> None:
    """Text and bytes in both directions, whole or in parts, and a ping between two parts; then the client closes."""
    async with open_client(echo) as client:
        accepted = await client.shake()
        assert isinstance(accepted, AcceptConnection)
        assert (b"x-a", b"b") in accepted.extra_headers
        await client.send(
            TextMessage(data="hällo"),
            TextMessage(data="in ", message_finished=False),
            Ping(payload=b"p"),
            TextMessage(data="parts"),
            BytesMessage(data=b"\x00\xff"),
            split=split,
        )
        events = [await client.next() for _ in range(4)]
        assert [each.data for each in events if isinstance(each, TextMessage)] == ["hällo", "in parts"]
        assert [each.payload for each in events if isinstance(each, Pong)] == [b"p"]
        assert [bytes(each.data) for each in events if isinstance(each, BytesMessage)] == [b"\x00\xff"]
        await client.send(CloseConnection(code=1001, reason="bye"))
        answer = await client.next()
        assert isinstance(answer, CloseConnection)
        assert (answer.code, echo.code) == (1001, 1001)  # type: ignore[attr-defined]
        assert await client.next() is None


async def test_the_app_closes(autojump_clock: MockClock) -> None:
    """With a code and a reason, which is cut to what a frame can hold; an app that returns says 1011."""

    async def close(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept", "subprotocol": "b"})
        if scope["query_string"] == b"a=b":
            await send({"type": "websocket.close", "code": 4000, "reason": "ä" * 100})

    async with open_client(close) as client:
        accepted = await client.shake(subprotocols=["a", "b"])
        assert isinstance(accepted, AcceptConnection)
        assert accepted.subprotocol == "b"
        closed = await client.next()
        assert isinstance(closed, CloseConnection)
        assert (closed.code, closed.reason) == (4000, "ä" * 61)


async def test_a_refusal(autojump_clock: MockClock) -> None:
    """The app answers with a status and a body of its own, and the connection ends."""

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        assert scope["subprotocols"] == ["a", "b"]
        assert (scope["path"], scope["scheme"]) == ("/chat", "ws")
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"2")]
        await send({"type": "websocket.http.response.start", "status": 404, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": b"n", "more_body": True})
        await send({"type": "websocket.http.response.body", "body": b"o"})

    async with open_client(refuse) as client:
        rejected = await client.shake(subprotocols=["a", "b"])
        assert isinstance(rejected, RejectConnection)
        assert rejected.status_code == 404
        body = await client.next()
        assert isinstance(body, RejectData)
        assert bytes(body.data) == b"no"


@pytest.mark.parametrize(("messages", "status"), [([{"type": "websocket.close"}], 403), ([], 500)])
async def test_an_app_that_does_not_accept(autojump_clock: MockClock, messages: list[Any], status: int) -> None:
    """Its client gets a status."""

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        for message in messages:
            await send(message)

    async with open_client(refuse) as client:
        rejected = await client.shake()
        assert isinstance(rejected, RejectConnection)
        assert rejected.status_code == status


async def test_a_crash(autojump_clock: MockClock, logs: Logs) -> None:
    """It ends the WebSocket with 1011, and is logged."""

    async def crash(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        raise ZeroDivisionError

    logs.expect_error("app_crashed")
    async with open_client(crash) as client:
        assert isinstance(await client.shake(), AcceptConnection)
        closed = await client.next()
        assert isinstance(closed, CloseConnection)
        assert closed.code == 1011


async def test_a_client_that_leaves(autojump_clock: MockClock) -> None:
    """Without a close frame it is 1006, also before the handshake is accepted."""
    codes = []

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if scope["path"] == "/chat":
            await send({"type": "websocket.accept"})
        codes.append((await receive())["code"])

    for target in ("/chat", "/other"):
        async with open_client(wait) as client:
            await client.send(Request(host="x", target=target))
            await trio.sleep(1)
            await client.stream.aclose()
            await trio.sleep(1)
    assert codes == [1006, 1006]


@pytest.mark.parametrize(
    ("frames", "code"),
    [(b"\x81\x05hello", 1002), (b"\xff\xff", 1002), (b"\x81\x81\x00\x00\x00\x00\xff", 1007)],
    ids=["not masked", "reserved bits", "no text"],
)
async def test_what_is_no_frame(autojump_clock: MockClock, frames: bytes, code: int) -> None:
    """The client is told, and the app sees the end."""
    async with open_client(echo) as client:
        await client.shake()
        await client.stream.send_all(frames)
        closed = await client.next()
        assert isinstance(closed, CloseConnection)
        assert (closed.code, echo.code) == (code, 1006)  # type: ignore[attr-defined]


async def test_too_much_before_the_handshake_is_accepted(autojump_clock: MockClock) -> None:
    """A client that does not wait is bounded, and is taken for gone."""
    codes = []

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        codes.append((await receive())["code"])

    async with open_client(wait) as client:
        await client.send(Request(host="x", target="/"))
        await client.stream.send_all(bytes(70_000))
        await trio.sleep(1)
    assert codes == [1006]


async def test_a_message_that_is_too_large(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before it has arrived."""
    monkeypatch.setattr(websocket, "MAX_MESSAGE_BYTES", 10)
    async with open_client(echo) as client:
        await client.shake()
        await client.send(TextMessage(data="x" * 10))
        assert isinstance(await client.next(), TextMessage)
        await client.send(TextMessage(data="x" * 11, message_finished=False))
        closed = await client.next()
        assert isinstance(closed, CloseConnection)
        assert closed.code == 1009
