"""The store in a file: its groups, several workers, its versions, and the failures of a file.

The tests use a real disk and real threads. None depends on how long something takes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
import trio.testing

from tests.store.test_operations import ALL, delivery, run, texts, turn
from tests.support.logs import Logs
from tests.support.processes import environment
from tests.support.shortage import ERRORS, no_descriptors, os_error
from trigate.errors import StoreUnavailable
from trigate.store import sqlite, sqlite_file
from trigate.store.records import StoreStatistics, Turn
from trigate.store.schema import APPLICATION_ID, MIGRATIONS
from trigate.store.sqlite import SqliteStore, open_sqlite_store
from trigate.store.sqlite_connection import SqliteConnection


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of the store, in a directory that does not exist."""
    return tmp_path / "data" / "store.db"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes retries fast."""
    monkeypatch.setattr(sqlite, "RETRY_S", 0.01)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Checks that the threads of each store end with it."""
    yield
    for thread in _threads():
        thread.join(10)
    assert _threads() == []


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "trigate store"]


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each commit, of all connections of this process."""
    found: list[None] = []

    def count(db: apsw.Connection) -> None:
        def on_commit() -> bool:
            found.append(None)
            return False

        db.set_commit_hook(on_commit)

    monkeypatch.setattr(apsw, "connection_hooks", [count])
    return found


async def _until_available(store: SqliteStore) -> None:
    """Waits until the store can be written to, without a restart."""
    with trio.fail_after(30):
        while True:
            try:
                return await store.check()
            except StoreUnavailable:
                await trio.sleep(0.01)


def _integrity(path: Path) -> str:
    db = apsw.Connection(str(path))
    [[found]] = db.execute("PRAGMA integrity_check")
    db.close()
    return str(found)


# -- groups -----------------------------------------------------------------------------------------------------------


async def test_queued_writes_are_committed_together(path: Path, commits: list[None]) -> None:
    """Writes that are queued at the same time are one commit."""
    async with open_sqlite_store(path) as store:
        await store.check()
        commits.clear()
        writes = [store.sessions.append(turn(str(number))) for number in range(300)]
        for write in writes:
            await write
        assert len(commits) == 1


async def test_concurrent_writers_share_commits(path: Path, commits: list[None]) -> None:
    """Many tasks, each of which awaits its own write, need far fewer commits than writes."""

    async def work(number: int) -> None:
        for _ in range(5):
            await store.sessions.append(turn(str(number)))

    async with open_sqlite_store(path) as store:
        await store.check()
        commits.clear()
        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(work, number)
        # 5 if no task is late; a late write is in the next group
        assert len(commits) <= 64


async def test_only_durable_writes_wait_for_the_disk(path: Path) -> None:
    """A group is synchronous if one of its writes is durable."""
    asked: list[str] = []

    def trace(db: apsw.Connection) -> None:
        def note(cursor: apsw.Cursor, sql: str, bindings: Any) -> bool:
            asked.append(sql)
            return True

        db.exec_trace = note

    async with open_sqlite_store(path) as store:
        await store.check()
        file = store._file
        assert file is not None
        await file._writing.call(trace)

        async def synchronous(*writes: Callable[[], Any]) -> int:
            for write in [write() for write in writes]:
                await write

            def pragma(db: apsw.Connection) -> int:
                [[found]] = db.execute("PRAGMA synchronous")
                return int(found)

            return await file._writing.call(pragma)

        ticket = partial(store.sessions.take_ticket, "o", "k", worker="w")
        append = partial(store.sessions.append, turn())
        assert await synchronous(ticket) == 1
        assert await synchronous(append) == 2
        assert await synchronous(ticket, append, ticket) == 2
        assert await synchronous(ticket, ticket) == 1
        assert asked.count("COMMIT") == 4


async def test_reads_do_not_wait_for_writes(path: Path) -> None:
    """While another worker writes, the committed rows can be read."""
    async with open_sqlite_store(path) as store:
        await store.sessions.append(turn("k", "a"))
        other = apsw.Connection(str(path))
        other.execute("BEGIN IMMEDIATE; DELETE FROM messages")
        assert texts(await store.sessions.messages("o", "k", limit=9)) == ["a"]
        other.execute("ROLLBACK")
        other.close()


async def test_a_read_is_one_snapshot(path: Path) -> None:
    """A commit between two queries of a read is not visible to the second one."""
    async with open_sqlite_store(path) as store, open_sqlite_store(path) as other:
        await store.sessions.append(turn("k", "a"))
        await other.check()
        began, written = trio.Event(), threading.Event()
        token = trio.lowlevel.current_trio_token()

        def look(tables: Any) -> tuple[int, int]:
            before = tables.session("o", "k").messages
            token.run_sync_soon(began.set)
            assert written.wait(30)
            return before, tables.session("o", "k").messages

        async def write() -> None:
            await began.wait()
            await other.sessions.append(turn("k", "b"))
            written.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            assert await store.read(look) == (1, 1)


async def test_a_deadline_cancels_one_read(path: Path) -> None:
    """A read under a deadline is cancelled, even in the middle of a statement; the store goes on."""
    forever = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    async with open_sqlite_store(path) as store:
        await store.check()
        with trio.move_on_after(0.05) as scope:
            await store.read(lambda tables: tables._do(forever))
        assert scope.cancelled_caught
        assert await store.sessions.get("o", "k") is None
        with trio.move_on_after(0):
            await store.sessions.append(turn("k"))
        await store.check()
        assert await store.sessions.get("o", "k") is not None
        assert store.statistics().state == "open"


# -- beginning and end ------------------------------------------------------------------------------------------------


async def test_nothing_is_opened_before_it_is_needed(path: Path) -> None:
    """No file, no directory and no thread. Later they exist, for their owner alone."""
    async with open_sqlite_store(path) as store:
        await trio.testing.wait_all_tasks_blocked()
        assert store.statistics() == StoreStatistics(kind="sqlite", path=str(path), state="closed")
        assert not path.parent.exists()
        assert _threads() == []
        assert repr(store) == "<SqliteStore, closed, 0 writes waiting>"
        assert await store.sessions.get("o", "k") is None
        assert store.statistics().state == "open"
        for file, mode in ((path.parent, 0o700), (path, 0o600), (path.with_name("store.db-wal"), 0o600)):
            assert stat.S_IMODE(file.stat().st_mode) == mode
    assert store.statistics().state == "closed"


async def test_what_is_queued_at_the_end_is_written(path: Path) -> None:
    """Also when everything is cancelled; no WAL is left."""
    with trio.CancelScope() as scope:
        async with open_sqlite_store(path) as store:
            for number in range(1000):  # more than one group
                store.sessions.append(turn(str(number)))
            scope.cancel()
            await trio.sleep_forever()
    assert [file.name for file in path.parent.iterdir()] == ["store.db"]
    async with open_sqlite_store(path) as store:
        assert (await store.sessions.count(active_since=0.0)).total == 1000


async def test_what_comes_after_the_end_is_refused(path: Path) -> None:
    """The store is not opened again."""
    async with open_sqlite_store(path) as store:
        await store.sessions.append(turn())
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.sessions.append(turn())
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.sessions.get("o", "k")
    assert store.statistics().state == "closed"


async def test_the_end_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another process holds the lock, queued writes fail when the time is over."""
    monkeypatch.setattr(sqlite, "END_TIMEOUT_S", 0.01)
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_S", 0.2)
    other = None
    with trio.fail_after(30):
        async with open_sqlite_store(path) as store:
            await store.check()
            other = apsw.Connection(str(path))
            other.execute("BEGIN IMMEDIATE")
            write = store.sessions.append(turn())
        with pytest.raises(StoreUnavailable, match="closed"):
            await write
    other.execute("ROLLBACK")
    other.close()


