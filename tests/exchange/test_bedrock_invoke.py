"""Calls in Anthropic's format to its models at Bedrock: the envelope of requests, and the framing of streams."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest

from tests.dialects.chat import mark_of
from tests.dialects.event_stream import frame
from tests.support.asgi_client import ClientCall
from tests.support.gateway import OpenApp, make_config
from tests.support.provider import Break, Head, Provider, Say, Script, Served, answers
from trigate.dialects.bedrock.framing import EVENT_STREAM

MODEL = "eu.anthropic.claude-opus-4-6-v1"
HEAD = Head(content_type=EVENT_STREAM)
MESSAGE = {"id": "msg_bdrk_1", "type": "message", "role": "assistant", "model": "claude-opus-4-6", "content": []}


def chunk(kind: str, **fields: Any) -> bytes:
    """Makes an event of Anthropic's in AWS's framing."""
    event = base64.b64encode(msgspec.json.encode({"type": kind, **fields})).decode()
    return frame("chunk", {"bytes": event, "p": "abcdef"})


START = chunk(
    "message_start",
    message={**MESSAGE, "usage": {"input_tokens": 3, "cache_read_input_tokens": 40, "output_tokens": 1}},
)
TEXT = (
    chunk("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    chunk("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hello"}, new_field=[1.0]),
    chunk("content_block_stop", index=0),
)
END = (
    chunk("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 12}),
    chunk("message_stop", **{"amazon-bedrock-invocationMetrics": {"inputTokenCount": 43, "outputTokenCount": 12}}),
)
STREAM: Script = (HEAD, *[Say(each) for each in (START, *TEXT, *END)])


def claude(**settings: Any) -> Any:  # Any: a Config
    """The upstream ``up`` at Bedrock, with a model of Anthropic's."""
    table = {"kind": "bedrock", "region": "eu-central-1", "api_key": "bedrock-api-key", "models": [MODEL], **settings}
    return make_config({"up": table})


async def answered(
    open_app: OpenApp,
    script: Script,
    *,
    config: Any = None,  # Any: a Config
    headers: dict[str, str] | None = None,
    path: str = "/v1/messages",
    **fields: Any,
) -> tuple[ClientCall, Served]:
    """Makes a call; returns it, and what the provider got."""
    body = {"model": MODEL, "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "Hi"}], **fields}
    async with open_app(config or claude(), Provider(script)) as served:
        call = await served.client.start("POST", path, body, headers=headers or {}).wait()
        served.assert_clean()
        [sent] = served.providers["up"].calls
        return call, sent


async def test_a_stream(open_app: OpenApp) -> None:
    """The client gets Anthropic's own events, with the public model id; the request has Bedrock's envelope."""
    call, sent = await answered(
        open_app, STREAM, system=[{"type": "text", "text": "a", "cache_control": {"type": "x"}}]
    )
    assert sent.target == f"/model/{MODEL}/invoke-with-response-stream"
    assert sent.json == {
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "Hi"}],
        "system": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}],
        "anthropic_version": "bedrock-2023-05-31",
    }
    assert call.status == 200
    events = [part.split(b"\ndata: ") for part in call.body.removesuffix(b"\n\n").split(b"\n\n")]
    values = [msgspec.json.decode(data) for _, data in events]
    assert [name.removeprefix(b"event: ").decode() for name, _ in events] == [value["type"] for value in values]
    assert values[0]["message"]["model"] == MODEL
    assert values[2] == {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": "Hello"},
        "new_field": [1.0],
    }
    assert values[-1]["type"] == "message_stop"


