"""Requests over real sockets of loopback: reuse, retries, the queue, bounds, large bodies and TLS."""

from __future__ import annotations

import socket
import ssl
import struct

import httpx2
import pytest
import trio
import trustme
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.upstream.socket_server import (
    GET,
    OK,
    STREAM,
    Play,
    Server,
    Upload,
    answers,
    ask,
    closed_port,
    contexts,
    counts,
    open_pool,
    open_server,
    post,
    read_body,
    until,
    upload_head,
)
from trigate.errors import BodyTimeout
from trigate.upstream.connect import Connection, Origin
from trigate.upstream.transport import SocketTransport

# -- one connection ----------------------------------------------------------------------------------------------------


async def test_a_connection_is_reused() -> None:
    """A request gets the head, the body and its end; the next request reuses the connection."""
    async with open_pool(answers(b"HTTP/1.1 201 Made\r\nX-Name: Value\r\ncontent-length: 2\r\n\r\nok")) as (
        server,
        transport,
    ):
        for _ in range(3):
            async with transport.pool.open(server.origin, GET) as response:
                assert (response.status, response.headers) == (201, [(b"x-name", b"Value"), (b"content-length", b"2")])
                assert counts(transport) == (1, 0, 0)
                assert await response.receive() == b"ok"
                assert await response.receive() is None
                assert await response.receive() is None
            assert counts(transport) == (1, 1, 0)
        assert server.opened == 1
        assert server.requests == [GET] * 3
    assert counts(transport) == (0, 0, 0)


async def test_what_is_there_comes_as_one_piece() -> None:
    """Chunks that arrive together are received as one piece."""
    said = STREAM + b"1\r\na\r\n2\r\nbc\r\n1\r\nd\r\n0\r\n\r\n"
    async with open_pool(answers(said)) as (server, transport), transport.pool.open(server.origin, GET) as response:
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
    """A response that arrives byte by byte is the same, and its connection is reused."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        while await server.read(stream):
            for byte in response:
                await stream.send_all(bytes([byte]))
                await trio.lowlevel.checkpoint()

    async with open_pool(play) as (server, transport):
        for _ in range(2):
            assert await ask(transport, server.origin, method=method) == body
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
    """A connection is not reused if the server says so, speaks HTTP/1.0, or sends bytes behind the answer."""
    async with open_pool(answers(response)) as (server, transport):
        for count in (1, 2):
            assert await ask(transport, server.origin) == body
            assert counts(transport) == (0, 0, 0)
            await until(lambda count=count: server.closed == server.opened == count)  # type: ignore[misc]


async def test_a_body_that_ends_with_its_connection() -> None:
    """Without a length, the end of the connection is the end of the body; the next request gets a new connection."""
    async with open_pool(answers(b"HTTP/1.1 200 OK\r\n\r\nto the end", close_after=1)) as (server, transport):
        for _ in range(2):
            assert await ask(transport, server.origin) == b"to the end"
        assert server.opened == 2


@pytest.mark.parametrize("response", [b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok", STREAM + b"2\r\nok\r\n"])
async def test_a_body_that_is_cut(response: bytes) -> None:
    """The part of a truncated body that arrived is received; then an error is raised, and the connection is closed."""
    async with open_pool(answers(response, close_after=1)) as (server, transport):
        async with transport.pool.open(server.origin, GET) as answer:
            assert await answer.receive() == b"ok"
            with pytest.raises(httpx2.RemoteProtocolError, match="without sending complete message body"):
                await answer.receive()
        assert counts(transport) == (0, 0, 0)
        assert server.opened == 1


async def test_a_connection_that_is_reset_in_a_body() -> None:
    """A reset during the body is a `ReadError`."""
    async with open_pool(answers(STREAM, close_after=1, reset=True)) as (server, transport):
        async with transport.pool.open(server.origin, GET) as answer:
            with pytest.raises(httpx2.ReadError, match="reset"):
                await answer.receive()
        assert counts(transport) == (0, 0, 0)


async def test_an_answer_that_is_left_unread_closes_its_connection() -> None:
    """If the block ends before the body, the connection is closed at once, which the server notices."""
    async with open_pool(answers(STREAM + b"2\r\nok\r\n")) as (server, transport):
        async with transport.pool.open(server.origin, GET) as response:
            assert await response.receive() == b"ok"
        assert counts(transport) == (0, 0, 0)
        await until(lambda: server.closed == 1)
        with pytest.raises(httpx2.ReadError, match="closed"):
            await response.receive()


async def test_what_is_not_http() -> None:
    """Bytes that are not HTTP are an error that says what is wrong with them."""
    async with open_pool(answers(b"SSH-2.0-OpenSSH_9\r\n")) as (server, transport):
        with pytest.raises(httpx2.RemoteProtocolError, match="Expected HTTP/"):
            await ask(transport, server.origin)
        assert counts(transport) == (0, 0, 0)


async def test_another_may_read_the_socket() -> None:
    """A relay can read the plain socket and feed what it receives; the connection is reused afterwards."""
    async with open_pool(answers(STREAM, STREAM)) as (server, transport):
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
        assert counts(transport) == (0, 0, 0)


# -- dead connections --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [b"", b"HTTP/1.1 408 Timeout\r\ncontent-length: 0\r\n\r\n"])
async def test_an_idle_connection_that_has_ended_is_not_taken(late: bytes) -> None:
    """An idle connection is not reused if the server has closed it, or has sent bytes on it without a request."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await server.read(stream)
        await stream.send_all(OK)
        await released.wait()
        if late:
            await stream.send_all(late)
        await stream.aclose()

    released = trio.Event()
    async with open_pool(play) as (server, transport):
        assert await ask(transport, server.origin) == b"ok"
        released.set()
        await until(lambda: server.closed == 1)
        assert await ask(transport, server.origin) == b"ok"
        assert server.opened == 2
        assert server.requests == [GET] * 2, "no request was sent on the connection that had ended"


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
    """If a reused connection ends before the first byte of an answer, the request is sent again, without an error."""
    async with open_pool(_dies_at_second_request(reset=reset), max_connections=1) as (server, transport):
        assert await ask(transport, server.origin) == b"ok"
        assert await ask(transport, server.origin) == b"ok"
        assert (server.opened, len(server.requests)) == (2, 3)
        assert counts(transport) == (1, 1, 0)