@pytest.mark.slow
def test_under_asyncio(path: Path) -> None:
    """As a guest of asyncio's loop it works in the same way, and its threads end."""
    code = f"""
import asyncio, threading, trio
from trigate.store.sqlite import open_sqlite_store
from trigate.store.interface import Turn

async def work():
    async with open_sqlite_store({str(path)!r}) as store:
        made = await store.sessions.append(Turn(owner="o", key="k", messages=(), at=1.0))
        assert made.turns == 1, made
        assert await store.sessions.get("o", "k") is not None

async def host():
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    trio.lowlevel.start_guest_run(
        work,
        run_sync_soon_threadsafe=loop.call_soon_threadsafe,
        done_callback=lambda outcome: (outcome.unwrap(), done.set()),
        host_uses_signal_set_wakeup_fd=True,
    )
    await done.wait()

asyncio.run(host())
assert not [each for each in threading.enumerate() if each.name == "trigate store"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), timeout=60)


@pytest.mark.slow
def test_an_abandoned_run_does_not_keep_the_process(path: Path) -> None:
    """A loop that ends under its guest leaves the store open; the process ends nevertheless."""
    code = f"""
import asyncio, trio
from trigate.store.sqlite import open_sqlite_store

async def work(opened):
    async with open_sqlite_store({str(path)!r}) as store:
        await store.check()
        opened.set()
        await trio.sleep_forever()

