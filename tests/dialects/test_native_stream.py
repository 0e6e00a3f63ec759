"""Streams and answers of Anthropic's, translated to chat completions."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.dialects.native import (
    COUNTED,
    PING,
    START,
    STOP,
    answer_of,
    block,
    call,
    completion_of,
    end,
    message_of,
    named,
    text,
    thinking,
    tool,
    translate,
    translated,
)
from trigate.dialects.openai_chat.client_events import ChatEventEncoder
from trigate.dialects.vocabulary import (
    ArgumentsDelta,
    Event,
    Finish,
    PartStop,
    Payload,
    Start,
    TokenCounts,
    ToolCallStart,
)
from trigate.errors import ProtocolViolation, Reported, Truncated
from trigate.openai.answer import Usage

TEXT = [START, PING, *text(0, "Hel", "lo"), *end()]
EVERYTHING = [
    START,
    *thinking(0, "h", "m"),
    *block(1, "redacted_thinking", data="encrypted:1"),
    *text(2, "He said: ", '"é🌍\u2028"'),
    *tool(3, '{"a":', ' "b"}', call_id="toolu_1"),
    *tool(4, call_id="toolu_2", name="g"),
    *end("tool_use"),
]
DETAILS = [
    {"type": "reasoning.text", "text": "hm", "signature": "sig", "format": "anthropic-claude-v1", "index": 0},
    {"type": "reasoning.encrypted", "data": "encrypted:1", "format": "anthropic-claude-v1", "index": 1},
]
MESSAGE = {
    "role": "assistant",
    "content": 'He said: "é🌍\u2028"',
    "refusal": None,
    "reasoning_content": "hm",
    "reasoning_details": DETAILS,
    "tool_calls": [
        {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}},
        {"id": "toolu_2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ],
}


def test_a_text() -> None:
    """The chunks are those of OpenAI, to the byte."""
    out, reader = translate(TEXT)
    head = '{"id":"chatcmpl-7","object":"chat.completion.chunk","created":1700000000,"model":"up/m","choices":['

    def chunk(delta: str, reason: str = "null") -> str:
        return f'data: {head}{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}}}],"usage":null}}\n\n'

    usage = msgspec.json.encode(COUNTED).decode()
    assert out.decode() == (
        chunk('{"role":"assistant","content":""}')
        + chunk('{"content":"Hel"}')
        + chunk('{"content":"lo"}')
        + chunk("{}", '"stop"')
        + f'data: {head}],"usage":{usage}}}\n\n'
        + "data: [DONE]\n\n"
    )
    assert reader.complete
    assert reader.usage == Usage(100, 20, 60, 10, 5)
    plain, _ = translate(TEXT, stream_options=None)
    assert b"usage" not in plain
    assert message_of(plain)["content"] == "Hello"


def test_everything() -> None:
    """Parallel calls keep their ids, and get an index each; the text of the reasoning comes with its signature."""
    completion = completion_of(translate(EVERYTHING)[0])
    assert completion["choices"][0] == {
        "index": 0,
        "message": MESSAGE,
        "logprobs": None,
        "finish_reason": "tool_calls",
    }
    assert completion["usage"] == COUNTED


def test_the_same_answer_plain() -> None:
    plain = answer_of(
        {"type": "thinking", "thinking": "hm", "signature": "sig"},
        {"type": "redacted_thinking", "data": "encrypted:1"},
        {"type": "text", "text": "He said: "},
        {"type": "text", "text": '"é🌍\u2028"'},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": "b"}},
        {"type": "tool_use", "id": "toolu_2", "name": "g", "input": {}},
        reason="tool_use",
    )
    streamed = completion_of(translate(EVERYTHING)[0])
    streamed["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] = '{"a":"b"}'
    assert plain == streamed


@pytest.mark.parametrize("stream", [TEXT, EVERYTHING])
def test_split_anywhere(stream: list[bytes]) -> None:
    """A stream gives the same, in whatever pieces it comes."""
    whole = b"".join(stream)
    expected, _ = translate([whole])
    assert translate(whole[at : at + 1] for at in range(len(whole)))[0] == expected
    for at in range(0, len(whole), 11):
        assert translate([whole[:at], whole[at:]])[0] == expected
    crlf = [piece.replace(b"\n", b"\r\n") for piece in stream]
    assert translate(crlf)[0] == expected


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("pause_turn", "length"),
        ("refusal", "content_filter"),
        ("brand_new", "stop"),
    ],
)
def test_finish_reasons(reason: str, expected: str) -> None:
    """They are the same in a stream and in a plain answer."""
    out, _ = translate([START, *text(0, "a"), *end(reason)])
    assert completion_of(out)["choices"][0]["finish_reason"] == expected
    assert answer_of({"type": "text", "text": "a"}, reason=reason)["choices"][0]["finish_reason"] == expected


def test_the_reason_is_that_of_the_calls() -> None:
    """Some servers end calls as a text, or name calls that are not for the client."""
    for reason in ("end_turn", "tool_use"):
        out, _ = translate([START, *tool(0, "{}"), *end(reason)])
        assert completion_of(out)["choices"][0]["finish_reason"] == "tool_calls"
        called = answer_of({"type": "tool_use", "id": "t", "name": "f", "input": {}}, reason=reason)
        assert called["choices"][0]["finish_reason"] == "tool_calls"
        out, _ = translate([START, *text(0, "a"), *end(reason)])
        assert completion_of(out)["choices"][0]["finish_reason"] == "stop"
        assert answer_of({"type": "text", "text": "a"}, reason=reason)["choices"][0]["finish_reason"] == "stop"


def test_a_tool_alone() -> None:
    """There is no empty text before it, and its content is null."""
    out, _ = translate([START, *tool(0, "{}"), *end("tool_use")])
    assert message_of(out)["content"] is None
    assert message_of(out)["tool_calls"][0]["function"]["arguments"] == "{}"


def test_an_empty_answer() -> None:
    assert message_of(translate([START, *end()])[0])["content"] == ""
    assert answer_of()["choices"][0]["message"]["content"] == ""


def test_legacy_functions() -> None:
    """Who asked with functions gets a function call."""
    functions = [{"name": "f"}]
    out, _ = translate(
        [START, *tool(0, '{"a":', "1}"), *tool(1, "{}", call_id="t2"), *end("tool_use")], functions=functions
    )
    choice = completion_of(out)["choices"][0]
    assert (choice["message"]["function_call"], choice["finish_reason"]) == (
        {"name": "f", "arguments": '{"a":1}'},
        "function_call",
    )
    plain = answer_of(
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}, reason="tool_use", functions=functions
    )
    assert plain["choices"][0]["message"]["function_call"] == {"name": "f", "arguments": '{"a":1}'}
    assert plain["choices"][0]["finish_reason"] == "function_call"


@pytest.mark.parametrize(
    ("start", "last", "expected"),
    [
        ({"input_tokens": 9}, {"output_tokens": 5}, (9, 0, 0, 5)),
        ({"input_tokens": 9, "cache_read_input_tokens": 4}, {"input_tokens": 0, "output_tokens": 5}, (13, 4, 0, 5)),
        ({"input_tokens": 0}, {"input_tokens": 9, "cache_creation_input_tokens": 2, "output_tokens": 5}, (11, 0, 2, 5)),
        ({"input_tokens": 1, "output_tokens": 1}, {"input_tokens": 9, "output_tokens": 5}, (9, 0, 0, 5)),
    ],
)
def test_usage(start: dict[str, int], last: dict[str, Any], expected: tuple[int, ...]) -> None:
    """The counts of the last event are those of the whole; what it lacks is in the first one."""
    first = named("message_start", message={"id": "msg_1", "usage": start})
    out, reader = translate([first, *text(0, "a"), *end(**last)])
    usage = completion_of(out)["usage"]
    details = usage["prompt_tokens_details"]
    assert (
        usage["prompt_tokens"],
        details["cached_tokens"],
        details["cache_write_tokens"],
        usage["completion_tokens"],
    ) == expected
    assert reader.usage is not None
    assert (reader.usage.prompt_tokens, reader.usage.completion_tokens) == (expected[0], 5)


def test_no_usage() -> None:
    """Where the provider does not count, the numbers are estimates, and never 0."""
    stream = [
        named("message_start", message={"id": "msg_1"}),
        *text(0, "a" * 40),
        named("message_delta", delta={"stop_reason": "end_turn"}),
        STOP,
    ]
    usage = completion_of(translate(stream)[0])["usage"]
    assert usage["completion_tokens"] == 11
    assert usage["prompt_tokens"] > 10


@pytest.mark.parametrize(
    "stream",
    [
        [START, named("brand_new", index=0), b": comment\n\n", b"data: null\n\n", *TEXT[1:]],
        [*TEXT[1:3], START, *TEXT[3:]],
        [START, *block(0, "server_tool_use", {"type": "input_json_delta", "partial_json": "{}"}), *TEXT[2:]],
        [START, *block(0, "web_search_tool_result", content=[]), *TEXT[2:]],
        [
            *TEXT[:5],
            named("content_block_delta", index=0, delta={"type": "citations_delta", "citation": {}}),
            *TEXT[5:],
        ],
        [*TEXT[:5], *TEXT[6:]],  # no content_block_stop
        [*TEXT[:6], TEXT[5], *TEXT[6:]],  # two of them
        [*TEXT[:-1], STOP.rstrip(b"\n")],
    ],
)
def test_what_is_tolerated(stream: list[bytes]) -> None:
    """Events that say nothing, or are not for the client, and servers that are careless with blocks."""
    out, reader = translate(stream)
    assert reader.complete
    assert message_of(out)["content"] == "Hello"
    assert "tool_calls" not in message_of(out)


def test_blocks_with_one_index() -> None:
    """Each new block is another one, whatever its index."""
    out, _ = translate([START, *tool(0, "{}", call_id="a"), *tool(0, '{"x":1}', call_id="b")[:-1], *end("tool_use")])
    calls = message_of(out)["tool_calls"]
    assert [(each["id"], each["function"]["arguments"]) for each in calls] == [("a", "{}"), ("b", '{"x":1}')]


def test_blocks_that_are_whole_at_their_start() -> None:
    """Some servers send no deltas for what they already have."""
    blocks = [
        *block(0, "thinking", thinking="hm", signature="sig"),
        *block(1, "text", text="a"),
        *block(2, "tool_use", id="t", name="f", input={"x": 1}),
    ]
    message = message_of(translate([START, *blocks, *end("tool_use")])[0])
    assert (message["reasoning_content"], message["content"]) == ("hm", "a")
    assert message["reasoning_details"][0]["signature"] == "sig"
    assert message["tool_calls"][0]["function"]["arguments"] == '{"x":1}'


def test_calls_without_ids() -> None:
    """They get the same ids in a stream and in a plain answer."""
    streamed = message_of(
        translate([START, *tool(0, "{}", call_id=""), *tool(1, "{}", call_id=""), *end("tool_use")])[0]
    )
    plain = answer_of(*[{"type": "tool_use", "name": "f", "input": {}}] * 2, reason="tool_use")
    ids = [each["id"] for each in streamed["tool_calls"]]
    assert ids == [each["id"] for each in plain["choices"][0]["message"]["tool_calls"]]
    assert len(set(ids)) == 2


def test_half_characters() -> None:
    """A lone half of an emoji does not break the stream."""
    stream = [piece.replace(b"HALF", b"\\ud83d") for piece in text(0, "a", "HALF")]
    out, reader = translate([START, *stream, *end()])
    assert reader.complete
    assert message_of(out)["content"] == "a\ufffd"


def test_thinking_without_text() -> None:
    """A model that keeps its thinking to itself sends a signature alone: it comes back with the next request."""
    out, _ = translate([START, *thinking(0), *text(1, "a"), *end()])
    message = message_of(out)
    assert "reasoning_content" not in message
    assert message["reasoning_details"][0] == {**DETAILS[0], "text": ""}


def test_thinking_without_a_signature() -> None:
    """It is shown, but nothing goes back that Anthropic has not signed."""
    for stream in (thinking(0, "hm", signature=""), block(0, "thinking", thinking="hm")):
        message = message_of(translate([START, *stream, *text(1, "a"), *end()])[0])
        assert message["reasoning_content"] == "hm"
        assert "reasoning_details" not in message


def test_payloads_of_another_format() -> None:
    """Gemini's signature of a call goes out as in its look-alike of this format."""
    encoder = ChatEventEncoder(
        model="m",
        created=1,
        includes_usage=False,
        is_legacy=False,
        estimate=lambda size: TokenCounts(input=0, output=size),
    )
    events: list[Event] = [
        Start("1"),
        ToolCallStart("a", "f"),
        ArgumentsDelta("{}"),
        Payload("gemini", "sig"),
        PartStop(),
    ]
    out = b"".join(map(encoder.encode, [*events, Finish("tool_calls", None, None)]))
    assert b'{"arguments":""},"extra_content":{"google":{"thought_signature":"sig"}}}]}' in out


