"""The error tree: who is to blame, what the client gets, and in which form."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from typing import Any

import pytest

import trigate
from trigate import errors
from trigate.errors import (
    Ambiguous,
    BadRequest,
    BodyTimeout,
    CallError,
    CancelledByOperator,
    ClientStalled,
    ConcurrencyExceeded,
    Draining,
    Fault,
    Forbidden,
    GatewayError,
    HeadersTooLarge,
    IdempotencyConflict,
    Internal,
    LimitReached,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PreviousResponseNotFound,
    ProtocolViolation,
    QuotaSpent,
    RateLimited,
    Rejected,
    Reported,
    RunStopped,
    SessionBusy,
    StoreUnavailable,
    Throttled,
    TokensExceeded,
    TooLarge,
    TooSlow,
    Truncated,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    Unsupported,
    UnsupportedMediaType,
    Untranslatable,
    Unverified,
    UpstreamError,
    UpstreamTimeout,
    WebSocketRefused,
    codes,
)
from trigate.keys.errors import AdminRequired, HookNotAllowed, KeyRevoked, ModelNotAllowed

ABSTRACT = {GatewayError, CallError, UpstreamError, Fault}

LIMIT: Any = {"scope": "key:ada", "setting": "rpm", "limit": 3}

# One of each, with the status, type and code that clients may rely on.
SAMPLES: list[tuple[GatewayError, int, str, str]] = [
    (BadRequest("no", param="messages[0].role"), 400, "invalid_request_error", "invalid_request"),
    (Ambiguous("no"), 400, "invalid_request_error", "ambiguous_request"),
    (Untranslatable("no", param="container"), 400, "invalid_request_error", "untranslatable"),
    (PreviousResponseNotFound("resp_1"), 400, "invalid_request_error", "previous_response_not_found"),
    (HeadersTooLarge("no"), 431, "invalid_request_error", "headers_too_large"),
    (Unauthenticated("no"), 401, "invalid_request_error", "invalid_api_key"),
    (Unverified("no"), 401, "invalid_request_error", "invalid_signature"),
    (Forbidden("no"), 403, "permission_error", "forbidden"),
    (KeyRevoked(), 401, "authentication_error", "key_revoked"),
    (ModelNotAllowed("m"), 403, "permission_error", "model_not_allowed"),
    (HookNotAllowed("ci"), 403, "permission_error", "hook_not_allowed"),
    (AdminRequired("no"), 403, "permission_error", "admin_required"),
    (UnknownModel("gpt-5p", closest=("openai/gpt-5",)), 404, "invalid_request_error", "model_not_found"),
    (NotFound("no"), 404, "invalid_request_error", "not_found"),
    (MethodNotAllowed("GET", "/v1/x", allowed=("POST",)), 405, "invalid_request_error", "method_not_allowed"),
    (BodyTimeout("no"), 408, "invalid_request_error", "body_timeout"),
    (IdempotencyConflict("no"), 409, "invalid_request_error", "idempotency_conflict"),
    (SessionBusy("no"), 409, "invalid_request_error", "session_busy"),
    (RunStopped("no"), 409, "invalid_request_error", "stopped"),
    (CancelledByOperator("no"), 409, "invalid_request_error", "stream_cancelled"),
    (TooLarge("no"), 413, "invalid_request_error", "body_too_large"),
    (UnsupportedMediaType("no"), 415, "invalid_request_error", "unsupported_media_type"),
    (WebSocketRefused(), 426, "invalid_request_error", "websocket_refused"),
    (RateLimited("no", retry_after_s=1.5), 429, "rate_limit_error", "rate_limited"),
    (LimitReached("no", **LIMIT, retry_after_s=1.5), 429, "rate_limit_error", "rate_limit_exceeded"),
    (TokensExceeded("no", **LIMIT, retry_after_s=None), 429, "rate_limit_error", "tokens_exceeded"),
    (ConcurrencyExceeded("no", **LIMIT, retry_after_s=1.0), 429, "rate_limit_error", "concurrency_exceeded"),
    (QuotaSpent("no", **LIMIT, retry_after_s=9.0), 429, "insufficient_quota", "insufficient_quota"),
    (Rejected("no", status=422), 422, "invalid_request_error", "upstream_rejected"),
    (Unsupported("no", status=501), 501, "invalid_request_error", "upstream_unsupported"),
    (Throttled("no", status=429), 429, "rate_limit_error", "upstream_throttled"),
    (Unavailable("down"), 502, "upstream_error", "upstream_unavailable"),
    (Unavailable("down", status=503), 503, "upstream_error", "upstream_unavailable"),
    (UpstreamTimeout("slow", phase="idle"), 504, "upstream_error", "upstream_timeout"),
    (ProtocolViolation("odd"), 502, "upstream_error", "upstream_garbled"),
    (Truncated("cut"), 502, "upstream_error", "upstream_truncated"),
    (Reported("busy", error={}), 502, "upstream_error", "upstream_error"),
    (Overloaded("full", retry_after_s=1.5), 503, "overloaded_error", "overloaded"),
    (StoreUnavailable("disk full"), 503, "server_error", "store_unavailable"),
    (Draining("bye"), 503, "server_error", "draining"),
    (ClientStalled("asleep"), 503, "server_error", "client_stalled"),
    (TooSlow("behind"), 503, "server_error", "client_too_slow"),
    (Internal("oops"), 500, "server_error", "internal_error"),
]
each_sample = pytest.mark.parametrize("error", [sample[0] for sample in SAMPLES], ids=repr)


def _tree(cls: type[GatewayError] = GatewayError) -> set[type[GatewayError]]:
    return {cls}.union(*(_tree(sub) for sub in cls.__subclasses__()))


@pytest.fixture(scope="module")
def every_class() -> set[type[GatewayError]]:
    """Every error class of the package, wherever it is defined."""
    for module in pkgutil.walk_packages(trigate.__path__, "trigate."):
        if not module.name.rpartition(".")[2].startswith("_"):
            importlib.import_module(module.name)
    return {cls for cls in _tree() if cls.__module__.startswith("trigate.")}


def test_every_class_has_a_sample(every_class: set[type[GatewayError]]) -> None:
    """The samples above cover the whole tree: a new class needs a sample."""
    assert {type(sample[0]) for sample in SAMPLES} == every_class - ABSTRACT


@pytest.mark.parametrize(("error", "status", "openai_type", "code"), SAMPLES, ids=lambda value: None)
def test_what_the_client_may_rely_on(error: GatewayError, status: int, openai_type: str, code: str) -> None:
    """Each error has its documented status, type and code, and one of three parties to blame."""
    assert (error.status, error.openai_type, error.code) == (status, openai_type, code)
    assert error.blame in ("client", "provider", "gateway")


def test_codes_are_a_closed_set(every_class: set[type[GatewayError]]) -> None:
    """`codes()` is exactly the codes of the tree, wherever in the package a class is defined."""
    assert {cls.code for cls in every_class - ABSTRACT} == codes()


def test_codes_differ(every_class: set[type[GatewayError]]) -> None:
    """No two classes share a code: users search the documentation for it."""
    codes = [cls.code for cls in every_class - ABSTRACT]
    assert sorted(codes) == sorted(set(codes))


def test_the_drawn_tree_is_the_tree() -> None:
    """The module's docstring draws exactly the classes of the module, with their statuses."""
    drawn = set(re.findall(r"\b[A-Z][A-Za-z]+(?= \d{3}\b| \(its own 4xx|\))", inspect.getdoc(errors) or ""))
    defined = {cls.__name__ for cls in _tree() - ABSTRACT if cls.__module__ == errors.__name__}
    assert drawn == defined


