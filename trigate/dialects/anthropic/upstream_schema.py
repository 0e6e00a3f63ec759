"""JSON schemas as Anthropic takes them.

A schema that an answer or the arguments of a strict tool have to match may use a part of JSON Schema only, and every
object in it has to be closed. What is left out of a schema so is added to its description: the model then still knows
it, but nothing enforces it.

Source: Anthropic, "Structured outputs" ("JSON Schema limitations"); anthropic-sdk-python ``lib/_parse/_transform.py``
does the same to the schemas that it makes.
"""

from __future__ import annotations

from typing import Any

import msgspec

from trigate.dialects.vocabulary import Schema
from trigate.errors import Untranslatable

_KEPT = frozenset(
    ("$ref", "$defs", "definitions", "type", "description", "title", "enum", "const", "default", "required")
)
_FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid"))
_BY_NAME = ("properties", "$defs", "definitions")
_MAX_DEPTH = 100


def closed_schema(schema: Schema, path: str) -> Schema:
    """Returns a schema as one that Anthropic enforces.

    Args:
        path: Where the request has it, for messages.

    Raises:
        Untranslatable: It allows other fields than it names, by a schema of their own; or it is nested too deeply.

    >>> closed_schema({"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}}, "")["properties"]
    {'n': {'type': 'integer', 'description': '{"minimum":1}'}}
    """
    made: Schema = _closed(schema, path, 0)
    return made


def _closed(schema: Any, path: str, depth: int) -> Any:  # Any: JSON of any shape
    if not isinstance(schema, dict):
        return schema
    if depth > _MAX_DEPTH:
        raise Untranslatable(f"{path}: the schema is nested too deeply.", param=path)
    made: dict[str, Any] = {}
    left_out: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _BY_NAME and isinstance(value, dict):
            made[name] = {key: _closed(inner, path, depth + 1) for key, inner in value.items()}
        elif name in ("anyOf", "oneOf", "allOf") and isinstance(value, list):
            made["anyOf" if name == "oneOf" else name] = [_closed(inner, path, depth + 1) for inner in value]
        elif name == "items":
            made[name] = _closed(value, path, depth + 1)
        elif name == "additionalProperties":
            if isinstance(value, dict) and value:
                raise Untranslatable(
                    f"{path}: Anthropic enforces no schema with additionalProperties other than false.", param=path
                )
        elif name in _KEPT or (name == "format" and value in _FORMATS) or (name == "minItems" and value in (0, 1)):
            made[name] = value
        elif not name.startswith("$"):
            left_out[name] = value
    kind = made.get("type")
    if kind == "object" or "properties" in made or (isinstance(kind, list) and "object" in kind):
        made["additionalProperties"] = False
    if left_out:
        said = made.get("description")
        made["description"] = (f"{said}\n\n" if isinstance(said, str) and said else "") + msgspec.json.encode(
            left_out
        ).decode()
    return made


def tool_schema(schema: Schema, path: str) -> Schema:
    """Returns the schema of a tool's arguments: that of an object.

    Raises:
        Untranslatable: It is not one.

    >>> tool_schema({}, "tools[0]")
    {'type': 'object', 'properties': {}}
    """
    for name in ("oneOf", "anyOf", "allOf"):
        if name in schema:
            raise Untranslatable(f"{path}: Anthropic takes no {name} at the top of a tool's schema.", param=path)
    kind = schema.get("type", "object")
    if kind != "object":
        raise Untranslatable(f"{path}: the type of a tool's arguments must be object.", param=path)
    return {"type": "object", "properties": {}, **schema}
