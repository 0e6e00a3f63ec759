"""Deliveries: attempts, pauses, order, and what is left when a worker ends. Time is virtual, the store is in memory."""

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

from tests.conftest import Logs
from trigate.runs import outbox as rooms
from trigate.runs.outbox import AT_ONCE, ATTEMPT_S, GRACE_S, SCHEDULE_S, Outbox, Receipt, open_outbox, pause_s
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
    """The time of day, by the virtual clock."""
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
    """A carrier whose attempts end as they are told, the last step again and again.

    Attributes:
        begun: When each attempt began, and what was delivered.
        most: How many attempts were under way at once; most_to_one: and to one target.
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
    """An attempt that takes some time."""
    await trio.sleep(seconds)
    return receipt


@attrs.define(eq=False)
class Opened:
    """An outbox that is open."""

    store: MemoryStore
    workers: Workers
    outbox: Outbox
    carrier: Scripted

    async def add(self, *deliveries: Delivery) -> None:
        """Keeps something to deliver, and says so."""
        for each in deliveries:
            await self.store.deliveries.add(each)
        self.outbox.look()

    async def row(self, number: int = 1) -> Delivery:
        """What the store says of a delivery."""
        [found] = await self.store.deliveries.of_run(f"run_{number}")
        return found

    async def settled(self, number: int = 1) -> Delivery:
        """Waits until a delivery is done."""
        while True:
            found = await self.row(number)
            if found.state not in ("pending", "sending"):
                return found
            await trio.sleep(1000.0)


@contextlib.asynccontextmanager
async def opened(
    *steps: Step, store: MemoryStore | None = None, carrier: Scripted | None = None, joined: bool = True
) -> AsyncIterator[Opened]:
    """Opens an outbox with one carrier, for the channel ``h``; it always waits as long as the schedule says."""
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
    """Ten attempts, at the times that the specification's example has."""
    times = list(itertools.accumulate(SCHEDULE_S, initial=0.0))
    seconds = [(0, 0, 0), (0, 0, 5), (0, 5, 5), (0, 35, 5), (2, 35, 5), (7, 35, 5), (17, 35, 5), (31, 35, 5)]
    seconds += [(51, 35, 5), (75, 35, 5)]
    assert times == [3600 * hours + 60 * minutes + rest for hours, minutes, rest in seconds]


@pytest.mark.parametrize("attempts", range(1, 10))
def test_a_pause_is_anything_up_to_what_the_schedule_says(attempts: int) -> None:
    """Full jitter: from nothing to the whole."""
    assert pause_s(attempts, after_s=None, chance=0.0) == 0.0
    assert pause_s(attempts, after_s=None, chance=1.0) == SCHEDULE_S[attempts - 1]


@pytest.mark.parametrize(
    ("after_s", "chance", "expected"),
    [(0.0, 0.5, 2.5), (2.0, 0.5, 2.5), (3.0, 0.5, 3.0), (86_400.0, 0.5, 86_400.0), (86_401.0, 0.5, 86_400.0)],
)
def test_a_pause_is_no_shorter_than_the_receiver_asked_for(after_s: float, chance: float, expected: float) -> None:
    """And no longer than a day because of that; the schedule's own pause stays the least."""
    assert pause_s(1, after_s=after_s, chance=chance) == expected


def test_after_the_schedule_there_is_no_pause() -> None:
    """Whatever the receiver asked for."""
    assert pause_s(10, after_s=None, chance=0.5) is None
    assert pause_s(10, after_s=60.0, chance=0.5) is None


# -- attempts ---------------------------------------------------------------------------------------------------------


async def test_what_is_due_is_delivered(autojump_clock: MockClock) -> None:
    """Once, at once, and the store says so."""
    async with opened() as it:
        await it.add(delivery())
        row = await it.settled()
        await trio.sleep(1000.0)
    assert (row.state, row.attempts, row.last_status, row.done_at) == ("delivered", 1, 200, START)
    assert it.carrier.times() == [0.0]


