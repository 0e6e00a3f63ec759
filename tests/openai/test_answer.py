"""An upstream's JSON answer: the model id changes, usage is read, and an invalid answer is an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.openai.wire import CHAT, RESPONSES, deep, json_values, make_event, make_reader, model_ids, text
from trigate.errors import ProtocolViolation, Reported
from trigate.openai.answer import Usage, decode_answer, parse_usage
from trigate.openai.endpoints import ENDPOINTS, Endpoint

EMBEDDINGS = ENDPOINTS["/v1/embeddings"]
CHAT_COUNTS = {"prompt_tokens": 3, "completion_tokens": 4}


def test_an_answer_gets_the_public_model_id() -> None:
    """Only the model of a JSON answer changes, and its usage is read."""
    body = b'{"id":"c","model":"up","choices":[{"message":{"content":"\\"model\\":\\"up\\""}}],'
    body += b'"usage":{"prompt_tokens":3,"completion_tokens":4,"x":1.0}}'
    data, usage = decode_answer(body, CHAT, model="mock/up", upstream="mock")
    assert data == body.replace(b'"model":"up"', b'"model":"mock/up"', 1)
    assert usage == Usage(prompt_tokens=3, completion_tokens=4)


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(text, json_values, max_size=4), model_ids)
def test_an_answer_is_otherwise_untouched(more: dict[str, Any], public: str) -> None:
    """Every field but the top-level model is kept. An answer without a model passes unchanged."""
    more.pop("model", None)
    more["output"] = []
    body = json.dumps(more).encode()
    assert decode_answer(body, RESPONSES, model=public, upstream="mock")[0] == body
    data, _ = decode_answer(json.dumps({**more, "model": "up"}).encode(), RESPONSES, model=public, upstream="mock")
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
        ({**CHAT_COUNTS, "prompt_tokens_details": {"cached_tokens": 2}}, (3, 4, 2)),
        ({"input_tokens": 3, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 2}}, (3, 4, 2)),
        ({**CHAT_COUNTS, "prompt_cache_hit_tokens": 2, "prompt_cache_miss_tokens": 1}, (3, 4, 2)),
        ({**CHAT_COUNTS, "cached_tokens": 2}, (3, 4, 2)),
        ({"input_tokens": 1, "output_tokens": 4, "cache_read_input_tokens": 2}, (3, 4, 2)),
        ({**CHAT_COUNTS, "prompt_tokens_details": {"cached_tokens": 9}}, (3, 4, 3)),
        ({**CHAT_COUNTS, "prompt_tokens_details": {"cached_tokens": "2"}, "cached_tokens": -1}, (3, 4)),
        ({**CHAT_COUNTS, "prompt_tokens_details": [2]}, (3, 4)),
        ({**CHAT_COUNTS, "prompt_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 2}}, (3, 4, 1, 2)),
        ({**CHAT_COUNTS, "completion_tokens_details": {"reasoning_tokens": 3}}, (3, 4, 0, 0, 3)),
        ({**CHAT_COUNTS, "total_tokens": 12, "completion_tokens_details": {"reasoning_tokens": 5}}, (3, 9, 0, 0, 5)),
        ({"input_tokens": 3, "output_tokens": 4, "output_tokens_details": {"thinking_tokens": 3}}, (3, 4, 0, 0, 3)),
        (
            {
                **CHAT_COUNTS,
                "prompt_tokens_details": {"audio_tokens": 2},
                "completion_tokens_details": {"audio_tokens": 3},
            },
            (3, 4, 0, 0, 0, 5, 3),
        ),
        (
            {
                "input_tokens": 9,
                "output_tokens": 4,
                "input_token_details": {"cached_tokens": 1, "audio_tokens": 8},
                "output_token_details": {"audio_tokens": 4},
            },
            (9, 4, 1, 0, 0, 12, 4),
        ),
        (
            {
                "input_tokens": 1,
                "output_tokens": 4,
                "cache_read_input_tokens": 2,
                "cache_creation_input_tokens": 30,
                "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
            },
            (33, 4, 2, 30, 0, 0, 0, 20),
        ),
    ],
    ids=repr,
)
def test_usage(usage: object, read: tuple[Any, ...] | None) -> None:
    """Counts are read in every spelling, those of the cache too. Invalid counts mean no usage and never an error."""
    body = json.dumps({"output": [], "usage": usage}).encode()
    expected = Usage(*read) if read else None
    assert decode_answer(body, RESPONSES, model="m", upstream="mock")[1] == expected


def test_the_counts_of_a_whole_stream() -> None:
    """The last event of Anthropic's stream counts the answer alone: what was said of the prompt still holds."""
    first: dict[str, object] = {
        "input_tokens": 1,
        "cache_read_input_tokens": 2,
        "cache_creation_input_tokens": 3,
        "output_tokens": 1,
    }
    first |= {"cache_creation": {"ephemeral_1h_input_tokens": 3}}
    last = {"output_tokens": 9, "output_tokens_details": {"thinking_tokens": 5}}
    expected = Usage(6, 9, 2, 3, reasoning_tokens=5, cache_write_1h_tokens=3)
    assert parse_usage(last, parse_usage(first)) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b'"ok"',
        b'{"object": ',
        b"{}",
        b'{"id": "x", "choices": null}',
        b'{"id": "x", "choices": 30}',
        b'{"id": "x", "choices": {"index": 0}, "error": null}',
        b'{"object": "\xff"}',
        b'{"object": "\\ud83d"',
        b'{"object": "\\ud83d", "x": \xff}',
        deep("", ""),
    ],
    ids=lambda body: repr(body)[:30],
)
def test_an_invalid_answer(body: bytes) -> None:
    """Under a 200, anything but a JSON object with results is the provider's failure."""
    with pytest.raises(ProtocolViolation, match="mock"):
        decode_answer(body, CHAT, model="m", upstream="mock")


