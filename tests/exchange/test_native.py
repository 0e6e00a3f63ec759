"""Chat completions over an upstream of kind ``anthropic``, end to end, in memory and in virtual time.

The provider answers whatever it is sent; each test checks by `messages_rules` that Anthropic would have.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.dialects.native import (
    COUNTED,
    MESSAGE,
    PING,
    START,
    USAGE,
    completion_of,
    end,
    message_of,
    named,
    text,
    thinking,
    tool,
)
from tests.support.asgi_client import ClientCall
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.messages_rules import problem_of, signature_of
from tests.support.provider import DONE, Break, Head, Pause, Provider, Say, Script, answers, content, role, says
from trigate.openai.answer import Usage

NATIVE = {
    "kind": "anthropic",
    "base_url": "http://native.invalid/v1",
    "api_key": "secret-of-native",
    "models": ["claude-opus-5"],
}
MODEL = "native/claude-opus-5"
USER = {"role": "user", "content": "Hi"}


def native(*targets: str, **sections: Any) -> Any:  # Any: a Config
    """An upstream of Anthropic's, one of OpenAI's, and the alias ``both`` for these targets."""
    alias = sections.pop("alias", {})
    models = {"both": {"targets": list(targets), **alias}} if targets else {}
    return make_config({"up": {}, "native": NATIVE}, models=models, **sections)


def streams(*events: bytes) -> Script:
    """A stream of these events."""
    return tuple(map(Say, events))


def refuses(kind: str, message: str, status: int, **headers: str) -> Script:
    """An error in Anthropic's format."""
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_up"}
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return answers(msgspec.json.encode(body), status=status, headers=fields)


HELLO = streams(START, PING, *text(0, "Hel", "lo"), *end())


def ask(served: Served, *, headers: dict[str, str] | None = None, **fields: Any) -> ClientCall:
    """Starts a call."""
    body = {"model": MODEL, "stream": True, "messages": [USER], **fields}
    return served.client.start("POST", "/v1/chat/completions", body, headers=headers or {})


def sent_to(served: Served, name: str = "native") -> list[Any]:
    """The bodies that an upstream has received, which Anthropic accepts."""
    calls = served.providers[name].calls
    assert [problem_of(call.body) for call in calls if name == "native"] == [None] * len(calls)
    return [call.json for call in calls]


def both(native_script: Script, other: Script = ()) -> dict[str, Provider]:
    """The providers of `native`."""
    return {"native": Provider(native_script), "up": Provider(other or says("from up"))}


# -- answers ----------------------------------------------------------------------------------------------------------


async def test_a_stream(open_app: OpenApp) -> None:
    """The client gets OpenAI's format, the upstream Anthropic's, and the exchange is recorded like any other."""
    async with open_app(native(), both(HELLO)) as served:
        headers = {"x-request-id": "abc", "openai-organization": "o"}
        call = await ask(served, seed=4, stream_options={"include_usage": True}, headers=headers).wait()
        assert (call.status, call.header("x-request-id")) == (200, "abc")
        assert call.header("content-type") == "text/event-stream; charset=utf-8"
        assert call.header("x-trigate-dropped") == "seed"
        assert call.header("x-trigate-upstream") == "native"
        completion = completion_of(call.body)
        assert (completion["choices"][0]["message"]["content"], completion["model"]) == ("Hello", MODEL)
        assert completion["usage"] == COUNTED
        assert completion["created"] > 1_700_000_000
        [sent] = served.providers["native"].calls
        assert sent.path == "/v1/messages"
        assert (sent.headers["x-api-key"], sent.headers["anthropic-version"]) == ("secret-of-native", "2023-06-01")
        assert not {"openai-organization", "anthropic-beta", "authorization"} & sent.headers.keys()
        assert sent_to(served)[0]["model"] == "claude-opus-5"
        [exchange] = served.settled
        assert (exchange.outcome, exchange.usage, exchange.bytes_sent) == (
            "complete",
            Usage(100, 20, 60, 10, 5),
            len(call.body),
        )
        served.assert_clean()


