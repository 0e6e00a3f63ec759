"""The spans of the attempts of a call, each a child of the call's own (`exchange_span`).

Token counts are attributes of the attempts and not of the exchange, so that none is counted twice.

**Source:** OpenTelemetry's conventions for generative AI. What they do not name begins with ``trigate.``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from urllib.parse import urlsplit

import trio

from trigate.exchange.attempt import Attempt
from trigate.exchange.outcome import Outcome
from trigate.exchange.request import ExchangeRequest
from trigate.exchange.semantic_conventions import OTHER, operation_of, provider_of
from trigate.exchange.upstream_call import UpstreamCall
from trigate.openai.endpoints import Endpoint
from trigate.tracing.span import Event, Span, Value
from trigate.tracing.tracer import Trace, new_span_id
from trigate.upstream.upstream import Upstream

MAX_MODEL_CHARS = 256
_PORTS = {"http": 80, "https": 443}


def record_attempts(call: UpstreamCall) -> None:
    """Hands over the spans of a shared call that has ended. They are parts of the call that began it."""
    trace = call.request.trace
    if trace is not None and trace.is_sampled:
        trace.tracer.record(spans_of_attempts(call, trace, time.time() - trio.current_time()))


def spans_of_attempts(call: UpstreamCall, trace: Trace, clock_s: float) -> list[Span]:
    """Makes the spans of all attempts.

    Args:
        clock_s: POSIX time minus Trio's.
    """
    return [_span_of(call.request, trace, attempt, clock_s) for attempt in call.attempts]


def span_name(endpoint: Endpoint, model: str) -> str:
    """The name of a span: the operation and the model, as the conventions have it."""
    operation = operation_of(endpoint)
    return f"{operation if operation != OTHER else endpoint.path} {model[:MAX_MODEL_CHARS]}".rstrip()


def _span_of(request: ExchangeRequest, trace: Trace, attempt: Attempt, clock_s: float) -> Span:
    target, error, endpoint = attempt.target, attempt.error, request.call.endpoint
    upstream = request.generation.upstreams[target.upstream]
    outcome = str(attempt.outcome or Outcome.CANCELLED)
    attributes: dict[str, Value] = {
        "gen_ai.operation.name": operation_of(endpoint),
        "gen_ai.provider.name": provider_of(upstream.config.kind),
        "trigate.upstream": target.upstream,
        "trigate.why": attempt.step.why,
        "trigate.outcome": outcome,
        **_server(upstream),
    }
    if target.model:
        attributes["gen_ai.request.model"] = target.model
    if request.call.stream:
        attributes["gen_ai.request.stream"] = True
    events: tuple[Event, ...] = ()
    first_s = attempt.first_content_after_s
    if first_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = first_s
        events = (Event(name="trigate.first_token", at=attempt.started_at + first_s + clock_s),)
    usage = attempt.reported_usage
    if usage is not None:
        attributes["gen_ai.usage.input_tokens"] = usage.prompt_tokens
        attributes["gen_ai.usage.output_tokens"] = usage.completion_tokens
        if usage.cached_tokens:
            attributes["gen_ai.usage.cache_read.input_tokens"] = usage.cached_tokens
        if usage.cache_write_tokens:
            attributes["gen_ai.usage.cache_write.input_tokens"] = usage.cache_write_tokens
        if usage.reasoning_tokens:
            attributes["gen_ai.usage.reasoning.output_tokens"] = usage.reasoning_tokens
    if error is not None:
        attributes["error.type"] = outcome
    ended_at = attempt.ended_at if attempt.ended_at is not None else trio.current_time()
    return Span(
        name=span_name(endpoint, target.model),
        kind="client",
        trace_id=trace.own.trace_id,
        span_id=attempt.span_id or new_span_id(),
        parent_id=trace.own.span_id,
        tracestate=trace.tracestate,
        started_at=attempt.started_at + clock_s,
        ended_at=ended_at + clock_s,
        attributes=attributes,
        events=events,
        failed=error is not None,
    )


def _server(upstream: Upstream) -> Mapping[str, Value]:
    """Where an upstream is."""
    url = urlsplit(upstream.config.base_url or "")
    if url.hostname is None:  # the gateway runs it itself
        return {}
    port = url.port or _PORTS.get(url.scheme)
    return {"server.address": url.hostname, **({"server.port": port} if port is not None else {})}
