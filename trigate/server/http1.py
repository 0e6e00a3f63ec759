"""HTTP/1.1: one connection is one task, which also calls the app.

`request_parser` parses the input, `response_head` formats the output, `client_stream` reads and writes. This module has
the deadlines and the life of a connection. A connection has no second task, no channel, no lock and no nursery, as each
of them costs more than parsing a request. The rules for editing it:

- **A message is sent completely or not at all.** `trio.Cancelled` is raised at the beginning of a send, or not at all.
  A send to a client that does not read waits in a shield, and `Connection.abort` ends it from another task. Where the
  socket takes the bytes at once, a send is no checkpoint; after `client_stream.YIELD_AFTER_BYTES` it yields.
- **The head waits for the first piece of the body**, and one packet carries both. ASGI specifies the delay. An app that
  must send its head before it has a body sends an empty piece, or calls `Client.flush`.
- **The connection's scope is cancelled only while no app runs.** It serves as keep-alive timeout, head timeout and
  drain.
- **Reading ahead is bounded**, and not needed with a `Poller`, which reports a disconnect behind any unread input: then
  bytes behind the current request stay in the kernel. Without a poller (TLS, memory streams, systems without epoll), up
  to `READ_AHEAD_BYTES` are read while the app waits for a disconnect.
- **A half-close counts as a disconnect**, as ASGI has one message for both, unless the app asks for the opposite
  (`Client.serve_half_closed`). The app may still send, and it is sent.
- **Unread input is discarded before a connection is closed**, within bounds: closing a socket with unread input sends a
  reset, and a reset may overtake the last response.
- **This is the hot path.** Adding an object or a call per request needs a benchmark before and after.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from email.utils import formatdate
from typing import Any, TypeAlias
from urllib.parse import unquote

import attrs
import trio
from trio.lowlevel import checkpoint, checkpoint_if_cancelled

from trigate.concurrency.poller import Poller
from trigate.concurrency.timers import Timers
from trigate.errors import Header, Internal
from trigate.logs import log
from trigate.server import response_head
from trigate.server.client_capabilities import Client
from trigate.server.client_stream import YIELD_AFTER_BYTES, ClientStream
from trigate.server.request_head import HeadRefused
from trigate.server.request_parser import RequestParser
from trigate.tracebacks import drop_frames

# Any: the values of an ASGI message depend on its type, and the specification has no narrower one.
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]
Address: TypeAlias = tuple[str, int]

READ_AHEAD_BYTES = 64 * 1024
"""How much of further requests is read while one is served, where only reading shows a disconnect."""
LINGER_S = 2.0
"""How long input is discarded after the last response of a connection."""
LINGER_BYTES = 64 * 1024 * 1024
"""How much input is discarded then."""

# How much of a response has been sent: nothing, nothing but its head is held, a part, all of it.
_NOTHING, _HELD, _BEGUN, _DONE = range(4)


@attrs.define(eq=False)
class Service:
    """What the connections of a server share.

    Args:
        app: The ASGI app.
        timers: Close connections that wait too long for a request.
        keep_alive_timeout_s: How long a connection may wait for a request.
        state: The lifespan state, copied into the scope of each request.
        poller: Reports disconnects; None = there is none.
        head_timeout_s: How long the head of a request may take from its first byte to its last one.
        announces_close: Each response announces the end of its connection, and is its last one. If a response had begun
            before, one more request is served: its client does not know of the end, and may have sent a request.
        draining: No connection waits for another request.
    """

    app: Application
    timers: Timers
    keep_alive_timeout_s: float
    state: Mapping[str, Any] = attrs.field(factory=dict)  # Any: values of the app
    poller: Poller | None = None
    head_timeout_s: float = math.inf
    announces_close: bool = False
    draining: bool = False
    _date_at: int = attrs.field(init=False, default=0)
    _date: bytes = attrs.field(init=False, default=b"")

    def date(self) -> bytes:
        """The value of the header ``date``. Formatted once a second."""
        now = int(time.time())
        if now != self._date_at:
            self._date_at, self._date = now, formatdate(now, usegmt=True).encode()
        return self._date


@attrs.define(eq=False)
class Connection:
    """One connection, from its acceptance to its end.

    Args:
        service: What the connections share.
        stream: Owned.
        client: The client's address, for the scope.
        server: The server's address, for the scope.

    Attributes:
        client_stream: The stream to the client.
    """

    _service: Service
    _stream: trio.abc.Stream
    client: Address | None = None
    server: Address | None = None
    client_stream: ClientStream = attrs.field(init=False)
    _parser: RequestParser = attrs.field(init=False, factory=RequestParser)
    _scope: trio.CancelScope = attrs.field(init=False, factory=trio.CancelScope)
    _idle: bool = attrs.field(init=False, default=True)
    _idle_since: float = attrs.field(init=False, factory=trio.current_time)
    _scheme: str = attrs.field(init=False)
    _client: Client = attrs.field(init=False)

    # the current request
    _body_delivered: bool = attrs.field(init=False, default=False)  # the app has the whole body
    _expects_continue: bool = attrs.field(init=False, default=False)  # the client waits for 100
    _reading_ahead: trio.CancelScope | None = attrs.field(init=False, default=None)  # while it waits for a disconnect

    # its response
    _refused: bool = attrs.field(init=False, default=False)  # by the server; what the app sends is dropped
    _phase: int = attrs.field(init=False, default=_NOTHING)
    _head: bytes = attrs.field(init=False, default=b"")  # held until the first piece of the body
    _left_bytes: int | None = attrs.field(init=False, default=None)  # of the declared length
    _bodiless: bool = attrs.field(init=False, default=False)
    _persistent: bool = attrs.field(init=False, default=True)

    def __attrs_post_init__(self) -> None:
        self.client_stream = ClientStream(self._stream, self._service.poller)
        self._scheme = "https" if isinstance(self._stream, trio.SSLStream) else "http"
        self._client = Client(self.client_stream, self._parser, self)

    # -- requests -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves the connection until it is closed."""
        timer = self._service.timers.start(self._idle_since + self._service.keep_alive_timeout_s, self._check_idle)
        try:
            try:
                with self._scope:
                    unread = await self._serve()
                if self._request_arrived_in_time():
                    self._scope = trio.CancelScope()
                    with self._scope:
                        unread = await self._serve()
                if not self._scope.cancelled_caught and not self.client_stream.broken:
                    await self._linger(unread)
            finally:
                timer.stop()
                self.client_stream.release()
        finally:
            await self._stream.aclose()

    def close_if_idle(self) -> None:
        """Closes the connection unless it is serving a request."""
        if self._idle:
            self._scope.cancel()

    @property
    def idle_since(self) -> float | None:
        """Since when the connection has waited for a (whole) request head; None = it serves a request."""
        return self._idle_since if self._idle else None

    def _request_arrived_in_time(self) -> bool:
        """Whether a request arrived while the idle connection was being closed.

        Closing it then would send a reset in place of an answer. Checked once, and not if a part of a head has arrived:
        a slow sender has used up its timeout.
        """
        if not self._scope.cancelled_caught or self._parser.buffered:
            return False
        data = self.client_stream.read_nowait()
        self._parser.feed(data)
        return bool(data)

    async def abort(self) -> None:
        """Closes the connection at once, even while its tasks use it."""
        await self.client_stream.abort()

    async def _serve(self) -> bool:
        """Serves requests. Returns whether input of the client is left unread, or may be."""
        parser, service = self._parser, self._service
        try:
            while True:
                self._idle = True
                if not parser.buffered:
                    if not await self._wait_request():
                        return False
                elif parser.next_request():
                    await checkpoint()  # the request arrived with the one before it: let other tasks run
                elif not await self._wait_request():
                    return False
                if self._scope.cancel_called:
                    return False
                self._idle = False
                await self._answer()
                if self._phase != _DONE or not self._persistent or self.client_stream.disconnected or service.draining:
                    return bool(parser.buffered) or not parser.complete
        except HeadRefused as error:
            await self._refuse(error)
            return True

    async def _wait_request(self) -> bool:
        """Reads the head of a request. Returns False if none arrives, or none is waited for.

        Raises:
            HeadRefused: It is not acceptable, or not complete in time.
        """
        parser, timeout_s = self._parser, self._service.head_timeout_s
        if self._service.draining:
            return False
        self._idle_since = trio.current_time()
        while not parser.buffered:
            data = await self.client_stream.read()
            if not data:
                return False
            parser.feed(data)
            if parser.next_request():
                return True
        self._idle_since = trio.current_time()
        with trio.move_on_after(timeout_s):  # only here: nearly every head arrives in one piece
            while True:
                data = await self.client_stream.read()
                if not data:
                    return False
                parser.feed(data)
                if parser.next_request():
                    return True
        raise HeadRefused(
            408, f"The head of the request did not arrive within {timeout_s:g} s (server.head_timeout_s)."
        )

    def _check_idle(self, now: float) -> float:
        # One timer for the connection: setting a deadline for each request would cost as much as parsing it.
        timeout_s = self._service.keep_alive_timeout_s
        if not self._idle:
            return now + timeout_s
        due_at = self._idle_since + timeout_s
        if due_at <= now:
            self._scope.cancel()
            return now + timeout_s
        return due_at

    async def _answer(self) -> None:
        """Calls the app for the current request."""
        parser, service = self._parser, self._service
        head = parser.head
        self._body_delivered = False
        self._expects_continue = head.expects_continue
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
        if head.offers_websocket:
            from trigate.server import websocket  # here: its library takes long to import, and few use it

            self._persistent = False
            await websocket.serve(service.app, scope, self.client_stream, parser, self.respond)
            return
        crash: ExceptionGroup | None = None
        try:
            await service.app(scope, self._receive, self._send)
        except* Exception as group:
            crash = group
        finally:
            self.client_stream.on_disconnect = None
        if crash is not None:
            log.error("app_crashed", method=scope["method"], path=scope["path"], exc_info=crash)
            drop_frames(crash)
        if (
            self._phase < _BEGUN
            and not self.client_stream.broken
            and (crash is not None or not self.client_stream.disconnected)
        ):
            await self._send_internal_error()
        if not parser.complete:
            self._discard_body()

    def _discard_body(self) -> None:
        """Discards the received part of a body that the app did not read. If that is not all, the connection ends."""
        parser = self._parser
        try:
            while not parser.complete and parser.buffered:
                if not parser.next_piece():
                    break
        except HeadRefused:
            self._persistent = False
        if not parser.complete:
            self._persistent = False

    async def _send_internal_error(self) -> None:
        status, headers, body = Internal("The server failed on this request.").to_response()
        await self._send_whole(status, headers, body, self._parser.head.method)

    async def _refuse(self, error: HeadRefused) -> None:
        """Answers an invalid request, unless a response has begun. The connection then ends."""
        log.debug("request_refused", status=error.status, reason=error.message, client=self.client)
        if self._phase != _BEGUN:
            status, headers, body = error.to_response()
            self._persistent = False
            await self._send_whole(status, headers, body)
        self._refused = True

    async def respond(self, status: int, headers: list[Header], body: bytes) -> None:
        """Sends a whole response to the current request, and adds its content-length."""
        if self.client_stream.broken or self._refused or self._phase != _NOTHING:
            return
        request = self._parser.head
        await self._send_whole(status, headers, body, request.method, request.version)
        self._note_done()

    async def _send_whole(
        self, status: int, headers: list[Header], body: bytes, method: bytes = b"GET", version: bytes = b"HTTP/1.1"
    ) -> None:
        headers = [*headers, (b"content-length", b"%d" % len(body))]
        service = self._service
        persistent = self._persistent and not service.announces_close
        answer = response_head.build(
            status, headers, date=service.date(), version=version, method=method, persistent=persistent
        )
        self._persistent = answer.persistent
        self._phase = _DONE
        await self.client_stream.write(answer.data if answer.bodiless else answer.data + body)

    async def _linger(self, unread: bool) -> None:
        """Closes the sending side, and discards what still arrives, if anything does."""
        stream = self.client_stream
        if stream.disconnected and stream.socket is not None and not unread and not stream.read_nowait():
            return  # closing the socket sends the same FIN, in one step
        await stream.half_close()
        if unread or stream.read_nowait():
            discarded = 0
            with trio.move_on_after(LINGER_S):
                while discarded < LINGER_BYTES:
                    data = await stream.read()
                    if not data:
                        break
                    discarded += len(data)

    # -- called by the app -------------------------------------------------------------------------------------------

    async def _wait_disconnect(self) -> None:
        """Waits until the client has disconnected, or the response is complete."""
        stream = self.client_stream
        if stream.disconnected or self._phase == _DONE:
            await checkpoint()
            return
        if stream.disconnect_event is None:
            stream.disconnect_event = trio.Event()
        event = stream.disconnect_event
        if not stream.watch() and self._reading_ahead is None:
            try:
                with trio.CancelScope() as self._reading_ahead:
                    while self._parser.buffered < READ_AHEAD_BYTES:
                        data = await stream.read()
                        if not data:
                            stream.note_fin()
                            break
                        self._parser.feed(data)
            finally:
                self._reading_ahead = None  # also if the app is cancelled: the next request starts its own
        await event.wait()

    def take_body(self) -> bytes:
        """Returns the rest of the body, which has been received; see `Client.take_body`."""
        self._body_delivered = True
        return self._parser.next_piece()

    async def _receive(self) -> Message:
        parser, stream = self._parser, self.client_stream
        while not self._body_delivered and self._phase != _DONE:
            try:
                piece = parser.next_piece()
            except HeadRefused as error:
                await self._refuse(error)
                stream.note_disconnect()
                break
            if piece or parser.complete:
                self._body_delivered = parser.complete
                return {"type": "http.request", "body": piece, "more_body": not parser.complete}
            if self._expects_continue:
                self._expects_continue = False
                if self._phase < _BEGUN:
                    await stream.write(response_head.CONTINUE)
            if stream.bytes_since_wait > YIELD_AFTER_BYTES:
                await stream.yield_to_others()
            data = stream.read_nowait() or await stream.read()
            if not data:
                stream.note_disconnect()
                break
            parser.feed(data)
        await self._wait_disconnect()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        stream = self.client_stream
        if stream.bytes_since_wait > YIELD_AFTER_BYTES or stream.broken or self._refused:
            await stream.yield_to_others()
            if stream.broken or self._refused:
                return
        else:
            await checkpoint_if_cancelled()
        kind = message["type"]
        if kind == "http.response.body":
            await self._send_body(message.get("body", b""), message.get("more_body", False))
        elif kind == "http.response.start" and self._phase == _NOTHING:
            request, service = self._parser.head, self._service
            answer = response_head.build(
                message["status"],
                message.get("headers", ()),
                date=service.date(),
                version=request.version,
                method=request.method,
                persistent=self._persistent and not service.announces_close,
            )
            self._head, self._left_bytes, self._client.chunked, self._bodiless, self._persistent = answer
            self._phase = _HELD
        else:
            raise RuntimeError(f"unexpected ASGI message: {kind}")

    async def _send_body(self, body: bytes, more: bool) -> None:
        if self._phase not in (_HELD, _BEGUN):
            raise RuntimeError("http.response.body before the start of a response, or after its end")
        short = False
        if self._bodiless:
            data = b""
        elif self._client.chunked:
            data = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            if not more:
                data += b"0\r\n\r\n"
        else:
            data = body
            if self._left_bytes is not None:
                self._left_bytes -= len(body)
                if self._left_bytes < 0:
                    raise RuntimeError("the body is longer than its content-length")
                short = not more and self._left_bytes > 0
        if self._phase == _HELD:
            data = self._head + data
        self._phase = _BEGUN if more or short else _DONE
        if data:
            await self.client_stream.write(data)
        if short:
            raise RuntimeError("the body is shorter than its content-length")
        if not more:
            self._note_done()

    def _note_done(self) -> None:
        """Ends a `receive` that waits for a disconnect."""
        if self.client_stream.disconnect_event is not None:
            self.client_stream.disconnect_event.set()
            self.client_stream.disconnect_event = None
        if self._reading_ahead is not None:
            self._reading_ahead.cancel()

    async def flush(self) -> None:
        """Sends the head of the response if it still waits for the first piece of the body."""
        await checkpoint_if_cancelled()
        if self._phase == _HELD:
            self._phase = _BEGUN
            await self.client_stream.write(self._head)