async def host():
    loop, opened = asyncio.get_running_loop(), asyncio.Event()
    trio.lowlevel.start_guest_run(
        work, opened,
        run_sync_soon_threadsafe=loop.call_soon_threadsafe, done_callback=print, host_uses_signal_set_wakeup_fd=True,
    )
    await opened.wait()

asyncio.run(host())
"""
    subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60, stderr=subprocess.DEVNULL, check=False)


# -- several workers --------------------------------------------------------------------------------------------------


async def test_two_workers_share_a_file(path: Path) -> None:
    """Each worker sees the writes of the other; tickets and idempotency keys are shared."""
    async with open_sqlite_store(path) as one, open_sqlite_store(path) as two:
        first = await one.sessions.take_ticket("o", "k", worker="w1")
        second = await two.sessions.take_ticket("o", "k", worker="w2")
        assert await one.sessions.tickets("o", "k") == await two.sessions.tickets("o", "k") == [first, second]
        await one.sessions.append(turn("k", "a"), ticket=first)
        assert texts(await two.sessions.messages("o", "k", limit=9)) == ["a"]
        claims = [
            (one, two)[number % 2].idempotency.claim("hook", "key", digest=b"1", run=run(f"run_{number}"))
            for number in range(50)
        ]
        found = [await claim for claim in claims]
        assert sum(claim.is_new for claim in found) == 1
        assert len({claim.run.id for claim in found}) == 1
        await one.deliveries.add(delivery())
        taken = [
            await store.deliveries.take(worker, at=99.0, limit=9, channels=["hook"])
            for store, worker in ((two, "w2"), (one, "w1"))
        ]
        assert [len(each) for each in taken] == [1, 0]
        assert await one.channels.hold("t", worker="w1", dead=[]) is True
        assert await two.channels.hold("t", worker="w2", dead=[]) is False


async def test_many_workers_start_at_once(path: Path) -> None:
    """On a file that does not exist: one worker creates it, and all can use it."""

    async def start(number: int) -> None:
        async with open_sqlite_store(path) as store:
            await store.sessions.append(turn(str(number)))

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(start, number)
    async with open_sqlite_store(path) as store:
        assert (await store.sessions.count(active_since=0.0)).total == 8


# -- versions ---------------------------------------------------------------------------------------------------------


async def test_a_store_of_an_older_version_is_brought_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows stay."""
    async with open_sqlite_store(path) as store:
        await store.sessions.append(turn("k", "a"))
    monkeypatch.setattr(sqlite_file, "MIGRATIONS", (*MIGRATIONS, "CREATE TABLE more (x INTEGER) STRICT"))
    async with open_sqlite_store(path) as one, open_sqlite_store(path) as two:
        for store in (one, two):
            assert texts(await store.sessions.messages("o", "k", limit=9)) == ["a"]
    db = apsw.Connection(str(path))
    assert list(db.execute("PRAGMA user_version")) == [(len(MIGRATIONS) + 1,)]
    assert list(db.execute("PRAGMA application_id")) == [(APPLICATION_ID,)]
    assert list(db.execute("SELECT * FROM more")) == []
    db.close()


