"""Renders the gateway's errors in OpenAI's format.

That is the gateway's own (`GatewayError.to_response`), with two additions:

* That a request is too long for the model is said with OpenAI's code and in its words, in whichever words the upstream
  says it. Agents then shorten the conversation; any other error they answer with the same request, several times.
* An error body in Anthropic's envelope, or with Google's `code` and `status`, is replaced by one of OpenAI's, with the
  same message and, of Anthropic's, the same type.
"""

from __future__ import annotations

import msgspec

from trigate.dialects.overflow import overflow_of
from trigate.errors import GatewayError, Header, Rejected
from trigate.openai.provider_error import error_object
from trigate.openai.raw_json import decode_any

CODE = "context_length_exceeded"


def error_response(error: GatewayError) -> tuple[int, list[Header], bytes]:
    """Renders an error as status, headers and JSON body (before COMMIT)."""
    payload = overflow_payload(error)
    status = error.status if payload is None else 400
    payload = payload or _unwrapped(error)
    if payload is None:
        return error.to_response()
    return status, [(b"content-type", b"application/json"), *error.headers], msgspec.json.encode({"error": payload})


def error_frame(error: GatewayError) -> bytes:
    """Renders an error as one server-sent event (after COMMIT)."""
    payload = overflow_payload(error) or _unwrapped(error)
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


def _unwrapped(error: GatewayError) -> dict[str, object] | None:
    """Returns the error object for a body in Anthropic's envelope or Google's; None = it is in neither."""
    value = decode_any(error.body) if isinstance(error, Rejected) and error.body is not None else None
    if not isinstance(value, dict):
        return None
    told = error_object(error)
    is_google_s = type(told.get("code")) is int and isinstance(told.get("status"), str)
    if value.get("type") != "error" and not is_google_s:
        return None
    kind = told.get("type")
    payload = {**error.payload, **({"type": kind} if isinstance(kind, str) else {})}
    return {**payload, "attempts": error.attempts} if error.attempts else payload
