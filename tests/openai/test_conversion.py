"""A JSON answer becomes events, and events a JSON answer, without a loss."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.openai.wire import HELLO, make_delta, make_event
from trigate.errors import ProtocolViolation, Reported, Truncated
from trigate.openai.accumulator import AnswerAccumulator
from trigate.openai.conversion import answer_of, events_of
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.request import Call, decode_call

DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
HEAD = {"id": "c", "object": "chat.completion", "created": 1, "model": "mock/up", "system_fingerprint": None}


def call(path: str = "chat/completions", more: str = "") -> Call:
    fields = {"chat/completions": HELLO, "completions": '"prompt":"x"'}.get(path, '"input":"x"')
    return decode_call(ENDPOINTS[f"/v1/{path}"], f'{{"model":"mock/up",{fields}{more}}}'.encode())


def chat(**message: Any) -> dict[str, Any]:
    choices = [{"index": 0, "message": {"role": "assistant", **message}, "logprobs": None, "finish_reason": "stop"}]
    return {**HEAD, "choices": choices, "usage": USAGE}


MESSAGES: list[dict[str, Any]] = [
    {"content": "Hello"},
    {"content": "Hello", "reasoning_content": "hm", "annotations": [{"type": "url", "url": "x"}]},
    {"content": None, "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
    {"content": None, "refusal": "no"},
]


@pytest.mark.parametrize("message", MESSAGES, ids=str)
def test_there_and_back(message: dict[str, Any]) -> None:
    """The events of an answer are that answer."""
    answer = chat(**message)
    events = events_of(json.dumps(answer).encode(), call(), upstream="mock")
    assert events.endswith(DONE)
    first = json.loads(events.split(b"\n\n")[0][6:])
    assert first["object"] == "chat.completion.chunk"
    assert all("index" in each for each in first["choices"][0]["delta"].get("tool_calls", ()))
    assert json.loads(answer_of(events, call(), upstream="mock")) == answer


def test_usage_has_its_own_event_where_it_is_asked_for() -> None:
    """``include_usage`` asks for the counts in a last event without choices."""
    options = ',"stream":true,"stream_options":{"include_usage":true}'
    events = events_of(json.dumps(chat(content="a")).encode(), call(more=options), upstream="mock").split(b"\n\n")
    first, last = json.loads(events[0][6:]), json.loads(events[1][6:])
    assert "usage" not in first
    assert (last["choices"], last["usage"]) == ([], USAGE)


def test_the_deltas_of_a_stream_are_put_together() -> None:
    """Texts are joined, tool calls belong together by their index, labels do not repeat, and every choice is kept."""

    def delta(index: int, finish_reason: str | None = None, **fields: Any) -> bytes:
        choice = {"index": index, "delta": fields, "finish_reason": finish_reason}
        return make_event({**HEAD, "object": "chat.completion.chunk", "choices": [choice]})

    def tool(index: int, arguments: str, **more: Any) -> dict[str, Any]:
        return {"index": index, "function": {"arguments": arguments, **more.pop("function", {})}, **more}

    first = [tool(0, "", id="a", type="function", function={"name": "f"}), tool(1, "", id="b", function={"name": "g"})]
    body = b"".join(
        [
            delta(0, role="assistant", content="Hel"),
            delta(1, role="assistant", content=None, tool_calls=first),
            delta(0, role="assistant", content="lo", reasoning="h"),
            delta(1, tool_calls=[tool(1, '{"b":'), tool(0, "{")]),
            delta(1, tool_calls=[tool(0, "}", id="a", function={"name": "f"}), tool(1, "1}")]),
            delta(0, reasoning="m"),
            delta(0, "stop"),
            delta(1, "tool_calls"),
            make_event({**HEAD, "object": "chat.completion.chunk", "choices": [], "usage": USAGE}),
            DONE,
        ]
    )
    found = json.loads(answer_of(body, call(more=',"n":2'), upstream="mock"))
    choices = found.pop("choices")
    assert found == {**HEAD, "usage": USAGE}
    assert choices[0]["message"] == {"role": "assistant", "content": "Hello", "reasoning": "hm"}
    assert [choice["finish_reason"] for choice in choices] == ["stop", "tool_calls"]
    assert choices[1]["message"]["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"arguments": "{}", "name": "f"}},
        {"id": "b", "function": {"arguments": '{"b":1}', "name": "g"}},
    ]
    accumulated = AnswerAccumulator()
    accumulated.feed(body)
    assert accumulated.text == "Hello"


def test_completions() -> None:
    """A text completion streams in the shape of its answer."""
    answer = {"id": "c", "object": "text_completion", "model": "mock/up", "choices": [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}]}  # fmt: skip
    events = events_of(json.dumps(answer).encode(), call("completions"), upstream="mock")
    assert json.loads(events.split(b"\n\n")[0][6:]) == answer
    assert json.loads(answer_of(events, call("completions"), upstream="mock")) == answer


def test_a_response_is_in_its_last_event() -> None:
    """The stream of a response ends with all of it."""
    response = {"id": "r", "object": "response", "model": "mock/up", "output": [{"type": "message"}]}
    body = make_event({"type": "response.output_text.delta", "delta": "H"})
    body += make_event({"type": "response.completed", "response": response})
    assert json.loads(answer_of(body, call("responses"), upstream="mock")) == response


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("responses", {"id": "r", "output": [], "model": "m"}),
        ("chat/completions", {"choices": [{"index": 0}]}),
        ("chat/completions", {"choices": ["x"]}),
    ],
)
def test_what_events_cannot_express(path: str, body: object) -> None:
    """It stays a violation of the protocol."""
    with pytest.raises(ProtocolViolation, match="mock"):
        events_of(json.dumps(body).encode(), call(path), upstream="mock")


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("chat/completions", make_delta(content="H"), Truncated),
        ("chat/completions", make_delta(content="H") + DONE, Truncated),
        ("chat/completions", make_delta(content="H") + make_event({"error": "busy"}), Reported),
        ("chat/completions", b"data: null\n\n", Truncated),
        ("chat/completions", b"data: {cut\n\n", ProtocolViolation),
        ("responses", make_event({"type": "response.output_text.delta", "delta": "H"}), Truncated),
        ("embeddings", make_event({"data": [1]}) + DONE, ProtocolViolation),
    ],
)
def test_what_is_no_answer(path: str, body: bytes, error: type[Exception]) -> None:
    """A stream that is not complete, or has an error, is no answer."""
    with pytest.raises(error, match=r"mock|busy"):
        answer_of(body, call(path), upstream="mock")


def test_a_lone_surrogate_survives() -> None:
    """Half an emoji is passed on as it came."""
    body = b'{"choices":[{"index":0,"message":{"content":"\\ud83d"},"finish_reason":"stop"}]}'
    assert b"\\ud83d" in events_of(body, call(), upstream="mock")
