"""The table of the use per hour, a part of `tables.Tables`, and the conditions of queries for records.

Triggers of the schema count each record in the table.
"""

from __future__ import annotations

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
