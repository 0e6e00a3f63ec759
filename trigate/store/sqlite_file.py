"""One SQLite file: opened, written to in groups, read from, closed. Imported when the first one is needed.

There are two connections, each with a thread of its own (apsw's): one writes, the other reads meanwhile. Every failure
of the file is a `StoreUnavailable` with SQLite's reason; after one, `File.has_failed` says that it has to be closed.

After each commit, and each read, it is checked that the files are still those at their paths. So nothing is
acknowledged that went to a file which nobody will find again.

**Rules for editing this:** apsw interrupts a statement at the deadline of the task that awaits it, so it is told that
there is none (`_Controller`). Do not open the database by any other means while it is open here: to close a file drops
all POSIX locks that the process has on it, SQLite's too.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import apsw
import apsw.aio
import trio

from trigate.errors import StoreUnavailable
from trigate.store.operations import Tables
from trigate.store.tables import APPLICATION_ID, MIGRATIONS, SqliteTables

T = TypeVar("T")
Operation = Callable[[Tables], Any]
Place = list[tuple[int, int]]

BUSY_TIMEOUT_S = 5.0
"""How long another process may hold the lock before a write fails."""
CLOSE_TIMEOUT_S = 5.0
"""How long it may take to close a connection."""
WAL_LIMIT_BYTES = 64 << 20
"""What is left of the WAL's file after a checkpoint, at most."""


def unavailable(reason: str) -> StoreUnavailable:
    """Why a store cannot be used."""
    return StoreUnavailable(f"The store cannot be used: {reason}")


def _translated(error: Exception) -> StoreUnavailable:
    # not the whole text of an OSError: it names the path, and clients see this
    return unavailable((isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__)


class File:
    """A file that is open. Made by `open_file`.

    Attributes:
        has_failed: It has to be closed.
    """

    def __init__(
        self, path: str, place: Place, *, writing: apsw.AsyncConnection, reading: apsw.AsyncConnection
    ) -> None:
        self.has_failed = False
        self._path = path
        self._writing = writing
        self._reading = reading
        self._is_durable: bool | None = None
        self._place = place

    async def write(self, operations: Iterable[Operation], *, durable: bool) -> list[Any]:
        """Commits operations as one transaction; returns what each returned or, if it was its own mistake, raised.

        Args:
            durable: It is on the disk when this returns.
        """
        return await self._hop(self._writing, lambda db: self._commit(db, operations, durable))

    async def read(self, operation: Callable[[Tables], T]) -> T:
        """Runs an operation on one snapshot of the tables."""
        return await self._hop(self._reading, lambda db: self._look(db, operation))

    async def close(self) -> None:
        """Closes it. The last connection to it, in all processes, writes the WAL back into the database."""
        await _close(self._reading)
        await _close(self._writing)

    async def _hop(self, connection: apsw.AsyncConnection, function: Callable[[apsw.Connection], T]) -> T:
        try:
            return await _hop(connection, function)
        except StoreUnavailable:
            self.has_failed = True
            raise

    # In the threads of the connections.

    def _commit(self, db: apsw.Connection, operations: Iterable[Operation], durable: bool) -> list[Any]:
        try:
            if durable is not self._is_durable:
                db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._is_durable = durable
            db.execute("BEGIN IMMEDIATE")
            tables = SqliteTables(db)
            outcomes = [_attempt(db, tables, operation) for operation in operations]
            db.execute("COMMIT")
        finally:
            _roll_back(db)
        self._check_place()
        return outcomes

    def _look(self, db: apsw.Connection, operation: Callable[[Tables], T]) -> T:
        try:
            db.execute("BEGIN")
            result = operation(SqliteTables(db))
        finally:
            _roll_back(db)
        self._check_place()
        return result

    def _check_place(self) -> None:
        try:
            is_there = _place(self._path) == self._place
        except FileNotFoundError:
            is_there = False
        if not is_there:
            raise unavailable("its file was removed or replaced")


def _place(path: str) -> Place:
    """Which files they are."""
    found = [os.stat(path + suffix) for suffix in ("", "-wal", "-shm")]
    return [(each.st_dev, each.st_ino) for each in found]


def _attempt(db: apsw.Connection, tables: Tables, operation: Operation) -> Any:
    """Runs an operation in a savepoint; returns its result, or its mistake."""
    db.execute("SAVEPOINT operation")
    try:
        result = operation(tables)
    except Exception as error:
        # Any other error of SQLite's is one of the file, and may have rolled back everything.
        if isinstance(error, apsw.Error) and not isinstance(error, apsw.ConstraintError | apsw.TooBigError):
            raise
        db.execute("ROLLBACK TO operation")
        result = error
    db.execute("RELEASE operation")
    return result


def _roll_back(db: apsw.Connection) -> None:
    """Ends the transaction, if there is one."""
    if db.in_transaction:
        db.execute("ROLLBACK")


# -- opening and closing ----------------------------------------------------------------------------------------------


class _Controller(apsw.aio.Trio):
    """What apsw calls the thread of a connection by, but for two things.

    The thread is a daemon: a Trio run that is abandoned (it was the guest of a loop that has ended) must not keep the
    process. And a call has no deadline: apsw would raise TooSlowError at that of the caller, where Trio cancels.
    """

    def worker_thread_run(self) -> None:
        """Starts the thread; the one that apsw has started for it ends with that."""
        threading.Thread(target=super().worker_thread_run, name="trigate store", daemon=True).start()

    async def send(self, call: Callable[[], Any]) -> Any:
        """Calls something in the thread."""
        token = apsw.aio.deadline.set(math.inf)
        try:
            return await super().send(call)
        finally:
            apsw.aio.deadline.reset(token)


def _make(path: str) -> None:
    """Makes the file, for its owner alone, and the directories above it, where they are not there."""
    Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


async def open_file(path: str) -> File:
    """Opens a file; makes it, or brings it to the current version, where that is needed.

    Raises:
        StoreUnavailable: It cannot be, or it is not a store's.
    """
    async with contextlib.AsyncExitStack() as stack:
        writing = await _connect(path)
        stack.push_async_callback(_close, writing)
        await _hop(writing, _prepare_writing)
        reading = await _connect(path)
        stack.push_async_callback(_close, reading)
        place = await _hop(reading, lambda db: _prepare_reading(db, path))
        stack.pop_all()
    return File(path, place, writing=writing, reading=reading)


async def _connect(path: str) -> apsw.AsyncConnection:
    controller = _Controller()
    token = apsw.async_controller.set(lambda: controller)  # type: ignore[arg-type] # what makes one
    try:
        await controller.send(partial(_make, path))
        return await apsw.Connection.as_async(path, apsw.SQLITE_OPEN_READWRITE)
    except (apsw.Error, OSError) as error:
        controller.close()  # type: ignore[no-untyped-call] # without a connection, nobody else ends the thread
        raise _translated(error) from error
    finally:
        apsw.async_controller.reset(token)


async def _hop(connection: apsw.AsyncConnection, function: Callable[[apsw.Connection], T]) -> T:
    """Calls a function in the thread of a connection, with the connection, which is an ordinary one there."""
    try:
        result: T = await connection.async_run(function, connection)
    except (apsw.Error, OSError) as error:
        raise _translated(error) from error
    return result


async def _close(connection: apsw.AsyncConnection) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT_S):
        await connection.aclose(force=True)


