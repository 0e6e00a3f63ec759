"""The table of the use per hour, a part of `tables.Tables`, and the conditions of queries for records.

The records that one transaction adds are summed up, and each sum is added to the table: it stays when the records are
deleted. A lost record becomes another one at most once, and has neither tokens nor a cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from trigate.store.reports import ExchangeQuery, UsageColumn, UsageTotals

if TYPE_CHECKING:
    import apsw

_COLUMNS: dict[UsageColumn, str] = {
    "key": "owner",
    "group": "key_group",
    "model": "model",
    "target": "target",
    "upstream": "substr(target, 1, max(0, instr(target, '/') - 1))",
    "hour": "hour",
    "day": "hour / 24",
    "month": "strftime('%Y-%m', hour * 3600, 'unixepoch')",
}
_COUNTS = (
    *("calls", "estimated", "unpriced", "prompt_tokens", "cached_tokens", "cache_write_tokens", "completion_tokens"),
    *("reasoning_tokens", "cost"),
)
_SUMS = ", ".join(f"sum({name})" for name in _COUNTS)
# They are merged here, and not by SQLite: grouping their buckets would take ten times as long.
_HISTOGRAMS = "json_group_array(json(durations)), json_group_array(json(first_contents))"
_histograms = msgspec.json.Decoder(list[dict[int, int]])


class Used(msgspec.Struct, array_like=True):
    """What some records of one hour with the same values in the first columns have used; see `UsageTotals`.

    Attributes:
        durations, first_contents: The buckets of the records.
    """

    hour: int
    worker: str
    owner: str
    key_group: str
    alias: str
    model: str
    target: str
    outcome: str
    calls: int
    estimated: int
    unpriced: int
    prompt_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cost: int
    durations: Sequence[int | None]
    first_contents: Sequence[int | None]


_used = msgspec.json.Decoder(list[Used])


def _bounded(column: str, most: int = 10**12) -> str:
    """The sum of a column that stays within 64 bits, whatever an upstream reports."""
    return f"sum(max(0, min(coalesce({column}, 0), {most})))"


def _buckets(seconds: str) -> str:
    return f"json_group_array(CAST(ceil(8 * log2(1000 * max({seconds}, 0.001))) AS INTEGER))"


# A model that does not exist is any text of a client, so it has no row of its own. One row is returned: see `tables`.
_BY = "hour, worker, owner, key_group, alias, used_model, used_target, outcome"
_USED = f"""
    SELECT json_group_array(json(used)) FROM (
        SELECT json_array({_BY}, count(*), sum(counted),
            sum(cost IS NULL AND coalesce(prompt_tokens, completion_tokens) IS NOT NULL),
            {_bounded("prompt_tokens")}, {_bounded("cached_tokens")}, {_bounded("cache_write_tokens")},
            {_bounded("completion_tokens")}, {_bounded("reasoning_tokens")}, {_bounded("cost", 10**15)},
            {_buckets("ended_at - started_at")}, {_buckets("first_content_s")}) AS used
        FROM (
            SELECT *, CAST(started_at / 3600 AS INTEGER) AS hour, coalesce(target, '') AS used_target,
                CASE WHEN outcome = 'model_not_found' THEN '' ELSE model END AS used_model
            FROM exchanges WHERE number > ? OR number IN (SELECT value FROM json_each(?))
        ) GROUP BY {_BY}
    )
"""


def _added(column: str) -> str:
    """The sum of two histograms, JSON objects of counts by the numbers of buckets."""
    both = " UNION ALL ".join(f"SELECT key, value FROM json_each({each}.{column})" for each in ("usage", "excluded"))
    summed = f"SELECT key, sum(value) AS count FROM ({both}) GROUP BY key"
    return f"{column} = (SELECT jsonb_group_object(key, count) FROM ({summed}))"


_ADD_USED = f"""
    INSERT INTO usage (hour, owner, key_group, model, target, outcome, {", ".join(_COUNTS)}, durations, first_contents)
    SELECT {", ".join(f"value ->> {at}" for at in range(6 + len(_COUNTS)))},
        jsonb(value -> {6 + len(_COUNTS)}), jsonb(value -> {7 + len(_COUNTS)}) FROM json_each(?) WHERE true
    ON CONFLICT DO UPDATE SET {", ".join(f"{name} = {name} + excluded.{name}" for name in _COUNTS)},
        {_added("durations")}, {_added("first_contents")}
"""
_UNCOUNT_LOST = """
    UPDATE usage SET calls = calls - lost.count FROM (
        SELECT CAST(started_at / 3600 AS INTEGER) AS hour, owner, key_group, model, coalesce(target, '') AS target,
            outcome, count(*) AS count
        FROM exchanges WHERE number IN (SELECT value FROM json_each(?)) GROUP BY 1, 2, 3, 4, 5, 6
    ) AS lost
    WHERE (usage.hour, usage.owner, usage.key_group, usage.model, usage.target, usage.outcome)
        = (lost.hour, lost.owner, lost.key_group, lost.model, lost.target, lost.outcome)
