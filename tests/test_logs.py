"""The log: its formats, its levels, and what never stands in it. Its configuration is global: a process each."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.processes import environment
from tests.support.shortage import ERRORS, os_error
from trigate import logs
from trigate.logs import log, message_of

SECRET = "sk-not-for-the-log"  # handed over as an argument: a traceback quotes lines of source

START = """
import os, sys
from trigate import logs
from trigate.logs import log
logs.configure(os.environ)
"""
CRASH = """
def crash(secret):
    messages = [secret, 1]
    raise ValueError("it broke")
try:
    crash(sys.argv[1])
except ValueError:
    log.exception("crashed", request_id="r1")
"""
LEVELS = "for level in ('debug', 'info', 'warning', 'error'):\n    getattr(log, level)(level + '_said')\n"


def _logged(script: str, **env: str) -> str:
    """Runs a script after the log's configuration; returns its standard error."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-c", START + script, SECRET],
        env={**environment(), **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return done.stderr


@pytest.mark.slow
def test_json_is_an_object_a_line() -> None:
    """Whatever is logged: line breaks, text beyond ASCII, values that JSON does not know, a traceback."""
    script = "log.info('one', text='a\\nb\\u2028\\x1b[31mä', value=object())\nlog.warning('two')\n" + CRASH
    entries = [json.loads(line) for line in _logged(script, TRIGATE_LOG_FORMAT="json").splitlines()]
    assert [(entry["event"], entry["level"]) for entry in entries] == [
        ("one", "info"),
        ("two", "warning"),
        ("crashed", "error"),
    ]
    assert entries[0]["text"] == "a\nb\u2028\x1b[31mä"
    assert entries[2]["request_id"] == "r1"
    assert entries[2]["exception"].startswith("Traceback")
    for entry in entries:
        assert entry["timestamp"].endswith("Z")


@pytest.mark.slow
def test_for_people_an_event_is_a_line() -> None:
    """A value with line breaks cannot begin one, and without a terminal there are no colors."""
    first, second = _logged("log.info('one', text='a\\n2 [error] forged')\nlog.info('two', n=2)\n").splitlines()
    assert "one" in first
    assert "forged" in first
    assert "n=2" in second
    assert "\x1b" not in first + second


@pytest.mark.slow
def test_a_value_for_people_cannot_steer_the_terminal() -> None:
    """A path is what the client says: its escape sequences are not passed on."""
    assert "\x1b" not in _logged("log.info('refused', path='/\\x1b[2J\\x1b]0;owned\\x07')\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("level", "first"),
    [("debug", 0), ("info", 1), ("WARNING", 2), ("error", 3), ("nonsense", 1), ("", 1)],
)
def test_the_level_filters(level: str, first: int) -> None:
    """What is below it is not written; case does not matter, and a name that is none means info."""
    lines = _logged(LEVELS, TRIGATE_LOG_LEVEL=level, TRIGATE_LOG_FORMAT="json").splitlines()
    said = ["debug_said", "info_said", "warning_said", "error_said"]
    assert [json.loads(line)["event"] for line in lines] == said[first:]


@pytest.mark.slow
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_traceback_holds_no_values(log_format: str) -> None:
    """It says what broke, and where; not what the local variables were, for those hold messages and keys."""
    written = _logged(CRASH, TRIGATE_LOG_FORMAT=log_format)
    assert "ValueError: it broke" in written
    assert "in crash" in written
    assert SECRET not in written


def test_a_sink_stays() -> None:
    """An application around the gateway may take the log; these tests do."""
    before = log.sink
    logs.configure({"TRIGATE_LOG_FORMAT": "json", "TRIGATE_LOG_LEVEL": "error"})
    assert before is not None
    assert log.sink == before


@pytest.mark.slow
@pytest.mark.parametrize("closing", ["os.close(2)", "sys.stderr.close()", "os.dup2(os.open('/dev/full', 1), 2)"])
def test_a_log_whose_file_is_closed(closing: str) -> None:
    """It fails no call; to a pipe, the log has a descriptor of its own."""
    assert "one" in _logged(f"{closing}\nlog.info('one')\nos._exit(0)\n")


@pytest.mark.slow
def test_a_full_disk() -> None:
    """It fails no call."""
    command = [sys.executable, "-c", f"{START}\nlog.info('one')\nprint('alive')\nsys.stdout.flush()\nos._exit(0)\n"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, stderr=full, check=True, timeout=30)
    assert done.stdout == b"alive\n"


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Callable[[], None]]]:
    """A small pipe that the log is written to: its end for reading, and what closes the other one."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    stream = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(log, "sink", None)
    logs.configure({"TRIGATE_LOG_FORMAT": "json"})
    yield reading, stream.close
    log.sink = None
    stream.close()
    with contextlib.suppress(OSError):
        os.close(reading)


def _lines(reading: int, until: str) -> list[dict[str, object]]:
    """Reads a pipe until an event was logged."""
    data = b""
    while f'"event": "{until}"'.encode() not in data:
        data += os.read(reading, 1 << 20)
    return [json.loads(line) for line in data.splitlines()]


def test_a_pipe_that_nobody_reads(pipe: tuple[int, Callable[[], None]]) -> None:
    """No line waits for it; what there is no room for is dropped, and counted once there is room. No line is torn."""
    reading, _ = pipe
    began_at = time.monotonic()
    for number in range(3000):
        log.info("one", number=number, text="x" * 500)
    assert time.monotonic() - began_at < 1
    lines = _lines(reading, "log_lines_dropped")
    kept = [line["number"] for line in lines if line["event"] == "one"]
    assert kept == list(range(len(kept)))
    assert lines[-1]["count"] == 3000 - len(kept) > 0
    log.info("two")
    assert _lines(reading, "two")[-1]["level"] == "info"


def test_a_pipe_that_is_closed(pipe: tuple[int, Callable[[], None]]) -> None:
    """Lines are dropped, those that wait for room as well."""
    reading, _ = pipe
    for number in range(100):
        log.info("one", number=number, text="x" * 500)
    os.close(reading)
    for _ in range(100):
        log.info("two")


def test_a_value_cannot_end_a_line() -> None:
    """Nor a traceback: what clients sent looks like no line of the log, and does not steer a terminal."""
    stream = io.StringIO()
    forged = "x\n2026-12-01T00:00:00.000000Z [info     ] exchange outcome=complete\x1b[31m\u202e\r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(log, "sink", None)
        logs.configure({"TRIGATE_LOG_FORMAT": "text"})
        log.info("one", model=forged, tried=[forged], given={forged: forged})
        try:
            raise ValueError(forged)
        except ValueError:
            log.exception("two", path=forged)
    lines = stream.getvalue().split("\n")
    assert [line for line in lines if line.startswith("20")] == lines[:2]
    assert all(line.isprintable() for line in lines)
    assert [line for line in lines[2:] if not line.startswith("  ")] == [""]


@pytest.mark.parametrize("name", ERRORS)
def test_a_line_that_the_system_refuses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system answers, no caller notices, and later lines are written."""

    class Full(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise os_error(name)
            return super().write(text)

    stream = Full()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(log, "_level", 0)
    monkeypatch.setattr(log, "sink", None)
    logs.configure({"TRIGATE_LOG_FORMAT": "text"})
    log.info("lost")
    log.error("lost", exc_info=ValueError("lost"))
    stream.full = False
    log.info("written")
    assert stream.getvalue().endswith(" written\n")
    assert stream.getvalue().count("\n") == 1


@pytest.mark.slow
def test_standard_error_closed_from_the_start() -> None:
    """Nothing is written, and nothing fails."""
    command = [sys.executable, "-c", START + "log.info('one')\nassert sys.stderr is None\nprint('alive')\n"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command],
        env=environment(),
        stdout=subprocess.PIPE,
        check=True,
        timeout=30,
    )
    assert done.stdout == b"alive\n"


def test_the_message_of_any_exception() -> None:
    """A group has the message of its first leaf; an exception without a message has the name of its class."""
    assert message_of(ExceptionGroup("x", [ExceptionGroup("y", [ValueError("this")]), KeyError("that")])) == "this"
    assert message_of(KeyError()) == "KeyError"
