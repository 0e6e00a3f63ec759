"""Decodes a request for a chat completion. `client_fields` says what becomes of each field; `client_content` decodes
the messages.

The names of dropped fields are sorted, each once. A name that the client made up is repeated only if it looks like one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import msgspec

from trigate.dialects.openai_chat.client_content import ContentDecoder
from trigate.dialects.openai_chat.client_fields import FIELDS
from trigate.dialects.request_values import Json, a_bool_or_none, a_count_or_none, a_number_or_none, decode_fields
from trigate.dialects.vocabulary import Effort, Request, Schema, Tool, ToolChoice
from trigate.errors import BadRequest, Untranslatable

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_MODES = ("auto", "required", "none")


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
    values = _values(fields, dropped)
    _check_form(values)
    content = ContentDecoder(dropped)
    messages = content.messages(values["messages"])
    tools = _tools(values)
    choice, tools = _tool_choice(values, tools)
    schema_fields = _response_format(values)
    user = _string(values, "user")
    return (
        Request(
            messages=messages,
            max_tokens=a_count_or_none(values, "max_completion_tokens") or a_count_or_none(values, "max_tokens"),
            stream=values.get("stream") is True,
            temperature=a_number_or_none(values, "temperature"),
            top_p=a_number_or_none(values, "top_p"),
            top_k=a_count_or_none(values, "top_k"),
            stop=_stop(values),
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=False if is_legacy(fields) else a_bool_or_none(values, "parallel_tool_calls"),
            effort=_effort(values),
            wants_reasoning=True,
            seed=_whole_number(values, "seed"),
            presence_penalty=a_number_or_none(values, "presence_penalty"),
            frequency_penalty=a_number_or_none(values, "frequency_penalty"),
            user=_string(values, "safety_identifier") or user,
            cache=content.wants_cache or bool(values.get("prompt_cache_key")),
            **schema_fields,
        ),
        tuple(sorted(dropped)),
    )


def is_legacy(fields: Mapping[str, msgspec.Raw]) -> bool:
    """Whether a request offers functions in the form before tools, whose answers have a ``function_call``."""
    return "functions" in fields and "tools" not in fields


def _values(fields: Mapping[str, msgspec.Raw], dropped: set[str]) -> Json:
    """Decodes the fields. One that is dropped asks for nothing if it is false."""
    asked = {
        name: raw
        for name, raw in fields.items()
        if FIELDS.get(name, "dropped") != "dropped" or bytes(memoryview(raw)[:6]) != b"false"
    }
    return decode_fields(asked, FIELDS, dropped, refused_if_empty=("web_search_options",))


def _check_form(values: Json) -> None:
    """Refuses answers of a form that only OpenAI's models give."""
    n = a_count_or_none(values, "n")
    if n is not None and n > 1:
        raise Untranslatable("n: the upstream gives one answer to a request.", param="n")
    modalities = values.get("modalities")
    if modalities and modalities != ["text"]:
        raise Untranslatable("modalities: the upstream answers in text only.", param="modalities")


# -- plain values -----------------------------------------------------------------------------------------------------


def _whole_number(values: Json, name: str) -> int | None:
    value = values.get(name)
    if value is not None and type(value) is not int:
        raise BadRequest(f"{name} must be a whole number.", param=name)
    return value


def _string(values: Json, name: str) -> str | None:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise BadRequest(f"{name} must be a string.", param=name)
    return value or None


def _stop(values: Json) -> tuple[str, ...]:
    value = values.get("stop")
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise BadRequest("stop must be a string or a list of strings.", param="stop")
    return tuple(each for each in value if each)


def _effort(values: Json) -> Effort | None:
    value = values.get("reasoning_effort")
    if value is not None and value not in _EFFORTS:
        raise BadRequest(f"reasoning_effort must be one of {', '.join(_EFFORTS)}.", param="reasoning_effort")
    return cast("Effort | None", value)


# -- tools ------------------------------------------------------------------------------------------------------------


