"""How long the rows of the store are kept, and the task that deletes the old ones every hour."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import trio

from trigate.config.sections import Config, LedgerConfig, ReasoningMemoryConfig, StoreConfig
from trigate.errors import StoreUnavailable
from trigate.logs import log
from trigate.store.interface import Store
from trigate.store.records import Retention

PRUNE_S = 3600.0
"""Seconds between two deletions of old rows."""
_REASONING = ReasoningMemoryConfig()


def retention(
    settings: StoreConfig, ledger: LedgerConfig, now: float, reasoning: ReasoningMemoryConfig = _REASONING
) -> Retention:
    """Returns what may be deleted at a time. An age of 0 keeps the rows for ever.

    Args:
        now: POSIX seconds.
    """

    def before(age_s: float) -> float:
        return now - age_s if age_s else 0.0

    return Retention(
        sessions_before=before(settings.session_retention_s),
        archives_before=before(settings.archive_retention_s),
        runs_before=before(settings.run_retention_s),
        max_sessions=settings.max_sessions,
        max_runs=settings.max_runs,
        exchanges_before=before(ledger.retention_s),
        max_exchanges=ledger.max_records,
        objects_before=before(settings.object_retention_s),
        max_objects=settings.max_objects,
        reasoning_before=now - reasoning.retention_s,
        usage_before=before(ledger.usage_retention_s),
        responses_before=before(settings.response_retention_s),
        max_responses=settings.max_responses,
    )


async def keep_pruned(store: Store, wait_joined: Callable[[], Awaitable[None]], config: Callable[[], Config]) -> None:
    """Deletes old rows for ever: once this worker has joined the others, and then every hour.

    Args:
        wait_joined: Returns when this worker has joined (`trigate.workers.membership.Workers.wait_joined`). If that
            takes more than `PRUNE_S`, the deletion does not wait for it any longer.
        config: Returns the configuration in use.
    """
    with trio.move_on_after(PRUNE_S):
        await wait_joined()
    while True:
        if store.statistics().state != "closed":  # a store that nothing has needed is not opened for this
            await _prune(store, config())
        await trio.sleep(PRUNE_S)


async def _prune(store: Store, config: Config) -> None:
    await trio.lowlevel.checkpoint()
    try:
        rows = await store.prune(retention(config.store, config.ledger, time.time(), config.reasoning_memory))
    except StoreUnavailable as error:
        log.warning("prune_failed", error=error.message)
    else:
        if rows:
            log.info("pruned", rows=rows)
