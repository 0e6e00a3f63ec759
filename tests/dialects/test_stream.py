"""Streams of chat completions in Anthropic's format: their blocks, their ends, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.dialects.chat import (
    COUNTED,
    DONE,
    answer_of,
    call,
    chunk,
    decoded,
    make_reader,
    mark_of,
    message_of,
    tool,
    translate,
    usage,
)
from trigate.dialects.errors import error_frame
from trigate.errors import Draining, GatewayError, ProtocolViolation, Reported, Truncated, UpstreamTimeout
from trigate.openai.answer import Usage

END = (chunk({}, "stop"), usage(), DONE)
TEXT = (chunk({"role": "assistant", "content": ""}), chunk({"content": "Hel"}), chunk({"content": "lo"}), *END)
EVERYTHING = (
    chunk({"role": "assistant", "reasoning_content": "Let me "}),
    chunk({"reasoning_content": "think."}),
    chunk({"content": "I call "}),
    chunk({"content": "two."}),
    tool(0, "f", "", "call_a"),
    tool(0, arguments='{"x":'),
    tool(0, arguments=" [1]}"),
    tool(1, "g", "{}", "call_b"),
    chunk({}, "tool_calls"),
    usage(),
    DONE,
)
EVERYTHING_CONTENT = [
    {"type": "thinking", "thinking": "Let me think.", "signature": mark_of("Let me think.")},
    {"type": "text", "text": "I call two."},
    {"type": "tool_use", "id": "call_a", "name": "f", "input": {"x": [1]}},
    {"type": "tool_use", "id": "call_b", "name": "g", "input": {}},
]


def test_the_events_of_a_text() -> None:
    """The events are exactly these, in this order."""
    out, reader = translate(TEXT)
    assert reader.complete
    assert reader.usage == Usage(100, 20, 60, 10, 5)
    start, *rest = decoded(out)
    zero = {key: 0 for key in COUNTED if key.endswith("tokens")}
    assert start["message"] == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "up/m",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**zero, "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}},
    }
    assert rest == [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": COUNTED},
        {"type": "message_stop"},
    ]
    assert b"[DONE]" not in out


def test_reasoning_text_and_tools() -> None:
    """Blocks of every kind, one after the other; thinking ends with its mark."""
    message = message_of(translate(EVERYTHING)[0])
    assert message["content"] == EVERYTHING_CONTENT
    assert (message["stop_reason"], message["usage"]) == ("tool_use", COUNTED)


@pytest.mark.parametrize("stream", [TEXT, EVERYTHING])
def test_pieces(stream: tuple[bytes, ...]) -> None:
    """The result does not depend on how the bytes are split."""
    whole = b"".join(stream)
    expected, _ = translate([whole])
    assert translate([whole[at : at + 1] for at in range(len(whole))])[0] == expected
    for at in range(0, len(whole), 7):
        out, reader = translate([whole[:at], whole[at:]])
        assert out == expected
        assert reader.complete


def test_nothing_comes_before_the_first_content() -> None:
    """The role alone is no content: another target may still be tried."""
    reader = make_reader()
    assert reader.feed(TEXT[0]) == b""
    assert not reader.has_content
    assert reader.feed(TEXT[1]).startswith(b"event: message_start\n")


def test_bytes_after_the_end_are_ignored() -> None:
    """What follows ``[DONE]`` is not for the client."""
    out, reader = translate([*TEXT[:-1], DONE + chunk({"content": "more"})])
    assert message_of(out)["content"] == [{"type": "text", "text": "Hello"}]
    assert reader.feed(b"more") == b""


# -- what providers send ----------------------------------------------------------------------------------------------


def _content(*stream: bytes, **fields: Any) -> list[dict[str, Any]]:
    out, reader = translate(stream, call(**fields))
    assert reader.error is None
    content: list[dict[str, Any]] = message_of(out)["content"]
    return content


def test_interleaved_tool_calls_are_put_in_order() -> None:
    """Pieces of a second call that come before the end of the first one wait for it."""
    content = _content(
        tool(0, "f", '{"a"', "c0"), tool(1, "g", '{"b"', "c1"), tool(0, arguments=":1}"), tool(1, arguments=":2}"), *END
    )
    assert [(block["id"], block["input"]) for block in content] == [("c0", {"a": 1}), ("c1", {"b": 2})]


def test_text_after_a_tool_call() -> None:
    """The call's block ends before the text's begins, and the text before another call."""
    content = _content(tool(0, "f", "{}", "c0"), chunk({"content": "and"}), tool(1, "g", "{}", "c1"), *END)
    assert [block["type"] for block in content] == ["tool_use", "text", "tool_use"]


def test_a_tool_call_is_the_first_chunk() -> None:
    """The message begins before the call's block."""
    assert [block["id"] for block in _content(tool(0, "f", "{}", "c0"), *END)] == ["c0"]


