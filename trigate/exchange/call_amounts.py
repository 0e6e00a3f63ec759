"""What a call may use at most: tokens and money.

That is not known before it has been served. Its prompt is estimated, and corrected by what its targets have reported
(`openai.token_ratios`). Of its answer counts what the model's answers have had lately (`quotas.answer_sizes`), or what
the call allows, if that is less. The price is that of the dearest target.
"""

from __future__ import annotations

import time

from trigate.openai.answer import tier_of
from trigate.openai.raw_json import decode_any
from trigate.openai.request import Call
from trigate.openai.token_estimate import estimated_tokens
from trigate.quotas.counters import Amounts, Limits
from trigate.quotas.service import Quotas
from trigate.routing.routes import Target
from trigate.routing.target_state import Targets
from trigate.upstream.generation import Generation

NOTHING = Amounts()
_MOST = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_NESTED = (("generationConfig", "maxOutputTokens"), ("options", "num_predict"), ("inferenceConfig", "maxTokens"))
_TIERS = ("speed", "service_tier")
"""Anthropic's fast mode is no service tier of its own, but has its price."""
_WITHOUT_TEXT = ("/embeddings", "/moderations")
"""Endpoints whose answers have no tokens."""


def amounts_of(
    call: Call, generation: Generation, targets: tuple[Target, ...], limits: Limits, quotas: Quotas, states: Targets
) -> Amounts:
    """Returns what a call may use at most at one of these targets, which have these states."""
    if not (limits.tokens or limits.budgets):
        return NOTHING
    prompt, answer = states.corrected_prompt(estimated_tokens(call.body), targets, call.endpoint.path), 0
    if call.endpoint.counts_tokens and call.endpoint.path not in _WITHOUT_TEXT:
        answer = quotas.sizes.expected(call.model, _asked(call))
        if "n" in call.fields or "prompt" in call.fields:
            answer *= call.choices
    if not limits.budgets:
        return Amounts(prompt + answer)
    return Amounts(prompt + answer, _most(call, generation, targets, prompt, answer))


def _most(call: Call, generation: Generation, targets: tuple[Target, ...], prompt: int, answer: int) -> int:
    images, characters = call.choices if call.endpoint.makes_images else 0, call.speech_characters
    most, now, prices, tier = 0, time.time(), generation.prices, _tier(call)
    for target in targets:
        for price in prices.possible(target.upstream, target.model, now, tier):
            most = max(most, price.most(prompt, answer, images, characters))
    return most


def _tier(call: Call) -> str:
    """The service tier that a call asks for, by which it may cost more."""
    for name in _TIERS:
        if name in call.fields:
            return tier_of(decode_any(bytes(call.fields[name])))
    return ""


def _asked(call: Call) -> int | None:
    """The most tokens that a call allows its answer; None = it does not say."""
    fields = call.fields
    for name in _MOST:
        if name in fields:
            asked = decode_any(bytes(fields[name]))
            if type(asked) is int and asked > 0:
                return asked
    for name, inner in _NESTED:
        if name in fields:
            options = decode_any(bytes(fields[name]))
            asked = options.get(inner) if isinstance(options, dict) else None
            if type(asked) is int and asked > 0:
                return asked
    return None
