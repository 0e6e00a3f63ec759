"""Several attempts at one call, under one deadline: what a client sees, and what providers do. Time is virtual."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

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
    """What a stream says."""
    import json

    said = []
    for line in body.split(b"\n"):
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:]).get("choices", []):
                said.append(choice["delta"].get("content") or "")
    return "".join(said)


def whys(served: Served, number: int = 0) -> list[tuple[str, str, str | None]]:
    """The attempts of an exchange: target, why, outcome."""
    return [(str(each.target), each.step.why, each.outcome) for each in served.settled[number].attempts]


# -- retries and failover ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_provider_that_was_busy(open_app: OpenApp, autojump_clock: MockClock, stream: bool) -> None:
    """It is tried again after a pause, and the client does not notice."""
    good = says("yes") if stream else answers(completion("yes"))
    async with open_app(make_config(retries={}), Provider(BUSY, BUSY, good)) as served:
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
    """The target is left alone for exactly so long, whatever status says it."""
    busy = answers(b"{}", status=status, headers=headers)
    config = make_config(retries={"backoff_s": 0})
    async with open_app(config, Provider(busy, says("yes"))) as served:
        begun = trio.current_time()
        call = await served.client.chat().wait()
        assert call.body.endswith(DONE)
        assert trio.current_time() - begun == pytest.approx(waits, abs=1e-6)


async def test_a_long_retry_after_is_the_clients(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The call fails at once, and says when; the calls meanwhile do not reach the provider."""
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


async def test_a_broken_target_is_passed_over(open_app: OpenApp) -> None:
    """After five failures in a row its calls go to the next one without asking it."""
    async with open_app(two(), {"a": Provider((Refuse(),)), "b": Provider(says("b"))}) as served:
        for _ in range(8):
            assert (await served.client.chat(model="both").wait()).status == 200
        assert [len(exchange.attempts) for exchange in served.settled] == [2, 2, 2, 2, 2, 1, 1, 1]
        assert served.settled[-1].attempts[0].step.why == "first"


