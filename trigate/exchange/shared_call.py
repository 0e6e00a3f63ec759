"""Single-flight: equal calls share one upstream call for as long as it is in flight.

A `SharedCall` owns one upstream call (attempts, retries, failover, hedging, time limits), and is the sink of its
answer, which it buffers. It has no client. Its subscribers are the exchanges of clients, each with its own admission,
deadline, back-pressure, outcome and log line. Such an exchange has a `Subscription` in place of an upstream call. The
first subscriber has no privilege over the others.

The rules:

* A shared call runs as a task of this service. It is cancelled when its last subscriber leaves, or when the service
  closes.
* The answer is kept from its beginning, within ``limits.buffered_bytes``: a subscriber that joins gets all of it. Once
  a part has been dropped, no subscriber can join: the next equal call begins another shared call.
* The upstream is read as fast as the fastest client reads. A client that falls behind by more than the bound is
  disconnected from the shared call (`TooSlow`) and does not slow down the others. Its status line is out by then: a
  subscriber takes the first piece as soon as it arrives, before any piece can be dropped.
* A complete answer is not kept for later calls: there is no cache.
* The token counts that the upstream reports are recorded once: with the first exchange that ends after the shared call
  has, or with the last one that leaves it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Literal

import attrs
import trio

from trigate.concurrency.notify import RepeatedEvent, open_service
from trigate.errors import Draining, GatewayError, Header, Internal, TooSlow
from trigate.exchange.attempt import Attempt
from trigate.exchange.attempt_spans import record_attempts
from trigate.exchange.outcome import Phase
from trigate.exchange.request import ExchangeRequest
from trigate.exchange.sink import Sink
from trigate.exchange.upstream_call import UpstreamCall, UpstreamServices
from trigate.exchange.watchdog import Watchdog, call_timed_out
from trigate.logs import log
from trigate.openai.answer import Usage
from trigate.routing.routes import Target
from trigate.tracebacks import drop_frames
from trigate.upstream.generation import Generation

STOPPED = "The server stopped; the answer is incomplete. Try again."
"""The message to a client whose server stops without a drain."""

# How many bytes a subscriber takes at once, roughly: the last piece may exceed it.
_BATCH_BYTES = 64 * 1024

Key = tuple[Generation, str, bytes]
"""Identifies a shared call that can be joined: the configuration, the owner, and the digest of the call."""


class SharedCalls:
    """The shared calls in flight in this worker. Made by `open_shared_calls`."""

    def __init__(self, services: UpstreamServices, nursery: trio.Nursery) -> None:
        self._services = services
        self._nursery = nursery
        self._open: dict[Key, SharedCall] = {}

    def __repr__(self) -> str:
        return f"<SharedCalls {len(self._open)} open>"

    def join(self, request: ExchangeRequest, digest: bytes) -> Subscription:
        """Subscribes to the shared call of a request; starts one if there is none to join.

        Args:
            digest: The same for equal calls (`call_key`).
        """
        key = request.generation, request.owner, digest
        shared = self._open.get(key)
        role: Literal["leader", "joined"] = "joined"
        if shared is None:
            role = "leader"
            shared = self._open[key] = SharedCall(self, key, request, self._services)
            self._nursery.start_soon(shared.run)
            request.generation.hold()
        return shared.subscribe(role)

    def close(self, shared: SharedCall) -> None:
        """Ends the time in which subscribers can join a shared call."""
        if self._open.get(shared.key) is shared:
            del self._open[shared.key]


@contextlib.asynccontextmanager
async def open_shared_calls(services: UpstreamServices) -> AsyncIterator[SharedCalls]:
    """Opens the service. When it closes, shared calls in flight are cancelled, and their subscribers get `Draining`."""
    async with open_service() as nursery:
        yield SharedCalls(services, nursery)


class SharedCall:
    """An upstream call with several subscribers, and the buffer between them. It is the `Sink` of its upstream call.

    Attributes:
        id: The request id of the first subscriber. The upstream gets the same.
        subscribers: In the order in which they joined.
        head: The status and headers of the answer.
        error: Why it failed.
        is_over: The answer is complete, or the call has failed.
    """

    plain_socket = None

    def __init__(self, calls: SharedCalls, key: Key, request: ExchangeRequest, services: UpstreamServices) -> None:
        config = request.generation.config
        self.key = key
        self.id = request.id
        self.subscribers: dict[Subscription, None] = {}
        self.head: tuple[int, list[Header]] | None = None
        self.error: GatewayError | None = None
        self.is_over = False
        self._calls = calls
        self._services = services
        self._request = request
        self._max_bytes = config.limits.buffered_bytes
        now = trio.current_time()
        route = request.route()
        self.upstream = UpstreamCall(
            request=request,
            services=services,
            route=route,
            started_at=now,
            deadline_at=now + route.total_timeout_s,
        )
        self._scope = trio.CancelScope()
        self._pieces: list[bytes] = []
        self._events: list[int] = []  # how many events there are up to the end of each piece
        self._dropped = 0
        self._kept_bytes = 0
        self._total_bytes = 0
        self._is_billed = False
        self._changed = RepeatedEvent()
        self._taken = RepeatedEvent()

    def __repr__(self) -> str:
        count = len(self.subscribers)
        return f"<SharedCall {self.id}, {count} subscribers, {self._kept_bytes} of {self._total_bytes} bytes kept>"

    async def run(self) -> None:
        """Makes the upstream call. Its error becomes the error of each subscriber.

        **Cancels:** when the last subscriber leaves.
        """
        error: GatewayError = Draining(STOPPED)
        call, route = self.upstream, self.upstream.route
        watchdog = Watchdog(
            self._services.timers,
            self._check_limits,
            first_at=min(call.started_at + route.shortest_limit_s, call.deadline_at),
            shortest_s=route.shortest_limit_s,
        )
        try:
            with self._scope:
                await call.fetch(self)
        except GatewayError as raised:
            drop_frames(raised)
            error = raised
        except Exception as defect:
            log.exception("exchange_crashed", request_id=self.id, model=self._request.call.model)
            error = Internal(f"The gateway failed ({type(defect).__name__}). Request id: {self.id}.")
        finally:
            watchdog.stop()
            self._request.generation.let_go()
            record_attempts(call)
            self._close(error)

    def _check_limits(self, now: float) -> list[float]:
        call = self.upstream
        if call.deadline_at <= now:
            call.cancel(call_timed_out(call.route.total_timeout_s))
        return [call.deadline_at, *call.check_limits(now)]

    # -- for subscribers ----------------------------------------------------------------------------------------------

    def subscribe(self, role: Literal["leader", "joined"]) -> Subscription:
        """Adds a subscriber."""
        subscription = Subscription(self, role)
        self.subscribers[subscription] = None
        return subscription

    def take(self, subscriber: Subscription) -> bytes:
        """Returns the next part of the answer, to be sent at once; empty = nothing has arrived.

        Raises:
            TooSlow: The next part has been dropped.
        """
        first = subscriber.pieces_taken - self._dropped
        if first < 0 and subscriber.is_clientless:
            subscriber.pieces_taken, first = self._dropped, 0  # they would not be sent anyway
        if first < 0:
            raise TooSlow(
                f"The client was more than {self._max_bytes} bytes behind others with the same call, with whom it "
                "shared one upstream stream; the answer up to here is incomplete. Read faster, or say x-coalesce: "
                "false."
            )
        behind, size = first, 0
        while behind < len(self._pieces) and size < _BATCH_BYTES:
            size += len(self._pieces[behind])
            behind += 1
        if behind == first:
            return b""
        pieces = self._pieces[first:behind]
        subscriber.note_taken(behind - first, size, events=self._events[behind - 1])
        self._taken.set()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def is_over_for(self, subscriber: Subscription) -> bool:
        """Whether a subscriber has taken everything, and the call is over."""
        return self.is_over and subscriber.pieces_taken == self._dropped + len(self._pieces)

    async def wait_changed(self) -> None:
        """Waits until more of the answer has arrived, or the call is over."""
        await self._changed.wait()

    def note_reader_gone(self) -> None:
        """The client of a subscriber has disconnected: the upstream need not wait for it."""
        self._taken.set()

    def leave(self, subscriber: Subscription) -> bool:
        """Removes a subscriber; when it is the last one of a call in flight, the call is cancelled.

        Returns:
            Whether the token counts are to be recorded with this subscriber.
        """
        del self.subscribers[subscriber]
        self._taken.set()
        if not self.subscribers and not self.is_over:
            self._calls.close(self)
            self._scope.cancel()
        if self._is_billed or (self.subscribers and not self.is_over):
            return False
        self._is_billed = True
        return True

    # -- the sink of the upstream call --------------------------------------------------------------------------------

    async def start(self, status: int, headers: list[Header]) -> None:
        """Keeps the head of the answer for each subscriber."""
        if self.head is None:
            self.head = status, headers

    async def send(self, data: bytes) -> None:
        """Keeps a piece of the answer. Waits while the fastest client is far behind."""
        self._keep(data)
        while self._ahead_bytes() > self._max_bytes // 2:
            await self._taken.wait()

    async def end(self, data: bytes = b"") -> None:
        """Keeps the last piece of the answer."""
        if data:
            self._keep(data)
        self._close(None)

    def _close(self, error: GatewayError | None) -> None:
        """Ends the call for its subscribers; only the first end counts."""
        if not self.is_over:
            self.is_over, self.error = True, error
            self._calls.close(self)
            self._changed.set()

    def _readers(self) -> list[Subscription]:
        """The subscribers that still have a client. The others take everything at once, and must not set the pace."""
        return [subscriber for subscriber in self.subscribers if not subscriber.is_clientless]

    def _ahead_bytes(self) -> int:
        """How far the fastest client is behind the upstream."""
        taken = max([subscriber.bytes_sent for subscriber in self._readers()], default=self._total_bytes)
        return self._total_bytes - taken

    def _keep(self, data: bytes) -> None:
        if self._kept_bytes + len(data) > self._max_bytes:
            self._drop(len(data))
        self._pieces.append(data)
        self._events.append(self.upstream.events)
        self._kept_bytes += len(data)
        self._total_bytes += len(data)
        self._changed.set()

    def _drop(self, needed_bytes: int) -> None:
        """Drops the oldest pieces that the fastest client has taken, to make room."""
        everything = self._dropped + len(self._pieces)
        taken = max([subscriber.pieces_taken for subscriber in self._readers()], default=everything)
        count = 0
        while self._kept_bytes + needed_bytes > self._max_bytes and self._dropped + count < taken:
            self._kept_bytes -= len(self._pieces[count])
            count += 1
        if count:
            del self._pieces[:count], self._events[:count]
            self._dropped += count
            self._calls.close(self)


@attrs.define(eq=False)
class Subscription:
    """An exchange's part in a shared call, in place of an upstream call of its own.

    Attributes:
        role: Whether it started the shared call (``leader``), or joined it (``joined``).
        joined_at: Trio time.
        pieces_taken, bytes_sent, events: How much of the answer it has taken.
        first_content_at: When it took the first piece (Trio time).
        is_clientless: Its client has disconnected; it takes the rest of the answer and discards it.
        is_billed: The token counts of the shared call are recorded with this exchange.
    """

    shared: SharedCall
    role: Literal["leader", "joined"]
    joined_at: float = attrs.field(factory=trio.current_time)
    pieces_taken: int = 0
    bytes_sent: int = 0
    events: int = 0
    first_content_at: float | None = None
    is_clientless: bool = False
    is_billed: bool = False
    is_delivered: bool = False
    _cancelled_with: GatewayError | None = None
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _has_left: bool = False

    async def fetch(self, sink: Sink) -> None:
        """Sends the shared call's answer to the sink until it is over.

        Raises:
            GatewayError: The shared call failed, this client is too slow for it, or `cancel` was called.
        """
        try:
            with self._scope:
                await self._relay(sink)
        finally:
            self._leave()
        if self._scope.cancelled_caught and self._cancelled_with is not None:
            raise self._cancelled_with

    async def _relay(self, sink: Sink) -> None:
        shared = self.shared
        while True:
            if self._cancelled_with is not None:  # by now it may be too slow as well, which is not why it ends
                raise self._cancelled_with
            data = shared.take(self)
            is_over = shared.is_over_for(self)
            if not data and not is_over:
                await shared.wait_changed()
                continue
            if is_over and shared.error is not None and not data:
                raise shared.error.copy()
            if self.first_content_at is None:
                self.first_content_at = trio.current_time()
                assert shared.head is not None, "an answer begins with its head"
                await sink.start(*shared.head)
            if is_over and shared.error is None:
                await sink.end(data)
                self.is_delivered = True
                return
            await sink.send(data)

    def note_taken(self, pieces: int, size_bytes: int, *, events: int) -> None:
        """For the shared call: counts pieces that were taken; ``events`` is the total up to their end."""
        self.pieces_taken += pieces
        self.bytes_sent += size_bytes
        self.events = events

    def _leave(self) -> None:
        if not self._has_left:
            self._has_left = True
            self.is_billed = self.shared.leave(self)

    # -- cancellation -------------------------------------------------------------------------------------------------

    def cancel(self, error: GatewayError) -> None:
        """Ends the subscription now; `fetch` raises ``error``. The shared call continues for the others."""
        if self._cancelled_with is None:
            self._cancelled_with = error
            self._scope.cancel()

    def finish(self, deadline_at: float) -> None:
        """The client has disconnected, and the shared call is received to its end all the same."""
        self.is_clientless = True
        self.shared.note_reader_gone()

    def abandon(self) -> bool:
        """The client has disconnected: leaves the shared call now. Of several clients that disconnect at once, the last
        one then finds out that it is the last.

        Returns:
            False: the exchange is to be cancelled at once.
        """
        self._leave()
        return False

    def note_committed(self) -> None:
        """Does nothing: the deadlines of the client end its exchange, and not the shared call."""

    async def close_reply(self) -> None:
        """Does nothing: this exchange has no reply of its own."""

    def inject(self, data: bytes) -> bool:
        """Does nothing: a shared call is not relayed on the fast path."""
        return False

    def check_limits(self, now: float) -> list[float]:
        """Checks nothing: the shared call checks its own limits."""
        return []

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def may_finish(self) -> bool:
        """Whether `finish` is possible: only the last subscriber keeps the shared call running without a client."""
        return len(self.shared.subscribers) == 1

    @property
    def is_requested(self) -> bool:
        """Whether a request has been sent to an upstream."""
        return self.shared.upstream.is_requested

    @property
    def phase(self) -> Phase:
        """The phase of the shared call."""
        return self.shared.upstream.phase or Phase.WAITING

    @property
    def attempts(self) -> Sequence[Attempt]:
        """The attempts of the shared call."""
        return self.shared.upstream.attempts

    @property
    def services(self) -> UpstreamServices:
        """Those that the shared call uses."""
        return self.shared.upstream.services

    @property
    def target(self) -> Target | None:
        """The target of the shared call."""
        return self.shared.upstream.target

    @property
    def reader(self) -> None:
        """None: what this client has got of the stream is not what the reader has returned."""

    @property
    def dropped(self) -> tuple[str, ...]:
        """The names of the fields that the upstream did not get."""
        return self.shared.upstream.dropped

    @property
    def usage(self) -> Usage | None:
        """The token counts that are recorded with this exchange."""
        return self.shared.upstream.usage if self.is_billed else None

    def waited_s(self, now: float) -> float:
        """How long the shared call has waited for upstreams since this exchange joined."""
        return min(self.shared.upstream.waited_s(now), now - self.joined_at)

    def queue_position(self) -> int | None:
        """The position of the shared call in the queue of its upstream."""
        return self.shared.upstream.queue_position()