async def test_a_request_is_not_resent() -> None:
    """Without ``resend``, a connection is reused as ever, and its end is an error."""
    async with open_pool(_dies_at_second_request(reset=False), max_connections=1) as (server, transport):
        assert await ask(transport, server.origin) == b"ok"
        with pytest.raises(httpx2.RemoteProtocolError, match="disconnected without sending a response"):
            async with transport.pool.open(server.origin, GET, resend=False):
                pass
        assert (server.opened, len(server.requests)) == (1, 2)
        assert counts(transport) == (0, 0, 0)


async def test_what_must_not_arrive_twice_is_sent_once() -> None:
    """A request that must not arrive twice gets a new connection, and is not sent again."""
    async with open_pool(_dies_at_second_request(reset=False)) as (server, transport):

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
    async with open_pool(_dies_at_first_request) as (server, transport):
        with pytest.raises(httpx2.RemoteProtocolError, match="disconnected without sending a response"):
            await ask_once()
        assert (server.opened, len(server.requests)) == (1, 1)


async def _dies_at_first_request(server: Server, stream: trio.abc.Stream) -> None:
    await server.read(stream)
    await stream.aclose()


async def test_after_the_first_byte_there_is_no_retry() -> None:
    """A request is not sent again once the first byte of its answer has been received."""
    async with open_pool(_dies_at_second_request(reset=False, said=b"H")) as (server, transport):
        assert await ask(transport, server.origin) == b"ok"
        with pytest.raises(httpx2.RemoteProtocolError, match="disconnected"):
            await ask(transport, server.origin)
        assert (server.opened, len(server.requests)) == (1, 2)
        assert counts(transport) == (0, 0, 0)


