"""Decodes a request in Anthropic's format. `fields` says what becomes of each field; `content` decodes the messages.

The names of dropped fields are sorted, each once. A name that the client made up is repeated only if it looks like one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import msgspec

from trigate.dialects.anthropic.content import ContentDecoder
from trigate.dialects.anthropic.fields import FIELDS
from trigate.dialects.request_values import Json, a_count_or_none, a_number_or_none, an_object, decode_fields, shown
from trigate.dialects.vocabulary import Effort, Request, Schema, Tool, ToolChoice
from trigate.errors import BadRequest, Untranslatable

_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_CHOICES = {"auto": "auto", "any": "required", "none": "none", "tool": "tool"}


def decode_request(fields: Mapping[str, msgspec.Raw]) -> tuple[Request, tuple[str, ...]]:
    """Decodes a request.

    Args:
        fields: Its top-level fields.

    Returns:
        The request, and the names of the advisory fields that the vocabulary has no place for.

    Raises:
        BadRequest: A field is malformed; ``param`` names it.
        Untranslatable: A field cannot be expressed; ``param`` names it.
    """
    dropped: set[str] = set()
    values = decode_fields(fields, FIELDS, dropped)
    content = ContentDecoder(dropped)
    messages = content.messages(values.get("system"), values["messages"])
    thinking = an_object(values, "thinking")
    config = an_object(values, "output_config")
    tools = _tools(values.get("tools"), dropped)
    choice, parallel = _tool_choice(an_object(values, "tool_choice"), tools)
    effort = _effort(thinking, config, dropped)
    return (
        Request(
            messages=messages,
            max_tokens=a_count_or_none(values, "max_tokens"),
            stream=values.get("stream") is True,
            temperature=a_number_or_none(values, "temperature"),
            top_p=a_number_or_none(values, "top_p"),
            top_k=a_count_or_none(values, "top_k"),
            stop=_strings(values, "stop_sequences"),
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=parallel,
            effort=effort,
            wants_reasoning=thinking.get("type") in ("enabled", "adaptive"),
            schema=_schema(config, dropped),
            user=_user(an_object(values, "metadata"), dropped),
        ),
        tuple(sorted(dropped)),
    )


# -- plain values -----------------------------------------------------------------------------------------------------


def _strings(values: Json, name: str) -> tuple[str, ...]:
    value = values.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise BadRequest(f"{name} must be a list of strings.", param=name)
    return tuple(value)


# -- tools ------------------------------------------------------------------------------------------------------------


def _tools(value: object, dropped: set[str]) -> tuple[Tool, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadRequest("tools must be a list.", param="tools")
    tools = []
    for at, tool in enumerate(value):
        path = f"tools[{at}]"
        if not isinstance(tool, dict):
            raise BadRequest(f"{path} must be an object.", param=path)
        kind = tool.get("type")
        if kind not in (None, "custom"):  # Anthropic runs it, or it has a schema that only its models know
            dropped.add(f"tools.{shown(str(kind))}")
            continue
        if tool.get("defer_loading"):  # its schema is loaded later, by a tool of Anthropic's
            dropped.add("tools.defer_loading")
            continue
        dropped.update(f"tools.{shown(name)}" for name in tool.keys() - _TOOL)
        name, description, schema = tool.get("name"), tool.get("description"), tool.get("input_schema")
        if not isinstance(name, str) or not name:
            raise BadRequest(f"{path}.name must be a non-empty string.", param=f"{path}.name")
        if not isinstance(schema, dict):
            raise BadRequest(f"{path}.input_schema must be an object.", param=f"{path}.input_schema")
        if description is not None and not isinstance(description, str):
            raise BadRequest(f"{path}.description must be a string.", param=f"{path}.description")
        strict = tool.get("strict")
        tools.append(Tool(name, description, schema, strict if isinstance(strict, bool) else None))
    return tuple(tools)


_TOOL = frozenset(("type", "name", "description", "input_schema", "strict", "defer_loading"))


def _tool_choice(value: Json, tools: tuple[Tool, ...]) -> tuple[ToolChoice | None, bool | None]:
    """Returns the choice, and whether several tools may be called at once."""
    if not value:
        return None, None
    kind = value.get("type")
    mode: Any = _CHOICES.get(kind) if isinstance(kind, str) else None  # Any: a literal of `ToolChoice`
    if mode is None:
        raise BadRequest(f"tool_choice.type must be one of {', '.join(_CHOICES)}.", param="tool_choice.type")
    name = value.get("name") if mode == "tool" else ""
    if mode == "tool" and name not in [tool.name for tool in tools]:
        raise Untranslatable("tool_choice.name is no tool that the upstream can call.", param="tool_choice.name")
    if mode == "required" and not tools:
        raise Untranslatable("tool_choice requires a tool, and the upstream can call none.", param="tool_choice")
    return ToolChoice(mode, name or ""), False if value.get("disable_parallel_tool_use") else None


# -- thinking and the form of the answer ------------------------------------------------------------------------------


def _effort(thinking: Json, config: Json, dropped: set[str]) -> Effort | None:
    kind, budget, given = thinking.get("type"), thinking.get("budget_tokens"), config.get("effort")
    if kind not in (None, "enabled", "adaptive", "disabled"):
        raise BadRequest("thinking.type must be enabled, adaptive or disabled.", param="thinking.type")
    dropped.update(f"thinking.{shown(name)}" for name in thinking.keys() - {"type", "budget_tokens"})
    if given is not None and given not in _EFFORTS:
        raise BadRequest(f"output_config.effort must be one of {', '.join(_EFFORTS)}.", param="output_config.effort")
    if kind == "disabled":
        return "none"
    if given is not None:
        return cast("Effort", given)
    if kind == "adaptive":
        return "high"
    if kind == "enabled" and type(budget) is int:
        return "low" if budget < 4096 else "medium" if budget < 16384 else "high"
    return None


def _schema(config: Json, dropped: set[str]) -> Schema | None:
    dropped.update(f"output_config.{shown(name)}" for name in config.keys() - {"effort", "format"})
    form = config.get("format")
    if form is None:
        return None
    schema = form.get("schema") if isinstance(form, dict) and form.get("type") == "json_schema" else None
    if not isinstance(schema, dict):
        raise BadRequest("output_config.format must have a JSON schema.", param="output_config.format")
    return schema


def _user(metadata: Json, dropped: set[str]) -> str | None:
    dropped.update(f"metadata.{shown(name)}" for name in metadata.keys() - {"user_id"})
    user = metadata.get("user_id")
    if user is not None and not isinstance(user, str):
        raise BadRequest("metadata.user_id must be a string.", param="metadata.user_id")
    return user
