"""Requests for Converse, and its answers and streams: what each becomes, and what is wrong with it."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dialects.chat import call, decoded
from tests.dialects.event_stream import delta, end, frame, start, stop, tool
from trigate.config.sections import UpstreamConfig
from trigate.dialects.anthropic import MessagesClient
from trigate.dialects.bedrock import BedrockUpstream
from trigate.dialects.bedrock.models import thinking_of
from trigate.dialects.stream import TranslatedStream
from trigate.dialects.translated_call import TranslatedCall
from trigate.dialects.vocabulary import (
    ArgumentsDelta,
    Audio,
    File,
    Finish,
    Image,
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
    TokenCounts,
    Tool,
    ToolCall,
    ToolCallStart,
    ToolChoice,
    ToolResult,
)
from trigate.errors import BadRequest, ProtocolViolation, Reported, Truncated, Untranslatable
from trigate.openai.answer import Usage

BEDROCK = BedrockUpstream(b"seed")
CLAUDE = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"
NOVA = "us.amazon.nova-pro-v1:0"
LLAMA = "us.meta.llama4-scout-17b-instruct-v1:0"
PNG = "data:image/png;base64,aGk="
WEATHER = Tool("get_weather", "The weather", {"type": "object"}, strict=True)


def user(*parts: Any) -> Message:
    """A message of the user."""
    return Message("user", parts)


def encode(
    *messages: Message, model: str = CLAUDE, guardrail: str | None = None, **fields: Any
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Encodes a request; returns the decoded body, and what was dropped."""
    config = UpstreamConfig(kind="bedrock", region="us-east-1", guardrail=guardrail)
    request = Request(messages=messages or (user(Text("Hi")),), **fields)
    body, dropped = BEDROCK.encode_request(request, model=model, upstream=config)
    return msgspec.json.decode(body), dropped


def content_of(*messages: Message, **fields: Any) -> list[tuple[str, list[dict[str, Any]]]]:
    """The roles and the contents of the encoded messages."""
    return [(each["role"], each["content"]) for each in encode(*messages, **fields)[0]["messages"]]


# -- requests ---------------------------------------------------------------------------------------------------------


def test_the_fields_of_a_request() -> None:
    """Each has its place; what is advisory and has none is named."""
    body, dropped = encode(
        Message("system", (Text("Be brief."),)),
        user(Text("Hi")),
        max_tokens=5000,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        stop=("END",),
        tools=(WEATHER,),
        tool_choice=ToolChoice("tool", "get_weather"),
        parallel_tool_calls=False,
        schema={"type": "object"},
        schema_name="point",
        seed=1,
        user="somebody",
        guardrail="arn:aws:bedrock:us-east-1:1:guardrail/ab:DRAFT",
    )
    assert body == {
        "system": [{"text": "Be brief."}],
        "messages": [{"role": "user", "content": [{"text": "Hi"}]}],
        "inferenceConfig": {"maxTokens": 5000, "temperature": 0.5, "topP": 0.9, "stopSequences": ["END"]},
        "additionalModelRequestFields": {"top_k": 7},
        "toolConfig": {
            "tools": [
                {
                    "toolSpec": {
                        "name": "get_weather",
                        "description": "The weather",
                        "inputSchema": {"json": {"type": "object"}},
                        "strict": True,
                    }
                }
            ],
            "toolChoice": {"tool": {"name": "get_weather"}},
        },
        "outputConfig": {
            "textFormat": {
                "type": "json_schema",
                "structure": {"jsonSchema": {"schema": '{"type":"object"}', "name": "point"}},
            }
        },
        "guardrailConfig": {
            "guardrailIdentifier": "arn:aws:bedrock:us-east-1:1:guardrail/ab",
            "guardrailVersion": "DRAFT",
        },
    }
    assert set(dropped) == {"seed", "user", "parallel_tool_calls"}
    assert encode()[0] == {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}


def test_the_path() -> None:
    """The model's id is one segment of it, whatever its characters."""
    request = Request(messages=(user(Text("Hi")),), stream=True)
    assert BEDROCK.path(request, NOVA) == "/model/us.amazon.nova-pro-v1%3A0/converse-stream"


