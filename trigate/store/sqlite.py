"""A store in an SQLite file, which all workers of a machine share.

One task, the *writer*, owns the file: it opens, closes and replaces it, and it alone writes. What is to be written is
queued at the call, and the writer takes all that waits in one hop to SQLite's thread and commits it in one transaction.
So one fsync serves many writes, and the more there are, the more they share. Each write of a group stands in a
savepoint of its own. Reads do not pass the writer.

Nothing is imported or opened before the first read or write: a gateway that needs no store pays nothing for it.

What can go wrong with a file (no space, no rights, damage, somebody else's lock, its removal) is one case: the group,
or the read, fails with `StoreUnavailable`, the file is closed, and the next attempt opens it anew, but not more often
than each `RETRY_S`.

**Rules for editing this:** the writer is shielded from the cancellation of what is around it, since what is queued is
still to be written then. It ends when it is told to (`SqliteStore.end`), and soon.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import structlog
import trio

from trigate.errors import StoreUnavailable
from trigate.store.interface import Write
from trigate.store.operations import Receipt, StoreOperations, Tables
from trigate.store.records import StoreStatistics

if TYPE_CHECKING:
    from trigate.store.sqlite_file import File

log = structlog.get_logger("trigate.store.interface")

T = TypeVar("T")

RETRY_S = 0.25
"""After a failure, nothing is tried before so long; what comes meanwhile fails for the same reason."""
END_TIMEOUT_S = 5.0
"""How long what is queued at the end may take."""
GROUP = 512
"""How many writes are committed together at most."""
LOG_AGAIN_S = 60.0
"""The same reason is not logged again before so long."""


_CLOSED = "The store has been closed."


class _Queued:
    """A write that waits.

    Attributes:
        total: None = it is done once; else it is repeated, and this is the sum so far.
    """

    __slots__ = ("durable", "operation", "receipt", "total")

    def __init__(self, operation: Callable[[Tables], Any], *, durable: bool, repeated: bool) -> None:
        self.operation = operation
        self.durable = durable
        self.receipt = Receipt[Any]()
        self.total: int | None = 0 if repeated else None


class SqliteStore(StoreOperations):
    """Made by `open_sqlite_store`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = os.fspath(path)
        self._queue: deque[_Queued] = deque()
        self._wake = trio.Event()
        self._is_ending = False
        self._is_closed = False
        self._scope = trio.CancelScope(shield=True)
        self._file: File | None = None
        self._error: str | None = None
        self._retry_at = -math.inf
        self._is_told = False
        self._told = ""
        self._told_at = -math.inf

    def __repr__(self) -> str:
        return f"<SqliteStore, {self.statistics().state}, {len(self._queue)} writes waiting>"

    def statistics(self) -> StoreStatistics:
        state: Literal["closed", "open", "unavailable"] = "closed" if self._file is None else "open"
        return StoreStatistics(
            kind="sqlite", path=self.path, state="unavailable" if self._error else state, error=self._error
        )

    def write(self, operation: Callable[[Tables], T], *, durable: bool = True) -> Write[T]:
        return self._add(_Queued(operation, durable=durable, repeated=False))

    def write_slices(self, operation: Callable[[Tables], int]) -> Write[int]:
        return self._add(_Queued(operation, durable=False, repeated=True))

    def _add(self, queued: _Queued) -> Receipt[Any]:
        if self._is_closed:
            queued.receipt.fail(StoreUnavailable(_CLOSED))
        else:
            self._queue.append(queued)
            self._wake.set()
        return queued.receipt

    async def read(self, operation: Callable[[Tables], T]) -> T:
        file = self._file
        if file is None or file.has_failed:
            # The writer opens it, for the sake of a write that does nothing.
            await self.write(lambda tables: None, durable=False)
            file = self._file
            if file is None:
                raise StoreUnavailable(self._error or _CLOSED)
        try:
            return await file.read(operation)
        except StoreUnavailable as error:
            if file is not self._file:  # it was closed meanwhile, and why has been noted
                raise StoreUnavailable(self._error or _CLOSED) from error
            self._note(error.message)
            raise

    # -- the writer

    def end(self) -> None:
        """Lets the writer end, once it has written what is queued."""
        self._is_ending = True
        self._scope.deadline = trio.current_time() + END_TIMEOUT_S
        self._wake.set()

    async def run(self) -> None:  # noqa: ASYNC910 - to write waits
        """The writer."""
        try:
            with self._scope:
                await self._write_until_end()
        finally:
            self._is_closed = True
            while self._queue:
                self._queue.popleft().receipt.fail(StoreUnavailable(_CLOSED))
            with trio.move_on_after(END_TIMEOUT_S, shield=True):
                await self._close()

    async def _write_until_end(self) -> None:
        while True:
            await self._wake.wait()
            while self._queue:
                await self._write_group()
            if self._is_ending:
                return
            self._wake = trio.Event()

    async def _write_group(self) -> None:
        await trio.lowlevel.checkpoint()  # whoever runs meanwhile can still come along
        group = list(itertools.islice(self._queue, GROUP))  # they stay in the queue until it is known what came of them
        try:
            file = await self._open()
            outcomes: Sequence[Any] = await file.write(
                [queued.operation for queued in group], durable=any(queued.durable for queued in group)
            )
        except StoreUnavailable as error:
            self._note(error.message)
            # one for each: an exception that several tasks raise collects the tracebacks of all
            outcomes = [StoreUnavailable(error.message) for _ in group]
        else:
            self._note(None)
        for queued, outcome in zip(group, outcomes, strict=True):
            self._queue.popleft()
            if isinstance(outcome, Exception):
                queued.receipt.fail(outcome)
            elif queued.total is None:
                queued.receipt.settle(outcome)
            elif outcome == 0:
                queued.receipt.settle(queued.total)
            else:
                queued.total += outcome
                self._queue.append(queued)

    async def _open(self) -> File:
        if self._file is not None and self._file.has_failed:
            await self._close()
        if self._file is None:
            from trigate.store.sqlite_file import open_file

            if self._error is not None and trio.current_time() < self._retry_at:
                raise StoreUnavailable(self._error)
            self._file = await open_file(self.path)
        return self._file  # noqa: ASYNC910 - it is open already, but for the first time

    async def _close(self) -> None:
        await trio.lowlevel.checkpoint()
        file, self._file = self._file, None
        if file is not None:
            await file.close()

    def _note(self, failure: str | None) -> None:
        """Notes whether the store is available, and logs it, if that is news."""
        now = trio.current_time()
        self._error = failure
        if failure is None:
            if self._is_told:
                self._is_told = False
                log.info("store_available", path=self.path)
            return
        if now >= self._retry_at:
            self._retry_at = now + RETRY_S
        if failure != self._told or now >= self._told_at + LOG_AGAIN_S:
            self._is_told, self._told, self._told_at = True, failure, now
            log.error("store_unavailable", path=self.path, reason=failure)


@asynccontextmanager
async def open_sqlite_store(path: str | os.PathLike[str]) -> AsyncIterator[SqliteStore]:
    """Opens a store in a file around a block. What is queued at the end of the block is still written.

    Args:
        path: The file. It is made when it is first needed, for its owner alone, with the directories above it.

    **Resource handling:** nothing is opened before the first read or write; afterwards, two connections with a thread
    each, until the end of the block.
    """
    store = SqliteStore(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run, name="store")
        try:
            yield store
        finally:
            store.end()