async def test_a_migration_is_done_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch, logs: Logs) -> None:
    """After a failed migration, the file is as before, and an older Trigate can use it."""
    async with open_sqlite_store(path) as store:
        await store.sessions.append(turn("k", "a"))
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_file, "MIGRATIONS", (*MIGRATIONS, "DROP TABLE messages; SELECT nonsense"))
        logs.expect_error("store_unavailable")
        async with open_sqlite_store(path) as store:
            with pytest.raises(StoreUnavailable, match="nonsense"):
                await store.check()
    async with open_sqlite_store(path) as store:
        assert texts(await store.sessions.messages("o", "k", limit=9)) == ["a"]


async def test_a_newer_store_is_refused(path: Path, logs: Logs) -> None:
    """The reason has both versions."""
    async with open_sqlite_store(path) as store:
        await store.check()
    db = apsw.Connection(str(path))
    db.execute("PRAGMA user_version = 99")
    db.close()
    logs.expect_error("store_unavailable")
    async with open_sqlite_store(path) as store:
        with pytest.raises(StoreUnavailable, match=f"newer Trigate.*99.*{len(MIGRATIONS)}"):
            await store.check()


@pytest.mark.parametrize("settings", ["", "PRAGMA user_version = 1", "PRAGMA application_id = 7"])
async def test_the_database_of_another_program_is_refused(path: Path, settings: str, logs: Logs) -> None:
    """No byte of it is changed."""
    path.parent.mkdir()
    db = apsw.Connection(str(path))
    db.execute(f"CREATE TABLE theirs (x); {settings}")
    db.close()
    before = path.read_bytes()
    logs.expect_error("store_unavailable")
    async with open_sqlite_store(path) as store:
        with pytest.raises(StoreUnavailable, match="another program"):
            await store.sessions.append(turn())
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["store.db"]


# -- what can go wrong ------------------------------------------------------------------------------------------------


async def _fails(store: SqliteStore, logs: Logs, reason: str) -> None:
    """Checks that writes and reads raise with the reason, statistics show it, and it is logged once."""
    logs.expect_error("store_unavailable")
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match=reason) as caught:
            await store.sessions.append(turn())
        assert caught.value.status == 503
    with pytest.raises(StoreUnavailable, match=reason):
        await store.check()
    found = store.statistics()
    assert found.state == "unavailable"
    assert re.search(reason, found.error or "")
    [entry] = logs.named("store_unavailable")
    assert re.search(reason, entry["reason"])
    assert not logs.named("store_available")


async def _works_again(store: SqliteStore, logs: Logs) -> None:
    """Checks that the store works again without a restart, and logs that."""
    await _until_available(store)
    await store.sessions.append(turn("again"))
    assert await store.sessions.get("o", "again") is not None
    assert store.statistics().state == "open"
    assert len(logs.named("store_available")) == 1


