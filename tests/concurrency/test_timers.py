"""Timers: one task, and the moments at which it asks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.logs import Logs
from trigate.concurrency.timers import Check, Timer, open_timers


def noting(checks: list[tuple[str, float]], name: str, *again_after_s: float) -> Check:
    """A check that notes its name and the time, and asks to be made again after so many seconds, each time."""
    delays = iter(again_after_s)

    def check(now: float) -> float:
        checks.append((name, now))
        return now + next(delays, math.inf)

    return check


async def test_checks_are_made_in_the_order_of_their_times(autojump_clock: MockClock) -> None:
    """Whatever the order of their start; those due at the same time in that order. None comes early."""
    checks: list[tuple[str, float]] = []
    start = trio.current_time()
    async with open_timers() as timers:
        for name, after_s in (("c", 3), ("a", 1), ("b", 2), ("also b", 2), ("past", -5)):
            timers.start(start + after_s, noting(checks, name))
        await trio.sleep(10)
        assert [name for name, _ in checks] == ["past", "a", "b", "also b", "c"]
        assert [at - start for _, at in checks] == pytest.approx([0, 1, 2, 2, 3])
        assert len(timers) == 0


async def test_a_check_says_when_it_is_made_again(autojump_clock: MockClock) -> None:
    """At the time that it returns; ``math.inf`` is the end, and a time in the past is as soon as others had a turn."""
    checks: list[tuple[str, float]] = []
    start = trio.current_time()
    async with open_timers() as timers:
        timer = timers.start(start + 1, noting(checks, "x", 2, -100, 3))
        await trio.sleep(5)
        assert not timer.is_stopped
        await trio.sleep(5)
        assert [at - start for _, at in checks] == pytest.approx([1, 3, 3, 6], abs=1e-4)
        assert timer.is_stopped
        assert len(timers) == 0


async def test_a_check_that_is_always_due_holds_nothing_up() -> None:
    """Other tasks have their turn, and the other checks are made."""
    others: list[tuple[str, float]] = []
    made = 0

    def restless(now: float) -> float:
        nonlocal made
        made += 1
        return now

    async with open_timers() as timers:
        timers.start(0, restless)
        timers.start(trio.current_time() + 0.001, noting(others, "other"))
        with trio.fail_after(5):
            while not others or made < 3:  # noqa: ASYNC110 - it is made by a check that knows nothing of this task
                await trio.lowlevel.checkpoint()


async def test_an_earlier_timer_wakes_the_sleeper(autojump_clock: MockClock) -> None:
    """Also one that is started by another task long after the sleep has begun, and from within a check."""
    checks: list[tuple[str, float]] = []
    start = trio.current_time()
    async with open_timers() as timers:

        def starts_another(now: float) -> float:
            timers.start(now + 1, noting(checks, "from a check"))
            return math.inf

        timers.start(start + 100, noting(checks, "late"))
        await trio.sleep(10)
        timers.start(start + 20, noting(checks, "earlier"))
        timers.start(start + 30, starts_another)
        await trio.sleep(200)
    assert [(name, at - start) for name, at in checks] == [
        ("earlier", pytest.approx(20)),
        ("from a check", pytest.approx(31)),
        ("late", pytest.approx(100)),
    ]


async def test_a_stopped_timer_makes_no_check(autojump_clock: MockClock) -> None:
    """Stopped before its time, in its own check, by another one due at the same time, or twice: it is over."""
    checks: list[tuple[str, float]] = []
    at = trio.current_time() + 1
    own: list[Timer] = []

    def stops(timers_to_stop: list[Timer]) -> Check:
        def check(now: float) -> float:
            for timer in timers_to_stop:
                timer.stop()
                timer.stop()
            checks.append(("stops", now))
            return now + 1

        return check

    async with open_timers() as timers:
        before = timers.start(at, noting(checks, "stopped before"))
        before.stop()
        before.stop()
        assert before.is_stopped
        assert len(timers) == 0
        own.append(timers.start(at, stops(own)))
        behind: list[Timer] = []
        timers.start(at, stops(behind))
        behind.append(timers.start(at, noting(checks, "stopped by the one before it")))
        assert len(timers) == 3
        await trio.sleep(1.5)
        assert [name for name, _ in checks] == ["stops", "stops"]
        assert own[0].is_stopped
        assert len(timers) == 1
        await trio.sleep(10)
        assert len(checks) == 12
        assert len(timers) == 1


async def test_a_crash_ends_that_timer_only(autojump_clock: MockClock, logs: Logs) -> None:
    """It is logged, and every other check is made as before."""
    checks: list[tuple[str, float]] = []
    logs.expect_error("timer_crashed")

    def crash(now: float) -> float:
        raise ValueError("in a check")

    async with open_timers() as timers:
        crashed = timers.start(trio.current_time() + 1, crash)
        timers.start(trio.current_time() + 1, noting(checks, "x", 1))
        await trio.sleep(5)
        assert len(checks) == 2
        assert crashed.is_stopped
        crashed.stop()
        assert len(timers) == 0
    assert len(logs.named("timer_crashed")) == 1


@pytest.mark.parametrize("running", [0, 100])
@pytest.mark.slow
async def test_stopped_timers_do_not_pile_up(running: int) -> None:
    """100 000 timers, far ahead, that are stopped at once: the heap stays as small as what runs, and a little more."""
    async with open_timers() as timers:
        far = trio.current_time() + 3600
        kept = [timers.start(far, lambda now: math.inf) for _ in range(running)]
        largest = 0
        for _ in range(100_000):
            timers.start(far, lambda now: math.inf).stop()
            largest = max(largest, len(timers._due))
        assert len(timers) == running
        assert running <= largest <= 2 * (running + 1) + 64
        assert all(not timer.is_stopped for timer in kept)


async def test_compaction_loses_no_timer(autojump_clock: MockClock) -> None:
    """What still runs is made in its order, however many were stopped around it, also from within a check."""
    checks: list[tuple[str, float]] = []
    start = trio.current_time()
    async with open_timers() as timers:
        doomed = [timers.start(start + 5, noting(checks, "stopped")) for _ in range(500)]

        def stop_all(now: float) -> float:
            for timer in doomed:
                timer.stop()
            return math.inf

        timers.start(start + 1, stop_all)
        for after_s in (7, 2, 6, 5):
            timers.start(start + after_s, noting(checks, str(after_s), 10))
        await trio.sleep(100)
        assert [name for name, _ in checks] == ["2", "5", "6", "7", "2", "5", "6", "7"]
        assert (len(timers), timers._stopped, timers._due) == (0, 0, [])


async def test_without_timers_nobody_wakes(autojump_clock: MockClock) -> None:
    """The task sleeps until the next check is due: an hour of nothing takes no turn."""
    turns = 0

    class Count(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            nonlocal turns
            turns += task.name == "timers"

    count: Callable[..., trio.abc.Instrument] = Count
    async with open_timers() as timers:
        timers.start(trio.current_time() + 7200, lambda now: math.inf)
        await wait_all_tasks_blocked()
        instrument = count()
        trio.lowlevel.add_instrument(instrument)
        await trio.sleep(3600)
        trio.lowlevel.remove_instrument(instrument)
        assert turns == 0