# -- the other form than was asked for --------------------------------------------------------------------------------


def test_json_for_a_stream_and_back() -> None:
    """A stream that is made of a message is the stream that its server would have sent, and collects to it."""
    asked = call(stream=True)
    translation = translated(asked)
    body = translation.collected(asked, b"".join(EVERYTHING), upstream="up")
    stream = translation.events(asked, body, upstream="up")
    again = translation.collected(asked, stream, upstream="up")
    assert msgspec.json.decode(again) == msgspec.json.decode(body)
    message = message_of(translate([stream])[0])
    message["tool_calls"][0]["function"]["arguments"] = '{"a": "b"}'
    assert message == MESSAGE
    answer, usage = translation.answer(asked, body, upstream="up")
    assert msgspec.json.decode(answer)["usage"] == COUNTED
    assert usage == Usage(100, 20, 60, 10, 5)


def test_a_stream_that_cannot_be_collected() -> None:
    asked = call()
    translation = translated(asked)
    with pytest.raises(Truncated):
        translation.collected(asked, b"".join(TEXT[:-1]), upstream="up")
    with pytest.raises(Reported):
        translation.collected(asked, b"".join([*TEXT[:3], named("error", error={"message": "m"})]), upstream="up")
    cut = [START, *text(0, "a"), *tool(1, '{"x":'), *end("max_tokens")]
    body = msgspec.json.decode(translation.collected(asked, b"".join(cut), upstream="up"))
    assert [each["type"] for each in body["content"]] == ["text"]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"[]", ProtocolViolation),
        (b'{"content":[],"stop_reason":null}', ProtocolViolation),
        (b'{"content":[{"type":"tool_use","id":"a","input":{}}],"stop_reason":"tool_use"}', ProtocolViolation),
        (
            b'{"content":[{"type":"tool_use","id":"a","name":"f","input":7}],"stop_reason":"tool_use"}',
            ProtocolViolation,
        ),
        (b'{"type":"error","error":{"type":"overloaded_error","message":"m"}}', Reported),
    ],
)
def test_answers_that_are_none(body: bytes, kind: type[Exception]) -> None:
    asked = call()
    with pytest.raises(kind):
        translated(asked).answer(asked, body, upstream="up")


