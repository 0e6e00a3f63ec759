"""`simulator`: a slice of it; that a seed is a world; and that it finds what it is to find."""

from __future__ import annotations

import gc
import itertools
import math
import os
import re
import subprocess
import sys
import time
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
from trigate.concurrency.fair_limiter import FairLimiter
from trigate.concurrency.timers import Timer
from trigate.errors import CODES
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
from trigate.routing.circuit_breaker import Breaker
from trigate.routing.plan import Plan
from trigate.server import shutdown
from trigate.server.client_stream import ClientStream
from trigate.server.http2 import Http2Service
from trigate.upstream.generation import Generation
from trigate.upstream.pool import ConnectionPool, Opening

SOMEWHERE = ("10.0.0.1", 1), ("10.0.0.2", 2)

# -- a slice ----------------------------------------------------------------------------------------------------------


ALWAYS = {
    *("complete", "cancelled", "draining"),
    *("upstream_unavailable", "upstream_timeout", "upstream_truncated", "upstream_garbled"),
}
"""Outcomes that occur in each world of 400 requests, whatever its seed."""
OUTCOMES = ALWAYS | {
    *("finished", "client_stalled", "stream_cancelled", "overloaded", "rate_limited"),
    *("upstream_throttled", "upstream_rejected", "upstream_error"),
}


@pytest.mark.slow
def test_a_slice_of_it() -> None:
    """Nothing that must hold is broken, and what is common occurs. (What is rarer depends on the seed: see below.)"""
    reports = [simulate(seed, 400) for seed in (1, 2)]
    outcomes = {outcome for report in reports for outcome in report.outcomes}
    assert ALWAYS <= outcomes <= OUTCOMES | CODES
    assert {"first", "failover"} <= {why for report in reports for why in report.whys}
    assert sum(report.outcomes["complete"] for report in reports) > 100
    assert sum(report.lives for report in reports) > 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_requests_in_a_minute() -> None:
    """Of the processor's time: it is one thread, and waits for nothing. All that is to be tried is tried: each way in
    which a gateway makes attempts, and all in which a call can end."""
    begun = time.process_time()
    report = simulate(4, 10_000)
    assert report.asked + report.turned_away == 10_000
    assert time.process_time() - begun < 60
    assert report.whys.keys() == {"first", "failover", "retry", "hedge", "continue"}
    assert OUTCOMES <= report.outcomes.keys() <= OUTCOMES | CODES
    assert report.lives > 25
    assert report.reloads > 25
    assert report.moved > 100


# -- a seed is a world ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_seed_gives_the_same_trace() -> None:
    """Twice in one process; another seed gives another one."""
    report = simulate(5, 100)
    assert simulate(5, 100) == report
    assert simulate(6, 100).digest != report.digest


@pytest.mark.slow
def test_a_seed_gives_the_same_trace_in_another_process() -> None:
    """Where strings hash otherwise, and things have other addresses."""
    code = "from tests.simulator import simulate; print(simulate(5, 400).digest)"
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
    assert digests == {simulate(5, 400).digest}


def test_the_order_of_tasks_is_put_back() -> None:
    """What is switched for a simulation is as before afterwards."""
    scheduler: Any = trio._core._run
    state = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r.getstate()
    simulate(5, 20)
    assert state == (scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r.getstate())


# -- it finds what it is to find --------------------------------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]


@attrs.define
class Sometimes:
    """Says yes at each so-manieth time that it is asked."""

    every: int
    _asked: Iterator[int] = attrs.field(factory=lambda: itertools.count(1))

    def __bool__(self) -> bool:
        return next(self._asked) % self.every == 0


