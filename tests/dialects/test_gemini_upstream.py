"""Upstreams of Gemini's format: requests that Google takes, and its answers and streams."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.dialects.chat import message_of
from tests.dialects.gemini import call, chunk, decoded, feed, function, messages_call, reader_of
from tests.support.gemini_rules import SIGNATURE, problem_of
from trigate.config.sections import UpstreamConfig
from trigate.dialects.endpoints import CHAT
from trigate.dialects.gemini import GeminiRelay, GeminiUpstream
from trigate.dialects.gemini.encode import FOREIGN
from trigate.dialects.openai_chat import ChatClient
from trigate.dialects.translated_call import TranslatedCall
from trigate.dialects.vocabulary import (
    Audio,
    File,
    Image,
    Message,
    Reasoning,
    Request,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
)
from trigate.errors import BadRequest, ProtocolViolation, Reported, Truncated, Untranslatable
from trigate.openai.answer import Usage
from trigate.openai.request import decode_call

CONFIG = UpstreamConfig(kind="gemini")
MODEL = "gemini-3-flash-preview"
USAGE = {
    "promptTokenCount": 100,
    "cachedContentTokenCount": 60,
    "candidatesTokenCount": 15,
    "thoughtsTokenCount": 5,
    "totalTokenCount": 120,
}
ASK = Message("user", (Text("go"),))


def sent(*messages: Message, model: str = MODEL, kind: Any = "gemini", **fields: Any) -> tuple[Any, tuple[str, ...]]:
    """Returns the body that Google gets, which it takes, and the names of what was dropped."""
    request = Request(messages=messages or (ASK,), **fields)
    body, dropped = GeminiUpstream().encode_request(request, model=model, upstream=UpstreamConfig(kind=kind))
    value = msgspec.json.decode(body)
    assert problem_of(value, model) is None
    return value, dropped


# -- requests ---------------------------------------------------------------------------------------------------------


def test_a_request() -> None:
    """Every field arrives."""
    tools = (Tool("f", "d", {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": {}}}),)
    body, dropped = sent(
        Message("system", (Text("Be brief."), Text("Be kind."))),
        ASK,
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        stop=("END",),
        seed=3,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        tools=tools,
        tool_choice=ToolChoice("tool", "f"),
        parallel_tool_calls=False,
        effort="low",
        wants_reasoning=True,
        schema={"type": "object"},
        user="u",
    )
    assert body == {
        "systemInstruction": {"parts": [{"text": "Be brief."}, {"text": "Be kind."}]},
        "contents": [{"role": "user", "parts": [{"text": "go"}]}],
        "tools": [
            {"functionDeclarations": [{"name": "f", "description": "d", "parametersJsonSchema": tools[0].schema}]}
        ],
        "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}},
        "generationConfig": {
            "maxOutputTokens": 7,
            "temperature": 0.5,
            "topP": 0.9,
            "topK": 40,
            "stopSequences": ["END"],
            "seed": 3,
            "presencePenalty": 0.1,
            "frequencyPenalty": 0.2,
            "responseMimeType": "application/json",
            "responseJsonSchema": {"type": "object"},
            "thinkingConfig": {"thinkingLevel": "low", "includeThoughts": True},
        },
    }
    assert dropped == ("parallel_tool_calls", "user")


def test_a_cache_is_google_s_own_matter() -> None:
    """That the client asked for one is said to be dropped, under the client's name for it."""
    asked = decode_call(CHAT, b'{"model":"up/m","messages":[{"role":"user","content":"a"}],"prompt_cache_key":"k"}')
    call = TranslatedCall(asked, ChatClient(), GeminiUpstream())
    call.body(asked, MODEL, UpstreamConfig(kind="gemini"))
    assert call.dropped == ("prompt_cache_key",)


def test_turns_alternate() -> None:
    """Messages of one role in a row are one turn; a later system message is text of the user's."""
    body, _ = sent(
        ASK,
        Message("user", (Text("on"),)),
        Message("assistant", (Reasoning("hm", {"anthropic": "s"}), Text("a"))),
        Message("assistant", (Text(""), Text("b"))),
        Message("system", (Text("now"),)),
        Message("user", (Text("c"),)),
    )
    assert body["contents"] == [
        {"role": "user", "parts": [{"text": "go"}, {"text": "on"}]},
        {"role": "model", "parts": [{"text": "a"}, {"text": "b"}]},
        {"role": "user", "parts": [{"text": "<system-message>\nnow\n</system-message>"}, {"text": "c"}]},
    ]
    assert sent(Message("system", (Text("s"),)))[0]["contents"] == [{"role": "user", "parts": [{"text": " "}]}]