@pytest.mark.parametrize("index", [0, None])
def test_calls_without_indexes_of_their_own(index: int | None) -> None:
    """Another id is another call, even under the same index or without one."""
    content = _content(tool(index, "f", "{}", "c0"), tool(index, "g", '{"x":1}', "c1"), *END)
    assert [(block["id"], block["name"]) for block in content] == [("c0", "f"), ("c1", "g")]


def test_a_call_without_an_id_gets_one() -> None:
    """It is the same one in an answer that is not streamed."""
    streamed = _content(tool(0, "f", "{}"), tool(1, "g", "{}"), *END)
    calls = [{"type": "function", "function": {"name": name, "arguments": "{}"}} for name in "fg"]
    plain = answer_of({"content": None, "tool_calls": calls})["content"]
    assert [block["id"] for block in streamed] == ["call_1_0", "call_1_1"]
    assert plain == streamed


def test_an_id_that_comes_late() -> None:
    """A block begins when id and name are known."""
    content = _content(tool(0, "f"), tool(0, call_id="c0", arguments="{}"), *END)
    assert [(block["id"], block["name"]) for block in content] == [("c0", "f")]


def test_arguments_as_an_object() -> None:
    """Some servers send the object itself."""
    piece = {"index": 0, "id": "c0", "function": {"name": "f", "arguments": {"x": 1}}}
    assert _content(chunk({"tool_calls": [piece]}), *END)[0]["input"] == {"x": 1}


def test_no_arguments() -> None:
    """A call without arguments has an empty object."""
    assert _content(tool(0, "f", call_id="c0"), *END)[0]["input"] == {}


def test_a_function_call() -> None:
    """The older form of a tool call is one, too."""
    content = _content(
        chunk({"function_call": {"name": "f"}}), chunk({"function_call": {"arguments": '{"x":1}'}}), *END
    )
    assert [(block["name"], block["input"]) for block in content] == [("f", {"x": 1})]


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning_content": "a"},
        {"reasoning": "a"},
        {"reasoning": "a", "reasoning_details": [{"type": "reasoning.text", "text": "a"}]},
        {"reasoning_details": [{"type": "reasoning.text", "text": "a"}]},
    ],
)
def test_names_of_reasoning(delta: dict[str, Any]) -> None:
    """Every provider has its own name for reasoning; under two names it comes once."""
    assert _content(chunk(delta), chunk({"content": "b"}), *END) == [
        {"type": "thinking", "thinking": "a", "signature": mark_of("a")},
        {"type": "text", "text": "b"},
    ]


def test_reasoning_that_was_not_asked_for() -> None:
    """A client that did not ask for thinking gets none, and the indexes begin at 0."""
    content = _content(chunk({"reasoning": "a"}), chunk({"content": "b"}), *END, thinking={"type": "disabled"})
    assert content == [{"type": "text", "text": "b"}]


def test_a_character_in_two_pieces() -> None:
    """Halves of a surrogate pair are joined; a half alone becomes a replacement character."""
    stream = (
        b'data: {"choices":[{"delta":{"content":"a%b"}}]}\n\n' % half for half in (b"\\ud83d", b"\\ude00", b"\\ud83d")
    )
    first, second, third = stream
    assert _content(first, second.replace(b'"a', b'"'), *END)[0]["text"] == "a\U0001f600"
    assert _content(third, *END)[0]["text"] == "a\ufffd"


def test_a_refusal() -> None:
    """Its text is the answer's, and the stop reason says what it is."""
    message = message_of(translate([chunk({"refusal": "No."}), *END])[0])
    assert (message["content"], message["stop_reason"]) == ([{"type": "text", "text": "No."}], "refusal")
    assert message["stop_details"]["type"] == "refusal"


@pytest.mark.parametrize(
    ("finish", "expected"),
    [("stop", "end_turn"), ("length", "max_tokens"), ("content_filter", "refusal"), ("eos", "end_turn")],
)
def test_stop_reasons(finish: str, expected: str) -> None:
    """Streamed or not, the same reason gives the same one."""
    streamed = message_of(translate([chunk({"content": "a"}), chunk({}, finish), usage(), DONE])[0])
    assert streamed["stop_reason"] == answer_of({"content": "a"}, finish)["stop_reason"] == expected


def test_a_stop_sequence() -> None:
    """Where the server names the stop sequence, the client learns it."""
    end = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop","stop_reason":"###"}]}\n\n'
    message = message_of(translate([chunk({"content": "a"}), end, DONE])[0])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "###")


def test_a_tool_call_with_stop() -> None:
    """Some servers say ``stop`` after tool calls."""
    assert message_of(translate([tool(0, "f", "{}", "c0"), *END])[0])["stop_reason"] == "tool_use"


