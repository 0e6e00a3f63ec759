"""What a provider's error response says: its message, and whether its body can be passed on. Pure.

Providers agree on no shape for an error body. The gateway looks for a sentence in the usual ones. It passes a body on
to the client only if it is an OpenAI error object (a JSON object with an ``error`` key); everything else is replaced by
an error object of the gateway's own, with that sentence as its message.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from trigate.errors import Header, Rejected, Throttled, Unsupported

_MAX_MESSAGE_CHARS = 500
_KINDS: Mapping[int, type[Rejected]] = {405: Unsupported, 429: Throttled, 501: Unsupported}


class _ErrorObject(msgspec.Struct):
    error: msgspec.Raw


_error_object = msgspec.json.Decoder(_ErrorObject)


def rejection(
    upstream: str,
    status: int,
    body: bytes,
    *,
    headers: tuple[Header, ...] = (),
    retry_after_s: float | None = None,
) -> Rejected:
    """Returns the error for a 4xx response or 501: `Throttled` for 429, `Unsupported` for 405 and 501, else `Rejected`.

    Args:
        upstream: The upstream's name.
        status: 400 to 499, or 501.
        body: The response body; b"" if it could not be read.
        headers: The response headers that are passed on to the client.
        retry_after_s: Seconds after which the provider allows a retry; None = unknown.
    """
    kind = _KINDS.get(status, Rejected)
    return kind(
        _message_in(body) or f"The upstream {upstream} answered {status}.",
        status=status,
        body=body if _is_error_object(body) else None,
        headers=headers,
        retry_after_s=retry_after_s,
    )


def message_suffix(body: bytes) -> str:
    """The message in an error body, shortened and with a colon before it, to end a sentence; ``""`` if there is none.

    >>> message_suffix(b'{"error": {"message": "no such model"}}'), message_suffix(b"<html>")
    (': no such model', '')
    """
    found = _message_in(body)
    return f": {found[:_MAX_MESSAGE_CHARS]}" if found else ""


def _is_error_object(body: bytes) -> bool:
    try:
        _error_object.decode(body)
        msgspec.json.decode(body)  # a Raw field is not validated
    except (ValueError, RecursionError):
        return False
    return True


def _message_in(body: bytes) -> str | None:
    """Finds the message in a provider's error body, in any of the usual shapes.

    >>> _message_in(b'{"error": {"message": "no such model"}}')
    'no such model'
    >>> _message_in(b'{"error": "busy"}'), _message_in(b'{"detail": "bad"}'), _message_in(b'<html>')
    ('busy', 'bad', None)
    """
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return None
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            inner = value[key]
            if isinstance(inner, str):
                return inner
            if key == "error" and isinstance(inner, dict) and isinstance(inner.get("message"), str):
                return str(inner["message"])
    return None
