"""In what the models of different vendors differ behind Converse: how they are told to think, and what they take."""

from __future__ import annotations

import re
from typing import Any

import attrs

from trigate.dialects.vocabulary import Effort

_CLAUDE = re.compile(r"claude-(?:(?:opus|sonnet|haiku)-)?(?P<major>\d+)(?:-(?P<minor>\d{1,2})(?!\d))?")
_CLAUDE_3 = re.compile(r"claude-(?:v2|instant|3-(?:opus|sonnet|haiku|5-sonnet-20240620))")
"""Models of Anthropic's that cache nothing at Bedrock."""
_NOVA_2 = re.compile(r"\bnova-(?:2-|[a-z]+-v2|premier-2)")
_BUDGETS = {"low": 2048, "medium": 8192, "high": 16384, "xhigh": 32768, "max": 65536}
"""How many tokens an older model of Anthropic's may think, for an effort."""
_MIN_BUDGET_TOKENS = 1024

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


@attrs.frozen
class Traits:
    """What the models of one vendor take.

    Attributes:
        is_claude: They sign their reasoning, and take it back.
        takes_tool_errors: They are told when a tool has failed.
        takes_cache_points: They cache what they are asked to.
    """

    is_claude: bool
    takes_tool_errors: bool
    takes_cache_points: bool


def traits_of(model: str) -> Traits:
    """Returns what a model takes.

    >>> traits_of("us.amazon.nova-pro-v1:0")
    Traits(is_claude=False, takes_tool_errors=True, takes_cache_points=True)
    >>> traits_of("eu.anthropic.claude-sonnet-4-5-20250929-v1:0").is_claude
    True
    """
    is_claude = "anthropic" in model or "claude" in model
    of_these = is_claude or "nova" in model
    return Traits(is_claude, of_these, of_these and _CLAUDE_3.search(model) is None)


def claude_version(model: str) -> tuple[int, int] | None:
    """Returns the version of a model of Anthropic's; None = it is none, or its id does not tell.

    >>> claude_version("anthropic.claude-sonnet-4-20250514-v1:0"), claude_version("us.anthropic.claude-opus-4-7")
    ((4, 0), (4, 7))
    """
    found = _CLAUDE.search(model)
    return (int(found["major"]), int(found["minor"] or 0)) if found is not None else None


@attrs.frozen
class Thinking:
    """How a model is told to think: fields of its own, the effort of Converse, and which fields it then refuses."""

    extra: _Json = attrs.field(factory=dict)
    effort: str | None = None
    excludes: tuple[str, ...] = ()


def thinking_of(model: str, effort: Effort, max_tokens: int | None) -> Thinking | None:
    """Returns how a model is told to think; None = it cannot be told that.

    >>> thinking_of("anthropic.claude-opus-4-6-v1", "high", 4096).extra
    {'thinking': {'type': 'adaptive'}}
    >>> thinking_of("anthropic.claude-sonnet-4-5-20250929-v1:0", "high", 4096).extra
    {'thinking': {'type': 'enabled', 'budget_tokens': 4095}}
    >>> thinking_of("openai.gpt-oss-120b-1:0", "max", None).extra, thinking_of("us.meta.llama4", "high", None)
    ({'reasoning_effort': 'high'}, None)
    """
    level = "low" if effort == "minimal" else effort
    coarse = "high" if level in ("xhigh", "max") else level
    if effort == "none":
        return Thinking() if traits_of(model).is_claude else None
    if (version := claude_version(model)) is not None:
        if version >= (4, 6):
            return Thinking({"thinking": {"type": "adaptive"}}, level, ("temperature", "top_k"))
        budget = min(_BUDGETS[level], (max_tokens or _BUDGETS[level] + 1) - 1)
        if version < (3, 7) or budget < _MIN_BUDGET_TOKENS:
            return None
        return Thinking({"thinking": {"type": "enabled", "budget_tokens": budget}}, None, ("temperature", "top_k"))
    if "gpt-oss" in model:
        return Thinking({"reasoning_effort": coarse})
    if _NOVA_2.search(model):
        return Thinking({"reasoningConfig": {"type": "enabled", "maxReasoningEffort": coarse}})
    return None


def top_k_of(model: str, top_k: int) -> _Json | None:
    """Returns the fields that limit a model to its likeliest tokens; None = it has none."""
    if traits_of(model).is_claude:
        return {"top_k": top_k}
    if "nova" in model:
        return {"inferenceConfig": {"topK": top_k}}
    return None
