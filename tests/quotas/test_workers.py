"""Several workers count as one: two gateways that share a store, in one process, on the real clock."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.lowlevel

from tests.quotas.test_limits import ANSWER, ask, keys, priced
from tests.support.gateway import OpenApp, Served
from tests.support.provider import Pause, Provider, Script, says
from trigate.quotas.counters import Budget, Counter, Slots
from trigate.quotas.service import ASK_AGAIN_S
from trigate.store.interface import Store
from trigate.store.memory import open_memory_store
from trigate.store.records import ExchangeRecord, LeaseWish
from trigate.store.sqlite import open_sqlite_store

SLOTS = LeaseWish(name="key:ada/max_exchanges", scope="key:ada", worker="w1", limit=2, least=2, most=2, at=0.0)
DAY = LeaseWish(
    name="key:a/day/1", scope="key:a", worker="w1", limit=100, least=1, most=70, at=0.0, first_day=1, end_day=2
)
RATE = LeaseWish(name="key:a/rpm", scope="key:a", worker="w1", limit=100, least=1, most=70, at=0.0, is_rate=True)


@contextlib.asynccontextmanager
async def two_workers(
    open_app: OpenApp, store: Path, script: Script, **sections: Any
) -> AsyncIterator[tuple[Served, Served]]:
    """Opens two gateways over one store, both of which have joined."""
    config = priced(**sections)
    async with (
        open_app(config, Provider(script), store=store) as a,
        open_app(config, Provider(script), store=store) as b,
    ):
        for served in (a, b):
            await served.gateway.workers.join()
        await until(lambda: a.gateway.workers.count == b.gateway.workers.count == 2)
        yield a, b


async def until(holds: Callable[[], bool]) -> None:
    """Waits until a condition holds."""
    with trio.fail_after(3):
        while not holds():  # noqa: ASYNC110 - what changes is in another thread, or has no event
            await trio.sleep(0.01)


def counters_of(served: Served) -> dict[str, Counter]:
    """The counters of a worker, by name."""
    return {each.name: each for each in served.gateway.exchange_services.quotas.all_counters()}


async def statuses(*calls: Any) -> list[int]:
    """Waits for calls; returns their statuses, sorted."""
    return sorted([(await call.wait()).status for call in calls])


@pytest.mark.slow
async def test_exchanges_in_flight(open_app: OpenApp, tmp_path: Path) -> None:
    """Two workers let two calls through a limit of two, wherever these arrive."""
    async with two_workers(open_app, tmp_path / "s.db", (Pause(0.4), *says("x")), keys=keys(max_exchanges=2)) as both:
        a, b = both
        assert await statuses(ask(a), ask(a), ask(b), ask(b)) == [200, 200, 429, 429]
        await trio.sleep(ASK_AGAIN_S)
        assert await statuses(ask(b), ask(b)) == [200, 200], "what the other worker does not use comes here"
        for served in both:
            served.assert_clean()


async def test_calls_that_come_at_once(open_app: OpenApp, tmp_path: Path) -> None:
    """Calls that wait for the same lease get it together: none is refused because another one was quicker."""
    async with two_workers(open_app, tmp_path / "s.db", says("x"), keys=keys(max_exchanges=4)) as (a, b):
        assert await statuses(*(ask(a) for _ in range(4))) == [200] * 4
        await trio.lowlevel.checkpoint()
        assert await statuses(*(ask(b) for _ in range(4))) == [200] * 4


async def test_requests_per_minute(open_app: OpenApp, tmp_path: Path) -> None:
    """A minute's calls are let through once, and not once by each worker."""
    async with two_workers(open_app, tmp_path / "s.db", says("x"), keys=keys(rpm=6)) as (a, b):
        assert await statuses(ask(a), ask(a), ask(b)) == [200] * 3
        assert await statuses(*(ask(served) for served in (a, b, a, b, a, b))) == [200] * 3 + [429] * 3


async def test_a_budget(open_app: OpenApp, tmp_path: Path) -> None:
    """The cost of both workers' calls is in one budget; what is spent is the sum of the records."""
    async with two_workers(open_app, tmp_path / "s.db", ANSWER, keys=keys(budget_usd="0.003")) as (a, b):
        passed = 0
        for _ in range(6):
            passed += (await statuses(ask(a), ask(b))).count(200)
        assert 10 <= passed <= 11
        for served in (a, b):
            await served.gateway.ledger.flush()
        spent = await a.gateway.store.quotas.spent("key:ada", first_day=0, end_day=10**7)
        assert spent == passed * 300
        [budget] = [each for each in counters_of(a).values() if isinstance(each, Budget)]
        assert budget.held == 0


async def test_a_worker_that_exits_leaves_its_leases(open_app: OpenApp, tmp_path: Path) -> None:
    """What it has not used of a minute's calls, the next one may use at once."""
    store, config = tmp_path / "s.db", priced(keys=keys(rpm=5))
    async with open_app(config, Provider(says("x")), store=store) as first:
        assert await statuses(ask(first)) == [200]
    async with open_app(config, Provider(says("x")), store=store) as second:
        assert await statuses(*(ask(second) for _ in range(5))) == [200] * 4 + [429]


