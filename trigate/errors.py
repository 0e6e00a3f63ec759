"""What can go wrong, split by who is to blame.

The tree::

    GatewayError
    ├─ CallError            the client's call           BadRequest 400 (Ambiguous) · Unauthenticated 401
    │                                                   Unverified 401 · Forbidden 403 · UnknownModel 404
    │                                                   NotFound 404 · MethodNotAllowed 405 · BodyTimeout 408
    │                                                   SessionBusy 409 · RunStopped 409
    │                                                   CancelledByOperator 409 · IdempotencyConflict 409 · TooLarge 413
    │                                                   UnsupportedMediaType 415 · RateLimited 429
    │                                                   HeadersTooLarge 431
    ├─ UpstreamError        the provider                Rejected (its own 4xx, passed through)
    │                                                   Throttled 429* · Unavailable 502/503*
    │                                                   UpstreamTimeout 504* · ProtocolViolation 502*
    │                                                   Truncated 502* · StreamError 502*
    └─ Fault                the gateway, or its state   Overloaded 503 · StoreUnavailable 503 · Draining 503
                                                        ClientStalled 503 (TooSlow) · Internal 500

``*`` = retryable: another target may be tried, as long as nothing of an answer has been sent.

Two renderers, and no third: `GatewayError.to_response` before COMMIT (the moment at which the status line is sent),
`GatewayError.to_frame` after it. Constructing
an error never logs; whoever ends the request logs once. ``code`` comes from a closed set (`CODES`), so that it can
be a metric label and a thing that people search the documentation for.

Source: the error object and its types are those of the OpenAI API reference ("Error codes"); which status makes
which exception in the SDKs is in openai-python ``_client.py::_make_status_error``.
"""

from __future__ import annotations

import json
import math
from typing import ClassVar

import msgspec

Header = tuple[bytes, bytes]
_CLOSE: Header = (b"connection", b"close")
_NO_RETRY: Header = (b"x-should-retry", b"false")
_REDACTED = "[redacted]"


def _retry_after(seconds: float) -> list[Header]:
    """When to come back, for the SDKs and for everybody else: rounded up, so that it is not too early."""
    return [(b"retry-after-ms", b"%d" % math.ceil(seconds * 1000)), (b"retry-after", b"%d" % math.ceil(seconds))]


class GatewayError(Exception):
    """Something that ends a call, in a form that the client can be told.

    Args:
        message: What is wrong and, where there is one, what to do. Shown to the client: never holds a secret.
        param: The path of the offending input (``messages[0].role``), if it was one.
    """

    code: ClassVar[str]
    status: int
    openai_type: ClassVar[str]
    retryable: bool = False
    """Another attempt may go better."""
    retry_after_s: float | None = None
    """In how many seconds; None = nobody has said."""
    attempts: tuple[dict[str, object], ...] = ()
    """What was tried, in order: it is told with the error."""
    blame: ClassVar[str]

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.status} {self.code}: {self.message!r})"

    @property
    def payload(self) -> dict[str, object]:
        """The value of the ``error`` key."""
        return {"message": self.message, "type": self.openai_type, "param": self.param, "code": self.code}

    @property
    def headers(self) -> list[Header]:
        """Headers that belong to this error, beyond ``content-type``."""
        return []

    def redact(self, secrets: tuple[str, ...]) -> None:
        """Takes the gateway's own credentials out of what a provider said: some quote the key that they refuse."""
        for secret in secrets:
            self.message = self.message.replace(secret, _REDACTED).replace(secret.lower(), _REDACTED)
        self.args = (self.message,)

    def to_response(self) -> tuple[int, list[Header], bytes]:
        """Renders the error as status, headers and JSON body (before COMMIT)."""
        body = msgspec.json.encode({"error": self._told()})
        return self.status, [(b"content-type", b"application/json"), *self.headers], body

    def to_frame(self) -> bytes:
        """Renders the error as one server-sent event (after COMMIT).

        The ``error`` key is inside ``data``: the SDKs raise `openai.APIError` on that, and ignore ``event:`` names.
        """
        return b"data: " + msgspec.json.encode({"error": self._told()}) + b"\n\n"

    def _told(self) -> dict[str, object]:
        return {**self.payload, "attempts": self.attempts} if self.attempts else self.payload


