"""`trigate.server.http1`: one connection, on memory streams and virtual time, and on sockets where they matter."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from tests.server.test_request_head import BAD
from trigate.concurrency import poller
from trigate.concurrency.timers import open_timers
from trigate.config.sections import Seconds, ServerConfig
from trigate.server import client_stream, http1
from trigate.server.connection import serve_connection
from trigate.server.http1 import Application, Message, Receive, Send

CONFIG = ServerConfig(keep_alive_timeout_s=Seconds(75.0))
HELLO = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

Pair = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]


async def hello(scope: Message, receive: Receive, send: Send) -> None:
    """Responds with the path and the method, after it has read the body."""
    while (await receive()).get("more_body"):
        pass
    await say(send, f"{scope['method']} {scope['path']}".encode())


async def say(send: Send, body: bytes, *, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Sends a response."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def open_connection(app: Application, **kwargs: Any) -> AsyncIterator[Pair]:
    """Serves an app on one end of a stream, and yields the other. The server must close it before the block ends."""
    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve_connection, app, server, **{"config": CONFIG, **kwargs}))
        yield client
        await client.aclose()


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Reads until the connection ends."""
    return b"".join([bytes(data) async for data in stream])


async def read_until(stream: trio.abc.ReceiveStream, end: bytes) -> bytes:
    """Reads until these bytes arrive, which must be the last ones."""
    data = b""
    while not data.endswith(end):
        more = await stream.receive_some()
        assert more, f"the connection ended: {data!r}"
        data += more
    return data


def body_of(response: bytes) -> bytes:
    """Returns the body of a response, and checks that its head is complete and does not name the server."""
    head, _, body = response.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert b"content-length: %d" % len(body) in lines, response
    assert any(line.startswith(b"date: ") for line in lines)
    assert not any(line.startswith(b"server:") for line in lines)
    return body


async def test_requests_follow_each_other(autojump_clock: trio.testing.MockClock) -> None:
    """A connection serves one request after another, also pipelined ones."""
    async with open_connection(hello) as client:
        for path in ("/a", "/b"):
            await client.send_all(HELLO.replace(b"/ ", path.encode() + b" "))
            assert body_of(await read_until(client, path.encode())) == b"GET " + path.encode()
        await client.send_all(HELLO.replace(b"/ ", b"/c ") + HELLO.replace(b"/ ", b"/d "))
        both = await read_until(client, b"/d")
        assert both.count(b"HTTP/1.1 200") == 2
        assert b"GET /c" in both


async def test_the_scope_holds_the_state(autojump_clock: trio.testing.MockClock) -> None:
    """Each request gets a copy of the lifespan state, and the addresses that the caller passed."""
    scopes = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        scopes.append((dict(scope["state"]), scope["client"], scope["server"]))
        scope["state"]["mine"] = True
        await say(send, b"!")

    addresses: Any = {"client": ("10.0.0.1", 5), "server": ("10.0.0.2", 80)}
    async with open_connection(app, state={"drain": 1}, **addresses) as client:
        for _ in range(2):
            await client.send_all(HELLO)
            await read_until(client, b"!")
    assert scopes == [({"drain": 1}, ("10.0.0.1", 5), ("10.0.0.2", 80))] * 2


@pytest.mark.parametrize("sent", [b"", b"\r\n"])
async def test_a_silent_connection_is_closed(autojump_clock: trio.testing.MockClock, sent: bytes) -> None:
    """A connection on which no request begins is closed after the keep-alive timeout, without a response."""
    async with open_connection(hello) as client:
        if sent:
            await client.send_all(sent)
        assert await read_all(client) == b""
        assert trio.current_time() == pytest.approx(75.0)


@pytest.mark.parametrize("before", [b"", HELLO])
@pytest.mark.parametrize("sent", [b"G", b"GET / HT", HELLO[:-2]])
async def test_an_incomplete_head_gets_a_408(
    autojump_clock: trio.testing.MockClock, before: bytes, sent: bytes
) -> None:
    """Ten seconds after its first byte, on a new connection and on one that has served a request."""
    async with open_connection(hello) as client:
        if before:
            await client.send_all(before)
            await read_until(client, b"GET /")
        await trio.sleep(20.0)
        await client.send_all(sent)
        response = await read_all(client)
        assert response.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in response
        assert b"within 10 s (server.head_timeout_s)" in response
        assert trio.current_time() == pytest.approx(30.0)


