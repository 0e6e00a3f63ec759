"""HTTP/1.1: one connection, one task, in which the app is called as well.

`request_parser` says what came in, `response_head` what goes out, `peer` reads and writes; here are the deadlines, and
the life of a connection. There is no further task, no channel, no lock and no nursery, as each of them costs more than
the parsing of a request. The rules:

- **A message goes out whole or not at all.** `trio.Cancelled` is raised at the beginning of a send, or not. A send to
  a peer that does not read waits in a shield: `Connection.abort`, from outside, ends it. Where the socket takes the
  bytes at once, a send is no checkpoint (but an app that only ever sends is made to wait for its turn now and then).
- **The head waits for the first piece of the body**, and both leave in one packet; ASGI wants it so. An app that must
  show its head before it has a body sends an empty piece, or calls `Client.flush`.
- **The scope of the connection is cancelled only while no app runs**: that is the keep-alive timeout, the head timeout
  and the drain in one.
- **Reading ahead is bounded, and not needed** where there is a `Poller`: it tells of a client that leaves whatever
  that client has sent before. So bytes behind the current request stay in the kernel. Without one (TLS, memory
  streams, systems without epoll) `READ_AHEAD_BYTES` are read while the app waits for the client to leave.
- **A half-close counts as a disconnect**: ASGI has one message for both. What the app sends nevertheless is sent.
- **Input that nobody will read is discarded before a connection is closed**, within bounds: to close a socket that has
  unread input sends a reset, and a reset may overtake the last response.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from email.utils import formatdate
from typing import Any, TypeAlias
from urllib.parse import unquote

import attrs
import structlog
import trio
from trio.lowlevel import checkpoint, checkpoint_if_cancelled

from trigate.concurrency.poller import Poller
from trigate.concurrency.timers import Timers
from trigate.errors import BadRequest, Header, Internal
from trigate.server import response_head
from trigate.server.client_stream import UNYIELDING_BYTES, Peer
from trigate.server.request_head import HeadRefused
from trigate.server.request_parser import RequestParser

log = structlog.get_logger("trigate.server.server")

# Any: the values of an ASGI message depend on its type, and the specification has no narrower one.
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]
Address: TypeAlias = tuple[str, int]

READ_AHEAD_BYTES = 64 * 1024
"""How much of further requests is read while one is being served, where a client that leaves is only seen so."""
LINGER_S = 2.0
"""How long input is discarded after the last response of a connection."""
LINGER_BYTES = 64 * 1024 * 1024

# What has been done of a response.
_NOTHING, _HELD, _BEGUN, _DONE = range(4)


@attrs.define(eq=False)
class Service:
    """What the connections of a server share.

    Args:
        app: The ASGI app.
        timers: End connections that wait for a request for too long.
        keep_alive_timeout_s: How long a connection may be without a (whole) request head.
        state: The lifespan state, copied into the scope of each request.
        poller: Tells of clients that leave; None = there is none.
        ending: Responses announce the end of their connection, and are then the last ones. A connection whose response
            has begun before is served once more: its client, who knows of no end, may be asking already.
        draining: No further request is waited for, on any connection.
    """

    app: Application
    timers: Timers
    keep_alive_timeout_s: float
    state: Mapping[str, Any] = attrs.field(factory=dict)  # Any: whatever the app has put there
    poller: Poller | None = None
    ending: bool = False
    draining: bool = False


class Client:
    """What an app may know of its client beyond ASGI: ``scope["extensions"]["trigate.cli.client"]``.

    It belongs to one connection, and speaks of the request that is being served.

    Attributes:
        chunked: Whether the body of the current response goes out in chunks, which who writes to `socket` must make;
            if not, its length is declared, or it ends with the connection (HTTP/1.0). Valid after
            ``http.response.start``.
    """

    __slots__ = ("_connection", "chunked")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.chunked = False

    @property
    def socket(self) -> socket.socket | None:
        """The plain, non-blocking socket, to write pieces of a body of undeclared length to directly.

        Once `flush` has returned, and while no ``send`` is under way. None under TLS, on other streams, and once the
        connection is closed.
        """
        return self._connection.peer.socket

    @property
    def body_is_here(self) -> bool:
        """Whether ``receive`` gives the whole body of the current request, or what is left of it, without waiting."""
        return self._connection._parser.is_whole

    @property
    def taken_bytes(self) -> int | None:
        """A number that grows while something waits to be sent, whenever the client takes some of it; None where that
        cannot be seen."""
        return self._connection.peer.taken_bytes

    def watch(self, callback: Callable[[], None]) -> bool:
        """Calls back, once, when the client leaves while the current request is being served.

        The call is synchronous and must not raise; where the client has left already, it comes before this returns.
        It is forgotten with the end of the request.

        Returns:
            Whether it will be so; False where ``receive`` alone can tell.
        """
        return self._connection.watch(callback)

    async def respond(  # noqa: ASYNC910 - as `Connection.respond`
        self, status: int, headers: list[Header], body: bytes
    ) -> None:
        """Sends a whole response, in place of ASGI's two messages; its content-length is added here.

        **Cancels:** not at all, so that who notes it as sent is right.
        """
        await self._connection.respond(status, headers, body)

    async def flush(self) -> None:
        """Sends the head of the response if it still waits for a piece of the body."""
        await self._connection.flush()

    async def abort(self) -> None:
        """Closes the connection now, whatever waits to be sent on it."""
        await self._connection.abort()


@attrs.define(eq=False)
class Connection:
    """One connection, from its acceptance to its end.

    Args:
        service: What it shares with the others.
        stream: Owned.
        client: The peer's address, for the scope.
        server: This end's address, for the scope.

    Attributes:
        peer: The client's end.
    """

    _service: Service
    _stream: trio.abc.Stream
    client: Address | None = None
    server: Address | None = None
    peer: Peer = attrs.field(init=False)
    _parser: RequestParser = attrs.field(init=False, factory=RequestParser)
    _scope: trio.CancelScope = attrs.field(init=False, factory=trio.CancelScope)
    _idle: bool = attrs.field(init=False, default=True)
    _idle_since: float = attrs.field(init=False, factory=trio.current_time)
    _scheme: str = attrs.field(init=False)
    _client: Client = attrs.field(init=False)

    # the current request
    _told: bool = attrs.field(init=False, default=False)  # the app has the whole body
    _continues: bool = attrs.field(init=False, default=False)  # the client waits for 100
    _reading: trio.CancelScope | None = attrs.field(init=False, default=None)  # in which it reads ahead for that

    # its response
    _refused: bool = attrs.field(init=False, default=False)  # by us; what the app sends goes nowhere
    _phase: int = attrs.field(init=False, default=_NOTHING)
    _head: bytes = attrs.field(init=False, default=b"")  # held
    _left: int | None = attrs.field(init=False, default=None)  # what is missing of the declared length
    _bodiless: bool = attrs.field(init=False, default=False)
    _persistent: bool = attrs.field(init=False, default=True)

    def __attrs_post_init__(self) -> None:
        self.peer = Peer(self._stream, self._service.poller)
        self._scheme = "https" if isinstance(self._stream, trio.SSLStream) else "http"
        self._client = Client(self)

    # -- its life -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves the connection until it is closed."""
        timer = self._service.timers.start(self._idle_since + self._service.keep_alive_timeout_s, self._on_time)
        try:
            try:
                with self._scope:
                    unread = await self._serve()
                if self._has_come_in_time():
                    self._scope = trio.CancelScope()
                    with self._scope:
                        unread = await self._serve()
                if not self._scope.cancelled_caught and not self.peer.lost:
                    await self._end(unread)
            finally:
                timer.stop()
                self.peer.release()
        finally:
            await self._stream.aclose()

    def close_if_idle(self) -> None:
        """Closes the connection unless it is serving a request."""
        if self._idle:
            self._scope.cancel()

    def _has_come_in_time(self) -> bool:
        """Whether a request has come while the connection was being closed since it was idle: to close it then would be
        a reset in the place of an answer. Once, and not where a head is incomplete: who sends one slowly has had his
        time."""
        if not self._scope.cancelled_caught or self._parser.buffered:
            return False
        data = self.peer.read_nowait()
        self._parser.feed(data)
        return bool(data)

    async def abort(self) -> None:
        """Closes the connection at once, whatever its tasks are doing."""
        await self.peer.abort()

    async def _serve(self) -> bool:
        """Serves requests; says whether input of the client is, or must be expected to be, left unread."""
        parser, service = self._parser, self._service
        try:
            while True:
                self._idle = True
                if not parser.buffered:
                    if not await self._wait_request():
                        return False
                elif parser.next_request():
                    await checkpoint()  # it came with the one before it: now others have their turn
                elif not await self._wait_request():
                    return False
                if self._scope.cancel_called:
                    return False
                self._idle = False
                await self._answer()
                if self._phase != _DONE or not self._persistent or self.peer.gone or service.draining:
                    return bool(parser.buffered) or not parser.complete
        except HeadRefused as error:
            await self._refuse(error)
            return True

    async def _wait_request(self) -> bool:
        """Reads the head of a request; False if none comes, or is waited for."""
        parser = self._parser
        if self._service.draining:
            return False  # noqa: ASYNC910
        self._idle_since = trio.current_time()
        while True:
            data = await self.peer.read()
            if not data:
                return False
            parser.feed(data)
            if parser.next_request():
                return True

    def _on_time(self, now: float) -> float:
        # One timer for the connection: to set a deadline anew for each request would cost as much as its parsing.
        timeout_s = self._service.keep_alive_timeout_s
        if not self._idle:
            return now + timeout_s
        due_at = self._idle_since + timeout_s
        if due_at <= now:
            self._scope.cancel()
            return now + timeout_s
        return due_at

    async def _answer(self) -> None:  # noqa: ASYNC910 - the app may not wait
        """Has the app answer the current request."""
        parser, service = self._parser, self._service
        head = parser.head
        self._told = False
        self._continues = head.expects_continue
        self._phase = _NOTHING
        self._persistent = head.persistent
        path, _, query = head.target.partition(b"?")
        scope = {
            "type": "http",
            "http_version": "1.1" if head.version == b"HTTP/1.1" else "1.0",
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "method": head.method.decode(),
            "scheme": self._scheme,
            "path": unquote(path.decode()) if b"%" in path else path.decode(),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": parser.headers,
            "client": self.client,
            "server": self.server,
            "state": dict(service.state),
            "extensions": {"trigate.client": self._client},
        }
        crash: ExceptionGroup | None = None
        try:
            await service.app(scope, self._receive, self._send)
        except* Exception as group:
            crash = group
        finally:
            self.peer.on_leave = None
        if crash is not None:
            log.error("app_crashed", method=scope["method"], path=scope["path"], exc_info=crash)
        if self._phase < _BEGUN and not self.peer.lost and (crash is not None or not self.peer.gone):
            await self._apologize()
        if not parser.complete:
            self._discard_body()

    def _discard_body(self) -> None:
        """Discards what is there of a body that the app did not want; if that is not all, the connection ends."""
        parser = self._parser
        try:
            while not parser.complete and parser.buffered:
                if not parser.next_piece():
                    break
        except HeadRefused:
            self._persistent = False
        if not parser.complete:
            self._persistent = False

    async def _apologize(self) -> None:
        status, headers, body = Internal("The server failed on this request.").to_response()
        await self._send_whole(status, headers, body, self._parser.head.method)

    async def _refuse(self, error: HeadRefused) -> None:  # noqa: ASYNC910 - it sends, or has sent
        """Answers what is no request, unless an answer has begun; the connection then ends."""
        log.debug("request_refused", status=error.status, reason=error.message, client=self.client)
        if self._phase != _BEGUN:
            status, headers, body = refusal(error)
            self._persistent = False
            await self._send_whole(status, headers, body)
        self._refused = True

    async def respond(  # noqa: ASYNC910 - the socket may take it at once
        self, status: int, headers: list[Header], body: bytes
    ) -> None:
        """As `Client.respond` has it."""
        if self.peer.lost or self._refused or self._phase != _NOTHING:
            return  # noqa: ASYNC910
        request = self._parser.head
        await self._send_whole(status, headers, body, request.method, request.version)
        self._note_done()

    async def _send_whole(
        self, status: int, headers: list[Header], body: bytes, method: bytes = b"GET", version: bytes = b"HTTP/1.1"
    ) -> None:
        headers = [*headers, (b"content-length", b"%d" % len(body))]
        persistent = self._persistent and not self._service.ending
        answer = response_head.build(
            status, headers, date=_date(), version=version, method=method, persistent=persistent
        )
        self._persistent = answer.persistent
        self._phase = _DONE
        await self.peer.write(answer.data if answer.bodiless else answer.data + body)

    async def _end(self, unread: bool) -> None:  # noqa: ASYNC910 - not every stream can be half-closed
        """Closes the sending side, and discards what still arrives, where something does."""
        peer = self.peer
        if peer.gone and peer.socket is not None and not unread and not peer.read_nowait():
            return  # noqa: ASYNC910 - to close it says the same, in one step
        await peer.half_close()
        if unread or peer.read_nowait():
            discarded = 0
            with trio.move_on_after(LINGER_S):
                while discarded < LINGER_BYTES:
                    data = await peer.read()
                    if not data:
                        break
                    discarded += len(data)

    # -- what the app calls -------------------------------------------------------------------------------------------

    def watch(self, callback: Callable[[], None]) -> bool:
        """As `Client.watch` has it."""
        peer = self.peer
        if not peer.watch():
            return False
        peer.on_leave = callback
        if peer.gone:
            peer.leave()
        return True

    async def _wait_gone(self) -> None:
        """Waits until the client has left, or the response is complete."""
        peer = self.peer
        if peer.gone or self._phase == _DONE:
            await checkpoint()
            return
        if peer.left is None:
            peer.left = trio.Event()
        left = peer.left
        if not peer.watch() and self._reading is None:
            try:
                with trio.CancelScope() as self._reading:
                    while self._parser.buffered < READ_AHEAD_BYTES:
                        data = await peer.read()
                        if not data:
                            peer.leave()
                            break
                        self._parser.feed(data)
            finally:
                self._reading = None  # also where the app is cancelled: the next request reads anew
        await left.wait()

    async def _receive(self) -> Message:  # noqa: ASYNC910 - what is there is given at once
        parser, peer = self._parser, self.peer
        while not self._told and self._phase != _DONE:
            try:
                piece = parser.next_piece()
            except HeadRefused as error:
                await self._refuse(error)
                peer.leave()
                break
            if piece or parser.complete:
                self._told = parser.complete
                return {"type": "http.request", "body": piece, "more_body": not parser.complete}  # noqa: ASYNC910
            if self._continues:
                self._continues = False
                if self._phase < _BEGUN:
                    await peer.write(response_head.CONTINUE)
            if peer.unyielding_bytes > UNYIELDING_BYTES:
                await peer.take_turns()
            data = peer.read_nowait() or await peer.read()
            if not data:
                peer.leave()
                break
            parser.feed(data)
        await self._wait_gone()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        peer = self.peer
        if peer.unyielding_bytes > UNYIELDING_BYTES or peer.lost or self._refused:
            await peer.take_turns()
            if peer.lost or self._refused:
                return
        else:
            await checkpoint_if_cancelled()
        kind = message["type"]
        if kind == "http.response.body":
            await self._send_body(message.get("body", b""), message.get("more_body", False))
        elif kind == "http.response.start" and self._phase == _NOTHING:
            request = self._parser.head
            answer = response_head.build(
                message["status"],
                message.get("headers", ()),
                date=_date(),
                version=request.version,
                method=request.method,
                persistent=self._persistent and not self._service.ending,
            )
            self._head, self._left, self._client.chunked, self._bodiless, self._persistent = answer
            self._phase = _HELD
        else:
            raise RuntimeError(f"{kind} is not what a response goes on with here")

    async def _send_body(self, body: bytes, more: bool) -> None:  # noqa: ASYNC910 - as `Peer.write`
        if self._phase not in (_HELD, _BEGUN):
            raise RuntimeError("http.response.body has no place before the start of a response, or after its end")
        short = False
        if self._bodiless:
            data = b""
        elif self._client.chunked:
            data = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            if not more:
                data += b"0\r\n\r\n"
        else:
            data = body
            if self._left is not None:
                self._left -= len(body)
                if self._left < 0:
                    raise RuntimeError("the body is longer than its content-length")
                short = not more and self._left > 0
        if self._phase == _HELD:
            data = self._head + data
        self._phase = _BEGUN if more or short else _DONE
        if data:
            await self.peer.write(data)
        if short:
            raise RuntimeError("the body is shorter than its content-length")
        if not more:
            self._note_done()

    def _note_done(self) -> None:
        """Lets go of a `receive` that waits for the client to leave."""
        if self.peer.left is not None:
            self.peer.left.set()
            self.peer.left = None
        if self._reading is not None:
            self._reading.cancel()

    async def flush(self) -> None:
        """As `Client.flush` has it."""
        await checkpoint_if_cancelled()
        if self._phase == _HELD:
            self._phase = _BEGUN
            await self.peer.write(self._head)


def refusal(error: HeadRefused) -> tuple[int, list[Header], bytes]:
    """The answer to what is no request, in OpenAI's shape."""
    told = BadRequest(error.message[:300])
    told.status = error.status
    return told.to_response()


_dated_at = 0
_dated = b""


def _date() -> bytes:
    """The value of the header ``date``."""
    global _dated_at, _dated
    now = int(time.time())
    if now != _dated_at:
        _dated_at, _dated = now, formatdate(now, usegmt=True).encode()
    return _dated
