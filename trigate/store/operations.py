"""What the operations of a store do: written once, over tables that each store keeps in its own way.

An operation is a synchronous function of `Tables`. It reads values, and puts back what they have become. What is left
to a store is to keep the tables (`Tables`), and to run operations in order, each one whole or not at all
(`StoreOperations.write`, `StoreOperations.read`).

An operation looks before it changes anything: it raises ValueError for a mistake of its caller (an id that is there
already) while the tables are as they were. So it is whole also where nothing can be rolled back.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import attrs
import trio

from trigate.errors import Draining
from trigate.store import interface
from trigate.store.interface import Write
from trigate.store.records import (
    ENDED,
    ChannelRecord,
    Claim,
    Delivery,
    DeliveryState,
    ExchangeRecord,
    Message,
    Retention,
    Run,
    RunState,
    Session,
    SessionCounts,
    StoreStatistics,
    Ticket,
    Turn,
    Worker,
)

T = TypeVar("T")

SENDER_ENDED = "the process that was sending it has ended"
"""Said of a delivery that a dead worker was making (`Delivery.last_error`)."""
PRUNE_SLICE = 100
"""How many sessions, archived messages and runs are forgotten in one transaction, of each; of records of exchanges, ten
times as many."""


class Tables(Protocol):
    """The tables of a store, as an operation sees them: inside of one transaction.

    ``put_…`` keeps a value in the place of the one with the same identity. ``drop_…`` of what is not there does
    nothing. What is said of the order and the limits of a store's methods holds here.
    """

    # sessions
    def session(self, owner: str, key: str) -> Session | None: ...
    def put_session(self, session: Session) -> None: ...
    def drop_session(self, owner: str, key: str) -> int:
        """Drops it with all its messages; returns how many rows."""

    def sessions(self, owner: str, *, limit: int, after: Session | None) -> Sequence[Session]: ...
    def count_sessions(self, active_since: float) -> SessionCounts: ...
    def idle_sessions(self, before: float, *, limit: int) -> Sequence[Session]:
        """Those that are not busy and were last active before a time, the longest idle first."""

    def last_message(self, owner: str, key: str, epoch: int | None = None) -> Message | None: ...
    def add_message(self, owner: str, key: str, message: Message) -> None: ...
    def history(self, owner: str, key: str, epoch: int, *, last: int) -> Sequence[Message]: ...
    def messages(self, owner: str, key: str, epoch: int | None, *, limit: int, after: int) -> Sequence[Message]: ...
    def drop_archived(self, before: float, *, limit: int) -> int:
        """Drops messages of earlier epochs from before a time; returns how many."""

    # the queues of their turns
    def add_ticket(self, owner: str, key: str, worker: str, run: str | None) -> Ticket:
        """Makes one whose number is higher than any that there ever was."""

    def tickets(self, owner: str, key: str) -> Sequence[Ticket]: ...
    def ticket_of(self, run: str) -> Ticket | None: ...
    def put_ticket(self, ticket: Ticket) -> None: ...
    def drop_ticket(self, ticket: Ticket) -> None:
        """Drops it, unless another worker has taken it over meanwhile."""

    # runs
    def run(self, run_id: str) -> Run | None: ...
    def put_run(self, run: Run) -> None: ...
    def drop_run(self, run_id: str) -> int:
        """Drops it with its deliveries and idempotency keys; returns how many rows."""

    def unfinished_of(self, workers: Sequence[str]) -> Sequence[Run]:
        """Those of some workers that have not ended, in the order in which they were added."""

    def count_unfinished(self, channel: str) -> int: ...
    def count_runs(self) -> int: ...
    def settled_runs(self, before: float, *, limit: int) -> Sequence[Run]:
        """Those that ended before a time and have nothing left to deliver, the oldest first."""

    def claimed(self, scope: str, key: str) -> tuple[bytes, str] | None:
        """The digest and the run of an idempotency key."""

    def put_claim(self, scope: str, key: str, digest: bytes, run_id: str) -> None: ...
    def drop_claims(self, run_id: str) -> None: ...

    # deliveries
    def delivery(self, delivery_id: str) -> Delivery | None: ...
    def put_delivery(self, delivery: Delivery) -> None: ...
    def due(self, at: float, channels: Sequence[str], *, limit: int) -> Sequence[Delivery]:
        """What can be taken at a time: the first one to each target, where nothing is being sent to it."""

    def sending(self, workers: Sequence[str]) -> Sequence[Delivery]: ...
    def deliveries(self, run_id: str) -> Sequence[Delivery]: ...
    def depth(self) -> dict[str, int]: ...
    def drop_orphans(self, before: float, *, limit: int) -> int:
        """Drops deliveries that are done since before a time and belong to no run; returns how many."""

    # channels and workers
    def channel(self, name: str) -> ChannelRecord | None: ...
    def put_channel(self, channel: ChannelRecord) -> None: ...
    def channels(self) -> Sequence[ChannelRecord]: ...
    def put_worker(self, worker: Worker) -> None: ...
    def workers(self) -> Sequence[Worker]: ...
    def drop_worker(self, worker_id: str) -> None:
        """Drops it with its tickets, and takes its channels from it."""

    # exchanges
    def put_exchanges(self, records: Sequence[bytes]) -> None: ...
    def exchanges(
        self, *, limit: int, owner: str | None, outcome: str | None, after: str | None
    ) -> Sequence[ExchangeRecord]: ...
    def drop_exchanges(self, before: float, *, most: int, limit: int) -> int:
        """Drops the oldest that are from before a time, or more than so many; returns how many."""

    def touch(self) -> None:
        """Changes something that nobody reads."""


class Receipt(Generic[T]):
    """A `store.Write` whose result comes later: `settle` or `fail`, once."""

    __slots__ = ("_done", "_error", "_is_done", "_result")

    def __init__(self) -> None:
        self._done: trio.Event | None = None
        self._is_done = False
        self._error: Exception | None = None
        self._result: T

    def settle(self, result: T) -> None:
        """It was done."""
        self._result = result
        self._end()

    def fail(self, error: Exception) -> None:
        """It was not done. Nobody need ask why."""
        self._error = error
        self._end()

    def _end(self) -> None:
        self._is_done = True
        if self._done is not None:
            self._done.set()

    async def _wait(self) -> T:
        if self._is_done:
            await trio.lowlevel.checkpoint()
        else:
            self._done = trio.Event()
            await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result

    def __await__(self) -> Generator[Any, Any, T]:
        return self._wait().__await__()


class StoreOperations(abc.ABC):
    """A `store.Store`, but for where its tables are and how operations get there."""

    def __init__(self) -> None:
        self.sessions: interface.Sessions = _Sessions(self)
        self.runs: interface.Runs = _Runs(self)
        self.idempotency: interface.Idempotency = _Idempotency(self)
        self.deliveries: interface.Deliveries = _Deliveries(self)
        self.channels: interface.Channels = _Channels(self)
        self.workers: interface.Workers = _Workers(self)
        self.exchanges: interface.Exchanges = _Exchanges(self)

    @abc.abstractmethod
    def write(self, operation: Callable[[Tables], T], *, durable: bool = True) -> Write[T]:
        """Queues an operation that changes something. What it raises, the write raises."""

    @abc.abstractmethod
    def write_slices(self, operation: Callable[[Tables], int]) -> Write[int]:
        """Queues an operation that is repeated, each time in a transaction of its own and behind what was queued
        meanwhile, until it returns 0; the result is the sum. Not durable."""

    @abc.abstractmethod
    async def read(self, operation: Callable[[Tables], T]) -> T:
        """Runs an operation that changes nothing."""

    @abc.abstractmethod
    def statistics(self) -> StoreStatistics:
        """How it is. Does not wait."""

    def prune(self, retention: Retention) -> Write[int]:
        """Forgets what may be forgotten, in slices; returns how many rows."""
        return self.write_slices(lambda tables: _prune(tables, retention))

    async def check(self) -> None:
        """Raises `StoreUnavailable` where nothing could be written now."""
        await self.write(lambda tables: tables.touch(), durable=False)


def _prune(tables: Tables, retention: Retention) -> int:
    """Forgets one slice; returns how many rows."""
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
    )


# -- sessions ---------------------------------------------------------------------------------------------------------


def _append(tables: Tables, turn: Turn) -> Session:
    owner, key = turn.owner, turn.key
    session = tables.session(owner, key) or Session(owner=owner, key=key, created_at=turn.at, active_at=turn.at)
    is_current = turn.epoch is None or turn.epoch >= session.epoch
    epoch = session.epoch if turn.epoch is None or is_current else turn.epoch
    if is_current:
        session = attrs.evolve(
            session,
            active_at=max(session.active_at, turn.at),
            turns=session.turns + 1,
            messages=session.messages + len(turn.messages),
            tokens=session.tokens + sum(message.tokens for message in turn.messages),
            system=session.system if turn.system is None else turn.system,
        )
        tables.put_session(session)
        number_of_turn = session.turns
    else:
        before = tables.last_message(owner, key, epoch)
        number_of_turn = before.turn + 1 if before else 1
    last = tables.last_message(owner, key)
    for number, message in enumerate(turn.messages, last.number + 1 if last else 1):
        tables.add_message(owner, key, attrs.evolve(message, number=number, epoch=epoch, turn=number_of_turn))
    return session


def _reset(tables: Tables, owner: str, key: str, at: float) -> Session | None:
    session = tables.session(owner, key)
    if session is None:
        return None
    begun = attrs.evolve(
        session,
        epoch=session.epoch + 1,
        active_at=max(session.active_at, at),
        turns=0,
        messages=0,
        tokens=0,
        system=b"[]",
    )
    tables.put_session(begun)
    return begun


class _Sessions:
    def __init__(self, ledger: StoreOperations) -> None:
        self._ledger = ledger

    def take_ticket(self, owner: str, key: str, *, worker: str, run: str | None = None) -> Write[Ticket]:
        def operation(tables: Tables) -> Ticket:
            kept = tables.ticket_of(run) if run is not None else None
            return kept or tables.add_ticket(owner, key, worker, run)

        return self._ledger.write(operation, durable=False)

    async def tickets(self, owner: str, key: str) -> Sequence[Ticket]:
        return await self._ledger.read(lambda tables: tables.tickets(owner, key))

    def leave(self, ticket: Ticket) -> Write[None]:
        return self._ledger.write(lambda tables: tables.drop_ticket(ticket), durable=False)

    def append(self, turn: Turn, *, leave: Ticket | None = None) -> Write[Session]:
        def operation(tables: Tables) -> Session:
            if leave is not None:
                tables.drop_ticket(leave)
            session = _append(tables, turn)
            return attrs.evolve(session, busy=bool(tables.tickets(turn.owner, turn.key)))

        return self._ledger.write(operation)

    async def get(self, owner: str, key: str) -> Session | None:
        return await self._ledger.read(lambda tables: tables.session(owner, key))

    async def history(self, owner: str, key: str, *, last: int) -> tuple[Session, Sequence[Message]] | None:
        def operation(tables: Tables) -> tuple[Session, Sequence[Message]] | None:
            session = tables.session(owner, key)
            return None if session is None else (session, tables.history(owner, key, session.epoch, last=last))

        return await self._ledger.read(operation)

    async def messages(
        self, owner: str, key: str, *, limit: int, after: int = 0, archived: bool = False
    ) -> Sequence[Message] | None:
        def operation(tables: Tables) -> Sequence[Message] | None:
            session = tables.session(owner, key)
            if session is None:
                return None
            return tables.messages(owner, key, None if archived else session.epoch, limit=limit, after=after)

        return await self._ledger.read(operation)

    async def list(self, owner: str, *, limit: int, after: str | None = None) -> Sequence[Session]:
        def operation(tables: Tables) -> Sequence[Session]:
            last = None if after is None else tables.session(owner, after)
            return [] if after is not None and last is None else tables.sessions(owner, limit=limit, after=last)

        return await self._ledger.read(operation)

    async def count(self, *, active_since: float) -> SessionCounts:
        return await self._ledger.read(lambda tables: tables.count_sessions(active_since))

    def reset(self, owner: str, key: str, *, at: float) -> Write[Session | None]:
        return self._ledger.write(lambda tables: _reset(tables, owner, key, at))

    def delete(self, owner: str, key: str) -> Write[bool]:
        return self._ledger.write(lambda tables: tables.drop_session(owner, key) > 0)


# -- runs -------------------------------------------------------------------------------------------------------------


def _add_run(tables: Tables, run: Run) -> None:
    if tables.run(run.id) is not None:
        raise ValueError(f"there is a run {run.id} already")
    tables.put_run(run)
    _count(tables, run.channel, at=run.created_at, received=1)


def _adopt(tables: Tables, worker: str, dead: Sequence[str], at: float) -> Sequence[Run]:
    adopted = []
    for run in tables.unfinished_of(dead):
        if run.acknowledged:
            adopted.append(attrs.evolve(run, worker=worker, state="queued"))
            tables.put_run(adopted[-1])
            if ticket := tables.ticket_of(run.id):
                tables.put_ticket(attrs.evolve(ticket, worker=worker))
            continue
        status, _, result = Draining("The process that worked on this has ended; ask again.").to_response()
        tables.put_run(attrs.evolve(run, state="failed", finished_at=at, status=status, result=result))
        tables.drop_claims(run.id)
    return adopted


class _Runs:
    def __init__(self, ledger: StoreOperations) -> None:
        self._ledger = ledger

    def add(self, run: Run) -> Write[None]:
        return self._ledger.write(lambda tables: _add_run(tables, run))

    async def get(self, run_id: str) -> Run | None:
        return await self._ledger.read(lambda tables: tables.run(run_id))

    def acknowledge(self, run_id: str) -> Write[None]:
        def operation(tables: Tables) -> None:
            if run := tables.run(run_id):
                tables.put_run(attrs.evolve(run, acknowledged=True))

        return self._ledger.write(operation)

    def start(self, run_id: str, *, worker: str) -> Write[bool]:
        def operation(tables: Tables) -> bool:
            run = tables.run(run_id)
            if run is None or run.state in ENDED or run.worker != worker:
                return False
            tables.put_run(attrs.evolve(run, state="running", starts=run.starts + 1))
            return True

        return self._ledger.write(operation)

    def finish(
        self,
        run_id: str,
        *,
        state: RunState,
        status: int,
        result: bytes,
        at: float,
        turn: Turn | None = None,
        leave: Ticket | None = None,
        deliveries: Iterable[Delivery] = (),
        frees_key: bool = False,
    ) -> Write[bool]:
        added = tuple(deliveries)

        def operation(tables: Tables) -> bool:
            run = tables.run(run_id)
            is_open = run is not None and run.state not in ENDED
            if is_open:
                _check_new(tables, added)
            if leave is not None:
                tables.drop_ticket(leave)
            if run is None or not is_open:
                return False
            tables.put_run(attrs.evolve(run, state=state, status=status, result=result, finished_at=at))
            if turn is not None:
                _append(tables, turn)
            for delivery in added:
                tables.put_delivery(delivery)
            if state == "completed" and not added:
                _count(tables, run.channel, at=at, replied=1)
            if frees_key:
                tables.drop_claims(run_id)
            return True

        return self._ledger.write(operation)

    def adopt(self, worker: str, *, dead: Iterable[str], at: float) -> Write[Sequence[Run]]:
        gone = tuple(dead)
        return self._ledger.write(lambda tables: _adopt(tables, worker, gone, at))

    async def unfinished(self, channel: str) -> int:
        return await self._ledger.read(lambda tables: tables.count_unfinished(channel))


# -- idempotency ------------------------------------------------------------------------------------------------------


class _Idempotency:
    def __init__(self, ledger: StoreOperations) -> None:
        self._ledger = ledger

    def claim(self, scope: str, key: str, *, digest: bytes, run: Run) -> Write[Claim]:
        def operation(tables: Tables) -> Claim:
            if (claimed := tables.claimed(scope, key)) and (older := tables.run(claimed[1])):
                return Claim(run=older, is_new=False, differs=claimed[0] != digest)
            _add_run(tables, run)
            tables.put_claim(scope, key, digest, run.id)
            return Claim(run=run, is_new=True)

        return self._ledger.write(operation)


# -- deliveries -------------------------------------------------------------------------------------------------------


def _check_new(tables: Tables, deliveries: Iterable[Delivery]) -> None:
    for delivery in deliveries:
        if tables.delivery(delivery.id) is not None:
            raise ValueError(f"there is a delivery {delivery.id} already")


def _take(tables: Tables, worker: str, at: float, limit: int, channels: Sequence[str]) -> Sequence[Delivery]:
    taken = [
        attrs.evolve(delivery, state="sending", worker=worker, attempts=delivery.attempts + 1)
        for delivery in tables.due(at, channels, limit=limit)
    ]
    for delivery in taken:
        tables.put_delivery(delivery)
    return taken


def _release(tables: Tables, dead: Sequence[str]) -> Sequence[Delivery]:
    released = []
    for delivery in tables.sending(dead):
        state: DeliveryState = "pending" if delivery.repeatable else "unknown"
        released.append(attrs.evolve(delivery, state=state, worker=None, last_error=SENDER_ENDED))
        tables.put_delivery(released[-1])
    return released


class _Deliveries:
    def __init__(self, ledger: StoreOperations) -> None:
        self._ledger = ledger

    def add(self, delivery: Delivery) -> Write[None]:
        def operation(tables: Tables) -> None:
            _check_new(tables, [delivery])
            tables.put_delivery(delivery)

        return self._ledger.write(operation)

    def take(self, worker: str, *, at: float, limit: int, channels: Iterable[str]) -> Write[Sequence[Delivery]]:
        names = tuple(channels)
        return self._ledger.write(lambda tables: _take(tables, worker, at, limit, names))

    def note(
        self,
        delivery_id: str,
        *,
        state: DeliveryState,
        at: float,
        due_at: float | None = None,
        status: int = 0,
        error: str | None = None,
    ) -> Write[None]:
        def operation(tables: Tables) -> None:
            delivery = tables.delivery(delivery_id)
            if delivery is None or delivery.state == "delivered":  # who was thought dead may come late
                return
            noted = attrs.evolve(
                delivery,
                state=state,
                worker=delivery.worker if state == "sending" else None,
                due_at=delivery.due_at if due_at is None else due_at,
                done_at=None if state in ("pending", "sending") else at,
                last_status=status,
                last_error=error,
            )
            tables.put_delivery(noted)
            if state == "delivered":
                _count(tables, delivery.channel, at=at, replied=1)

        return self._ledger.write(operation)

    def release(self, *, dead: Iterable[str]) -> Write[Sequence[Delivery]]:
        gone = tuple(dead)
        return self._ledger.write(lambda tables: _release(tables, gone))

    async def of_run(self, run_id: str) -> Sequence[Delivery]:
        return await self._ledger.read(lambda tables: tables.deliveries(run_id))

    async def next_due_at(self, channels: Iterable[str]) -> float | None:
        names = tuple(channels)
        first = await self._ledger.read(lambda tables: tables.due(math.inf, names, limit=1))
        return first[0].due_at if first else None

    async def depth(self) -> dict[str, int]:
        return await self._ledger.read(lambda tables: tables.depth())


# -- channels and workers ---------------------------------------------------------------------------------------------


def _channel(tables: Tables, name: str) -> ChannelRecord:
    return tables.channel(name) or ChannelRecord(name=name)


def _count(tables: Tables, name: str, *, at: float, received: int = 0, replied: int = 0) -> None:
    record = _channel(tables, name)
    tables.put_channel(
        attrs.evolve(
            record,
            received=record.received + received,
            replied=record.replied + replied,
            last_event_at=at if record.last_event_at is None else max(record.last_event_at, at),
        )
    )


class _Channels:
    def __init__(self, ledger: StoreOperations) -> None:
        self._ledger = ledger

    def advance(self, name: str, cursor: str) -> Write[None]:
        return self._ledger.write(
            lambda tables: tables.put_channel(attrs.evolve(_channel(tables, name), cursor=cursor))
        )

    def count(self, name: str, *, at: float, received: int = 0, replied: int = 0) -> Write[None]:
        return self._ledger.write(
            lambda tables: _count(tables, name, at=at, received=received, replied=replied), durable=False
        )

    def hold(self, name: str, *, worker: str, dead: Iterable[str]) -> Write[bool]:
        free = {None, worker, *dead}

        def operation(tables: Tables) -> bool:
            record = _channel(tables, name)
            if record.holder not in free:
                return False
            tables.put_channel(attrs.evolve(record, holder=worker))
            return True

        return self._ledger.write(operation)

    def let_go(self, name: str, *, worker: str) -> Write[None]:
        def operation(tables: Tables) -> None:
            record = tables.channel(name)
            if record is not None and record.holder == worker:
                tables.put_channel(attrs.evolve(record, holder=None))

        return self._ledger.write(operation)

    async def all(self) -> Sequence[ChannelRecord]:
        return await self._ledger.read(lambda tables: tables.channels())


class _Workers:
    def __init__(self, ledger: StoreOperations) -> None:
        self._ledger = ledger

    def beat(self, worker: Worker) -> Write[None]:
        return self._ledger.write(lambda tables: tables.put_worker(worker), durable=False)

    async def all(self) -> Sequence[Worker]:
        return await self._ledger.read(lambda tables: tables.workers())

    def remove(self, ids: Iterable[str]) -> Write[None]:
        gone = tuple(ids)

        def operation(tables: Tables) -> None:
            for worker_id in gone:
                tables.drop_worker(worker_id)

        return self._ledger.write(operation)


# -- exchanges --------------------------------------------------------------------------------------------------------


class _Exchanges:
    def __init__(self, ledger: StoreOperations) -> None:
        self._ledger = ledger

    def put(self, records: Sequence[bytes]) -> Write[None]:
        return self._ledger.write(lambda tables: tables.put_exchanges(records), durable=False)

    async def list(
        self, *, limit: int, owner: str | None = None, outcome: str | None = None, after: str | None = None
    ) -> Sequence[ExchangeRecord]:
        return await self._ledger.read(
            lambda tables: tables.exchanges(limit=limit, owner=owner, outcome=outcome, after=after)
        )
