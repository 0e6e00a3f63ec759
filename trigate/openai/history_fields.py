"""Which fields of a remembered answer are sent back to a provider. Pure.

A model's answer has fields besides OpenAI's own: its reasoning, and signatures of it. Some providers refuse the next
request of the conversation without them, others refuse the request because of them, and many ignore them. So a session
stores an answer whole, and these rules choose the fields for each upstream when a request is sent.

Only assistant messages of the history are affected. What a client sends in its own request stays as it is.

**Source:** the error messages ("Missing `reasoning_content` field in the assistant message", "property
'reasoning_content' is unsupported", "Extra inputs are not permitted", "Function call is missing a thought_signature")
and the documentation of the providers in `_PROVIDERS`.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

import msgspec

from trigate.openai.raw_json import decode_any, join_fields, split_fields

HISTORY_FIELDS = (
    *("reasoning_content", "reasoning", "reasoning_details", "reasoning_text", "reasoning_opaque"),
    *("thinking", "thinking_blocks", "signature", "thought_signature", "extra_content", "provider_specific_fields"),
)
"""The fields that are sent back to a provider that is not in the table: whatever carries reasoning or a signature."""

_PROVIDERS = {
    "api.openai.com": (),
    "openai.azure.com": (),
    "api.mistral.ai": (),
    "api.cerebras.ai": (),
    "api.groq.com": ("reasoning",),
    "api.deepseek.com": ("reasoning_content",),
    "api.moonshot.cn": ("reasoning_content",),
    "api.moonshot.ai": ("reasoning_content",),
    "openrouter.ai": ("reasoning", "reasoning_details"),
    "googleapis.com": ("extra_content",),
}
_MESSAGE = frozenset(("role", "content", "refusal", "name", "tool_calls", "function_call"))
_TOOL_CALL = frozenset(("id", "type", "function", "custom"))


def history_fields_of(base_url: str | None) -> tuple[str, ...]:
    """Returns the fields that the provider at a base URL takes back.

    >>> history_fields_of("https://api.deepseek.com/v1"), history_fields_of("https://eu.openai.azure.com/openai/v1")
    (('reasoning_content',), ())
    >>> history_fields_of("http://127.0.0.1:8080/v1") == HISTORY_FIELDS
    True
    """
    host = (urlsplit(base_url).hostname or "") if base_url else ""
    for name, fields in _PROVIDERS.items():
        if host == name or host.endswith(f".{name}"):
            return fields
    return HISTORY_FIELDS


def with_history_fields(message: bytes, fields: Collection[str]) -> bytes:
    """Returns a remembered message as it is sent to a provider: an assistant message has OpenAI's own fields and
    ``fields``, and so have its tool calls; every other message is unchanged."""
    given = split_fields(message)
    if "role" not in given or decode_any(bytes(given["role"])) != "assistant":
        return message
    kept = {name: value for name, value in given.items() if name in _MESSAGE or name in fields}
    calls = decode_any(bytes(kept["tool_calls"])) if "tool_calls" in kept else None
    if isinstance(calls, list) and any(
        name not in _TOOL_CALL and name not in fields for call in calls if isinstance(call, dict) for name in call
    ):
        kept["tool_calls"] = msgspec.Raw(
            msgspec.json.encode(
                [
                    {name: value for name, value in call.items() if name in _TOOL_CALL or name in fields}
                    if isinstance(call, dict)
                    else call
                    for call in calls
                ]
            )
        )
    return join_fields(kept) if kept.keys() != given.keys() or "tool_calls" in kept else message
