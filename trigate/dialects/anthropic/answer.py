"""Encodes an answer as a ``message`` of Anthropic's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from trigate.dialects.anthropic.usage import encode_usage
from trigate.dialects.marks import PAYLOAD
from trigate.dialects.vocabulary import Answer, AnswerPart, Finish, FinishReason, Reasoning, Text, TokenCounts, ToolCall

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""

STOP_REASONS: Mapping[FinishReason, str] = {
    "stop": "end_turn",
    "stop_sequence": "stop_sequence",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "refusal": "refusal",
    "context_length": "model_context_window_exceeded",
}

Estimate = Callable[[int], TokenCounts]
"""Estimates the token counts of an answer with this many bytes, where the provider has not counted."""


def encode_answer(answer: Answer, *, model: str, wants_reasoning: bool, estimate: Estimate) -> bytes:
    """Encodes an answer.

    Args:
        model: The public model id.
        wants_reasoning: Whether the client asked for reasoning; if not, it gets none.
        estimate: Used if the answer has no token counts.
    """
    content = [_block(part) for part in answer.parts if wants_reasoning or not isinstance(part, Reasoning)]
    usage = answer.finish.usage
    if usage is None:
        usage = estimate(sum(map(_size, answer.parts)))
    message = message_head(answer.id, model)
    message |= {"content": content, **stop_fields(answer.finish), "usage": encode_usage(usage)}
    return msgspec.json.encode(message)


def message_head(answer_id: str, model: str) -> _Json:
    """Returns a message without content, whose end is not known yet."""
    return {
        "id": f"msg_{answer_id}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def stop_fields(finish: Finish) -> _Json:
    """Returns the fields that say why an answer ended."""
    fields: _Json = {"stop_reason": STOP_REASONS[finish.reason], "stop_sequence": finish.stop_sequence}
    if finish.reason == "refusal":
        fields["stop_details"] = {"type": "refusal", "category": None, "explanation": None}
    return fields


def _block(part: AnswerPart) -> _Json:
    match part:
        case Text(text):
            return {"type": "text", "text": text}
        case Reasoning(text, payloads):
            return {"type": "thinking", "thinking": text, "signature": payloads.get(PAYLOAD, "")}
        case ToolCall(call, name, arguments):
            return {"type": "tool_use", "id": call, "name": name, "input": msgspec.Raw(arguments.encode())}


def _size(part: AnswerPart) -> int:
    match part:
        case ToolCall(_, name, arguments):
            return len(name) + len(arguments.encode())
        case Text(text) | Reasoning(text):
            return len(text.encode())
