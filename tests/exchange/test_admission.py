"""Admission: which calls are admitted, which wait in the queue, and which are refused. Time is virtual."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.gateway import OpenApp, Served, make_config
from tests.support.logs import Logs
from tests.support.provider import DONE, Pause, Provider, Say, Stall, content, says

SLOW = (Pause(10), *says("x"))
KEYS = {"ada": "key-of-ada", "bob": "key-of-bob"}


def ask(served: Served, name: str = "", **headers: str) -> Any:  # Any: a ClientCall
    """Starts a call with a key."""
    body = {"model": "up/m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    fields = {"authorization": f"Bearer {KEYS[name]}"} if name else {}
    return served.client.start("POST", "/v1/chat/completions", body, headers={**fields, **headers})


async def test_calls_beyond_the_limit_are_queued(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Calls beyond the limit wait. When the queue is full too, a call is refused at once with a retry time."""
    config = make_config(limits={"max_exchanges": 1, "max_queued": 1})
    async with open_app(config, Provider(SLOW)) as served:
        begun = trio.current_time()
        calls = []
        for _ in range(3):
            calls.append(ask(served))
            await wait_all_tasks_blocked()
        refused = await calls[2].wait()
        assert (refused.status, refused.error["code"], trio.current_time()) == (503, "overloaded", begun)
        assert int(refused.header("retry-after-ms")) > 0
        assert int(refused.header("retry-after")) > 0
        for call in calls[:2]:
            assert (await call.wait()).body.endswith(DONE)
        assert trio.current_time() - begun == pytest.approx(20)
        served.assert_clean()
        assert served.gateway.exchange_services.admission.slots.taken == 0


