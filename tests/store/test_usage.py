"""The use per hour, which the store counts as it adds records. Over both stores."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from tests.store.test_operations import ALL, record
from trigate.store.interface import Store
from trigate.store.reports import UsageColumn

HOUR = 3600.0


async def used(store: Store, *columns: UsageColumn, first: int = 0, end: int = 1000, **asked: Any) -> Any:
    """The use by the values of the columns."""
    return {use.group: use for use in await store.exchanges.usage(columns, first, end, **asked)}


async def test_sums(store: Store) -> None:
    """Each record counts once, with its tokens, its cost, its outcome and its times."""
    records = [
        record(1, cost=5, cached_tokens=2),
        record(2, owner="p", cost=7, started_at=HOUR + 1, ended_at=HOUR + 2, counted=True),
        record(3, outcome="timeout", started_at=30 * HOUR, ended_at=30 * HOUR + 1, first_content_s=None),
    ]
    await store.exchanges.put([each.encode() for each in records])
    await store.exchanges.put([records[0].encode()])  # it is there already
    [total] = (await used(store)).values()
    assert attrs.asdict(total) == {
        "group": (),
        "calls": 3,
        "estimated": 1,
        "unpriced": 1,
        "prompt_tokens": 9,
        "cached_tokens": 2,
        "cache_write_tokens": 0,
        "completion_tokens": 12,
        "reasoning_tokens": 0,
        "cost": 12,
        "outcomes": {"complete": 2, "timeout": 1},
        "durations": {80: 1, 85: 1},  # up to 2^(80/8) = 1024 ms and 2^(85/8) = 1578 ms
        "first_contents": {64: 2},
    }
    by_key = await used(store, "key", "day")
    assert {group: (use.calls, use.cost) for group, use in by_key.items()} == {
        ("o", 0): (1, 5),
        ("o", 1): (1, 0),
        ("p", 0): (1, 7),
    }
    assert set(await used(store, "upstream", "target", "model", "group")) == {("up", "up/m", "m", "")}
    assert set(await used(store, "hour", "month")) == {(0, "1970-01"), (1, "1970-01"), (30, "1970-01")}
    assert set(await used(store, "hour", first=1, end=30)) == {(1,)}
    assert (await used(store, owner="p"))[()].calls == 1
    assert await used(store, model="other") == {}
    assert await store.exchanges.hours_used() == (0, 30)


async def test_a_lost_record_is_not_counted_twice(store: Store) -> None:
    """What replaces it is counted in its place, also in another row."""
    lost = record(1, outcome="lost", ended_at=None, target=None, prompt_tokens=None, completion_tokens=None)
    await store.exchanges.put([lost.encode()])
    assert (await used(store))[()].outcomes == {"lost": 1}
    await store.exchanges.put([record(1, cost=3).encode(), record(1, cost=9).encode()])
    use = (await used(store))[()]
    assert (use.calls, use.outcomes, use.cost) == (1, {"complete": 1}, 3)


async def test_the_use_outlives_the_records(store: Store) -> None:
    """It has an age of its own."""
    await store.exchanges.put([record(n, started_at=n * HOUR).encode() for n in range(1, 5)])
    await store.prune(attrs.evolve(ALL, max_exchanges=0))
    assert await store.exchanges.list(limit=9) == []
    assert (await used(store))[()].calls == 4
    await store.prune(attrs.evolve(ALL, usage_before=3 * HOUR + 10.0))
    assert set(await used(store, "hour")) == {(3,), (4,)}


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63)])
async def test_absurd_numbers(store: Store, value: int) -> None:
    """Whatever tokens a damaged journal has, the records can be added."""
    absurd = {"prompt_tokens": value, "completion_tokens": value, "cached_tokens": value}
    await store.exchanges.put([record(n, **absurd).encode() for n in range(100)])
    assert (await used(store))[()].calls == 100
    assert (await used(store))[()].prompt_tokens == (100 * 10**12 if value > 0 else 0)


async def test_texts_of_clients_make_no_rows(store: Store) -> None:
    """Models that do not exist share a row."""
    await store.exchanges.put(
        [record(n, model=f"m'{n}", outcome="model_not_found", target=None).encode() for n in range(9)]
    )
    assert {group: use.calls for group, use in (await used(store, "model")).items()} == {("",): 9}
