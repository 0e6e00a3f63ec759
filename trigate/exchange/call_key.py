"""Decides whether two calls are equal, so that they can share one answer. Pure.

Two calls are equal if a provider cannot tell them apart: they have the same endpoint, the same headers that go
upstream, and the same body as JSON. In doubt they are different: that costs one more upstream call, whereas a false
match would give a client the answer to another call.

* White space and the spelling of a string (``\\u0041``) do not count. The order of keys does not count at the top level
  and within messages. Within every other field it counts: a provider writes the fields of structured output in the
  order of the JSON schema.
* Numbers are compared as they are written: ``0.10`` and ``0.1`` differ. Parsers disagree about a key that occurs twice
  in an object, so a call with such a key is equal to no other.
* A large body is compared byte by byte: parsing it as JSON would block the event loop.
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

_UNORDERED_FIELDS = ("messages", "input")
_PER_REQUEST_HEADERS = ("x-request-id", "traceparent", "tracestate", "baggage")

_DETERMINISTIC_PATHS = ("/embeddings", "/moderations")
"""Endpoints whose answers are deterministic, whatever their parameters are."""

_SIDE_EFFECT_FIELDS = (
    "tools",
    "functions",
    "mcp_servers",
    "plugins",
    "web_search_options",
    "background",
    "conversation",
)
"""Fields of a call that may have other effects than an answer: the client or the provider executes something, or the
provider stores something. Such calls must not be merged."""


def call_key_of(call: Call, headers: Mapping[str, str], *, sampled: bool) -> bytes | None:
    """Returns the digest that equal calls have in common.

    Args:
        headers: Those that go upstream.
        sampled: Whether sampled (not deterministic) answers may be shared as well.

    Returns:
        None = the call must have an answer of its own.
    """
    if _has_side_effects(call) or not (sampled or is_deterministic(call)):
        return None
    body = canonical(call.body) if len(call.body) <= MAX_JSON_BYTES else call.body
    if body is None:
        return None
    sent = sorted((name, value) for name, value in headers.items() if name not in _PER_REQUEST_HEADERS)
    return hashlib.sha256(msgspec.json.encode([call.endpoint.path, sent]) + b"\n" + body).digest()


def is_deterministic(call: Call) -> bool:
    """Whether the client expects equal calls to get equal answers: the call has ``temperature: 0`` or a seed."""
    if call.endpoint.path in _DETERMINISTIC_PATHS:
        return True
    temperature, seed = _value(call, "temperature"), _value(call, "seed")
    return (type(temperature) in (int, float) and temperature == 0) or type(seed) is int


def _has_side_effects(call: Call) -> bool:
    if any(_value(call, name) for name in _SIDE_EFFECT_FIELDS):
        return True
    # The responses API stores an answer, which later calls can continue, unless ``store`` is false.
    return bool(_value(call, "store", call.endpoint.path == "/responses"))


def _value(call: Call, name: str, default: object = None) -> Any:  # Any: JSON of any shape
    raw = call.fields.get(name)
    if raw is None or bytes(raw) == b"null":
        return default
    return decode_any(bytes(raw))


def canonical(body: bytes) -> bytes | None:
    """Returns the canonical form of a JSON object, which is the same for equal objects; None = it is ambiguous.

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
            parse_constant=_refuse_constant,
        )
        parts = [
            msgspec.json.encode(name)
            + b":"
            + msgspec.json.encode(fields[name], order="sorted" if name in _UNORDERED_FIELDS else None)
            for name in sorted(fields)
        ]
    except (ValueError, RecursionError):  # also UnicodeError
        return None
    return b"{" + b",".join(parts) + b"}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON of any shape
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key occurs twice")
    return fields


def _number(text: str) -> msgspec.Raw:
    return msgspec.Raw(text.encode())


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