async def test_an_incomplete_head_behind_a_request_gets_a_408(autojump_clock: trio.testing.MockClock) -> None:
    """Its first bytes came in one packet with the request before it."""
    async with open_connection(hello) as client:
        await client.send_all(HELLO + b"GET /")
        response = await read_all(client)
        assert response.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 408 " in response
        assert trio.current_time() == pytest.approx(10.0)


async def test_a_drip_does_not_move_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """A head that arrives byte by byte has the same deadline as one that does not go on."""
    async with open_connection(hello) as client, trio.open_nursery() as nursery:

        async def drip() -> None:
            for byte in HELLO:
                await client.send_all(bytes([byte]))
                await trio.sleep(3.0)

        nursery.start_soon(drip)
        assert (await read_all(client)).startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() == pytest.approx(10.0)
        nursery.cancel_scope.cancel()


async def test_the_deadline_of_a_head_can_be_switched_off(autojump_clock: trio.testing.MockClock) -> None:
    """Then it is that of an idle connection, counted from the head's first byte."""
    config = ServerConfig(keep_alive_timeout_s=Seconds(75.0), head_timeout_s=Seconds(0.0))
    async with open_connection(hello, config=config) as client:
        await trio.sleep(20.0)
        await client.send_all(b"GET / HT")
        assert await read_all(client) == b""
        assert trio.current_time() == pytest.approx(95.0)


async def test_an_idle_connection_is_closed(autojump_clock: trio.testing.MockClock) -> None:
    """The keep-alive timeout starts at the end of the last response, and does not end a long response."""

    async def slow(scope: Message, receive: Receive, send: Send) -> None:
        await trio.sleep(500.0)
        await say(send, b"late")

    async with open_connection(slow) as client:
        await client.send_all(HELLO)
        assert body_of(await read_until(client, b"late")) == b"late"
        assert trio.current_time() == pytest.approx(500.0)
        assert await read_all(client) == b""
        assert trio.current_time() == pytest.approx(575.0)


@pytest.mark.parametrize("request_head", [HELLO[:-2] + b"Connection: close\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n"])
async def test_the_client_may_ask_for_the_end(autojump_clock: trio.testing.MockClock, request_head: bytes) -> None:
    """After ``Connection: close`` or HTTP/1.0 the connection ends with the response."""
    async with open_connection(hello) as client:
        await client.send_all(request_head)
        assert body_of(await read_all(client)) == b"GET /"
        assert trio.current_time() == 0.0


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in pieces"])
@pytest.mark.parametrize(("status", "data"), BAD.values(), ids=BAD)
async def test_a_refusal_is_an_error_in_openai_shape(
    autojump_clock: trio.testing.MockClock, status: int, data: bytes, whole: bool
) -> None:
    """A bad head gets its status and the error object, and the connection ends; the app is not called."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await trio.lowlevel.checkpoint()
        raise AssertionError("it was called")

    async with open_connection(app) as client, trio.open_nursery() as nursery:

        async def send() -> None:
            step = len(data) if whole else 1 if len(data) < 1000 else 97
            with contextlib.suppress(trio.BrokenResourceError):
                for start in range(0, len(data), step):
                    await client.send_all(data[start : start + step])

        nursery.start_soon(send)
        response = await read_all(client)
        assert response.startswith(b"HTTP/1.1 %d " % status)
        assert b"\r\nconnection: close\r\n" in response
        assert json.loads(body_of(response))["error"]["type"] == "invalid_request_error"
        assert trio.current_time() == 0.0


JAVA = (  # the head of Java's HTTP client
    b"POST /v1 HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nHost: x\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\n"
)


@pytest.mark.parametrize(
    "body", [b"Content-Length: 2\r\n\r\n{}", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"]
)
async def test_an_offer_to_upgrade_is_ignored(autojump_clock: trio.testing.MockClock, body: bytes) -> None:
    """The request is served as HTTP/1.1, with its whole body, and the connection serves the next one."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        data, more = b"", True
        while more:
            message = await receive()
            data, more = data + message.get("body", b""), message.get("more_body", False)
        await say(send, data + b"!")

    async with open_connection(app) as client:
        for _ in range(2):
            await client.send_all(JAVA + body)
            response = await read_until(client, b"!")
            assert response.startswith(b"HTTP/1.1 200 ")
            assert body_of(response) == b"{}!"


