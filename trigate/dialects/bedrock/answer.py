"""Decodes an answer of Converse that is not streamed, and the parts that streams have in common with it."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any

from trigate.dialects.vocabulary import (
    Answer,
    AnswerPart,
    Finish,
    FinishReason,
    Reasoning,
    Text,
    TokenCounts,
    ToolCall,
)
from trigate.errors import ProtocolViolation
from trigate.openai.answer import MAX_TOKENS, Usage, tier_of
from trigate.openai.provider_error import is_error, reported
from trigate.openai.raw_json import decode_any

_REASONS: dict[str, FinishReason] = {
    "end_turn": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "stop_sequence": "stop_sequence",
    "guardrail_intervened": "refusal",
    "content_filtered": "refusal",
    "model_context_window_exceeded": "context_length",
}

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


class AnswerIds:
    """Makes the ids of answers, which have none: each another one.

    Args:
        seed: Random bytes, so that no other process makes the same ids.

    >>> ids = AnswerIds(b"seed")
    >>> first, second = next(ids), next(ids)
    >>> len(first), first != second
    (24, True)
    """

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._count = itertools.count()

    def __next__(self) -> str:
        return hashlib.blake2b(b"%b %d" % (self._seed, next(self._count)), digest_size=12).hexdigest()


def finish_of(reason: object, usage: TokenCounts | None, *, has_calls: bool, upstream: str) -> Finish:
    """Returns the end of an answer.

    Raises:
        ProtocolViolation: By its own words, it is not complete, or it does not say how it ended.
    """
    if not isinstance(reason, str) or reason.startswith("malformed_"):
        raise ProtocolViolation(f"The upstream {upstream} ended its answer with the stopReason {str(reason)[:50]!r}.")
    found = _REASONS.get(reason, "stop")
    if found in ("stop", "tool_calls"):  # some models say end_turn where they call a tool
        found = "tool_calls" if has_calls else "stop"
    return Finish(found, None, usage)


def counts_of(usage: object) -> TokenCounts | None:
    """Returns the counts of a ``usage``; None = it has none. ``inputTokens`` includes no tokens of the cache.

    >>> counts = counts_of({"inputTokens": 3, "outputTokens": 2, "cacheReadInputTokens": 40})
    >>> counts.input, counts.cache_read, counts.cache_write, counts.output
    (3, 40, 0, 2)
    """
    if not isinstance(usage, dict):
        return None
    names = ("inputTokens", "cacheReadInputTokens", "cacheWriteInputTokens", "outputTokens")
    found = [usage.get(name) for name in names]
    if type(found[0]) is not int:
        return None
    counts = [count if type(count) is int and 0 <= count <= MAX_TOKENS else 0 for count in found]
    return TokenCounts(input=counts[0], cache_read=counts[1], cache_write=counts[2], output=counts[3])


def usage_of(counts: TokenCounts | None, tier: object) -> Usage | None:
    """Returns token counts as the ledger takes them.

    Args:
        tier: The ``serviceTier``.
    """
    if counts is None:
        return None
    prompt = counts.input + counts.cache_read + counts.cache_write
    name = tier_of(tier.get("type")) if isinstance(tier, dict) else ""
    return Usage(prompt, counts.output, counts.cache_read, counts.cache_write, service_tier=name)


def checked_arguments(value: object, name: str, upstream: str) -> str:
    """Returns the arguments of a complete tool call as text.

    Raises:
        ProtocolViolation: They are no JSON object.
    """
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
    if value is None or (isinstance(text, str) and not text.strip()):
        return "{}"
    if not isinstance(text, str) or not isinstance(decode_any(text.encode(errors="replace")), dict):
        raise ProtocolViolation(
            f"The upstream {upstream} called the tool {name[:100]!r} with arguments that are no JSON object."
        )
    return text


def decode_answer(body: bytes, *, answer_id: str, upstream: str) -> tuple[Answer, Usage | None]:
    """Decodes an answer.

    Args:
        answer_id: Its id.
        upstream: The upstream's name, for messages.

    Raises:
        ProtocolViolation: It is no answer, or by its own words not complete.
        Reported: It is an error.
    """
    value = decode_any(body)
    value = value if isinstance(value, dict) else {}
    output = value.get("output")
    message = output.get("message") if isinstance(output, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        if is_error(value) or "__type" in value:
            raise reported(upstream, value)
        raise ProtocolViolation(f"The upstream {upstream} answered with something that is no message.")
    parts: list[AnswerPart] = []
    for block in content:
        if isinstance(block, dict):
            parts += _parts(block, upstream)
    counts = counts_of(value.get("usage"))
    has_calls = any(isinstance(part, ToolCall) for part in parts)
    finish = finish_of(value.get("stopReason"), counts, has_calls=has_calls, upstream=upstream)
    return Answer(answer_id, tuple(parts), finish), usage_of(counts, value.get("serviceTier"))


def _parts(block: _Json, upstream: str) -> list[AnswerPart]:
    """Returns what a block says; nothing for one of a kind that is not known."""
    text = block.get("text")
    if isinstance(text, str):
        return [Text(text)] if text else []
    if isinstance(call := block.get("toolUse"), dict):
        id_, name = call.get("toolUseId"), call.get("name")
        if not isinstance(id_, str) or not isinstance(name, str) or not id_ or not name:
            raise ProtocolViolation(f"The upstream {upstream} called a tool without a name.")
        return [ToolCall(id_, name, checked_arguments(call.get("input"), name, upstream))]
    if isinstance(reasoning := block.get("reasoningContent"), dict):
        if isinstance(hidden := reasoning.get("redactedContent"), str):
            return [Reasoning("", {"bedrock": hidden})]
        inner = reasoning.get("reasoningText")
        if isinstance(inner, dict) and isinstance(thought := inner.get("text"), str):
            signature = inner.get("signature")
            return [Reasoning(thought, {"anthropic": signature} if isinstance(signature, str) and signature else {})]
    if isinstance(cited := block.get("citationsContent"), dict) and isinstance(cited.get("content"), list):
        pieces = [each.get("text") for each in cited["content"] if isinstance(each, dict)]
        text = "".join([piece for piece in pieces if isinstance(piece, str)])
        return [Text(text)] if text else []
    return []
