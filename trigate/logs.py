"""Logging: one line per event, to standard error.

A module writes ``log.info("upstream_down", upstream=name)``: the event, and its values by name. Lines are readable by
people on a terminal, and JSON anywhere else (``TRIGATE_LOG_FORMAT``); ``TRIGATE_LOG_LEVEL`` is debug, info, warning or
error. A traceback is logged without the values of local variables: they hold messages and keys.

**Never waits:** a log that nobody reads must not hold up a stream. What a pipe does not take at once waits in memory,
up to `MAX_WAITING_BYTES`, for a thread that writes it when it can (`Output`). Further lines are dropped and counted.

This is not structlog, which imports asyncio, and rich where it is installed: 6 MiB in each process and a tenth of a
second of its start.
"""

from __future__ import annotations

import json
import os
import select
import stat
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, Literal, TextIO, TypeAlias

Level: TypeAlias = Literal["debug", "info", "warning", "error"]
Values: TypeAlias = dict[str, object]
Sink: TypeAlias = Callable[[Level, str, Values], None]
"""Takes an entry: its level, its event and its values, which it may change."""

_LEVELS: Final[dict[str, int]] = {"debug": 0, "info": 1, "warning": 2, "error": 3}
MAX_WAITING_BYTES: Final = 1024 * 1024
"""How much of the log waits for a pipe that is full."""
_COLORS: Final[dict[Level, str]] = {"debug": "2", "info": "32", "warning": "33", "error": "31;1"}


class Log:
    """The log of the process: `log` is the only one.

    Attributes:
        sink: Takes the entries; None = nobody, until `configure` is called.
    """

    __slots__ = ("_level", "_usual_level", "sink")

    def __init__(self) -> None:
        self._level = self._usual_level = 0
        self.sink: Sink | None = None

    def set_level(self, level: Level) -> None:
        """Sets the lowest level that is logged, unless another one is asked for (`override_level`)."""
        self._level = self._usual_level = _LEVELS[level]

    def override_level(self, level: Level | None) -> None:
        """Sets the lowest level that is logged from now on; None = that of `set_level`."""
        self._level = self._usual_level if level is None else _LEVELS[level]

    def debug(self, event: str, /, **values: object) -> None:
        """Logs what helps to find a fault."""
        if self._level == 0 and self.sink is not None:
            self.sink("debug", event, values)

    def info(self, event: str, /, **values: object) -> None:
        """Logs what happens as it should."""
        if self._level <= 1 and self.sink is not None:
            self.sink("info", event, values)

    def warning(self, event: str, /, **values: object) -> None:
        """Logs what somebody should look at."""
        if self._level <= 2 and self.sink is not None:
            self.sink("warning", event, values)

    def error(self, event: str, /, *, exc_info: BaseException | None = None, **values: object) -> None:
        """Logs a failure of the gateway, with the traceback of ``exc_info``."""
        if self.sink is None:
            return
        if exc_info is not None:
            values["exception"] = "".join(traceback.format_exception(exc_info)).rstrip("\n")
        self.sink("error", event, values)

    def exception(self, event: str, /, **values: object) -> None:
        """Logs a failure of the gateway, with the traceback of the exception that is handled now."""
        self.error(event, exc_info=sys.exception(), **values)


log: Final = Log()


def configure(env: Mapping[str, str]) -> None:
    """Sends the log to standard error, as the environment says, unless it has a sink already: a test's, or that of the
    application around the gateway."""
    if log.sink is not None:
        return
    level = env.get("TRIGATE_LOG_LEVEL", "").lower()
    log.set_level(level if level in _LEVELS else "info")  # type: ignore[arg-type] # its keys are the levels
    stream = sys.stderr
    if stream is None:  # it was closed before the process began
        log.sink = lambda level, event, values: None
        return
    is_terminal = stream.isatty()
    is_json = env.get("TRIGATE_LOG_FORMAT", "").lower() == "json" or (
        not is_terminal and env.get("TRIGATE_LOG_FORMAT", "").lower() != "text"
    )
    render = _JsonLine() if is_json else _Line(colors=is_terminal)
    write_line = _line_writer(stream)

    def write(level: Level, event: str, values: Values) -> None:
        write_line(render(level, event, values) + "\n")

    log.sink = write


def _line_writer(stream: TextIO) -> Callable[[str], None]:
    """Returns what writes a line to a stream, and never raises: without waiting, if there is a file behind it."""
    try:
        output = Output(stream.fileno())
    except (OSError, ValueError):  # it stands for something else than a file
        output = None

    def write(line: str) -> None:
        try:
            if output is not None:
                output.write(line.encode(errors="backslashreplace"))
            else:
                stream.write(line)
                stream.flush()
        except (OSError, ValueError):  # nobody reads it any more, the disk is full, or it is closed
            pass

    return write


