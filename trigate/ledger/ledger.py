"""The ledger: one record for each exchange, however it ended.

`Ledger.begin` and `Ledger.settle` are synchronous and never fail: a call is neither delayed nor refused if its record
cannot be stored. Each writes one line to the `journal`, which survives the process. Every few seconds a task
writes the settled records to the store, where they can be queried. Each record has an id of its own, so the store holds
it at most once even if it is written twice.

When a process is killed, its journal remains. The next process that starts, or one that is running, writes its records
to the store: a settled exchange with its outcome, any other one as ``lost``. Damaged lines of a journal are left out; a
journal that cannot be read is tried again later.

At most `MAX_WAITING` records wait for the store in memory. Further ones are read from the journal once the store is
available again. If there is no journal either (a full or read-only disk, a store in memory), they are dropped, which is
counted and logged.
"""

from __future__ import annotations

import itertools
import math
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import attrs
import trio

from trigate.concurrency.notify import Wakeup, open_service
from trigate.config.sections import LedgerConfig
from trigate.errors import StoreUnavailable
from trigate.ledger.journal import Journal, Orphan, journals, take_orphan
from trigate.logs import log
from trigate.store.interface import Store
from trigate.store.opening import MEMORY
from trigate.store.records import LOST, ExchangeRecord
from trigate.store.reports import ExchangeQuery

FLUSH_S = 5.0
"""The longest time that a record waits before it is written to the store."""
ORPHANS_S = 60.0
"""The interval of the search for journals of exited processes."""
RETRY_S = 5.0
"""The pause before a journal that cannot be written is tried again."""
CLOSE_TIMEOUT_S = 3.0
ROTATE_BYTES = 4 * 1024 * 1024
"""The size at which a journal is rotated."""
MAX_WAITING = 50_000
"""The largest number of records that wait in memory."""
_ANY = ExchangeQuery()
_MAX_MODEL_CHARS = 256  # of a model id: clients send any text


@attrs.frozen(kw_only=True)
class LedgerStatistics:
    """A snapshot of the ledger.

    Attributes:
        state: ``degraded`` = no journal can be written.
        begun, settled: Exchanges of this process.
        lost: Exchanges of killed processes that this process found.
        dropped: Records that could not be stored anywhere.
        waiting: Settled records in memory that the store does not have yet.
    """

    state: Literal["off", "ok", "degraded"]
    begun: int
    settled: int
    lost: int
    dropped: int
    error: str | None = None
    waiting: int = 0