@each_sample
def test_to_response(error: GatewayError) -> None:
    """Before COMMIT an error is a response: its status, and OpenAI's error object as JSON."""
    status, headers, body = error.to_response()
    assert status == error.status
    assert dict(headers)[b"content-type"] == b"application/json"
    assert all(type(name) is bytes and name == name.lower() and type(value) is bytes for name, value in headers)
    document = json.loads(body)
    assert list(document) == ["error"]
    assert {"message", "type", "param", "code"} <= set(document["error"])
    assert document["error"]["type"] == error.openai_type
    assert document["error"]["code"] == error.code
    assert document["error"]["message"] == error.message == str(error)


@each_sample
def test_to_frame(error: GatewayError) -> None:
    """After COMMIT an error is one event: the same object, with the ``error`` key inside ``data``."""
    frame = error.to_frame()
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"\n\n")
    assert b"\n" not in frame[:-2]
    assert json.loads(frame[6:]) == json.loads(error.to_response()[2])


@each_sample
def test_only_the_provider_s_failures_can_be_retried(error: GatewayError) -> None:
    """Another target may be tried after a provider's failure, never after the client's or the gateway's; except for a
    call that the format of this one cannot express."""
    assert not error.retryable or error.blame == "provider" or isinstance(error, Untranslatable)


