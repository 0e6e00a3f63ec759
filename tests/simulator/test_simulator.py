"""The simulator: a short run, reproducibility from a seed, and the detection of planted bugs."""

from __future__ import annotations

import gc
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from bench.events import DONE
from tests.simulator import Violation, draws, invariants, simulate
from tests.simulator.__main__ import main
from tests.simulator.pipes import pair
from tests.support.slow import FULL
from trigate.concurrency.fair_limiter import FairLimiter
from trigate.concurrency.timers import Timer
from trigate.errors import codes
from trigate.exchange.admission import _Slot
from trigate.exchange.attempt import Attempt
from trigate.exchange.client_response import ClientResponse
from trigate.exchange.client_sink import ClientSink
from trigate.exchange.deadlines import StallDetector
from trigate.exchange.exchange import Exchange
from trigate.exchange.socket_relay import RelayedStream
from trigate.gateway.drain import Drain
from trigate.ledger.ledger import Ledger
from trigate.openai.request import Call
from trigate.openai.stream import StreamReader
from trigate.quotas import counters as quota_counters
from trigate.quotas.counters import Amounts, Limits, Rate, Reservation
from trigate.quotas.service import Quotas
from trigate.routing.circuit_breaker import Breaker
from trigate.routing.plan import Plan
from trigate.server import shutdown
from trigate.server.client_stream import ClientStream
from trigate.server.connection import Service
from trigate.store.records import ExchangeRecord
from trigate.upstream.generation import Generation
from trigate.upstream.pool import ConnectionPool, Opening

SOMEWHERE = ("10.0.0.1", 1), ("10.0.0.2", 2)

# -- a short run ------------------------------------------------------------------------------------------------------


ALWAYS = {
    *("complete", "cancelled", "draining"),
    *("upstream_unavailable", "upstream_timeout", "upstream_truncated", "upstream_garbled"),
}
"""Outcomes that occur in each world of 400 requests, whatever its seed."""
OUTCOMES = ALWAYS | {
    *("finished", "client_stalled", "stream_cancelled", "overloaded", "rate_limited"),
    *("upstream_throttled", "upstream_rejected", "upstream_error"),
    *("rate_limit_exceeded", "tokens_exceeded", "concurrency_exceeded", "insufficient_quota"),
}


@pytest.mark.slow
def test_a_short_run() -> None:
    """No invariant is violated, and the common outcomes occur. (Rarer ones depend on the seed: see below.)"""
    reports = [simulate(seed, 400) for seed in (1, 2)]
    outcomes = {outcome for report in reports for outcome in report.outcomes}
    assert ALWAYS <= outcomes <= OUTCOMES | codes()
    assert {"first", "failover"} <= {why for report in reports for why in report.whys}
    assert sum(report.outcomes["complete"] for report in reports) > 100
    assert sum(report.lives for report in reports) > 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not FULL, reason="takes minutes: TRIGATE_TEST_FULL=1 runs it")
@pytest.mark.parametrize("seed", range(4, 14))
def test_thousands_of_requests(seed: int) -> None:
    """Every reason for an attempt and every outcome of a call occurs. At full size these are 100 000 requests."""
    requests = 10_000
    report = simulate(seed, requests)
    assert report.asked + report.turned_away == requests
    assert report.whys.keys() == {"first", "failover", "retry", "hedge", "continue"}
    assert OUTCOMES <= report.outcomes.keys() <= OUTCOMES | codes()
    assert report.lives > requests / 400
    assert report.reloads > requests / 400
    assert report.moved > requests / 100


# -- reproducibility --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_seed_gives_the_same_trace() -> None:
    """Two runs in one process have the same trace. Another seed has another trace."""
    report = simulate(5, 100)
    assert simulate(5, 100) == report
    assert simulate(6, 100).digest != report.digest


@pytest.mark.slow
def test_a_seed_gives_the_same_trace_in_another_process() -> None:
    """In another process strings have other hashes and objects other addresses."""
    code = "from tests.simulator import simulate; print(simulate(5, 100).digest)"
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {simulate(5, 100).digest}


def test_the_task_order_is_restored() -> None:
    """The settings that a simulation changes are restored after it."""
    scheduler: Any = trio._core._run
    state = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r.getstate()
    simulate(5, 20)
    assert state == (scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r.getstate())


# -- planted bugs are found -------------------------------------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]


@attrs.define
class Sometimes:
    """A flag that is true at every n-th check."""

    every: int
    _asked: Iterator[int] = attrs.field(factory=lambda: itertools.count(1))

    def __bool__(self) -> bool:
        return next(self._asked) % self.every == 0


