"""Which calls belong together, so that a provider's prompt cache serves them (``models.ALIAS.affinity``). Pure.

A conversation is sent again with each turn, and a provider that has seen its beginning charges a fraction for it. So
all calls of a conversation should go to the same target. Most clients name the conversation, each in its own place;
where none is named, its beginning identifies it: the instructions and the first message of the user stay the same.

Source: the headers and fields that Claude Code, Codex and opencode send; ``prompt_cache_key`` is OpenAI's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from trigate.openai.raw_json import decode_any
from trigate.openai.request import Call

_HEADERS = (b"x-session-key", b"x-claude-code-session-id", b"session-id", b"thread-id")
_LATER_HEADERS = (b"x-session-affinity", b"x-session-id")
_INSTRUCTIONS = ("system", "instructions", "systemInstruction", "system_instruction")
_MESSAGES = ("messages", "input", "contents")
_BILLING = "x-anthropic-billing-header:"
"""How a block of Claude Code's instructions begins that differs from call to call."""
_MAX_PROMPT_CHARS = 1024
_raws = msgspec.json.Decoder(list[msgspec.Raw])


def affinity_key_of(
    call: Call, headers: Mapping[bytes, bytes], *, owner: str, affinity: Literal["session", "prefix"]
) -> bytes | None:
    """Returns a digest that the calls of a conversation have in common; None = the call belongs to none.

    Args:
        headers: Those of the client's request, by lower-case name.
        owner: The name of the gateway key. Calls of different owners never have a key in common.
        affinity: ``session``: what the client names, else the beginning; ``prefix``: always the beginning.
    """
    session = _session(call, headers) if affinity == "session" else None
    parts = [session] if session is not None else list(_beginning(call))
    if not parts:
        return None
    return hashlib.blake2b(msgspec.json.encode([owner, call.model, *parts]), digest_size=16).digest()


def _session(call: Call, headers: Mapping[bytes, bytes]) -> str | None:
    """The conversation that the client names."""
    for name in _HEADERS:
        if headers.get(name):
            return headers[name].decode("latin-1")
    key = _decoded(call, "prompt_cache_key")
    if isinstance(key, str) and key:
        return key
    for name in _LATER_HEADERS:
        if headers.get(name):
            return headers[name].decode("latin-1")
    metadata = _decoded(call, "metadata")
    user = metadata.get("user_id") if isinstance(metadata, dict) else None
    return user if isinstance(user, str) and user else None


def _beginning(call: Call) -> Iterator[str]:
    """The texts of the instructions and of the first message of the user; the beginning of a plain prompt."""
    for name in _INSTRUCTIONS:
        yield from _texts(_decoded(call, name))
    for name in _MESSAGES:
        raw = bytes(call.fields[name]) if name in call.fields else b""
        if not raw.startswith(b"["):
            yield from _texts(decode_any(raw) if raw else None)
            continue
        for item in _raws.decode(raw):
            message = decode_any(bytes(item))
            if not isinstance(message, dict):
                return
            yield from _texts(message)
            if message.get("role", "user") == "user":
                return
    prompt = _decoded(call, "prompt")
    if isinstance(prompt, str) and prompt:
        yield prompt[:_MAX_PROMPT_CHARS]


def _decoded(call: Call, name: str) -> Any:  # Any: JSON of any shape
    return decode_any(bytes(call.fields[name])) if name in call.fields else None


def _texts(value: object) -> Iterator[str]:
    """The texts of a message, without marks such as ``cache_control``, which move from call to call.

    >>> list(_texts({"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]}))
    ['a']
    """
    if isinstance(value, str):
        if value and not value.startswith(_BILLING):
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for name in ("text", "content", "parts"):
            yield from _texts(value.get(name))
