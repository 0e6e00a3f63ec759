"""A circuit breaker: when a target gets no calls for a while. Pure: the time is an argument.

*Closed*, calls go through and are counted. After ``failures`` in a row, or where the share of failures within the
window reaches ``failure_rate`` (and there were ``min_calls``), it *opens*: no calls, until the cool-down is over. Then
it is *half open*: one call probes; its success closes the breaker, its failure opens it for twice as long, up to
`MAX_COOLDOWN_S`. A provider that says when to come back (``Retry-After``) is taken at its word: it opens at once, and
for that long.
"""

from __future__ import annotations

from typing import Literal

from trigate.config import BreakerConfig

MAX_COOLDOWN_S = 60.0

State = Literal["closed", "open", "half_open"]


class Breaker:
    """The breaker of one target."""

    def __init__(self, rules: BreakerConfig) -> None:
        raise NotImplementedError

    def state(self, now: float) -> State:
        """What it is now."""
        raise NotImplementedError

    def opens_in_s(self, now: float) -> float:
        """In how many seconds it lets a call through; 0.0 = now."""
        raise NotImplementedError

    def enter(self, now: float) -> bool:
        """Says whether a call may go through. One that does has to end with exactly one of `succeed`, `fail` or
        `abandon`: a probe holds the breaker until then."""
        raise NotImplementedError

    def succeed(self, now: float) -> None:
        """A call that entered went well."""
        raise NotImplementedError

    def fail(self, now: float, *, retry_after_s: float | None = None) -> None:
        """A call that entered failed by the target's fault; it said perhaps when to come back."""
        raise NotImplementedError

    def abandon(self, now: float) -> None:
        """A call that entered ended without a verdict: its client left, another attempt won."""
        raise NotImplementedError
