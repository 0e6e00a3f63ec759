"""The tables of a store: all SQL that reads or changes rows. The schema is in `schema`.

A method reads or writes values of `records`, so an operation contains no SQL. Every query finds its rows by an index;
``tests/store/test_tables.py`` checks the query plans.

Two threads must not use the connection of a `Tables` at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import attrs
import msgspec

from trigate.store.key_tables import KeyTables
from trigate.store.quota_tables import QuotaTables
from trigate.store.reasoning_tables import is_in
from trigate.store.records import (
    LOST,
    ChannelRecord,
    Delivery,
    ExchangeRecord,
    Message,
    Run,
    Session,
    SessionCounts,
    StoredResponse,
    Ticket,
    UpstreamObject,
    Worker,
)
from trigate.store.report_tables import ReportTables, conditions
from trigate.store.reports import ExchangeQuery

T = TypeVar("T")


class _Table(Generic[T]):
    """Maps a value to a row of its table, and back.

    Args:
        key: The columns that identify a row.
        flags: Attributes that are booleans; SQLite stores integers.
        without: An attribute that is not a column.
    """

    def __init__(
        self, kind: type[T], table: str, *, key: Sequence[str], flags: Sequence[str] = (), without: str = ""
    ) -> None:
        fields: Sequence[attrs.Attribute[Any]] = attrs.fields(kind)  # type: ignore[arg-type]
        self._kind = kind
        self._names = [field.name for field in fields if field.name != without]
        self._flags = flags
        others = [name for name in self._names if name not in key]
        self.columns = ", ".join(self._names)
        self.select = f"SELECT {self.columns} FROM {table}"
        self.put = (
            f"INSERT INTO {table} ({self.columns}) VALUES ({', '.join('?' * len(self._names))}) "
            f"ON CONFLICT ({', '.join(key)}) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in others)}"
        )

    def row(self, value: T) -> list[Any]:
        """Returns the values of the columns."""
        return [getattr(value, name) for name in self._names]

    def value(self, row: Sequence[Any]) -> T:
        """Returns the value that a row holds."""
        values = dict(zip(self._names, row, strict=True))
        for flag in self._flags:
            values[flag] = bool(values[flag])
        return self._kind(**values)


_SESSIONS = _Table(Session, "sessions", key=("owner", "key"), without="busy")
_MESSAGES = _Table(Message, "messages", key=("session", "number"), flags=("partial",))
_TICKETS = _Table(Ticket, "tickets", key=("number",))
_RUNS = _Table(Run, "runs", key=("id",), flags=("acknowledged",))
_DELIVERIES = _Table(Delivery, "deliveries", key=("id",), flags=("repeatable",))
_CHANNELS = _Table(ChannelRecord, "channels", key=("name",))
_WORKERS = _Table(Worker, "workers", key=("id",))
_OBJECTS = _Table(UpstreamObject, "objects", key=("id", "upstream"))
_RESPONSES = _Table(StoredResponse, "responses", key=("id",))

_OF_EXCHANGE = ExchangeRecord.__struct_fields__
# One statement inserts all rows, from JSON: the interpreter's lock changes hands between two statements, and between
# two rows of a result. While the event loop is busy, that costs more than inserting a row. MATERIALIZED: otherwise
# SQLite writes out the JSON of a record once for each column.
_EXCHANGE_FROM_JSON = ", ".join(
    f"record {'->' if name == 'attempts' else '->>'} {at}" for at, name in enumerate(_OF_EXCHANGE)
)
_PUT_EXCHANGES = (
    "WITH records AS MATERIALIZED (SELECT value AS record FROM json_each(jsonb(?)))"
    f" INSERT INTO exchanges ({', '.join(_OF_EXCHANGE)})"
    f" SELECT {_EXCHANGE_FROM_JSON} FROM records WHERE true"
    f" ON CONFLICT (id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _OF_EXCHANGE)}"
    f" WHERE exchanges.outcome = '{LOST}'"
)
_LOST_AMONG = (
    "SELECT (SELECT coalesce(max(number), 0) FROM exchanges), (SELECT json_group_array(number) FROM exchanges"
    f" WHERE outcome = '{LOST}' AND outcome <> 'complete' AND id IN (SELECT value ->> 0 FROM json_each(?)))"
)


def _exchange(row: Sequence[Any]) -> ExchangeRecord:
    values = list(row)
    at = _OF_EXCHANGE.index("attempts")
    values[at] = msgspec.json.decode(values[at])
    return msgspec.convert(values, ExchangeRecord, strict=False)


_IS_BUSY = "EXISTS (SELECT 1 FROM tickets t WHERE t.owner = sessions.owner AND t.key = sessions.key)"
_IS_SESSION = "session = (SELECT id FROM sessions WHERE owner = ? AND key = ?)"
_IS_UNFINISHED = "state IN ('queued', 'running')"
_IS_OPEN = "state IN ('pending', 'sending')"

# ORDER BY +number: the + keeps SQLite from walking all rows in the order of that index. It finds the few rows by
# another index and sorts them.


class Tables(KeyTables, QuotaTables, ReportTables):
    """The tables of a store, as one operation sees them. The caller begins and ends the transaction.

    ``put_…`` inserts a value, or replaces the value with the same identity. ``drop_…`` of something that does not exist
    does nothing. Order and limits are those of the methods of `interface`. The class has more than 25 methods, since
    each is one query, and all share one connection.
    """

    def _put(self, table: _Table[T], value: T) -> None:
        self._db.execute(table.put, table.row(value))

    def _one(self, table: _Table[T], where: str, *values: Any) -> T | None:
        row = self._db.execute(f"{table.select} {where}", values).get
        return None if row is None else table.value(row)

    def _all(self, table: _Table[T], where: str, *values: Any) -> list[T]:
        return [table.value(row) for row in self._db.execute(f"{table.select} {where}", values)]

    def _number(self, sql: str, *values: Any) -> int:
        [[number]] = self._db.execute(sql, values)
        return int(number)

    # -- sessions

    def _sessions(self, where: str, *values: Any) -> list[Session]:
        sql = f"SELECT {_IS_BUSY}, {_SESSIONS.columns} FROM sessions {where}"
        return [attrs.evolve(_SESSIONS.value(row), busy=bool(busy)) for busy, *row in self._db.execute(sql, values)]

    def session(self, owner: str, key: str) -> Session | None:
        """Returns one session; None = there is none."""
        found = self._sessions("WHERE owner = ? AND key = ?", owner, key)
        return found[0] if found else None

    def put_session(self, session: Session) -> None:
        """Keeps a session; ``busy`` is not stored, since tickets tell it."""
        self._put(_SESSIONS, session)

    def drop_session(self, owner: str, key: str) -> int:
        """Deletes a session with all its messages; returns how many rows."""
        messages = self._do(f"DELETE FROM messages WHERE {_IS_SESSION}", owner, key)
        return messages + self._do("DELETE FROM sessions WHERE owner = ? AND key = ?", owner, key)

    def sessions(self, owner: str, *, limit: int, after: Session | None) -> Sequence[Session]:
        """Returns a page of an owner's sessions behind ``after``, the last active first."""
        order = "ORDER BY active_at DESC, key LIMIT ?"
        if after is None:
            return self._sessions(f"WHERE owner = ? {order}", owner, limit)
        # The index is walked by active_at <= ?. The rest separates sessions that were active at the same time.
        where = "WHERE owner = ? AND active_at <= ? AND (active_at < ? OR key > ?)"
        return self._sessions(f"{where} {order}", owner, after.active_at, after.active_at, after.key, limit)

    def count_sessions(self, active_since: float) -> SessionCounts:
        """Counts the sessions of all owners; a key with a ticket counts as a session."""
        total = self._number("SELECT count(*) FROM sessions")
        active = self._number("SELECT count(*) FROM sessions WHERE active_at >= ?", active_since)
        busy = silent = new = 0
        # Sessions with a turn in progress are few, so a loop over them is cheap.
        for [active_at] in self._db.execute(
            "SELECT s.active_at FROM (SELECT DISTINCT owner, key FROM tickets) t"
            " LEFT JOIN sessions s ON s.owner = t.owner AND s.key = t.key"
        ):
            busy += 1
            new += active_at is None
            silent += active_at is None or active_at < active_since
        return SessionCounts(total=total + new, active=active + silent, busy=busy)

    def idle_sessions(self, before: float, *, limit: int) -> Sequence[Session]:
        """Returns the sessions that are not busy and were last active before a time, the longest idle first."""
        return self._sessions(f"WHERE active_at < ? AND NOT {_IS_BUSY} ORDER BY active_at LIMIT ?", before, limit)

    def last_message(self, owner: str, key: str, epoch: int | None = None) -> Message | None:
        """Returns the message with the highest number, of one epoch or (None) of all."""
        order = "ORDER BY number DESC LIMIT 1"
        if epoch is None:
            return self._one(_MESSAGES, f"WHERE {_IS_SESSION} {order}", owner, key)
        return self._one(_MESSAGES, f"WHERE {_IS_SESSION} AND epoch = ? {order}", owner, key, epoch)

    def add_message(self, owner: str, key: str, message: Message) -> None:
        """Appends a message, whose number, epoch and turn are set, to a session that exists."""
        row = _MESSAGES.row(message)
        self._do(
            f"INSERT INTO messages (session, {_MESSAGES.columns})"
            f" SELECT id{', ?' * len(row)} FROM sessions WHERE owner = ? AND key = ?",
            *row,
            owner,
            key,
        )

    def history(self, owner: str, key: str, epoch: int, *, last: int) -> Sequence[Message]:
        """Returns the last messages of an epoch, oldest first."""
        where = f"WHERE {_IS_SESSION} AND epoch = ? ORDER BY number DESC LIMIT ?"
        return self._all(_MESSAGES, where, owner, key, epoch, last)[::-1]

    def messages(self, owner: str, key: str, epoch: int | None, *, limit: int, after: int) -> Sequence[Message]:
        """Returns a page of messages behind the number ``after``, of one epoch or (None) of all, oldest first."""
        order = "number > ? ORDER BY number LIMIT ?"
        if epoch is None:
            return self._all(_MESSAGES, f"WHERE {_IS_SESSION} AND {order}", owner, key, after, limit)
        return self._all(_MESSAGES, f"WHERE {_IS_SESSION} AND epoch = ? AND {order}", owner, key, epoch, after, limit)

    def drop_archived(self, before: float, *, limit: int) -> int:
        """Deletes messages of earlier epochs from before a time; returns how many."""
        return self._do(
            # CROSS JOIN fixes the order: sessions with an archive first, then their messages by the index.
            "DELETE FROM messages WHERE rowid IN (SELECT m.rowid FROM sessions s CROSS JOIN messages m"
            " ON m.session = s.id AND m.epoch < s.epoch WHERE s.epoch > 0 AND m.at < ? LIMIT ?)",
            before,
            limit,
        )

    # -- tickets

    def add_ticket(self, owner: str, key: str, worker: str, run: str | None) -> Ticket:
        """Creates a ticket whose number is higher than any that ever was."""
        sql = "INSERT INTO tickets (owner, key, worker, run) VALUES (?, ?, ?, ?)"
        self._do(sql, owner, key, worker, run)
        return Ticket(number=self._db.last_insert_rowid(), owner=owner, key=key, worker=worker, run=run)

    def tickets(self, owner: str, key: str) -> Sequence[Ticket]:
        """Returns the tickets of a session, the lowest number first."""
        return self._all(_TICKETS, "WHERE owner = ? AND key = ? ORDER BY number", owner, key)

    def ticket_of(self, run: str) -> Ticket | None:
        """Returns the ticket of a run; None = it has none."""
        return self._one(_TICKETS, "WHERE run = ?", run)

    def put_ticket(self, ticket: Ticket) -> None:
        """Replaces a ticket (another worker has adopted it)."""
        self._put(_TICKETS, ticket)

    def drop_ticket(self, ticket: Ticket) -> None:
        """Deletes a ticket, unless another worker has adopted it meanwhile."""
        self._do("DELETE FROM tickets WHERE number = ? AND worker = ?", ticket.number, ticket.worker)

    # -- runs

    def run(self, run_id: str) -> Run | None:
        """Returns one run; None = there is none."""
        return self._one(_RUNS, "WHERE id = ?", run_id)

    def put_run(self, run: Run) -> None:
        """Keeps a run."""
        self._put(_RUNS, run)

    def drop_run(self, run_id: str) -> int:
        """Deletes a run with its deliveries and idempotency keys; returns how many rows."""
        self.drop_claims(run_id)
        deliveries = self._do("DELETE FROM deliveries WHERE run_id = ?", run_id)
        return deliveries + self._do("DELETE FROM runs WHERE id = ?", run_id)

    def unfinished_of(self, workers: Sequence[str]) -> Sequence[Run]:
        """Returns the runs of some workers that have not ended, in the order in which they were added."""
        where = f"WHERE {_IS_UNFINISHED} AND {is_in('worker', workers)} ORDER BY +number"
        return self._all(_RUNS, where, *workers)

    def count_unfinished(self, channel: str) -> int:
        """Counts the runs of a channel that have not ended."""
        return self._number(f"SELECT count(*) FROM runs WHERE {_IS_UNFINISHED} AND channel = ?", channel)

    def count_runs(self) -> int:
        """Counts all runs."""
        return self._number("SELECT count(*) FROM runs")

    def settled_runs(self, before: float, *, limit: int) -> Sequence[Run]:
        """Returns the runs that ended before a time and have nothing left to deliver, the oldest first."""
        return self._all(
            _RUNS,
            f"WHERE finished_at < ? AND NOT {_IS_UNFINISHED}"
            f" AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.run_id = runs.id AND d.{_IS_OPEN})"
            " ORDER BY finished_at, number LIMIT ?",
            before,
            limit,
        )

    def claimed(self, scope: str, key: str) -> tuple[bytes, str] | None:
        """Returns the digest and the run id of an idempotency key; None = it is free."""
        row = self._db.execute("SELECT digest, run FROM claims WHERE scope = ? AND key = ?", (scope, key)).get
        return None if row is None else (row[0], row[1])

    def put_claim(self, scope: str, key: str, digest: bytes, run_id: str) -> None:
        """Keeps what an idempotency key stands for."""
        self._do("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", scope, key, digest, run_id)

    def drop_claims(self, run_id: str) -> None:
        """Frees the idempotency keys of a run."""
        self._do("DELETE FROM claims WHERE run = ?", run_id)

    # -- deliveries

    def delivery(self, delivery_id: str) -> Delivery | None:
        """Returns one delivery; None = there is none."""
        return self._one(_DELIVERIES, "WHERE id = ?", delivery_id)

    def put_delivery(self, delivery: Delivery) -> None:
        """Keeps a delivery."""
        self._put(_DELIVERIES, delivery)

    def due(self, at: float, channels: Sequence[str], *, limit: int) -> Sequence[Delivery]:
        """Returns what can be taken at a time: the first delivery to each target to which nothing is being sent."""
        if not channels:
            return []
        # The recursion takes one step of the index for each target, and not one for each delivery: the queue of a slow
        # target is long.
        where = f"""WHERE number IN (
            WITH RECURSIVE named (channel) AS (VALUES {", ".join(["(?)"] * len(channels))}),
            targets (channel, target) AS (
                SELECT channel, (
                    SELECT min(target) FROM deliveries AS d WHERE state = 'pending' AND d.channel = named.channel
                )
                FROM named
                UNION ALL
                SELECT channel, (
                    SELECT min(target) FROM deliveries AS d
                    WHERE state = 'pending' AND d.channel = targets.channel AND d.target > targets.target
                ) FROM targets WHERE target IS NOT NULL
            )
            SELECT (
                SELECT number FROM deliveries AS d
                WHERE state = 'pending' AND d.channel = targets.channel AND d.target = targets.target
                ORDER BY due_at, number LIMIT 1
            ) FROM targets WHERE NOT EXISTS (
                SELECT 1 FROM deliveries AS d
                WHERE state = 'sending' AND d.channel = targets.channel AND d.target = targets.target
            )
        ) AND due_at <= ? ORDER BY due_at, number LIMIT ?"""
        return self._all(_DELIVERIES, where, *channels, at, limit)

    def sending(self, workers: Sequence[str]) -> Sequence[Delivery]:
        """Returns what some workers are sending, in the order in which it was added."""
        where = f"WHERE state = 'sending' AND {is_in('worker', workers)} ORDER BY +number"
        return self._all(_DELIVERIES, where, *workers)

    def deliveries(self, run_id: str) -> Sequence[Delivery]:
        """Returns the deliveries of a run, in the order in which they were added."""
        return self._all(_DELIVERIES, "WHERE run_id = ? ORDER BY number", run_id)

    def depth(self) -> dict[str, int]:
        """Counts the deliveries that are pending or being sent, by channel."""
        return dict(self._db.execute(f"SELECT channel, count(*) FROM deliveries WHERE {_IS_OPEN} GROUP BY channel"))

    def drop_orphans(self, before: float, *, limit: int) -> int:
        """Deletes deliveries that were done before a time and belong to no run; returns how many."""
        return self._do(
            "DELETE FROM deliveries WHERE number IN (SELECT number FROM deliveries"
            " WHERE state NOT IN ('pending', 'sending') AND coalesce(done_at, due_at) < ?"
            " AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.id = run_id) LIMIT ?)",
            before,
            limit,
        )

    # -- channels and workers

    def channel(self, name: str) -> ChannelRecord | None:
        """Returns one channel; None = there is none."""
        return self._one(_CHANNELS, "WHERE name = ?", name)

    def put_channel(self, channel: ChannelRecord) -> None:
        """Keeps a channel."""
        self._put(_CHANNELS, channel)

    def channels(self) -> Sequence[ChannelRecord]:
        """Returns all channels, by name."""
        return self._all(_CHANNELS, "ORDER BY name")

    def put_worker(self, worker: Worker) -> None:
        """Keeps a worker."""
        self._put(_WORKERS, worker)

    def workers(self) -> Sequence[Worker]:
        """Returns all workers, the oldest first."""
        return self._all(_WORKERS, "ORDER BY started_at, id")

    def drop_worker(self, worker_id: str) -> None:
        """Deletes a worker with its tickets; the channels that it holds become free."""
        self._do("DELETE FROM workers WHERE id = ?", worker_id)
        self._do("DELETE FROM tickets WHERE worker = ?", worker_id)
        self._do("UPDATE channels SET holder = NULL WHERE holder = ?", worker_id)
        self.drop_leases(worker_id)

    # -- exchanges

    def put_exchanges(self, records: Sequence[bytes]) -> None:
        """Keeps records, each a JSON array; a record that exists is replaced only if it is ``lost``.

        In the same transaction, what they have used and spent is counted: so that is the sum of all records, those that
        have been deleted since included. Nothing else inserts a record.
        """
        given = (b"[" + b",".join(records) + b"]").decode()
        [[last, found]] = self._db.execute(_LOST_AMONG, (given,))
        if found != "[]":
            self.uncount_lost(found)
        self._do(_PUT_EXCHANGES, given)
        used = self.used_by(last, found)
        self.count_use(used)
        self.count_spent(used)

    def exchanges(self, query: ExchangeQuery, *, limit: int, after: str | None) -> Sequence[ExchangeRecord]:
        """Returns a page of records behind the id ``after``, the last added first."""
        asked: list[tuple[str, Sequence[Any]]] = [("true", []), *conditions(query)]
        if after is not None:
            asked.append(("number < (SELECT number FROM exchanges WHERE id = ?)", [after]))
        where = " AND ".join(condition for condition, _ in asked)
        sql = f"SELECT {', '.join(_OF_EXCHANGE)} FROM exchanges WHERE {where} ORDER BY number DESC LIMIT ?"
        rows = self._db.execute(sql, (*(value for _, values in asked for value in values), limit))
        return [_exchange(row) for row in rows]

    def drop_exchanges(self, before: float, *, most: int, limit: int) -> int:
        """Deletes the oldest records from before a time, or in excess of ``most``; returns how many."""
        # Numbers ascend without a gap, since only the oldest rows are deleted.
        [[first, last]] = self._db.execute("SELECT min(number), max(number) FROM exchanges")
        if first is None:
            return 0
        return self._do(
            "DELETE FROM exchanges WHERE number IN (SELECT number FROM"
            " (SELECT number, started_at FROM exchanges ORDER BY number LIMIT ?) WHERE number <= ? OR started_at < ?)",
            limit,
            last - most,
            before,
        )

    # -- objects of upstreams

    def note_object(self, found: UpstreamObject) -> None:
        """Keeps an object, unless the upstream has one with that id."""
        self._do(
            f"INSERT INTO objects ({_OBJECTS.columns}) VALUES (?, ?, ?, ?) ON CONFLICT (id, upstream) DO NOTHING",
            *_OBJECTS.row(found),
        )

    def objects(self, ids: Sequence[str]) -> Sequence[UpstreamObject]:
        """Returns the objects with these ids, in no order."""
        return self._all(_OBJECTS, f"WHERE {is_in('id', ids)}", *ids)

    def drop_object(self, object_id: str, upstream: str) -> None:
        """Deletes an object."""
        self._do("DELETE FROM objects WHERE id = ? AND upstream = ?", object_id, upstream)

    def drop_objects(self, before: float, *, most: int, limit: int) -> int:
        """Deletes the oldest objects from before a time, or in excess of ``most``; returns how many."""
        return self._drop_oldest("objects", before, most, limit)

    def _drop_oldest(self, table: str, before: float, most: int, limit: int) -> int:
        excess = max(0, self._number(f"SELECT count(*) FROM {table}") - most)
        return self._do(
            f"DELETE FROM {table} WHERE number IN (SELECT number FROM (SELECT number, at FROM {table} ORDER BY number"
            f" LIMIT ?) WHERE at < ? LIMIT ?) OR number IN (SELECT number FROM {table} ORDER BY number LIMIT ?)",
            limit,
            before,
            limit,
            min(excess, limit),
        )

    # -- responses

    def put_response(self, response: StoredResponse) -> None:
        """Stores a response, or replaces the one with its id."""
        self._put(_RESPONSES, response)

    def response(self, owner: str | None, response_id: str) -> StoredResponse | None:
        """Returns one response; of any owner (None)."""
        return self._one(_RESPONSES, "WHERE id = ? AND ifnull(?, owner) = owner", response_id, owner)

    def drop_response(self, owner: str, response_id: str) -> int:
        """Deletes one response; returns how many there were."""
        return self._do("DELETE FROM responses WHERE id = ? AND owner = ?", response_id, owner)

    def drop_responses(self, before: float, *, most: int, limit: int) -> int:
        """As `drop_objects`."""
        return self._drop_oldest("responses", before, most, limit)

    def touch(self) -> None:
        """Changes a row that no query reads: a test of whether the store can be written to."""
        self._do("UPDATE touched SET times = times + 1")
