"""Encodes an answer as a ``GenerateContentResponse``, whole or as the chunks of a stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from trigate.dialects.gemini.content import FORMAT
from trigate.dialects.gemini.usage import encode_usage
from trigate.dialects.vocabulary import Answer, AnswerPart, Finish, FinishReason, Reasoning, Text, TokenCounts, ToolCall

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""

FINISH_REASONS: Mapping[FinishReason, str] = {
    "stop": "STOP",
    "stop_sequence": "STOP",
    "tool_calls": "STOP",
    "length": "MAX_TOKENS",
    "context_length": "MAX_TOKENS",
    "refusal": "SAFETY",
}

Estimate = Callable[[int], TokenCounts]
"""Estimates the token counts of an answer with this many bytes, where the provider has not counted."""


def encode_answer(answer: Answer, *, model: str, wants_reasoning: bool, estimate: Estimate) -> bytes:
    """Encodes an answer.

    Args:
        model: The public model id.
        wants_reasoning: Whether the client asked for thoughts; if not, it gets none.
        estimate: Used if the answer has no token counts.
    """
    parts = [_part(part) for part in answer.parts if wants_reasoning or not isinstance(part, Reasoning)]
    size = sum(map(_size, answer.parts))
    body = {**_candidate(parts, answer.finish), **_end(answer.finish, estimate, size), **tail(answer.id, model)}
    return msgspec.json.encode(body)


def last_chunk(finish: Finish, estimate: Estimate, size_bytes: int) -> _Json:
    """Returns the fields of the chunk that ends a stream."""
    return {**_candidate([{"text": ""}], finish), **_end(finish, estimate, size_bytes)}


def tail(answer_id: str, model: str) -> _Json:
    """Returns the fields that all chunks have."""
    return {"modelVersion": model, "responseId": answer_id}


def call_part(call_id: str, name: str, arguments: str, signature: str | None) -> _Json:
    """Returns a call of a function.

    Args:
        arguments: A JSON object.
    """
    part: _Json = {"functionCall": {"id": call_id, "name": name, "args": msgspec.Raw(arguments.encode())}}
    if signature is not None:
        part["thoughtSignature"] = signature
    return part


def _candidate(parts: list[_Json], finish: Finish) -> _Json:
    content = {"parts": parts, "role": "model"} if parts else {"role": "model"}
    return {"candidates": [{"content": content, "finishReason": FINISH_REASONS[finish.reason], "index": 0}]}


def _end(finish: Finish, estimate: Estimate, size_bytes: int) -> _Json:
    return {"usageMetadata": encode_usage(finish.usage if finish.usage is not None else estimate(size_bytes))}


def _part(part: AnswerPart) -> _Json:
    match part:
        case Text(text):
            return {"text": text}
        case Reasoning(text, payloads):
            signature = {"thoughtSignature": payloads[FORMAT]} if FORMAT in payloads else {}
            return {"text": text, "thought": True, **signature}
        case ToolCall(call, name, arguments, payloads):
            return call_part(call, name, arguments, payloads.get(FORMAT))


def _size(part: AnswerPart) -> int:
    match part:
        case ToolCall(_, name, arguments):
            return len(name) + len(arguments.encode())
        case Text(text) | Reasoning(text):
            return len(text.encode())
