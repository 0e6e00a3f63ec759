"""JSON objects whose fields stay as the bytes that were received."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

_MODEL_KEY = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*')


_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


_any = msgspec.json.Decoder()


def _with_model(data: bytes, fields: Mapping[str, msgspec.Raw], model: bytes) -> bytes:
    """An object with another ``model``, given as JSON; every other byte stays.

    Inside a JSON string every quote is escaped. So where an object has the key, the bytes ``"model"`` stand in it only
    once, and no letter of it is written as an escape (``\\u006d``), those bytes are the key. Everywhere else the object
    is put together again of its fields.

    >>> _with_model(b'{"model" : "a", "n": 1.0}', {"model": msgspec.Raw(b'"a"'), "n": msgspec.Raw(b"1.0")}, b'"b"')
    b'{"model" : "b", "n": 1.0}'
    """
    if _has_plain_model_key(data):
        key = _MODEL_KEY.search(data)
        raw = bytes(fields["model"])
        if key is not None and data.startswith(raw, key.end()):
            return data[: key.end()] + model + data[key.end() + len(raw) :]
    return _join(fields, model)


def _has_plain_model_key(data: bytes) -> bool:
    return data.count(b'"model"') == 1 and b"\\u006" not in data


def _join(fields: Mapping[str, msgspec.Raw], model: bytes | None) -> bytes:
    """Writes an object of its fields; ``model``, as JSON, takes the place of the one in it."""
    parts = [
        msgspec.json.encode(name) + b":" + (model if name == "model" and model is not None else bytes(value))
        for name, value in fields.items()
    ]
    return b"{" + b",".join(parts) + b"}"


def decode_any(data: bytes) -> Any:  # Any: JSON of any shape
    """Reads JSON; None where it is none."""
    try:
        return _any.decode(data)
    except (ValueError, RecursionError):
        pass
    try:  # slower, and takes the half surrogate pairs that some providers send where they cut an emoji
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