async def test_a_new_connection_that_dies_is_an_error() -> None:
    """A request is not sent again if a new connection ends, not even after a retry."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await server.read(stream)
        if server.opened == 1:
            await stream.send_all(OK)
            await server.read(stream)
        await stream.aclose()

    async with open_pool(play) as (server, transport):
        assert await ask(transport, server.origin) == b"ok"
        for opened in (2, 3):
            with pytest.raises(httpx2.RemoteProtocolError, match="disconnected without sending a response"):
                await ask(transport, server.origin)
            assert (server.opened, counts(transport)) == (opened, (0, 0, 0))


# -- bounds of the pool ------------------------------------------------------------------------------------------------


async def test_idle_connections_expire(mock_clock: MockClock) -> None:
    """`run` closes each idle connection when it expires, and not before."""
    async with open_pool(answers(OK), idle_expiry_s=30) as (server, transport), trio.open_nursery() as nursery:
        nursery.start_soon(transport.run)
        async with transport.pool.open(server.origin, GET) as first:
            assert await ask(transport, server.origin) == b"ok"
            await wait_all_tasks_blocked()
            mock_clock.jump(3)
            await read_body(first)
        assert counts(transport) == (2, 2, 0)
        nursery.cancel_scope.deadline = trio.current_time() + 1000
        for jump, left in ((26, 2), (1.5, 1), (2.4, 1), (0.5, 0)):
            mock_clock.jump(jump)
            await wait_all_tasks_blocked()
            assert counts(transport) == (left, left, 0)
        await until(lambda: server.closed == 2)
        nursery.cancel_scope.cancel()


async def test_a_connection_expires_at_the_last_bit_of_its_time(mock_clock: MockClock) -> None:
    """A connection has expired when `run` wakes up for it, however the sum was rounded; else `run` would not sleep."""
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
        assert counts(transport) == (0, 0, 0)


async def test_an_expired_connection_is_not_taken(mock_clock: MockClock) -> None:
    """A connection that has been idle for too long is not reused, whether `run` runs or not."""
    async with open_pool(answers(OK), idle_expiry_s=2) as (server, transport):
        async with transport.pool.open(server.origin, GET) as first:
            assert await ask(transport, server.origin) == b"ok"
            await read_body(first)
        mock_clock.jump(1.9)
        assert await ask(transport, server.origin) == b"ok"
        assert (server.opened, counts(transport)) == (2, (2, 2, 0))
        mock_clock.jump(2.1)
        assert await ask(transport, server.origin) == b"ok"
        assert (server.opened, counts(transport)) == (3, (1, 1, 0))


async def test_thousands_that_expire_at_once_hold_nothing_up(mock_clock: MockClock) -> None:
    """Other tasks run while thousands of connections are closed, and all of them are closed."""
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
    """Beyond ``max_idle``, the connection that has been idle for longest is closed."""
    async with open_pool(answers(OK), max_idle=1) as (server, transport):
        async with transport.pool.open(server.origin, GET) as first:
            assert await ask(transport, server.origin) == b"ok"
            await read_body(first)
        assert counts(transport) == (1, 1, 0)
        await until(lambda: server.closed == 1)


async def test_the_queue_is_fair() -> None:
    """The queue is first come, first served; a cancelled request leaves it, and a late one overtakes none."""
    order: list[str] = []
    async with open_pool(answers(OK), max_connections=1) as (server, transport), trio.open_nursery() as nursery:

        async def call(name: str, scope: trio.CancelScope) -> None:
            with scope:
                assert await ask(transport, server.origin) == b"ok"
                order.append(name)

        async with transport.pool.open(server.origin, GET) as first:
            given_up = trio.CancelScope()
            for name in "abcd":
                nursery.start_soon(call, name, given_up if name == "b" else trio.CancelScope())
                await wait_all_tasks_blocked()
            assert counts(transport) == (1, 0, 4)
            given_up.cancel()
            await wait_all_tasks_blocked()
            assert counts(transport) == (1, 0, 3)
            await read_body(first)
        nursery.start_soon(call, "late", trio.CancelScope())
    assert order == ["a", "c", "d", "late"]
    assert server.opened == 1


async def test_a_slot_passes_from_one_origin_to_another() -> None:
    """A slot passes to a request for another origin: from an idle connection, and from one that is released."""
    async with open_pool(answers(OK), max_connections=1) as (server, transport), open_server(answers(OK)) as other:
        assert await ask(transport, server.origin) == b"ok"
        assert await ask(transport, other.origin) == b"ok"
        assert counts(transport) == (1, 1, 0)
        async with trio.open_nursery() as nursery, transport.pool.open(other.origin, GET) as response:
            nursery.start_soon(ask, transport, server.origin)
            await wait_all_tasks_blocked()
            assert counts(transport) == (1, 0, 1)
            await read_body(response)
        assert counts(transport) == (1, 1, 0)
        assert (server.opened, other.opened) == (2, 1)


async def test_a_slot_that_was_not_used_passes_on() -> None:
    """If a connection cannot be made, its slot passes to the next request in the queue."""
    nobody = closed_port()
    async with open_pool(answers(OK), max_connections=1) as (server, transport), trio.open_nursery() as nursery:
        refused: list[int] = []

        async def refuse(number: int) -> None:
            with pytest.raises(httpx2.ConnectError):
                await ask(transport, nobody)
            refused.append(number)

        for number in range(5):
            nursery.start_soon(refuse, number)
        assert await ask(transport, server.origin) == b"ok"
    assert sorted(refused) == [0, 1, 2, 3, 4]


async def test_after_the_end_nothing_is_kept() -> None:
    """A closed pool lets requests in flight end, and then closes their connections."""
    async with open_pool(answers(OK)) as (server, transport):
        async with transport.pool.open(server.origin, GET) as response:
            await transport.aclose()
            assert await read_body(response) == b"ok"
        assert counts(transport) == (0, 0, 0)


# -- sending -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 128 * 1024, 6_000_000])
async def test_a_body_of_any_size(size: int) -> None:
    """A body of any size is sent in full, and the connection is reused."""
    async with open_pool(answers(OK)) as (server, transport):
        for _ in range(2):
            assert await ask(transport, server.origin, post(size), method="POST") == b"ok"
        assert server.opened == 1
        assert [len(request) for request in server.requests] == [len(post(size))] * 2


@pytest.mark.parametrize("closes", [False, True])
async def test_an_answer_before_the_body_was_sent(closes: bool) -> None:
    """An early answer to a large body is received, and the rest of the body is not sent."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        if not closes:
            await trio.sleep_forever()

    async with open_pool(play) as (server, transport):
        async with transport.pool.open(server.origin, post(20_000_000)) as response:
            assert response.status == 413
            assert await read_body(response) == b"no"
        assert counts(transport) == (0, 0, 0)


