"""Token counts as Anthropic has them: ``input_tokens`` includes no tokens of the cache."""

from __future__ import annotations

from typing import Any

from trigate.dialects.vocabulary import TokenCounts

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
