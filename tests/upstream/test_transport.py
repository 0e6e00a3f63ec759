"""Requests over real sockets of loopback: reuse, retries, the queue, TLS, and a cancellation at any point.

The far end is `Server`: a function that plays each connection, and a record of what it saw.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import attrs
import httpx2
import pytest
import trio
import trustme
from trio.testing import MockClock, wait_all_tasks_blocked

from trigate.upstream.connect import Connection, Origin
from trigate.upstream.pool import Response
from trigate.upstream.transport import SocketTransport

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
STREAM = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"

Play = Callable[["Server", trio.abc.Stream], Awaitable[None]]


@attrs.define(eq=False)
class Server:
    """The far end.

    Attributes:
        opened: How many connections it has accepted; closed: how many of them have ended.
        requests: What was asked, as bytes.
    """

    play: Play
    origin: Origin = attrs.field(init=False)
    opened: int = 0
    closed: int = 0
    requests: list[bytes] = attrs.field(factory=list)

    async def serve(self, context: ssl.SSLContext | None, stream: trio.SocketStream) -> None:
        """Plays one connection."""
        self.opened += 1
        try:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self.play(self, stream if context is None else trio.SSLStream(stream, context, server_side=True))
        finally:
            self.closed += 1

    async def read(self, stream: trio.abc.Stream) -> bytes:
        """Returns the next request; empty at the end."""
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            data = bytes(await stream.receive_some())
            if not data:
                return b""
            request += data
            head, found, body = request.partition(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
            if found and length and len(body) >= int(length):
                break
        self.requests.append(request)
        return request


def answers(*responses: bytes, close_after: int = 0, reset: bool = False) -> Play:
    """Plays these responses on each connection in turn, the last again and again.

    Args:
        close_after: Then closes the connection; 0 = never.
    """

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        served = 0
        while await server.read(stream):
            await stream.send_all(responses[min(served, len(responses) - 1)])
            served += 1
            if served == close_after:
                break
        if reset:
            assert isinstance(stream, trio.SocketStream)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(stream)

    return play


@contextlib.asynccontextmanager
async def _open_server(play: Play, *, context: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server(play)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, partial(server.serve, context), 0, host="127.0.0.1"))
        scheme = "http" if context is None else "https"
        server.origin = Origin(scheme, "127.0.0.1", listeners[0].socket.getsockname()[1])
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def _open(play: Play, **settings: object) -> AsyncIterator[tuple[Server, SocketTransport]]:
    async with _open_server(play) as server, SocketTransport(**settings) as transport:  # type: ignore[arg-type]
        with trio.fail_after(100):  # virtual, in some
            yield server, transport


async def _read(response: Response) -> bytes:
    body = b""
    while (piece := await response.receive()) is not None:
        assert piece
        body += piece
    return body


async def _ask(transport: SocketTransport, origin: Origin, request: bytes = GET, *, method: str = "GET") -> bytes:
    async with transport.pool.open(origin, request, method=method) as response:
        return await _read(response)


def _counts(transport: SocketTransport) -> tuple[int, int, int]:
    found = transport.statistics()
    return found.open, found.idle, found.waiting


async def _until(holds: Callable[[], bool]) -> None:
    for _ in range(400):
        if holds():
            return
        await wait_all_tasks_blocked(0.002)
    raise AssertionError("it does not come to hold")


# -- one connection ---------------------------------------------------------------------------------------------------


async def test_a_connection_is_reused() -> None:
    """The head, the body and its end; then the next request goes over the same connection."""
    async with _open(answers(b"HTTP/1.1 201 Made\r\nX-Name: Value\r\ncontent-length: 2\r\n\r\nok")) as (
        server,
        transport,
    ):
        for _ in range(3):
            async with transport.pool.open(server.origin, GET) as response:
                assert (response.status, response.headers) == (201, [(b"x-name", b"Value"), (b"content-length", b"2")])
                assert _counts(transport) == (1, 0, 0)
                assert await response.receive() == b"ok"
                assert await response.receive() is None
                assert await response.receive() is None
            assert _counts(transport) == (1, 1, 0)
        assert server.opened == 1
        assert server.requests == [GET] * 3
    assert _counts(transport) == (0, 0, 0)


async def test_what_is_there_comes_as_one_piece() -> None:
    """Chunks that arrived together leave together."""
    said = STREAM + b"1\r\na\r\n2\r\nbc\r\n1\r\nd\r\n0\r\n\r\n"
    async with _open(answers(said)) as (server, transport), transport.pool.open(server.origin, GET) as response:
        assert await response.receive() == b"abcd"
        assert await response.receive() is None


@pytest.mark.parametrize(
    ("method", "response", "body"),
    [
        ("GET", OK, b"ok"),
        ("GET", STREAM + b"5\r\nhello\r\n3\r\n...\r\n0\r\nx: y\r\n\r\n", b"hello..."),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        ("GET", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", b""),
        ("HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", b""),
        ("GET", b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok"),
    ],
)
async def test_a_response_byte_by_byte(method: str, response: bytes, body: bytes) -> None:
    """However slowly it comes, it is the same, and the connection is good for another one."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        while await server.read(stream):
            for byte in response:
                await stream.send_all(bytes([byte]))
                await trio.lowlevel.checkpoint()

    async with _open(play) as (server, transport):
        for _ in range(2):
            assert await _ask(transport, server.origin, method=method) == body
        assert server.opened == 1


