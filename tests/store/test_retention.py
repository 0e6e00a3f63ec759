"""`trigate.store.retention`: what is deleted from the store, and when."""

from __future__ import annotations

from typing import Any

import trio
from trio.testing import MockClock

from trigate.config.sections import DAY_S, Config, Count, LedgerConfig, Limit, Seconds, StoreConfig
from trigate.store.memory import open_memory_store
from trigate.store.records import Retention, Turn
from trigate.store.retention import PRUNE_S, keep_pruned, retention
from trigate.workers.membership import open_workers


def test_retention() -> None:
    """Ages count back from now; an age of 0 keeps everything."""
    settings = StoreConfig(
        run_retention_s=Seconds(5 * DAY_S), session_retention_s=Seconds(0.0), max_runs=Count(7), max_sessions=Count(8)
    )
    ledger = LedgerConfig(retention_s=Seconds(2 * DAY_S), max_records=Limit(9))
    assert retention(settings, ledger, 1_000 * DAY_S) == Retention(
        sessions_before=0.0,
        archives_before=970 * DAY_S,
        runs_before=995 * DAY_S,
        max_sessions=8,
        max_runs=7,
        exchanges_before=998 * DAY_S,
        max_exchanges=9,
        objects_before=600 * DAY_S,
        max_objects=1_000_000,
        usage_before=200 * DAY_S,
        reasoning_before=1_000 * DAY_S - 3600,
        responses_before=970 * DAY_S,
        max_responses=10_000,
    )


async def test_the_store_is_pruned(logs: Any, autojump_clock: MockClock) -> None:
    """Rows are deleted after the worker has joined, and then every hour. Deletions are logged, and a failure is
    retried."""
    async with (
        open_memory_store() as store,
        open_workers(store) as workers,
        trio.open_nursery() as tasks,
    ):
        await store.sessions.append(Turn(owner="", key="old", messages=(), at=1.0))
        tasks.start_soon(keep_pruned, store, workers.wait_joined, Config)
        await trio.sleep(PRUNE_S / 2)
        assert await store.sessions.get("", "old") is not None
        await workers.join()
        await trio.sleep(1)
        assert await store.sessions.get("", "old") is None
        assert [entry["rows"] for entry in logs.named("pruned")] == [1]
        store.failure = "full"
        await trio.sleep(PRUNE_S + 1)
        assert len(logs.named("prune_failed")) == 1
        store.failure = None
        await store.sessions.append(Turn(owner="", key="old", messages=(), at=1.0))
        await trio.sleep(PRUNE_S + 1)
        assert len(logs.named("pruned")) == 2
        tasks.cancel_scope.cancel()
