"""The operations of a whole store: its parts put together, the records of exchanges, and the deletion of old rows."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from functools import partial

import attrs
import trio

from trigate.store import interface
from trigate.store.interface import Write
from trigate.store.operations.channels import ChannelOperations, WorkerOperations
from trigate.store.operations.deliveries import DeliveryOperations
from trigate.store.operations.keys import KeyOperations
from trigate.store.operations.runs import IdempotencyOperations, RunOperations
from trigate.store.operations.sessions import SessionOperations
from trigate.store.operations.transactions import Transactions
from trigate.store.records import (
    ExchangeRecord,
    Lease,
    LeaseWish,
    ReasoningRecord,
    Retention,
    StoredResponse,
    StoreStatistics,
    UpstreamObject,
)
from trigate.store.reports import ExchangeQuery, UsageColumn, UsageTotals
from trigate.store.tables import Tables

PRUNE_SLICE = 100
"""How many rows of each kind one transaction deletes (sessions, archived messages, runs); ten times as many records of
exchanges."""

_IDS_AT_ONCE = 1000
_ANY = ExchangeQuery()


class StoreOperations(Transactions):
    """An `interface.Store` except for where its tables are and how an operation reaches them (`Transactions`)."""

    def __init__(self) -> None:
        self.sessions: interface.Sessions = SessionOperations(self)
        self.runs: interface.Runs = RunOperations(self)
        self.idempotency: interface.Idempotency = IdempotencyOperations(self)
        self.deliveries: interface.Deliveries = DeliveryOperations(self)
        self.channels: interface.Channels = ChannelOperations(self)
        self.workers: interface.Workers = WorkerOperations(self)
        self.exchanges: interface.Exchanges = ExchangeOperations(self)
        self.objects: interface.Objects = ObjectOperations(self)
        self.reasoning: interface.Reasoning = ReasoningOperations(self)
        self.responses: interface.Responses = ResponseOperations(self)
        self.quotas: interface.Quotas = QuotaOperations(self)
        self.keys: interface.Keys = KeyOperations(self)

    @abc.abstractmethod
    def statistics(self) -> StoreStatistics:
        """Returns the state of the store. Never blocks."""

    def secret(self, name: str, new: bytes) -> Write[bytes]:
        """Returns the secret of that name, which is made if there is none."""
        return self.write(lambda tables: tables.secret(name, new))

    def prune(self, retention: Retention) -> Write[int]:
        """Deletes what the retention does not keep, in slices; returns how many rows."""
        return self.write_slices(lambda tables: _prune(tables, retention))

    async def check(self) -> None:
        """Checks that the store can be written to.

        Raises:
            StoreUnavailable: It cannot.
        """
        await self.write(lambda tables: tables.touch(), durable=False)


def _prune(tables: Tables, retention: Retention) -> int:
    """Deletes one slice; returns how many rows."""
    idle = tables.idle_sessions(retention.sessions_before, limit=PRUNE_SLICE)
    if not idle and (excess := tables.count_sessions(math.inf).total - retention.max_sessions) > 0:
        idle = tables.idle_sessions(math.inf, limit=min(excess, PRUNE_SLICE))
    runs = tables.settled_runs(retention.runs_before, limit=PRUNE_SLICE)
    if not runs and (excess := tables.count_runs() - retention.max_runs) > 0:
        runs = tables.settled_runs(math.inf, limit=min(excess, PRUNE_SLICE))
    return (
        sum(tables.drop_session(session.owner, session.key) for session in idle)
        + sum(tables.drop_run(run.id) for run in runs)
        + tables.drop_archived(retention.archives_before, limit=PRUNE_SLICE)
        + tables.drop_orphans(retention.runs_before, limit=PRUNE_SLICE)
        + tables.drop_exchanges(retention.exchanges_before, most=retention.max_exchanges, limit=10 * PRUNE_SLICE)
        + tables.drop_usage(int(retention.usage_before // 3600), limit=10 * PRUNE_SLICE)
        + tables.drop_objects(retention.objects_before, most=retention.max_objects, limit=10 * PRUNE_SLICE)
        + tables.drop_reasoning(retention.reasoning_before, limit=PRUNE_SLICE)
        + tables.drop_responses(retention.responses_before, most=retention.max_responses, limit=PRUNE_SLICE)
    )


@attrs.define(eq=False, slots=False)
class ExchangeOperations:
    """Implements `interface.Exchanges`, which documents the methods."""

    _transactions: Transactions

    def put(self, records: Sequence[bytes]) -> Write[None]:
        return self._transactions.write(lambda tables: tables.put_exchanges(records), durable=False)

    async def list(
        self, query: ExchangeQuery = _ANY, *, limit: int, after: str | None = None
    ) -> Sequence[ExchangeRecord]:
        return await self._transactions.read(lambda tables: tables.exchanges(query, limit=limit, after=after))

    async def usage(
        self,
        columns: Sequence[UsageColumn],
        first: int,
        end: int,
        *,
        owner: str | None = None,
        model: str | None = None,
    ) -> Sequence[UsageTotals]:
        return await self._transactions.read(lambda tables: tables.usage(columns, first, end, owner=owner, model=model))

    async def hours_used(self) -> tuple[int, int] | None:
        return await self._transactions.read(lambda tables: tables.hours_used())


@attrs.define(eq=False, slots=False)
class ObjectOperations:
    """Implements `interface.Objects`, which documents the methods."""

    _transactions: Transactions

    def note(self, objects: Sequence[UpstreamObject], *, durable: bool = True) -> Write[None]:
        noted = tuple(objects)

        def operation(tables: Tables) -> None:
            for each in noted:
                tables.note_object(each)

        return self._transactions.write(operation, durable=durable)

    async def find(self, ids: Sequence[str]) -> Sequence[UpstreamObject]:
        await trio.lowlevel.checkpoint()
        found: list[UpstreamObject] = []
        for at in range(0, len(ids), _IDS_AT_ONCE):
            found += await self._transactions.read(partial(Tables.objects, ids=ids[at : at + _IDS_AT_ONCE]))
        return found

    def drop(self, object_id: str, upstream: str) -> Write[None]:
        return self._transactions.write(lambda tables: tables.drop_object(object_id, upstream), durable=False)


@attrs.define(eq=False, slots=False)
class ReasoningOperations:
    """Implements `interface.Reasoning`, which documents the methods."""

    _transactions: Transactions

    def put(self, entries: Sequence[ReasoningRecord], *, most: int) -> Write[None]:
        return self._transactions.write(lambda tables: tables.put_reasoning(entries, most=most), durable=False)

    async def get(self, owner: str, calls: Sequence[str], *, since: float) -> Mapping[str, bytes]:
        return await self._transactions.read(lambda tables: tables.reasoning(owner, calls, since))


@attrs.define(eq=False, slots=False)
class ResponseOperations:
    """Implements `interface.Responses`, which documents the methods."""

    _transactions: Transactions

    def put(self, response: StoredResponse) -> Write[None]:
        return self._transactions.write(lambda tables: tables.put_response(response))

    async def get(self, owner: str | None, response_id: str) -> StoredResponse | None:
        return await self._transactions.read(lambda tables: tables.response(owner, response_id))

    def delete(self, owner: str, response_id: str) -> Write[bool]:
        return self._transactions.write(lambda tables: tables.drop_response(owner, response_id) > 0)


@attrs.define(eq=False, slots=False)
class QuotaOperations:
    """Implements `interface.Quotas`, which documents the methods."""

    _transactions: Transactions

    def lease(self, wish: LeaseWish) -> Write[Lease]:
        return self._transactions.write(lambda tables: tables.lease(wish), durable=False)

    def give_back(self, wish: LeaseWish, amount: int) -> Write[None]:
        return self._transactions.write(lambda tables: tables.give_back(wish, amount), durable=False)

    async def spent(self, scope: str, *, first_day: int, end_day: int) -> int:
        return await self._transactions.read(lambda tables: tables.spent(scope, first_day, end_day))
