"""What a provider says is wrong is found in every shape in which it says it."""

from __future__ import annotations

import json

import pytest

from trigate.openai.provider_error import message_in, reported

SENTENCE = "Cannot find field."


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": SENTENCE, "code": None}},
        {"error": SENTENCE},
        {"error": {"error": {"message": SENTENCE}}},
        {"error": {"message": {"detail": SENTENCE}}},
        {"error": {"message": json.dumps({"error": {"message": SENTENCE}})}},
        {"error": {"code": 400, "details": [{"description": SENTENCE}]}},
        {"error": "invalid_request", "error_description": SENTENCE},
        {"error": "Bad_Request", "message": SENTENCE, "status": 400},
        [{"error": {"code": 400, "message": SENTENCE, "status": "INVALID_ARGUMENT"}}],
        {"success": False, "errors": [{"code": 5006, "message": SENTENCE}], "result": None},
        {"errors": [SENTENCE]},
        {"detail": SENTENCE},
        {"detail": [{"msg": SENTENCE}]},
        {"detail": {"message": SENTENCE}},
        {"title": "Bad Request", "detail": SENTENCE, "status": 400},
        {"object": "error", "message": SENTENCE, "code": 400},
        {"code": "InvalidParameter", "message": SENTENCE, "request_id": "r"},
        {"code": 1214, "msg": SENTENCE},
        {"error_code": 336003, "error_msg": SENTENCE},
        {"base_resp": {"status_code": 2013, "status_msg": SENTENCE}},
        {"Message": SENTENCE, "__type": "ValidationException"},
        {"ResponseMetadata": {"Error": {"Code": "x", "Message": SENTENCE}}},
        {"fault": {"faultstring": SENTENCE, "detail": {"errorcode": "x"}}},
        SENTENCE,
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_sentence_is_found(body: object) -> None:
    """Each of these shapes is one that a provider, a framework or a relay uses."""
    assert message_in(json.dumps(body).encode()) == SENTENCE


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"Cannot find field.\n", "Cannot find field."),
        (b"\xef\xbb\xbfno  such\r\nmodel", "no such model"),
        (b"<html><head><title>502 Bad Gateway</title></head><body><h1>x</h1></body></html>", "502 Bad Gateway"),
        (b"<!DOCTYPE html><body><h1>Access &amp; more <b>denied</b></h1>", "Access & more denied"),
        (b"<html>Not found</html>", "Not found"),
        (b"<?xml version='1.0'?><Error><Code>x</Code><Message>Denied</Message></Error>", "Denied"),
        (b'{"detail": [{"loc": ["body", "messages", 0], "msg": "Field required"}]}', "body.messages.0: Field required"),
        (b'{"error": {"message": "a"}, "detail": "b"}', "a"),
        (b"a" * 5000, "a" * 500),
        (b'{"error": {"message": "cut', None),
        (b"{}", None),
        (b"[]", None),
        (b"", None),
        (b"\x00\x01\x02", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_bodies(body: bytes, found: str | None) -> None:
    """Text and pages are read too, bounded; what is cut or binary gives nothing."""
    message = message_in(body)
    assert message is None if found is None else message is not None and message.endswith(found)


def test_a_lone_surrogate_in_an_upstream_s_error() -> None:
    """JSON can express a lone surrogate, UTF-8 cannot: the client gets the error with a question mark in its place."""
    for value in ({"message": "cut \ud83d", "code": ["\ud83d"]}, "cut \ud83d"):
        error = reported("mock", {"error": value})
        error.redact(("secret",))
        assert error.message == "cut ?"
        assert b'"message":"cut ?"' in error.to_frame()
        assert b'"message":"cut ?"' in error.to_response()[2]


def test_an_upstream_s_error_of_any_depth() -> None:
    """If the error's value cannot be encoded again, the client gets a message that there was an error."""
    value: object = 1
    for _ in range(20_000):  # beyond the limits of recursion of every Python
        value = [value]
    assert reported("mock", {"error": {"message": value}}).message == "The upstream mock reported an error."
