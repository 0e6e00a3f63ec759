"""What the fields of a listed model say about it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = ("max_output_tokens", "max_completion_tokens")


def max_output_tokens(fields: Mapping[str, Any], *, is_anthropic: bool = False) -> int | None:  # Any: JSON
    """Returns the most tokens of an answer; None = the fields do not say.

    Where ``max_tokens`` means that, and where the whole context, differs between providers; only Anthropic's is read.

    Source: the lists of models of Groq, OpenRouter (``top_provider``) and Anthropic.

    >>> max_output_tokens({"max_completion_tokens": 8192, "context_window": 131072})
    8192
    >>> max_output_tokens({"top_provider": {"max_completion_tokens": 32000}}), max_output_tokens({"max_tokens": 4096})
    (32000, None)
    """
    provider = fields.get("top_provider")
    found = [fields.get(name) for name in _NAMES]
    found.append(provider.get("max_completion_tokens") if isinstance(provider, dict) else None)
    found.append(fields.get("max_tokens") if is_anthropic else None)
    return next((value for value in found if type(value) is int and value > 0), None)