async def test_a_plain_answer(open_app: OpenApp) -> None:
    """It is Anthropic's, with the public model id."""
    answer = {
        **MESSAGE,
        "content": [{"type": "thinking", "thinking": "a", "signature": "sig"}, {"type": "text", "text": "b"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 3, "output_tokens": 1},
    }
    call, sent = await answered(open_app, answers(json.dumps(answer).encode()), stream=False)
    assert sent.target == f"/model/{MODEL}/invoke"
    assert call.json == {**answer, "model": MODEL}


async def test_only_known_betas_and_fields_are_sent(open_app: OpenApp) -> None:
    """Bedrock refuses all others; those that were dropped are named."""
    beta = "claude-code-20250219, interleaved-thinking-2025-05-14,context-management-2025-06-27"
    edits = {"edits": [{"type": "clear_thinking_20251015"}]}
    call, sent = await answered(
        open_app, STREAM, headers={"anthropic-beta": beta}, context_management=edits, speed="fast", tags=["a"]
    )
    assert sent.json["anthropic_beta"] == ["interleaved-thinking-2025-05-14"]
    assert "anthropic-beta" not in sent.headers
    assert "anthropic-version" not in sent.headers
    assert sorted(sent.json) == ["anthropic_beta", "anthropic_version", "max_tokens", "messages"]
    assert call.header("x-trigate-dropped").split(",") == [
        "anthropic-beta:claude-code-20250219",
        "anthropic-beta:context-management-2025-06-27",
        "context_management",
        "speed",
        "tags",
    ]
    config = claude(betas=["context-management-2025-06-27"])
    _, sent = await answered(
        open_app, STREAM, config=config, headers={"anthropic-beta": beta}, context_management=edits
    )
    assert sent.json["anthropic_beta"] == ["context-management-2025-06-27"]
    assert sent.json["context_management"] == edits


async def test_tools_whose_schema_is_loaded_later(open_app: OpenApp) -> None:
    """They are left out, since only Anthropic loads them."""
    tools = [
        {"name": "a", "input_schema": {}, "defer_loading": True},
        {"name": "b", "input_schema": {}, "defer_loading": False},
    ]
    call, sent = await answered(open_app, STREAM, tools=tools)
    assert sent.json["tools"] == [{"name": "b", "input_schema": {}}]
    assert call.header("x-trigate-dropped") == "tools.defer_loading"


async def test_a_message_of_the_system_s(open_app: OpenApp) -> None:
    """It becomes a text of the user's; the other messages stay as they are."""
    messages = [
        {"role": "user", "content": "a"},
        {"role": "system", "content": [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "", "signature": "sig"}]},
        {"role": "system", "content": "c"},
    ]
    _, sent = await answered(open_app, STREAM, messages=messages)
    assert sent.json["messages"] == [
        messages[0],
        {
            "role": "user",
            "content": [
                {
                    "type": "text",
                    "text": "<system-message>\nb\n</system-message>",
                    "cache_control": {"type": "ephemeral"},
                }
            ],
        },
        messages[2],
        {"role": "user", "content": [{"type": "text", "text": "<system-message>\nc\n</system-message>"}]},
    ]


async def test_reasoning_of_another_provider_is_removed(open_app: OpenApp) -> None:
    """Anthropic's models refuse what they have not signed."""
    own = {"type": "thinking", "thinking": "a", "signature": mark_of("a")}
    text = {"type": "text", "text": "b"}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [own, text]}]
    _, sent = await answered(open_app, STREAM, messages=[*messages, {"role": "user", "content": "c"}])
    assert sent.json["messages"][1]["content"] == [text]


async def test_effort_of_an_older_model(open_app: OpenApp) -> None:
    """It does not know the field, which is advisory; a schema is not."""
    old = "anthropic.claude-3-7-sonnet-20250219-v1:0"
    config = claude(models=[old])
    call, sent = await answered(open_app, STREAM, config=config, model=old, output_config={"effort": "high"})
    assert "output_config" not in sent.json
    assert call.header("x-trigate-dropped") == "output_config"
    form = {"format": {"type": "json_schema", "schema": {}}}
    _, sent = await answered(open_app, STREAM, config=config, model=old, output_config=form)
    assert sent.json["output_config"] == form


async def test_a_guardrail(open_app: OpenApp) -> None:
    """It is named in header fields."""
    _, sent = await answered(open_app, STREAM, config=claude(guardrail="ab12:3"))
    assert sent.headers["x-amzn-bedrock-guardrailidentifier"] == "ab12"
    assert sent.headers["x-amzn-bedrock-guardrailversion"] == "3"


