"""Applies time limits: runs a check whenever a limit may be due."""

from __future__ import annotations

from collections.abc import Callable

from trigate.concurrency.timers import Timers
from trigate.errors import UpstreamTimeout
from trigate.exchange.deadlines import next_check


class Watchdog:
    """Checks the limits of one exchange or one shared call until it is stopped.

    Args:
        check: Ends whatever exceeds a limit at the given time; returns when each limit is due.
        first_at: When the first limit may be due.
        shortest_s: The shortest limit, and so the longest time between two checks: a limit that begins to count after a
            check cannot be due earlier.
    """

    __slots__ = ("_check", "_shortest_s", "_timer")

    def __init__(
        self, timers: Timers, check: Callable[[float], list[float]], *, first_at: float, shortest_s: float
    ) -> None:
        self._check = check
        self._shortest_s = shortest_s
        self._timer = timers.start(first_at, self._on_timer)

    def _on_timer(self, now: float) -> float:
        return next_check(now, self._shortest_s, self._check(now))

    def stop(self) -> None:
        """Ends the checks."""
        self._timer.stop()


def call_timed_out(allowed_s: float) -> UpstreamTimeout:
    """Makes the error for a call that exceeds its deadline."""
    return UpstreamTimeout(f"The call took longer than {allowed_s:g} s in all.", phase="total")
