"""A circuit breaker: decides when a target gets no calls for a while. Pure: time is an argument.

While the breaker is *closed*, calls pass and are counted. After ``failures`` in a row, or when the share of failures
within the window reaches ``failure_rate`` (of at least ``min_calls`` calls), it *opens*: no call passes until the
cool-down is over. Then it is *half open*: one call passes as a probe. If the probe succeeds, the breaker closes; if it
fails, the breaker opens for twice as long, up to `MAX_COOLDOWN_S`. If a provider says when to retry (``Retry-After``),
the breaker opens at once, for that time. Calls that entered before the breaker opened do not decide about the probe.
"""

from __future__ import annotations

import math
from typing import Literal

from trigate.config.sections import BreakerConfig

MAX_COOLDOWN_S = 60.0

State = Literal["closed", "open", "half_open"]
Entry = Literal["call", "probe"]
"""How a call has entered; it is passed back when the call ends."""
Change = Literal["opened", "closed"]
"""What the end of a call has changed."""


class Breaker:
    """The breaker of one target at one endpoint."""

    __slots__ = ("_bad", "_cooldown_s", "_good", "_in_a_row", "_open_until", "_probing", "_since", "rules")

    def __init__(self, rules: BreakerConfig) -> None:
        self.rules = rules
        self._in_a_row = 0
        self._good = self._bad = 0
        self._since = -math.inf  # the start of the window
        self._open_until: float | None = None  # None = closed
        self._cooldown_s: float = rules.cooldown_s
        self._probing = False

    def __repr__(self) -> str:
        return f"<Breaker {'closed' if self._open_until is None else f'open until {self._open_until:.3f}'}>"

    def state(self, now: float) -> State:
        """The state at this time."""
        if self._open_until is None:
            return "closed"
        return "half_open" if self._open_until <= now else "open"

    def opens_in_s(self, now: float) -> float:
        """Seconds until a call may pass; 0.0 = now, or as soon as the probe has ended."""
        return max(0.0, self._open_until - now) if self._open_until is not None else 0.0

    def enter(self, now: float) -> Entry | None:
        """Lets a call pass, or returns None. A call that passes must end with exactly one of `succeed`, `fail` or
        `abandon`: a probe blocks the breaker until then."""
        if self._open_until is None:
            return "call"
        if self._open_until > now or self._probing:
            return None
        self._probing = True
        return "probe"

    def succeed(self, now: float, entry: Entry) -> Change | None:
        """Records the success of a call that entered; returns whether it has closed the breaker."""
        self._leave(entry)
        self._in_a_row = 0
        change: Change | None = None
        if self._open_until is not None:
            if entry != "probe" or self._open_until > now:  # meanwhile another call got a Retry-After
                return None
            self._open_until = None
            self._cooldown_s = self.rules.cooldown_s
            self._good = self._bad = 0
            change = "closed"
        self._roll(now)
        self._good += 1
        return change

    def fail(self, now: float, entry: Entry, *, retry_after_s: float | None = None) -> Change | None:
        """Records a failure of the target in a call that entered; returns whether it has opened the breaker, for the
        first time or again after a probe.

        Args:
            retry_after_s: Seconds after which the provider allows a retry; None = unknown.
        """
        rules = self.rules
        self._leave(entry)
        self._roll(now)
        self._in_a_row += 1
        self._bad += 1
        was_open = self._open_until is not None and self._open_until > now
        if retry_after_s:
            self._open(now, max(now + retry_after_s, self._open_until or now))
        elif self._open_until is not None:
            if entry == "probe" and self._open_until <= now:
                self._cooldown_s = min(2 * self._cooldown_s, max(MAX_COOLDOWN_S, rules.cooldown_s))
                self._open(now, now + self._cooldown_s)
        elif (rules.failures and self._in_a_row >= rules.failures) or self._fails_often():
            self._open(now, now + self._cooldown_s)
        is_open = self._open_until is not None and self._open_until > now
        return "opened" if is_open and not was_open else None

    def abandon(self, entry: Entry) -> None:
        """Records the end of a call that says nothing about the target (client disconnected, other attempt won)."""
        self._leave(entry)

    def _leave(self, entry: Entry) -> None:
        if entry == "probe":
            self._probing = False

    def _open(self, now: float, until: float) -> None:
        self._open_until = until
        self._since = now
        self._good = self._bad = 0

    def _fails_often(self) -> bool:
        rules, calls = self.rules, self._good + self._bad
        return rules.failure_rate > 0 and calls >= rules.min_calls and self._bad >= rules.failure_rate * calls

    def _roll(self, now: float) -> None:
        """Begins the next window if it is due. The last one counts half, so that the rate does not drop to 0."""
        if now - self._since >= self.rules.window_s:
            recent = now - self._since < 2 * self.rules.window_s
            self._good = self._good // 2 if recent else 0
            self._bad = self._bad // 2 if recent else 0
            self._since = now
