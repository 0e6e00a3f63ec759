"""One request end to end, in memory and in virtual time: what the client receives and when the upstream connection is
closed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.asgi_client import chat
from tests.support.gateway import OpenApp, make_config
from tests.support.logs import Logs
from tests.support.provider import (
    DONE,
    FINISH,
    Break,
    Head,
    Pause,
    Provider,
    Refuse,
    Say,
    Script,
    SlowConnect,
    Stall,
    answers,
    chunk,
    completion,
    content,
    event,
    role,
    says,
    usage,
)
from trigate.exchange import view
from trigate.openai.answer import Usage
from trigate.openai.endpoints import ENDPOINTS

NATIVE = make_config({"up": {"responses": "native"}})
"""An upstream that serves the Responses API itself."""

KEEP_ALIVE = b": keep-alive\n\n"


def two(**limits: Any) -> Any:  # Any: a Config of any limits
    """Two upstreams, ``a`` and ``b``, behind the model ``both``."""
    return make_config({"a": {}, "b": {}}, models={"both": {"targets": ["a/m", "b/m"]}}, limits=limits)


# -- complete answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        (
            "/v1/responses",
            b'{"prompt":{"id":"pmpt_1"},"input":"Hi"}',
            b'{"object":"response","model":"gpt-5","output":[]}',
        ),
        (
            "/v1/responses",
            b'{"input":"Hi","stream_options":{"include_obfuscation":true}}',
            b'{"object":"response","output":[]}',
        ),
        ("/v1/moderations", b'{"input":"Hi"}', b'{"id":"modr-1","model":"omni-moderation-latest","results":[]}'),
        ("/v1/images/generations", b'{"prompt":"a","model":null}', b'{"created":1,"data":[]}'),
    ],
)
async def test_a_call_without_a_model(open_app: OpenApp, path: str, body: bytes, answer: bytes) -> None:
    """It goes to the upstream of ``default`` byte for byte, and its answer comes back as it is, with the model that the
    upstream has chosen."""
    config = make_config({"a": {}, "b": {"responses": "native"}}, models={"default": {"targets": ["b/m"]}})
    providers = {"a": Provider(), "b": Provider(answers(answer))}
    async with open_app(config, providers) as served:
        call = await served.client.ask("POST", path, body, headers={"content-type": "application/json"})
        assert (call.status, call.body) == (200, answer)
        assert call.header("x-trigate-upstream") == "b"
        assert providers["b"].calls[0].body == body
        assert served.settled[0].call.model == "default"


async def test_a_stream_without_a_model(open_app: OpenApp) -> None:
    """The events keep the upstream's model id."""
    script = (
        Say(event({"type": "response.created", "response": {"model": "gpt-5"}})),
        Say(event({"type": "response.output_text.delta", "delta": "Hi"})),
        Say(event({"type": "response.completed", "response": {"model": "gpt-5"}})),
    )
    async with open_app(NATIVE, Provider(script)) as served:
        call = await served.client.ask("POST", "/v1/responses", {"input": "Hi", "stream": True})
        assert call.body == b"".join(step.data for step in script)


async def test_a_stream_is_relayed_byte_for_byte(open_app: OpenApp) -> None:
    """The stream carries every byte of every event, with the public model id and the headers of an event stream."""
    script = says("Hello", "!")
    async with open_app(providers=Provider(script)) as served:
        call = await served.client.chat().wait()
        sent = b"".join(step.data for step in script if isinstance(step, Say))
        assert call.status == 200
        assert call.body == sent.replace(b'"model":"m"', b'"model":"up/m"')
        assert call.header("content-type") == "text/event-stream; charset=utf-8"
        assert call.header("cache-control") == "no-cache"
        assert call.header("x-accel-buffering") == "no"
        assert call.header("x-request-id").startswith("req_")
        assert call.header("content-length") == ""
        assert served.settled[0].outcome == "complete"
        assert served.providers["up"].calls[0].ended == "complete"
        served.assert_clean()


async def test_the_request_that_is_sent_upstream(open_app: OpenApp) -> None:
    """It has the client's fields unchanged, the upstream's model id, identity encoding and the request id."""
    config = make_config({"up": {"api_key": "secret-of-up", "headers": {"X-Org": "o"}}})
    async with open_app(config, Provider(answers(completion("x")))) as served:
        body = chat(stream=False, seed=12345678901234567890, unknown={"deep": [None]})
        call = await served.client.ask(
            "POST", "/v1/chat/completions", body, headers={"x-request-id": "abc-1", "openai-beta": "b", "cookie": "c"}
        )
        assert call.status == 200
        [sent] = served.providers["up"].calls
        assert sent.path == "/v1/chat/completions"
        assert sent.json == {**body, "model": "m"}
        assert b"12345678901234567890" in sent.body
        assert sent.headers["authorization"] == "Bearer secret-of-up"
        assert sent.headers["x-org"] == "o"
        assert sent.headers["accept-encoding"] == "identity"
        assert sent.headers["x-request-id"] == "abc-1"
        assert sent.headers["openai-beta"] == "b"
        assert "cookie" not in sent.headers


