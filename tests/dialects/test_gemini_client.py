"""Gemini's format over chat completions: requests, answers and streams."""

from __future__ import annotations

import base64
import contextlib
import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.dialects import chat
from tests.dialects.gemini import COUNTED, call, decoded, feed, over_chat, parts_of, reader_of
from trigate.config.sections import UpstreamConfig, Url
from trigate.dialects.gemini.fields import FIELDS, GENERATION_CONFIG
from trigate.errors import BadRequest, ProtocolViolation, Truncated, Untranslatable
from trigate.openai.answer import Usage

LOCAL = UpstreamConfig(base_url=Url("http://127.0.0.1:1/v1"))
TOOL = {"name": "f", "description": "d", "parametersJsonSchema": {"type": "object", "properties": {"x": {}}}}
END = (chat.chunk({}, "stop"), chat.usage(), chat.DONE)


def sent(**fields: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the body that a server of chat completions gets, and the names of what was dropped."""
    asked = call(**fields)
    translation = over_chat(asked)
    body = msgspec.json.decode(translation.body(asked, "m", LOCAL))
    return body, translation.dropped


def user(*parts: Any) -> dict[str, Any]:
    """A turn of the user's."""
    return {"role": "user", "parts": list(parts)}


def model(*parts: Any) -> dict[str, Any]:
    """A turn of the model's."""
    return {"role": "model", "parts": list(parts)}


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_snake", [False, True])
def test_a_request(is_snake: bool) -> None:
    """Every field arrives, in camel case and in snake case."""
    fields: dict[str, Any] = {
        "systemInstruction": {"parts": {"text": "Be brief."}},
        "contents": [{"parts": [{"text": "What is it?"}, {"inlineData": {"mimeType": "image/png", "data": "AAAA"}}]}],
        "tools": [{"functionDeclarations": [TOOL]}],
        "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}},
        "generationConfig": {
            "maxOutputTokens": "7",
            "temperature": 0.5,
            "topP": 1,
            "topK": 40.0,
            "stopSequences": ["END"],
            "candidateCount": 1,
            "seed": 5,
            "presencePenalty": 0.1,
            "frequencyPenalty": 0.2,
            "responseModalities": ["TEXT"],
            "thinkingConfig": {"thinkingLevel": "LOW", "includeThoughts": True},
            "responseMimeType": "application/json",
            "responseJsonSchema": {"type": "object"},
        },
    }
    body, dropped = sent(**(snake(fields) if is_snake else fields))
    schema = body.pop("response_format")["json_schema"]
    assert (schema["schema"], schema["strict"]) == ({"type": "object"}, False)
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                ],
            },
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 1,
        "top_k": 40,
        "stop": ["END"],
        "seed": 5,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "tools": [
            {
                "type": "function",
                "function": {"name": "f", "description": "d", "parameters": TOOL["parametersJsonSchema"]},
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "reasoning_effort": "low",
    }
    assert dropped == ()


def snake(value: Any) -> Any:
    """The same with names in snake case, except within a schema."""
    if isinstance(value, list):
        return [snake(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        "".join([f"_{char.lower()}" if char.isupper() else char for char in name]): (
            inner if name.endswith("JsonSchema") else snake(inner)
        )
        for name, inner in value.items()
    }


def test_calls_without_ids() -> None:
    """Calls get ids by their place, which are the same in a longer conversation; responses find them by their names,
    and come in the order of the calls."""
    first = [
        user({"text": "go"}),
        model({"functionCall": {"name": "f"}}, {"functionCall": {"name": "g", "args": {"x": 1}}}),
        user(
            {"functionResponse": {"name": "g", "response": {"output": "G"}}},
            {"functionResponse": {"name": "f", "response": {"error": "F"}}},
            {"text": "and?"},
        ),
    ]
    more = [
        *first,
        model({"functionCall": {"name": "f", "args": {}}}),
        user({"functionResponse": {"name": "f", "response": {"a": [1], "b": None}}}),
    ]
    short, long = sent(contents=first)[0]["messages"], sent(contents=more)[0]["messages"]
    assert long[: len(short)] == short
    assert short[1:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                {"id": "call_1", "type": "function", "function": {"name": "g", "arguments": '{"x":1}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": "[The tool failed] F"},
        {"role": "tool", "tool_call_id": "call_1", "content": "G"},
        {"role": "user", "content": "and?"},
    ]
    assert long[-1] == {"role": "tool", "tool_call_id": "call_2", "content": '{"a":[1],"b":null}'}


def test_calls_with_ids() -> None:
    """Ids that are given stay, and one that is made never is one of them."""
    messages = sent(
        contents=[
            user({"text": "go"}),
            model({"functionCall": {"name": "f", "id": "call_0"}}, {"functionCall": {"name": "f"}}),
            user(
                {"functionResponse": {"name": "f", "response": {"result": 1}}},
                {"functionResponse": {"name": "f", "id": "call_1", "response": {"output": "b"}}},
            ),
        ]
    )[0]["messages"]
    assert [each["id"] for each in messages[1]["tool_calls"]] == ["call_0", "call_1"]
    assert [(each["tool_call_id"], each["content"]) for each in messages[2:]] == [("call_0", "1"), ("call_1", "b")]


def test_thoughts_and_signatures() -> None:
    """Thoughts are reasoning, which most servers do not take back; a signature of a text is dropped, one alone says
    nothing."""
    body, dropped = sent(
        contents=[
            user({"text": "go"}),
            model(
                {"text": "hm", "thought": True, "thoughtSignature": "AA=="},
                {"text": "a", "thoughtSignature": "AA=="},
                {"thoughtSignature": "AA=="},
            ),
            user({"text": "on"}),
        ]
    )
    assert body["messages"][1]["content"] == "a"
    assert dropped == ("thoughtSignature",)


def test_media() -> None:
    """A text is decoded, a sound has the format of its media type, a picture may have a URL."""
    text = base64.b64encode("ü".encode()).decode()
    content = sent(
        contents=[
            user(
                {"inlineData": {"mimeType": "text/plain; charset=utf-8", "data": text}},
                {"inlineData": {"mimeType": "audio/mpeg", "data": "AAAA"}},
                {"fileData": {"mimeType": "image/png", "fileUri": "https://example.com/a.png"}},
            )
        ]
    )[0]["messages"][0]["content"]
    assert content == [
        {"type": "text", "text": "ü"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
    ]


def test_pictures_of_a_response() -> None:
    """They go into the user's message behind the result."""
    messages = sent(
        contents=[
            user({"text": "go"}),
            model({"functionCall": {"name": "f", "id": "c"}}),
            user(
                {
                    "functionResponse": {
                        "name": "f",
                        "id": "c",
                        "response": {"output": "see"},
                        "parts": [{"inlineData": {"mimeType": "image/png", "data": "AAAA"}}],
                    }
                }
            ),
        ]
    )[0]["messages"]
    assert messages[2] == {"role": "tool", "tool_call_id": "c", "content": "see"}
    assert messages[3]["content"][1]["image_url"]["url"] == "data:image/png;base64,AAAA"


def test_schemas() -> None:
    """Google's schema becomes a JSON schema; a function without parameters takes none."""
    parameters = {
        "type": "OBJECT",
        "properties": {
            "a": {"type": "STRING", "format": "enum", "enum": ["x"], "nullable": True},
            "type": {"anyOf": [{"type": "INTEGER"}, {"type": "NULL"}], "example": 1},
            "format": {"type": "ARRAY", "items": {"type": "NUMBER"}, "maxItems": "3"},
        },
        "propertyOrdering": ["a"],
        "required": ["a"],
    }
    declarations = [{"name": "f", "parameters": parameters}, {"name": "g"}]
    tools = sent(tools=[{"functionDeclarations": declarations}, {"googleSearch": {}}])
    assert tools[1] == ("tools.googleSearch",)
    assert [each["function"]["parameters"] for each in tools[0]["tools"]] == [
        {
            "type": "object",
            "properties": {
                "a": {"type": ["string", "null"], "enum": ["x", None]},
                "type": {"anyOf": [{"type": "integer"}, {"type": "null"}], "examples": [1]},
                "format": {"type": "array", "items": {"type": "number"}, "maxItems": 3},
            },
            "required": ["a"],
        },
        {"type": "object", "properties": {}},
    ]


@pytest.mark.parametrize(
    ("mode", "names", "choice", "declared"),
    [
        ("AUTO", [], "auto", 2),
        ("VALIDATED", ["g"], "auto", 1),
        ("NONE", [], "none", 2),
        ("ANY", [], "required", 2),
        ("ANY", ["f", "g"], "required", 2),
        ("any", ["g"], {"type": "function", "function": {"name": "g"}}, 2),
        ("MODE_UNSPECIFIED", [], None, 2),
    ],
)
def test_tool_choices(mode: str, names: list[str], choice: Any, declared: int) -> None:
    """Each mode has its choice, and only the functions that are allowed are declared."""
    config = {"functionCallingConfig": {"mode": mode, **({"allowedFunctionNames": names} if names else {})}}
    body, _ = sent(tools=[{"functionDeclarations": [TOOL, {"name": "g"}]}], toolConfig=config)
    assert body.get("tool_choice") == choice
    assert len(body["tools"]) == declared


@pytest.mark.parametrize(
    ("thinking", "effort"),
    [
        ({"thinkingBudget": -1}, None),
        ({"thinkingBudget": 1000}, "low"),
        ({"thinkingBudget": "8192"}, "medium"),
        ({"thinkingBudget": 24576}, "high"),
        ({"thinkingLevel": "high"}, "high"),
        ({"thinkingLevel": "THINKING_LEVEL_UNSPECIFIED"}, None),
    ],
)
def test_thinking(thinking: Any, effort: str | None) -> None:
    """A level or a budget is an effort."""
    assert sent(generationConfig={"thinkingConfig": thinking})[0].get("reasoning_effort") == effort


def test_what_is_dropped() -> None:
    """Its names are in camel case, each once; what a client made up is repeated only if it looks like a name."""
    config = {"speech_config": {}, "newField": 1, "thinkingConfig": {"thinkingBudget": 0, "newer": 1}}
    _, dropped = sent(safety_settings=[], labels={}, generationConfig=config, **{"a b": 1})
    assert dropped == (
        "generationConfig.newField",
        "generationConfig.speechConfig",
        "generationConfig.thinkingConfig.newer",
        "generationConfig.thinkingConfig.thinkingBudget",
        "labels",
        "other",
        "safetySettings",
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"cached_content": "cachedContents/1"}, "cachedContent"),
        ({"contents": [user({"executableCode": {}})]}, "contents[0].parts[0]"),
        ({"contents": [user({"brandNew": {}})]}, "contents[0].parts[0]"),
        ({"contents": [user({"text": "a"}), model({"text": "b"})]}, "contents"),
        ({"contents": [user({"inlineData": {"mimeType": "video/mp4", "data": "AA"}})]}, "contents[0].parts[0]"),
        ({"contents": [user({"fileData": {"mimeType": "image/png", "fileUri": "gs://b/a"}})]}, "contents[0].parts[0]"),
        ({"systemInstruction": {"parts": [{"inlineData": {}}]}}, "systemInstruction.parts[0]"),
        ({"generationConfig": {"candidateCount": 2}}, "generationConfig.candidateCount"),
        ({"generationConfig": {"responseModalities": ["IMAGE"]}}, "generationConfig.responseModalities"),
        ({"generationConfig": {"responseLogprobs": True}}, "generationConfig.responseLogprobs"),
        ({"generationConfig": {"responseMimeType": "text/x.enum"}}, "generationConfig.responseMimeType"),
        ({"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}, "toolConfig.functionCallingConfig.mode"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], param: str) -> None:
    """The error names the field."""
    with pytest.raises(Untranslatable) as caught:
        sent(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"contents": []}, "contents"),
        ({"contents": "a"}, "contents"),
        ({"contents": [{"role": "assistant", "parts": []}]}, "contents[0].role"),
        ({"contents": [5]}, "contents[0]"),
        ({"contents": [user({"text": 5})]}, "contents[0].parts[0].text"),
        ({"contents": [user({"functionResponse": {"name": "f", "response": {}}})]}, "contents[0].parts[0].functionRe"),
        ({"contents": [model({"functionCall": {"name": ""}}), user()]}, "contents[0].parts[0].functionCall.name"),
        ({"contents": [model({"functionCall": {"name": "f", "args": "{}"}}), user()]}, "contents[0].parts[0].functio"),
        ({"contents": [user({"inlineData": {"mimeType": "text/plain", "data": "_"}})]}, "contents[0].parts[0]"),
        ({"generationConfig": {"maxOutputTokens": 0}}, "generationConfig.maxOutputTokens"),
        ({"generationConfig": {"topK": 1.5}}, "generationConfig.topK"),
        ({"generationConfig": {"temperature": "warm"}}, "generationConfig.temperature"),
        ({"generationConfig": {"temperature": True}}, "generationConfig.temperature"),
        ({"generationConfig": {"stopSequences": [1]}}, "generationConfig.stopSequences"),
        ({"generationConfig": {"responseSchema": {"type": "STRING"}}}, "generationConfig.responseMimeType"),
        ({"generationConfig": {"thinkingConfig": {"thinkingLevel": "MAX"}}}, "generationConfig.thinkingConfig"),
        ({"tools": [{"functionDeclarations": [{"name": ""}]}]}, "tools[0].functionDeclarations[0].name"),
        ({"tools": [{"functionDeclarations": [{"name": "f", "parameters": []}]}]}, "tools[0].functionDeclarations[0]"),
        ({"toolConfig": {"functionCallingConfig": {"mode": "SOME"}}}, "toolConfig.functionCallingConfig.mode"),
        ({"toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["x"]}}}, "toolConfig.func"),
    ],
)
def test_malformed_requests(fields: dict[str, Any], param: str) -> None:
    """The error names the field."""
    with pytest.raises(BadRequest) as caught:
        sent(**fields)
    assert not isinstance(caught.value, Untranslatable)
    assert (caught.value.param or "").startswith(param)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "parts", "role", "functionCall", "functionResponse", "name", "args", "a"]), inner
        )
    ),
    max_leaves=8,
)


