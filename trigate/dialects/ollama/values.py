"""Reads the values of a request, and says what is wrong with one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import msgspec

from trigate.dialects.ollama.fields import Fate
from trigate.errors import BadRequest, Untranslatable
from trigate.openai.raw_json import decode_any, decode_strictly
from trigate.openai.request import Call

Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")


def decode_fields(fields: Mapping[str, msgspec.Raw], fates: Mapping[str, Fate], dropped: set[str]) -> Json:
    """Decodes those fields of a request that are translated; one that is null is left out.

    Args:
        dropped: Takes the names of those that are dropped.

    Raises:
        BadRequest: A field cannot be decoded.
        Untranslatable: A field that is refused has a value.
    """
    values: Json = {}
    for name, raw in fields.items():
        fate = fates.get(name, "dropped")
        if bytes(memoryview(raw)[:5]) == b"null":
            continue
        if fate == "dropped":
            dropped.add(shown(name))
            continue
        try:
            value = decode_strictly(raw)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadRequest(f"{name} cannot be decoded: {error}.", param=name) from None
        if fate == "translated":
            values[name] = value
        elif value:
            raise Untranslatable(f"{name} cannot be translated to the format of the upstream.", param=name)
    return values


def asked_model(call: Call) -> str:
    """Returns the model's name as the client has it: with the tag, or without it."""
    return str(decode_any(bytes(call.fields["model"])))


def shown(name: str) -> str:
    """A name that the client made up is repeated only if it looks like one."""
    return name if _NAME.match(name) else "other"


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