@pytest.mark.parametrize(
    ("response", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", b"ok"),
        (OK + b"more than was promised", b"ok"),
        (OK + OK, b"ok"),
    ],
)
async def test_a_connection_that_is_not_reused(response: bytes, body: bytes) -> None:
    """Where the server says so, where it is of old, and where something follows the answer."""
    async with _open(answers(response)) as (server, transport):
        for count in (1, 2):
            assert await _ask(transport, server.origin) == body
            assert _counts(transport) == (0, 0, 0)
            await _until(lambda count=count: server.closed == server.opened == count)  # type: ignore[misc]


async def test_a_body_that_ends_with_its_connection() -> None:
    """The end of the connection is its end; a new one carries the next request."""
    async with _open(answers(b"HTTP/1.1 200 OK\r\n\r\nto the end", close_after=1)) as (server, transport):
        for _ in range(2):
            assert await _ask(transport, server.origin) == b"to the end"
        assert server.opened == 2


@pytest.mark.parametrize("response", [b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok", STREAM + b"2\r\nok\r\n"])
async def test_a_body_that_is_cut(response: bytes) -> None:
    """What came before the cut is received; then it is an error, and the connection is closed."""
    async with _open(answers(response, close_after=1)) as (server, transport):
        async with transport.pool.open(server.origin, GET) as answer:
            assert await answer.receive() == b"ok"
            with pytest.raises(httpx2.RemoteProtocolError, match="without sending complete message body"):
                await answer.receive()
        assert _counts(transport) == (0, 0, 0)
        assert server.opened == 1


async def test_a_connection_that_is_reset_in_a_body() -> None:
    """A reset is a `ReadError`."""
    async with _open(answers(STREAM, close_after=1, reset=True)) as (server, transport):
        async with transport.pool.open(server.origin, GET) as answer:
            with pytest.raises(httpx2.ReadError, match="reset"):
                await answer.receive()
        assert _counts(transport) == (0, 0, 0)


async def test_an_answer_that_is_left_unread_closes_its_connection() -> None:
    """A block that ends before the body does closes the connection at once: the server sees it."""
    async with _open(answers(STREAM + b"2\r\nok\r\n")) as (server, transport):
        async with transport.pool.open(server.origin, GET) as response:
            assert await response.receive() == b"ok"
        assert _counts(transport) == (0, 0, 0)
        await _until(lambda: server.closed == 1)
        with pytest.raises(httpx2.ReadError, match="closed"):
            await response.receive()


async def test_what_is_not_http() -> None:
    """It is refused with what is wrong with it."""
    async with _open(answers(b"SSH-2.0-OpenSSH_9\r\n")) as (server, transport):
        with pytest.raises(httpx2.RemoteProtocolError, match="Expected HTTP/"):
            await _ask(transport, server.origin)
        assert _counts(transport) == (0, 0, 0)


async def test_another_may_read_the_socket() -> None:
    """A relay takes the plain socket and feeds what it receives; at the end the connection is as good as any."""
    async with _open(answers(STREAM, STREAM)) as (server, transport):
        streams: list[trio.abc.Stream] = []

        async def play(server: Server, stream: trio.abc.Stream) -> None:
            streams.append(stream)
            while await server.read(stream):
                await stream.send_all(STREAM)

        server.play = play
        for _ in range(2):
            async with transport.pool.open(server.origin, GET) as response:
                assert response.socket is not None
                assert response.socket.gettimeout() == 0
                await wait_all_tasks_blocked()
                for text in (b"5\r\nhello\r\n", b"0\r\n\r\n"):
                    await streams[0].send_all(text)
                    await trio.lowlevel.wait_readable(response.socket)
                    response.feed(response.socket.recv(100))
                assert (response.pieces, response.complete) == ([b"hello"], True)
                assert await response.receive() == b"hello"
                assert await response.receive() is None
        assert server.opened == 1
        async with transport.pool.open(server.origin, GET) as response:
            with pytest.raises(httpx2.RemoteProtocolError, match="complete message body"):
                response.feed_eof()
        assert _counts(transport) == (0, 0, 0)


# -- dead connections -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [b"", b"HTTP/1.1 408 Timeout\r\ncontent-length: 0\r\n\r\n"])
async def test_an_idle_connection_that_has_ended_is_not_taken(late: bytes) -> None:
    """Neither one that the server has closed, nor one on which it said something that nobody asked for."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await server.read(stream)
        await stream.send_all(OK)
        await released.wait()
        if late:
            await stream.send_all(late)
        await stream.aclose()

    released = trio.Event()
    async with _open(play) as (server, transport):
        assert await _ask(transport, server.origin) == b"ok"
        released.set()
        await _until(lambda: server.closed == 1)
        assert await _ask(transport, server.origin) == b"ok"
        assert server.opened == 2
        assert server.requests == [GET] * 2, "no request went to the dead one"


def _dies_at_second_request(*, reset: bool, said: bytes = b"") -> Play:
    async def play(server: Server, stream: trio.abc.Stream) -> None:
        assert isinstance(stream, trio.SocketStream)
        await server.read(stream)
        await stream.send_all(OK)
        if await server.read(stream):
            await stream.send_all(said)
            if reset:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await stream.aclose()

    return play


@pytest.mark.parametrize("reset", [False, True])
async def test_a_reused_connection_that_dies_is_replaced_once(reset: bool) -> None:
    """Dead before the first byte of an answer: the request goes out again on a new one, and nobody is told."""
    async with _open(_dies_at_second_request(reset=reset), max_connections=1) as (server, transport):
        assert await _ask(transport, server.origin) == b"ok"
        assert await _ask(transport, server.origin) == b"ok"
        assert (server.opened, len(server.requests)) == (2, 3)
        assert _counts(transport) == (1, 1, 0)


async def test_what_must_not_arrive_twice_is_sent_once() -> None:
    """It does not go out on a connection that may have ended meanwhile, and is not sent again."""
    async with _open(_dies_at_second_request(reset=False)) as (server, transport):

        async def ask_once() -> int:
            url = f"http://127.0.0.1:{server.origin.port}/"
            request = httpx2.Request("POST", url, content=b"x", extensions={"trigate.once": True})
            response = await transport.handle_async_request(request)
            await response.aread()
            await response.aclose()
            return response.status_code

        assert await ask_once() == 200
        assert await ask_once() == 200
        assert (server.opened, len(server.requests)) == (2, 2)
    async with _open(_dies_at_first_request) as (server, transport):
        with pytest.raises(httpx2.RemoteProtocolError, match="disconnected without sending a response"):
            await ask_once()
        assert (server.opened, len(server.requests)) == (1, 1)


async def _dies_at_first_request(server: Server, stream: trio.abc.Stream) -> None:
    await server.read(stream)
    await stream.aclose()


async def test_after_the_first_byte_there_is_no_retry() -> None:
    """An answer that has begun is not asked for again."""
    async with _open(_dies_at_second_request(reset=False, said=b"H")) as (server, transport):
        assert await _ask(transport, server.origin) == b"ok"
        with pytest.raises(httpx2.RemoteProtocolError, match="disconnected"):
            await _ask(transport, server.origin)
        assert (server.opened, len(server.requests)) == (1, 2)
        assert _counts(transport) == (0, 0, 0)


async def test_a_new_connection_that_dies_is_an_error() -> None:
    """Nothing is sent again on account of a connection that was never any good, after a retry neither."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await server.read(stream)
        if server.opened == 1:
            await stream.send_all(OK)
            await server.read(stream)
        await stream.aclose()

    async with _open(play) as (server, transport):
        assert await _ask(transport, server.origin) == b"ok"
        for opened in (2, 3):
            with pytest.raises(httpx2.RemoteProtocolError, match="disconnected without sending a response"):
                await _ask(transport, server.origin)
            assert (server.opened, _counts(transport)) == (opened, (0, 0, 0))


# -- bounds of the pool -----------------------------------------------------------------------------------------------


async def test_idle_connections_expire(mock_clock: MockClock) -> None:
    """`run` closes each when its time has come, and not before."""
    async with _open(answers(OK), idle_expiry_s=30) as (server, transport), trio.open_nursery() as nursery:
        nursery.start_soon(transport.run)
        async with transport.pool.open(server.origin, GET) as first:
            assert await _ask(transport, server.origin) == b"ok"
            await wait_all_tasks_blocked()
            mock_clock.jump(3)
            await _read(first)
        assert _counts(transport) == (2, 2, 0)
        nursery.cancel_scope.deadline = trio.current_time() + 1000
        for jump, left in ((26, 2), (1.5, 1), (2.4, 1), (0.5, 0)):
            mock_clock.jump(jump)
            await wait_all_tasks_blocked()
            assert _counts(transport) == (left, left, 0)
        await _until(lambda: server.closed == 2)
        nursery.cancel_scope.cancel()


async def test_a_connection_expires_at_the_last_bit_of_its_time(mock_clock: MockClock) -> None:
    """When the task wakes up, what it has waited for is due, however the sum was rounded: else it would not sleep."""
    mine, other = socket.socketpair()
    mock_clock.jump(54.9246637208197)
    assert trio.current_time() + 30.0 - trio.current_time() < 30.0
    with other:
        transport = SocketTransport(idle_expiry_s=30.0)
        transport.pool._slots += 1
        transport.pool._put_back(Connection(Origin("http", "x", 80), mine, None))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.run)
            await wait_all_tasks_blocked()
            mock_clock.jump(30.0)
            for _ in range(5):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert _counts(transport) == (0, 0, 0)


async def test_an_expired_connection_is_not_taken(mock_clock: MockClock) -> None:
    """Nor are those that have been idle for longer; whether `run` runs or not."""
    async with _open(answers(OK), idle_expiry_s=2) as (server, transport):
        async with transport.pool.open(server.origin, GET) as first:
            assert await _ask(transport, server.origin) == b"ok"
            await _read(first)
        mock_clock.jump(1.9)
        assert await _ask(transport, server.origin) == b"ok"
        assert (server.opened, _counts(transport)) == (2, (2, 2, 0))
        mock_clock.jump(2.1)
        assert await _ask(transport, server.origin) == b"ok"
        assert (server.opened, _counts(transport)) == (3, (1, 1, 0))


async def test_thousands_that_expire_at_once_hold_nothing_up(mock_clock: MockClock) -> None:
    """Others run between slices of the closing, and all of them are closed."""
    pairs = [socket.socketpair() for _ in range(200)]
    transport = SocketTransport(max_idle=1000)
    origin = Origin("http", "x", 80)
    for mine, _ in pairs:
        mine.setblocking(False)
        transport.pool._slots += 1
        transport.pool._put_back(Connection(origin, mine, None))
    turns: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.run)
        await wait_all_tasks_blocked()
        mock_clock.jump(31)
        while transport.statistics().idle:
            await trio.lowlevel.checkpoint()
            turns.append(transport.statistics().idle)
        nursery.cancel_scope.cancel()
    assert len({*turns}) >= 3
    assert all(mine.fileno() == -1 for mine, _ in pairs)
    for _, other in pairs:
        other.close()


