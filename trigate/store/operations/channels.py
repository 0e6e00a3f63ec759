"""Operations on channels and on workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from trigate.store.interface import Write
from trigate.store.operations.transactions import Transactions
from trigate.store.records import ChannelRecord, Worker
from trigate.store.tables import Tables


def count_events(tables: Tables, name: str, *, at: float, received: int = 0, replied: int = 0) -> None:
    """Adds to the counters of a channel."""
    record = _channel(tables, name)
    tables.put_channel(
        attrs.evolve(
            record,
            received=record.received + received,
            replied=record.replied + replied,
            last_event_at=at if record.last_event_at is None else max(record.last_event_at, at),
        )
    )


def _channel(tables: Tables, name: str) -> ChannelRecord:
    return tables.channel(name) or ChannelRecord(name=name)


@attrs.define(eq=False, slots=False)
class ChannelOperations:
    """Implements `interface.Channels`, which documents the methods."""

    _transactions: Transactions

    def advance(self, name: str, cursor: str) -> Write[None]:
        """Changes the cursor alone."""
        return self._transactions.write(
            lambda tables: tables.put_channel(attrs.evolve(_channel(tables, name), cursor=cursor))
        )

    def count(self, name: str, *, at: float, received: int = 0, replied: int = 0) -> Write[None]:
        return self._transactions.write(
            lambda tables: count_events(tables, name, at=at, received=received, replied=replied), durable=False
        )

    def hold(self, name: str, *, worker: str, dead: Iterable[str]) -> Write[bool]:
        """Returns False if a worker that is not in ``dead`` holds the channel."""
        free = {None, worker, *dead}

        def operation(tables: Tables) -> bool:
            record = _channel(tables, name)
            if record.holder not in free:
                return False
            tables.put_channel(attrs.evolve(record, holder=worker))
            return True

        return self._transactions.write(operation)

    def let_go(self, name: str, *, worker: str) -> Write[None]:
        """Changes nothing if another worker holds the channel."""

        def operation(tables: Tables) -> None:
            record = tables.channel(name)
            if record is not None and record.holder == worker:
                tables.put_channel(attrs.evolve(record, holder=None))

        return self._transactions.write(operation)

    async def all(self) -> Sequence[ChannelRecord]:
        """Returns the channels ordered by name."""
        return await self._transactions.read(lambda tables: tables.channels())


@attrs.define(eq=False, slots=False)
class WorkerOperations:
    """Implements `interface.Workers`, which documents the methods."""

    _transactions: Transactions

    def heartbeat(self, worker: Worker) -> Write[None]:
        """Replaces the worker's row."""
        return self._transactions.write(lambda tables: tables.put_worker(worker), durable=False)

    async def all(self) -> Sequence[Worker]:
        """Returns the workers, the oldest first."""
        return await self._transactions.read(lambda tables: tables.workers())

    def remove(self, ids: Iterable[str]) -> Write[None]:
        """Ignores an unknown id."""
        removed = tuple(ids)

        def operation(tables: Tables) -> None:
            for worker_id in removed:
                tables.drop_worker(worker_id)

        return self._transactions.write(operation)
