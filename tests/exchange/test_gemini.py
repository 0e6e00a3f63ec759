"""Calls in Gemini's format end to end, in memory and in virtual time: translated, and as they are."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.dialects.gemini import chunk, decoded, function, parts_of
from tests.support.asgi_client import ClientCall
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.gemini_rules import SIGNATURE
from tests.support.provider import FINISH, Break, Head, Pause, Provider, Say, answers, completion, content, says, usage
from trigate.openai.answer import Usage

NATIVE = {"kind": "gemini", "api_key": "secret-of-native", "models": ["gemini-3-flash", "m/2"]}
USAGE = {"promptTokenCount": 9, "cachedContentTokenCount": 4, "candidatesTokenCount": 2, "totalTokenCount": 11}
STREAM = (chunk({"text": "Hel"}), chunk({"text": "lo"}, finish="STOP", usageMetadata=USAGE))
ANSWER = {"candidates": [{"content": {"parts": [{"text": "Hello"}]}, "finishReason": "STOP"}], "usageMetadata": USAGE}


def body_of(**fields: Any) -> dict[str, Any]:
    """The body of a call."""
    return {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}], **fields}


def ask(
    served: Served,
    model: str = "up/m",
    method: str = "streamGenerateContent?alt=sse",
    *,
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> ClientCall:
    """Starts a call."""
    return served.client.start("POST", f"/v1beta/models/{model}:{method}", body_of(**fields), headers=headers or {})


def native(*models: str, **sections: Any) -> Any:  # Any: a Config
    """An upstream ``up`` that speaks chat completions, one that speaks Gemini's format, and an alias for both."""
    return make_config(
        {"up": {}, "native": NATIVE}, models={"both": {"targets": list(models)}} if models else {}, **sections
    )


def error_in(body: bytes) -> Any:
    """The error at the end of a stream."""
    return msgspec.json.decode(body.rstrip(b"\n").rpartition(b"\n")[2])["error"]


# -- translated -------------------------------------------------------------------------------------------------------


async def test_a_translated_stream(open_app: OpenApp) -> None:
    """The client gets its own format, the upstream its own, and the exchange is recorded like any other."""
    script = (Say(content("Hel")), Say(content("lo")), Say(FINISH), Say(usage(5, 2)), Say(b"data: [DONE]\n\n"))
    async with open_app(providers=Provider(script)) as served:
        call = await ask(served, safetySettings=[{}], headers={"x-goog-api-client": "x"}).wait()
        assert call.status == 200
        assert call.header("content-type") == "text/event-stream; charset=utf-8"
        assert call.header("x-trigate-dropped") == "safetySettings"
        chunks = decoded(call.body)
        assert parts_of(chunks) == [{"text": "Hello"}]
        assert chunks[-1]["modelVersion"] == "up/m"
        [sent] = served.providers["up"].calls
        assert (sent.path, sent.json["model"], sent.json["stream"]) == ("/v1/chat/completions", "m", True)
        [exchange] = served.settled
        assert (exchange.outcome, exchange.usage[:2], exchange.bytes_sent) == ("complete", (5, 2), len(call.body))
        served.assert_clean()


async def test_a_translated_answer(open_app: OpenApp) -> None:
    """A plain answer is one JSON object."""
    async with open_app(providers=Provider(answers(completion("Hi")))) as served:
        call = await ask(served, method="generateContent").wait()
        assert call.header("content-type") == "application/json"
        assert call.json["candidates"][0]["content"]["parts"] == [{"text": "Hi"}]
        assert call.json["usageMetadata"]["promptTokenCount"] == 3
        assert "stream" not in served.providers["up"].calls[0].json


