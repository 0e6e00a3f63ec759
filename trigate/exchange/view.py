"""The view of an exchange in ``/status`` and in the log.

It never contains the text of a message, nor a provider's error message, which may quote a client's text.
"""

from __future__ import annotations

import math

from trigate.config.key_sections import MicroUsd
from trigate.exchange.attempt import Attempt
from trigate.exchange.bill import bill_of
from trigate.exchange.exchange_span import trace_id_of
from trigate.exchange.outcome import Phase
from trigate.exchange.shared_call import Subscription
from trigate.exchange.state import ExchangeState
from trigate.openai.token_estimate import MOST_QUICK_BYTES
from trigate.prices.price import usd


def phase(state: ExchangeState) -> Phase:
    """The phase of an exchange."""
    if state.is_ended or state.error is not None:
        return Phase.ENDING
    source = state.source.phase if state.source is not None else None
    return source or state.idle_phase


def describe(state: ExchangeState, now: float) -> dict[str, object]:
    """Makes a row of ``GET /status/streams``. Times are in seconds; attempts count them from the exchange's start."""
    usage, phase_now = state.usage, phase(state)
    row: dict[str, object] = {
        "id": state.id,
        "key": state.owner,
        "model": state.call.model,
        "endpoint": state.call.endpoint.path,
        "stream": state.call.stream,
        "phase": phase_now,
        "age_s": round(now - state.started_at, 3),
        "deadline_left_s": round(state.deadline_at - now, 3) if state.deadline_at < math.inf else None,
        "target": str(state.target) if state.target is not None else None,
        "events": state.events,
        "bytes": state.bytes_sent,
        "prompt_tokens": usage.prompt_tokens if usage is not None else None,
        "completion_tokens": usage.completion_tokens if usage is not None else None,
        "first_content_s": state.first_content_after_s,
        "tokens_per_s": _tokens_per_s(state, now),
        "cost_microusd": bill_of(state).cost if len(state.call.body) <= MOST_QUICK_BYTES else None,
        "client_gone": state.is_client_gone,
        "queue_position": state.queue_position() if phase_now is Phase.QUEUED else None,
        "max_attempts": state.generation.config.max_attempts(state.generation.alias_of(state.call.model)),
        "attempts": [describe_attempt(attempt, state.started_at) for attempt in state.attempts],
    }
    if isinstance(state.source, Subscription):
        shared = state.source.shared
        row["shared_call"] = {"id": shared.id, "role": state.source.role, "subscribers": len(shared.subscribers)}
    return row


def _tokens_per_s(state: ExchangeState, now: float) -> float | None:
    after_s = state.first_content_after_s
    if not state.call.stream or after_s is None:
        return None
    return round(state.events / max(now - state.started_at - after_s, 0.1), 1)


def describe_attempt(attempt: Attempt, since: float) -> dict[str, object]:
    """Makes the row of an attempt, with times in seconds since ``since`` (Trio time)."""
    row: dict[str, object] = {
        "target": str(attempt.target),
        "why": attempt.step.why,
        "started_s": round(attempt.started_at - since, 4),
        **({"phase": attempt.phase} if attempt.outcome is None else {"outcome": attempt.outcome}),
    }
    if attempt.first_content_after_s is not None:
        row["first_content_s"] = round(attempt.first_content_after_s, 4)
    if attempt.ended_at is not None:
        row["duration_s"] = round(attempt.ended_at - attempt.started_at, 4)
    if attempt.error is not None:
        row["status"] = attempt.error.status
    return row


def log_line(state: ExchangeState, now: float) -> dict[str, object]:
    """Makes the values of the log event ``exchange``, from the completed record."""
    record, source = state.record, state.source
    assert record is not None, "an exchange that has ended has begun"
    attempts = len(record.attempts)
    line: dict[str, object] = {
        "request_id": record.request_id,
        "model": state.request.call.model,
        "target": record.target,
        "stream": record.stream,
        "outcome": str(record.outcome),  # an enum would be logged with its name
        "status": record.status,
        "duration_s": round(now - state.started_at, 4),
        "bytes": record.bytes,
        "attempts": attempts,
    }
    if record.owner:
        line["key"] = record.owner
    if (trace_id := trace_id_of(state.request)) is not None:
        line["trace_id"] = trace_id
    if attempts > 1:
        line["tried"] = [f"{attempt.target} {attempt.outcome or attempt.phase}" for attempt in state.attempts]
    if record.stream:
        line["events"] = record.events
    if record.first_content_s is not None:
        line["first_content_s"] = round(record.first_content_s, 4)
    if record.prompt_tokens is not None and not record.counted:
        line["prompt_tokens"] = record.prompt_tokens
        line["completion_tokens"] = record.completion_tokens
    if record.cost:
        line["cost_usd"] = usd(MicroUsd(record.cost))
    if isinstance(source, Subscription):
        line["coalesced"] = source.role
        line["shared_call"] = source.shared.id
    return line
