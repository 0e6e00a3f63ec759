"""Connections that are kept and queued for, and the exchange of one request and its response on them.

**Ownership.** A connection has exactly one owner: the `Opening` that uses it, or the pool, where it is idle. A *slot*
is the right to have one connection. It is taken before the connection is made, and freed when the connection is closed,
or handed to the request that has waited longest. Every change of owner is synchronous. Between two of them stands an
``except BaseException`` that closes the connection, or the end of the ``async with``. So a cancellation at any point
finds an owner, and a connection whose response was read in part is never reused.

**The queue is fair.** While a request waits, no connection is idle and no slot is free: each one that is released goes
to the first request of the queue, and a request that comes later finds nothing to take.

**Cost.** Acquire and release are O(1), expiry is O(expired connections). A request on an idle connection costs one poll
of the socket, one send, one wait, one receive, and the parser's callbacks; no scope, lock, task or further checkpoint.

**Retries.** A server may close an idle connection at the moment in which it is reused. If a reused connection ends
before the first byte of the response, the request is sent once more, on a new connection. This is the only retry here;
``resend`` switches it off. A request that must not arrive twice (``once``) always gets a new connection, and is not
sent again.

**Rules for editing.** No ``await`` between an acquisition and the ``try`` that releases it. Everything that changes the
pool is synchronous, except for waiting in the queue and connecting.
"""

from __future__ import annotations

import math
import ssl
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from types import TracebackType

import attrs
import httpx2
import outcome
import trio

from trigate.errors import GatewayError
from trigate.upstream.connect import AddressCheck, Connection, NoDescriptor, Origin, dial
from trigate.upstream.request_stream import Frames, RequestStream
from trigate.upstream.response_parser import Framing
from trigate.upstream.step_timeouts import StepTimeouts, within

_SLICE_BYTES = 128 * 1024
_CLOSED_AT_ONCE = 50


class Response(Framing):
    """A response whose head is complete, with its connection. The ``async with`` that returned it owns both.

    Another reader of the connection (a relay) uses ``socket``: it waits until the socket is readable, passes what it
    receives to `feed`, and the end of the connection to `feed_eof`. The pieces of the body are then in ``pieces``.

    Attributes:
        socket: The plain, non-blocking socket; None if a layer lies between it and HTTP (TLS).
    """

    __slots__ = ("_connection", "socket")

    def __init__(self, connection: Connection, method: str) -> None:
        super().__init__(method)
        self._connection: Connection | None = connection
        self.socket = connection.socket if connection.stream is None else None

    async def receive(self) -> bytes | None:
        """Returns everything of the body that has been received, as one piece; None at the end of the body.

        Raises:
            httpx2.RemoteProtocolError: The connection ended before the body did, or the bytes are not HTTP.
            httpx2.ReadError: The connection broke, or the response was closed.
        """
        pieces = self.pieces
        while not pieces:
            if self.complete:
                return None
            await self._receive_more()
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return piece

    async def receive_head(self) -> None:
        """Receives until the head is complete. Raises as `receive`."""
        while not self.begun:
            await self._receive_more()

    async def _receive_more(self) -> None:
        if self._connection is None:
            raise httpx2.ReadError("The response was closed.")
        data = await self._connection.receive()
        if data:
            self.feed(data)
        else:
            self.feed_eof()

    def abandon(self) -> None:
        """Closes the connection at once, from any task. The reader gets an error. The owner still has to free the
        slot."""
        self.keep_alive = False
        if self._connection is not None:
            self._connection.close()

    def close(self) -> None:
        """Releases the parser and the connection. What was parsed stays; a further read is a `httpx2.ReadError`."""
        super().close()
        self._connection = self.socket = None