@pytest.mark.parametrize(
    "fields",
    [
        b"Connection: Upgrade\r\nUpgrade: WebSocket\r\n",
        b"Connection: keep-alive\r\nConnection: a, Upgrade\r\nUpgrade: b\r\nUpgrade: websocket , c\r\n",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        b"Sec-WebSocket-Version: 13\r\nContent-Length: 1\r\n",
    ],
    ids=["no key", "among others", "a short key", "no version", "a body"],
)
async def test_an_incomplete_websocket_handshake_is_a_426(
    autojump_clock: trio.testing.MockClock, fields: bytes
) -> None:
    """The status on which clients that try a WebSocket first go on by HTTP, with the fields that it requires."""
    async with open_connection(hello) as client:
        await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\ntrailing")
        response = await read_all(client)
    assert response.startswith(b"HTTP/1.1 426 Upgrade Required\r\n")
    assert b"\r\nupgrade: websocket\r\n" in response
    assert b"\r\nconnection: upgrade, close\r\n" in response
    error = json.loads(body_of(response))["error"]
    assert error["code"] == "websocket_refused"
    assert "by HTTP" in error["message"]


async def test_a_bad_second_request_is_refused_too(autojump_clock: trio.testing.MockClock) -> None:
    """A head is also checked when it arrives together with the request before it."""
    async with open_connection(hello) as client:
        await client.send_all(HELLO + HELLO[:-2] + b"Host: y\r\n\r\n")
        response = await read_all(client)
        assert response.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 400 " in response


async def test_a_bad_chunk_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    """A body that does not match its head gets a 400, and the app a disconnect, whatever it does then."""
    seen = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            pass
        seen.append(message)
        await say(send, b"too late")

    async with open_connection(app) as client:
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n")
        response = await read_all(client)
        assert response.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body_of(response))["error"]["code"] == "invalid_request"
    assert seen == [{"type": "http.disconnect"}]


async def test_a_refusal_and_an_answer_do_not_mix(autojump_clock: trio.testing.MockClock) -> None:
    """The response of an app whose request turns out to be bad does not mix with the refusal."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await say(send, b"hasty")

    async with open_connection(app) as client:
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n")
        body_of(await read_all(client))
        assert trio.current_time() == 0.0


async def test_an_early_answer_leaves_nothing_waiting(autojump_clock: trio.testing.MockClock) -> None:
    """An app may respond without reading. The rest of the body is discarded, within bounds, and the connection ends."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await trio.sleep(1.0)  # long enough for its queue to be full
        await say(send, b"too large", status=413, headers=[(b"connection", b"close")])

    async with open_connection(app) as client, trio.open_nursery() as nursery:
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")

        async def upload() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                while True:
                    await client.send_all(b"x" * client_stream.READ_BYTES)
                    await trio.sleep(0.05)

        nursery.start_soon(upload)
        assert body_of(await read_all(client)) == b"too large"
        assert trio.current_time() == pytest.approx(1.0)
    assert trio.current_time() < 1.0 + http1.LINGER_S + 0.1


async def test_lingering_ends(autojump_clock: trio.testing.MockClock) -> None:
    """After a refusal, the server waits at most `LINGER_S` for a client that neither reads nor disconnects."""
    client, server = trio.testing.memory_stream_pair()
    await client.send_all(b"GET / HTTP/2.0\r\n\r\n")
    await serve_connection(hello, server, config=CONFIG)
    assert trio.current_time() == pytest.approx(http1.LINGER_S)
    assert (await read_all(client)).startswith(b"HTTP/1.1 505 ")


async def test_disconnect_is_told(autojump_clock: trio.testing.MockClock) -> None:
    """A waiting app gets the disconnect at once, and again with each ``receive``."""
    seen = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        seen.extend([await receive() for _ in range(3)])

    async with open_connection(app) as client:
        await client.send_all(HELLO)
        await trio.sleep(1.0)
        await client.aclose()
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect", "http.disconnect"]
    assert trio.current_time() == pytest.approx(1.0)


