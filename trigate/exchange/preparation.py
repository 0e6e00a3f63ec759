"""Prepares a translated call: decodes it, gives it what the gateway remembers of its conversation, and encodes it."""

from __future__ import annotations

import trio

from trigate.dialects.translated_call import TranslatedCall
from trigate.exchange.reasoning_memory import ReasoningMemory
from trigate.exchange.translation import Translation
from trigate.openai.request import Call
from trigate.upstream.upstream import Upstream

_LARGE_BYTES = 256 * 1024
_TRANSLATING = trio.CapacityLimiter(1)
"""Large calls are translated one by one: a further thread would delay the event loop by a turn of the interpreter."""


async def prepare(
    translation: TranslatedCall, call: Call, model: str, upstream: Upstream, memory: ReasoningMemory, owner: str
) -> None:
    """Does what a call needs before it is sent; for a large one in a thread, since it must not hold other calls up.

    Args:
        model: The upstream's own model id.
        owner: The name of the gateway key.

    Raises:
        BadRequest: The call is malformed, or (`Untranslatable`) has something that cannot be expressed.
    """
    if len(call.body) <= _LARGE_BYTES:
        await memory.use_for(translation, owner)
        translation.limit_answer(upstream.max_output_tokens(model))
        return  # encoded when it is sent
    await trio.to_thread.run_sync(translation.decode, limiter=_TRANSLATING)
    await memory.use_for(translation, owner)
    translation.limit_answer(upstream.max_output_tokens(model))
    await trio.to_thread.run_sync(translation.body, call, model, upstream.config, limiter=_TRANSLATING)


def encoded(translation: Translation, call: Call, model: str, upstream: Upstream) -> tuple[str, bytes, tuple[str, ...]]:
    """Encodes a call as it is sent to an upstream.

    Returns:
        The path below the base URL, the body, and the names of the fields that were left out.

    Raises:
        GatewayError: As `Translation.body`.
    """
    body = translation.body(call, model, upstream.config)
    dropped, path, edits = translation.dropped, translation.path(call, model), upstream.edits
    if edits is not None:
        limit = upstream.max_output_tokens(model) if edits.clamps else None
        body, edited = edits.apply(body, path, max_tokens=limit)
        dropped += edited
    return path, body, dropped