async def test_only_so_many_are_kept() -> None:
    """Beyond ``max_idle`` the one that has been idle for longest goes."""
    async with _open(answers(OK), max_idle=1) as (server, transport):
        async with transport.pool.open(server.origin, GET) as first:
            assert await _ask(transport, server.origin) == b"ok"
            await _read(first)
        assert _counts(transport) == (1, 1, 0)
        await _until(lambda: server.closed == 1)


async def test_the_queue_is_fair() -> None:
    """First come, first served; who gives up makes room for who comes behind, and who comes late overtakes nobody."""
    order: list[str] = []
    async with _open(answers(OK), max_connections=1) as (server, transport), trio.open_nursery() as nursery:

        async def ask(name: str, scope: trio.CancelScope) -> None:
            with scope:
                assert await _ask(transport, server.origin) == b"ok"
                order.append(name)

        async with transport.pool.open(server.origin, GET) as first:
            given_up = trio.CancelScope()
            for name in "abcd":
                nursery.start_soon(ask, name, given_up if name == "b" else trio.CancelScope())
                await wait_all_tasks_blocked()
            assert _counts(transport) == (1, 0, 4)
            given_up.cancel()
            await wait_all_tasks_blocked()
            assert _counts(transport) == (1, 0, 3)
            await _read(first)
        nursery.start_soon(ask, "late", trio.CancelScope())
    assert order == ["a", "c", "d", "late"]
    assert server.opened == 1