CALLS = Message("assistant", (ToolCall("a", "f", "{}"), ToolCall("b", "g", '{"x":1}')))
RESULTS = Message(
    "user",
    (
        Text("and?"),
        ToolResult("b", (Text("G"), Image("data:image/png;base64,AAAA"))),
        ToolResult("a", (Text("F"),), is_error=True),
    ),
)


@pytest.mark.parametrize("kind", ["gemini", "vertex"])
def test_results(kind: str) -> None:
    """Responses name their functions, in the order of the calls, before everything else. Vertex AI knows no ids."""
    _, model, user = sent(ASK, CALLS, RESULTS, kind=kind)[0]["contents"]
    ids = [{"id": "a"}, {"id": "b"}] if kind == "gemini" else [{}, {}]
    assert model["parts"] == [
        {"functionCall": {"name": "f", "args": {}, **ids[0]}, "thoughtSignature": FOREIGN},
        {"functionCall": {"name": "g", "args": {"x": 1}, **ids[1]}},
    ]
    picture = {"inlineData": {"mimeType": "image/png", "data": "AAAA"}}
    assert user["parts"] == [
        {"functionResponse": {"name": "f", "response": {"error": "F"}, **ids[0]}},
        {"functionResponse": {"name": "g", "response": {"output": "G"}, "parts": [picture], **ids[1]}},
        {"text": "and?"},
    ]


def test_pictures_of_results_before_gemini_3() -> None:
    """They are beside the response."""
    *_, user = sent(ASK, CALLS, RESULTS, model="gemini-2.5-flash")[0]["contents"]
    assert [next(iter(part)) for part in user["parts"]] == [
        "functionResponse",
        "functionResponse",
        "text",
        "inlineData",
        "text",
    ]


def test_signatures() -> None:
    """A signature goes back as it came; only the first call of a turn needs the one for foreign calls, and only since
    Gemini 3."""
    own = Message("assistant", (ToolCall("a", "f", "{}", {"gemini": SIGNATURE}), ToolCall("b", "g", "{}")))
    foreign = Message("assistant", (ToolCall("c", "f", "{}", {"anthropic": "s"}),))
    results = Message("user", (ToolResult("a", (Text("1"),)), ToolResult("b", (Text("2"),))))
    last = Message("user", (ToolResult("c", (Text("3"),)),))
    for model, expected in ((MODEL, [SIGNATURE, None, FOREIGN]), ("gemini-2.5-pro", [SIGNATURE, None, None])):
        contents = sent(ASK, own, results, foreign, last, model=model)[0]["contents"]
        parts = [part for content in contents for part in content["parts"] if "functionCall" in part]
        assert [part.get("thoughtSignature") for part in parts] == expected


def test_media() -> None:
    """What a data URL holds is inline, and a URL is named."""
    parts = (
        Image("data:image/webp;base64,AAAA"),
        Image("https://example.com/a.png?x=1"),
        Audio("AAAA", "mp3"),
        File("a.pdf", "data:application/pdf;base64,AAAA"),
    )
    assert sent(Message("user", parts))[0]["contents"][0]["parts"] == [
        {"inlineData": {"mimeType": "image/webp", "data": "AAAA"}},
        {"fileData": {"mimeType": "image/png", "fileUri": "https://example.com/a.png?x=1"}},
        {"inlineData": {"mimeType": "audio/mpeg", "data": "AAAA"}},
        {"inlineData": {"mimeType": "application/pdf", "data": "AAAA"}},
    ]


@pytest.mark.parametrize(
    ("model", "effort", "config"),
    [
        ("gemini-2.5-flash", "none", {"thinkingBudget": 0, "includeThoughts": True}),
        ("gemini-2.5-pro", "xhigh", {"thinkingBudget": 32768, "includeThoughts": True}),
        ("gemini-2.5-flash", None, {"includeThoughts": True}),
        (MODEL, "none", {"thinkingLevel": "minimal", "includeThoughts": True}),
        (MODEL, "xhigh", {"thinkingLevel": "high", "includeThoughts": True}),
        ("gemini-2.0-flash", "high", None),
    ],
)
def test_efforts(model: str, effort: Any, config: Any) -> None:
    """Each generation has its own field; a model that does not think gets none."""
    body, dropped = sent(model=model, effort=effort, wants_reasoning=True)
    assert body.get("generationConfig", {}).get("thinkingConfig") == config
    assert dropped == (("effort",) if config is None else ())