@pytest.mark.parametrize(
    "path",
    [
        "/v1beta/models/up/m:streamGenerateContent?alt=sse",
        "/v1beta/models/up/m:streamGenerateContent?key=x&alt=sse",
        "/v1/models/up/m:streamGenerateContent?%24alt=sse",
        "/models/up/m:streamGenerateContent?alt=sse",
        "//v1beta/models/up/m:streamGenerateContent?alt=sse",
        "/v1beta1/projects/p/locations/global/publishers/google/models/up/m:streamGenerateContent?alt=sse",
        "/v1beta1/publishers/google/models/up/m:streamGenerateContent?alt=sse",
    ],
)
async def test_paths(open_app: OpenApp, path: str) -> None:
    """The model may have slashes, and there are several ways to the same method."""
    async with open_app() as served:
        call = await served.client.ask("POST", path, body_of())
        assert parts_of(decoded(call.body)) == [{"text": "Hello!"}]


async def test_an_array(open_app: OpenApp) -> None:
    """Without ``alt=sse``, the stream is one array, whose elements come as they are made; an error is the last one."""
    async with open_app(providers=Provider((*says("a", "b"),))) as served:
        call = await ask(served, method="streamGenerateContent").wait()
        assert call.header("content-type") == "application/json"
        assert parts_of(call.json) == [{"text": "ab"}]
        assert len(call.pieces) > 2
        served.providers["up"].play((Say(content("a")), Break()))
        call = await ask(served, method="streamGenerateContent").wait()
        first, last = call.json
        assert first["candidates"][0]["content"]["parts"] == [{"text": "a"}]
        assert last["error"]["status"] == "UNAVAILABLE"
        served.assert_clean()


async def test_keep_alives_are_blank_lines(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Google's SDKs cannot read comments. An array has no place for one."""
    script = (Head(), Pause(20), Say(content("a")), Pause(20), Say(FINISH), Say(b"data: [DONE]\n\n"))
    async with open_app(providers=Provider(script)) as served:
        call = await ask(served, context=1).wait()
        assert call.body.startswith(b"\ndata: ")
        assert call.body.count(b"\n\n\ndata: ") == 1
        assert b":keep" not in call.body.replace(b" ", b"")
        assert parts_of(decoded(call.body.replace(b"\n\n\n", b"\n\n").lstrip(b"\n"))) == [{"text": "a"}]
        call = await ask(served, method="streamGenerateContent").wait()
        assert parts_of(call.json) == [{"text": "a"}]


@pytest.mark.parametrize("end", [Break(), Say(b'data: {"error": {"message": "m", "code": 503}}\n\n')])
async def test_a_stream_that_fails(open_app: OpenApp, end: Any) -> None:
    """It ends with an error as Google sends it, and without a ``finishReason``."""
    async with open_app(providers=Provider((Say(content("a")), end))) as served:
        call = await ask(served).wait()
        error = error_in(call.body)
        assert (error["code"], error["status"]) == (502 if isinstance(end, Break) else 503, "UNAVAILABLE")
        assert b"finishReason" not in call.body
        served.assert_clean()


async def test_errors_before_the_answer(open_app: OpenApp) -> None:
    """They have Google's shape and status; a request that is too long is told in its words."""
    async with open_app() as served:
        provider = served.providers["up"]
        said = "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens."
        provider.play(answers(msgspec.json.encode({"error": {"message": said}}), status=400))
        call = await ask(served).wait()
        told = "The input token count (9000) exceeds the maximum number of tokens allowed (8192)."
        assert (call.status, call.error) == (400, {"code": 400, "message": told, "status": "INVALID_ARGUMENT"})
        call = await ask(served, model="nothing/here").wait()
        assert (call.status, call.error["status"]) == (404, "NOT_FOUND")
        call = await ask(served, cachedContent="c").wait()
        assert (call.status, call.error["status"]) == (400, "INVALID_ARGUMENT")
        call = await served.client.ask("POST", "/v1beta/models/up/m:generateContent", {})
        assert (call.status, call.error["message"]) == (400, "You must provide contents.")
        for method in ("countTokens", "embedContent", "batchEmbedContents"):
            body = body_of(content={}, requests=[])
            call = await served.client.ask("POST", f"/v1beta/models/up/m:{method}", body)
            assert (call.status, call.error["status"], call.header("x-should-retry")) == (501, "UNIMPLEMENTED", "false")
        call = await served.client.ask("POST", "/v1beta/models/up/m:predict", {})
        assert (call.status, call.error["status"]) == (405, "INVALID_ARGUMENT")
        call = await served.client.ask("GET", "/v1beta/models/up/m:generateContent")
        assert (call.status, call.error["code"]) == (405, 405)


async def test_a_throttled_call(open_app: OpenApp) -> None:
    """The client is told when to try again, in the words that Google's clients read."""
    script = answers(b'{"error":{"message":"slow down"}}', status=429, headers={"retry-after": "7"})
    async with open_app(providers=Provider(script)) as served:
        call = await ask(served).wait()
        assert (call.status, call.error["code"], call.error["status"]) == (429, 429, "RESOURCE_EXHAUSTED")
        assert call.error["details"] == [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}]


