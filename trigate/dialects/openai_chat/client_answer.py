"""Encodes an answer as a chat completion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from trigate.dialects.openai_chat.client_content import ANTHROPIC_REASONING
from trigate.dialects.vocabulary import Answer, FinishReason, Reasoning, Text, TokenCounts, ToolCall

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""

FINISH_REASONS: Mapping[FinishReason, str] = {
    "stop": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "refusal": "content_filter",
    "context_length": "length",
}

Estimate = Callable[[int], TokenCounts]
"""Estimates the token counts of an answer with this many bytes, where the provider has not counted."""


def encode_answer(answer: Answer, *, model: str, created: int, is_legacy: bool, estimate: Estimate) -> bytes:
    """Encodes an answer.

    Args:
        model: The public model id.
        created: When the call was made: Unix time, in seconds.
        is_legacy: Tool calls are a ``function_call``.
        estimate: Used if the answer has no token counts.
    """
    texts = [part.text for part in answer.parts if isinstance(part, Text)]
    calls = [part for part in answer.parts if isinstance(part, ToolCall)]
    reasoning = [part for part in answer.parts if isinstance(part, Reasoning)]
    message: _Json = {"role": "assistant", "content": "".join(texts), "refusal": None}
    if not texts and answer.parts:
        message["content"] = None
    if text := "".join([part.text for part in reasoning]):
        message["reasoning_content"] = text
    if details := reasoning_details([(part.text, part.payloads) for part in reasoning]):
        message["reasoning_details"] = details
    if calls and is_legacy:
        message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
    elif calls:
        message["tool_calls"] = [_tool_call(call) for call in calls]
    usage = answer.finish.usage
    if usage is None:
        usage = estimate(sum(map(_size, answer.parts)))
    choice = {
        "index": 0,
        "message": message,
        "logprobs": None,
        "finish_reason": finish_reason(answer.finish.reason, is_legacy=is_legacy),
    }
    head = completion_head(answer.id, "chat.completion", model=model, created=created)
    return msgspec.json.encode({**head, "choices": [choice], "usage": encode_usage(usage)})


def completion_head(answer_id: str, kind: str, *, model: str, created: int) -> _Json:
    """Returns the fields that an answer and all of its chunks have in common."""
    return {"id": f"chatcmpl-{answer_id}", "object": kind, "created": created, "model": model}


def finish_reason(reason: FinishReason, *, is_legacy: bool) -> str:
    """Returns the ``finish_reason``."""
    return "function_call" if is_legacy and reason == "tool_calls" else FINISH_REASONS[reason]


def reasoning_details(reasoning: list[tuple[str, Mapping[str, str]]], first: int = 0) -> list[_Json]:
    """Returns the reasoning that a provider needs again: text and signature, in OpenRouter's form, which clients send
    back as it is.

    Args:
        first: The index of the first item.

    >>> reasoning_details([("a", {}), ("b", {"anthropic": "s"})])[0]["signature"]
    's'
    """
    details: list[_Json] = []
    for text, payloads in reasoning:
        index = first + len(details)
        if (signature := payloads.get("anthropic")) is not None:
            item = {"type": "reasoning.text", "text": text, "signature": signature}
            details.append({**item, "format": ANTHROPIC_REASONING, "index": index})
        elif (data := payloads.get("anthropic_redacted")) is not None:
            item = {"type": "reasoning.encrypted", "data": data}
            details.append({**item, "format": ANTHROPIC_REASONING, "index": index})
    return details


def extra_content(payloads: Mapping[str, str]) -> _Json:
    """Returns the fields of a tool call that its provider needs again, as Gemini's look-alike of this format has them.

    >>> extra_content({"gemini": "s"})
    {'extra_content': {'google': {'thought_signature': 's'}}}
    """
    signature = payloads.get("gemini")
    return {} if signature is None else {"extra_content": {"google": {"thought_signature": signature}}}


def encode_usage(counts: TokenCounts) -> _Json:
    """Returns the value of ``usage``: here, the tokens of the cache are among those of the prompt.

    >>> encode_usage(TokenCounts(input=30, cache_read=60, cache_write=10, output=5))["prompt_tokens"]
    100
    """
    prompt = counts.input + counts.cache_read + counts.cache_write
    usage: _Json = {
        "prompt_tokens": prompt,
        "completion_tokens": counts.output,
        "total_tokens": prompt + counts.output,
        "prompt_tokens_details": {"cached_tokens": counts.cache_read, "cache_write_tokens": counts.cache_write},
    }
    if counts.reasoning is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": counts.reasoning}
    return usage


def _tool_call(call: ToolCall) -> _Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function, **extra_content(call.payloads)}


def _size(part: Text | ToolCall | Reasoning) -> int:
    return len(part.text.encode()) if not isinstance(part, ToolCall) else len(part.name) + len(part.arguments.encode())