def test_requests_that_make_no_sense() -> None:
    """They are refused before Google refuses them."""
    for messages, kind in (
        ((ASK, Message("user", (ToolResult("a", (), path="here"),))), BadRequest),
        ((ASK, Message("assistant", (ToolCall("a", "f", "[]"),)), RESULTS), BadRequest),
        ((ASK, Message("assistant", (Text("a"),))), Untranslatable),
        ((Message("user", (Image("data:image/png,x"),)),), Untranslatable),
    ):
        with pytest.raises(kind):
            sent(*messages)


def test_paths() -> None:
    """The model cannot leave its place in the path."""
    upstream = GeminiUpstream()
    plain, streamed = Request(messages=(ASK,)), Request(messages=(ASK,), stream=True)
    assert upstream.path(plain, "gemini-3-pro") == "/models/gemini-3-pro:generateContent"
    assert upstream.path(streamed, "tunedModels/a") == "/tunedModels/a:streamGenerateContent?alt=sse"
    assert upstream.path(plain, "../x y?\r\n") == "/models/..%2Fx%20y%3F%0D%0A:generateContent"
    kept = upstream.headers({"anthropic-beta": "b", "openai-beta": "b", "traceparent": "t"})
    assert kept == {"traceparent": "t"}


# -- answers ----------------------------------------------------------------------------------------------------------


EVERYTHING = (
    chunk({"text": "Let me ", "thought": True}),
    chunk({"text": "think.", "thought": True}, usageMetadata=USAGE),
    chunk({"text": "I call "}),
    chunk({"text": "two."}, function("f", {"x": [1]}, thoughtSignature=SIGNATURE)),
    chunk(function("g", {})),
    chunk({"text": "", "thoughtSignature": "AA=="}, finish="STOP", usageMetadata=USAGE),
)


def stream(*pieces: bytes) -> tuple[bytes, Any]:
    """Feeds a stream to a call in Anthropic's format; returns what the client gets, and the reader."""
    translation = messages_call()
    reader = reader_of(translation, call())
    return feed(reader, pieces), reader


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(1, len(b"".join(EVERYTHING)) - 1), max_size=6))
@example(cuts=list(range(1, len(b"".join(EVERYTHING)))))
def test_everything(cuts: list[int]) -> None:
    """However the stream is split, the message is the same."""
    whole = b"".join(EVERYTHING)
    edges = [0, *sorted(set(cuts)), len(whole)]
    out, reader = stream(*[whole[start:end] for start, end in itertools.pairwise(edges)])
    assert reader.complete
    assert reader.usage == Usage(100, 20, 60, 0, 5)
    message = message_of(out)
    thinking, *rest = message["content"]
    assert thinking["thinking"] == "Let me think."
    assert rest == [
        {"type": "text", "text": "I call two."},
        {"type": "tool_use", "id": "call_r1_0", "name": "f", "input": {"x": [1]}},
        {"type": "tool_use", "id": "call_r1_1", "name": "g", "input": {}},
    ]
    assert (message["stop_reason"], message["usage"]["cache_read_input_tokens"]) == ("tool_use", 60)


@pytest.mark.parametrize(
    ("said", "tier"),
    [
        ({"serviceTier": "flex"}, "flex"),
        ({"trafficType": "ON_DEMAND_PRIORITY"}, "priority"),
        ({"trafficType": "ON_DEMAND"}, "on_demand"),
        ({"serviceTier": 5}, ""),
    ],
)
def test_what_the_price_depends_on(said: dict[str, Any], tier: str) -> None:
    """The service tier, and which tokens are of images, of sound or of text."""
    media = [{"modality": "IMAGE", "tokenCount": 7}, {"modality": "AUDIO", "tokenCount": 2}]
    counts = {"promptTokenCount": 50, "candidatesTokenCount": 9, "promptTokensDetails": [*media, 5, {"modality": []}]}
    candidate = {"content": {"parts": [{"text": "a"}]}, "finishReason": "STOP"}
    usage_fields = {**counts, "candidatesTokensDetails": media, **said}
    body = msgspec.json.encode({"candidates": [candidate], "usageMetadata": usage_fields})
    usage = GeminiUpstream().decode_answer(body, upstream="up")[1]
    assert usage == Usage(
        50, 9, audio_tokens=4, audio_output_tokens=2, image_tokens=14, image_output_tokens=7, service_tier=tier
    )