@pytest.mark.parametrize("behind", [b"G", b"\r\n", HELLO, HELLO * 10_000], ids=["byte", "line", "request", "many"])
async def test_disconnect_is_told_also_behind_another_request(
    autojump_clock: trio.testing.MockClock, behind: bytes
) -> None:
    """A disconnect is reported behind any pipelined input, and that input is not served."""
    told = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        told.append((await receive())["type"])

    async with open_connection(app) as client:
        await client.send_all(HELLO + behind[: http1.READ_AHEAD_BYTES // 2])
        await trio.testing.wait_all_tasks_blocked()
        await client.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert told == ["http.disconnect"]


async def test_disconnect_is_told_in_a_later_request_too(autojump_clock: trio.testing.MockClock) -> None:
    """Also if the task that waited in the request before was cancelled together with the end of the response."""
    told = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            told.append(scope["path"])
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await trio.sleep(1.0 if scope["path"] == "/a" else 100.0)
            await say(send, b"!")
            nursery.cancel_scope.cancel()

    async with open_connection(app) as client:
        await client.send_all(HELLO.replace(b"/ ", b"/a "))
        await read_until(client, b"!")
        await client.send_all(HELLO.replace(b"/ ", b"/b "))
        await trio.sleep(1.0)
        await client.aclose()
        await trio.sleep(1.0)
        assert told == ["/b"]


async def test_a_crash_of_the_app_is_a_500(autojump_clock: trio.testing.MockClock, logs: Any) -> None:
    """An app that raises before it responds causes a 500 in OpenAI's shape, and one line in the log."""
    logs.expect_error("app_crashed")

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        raise RuntimeError("a defect")

    async with open_connection(app) as client:
        await client.send_all(HELLO)
        response = await read_until(client, b"}}")
        assert response.startswith(b"HTTP/1.1 500 ")
        assert json.loads(body_of(response))["error"]["code"] == "internal_error"
        assert b"a defect" not in response
    assert len(logs.named("app_crashed")) == 1


async def test_a_crash_after_the_head_cuts_the_answer(autojump_clock: trio.testing.MockClock, logs: Any) -> None:
    """The response of an app that raises halfway is truncated."""
    logs.expect_error("app_crashed")

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("a defect")

    async with open_connection(app) as client:
        await client.send_all(HELLO)
        response = await read_all(client)
        assert response.endswith(b"\r\n4\r\nhalf\r\n")


async def test_expect_continue(autojump_clock: trio.testing.MockClock) -> None:
    """A client that expects status 100 gets it before it sends its body."""
    async with open_connection(hello) as client:
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert (await read_until(client, b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        await client.send_all(b"{}")
        assert body_of(await read_until(client, b"POST /")) == b"POST /"


async def test_a_cancelled_send_is_whole_or_not_at_all(autojump_clock: trio.testing.MockClock) -> None:
    """A cancelled send arrives completely or not at all, so the app can still end its response properly."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        begin = {"type": "http.response.start", "status": 200, "headers": []}
        with trio.CancelScope() as cancelled:
            cancelled.cancel()
            await send(begin)
        assert cancelled.cancelled_caught
        await send(begin)
        with trio.move_on_after(1.0):
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            await send({"type": "http.response.body", "body": b"data: 2\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: error\n\n"})

    client, server = trio.testing.memory_stream_pair()
    slow = SlowStream(server, 2.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve_connection, app, slow, config=CONFIG))
        await client.send_all(HELLO)
        body = (await read_until(client, b"0\r\n\r\n")).partition(b"\r\n\r\n")[2]
        assert body == b"9\r\ndata: 1\n\n\r\nd\r\ndata: error\n\n\r\n0\r\n\r\n"
        await client.aclose()


class SlowStream(trio.abc.Stream):
    """A stream that pauses before, in the middle of and after each send of a body."""

    def __init__(self, stream: trio.abc.Stream, pause_s: float) -> None:
        self._stream = stream
        self._pause_s = pause_s

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Sends the data in two halves."""
        middle = len(data) // 2
        for half in (data[:middle], data[middle:]):
            await trio.sleep(self._pause_s if b"data: 1" in bytes(data) else 0)
            await self._stream.send_all(half)

    async def wait_send_all_might_not_block(self) -> None:
        """Waits until the inner stream may accept data."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Receives from the inner stream."""
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """Closes the inner stream."""
        await self._stream.aclose()


# -- responses --------------------------------------------------------------------------------------------------------


async def ask(app: Application, *requests: bytes) -> bytes:
    """Sends requests at once, and returns everything that the server sends until the connection ends."""
    async with open_connection(app) as client:
        await client.send_all(b"".join(requests))
        return await read_all(client)


def answer(*messages: Message) -> Application:
    """Makes an app that sends these messages for any request."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(dict(message))

    return app


START: Message = {"type": "http.response.start", "status": 200, "headers": []}
LAST: Message = {"type": "http.response.body", "body": b"last"}
CLOSE = HELLO[:-2] + b"Connection: close\r\n\r\n"


async def test_a_body_without_length_comes_in_chunks(autojump_clock: trio.testing.MockClock) -> None:
    """HTTP/1.1 gets chunks; HTTP/1.0 gets a body that ends with the connection, even if it asks to keep it open."""
    piece = {"type": "http.response.body", "body": b"first", "more_body": True}
    app = answer(START, piece, {**piece, "body": b""}, LAST)
    assert (await ask(app, CLOSE)).endswith(b"\r\n\r\n5\r\nfirst\r\n4\r\nlast\r\n0\r\n\r\n")
    response = await ask(app, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert response.endswith(b"\r\nconnection: close\r\n\r\nfirstlast")
    assert b"chunked" not in response


async def test_http10_may_keep_its_connection(autojump_clock: trio.testing.MockClock) -> None:
    """An HTTP/1.0 client that asks for it keeps its connection after a response of known length."""
    old = b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"
    response = await ask(hello, old, old, CLOSE)
    assert response.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert response.count(b"\r\nconnection: keep-alive\r\n") == 2


@pytest.mark.parametrize(("method", "status"), [(b"HEAD", 200), (b"GET", 204), (b"GET", 304), (b"HEAD", 404)])
async def test_answers_without_a_body(autojump_clock: trio.testing.MockClock, method: bytes, status: int) -> None:
    """Responses to HEAD, 204 and 304 end with their head, whatever the app sends; the next response follows."""
    app = answer({**START, "status": status, "headers": [(b"content-length", b"4")]}, LAST)
    response = await ask(app, CLOSE.replace(b"Connection: close\r\n", b"").replace(b"GET", method) * 2)
    heads = response.split(b"\r\n\r\n")
    assert len(heads) == 3
    assert heads[2] == b""
    assert all(head.startswith(b"HTTP/1.1 %d " % status) for head in heads[:2])
    assert (b"content-length" in heads[0]) is (status != 204)


@pytest.mark.parametrize(
    "messages",
    [
        (LAST,),
        (START, START),
        ({**START, "status": 99}, LAST),
        ({**START, "headers": [(b"a", b"b\r\nc: d")]}, LAST),
        ({**START, "headers": [(b"a", b"\0")]}, LAST),
        ({**START, "headers": [(b"a b", b"c")]}, LAST),
        ({**START, "headers": [(b"content-length", b"4"), (b"Content-Length", b"4")]}, LAST),
        ({**START, "headers": [(b"content-length", b"-4")]}, LAST),
        ({**START, "headers": [(b"content-length", b"3")]}, LAST),
        ({"type": "websocket.accept"},),
    ],
)
async def test_what_is_no_response_is_a_500(
    autojump_clock: trio.testing.MockClock, logs: Any, messages: Sequence[Message]
) -> None:
    """An app that violates HTTP or ASGI before anything is sent causes a 500, and an error in the log."""
    logs.expect_error("app_crashed")
    response = await ask(answer(*messages), CLOSE)
    assert response.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    body_of(response)


@pytest.mark.parametrize("messages", [(), (START,)])
async def test_an_app_that_does_not_answer_is_a_500(
    autojump_clock: trio.testing.MockClock, messages: Sequence[Message]
) -> None:
    """An app that returns without a response causes a 500."""
    assert (await ask(answer(*messages), CLOSE)).startswith(b"HTTP/1.1 500 ")


async def test_an_answer_without_its_end_ends_the_connection(autojump_clock: trio.testing.MockClock) -> None:
    """The response of an app that returns halfway is truncated, and pipelined requests are not served."""
    piece = {"type": "http.response.body", "body": b"half", "more_body": True}
    response = await ask(answer(START, piece), HELLO, HELLO)
    assert response.count(b"HTTP/1.1 200 ") == 1
    assert response.endswith(b"4\r\nhalf\r\n")


async def test_an_app_may_end_the_connection(autojump_clock: trio.testing.MockClock) -> None:
    """The server obeys the app's ``connection: close``, and drops its other framing headers."""
    headers = [(b"Connection", b"close"), (b"transfer-encoding", b"gzip"), (b"date", b"today")]
    response = await ask(answer({**START, "headers": headers}, LAST), HELLO)
    assert response == (
        b"HTTP/1.1 200 OK\r\ndate: today\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        b"4\r\nlast\r\n0\r\n\r\n"
    )


async def test_a_head_waits_for_its_body(autojump_clock: trio.testing.MockClock) -> None:
    """The head is sent with the first piece of the body, even an empty one, or by a flush; never twice."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        client = scope["extensions"]["trigate.client"]
        await send(dict(START))
        await trio.sleep(1.0)
        if scope["path"] == "/flush":
            await client.flush()
            assert client.chunked
            await client.flush()
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": True})
        await trio.sleep(1.0)
        await send(dict(LAST))

    for path in (b"/flush", b"/empty"):
        async with open_connection(app) as client:
            began = trio.current_time()
            await client.send_all(HELLO.replace(b" / ", b" %b " % path))
            head = await read_until(client, b"\r\n\r\n")
            assert head.count(b"HTTP/1.1") == 1
            assert trio.current_time() - began == pytest.approx(1.0)
            assert await read_until(client, b"0\r\n\r\n") == b"4\r\nlast\r\n0\r\n\r\n"


async def test_expect_continue_is_answered_only_to_who_reads(autojump_clock: trio.testing.MockClock) -> None:
    """An app that does not read the body does not ask for it. The connection ends, as it is unknown what follows."""
    expecting = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    async with open_connection(answer({**START, "status": 401}, LAST)) as client:
        await client.send_all(expecting)
        response = await read_all(client)
        assert response.startswith(b"HTTP/1.1 401 ")
        assert b"HTTP/1.1 100 " not in response
    async with open_connection(hello) as client:
        await client.send_all(expecting + b"{}")  # it does not wait
        assert (await read_until(client, b"POST /")).startswith(b"HTTP/1.1 200 ")


async def test_a_disconnect_is_told_after_the_answer_too(autojump_clock: trio.testing.MockClock) -> None:
    """The end of the response ends a ``receive`` that waits for a disconnect."""
    told = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        async def watch() -> None:
            await receive()
            told.append((await receive())["type"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await trio.sleep(1.0)
            await say(send, b"!")
        told.append((await receive())["type"])

    async with open_connection(app) as client:
        for _ in range(2):
            await client.send_all(HELLO)
            await read_until(client, b"!")
    assert told == ["http.disconnect"] * 4


async def test_two_tasks_may_send(autojump_clock: trio.testing.MockClock) -> None:
    """Pieces that two tasks send at the same time do not mix, also if the client is slow."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await send(dict(START))
        async with trio.open_nursery() as nursery:
            for letter in (b"a", b"b", b"c"):
                body = b"data: 1" + letter * 93
                nursery.start_soon(send, {"type": "http.response.body", "body": body, "more_body": True})
        await send(dict(LAST))

    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve_connection, app, SlowStream(server, 1.0), config=CONFIG))
        await client.send_all(CLOSE)
        pieces = (await read_until(client, b"0\r\n\r\n")).split(b"\r\n")
        for letter in (b"a", b"b", b"c"):
            assert b"data: 1" + letter * 93 in pieces
        await client.aclose()


# -- on sockets -------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_sockets(
    app: Application, *, polled: bool = True
) -> AsyncIterator[tuple[trio.SocketStream, http1.Connection]]:
    """Serves an app on one TCP connection, with or without a poller, and yields the client's end."""
    async with poller.open_poller() as found, open_timers() as timers, trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            near = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
            far = await listener.accept()
        connection = http1.Connection(http1.Service(app, timers, 75.0, {}, found if polled else None), far)
        nursery.start_soon(connection.run)
        with trio.fail_after(10):
            yield near, connection
        await near.aclose()
        nursery.cancel_scope.cancel()


each_way_to_poll = pytest.mark.parametrize(
    "polled",
    [
        pytest.param(True, marks=pytest.mark.skipif(not hasattr(select, "epoll"), reason="no epoll")),
        False,
    ],
    ids=["polled", "not polled"],
)


@pytest.mark.skipif(sys.platform != "linux", reason="not to be seen elsewhere")
async def test_what_a_slow_client_takes_shows() -> None:
    """While a write waits, `taken_bytes` grows whenever the client's system takes bytes, and only then."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await say(send, bytes(16 * 1024 * 1024))

    async with open_sockets(app) as (client, connection):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        await client.send_all(HELLO)
        await trio.testing.wait_all_tasks_blocked(0.05)
        taken = connection.client_stream.taken_bytes
        assert taken is not None
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert connection.client_stream.taken_bytes == taken
        for _ in range(3):
            received = 0
            while received < 512 * 1024:
                received += len(await client.receive_some())
            await trio.testing.wait_all_tasks_blocked(0.01)
            before, taken = taken, connection.client_stream.taken_bytes
            assert taken is not None
            assert taken > before
        await connection.abort()
        assert connection.client_stream.taken_bytes is None


@each_way_to_poll
@pytest.mark.parametrize("behind", [b"", b"G", HELLO * 1000], ids=["nothing", "byte", "many"])
@pytest.mark.parametrize("how", ["reset", "close", "half-close"])
async def test_leaving_is_told_on_sockets(polled: bool, behind: bytes, how: str) -> None:
    """A disconnect of any kind, behind any input, is reported while the app waits."""
    told = []
    waiting = trio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        waiting.set()
        told.append((await receive())["type"])

    async with open_sockets(app, polled=polled) as (client, _):
        await client.send_all(HELLO + behind)
        await waiting.wait()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not told
        await leave(client, how)
        while not told:
            await trio.testing.wait_all_tasks_blocked(0.001)
    assert told == ["http.disconnect"]


async def wait_half_closed(scope: Message, receive: Receive, send: Send) -> None:
    """Reads the body, waits for the end of the client's sending side, and responds."""
    client = scope["extensions"]["trigate.client"]
    client.serve_half_closed()
    while (await receive()).get("more_body"):
        pass
    async with trio.open_nursery() as nursery:

        async def cancel_if_disconnected() -> None:
            assert (await receive())["type"] == "http.disconnect"
            nursery.cancel_scope.cancel()

        if not client.watch(nursery.cancel_scope.cancel):
            nursery.start_soon(cancel_if_disconnected)
        with trio.move_on_after(0.05):
            await trio.sleep_forever()
        await say(send, b"served")
        nursery.cancel_scope.cancel()


@each_way_to_poll
@pytest.mark.parametrize("behind", [b"", HELLO], ids=["nothing", "a request"])
async def test_a_half_closed_client_may_be_served(polled: bool, behind: bytes) -> None:
    """If the app asks for it, a client that has closed its sending side gets the answers to all that it has sent; then
    the connection ends. This also holds for the second request of a connection."""
    async with open_sockets(wait_half_closed, polled=polled) as (client, _):
        await client.send_all(HELLO)
        assert (await client.receive_some()).endswith(b"served")
        await client.send_all(HELLO + behind)
        await client.send_eof()
        assert (await read_all(client)).count(b"\r\n\r\nserved") == 1 + bool(behind)


@each_way_to_poll
async def test_a_half_closed_client_that_is_gone(polled: bool) -> None:
    """A reset after the half-close is a disconnect: a poller reports it at once, and elsewhere a write notices it."""
    gone, asked = trio.Event(), trio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        client = scope["extensions"]["trigate.client"]
        client.serve_half_closed()
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if client.watch(gone.set):
            asked.set()
            await gone.wait()
        else:
            asked.set()
            while not connection.client_stream.disconnected:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
                await trio.sleep(0.001)
            gone.set()

    async with open_sockets(app, polled=polled) as (client, connection):
        await client.send_all(HELLO)
        await asked.wait()
        await client.send_eof()
        await trio.sleep(0.01)
        assert not gone.is_set()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await client.aclose()
        await gone.wait()
        assert connection.client_stream.disconnected


async def test_half_a_request_is_never_served(autojump_clock: trio.testing.MockClock) -> None:
    """A client that closes its sending side within the body has disconnected in any case."""
    told = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        scope["extensions"]["trigate.client"].serve_half_closed()
        while (message := await receive())["type"] == "http.request":
            pass
        told.append(message["type"])

    async with open_connection(app) as client:
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
        await client.send_eof()
        await read_all(client)
    assert told == ["http.disconnect"]


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="no epoll")
async def test_leaving_is_told_where_the_kernel_refuses_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disconnect is reported also where the poller cannot watch another socket."""
    told = []

    def refuse(self: object, fd: int, events: int, callback: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        told.append((await receive())["type"])

    monkeypatch.setattr(poller.Poller, "add", refuse)
    async with open_sockets(app) as (client, _):
        await client.send_all(HELLO)
        await client.aclose()
        while not told:
            await trio.testing.wait_all_tasks_blocked(0.001)
    assert told == ["http.disconnect"]


async def leave(client: trio.SocketStream, how: str) -> None:
    """Disconnects."""
    if how == "half-close":
        await client.send_eof()
    else:
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await client.aclose()


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="no epoll")
@pytest.mark.parametrize("how", ["close", "half-close"])
async def test_watch_calls_back_once(how: str) -> None:
    """`Client.watch` calls back when the client disconnects during the request, and not in a later request."""
    calls: list[str] = []
    go_on = trio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        client = scope["extensions"]["trigate.client"]
        assert client.watch(lambda: calls.append(scope["path"]))
        if scope["path"] == "/last":
            await go_on.wait()
        await say(send, b"!")

    async with open_sockets(app) as (client, _):
        await client.send_all(HELLO.replace(b" / ", b" /first "))
        await read_until(client, b"!")
        await client.send_all(HELLO.replace(b" / ", b" /last ") + HELLO)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert calls == []
        await leave(client, how)
        while not calls:
            await trio.testing.wait_all_tasks_blocked(0.001)
        go_on.set()
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert calls == ["/last"]


async def test_there_is_nothing_to_watch_without_a_socket(autojump_clock: trio.testing.MockClock) -> None:
    """On other streams, `Client.watch` returns False, and there is no socket to write to."""
    found = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        client = scope["extensions"]["trigate.client"]
        found.append((client.watch(lambda: None), client.socket))
        await say(send, b"!")

    await ask(app, CLOSE)
    assert found == [(False, None)]


@each_way_to_poll
async def test_a_body_written_to_the_socket(polled: bool) -> None:
    """After a flush, an app may write chunks to the client's socket itself, and end with ``send``."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        client = scope["extensions"]["trigate.client"]
        await send(dict(START))
        await client.flush()
        assert client.chunked
        client.socket.send(b"6\r\ndirect\r\n")
        await send(dict(LAST))

    async with open_sockets(app, polled=polled) as (client, _):
        for _ in range(2):
            await client.send_all(HELLO)
            assert (await read_until(client, b"0\r\n\r\n")).endswith(b"\r\n\r\n6\r\ndirect\r\n4\r\nlast\r\n0\r\n\r\n")


