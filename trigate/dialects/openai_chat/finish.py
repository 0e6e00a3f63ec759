"""What a chat completion says of its end: the reason, and the token counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trigate.dialects.vocabulary import Finish, FinishReason, TokenCounts
from trigate.errors import ProtocolViolation

_REASONS: Mapping[str, FinishReason] = {
    "length": "length",
    "max_tokens": "length",
    "model_length": "context_length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "refusal",
    "sensitive": "refusal",
    "safety": "refusal",
}
"""The reasons of the providers; every other one that is no failure is an ordinary stop."""

_FAILURES = ("error", "abort", "aborted", "cancelled", "network_error", "insufficient_system_resource")
"""Reasons by which some servers say that the answer is not complete."""


def finish_of(
    reason: str, stop_reason: object, usage: object, *, has_calls: bool, has_refusal: bool, upstream: str
) -> Finish:
    """Returns how an answer ended.

    Args:
        reason: Its ``finish_reason``.
        stop_reason: Which stop sequence ended it, where the server says so (vLLM).
        usage: The value of ``usage``.
        has_calls: It has tool calls; some servers then say ``stop``.
        has_refusal: It has a ``refusal``; the reason is then ``stop``.

    Raises:
        ProtocolViolation: By its reason, the answer is not complete.
    """
    if reason.lower() in _FAILURES:
        raise ProtocolViolation(f"The upstream {upstream} ended its answer with the finish_reason {reason[:50]!r}.")
    found = _REASONS.get(reason.lower(), "stop")
    if found == "stop":
        if has_calls:
            found = "tool_calls"
        elif has_refusal:
            found = "refusal"
        elif isinstance(stop_reason, str) and stop_reason:
            return Finish("stop_sequence", stop_reason, token_counts(usage))
    elif found == "tool_calls" and not has_calls:
        found = "stop"
    return Finish(found, None, token_counts(usage))


def token_counts(usage: object) -> TokenCounts | None:
    """Returns the counts of a ``usage``, in disjoint buckets; None = it has none.

    >>> details = {"cached_tokens": 60, "cache_write_tokens": 10}
    >>> counts = token_counts({"prompt_tokens": 100, "completion_tokens": 5, "prompt_tokens_details": details})
    >>> counts.input, counts.cache_read, counts.cache_write, counts.output
    (30, 60, 10, 5)
    """
    if not isinstance(usage, dict):
        return None
    prompt, output = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    if prompt is None:
        return None
    details = usage.get("prompt_tokens_details")
    read = _count(details, "cached_tokens")
    if read is None:  # DeepSeek, Moonshot
        read = _count(usage, "prompt_cache_hit_tokens") or _count(usage, "cached_tokens") or 0
    written = _count(details, "cache_write_tokens") or 0
    read = min(read, prompt)
    written = min(written, prompt - read)
    return TokenCounts(
        input=prompt - read - written,
        cache_read=read,
        cache_write=written,
        output=output or 0,
        reasoning=_count(usage.get("completion_tokens_details"), "reasoning_tokens"),
    )


def _count(value: Any, name: str) -> int | None:  # Any: JSON of any shape
    found = value.get(name) if isinstance(value, dict) else None
    return found if type(found) is int and found >= 0 else None