async def test_the_client_disconnects(open_app: OpenApp) -> None:
    """The upstream is closed at once."""
    config = make_config({"native": {**NATIVE, "count_tokens": False}})
    async with open_app(config, {"native": Provider((Say(STREAM[0]), Pause(1000)))}) as served:
        call = ask(served, "native/gemini-3-flash")
        await call.wait_for(b"Hel")
        call.disconnect()
        await wait_all_tasks_blocked()
        assert served.providers["native"].calls[0].ended == "closed"
        assert served.settled[0].outcome == "cancelled"
        served.assert_clean()


# -- as it is ---------------------------------------------------------------------------------------------------------


async def test_the_same_format_is_relayed_byte_for_byte(open_app: OpenApp) -> None:
    """The body and the events are the same bytes; credentials and the headers of others stay here."""
    sent_body = b'{ "contents": [{"parts":[{"brandNew": 1.0}]}],\n "new": {"x": 1e2} }'
    async with open_app(native(), {"up": Provider(), "native": Provider(tuple(map(Say, STREAM)))}) as served:
        call = await served.client.ask(
            "POST",
            "/v1beta/models/native/m/2:streamGenerateContent?alt=sse&key=of-the-client",
            sent_body,
            headers={"content-type": "application/json", "cookie": "c", "openai-beta": "b"},
        )
        assert call.body == b"".join(STREAM)
        [sent] = served.providers["native"].calls
        assert sent.target == "/v1beta/models/m%2F2:streamGenerateContent?alt=sse"
        assert sent.body == sent_body
        assert sent.headers["x-goog-api-key"] == "secret-of-native"
        assert not {"authorization", "cookie", "openai-beta"} & set(sent.headers)
        assert served.settled[0].usage == Usage(9, 2, 4)
        served.assert_clean()


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("generateContent", ANSWER),
        ("generateContent", {"promptFeedback": {"blockReason": "SAFETY"}}),
        ("countTokens", {"totalTokens": 14}),
        ("embedContent", {"embedding": {"values": [0.5]}}),
        ("batchEmbedContents", {"embeddings": []}),
    ],
)
async def test_native_answers(open_app: OpenApp, method: str, answer: Any) -> None:
    """They are relayed as they are."""
    body = msgspec.json.encode(answer)
    async with open_app(native(), {"up": Provider(), "native": Provider(answers(body))}) as served:
        sent = body_of(content={}, requests=[{"model": "models/gemini-3-flash"}])
        call = await served.client.ask("POST", f"/v1beta/models/gemini-3-flash:{method}", sent)
        assert (call.status, call.body) == (200, body)
        assert served.providers["native"].calls[0].target == f"/v1beta/models/gemini-3-flash:{method}"
        served.providers["native"].play(answers(b'{"something": "else"}'))
        call = await served.client.ask("POST", f"/v1beta/models/gemini-3-flash:{method}", sent)
        assert call.status == 502


