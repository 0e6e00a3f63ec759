"""A file of the exchanges that a process has begun and settled. The file survives the process.

A line is written when an exchange begins, with the outcome ``lost``, and another one when it is settled, with its
outcome. So a process that reads the journal of a killed one finds the state of each exchange in the last line of its
id.

Why a journal, beside SQLite's own write-ahead log: a call must not wait for the store. A line is one ``write`` to the
end of the file, one system call in the thread of the event loop. SQLite's log would cost each call a hop to its thread
and back, and a durable commit there waits for an fsync. There is no fsync: after ``write`` the line is in the
kernel, so it survives SIGKILL, but not a power failure. The records reach the store later, many in one transaction.

The file is locked (``flock``) for as long as its process runs; the kernel releases the lock when the process ends,
however it ends. So a journal that can be locked belongs to an exited process (`take_orphan`). Its name consists of the
path of the store's file, the worker's id, and a number: a long journal is replaced by the next one (`Journal.rotate`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
from collections.abc import Iterable, Iterator

import msgspec

from trigate.logs import log
from trigate.store.records import ExchangeRecord

SLICE_BYTES = 128 * 1024
"""The number of bytes that are read at once: half a millisecond of work."""
MAX_LINE_BYTES = 1024 * 1024
"""A longer line cannot be a record; what has been read of it is skipped."""

_decoder = msgspec.json.Decoder(ExchangeRecord)


def records_of(lines: bytes) -> list[ExchangeRecord]:
    """Returns the records of whole lines. Lines that cannot be decoded are skipped, and logged together."""
    try:
        return _decoder.decode_lines(lines)
    except ValueError:  # msgspec's errors, and that of text that is not UTF-8
        pass
    found = []
    damaged, damaged_bytes, reason = 0, 0, ""
    for line in lines.split(b"\n"):
        try:
            found.append(_decoder.decode(line))
        except ValueError as error:
            if line:
                damaged, damaged_bytes, reason = damaged + 1, damaged_bytes + len(line), reason or str(error)
    _log_damage(damaged, damaged_bytes, reason)
    return found


def _log_damage(lines: int, lost_bytes: int, reason: str) -> None:
    log.error("journal_damaged", lines=lines, bytes=lost_bytes, error=reason)


class Journal:
    """The journal that this process writes.

    Args:
        store: The path of the store's file.
        worker: The id of the worker that writes it.

    Raises:
        OSError: Every method: the file system has failed.
    """

    def __init__(self, store: str, worker: str) -> None:
        self._stem = f"{store}-exchanges-{worker}"
        self._number = 0
        self.path = ""
        self._fd = -1
        self.size = 0
        """Bytes written so far."""
        self._open()

    def __repr__(self) -> str:
        return f"<Journal {self.path}, {self.size} bytes>"

    def _open(self) -> None:
        os.makedirs(os.path.dirname(self._stem), mode=0o700, exist_ok=True)
        while True:
            path = f"{self._stem}.{self._number}"
            self._number += 1
            try:
                fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                continue  # left by an attempt that failed below
            try:
                is_locked = _lock(fd, path)
            except OSError:
                _remove(path, fd)
                raise
            if is_locked:  # otherwise another process has adopted it as an orphan in the meantime
                break
            os.close(fd)
        self.path, self._fd, self.size = path, fd, 0

    def write(self, record: bytes) -> None:
        """Appends a record as one line. The file is as before if that fails.

        Args:
            record: JSON, made by `ExchangeRecord.encode`.
        """
        line = record + b"\n"
        written = os.write(self._fd, line)
        if written < len(line):  # the disk is full
            os.ftruncate(self._fd, self.size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
        self.size += written

    def slices(self) -> Iterator[list[ExchangeRecord]]:
        """Yields the records in order, some at a time."""
        return _slices(self._fd)

    def rotate(self, live: Iterable[ExchangeRecord]) -> None:
        """Replaces the file with the next one, without the exchanges that have ended.

        Args:
            live: The exchanges that have begun and not ended; the new file begins with them.

        Raises:
            OSError: The new file cannot be written. The journal continues in the old one.
        """
        old_path, old_fd, old_size = self.path, self._fd, self.size
        self._open()
        try:
            for record in live:
                self.write(record.encode())
        except OSError:  # the old file is complete, so the journal continues in it
            new_path, new_fd = self.path, self._fd
            self.path, self._fd, self.size = old_path, old_fd, old_size
            _remove(new_path, new_fd)
            raise
        _remove(old_path, old_fd)

    def close(self, *, remove: bool) -> None:
        """Closes the file.

        Args:
            remove: Whether to remove it, since the store has all its records. Otherwise it is an orphan, which the next
                process reads.
        """
        if remove:
            _remove(self.path, self._fd)
        else:
            with contextlib.suppress(OSError):
                os.close(self._fd)


def _remove(path: str, fd: int) -> None:
    """Removes and closes a journal. One that cannot be removed is an orphan as soon as it is closed."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    with contextlib.suppress(OSError):
        os.close(fd)


class Orphan:
    """The journal of a process that has exited. Made and locked by `take_orphan`.

    Raises:
        OSError: Every method: the file system has failed.
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd

    def slices(self) -> Iterator[list[ExchangeRecord]]:
        """Yields the records in order, some at a time."""
        return _slices(self._fd)

    def remove(self) -> None:
        """Removes the file, once the store has its records."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def _slices(fd: int) -> Iterator[list[ExchangeRecord]]:
    """Yields the records of a file, some at a time. An incomplete last line is left out."""
    rest = b""
    offset = 0
    while data := os.pread(fd, SLICE_BYTES, offset):
        offset += len(data)
        lines, _, rest = (rest + data).rpartition(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            _log_damage(1, len(rest), "a line without an end")
            rest = b""
        if lines:
            yield records_of(lines)


def journals(store: str) -> list[str]:
    """Returns the paths of all journals beside a store.

    Args:
        store: The path of the store's file.
    """
    return sorted(glob.glob(f"{glob.escape(store)}-exchanges-*"))


@contextlib.contextmanager
def take_orphan(path: str) -> Iterator[Orphan | None]:
    """Opens a journal whose process has exited. Within the block, no other process takes it.

    Yields:
        The journal; None = its process runs, or has just removed it.

    Raises:
        OSError: It cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield Orphan(path, fd) if _lock(fd, path) else None
    finally:
        os.close(fd)


def _lock(fd: int, path: str) -> bool:
    """Locks a file. False = another process has locked it, or the path refers to another file now."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.stat(path).st_ino == os.fstat(fd).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False
