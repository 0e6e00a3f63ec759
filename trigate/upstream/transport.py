"""An `httpx2.AsyncBaseTransport` on Trio's sockets: a pool of connections, and requests on them.

**Ownership.** A connection is in exactly one place: with the `Opening` that uses it, or idle in the pool. A *slot* is
the right to have one, and goes the same way: taken before a connection is made, given back when it is closed, or
handed to whoever waits longest. Every change of place is synchronous. Between two of them stands an ``except
BaseException`` that closes the connection, or the end of the ``async with``. So a cancellation at any point finds an
owner, and what was read in part is never given back.

**The queue is fair.** While anybody waits, nothing is idle and no slot is free: whatever comes free is handed to the
first of the queue, and who comes later finds nothing to take.

**Cost.** Acquire and release are O(1), expiry O(what has expired). A request on a connection that is there costs a
look at the socket, one send, one wait, one receive, and the parser's callbacks; no scope, lock, task or further
checkpoint.

**Retries.** A server may close an idle connection in the moment in which it is taken. If a reused one ends before a
single byte of its response, the request is sent once more, on a new connection. That is the only retry here. A request
that must not arrive twice (the extension ``trigate.once``) goes out on a new connection, and is not sent again.

Rules for editing: no ``await`` between taking something and the ``try`` that gives it back.
"""

from __future__ import annotations

import math
import ssl
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeVar

import attrs
import httpx2
import outcome
import trio

from trigate.upstream.connect import Connection, Origin, Refuse, dial
from trigate.upstream.response_parser import Framing

__all__ = ["Opening", "Origin", "Response", "SocketTransport", "TransportStatistics"]

_SLICE_BYTES = 128 * 1024
_CLOSED_AT_ONCE = 50
_T = TypeVar("_T")


class Response(Framing):
    """A response whose head is there, and its connection. Its owner is the ``async with`` that gave it.

    Who reads the connection in its owner's place (a relay) takes ``socket``, waits until it is readable, gives what
    it receives to `feed`, and its end to `feed_eof`; the pieces are then in ``pieces``.

    Attributes:
        socket: The plain, non-blocking socket; None if there is something between it and HTTP (TLS).
    """

    __slots__ = ("_connection", "socket")

    def __init__(self, connection: Connection, method: str) -> None:
        super().__init__(method)
        self._connection: Connection | None = connection
        self.socket = connection.socket if connection.stream is None else None

    async def receive(self) -> bytes | None:
        """Returns the next piece of the body, which is everything that is there; None at its proper end.

        Raises:
            httpx2.RemoteProtocolError: The connection ended before the body, or what came is not HTTP.
            httpx2.ReadError: The connection broke; or the response was closed.
        """
        pieces = self.pieces
        while not pieces:
            if self.complete:
                return None  # noqa: ASYNC910 - its end was received
            await self._receive_more()
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return piece  # noqa: ASYNC910 - it was there

    async def _receive_more(self) -> None:
        if self._connection is None:
            raise httpx2.ReadError("The response was closed.")
        data = await self._connection.receive()
        if data:
            self.feed(data)
        else:
            self.feed_eof()

    async def _receive_head(self) -> None:  # noqa: ASYNC910 - as `receive`
        while not self.begun:
            await self._receive_more()

    def abandon(self) -> None:
        """Closes the connection at once, from whichever task; its owner still has to give its slot back. Who reads it
        is told."""
        self.keep_alive = False
        if self._connection is not None:
            self._connection.close()

    def close(self) -> None:
        super().close()
        self._connection = self.socket = None


@attrs.frozen(kw_only=True)
class _Bounds:
    """What a caller of the `httpx2` interface sets for the steps of a request, in seconds."""

    connect_s: float = math.inf
    queue_s: float = math.inf
    read_s: float = math.inf
    write_s: float = math.inf

    @classmethod
    def of(cls, request: httpx2.Request) -> _Bounds:
        told = request.extensions.get("timeout", {})
        names = {"connect_s": "connect", "queue_s": "pool", "read_s": "read", "write_s": "write"}
        return cls(**{own: math.inf if told.get(name) is None else told[name] for own, name in names.items()})


async def _within(seconds: float, late: type[httpx2.TimeoutException], waiting: Awaitable[_T]) -> _T:
    with trio.move_on_after(seconds):
        return await waiting
    raise late(f"nothing within {seconds:g} s")