@pytest.fixture
def page_limit(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The largest size of a database, in pages: SQLite's own "disk full"."""
    limit = {"pages": 1_000_000}

    def hook(db: apsw.Connection) -> None:
        db.execute(f"PRAGMA max_page_count = {limit['pages']}")

    monkeypatch.setattr(apsw, "connection_hooks", [hook])
    return limit


async def test_a_full_disk(path: Path, logs: Logs, page_limit: dict[str, int]) -> None:
    """All writes of a group fail, and none is done in part. Acknowledged rows stay and can be read."""
    big = turn("big", "x" * 300_000)
    async with open_sqlite_store(path) as store:
        await store.sessions.append(turn("k", "a"))
    page_limit["pages"] = 60
    async with open_sqlite_store(path) as store:
        await store.sessions.append(turn("k", "b"))
        logs.expect_error("store_unavailable")
        group = [store.sessions.append(each) for each in (turn("small"), big, turn("tiny"))]
        for write in group:
            with pytest.raises(StoreUnavailable, match="disk is full"):
                await write
        await _until_available(store)
        assert texts(await store.sessions.messages("o", "k", limit=9)) == ["a", "b"]
        assert [each.key for each in await store.sessions.list("o", limit=9)] == ["k"]
        with pytest.raises(StoreUnavailable, match="disk is full"):
            await store.sessions.append(big)
        page_limit["pages"] = 1_000_000
        await _until_available(store)
        await store.sessions.append(big)
    assert _integrity(path) == "ok"
    assert len(logs.named("store_unavailable")) == 1  # the same reason
    assert len(logs.named("store_available")) == 1


@contextlib.contextmanager
def _tiny_disk(at: Path) -> Iterator[None]:
    at.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", at], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("cannot mount a file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="needs to mount a file system")
async def test_a_disk_that_is_really_full(path: Path, logs: Logs) -> None:
    """Another program fills the disk; when there is space again, the store works again by itself."""
    with _tiny_disk(path.parent):
        async with open_sqlite_store(path) as store:
            await store.sessions.append(turn("k", "a"))
            with contextlib.suppress(OSError), open(path.parent / "theirs", "wb", buffering=0) as theirs:  # noqa: ASYNC230
                while True:
                    theirs.write(bytes(4096))
            logs.expect_error("store_unavailable")
            writes = [store.sessions.append(turn("k", "x" * 20_000)) for _ in range(1000)]
            with pytest.raises(StoreUnavailable, match=r"full|disk I/O"):
                await writes[-1]
            (path.parent / "theirs").unlink()
            await _works_again(store, logs)
            assert len(texts(await store.sessions.messages("o", "k", limit=9999))) == 1
        assert _integrity(path) == "ok"


@contextlib.contextmanager
def _read_only(file: Path) -> Iterator[None]:
    """Makes a file or directory read-only, also for root, whom permissions do not stop."""
    if os.geteuid() != 0:
        mode = stat.S_IMODE(file.stat().st_mode)
        file.chmod(mode & 0o555)
        try:
            yield
        finally:
            file.chmod(mode)
        return
    done = subprocess.run(["chattr", "+i", file], capture_output=True, check=False) if shutil.which("chattr") else None
    if done is None or done.returncode:
        pytest.skip("root cannot make a file read-only here")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", file], check=True)


@pytest.mark.parametrize("what", ["file", "directory"])
async def test_a_read_only_file_or_directory(path: Path, what: str, logs: Logs) -> None:
    """Writes fail, with the reason."""
    async with open_sqlite_store(path) as store:
        await store.check()
    async with open_sqlite_store(path) as store:
        with _read_only(path if what == "file" else path.parent):
            await _fails(store, logs, "read-only|readonly|unable to open database file")
        await _works_again(store, logs)


async def test_a_directory_in_place_of_the_file(path: Path, logs: Logs) -> None:
    """A directory at the store's path is no database."""
    path.mkdir(parents=True)
    async with open_sqlite_store(path) as store:
        await _fails(store, logs, "unable to open database file")
        path.rmdir()
        await _works_again(store, logs)


async def test_a_file_in_place_of_the_directory(path: Path, logs: Logs) -> None:
    """The directory cannot be created. The reason does not contain its path, since clients see the reason."""
    path.parent.write_text("")
    async with open_sqlite_store(path) as store:
        await _fails(store, logs, "(File exists|Not a directory)$")
        path.parent.unlink()
        await _works_again(store, logs)


async def test_a_file_that_is_no_database(path: Path, logs: Logs) -> None:
    """It is not overwritten."""
    path.parent.mkdir()
    path.write_text("Dear diary, " * 1000)
    before = path.read_bytes()
    async with open_sqlite_store(path) as store:
        await _fails(store, logs, "not a database")
        assert path.read_bytes() == before
        path.unlink()
        await _works_again(store, logs)


