"""The events and answers of response calls over chat completions."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dialects.chat import DONE, USAGE, chunk, tool, usage
from tests.dialects.responses import MARKS, call, decoded, make_reader, response_of, translate, translated
from trigate.dialects.openai_responses.sealed import unseal
from trigate.dialects.vocabulary import Reasoning
from trigate.errors import ProtocolViolation, Reported, Truncated

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": {"type": "text"}}
AGENTS = {"type": "namespace", "name": "agents", "tools": [{**WEATHER, "name": "spawn"}]}
TOOLS = [WEATHER, PATCH, AGENTS]

TEXT = (chunk({"role": "assistant", "content": ""}), chunk({"content": "Hel"}), chunk({"content": "lo"}))
END = (chunk(finish_reason="stop"), usage(), DONE)
CALLS = (
    tool(0, "weather", "", "call_a"),
    tool(0, None, '{"city":'),
    tool(0, None, '"Köln"}'),
    tool(1, "apply_patch", '{"input":"*** Begin', "call_b"),
    tool(1, None, ' Patch\\n"}'),
    tool(2, "agents__spawn", "{}", "call_c"),
)
CALLS_END = (chunk(finish_reason="tool_calls"), usage(), DONE)
EVERYTHING = (
    chunk({"reasoning_content": "Let me "}),
    chunk({"reasoning_content": "think."}),
    *TEXT[1:],
    *CALLS,
    *CALLS_END,
)


def test_a_text() -> None:
    """One message, its text in pieces, and the token counts with the tokens of the cache."""
    stream, reader = translate([*TEXT, *END])
    assert reader.complete
    response = response_of(stream)
    assert response["status"] == "completed"
    assert [(item["type"], item["id"], item["status"]) for item in response["output"]] == [
        ("message", "msg_1_0", "completed")
    ]
    assert response["output"][0]["content"][0]["text"] == "Hello"
    assert (response["id"], response["created_at"], response["model"]) == ("resp_1", 1_700_000_000, "up/m")
    assert response["usage"] == {
        "input_tokens": 100,
        "input_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 10},
        "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 5},
        "total_tokens": 120,
    }
    assert b"[DONE]" not in stream
    assert b"response.done" not in stream


def test_tool_calls_come_without_an_empty_message() -> None:
    """Each call is an item with the kind, the name and the namespace that the client knows."""
    stream, reader = translate([*CALLS, *CALLS_END], call(tools=TOOLS))
    assert reader.complete
    weather, patch, spawn = response_of(stream)["output"]
    assert weather == {
        "id": "fc_1_0",
        "type": "function_call",
        "status": "completed",
        "call_id": "call_a",
        "name": "weather",
        "arguments": '{"city":"Köln"}',
    }
    assert patch == {
        "id": "ctc_1_1",
        "type": "custom_tool_call",
        "status": "completed",
        "call_id": "call_b",
        "name": "apply_patch",
        "input": "*** Begin Patch\n",
    }
    assert (spawn["name"], spawn["namespace"], spawn["call_id"]) == ("spawn", "agents", "call_c")
    kinds = [event["type"] for event in decoded(stream)]
    assert kinds.count("response.custom_tool_call_input.delta") == 1
    assert kinds.count("response.function_call_arguments.done") == 2


@pytest.mark.parametrize("summary", [None, "auto"])
def test_reasoning(summary: str | None) -> None:
    """A client that asks for a summary gets the reasoning as one; another one gets it as reasoning."""
    asked = call(tools=TOOLS, reasoning={"summary": summary}, include=["reasoning.encrypted_content"])
    stream, _ = translate(EVERYTHING, asked)
    reasoning, message, *_ = response_of(stream)["output"]
    assert (reasoning["type"], message["type"]) == ("reasoning", "message")
    where = "summary" if summary else "content"
    assert [part["text"] for part in reasoning[where]] == ["Let me think."]
    mark = MARKS.mark_of("Let me think.")
    assert unseal(reasoning["encrypted_content"]) == Reasoning("Let me think.", {"trigate": mark})
    kinds = {event["type"] for event in decoded(stream)}
    assert ("response.reasoning_summary_text.delta" in kinds) is bool(summary)
    assert ("response.reasoning_text.delta" in kinds) is (summary is None)


def test_reasoning_is_sealed_only_for_clients_that_ask() -> None:
    """Others have no use for it."""
    stream, _ = translate(EVERYTHING, call(tools=TOOLS))
    assert "encrypted_content" not in response_of(stream)["output"][0]


@pytest.mark.parametrize(("reason", "told"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
def test_an_incomplete_answer(reason: str, told: str) -> None:
    """It says why, and so does its last item."""
    stream, _ = translate([*TEXT, chunk(finish_reason=reason), DONE])
    response = response_of(stream)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": told})
    assert response["output"][-1]["status"] == "incomplete"


def test_a_call_that_was_cut_off() -> None:
    """Its item says that it is incomplete."""
    stream, reader = translate([*CALLS[:2], chunk(finish_reason="length"), DONE], call(tools=TOOLS))
    assert reader.complete
    [item] = [event["item"] for event in decoded(stream) if event["type"] == "response.output_item.done"]
    assert (item["status"], item["arguments"]) == ("incomplete", '{"city":')


def test_a_tool_that_the_client_does_not_have() -> None:
    """It is an error: the client could not run it."""
    stream, reader = translate([*TEXT, tool(0, "rm", "{}", "call_a"), *CALLS_END], call(tools=TOOLS))
    assert isinstance(reader.error, ProtocolViolation)
    assert "'rm'" in reader.error.message
    failed = reader.error_frame(reader.error)
    assert failed is not None
    response = response_of(stream + failed)
    assert response["error"]["code"] == "server_error"
    body = msgspec.json.encode(
        {
            "id": "chatcmpl-1",
            "choices": [
                {
                    "message": {"tool_calls": [{"id": "a", "function": {"name": "rm", "arguments": "{}"}}]},
                    "finish_reason": "tool_calls",
                }
            ],
        }
    )
    asked = call(stream=False)
    with pytest.raises(ProtocolViolation, match="'rm'"):
        translated(asked).answer(asked, body, upstream="up")


@pytest.mark.parametrize("cut", [1, 3, 5, 8, 10])
def test_a_truncated_stream(cut: int) -> None:
    """It ends with ``response.failed``, never with a complete response."""
    stream, reader = translate(EVERYTHING[:cut], call(tools=TOOLS))
    assert isinstance(reader.error, Truncated)
    failed = reader.error_frame(reader.error)
    assert failed is not None
    response = response_of(stream + failed)
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert b"response.completed" not in stream
    assert decoded(stream + failed)[-1]["error"]["code"] == "upstream_truncated", "OpenAI's SDKs raise on it"


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        (400, {"message": "This model's maximum context length is 8 tokens"}, "invalid_prompt"),
        (400, {"message": "prompt is too long: 9 tokens > 8 maximum"}, "context_length_exceeded"),
        (429, {"message": "Slow down"}, "rate_limit_exceeded"),
        (429, {"message": "Pay", "code": "insufficient_quota"}, "insufficient_quota"),
        (503, {"message": "Overloaded"}, "server_is_overloaded"),
        (500, {"message": "Broken"}, "server_error"),
    ],
)
def test_the_code_of_a_failure(status: int, error: dict[str, Any], code: str) -> None:
    """It is one that an agent acts on, if that is what the provider says."""
    _, reader = translate(TEXT)
    frame = reader.error_frame(Reported(error["message"], error=error, status=status))
    assert frame is not None
    assert msgspec.json.decode(frame.partition(b"data: ")[2])["response"]["error"]["code"] == code


def test_a_stream_in_pieces() -> None:
    """However the bytes arrive, the client gets the same events."""
    asked = call(tools=TOOLS)
    body = b"".join(EVERYTHING)
    whole, _ = translate([body], asked)
    assert response_of(whole)["status"] == "completed"
    assert translate([body[at : at + 1] for at in range(len(body))], asked)[0] == whole
    for at in range(0, len(body), 7):
        assert translate([body[:at], body[at:]], asked)[0] == whole


def test_a_plain_answer_is_the_streamed_one() -> None:
    """It has the same items, ids and counts."""
    message = {
        "reasoning_content": "Let me think.",
        "content": "Hello",
        "tool_calls": [
            {"id": "call_a", "function": {"name": "weather", "arguments": '{"city":"Köln"}'}},
            {"id": "call_b", "function": {"name": "apply_patch", "arguments": '{"input":"*** Begin Patch\\n"}'}},
            {"id": "call_c", "function": {"name": "agents__spawn", "arguments": "{}"}},
        ],
    }
    choice = {"message": message, "finish_reason": "tool_calls"}
    body = msgspec.json.encode({"id": "chatcmpl-1", "choices": [choice], "usage": USAGE})
    asked = call(tools=TOOLS, stream=False)
    data, counts = translated(asked).answer(asked, body, upstream="up")
    assert counts is not None
    assert counts[:2] == (100, 20)
    streamed = response_of(translate(EVERYTHING, call(tools=TOOLS))[0])
    assert msgspec.json.decode(data) == streamed


def test_the_request_is_repeated() -> None:
    """As the client sent it; what it left out is as OpenAI has it."""
    given = {"metadata": {"a": "1.0"}, "temperature": 1.0, "tools": TOOLS, "instructions": "Be brief.", "store": False}
    response = response_of(translate([*TEXT, *END], call(**given))[0])
    assert {name: response[name] for name in given} == given
    assert (response["tool_choice"], response["truncation"], response["top_p"]) == ("auto", "disabled", None)


@given(st.lists(st.sampled_from([*EVERYTHING, *END, b": ping\n\n", b"data: {}\n\n", b"data: [1]\n\n"]), max_size=14))
def test_any_stream(pieces: list[bytes]) -> None:
    """Whatever comes, the events make sense, and only a stream that says how it ended is complete."""
    stream, reader = translate(pieces, call(tools=TOOLS))
    assert reader.complete is (reader.error is None)
    if reader.complete:
        assert response_of(stream)["status"] == "completed"
    elif stream and reader.error is not None:
        failed = reader.error_frame(reader.error)
        assert response_of(stream + (failed or b""))["status"] == "failed"


def test_nothing_is_returned_before_content() -> None:
    """Until then, another target may answer."""
    reader = make_reader()
    assert reader.feed(TEXT[0]) == b""
    assert reader.feed(TEXT[1]).startswith(b"event: response.created\n")
