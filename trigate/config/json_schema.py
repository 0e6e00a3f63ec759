"""The JSON Schema of the configuration file: what an editor needs to complete and check ``trigate.toml``.

It is made of the sections' classes, so a new setting is in it without a line here. The sentences about the settings are
those under their fields in the sources. It knows types, ranges and names; what values must go together (an upstream's
kind and its settings, a model and its targets) only `trigate check` knows.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

import attrs

from trigate.config.key_sections import Instant, KeyConfig, MicroUsd, Tokens
from trigate.config.secrets import Secret
from trigate.config.sections import Config
from trigate.config.structure import SECTIONS
from trigate.config.values import Count, Limit, Origin, Port, ProxyUrl, Rate, Seconds, Share, Size, Url

Json = dict[str, Any]  # Any: JSON of any shape

_TEXT: Json = {"type": "string"}
_SECONDS: Json = {"type": "number", "minimum": 0, "exclusiveMaximum": 1e9}
_SECRET: Json = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        *(
            {"type": "object", "required": [name], "properties": {name: _TEXT}, "additionalProperties": False}
            for name in ("env", "file")
        ),
    ]
}
_KINDS: Mapping[Any, Json] = {  # Any: a type, or a NewType, which is none
    Seconds: _SECONDS,
    Rate: _SECONDS,
    Share: {"type": "number", "minimum": 0, "maximum": 1},
    Size: {"type": "integer", "minimum": 1, "maximum": 2**40},
    Count: {"type": "integer", "minimum": 1, "maximum": 10**6},
    Limit: {"type": "integer", "minimum": 0, "maximum": 10**6},
    Tokens: {"type": "integer", "minimum": 0, "maximum": 10**12},
    Port: {"type": "integer", "minimum": 0, "maximum": 65535},
    MicroUsd: {"type": ["number", "string"], "minimum": 0, "maximum": 1e9},
    Instant: {"type": ["number", "string"]},
    Url: {"type": "string", "pattern": "^https?://"},
    Origin: {"type": "string", "pattern": r"^\*$|://"},
    ProxyUrl: {"type": "string", "pattern": "^direct$|^https?://"},
    Secret: _SECRET,
    str: _TEXT,
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    Any: {},
}
"""The same ranges as in `trigate.config.converter`."""


def schema() -> Json:
    """Returns the schema, in draft 7: the one that editors know."""
    hints = typing.get_type_hints(Config)
    properties = {name: _section(hints[name]) for name in SECTIONS}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "trigate.toml",
        "description": "The configuration of Trigate.",
        "type": "object",
        "required": ["upstreams"],
        "additionalProperties": False,
        "properties": properties,
    }


def _section(kind: Any) -> Json:
    made = _of(kind)
    inner = next((each for each in typing.get_args(kind) if each is not type(None)), kind)
    named = [each for each in (kind, *typing.get_args(kind), *typing.get_args(inner)) if attrs.has(each)]
    if named and (text := _plain(inspect.getdoc(named[0]) or "")):
        made = {"description": text, **made}
    return made


def _of(kind: Any) -> Json:
    """The schema of a type."""
    if kind in _KINDS:
        return dict(_KINDS[kind])
    if kind is KeyConfig:  # ``NAME = secret`` is short for a table
        return {"anyOf": [_SECRET, table(kind)]}
    if attrs.has(kind):
        return table(kind)
    if isinstance(kind, typing.NewType):
        return _of(kind.__supertype__)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _of(arguments[0])}
    if origin in (Union, types.UnionType):  # TOML has no null: None means that the setting is left out
        members = [_of(each) for each in arguments if each is not type(None)]
        return members[0] if len(members) == 1 else {"anyOf": members}
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return {"type": "object", **_entries(*arguments)}
    return {}


def _entries(key: Any, value: Any) -> Json:
    """What the keys and the values of a table are."""
    names = {"propertyNames": _of(key)} if typing.get_origin(key) is Literal else {}
    return {**names, "additionalProperties": _of(value)}


def table(kind: Any) -> Json:
    """The schema of a section's class."""
    hints, texts = typing.get_type_hints(kind), _texts(kind)
    properties: Json = {}
    for field in attrs.fields(kind):
        properties[field.name] = {"description": texts[field.name]} if field.name in texts else {}
        properties[field.name] |= _of(hints[field.name])
        if isinstance(field.default, str | int | float) and hints[field.name] is not MicroUsd:
            properties[field.name]["default"] = field.default
    required = [field.name for field in attrs.fields(kind) if field.default is attrs.NOTHING]
    return {
        "type": "object",
        "additionalProperties": False,
        **({"required": required} if required else {}),
        "properties": properties,
    }


@functools.cache
def _texts(kind: type) -> dict[str, str]:
    """The sentences under the fields of a class and its bases; nothing where there are no sources."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__[:-1]):
        try:
            tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(words))),
                ):
                    found[name] = _plain(words)
    return found


def _plain(text: str) -> str:
    """A docstring as a line of text.

    >>> _plain("``[server]``: where\\n    to listen.")
    '[server]: where to listen.'
    """
    return re.sub(r"`+", "", " ".join(text.split()))
