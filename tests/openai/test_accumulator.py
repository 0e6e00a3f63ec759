"""The accumulator builds an answer from its events as the SDKs do, with the fields that a provider added."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.provider import DONE, chunk, completion, content, event, role, usage
from trigate.openai.accumulator import AnswerAccumulator


def accumulate(*frames: bytes) -> AnswerAccumulator:
    """An accumulator that has received these events."""
    answer = AnswerAccumulator()
    for each in frames:
        answer.feed(each)
    return answer


def said(answer: AnswerAccumulator) -> Any:  # Any: JSON
    """The decoded message of an accumulator."""
    return msgspec.json.decode(answer.message())


def tool_call(index: int | None, **fields: Any) -> bytes:  # Any: JSON
    """An event with a part of a tool call."""
    name, arguments = fields.pop("name", None), fields.pop("arguments", None)
    function = {key: value for key, value in {"name": name, "arguments": arguments}.items() if value is not None}
    return chunk({"tool_calls": [{**({} if index is None else {"index": index}), **fields, "function": function}]})


WEATHER = (
    role(),
    tool_call(0, id="call_a", type="function", name="weather", arguments=""),
    tool_call(0, arguments='{"city":'),
    tool_call(1, id="call_b", type="function", name="time", arguments=""),
    tool_call(0, arguments='"Bern"}'),
    tool_call(1, arguments="{}"),
)
CALLS = [
    {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bern"}'}},
    {"id": "call_b", "type": "function", "function": {"name": "time", "arguments": "{}"}},
]


def test_text() -> None:
    """The pieces of the content are joined. A role, a usage event and ``[DONE]`` add nothing."""
    answer = accumulate(role(), content("Hel"), content("lo"), chunk({}, finish_reason="stop"), usage(3, 2), DONE)
    assert answer.text == "Hello"
    assert answer.finish_reason == "stop"
    assert answer.has_content
    assert not answer.is_truncated
    assert not answer.has_tool_calls
    assert answer.message() == b'{"role":"assistant","content":"Hello"}'


def test_frames_with_several_events() -> None:
    """Events that arrive together are separated, with comments between them and other line ends too."""
    frames = (
        content("a") + b": keep-alive\n\n" + content("b").replace(b"\n", b"\r\n") + b": x\n\n" + content("c") + DONE
    )
    assert accumulate(frames).text == "abc"


def test_before_the_first_content() -> None:
    """There is nothing to store yet, but a message can still be made."""
    answer = accumulate(role(), b": keep-alive\n\n")
    assert not answer.has_content
    assert answer.is_truncated
    assert answer.text == ""
    assert said(answer) == {"role": "assistant", "content": ""}


def test_an_error_event_adds_nothing() -> None:
    """The text before it stays, and the answer counts as truncated."""
    answer = accumulate(content("a"), event({"error": {"message": "m", "type": "upstream_error"}}))
    assert answer.is_truncated
    assert said(answer) == {"role": "assistant", "content": "a"}


def test_added_fields_are_kept() -> None:
    """Reasoning is joined from its pieces, and an unknown field is kept as it came. Neither is an answer by itself, and
    of a truncated answer they are left out."""
    pieces = (chunk({"reasoning_content": "h", "x_new": [1]}), chunk({"reasoning_content": "m"}), content("a"))
    assert said(accumulate(*pieces, DONE)) == {
        "role": "assistant", "content": "a", "reasoning_content": "hm", "x_new": [1],
    }  # fmt: skip
    assert said(accumulate(*pieces)) == {"role": "assistant", "content": "a"}
    assert not accumulate(chunk({"reasoning_content": "hm"}), DONE).has_content


def test_signed_reasoning() -> None:
    """The pieces of a list are joined by index and type: texts are concatenated, a signature stays, a null changes
    nothing. A piece without an index is one of its own."""

    def detail(**fields: Any) -> bytes:
        return chunk({"reasoning_details": [fields]})

    answer = accumulate(
        detail(type="reasoning.text", index=0, text="I ", signature=None),
        detail(type="reasoning.text", index=0, text="think"),
        detail(type="reasoning.text", index=0, signature="c2ln", text=None),
        detail(type="reasoning.encrypted", index=0, data="eA=="),
        detail(type="reasoning.summary", summary="s"),
        chunk({"extra_content": {"google": {"thought_signature": "Z28="}}}),
        content("a"),
        DONE,
    )
    assert said(answer)["reasoning_details"] == [
        {"type": "reasoning.text", "index": 0, "text": "I think", "signature": "c2ln"},
        {"type": "reasoning.encrypted", "index": 0, "data": "eA=="},
        {"type": "reasoning.summary", "summary": "s"},
    ]
    assert said(answer)["extra_content"] == {"google": {"thought_signature": "Z28="}}


def test_a_refusal() -> None:
    """It is stored beside the content, which is null."""
    answer = accumulate(chunk({"refusal": "I can"}), chunk({"refusal": "not."}), chunk({}, finish_reason="stop"), DONE)
    assert answer.has_content
    assert said(answer) == {"role": "assistant", "content": None, "refusal": "I cannot."}


def test_tool_calls_are_merged_by_index() -> None:
    """The arguments of each call are joined, however the pieces of several calls are mixed."""
    answer = accumulate(*WEATHER, chunk({}, finish_reason="tool_calls"), DONE)
    assert answer.has_tool_calls
    assert answer.has_content
    assert said(answer) == {"role": "assistant", "content": None, "tool_calls": CALLS}


def test_tool_calls_of_a_truncated_answer_are_dropped() -> None:
    """Their arguments may be incomplete. The text stays. A ``finish_reason`` alone does not make the answer
    complete."""
    for end in ((), (chunk({}, finish_reason="tool_calls"),)):
        answer = accumulate(*WEATHER, *end)
        assert answer.has_tool_calls
        assert not answer.has_content
        assert said(accumulate(content("Let me see."), *WEATHER, *end)) == {
            "role": "assistant",
            "content": "Let me see.",
        }


def test_repeated_ids_and_names() -> None:
    """Some providers send them with each piece. They are not joined."""
    answer = accumulate(
        tool_call(0, id="call_a", name="f", arguments="{"), tool_call(0, id="call_a", name="f", arguments="}"), DONE
    )
    assert said(answer)["tool_calls"] == [
        {"type": "function", "id": "call_a", "function": {"name": "f", "arguments": "{}"}}
    ]


def test_tool_calls_without_an_index() -> None:
    """An id begins the next call. A piece without an id continues the last one."""
    answer = accumulate(
        tool_call(None, id="call_a", type="function", name="f", arguments="{"),
        tool_call(None, arguments="}"),
        tool_call(None, id="call_b", type="function", name="g", arguments="{}"),
        DONE,
    )
    assert [(each["id"], each["function"]["arguments"]) for each in said(answer)["tool_calls"]] == [
        ("call_a", "{}"),
        ("call_b", "{}"),
    ]


def test_extra_fields_of_a_tool_call() -> None:
    """They are stored: a provider that signs its tool calls needs the signature back."""
    extra = {"google": {"thought_signature": "c2ln"}}
    answer = accumulate(tool_call(0, id="a", type="function", name="f", arguments="{}", extra_content=extra), DONE)
    assert said(answer)["tool_calls"][0]["extra_content"] == extra


def test_a_function_call() -> None:
    """The older way to call a tool is merged too."""
    answer = accumulate(
        chunk({"function_call": {"name": "f", "arguments": "{"}}), chunk({"function_call": {"arguments": "}"}}), DONE
    )
    assert answer.has_content
    assert said(answer) == {
        "role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"},
    }  # fmt: skip


def test_only_the_first_choice() -> None:
    """Other choices are ignored, in any order."""
    both = [{"index": 1, "delta": {"content": "no"}}, {"index": 0, "delta": {"content": "yes"}}]
    assert accumulate(event({"choices": both}), event({"choices": both[:1]})).text == "yes"


def test_content_in_parts() -> None:
    """Of a list of content parts, texts are stored and thoughts are not."""
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "a"}]
    assert accumulate(chunk({"content": parts}), content("b")).text == "ab"


@pytest.mark.parametrize(
    "value",
    [
        None, 1, [], {"choices": None}, {"choices": [None]}, {"choices": [{"delta": None}]},
        {"choices": [{"delta": {"content": 1, "refusal": 2, "tool_calls": 3, "function_call": 4}}]},
        {"choices": [{"delta": {"tool_calls": [None, {"index": 0, "function": 1}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": "0", "function": {"name": 1, "arguments": 2}}]}}]},
        {"choices": [{"index": 0, "finish_reason": 1}]},
    ],
)  # fmt: skip
def test_unexpected_shapes(value: object) -> None:
    """They are ignored here and still passed on to the client, which may understand them."""
    answer = accumulate(event(value), b"data: {\n\n", content("a"), DONE)
    assert answer.text == "a"
    assert said(answer)["content"] == "a"


def test_split_surrogate_pairs() -> None:
    """The two halves of a split emoji are joined. A single half is replaced."""
    answer = accumulate(rb'data: {"choices":[{"delta":{"content":"\ud83d"}}]}' b"\n\n")
    assert answer.text == "\ufffd"
    answer.feed(rb'data: {"choices":[{"delta":{"content":"\ude00"}}]}' b"\n\n")
    assert answer.text == "\U0001f600"
    assert said(answer)["content"] == "\U0001f600"
    raw = rb'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"id":"\ud83d","function":{"name":"\ud83d"}}]}}]}'
    [call] = said(accumulate(raw + b"\n\n", DONE))["tool_calls"]
    assert (call["id"], call["function"]["name"]) == ("?", "\ufffd")


def test_a_json_answer() -> None:
    """A JSON answer is always complete."""
    answer = AnswerAccumulator()
    answer.feed_answer(completion("Hi"))
    assert (answer.text, answer.finish_reason, answer.is_truncated) == ("Hi", "stop", False)
    assert answer.message() == b'{"role":"assistant","content":"Hi"}'


def test_a_json_answer_with_tools() -> None:
    """Its tool calls are those of the answer, in order. Empty fields, audio and images are not stored."""
    answer = AnswerAccumulator()
    dropped = {"annotations": [], "audio": {"id": "a"}, "images": [{}]}
    message: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": CALLS, **dropped}
    answer.feed_answer(msgspec.json.encode({"choices": [{"index": 0, "message": message}]}))
    assert said(answer) == {"role": "assistant", "content": None, "tool_calls": CALLS}


@pytest.mark.slow
@given(st.lists(st.text(max_size=5), max_size=20), st.integers(1, 20))
def test_the_grouping_of_events_does_not_matter(texts: list[str], size: int) -> None:
    """The same events give the same answer, one by one or together."""
    events = [*map(content, texts), DONE]
    groups = [b"".join(events[at : at + size]) for at in range(0, len(events), size)]
    assert accumulate(*groups).text == "".join(texts) == accumulate(*events).text
