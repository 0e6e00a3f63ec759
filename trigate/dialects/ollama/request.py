"""Decodes requests to ``/api/chat`` and ``/api/generate``. `fields` says what becomes of each field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

import msgspec

from trigate.dialects.ollama.fields import CHAT_FIELDS, GENERATE_FIELDS, OPTIONS
from trigate.dialects.ollama.messages import decode_images, decode_messages
from trigate.dialects.ollama.values import Json, list_at, number_at, text_at, whole_at
from trigate.dialects.request_values import decode_fields, shown
from trigate.dialects.vocabulary import Effort, Message, Request, Schema, Text, Tool
from trigate.errors import BadRequest

_EFFORTS = get_args(Effort)


def decode_chat(fields: Mapping[str, msgspec.Raw], *, stream: bool) -> tuple[Request, tuple[str, ...]]:
    """Decodes a request to ``/api/chat``.

    Args:
        fields: Its top-level fields.
        stream: Whether it asks for a stream.

    Returns:
        The request, and the names of the fields that are dropped.

    Raises:
        BadRequest: A field is malformed; ``param`` names it.
        Untranslatable: A field cannot be expressed; ``param`` names it.
    """
    dropped: set[str] = set()
    values = decode_fields(fields, CHAT_FIELDS, dropped)
    messages = decode_messages(list_at(values, "messages", "messages"))
    request = _request(values, messages, dropped, stream=stream)
    return request, tuple(sorted(dropped))


def decode_generate(fields: Mapping[str, msgspec.Raw], *, stream: bool) -> tuple[Request, tuple[str, ...]]:
    """Decodes a request to ``/api/generate``, as a conversation of one message. As `decode_chat`."""
    dropped: set[str] = set()
    values = decode_fields(fields, GENERATE_FIELDS, dropped)
    system, prompt = text_at(values, "system", "system"), text_at(values, "prompt", "prompt")
    images = decode_images(list_at(values, "images", "images"), "images")
    messages = [Message("system", (Text(system),))] if system else []
    messages.append(Message("user", (Text(prompt), *images)))
    request = _request(values, tuple(messages), dropped, stream=stream)
    return request, tuple(sorted(dropped))


def _request(values: Json, messages: tuple[Message, ...], dropped: set[str], *, stream: bool) -> Request:
    options = values.get("options") or {}
    if not isinstance(options, dict):
        raise BadRequest("options must be an object.", param="options")
    dropped.update(f"options.{shown(name)}" for name in options.keys() - OPTIONS.keys() if options[name] is not None)
    schema, is_json = _format(values.get("format"))
    think = values.get("think")
    seed = whole_at(options, "seed", "options.seed")
    return Request(
        messages=messages,
        stream=stream,
        max_tokens=_positive(options, "num_predict"),
        temperature=number_at(options, "temperature", "options.temperature"),
        top_p=number_at(options, "top_p", "options.top_p"),
        top_k=_positive(options, "top_k"),
        seed=seed if seed is not None and seed >= 0 else None,
        stop=_stop(options.get("stop")),
        presence_penalty=number_at(options, "presence_penalty", "options.presence_penalty"),
        frequency_penalty=number_at(options, "frequency_penalty", "options.frequency_penalty"),
        tools=_tools(list_at(values, "tools", "tools")),
        effort=_effort(think),
        wants_reasoning=think is not False and think != "none",
        schema=schema,
        schema_strict=None if schema is None else _is_closed(schema),
        is_json=is_json,
    )


def _positive(options: Json, name: str) -> int | None:
    """A count; Ollama takes 0 and less for no limit."""
    found = whole_at(options, name, f"options.{name}")
    return found if found is not None and found > 0 else None


def _stop(value: object) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise BadRequest("options.stop must be a string or a list of strings.", param="options.stop")
    return tuple(value)


def _effort(think: object) -> Effort | None:
    """How much to think. ``true`` has no level: it is what providers take for the ordinary one."""
    if think is None or think == "":
        return None
    if isinstance(think, bool):
        return "medium" if think else "none"
    if think not in _EFFORTS:
        raise BadRequest(f"think must be true, false or one of {', '.join(_EFFORTS)}.", param="think")
    return cast("Effort", think)


def _format(value: object) -> tuple[Schema | None, bool]:
    """Returns the schema of the answer, and whether it has to be JSON of any shape."""
    if value is None or value == "":
        return None, False
    if value == "json":
        return None, True
    if isinstance(value, dict):
        return value, False
    raise BadRequest('format must be "json" or a JSON schema.', param="format")


def _is_closed(schema: Any) -> bool:  # Any: JSON of any shape
    """Whether every object of a schema has all of its properties and no others, as providers demand of a schema that an
    answer has to match exactly.

    >>> _is_closed({"type": "object", "properties": {"a": {"type": "string"}}})
    False
    >>> _is_closed({"type": "object", "properties": {}, "required": [], "additionalProperties": False})
    True
    """
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += each
        elif isinstance(each, dict):
            if each.get("type") == "object" or "properties" in each:
                properties, required = each.get("properties"), each.get("required")
                names = properties.keys() if isinstance(properties, dict) else set()
                given = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
                if each.get("additionalProperties") is not False or names != given:
                    return False
            waiting += each.values()
    return True


def _tools(tools: list[Any]) -> tuple[Tool, ...]:  # Any: JSON of any shape
    found = []
    for at, tool in enumerate(tools):
        path = f"tools[{at}].function"
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise BadRequest(f"{path} must be an object.", param=path)
        name = text_at(function, "name", f"{path}.name")
        if not name:
            raise BadRequest(f"{path}.name must be a non-empty string.", param=f"{path}.name")
        schema = function.get("parameters")
        if schema is None:
            schema = {"type": "object", "properties": {}}
        if not isinstance(schema, dict):
            raise BadRequest(f"{path}.parameters must be an object.", param=f"{path}.parameters")
        description = text_at(function, "description", f"{path}.description")
        found.append(Tool(name, description or None, schema))
    return tuple(found)
