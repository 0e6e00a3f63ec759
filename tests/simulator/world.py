"""One simulated world: gateways that open, serve, reload and end, with clients and providers around them.

The gateway is real, with all its services, its HTTP server (`trigate.server.server._Server`), its HTTP client
(`trigate.upstream.transport`, llhttp) and its fast path (`trigate.exchange.socket_relay`). The network, the time and
the randomness are simulated. Everything runs in one thread, in virtual time, in an order that follows from the seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import trio
import trio._core._run as scheduler
from trio.testing import MockClock

from tests.simulator import allowances, draws, invariants, provider
from tests.simulator.books import Books, watched
from tests.simulator.clients import Call, run_client
from tests.simulator.pipes import End, SocketEnd, pair, socket_pair
from trigate.asgi.application import create_app
from trigate.concurrency import poller
from trigate.config import structure as configuration
from trigate.config.sections import Config
from trigate.exchange.state import ExchangeState
from trigate.gateway.gateway import Gateway, open_gateway
from trigate.logs import Level, Values, log
from trigate.server import lifespan, server, shutdown
from trigate.store import opening
from trigate.upstream.generation import Generation

CLIENTS = 24
CALLS_OF_A_LIFE = (50, 350)
_LAST_LINES = 60
_CLIENT_BYTES = 700
_SETTLES_S = 30.0
"""Nothing may run in a gateway this long after its server has ended."""


class Violation(AssertionError):
    """A violated invariant.

    Attributes:
        lines: The last lines of the trace.
    """

    def __init__(self, what: str, *, seed: int, requests: int, lines: list[str]) -> None:
        super().__init__(f"seed {seed}, {requests} requests: {what}")
        self.what = what
        self.seed = seed
        self.lines = lines


class Trace:
    """A hash of everything that happens, with the last lines."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.closed = False
        self.lines: deque[str] = deque(maxlen=_LAST_LINES)

    def note(self, what: str, *details: object) -> None:
        """Adds a line, unless the trace is closed."""
        if self.closed:
            return
        line = f"{trio.current_time():.6f} {what} {' '.join(map(str, details))}"
        self.lines.append(line)
        self._hash.update(line.encode(errors="surrogatepass") + b"\n")

    @property
    def digest(self) -> str:
        """The hash of all lines."""
        return self._hash.hexdigest()


@attrs.frozen(kw_only=True)
class Report:
    """The result of a simulation without a violation.

    Attributes:
        asked: How many requests the clients made.
        turned_away: How many further requests could not be made because no gateway listened.
        outcomes: Counts by outcome of the exchanges.
        statuses: Counts by status of the answers; 0 = no answer.
        whys: Counts by reason of the attempts.
        steps: After how many steps the invariants were checked.
        lives: How many gateways ran, one after the other.
        moved: How many requests went to a gateway after another one took over from it.
        reloads: How many reloads were requested.
        virtual_s: The virtual time that passed.
        digest: The hash of the trace.
    """

    asked: int
    turned_away: int
    outcomes: Counter[str]
    statuses: Counter[int]
    whys: Counter[str]
    steps: int
    lives: int
    moved: int
    reloads: int
    virtual_s: float
    digest: str

    def __str__(self) -> str:
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in self.outcomes.most_common())
        return (
            f"{self.asked} requests ({outcomes}), {self.lives} gateways ({self.moved} requests after a hot restart), "
            f"{self.reloads} reloads, {self.steps} steps, {self.virtual_s:.0f} virtual seconds, "
            f"trace {self.digest[:16]}"
        )


def simulate(seed: int, requests: int) -> Report:
    """Runs a world to its end.

    Raises:
        Violation: An invariant does not hold.
    """
    world = World(seed, requests)
    clock = MockClock(autojump_threshold=0)
    try:
        with (
            _deterministic(seed, lambda: world.epoch_s + clock.current_time()),
            _listening(world),
            watched(lambda: world.books),
        ):
            trio.run(world.run, clock=clock, instruments=[_Steps(world)])
    except Exception as error:
        if world.violation is None:
            raise world.as_violation(f"it crashed: {error!r}") from error
    if world.violation is not None:
        raise world.as_violation(world.violation)
    return world.report()


