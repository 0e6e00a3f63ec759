"""``GET /status/events``: samples while somebody watches, of what the key may see, until the key is gone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.asgi_client import ClientCall, chat
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import Pause, Provider, Say, Stall, content, role
from trigate.status import sampler

ADMIN, ADA, BOB = "the-key-of-the-admin", "the-key-of-ada", "the-key-of-bob"
KEYS = make_config(admin={"key": ADMIN}, keys={"ada": ADA, "bob": BOB})
FOREVER = Provider((Say(role()), Say(content("a")), Pause(1.0), *[Say(content("b")) for _ in range(9)], Stall()))


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _watch(served: Served, key: str = "") -> ClientCall:
    return served.client.start("GET", "/status/events", headers=_bearer(key) if key else {})


def _samples(call: ClientCall) -> list[Any]:
    return [msgspec.json.decode(each.removeprefix(b"data: ")) for each in call.body.split(b"\n\n")[:-1]]


async def test_two_samples_a_second(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Each has the status and the exchanges in flight; nothing is sampled once nobody watches."""
    async with open_app(providers=FOREVER) as served:
        call = _watch(served)
        await call.wait_committed()
        assert (call.status, call.header("content-type")) == (200, "text/event-stream; charset=utf-8")
        assert call.header("cache-control") == "no-store"
        served.client.chat(stream=True)
        await trio.sleep(4.1)
        found = _samples(call)
        assert len(found) in (8, 9)
        last = found[-1]
        assert last["status"]["status"] == "ok"
        assert last["status"]["streams"]["oldest"] == []
        [row] = last["streams"]["data"]
        assert (row["phase"], row["events"], row["key"]) == ("streaming", 11, "")
        assert row["tokens_per_s"] == pytest.approx(11 / 4, rel=0.2)
        assert row["cost_microusd"] is None
        call.disconnect()
        await call.wait()
        number = served.gateway.sampler.number
        await trio.sleep(5)
        assert served.gateway.sampler.number <= number + 1
        assert served.gateway.sampler.samples == {}
        served.client.cancel_all()


async def test_a_key_sees_its_own(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The admin's key sees all. A sample is made once for each owner, whoever watches."""
    async with open_app(KEYS, FOREVER) as served:
        for key in (ADA, ADA, BOB):
            served.client.start("POST", "/v1/chat/completions", chat(stream=True), headers=_bearer(key))
        await wait_all_tasks_blocked()
        calls = [_watch(served, key) for key in (ADMIN, ADA, BOB, ADA)]
        await trio.sleep(1.1)
        seen = [sorted(row["key"] for row in _samples(call)[-1]["streams"]["data"]) for call in calls]
        assert seen == [["ada", "ada", "bob"], ["ada", "ada"], ["bob"], ["ada", "ada"]]
        assert _samples(calls[1]) == _samples(calls[3])
        assert set(served.gateway.sampler.samples) == {None, "ada", "bob"}
        served.client.cancel_all()


async def test_it_is_bounded(open_app: OpenApp, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample has at most so many exchanges, and the count of all; only so many may watch."""
    monkeypatch.setattr(sampler, "MAX_ROWS", 2)
    monkeypatch.setattr(sampler, "MAX_VIEWERS", 1)
    async with open_app(providers=FOREVER) as served:
        for _ in range(3):
            served.client.chat(stream=True)
        await wait_all_tasks_blocked()
        call = _watch(served)
        await call.wait_for(b"data: ")
        last = _samples(call)[-1]["streams"]
        assert (len(last["data"]), last["count"]) == (2, 3)
        refused = await _watch(served).wait()
        assert (refused.status, refused.error["code"]) == (503, "overloaded")
        call.disconnect()
        await call.wait()
        again = _watch(served)
        await again.wait_for(b"data: ")
        served.client.cancel_all()


async def test_only_with_a_key(open_app: OpenApp) -> None:
    """Without one it is a 401, and only GET is served."""
    async with open_app(KEYS) as served:
        assert (await _watch(served).wait()).status == 401
        call = await served.client.ask("POST", "/status/events", headers=_bearer(ADA))
        assert (call.status, call.header("allow")) == (405, "GET, OPTIONS")


async def test_a_revoked_key_sees_no_more(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The stream ends with the key."""
    async with open_app(KEYS) as served:
        made = await served.client.ask("POST", "/v1/keys", {"name": "carl"}, headers=_bearer(ADMIN))
        call = _watch(served, made.json["secret"])
        await call.wait_for(b"data: ")
        await served.client.ask("DELETE", "/v1/keys/carl", headers=_bearer(ADMIN))
        with trio.fail_after(2):
            await call.wait()
        assert call.ended


async def test_a_drain_ends_it(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A viewer does not hold up a shutdown."""
    async with open_app() as served:
        call = _watch(served)
        await call.wait_for(b"data: ")
        served.gateway.drain.begin()
        with trio.fail_after(1):
            await call.wait()
        assert call.ended


async def test_a_viewer_that_does_not_read(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It holds up nobody else."""
    async with open_app() as served:
        stalled, other = _watch(served), _watch(served)
        await stalled.wait_for(b"data: ")
        stalled.stall()
        before = len(_samples(other))
        await trio.sleep(10)
        assert len(_samples(other)) >= before + 18
        stalled.release()
        served.client.cancel_all()