def _prepare_reading(db: apsw.Connection, path: str) -> Place:
    db.set_busy_timeout(int(BUSY_TIMEOUT_S * 1000))
    db.execute("PRAGMA query_only = ON")
    db.execute("SELECT times FROM touched")
    return _place(path)  # all of them are there, since something has been read


def _prepare_writing(db: apsw.Connection) -> None:
    db.set_busy_timeout(int(BUSY_TIMEOUT_S * 1000))
    if db.readonly("main"):
        raise unavailable("its file is read-only")
    _judge(db)  # before anything is written into what may be somebody else's
    _use_wal(db)
    db.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
    # macOS's fsync leaves what is written to it in the cache of the disk
    db.execute("PRAGMA fullfsync = ON; PRAGMA checkpoint_fullfsync = ON")
    if _judge(db) == len(MIGRATIONS):
        return
    db.execute("PRAGMA synchronous = FULL; BEGIN IMMEDIATE")
    try:
        for migration in MIGRATIONS[_judge(db) :]:  # another worker may have been quicker
            db.execute(migration).fetchall()  # to its end, even if a statement gives rows
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {len(MIGRATIONS)}; COMMIT")
    finally:
        _roll_back(db)


def _judge(db: apsw.Connection) -> int:
    """The version of a database; 0 = there is nothing in it yet."""
    [[application, version, tables]] = db.execute(
        "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema)"
        " FROM pragma_application_id, pragma_user_version"
    )
    if (application, version, tables) == (0, 0, 0):
        return 0
    if application != APPLICATION_ID:
        raise unavailable("its file is the database of another program")
    if version > len(MIGRATIONS):
        raise unavailable(f"its file was made by a newer Trigate (version {version}; this one knows {len(MIGRATIONS)})")
    return int(version)


def _use_wal(db: apsw.Connection) -> None:
    # SQLite does not wait for a lock here, where several workers start at once.
    give_up_at = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            [[mode]] = db.execute("PRAGMA journal_mode = WAL")
            break
        except apsw.BusyError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise unavailable("its file system cannot share memory, which WAL mode needs")
