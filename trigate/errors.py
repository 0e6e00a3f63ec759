"""The errors of the gateway, grouped by blame: the client, the provider, or the gateway.

The tree::

    GatewayError
    ├─ CallError            the client and its call     BadRequest 400 (Ambiguous) · Untranslatable 400*
    │                                                   PreviousResponseNotFound 400
    │                                                   Unauthenticated 401
    │                                                   Unverified 401 · Forbidden 403 · UnknownModel 404
    │                                                   NotFound 404 · MethodNotAllowed 405 · BodyTimeout 408
    │                                                   SessionBusy 409 · RunStopped 409 (`keys.errors`: of keys)
    │                                                   CancelledByOperator 409 · IdempotencyConflict 409 · TooLarge 413
    │                                                   UnsupportedMediaType 415 · WebSocketRefused 426
    │                                                   RateLimited 429 · LimitReached 429
    │                                                   TokensExceeded 429 · ConcurrencyExceeded 429
    │                                                   QuotaSpent 429 · HeadersTooLarge 431
    │                                                   ClientStalled 503 (TooSlow)
    ├─ UpstreamError        the provider                Rejected (its own 4xx, passed through)
    │                                                   Throttled 429* · Unsupported 405/501* · Unavailable 502/503*
    │                                                   UpstreamTimeout 504* · ProtocolViolation 502*
    │                                                   Truncated 502* · Reported 502*
    └─ Fault                the gateway, or its state   Overloaded 503 · StoreUnavailable 503 · Draining 503
                                                        Internal 500

``*`` = retryable: another target may be tried, as long as no part of an answer has been sent.

There are two renderers: `GatewayError.to_response` before COMMIT (the moment at which the status line is sent), and
`GatewayError.to_frame` after it. Constructing an error never logs; the code that ends the request logs once. ``code``
comes from a closed set (`codes`): it is a metric label, and users search the documentation for it.

Errors are values. An error that is raised in several tasks is raised as a `GatewayError.copy`. Code that catches an
error and keeps it calls `trigate.tracebacks.drop_frames`: a traceback keeps its frames alive, and the bodies in them.

Source: the error object and its types are those of the OpenAI API reference ("Error codes"). The mapping from statuses
to exceptions of the SDKs is in openai-python ``_client.py::_make_status_error``.
"""

from __future__ import annotations

import math
from typing import ClassVar, Self

import msgspec

Header = tuple[bytes, bytes]
_CLOSE: Header = (b"connection", b"close")
_NO_RETRY: Header = (b"x-should-retry", b"false")
_REDACTED = "[redacted]"


def _retry_after(seconds: float) -> list[Header]:
    """The headers that say when to retry: one for the SDKs, one for other clients; rounded up, never too early."""
    return [(b"retry-after-ms", b"%d" % math.ceil(seconds * 1000)), (b"retry-after", b"%d" % math.ceil(seconds))]


class GatewayError(Exception):
    """An error that ends a call, in a form that can be sent to the client.

    Args:
        message: What is wrong and, where possible, what to do about it. The client sees it, so it never holds a secret.
        param: The path of the invalid input (``messages[0].role``), if there is one.
    """

    code: ClassVar[str]
    status: int
    openai_type: ClassVar[str]
    retryable: bool = False
    """Another attempt may succeed."""
    retry_after_s: float | None = None
    """Seconds after which to retry; None = unknown."""
    attempts: tuple[dict[str, object], ...] = ()
    """The attempts that were made, in order; they are part of the rendered error."""
    blame: ClassVar[str]
    """``client``, ``provider`` or ``gateway``."""
    own_headers: ClassVar[tuple[Header, ...]] = ()
    """Headers that every error of the class has, besides those that say when to retry."""

    def __init_subclass__(cls, *, status: int | None = None, code: str | None = None) -> None:
        if status is not None:
            cls.status = status
        if code is not None:
            cls.code = code

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.status} {self.code}: {self.message!r})"

    def copy(self) -> Self:
        """Returns an equal error without a traceback, a cause or a context, to be raised somewhere else.

        Every task that reports the same error raises its own copy: tasks that raise one exception object extend the
        same traceback, and write into the same `attempts`.

        >>> error = UpstreamTimeout("It was slow.", phase="idle")
        >>> copy = error.copy()
        >>> copy is error, copy.payload == error.payload
        (False, True)
        """
        copy = type(self).__new__(type(self), *self.args)  # `__init__` of a subclass takes other arguments
        copy.__dict__.update(self.__dict__)
        return copy

    @property
    def payload(self) -> dict[str, object]:
        """The value of the ``error`` key."""
        return {"message": self.message, "type": self.openai_type, "param": self.param, "code": self.code}

    @property
    def headers(self) -> list[Header]:
        """The headers that belong to this error, besides ``content-type``."""
        again = _retry_after(self.retry_after_s) if self.retry_after_s is not None else []
        return [*again, *self.own_headers]

    def redact(self, secrets: tuple[str, ...]) -> None:
        """Removes the gateway's own credentials from the provider's text: some quote the key that they refuse."""
        for secret in secrets:
            self.message = self.message.replace(secret, _REDACTED).replace(secret.lower(), _REDACTED)
        self.args = (self.message,)

    def to_response(self) -> tuple[int, list[Header], bytes]:
        """Renders the error as status, headers and JSON body (before COMMIT)."""
        body = msgspec.json.encode({"error": self._payload_with_attempts()})
        return self.status, [(b"content-type", b"application/json"), *self.headers], body

    def to_frame(self) -> bytes:
        """Renders the error as one server-sent event (after COMMIT).

        The ``error`` key is inside ``data``: the SDKs raise `openai.APIError` on that, and ignore ``event:`` names.
        """
        return b"data: " + msgspec.json.encode({"error": self._payload_with_attempts()}) + b"\n\n"

    def _payload_with_attempts(self) -> dict[str, object]:
        return {**self.payload, "attempts": self.attempts} if self.attempts else self.payload