@contextlib.contextmanager
def _deterministic(seed: int, posix_s: Callable[[], float]) -> Iterator[None]:
    """Makes Trio's task order follow from the seed: runnable tasks run in a shuffled order, as under Hypothesis. The
    time of day is virtual as well."""
    before, state = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r.getstate()
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc] # as trio's own switch for it does
    scheduler._r.seed(f"{seed}/order")
    close_s, poller.CLOSE_S = poller.CLOSE_S, 0.0  # the poller reads the real clock only for this
    real, time.time = time.time, posix_s
    try:
        yield
    finally:
        time.time = real
        poller.CLOSE_S = close_s
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = before  # type: ignore[misc] # as above
        scheduler._r.setstate(state)


@contextlib.contextmanager
def _listening(world: World) -> Iterator[None]:
    """Sends the log to the world."""
    before, log.sink = log.sink, world.feed
    try:
        yield
    finally:
        log.sink = before


class _Steps(trio.abc.Instrument):
    """Checks the invariants after each step: when no task can run before an event arrives or time advances."""

    def __init__(self, world: World) -> None:
        self._world = world

    def before_io_wait(self, timeout: float) -> None:
        if not scheduler.GLOBAL_RUN_CONTEXT.runner.runq:
            self._world.check()


class _Ordered(dict[Any, None]):
    """A set in insertion order. The order of a plain set depends on addresses."""

    def add(self, each: Any) -> None:
        self[each] = None

    def discard(self, each: Any) -> None:
        self.pop(each, None)


