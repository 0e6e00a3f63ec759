"""`trigate.dialects.memory`: what is remembered of an answer, and where it is put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from tests.dialects.chat import MARKS, call, chunk, tool, usage
from trigate.config.sections import UpstreamConfig, Url
from trigate.dialects.anthropic import MessagesClient
from trigate.dialects.formats import EventEncoder
from trigate.dialects.memory import (
    AnswerMemory,
    Remembered,
    calls_without_reasoning,
    latest_calls,
    memory_of,
    with_reasoning,
)
from trigate.dialects.openai_chat import ChatUpstream
from trigate.dialects.translated_call import Memory, TranslatedCall
from trigate.dialects.vocabulary import (
    Answer,
    Event,
    Finish,
    Message,
    PartStop,
    Payload,
    Reasoning,
    ReasoningDelta,
    ReasoningStart,
    Request,
    Start,
    Text,
    TextDelta,
    TextStart,
    ToolCall,
    ToolCallStart,
    ToolResult,
)

LOCAL = UpstreamConfig(base_url=Url("http://127.0.0.1:8000/v1"))
DEEPSEEK = UpstreamConfig(base_url=Url("https://api.deepseek.com/v1"))
END = Finish("tool_calls", None, None)
SIGNED = Reasoning("hm", {"anthropic": "sig"})
PARTS = (SIGNED, Text("I call two."), ToolCall("a", "f", "{}"), ToolCall("b", "g", "{}", {"gemini": "s2"}))
EVENTS: tuple[Event, ...] = (
    Start("1"),
    ReasoningStart(),
    ReasoningDelta("h"),
    ReasoningDelta("m"),
    Payload("anthropic", "sig"),
    PartStop(),
    TextStart(),
    TextDelta("I call two."),
    PartStop(),
    ToolCallStart("a", "f"),
    PartStop(),
    ToolCallStart("b", "g"),
    Payload("gemini", "s2"),
    PartStop(),
    END,
)
FOUND = {"a": Remembered((SIGNED,)), "b": Remembered((), {"gemini": "s2"}, is_first=False)}


class _Encoder:
    def encode(self, event: Event) -> bytes:
        return type(event).__name__.encode() + b"\n"


def collected(events: tuple[Event, ...], *, max_bytes: int = 1000) -> Mapping[str, Remembered]:
    """What is to be remembered of a stream."""
    kept: list[Mapping[str, Remembered]] = []
    encoder: EventEncoder = _Encoder()
    memory = AnswerMemory(encoder, marks=None, keep=kept.append, max_bytes=max_bytes)
    assert b"".join(map(memory.encode, events)) == b"".join(map(encoder.encode, events))
    return kept[0] if kept else {}


def request_of(*parts: Any, before: tuple[Message, ...] = ()) -> Request:
    """A conversation with an answer and the results of its calls."""
    calls = [part.id for part in parts if isinstance(part, ToolCall)]
    results = tuple(ToolResult(each, (Text("ok"),)) for each in calls)
    turns = (Message("user", (Text("q"),)), Message("assistant", tuple(parts)), Message("user", results))
    return Request(messages=(*before, *turns))


def test_what_is_remembered() -> None:
    """Each call has the reasoning since the one before it, and its own payloads; streamed or not."""
    assert collected(EVENTS) == memory_of(Answer("1", PARTS, END), max_bytes=1000) == FOUND


def test_what_is_not() -> None:
    """An answer without calls, without reasoning, or with more than allowed."""
    assert collected((*EVENTS[:9], END)) == memory_of(Answer("1", PARTS[:2], END), max_bytes=1000) == {}
    assert collected((EVENTS[0], *EVENTS[9:11], END)) == memory_of(Answer("1", PARTS[2:3], END), max_bytes=1000) == {}
    assert collected(EVENTS, max_bytes=3) == memory_of(Answer("1", PARTS, END), max_bytes=3) == {}


def test_a_value_comes_back_from_json() -> None:
    """The store keeps it as JSON."""
    for each in FOUND.values():
        assert msgspec.json.decode(msgspec.json.encode(each), type=Remembered) == each


def test_it_is_put_back() -> None:
    """Reasoning comes before everything else of its answer; payloads go to their call."""
    request = request_of(*PARTS[1:3], ToolCall("b", "g", "{}"))
    assert calls_without_reasoning(request, "anthropic") == ("a", "b")
    restored = with_reasoning(request, FOUND, "anthropic")
    assert restored.messages[1].parts[0] == SIGNED
    assert with_reasoning(request, FOUND, "gemini").messages[1].parts[-1] == PARTS[-1]
    assert with_reasoning(request, FOUND, None).messages[1].parts[:2] == (SIGNED, Text("I call two."))


def test_later_reasoning_stays_before_its_call() -> None:
    """An answer may think between two calls."""
    found = {"a": Remembered((SIGNED,)), "b": Remembered((Reasoning("2", {"anthropic": "s"}),), {}, is_first=False)}
    parts = (Text("t"), ToolCall("a", "f", "{}"), ToolCall("b", "g", "{}"))
    restored = with_reasoning(request_of(*parts), found, "anthropic").messages[1].parts
    assert restored == (SIGNED, Text("t"), parts[1], Reasoning("2", {"anthropic": "s"}), parts[2])


@pytest.mark.parametrize("payload", [None, "anthropic"])
def test_what_the_client_kept_is_left_alone(payload: str | None) -> None:
    """Nothing is looked up for it."""
    assert calls_without_reasoning(request_of(*PARTS), payload) == ()
    redacted = (Reasoning("", {"anthropic_redacted": "x"}), PARTS[2])
    assert calls_without_reasoning(request_of(*redacted), payload) == ()


def test_a_text_without_its_signature_is_replaced() -> None:
    """The client kept the text; a provider that signs needs both, any other one the text."""
    request = request_of(Reasoning("hm"), *PARTS[1:])
    assert calls_without_reasoning(request, None) == ()
    assert calls_without_reasoning(request, "anthropic") == ("a", "b")
    assert with_reasoning(request, FOUND, "anthropic").messages[1].parts[0] == SIGNED
    foreign = {"a": Remembered((Reasoning("of another provider"),))}
    assert with_reasoning(request, foreign, "anthropic") is request


def test_an_id_that_repeats() -> None:
    """It stands for neither call; the others are not affected."""
    again = Message("assistant", (ToolCall("a", "f", "{}"),))
    request = request_of(*PARTS[2:], before=(again,))
    assert calls_without_reasoning(request, None) == ("b",)
    assert latest_calls(request) == {"a", "b"}


def test_deepseek_gets_an_empty_text() -> None:
    """It refuses a tool call without reasoning, also if nobody knows it any more."""
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": "ok"}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    asked = call(messages=turns)
    made = TranslatedCall(asked, MessagesClient(), ChatUpstream(), has_marks=True)
    made.use(Memory(marks=MARKS))
    for upstream, expected in ((DEEPSEEK, ""), (LOCAL, None)):
        sent = msgspec.json.decode(made.body(asked, "m", upstream))["messages"][1]
        assert sent.get("reasoning_content") == expected
    made.use(Memory(marks=MARKS, found={"a": Remembered((Reasoning("hm"),))}))
    assert msgspec.json.decode(made.body(asked, "m", DEEPSEEK))["messages"][1]["reasoning_content"] == "hm"


def test_hidden_reasoning_is_remembered() -> None:
    """A client that did not ask for reasoning gets none, and its next call has it all the same."""
    kept: list[Mapping[str, Remembered]] = []
    asked = call(thinking=None)
    made = TranslatedCall(asked, MessagesClient(), ChatUpstream(), has_marks=True)
    made.use(Memory(marks=MARKS, keep=kept.append, max_bytes=1000))
    reader = made.stream_reader(asked, upstream="up", max_event_bytes=10_000, keep_bytes=0, continues=None)
    events = (chunk({"reasoning_content": "hm"}), tool(0, "f", "{}", "a"), chunk({}, "tool_calls"), usage())
    data = b"".join(map(reader.feed, (*events, b"data: [DONE]\n\n")))
    assert b"thinking_delta" not in data
    assert kept == [{"a": Remembered((Reasoning("hm"),))}]
