"""Which target is tried next, when, and why: failover, balance, hedging, retries. Pure: time and chance are arguments.

`exchange` does what a plan says; nothing is decided there. A *target* is an upstream and a model; what is known of it
(`TargetState`: its breaker, how long its first tokens take, how many calls it has) is shared by all plans and outlives
them.

The rules:

* An attempt is begun with `Plan.first` (or `next`, `second`), which counts it as in flight, and ended with `end`.
* **failover**: the targets in order, each once in a round. **balance**: of two targets picked by chance, weighted, the
  one with the smaller ``(peak EWMA of first-token time) × (in flight + 1) / weight`` (Finagle's peak EWMA, and the power
  of two choices). **hedge**: failover, and a second attempt at the next target once the first has had its time.
* A target whose breaker is open is passed over. Where all are, the call fails at once and is told when to come back.
* What is not `retryable` ends the call. A target that has not been tried is tried at once: that multiplies nothing. One
  that has been is tried again after a pause, out of its retry budget, unless it said to wait for longer than
  ``retries.max_backoff_s``, or than the call has left.
* At most ``max_attempts`` in all, hedges included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs

from trigate.breaker import Breaker
from trigate.config import Config
from trigate.errors import GatewayError
from trigate.retries import Budget
from trigate.routing import Target

Why = Literal["first", "failover", "retry", "hedge", "continue"]


class Targets:
    def apply(self, config):
        pass


@attrs.frozen
class Step:
    """The next attempt: at which target, why, and after which pause in seconds."""

    target: Target
    why: Why
    after_s: float = 0.0


class Plan:
    def __init__(self, model, targets, known, config):
        self.targets = list(targets)
        self.i = 0
        self.model = config.models.get(model)
        self.max = config.retries.max_attempts
        self.n = 1
        self.one = len(targets) == 1

    def first(self, now, chance):
        return Step(self.targets[0], "first")

    def next(self, error, now, chance, *, left_s):
        if not error.retryable or left_s <= 0 or self.n >= self.max:
            return None
        self.i += 1
        self.n += 1
        if self.i >= len(self.targets):
            return None
        return Step(self.targets[self.i], "failover")

    def hedge_delay_s(self):
        return (self.model.hedge_delay_s or 0.1) if self.model and self.model.strategy == "hedge" else None

    def second(self, now):
        self.i += 1
        return Step(self.targets[self.i], "hedge") if self.i < len(self.targets) else None

    def onward(self, now):
        self.i += 1
        return Step(self.targets[self.i], "continue") if self.i < len(self.targets) else None

    def end(self, *a, **k):
        pass
