"""Renders the gateway's errors in Google's format.

What an upstream of the same format says goes to the client word for word. So does a provider's message in another
format, except that a request was too long: that is said in Google's words.

In a stream, an error is a JSON object without ``data:`` before it, as Google's servers send it. Google's JavaScript SDK
(and the Gemini CLI) knows an error in a stream by that only: of an event with an error it makes an empty chunk, and the
stream then seems to have ended in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from trigate.dialects.overflow import overflow_of
from trigate.errors import GatewayError, Header, Rejected, Reported
from trigate.openai.provider_error import error_object
from trigate.openai.raw_json import decode_any

STATUS_NAMES: Mapping[int, str] = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""``status`` by ``code``. Of every other 4xx it is ``INVALID_ARGUMENT``, of every other 5xx ``INTERNAL``."""
_RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"


def error_response(error: GatewayError) -> tuple[int, list[Header], bytes]:
    """Renders an error as status, headers and JSON body (before COMMIT)."""
    headers: list[Header] = [(b"content-type", b"application/json"), *error.headers]
    if isinstance(error, Rejected) and error.body is not None and _is_own(error.body):
        return error.status, headers, error.body
    return error.status, headers, _encode(error)


def error_frame(error: GatewayError) -> bytes:
    """Renders an error as the last bytes of a stream (after COMMIT)."""
    return _encode(error) + b"\n\n"


def _encode(error: GatewayError) -> bytes:
    status = error.status
    name = STATUS_NAMES.get(status, "INVALID_ARGUMENT" if status < 500 else "INTERNAL")
    message, details = error.message, _details(error)
    if isinstance(error, Rejected | Reported):
        told, found = error_object(error), overflow_of(error)
        if found is not None:
            status, name = 400, "INVALID_ARGUMENT"
            if found.tokens is not None and found.maximum is not None:
                message = (
                    f"The input token count ({found.tokens}) exceeds the maximum number of tokens allowed "
                    f"({found.maximum})."
                )
            elif "token" not in message:
                message = f"The input token count exceeds the maximum number of tokens allowed: {message}"
        elif isinstance(told.get("status"), str) and isinstance(told.get("code"), int):
            name = str(told["status"])
            if isinstance(given := told.get("details"), list):
                details = given
    body: dict[str, Any] = {"code": status, "message": message, "status": name}  # Any: JSON of any shape
    if details:
        body["details"] = details
    return msgspec.json.encode({"error": body})


def _details(error: GatewayError) -> list[Any]:  # Any: JSON of any shape
    """When the client may try again, in the words that Google's clients read."""
    if error.retry_after_s is None:
        return []
    return [{"@type": _RETRY_INFO, "retryDelay": f"{error.retry_after_s:g}s"}]


def _is_own(body: bytes) -> bool:
    value = decode_any(body)
    error = value.get("error") if isinstance(value, dict) else None
    return isinstance(error, dict) and type(error.get("code")) is int and isinstance(error.get("status"), str)
