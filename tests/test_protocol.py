"""`trigate.protocol`: one connection, on memory streams and virtual time."""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
import trio
import trio.testing
import trustme
from test_request_head import BAD

from trigate import protocol
from trigate.config import ServerConfig
from trigate.protocol import Application, Message, Receive, Send, serve_connection

CONFIG = ServerConfig(keep_alive_timeout_s=75.0)
HELLO = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

Pair = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]


async def hello(scope: Message, receive: Receive, send: Send) -> None:
    """Says the path and the method; reads the body first."""
    while (await receive()).get("more_body"):
        pass
    await say(send, f"{scope['method']} {scope['path']}".encode())


async def say(send: Send, body: bytes, *, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Answers."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def open_connection(app: Application, **kwargs: Any) -> AsyncIterator[Pair]:
    """Serves an app on one end of a stream, and gives the other; the server must have ended it by the end."""
    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve_connection, app, server, config=CONFIG, **kwargs))
        yield client
        await client.aclose()


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Everything up to the end."""
    return b"".join([bytes(data) async for data in stream])


async def read_until(stream: trio.abc.ReceiveStream, end: bytes) -> bytes:
    """Everything up to some bytes, which must be the last that have come."""
    data = b""
    while not data.endswith(end):
        more = await stream.receive_some()
        assert more, f"the connection ended: {data!r}"
        data += more
    return data


def body_of(response: bytes) -> bytes:
    """The body of a response whose head it also checks: complete, and without the server's name."""
    head, _, body = response.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert b"content-length: %d" % len(body) in lines, response
    assert any(line.startswith(b"date: ") for line in lines)
    assert not any(line.startswith(b"server:") for line in lines)
    return body


async def test_requests_follow_each_other(autojump_clock: trio.testing.MockClock) -> None:
    """A connection serves one request after another, also when they are sent at once."""
    async with open_connection(hello) as client:
        for path in ("/a", "/b"):
            await client.send_all(HELLO.replace(b"/ ", path.encode() + b" "))
            assert body_of(await read_until(client, path.encode())) == b"GET " + path.encode()
        await client.send_all(HELLO.replace(b"/ ", b"/c ") + HELLO.replace(b"/ ", b"/d "))
        both = await read_until(client, b"/d")
        assert both.count(b"HTTP/1.1 200") == 2
        assert b"GET /c" in both


async def test_the_scope_holds_the_state(autojump_clock: trio.testing.MockClock) -> None:
    """Each request sees the lifespan state as a copy, and the addresses that the caller gave."""
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


@pytest.mark.parametrize("sent", [b"", b"GET / HT", HELLO[:-2]])
async def test_an_incomplete_head_has_a_deadline(autojump_clock: trio.testing.MockClock, sent: bytes) -> None:
    """A connection on which no whole request head arrives is closed after the keep-alive timeout."""
    async with open_connection(hello) as client:
        if sent:
            await client.send_all(sent)
        assert await read_all(client) == b""
        assert trio.current_time() == pytest.approx(75.0)


async def test_a_drip_does_not_move_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """A head that arrives byte by byte has the same deadline as one that does not arrive."""
    async with open_connection(hello) as client, trio.open_nursery() as nursery:

        async def drip() -> None:
            for byte in HELLO:
                await client.send_all(bytes([byte]))
                await trio.sleep(10.0)

        nursery.start_soon(drip)
        assert await read_all(client) == b""
        assert trio.current_time() == pytest.approx(75.0)
        nursery.cancel_scope.cancel()


async def test_an_idle_connection_is_closed(autojump_clock: trio.testing.MockClock) -> None:
    """The keep-alive timeout counts from the end of the last response; a long one is not cut by it."""

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
    """A bad head gets its status, the error object, and the end of the connection; the app sees nothing of it."""

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


async def test_a_bad_second_request_is_refused_too(autojump_clock: trio.testing.MockClock) -> None:
    """A head is judged also when it came together with the request before it."""
    async with open_connection(hello) as client:
        await client.send_all(HELLO + HELLO[:-2] + b"Host: y\r\n\r\n")
        response = await read_all(client)
        assert response.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 400 " in response


