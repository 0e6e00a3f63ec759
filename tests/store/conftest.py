"""The stores over which the contract tests run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from trigate.store.interface import Store
from trigate.store.memory import open_memory_store
from trigate.store.sqlite import open_sqlite_store


@pytest.fixture(params=["sqlite", "memory"])
async def store(request: Any, tmp_path: Path) -> AsyncIterator[Store]:
    """An empty store of each kind."""
    opened = open_sqlite_store(tmp_path / "store.db") if request.param == "sqlite" else open_memory_store()
    async with opened as made:
        yield made
