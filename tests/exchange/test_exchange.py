"""One request, end to end, in memory and in virtual time: what the client gets, and when the upstream is let go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.asgi_client import chat
from tests.support.gateway import Served, make_config
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

OpenApp = Callable[..., AbstractAsyncContextManager[Served]]

KEEP_ALIVE = b": keep-alive\n"


def two(**limits: Any) -> Any:  # Any: a Config of any limits
    """Two upstreams, ``a`` and ``b``, behind the model ``both``."""
    return make_config({"a": {}, "b": {}}, models={"both": {"targets": ["a/m", "b/m"]}}, limits=limits)


# -- a good answer ----------------------------------------------------------------------------------------------------


async def test_a_stream_is_relayed_as_it_came(open_app: OpenApp) -> None:
    """Every byte of every event, under the public model id, with the headers of an event stream."""
    script = says("Hello", "!")
    async with open_app(providers=Provider(script)) as served:
        call = await served.client.chat().wait()
        said = b"".join(step.data for step in script if isinstance(step, Say))
        assert call.status == 200
        assert call.body == said.replace(b'"model":"m"', b'"model":"up/m"')
        assert call.header("content-type") == "text/event-stream; charset=utf-8"
        assert call.header("cache-control") == "no-cache"
        assert call.header("x-accel-buffering") == "no"
        assert call.header("x-request-id").startswith("req_")
        assert call.header("content-length") == ""
        assert served.settled[0].outcome == "complete"
        assert served.providers["up"].calls[0].ended == "complete"
        served.assert_clean()


async def test_what_goes_upstream(open_app: OpenApp) -> None:
    """The client's fields untouched, the upstream's own model id, identity encoding, the request id."""
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
    """``model`` is what was asked for; the rest is the upstream's; usage is counted."""
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
    """The usage chunk stands before ``[DONE]`` as the upstream sent it."""
    script = (Say(content("x")), Say(chunk({}, finish_reason="stop")), Say(usage(7, 11)), Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        call = await served.client.chat(stream_options={"include_usage": True}).wait()
        assert call.body.endswith(usage(7, 11).replace(b'"m"', b'"up/m"') + DONE)
        totals = served.gateway.live.totals
        assert (totals.prompt_tokens, totals.completion_tokens, totals.complete) == (7, 11, 1)


async def test_an_alias_is_the_answers_model(open_app: OpenApp) -> None:
    """Whatever stands behind an alias, the client sees the alias."""
    async with open_app(two(), {"a": Provider(), "b": Provider()}) as served:
        call = await served.client.chat(model="both").wait()
        assert call.body.count(b'"model":"both"') == 3
        assert b'"model":"m"' not in call.body


async def test_the_role_waits_for_the_first_content(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """An event without content commits nothing; it leaves together with the first content, and first."""
    script = (Say(role()), Pause(5), Say(content("a")), Pause(1), Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        begun = trio.current_time()
        call = await served.client.chat().wait()
        assert call.committed_at - begun == pytest.approx(5)
        assert b'"role"' in call.pieces[0][1]
        assert b'"a"' in call.pieces[0][1]


async def test_an_event_leaves_when_it_is_whole(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Half an event is held; events that arrive together leave together."""
    whole = content("whole") + content("second")
    script = (Say(content("a")), Say(whole[:10]), Pause(2), Say(whole[10:]), Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        begun = trio.current_time()
        call = await served.client.chat().wait()
        assert [data.count(b"data: ") for _, data in call.pieces] == [1, 2, 2]
        assert [at - begun for at, _ in call.pieces] == pytest.approx([0, 2, 2])


async def test_audio_passes_through_byte_for_byte(open_app: OpenApp) -> None:
    """Bytes are no events: they go as they come, with their content type and length."""
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


async def test_audio_that_is_cut_has_no_proper_end(open_app: OpenApp) -> None:
    """Bytes cannot carry an error, so the response is left without its end: the server breaks the connection."""
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
async def test_the_other_endpoints_are_the_same_exchange(open_app: OpenApp, path: str, fields: dict[str, str]) -> None:
    """They reach the upstream under the same path and bring its answer back."""
    async with open_app(providers=Provider(answers(b'{"object":"x","model":"m","data":[1]}'))) as served:
        call = await served.client.ask("POST", f"/v1/{path}", {"model": "up/m", **fields})
        assert (call.status, call.json) == (200, {"object": "x", "model": "up/m", "data": [1]})
        assert served.providers["up"].calls[0].path == f"/v1/{path}"


# -- the client leaves ------------------------------------------------------------------------------------------------

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
async def test_the_client_goes_and_so_does_the_upstream(
    open_app: OpenApp, autojump_clock: MockClock, phase: str, how: str
) -> None:
    """In every phase the upstream is closed in the same moment, and the exchange settled: as cancelled, or, where the
    server ended it, as that."""
    script, stream = PHASES[phase]
    limits = {"connect_timeout_s": 0, "keep_alive_s": 0}
    async with open_app(make_config(limits=limits), Provider(script)) as served:
        call = served.client.chat(stream=stream)
        await trio.sleep(3)
        assert served.providers["up"].open_now == 1
        left = trio.current_time()
        if how == "disconnect":
            call.disconnect()
        else:
            call.scope.cancel()
        await call.wait()
        assert served.providers["up"].closed_at == [left]
        assert call.returned_at == left
        outcome = "cancelled" if how == "disconnect" else "draining"
        assert [exchange.outcome for exchange in served.settled] == [outcome]
        served.assert_clean()


@pytest.mark.parametrize("phase", PHASES)
async def test_a_server_that_stops_leaves_the_client_a_last_word(
    open_app: OpenApp, autojump_clock: MockClock, phase: str
) -> None:
    """Cancelled by the server and not by its client, a request still ends with a status or an error event."""
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


async def test_a_server_that_stops_waits_for_no_stalled_client(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A last word that cannot be said within a moment is not said."""
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


async def test_a_queued_client_goes_and_its_place_is_not_taken(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Who leaves the queue leaves nothing in it: the next one is served when its turn comes."""
    config = make_config({"up": {"max_connections": 1}})
    async with open_app(config, Provider((Stall(),), says("x"))) as served:
        first = served.client.chat()
        await wait_all_tasks_blocked()
        queued = [served.client.chat(), served.client.chat()]
        await wait_all_tasks_blocked()
        assert [view.phase(exchange) for exchange in served.gateway.live].count("queued") == 2
        queued[0].disconnect()
        await queued[0].wait()
        assert (queued[0].status, queued[0].body) == (0, b"")
        first.disconnect()
        await first.wait()
        assert (await queued[1].wait()).body.endswith(DONE)
        assert served.providers["up"].opened == 2
        served.assert_clean()


async def test_a_client_that_leaves_after_the_answer_cancels_nothing(open_app: OpenApp) -> None:
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
        (answers(b'{"error":{"message":"quota","code":"q"}}'), 502, "upstream_garbled"),
        (answers(b"[1]"), 502, "upstream_garbled"),
        (answers(b'{"trunc'), 502, "upstream_garbled"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else str(value),
)
async def test_before_commit_a_failure_is_a_status(
    open_app: OpenApp, script: Script, status: int, code: str | None, stream: bool
) -> None:
    """Whatever goes wrong before the first content is a status with an OpenAI error that blames the upstream."""
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
    """A stream that ends, in whatever way, before it said anything is a 502 and not an empty 200."""
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
        (Say(chunk({}, finish_reason="stop")),),
        (Say(chunk({}, finish_reason="stop")), Break("fin")),
        (Say(chunk({}, finish_reason="stop")), Say(usage(1, 2)), Break("rst")),
        (Say(b"data: [DO"), Break("fin")),
        (Say(b"data: [DONE]\n"), Break("fin")),
    ],
    ids=[
        "fin", "rst", "end", "mid-event fin", "mid-event rst", "mid-event end", "no DONE", "no DONE fin",
        "no DONE rst", "half a DONE", "DONE without its blank line, cut",
    ],
)  # fmt: skip
async def test_after_commit_a_cut_is_an_error_event(open_app: OpenApp, rest: Script) -> None:
    """What was whole has arrived; then one error event, no ``[DONE]``, and the response's own end."""
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
async def test_a_cut_after_the_last_event_harms_nobody(open_app: OpenApp, how: Any) -> None:
    """After ``[DONE]`` the answer is complete, however its connection then ends."""
    async with open_app(providers=Provider((*says("x"), Break(how)))) as served:
        call = await served.client.chat().wait()
        assert call.body.endswith(DONE)
        assert b'"error"' not in call.body
        assert served.settled[0].outcome == "complete"
        served.assert_clean()


@pytest.mark.parametrize("end", [b"data: [DONE]", b"data: [DONE]\n"])
async def test_done_without_its_blank_line_is_done(open_app: OpenApp, end: bytes) -> None:
    """A body that ends well, right behind ``[DONE]``, was complete."""
    async with open_app(providers=Provider((Say(content("a")), Say(FINISH), Say(end)))) as served:
        call = await served.client.chat().wait()
        assert call.body.endswith(b"data: [DONE]\n\n")
        assert served.settled[0].outcome == "complete"


async def test_an_upstream_that_never_ends_its_body_is_closed(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """After ``[DONE]`` the client has its end at once; the upstream gets a moment, and is closed."""
    async with open_app(providers=Provider((*says("x"), Stall()))) as served:
        begun = trio.current_time()
        call = await served.client.chat().wait()
        assert call.ended_at == begun
        assert call.returned_at - begun < 1
        assert served.providers["up"].calls[0].ended == "closed"
        served.assert_clean()


async def test_an_error_event_first_is_a_status(open_app: OpenApp) -> None:
    """A stream that opens with an error has not begun: the client gets a status, and the upstream's words."""
    script = (Say(event({"error": {"message": "overloaded now", "code": "busy", "type": "t"}})),)
    async with open_app(providers=Provider(script)) as served:
        call = await served.client.chat().wait()
        assert call.status == 502
        assert call.error["message"] == "overloaded now"
        served.assert_clean()


async def test_an_error_event_later_is_passed_on_and_ends_the_stream(open_app: OpenApp) -> None:
    """Its words reach the client in one error event; a ``[DONE]`` after it does not."""
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
    """Status and body are the upstream's, byte for byte, and so is ``retry-after``."""
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
        assert call.error["message"] == "The upstream up answered 404."


async def test_a_secret_that_the_upstream_quotes_is_not_passed_on(open_app: OpenApp) -> None:
    """Some providers quote the key that they refuse."""
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


async def test_an_endless_stream_of_nothing_is_refused(open_app: OpenApp) -> None:
    """Events without content are held, but not without bound."""
    config = make_config(limits={"event_bytes": 2000})
    async with open_app(config, Provider((Say(role()),) * 50)) as served:
        call = await served.client.chat().wait()
        assert (call.status, call.error["code"]) == (502, "upstream_garbled")
        assert served.providers["up"].calls[0].said < 20
        served.assert_clean()


async def test_a_json_answer_over_the_limit_is_refused(open_app: OpenApp) -> None:
    """It is not read further than the limit."""
    config = make_config(limits={"response_bytes": 1000})
    script = (Head(200, "application/json"), *(Say(b"x" * 400),) * 50)
    async with open_app(config, Provider(script)) as served:
        call = await served.client.chat(stream=False).wait()
        assert (call.status, call.error["code"]) == (502, "upstream_garbled")
        assert served.providers["up"].calls[0].said == 3
        served.assert_clean()


# -- the next target --------------------------------------------------------------------------------------------------


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
    ids=["refused", "slow connect", "fin", "rst", "stall", "500", "503", "429", "html", "cut JSON", "stalled JSON"],
)
async def test_a_retryable_failure_goes_to_the_next_target(
    open_app: OpenApp, autojump_clock: MockClock, script: Script, stream: bool
) -> None:
    """Before COMMIT another target may be tried; the client sees only its answer, under the same model id."""
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
    ids=["cut after the role", "stalled after the head", "stalled after the role", "error event", "JSON"],
)
async def test_a_stream_that_never_spoke_goes_to_the_next_target(
    open_app: OpenApp, autojump_clock: MockClock, script: Script
) -> None:
    """Up to the first content nothing is out, so the next target may speak; nothing of the first one is left over."""
    providers = {"a": Provider(script), "b": Provider((Say(content("from b")), Say(DONE)))}
    async with open_app(two(first_token_timeout_s=5), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert call.body == content("from b").replace(b'"m"', b'"both"') + DONE
        served.assert_clean()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_a_refusal_does_not_go_to_the_next_target(open_app: OpenApp, status: int) -> None:
    """The same call would be refused again, and the client must see why."""
    providers = {"a": Provider(answers(b'{"error":{"message":"bad"}}', status=status)), "b": Provider()}
    async with open_app(two(), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert call.status == status
        assert served.providers["b"].opened == 0


async def test_after_commit_there_is_no_next_target(open_app: OpenApp) -> None:
    """Half of one answer and all of another is nobody's answer."""
    async with open_app(two(), {"a": Provider((Say(content("a")), Break())), "b": Provider()}) as served:
        call = await served.client.chat(model="both").wait()
        assert call.error["code"] == "upstream_truncated"
        assert served.providers["b"].opened == 0


async def test_all_targets_fail(open_app: OpenApp) -> None:
    """The client is told, and told not to multiply the retries."""
    providers = {"a": Provider((Refuse(),)), "b": Provider(answers(b"{}", status=503))}
    async with open_app(two(), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert (call.status, call.error["code"]) == (503, "upstream_unavailable")
        assert call.header("x-should-retry") == "false"
        assert [attempt.outcome for attempt in served.settled[0].attempts] == ["upstream_unavailable"] * 2


async def test_the_next_target_may_come_after_a_keep_alive(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A keep-alive commits the status, not the answer: failing over is still right, and there is one head."""
    providers = {"a": Provider((Pause(20), Break())), "b": Provider(says("from b"))}
    async with open_app(two(), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert call.body.startswith(KEEP_ALIVE + b"data: ")
        assert call.body.endswith(DONE)
        assert b"from b" in call.body
        assert b'"error"' not in call.body


# -- keep-alive -------------------------------------------------------------------------------------------------------


async def test_keep_alive_before_the_first_token(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """After each 15 s of silence one comment line, with one newline; the first one commits 200."""
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
    """Events reset the silence; the upstream's own comments do not count as speech, and are not passed on."""
    script = (Say(content("a")), Pause(10), Say(content("b")), Pause(10), Say(b": upstream\n\n"), Pause(6), Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        begun = trio.current_time()
        call = await served.client.chat().wait()
        assert [at - begun for at, data in call.pieces if data == KEEP_ALIVE] == [pytest.approx(25)]
        assert b"upstream" not in call.body


async def test_keep_alive_while_queued(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Also who waits for a place hears that somebody is there."""
    config = make_config({"up": {"max_connections": 1}})
    async with open_app(config, Provider((Pause(20), *says("x")))) as served:
        served.client.chat()
        await wait_all_tasks_blocked()
        second = await served.client.chat().wait()
        assert second.body.startswith(KEEP_ALIVE)
        assert second.body.endswith(DONE)


async def test_keep_alive_is_for_streams_only(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A JSON answer has nothing to put it in; and 0 switches it off."""
    async with open_app(providers=Provider((Pause(100), *answers(completion("x"))))) as served:
        call = await served.client.chat(stream=False).wait()
        assert (call.status, call.json["model"]) == (200, "up/m")
    async with open_app(make_config(limits={"keep_alive_s": 0}), Provider((Pause(100), *says("x")))) as served:
        call = await served.client.chat().wait()
        assert b":" not in call.body.partition(b"data")[0]


async def test_a_failure_after_a_keep_alive_is_an_error_event(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The status is out, so there is only the event left: with the words that the body would have had."""
    body = b'{"error":{"message":"their words","code":"c"}}'
    async with open_app(providers=Provider((Pause(20), *answers(body, status=400)))) as served:
        call = await served.client.chat().wait()
        assert call.status == 200
        assert call.body == KEEP_ALIVE + b"data: " + body + b"\n\n"
        assert call.ended


@pytest.mark.parametrize("attempt", range(8))
async def test_a_keep_alive_never_lands_in_a_status(open_app: OpenApp, autojump_clock: MockClock, attempt: int) -> None:
    """An answer that comes in the very moment of the first keep-alive is a status or a stream, never half of each."""
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


async def test_a_keep_alive_is_never_sent_behind_the_end(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A keep-alive that falls due in the moment in which an event has to wait for the client is not sent at all: the
    silence is over, and the end of the answer may come before its turn."""
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
    """Each deadline fires when it is due, from ``[limits]`` or from the upstream's own, and closes the upstream."""
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
    """Said in the stream, at the moment; the upstream is closed then."""
    async with open_app(make_config(limits=limits), Provider((Say(content("a")), *rest))) as served:
        begun = trio.current_time()
        call = await served.client.chat().wait()
        assert (call.status, call.error["code"], call.error["phase"]) == (200, "upstream_timeout", phase)
        assert call.ended_at - begun == pytest.approx(after_s)
        assert served.providers["up"].closed_at == [pytest.approx(begun + after_s)]
        assert b"[DONE]" not in call.body
        served.assert_clean()


async def test_the_queue_deadline(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """No place in time is a 504 that says so, and the next target is tried."""
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
    """Who waited for a place still has all of it."""
    config = make_config({"up": {"max_connections": 1}}, limits={"first_token_timeout_s": 10})
    script = (Pause(8), *says("x"))
    async with open_app(config, Provider(script)) as served:
        calls = [served.client.chat(), served.client.chat()]
        for call in calls:
            assert (await call.wait()).body.endswith(DONE)


@pytest.mark.slow
async def test_slow_but_steady_is_not_idle(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """An hour of events, each within the idle deadline, is a good stream; comments count as life."""
    script = (*(Say(content("x")), Pause(50), Say(b": ping\n\n"), Pause(50)) * 30, Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        call = await served.client.chat().wait()
        assert call.body.endswith(DONE)


async def test_who_is_kept_waiting_by_the_client_is_not_idle(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The gap between two events counts from when the upstream is read again, not from before the client's pause."""
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
    """The second target's shorter deadline fires when it is due, not when the first one's would have."""
    config = make_config({"a": {}, "b": {"first_token_timeout_s": 2}}, models={"both": {"targets": ["a/m", "b/m"]}})
    async with open_app(config, {"a": Provider((Refuse(),)), "b": Provider((Stall(),))}) as served:
        begun = trio.current_time()
        call = await served.client.chat(model="both").wait()
        assert (call.status, call.error["phase"]) == (504, "first_token")
        assert call.ended_at - begun == pytest.approx(2)


async def test_the_total_deadline_spans_all_attempts(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It is not given anew to the next target."""
    config = two(total_timeout_s=8, first_token_timeout_s=5)
    async with open_app(config, {"a": Provider((Stall(),)), "b": Provider((Stall(),))}) as served:
        begun = trio.current_time()
        call = await served.client.chat(model="both").wait()
        assert (call.status, call.error["phase"]) == (504, "total")
        assert call.ended_at - begun == pytest.approx(8)


# -- a client that does not read --------------------------------------------------------------------------------------


async def test_a_stalled_reader_ends_its_upstream(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """At the stall limit the upstream is closed, with the client's send still waiting; nothing piled up meanwhile."""
    script = (*(Say(content("x" * 1000)) for _ in range(1000)), Say(DONE))
    async with open_app(providers=Provider(script)) as served:
        call = served.client.chat()
        await call.wait_committed()
        call.stall()
        begun = trio.current_time()
        await trio.sleep(29)
        [upstream] = served.providers["up"].calls
        assert not served.providers["up"].closed_at
        said = upstream.said
        assert said < 10
        await trio.sleep(5)
        assert upstream.ended == "closed"
        assert upstream.ended_at - begun == pytest.approx(30, abs=0.1)
        assert upstream.said == said
        call.release()
        await call.wait()
        assert call.error["code"] == "client_stalled"
        assert b"[DONE]" not in call.body
        served.assert_clean()


async def test_a_stalled_reader_that_leaves_frees_everything(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Its connection ends, and nothing is left."""
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


async def test_a_reader_that_stalls_in_a_silence_ends_its_upstream_too(
    open_app: OpenApp, autojump_clock: MockClock
) -> None:
    """The send that waits may be a keep-alive: the stall limit holds for it, and the upstream is closed."""
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
async def test_who_does_not_read_the_end_is_ended_too(
    open_app: OpenApp, autojump_clock: MockClock, stream: bool
) -> None:
    """The stall limit holds for the last frame, and for a JSON answer: no place is kept until the client leaves."""
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


async def test_who_reads_the_end_late_keeps_no_place_at_the_upstream(
    open_app: OpenApp, autojump_clock: MockClock
) -> None:
    """A JSON answer that has come whole holds up nobody else there."""
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


async def test_a_drain_refuses_new_calls_and_lets_running_ones_end(
    open_app: OpenApp, autojump_clock: MockClock
) -> None:
    """``begin`` turns readiness to 503 and new calls away, with ``Connection: close``; the running stream completes."""
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
    """What belongs to a call is freed without the garbage collector, which runs rarely (`asgi.calm_collector`)."""
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
async def test_a_cut_tells_every_client(open_app: OpenApp, autojump_clock: MockClock, phase: str) -> None:
    """``cut`` closes every upstream at once; its client gets a 503, or an error event and the proper end."""
    script, stream = PHASES[phase]
    config = make_config(limits={"connect_timeout_s": 0, "keep_alive_s": 0})
    async with open_app(config, Provider(script)) as served:
        call = served.client.chat(stream=stream)
        await trio.sleep(3)
        served.state["drain"].begin()
        served.state["drain"].cut()
        cut = trio.current_time()
        await call.wait()
        assert served.providers["up"].closed_at == [cut]
        assert call.ended_at == cut
        assert call.status == (200 if phase == "streaming" else 503)
        assert call.error["code"] == "draining"
        assert b"[DONE]" not in call.body
        served.assert_clean()


async def test_a_cut_reaches_the_queue_and_goes_to_no_next_target(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A call that waits for its place is told, and is not sent elsewhere."""
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


# -- admission, and defects -------------------------------------------------------------------------------------------


async def test_too_many_exchanges_are_refused_with_a_time_to_come_back(open_app: OpenApp) -> None:
    """Beyond ``max_exchanges`` a call is a 503 at once, and the others go on."""
    async with open_app(make_config(limits={"max_exchanges": 1, "max_queued": 0}), Provider((Stall(),))) as served:
        served.client.chat()
        await wait_all_tasks_blocked()
        call = await served.client.chat().wait()
        assert (call.status, call.error["code"]) == (503, "overloaded")
        assert call.header("retry-after-ms") == "1000"
        assert len(served.gateway.live) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_defect_of_the_gateway_is_a_500_with_its_request_id(
    open_app: OpenApp, logs: Logs, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The client gets an OpenAI error, the log the traceback; the exchange is settled and nothing stays open."""
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


async def test_the_log_has_one_line_an_exchange_and_no_text(open_app: OpenApp, logs: Logs) -> None:
    """Outcome, target, sizes and counts; nothing of what was said."""
    async with open_app() as served:
        call = await served.client.chat().wait()
        [entry] = logs.named("exchange")
        assert entry["request_id"] == call.header("x-request-id")
        assert (entry["outcome"], entry["target"], entry["stream"]) == ("complete", "up/m", True)
        assert entry["bytes"] == len(call.body)
        assert "Hello" not in repr(logs.entries)