async def test_a_slot_passes_from_one_origin_to_another() -> None:
    """An idle connection of another origin makes room, and so does one that is given back while somebody waits."""
    async with _open(answers(OK), max_connections=1) as (server, transport), _open_server(answers(OK)) as other:
        assert await _ask(transport, server.origin) == b"ok"
        assert await _ask(transport, other.origin) == b"ok"
        assert _counts(transport) == (1, 1, 0)
        async with trio.open_nursery() as nursery, transport.pool.open(other.origin, GET) as response:
            nursery.start_soon(_ask, transport, server.origin)
            await wait_all_tasks_blocked()
            assert _counts(transport) == (1, 0, 1)
            await _read(response)
        assert _counts(transport) == (1, 1, 0)
        assert (server.opened, other.opened) == (2, 1)


async def test_a_slot_that_was_not_used_passes_on() -> None:
    """A connection that cannot be made gives its slot to the next in the queue."""
    nobody = _closed_port()
    async with _open(answers(OK), max_connections=1) as (server, transport), trio.open_nursery() as nursery:
        refused: list[int] = []

        async def refuse(number: int) -> None:
            with pytest.raises(httpx2.ConnectError):
                await _ask(transport, nobody)
            refused.append(number)

        for number in range(5):
            nursery.start_soon(refuse, number)
        assert await _ask(transport, server.origin) == b"ok"
    assert sorted(refused) == [0, 1, 2, 3, 4]


