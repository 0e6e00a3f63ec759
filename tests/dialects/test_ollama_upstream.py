"""Ollama's ``/api/chat``, as the format of upstreams."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trigate.config.sections import UpstreamConfig
from trigate.dialects.endpoints import OLLAMA_CHAT
from trigate.dialects.ollama import OllamaRelay, OllamaUpstream
from trigate.dialects.ollama.upstream_answer import LineSplitter
from trigate.dialects.stream import TranslatedStream
from trigate.dialects.vocabulary import (
    Audio,
    Effort,
    Event,
    File,
    Finish,
    Image,
    Message,
    Reasoning,
    Request,
    Text,
    TokenCounts,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
)
from trigate.errors import BadRequest, GatewayError, ProtocolViolation, Reported, Untranslatable
from trigate.openai.request import decode_call
from trigate.openai.sse import EventTooLarge

HELLO = (Message("user", (Text("Hello"),)),)


def sent(request: Request, model: str = "qwen3") -> tuple[Any, tuple[str, ...]]:
    """What an Ollama server gets."""
    body, dropped = OllamaUpstream().encode_request(request, model=model, upstream=UpstreamConfig())
    return json.loads(body), dropped


def line(message: dict[str, Any] | None = None, *, done: bool = False, **fields: Any) -> bytes:
    """A line of a stream."""
    return msgspec.json.encode({"model": "m", "message": message or {"content": ""}, "done": done, **fields}) + b"\n"


class Recorder:
    """An encoder that keeps the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def encode(self, event: Event) -> bytes:
        self.events.append(event)
        return b"x"


def read(*pieces: bytes) -> tuple[list[Event], TranslatedStream]:
    """Reads a stream."""
    recorder = Recorder()
    parts = OllamaUpstream().stream_parts(upstream="up", max_event_bytes=10_000)
    reader = TranslatedStream(parts, recorder, upstream="up", max_event_bytes=10_000)
    for piece in pieces:
        reader.feed(piece)
        if reader.error is not None:
            return recorder.events, reader
    reader.feed_end()
    return recorder.events, reader


def test_a_request() -> None:
    """Everything has its place; a stream is asked for, or not, by name, since Ollama's default is another one."""
    messages = (
        Message("system", (Text("Be brief."),)),
        Message("user", (Text("What?"), Image("data:image/png;base64,AAAA"))),
        Message(
            "assistant", (Reasoning("Hm."), Text("So"), ToolCall("c1", "f", '{"x": 1.0}'), ToolCall("c2", "g", "{}"))
        ),
        Message("user", (ToolResult("c2", (Text("two"),), is_error=True), ToolResult("c1", (Text("one"),)), Text("?"))),
    )
    request = Request(
        messages=messages, max_tokens=9, stop=("END",), seed=7, tools=(Tool("f", None, {"type": "object"}),), user="u"
    )
    body, dropped = sent(request)
    calls = [
        {"id": "c1", "function": {"name": "f", "arguments": {"x": 1.0}}},
        {"id": "c2", "function": {"name": "g", "arguments": {}}},
    ]
    assert body == {
        "model": "qwen3",
        "stream": False,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What?", "images": ["AAAA"]},
            {"role": "assistant", "content": "So", "thinking": "Hm.", "tool_calls": calls},
            {"role": "tool", "tool_name": "g", "tool_call_id": "c2", "content": "[The tool failed] two"},
            {"role": "tool", "tool_name": "f", "tool_call_id": "c1", "content": "one"},
            {"role": "user", "content": "?"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}],
        "options": {"num_predict": 9, "stop": ["END"], "seed": 7},
    }
    assert dropped == ("user",)


@pytest.mark.parametrize(
    ("effort", "plain", "level"),
    [("none", False, "low"), ("minimal", True, "low"), ("medium", True, "medium"), ("max", True, "high")],
)
def test_effort(effort: Effort, plain: bool, level: str) -> None:
    """Only gpt-oss has levels, and it cannot be kept from thinking."""
    assert sent(Request(messages=HELLO, effort=effort))[0]["think"] is plain
    assert sent(Request(messages=HELLO, effort=effort), "gpt-oss:20b")[0]["think"] == level
    assert "think" not in sent(Request(messages=HELLO))[0]


def test_formats_and_tools() -> None:
    """JSON of any shape, a schema; and no tools, if none may be called."""
    assert sent(Request(messages=HELLO, is_json=True))[0]["format"] == "json"
    assert sent(Request(messages=HELLO, schema={"type": "object"}))[0]["format"] == {"type": "object"}
    tools = (Tool("f", "d", {}),)
    body, dropped = sent(
        Request(messages=HELLO, tools=tools, tool_choice=ToolChoice("none"), parallel_tool_calls=False)
    )
    assert "tools" not in body
    assert dropped == ("parallel_tool_calls",)


@pytest.mark.parametrize(
    "request_",
    [
        Request(messages=HELLO, tool_choice=ToolChoice("required")),
        Request(messages=(Message("user", (Image("https://example.com/a.png"),)),)),
        Request(messages=(Message("user", (Audio("AAAA", "wav"),)),)),
        Request(messages=(Message("user", (File("a.pdf", "data:application/pdf;base64,AAAA"),)),)),
    ],
)
def test_what_cannot_be_expressed(request_: Request) -> None:
    """It is refused by name."""
    with pytest.raises(Untranslatable) as caught:
        sent(request_)
    assert caught.value.param in ("tool_choice", "messages")


