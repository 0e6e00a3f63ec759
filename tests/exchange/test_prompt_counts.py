"""Prompts whose tokens are not reported, and which their upstream counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.gateway import OpenApp, OpenServer, Served, make_config
from tests.support.logs import Logs
from tests.support.provider import (
    DONE,
    Break,
    Head,
    Provider,
    Refuse,
    Say,
    Script,
    Stall,
    answers,
    content,
    open_socket_provider,
    usage,
)
from tests.support.provider import Served as Received
from trigate.exchange import prompt_counts
from trigate.openai.token_estimate import MOST_QUICK_BYTES

SILENT = (Say(content("a")), Say(content("b")), Say(DONE))
VLLM = answers(b'{"count":90,"max_model_len":4096,"tokens":[1,2],"token_strs":null}')
LLAMA = answers(b'{"object":"response.input_tokens","input_tokens":90}')
ABSENT = answers(b'{"error":{"message":"Not Found"}}', status=404)
COUNTS = {"count_tokens": True}
GEMINI_CUT = (Say(b'data: {"candidates":[{"content":{"parts":[{"text":"a"}],"role":"model"}}]}\r\n\r\n'), Break())


class Counting(Provider):
    """A provider with other scripts at some paths."""

    def __init__(self, script: Script, at: Mapping[str, Script]) -> None:
        super().__init__(script)
        self.at = dict(at)

    def begin(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[Received, Script]:
        call, script = super().begin(method, path, headers, body)
        return call, self.at.get(path, script)

    @property
    def asked(self) -> list[str]:
        """The paths at which it was asked to count."""
        return [call.path for call in self.calls if call.path in self.at]


async def estimate_of(served: Served, path: str = "/v1/chat/completions", **fields: Any) -> int:
    """Makes a call and returns how many tokens its record says that its prompt has; what is counted has been then."""
    await served.client.start("POST", path, body_of(**fields)).wait()
    await wait_all_tasks_blocked()
    record = served.settled[-1].record
    assert record.counted
    return int(record.prompt_tokens)


def body_of(**fields: Any) -> dict[str, Any]:
    return {"model": "up/m", "stream": True, "messages": [{"role": "user", "content": "Hi"}], **fields}


@pytest.mark.parametrize("form", ["vllm", "llama.cpp", "neither"])
async def test_tokenize(open_app: OpenApp, autojump_clock: MockClock, logs: Logs, form: str) -> None:
    """An upstream that never reports is asked beside its ``/v1``, and then as llama.cpp is; what has counted once is
    asked first. The next estimate is what was counted, and the call itself has the estimate from before."""
    others = {"/tokenize": VLLM if form == "vllm" else answers(b'{"tokens":[]}')}
    own = {"/v1/chat/completions/input_tokens": LLAMA if form != "neither" else ABSENT}
    provider = Counting(SILENT, others | own)
    tools = [{"type": "function", "function": {"name": "f"}}]
    async with open_app(make_config({"up": COUNTS}), provider) as served:
        first, second = [await estimate_of(served, tools=tools, temperature=0.5, max_tokens=9) for _ in range(2)]
        assert first != 90
        assert second == (first if form == "neither" else 90)
        expected = {
            "vllm": ["/tokenize"] * 2,
            "llama.cpp": ["/tokenize", *["/v1/chat/completions/input_tokens"] * 2],
            "neither": ["/tokenize", "/v1/chat/completions/input_tokens"],  # and then not for ten minutes
        }
        assert provider.asked == expected[form]
        [asked, *_] = [call for call in provider.calls if call.path == "/tokenize"]
        assert asked.json == {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": tools}
        assert len(logs.named("tokens_not_counted")) == (form == "neither")
        served.assert_clean()


async def test_a_text_as_the_prompt(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """llama.cpp takes the text under another name, and answers with the tokens."""
    provider = Counting(SILENT, {"/tokenize": answers(b'{"tokens":[5,6,7,8,9,10,11,12,13]}')})
    async with open_app(make_config({"up": COUNTS}), provider) as served:
        await estimate_of(served, "/v1/completions", messages=None, prompt="Hi")
        assert await estimate_of(served, "/v1/completions", messages=None, prompt="Hi") == 9
        [asked] = [call for call in provider.calls if call.path == "/tokenize"][:1]
        assert asked.json == {"model": "m", "prompt": "Hi"}


async def test_gemini(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Where the format has an endpoint for it, nothing is to be configured. What is counted is the translated call."""
    path = "/v1beta/models/m:countTokens"
    provider = Counting(GEMINI_CUT, {path: answers(b'{"totalTokens":90}')})
    async with open_app(make_config({"up": {"kind": "gemini", "models": ["m"]}}), provider) as served:
        assert await estimate_of(served) != 90
        assert await estimate_of(served) == 90
        [asked] = [call for call in provider.calls if call.path == path][:1]
        assert asked.json["generateContentRequest"]["model"] == "models/m"
        assert asked.json["generateContentRequest"]["contents"] == [{"parts": [{"text": "Hi"}], "role": "user"}]


