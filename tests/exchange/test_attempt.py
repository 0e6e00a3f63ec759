"""Several attempts at one call under one deadline: what the client sees and what the providers get. Time is virtual."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support.gateway import OpenApp, Served, make_config
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

BROKEN = Break()
BUSY = answers(b'{"error":{"message":"busy"}}', status=503)


def two(*, retries: Any = None, limits: Any = None, breaker: Any = None, **model: Any) -> Any:  # Any: a Config
    """Two upstreams, ``a`` and ``b``, behind the model ``both``."""
    return make_config(
        {"a": {}, "b": {}},
        models={"both": {"targets": ["a/m", "b/m"], **model}},
        **({"retries": retries} if retries is not None else {}),
        limits=limits or {},
        breaker=breaker or {},
    )


def text_of(body: bytes) -> str:
    """The text of a stream."""
    import json

    parts = []
    for line in body.split(b"\n"):
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:]).get("choices", []):
                parts.append(choice["delta"].get("content") or "")
    return "".join(parts)


def whys(served: Served, number: int = 0) -> list[tuple[str, str, str | None]]:
    """The attempts of an exchange: target, reason and outcome."""
    return [(str(each.target), each.step.why, each.outcome) for each in served.settled[number].attempts]


# -- retries and failover ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_busy_provider_is_retried(open_app: OpenApp, autojump_clock: MockClock, stream: bool) -> None:
    """The gateway retries after a pause, and the client does not notice."""
    good = says("yes") if stream else answers(completion("yes"))
    async with open_app(make_config(retries={"resend": "always"}), Provider(BUSY, BUSY, good)) as served:
        call = await served.client.chat(stream=stream).wait()
        assert call.status == 200
        assert b"yes" in call.body
        assert (call.header("x-trigate-upstream"), call.header("x-trigate-attempts")) == ("up", "3")
        assert whys(served) == [
            ("up/m", "first", "upstream_unavailable"),
            ("up/m", "retry", "upstream_unavailable"),
            ("up/m", "retry", "complete"),
        ]
        served.assert_clean()


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
@pytest.mark.parametrize(
    ("headers", "waits"),
    [
        ({"retry-after": "1"}, 1.0),
        ({"retry-after-ms": "700"}, 0.7),
        ({"retry-after": "0"}, 0.0),
    ],
)
async def test_retry_after_is_honoured(
    open_app: OpenApp, autojump_clock: MockClock, headers: dict[str, str], waits: float, status: int
) -> None:
    """The target is not called for exactly that time, whichever status carries the header."""
    busy = answers(b"{}", status=status, headers=headers)
    config = make_config(retries={"backoff_s": 0, "resend": "refused" if status in (429, 503) else "always"})
    async with open_app(config, Provider(busy, says("yes"))) as served:
        begun = trio.current_time()
        call = await served.client.chat().wait()
        assert call.body.endswith(DONE)
        assert trio.current_time() - begun == pytest.approx(waits, abs=1e-6)


async def test_a_long_retry_after_is_passed_to_the_client(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The call fails at once with the retry time, and calls made before then do not reach the provider."""
    busy = answers(b'{"error":{"message":"slow down"}}', status=429, headers={"retry-after": "30"})
    async with open_app(make_config(retries={}), Provider(busy, says("yes"))) as served:
        call = await served.client.chat().wait()
        assert (call.status, call.header("retry-after"), call.header("x-trigate-attempts")) == (429, "30", "1")
        await trio.sleep(10)
        call = await served.client.chat().wait()
        assert (call.status, call.header("retry-after")) == (429, "20")
        assert call.error["message"] == "slow down"
        assert call.header("x-trigate-attempts") == "0"
        assert len(served.providers["up"].calls) == 1
        await trio.sleep(20)
        assert (await served.client.chat().wait()).status == 200