def test_an_unusual_answer() -> None:
    """A byte order mark is dropped. Half a surrogate pair, as in a split emoji, passes through."""
    body = b'{"model": "up", "choices": [{"text": "\\ud83d"}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}'
    data, usage = decode_answer(b"\xef\xbb\xbf" + body, CHAT, model="m", upstream="mock")
    assert data == body.replace(b"up", b"m")
    assert usage == Usage(prompt_tokens=3, completion_tokens=4)
    twice = body[:-1] + b', "x": {"model": "up"}}'
    assert json.loads(decode_answer(twice, CHAT, model="m", upstream="mock")[0]) == {**json.loads(twice), "model": "m"}


def test_a_null_error_is_no_error() -> None:
    """Answers of the responses API carry ``error: null``."""
    body = b'{"object":"response","output":[],"error":null}'
    assert decode_answer(body, RESPONSES, model="m", upstream="mock") == (body, None)


@pytest.mark.parametrize(
    ("value", "status", "message"),
    [
        ({"error": {"message": "busy now"}}, 503, "busy now"),
        ({"error": "Something broke"}, 502, "Something broke"),
        ({"error": {"message": "Worker limit reached", "code": 502}}, 502, "Worker limit reached"),
        ({"error": {"message": "no", "code": "429"}}, 429, "no"),
        ({"error": {"error": {"message": "Invalid value"}}}, 400, "Invalid value"),
        ({"object": "error", "message": "bad", "type": "BadRequestError", "param": None, "code": 400}, 400, "bad"),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, 503, "Overloaded"),
        (
            {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}},
            402,
            "insufficient",
        ),
        ({"code": "1302", "msg": "rate limit reached", "success": False}, 429, "rate limit reached"),
        ({"code": "InvalidApiKey", "message": "Invalid API-key provided.", "request_id": "r"}, 401, "Invalid API-key"),
        ({"choices": [], "error": {"message": "upstream is busy"}}, 503, "upstream is busy"),
        ({"success": False, "errors": [{"code": 5006, "message": "no such model"}], "result": None}, 404, "no such"),
        ({"detail": "Not Found"}, 404, "Not Found"),
        ([{"error": {"code": 400, "message": "no field", "status": "INVALID_ARGUMENT"}}], 400, "no field"),
        ({"choices": [{"error": {"code": 503, "message": "gone"}, "finish_reason": "error"}]}, 503, "gone"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_error_with_status_200(value: object, status: int, message: str) -> None:
    """An answer without results that reports an error is one: with the status that it stands for, the provider's
    sentence and its fields; another target may answer."""
    with pytest.raises(Reported) as caught:
        decode_answer(json.dumps(value).encode(), CHAT, model="m", upstream="mock")
    error = caught.value
    assert (error.status, error.retryable) == (status, True)
    assert message in error.message
    assert json.loads(error.to_response()[2])["error"]["message"] == error.message
    events = make_reader()
    assert events.read(make_event(value)) == b""
    assert repr(events.error) == repr(error), "an event of a stream says the same"


@pytest.mark.parametrize(
    ("endpoint", "body", "is_answer"),
    [
        (CHAT, b'{"choices": [{}], "base_resp": {"status_code": 0}}', True),
        (CHAT, b'{"choices": []}', False),
        (EMBEDDINGS, b'{"data": []}', True),
        (EMBEDDINGS, b'{"data": null}', False),
        (EMBEDDINGS, b'{"data": [], "error": "no"}', False),
        (EMBEDDINGS, b'{"object": "list"}', False),
        (RESPONSES, b'{"output": [], "error": {"message": "x"}, "status": "failed"}', False),
    ],
)
def test_an_answer_has_results(endpoint: Endpoint, body: bytes, is_answer: bool) -> None:
    """Each endpoint has its own results. Only choices may not be empty."""
    if is_answer:
        assert decode_answer(body, endpoint, model="m", upstream="mock")[0] == body
    else:
        with pytest.raises((ProtocolViolation, Reported)):
            decode_answer(body, endpoint, model="m", upstream="mock")


@pytest.mark.parametrize("place", ["x_groq", "choices", "response", "top"])
def test_usage_wherever_it_is(place: str) -> None:
    """Counts beside the results, in ``x_groq``, in a choice or in ``response`` are read, in an answer and an event."""
    usage = {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    value: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": "a"}}], "output": []}
    if place == "choices":
        value["choices"][0] |= usage
    elif place == "top":
        value |= usage
    else:
        value[place] = usage
    reader = make_reader()
    reader.read(make_event({"choices": [{"index": 0, "delta": {"content": "a"}}]}))
    reader.read(make_event(value))
    read = decode_answer(json.dumps(value).encode(), CHAT, model="m", upstream="mock")[1]
    assert read == reader.usage == Usage(prompt_tokens=3, completion_tokens=4)
