"""`trigate.workers.membership`: joining, exits and notifications; on one SQLite file, real sockets, real processes.

Each `open_workers` has a store of its own on the file, as each process has: two of them in one process are two workers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support.processes import environment
from tests.support.shortage import ERRORS, os_error
from trigate.errors import StoreUnavailable
from trigate.store import sqlite
from trigate.store.interface import Store, Write
from trigate.store.memory import open_memory_store
from trigate.store.records import Run, Worker
from trigate.store.sqlite import open_sqlite_store
from trigate.workers import membership, notify
from trigate.workers.membership import Workers, open_workers

NOW = 1_700_000_000.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes heartbeats and retries fast enough for a test."""
    monkeypatch.setattr(membership, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(membership, "RETRY_S", 0.02)
    monkeypatch.setattr(sqlite, "RETRY_S", 0.0)


@pytest.fixture
def database() -> Iterator[Path]:
    """The path of the store's file, short enough for the name of a socket beside it."""
    with tempfile.TemporaryDirectory(prefix="tri") as directory:  # pytest's own paths are too long
        yield Path(directory) / "trigate.db"


@contextlib.asynccontextmanager
async def _worker(
    database: Path, snapshot: Callable[[], bytes] = lambda: b"{}"
) -> AsyncIterator[tuple[Workers, Store]]:
    async with open_sqlite_store(str(database)) as store, open_workers(store) as found:
        found.report_with(snapshot)
        yield found, store


async def _until(holds: Callable[[], Any]) -> None:
    """Waits until a condition holds, which other tasks bring about; fails after 10 s."""
    with trio.fail_after(10):
        while True:
            held = holds()
            if (await held) if hasattr(held, "__await__") else held:
                return
            await trio.sleep(0.005)


def _sockets(database: Path) -> list[Path]:
    return [path for path in database.parent.iterdir() if stat.S_ISSOCK(path.lstat().st_mode)]


def _ids(found: Sequence[Worker]) -> list[str]:
    return [each.id for each in found]


def _dead_socket(database: Path) -> str:
    """The address of a worker that has exited: a socket's file to which no socket is bound."""
    address = f"{database}-w_dead"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as closed:
        closed.bind(address)
    return address


def _dead(address: str) -> Worker:
    return Worker(id="w_dead", pid=1, address=address, started_at=NOW, seen_at=NOW)


# -- joining ----------------------------------------------------------------------------------------------------------


async def test_nothing_is_created_before_join(database: Path) -> None:
    """Before `join` there is no file and no socket, and `all` returns this worker alone."""
    async with _worker(database) as (mine, store):
        assert _ids(await mine.all()) == [mine.id]
        mine.notify("sessions")
        assert store.statistics().state == "closed"
        assert list(database.parent.iterdir()) == []
        assert repr(mine).endswith("0 others, not joined>")


async def test_workers_find_each_other(database: Path) -> None:
    """Each worker knows all, the oldest first, with their last snapshots; its own snapshot is the current one."""
    said = [b'"first"']
    async with _worker(database, lambda: said[0]) as (one, _), _worker(database, lambda: b'"second"') as (two, _):
        await one.join()
        await two.join()
        assert one.id != two.id
        assert two.count == 2
        for each in (one, two):
            assert _ids(await each.all()) == [one.id, two.id]
        assert [each.snapshot for each in await two.all()] == [b'"first"', b'"second"']
        said[0] = b'"changed"'
        assert (await one.all())[0].snapshot == b'"changed"'

        async def heard() -> bool:
            return (await two.all())[0].snapshot == b'"changed"'

        await _until(heard)


async def test_concurrent_joins(database: Path) -> None:
    """A worker joins once, however many tasks call `join`, and even if some of them are cancelled."""
    beats: list[Worker] = []
    async with _worker(database) as (mine, store):
        beat = store.workers.heartbeat

        def heartbeat(worker: Worker) -> Write[None]:
            beats.append(worker)
            return beat(worker)

        store.workers.heartbeat = heartbeat  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as impatient:
                impatient.cancel()
                await mine.join()
            for _ in range(20):
                nursery.start_soon(mine.join)
        assert mine.is_joined
        assert len(beats) == 1
        assert len(_sockets(database)) == 1


async def test_a_store_that_is_unavailable(database: Path, logs: Any) -> None:
    """`join` raises; `join_eventually` waits, and joins once the reason has gone. The failure is logged once."""
    logs.expect_error("store_unavailable")
    database.mkdir()  # noqa: ASYNC240 - a moment
    async with _worker(database) as (mine, _):
        with pytest.raises(StoreUnavailable):
            await mine.join()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mine.join_eventually)
            await _until(lambda: logs.named("heartbeat_failed"))
            assert not mine.is_joined
            database.rmdir()  # noqa: ASYNC240 - a moment
            await _until(lambda: mine.is_joined)
        assert len(logs.named("heartbeat_failed")) == 1
        await _until(lambda: logs.named("heartbeat_recovered"))