def test_a_conversation_with_tools() -> None:
    """Calls and results have their ids; an error says so; results come first, and roles alternate."""
    assert content_of(
        user(Text("a")),
        Message("assistant", (Text("b"), ToolCall("c 1", "f", '{"x":[1]}'), ToolCall("c2", "g", ""))),
        user(Text("c"), ToolResult("c2", (), is_error=True), ToolResult("c 1", (Text("ok"), Image(PNG)))),
        Message("system", (Text("new rule"),)),
        user(Text(" ")),
        Message("assistant", (Text(""),)),
        user(Text("d")),
    ) == [
        ("user", [{"text": "a"}]),
        (
            "assistant",
            [
                {"text": "b"},
                {"toolUse": {"toolUseId": (long := _hashed("c 1")), "name": "f", "input": {"x": [1]}}},
                {"toolUse": {"toolUseId": "c2", "name": "g", "input": {}}},
            ],
        ),
        (
            "user",
            [
                {"toolResult": {"toolUseId": "c2", "content": [{"text": "(no output)"}], "status": "error"}},
                {
                    "toolResult": {
                        "toolUseId": long,
                        "content": [{"text": "ok"}, {"image": {"format": "png", "source": {"bytes": "aGk="}}}],
                    }
                },
                {"text": "c"},
                {"text": "<system-message>\nnew rule\n</system-message>"},
                {"text": "d"},
            ],
        ),
    ]


def _hashed(id_: str) -> str:
    content = content_of(user(ToolResult(id_, (Text("x"),))))[0][1]
    found: str = content[0]["toolResult"]["toolUseId"]
    assert len(found) == 32
    return found


def test_a_tool_error_for_other_models() -> None:
    """A model that takes no status reads it in the text."""
    [(_, content)] = content_of(user(ToolResult("c", (Text("no"),), is_error=True)), model=LLAMA)
    assert content == [{"toolResult": {"toolUseId": "c", "content": [{"text": "[The tool failed]"}, {"text": "no"}]}}]


def test_media() -> None:
    """Pictures, documents and sounds have a format; a document has a name of its own, and a text beside it."""
    pdf = "data:application/pdf;base64,JVBERg=="
    assert content_of(
        user(
            Image("s3://bucket/a.jpg"),
            File("Q3_report (final).pdf", pdf),
            File("Q3_report (final).pdf", pdf),
            Audio("UklGRg==", "wav"),
        )
    ) == [
        (
            "user",
            [
                {"image": {"format": "jpeg", "source": {"s3Location": {"uri": "s3://bucket/a.jpg"}}}},
                {
                    "document": {
                        "format": "pdf",
                        "name": "Q3-report (final)-pdf",
                        "source": {"bytes": "JVBERg=="},
                    }
                },
                {
                    "document": {
                        "format": "pdf",
                        "name": "Q3-report (final)-pdf (2)",
                        "source": {"bytes": "JVBERg=="},
                    }
                },
                {"audio": {"format": "wav", "source": {"bytes": "UklGRg=="}}},
                {"text": "Attached: Q3-report (final)-pdf, Q3-report (final)-pdf (2)"},
            ],
        )
    ]


def test_reasoning_goes_back_to_those_who_sign_it() -> None:
    """With its signature; without one, or to other models, it is left out."""
    history = (
        user(Text("a")),
        Message(
            "assistant",
            (
                Reasoning("thought", {"anthropic": "sig"}),
                Reasoning("", {"bedrock": "aGlkZGVu"}),
                Reasoning("unsigned"),
                Text("b"),
            ),
        ),
        user(Text("c")),
    )
    assert content_of(*history)[1][1] == [
        {"reasoningContent": {"reasoningText": {"text": "thought", "signature": "sig"}}},
        {"reasoningContent": {"redactedContent": "aGlkZGVu"}},
        {"text": "b"},
    ]
    assert content_of(*history, model=NOVA)[1][1] == [{"text": "b"}]


