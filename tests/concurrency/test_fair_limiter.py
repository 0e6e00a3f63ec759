"""A bounded number of places, and the fair queue before them."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from trigate.concurrency.fair_limiter import FairLimiter


async def _enter(places: FairLimiter, key: str, came: list[str]) -> None:
    await places.acquire(key)
    came.append(key)


async def test_first_come_first_served() -> None:
    """Within a key."""
    places, came = FairLimiter(1), []
    assert places.acquire_nowait("a")
    assert not places.acquire_nowait("a")
    async with trio.open_nursery() as nursery:
        for number in range(3):

            async def enter(number: int = number) -> None:
                await places.acquire("a")
                came.append(number)

            nursery.start_soon(enter)
            await wait_all_tasks_blocked()
        for _ in range(3):
            places.release("a")
            await wait_all_tasks_blocked()
        assert came == [0, 1, 2]
    places.release("a")
    assert (places.taken, places.taken_by, places.queued) == (0, {}, 0)


async def test_keys_take_turns() -> None:
    """A thousand calls of one key keep another one waiting for one place."""
    places = FairLimiter(1)
    came: list[str] = []
    places.acquire_nowait("busy")
    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(_enter, places, "busy", came)
        await wait_all_tasks_blocked()
        nursery.start_soon(_enter, places, "quiet", came)
        await wait_all_tasks_blocked()
        places.release("busy")
        await wait_all_tasks_blocked()
        places.release(came[-1])
        await wait_all_tasks_blocked()
        assert came == ["busy", "quiet"]
        nursery.cancel_scope.cancel()
    assert places.queued == 0


async def test_a_key_has_a_limit_of_its_own() -> None:
    """It waits for its own places, and nobody waits behind it."""
    places, came = FairLimiter(3, key_limit=1), []
    assert places.acquire_nowait("a")
    assert not places.acquire_nowait("a")
    assert places.is_keys_own_limit("a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_enter, places, "a", came)
        await wait_all_tasks_blocked()
        assert places.acquire_nowait("b")
        assert came == []
        places.release("a")
        await wait_all_tasks_blocked()
        assert came == ["a"]


async def test_who_leaves_has_no_place() -> None:
    """And the next one has it."""
    places, came = FairLimiter(1), []
    places.acquire_nowait("a")
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(0.01) as leaving:
            await places.acquire("a")
        assert leaving.cancelled_caught
        nursery.start_soon(_enter, places, "a", came)
        await wait_all_tasks_blocked()
        places.release("a")
    assert came == ["a"]
    assert places.taken == 1


async def test_more_places() -> None:
    """Who waits is let in when the limit rises; when it falls, nobody loses a place."""
    places, came = FairLimiter(1), []
    places.acquire_nowait("a")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(_enter, places, "a", came)
        await wait_all_tasks_blocked()
        places.change(3)
        await wait_all_tasks_blocked()
        assert (len(came), places.queued) == (2, 1)
        places.change(1)
        places.release("a")
        places.release("a")
        await wait_all_tasks_blocked()
        assert places.queued == 1
        places.release("a")
    assert places.taken == 1


@pytest.mark.parametrize(("key", "expected"), [("a", 1.0), ("b", 0.5)])
async def test_how_long_one_would_wait(key: str, expected: float) -> None:
    """Its turn comes sooner for a key of which nobody waits yet."""
    places, came = FairLimiter(4), []
    for _ in range(4):
        places.acquire_nowait("a")
    places.release("a", held_s=1.0)
    places.acquire_nowait("a")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(_enter, places, "a", came)
        await wait_all_tasks_blocked()
        assert places.expected_wait_s(key) == pytest.approx(expected)
        nursery.cancel_scope.cancel()


_STEPS = st.lists(
    st.tuples(st.sampled_from(["come", "come", "give", "leave", "change"]), st.integers(0, 5), st.sampled_from("abc")),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(_STEPS, st.integers(0, 2))
def test_whatever_happens(steps: list[tuple[str, int, str]], key_limit: int) -> None:
    """Counts are right, limits hold, and nobody waits while there is a place that he may have."""

    async def play() -> None:
        places, limit = FairLimiter(2, key_limit=key_limit), 2
        inside: list[str] = []
        waiting: list[tuple[str, trio.CancelScope]] = []

        async def come(key: str) -> None:
            if places.acquire_nowait(key):
                inside.append(key)
                return
            with trio.CancelScope() as scope:
                entry = (key, scope)
                waiting.append(entry)
                try:
                    await places.acquire(key)
                    inside.append(key)
                finally:
                    waiting.remove(entry)

        async with trio.open_nursery() as nursery:
            for what, number, key in steps:
                match what:
                    case "come":
                        nursery.start_soon(come, key)
                    case "give" if inside:
                        places.release(inside.pop(number % len(inside)))
                    case "leave" if waiting:
                        waiting[number % len(waiting)][1].cancel()
                    case "change":
                        limit = number
                        places.change(limit, key_limit=key_limit)
                await wait_all_tasks_blocked()
                counted: dict[str, Any] = {each: inside.count(each) for each in set(inside)}
                assert (places.taken, places.queued, places.taken_by) == (len(inside), len(waiting), counted)
                assert not any(places.is_free(each) for each, _ in waiting)
            nursery.cancel_scope.cancel()
        assert places.queued == 0

    trio.run(play)