class World:
    """See the module docstring."""

    def __init__(self, seed: int, requests: int) -> None:
        self.seed = seed
        self.requests = requests
        self.trace = Trace()
        self.violation: str | None = None
        self.dials = itertools.count()
        self.calls: dict[str, Call] = {}
        self.in_app: dict[str, Call] = {}
        self.open: dict[provider.Open, None] = {}
        self.lines: list[provider.Line] = []
        self.generations: list[Generation] = []
        self._queued: dict[str, Call] = {}
        self.accepted: list[Callable[[], bool]] = []
        self.settled: Counter[tuple[str, str]] = Counter()
        self.books = Books(self.violate)
        self.epoch_s = 0.0
        self.broken_off = False
        self.succeeded_at = self.moved_by = math.inf
        self.nursery: trio.Nursery
        self._gateway: Gateway | None = None
        self._accept: Callable[[trio.abc.Stream], None] | None = None
        self._scope = trio.CancelScope()
        self._asked = self._turned_away = self._steps = self._lives = self._reloads = self._moved = 0
        self._succeeds = False
        self._life_ends_at = self._stop_at = 0
        self._configurations = 0
        self._config: Config
        self._reloads_at: set[int] = set()
        self._end = shutdown.Shutdown()
        self._outcomes: Counter[str] = Counter()
        self._statuses: Counter[int] = Counter()
        self._whys: Counter[str] = Counter()
        self._ports = itertools.count(10_000)
        self._ended_s = 0.0

    # -- violations ---------------------------------------------------------------------------------------------------

    def violate(self, what: str) -> None:
        """Records a violation and ends the world. Only the first one counts."""
        if self.violation is None:
            self.violation = what
            self.trace.closed = True
            self._scope.cancel()

    def as_violation(self, what: str) -> Violation:
        """The exception that `simulate` raises."""
        return Violation(what, seed=self.seed, requests=self.requests, lines=list(self.trace.lines))

    def check(self) -> None:
        """Checks the invariants after a step."""
        gateway = self._gateway
        if gateway is None or self.violation is not None:
            return
        self._steps += 1
        if self.generations[-1:] != [gateway.generations.current]:
            self.generations.append(gateway.generations.current)
        if len(self.generations) > 1:
            self.generations = [
                each
                for each in self.generations
                if each is gateway.generations.current or not invariants.is_closed(each)
            ]
        self._note_queue(gateway)
        self.books.follow(gateway.exchange_services.quotas.all_counters())
        for what in invariants.of_step(self, gateway):
            self.violate(what)

    def _note_queue(self, gateway: Gateway) -> None:
        """Restarts the silence of calls at their admission."""
        queued = self._queued
        if not queued and not gateway.exchange_services.admission.slots.queued:
            return
        waiting = {exchange.id: self.calls[exchange.id] for exchange in gateway.live if exchange.is_queued}
        for call in waiting.values():
            call.silent_from = math.inf
        for name in queued.keys() - waiting.keys():
            queued[name].silent_from = trio.current_time()
        self._queued = waiting

    def feed(self, level: Level, event: str, values: Values) -> None:
        """Takes an entry of the log."""
        if level == "error":
            self.violate(f"logged at error: {event} {values}")
        elif level == "warning" and event != "slow_step":  # which real time decides
            self.trace.note("warning", event)

    def report(self) -> Report:
        """The result so far."""
        return Report(
            asked=self._asked,
            turned_away=self._turned_away,
            outcomes=self._outcomes,
            statuses=self._statuses,
            whys=self._whys,
            steps=self._steps,
            lives=self._lives,
            moved=self._moved,
            reloads=self._reloads,
            virtual_s=self._ended_s,
            digest=self.trace.digest,
        )

    # -- the calls ----------------------------------------------------------------------------------------------------

    @property
    def is_stopped(self) -> bool:
        """The gateway got the signal to stop, or was stopped abruptly."""
        return self.broken_off or self._end.stop.is_set()

    @property
    def stopping(self) -> bool:
        """Whether running calls may be ended early: the gateway stops, or its clients have had the time to move."""
        return self.is_stopped or (self._gateway is not None and self._gateway.live.is_draining)

    def next_request(self, *, kept: bool) -> draws.Request | None:
        """The next request of a client; None = no more requests for this gateway.

        Args:
            kept: The client holds a connection. It learns of a hot restart only from an answer on it.
        """
        if self._asked + self._turned_away >= self._life_ends_at:
            return None
        if self._accept is None and not (kept and self.succeeded_at < math.inf):
            return None
        number = self._asked + self._turned_away
        self._asked += 1
        if number in self._reloads_at and self._gateway is not None:
            self._configurations += 1
            self._reloads += 1
            self._config = self._configuration()
            self.trace.note("reload", self._configurations)
            self._gateway.reloader.request()
        if number + 1 >= self._stop_at and not self._end.begun.is_set():
            if self._succeeds:
                self._end.hand_over(1)
            else:
                self._end.stop_now()
        return draws.request(self.seed, number)

    def connect(self) -> End | SocketEnd | None:
        """Connects to the gateway; None = no gateway listens."""
        if self._accept is None:
            return None
        port = next(self._ports)
        if draws.is_plain(self.seed, "client", port):
            one, other = socket_pair(capacity=_CLIENT_BYTES)
            accepted = trio.SocketStream(trio.socket.from_stdlib_socket(one))
            self.accepted.append(lambda: accepted.socket.fileno() != -1)
            self._accept(accepted)
            return SocketEnd(other)
        near, far = pair(("10.1.0.1", port), ("10.0.0.1", 18888), capacity=_CLIENT_BYTES)
        self.accepted.append(lambda: not far.closed)
        self._accept(far)
        return near

    def note_turned_away(self, request: draws.Request) -> None:
        """Counts a request that found no listening gateway."""
        self._asked -= 1
        self._turned_away += 1
        self.trace.note("turned away", request.id)

    def begin(self, call: Call) -> None:
        """Begins a call of a client."""
        self.calls[call.request.id] = call
        if self.succeeded_at < math.inf:
            self._moved += 1
        self.trace.note("call", call.request.id, call.request.model, call.request.kind)
        if call.request.cancel_after_s < 60.0:
            self.nursery.start_soon(self._end_call, call)

    async def _end_call(self, call: Call) -> None:
        await trio.sleep(call.request.cancel_after_s)
        gateway = self._gateway
        if gateway is not None and not call.over:
            found = await gateway.inflight.cancel(owner=call.request.key, stream=call.request.id)
            self.trace.note("end", call.request.id, found.cancelled)

    def judge(self, call: Call) -> None:
        """Checks the invariants of a call that is over at both ends."""
        if not call.over or call.returned < call.entered or self.violation is not None:
            return
        answer = call.answer
        self.trace.note(
            "over",
            call.request.id,
            answer.status,
            call.outcome,
            "disconnected" if call.disconnected else "complete" if answer.complete else "broken",
            hashlib.sha256(answer.body).hexdigest()[:16],
        )
        if not call.judged:
            self._statuses[answer.status] += 1
        call.judged = True  # it may run again: a server reads a request whose client has already disconnected
        for what in invariants.of_call(self, call):
            self.violate(f"{call.request.id}, {call.request.kind} of {call.request.model}: {what}")

    def _app(self, app: Any) -> Any:  # Any: an ASGI app
        """Wraps the app to note when a call enters and leaves it."""

        async def watched(scope: Any, receive: Any, send: Any) -> None:  # Any: ASGI
            name = dict(scope["headers"])[b"x-request-id"].decode()
            call = self.calls[name]
            call.entered += 1
            self.in_app[name] = call
            try:
                await app(scope, receive, send)
            finally:
                del self.in_app[name]
                call.returned = True
                call.returned_at = trio.current_time()
                self.judge(call)

        return watched

    def _watch(self, gateway: Gateway) -> None:
        """Notes each exchange that begins or is settled."""
        admit, settle = gateway.live.begin, gateway.live.settle

        def admitted(exchange: ExchangeState) -> None:
            call = self.calls[exchange.id]
            admit(exchange)
            call.admitted += 1
            call.admitted_at = call.silent_from = trio.current_time()
            call.keep_alive_s = exchange.generation.config.limits.keep_alive_s
            call.total_s = exchange.generation.route(exchange.call.model).total_timeout_s

        def settled(exchange: ExchangeState) -> None:
            call = self.calls[exchange.id]
            was_live = exchange in gateway.live
            settle(exchange)
            assert exchange.record is not None, "it has begun"
            self.books.recorded(exchange.record)
            self.settled[exchange.id, str(exchange.outcome)] += 1
            if was_live or call.settled:
                call.settled += 1
            call.outcome, call.events, call.bytes = exchange.outcome, exchange.events, exchange.bytes_sent
            call.continued = any(attempt.step.why == "continue" for attempt in exchange.attempts)
            self._outcomes[str(exchange.outcome)] += 1
            self._whys.update(attempt.step.why for attempt in exchange.attempts)
            self.trace.note("settled", exchange.id, exchange.outcome, len(exchange.attempts), exchange.bytes_sent)

        gateway.live.begin, gateway.live.settle = admitted, settled  # type: ignore[method-assign]

    # -- the life of the gateways -------------------------------------------------------------------------------------

    def _configuration(self) -> Config:
        tables = draws.configuration(self.seed, self._configurations, self._lives)
        return configuration.structure(tables, env={}, source="simulator")

    async def run(self) -> None:
        """Runs one gateway after the other until all requests have been made."""
        with self._scope:
            while self._asked + self._turned_away < self.requests:
                await self._live()
        self._ended_s = trio.current_time()

    async def _live(self) -> None:
        rng = draws.rng_for(self.seed, "life", self._lives)
        self._lives += 1
        self._configurations += 1
        self._config = self._configuration()
        begun = self._asked + self._turned_away
        calls = min(rng.randint(*CALLS_OF_A_LIFE), self.requests - begun)
        self._life_ends_at = begun + calls
        self._succeeds = rng.random() < 0.4
        before = 60 if self._succeeds else 20
        self._stop_at = self._life_ends_at - (rng.randint(0, before) if rng.random() < 0.8 else 0)
        self._reloads_at = {begun + rng.randrange(calls) for _ in range(rng.randint(0, 3))}
        self._end = shutdown.Shutdown()
        self.broken_off = False
        self.succeeded_at = self.moved_by = math.inf
        self.settled = Counter()
        self.books = Books(self.violate)
        start = allowances.starts_at(draws.rng_for(self.seed, "start", self._lives))
        self.epoch_s = start - trio.current_time()
        self.lines, self.generations, self.accepted, self._queued = [], [], [], {}
        self.calls = {}
        app = create_app(
            opener=lambda: open_gateway(
                self._config,
                env={"TRIGATE_STORE": opening.MEMORY},
                transports=provider.lines(self),
                adjust=lambda _: self._config,
                chance=draws.rng_for(self.seed, "chance", self._lives).random,
            )
        )
        self.trace.note("opens", self._lives, calls)
        asgi: Any = app  # Any: hypercorn's ASGI types are not those of the server
        async with trio.open_nursery() as self.nursery:
            async with lifespan.open_lifespan(asgi) as state:
                gateway = app.gateway
                self._watch(gateway)
                self.generations = [gateway.generations.current]
                self._gateway = gateway
                await self._serve(self._app(asgi), state, rng)
                await trio.sleep(_SETTLES_S)
                self.check()
                for what in invariants.of_ledger(self, await gateway.ledger.list(limit=self.requests + 1)):
                    self.violate(what)
                for what in invariants.of_store(self, gateway):
                    self.violate(what)
                self._gateway = None
            for what in invariants.of_closed_store(gateway):
                self.violate(what)
            for what in invariants.of_end(self):
                self.violate(what)
            self.nursery.cancel_scope.cancel()
        self.trace.note("closed")

    async def _serve(self, app: Any, state: Any, rng: random.Random) -> None:  # Any: ASGI
        """Serves until the gateway has ended, by a drain or by a hot restart. A hot restart may turn into a stop, and
        each of them may be interrupted."""
        serving = server._Server(app, self._config.server, None, state)
        serving.connections.live = _Ordered()  # type: ignore[assignment] # as far as it is used
        breaks_off, stops_after_all = rng.random() < 0.25, rng.random() < 0.3
        async with trio.open_nursery() as clients, trio.open_nursery() as nursery:
            ended = trio.Event()

            async def run(*, task_status: trio.TaskStatus[Any]) -> None:  # noqa: ASYNC128 - `_Server.run` calls it
                await serving.run([], self._end, None, task_status)
                ended.set()

            await nursery.start(run)
            self._accept = lambda end: serving._start(end)  # type: ignore[arg-type] # a stream with addresses
            for _ in range(CLIENTS):
                clients.start_soon(run_client, self)
            await self._end.begun.wait()
            self._accept = None
            if self._succeeds:
                self.succeeded_at = trio.current_time()
                self.moved_by = self.succeeded_at + serving.config.drain_timeout_s
                self.trace.note("is succeeded")
                if stops_after_all:
                    await trio.sleep(rng.uniform(0.0, 2.0))
                    self._end.stop_now()
            self.trace.note("ends", "and breaks off" if breaks_off else "")
            if breaks_off:
                await trio.sleep(rng.uniform(0.0, 2.0))
                self.broken_off = True
            else:
                await ended.wait()
            nursery.cancel_scope.cancel()
