"""Calls in Anthropic's format end to end, in memory and in virtual time: translated, and as they are."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.dialects.chat import decoded, mark_of, message_of
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
from trigate.dialects.anthropic import MessagesClient
from trigate.dialects.openai_chat import ChatUpstream
from trigate.openai.answer import Usage

NATIVE = {"kind": "anthropic", "base_url": "http://native.invalid/v1", "api_key": "secret-of-native", "models": ["c"]}
MESSAGE = {"id": "msg_9", "type": "message", "role": "assistant", "model": "c-2026", "content": []}
START_USAGE = {"input_tokens": 3, "cache_read_input_tokens": 40, "cache_creation_input_tokens": 7, "output_tokens": 1}


def named(kind: str, **fields: Any) -> bytes:
    """Makes an event in Anthropic's format."""
    return b"event: %b\n" % kind.encode() + event({"type": kind, **fields})


NATIVE_START = named("message_start", message={**MESSAGE, "usage": START_USAGE})
NATIVE_REST = (
    named("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    named("ping"),
    named("content_block_delta", index=0, delta={"type": "text_delta", "text": 'a "model" of'}, new_field=[1.0]),
    named("brand_new_event", index=0),
    named("content_block_stop", index=0),
    named("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 12}),
)
NATIVE_STOP = named("message_stop")


def body_of(**fields: Any) -> dict[str, Any]:
    """The body of a call."""
    return {"model": "up/m", "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "Hi"}], **fields}


def ask(served: Served, *, headers: dict[str, str] | None = None, **fields: Any) -> ClientCall:
    """Starts a call."""
    return served.client.start("POST", "/v1/messages", body_of(**fields), headers=headers or {})


def native(*models: str, **sections: Any) -> Any:  # Any: a Config
    """An upstream ``up`` that speaks chat completions, one that speaks Anthropic's format, and an alias for both."""
    return make_config(
        {"up": {}, "native": NATIVE}, models={"both": {"targets": list(models)}} if models else {}, **sections
    )


# -- translated -------------------------------------------------------------------------------------------------------


async def test_a_translated_stream(open_app: OpenApp) -> None:
    """The client gets its own format, the upstream its own, and the exchange is recorded like any other."""
    script = (
        Say(role()),
        Say(content("Hel")),
        Say(content("lo")),
        Say(FINISH),
        Say(usage(5, 2)),
        Say(b"data: [DONE]\n\n"),
    )
    async with open_app(providers=Provider(script)) as served:
        call = await ask(served, top_k=4, headers={"x-request-id": "abc", "anthropic-beta": "b"}).wait()
        assert call.status == 200
        assert call.header("content-type") == "text/event-stream; charset=utf-8"
        assert call.header("request-id") == call.header("x-request-id") == "abc"
        assert call.header("x-trigate-dropped") == "top_k"
        message = message_of(call.body)
        assert message["content"] == [{"type": "text", "text": "Hello"}]
        assert message["model"] == "up/m"
        assert (message["usage"]["input_tokens"], message["usage"]["output_tokens"]) == (5, 2)
        [sent] = served.providers["up"].calls
        assert sent.path == "/v1/chat/completions"
        assert sent.json["model"] == "m"
        assert "anthropic-beta" not in sent.headers
        [exchange] = served.settled
        assert (exchange.outcome, exchange.usage, exchange.bytes_sent) == ("complete", Usage(5, 2), len(call.body))
        served.assert_clean()


async def test_a_translated_answer(open_app: OpenApp) -> None:
    """A plain answer is one JSON object."""
    async with open_app(providers=Provider(answers(completion("Hi")))) as served:
        call = await ask(served, stream=False).wait()
        assert call.header("content-type") == "application/json"
        assert call.json["content"] == [{"type": "text", "text": "Hi"}]
        assert call.json["usage"]["input_tokens"] == 3
        assert served.settled[0].usage == Usage(3, 2)


async def test_a_large_call_is_translated_in_a_thread(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its decoding nor its encoding holds other calls up."""
    threads: list[tuple[str, bool]] = []

    def seen_in(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **named: Any) -> Any:
            threads.append((name, threading.current_thread() is threading.main_thread()))
            return real(*args, **named)

        monkeypatch.setattr(owner, name, wrapped)

    seen_in(MessagesClient, "decode_request")
    seen_in(ChatUpstream, "encode_request")
    async with open_app(providers=Provider(answers(completion("Hi")))) as served:
        for size, in_main in ((300_000, False), (3_000, True)):
            call = await ask(served, stream=False, system="x" * size).wait()
            assert call.status == 200
            assert threads == [("decode_request", in_main), ("encode_request", in_main)]
            threads.clear()


async def test_what_is_dropped_has_a_header(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It names the fields, also when a keep-alive has begun the stream."""
    async with open_app(providers=Provider((Head(), Pause(20), *says("a")))) as served:
        call = await ask(served, context_management={}, metadata={"user_id": "u"}).wait()
        assert call.header("x-trigate-dropped") == "context_management,metadata.user_id"
        assert call.body.startswith(b": keep-alive\n\nevent: message_start\n")


async def test_keep_alives_are_pings_behind_the_first_event(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The first event has to be ``message_start``; before it, a comment breaks the silence."""
    async with open_app(providers=Provider((Pause(20), Say(content("a")), Pause(20), Say(DONE)))) as served:
        call = await ask(served).wait()
        comment, _, rest = call.body.partition(b"\n\n")
        assert comment == b": keep-alive"
        assert [each["type"] for each in decoded(rest)].count("ping") == 1
        message_of(rest)


@pytest.mark.parametrize("end", [Break(), Say(event({"error": {"message": "m", "type": "overloaded_error"}}))])
async def test_a_stream_that_fails(open_app: OpenApp, autojump_clock: MockClock, end: Any) -> None:
    """Its block ends, then comes an error event, and no ``message_stop``."""
    async with open_app(providers=Provider((Say(content("a")), Pause(1), end))) as served:
        call = await ask(served, headers={"x-request-id": "abc"}).wait()
        last = decoded(call.body)[-1]
        assert last["type"] == "error"
        assert last["request_id"] == "abc"
        assert last["error"]["type"] == "upstream_error"
        assert decoded(call.body)[-2] == {"type": "content_block_stop", "index": 0}
        assert b"message_stop" not in call.body
        served.assert_clean()


async def test_errors_before_the_answer(open_app: OpenApp) -> None:
    """They have Anthropic's shape and status; a request that is too long is told in its words."""
    async with open_app() as served:
        provider = served.providers["up"]
        provider.play(answers(b'{"error":{"message":"busy"}}', status=503))
        call = await ask(served).wait()
        assert (call.status, call.error["type"]) == (529, "overloaded_error")
        assert call.header("x-should-retry") == "false"
        said = "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens."
        provider.play(answers(msgspec.json.encode({"error": {"message": said}}), status=400))
        call = await ask(served).wait()
        assert (call.status, call.error["message"]) == (400, "prompt is too long: 9000 tokens > 8192 maximum")
        call = await ask(served, model="nothing/here").wait()
        assert (call.status, call.error["type"]) == (404, "not_found_error")
        call = await ask(served, container="c").wait()
        assert (call.status, call.json["request_id"]) == (400, call.header("request-id"))
        call = await served.client.ask("GET", "/v1/messages")
        assert (call.status, call.json["type"]) == (405, "error")
        call = await served.client.ask("POST", "/v1/messages/batches", {})
        assert (call.status, call.error["type"]) == (404, "not_found_error")
        call = await served.client.ask("POST", "/v1/messages", {"model": "up/m", "messages": [{"role": "user"}]})
        assert (call.status, call.error["message"]) == (400, "You must provide max_tokens.")


async def test_the_client_disconnects(open_app: OpenApp) -> None:
    """The upstream is closed at once."""
    async with open_app(providers=Provider((Say(content("a")), Pause(1000)))) as served:
        call = ask(served)
        await call.wait_for(b"text_delta")
        call.disconnect()
        await wait_all_tasks_blocked()
        assert served.providers["up"].calls[0].ended == "closed"
        assert served.settled[0].outcome == "cancelled"
        served.assert_clean()


async def test_failover_of_a_translated_call(open_app: OpenApp) -> None:
    """Until the first content, another target may answer."""
    config = make_config({"a": {}, "b": {}}, models={"both": {"targets": ["a/m", "b/m"]}})
    async with open_app(config, {"a": Provider((Say(role()), Break())), "b": Provider(says("x"))}) as served:
        call = await ask(served, model="both").wait()
        assert message_of(call.body)["content"] == [{"type": "text", "text": "x"}]
        assert call.header("x-trigate-upstream") == "b"


# -- as it is ---------------------------------------------------------------------------------------------------------


async def test_the_same_format_is_relayed_byte_for_byte(open_app: OpenApp) -> None:
    """Only the model id changes, in both directions; new fields and headers go through, credentials do not."""
    script = tuple(map(Say, (NATIVE_START, *NATIVE_REST, NATIVE_STOP)))
    async with open_app(native(), {"up": Provider(), "native": Provider(script)}) as served:
        sent_body = (
            b'{ "model": "native/c",\n "max_tokens":9, "new": {"x": 1.0},"stream":true, '
            b'"messages":[{"role":"user","content":"Hi"}] }'
        )
        call = await served.client.ask(
            "POST",
            "/v1/messages",
            sent_body,
            headers={
                "content-type": "application/json",
                "x-api-key": "of the client",
                "anthropic-version": "2030-01-01",
                "anthropic-beta": "new-2030",
                "anthropic-new": "n",
                "cookie": "c",
            },
        )
        whole = b"".join((NATIVE_START, *NATIVE_REST, NATIVE_STOP))
        assert call.body == whole.replace(b'"c-2026"', b'"native/c"')
        [sent] = served.providers["native"].calls
        assert sent.path == "/v1/messages"
        assert sent.body == sent_body.replace(b'"native/c"', b'"c"')
        assert sent.headers["x-api-key"] == "secret-of-native"
        assert "authorization" not in sent.headers
        assert "cookie" not in sent.headers
        assert [sent.headers[name] for name in ("anthropic-version", "anthropic-beta", "anthropic-new")] == [
            "2030-01-01",
            "new-2030",
            "n",
        ]
        assert served.settled[0].usage == Usage(50, 12, 40, 7)  # with the tokens of the cache
        served.assert_clean()


async def test_a_native_answer(open_app: OpenApp) -> None:
    """The whole answer has the public id; the version has a default."""
    answer = {**MESSAGE, "usage": START_USAGE}
    async with open_app(
        native(), {"up": Provider(), "native": Provider(answers(msgspec.json.encode(answer)))}
    ) as served:
        call = await ask(served, model="c", stream=False).wait()
        assert call.json == {**answer, "model": "c"}
        assert served.providers["native"].calls[0].headers["anthropic-version"] == "2023-06-01"
        assert served.settled[0].usage == Usage(50, 1, 40, 7)


async def test_a_native_answer_in_the_other_form(open_app: OpenApp) -> None:
    """JSON for a stream becomes one, event by event, and a stream that answers a plain call becomes a message."""
    answer = {
        **MESSAGE,
        "content": [{"type": "text", "text": "a"}, {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}}],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": START_USAGE,
    }
    provider = Provider(answers(msgspec.json.encode(answer)))
    async with open_app(native(), {"up": Provider(), "native": provider}) as served:
        call = await ask(served, model="native/c").wait()
        assert message_of(call.body) == {**answer, "model": "native/c"}
        provider.play(tuple(map(Say, (NATIVE_START, *NATIVE_REST, NATIVE_STOP))))
        call = await ask(served, model="native/c", stream=False).wait()
        assert (call.json["content"], call.json["stop_reason"]) == (
            [{"type": "text", "text": 'a "model" of'}],
            "end_turn",
        )
        assert call.json["usage"]["output_tokens"] == 12
        assert call.json["model"] == "native/c"


async def test_a_native_error_is_relayed_word_for_word(open_app: OpenApp) -> None:
    """With its status, and before any content also from within a stream."""
    told = b'{"type":"error","error":{"type":"invalid_request_error","message":"safeguards: no"},"request_id":"req_up"}'
    async with open_app(native(), {"up": Provider(), "native": Provider(answers(told, status=400))}) as served:
        call = await ask(served, model="native/c").wait()
        assert (call.status, call.body) == (400, told)
        overloaded = named("error", error={"type": "overloaded_error", "message": "Overloaded"})
        served.providers["native"].play((Say(NATIVE_START), Say(overloaded)))
        call = await ask(served, model="native/c").wait()
        assert (call.status, call.error) == (529, {"type": "overloaded_error", "message": "Overloaded"})


async def test_a_native_stream_without_its_end(open_app: OpenApp) -> None:
    """It is truncated."""
    script = tuple(map(Say, (NATIVE_START, *NATIVE_REST)))
    async with open_app(native(), {"up": Provider(), "native": Provider(script)}) as served:
        call = await ask(served, model="native/c").wait()
        assert decoded(call.body)[-1]["type"] == "error"
        assert served.settled[0].outcome == "upstream_truncated"


async def test_failover_across_formats(open_app: OpenApp) -> None:
    """The native target fails before its first content, and the other one answers, translated; on the way back, the
    thinking that it gave never reaches Anthropic."""
    script = (Say(NATIVE_START), Say(named("error", error={"type": "overloaded_error", "message": "m"})))
    providers = {"up": Provider(says("x")), "native": Provider(script)}
    async with open_app(native("native/c", "up/m"), providers) as served:
        call = await ask(served, model="both").wait()
        assert message_of(call.body)["content"] == [{"type": "text", "text": "x"}]
        thinking = {"type": "thinking", "thinking": "hm", "signature": mark_of("hm")}
        turn = {"role": "assistant", "content": [thinking, {"type": "text", "text": "x"}]}
        messages = [{"role": "user", "content": "a"}, turn, {"role": "user", "content": "b"}]
        await ask(served, model="both", messages=messages).wait()
        sent = served.providers["native"].calls[-1].json
        assert sent["messages"][1]["content"] == [{"type": "text", "text": "x"}]


async def test_what_one_format_cannot_express_goes_to_the_next_target(open_app: OpenApp) -> None:
    """A field that is refused for one upstream is no reason to refuse it for all."""
    answer = answers(msgspec.json.encode({**MESSAGE, "usage": START_USAGE}))
    async with open_app(native("up/m", "native/c"), {"up": Provider(), "native": Provider(answer)}) as served:
        call = await ask(served, model="both", stream=False, container="c").wait()
        assert call.header("x-trigate-upstream") == "native"
        assert served.providers["up"].opened == 0


async def test_other_calls_never_reach_a_native_upstream(open_app: OpenApp) -> None:
    """A call that is not translated is refused by name, or goes to the next target; it is not sent on as it is."""
    embeddings = b'{"data":[{"embedding":[1.0]}]}'
    providers = {"up": Provider(answers(embeddings)), "native": Provider()}
    async with open_app(native("native/c", "up/m"), providers) as served:
        call = await served.client.ask("POST", "/v1/embeddings", {"model": "native/c", "input": "a"})
        assert (call.status, call.error["code"]) == (501, "upstream_unsupported")
        assert "Anthropic's format" in call.error["message"]
        call = await served.client.ask("POST", "/v1/embeddings", {"model": "both", "input": "a"})
        assert call.header("x-trigate-upstream") == "up"
        assert served.providers["native"].opened == 0
        assert served.gateway.generations.current.upstreams["native"].last_error is None
        assert served.gateway.generations.current.route("default").targets[0].upstream == "up"


async def test_tokens_are_counted_by_the_upstream(open_app: OpenApp) -> None:
    """One that cannot is answered for with a 501, after which clients count for themselves."""
    providers = {"up": Provider(), "native": Provider(answers(b'{"input_tokens":14}'))}
    async with open_app(native(), providers) as served:
        body = {"model": "native/c", "messages": [{"role": "user", "content": "Hi"}]}
        call = await served.client.ask("POST", "/v1/messages/count_tokens", body)
        assert call.json == {"input_tokens": 14}
        assert served.providers["native"].calls[0].path == "/v1/messages/count_tokens"
        call = await served.client.ask("POST", "/v1/messages/count_tokens", {**body, "model": "up/m"})
        assert (call.status, call.error["type"], call.header("x-should-retry")) == (501, "not_supported", "false")
        assert served.providers["up"].opened == 0


# -- around it --------------------------------------------------------------------------------------------------------


async def test_the_list_of_models(open_app: OpenApp) -> None:
    """With ``anthropic-version``, the list and its errors are in Anthropic's format, by pages."""
    async with open_app(native(), {"up": Provider(), "native": Provider()}) as served:
        headers = {"anthropic-version": "2023-06-01"}
        call = await served.client.ask("GET", "/v1/models?limit=1&after_id=default", headers=headers)
        [model] = call.json["data"]
        assert (model["id"], model["type"], call.json["has_more"], call.json["last_id"]) == (
            "up/m",
            "model",
            True,
            "up/m",
        )
        assert model["created_at"].endswith("Z")
        call = await served.client.ask("GET", "/v1/models/native/c", headers=headers)
        assert (call.json["id"], call.json["display_name"]) == ("native/c", "native/c")
        for path, status in (("/v1/models/x", 404), ("/v1/models?limit=0", 400)):
            call = await served.client.ask("GET", path, headers=headers)
            assert (call.status, call.json["type"]) == (status, "error")
            assert call.json["request_id"] == call.header("x-request-id")
        assert (await served.client.ask("GET", "/v1/models")).json["object"] == "list"


async def test_keys(open_app: OpenApp) -> None:
    """Both headers are taken, and a refusal has Anthropic's shape. Whether anything is there needs no key."""
    config = make_config(keys={"k": "a key of the gateway"})
    async with open_app(config) as served:
        for headers in ({"x-api-key": "a key of the gateway"}, {"authorization": "Bearer a key of the gateway"}):
            assert (await ask(served, headers=headers).wait()).status == 200
        call = await ask(served, headers={"x-api-key": "wrong"}).wait()
        assert (call.status, call.error["type"]) == (401, "authentication_error")
        call = await served.client.ask("HEAD", "/")
        assert (call.status, call.body) == (200, b"")


# -- what was reported of other gateways ------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [(), (Say(b""),), (Say(b": comment\n\n"),)])
async def test_a_stream_of_nothing(open_app: OpenApp, script: Any) -> None:
    """An upstream that answers 200 and says nothing is an error at once, not a client that waits."""
    async with open_app(providers=Provider(script)) as served:
        call = await ask(served).wait()
        assert (call.status, call.error["type"]) == (502, "api_error")


async def test_limits_of_the_upstream_are_its_own(open_app: OpenApp) -> None:
    """Its ``anthropic-ratelimit`` headers speak of the operator's account, and would be taken for the client's."""
    told = {"anthropic-ratelimit-requests-remaining": "0", "anthropic-ratelimit-unified-status": "rejected"}
    answer = {**MESSAGE, "usage": START_USAGE}
    body = msgspec.json.encode(answer)
    async with open_app(native(), {"up": Provider(), "native": Provider()}) as served:
        for status in (200, 429):
            served.providers["native"].play(answers(body, status=status, headers=told))
            call = await ask(served, model="native/c", stream=False).wait()
            assert call.status == status
            assert not [name for name, _ in call.headers if name.startswith(b"anthropic-")]


async def test_a_wrong_key_is_final(open_app: OpenApp) -> None:
    """Claude Code would send the call again for minutes; in OpenAI's format, nothing changes."""
    async with open_app(make_config(keys={"a": "key-of-a"})) as served:
        call = await ask(served, headers={"x-api-key": "wrong"}).wait()
        assert (call.status, call.header("x-should-retry")) == (401, "false")
        call = await served.client.chat().wait()
        assert (call.status, call.header("x-should-retry")) == (401, "")


@pytest.mark.parametrize(
    "block",
    [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "thinking", "thinking": "hm"},
        {"type": "thinking", "thinking": "", "signature": "EqQB"},
        {"type": "redacted_thinking", "data": "EmwK"},
    ],
)
async def test_thinking_of_every_kind(open_app: OpenApp, block: dict[str, str]) -> None:
    """Unsigned, without its text, or encrypted: it breaks no translated call, becomes no empty reasoning, and goes to
    an upstream of the same format as it is."""
    turn = {"role": "assistant", "content": [block, {"type": "text", "text": "a"}]}
    messages = [{"role": "user", "content": "q"}, turn, {"role": "user", "content": "r"}]
    config = make_config({"up": {"history_fields": ["reasoning_content"]}, "native": NATIVE})
    async with open_app(config, {"up": Provider(says("x")), "native": Provider()}) as served:
        call = await ask(served, messages=messages).wait()
        assert message_of(call.body)["content"] == [{"type": "text", "text": "x"}]
        sent = served.providers["up"].calls[0].json["messages"][1]
        text = block.get("thinking")
        assert sent == {"role": "assistant", "content": "a", **({"reasoning_content": text} if text else {})}
        assert call.header("x-trigate-dropped") == ("" if text else "thinking")
        await ask(served, model="native/c", messages=messages).wait()
        assert served.providers["native"].calls[0].json["messages"] == messages
