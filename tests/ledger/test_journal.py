"""Journals: what a process has begun and settled, and what the next process reads of it."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.support.shortage import ERRORS, os_error
from trigate.ledger import journal
from trigate.ledger.journal import Journal, Orphan, journals, records_of, take_orphan
from trigate.store.records import ExchangeRecord


def begun(number: int, **changes: Any) -> ExchangeRecord:
    """An exchange that has begun."""
    values: dict[str, Any] = {
        "id": f"ex_{number}",
        "request_id": "r",
        "owner": "",
        "worker": "w",
        "endpoint": "/chat/completions",
        "model": "m\n\u2028",
        "stream": True,
        "started_at": 1.0,
    }
    return ExchangeRecord(**values | changes)


@pytest.fixture
def store(tmp_path: Path) -> str:
    """The path of a store in a directory that does not exist, with a name that contains glob characters."""
    return str(tmp_path / "new" / "a[b]*.db")


def files(store: str) -> list[str]:
    """The journals beside a store."""
    return sorted(path.name for path in Path(store).parent.glob("*-exchanges-*"))


def read(written: Journal | Orphan) -> list[str]:
    """The ids in a journal, in order."""
    return [record.id for records in written.slices() for record in records]


def orphans(store: str) -> list[list[str]]:
    """The ids in each journal of an exited process; removes these journals."""
    found = []
    for path in journals(store):
        with take_orphan(path) as orphan:
            if orphan is not None:
                found.append(read(orphan))
                orphan.remove()
    return found


def test_lines_come_back(store: str) -> None:
    """Records are read in order, in slices of whole lines, also a line that is longer than a slice."""
    written = Journal(store, "w")
    for number in range(2000):
        written.write(begun(number).encode())
    written.write(begun(2000, model="x" * 3 * journal.SLICE_BYTES).encode())
    assert read(written) == [f"ex_{number}" for number in range(2001)]
    assert next(written.slices())[7] == begun(7)
    written.close(remove=True)
    assert files(store) == []


def test_a_journal_that_is_not_removed_is_an_orphan(store: str) -> None:
    """A journal that is closed without being removed is an orphan for the next process."""
    written = Journal(store, "w")
    written.write(begun(1).encode())
    assert os.stat(written.path).st_mode & 0o077 == 0
    assert orphans(store) == []  # its process lives
    written.close(remove=False)
    with take_orphan(written.path) as first, take_orphan(written.path) as second:
        assert first is not None
        assert second is None  # another process has it
    assert orphans(store) == [["ex_1"]]
    assert files(store) == []


def test_rotation_keeps_live_exchanges(store: str) -> None:
    """The new file begins with the live exchanges, and the old one is removed."""
    written = Journal(store, "w")
    written.write(begun(1).encode())
    written.write(begun(2).encode())
    written.rotate([begun(2)])
    assert files(store) == ["a[b]*.db-exchanges-w.1"]
    written.write(begun(3).encode())
    assert read(written) == ["ex_2", "ex_3"]
    written.close(remove=True)


def test_a_rotation_that_fails(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the new file cannot be written, the journal goes on in the old one."""
    written = Journal(store, "w")
    written.write(begun(1).encode())

    def full(line: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(written, "write", full)
    with pytest.raises(OSError, match="No space"):
        written.rotate([begun(1)])
    monkeypatch.undo()
    assert files(store) == ["a[b]*.db-exchanges-w.0"]
    written.write(begun(2).encode())
    assert read(written) == ["ex_1", "ex_2"]
    written.close(remove=True)


def test_a_line_that_does_not_fit(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is written in part is removed; the next line begins at its start."""
    written = Journal(store, "w")
    written.write(begun(1).encode())
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
        with pytest.raises(OSError, match="No space"):
            written.write(begun(2).encode())
    written.write(begun(3).encode())
    assert read(written) == ["ex_1", "ex_3"]
    written.close(remove=True)


def test_damage_is_left_out(logs: Any) -> None:
    """A line that cannot be decoded is skipped; the lines around it are read."""
    logs.expect_error("journal_damaged")
    lines = begun(1).encode() + b"\n\0\0\0 nonsense\n" + begun(2).encode() + b"\n"
    assert [each.id for each in records_of(lines)] == ["ex_1", "ex_2"]
    [entry] = logs.named("journal_damaged")
    assert (entry["lines"], entry["bytes"]) == (1, 12)


@pytest.mark.parametrize("byte", [b"\xff", b"\0", b"[", b'"'])
def test_a_line_without_an_end(store: str, byte: bytes, logs: Any) -> None:
    """A file that is not a journal is read within bounded memory, and what is behind it is found."""
    logs.expect_error("journal_damaged")
    written = Journal(store, "w")
    written.write(begun(1).encode())
    os.write(written._fd, byte * 3 * journal.MAX_LINE_BYTES + b"\n")
    written.write(begun(2).encode())
    assert read(written) == ["ex_1", "ex_2"]
    assert len(logs.named("journal_damaged")) < 6
    written.close(remove=True)


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("call", ["os.open", "os.write", "os.fstat", "os.makedirs", "fcntl.flock"])
def test_a_journal_that_cannot_be_opened(store: str, call: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every error of the system is an `OSError` of the journal, and leaves no descriptor open."""
    before = os.listdir("/proc/self/fd") if sys.platform == "linux" else []

    def fail(*_: object, **__: object) -> None:
        raise os_error(name)

    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        with pytest.raises(OSError, match=re.escape(str(os_error(name).strerror))):
            Journal(store, "w").write(begun(1).encode())
    if sys.platform == "linux" and call != "os.write":
        assert os.listdir("/proc/self/fd") == before
    written = Journal(store, "v")
    written.write(begun(2).encode())
    assert read(written) == ["ex_2"]
    written.close(remove=True)


@pytest.mark.parametrize("call", ["os.unlink", "os.close"])
def test_a_journal_that_cannot_be_removed(store: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation continues in the new file, and a close never fails."""
    written = Journal(store, "w")

    def fail(*_: object, **__: object) -> None:
        raise os_error("EROFS")

    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        written.rotate([begun(1)])
        written.write(begun(2).encode())
        assert read(written) == ["ex_1", "ex_2"]
        written.close(remove=True)


def _write_for_ever(store: str, reports: Connection) -> None:
    written = Journal(store, "dead")
    number = 0
    while True:
        number += 1
        written.write(begun(number).encode())
        reports.send_bytes(b"%d" % number)


@pytest.mark.slow
def test_what_a_killed_process_has_written_is_found(store: str) -> None:
    """Every line that the killed process has reported is read, and at most one line more."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_write_for_ever, args=(store, sender))
    process.start()
    sender.close()
    last = b"0"
    while int(last) < 500:
        last = receiver.recv_bytes()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while True:
        try:
            last = receiver.recv_bytes()
        except EOFError:
            break
    [found] = orphans(store)
    assert found == [f"ex_{number}" for number in range(1, len(found) + 1)]
    assert len(found) - int(last) in (0, 1)
