"""Deliveries: attempts, pauses, order, and what a worker leaves when it exits. Time is virtual, the store in memory."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.logs import Logs
from trigate.runs import outbox as outbox_module
from trigate.runs.outbox import ATTEMPT_S, CONCURRENCY, GRACE_S, SCHEDULE_S, Outbox, Receipt, open_outbox, pause_s
from trigate.store.interface import Store
from trigate.store.memory import MemoryStore, open_memory_store
from trigate.store.records import Delivery, Worker
from trigate.store.sqlite import open_sqlite_store
from trigate.workers.membership import Workers, open_workers

START = 1_700_000_000.0
ARRIVED = Receipt(delivered=True, status=200)
FAILED = Receipt(delivered=False, again=True, status=500, error="the receiver answered 500")

Step = Receipt | Exception | Callable[[], Awaitable[Receipt]]


def now() -> float:
    """The POSIX time, by the virtual clock."""
    return START + trio.current_time()


def delivery(number: int = 1, *, target: str = "https://a.example/", repeatable: bool = True) -> Delivery:
    """Something to deliver on the channel ``h``, due at once."""
    return Delivery(
        id=f"msg_{number}",
        run_id=f"run_{number}",
        channel="h",
        target=target,
        body=b"{}",
        created_at=START,
        due_at=START,
        repeatable=repeatable,
    )


@attrs.define(eq=False)
class Scripted:
    """A carrier whose attempts play scripted steps; the last step repeats.

    Attributes:
        begun: When each attempt began, and the id of its delivery.
        under_way: The targets of the attempts in progress.
        most: The highest number of attempts at the same time.
        most_to_one: The highest number of attempts to one target at the same time.
    """

    steps: list[Step] = attrs.field(factory=lambda: [ARRIVED])
    begun: list[tuple[float, str]] = attrs.field(factory=list)
    under_way: list[str] = attrs.field(factory=list)
    most: int = 0
    most_to_one: int = 0

    async def deliver(self, delivery: Delivery) -> Receipt:
        """Plays one attempt."""
        self.begun.append((trio.current_time(), delivery.id))
        self.under_way.append(delivery.target)
        self.most = max(self.most, len(self.under_way))
        self.most_to_one = max(self.most_to_one, self.under_way.count(delivery.target))
        try:
            step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
            await trio.lowlevel.checkpoint()
            if isinstance(step, Receipt):
                return step
            if isinstance(step, Exception):
                raise step
            return await step()
        finally:
            self.under_way.remove(delivery.target)

    def times(self) -> list[float]:
        """When each attempt began."""
        return [at for at, _ in self.begun]


async def after(seconds: float, receipt: Receipt = ARRIVED) -> Receipt:
    """An attempt that takes this long."""
    await trio.sleep(seconds)
    return receipt


@attrs.define(eq=False)
class Opened:
    """An open outbox, and what it uses."""

    store: MemoryStore
    workers: Workers
    outbox: Outbox
    carrier: Scripted

    async def add(self, *deliveries: Delivery) -> None:
        """Stores deliveries, and wakes the outbox."""
        for each in deliveries:
            await self.store.deliveries.add(each)
        self.outbox.wake()

    async def row(self, number: int = 1) -> Delivery:
        """The stored row of a delivery."""
        [found] = await self.store.deliveries.of_run(f"run_{number}")
        return found

    async def settled(self, number: int = 1) -> Delivery:
        """Waits until a delivery has a final state."""
        while True:
            found = await self.row(number)
            if found.state not in ("pending", "sending"):
                return found
            await trio.sleep(1000.0)


@contextlib.asynccontextmanager
async def opened(
    *steps: Step, store: MemoryStore | None = None, carrier: Scripted | None = None, joined: bool = True
) -> AsyncIterator[Opened]:
    """Opens an outbox with one carrier, for the channel ``h``. Its pauses are the longest of the schedule."""
    async with (
        contextlib.nullcontext(store) if store is not None else open_memory_store() as kept,
        open_workers(kept) as workers,
        open_outbox(kept, workers, now=now, chance=lambda: 1.0) as outbox,
    ):
        carrier = carrier or Scripted(list(steps) or [ARRIVED])
        outbox.carriers["h"] = carrier
        if joined:
            await workers.join()
        yield Opened(kept, workers, outbox, carrier)


# -- the schedule -----------------------------------------------------------------------------------------------------


def test_the_schedule_is_that_of_standard_webhooks() -> None:
    """There are ten attempts, at the times of the specification's example."""
    times = list(itertools.accumulate(SCHEDULE_S, initial=0.0))
    seconds = [(0, 0, 0), (0, 0, 5), (0, 5, 5), (0, 35, 5), (2, 35, 5), (7, 35, 5), (17, 35, 5), (31, 35, 5)]
    seconds += [(51, 35, 5), (75, 35, 5)]
    assert times == [3600 * hours + 60 * minutes + rest for hours, minutes, rest in seconds]


