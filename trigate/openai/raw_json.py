"""JSON objects whose fields stay as the bytes that were received.

An object is split into its top-level fields, each a `msgspec.Raw` of its bytes, and joined again. Only what the gateway
acts on is decoded, so numbers of any size, unknown fields and their order pass through untouched.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from trigate.errors import BadRequest

_SMALL_BYTES = 1024 * 1024
_MODEL_KEY = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*')
_HEX = rb"[0-9a-fA-F]"
_ESCAPES = re.compile(  # a pair, half a pair, any other escape
    rb"\\u[dD][89abAB]%b{2}\\u[dD][c-fC-F]%b{2}|\\u([dD][89a-fA-F]%b{2})|\\." % (_HEX, _HEX, _HEX), re.DOTALL
)
_INVALID = re.compile(r"invalid character \(byte ([0-9]+)\)")
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_any_decoder = msgspec.json.Decoder()

split_fields = _fields_decoder.decode
"""Splits a JSON object into its top-level fields. Raises msgspec.DecodeError or RecursionError. Text inside a field is
not checked to be UTF-8."""
decode_strictly = _any_decoder.decode
"""Decodes JSON of any shape. Raises msgspec.DecodeError or RecursionError."""


def split_client_fields(data: bytes, *, is_text: bool = False) -> tuple[bytes, dict[str, msgspec.Raw]]:
    """Splits a client's JSON object into its top-level fields.

    Accepts what RFC 8259 lets a receiver accept: a byte order mark, which is removed (8.1), and halves of characters
    (`with_whole_characters`).

    Args:
        is_text: It is known to be UTF-8.

    Returns:
        The object as it may be stored and sent on, and its fields.

    Raises:
        BadRequest: It is not UTF-8.
        msgspec.DecodeError, RecursionError: It is not a JSON object.
    """
    if is_text:
        data = data.removeprefix(codecs.BOM_UTF8)
    elif not data.isascii():
        data = _as_utf8(data)
    try:
        return data, split_fields(data)
    except msgspec.DecodeError:
        data = with_whole_characters(data)
        return data, split_fields(data)


def decode_client(data: bytes) -> Any:  # Any: JSON of any shape
    """Decodes a client's JSON. Accepts and raises what `split_client_fields` does."""
    if not data.isascii():
        data = _as_utf8(data)
    try:
        return _any_decoder.decode(data)
    except msgspec.DecodeError:
        return _any_decoder.decode(with_whole_characters(data))


def problem_of(error: msgspec.DecodeError, data: bytes) -> str:
    """Returns what is wrong with JSON that could not be decoded, and where.

    >>> try:
    ...     decode_client(b'{"a": "b\\n"}')
    ... except msgspec.DecodeError as error:
    ...     problem_of(error, b'{"a": "b\\n"}')
    'the control character U+000A must be escaped (byte 8)'
    """
    found = _INVALID.search(str(error))
    if found is not None and int(found[1]) < len(data) and data[int(found[1])] < 0x20:
        return f"the control character U+{data[int(found[1])]:04X} must be escaped (byte {found[1]})"
    return str(error)


def _as_utf8(data: bytes) -> bytes:
    try:
        data.decode()  # a Raw field is not validated
    except UnicodeDecodeError as error:
        raise not_utf8(data, error.reason, error.start) from None
    return data.removeprefix(codecs.BOM_UTF8)