# -- the client's call ------------------------------------------------------------------------------------------------


class CallError(GatewayError):
    """The call cannot be served as it is; the same call again fails again."""

    blame = "client"
    openai_type = "invalid_request_error"


class BadRequest(CallError):
    """The body or a header is malformed."""

    status = 400
    code = "invalid_request"


class Ambiguous(BadRequest):
    """The head says something twice, or in two ways; what follows on the connection cannot be trusted."""

    code = "ambiguous_request"

    @property
    def headers(self) -> list[Header]:
        return [_CLOSE]


class HeadersTooLarge(CallError):
    """The request's header fields are too many, or too large."""

    status = 431
    code = "headers_too_large"

    @property
    def headers(self) -> list[Header]:
        return [_CLOSE]


class Unauthenticated(CallError):
    """No gateway key, or one that is not known."""

    status = 401
    code = "invalid_api_key"

    @property
    def headers(self) -> list[Header]:
        return [(b"www-authenticate", b"Bearer")]


class Unverified(CallError):
    """A webhook request that is not from who holds its secret, or not from now."""

    status = 401
    code = "invalid_signature"


class Forbidden(CallError):
    """Not from there: a non-loopback client without a key, a foreign Host or Origin."""

    status = 403
    code = "forbidden"
    openai_type = "permission_error"


class UnknownModel(CallError):
    """No upstream is known to serve this model id."""

    status = 404
    code = "model_not_found"

    def __init__(self, model: str, *, closest: tuple[str, ...] = (), reason: str = "") -> None:
        hint = f" Closest: {', '.join(closest)}." if closest else ""
        why = f" {reason}" if reason else ""
        super().__init__(
            f"The model {model[:200]!r} does not exist here.{why}{hint} GET /v1/models lists what does.", param="model"
        )


class NotFound(CallError):
    """No such path."""

    status = 404
    code = "not_found"


