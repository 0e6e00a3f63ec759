"""Decodes a response call. `fields` says what becomes of each field; `items` decodes the input, `tools` the tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import msgspec

from trigate.dialects.openai_responses.fields import FIELDS
from trigate.dialects.openai_responses.items import InputDecoder
from trigate.dialects.openai_responses.tools import decode_tool_choice, decode_tools
from trigate.dialects.request_values import (
    Json,
    a_bool_or_none,
    a_count_or_none,
    a_list,
    a_number_or_none,
    a_string_or_none,
    an_object,
    decode_fields,
    one_of,
    shown,
)
from trigate.dialects.vocabulary import Effort, Request, Schema
from trigate.errors import BadRequest, PreviousResponseNotFound, Untranslatable

SEALED = "reasoning.encrypted_content"
"""What a client includes to get sealed reasoning."""

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def decode_request(fields: Mapping[str, msgspec.Raw], *, stream: bool) -> tuple[Request, tuple[str, ...]]:
    """Decodes a request.

    Args:
        fields: Its top-level fields.
        stream: Whether the answer is streamed.

    Returns:
        The request, and the names of the advisory fields that the vocabulary has no place for.

    Raises:
        BadRequest: A field is malformed; ``param`` names it.
        PreviousResponseNotFound: It continues a response that the gateway does not have.
        Untranslatable: A field cannot be expressed; ``param`` names it.
    """
    dropped: set[str] = set()
    values = _values(fields, dropped)
    previous = a_string_or_none(values, "previous_response_id")
    if previous is not None:  # one that the gateway has was replaced by its items
        raise PreviousResponseNotFound(previous)
    if values.get("background"):  # of a call that the gateway itself serves in the background, it is gone
        raise Untranslatable(
            "background: the upstream cannot do this, and another target of the model has to.", param="background"
        )
    tools = decode_tools(values, dropped)
    choice, functions = decode_tool_choice(values.get("tool_choice"), tools)
    messages = InputDecoder(dropped).messages(a_string_or_none(values, "instructions"), values.get("input"))
    reasoning = an_object(values, "reasoning")
    dropped.update(f"reasoning.{shown(name)}" for name in reasoning.keys() - {"effort", "summary"})
    one_of(reasoning, "summary", ("auto", "concise", "detailed"), "reasoning")
    text = an_object(values, "text")
    schema, name, strict, is_json = _form(text)
    dropped.update(f"text.{shown(each)}" for each in text.keys() - {"format"} if text[each] is not None)
    _drop_advisory(values, dropped)
    user = a_string_or_none(values, "safety_identifier") or a_string_or_none(values, "user")
    return (
        Request(
            messages=messages,
            max_tokens=a_count_or_none(values, "max_output_tokens"),
            stream=stream,
            temperature=a_number_or_none(values, "temperature"),
            top_p=a_number_or_none(values, "top_p"),
            tools=functions,
            tool_choice=choice,
            parallel_tool_calls=a_bool_or_none(values, "parallel_tool_calls"),
            effort=cast("Effort | None", one_of(reasoning, "effort", _EFFORTS, "reasoning")),
            wants_reasoning=True,
            schema=schema,
            schema_name=name,
            schema_strict=strict,
            is_json=is_json,
            user=user,
            cache=bool(values.get("prompt_cache_key")),
        ),
        tuple(sorted(dropped)),
    )


def _values(fields: Mapping[str, msgspec.Raw], dropped: set[str]) -> Json:
    values = decode_fields(fields, FIELDS, dropped)
    if "input" not in values:
        raise BadRequest("You must provide input.", param="input")
    return values


def _form(text: Json) -> tuple[Schema | None, str | None, bool | None, bool]:
    """Returns the schema of the answer, its name, whether it is strict, and whether the answer is any JSON."""
    form = an_object(text, "format", "text")
    kind = one_of(form, "type", ("text", "json_object", "json_schema"), "text.format")
    if kind != "json_schema":
        return None, None, None, kind == "json_object"
    schema = form.get("schema")
    if not isinstance(schema, dict):
        raise BadRequest("text.format.schema must be an object.", param="text.format.schema")
    strict = form.get("strict")
    return schema, a_string_or_none(form, "name", "text.format"), strict if isinstance(strict, bool) else None, False


def _drop_advisory(values: Json, dropped: set[str]) -> None:
    """Drops what has no effect on the answer's text, or what only OpenAI can do."""
    for name in a_list(values, "include"):
        if name != SEALED:
            dropped.add(f"include.{shown(name)}")
    if values.get("truncation") == "auto":
        dropped.add("truncation")
    if values.get("service_tier") not in (None, "auto", "default"):
        dropped.add("service_tier")
    if values.get("top_logprobs"):
        dropped.add("top_logprobs")
    options: Any = values.get("stream_options")  # Any: an object, checked by `decode_call`
    if options:
        dropped.update(f"stream_options.{shown(name)}" for name in options if options[name])