def not_utf8(data: bytes, reason: str, at: int) -> BadRequest:
    """Makes the error for a body that is not UTF-8."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return BadRequest("The body is not UTF-8, but UTF-16. Send it as UTF-8.")
    return BadRequest(f"The body is not UTF-8: {reason} at byte {at}.")


def with_whole_characters(data: bytes) -> bytes:
    """Replaces each escape that is half of a character by that of U+FFFD; the size stays.

    JSON's grammar allows ``\\ud83d`` without the other half (RFC 8259, 8.2), and programs that cut text within an emoji
    send it. But it stands for no text: strict parsers refuse it, and it cannot be encoded in UTF-8.

    >>> with_whole_characters(rb'"\\ud83d\\ude00 \\ud83d \\\\ud83d"')
    b'"\\\\ud83d\\\\ude00 \\\\ufffd \\\\\\\\ud83d"'
    """
    if b"\\ud" not in data and b"\\uD" not in data:
        return data
    return _ESCAPES.sub(lambda found: rb"\ufffd" if found[1] else found[0], data)


def split_provider_fields(data: bytes) -> dict[str, msgspec.Raw]:
    """Splits a provider's JSON object into its top-level fields.

    Unlike `split_fields`, checks that all of it is UTF-8, and accepts lone surrogates, which some providers send where
    they split an emoji.

    Raises:
        ValueError, RecursionError: It is not a JSON object in UTF-8.
    """
    if not data.isascii():
        data.decode()  # a Raw field is not validated
    try:
        return split_fields(data)
    except (ValueError, RecursionError):
        value = decode_any(data) if b"\\ud" in data.lower() else None
        if not isinstance(value, dict):
            raise
        return {name: msgspec.Raw(json.dumps(field).encode()) for name, field in value.items()}


def decode_any(data: bytes) -> Any:  # Any: JSON of any shape
    """Decodes JSON; None if it is not valid JSON."""
    try:
        return _any_decoder.decode(data)
    except (ValueError, RecursionError):
        pass
    try:  # slower, but accepts the lone surrogates that some providers send where they split an emoji
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def join_fields(fields: Mapping[str, msgspec.Raw], model: bytes | None = None) -> bytes:
    """Joins fields to an object; ``model``, as JSON, replaces the value of the field of that name."""
    parts: list[bytes | msgspec.Raw] = []
    for name, value in fields.items():
        new = model if name == "model" and model is not None else value
        parts += (b"," if parts else b"{", msgspec.json.encode(name), b":", new)
    return b"".join([*parts, b"}"]) if parts else b"{}"  # one copy: a field may be tens of MiB


def with_model(data: bytes, fields: Mapping[str, msgspec.Raw], model: bytes, *, model_at: int | None = None) -> bytes:
    """Returns an object with another ``model``, given as JSON. Every other byte stays if `find_model` finds it; if not,
    the object is joined again from its fields.

    Args:
        data: The object.
        fields: Its fields; they include ``model``.
        model: The new value, as JSON.
        model_at: What `find_model` has returned; None = it is asked now.

    >>> with_model(b'{"model" : "a", "n": 1.0}', {"model": msgspec.Raw(b'"a"'), "n": msgspec.Raw(b"1.0")}, b'"b"')
    b'{"model" : "b", "n": 1.0}'
    """
    raw = bytes(fields["model"])
    at = find_model(data, raw) if model_at is None else model_at
    if at < 0:
        return join_fields(fields, model)
    if len(data) <= _SMALL_BYTES:
        return data[:at] + model + data[at + len(raw) :]
    view = memoryview(data)  # copied once, not three times
    return b"".join((view[:at], model, view[at + len(raw) :]))


def find_model(data: bytes, raw: bytes) -> int:
    """Returns where the value of ``model``, whose bytes are ``raw``, begins in an object; -1 if that cannot be told.

    Inside a JSON string every quote is escaped. So if an object has the key, the bytes ``"model"`` occur in it only
    once, and no letter of the key is written as an escape (``\\u006d``), then those bytes are the key.
    """
    if has_plain_model_key(data):
        key = _MODEL_KEY.search(data)
        if key is not None and data.startswith(raw, key.end()):
            return key.end()
    return -1


def has_plain_model_key(data: bytes) -> bool:
    """Whether the bytes ``"model"`` occur exactly once, and no letter of it can be written as an escape."""
    return data.count(b'"model"') == 1 and b"\\u006" not in data
