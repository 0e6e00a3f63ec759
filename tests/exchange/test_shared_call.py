"""Shared calls: which clients share an upstream call, what each of them gets, and when the call ends."""

from __future__ import annotations

import math
import random
from functools import partial
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.asgi_client import ClientCall, chat
from tests.support.gateway import OpenApp, OpenServer, Served, make_config
from tests.support.logs import Logs
from tests.support.provider import (
    DONE,
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
    completion,
    content,
    open_socket_provider,
    role,
    says,
    usage,
)
from trigate.exchange.upstream_call import UpstreamCall

SHARED = {"targets": ["up/m"], "coalesce": True}
SLOWLY: Script = (
    Say(role()),
    *(step for number in range(5) for step in (Pause(1), Say(content(f"word {number} ")))),
    Pause(1),
    Say(usage(3, 5) + DONE),
)


def config(upstream: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **sections: Any) -> Any:
    """One upstream with the model ``shared``, without keep-alives unless they are asked for."""
    limits = {"keep_alive_s": 0, **sections.pop("limits", {})}
    return make_config(
        {"up": upstream or {}}, models={"shared": {**SHARED, **(model or {})}}, limits=limits, **sections
    )


def ask(served: Served, text: str = "Hi", *, stream: Any = True, key: str = "", **headers: str) -> ClientCall:
    """Starts a call that may be shared."""
    body = {**chat(stream=stream, model="shared", temperature=0), "messages": [{"role": "user", "content": text}]}
    if stream is True:
        body["stream_options"] = {"include_usage": True}
    more = {"authorization": f"Bearer {key}"} if key else {}
    return served.client.start("POST", "/v1/chat/completions", body, headers={**more, **headers})


def full_body(script: Script) -> bytes:
    """The complete body that a client gets from a script."""
    return b"".join(step.data for step in script if isinstance(step, Say)).replace(b'"model":"m"', b'"model":"shared"')


def outcomes(served: Served) -> list[Any]:
    """How the exchanges ended, sorted."""
    return sorted(exchange.outcome for exchange in served.settled)


async def is_quiet(served: Served) -> None:
    """Waits until the shared calls have ended, and checks that nothing is left."""
    await wait_all_tasks_blocked()
    served.assert_clean()
    assert repr(served.gateway.exchange_services.shared_calls) == "<SharedCalls 0 open>"


# -- one upstream call for all subscribers ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
async def test_fifty_clients_share_one_call(
    open_app: OpenApp, autojump_clock: MockClock, logs: Logs, stream: bool
) -> None:
    """There is one upstream call in one slot, and every client gets the same bytes as from a call of its own."""
    script = SLOWLY if stream else (Pause(1), *answers(completion("Hi")))
    async with open_app(config({"max_connections": 1}), Provider(script)) as served:
        own = await ask(served, stream=stream, **{"x-coalesce": "false"}).wait()
        assert own.header("x-trigate-coalesced") == ""
        calls = [ask(served, stream=stream) for _ in range(50)]
        for call in calls:
            await call.wait()
        assert served.providers["up"].opened == 2
        assert {call.body for call in calls} == {own.body}
        assert {call.status for call in calls} == {200}
        assert sorted(call.header("x-trigate-coalesced") for call in calls) == ["joined"] * 49 + ["leader"]
        for name in ("content-type", "content-length", "x-trigate-upstream", "x-trigate-attempts"):
            assert {call.header(name) for call in calls} == {own.header(name)}
        assert len({call.header("x-request-id") for call in calls}) == 50
        assert outcomes(served) == ["complete"] * 51
        lines = logs.named("exchange")
        assert {
            (line["events"] if stream else 0, line["bytes"], line["target"], line["attempts"]) for line in lines
        } == {(len(own.body.split(b"data: ")) - 1 if stream else 0, len(own.body), "up/m", 1)}
        await is_quiet(served)


async def test_tokens_are_accounted_once(open_app: OpenApp, autojump_clock: MockClock, logs: Logs) -> None:
    """The provider's usage is in one log line and once in the totals. The lines name the shared call."""
    async with open_app(config(), Provider(SLOWLY)) as served:
        calls = [ask(served) for _ in range(3)]
        for call in calls:
            await call.wait()
        totals = served.gateway.live.totals
        assert (totals.exchanges, totals.prompt_tokens, totals.completion_tokens) == (3, 3, 5)
        lines = logs.named("exchange")
        assert [line.get("completion_tokens") for line in lines].count(5) == 1
        assert sorted(line["coalesced"] for line in lines) == ["joined", "joined", "leader"]
        [leader] = [line for line in lines if line["coalesced"] == "leader"]
        assert {line["shared_call"] for line in lines} == {leader["request_id"]}


