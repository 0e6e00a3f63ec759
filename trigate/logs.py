"""Logging: one line per event, to standard error.

A module writes ``log.info("upstream_down", upstream=name)``: the event, and its values by name. Lines are readable by
people by default; JSON with ``TRIGATE_LOG_FORMAT=json``; ``TRIGATE_LOG_LEVEL`` is debug, info, warning or error. A
traceback is logged without the values of local variables: they hold messages and keys.

This is not structlog, which imports asyncio, and rich where it is installed: 6 MiB in each process and a tenth of a
second of its start.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Final, Literal, TypeAlias

Level: TypeAlias = Literal["debug", "info", "warning", "error"]
Values: TypeAlias = dict[str, object]
Sink: TypeAlias = Callable[[Level, str, Values], None]
"""Takes an entry: its level, its event and its values, which it may change."""

_LEVELS: Final[dict[str, int]] = {"debug": 0, "info": 1, "warning": 2, "error": 3}
_COLORS: Final[dict[Level, str]] = {"debug": "2", "info": "32", "warning": "33", "error": "31;1"}


class Log:
    """The log of the process: `log` is the only one.

    Attributes:
        sink: Takes the entries; None = nobody, until `configure` is called.
    """

    __slots__ = ("_level", "sink")

    def __init__(self) -> None:
        self._level = 0
        self.sink: Sink | None = None

    def set_level(self, level: Level) -> None:
        """Sets the lowest level that is logged."""
        self._level = _LEVELS[level]

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
    render = _JsonLine() if env.get("TRIGATE_LOG_FORMAT") == "json" else _Line(colors=stream.isatty())

    def write(level: Level, event: str, values: Values) -> None:
        try:
            stream.write(render(level, event, values) + "\n")
            stream.flush()
        except (OSError, ValueError):  # nobody reads it any more, the disk is full, or it is closed
            pass

    log.sink = write


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
        return line if exception is None else f"{line}\n{exception}"


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
