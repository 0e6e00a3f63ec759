"""Counts calls for the metrics, when they settle.

Everything is counted in one synchronous step at the end of a call, from what the call has recorded anyway: some
additions, and nothing for each event. No text is made before a scrape.

**Bounds:** no label has a string that a client sent. A model is counted under its name only if the upstream lists it or
the configuration names it, and at most `MAX_MODELS` are; all others are ``other``.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator

import trio

from trigate.errors import ClientStalled, GatewayError
from trigate.exchange.attempt import Attempt
from trigate.exchange.outcome import Outcome
from trigate.exchange.semantic_conventions import OTHER, operation_of, provider_of
from trigate.exchange.state import ExchangeState
from trigate.metrics.families import FIRST_TOKEN_SECONDS, SECONDS, SHORT_SECONDS, TOKEN_SECONDS, TOKENS, Sample
from trigate.metrics.histogram import Histogram
from trigate.routing.plan import Why
from trigate.routing.routes import Target
from trigate.store.records import ExchangeRecord

MAX_MODELS = 100
"""How many models are counted under their names, over all upstreams."""


class _Model:
    """What is counted for one operation of one model at one upstream."""

    __slots__ = ("cost", "durations", "first_token", "input_tokens", "output_tokens", "per_token", "usage")

    def __init__(self) -> None:
        self.durations = {"": Histogram(SECONDS)}  # by error code
        self.first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.per_token = Histogram(TOKEN_SECONDS)
        self.input_tokens = Histogram(TOKENS)
        self.output_tokens = Histogram(TOKENS)
        self.usage = [0, 0, 0, 0, 0]  # input, output, cache read, cache write, reasoning
        self.cost = 0


def _codes(cls: type[GatewayError] = GatewayError) -> Iterator[str]:
    """The codes of all errors."""
    for each in cls.__subclasses__():
        if "code" in vars(each):
            yield each.code
        yield from _codes(each)


class CallMetrics:
    """The counts of one worker since its start."""

    def __init__(self) -> None:
        own = (Outcome.COMPLETE, Outcome.CANCELLED, Outcome.FINISHED)
        self._outcomes = dict.fromkeys([*map(str, own), *sorted(set(_codes())), OTHER], 0)
        self._attempts: dict[tuple[str, str], int] = {}
        self._reasons: dict[str, int] = dict.fromkeys(typing.get_args(Why), 0)
        self._hedges = {"won": 0, "lost": 0}
        self._superseded_tokens = self._unpriced = 0
        self._overhead = Histogram(SHORT_SECONDS)
        self._cancel_latency = Histogram(SHORT_SECONDS)
        self._admission_wait = Histogram(SECONDS)
        self._names: dict[Target, str] = {}
        self._models: dict[tuple[str, str, str, str], _Model] = {}

    def __repr__(self) -> str:
        return f"<CallMetrics of {sum(self._outcomes.values())} calls, {len(self._models)} models>"

    # -- counting -----------------------------------------------------------------------------------------------------

    def count(self, state: ExchangeState, record: ExchangeRecord) -> None:
        """Counts a call that has ended. Synchronous.

        Args:
            record: Its record, complete.
        """
        now, outcome = trio.current_time(), str(record.outcome)
        if outcome not in self._outcomes:
            outcome = OTHER
        self._outcomes[outcome] += 1
        if state.overhead_s is not None:
            self._overhead.observe(state.overhead_s)
        if state.left_at is not None and outcome == Outcome.CANCELLED:
            self._cancel_latency.observe(now - state.left_at)
        if state.admitted_at > -math.inf:
            self._admission_wait.observe(state.admitted_at - state.started_at)
        for attempt in state.attempts:
            self._count_attempt(attempt)
        target = state.target
        if target is not None:
            self._count_model(state, record, target, outcome, now - state.started_at)

    def _count_attempt(self, attempt: Attempt) -> None:
        outcome, why = str(attempt.outcome or Outcome.CANCELLED), attempt.step.why
        key = attempt.target.upstream, outcome
        self._attempts[key] = self._attempts.get(key, 0) + 1
        self._reasons[why] += 1
        if why == "hedge":
            self._hedges["lost" if attempt.is_superseded or attempt.first_content_after_s is None else "won"] += 1
        if attempt.is_superseded and (usage := attempt.reported_usage) is not None:
            self._superseded_tokens += (usage.prompt_tokens or 0) + (usage.completion_tokens or 0)

    def _count_model(
        self, state: ExchangeState, record: ExchangeRecord, target: Target, outcome: str, duration_s: float
    ) -> None:
        model = self._model(state, target)
        is_complete = outcome == Outcome.COMPLETE
        error = "" if is_complete else outcome
        durations = model.durations.get(error)
        if durations is None:
            durations = model.durations[error] = Histogram(SECONDS)
        durations.observe(duration_s)
        prompt, completion, first_s = record.prompt_tokens, record.completion_tokens, record.first_content_s
        if is_complete and first_s is not None:
            model.first_token.observe(first_s)
        if record.cost is not None:
            model.cost += record.cost
        elif prompt is not None or completion is not None:
            self._unpriced += 1
        if record.counted:
            return
        usage = model.usage
        if prompt is not None:
            model.input_tokens.observe(prompt)
            usage[0] += prompt
            usage[2] += record.cached_tokens
            usage[3] += record.cache_write_tokens
        if completion is not None:
            model.output_tokens.observe(completion)
            usage[1] += completion
            usage[4] += record.reasoning_tokens
            if is_complete and record.stream and first_s is not None and completion > 1:
                model.per_token.observe(max(0.0, duration_s - first_s) / (completion - 1))

    def _model(self, state: ExchangeState, target: Target) -> _Model:
        upstream = state.generation.upstreams.get(target.upstream)
        provider = provider_of(upstream.config.kind) if upstream is not None else OTHER
        key = operation_of(state.call.endpoint), provider, self._name(state, target), target.upstream
        model = self._models.get(key)
        if model is None:
            model = self._models[key] = _Model()
        return model

    def _name(self, state: ExchangeState, target: Target) -> str:
        """The name under which a model is counted."""
        name = self._names.get(target)
        if name is None:
            upstream = state.generation.upstreams.get(target.upstream)
            is_listed = upstream is not None and target.model in upstream.models
            is_named = any(str(target) in model.targets for model in state.generation.config.models.values())
            if not (is_listed or is_named) or len(self._names) >= MAX_MODELS:
                return OTHER  # and not remembered: clients may invent models
            name = self._names[target] = target.model
        return name

    # -- a scrape -----------------------------------------------------------------------------------------------------

    def samples(self, upstreams: typing.Iterable[str]) -> Iterator[Sample]:
        """Yields all counts.

        Args:
            upstreams: The names of the upstreams, for those that have made no attempt.
        """
        for labels, model in self._models.items():
            yield from _of_model(labels, model)
        for outcome, count in self._outcomes.items():
            yield Sample("trigate_exchanges", (outcome,), count)
        for upstream in upstreams:
            if (upstream, str(Outcome.COMPLETE)) not in self._attempts:
                yield Sample("trigate_attempts", (upstream, str(Outcome.COMPLETE)), 0)
        for pair, count in self._attempts.items():
            yield Sample("trigate_attempts", pair, count)
        for reason, count in self._reasons.items():
            yield Sample("trigate_attempts_by_reason", (reason,), count)
        for result, count in self._hedges.items():
            yield Sample("trigate_hedges", (result,), count)
        yield Sample("trigate_superseded_tokens", (), self._superseded_tokens)
        yield from self._costs()
        yield Sample("trigate_unpriced_exchanges", (), self._unpriced)
        yield _histogram("trigate_gateway_overhead_seconds", (), self._overhead)
        yield _histogram("trigate_cancel_latency_seconds", (), self._cancel_latency)
        yield _histogram("trigate_admission_wait_seconds", (), self._admission_wait)
        yield Sample("trigate_stalled_clients", (), self._outcomes[ClientStalled.code])

    def _costs(self) -> Iterator[Sample]:
        costs: dict[tuple[str, str], int] = {}
        for (_, _, model, upstream), counts in self._models.items():
            costs[upstream, model] = costs.get((upstream, model), 0) + counts.cost
        for pair, cost in costs.items():
            yield Sample("trigate_cost_usd", pair, cost / 1e6)


def _histogram(family: str, labels: tuple[str, ...], histogram: Histogram) -> Sample:
    return Sample(family, labels, histogram.total, tuple(histogram.counts))


def _of_model(labels: tuple[str, ...], model: _Model) -> Iterator[Sample]:
    for error, durations in model.durations.items():
        yield _histogram("gen_ai_server_request_duration_seconds", (*labels, error), durations)
    yield _histogram("gen_ai_server_time_to_first_token_seconds", labels, model.first_token)
    yield _histogram("gen_ai_server_time_per_output_token_seconds", labels, model.per_token)
    for kind, tokens in (("input", model.input_tokens), ("output", model.output_tokens)):
        yield _histogram(f"gen_ai_client_inference_operation_{kind}_tokens", labels, tokens)
        yield _histogram("gen_ai_client_token_usage", (*labels, kind), tokens)
    parts = ("input", "output", "cache_read_input", "cache_write_input", "reasoning_output")
    for part, count in zip(parts, model.usage, strict=True):
        # "unknown" is the conventions' word where a provider does not tell text from images and sound
        yield Sample(f"gen_ai_client_inference_usage_{part}_tokens", (*labels, "unknown"), count)