async def test_heartbeats_go_on_after_a_failure(database: Path, logs: Any) -> None:
    """If the store fails while a worker runs, heartbeats are lost and one line is logged; then they succeed again."""
    async with _worker(database) as (mine, store):
        await mine.join()
        beat = store.workers.heartbeat
        failures: list[Exception] = [StoreUnavailable("full"), StoreUnavailable("full"), ValueError("a defect")]

        def failing(worker: Worker) -> Any:
            if failures:
                raise failures.pop(0)
            return beat(worker)

        store.workers.heartbeat = failing  # type: ignore[method-assign]
        await _until(lambda: logs.named("heartbeat_recovered"))
        assert [entry["error"] for entry in logs.named("heartbeat_failed")] == ["full"]
        assert _ids(await store.workers.all()) == [mine.id]


async def test_a_defect_in_a_heartbeat_is_logged_once(database: Path, logs: Any) -> None:
    """An exception of the snapshot does not end the gateway."""
    logs.expect_error("heartbeat_crashed")
    broken: list[bool] = []

    def snapshot() -> bytes:
        if len(broken) in (1, 2):
            broken.append(True)
            raise ValueError("a defect")
        return b"{}"

    async with _worker(database, snapshot) as (mine, _):
        await mine.join()
        broken.append(True)
        await _until(lambda: logs.named("heartbeat_recovered"))
        assert len(logs.named("heartbeat_crashed")) == 1


async def test_a_store_in_memory_has_no_others(autojump_clock: MockClock) -> None:
    """There is no socket and no heartbeat, so days of virtual time pass at once."""
    async with open_memory_store() as store, open_workers(store) as mine:
        await mine.join()
        mine.notify("sessions")
        before = await store.workers.all()
        await trio.sleep(30 * 24 * 3600)
        assert await store.workers.all() == before
        assert [(each.id, each.address) for each in await mine.all()] == [(mine.id, "")]


# -- notifications ----------------------------------------------------------------------------------------------------


async def test_notifications(database: Path) -> None:
    """All other workers get a notification, and those with a callback for its topic call it. The body is any bytes."""
    async with _worker(database) as (one, _), _worker(database) as (two, _), _worker(database) as (three, _):
        heard: list[tuple[str, bytes]] = []
        for name, each in (("one", one), ("two", two), ("three", three)):
            each.on_notify("topic", lambda body, name=name: heard.append((name, body)))  # type: ignore[misc]
            each.on_notify("other", lambda body: heard.append(("other", body)))
            await each.join()
        await _until(lambda: len(one._others) == 2)  # workers that have joined are notified of new ones
        one.notify("nobody")
        one.notify("topic", b"a b \x00")
        one.notify("topic")
        await _until(lambda: len(heard) == 4)
        assert sorted(heard) == [("three", b""), ("three", b"a b \x00"), ("two", b""), ("two", b"a b \x00")]


