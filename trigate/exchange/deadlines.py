"""Computes when time limits are due. Pure: the time is an argument.

An exchange has two groups of limits. The client's: the whole call, a client that does not read, and keep-alive comments
while nothing is sent. An attempt's: the head of the reply, its first content, silence within the answer, and the total
time. `watchdog` applies both.

**Units:** seconds; times are Trio time; infinite = no limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs

from trigate.config.sections import AttemptTimeouts, TimeoutPhase


@attrs.frozen
class Due:
    """A limit of an attempt.

    Attributes:
        at: When it is exceeded.
        what: The verb of the error message: the upstream ``what`` 5 s.
    """

    at: float
    phase: TimeoutPhase
    what: str
    limit_s: float


def attempt_limits(
    timeouts: AttemptTimeouts, *, head_due_from: float, waiting_since: float, last_byte_at: float, started_at: float
) -> Iterator[Due]:
    """Yields each limit of an attempt with the time at which it is exceeded, in the order of the checks.

    Args:
        head_due_from: Since when the head of the reply has been awaited; infinite = it is not.
        waiting_since: Since when the first content has been awaited; infinite = it is not. Until it arrives, the idle
            limit does not count.
        last_byte_at: Since when the upstream has been silent.
        started_at: When the exchange began.

    >>> timeouts = AttemptTimeouts(response_head_s=5.0, first_token_s=10.0, idle_s=2.0, total_s=60.0)
    >>> limits = attempt_limits(timeouts, head_due_from=1, waiting_since=1, last_byte_at=math.inf, started_at=0)
    >>> [limit.at for limit in limits]
    [6.0, 11.0, inf, 60.0]
    >>> limits = attempt_limits(timeouts, head_due_from=math.inf, waiting_since=math.inf, last_byte_at=3, started_at=0)
    >>> [limit.at for limit in limits]
    [inf, inf, 5.0, 60.0]
    """
    idle_since = last_byte_at if waiting_since == math.inf else math.inf
    limits: tuple[tuple[TimeoutPhase, str, float, float], ...] = (
        ("response_head", "did not begin to answer within", head_due_from, timeouts.response_head_s),
        ("first_token", "sent no content within", waiting_since, timeouts.first_token_s),
        ("idle", "fell silent for", idle_since, timeouts.idle_s),
        ("total", "took longer than", started_at, timeouts.total_s),
    )
    for phase, what, since, limit_s in limits:
        yield Due(since + limit_s, phase, what, limit_s)


class StallDetector:
    """Finds out since when a client has read nothing while a send waits for it.

    A slow client acknowledges some bytes between two checks; a stalled one acknowledges none. The first check of a send
    has nothing to compare with, so from there it allows at least half of the limit, until the second check.

    Args:
        limit_s: How long a client may read nothing.
    """

    __slots__ = ("_acknowledged_bytes", "_sending_since", "_stalled_since", "limit_s")

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._sending_since = math.inf
        self._stalled_since = math.inf
        self._acknowledged_bytes: int | None = None

    def due_at(self, now: float, *, sending_since: float | None, acknowledged_bytes: int | None) -> float:
        """When the client will have stalled for too long, as far as is known now.

        Args:
            sending_since: Since when a send has been waiting; None = none is.
            acknowledged_bytes: A number that grows when the client acknowledges bytes; None = unknown.

        >>> stall = StallDetector(10.0)
        >>> stall.due_at(4.0, sending_since=3.0, acknowledged_bytes=0)
        13.0
        >>> stall.due_at(12.0, sending_since=3.0, acknowledged_bytes=500)
        22.0
        """
        if sending_since is None:
            return math.inf
        if self._sending_since != sending_since:
            self._sending_since = self._stalled_since = sending_since
            if acknowledged_bytes is not None:
                self._stalled_since = max(sending_since, now - self.limit_s / 2)
        elif (
            acknowledged_bytes is not None
            and self._acknowledged_bytes is not None
            and acknowledged_bytes > self._acknowledged_bytes
        ):
            self._stalled_since = now
        self._acknowledged_bytes = acknowledged_bytes
        return self._stalled_since + self.limit_s


def next_check(now: float, shortest_s: float, due: list[float]) -> float:
    """When to check the limits again: when the next one is due, and no later than after the shortest limit.

    A limit that begins to count after this check cannot be exceeded before then. So each event of a stream costs one
    timestamp, and no timer is reset.

    >>> next_check(10.0, 5.0, [9.0, 12.0, math.inf]), next_check(10.0, 5.0, [60.0])
    (12.0, 15.0)
    """
    return min([now + shortest_s, *(at for at in due if at > now)])
