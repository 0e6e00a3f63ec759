"""A provider's error response: the message in it, and whether its body is passed on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trigate.errors import Rejected, Throttled
from trigate.upstream.error_body import message_suffix, rejection


def test_a_provider_s_error_body_passes_through() -> None:
    """A 4xx body in OpenAI's shape reaches the client byte for byte, with the provider's retry headers."""
    body = b'{ "error": {"message": "no such tool", "type": "t", "param": "tools", "code": "c", "more": [1.0]} }'
    error = rejection("mock", 422, body, headers=((b"retry-after", b"7"),))
    status, headers, sent = error.to_response()
    assert (status, sent) == (422, body)
    assert dict(headers)[b"retry-after"] == b"7"
    assert error.message == "no such tool"
    assert json.loads(error.to_frame()[6:]) == json.loads(body)


def test_a_pretty_printed_error_body_is_one_event() -> None:
    """Line ends inside a provider's body do not split the frame."""
    frame = rejection("mock", 400, b'{\r\n  "error": {\n    "message": "no"\n  }\n}').to_frame()
    assert frame == b'data: {"error":{"message":"no"}}\n\n'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"detail": "bad"}',
        b"[1]",
        b'{"error": ',
        b'{"error": "\xff"}',
        b'{"error": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=["empty", "detail", "array", "cut", "not UTF-8", "deep"],
)
def test_other_error_bodies_are_replaced(body: bytes) -> None:
    """A body that is no error object is not passed on: the status stays, the error object is the gateway's."""
    error = rejection("mock", 404, body)
    for document in (json.loads(error.to_response()[2]), json.loads(error.to_frame()[6:])):
        assert document["error"]["code"] == "upstream_rejected"
        assert document["error"]["message"] in ("The upstream mock answered 404.", "bad")


@pytest.mark.parametrize(
    "value",
    [
        {"error": {"code": 400, "status": "INVALID"}, "message": "no such tool"},
        {"error": {"code": 400, "error": {"message": "no such tool"}}},
        {"error": {"code": 400, "message": ["no such tool"]}},
        {"error": {"code": 400, "message": None, "details": [{"reason": "no such tool"}]}},
    ],
)
def test_a_message_is_added(value: dict[str, Any]) -> None:
    """An error object without a message, or with something else as one, gets the sentence, and keeps its fields."""
    error = rejection("mock", 400, json.dumps(value).encode())
    assert error.message == "no such tool"
    sent = json.loads(error.to_response()[2])
    assert sent == {**value, "error": {**value["error"], "message": "no such tool"}}
    assert json.loads(error.to_frame()[6:]) == sent


@pytest.mark.parametrize(
    "body",
    [b'[{"error": {"message": "no such tool"}}]', b'{"error": "no such tool"}', b"no such tool", b"<p>no such tool"],
)
def test_the_sentence_is_the_message(body: bytes) -> None:
    """Whatever the shape of the body, the client finds the sentence in ``error.message``."""
    assert "no such tool" in json.loads(rejection("mock", 400, body).to_response()[2])["error"]["message"]


def test_an_error_without_any_sentence() -> None:
    """The status is all that it says, and its fields are kept."""
    sent = json.loads(rejection("mock", 400, b'{"error": {"code": 7}}').to_response()[2])
    assert sent == {"error": {"code": 7, "message": "The upstream mock answered 400."}}


def test_429_is_throttling() -> None:
    """429 is its own error, which may be retried; when to retry is known to the gateway, and not rendered twice."""
    error = rejection("mock", 429, b"", retry_after_s=1.5)
    assert isinstance(error, Throttled)
    assert (error.retryable, error.retry_after_s) == (True, 1.5)
    assert error.headers == [(b"x-should-retry", b"false")]
    assert dict(error.with_retry_after(0.5).headers)[b"retry-after-ms"] == b"500"
    assert type(rejection("mock", 404, b"")) is Rejected


@pytest.mark.parametrize(
    ("body", "suffix"),
    [
        (b'{"error": {"message": "no such model"}}', ": no such model"),
        (b'{"error": "busy"}', ": busy"),
        (b'{"message": "busy"}', ": busy"),
        (b'{"detail": "bad"}', ": bad"),
        (b'{"error": {"message": 5}, "detail": "bad"}', ": bad"),
        (b'{"error": {"message": "' + b"x" * 5000 + b'"}}', ": " + "x" * 500),
        (b"<html>", ""),
        (b"<html><h1>Bad gateway</h1>", ": Bad gateway"),
        (b"[]", ""),
        (b"[" * 100_000, ""),
        (b"", ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_message_in_a_body(body: bytes, suffix: str) -> None:
    """The message is found in each of the usual shapes, and bounded; it is empty if there is none."""
    assert message_suffix(body) == suffix
