"""What a provider's error response says: its message, and whether its body can be passed on. Pure.

Providers agree on no shape for an error body; `trigate.openai.provider_error` finds the sentence in it. A body is
passed on to the client, byte for byte, only if it is an OpenAI error object: a JSON object whose ``error`` is an object
with a message. (An array of one such object is taken for the object.) If only the message is missing, or is somewhere
else, it is added. Everything else is replaced by an error object of the gateway's own with the sentence as its message.
So clients find it in ``error.message``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from trigate.errors import GatewayError, Header, ProtocolViolation, Rejected, Throttled, Unavailable, Unsupported
from trigate.openai.provider_error import message_in
from trigate.openai.raw_json import decode_any
from trigate.routing.retry import retry_after_s

_MAX_MESSAGE_CHARS = 500
_KINDS: Mapping[int, type[Rejected]] = {405: Unsupported, 429: Throttled, 501: Unsupported}


_TIME = re.compile(r"[A-Za-z0-9:,. ]{1,40}")
_RETRY_AFTER = ("retry-after", "retry-after-ms")
_RESETS = ("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens")
_FAILURES: Mapping[str, tuple[int, ...]] = {"bedrock": (408, 424)}
"""The statuses below 500 by which a kind of upstream says that a model failed or took too long."""


def error_for(
    upstream: str, kind: str, status: int, headers: Mapping[str, str], body: bytes, *, now_epoch_s: float
) -> GatewayError:
    """Returns the error that an error response stands for.

    Args:
        upstream: The upstream's name, for messages.
        kind: Its kind.
        headers: Of the response, by their names in lower case.
        now_epoch_s: The time now, in seconds since 1970.
    """
    message = message_suffix(body)
    after_s = retry_after_s(headers, now_epoch_s=now_epoch_s)
    passed: tuple[Header, ...] = tuple(
        (name.encode(), headers[name].encode())
        for name in (_RETRY_AFTER if after_s is not None else ()) + _RESETS
        if _TIME.fullmatch(headers.get(name, ""))
    )
    if status in _FAILURES.get(kind, ()):
        return Unavailable(
            f"The model of the upstream {upstream} failed ({status}){message}", reachable=True, retry_after_s=after_s
        )
    if 400 <= status < 500 or status == 501:
        return rejection(upstream, status, body, headers=passed, retry_after_s=after_s)
    if status in (503, 529):
        return Unavailable(
            f"The upstream {upstream} is overloaded or down ({status}){message}",
            status=503,
            reachable=True,
            retry_after_s=after_s,
        )
    if 500 <= status < 600:
        return Unavailable(f"The upstream {upstream} failed ({status}){message}", reachable=True, retry_after_s=after_s)
    return ProtocolViolation(f"The upstream {upstream} answered with status {status}.")


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
    found = message_in(body)
    message = found or f"The upstream {upstream} answered {status}."
    if found is not None and body.lstrip().startswith(b"<"):
        message = f"The upstream {upstream} answered {status} with a page: {found}"
    return kind(
        message,
        status=status,
        body=_error_object(body, message),
        headers=headers,
        retry_after_s=retry_after_s,
    )


def message_suffix(body: bytes) -> str:
    """The message in an error body, shortened and with a colon before it, to end a sentence; ``""`` if there is none.

    >>> message_suffix(b'{"error": {"message": "no such model"}}'), message_suffix(b"")
    (': no such model', '')
    """
    found = message_in(body)
    return f": {found[:_MAX_MESSAGE_CHARS]}" if found else ""


def _error_object(body: bytes, message: str) -> bytes | None:
    """The body if it is an OpenAI error object, with this message if it lacks one; None if it is none."""
    value = decode_any(body)
    if isinstance(value, list) and len(value) == 1:  # Google
        value, body = value[0], msgspec.json.encode(value[0])
    error = value.get("error") if isinstance(value, dict) else None
    if not isinstance(error, dict) or not _is_strict(body):
        return None
    if isinstance(error.get("message"), str) and error["message"]:
        return body
    return msgspec.json.encode({**value, "error": {**error, "message": message}})


def _is_strict(body: bytes) -> bool:
    """Whether it is JSON that every client can decode."""
    try:
        msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return False
    return True