async def test_a_bad_chunk_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    """A body that is not what its head says gets a 400 with a body, and the app a disconnect, whatever it does then."""
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
    """An app that answers while its request turns out to be bad cannot tear the refusal apart."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await say(send, b"hasty")

    async with open_connection(app) as client:
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n")
        body_of(await read_all(client))
        assert trio.current_time() == 0.0


async def test_an_early_answer_leaves_nothing_waiting(autojump_clock: trio.testing.MockClock) -> None:
    """An app may answer without reading; the rest of the body is discarded, within bounds, and the connection ends."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await trio.sleep(1.0)  # long enough for its queue to be full
        await say(send, b"too large", status=413, headers=[(b"connection", b"close")])

    async with open_connection(app) as client, trio.open_nursery() as nursery:
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")

        async def upload() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                while True:
                    await client.send_all(b"x" * protocol.READ_BYTES)
                    await trio.sleep(0.05)

        nursery.start_soon(upload)
        assert body_of(await read_all(client)) == b"too large"
        assert trio.current_time() == pytest.approx(1.0)
    assert trio.current_time() < 1.0 + protocol.LINGER_S


async def test_lingering_ends(autojump_clock: trio.testing.MockClock) -> None:
    """A client that neither reads on nor leaves after a refusal is waited for as long as `LINGER_S`, not longer."""
    client, server = trio.testing.memory_stream_pair()
    await client.send_all(b"GET / HTTP/2.0\r\n\r\n")
    await serve_connection(hello, server, config=CONFIG)
    assert trio.current_time() == pytest.approx(protocol.LINGER_S)
    assert (await read_all(client)).startswith(b"HTTP/1.1 505 ")


