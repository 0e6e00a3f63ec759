"""The errors of a response call.

Before COMMIT, an error has OpenAI's shape, as everywhere. After it, the stream ends with ``response.failed``. Codex
answers most codes with five more full requests, and acts at once on those for which another request is of no use. Each
of these is used where it is true, and nowhere else.

The event has the error twice: in the response, where OpenAI has it, and as ``error`` beside it, since OpenAI's SDKs
raise only on that.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from trigate.dialects.openai_responses.response import response_head
from trigate.dialects.overflow import overflow_of
from trigate.dialects.request_values import Json
from trigate.errors import GatewayError, Header, Overloaded, Rejected, Reported, Unavailable
from trigate.openai.provider_error import error_object
from trigate.openai.request import Call

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
_OF_STATUS: Mapping[int, str] = {
    400: "invalid_prompt",
    413: "invalid_prompt",
    422: "invalid_prompt",
    429: "rate_limit_exceeded",
    503: "server_is_overloaded",
    529: "server_is_overloaded",
}
"""The code of an error that the provider has told, by the status that it stands for."""
_OF_PROVIDER = (CONTEXT_LENGTH_EXCEEDED, "insufficient_quota", "usage_not_included", "rate_limit_exceeded")
"""The codes of a provider that stay as they are."""


def code_of(error: GatewayError) -> str:
    """Returns the code of a response that has failed.

    >>> code_of(Reported("Overloaded", error={}, status=503)), code_of(Reported("Broken", error={}, status=500))
    ('server_is_overloaded', 'server_error')
    """
    if overflow_of(error) is not None:
        return CONTEXT_LENGTH_EXCEEDED
    is_told = isinstance(error, Rejected | Reported) or (isinstance(error, Unavailable) and error.reachable)
    if not is_told:
        return "server_error"
    told = error_object(error)
    for name in ("code", "type"):
        if told.get(name) in _OF_PROVIDER:
            return str(told[name])
    return _OF_STATUS.get(error.status, "server_error")


def overloaded_response(
    error: GatewayError, rendered: tuple[int, list[Header], bytes]
) -> tuple[int, list[Header], bytes]:
    """Gives an error before COMMIT the code by which Codex knows that a server cannot take calls, if it is that one.
    Codex then tries five times; it sends a request 30 times for any other code with 5xx.

    Args:
        rendered: The error as it is rendered for all endpoints of OpenAI's.
    """
    status, headers, body = rendered
    if status != 503 or not isinstance(error, Unavailable | Reported | Overloaded):
        return rendered
    value = msgspec.json.decode(body)
    value["error"]["code"] = "server_is_overloaded"
    return status, headers, msgspec.json.encode(value)


def failed_response(error: GatewayError, call: Call, *, status: str = "failed") -> Json:
    """Returns the response of a call that has failed before there was an answer."""
    identity = call.identity
    response = response_head(
        call,
        status,
        response_id=identity.id if identity is not None else "resp_failed",
        created_at=identity.created_at if identity is not None else 0,
    )
    if status == "failed":
        response["error"] = {"code": code_of(error), "message": error.message}
    return response


def response_failed(error: GatewayError, call: Call, *, sequence: int) -> bytes:
    """Renders an error as the last event of a stream that is not translated, or has not begun.

    Args:
        sequence: How many events were sent before it.
    """
    response = failed_response(error, call)
    event = {"type": "response.failed", "response": response, "error": error.payload, "sequence_number": sequence}
    return b"event: response.failed\ndata: %b\n\n" % msgspec.json.encode(event)
