"""Recognises the error of a provider that a request is too long for its model.

Every provider has words of its own for it, and a client understands only those of its format: an agent then shortens
its conversation instead of failing, or of sending it again and again.

Source: the messages of OpenAI, OpenRouter, DeepSeek, vLLM, SGLang, llama.cpp, Gemini, Mistral, xAI, Anthropic and the
models of Bedrock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import attrs

from trigate.errors import GatewayError, Rejected, Reported
from trigate.openai.provider_error import error_object

_N = r"(?P<tokens>\d[\d,]*)"
_M = r"(?P<maximum>\d[\d,]*)"
_WITH_NUMBERS = [
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        rf"prompt is too long: {_N} tokens > {_M} maximum",
        rf"maximum (?:context|prompt) length is {_M}.{{0,300}}?"
        rf"(?:requested|resulted in|contains|has|passed)(?: about| at least)? {_N}(?: input)? tokens",
        rf"(?:passed|has) {_N} (?:input )?tokens.{{0,200}}?context length is (?:only )?{_M}",
        rf"request \({_N} tokens\) exceeds the available context size \({_M} tokens\)",
        rf"input \({_N} tokens\) is longer than the model's context length \({_M} tokens\)",
        rf"input token count \({_N}\) exceeds the maximum number of tokens allowed \({_M}\)",
        rf"prompt contains {_N} tokens.{{0,100}}?too large for model with {_M} maximum context length",
    )
]
_WITHOUT_NUMBERS = re.compile(
    r"prompt is too long|input is too long|too many total text bytes|number of input tokens exceeds maximum length"
    r"|maximum context length is \d+ tokens\. please reduce the length of the prompt"
    r"|exceeds? the (?:available )?context (?:window|size)"
    r"|exceeds? (?:the )?(?:model's )?maximum context length|longer than the model's context length",
    re.IGNORECASE,
)
_CODES = ("context_length_exceeded", "exceed_context_size_error")


@attrs.frozen
class Overflow:
    """A request was too long. None = the provider did not say how long it was, or may be."""

    tokens: int | None = None
    maximum: int | None = None


def overflow_of(error: GatewayError) -> Overflow | None:
    """Recognises it in an error of an upstream, wherever that has reported it; None = it is another error."""
    if not isinstance(error, Reported) and not (isinstance(error, Rejected) and error.status in (400, 413, 422)):
        return None
    return overflow_in(error.message, error_object(error))


def overflow_in(message: str, error: Mapping[str, object]) -> Overflow | None:
    """Recognises the error; None = it is another one.

    Args:
        message: What the provider says.
        error: Its error object.

    >>> overflow_in("This model's maximum context length is 8192 tokens. However, you requested 9,001 tokens.", {})
    Overflow(tokens=9001, maximum=8192)
    >>> overflow_in("max_tokens is too large: 32000. This model supports at most 16384 completion tokens.", {})
    >>> overflow_in("no", {"code": "context_length_exceeded"})
    Overflow(tokens=None, maximum=None)
    """
    for pattern in _WITH_NUMBERS:
        if (found := pattern.search(message[:4000])) is not None:
            return Overflow(_number(found["tokens"]), _number(found["maximum"]))
    tokens, maximum = error.get("n_prompt_tokens"), error.get("n_ctx")  # llama.cpp
    if type(tokens) is int and type(maximum) is int:
        return Overflow(tokens, maximum)
    if error.get("code") in _CODES or error.get("type") in _CODES or _WITHOUT_NUMBERS.search(message[:4000]):
        return Overflow()
    return None


def _number(text: str) -> int:
    return int(text.replace(",", ""))