async def test_disconnect_is_told(autojump_clock: trio.testing.MockClock) -> None:
    """An app that waits is told at once that its client is gone, and again as often as it asks."""
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
    """Whatever was sent behind a request, a client that leaves meanwhile ends it; what it left behind is not served."""
    told = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        told.append((await receive())["type"])

    async with open_connection(app) as client:
        await client.send_all(HELLO + behind[: protocol.READ_AHEAD_BYTES // 2])
        await trio.testing.wait_all_tasks_blocked()
        await client.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert told == ["http.disconnect"]


async def test_a_crash_of_the_app_is_a_500(autojump_clock: trio.testing.MockClock, logs: Any) -> None:
    """An app that raises before it answers gives a 500 in OpenAI's shape, and one line in the log."""
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
    """An app that raises within its answer gets no proper end to it."""
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
    """A client that asks before it sends its body is told to go on."""
    async with open_connection(hello) as client:
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert (await read_until(client, b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        await client.send_all(b"{}")
        assert body_of(await read_until(client, b"POST /")) == b"POST /"


async def test_a_cancelled_send_is_whole_or_not_at_all(autojump_clock: trio.testing.MockClock) -> None:
    """Of a send that is cancelled, all arrives or nothing: the app can still end its answer properly."""

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
    """A stream whose sends of a body take a while before, in the middle and after."""

    def __init__(self, stream: trio.abc.Stream, pause_s: float) -> None:
        self._stream = stream
        self._pause_s = pause_s

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Sends in two halves."""
        middle = len(data) // 2
        for half in (data[:middle], data[middle:]):
            await trio.sleep(self._pause_s if b"data: 1" in bytes(data) else 0)
            await self._stream.send_all(half)

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream behind."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As the stream behind."""
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """As the stream behind."""
        await self._stream.aclose()


# -- HTTP/2 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority of the test's own."""
    return trustme.CA()


class H2Client:
    """An HTTP/2 client on any stream, that does not mind what it is told to send."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.connection = h2.connection.H2Connection(
            h2.config.H2Configuration(
                header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
            )
        )
        self.connection.initiate_connection()
        self.events: list[h2.events.Event] = []
        self.statuses: dict[int, int] = {}
        self.bodies: dict[int, bytes] = {}

    async def flush(self) -> None:
        """Sends what is to be sent."""
        data = self.connection.data_to_send()
        if data:
            await self.stream.send_all(data)

    async def ask(self, headers: Sequence[tuple[bytes, bytes]], *, end: bool = True) -> int:
        """Sends a request's head; gives its stream's number."""
        number = self.connection.get_next_available_stream_id()
        self.connection.send_headers(number, headers, end_stream=end)
        await self.flush()
        return number

    async def read(self, kind: type[h2.events.Event], number: int | None = None) -> Any:
        """Reads until an event of a kind has come; gives it, or None if the connection ended."""
        while True:
            for event in self.events:
                if isinstance(event, kind) and number in (None, getattr(event, "stream_id", None)):
                    return event
            data = await self.stream.receive_some()
            if not data:
                return None
            for event in self.connection.receive_data(data):
                self.events.append(event)
                if isinstance(event, h2.events.ResponseReceived):
                    assert event.headers is not None
                    self.statuses[event.stream_id] = int(dict(event.headers)[b":status"])
                if isinstance(event, h2.events.DataReceived):
                    assert event.data is not None
                    self.bodies[event.stream_id] = self.bodies.get(event.stream_id, b"") + event.data
            await self.flush()


H2_GET = ((b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"x"), (b":path", b"/"))
H2_POST = ((b":method", b"POST"), *H2_GET[1:])


@contextlib.asynccontextmanager
async def open_h2(app: Application, authority: trustme.CA, *, alpn: str = "h2") -> AsyncIterator[H2Client]:
    """As `open_connection`, over TLS."""
    server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_tls.set_alpn_protocols(["h2", "http/1.1"])
    authority.issue_cert("gateway.test").configure_cert(server_tls)
    client_tls = ssl.create_default_context()
    client_tls.set_alpn_protocols([alpn])
    authority.configure_trust(client_tls)
    client, server = trio.testing.memory_stream_pair()
    tls = trio.SSLStream(server, server_tls, server_side=True, https_compatible=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve_connection, app, tls, config=CONFIG))
        stream = trio.SSLStream(client, client_tls, server_hostname="gateway.test", https_compatible=True)
        h2_client = H2Client(stream)
        if alpn == "h2":
            await h2_client.flush()
        yield h2_client
        await stream.aclose()


async def test_http2_over_tls(autojump_clock: trio.testing.MockClock, authority: trustme.CA) -> None:
    """HTTP/2 serves several requests at once on one connection."""
    async with open_h2(hello, authority) as client:
        first, second = await client.ask(H2_GET, end=False), await client.ask(H2_GET)
        assert await client.read(h2.events.StreamEnded, second) is not None
        client.connection.end_stream(first)
        await client.flush()
        assert await client.read(h2.events.StreamEnded, first) is not None
        assert client.statuses == {first: 200, second: 200}
        assert client.bodies == {first: b"GET /", second: b"GET /"}


async def test_http1_over_tls(autojump_clock: trio.testing.MockClock, authority: trustme.CA) -> None:
    """A TLS client that wants HTTP/1.1 gets it, with the scheme ``https``."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await say(send, scope["scheme"].encode())

    async with open_h2(app, authority, alpn="http/1.1") as client:
        await client.stream.send_all(HELLO[:-2] + b"Connection: close\r\n\r\n")
        assert body_of(await read_all(client.stream)) == b"https"


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (400, (*H2_GET[:3], (b":path", b"/\xff"))),
        (400, ((b":method", b"G\xc3T"), *H2_GET[1:])),
        (501, ((b":method", b"CONNECT"), (b":authority", b"x:1"))),
    ],
    ids=["path", "method", "CONNECT"],
)
async def test_h2_poison_is_refused(
    autojump_clock: trio.testing.MockClock,
    authority: trustme.CA,
    status: int,
    headers: Sequence[tuple[bytes, bytes]],
) -> None:
    """What hypercorn dies of is an answer, and the connection goes on."""
    async with open_h2(hello, authority) as client:
        number = await client.ask(headers)
        assert await client.read(h2.events.StreamEnded, number) is not None
        assert client.statuses == {number: status}
        assert "error" in json.loads(client.bodies[number])
        after = await client.ask(H2_GET)
        assert await client.read(h2.events.StreamEnded, after) is not None
        assert client.statuses[after] == 200


async def test_h2_offers_no_websocket(autojump_clock: trio.testing.MockClock, authority: trustme.CA) -> None:
    """The settings do not invite to an extended CONNECT."""
    async with open_h2(hello, authority) as client:
        settings = await client.read(h2.events.RemoteSettingsChanged)
        assert settings.changed_settings[h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL].new_value == 0


async def test_h2_data_after_an_early_answer(autojump_clock: trio.testing.MockClock, authority: trustme.CA) -> None:
    """An upload that nobody reads is told to stop, and the connection goes on."""

    async def early(scope: Message, receive: Receive, send: Send) -> None:
        await say(send, b"no", status=413)

    async with open_h2(early, authority) as client:
        number = await client.ask(H2_POST, end=False)
        assert await client.read(h2.events.StreamEnded, number) is not None
        client.connection.send_data(number, b"x" * 1000)
        await client.flush()
        reset = await client.read(h2.events.StreamReset, number)
        assert reset.error_code == 0
        after = await client.ask(H2_POST)
        assert await client.read(h2.events.StreamEnded, after) is not None
        assert client.statuses[after] == 413


async def test_an_idle_h2_connection_is_closed(autojump_clock: trio.testing.MockClock, authority: trustme.CA) -> None:
    """Also when its last request was reset by the client, or refused."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async with open_h2(app, authority) as client:
        await client.read(h2.events.RemoteSettingsChanged)
        number = await client.ask(H2_GET)
        await trio.sleep(100.0)
        client.connection.reset_stream(number)
        await client.flush()
        assert await client.read(h2.events.ConnectionTerminated) is None
        assert trio.current_time() == pytest.approx(175.0)


async def test_an_h2_client_that_does_not_read_stops_its_app(
    autojump_clock: trio.testing.MockClock, authority: trustme.CA
) -> None:
    """An app waits for the client's flow control with a bounded buffer, and no longer than the connection lives."""
    sent, ended = [], []

    async def flood(scope: Message, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(100):
            await send({"type": "http.response.body", "body": b"x" * 10_000, "more_body": True})
            sent.append(number)
        ended.append(trio.current_time())

    async with open_h2(flood, authority) as client:
        number = await client.ask(H2_GET)
        await client.read(h2.events.DataReceived, number)  # and its window of 64 KiB is never opened again
        await trio.sleep(10.0)
        assert not ended
        assert len(sent) * 10_000 < 65_535 + 60_000
        await client.stream.aclose()
    assert ended == [10.0]


@pytest.mark.parametrize("alpn", ["h2", "http/1.1"])
async def test_an_app_that_sends_for_ever_can_be_cancelled(
    autojump_clock: trio.testing.MockClock, authority: trustme.CA, alpn: str
) -> None:
    """An app that does nothing but send, and takes no notice of a disconnect, does not hold up the loop."""
    began, cancelled = trio.Event(), []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with trio.move_on_after(20.0) as scope_:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 10_000, "more_body": True})
                began.set()
        cancelled.append(scope_.cancelled_caught)

    async with open_h2(app, authority, alpn=alpn) as client:
        if alpn == "h2":
            await client.ask(H2_GET)
        else:
            await client.stream.send_all(HELLO)
        await began.wait()
        await client.stream.aclose()
        autojump_clock.jump(20.0)
    assert cancelled == [True]


async def test_a_failed_handshake_is_quiet(
    autojump_clock: trio.testing.MockClock, authority: trustme.CA, logs: Any
) -> None:
    """Plain HTTP on a TLS port, and a peer that says nothing, end the connection without noise."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("gateway.test").configure_cert(tls)
    for sent in (HELLO, b""):
        client, server = trio.testing.memory_stream_pair()
        await client.send_all(sent)
        await serve_connection(hello, trio.SSLStream(server, tls, server_side=True, https_compatible=True))
    assert {entry["log_level"] for entry in logs.entries} <= {"debug"}
    assert trio.current_time() == pytest.approx(protocol.HANDSHAKE_TIMEOUT_S)