async def test_notify_never_fails(database: Path) -> None:
    """`notify` does not fail if the receiver's queue is full, the body is too large, or no socket is bound any more."""
    async with _worker(database) as (mine, _):
        await mine.join()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
            deaf.bind(f"{database}-deaf")
            mine._others["w_deaf"] = f"{database}-deaf"
            for _ in range(1_000):
                mine.notify("topic", b"x" * 1_000)
            mine.notify("topic", b"x" * 10_000_000)
            assert not notify.is_dead(f"{database}-deaf")  # a worker whose queue is full is not dead
        assert notify.is_dead(f"{database}-deaf")
        mine.notify("topic")


async def test_a_callback_that_raises(database: Path, logs: Any) -> None:
    """An exception of a callback loses that notification alone."""
    logs.expect_error("notify_callback_crashed")
    async with _worker(database) as (one, _), _worker(database) as (two, _):
        heard = []

        def callback(body: bytes) -> None:
            heard.append(body)
            if body == b"bad":
                raise ValueError("a defect")

        two.on_notify("topic", callback)
        await two.join()
        await one.join()
        one.notify("topic", b"bad")
        one.notify("topic", b"good")
        await _until(lambda: heard == [b"bad", b"good"])


# -- where the socket is ----------------------------------------------------------------------------------------------


async def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    """The socket is then in a directory of its own among the temporary files, which is removed with it."""
    database = tmp_path / ("x" * 100) / "trigate.db"
    async with _worker(database) as (one, _), _worker(database) as (two, _):
        heard: list[bytes] = []
        two.on_notify("topic", heard.append)
        await one.join()
        await two.join()
        addresses = [Path(each.address) for each in await one.all()]
        for address in addresses:
            assert address.parent.parent == Path(tempfile.gettempdir())
            assert stat.S_IMODE(address.parent.stat().st_mode) == 0o700
        await _until(lambda: len(one._others) == 1)
        one.notify("topic", b"x")
        await _until(lambda: heard == [b"x"])
    assert not any(address.parent.exists() for address in addresses)