@given(
    name=st.sampled_from([*FIELDS, *(f"generationConfig.{name}" for name in GENERATION_CONFIG)]),
    value=JSON,
    parts=JSON,
)
def test_any_request(name: str, value: Any, parts: Any) -> None:
    """Whatever a field holds, the request is translated, or refused by an error of the client's."""
    outer, _, inner = name.partition(".")
    fields = {"contents": [{"role": "user", "parts": parts}], outer: {inner: value} if inner else value}
    if fields["contents"] is None:
        del fields["contents"]
    with contextlib.suppress(BadRequest):
        sent(**fields)


# -- answers ----------------------------------------------------------------------------------------------------------


def stream(*pieces: bytes, is_array: bool = False, **fields: Any) -> tuple[bytes, Any]:
    """Feeds a stream of chat completions; returns what the client gets, and the reader."""
    asked = call(is_array=is_array, **fields)
    reader = reader_of(over_chat(asked), asked)
    return feed(reader, pieces), reader


EVERYTHING = (
    chat.chunk({"role": "assistant", "reasoning_content": "Let me "}),
    chat.chunk({"reasoning_content": "think."}),
    chat.chunk({"content": "I call "}),
    chat.chunk({"content": "two."}),
    chat.tool(0, "f", "", "call_a"),
    chat.tool(0, arguments='{"x":'),
    chat.tool(0, arguments="\n [1]}"),
    chat.tool(1, "g", "{}", "call_b"),
    chat.chunk({}, "tool_calls"),
    chat.usage(),
    chat.DONE,
)
EVERYTHING_PARTS = [
    {"text": "Let me think.", "thought": True},
    {"text": "I call two."},
    {"functionCall": {"id": "call_a", "name": "f", "args": {"x": [1]}}},
    {"functionCall": {"id": "call_b", "name": "g", "args": {}}},
]


