"""Token counts as Anthropic has them: ``input_tokens`` includes no tokens of the cache."""

from __future__ import annotations

from typing import Any

from trigate.dialects.vocabulary import TokenCounts
from trigate.openai.answer import MAX_TOKENS

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""

NOTHING = TokenCounts(input=0, output=0)


def encode_usage(counts: TokenCounts) -> _Json:
    """Returns the value of ``usage``, with every key that clients add up.

    >>> encode_usage(TokenCounts(input=3, cache_read=4, output=5))["cache_read_input_tokens"]
    4
    """
    usage: _Json = {
        "input_tokens": counts.input,
        "cache_creation_input_tokens": counts.cache_write,
        "cache_read_input_tokens": counts.cache_read,
        "cache_creation": {"ephemeral_5m_input_tokens": counts.cache_write, "ephemeral_1h_input_tokens": 0},
        "output_tokens": counts.output,
    }
    if counts.reasoning is not None:
        usage["output_tokens_details"] = {"thinking_tokens": counts.reasoning}
    return usage


def decode_usage(usage: object) -> TokenCounts | None:
    """Returns the counts of a ``usage``; None = it has none.

    >>> decode_usage({"input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 5}).cache_read
    4
    """
    if not isinstance(usage, dict):
        return None
    counts = {name: value for name in _COUNTS if type(value := usage.get(name)) is int and 0 <= value <= MAX_TOKENS}
    if not counts:
        return None
    details = usage.get("output_tokens_details")
    thinking = details.get("thinking_tokens") if isinstance(details, dict) else None
    return TokenCounts(
        input=counts.get("input_tokens", 0),
        cache_read=counts.get("cache_read_input_tokens", 0),
        cache_write=counts.get("cache_creation_input_tokens", 0),
        output=counts.get("output_tokens", 0),
        reasoning=thinking if type(thinking) is int and thinking >= 0 else None,
    )


_COUNTS = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "output_tokens")
