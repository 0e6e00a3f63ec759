"""What becomes of each field of a request that is sent to Converse.

`request` acts by this table, and ``docs/reference/formats.md`` shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec.structs import fields

from trigate.dialects.vocabulary import Request

Fate = Literal["translated", "some models", "dropped"]
"""``some models``: dropped for the others. ``dropped``: advisory; its name is in ``x-trigate-dropped``."""

FIELDS: Mapping[str, Fate] = {
    "messages": "translated",
    "max_tokens": "translated",
    "stream": "translated",
    "temperature": "translated",
    "top_p": "translated",
    "top_k": "some models",
    "stop": "translated",
    "tools": "translated",
    "tool_choice": "translated",
    "parallel_tool_calls": "dropped",
    "effort": "some models",
    "wants_reasoning": "translated",
    "schema": "translated",
    "schema_name": "translated",
    "schema_strict": "translated",
    "is_json": "translated",
    "seed": "dropped",
    "presence_penalty": "dropped",
    "frequency_penalty": "dropped",
    "user": "dropped",
    "cache": "some models",
}
"""By the names of `vocabulary.Request`. A field that is not here is dropped."""

_DEFAULTS = {field.name: field.default for field in fields(Request)}


def dropped_of(request: Request) -> list[str]:
    """Returns the names of the fields that no model takes, as far as the request has them. Tools may be called at once
    by default, so that is nothing to drop.

    >>> dropped_of(Request(messages=(), seed=1, parallel_tool_calls=True, user=None))
    ['seed']
    """
    return [
        name
        for name, default in _DEFAULTS.items()
        if FIELDS.get(name, "dropped") == "dropped"
        and (value := getattr(request, name)) != default
        and (name != "parallel_tool_calls" or (value is False and request.tools))
    ]
