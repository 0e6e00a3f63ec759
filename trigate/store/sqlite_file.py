"""One SQLite file: opened, written to in groups, read from, closed.

There are two connections, each with a thread of its own: one writes while the other reads. Every failure of
the file is a `StoreUnavailable` with SQLite's reason; after a failure, `File.has_failed` is set, and the owner has to
close the file.

After each commit and each read, the file checks that its paths still lead to the files that it has open. So no write is
acknowledged that went into a file which has been removed or replaced.

**Rule for editing this:** while the database is open here, do not open its files by any other means: closing a file
releases all POSIX locks that the process has on it, including SQLite's.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import apsw
import trio

from trigate.errors import StoreUnavailable
from trigate.store.schema import APPLICATION_ID, MIGRATIONS
from trigate.store.sqlite_connection import SqliteConnection
from trigate.store.tables import Tables

T = TypeVar("T")
Operation = Callable[[Tables], Any]
FileIds = list[tuple[int, int]]
"""Device and inode of the database, its WAL and its shared memory."""


BUSY_TIMEOUT_S = 5.0
"""Seconds that another process may hold the lock before a write fails."""
CLOSE_TIMEOUT_S = 5.0
"""Seconds that closing a connection may take."""
WAL_LIMIT_BYTES = 64 << 20
"""The size to which SQLite truncates the WAL's file after a checkpoint."""


def unavailable(reason: str) -> StoreUnavailable:
    """Returns the error of a store that cannot be used."""
    return StoreUnavailable(f"The store cannot be used: {reason}")


_FAILURES = (apsw.Error, OSError, MemoryError)


def _translate(error: Exception) -> StoreUnavailable:
    # An OSError's whole text names the path, and clients see this message.
    return unavailable((isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__)


class File:
    """An open file. Made by `open_file`.

    Attributes:
        has_failed: An operation has failed. The file has to be closed.
    """

    def __init__(self, path: str, file_ids: FileIds, *, writing: SqliteConnection, reading: SqliteConnection) -> None:
        self.has_failed = False
        self._path = path
        self._writing = writing
        self._reading = reading
        self._is_durable: bool | None = None
        self._file_ids = file_ids

    async def write(self, operations: Iterable[Operation], *, durable: bool) -> list[Any]:
        """Commits operations as one transaction.

        Args:
            durable: The transaction is on the disk when this returns.

        Returns:
            For each operation its result, or the exception that it raised: such an operation alone is rolled back.

        Raises:
            StoreUnavailable: The file has failed; nothing is committed.
        """
        return await self._hop(self._writing, lambda db: self._commit_in_thread(db, operations, durable))

    async def read(self, operation: Callable[[Tables], T]) -> T:
        """Runs an operation on one snapshot of the tables.

        Raises:
            StoreUnavailable: The file has failed.
        """
        return await self._hop(self._reading, lambda db: self._read_in_thread(db, operation))

    async def close(self) -> None:
        """Closes the file. The last connection to it, of all processes, writes the WAL back into the database."""
        await _close(self._reading)
        await _close(self._writing)

    async def _hop(self, connection: SqliteConnection, function: Callable[[apsw.Connection], T]) -> T:
        try:
            return await _hop(connection, function)
        except StoreUnavailable:
            self.has_failed = True
            raise

    # -- in the threads of the connections

    def _commit_in_thread(self, db: apsw.Connection, operations: Iterable[Operation], durable: bool) -> list[Any]:
        try:
            if durable is not self._is_durable:
                db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._is_durable = durable
            db.execute("BEGIN IMMEDIATE")
            tables = Tables(db)
            outcomes = [_attempt(db, tables, operation) for operation in operations]
            db.execute("COMMIT")
        finally:
            _roll_back(db)
        self._check_files()
        return outcomes

    def _read_in_thread(self, db: apsw.Connection, operation: Callable[[Tables], T]) -> T:
        try:
            db.execute("BEGIN")
            result = operation(Tables(db))
        finally:
            _roll_back(db)
        self._check_files()
        return result

    def _check_files(self) -> None:
        try:
            is_same = _file_ids(self._path) == self._file_ids
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise unavailable("its file was removed or replaced")


def _file_ids(path: str) -> FileIds:
    found = [os.stat(path + suffix) for suffix in ("", "-wal", "-shm")]
    return [(status.st_dev, status.st_ino) for status in found]


def _attempt(db: apsw.Connection, tables: Tables, operation: Operation) -> Any:
    """Runs an operation in a savepoint; returns its result, or the exception that it raised itself."""
    db.execute("SAVEPOINT operation")
    try:
        result = operation(tables)
    except Exception as error:
        # Any other SQLite error concerns the file, and may have rolled back the whole transaction.
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


def _create(path: str) -> None:
    """Creates the file and the directories above it if they do not exist, for their owner alone."""
    Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


async def open_file(path: str) -> File:
    """Opens a file. Creates it, or migrates it to the current version, if needed.

    Raises:
        StoreUnavailable: The file cannot be opened, or it is not a store of this version or an earlier one.
    """
    async with contextlib.AsyncExitStack() as stack:
        writing = _connect(path)
        stack.push_async_callback(_close, writing)
        await _hop(writing, _prepare_writing)
        reading = _connect(path)
        stack.push_async_callback(_close, reading)
        file_ids = await _hop(reading, lambda db: _prepare_reading(db, path))
        stack.pop_all()
    return File(path, file_ids, writing=writing, reading=reading)


def _connect(path: str) -> SqliteConnection:
    def connect() -> apsw.Connection:
        _create(path)
        return apsw.Connection(path, apsw.SQLITE_OPEN_READWRITE)

    try:
        return SqliteConnection(connect)
    except RuntimeError as error:  # no thread can be started
        raise _translate(error) from error


async def _hop(connection: SqliteConnection, function: Callable[[apsw.Connection], T]) -> T:
    """Calls a function in the thread of a connection, with that connection."""
    try:
        return await connection.call(function)
    except _FAILURES as error:
        raise _translate(error) from error


async def _close(connection: SqliteConnection) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT_S):
        await connection.aclose()


def _prepare_reading(db: apsw.Connection, path: str) -> FileIds:
    db.set_busy_timeout(int(BUSY_TIMEOUT_S * 1000))
    db.execute("PRAGMA query_only = ON")
    db.execute("SELECT times FROM touched")
    return _file_ids(path)  # all three exist, since a row has been read


def _prepare_writing(db: apsw.Connection) -> None:
    db.set_busy_timeout(int(BUSY_TIMEOUT_S * 1000))
    if db.readonly("main"):
        raise unavailable("its file is read-only")
    _schema_version(db)  # before writing into what may be the file of another program
    _use_wal(db)
    db.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
    # On macOS, fsync leaves the data in the cache of the disk.
    db.execute("PRAGMA fullfsync = ON; PRAGMA checkpoint_fullfsync = ON")
    if _schema_version(db) == len(MIGRATIONS):
        return
    db.execute("PRAGMA synchronous = FULL; BEGIN IMMEDIATE")
    try:
        for migration in MIGRATIONS[_schema_version(db) :]:  # another worker may have migrated it
            db.execute(migration).fetchall()  # to the end, even if a statement returns rows
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {len(MIGRATIONS)}; COMMIT")
    finally:
        _roll_back(db)


def _schema_version(db: apsw.Connection) -> int:
    """Returns the version of a database; 0 = it is empty.

    Raises:
        StoreUnavailable: It belongs to another program, or to a later Trigate.
    """
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
    # SQLite's busy timeout does not apply to this statement, and several workers may start at once.
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
