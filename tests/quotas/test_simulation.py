"""100 000 calls of 20 keys at two workers, in virtual time.

Arrivals, lengths, costs, errors, cancellations and the workers that are killed are random. No limit is exceeded by more
than its bound, what is spent is the sum of the records, and in the end nothing is held.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
from collections import Counter as Count
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.support.gateway import make_config
from trigate.errors import LimitReached
from trigate.keys.key import Key
from trigate.quotas import service
from trigate.quotas.counters import Amounts, Budget, Reservation, Slots
from trigate.quotas.service import Quotas
from trigate.store.interface import Store
from trigate.store.memory import open_memory_store
from trigate.store.records import ExchangeRecord

KEYS = 20
RPM, TPM, SLOTS, BUDGET = 200, 200_000, 24, 2_500_000
HELD = Amounts(tokens=1000, cost=1000)
"""What each call holds; it may use up to half as much again."""
START_S = 20_000 * 86_400.0


class Bus:
    """The workers of a machine, as `workers.membership.Workers` has them."""

    def __init__(self) -> None:
        self.workers: list[FakeWorkers] = []


@attrs.define(eq=False)
class FakeWorkers:
    """One worker's view of the others. Notifications arrive at once."""

    bus: Bus
    id: str
    callbacks: dict[str, Callable[[bytes], None]] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.bus.workers.append(self)

    @property
    def count(self) -> int:
        """How many run."""
        return len(self.bus.workers)

    def on_notify(self, topic: str, callback: Callable[[bytes], None]) -> None:
        """As `Workers.on_notify`."""
        self.callbacks[topic] = callback

    def notify(self, topic: str, body: bytes = b"") -> None:
        """As `Workers.notify`."""
        for other in self.bus.workers:
            if other is not self:
                other.callbacks[topic](body)

    async def join(self) -> None:
        """As `Workers.join`."""
        await trio.lowlevel.checkpoint()


@attrs.define(eq=False)
class SimWorker:
    """A worker: its quotas, its calls in flight, and its records that are not in the store yet."""

    id: str
    quotas: Quotas
    workers: FakeWorkers
    live: dict[int, tuple[Reservation, str]] = attrs.field(factory=dict)
    waiting: list[bytes] = attrs.field(factory=list)


def a_machine(store: Store, nursery: trio.Nursery, count: int) -> list[SimWorker]:
    """Makes workers over one store."""
    bus = Bus()
    return [a_worker(f"w{number}", bus, store, nursery) for number in range(count)]


def a_worker(name: str, bus: Bus, store: Store, nursery: trio.Nursery) -> SimWorker:
    """Makes a worker beside others."""
    workers = FakeWorkers(bus, name)
    quotas = Quotas(store, workers, nursery)  # type: ignore[arg-type]
    quotas.apply(_config())
    return SimWorker(name, quotas, workers)


def _config() -> Any:
    budgets = {"budget_usd": f"{BUDGET / 1e6}", "budget_period": "total"}
    own = {"rpm": RPM, "tpm": TPM, "max_exchanges": SLOTS, "group": "team", **budgets}
    return make_config(
        keys={f"k{n}": {"secret": f"secret-of-key-{n:04}", **own} for n in range(KEYS)},
        groups={"team": {"max_exchanges": KEYS * 20}},
    )


def _keys() -> list[Key]:
    config = _config()
    return [Key(name=name, settings=own, group=config.groups["team"]) for name, own in config.keys.items()]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