async def test_after_the_end_nothing_is_kept() -> None:
    """A transport that is closed lets requests end, and then their connections go."""
    async with _open(answers(OK)) as (server, transport):
        async with transport.pool.open(server.origin, GET) as response:
            await transport.aclose()
            assert await _read(response) == b"ok"
        assert _counts(transport) == (0, 0, 0)


# -- sending ----------------------------------------------------------------------------------------------------------


def _post(size: int) -> bytes:
    return b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size + bytes(size)


@pytest.mark.parametrize("size", [0, 1, 128 * 1024, 6_000_000])
async def test_a_body_of_any_size(size: int) -> None:
    """It goes out whole; the connection is reused."""
    async with _open(answers(OK)) as (server, transport):
        for _ in range(2):
            assert await _ask(transport, server.origin, _post(size), method="POST") == b"ok"
        assert server.opened == 1
        assert [len(request) for request in server.requests] == [len(_post(size))] * 2


@pytest.mark.parametrize("closes", [False, True])
async def test_an_answer_before_the_body_was_sent(closes: bool) -> None:
    """A server that refuses a large body early is heard, and the rest of the body is not sent."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        if not closes:
            await trio.sleep_forever()

    async with _open(play) as (server, transport):
        async with transport.pool.open(server.origin, _post(20_000_000)) as response:
            assert response.status == 413
            assert await _read(response) == b"no"
        assert _counts(transport) == (0, 0, 0)


async def test_an_interim_response_does_not_stop_the_body() -> None:
    """``100 Continue`` in the middle of a large body is no answer."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        await wait_all_tasks_blocked(0.01)
        assert len(await server.read(stream)) == len(_post(6_000_000))
        await stream.send_all(OK)

    async with _open(play) as (server, transport):
        assert await _ask(transport, server.origin, _post(6_000_000), method="POST") == b"ok"