async def test_a_wait_that_would_time_out_is_refused_at_once(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Calls take ten seconds, so a call that may wait for five is refused now and not after five seconds."""
    config = make_config(limits={"max_exchanges": 1, "queue_timeout_s": 5})
    async with open_app(config, Provider(SLOW)) as served:
        await ask(served).wait()
        first = ask(served)
        await wait_all_tasks_blocked()
        begun = trio.current_time()
        refused = await ask(served).wait()
        assert (refused.status, trio.current_time()) == (503, begun)
        assert refused.header("retry-after") == "10"
        assert (await first.wait()).status == 200


async def test_a_refusal_after_a_wait_is_a_status(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """However long the wait was, no keep-alive is sent in the queue, and the refusal is a status with a retry time."""
    limits = {"max_exchanges": 1, "max_queued": 1, "queue_timeout_s": 5, "keep_alive_s": 1}
    async with open_app(make_config(limits=limits), Provider((Stall(),))) as served:
        ask(served)
        await wait_all_tasks_blocked()
        begun = trio.current_time()
        call = await ask(served).wait()
        assert trio.current_time() - begun == pytest.approx(5)
        assert (call.status, call.error["code"]) == (503, "overloaded")
        assert int(call.header("retry-after-ms")) > 0


async def test_the_keep_alive_timer_starts_at_admission(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A wait longer than ``keep_alive_s`` does not commit the response at admission. Keep-alives start from there."""
    limits = {"max_exchanges": 1, "max_queued": 1, "queue_timeout_s": 20, "keep_alive_s": 4}
    async with open_app(make_config(limits=limits), Provider((Pause(10), *says("x")))) as served:
        ask(served)
        await wait_all_tasks_blocked()
        begun = trio.current_time()
        call = await ask(served).wait()
        comments = [at - begun for at, data in call.pieces if data == b": keep-alive\n\n"]
        assert comments == [pytest.approx(14), pytest.approx(18)]
        assert call.body.endswith(DONE)


async def test_a_deadline_bounds_the_wait(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The client's deadline keeps running in the queue. A call that cannot meet it is refused at once."""
    async with open_app(make_config(limits={"max_exchanges": 1}), Provider((Stall(),))) as served:
        ask(served)
        await wait_all_tasks_blocked()
        begun = trio.current_time()
        call = await ask(served, **{"x-request-timeout": "3"}).wait()
        assert call.status in (503, 504)
        assert trio.current_time() - begun == pytest.approx(3)
        assert served.gateway.exchange_services.admission.slots.queued == 0


@pytest.mark.parametrize("leave", [True, False], ids=["the client disconnects", "an operator cancels it"])
async def test_a_queued_call_can_be_cancelled(open_app: OpenApp, autojump_clock: MockClock, leave: bool) -> None:
    """Its queue slot is freed, and the upstream never gets the call."""
    async with open_app(make_config(limits={"max_exchanges": 1, "max_queued": 2}), Provider(SLOW)) as served:
        first = ask(served)
        await wait_all_tasks_blocked()
        second = ask(served, **{"x-request-id": "second"})
        await wait_all_tasks_blocked()
        third = ask(served)
        await wait_all_tasks_blocked()
        if leave:
            second.disconnect()
        else:
            await served.client.ask("DELETE", "/status/streams/second")
        await second.wait()
        assert (await first.wait()).status == (await third.wait()).status == 200
        assert len(served.providers["up"].calls) == 2
        served.assert_clean()


async def test_the_limit_of_a_key(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A key over its own limit gets a 429, and calls of other keys are served."""
    config = make_config(keys=KEYS, limits={"max_exchanges_per_key": 1, "max_queued": 0})
    async with open_app(config, Provider(SLOW)) as served:
        first = ask(served, "ada")
        await wait_all_tasks_blocked()
        refused = await ask(served, "ada").wait()
        assert (refused.status, refused.error["code"]) == (429, "rate_limited")
        assert int(refused.header("retry-after-ms")) > 0
        assert (await ask(served, "bob").wait()).status == 200
        assert (await first.wait()).status == 200


async def test_a_busy_key_does_not_starve_others(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """While ten calls of make_call key wait, the only call of another key is served next or second."""
    config = make_config({"up": {"max_connections": 1}}, keys=KEYS)
    for limits in ({"max_exchanges": 1}, {}):
        config = make_config(
            {"up": {"max_connections": 1}}, keys=KEYS, limits={"queue_timeout_s": 1000, "max_queued": 20, **limits}
        )
        async with open_app(config, Provider(SLOW)) as served:
            busy = []
            for _ in range(10):
                busy.append(ask(served, "ada"))
                await wait_all_tasks_blocked()
            begun = trio.current_time()
            await ask(served, "bob").wait()
            assert trio.current_time() - begun <= 30
            for call in busy:
                assert (await call.wait()).status == 200
            served.assert_clean()


async def test_a_busy_key_does_not_fill_the_queue(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A call of another key evicts the busy key's last queued call, as long as it has fewer queued. The evicted call is
    refused at once."""
    config = make_config(keys=KEYS, limits={"max_exchanges": 1, "max_queued": 3, "queue_timeout_s": 60})
    async with open_app(config, Provider(SLOW)) as served:
        busy = []
        for _ in range(4):
            busy.append(ask(served, "ada"))
            await wait_all_tasks_blocked()
        begun = trio.current_time()
        others = [ask(served, "bob")]
        evicted = await busy[3].wait()
        assert (evicted.status, evicted.error["code"], trio.current_time()) == (503, "overloaded", begun)
        assert "most calls in the queue" in evicted.error["message"]
        assert (await ask(served, "bob").wait()).status == 503  # an eviction would only swap the two keys
        for call in (*busy[:3], *others):
            assert (await call.wait()).status == 200
        served.assert_clean()
        assert served.gateway.exchange_services.admission.refused == 2


async def test_the_rate_of_a_key(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Three calls at once, then make_call every half second. A refusal states exactly when the next call is allowed."""
    config = make_config(keys=KEYS, limits={"key_rate_per_s": 2, "key_burst": 3})
    async with open_app(config, Provider(says("x"))) as served:
        assert [(await ask(served, "ada").wait()).status for _ in range(4)] == [200, 200, 200, 429]
        assert (await ask(served, "bob").wait()).status == 200
        refused = await ask(served, "ada").wait()
        assert (refused.error["code"], refused.header("retry-after-ms")) == ("rate_limited", "500")
        await trio.sleep(0.5)
        assert (await ask(served, "ada").wait()).status == 200
        assert len(served.providers["up"].calls) == 5


async def test_limits_follow_a_reload(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A reload with a higher limit admits queued calls."""
    async with open_app(make_config(limits={"max_exchanges": 1}), Provider(SLOW)) as served:
        begun = trio.current_time()
        first = ask(served)
        await wait_all_tasks_blocked()
        second = ask(served)
        await wait_all_tasks_blocked()
        served.gateway.exchange_services.admission.apply(make_config().limits)
        await first.wait()
        await second.wait()
        assert trio.current_time() - begun == pytest.approx(10)


async def test_a_late_event_loop_refuses_new_calls(
    open_app: OpenApp, autojump_clock: MockClock, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the event loop lags, new calls are refused at once and running calls continue. Then calls are admitted
    again."""
    async with open_app(
        make_config(limits={"loop_lag_s": 0.3}), Provider((Say(content("x")), Pause(60), Say(DONE)))
    ) as (served):
        admission = served.gateway.exchange_services.admission
        first = ask(served)
        await first.wait_for(b'"x"')
        real = trio.sleep_until

        async def late(at: float) -> None:
            await real(at + 0.5)

        monkeypatch.setattr(trio, "sleep_until", late)
        await trio.sleep(6)
        assert admission.is_late
        refused = await ask(served).wait()
        assert (refused.status, refused.error["code"], refused.header("retry-after-ms")) == (503, "overloaded", "1000")
        monkeypatch.setattr(trio, "sleep_until", real)
        await trio.sleep(5)
        assert not admission.is_late
        assert [entry["late"] for entry in logs.named("event_loop_late")] == [True, False]  # type: ignore[unreachable] # is_late changed
        assert (await first.wait()).body.endswith(DONE)


@pytest.mark.slow
async def test_admitted_calls_are_served_in_time(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Load is three times the capacity. Every admitted call takes less than twice its time without load, the others are
    refused at once, and the number served is close to the capacity."""
    chance = random.Random(20_261_127)
    took: list[float] = []
    refused: list[float] = []

    async def make_call(served: Served) -> None:
        begun = trio.current_time()
        call = await ask(served).wait()
        (took if call.status == 200 else refused).append(trio.current_time() - begun)

    async with (
        open_app(make_config(limits={"max_exchanges": 20}), Provider(*[(Pause(1), *says("x"))] * 3000)) as served,
        trio.open_nursery() as clients,
    ):
        for _ in range(1200):  # over twenty seconds, with a capacity of four hundred calls
            clients.start_soon(make_call, served)
            await trio.sleep(chance.expovariate(60))
    assert len(took) + len(refused) == 1200
    assert max(refused) == 0
    assert sorted(took)[int(len(took) * 0.99)] < 2
    assert len(took) > 380
