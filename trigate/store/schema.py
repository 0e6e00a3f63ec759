"""The schema of the store's database, and the steps from each version to the next.

Each value of `records` has a table with a column for each of its attributes. Frequent queries have an index, which is
partial where they concern few of the rows (runs that have not ended, deliveries that are not done).

**Rules for editing this:** a migration that was released is not changed any more: databases were made by it. Add
another one at the end, and never one that an older Trigate could not detect: it refuses a database of a later version.
"""

from __future__ import annotations

APPLICATION_ID = 0x54726967
"""``Trig`` in ASCII. It is in the file's header, so that a database of another program is not taken for a store."""

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
    """
    CREATE TABLE objects (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL,
        upstream TEXT NOT NULL,
        owner TEXT NOT NULL,
        at REAL NOT NULL,
        UNIQUE (id, upstream)
    ) STRICT;
    """,
    """
    CREATE TABLE secrets (
        name TEXT PRIMARY KEY,
        value BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE reasoning (
        number INTEGER PRIMARY KEY,
        owner TEXT NOT NULL,
        call TEXT NOT NULL,
        at REAL NOT NULL,
        value BLOB NOT NULL,
        UNIQUE (owner, call)
    ) STRICT;
    """,
    """
    CREATE TABLE responses (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        at REAL NOT NULL,
        worker TEXT NOT NULL,
        body BLOB NOT NULL,
        input BLOB NOT NULL,
        events BLOB NOT NULL
    ) STRICT;
    """,
    """
    ALTER TABLE exchanges ADD COLUMN key_group TEXT NOT NULL DEFAULT '';
    ALTER TABLE exchanges ADD COLUMN cached_tokens INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE exchanges ADD COLUMN cache_write_tokens INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE exchanges ADD COLUMN reasoning_tokens INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE exchanges ADD COLUMN cost INTEGER;
    """,
    """
    ALTER TABLE exchanges ADD COLUMN alias TEXT NOT NULL DEFAULT '';

    CREATE TABLE spent (
        scope TEXT NOT NULL,
        day INTEGER NOT NULL,
        amount INTEGER NOT NULL,
        PRIMARY KEY (scope, day)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE leases (
        worker TEXT NOT NULL,
        name TEXT NOT NULL,
        scope TEXT NOT NULL,
        first_day INTEGER NOT NULL,
        end_day INTEGER NOT NULL,
        amount INTEGER NOT NULL,
        PRIMARY KEY (name, worker)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX leases_of_worker ON leases (worker, scope);

    CREATE TABLE unleased (
        name TEXT PRIMARY KEY,
        level REAL NOT NULL,
        at REAL NOT NULL,
        full INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE keys (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL UNIQUE,
        version INTEGER NOT NULL UNIQUE,
        digest BLOB NOT NULL,
        shown TEXT NOT NULL,
        settings BLOB NOT NULL,
        created_at REAL NOT NULL,
        revoked_at REAL,
        old_digest BLOB NOT NULL,
        old_until REAL NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE usage (
        hour INTEGER NOT NULL,
        owner TEXT NOT NULL,
        key_group TEXT NOT NULL,
        model TEXT NOT NULL,
        target TEXT NOT NULL,
        outcome TEXT NOT NULL,
        calls INTEGER NOT NULL,
        estimated INTEGER NOT NULL,
        unpriced INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        cache_write_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        reasoning_tokens INTEGER NOT NULL,
        cost INTEGER NOT NULL,
        durations BLOB NOT NULL,
        first_contents BLOB NOT NULL,
        PRIMARY KEY (hour, owner, key_group, model, target, outcome)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX exchanges_by_time ON exchanges (started_at);
    CREATE INDEX exchanges_failed ON exchanges (number) WHERE outcome NOT IN ('complete', 'cancelled', 'finished');
    """,
    # A database of a version in development may have them; `Tables.put_exchanges` does what they did.
    """
    DROP TRIGGER IF EXISTS exchange_added;
    DROP TRIGGER IF EXISTS exchange_found;
    DROP TRIGGER IF EXISTS exchange_used;
    DROP TRIGGER IF EXISTS lost_exchange_used;
    """,
)
"""SQL statements: from an empty database to version 1, from there to version 2, and so on."""
