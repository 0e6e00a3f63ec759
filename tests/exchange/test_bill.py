"""What a call has used and what it costs, as its client, its record and its log line say."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from trio.testing import MockClock

from tests.support.asgi_client import chat
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import DONE, Break, Head, Provider, Say, Stall, answers, completion, content, says, usage
from trigate.config.sections import UpstreamConfig, Url
from trigate.dialects.endpoints import CHAT
from trigate.dialects.openai_chat.usage_request import takes_include_usage
from trigate.openai.stream import StreamReader
from trigate.openai.token_estimate import estimated_tokens

PRICES = {"m": {"input_usd": 1, "output_usd": 10}}
STREAM = (Say(content("a")), Say(content("b")), Say(usage(7, 2)), Say(DONE))


async def record_of(served: Served) -> Any:
    """The record of the only exchange."""
    [exchange] = served.settled
    return msgspec.structs.asdict(exchange.record)


async def test_the_counts_of_a_stream_are_asked_for(open_app: OpenApp, autojump_clock: MockClock, logs: Any) -> None:
    """The upstream is asked although the client did not ask, which then gets no event of counts. The record has them,
    and what they cost."""
    provider = Provider(STREAM)
    async with open_app(make_config(prices=PRICES), provider) as served:
        call = await served.client.chat().wait()
        assert json.loads(provider.calls[0].body)["stream_options"] == {"include_usage": True}
        assert b'"usage"' not in call.body
        assert call.body.endswith(b"data: [DONE]\n\n")
        record = await record_of(served)
        assert (record["prompt_tokens"], record["completion_tokens"], record["counted"]) == (7, 2, False)
        assert record["cost"] == 27
        assert logs.named("exchange")[0]["cost_usd"] == "0.000027"


async def test_a_client_that_asks_gets_the_counts(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Its body goes out as it came, and its other options stay in any case."""
    provider = Provider(STREAM, STREAM)
    async with open_app(make_config(), provider) as served:
        asked = await served.client.chat(stream_options={"include_usage": True}).wait()
        assert b'"usage":{' in asked.body
        silent = await served.client.chat(stream_options={"include_usage": False, "x": 1.0}).wait()
        assert json.loads(provider.calls[1].body)["stream_options"] == {"include_usage": True, "x": 1.0}
        assert b'"usage":{' not in silent.body


async def test_an_upstream_that_is_not_asked(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """With ``include_usage = false`` nothing is added and nothing is taken away."""
    provider = Provider(STREAM)
    async with open_app(make_config({"up": {"include_usage": False}}), provider) as served:
        call = await served.client.chat().wait()
        assert b"stream_options" not in provider.calls[0].body
        assert b'"usage":{' in call.body


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        (UpstreamConfig(base_url=Url("https://api.openai.com/v1")), True),
        (UpstreamConfig(base_url=Url("https://api.mistral.ai/v1")), False),
        (UpstreamConfig(base_url=Url("https://api.mistral.ai/v1"), include_usage=True), True),
        (UpstreamConfig(base_url=Url("https://x.openai.azure.com"), api_version="2024-06-01"), False),
        (UpstreamConfig(base_url=Url("https://x.openai.azure.com"), api_version="2024-10-21"), True),
    ],
)
def test_which_upstreams_are_asked(config: UpstreamConfig, asked: bool) -> None:
    """Those that are not known to refuse it, unless it is configured."""
    assert takes_include_usage(config) is asked


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_the_hidden_event(size: int) -> None:
    """It is not returned however the stream is cut; an event with both text and counts is."""
    both = (
        b'data: {"choices":[{"index":0,"delta":{"content":"c"}}],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'
    )
    stream = content("a") + content("b") + both + usage(7, 2) + DONE
    reader = StreamReader(CHAT, model=None, upstream="up", hides_usage=True)
    out = b"".join(reader.feed(stream[at : at + size]) for at in range(0, len(stream), size))
    assert reader.complete
    assert out == stream.replace(usage(7, 2), b"")
    assert reader.usage is not None
    assert (reader.usage.prompt_tokens, reader.usage.completion_tokens, reader.events) == (7, 2, 5)


