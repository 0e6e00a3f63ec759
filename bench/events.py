"""Chat completions and their events, as in the OpenAI API reference, for every fake provider in the repository.

The mock upstream of the benchmark and the three scripted providers of the tests build their answers from these values.
Standard library only: `tests.support.scripted_upstream` runs in environments without this project's dependencies.
"""

from __future__ import annotations

import json
from typing import Any

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


def encode(value: object) -> bytes:
    """Encodes a value as JSON without spaces.

    >>> encode({"content": "ß"}) == '{"content":"ß"}'.encode()
    True
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def event(value: object) -> bytes:
    r"""Encodes a value as one server-sent event.

    >>> event({"a": 1})
    b'data: {"a":1}\n\n'
    """
    return b"data: " + encode(value) + b"\n\n"


def choice(*, finish_reason: str | None = None, **fields: object) -> dict[str, Any]:
    """Makes the only choice of an answer or of a chunk."""
    return {"index": 0, **fields, "finish_reason": finish_reason}


def chunk(
    delta: object,
    finish_reason: str | None = None,
    *,
    model: str = "m",
    id: str = "chatcmpl-1",
    created: int = 1,
    **fields: object,
) -> dict[str, Any]:
    """Makes one chunk of a streamed chat completion."""
    choices = [choice(delta=delta, logprobs=None, finish_reason=finish_reason)]
    return {**_head("chat.completion.chunk", model, id, created), **fields, "choices": choices}


def usage_chunk(
    usage: object, *, model: str = "m", id: str = "chatcmpl-1", created: int = 1, **fields: object
) -> dict[str, Any]:
    """Makes the chunk before ``[DONE]`` that ``stream_options.include_usage`` asks for."""
    return {**_head("chat.completion.chunk", model, id, created), **fields, "choices": [], "usage": usage}


def completion(
    only_choice: object, usage: object, *, model: str = "m", id: str = "chatcmpl-1", created: int = 1, **fields: object
) -> dict[str, Any]:
    """Makes a complete chat completion."""
    return {**_head("chat.completion", model, id, created), "choices": [only_choice], "usage": usage, **fields}


def tokens(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Makes a ``usage`` object that includes the total."""
    total_tokens = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total_tokens}


def _head(kind: str, model: str, id: str, created: int) -> dict[str, Any]:
    return {"id": id, "object": kind, "created": created, "model": model}
