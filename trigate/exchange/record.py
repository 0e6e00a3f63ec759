"""The record of an exchange, which the ledger keeps, and which the totals and the log read."""

from __future__ import annotations

import time

from trigate.dialects.errors import error_response
from trigate.exchange.attempt import Attempt
from trigate.exchange.bill import bill_of, learn_from
from trigate.exchange.outcome import Outcome
from trigate.exchange.state import ExchangeState
from trigate.store.records import AttemptRecord, ExchangeRecord


def complete_record(record: ExchangeRecord, state: ExchangeState) -> None:
    """Completes the record of an exchange that has ended."""
    source = state.source
    record.ended_at = time.time()
    record.outcome = state.outcome or ""
    record.status = _status_of(state)
    if source is not None:
        record.target = str(source.target) if source.target is not None else None
        record.attempts = tuple([_attempt_record(attempt, state.started_at) for attempt in source.attempts])
        record.events = source.events
        record.bytes = source.bytes_sent
        record.first_content_s = state.first_content_after_s
    learn_from(state)
    usage, record.counted, record.cost = bill_of(state)
    if usage is not None:
        record.prompt_tokens, record.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        record.cached_tokens, record.cache_write_tokens = usage.cached_tokens, usage.cache_write_tokens
        record.reasoning_tokens = usage.reasoning_tokens
    if record.counted:
        _have_prompt_counted(state)


def _have_prompt_counted(state: ExchangeState) -> None:
    """Has the upstream count a prompt that had to be estimated, for the next estimates."""
    source = state.source
    assert source is not None, "what has been estimated has a source"
    silent = [each for each in source.attempts if each.reported_usage is None]
    answered = [each.target for each in silent if each.first_content_after_s is not None]
    if answered:
        services, target = source.services, answered[-1]
        ratio = services.targets.of(target, state.call.endpoint.path).ratios.prompt
        services.prompt_counts.note(state.request, target, ratio, services.reasoning)


def _status_of(state: ExchangeState) -> int | None:
    """The status that the client got; None = it had disconnected."""
    if state.outcome in (Outcome.CANCELLED, Outcome.FINISHED):
        return None
    return error_response(state.error, state.call.endpoint.format, state.id)[0] if state.error is not None else 200


def _attempt_record(attempt: Attempt, since: float) -> AttemptRecord:
    error, began_at = attempt.error, attempt.started_at
    return AttemptRecord(
        target=str(attempt.target),
        why=attempt.step.why,
        started_s=began_at - since,
        duration_s=attempt.ended_at - began_at if attempt.ended_at is not None else None,
        outcome=attempt.outcome or Outcome.CANCELLED,
        status=error.status if error is not None else None,
        first_content_s=attempt.first_content_after_s,
        requested_s=attempt.requested_at - began_at if attempt.requested_at is not None else None,
        head_s=attempt.head_at - began_at if attempt.head_at is not None else None,
    )
