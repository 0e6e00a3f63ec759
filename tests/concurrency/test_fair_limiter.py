"""`trigate.concurrency.fair_limiter`: a bounded number of slots, and a queue that is fair between keys."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from trigate.concurrency.fair_limiter import Evicted, FairLimiter


async def _acquire(limiter: FairLimiter, key: str, admitted: list[str]) -> None:
    await limiter.acquire(key)
    admitted.append(key)


async def test_first_come_first_served() -> None:
    """The calls of one key get their slots in the order of their arrival."""
    limiter = FairLimiter(1)
    admitted: list[int] = []
    assert limiter.acquire_nowait("a")
    assert not limiter.acquire_nowait("a")
    async with trio.open_nursery() as nursery:
        for number in range(3):

            async def enter(number: int = number) -> None:
                await limiter.acquire("a")
                admitted.append(number)

            nursery.start_soon(enter)
            await wait_all_tasks_blocked()
        for _ in range(3):
            limiter.release("a")
            await wait_all_tasks_blocked()
        assert admitted == [0, 1, 2]
    limiter.release("a")
    assert (limiter.taken, limiter.taken_by, limiter.queued) == (0, {}, 0)


async def test_slots_go_round_the_keys() -> None:
    """A thousand waiting calls of one key delay the call of another key by one slot."""
    limiter = FairLimiter(1)
    admitted: list[str] = []
    limiter.acquire_nowait("busy")
    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(_acquire, limiter, "busy", admitted)
        await wait_all_tasks_blocked()
        nursery.start_soon(_acquire, limiter, "quiet", admitted)
        await wait_all_tasks_blocked()
        limiter.release("busy")
        await wait_all_tasks_blocked()
        limiter.release(admitted[-1])
        await wait_all_tasks_blocked()
        assert admitted == ["busy", "quiet"]
        nursery.cancel_scope.cancel()
    assert limiter.queued == 0


async def test_a_key_has_a_limit_of_its_own() -> None:
    """A key at its own limit waits for one of its own slots, and other keys do not wait behind it."""
    limiter = FairLimiter(3, key_limit=1)
    admitted: list[str] = []
    assert limiter.acquire_nowait("a")
    assert not limiter.acquire_nowait("a")
    assert limiter.is_keys_own_limit("a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_acquire, limiter, "a", admitted)
        await wait_all_tasks_blocked()
        assert limiter.acquire_nowait("b")
        assert admitted == []
        limiter.release("a")
        await wait_all_tasks_blocked()
        assert admitted == ["a"]


async def test_a_cancelled_waiter_holds_no_slot() -> None:
    """The next waiter gets the slot."""
    limiter = FairLimiter(1)
    admitted: list[str] = []
    limiter.acquire_nowait("a")
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(0.01) as scope:
            await limiter.acquire("a")
        assert scope.cancelled_caught
        nursery.start_soon(_acquire, limiter, "a", admitted)
        await wait_all_tasks_blocked()
        limiter.release("a")
    assert admitted == ["a"]
    assert limiter.taken == 1


async def test_the_limit_changes() -> None:
    """A higher limit admits waiting calls; a lower one takes no slot away."""
    limiter = FairLimiter(1)
    admitted: list[str] = []
    limiter.acquire_nowait("a")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(_acquire, limiter, "a", admitted)
        await wait_all_tasks_blocked()
        limiter.change(3)
        await wait_all_tasks_blocked()
        assert (len(admitted), limiter.queued) == (2, 1)
        limiter.change(1)
        limiter.release("a")
        limiter.release("a")
        await wait_all_tasks_blocked()
        assert limiter.queued == 1
        limiter.release("a")
    assert limiter.taken == 1


@pytest.mark.parametrize(("key", "expected"), [("a", 1.0), ("b", 0.5)])
async def test_the_expected_wait(key: str, expected: float) -> None:
    """A key without waiting calls gets a slot sooner."""
    limiter = FairLimiter(4)
    admitted: list[str] = []
    for _ in range(4):
        limiter.acquire_nowait("a")
    limiter.release("a", held_s=1.0)
    limiter.acquire_nowait("a")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(_acquire, limiter, "a", admitted)
        await wait_all_tasks_blocked()
        assert limiter.expected_wait_s(key) == pytest.approx(expected)
        nursery.cancel_scope.cancel()


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "acquire", "release", "cancel", "change"]),
        st.integers(0, 5),
        st.sampled_from("abc"),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(_STEPS, st.integers(0, 2))
def test_invariants(steps: list[tuple[str, int, str]], key_limit: int) -> None:
    """Counts are right, limits hold, and no call waits while there is a free slot that it may have."""

    async def play() -> None:
        limiter, limit = FairLimiter(2, key_limit=key_limit), 2
        holding: list[str] = []
        waiting: list[tuple[str, trio.CancelScope]] = []

        async def acquire(key: str) -> None:
            if limiter.acquire_nowait(key):
                holding.append(key)
                return
            with trio.CancelScope() as scope:
                entry = (key, scope)
                waiting.append(entry)
                try:
                    await limiter.acquire(key)
                    holding.append(key)
                finally:
                    waiting.remove(entry)

        async with trio.open_nursery() as nursery:
            for what, number, key in steps:
                match what:
                    case "acquire":
                        nursery.start_soon(acquire, key)
                    case "release" if holding:
                        limiter.release(holding.pop(number % len(holding)))
                    case "cancel" if waiting:
                        waiting[number % len(waiting)][1].cancel()
                    case "change":
                        limit = number
                        limiter.change(limit, key_limit=key_limit)
                await wait_all_tasks_blocked()
                counted: dict[str, Any] = {key: holding.count(key) for key in set(holding)}
                assert (limiter.taken, limiter.queued, limiter.taken_by) == (len(holding), len(waiting), counted)
                assert not any(limiter.is_free(key) for key, _ in waiting)
            nursery.cancel_scope.cancel()
        assert limiter.queued == 0

    trio.run(play)


async def test_priorities() -> None:
    """A slot goes to a key of the highest priority, and round those of the same one."""
    limiter = FairLimiter(1)
    admitted: list[str] = []

    async def enter(key: str, priority: int) -> None:
        await limiter.acquire(key, priority)
        admitted.append(key)

    limiter.acquire_nowait("x")
    async with trio.open_nursery() as nursery:
        for key, priority in (("low", -1), ("a", 0), ("a", 0), ("b", 0), ("high", 3), ("high", 3)):
            nursery.start_soon(enter, key, priority)
            await wait_all_tasks_blocked()
        held = "x"
        for _ in range(6):
            limiter.release(held)
            await wait_all_tasks_blocked()
            held = admitted[-1]
    assert admitted == ["high", "high", "a", "b", "a", "low"]
    assert limiter._priorities == {}


async def test_eviction_by_priority() -> None:
    """A call evicts one of a lower priority, even the only one, and none of a higher one."""
    limiter = FairLimiter(1)
    evicted: list[str] = []

    async def enter(key: str, priority: int) -> None:
        try:
            await limiter.acquire(key, priority)
        except Evicted:
            evicted.append(key)

    limiter.acquire_nowait("x")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(enter, "high", 2)
        nursery.start_soon(enter, "mid", 1)
        await wait_all_tasks_blocked()
        assert not limiter.evict_longest("low", 0)
        assert limiter.evict_longest("other", 2)
        await wait_all_tasks_blocked()
        assert evicted == ["mid"]
        assert not limiter.evict_longest("other", 2)  # it waits once, like the other one
        assert limiter._priorities == {"high": 2}
        nursery.cancel_scope.cancel()
    assert limiter._priorities == {}


async def test_the_expected_wait_by_priority() -> None:
    """Calls of a lower priority are not before one of a higher one."""
    limiter = FairLimiter(1)
    limiter.acquire_nowait("x")
    limiter.release("x", 10.0)
    limiter.acquire_nowait("x")
    async with trio.open_nursery() as nursery:
        for key, priority in (("low", 0), ("low", 0), ("high", 2)):
            nursery.start_soon(limiter.acquire, key, priority)
        await wait_all_tasks_blocked()
        assert [limiter.expected_wait_s("new", priority) for priority in (0, 1, 2, 3)] == [30.0, 20.0, 20.0, 10.0]
        nursery.cancel_scope.cancel()
