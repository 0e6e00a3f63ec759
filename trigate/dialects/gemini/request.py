"""Decodes a request in Gemini's format. `fields` says what becomes of each field; `content` decodes the contents.

The names of dropped fields are sorted, each once. A name that the client made up is repeated only if it looks like one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from trigate.dialects.gemini.content import ContentDecoder
from trigate.dialects.gemini.fields import FIELDS, GENERATION_CONFIG
from trigate.dialects.gemini.schema import json_schema
from trigate.dialects.gemini.values import Json, camel, list_of, number, object_of, strings, text_of, whole
from trigate.dialects.request_values import decode_fields, shown
from trigate.dialects.vocabulary import Effort, Request, Schema, Tool, ToolChoice
from trigate.errors import BadRequest, Untranslatable

_CONFIG = "generationConfig"
_CHOICES: Mapping[str, Any] = {"AUTO": "auto", "VALIDATED": "auto", "ANY": "required", "NONE": "none"}  # Any: a mode
_LEVELS: Mapping[str, Effort] = {"MINIMAL": "minimal", "LOW": "low", "MEDIUM": "medium", "HIGH": "high"}


def decode_request(fields: Mapping[str, msgspec.Raw], *, stream: bool) -> tuple[Request, tuple[str, ...]]:
    """Decodes a request.

    Args:
        fields: Its top-level fields.
        stream: Whether the path asks for a stream.

    Returns:
        The request, and the names of the advisory fields that the vocabulary has no place for.

    Raises:
        BadRequest: A field is malformed; ``param`` names it.
        Untranslatable: A field cannot be expressed; ``param`` names it.
    """
    dropped: set[str] = set()
    values = decode_fields(fields, FIELDS, dropped, name_of=camel)
    messages = ContentDecoder(dropped).messages(values.get("systemInstruction"), values.get("contents"))
    tools = _tools(values.get("tools"), dropped)
    tools, choice = _tool_choice(object_of(values.get("toolConfig"), "toolConfig"), tools, dropped)
    config = _config(values.get("generationConfig"), dropped)
    thinking = object_of(config.get("thinkingConfig"), f"{_CONFIG}.thinkingConfig")
    schema, is_json = _form(config)
    return (
        Request(
            messages=messages,
            max_tokens=whole(config, "maxOutputTokens", _CONFIG, least=1),
            stream=stream,
            temperature=number(config, "temperature", _CONFIG),
            top_p=number(config, "topP", _CONFIG),
            top_k=whole(config, "topK", _CONFIG, least=1),
            stop=strings(config, "stopSequences", _CONFIG),
            tools=tools,
            tool_choice=choice,
            effort=_effort(thinking, dropped),
            wants_reasoning=thinking.get("includeThoughts") is True,
            schema=schema,
            schema_strict=None if schema is None else False,  # OpenAI takes only some schemas for strict ones
            is_json=is_json,
            seed=whole(config, "seed", _CONFIG),
            presence_penalty=number(config, "presencePenalty", _CONFIG),
            frequency_penalty=number(config, "frequencyPenalty", _CONFIG),
        ),
        tuple(sorted(dropped)),
    )


def _config(value: object, dropped: set[str]) -> Json:
    """Returns ``generationConfig`` without what is dropped."""
    kept: Json = {}
    for name, inner in object_of(value, _CONFIG).items():
        name = "responseJsonSchema" if name == "_responseJsonSchema" else name
        fate = GENERATION_CONFIG.get(name, "dropped")
        if fate == "refused" and inner:
            raise Untranslatable(
                f"{_CONFIG}.{name} cannot be translated to the format of the upstream.", param=f"{_CONFIG}.{name}"
            )
        if fate == "dropped":
            dropped.add(f"{_CONFIG}.{shown(name)}")
        else:
            kept[name] = inner
    if (whole(kept, "candidateCount", _CONFIG) or 1) > 1:
        raise Untranslatable(
            f"{_CONFIG}.candidateCount: the upstream gives one candidate.", param=f"{_CONFIG}.candidateCount"
        )
    modalities = [each.upper() for each in strings(kept, "responseModalities", _CONFIG)]
    if set(modalities) - {"TEXT", "MODALITY_UNSPECIFIED"}:
        raise Untranslatable(
            f"{_CONFIG}.responseModalities: only TEXT can be translated to the format of the upstream.",
            param=f"{_CONFIG}.responseModalities",
        )
    return kept


# -- tools ------------------------------------------------------------------------------------------------------------


def _tools(value: object, dropped: set[str]) -> tuple[Tool, ...]:
    tools = []
    for at, group in enumerate(list_of(value, "tools")):
        for name, inner in object_of(group, f"tools[{at}]").items():
            if name != "functionDeclarations":  # Google runs it
                dropped.add(f"tools.{shown(name)}")
                continue
            path = f"tools[{at}].functionDeclarations"
            for number_, declaration in enumerate(list_of(inner, path)):
                tools.append(_function(declaration, f"{path}[{number_}]", dropped))
    return tuple(tools)


_DECLARATION = frozenset(("name", "description", "parameters", "parametersJsonSchema"))


def _function(value: object, path: str, dropped: set[str]) -> Tool:
    fields = object_of(value, path)
    dropped.update(f"tools.{shown(name)}" for name in fields.keys() - _DECLARATION)
    name, description = text_of(fields, "name", path), fields.get("description")
    if description is not None and not isinstance(description, str):
        raise BadRequest(f"{path}.description must be a string.", param=f"{path}.description")
    schema: Schema = {"type": "object", "properties": {}}
    if "parametersJsonSchema" in fields:
        schema = fields["parametersJsonSchema"]
        if not isinstance(schema, dict):
            raise BadRequest(f"{path}.parametersJsonSchema must be an object.", param=f"{path}.parametersJsonSchema")
    elif "parameters" in fields:
        schema = json_schema(fields["parameters"], f"{path}.parameters")
    return Tool(name, description, schema)


def _tool_choice(value: Json, tools: tuple[Tool, ...], dropped: set[str]) -> tuple[tuple[Tool, ...], ToolChoice | None]:
    """Returns the tools that may be called, and the choice among them."""
    dropped.update(f"toolConfig.{shown(name)}" for name in value.keys() - {"functionCallingConfig"})
    path = "toolConfig.functionCallingConfig"
    config = object_of(value.get("functionCallingConfig"), path)
    dropped.update(f"{path}.{shown(name)}" for name in config.keys() - {"mode", "allowedFunctionNames"})
    given = str(config.get("mode", "")).upper()
    if given in ("", "MODE_UNSPECIFIED"):
        return tools, None
    mode = _CHOICES.get(given)
    if mode is None:
        raise BadRequest(f"{path}.mode must be one of {', '.join(_CHOICES)}.", param=f"{path}.mode")
    allowed = strings(config, "allowedFunctionNames", path)
    if unknown := set(allowed) - {tool.name for tool in tools}:
        raise BadRequest(
            f"{path}.allowedFunctionNames: {min(unknown)[:100]!r} is not declared.",
            param=f"{path}.allowedFunctionNames",
        )
    if mode == "required" and not tools:
        raise Untranslatable(f"{path}.mode requires a function, and the upstream can call none.", param=f"{path}.mode")
    if mode == "required" and len(allowed) == 1:
        return tools, ToolChoice("tool", allowed[0])
    if allowed and mode != "none":
        tools = tuple(tool for tool in tools if tool.name in allowed)
    return tools, ToolChoice(mode)


# -- thinking and the form of the answer ------------------------------------------------------------------------------


def _effort(thinking: Json, dropped: set[str]) -> Effort | None:
    path = f"{_CONFIG}.thinkingConfig"
    dropped.update(
        f"{path}.{shown(name)}" for name in thinking.keys() - {"includeThoughts", "thinkingBudget", "thinkingLevel"}
    )
    level = str(thinking.get("thinkingLevel", "")).upper()
    if level and level != "THINKING_LEVEL_UNSPECIFIED":
        if level not in _LEVELS:
            raise BadRequest(f"{path}.thinkingLevel must be one of {', '.join(_LEVELS)}.", param=path)
        return _LEVELS[level]
    budget = whole(thinking, "thinkingBudget", path, least=-1)
    if budget is None or budget < 0:  # as the model likes
        return None
    if budget == 0:  # there is no word for it that all models know
        dropped.add(f"{path}.thinkingBudget")
        return None
    return "low" if budget < 4096 else "medium" if budget < 16384 else "high"


def _form(config: Json) -> tuple[Schema | None, bool]:
    """Returns the schema of the answer, and whether it has to be JSON without one."""
    path = f"{_CONFIG}.responseMimeType"
    media_type = str(config.get("responseMimeType", "text/plain")).lower()
    if media_type not in ("text/plain", "application/json"):
        raise Untranslatable(
            f"{path}: {media_type[:100]!r} cannot be translated to the format of the upstream.", param=path
        )
    if media_type == "text/plain":
        if config.get("responseSchema") or config.get("responseJsonSchema"):
            raise BadRequest(f"{path} must be application/json for an answer with a schema.", param=path)
        return None, False
    if "responseJsonSchema" in config:
        schema = config["responseJsonSchema"]
        if not isinstance(schema, dict):
            raise BadRequest(f"{_CONFIG}.responseJsonSchema must be an object.", param=f"{_CONFIG}.responseJsonSchema")
        return schema, False
    if "responseSchema" in config:
        return json_schema(config["responseSchema"], f"{_CONFIG}.responseSchema"), False
    return None, True