class MethodNotAllowed(CallError):
    """The path exists, but not for this method."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, method: str, path: str, *, allowed: tuple[str, ...]) -> None:
        super().__init__(f"{method} is not allowed on {path}; allowed: {', '.join(allowed)}.")
        self.allowed = allowed

    @property
    def headers(self) -> list[Header]:
        return [(b"allow", ", ".join(self.allowed).encode())]


class BodyTimeout(CallError):
    """The request body did not arrive in time."""

    status = 408
    code = "body_timeout"

    @property
    def headers(self) -> list[Header]:
        return [_CLOSE]


class SessionBusy(CallError):
    """Another turn of the session is in progress, and did not end in time."""

    status = 409
    code = "session_busy"


class RunStopped(CallError):
    """The run was stopped by a later message of its session."""

    status = 409
    code = "stopped"


class CancelledByOperator(CallError):
    """Somebody has ended the call through ``/status/streams``."""

    status = 409
    code = "stream_cancelled"

    @property
    def headers(self) -> list[Header]:
        return [_NO_RETRY]


class IdempotencyConflict(CallError):
    """An idempotency key stands for a message with another body."""

    status = 409
    code = "idempotency_conflict"


class TooLarge(CallError):
    """The request body is larger than ``limits.body_bytes``, or than its hook takes."""

    status = 413
    code = "body_too_large"

    @property
    def headers(self) -> list[Header]:
        return [_CLOSE]


class UnsupportedMediaType(CallError):
    """The body is not declared as JSON."""

    status = 415
    code = "unsupported_media_type"


class RateLimited(CallError):
    """The client asks more often than its limit allows.

    Args:
        retry_after_s: Seconds after which it may ask again.
    """

    status = 429
    code = "rate_limited"
    openai_type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)

    @property
    def headers(self) -> list[Header]:
        return _retry_after(self.retry_after_s or 0.0)


# -- the provider -----------------------------------------------------------------------------------------------------


class UpstreamError(GatewayError):
    """The provider failed, or answered something that cannot be passed on as a success."""

    blame = "provider"
    openai_type = "upstream_error"
    retryable = True

    @property
    def headers(self) -> list[Header]:
        # The SDKs retry 408/409/429/5xx twice by themselves. This gateway has already tried what there is to try, and
        # multiplied retries are how an outage becomes a storm (`_should_retry` in both SDKs reads this header).
        return [_NO_RETRY]


class Rejected(UpstreamError):
    """The provider answered 4xx: its status and, where it is JSON, its body are the client's.

    Args:
        body: The provider's body.
    """

    code = "upstream_rejected"
    openai_type = "invalid_request_error"
    retryable = False

    def __init__(self, upstream: str, status: int, body: bytes, *, headers: tuple[Header, ...] = ()) -> None:
        self.status = status
        self.retryable = status in (408, 409, 429)
        self.body = body if _is_error_object(body) else None
        self._headers = headers
        super().__init__(_message_of(body) or f"The upstream {upstream} answered {status}.")

    def redact(self, secrets: tuple[str, ...]) -> None:
        super().redact(secrets)
        for secret in secrets:
            if self.body is not None:
                self.body = self.body.replace(secret.encode(), _REDACTED.encode())

    @property
    def headers(self) -> list[Header]:
        return [*self._headers, *super().headers]

    def to_response(self) -> tuple[int, list[Header], bytes]:
        status, headers, body = super().to_response()
        return status, headers, self.body if self.body is not None else body

    def to_frame(self) -> bytes:
        if self.body is None:
            return super().to_frame()
        return b"data: " + msgspec.json.encode(msgspec.json.decode(self.body)) + b"\n\n"


class Throttled(Rejected):
    """The provider answered 429; its ``retry-after`` goes along."""

    code = "upstream_throttled"
    openai_type = "rate_limit_error"
    retryable = True

    def again(self, retry_after_s: float) -> Throttled:
        """The same, for a call that came while the provider does not want to be asked."""
        error = Throttled("", self.status, self.body or b"", headers=tuple(_retry_after(retry_after_s)))
        error.message, error.retry_after_s = self.message, retry_after_s
        return error


class Unavailable(UpstreamError):
    """The provider cannot be reached (502), or says that it is down (5xx: 502, or 503 where it said 503/529).

    Args:
        reachable: It can be reached; only this call failed.
    """

    code = "upstream_unavailable"

    def __init__(
        self, message: str, *, status: int = 502, reachable: bool = False, retry_after_s: float | None = None
    ) -> None:
        self.status = status
        self.reachable = reachable
        self.retry_after_s = retry_after_s
        super().__init__(message)

    @property
    def headers(self) -> list[Header]:
        told = _retry_after(self.retry_after_s) if self.retry_after_s is not None else []
        return [*told, *super().headers]


class UpstreamTimeout(UpstreamError):
    """A deadline passed while the gateway waited for the provider.

    Args:
        phase: What was waited for: ``queue``, ``connect``, ``response_head``, ``first_token``, ``idle`` or ``total``.
    """

    status = 504
    code = "upstream_timeout"

    def __init__(self, message: str, *, phase: str) -> None:
        self.phase = phase
        super().__init__(message)

    @property
    def payload(self) -> dict[str, object]:
        return {**super().payload, "phase": self.phase}


class ProtocolViolation(UpstreamError):
    """The provider's answer is not what its protocol says it must be."""

    status = 502
    code = "upstream_garbled"