def test_usage_in_every_chunk() -> None:
    """The last one counts."""
    stream = [chunk({"content": "a"}, usage={"prompt_tokens": 1, "completion_tokens": 1}), *END]
    assert message_of(translate(stream)[0])["usage"] == COUNTED


def test_no_usage() -> None:
    """Where the provider does not count, the numbers are estimates, and never 0."""
    message = message_of(translate([chunk({"content": "a" * 40}), chunk({}, "stop"), DONE])[0])
    assert message["usage"]["output_tokens"] == 11
    assert message["usage"]["input_tokens"] > 10


def test_no_done() -> None:
    """A stream that has said how it ended is complete without its last event."""
    out, reader = translate(TEXT[:-1])
    assert reader.complete
    assert message_of(out)["usage"] == COUNTED


# -- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [1, 2])
def test_a_last_event_without_its_blank_line(last: int) -> None:
    """It is whole: the reason of the end, or the usage behind it."""
    before, event = (*TEXT[:3], *END[: last - 1]), END[last - 1]
    expected, _ = translate([*before, event])
    out, reader = translate([*before, event.rstrip(b"\n")])
    assert out == expected
    assert reader.complete
    assert isinstance(translate([*before, event[:-5]])[1].error, Truncated)


@pytest.mark.parametrize(
    ("stream", "kind"),
    [
        (TEXT[:3], Truncated),
        (EVERYTHING[:6], Truncated),
        ((*TEXT[:3], b"data: [DONE]\n\n"), Truncated),
        ((*TEXT[:3], b'data: {"error":{"message":"m","type":"overloaded_error"}}\n\n'), Reported),
        ((*TEXT[:3], b"event: error\ndata: m\n\n"), Reported),
        ((*TEXT[:3], b"data: 7\n\n"), ProtocolViolation),
        ((*TEXT[:3], b"data: {nonsense\n\n"), ProtocolViolation),
        ((tool(0, "f", '{"x":', "c0"), *END), ProtocolViolation),
        ((tool(0, "f", '"x"', "c0"), *END), ProtocolViolation),
        ((tool(0, None, "{}", "c0"), *END), ProtocolViolation),
        ((tool(0, "f", "{}", "c0"), tool(1, "g", "{}", "c1"), tool(0, None, "{}"), *END), ProtocolViolation),
        ((*TEXT[:3], chunk({}, "error"), DONE), ProtocolViolation),
        ((*TEXT[:3], b"data: " + b"x" * 200_000), ProtocolViolation),
    ],
)
def test_never_complete(stream: tuple[bytes, ...], kind: type[Exception]) -> None:
    """A stream that is cut, reports an error or makes no sense never ends as a complete one."""
    out, reader = translate(stream)
    assert type(reader.error) is kind
    assert not reader.complete
    assert b"message_stop" not in out
    assert b"message_delta" not in out


def test_too_much_without_content() -> None:
    """What comes before the first content is bounded."""
    _, reader = translate([chunk({"role": "assistant"}, padding="x" * 60_000)] * 2)
    assert isinstance(reader.error, ProtocolViolation)


def test_a_call_that_is_cut_off_by_the_limit() -> None:
    """With ``length`` the stream ends properly, and the plain answer has only whole calls."""
    end = (chunk({}, "length"), usage(), DONE)
    out, reader = translate([tool(0, "f", '{"x":', "c0"), *end])
    assert reader.complete
    assert decoded(out)[-2]["delta"]["stop_reason"] == "max_tokens"
    function = {"name": "f", "arguments": '{"x":'}
    plain = answer_of({"content": "a", "tool_calls": [{"id": "c0", "function": function}]}, "length")
    assert (plain["content"], plain["stop_reason"]) == ([{"type": "text", "text": "a"}], "max_tokens")


# -- properties -------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
CALLS = st.fixed_dictionaries({"name": st.sampled_from("fgh"), "input": st.dictionaries(TEXTS, st.integers(-9, 9))})


