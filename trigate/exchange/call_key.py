"""Whether two calls are the same one, so that one answer will do for both. Pure.

Two calls are the same if a provider could not tell them apart: the same endpoint, the same headers that go upstream,
and the same body as JSON. What is not certain to be the same counts as different: that costs a call, and nobody gets
what he has not asked for.

* White space and the way in which a string is written (``\\u0041``) do not count. Nor does the order of the keys at the
  top level and within messages. Within every other field it does: a provider writes the fields of structured output in
  the order of the JSON schema.
* A number is what it is written as: ``0.10`` and ``0.1`` are two. A key that stands twice means something else to each
  reader: such a call is like no other.
* Of a large body the bytes count as they are. To read it as JSON would hold up everything else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from trigate.openai.raw_json import decode_any
from trigate.openai.request import Call

MAX_JSON_BYTES = 64 * 1024
"""Up to this size, bodies are compared as JSON."""

_ORDERLESS = ("messages", "input")
_OF_ONE_REQUEST = ("x-request-id", "traceparent", "tracestate")

_EXACT = ("/embeddings", "/moderations")
"""Endpoints where nothing is drawn by chance, whatever the parameters say."""

_ACTS = ("tools", "functions", "mcp_servers", "plugins", "web_search_options", "background", "conversation")
"""Fields of a call from which more may come than an answer: something is executed, here or there, or is left behind at
the provider. Each of two such calls is meant."""


def call_key_of(call: Call, headers: Mapping[str, str], *, sampled: bool) -> bytes | None:
    """What a call has in common with those that may share its answer.

    Args:
        headers: Those that go upstream.
        sampled: An answer that is drawn by chance may be shared as well.

    Returns:
        A digest; None where the call is to have an answer of its own.
    """
    if _acts(call) or not (sampled or is_deterministic(call)):
        return None
    body = canonical(call.body) if len(call.body) <= MAX_JSON_BYTES else call.body
    if body is None:
        return None
    sent = sorted((name, value) for name, value in headers.items() if name not in _OF_ONE_REQUEST)
    return hashlib.sha256(msgspec.json.encode([call.endpoint.path, sent]) + b"\n" + body).digest()


def is_deterministic(call: Call) -> bool:
    """Whether the client expects the same call to bring the same answer: it says ``temperature: 0``, or a seed."""
    if call.endpoint.path in _EXACT:
        return True
    temperature, seed = _value(call, "temperature"), _value(call, "seed")
    return (type(temperature) in (int, float) and temperature == 0) or type(seed) is int


def _acts(call: Call) -> bool:
    if any(_value(call, name) for name in _ACTS):
        return True
    # of the responses API an answer is kept, and can be gone on with, unless the call says otherwise
    return bool(_value(call, "store", call.endpoint.path == "/responses"))


def _value(call: Call, name: str, default: object = None) -> Any:  # Any: JSON of any shape
    raw = call.fields.get(name)
    if raw is None or bytes(raw) == b"null":
        return default
    return decode_any(bytes(raw))


def canonical(body: bytes) -> bytes | None:
    """Writes a JSON object in the one form that all that mean the same have; None where its meaning is not certain.

    >>> canonical(b'{"temperature": 0, "messages": [{"role": "user", "content": "\\\\u0041"}]}')
    b'{"messages":[{"content":"A","role":"user"}],"temperature":0}'
    >>> canonical(b'{"format": {"b": 1.0, "a": 1e0}}')
    b'{"format":{"b":1.0,"a":1e0}}'
    >>> canonical(b'{"seed": 1, "seed": 2}') is None
    True
    """
    try:
        fields = json.loads(
            body,
            object_pairs_hook=_object,
            parse_int=_number,
            parse_float=_number,
            parse_constant=_no_constant,
        )
        parts = [
            msgspec.json.encode(name)
            + b":"
            + msgspec.json.encode(fields[name], order="sorted" if name in _ORDERLESS else None)
            for name in sorted(fields)
        ]
    except (ValueError, RecursionError):  # also UnicodeError
        return None
    return b"{" + b",".join(parts) + b"}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON of any shape
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key stands twice")
    return fields


def _number(text: str) -> msgspec.Raw:
    return msgspec.Raw(text.encode())


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")