# -- the client and its call ------------------------------------------------------------------------------------------


class CallError(GatewayError):
    """The call cannot be served as the client makes it; the same call made in the same way fails again."""

    blame = "client"
    openai_type = "invalid_request_error"


class BadRequest(CallError, status=400, code="invalid_request"):
    """The body, a header or the request head is malformed.

    Args:
        status: Another 4xx or 5xx status, where HTTP has one for the fault (414 for a request line that is too long).
    """

    def __init__(self, message: str, *, param: str | None = None, status: int | None = None) -> None:
        if status is not None:
            self.status = status
        super().__init__(message, param=param)


class Untranslatable(BadRequest, code="untranslatable"):
    """The call has something that the format of the chosen upstream cannot express. Another upstream may."""

    retryable = True


class PreviousResponseNotFound(BadRequest, code="previous_response_not_found"):
    """The call continues a response that is not stored here for its key."""

    def __init__(self, response_id: str) -> None:
        super().__init__(f"Previous response with id {response_id[:200]!r} not found.", param="previous_response_id")


class Ambiguous(BadRequest, code="ambiguous_request"):
    """The request head has a field twice or in two ways, so the rest of the connection cannot be trusted."""

    own_headers = (_CLOSE,)


class HeadersTooLarge(CallError, status=431, code="headers_too_large"):
    """The request has too many header fields, or they are too large."""

    own_headers = (_CLOSE,)


class Unauthenticated(CallError, status=401, code="invalid_api_key"):
    """The request has no gateway key, or an unknown one."""

    own_headers = ((b"www-authenticate", b"Bearer"),)


class Unverified(CallError, status=401, code="invalid_signature"):
    """A webhook request is not signed with a secret of its hook, or its timestamp is too far away."""


class Forbidden(CallError, status=403, code="forbidden"):
    """The request's origin is not allowed: a non-loopback client without a key, a foreign Host or Origin."""

    openai_type = "permission_error"


class UnknownModel(CallError, status=404, code="model_not_found"):
    """No upstream is known to serve the model id. ``closest``: similar ids that exist. ``reason``: why it is not known,
    if there is more to say."""

    def __init__(self, model: str, *, closest: tuple[str, ...] = (), reason: str = "") -> None:
        hint = f" Closest: {', '.join(closest)}." if closest else ""
        why = f" {reason}" if reason else ""
        super().__init__(
            f"The model {model[:200]!r} does not exist here.{why}{hint} GET /v1/models lists all ids.",
            param="model",
        )


class NotFound(CallError, status=404, code="not_found"):
    """The path does not exist."""


class MethodNotAllowed(CallError, status=405, code="method_not_allowed"):
    """The path exists, but not for this method."""

    def __init__(self, method: str, path: str, *, allowed: tuple[str, ...]) -> None:
        super().__init__(f"{method} is not allowed on {path}; allowed: {', '.join(allowed)}.")
        self.allowed = allowed

    @property
    def headers(self) -> list[Header]:
        return [(b"allow", ", ".join(self.allowed).encode())]


class BodyTimeout(CallError, status=408, code="body_timeout"):
    """The request body did not arrive in time."""

    own_headers = (_CLOSE,)


class SessionBusy(CallError, status=409, code="session_busy"):
    """Another turn of the session is in progress, and did not end in time."""


class RunStopped(CallError, status=409, code="stopped"):
    """The run was stopped by a later message of its session."""


class CancelledByOperator(CallError, status=409, code="stream_cancelled"):
    """The call was cancelled through ``/status/streams``."""

    own_headers = (_NO_RETRY,)


