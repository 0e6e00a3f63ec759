"""A store that ends with the process: for ``[store] path = ":memory:"``, and for tests.

Its tables are dicts. There is no thread and no file, so it also works where time is virtual. A write is done when it is
called; to await it is a checkpoint, and no more.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import attrs
import msgspec
import trio

from trigate.errors import StoreUnavailable
from trigate.store.interface import Write
from trigate.store.operations import Receipt, StoreOperations, Tables
from trigate.store.records import (
    ENDED,
    LOST,
    ChannelRecord,
    Delivery,
    ExchangeRecord,
    Message,
    Run,
    Session,
    SessionCounts,
    StoreStatistics,
    Ticket,
    Worker,
)

T = TypeVar("T")
Key = tuple[str, str]

_record = msgspec.json.Decoder(ExchangeRecord)


class MemoryTables:
    """A `ledger.Tables` of dicts, each in the order in which its values were first put."""

    def __init__(self) -> None:
        self._sessions: dict[Key, Session] = {}
        self._messages: dict[Key, list[Message]] = {}
        self._tickets: dict[int, Ticket] = {}
        self._last_ticket = 0
        self._runs: dict[str, Run] = {}
        self._claims: dict[Key, tuple[bytes, str]] = {}
        self._deliveries: dict[str, Delivery] = {}
        self._channels: dict[str, ChannelRecord] = {}
        self._workers: dict[str, Worker] = {}
        self._exchanges: dict[str, ExchangeRecord] = {}

    # -- sessions

    def _busy(self) -> set[Key]:
        return {(ticket.owner, ticket.key) for ticket in self._tickets.values()}

    def session(self, owner: str, key: str) -> Session | None:
        session = self._sessions.get((owner, key))
        return session and attrs.evolve(session, busy=(owner, key) in self._busy())

    def put_session(self, session: Session) -> None:
        self._sessions[session.owner, session.key] = session

    def drop_session(self, owner: str, key: str) -> int:
        if self._sessions.pop((owner, key), None) is None:
            return 0
        return 1 + len(self._messages.pop((owner, key), ()))

    def sessions(self, owner: str, *, limit: int, after: Session | None) -> Sequence[Session]:
        def place(session: Session) -> tuple[float, str]:
            return -session.active_at, session.key

        busy = self._busy()
        found = sorted((each for each in self._sessions.values() if each.owner == owner), key=place)
        start = 0 if after is None else bisect.bisect_right(found, place(after), key=place)
        return [attrs.evolve(each, busy=(owner, each.key) in busy) for each in found[start : start + limit]]

    def count_sessions(self, active_since: float) -> SessionCounts:
        busy = self._busy()
        heard = {key for key, session in self._sessions.items() if session.active_at >= active_since}
        return SessionCounts(total=len(busy | self._sessions.keys()), active=len(busy | heard), busy=len(busy))

    def idle_sessions(self, before: float, *, limit: int) -> Sequence[Session]:
        busy = self._busy()
        idle = (each for key, each in self._sessions.items() if each.active_at < before and key not in busy)
        return sorted(idle, key=lambda each: each.active_at)[:limit]

    def last_message(self, owner: str, key: str, epoch: int | None = None) -> Message | None:
        messages = self._messages.get((owner, key), [])
        return next((each for each in reversed(messages) if epoch is None or each.epoch == epoch), None)

    def add_message(self, owner: str, key: str, message: Message) -> None:
        self._messages.setdefault((owner, key), []).append(message)

    def history(self, owner: str, key: str, epoch: int, *, last: int) -> Sequence[Message]:
        current = [each for each in self._messages.get((owner, key), ()) if each.epoch == epoch]
        return current[max(0, len(current) - last) :]

    def messages(self, owner: str, key: str, epoch: int | None, *, limit: int, after: int) -> Sequence[Message]:
        return [
            each
            for each in self._messages.get((owner, key), ())
            if each.number > after and (epoch is None or each.epoch == epoch)
        ][:limit]

    def drop_archived(self, before: float, *, limit: int) -> int:
        dropped = 0
        for key, messages in self._messages.items():
            epoch = self._sessions[key].epoch
            old = [each for each in messages if each.epoch < epoch and each.at < before][: limit - dropped]
            gone = {each.number for each in old}
            self._messages[key] = [each for each in messages if each.number not in gone]
            dropped += len(old)
        return dropped

    # -- the queues of their turns

    def add_ticket(self, owner: str, key: str, worker: str, run: str | None) -> Ticket:
        self._last_ticket += 1
        ticket = Ticket(number=self._last_ticket, owner=owner, key=key, worker=worker, run=run)
        self._tickets[ticket.number] = ticket
        return ticket

    def tickets(self, owner: str, key: str) -> Sequence[Ticket]:
        return [each for each in self._tickets.values() if (each.owner, each.key) == (owner, key)]

    def ticket_of(self, run: str) -> Ticket | None:
        return next((each for each in self._tickets.values() if each.run == run), None)

    def put_ticket(self, ticket: Ticket) -> None:
        self._tickets[ticket.number] = ticket

    def drop_ticket(self, ticket: Ticket) -> None:
        held = self._tickets.get(ticket.number)
        if held is not None and held.worker == ticket.worker:
            del self._tickets[ticket.number]

    # -- runs

    def run(self, run_id: str) -> Run | None:
        return self._runs.get(run_id)

    def put_run(self, run: Run) -> None:
        self._runs[run.id] = run

    def drop_run(self, run_id: str) -> int:
        of_it = [each.id for each in self.deliveries(run_id)]
        for delivery_id in of_it:
            del self._deliveries[delivery_id]
        self.drop_claims(run_id)
        del self._runs[run_id]
        return 1 + len(of_it)

    def unfinished_of(self, workers: Sequence[str]) -> Sequence[Run]:
        return [each for each in self._runs.values() if each.state not in ENDED and each.worker in workers]

    def count_unfinished(self, channel: str) -> int:
        return sum(each.state not in ENDED and each.channel == channel for each in self._runs.values())

    def count_runs(self) -> int:
        return len(self._runs)

    def settled_runs(self, before: float, *, limit: int) -> Sequence[Run]:
        open_ones = {each.run_id for each in self._deliveries.values() if _is_open(each)}
        found = [
            (each.finished_at, number, each)
            for number, each in enumerate(self._runs.values())
            if each.state in ENDED
            and each.finished_at is not None
            and each.finished_at < before
            and each.id not in open_ones
        ]
        return [each for *_, each in sorted(found, key=lambda entry: entry[:2])[:limit]]

    def claimed(self, scope: str, key: str) -> tuple[bytes, str] | None:
        return self._claims.get((scope, key))

    def put_claim(self, scope: str, key: str, digest: bytes, run_id: str) -> None:
        self._claims[scope, key] = digest, run_id

    def drop_claims(self, run_id: str) -> None:
        for key in [key for key, (_, claimed) in self._claims.items() if claimed == run_id]:
            del self._claims[key]

    # -- deliveries

    def delivery(self, delivery_id: str) -> Delivery | None:
        return self._deliveries.get(delivery_id)

    def put_delivery(self, delivery: Delivery) -> None:
        self._deliveries[delivery.id] = delivery

    def due(self, at: float, channels: Sequence[str], *, limit: int) -> Sequence[Delivery]:
        busy = {(each.channel, each.target) for each in self._deliveries.values() if each.state == "sending"}
        first: dict[Key, Delivery] = {}
        for each in sorted(self._deliveries.values(), key=lambda each: each.due_at):
            target = each.channel, each.target
            if each.state == "pending" and each.due_at <= at and each.channel in channels and target not in busy:
                first.setdefault(target, each)
        return list(first.values())[:limit]

    def sending(self, workers: Sequence[str]) -> Sequence[Delivery]:
        return [each for each in self._deliveries.values() if each.state == "sending" and each.worker in workers]

    def deliveries(self, run_id: str) -> Sequence[Delivery]:
        return [each for each in self._deliveries.values() if each.run_id == run_id]

    def depth(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for each in self._deliveries.values():
            if _is_open(each):
                counts[each.channel] = counts.get(each.channel, 0) + 1
        return counts

    def drop_orphans(self, before: float, *, limit: int) -> int:
        gone = [
            each.id
            for each in self._deliveries.values()
            if not _is_open(each)
            and each.run_id not in self._runs
            and (each.due_at if each.done_at is None else each.done_at) < before
        ][:limit]
        for delivery_id in gone:
            del self._deliveries[delivery_id]
        return len(gone)

    # -- channels and workers

    def channel(self, name: str) -> ChannelRecord | None:
        return self._channels.get(name)

    def put_channel(self, channel: ChannelRecord) -> None:
        self._channels[channel.name] = channel

    def channels(self) -> Sequence[ChannelRecord]:
        return [self._channels[name] for name in sorted(self._channels)]

    def put_worker(self, worker: Worker) -> None:
        self._workers[worker.id] = worker

    def workers(self) -> Sequence[Worker]:
        return sorted(self._workers.values(), key=lambda each: (each.started_at, each.id))

    def drop_worker(self, worker_id: str) -> None:
        self._workers.pop(worker_id, None)
        self._tickets = {number: each for number, each in self._tickets.items() if each.worker != worker_id}
        for name, record in self._channels.items():
            if record.holder == worker_id:
                self._channels[name] = attrs.evolve(record, holder=None)

    # -- exchanges

    def put_exchanges(self, records: Sequence[bytes]) -> None:
        for record in map(_record.decode, records):
            kept = self._exchanges.get(record.id)
            if kept is None or kept.outcome == LOST:
                self._exchanges[record.id] = record

    def exchanges(
        self, *, limit: int, owner: str | None, outcome: str | None, after: str | None
    ) -> Sequence[ExchangeRecord]:
        found = reversed(self._exchanges.values())
        if after is not None:
            for each in found:
                if each.id == after:
                    break
        meant = (each for each in found if owner in (None, each.owner) and outcome in (None, each.outcome))
        return list(itertools.islice(meant, limit))

    def drop_exchanges(self, before: float, *, most: int, limit: int) -> int:
        excess = len(self._exchanges) - most
        oldest = itertools.islice(self._exchanges.values(), limit)
        gone = [each.id for number, each in enumerate(oldest) if number < excess or each.started_at < before]
        for record_id in gone:
            del self._exchanges[record_id]
        return len(gone)

    def touch(self) -> None:
        pass


def _is_open(delivery: Delivery) -> bool:
    return delivery.state in ("pending", "sending")


class MemoryStore(StoreOperations):
    """Made by `open_memory_store`.

    Attributes:
        failure: Why everything raises `StoreUnavailable`, for tests; None = it does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None
        self._tables: Tables = MemoryTables()

    def write(self, operation: Callable[[Tables], T], *, durable: bool = True) -> Write[T]:
        receipt = Receipt[T]()
        try:
            receipt.settle(self._run(operation))
        except (StoreUnavailable, ValueError) as error:
            receipt.fail(error)
        return receipt

    def write_slices(self, operation: Callable[[Tables], int]) -> Write[int]:
        return self.write(lambda tables: sum(iter(lambda: operation(tables), 0)))

    async def read(self, operation: Callable[[Tables], T]) -> T:
        await trio.lowlevel.checkpoint()
        return self._run(operation)

    def _run(self, operation: Callable[[Tables], T]) -> T:
        if self.failure is not None:
            raise StoreUnavailable(f"The store cannot be used: {self.failure}")
        return operation(self._tables)

    def statistics(self) -> StoreStatistics:
        return StoreStatistics(
            kind="memory",
            path=":memory:",
            state="open" if self.failure is None else "unavailable",
            error=self.failure,
        )


@asynccontextmanager
async def open_memory_store() -> AsyncIterator[MemoryStore]:
    """Opens a store around a block; what is in it ends with it."""
    await trio.lowlevel.checkpoint()
    yield MemoryStore()
