"""Reading runs and waiting for their results, over a store in memory. Time is virtual."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.logs import Logs
from trigate.errors import NotFound
from trigate.runs.outbox import open_outbox
from trigate.runs.records import POLL_S, RETRY_S, RunRecords
from trigate.runs.request import RunResult
from trigate.store.memory import MemoryStore, open_memory_store
from trigate.store.records import Run
from trigate.workers.membership import open_workers

RESULT = RunResult(state="completed", status=200, result=b"{}")
RUN = Run(
    id="run_1",
    channel="h",
    owner="",
    session=None,
    action="chat",
    request=b"{}",
    state="queued",
    acknowledged=False,
    worker="w",
    created_at=0.0,
)


@contextlib.asynccontextmanager
async def opened() -> AsyncIterator[tuple[RunRecords, MemoryStore]]:
    """Opens the records, with one run in the store."""
    async with (
        open_memory_store() as store,
        open_workers(store) as workers,
        open_outbox(store, workers) as outbox,
        trio.open_nursery() as nursery,
    ):
        await workers.join()
        await store.runs.add(RUN)
        yield RunRecords(store, workers, outbox, nursery), store
        nursery.cancel_scope.cancel()


async def test_every_waiting_task_is_woken(autojump_clock: MockClock) -> None:
    """At the moment the run ends, not at the next poll; no waiting task is left."""
    async with opened() as (records, _), trio.open_nursery() as nursery:
        ended_at = []

        async def wait() -> None:
            assert (await records.wait_ended("run_1")).state == "completed"
            ended_at.append(trio.current_time())

        for _ in range(3):
            nursery.start_soon(wait)
        await trio.sleep(POLL_S / 2)
        assert records.waited_for == 1
        records.finish_later(RUN, RESULT)
        await wait_all_tasks_blocked()
        assert ended_at == [POLL_S / 2] * 3
        assert records.waited_for == 0


async def test_a_run_that_ends_while_it_is_read(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notification comes between the read of a running run and the wait: the task does not wait for the poll."""
    async with opened() as (records, store):
        read = store.runs.get

        async def get(run_id: str) -> Run | None:
            found = await read(run_id)
            if found is not None and found.state == "queued":
                await store.runs.finish(run_id, state="completed", status=200, result=b"{}", at=0.0)
                records.on_run_ended(run_id.encode())
            return found

        monkeypatch.setattr(store.runs, "get", get)
        assert (await records.wait_ended("run_1")).state == "completed"
        assert trio.current_time() == 0.0


async def test_a_lost_notification_delays_by_one_poll(autojump_clock: MockClock) -> None:
    """The store is read again after `POLL_S`."""
    async with opened() as (records, store):
        await store.runs.finish("run_1", state="completed", status=200, result=b"{}", at=0.0)
        assert (await records.wait_ended("run_1")).state == "completed"
        await store.runs.add(attrs.evolve(RUN, id="run_2"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(records.wait_ended, "run_2")
            await wait_all_tasks_blocked()
            await store.runs.finish("run_2", state="completed", status=200, result=b"{}", at=0.0)
        assert trio.current_time() == POLL_S


async def test_waiting_for_an_unknown_run() -> None:
    """It is an error, and nothing is kept of it."""
    async with opened() as (records, _):
        with pytest.raises(NotFound):
            await records.wait_ended("run_x")
        assert records.waited_for == 0


async def test_a_result_is_stored_once_the_store_is_back(autojump_clock: MockClock, logs: Logs) -> None:
    """Each failed write is logged, and retried after a pause that doubles."""
    async with opened() as (records, store):
        store.failure = "the disk is full"
        records.finish_later(RUN, RESULT)
        await trio.sleep(2.5 * RETRY_S)
        assert len(logs.named("run_result_not_stored")) == 2
        store.failure = None
        assert (await records.wait_ended("run_1")).state == "completed"
        assert trio.current_time() == 3 * RETRY_S


async def test_a_late_acknowledgement(autojump_clock: MockClock) -> None:
    """It holds at once here, and in the store."""
    async with opened() as (records, store):
        assert not records.is_acknowledged(RUN)
        records.acknowledge_late(RUN)
        assert records.is_acknowledged(RUN)
        await wait_all_tasks_blocked()
        found = await store.runs.get("run_1")
        assert found is not None
        assert found.acknowledged
        records.forget(RUN)
        assert not records.is_acknowledged(RUN)
