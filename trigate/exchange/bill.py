"""What an exchange has used and what that costs: its token counts over all attempts, and the sum of their prices."""

from __future__ import annotations

from typing import NamedTuple

from trigate.config.key_sections import MicroUsd
from trigate.exchange.attempt import Attempt
from trigate.exchange.state import ExchangeState
from trigate.openai.answer import Usage, sum_of
from trigate.openai.token_estimate import MOST_QUICK_BYTES, estimated_tokens, tokens_of_size
from trigate.openai.token_ratios import TokenRatios
from trigate.prices.price import FREE
from trigate.routing.routes import Target


class Bill(NamedTuple):
    """What an exchange has used.

    Attributes:
        usage: The counts of all attempts together; None = nobody counts them.
        counted: The gateway has estimated some of them.
        cost: What they cost; None = a price is not known, or no count of tokens tells it.
    """

    usage: Usage | None
    counted: bool
    cost: MicroUsd | None


_NOTHING = Bill(None, False, MicroUsd(0))


def bill_of(state: ExchangeState) -> Bill:
    """Makes the bill of an exchange, as far as its upstreams have answered until now.

    Every attempt that has answered costs something: those that a continued stream consists of, and one that lost a
    race with its content. An attempt that reports nothing has its tokens estimated: one for each event of a stream,
    and four bytes for each of the rest, times what the calls that were reported have taught of its target
    (`openai.token_ratios`). The prices are those of the time at which the exchange began.
    """
    source, record = state.source, state.record
    if source is None or record is None or not source.attempts:
        return _NOTHING
    call = state.request.call
    if not state.is_billed and call.endpoint.counts_tokens:
        return _NOTHING  # another exchange of the shared call has it
    prices = state.request.generation.prices
    if len(source.attempts) == 1 and (usage := source.attempts[0].reported_usage) is not None:  # as usual
        target = source.attempts[0].target
        return Bill(usage, False, prices.cost(target.upstream, target.model, usage, record.started_at))
    parts: list[tuple[Target, Usage]] = []
    counted = False
    for attempt in source.attempts:
        usage = attempt.reported_usage
        if usage is not None:
            parts.append((attempt.target, usage))
    if call.endpoint.counts_tokens and not call.endpoint.makes_images and len(parts) < len(source.attempts):
        unreported = [each for each in source.attempts if each.reported_usage is None and _has_answered(each)]
        if unreported and (parts or source.bytes_sent or source.events):
            prompt = estimated_tokens(call.body)
            parts += [(each.target, _estimate(state, each.target, prompt, _events(each))) for each in unreported]
            counted = True
        elif not parts and source.target is not None and (source.bytes_sent or source.events):
            if call.speech_characters:  # the size of sound tells no tokens
                parts.append((source.target, Usage(0, 0, characters=call.speech_characters)))
            else:
                completion = source.events if call.stream else tokens_of_size(source.bytes_sent)
                prompt = estimated_tokens(call.body)
                parts.append((source.target, _estimate(state, source.target, prompt, completion)))
                counted = True
    if not parts:
        if not call.model or source.target is None or not (source.bytes_sent or source.events):
            return _NOTHING
        price = prices.price(source.target.upstream, source.target.model, record.started_at)
        return _NOTHING if price is FREE else Bill(None, False, None)
    cost: MicroUsd | None = MicroUsd(0)
    for target, usage in parts:
        part = prices.cost(target.upstream, target.model, usage, record.started_at)
        cost = None if part is None or cost is None else MicroUsd(cost + part)
    total = parts[0][1] if len(parts) == 1 else sum_of([usage for _, usage in parts])
    return Bill(total, counted, cost)


def _estimate(state: ExchangeState, target: Target, prompt: int, answer: int) -> Usage:
    """Corrects estimates by what is known of the target."""
    call = state.request.call
    ratios = _ratios(state, target)
    return Usage(ratios.prompt.corrected(prompt), (ratios.events if call.stream else ratios.text).corrected(answer))


def learn_from(state: ExchangeState) -> None:
    """Compares the estimates of a complete exchange with what its only attempt has reported. Once for each exchange."""
    call, source = state.request.call, state.source
    if source is None or len(source.attempts) != 1 or not source.is_delivered or not state.is_billed:
        return
    [attempt] = source.attempts
    usage, endpoint = attempt.reported_usage, call.endpoint
    if usage is None or not endpoint.counts_tokens or endpoint.makes_images or len(call.body) > MOST_QUICK_BYTES:
        return
    ratios = _ratios(state, attempt.target)
    if not ratios.prompt.wants():
        return
    ratios.prompt.note(estimated=estimated_tokens(call.body), reported=usage.prompt_tokens)
    if call.stream:
        ratios.events.note(estimated=source.events, reported=usage.completion_tokens)
    else:
        ratios.text.note(estimated=tokens_of_size(source.bytes_sent), reported=usage.completion_tokens)


def _ratios(state: ExchangeState, target: Target) -> TokenRatios:
    assert state.source is not None, "an attempt belongs to a source"
    return state.source.services.targets.of(target, state.request.call.endpoint.path).ratios


def _has_answered(attempt: Attempt) -> bool:
    return attempt.reader is not None and attempt.reader.has_content


def _events(attempt: Attempt) -> int:
    return attempt.reader.events if attempt.reader is not None else 0
