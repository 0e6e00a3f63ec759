"""Single-flight: calls that are the same share one upstream call, for as long as it is in flight.

A *flight* is an upstream call with everything that belongs to it: attempts, retries, failover, hedging, limits in
time. It has no client. Who waits for it are exchanges of clients (`CoalescedExchange`), each with its own admission,
deadline, back-pressure, outcome and line in the log. The first one begins the flight, and has no part in it that the
others have not.

The rules:

* A flight is a task of this service, so nobody's leaving ends it but the last one's; then it ends at once.
* What came is kept from its beginning, in bounds (``limits.buffered_bytes``): who joins gets all of it, then the rest.
  Once something of it is let go, nobody joins any more: the next same call begins another flight.
* The upstream is read as fast as the fastest of its clients reads. Who is behind by more than the bound is cut off
  (`TooSlow`), and slows nobody down. He has been sent something then: who waits takes the first piece as soon as it is
  there, before anything can be let go.
* An answer that has come is no more in flight: there is no cache.
* What the provider has counted is accounted once: by the first exchange that ends after the flight has, or by the last
  one that leaves it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import attrs
import trio

from trigate.errors import Draining, GatewayError, Header, TooSlow
from trigate.exchange.call_key import call_key_of
from trigate.exchange.exchange import STOPPED, Exchange
from trigate.openai.answer import Usage
from trigate.routing.plan import Plan

if TYPE_CHECKING:
    from trigate.concurrency.timers import Timer
    from trigate.gateway.gateway import Gateway
    from trigate.upstream.generation import Generation

# So much of what waits for a client leaves in one send.
_BATCH_BYTES = 64 * 1024

Key = tuple["Generation", str, bytes]
"""What those who share a flight have in common: the configuration, the gateway key, the call."""


class Flights:
    """The flights of this worker. Made by `open_flights`."""

    def __init__(self, gateway: Gateway, nursery: trio.Nursery) -> None:
        self._gateway = gateway
        self._nursery = nursery
        self._open: dict[Key, Flight] = {}

    def __repr__(self) -> str:
        return f"<Flights {len(self._open)} open>"

    def board(self, exchange: CoalescedExchange, identity: bytes) -> Flight:
        """Has an exchange wait for the flight of its call; where there is none that can be joined, one begins."""
        key = exchange.generation, exchange.owner, identity
        flight = self._open.get(key)
        if flight is None:
            flight = Flight(self, key, exchange)
            self._nursery.start_soon(flight.exchange.fly)
            self._open[key] = flight
            exchange.generation.hold()
        flight.waiters[exchange] = None
        return flight

    def close(self, flight: Flight) -> None:
        """Nobody joins it any more."""
        if self._open.get(flight.key) is flight:
            del self._open[flight.key]


@contextlib.asynccontextmanager
async def open_flights(gateway: Gateway) -> AsyncIterator[Flights]:
    """Opens the service; flights that are in the air when it closes end, and who waits for them is told."""
    async with trio.open_nursery() as nursery:
        try:
            yield Flights(gateway, nursery)
        finally:
            nursery.cancel_scope.cancel()


class Flight:
    """An upstream call that is shared. To its exchange it is the client (`exchange.Downstream`).

    Attributes:
        id: The request id of who began it. The upstream sees the same.
        waiters: Who waits for it, in the order in which they came.
        answer: A whole response (status, headers, body), where that is what it brought.
        head: Status and headers of a streamed one.
        error: Why it failed.
        ended: Nothing more will come of it.
    """

    socket = None
    chunked = False
    taken_bytes = None
    gone = False

    def __init__(self, flights: Flights, key: Key, leader: CoalescedExchange) -> None:
        self.key = key
        self.id = leader.id
        self.waiters: dict[CoalescedExchange, None] = {}
        self.scope = trio.CancelScope()
        self.answer: tuple[int, list[Header], bytes] | None = None
        self.head: tuple[int, list[Header]] | None = None
        self.error: GatewayError | None = None
        self.ended = False
        self.sending_since: float | None = None
        self.last_sent_at = trio.current_time()
        self.headers: list[Header] = []
        self.patience_s = math.inf
        self.exchange = _Flying(
            id=leader.id,
            call=leader.call,
            gateway=leader.gateway,
            generation=leader.generation,
            down=self,
            headers=leader.headers,
            owner=leader.owner,
        )
        self._flights = flights
        self._max_bytes = leader.generation.config.limits.buffered_bytes
        self._pieces: list[bytes] = []
        self._events: list[int] = []  # how many there are up to the end of each piece
        self._dropped = 0
        self._kept_bytes = 0
        self._total_bytes = 0
        self._accounted = False
        self._news = trio.Event()
        self._moved = trio.Event()

    def __repr__(self) -> str:
        return f"<Flight {self.id} {len(self.waiters)} waiting, {self._kept_bytes} of {self._total_bytes} bytes kept>"

    # -- for who waits ------------------------------------------------------------------------------------------------

    def take(self, waiter: CoalescedExchange) -> bytes:
        """Takes what comes next for a waiter, as much as leaves in one send; empty = nothing has come.

        Raises:
            TooSlow: It is not kept any more.
        """
        first = waiter.pieces_taken - self._dropped
        if first < 0 and waiter.down.gone:
            waiter.pieces_taken, first = self._dropped, 0  # nobody misses them
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
        waiter.note_taken(behind - first, size, events=self._events[behind - 1])
        self.note_moved()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def is_over_for(self, waiter: CoalescedExchange) -> bool:
        """It has taken everything, and nothing more will come."""
        return self.ended and waiter.pieces_taken == self._dropped + len(self._pieces)

    async def wait_news(self) -> None:
        """Waits until something more has come, or the flight has ended."""
        await self._news.wait()

    def note_moved(self) -> None:
        """Who waits has taken something, or has left."""
        if self.sending_since is not None:
            self._moved.set()

    def leave(self, waiter: CoalescedExchange) -> bool:
        """Ends the wait of one; where it is the last, and the flight in the air, that ends too.

        Returns:
            Whether it is the one that accounts for what the provider has counted.
        """
        del self.waiters[waiter]
        self.note_moved()
        if not self.waiters and not self.ended:
            self._flights.close(self)
            self.scope.cancel()
        if self._accounted or (self.waiters and not self.ended):
            return False
        self._accounted = True
        return True

    # -- for its exchange ---------------------------------------------------------------------------------------------

    @property
    def committed(self) -> bool:
        """As `Downstream.committed`."""
        return self.head is not None or self.answer is not None

    def owe(self, rest: bytes) -> None:
        """There is no socket."""

    async def respond(self, status: int, headers: list[Header], body: bytes) -> None:
        """As `Downstream.respond`."""
        self.answer = status, headers, body
        self.close()
        await trio.lowlevel.checkpoint()

    async def start(self, status: int, headers: list[Header]) -> None:
        """As `Downstream.start`."""
        self.head = status, headers
        await trio.lowlevel.checkpoint()

    async def send(self, data: bytes) -> None:  # noqa: ASYNC910 - as those of `Downstream`
        """As `Downstream.send`: waits while even the fastest client is far behind."""
        self._keep(data)
        while self._ahead_bytes() > self._max_bytes // 2:
            self.sending_since = trio.current_time()
            self._moved = trio.Event()
            try:
                await self._moved.wait()
            finally:
                self.sending_since = None
                self.exchange.note_parked(None)
        self.last_sent_at = trio.current_time()

    async def end(self, data: bytes = b"") -> None:
        """As `Downstream.end`."""
        if data:
            self._keep(data)
        self.close()
        await trio.lowlevel.checkpoint()

    def abandon(self) -> None:
        """As `Downstream.abandon`."""

    async def abort(self) -> None:
        """As `Downstream.abort`."""
        await trio.lowlevel.checkpoint()

    def close(self, error: GatewayError | None = None) -> None:
        """Nothing more comes of it, and why; only the first one counts."""
        if not self.ended:
            self.ended, self.error = True, error
            self._flights.close(self)
            self._tell()

    def _readers(self) -> list[CoalescedExchange]:
        """Those with a client. One that has none takes everything at once, and says nothing of the others."""
        return [waiter for waiter in self.waiters if not waiter.down.gone]

    def _ahead_bytes(self) -> int:
        """By how much the fastest client is behind."""
        return self._total_bytes - max([waiter.bytes_taken for waiter in self._readers()], default=self._total_bytes)

    def _keep(self, data: bytes) -> None:
        if self._kept_bytes + len(data) > self._max_bytes:
            self._let_go(len(data))
        self._pieces.append(data)
        self._events.append(self.exchange.events)
        self._kept_bytes += len(data)
        self._total_bytes += len(data)
        self._tell()

    def _let_go(self, of_bytes: int) -> None:
        """Lets go of the oldest pieces that the fastest client has taken, to have room for so many bytes."""
        taken = max([waiter.pieces_taken for waiter in self._readers()], default=self._dropped + len(self._pieces))
        count = 0
        while self._kept_bytes + of_bytes > self._max_bytes and self._dropped + count < taken:
            self._kept_bytes -= len(self._pieces[count])
            count += 1
        if count:
            del self._pieces[:count], self._events[:count]
            self._dropped += count
            self._flights.close(self)

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()


@attrs.define(eq=False, kw_only=True)
class CoalescedExchange(Exchange):
    """A client's exchange that may share its upstream call.

    Attributes:
        pieces_taken: How many pieces of its flight it has taken.
        bytes_taken: How many bytes those are.
        role: Whether it began its flight (``leader``) or came later (``joined``); None = it has none, and is as any
            other exchange.
    """

    pieces_taken: int = 0
    bytes_taken: int = 0
    role: str | None = None
    _flight: Flight | None = None
    _flight_id: str = ""
    _boarded_at: float = math.inf
    _events_taken: int = 0

    async def _serve(self, plan: Plan) -> None:
        model = self._model()
        identity = call_key_of(self.call, self.headers, sampled=model.coalesce_sampled)
        if identity is None:
            await super()._serve(plan)
            return
        with self.waiting("waiting"):
            flight = self._board(identity)
            try:
                await self._follow(flight)
            finally:
                self._leave()

    def _board(self, identity: bytes) -> Flight:
        flight = self._flight = self.gateway.flights.board(self, identity)
        self.role = "leader" if len(flight.waiters) == 1 else "joined"
        self.attempts = flight.exchange.attempts
        self._flight_id = flight.id
        self._boarded_at = trio.current_time()
        return flight

    def _leave(self) -> None:
        flight, self._flight = self._flight, None
        if flight is not None:
            self._note_upstream(flight)
            self.is_billed = flight.leave(self)
            self.usage = flight.exchange.counted if self.is_billed else None

    async def _follow(self, flight: Flight) -> None:
        """Sends what comes of a flight, until it is over.

        Raises:
            GatewayError: The flight failed, or this client is too slow for it.
        """
        down = self.down
        while True:
            if flight.answer is not None:
                status, headers, body = flight.answer
                self._note_content()
                self._ending = True
                self._stamp()
                self.bytes_sent = len(body)
                await down.respond(status, headers, body)
                return
            data = flight.take(self)
            over = flight.is_over_for(self)
            if not data and not over:
                await flight.wait_news()
                continue
            if over and flight.error is not None and not data:
                raise flight.error.with_traceback(None)
            self._note_content()
            if over and flight.error is None:
                self._ending = True
            if not down.committed:
                assert flight.head is not None, "a stream begins with its head"
                self._stamp()
                await down.start(*flight.head)
            self.bytes_sent += len(data)
            self._events_before = self._events_taken
            if self._ending:
                await down.end(data)
                return
            await down.send(data)

    def note_taken(self, pieces: int, size: int, *, events: int) -> None:
        """For the flight: it has taken so many pieces, of so many bytes, with which there are so many events."""
        self.pieces_taken += pieces
        self.bytes_taken += size
        self._events_taken = events

    def _note_content(self) -> None:
        if self.first_content_after_s is None:
            self.first_content_after_s = trio.current_time() - self.started_at

    # -- what is different for one who shares -------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """That of its flight."""
        if self._flight is None or self._ending:
            return super().phase
        return self._flight.exchange.phase

    def describe(self, now: float) -> dict[str, object]:
        """As `Exchange.describe`, and with its flight."""
        flight = self._flight
        if flight is None:
            return super().describe(now)
        self.target = flight.exchange.target
        told = {"id": flight.id, "role": self.role, "waiters": len(flight.waiters)}
        return {**super().describe(now), "flight": told}

    def _queue_position(self) -> int | None:
        if self._flight is None:
            return super()._queue_position()
        return self._flight.exchange._queue_position()

    @property
    def finishes(self) -> bool:
        """As `Exchange.finishes`, where nobody else waits for the flight: who leaves others to it may go."""
        return super().finishes and (self._flight is None or len(self._flight.waiters) == 1)

    @property
    def _is_asked(self) -> bool:
        return super()._is_asked if self._flight is None else self._flight.exchange._is_asked

    def abandon_upstream(self) -> bool:
        """The client has left: so does the exchange its flight, now, so that the next one knows whether it is the last.

        Returns:
            False: it is to be cancelled at once.
        """
        self._leave()
        return super().abandon_upstream()

    def finish_alone(self) -> None:
        """As `Exchange.finish_alone`; its flight need not wait for it any more."""
        super().finish_alone()
        if self._flight is not None:
            self._flight.note_moved()

    def _stamp(self) -> None:
        if self._flight is not None:
            self._note_upstream(self._flight)
        if self.role is not None and not self._stamped and not self.down.committed:
            self.down.headers.append((b"x-trigate-coalesced", self.role.encode()))
        super()._stamp()

    def _note_upstream(self, flight: Flight) -> None:
        """Takes over what the head of the response, and the log, say of the upstream."""
        now = trio.current_time()
        self.target = flight.exchange.target or self.target
        self._upstream_s = min(flight.exchange.upstream_s(now), now - self._boarded_at)

    def _line(self) -> dict[str, object]:
        if self.role is None:
            return super()._line()
        return {**super()._line(), "coalesced": self.role, "flight": self._flight_id}


@attrs.define(eq=False, kw_only=True)
class _Flying(Exchange):
    """The exchange of a flight. It has a place at the upstream, but none of its own at the door, no line in the log and
    no part in the totals: those who wait for it have."""

    async def fly(self) -> None:  # noqa: ASYNC910 - as `_serve`
        """Makes the upstream call. Whatever becomes of it becomes of those who wait for it.

        **Cancels:** when nobody waits any more.
        """
        flight = self.down
        assert isinstance(flight, Flight)
        error: GatewayError = Draining(STOPPED)
        timer: Timer | None = None
        self._task = trio.lowlevel.current_task()
        try:
            with flight.scope:
                route = self.generation.route(self.call.model)
                timer = self._set_limits(route)
                await self._serve(Plan(self.call.model, route.targets, self.gateway.targets, self.generation.config))
        except GatewayError as raised:
            error = raised
        except Exception as raised:
            error = self._crash_of(raised)
        finally:
            if timer is not None:
                timer.stop()
            self.generation.let_go()
            flight.close(error)

    @property
    def counted(self) -> Usage | None:
        """What the provider has counted, as far as it is known."""
        reader = self._winner.reader if self._winner is not None else None
        return (reader.usage if reader is not None else None) or self.usage

    # Silence, and a client that does not read, are the affair of each who waits.

    def _keep_alive_s(self) -> float:
        return math.inf

    def _stall(self, now: float) -> tuple[float, float]:
        return math.inf, math.inf

    def _stamp(self) -> None:
        """Those who wait say it, each for itself."""