@each_way_to_poll
async def test_abort_frees_a_send(polled: bool) -> None:
    """`Client.abort` from another task ends a send that waits, and closes the socket at once."""
    left: list[str] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        client = scope["extensions"]["trigate.client"]
        client.watch(lambda: left.append("left"))
        plain = client.socket
        await send(dict(START))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, {"type": "http.response.body", "body": bytes(2**24), "more_body": True})
            await trio.testing.wait_all_tasks_blocked(0.01)
            with trio.CancelScope() as scope_:  # the send is shielded
                scope_.cancel()
                await trio.lowlevel.checkpoint()
            await client.abort()
        assert client.socket is None
        assert plain.fileno() == -1
        await send(dict(LAST))
        left.append((await receive())["type"])
        left.append((await receive())["type"])

    async with open_sockets(app, polled=polled) as (client, _):
        await client.send_all(HELLO)
        with contextlib.suppress(trio.BrokenResourceError):
            while await client.receive_some():
                pass
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert left[polled:] == ["http.request", "http.disconnect"]


async def test_a_fast_client_does_not_hold_up_others() -> None:
    """Other tasks run while an app sends and receives without having to wait."""
    turns = 0

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        async def count() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            await send(dict(START))
            for _ in range(100):
                await send({"type": "http.response.body", "body": bytes(40_000), "more_body": True})
            nursery.cancel_scope.cancel()
        await send(dict(LAST))

    async with open_sockets(app) as (client, _):
        await client.send_all(CLOSE)
        assert (await read_all(client)).endswith(b"4\r\nlast\r\n0\r\n\r\n")
    assert turns