class StreamError(UpstreamError):
    """The provider sent an error as an event of its stream; the client gets it as it came.

    Args:
        error: The value of the event's ``error`` key.
    """

    status = 502
    code = "upstream_error"

    def __init__(self, upstream: str, error: object) -> None:
        error = _sendable(error)
        message = error.get("message") if isinstance(error, dict) else error
        super().__init__(str(message) if message else f"The upstream {upstream} sent an error event.")
        self._error: dict[str, object] = error if isinstance(error, dict) else {}

    def redact(self, secrets: tuple[str, ...]) -> None:
        super().redact(secrets)
        text = msgspec.json.encode(self._error).decode()
        for secret in secrets:
            text = text.replace(secret, _REDACTED)
        self._error = msgspec.json.decode(text)

    @property
    def payload(self) -> dict[str, object]:
        return {**super().payload, **self._error}


def _sendable(value: object) -> object:
    """The value with a question mark for each half surrogate pair, which JSON can say and UTF-8 cannot."""
    try:
        return json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    except (RecursionError, ValueError):  # too deep, or a number of thousands of digits
        return None


class Truncated(UpstreamError):
    """The provider's answer ended before it was complete."""

    status = 502
    code = "upstream_truncated"


# -- the gateway ------------------------------------------------------------------------------------------------------


class Fault(GatewayError):
    """The gateway itself cannot serve the call now."""

    blame = "gateway"
    openai_type = "server_error"


class Overloaded(Fault):
    """An admission limit is reached. Retrying later is right, so it says when.

    Args:
        retry_after_s: Seconds after which a retry makes sense.
    """

    status = 503
    code = "overloaded"
    openai_type = "overloaded_error"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)

    @property
    def headers(self) -> list[Header]:
        return _retry_after(self.retry_after_s or 0.0)


class StoreUnavailable(Fault):
    """What has to be remembered cannot be: the disk is full, or the database cannot be read. Nothing was promised.

    Args:
        message: With the reason, as the database says it.
    """

    status = 503
    code = "store_unavailable"

    @property
    def headers(self) -> list[Header]:
        return _retry_after(1.0)


class Draining(Fault):
    """The gateway is shutting down; another instance will serve the same call."""

    status = 503
    code = "draining"

    @property
    def headers(self) -> list[Header]:
        return [*_retry_after(1.0), _CLOSE]


class ClientStalled(Fault):
    """The client stopped reading, and its upstream stream was ended (nobody is likely to see this frame)."""

    status = 503
    code = "client_stalled"
    blame = "client"


class TooSlow(ClientStalled):
    """The client has fallen too far behind those with whom it shares an upstream call."""

    code = "client_too_slow"


class Internal(Fault):
    """A defect of the gateway; the log has the traceback under the request id."""

    status = 500
    code = "internal_error"


def _all_codes(cls: type[GatewayError]) -> set[str]:
    own = {cls.__dict__["code"]} if "code" in cls.__dict__ else set()
    return own.union(*(_all_codes(sub) for sub in cls.__subclasses__()))


CODES: frozenset[str] = frozenset(_all_codes(GatewayError))
"""Every ``code`` that this gateway puts in an error of its own."""


class _ErrorObject(msgspec.Struct):
    error: msgspec.Raw


_error_object = msgspec.json.Decoder(_ErrorObject)


def _is_error_object(body: bytes) -> bool:
    try:
        _error_object.decode(body)
        msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return False
    return True


def _message_of(body: bytes) -> str | None:
    """Finds the sentence in a provider's error body, whichever of the usual shapes it has.

    >>> _message_of(b'{"error": {"message": "no such model"}}')
    'no such model'
    >>> _message_of(b'{"error": "busy"}'), _message_of(b'{"detail": "bad"}'), _message_of(b'<html>')
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


def words_of(error: BaseException) -> str:
    """What an exception says; of a group, its first one.

    >>> words_of(ExceptionGroup("x", [ExceptionGroup("y", [ValueError("this")])])), words_of(KeyError())
    ('this', 'KeyError')
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__


def upstream_message(body: bytes) -> str:
    """What a provider's error body says, shortened for a message of ours; ``""`` if nothing can be read from it."""
    found = _message_of(body)
    return f": {found[:500]}" if found else ""