@pytest.mark.parametrize("attempts", range(1, 10))
def test_a_pause_is_random_up_to_the_schedule(attempts: int) -> None:
    """Full jitter: the pause is between zero and the schedule's value."""
    assert pause_s(attempts, after_s=None, chance=0.0) == 0.0
    assert pause_s(attempts, after_s=None, chance=1.0) == SCHEDULE_S[attempts - 1]


@pytest.mark.parametrize(
    ("after_s", "chance", "expected"),
    [(0.0, 0.5, 2.5), (2.0, 0.5, 2.5), (3.0, 0.5, 3.0), (86_400.0, 0.5, 86_400.0), (86_401.0, 0.5, 86_400.0)],
)
def test_a_pause_is_no_shorter_than_the_receiver_asked_for(after_s: float, chance: float, expected: float) -> None:
    """The receiver can lengthen a pause up to a day, and cannot shorten the schedule's."""
    assert pause_s(1, after_s=after_s, chance=chance) == expected


def test_after_the_schedule_there_is_no_attempt() -> None:
    """Also where the receiver asked for one."""
    assert pause_s(10, after_s=None, chance=0.5) is None
    assert pause_s(10, after_s=60.0, chance=0.5) is None


# -- attempts ---------------------------------------------------------------------------------------------------------


async def test_a_due_delivery_is_made(autojump_clock: MockClock) -> None:
    """It is made once and immediately, and the store has the outcome."""
    async with opened() as it:
        await it.add(delivery())
        row = await it.settled()
        await trio.sleep(1000.0)
    assert (row.state, row.attempts, row.last_status, row.done_at) == ("delivered", 1, 200, START)
    assert it.carrier.times() == [0.0]


async def test_the_outbox_waits_for_the_worker_to_join(autojump_clock: MockClock) -> None:
    """Until then the store is not read. Afterwards deliveries left by others are made without a notification."""
    async with opened(joined=False) as it:
        it.store.failure = "the store is closed"
        await trio.sleep(1000.0)
        it.store.failure = None
        await it.store.deliveries.add(delivery())
        await trio.sleep(1000.0)
        assert it.carrier.begun == []
        await it.workers.join()
        assert (await it.settled()).state == "delivered"


