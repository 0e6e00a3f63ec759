"""The Claude Code command line against a real gateway: over chat completions, and over Anthropic's format as it is.

Claude Code answers some failures with several more requests. The tests count those that reach the upstream.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import events
from tests.support.command_lines import MODULES, NODE, run
from tests.support.processes import Gateway, run_gateway
from tests.support.queued_upstream import Answer, QueuedUpstream, error, open_queued_upstream, open_tap, stream

CLAUDE = MODULES / "@anthropic-ai/claude-code/cli-wrapper.cjs"
KEY = "a-key-of-the-gateway"
COMMAND = json.dumps({"command": "echo kumquat-$((6*7))", "description": "says a word"})

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NODE is None, reason="there is no Node here"),
    pytest.mark.skipif(
        not CLAUDE.exists(),
        reason="there is no tests/node-cli/node_modules: ./scripts/test (or `npm ci` in tests/node-cli) makes it",
    ),
]


# -- chat completions -------------------------------------------------------------------------------------------------


def chunk(delta: dict[str, Any] | None = None, reason: str | None = None) -> bytes:
    """An event of chat completions."""
    choice = {"index": 0, "delta": delta or {}, "finish_reason": reason}
    return b"data: " + json.dumps({"id": "chatcmpl-1", "choices": [choice]}).encode() + b"\n\n"


def call_of_bash(arguments: str) -> bytes:
    """An event with a tool call."""
    function = {"name": "Bash", "arguments": arguments}
    return chunk({"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]})


CHAT_TEXT = (chunk({"role": "assistant", "content": "It said "}), chunk({"content": "it."}), chunk({}, "stop"))
CHAT_TOOL = (chunk({"role": "assistant", "reasoning_content": "I look."}), call_of_bash(COMMAND))
CHAT_ERROR = {"error": {"message": "boom", "type": "server_error"}}
CHAT_LONG = {
    "error": {
        "message": "This model's maximum context length is 200000 tokens. However, you requested 250000 tokens.",
        "code": "context_length_exceeded",
    }
}


# -- Messages ---------------------------------------------------------------------------------------------------------


def named(kind: str, **fields: Any) -> bytes:
    """An event of Anthropic's format."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def block(index: int, content: dict[str, Any], *deltas: dict[str, Any]) -> bytes:
    """The events of a whole block."""
    start = named("content_block_start", index=index, content_block=content)
    pieces = [named("content_block_delta", index=index, delta=delta) for delta in deltas]
    return b"".join((start, *pieces, named("content_block_stop", index=index)))


def end(reason: str) -> bytes:
    """The last events."""
    delta = {"stop_reason": reason, "stop_sequence": None}
    return named("message_delta", delta=delta, usage={"output_tokens": 9}) + named("message_stop")


USAGE = {"input_tokens": 3, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0, "output_tokens": 1}
MESSAGE: dict[str, Any] = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": []}
START = named("message_start", message={**MESSAGE, "stop_reason": None, "stop_sequence": None, "usage": USAGE})
TEXT = block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": "It said it."})
OPEN_TEXT = TEXT[: TEXT.index(b"event: content_block_stop")]
NATIVE_TEXT = (START, TEXT, end("end_turn"))
NATIVE_TOOL = (
    START,
    block(
        0,
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "I look."},
        {"type": "signature_delta", "signature": "EqQBCgIYAhIM=="},
    ),
    block(
        1,
        {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {}},
        {"type": "input_json_delta", "partial_json": COMMAND},
    ),
    end("tool_use"),
)
OVERLOADED = named("error", error={"type": "overloaded_error", "message": "Overloaded"})
NATIVE_LONG = {
    "type": "error",
    "error": {"type": "invalid_request_error", "message": "prompt is too long: 250000 tokens > 200000 maximum"},
}


# -- what the upstream answers again and again, and how many requests it gets -----------------------------------------

FAILURES: dict[str, tuple[Answer, int, str]] = {
    "up/500": (error(500, CHAT_ERROR), 1, "boom"),
    "up/503": (error(503, CHAT_ERROR), 1, "boom"),
    "up/429": (error(429, CHAT_ERROR), 3, "boom"),  # the gateway's own attempts
    "up/cut": (stream(chunk({"content": "Hel"}), b"", is_cut=True), 1, "truncated"),
    "up/cut-thinking": (stream(chunk({"reasoning_content": "Hm"}), b"", is_cut=True), 1, "truncated"),
    "up/cut-call": (stream(call_of_bash('{"comm'), b"", is_cut=True), 2, "truncated"),
    "up/error": (stream(chunk({"content": "Hel"}), events.event(CHAT_ERROR)), 1, "boom"),
    "up/long": (error(400, CHAT_LONG), 1, "Prompt is too long"),
    "native/500": (error(500, NATIVE_LONG | {"error": {"type": "api_error", "message": "boom"}}), 1, "boom"),
    "native/529": (error(529, NATIVE_LONG | {"error": {"type": "overloaded_error", "message": "boom"}}), 1, "boom"),
    "native/429": (error(429, NATIVE_LONG | {"error": {"type": "rate_limit_error", "message": "boom"}}), 3, "boom"),
    "native/cut": (stream(START + OPEN_TEXT, b"", is_cut=True), 2, "truncated"),
    "native/cut-between": (stream(START + TEXT, b"", is_cut=True), 1, "truncated"),
    "native/error": (stream(START + OPEN_TEXT, OVERLOADED), 2, ""),
    "native/long": (error(400, NATIVE_LONG), 1, "Prompt is too long"),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, QueuedUpstream]]:
    """A gateway with a key, and the upstream behind it, which it knows by two formats."""
    models: dict[str, list[str]] = {"up": ["tool"], "native": ["tool"]}
    for each in FAILURES:
        name, _, model = each.partition("/")
        models[name].append(model)
    with open_queued_upstream() as upstream:
        config = f"""
            [breaker]
            failures = 0
            failure_rate = 0
            [keys]
            tests = "{KEY}"
            [upstreams.up]
            base_url = "{upstream.url}/v1"
            models = {json.dumps(models["up"])}
            [upstreams.native]
            kind = "anthropic"
            api_key = "key-of-the-upstream"
            base_url = "{upstream.url}/v1"
            models = {json.dumps(models["native"])}
            """
        with run_gateway(config, tmp_path_factory.mktemp("gateway")) as gateway:
            yield gateway, upstream
            assert gateway.process.poll() is None, gateway.log()
            assert "[error" not in gateway.log(), gateway.log()


