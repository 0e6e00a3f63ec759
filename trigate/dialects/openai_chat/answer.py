"""Decodes a chat completion that is not streamed."""

from __future__ import annotations

import json
from typing import Any

from trigate.dialects.openai_chat.fields import answer_id, call_id, checked_arguments, reasoning_of, text_of
from trigate.dialects.openai_chat.finish import finish_of
from trigate.dialects.vocabulary import Answer, AnswerPart, Reasoning, Text, ToolCall
from trigate.errors import ProtocolViolation
from trigate.openai.accumulator import joined_surrogates
from trigate.openai.raw_json import decode_any


def decode_answer(body: bytes, *, upstream: str) -> Answer:
    """Decodes the first choice of an answer.

    A tool call whose arguments were cut off, because the answer is as long as allowed, is left out: nothing can be done
    with it, and the reason of the end says that something is missing.

    Args:
        upstream: The upstream's name, for messages.

    Raises:
        ProtocolViolation: It is no chat completion, or by its own words not complete.
    """
    value = decode_any(body)
    choices = value.get("choices") if isinstance(value, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(value, dict) or not isinstance(choice, dict) or not isinstance(message, dict):
        raise ProtocolViolation(f"The upstream {upstream} answered with something that is not a chat completion.")
    answer = answer_id(value.get("id"), body)
    refusal = message.get("refusal")
    finish = finish_of(
        str(choice.get("finish_reason") or "stop"),
        choice.get("stop_reason"),
        value.get("usage"),
        has_calls=bool(message.get("tool_calls") or message.get("function_call")),
        has_refusal=bool(refusal),
        upstream=upstream,
    )
    parts: list[AnswerPart] = []
    if reasoning := joined_surrogates(reasoning_of(message)):
        parts.append(Reasoning(reasoning))
    text = text_of(message.get("content")) + (refusal if isinstance(refusal, str) else "")
    if text:
        parts.append(Text(joined_surrogates(text)))
    calls = message.get("tool_calls")
    calls = calls if isinstance(calls, list) else []
    if isinstance(function := message.get("function_call"), dict):
        calls = [*calls, {"function": function}]
    may_be_cut = finish.reason in ("length", "context_length")
    for index, call in enumerate(calls):
        try:
            parts.append(_tool_call(call, call_id(answer, index), upstream))
        except ProtocolViolation:
            if not may_be_cut or index < len(calls) - 1:
                raise
    return Answer(answer, tuple(parts), finish)


def _tool_call(call: Any, default_id: str, upstream: str) -> ToolCall:  # Any: JSON of any shape
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
        raise ProtocolViolation(f"The upstream {upstream} called a tool without a name.")
    given = call.get("id")
    arguments = function.get("arguments")
    text = joined_surrogates(arguments) if isinstance(arguments, str) else ""
    if isinstance(arguments, dict):  # Ollama and others send the object itself
        text = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(
        given if isinstance(given, str) and given else default_id, name, checked_arguments(text, name, upstream)
    )
