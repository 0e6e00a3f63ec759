"""Failover by reason (``models.ALIAS.on``), end to end, in memory."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.exchange.test_attempt import two, whys
from tests.support.gateway import OpenApp, make_config
from tests.support.provider import (
    DONE,
    FINISH,
    Provider,
    Say,
    Script,
    answers,
    chunk,
    completion,
    content,
    event,
    role,
    says,
)

LONG = {
    "message": "This model's maximum context length is 8 tokens. However, your messages resulted in 9 tokens.",
    "type": "invalid_request_error",
    "code": "context_length_exceeded",
}
FILTERED = {"message": "The response was filtered.", "code": "content_filter", "status": 400}


def refuses(error: dict[str, Any], status: int = 400) -> Script:
    """An error response."""
    return answers(msgspec.json.encode({"error": error}), status=status)


def withheld(*, stream: bool, text: str = "") -> Script:
    """An answer that the filter of the provider has ended, after this text."""
    if stream:
        parts = [Say(content(text))] if text else []
        end = b"data: [DONE]\n\n"
        return (Say(role()), *parts, Say(chunk({}, finish_reason="content_filter")), Say(end))
    answer = msgspec.json.decode(completion(text))
    answer["choices"][0]["finish_reason"] = "content_filter"
    return answers(msgspec.json.encode(answer))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (refuses(LONG), "context_length"),
        (refuses({"message": "the request exceeds the available context size", "n_ctx": 8}), "context_length"),
        (refuses({"message": "Too large."}, 413), "context_length"),
        ((Say(event({"error": LONG})),), "context_length"),
        (refuses(FILTERED), "content_filter"),
        (refuses({"message": "no", "code": "content_policy_violation"}), "content_filter"),
        (refuses({"message": "Output blocked by content filtering policy"}), "content_filter"),
        (withheld(stream=True), "content_filter"),
        (refuses({"message": "slow down"}, 429), "rate_limit"),
        (refuses({"message": "gone"}, 408), "timeout"),
        (refuses({"message": "broke"}, 500), "error"),
        (refuses({"message": "none here"}, 501), "error"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_which_reason(open_app: OpenApp, script: Script, reason: str) -> None:
    """The next target is tried for a reason that the model names, and for no other one."""
    for on, tried in (([reason], 1), ([], 0)):
        providers = {"a": Provider(script), "b": Provider(says("yes"))}
        async with open_app(two(on=on), providers) as served:
            call = await served.client.chat(model="both").wait()
            assert len(providers["b"].calls) == tried
            assert (b"yes" in call.body) == bool(tried)
            served.assert_clean()


@pytest.mark.parametrize("script", [refuses(LONG), refuses(FILTERED), withheld(stream=True)])
async def test_the_default(open_app: OpenApp, script: Script) -> None:
    """What another target would probably say as well goes to the client."""
    providers = {"a": Provider(script), "b": Provider()}
    async with open_app(two(), providers) as served:
        await served.client.chat(model="both").wait()
        assert not providers["b"].calls


async def test_a_call_that_is_too_long_for_all(open_app: OpenApp) -> None:
    """The client gets the refusal of the last target, which has the largest context, word for word."""
    larger = {**LONG, "message": LONG["message"].replace("is 8", "is 80")}
    providers = {"a": Provider(refuses(LONG)), "b": Provider(refuses(larger))}
    async with open_app(two(on=["context_length"]), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert (call.status, call.error["code"]) == (400, "context_length_exceeded")
        assert "is 80 tokens" in call.error["message"]
        assert whys(served) == [("a/m", "first", "upstream_rejected"), ("b/m", "failover", "upstream_rejected")]
        states = served.gateway.exchange_services.upstream.targets.items()
        assert [state.breaker.state(0.0) for _, _, state in states] == ["closed", "closed"]


async def test_a_call_that_is_too_long_for_the_only_target(open_app: OpenApp) -> None:
    """Whatever the upstream calls it, and wherever it says it, the client gets the status and the code on which agents
    shorten the conversation instead of sending the same again."""
    said = {"message": "prompt is too long: 9 tokens > 8 maximum", "type": "invalid_request_error"}
    for script in (refuses(said), refuses(said, 413), (Say(role()), Say(event({"type": "error", "error": said})))):
        async with open_app(providers=Provider(script)) as served:
            for stream in (True, False):
                call = await served.client.chat(stream=stream).wait()
                assert (call.status, call.error["code"]) == (400, "context_length_exceeded")
                assert call.error["message"] == LONG["message"]
                assert call.header("x-should-retry") == "false"
            assert len(served.providers["up"].calls) == 2
            assert [exchange.record.status for exchange in served.settled] == [400, 400], "what the client got"


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_is_withheld(open_app: OpenApp, stream: bool) -> None:
    """The next target answers. If none is left, the client gets the answer as it is."""
    good = says("yes") if stream else answers(completion("yes"))
    providers = {"a": Provider(withheld(stream=stream)), "b": Provider(good)}
    async with open_app(two(on=["content_filter"]), providers) as served:
        call = await served.client.chat(model="both", stream=stream).wait()
        assert b"yes" in call.body
        assert b"content_filter" not in call.body
        assert [outcome for _, _, outcome in whys(served)] == ["upstream_error", "complete"]
        providers["a"].play(withheld(stream=stream))
        providers["b"].play(withheld(stream=stream))
        call = await served.client.chat(model="both", stream=stream).wait()
        assert (call.status, call.body.count(b"content_filter")) == (200, 1)
        assert [outcome for _, _, outcome in whys(served, 1)] == ["upstream_error", "complete"]
        served.assert_clean()


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_was_filtered_later(open_app: OpenApp, stream: bool) -> None:
    """Some of it has come: it goes to the client."""
    providers = {"a": Provider(withheld(stream=stream, text="So far")), "b": Provider()}
    async with open_app(two(on=["content_filter"]), providers) as served:
        call = await served.client.chat(model="both", stream=stream).wait()
        assert b"So far" in call.body
        assert b"content_filter" in call.body
        assert not providers["b"].calls


async def test_across_formats(open_app: OpenApp) -> None:
    """A call in Anthropic's format goes from an upstream of that format to one that speaks chat completions."""
    native = {"kind": "anthropic", "base_url": "http://native.invalid/v1", "models": ["c"]}
    config = make_config(
        {"native": native, "up": {}},
        models={"both": {"targets": ["native/c", "up/m"], "on": ["context_length", "content_filter"]}},
    )
    long = {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 9 > 8"}}
    refused = {"type": "message_delta", "delta": {"stop_reason": "refusal"}, "usage": {"output_tokens": 0}}
    start = {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 3, "output_tokens": 0}}}
    events = [Say(event(each)) for each in (start, refused, {"type": "message_stop"})]
    scripts = (answers(msgspec.json.encode(long), status=400), tuple(events))
    providers = {"native": Provider(*scripts), "up": Provider((Say(content("yes")), Say(FINISH), Say(DONE)))}
    async with open_app(config, providers) as served:
        body = {"model": "both", "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
        for _ in scripts:
            call = await served.client.ask("POST", "/v1/messages", body)
            assert (call.status, b"yes" in call.body) == (200, True)
        assert [len(provider.calls) for provider in providers.values()] == [2, 2]


async def test_no_other_target(open_app: OpenApp) -> None:
    """A failure for which the next target is not tried is retried at the same one only."""
    config = two(on=["error"], retries={"max_attempts": 4, "backoff_s": 0.001, "resend": "always"})
    busy = refuses({"message": "slow down"}, 429)
    providers = {"a": Provider(refuses({"message": "broke"}, 500)), "b": Provider(busy, busy, says("yes"))}
    async with open_app(config, providers) as served:
        call = await served.client.chat(model="both").wait()
        assert b"yes" in call.body
        assert [(target, why) for target, why, _ in whys(served)] == [
            ("a/m", "first"), ("b/m", "failover"), ("b/m", "retry"), ("b/m", "retry")
        ]  # fmt: skip