async def test_a_failure_is_retried_until_the_schedule_is_over(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are ten attempts over three days; then the delivery has failed, with the last status."""
    monkeypatch.setattr(outbox_module, "POLL_S", 3600.0)  # polling each minute of three days is slow
    async with opened(FAILED) as it:
        await it.add(delivery())
        row = await it.settled()
    assert it.carrier.times() == pytest.approx(list(itertools.accumulate(SCHEDULE_S, initial=0.0)))
    assert (row.state, row.attempts, row.last_status, row.last_error) == (
        *("failed", 10, 500),
        "the receiver answered 500",
    )


async def test_a_successful_attempt_is_the_last(autojump_clock: MockClock, logs: Logs) -> None:
    """Each attempt has a log line, with the pause before the next attempt."""
    async with opened(FAILED, FAILED, ARRIVED) as it:
        await it.add(delivery())
        row = await it.settled()
    assert (row.state, row.attempts) == ("delivered", 3)
    lines = [entry for entry in logs.entries if entry["event"] == "delivery"]
    assert [(line["attempt"], line["state"], line["status"], line["next_in_s"]) for line in lines] == [
        (1, "pending", 500, 5.0),
        (2, "pending", 500, 300.0),
        (3, "delivered", 200, None),
    ]


@pytest.mark.slow
async def test_a_receiver_sets_the_pause(autojump_clock: MockClock) -> None:
    """The outbox waits as long as it asks for, up to a day."""
    asks = [attrs.evolve(FAILED, after_s=seconds) for seconds in (60.0, 1e6)]
    async with opened(*asks, ARRIVED) as it:
        await it.add(delivery())
        await it.settled()
    assert it.carrier.times() == pytest.approx([0.0, 60.0, 86_460.0])


async def test_a_permanent_failure(autojump_clock: MockClock) -> None:
    """There is no further attempt."""
    async with opened(attrs.evolve(FAILED, again=False, status=410)) as it:
        await it.add(delivery())
        row = await it.settled()
    assert (row.state, row.attempts, row.last_status) == ("failed", 1, 410)


async def test_a_delivery_that_may_have_arrived_is_repeated_only_if_repeatable(autojump_clock: MockClock) -> None:
    """Otherwise it becomes ``unknown``, and stays so."""
    async with opened(attrs.evolve(FAILED, unsure=True), ARRIVED) as it:
        await it.add(delivery(1, repeatable=False))
        assert (await it.settled(1)).state == "unknown"
        it.carrier.steps = [attrs.evolve(FAILED, unsure=True), ARRIVED]
        await it.add(delivery(2))
        assert (await it.settled(2)).state == "delivered"
    assert [id_ for _, id_ in it.carrier.begun] == ["msg_1", "msg_2", "msg_2"]


async def test_a_carrier_that_raises(autojump_clock: MockClock, logs: Logs) -> None:
    """The attempt has failed, and the defect is logged; the outbox continues."""
    logs.expect_error("delivery_crashed")
    async with opened(KeyError("x"), ARRIVED) as it:
        await it.add(delivery())
        row = await it.settled()
    assert (row.state, row.attempts) == ("delivered", 2)


async def test_an_attempt_is_bounded_in_time(autojump_clock: MockClock) -> None:
    """A receiver that never answers holds its attempt for `ATTEMPT_S`, and no longer."""
    async with opened(partial(after, 1e6), ARRIVED) as it:
        await it.add(delivery())
        await trio.sleep(ATTEMPT_S + 1.0)
        assert (await it.row()).last_error == "no answer within 30 s"
        assert (await it.settled()).state == "delivered"
    assert it.carrier.times() == pytest.approx([0.0, ATTEMPT_S + SCHEDULE_S[0]])


async def test_a_channel_without_a_carrier_waits(autojump_clock: MockClock) -> None:
    """Its deliveries stay pending, with no attempt counted, until it has a carrier again."""
    async with opened() as it:
        del it.outbox.carriers["h"]
        await it.add(delivery())
        await trio.sleep(1000.0)
        row = await it.row()
        assert (row.state, row.attempts) == ("pending", 0)
        assert await it.store.deliveries.depth() == {"h": 1}
        it.outbox.carriers["h"] = it.carrier
        it.outbox.wake()
        assert (await it.settled()).state == "delivered"


# -- order ------------------------------------------------------------------------------------------------------------


async def test_each_target_gets_one_at_a_time_in_order(autojump_clock: MockClock) -> None:
    """While a delivery is being sent, the next one to the same target stays pending; other targets do not wait."""
    async with opened(partial(after, 10.0)) as it:
        await it.add(*(delivery(number) for number in range(1, 4)), delivery(4, target="https://b.example/"))
        await trio.sleep(5.0)
        assert [(await it.row(number)).state for number in range(1, 5)] == ["sending", "pending", "pending", "sending"]
        await it.settled(3)
    assert it.carrier.begun == [(0.0, "msg_1"), (0.0, "msg_4"), (10.0, "msg_2"), (20.0, "msg_3")]
    assert it.carrier.most_to_one == 1


async def test_a_retry_does_not_delay_other_deliveries(autojump_clock: MockClock) -> None:
    """While a delivery waits for its next attempt, the next one to the same target is made."""
    async with opened(FAILED, ARRIVED) as it:
        await it.add(delivery(1), delivery(2))
        await it.settled(1)
    assert [id_ for _, id_ in it.carrier.begun] == ["msg_1", "msg_2", "msg_1"]


async def test_concurrency_is_limited(autojump_clock: MockClock) -> None:
    """Further attempts start as earlier ones end."""
    async with opened(partial(after, 10.0)) as it:
        await it.add(*(delivery(number, target=f"https://{number}.example/") for number in range(40)))
        for number in range(40):
            await it.settled(number)
    assert it.carrier.most == CONCURRENCY
    assert it.carrier.times() == [0.0] * 16 + [10.0] * 16 + [20.0] * 8


async def test_two_workers_share_the_work(autojump_clock: MockClock) -> None:
    """Each delivery is made by one worker, and each target still gets one at a time."""
    async with opened(partial(after, 1.0)) as it, opened(store=it.store, carrier=it.carrier) as other:
        for number in range(60):
            await it.store.deliveries.add(delivery(number, target=f"https://{number % 20}.example/"))
        it.outbox.wake()
        other.outbox.wake()
        for number in range(60):
            assert (await it.settled(number)).state == "delivered"
    assert sorted(id_ for _, id_ in it.carrier.begun) == sorted(f"msg_{number}" for number in range(60))
    assert it.carrier.most_to_one == 1
    assert it.carrier.most > CONCURRENCY


async def test_a_worker_that_has_too_much_is_helped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose attempts are all in progress notifies the others. On a disk, over real sockets."""
    monkeypatch.setattr(outbox_module, "CONCURRENCY", 1)
    monkeypatch.setattr(outbox_module, "GRACE_S", 0.0)
    busy, idle = Scripted([partial(after, 1e6)]), Scripted()
    async with (
        open_sqlite_store(tmp_path / "store.db") as store,
        open_workers(store) as second,
        open_workers(store) as first,
        open_outbox(store, second) as helping,
        open_outbox(store, first) as outbox,
    ):
        await second.join()
        helping.carriers["h"] = idle  # it does not read the store before it is notified
        await first.join()
        outbox.carriers["h"] = busy
        for number in (1, 2):
            await store.deliveries.add(delivery(number, target=f"https://{number}.example/"))
        outbox.wake()
        with trio.fail_after(30.0):
            while True:
                if busy.begun and idle.begun:
                    break
                await trio.sleep(0.01)
        # Before the first outbox closes: it then releases its delivery, which the other one may take.
        assert [id_ for _, id_ in busy.begun + idle.begun] == ["msg_1", "msg_2"]


# -- closing, and taking over ----------------------------------------------------------------------------------------


async def test_an_attempt_in_progress_may_end(autojump_clock: MockClock) -> None:
    """It has a grace period, also when the whole program is cancelled; no new attempt starts."""
    with trio.CancelScope() as program:
        async with opened(partial(after, GRACE_S / 2)) as it:
            await it.add(delivery(1), delivery(2))
            await wait_all_tasks_blocked()
            program.cancel()
            await trio.sleep_forever()
    assert trio.current_time() == GRACE_S / 2
    assert ((await it.row(1)).state, (await it.row(2)).state) == ("delivered", "pending")


@pytest.mark.parametrize(("repeatable", "state"), [(True, "pending"), (False, "unknown")])
async def test_an_attempt_beyond_the_grace_period(repeatable: bool, state: str, autojump_clock: MockClock) -> None:
    """A repeatable delivery is due again at once; another one is unknown."""
    async with opened(partial(after, 1e6)) as it:
        await it.add(delivery(repeatable=repeatable))
        await wait_all_tasks_blocked()
    assert trio.current_time() == GRACE_S
    row = await it.row()
    assert (row.state, row.due_at if repeatable else row.done_at) == (state, START + GRACE_S)


async def test_closing_does_not_wait_for_a_store_that_fails(autojump_clock: MockClock) -> None:
    """An outcome that cannot be recorded leaves the row as it is, for the worker that adopts it."""
    async with opened(partial(after, 1.0)) as it:
        await it.add(delivery())
        await wait_all_tasks_blocked()
        it.store.failure = "gone"
    assert trio.current_time() == pytest.approx(GRACE_S + 2.0)
    it.store.failure = None
    assert (await it.row()).state == "sending"


@pytest.mark.parametrize("step", range(40))
async def test_a_cancellation_at_any_point(step: int, autojump_clock: MockClock) -> None:
    """No row is left as ``sending``, and deliveries that were not sent are pending."""
    store = MemoryStore()
    carrier = Scripted()
    with trio.CancelScope() as program:
        async with opened(store=store, carrier=carrier, joined=False) as it:
            for number in range(20):
                await store.deliveries.add(delivery(number, target=f"https://{number % 10}.example/", repeatable=False))
            await it.workers.join()
            for _ in range(step):
                await trio.lowlevel.checkpoint()
            program.cancel()
            await trio.sleep_forever()
    sent = [id_ for _, id_ in carrier.begun]
    for number in range(20):
        [row] = await store.deliveries.of_run(f"run_{number}")
        assert (row.state, sent.count(row.id)) in (("pending", 0), ("delivered", 1))


@pytest.mark.parametrize(("repeatable", "state"), [(True, "delivered"), (False, "unknown")])
async def test_a_delivery_of_a_dead_worker(repeatable: bool, state: str, autojump_clock: MockClock, logs: Logs) -> None:
    """A repeatable delivery is sent again under the same id; another one becomes unknown, and is not sent again. The
    log has its state."""
    async with opened(joined=False) as it:
        await it.store.deliveries.add(delivery(repeatable=repeatable))
        await it.store.deliveries.take("w_dead", at=START, limit=1, channels=["h"])
        await it.workers.join()
        await trio.sleep(1000.0)
        assert it.carrier.begun == []  # the worker may still be alive
        await it.outbox.adopt(it.workers.id, ["w_dead"])
        assert (await it.settled()).state == state
    assert [id_ for _, id_ in it.carrier.begun] == ["msg_1"] * repeatable
    states = [line["state"] for line in logs.named("delivery")]
    assert states == (["pending", "delivered"] if repeatable else ["unknown"])


async def test_wait_idle(autojump_clock: MockClock) -> None:
    """Idle means that no delivery is in progress or due; deliveries that are due later do not count. Every task that
    waits is woken."""

    async def arrive_late() -> Receipt:
        await trio.sleep(7.0)
        return ARRIVED

    async with opened(arrive_late, FAILED, joined=False) as it:
        await it.outbox.wait_idle()
        await it.workers.join()
        await it.outbox.wait_idle()
        began = trio.current_time()
        await it.store.deliveries.add(delivery())
        await it.outbox.wait_idle()
        assert trio.current_time() - began == pytest.approx(7.0)
        await it.store.deliveries.add(delivery(2))
        await it.outbox.wait_idle()
        [second] = await it.store.deliveries.of_run("run_2")
        assert (second.state, second.attempts) == ("pending", 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.outbox.wait_idle)
            nursery.start_soon(it.outbox.wait_idle)


@pytest.mark.parametrize(("repeatable", "state"), [(True, "delivered"), (False, "unknown")])
async def test_the_next_start_adopts_deliveries(repeatable: bool, state: str, tmp_path: Path) -> None:
    """On a disk: a worker that joins finds that no process listens at the address of the worker that was sending."""
    carrier = Scripted()
    async with open_sqlite_store(tmp_path / "store.db") as store:
        await _leave_sending(store, delivery(repeatable=repeatable), str(tmp_path / "nobody"))
        async with open_workers(store) as workers, open_outbox(store, workers) as outbox:
            outbox.carriers["h"] = carrier
            await workers.join()
            with trio.fail_after(30.0):
                while True:
                    [row] = await store.deliveries.of_run("run_1")
                    if row.state == state:
                        break
                    await trio.sleep(0.01)
    assert [id_ for _, id_ in carrier.begun] == ["msg_1"] * repeatable


async def _leave_sending(store: Store, left: Delivery, address: str) -> None:
    await store.workers.heartbeat(Worker(id="w_dead", pid=1, address=address, started_at=START, seen_at=START))
    await store.deliveries.add(left)
    await store.deliveries.take("w_dead", at=START, limit=1, channels=["h"])


async def test_a_delivery_left_for_later_is_found(autojump_clock: MockClock) -> None:
    """No notification is needed: the store is read once a minute."""
    async with opened() as it:
        await it.store.deliveries.add(attrs.evolve(delivery(), due_at=START + 200.0))
        await it.settled()
    assert 200.0 <= it.carrier.times()[0] <= 260.0


# -- the store --------------------------------------------------------------------------------------------------------


async def test_a_store_that_fails_and_comes_back(autojump_clock: MockClock, logs: Logs) -> None:
    """While no attempt can be recorded, none is made; afterwards all are. Each change is logged once."""
    async with opened() as it:
        await it.add(delivery())
        await it.settled()
        await it.store.deliveries.add(delivery(2))
        it.store.failure = "disk full"
        it.outbox.wake()
        await trio.sleep(1000.0)
        assert len(it.carrier.begun) == 1
        it.store.failure = None
        assert (await it.settled(2)).state == "delivered"
    events = [entry["event"] for entry in logs.entries if entry["event"].startswith("outbox")]
    assert events == ["outbox_halted", "outbox_resumed"]


async def test_an_outcome_is_recorded_when_the_store_is_back(autojump_clock: MockClock) -> None:
    """A delivery that was sent while the store failed is not sent again."""
    async with opened(partial(after, 10.0)) as it:
        await it.add(delivery())
        await trio.sleep(5.0)
        it.store.failure = "disk full"
        await trio.sleep(1000.0)
        it.store.failure = None
        assert (await it.settled()).state == "delivered"
    assert it.carrier.times() == [0.0]


async def test_a_defect_does_not_end_the_outbox(
    autojump_clock: MockClock, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged, and the outbox continues."""
    logs.expect_error("outbox_crashed")
    async with opened(FAILED, ARRIVED) as it:
        with monkeypatch.context() as patch:
            patch.setattr(outbox_module, "state_after", lambda *_: 1 / 0)
            await it.add(delivery(1))
            await wait_all_tasks_blocked()
        await it.add(delivery(2, target="https://b.example/"))
        assert (await it.settled(2)).state == "delivered"
        assert (await it.row(1)).state == "sending"
