"""Decides which target is tried next, when and why: failover, balance, hedging, retries. Pure: time and chance are
arguments.

`trigate.exchange` executes a plan and decides nothing itself. A *target* is an upstream and a model; its state at the
call's endpoint (`trigate.routing.target_state`: circuit breaker, times to the first token, calls in flight) is shared
by all plans.

The rules:

* `Plan.first`, `next`, `hedge` and `continuation` begin an attempt and count it as in flight; `end` ends it.
* **failover**: the targets in order, each once per round. **balance**: of two targets picked by weighted chance, the
  one with the smaller ``(peak EWMA of first-token time) × (in flight / weight + 1)`` (Finagle's peak EWMA, and the
  power of two choices); if the two costs are nearly equal, the one that was picked first, so that the weights also hold
  for calls that are made one after the other. **hedge**: failover, plus a second attempt at the next target when the
  first one has not answered within its delay.
* With **affinity**, the calls of a conversation prefer one target; this changes the order, and nothing else.
* A target whose breaker is open is skipped. If all breakers are open, the call fails at once, and the error says when
  to retry. A target whose upstream is at a limit of its own (`Gate`) is skipped in the same way.
* Only failures count against a target. A refusal (`retry.REFUSALS`) shows that it works. A target that does not serve
  the endpoint (`Unsupported`) comes after all others for a while.
* An error for a reason that the model names (``on``, `retry.reasons_of`) leads to the targets that have not been tried
  yet. One of them is tried at once: that multiplies no calls. After any other error, only the target that failed may be
  retried.
* An error that is not `retryable` is not retried at its target. A target that has been tried is retried after a pause,
  out of its retry budget, unless it asked to wait for longer than ``retries.max_backoff_s`` or than the call has left.
* Whether a call may be sent again to the same target is `retry.may_resend`: it may have been served and billed.
* At most ``max_attempts`` attempts in all, including hedges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

from trigate.config.sections import Config, ModelConfig
from trigate.errors import GatewayError, Throttled, Unavailable, Unsupported, UpstreamTimeout
from trigate.openai.answer import Usage
from trigate.routing.affinity import by_hash, is_crowded
from trigate.routing.circuit_breaker import Change, Entry
from trigate.routing.retry import REFUSALS, backoff_s, may_resend, reasons_of
from trigate.routing.routes import Target
from trigate.routing.target_state import UNSERVED_S, Targets, TargetState

Why = Literal["first", "failover", "retry", "hedge", "continue"]


_SIMILAR = 1.25
"""Costs within this factor count as equal: times to the first token vary by more than that."""


class Step(NamedTuple):
    """The next attempt: its target, why it is made, the pause before it in seconds, and how its breaker admitted it."""

    target: Target
    why: Why
    after_s: float = 0.0
    entry: Entry = "call"


class Gate(Protocol):
    """The limits of upstreams, which hold for each attempt."""

    def admits(self, target: Target) -> bool:
        """Whether an attempt may begin."""

    def enter(self, target: Target) -> None:
        """An attempt begins, at a target that was admitted at the same time."""

    def leave(self, target: Target, usage: Usage | None) -> None:
        """It has ended."""

    def refusal(self, target: Target) -> GatewayError:
        """The error of a call whose target is not admitted."""


class Plan:
    """The attempts of one call.

    Args:
        alias: The name of the ``[models.NAME]`` that sets the strategy; another text if there is none.
        endpoint: The path of the call, below ``/v1``.
        targets: The targets that may serve the call; at least one.
        states: The states of all targets.
        weights: Of the targets, for balance (`relative_weights`); empty = equal ones.
        key: The conversation of the call, if the model has affinity (`trigate.routing.affinity`); None = none.
        gate: The limits of the upstreams; None = they have none.
    """

    __slots__ = (
        "_all_states",
        "_attempts",
        "_endpoint",
        "_failed",
        "_gate",
        "_hedged",
        "_key",
        "_max",
        "_model",
        "_name",
        "_retries",
        "_spent",
        "_states",
        "_targets",
        "_tries",
        "_weights",
    )

    def __init__(
        self,
        alias: str,
        endpoint: str,
        targets: tuple[Target, ...],
        states: Targets,
        config: Config,
        *,
        weights: tuple[float, ...] = (),
        key: bytes | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._name = alias
        self._gate = gate
        self._endpoint = endpoint
        self._targets = targets
        self._key = key
        self._all_states = states
        self._model = config.models.get(alias)
        self._retries = config.retries
        self._weights: tuple[float, ...] | None = None  # of the targets, for balance
        if self._model is not None and self._model.strategy == "balance" and len(targets) > 1:
            self._weights = weights or (1.0,) * len(targets)
        self._max = config.max_attempts(alias)
        self._tries: dict[Target, int] = {}
        self._states: dict[Target, TargetState] = {}
        self._spent: tuple[Target, ...] = ()  # the targets that must not get this call again
        self._attempts = 0
        self._failed: Target | None = None  # the target of the last attempt that failed
        self._hedged = False

    def first(self, now: float, chance: float) -> Step:
        """The first attempt.

        Raises:
            Unavailable: All breakers are open; its ``retry_after_s`` says for how long.
            Throttled: All breakers are open, and the one that closes first has opened for the provider's rate limit.
            LimitReached: An upstream is at a limit of its own, and there is no other one.
        """
        for target in self._order(now, chance):
            state = self._state(target)
            entry = self._enter(target, state, now)
            if entry is not None:
                budget = self._all_states.hedges(self._name)
                if budget is not None:
                    budget.note_call()
                return self._begin(target, state, "first", entry)
        raise self._refusal(now)

    def _refusal(self, now: float) -> GatewayError:
        """The error of a call for which every breaker is open. For a provider's rate limit it is the provider's own
        error, which the call would have got from there."""
        states = [self._state(target) for target in self._targets]
        for target, state in zip(self._targets, states, strict=True) if self._gate is not None else ():
            if self._gate is not None and state.breaker.opens_in_s(now) <= 0 and not self._gate.admits(target):
                return self._gate.refusal(target)
        first = min(states, key=lambda state: state.breaker.opens_in_s(now))
        after_s = max(0.001, first.breaker.opens_in_s(now))
        if isinstance(first.last_error, Throttled):
            return first.last_error.with_retry_after(after_s)
        names = ", ".join(dict.fromkeys(str(target) for target in self._targets))
        last = f" The last error: {first.last_error.message}" if first.last_error is not None else ""
        return Unavailable(
            f"{names}: recent calls failed, so no calls are sent for a while.{last}",
            status=503,
            reachable=True,
            retry_after_s=after_s,
        )

    def next(self, error: GatewayError, now: float, chance: float, *, left_s: float) -> Step | None:
        """The attempt after one that failed with ``error``; None = there is none, and the call fails with that error.

        Args:
            left_s: Seconds until the call's deadline.
        """
        if self._attempts >= self._max or left_s <= 0:
            return None
        leads_on = self._leads_on(error)
        for target in self._order(now, chance) if leads_on else ():
            if target in self._tries:
                continue
            state = self._state(target)
            entry = self._enter(target, state, now)
            if entry is not None:
                return self._begin(target, state, "failover", entry)
        return self._again(now, chance, left_s, leads_on=leads_on) if error.retryable else None

    def _leads_on(self, error: GatewayError) -> bool:
        """Whether an error is a reason to try another target."""
        return error.retryable if self._model is None else not reasons_of(error).isdisjoint(self._model.on)

    def may_lead_on(self, now: float) -> bool:
        """Whether `next` would find a target that has not been tried, if the error is a reason for it."""
        if self._attempts >= self._max:
            return False
        left = [target for target in self._targets if target not in self._tries]
        return any(self._state(target).breaker.opens_in_s(now) <= 0 and self._admits(target) for target in left)

    def _again(self, now: float, chance: float, left_s: float, *, leads_on: bool) -> Step | None:
        """A target that has been tried: the one of the fewest tries that can be tried soonest, in its order; the one
        that has just failed, unless the error leads to others."""
        retries = self._retries
        waits: list[tuple[int, float, int]] = []
        for index, target in enumerate(self._targets):
            if not leads_on and target != self._failed:
                continue
            tries = self._tries.get(target, 0)
            opens_s = self._state(target).breaker.opens_in_s(now)
            pause_s = backoff_s(tries, base_s=retries.backoff_s, max_s=retries.max_backoff_s, chance=chance)
            may_wait = opens_s <= retries.max_backoff_s and max(opens_s, pause_s) < left_s
            if tries and may_wait and target not in self._spent and self._admits(target):
                waits.append((tries, max(opens_s, pause_s), index))
        for _, after_s, index in sorted(waits):
            target = self._targets[index]
            state = self._state(target)
            # It enters now, at the moment when its breaker will let it in.
            if state.budget.take(now):
                entry = state.breaker.enter(now + after_s)
                return self._begin(target, state, "retry", entry, after_s) if entry is not None else None
        return None

    def hedge_delay_s(self) -> float | None:
        """How many seconds to wait for the first attempt before `hedge`; None = the model does not hedge, or it is not
        known yet how long an answer takes."""
        model = self._model
        if model is None or model.strategy != "hedge" or self._hedged:
            return None
        if model.hedge_delay_s is not None:
            return model.hedge_delay_s
        tried = next(reversed(self._tries), self._targets[0])  # not the first target, if its breaker is open
        return self._state(tried).quantile_s(0.95)

    def hedge(self, now: float) -> Step | None:
        """The second attempt beside the first; None if the hedge budget or the other targets do not allow it."""
        budget = self._all_states.hedges(self._name)
        if self._hedged or self._attempts >= self._max or budget is None:
            return None
        for target in self._targets:
            state = self._state(target)
            may_serve = state.breaker.state(now) == "closed" and state.unserved_until <= now
            if target not in self._tries and may_serve and self._admits(target):
                if not budget.take(now):
                    return None
                self._hedged = True
                return self._begin(target, state, "hedge", "call")
        return None

    def continuation(self, now: float) -> Step | None:
        """The attempt that continues a truncated stream (``on_truncation = "continue"``): at the next target in order
        that has not been tried, else at one that has; None if none is left."""
        if self._attempts >= self._max:
            return None
        for target in sorted(self._targets, key=lambda target: self._tries.get(target, 0)):
            state = self._state(target)
            may_try = target not in self._tries or (self._admits(target) and state.budget.take(now))
            entry = self._enter(target, state, now) if may_try else None
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
        usage: Usage | None = None,
    ) -> Change | None:
        """Records the end of an attempt; returns whether it has opened or closed the breaker of its target.

        Args:
            error: Why it failed; None = it succeeded.
            first_token_s: Seconds to its first content; None if none came.
            judged: False if it says nothing about the target (the client disconnected; another attempt won).
            usage: The token counts that the target has reported.
        """
        state = self._states[step.target]
        state.in_flight -= 1
        if self._gate is not None:
            self._gate.leave(step.target, usage)
        if usage is not None:
            state.prompt_tokens += usage.prompt_tokens
            state.cached_tokens += usage.cached_tokens
        if first_token_s is not None:
            state.note_first_token(first_token_s, now)
        if error is not None:
            self._failed = step.target
        if error is not None and not may_resend(error, self._retries.resend):
            self._spent = (*self._spent, step.target)
        if not judged:
            state.breaker.abandon(step.entry)
        elif error is None:
            if self._key is not None:
                self._all_states.pins.note(self._key, step.target, now)
            return state.breaker.succeed(now, step.entry)
        elif error.blame != "provider" or (isinstance(error, UpstreamTimeout) and error.phase == "queue"):
            state.breaker.abandon(step.entry)  # a full queue says nothing about the target either
        elif error.retryable and error.status not in REFUSALS:
            state.last_error = error.copy()  # a kept traceback keeps its frames, with connections and buffers
            return state.breaker.fail(now, step.entry, retry_after_s=error.retry_after_s)
        else:  # it answered
            if isinstance(error, Unsupported):
                state.unserved_until = now + UNSERVED_S
            return state.breaker.succeed(now, step.entry)
        return None

    def opens_in_s(self, step: Step, now: float) -> float:
        """Seconds until the breaker of a step's target lets a call pass."""
        return self._states[step.target].breaker.opens_in_s(now)

    def _state(self, target: Target) -> TargetState:
        return self._all_states.of(target, self._endpoint)

    def _admits(self, target: Target) -> bool:
        return self._gate is None or self._gate.admits(target)

    def _enter(self, target: Target, state: TargetState, now: float) -> Entry | None:
        """Passes the limits of the upstream and the breaker of a target; None = an attempt may not begin now."""
        if self._gate is not None and not self._gate.admits(target):
            return None
        return state.breaker.enter(now)

    def _begin(self, target: Target, state: TargetState, why: Why, entry: Entry, after_s: float = 0.0) -> Step:
        self._states[target] = state
        state.in_flight += 1
        if self._gate is not None:
            self._gate.enter(target)
        tries = self._tries.get(target, 0)
        if not tries:
            state.budget.note_call()
        self._tries[target] = tries + 1
        self._attempts += 1
        return Step(target, why, after_s, entry)

    def _order(self, now: float, chance: float) -> Iterable[Target]:
        """The targets in the order in which to try them."""
        order: Sequence[Target] = self._targets
        if self._key is not None:
            order = self._with_affinity(self._key, now)
        elif self._weights is not None:
            order = self._balanced(self._weights, now, chance)
        if len(order) > 1 and any(self._state(target).unserved_until > now for target in order):
            return sorted(order, key=lambda target: self._state(target).unserved_until > now)
        return order

    def _with_affinity(self, key: bytes, now: float) -> list[Target]:
        """The targets in the order of a conversation (`trigate.routing.affinity`)."""
        order, weights = list(self._targets), self._weights
        if weights is not None:
            order = by_hash(self._targets, weights, key)
        pinned = self._all_states.pins.find(key, now)
        if pinned in order:
            order.sort(key=lambda target: target != pinned)
        if weights is not None:
            weight_of = dict(zip(self._targets, weights, strict=True))
            states = {target: self._state(target) for target in order}
            open_ones = [target for target in order if states[target].breaker.state(now) != "open"]
            total = sum(states[target].in_flight for target in open_ones)
            whole = sum(weight_of[target] for target in open_ones) or 1.0
            order.sort(key=lambda each: is_crowded(states[each].in_flight, total, weight_of[each] / whole))
        return order

    def _balanced(self, weights: tuple[float, ...], now: float, chance: float) -> tuple[Target, ...]:
        """The targets in order: the less costly one of two that are picked by chance, the other one, the rest."""
        left = list(zip(self._targets, weights, strict=True))
        index, chance = _pick([weight for _, weight in left], chance)
        first = left.pop(index)
        index, _ = _pick([weight for _, weight in left], chance)
        second = left.pop(index)
        states = [(self._state(target), weight) for target, weight in (first, second)]
        unknown_s = max(state.first_token_s or 0.0 for state, _ in states)
        costs = [state.cost(weight, now, unknown_s=unknown_s) for state, weight in states]
        pair = (second, first) if costs[0] > costs[1] * _SIMILAR else (first, second)
        return tuple([target for target, _ in (*pair, *left)])


def relative_weights(model: ModelConfig, every: tuple[Target, ...], usable: tuple[Target, ...]) -> tuple[float, ...]:
    """The weights of the usable ones of a model's targets, in their order; 1 = the average. Empty = equal ones."""
    if not model.weights:
        return ()
    configured = dict(zip(every, model.weights, strict=True))
    weights = [configured.get(target, 1.0) for target in usable]
    mean = sum(weights) / len(weights)
    return tuple([weight / mean for weight in weights])


def _pick(weights: list[float], chance: float) -> tuple[int, float]:
    """Picks an index by its weight; returns it, and the rest of the chance, which can be used once more.

    >>> _pick([1.0, 3.0], 0.125), _pick([1.0, 3.0], 0.625)
    ((0, 0.5), (1, 0.5))
    """
    at = chance * sum(weights)
    for index, weight in enumerate(weights):
        if at < weight or index == len(weights) - 1:
            return index, min(at / weight, 1.0)
        at -= weight
    raise ValueError("expected at least one weight")