async def test_other_clients_come_by_converse(open_app: OpenApp) -> None:
    """A call in another format to the same model is translated."""
    message = {"role": "assistant", "content": [{"text": "Hello"}]}
    usage = {"inputTokens": 3, "outputTokens": 1, "totalTokens": 4}
    answer = {"output": {"message": message}, "stopReason": "end_turn", "usage": usage}
    script = answers(json.dumps(answer).encode())
    call, sent = await answered(open_app, script, path="/v1/chat/completions", stream=False)
    assert sent.target == f"/model/{MODEL}/converse"
    assert call.json["choices"][0]["message"]["content"] == "Hello"


async def test_events_that_are_written_otherwise(open_app: OpenApp) -> None:
    """Another order of the fields, blanks and line ends in the JSON change nothing."""

    def spaced(framed: bytes) -> bytes:
        payload = msgspec.json.decode(framed[framed.index(b'{"bytes"') : -4])
        event = json.dumps(msgspec.json.decode(base64.b64decode(payload["bytes"])), indent=1).encode()
        return frame("chunk", {"p": "ab", "bytes": base64.b64encode(event).decode()})

    call, _ = await answered(open_app, (HEAD, *[Say(spaced(each)) for each in (START, *TEXT, *END)]))
    whole, _ = await answered(open_app, STREAM)
    assert [msgspec.json.decode(part.split(b"data: ")[1]) for part in call.body.split(b"\n\n") if part] == [
        msgspec.json.decode(part.split(b"data: ")[1]) for part in whole.body.split(b"\n\n") if part
    ]


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "status"),
    [
        ("throttlingException", "rate_limit_error", 429),
        ("validationException", "invalid_request_error", 400),
        ("serviceUnavailableException", "overloaded_error", 529),
        ("modelStreamErrorException", "api_error", 502),
    ],
)
async def test_an_exception_within_the_stream(open_app: OpenApp, name: str, kind: str, status: int) -> None:
    """After the first content, it is an error event; before it, a status."""
    exception = frame(name, {"message": "It broke."}, kind="exception")
    call, _ = await answered(open_app, (HEAD, Say(START + b"".join(TEXT[:2])), Say(exception)))
    assert call.status == 200
    [*_, error] = call.body.removesuffix(b"\n\n").split(b"\n\n")
    assert error.startswith(b"event: error\n")
    assert b"It broke." in error
    assert b"message_stop" not in call.body
    call, _ = await answered(open_app, (HEAD, Say(START), Say(exception)))
    assert (call.status, call.json["error"]["message"]) == (status, "It broke.")
    assert call.json["error"]["type"] == kind


@pytest.mark.parametrize(
    "broken",
    [
        frame("chunk", {"bytes": "%%%"}),
        frame("chunk", {"bytes": base64.b64encode(b"not JSON").decode()}),
        frame("chunk", {}),
        frame("chunk", [1]),
        frame("chunk", {"bytes": "e30="})[:-1] + b"x",
    ],
)
async def test_a_broken_message(open_app: OpenApp, broken: bytes) -> None:
    """The stream ends with an error, whatever follows; what came before stays."""
    call, _ = await answered(open_app, (HEAD, Say(START + b"".join(TEXT)), Say(broken + b"".join(END))))
    assert b"Hello" in call.body
    assert b"sent a broken stream" in call.body
    assert b"message_stop" not in call.body


@pytest.mark.parametrize("rest", [b"", END[0], END[0] + END[1][:40]])
async def test_a_cut_stream(open_app: OpenApp, rest: bytes) -> None:
    """A connection that breaks off is no end."""
    call, _ = await answered(open_app, (HEAD, Say(START + b"".join(TEXT) + rest), Break()))
    assert b"event: error" in call.body
    assert b"message_stop" not in call.body


async def test_a_stream_in_pieces(open_app: OpenApp) -> None:
    """The events are the same, however the bytes are cut."""
    data = b"".join((START, *TEXT, *END))
    whole, _ = await answered(open_app, STREAM)
    for size in (13, 64, 1000):
        pieces = [Say(data[at : at + size]) for at in range(0, len(data), size)]
        call, _ = await answered(open_app, (HEAD, *pieces))
        assert call.body == whole.body