async def test_an_answer(open_app: OpenApp) -> None:
    body = {**MESSAGE, "content": [{"type": "text", "text": "Hi"}], "stop_reason": "end_turn"}
    async with open_app(native(), both(answers(msgspec.json.encode(body)))) as served:
        call = await ask(served, stream=False).wait()
        assert call.header("content-type") == "application/json"
        assert call.json["choices"][0]["message"]["content"] == "Hi"
        assert call.json["usage"]["prompt_tokens"] == 100
        assert served.settled[0].usage == Usage(100, 1, 60, 10)


async def test_the_other_form_than_was_asked_for(open_app: OpenApp) -> None:
    """JSON for a stream, and a stream for a plain call."""
    body = {**MESSAGE, "content": [{"type": "text", "text": "Hi"}], "stop_reason": "end_turn", "usage": USAGE}
    async with open_app(native(), both(answers(msgspec.json.encode(body)))) as served:
        call = await ask(served).wait()
        assert message_of(call.body)["content"] == "Hi"
        served.providers["native"].play(HELLO)
        call = await ask(served, stream=False).wait()
        assert call.json["choices"][0]["message"]["content"] == "Hello"
        served.assert_clean()


async def test_a_tool_loop(open_app: OpenApp) -> None:
    """What the client got goes back as Anthropic gave it, signed reasoning included."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    script = streams(
        START,
        *thinking(0, "hm", signature=signature_of("hm")),
        *tool(1, '{"a":1}'),
        *tool(2, call_id="t2"),
        *end("tool_use"),
    )
    async with open_app(native(), both(script)) as served:
        message = message_of((await ask(served, tools=tools, reasoning_effort="high").wait()).body)
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "x"} for call in message["tool_calls"]]
        served.providers["native"].play(HELLO)
        await ask(served, tools=tools, messages=[USER, message, *results]).wait()
        _, turn, answer = sent_to(served)[1]["messages"]
        assert turn["content"] == [
            {"type": "thinking", "thinking": "hm", "signature": signature_of("hm")},
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
        ]
        assert [block["tool_use_id"] for block in answer["content"]] == ["toolu_1", "t2"]


async def test_reasoning_that_the_client_lost(open_app: OpenApp) -> None:
    """It is put back before the calls, from what the gateway remembers: a model that thinks by a budget needs it."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    script = streams(START, *thinking(0, "hm", signature=signature_of("hm")), *tool(1, '{"a":1}'), *end("tool_use"))
    config = native(store={"path": ":memory:"})
    async with open_app(config, both(script)) as served:
        fields: dict[str, Any] = {"model": "native/claude-sonnet-4-5", "tools": tools, "reasoning_effort": "high"}
        message = message_of((await ask(served, **fields).wait()).body)
        lost = {name: message[name] for name in ("role", "content", "tool_calls")}
        result = {"role": "tool", "tool_call_id": "toolu_1", "content": "x"}
        served.providers["native"].play(HELLO)
        call = await ask(served, messages=[USER, lost, result], **fields).wait()
        assert call.header("x-trigate-dropped") == ""
        sent = sent_to(served)[1]
        assert sent["messages"][1]["content"][0]["signature"] == signature_of("hm")
        assert sent["thinking"]["type"] == "enabled"


async def test_silences(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A comment breaks them, and the upstream's pings are not for the client."""
    script: Script = (Say(START), Say(PING), Pause(20), *map(Say, text(0, "a")), Pause(20), Say(PING), *map(Say, end()))
    async with open_app(native(), both(script)) as served:
        call = await ask(served, seed=1).wait()
        assert call.body.count(b": keep-alive\n\n") == 2
        assert b"ping" not in call.body
        assert call.header("x-trigate-dropped") == "seed"
        assert message_of(call.body.replace(b": keep-alive\n\n", b""))["content"] == "a"


async def test_the_client_disconnects(open_app: OpenApp) -> None:
    """The upstream is closed at once."""
    script: Script = (Say(START), *map(Say, text(0, "a")[:2]), Pause(1000))
    async with open_app(native(), both(script)) as served:
        call = ask(served)
        await call.wait_for(b'"content":"a"')
        call.disconnect()
        await call.wait()
        await wait_all_tasks_blocked()
        assert served.providers["native"].calls[0].ended == "closed"
        served.assert_clean()


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        ((Break(),), "upstream_error"),
        ((), "upstream_error"),
        ((Say(named("error", error={"type": "overloaded_error", "message": "m"})),), "overloaded_error"),
    ],
)
async def test_a_stream_that_fails(open_app: OpenApp, last: Script, kind: str) -> None:
    """It ends with an error event, and without ``[DONE]``."""
    async with open_app(native(), both((Say(START), *map(Say, text(0, "a")), *last))) as served:
        call = await ask(served).wait()
        assert (call.status, call.error["type"]) == (200, kind)
        assert b"[DONE]" not in call.body
        assert b'"finish_reason":"' not in call.body
        served.assert_clean()