async def test_native_errors_are_relayed_word_for_word(open_app: OpenApp) -> None:
    """With their status and details, also from an array; in a stream with their fields."""
    error = {"code": 400, "message": "m", "status": "FAILED_PRECONDITION", "details": [{"@type": "t", "reason": "r"}]}
    told = msgspec.json.encode({"error": error})
    async with open_app(native(), {"up": Provider(), "native": Provider()}) as served:
        for body in (told, b"[" + told + b"]"):
            served.providers["native"].play(answers(body, status=400))
            call = await ask(served, "gemini-3-flash").wait()
            assert (call.status, call.body) == (400, told)
        served.providers["native"].play((Say(STREAM[0]), Say(told)))
        call = await ask(served, "gemini-3-flash").wait()
        assert error_in(call.body) == error
        served.providers["native"].play((Say(told),))
        call = await ask(served, "gemini-3-flash").wait()
        assert (call.status, call.error) == (400, error)


async def test_failover_across_formats(open_app: OpenApp) -> None:
    """A function call that Google's model got wrong is no answer: the other target answers, translated."""
    wrong = (Say(chunk(finish="MALFORMED_FUNCTION_CALL")),)
    providers = {"up": Provider(says("x")), "native": Provider(wrong)}
    body = {"model": "both", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    async with open_app(native("native/gemini-3-flash", "up/m"), providers) as served:
        call = await served.client.ask("POST", "/v1/messages", {**body, "stream": True})
        assert call.header("x-trigate-upstream") == "up"
        served.providers["native"].play(answers(b"{}", status=503))
        call = await ask(served, "both").wait()
        assert parts_of(decoded(call.body)) == [{"text": "x"}]


async def test_other_formats_over_google(open_app: OpenApp) -> None:
    """A call in another format reaches it, with a call of a tool that another model made."""
    script = (Say(chunk(function("f", {"x": 1}))), Say(chunk(finish="STOP", usageMetadata=USAGE)))
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "r"}]},
    ]
    async with open_app(native(), {"up": Provider(), "native": Provider(script)}) as served:
        body = {"model": "native/gemini-3-flash", "max_tokens": 9, "messages": messages, "stream": True}
        call = await served.client.ask("POST", "/v1/messages", body)
        assert b'"name":"f"' in call.body
        [sent] = served.providers["native"].calls
        assert sent.target == "/v1beta/models/gemini-3-flash:streamGenerateContent?alt=sse"
        assert sent.json["contents"][1]["parts"][0]["thoughtSignature"] == "skip_thought_signature_validator"
        assert served.settled[0].usage == Usage(9, 2, 4)


async def test_a_signature_that_the_client_has_lost(open_app: OpenApp) -> None:
    """It goes back all the same, since the gateway remembers it."""
    script = (Say(chunk(function("f", {"x": 1}, thoughtSignature=SIGNATURE))), Say(chunk(finish="STOP")))
    ask_again = {"role": "user", "content": "Hi"}
    async with open_app(native(), {"up": Provider(), "native": Provider(script)}) as served:
        body = {"model": "native/gemini-3-flash", "max_tokens": 9, "messages": [ask_again]}
        call = await served.client.ask("POST", "/v1/messages", {**body, "stream": True})
        blocks = [{"type": "tool_use", "id": "call_r1_0", "name": "f", "input": {"x": 1}}]
        assert b'"call_r1_0"' in call.body
        result = [{"type": "tool_result", "tool_use_id": "call_r1_0", "content": "r"}]
        turns = [ask_again, {"role": "assistant", "content": blocks}, {"role": "user", "content": result}]
        await served.client.ask("POST", "/v1/messages", {**body, "messages": turns, "stream": True})
        sent = served.providers["native"].calls[-1].json
        assert sent["contents"][1]["parts"][0]["thoughtSignature"] == SIGNATURE