class Ledger:
    """The ledger of this worker. Made by `open_ledger`."""

    def __init__(self, store: Store, worker: str | None = None) -> None:
        self._store = store
        self._path = store.statistics().path
        self._worker = worker or secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._settings = LedgerConfig()
        self._live: dict[str, ExchangeRecord] = {}
        self._journal: Journal | None = None
        self._retry_at = -math.inf
        self._waiting: list[bytes] = []
        self._is_behind = False
        """Whether the journal has settled records that are neither in memory nor in the store."""
        self._error: str | None = None
        self._store_error: str | None = None
        self._has_settled = Wakeup()
        self._flushing = trio.Lock()
        self._orphans_at = -math.inf
        self._unusable: dict[str, str] = {}
        """The journals of exited processes that cannot be read or removed, and why not."""
        self._kept: set[str] = set()
        """Those whose records are in the store, but which cannot be removed."""
        self._begun = self._settled = self._lost = self._dropped = 0

    def __repr__(self) -> str:
        return f"<Ledger, {len(self._live)} live, {self._settled} settled>"

    def apply(self, settings: LedgerConfig) -> None:
        """Applies new settings. Exchanges that have begun are settled in any case."""
        self._settings = settings

    def statistics(self) -> LedgerStatistics:
        """Returns a snapshot."""
        state: Literal["off", "ok", "degraded"] = "degraded" if self._error is not None else "ok"
        return LedgerStatistics(
            state=state if self._settings.enabled else "off",
            begun=self._begun,
            settled=self._settled,
            lost=self._lost,
            dropped=self._dropped,
            error=self._error or self._store_error,
            waiting=len(self._waiting),
        )

    # -- one exchange -------------------------------------------------------------------------------------------------

    def begin(self, *, request_id: str, owner: str, endpoint: str, model: str, stream: bool) -> ExchangeRecord:
        """Records that an exchange has begun.

        Returns:
            Its record, which the caller completes, and passes to `settle`.
        """
        record = ExchangeRecord(
            id=f"ex_{self._worker}_{next(self._numbers)}",
            request_id=request_id,
            owner=owner,
            worker=self._worker,
            endpoint=endpoint,
            model=model[:_MAX_MODEL_CHARS],
            stream=stream,
            started_at=time.time(),
        )
        if self._settings.enabled:
            self._live[record.id] = record
            self._begun += 1
            if self._path != MEMORY:
                self._write(record.encode())
        return record

    def settle(self, record: ExchangeRecord) -> None:
        """Records how an exchange ended, even if it was refused. Does nothing if the ledger was off when it began."""
        if self._live.pop(record.id, None) is None:
            return
        self._settled += 1
        line = record.encode()
        is_written = self._write(line)
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(line)
        elif is_written:
            self._is_behind = True
        else:
            self._dropped += 1
        if not self._has_settled.is_set:
            self._has_settled.set()

    def _write(self, record: bytes) -> bool:
        """Writes a line to the journal; returns whether that succeeded."""
        try:
            if self._journal is None:
                if self._path == MEMORY or trio.current_time() < self._retry_at:
                    return False
                self._journal = Journal(self._path, self._worker)
            self._journal.write(record)
        except OSError as error:
            self._retry_at = trio.current_time() + RETRY_S
            self._degrade(error)
            return False
        if self._error is not None:
            self._error = None
            log.info("ledger_restored", path=self._path)
        return True

    def _degrade(self, error: OSError) -> None:
        reason = f"The journal beside {self._path} cannot be used: {_reason(error)}."
        if reason != self._error:
            self._error = reason
            log.error("ledger_degraded", reason=reason, max_waiting=MAX_WAITING)

    # -- into the store -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Writes records to the store; never returns."""
        while True:
            await self._try_flush()
            if self._store_error is not None:
                self._has_settled.set()
            with trio.move_on_after(ORPHANS_S if self._path != MEMORY else math.inf):
                await self._has_settled.wait()
            await trio.sleep(FLUSH_S)  # many records share one transaction

    async def _try_flush(self) -> None:
        """Writes all settled records to the store, if that is possible, and notes why it is not."""
        await trio.lowlevel.checkpoint()
        try:
            await self.flush()
        except StoreUnavailable as error:
            if error.message != self._store_error:
                log.warning("ledger_waits", error=error.message)
            self._store_error = error.message
        except Exception as error:  # a defect must not end the gateway
            if self._store_error != repr(error):
                log.exception("ledger_crashed")
            self._store_error = repr(error)
        else:
            self._store_error = None

    async def flush(self) -> None:
        """Writes all settled records to the store, and those of exited processes.

        Raises:
            StoreUnavailable: A write failed; no record is lost, and the next call tries again.
        """
        async with self._flushing:
            while self._waiting:  # all at once: each hop to the database's thread is expensive while the loop is busy
                records = self._waiting[:]
                await self._store.exchanges.put(records)
                del self._waiting[: len(records)]
            journal = self._journal
            if journal is not None and self._is_behind:
                self._is_behind = False
                try:
                    for written in journal.slices():
                        await self._store.exchanges.put(_encoded_settled(written))
                except OSError as error:
                    self._is_behind = True
                    self._degrade(error)
                except BaseException:
                    self._is_behind = True
                    raise
            if self._path != MEMORY and trio.current_time() >= self._orphans_at + ORPHANS_S:
                await self._adopt_orphans()
                self._orphans_at = trio.current_time()
            if journal is not None and journal.size > ROTATE_BYTES and not self._waiting and not self._is_behind:
                try:
                    journal.rotate(self._live.values())
                except OSError as error:
                    self._degrade(error)

    async def adopt(self, worker: str, dead: Sequence[str]) -> None:
        """Writes the records of workers that exited to the store now: before their leases become free
        (`trigate.quotas`)."""
        self._orphans_at = -math.inf
        await self.flush()

    async def _adopt_orphans(self) -> None:
        """Writes the records of killed processes to the store."""
        await trio.lowlevel.checkpoint()
        for path in journals(self._path):
            if path in self._kept:
                continue
            try:
                with take_orphan(path) as orphan:
                    if orphan is not None:
                        await self._adopt(orphan)
            except StoreUnavailable:
                raise
            except Exception as error:  # a damaged file stops neither the other ones nor the gateway
                self._note_unusable(path, f"It cannot be read: {_reason(error)}.")

    async def _adopt(self, orphan: Orphan) -> None:
        lost: dict[str, ExchangeRecord] = {}
        settled = 0
        for records in orphan.slices():
            for record in records:
                if record.outcome == LOST:
                    lost[record.id] = record
                else:
                    lost.pop(record.id, None)
                    settled += 1
            await self._store.exchanges.put(_encoded_settled(records))
        await self._store.exchanges.put([record.encode() for record in lost.values()])
        self._lost += len(lost)
        if lost:
            log.warning("exchanges_lost", count=len(lost), settled=settled, journal=orphan.path)
        try:
            orphan.remove()
        except OSError as error:
            self._kept.add(orphan.path)
            self._note_unusable(orphan.path, f"It cannot be removed: {_reason(error)}.")

    def _note_unusable(self, path: str, reason: str) -> None:
        if self._unusable.get(path) != reason:
            self._unusable[path] = reason
            log.warning("journal_unusable", journal=path, reason=reason)

    async def list(
        self, query: ExchangeQuery = _ANY, *, limit: int, after: str | None = None
    ) -> Sequence[ExchangeRecord]:
        """Returns a page of records, after a flush of those of this process (`store.Exchanges.list`).

        Raises:
            StoreUnavailable: The store cannot be read.
        """
        await self.flush()
        return await self._store.exchanges.list(query, limit=limit, after=after)

    async def close(self) -> None:
        """Writes the remaining records to the store. If that fails, they stay in the journal for the next process."""
        await trio.lowlevel.cancel_shielded_checkpoint()
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            if self._begun:
                await self._try_flush()
        is_done = not self._waiting and not self._is_behind
        if self._journal is not None:
            self._journal.close(remove=is_done)
        if not is_done and (self._journal is None or self._error is not None):
            self._dropped += len(self._waiting)
        if self._dropped:
            log.error("records_dropped", count=self._dropped)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or repr(error)


def _encoded_settled(records: Iterable[ExchangeRecord]) -> list[bytes]:
    return [record.encode() for record in records if record.outcome != LOST]


@asynccontextmanager
async def open_ledger(store: Store, *, worker: str | None = None) -> AsyncIterator[Ledger]:
    """Opens the ledger for a block. Before the first exchange, no file is made and the store is not opened.

    Args:
        worker: The id of the worker, which its records have, and by which they count for its leases.
    """
    ledger = Ledger(store, worker)
    try:
        async with open_service(ledger.run):
            yield ledger
    finally:
        await ledger.close()  # noqa: ASYNC102 - shielded, with a deadline of its own
