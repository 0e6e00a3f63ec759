"""The state of each target at each endpoint: circuit breaker, retry budget, calls in flight, times to the first
content. Pure.

A target that does not serve one endpoint, or is slow at it, says nothing about its others: an upstream whose embeddings
fail still chats. So every endpoint has a state of its own. All plans share the states, and they outlive the plans. Time
is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trigate.config.sections import Config
from trigate.errors import GatewayError
from trigate.openai.token_ratios import TokenRatios
from trigate.routing.affinity import Pins
from trigate.routing.circuit_breaker import MAX_COOLDOWN_S, Breaker
from trigate.routing.retry import Budget
from trigate.routing.routes import Target

MAX_TARGETS = 1024
"""How many states are kept."""
UNSERVED_S = MAX_COOLDOWN_S
"""How long a target that has said that it does not serve an endpoint comes after all others."""
_SAMPLES = 128
_MIN_SAMPLES = 20
_DECAY_S = 10.0


class TargetState:
    """The state of one target at one endpoint.

    Attributes:
        in_flight: How many attempts have begun and not ended.
        last_error: The error of the last attempt that counted as a failure of the target.
        unserved_until: Until when the target comes after all others, because it does not serve the endpoint.
        prompt_tokens: Tokens of the prompts of all calls, as far as the target has reported them.
        cached_tokens: How many of them it has read from its cache.
        ratios: How far estimates of its tokens are off.
    """

    __slots__ = (
        "_ewma_at",
        "_ewma_s",
        "_next",
        "_samples",
        "breaker",
        "budget",
        "cached_tokens",
        "in_flight",
        "last_error",
        "prompt_tokens",
        "ratios",
        "unserved_until",
    )

    def __init__(self, config: Config) -> None:
        self.breaker = Breaker(config.breaker)
        self.budget = Budget(config.retries.budget)
        self.in_flight = 0
        self.prompt_tokens = self.cached_tokens = 0
        self.ratios = TokenRatios()
        self.last_error: GatewayError | None = None
        self.unserved_until = -math.inf
        self._samples: list[float] = []
        self._next = 0
        self._ewma_s = 0.0
        self._ewma_at = 0.0

    def note_first_token(self, seconds: float, now: float) -> None:
        """Records the time to the first content of an answer."""
        if len(self._samples) < _SAMPLES:
            self._samples.append(seconds)
        else:
            self._samples[self._next] = seconds
            self._next = (self._next + 1) % _SAMPLES
        if seconds >= self._ewma_s:
            self._ewma_s = seconds  # a peak takes effect at once
        else:
            kept = self._kept(now)
            self._ewma_s = self._ewma_s * kept + seconds * (1 - kept)
        self._ewma_at = now

    @property
    def first_token_s(self) -> float | None:
        """The peak EWMA of the time to the first content, in seconds; None while there is no sample."""
        return self._ewma_s if self._samples else None

    def quantile_s(self, share: float) -> float | None:
        """The quantile of the recent times to the first content, in seconds; None while there are too few samples."""
        if len(self._samples) < _MIN_SAMPLES:
            return None
        return sorted(self._samples)[min(len(self._samples) - 1, int(share * len(self._samples)))]

    def cost(self, weight: float, now: float, *, unknown_s: float) -> float:
        """The cost of one more call: expected time to the first content × (calls in flight / weight + 1).

        The time decays only while the target is idle: so a hanging target stays expensive, and a target that was slow
        once is tried again.

        Args:
            weight: The target's share of the calls; 1 = the average of all targets.
            unknown_s: The expected time of a target that has calls in flight, but has not answered one yet.
        """
        if self._samples:
            seconds = self._ewma_s if self.in_flight else self._ewma_s * self._kept(now)
        else:
            seconds = unknown_s if self.in_flight else 0.0
        return (seconds + 1e-6) * (self.in_flight / weight + 1)

    def _kept(self, now: float) -> float:
        return math.exp(-max(0.0, now - self._ewma_at) / _DECAY_S)


class Targets:
    """The states of all targets, by endpoint; outlives a reload.

    Attributes:
        pins: The conversations that have affinity for a target.
    """

    def __init__(self) -> None:
        self.pins = Pins()
        self._config = Config()
        self._states: dict[tuple[Target, str], TargetState] = {}
        self._hedges: dict[str, Budget] = {}

    def __repr__(self) -> str:
        return f"<Targets, {len(self._states)} known>"

    def apply(self, config: Config) -> None:
        """Applies a new configuration, and forgets the targets of upstreams that are gone or have another URL."""
        before = self._config.upstreams
        self._config = config
        self._hedges = {
            name: Budget(model.hedge_budget, per_second=0.0, initial=1.0)
            for name, model in config.models.items()
            if model.strategy == "hedge"
        }
        for key in list(self._states):
            upstream = key[0].upstream
            own, old = config.upstreams.get(upstream), before.get(upstream)
            if own is None or old is None or own.base_url != old.base_url:
                del self._states[key]
        for state in self._states.values():
            state.breaker.rules = config.breaker
            state.budget.share = config.retries.budget

    def of(self, target: Target, endpoint: str) -> TargetState:
        """The state of a target at an endpoint. At most `MAX_TARGETS` are kept: clients may invent targets
        (``upstream/anything``).

        Args:
            endpoint: The path below ``/v1``.
        """
        key = (target, endpoint)
        state = self._states.get(key)
        if state is None:
            if len(self._states) >= MAX_TARGETS:
                self._forget_idle()
            state = self._states[key] = TargetState(self._config)
        return state

    def corrected_prompt(self, estimated: int, targets: Sequence[Target], endpoint: str) -> int:
        """Corrects the estimate of a prompt by the greatest factor that one of these targets has at an endpoint."""
        if len(targets) == 1:  # as usual, and in half the time
            state = self._states.get((targets[0], endpoint))
            return int(estimated * state.ratios.prompt.factor) if state is not None else estimated
        states = [self._states.get((target, endpoint)) for target in targets]
        return int(estimated * max([each.ratios.prompt.factor if each is not None else 1.0 for each in states]))

    def hedges(self, alias: str) -> Budget | None:
        """The budget of hedges of an alias; None if its strategy is not ``hedge``."""
        return self._hedges.get(alias)

    def _forget_idle(self) -> None:
        for key, state in self._states.items():
            if not state.in_flight:
                del self._states[key]
                return

    def items(self) -> list[tuple[Target, str, TargetState]]:
        """All targets with their endpoints and states, for ``/status``."""
        return [(target, endpoint, state) for (target, endpoint), state in self._states.items()]
