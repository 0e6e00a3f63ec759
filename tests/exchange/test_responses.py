"""Response calls end to end, in memory and in virtual time: translated, and as they are."""

from __future__ import annotations

from typing import Any

import pytest
from trio.testing import MockClock

from tests.dialects.responses import decoded, response_of
from tests.support.asgi_client import ClientCall
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import (
    DONE,
    FINISH,
    Break,
    Head,
    Pause,
    Provider,
    Say,
    answers,
    completion,
    content,
    event,
    role,
    says,
    usage,
)

DISCOVER = make_config({"up": {"responses": "discover"}})
NATIVE = make_config({"up": {"responses": "native"}})
TOO_LONG = b'{"error":{"message":"This model\'s maximum context length is 8 tokens. However, you requested 9 tokens."}}'


def ask(served: Served, *, headers: dict[str, str] | None = None, **fields: Any) -> ClientCall:
    """Starts a call."""
    body = {"model": "up/m", "input": "Hi", "stream": True, **fields}
    return served.client.start("POST", "/v1/responses", body, headers=headers or {})


def named(kind: str, **fields: Any) -> bytes:
    """Makes an event of a native stream."""
    return b"event: %b\n" % kind.encode() + event({"type": kind, **fields})


NATIVE_START = named("response.created", sequence_number=0, response={"id": "resp_up", "model": "m"})
NATIVE_DELTA = named("response.output_text.delta", sequence_number=1, delta="a", new_field=[1.0])
NATIVE_END = named("response.completed", sequence_number=2, response={"id": "resp_up", "model": "m", "output": []})


# -- translated -------------------------------------------------------------------------------------------------------


async def test_a_translated_stream(open_app: OpenApp) -> None:
    """The client gets its own format, the upstream its own, and the exchange is recorded like any other."""
    script = (Say(role()), Say(content("Hel")), Say(content("lo")), Say(FINISH), Say(usage(5, 2)), Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        call = await ask(served, truncation="auto", headers={"x-request-id": "abc"}).wait()
        assert call.status == 200
        assert call.header("content-type") == "text/event-stream; charset=utf-8"
        assert call.header("x-trigate-dropped") == "truncation"
        response = response_of(call.body)
        assert response["output"][0]["content"][0]["text"] == "Hello"
        assert response["model"] == "up/m"
        assert response["created_at"] > 1_700_000_000
        assert (response["usage"]["input_tokens"], response["usage"]["output_tokens"]) == (5, 2)
        [sent] = served.providers["up"].calls
        assert sent.path == "/v1/chat/completions"
        assert sent.json["messages"] == [{"role": "user", "content": "Hi"}]
        [exchange] = served.settled
        assert (exchange.outcome, exchange.usage[:2], exchange.bytes_sent) == ("complete", (5, 2), len(call.body))
        served.assert_clean()


async def test_a_translated_answer(open_app: OpenApp) -> None:
    """A plain answer is one JSON object; each has an id of its own."""
    async with open_app(providers=Provider(answers(completion("Hi")))) as served:
        first = await ask(served, stream=False).wait()
        second = await ask(served, stream=False).wait()
        assert first.header("content-type") == "application/json"
        assert first.json["output"][0]["content"][0]["text"] == "Hi"
        assert first.json["id"].startswith("resp_")
        assert first.json["id"] != second.json["id"]


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (Break(), "server_error"),
        (Say(event({"error": {"message": "m", "type": "overloaded_error"}})), "server_is_overloaded"),
        (Say(event({"error": {"message": "prompt is too long: 9 tokens > 8 maximum", "code": 400}})), None),
    ],
)
async def test_a_stream_that_fails(open_app: OpenApp, end: Any, code: str | None) -> None:
    """It ends with ``response.failed``, whose number follows; OpenAI's SDKs raise on its ``error``."""
    async with open_app(providers=Provider((Say(content("a")), end))) as served:
        call = await ask(served).wait()
        response = response_of(call.body)
        assert (response["status"], response["error"]["code"]) == ("failed", code or "context_length_exceeded")
        assert decoded(call.body)[-1]["error"]["message"]
        assert b"[DONE]" not in call.body
        served.assert_clean()


