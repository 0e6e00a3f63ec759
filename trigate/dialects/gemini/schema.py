"""Turns Google's ``Schema``, a part of OpenAPI 3.0 with names of types in upper case, into a JSON schema."""

from __future__ import annotations

from typing import Any

from trigate.dialects.gemini.values import Json, camel
from trigate.errors import BadRequest

_MAX_DEPTH = 100
_COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength")
_SAME = ("title", "description", "pattern", "minimum", "maximum", "default", "required", "enum", "format")
_SCHEMAS = ("items", "additionalProperties")
_LISTS = ("anyOf", "prefixItems")


def json_schema(value: object, path: str, depth: int = 0) -> Json:
    """Returns the JSON schema that says the same.

    What a JSON schema says in another way is kept as well, since clients write both.

    Raises:
        BadRequest: It is no schema.

    >>> json_schema({"type": "ARRAY", "items": {"type": "STRING", "nullable": True}, "min_items": "1"}, "s")
    {'type': 'array', 'items': {'type': ['string', 'null']}, 'minItems': 1}
    """
    if not isinstance(value, dict):
        raise BadRequest(f"{path} must be an object.", param=path)
    if depth > _MAX_DEPTH:
        raise BadRequest(f"{path} is nested too deeply.", param=path)
    found: Json = {}
    for given, inner in value.items():
        name = given if given.startswith("$") else camel(given)
        if inner is None:
            continue
        if name == "type":
            found["type"] = _type(inner)
        elif name == "properties" and isinstance(inner, dict):
            found["properties"] = {
                key: json_schema(each, f"{path}.properties.{key[:50]}", depth + 1) for key, each in inner.items()
            }
        elif name in _SCHEMAS and isinstance(inner, dict):
            found[name] = json_schema(inner, f"{path}.{name}", depth + 1)
        elif name in _LISTS and isinstance(inner, list):
            found[name] = [json_schema(each, f"{path}.{name}[{at}]", depth + 1) for at, each in enumerate(inner)]
        elif name in _COUNTS:
            found[name] = int(inner) if isinstance(inner, str) and inner.isdigit() else inner
        elif name == "example":
            found["examples"] = [inner]
        elif name == "format" and inner == "enum":  # Google's word for a string with an enum
            continue
        elif name not in ("nullable", "propertyOrdering"):
            found[name if name in _SAME else given] = inner
    if value.get("nullable") is True:
        _allow_null(found)
    return found


def _type(value: object) -> Any:  # Any: a name or a list of names
    if isinstance(value, str):
        return value.lower()
    return [each.lower() if isinstance(each, str) else each for each in value] if isinstance(value, list) else value


def _allow_null(schema: Json) -> None:
    kind = schema.get("type")
    if isinstance(kind, str):
        schema["type"] = [kind, "null"]
    elif isinstance(schema.get("anyOf"), list):
        schema["anyOf"] = [*schema["anyOf"], {"type": "null"}]
    if isinstance(schema.get("enum"), list) and None not in schema["enum"]:
        schema["enum"] = [*schema["enum"], None]