async def test_a_server_that_leaves_while_a_body_is_sent() -> None:
    """It has not answered: the error says so, and does not hang."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await stream.receive_some(1000)
        await stream.aclose()

    async with _open(play) as (server, transport):
        with pytest.raises((httpx2.ReadError, httpx2.RemoteProtocolError)):
            await _ask(transport, server.origin, _post(20_000_000))
        assert _counts(transport) == (0, 0, 0)


# -- connecting -------------------------------------------------------------------------------------------------------


def _closed_port() -> Origin:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return Origin("http", "127.0.0.1", listener.getsockname()[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_nobody_listens(host: str) -> None:
    """It is refused, and the message says so."""
    async with SocketTransport() as transport:
        with pytest.raises(httpx2.ConnectError, match="refused"):
            await _ask(transport, attrs.evolve(_closed_port(), host=host))
        assert _counts(transport) == (0, 0, 0)


@pytest.mark.parametrize("host", ["nobody.invalid", "a" * 70 + ".invalid", "1" * 300])
async def test_a_name_that_nobody_has(host: str) -> None:
    """A name that is not found, or cannot be one, is a `ConnectError`."""
    async with SocketTransport() as transport:
        with pytest.raises(httpx2.ConnectError, match=r"[a-z]{3}"):
            await _ask(transport, Origin("http", host, 80))
        assert _counts(transport) == (0, 0, 0)


async def test_a_name_is_looked_up() -> None:
    """With a name, the same as with an address; that of IPv6 comes to nothing here, and does not matter."""
    async with _open(answers(OK)) as (server, transport):
        named = attrs.evolve(server.origin, host="localhost")
        for _ in range(2):
            async with transport.pool.open(named, GET) as response:
                assert response.socket is not None
                assert response.socket.gettimeout() == 0
                assert response.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert await _read(response) == b"ok"
        assert server.opened == 1


async def test_a_connection_that_takes_too_long() -> None:
    """The deadline is over all of connecting: here the other side accepts, and never speaks TLS."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await trio.sleep_forever()

    async with _open(play) as (server, transport):
        silent = attrs.evolve(server.origin, scheme="https")
        with pytest.raises(httpx2.ConnectTimeout, match=r"0\.05 s"):
            async with transport.pool.open(silent, GET, connect_timeout_s=0.05):
                pass
        assert _counts(transport) == (0, 0, 0)


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
    """Scheme, host and port, with the usual ones filled in."""
    assert Origin.of(url) == origin
    assert hash(Origin.of(url)) == hash(origin)


@pytest.mark.parametrize("url", ["ftp://x/", "/v1", "http://", "x"])
def test_what_has_no_origin(url: str) -> None:
    """What is not of HTTP is refused by name."""
    with pytest.raises(httpx2.UnsupportedProtocol):
        Origin.of(url)


# -- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority of the tests."""
    return trustme.CA()


def _contexts(authority: trustme.CA, *names: str) -> tuple[ssl.SSLContext, Callable[[], ssl.SSLContext]]:
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(serving)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return serving, lambda: trusting


async def test_tls(authority: trustme.CA) -> None:
    """The same over TLS, with a large body too; there is no plain socket to read."""
    serving, trust = _contexts(authority, "127.0.0.1")
    async with _open_server(answers(OK), context=serving) as server, SocketTransport(trust=trust) as transport:
        for size in (0, 3_000_000, 1):
            async with transport.pool.open(server.origin, _post(size)) as response:
                assert response.socket is None
                assert await _read(response) == b"ok"
        assert server.opened == 1
        assert _counts(transport) == (1, 1, 0)


@pytest.mark.parametrize("names", [("127.0.0.1",), ("other.example",)])
async def test_a_certificate_that_is_not_trusted(authority: trustme.CA, names: tuple[str, ...]) -> None:
    """An unknown authority, or another name: no connection, and the message says why."""
    serving, trust = _contexts(authority, *names)
    async with (
        _open_server(answers(OK), context=serving) as server,
        SocketTransport(trust=trust if names != ("127.0.0.1",) else ssl.create_default_context) as transport,
    ):
        with pytest.raises(httpx2.ConnectError, match="certificate verify failed"):
            await _ask(transport, server.origin)
        assert _counts(transport) == (0, 0, 0)


async def test_a_tls_connection_closes_without_waiting(authority: trustme.CA) -> None:
    """An answer that is left unread ends at once, even if nobody reads at the other end."""
    serving, trust = _contexts(authority, "127.0.0.1")

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await server.read(stream)
        await stream.send_all(STREAM + b"2\r\nok\r\n")
        await trio.sleep_forever()

    async with _open_server(play, context=serving) as server, SocketTransport(trust=trust) as transport:
        with trio.fail_after(1):
            async with transport.pool.open(server.origin, GET) as response:
                assert await response.receive() == b"ok"
        assert _counts(transport) == (0, 0, 0)