@pytest.mark.slow
async def test_a_dead_worker(open_app: OpenApp, tmp_path: Path) -> None:
    """The leases of a worker that has died are free as soon as it is removed."""
    async with open_app(priced(keys=keys(max_exchanges=2)), Provider(says("x")), store=tmp_path / "s.db") as served:
        store = served.gateway.store
        await store.quotas.lease(attrs.evolve(SLOTS, worker="w_dead"))
        assert await statuses(ask(served)) == [429]
        await store.workers.remove(["w_dead"])
        await trio.sleep(ASK_AGAIN_S)
        assert await statuses(ask(served), ask(served)) == [200, 200]


async def test_a_store_that_cannot_be_used(open_app: OpenApp) -> None:
    """Calls are served from the lease that the worker has; one that needs more is refused with the reason."""
    async with open_app(priced(keys=keys(rpm=9))) as served:
        store: Any = served.gateway.store
        served.providers["up"].play(says("x"))
        assert (await ask(served).wait()).status == 200
        store.failure = "the disk is full"
        assert (await ask(served).wait()).status == 200
        served.gateway.exchange_services.quotas.apply(priced(keys=keys(rpm=9, max_exchanges=1)))
        served.gateway.keys.apply(priced(keys=keys(rpm=9, max_exchanges=1)))
        refused = await ask(served).wait()
        assert (refused.status, refused.error["code"]) == (503, "store_unavailable")
        store.failure = None
        assert (await ask(served).wait()).status == 200
        served.assert_clean()


async def test_a_cancelled_call_loses_no_lease(open_app: OpenApp, tmp_path: Path) -> None:
    """A client that leaves while its call leases something: the lease is the worker's all the same."""
    async with open_app(priced(keys=keys(max_exchanges=3)), Provider(says("x")), store=tmp_path / "s.db") as served:
        call = ask(served)
        await trio.lowlevel.checkpoint()
        call.disconnect()
        await call.wait()
        assert await statuses(ask(served)) == [200]
        await until(lambda: not served.gateway.exchange_services.quotas._renewing)
        [slots] = counters_of(served).values()
        assert isinstance(slots, Slots)
        assert (slots.granted, slots.held) == (3, 0)


@pytest.fixture(params=["sqlite", "memory"])
async def store(request: Any, tmp_path: Path) -> AsyncIterator[Store]:
    """An empty store of each kind."""
    async with open_sqlite_store(tmp_path / "store.db") if request.param == "sqlite" else open_memory_store() as made:
        yield made


async def test_a_lease_is_never_more_than_the_limit(store: Store) -> None:
    """Whatever two workers lease, together they have the limit at most."""
    first = await store.quotas.lease(DAY)
    second = await store.quotas.lease(attrs.evolve(DAY, worker="w2"))
    assert (first.amount, first.others, second.amount, second.others) == (70, 0, 30, 70)


def _record(outcome: str, cost: int | None, *, day: int = 1, number: int = 1) -> bytes:
    """A record of the worker ``w1``, as JSON."""
    return ExchangeRecord(
        id=f"ex_{number}",
        request_id="r",
        owner="a",
        worker="w1",
        endpoint="/x",
        model="m",
        stream=False,
        started_at=86400.0 * day + 5,
        outcome=outcome,
        cost=cost,
        target="up/m/n",
    ).encode()


async def test_costs_move_from_leases_to_what_is_spent(store: Store) -> None:
    """In the transaction that adds the record; a record that is added twice counts once."""

    await store.quotas.lease(DAY)
    other = _record("complete", 8, number=2)
    await store.exchanges.put([_record("lost", None), other, _record("complete", 1, day=2, number=3)])
    await store.exchanges.put([_record("complete", 40), other])
    await store.exchanges.put([_record("complete", 40)])
    assert await store.quotas.spent("key:a", first_day=1, end_day=2) == 48
    assert await store.quotas.spent("upstream:up", first_day=0, end_day=9) == 49
    lease = await store.quotas.lease(DAY)
    assert (lease.amount, lease.held, lease.spent) == (30, 52, 48)
    await store.quotas.give_back(DAY, 52)
    await store.workers.remove(["w1"])
    assert (await store.quotas.lease(DAY)).amount == 52


async def test_what_a_worker_has_overdrawn_is_not_free(store: Store) -> None:
    """A call has cost more than its worker had leased: another worker gets what the limit has left, and no more."""
    await store.quotas.lease(attrs.evolve(DAY, most=10))
    await store.exchanges.put([_record("complete", 30)])
    second = await store.quotas.lease(attrs.evolve(DAY, worker="w2", most=100))
    assert (second.amount, second.spent, second.others) == (70, 30, 0)
    first = await store.quotas.lease(DAY)
    assert (first.amount, first.held) == (20, 0), "it had overdrawn as much"


async def test_a_rate_is_leased_with_what_may_be_used_at_once(store: Store) -> None:
    """What a worker has used fills again at its share; what it gives back is there for the others at once."""
    first = await store.quotas.lease(RATE)
    assert (first.amount, first.tokens) == (70, 70)
    second = await store.quotas.lease(attrs.evolve(RATE, worker="w2"))
    assert (second.amount, second.tokens) == (30, 30)
    await store.quotas.give_back(RATE, 20)
    third = await store.quotas.lease(attrs.evolve(RATE, worker="w2", most=10))
    assert (third.amount, third.tokens) == (10, 10)
    await store.workers.remove(["w1"])  # what it had used is not known: its share is empty, and fills
    after = await store.quotas.lease(attrs.evolve(RATE, worker="w2", most=60, at=6.0))
    assert (after.amount, after.tokens) == (60, 16)