def test_the_chunks_of_a_text() -> None:
    """The chunks are exactly these."""
    out, reader = stream(chat.chunk({"content": "Hel"}), chat.chunk({"content": "lo"}), *END)
    assert reader.complete
    first, second, last = decoded(out)
    tail = {"modelVersion": "up/m", "responseId": "1"}
    content = {"parts": [{"text": "Hel"}], "role": "model"}
    assert first == {"candidates": [{"content": content, "index": 0}], **tail}
    assert second["candidates"][0]["content"]["parts"] == [{"text": "lo"}]
    end = {"content": {"parts": [{"text": ""}], "role": "model"}, "finishReason": "STOP", "index": 0}
    assert last == {"candidates": [end], "usageMetadata": COUNTED, **tail}
    assert b"[DONE]" not in out


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(1, len(b"".join(EVERYTHING)) - 1), max_size=6), is_array=st.booleans())
@example(cuts=list(range(1, len(b"".join(EVERYTHING)))), is_array=False)
def test_everything(cuts: list[int], is_array: bool) -> None:
    """However the stream is split, the parts are the same, as events and as an array."""
    whole = b"".join(EVERYTHING)
    edges = [0, *sorted(set(cuts)), len(whole)]
    pieces = [whole[start:end] for start, end in itertools.pairwise(edges)]
    out, _ = stream(*pieces, is_array=is_array)
    chunks = msgspec.json.decode(out) if is_array else decoded(out)
    assert parts_of(chunks) == EVERYTHING_PARTS
    assert chunks[-1]["candidates"][0]["finishReason"] == "STOP"


