"""An upstream's JSON answer, and the token counts in it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from trigate.errors import GatewayError, ProtocolViolation
from trigate.openai import sse
from trigate.openai.endpoints import Endpoint
from trigate.openai.provider_error import find_message, is_error, reported
from trigate.openai.raw_json import decode_any, split_provider_fields, with_model

MAX_TOKENS = 2**31 - 1
"""A larger count is no count of tokens, and is ignored: it could not be added up and stored."""
_MAX_TIER_CHARS = 32
_raw_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])


class Usage(NamedTuple):
    """Token counts as the upstream reported them, and what else its price depends on.

    Attributes:
        prompt_tokens: Those of the cache included.
        completion_tokens: Those of the reasoning included.
        cached_tokens: How many of the prompt's the provider has read from its cache; 0 if it does not say.
        cache_write_tokens: How many of the prompt's it has written into its cache.
        reasoning_tokens: How many of the answer's are reasoning.
        audio_tokens: How many of all are sound.
        audio_output_tokens: How many of the answer's are sound.
        cache_write_1h_tokens: How many of those in the cache the provider keeps for an hour, which costs more.
        image_tokens: How many of all are of images.
        image_output_tokens: How many of the answer's are of images.
        images: How many images the answer of an endpoint of images has.
        characters: How many characters the text has that an endpoint of speech has read out.
        audio_ms: How many milliseconds of sound have been transcribed.
        service_tier: The tier in which the provider has served the call, if it says so: ``flex``, ``priority``,
            ``batch``; its normal one has a name as well, such as ``default``.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    audio_tokens: int = 0
    audio_output_tokens: int = 0
    cache_write_1h_tokens: int = 0
    image_tokens: int = 0
    image_output_tokens: int = 0
    images: int = 0
    characters: int = 0
    audio_ms: int = 0
    service_tier: str = ""

    def __repr__(self) -> str:
        """Leaves out the details that are 0."""
        counts = self._asdict()
        told = [
            f"{name}={count!r}"
            for name, count in counts.items()
            if count or name in ("prompt_tokens", "completion_tokens")
        ]
        return f"Usage({', '.join(told)})"


def sum_of(usages: Iterable[Usage]) -> Usage:
    """Adds counts up. The service tier is that of the last ones.

    >>> sum_of([Usage(1, 2, images=1), Usage(3, 4, images=1, service_tier="flex")])._asdict()["images"]
    2
    """
    *counts, tiers = zip(*usages, strict=True)
    return Usage._make([*map(sum, counts), tiers[-1]])


def tier_of(value: object) -> str:
    """Reads the name of a service tier; empty = it is none.

    >>> tier_of("Flex"), tier_of(None)
    ('flex', '')
    """
    return value[:_MAX_TIER_CHARS].lower() if isinstance(value, str) else ""


def with_images(usage: Usage | None, results: object) -> Usage | None:
    """Adds the number of images to what an answer reports. Where that does not say which tokens are of images, all of
    the answer are.

    Args:
        results: The images.

    >>> with_images(None, [{"url": "a"}, {"url": "b"}])
    Usage(prompt_tokens=0, completion_tokens=0, images=2)
    >>> with_images(Usage(3, 4), [{"url": "a"}])
    Usage(prompt_tokens=3, completion_tokens=4, image_tokens=4, image_output_tokens=4, images=1)
    """
    if not isinstance(results, list) or not results:
        return usage
    found = usage or _NONE
    drawn = found.image_output_tokens or found.completion_tokens
    seen = found.image_tokens - found.image_output_tokens
    return found._replace(images=len(results), image_tokens=seen + drawn, image_output_tokens=drawn)


def with_duration(usage: Usage | None, answer: Mapping[str, Any]) -> Usage | None:  # Any: JSON of any shape
    """Adds the length of the sound that a transcription reports, if it reports no tokens: OpenAI in its ``usage``,
    and with ``verbose_json`` everybody in ``duration``.

    >>> with_duration(None, {"text": "a", "usage": {"type": "duration", "seconds": 9}})
    Usage(prompt_tokens=0, completion_tokens=0, audio_ms=9000)
    """
    own = answer.get("usage")
    for seconds in (own.get("seconds") if isinstance(own, dict) else None, answer.get("duration")):
        if usage is None and isinstance(seconds, int | float) and 0 < seconds * 1000 <= MAX_TOKENS:
            return Usage(0, 0, audio_ms=math.ceil(seconds * 1000))
    return usage