@pytest.mark.parametrize("is_reported", [True, False])
async def test_each_subscriber_has_a_record_and_one_has_the_tokens(
    open_app: OpenApp, autojump_clock: MockClock, is_reported: bool
) -> None:
    """This holds for reported and for estimated tokens, for a shared call that completed and for one whose last client
    disconnected."""
    script = (*SLOWLY[:3], *((Say(usage(3, 50)),) if is_reported else ()), Pause(1), Say(content("end")), Say(DONE))
    async with open_app(config(), Provider(script)) as served:
        calls = [ask(served) for _ in range(3)]
        for call in calls:
            await call.wait()
        calls = [ask(served) for _ in range(3)]
        await trio.sleep(1.5)
        for call in calls:
            call.disconnect()
            await call.wait()
        records = await served.gateway.ledger.list(limit=10)
        assert [record.outcome for record in records] == ["cancelled"] * 3 + ["complete"] * 3
        for shared in (records[:3], records[3:]):
            [billed] = [record for record in shared if record.completion_tokens is not None]
            assert billed.counted is not is_reported
            assert (billed.completion_tokens == 50) is is_reported
            assert all(record.bytes and len(record.attempts) == 1 for record in shared)


@pytest.mark.parametrize("after_s", [0.5, 1.5, 2.5, 5.5, 6.5])
async def test_a_late_subscriber_gets_the_whole_answer(
    open_app: OpenApp, autojump_clock: MockClock, after_s: float
) -> None:
    """A late subscriber gets everything sent so far at once, then the rest as it comes. A call that has ended cannot be
    joined."""
    async with open_app(config(), Provider(SLOWLY)) as served:
        begun = trio.current_time()
        first = ask(served)
        await trio.sleep(after_s)
        late = ask(served)
        await first.wait()
        await late.wait()
        assert first.body == late.body == full_body(SLOWLY)
        is_late = after_s > 6
        assert served.providers["up"].opened == (2 if is_late else 1)
        assert late.header("x-trigate-coalesced") == ("leader" if is_late else "joined")
        if 1 < after_s < 6:
            assert late.pieces[0][0] == begun + after_s
            assert late.pieces[0][1] == full_body(SLOWLY[: 2 * math.ceil(after_s) - 1])
            assert late.ended_at == first.ended_at
        await is_quiet(served)


