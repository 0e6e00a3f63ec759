"""Ollama's format, as that of clients: its requests, and its answers over chat completions."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dialects.chat import DONE, chunk, tool, usage
from trigate.config.sections import UpstreamConfig, Url
from trigate.dialects.endpoints import OLLAMA_CHAT, OLLAMA_EMBED, OLLAMA_EMBEDDINGS, OLLAMA_GENERATE
from trigate.dialects.ollama import EmbedCall, OllamaClient, answer_without_upstream, encode_show, encode_tag
from trigate.dialects.ollama.answer import timestamp
from trigate.dialects.openai_chat import ChatUpstream
from trigate.dialects.stream import TranslatedStream
from trigate.dialects.translated_call import TranslatedCall
from trigate.errors import BadRequest, GatewayError, ProtocolViolation, Untranslatable
from trigate.openai.endpoints import Endpoint
from trigate.openai.request import Call, decode_call

PNG = "iVBORw0KGgoAAAANSUhEUg=="
LOCAL = UpstreamConfig(base_url=Url("http://127.0.0.1:8000/v1"))
OPENAI = UpstreamConfig(base_url=Url("https://api.openai.com/v1"))
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
START = 1_700_000_000_000_000_000


def call(endpoint: Endpoint = OLLAMA_CHAT, **fields: Any) -> Call:
    """Decodes a call; of the chat, one with a message."""
    body = {"model": "m:latest", **({"messages": HELLO} if endpoint is OLLAMA_CHAT else {}), **fields}
    return decode_call(endpoint, msgspec.json.encode(body))


def ticking() -> Callable[[], int]:
    """A clock on which a second passes whenever it is read."""
    return itertools.count(START + 10**9, 10**9).__next__


def translated(asked: Call) -> TranslatedCall:
    """A call over chat completions."""
    client = OllamaClient(asked.endpoint.path)
    return TranslatedCall(asked, client, ChatUpstream(), at=START / 10**9, clock=ticking())


def sent(asked: Call, upstream: UpstreamConfig = LOCAL, model: str = "m") -> tuple[dict[str, Any], tuple[str, ...]]:
    """What an upstream of chat completions gets for a call, and what is dropped."""
    made = translated(asked)
    body = msgspec.json.decode(made.body(asked, model, upstream))
    return body, made.dropped


def make_reader(asked: Call) -> TranslatedStream:
    """Makes the reader of a streamed answer."""
    return translated(asked).stream_reader(asked, upstream="up", max_event_bytes=100_000, keep_bytes=0, continues=None)


def lines_of(pieces: tuple[bytes, ...], asked: Call | None = None) -> list[Any]:
    """Translates a stream that has to be complete, and decodes its lines as careless clients find them."""
    reader = make_reader(asked or call())
    out = b"".join(map(reader.feed, pieces)) + reader.feed_end()
    assert reader.error is None
    assert reader.complete
    return [json.loads(line) for line in out.decode().splitlines()]


# -- requests ---------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_default() -> None:
    """Only ``stream: false`` gives a plain answer."""
    assert [call().stream, call(stream=True).stream, call(stream=None).stream] == [True, True, True]
    assert not call(stream=False).stream
    assert not call(OLLAMA_EMBED, input="a").stream


def test_options() -> None:
    """Those that have a place in the other format get there; Ollama's numbers for "no limit" are left out, and what is
    for the server that runs the model is dropped by name."""
    options = {"num_predict": 9.0, "temperature": 0, "top_p": 0.5, "top_k": 3, "seed": 7, "stop": "END"}
    body, dropped = sent(call(options={**options, "presence_penalty": 0.5, "num_ctx": 8192, "mirostat": None}))
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["top_k"]) == (9, 0, 0.5, 3)
    assert (body["seed"], body["stop"], body["presence_penalty"]) == (7, ["END"], 0.5)
    assert dropped == ("options.num_ctx",)
    body, dropped = sent(call(options={"num_predict": -1, "top_k": 0, "seed": -1, "stop": []}))
    assert not body.keys() & {"max_tokens", "top_k", "seed", "stop"}
    assert dropped == ()


def test_advisory_fields_are_dropped_by_name() -> None:
    """Also those that the upstream does not take; a field of a newer client does no harm."""
    body, dropped = sent(call(keep_alive="5m", truncate=True, brand_new=1, think=True, options={"top_k": 2}), OPENAI)
    assert dropped == ("brand_new", "keep_alive", "options.top_k", "think", "truncate")
    assert "reasoning_effort" not in body


@pytest.mark.parametrize(
    ("think", "effort", "wants"),
    [(None, None, True), (True, "medium", True), (False, "none", False), ("high", "high", True), ("max", "max", True)],
)
def test_think(think: object, effort: str | None, wants: bool) -> None:
    """It is the effort; without it, reasoning is part of the answer, as Ollama's models that think have it."""
    request, _ = OllamaClient("/api/chat").decode_request(call(think=think))
    assert (request.effort, request.wants_reasoning) == (effort, wants)