@attrs.define(eq=False)
class Opening:
    """An ``async with`` that sends a request and owns its response. Made by `ConnectionPool.open`.

    It acquires a connection, sends, waits for the head, and releases the connection at the end. It is a class, since a
    generator would cost as much as all of that.
    """

    _pool: ConnectionPool
    _origin: Origin
    _request: bytes = attrs.field(repr=False)
    _method: str
    _connect_timeout_s: float
    _steps: StepTimeouts | None = None
    _once: bool = False
    _resend: bool = True
    _stream: RequestStream | None = attrs.field(default=None, repr=False)
    _connection: Connection | None = attrs.field(default=None, init=False)
    _response: Response | None = attrs.field(default=None, init=False)
    # Whatever the response says, the connection carries no other request: this one was not sent in full.
    _partly_sent: bool = attrs.field(default=False, init=False)

    async def __aenter__(self) -> Response:
        pool = self._pool
        connection = pool._take_idle(self._origin) if not self._once else None
        if connection is None:
            connection = await pool._acquire(self._origin, self._connect_timeout_s, self._steps)
        while True:
            self._connection = connection
            self._response = response = Response(connection, self._method)
            try:
                await self._exchange(connection, response)
                return response
            except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
                self._connection = None
                response.close()
                if response.received_any or not connection.reused or self._once or not self._resend:
                    pool._discard(connection)
                    if self._partly_sent and not response.received_any:
                        raise httpx2.WriteError(str(error)) from None
                    raise
                connection.close()  # its slot is kept for the new one
                self._partly_sent = False
            except BaseException:
                self.release()
                raise
            connection = await pool._dial_in_slot(self._origin, self._connect_timeout_s)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()  # synchronous, so that no cancellation can come between

    def release(self) -> None:
        """Returns the connection to the pool if it can carry another request; else closes it. A second call does
        nothing."""
        connection, response = self._connection, self._response
        if connection is None or response is None:
            return
        self._connection = None
        if response.complete and response.keep_alive and not self._partly_sent:
            self._pool._put_back(connection)
        else:
            self._pool._discard(connection)
        response.close()

    async def _exchange(self, connection: Connection, response: Response) -> None:
        """Sends the request, and receives the head of the response."""
        request, steps = self._request, self._steps
        sent = 0
        if connection.stream is None and len(request) <= _SLICE_BYTES:
            try:
                sent = connection.socket.send(request)
            except BlockingIOError:
                pass
            except OSError:
                # The peer has closed the connection, possibly after an answer. Reading below returns that answer or
                # the end at once.
                sent = len(request)
                self._partly_sent = True
        if sent < len(request):
            sending = self._send_rest(connection, response, memoryview(request)[sent:])
            await (sending if steps is None else within(steps.write_s, httpx2.WriteTimeout, sending))
        if self._stream is not None and not response.begun:
            await self._send_rest(connection, response, memoryview(b""), self._stream)
        if steps is None or steps.read_s == math.inf:
            await response.receive_head()
        else:
            await within(steps.read_s, httpx2.ReadTimeout, response.receive_head())

    async def _send_rest(
        self, connection: Connection, response: Response, rest: memoryview, stream: RequestStream | None = None
    ) -> None:
        """Sends what the socket did not take at once, or a body as it arrives, and listens at the same time for an
        early answer."""
        failure: Exception | None = None
        frames = Frames(stream) if stream is not None else None
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                nonlocal failure
                try:
                    await response.receive_head()
                except httpx2.TransportError as error:
                    failure = error
                self._partly_sent = True  # the server would read the next request as the rest of this one
                nursery.cancel_scope.cancel()

            nursery.start_soon(listen)
            while True:
                try:
                    if frames is not None and not rest:
                        rest = memoryview(await frames.next())
                    if not rest:
                        break
                    await connection.send(rest[:_SLICE_BYTES])
                except GatewayError as error:  # not through the nursery, which would wrap it in a group
                    failure = error
                    self._partly_sent = True
                    break
                except httpx2.WriteError as error:
                    if connection.stream is not None:
                        failure = error
                        break
                    await trio.sleep_forever()  # an answer may precede the end of the connection: `listen` finds out
                rest = rest[_SLICE_BYTES:]
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure


@attrs.define(eq=False)
class _QueueEntry:
    """A request that waits for a connection or a slot."""

    origin: Origin
    task: trio.lowlevel.Task


@attrs.frozen(kw_only=True)
class PoolStatistics:
    """A snapshot of a pool.

    Attributes:
        open: The number of connections, including those that are being made.
        idle: How many of them no request uses.
        waiting: The number of requests in the queue for one.
    """

    open: int
    idle: int
    waiting: int