class IdempotencyConflict(CallError, status=409, code="idempotency_conflict"):
    """The idempotency key was already used for a message with another body."""


class TooLarge(CallError, status=413, code="body_too_large"):
    """The request body is larger than ``limits.body_bytes``, or than the limit of its hook."""

    own_headers = (_CLOSE,)


class UnsupportedMediaType(CallError, status=415, code="unsupported_media_type"):
    """The body is not declared as JSON, or has a content coding that is not served here (``accept_encoding`` is)."""

    def __init__(self, message: str, *, accept_encoding: str = "") -> None:
        super().__init__(message)
        self.accept_encoding = accept_encoding

    @property
    def headers(self) -> list[Header]:
        return [(b"accept-encoding", self.accept_encoding.encode())] if self.accept_encoding else []


class WebSocketRefused(CallError, status=426, code="websocket_refused"):
    """A WebSocket handshake where none is served, or an incomplete one.

    Of the statuses that refuse one, 426 is the one on which clients that try a WebSocket first (Codex) send the same
    request as a POST at once. RFC 9110 (15.5.22) requires the ``upgrade`` field, and (7.8) the ``connection`` field.
    """

    own_headers = ((b"upgrade", b"websocket"), (b"connection", b"upgrade, close"))

    def __init__(self) -> None:
        super().__init__("No WebSocket is served here. Send the request by HTTP: POST, with stream: true.")


class RateLimited(CallError, status=429, code="rate_limited"):
    """The client exceeds its rate limit. The next request is allowed after ``retry_after_s`` seconds."""

    openai_type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class LimitReached(CallError, status=429, code="rate_limit_exceeded"):
    """A key, its group, the model, the upstream or the gateway has used the requests that it may make in a minute.

    Args:
        scope: Whose limit it is: ``key:ada``, ``group:team``, ``model:gpt``, ``upstream:openai``, ``all``.
        limit: The limit, in the unit of its setting.
        setting: The setting that sets it.
        retry_after_s: When enough will be free; None = that is not known, or never.
    """

    openai_type = "rate_limit_error"

    def __init__(self, message: str, *, scope: str, setting: str, limit: int, retry_after_s: float | None) -> None:
        self.scope = scope
        self.setting = setting
        self.limit = limit
        self.retry_after_s = retry_after_s
        super().__init__(message)

    @property
    def payload(self) -> dict[str, object]:
        return {**super().payload, "limit": {"of": self.scope, "setting": self.setting, "value": self.limit}}


class TokensExceeded(LimitReached, code="tokens_exceeded"):
    """As `LimitReached`, of the tokens that may be used in a minute. A call that needs more of them than the limit has
    no ``retry_after_s``."""

    @property
    def headers(self) -> list[Header]:
        return super().headers if self.retry_after_s is not None else [_NO_RETRY]


class ConcurrencyExceeded(LimitReached, code="concurrency_exceeded"):
    """As `LimitReached`, of the exchanges that may be in flight at once."""


class QuotaSpent(LimitReached, code="insufficient_quota"):
    """A budget is spent, or held by calls in flight. A retry makes no sense before its period ends."""

    openai_type = "insufficient_quota"
    own_headers = (_NO_RETRY,)


class ClientStalled(CallError, status=503, code="client_stalled"):
    """The client stopped reading, so its upstream stream was ended. The client is unlikely to see this error."""

    openai_type = "server_error"


class TooSlow(ClientStalled, code="client_too_slow"):
    """The client fell too far behind the other clients of its shared call."""


# -- the provider -----------------------------------------------------------------------------------------------------


class UpstreamError(GatewayError):
    """The provider failed, or its answer cannot be passed on as a success."""

    blame = "provider"
    openai_type = "upstream_error"
    retryable = True
    # The SDKs retry 408/409/429/5xx twice by themselves (`_should_retry` in both SDKs reads this header). The gateway
    # has already made every possible attempt, and multiplied retries turn an outage into a storm.
    own_headers = (_NO_RETRY,)