def test_thoughts_only_if_asked_for() -> None:
    """Without ``includeThoughts``, the client gets none."""
    out, _ = stream(*EVERYTHING, generationConfig={})
    assert parts_of(decoded(out)) == EVERYTHING_PARTS[1:]


def test_line_ends_of_javascript() -> None:
    """They are escaped, since Google's SDK takes them for the end of the event."""
    out, _ = stream(chat.chunk({"content": "a\u2028b\u2029c"}), *END)
    assert "\u2028" not in out.decode()
    assert "\u2029" not in out.decode()
    assert parts_of(decoded(out)) == [{"text": "a\u2028b\u2029c"}]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("stop", "STOP"), ("length", "MAX_TOKENS"), ("content_filter", "SAFETY"), ("function_call", "STOP")],
)
def test_reasons(reason: str, expected: str) -> None:
    """Each reason has its word, streamed or not."""
    out, _ = stream(chat.chunk({"content": "a"}), chat.chunk({}, reason), chat.DONE)
    last = decoded(out)[-1]
    assert last["candidates"][0]["finishReason"] == expected
    asked = call()
    message = {"role": "assistant", "content": "a"}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    body = msgspec.json.encode({"id": "chatcmpl-1", "choices": [choice], "usage": chat.USAGE})
    data, usage = over_chat(asked).answer(asked, body, upstream="up")
    assert usage == Usage(100, 20, 60, 10, 5)
    assert msgspec.json.decode(data) == {
        "candidates": [{"content": {"parts": [{"text": "a"}], "role": "model"}, "finishReason": expected, "index": 0}],
        "usageMetadata": COUNTED,
        "modelVersion": "up/m",
        "responseId": "1",
    }


def test_a_call_that_was_cut_off() -> None:
    """It is left out."""
    out, reader = stream(chat.tool(0, "f", '{"x": "a', "call_a"), chat.chunk({}, "length"), chat.DONE)
    assert reader.complete
    [last] = decoded(out)
    assert last["candidates"][0]["finishReason"] == "MAX_TOKENS"


def test_streams_that_fail() -> None:
    """They never end as complete."""
    for pieces, kind in (
        ((chat.chunk({"content": "a"}),), Truncated),
        ((chat.chunk({"content": "a"}), chat.chunk({}, "error"), chat.DONE), ProtocolViolation),
        ((chat.tool(0, "f", "[]", "call_a"), chat.chunk({}, "stop"), chat.DONE), ProtocolViolation),
    ):
        out, reader = stream(*pieces)
        assert isinstance(reader.error, kind)
        assert b"finishReason" not in out