def replace(owner: type, name: str, make: Callable[[Any], Any]) -> Patch:
    """Replaces a method by one that is made of it."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, make(getattr(owner, name)))


def left_out(owner: type, name: str, when: Callable[..., bool]) -> Patch:
    """Leaves calls of a synchronous method out."""

    def make(method: Any) -> Any:  # Any: whichever method
        def replacement(*args: Any, **kwargs: Any) -> Any:  # Any: as above
            return None if when(*args, **kwargs) else method(*args, **kwargs)

        return replacement

    return replace(owner, name, make)


def place_is_kept(leave: Any) -> Any:
    """An exchange that fails keeps its place."""

    async def replacement(self: Any, kind: Any, *rest: Any) -> None:
        if kind is None:
            await leave(self, kind, *rest)

    return replacement


def settled_twice(settle: Any) -> Any:
    """One whose client has left is settled again."""

    def _settle(self: Exchange) -> None:
        settle(self)
        if self.outcome == "cancelled":
            settle(self)

    return _settle


def sent_twice(feed: Any) -> Any:
    """Now and then a piece of a stream is sent twice."""
    sometimes = Sometimes(20)

    def replacement(self: StreamReader, piece: bytes) -> bytes:
        out: bytes = feed(self, piece)
        return out + out if out and not self.complete and sometimes else out

    return replacement


def more_after_the_end(end: Any) -> Any:
    """Something is sent behind ``[DONE]``."""

    async def replacement(self: ClientResponse, data: bytes = b"") -> None:
        await end(self, data + b"data: {}\n\n" if data.endswith(b"data: [DONE]\n\n") else data)

    return replacement


def dropped(feed: Any) -> Any:
    """Now and then what an upstream sent does not arrive."""
    sometimes = Sometimes(100)

    def replacement(self: StreamReader, piece: bytes) -> bytes:
        out: bytes = feed(self, piece)
        return b"" if out and not self.complete and sometimes else out

    return replacement


def cut_is_complete(feed_end: Any) -> Any:
    """A stream that ends is complete."""

    def replacement(self: StreamReader) -> bytes:
        self._tracker.complete = True
        return b""

    return replacement


def shifted_seam(continued_from: Any) -> Any:
    """Who goes on with an answer is told one character too few."""
    return lambda self, text: continued_from(self, text[:-1])


def loser_goes_on(lose: Any) -> Any:
    """An attempt that has lost is not ended."""

    def replacement(self: Attempt) -> None:
        self.is_superseded = self.failed_with is None

    return replacement


def given_back(release: Any) -> Any:
    """A connection is used again whatever is still to come on it."""

    def replacement(self: Opening) -> None:
        if self._response is not None and self._response.begun:
            self._response.complete = self._response.keep_alive = True
        release(self)

    return replacement


def forgotten_rest(let_go: Any) -> Any:
    """The engine forgets what is left of a frame that it has begun."""

    def replacement(self: RelayedStream) -> None:
        self._rest = b""
        let_go(self)

    return replacement


def anybodys_end(leave: Any) -> Any:
    """Whatever call ends, the probe is taken to have ended."""
    return lambda self, entry: leave(self, "probe")


def in_a_hurry(wait_gone: Any) -> Any:
    """Nobody waits until clients have moved to the next gateway."""

    async def replacement(self: Any, *rest: Any) -> None:
        await trio.lowlevel.checkpoint()

    return replacement


def no_limits(look: Any) -> Any:
    """No limit in time is kept."""
    return lambda self, now: [now + 1.0]


kept = Sometimes(20)
PLANTED: dict[str, tuple[Patch, str]] = {
    "a place is kept": (replace(_Slot, "__aexit__", place_is_kept), "<FairLimiter"),
    "a place at an upstream is kept": (
        left_out(FairLimiter, "release", lambda self, key, held_s=None: held_s is None and bool(kept)),
        "places taken",
    ),
    "an exchange is not settled": (
        left_out(Exchange, "_settle", lambda self: self.outcome == "cancelled"),
        "is live, and its call is not|settled 0 times",
    ),
    "an exchange is settled twice": (replace(Exchange, "_settle", settled_twice), "settled 2 times"),
    "a record is not kept": (
        left_out(Ledger, "settle", lambda self, exchange: exchange.outcome == "cancelled"),
        "the ledger has",
    ),
    "an event is sent twice": (replace(StreamReader, "feed", sent_twice), "its answer is|it says"),
    "an event is lost": (replace(StreamReader, "feed", dropped), "its answer is|it says|not HTTP|counts"),
    "something follows [DONE]": (
        replace(ClientResponse, "end", more_after_the_end),
        "something follows the last event",
    ),
    "a reply is not closed": (
        left_out(Opening, "release", lambda self: self._response is not None and not self._response.complete),
        "an orphan|calls use it",
    ),
    "it is not noticed that a client leaves": (
        left_out(ClientStream, "note_disconnect", lambda self: True),
        "its client has left",
    ),
    "who has lost goes on": (replace(Attempt, "supersede", loser_goes_on), "an orphan"),
    "a cut stream is complete": (replace(StreamReader, "feed_end", cut_is_complete), r"\[DONE\]|was not"),
    "a seam has a character twice": (replace(Call, "continued_from", shifted_seam), "it says"),
    "a connection is given back too early": (replace(Opening, "release", given_back), ""),
    "the rest of a frame is forgotten": (
        replace(RelayedStream, "_let_go", forgotten_rest),
        "not HTTP|no proper end|its answer|ends with neither|before the error",
    ),
    "silences are not broken": (left_out(ClientSink, "_may_keep_alive", lambda self: True), "it was quiet for"),
    "limits are not kept": (replace(Exchange, "_check_limits", no_limits), "after its time| waits for "),
    "who reads nothing is kept": (
        replace(StallDetector, "due_at", lambda due_at: lambda self, now, **send: math.inf),
        "its client reads nothing",
    ),
    "a timer goes on": (left_out(Timer, "stop", lambda self: True), "timers run"),
    "a slot is lost": (left_out(ConnectionPool, "_free_slot", lambda self: True), "connections are open"),
    "a probe is not ended": (left_out(Breaker, "abandon", lambda self, entry: True), "waits for its probe"),
    "a probe is forgotten": (replace(Breaker, "_leave", anybodys_end), "probes are at"),
    "an attempt is not ended": (
        left_out(Plan, "end", lambda self, step, now, *, judged=True, **more: not judged),
        "have not ended",
    ),
    "a generation is kept": (left_out(Generation, "let_go", lambda self: bool(kept)), "hold a generation"),
    "clients are not told of a takeover": (
        left_out(Http2Service, "announce_close", lambda self: True),
        "its client is not told",
    ),
    "a takeover leaves no time": (replace(shutdown.ShutdownSequence, "_wait_moved", in_a_hurry), "left to move"),
    "a drain does not cut": (replace(Drain, "cut", lambda cut: lambda self: []), "has no proper end"),
}
SLOW = {
    *("silences are not broken", "the rest of a frame is forgotten", "a record is not kept"),
    *("a place at an upstream is kept", "an event is lost", "a cut stream is complete"),
    *("a seam has a character twice", "limits are not kept", "a probe is not ended", "an attempt is not ended"),
    *("a generation is kept", "a drain does not cut"),
    *("clients are not told of a takeover", "a takeover leaves no time"),
    *("who reads nothing is kept", "who has lost goes on", "a probe is forgotten"),
}


@pytest.fixture
def untidy() -> Iterator[None]:
    """Has what a world that ended early left open collected here, where its warnings are ignored."""
    yield
    gc.collect()


def violation_of(seed: int) -> Violation | None:
    """What is found in a world."""
    try:
        simulate(seed, 400)
    except Violation as violation:
        return violation
    return None


@pytest.mark.filterwarnings("ignore")  # what is left open, is
@pytest.mark.usefixtures("untidy")
@pytest.mark.parametrize(
    "planted", [pytest.param(each, marks=pytest.mark.slow if each in SLOW else ()) for each in PLANTED]
)
def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    """Within some worlds, and by the invariant that is about it; the same seed finds it again."""
    patch, says = PLANTED[planted]
    patch(monkeypatch)
    violation = next(filter(None, map(violation_of, range(20, 60))), None)
    assert violation is not None
    assert re.search(says, violation.what), violation.what


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("untidy")
def test_soak_says_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command that it prints finds the same."""
    PLANTED["an exchange is not settled"][0](monkeypatch)
    assert main(["--seed", "20", "--requests", "400"]) == 1
    first = capsys.readouterr().out
    command = first.rstrip().splitlines()[-1]
    assert command.startswith("again: ./scripts/soak --seed ")
    assert main(command.split()[2:]) == 1
    assert capsys.readouterr().out == first


def test_soak_is_content(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a violation it says what has happened."""
    assert main(["--seed", "5", "--requests", "30"]) == 0
    assert simulate(5, 30).digest[:16] in capsys.readouterr().out


# -- the harness ------------------------------------------------------------------------------------------------------


async def test_a_way_is_bounded(autojump_clock: MockClock) -> None:
    """Who sends waits for who reads; nothing is lost, and a close is the end of what was sent before."""
    near, far = pair(*SOMEWHERE, capacity=10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(far.send_all, bytes(range(25)))
        await wait_all_tasks_blocked()
        assert await near.receive_some() == bytes(range(10))
        await wait_all_tasks_blocked()
        assert await near.receive_some() == bytes(range(10, 20))
    far.close()
    assert near.left.is_set()
    assert not near.is_quiet
    assert [await near.receive_some(), await near.receive_some()] == [bytes(range(20, 25)), b""]
    with pytest.raises(trio.BrokenResourceError):
        await near.send_all(b"x")


async def test_a_reset_takes_what_was_not_read(autojump_clock: MockClock) -> None:
    """And wakes who waits."""
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


def test_a_reply_goes_on_where_it_is_told_to() -> None:
    """What one provider has not said of a text, the next one says: together, the text."""
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