async def test_audio_is_shared_too(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Where speech may be shared, it has its type and length, and no proper end where the upstream breaks off."""
    allowed = config(model={"coalesce_sampled": True})
    sound = bytes(range(256))
    whole = (Head(200, "audio/mpeg", {"content-length": "512"}), Say(sound), Pause(1), Say(sound))
    truncated = (Head(200, "audio/mpeg"), Say(sound), Pause(1), Break())
    body = {"model": "shared", "input": "x", "voice": "v"}
    async with open_app(allowed, Provider(whole, truncated)) as served:
        for is_whole in (True, False):
            calls = [served.client.start("POST", "/v1/audio/speech", body)]
            await trio.sleep(0.5)
            calls.append(served.client.start("POST", "/v1/audio/speech", body))
            for call in calls:
                await call.wait()
                assert (call.header("content-type"), call.ended) == ("audio/mpeg", is_whole)
                assert call.body == (sound * 2 if is_whole else sound)
        assert served.providers["up"].opened == 2
        await is_quiet(served)


# -- which calls are shared -------------------------------------------------------------------------------------------


async def test_two_keys_do_not_share_a_call(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A call of another principal is never shared, even with an equal body."""
    keyed = config(keys={"ada": "key-of-ada", "bob": "key-of-bob"})
    async with open_app(keyed, Provider(SLOWLY)) as served:
        calls = [ask(served, key=key) for key in ("key-of-ada", "key-of-bob", "key-of-ada", "key-of-bob")]
        for call in calls:
            await call.wait()
        for own in (calls[::2], calls[1::2]):
            assert sorted(call.header("x-trigate-coalesced") for call in own) == ["joined", "leader"]
        assert served.providers["up"].opened == 2


@pytest.mark.parametrize(
    ("model", "header", "fields", "shared"),
    [
        ("shared", None, {"temperature": 0}, True),
        ("shared", "true", {"temperature": 0}, True),
        ("shared", "FALSE", {"temperature": 0}, False),
        ("up/m", None, {"temperature": 0}, False),
        ("up/m", "true", {"temperature": 0}, True),
        ("shared", None, {"temperature": 0.7}, False),
        ("shared", None, {"seed": 4}, True),
        ("shared", "true", {}, False),
        ("sampled", None, {}, True),
        ("sampled", None, {"tools": [{"type": "function", "function": {"name": "f"}}]}, False),
    ],
)
async def test_settings_and_headers(
    open_app: OpenApp, autojump_clock: MockClock, model: str, header: str | None, fields: Any, shared: bool
) -> None:
    """The header takes precedence over the model's setting. Neither shares a call with a random answer."""
    models = {"shared": SHARED, "sampled": {**SHARED, "coalesce_sampled": True}}
    async with open_app(make_config(models=models), Provider(SLOWLY)) as served:
        headers = {"x-coalesce": header} if header is not None else {}
        body = chat(model=model, **fields)
        calls = [served.client.start("POST", "/v1/chat/completions", body, headers=headers) for _ in range(2)]
        for call in calls:
            await call.wait()
        assert served.providers["up"].opened == (1 if shared else 2)
        assert (calls[0].header("x-trigate-coalesced") != "") is shared


async def test_an_invalid_coalesce_header(open_app: OpenApp) -> None:
    """It is a 400 that names the header."""
    async with open_app(config()) as served:
        call = await ask(served, **{"x-coalesce": "yes"}).wait()
        assert (call.status, call.error["param"]) == (400, "x-coalesce")


async def test_session_turns_are_not_shared(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Each session stores its own turn."""
    async with open_app(config(), Provider(SLOWLY)) as served:
        calls = [ask(served, **{"x-session-key": key, "x-coalesce": "true"}) for key in ("one", "two")]
        for call in calls:
            assert (await call.wait()).body.endswith(b"[DONE]\n\n")
        assert served.providers["up"].opened == 2


async def test_each_subscriber_is_admitted_separately(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A subscriber takes an admission slot too."""
    async with open_app(config(limits={"max_exchanges": 2, "max_queued": 0}), Provider(SLOWLY)) as served:
        calls = [ask(served) for _ in range(3)]
        for call in calls:
            await call.wait()
        roles = {(call.status, call.header("x-trigate-coalesced")) for call in calls}
        assert roles == {(200, "leader"), (200, "joined"), (503, "")}
        assert served.providers["up"].opened == 1


async def test_a_reload_begins_a_new_shared_call(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Calls after a reload use the new configuration. Calls before it keep the old one."""
    async with open_app(config(), Provider(SLOWLY)) as served:
        first = ask(served)
        await trio.sleep(1.5)
        old = served.gateway.generations.current
        served.gateway.reloader.request()
        while served.gateway.generations.current is old:  # noqa: ASYNC110 - a reload does not notify
            await trio.sleep(0.01)
        second = ask(served)
        await first.wait()
        await second.wait()
        assert first.body == second.body == full_body(SLOWLY)
        assert served.providers["up"].opened == 2
        await is_quiet(served)
        assert old.exchanges == 0


# -- clients that disconnect ------------------------------------------------------------------------------------------


async def test_the_first_client_disconnects_and_the_others_stay(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The client that began the call has no special part in it."""
    async with open_app(config(), Provider(SLOWLY)) as served:
        first = ask(served)
        await trio.sleep(1.5)
        second = ask(served)
        await trio.sleep(1)
        first.disconnect()
        await first.wait()
        assert outcomes(served) == ["cancelled"]
        third = ask(served)
        await second.wait()
        await third.wait()
        assert second.body == third.body == full_body(SLOWLY)
        assert full_body(SLOWLY).startswith(first.body)
        assert served.providers["up"].opened == 1
        assert served.gateway.live.totals.completion_tokens == 5
        await is_quiet(served)


PHASES: dict[str, tuple[Script, bool]] = {
    "connecting": ((SlowConnect(),), True),
    "waiting for headers": ((Stall(),), True),
    "waiting for the first token": ((Head(), Say(role()), Stall()), True),
    "streaming": ((Say(content("a")), Stall()), True),
    "reading a JSON answer": ((Head(200, "application/json"), Say(b'{"a'), Stall()), False),
}


@pytest.mark.parametrize("how", ["disconnect", "cancel"])
@pytest.mark.parametrize("phase", PHASES)
async def test_the_last_disconnect_closes_the_upstream(
    open_app: OpenApp, autojump_clock: MockClock, phase: str, how: str
) -> None:
    """The upstream is closed at once and not earlier, in every phase. The next call begins a new shared call."""
    script, stream = PHASES[phase]
    async with open_app(config(limits={"connect_timeout_s": 0}), Provider(script)) as served:
        calls = [ask(served, stream=stream) for _ in range(3)]
        for call in calls:
            await trio.sleep(1)
            assert served.providers["up"].closed_at == []
            if how == "disconnect":
                call.disconnect()
            else:
                call.scope.cancel()
            await call.wait()
        gone = trio.current_time()
        await is_quiet(served)
        assert served.providers["up"].closed_at == [gone]
        assert outcomes(served) == ["cancelled" if how == "disconnect" else "draining"] * 3
        served.providers["up"].play(says("x"))
        assert (await ask(served).wait()).body == full_body(says("x"))


async def test_a_deadline_applies_to_one_subscriber(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The client whose deadline passes gets the error. The other subscribers and the upstream continue."""
    async with open_app(config(), Provider((Pause(4), *SLOWLY))) as served:
        begun = trio.current_time()
        hurried = ask(served, **{"x-request-timeout": "2"})
        patient = ask(served)
        late = ask(served, **{"x-request-timeout": "6.5"})
        for call in (hurried, patient, late):
            await call.wait()
        assert (hurried.status, hurried.error["phase"], hurried.returned_at - begun) == (504, "total", 2)
        assert (late.status, late.error["phase"], late.returned_at - begun) == (200, "total", 6.5)
        assert hurried.error["attempts"][0]["phase"] == "connecting"
        assert patient.body == full_body(SLOWLY)
        assert float(served.providers["up"].calls[0].headers["x-request-timeout"]) == pytest.approx(3600)
        assert outcomes(served) == ["complete", "upstream_timeout", "upstream_timeout"]
        await is_quiet(served)


async def test_finish_applies_to_the_last_subscriber(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A client that disconnects before the last one is detached. After the last one the call is read to its end and can
    still be joined."""
    async with open_app(config(model={"on_disconnect": "finish"}), Provider(SLOWLY)) as served:
        first, last = ask(served), ask(served)
        await trio.sleep(2.5)
        first.disconnect()
        await first.wait()
        assert outcomes(served) == ["cancelled"]
        last.disconnect()
        await trio.sleep(1)
        late = ask(served)
        await late.wait()
        assert late.body == full_body(SLOWLY)
        assert late.header("x-trigate-coalesced") == "joined"
        await last.wait()
        assert outcomes(served) == ["cancelled", "complete", "finished"]
        assert served.providers["up"].calls[0].ended == "complete"
        assert served.gateway.live.totals.completion_tokens == 5
        await is_quiet(served)


async def test_finish_has_its_own_time_limit(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A shared call without a client ends at the finish timeout."""
    model = {"on_disconnect": "finish", "finish_timeout_s": 10}
    async with open_app(config(model=model), Provider((Say(content("a")), Stall()))) as served:
        calls = [ask(served), ask(served)]
        await trio.sleep(1)
        for call in calls:
            call.disconnect()
        gone = trio.current_time()
        for call in calls:
            await call.wait()
        await is_quiet(served)
        assert served.providers["up"].closed_at == [gone + 10]
        assert outcomes(served) == ["cancelled", "cancelled"]


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        ((Pause(1), *answers(b'{"error":{"message":"broken"}}', status=500)), 502, "upstream_unavailable"),
        ((Pause(1), *answers(b'{"error":{"message":"no","code":"own"}}', status=400)), 400, "own"),
        ((Pause(1), Refuse()), 502, "upstream_unavailable"),
        ((Pause(1), Head(200, "text/html"), Say(b"<html>")), 502, "upstream_garbled"),
    ],
)
async def test_an_error_before_commit_is_a_status_for_all(
    open_app: OpenApp, autojump_clock: MockClock, script: Script, status: int, code: str, stream: bool
) -> None:
    """Every client gets the same body, and every exchange has that outcome."""
    async with open_app(config(), Provider(script)) as served:
        calls = [ask(served, stream=stream) for _ in range(5)]
        for call in calls:
            await call.wait()
        assert {(call.status, call.error["code"]) for call in calls} == {(status, code)}
        assert {call.header("x-trigate-attempts") for call in calls} == {"1"}
        assert served.providers["up"].opened == 1
        assert len(served.settled) == 5
        await is_quiet(served)


async def test_an_error_after_commit_is_an_event_for_all(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It follows everything sent before it, for late subscribers too, and there is no ``[DONE]``."""
    script = (*SLOWLY[:5], Pause(1), Break())
    async with open_app(config(), Provider(script)) as served:
        first = ask(served)
        await trio.sleep(2.5)
        late = ask(served)
        for call in (first, late):
            await call.wait()
            assert call.body.startswith(full_body(script))
            assert call.error["code"] == "upstream_truncated"
            assert b"[DONE]" not in call.body
            assert call.ended
        assert outcomes(served) == ["upstream_truncated"] * 2
        await is_quiet(served)


async def test_each_subscriber_has_its_own_keep_alives(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A client that has waited long in silence gets a comment and then an error event. A client that has just joined
    gets a status."""
    script = (Pause(5), *answers(b'{"error":{"message":"broken"}}', status=500))
    async with open_app(config(limits={"keep_alive_s": 2}), Provider(script)) as served:
        early = ask(served)
        await trio.sleep(4)
        late = ask(served)
        await early.wait()
        await late.wait()
        assert (early.status, early.body.count(b": keep-alive\n\n")) == (200, 2)
        assert early.error["code"] == "upstream_unavailable"
        assert (late.status, late.error["code"]) == (502, "upstream_unavailable")
        assert [early.header("x-trigate-coalesced"), late.header("x-trigate-coalesced")] == ["leader", "joined"]


async def test_an_upstream_that_waits_for_its_subscribers_is_not_idle(
    open_app: OpenApp, autojump_clock: MockClock
) -> None:
    """Its silence counts from when it is read again, although no limit was checked since."""
    big = [content(letter * 4000) for letter in "xy"]
    script = (Say(content("a")), Pause(1), Say(big[0]), Pause(0.1), Say(big[1]), Pause(4.7), *says("b"))
    settings = config(limits={"idle_timeout_s": 5, "buffered_bytes": 5000})
    async with open_app(settings, Provider(script)) as served:
        call = ask(served)
        await call.wait_for(b'"a"')
        call.stall()
        await trio.sleep(5.5)
        call.release()
        assert (await call.wait()).body.endswith(DONE)
        assert outcomes(served) == ["complete"]
        await is_quiet(served)


async def test_attempts_belong_to_the_shared_call(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Failover happens once for all. A client that joins meanwhile is served by the second attempt."""
    settings = make_config({"a": {}, "b": {}}, models={"shared": {"targets": ["a/m", "b/m"], "coalesce": True}})
    down = (Pause(1), *answers(b"", status=503))
    async with open_app(settings, {"a": Provider(down), "b": Provider(SLOWLY)}) as served:
        first = ask(served)
        await trio.sleep(1.5)
        late = ask(served)
        for call in (first, late):
            await call.wait()
            assert call.body == full_body(SLOWLY)
            assert (call.header("x-trigate-upstream"), call.header("x-trigate-attempts")) == ("b", "2")
        assert [provider.opened for provider in served.providers.values()] == [1, 1]
        # the late subscriber waited for the upstream during the whole time until its response head
        assert float(late.header("x-trigate-overhead-ms")) == pytest.approx(0, abs=1)
        await is_quiet(served)


async def test_a_hedge_belongs_to_the_shared_call(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The second attempt is started once, and the first content wins for all."""
    model = {"targets": ["a/m", "b/m"], "coalesce": True, "strategy": "hedge", "hedge_delay_s": 1, "hedge_budget": 1}
    settings = make_config({"a": {}, "b": {}}, models={"shared": model})
    async with open_app(settings, {"a": Provider((Stall(),)), "b": Provider(SLOWLY)}) as served:
        calls = [ask(served) for _ in range(5)]
        for call in calls:
            await call.wait()
            assert call.body == full_body(SLOWLY)
            assert (call.header("x-trigate-upstream"), call.header("x-trigate-attempts")) == ("b", "2")
        assert [provider.opened for provider in served.providers.values()] == [1, 1]
        assert [call.ended for call in served.providers["a"].calls] == ["closed"]
        await is_quiet(served)


async def test_a_continued_stream_is_shared(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The continuation head belongs to the shared call, and all clients get the same bytes."""
    model = {"targets": ["a/m", "b/m"], "coalesce": True, "on_truncation": "continue"}
    settings = make_config({"a": {}, "b": {}}, models={"shared": model})
    scripts = {"a": (*SLOWLY[:5], Break()), "b": says("and on")}
    async with open_app(settings, {name: Provider(script) for name, script in scripts.items()}) as served:
        calls = [ask(served), ask(served)]
        for call in calls:
            await call.wait()
        assert calls[0].body == calls[1].body
        assert calls[0].body.endswith(b"[DONE]\n\n")
        assert calls[0].body.count(b"and on") == calls[0].body.count(b"word 1") == 1
        assert [provider.opened for provider in served.providers.values()] == [1, 1]


async def test_an_internal_error_reaches_all_subscribers(
    open_app: OpenApp, autojump_clock: MockClock, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has one traceback, and every client gets an error."""
    logs.expect_error("exchange_crashed")

    def crash(*_: object) -> bool:
        raise RuntimeError("a defect")

    monkeypatch.setattr(UpstreamCall, "claim", crash)
    async with open_app(config(), Provider(SLOWLY)) as served:
        calls = [ask(served) for _ in range(3)]
        for call in calls:
            await call.wait()
        assert {(call.status, call.error["code"]) for call in calls} == {(500, "internal_error")}
        assert len(logs.named("exchange_crashed")) == 1
        await is_quiet(served)


async def test_a_drain_reaches_all_subscribers(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Each gets the error event, and the upstream is closed."""
    async with open_app(config(), Provider((Say(content("a")), Stall()))) as served:
        calls = [ask(served) for _ in range(3)]
        await trio.sleep(1)
        served.gateway.drain.begin()
        served.gateway.drain.cut()
        for call in calls:
            await call.wait()
            assert (call.error["code"], call.ended) == ("draining", True)
        await is_quiet(served)
        assert served.providers["up"].closed_at == [trio.current_time()]


# -- slow clients -----------------------------------------------------------------------------------------------------

LONG: Script = (*(step for number in range(100) for step in (Say(content(f"{number:0100}")), Pause(0.1))), Say(DONE))
AT_ONCE: Script = tuple(step for step in LONG if isinstance(step, Say))


async def test_a_slow_client_is_ended_and_delays_no_other(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The others get every event as it comes. The slow client gets an error after what it was sent, once it reads
    again."""
    async with open_app(config(limits={"buffered_bytes": 5000}), Provider(LONG)) as served:
        calls = [ask(served) for _ in range(3)]
        slow, *quick = calls
        await slow.wait_for(b"data")
        slow.stall()
        begun = trio.current_time()
        for call in quick:
            await call.wait()
            assert call.body == full_body(LONG)
            assert call.ended_at - begun == pytest.approx(10, abs=0.01)
        assert len(served.settled) == 2
        slow.release()
        await slow.wait()
        frame = b'data: {"error":'
        assert full_body(LONG).startswith(slow.body[: slow.body.index(frame)])
        assert (slow.error["code"], slow.ended) == ("client_too_slow", True)
        assert b"[DONE]" not in slow.body
        assert outcomes(served) == ["client_too_slow", "complete", "complete"]
        assert served.providers["up"].opened == 1
        await is_quiet(served)


async def test_a_client_that_is_slow_for_a_while_gets_everything(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Within the buffer limit, each client reads at its own pace."""
    async with open_app(config(limits={"buffered_bytes": 5000}), Provider(LONG)) as served:
        calls = [ask(served) for _ in range(3)]
        for _ in range(15):
            calls[0].stall()
            await trio.sleep(0.5)
            calls[0].release()
            await trio.sleep(0.2)
        for call in calls:
            assert (await call.wait()).body == full_body(LONG)


async def test_the_upstream_is_read_at_the_pace_of_the_fastest_client(
    open_app: OpenApp, autojump_clock: MockClock
) -> None:
    """When all clients are slow, or there is only one, none is ended, and the buffer stays within its limit."""
    for count in (1, 3):
        async with open_app(config(limits={"buffered_bytes": 5000, "idle_timeout_s": 3}), Provider(AT_ONCE)) as served:
            calls = [ask(served) for _ in range(count)]
            for call in calls:
                call.stall()
            await trio.sleep(20)  # far beyond the upstream's idle timeout, but the clients cause the silence
            provider = served.providers["up"]
            assert provider.calls[0].pieces_read < 30
            assert provider.open_now == 1
            for call in calls:
                call.release()
            for call in calls:
                assert (await call.wait()).body == full_body(AT_ONCE)
            await is_quiet(served)


async def test_a_call_without_its_beginning_is_not_joined(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Once the beginning of the answer is dropped from the buffer, the same call begins a new shared call."""
    async with open_app(config(limits={"buffered_bytes": 5000}), Provider(LONG)) as served:
        first = ask(served)
        await trio.sleep(1)
        second = ask(served)
        await trio.sleep(5)
        third = ask(served)
        fourth = ask(served)
        for call in (first, second, third, fourth):
            assert (await call.wait()).body == full_body(LONG)
        assert served.providers["up"].opened == 2
        roles = [call.header("x-trigate-coalesced") for call in (first, second, third, fourth)]
        assert (roles[:2], sorted(roles[2:])) == (["leader", "joined"], ["joined", "leader"])
        await is_quiet(served)


async def test_a_stalled_client_is_ended(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It ends after `stall_timeout_s`, like any client. The shared call continues for the others."""
    limits = {"stall_timeout_s": 3, "buffered_bytes": 10**6}
    async with open_app(config(limits=limits), Provider(LONG)) as served:
        calls = [ask(served) for _ in range(2)]
        await calls[0].wait_for(b"data")
        calls[0].stall()
        assert (await calls[1].wait()).body == full_body(LONG)
        calls[0].disconnect()
        await calls[0].wait()
        assert outcomes(served) == ["client_stalled", "complete"]
        await is_quiet(served)


async def test_a_disconnected_client_delays_no_other(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """With ``finish`` and no client, the shared call runs at its own pace. A client that joins then reads at its own
    pace."""
    settings = config(model={"on_disconnect": "finish"}, limits={"buffered_bytes": 5000})
    async with open_app(settings, Provider((Say(content("a")), Pause(1), *AT_ONCE))) as served:
        gone = ask(served)
        await trio.sleep(0.5)
        gone.disconnect()
        late = ask(served)
        await late.wait_for(b'"a"')
        late.stall()
        await trio.sleep(10)
        assert served.providers["up"].open_now == 1
        late.release()
        await late.wait()
        assert late.body == full_body((Say(content("a")), *AT_ONCE))
        await gone.wait()
        assert outcomes(served) == ["complete", "finished"]
        await is_quiet(served)


# -- status and cancellation by an operator ---------------------------------------------------------------------------


async def test_status_shows_the_shared_call(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Every subscriber has a row with the shared call and its phase and attempts. Cancelling one row ends only that
    subscriber."""
    async with open_app(config({"max_connections": 1}), Provider((Say(content("a")), Stall()))) as served:
        other = ask(served, "another question", **{"x-request-id": "other"})
        await trio.sleep(1)
        calls = []
        for name in ("one", "two"):
            calls.append(ask(served, **{"x-request-id": name}))
            await trio.sleep(1)
        rows = (await served.client.ask("GET", "/status/streams")).json["data"]
        assert [(row["id"], row["phase"], row["queue_position"], row["shared_call"]) for row in rows] == [
            ("other", "streaming", None, {"id": "other", "role": "leader", "subscribers": 1}),
            ("one", "queued", 1, {"id": "one", "role": "leader", "subscribers": 2}),
            ("two", "queued", 1, {"id": "one", "role": "joined", "subscribers": 2}),
        ]
        other.disconnect()
        await trio.sleep(1)
        rows = (await served.client.ask("GET", "/status/streams")).json["data"]
        assert [(row["id"], row["phase"], row["target"], row["events"]) for row in rows] == [
            ("one", "streaming", "up/m", 1),
            ("two", "streaming", "up/m", 1),
        ]
        # the attempts of the shared call, relative to each subscriber's start
        [[own], [shared]] = (row["attempts"] for row in rows)
        assert (own.pop("started_s"), shared.pop("started_s")) == (0, -1)
        assert own == shared
        assert (await served.client.ask("DELETE", "/status/streams/one")).json["cancelled"] == 1
        assert (await calls[0].wait()).error["code"] == "stream_cancelled"
        rows = (await served.client.ask("GET", "/status/streams")).json["data"]
        assert [(row["id"], row["shared_call"]["subscribers"]) for row in rows] == [("two", 1)]
        assert served.providers["up"].open_now == 1
        calls[1].disconnect()
        await calls[1].wait()
        await is_quiet(served)


# -- random order of events -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
async def test_random_joins_disconnects_and_stalls(open_app: OpenApp, autojump_clock: MockClock, seed: int) -> None:
    """Clients join, disconnect, stall and read on at random. A client with a complete answer has all its bytes, a
    client that was ended has the beginning of it, and each upstream call ends with its last subscriber."""
    chance = random.Random(seed)
    settings = config(limits={"buffered_bytes": 5000, "stall_timeout_s": 0})
    async with open_app(settings, Provider(LONG)) as served, trio.open_nursery() as nursery:
        calls: list[ClientCall] = []
        gone: list[ClientCall] = []

        async def come(at_s: float, stays_s: list[float], leaves: bool) -> None:
            await trio.sleep(at_s)
            call = ask(served)
            calls.append(call)
            for seconds in stays_s:
                await trio.sleep(seconds)
                call.stall()
                await trio.sleep(seconds)
                call.release()
            if leaves:
                gone.append(call)
                call.disconnect()
            await call.wait()

        for _ in range(30):
            pauses = [chance.uniform(0, 4) for _ in range(chance.randrange(4))]
            nursery.start_soon(come, chance.uniform(0, 12), pauses, chance.random() < 0.4)
        await trio.sleep(1000)
        assert len(served.settled) == len(calls) == 30
        ended = {exchange.id: exchange.outcome for exchange in served.settled}
        for call in calls:
            text, _, error = call.body.partition(b'data: {"error":')
            assert full_body(LONG).startswith(text)
            if call.status:
                outcome = ended[call.header("x-request-id")]
                assert outcome in ("complete", "cancelled", "client_too_slow")
                assert call in gone or (text == full_body(LONG)) is (outcome == "complete")
                assert bool(error) <= (outcome == "client_too_slow")
        assert {"complete", "cancelled"} <= set(ended.values())
        assert served.providers["up"].opened < 30
        await is_quiet(served)


# -- over real sockets ------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_shared_call_over_sockets(open_server: OpenServer) -> None:
    """Twenty clients share one upstream call. Some disconnect, and the others get every byte."""
    script = tuple(Pause(0.02) if isinstance(step, Pause) else step for step in SLOWLY)
    async with open_socket_provider(script) as (provider, base_url):
        settings = make_config({"up": {"base_url": base_url, "include_usage": False}}, models={"shared": SHARED})
        async with open_server(settings) as (client, app), trio.open_nursery() as nursery:
            bodies: list[bytes] = []

            async def read(*, leaves: bool) -> None:
                body = chat(model="shared", temperature=0)
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    assert response.status_code == 200
                    if not leaves:
                        bodies.append(await response.aread())

            for number in range(20):
                nursery.start_soon(partial(read, leaves=number % 4 == 0))
            while len(bodies) < 15:  # noqa: ASYNC110 - nothing notifies
                await trio.sleep(0.01)
            assert set(bodies) == {full_body(script)}
            assert provider.opened == 1
            while app.gateway.live:  # noqa: ASYNC110 - as above
                await trio.sleep(0.01)
            assert (await client.get("/status")).json()["totals"]["exchanges"] == 20


@pytest.mark.slow
async def test_a_socket_that_does_not_read(open_server: OpenServer) -> None:
    """The other clients get tens of megabytes before it reads on. Then it gets an error."""
    text = "x" * 65_000
    script = (*(Say(content(text)) for _ in range(600)), Say(DONE))
    async with open_socket_provider(script) as (provider, base_url):
        settings = make_config({"up": {"base_url": base_url}}, models={"shared": SHARED})
        async with open_server(settings) as (client, _):
            body = msgspec.json.encode(chat(model="shared", temperature=0))
            url = client.base_url
            slow = await trio.open_tcp_stream(str(url.host), url.port or 0)
            await slow.send_all(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
            )
            head = await slow.receive_some(1000)
            assert head.startswith(b"HTTP/1.1 200")
            assert b"x-trigate-coalesced: leader" in head
            whole = await client.post(
                "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
            )
            assert whole.headers["x-trigate-coalesced"] == "joined"
            assert whole.content == full_body(script)
            assert provider.opened == 1
            rest = b""
            async for piece in slow:
                rest = (rest + piece)[-2000:]
            assert b'"code":"client_too_slow"' in rest
            assert rest.endswith(b"0\r\n\r\n")
            assert b"[DONE]" not in rest
            await slow.aclose()
