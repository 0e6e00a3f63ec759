"""The fields of an answer that both decoders read: its texts, its reasoning, its ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from trigate.errors import ProtocolViolation

_decode = msgspec.json.Decoder().decode


def answer_id(value: object, data: bytes) -> str:
    """Returns the id of an answer: the provider's, or one made of its first event.

    >>> answer_id("chatcmpl-7", b""), len(answer_id(None, b"{}"))
    ('7', 24)
    """
    if isinstance(value, str) and value:
        return value.removeprefix("chatcmpl-")[:200]
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def call_id(answer: str, index: int) -> str:
    """Returns the id of a tool call that has none: the same for the same answer, streamed or not.

    >>> call_id("7", 0)
    'call_7_0'
    """
    return f"call_{answer}_{index}"


def text_of(content: object) -> str:
    """Returns the text of a ``content``, which a few providers send as a list of parts.

    >>> text_of([{"type": "text", "text": "a"}, {"type": "thinking", "thinking": []}]), text_of(None)
    ('a', '')
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "".join(
        [
            part["text"]
            for part in content
            if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        ]
    )


def reasoning_of(part: Mapping[str, Any]) -> str:
    """Returns the reasoning in a message or a delta. Some providers send it under two names: the first one counts.

    >>> reasoning_of({"reasoning": "a", "reasoning_details": [{"type": "reasoning.text", "text": "a"}]})
    'a'
    >>> reasoning_of({"reasoning_details": [{"text": "a"}, {"summary": "b"}, {"data": "opaque"}]})
    'ab'
    """
    for name in ("reasoning_content", "reasoning"):
        found = part.get(name)
        if isinstance(found, str) and found:
            return found
    details = part.get("reasoning_details")
    if not isinstance(details, list):
        return ""
    texts = [each.get("text") or each.get("summary") for each in details if isinstance(each, dict)]
    return "".join([text for text in texts if isinstance(text, str)])


def is_object(arguments: str) -> bool:
    """Whether the arguments of a tool call are a whole JSON object."""
    try:
        return isinstance(_decode(arguments), dict)
    except (ValueError, RecursionError):
        return False


def checked_arguments(arguments: str, name: str, upstream: str) -> str:
    """Returns the arguments of a complete tool call; ``{}`` for empty ones.

    Raises:
        ProtocolViolation: They are no JSON object.
    """
    if not arguments.strip():
        return "{}"
    if not is_object(arguments):
        raise ProtocolViolation(
            f"The upstream {upstream} called the tool {name[:100]!r} with arguments that are no JSON object."
        )
    return arguments
