"""The spans of a call: one for the exchange, and a child for each attempt (`attempt_spans`).

They are made once, when the call has ended, from what it has recorded anyway. Earlier, a call that is traced costs only
its ids: those of the exchange (`begin_trace`) and of each attempt (`attempt_headers`). No span has the text of a
message, or that of an error, which may quote one.

**Source:** OpenTelemetry's conventions for generative AI and for HTTP. What they do not name begins with ``trigate.``.
"""

from __future__ import annotations

import time

import trio

from trigate.exchange.attempt_spans import MAX_MODEL_CHARS, span_name, spans_of_attempts
from trigate.exchange.outcome import Outcome
from trigate.exchange.request import ExchangeRequest
from trigate.exchange.semantic_conventions import operation_of, provider_of
from trigate.exchange.shared_call import Subscription
from trigate.exchange.state import ExchangeState
from trigate.exchange.upstream_call import UpstreamCall
from trigate.store.records import ExchangeRecord
from trigate.tracing.context import parse_traceparent
from trigate.tracing.span import Event, Span, Value
from trigate.tracing.tracer import Trace, Tracer


def begin_trace(request: ExchangeRequest, tracer: Tracer) -> None:
    """Gives a call its place in a trace."""
    request.trace = tracer.begin(request.headers, operation_of(request.call.endpoint))


def trace_id_of(request: ExchangeRequest) -> str | None:
    """Returns the trace that a call belongs to: that of its client, if the gateway traces nothing itself."""
    if request.trace is not None:
        return request.trace.own.trace_id
    given = request.headers.get("traceparent")
    parent = parse_traceparent(given) if given is not None else None
    return parent.trace_id if parent is not None else None


def record_exchange(state: ExchangeState, record: ExchangeRecord) -> None:
    """Hands over the spans of a call that has ended and is sampled.

    Args:
        record: Its record, complete.
    """
    trace = state.request.trace
    if trace is None or not trace.is_sampled:
        return
    clock_s = time.time() - trio.current_time()
    spans = [_of_exchange(state, record, trace, clock_s)]
    if isinstance(state.source, UpstreamCall):
        spans += spans_of_attempts(state.source, trace, clock_s)
    trace.tracer.record(spans)


def _of_exchange(state: ExchangeState, record: ExchangeRecord, trace: Trace, clock_s: float) -> Span:
    request, error = state.request, state.error
    call, target, parent = request.call, state.target, trace.parent
    outcome = str(record.outcome)
    attributes: dict[str, Value] = {
        "gen_ai.operation.name": operation_of(call.endpoint),
        "http.request.method": request.passed.method if request.passed is not None else "POST",
        "trigate.endpoint": call.endpoint.path,
        "trigate.request_id": state.id,
        "trigate.outcome": outcome,
        "trigate.attempts": len(record.attempts),
        "trigate.bytes": record.bytes,
    }
    if call.model:
        attributes["gen_ai.request.model"] = call.model[:MAX_MODEL_CHARS]
    if call.stream:
        attributes["gen_ai.request.stream"] = True
        attributes["trigate.events"] = record.events
        if record.first_content_s is not None:
            attributes["gen_ai.response.time_to_first_chunk"] = record.first_content_s
    if target is not None:
        attributes["gen_ai.provider.name"] = provider_of(request.generation.upstreams[target.upstream].config.kind)
        attributes["trigate.target"] = str(target)
        if record.first_content_s is not None:
            attributes["gen_ai.response.model"] = target.model
    if record.owner:
        attributes["trigate.key"] = record.owner
    if record.status is not None:
        attributes["http.response.status_code"] = record.status
    if record.cost is not None:
        attributes["trigate.cost_usd"] = record.cost / 1e6
    if error is not None:
        attributes["error.type"] = outcome
    link = None
    if isinstance(state.source, Subscription):
        attributes["trigate.coalesced"] = state.source.role
        shared = state.source.shared.upstream.request.trace
        if shared is not None and shared is not trace:
            link = shared.own.trace_id, shared.own.span_id
    return Span(
        name=span_name(call.endpoint, call.model),
        kind="server",
        trace_id=trace.own.trace_id,
        span_id=trace.own.span_id,
        parent_id=parent.span_id if parent is not None else None,
        is_parent_remote=True,
        tracestate=trace.tracestate,
        started_at=request.arrived_at + clock_s,
        ended_at=trio.current_time() + clock_s,
        attributes=attributes,
        events=tuple(_events(state, clock_s)),
        link=link,
        failed=error is not None and error.status >= 500,
    )


def _events(state: ExchangeState, clock_s: float) -> list[Event]:
    """What happened in an exchange, in order."""
    events = [
        Event(
            name=f"trigate.{later.step.why}",
            at=later.started_at + clock_s,
            attributes={"trigate.from": str(earlier.target), "trigate.to": str(later.target)},
        )
        for earlier, later in zip(state.attempts, state.attempts[1:], strict=False)
    ]
    first_s = state.first_content_after_s
    if first_s is not None:
        events.append(Event(name="trigate.first_token", at=state.started_at + first_s + clock_s))
    if state.committed_at is not None:
        events.append(Event(name="trigate.commit", at=state.committed_at + clock_s))
    if state.left_at is not None and state.outcome in (Outcome.CANCELLED, Outcome.FINISHED):
        reason: dict[str, Value] = {"trigate.reason": "client_disconnected"}
        events.append(Event(name="trigate.cancel", at=state.left_at + clock_s, attributes=reason))
    elif state.cancelled_with is not None:
        reason = {"trigate.reason": state.cancelled_with.code}
        events.append(Event(name="trigate.cancel", at=trio.current_time() + clock_s, attributes=reason))
    return sorted(events, key=lambda event: event.at)
