"""What a process has begun and settled, in a file that survives it.

A line is written when an exchange begins, which says that it is lost, and another one when it is settled, which says
what became of it. So whoever reads the file of a process that has been killed knows of each exchange what there is to
know: the last line of each id counts. A line is one ``write`` to the end of the file: it costs a system call and no
wait, and what the kernel has taken survives SIGKILL (not the loss of power).

The file is locked (``flock``) for as long as its process lives; the kernel lets go of it when the process has ended,
however that was. So a file that can be locked is a dead one's (`take_orphans`). It is named for the store beside which
it lies, its process, and a number: it is replaced by the next one when it has become long (`Journal.turn`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
from collections.abc import Iterable, Iterator

import msgspec
import structlog

from trigate.store.records import ExchangeRecord

log = structlog.get_logger("trigate.ledger.journal")

SLICE_BYTES = 128 * 1024
"""How much is read at once: half a millisecond's work."""

_decoder = msgspec.json.Decoder(ExchangeRecord)


def records_of(lines: bytes) -> list[ExchangeRecord]:
    """The records of whole lines. What cannot be read is left out, and logged."""
    try:
        return _decoder.decode_lines(lines)
    except msgspec.MsgspecError:
        pass
    found = []
    for line in lines.splitlines():
        try:
            found.append(_decoder.decode(line))
        except msgspec.MsgspecError as error:
            log.error("journal_damaged", error=str(error), bytes=len(line))
    return found


class Journal:
    """A journal that is written. Raises OSError where the file system does.

    Args:
        store: The path of the store's file.
        worker: Whose it is.
    """

    def __init__(self, store: str, worker: str) -> None:
        self._stem = f"{store}-exchanges-{worker}"
        self._number = 0
        self.path = ""
        self._fd = -1
        self.size = 0
        """Bytes, so far."""
        self._open()

    def __repr__(self) -> str:
        return f"<Journal {self.path}, {self.size} bytes>"

    def _open(self) -> None:
        os.makedirs(os.path.dirname(self._stem), mode=0o700, exist_ok=True)
        while True:
            path = f"{self._stem}.{self._number}"
            self._number += 1
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
            if _lock(fd, path):  # else somebody has taken it for an orphan, before it was locked
                break
            os.close(fd)
        self.path, self._fd, self.size = path, fd, 0

    def write(self, record: bytes) -> None:
        """Adds a line, which is a record (`ExchangeRecord.encode`): the whole of it, or nothing."""
        line = record + b"\n"
        written = os.write(self._fd, line)
        if written < len(line):  # the disk is full, but for some bytes
            os.ftruncate(self._fd, self.size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
        self.size += written

    def slices(self) -> Iterator[list[ExchangeRecord]]:
        """Its records, in order, some at a time."""
        return _slices(self._fd)

    def turn(self, live: Iterable[ExchangeRecord]) -> None:
        """Goes on in the next file, which begins with what has begun and not ended. What has is forgotten."""
        old_path, old_fd, old_size = self.path, self._fd, self.size
        self._open()
        try:
            for record in live:
                self.write(record.encode())
        except OSError:  # the old one is whole: it goes on
            os.unlink(self.path)
            os.close(self._fd)
            self.path, self._fd, self.size = old_path, old_fd, old_size
            raise
        os.unlink(old_path)
        os.close(old_fd)

    def close(self, *, remove: bool) -> None:
        """Closes the file. One that is not removed is the next process's to bring in."""
        if remove:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        os.close(self._fd)


class Orphan:
    """The journal of a process that has ended, locked by this one."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd

    def slices(self) -> Iterator[list[ExchangeRecord]]:
        """Its records, in order, some at a time."""
        return _slices(self._fd)

    def remove(self) -> None:
        """Removes the file: what is in it has been kept."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def _slices(fd: int) -> Iterator[list[ExchangeRecord]]:
    """A last line that was not written to its end is left out."""
    rest = b""
    offset = 0
    while data := os.pread(fd, SLICE_BYTES, offset):
        offset += len(data)
        lines, _, rest = (rest + data).rpartition(b"\n")
        if lines:
            yield records_of(lines)


@contextlib.contextmanager
def take_orphans(store: str) -> Iterator[list[Orphan]]:
    """Finds the journals beside a store whose processes have ended. Nobody else takes them inside of the block."""
    with contextlib.ExitStack() as stack:
        found = []
        for path in sorted(glob.glob(f"{glob.escape(store)}-exchanges-*")):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # its process has just removed it
            stack.callback(os.close, fd)
            if _lock(fd, path):
                found.append(Orphan(path, fd))
        yield found


def _lock(fd: int, path: str) -> bool:
    """Locks a file, unless somebody else has, or it does not stand at its path any more."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.stat(path).st_ino == os.fstat(fd).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False
