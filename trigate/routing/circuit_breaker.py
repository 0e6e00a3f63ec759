"""A circuit breaker: when a target gets no calls for a while. Pure: the time is an argument.

*Closed*, calls go through and are counted. After ``failures`` in a row, or where the share of failures within the
window reaches ``failure_rate`` (and there were ``min_calls``), it *opens*: no calls, until the cool-down is over. Then
it is *half open*: one call probes; its success closes the breaker, its failure opens it for twice as long, up to
`MAX_COOLDOWN_S`. A provider that says when to come back (``Retry-After``) is taken at its word: it opens at once, and
for that long. How the calls end that entered before it opened says nothing of the probe, and nothing of now.
"""

from __future__ import annotations

import math
from typing import Literal

from trigate.config.sections import BreakerConfig

MAX_COOLDOWN_S = 60.0

State = Literal["closed", "open", "half_open"]
Entry = Literal["call", "probe"]
"""As what a call has entered; it says so when it ends."""


class Breaker:
    """The breaker of one target."""

    __slots__ = ("_bad", "_cooldown_s", "_good", "_in_a_row", "_open_until", "_probing", "_since", "rules")

    def __init__(self, rules: BreakerConfig) -> None:
        self.rules = rules
        self._in_a_row = 0
        self._good = self._bad = 0
        self._since = -math.inf  # when the window began
        self._open_until: float | None = None  # None = closed
        self._cooldown_s: float = rules.cooldown_s
        self._probing = False

    def __repr__(self) -> str:
        return f"<Breaker {'closed' if self._open_until is None else f'open until {self._open_until:.3f}'}>"

    def state(self, now: float) -> State:
        """What it is now."""
        if self._open_until is None:
            return "closed"
        return "half_open" if self._open_until <= now else "open"

    def opens_in_s(self, now: float) -> float:
        """In how many seconds it lets a call through; 0.0 = now, or as soon as its probe has ended."""
        return max(0.0, self._open_until - now) if self._open_until is not None else 0.0

    def enter(self, now: float) -> Entry | None:
        """Says whether a call may go through; None = it may not. One that does has to end with exactly one of
        `succeed`, `fail` or `abandon`: a probe holds the breaker until then."""
        if self._open_until is None:
            return "call"
        if self._open_until > now or self._probing:
            return None
        self._probing = True
        return "probe"

    def succeed(self, now: float, entry: Entry) -> None:
        """A call that entered went well."""
        self._leave(entry)
        self._in_a_row = 0
        if self._open_until is not None:
            if entry != "probe" or self._open_until > now:  # the provider has said meanwhile when to come back
                return
            self._open_until = None
            self._cooldown_s = self.rules.cooldown_s
            self._good = self._bad = 0
        self._roll(now)
        self._good += 1

    def fail(self, now: float, entry: Entry, *, retry_after_s: float | None = None) -> None:
        """A call that entered failed by the target's fault; it said perhaps when to come back."""
        rules = self.rules
        self._leave(entry)
        self._roll(now)
        self._in_a_row += 1
        self._bad += 1
        if retry_after_s:
            self._open(now, max(now + retry_after_s, self._open_until or now))
        elif self._open_until is not None:
            if entry == "probe" and self._open_until <= now:
                self._cooldown_s = min(2 * self._cooldown_s, max(MAX_COOLDOWN_S, rules.cooldown_s))
                self._open(now, now + self._cooldown_s)
        elif (rules.failures and self._in_a_row >= rules.failures) or self._fails_often():
            self._open(now, now + self._cooldown_s)

    def abandon(self, entry: Entry) -> None:
        """A call that entered ended without a verdict: its client left, another attempt won."""
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
        """Begins the next window; the last one counts half, so that a rate is not forgotten at one stroke."""
        if now - self._since >= self.rules.window_s:
            recent = now - self._since < 2 * self.rules.window_s
            self._good = self._good // 2 if recent else 0
            self._bad = self._bad // 2 if recent else 0
            self._since = now