async def test_a_target_with_an_open_breaker_is_skipped(open_app: OpenApp) -> None:
    """After five failures in a row its calls go straight to the next target."""
    async with open_app(two(), {"a": Provider((Refuse(),)), "b": Provider(says("b"))}) as served:
        for _ in range(8):
            assert (await served.client.chat(model="both").wait()).status == 200
        assert [len(exchange.attempts) for exchange in served.settled] == [2, 2, 2, 2, 2, 1, 1, 1]
        assert served.settled[-1].attempts[0].step.why == "first"


async def test_one_client_s_mistake_stops_nobody_else(open_app: OpenApp, autojump_clock: MockClock, logs: Logs) -> None:
    """Calls to an endpoint that a target does not serve get its 501, are not sent twice, and open no breaker. Failures
    at one endpoint leave the others as they are."""
    refused = answers(b'{"error":{"message":"no embeddings here"}}', status=501)
    broken = answers(b'{"error":{"message":"it broke"}}', status=500)
    provider = Provider(*[refused] * 9, *[broken] * 5, says("yes"))
    async with open_app(make_config(retries={}, breaker={}), provider) as served:
        for _ in range(9):
            call = await served.client.ask("POST", "/v1/embeddings", {"model": "up/m", "input": "x"})
            assert (call.status, call.error["message"]) == (501, "no embeddings here")
        assert len(served.providers["up"].calls) == 9
        assert not logs.named("breaker_opened")
        for _ in range(6):
            call = await served.client.ask("POST", "/v1/embeddings", {"model": "up/m", "input": "x"})
        assert call.status == 503
        assert (await served.client.chat().wait()).status == 200
        assert logs.named("breaker_opened") == [
            {
                "event": "breaker_opened",
                "log_level": "warning",
                "target": "up/m",
                "endpoint": "/embeddings",
                "opens_in_s": 5.0,
                "reason": "The upstream up failed (500): it broke",
            }
        ]


async def test_failed_attempts_and_breakers_are_in_the_log(
    open_app: OpenApp, autojump_clock: MockClock, logs: Logs
) -> None:
    """A failed attempt is a warning with its reason, whether another one follows or not; and a breaker that closes."""
    config = two(retries={"max_attempts": 2}, breaker={"failures": 1, "cooldown_s": 5})
    async with open_app(config, {"a": Provider((Refuse(),), says("a")), "b": Provider((Break(),))}) as served:
        await served.client.chat(model="both").wait()
        await trio.sleep(5)
        await served.client.chat(model="both").wait()
        first, second = logs.named("attempt_failed")
        assert (first["target"], first["why"], first["outcome"]) == ("a/m", "first", "upstream_unavailable")
        assert (second["target"], second["why"], second["log_level"]) == ("b/m", "failover", "warning")
        assert first["error"].startswith("The upstream a cannot be reached")
        assert [line["target"] for line in logs.named("breaker_opened")] == ["a/m", "b/m"]
        [closed] = logs.named("breaker_closed")
        assert (closed["target"], closed["log_level"], closed["reason"]) == ("a/m", "warning", "a call succeeded")


@pytest.mark.parametrize(("resend", "asked"), [("never", 1), ("refused", 1), ("always", 3)])
async def test_a_call_that_was_received_is_not_sent_again(
    open_app: OpenApp, autojump_clock: MockClock, resend: str, asked: int
) -> None:
    """By default one call is one generation at a target: a failure after the whole request is not tried again there."""
    config = make_config(retries={"resend": resend})
    async with open_app(config, Provider((Break(),), answers(b"{}", status=500), says("yes"))) as served:
        call = await served.client.chat().wait()
        assert (len(served.providers["up"].calls), call.status) == (asked, 200 if asked == 3 else 502)


