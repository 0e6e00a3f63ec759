"""Reads the values of a request, and says what is wrong with one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from trigate.errors import BadRequest
from trigate.openai.raw_json import decode_any
from trigate.openai.request import Call

Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


def asked_model(call: Call) -> str:
    """Returns the model's name as the client has it: with the tag, or without it."""
    return str(decode_any(bytes(call.fields["model"])))


def text_at(value: Mapping[str, Any], name: str, path: str) -> str:
    """Returns a text that may be absent or null."""
    found = value.get(name)
    if found is None:
        return ""
    if not isinstance(found, str):
        raise BadRequest(f"{path} must be a string.", param=path)
    return found


def number_at(value: Mapping[str, Any], name: str, path: str) -> float | None:
    """Returns a number that may be absent or null."""
    found = value.get(name)
    if found is None:
        return None
    if type(found) not in (int, float):
        raise BadRequest(f"{path} must be a number.", param=path)
    return cast("float", found)


def whole_at(value: Mapping[str, Any], name: str, path: str) -> int | None:
    """Returns a whole number that may be absent or null. Ollama takes ``3.0`` for one as well."""
    found = number_at(value, name, path)
    if found is None:
        return None
    if int(found) != found:
        raise BadRequest(f"{path} must be a whole number.", param=path)
    return int(found)


def list_at(value: Mapping[str, Any], name: str, path: str) -> list[Any]:  # Any: JSON of any shape
    """Returns a list that may be absent or null."""
    found = value.get(name)
    if found is None:
        return []
    if not isinstance(found, list):
        raise BadRequest(f"{path} must be a list.", param=path)
    return found