class ConnectionPool:
    """Connections to any number of origins, over HTTP/1.1, with and without TLS.

    Args:
        trust: Returns the TLS context with the certificate authorities; called when a connection needs one.
        max_connections: The most connections that are open at once, to all origins together; further requests queue.
            None = no limit.
        max_idle: The most idle connections that are kept.
        idle_expiry_s: How long an idle connection is kept.
        refuse: Checks each address before a connection to it is attempted; None = all are allowed.
        dial: Makes the connections.

    **Resource handling:** `run`, if it runs, closes idle connections that have expired; `close` closes all idle ones.
    """

    def __init__(
        self,
        *,
        trust: Callable[[], ssl.SSLContext] = httpx2.create_ssl_context,
        max_connections: int | None = None,
        max_idle: int = 100,
        idle_expiry_s: float = 30.0,
        refuse: AddressCheck | None = None,
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
        # The idle connections of all origins, oldest first, and those of each origin, of which the newest is reused.
        self._idle: OrderedDict[Connection, None] = OrderedDict()
        self._idle_by_origin: dict[Origin, dict[Connection, None]] = {}
        self._queue: OrderedDict[_QueueEntry, None] = OrderedDict()
        self._closed = False
        _pools.add(self)

    def __repr__(self) -> str:
        return f"<ConnectionPool {self._slots} open, {len(self._idle)} idle, {len(self._queue)} waiting>"

    def statistics(self) -> PoolStatistics:
        """Returns a snapshot."""
        return PoolStatistics(open=self._slots, idle=len(self._idle), waiting=len(self._queue))

    def open(
        self,
        origin: Origin,
        request: bytes,
        *,
        method: str = "POST",
        connect_timeout_s: float = math.inf,
        steps: StepTimeouts | None = None,
        once: bool = False,
        resend: bool = True,
        stream: RequestStream | None = None,
    ) -> Opening:
        """Sends a request and owns its response for as long as the block lasts.

        Args:
            request: The whole request, head and body, as it is sent; with a ``stream``, its head.
            method: The method in the head; a response to ``HEAD`` has no body.
            connect_timeout_s: The limit for a new connection, where one is needed.
            steps: Limits for the other steps; None = the caller's cancel scope is the only one.
            once: Whether the request must not arrive twice: it gets a new connection, and no retry.
            resend: Whether a request is sent once more after its reused connection has ended without an answer.
            stream: The body, which is sent as it arrives. The request is then sent ``once``.

        Raises:
            httpx2.ConnectTimeout: No connection in time.
            httpx2.ConnectError: No connection.
            httpx2.PoolTimeout: No slot within ``steps.queue_s``.
            httpx2.WriteTimeout: The request was not sent within ``steps.write_s``.
            httpx2.ReadTimeout: No head within ``steps.read_s``.
            httpx2.WriteError: The connection broke before the whole request was sent.
            httpx2.ReadError: The connection broke before the head.
            httpx2.RemoteProtocolError: The connection ended before the head, or the bytes are not HTTP.
            GatewayError: As ``stream.receive``.

        **Cancels:** at any point. The connection is reused only if its response was read to the end.
        """
        return Opening(
            self, origin, request, method, connect_timeout_s, steps, once or stream is not None, resend, stream
        )

    async def connect(self, origin: Origin, connect_timeout_s: float) -> Connection:
        """Makes a connection for another protocol than HTTP. It has a slot until `disconnect`, which the caller owes.

        Raises:
            httpx2.ConnectTimeout, httpx2.ConnectError: As `open`.
        """
        return await self._acquire(origin, connect_timeout_s, None)

    def disconnect(self, connection: Connection) -> None:
        """Closes a connection of `connect`."""
        self._discard(connection)

    async def run(self) -> None:
        """Closes connections that have been idle for too long, until it is cancelled."""
        while True:
            closed = 0
            now = trio.current_time()
            while self._idle:
                oldest = next(iter(self._idle))
                # the same sum as below: `due_at - now` could round differently, and the loop would not sleep
                if now < oldest.idle_since + self._idle_expiry_s:
                    break
                self._remove(oldest)
                closed += 1
                if closed % _CLOSED_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()  # so that closing thousands does not block other tasks
            due_at = next(iter(self._idle)).idle_since + self._idle_expiry_s if self._idle else math.inf
            # A connection that is put back during this sleep expires after the next check.
            await trio.sleep_until(min(due_at, trio.current_time() + self._idle_expiry_s))

    def close(self) -> None:
        """Closes the idle connections. A connection in use is closed at the end of its block."""
        self._closed = True
        self.close_idle()

    def close_idle(self) -> int:
        """Closes the idle connections, and returns how many there were."""
        count = len(self._idle)
        while self._idle:
            self._remove(next(iter(self._idle)))
        return count

    # -- acquisition and release

    def _take_idle(self, origin: Origin) -> Connection | None:
        idle = self._idle_by_origin.get(origin)
        while idle:
            connection, _ = idle.popitem()
            del self._idle[connection]
            fresh = trio.current_time() - connection.idle_since < self._idle_expiry_s
            if fresh and connection.is_quiet():
                return connection
            self._discard(connection)
        return None

    async def _acquire(self, origin: Origin, connect_timeout_s: float, steps: StepTimeouts | None) -> Connection:
        if self._slots < self._max_connections:
            self._slots += 1
        elif self._idle:
            oldest = next(iter(self._idle))
            self._forget(oldest)
            oldest.close()  # its slot passes to the new connection
        else:
            waiting = self._wait_in_queue(origin)
            connection = await (waiting if steps is None else within(steps.queue_s, httpx2.PoolTimeout, waiting))
            if connection is not None:
                if connection.is_quiet():
                    return connection
                connection.close()
        return await self._dial_in_slot(origin, connect_timeout_s)

    async def _dial_in_slot(self, origin: Origin, connect_timeout_s: float) -> Connection:
        try:
            try:
                return await self._dial(origin, self._trust, timeout_s=connect_timeout_s, refuse=self._refuse)
            except NoDescriptor:
                if not _close_idle():
                    raise
            return await self._dial(origin, self._trust, timeout_s=connect_timeout_s, refuse=self._refuse)
        except BaseException:
            self._free_slot()
            raise

    async def _wait_in_queue(self, origin: Origin) -> Connection | None:
        """Returns a connection of that origin; or None, which hands over a slot."""
        entry = _QueueEntry(origin, trio.lowlevel.current_task())
        self._queue[entry] = None

        def abort(_: Callable[[], BaseException]) -> trio.lowlevel.Abort:
            del self._queue[entry]
            return trio.lowlevel.Abort.SUCCEEDED

        connection: Connection | None = await trio.lowlevel.wait_task_rescheduled(abort)
        return connection

    def _put_back(self, connection: Connection) -> None:
        connection.reused = True
        if self._closed:
            self._discard(connection)
        elif self._queue:
            entry, _ = self._queue.popitem(last=False)
            if entry.origin != connection.origin:
                connection.close()
                trio.lowlevel.reschedule(entry.task)
            else:
                trio.lowlevel.reschedule(entry.task, outcome.Value(connection))
        else:
            connection.idle_since = trio.current_time()
            self._idle[connection] = None
            self._idle_by_origin.setdefault(connection.origin, {})[connection] = None
            if len(self._idle) > self._max_idle:
                self._remove(next(iter(self._idle)))

    def _discard(self, connection: Connection) -> None:
        connection.close()
        self._free_slot()

    def _free_slot(self) -> None:
        if self._queue:
            entry, _ = self._queue.popitem(last=False)
            trio.lowlevel.reschedule(entry.task)
        else:
            self._slots -= 1

    def _forget(self, connection: Connection) -> None:
        del self._idle[connection]
        of_origin = self._idle_by_origin[connection.origin]
        del of_origin[connection]
        if not of_origin:
            del self._idle_by_origin[connection.origin]

    def _remove(self, connection: Connection) -> None:
        self._forget(connection)
        self._discard(connection)


_pools: weakref.WeakSet[ConnectionPool] = weakref.WeakSet()


def _close_idle() -> int:
    """Closes the idle connections of all pools, since the process needs their descriptors; returns how many."""
    return sum(pool.close_idle() for pool in list(_pools))
