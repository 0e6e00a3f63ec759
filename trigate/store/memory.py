"""A store that ends with the process: for ``[store] path = ":memory:"``, and for tests.

It runs the same operations over the same tables as the store in a file, on an SQLite database in memory. There is no
thread and no file: an operation is executed inline, at the call, as one transaction. Awaiting a write is a checkpoint
and nothing else, so the store also works under a virtual clock.

The database is made at the first read or write.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import apsw
import trio

from trigate.errors import StoreUnavailable
from trigate.store.interface import Write
from trigate.store.operations.store import StoreOperations
from trigate.store.pending_write import PendingWrite
from trigate.store.records import StoreStatistics
from trigate.store.schema import MIGRATIONS
from trigate.store.tables import Tables

T = TypeVar("T")


class MemoryStore(StoreOperations):
    """Made by `open_memory_store`.

    Attributes:
        failure: Set by tests: the reason with which every read and write raises `StoreUnavailable`; None = they work.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None
        self._db: apsw.Connection | None = None

    def write(self, operation: Callable[[Tables], T], *, durable: bool = True) -> Write[T]:
        """Executes an operation at once. A mistake of its own fails this write alone, as in every store."""
        write = PendingWrite[T]()
        try:
            write.settle(self._execute(operation))
        except Exception as error:
            write.fail(error)
        return write

    def write_slices(self, operation: Callable[[Tables], int]) -> Write[int]:
        """Executes an operation at once, until it returns 0."""
        return self.write(lambda tables: sum(iter(lambda: operation(tables), 0)))

    async def read(self, operation: Callable[[Tables], T]) -> T:
        """Executes an operation at once, behind a checkpoint."""
        await trio.lowlevel.checkpoint()
        return self._execute(operation)

    def _execute(self, operation: Callable[[Tables], T]) -> T:
        if self.failure is not None:
            raise StoreUnavailable(f"The store cannot be used: {self.failure}")
        if self._db is None:
            self._db = _open_database()
        with self._db:  # a savepoint, which is rolled back if the operation raises
            result = operation(Tables(self._db))
        return result

    def statistics(self) -> StoreStatistics:
        """Returns the state of the store. It counts as open from the start, since there is no file to open."""
        return StoreStatistics(
            kind="memory",
            path=":memory:",
            state="open" if self.failure is None else "unavailable",
            error=self.failure,
        )


def _open_database() -> apsw.Connection:
    db = apsw.Connection(":memory:")
    for migration in MIGRATIONS:
        db.execute(migration).fetchall()  # to the end, even if a statement returns rows
    return db


@asynccontextmanager
async def open_memory_store() -> AsyncIterator[MemoryStore]:
    """Opens a store around a block. Its contents are lost when the store is garbage-collected."""
    await trio.lowlevel.checkpoint()
    yield MemoryStore()