def _tools(values: Json) -> tuple[Tool, ...]:
    name = "tools" if "tools" in values else "functions"
    given = values.get(name, [])
    if not isinstance(given, list):
        raise BadRequest(f"{name} must be a list.", param=name)
    tools = []
    for at, tool in enumerate(given):
        path = f"{name}[{at}]"
        if not isinstance(tool, dict):
            raise BadRequest(f"{path} must be an object.", param=path)
        if name == "tools":
            if tool.get("type", "function") != "function":
                raise Untranslatable(
                    f"{path}: a tool of the type {str(tool['type'])[:100]!r} cannot be translated to the format of "
                    "the upstream.",
                    param=path,
                )
            tool, path = tool.get("function"), f"{path}.function"
            if not isinstance(tool, dict):
                raise BadRequest(f"{path} must be an object.", param=path)
        tools.append(_tool(tool, path))
    return tuple(tools)


def _tool(function: Json, path: str) -> Tool:
    name, description, schema = function.get("name"), function.get("description"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise BadRequest(f"{path}.name must be a non-empty string.", param=f"{path}.name")
    if description is not None and not isinstance(description, str):
        raise BadRequest(f"{path}.description must be a string.", param=f"{path}.description")
    if schema is not None and not isinstance(schema, dict):
        raise BadRequest(f"{path}.parameters must be an object.", param=f"{path}.parameters")
    strict = function.get("strict")
    return Tool(name, description, schema or {}, strict if isinstance(strict, bool) else None)


def _tool_choice(values: Json, tools: tuple[Tool, ...]) -> tuple[ToolChoice | None, tuple[Tool, ...]]:
    """Returns the choice, and the tools that it leaves."""
    name = "tool_choice" if "tool_choice" in values else "function_call"
    choice = values.get(name)
    if choice is None:
        return None, tools
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed_tools(choice.get("allowed_tools"), tools)
    if isinstance(choice, dict):
        function = choice if name == "function_call" else choice.get("function")
        chosen = function.get("name") if isinstance(function, dict) else None
        if chosen not in [tool.name for tool in tools]:
            raise BadRequest(f"{name} must name a function of the request.", param=name)
        return ToolChoice("tool", chosen), tools
    if choice not in _MODES:
        raise BadRequest(f"{name} must be one of {', '.join(_MODES)}, or name a function.", param=name)
    if not tools:
        if choice == "required":
            raise BadRequest(f"{name} requires a tool, and the request has none.", param=name)
        return None, tools
    return ToolChoice(choice), tools


def _allowed_tools(value: object, tools: tuple[Tool, ...]) -> tuple[ToolChoice, tuple[Tool, ...]]:
    path = "tool_choice.allowed_tools"
    allowed = value.get("tools") if isinstance(value, dict) else None
    mode = value.get("mode") if isinstance(value, dict) else None
    if not isinstance(allowed, list) or mode not in ("auto", "required"):
        raise BadRequest(f"{path} must have a list of tools, and the mode auto or required.", param=path)
    names = [(tool.get("function") or {}).get("name") for tool in allowed if isinstance(tool, dict)]
    left = tuple(tool for tool in tools if tool.name in names)
    if not left:
        raise BadRequest(f"{path} must name a function of the request.", param=path)
    return ToolChoice(mode), left


# -- the form of the answer -------------------------------------------------------------------------------------------


def _response_format(values: Json) -> Json:
    """Returns the fields of the request that say which form the answer has."""
    form = values.get("response_format")
    kind = form.get("type") if isinstance(form, dict) else None
    if form is None or kind == "text":
        return {}
    if kind == "json_object":
        return {"is_json": True}
    if kind != "json_schema":
        raise BadRequest("response_format.type must be text, json_object or json_schema.", param="response_format")
    given = form.get("json_schema")
    schema: Schema | None = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(schema, dict):
        raise BadRequest("response_format.json_schema must have a schema.", param="response_format")
    name, strict = given.get("name"), given.get("strict")
    return {
        "schema": schema,
        "schema_name": name if isinstance(name, str) else None,
        "schema_strict": strict if isinstance(strict, bool) else None,
    }
