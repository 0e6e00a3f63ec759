"""Renders the gateway's errors in OpenAI's format.

That is the gateway's own (`GatewayError.to_response`), with one addition: that a request is too long for the model is
said with OpenAI's code and in its words, in whichever words the upstream says it. Agents then shorten the conversation;
any other error they answer with the same request, several times.
"""

from __future__ import annotations

import msgspec

from trigate.dialects.overflow import overflow_of
from trigate.errors import GatewayError, Header
from trigate.openai.provider_error import error_object

CODE = "context_length_exceeded"


def error_response(error: GatewayError) -> tuple[int, list[Header], bytes]:
    """Renders an error as status, headers and JSON body (before COMMIT)."""
    payload = overflow_payload(error)
    if payload is None:
        return error.to_response()
    return 400, [(b"content-type", b"application/json"), *error.headers], msgspec.json.encode({"error": payload})


def error_frame(error: GatewayError) -> bytes:
    """Renders an error as one server-sent event (after COMMIT)."""
    payload = overflow_payload(error)
    return error.to_frame() if payload is None else b"data: %b\n\n" % msgspec.json.encode({"error": payload})


def overflow_payload(error: GatewayError) -> dict[str, object] | None:
    """Returns the error object for a request that is too long; None = the error is another one, or the upstream has
    said it with OpenAI's code, and goes to the client word for word."""
    found = overflow_of(error)
    if found is None or error_object(error).get("code") == CODE:
        return None
    if found.tokens is None or found.maximum is None:
        message = f"This model's maximum context length is exceeded: {error.message}"
    else:
        message = (
            f"This model's maximum context length is {found.maximum} tokens. "
            f"However, your messages resulted in {found.tokens} tokens."
        )
    payload: dict[str, object] = {"message": message, "type": "invalid_request_error", "param": None, "code": CODE}
    return {**payload, "attempts": error.attempts} if error.attempts else payload