@pytest.mark.parametrize(
    ("model", "fields", "extra", "output", "dropped"),
    [
        (
            "anthropic.claude-opus-4-6-v1",
            {"temperature": 0.5},
            {"thinking": {"type": "adaptive"}},
            "high",
            ["temperature"],
        ),
        (CLAUDE, {"max_tokens": 9000}, {"thinking": {"type": "enabled", "budget_tokens": 8999}}, None, []),
        (CLAUDE, {"max_tokens": 1000}, None, None, ["effort"]),
        (CLAUDE, {"tools": (WEATHER,), "tool_choice": ToolChoice("required")}, None, None, ["effort"]),
        ("anthropic.claude-3-5-sonnet-20241022-v2:0", {}, None, None, ["effort"]),
        ("openai.gpt-oss-120b-1:0", {"temperature": 0.5}, {"reasoning_effort": "high"}, None, []),
        (
            "us.amazon.nova-2-lite-v1:0",
            {},
            {"reasoningConfig": {"type": "enabled", "maxReasoningEffort": "high"}},
            None,
            [],
        ),
        (LLAMA, {"top_k": 4}, None, None, ["effort", "top_k"]),
    ],
)
def test_effort(
    model: str, fields: dict[str, Any], extra: dict[str, Any] | None, output: str | None, dropped: list[str]
) -> None:
    """Each family of models is told in its own way to think, or it is named as dropped."""
    body, found = encode(model=model, effort="high", **fields)
    assert body.get("additionalModelRequestFields") == extra
    assert body.get("outputConfig", {}).get("effort") == output
    assert list(found) == dropped


def test_no_effort() -> None:
    """``none`` is what Anthropic's models do by themselves."""
    assert encode(effort="none") == encode()
    assert thinking_of(LLAMA, "none", None) is None


def test_a_cache() -> None:
    """It is asked for behind the system prompt and at the end, where the model has one."""
    point = {"cachePoint": {"type": "default"}}
    body, dropped = encode(Message("system", (Text("a"),)), user(Text("b")), cache=True)
    assert body["system"] == [{"text": "a"}, point]
    assert body["messages"] == [{"role": "user", "content": [{"text": "b"}, point]}]
    assert dropped == ()
    for model in (LLAMA, "anthropic.claude-3-5-sonnet-20240620-v1:0"):
        assert encode(cache=True, model=model) == (encode()[0], ("cache",))


def test_tools_that_are_missing() -> None:
    """Those that the conversation has called are declared: Bedrock refuses calls of unknown ones."""
    history = (user(Text("a")), Message("assistant", (ToolCall("c", "f", "{}"), ToolCall("d", "f", "{}"))))
    body, _ = encode(*history, user(ToolResult("c", (Text("x"),)), ToolResult("d", (Text("y"),))))
    assert body["toolConfig"] == {"tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": {"type": "object"}}}}]}


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        ((user(Image("https://example.com/a.png")),), {}, "messages"),
        ((user(Image("data:image/tiff;base64,aGk=")),), {}, "messages"),
        ((user(File("a.zip", "data:application/zip;base64,aGk=")),), {}, "messages"),
        ((), {"tools": (Tool("a.b", None, {}),)}, "tools"),
        ((), {"is_json": True}, "response_format"),
        (
            (user(Text("a")), Message("assistant", (ToolCall("c", "f", "{}"),)), user(ToolResult("c", ()))),
            {"tools": (WEATHER,), "tool_choice": ToolChoice("none")},
            "tool_choice",
        ),
    ],
)
def test_what_cannot_be_expressed(messages: tuple[Message, ...], fields: dict[str, Any], param: str) -> None:
    """It is refused, with the name of its field."""
    with pytest.raises(Untranslatable) as caught:
        encode(*messages, **fields)
    assert caught.value.param == param


def test_tools_that_may_not_be_called_are_left_out() -> None:
    """Where the conversation has not used them."""
    assert encode(tools=(WEATHER,), tool_choice=ToolChoice("none")) == encode()


def test_arguments_that_are_no_object() -> None:
    """They are the client's error."""
    with pytest.raises(BadRequest, match="no JSON object"):
        encode(user(Text("a")), Message("assistant", (ToolCall("c", "f", "[1]"),)), user(Text("b")))


