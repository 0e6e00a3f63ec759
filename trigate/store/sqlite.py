"""A store in an SQLite file, which all workers of a machine share.

One task, the *writer*, owns the file: it opens, closes and replaces the file, and it alone writes. A write is queued
when it is called. The writer takes all queued writes to SQLite's thread in one hop and commits them in one transaction,
so one fsync serves many writes, and more of them under more load. Each write of a group has a savepoint of its own.
Reads do not pass through the writer.

The queue and its wakeup are not a memory channel, since writes are queued from synchronous code and must never be
refused.

Nothing is opened before the first read or write. SQLite is imported with this module: the first write may come when no
file can be opened, and then an import would fail, too.

Every failure of the file (no space, no permission, damage, the lock of another process, its removal, no descriptor, no
memory) is handled in the same way: the group, or the read, fails with `StoreUnavailable`, the file is closed, and the
next attempt opens it again, but not sooner than `RETRY_S` after the failure.

**Rules for editing this:** the writer is shielded from the cancellation of the tasks around it, since queued writes are
still to be written then. `SqliteStore.end` ends it, and bounds the time that it takes.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

import attrs
import trio

from trigate.concurrency.notify import Wakeup
from trigate.errors import StoreUnavailable
from trigate.logs import log
from trigate.store.interface import Write
from trigate.store.operations.store import StoreOperations
from trigate.store.pending_write import PendingWrite
from trigate.store.records import StoreStatistics
from trigate.store.sqlite_file import File, open_file, unavailable
from trigate.store.tables import Tables

T = TypeVar("T")

RETRY_S = 0.25
"""Seconds between a failure and the next attempt to open the file. Until then, writes and reads fail with the same
reason."""
END_TIMEOUT_S = 5.0
"""Seconds that the queued writes may take when the store is closed."""
GROUP = 512
"""The most writes that one transaction commits."""
LOG_AGAIN_S = 60.0
"""Seconds before the same reason is logged again."""
_CLOSED = "The store has been closed."


@attrs.define(eq=False)
class _Queued:
    """A queued write.

    Attributes:
        total: The sum so far of a write that is repeated (`SqliteStore.write_slices`); None = it is executed once.
    """

    operation: Callable[[Tables], Any]
    durable: bool
    total: int | None = None
    write: PendingWrite[Any] = attrs.field(factory=PendingWrite)


class SqliteStore(StoreOperations):
    """Made by `open_sqlite_store`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = os.fspath(path)
        self._queue: deque[_Queued] = deque()
        self._wakeup = Wakeup()
        self._is_ending = False
        self._is_closed = False
        self._scope = trio.CancelScope(shield=True)  # bounded by: `end`, which sets its deadline
        self._file: File | None = None
        self._error: str | None = None
        self._retry_at = -math.inf
        self._is_reported = False
        self._reported_reason = ""
        self._reported_at = -math.inf
        self._writes, self._write_s = 0, 0.0

    def __repr__(self) -> str:
        return f"<SqliteStore, {self.statistics().state}, {len(self._queue)} writes waiting>"

    def statistics(self) -> StoreStatistics:
        """Returns the state of the store. Never blocks."""
        state: Literal["closed", "open", "unavailable"] = "closed" if self._file is None else "open"
        return StoreStatistics(
            kind="sqlite",
            path=self.path,
            state="unavailable" if self._error else state,
            error=self._error,
            writes=self._writes,
            write_s=self._write_s,
        )

    def write(self, operation: Callable[[Tables], T], *, durable: bool = True) -> Write[T]:
        """Queues an operation for the writer."""
        return self._add(_Queued(operation, durable))

    def write_slices(self, operation: Callable[[Tables], int]) -> Write[int]:
        """Queues an operation that goes back to the end of the queue until it returns 0."""
        return self._add(_Queued(operation, durable=False, total=0))

    def _add(self, queued: _Queued) -> PendingWrite[Any]:
        if self._is_closed:
            queued.write.fail(StoreUnavailable(_CLOSED))
        else:
            self._queue.append(queued)
            self._wakeup.set()
        return queued.write

    async def read(self, operation: Callable[[Tables], T]) -> T:
        """Executes an operation in the reading thread. A store that is closed is opened first."""
        file = self._file
        if file is None or file.has_failed:
            # Only the writer opens the file: queue a write that does nothing.
            await self.write(lambda tables: None, durable=False)
            file = self._file
            if file is None:
                raise StoreUnavailable(self._error or _CLOSED)
        try:
            return await file.read(operation)
        except StoreUnavailable as error:
            if file is not self._file:  # the writer has closed it meanwhile, and noted the reason
                raise StoreUnavailable(self._error or _CLOSED) from error
            self._note(error.message)
            raise

    # -- the writer

    def end(self) -> None:
        """Ends the writer when it has written what is queued, or after `END_TIMEOUT_S`. Synchronous."""
        self._is_ending = True
        self._scope.deadline = trio.current_time() + END_TIMEOUT_S
        self._wakeup.set()

    async def run(self) -> None:
        """Runs the writer until `end`. Writes that are still queued then fail.

        **Cancels:** not at all; it is shielded until the deadline that `end` sets.
        """
        try:
            with self._scope:
                await self._write_until_end()
        finally:
            self._is_closed = True
            while self._queue:
                self._queue.popleft().write.fail(StoreUnavailable(_CLOSED))
            with trio.move_on_after(END_TIMEOUT_S, shield=True):
                await self._close()

    async def _write_until_end(self) -> None:
        while True:
            await self._wakeup.wait()
            while self._queue:
                await self._write_group()
            if self._is_ending:
                return

    async def _write_group(self) -> None:
        await trio.lowlevel.checkpoint()  # other tasks can still add writes to this group
        # They stay in the queue until their outcomes are known: `run` fails them if the deadline cancels this.
        group = list(itertools.islice(self._queue, GROUP))
        began_at = trio.current_time()
        try:
            file = await self._open()
            outcomes: Sequence[Any] = await file.write(
                [queued.operation for queued in group], durable=any(queued.durable for queued in group)
            )
        except StoreUnavailable as error:
            self._note(error.message)
            # One error for each write: an exception that several tasks raise collects the tracebacks of all.
            outcomes = [StoreUnavailable(error.message) for _ in group]
        except Exception as error:  # a defect must end neither the writer nor the gateway
            log.exception("store_crashed", path=self.path)
            await self._close()
            self._note(unavailable(type(error).__name__).message)
            outcomes = [unavailable(type(error).__name__) for _ in group]
        else:
            self._note(None)
        self._writes += 1
        self._write_s += trio.current_time() - began_at
        for queued, outcome in zip(group, outcomes, strict=True):
            self._queue.popleft()
            if isinstance(outcome, Exception):
                queued.write.fail(outcome)
            elif queued.total is None:
                queued.write.settle(outcome)
            elif outcome == 0:
                queued.write.settle(queued.total)
            else:
                queued.total += outcome
                self._queue.append(queued)

    async def _open(self) -> File:
        await trio.lowlevel.checkpoint()
        if self._file is not None and self._file.has_failed:
            await self._close()
        if self._file is None:
            if self._error is not None and trio.current_time() < self._retry_at:
                raise StoreUnavailable(self._error)
            self._file = await open_file(self.path)
        return self._file

    async def _close(self) -> None:
        await trio.lowlevel.checkpoint()
        file, self._file = self._file, None
        if file is not None:
            await file.close()

    def _note(self, failure: str | None) -> None:
        """Notes whether the store is available (None), and logs a change, or the same failure after `LOG_AGAIN_S`."""
        now = trio.current_time()
        self._error = failure
        if failure is None:
            if self._is_reported:
                self._is_reported = False
                log.info("store_available", path=self.path)
            return
        if now >= self._retry_at:
            self._retry_at = now + RETRY_S
        if failure != self._reported_reason or now >= self._reported_at + LOG_AGAIN_S:
            self._is_reported, self._reported_reason, self._reported_at = True, failure, now
            log.error("store_unavailable", path=self.path, reason=failure)


@asynccontextmanager
async def open_sqlite_store(path: str | os.PathLike[str]) -> AsyncIterator[SqliteStore]:
    """Opens a store in a file around a block. Writes that are queued when the block ends are still written.

    Args:
        path: The file. It is created when it is first needed, with the directories above it, for its owner alone.

    **Resource handling:** nothing is opened before the first read or write; after that, two connections with a thread
    each, until the end of the block.
    """
    store = SqliteStore(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run, name="store")
        try:
            yield store
        finally:
            store.end()
