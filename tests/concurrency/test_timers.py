"""`trigate.concurrency.timers`: one task calls every check at its time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.logs import Logs
from trigate.concurrency.timers import Check, Timer, open_timers


def record_check(checks: list[tuple[str, float]], name: str, *again_after_s: float) -> Check:
    """Makes a check that records its name and the time, and asks for its next calls after these delays, in seconds."""
    delays = iter(again_after_s)

    def check(now: float) -> float:
        checks.append((name, now))
        return now + next(delays, math.inf)

    return check


async def test_checks_are_called_in_the_order_of_their_times(autojump_clock: MockClock) -> None:
    """The order of their start decides only between checks that are due at the same time. None is called early."""
    checks: list[tuple[str, float]] = []
    start = trio.current_time()
    async with open_timers() as timers:
        for name, after_s in (("c", 3), ("a", 1), ("b", 2), ("also b", 2), ("past", -5)):
            timers.start(start + after_s, record_check(checks, name))
        await trio.sleep(10)
        assert [name for name, _ in checks] == ["past", "a", "b", "also b", "c"]
        assert [at - start for _, at in checks] == pytest.approx([0, 1, 2, 2, 3])
        assert len(timers) == 0


async def test_a_check_returns_the_time_of_its_next_call(autojump_clock: MockClock) -> None:
    """``math.inf`` ends the timer; a time in the past means as soon as other tasks have run."""
    checks: list[tuple[str, float]] = []
    start = trio.current_time()
    async with open_timers() as timers:
        timer = timers.start(start + 1, record_check(checks, "x", 2, -100, 3))
        await trio.sleep(5)
        assert not timer.is_stopped
        await trio.sleep(5)
        assert [at - start for _, at in checks] == pytest.approx([1, 3, 3, 6], abs=1e-4)
        assert (timer.is_stopped, len(timers)) == (True, 0)


async def test_a_check_that_is_always_due_blocks_nothing() -> None:
    """Other tasks run, and the other checks are called."""
    others: list[tuple[str, float]] = []
    made = 0

    def always_due(now: float) -> float:
        nonlocal made
        made += 1
        return now

    async with open_timers() as timers:
        timers.start(0, always_due)
        timers.start(trio.current_time() + 0.001, record_check(others, "other"))
        with trio.fail_after(5):
            while not others or made < 3:  # noqa: ASYNC110 - the checks do not know this task
                await trio.lowlevel.checkpoint()


async def test_an_earlier_timer_wakes_the_task(autojump_clock: MockClock) -> None:
    """Also a timer that another task starts long after the sleep has begun, and one that a check starts."""
    checks: list[tuple[str, float]] = []
    start = trio.current_time()
    async with open_timers() as timers:

        def starts_another(now: float) -> float:
            timers.start(now + 1, record_check(checks, "from a check"))
            return math.inf

        timers.start(start + 100, record_check(checks, "late"))
        await trio.sleep(10)
        timers.start(start + 20, record_check(checks, "earlier"))
        timers.start(start + 30, starts_another)
        await trio.sleep(200)
    assert [name for name, _ in checks] == ["earlier", "from a check", "late"]
    assert [at - start for _, at in checks] == pytest.approx([20, 31, 100])


async def test_a_stopped_timer_calls_no_check(autojump_clock: MockClock) -> None:
    """A timer can be stopped before its time, in its own check, by another one due at the same time, and twice."""
    checks: list[tuple[str, float]] = []
    at = trio.current_time() + 1
    own_timer: list[Timer] = []

    def stops(timers_to_stop: list[Timer]) -> Check:
        def check(now: float) -> float:
            for timer in timers_to_stop:
                timer.stop()
                timer.stop()
            checks.append(("stops", now))
            return now + 1

        return check

    async with open_timers() as timers:
        before = timers.start(at, record_check(checks, "stopped before"))
        before.stop()
        before.stop()
        assert before.is_stopped
        assert len(timers) == 0
        own_timer.append(timers.start(at, stops(own_timer)))
        later_timer: list[Timer] = []
        timers.start(at, stops(later_timer))
        later_timer.append(timers.start(at, record_check(checks, "stopped by the one before it")))
        assert len(timers) == 3
        await trio.sleep(1.5)
        assert [name for name, _ in checks] == ["stops", "stops"]
        assert own_timer[0].is_stopped
        assert len(timers) == 1
        await trio.sleep(10)
        assert len(checks) == 12
        assert len(timers) == 1


async def test_a_crash_ends_that_timer_only(autojump_clock: MockClock, logs: Logs) -> None:
    """The crash is logged, and every other check is called as before."""
    checks: list[tuple[str, float]] = []
    logs.expect_error("timer_crashed")

    def crash(now: float) -> float:
        raise ValueError("in a check")

    async with open_timers() as timers:
        crashed = timers.start(trio.current_time() + 1, crash)
        timers.start(trio.current_time() + 1, record_check(checks, "x", 1))
        await trio.sleep(5)
        assert len(checks) == 2
        assert crashed.is_stopped
        crashed.stop()
        assert len(timers) == 0
    assert len(logs.named("timer_crashed")) == 1


@pytest.mark.parametrize("running", [0, 100])
@pytest.mark.slow
async def test_stopped_timers_do_not_pile_up(running: int) -> None:
    """100 000 timers that are stopped at once, long before their time: the heap is at most twice as large, plus 64."""
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
    """Running timers keep their order when many timers around them are stopped, also by a check."""
    checks: list[tuple[str, float]] = []
    start = trio.current_time()
    async with open_timers() as timers:
        to_stop = [timers.start(start + 5, record_check(checks, "stopped")) for _ in range(500)]

        def stop_all(now: float) -> float:
            for timer in to_stop:
                timer.stop()
            return math.inf

        timers.start(start + 1, stop_all)
        for after_s in (7, 2, 6, 5):
            timers.start(start + after_s, record_check(checks, str(after_s), 10))
        await trio.sleep(100)
        assert [name for name, _ in checks] == ["2", "5", "6", "7", "2", "5", "6", "7"]
        assert (len(timers), timers._stopped, timers._due) == (0, 0, [])


async def test_an_idle_task_does_not_wake(autojump_clock: MockClock) -> None:
    """The task sleeps until the next check is due: it does not run during an idle hour."""
    steps = 0

    class Count(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            nonlocal steps
            steps += task.name.endswith("Timers.run")

    count: Callable[..., trio.abc.Instrument] = Count
    async with open_timers() as timers:
        timers.start(trio.current_time() + 7200, lambda now: math.inf)
        await wait_all_tasks_blocked()
        instrument = count()
        trio.lowlevel.add_instrument(instrument)
        await trio.sleep(3600)
        trio.lowlevel.remove_instrument(instrument)
        assert steps == 0
