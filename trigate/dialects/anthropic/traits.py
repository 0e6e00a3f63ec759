"""What a model takes beyond the common part of Anthropic's format, going by its id.

Anthropic's models differ in how they are asked to think, and newer ones refuse what older ones need. Other providers
serve models of other names in the same format; of these, the common part is assumed, and thinking with a budget, which
is what they document.

Source: Anthropic, "Troubleshooting thinking" (the types that each model takes and refuses), "Effort", "Structured
outputs", "Models overview" (limits), "What's new in Claude 4.6" (no prefill), "Migrating to Claude Opus 4.7" (no
sampling parameters), and the API's error "temperature and top_p cannot both be specified for this model".
"""

from __future__ import annotations

import re
from typing import Literal

import attrs

from trigate.dialects.vocabulary import Effort

_CLAUDE = re.compile(
    r"(?:.*[./])?claude-(?:(?P<family>[a-z]+)-)?(?P<major>\d{1,2})(?!\d)(?:[-.](?P<minor>\d{1,2})(?!\d))?"
    r"(?:-(?P<old_family>[a-z]+))?"
)
_UNVERSIONED = (99, 0)
"""Stands for the version of a Claude whose id has none: an alias of a current model."""
_ALL: tuple[Effort, ...] = ("low", "medium", "high", "xhigh", "max")
UNKNOWN_MAX_TOKENS = 8192
"""The most tokens of an answer, if neither the request nor the configuration says it and the model is not known."""


@attrs.frozen(kw_only=True)
class Traits:
    """What one model takes.

    Attributes:
        max_tokens: The most tokens that an answer may have at least.
        thinking: How it is asked to think: by an effort; by a budget of tokens; not at all.
        efforts: The efforts that it knows, if it is asked by one.
        thinking_off: The type of ``thinking`` that turns it off; ``""`` = it is off if nothing is said; None = it
            cannot be turned off.
        takes_sampling: It takes ``temperature``, ``top_p`` and ``top_k``.
        takes_both: It takes ``temperature`` and ``top_p`` at once.
        takes_schema: It takes a schema for its answer, and strict tools.
        takes_prefill: It continues an answer that the request begins.
    """

    max_tokens: int = UNKNOWN_MAX_TOKENS
    thinking: Literal["adaptive", "budget", "none"] = "budget"
    efforts: tuple[Effort, ...] = ()
    thinking_off: str | None = "disabled"
    takes_sampling: bool = True
    takes_both: bool = True
    takes_schema: bool = True
    takes_prefill: bool = True


def traits_of(model: str) -> Traits:
    """Returns what a model takes.

    Args:
        model: The upstream's own model id.

    >>> [traits_of(f"claude-{name}").thinking for name in ("opus-5", "sonnet-4-5-20250929", "3-opus-20240229")]
    ['adaptive', 'budget', 'none']
    >>> traits_of("us.anthropic.claude-opus-4-20250514-v1:0").max_tokens, traits_of("anthropic/claude-opus-4.7").efforts
    (32000, ('low', 'medium', 'high', 'xhigh', 'max'))
    >>> traits_of("claude-fable-5").thinking_off, traits_of("glm-5").thinking
    (None, 'budget')
    """
    found = _CLAUDE.match(model)
    if found is None and "claude-" not in model:
        return Traits()
    family, version = "", _UNVERSIONED
    if found is not None:
        family = found["family"] or found["old_family"] or ""
        version = int(found["major"]), int(found["minor"] or 0)
    if version >= (4, 6):
        thinking: Literal["adaptive", "budget", "none"] = "adaptive"
    else:
        thinking = "budget" if version >= (3, 7) else "none"
    return Traits(
        max_tokens=_max_tokens(family, version),
        thinking=thinking,
        efforts=_efforts(family, version),
        thinking_off=_thinking_off(family, version),
        takes_sampling=version < (4, 7),
        takes_both=version < (4, 1),
        takes_schema=version >= (4, 5),
        takes_prefill=version < (4, 6),
    )


def _max_tokens(family: str, version: tuple[int, int]) -> int:
    if version < (3, 7):
        return UNKNOWN_MAX_TOKENS if version >= (3, 5) else 4096
    return 32_000 if family == "opus" and version < (4, 5) else 64_000


def _efforts(family: str, version: tuple[int, int]) -> tuple[Effort, ...]:
    if version >= (4, 7):
        return _ALL
    return ("low", "medium", "high", "max") if family == "opus" else ("low", "medium", "high")


def _thinking_off(family: str, version: tuple[int, int]) -> str | None:
    if version < (5, 0):
        return ""
    return {("opus", (5, 0)): "disabled", ("sonnet", (5, 0)): "disabled", ("sonnet", (5, 5)): "between_tools"}.get(
        (family, version)
    )