async def test_a_json_answer_has_the_public_model_id_and_usage(open_app: OpenApp) -> None:
    """``model`` is the requested id, everything else comes from the upstream, and the usage is counted."""
    async with open_app(providers=Provider(answers(completion("Hi", model="m-2025")))) as served:
        call = await served.client.chat(stream=False).wait()
        assert call.status == 200
        assert call.header("content-type") == "application/json"
        assert int(call.header("content-length")) == len(call.body)
        assert call.json["model"] == "up/m"
        assert call.json["choices"][0]["message"]["content"] == "Hi"
        assert call.json["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        assert served.gateway.live.totals.prompt_tokens == 3
        served.assert_clean()


async def test_usage_comes_in_the_last_chunk_and_is_counted(open_app: OpenApp) -> None:
    """The usage chunk comes before ``[DONE]``, as the upstream sent it."""
    script = (Say(content("x")), Say(chunk({}, finish_reason="stop")), Say(usage(7, 11)), Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        call = await served.client.chat(stream_options={"include_usage": True}).wait()
        assert call.body.endswith(usage(7, 11).replace(b'"m"', b'"up/m"') + DONE)
        totals = served.gateway.live.totals
        assert (totals.prompt_tokens, totals.completion_tokens, totals.complete) == (7, 11, 1)


async def test_an_answer_carries_the_alias_as_its_model(open_app: OpenApp) -> None:
    """The client sees the alias, whichever target serves the call."""
    async with open_app(two(), {"a": Provider(), "b": Provider()}) as served:
        call = await served.client.chat(model="both").wait()
        assert call.body.count(b'"model":"both"') == 3
        assert b'"model":"m"' not in call.body


async def test_the_role_waits_for_the_first_content(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """An event without content does not commit the response. It is sent together with the first content, ahead of
    it."""
    script = (Say(role()), Pause(5), Say(content("a")), Pause(1), Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        begun = trio.current_time()
        call = await served.client.chat().wait()
        assert call.committed_at - begun == pytest.approx(5)
        assert b'"role"' in call.pieces[0][1]
        assert b'"a"' in call.pieces[0][1]


async def test_an_event_is_sent_when_it_is_complete(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """An incomplete event is held. Events that arrive together are sent together."""
    whole = content("whole") + content("second")
    script = (Say(content("a")), Say(whole[:10]), Pause(2), Say(whole[10:]), Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        begun = trio.current_time()
        call = await served.client.chat().wait()
        assert [data.count(b"data: ") for _, data in call.pieces] == [1, 2, 2]
        assert [at - begun for at, _ in call.pieces] == pytest.approx([0, 2, 2])


async def test_audio_passes_through_byte_for_byte(open_app: OpenApp) -> None:
    """Audio has no events: bytes are relayed as they arrive, with their content type and length."""
    sound = bytes(range(256)) * 4
    script = (
        Head(200, "audio/mpeg", {"content-length": str(len(sound))}),
        Say(sound[:300]),
        Say(sound[300:]),
    )
    async with open_app(providers=Provider(script)) as served:
        call = await served.client.ask("POST", "/v1/audio/speech", {"model": "up/m", "input": "x", "voice": "v"})
        assert (call.status, call.header("content-type")) == (200, "audio/mpeg")
        assert call.header("content-length") == str(len(sound))
        assert call.body == sound
        served.assert_clean()


async def test_truncated_audio_has_no_final_message(open_app: OpenApp) -> None:
    """Audio cannot carry an error event, so the response gets no final body message and the server breaks the
    connection."""
    script = (Head(200, "audio/mpeg"), Say(b"abc"), Break())
    async with open_app(providers=Provider(script)) as served:
        call = await served.client.ask("POST", "/v1/audio/speech", {"model": "up/m", "input": "x", "voice": "v"})
        assert (call.status, call.body, call.ended) == (200, b"abc", False)
        assert served.settled[0].outcome == "upstream_truncated"
        served.assert_clean()


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("completions", {"prompt": "x"}),
        ("embeddings", {"input": "x"}),
        ("responses", {"input": "x"}),
        ("moderations", {"input": "x"}),
        ("images/generations", {"prompt": "x"}),
    ],
)
async def test_the_other_endpoints_are_relayed(open_app: OpenApp, path: str, fields: dict[str, str]) -> None:
    """They reach the upstream under the same path, and the client gets the upstream's answer."""
    results = ENDPOINTS[f"/v1/{path}"].results
    answer = b'{"object":"x","model":"m","%b":[1]}' % results.encode()
    async with open_app(NATIVE, Provider(answers(answer))) as served:
        call = await served.client.ask("POST", f"/v1/{path}", {"model": "up/m", **fields})
        assert (call.status, call.json) == (200, {"object": "x", "model": "up/m", results: [1]})
        assert served.providers["up"].calls[0].path == f"/v1/{path}"


# -- the client disconnects -------------------------------------------------------------------------------------------

PHASES: dict[str, tuple[Script, bool]] = {
    "connecting": ((SlowConnect(),), True),
    "waiting for headers": ((Stall(),), True),
    "waiting for the first token": ((Head(), Say(role()), Stall()), True),
    "streaming": ((Say(content("a")), Stall()), True),
    "headers of a JSON answer": ((Stall(),), False),
    "reading a JSON answer": ((Head(200, "application/json"), Say(b'{"a'), Stall()), False),
    "reading an error": ((Head(500, "application/json"), Say(b'{"a'), Stall()), True),
}


@pytest.mark.parametrize("how", ["disconnect", "cancel"])
@pytest.mark.parametrize("phase", PHASES)
async def test_a_disconnect_closes_the_upstream_at_once(
    open_app: OpenApp, autojump_clock: MockClock, phase: str, how: str
) -> None:
    """In every phase the upstream is closed at the same moment. The exchange is settled as cancelled, or as draining
    where the server cancelled it."""
    script, stream = PHASES[phase]
    limits = {"connect_timeout_s": 0, "keep_alive_s": 0}
    async with open_app(make_config(limits=limits), Provider(script)) as served:
        call = served.client.chat(stream=stream)
        await trio.sleep(3)
        assert served.providers["up"].open_now == 1
        ended_at = trio.current_time()
        if how == "disconnect":
            call.disconnect()
        else:
            call.scope.cancel()
        await call.wait()
        assert served.providers["up"].closed_at == [ended_at]
        assert call.returned_at == ended_at
        outcome = "cancelled" if how == "disconnect" else "draining"
        assert [exchange.outcome for exchange in served.settled] == [outcome]
        served.assert_clean()


@pytest.mark.parametrize("phase", PHASES)
async def test_a_request_cancelled_by_the_server_gets_a_final_error(
    open_app: OpenApp, autojump_clock: MockClock, phase: str
) -> None:
    """A request that the server cancels still ends with a status or an error event."""
    script, stream = PHASES[phase]
    async with open_app(make_config(limits={"connect_timeout_s": 0, "keep_alive_s": 0}), Provider(script)) as served:
        call = served.client.chat(stream=stream)
        await trio.sleep(3)
        call.scope.cancel()
        await call.wait()
        assert call.status == (200 if phase == "streaming" else 503)
        assert call.error["code"] == "draining"
        assert call.ended
        assert b"[DONE]" not in call.body
        assert [exchange.outcome for exchange in served.settled] == ["draining"]


async def test_a_stopping_server_does_not_wait_for_a_stalled_client(
    open_app: OpenApp, autojump_clock: MockClock
) -> None:
    """A final message that cannot be sent promptly is not sent."""
    async with open_app(providers=Provider((Say(content("a")), Stall()))) as served:
        call = served.client.chat()
        await call.wait_for(b"data")
        call.stall()
        call.scope.cancel()
        stopped = trio.current_time()
        with trio.move_on_after(20) as patience:
            await call.wait()
        assert not patience.cancelled_caught, "the request outlived its cancellation"
        assert call.returned_at - stopped <= 2
        served.assert_clean()


async def test_a_queued_client_that_disconnects_takes_no_slot(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A client that disconnects leaves nothing in the queue, and the next call is served in its turn."""
    config = make_config({"up": {"max_connections": 1}})
    async with open_app(config, Provider((Stall(),), says("x"))) as served:
        first = served.client.chat()
        await wait_all_tasks_blocked()
        queued = [served.client.chat(), served.client.chat()]
        await wait_all_tasks_blocked()
        phases: list[str] = [view.phase(exchange) for exchange in served.gateway.live]
        assert phases.count("queued") == 2
        queued[0].disconnect()
        await queued[0].wait()
        assert (queued[0].status, queued[0].body) == (0, b"")
        first.disconnect()
        await first.wait()
        assert (await queued[1].wait()).body.endswith(DONE)
        assert served.providers["up"].opened == 2
        served.assert_clean()


async def test_a_disconnect_after_the_answer_cancels_nothing(open_app: OpenApp) -> None:
    """The upstream's framing is read to its end, and the exchange is complete."""
    async with open_app(providers=Provider(says("x"))) as served:
        call = served.client.chat()
        await call.wait_for(b"[DONE]")
        call.disconnect()
        await call.wait()
        assert served.settled[0].outcome == "complete"
        assert served.providers["up"].calls[0].ended == "complete"


# -- the upstream fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        ((Refuse(),), 502, "upstream_unavailable"),
        ((Break("fin"),), 502, "upstream_unavailable"),
        ((Break("rst"),), 502, "upstream_unavailable"),
        ((Head(200, "application/json"), Break("fin")), 502, None),
        ((Head(200, "application/json"), Say(b'{"id'), Break("rst")), 502, None),
        ((Head(200, "text/html"), Say(b"<html>")), 502, "upstream_garbled"),
        ((Head(302, "text/html"),), 502, "upstream_garbled"),
        (answers(b'{"error":{"message":"broken"}}', status=500), 502, "upstream_unavailable"),
        (answers(b"busy", status=503), 503, "upstream_unavailable"),
        (answers(b'{"error":{"message":"m"}}', status=529), 503, "upstream_unavailable"),
        (answers(b"[1]"), 502, "upstream_garbled"),
        (answers(b'{"trunc'), 502, "upstream_garbled"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else str(value),
)
async def test_before_commit_a_failure_is_a_status(
    open_app: OpenApp, script: Script, status: int, code: str | None, stream: bool
) -> None:
    """Any failure before the first content becomes a status with an OpenAI error that blames the upstream."""
    async with open_app(providers=Provider(script)) as served:
        call = await served.client.chat(stream=stream).wait()
        assert call.status == status
        assert call.header("content-type") == "application/json"
        assert call.header("x-should-retry") == "false"
        assert set(call.error) >= {"message", "type", "param", "code"}
        assert call.error["type"] == "upstream_error"
        assert "up" in call.error["message"]
        if code is not None:
            assert call.error["code"] == code
        served.assert_clean()


@pytest.mark.parametrize(
    "script",
    [
        (Say(role()), Break("fin")),
        (Say(role()), Break("rst")),
        (Say(role()),),
        (Head(),),
        (Say(content("a")[:20]), Break("fin")),
        (Say(content("a")[:20]),),
    ],
    ids=["fin", "rst", "end", "empty", "half and fin", "half and end"],
)
async def test_a_stream_without_content_is_a_status(open_app: OpenApp, script: Script) -> None:
    """A stream that ends in any way before its first content is a 502, not an empty 200."""
    async with open_app(providers=Provider(script)) as served:
        call = await served.client.chat().wait()
        assert (call.status, call.error["code"]) == (502, "upstream_truncated")
        served.assert_clean()


@pytest.mark.parametrize(
    "rest",
    [
        (Break("fin"),),
        (Break("rst"),),
        (),
        (Say(content("half")[:15]), Break("fin")),
        (Say(content("half")[:15]), Break("rst")),
        (Say(content("half")[:15]),),
        (Say(chunk({}, finish_reason="stop")), Break("fin")),
        (Say(chunk({}, finish_reason="stop")), Say(usage(1, 2)), Break("rst")),
        (Say(b"data: [DO"), Break("fin")),
        (Say(b"data: [DONE]\n"), Break("fin")),
    ],
    ids=[
        "fin", "rst", "end", "mid-event fin", "mid-event rst", "mid-event end", "no DONE fin",
        "no DONE rst", "incomplete DONE", "DONE without its blank line, truncated",
    ],
)  # fmt: skip
async def test_after_commit_a_truncated_stream_ends_in_an_error_event(open_app: OpenApp, rest: Script) -> None:
    """The client gets every complete event, then one error event without ``[DONE]``, then the proper end of the
    response."""
    async with open_app(providers=Provider((Say(content("a")), *rest))) as served:
        call = await served.client.chat().wait()
        assert call.status == 200
        assert call.body.startswith(content("a").replace(b'"m"', b'"up/m"'))
        assert call.error["code"] == "upstream_truncated"
        assert call.error["message"]
        assert b"[DONE]" not in call.body
        assert b"half" not in call.body
        assert call.body.count(b'"error"') == 1
        assert call.body.endswith(b"\n\n")
        assert call.ended
        assert served.settled[0].outcome == "upstream_truncated"
        served.assert_clean()


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_connection_broken_after_done_is_harmless(open_app: OpenApp, how: Any) -> None:
    """After ``[DONE]`` the answer is complete, however its connection ends."""
    async with open_app(providers=Provider((*says("x"), Break(how)))) as served:
        call = await served.client.chat().wait()
        assert call.body.endswith(DONE)
        assert b'"error"' not in call.body
        assert served.settled[0].outcome == "complete"
        served.assert_clean()


@pytest.mark.parametrize("end", [b"data: [DONE]", b"data: [DONE]\n"])
async def test_done_without_a_blank_line_completes_the_stream(open_app: OpenApp, end: bytes) -> None:
    """A body that ends properly right after ``[DONE]`` is complete."""
    async with open_app(providers=Provider((Say(content("a")), Say(FINISH), Say(end)))) as served:
        call = await served.client.chat().wait()
        assert call.body.endswith(b"data: [DONE]\n\n")
        assert served.settled[0].outcome == "complete"


async def test_an_upstream_that_never_ends_its_body_is_closed(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """After ``[DONE]`` the client's response ends at once. The upstream gets a short grace period and is then
    closed."""
    async with open_app(providers=Provider((*says("x"), Stall()))) as served:
        begun = trio.current_time()
        call = await served.client.chat().wait()
        assert call.ended_at == begun
        assert call.returned_at - begun < 1
        assert served.providers["up"].calls[0].ended == "closed"
        served.assert_clean()


async def test_json_for_a_streamed_call_becomes_a_stream(open_app: OpenApp) -> None:
    """A provider that does not stream: the client gets one event with the whole answer, and ``[DONE]``."""
    script = (Head(200, "application/json"), Say(b"\n "), Say(completion("Hel")[:50]), Say(completion("Hel")[50:]))
    async with open_app(providers=Provider(script)) as served:
        call = await served.client.chat(stream=True).wait()
        assert call.header("content-type").startswith("text/event-stream")
        assert b'"delta":{"role":"assistant","content":"Hel"}' in call.body
        assert b'"model":"up/m"' in call.body
        assert call.body.endswith(b"\n\ndata: [DONE]\n\n")
        assert (served.settled[0].outcome, served.settled[0].usage) == ("complete", Usage(3, 2))
        served.assert_clean()


async def test_a_stream_for_a_plain_call_becomes_json(open_app: OpenApp) -> None:
    """A provider that always streams: the client gets one JSON answer. A truncated stream is an error."""
    async with open_app(providers=Provider(says("Hel", "lo"), (Say(content("Hel")),))) as served:
        call = await served.client.chat(stream=False).wait()
        assert call.header("content-type") == "application/json"
        assert call.json["choices"][0]["message"] == {"role": "assistant", "content": "Hello"}
        assert (call.json["object"], call.json["model"]) == ("chat.completion", "up/m")
        cut = await served.client.chat(stream=False).wait()
        assert (cut.status, cut.error["code"]) == (502, "upstream_truncated")
        served.assert_clean()


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "application/octet-stream", "text/html"])
async def test_a_stream_of_another_content_type(open_app: OpenApp, kind: str) -> None:
    """What the body is decides, however it is split."""
    body = content("Hello") + DONE
    script = (Head(200, kind), Say(b"\xef\xbb\xbf"), Say(b"\n"), Say(body[:3]), Say(body[3:]))
    async with open_app(providers=Provider(script)) as served:
        assert (await served.client.chat(stream=True).wait()).body.endswith(DONE)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_object_with_status_200(open_app: OpenApp, stream: bool) -> None:
    """It has the status that it stands for, and the provider's fields."""
    async with open_app(providers=Provider(answers(b'{"error":{"message":"over quota","code":"q"}}'))) as served:
        call = await served.client.chat(stream=stream).wait()
        assert (call.status, call.error["message"], call.error["code"]) == (429, "over quota", "q")
        assert call.header("x-should-retry") == "false"


async def test_too_much_json_for_a_streamed_call(open_app: OpenApp) -> None:
    """The limit of an event is that of the one event that it becomes."""
    script = (Head(200, "application/json"), Say(b'{"x":"'), Say(b"a" * 3000))
    async with open_app(make_config(limits={"event_bytes": 2000}), Provider(script)) as served:
        assert (await served.client.chat(stream=True).wait()).error["code"] == "upstream_garbled"


async def test_an_error_event_first_is_a_status(open_app: OpenApp) -> None:
    """A stream that opens with an error has not begun: the client gets a status and the upstream's message."""
    script = (Say(event({"error": {"message": "overloaded now", "code": "busy", "type": "t"}})),)
    async with open_app(providers=Provider(script)) as served:
        call = await served.client.chat().wait()
        assert call.status == 503
        assert call.error["message"] == "overloaded now"
        served.assert_clean()


async def test_an_error_event_later_is_passed_on_and_ends_the_stream(open_app: OpenApp) -> None:
    """The client gets the upstream's message in one error event. A ``[DONE]`` after it is dropped."""
    script = (Say(content("a")), Say(event({"error": {"message": "died", "code": "x"}}) + DONE))
    async with open_app(providers=Provider(script)) as served:
        call = await served.client.chat().wait()
        assert call.status == 200
        assert call.error["message"] == "died"
        assert call.body.count(b'"error"') == 1
        assert b"[DONE]" not in call.body
        served.assert_clean()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 429, 451])
async def test_upstream_4xx_bodies_pass_through(open_app: OpenApp, status: int, stream: bool) -> None:
    """Status and body are the upstream's byte for byte, and so is ``retry-after``."""
    body = b'{"error": {"message":"their words","type":"their_type","param":"p","code":"their_code"}, "more": 1.0}'
    async with open_app(providers=Provider(answers(body, status=status, headers={"retry-after": "9"}))) as served:
        call = await served.client.chat(stream=stream).wait()
        assert (call.status, call.body) == (status, body)
        assert call.header("retry-after") == "9"
        assert call.header("x-should-retry") == "false"
        served.assert_clean()


async def test_a_4xx_that_is_not_json_is_wrapped(open_app: OpenApp) -> None:
    """The client always gets an OpenAI error."""
    async with open_app(providers=Provider((Head(404, "text/html"), Say(b"<h1>no</h1>")))) as served:
        call = await served.client.chat().wait()
        assert call.status == 404
        assert call.error["message"] == "The upstream up answered 404 with a page: no"


async def test_a_secret_that_the_upstream_quotes_is_not_passed_on(open_app: OpenApp) -> None:
    """Some providers quote the key that they reject; the gateway removes it."""
    config = make_config({"up": {"api_key": "sk-very-secret-1"}})
    body = b'{"error":{"message":"Incorrect API key provided: sk-very-secret-1."}}'
    async with open_app(config, Provider(answers(body, status=401))) as served:
        call = await served.client.chat().wait()
        assert call.status == 401
        assert b"sk-very" not in call.body
        status = await served.client.ask("GET", "/status")
        assert b"sk-very" not in status.body


async def test_an_event_over_the_limit_is_refused(open_app: OpenApp) -> None:
    """Memory is bounded: an event that never ends is an error, before and after COMMIT."""
    config = make_config(limits={"event_bytes": 2000})
    endless = (Say(b"data: " + b"x" * 1500), Say(b"x" * 1500), Stall())
    async with open_app(config, Provider(endless, (Say(content("a")), *endless))) as served:
        call = await served.client.chat().wait()
        assert (call.status, call.error["code"]) == (502, "upstream_garbled")
        call = await served.client.chat().wait()
        assert (call.status, call.error["code"]) == (200, "upstream_garbled")
        assert call.ended
        served.assert_clean()


async def test_an_endless_stream_without_content_is_refused(open_app: OpenApp) -> None:
    """Events without content are held only up to a limit."""
    config = make_config(limits={"event_bytes": 2000})
    async with open_app(config, Provider((Say(role()),) * 50)) as served:
        call = await served.client.chat().wait()
        assert (call.status, call.error["code"]) == (502, "upstream_garbled")
        assert served.providers["up"].calls[0].pieces_read < 20
        served.assert_clean()


async def test_a_json_answer_over_the_limit_is_refused(open_app: OpenApp) -> None:
    """The body is read no further than the limit."""
    config = make_config(limits={"response_bytes": 1000})
    script = (Head(200, "application/json"), *(Say(b"x" * 400),) * 50)
    async with open_app(config, Provider(script)) as served:
        call = await served.client.chat(stream=False).wait()
        assert (call.status, call.error["code"]) == (502, "upstream_garbled")
        assert served.providers["up"].calls[0].pieces_read == 3
        served.assert_clean()


# -- failover to the next target --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "script",
    [
        (Refuse(),),
        (SlowConnect(),),
        (Break("fin"),),
        (Break("rst"),),
        (Stall(),),
        answers(b"{}", status=500),
        answers(b"{}", status=503),
        answers(b'{"error":{"message":"slow down"}}', status=429),
        (Head(200, "text/html"), Say(b"x")),
        (Head(200, "application/json"), Say(b'{"a'), Break()),
        (Head(200, "application/json"), Say(b'{"a'), Stall()),
    ],
    ids=[
        "refused",
        "slow connect",
        "fin",
        "rst",
        "stall",
        "500",
        "503",
        "429",
        "html",
        "truncated JSON",
        "stalled JSON",
    ],
)
async def test_a_retryable_failure_goes_to_the_next_target(
    open_app: OpenApp, autojump_clock: MockClock, script: Script, stream: bool
) -> None:
    """Before COMMIT another target may be tried. The client sees only that target's answer, under the same model id."""
    good = says("from b") if stream else answers(completion("from b"))
    config = two(first_token_timeout_s=5, idle_timeout_s=5, connect_timeout_s=5, keep_alive_s=0)
    async with open_app(config, {"a": Provider(script), "b": Provider(good)}) as served:
        call = await served.client.chat(model="both", stream=stream).wait()
        assert call.status == 200
        assert b"from b" in call.body
        assert b'"model":"both"' in call.body
        assert b'"error"' not in call.body
        [exchange] = served.settled
        assert [(str(attempt.target), attempt.error is None) for attempt in exchange.attempts] == [
            ("a/m", False),
            ("b/m", True),
        ]
        assert exchange.outcome == "complete"
        served.assert_clean()


@pytest.mark.parametrize(
    "script",
    [
        (Say(role()), Break()),
        (Head(), Stall()),
        (Say(role()), Stall()),
        (Say(event({"error": {"message": "no"}})),),
        (Head(200, "application/json"), Say(b"{}")),
    ],
    ids=["truncated after the role", "stalled after the head", "stalled after the role", "error event", "JSON"],
)
async def test_a_stream_without_content_goes_to_the_next_target(
    open_app: OpenApp, autojump_clock: MockClock, script: Script
) -> None:
    """Nothing is sent before the first content, so the next target can still answer. Nothing of the first stream
    remains."""
    providers = {"a": Provider(script), "b": Provider((Say(content("from b")), Say(DONE)))}
    async with open_app(two(first_token_timeout_s=5), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert call.body == content("from b").replace(b'"m"', b'"both"') + DONE
        served.assert_clean()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_a_refusal_does_not_go_to_the_next_target(open_app: OpenApp, status: int) -> None:
    """The next target would refuse the same call, and the client must see the reason."""
    providers = {"a": Provider(answers(b'{"error":{"message":"bad"}}', status=status)), "b": Provider()}
    async with open_app(two(), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert call.status == status
        assert served.providers["b"].opened == 0


async def test_after_commit_there_is_no_next_target(open_app: OpenApp) -> None:
    """The client must not get a part of one answer followed by another."""
    async with open_app(two(), {"a": Provider((Say(content("a")), Break())), "b": Provider()}) as served:
        call = await served.client.chat(model="both").wait()
        assert call.error["code"] == "upstream_truncated"
        assert served.providers["b"].opened == 0


async def test_all_targets_fail(open_app: OpenApp) -> None:
    """The client gets the error, with a header that asks its SDK not to retry."""
    providers = {"a": Provider((Refuse(),)), "b": Provider(answers(b"{}", status=503))}
    async with open_app(two(), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert (call.status, call.error["code"]) == (503, "upstream_unavailable")
        assert call.header("x-should-retry") == "false"
        assert [attempt.outcome for attempt in served.settled[0].attempts] == ["upstream_unavailable"] * 2


async def test_the_next_target_may_come_after_a_keep_alive(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A keep-alive commits the status but not the answer, so failover is still possible, and only one head is sent."""
    providers = {"a": Provider((Pause(20), Break())), "b": Provider(says("from b"))}
    async with open_app(two(), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert call.body.startswith(KEEP_ALIVE + b"data: ")
        assert call.body.endswith(DONE)
        assert b"from b" in call.body
        assert b'"error"' not in call.body


# -- keep-alive -------------------------------------------------------------------------------------------------------


async def test_keep_alive_before_the_first_token(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """After each 15 s of silence one comment is sent, with a blank line. The first one commits status 200."""
    async with open_app(providers=Provider((Pause(40), *says("x")))) as served:
        begun = trio.current_time()
        call = await served.client.chat().wait()
        assert call.status == 200
        assert call.committed_at - begun == pytest.approx(15)
        comments = [at - begun for at, data in call.pieces if data == KEEP_ALIVE]
        assert comments == [pytest.approx(15), pytest.approx(30)]
        assert call.body.startswith(KEEP_ALIVE * 2 + b"data: ")
        assert call.body.endswith(DONE)
        assert call.header("content-type") == "text/event-stream; charset=utf-8"


async def test_keep_alive_in_the_middle_counts_from_the_last_event(
    open_app: OpenApp, autojump_clock: MockClock
) -> None:
    """An event restarts the keep-alive timer. The upstream's own comments do not, and they are not passed on."""
    script = (Say(content("a")), Pause(10), Say(content("b")), Pause(10), Say(b": upstream\n\n"), Pause(6), Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        begun = trio.current_time()
        call = await served.client.chat().wait()
        assert [at - begun for at, data in call.pieces if data == KEEP_ALIVE] == [pytest.approx(25)]
        assert b"upstream" not in call.body


async def test_keep_alive_while_queued(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A call that waits for an upstream slot gets keep-alives too."""
    config = make_config({"up": {"max_connections": 1}})
    async with open_app(config, Provider((Pause(20), *says("x")))) as served:
        served.client.chat()
        await wait_all_tasks_blocked()
        second = await served.client.chat().wait()
        assert second.body.startswith(KEEP_ALIVE)
        assert second.body.endswith(DONE)


async def test_keep_alive_as_a_line(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """With ``keep_alive_form = "line"``, no blank line follows the comment."""
    config = make_config(limits={"keep_alive_form": "line"})
    async with open_app(config, Provider((Pause(20), *says("x")))) as served:
        call = await served.client.chat().wait()
        assert call.body.startswith(b": keep-alive\ndata: ")


async def test_keep_alive_is_for_streams_only(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A JSON answer cannot carry keep-alives, and 0 switches them off for streams."""
    async with open_app(providers=Provider((Pause(100), *answers(completion("x"))))) as served:
        call = await served.client.chat(stream=False).wait()
        assert (call.status, call.json["model"]) == (200, "up/m")
    async with open_app(make_config(limits={"keep_alive_s": 0}), Provider((Pause(100), *says("x")))) as served:
        call = await served.client.chat().wait()
        assert b":" not in call.body.partition(b"data")[0]


async def test_a_failure_after_a_keep_alive_is_an_error_event(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The status is already sent, so the failure is an error event with the message that the body would have had."""
    body = b'{"error":{"message":"their words","code":"c"}}'
    async with open_app(providers=Provider((Pause(20), *answers(body, status=400)))) as served:
        call = await served.client.chat().wait()
        assert call.status == 200
        assert call.body == KEEP_ALIVE + b"data: " + body + b"\n\n"
        assert call.ended


@pytest.mark.parametrize("attempt", range(8))
async def test_a_keep_alive_never_lands_in_a_status(open_app: OpenApp, autojump_clock: MockClock, attempt: int) -> None:
    """An answer that arrives at the moment of the first keep-alive is a status or a stream, never a mix of both."""
    scripts = ((Break(),), answers(b'{"error":{"message":"m"}}', status=400), says("x"), (Head(200, "text/html"),))
    async with open_app(providers=Provider(*((Pause(15), *script) for script in scripts))) as served:
        for call in [served.client.chat() for _ in scripts]:
            await call.wait()
            if call.header("content-length"):
                assert int(call.header("content-length")) == len(call.body)
                assert set(call.error) >= {"message", "type"}
            else:
                assert call.status == 200
                assert call.body.endswith(DONE) or call.error["message"]
        served.assert_clean()


async def test_a_keep_alive_never_follows_the_final_frame(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A keep-alive that falls due while an event waits for the client is not sent. The silence is over, and the
    keep-alive could otherwise follow the final frame."""
    script = (Say(content("a")), Pause(15), Say(content("b")), Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        calls = [served.client.chat() for _ in range(16)]
        await trio.sleep(14)
        for call in calls:
            call.stall()
        await trio.sleep(2)
        for call in calls:
            call.release()
        for call in calls:
            await call.wait()
            assert call.body.replace(KEEP_ALIVE, b"") == (content("a") + content("b")).replace(b'"m"', b'"up/m"') + DONE
            assert call.body.endswith(DONE)
        served.assert_clean()


# -- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "script", "stream", "phase", "after_s"),
    [
        ({"connect_timeout_s": 4}, (SlowConnect(),), True, "connect", 4),
        ({"connect_timeout_s": 4}, (SlowConnect(),), False, "connect", 4),
        ({"first_token_timeout_s": 7}, (Stall(),), True, "first_token", 7),
        ({"first_token_timeout_s": 7}, (Stall(),), False, "first_token", 7),
        ({"first_token_timeout_s": 7}, (Pause(3), Head(), Stall()), True, "first_token", 7),
        ({"first_token_timeout_s": 7}, (Head(), *(Say(role()), Pause(1)) * 50), True, "first_token", 7),
        ({"idle_timeout_s": 6}, (Pause(2), Head(200, "application/json"), Say(b"{"), Stall()), False, "idle", 8),
        ({"total_timeout_s": 9}, (Stall(),), True, "total", 9),
        ({"total_timeout_s": 9}, (Stall(),), False, "total", 9),
        ({"total_timeout_s": 9}, (Head(200, "application/json"), *(Say(b" "), Pause(1)) * 50), False, "total", 9),
    ],
)
@pytest.mark.parametrize("where", ["limits", "upstream"])
async def test_a_deadline_before_commit_is_a_504(
    open_app: OpenApp,
    autojump_clock: MockClock,
    limits: dict[str, float],
    script: Script,
    stream: bool,
    phase: str,
    after_s: float,
    where: str,
) -> None:
    """Each deadline, from ``[limits]`` or from the upstream's own table, fires on time and closes the upstream."""
    off = {"keep_alive_s": 0}
    config = make_config(limits={**limits, **off}) if where == "limits" else make_config({"up": limits}, limits=off)
    async with open_app(config, Provider(script)) as served:
        begun = trio.current_time()
        call = await served.client.chat(stream=stream).wait()
        assert (call.status, call.error["code"], call.error["phase"]) == (504, "upstream_timeout", phase)
        assert call.ended_at - begun == pytest.approx(after_s)
        assert served.providers["up"].calls[0].ended_at - begun == pytest.approx(after_s)
        served.assert_clean()


@pytest.mark.parametrize(
    ("limits", "rest", "phase", "after_s"),
    [
        ({"idle_timeout_s": 6}, (Pause(2), Say(content("b")), Stall()), "idle", 8),
        ({"total_timeout_s": 9}, (Say(content("b")), Pause(1)) * 50, "total", 9),
        ({"total_timeout_s": 9, "idle_timeout_s": 0}, (Stall(),), "total", 9),
    ],
)
async def test_a_deadline_after_commit_is_an_error_event(
    open_app: OpenApp,
    autojump_clock: MockClock,
    limits: dict[str, float],
    rest: Script,
    phase: str,
    after_s: float,
) -> None:
    """The timeout is reported in the stream at that moment, and the upstream is closed."""
    async with open_app(make_config(limits=limits), Provider((Say(content("a")), *rest))) as served:
        begun = trio.current_time()
        call = await served.client.chat().wait()
        assert (call.status, call.error["code"], call.error["phase"]) == (200, "upstream_timeout", phase)
        assert call.ended_at - begun == pytest.approx(after_s)
        assert served.providers["up"].closed_at == [pytest.approx(begun + after_s)]
        assert b"[DONE]" not in call.body
        served.assert_clean()


async def test_the_queue_deadline(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A call that gets no upstream slot in time is a 504 with that phase, and the next target is tried."""
    config = make_config(
        {"a": {"max_connections": 1, "queue_timeout_s": 5}, "b": {}}, models={"both": {"targets": ["a/m", "b/m"]}}
    )
    async with open_app(config, {"a": Provider((Stall(),)), "b": Provider(says("from b"))}) as served:
        served.client.chat(model="a/m")
        await wait_all_tasks_blocked()
        begun = trio.current_time()
        call = await served.client.chat(model="a/m").wait()
        assert (call.status, call.error["phase"]) == (504, "queue")
        assert call.ended_at - begun == pytest.approx(5)
        call = await served.client.chat(model="both").wait()
        assert b"from b" in call.body


async def test_the_first_token_deadline_begins_after_the_queue(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Waiting for a slot does not count against the first-token deadline."""
    config = make_config({"up": {"max_connections": 1}}, limits={"first_token_timeout_s": 10})
    script = (Pause(8), *says("x"))
    async with open_app(config, Provider(script)) as served:
        calls = [served.client.chat(), served.client.chat()]
        for call in calls:
            assert (await call.wait()).body.endswith(DONE)


@pytest.mark.slow
async def test_slow_but_steady_is_not_idle(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """An hour of events, each within the idle deadline, is a good stream. Comments reset the deadline too."""
    script = (*(Say(content("x")), Pause(50), Say(b": ping\n\n"), Pause(50)) * 30, Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        call = await served.client.chat().wait()
        assert call.body.endswith(DONE)


async def test_waiting_for_a_slow_client_does_not_count_as_idle(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The idle time counts from when the gateway resumes reading the upstream, not from before the client's pause."""
    script = (Say(content("a")), Pause(1), Say(content("b")), Pause(3), Say(content("c")), Say(DONE))
    config = make_config(limits={"idle_timeout_s": 5, "keep_alive_s": 1})
    async with open_app(config, Provider(script)) as served:
        call = served.client.chat()
        await call.wait_for(b'"a"')
        call.stall()
        await trio.sleep(5.9)
        call.release()
        assert (await call.wait()).body.endswith(DONE)
        assert b'"c"' in call.body
        served.assert_clean()


async def test_each_target_has_its_own_deadlines(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The second target's shorter deadline fires on time, not when the first target's deadline would have fired."""
    config = make_config({"a": {}, "b": {"first_token_timeout_s": 2}}, models={"both": {"targets": ["a/m", "b/m"]}})
    async with open_app(config, {"a": Provider((Refuse(),)), "b": Provider((Stall(),))}) as served:
        begun = trio.current_time()
        call = await served.client.chat(model="both").wait()
        assert (call.status, call.error["phase"]) == (504, "first_token")
        assert call.ended_at - begun == pytest.approx(2)


async def test_the_total_deadline_spans_all_attempts(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It does not restart for the next target."""
    config = two(total_timeout_s=8, first_token_timeout_s=5)
    async with open_app(config, {"a": Provider((Stall(),)), "b": Provider((Stall(),))}) as served:
        begun = trio.current_time()
        call = await served.client.chat(model="both").wait()
        assert (call.status, call.error["phase"]) == (504, "total")
        assert call.ended_at - begun == pytest.approx(8)


# -- a client that does not read --------------------------------------------------------------------------------------


async def test_a_stalled_reader_ends_its_upstream(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """At the stall limit the upstream is closed while the send to the client still waits. Nothing piles up
    meanwhile."""
    script = (*(Say(content("x" * 1000)) for _ in range(1000)), Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        call = served.client.chat()
        await call.wait_committed()
        call.stall()
        begun = trio.current_time()
        await trio.sleep(29)
        [upstream] = served.providers["up"].calls
        assert not served.providers["up"].closed_at
        pieces_read = upstream.pieces_read
        assert pieces_read < 10
        await trio.sleep(5)
        assert upstream.ended == "closed"
        assert upstream.ended_at - begun == pytest.approx(30, abs=0.1)
        assert upstream.pieces_read == pieces_read
        call.release()
        await call.wait()
        assert call.error["code"] == "client_stalled"
        assert b"[DONE]" not in call.body
        served.assert_clean()


async def test_a_stalled_reader_that_disconnects_frees_everything(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """When the connection ends, nothing stays allocated or open."""
    script = (*(Say(content("x")) for _ in range(100)), Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        call = served.client.chat()
        await call.wait_committed()
        call.stall()
        await trio.sleep(100)
        call.disconnect()
        await call.wait()
        assert served.providers["up"].open_now == 0
        served.assert_clean()


async def test_a_reader_that_stalls_during_a_silence_ends_its_upstream(
    open_app: OpenApp, autojump_clock: MockClock
) -> None:
    """The waiting send may be a keep-alive: the stall limit applies to it, and the upstream is closed."""
    async with open_app(providers=Provider((Say(content("x")), Stall()))) as served:
        call = served.client.chat()
        await call.wait_for(b"data")
        call.stall()
        begun = trio.current_time()
        await trio.sleep(15 + 30 + 15 + 1)
        assert served.providers["up"].open_now == 0
        assert served.providers["up"].closed_at[0] - begun <= 15 + 30 + 15
        call.release()
        await call.wait()
        served.assert_clean()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_does_not_read_the_final_frame_is_ended(
    open_app: OpenApp, autojump_clock: MockClock, stream: bool
) -> None:
    """The stall limit applies to the last frame and to a JSON answer, so no slot is held until the client
    disconnects."""
    script = (Say(content("x")), Pause(1), Say(DONE), Stall()) if stream else (Pause(1), *answers(completion("x")))
    async with open_app(providers=Provider(script)) as served:
        call = served.client.chat(stream=stream)
        await trio.sleep(0.5)
        call.stall()
        await trio.sleep(29)
        assert served.gateway.exchange_services.admission.slots.taken == 1
        await trio.sleep(20)
        assert served.providers["up"].open_now == 0
        assert served.gateway.exchange_services.admission.slots.taken == 0
        assert [settled.outcome for settled in served.settled] == ["client_stalled"]
        await call.wait()
        assert not call.ended
        served.assert_clean()


async def test_a_slow_reader_of_a_complete_answer_holds_no_upstream_slot(
    open_app: OpenApp, autojump_clock: MockClock
) -> None:
    """A JSON answer that has arrived completely frees its upstream slot for other calls."""
    config = make_config({"up": {"max_connections": 1}})
    async with open_app(config, Provider((Pause(1), *answers(completion("x"))))) as served:
        late = served.client.chat(stream=False)
        late.stall()
        await trio.sleep(2)
        assert (await served.client.chat(stream=False).wait()).status == 200
        late.release()
        assert (await late.wait()).status == 200
        assert [settled.outcome for settled in served.settled] == ["complete", "complete"]
        served.assert_clean()


# -- drain ------------------------------------------------------------------------------------------------------------


async def test_a_drain_refuses_new_calls_and_finishes_running_ones(
    open_app: OpenApp, autojump_clock: MockClock
) -> None:
    """``begin`` turns readiness to 503 and refuses new calls with ``Connection: close``. The running stream
    completes."""
    async with open_app(providers=Provider((Say(content("a")), Pause(5), *says("b")))) as served:
        running = served.client.chat()
        await running.wait_for(b"data")
        assert (await served.client.ask("GET", "/ready")).status == 200
        served.state["drain"].begin()
        ready = await served.client.ask("GET", "/ready")
        assert (ready.status, ready.json["reasons"]) == (503, ["draining"])
        assert (await served.client.ask("GET", "/health")).status == 200
        refused = await served.client.chat().wait()
        assert (refused.status, refused.error["code"]) == (503, "draining")
        assert refused.header("connection") == "close"
        assert refused.header("retry-after") == "1"
        assert (await running.wait()).body.endswith(DONE)
        assert (await served.client.ask("GET", "/status")).json["status"] == "draining"


@pytest.mark.parametrize("headers", [{}, {"x-coalesce": "true"}], ids=["own", "shared"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "json"])
async def test_a_call_leaves_no_reference_cycle(open_app: OpenApp, stream: bool, headers: dict[str, str]) -> None:
    """What belongs to a call is freed without the garbage collector, which runs rarely (`asgi.tune_memory`)."""
    script = says("a") if stream else answers(completion("a"))
    async with open_app(providers=Provider(script)) as served:
        gc.disable()
        try:
            call = served.client.start("POST", "/v1/chat/completions", chat(stream=stream, seed=1), headers=headers)
            assert (await call.wait()).status == 200
            await wait_all_tasks_blocked()
            exchange = weakref.ref(served.settled.pop())
            assert exchange() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("phase", PHASES)
async def test_ending_the_drain_sends_every_client_an_error(
    open_app: OpenApp, autojump_clock: MockClock, phase: str
) -> None:
    """``cut`` closes every upstream at once. Each client gets a 503, or an error event and the proper end of the
    response."""
    script, stream = PHASES[phase]
    config = make_config(limits={"connect_timeout_s": 0, "keep_alive_s": 0})
    async with open_app(config, Provider(script)) as served:
        call = served.client.chat(stream=stream)
        await trio.sleep(3)
        served.state["drain"].begin()
        served.state["drain"].cut()
        cancelled_at = trio.current_time()
        await call.wait()
        assert served.providers["up"].closed_at == [cancelled_at]
        assert call.ended_at == cancelled_at
        assert call.status == (200 if phase == "streaming" else 503)
        assert call.error["code"] == "draining"
        assert b"[DONE]" not in call.body
        served.assert_clean()


async def test_ending_the_drain_reaches_queued_calls(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A call that waits for a slot gets the error and is not sent to the next target."""
    config = make_config({"a": {"max_connections": 1}, "b": {}}, models={"both": {"targets": ["a/m", "b/m"]}})
    async with open_app(config, {"a": Provider((Stall(),)), "b": Provider()}) as served:
        calls = [served.client.chat(model="both"), served.client.chat(model="both")]
        await wait_all_tasks_blocked()
        served.state["drain"].cut()
        for call in calls:
            assert (await call.wait()).error["code"] == "draining"
        assert served.providers["b"].opened == 0
        assert served.providers["a"].opened == 1
        served.assert_clean()


async def test_each_client_of_a_drain_gets_an_error_of_its_own(open_app: OpenApp) -> None:
    """Tasks that raise one exception object extend the same traceback, which keeps the frames of all of them."""
    async with open_app(providers=Provider((Stall(),), (Stall(),))) as served:
        calls = [served.client.chat(), served.client.chat()]
        await wait_all_tasks_blocked()
        served.state["drain"].cut()
        for call in calls:
            assert (await call.wait()).error["code"] == "draining"
        first, second = served.settled
        assert first.error is not second.error


# -- admission and internal errors ------------------------------------------------------------------------------------


async def test_too_many_exchanges_are_refused_with_a_retry_time(open_app: OpenApp) -> None:
    """Beyond ``max_exchanges`` a call gets a 503 at once, and the running calls continue."""
    async with open_app(make_config(limits={"max_exchanges": 1, "max_queued": 0}), Provider((Stall(),))) as served:
        served.client.chat()
        await wait_all_tasks_blocked()
        call = await served.client.chat().wait()
        assert (call.status, call.error["code"]) == (503, "overloaded")
        assert call.header("retry-after-ms") == "1000"
        assert len(served.gateway.live) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_an_internal_error_is_a_500_with_its_request_id(
    open_app: OpenApp, logs: Logs, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The client gets an OpenAI error and the log gets the traceback. The exchange is settled and nothing stays
    open."""
    logs.expect_error("exchange_crashed")
    async with open_app() as served:
        monkeypatch.setattr("trigate.exchange.translation.StreamReader", None)
        monkeypatch.setattr("trigate.exchange.translation.decode_answer", None)
        served.providers["up"].play(says("x") if stream else answers(b"{}"))
        call = await served.client.chat(stream=stream).wait()
        assert (call.status, call.error["code"]) == (500, "internal_error")
        assert call.header("x-request-id") in call.error["message"]
        assert served.settled[0].outcome == "internal_error"
        served.assert_clean()


async def test_the_log_has_one_line_per_exchange_and_no_text(open_app: OpenApp, logs: Logs) -> None:
    """The line has outcome, target, sizes and counts, and no text of the messages."""
    async with open_app() as served:
        call = await served.client.chat().wait()
        [entry] = logs.named("exchange")
        assert entry["request_id"] == call.header("x-request-id")
        assert (entry["outcome"], entry["target"], entry["stream"]) == ("complete", "up/m", True)
        assert entry["bytes"] == len(call.body)
        assert "Hello" not in repr(logs.entries)
