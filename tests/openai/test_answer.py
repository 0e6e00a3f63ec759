"""An upstream's JSON answer: the model id changes, usage is read, and an invalid answer is an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.openai.wire import deep, json_values, model_ids, text
from trigate.errors import ProtocolViolation
from trigate.openai.answer import Usage, decode_answer


def test_an_answer_gets_the_public_model_id() -> None:
    """Only the model of a JSON answer changes, and its usage is read."""
    body = b'{"id":"c","model":"up","choices":[{"message":{"content":"\\"model\\":\\"up\\""}}],'
    body += b'"usage":{"prompt_tokens":3,"completion_tokens":4,"x":1.0}}'
    data, usage = decode_answer(body, model="mock/up", upstream="mock")
    assert data == body.replace(b'"model":"up"', b'"model":"mock/up"', 1)
    assert usage == Usage(prompt_tokens=3, completion_tokens=4)


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(text, json_values, max_size=4), model_ids)
def test_an_answer_is_otherwise_untouched(more: dict[str, Any], public: str) -> None:
    """Every field but the top-level model is kept. An answer without a model passes unchanged."""
    more.pop("model", None)
    more["object"] = "x"
    body = json.dumps(more).encode()
    assert decode_answer(body, model=public, upstream="mock")[0] == body
    data, _ = decode_answer(json.dumps({**more, "model": "up"}).encode(), model=public, upstream="mock")
    assert json.loads(data) == {**more, "model": public}


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4}, (3, 4)),
        ({"input_tokens": 3, "output_tokens": 4}, (3, 4)),
        ({"prompt_tokens": 3, "total_tokens": 3}, (3, 0)),
        ({"prompt_tokens": "3", "completion_tokens": 4}, None),
        ({"prompt_tokens": True, "completion_tokens": 4}, None),
        ({}, None),
        (None, None),
        ([3, 4], None),
    ],
    ids=repr,
)
def test_usage(usage: object, read: tuple[int, int] | None) -> None:
    """Counts are read in both spellings. Invalid counts mean no usage and never an error."""
    body = json.dumps({"object": "x", "usage": usage}).encode()
    expected = Usage(prompt_tokens=read[0], completion_tokens=read[1]) if read else None
    assert decode_answer(body, model="m", upstream="mock")[1] == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b'"ok"',
        b'{"object": ',
        b'{"error": {"message": "busy"}}',
        b'{"error": "busy"}',
        b'{"object": "\xff"}',
        b'{"object": "\\ud83d"',
        b'{"object": "\\ud83d", "x": \xff}',
        deep("", ""),
    ],
    ids=lambda body: repr(body)[:30],
)
def test_an_invalid_answer(body: bytes) -> None:
    """Under a 200, an error object and anything but a JSON object are the provider's failure."""
    with pytest.raises(ProtocolViolation, match="mock"):
        decode_answer(body, model="m", upstream="mock")


def test_an_unusual_answer() -> None:
    """A byte order mark is dropped. Half a surrogate pair, as in a split emoji, passes through."""
    body = b'{"model": "up", "choices": [{"text": "\\ud83d"}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}'
    data, usage = decode_answer(b"\xef\xbb\xbf" + body, model="m", upstream="mock")
    assert data == body.replace(b"up", b"m")
    assert usage == Usage(prompt_tokens=3, completion_tokens=4)
    twice = body[:-1] + b', "x": {"model": "up"}}'
    assert json.loads(decode_answer(twice, model="m", upstream="mock")[0]) == {**json.loads(twice), "model": "m"}


def test_a_null_error_is_no_error() -> None:
    """Answers of the responses API carry ``error: null``."""
    body = b'{"object":"response","error":null}'
    assert decode_answer(body, model="m", upstream="mock") == (body, None)