def test_a_result_of_no_call() -> None:
    """It has no name, and so no place."""
    with pytest.raises(BadRequest):
        sent(Request(messages=(Message("user", (ToolResult("c9", (), path="messages[0]"),)),)))


THINK = line({"content": "", "thinking": "Hm."})
TEXT = line({"content": "So:"})
CALLS = line({"content": "", "tool_calls": [{"function": {"name": name, "arguments": {"x": [1]}}} for name in "fg"]})
END = line(done=True, done_reason="stop", prompt_eval_count=5, eval_count=2)


def test_the_events_of_a_stream() -> None:
    """Parts do not overlap, and each call has an id of its own."""
    events, reader = read(THINK, TEXT, TEXT, CALLS, END)
    assert reader.complete
    assert [type(event).__name__ for event in events] == [
        *("Start", "ReasoningStart", "ReasoningDelta", "PartStop", "TextStart", "TextDelta", "TextDelta", "PartStop"),
        *("ToolCallStart", "ArgumentsDelta", "PartStop", "ToolCallStart", "ArgumentsDelta", "PartStop", "Finish"),
    ]
    assert events[-1] == Finish("tool_calls", None, TokenCounts(input=5, output=2))
    ids = {event.id for event in events if hasattr(event, "id")}
    assert len(ids) == 3


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_every_split_gives_the_same(size: int) -> None:
    """However the bytes arrive, and also without the last line's end."""
    body = b"".join((THINK, TEXT, b"\r\n", CALLS, END))
    for whole in (body, body.rstrip(b"\n")):
        events, reader = read(*(whole[at : at + size] for at in range(0, len(whole), size)))
        assert reader.complete
        assert events == read(body)[0]


@pytest.mark.parametrize(
    "pieces",
    [
        (TEXT,),
        (TEXT, END[:-9]),
        (TEXT, b"no json\n"),
        (TEXT, b"[1]\n"),
        (TEXT, b'{"error":"it burns"}\n'),
        (line({"tool_calls": [{"function": {"name": "f", "arguments": "no json"}}]}), END),
        (line({"tool_calls": [{"function": {}}]}), END),
        (b"x" * 20_000, END),
    ],
)
def test_streams_that_fail(pieces: tuple[bytes, ...]) -> None:
    """None of them ends as complete."""
    events, reader = read(*pieces)
    assert isinstance(reader.error, GatewayError)
    assert not any(isinstance(event, Finish) for event in events)


@settings(max_examples=40)
@given(
    st.lists(
        st.sampled_from([THINK, TEXT, CALLS, b"\n", b"{}\n", b"null\n", b'{"message":1}\n', b"\xff\n"]), max_size=6
    )
)
def test_a_stream_without_an_end_is_never_complete(pieces: list[bytes]) -> None:
    """Whatever it consists of; a relayed one neither."""
    _, reader = read(*pieces)
    assert not reader.complete
    assert reader.error is not None
    call = decode_call(OLLAMA_CHAT, b'{"model":"m","messages":[{"role":"user"}]}')
    relay = OllamaRelay().stream_reader(call, upstream="up", max_event_bytes=1000, keep_bytes=0, continues=None)
    for piece in pieces:
        relay.feed(piece)
        if relay.error is not None:
            break
    relay.feed_end()
    assert not relay.complete
    assert relay.error is not None


def test_a_plain_answer_is_the_same() -> None:
    """As its stream, also if the server streams where it was not asked to."""
    message = {"content": "So:", "thinking": "Hm.", "tool_calls": [{"id": "i", "function": {"name": "f"}}]}
    body = line(message, done=True, done_reason="length", prompt_eval_count=5, eval_count=2)
    for given_ in (
        body,
        line({"content": "So:", "thinking": "Hm."})
        + line({**message, "content": "", "thinking": ""}, done=True, done_reason="length"),
    ):
        answer, _ = OllamaUpstream().decode_answer(given_, upstream="up")
        assert answer.parts == (Reasoning("Hm."), Text("So:"), ToolCall("i", "f", "{}"))
        assert answer.finish.reason == "length"
    whole = OllamaUpstream().events(body, upstream="up")
    events, reader = read(whole)
    assert reader.complete
    assert isinstance(events[-1], Finish)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"message":{"content":"a"},"done":false}', b"no json"])
def test_answers_that_are_none(body: bytes) -> None:
    """They are errors."""
    with pytest.raises(ProtocolViolation):
        OllamaUpstream().decode_answer(body, upstream="up")


def test_an_error_in_place_of_an_answer() -> None:
    """It is told as one."""
    with pytest.raises(Reported, match="it burns"):
        OllamaUpstream().decode_answer(b'{"error":"it burns"}', upstream="up")


def test_lines_that_are_too_long() -> None:
    """Those before it are kept."""
    splitter = LineSplitter(max_event_bytes=10)
    with pytest.raises(EventTooLarge) as caught:
        splitter.feed(b"{}\n" + b"x" * 11)
    assert caught.value.before == [b"data: {}\n\n"]