async def test_an_interim_response_does_not_stop_the_body() -> None:
    """``100 Continue`` during a large body is not taken for an answer."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        await wait_all_tasks_blocked(0.01)
        assert len(await server.read(stream)) == len(post(6_000_000))
        await stream.send_all(OK)

    async with open_pool(play) as (server, transport):
        assert await ask(transport, server.origin, post(6_000_000), method="POST") == b"ok"


async def test_a_server_that_leaves_while_a_body_is_sent() -> None:
    """If the server closes the connection during a large body, the error says that not all of it was sent, and nothing
    hangs."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await stream.receive_some(1000)
        await stream.aclose()

    async with open_pool(play) as (server, transport):
        with pytest.raises(httpx2.WriteError):
            await ask(transport, server.origin, post(20_000_000))
        assert counts(transport) == (0, 0, 0)


# -- uploads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("length", [None, 200_002])
async def test_an_upload(authority: trustme.CA, secure: bool, length: int | None) -> None:
    """It is framed by its length, or in chunks, and has a new connection, which the next request may use."""
    received: list[bytes] = []

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        got = b""
        end = b"0\r\n\r\n" if length is None else b"end"
        while data := bytes(await stream.receive_some()):
            got += data
            if got.endswith((end, b"x\r\n\r\n")):
                received.append(got)
                got = b""
                await stream.send_all(OK)

    serving, trust = contexts(authority, "127.0.0.1") if secure else (None, httpx2.create_ssl_context)
    async with open_server(play, context=serving) as server, SocketTransport(trust=trust) as transport:
        assert await ask(transport, server.origin) == b"ok"
        body = Upload([b"a" * 99_999, b"b" * 100_000, b"end"], length_bytes=length)
        async with transport.pool.open(server.origin, upload_head(body), method="POST", stream=body) as response:
            assert await read_body(response) == b"ok"
        assert await ask(transport, server.origin) == b"ok"
        assert server.opened == 2
        sent = received[1].partition(b"\r\n\r\n")[2]
        if length is None:
            sent = sent.replace(b"1869f\r\n", b"").replace(b"\r\n186a0\r\n", b"").replace(b"\r\n3\r\n", b"")
            sent = sent.removesuffix(b"\r\n0\r\n\r\n")
        assert sent == b"a" * 99_999 + b"b" * 100_000 + b"end"