def parse_usage(value: object, before: Usage | None = None) -> Usage | None:
    """Reads chat-style (``prompt_tokens``) and responses-style (``input_tokens``) counts; None if there are none.

    Anthropic's ``input_tokens`` do not include the tokens of the cache, and the last event of its streams may have only
    ``output_tokens``.

    Args:
        before: The counts that were reported before, in the same stream.

    >>> parse_usage({"input_tokens": 3, "output_tokens": 4}), parse_usage({"prompt_tokens": 10**30})
    (Usage(prompt_tokens=3, completion_tokens=4), None)
    >>> parse_usage({"input_tokens": 3, "cache_read_input_tokens": 10, "output_tokens": 1})
    Usage(prompt_tokens=13, completion_tokens=1, cached_tokens=10)
    >>> parse_usage({"output_tokens": 4}, Usage(13, 1, 10))
    Usage(prompt_tokens=13, completion_tokens=4, cached_tokens=10)
    >>> parse_usage({"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}})
    Usage(prompt_tokens=9, completion_tokens=4, cached_tokens=8)
    >>> parse_usage({"input_tokens": 3, "output_tokens": 4, "service_tier": "batch"})
    Usage(prompt_tokens=3, completion_tokens=4, service_tier='batch')
    """
    if not isinstance(value, dict):
        return None
    known = before or _NONE
    prompt = value.get("prompt_tokens")
    in_prompt = _details(value, "prompt_tokens_details", "input_tokens_details", "input_token_details")
    written = _count(in_prompt, "cache_write_tokens") or _count(value, "cache_creation_input_tokens")
    if prompt is None:
        prompt = value.get("input_tokens")
        if type(prompt) is int:
            prompt += _count(value, "cache_read_input_tokens") + _count(value, "cache_creation_input_tokens")
        if before is not None and "output_tokens" in value and not prompt:
            prompt = before.prompt_tokens
        else:
            known = _NONE
    else:
        known = _NONE
    completion = value.get("completion_tokens", value.get("output_tokens", 0))
    if not (type(prompt) is int and type(completion) is int):
        return None
    in_answer = _details(value, "completion_tokens_details", "output_tokens_details", "output_token_details")
    reasoning = _count(in_answer, "reasoning_tokens") or _count(in_answer, "thinking_tokens")
    if reasoning and value.get("total_tokens") == prompt + completion + reasoning:
        completion += reasoning  # xAI does not count it among those of the answer
    if not (0 <= prompt <= MAX_TOKENS and 0 <= completion <= MAX_TOKENS):
        return None
    cached = min(_cached_tokens(value, in_prompt) or known.cached_tokens, prompt)
    written = min(written or known.cache_write_tokens, prompt - cached)
    spoken = min(_count(in_answer, "audio_tokens"), completion)
    drawn = min(_count(in_answer, "image_tokens"), completion - spoken)
    tier = value.get("service_tier") or ""
    if value.get("speed") == "fast":
        tier = "fast"  # Anthropic has it beside the tier, which is the standard one then
    if not tier and before is not None:
        tier = before.service_tier
    return Usage(
        prompt,
        completion,
        cached,
        written,
        min(reasoning, completion),
        min(_count(in_prompt, "audio_tokens"), prompt) + spoken,
        spoken,
        min(_count(value.get("cache_creation"), "ephemeral_1h_input_tokens") or known.cache_write_1h_tokens, written),
        min(_count(in_prompt, "image_tokens"), prompt) + drawn,
        drawn,
        service_tier=tier_of(tier) if tier else "",
    )


_NONE = Usage(0, 0)


def _details(usage: dict[str, Any], *names: str) -> object:  # Any: JSON of any shape
    for name in names:
        if usage.get(name):
            return usage[name]
    return None


