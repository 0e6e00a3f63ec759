"""Which store a gateway has: its location, and whether it has to be open from the start.

A gateway that has remembered nothing has no file. The first operation opens the store: `Workers.join`, or the ledger
after the first call. The gateway opens it at the start only if it is certain that the store will be needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager

from trigate.config.sections import Config, SessionsConfig, StoreConfig
from trigate.store.interface import Store

MEMORY = ":memory:"


def location(settings: StoreConfig, env: Mapping[str, str]) -> str:
    """Returns the path of the store's file, absolute; or `MEMORY`."""
    path = settings.path or env.get("TRIGATE_STORE") or default_location()
    return path if path == MEMORY else os.path.abspath(os.path.expanduser(path))


def default_location() -> str:
    """Returns the path that applies if none is configured: in the platform's directory for application data."""
    import platformdirs  # imported here: it is needed at most once, and not where a path is configured

    return str(platformdirs.user_data_path("trigate") / "trigate.db")


def describe_location(where: str) -> str:
    """Returns a location for people to read."""
    return "in memory" if where == MEMORY else where


def open_store(where: str) -> AbstractAsyncContextManager[Store]:
    """Opens the store of a location. Before the first read or write, it creates no file. It imports SQLite, since there
    may be no descriptor left for that later."""
    if where == MEMORY:
        from trigate.store.memory import open_memory_store

        return open_memory_store()
    from trigate.store.sqlite import open_sqlite_store

    return open_sqlite_store(where)


def is_needed(config: Config, where: str) -> bool:
    """Whether the store has to be open from the start: it has rows, the configuration uses it, or there are other
    workers to join."""
    return (
        config.hooks is not None
        or bool(config.channels)
        or config.alerts.url is not None
        or config.store != StoreConfig()
        or config.sessions != SessionsConfig()
        or config.server.workers > 1
        or config.admin.key is not None
        or _is_worker_of_a_server()
        or (where != MEMORY and os.path.exists(where))
    )


def _is_worker_of_a_server() -> bool:
    # Servers such as hypercorn and uvicorn start their workers by multiprocessing, which is imported in its children.
    loaded = sys.modules.get("multiprocessing.process")
    return loaded is not None and loaded.parent_process() is not None