def test_a_whole_answer() -> None:
    """It has the same parts and ids, and the signature as an opaque payload."""
    parts = [
        {"text": "hm", "thought": True, "thoughtSignature": "BB=="},
        {"text": "I call "},
        {"text": "two."},
        function("f", {"x": [1]}, thoughtSignature=SIGNATURE),
        function("g", {}, thoughtSignature=""),
    ]
    candidate = {"content": {"parts": parts}, "finishReason": "STOP"}
    body = msgspec.json.encode({"candidates": [candidate], "responseId": "r1", "usageMetadata": USAGE})
    answer, usage = GeminiUpstream().decode_answer(body, upstream="up")
    assert usage == Usage(100, 20, 60, 0, 5)
    assert answer.parts == (
        Reasoning("hm", {"gemini": "BB=="}),
        Text("I call two."),
        ToolCall("call_r1_0", "f", '{"x":[1]}', {"gemini": SIGNATURE}),
        ToolCall("call_r1_1", "g", "{}"),
    )
    assert answer.finish.reason == "tool_calls"


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("STOP", "end_turn"),
        ("SOMETHING_NEW", "end_turn"),
        ("MAX_TOKENS", "max_tokens"),
        ("SAFETY", "refusal"),
        ("RECITATION", "refusal"),
        ("PROHIBITED_CONTENT", "refusal"),
        ("BLOCKLIST", "refusal"),
    ],
)
def test_reasons(reason: str, expected: str) -> None:
    """Each reason has its meaning; an empty answer that ends in order is one."""
    assert message_of(stream(chunk({"text": "a"}), chunk(finish=reason))[0])["stop_reason"] == expected
    empty = message_of(stream(chunk(finish=reason))[0])
    assert (empty["stop_reason"], empty["content"]) == (expected, [])


@pytest.mark.parametrize("reason", ["MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "MISSING_THOUGHT_SIGNATURE"])
def test_failures(reason: str) -> None:
    """They are errors, before the first content as well, where the next target may answer."""
    for pieces in ((chunk(finish=reason, finishMessage="m"),), (chunk({"text": "a"}), chunk(finish=reason))):
        out, reader = stream(*pieces)
        assert isinstance(reader.error, ProtocolViolation)
        assert reason in reader.error.message
        assert not reader.complete
        assert b"message_stop" not in out
    body = msgspec.json.encode({"candidates": [{"finishReason": reason, "finishMessage": "why"}]})
    with pytest.raises(ProtocolViolation, match="why"):
        GeminiUpstream().decode_answer(body, upstream="up")


def test_a_blocked_prompt() -> None:
    """It is a refusal without content."""
    blocked = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 4}}
    out, reader = stream(b"data: " + msgspec.json.encode(blocked) + b"\n\n")
    assert reader.complete
    assert message_of(out)["stop_reason"] == "refusal"
    answer, _ = GeminiUpstream().decode_answer(msgspec.json.encode(blocked), upstream="up")
    assert (answer.finish.reason, answer.parts) == ("refusal", ())


@pytest.mark.parametrize(
    "error",
    [
        b'data: {"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}}\n\n',
        b'{"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}}',
        b'{\n  "error": {\n    "code": 503,\n    "message": "busy",\n    "status": "UNAVAILABLE"\n  }\n}\n',
        b'[{"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}}]\n\n',
    ],
)
def test_errors_in_a_stream(error: bytes) -> None:
    """Google sends them as events, as lines of JSON, and in an array."""
    for before in ((), (chunk({"text": "a"}),)):
        _, reader = stream(*before, error)
        assert isinstance(reader.error, Reported)
        assert (reader.error.status, reader.error.message) == (503, "busy")
        relay = reader_of(GeminiRelay(), call())
        feed(relay, (*before, error))
        assert isinstance(relay.error, Reported)