class Opening:
    """An ``async with`` of a response. Made by `SocketTransport.open`.

    Acquire, send, wait for the head; give back. Written out, since a generator would cost as much as all of it.
    """

    __slots__ = (
        "_bounds",
        "_connection",
        "_method",
        "_once",
        "_origin",
        "_request",
        "_response",
        "_spoilt",
        "_transport",
    )

    def __init__(
        self,
        transport: SocketTransport,
        origin: Origin,
        request: bytes,
        method: str,
        bounds: _Bounds | float,
        *,
        once: bool = False,
    ) -> None:
        self._transport = transport
        self._origin = origin
        self._request = request
        self._method = method
        self._bounds = bounds
        self._once = once
        self._connection: Connection | None = None
        self._response: Response | None = None
        self._spoilt = False  # whatever the response says: not all of the request went out

    async def __aenter__(self) -> Response:
        transport = self._transport
        connection = transport._take_idle(self._origin) if not self._once else None
        if connection is None:
            connection = await transport._obtain(self._origin, self._bounds)
        while True:
            self._connection = connection
            self._response = response = Response(connection, self._method)
            try:
                await self._call(connection, response)
                return response
            except (httpx2.NetworkError, httpx2.RemoteProtocolError):
                self._connection = None
                response.close()
                if response.heard or not connection.reused or self._once:
                    transport._discard(connection)
                    raise
                connection.close()  # its slot is kept
                self._spoilt = False
            except BaseException:
                self.release()
                raise
            connection = await transport._dial_in_slot(self._origin, self._bounds)

    async def __aexit__(  # noqa: ASYNC910 - never waits, so that nothing can come between
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Gives the connection back if it can carry another request, else closes it. Twice does nothing."""
        connection, response = self._connection, self._response
        if connection is None or response is None:
            return
        self._connection = None
        if response.complete and response.keep_alive and not self._spoilt:
            self._transport._give_back(connection)
        else:
            self._transport._discard(connection)
        response.close()

    async def _call(self, connection: Connection, response: Response) -> None:
        request, bounds = self._request, self._bounds
        sent = 0
        if connection.stream is None and len(request) <= _SLICE_BYTES:
            try:
                sent = connection.socket.send(request)
            except BlockingIOError:
                pass
            except OSError:
                # It has gone, maybe not without an answer. Nothing waits for more: the socket tells its end at once.
                sent = len(request)
                self._spoilt = True
        if sent < len(request):
            sending = self._send_rest(connection, response, memoryview(request)[sent:])
            await (sending if isinstance(bounds, float) else _within(bounds.write_s, httpx2.WriteTimeout, sending))
        if isinstance(bounds, float) or bounds.read_s == math.inf:
            await response._receive_head()
        else:
            await _within(bounds.read_s, httpx2.ReadTimeout, response._receive_head())

    async def _send_rest(  # noqa: ASYNC910 - there is a rest, else it is not called
        self, connection: Connection, response: Response, rest: memoryview
    ) -> None:
        """Sends what the socket does not take at once, while it listens for an answer that does not wait for it."""
        failed: httpx2.TransportError | None = None
        async with trio.open_nursery() as nursery:

            async def listen() -> None:  # noqa: ASYNC910 - as `receive`
                nonlocal failed
                try:
                    await response._receive_head()
                except httpx2.TransportError as error:
                    failed = error
                self._spoilt = True  # the server would take what follows for the rest of this one
                nursery.cancel_scope.cancel()

            nursery.start_soon(listen)
            while rest:
                try:
                    await connection.send(rest[:_SLICE_BYTES])
                except httpx2.WriteError as error:
                    if connection.stream is not None:
                        failed = error
                        break
                    await trio.sleep_forever()  # an answer may stand before the end, which the other task finds
                rest = rest[_SLICE_BYTES:]
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed


class _Waiting:
    """A place in the queue."""

    __slots__ = ("origin", "task")

    def __init__(self, origin: Origin, task: trio.lowlevel.Task) -> None:
        self.origin = origin
        self.task = task


@attrs.frozen(kw_only=True)
class TransportStatistics:
    """A moment of a transport.

    Attributes:
        open: Connections, also those that are being made.
        idle: Those of them that nobody uses.
        waiting: Requests in the queue for one.
    """

    open: int
    idle: int
    waiting: int


class SocketTransport(httpx2.AsyncBaseTransport):
    """Requests over HTTP/1.1, with and without TLS.

    Args:
        trust: Gives the context for TLS; called when a connection needs one.
        max_connections: The most that are open at once, to all origins together; further requests queue. None = any.
        max_idle: The most that are kept while nobody uses them.
        idle_expiry_s: How long one is kept.
        refuse: Judges each address before it is connected to; None = all are allowed.
        dial: Makes the connections.

    **Resource handling:** idle connections are closed by `run`, if somebody runs it; at the latest by `aclose`.
    """

    def __init__(
        self,
        *,
        trust: Callable[[], ssl.SSLContext] = httpx2.create_ssl_context,
        max_connections: int | None = None,
        max_idle: int = 100,
        idle_expiry_s: float = 30.0,
        refuse: Refuse | None = None,
        dial: Callable[..., Awaitable[Connection]] = dial,
    ) -> None:
        if idle_expiry_s <= 0:
            raise ValueError("idle_expiry_s: expected more than 0 (max_idle = 0 keeps nothing)")
        self._trust = trust
        self._max_connections = math.inf if max_connections is None else max_connections
        self._max_idle = max_idle
        self._idle_expiry_s = idle_expiry_s
        self._refuse = refuse
        self._dial = dial
        self._slots = 0
        # Of all origins in the order in which they were given back, and those of each, of which the last is taken.
        self._idle: OrderedDict[Connection, None] = OrderedDict()
        self._idle_at: dict[Origin, dict[Connection, None]] = {}
        self._queue: OrderedDict[_Waiting, None] = OrderedDict()
        self._closed = False

    def __repr__(self) -> str:
        return f"<SocketTransport {self._slots} open, {len(self._idle)} idle, {len(self._queue)} waiting>"

    def statistics(self) -> TransportStatistics:
        """Returns a snapshot."""
        return TransportStatistics(open=self._slots, idle=len(self._idle), waiting=len(self._queue))

    def open(
        self, origin: Origin, request: bytes, *, method: str = "POST", connect_timeout_s: float = math.inf
    ) -> Opening:
        """Sends a request and owns its response for as long as the block lasts.

        Args:
            request: All of it, head and body, as it goes out.
            method: What the head says: of ``HEAD``, no body comes back.
            connect_timeout_s: For a new connection, where one is needed. Every other deadline is the caller's scope.

        Raises:
            httpx2.ConnectTimeout: No connection in time.
            httpx2.ConnectError: No connection.
            httpx2.ReadError: It broke before the head.
            httpx2.RemoteProtocolError: It ended before the head, or what came is not HTTP.

        **Cancels:** at any point. The connection is given back only if it was read to the end of its response.
        """
        return Opening(self, origin, request, method, float(connect_timeout_s))

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """The same for those who speak `httpx2`, with its timeouts. Closing the response gives the connection back."""
        body = await request.aread()
        opening = Opening(
            self,
            Origin.of(request.url),
            _serialized(request, body),
            request.method,
            _Bounds.of(request),
            once=bool(request.extensions.get("trigate.once")),
        )
        response = await opening.__aenter__()
        try:
            return httpx2.Response(
                response.status,
                headers=response.headers,
                stream=_Body(opening, response, _Bounds.of(request).read_s),
                extensions={"http_version": b"HTTP/1.1"},
            )
        except BaseException:
            opening.release()
            raise

    async def run(self) -> None:
        """Closes connections that have been idle for too long, for ever."""
        while True:
            closed = 0
            now = trio.current_time()
            while self._idle:
                oldest = next(iter(self._idle))
                if now < oldest.idle_since + self._idle_expiry_s:  # as it is computed below, to the last bit
                    break
                self._remove(oldest)
                closed += 1
                if closed % _CLOSED_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()  # thousands of them are no reason to hold everything up
            due_at = next(iter(self._idle)).idle_since + self._idle_expiry_s if self._idle else math.inf
            # Whatever is given back meanwhile is not due before it looks again.
            await trio.sleep_until(min(due_at, trio.current_time() + self._idle_expiry_s))

    async def aclose(self) -> None:
        """Closes what is idle. What is in use is closed where its block ends."""
        self._closed = True
        while self._idle:
            self._remove(next(iter(self._idle)))
        await trio.lowlevel.checkpoint()

    # -- the pool: everything that changes it is synchronous

    def _take_idle(self, origin: Origin) -> Connection | None:
        idle = self._idle_at.get(origin)
        while idle:
            connection, _ = idle.popitem()
            del self._idle[connection]
            fresh = trio.current_time() - connection.idle_since < self._idle_expiry_s
            if fresh and connection.is_quiet():
                return connection
            self._discard(connection)
        return None

    async def _obtain(self, origin: Origin, bounds: _Bounds | float) -> Connection:
        if self._slots < self._max_connections:
            self._slots += 1
        elif self._idle:
            oldest = next(iter(self._idle))
            self._forget(oldest)
            oldest.close()  # its slot is now this one's
        else:
            waiting = self._wait_in_queue(origin)
            connection = await (
                waiting if isinstance(bounds, float) else _within(bounds.queue_s, httpx2.PoolTimeout, waiting)
            )
            if connection is not None:
                if connection.is_quiet():
                    return connection
                connection.close()
        return await self._dial_in_slot(origin, bounds)

    async def _dial_in_slot(self, origin: Origin, bounds: _Bounds | float) -> Connection:
        timeout_s = bounds if isinstance(bounds, float) else bounds.connect_s
        try:
            return await self._dial(origin, self._trust, timeout_s=timeout_s, refuse=self._refuse)
        except BaseException:
            self._free_slot()
            raise

    async def _wait_in_queue(self, origin: Origin) -> Connection | None:
        """Returns a connection, or None: then a slot was handed over."""
        waiting = _Waiting(origin, trio.lowlevel.current_task())
        self._queue[waiting] = None

        def abort(_: Callable[[], BaseException]) -> trio.lowlevel.Abort:
            del self._queue[waiting]
            return trio.lowlevel.Abort.SUCCEEDED

        connection: Connection | None = await trio.lowlevel.wait_task_rescheduled(abort)
        return connection

    def _give_back(self, connection: Connection) -> None:
        connection.reused = True
        if self._closed:
            self._discard(connection)
        elif self._queue:
            waiting, _ = self._queue.popitem(last=False)
            if waiting.origin != connection.origin:
                connection.close()
                trio.lowlevel.reschedule(waiting.task)
            else:
                trio.lowlevel.reschedule(waiting.task, outcome.Value(connection))
        else:
            connection.idle_since = trio.current_time()
            self._idle[connection] = None
            self._idle_at.setdefault(connection.origin, {})[connection] = None
            if len(self._idle) > self._max_idle:
                self._remove(next(iter(self._idle)))

    def _discard(self, connection: Connection) -> None:
        connection.close()
        self._free_slot()

    def _free_slot(self) -> None:
        if self._queue:
            waiting, _ = self._queue.popitem(last=False)
            trio.lowlevel.reschedule(waiting.task)
        else:
            self._slots -= 1

    def _forget(self, connection: Connection) -> None:
        del self._idle[connection]
        at = self._idle_at[connection.origin]
        del at[connection]
        if not at:
            del self._idle_at[connection.origin]

    def _remove(self, connection: Connection) -> None:
        self._forget(connection)
        self._discard(connection)


class _Body(httpx2.AsyncByteStream):
    """A response's body, as `httpx2` takes it."""

    def __init__(self, opening: Opening, response: Response, read_s: float) -> None:
        self._opening = opening
        self._response = response
        self._read_s = read_s

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        piece = await _within(self._read_s, httpx2.ReadTimeout, self._response.receive())
        if piece is None:
            self._opening.release()
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:  # noqa: ASYNC910 - never waits
        self._opening.release()


def _serialized(request: httpx2.Request, body: bytes) -> bytes:
    """The request as it goes out.

    Raises:
        httpx2.LocalProtocolError: Its head would say something else than it means.
    """
    if request.method == "CONNECT":
        raise httpx2.LocalProtocolError("CONNECT is for proxies")
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
    names = set()
    for name, value in request.headers.raw:
        lower = name.lower()
        if lower == b"transfer-encoding":
            continue  # the body is here, as a whole
        if lower == b"content-length" and value != b"%d" % len(body):
            raise httpx2.LocalProtocolError(f"the content-length is not that of the body, {len(body)}")
        names.add(lower)
        lines.append(b"%b: %b" % (name, value))
    if b"accept-encoding" not in names:
        lines.append(b"accept-encoding: identity")
    if b"content-length" not in names and (body or request.method in ("POST", "PUT", "PATCH")):
        lines.append(b"content-length: %d" % len(body))
    for line in lines:
        if b"\r" in line or b"\n" in line or b"\0" in line:
            raise httpx2.LocalProtocolError("a header or the path has a line break in it")
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
