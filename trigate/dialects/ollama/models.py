"""Models as Ollama lists and shows them. Pure.

Every name that is listed has a tag: clients add ``:latest`` to a name without one before they look for it in the list.
What is not known of a model (its size, its file) is empty or 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

VERSION = "0.12.0"
"""The version of Ollama's API that is served. Clients refuse one below 0.6.4, and ask the version before they use what
came later."""

_ARCHITECTURE = "transformer"
_CONTEXT = ("context_length", "context_window", "max_context_length", "max_model_len", "max_input_tokens")

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


def tagged(model: str) -> str:
    """Returns a model id with a tag.

    >>> tagged("openai/gpt-4o"), tagged("openrouter/x:free")
    ('openai/gpt-4o:latest', 'openrouter/x:free')
    """
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"


def names_of(model: str) -> tuple[str, ...]:
    """Returns the ids that a name may stand for, the most likely first.

    >>> names_of("gpt-4o:latest"), names_of("llama3"), names_of("llama3:8b")
    (('gpt-4o:latest', 'gpt-4o'), ('llama3', 'llama3:latest'), ('llama3:8b',))
    """
    if model.endswith(":latest"):
        return model, model.removesuffix(":latest")
    return (model,) if tagged(model) == model else (model, f"{model}:latest")


def encode_tag(model: str, fields: Mapping[str, Any], modified_at: str) -> _Json:  # Any: JSON of any shape
    """Returns an entry of the list.

    Args:
        fields: What the upstream and the configuration say about the model.
        modified_at: As RFC 3339 has it.
    """
    name = tagged(model)
    details = _details()
    if (context := context_of(fields)) is not None:
        details["context_length"] = context
    return {
        "name": name,
        "model": name,
        "modified_at": modified_at,
        "size": 0,
        "digest": hashlib.sha256(model.encode()).hexdigest(),  # clients cut it to twelve characters, and tell by it
        "details": details,
        "capabilities": capabilities_of(model, fields),
    }


def encode_show(model: str, fields: Mapping[str, Any], modified_at: str) -> _Json:  # Any: JSON of any shape
    """Returns what is known of a model. As `encode_tag`."""
    info: _Json = {"general.architecture": _ARCHITECTURE, "general.basename": model}
    if (context := context_of(fields)) is not None:
        info[f"{_ARCHITECTURE}.context_length"] = context
    return {
        "license": "",
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(),
        "model_info": info,
        "capabilities": capabilities_of(model, fields),
        "modified_at": modified_at,
    }


def _details() -> _Json:
    return {
        "parent_model": "",
        "format": "",
        "family": "",
        "families": [],
        "parameter_size": "",
        "quantization_level": "",
    }


def context_of(fields: Mapping[str, Any]) -> int | None:  # Any: JSON of any shape
    """Returns the length of a model's context in tokens; None = unknown.

    >>> context_of({"meta": {"n_ctx_train": 8192}}), context_of({"context_length": "many"})
    (8192, None)
    """
    meta, provider = _object(fields, "meta"), _object(fields, "top_provider")
    found = [*(fields.get(name) for name in _CONTEXT), provider.get("context_length"), meta.get("n_ctx_train")]
    return next((value for value in found if type(value) is int and value > 0), None)


def capabilities_of(model: str, fields: Mapping[str, Any]) -> list[str]:  # Any: JSON of any shape
    """Returns what a model can do, as far as it is known. One of which nothing is said may call tools: clients send
    none to a model that is not said to, and an upstream refuses those that it cannot use.

    >>> capabilities_of("m", {}), capabilities_of("nomic-embed-text", {})
    (['completion', 'tools'], ['embedding'])
    >>> capabilities_of("m", {"supported_parameters": ["reasoning"], "input_modalities": ["text", "image"]})
    ['completion', 'vision', 'thinking']
    """
    given = fields.get("capabilities")
    said = _words(given)
    modalities = [
        *_words(fields.get("input_modalities")),
        *_words(_object(fields, "architecture").get("input_modalities")),
    ]
    modalities += _words(_object(fields, "modalities").get("input"))
    parameters = [*_words(fields.get("supported_parameters")), *_words(fields.get("supported_features"))]
    if fields.get("type") == "embedding" or "embedding" in said or "embed" in model.lower():
        return ["embedding"]
    says = [*said, *parameters]
    found = ["completion"]
    if not says or {"tools", "function_calling", "tool_use", "function-calling"} & set(says):
        found.append("tools")
    if "image" in modalities or {"vision", "image_input"} & set(says):
        found.append("vision")
    if {"thinking", "reasoning", "include_reasoning", "reasoning_effort"} & set(says):
        found.append("thinking")
    return found


def _words(value: object) -> list[str]:
    """The words of a list, or the keys of a table that are true."""
    if isinstance(value, dict):
        return [name for name, is_true in value.items() if is_true]
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _object(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:  # Any: JSON of any shape
    value = fields.get(name)
    return value if isinstance(value, dict) else {}
