"""Which store a gateway has: where it is, what needs it, and what it may forget.

A gateway that has done nothing has no file: the store is opened by whoever needs it first (`workers.Workers.join`, or
the ledger after the first call), and at the start only where it is certain that it will be needed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager

import structlog
import trio

from trigate.config.sections import Config, LedgerConfig, SessionsConfig, StoreConfig
from trigate.errors import StoreUnavailable
from trigate.store.interface import Store
from trigate.store.records import Retention
from trigate.workers.membership import Workers

log = structlog.get_logger("trigate.store.opening")

MEMORY = ":memory:"
PRUNE_S = 3600.0
"""How often what may be forgotten is."""


def location(settings: StoreConfig, env: Mapping[str, str]) -> str:
    """Returns the path of the store's file, absolute; or `MEMORY`."""
    named = settings.path or env.get("TRIGATE_STORE") or default_location()
    return named if named == MEMORY else os.path.abspath(os.path.expanduser(named))


def default_location() -> str:
    """Where it is when nobody has said so: in the platform's directory for the data of programs."""
    import platformdirs  # most gateways are told, or ask once

    return str(platformdirs.user_data_path("trigate") / "trigate.db")


def described(where: str) -> str:
    """Says where a store is, to people."""
    return "in memory" if where == MEMORY else where


def open_store(where: str) -> AbstractAsyncContextManager[Store]:
    """Opens the store of a location. One on a disk makes no file, and loads no database, before it is used."""
    if where == MEMORY:
        from trigate.store.memory import open_memory_store

        return open_memory_store()
    from trigate.store.sqlite import open_sqlite_store

    return open_sqlite_store(where)


def is_needed(config: Config, where: str) -> bool:
    """Whether the store has to be open from the start: something is in it, will be, or other workers are met there."""
    return (
        config.hooks is not None
        or bool(config.channels)
        or config.store != StoreConfig()
        or config.sessions != SessionsConfig()
        or config.server.workers > 1
        or _is_worker_of_a_server()
        or (where != MEMORY and os.path.exists(where))
    )


def _is_worker_of_a_server() -> bool:
    # Servers such as hypercorn and uvicorn start theirs by multiprocessing, which is loaded in its children.
    loaded = sys.modules.get("multiprocessing.process")
    return loaded is not None and loaded.parent_process() is not None


def retention(settings: StoreConfig, ledger: LedgerConfig, now: float) -> Retention:
    """What may be forgotten at a time, in POSIX seconds."""

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
    )


async def keep_pruned(store: Store, workers: Workers, config: Callable[[], Config]) -> None:
    """Forgets what may be forgotten, once the workers share the store and then every hour, for ever."""
    with trio.move_on_after(PRUNE_S):
        await workers.wait_joined()
    while True:
        if store.statistics().state != "closed":  # else nobody has needed it, and it need not be opened for this
            await _prune(store, config())
        await trio.sleep(PRUNE_S)


async def _prune(store: Store, config: Config) -> None:  # noqa: ASYNC910 - it has waited for the store
    try:
        forgotten = await store.prune(retention(config.store, config.ledger, time.time()))
    except StoreUnavailable as error:
        log.warning("prune_failed", error=error.message)
    else:
        if forgotten:
            log.info("pruned", rows=forgotten)