@pytest.mark.slow
async def test_all_clients_that_still_send_read_the_refusal() -> None:
    """1000 of 1000 clients whose body is refused early read the status, and do not get a reset in its place."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        await say(send, b"too large", status=413)

    body = bytes(4 * 1024 * 1024)
    read = 0
    limit = trio.CapacityLimiter(20)

    async def ask_one() -> None:
        nonlocal read
        async with limit, open_sockets(app) as (client, _), trio.open_nursery() as nursery:
            await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
            nursery.start_soon(client.send_all, body)
            assert body_of(await read_all(client)) == b"too large"
            read += 1

    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(ask_one)
    assert read == 1000


# -- closing an idle connection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("draining", [True, False])
async def test_a_request_that_comes_with_the_end_is_answered(draining: bool) -> None:
    """A request that has arrived when an idle connection is closed is answered, and not reset. A client that has sent
    half a head is too late, and the connection is not extended a second time."""
    for before, after, answers in ((b"", HELLO, 1), (HELLO[:9], HELLO[9:], 0), (b"", b"", 0)):
        ours, theirs = socket.socketpair()
        async with open_timers() as timers, trio.open_nursery() as nursery:
            service = http1.Service(hello, timers, 0.1)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
            connection = http1.Connection(service, stream)
            nursery.start_soon(connection.run)
            await trio.testing.wait_all_tasks_blocked()
            ours.send(before)
            await trio.testing.wait_all_tasks_blocked(0.01)
            ours.send(after)
            service.announces_close = service.draining = draining
            connection.close_if_idle()
            async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as client:
                data = b""
                with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(2):
                    data = await read_all(client)
            assert data.count(b"HTTP/1.1 200") == answers
            assert data.count(b"connection: close") == (answers if draining else 0)