async def test_the_header(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """An answer that is no stream has its cost in a header; without a price it has none, and the record says null."""
    for prices, header, cost in ((PRICES, "0.000033", 33), ({}, "", None)):
        async with open_app(make_config(prices=prices), Provider(answers(completion("Hi")))) as served:
            call = await served.client.chat(stream=False).wait()
            counted = json.loads(call.body)["usage"]
            if prices:
                cost = counted["prompt_tokens"] + 10 * counted["completion_tokens"]
                header = f"0.{cost:06d}"
            assert call.header("x-trigate-cost-usd") == header
            assert (await record_of(served))["cost"] == cost


async def test_a_refused_call_costs_nothing(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Its cost is 0, not unknown."""
    async with open_app(make_config(), Provider(answers(b'{"error":{"message":"no"}}', status=400))) as served:
        await served.client.chat().wait()
        assert (await record_of(served))["cost"] == 0


async def test_a_cut_stream_is_estimated(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """What has come is paid for: the prompt, and a token for each event."""
    async with open_app(make_config(prices=PRICES), Provider((Say(content("a")), Stall()))) as served:
        call = served.client.chat()
        await call.wait_for(b'"a"')
        call.disconnect()
        await call.wait()
        record = await record_of(served)
        assert (record["outcome"], record["counted"], record["completion_tokens"]) == ("cancelled", True, 1)
        assert record["cost"] == record["prompt_tokens"] + 10


async def test_a_continued_stream_costs_both_parts(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The first part is estimated and the second one reported; each has the price of its own target."""
    prices = {"up/m": {"input_usd": 1, "output_usd": 10}, "other/m": {"input_usd": 0, "output_usd": 100}}
    models = {"both": {"targets": ["up/m", "other/m"], "on_truncation": "continue"}}
    config = make_config({"up": {}, "other": {}}, models=models, prices=prices)
    providers = {"up": Provider((Say(content("a")), Break())), "other": Provider(STREAM)}
    async with open_app(config, providers) as served:
        call = await served.client.chat(model="both").wait()
        assert call.body.endswith(b"data: [DONE]\n\n")
        record = await record_of(served)
        assert (record["completion_tokens"], record["counted"]) == (1 + 2, True)
        assert record["cost"] == (record["prompt_tokens"] - 7) + 10 + 200


@pytest.mark.parametrize("second", [(Say(content("b")), Say(content("c")), Say(DONE)), (Head(500), Say(b"{}"))])
async def test_parts_of_which_none_is_reported(
    open_app: OpenApp, autojump_clock: MockClock, second: tuple[Any, ...]
) -> None:
    """Each part that has come is estimated and paid for; a target that was to continue a stream and failed is not."""
    prices = {"up/m": {"input_usd": 1, "output_usd": 10}, "other/m": {"input_usd": 1000, "output_usd": 100}}
    models = {"both": {"targets": ["up/m", "other/m"], "on_truncation": "continue"}}
    config = make_config({"up": {}, "other": {}}, models=models, prices=prices)
    providers = {"up": Provider((Say(content("a")), Break())), "other": Provider(second)}
    async with open_app(config, providers) as served:
        await served.client.chat(model="both").wait()
        record = await record_of(served)
        prompt = estimated_tokens(served.settled[0].call.body)
        if second[0] == Head(500):
            assert (record["prompt_tokens"], record["completion_tokens"]) == (prompt, 1)
            assert record["cost"] == prompt + 10
        else:
            assert (record["prompt_tokens"], record["completion_tokens"]) == (2 * prompt, 1 + 4)  # with the end
            assert record["cost"] == prompt + 10 + 1000 * prompt + 400


async def test_the_echo_is_free(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """What the gateway runs itself costs 0."""
    async with open_app(make_config({"echo": {"kind": "echo"}}), Provider(says("a"))) as served:
        call = await served.client.chat(model="echo/echo", stream=False).wait()
        assert call.header("x-trigate-cost-usd") == "0.000000"


@pytest.mark.parametrize("by", ["key", "header", "nobody"])
async def test_the_cost_in_a_stream(open_app: OpenApp, autojump_clock: MockClock, by: str) -> None:
    """A client that wants it gets it with the token counts: by a setting of its key, or by a header of its call."""
    keys = {"ada": {"secret": "a-secret-of-ada", "include_cost": by == "key"}}
    headers = {"authorization": "Bearer a-secret-of-ada"} | (
        {"x-trigate-include-cost": "true"} if by == "header" else {}
    )
    body = chat(stream_options={"include_usage": True})
    async with open_app(make_config(prices=PRICES, keys=keys), Provider(STREAM)) as served:
        call = await served.client.start("POST", "/v1/chat/completions", body, headers=headers).wait()
        [counted] = [line for line in call.body.splitlines() if b'"usage":{' in line]
        given = json.loads(counted.removeprefix(b"data: "))["usage"]
        assert given["prompt_tokens"] == 7
        assert given.get("cost", "none") == ("none" if by == "nobody" else 0.000027)
        assert call.body.endswith(b"data: [DONE]\n\n")


async def test_the_cost_in_the_stream_of_another_format(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A translated stream has it in its own counts; without a price it is null."""
    body = {"model": "up/m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    for prices, cost in ((PRICES, 0.000027), ({}, None)):
        async with open_app(make_config(prices=prices), Provider(STREAM)) as served:
            headers = {"x-trigate-include-cost": "1"}
            call = await served.client.start("POST", "/v1/messages", body, headers=headers).wait()
            [last] = [line for line in call.body.splitlines() if b'"message_delta"' in line and b"data:" in line]
            assert json.loads(last.removeprefix(b"data: "))["usage"]["cost"] == cost


@pytest.mark.parametrize("stream", [True, False])
async def test_estimates_learn_from_reports(open_app: OpenApp, autojump_clock: MockClock, stream: bool) -> None:
    """Where nothing is reported, the estimate is corrected by what the same target has reported of other calls."""
    silent = (Say(content("a")), Say(content("b")), Say(DONE)) if stream else answers(completion_of(None))
    reports = (
        (Say(content("a")), Say(content("b")), Say(usage(90, 8)), Say(DONE))
        if stream
        else answers(completion_of({"prompt_tokens": 90, "completion_tokens": 8}))
    )
    async with open_app(make_config(), Provider(silent, *[reports] * 20, silent)) as served:
        for _ in range(22):
            await served.client.chat(stream=stream).wait()
        first, *reported, last = [exchange.record for exchange in served.settled]
        assert first.counted
        assert last.counted
        assert {record.counted for record in reported} == {False}
        assert first.prompt_tokens != 90
        assert last.prompt_tokens == 90
        # an answer that is not streamed is shorter by what says the counts
        assert last.completion_tokens == (8 if stream else 5)
        [target] = (await served.client.ask("GET", "/status")).json["targets"]
        assert target["estimate_factor"] == round(90 / first.prompt_tokens, 3)
        assert target["estimate_error"] < 0.2


def completion_of(counts: Any) -> bytes:
    message = {"index": 0, "message": {"role": "assistant", "content": "ab"}, "finish_reason": "stop"}
    return json.dumps({"id": "x", "choices": [message], **({"usage": counts} if counts else {})}).encode()
