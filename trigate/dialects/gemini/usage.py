"""Token counts as Gemini has them.

``promptTokenCount`` includes the tokens of the cache; ``candidatesTokenCount`` does not include those of the thoughts.
The counts of each event of a stream are those of the whole answer so far.
"""

from __future__ import annotations

from typing import Any

from trigate.dialects.vocabulary import TokenCounts
from trigate.openai.answer import MAX_TOKENS, Usage, tier_of

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


def encode_usage(counts: TokenCounts) -> _Json:
    """Returns the value of ``usageMetadata``.

    >>> encode_usage(TokenCounts(input=3, cache_read=4, output=9, reasoning=2))["totalTokenCount"]
    16
    """
    prompt = counts.input + counts.cache_read + counts.cache_write
    usage: _Json = {"promptTokenCount": prompt, "candidatesTokenCount": counts.output - (counts.reasoning or 0)}
    if counts.cache_read:
        usage["cachedContentTokenCount"] = counts.cache_read
    if counts.reasoning:
        usage["thoughtsTokenCount"] = counts.reasoning
    usage["totalTokenCount"] = prompt + counts.output
    return usage


def token_counts(usage: object) -> TokenCounts | None:
    """Returns the counts of a ``usageMetadata``, in disjoint buckets; None = it has none.

    >>> token_counts({"promptTokenCount": 9, "cachedContentTokenCount": 4, "thoughtsTokenCount": 5})
    TokenCounts(input=5, cache_read=4, cache_write=0, output=5, reasoning=5)
    """
    if not isinstance(usage, dict):
        return None
    prompt = _count(usage, "promptTokenCount")
    if prompt is None:
        return None
    cached = min(_count(usage, "cachedContentTokenCount") or 0, prompt)
    thoughts = _count(usage, "thoughtsTokenCount")
    return TokenCounts(
        input=prompt - cached + (_count(usage, "toolUsePromptTokenCount") or 0),
        cache_read=cached,
        output=(_count(usage, "candidatesTokenCount") or 0) + (thoughts or 0),
        reasoning=thoughts,
    )


def reported_usage(usage: object) -> Usage | None:
    """Returns the counts for the ledger; None = it has none."""
    counts = token_counts(usage)
    if counts is None:
        return None
    prompt = counts.input + counts.cache_read
    if max(prompt, counts.output) > MAX_TOKENS:
        return None
    heard, seen = _media(usage, "promptTokensDetails")
    spoken, drawn = _media(usage, "candidatesTokensDetails")
    spoken = min(spoken, counts.output)
    drawn = min(drawn, counts.output - spoken)
    return Usage(
        prompt,
        counts.output,
        counts.cache_read,
        reasoning_tokens=counts.reasoning or 0,
        audio_tokens=min(heard, prompt) + spoken,
        audio_output_tokens=spoken,
        image_tokens=min(seen, prompt) + drawn,
        image_output_tokens=drawn,
        service_tier=_tier(usage),
    )


def _tier(usage: object) -> str:
    """Returns the service tier. Vertex AI names it by the type of the traffic.

    >>> _tier({"trafficType": "ON_DEMAND_FLEX"}), _tier({"serviceTier": "priority"}), _tier({})
    ('flex', 'priority', '')
    """
    if not isinstance(usage, dict):
        return ""
    return tier_of(usage.get("serviceTier") or usage.get("trafficType")).removeprefix("on_demand_")


def _media(usage: object, name: str) -> tuple[int, int]:
    """Returns how many tokens of the prompt or of the answer are sound, and how many are of images.

    >>> _media({"x": [{"modality": "IMAGE", "tokenCount": 3}, {"modality": "AUDIO", "tokenCount": 4}]}, "x")
    (4, 3)
    """
    details = usage.get(name) if isinstance(usage, dict) else None
    sound = images = 0
    for each in details if isinstance(details, list) else ():
        kind = each.get("modality") if isinstance(each, dict) else None
        if kind == "AUDIO":
            sound += _count(each, "tokenCount") or 0
        elif kind == "IMAGE":
            images += _count(each, "tokenCount") or 0
    return sound, images


def _count(usage: _Json, name: str) -> int | None:
    found = usage.get(name)
    return found if type(found) is int and found >= 0 else None
