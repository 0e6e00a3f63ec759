"""Encodes the list of models in Gemini's format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""

_INPUT = ("context_length", "context_window", "max_context_length", "max_model_len")
_OUTPUT = ("max_output_tokens", "max_completion_tokens", "max_tokens")
_METHODS = ["generateContent", "streamGenerateContent"]
"""What every model can be asked for; `countTokens` is served only where its upstream speaks Gemini's format."""


def encode_model(model: str, fields: Mapping[str, Any]) -> _Json:  # Any: JSON of any shape
    """Returns one model.

    Args:
        fields: What is known about it, under the names of OpenAI's lists.

    >>> encode_model("up/m", {"context_length": 1000})["inputTokenLimit"]
    1000
    """
    found: _Json = {"name": f"models/{model}", "version": "", "displayName": model}
    if isinstance(name := fields.get("display_name") or fields.get("name"), str):
        found["displayName"] = name
    if isinstance(fields.get("description"), str):
        found["description"] = fields["description"]
    for key, names in (("inputTokenLimit", _INPUT), ("outputTokenLimit", _OUTPUT)):
        limit = next((fields[name] for name in names if type(fields.get(name)) is int), None)
        if limit is not None:
            found[key] = limit
    return {**found, "supportedGenerationMethods": _METHODS}


def encode_model_list(
    models: Iterable[tuple[str, Mapping[str, Any]]],  # Any: JSON of any shape
    *,
    size: int,
    after: str | None,
) -> _Json:
    """Returns a page of models.

    Args:
        size: The most models of the page.
        after: The page begins behind this model; an unknown one gives an empty page.

    >>> page = encode_model_list([("a", {}), ("b", {}), ("c", {})], size=1, after="a")
    >>> [model["name"] for model in page["models"]], page["nextPageToken"]
    (['models/b'], 'b')
    """
    rows = list(models)
    if after is not None:
        ids = [model for model, _ in rows]
        rows = rows[ids.index(after) + 1 :] if after in ids else []
    page: _Json = {"models": [encode_model(model, fields) for model, fields in rows[:size]]}
    if len(rows) > size:
        page["nextPageToken"] = rows[size - 1][0]
    return page
