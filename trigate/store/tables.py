"""The tables of a store in SQLite: their schema, its versions, and what is asked of them.

Each value has a table with a column for each of its attributes, so that no operation has to know SQL. What is asked
often has an index, partial where only few rows are ever asked for (runs that have not ended, deliveries that are not
done). A connection that is used here must not be used by another thread at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import attrs
import msgspec

from trigate.store.records import (
    LOST,
    ChannelRecord,
    Delivery,
    ExchangeRecord,
    Message,
    Run,
    Session,
    SessionCounts,
    Ticket,
    Worker,
)

if TYPE_CHECKING:
    import apsw

T = TypeVar("T")

APPLICATION_ID = 0x54726967
"""``Trig``. It stands in the file's header, so that no other program's database is taken for a store."""

MIGRATIONS = (
    """
    CREATE TABLE sessions (
        id INTEGER PRIMARY KEY,
        owner TEXT NOT NULL,
        key TEXT NOT NULL,
        created_at REAL NOT NULL,
        active_at REAL NOT NULL,
        epoch INTEGER NOT NULL,
        turns INTEGER NOT NULL,
        messages INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        system BLOB NOT NULL,
        UNIQUE (owner, key)
    ) STRICT;
    CREATE INDEX sessions_of_owner ON sessions (owner, active_at DESC, key);
    CREATE INDEX sessions_by_activity ON sessions (active_at);
    CREATE INDEX sessions_with_archive ON sessions (id) WHERE epoch > 0;

    CREATE TABLE messages (
        session INTEGER NOT NULL,
        number INTEGER NOT NULL,
        epoch INTEGER NOT NULL,
        turn INTEGER NOT NULL,
        at REAL NOT NULL,
        tokens INTEGER NOT NULL,
        partial INTEGER NOT NULL,
        body BLOB NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX messages_of_session ON messages (session, number);
    CREATE INDEX messages_of_epoch ON messages (session, epoch, number);

    CREATE TABLE tickets (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        owner TEXT NOT NULL,
        key TEXT NOT NULL,
        worker TEXT NOT NULL,
        run TEXT
    ) STRICT;
    CREATE INDEX tickets_of_session ON tickets (owner, key, number);
    CREATE INDEX tickets_of_run ON tickets (run) WHERE run IS NOT NULL;

    CREATE TABLE runs (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        channel TEXT NOT NULL,
        owner TEXT NOT NULL,
        session TEXT,
        action TEXT NOT NULL,
        request BLOB NOT NULL,
        state TEXT NOT NULL,
        acknowledged INTEGER NOT NULL,
        worker TEXT NOT NULL,
        created_at REAL NOT NULL,
        starts INTEGER NOT NULL,
        finished_at REAL,
        status INTEGER NOT NULL,
        result BLOB NOT NULL
    ) STRICT;
    CREATE INDEX runs_of_channel ON runs (channel) WHERE state IN ('queued', 'running');
    CREATE INDEX runs_of_worker ON runs (worker) WHERE state IN ('queued', 'running');
    CREATE INDEX runs_by_age ON runs (finished_at);

    CREATE TABLE claims (
        scope TEXT NOT NULL,
        key TEXT NOT NULL,
        digest BLOB NOT NULL,
        run TEXT NOT NULL,
        PRIMARY KEY (scope, key)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX claims_of_run ON claims (run);

    CREATE TABLE deliveries (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        run_id TEXT NOT NULL,
        channel TEXT NOT NULL,
        target TEXT NOT NULL,
        body BLOB NOT NULL,
        created_at REAL NOT NULL,
        due_at REAL NOT NULL,
        repeatable INTEGER NOT NULL,
        state TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        worker TEXT,
        last_status INTEGER NOT NULL,
        last_error TEXT,
        done_at REAL
    ) STRICT;
    CREATE INDEX deliveries_of_run ON deliveries (run_id);
    CREATE INDEX deliveries_of_channel ON deliveries (channel) WHERE state IN ('pending', 'sending');
    CREATE INDEX deliveries_of_worker ON deliveries (worker) WHERE state = 'sending';
    CREATE INDEX deliveries_waiting ON deliveries (channel, target, due_at) WHERE state = 'pending';
    CREATE INDEX deliveries_under_way ON deliveries (channel, target) WHERE state = 'sending';
    CREATE INDEX deliveries_by_age ON deliveries (coalesce(done_at, due_at))
        WHERE state NOT IN ('pending', 'sending');

    CREATE TABLE channels (
        name TEXT PRIMARY KEY,
        cursor TEXT NOT NULL,
        received INTEGER NOT NULL,
        replied INTEGER NOT NULL,
        last_event_at REAL,
        holder TEXT
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE workers (
        id TEXT PRIMARY KEY,
        pid INTEGER NOT NULL,
        address TEXT NOT NULL,
        started_at REAL NOT NULL,
        seen_at REAL NOT NULL,
        snapshot BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE touched (times INTEGER NOT NULL) STRICT;
    INSERT INTO touched VALUES (0);
    """,
    """
    CREATE TABLE exchanges (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        request_id TEXT NOT NULL,
        owner TEXT NOT NULL,
        worker TEXT NOT NULL,
        endpoint TEXT NOT NULL,
        model TEXT NOT NULL,
        stream INTEGER NOT NULL,
        started_at REAL NOT NULL,
        ended_at REAL,
        outcome TEXT NOT NULL,
        status INTEGER,
        target TEXT,
        attempts TEXT NOT NULL,
        prompt_tokens INTEGER,
        completion_tokens INTEGER,
        counted INTEGER NOT NULL,
        events INTEGER NOT NULL,
        bytes INTEGER NOT NULL,
        first_content_s REAL
    ) STRICT;
    CREATE INDEX exchanges_of_owner ON exchanges (owner, number);
    CREATE INDEX exchanges_not_complete ON exchanges (outcome, number) WHERE outcome <> 'complete';
    """,
)
"""From nothing to version 1, from there to version 2, and so on. What has been released is not changed any more."""


class _Table(Generic[T]):
    """How a value lies in its table.

    Args:
        without: Attributes that are no columns.
        flags: Attributes that are true or false.
        key: The columns that say which row a value is.
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
        """The values of the columns."""
        return [getattr(value, name) for name in self._names]

    def value(self, row: Sequence[Any]) -> T:
        """The value of a row."""
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

_OF_EXCHANGE = ExchangeRecord.__struct_fields__
# All rows in one statement, from JSON: between two steps of statements the interpreter's lock changes hands, and where
# the event loop is busy that costs more than a row.
_EXCHANGE_FROM_JSON = ", ".join(
    f"value {'->' if name == 'attempts' else '->>'} {at}" for at, name in enumerate(_OF_EXCHANGE)
)
_PUT_EXCHANGES = (
    f"INSERT INTO exchanges ({', '.join(_OF_EXCHANGE)})"
    f" SELECT {_EXCHANGE_FROM_JSON} FROM json_each(?) WHERE true"
    f" ON CONFLICT (id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _OF_EXCHANGE)}"
    f" WHERE exchanges.outcome = '{LOST}'"
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


# ORDER BY +number: sorted afterwards, where to walk the rows in that order would be to walk all of them


def _in(column: str, values: Sequence[str]) -> str:
    return f"{column} IN ({', '.join('?' * len(values))})"


class SqliteTables:
    """A `ledger.Tables` in SQLite; the transaction is its owner's."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def _do(self, sql: str, *values: Any) -> int:
        """Changes something; returns how many rows."""
        self._db.execute(sql, values)
        return self._db.changes()

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
        found = self._sessions("WHERE owner = ? AND key = ?", owner, key)
        return found[0] if found else None

    def put_session(self, session: Session) -> None:
        self._put(_SESSIONS, session)

    def drop_session(self, owner: str, key: str) -> int:
        messages = self._do(f"DELETE FROM messages WHERE {_IS_SESSION}", owner, key)
        return messages + self._do("DELETE FROM sessions WHERE owner = ? AND key = ?", owner, key)

    def sessions(self, owner: str, *, limit: int, after: Session | None) -> Sequence[Session]:
        order = "ORDER BY active_at DESC, key LIMIT ?"
        if after is None:
            return self._sessions(f"WHERE owner = ? {order}", owner, limit)
        # active_at <= ? is what the index is walked by; the rest tells those of the same time apart
        where = "WHERE owner = ? AND active_at <= ? AND (active_at < ? OR key > ?)"
        return self._sessions(f"{where} {order}", owner, after.active_at, after.active_at, after.key, limit)

    def count_sessions(self, active_since: float) -> SessionCounts:
        total = self._number("SELECT count(*) FROM sessions")
        heard = self._number("SELECT count(*) FROM sessions WHERE active_at >= ?", active_since)
        busy = silent = new = 0
        # few, beside the sessions: those with a turn in progress
        for [active_at] in self._db.execute(
            "SELECT s.active_at FROM (SELECT DISTINCT owner, key FROM tickets) t"
            " LEFT JOIN sessions s ON s.owner = t.owner AND s.key = t.key"
        ):
            busy += 1
            new += active_at is None
            silent += active_at is None or active_at < active_since
        return SessionCounts(total=total + new, active=heard + silent, busy=busy)

    def idle_sessions(self, before: float, *, limit: int) -> Sequence[Session]:
        return self._sessions(f"WHERE active_at < ? AND NOT {_IS_BUSY} ORDER BY active_at LIMIT ?", before, limit)

    def last_message(self, owner: str, key: str, epoch: int | None = None) -> Message | None:
        order = "ORDER BY number DESC LIMIT 1"
        if epoch is None:
            return self._one(_MESSAGES, f"WHERE {_IS_SESSION} {order}", owner, key)
        return self._one(_MESSAGES, f"WHERE {_IS_SESSION} AND epoch = ? {order}", owner, key, epoch)

    def add_message(self, owner: str, key: str, message: Message) -> None:
        row = _MESSAGES.row(message)
        self._do(
            f"INSERT INTO messages (session, {_MESSAGES.columns})"
            f" SELECT id{', ?' * len(row)} FROM sessions WHERE owner = ? AND key = ?",
            *row,
            owner,
            key,
        )

    def history(self, owner: str, key: str, epoch: int, *, last: int) -> Sequence[Message]:
        where = f"WHERE {_IS_SESSION} AND epoch = ? ORDER BY number DESC LIMIT ?"
        return self._all(_MESSAGES, where, owner, key, epoch, last)[::-1]

    def messages(self, owner: str, key: str, epoch: int | None, *, limit: int, after: int) -> Sequence[Message]:
        order = "number > ? ORDER BY number LIMIT ?"
        if epoch is None:
            return self._all(_MESSAGES, f"WHERE {_IS_SESSION} AND {order}", owner, key, after, limit)
        return self._all(_MESSAGES, f"WHERE {_IS_SESSION} AND epoch = ? AND {order}", owner, key, epoch, after, limit)

    def drop_archived(self, before: float, *, limit: int) -> int:
        return self._do(
            # sessions first: only their archives are walked, by the index
            "DELETE FROM messages WHERE rowid IN (SELECT m.rowid FROM sessions s CROSS JOIN messages m"
            " ON m.session = s.id AND m.epoch < s.epoch WHERE s.epoch > 0 AND m.at < ? LIMIT ?)",
            before,
            limit,
        )

    # -- the queues of their turns

    def add_ticket(self, owner: str, key: str, worker: str, run: str | None) -> Ticket:
        sql = "INSERT INTO tickets (owner, key, worker, run) VALUES (?, ?, ?, ?)"
        self._do(sql, owner, key, worker, run)
        return Ticket(number=self._db.last_insert_rowid(), owner=owner, key=key, worker=worker, run=run)

    def tickets(self, owner: str, key: str) -> Sequence[Ticket]:
        return self._all(_TICKETS, "WHERE owner = ? AND key = ? ORDER BY number", owner, key)

    def ticket_of(self, run: str) -> Ticket | None:
        return self._one(_TICKETS, "WHERE run = ?", run)

    def put_ticket(self, ticket: Ticket) -> None:
        self._put(_TICKETS, ticket)

    def drop_ticket(self, ticket: Ticket) -> None:
        self._do("DELETE FROM tickets WHERE number = ? AND worker = ?", ticket.number, ticket.worker)

    # -- runs

    def run(self, run_id: str) -> Run | None:
        return self._one(_RUNS, "WHERE id = ?", run_id)

    def put_run(self, run: Run) -> None:
        self._put(_RUNS, run)

    def drop_run(self, run_id: str) -> int:
        self.drop_claims(run_id)
        deliveries = self._do("DELETE FROM deliveries WHERE run_id = ?", run_id)
        return deliveries + self._do("DELETE FROM runs WHERE id = ?", run_id)

    def unfinished_of(self, workers: Sequence[str]) -> Sequence[Run]:
        where = f"WHERE {_IS_UNFINISHED} AND {_in('worker', workers)} ORDER BY +number"
        return self._all(_RUNS, where, *workers)

    def count_unfinished(self, channel: str) -> int:
        return self._number(f"SELECT count(*) FROM runs WHERE {_IS_UNFINISHED} AND channel = ?", channel)

    def count_runs(self) -> int:
        return self._number("SELECT count(*) FROM runs")

    def settled_runs(self, before: float, *, limit: int) -> Sequence[Run]:
        return self._all(
            _RUNS,
            f"WHERE finished_at < ? AND NOT {_IS_UNFINISHED}"
            f" AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.run_id = runs.id AND d.{_IS_OPEN})"
            " ORDER BY finished_at, number LIMIT ?",
            before,
            limit,
        )

    def claimed(self, scope: str, key: str) -> tuple[bytes, str] | None:
        row = self._db.execute("SELECT digest, run FROM claims WHERE scope = ? AND key = ?", (scope, key)).get
        return None if row is None else (row[0], row[1])

    def put_claim(self, scope: str, key: str, digest: bytes, run_id: str) -> None:
        self._do("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", scope, key, digest, run_id)

    def drop_claims(self, run_id: str) -> None:
        self._do("DELETE FROM claims WHERE run = ?", run_id)

    # -- deliveries

    def delivery(self, delivery_id: str) -> Delivery | None:
        return self._one(_DELIVERIES, "WHERE id = ?", delivery_id)

    def put_delivery(self, delivery: Delivery) -> None:
        self._put(_DELIVERIES, delivery)

    def due(self, at: float, channels: Sequence[str], *, limit: int) -> Sequence[Delivery]:
        if not channels:
            return []
        # One step of the index for each target, however many wait for it: one that is slow has a long queue.
        where = f"""WHERE number IN (
            WITH RECURSIVE named (channel) AS (VALUES {", ".join(["(?)"] * len(channels))}),
            place (channel, target) AS (
                SELECT channel, (
                    SELECT min(target) FROM deliveries AS d WHERE state = 'pending' AND d.channel = named.channel
                )
                FROM named
                UNION ALL
                SELECT channel, (
                    SELECT min(target) FROM deliveries AS d
                    WHERE state = 'pending' AND d.channel = place.channel AND d.target > place.target
                ) FROM place WHERE target IS NOT NULL
            )
            SELECT (
                SELECT number FROM deliveries AS d
                WHERE state = 'pending' AND d.channel = place.channel AND d.target = place.target
                ORDER BY due_at, number LIMIT 1
            ) FROM place WHERE NOT EXISTS (
                SELECT 1 FROM deliveries AS d
                WHERE state = 'sending' AND d.channel = place.channel AND d.target = place.target
            )
        ) AND due_at <= ? ORDER BY due_at, number LIMIT ?"""
        return self._all(_DELIVERIES, where, *channels, at, limit)

    def sending(self, workers: Sequence[str]) -> Sequence[Delivery]:
        where = f"WHERE state = 'sending' AND {_in('worker', workers)} ORDER BY +number"
        return self._all(_DELIVERIES, where, *workers)

    def deliveries(self, run_id: str) -> Sequence[Delivery]:
        return self._all(_DELIVERIES, "WHERE run_id = ? ORDER BY number", run_id)

    def depth(self) -> dict[str, int]:
        return dict(self._db.execute(f"SELECT channel, count(*) FROM deliveries WHERE {_IS_OPEN} GROUP BY channel"))

    def drop_orphans(self, before: float, *, limit: int) -> int:
        return self._do(
            "DELETE FROM deliveries WHERE number IN (SELECT number FROM deliveries"
            " WHERE state NOT IN ('pending', 'sending') AND coalesce(done_at, due_at) < ?"
            " AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.id = run_id) LIMIT ?)",
            before,
            limit,
        )

    # -- channels and workers

    def channel(self, name: str) -> ChannelRecord | None:
        return self._one(_CHANNELS, "WHERE name = ?", name)

    def put_channel(self, channel: ChannelRecord) -> None:
        self._put(_CHANNELS, channel)

    def channels(self) -> Sequence[ChannelRecord]:
        return self._all(_CHANNELS, "ORDER BY name")

    def put_worker(self, worker: Worker) -> None:
        self._put(_WORKERS, worker)

    def workers(self) -> Sequence[Worker]:
        return self._all(_WORKERS, "ORDER BY started_at, id")

    def drop_worker(self, worker_id: str) -> None:
        self._do("DELETE FROM workers WHERE id = ?", worker_id)
        self._do("DELETE FROM tickets WHERE worker = ?", worker_id)
        self._do("UPDATE channels SET holder = NULL WHERE holder = ?", worker_id)

    # -- exchanges

    def put_exchanges(self, records: Sequence[bytes]) -> None:
        self._do(_PUT_EXCHANGES, (b"[" + b",".join(records) + b"]").decode())

    def exchanges(
        self, *, limit: int, owner: str | None, outcome: str | None, after: str | None
    ) -> Sequence[ExchangeRecord]:
        asked: list[tuple[str, Any]] = [("number > ?", 0)]
        if owner is not None:
            asked.append(("owner = ?", owner))
        if outcome is not None:
            # what is not complete has an index of its own, which SQLite sees only where it stands there
            asked.append(("outcome = ?" if outcome == "complete" else "outcome = ? AND outcome <> 'complete'", outcome))
        if after is not None:
            asked.append(("number < (SELECT number FROM exchanges WHERE id = ?)", after))
        where = " AND ".join(condition for condition, _ in asked)
        sql = f"SELECT {', '.join(_OF_EXCHANGE)} FROM exchanges WHERE {where} ORDER BY number DESC LIMIT ?"
        rows = self._db.execute(sql, (*(value for _, value in asked), limit))
        return [_exchange(row) for row in rows]

    def drop_exchanges(self, before: float, *, most: int, limit: int) -> int:
        # numbers ascend without a gap, since only the oldest go
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

    def touch(self) -> None:
        self._do("UPDATE touched SET times = times + 1")