# -- streams ----------------------------------------------------------------------------------------------------------

EVERYTHING = (
    start(),
    delta(0, reasoningContent={"text": "Let me "}),
    delta(0, reasoningContent={"text": "think."}),
    delta(0, reasoningContent={"signature": "c2ln"}),
    stop(0),
    delta(1, reasoningContent={"redactedContent": "aGlkZGVu"}),
    stop(1),
    delta(2, text="I call "),
    delta(2, text=""),
    delta(2, text="two."),
    stop(2),
    tool(3, "c1", "f"),
    delta(3, toolUse={"input": ""}),
    delta(3, toolUse={"input": '{"x":'}),
    delta(3, toolUse={"input": "1}"}),
    stop(3),
    tool(4, "c2", "g"),
    stop(4),
    end("tool_use", cacheReadInputTokens=60, cacheWriteInputTokens=10),
)
EVENTS = [
    ReasoningStart(),
    ReasoningDelta("Let me "),
    ReasoningDelta("think."),
    Payload("anthropic", "c2ln"),
    PartStop(),
    ReasoningStart(),
    Payload("bedrock", "aGlkZGVu"),
    PartStop(),
    TextStart(),
    TextDelta("I call "),
    TextDelta("two."),
    PartStop(),
    ToolCallStart("c1", "f"),
    ArgumentsDelta('{"x":'),
    ArgumentsDelta("1}"),
    PartStop(),
    ToolCallStart("c2", "g"),
    PartStop(),
    Finish("tool_calls", None, TokenCounts(input=30, cache_read=60, cache_write=10, output=20)),
]