async def test_the_error_lists_all_attempts(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The attempts are listed in order."""
    providers = {"a": Provider((Refuse(),)), "b": Provider((Stall(),))}
    async with open_app(two(limits={"total_timeout_s": 5}), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert (call.status, call.error["phase"]) == (504, "total")
        assert [(each["target"], each["why"], each["outcome"]) for each in call.error["attempts"]] == [
            ("a/m", "first", "upstream_unavailable"),
            ("b/m", "failover", "upstream_timeout"),
        ]
        assert call.error["attempts"][1]["duration_s"] == pytest.approx(5)


async def test_there_is_no_failover_after_content(open_app: OpenApp) -> None:
    """Content that the client has received cannot be taken back."""
    providers = {"a": Provider((Say(content("x")), Break())), "b": Provider(says("b"))}
    async with open_app(two(retries={}), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert call.error["code"] == "upstream_truncated"
        assert not served.providers["b"].calls


async def test_a_disconnect_during_a_backoff_pause(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """There is no next attempt, and nothing stays reserved for it."""
    busy = answers(b"{}", status=503, headers={"retry-after": "2"})
    async with open_app(make_config(retries={}), Provider(busy)) as served:
        call = served.client.chat()
        await trio.sleep(1)
        assert served.settled == []
        [live] = served.gateway.live
        assert view.phase(live) == "pausing"
        call.disconnect()
        await call.wait()
        assert len(served.providers["up"].calls) == 1
        assert served.settled[0].outcome == "cancelled"
        assert [state.in_flight for _, _, state in served.gateway.exchange_services.upstream.targets.items()] == [0]
        served.assert_clean()
        await trio.sleep(2)
        assert [
            state.breaker.enter(trio.current_time())
            for _, _, state in served.gateway.exchange_services.upstream.targets.items()
        ] == ["probe"]


# -- one deadline -----------------------------------------------------------------------------------------------------


def ask(served: Served, *, stream: Any = True, model: str = "up/m", **headers: str) -> Any:  # Any: a ClientCall
    """Starts a chat call with headers; ``_`` in their names is ``-``."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    return served.client.start("POST", "/v1/chat/completions", body, headers=fields)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("name", "given"),
    [("x_request_timeout", "2.5"), ("x_stainless_read_timeout", "2.75"), ("x_stainless_timeout", "2.75")],
)
async def test_the_clients_deadline(
    open_app: OpenApp, autojump_clock: MockClock, stream: bool, name: str, given: str
) -> None:
    """It spans everything before the answer and is sent upstream. A client with its own timer gets the error slightly
    earlier."""
    async with open_app(make_config(), Provider((Stall(),))) as served:
        begun = trio.current_time()
        call = await ask(served, stream=stream, **{name: given}).wait()
        assert (call.status, call.error["code"], call.error["phase"]) == (504, "upstream_timeout", "total")
        assert "2.5 s" in call.error["message"]
        assert trio.current_time() - begun == pytest.approx(2.5, abs=0.01)
        sent = float(served.providers["up"].calls[0].headers["x-request-timeout"])
        assert sent == pytest.approx(2.5 if not stream or name == "x_request_timeout" else 3600, abs=0.01)
        served.assert_clean()


@pytest.mark.parametrize(("name", "truncated"), [("x_request_timeout", True), ("x_stainless_read_timeout", False)])
async def test_which_deadlines_bound_a_running_stream(
    open_app: OpenApp, autojump_clock: MockClock, name: str, truncated: bool
) -> None:
    """``x-request-timeout`` bounds the whole stream. An SDK's timeout for the first byte does not."""
    script = (Say(content("a")), Pause(3), Say(content("b")), Say(DONE))
    async with open_app(make_config(), Provider(script)) as served:
        call = await ask(served, **{name: "2"}).wait()
        assert call.body.endswith(DONE) is not truncated
        assert (b'"phase":"total"' in call.body) is truncated