def test_format() -> None:
    """It is JSON of any shape, or a schema. A schema that leaves something open is not sent as a strict one, which
    OpenAI would refuse."""
    body, _ = sent(call(format="json"))
    assert body["response_format"] == {"type": "json_object"}
    closed = {"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False}
    for schema, is_strict in ((closed, True), ({"type": "object", "properties": {"a": closed}}, False)):
        body, _ = sent(call(format=schema))
        assert body["response_format"]["json_schema"] == {"name": "answer", "schema": schema, "strict": is_strict}
    assert "response_format" not in sent(call(format=""))[0]


def test_messages() -> None:
    """Pictures are in base64, tool calls have no ids, and a result says only its tool."""
    calls = [{"function": {"name": name, "arguments": {"n": at}}} for at, name in enumerate(("f", "g", "f"))]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What?", "images": [PNG]},
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_name": "g", "content": "of g"},
        {"role": "tool", "tool_name": "f", "content": "of f"},
        {"role": "tool", "tool_name": "f", "content": "of the other f", "images": [PNG]},
        {"role": "user", "content": "So?"},
    ]
    body, _ = sent(call(messages=messages, tools=[WEATHER]))
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    system, user, assistant, *results, media, last = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user == {"role": "user", "content": [{"type": "text", "text": "What?"}, url]}
    functions = [
        (each["id"], each["function"]["name"], each["function"]["arguments"]) for each in assistant["tool_calls"]
    ]
    assert functions == [("call_2_0", "f", '{"n":0}'), ("call_2_1", "g", '{"n":1}'), ("call_2_2", "f", '{"n":2}')]
    assert [(each["tool_call_id"], each["content"]) for each in results] == [
        ("call_2_0", "of f"),
        ("call_2_1", "of g"),
        ("call_2_2", "of the other f"),
    ]
    assert url in media["content"]
    assert last == {"role": "user", "content": "So?"}
    assert body["tools"] == [WEATHER]


def test_ids_that_a_client_sends() -> None:
    """They count: newer clients have them, and their results name them."""
    calls = [{"id": f"id_{at}", "function": {"name": "f", "arguments": "{}"}} for at in range(2)]
    results = [{"role": "tool", "tool_call_id": f"id_{at}", "content": f"{at}"} for at in (1, 0)]
    body, _ = sent(call(messages=[*HELLO, {"role": "assistant", "tool_calls": calls}, *results]))
    assert [each.get("tool_call_id") for each in body["messages"]] == [None, None, "id_0", "id_1"]