class Output:
    """Writes lines to a file descriptor, without waiting.

    A pipe gets a description of its own that does not wait, where the system can do that (Linux). To set that for the
    one at hand would also set it for other processes. Elsewhere, and for terminals, the descriptor is asked whether it
    takes anything, and then gets no more than a pipe takes at least.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._may_wait = not stat.S_ISREG(os.fstat(fd).st_mode)
        self._piece_bytes = select.PIPE_BUF if self._may_wait else sys.maxsize
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            try:
                self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:  # another system, another user's pipe, or nobody reads it
                pass
            else:
                self._may_wait, self._piece_bytes = False, sys.maxsize
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = self._dropped = 0

    def write(self, line: bytes) -> None:
        """Writes a line, or keeps it, or drops it.

        Raises:
            OSError: It cannot be written at all.
        """
        with self._lock:
            if self._waiting:
                self._keep(line)
            elif rest := self._write_now(line):
                self._keep(rest)
                threading.Thread(target=self._write_waiting, name="log", daemon=True).start()

    def _keep(self, line: bytes) -> None:
        if self._waiting_bytes + len(line) > MAX_WAITING_BYTES:
            self._dropped += 1
        else:
            self._waiting.append(line)
            self._waiting_bytes += len(line)

    def _write_now(self, line: bytes) -> bytes:
        """Writes as much of a line as is taken at once; returns the rest."""
        while line and (not self._may_wait or self._is_writable(0.0)):
            try:
                line = line[os.write(self._fd, line[: self._piece_bytes]) :]
            except BlockingIOError:
                break
        return line

    def _is_writable(self, timeout_s: float | None) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))

    def _write_waiting(self) -> None:
        """Writes what waits, in a thread, as it is taken."""
        dropped: int | None = None
        try:
            while dropped is None and self._is_writable(None):
                dropped = self._write_some()
        except OSError:  # nobody reads it any more
            with self._lock:
                self._waiting.clear()
                self._waiting_bytes = self._dropped = 0
        if dropped:
            log.warning("log_lines_dropped", count=dropped)

    def _write_some(self) -> int | None:
        """Writes as much of what waits as is taken at once. Once nothing waits, returns how many lines were dropped."""
        with self._lock:
            while self._waiting:
                line = self._waiting[0]
                rest = self._write_now(line)
                self._waiting_bytes -= len(line) - len(rest)
                if rest:
                    self._waiting[0] = rest
                    return None
                self._waiting.popleft()
            dropped, self._dropped = self._dropped, 0
            return dropped


class _Clock:
    """Writes the time as ISO 8601, in UTC. The seconds are formatted once per second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = ""

    def now(self) -> str:
        """The current time."""
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._text}.{int((now - second) * 1e6):06d}Z"


class _JsonLine:
    """Renders an entry as a JSON object on one line."""

    def __init__(self) -> None:
        self._clock = _Clock()
        # ASCII, since some tools take U+2028 for a line end
        self._encode = json.JSONEncoder(default=repr).encode

    def __call__(self, level: Level, event: str, values: Values) -> str:
        values["event"] = event
        values["level"] = level
        values["timestamp"] = self._clock.now()
        return self._encode(values)


class _Line:
    """Renders an entry for people: time, level, event, and its values in the order in which they were given."""

    def __init__(self, *, colors: bool) -> None:
        self._clock = _Clock()
        self._levels = {
            level: f"\x1b[{code}m[{level:<9}]\x1b[0m" if colors else f"[{level:<9}]" for level, code in _COLORS.items()
        }

    def __call__(self, level: Level, event: str, values: Values) -> str:
        exception = values.pop("exception", None)
        words = "".join([f" {key}={_text(value)}" for key, value in values.items()])
        line = f"{self._clock.now()} {self._levels[level]} {event if event.isprintable() else repr(event)}{words}"
        return line if exception is None else f"{line}\n{_indented(str(exception))}"


def _indented(exception: str) -> str:
    """A traceback, each line of it indented: its message may quote a client, and must look like no line of the log.

    >>> print(_indented("ValueError: a\\n2026-11-30 [info] forged\\x1b[2J"))
      ValueError: a
      2026-11-30 [info] forged\\x1b[2J
    """
    return "\n".join([f"  {line if line.isprintable() else repr(line)[1:-1]}" for line in exception.split("\n")])


def _text(value: object) -> str:
    """A value as part of a line. Line ends and terminal control characters are escaped: clients choose the paths.

    >>> _text("qwen/qwen-turbo"), _text("two words"), _text("a\\x1b[2J"), _text(None), _text(0.25)
    ('qwen/qwen-turbo', "'two words'", "'a\\\\x1b[2J'", 'None', '0.25')
    """
    if type(value) is str and value.isprintable() and " " not in value and value:
        return value
    return repr(value)


def message_of(error: BaseException) -> str:
    """The message of any exception; for a group, that of its first leaf; for an empty message, the name of the class.

    >>> message_of(ExceptionGroup("x", [ExceptionGroup("y", [ValueError("this")])])), message_of(KeyError())
    ('this', 'KeyError')
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