async def test_anthropic(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Only the fields that count are sent, with the headers of the client that choose the format."""
    path = "/v1/messages/count_tokens"
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}}
    cut = (Say(f"event: content_block_delta\ndata: {json.dumps(delta)}\n\n".encode()), Break())
    provider = Counting(cut, {path: answers(b'{"input_tokens":90}')})
    headers = {"anthropic-beta": "b", "idempotency-key": "k", "traceparent": "t"}
    body = body_of(max_tokens=9, metadata={}, system="Be brief.")
    up = {"kind": "anthropic", "base_url": "http://up.invalid/v1", "models": ["m"]}
    async with open_app(make_config({"up": up}), provider) as served:
        for _ in range(2):
            await served.client.start("POST", "/v1/messages", body, headers=headers).wait()
            await wait_all_tasks_blocked()
        assert served.settled[-1].record.prompt_tokens == 90
        [asked] = [call for call in provider.calls if call.path == path][:1]
        assert asked.json == {"model": "m", "messages": body["messages"], "system": "Be brief."}
        assert asked.headers["anthropic-beta"] == "b"
        assert asked.headers["accept"] == "application/json"
        assert "idempotency-key" not in asked.headers
        assert "traceparent" not in asked.headers


@pytest.mark.parametrize(
    ("upstream", "script", "fields"),
    [
        ({}, SILENT, {}),  # nothing is known of servers of OpenAI's format
        ({"count_tokens": True}, (*SILENT[:-1], Say(usage(5, 2)), Say(DONE)), {}),  # it is reported
        ({"count_tokens": True}, (Refuse(),), {}),  # nothing has been used
        ({"count_tokens": True, "max_connections": 1}, SILENT, {}),  # a call might wait for it
        ({"count_tokens": True}, SILENT, {"user": "x" * MOST_QUICK_BYTES}),
    ],
)
async def test_what_is_not_counted(
    open_app: OpenApp, autojump_clock: MockClock, upstream: dict[str, Any], script: Script, fields: dict[str, Any]
) -> None:
    """Nobody has asked for it, it is not needed, or it would cost too much."""
    provider = Counting(script, {"/tokenize": VLLM})
    async with open_app(make_config({"up": upstream}), provider) as served:
        await served.client.chat(**fields).wait()
        await wait_all_tasks_blocked()
        assert not provider.asked


async def test_few_are_counted(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The first calls, and then one in 64."""
    provider = Counting(SILENT, {"/tokenize": VLLM})
    async with open_app(make_config({"up": COUNTS}), provider) as served:
        asked = []
        for call in range(1, 66):
            before = len(provider.asked)
            await estimate_of(served)
            if len(provider.asked) > before:
                asked.append(call)
        assert asked == [*range(1, 33), 64]


async def test_settling_does_not_wait(open_app: OpenApp, autojump_clock: MockClock, logs: Logs) -> None:
    """An exchange ends as soon as its answer has; four prompts are counted at a time, each for five seconds."""
    provider = Counting(SILENT, {"/tokenize": (Stall(),)})
    async with open_app(make_config({"up": COUNTS}), provider) as served:
        began = trio.current_time()
        for _ in range(6):
            await estimate_of(served)
        assert trio.current_time() == began
        assert len(served.settled) == 6
        assert len(provider.asked) == 4
        await trio.sleep(5.1)
        assert {call.ended for call in provider.calls if call.path == "/tokenize"} == {"closed"}
        [logged] = logs.named("tokens_not_counted")
        assert logged["upstream"] == "up"
        assert "5 s" in logged["error"]
        served.assert_clean()


@pytest.mark.parametrize(
    "failure", [answers(b"", status=500), answers(b"", status=429), (Refuse(),), (Head(), Break())]
)
async def test_a_failure(open_app: OpenApp, autojump_clock: MockClock, logs: Logs, failure: Script) -> None:
    """It is logged once, changes no estimate and no state of the upstream, and ends the counting for ten minutes."""
    provider = Counting(SILENT, {"/tokenize": failure})
    async with open_app(make_config({"up": COUNTS}), provider) as served:
        first = await estimate_of(served)
        assert await estimate_of(served) == first
        assert provider.asked == ["/tokenize"]
        assert served.gateway.generations.current.upstreams["up"].state == "up"
        await trio.sleep(601)
        await estimate_of(served)
        assert len(logs.named("tokens_not_counted")) == 1
        provider.at["/tokenize"] = VLLM
        await trio.sleep(601)
        await estimate_of(served)
        assert await estimate_of(served) == 90


async def test_a_defect(
    open_app: OpenApp, autojump_clock: MockClock, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends nothing but this count."""
    logs.expect_error("token_count_crashed")
    monkeypatch.setattr(prompt_counts, "decode_count", lambda body: 1 // 0)
    provider = Counting(SILENT, {"/tokenize": VLLM})
    async with open_app(make_config({"up": COUNTS}), provider) as served:
        assert await estimate_of(served) == await estimate_of(served)
        served.assert_clean()


async def test_a_count_keeps_its_upstream_open(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A reload closes it when the prompt has been counted; a gateway that closes does not wait for that."""
    provider = Counting(SILENT, {"/tokenize": (Stall(),)})
    async with open_app(make_config({"up": COUNTS}), provider) as served:
        await estimate_of(served)
        generation = served.gateway.generations.current
        served.gateway.reloader.request()
        await wait_all_tasks_blocked()
        assert generation.is_retired
        assert generation.exchanges == 1
        await trio.sleep(5.1)
        assert generation.exchanges == 0
        provider.at["/tokenize"] = (Stall(),)
        await estimate_of(served)
        assert provider.open_now == 1
        began = trio.current_time()
    assert provider.open_now == 0
    assert trio.current_time() - began < 5


async def test_over_a_socket(open_server: OpenServer) -> None:
    """The same over a real socket: the path is beside ``/v1``."""
    async with open_socket_provider(SILENT, VLLM, SILENT, VLLM) as (provider, url):
        config = make_config({"up": {"base_url": url, "models": ["m"], **COUNTS}})
        async with open_server(config) as (client, _):
            with trio.fail_after(5):
                for calls in (2, 4):
                    assert (await client.post("/v1/chat/completions", json=body_of())).status_code == 200
                    await provider.wait_until(lambda provider, calls=calls: len(provider.calls) == calls)  # type: ignore[misc]
                    await provider.wait_until(lambda provider: not provider.open_now)
                    await wait_all_tasks_blocked(0.01)
            [target] = (await client.get("/status")).json()["targets"]
    assert [call.path for call in provider.calls] == ["/v1/chat/completions", "/tokenize"] * 2
    assert target["estimate_factor"] > 3
