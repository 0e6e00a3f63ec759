"""The schema of the store's database, and the steps from each version to the next.

Each value of `records` has a table with a column for each of its attributes. Frequent queries have an index, which is
partial where they concern few of the rows (runs that have not ended, deliveries that are not done).

**Rules for editing this:** a migration that was released is not changed any more: databases were made by it. Add
another one at the end, and never one that an older Trigate could not detect: it refuses a database of a later version.
"""

from __future__ import annotations

APPLICATION_ID = 0x54726967
"""``Trig`` in ASCII. It is in the file's header, so that a database of another program is not taken for a store."""

_UPSTREAM = "substr(new.target, 1, instr(new.target, '/') - 1)"
_DAY = "CAST(new.started_at / 86400 AS INTEGER)"
_SPEND = f"""
        INSERT INTO spent SELECT scope, {_DAY}, new.cost FROM (
            SELECT 'all' AS scope
            UNION ALL SELECT 'key:' || new.owner WHERE new.owner <> ''
            UNION ALL SELECT 'group:' || new.key_group WHERE new.key_group <> ''
            UNION ALL SELECT 'model:' || new.alias WHERE new.alias <> ''
            UNION ALL SELECT 'upstream:' || {_UPSTREAM} WHERE new.target IS NOT NULL
        ) WHERE true ON CONFLICT (scope, day) DO UPDATE SET amount = amount + excluded.amount;
        UPDATE leases SET amount = amount - new.cost
            WHERE worker = new.worker AND first_day <= {_DAY} AND end_day > {_DAY}
            AND scope IN ('all', 'key:' || new.owner, 'group:' || new.key_group, 'model:' || new.alias,
                'upstream:' || coalesce({_UPSTREAM}, ''));
"""
"""What the triggers on the records of exchanges do: a call has cost something."""
_BUCKET_OF_DURATION = "CAST(ceil(8 * log2(1000 * max(new.ended_at - new.started_at, 0.001))) AS INTEGER)"
_BUCKET_OF_FIRST_CONTENT = "CAST(ceil(8 * log2(1000 * max(new.first_content_s, 0.001))) AS INTEGER)"


def _counted_in(column: str, bucket: str, exists: str) -> str:
    """The assignment that counts a value in a histogram, a JSON object of counts by the numbers of buckets."""
    count = f"jsonb_set({column}, '$.' || {bucket}, coalesce({column} ->> ('$.' || {bucket}), 0) + 1)"
    return f"{column} = CASE WHEN {exists} THEN {count} ELSE {column} END"


# The bounds keep sums within 64 bits, whatever an upstream reports. A model that does not exist is any text of a
# client, so it has no row of its own.
_ADD_USAGE = f"""
        INSERT INTO usage VALUES (
            CAST(new.started_at / 3600 AS INTEGER),
            new.owner,
            new.key_group,
            CASE WHEN new.outcome = 'model_not_found' THEN '' ELSE new.model END,
            coalesce(new.target, ''),
            new.outcome,
            1,
            new.counted,
            new.cost IS NULL AND coalesce(new.prompt_tokens, new.completion_tokens) IS NOT NULL,
            max(0, min(coalesce(new.prompt_tokens, 0), 1000000000000)),
            max(0, min(new.cached_tokens, 1000000000000)),
            max(0, min(new.cache_write_tokens, 1000000000000)),
            max(0, min(coalesce(new.completion_tokens, 0), 1000000000000)),
            max(0, min(new.reasoning_tokens, 1000000000000)),
            max(0, min(coalesce(new.cost, 0), 1000000000000000)),
            CASE WHEN new.ended_at IS NULL THEN jsonb('{{}}') ELSE jsonb_object('' || {_BUCKET_OF_DURATION}, 1) END,
            CASE WHEN new.first_content_s IS NULL THEN jsonb('{{}}')
                ELSE jsonb_object('' || {_BUCKET_OF_FIRST_CONTENT}, 1) END
        )
        ON CONFLICT DO UPDATE SET
            calls = calls + 1,
            estimated = estimated + excluded.estimated,
            unpriced = unpriced + excluded.unpriced,
            prompt_tokens = prompt_tokens + excluded.prompt_tokens,
            cached_tokens = cached_tokens + excluded.cached_tokens,
            cache_write_tokens = cache_write_tokens + excluded.cache_write_tokens,
            completion_tokens = completion_tokens + excluded.completion_tokens,
            reasoning_tokens = reasoning_tokens + excluded.reasoning_tokens,
            cost = cost + excluded.cost,
            {_counted_in("durations", _BUCKET_OF_DURATION, "new.ended_at IS NOT NULL")},
            {_counted_in("first_contents", _BUCKET_OF_FIRST_CONTENT, "new.first_content_s IS NOT NULL")};
"""

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
    # What an exchange has cost is counted where its record is inserted, whatever inserts it: so what is spent is the
    # sum of the records. At the same time its worker's leases shrink by as much: what is leased and what is spent are
    # never more than the limit together (`quota_tables`).
    f"""
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

    CREATE TRIGGER exchange_added AFTER INSERT ON exchanges WHEN new.cost > 0
    BEGIN {_SPEND} END;
    CREATE TRIGGER exchange_found AFTER UPDATE OF cost ON exchanges WHEN coalesce(old.cost, 0) = 0 AND new.cost > 0
    BEGIN {_SPEND} END;
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
    # The use per hour is counted where a record is inserted, whatever inserts it: so it is the sum of the records, and
    # stays when they are deleted. A lost record becomes another one at most once, and has neither tokens nor a cost.
    f"""
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
    CREATE TRIGGER exchange_used AFTER INSERT ON exchanges BEGIN
        {_ADD_USAGE}
    END;
    CREATE TRIGGER lost_exchange_used AFTER UPDATE ON exchanges WHEN old.outcome = 'lost' BEGIN
        UPDATE usage SET calls = calls - 1 WHERE hour = CAST(old.started_at / 3600 AS INTEGER)
            AND owner = old.owner AND key_group = old.key_group AND model = old.model
            AND target = coalesce(old.target, '') AND outcome = old.outcome;
        {_ADD_USAGE}
    END;
    CREATE INDEX exchanges_by_time ON exchanges (started_at);
    CREATE INDEX exchanges_failed ON exchanges (number) WHERE outcome NOT IN ('complete', 'cancelled', 'finished');
    """,
)
"""SQL statements: from an empty database to version 1, from there to version 2, and so on."""
