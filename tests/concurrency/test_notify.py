"""`trigate.concurrency.notify`: no wake-up is lost, none comes twice, and a service ends with its block."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trigate.concurrency.notify import RepeatedEvent, Wakeup, open_service


async def test_a_repeated_event_wakes_every_waiting_task(nursery: trio.Nursery) -> None:
    """Each ``set`` wakes all tasks that wait, and only those."""
    event, woken = RepeatedEvent(), []

    async def wait(name: str) -> None:
        await event.wait()
        woken.append(name)

    nursery.start_soon(wait, "a")
    nursery.start_soon(wait, "b")
    await wait_all_tasks_blocked()
    assert repr(event) == "<RepeatedEvent, 2 waiting>"
    event.set()
    nursery.start_soon(wait, "later")
    await wait_all_tasks_blocked()
    assert sorted(woken) == ["a", "b"]
    assert event.waiting == 1
    event.set()
    await wait_all_tasks_blocked()
    assert sorted(woken) == ["a", "b", "later"]


async def test_a_repeated_event_forgets() -> None:
    """A ``set`` that no task waits for is not remembered."""
    event = RepeatedEvent()
    event.set()
    with trio.move_on_after(0) as scope:
        await event.wait()
    assert scope.cancelled_caught


async def test_a_wakeup_is_remembered_once() -> None:
    """Several ``set`` calls before a ``wait`` end one ``wait``; the next one waits."""
    wakeup = Wakeup()
    wakeup.set()
    wakeup.set()
    assert repr(wakeup) == "<Wakeup set>"
    await wakeup.wait()
    assert not wakeup.is_set
    with trio.move_on_after(0) as scope:
        await wakeup.wait()
    assert scope.cancelled_caught


async def test_a_cancelled_wait_does_not_lose_a_wakeup() -> None:
    """A consumer that is cancelled while it waits finds the ``set`` that comes afterwards."""
    wakeup = Wakeup()
    with trio.move_on_after(0):
        await wakeup.wait()
    wakeup.set()
    with trio.fail_after(1):
        await wakeup.wait()


async def test_a_service_ends_with_its_block() -> None:
    """Its tasks run during the block, and are cancelled when the block ends, whether it returns or raises."""
    events = []

    async def task() -> None:
        events.append("started")
        try:
            await trio.sleep_forever()
        finally:
            events.append("ended")

    async with open_service(task) as nursery:
        nursery.start_soon(task)
        await wait_all_tasks_blocked()
        assert events == ["started", "started"]
    assert events == ["started", "started", "ended", "ended"]
    with pytest.RaisesGroup(ValueError):
        async with open_service(task):
            raise ValueError