# -- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "kind"),
    [
        (TEXT[:4], Truncated),
        (TEXT[:-1], Truncated),
        (EVERYTHING[:12], Truncated),
        ([*TEXT[:6], STOP], Truncated),
        ([*TEXT[:6], *end(None)], Truncated),
        ([*TEXT[:4], b"event: error\ndata: m\n\n"], ProtocolViolation),
        ([*TEXT[:4], b'event: error\ndata: {"message":"m"}\n\n'], Reported),
        ([*TEXT[:4], b"data: 7\n\n"], ProtocolViolation),
        ([*TEXT[:4], b"data: {nonsense\n\n"], ProtocolViolation),
        ([START, *tool(0, '{"x":'), *end("tool_use")], ProtocolViolation),
        ([START, *tool(0, "7"), *end("end_turn")], ProtocolViolation),
        ([START, *tool(0, "{}", name=""), *end("tool_use")], ProtocolViolation),
        ([START, TEXT[3], *end()], ProtocolViolation),
        ([*TEXT[:4], b"data: " + b"x" * 200_000], ProtocolViolation),
    ],
)
def test_never_complete(stream: list[bytes], kind: type[Exception]) -> None:
    """A stream that is cut, reports an error or makes no sense never ends as a complete one."""
    out, reader = translate(stream)
    assert type(reader.error) is kind
    assert not reader.complete
    assert b"[DONE]" not in out
    assert b'"finish_reason":"' not in out


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("overloaded_error", 503),
        ("rate_limit_error", 429),
        ("api_error", 502),
        ("invalid_request_error", 400),
        ("timeout_error", 504),
        ("new_error", 502),
    ],
)
def test_reported_errors(kind: str, status: int) -> None:
    """They keep their type and their words, and stand for the status that Anthropic gives them."""
    _, reader = translate([START, named("error", error={"type": kind, "message": "rate limit or not"}, request_id="r")])
    error = reader.error
    assert isinstance(error, Reported)
    assert not reader.has_content
    if kind != "new_error":
        assert error.status == status
    assert (error.payload["type"], error.payload["message"]) == (kind, "rate limit or not")