def claude(url: str, home: Path, model: str, **variables: str) -> dict[str, Any]:
    """Runs one prompt; returns its result."""
    ended = run(
        CLAUDE,
        ["-p", "Run the command.", "--output-format", "json", "--model", model, "--allowedTools", "Bash"],
        home=home,
        timeout_s=60,
        ANTHROPIC_BASE_URL=url,
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        **(variables or {"ANTHROPIC_AUTH_TOKEN": KEY}),
    )
    lines = [line for line in ended.output.splitlines() if line.startswith('{"')]
    assert lines, ended.output
    result: dict[str, Any] = json.loads(lines[0])
    return result


def test_one_prompt_with_one_tool_call(served: tuple[Gateway, QueuedUpstream], tmp_path: Path) -> None:
    """Translated: Claude Code runs the command, and the upstream gets its result and its own reasoning back."""
    gateway, upstream = served
    upstream.play(
        stream(*CHAT_TOOL, chunk({}, "tool_calls"), b"data: [DONE]\n\n"), stream(*CHAT_TEXT, b"data: [DONE]\n\n")
    )
    result = claude(gateway.url, tmp_path, "up/tool")
    assert (result["is_error"], result["result"], result["num_turns"]) == (False, "It said it.", 2)
    first, second = upstream.calls
    assert {call.path for call in upstream.calls} == {"/v1/chat/completions"}
    assert not [name for name in first.headers if name.startswith("anthropic-")]
    assert b"x-anthropic-billing-header" not in first.body
    assert {message["role"] for message in first.json["messages"][1:]} == {"user"}
    made, answered = second.json["messages"][-2:]
    assert (made["tool_calls"][0]["id"], made["reasoning_content"]) == ("call_1", "I look.")
    assert answered == {"role": "tool", "tool_call_id": "call_1", "content": "kumquat-42"}
    assert second.json["messages"][:-2] == first.json["messages"], "the beginning stays: a provider's cache has it"


def test_as_it_is(served: tuple[Gateway, QueuedUpstream], tmp_path: Path) -> None:
    """Untranslated: each body reaches the upstream byte for byte but for the model id, with all of Anthropic's headers,
    its billing block and its signatures, and with another key."""
    gateway, upstream = served
    upstream.play(stream(*NATIVE_TOOL), stream(*NATIVE_TEXT))
    with open_tap(gateway.url) as (url, asked):
        result = claude(url, tmp_path, "native/tool", ANTHROPIC_API_KEY=KEY)
    assert (result["is_error"], result["result"], result["num_turns"]) == (False, "It said it.", 2)
    assert len(asked) == len(upstream.calls) == 2
    for given, sent in zip(asked, upstream.calls, strict=True):
        assert given.body.count(b'"model":"native/tool"') == 1
        assert sent.body == given.body.replace(b'"model":"native/tool"', b'"model":"tool"')
        own = {name: value for name, value in given.headers.items() if name.startswith("anthropic-")}
        assert "anthropic-beta" in own
        assert {name: value for name, value in sent.headers.items() if name.startswith("anthropic-")} == own
        assert (given.headers["x-api-key"], sent.headers["x-api-key"]) == (KEY, "key-of-the-upstream")
        assert b"x-anthropic-billing-header" in sent.body
    assert b"EqQBCgIYAhIM==" in upstream.calls[1].body


@pytest.mark.parametrize("model", FAILURES)
def test_failures(served: tuple[Gateway, QueuedUpstream], tmp_path: Path, model: str) -> None:
    """The upstream gets no more requests than cannot be avoided, and Claude Code says what happened."""
    gateway, upstream = served
    answer, requests, words = FAILURES[model]
    upstream.play(answer)
    result = claude(gateway.url, tmp_path, model)
    assert result["is_error"]
    assert words in result["result"]
    assert len(upstream.calls) == requests


@pytest.mark.parametrize("variable", ["ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"])
def test_a_wrong_key(served: tuple[Gateway, QueuedUpstream], tmp_path: Path, variable: str) -> None:
    """It is told after one request."""
    gateway, _ = served
    with open_tap(gateway.url) as (url, asked):
        result = claude(url, tmp_path, "up/tool", **{variable: "wrong"})
    assert (result["is_error"], result["api_error_status"]) == (True, 401)
    assert len(asked) == 1
