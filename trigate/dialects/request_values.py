"""Reads the fields of a request, in any format: what becomes of each by the format's table, and plain values, with the
messages that say what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, cast

import msgspec

from trigate.errors import BadRequest, Untranslatable
from trigate.openai.raw_json import decode_strictly

Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""
Fate = Literal["translated", "dropped", "refused"]
"""``dropped``: advisory; its name is in ``x-trigate-dropped``. ``refused``: 400, unless it is null, false or empty."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")


def shown(name: object) -> str:
    """Returns a name that the client made up, if it looks like one, for a header or a message.

    >>> shown("input.new_field"), shown("a b")
    ('input.new_field', 'other')
    """
    return name if isinstance(name, str) and _NAME.match(name) else "other"


def decode_fields(
    fields: Mapping[str, msgspec.Raw],
    fates: Mapping[str, Fate],
    dropped: set[str],
    *,
    name_of: Callable[[str], str] = str,
    refused_if_empty: Collection[str] = (),
) -> Json:
    """Decodes those top-level fields of a request that are translated; one that is null is left out.

    Args:
        fates: What becomes of a field; one that is not in it is dropped.
        dropped: Takes the names of those that are dropped.
        name_of: The name in ``fates`` of a field, as the client may write it.
        refused_if_empty: The refused fields whose presence alone asks for something.

    Raises:
        BadRequest: A field cannot be decoded.
        Untranslatable: A field that is refused has a value.
    """
    values: Json = {}
    for given, raw in fields.items():
        if bytes(memoryview(raw)[:5]) == b"null":  # not the whole, which may be tens of MiB
            continue
        name = name_of(given)
        fate = fates.get(name, "dropped")
        if fate == "dropped":
            dropped.add(shown(name))
            continue
        try:
            value = decode_strictly(raw)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadRequest(f"{name} cannot be decoded: {error}.", param=name) from None
        if fate == "translated":
            values[name] = value
        elif value or name in refused_if_empty:
            raise Untranslatable(f"{name} cannot be translated to the format of the upstream.", param=name)
    return values


def an_object(values: Json, name: str, path: str = "") -> Json:
    """Returns a field that is an object; empty if it is absent or null. Raises BadRequest."""
    value = values.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(path, name, "an object")
    return value


def a_string(values: Json, name: str, path: str = "") -> str:
    """Returns a field that has to be a string. Raises BadRequest."""
    value = values.get(name)
    if not isinstance(value, str):
        raise _wrong(path, name, "a string")
    return value


def a_string_or_none(values: Json, name: str, path: str = "") -> str | None:
    """Returns a field that may be absent or null. Raises BadRequest."""
    return None if values.get(name) is None else a_string(values, name, path)


def a_list(values: Json, name: str, path: str = "") -> list[Any]:  # Any: JSON of any shape
    """Returns a field that is a list; empty if it is absent or null. Raises BadRequest."""
    value = values.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise _wrong(path, name, "a list")
    return value


def a_bool_or_none(values: Json, name: str) -> bool | None:
    """Returns a field that is true, false, absent or null. Raises BadRequest."""
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong("", name, "true or false")
    return value


def a_count_or_none(values: Json, name: str) -> int | None:
    """Returns a field that may be absent or null. Raises BadRequest."""
    value = values.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise _wrong("", name, "a whole number above 0")
    return value


def a_number_or_none(values: Json, name: str) -> float | None:
    """Returns a field that may be absent or null. Raises BadRequest."""
    value = values.get(name)
    if value is not None and type(value) not in (int, float):
        raise _wrong("", name, "a number")
    return cast("float | None", value)


def one_of(values: Json, name: str, known: tuple[str, ...], path: str = "") -> str | None:
    """Returns a field that is one of some strings, absent or null. Raises BadRequest."""
    value = values.get(name)
    if value is not None and value not in known:
        raise _wrong(path, name, f"one of {', '.join(known)}")
    return cast("str | None", value)


def _wrong(path: str, name: str, what: str) -> BadRequest:
    full = f"{path}.{name}" if path else name
    return BadRequest(f"{full} must be {what}.", param=full)
