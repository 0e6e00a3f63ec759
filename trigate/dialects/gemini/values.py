"""Reads the values of a request in Gemini's format, as Google's servers take them.

A name may be in camel case or in snake case, a number may be a string, and a list of one element may be the element
itself (the JSON mapping of Protocol Buffers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trigate.errors import BadRequest

Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""

_SNAKE = re.compile(r"(?<=.)_([a-z0-9])")


def camel(name: str) -> str:
    """Returns a name in camel case.

    >>> camel("system_instruction"), camel("topK"), camel("_responseJsonSchema")
    ('systemInstruction', 'topK', '_responseJsonSchema')
    """
    return _SNAKE.sub(lambda found: found[1].upper(), name) if "_" in name else name


def object_of(value: object, path: str) -> Json:
    """Returns an object with its names in camel case and without its nulls; empty for null.

    Raises:
        BadRequest: It is no object.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRequest(f"{path} must be an object.", param=path)
    return {camel(name): inner for name, inner in value.items() if inner is not None}


def list_of(value: object, path: str) -> list[Any]:  # Any: JSON of any shape
    """Returns a list; an object is a list of one element, null an empty one.

    Raises:
        BadRequest: It is neither.
    """
    if value is None:
        return []
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise BadRequest(f"{path} must be a list.", param=path)
    return value


def text_of(fields: Mapping[str, Any], name: str, path: str) -> str:
    """Returns a string. Raises BadRequest if it is none, or empty."""
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{path}.{name} must be a non-empty string.", param=f"{path}.{name}")
    return value


def whole(fields: Mapping[str, Any], name: str, path: str, *, least: int | None = None) -> int | None:
    """Returns a whole number, which may be written as a string or with a fraction of 0; None = it is missing.

    Raises:
        BadRequest: It is none, or below ``least``.

    >>> whole({"topK": 40.0, "seed": "7"}, "topK", "c"), whole({"seed": "7"}, "seed", "c"), whole({}, "seed", "c")
    (40, 7, None)
    """
    value = number(fields, name, path)
    if value is None:
        return None
    if value != int(value) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise BadRequest(f"{path}.{name} must be a whole number{bound}.", param=f"{path}.{name}")
    return int(value)


def number(fields: Mapping[str, Any], name: str, path: str) -> float | None:
    """Returns a number, which may be written as a string; None = it is missing. Raises BadRequest if it is none."""
    value: Any = fields.get(name)  # Any: JSON of any shape
    if value is None:
        return None
    if isinstance(value, str):
        value = _parsed(value)
    if type(value) not in (int, float) or not -1e18 < value < 1e18:  # also refuses nan
        raise BadRequest(f"{path}.{name} must be a number.", param=f"{path}.{name}")
    found: float = value
    return found


def _parsed(text: str) -> float | None:
    try:
        return int(text[:20]) if text.removeprefix("-").isdecimal() else float(text)
    except ValueError:
        return None


def strings(fields: Mapping[str, Any], name: str, path: str) -> tuple[str, ...]:
    """Returns a list of strings; empty = it is missing. Raises BadRequest if it is none."""
    value = fields.get(name)
    if isinstance(value, str):
        return (value,)
    found = list_of(value, f"{path}.{name}")
    if not all(isinstance(each, str) for each in found):
        raise BadRequest(f"{path}.{name} must be a list of strings.", param=f"{path}.{name}")
    return tuple(found)
