"""Has upstreams count the prompts whose tokens had to be estimated, so that the next estimates are better.

The record of an exchange is settled at once, with the estimate: settling does not wait. What the upstream then counts
corrects the factor of the target (`openai.token_ratios`), by which the next estimate is multiplied. So an upstream that
never reports how many tokens it has used needs few such requests, and none of them is part of a call:

* of a target, the prompts of its first calls are counted, then one in `_EVERY`;
* at most `_MOST_IN_FLIGHT` requests are in flight in a worker, each for at most `_TIMEOUT_S`;
* one is only made while its upstream has two free slots, so that no call waits for the one that it takes;
* after a failure, the upstream is not asked for `_PAUSE_S`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Mapping
from weakref import WeakKeyDictionary

import attrs
import trio

from trigate.concurrency.notify import open_service
from trigate.dialects.token_counts import CountRequest, count_requests, counts_tokens, decode_count
from trigate.dialects.translated_call import TranslatedCall
from trigate.errors import GatewayError, ProtocolViolation, Rejected, Throttled, UpstreamTimeout
from trigate.exchange.discovery import translation_for
from trigate.exchange.preparation import encoded, prepare
from trigate.exchange.reasoning_memory import ReasoningMemory
from trigate.exchange.request import ExchangeRequest
from trigate.logs import log
from trigate.openai.token_estimate import MOST_QUICK_BYTES, estimated_tokens
from trigate.openai.token_ratios import Ratio
from trigate.routing.routes import Target
from trigate.upstream.upstream import Upstream

_EVERY = 64
_MOST_IN_FLIGHT = 4
_TIMEOUT_S = 5.0
_PAUSE_S = 600.0
_MAX_ANSWER_BYTES = 4 * 1024 * 1024
"""vLLM and llama.cpp answer with each token's number."""
_OF_THE_CALL = ("idempotency-key", "traceparent", "tracestate")
"""The headers that are about the call itself."""


@attrs.define
class _Counter:
    """What is known of an upstream.

    Attributes:
        form: Which of the requests that may count has counted last.
        paused_until: Trio time.
        warned: A failure has been logged.
    """

    form: int = 0
    paused_until: float = -math.inf
    warned: bool = False


class PromptCounts:
    """The service. Made by `open_prompt_counts`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._counters: WeakKeyDictionary[Upstream, _Counter] = WeakKeyDictionary()
        self._in_flight = 0
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<PromptCounts {self._in_flight} in flight>"

    def note(self, request: ExchangeRequest, target: Target, ratio: Ratio, memory: ReasoningMemory) -> None:
        """Notes that the prompt of a call at a target had to be estimated; it may be counted now. Synchronous.

        Args:
            ratio: How far the estimates of the target's prompts are off.
            memory: What is remembered of conversations.
        """
        generation = request.generation
        upstream = generation.upstreams[target.upstream]
        if (
            not counts_tokens(upstream.config)
            or request.passed is not None
            or len(request.call.body) > MOST_QUICK_BYTES
        ):
            return
        if self._is_closed or generation.is_retired or self._in_flight >= _MOST_IN_FLIGHT:
            return
        counter = self._counters.setdefault(upstream, _Counter())
        has_slots = upstream.in_flight + 2 <= upstream.config.max_connections
        if has_slots and trio.current_time() >= counter.paused_until and ratio.wants(every=_EVERY):
            self._in_flight += 1
            generation.hold()
            self._nursery.start_soon(self._run, request, target, ratio, memory, counter)

    def close(self) -> None:
        """Ends the service: nothing is counted from now on."""
        self._is_closed = True

    async def _run(
        self, request: ExchangeRequest, target: Target, ratio: Ratio, memory: ReasoningMemory, counter: _Counter
    ) -> None:
        generation = request.generation
        upstream = generation.upstreams[target.upstream]
        try:
            with trio.move_on_after(_TIMEOUT_S) as limit:
                count = await self._count(request, target, upstream, memory, counter)
                if count is not None:
                    ratio.note(estimated=estimated_tokens(request.call.body), reported=count)
            if limit.cancelled_caught:
                message = f"The upstream {upstream.name} has not counted a prompt within {_TIMEOUT_S:g} s."
                raise UpstreamTimeout(message, phase="response_head")
        except GatewayError as error:
            _pause(counter, upstream, error)
        except Exception:  # a defect here must not end the gateway
            log.exception("token_count_crashed", upstream=upstream.name)
            counter.paused_until = trio.current_time() + _PAUSE_S
        finally:
            self._in_flight -= 1
            generation.let_go()

    async def _count(
        self, request: ExchangeRequest, target: Target, upstream: Upstream, memory: ReasoningMemory, counter: _Counter
    ) -> int | None:
        """Returns how many tokens the prompt has; None = nothing counts such calls.

        Raises:
            GatewayError: The upstream does not count it.
        """
        call, model = request.call, target.model
        translation = translation_for(call, upstream, model)
        if isinstance(translation, TranslatedCall):
            await prepare(translation, call, model, upstream, memory, request.owner)
        path, body, _ = encoded(translation, call, model, upstream)
        kept = {name: value for name, value in request.headers.items() if name not in _OF_THE_CALL}
        headers = translation.headers({**kept, "accept": "application/json"})
        error: GatewayError | None = None
        forms = count_requests(upstream.config.kind, path, body, model)
        first = min(counter.form, max(0, len(forms) - 1))
        for form, asked in enumerate(forms[first:], first):
            try:
                count = await _ask(upstream, asked, headers=headers, model=model, owner=request.owner)
            except Throttled:
                raise
            except (Rejected, ProtocolViolation) as refused:
                error = error or refused
            else:
                counter.form, counter.warned = form, False
                return count
        if error is not None:
            raise error
        return None


async def _ask(upstream: Upstream, asked: CountRequest, *, headers: Mapping[str, str], model: str, owner: str) -> int:
    """Returns the count. Raises GatewayError."""
    sender = upstream.at_root() if asked.at_root else upstream
    async with sender.open("POST", asked.path, asked.body, headers=headers, model=model, owner=owner) as reply:
        if reply.status != 200:
            raise await sender.error_of(reply)
        count = decode_count(await reply.read(_MAX_ANSWER_BYTES))
    if count is None:
        raise ProtocolViolation(f"The upstream {upstream.name} answered {asked.path} without a count of tokens.")
    return count


def _pause(counter: _Counter, upstream: Upstream, error: GatewayError) -> None:
    if error.blame != "provider":
        return
    counter.paused_until = trio.current_time() + _PAUSE_S
    if not counter.warned:
        counter.warned = True
        log.warning("tokens_not_counted", upstream=upstream.name, error=error.message)


@contextlib.asynccontextmanager
async def open_prompt_counts() -> AsyncIterator[PromptCounts]:
    """Opens the service. When it closes, requests in flight are cancelled."""
    async with open_service() as nursery:
        counts = PromptCounts(nursery)
        try:
            yield counts
        finally:
            counts.close()
