"""A server of loopback that follows a script on each connection, and a transport to it."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import attrs
import trio
import trustme
from trio.testing import wait_all_tasks_blocked

from trigate.errors import GatewayError
from trigate.upstream.connect import Origin
from trigate.upstream.pool import Response
from trigate.upstream.request_stream import length_field
from trigate.upstream.transport import SocketTransport

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
STREAM = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"

Play = Callable[["Server", trio.abc.Stream], Awaitable[None]]


@attrs.define(eq=False)
class Server:
    """A server on loopback, and a record of what it received.

    Attributes:
        play: Serves each connection.
        opened: The number of connections that were accepted.
        closed: How many of them have ended.
        requests: The requests, as bytes.
    """

    play: Play
    origin: Origin = attrs.field(init=False)
    opened: int = 0
    closed: int = 0
    requests: list[bytes] = attrs.field(factory=list)

    async def serve(self, context: ssl.SSLContext | None, stream: trio.SocketStream) -> None:
        """Serves one connection."""
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
    """Returns a script that sends these responses on each connection in turn, the last one repeatedly.

    Args:
        close_after: The number of responses after which the connection is closed; 0 = never.
        reset: Whether it is closed with a reset.
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
async def open_server(play: Play, *, context: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
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
async def open_pool(play: Play, **settings: object) -> AsyncIterator[tuple[Server, SocketTransport]]:
    async with open_server(play) as server, SocketTransport(**settings) as transport:  # type: ignore[arg-type]
        with trio.fail_after(100):  # virtual, in some
            yield server, transport


async def read_body(response: Response) -> bytes:
    body = b""
    while (piece := await response.receive()) is not None:
        assert piece
        body += piece
    return body


async def ask(transport: SocketTransport, origin: Origin, request: bytes = GET, *, method: str = "GET") -> bytes:
    async with transport.pool.open(origin, request, method=method) as response:
        return await read_body(response)


def counts(transport: SocketTransport) -> tuple[int, int, int]:
    found = transport.statistics()
    return found.open, found.idle, found.waiting


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(400):
        if holds():
            return
        await wait_all_tasks_blocked(0.002)
    raise AssertionError("it does not come to hold")


def post(size: int) -> bytes:
    return b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size + bytes(size)


@attrs.define(eq=False)
class Upload:
    """A request body that arrives in pieces, with a checkpoint before each; then it may fail.

    Attributes:
        length_bytes: Its length; None = it is sent in chunks.
    """

    pieces: list[bytes]
    length_bytes: int | None = None
    error: GatewayError | None = None
    begun: bool = False

    async def receive(self) -> bytes | None:
        self.begun = True
        await trio.lowlevel.checkpoint()
        if self.pieces:
            return self.pieces.pop(0)
        if self.error is not None:
            raise self.error
        return None


def upload_head(body: Upload) -> bytes:
    return b"POST / HTTP/1.1\r\nhost: x\r\n" + length_field(body).encode() + b"\r\n"


def closed_port() -> Origin:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return Origin("http", "127.0.0.1", listener.getsockname()[1])


def contexts(authority: trustme.CA, *names: str) -> tuple[ssl.SSLContext, Callable[[], ssl.SSLContext]]:
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(serving)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return serving, lambda: trusting
