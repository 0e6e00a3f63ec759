"""Renders the gateway's errors in Anthropic's format.

What an upstream of the same format says goes to the client word for word, since agents act on the wording. So does a
provider's message in another format, except that a request was too long: that is said in Anthropic's words.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from trigate.dialects.overflow import overflow_of
from trigate.errors import GatewayError, Header, QuotaSpent, Rejected, Reported, Unauthenticated, UpstreamError
from trigate.openai.provider_error import error_object
from trigate.openai.raw_json import decode_any

OVERLOADED = 529
TYPE_OF_STATUS: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    501: "not_supported",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}
"""Of every other 4xx it is ``invalid_request_error``, of every other 5xx ``api_error``."""
TYPES = frozenset((*TYPE_OF_STATUS.values(), "api_error"))
"""Every ``type`` of an error that has a status."""
IN_STREAM = "upstream_error"
"""The type of an error of an upstream within a stream. It is none of Anthropic's: after those that stand for a failure
of its servers, Claude Code makes up to three more calls."""
_REPEATED = ("api_error", "overloaded_error", "timeout_error")


def error_response(error: GatewayError, request_id: str) -> tuple[int, list[Header], bytes]:
    """Renders an error as status, headers and JSON body (before COMMIT).

    Args:
        request_id: The header ``request-id`` has it, too; the caller sends that.
    """
    headers: list[Header] = [(b"content-type", b"application/json"), *error.headers]
    if isinstance(error, Unauthenticated):
        headers.append((b"x-should-retry", b"false"))  # Claude Code would try for minutes before it says so
    if isinstance(error, Rejected) and error.body is not None and _is_own(error.body):
        return error.status, headers, error.body
    status = OVERLOADED if error.status == 503 else error.status
    kind, message = _describe(error, status)
    return status, headers, _encode(kind, message, request_id)


def error_frame(error: GatewayError, request_id: str, *, is_closed: bool = False) -> bytes:
    """Renders an error as the last event of a stream (after COMMIT). ``message_stop`` does not follow.

    Args:
        is_closed: The stream was translated, and its last block has been ended. Else, what an upstream of this format
            has reported keeps its type.
    """
    kind, message = _describe(error, OVERLOADED if error.status == 503 else error.status)
    if kind in _REPEATED and isinstance(error, UpstreamError) and (is_closed or not isinstance(error, Reported)):
        kind = IN_STREAM
    return b"event: error\ndata: %b\n\n" % _encode(kind, message, request_id)


def _encode(kind: str, message: str, request_id: str) -> bytes:
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id})


def _is_own(body: bytes) -> bool:
    value = decode_any(body)
    return isinstance(value, dict) and value.get("type") == "error"


def _describe(error: GatewayError, status: int) -> tuple[str, str]:
    """Returns the type and the message."""
    kind = TYPE_OF_STATUS.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")
    if not isinstance(error, Rejected | Reported):
        return "billing_error" if isinstance(error, QuotaSpent) else kind, error.message
    found = overflow_of(error)
    if found is not None:
        if found.tokens is None or found.maximum is None:
            return "invalid_request_error", f"prompt is too long: {error.message}"
        return "invalid_request_error", f"prompt is too long: {found.tokens} tokens > {found.maximum} maximum"
    given = error_object(error).get("type")
    if isinstance(error, Reported) and isinstance(given, str) and given in TYPES:
        kind = given
    return kind, error.message
