"""`trigate.store.memory`: what the contract in `tests/store/test_operations.py` does not say."""

from __future__ import annotations

import threading

import pytest
import trio
from trio.testing import MockClock

from tests.store.test_operations import turn
from trigate.errors import StoreUnavailable
from trigate.store.memory import MemoryStore, open_memory_store


async def test_operations_run_inline(autojump_clock: MockClock) -> None:
    """A write is done when the call returns, without a thread, so a virtual clock does not run ahead of it."""
    threads = threading.active_count()
    async with open_memory_store() as store:
        begun = trio.current_time()
        write = store.sessions.append(turn())
        assert store._execute(lambda tables: tables.session("o", "k")) is not None
        assert (await write).turns == 1
        assert trio.current_time() == begun
        assert threading.active_count() == threads


async def test_two_stores_share_nothing() -> None:
    """Each store has a database of its own."""
    one, two = MemoryStore(), MemoryStore()
    await one.sessions.append(turn())
    assert await two.sessions.get("o", "k") is None


async def test_a_failure_that_a_test_asks_for() -> None:
    """While ``failure`` is set, writes fail when they are awaited, and reads at once; afterwards nothing is missing."""
    store = MemoryStore()
    await store.sessions.append(turn())
    store.failure = "full"
    write = store.sessions.append(turn())
    with pytest.raises(StoreUnavailable, match="full"):
        await write
    with pytest.raises(StoreUnavailable, match="full"):
        await store.sessions.get("o", "k")
    assert (store.statistics().state, store.statistics().error) == ("unavailable", "full")
    store.failure = None
    found = await store.sessions.get("o", "k")
    assert found is not None
    assert found.turns == 1