class Keeping:
    """Keeps the events of the vocabulary, in place of a client's encoder."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def encode(self, event: Any) -> bytes:
        self.events.append(event)
        return b"."


def read(*pieces: bytes, ended: bool = True) -> tuple[list[Any], TranslatedStream]:
    """Decodes a stream; returns its events without the first one, and the reader."""
    keeping = Keeping()
    parts = BEDROCK.stream_parts(upstream="aws", max_event_bytes=10_000)
    reader = TranslatedStream(parts, keeping, upstream="aws")
    for piece in pieces:
        if reader.error is None:
            reader.feed(piece)
    if ended and reader.error is None:
        reader.feed_end()
    assert not keeping.events or isinstance(keeping.events[0], Start)
    return keeping.events[1:], reader


def test_every_kind_of_event() -> None:
    """Each becomes what it means; the stream is complete at its last message, before its body ends."""
    for pieces in (EVERYTHING, (b"".join(EVERYTHING),)):
        events, reader = read(*pieces, ended=False)
        assert events == EVENTS
        assert (reader.complete, reader.usage) == (True, Usage(100, 20, 60, 10))


@given(st.lists(st.integers(0, 3000), max_size=5))
def test_a_stream_in_pieces(cuts: list[int]) -> None:
    """The events are the same, however the bytes are cut."""
    data = b"".join(EVERYTHING)
    ends = sorted({min(cut, len(data)) for cut in (*cuts, 0, len(data))})
    assert read(*[data[a:b] for a, b in itertools.pairwise(ends)])[0] == EVENTS


def test_each_answer_has_an_id_of_its_own() -> None:
    """Bedrock gives none, and its streams begin alike."""
    ids = [BEDROCK.decode_answer(body_of({"text": "a"}), upstream="aws")[0].id for _ in range(2)]
    for _ in range(2):
        [first] = BEDROCK.stream_parts(upstream="aws", max_event_bytes=9).decoder.feed(b'{"messageStart":{}}')
        assert isinstance(first, Start)
        ids.append(first.id)
    assert len(set(ids)) == 4


def test_a_stream_without_counts() -> None:
    """One that has said how it ended is complete, also without the last message."""
    events, reader = read(start(), delta(0, text="a"), stop(0), frame("messageStop", {"stopReason": "max_tokens"}))
    assert reader.complete
    assert events[-1] == Finish("length", None, None)


def test_every_cut_is_noticed() -> None:
    """A stream that ends before it has said how is truncated."""
    data = b"".join(EVERYTHING)
    whole = data.index(b"metadata") - 100
    for at in range(0, whole, 7):
        _, reader = read(data[:at])
        assert isinstance(reader.error, Truncated)
        assert not reader.complete


def test_every_flipped_byte_is_noticed() -> None:
    """A damaged stream never ends as complete."""
    data = b"".join(EVERYTHING)
    for at in range(0, len(data), 23):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        _, reader = read(bytes(damaged))
        at_the_end = at >= data.rindex(b":event-type") - 12  # in the token counts, when all has been said
        assert isinstance(reader.error, ProtocolViolation | Truncated)
        assert not reader.complete or at_the_end


@pytest.mark.parametrize(
    ("reason", "found"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop_sequence"),
        ("content_filtered", "refusal"),
        ("guardrail_intervened", "refusal"),
        ("model_context_window_exceeded", "context_length"),
        ("brand_new", "stop"),
    ],
)
def test_the_reason_of_the_end(reason: str, found: str) -> None:
    """It is the same in a stream and in a plain answer."""
    events, _ = read(start(), delta(0, text="a"), stop(0), end(reason))
    assert events[-1].reason == found
    answer, usage = BEDROCK.decode_answer(body_of({"text": "a"}, reason=reason), upstream="aws")
    assert answer.finish == events[-1]
    assert usage == Usage(30, 20)


def test_the_service_tier() -> None:
    """It is beside the token counts, in a stream and in a plain answer."""
    fields = msgspec.json.decode(body_of({"text": "a"}))
    body = msgspec.json.encode({**fields, "serviceTier": {"type": "flex"}})
    assert BEDROCK.decode_answer(body, upstream="aws")[1] == Usage(30, 20, service_tier="flex")
    counts = {"inputTokens": 30, "outputTokens": 20}
    last = frame("metadata", {"usage": counts, "serviceTier": {"type": "priority"}})
    _, reader = read(start(), delta(0, text="a"), stop(0), frame("messageStop", {"stopReason": "end_turn"}), last)
    assert reader.usage == Usage(30, 20, service_tier="priority")


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("throttlingException", 429),
        ("ThrottlingException", 429),
        ("validationException", 400),
        ("modelStreamErrorException", 502),
        ("serviceUnavailableException", 503),
        ("brandNewException", 502),
    ],
)
def test_an_exception(name: str, status: int) -> None:
    """It is the provider's error, with its message, its name and its status; the stream is not complete."""
    events, reader = read(start(), delta(0, text="a"), frame(name, {"message": "It broke."}, kind="exception"))
    assert events[-1] == TextDelta("a")
    assert isinstance(reader.error, Reported)
    assert (reader.error.status, reader.error.message) == (status, "It broke.")
    assert reader.error.payload["type"] == name[0].lower() + name[1:]
    assert not reader.complete


@pytest.mark.parametrize(
    "frames",
    [
        (tool(0, "c", "f"), delta(0, toolUse={"input": "[1]"}), end("tool_use")),
        (tool(0, "c", "f"), delta(0, toolUse={"input": '{"x"'}), end("tool_use")),
        (tool(0, "", "f"), end()),
        (delta(0, toolUse={"input": "{}"}), end()),
        (delta(1, text="a"), delta(0, text="b"), end()),
        (delta(0, text="a"), end("malformed_tool_use")),
        (frame("contentBlockDelta", [1]), end()),
        (frame("contentBlockDelta", body=b'1,"b":2'), end()),
        (frame("messageStop", {}), frame("metadata", {})),
    ],
)
def test_a_stream_that_makes_no_sense(frames: tuple[bytes, ...]) -> None:
    """It is an error, and never complete."""
    _, reader = read(start(), *frames)
    assert isinstance(reader.error, ProtocolViolation)
    assert not reader.complete


def test_a_call_that_was_cut_off() -> None:
    """Its arguments may end anywhere where the answer was as long as allowed."""
    events, reader = read(start(), tool(0, "c", "f"), delta(0, toolUse={"input": '{"x"'}), end("max_tokens"))
    assert reader.complete
    assert events[-1].reason == "length"