def test_what_is_retryable() -> None:
    """A provider's 4xx is final; after 429, timeouts, failures and protocol violations another target may be tried."""
    retryable = {type(sample[0]) for sample in SAMPLES if sample[0].retryable}
    assert retryable == {
        Throttled,
        Unsupported,
        Unavailable,
        UpstreamTimeout,
        ProtocolViolation,
        Truncated,
        Reported,
        Untranslatable,
    }


@each_sample
def test_the_sdks_do_not_retry_what_was_tried(error: GatewayError) -> None:
    """Provider errors, calls cancelled by an operator and what a retry cannot help (a spent budget, more tokens than
    the limit) carry ``x-should-retry: false``; other errors do not."""
    headers = dict(error.to_response()[1])
    assert (headers.get(b"x-should-retry") == b"false") == (
        error.blame == "provider" or isinstance(error, CancelledByOperator | QuotaSpent | TokensExceeded)
    )


@each_sample
def test_reprs_say_what_happened(error: GatewayError) -> None:
    """A repr shows the class, the status, the code and the message."""
    assert repr(error) == f"{type(error).__name__}({error.status} {error.code}: {error.message!r})"


def test_headers_that_belong_to_an_error() -> None:
    """401 names the scheme, 405 the allowed methods, 429 and 503 when to retry: rounded up, so never too early."""
    assert Unauthenticated("no").headers == [(b"www-authenticate", b"Bearer")]
    assert MethodNotAllowed("GET", "/x", allowed=("POST", "OPTIONS")).headers == [(b"allow", b"POST, OPTIONS")]
    assert Overloaded("full", retry_after_s=1.2).headers == [(b"retry-after-ms", b"1200"), (b"retry-after", b"2")]
    assert RateLimited("no", retry_after_s=0.0101).headers == [(b"retry-after-ms", b"11"), (b"retry-after", b"1")]
    assert Draining("bye").headers[:2] == [(b"retry-after-ms", b"1000"), (b"retry-after", b"1")]
    assert dict(Draining("bye").headers)[b"connection"] == b"close"
    assert dict(Ambiguous("no").headers)[b"connection"] == b"close"


def test_param_names_the_offending_input() -> None:
    """``param`` is the path of the invalid input, or null."""
    assert (
        json.loads(BadRequest("no", param="messages[0].role").to_response()[2])["error"]["param"] == "messages[0].role"
    )
    assert json.loads(BadRequest("no").to_response()[2])["error"]["param"] is None


def test_unknown_model_helps() -> None:
    """The message names the model (shortened if it is long), the reason and the closest ids."""
    error = UnknownModel("x" * 5000, closest=("a/b", "c/d"), reason="Say which.")
    assert error.param == "model"
    assert "a/b, c/d" in error.message
    assert "Say which." in error.message
    assert len(error.message) < 400


def test_a_timeout_says_its_phase() -> None:
    """The payload of a timeout has the phase in which it expired."""
    assert UpstreamTimeout("slow", phase="first_token").payload["phase"] == "first_token"


@each_sample
def test_a_copy_shares_no_traceback(error: GatewayError) -> None:
    """A copy renders the same; raising one of the two leaves no traceback, cause or context on the other."""
    error.attempts = ({"target": "a/m"},)
    try:
        raise error from ValueError("why")
    except GatewayError:
        copy = error.copy()
    error.with_traceback(None)
    assert type(copy) is type(error)
    assert (copy.__traceback__, copy.__cause__, copy.__context__) == (None, None, None)
    assert (str(copy), repr(copy), copy.to_response()) == (str(error), repr(error), error.to_response())
    assert (copy.status, copy.retryable, copy.retry_after_s) == (error.status, error.retryable, error.retry_after_s)
    with pytest.raises(type(error)):
        raise copy
    assert error.__traceback__ is None
    copy.attempts = ()
    assert error.attempts
    error.attempts = ()


def test_a_bad_request_with_another_status() -> None:
    """A malformed request head may have a more specific status; the class's own one does not change."""
    assert BadRequest("too long", status=414).to_response()[0] == 414
    assert BadRequest("no").status == BadRequest.status == 400
