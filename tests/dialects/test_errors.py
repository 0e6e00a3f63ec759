"""The gateway's errors in Anthropic's format."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from trigate.dialects.errors import error_frame, error_response
from trigate.errors import (
    BadRequest,
    Draining,
    Forbidden,
    GatewayError,
    Internal,
    NotFound,
    Overloaded,
    ProtocolViolation,
    RateLimited,
    Rejected,
    Throttled,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
    UpstreamError,
    UpstreamTimeout,
)
from trigate.openai.provider_error import reported


def rejected(error: dict[str, Any], status: int = 400) -> Rejected:
    """A provider's refusal in OpenAI's format."""
    return Rejected(error.get("message", ""), status=status, body=msgspec.json.encode({"error": error}))


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (BadRequest("m"), 400, "invalid_request_error"),
        (Unauthenticated("m"), 401, "authentication_error"),
        (Forbidden("m"), 403, "permission_error"),
        (NotFound("m"), 404, "not_found_error"),
        (TooLarge("m"), 413, "request_too_large"),
        (RateLimited("m", retry_after_s=1), 429, "rate_limit_error"),
        (Throttled("m", status=429), 429, "rate_limit_error"),
        (rejected({"message": "m"}, 422), 422, "invalid_request_error"),
        (Internal("m"), 500, "api_error"),
        (Unsupported("m", status=501), 501, "not_supported"),
        (ProtocolViolation("m"), 502, "api_error"),
        (Unavailable("m"), 502, "api_error"),
        (UpstreamTimeout("m", phase="idle"), 504, "timeout_error"),
        (Overloaded("m"), 529, "overloaded_error"),
        (Draining("m"), 529, "overloaded_error"),
        (Unavailable("m", status=503), 529, "overloaded_error"),
    ],
)
def test_statuses_and_types(error: GatewayError, status: int, kind: str) -> None:
    """Each error has the status and the type that Anthropic's clients know, and the headers of the gateway's own."""
    got, headers, body = error_response(error, "anthropic", "req_1")
    expected = {"type": "error", "error": {"type": kind, "message": "m"}, "request_id": "req_1"}
    assert (got, msgspec.json.decode(body)) == (status, expected)
    assert set(error.headers) <= set(headers)
    if isinstance(error, UpstreamError) and kind in ("api_error", "timeout_error", "overloaded_error"):
        body = body.replace(kind.encode(), b"upstream_error")  # after which no client makes the call again by itself
    assert error_frame(error, "anthropic", "req_1") == b"event: error\ndata: " + body + b"\n\n"


def test_openai_s_format_stays() -> None:
    """In OpenAI's format, the errors render themselves."""
    error = Overloaded("m")
    assert error_response(error, "openai", "r") == error.to_response()
    assert error_frame(error, "openai", "r") == error.to_frame()


def test_an_error_of_anthropic_s_goes_through_word_for_word() -> None:
    """Agents act on the wording."""
    body = b'{ "type":"error", "error":{"type":"invalid_request_error","message":"Input is too long.","new":1} }'
    assert error_response(Rejected("x", status=400, body=body), "anthropic", "r")[2] == body