@given(st.lists(st.sampled_from([*EVERYTHING, frame("x", {}), frame("throttlingException", {}, kind="exception")])))
def test_messages_in_any_order(frames: list[bytes]) -> None:
    """Nothing raises; parts never overlap; the end comes last, and once."""
    events, reader = read(*frames)
    opened = False
    for event in events:
        match event:
            case TextStart() | ReasoningStart() | ToolCallStart():
                assert not opened
                opened = True
            case PartStop():
                assert opened
                opened = False
            case Finish():
                assert event is events[-1]
                assert not opened
            case _:
                assert opened
    assert reader.complete == (bool(events) and isinstance(events[-1], Finish))
    assert reader.complete != (reader.error is not None)


# -- plain answers ----------------------------------------------------------------------------------------------------


def body_of(*content: Any, reason: str = "end_turn") -> bytes:
    """Makes an answer."""
    usage = {"inputTokens": 30, "outputTokens": 20, "totalTokens": 50}
    message = {"role": "assistant", "content": content}
    return msgspec.json.encode({"output": {"message": message}, "stopReason": reason, "usage": usage})


def test_a_plain_answer() -> None:
    """Its blocks become parts; those of an unknown kind say nothing."""
    answer, _ = BEDROCK.decode_answer(
        body_of(
            {"reasoningContent": {"reasoningText": {"text": "hm", "signature": "c2ln"}}},
            {"reasoningContent": {"redactedContent": "aGlkZGVu"}},
            {"reasoningContent": {"reasoningText": {"text": "plain"}}},
            {"text": "a"},
            {"citationsContent": {"content": [{"text": "b"}], "citations": []}},
            {"toolUse": {"toolUseId": "c1", "name": "f", "input": {"x": "é"}}},
            {"toolUse": {"toolUseId": "c2", "name": "g", "input": {}}},
            {"brandNew": {}},
        ),
        upstream="aws",
    )
    assert answer.parts == (
        Reasoning("hm", {"anthropic": "c2ln"}),
        Reasoning("", {"bedrock": "aGlkZGVu"}),
        Reasoning("plain"),
        Text("a"),
        Text("b"),
        ToolCall("c1", "f", '{"x": "é"}'),
        ToolCall("c2", "g", "{}"),
    )
    assert answer.finish.reason == "tool_calls"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{}", ProtocolViolation),
        (b"[]", ProtocolViolation),
        (b"<html>", ProtocolViolation),
        (body_of({"toolUse": {"name": "f"}}), ProtocolViolation),
        (body_of({"text": "a"}, reason="malformed_model_output"), ProtocolViolation),
        (b'{"message": "Too many tokens", "__type": "ThrottlingException"}', Reported),
    ],
)
def test_what_is_no_answer(body: bytes, kind: type[Exception]) -> None:
    """It is an error of the upstream."""
    with pytest.raises(kind):
        BEDROCK.decode_answer(body, upstream="aws")


def test_the_other_kind_of_answer() -> None:
    """Bedrock answers a stream with a stream, and a plain call with JSON."""
    with pytest.raises(ProtocolViolation):
        BEDROCK.events(b"{}", upstream="aws")
    with pytest.raises(ProtocolViolation):
        BEDROCK.collected(b"", upstream="aws")


def test_a_stream_for_a_client_of_anthropic_s() -> None:
    """Joined to a client's format, it is a stream of that format."""
    joined = TranslatedCall(call(), MessagesClient(), BEDROCK)
    reader = joined.stream_reader(call(), upstream="aws", max_event_bytes=10_000, keep_bytes=0, continues=None)
    out = reader.feed(b"".join(EVERYTHING))
    assert reader.complete
    kinds = [event["content_block"]["type"] for event in decoded(out) if event["type"] == "content_block_start"]
    assert kinds == ["thinking", "thinking", "text", "tool_use", "tool_use"]
    assert joined.stream_types == ("application/vnd.amazon.eventstream",)