async def test_no_socket_anywhere(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no socket can be bound anywhere, `join` raises `StoreUnavailable` with the path and the reason."""

    def refuse(prefix: str) -> str:
        raise OSError("no room")

    monkeypatch.setattr(notify, "_MAX_ADDRESS_BYTES", 10)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    async with _worker(database) as (mine, _):
        with pytest.raises(StoreUnavailable, match="no room"):
            await mine.join()


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("which", [1, 2, 3], ids=["the receiver", "the sender", "the probe"])
async def test_a_socket_that_cannot_be_made(
    database: Path, which: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`join` raises `StoreUnavailable`, leaves nothing behind, and works later. Another worker is not taken for dead
    because it cannot be asked."""
    calls = 0

    class Scarce(socket.socket):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == which:
                raise os_error(name)
            super().__init__(*arguments, **named)

    async with _worker(database) as (one, _), _worker(database) as (two, store):
        await one.join()
        monkeypatch.setattr(socket, "socket", Scarce)
        if which < 3:
            with pytest.raises(StoreUnavailable, match=os_error(name).strerror):
                await two.join()
            assert len(_sockets(database)) == 1
        await two.join()
        assert sorted(_ids(await store.workers.all())) == sorted([one.id, two.id])


@pytest.mark.parametrize("name", ERRORS)
async def test_a_socket_that_cannot_be_touched(database: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose socket's file cannot be changed stays reachable."""

    def refuse(path: str) -> None:
        raise os_error(name)

    async with _worker(database) as (one, _), _worker(database) as (two, _):
        heard: list[bytes] = []
        one.on_notify("topic", heard.append)
        await one.join()
        await two.join()
        monkeypatch.setattr(os, "utime", refuse)
        assert one._socket is not None
        one._socket.keep_reachable()
        two.notify("topic", b"x")
        await _until(lambda: heard == [b"x"])


async def test_a_defect_while_joining(database: Path, logs: Any) -> None:
    """It is logged once, and tried again."""
    logs.expect_error("heartbeat_crashed")
    calls = 0

    async def adopt(mine: str, dead: Sequence[str]) -> None:
        nonlocal calls
        calls += 1
        await trio.lowlevel.checkpoint()
        if calls < 3:
            raise ZeroDivisionError("a defect")

    async with _worker(database) as (mine, store):
        mine.adopt_with(adopt)
        await store.workers.heartbeat(_dead(_dead_socket(database)))
        with trio.fail_after(5):
            await mine.join_eventually()
    assert calls == 3
    assert len(logs.named("heartbeat_crashed")) == 1


async def test_a_socket_whose_file_is_removed(database: Path) -> None:
    """The next heartbeat binds another socket; otherwise the others would take the worker for dead."""
    async with _worker(database) as (one, store), _worker(database) as (two, _):
        heard: list[bytes] = []
        one.on_notify("topic", heard.append)
        await one.join()
        [path] = _sockets(database)
        path.unlink()
        await _until(path.exists)
        await two.join()
        two.notify("topic", b"x")
        await _until(lambda: heard == [b"x"])
        assert sorted(_ids(await store.workers.all())) == sorted([one.id, two.id])


# -- exited workers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_there", [True, False], ids=["refused", "no file"])
async def test_exited_workers_are_adopted_before_they_are_deleted(database: Path, is_there: bool) -> None:
    """`join` adopts what exited workers have left, and then deletes their rows, tickets and socket files."""
    async with _worker(database) as (mine, store):
        address = _dead_socket(database) if is_there else f"{database}-w_gone"
        await store.workers.heartbeat(_dead(address))
        await store.sessions.take_ticket("alice", "chat", worker="w_dead")
        adopted = []

        async def adopt(worker: str, dead: Sequence[str]) -> None:
            assert _ids(await store.workers.all()) == ["w_dead", mine.id]
            adopted.append((worker, dead))

        mine.adopt_with(adopt)
        mine.adopt_with(adopt)
        await mine.join()
        assert adopted == [(mine.id, ["w_dead"])] * 2
        assert _ids(await store.workers.all()) == [mine.id]
        assert await store.sessions.tickets("alice", "chat") == []
        assert not os.path.exists(address)  # noqa: ASYNC240 - a moment


async def test_an_adopter_that_fails_is_asked_again(database: Path, logs: Any) -> None:
    """Exited workers stay in the store until all their work is adopted, but do not count as running meanwhile."""
    logs.expect_error("heartbeat_crashed")
    async with _worker(database) as (mine, store):
        await mine.join()
        failures: list[Exception] = [StoreUnavailable("full"), ValueError("a defect")]
        failing = trio.Event()

        async def adopt(worker: str, dead: Sequence[str]) -> None:
            await failing.wait()
            if failures:
                raise failures.pop()

        mine.adopt_with(adopt)
        await store.workers.heartbeat(_dead(_dead_socket(database)))
        assert _ids(await mine.all()) == [mine.id]
        assert set(_ids(await store.workers.all())) == {"w_dead", mine.id}
        failing.set()
        await _until(lambda: logs.named("workers_adopted"))
        assert not failures
        assert _ids(await store.workers.all()) == [mine.id]


async def test_the_runs_of_exited_workers(database: Path) -> None:
    """With the store's own `adopt`: an acknowledged run goes on here, another one has failed. Of two workers that adopt
    at once, one gets the run."""
    async with _worker(database) as (one, store), _worker(database) as (two, _):
        found: list[Run] = []
        for mine in (one, two):

            async def adopt(worker: str, dead: Sequence[str]) -> None:
                found.extend(await store.runs.adopt(worker, dead=dead, at=NOW))

            mine.adopt_with(adopt)
        await store.workers.heartbeat(_dead(_dead_socket(database)))
        for id_, acknowledged in (("run_1", True), ("run_2", False)):
            await store.runs.add(
                Run(
                    id=id_,
                    channel="hook",
                    owner="",
                    session=None,
                    action="chat",
                    request=b"{}",
                    state="running",
                    acknowledged=acknowledged,
                    worker="w_dead",
                    created_at=NOW,
                )
            )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.join)
            nursery.start_soon(two.join)
        [run] = found
        assert (run.id, run.state) == ("run_1", "queued")
        assert run.worker in (one.id, two.id)
        kept = await store.runs.get("run_2")
        assert kept is not None
        assert (kept.state, kept.status) == ("failed", 503)


async def test_a_clean_shutdown(database: Path, logs: Any) -> None:
    """The worker's socket file is removed, and the other workers check at once, adopt what it has left, and delete
    it."""
    adopted: list[str] = []
    async with _worker(database) as (one, store):

        async def adopt(worker: str, dead: Sequence[str]) -> None:
            await trio.lowlevel.checkpoint()
            adopted.extend(dead)

        one.adopt_with(adopt)
        await one.join()
        async with _worker(database) as (two, _):
            await two.join()
            assert len(_sockets(database)) == 2
        assert len(_sockets(database)) == 1
        assert _ids(await one.all()) == [one.id]
        await _until(lambda: logs.named("workers_adopted"))
        assert adopted == [two.id]
        assert _ids(await store.workers.all()) == [one.id]
    assert _sockets(database) == []


async def test_the_last_one_is_adopted_by_the_next_start(database: Path) -> None:
    """If no other worker runs, what a worker has left stays in the store until the next one joins."""
    async with _worker(database) as (first, _):
        await first.join()
    async with _worker(database) as (second, store):
        await second.join()
        assert _ids(await store.workers.all()) == [second.id]


CHILD = """
import sys, trio
from trigate.store import opening
from trigate.workers import membership
from trigate.workers.membership import open_workers

membership.HEARTBEAT_S = 3600  # a stop in the middle of a write would block the writes of the others

async def main():
    async with opening.open_store(sys.argv[1]) as store, open_workers(store) as mine:
        await mine.join()
        await store.sessions.take_ticket("alice", "chat", worker=mine.id)
        print(mine.id, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), start_new_session=True)


@pytest.mark.slow
async def test_a_killed_process(database: Path, monkeypatch: pytest.MonkeyPatch, logs: Any) -> None:
    """A stopped process is not taken for dead, however long it is stopped; a killed one is adopted at the next
    check."""
    monkeypatch.setattr(membership, "HEARTBEAT_S", 0.2)
    adopted: list[str] = []
    async with _worker(database) as (mine, store):

        async def adopt(worker: str, dead: Sequence[str]) -> None:
            await trio.lowlevel.checkpoint()
            adopted.extend(dead)

        mine.adopt_with(adopt)
        await mine.join()
        command = [sys.executable, "-c", CHILD, str(database)]
        process = await trio.to_thread.run_sync(_start, command)
        try:
            assert process.stdout is not None
            child = (await trio.to_thread.run_sync(process.stdout.readline)).decode().strip()
            process.send_signal(signal.SIGSTOP)
            for _ in range(1_000):
                mine.notify("topic", b"x" * 1_000)
            await trio.sleep(1.0)  # five checks
            assert _ids(await mine.all()) == [mine.id, child]
            assert adopted == []
            process.kill()
            await trio.to_thread.run_sync(process.wait)
            assert _ids(await mine.all()) == [mine.id]
            await _until(lambda: adopted)
        finally:
            process.kill()
            process.communicate()
        assert adopted == [child]

        async def forgotten() -> bool:
            return _ids(await store.workers.all()) == [mine.id]

        await _until(forgotten)
        assert await store.sessions.tickets("alice", "chat") == []
        await _until(lambda: len(_sockets(database)) == 1)