async def test_a_hundred_thousand_calls(mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """See the module."""
    await _simulate(mock_clock, monkeypatch, seed, calls=100_000)


async def test_a_thousand_calls(mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, shorter."""
    await _simulate(mock_clock, monkeypatch, 2, calls=1000)


async def _simulate(clock: MockClock, monkeypatch: pytest.MonkeyPatch, seed: int, *, calls: int) -> None:
    dice = random.Random(seed)
    begun_at = trio.current_time()

    class VirtualTime:
        @staticmethod
        def time() -> float:
            return START_S + trio.current_time() - begun_at

    monkeypatch.setattr(service, "time", VirtualTime)
    names = _keys()
    passed: dict[str, list[float]] = {key.name: [] for key in names}
    in_flight: Count[str] = Count()
    most_in_flight: Count[str] = Count()
    spent: Count[str] = Count()
    numbers = itertools.count()
    ends: list[tuple[float, int, SimWorker]] = []
    async with open_memory_store() as store, trio.open_nursery() as nursery:
        machine = a_machine(store, nursery, 2)

        def settle(worker: SimWorker, number: int) -> None:
            if number not in worker.live:
                return  # it was killed
            reservation, name = worker.live.pop(number)
            in_flight[name] -= 1
            used = Amounts(0, 0) if dice.random() < 0.2 else Amounts(dice.randrange(1500), dice.randrange(1500))
            worker.quotas.settle(reservation, used)
            spent[name] += used.cost
            worker.waiting.append(_record(worker.id, number, name, used.cost))

        async def begin(worker: SimWorker, key: Key) -> None:
            limits = worker.quotas.limits(key, "m", START_S)
            number = next(numbers)
            reservation = limits.reserve(HELD, trio.current_time())
            if reservation is None:
                with contextlib.suppress(LimitReached), trio.CancelScope() as scope:
                    if dice.random() < 0.1:
                        scope.cancel()
                    reservation = await worker.quotas.reserve(limits, HELD)
            if reservation is not None:
                passed[key.name].append(trio.current_time() - begun_at)
                in_flight[key.name] += 1
                most_in_flight[key.name] = max(most_in_flight[key.name], in_flight[key.name])
                worker.live[number] = reservation, key.name
                heapq.heappush(ends, (trio.current_time() + dice.expovariate(0.5), number, worker))

        clock.autojump_threshold = 0  # only waits for other workers take time by themselves
        for step in range(calls):
            clock.jump(dice.expovariate(50.0))
            while ends and ends[0][0] <= trio.current_time():
                _, number, worker = heapq.heappop(ends)
                settle(worker, number)
            await begin(dice.choice(machine), dice.choice(names[:5]) if dice.random() < 0.1 else dice.choice(names))
            if step % 500 == 0:
                for worker in machine:
                    await _flush(store, worker)
            if step % (calls // 4) == calls // 8:
                await _kill(store, machine, in_flight, nursery)
        while ends:
            _, number, worker = heapq.heappop(ends)
            settle(worker, number)
        for worker in machine:
            await _flush(store, worker)
            for counter in worker.quotas.all_counters():
                assert not isinstance(counter, Slots | Budget) or counter.held == 0
            worker.quotas.close()
        for key in names:
            total = await store.quotas.spent(f"key:{key.name}", first_day=0, end_day=10**8)
            assert total == spent[key.name], "what is spent is the sum of the records"
            # each call in flight may use half as much more than it holds
            assert total <= BUDGET + SLOTS * HELD.cost // 2
            assert most_in_flight[key.name] <= SLOTS
            times = passed[key.name]
            until = 0
            for first, at in enumerate(times):
                while until < len(times) and times[until] < at + 60:
                    until += 1
                # at most one lease more for each worker that was killed, which is the bound
                assert until - first <= 2 * RPM + 1 + 4 * RPM
        assert await store.quotas.spent("all", first_day=0, end_day=10**8) == sum(spent.values())
        assert sum(map(len, passed.values())) > calls // 100
        nursery.cancel_scope.cancel()


async def _flush(store: Store, worker: SimWorker) -> None:
    records, worker.waiting = worker.waiting, []
    await store.exchanges.put(records)


async def _kill(store: Store, machine: list[SimWorker], in_flight: Count[str], nursery: trio.Nursery) -> None:
    """Kills the last worker and starts another one: its records are found, its calls and its leases are gone."""
    dead = machine.pop()
    dead.workers.bus.workers.remove(dead.workers)
    for _, name in dead.live.values():
        in_flight[name] -= 1
    dead.live.clear()
    await _flush(store, dead)
    await store.workers.remove([dead.id])
    machine.append(a_worker(f"{dead.id}x", dead.workers.bus, store, nursery))


def _record(worker: str, number: int, owner: str, cost: int) -> bytes:
    return ExchangeRecord(
        id=f"ex_{worker}_{number}",
        request_id="r",
        owner=owner,
        worker=worker,
        endpoint="/chat/completions",
        model="m",
        stream=True,
        started_at=START_S,
        outcome="complete",
        cost=cost,
        key_group="team",
    ).encode()


@pytest.mark.slow
async def test_ten_thousand_random_cancellations(autojump_clock: MockClock) -> None:
    """Calls that are cancelled at any moment, while they wait or are served, leave nothing held and no lease lost."""
    dice = random.Random(5)
    names = _keys()
    async with open_memory_store() as store, trio.open_nursery() as nursery:
        machine = a_machine(store, nursery, 2)

        async def call(quotas: Quotas, key: Key) -> None:
            limits = quotas.limits(key, "m", START_S)
            with trio.move_on_after(dice.choice((0, 0, 0.01, 0.05, 0.3))), contextlib.suppress(LimitReached):
                reservation = await quotas.reserve(limits, Amounts(tokens=10, cost=1))
                try:
                    await trio.sleep(dice.choice((0, 0.02, 0.2)))
                finally:
                    quotas.settle(reservation, Amounts())

        for _ in range(100):
            async with trio.open_nursery() as wave:
                for _ in range(100):
                    wave.start_soon(call, dice.choice(machine).quotas, dice.choice(names))
        granted: Count[str] = Count()
        for worker in machine:
            assert not worker.quotas._renewing
            for counter in worker.quotas.all_counters():
                if isinstance(counter, Slots | Budget):
                    assert counter.held == 0
                    granted[counter.name] += counter.granted
        assert max(granted[f"key:k{n}/max_exchanges"] for n in range(KEYS)) <= SLOTS
        for worker in machine:
            worker.quotas.close()
        for n in range(KEYS):
            assert await store.quotas.spent(f"key:k{n}", first_day=0, end_day=10**8) == 0
        nursery.cancel_scope.cancel()