async def test_the_deadline_spans_attempts_and_pauses(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Each attempt is sent the remaining time."""
    slow = (Pause(1), Head(503, "application/json", {"retry-after": "1"}), Say(b"{}"))
    async with open_app(make_config(retries={"max_attempts": 9}), Provider(slow)) as served:
        begun = trio.current_time()
        call = await ask(served, x_request_timeout="4.5").wait()
        assert trio.current_time() - begun == pytest.approx(4.5, abs=0.01)
        assert call.status == 504
        deadlines = [float(each.headers["x-request-timeout"]) for each in served.providers["up"].calls]
        assert deadlines == pytest.approx([4.5, 2.5, 0.5], abs=0.01)


async def test_an_upstream_is_sent_its_own_deadline(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """An attempt that ends before the call's deadline is sent the time until its own end."""
    config = make_config(
        {"a": {"total_timeout_s": 3}, "b": {"total_timeout_s": 20}}, models={"both": {"targets": ["a/m", "b/m"]}}
    )
    async with open_app(config, {"a": Provider((Stall(),)), "b": Provider(says("b"))}) as served:
        assert (await ask(served, model="both").wait()).status == 200
        deadlines = [float(served.providers[name].calls[0].headers["x-request-timeout"]) for name in "ab"]
        assert deadlines == pytest.approx([3, 17], abs=0.01)


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", "", "1s", "1_0"])
async def test_an_invalid_deadline(open_app: OpenApp, value: str) -> None:
    """An invalid ``x-request-timeout`` is a 400. An invalid SDK header is ignored."""
    async with open_app(make_config(), Provider(says("x"))) as served:
        call = await ask(served, x_request_timeout=value).wait()
        assert (call.status, call.error["param"]) == (400, "x-request-timeout")
        assert (await ask(served, x_stainless_read_timeout=value).wait()).status == 200


async def test_the_response_head_has_its_own_timeout(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The gateway gives up early on a provider that does not begin to answer."""
    providers = {"a": Provider((Stall(),)), "b": Provider(says("b"))}
    async with open_app(two(limits={"response_head_timeout_s": 2}), providers) as served:
        begun = trio.current_time()
        call = await served.client.chat(model="both").wait()
        assert text_of(call.body) == "b"
        assert trio.current_time() - begun == pytest.approx(2)
    head_first = (Head(), Pause(5), *says("a"))
    async with open_app(
        two(limits={"response_head_timeout_s": 2}), {"a": Provider(head_first), "b": Provider()}
    ) as app:
        assert text_of((await app.client.chat(model="both").wait()).body) == "a"


async def test_a_model_has_its_own_limits(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """They take precedence over those of the upstream."""
    async with open_app(two(total_timeout_s=3), {"a": Provider((Stall(),)), "b": Provider()}) as served:
        begun = trio.current_time()
        assert (await served.client.chat(model="both").wait()).status == 504
        assert trio.current_time() - begun == pytest.approx(3)


# -- hedging ----------------------------------------------------------------------------------------------------------

HEDGE = {"strategy": "hedge", "hedge_delay_s": 1}


async def test_the_first_content_wins(open_app: OpenApp, autojump_clock: MockClock, logs: Logs) -> None:
    """A role, an empty delta and a comment are not content. The superseded attempt is closed at the moment of the first
    content."""
    slow = (Say(role()), Say(b": ping\n\n"), Pause(5), *says("slow"))
    providers = {"a": Provider(slow), "b": Provider((Pause(1), Say(content("quick")), Pause(2), Say(DONE)))}
    async with open_app(two(**HEDGE), providers) as served:
        begun = trio.current_time()
        call = await served.client.chat(model="both").wait()
        assert text_of(call.body) == "quick"
        [superseded] = served.providers["a"].calls
        assert superseded.ended == "closed"
        assert superseded.ended_at - begun == pytest.approx(2)
        assert whys(served) == [("a/m", "first", "superseded"), ("b/m", "hedge", "complete")]
        assert (call.header("x-trigate-upstream"), call.header("x-trigate-attempts")) == ("b", "2")
        [line] = logs.named("exchange")
        assert line["tried"] == ["a/m superseded", "b/m complete"]
        served.assert_clean()


async def test_a_quick_answer_starts_no_hedge(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """There is no second attempt when the first one sends content in time."""
    async with open_app(two(**HEDGE), {"a": Provider((Pause(0.5), *says("a"))), "b": Provider()}) as served:
        assert text_of((await served.client.chat(model="both").wait()).body) == "a"
        assert not served.providers["b"].calls


async def test_an_error_does_not_win_the_race(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """After an error event, an error status or a broken connection, the other attempt continues."""
    for bad in (
        (Say(event({"error": {"message": "no"}})),),
        (Head(500), Say(b"{}")),
        (Break(),),
        (Refuse(),),
        (Say(role()), Say(DONE[:20]), Break()),
    ):
        providers = {"a": Provider((Pause(3), *says("a"))), "b": Provider(bad)}
        async with open_app(two(**HEDGE), providers) as served:
            call = await served.client.chat(model="both").wait()
            assert text_of(call.body) == "a"
            assert whys(served)[0][2] == "complete"
            served.assert_clean()


async def test_both_attempts_fail(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The client gets an error that lists both attempts."""
    providers = {"a": Provider((Pause(3), Break())), "b": Provider((Pause(1), Break()))}
    async with open_app(two(**HEDGE), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert (call.status, call.error["code"], len(call.error["attempts"])) == (502, "upstream_unavailable", 2)
        served.assert_clean()


@pytest.mark.parametrize("leave_at", [0.5, 1.5, 2.5])
async def test_a_disconnect_ends_both_attempts(open_app: OpenApp, autojump_clock: MockClock, leave_at: float) -> None:
    """This holds at any time."""
    providers = {"a": Provider((Stall(),)), "b": Provider((Pause(1), Say(content("b")), Stall()))}
    async with open_app(two(**HEDGE), providers) as served:
        call = served.client.chat(model="both")
        await trio.sleep(leave_at)
        call.disconnect()
        await call.wait()
        assert served.settled[0].outcome == "cancelled"
        served.assert_clean()
        assert [state.in_flight for _, _, state in served.gateway.exchange_services.upstream.targets.items()] in (
            [0],
            [0, 0],
        )


async def test_json_answers_are_hedged_too(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The first complete answer wins."""
    slow = (Head(200, "application/json"), Pause(5), Say(completion("slow")))
    providers = {"a": Provider(slow), "b": Provider(answers(completion("quick")))}
    async with open_app(two(**HEDGE), providers) as served:
        call = await served.client.chat(model="both", stream=False).wait()
        assert call.json["choices"][0]["message"]["content"] == "quick"
        assert whys(served)[0] == ("a/m", "first", "superseded")
        served.assert_clean()


async def test_a_deadline_ends_both_attempts(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Both attempts share one deadline."""
    providers = {"a": Provider((Stall(),)), "b": Provider((SlowConnect(),))}
    async with open_app(two(**HEDGE, total_timeout_s=4), providers) as served:
        begun = trio.current_time()
        call = await served.client.chat(model="both").wait()
        assert (call.status, call.error["phase"]) == (504, "total")
        assert trio.current_time() - begun == pytest.approx(4)
        served.assert_clean()


# -- truncated streams ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    [b"data: [DONE]\n\n", b""],
    ids=["no finish_reason", "nothing"],
)
async def test_a_complete_stream_needs_finish_reason(open_app: OpenApp, end: bytes) -> None:
    """A stream is complete with ``finish_reason``. Otherwise the client gets an error."""
    async with open_app(make_config(), Provider((Say(content("a")), Say(end)))) as served:
        call = await served.client.chat().wait()
        assert call.error["code"] == "upstream_truncated"
        assert b"[DONE]" not in call.body
        assert served.settled[0].outcome == "upstream_truncated"


@pytest.mark.parametrize("end", [b"", b"data: [DONE]\n\n"])
async def test_a_complete_stream_has_its_done(open_app: OpenApp, end: bytes) -> None:
    """Some servers never send ``[DONE]``. The gateway adds it, and the call is complete."""
    async with open_app(make_config(), Provider((Say(content("a")), Say(FINISH), Say(end)))) as served:
        call = await served.client.chat().wait()
        assert call.body.count(b"data: [DONE]\n\n") == 1
        assert call.body.endswith(b"data: [DONE]\n\n")
        assert (served.settled[0].outcome, served.settled[0].events) == ("complete", 3)


async def test_heartbeats_do_not_begin_an_answer(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Events that say nothing are no first token: while they come, its limit runs and not the idle one, the next target
    is tried, and a hedge is not won."""
    beats = (Say(event({"type": "ping"})), Pause(0.9)) * 9
    providers = {"a": Provider((Head(), *beats, Say(content("late")))), "b": Provider(says("b"))}
    async with open_app(two(limits={"first_token_timeout_s": 2, "idle_timeout_s": 1}), providers) as served:
        begun = trio.current_time()
        call = await served.client.chat(model="both").wait()
        assert text_of(call.body) == "b"
        assert trio.current_time() - begun == pytest.approx(2)
    async with open_app(two(**HEDGE), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert text_of(call.body) == "b"
        assert [attempt.outcome for attempt in served.settled[0].attempts] == ["superseded", "complete"]


async def test_every_choice_must_finish(open_app: OpenApp) -> None:
    """With two choices, one ``finish_reason`` does not complete the stream."""

    def choice(index: int, **more: Any) -> Say:
        return Say(event({"choices": [{"index": index, "delta": {}, **more}]}))

    half = (choice(0, delta={"content": "a"}), choice(1, delta={"content": "b"}), choice(0, finish_reason="stop"))
    done = Say(b"data: [DONE]\n\n")
    whole = (*half, choice(1, finish_reason="length"), done)
    async with open_app(make_config(), Provider((*half, done), whole)) as served:
        assert (await served.client.chat(n=2).wait()).error["code"] == "upstream_truncated"
        assert (await served.client.chat(n=2).wait()).body.endswith(b"data: [DONE]\n\n")


CONTINUE = {"on_truncation": "continue"}


def truncated(*texts: str, end: Any = BROKEN) -> Script:  # Any: a step
    """A script whose stream breaks off after these texts."""
    return (Say(role()), *(Say(content(text)) for text in texts), end)


@pytest.mark.parametrize(
    "end",
    [Break("fin"), Break("rst"), Say(event({"error": {"message": "overloaded"}})), Say(b"data: [DONE]\n\n"), Stall()],
    ids=["fin", "rst", "error event", "no finish_reason", "silence"],
)
async def test_the_next_target_continues_the_stream(open_app: OpenApp, autojump_clock: MockClock, end: Any) -> None:
    """It continues in the same response, from the client's last character and under the same id. The role is sent
    once."""
    second = (Say(role()), Say(content(" wörld").replace(b"chatcmpl-1", b"other")), Say(usage(9, 4)), Say(DONE))
    providers = {"a": Provider(truncated("Héllo", ",", end=end)), "b": Provider(second)}
    async with open_app(two(**CONTINUE), providers) as served:
        call = await served.client.chat(model="both", temperature=0.5).wait()
        assert text_of(call.body) == "Héllo, wörld"
        assert call.body.endswith(DONE)
        assert call.body.count(b'"role"') == 1
        assert b"other" not in call.body
        asked = served.providers["b"].calls[0].json
        assert asked["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Héllo,"}]
        assert (asked["model"], asked["temperature"]) == ("m", 0.5)
        assert [why for _, why, _ in whys(served)] == ["first", "continue"]
        [exchange] = served.settled
        assert exchange.outcome == "complete"
        assert exchange.usage.completion_tokens == 4
        assert exchange.events == call.body.count(b"data: ")
        served.assert_clean()


async def test_a_stream_is_continued_more_than_once(open_app: OpenApp) -> None:
    """A stream is continued as long as attempts remain."""
    providers = {"a": Provider(truncated("one "), says("three")), "b": Provider(truncated("two "))}
    async with open_app(two(retries={}, **CONTINUE), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert text_of(call.body) == "one two three"
        assert served.providers["a"].calls[1].json["messages"][-1] == {"role": "assistant", "content": "one two "}


@pytest.mark.parametrize(
    "first",
    [
        (Say(content("a")), Say(chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]})), Break()),
        (Say(chunk({"reasoning_content": "hm"})), Say(content("a")), Break()),
        (Say(content("a")), Say(FINISH), Break()),
        (Say(content("a" * 3000)), Break()),
        (Say(chunk({"content": [{"type": "thinking", "thinking": []}]})), Say(content("a")), Break()),
        (Say(content("a")), Say(content("X").replace(b"X", b"\\ud83d")), Break()),
    ],
    ids=["tool call", "reasoning", "finished", "too long", "thoughts among the parts", "half a character"],
)
async def test_streams_that_cannot_be_continued(open_app: OpenApp, first: Script) -> None:
    """The client gets an error event."""
    config = two(limits={"buffered_bytes": 2000}, **CONTINUE)
    async with open_app(config, {"a": Provider(first), "b": Provider(says("b"))}) as served:
        call = await served.client.chat(model="both").wait()
        assert call.error["code"] == "upstream_truncated"
        assert b"[DONE]" not in call.body
        assert not served.providers["b"].calls


async def test_the_role_is_sent_once(open_app: OpenApp) -> None:
    """This also holds when the second target sends the role together with its first content, as a few providers do."""
    second = (Say(chunk({"role": "assistant", "content": ' "role" \u00fc'})), Say(DONE))
    async with open_app(two(**CONTINUE), {"a": Provider(truncated("a")), "b": Provider(second)}) as served:
        call = await served.client.chat(model="both").wait()
        assert text_of(call.body) == 'a "role" \u00fc'
        assert call.body.count(b'"role"') == 1


async def test_a_character_split_between_two_events(open_app: OpenApp) -> None:
    """The continuing target gets the two parts as one character, and it may split its own characters too."""
    halves = [content("X").replace(b"X", half) for half in (b"\\ud83d", b"\\ude00")]
    first: Script = (*(Say(half) for half in halves), Break())
    second: Script = (*(Say(half.replace(b"chatcmpl-1", b"other")) for half in halves), Say(DONE))
    async with open_app(two(**CONTINUE), {"a": Provider(first), "b": Provider(second)}) as served:
        call = await served.client.chat(model="both").wait()
        assert call.body.endswith(DONE)
        assert text_of(call.body).encode("utf-16", "surrogatepass").decode("utf-16") == "\N{GRINNING FACE}" * 2
        assert b"other" not in call.body
        assert b'"model":"m"' not in call.body
        assert served.providers["b"].calls[0].json["messages"][-1]["content"] == "\N{GRINNING FACE}"


@pytest.mark.parametrize("refusal", [BUSY, (Refuse(),), (Say(role()), Break())], ids=["503", "refused", "role only"])
async def test_the_target_after_a_failed_continuation_continues(
    open_app: OpenApp, autojump_clock: MockClock, refusal: Script
) -> None:
    """When the next target fails before its first content, the target after it continues the stream."""
    providers = {"a": Provider(truncated("one ")), "b": Provider(refusal), "c": Provider(says("two"))}
    config = make_config(
        {"a": {}, "b": {}, "c": {}},
        models={"all": {"targets": ["a/m", "b/m", "c/m"], **CONTINUE}},
        retries={},
    )
    async with open_app(config, providers) as served:
        call = await served.client.chat(model="all").wait()
        assert text_of(call.body) == "one two"
        assert call.body.endswith(DONE)
        assert served.providers["c"].calls[0].json["messages"][-1] == {"role": "assistant", "content": "one "}
        assert [why for _, why, _ in whys(served)] == ["first", "continue", "failover"]
        served.assert_clean()


async def test_a_keep_alive_ends_the_first_byte_deadline(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """An SDK's read timeout is for the next byte, so after a comment there is time for another target."""
    config = two(limits={"keep_alive_s": 3, "first_token_timeout_s": 8})
    async with open_app(config, {"a": Provider((Stall(),)), "b": Provider(says("b"))}) as served:
        call = await ask(served, model="both", x_stainless_read_timeout="5").wait()
        assert text_of(call.body) == "b"
        assert call.body.endswith(DONE)


async def test_a_failed_continuation(open_app: OpenApp) -> None:
    """When the next target fails too, the client gets an error event and its partial answer is unchanged."""
    async with open_app(two(**CONTINUE), {"a": Provider(truncated("a")), "b": Provider(BUSY)}) as served:
        call = await served.client.chat(model="both").wait()
        assert text_of(call.body.split(b'data: {"error"')[0]) == "a"
        assert len(call.error["attempts"]) == 2
        served.assert_clean()


# -- clients that disconnect ------------------------------------------------------------------------------------------

FINISHING = {"on_disconnect": "finish", "finish_timeout_s": 10}


async def test_the_answer_is_read_to_its_end(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The provider bills the answer anyway, so the gateway at least records its usage."""
    script = (Say(content("a")), Pause(5), Say(content("b")), Say(usage(3, 4)), Say(DONE))
    async with open_app(two(**FINISHING), {"a": Provider(script), "b": Provider()}) as served:
        call = served.client.chat(model="both")
        await call.wait_for(b'"a"')
        call.disconnect()
        await call.wait()
        assert b'"b"' not in call.body
        [exchange] = served.settled
        assert (exchange.outcome, exchange.usage.completion_tokens) == ("finished", 4)
        totals = served.gateway.live.totals
        assert (totals.exchanges, totals.cancelled, totals.failed) == (1, 1, 0), "the client disconnected"
        assert served.providers["a"].calls[0].ended == "complete"
        served.assert_clean()


@pytest.mark.parametrize("script", [(Stall(),), (Say(content("a")), Stall())], ids=["before", "after content"])
@pytest.mark.parametrize("stream", [True, False])
async def test_finishing_has_a_time_limit(
    open_app: OpenApp, autojump_clock: MockClock, script: Script, stream: bool
) -> None:
    """After the finish timeout the exchange is cancelled."""
    async with open_app(two(**FINISHING), {"a": Provider(script), "b": Provider()}) as served:
        begun = trio.current_time()
        call = served.client.chat(model="both", stream=stream)
        await trio.sleep(1)
        call.disconnect()
        await call.wait()
        assert trio.current_time() - begun == pytest.approx(11)
        assert served.settled[0].outcome == "cancelled"
        served.assert_clean()


async def test_no_attempt_begins_after_a_disconnect(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """When the client disconnects before the first attempt, or the attempt fails after the disconnect, no other target
    is tried."""
    slow, failing = (Pause(5), *says("x")), (Pause(5), *answers(b'{"error":{"message":"no"}}', status=500))
    model = {"targets": ["a/m", "b/m"], **FINISHING}
    config = make_config({"a": {"max_connections": 1}, "b": {}}, models={"both": model})
    async with open_app(config, {"a": Provider(slow, failing), "b": Provider()}) as served:
        first = served.client.chat(model="both")
        await trio.sleep(1)
        waiting = served.client.chat(model="both")
        await trio.sleep(1)
        waiting.disconnect()
        await waiting.wait()
        await first.wait()
        second = served.client.chat(model="both")
        await trio.sleep(1)
        second.disconnect()
        await second.wait()
        assert [exchange.outcome for exchange in served.settled] == ["cancelled", "complete", "cancelled"]
        assert (len(served.providers["a"].calls), len(served.providers["b"].calls)) == (2, 0)
        served.assert_clean()


# -- headers ----------------------------------------------------------------------------------------------------------


async def test_the_overhead_excludes_the_upstream(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The time spent waiting for an upstream is not overhead; backoff pauses are."""
    slow = (Pause(3), Head(503, "application/json", {"retry-after": "1"}), Say(b"{}"))
    good = (Pause(2), *says("x"))
    async with open_app(make_config(retries={}), Provider(slow, good)) as served:
        call = await served.client.chat().wait()
        assert float(call.header("x-trigate-overhead-ms")) == pytest.approx(1000, abs=1)
        call = await served.client.chat(model="nobody").wait()
        assert (call.status, call.header("x-trigate-attempts")) == (404, "0")