def replace(owner: type, name: str, make: Callable[[Any], Any]) -> Patch:
    """Replaces a method by one that wraps it."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, make(getattr(owner, name)))


def skip_calls(owner: type, name: str, when: Callable[..., bool]) -> Patch:
    """Skips some calls of a synchronous method."""

    def make(method: Any) -> Any:  # Any: whichever method
        def replacement(*args: Any, **kwargs: Any) -> Any:  # Any: as above
            return None if when(*args, **kwargs) else method(*args, **kwargs)

        return replacement

    return replace(owner, name, make)


def keep_slot(leave: Any) -> Any:
    """An exchange that fails keeps its slot."""

    async def replacement(self: Any, kind: Any, *rest: Any) -> None:
        if kind is None:
            await leave(self, kind, *rest)

    return replacement


def settle_twice(settle: Any) -> Any:
    """An exchange whose client has disconnected is settled again."""

    def _settle(self: Exchange) -> None:
        settle(self)
        if self.outcome == "cancelled":
            settle(self)

    return _settle


def send_twice(feed: Any) -> Any:
    """A piece of a stream is sent twice at times."""
    sometimes = Sometimes(20)

    def replacement(self: StreamReader, piece: bytes) -> bytes:
        out: bytes = feed(self, piece)
        return out + out if out and not self.complete and sometimes else out

    return replacement


def send_after_done(end: Any) -> Any:
    """An event is sent after ``[DONE]``."""

    async def replacement(self: ClientResponse, data: bytes = b"") -> None:
        await end(self, data + b"data: {}\n\n" if data.endswith(b"data: [DONE]\n\n") else data)

    return replacement


def drop_events(feed: Any) -> Any:
    """Bytes from an upstream are dropped at times."""
    sometimes = Sometimes(100)

    def replacement(self: StreamReader, piece: bytes) -> bytes:
        out: bytes = feed(self, piece)
        return b"" if out and not self.complete and sometimes else out

    return replacement


def accept_truncated(feed_end: Any) -> Any:
    """A truncated stream counts as complete."""

    def replacement(self: StreamReader) -> bytes:
        self._tracker.complete = True
        return b""

    return replacement


def shift_continuation(continued_from: Any) -> Any:
    """The prefix for a continuation lacks its last character."""
    return lambda self, text: continued_from(self, text[:-1])


def keep_superseded(lose: Any) -> Any:
    """A superseded attempt is not ended."""

    def replacement(self: Attempt) -> None:
        self.is_superseded = self.failed_with is None

    return replacement


def reuse_early(release: Any) -> Any:
    """A connection is reused although bytes of its response are still to come."""

    def replacement(self: Opening) -> None:
        if self._response is not None and self._response.begun:
            self._response.complete = self._response.keep_alive = True
        release(self)

    return replacement


def forget_rest(let_go: Any) -> Any:
    """The relay forgets the rest of a frame that it has begun."""

    def replacement(self: RelayedStream) -> None:
        self._rest = b""
        let_go(self)

    return replacement


def end_probe_always(leave: Any) -> Any:
    """Every call that ends counts as the end of the probe."""
    return lambda self, entry: leave(self, "probe")


def skip_wait(wait_gone: Any) -> Any:
    """The shutdown does not wait until clients have moved to the next gateway."""

    async def replacement(self: Any, *rest: Any) -> None:
        await trio.lowlevel.checkpoint()

    return replacement


def keep_lease(follow: Any) -> Any:
    """A limit that is lowered leaves the lease as it was."""

    def replacement(self: quota_counters.Counter, limit: int, now: float) -> int:
        self.limit = limit
        return 0

    return replacement


def overfill(available: Any) -> Any:
    """A rate has more than it has."""
    return lambda self, now: available(self, now) + 20


def book_half(settle: Any) -> Any:
    """A call counts in its budgets as less than it has cost."""
    return lambda self, used, now: settle(self, used._replace(cost=used.cost // 2), now)


def keep_slots(settle: Any) -> Any:
    """A call that has ended sometimes counts as one in flight."""

    def replacement(self: Reservation, used: Amounts, now: float) -> None:
        settle(self, used, now)
        for slots in self.limits.slots if sometimes_leaked else ():
            slots.held += 1

    return replacement


def hold_no_slots(hold: Any) -> Any:
    """A call does not count as one in flight."""

    def replacement(self: Limits, amounts: Amounts) -> Reservation:
        reservation: Reservation = hold(self, amounts)
        for slots in self.slots:
            slots.held -= amounts.calls
        return reservation

    return replacement


def store_no_cost(encode: Any) -> Any:
    """A record is stored without its cost."""

    def replacement(self: ExchangeRecord) -> bytes:
        cost, self.cost = self.cost, 0
        encoded: bytes = encode(self)
        self.cost = cost
        return encoded

    return replacement


def ignore_limits(look: Any) -> Any:
    """No time limit is enforced."""
    return lambda self, now: [now + 1.0]


sometimes_leaked = Sometimes(20)
PLANTED: dict[str, tuple[Patch, str]] = {
    "a slot is kept": (replace(_Slot, "__aexit__", keep_slot), "<FairLimiter"),
    "an upstream slot is kept": (
        skip_calls(FairLimiter, "release", lambda self, key, held_s=None: held_s is None and bool(sometimes_leaked)),
        "slots taken",
    ),
    "an exchange is not settled": (
        skip_calls(Exchange, "_settle", lambda self: self.outcome == "cancelled"),
        "is live, but its call is not|settled 0 times",
    ),
    "an exchange is settled twice": (replace(Exchange, "_settle", settle_twice), "settled 2 times"),
    "a record is not kept": (
        skip_calls(Ledger, "settle", lambda self, exchange: exchange.outcome == "cancelled"),
        "the ledger has",
    ),
    "an event is sent twice": (replace(StreamReader, "feed", send_twice), "its answer is|it says"),
    "an event is lost": (replace(StreamReader, "feed", drop_events), "its answer is|it says|not HTTP|counts"),
    "something follows [DONE]": (
        replace(ClientResponse, "end", send_after_done),
        "something follows the last event",
    ),
    "a reply is not closed": (
        skip_calls(Opening, "release", lambda self: self._response is not None and not self._response.complete),
        "an orphan|calls use it",
    ),
    "a disconnect is not noticed": (
        skip_calls(ClientStream, "note_disconnect", lambda self: True),
        "its client disconnected",
    ),
    "a superseded attempt continues": (replace(Attempt, "supersede", keep_superseded), "an orphan"),
    "a truncated stream is complete": (replace(StreamReader, "feed_end", accept_truncated), r"\[DONE\]|was not"),
    "a continuation repeats a character": (replace(Call, "continued_from", shift_continuation), "it says"),
    "a connection is reused too early": (replace(Opening, "release", reuse_early), ""),
    "the rest of a frame is forgotten": (
        replace(RelayedStream, "_let_go", forget_rest),
        "not HTTP|no proper end|its answer|ends with neither|before the error",
    ),
    "keep-alives are not sent": (skip_calls(ClientSink, "_may_keep_alive", lambda self: True), "it was quiet for"),
    "limits are not enforced": (replace(Exchange, "_check_limits", ignore_limits), "after its deadline| waits for "),
    "a stalled client is kept": (
        replace(StallDetector, "due_at", lambda due_at: lambda self, now, **send: math.inf),
        "its client reads nothing",
    ),
    "a timer is not stopped": (skip_calls(Timer, "stop", lambda self: True), "timers run"),
    "a slot is lost": (skip_calls(ConnectionPool, "_free_slot", lambda self: True), "connections are open"),
    "a probe is not ended": (skip_calls(Breaker, "abandon", lambda self, entry: True), "waits for its probe"),
    "a probe is forgotten": (replace(Breaker, "_leave", end_probe_always), "probes are at"),
    "an attempt is not ended": (
        skip_calls(Plan, "end", lambda self, step, now, *, judged=True, **more: not judged),
        "have not ended",
    ),
    "a slot is not settled": (replace(Reservation, "settle", keep_slots), "but its calls hold"),
    "a slot is not held": (replace(Limits, "hold", hold_no_slots), "but its calls hold"),
    "a rate lets too much through": (replace(Rate, "available", overfill), "rpm is exceeded|tpm is exceeded"),
    "a lowered limit is not followed": (replace(quota_counters.Counter, "follow", keep_lease), "is exceeded"),
    "a budget counts too little": (replace(Reservation, "settle", book_half), "is exceeded"),
    "a cost is not stored": (
        replace(ExchangeRecord, "encode", store_no_cost),
        "the store has",
    ),
    "a lease is not given back": (skip_calls(Quotas, "close", lambda self: True), "are leased"),
    "a generation is kept": (
        skip_calls(Generation, "let_go", lambda self: bool(sometimes_leaked)),
        "hold a generation",
    ),
    "clients are not notified of a hot restart": (
        skip_calls(Service, "announce_close", lambda self: True),
        "its client was not notified",
    ),
    "a hot restart leaves no time": (replace(shutdown.ShutdownSequence, "_wait_moved", skip_wait), "left to move"),
    "a drain does not cancel": (replace(Drain, "cut", lambda cut: lambda self: []), "has no proper end"),
}
SLOW = {
    *("keep-alives are not sent", "the rest of a frame is forgotten", "a record is not kept"),
    *("an upstream slot is kept", "an event is lost", "a truncated stream is complete"),
    *(
        "a continuation repeats a character",
        "limits are not enforced",
        "a probe is not ended",
        "an attempt is not ended",
    ),
    *("a rate lets too much through", "a lowered limit is not followed", "a budget counts too little"),
    *("a lease is not given back", "a cost is not stored"),
    *("a generation is kept", "a drain does not cancel", "an event is sent twice"),
    *("clients are not notified of a hot restart", "a hot restart leaves no time"),
    *("a stalled client is kept", "a superseded attempt continues", "a probe is forgotten"),
}


@pytest.fixture
def untidy() -> Iterator[None]:
    """Collects the objects that an interrupted world left open here, where their warnings are ignored."""
    yield
    gc.collect()


def violation_of(seed: int) -> Violation | None:
    """The first violation in a world, if any."""
    try:
        simulate(seed, 400)
    except Violation as violation:
        return violation
    return None


@pytest.mark.filterwarnings("ignore")  # an interrupted world leaves objects open
@pytest.mark.usefixtures("untidy")
@pytest.mark.parametrize(
    "planted", [pytest.param(each, marks=pytest.mark.slow if each in SLOW else ()) for each in PLANTED]
)
def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    """It is found within a few worlds, by the matching invariant."""
    patch, pattern = PLANTED[planted]
    patch(monkeypatch)
    violation = next(filter(None, map(violation_of, range(20, 60))), None)
    assert violation is not None
    assert re.search(pattern, violation.what), violation.what


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("untidy")
def test_soak_prints_a_command_that_reproduces(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed command finds the same violation."""
    PLANTED["an exchange is not settled"][0](monkeypatch)
    assert main(["--seed", "20", "--requests", "400"]) == 1
    first = capsys.readouterr().out
    command = first.rstrip().splitlines()[-1]
    assert command.startswith("again: ./scripts/soak --seed ")
    assert main(command.split()[2:]) == 1
    assert capsys.readouterr().out == first


