"""`trigate.server.connection` and `http2`: the choice by ALPN, and HTTP/2, on memory streams and virtual time."""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import pytest
import trio
import trio.testing
import trustme
from hyperframe.frame import ContinuationFrame, HeadersFrame

from tests.server.test_http1 import CONFIG, HELLO, body_of, hello, read_all, say
from trigate.server import connection
from trigate.server.connection import serve_connection
from trigate.server.http1 import Application, Message, Receive, Send


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority for the tests."""
    return trustme.CA()


class H2Client:
    """An HTTP/2 client on any stream, which also sends invalid requests."""

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
        """Sends the pending frames."""
        data = self.connection.data_to_send()
        if data:
            await self.stream.send_all(data)

    async def ask(self, headers: Sequence[tuple[bytes, bytes]], *, end: bool = True) -> int:
        """Sends the head of a request, and returns the number of its stream."""
        number = self.connection.get_next_available_stream_id()
        self.connection.send_headers(number, headers, end_stream=end)
        await self.flush()
        return number

    async def read(self, kind: type[h2.events.Event], number: int | None = None) -> Any:
        """Reads until an event of this kind arrives, and returns it; None if the connection ends."""
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


def client_tls(authority: trustme.CA, alpn: str | None) -> ssl.SSLContext:
    """Makes the TLS context of a client that trusts the authority and offers one protocol; None = it offers none."""
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    if alpn is not None:
        trust.set_alpn_protocols([alpn])
    return trust


@contextlib.asynccontextmanager
async def open_h2(app: Application, authority: trustme.CA, *, alpn: str = "h2") -> AsyncIterator[H2Client]:
    """Serves an app over TLS on one end of a stream, and yields an HTTP/2 client on the other."""
    server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_tls.set_alpn_protocols(["h2", "http/1.1"])
    authority.issue_cert("gateway.test").configure_cert(server_tls)
    client, server = trio.testing.memory_stream_pair()
    tls = trio.SSLStream(server, server_tls, server_side=True, https_compatible=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve_connection, app, tls, config=CONFIG))
        trust = client_tls(authority, alpn)
        stream = trio.SSLStream(client, trust, server_hostname="gateway.test", https_compatible=True)
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
    """A TLS client that chooses HTTP/1.1 gets it, with the scheme ``https``."""

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
    """Requests that crash hypercorn are refused, and the connection continues."""
    async with open_h2(hello, authority) as client:
        number = await client.ask(headers)
        assert await client.read(h2.events.StreamEnded, number) is not None
        assert client.statuses == {number: status}
        assert "error" in json.loads(client.bodies[number])
        after = await client.ask(H2_GET)
        assert await client.read(h2.events.StreamEnded, after) is not None
        assert client.statuses[after] == 200


@pytest.mark.parametrize("size", [1, 16_384])
async def test_a_flood_of_continuation_frames_is_cut(
    autojump_clock: trio.testing.MockClock, authority: trustme.CA, size: int
) -> None:
    """The connection ends after 64 KiB of header fields, or 64 frames, before anything is decoded."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await trio.lowlevel.checkpoint()
        raise AssertionError("it was called")

    piece = b"\xff" * size
    async with open_h2(app, authority) as client:
        await client.read(h2.events.RemoteSettingsChanged)
        data = HeadersFrame(1, piece, flags=["END_STREAM"]).serialize()
        data += ContinuationFrame(1, piece).serialize() * min(65_536 // size, 64)
        await client.stream.send_all(data)
        ended = await client.read(h2.events.ConnectionTerminated)
        assert ended.error_code == (h2.errors.ErrorCodes.PROTOCOL_ERROR if size == 1 else 11)
        assert await client.read(h2.events.StreamEnded) is None
        assert trio.current_time() == 0.0


@pytest.mark.parametrize("change", [b"\x20", b"\x3f\xe1\x1f"])
async def test_the_table_changes_its_size_twice_at_most(
    autojump_clock: trio.testing.MockClock, authority: trustme.CA, change: bytes
) -> None:
    """A block of such changes takes seconds to decode, so it is refused undecoded."""
    async with open_h2(hello, authority) as client:
        for times in (2, 3):
            block = change * times + client.connection.encoder.encode(H2_GET)
            number = client.connection.get_next_available_stream_id()
            client.connection.send_headers(number, H2_GET, end_stream=True)
            client.connection.data_to_send()  # its own encoding of the same request
            await client.stream.send_all(HeadersFrame(number, block, flags=["END_STREAM", "END_HEADERS"]).serialize())
            await client.read(h2.events.StreamEnded if times == 2 else h2.events.ConnectionTerminated)
            assert client.statuses == {1: 200}


async def test_large_header_fields_in_several_frames(
    autojump_clock: trio.testing.MockClock, authority: trustme.CA
) -> None:
    """What is within the limits of a request head is served, however it is framed."""
    fields = [*H2_GET, *[(b"a%d" % number, b"x" * 7_000) for number in range(4)]]
    async with open_h2(hello, authority) as client:
        number = await client.ask(fields)
        assert await client.read(h2.events.StreamEnded, number) is not None
        assert client.statuses == {number: 200}


async def test_h2_offers_no_websocket(autojump_clock: trio.testing.MockClock, authority: trustme.CA) -> None:
    """The settings do not offer extended CONNECT."""
    async with open_h2(hello, authority) as client:
        settings = await client.read(h2.events.RemoteSettingsChanged)
        assert settings.changed_settings[h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL].new_value == 0


async def test_h2_data_after_an_early_answer(autojump_clock: trio.testing.MockClock, authority: trustme.CA) -> None:
    """An upload that the app does not read is reset, and the connection continues."""

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
    """An app waits for the client's flow control with a bounded buffer, until the connection ends at the latest."""
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
    """An app that only sends, and ignores a disconnect, does not block the event loop."""
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
    """Plain HTTP on a TLS port, and a client that sends nothing, end the connection without a warning."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("gateway.test").configure_cert(tls)
    for sent in (HELLO, b""):
        client, server = trio.testing.memory_stream_pair()
        await client.send_all(sent)
        await serve_connection(hello, trio.SSLStream(server, tls, server_side=True, https_compatible=True))
    assert {entry["log_level"] for entry in logs.entries} <= {"debug"}
    assert trio.current_time() == pytest.approx(connection.HANDSHAKE_TIMEOUT_S)
