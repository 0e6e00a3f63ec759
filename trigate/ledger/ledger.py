"""The ledger of exchanges: one record for each, whatever happened to it.

`Ledger.begin` and `Ledger.settle` are synchronous and never fail: a call is not delayed, and not refused, because
its account cannot be kept. Each writes one line to the `journal`, which survives the process; every few seconds a
task brings what was settled into the store, where it can be asked for. A record is in the store at most once, since it
has an id of its own, and it may be brought there twice.

What a process leaves behind that was killed is brought in by the next one that starts, and by those that run: what had
ended as it ended, what had not as ``lost``.

Records wait for the store in memory, at most `MAX_WAITING`. Those that there is no room for are read from the journal
once the store can be written again. Only where there is no journal either (a disk that is full or read-only, a store in
memory) they are dropped, which is counted and logged.
"""

from __future__ import annotations

import itertools
import math
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal

import attrs
import structlog
import trio

from trigate.config.sections import LedgerConfig
from trigate.errors import StoreUnavailable
from trigate.ledger.journal import Journal, take_orphans
from trigate.sessions.compose import estimated_tokens, tokens_of_size
from trigate.store.interface import Store
from trigate.store.opening import MEMORY
from trigate.store.records import LOST, AttemptRecord, ExchangeRecord

if TYPE_CHECKING:
    from trigate.exchange.attempt import Attempt
    from trigate.exchange.exchange import Exchange

log = structlog.get_logger("trigate.ledger.ledger")

FOLD_S = 5.0
"""How long a record waits at most before it is brought into the store."""
LOOK_S = 60.0
"""How often it is looked for journals of processes that have ended."""
RETRY_S = 5.0
"""How soon a journal is tried again that cannot be written."""
END_TIMEOUT_S = 3.0
TURN_BYTES = 4 * 1024 * 1024
"""How long a journal becomes before the next one is begun."""
MAX_WAITING = 50_000
"""Records in memory."""
_MAX_NAME = 256  # of a model: clients write what they like


@attrs.frozen(kw_only=True)
class LedgerStatistics:
    """How the ledger is.

    Attributes:
        state: ``degraded`` = no journal can be written.
        begun, settled: Exchanges of this process, so far.
        lost: Exchanges of processes that were killed, which this one found.
        dropped: Records that there was no room for.
    """

    state: Literal["off", "ok", "degraded"]
    begun: int
    settled: int
    lost: int
    dropped: int
    error: str | None = None