def _count(value: object, name: str) -> int:
    """Reads a count of tokens; 0 if there is none."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if type(found) is int and 0 < found <= MAX_TOKENS else 0


def _cached_tokens(usage: dict[str, Any], details: object) -> int:  # Any: JSON of any shape
    """Reads how many tokens of the prompt came from the provider's cache: in OpenAI's details of any API, as Anthropic
    counts them, as DeepSeek does, or as Moonshot does. 0 if it is not said."""
    return (
        _count(details, "cached_tokens")
        or _count(usage, "cache_read_input_tokens")
        or _count(usage, "prompt_cache_hit_tokens")
        or _count(usage, "cached_tokens")
    )


def find_usage(value: Mapping[str, Any], before: Usage | None = None) -> Usage | None:  # Any: JSON of any shape
    """Reads the counts of an answer or an event, wherever providers put them: at its top level, in the ``response`` of
    a responses API event, in the ``message`` of Anthropic's first event, in ``x_groq`` (Groq), or in a choice
    (Moonshot). ``before`` is as in `parse_usage`.

    >>> find_usage({"choices": [{"usage": {"prompt_tokens": 3, "completion_tokens": 4}}]})
    Usage(prompt_tokens=3, completion_tokens=4)
    """
    choices = value.get("choices")
    holders = (value, value.get("response"), value.get("message"), value.get("x_groq"))
    for holder in (*holders, *(choices if isinstance(choices, list) else ())):
        found = parse_usage(holder.get("usage"), before) if isinstance(holder, dict) else None
        if found is not None:
            tier = holder.get("service_tier")
            return found._replace(service_tier=tier_of(tier)) if tier else found
    return None


def decode_answer(body: bytes, endpoint: Endpoint, *, model: str | None, upstream: str) -> tuple[bytes, Usage | None]:
    """Decodes an upstream's JSON answer. A byte order mark (RFC 8259 section 8.1) and blanks around it are dropped.

    Args:
        body: The answer.
        model: The public model id, which replaces the upstream's; None = the upstream's stays.
        upstream: The upstream's name, for messages.

    Returns:
        The answer with the public model id, and the usage in it.

    Raises:
        ProtocolViolation: The answer is not a JSON object in UTF-8, or has no results.
        Reported: It is an error with status 200.
    """
    if not body.startswith(b"{"):
        body = body.removeprefix(sse.BOM).strip()  # blanks are a keep-alive of some providers
    try:
        fields = split_provider_fields(body)
    except (ValueError, RecursionError) as error:
        if glued := _GLUED.search(body):  # some servers end JSON like a stream
            return decode_answer(body[: glued.start()], endpoint, model=model, upstream=upstream)
        value = decode_any(body)
        if isinstance(value, list) and any(isinstance(item, dict) and is_error(item) for item in value[:1]):
            raise reported(upstream, value) from None
        raise ProtocolViolation(
            f"The upstream {upstream} answered with something that is not a JSON object: {error}."
        ) from None
    results = fields.get(endpoint.results)
    if (
        results is None
        or memoryview(results).nbytes <= len(b"null")
        or (endpoint.needs_finish_reason and bytes(memoryview(results)[:1]) != b"[")
        or body.count(b'"error"')
    ):
        _check_results(body, endpoint, upstream=upstream)
    usage = parse_usage(decode_any(bytes(fields["usage"]))) if "usage" in fields else None
    if usage is None and b'"usage"' in body:
        usage = find_usage(decode_any(body) or {})
    elif usage is not None and "service_tier" in fields:
        tier = bytes(fields["service_tier"])
        if tier not in _NO_TIERS:
            usage = usage._replace(service_tier=tier_of(decode_any(tier)))
    if endpoint.makes_images and results is not None:
        usage = with_images(usage, _split_list(results))
    if model is None or "model" not in fields:
        return body, usage
    return with_model(body, fields, msgspec.json.encode(model)), usage


def _split_list(results: msgspec.Raw) -> list[msgspec.Raw] | None:
    try:
        return _raw_list_decoder.decode(results)
    except (msgspec.DecodeError, RecursionError):
        return None


_NO_TIERS = (b'"default"', b"null")
"""The service tier of nearly all answers: its price is that of the model."""
_GLUED = re.compile(rb"\s+data: ?\[DONE\]\s*\Z")


def _check_results(body: bytes, endpoint: Endpoint, *, upstream: str) -> None:
    """Raises the error of an answer whose results are missing, null, empty, or all of them errors."""
    value = decode_any(body) or {}
    results = value.get(endpoint.results)
    error: GatewayError | None = None
    if endpoint.needs_finish_reason and not isinstance(results, list):
        results = None
    if results:
        if endpoint.needs_finish_reason and all(
            isinstance(choice, dict) and choice.get("error") for choice in results
        ):  # OpenRouter
            error = reported(upstream, results[0])
    elif is_error(value):
        error = reported(upstream, value)
    elif results is None or endpoint.needs_finish_reason:
        said = find_message(value)
        error = ProtocolViolation(
            f"The upstream {upstream} answered 200 without {endpoint.results}{f': {said[:300]}' if said else '.'}"
        )
    if error is not None:
        raise error