@given(reasoning=TEXTS | st.none(), text=TEXTS | st.none(), calls=st.lists(CALLS, max_size=3), data=st.data())
def test_a_stream_is_its_plain_answer(
    reasoning: str | None, text: str | None, calls: list[dict[str, Any]], data: st.DataObject
) -> None:
    """An answer is the same message, whether it comes whole or in any pieces."""
    arguments = [msgspec.json.encode(each["input"]).decode() for each in calls]
    tools = [
        {"id": f"c{at}", "type": "function", "function": {"name": each["name"], "arguments": arguments[at]}}
        for at, each in enumerate(calls)
    ]
    plain = answer_of({"content": text, "reasoning_content": reasoning, "tool_calls": tools or None})

    def pieces(whole: str) -> list[str]:
        at = data.draw(st.integers(0, len(whole)))
        return [part for part in (whole[:at], whole[at:]) if part]

    stream = [chunk({"reasoning_content": piece}) for piece in pieces(reasoning or "")]
    stream += [chunk({"content": piece}) for piece in pieces(text or "")]
    rest = [
        [tool(at, each["name"], "", f"c{at}"), *(tool(at, arguments=piece) for piece in pieces(arguments[at]))]
        for at, each in enumerate(calls)
    ]
    while any(rest):  # the pieces of the calls, interleaved; each call begins after the one before it
        at = data.draw(
            st.sampled_from([at for at, each in enumerate(rest) if each and all(map(_has_begun, rest[:at]))])
        )
        stream.append(rest[at].pop(0))
    out, reader = translate([*stream, *END])
    assert reader.error is None
    assert message_of(out) == plain


def _has_begun(pieces: list[bytes]) -> bool:
    return not pieces or b'"id":"c' not in pieces[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | TEXTS | st.sampled_from(["stop", "text", "{}", "c0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("choices", "delta", "content", "tool_calls", "function", "name", "arguments", "index", "id"),
                    *("finish_reason", "usage", "reasoning", "reasoning_details", "type", "text", "function_call"),
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@example([{"choices": [{"finish_reason": True}]}])
@given(
    st.lists(st.fixed_dictionaries({"choices": st.lists(st.fixed_dictionaries({"delta": JSON}))}) | JSON, max_size=6)
)
def test_fuzzed_events(values: list[Any]) -> None:
    """No stream of any events crashes the reader, and without its end none is complete."""
    stream = [b"data: " + msgspec.json.encode(value) + b"\n\n" for value in values]
    out, reader = translate(stream)
    if not reader.complete:
        assert b"message_stop" not in out
        assert reader.error is not None
    else:
        assert any(b'"finish_reason":"' in piece for piece in stream)
    translate([*stream, *END])


# -- how a stream that fails ends -------------------------------------------------------------------------------------


def failed(pieces: Iterable[bytes], error: GatewayError, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream that fails behind these pieces."""
    reader = make_reader(call(**fields))
    data = b"".join([reader.feed(piece) for piece in pieces])
    frame = reader.error_frame(error, "req_1")
    return decoded(data + (error_frame(error, "anthropic", "req_1") if frame is None else frame))


CUT = Truncated("cut")
TOLD = Reported("died", error={"type": "overloaded_error", "message": "died"}, status=503)


@pytest.mark.parametrize("error", [CUT, TOLD, UpstreamTimeout("slow", phase="idle")])
def test_a_text_ends_before_the_error(error: GatewayError) -> None:
    """Within an open block, Claude Code would make the whole call again; and after some types of errors."""
    *_, stop, told = failed([chunk({"content": "Hel"})], error)
    assert stop == {"type": "content_block_stop", "index": 0}
    assert told["error"] == {"type": "upstream_error", "message": error.message}
    assert told["request_id"] == "req_1"


def test_reasoning_ends_with_its_mark() -> None:
    """The client may send what it has of it."""
    *_, signed, stop, told = failed([chunk({"reasoning_content": "Let"}), chunk({"reasoning_content": " me"})], CUT)
    assert signed["delta"] == {"type": "signature_delta", "signature": mark_of("Let me")}
    assert (stop["type"], told["type"]) == ("content_block_stop", "error")


def test_a_tool_call_does_not_end() -> None:
    """It would look complete, and be executed."""
    events = failed([chunk({"content": "a"}), tool(0, "f", '{"path": "/', "call_a")], CUT)
    assert [event["type"] for event in events[-3:]] == ["content_block_start", "content_block_delta", "error"]
    assert events[-1]["error"]["type"] == "upstream_error"


def test_hidden_reasoning_has_no_end() -> None:
    """The client has seen no block."""
    events = failed([chunk({"reasoning_content": "Let"})], CUT, thinking=None)
    assert [event["type"] for event in events] == ["message_start", "error"]


def test_another_instance_may_answer() -> None:
    """A gateway that shuts down leaves the block open: the client is to make the call again."""
    events = failed([chunk({"content": "Hel"})], Draining("later"))
    assert [event["type"] for event in events[-2:]] == ["content_block_delta", "error"]
    assert events[-1]["error"]["type"] == "overloaded_error"


def test_a_request_that_is_too_long() -> None:
    """Its words are the same within a stream."""
    error = Reported("prompt is too long: 9 tokens > 8 maximum", error={}, status=400)
    assert failed([chunk({"content": "a"})], error)[-1]["error"] == {
        "type": "invalid_request_error",
        "message": "prompt is too long: 9 tokens > 8 maximum",
    }