async def test_a_damaged_file(path: Path, logs: Logs) -> None:
    """Garbage in its pages is detected when they are read; a file that is restored from a backup is used."""
    async with open_sqlite_store(path) as store:
        for number in range(50):
            store.sessions.append(turn(str(number), "x" * 4000))
    backup = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(len(backup) - 4096))
    async with open_sqlite_store(path) as store:
        logs.expect_error("store_unavailable")
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="malformed"):
                await store.sessions.messages("o", "7", limit=9)
            with pytest.raises(StoreUnavailable, match="malformed"):
                await store.sessions.append(turn("7"))
        assert store.statistics().state == "unavailable"
        restored = path.with_name("restored")
        restored.write_bytes(backup)
        restored.replace(path)
        for name in ("store.db-wal", "store.db-shm"):
            path.with_name(name).unlink(missing_ok=True)
        await _works_again(store, logs)
        assert len(texts(await store.sessions.messages("o", "7", limit=9))) == 1


async def test_a_lock_that_is_held_too_long(path: Path, logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another process holds the lock, writes fail and reads work."""
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_S", 0.01)
    async with open_sqlite_store(path) as store:
        await store.sessions.append(turn("k", "a"))
        other = apsw.Connection(str(path))
        other.execute("BEGIN IMMEDIATE")
        await _fails(store, logs, "locked")
        other.execute("ROLLBACK")
        other.close()
        await _works_again(store, logs)
        assert texts(await store.sessions.messages("o", "k", limit=9)) == ["a"]


@pytest.mark.parametrize("how", ["removed", "replaced", "without its log", "with its directory"])
async def test_a_file_that_goes_away_while_it_is_open(path: Path, how: str, logs: Logs) -> None:
    """A write into a file that was removed or replaced is not acknowledged."""
    async with open_sqlite_store(path) as store:
        await store.sessions.append(turn("k", "a"))
        match how:
            case "removed":
                path.unlink()
            case "replaced":
                shutil.copy(path, path.with_name("copy"))
                path.with_name("copy").replace(path)
            case "without its log":
                path.with_name("store.db-wal").unlink()
            case _:
                shutil.rmtree(path.parent)
        logs.expect_error("store_unavailable")
        with pytest.raises(StoreUnavailable, match="removed or replaced"):
            await store.sessions.append(turn("k", "lost"))
        assert store.statistics().state == "unavailable"
        if how == "replaced":
            for name in ("store.db-wal", "store.db-shm"):
                path.with_name(name).unlink(missing_ok=True)
        await _works_again(store, logs)
    assert _integrity(path) == "ok"


async def test_a_read_detects_a_replaced_file(path: Path, logs: Logs) -> None:
    """A read detects that the file was replaced, too."""
    async with open_sqlite_store(path) as store:
        await store.sessions.append(turn("k", "a"))
        path.unlink()
        logs.expect_error("store_unavailable")
        with pytest.raises(StoreUnavailable, match="removed or replaced"):
            await store.sessions.get("o", "k")
        assert store.statistics().state == "unavailable"
        await _works_again(store, logs)


_OF_SQLITE: dict[str, Exception] = {
    "CANTOPEN": apsw.CantOpenError("unable to open database file"),
    "IOERR": apsw.IOError("disk I/O error"),
    "FULL": apsw.FullError("database or disk is full"),
    "READONLY": apsw.ReadOnlyError("attempt to write a readonly database"),
    "BUSY": apsw.BusyError("database is locked"),
    "NOMEM": apsw.NoMemError("out of memory"),
    "no memory": MemoryError(),
    **{name: os_error(name) for name in ERRORS},
}


@pytest.mark.parametrize("error", _OF_SQLITE.values(), ids=_OF_SQLITE)
@pytest.mark.parametrize("place", ["open", "write", "read"])
async def test_an_error_of_the_system(
    path: Path, place: str, error: Exception, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while the file is opened, written to or read from is the error of that operation only."""
    is_failing = place == "open"

    def hook(db: apsw.Connection) -> None:
        def trace(cursor: apsw.Cursor, sql: str, bindings: Any) -> bool:
            if is_failing and sql.startswith("BEGIN IMMEDIATE" if place == "write" else "BEGIN"):
                raise error
            return True

        if place == "open" and is_failing:
            raise error
        db.exec_trace = trace

    monkeypatch.setattr(apsw, "connection_hooks", [hook])
    logs.expect_error("store_unavailable")
    async with open_sqlite_store(path) as store:
        if place != "open":
            await store.sessions.append(turn("k", "a"))
            is_failing = True
        with pytest.raises(StoreUnavailable) as caught:
            await (store.sessions.get("o", "k") if place == "read" else store.sessions.append(turn("k", "b")))
        assert caught.value.message.removeprefix("The store cannot be used: ") in (
            str(error),
            getattr(error, "strerror", None),
            "MemoryError",
        )
        is_failing = False
        await _works_again(store, logs)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is lowered below open files")
async def test_no_descriptor_is_left(path: Path, logs: Logs) -> None:
    """The first write may come when the process can open no more files. It works as soon as there are some again."""
    async with open_sqlite_store(path) as store:
        with no_descriptors():
            await _fails(store, logs, r"unable to open|Too many open files")
        await _works_again(store, logs)


@pytest.mark.parametrize("failures", [[1], [2], [1, 2, 3, 4]], ids=["the first", "the second", "several"])
async def test_no_thread_can_be_started(
    path: Path, failures: list[int], logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file cannot be opened then; nothing waits for ever, and it is opened as soon as there are threads."""
    start, calls = threading.Thread.start, 0

    def refuse(thread: threading.Thread) -> None:
        nonlocal calls
        calls += 1
        if calls in failures:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with trio.fail_after(5):
        async with open_sqlite_store(path) as store:
            logs.expect_error("store_unavailable")
            with pytest.raises(StoreUnavailable, match="can't start new thread"):
                await store.check()
            await _until_available(store)
            await store.sessions.append(turn("k", "a"))
            assert await store.sessions.get("o", "k") is not None


async def test_a_defect_fails_its_group(path: Path, logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected exception fails the writes that it hit; the store goes on."""
    async with open_sqlite_store(path) as store:
        await store.sessions.append(turn("k", "a"))
        with monkeypatch.context() as patch:
            patch.setattr(sqlite_file, "_attempt", lambda db, tables, operation: 1 / 0)
            for event in ("store_crashed", "store_unavailable"):
                logs.expect_error(event)
            with pytest.raises(StoreUnavailable, match="ZeroDivisionError"):
                await store.sessions.append(turn("k", "b"))
        await _works_again(store, logs)


async def test_a_failure_is_not_tried_again_at_once(path: Path, logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the pause, writes fail for the same reason, without an access to the disk."""
    monkeypatch.setattr(sqlite, "RETRY_S", 1000.0)
    path.mkdir(parents=True)
    async with open_sqlite_store(path) as store:
        await _fails(store, logs, "unable to open")
        path.rmdir()
        with pytest.raises(StoreUnavailable, match="unable to open"):
            await store.check()
        with pytest.raises(StoreUnavailable, match="unable to open"):
            await store.sessions.get("o", "k")
        assert not path.exists()
        assert _threads() == []


async def test_a_failed_write_that_is_not_awaited(path: Path, logs: Logs) -> None:
    """A failed write that is not awaited is reported in the log only."""
    path.mkdir(parents=True)
    logs.expect_error("store_unavailable")
    async with open_sqlite_store(path) as store:
        store.sessions.append(turn())
        store.prune(ALL)
        store.deliveries.add(delivery())
    assert len(logs.named("store_unavailable")) == 1


# -- crashes ----------------------------------------------------------------------------------------------------------

_WRITER = """
import sys, trio
from trigate.store.sqlite import open_sqlite_store
from trigate.store.interface import Message, Turn

async def work(store, name):
    number = 0
    while True:
        body = b'"%s %d' % (name.encode(), number) + b"x" * (number * 997 % 9000) + b'"'
        await store.sessions.append(Turn(owner="o", key=name, messages=(Message(body=body, tokens=1, at=1.0),), at=1.0))
        print(name, number, flush=True)
        number += 1

async def main(path, name):
    async with open_sqlite_store(path) as store, trio.open_nursery() as nursery:
        for task in range(16):
            nursery.start_soon(work, store, f"{name}-{task}")

trio.run(main, *sys.argv[1:])
"""


@pytest.mark.slow
async def test_killed_while_it_writes(path: Path) -> None:
    """Two processes that write into one file are killed, again and again: every acknowledged row is stored."""
    acknowledged: dict[str, int] = {}
    for round_ in range(12):
        names = [f"{round_}-{worker}" for worker in "ab"]
        children = [
            subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-c", _WRITER, path, name], stdout=subprocess.PIPE, text=True, env=environment()
            )
            for name in names
        ]
        for child in children:
            assert child.stdout is not None
            for _ in range(20 + 7 * round_):  # it is writing
                name, written = child.stdout.readline().split()
                acknowledged[name] = int(written)
        for child in children:
            child.send_signal(signal.SIGKILL)
        for child in children:
            assert child.stdout is not None
            for line in child.stdout.read().splitlines(keepends=True):
                if line.endswith("\n"):  # else it was killed in the middle of the line
                    name, written = line.split()
                    acknowledged[name] = int(written)
            child.wait()
            child.stdout.close()
        async with open_sqlite_store(path) as store:
            for name, number in acknowledged.items():
                session = await store.sessions.get("o", name)
                assert session is not None
                # one more may have been written and not reported
                assert session.messages in (number + 1, number + 2), name
                page = await store.sessions.messages("o", name, limit=number + 2)
                assert page is not None
                assert [each.body[: len(f'"{name} {n}')] for n, each in enumerate(page)] == [
                    f'"{name} {n}'.encode() for n in range(len(page))
                ]
        assert _integrity(path) == "ok"
    assert len(acknowledged) > 12


# -- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_ten_thousand_sessions(path: Path) -> None:
    """They can be paged through to the last one, counted, and deleted."""
    async with open_sqlite_store(path) as store:
        for number in range(10_000):
            store.sessions.append(Turn(owner="o", key=f"k{number:05}", messages=(), at=float(number)))
        assert (await store.sessions.count(active_since=9_000.0)).active == 1_000
        found: list[str] = []
        while page := await store.sessions.list("o", limit=1_000, after=found[-1] if found else None):
            found += [each.key for each in page]
        assert found == sorted((f"k{number:05}" for number in range(10_000)), reverse=True)
        await store.sessions.take_ticket("o", "k00000", worker="w")
        await store.prune(ALL)
        assert (await store.sessions.count(active_since=0.0)).total == 1_000


def _connection() -> SqliteConnection:
    return SqliteConnection(lambda: apsw.Connection(":memory:"))


async def test_nobody_waits_for_a_cancelled_call() -> None:
    """Its function goes on; the next call waits for it."""
    held, began, ended = threading.Event(), threading.Event(), []

    def hold(db: apsw.Connection) -> None:
        began.set()
        held.wait()
        ended.append(1)

    connection = _connection()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.call, hold)
        await trio.to_thread.run_sync(began.wait)
        nursery.cancel_scope.cancel()
    assert ended == []
    held.set()
    assert await connection.call(lambda db: [*ended, db.execute("SELECT 2").get]) == [1, 2]
    await connection.aclose()


async def test_a_cancelled_call_that_waits_is_not_made() -> None:
    """It is not made later either."""
    held = threading.Event()
    made: list[object] = []
    connection = _connection()
    async with trio.open_nursery() as outer:
        outer.start_soon(connection.call, lambda db: held.wait())
        await trio.testing.wait_all_tasks_blocked()  # it is the first one
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.call, made.append)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        held.set()
    await connection.aclose()
    assert made == []
