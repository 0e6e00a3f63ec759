"""What an answer of Gemini's says of its end: the reason, and the token counts."""

from __future__ import annotations

from collections.abc import Mapping

from trigate.dialects.gemini.usage import token_counts
from trigate.dialects.vocabulary import Finish, FinishReason
from trigate.errors import ProtocolViolation

_REASONS: Mapping[str, FinishReason] = {
    "MAX_TOKENS": "length",
    "SAFETY": "refusal",
    "RECITATION": "refusal",
    "LANGUAGE": "refusal",
    "BLOCKLIST": "refusal",
    "PROHIBITED_CONTENT": "refusal",
    "SPII": "refusal",
    "MODEL_ARMOR": "refusal",
    "IMAGE_SAFETY": "refusal",
    "IMAGE_PROHIBITED_CONTENT": "refusal",
    "IMAGE_RECITATION": "refusal",
}
"""Every other reason that is no failure is an ordinary stop."""

_FAILURES = frozenset(
    (
        *("MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS", "MISSING_THOUGHT_SIGNATURE"),
        *("MALFORMED_RESPONSE", "OTHER", "IMAGE_OTHER", "NO_IMAGE"),
    )
)
"""Reasons by which the answer is not complete, or no answer."""


def is_failure(reason: object) -> bool:
    """Whether an answer that ended for this reason is no complete answer."""
    return reason in _FAILURES


def failure(reason: str, message: object, *, upstream: str) -> ProtocolViolation:
    """Returns the error for an answer that ended with a failure.

    Args:
        message: Its ``finishMessage``.
    """
    more = f": {message[:300]}" if isinstance(message, str) and message else "."
    return ProtocolViolation(f"The upstream {upstream} ended its answer with the finishReason {reason[:50]}{more}")


def finish_of(reason: str, usage: object, *, has_calls: bool) -> Finish:
    """Returns how an answer ended.

    Args:
        reason: Its ``finishReason``, which is no failure.
        usage: The value of ``usageMetadata``.
        has_calls: It calls functions; the reason is then ``STOP`` as well.
    """
    found = _REASONS.get(reason, "stop")
    if found == "stop" and has_calls:
        found = "tool_calls"
    return Finish(found, None, token_counts(usage))
