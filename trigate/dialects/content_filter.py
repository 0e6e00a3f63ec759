"""Recognises that a provider's content filter has refused a request, or withheld the whole answer.

Source: the errors of Azure OpenAI (``content_filter``, ``ResponsibleAIPolicyViolation``), OpenAI
(``content_policy_violation``, ``moderation_blocked``), DashScope (``data_inspection_failed``), Anthropic, OpenRouter,
Zhipu and MiniMax; the stop reasons of the formats that clients speak.
"""

from __future__ import annotations

import re
from typing import Any

from trigate.errors import GatewayError, Rejected, Reported
from trigate.openai.completion import is_filled
from trigate.openai.provider_error import error_object
from trigate.openai.raw_json import decode_any

_CODES = re.compile(
    r"content.?filter|content.?policy.?violation|responsible.?ai|moderation.?blocked|data.?inspection", re.IGNORECASE
)
_WORDS = re.compile(
    r"content (?:filter|management policy|policy)|(?:was|were|been) flagged|usage polic|inappropriate content"
    r"|sensitive (?:content|material|word)|敏感|requires moderation",
    re.IGNORECASE,
)
_STATUSES = (400, 403, 422, 451)
_MARKS = (b"content_filter", b"refusal", b"blockReason", b"SAFETY", b"PROHIBITED_CONTENT", b"BLOCKLIST")
_GEMINI = ("SAFETY", "PROHIBITED_CONTENT", "BLOCKLIST", "SPII", "RECITATION")


def is_refusal(error: GatewayError) -> bool:
    """Whether an error says that a content filter has refused the request.

    >>> is_refusal(Rejected("The prompt triggered Azure OpenAI's content management policy.", status=400))
    True
    >>> [is_refusal(Rejected(message, status=500 if "usage" in message else 400)) for message in ("usage policy", "no")]
    [False, False]
    """
    if not isinstance(error, Rejected | Reported) or error.status not in _STATUSES:
        return False
    told = error_object(error)
    return any(_CODES.search(str(told.get(name, ""))) for name in ("code", "type")) or bool(
        _WORDS.search(error.message[:4000])
    )


def is_withheld(data: bytes) -> bool:
    """Whether an answer is nothing but the word that a content filter has withheld it.

    Args:
        data: A JSON answer in a client's format, or the first events of a stream, up to the first that says something.

    >>> is_withheld(b'{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}]}')
    True
    >>> is_withheld(b'data: {"choices": [{"delta": {"content": "I"}, "finish_reason": "content_filter"}]}\\n\\n')
    False
    """
    if not any(mark in data for mark in _MARKS):
        return False
    lines = [data] if data.lstrip().startswith(b"{") and b"\n{" not in data.rstrip() else data.splitlines()
    values = [decode_any(line.removeprefix(b"data:").strip()) for line in lines if b"{" in line]
    objects = [value for value in values if isinstance(value, dict)]
    return any(map(_says_filtered, objects)) and not any(map(_has_content, objects))


def withheld() -> Reported:
    """Returns the error that stands for such an answer while the next target is tried."""
    return Reported("A content filter has withheld the answer.", error={"code": "content_filter"}, status=400)


def _says_filtered(value: dict[str, Any]) -> bool:  # Any: JSON of any shape
    delta, response, feedback = value.get("delta"), value.get("response"), value.get("promptFeedback")
    details = (response if isinstance(response, dict) else value).get("incomplete_details")
    return (
        any(choice.get("finish_reason") == "content_filter" for choice in _items(value, "choices"))
        or any(candidate.get("finishReason") in _GEMINI for candidate in _items(value, "candidates"))
        or (isinstance(feedback, dict) and bool(feedback.get("blockReason")))
        or (isinstance(details, dict) and details.get("reason") == "content_filter")
        or value.get("stop_reason") == "refusal"
        or (isinstance(delta, dict) and delta.get("stop_reason") == "refusal")
        or value.get("done_reason") == "content_filter"
    )


def _has_content(value: dict[str, Any]) -> bool:  # Any: JSON of any shape
    response = value.get("response")
    return (
        any(is_filled(choice.get(name)) for choice in _items(value, "choices") for name in ("delta", "message", "text"))
        or any(is_filled(candidate.get("content")) for candidate in _items(value, "candidates"))
        or any(is_filled(item.get("content")) for item in _items(value, "output"))
        or (isinstance(response, dict) and _has_content(response))
        or (isinstance(response, str) and bool(response))
        or is_filled(value.get("content"))
        or is_filled(value.get("message") if "done" in value else None)
        or value.get("type") in ("content_block_start", "response.output_item.added")
    )


def _items(value: dict[str, Any], name: str) -> list[dict[str, Any]]:  # Any: JSON of any shape
    found = value.get(name)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
