"""What an exchange holds of the limits of its key, its group, its model and the gateway, while it is in flight.

It is held before the exchange queues for admission, and settled with it. What a call may use is not known before it has
been served: it holds an estimate of its prompt, and of its answer what the model's answers have had lately
(`quotas.answer_sizes`), or what the call allows, if that is less.
"""

from __future__ import annotations

import time

import trio

from trigate.exchange.state import ExchangeState
from trigate.exchange.watchdog import call_timed_out
from trigate.openai.raw_json import decode_any
from trigate.openai.request import Call
from trigate.openai.token_estimate import estimated_tokens
from trigate.quotas.counters import Amounts, Counter
from trigate.quotas.service import Quotas
from trigate.routing.routes import Target
from trigate.upstream.generation import Generation, Route

NOTHING = Amounts()
_MOST = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_NESTED = (("generationConfig", "maxOutputTokens"), ("options", "num_predict"), ("inferenceConfig", "maxTokens"))
_WITHOUT_TEXT = ("/embeddings", "/moderations")
"""Endpoints whose answers have no tokens."""


def hold_nowait(state: ExchangeState, route: Route, quotas: Quotas) -> Amounts | None:
    """Holds what an exchange may use, if that needs no wait.

    Returns:
        None = it is held, or nothing limits the exchange; else the amounts for `hold`.
    """
    record, key = state.record, state.request.key
    assert record is not None, "an exchange that holds something has begun"
    if key.settings.group is not None:
        record.key_group = key.settings.group
    if route.alias in state.generation.config.models:
        record.alias = route.alias
    counters = quotas.counters(key, route.alias, record.started_at)
    if not counters:
        return None
    state.counters = counters
    amounts = amounts_of(state.request.call, state.generation, route.targets, counters, quotas)
    state.reservation = quotas.reserve_nowait(counters, amounts, state.started_at)
    return amounts if state.reservation is None else None


async def hold(state: ExchangeState, amounts: Amounts, quotas: Quotas) -> None:
    """Holds what an exchange may use, as soon as it can be leased.

    Raises:
        LimitReached, StoreUnavailable: As `Quotas.reserve`.
        GatewayError: The exchange was cancelled.
    """
    left_s = state.deadline_at - trio.current_time()
    with state.waiting_in_queue(left_s, lambda: None):
        state.reservation = await quotas.reserve(state.counters, amounts)
    if state.reservation is None:
        raise call_timed_out(left_s)


def settle(state: ExchangeState, quotas: Quotas) -> None:
    """Counts what an exchange has used, from its completed record. Synchronous."""
    reservation, record = state.reservation, state.record
    if reservation is None or record is None:
        return
    answer = record.completion_tokens or 0
    if answer and not record.counted:
        quotas.sizes.note(record.model, answer)
    quotas.settle(reservation, Amounts(tokens=(record.prompt_tokens or 0) + answer, cost=record.cost or 0))


def amounts_of(
    call: Call, generation: Generation, targets: tuple[Target, ...], counters: tuple[Counter, ...], quotas: Quotas
) -> Amounts:
    """Returns what a call may use at most at one of these targets."""
    if not any(counter.counts_tokens for counter in counters):
        return NOTHING
    prompt, answer = estimated_tokens(call.body), 0
    if call.endpoint.counts_tokens and call.endpoint.path not in _WITHOUT_TEXT:
        answer = quotas.sizes.expected(call.model, _asked(call))
        if "n" in call.fields or "prompt" in call.fields:
            answer *= call.choices
    return Amounts(tokens=prompt + answer, cost=_most(generation, targets, prompt, answer))


def _most(generation: Generation, targets: tuple[Target, ...], prompt: int, answer: int) -> int:
    prices = getattr(generation, "prices", None)
    if prices is None:
        return 0
    most, now = 0, time.time()
    for target in targets:
        price = prices.price(target.upstream, target.model, now)
        if price is not None:
            most = max(most, price.most(prompt, answer))
    return most


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