async def test_a_failure_behind_a_keep_alive(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """There was no event yet, so it is the first one."""
    async with open_app(providers=Provider((Head(), Pause(20), Break()))) as served:
        call = await ask(served).wait()
        assert call.body.startswith(b": keep-alive\n\nevent: response.failed\n")
        [failed] = decoded(call.body)
        assert failed["response"]["id"].startswith("resp_")


async def test_silences_are_broken_by_comments(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """An event of a type of its own would be a surprise for strict clients."""
    async with open_app(providers=Provider((Say(content("a")), Pause(20), Say(FINISH), Say(DONE)))) as served:
        call = await ask(served).wait()
        assert b": keep-alive\n\n" in call.body
        assert response_of(call.body)["status"] == "completed"


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
@pytest.mark.parametrize("status", [400, 413])
async def test_a_request_that_is_too_long(open_app: OpenApp, path: str, status: int) -> None:
    """It has the code by which agents know it, and the upstream's numbers."""
    async with open_app(providers=Provider(answers(TOO_LONG, status=status))) as served:
        body = {"model": "up/m", "input": "Hi", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        call = await served.client.ask("POST", path, body)
        assert (call.status, call.error["code"]) == (400, "context_length_exceeded")
        assert "9 tokens" in call.error["message"]


@pytest.mark.parametrize(("status", "code"), [(503, "server_is_overloaded"), (500, "upstream_unavailable")])
async def test_an_upstream_that_is_down(open_app: OpenApp, status: int, code: str) -> None:
    """Codex takes 503 with this code as final after a few requests, and any other one not before thirty."""
    async with open_app(providers=Provider(answers(b'{"error":{"message":"busy"}}', status=status))) as served:
        call = await ask(served).wait()
        assert (call.status, call.error["code"]) == (status if status == 503 else 502, code)


async def test_refused_tools_leave_the_call_to_another_target(open_app: OpenApp) -> None:
    """A tool that runs at OpenAI needs an upstream that has the API itself."""
    config = make_config(
        {"up": {}, "native": {"responses": "native"}}, models={"both": {"targets": ["up/m", "native/m"]}}
    )
    native = Provider(answers(b'{"id":"resp_up","object":"response","output":[]}'))
    async with open_app(config, {"up": Provider(), "native": native}) as served:
        call = await ask(served, model="both", stream=False, tools=[{"type": "web_search"}]).wait()
        assert (call.status, call.json["id"]) == (200, "resp_up")
        assert not served.providers["up"].calls
        call = await ask(served, stream=False, tools=[{"type": "web_search"}]).wait()
        assert (call.status, call.error["code"]) == (400, "untranslatable")
        assert "web_search" in call.error["message"]


async def test_the_echo_serves_responses(open_app: OpenApp) -> None:
    """So a new installation does."""
    config = make_config({"trigate": {"kind": "echo"}})
    async with open_app(config, {"trigate": Provider(says("Hi"))}) as served:
        call = await ask(served, model="trigate/echo").wait()
        assert response_of(call.body)["output"][0]["content"][0]["text"] == "Hi"


# -- as they are ------------------------------------------------------------------------------------------------------


async def test_a_native_stream_is_relayed_byte_for_byte(open_app: OpenApp) -> None:
    """Except for the model id; the request goes out as it came."""
    script = (Say(NATIVE_START), Say(b": heartbeat\n\n"), Say(NATIVE_DELTA), Say(NATIVE_END))
    async with open_app(NATIVE, Provider(script)) as served:
        call = await ask(served, tools=[{"type": "web_search"}], new_field=1.5).wait()
        sent = b"".join(step.data for step in script).replace(b'"model":"m"', b'"model":"up/m"')
        assert call.body.replace(b": heartbeat\n\n", b"") == sent.replace(b": heartbeat\n\n", b"")
        [asked] = served.providers["up"].calls
        assert (asked.path, asked.json["new_field"]) == ("/v1/responses", 1.5)


@pytest.mark.parametrize("last", [b"", named("response.done", sequence_number=2), b"data: [DONE]\n\n"])
async def test_a_native_stream_without_its_last_event(open_app: OpenApp, last: bytes) -> None:
    """It is truncated, also if the upstream ends it in another way."""
    async with open_app(NATIVE, Provider((Say(NATIVE_START), Say(NATIVE_DELTA), Say(last)))) as served:
        call = await ask(served).wait()
        failed = decoded(call.body)[-1] if b"[DONE]" not in last else None
        assert b"response.completed" not in call.body
        assert b"event: response.failed\n" in call.body
        if failed is not None:
            assert failed["error"]["code"] == "upstream_truncated"
        assert served.settled[0].outcome == "upstream_truncated"


# -- discovered -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [404, 405, 501])
@pytest.mark.parametrize(
    "body", [b'{"detail":"Not Found"}', b'{"error":{"message":"Unknown path /v1/responses"}}', b""]
)
async def test_an_upstream_without_the_endpoint(open_app: OpenApp, status: int, body: bytes) -> None:
    """The same call is translated, and the next one at once; the client sees nothing of it."""
    script = (*says("Hi"),)
    async with open_app(DISCOVER) as served:
        provider = served.providers["up"]
        provider.play(answers(body, status=status), script)
        call = await ask(served, truncation="auto").wait()
        assert response_of(call.body)["status"] == "completed"
        assert call.header("x-trigate-dropped") == "truncation"
        assert call.header("x-trigate-attempts") == "1"
        provider.play(script)
        assert response_of((await ask(served).wait()).body)["status"] == "completed"
        assert [each.path for each in provider.calls] == [
            "/v1/responses",
            "/v1/chat/completions",
            "/v1/chat/completions",
        ]
        served.assert_clean()


async def test_an_upstream_with_the_endpoint(open_app: OpenApp) -> None:
    """A model that does not exist says nothing about the endpoint; an answer does."""
    async with open_app(DISCOVER) as served:
        provider = served.providers["up"]
        provider.play(
            answers(b'{"error":{"message":"The model m does not exist","code":"model_not_found"}}', status=404),
            (Say(NATIVE_START), Say(NATIVE_DELTA), Say(NATIVE_END)),
            answers(b'{"detail":"Not Found"}', status=404),
        )
        call = await ask(served).wait()
        assert (call.status, call.error["code"]) == (404, "model_not_found")
        assert (await ask(served).wait()).body.endswith(NATIVE_END.replace(b'"model":"m"', b'"model":"up/m"'))
        assert (await ask(served).wait()).status == 404
        assert {each.path for each in provider.calls} == {"/v1/responses"}