@pytest.mark.parametrize(
    ("script", "status", "expected"),
    [
        (refuses("invalid_request_error", "messages: no", 400), 400, ("invalid_request_error", "upstream_rejected")),
        (refuses("authentication_error", "invalid x-api-key", 401), 401, ("authentication_error", "upstream_rejected")),
        (refuses("not_found_error", "model: x", 404), 404, ("not_found_error", "upstream_rejected")),
        (
            refuses("rate_limit_error", "slow down", 429, retry_after="7"),
            429,
            ("rate_limit_error", "upstream_throttled"),
        ),
        (refuses("overloaded_error", "Overloaded", 529), 503, ("upstream_error", "upstream_unavailable")),
        (refuses("api_error", "Internal", 500), 502, ("upstream_error", "upstream_unavailable")),
        (
            refuses("invalid_request_error", "prompt is too long: 250000 tokens > 200000 maximum", 400),
            400,
            ("invalid_request_error", "context_length_exceeded"),
        ),
        (
            refuses("request_too_large", "Request exceeds the maximum size", 413),
            413,
            ("request_too_large", "upstream_rejected"),
        ),
    ],
)
async def test_errors_before_the_answer(
    open_app: OpenApp, script: Script, status: int, expected: tuple[str, str]
) -> None:
    """They have OpenAI's shape, and Anthropic's status, type and message; that a prompt is too long, OpenAI's code."""
    async with open_app(native(), both(script)) as served:
        call = await ask(served).wait()
        assert (call.status, (call.error["type"], call.error["code"])) == (status, expected)
        assert call.json.keys() == {"error"}
        assert call.error.keys() >= {"message", "type", "param", "code"}
        assert call.header("x-should-retry") == "false"
        if status == 429:
            assert call.header("retry-after") == "7"
        if expected[1] == "context_length_exceeded":
            assert "maximum context length is 200000 tokens" in call.error["message"]


async def test_an_error_before_the_content(open_app: OpenApp) -> None:
    """It has its status, also within a stream; another target is tried first."""
    overloaded = named("error", error={"type": "overloaded_error", "message": "Overloaded"})
    script = streams(START, text(0)[0], overloaded)
    async with open_app(native(MODEL, "up/m"), both(script)) as served:
        call = await ask(served).wait()
        assert (call.status, call.error["message"]) == (503, "Overloaded")
        call = await ask(served, model="both").wait()
        assert call.header("x-trigate-upstream") == "up"
        assert b"from up" in call.body


async def test_what_one_format_cannot_express_goes_to_the_next_target(open_app: OpenApp) -> None:
    """A field that is refused for one upstream is no reason to refuse it for all."""
    async with open_app(native(MODEL, "up/m"), both(HELLO)) as served:
        call = await ask(served, model="both", n=2).wait()
        assert call.header("x-trigate-upstream") == "up"
        assert not served.providers["native"].calls
        call = await ask(served, n=2).wait()
        assert (call.status, call.error["code"], call.error["param"]) == (400, "untranslatable", "n")


@pytest.mark.parametrize("first", ["up/m", MODEL])
async def test_no_translated_stream_is_continued(open_app: OpenApp, first: str) -> None:
    """Neither does one continue another: it would begin from the start."""
    cut = (Say(role()), Say(content("Hel")), Break())
    providers = both((Say(START), *map(Say, text(0, "Hel")), Break()), cut)
    second = MODEL if first == "up/m" else "up/m"
    config = native(first, second, alias={"on_truncation": "continue"})
    async with open_app(config, providers) as served:
        providers[second.partition("/")[0]].play(HELLO if second == MODEL else says("x"))
        call = await ask(served, model="both").wait()
        assert call.body.count(b'"content":"Hel"') == 1
        assert call.error["type"]
        assert b"[DONE]" not in call.body
        if second == MODEL:
            assert not served.providers["native"].calls
        served.assert_clean()