async def test_all_attempts_are_told(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """In order, on the error."""
    providers = {"a": Provider((Refuse(),)), "b": Provider((Stall(),))}
    async with open_app(two(limits={"total_timeout_s": 5}), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert (call.status, call.error["phase"]) == (504, "total")
        assert [(each["target"], each["why"], each["outcome"]) for each in call.error["attempts"]] == [
            ("a/m", "first", "upstream_unavailable"),
            ("b/m", "failover", "upstream_timeout"),
        ]
        assert call.error["attempts"][1]["duration_s"] == pytest.approx(5)


async def test_never_after_content(open_app: OpenApp) -> None:
    """What the client has had cannot be taken back."""
    providers = {"a": Provider((Say(content("x")), Break())), "b": Provider(says("b"))}
    async with open_app(two(retries={}), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert call.error["code"] == "upstream_truncated"
        assert not served.providers["b"].calls


async def test_a_client_that_leaves_in_a_pause(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """There is no next attempt, and nothing is left of the one that was to come."""
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
        assert [state.in_flight for _, state in served.gateway.exchange_services.upstream.targets.items()] == [0]
        served.assert_clean()
        await trio.sleep(2)
        assert [
            state.breaker.enter(trio.current_time())
            for _, state in served.gateway.exchange_services.upstream.targets.items()
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
    """It spans everything before the answer, and is sent upstream. Who waits by its own clock hears a little before."""
    async with open_app(make_config(), Provider((Stall(),))) as served:
        begun = trio.current_time()
        call = await ask(served, stream=stream, **{name: given}).wait()
        assert (call.status, call.error["code"], call.error["phase"]) == (504, "upstream_timeout", "total")
        assert "2.5 s" in call.error["message"]
        assert trio.current_time() - begun == pytest.approx(2.5, abs=0.01)
        sent = float(served.providers["up"].calls[0].headers["x-request-timeout"])
        assert sent == pytest.approx(2.5 if not stream or name == "x_request_timeout" else 3600, abs=0.01)
        served.assert_clean()


@pytest.mark.parametrize(("name", "cut"), [("x_request_timeout", True), ("x_stainless_read_timeout", False)])
async def test_a_stream_that_has_begun(open_app: OpenApp, autojump_clock: MockClock, name: str, cut: bool) -> None:
    """``x-request-timeout`` bounds it; what an SDK waits for its beginning does not."""
    script = (Say(content("a")), Pause(3), Say(content("b")), Say(DONE))
    async with open_app(make_config(), Provider(script)) as served:
        call = await ask(served, **{name: "2"}).wait()
        assert call.body.endswith(DONE) is not cut
        assert (b'"phase":"total"' in call.body) is cut


async def test_the_deadline_spans_attempts_and_pauses(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Each attempt is told what is left."""
    slow = (Pause(1), Head(503, "application/json", {"retry-after": "1"}), Say(b"{}"))
    async with open_app(make_config(retries={"max_attempts": 9}), Provider(slow)) as served:
        begun = trio.current_time()
        call = await ask(served, x_request_timeout="4.5").wait()
        assert trio.current_time() - begun == pytest.approx(4.5, abs=0.01)
        assert call.status == 504
        told = [float(each.headers["x-request-timeout"]) for each in served.providers["up"].calls]
        assert told == pytest.approx([4.5, 2.5, 0.5], abs=0.01)


async def test_an_upstream_is_told_its_own_deadline(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Where it is cut before the call is over, the time until then is what its answer is of use."""
    config = make_config(
        {"a": {"total_timeout_s": 3}, "b": {"total_timeout_s": 20}}, models={"both": {"targets": ["a/m", "b/m"]}}
    )
    async with open_app(config, {"a": Provider((Stall(),)), "b": Provider(says("b"))}) as served:
        assert (await ask(served, model="both").wait()).status == 200
        told = [float(served.providers[name].calls[0].headers["x-request-timeout"]) for name in "ab"]
        assert told == pytest.approx([3, 17], abs=0.01)


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", "", "1s", "1_0"])
async def test_a_deadline_that_is_none(open_app: OpenApp, value: str) -> None:
    """A client that says nonsense is told so; an SDK that does is not listened to."""
    async with open_app(make_config(), Provider(says("x"))) as served:
        call = await ask(served, x_request_timeout=value).wait()
        assert (call.status, call.error["param"]) == (400, "x-request-timeout")
        assert (await ask(served, x_stainless_read_timeout=value).wait()).status == 200


async def test_the_head_has_a_limit_of_its_own(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A provider that does not even begin to answer is left early."""
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


async def test_a_model_has_limits_of_its_own(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """They go before those of the upstream."""
    async with open_app(two(total_timeout_s=3), {"a": Provider((Stall(),)), "b": Provider()}) as served:
        begun = trio.current_time()
        assert (await served.client.chat(model="both").wait()).status == 504
        assert trio.current_time() - begun == pytest.approx(3)


# -- hedging ----------------------------------------------------------------------------------------------------------

HEDGE = {"strategy": "hedge", "hedge_delay_s": 1}


async def test_the_first_content_wins(open_app: OpenApp, autojump_clock: MockClock, logs: Logs) -> None:
    """A role, an empty delta and a comment are no content; the loser is closed at that very moment."""
    slow = (Say(role()), Say(b": ping\n\n"), Pause(5), *says("slow"))
    providers = {"a": Provider(slow), "b": Provider((Pause(1), Say(content("quick")), Pause(2), Say(DONE)))}
    async with open_app(two(**HEDGE), providers) as served:
        begun = trio.current_time()
        call = await served.client.chat(model="both").wait()
        assert text_of(call.body) == "quick"
        [lost] = served.providers["a"].calls
        assert lost.ended == "closed"
        assert lost.ended_at - begun == pytest.approx(2)
        assert whys(served) == [("a/m", "first", "superseded"), ("b/m", "hedge", "complete")]
        assert (call.header("x-trigate-upstream"), call.header("x-trigate-attempts")) == ("b", "2")
        [line] = logs.named("exchange")
        assert line["tried"] == ["a/m superseded", "b/m complete"]
        served.assert_clean()


async def test_who_is_quick_is_alone(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """There is no second attempt where the first one speaks in time."""
    async with open_app(two(**HEDGE), {"a": Provider((Pause(0.5), *says("a"))), "b": Provider()}) as served:
        assert text_of((await served.client.chat(model="both").wait()).body) == "a"
        assert not served.providers["b"].calls


async def test_an_error_does_not_win(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """An error frame, a status, a cut: the other attempt goes on."""
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


async def test_both_fail(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Then the client is told, with both attempts."""
    providers = {"a": Provider((Pause(3), Break())), "b": Provider((Pause(1), Break()))}
    async with open_app(two(**HEDGE), providers) as served:
        call = await served.client.chat(model="both").wait()
        assert (call.status, call.error["code"], len(call.error["attempts"])) == (502, "upstream_unavailable", 2)
        served.assert_clean()


@pytest.mark.parametrize("leave_at", [0.5, 1.5, 2.5])
async def test_who_leaves_ends_both(open_app: OpenApp, autojump_clock: MockClock, leave_at: float) -> None:
    """Whenever that is."""
    providers = {"a": Provider((Stall(),)), "b": Provider((Pause(1), Say(content("b")), Stall()))}
    async with open_app(two(**HEDGE), providers) as served:
        call = served.client.chat(model="both")
        await trio.sleep(leave_at)
        call.disconnect()
        await call.wait()
        assert served.settled[0].outcome == "cancelled"
        served.assert_clean()
        assert [state.in_flight for _, state in served.gateway.exchange_services.upstream.targets.items()] in (
            [0],
            [0, 0],
        )


async def test_json_answers_race_too(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The first whole answer wins."""
    slow = (Head(200, "application/json"), Pause(5), Say(completion("slow")))
    providers = {"a": Provider(slow), "b": Provider(answers(completion("quick")))}
    async with open_app(two(**HEDGE), providers) as served:
        call = await served.client.chat(model="both", stream=False).wait()
        assert call.json["choices"][0]["message"]["content"] == "quick"
        assert whys(served)[0] == ("a/m", "first", "superseded")
        served.assert_clean()


async def test_a_deadline_ends_a_race(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """One deadline for both."""
    providers = {"a": Provider((Stall(),)), "b": Provider((SlowConnect(),))}
    async with open_app(two(**HEDGE, total_timeout_s=4), providers) as served:
        begun = trio.current_time()
        call = await served.client.chat(model="both").wait()
        assert (call.status, call.error["phase"]) == (504, "total")
        assert trio.current_time() - begun == pytest.approx(4)
        served.assert_clean()


# -- a stream that breaks off -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    [b"data: [DONE]\n\n", b"", FINISH],
    ids=["no finish_reason", "nothing", "no [DONE]"],
)
async def test_both_proofs_are_needed(open_app: OpenApp, end: bytes) -> None:
    """A stream is complete with ``finish_reason`` and ``[DONE]``; else the client is told that it is not."""
    async with open_app(make_config(), Provider((Say(content("a")), Say(end)))) as served:
        call = await served.client.chat().wait()
        assert call.error["code"] == "upstream_truncated"
        assert b"[DONE]" not in call.body
        assert served.settled[0].outcome == "upstream_truncated"


async def test_every_choice_has_to_finish(open_app: OpenApp) -> None:
    """With two choices, one ``finish_reason`` is half of it."""

    def choice(index: int, **more: Any) -> Say:
        return Say(event({"choices": [{"index": index, "delta": {}, **more}]}))

    half = (choice(0, delta={"content": "a"}), choice(1, delta={"content": "b"}), choice(0, finish_reason="stop"))
    done = Say(b"data: [DONE]\n\n")
    whole = (*half, choice(1, finish_reason="length"), done)
    async with open_app(make_config(), Provider((*half, done), whole)) as served:
        assert (await served.client.chat(n=2).wait()).error["code"] == "upstream_truncated"
        assert (await served.client.chat(n=2).wait()).body.endswith(b"data: [DONE]\n\n")


CONTINUE = {"on_truncation": "continue"}


def cut(*texts: str, end: Any = BROKEN) -> Script:  # Any: a step
    """A stream that breaks off."""
    return (Say(role()), *(Say(content(text)) for text in texts), end)


@pytest.mark.parametrize(
    "end",
    [Break("fin"), Break("rst"), Say(event({"error": {"message": "overloaded"}})), Say(b"data: [DONE]\n\n"), Stall()],
    ids=["fin", "rst", "error event", "no finish_reason", "silence"],
)
async def test_the_next_target_goes_on(open_app: OpenApp, autojump_clock: MockClock, end: Any) -> None:
    """In the same response, from the last character that the client has, under the same id; and it is told once who
    speaks."""
    second = (Say(role()), Say(content(" wörld").replace(b"chatcmpl-1", b"other")), Say(usage(9, 4)), Say(DONE))
    providers = {"a": Provider(cut("Héllo", ",", end=end)), "b": Provider(second)}
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


async def test_it_goes_on_more_than_once(open_app: OpenApp) -> None:
    """As long as there are attempts."""
    providers = {"a": Provider(cut("one "), says("three")), "b": Provider(cut("two "))}
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
async def test_what_cannot_be_gone_on_with(open_app: OpenApp, first: Script) -> None:
    """It fails honestly."""
    config = two(limits={"buffered_bytes": 2000}, **CONTINUE)
    async with open_app(config, {"a": Provider(first), "b": Provider(says("b"))}) as served:
        call = await served.client.chat(model="both").wait()
        assert call.error["code"] == "upstream_truncated"
        assert b"[DONE]" not in call.body
        assert not served.providers["b"].calls


async def test_who_speaks_is_said_once(open_app: OpenApp) -> None:
    """Also where the second one says it together with its first words, as a few providers do."""
    second = (Say(chunk({"role": "assistant", "content": ' "role" \u00fc'})), Say(DONE))
    async with open_app(two(**CONTINUE), {"a": Provider(cut("a")), "b": Provider(second)}) as served:
        call = await served.client.chat(model="both").wait()
        assert text_of(call.body) == 'a "role" \u00fc'
        assert call.body.count(b'"role"') == 1


async def test_a_character_in_two_halves(open_app: OpenApp) -> None:
    """What came in two events is one character for who goes on, who may send its own in that way, too."""
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
async def test_the_one_after_goes_on(open_app: OpenApp, autojump_clock: MockClock, refusal: Script) -> None:
    """Where the next target fails before it has said anything, it is the turn of the one behind it."""
    providers = {"a": Provider(cut("one ")), "b": Provider(refusal), "c": Provider(says("two"))}
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


async def test_who_hears_a_keep_alive_waits(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """What an SDK waits for is the next byte: after a comment, there is still time for another target."""
    config = two(limits={"keep_alive_s": 3, "first_token_timeout_s": 8})
    async with open_app(config, {"a": Provider((Stall(),)), "b": Provider(says("b"))}) as served:
        call = await ask(served, model="both", x_stainless_read_timeout="5").wait()
        assert text_of(call.body) == "b"
        assert call.body.endswith(DONE)


async def test_nobody_goes_on(open_app: OpenApp) -> None:
    """The next one fails as well: an error event, and what was said stays as it was."""
    async with open_app(two(**CONTINUE), {"a": Provider(cut("a")), "b": Provider(BUSY)}) as served:
        call = await served.client.chat(model="both").wait()
        assert text_of(call.body.split(b'data: {"error"')[0]) == "a"
        assert len(call.error["attempts"]) == 2
        served.assert_clean()


# -- who leaves -------------------------------------------------------------------------------------------------------

FINISHING = {"on_disconnect": "finish", "finish_timeout_s": 10}


async def test_the_answer_is_taken_to_its_end(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The provider bills it anyway: so at least its usage is known."""
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
        assert (totals.exchanges, totals.cancelled, totals.failed) == (1, 1, 0), "it is the client who left"
        assert served.providers["a"].calls[0].ended == "complete"
        served.assert_clean()


@pytest.mark.parametrize("script", [(Stall(),), (Say(content("a")), Stall())], ids=["before", "after content"])
@pytest.mark.parametrize("stream", [True, False])
async def test_not_for_ever(open_app: OpenApp, autojump_clock: MockClock, script: Script, stream: bool) -> None:
    """After its time it is cancelled."""
    async with open_app(two(**FINISHING), {"a": Provider(script), "b": Provider()}) as served:
        begun = trio.current_time()
        call = served.client.chat(model="both", stream=stream)
        await trio.sleep(1)
        call.disconnect()
        await call.wait()
        assert trio.current_time() - begun == pytest.approx(11)
        assert served.settled[0].outcome == "cancelled"
        served.assert_clean()


async def test_nothing_is_begun_for_nobody(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Where the client leaves before an upstream is asked, or its attempt fails after that, nobody else is asked."""
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


async def test_the_overhead_is_without_the_upstream(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Waiting for an upstream is not the gateway's; pauses are."""
    slow = (Pause(3), Head(503, "application/json", {"retry-after": "1"}), Say(b"{}"))
    good = (Pause(2), *says("x"))
    async with open_app(make_config(retries={}), Provider(slow, good)) as served:
        call = await served.client.chat().wait()
        assert float(call.header("x-trigate-overhead-ms")) == pytest.approx(1000, abs=1)
        call = await served.client.chat(model="nobody").wait()
        assert (call.status, call.header("x-trigate-attempts")) == (404, "0")