def test_streams_that_end_too_early() -> None:
    """Without a reason, a stream was truncated, wherever it was cut."""
    whole = b"".join(EVERYTHING)
    for size in range(0, len(whole) - 1, 7):
        for translation in (messages_call(), GeminiRelay()):
            reader = reader_of(translation, call())
            feed(reader, [whole[:size]])
            assert isinstance(reader.error, Truncated), size


def test_what_no_format_can_express() -> None:
    """A picture in the answer is an error."""
    _, reader = stream(chunk({"inlineData": {"mimeType": "image/png", "data": "AA"}}), chunk(finish="STOP"))
    assert isinstance(reader.error, ProtocolViolation)
    assert "inlineData" in reader.error.message


def test_json_and_streams_in_place_of_each_other() -> None:
    """An array or an object to a streamed call becomes events; a stream to a plain call becomes one answer."""
    upstream = GeminiUpstream()
    chunks = decoded(b"".join(EVERYTHING))
    events = upstream.events(msgspec.json.encode(chunks), upstream="up")
    assert decoded(events) == chunks
    answer = upstream.collected(b"".join(EVERYTHING), upstream="up")
    decoded_answer, _ = upstream.decode_answer(answer, upstream="up")
    assert [type(part).__name__ for part in decoded_answer.parts] == ["Reasoning", "Text", "ToolCall", "ToolCall"]
    assert decoded(upstream.events(answer, upstream="up")) == [msgspec.json.decode(answer)]
    with pytest.raises(Truncated):
        upstream.collected(b"".join(EVERYTHING[:-1]), upstream="up")
    with pytest.raises(Reported):
        upstream.events(b'[{"error": {"code": 400, "message": "m"}}]', upstream="up")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("candidates", "content", "parts", "text", "functionCall", "name", "args", "finishReason"),
                    *("error", "usageMetadata", "promptTokenCount", "promptFeedback", "blockReason", "thought"),
                ]
            ),
            inner,
        )
    ),
    max_leaves=10,
)


@given(values=st.lists(VALUES, max_size=4), parts=VALUES)
def test_any_stream(values: list[Any], parts: Any) -> None:
    """Whatever comes, nothing crashes, and an answer without an end is never complete."""
    candidate = {"candidates": [{"content": {"parts": parts}}]}
    pieces = [b"data: " + msgspec.json.encode(value) + b"\n\n" for value in (*values, candidate)]
    for translation in (messages_call(), GeminiRelay()):
        reader = reader_of(translation, call())
        feed(reader, pieces)
        assert reader.error is not None or b"finishReason" in b"".join(pieces) or b"blockReason" in b"".join(pieces)


# -- the same format on both sides ------------------------------------------------------------------------------------


def test_events_go_through_as_they_came() -> None:
    """Byte by byte the same, without comments; as an array, with the same data."""
    whole = b"".join(EVERYTHING)
    new = b'data: {"candidates": [{"brandNew":\t1.0}], "x": 1e2}\r\n\r\n'
    for size in (1, 7, len(whole)):
        pieces = [(whole + new)[at : at + size] for at in range(0, len(whole + new), size)]
        reader = reader_of(GeminiRelay(), call())
        assert feed(reader, [b": a comment\n\n", *pieces]) == whole + new
        assert reader.complete
        assert reader.usage == Usage(100, 20, 60, 0, 5)
        reader = reader_of(GeminiRelay(), call(is_array=True))
        array = feed(reader, pieces)
        assert msgspec.json.decode(array) == decoded(whole + new)


def test_failures_are_the_clients_to_judge() -> None:
    """A reason that is an error elsewhere goes through."""
    reader = reader_of(GeminiRelay(), call())
    event = chunk(finish="MALFORMED_FUNCTION_CALL")
    assert feed(reader, [event]) == event
    assert reader.complete


def test_bodies_that_name_their_model() -> None:
    """The name is the upstream's own; everything else stays as it came."""
    relay = GeminiRelay()
    assert relay.body(call(), "own", CONFIG) == call().body
    named = call(model="models/up/m", requests=[{"model": "models/up/m", "content": {"a": 1.0}}, 5])
    value = msgspec.json.decode(relay.body(named, "own", CONFIG))
    assert (value["model"], value["requests"]) == ("models/own", [{"model": "models/own", "content": {"a": 1.0}}, 5])
    said = call(contents=[{"parts": [{"text": '"model"'}, {"functionCall": {"name": "f", "args": {"model": "x"}}}]}])
    assert relay.body(said, "own", CONFIG) == said.body
