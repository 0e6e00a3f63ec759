"""Which target is tried next, when, and why: failover, balance, hedging, retries. Pure: time and chance are arguments.

`exchange` does what a plan says; nothing is decided there. A *target* is an upstream and a model; what is known of it
(`TargetState`: its breaker, how long its first tokens take, how many calls it has) is shared by all plans and outlives
them.

The rules:

* An attempt is begun with `Plan.first` (or `next`, `second`), which counts it as in flight, and ended with `end`.
* **failover**: the targets in order, each once in a round. **balance**: of two targets picked by chance, weighted, the
  one with the smaller ``(peak EWMA of first-token time) × (in flight / weight + 1)`` (Finagle's peak EWMA, and the
  power of two choices); where the two are nearly alike, the one that was picked first: weights hold for calls one after
  the other, too. **hedge**: failover, and a second attempt at the next target once the first has had its time.
* A target whose breaker is open is passed over. Where all are, the call fails at once and is told when to come back.
* What is not `retryable` ends the call. A target that has not been tried is tried at once: that multiplies nothing. One
  that has been is tried again after a pause, out of its retry budget, unless it said to wait for longer than
  ``retries.max_backoff_s``, or than the call has left.
* Who took too long, or answers nonsense, is not asked again: it would take as long, and say the same.
* At most ``max_attempts`` in all, hedges included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import attrs

from trigate.config.sections import Config
from trigate.errors import GatewayError, ProtocolViolation, Throttled, Unavailable, UpstreamTimeout
from trigate.routing.circuit_breaker import Breaker, Entry
from trigate.routing.retry import Budget, backoff_s
from trigate.routing.routes import Target

Why = Literal["first", "failover", "retry", "hedge", "continue"]


MAX_TARGETS = 1024
"""How many targets are remembered."""
_SAMPLES = 128
_ENOUGH = 20
_DECAY_S = 10.0
_ALIKE = 1.25
"""Costs of which one is not so many times the other are alike: times to a first token vary by more than that."""


@attrs.frozen
class Step:
    """The next attempt: at which target, why, after which pause in seconds, and as what its breaker lets it in."""

    target: Target
    why: Why
    after_s: float = 0.0
    entry: Entry = "call"


class TargetState:
    """What is known of one target.

    Attributes:
        in_flight: Attempts that have begun and not ended.
        last_error: Why the last one failed that counts.
    """

    __slots__ = ("_ewma_at", "_ewma_s", "_next", "_samples", "breaker", "budget", "in_flight", "last_error")

    def __init__(self, config: Config) -> None:
        self.breaker = Breaker(config.breaker)
        self.budget = Budget(config.retries.budget)
        self.in_flight = 0
        self.last_error: GatewayError | None = None
        self._samples: list[float] = []
        self._next = 0
        self._ewma_s = 0.0
        self._ewma_at = 0.0

    def note_first_token(self, seconds: float, now: float) -> None:
        """The first content of an answer came after so long."""
        if len(self._samples) < _SAMPLES:
            self._samples.append(seconds)
        else:
            self._samples[self._next] = seconds
            self._next = (self._next + 1) % _SAMPLES
        if seconds >= self._ewma_s:
            self._ewma_s = seconds  # a peak counts at once
        else:
            kept = self._kept(now)
            self._ewma_s = self._ewma_s * kept + seconds * (1 - kept)
        self._ewma_at = now

    @property
    def first_token_s(self) -> float | None:
        """The peak EWMA of the time to the first content; None while nothing is known."""
        return self._ewma_s if self._samples else None

    def quantile_s(self, share: float) -> float | None:
        """Within which time so many first tokens came, lately; None while too few are known."""
        if len(self._samples) < _ENOUGH:
            return None
        return sorted(self._samples)[min(len(self._samples) - 1, int(share * len(self._samples)))]

    def cost(self, weight: float, now: float, *, unknown_s: float) -> float:
        """What one more call here costs: its time, for each that is there already. Time alone makes it less while there
        is none, or a target that was slow once would never be asked again; one that hangs does not become cheap.

        Args:
            weight: 1 = as much as a target has on average.
            unknown_s: The time of a target that has been asked, and has not answered yet.
        """
        if self._samples:
            seconds = self._ewma_s if self.in_flight else self._ewma_s * self._kept(now)
        else:
            seconds = unknown_s if self.in_flight else 0.0
        return (seconds + 1e-6) * (self.in_flight / weight + 1)

    def _kept(self, now: float) -> float:
        return math.exp(-max(0.0, now - self._ewma_at) / _DECAY_S)


class Targets:
    """What is known of all targets; outlives a reload. Made by `gateway`."""

    def __init__(self) -> None:
        self._config = Config()
        self._states: dict[Target, TargetState] = {}
        self._hedges: dict[str, Budget] = {}

    def __repr__(self) -> str:
        return f"<Targets, {len(self._states)} known>"

    def apply(self, config: Config) -> None:
        """Takes the rules of a new configuration, and forgets targets of upstreams that are gone or have moved."""
        before = self._config.upstreams
        self._config = config
        self._hedges = {
            name: Budget(model.hedge_budget, a_second=0.0, at_first=1.0)
            for name, model in config.models.items()
            if model.strategy == "hedge"
        }
        for target in list(self._states):
            own, old = config.upstreams.get(target.upstream), before.get(target.upstream)
            if own is None or old is None or own.base_url != old.base_url:
                del self._states[target]
        for state in self._states.values():
            state.breaker.rules = config.breaker
            state.budget.share = config.retries.budget

    def of(self, target: Target) -> TargetState:
        """The state of a target. Bounded: what clients make up (``upstream/anything``) does not stay for ever."""
        state = self._states.get(target)
        if state is None:
            if len(self._states) >= MAX_TARGETS:
                self._forget_one()
            state = self._states[target] = TargetState(self._config)
        return state

    def hedges(self, model: str) -> Budget | None:
        """The budget of second attempts of a model that hedges."""
        return self._hedges.get(model)

    def _forget_one(self) -> None:
        for target, state in self._states.items():
            if not state.in_flight:
                del self._states[target]
                return

    def items(self) -> list[tuple[Target, TargetState]]:
        """All that are known, for ``/status``."""
        return list(self._states.items())


class Plan:
    """The way of one call.

    Args:
        model: The public model id; its ``[models.NAME]``, where there is one, says how.
        targets: At least one.
    """

    __slots__ = (
        "_attempts",
        "_hedged",
        "_known",
        "_max",
        "_model",
        "_name",
        "_retries",
        "_states",
        "_targets",
        "_tries",
    )

    def __init__(self, model: str, targets: tuple[Target, ...], known: Targets, config: Config) -> None:
        self._name = model
        self._targets = targets
        self._known = known
        self._model = config.models.get(model)
        self._retries = config.retries
        self._max = config.max_attempts(model)
        self._tries: dict[Target, int] = {}
        self._states: dict[Target, TargetState] = {}
        self._attempts = 0
        self._hedged = False

    def first(self, now: float, chance: float) -> Step:
        """The first attempt.

        Raises:
            Unavailable: All breakers are open; its ``retry_after_s`` says for how long.
            Throttled: As that, where it is for a limit of the provider's.
        """
        for target in self._order(now, chance):
            state = self._known.of(target)
            entry = state.breaker.enter(now)
            if entry is not None:
                budget = self._known.hedges(self._name)
                if budget is not None:
                    budget.note_call()
                return self._begin(target, state, "first", entry)
        raise self._refusal(now)

    def _refusal(self, now: float) -> GatewayError:
        """What a call is told that no target gets: a limit of the provider's in its own words, as a call that went
        there would be told."""
        states = [self._known.of(target) for target in self._targets]
        first = min(states, key=lambda state: state.breaker.opens_in_s(now))
        after_s = max(0.001, first.breaker.opens_in_s(now))
        if isinstance(first.last_error, Throttled):
            return first.last_error.with_retry_after(after_s)
        names = ", ".join(dict.fromkeys(str(target) for target in self._targets))
        last = f" The last error: {first.last_error.message}" if first.last_error is not None else ""
        return Unavailable(
            f"{names}: failed lately, and gets no calls for a while.{last}",
            status=503,
            reachable=True,
            retry_after_s=after_s,
        )

    def next(self, error: GatewayError, now: float, chance: float, *, left_s: float) -> Step | None:
        """The attempt after one that failed with ``error``; None = there is none, and the call fails with it.

        Args:
            left_s: Until the call's deadline.
        """
        if not error.retryable or self._attempts >= self._max or left_s <= 0:
            return None
        for target in self._order(now, chance):
            if target in self._tries:
                continue
            state = self._known.of(target)
            entry = state.breaker.enter(now)
            if entry is not None:
                return self._begin(target, state, "failover", entry)
        if isinstance(error, UpstreamTimeout | ProtocolViolation):
            return None
        return self._again(now, chance, left_s)

    def _again(self, now: float, chance: float, left_s: float) -> Step | None:
        """A target that has been tried: the one of the fewest tries that can be tried soonest, in its order."""
        retries = self._retries
        waits: list[tuple[int, float, int]] = []
        for index, target in enumerate(self._targets):
            tries = self._tries.get(target, 0)
            opens_s = self._known.of(target).breaker.opens_in_s(now)
            pause_s = backoff_s(tries, base_s=retries.backoff_s, max_s=retries.max_backoff_s, chance=chance)
            if tries and opens_s <= retries.max_backoff_s and max(opens_s, pause_s) < left_s:
                waits.append((tries, max(opens_s, pause_s), index))
        for _, after_s, index in sorted(waits):
            target = self._targets[index]
            state = self._known.of(target)
            # It enters now, at the moment when its breaker will let it in.
            if state.budget.take(now):
                entry = state.breaker.enter(now + after_s)
                return self._begin(target, state, "retry", entry, after_s) if entry is not None else None
        return None

    def hedge_delay_s(self) -> float | None:
        """How long the first attempt has before `second` is asked; None = there is no hedging here, or not yet: it is
        not known how long an answer takes."""
        model = self._model
        if model is None or model.strategy != "hedge" or self._hedged:
            return None
        if model.hedge_delay_s is not None:
            return model.hedge_delay_s
        tried = next(reversed(self._tries), self._targets[0])  # not the first one, where its breaker is open
        return self._known.of(tried).quantile_s(0.95)

    def second(self, now: float) -> Step | None:
        """The second attempt beside the first; None where the hedge budget or the other targets do not allow it."""
        budget = self._known.hedges(self._name)
        if self._hedged or self._attempts >= self._max or budget is None:
            return None
        for target in self._targets:
            state = self._known.of(target)
            if target not in self._tries and state.breaker.state(now) == "closed":
                if not budget.take(now):
                    return None
                self._hedged = True
                return self._begin(target, state, "hedge", "call")
        return None

    def onward(self, now: float) -> Step | None:
        """The target that goes on with a stream that has broken off (``on_truncation = "continue"``): the next one in
        order that has not been tried, else one that has; None where none is left."""
        if self._attempts >= self._max:
            return None
        for target in sorted(self._targets, key=lambda target: self._tries.get(target, 0)):
            state = self._known.of(target)
            entry = state.breaker.enter(now) if target not in self._tries or state.budget.take(now) else None
            if entry is not None:
                return self._begin(target, state, "continue", entry)
        return None

    def end(
        self,
        step: Step,
        now: float,
        *,
        error: GatewayError | None = None,
        first_token_s: float | None = None,
        judged: bool = True,
    ) -> None:
        """An attempt has ended.

        Args:
            error: Why it failed; None = well.
            first_token_s: How long its first content took, where it came.
            judged: False where it says nothing of the target (the client left; another attempt won).
        """
        state = self._states[step.target]
        state.in_flight -= 1
        if first_token_s is not None:
            state.note_first_token(first_token_s, now)
        if not judged:
            state.breaker.abandon(step.entry)
        elif error is None:
            state.breaker.succeed(now, step.entry)
        elif error.blame != "provider" or (isinstance(error, UpstreamTimeout) and error.phase == "queue"):
            state.breaker.abandon(step.entry)  # nor does it say anything that all places here were taken
        elif error.retryable:
            state.last_error = error
            state.breaker.fail(now, step.entry, retry_after_s=error.retry_after_s)
        else:
            state.breaker.succeed(now, step.entry)  # it answered: what was asked was wrong

    def _begin(self, target: Target, state: TargetState, why: Why, entry: Entry, after_s: float = 0.0) -> Step:
        self._states[target] = state
        state.in_flight += 1
        tries = self._tries.get(target, 0)
        if not tries:
            state.budget.note_call()
        self._tries[target] = tries + 1
        self._attempts += 1
        return Step(target, why, after_s, entry)

    def _order(self, now: float, chance: float) -> Iterable[Target]:
        """The targets as they are to be tried."""
        model = self._model
        if model is None or model.strategy != "balance" or len(self._targets) < 2:
            return self._targets
        given = dict(zip(model.targets, model.weights, strict=False))  # a target that is switched off is not tried
        weights = [given.get(str(target), 1.0) for target in self._targets]
        mean = sum(weights) / len(weights)
        left = [(target, weight / mean) for target, weight in zip(self._targets, weights, strict=True)]
        one, chance = _picked([weight for _, weight in left], chance)
        first = left.pop(one)
        other, _ = _picked([weight for _, weight in left], chance)
        second = left.pop(other)
        states = [(self._known.of(target), weight) for target, weight in (first, second)]
        unknown_s = max(state.first_token_s or 0.0 for state, _ in states)
        costs = [state.cost(weight, now, unknown_s=unknown_s) for state, weight in states]
        pair = (second, first) if costs[0] > costs[1] * _ALIKE else (first, second)
        return [target for target, _ in (*pair, *left)]


def _picked(weights: list[float], chance: float) -> tuple[int, float]:
    """Picks one by its weight; returns which, and what is left of the chance, to be used once more.

    >>> _picked([1.0, 3.0], 0.125), _picked([1.0, 3.0], 0.625)
    ((0, 0.5), (1, 0.5))
    """
    at = chance * sum(weights)
    for index, weight in enumerate(weights):
        if at < weight or index == len(weights) - 1:
            return index, min(at / weight, 1.0)
        at -= weight
    raise ValueError("expected at least one weight")