async def test_nothing_is_done_before_somebody_has_joined(autojump_clock: MockClock) -> None:
    """The store is not even asked; afterwards, what had been left is delivered without being told of."""
    async with opened(joined=False) as it:
        it.store.failure = "the store is closed"
        await trio.sleep(1000.0)
        it.store.failure = None
        await it.store.deliveries.add(delivery())
        await trio.sleep(1000.0)
        assert it.carrier.begun == []
        await it.workers.join()
        assert (await it.settled()).state == "delivered"


async def test_a_failure_is_tried_again_until_the_schedule_is_over(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten attempts over three days; then it has failed, with the last status."""
    monkeypatch.setattr(rooms, "LOOK_S", 3600.0)  # three days have many minutes
    async with opened(FAILED) as it:
        await it.add(delivery())
        row = await it.settled()
    assert it.carrier.times() == pytest.approx(list(itertools.accumulate(SCHEDULE_S, initial=0.0)))
    assert (row.state, row.attempts, row.last_status, row.last_error) == (
        *("failed", 10, 500),
        "the receiver answered 500",
    )


async def test_an_attempt_that_succeeds_ends_it(autojump_clock: MockClock, logs: Logs) -> None:
    """Each attempt has its line in the log, with what comes next."""
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


async def test_the_receiver_says_when(autojump_clock: MockClock) -> None:
    """What it asks for is waited for, up to a day."""
    asks = [attrs.evolve(FAILED, after_s=seconds) for seconds in (60.0, 1e6)]
    async with opened(*asks, ARRIVED) as it:
        await it.add(delivery())
        await it.settled()
    assert it.carrier.times() == pytest.approx([0.0, 60.0, 86_460.0])


async def test_a_failure_for_good(autojump_clock: MockClock) -> None:
    """What is not worth another attempt gets none."""
    async with opened(attrs.evolve(FAILED, again=False, status=410)) as it:
        await it.add(delivery())
        row = await it.settled()
    assert (row.state, row.attempts, row.last_status) == ("failed", 1, 410)


async def test_what_may_have_arrived_is_repeated_only_where_that_can_be_told(autojump_clock: MockClock) -> None:
    """Else it is unknown, and stays so."""
    async with opened(attrs.evolve(FAILED, unsure=True), ARRIVED) as it:
        await it.add(delivery(1, repeatable=False))
        assert (await it.settled(1)).state == "unknown"
        it.carrier.steps = [attrs.evolve(FAILED, unsure=True), ARRIVED]
        await it.add(delivery(2))
        assert (await it.settled(2)).state == "delivered"
    assert [id_ for _, id_ in it.carrier.begun] == ["msg_1", "msg_2", "msg_2"]


async def test_a_carrier_that_raises(autojump_clock: MockClock, logs: Logs) -> None:
    """It is an attempt that failed, and a defect that is logged; others go on."""
    logs.expect_error("delivery_crashed")
    async with opened(KeyError("x"), ARRIVED) as it:
        await it.add(delivery())
        row = await it.settled()
    assert (row.state, row.attempts) == ("delivered", 2)


async def test_an_attempt_is_bounded_in_time(autojump_clock: MockClock) -> None:
    """A receiver that never answers holds its place for so long, and no longer."""
    async with opened(partial(after, 1e6), ARRIVED) as it:
        await it.add(delivery())
        await trio.sleep(ATTEMPT_S + 1.0)
        assert (await it.row()).last_error == "no answer within 30 s"
        assert (await it.settled()).state == "delivered"
    assert it.carrier.times() == pytest.approx([0.0, ATTEMPT_S + SCHEDULE_S[0]])


async def test_a_channel_without_a_carrier_waits(autojump_clock: MockClock) -> None:
    """What is for it stays pending, with no attempt spent, until there is one again."""
    async with opened() as it:
        del it.outbox.carriers["h"]
        await it.add(delivery())
        await trio.sleep(1000.0)
        row = await it.row()
        assert (row.state, row.attempts) == ("pending", 0)
        assert await it.store.deliveries.depth() == {"h": 1}
        it.outbox.carriers["h"] = it.carrier
        it.outbox.look()
        assert (await it.settled()).state == "delivered"


# -- order ------------------------------------------------------------------------------------------------------------


async def test_each_target_gets_one_at_a_time_in_order(autojump_clock: MockClock) -> None:
    """While one is being sent the next one waits, as pending; other targets do not."""
    async with opened(partial(after, 10.0)) as it:
        await it.add(*(delivery(number) for number in range(1, 4)), delivery(4, target="https://b.example/"))
        await trio.sleep(5.0)
        assert [(await it.row(number)).state for number in range(1, 5)] == ["sending", "pending", "pending", "sending"]
        await it.settled(3)
    assert it.carrier.begun == [(0.0, "msg_1"), (0.0, "msg_4"), (10.0, "msg_2"), (20.0, "msg_3")]
    assert it.carrier.most_to_one == 1


async def test_one_that_waits_for_its_next_attempt_holds_nobody_up(autojump_clock: MockClock) -> None:
    """The next one to the same target goes first then."""
    async with opened(FAILED, ARRIVED) as it:
        await it.add(delivery(1), delivery(2))
        await it.settled(1)
    assert [id_ for _, id_ in it.carrier.begun] == ["msg_1", "msg_2", "msg_1"]


async def test_so_many_go_on_at_once(autojump_clock: MockClock) -> None:
    """The rest follows as places come free."""
    async with opened(partial(after, 10.0)) as it:
        await it.add(*(delivery(number, target=f"https://{number}.example/") for number in range(40)))
        for number in range(40):
            await it.settled(number)
    assert it.carrier.most == AT_ONCE
    assert it.carrier.times() == [0.0] * 16 + [10.0] * 16 + [20.0] * 8


async def test_two_workers_share_the_work(autojump_clock: MockClock) -> None:
    """Each delivery is made by one of them, and each target still gets one at a time."""
    async with opened(partial(after, 1.0)) as it, opened(store=it.store, carrier=it.carrier) as other:
        for number in range(60):
            await it.store.deliveries.add(delivery(number, target=f"https://{number % 20}.example/"))
        it.outbox.look()
        other.outbox.look()
        for number in range(60):
            assert (await it.settled(number)).state == "delivered"
    assert sorted(id_ for _, id_ in it.carrier.begun) == sorted(f"msg_{number}" for number in range(60))
    assert it.carrier.most_to_one == 1
    assert it.carrier.most > AT_ONCE


async def test_a_worker_that_has_too_much_is_helped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose places are all taken rings the others. On a disk, over real sockets."""
    monkeypatch.setattr(rooms, "AT_ONCE", 1)
    monkeypatch.setattr(rooms, "GRACE_S", 0.0)
    busy, idle = Scripted([partial(after, 1e6)]), Scripted()
    async with (
        open_sqlite_store(tmp_path / "store.db") as store,
        open_workers(store) as second,
        open_workers(store) as first,
        open_outbox(store, second) as helping,
        open_outbox(store, first) as outbox,
    ):
        await second.join()
        helping.carriers["h"] = idle  # it does not look before somebody rings
        await first.join()
        outbox.carriers["h"] = busy
        for number in (1, 2):
            await store.deliveries.add(delivery(number, target=f"https://{number}.example/"))
        outbox.look()
        with trio.fail_after(30.0):
            while True:
                if busy.begun and idle.begun:
                    break
                await trio.sleep(0.01)
    assert [id_ for _, id_ in busy.begun + idle.begun] == ["msg_1", "msg_2"]


# -- the end, and what comes after it ---------------------------------------------------------------------------------


async def test_what_is_under_way_may_end(autojump_clock: MockClock) -> None:
    """For a short time, also where the whole program is cancelled; nothing new is begun."""
    with trio.CancelScope() as program:
        async with opened(partial(after, GRACE_S / 2)) as it:
            await it.add(delivery(1), delivery(2))
            await wait_all_tasks_blocked()
            program.cancel()
            await trio.sleep_forever()
    assert trio.current_time() == GRACE_S / 2
    assert ((await it.row(1)).state, (await it.row(2)).state) == ("delivered", "pending")


@pytest.mark.parametrize(("repeatable", "state"), [(True, "pending"), (False, "unknown")])
async def test_what_does_not_end_in_time_is_released(repeatable: bool, state: str, autojump_clock: MockClock) -> None:
    """It is due again at once where it can be repeated, and else unknown."""
    async with opened(partial(after, 1e6)) as it:
        await it.add(delivery(repeatable=repeatable))
        await wait_all_tasks_blocked()
    assert trio.current_time() == GRACE_S
    row = await it.row()
    assert (row.state, row.due_at if repeatable else row.done_at) == (state, START + GRACE_S)


async def test_the_end_does_not_wait_for_a_store_that_has_gone(autojump_clock: MockClock) -> None:
    """What cannot be noted stays as it is, for whoever takes over."""
    async with opened(partial(after, 1.0)) as it:
        await it.add(delivery())
        await wait_all_tasks_blocked()
        it.store.failure = "gone"
    assert trio.current_time() == pytest.approx(GRACE_S + 2.0)
    it.store.failure = None
    assert (await it.row()).state == "sending"


@pytest.mark.parametrize("step", range(40))
async def test_a_cancellation_at_any_point(step: int, autojump_clock: MockClock) -> None:
    """Nothing is left as if it were being sent, and what was not sent is pending."""
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
async def test_what_a_dead_worker_was_sending(
    repeatable: bool, state: str, autojump_clock: MockClock, logs: Logs
) -> None:
    """It is sent again, under the same id, where that can be told; else nobody knows, and it is not sent again. The log
    says what became of it."""
    async with opened(joined=False) as it:
        await it.store.deliveries.add(delivery(repeatable=repeatable))
        await it.store.deliveries.take("w_dead", at=START, limit=1, channels=["h"])
        await it.workers.join()
        await trio.sleep(1000.0)
        assert it.carrier.begun == []  # it may be alive
        await it.outbox.adopt(it.workers.id, ["w_dead"])
        assert (await it.settled()).state == state
    assert [id_ for _, id_ in it.carrier.begun] == ["msg_1"] * repeatable
    said = [line["state"] for line in logs.named("delivery")]
    assert said == (["pending", "delivered"] if repeatable else ["unknown"])


async def test_idle(autojump_clock: MockClock) -> None:
    """It is when nothing is under way or due; what waits for a later time is not waited for."""

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


@pytest.mark.parametrize(("repeatable", "state"), [(True, "delivered"), (False, "unknown")])
async def test_the_next_start_takes_over(repeatable: bool, state: str, tmp_path: Path) -> None:
    """On a disk: who joins finds that nobody listens at the address of the one that was sending."""
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


async def test_what_a_worker_left_for_later_is_found(autojump_clock: MockClock) -> None:
    """Nobody has to tell of it: the store is looked at once a minute."""
    async with opened() as it:
        await it.store.deliveries.add(attrs.evolve(delivery(), due_at=START + 200.0))
        await it.settled()
    assert 200.0 <= it.carrier.times()[0] <= 260.0


# -- the store --------------------------------------------------------------------------------------------------------


async def test_a_store_that_fails_and_comes_back(autojump_clock: MockClock, logs: Logs) -> None:
    """While nothing can be noted as begun, nothing is sent; then everything is. It is said once each way."""
    async with opened() as it:
        await it.add(delivery())
        await it.settled()
        await it.store.deliveries.add(delivery(2))
        it.store.failure = "disk full"
        it.outbox.look()
        await trio.sleep(1000.0)
        assert len(it.carrier.begun) == 1
        it.store.failure = None
        assert (await it.settled(2)).state == "delivered"
    said = [entry["event"] for entry in logs.entries if entry["event"].startswith("outbox")]
    assert said == ["outbox_halted", "outbox_resumed"]


async def test_a_result_is_noted_when_the_store_is_back(autojump_clock: MockClock) -> None:
    """What was sent while it failed is not sent again."""
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
    """It is logged, and the next look is made."""
    logs.expect_error("outbox_crashed")
    async with opened(FAILED, ARRIVED) as it:
        with monkeypatch.context() as patch:
            patch.setattr(rooms, "state_after", lambda *_: 1 / 0)
            await it.add(delivery(1))
            await wait_all_tasks_blocked()
        await it.add(delivery(2, target="https://b.example/"))
        assert (await it.settled(2)).state == "delivered"
        assert (await it.row(1)).state == "sending"