# -- what calls chat completions --------------------------------------------------------------------------------------


async def test_a_session(open_app: OpenApp) -> None:
    """The gateway remembers the conversation, with what Anthropic needs of it."""
    script = streams(START, *thinking(0, "hm", signature=signature_of("hm")), *text(1, "Hello"), *end())
    async with open_app(native(), both(script)) as served:
        for stream in (True, False, True):
            call = await ask(served, stream=stream, headers={"x-session-key": "s"}).wait()
            assert call.status == 200, call.body
        bodies = sent_to(served)
        assert [len(body["messages"]) for body in bodies] == [1, 3, 5]
        assert bodies[-1]["messages"][3]["content"] == [
            {"type": "thinking", "thinking": "hm", "signature": signature_of("hm")},
            {"type": "text", "text": "Hello"},
        ]
        served.assert_clean()


async def test_a_webhook(open_app: OpenApp) -> None:
    """A message gets its reply, and the next one of its session has both before it."""
    hook = {"model": MODEL, "session": "hook", "system": "Be brief."}
    config = native(store={"path": ":memory:"}, hooks={"h": hook})
    async with open_app(config, both(HELLO)) as served:
        for _ in range(2):
            call = await served.client.ask("POST", "/hooks/h", {"text": "Hi"})
            assert (call.status, call.json["reply"], call.json["finish_reason"]) == (200, "Hello", "stop")
            assert call.json["usage"] == {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
        body = sent_to(served)[-1]
        assert body["system"] == "Be brief."
        assert [turn["content"] for turn in body["messages"]] == ["Hi", "Hello", "Hi"]
        served.assert_clean()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_shared_call(open_app: OpenApp, autojump_clock: MockClock, stream: bool) -> None:
    """Equal calls share one upstream call, and each client gets the whole answer."""
    autojump_clock.autojump_threshold = 0.005  # it does not wait for the thread that puts the answer together
    script = (Pause(1), *HELLO[:3], Pause(1), *HELLO[3:])
    config = native(MODEL, alias={"coalesce": True}, limits={"keep_alive_s": 0})
    async with open_app(config, both(script)) as served:
        calls = [ask(served, model="both", temperature=0, stream=stream) for _ in range(3)]
        bodies = [(await call.wait()).body for call in calls]
        assert len(set(bodies)) == 1
        assert b"Hel" in bodies[0]
        assert len(served.providers["native"].calls) == 1
        await wait_all_tasks_blocked()
        served.assert_clean()


async def test_the_default_model(open_app: OpenApp) -> None:
    """An upstream that has only messages serves it, if there is no other."""
    async with open_app(make_config({"native": NATIVE}), {"native": Provider(HELLO)}) as served:
        call = await ask(served, model="default").wait()
        assert message_of(call.body)["content"] == "Hello"


@pytest.mark.slow
async def test_cancellation_at_every_step(open_app: OpenApp) -> None:
    """A client that disconnects at any piece of a translated stream leaves nothing behind."""
    events = [START, *text(0, "a", "b"), *tool(1, "{}"), *end("tool_use")]
    async with open_app(native(), both(HELLO)) as served:
        for after in range(len(events)):
            served.providers["native"].play((Head(), *map(Say, events[: after + 1]), Pause(1000)))
            call = ask(served)
            await wait_all_tasks_blocked()
            call.disconnect()
            await call.wait()
            await wait_all_tasks_blocked()
            served.assert_clean()


async def test_done_is_only_at_the_end(open_app: OpenApp) -> None:
    """An upstream that ends its stream as OpenAI does is not complete by that."""
    async with open_app(native(), both((Say(START), *map(Say, text(0, "a")), Say(DONE)))) as served:
        call = await ask(served).wait()
        assert call.error["code"] == "upstream_garbled"
        assert b"[DONE]" not in call.body
