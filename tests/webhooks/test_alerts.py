"""Alerts: what is alerted, once per episode, and how it is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import Provider, answers, completion
from tests.webhooks.test_callbacks import SECRET, receiving
from trigate.config.sections import Config
from trigate.gateway.gateway import open_gateway
from trigate.signatures import Verifier
from trigate.webhooks.alerts import Alert

CHAT = {"model": "up/m", "messages": [{"role": "user", "content": "a"}]}
NOWHERE = "http://127.0.0.1:9/alerts"


def config(url: str = NOWHERE, **alerts: Any) -> Config:
    return make_config(
        alerts={"url": url, "secret": SECRET, **alerts},
        breaker={"failures": 3, "failure_rate": 0, "cooldown_s": 5},
        retries={"max_attempts": 1},
        store={"path": ":memory:"},
    )


async def said(served: Served) -> list[tuple[str, Mapping[str, Any]]]:
    """The alerts that are in the outbox: type and data of each."""
    found = [msgspec.json.decode(each.body) for each in await served.gateway.store.deliveries.of_run("")]
    return [(each["type"], each["data"]) for each in found]


async def call(served: Served, times: int = 1) -> None:
    for _ in range(times):
        await served.client.ask("POST", "/v1/chat/completions", CHAT)


async def test_a_breaker(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Its episode lasts until a probe has succeeded, however often the breaker opens again meanwhile."""
    fails, works = answers(b"{}", status=500), answers(completion("x"))
    async with open_app(config(events=["breaker"]), Provider(*[fails] * 4, works)) as served:
        await call(served, 3)
        await trio.sleep(6)
        await call(served)  # a probe, which fails
        await trio.sleep(2)
        [(kind, data)] = await said(served)
        assert kind == "alert.breaker"
        assert (data["state"], data["subject"]) == ("firing", "up/m")
        await trio.sleep(20)
        await call(served)
        await trio.sleep(2)
        assert [data["state"] for _, data in await said(served)] == ["firing", "resolved"]


async def test_the_share_of_failures(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It is counted in the window, and calls that failed by their own fault do not count."""
    fails, works, refuses = answers(b"{}", status=500), answers(completion("x")), answers(b"{}", status=400)
    settings = config(events=["error_rate"], error_rate=0.5, window_s=60, min_calls=4)
    async with open_app(settings, Provider(*[refuses] * 8, *[works] * 2, *[fails] * 2, *[works] * 20)) as served:
        await trio.sleep(2)
        await call(served, 8)
        await trio.sleep(2)
        assert await said(served) == [], "a provider's 400 is its client's fault"
        await trio.sleep(100)
        await call(served, 4)
        await trio.sleep(2)
        [(kind, data)] = await said(served)
        assert (kind, data["state"], data["calls"], data["faults"]) == ("alert.error_rate", "firing", 4, 2)
        await call(served, 20)
        await trio.sleep(2)
        assert [data["state"] for _, data in await said(served)] == ["firing", "resolved"]


async def test_a_budget_is_said_once(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Whoever notices it, and however often."""
    alert = Alert(kind="budget", subject="key:ada", message="It is used up.", episode="2026-11")
    async with open_app(config()) as served:
        for _ in range(3):
            served.gateway.alerts.note(alert)
            await trio.sleep(2)
        served.gateway.alerts.note(Alert(kind="budget", subject="key:bob", message="It, too.", episode="2026-11"))
        await trio.sleep(2)
        assert [data["subject"] for _, data in await said(served)] == ["key:ada", "key:bob"]


@pytest.mark.parametrize("alerts", [{}, {"url": NOWHERE, "secret": SECRET, "events": ["breaker"]}])
async def test_what_is_not_configured_is_not_said(
    open_app: OpenApp, autojump_clock: MockClock, alerts: dict[str, Any]
) -> None:
    async with open_app(make_config(alerts=alerts, store={"path": ":memory:"})) as served:
        served.gateway.alerts.note(Alert(kind="budget", subject="key:ada", message="…", episode="1"))
        await trio.sleep(5)
        assert await said(served) == []


@pytest.mark.slow
async def test_it_is_signed_and_sent() -> None:
    """To any address, by the Standard Webhooks scheme."""
    async with receiving() as receiver, open_gateway(config(receiver.url.partition("?")[0]), env={}) as gateway:
        gateway.alerts.note(Alert(kind="soft_budget", subject="key:ada", message="80 %", episode="2026-11"))
        with trio.fail_after(10):
            while not receiver.bodies:  # noqa: ASYNC110 - there is no event for it
                await trio.sleep(0.01)
    [body], [head] = receiver.bodies, receiver.heads
    message = msgspec.json.decode(body)
    assert message["type"] == "alert.soft_budget"
    assert message["data"] == {"state": "firing", "subject": "key:ada", "message": "80 %"}
    fields = {name.encode(): value.encode() for name, value in head.items()}
    Verifier("standard-webhooks", (SECRET,), tolerance_s=60).verify(fields, body, now=int(head["webhook-timestamp"]))