def test_generate() -> None:
    """It is a conversation of one message."""
    body, dropped = sent(call(OLLAMA_GENERATE, prompt="Hi", system="Be brief.", images=[PNG], suffix="", context=[]))
    assert [each["role"] for each in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"][0] == {"type": "text", "text": "Hi"}
    assert dropped == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "}"}, "suffix"),
        ({"raw": True}, "raw"),
        ({"context": [1, 2]}, "context"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"logprobs": True}, "logprobs"),
        ({"width": 8}, "width"),
    ],
)
def test_what_would_give_another_answer_is_refused(fields: dict[str, Any], param: str) -> None:
    """The error names the field."""
    with pytest.raises(Untranslatable) as caught:
        sent(call(OLLAMA_GENERATE, prompt="Hi", **fields))
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "tester", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "images": ["AAAA"]}]}, "messages[0].images[0]"),
        ({"messages": [{"role": "user", "images": [1]}]}, "messages[0].images[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "content": "Once"}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}, *HELLO]}, "messages[0].tool_calls[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"function": {"name": ""}}]}, "tools[0].function.name"),
        ({"options": []}, None),
        ({"options": "x"}, "options"),
        ({"options": {"num_predict": 1.5}}, "options.num_predict"),
        ({"options": {"temperature": "hot"}}, "options.temperature"),
        ({"options": {"stop": [1]}}, "options.stop"),
        ({"think": "hard"}, "think"),
        ({"format": "yaml"}, "format"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_malformed_requests(fields: dict[str, Any], param: str | None) -> None:
    """The error names the field; an empty list is as good as an empty object."""
    if param is None:
        sent(call(**fields))
        return
    with pytest.raises(BadRequest) as caught:
        sent(call(**fields))
    assert caught.value.param == param
    assert param in caught.value.message


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=3)
    | st.sampled_from(["user", "tool", "assistant", PNG]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "images", "tool_calls", "function", "name", "arguments", "x"]), inner
        )
    ),
    max_leaves=12,
)


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(["messages", "tools", "options", "format", "think", "keep_alive"]), _JSON))
def test_any_request_is_sent_or_refused(fields: dict[str, Any]) -> None:
    """No JSON ends in another error."""
    asked = call(**fields)
    if answer_without_upstream(asked, START) is not None:
        return
    with contextlib.suppress(BadRequest):
        sent(asked)


def test_a_load() -> None:
    """A call without a message or a prompt is answered here; with ``keep_alive: 0``, it unloads the model."""
    answer = answer_without_upstream(call(messages=[]), START)
    assert answer is not None
    assert json.loads(answer) == {
        "model": "m:latest",
        "created_at": "2023-11-14T22:13:20.000000000Z",
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "load",
    }
    for keep_alive, reason in ((0, "unload"), ("0", "unload"), ("5m", "load"), (False, "load"), (-1, "load")):
        answer = answer_without_upstream(call(OLLAMA_GENERATE, keep_alive=keep_alive, prompt=""), START)
        assert answer is not None
        assert json.loads(answer) == {**json.loads(answer), "response": "", "done_reason": reason}
    assert answer_without_upstream(call(OLLAMA_EMBED, input=[]), START) == b'{"embeddings":[]}'
    for others in (call(), call(OLLAMA_GENERATE, images=[PNG]), call(OLLAMA_GENERATE, prompt=" "), call(messages=1)):
        assert answer_without_upstream(others, START) is None


# -- answers ----------------------------------------------------------------------------------------------------------

END = (chunk({}, "stop"), usage(), DONE)


def test_the_lines_of_a_text() -> None:
    """They are exactly these."""
    first, second, last = lines_of(
        (chunk({"role": "assistant"}), chunk({"content": "Hel"}), chunk({"content": "lo"}), *END)
    )
    assert first == {
        "model": "m:latest",
        "created_at": "2023-11-14T22:13:21.000000000Z",
        "message": {"role": "assistant", "content": "Hel"},
        "done": False,
    }
    assert second["message"]["content"] == "lo"
    assert last == {
        "model": "m:latest",
        "created_at": "2023-11-14T22:13:23.000000000Z",
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "stop",
        "total_duration": 3 * 10**9,
        "load_duration": 0,
        "prompt_eval_count": 100,
        "prompt_eval_duration": 10**9,
        "eval_count": 20,
        "eval_duration": 2 * 10**9,
    }


