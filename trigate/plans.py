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


@attrs.define(eq=False, kw_only=True)
class TargetState:
    """What is known of one target.

    Attributes:
        in_flight: Attempts that have begun and not ended.
        first_token_s: The peak EWMA of the time to the first content.
    """

    breaker: Breaker
    budget: Budget
    in_flight: int = 0

    def quantile_s(self, share: float) -> float | None:
        """Within which time so many first tokens came, lately; None while too few are known."""
        raise NotImplementedError


class Targets:
    """What is known of all targets; outlives a reload. Made by `gateway`."""

    def __init__(self) -> None:
        raise NotImplementedError

    def apply(self, config: Config) -> None:
        """Takes the rules of a new configuration, and forgets targets of upstreams that are gone or have moved."""
        raise NotImplementedError

    def of(self, target: Target) -> TargetState:
        """The state of a target. Bounded: what clients make up (``upstream/anything``) does not stay for ever."""
        raise NotImplementedError

    def items(self) -> list[tuple[Target, TargetState]]:
        """All that are known, for ``/status``."""
        raise NotImplementedError


@attrs.frozen
class Step:
    """The next attempt: at which target, why, and after which pause in seconds."""

    target: Target
    why: Why
    after_s: float = 0.0


class Plan:
    """The way of one call.

    Args:
        model: The public model id; its ``[models.NAME]``, where there is one, says how.
        targets: At least one.
    """

    def __init__(self, model: str, targets: tuple[Target, ...], known: Targets, config: Config) -> None:
        raise NotImplementedError

    def first(self, now: float, chance: float) -> Step:
        """The first attempt.

        Raises:
            Unavailable: All breakers are open; its ``retry_after_s`` says for how long.
        """
        raise NotImplementedError

    def next(self, error: GatewayError, now: float, chance: float, *, left_s: float) -> Step | None:
        """The attempt after one that failed with ``error``; None = there is none, and the call fails with it.

        Args:
            left_s: Until the call's deadline.
        """
        raise NotImplementedError

    def hedge_delay_s(self) -> float | None:
        """How long the first attempt has before `second` is asked; None = there is no hedging here."""
        raise NotImplementedError

    def second(self, now: float) -> Step | None:
        """The second attempt beside the first; None where the hedge budget or the other targets do not allow it."""
        raise NotImplementedError

    def onward(self, now: float) -> Step | None:
        """The target that goes on with a stream that has broken off (``on_truncation = "continue"``): the next one in
        order that has not been tried, else one that has; None where none is left."""
        raise NotImplementedError

    def end(
        self, step: Step, now: float, *, error: GatewayError | None = None, first_token_s: float | None = None,
        judged: bool = True,
    ) -> None:
        """An attempt has ended.

        Args:
            error: Why it failed; None = well.
            first_token_s: How long its first content took, where it came.
            judged: False where it says nothing of the target (the client left; another attempt won).
        """
        raise NotImplementedError