class Rejected(UpstreamError, code="upstream_rejected"):
    """The provider answered 4xx or 501: its status and, if it is an error object, its body are passed on to the client.

    Args:
        message: What the provider says, or that it answered with this status.
        status: The provider's status.
        body: The provider's body, if it is a JSON object with an ``error`` key; None = the body is rendered from
            ``message``. `trigate.upstream.error_body` decides which.
        headers: The provider's headers that are passed on.
        retry_after_s: Seconds after which the provider allows a retry; None = unknown.
    """

    openai_type = "invalid_request_error"
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        status: int,
        body: bytes | None = None,
        headers: tuple[Header, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        self.status = status
        self.retryable = status in (405, 408, 409, 429, 501)
        self.retry_after_s = retry_after_s
        self.body = body
        self._headers = headers
        super().__init__(message)

    def redact(self, secrets: tuple[str, ...]) -> None:
        super().redact(secrets)
        for secret in secrets:
            if self.body is not None:
                self.body = self.body.replace(secret.encode(), _REDACTED.encode())

    @property
    def headers(self) -> list[Header]:
        return [*self._headers, *self.own_headers]  # `retry-after` is among the provider's

    def to_response(self) -> tuple[int, list[Header], bytes]:
        status, headers, body = super().to_response()
        return status, headers, self.body if self.body is not None else body

    def to_frame(self) -> bytes:
        if self.body is None:
            return super().to_frame()
        return b"data: " + msgspec.json.encode(msgspec.json.decode(self.body)) + b"\n\n"


class Throttled(Rejected, code="upstream_throttled"):
    """The provider answered 429; its ``retry-after`` is passed on."""

    openai_type = "rate_limit_error"
    retryable = True

    def with_retry_after(self, retry_after_s: float) -> Throttled:
        """The same error, for a later call that was not sent because the provider is still throttling."""
        return Throttled(
            self.message,
            status=self.status,
            body=self.body,
            headers=tuple(_retry_after(retry_after_s)),
            retry_after_s=retry_after_s,
        )


class Unsupported(Rejected, code="upstream_unsupported"):
    """The provider does not serve the endpoint (405, 501). Another one may."""

    retryable = True


class Unavailable(UpstreamError, code="upstream_unavailable"):
    """The provider cannot be reached (502), or reports that it is down (5xx: 502, or 503 after a 503 or 529).

    Args:
        reachable: The provider can be reached; only this call failed.
        retry_after_s: Seconds after which the provider allows a retry; None = unknown.
    """

    def __init__(
        self, message: str, *, status: int = 502, reachable: bool = False, retry_after_s: float | None = None
    ) -> None:
        self.status = status
        self.reachable = self.sent = reachable  # `sent`: it may have received the whole call
        self.retry_after_s = retry_after_s
        super().__init__(message)


class UpstreamTimeout(UpstreamError, status=504, code="upstream_timeout"):
    """A deadline passed while the gateway waited for the provider, in the phase ``queue``, ``connect``,
    ``response_head``, ``first_token``, ``idle`` or ``total``."""

    def __init__(self, message: str, *, phase: str) -> None:
        self.phase = phase
        super().__init__(message)

    @property
    def payload(self) -> dict[str, object]:
        return {**super().payload, "phase": self.phase}


class ProtocolViolation(UpstreamError, status=502, code="upstream_garbled"):
    """The provider's answer violates its protocol."""


class Reported(UpstreamError, code="upstream_error"):
    """The provider reported an error where an answer belongs: with status 200, or as an event of its stream.

    Args:
        error: The fields of its error object, which the client gets.
        status: The status that the error stands for (`trigate.openai.provider_error`).
    """

    def __init__(self, message: str, *, error: dict[str, object], status: int = 502) -> None:
        self.status = status
        self._error = error
        super().__init__(message)

    def redact(self, secrets: tuple[str, ...]) -> None:
        super().redact(secrets)
        text = msgspec.json.encode(self._error).decode()
        for secret in secrets:
            text = text.replace(secret, _REDACTED)
        self._error = msgspec.json.decode(text)

    @property
    def payload(self) -> dict[str, object]:
        return {**super().payload, **self._error}


class Truncated(UpstreamError, status=502, code="upstream_truncated"):
    """The provider's answer ended before it was complete."""


# -- the gateway ------------------------------------------------------------------------------------------------------


class Fault(GatewayError):
    """The gateway itself cannot serve the call now."""

    blame = "gateway"
    openai_type = "server_error"


class Overloaded(Fault, status=503, code="overloaded"):
    """A limit of the gateway is reached. A retry makes sense after ``retry_after_s`` seconds."""

    openai_type = "overloaded_error"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class StoreUnavailable(Fault, status=503, code="store_unavailable"):
    """Data that must be stored cannot be, for the reason in the message. None of it has been acknowledged."""

    retry_after_s = 1.0


class Draining(Fault, status=503, code="draining"):
    """The gateway is shutting down; another instance will serve the same call."""

    retry_after_s = 1.0
    own_headers = (_CLOSE,)


class Internal(Fault, status=500, code="internal_error"):
    """A defect of the gateway; the log has the traceback under the request id."""


def codes(cls: type[GatewayError] = GatewayError) -> set[str]:
    """Returns every ``code`` of the errors of the modules that are loaded."""
    own = {cls.__dict__["code"]} if "code" in cls.__dict__ else set()
    return own.union(*(codes(sub) for sub in cls.__subclasses__()))
