"""An upstream's JSON answer, and the token counts in it."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from trigate.errors import ProtocolViolation
from trigate.openai import sse
from trigate.openai.raw_json import decode_any, split_provider_fields, with_model

MAX_TOKENS = 2**31 - 1
"""A larger count is no count of tokens, and is ignored: it could not be added up and stored."""


class Usage(NamedTuple):
    """Token counts as the upstream reported them."""

    prompt_tokens: int
    completion_tokens: int


def parse_usage(value: object) -> Usage | None:
    """Reads chat-style (``prompt_tokens``) and responses-style (``input_tokens``) counts; None if there are none.

    >>> parse_usage({"input_tokens": 3, "output_tokens": 4}), parse_usage({"prompt_tokens": 10**30})
    (Usage(prompt_tokens=3, completion_tokens=4), None)
    """
    if not isinstance(value, dict):
        return None
    prompt = value.get("prompt_tokens", value.get("input_tokens"))
    completion = value.get("completion_tokens", value.get("output_tokens", 0))
    if type(prompt) is int and type(completion) is int and 0 <= prompt <= MAX_TOKENS and 0 <= completion <= MAX_TOKENS:
        return Usage(prompt_tokens=prompt, completion_tokens=completion)
    return None


def decode_answer(body: bytes, *, model: str | None, upstream: str) -> tuple[bytes, Usage | None]:
    """Decodes an upstream's JSON answer. A byte order mark before it is dropped (RFC 8259 section 8.1).

    Args:
        body: The answer.
        model: The public model id, which replaces the upstream's; None = the upstream's stays.
        upstream: The upstream's name, for messages.

    Returns:
        The answer with the public model id, and the usage in it.

    Raises:
        ProtocolViolation: The answer is not a JSON object in UTF-8, or it is an error with status 200.
    """
    body = body.removeprefix(sse.BOM)
    try:
        fields = split_provider_fields(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolViolation(
            f"The upstream {upstream} answered with something that is not a JSON object: {error}."
        ) from None
    error_raw = fields.get("error")
    if error_raw is not None and bytes(error_raw) != b"null" and "choices" not in fields and "object" not in fields:
        raise ProtocolViolation(
            f"The upstream {upstream} answered 200 with an error: {bytes(error_raw)[:300].decode(errors='replace')}"
        )
    usage = parse_usage(decode_any(bytes(fields["usage"]))) if "usage" in fields else None
    if model is None or "model" not in fields:
        return body, usage
    return with_model(body, fields, msgspec.json.encode(model)), usage
