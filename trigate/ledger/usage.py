"""The use of the gateway within some time: calls, outcomes, tokens, cost, and how long answers took.

The store has it per hour (`store.interface.Exchanges.usage`), and it stays when the records are deleted. A day at a
time is read, so that other reads of the store need not wait for a long report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from trigate.errors import BadRequest
from trigate.ledger.ledger import Ledger
from trigate.store.interface import Store
from trigate.store.reports import UsageColumn, UsageTotals

Column = UsageColumn | Literal["tag"]
"""What a report can be grouped by: what the store has, and the tags that keys have now."""
MAX_ROWS = 50_000
"""How many combinations of values a report may have."""
HOUR_S = 3600
_DAY_HOURS = 24
_BUCKETS_PER_OCTAVE = 8
_COUNTS = (
    *("calls", "estimated", "unpriced", "prompt_tokens", "cached_tokens", "cache_write_tokens", "completion_tokens"),
    *("reasoning_tokens", "cost"),
)


def add(total: UsageTotals, other: UsageTotals) -> None:
    """Adds the use of other calls to a total."""
    for name in _COUNTS:
        setattr(total, name, getattr(total, name) + getattr(other, name))
    for mine, others in (
        (total.outcomes, other.outcomes),
        (total.durations, other.durations),
        (total.first_contents, other.first_contents),
    ):
        counts: dict[Any, int] = mine
        for key, count in others.items():
            counts[key] = counts.get(key, 0) + count


def percentile_s(histogram: dict[int, int], share: float) -> float | None:
    """Returns the time that a share of the calls took at most, in seconds, within 5 %; None = there are no calls.

    >>> percentile_s({80: 98, 104: 2}, 0.5), percentile_s({80: 94, 104: 6}, 0.95), percentile_s({}, 0.5)
    (0.981, 7.845, None)
    """
    rank = math.ceil(share * sum(histogram.values()))
    for bucket in sorted(histogram):
        rank -= histogram[bucket]
        if rank <= 0:
            return round(2 ** ((bucket - 0.5) / _BUCKETS_PER_OCTAVE) / 1000, 3)
    return None


async def usage(
    store: Store,
    ledger: Ledger,
    columns: Sequence[Column],
    first: int,
    end: int,
    *,
    tags_of: Callable[[str], Sequence[str]],
    owner: str | None = None,
    model: str | None = None,
) -> tuple[list[UsageTotals], UsageTotals]:
    """Returns the use within some hours, the records of this worker included, as `store.interface.Exchanges.usage`.

    Args:
        tags_of: Returns the tags of the key of a name.

    Returns:
        The use for each combination of values, sorted by them, and that of all calls. The use of a key with several
        tags is in several rows.

    Raises:
        BadRequest: There are more than `MAX_ROWS` combinations.
        StoreUnavailable: The store cannot be read.
    """
    await ledger.flush()
    hours = await store.exchanges.hours_used()
    found: dict[tuple[str | int, ...], UsageTotals] = {}
    total = UsageTotals()
    if hours is not None:
        asked: list[UsageColumn] = ["key" if column == "tag" else column for column in columns]
        at, end = max(first, hours[0]), min(end, hours[1] + 1)
        while at < end:
            to = min(end, (at // _DAY_HOURS + 1) * _DAY_HOURS)
            for use in await store.exchanges.usage(asked, at, to, owner=owner, model=model):
                add(total, use)
                for group in _groups(columns, use.group, tags_of):
                    add(found.setdefault(group, UsageTotals(group=group)), use)
            if len(found) > MAX_ROWS:
                raise BadRequest(
                    f"The report has more than {MAX_ROWS} rows. Group by less, or ask for less time.", param="group_by"
                )
            at = to
    return sorted(found.values(), key=lambda use: use.group), total


def _groups(
    columns: Sequence[Column], group: tuple[str | int, ...], tags_of: Callable[[str], Sequence[str]]
) -> Iterator[tuple[str | int, ...]]:
    """Yields the groups that a group belongs to: where a tag is asked for, one for each tag of its key, or that of no
    tag."""
    if "tag" not in columns:
        yield group
        return
    at = columns.index("tag")
    for tag in set(tags_of(str(group[at]))) or ("",):
        yield (*group[:at], tag, *group[at + 1 :])