@pytest.mark.slow
def test_soak_without_a_violation(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints the totals of the run."""
    assert main(["--seed", "5", "--requests", "30"]) == 0
    assert simulate(5, 30).digest[:16] in capsys.readouterr().out


# -- connections and replies ------------------------------------------------------------------------------------------


async def test_a_connection_is_bounded(autojump_clock: MockClock) -> None:
    """A sender waits for the reader, nothing is lost, and a close follows the bytes sent before it."""
    near, far = pair(*SOMEWHERE, capacity=10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(far.send_all, bytes(range(25)))
        await wait_all_tasks_blocked()
        assert await near.receive_some() == bytes(range(10))
        await wait_all_tasks_blocked()
        assert await near.receive_some() == bytes(range(10, 20))
    far.close()
    assert near.peer_closed.is_set()
    assert not near.is_quiet
    assert [await near.receive_some(), await near.receive_some()] == [bytes(range(20, 25)), b""]
    with pytest.raises(trio.BrokenResourceError):
        await near.send_all(b"x")


async def test_a_reset_discards_unread_bytes(autojump_clock: MockClock) -> None:
    """It also wakes a waiting sender."""
    near, far = pair(*SOMEWHERE, capacity=10)
    await far.send_all(b"unread")
    far.reset()
    with pytest.raises(trio.BrokenResourceError):
        await near.receive_some()
    near, far = pair(*SOMEWHERE, capacity=10)
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await far.send_all(bytes(100))

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        near.reset()


def test_a_reply_continues_after_its_prefix() -> None:
    """The prefix and the reply make the whole text."""
    wholes = 0
    for number in range(40):
        asked = attrs.evolve(draws.request(1, number), kind="stream")
        for at in (0, len(asked.text) // 2, len(asked.text)):
            reply = draws.reply(1, "alpha", asked, 0, asked.text[:at], 0.0)
            if reply.whole and draws.NONSENSE not in reply.body:
                wholes += 1
                events, rest = invariants.events_of(reply.body)
                assert (events[-1], rest) == (DONE, b"")
                assert invariants.text_of(events[:-1]) == asked.text[at:]
    assert wholes > 40
