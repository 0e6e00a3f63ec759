"""The JSON Schema of the configuration: it accepts what the gateway accepts, and refuses what it can refuse."""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from trigate.config import json_schema, structure
from trigate.config.sections import ConfigError, ServerConfig, UpstreamConfig

SCHEMA = json_schema.schema()
DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = [
    pytest.param(found[1], id=f"{page.stem}:{number}")
    for page in sorted(DOCS.rglob("*.md"))
    for number, found in enumerate(re.finditer(r"^```toml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S))
]
TYPES = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict}


def _is_valid(value: Any, schema: Mapping[str, Any]) -> bool:  # Any: JSON
    """Whether a value has a schema, as far as the keywords go that `json_schema` uses."""
    assert set(schema) <= {
        *("$schema", "title", "description", "default", "type", "required", "additionalProperties", "properties"),
        *("anyOf", "enum", "items", "minimum", "maximum", "exclusiveMaximum", "minLength", "pattern", "propertyNames"),
    }
    if isinstance(value, datetime.datetime):  # for JSON Schema, a text
        value = value.isoformat()
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(
        isinstance(value, TYPES[kind]) and (kind == "boolean" or type(value) is not bool)  # type: ignore[arg-type]
        for kind in kinds
    ):
        return False
    if "anyOf" in schema and not any(_is_valid(value, each) for each in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        return (
            set(schema.get("required", ())) <= set(value)
            and all(_is_valid(name, schema.get("propertyNames", {})) for name in value)
            and all(_is_valid(each, known[name]) for name, each in value.items() if name in known)
            and all(
                others is not False and _is_valid(each, others) for name, each in value.items() if name not in known
            )
        )
    if isinstance(value, list):
        return all(_is_valid(each, schema.get("items", {})) for each in value)
    if isinstance(value, str):
        return len(value) >= schema.get("minLength", 0) and bool(re.search(schema.get("pattern", ""), value))
    if isinstance(value, int | float) and type(value) is not bool:
        above, below = value >= schema.get("minimum", value), value <= schema.get("maximum", value)
        return above and below and not value >= schema.get("exclusiveMaximum", value + 1)
    return True


def test_it_has_every_section_and_setting() -> None:
    """Each section is in it, and each setting of an upstream with its sentence and its default."""
    assert list(SCHEMA["properties"]) == list(structure.SECTIONS)
    upstream = SCHEMA["properties"]["upstreams"]["additionalProperties"]
    assert list(upstream["properties"]) == [field.name for field in attrs.fields(UpstreamConfig)]
    assert upstream["properties"]["think_tags"] == {
        "description": "The text of its answers begins with their reasoning, between <think> and </think>.",
        "type": "boolean",
        "default": False,
    }
    server = SCHEMA["properties"]["server"]
    assert list(server["properties"]) == [field.name for field in attrs.fields(ServerConfig)]
    assert server["additionalProperties"] is False
    assert server["description"]


@pytest.mark.parametrize("body", EXAMPLES)
def test_examples_have_it(body: str) -> None:
    """Each example of the documentation has the schema."""
    document = tomllib.loads(body)
    assert _is_valid({"upstreams": {}, **document}, SCHEMA)


@pytest.mark.parametrize(
    "body",
    [
        "server.port = '1'",
        "server.port = 65536",
        "server.hots = 'a'",
        "nonsense = {}",
        "server = 1",
        "limits.idle_timeout_s = -1",
        "limits.max_exchanges = 1.5",
        "breaker.failure_rate = 1.1",
        "upstreams.a.kind = 'x'",
        "upstreams.a.base_url = 'a.example'",
        "upstreams.a.models = 'all'",
        "upstreams.a.models = [1]",
        "upstreams.a.api_key = {envv = 'A'}",
        "models.a = ['x/y']",
        "models.a = {}",
        "models.a = {targets = ['a/b'], on = ['x']}",
        "keys.a = {rpm = 1}",
        "keys.a = {secret = 'x', rpm = 'many'}",
        "groups.a.budgets = {year = 1}",
        "channels.a = {type = 'irc', token = 'x'}",
    ],
)
def test_what_is_refused(body: str) -> None:
    """Types, ranges, names, and what is missing: the gateway refuses it, and so does the schema."""
    document = tomllib.loads(body)
    assert not _is_valid({"upstreams": {}, **document}, SCHEMA)
    with pytest.raises(ConfigError):
        structure.structure(document, env={}, source="test")


@pytest.mark.parametrize("text", ["'a secret'", "{env = 'A'}", "{file = '/a'}", "{secret = {env = 'A'}, rpm = 5}"])
def test_secrets(text: str) -> None:
    """A key is a secret in each of its forms, or a table with one."""
    assert _is_valid({"upstreams": {}, **tomllib.loads(f"keys.a = {text}")}, SCHEMA)