"""


def _histogram(buckets: Sequence[int | None]) -> dict[int, int]:
    counts = Counter(buckets)
    return {bucket: count for bucket, count in counts.items() if bucket is not None}


def _merge(total: dict[int, int], histograms: str) -> None:
    """Adds histograms, a JSON array, to another one."""
    for histogram in _histograms.decode(histograms):
        for bucket, count in histogram.items():
            total[bucket] = total.get(bucket, 0) + count


def conditions(query: ExchangeQuery) -> Iterator[tuple[str, Sequence[Any]]]:
    """Yields the conditions of a query, each with its parameters. A + before a column keeps SQLite from choosing its
    index where another one has fewer rows."""
    is_rare = query.failed or query.outcome not in (None, "complete")
    if query.id is not None:
        yield ("id = ?" if query.id.startswith("ex_") else "request_id = ?"), [query.id]
    if query.outcome is not None:
        # SQLite uses the partial index of what is not complete only if the query repeats its condition.
        yield ("outcome = ? AND outcome <> 'complete'" if is_rare else "outcome = ?"), [query.outcome]
    if query.failed:
        yield "outcome NOT IN ('complete', 'cancelled', 'finished')", []
    if query.owner is not None:
        yield ("+owner = ?" if is_rare else "owner = ?"), [query.owner]
    if query.model is not None:
        yield "model = ?", [query.model]
    # Records are added about in the order of their times: the index of times tells which part of them is walked
    # (with min(number), SQLite would walk the table from its beginning).
    if query.since is not None:
        first = "(SELECT min(+number) FROM exchanges WHERE started_at >= ?)"
        yield f"+started_at >= ? AND number >= {first}", [query.since, query.since]
    if query.before is not None:
        last = "(SELECT max(+number) FROM exchanges WHERE started_at < ?)"
        yield f"+started_at < ? AND number <= {last}", [query.before, query.before]


class ReportTables:
    """The statements on this table."""

    _db: apsw.Connection

    def used_by(self, last: int, numbers: str) -> Sequence[Used]:
        """Returns what some records have used.

        Args:
            last: Those behind this number,
            numbers: and these, a JSON array.
        """
        [[used]] = self._db.execute(_USED, (last, numbers))
        return _used.decode(used)

    def count_use(self, used: Sequence[Used]) -> None:
        """Adds what records have used."""
        rows = [
            (
                *(each.hour, each.owner, each.key_group, each.model, each.target, each.outcome),
                *(getattr(each, name) for name in _COUNTS),
                *(_histogram(each.durations), _histogram(each.first_contents)),
            )
            for each in used
        ]
        self._db.execute(_ADD_USED, (msgspec.json.encode(rows).decode(),))

    def uncount_lost(self, numbers: str) -> None:
        """Takes away what lost records, a JSON array of their numbers, were counted as: they become others."""
        self._db.execute(_UNCOUNT_LOST, (numbers,))

    def usage(
        self, columns: Sequence[UsageColumn], first: int, end: int, *, owner: str | None, model: str | None
    ) -> Sequence[UsageTotals]:
        """Returns the use within some hours, with one value for each combination of values in some columns."""
        groups = [_COLUMNS[each] for each in columns]
        asked: list[tuple[str, Any]] = [("hour >= ?", first), ("hour < ?", end), ("calls > ?", 0)]
        if owner is not None:
            asked.append(("owner = ?", owner))
        if model is not None:
            asked.append(("model = ?", model))
        where = " AND ".join(condition for condition, _ in asked)
        values = [value for _, value in asked]
        found: dict[tuple[Any, ...], UsageTotals] = {}

        by = ", ".join([*groups, "outcome"])
        sql = f"SELECT {by}, {_SUMS}, {_HISTOGRAMS} FROM usage WHERE {where} GROUP BY {by}"
        for row in self._db.execute(sql, values):
            *group, outcome = row[: len(groups) + 1]
            *sums, durations, first_contents = row[len(groups) + 1 :]
            use = found.setdefault(tuple(group), UsageTotals(group=tuple(group)))
            counts = dict(zip(_COUNTS, sums, strict=True))
            use.outcomes[outcome] = counts["calls"]
            for name, count in counts.items():
                setattr(use, name, getattr(use, name) + count)
            if outcome == "complete":
                _merge(use.durations, durations)
            _merge(use.first_contents, first_contents)
        return list(found.values())

    def hours_used(self) -> tuple[int, int] | None:
        """Returns the first and the last hour of which there are rows; None = there are none."""
        [[first, last]] = self._db.execute("SELECT min(hour), (SELECT max(hour) FROM usage) FROM usage")
        return None if first is None else (first, last)

    def drop_usage(self, before: int, *, limit: int) -> int:
        """Deletes rows from before an hour; returns how many."""
        self._db.execute(
            "DELETE FROM usage WHERE (hour, owner, key_group, model, target, outcome) IN"
            " (SELECT hour, owner, key_group, model, target, outcome FROM usage WHERE hour < ? LIMIT ?)",
            (before, limit),
        )
        return self._db.changes()