def test_reasoning_and_tool_calls() -> None:
    """Reasoning is ``thinking``; each call is whole, with its arguments as an object and its position."""
    pieces = (
        chunk({"reasoning_content": "Hm."}),
        chunk({"content": "So:"}),
        tool(0, "f", '{"x":', "call_a"),
        tool(1, "g", "", "call_b"),
        tool(0, arguments="\n[1.0]}"),
        chunk({}, "tool_calls"),
        usage(),
        DONE,
    )
    found = [line["message"] for line in lines_of(pieces)]
    calls = [{"id": "call_a", "function": {"index": 0, "name": "f", "arguments": {"x": [1.0]}}}]
    assert found[:3] == [
        {"role": "assistant", "content": "", "thinking": "Hm."},
        {"role": "assistant", "content": "So:"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    assert found[3]["tool_calls"] == [{"id": "call_b", "function": {"index": 1, "name": "g", "arguments": {}}}]
    hidden = lines_of(pieces, call(think=False))
    assert not any("thinking" in line["message"] for line in hidden)


def test_a_call_that_was_cut() -> None:
    """It is left out, and the reason says that something is missing."""
    *_, last = found = lines_of((tool(0, "f", '{"x":', "call_a"), chunk({}, "length"), usage(), DONE))
    assert last["done_reason"] == "length"
    assert not any("tool_calls" in line["message"] for line in found)


def test_generate_lines() -> None:
    """They have a ``response`` in place of a message."""
    pieces = (chunk({"reasoning": "Hm."}), chunk({"content": "Hi"}), *END)
    think, text, last = lines_of(pieces, call(OLLAMA_GENERATE, prompt="a"))
    assert (think["response"], think["thinking"]) == ("", "Hm.")
    assert (text["response"], text["done"]) == ("Hi", False)
    assert (last["response"], last["done_reason"], last["eval_count"]) == ("", "stop", 20)


def test_a_line_has_one_end() -> None:
    """Clients split at every character that Unicode calls the end of a line."""
    [text, tool_line, _] = lines_of(
        (chunk({"content": "a\u2028b\u2029c\u0085d"}), tool(0, "f", '{"a": "\u2028"}', "i"), *END)
    )
    assert text["message"]["content"] == "a\u2028b\u2029c\u0085d"
    assert tool_line["message"]["tool_calls"][0]["function"]["arguments"] == {"a": "\u2028"}


@pytest.mark.parametrize(
    ("reason", "told"), [("stop", "stop"), ("length", "length"), ("content_filter", "content_filter")]
)
def test_reasons(reason: str, told: str) -> None:
    """Each reason of an end has a word."""
    *_, last = lines_of((chunk({"content": "a"}), chunk({}, reason), usage(), DONE))
    assert last["done_reason"] == told


def test_counts_that_nobody_counted() -> None:
    """They are estimates, and not 0."""
    *_, last = lines_of((chunk({"content": "a word or two"}), chunk({}, "stop"), DONE))
    assert last["eval_count"] > 0
    assert last["prompt_eval_count"] > 0


def test_a_plain_answer_is_the_same() -> None:
    """It has the same content as the lines; the time until the first content is not known."""
    function = {"name": "f", "arguments": '{"x": 1}'}
    message = {"content": "Hi", "reasoning": "Hm.", "tool_calls": [{"id": "call_a", "function": function}]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    asked = call(stream=False)
    made = translated(asked)
    body = msgspec.json.encode({"id": "x", "choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 4}})
    out, counted = made.answer(asked, body, upstream="up")
    assert counted is not None
    assert counted[:2] == (3, 4)
    answer = json.loads(out)
    assert answer["message"] == {
        "role": "assistant",
        "content": "Hi",
        "thinking": "Hm.",
        "tool_calls": [{"id": "call_a", "function": {"index": 0, "name": "f", "arguments": {"x": 1}}}],
    }
    assert (answer["done"], answer["done_reason"], answer["prompt_eval_count"], answer["eval_count"]) == (
        True,
        "stop",
        3,
        4,
    )
    assert answer["total_duration"] == answer["eval_duration"] == 10**9
    assert "prompt_eval_duration" not in answer


EVERYTHING = (
    chunk({"reasoning_content": "Hm.\u2028"}),
    chunk({"content": "Grüße 🌍"}),
    tool(0, "f", '{"x": [1]}', "call_a"),
    chunk({}, "tool_calls"),
    usage(),
    DONE,
)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_every_split_gives_the_same(size: int) -> None:
    """However the bytes of the upstream arrive."""
    body = b"".join(EVERYTHING)
    pieces = tuple(body[at : at + size] for at in range(0, len(body), size))
    assert lines_of(pieces) == lines_of((body,))


@given(st.lists(st.sampled_from([*EVERYTHING[:-1], b"data: {}\n\n", b"data: [1]\n\n", b"data: \xff\n\n"]), max_size=8))
def test_a_stream_without_an_end_is_never_complete(pieces: list[bytes]) -> None:
    """Whatever comes before."""
    reader = make_reader(call())
    try:
        out = b"".join(map(reader.feed, pieces))
    except GatewayError:
        raise AssertionError("errors are attributes here") from None
    reader.feed_end()
    assert b'"done":true' not in out
    assert reader.error is not None or reader.all_finished


# -- embeddings -------------------------------------------------------------------------------------------------------


def embedded(asked: Call, data: list[Any], **fields: Any) -> Any:
    """Translates an answer of OpenAI's format to a call."""
    made = EmbedCall(asked, ticking())
    out, _ = made.answer(asked, msgspec.json.encode({"data": data, **fields}), upstream="up")
    return json.loads(out)


def test_embed() -> None:
    """Several texts get a vector each, in their order."""
    asked = call(OLLAMA_EMBED, input=["a", "b"], dimensions=2, truncate=True, keep_alive=0, options={"num_ctx": 1})
    made = EmbedCall(asked, ticking())
    assert (made.path(asked, "e"), made.dropped) == ("/embeddings", ("keep_alive", "options", "truncate"))
    assert msgspec.json.decode(made.body(asked, "e", LOCAL)) == {
        "model": "e",
        "input": ["a", "b"],
        "dimensions": 2,
        "encoding_format": "float",
    }
    rows = [{"index": 1, "embedding": [2.5]}, {"index": 0, "embedding": [1.0]}]
    answer = embedded(asked, rows, usage={"prompt_tokens": 2, "total_tokens": 2})
    assert answer == {
        "model": "m:latest",
        "embeddings": [[1.0], [2.5]],
        "total_duration": 10**9,
        "load_duration": 0,
        "prompt_eval_count": 2,
    }


def test_embeddings() -> None:
    """The older path has one text and one vector."""
    asked = call(OLLAMA_EMBEDDINGS, prompt="a")
    assert msgspec.json.decode(EmbedCall(asked, ticking()).body(asked, "e", LOCAL))["input"] == "a"
    assert embedded(asked, [{"embedding": [1.5]}]) == {"embedding": [1.5]}


@pytest.mark.parametrize(
    "data",
    [[], [{"index": 1, "embedding": [1]}], [{"index": 0, "embedding": "AAAA"}], [None], [{"embedding": [1]}] * 2],
)
def test_embeddings_that_are_none(data: list[Any]) -> None:
    """A text without a vector is an error, and not a shorter list."""
    with pytest.raises(ProtocolViolation):
        embedded(call(OLLAMA_EMBED, input="a"), data)


@pytest.mark.parametrize(
    ("endpoint", "fields"), [(OLLAMA_EMBED, {"input": [1]}), (OLLAMA_EMBEDDINGS, {"prompt": ["a"]})]
)
def test_embeddings_of_something_else(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    """The error names the field."""
    with pytest.raises(BadRequest) as caught:
        EmbedCall(call(endpoint, **fields), ticking()).body(call(endpoint, **fields), "e", LOCAL)
    assert caught.value.param in fields


# -- models -----------------------------------------------------------------------------------------------------------


def test_models() -> None:
    """A name has a tag, and what a model can do is said as far as it is known."""
    fields = {
        "context_length": 8192,
        "supported_parameters": ["tools"],
        "architecture": {"input_modalities": ["image"]},
    }
    entry = encode_tag("or/a:free", fields, "2026-01-01T00:00:00Z")
    assert (entry["name"], entry["model"]) == ("or/a:free", "or/a:free")
    assert entry["details"]["context_length"] == 8192
    assert entry["capabilities"] == ["completion", "tools", "vision"]
    assert len(entry["digest"]) == 64
    shown = encode_show("gpt", fields, "2026-01-01T00:00:00Z")
    architecture = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{architecture}.context_length"] == 8192
    assert not any(name.endswith("context_length") for name in encode_show("gpt", {}, "")["model_info"])


def test_times() -> None:
    """Leap days and the ends of years are where they belong."""
    for seconds, told in ((951_782_400, "2000-02-29"), (1_735_689_599, "2024-12-31"), (1_735_689_600, "2025-01-01")):
        assert timestamp(seconds * 10**9).startswith(told)