# -- the interface of httpx2 ------------------------------------------------------------------------------------------


def _url(server: Server) -> str:
    return f"http://{server.origin}/a%20b?c=d"


async def test_a_client_of_httpx2() -> None:
    """GET, POST, HEAD and a stream, each with its head and its body."""
    async with _open(answers(OK)) as (server, transport), httpx2.AsyncClient(transport=transport) as client:
        url = _url(server)
        assert (await client.get(url)).text == "ok"
        response = await client.post(url, json={"a": 1}, headers={"accept-encoding": "gzip"})
        assert (response.status_code, response.headers["content-length"], response.http_version) == (
            200,
            "2",
            "HTTP/1.1",
        )
        async with client.stream("POST", url, content=_pieces(b"ab", b"cd")) as streamed:
            assert [piece async for piece in streamed.aiter_raw()] == [b"ok"]
        assert server.opened == 1
        get, post, stream = server.requests
        assert get.startswith(b"GET /a%20b?c=d HTTP/1.1\r\n")
        assert b"content-length" not in get
        assert b"\r\naccept-encoding: gzip\r\n" in post.lower()
        assert post.endswith(b'\r\n\r\n{"a":1}')
        assert b"content-length: 4\r\n" in stream.lower()
        assert b"transfer-encoding" not in stream.lower()
        assert stream.endswith(b"\r\n\r\nabcd")


async def _pieces(*pieces: bytes) -> AsyncIterator[bytes]:  # noqa: ASYNC124, ASYNC900 - no scope in it
    for piece in pieces:
        yield piece


async def test_identity_is_asked_for() -> None:
    """Unless the caller says otherwise: what is relayed as it comes must not be compressed."""
    async with _open(answers(OK)) as (server, transport):
        response = await transport.handle_async_request(httpx2.Request("GET", _url(server), headers={}))
        await response.aread()
        assert b"\r\naccept-encoding: identity\r\n" in server.requests[0].lower()


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", [(b"x", b"a\r\nevil: b")]),
        ("GET", [(b"x\r\ny", b"a")]),
        ("GET", [(b"x", b"a\x00")]),
        ("POST", [(b"content-length", b"7")]),
        ("CONNECT", []),
    ],
)
async def test_requests_that_say_something_else(method: str, headers: list[tuple[bytes, bytes]]) -> None:
    """A head with a line break in it, or with another length than its body's, does not go out."""
    async with _open(answers(OK)) as (server, transport):
        request = httpx2.Request(method, _url(server), content=b"ab")
        request.headers = httpx2.Headers([(b"host", b"x"), *headers])
        with pytest.raises(httpx2.LocalProtocolError):
            await transport.handle_async_request(request)
        assert (server.requests, _counts(transport)) == ([], (0, 0, 0))


async def test_the_timeouts_of_httpx2() -> None:
    """Those for the queue, for the head and for a piece of the body are kept; each time the connection is let go."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await server.read(stream)
        if server.opened > 1:
            await stream.send_all(STREAM)
        await trio.sleep_forever()

    async with (
        _open(play, max_connections=1) as (server, transport),
        httpx2.AsyncClient(transport=transport, timeout=0.05) as client,
    ):
        with pytest.raises(httpx2.ReadTimeout):
            await client.get(_url(server))
        async with client.stream("GET", _url(server)) as response:
            assert response.status_code == 200
            with pytest.raises(httpx2.PoolTimeout):
                await client.get(_url(server))
            with pytest.raises(httpx2.ReadTimeout):
                await response.aread()
        assert _counts(transport) == (0, 0, 0)


async def test_a_response_closed_by_another_task() -> None:
    """Who waits for its body is told."""
    async with _open(answers(STREAM)) as (server, transport), trio.open_nursery() as nursery:
        response = await transport.handle_async_request(httpx2.Request("GET", _url(server)))

        async def read() -> None:
            with pytest.raises(httpx2.ReadError):
                await response.aread()

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        await response.stream.aclose()
        await response.stream.aclose()
        assert _counts(transport) == (0, 0, 0)
