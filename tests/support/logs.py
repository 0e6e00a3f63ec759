"""The log of a test, captured."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from trigate.logs import Level, Values, log


class Logs:
    """The log entries of a test, from `trigate.logs` and from `logging` (from ERROR on).

    Attributes:
        entries: The entries in their order, each with ``event``, ``log_level`` and its values.
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._expected: set[str] = set()

    def expect_error(self, event: str) -> None:
        """Declares that this test logs this event at ERROR. The test fails if it does not."""
        self._expected.add(event)

    def named(self, event: str) -> list[dict[str, Any]]:
        """Returns the entries of an event."""
        return [entry for entry in self.entries if entry["event"] == event]

    def check(self) -> None:
        """Compares the errors in the log with the expected ones.

        Raises:
            AssertionError: An unexpected event was logged at ERROR, or an expected one was not.
        """
        errors = [entry for entry in self.entries if entry["log_level"] == "error"]
        unexpected = [entry for entry in errors if entry["event"] not in self._expected]
        assert not unexpected, f"logged at ERROR: {unexpected}"
        missing = self._expected - {entry["event"] for entry in errors}
        assert not missing, f"expected in the log at ERROR, but not there: {sorted(missing)}"

    def take(self, level: Level, event: str, values: Values) -> None:
        """The log's sink: keeps the entry and writes nothing."""
        self.entries.append({"event": event, **values, "log_level": level})


class _Handler(logging.Handler):
    def __init__(self, logs: Logs) -> None:
        super().__init__(logging.ERROR)
        self._logs = logs

    def emit(self, record: logging.LogRecord) -> None:
        self._logs.entries.append({"event": record.getMessage(), "log_level": "error", "logger": record.name})


@contextlib.contextmanager
def capture_logs() -> Iterator[Logs]:
    """Captures the log within the block. At the end of a block that does not raise, calls `Logs.check`."""
    logs = Logs()
    handler = _Handler(logs)
    before, log.sink = log.sink, logs.take  # `trigate.logs.configure` leaves it alone
    log.set_level("debug")
    logging.getLogger().addHandler(handler)
    try:
        yield logs
        logs.check()
    finally:
        logging.getLogger().removeHandler(handler)
        log.sink = before