@pytest.mark.parametrize(
    ("message", "more", "expected"),
    [
        (
            "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
            {"code": "context_length_exceeded"},
            "prompt is too long: 9000 tokens > 8192 maximum",
        ),
        (
            "This endpoint's maximum context length is 131072 tokens. However, you requested about 140000 tokens "
            "(8000 of text input, 132000 in the output).",
            {},
            "prompt is too long: 140000 tokens > 131072 maximum",
        ),
        (
            "You passed 5000 input tokens and requested 100 output tokens. However, the model's context length is only "
            "4096 tokens.",
            {},
            "prompt is too long: 5000 tokens > 4096 maximum",
        ),
        (
            "the request exceeds the available context size. try increasing the context size",
            {"type": "exceed_context_size_error", "n_prompt_tokens": 9000, "n_ctx": 4096},
            "prompt is too long: 9000 tokens > 4096 maximum",
        ),
        (
            "request (9000 tokens) exceeds the available context size (4096 tokens), try increasing it",
            {},
            "prompt is too long: 9000 tokens > 4096 maximum",
        ),
        (
            "The input (9000 tokens) is longer than the model's context length (4096 tokens).",
            {},
            "prompt is too long: 9000 tokens > 4096 maximum",
        ),
        (
            "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
            {},
            "prompt is too long: 1200000 tokens > 1048576 maximum",
        ),
        (
            "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum context length",
            {},
            "prompt is too long: 40000 tokens > 32768 maximum",
        ),
        (
            "This model's maximum prompt length is 131072 but the request contains 200000 tokens.",
            {},
            "prompt is too long: 200000 tokens > 131072 maximum",
        ),
        (
            "The model returned the following errors: prompt is too long: 200049 tokens > 200000 maximum",
            {},
            "prompt is too long: 200049 tokens > 200000 maximum",
        ),
        *[
            (f"The model returned the following errors: {text}", {}, f"prompt is too long: {start}{text}")
            for start, text in [
                ("The model returned the following errors: ", each)
                for each in (
                    "Input Tokens Exceeded: Number of input tokens exceeds maximum length. Please update the input.",
                    "This model's maximum context length is 131072 tokens. Please reduce the length of the prompt",
                    "too many total text bytes: 30000000 > 9000000",
                )
            ]
        ],
        ("Please shorten it.", {"code": "context_length_exceeded"}, "prompt is too long: Please shorten it."),
        ("max_tokens is too large: 32000. It supports at most 16384.", {}, None),
        ("No.", {"code": 400}, None),
    ],
)
def test_a_request_that_is_too_long(message: str, more: dict[str, Any], expected: str | None) -> None:
    """Whatever a provider calls it, the client reads Anthropic's words, and the provider's numbers."""
    for error in (rejected({"message": message, **more}), reported("up", {"error": {"message": message, **more}})):
        told = msgspec.json.decode(error_response(error, "anthropic", "r")[2])["error"]
        assert told["message"] == (expected or message)
        if expected is not None:
            assert told["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("message", "more", "expected"),
    [
        (
            "prompt is too long: 9000 tokens > 8192 maximum",
            {"type": "invalid_request_error"},
            "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
        ),
        (
            "the request exceeds the available context size. try increasing the context size",
            {"type": "exceed_context_size_error", "n_prompt_tokens": 9000, "n_ctx": 4096},
            "This model's maximum context length is 4096 tokens. However, your messages resulted in 9000 tokens.",
        ),
        (
            "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (4000 in the "
            "messages, 1000 in the completion).",
            {"type": "BadRequestError", "code": 400},
            "This model's maximum context length is 4096 tokens. However, your messages resulted in 5000 tokens.",
        ),
        (
            "Input is too long for requested model.",
            {},
            "This model's maximum context length is exceeded: Input is too long for requested model.",
        ),
    ],
)
def test_a_request_that_is_too_long_in_openai_s_words(message: str, more: dict[str, Any], expected: str) -> None:
    """The client gets the code, the type, the status and the words that it acts on, with the provider's numbers."""
    errors = (
        rejected({"message": message, **more}, status=413),
        reported("up", {"error": {"message": message, **more}}),
    )
    for error in errors:
        error.attempts = ({"target": "a/m"},)
        status, headers, body = error_response(error, "openai", "r")
        assert status == 400
        assert set(error.headers) <= set(headers)
        told = {"message": expected, "type": "invalid_request_error", "param": None, "code": "context_length_exceeded"}
        assert msgspec.json.decode(body) == {"error": {**told, "attempts": [{"target": "a/m"}]}}
        assert error_frame(error, "openai", "r") == b"data: " + body + b"\n\n"


def test_anthropic_s_envelope_is_replaced() -> None:
    """The message, the type and the status stay; what OpenAI's errors have besides is added."""
    body = b'{"type":"error","error":{"type":"not_found_error","message":"model: c"},"request_id":"req_1"}'
    error = Rejected("model: c", status=404, body=body, headers=((b"retry-after", b"3"),))
    status, headers, rendered = error_response(error, "openai", "r")
    told = {"message": "model: c", "type": "not_found_error", "param": None, "code": "upstream_rejected"}
    assert (status, msgspec.json.decode(rendered)) == (404, {"error": told})
    assert (b"retry-after", b"3") in headers
    assert error_frame(error, "openai", "r") == b"data: " + rendered + b"\n\n"
    assert error_response(error, "anthropic", "r")[2] == body


def test_google_s_error_is_replaced() -> None:
    """OpenAI's clients get a code that is text, and a type; Google's get its own words."""
    error = rejected({"code": 429, "message": "slow down", "status": "RESOURCE_EXHAUSTED"}, 429)
    status, _, rendered = error_response(error, "openai", "r")
    told = {"message": "slow down", "type": "invalid_request_error", "param": None, "code": "upstream_rejected"}
    assert (status, msgspec.json.decode(rendered)) == (429, {"error": told})
    assert error_frame(error, "openai", "r") == b"data: " + rendered + b"\n\n"
    assert error_response(error, "gemini", "r")[2] == error.body


def test_openai_s_own_words_go_through() -> None:
    """An upstream that says it with the code is passed on word for word, and so is every other error."""
    for message, code in (("It is too long.", "context_length_exceeded"), ("max_tokens is too large: 32000.", None)):
        error = rejected({"message": message, "code": code, "new": 1.0})
        assert error_response(error, "openai", "r") == error.to_response()
        told = reported("up", {"error": {"message": message, "code": code}})
        assert error_frame(told, "openai", "r") == told.to_frame()


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ({"type": "overloaded_error"}, "overloaded_error"),
        ({"type": "server_error", "code": "rate_limit_exceeded"}, "rate_limit_error"),
        ({"code": 503}, "overloaded_error"),
        ({"code": "502"}, "api_error"),
        ({}, "api_error"),
    ],
)
def test_errors_in_streams(told: dict[str, Any], kind: str) -> None:
    """The type of a provider's error event is kept as far as it is known."""
    frame = error_frame(reported("up", {"error": {"message": "m", **told}}), "anthropic", "r")
    assert b'"type":"%b","message":"m"' % kind.encode() in frame