async def test_an_upload_that_fails() -> None:
    """Its error is raised as it is, and the connection is closed."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        await trio.sleep_forever()

    async with open_pool(play) as (server, transport):
        error = BodyTimeout("It stopped.")
        body = Upload([b"a"], length_bytes=9, error=error)
        with pytest.raises(BodyTimeout) as caught:
            async with transport.pool.open(server.origin, upload_head(body), method="POST", stream=body):
                pass
        assert caught.value is error
        assert counts(transport) == (0, 0, 0)


async def test_an_upload_that_is_answered_early() -> None:
    """The rest is not asked for, and the connection is closed after the answer."""

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        await stream.send_all(OK)
        await trio.sleep_forever()

    async with open_pool(play) as (server, transport):
        body = Upload([bytes(1000)] * 1_000_000, length_bytes=1_000_000_000)
        async with transport.pool.open(server.origin, upload_head(body), method="POST", stream=body) as response:
            assert await read_body(response) == b"ok"
        assert body.pieces
        assert counts(transport) == (0, 0, 0)


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority for these tests."""
    return trustme.CA()


async def test_tls(authority: trustme.CA) -> None:
    """Requests work over TLS, with a large body too; the response has no plain socket."""
    serving, trust = contexts(authority, "127.0.0.1")
    async with open_server(answers(OK), context=serving) as server, SocketTransport(trust=trust) as transport:
        for size in (0, 3_000_000, 1):
            async with transport.pool.open(server.origin, post(size)) as response:
                assert response.socket is None
                assert await read_body(response) == b"ok"
        assert server.opened == 1
        assert counts(transport) == (1, 1, 0)


@pytest.mark.parametrize("names", [("127.0.0.1",), ("other.example",)])
async def test_a_certificate_that_is_not_trusted(authority: trustme.CA, names: tuple[str, ...]) -> None:
    """With an unknown authority or another name there is no connection, and the message says why."""
    serving, trust = contexts(authority, *names)
    async with (
        open_server(answers(OK), context=serving) as server,
        SocketTransport(trust=trust if names != ("127.0.0.1",) else ssl.create_default_context) as transport,
    ):
        with pytest.raises(httpx2.ConnectError, match="certificate verify failed"):
            await ask(transport, server.origin)
        assert counts(transport) == (0, 0, 0)


async def test_a_tls_connection_closes_without_waiting(authority: trustme.CA) -> None:
    """An answer that is left unread is closed at once, even if the other end reads nothing."""
    serving, trust = contexts(authority, "127.0.0.1")

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        await server.read(stream)
        await stream.send_all(STREAM + b"2\r\nok\r\n")
        await trio.sleep_forever()

    async with open_server(play, context=serving) as server, SocketTransport(trust=trust) as transport:
        with trio.fail_after(1):
            async with transport.pool.open(server.origin, GET) as response:
                assert await response.receive() == b"ok"
        assert counts(transport) == (0, 0, 0)