class Ledger:
    """Made by `open_ledger`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._path = store.statistics().path
        self._worker = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._settings = LedgerConfig()
        self._live: dict[Exchange, ExchangeRecord] = {}
        self._journal: Journal | None = None
        self._retry_at = -math.inf
        self._waiting: list[bytes] = []
        self._is_behind = False
        """Records are in the journal that neither wait nor are in the store."""
        self._error: str | None = None
        self._store_error: str | None = None
        self._wake = trio.Event()
        self._folding = trio.Lock()
        self._looked_at = -math.inf
        self._begun = self._settled = self._lost = self._dropped = 0

    def __repr__(self) -> str:
        return f"<Ledger, {len(self._live)} live, {self._settled} settled>"

    def apply(self, settings: LedgerConfig) -> None:
        """Takes new settings. What has begun is settled all the same."""
        self._settings = settings

    def statistics(self) -> LedgerStatistics:
        """How the ledger is. Does not wait."""
        state: Literal["off", "ok", "degraded"] = "degraded" if self._error is not None else "ok"
        return LedgerStatistics(
            state=state if self._settings.enabled else "off",
            begun=self._begun,
            settled=self._settled,
            lost=self._lost,
            dropped=self._dropped,
            error=self._error or self._store_error,
        )

    # -- an exchange

    def begin(self, exchange: Exchange) -> None:
        """Notes that an exchange has begun."""
        if not self._settings.enabled:
            return
        call = exchange.call
        record = self._live[exchange] = ExchangeRecord(
            id=f"ex_{self._worker}_{next(self._numbers)}",
            request_id=exchange.id,
            owner=exchange.owner,
            worker=self._worker,
            endpoint=call.endpoint.path,
            model=call.model[:_MAX_NAME],
            stream=call.stream,
            started_at=time.time(),
        )
        self._begun += 1
        if self._path != MEMORY:
            self._note(record.encode())

    def settle(self, exchange: Exchange) -> None:
        """Notes what became of it; of one that was refused at the door as well."""
        begun = self._live.pop(exchange, None)
        if begun is None:
            return
        self._settled += 1
        record = _settled(begun, exchange).encode()
        is_safe = self._note(record)
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(record)
        elif is_safe:
            self._is_behind = True
        else:
            self._dropped += 1
        if not self._wake.is_set():
            self._wake.set()

    def _note(self, record: bytes) -> bool:
        """Writes a line; returns whether it was."""
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
        reason = f"The journal beside {self._path} cannot be written: {error.strerror}."
        if reason != self._error:
            self._error = reason
            log.error("ledger_degraded", reason=reason, max_waiting=MAX_WAITING)

    # -- bringing it into the store

    async def run(self) -> None:
        """Brings records into the store, for ever."""
        while True:
            try:
                await self.fold()
            except StoreUnavailable as error:
                if error.message != self._store_error:
                    log.warning("ledger_waits", error=error.message)
                self._store_error = error.message
                self._wake.set()
            else:
                self._store_error = None
            with trio.move_on_after(LOOK_S if self._path != MEMORY else math.inf):
                await self._wake.wait()
            await trio.sleep(FOLD_S)  # many share one transaction
            self._wake = trio.Event()

    async def fold(self) -> None:  # noqa: ASYNC910 - there may be nothing to bring
        """Brings all records into the store that are settled now, and those of processes that have ended.

        Raises:
            StoreUnavailable: It could not; nothing is lost, and the next one tries again.
        """
        async with self._folding:
            while self._waiting:  # all at once: each hop to the database's thread is dear while the loop is busy
                records = self._waiting[:]
                await self._store.exchanges.put(records)
                del self._waiting[: len(records)]
            journal = self._journal
            if journal is not None and self._is_behind:
                self._is_behind = False
                try:
                    for written in journal.slices():
                        await self._store.exchanges.put(_of_the_settled(written))
                except BaseException:
                    self._is_behind = True
                    raise
            if self._path != MEMORY and trio.current_time() >= self._looked_at + LOOK_S:
                await self._adopt()
                self._looked_at = trio.current_time()
            if journal is not None and journal.size > TURN_BYTES and not self._waiting and not self._is_behind:
                try:
                    journal.rotate(self._live.values())
                except OSError as error:
                    self._degrade(error)

    async def _adopt(self) -> None:  # noqa: ASYNC910 - nobody may have been killed
        """Brings in what processes have left behind that were killed."""
        with take_orphans(self._path) as orphans:
            for orphan in orphans:
                lost: dict[str, ExchangeRecord] = {}
                settled = 0
                for records in orphan.slices():
                    for record in records:
                        if record.outcome == LOST:
                            lost[record.id] = record
                        else:
                            lost.pop(record.id, None)
                            settled += 1
                    await self._store.exchanges.put(_of_the_settled(records))
                await self._store.exchanges.put([record.encode() for record in lost.values()])
                self._lost += len(lost)
                if lost:
                    log.warning("exchanges_lost", count=len(lost), settled=settled, journal=orphan.path)
                orphan.remove()

    async def list(
        self, *, limit: int, owner: str | None = None, outcome: str | None = None, after: str | None = None
    ) -> Sequence[ExchangeRecord]:
        """A page of records, as `store.Exchanges.list`; of this process, up to now.

        Raises:
            StoreUnavailable: There is no telling.
        """
        await self.fold()
        return await self._store.exchanges.list(limit=limit, owner=owner, outcome=outcome, after=after)

    async def end(self) -> None:  # noqa: ASYNC910 - there may have been nothing
        """Brings in what is left. Where that fails it stays in the journal, for the next process."""
        try:
            with trio.move_on_after(END_TIMEOUT_S, shield=True):
                if self._begun:
                    await self.fold()
        except StoreUnavailable as error:
            log.warning("ledger_waits", error=error.message)
        is_done = not self._waiting and not self._is_behind
        if self._journal is not None:
            self._journal.close(remove=is_done)
        if not is_done and (self._journal is None or self._error is not None):
            self._dropped += len(self._waiting)
        if self._dropped:
            log.error("records_dropped", count=self._dropped)


def _of_the_settled(records: Iterable[ExchangeRecord]) -> list[bytes]:
    return [record.encode() for record in records if record.outcome != LOST]


def _settled(begun: ExchangeRecord, exchange: Exchange) -> ExchangeRecord:
    prompt: int | None = None
    completion: int | None = None
    usage = exchange.usage
    if usage is not None:
        prompt, completion = usage.prompt_tokens, usage.completion_tokens
    elif exchange.is_billed and (exchange.bytes_sent or exchange.events):
        # Nobody has told. An event of a stream is about a token; of the rest, what messages are counted by.
        prompt = estimated_tokens(exchange.call.body)
        completion = exchange.events if exchange.call.stream else tokens_of_size(exchange.bytes_sent)
    return ExchangeRecord(
        id=begun.id,
        request_id=begun.request_id,
        owner=begun.owner,
        worker=begun.worker,
        endpoint=begun.endpoint,
        model=begun.model,
        stream=begun.stream,
        started_at=begun.started_at,
        ended_at=time.time(),
        outcome=exchange.outcome or "",
        status=_status_of(exchange),
        target=str(exchange.target) if exchange.target is not None else None,
        attempts=tuple(_attempted(attempt, exchange.started_at) for attempt in exchange.attempts),
        prompt_tokens=prompt,
        completion_tokens=completion,
        counted=usage is None and prompt is not None,
        events=exchange.events,
        bytes=exchange.bytes_sent,
        first_content_s=exchange.first_content_after_s,
    )


def _status_of(exchange: Exchange) -> int | None:
    """What the client was given; None = it had left (also where its answer was taken on, and that failed)."""
    if exchange.outcome in ("cancelled", "finished"):
        return None
    return exchange.error.status if exchange.error is not None else 200


def _attempted(attempt: Attempt, since: float) -> AttemptRecord:
    error = attempt.error
    return AttemptRecord(
        target=str(attempt.target),
        why=attempt.step.why,
        started_s=attempt.started_at - since,
        duration_s=attempt.ended_at - attempt.started_at if attempt.ended_at is not None else None,
        outcome=attempt.outcome or "cancelled",
        status=error.status if error is not None else None,
        first_content_s=attempt.first_content_after_s,
    )


@asynccontextmanager
async def open_ledger(store: Store) -> AsyncIterator[Ledger]:
    """Opens the ledger around a block. No file is made, and the store is not opened, before the first exchange."""
    accounts = Ledger(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(accounts.run)
        try:
            yield accounts
        finally:
            nursery.cancel_scope.cancel()
            await accounts.end()  # noqa: ASYNC102 - it is shielded, and ends in time