# -- around it --------------------------------------------------------------------------------------------------------


async def test_the_list_of_models(open_app: OpenApp) -> None:
    """It comes by pages; at ``/v1/models``, Google's key header chooses it."""
    info = {"m/2": {"context_length": 1000, "max_output_tokens": 100}}
    config = make_config({"native": {**NATIVE, "model_info": info}})
    async with open_app(config, {"native": Provider()}) as served:
        names, path = [], "/v1beta/models?pageSize=2"
        while path:
            call = await served.client.ask("GET", path)
            names += [model["name"] for model in call.json["models"]]
            token = call.json.get("nextPageToken")
            path = f"/v1beta/models?pageSize=2&pageToken={token}" if token else ""
        assert names[:3] == ["models/default", "models/native/gemini-3-flash", "models/native/m/2"]
        call = await served.client.ask("GET", "/v1/models", headers={"x-goog-api-key": "k"})
        assert [model["name"] for model in call.json["models"]] == names
        call = await served.client.ask("GET", "/v1beta/models/native/m/2")
        assert (call.json["inputTokenLimit"], call.json["outputTokenLimit"]) == (1000, 100)
        for path, status in (("/v1beta/models/x", 404), ("/v1beta/models?pageSize=0", 400)):
            call = await served.client.ask("GET", path)
            assert (call.status, call.error["code"]) == (status, status)


async def test_the_models_of_google(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """They are listed page by page, without those that make neither texts nor embeddings."""
    first = {
        "models": [
            {"name": "models/a", "inputTokenLimit": 9, "outputTokenLimit": 3, "displayName": "A"},
            {"name": "models/video", "supportedGenerationMethods": ["predict"]},
        ],
        "nextPageToken": "t/1",
    }
    second = {"models": [{"name": "models/b", "supportedGenerationMethods": ["generateContent"]}]}
    script = [answers(msgspec.json.encode(page)) for page in (first, second)]
    config = make_config({"native": {"kind": "gemini", "api_key": "secret-of-native"}})
    async with open_app(config, {"native": Provider(*script)}) as served:
        upstream = served.gateway.generations.current.upstreams["native"]
        assert upstream.models == ("a", "b")
        assert upstream.model_fields["a"] == {"display_name": "A", "context_length": 9, "max_output_tokens": 3}
        targets = [call.target for call in served.providers["native"].calls]
        assert targets == ["/v1beta/models?pageSize=1000", "/v1beta/models?pageSize=1000&pageToken=t%2F1"]


async def test_keys(open_app: OpenApp, capsys: pytest.CaptureFixture[str]) -> None:
    """The header and the query are taken; a refusal has Google's shape, and no log has the key."""
    config = make_config(keys={"k": "a-key of the gateway"})
    async with open_app(config) as served:
        for headers, query in (
            ({"x-goog-api-key": "a-key of the gateway"}, ""),
            ({}, "&key=a-key%20of%20the+gateway"),
            ({"authorization": "Bearer a-key of the gateway"}, ""),
        ):
            call = await ask(served, method=f"streamGenerateContent?alt=sse{query}", headers=headers).wait()
            assert call.status == 200
        call = await ask(served, method="generateContent?key=wrong-key").wait()
        assert (call.status, call.error["status"]) == (401, "UNAUTHENTICATED")
        both = {"x-goog-api-key": "a-key of the gateway"}
        assert (await ask(served, method="generateContent?key=wrong-key", headers=both).wait()).status == 400
        # only where Google's format has it
        call = await served.client.ask("GET", "/v1/models?key=a-key%20of%20the+gateway")
        assert call.status == 401
        call = await served.client.ask("GET", "/v1beta/models?key=a-key%20of%20the+gateway")
        assert call.status == 200
    said = capsys.readouterr()
    assert "wrong-key" not in said.out + said.err
    assert "a-key" not in said.out + said.err