def test_a_call_that_is_cut_off_by_the_limit() -> None:
    """With ``max_tokens``, the stream ends properly."""
    out, reader = translate([START, *tool(0, '{"x":'), *end("max_tokens")])
    assert reader.complete
    assert completion_of(out)["choices"][0]["finish_reason"] == "length"


def test_content() -> None:
    """Until the first piece, another target may still be tried."""
    for stream, has_content in ((TEXT[:3], False), (TEXT[:4], True), (EVERYTHING[:2], False), ([START, *end()], True)):
        assert translate([*stream])[1].has_content is has_content


# -- properties -------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
BLOCKS = st.lists(
    st.one_of(
        TEXTS.map(lambda value: {"type": "text", "text": value}),
        TEXTS.map(lambda value: {"type": "thinking", "thinking": value, "signature": "s"}),
        st.dictionaries(TEXTS, st.integers(-9, 9)).map(lambda value: {"type": "tool_use", "name": "f", "input": value}),
    ),
    max_size=4,
)


@given(BLOCKS, st.data())
def test_a_stream_is_its_plain_answer(blocks: list[dict[str, Any]], data: st.DataObject) -> None:
    """An answer is the same completion, whether it comes whole or in any pieces."""

    def pieces(whole: str) -> list[str]:
        at = data.draw(st.integers(0, len(whole)))
        return [part for part in (whole[:at], whole[at:]) if part]

    stream = [START]
    for at, each in enumerate(blocks):
        match each:
            case {"text": value}:
                stream += text(at, *pieces(value))
            case {"thinking": value}:
                stream += thinking(at, *pieces(value), signature="s")
            case {"input": value}:
                stream += tool(at, *pieces(msgspec.json.encode(value).decode()), call_id=f"t{at}")
                each["id"] = f"t{at}"
    out, reader = translate([*stream, *end()])
    assert reader.error is None
    assert completion_of(out) == answer_of(*blocks)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | TEXTS | st.sampled_from(["end_turn", "text", "{}", "tool_use"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("type", "index", "delta", "content_block", "message", "text", "thinking", "signature", "data"),
                    *("partial_json", "input", "name", "id", "usage", "stop_reason", "stop_sequence", "error"),
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
TYPES = st.sampled_from(
    ["message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "ping"]
)
EVENTS = st.fixed_dictionaries({"type": TYPES}, optional={"delta": JSON, "content_block": JSON, "message": JSON})


@settings(max_examples=60)
@example([{"type": "message_delta", "delta": {"stop_reason": "end_turn"}}])
@given(st.lists(EVENTS | JSON, max_size=6))
def test_fuzzed_events(values: list[Any]) -> None:
    """No stream of any events crashes the reader, and without its end none is complete."""
    stream = [b"data: " + msgspec.json.encode(value) + b"\n\n" for value in values]
    out, reader = translate(stream)
    assert not reader.complete
    assert reader.error is not None
    assert b"[DONE]" not in out
    translate([*stream, *end()])


@settings(max_examples=60)
@given(JSON, JSON)
def test_fuzzed_answers(content: Any, usage: Any) -> None:
    """No answer crashes the decoder in another way than by an error."""
    asked = call()
    body = msgspec.json.encode({"content": [content], "stop_reason": "end_turn", "usage": usage})
    with contextlib.suppress(ProtocolViolation):
        translated(asked).answer(asked, body, upstream="up")
