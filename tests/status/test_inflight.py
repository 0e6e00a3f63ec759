"""``/status/streams``: what is in flight, seen and ended, in this worker and the others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.conftest import Served, make_config
from tests.support.provider import Pause, Provider, Say, Stall, answers, content, says
from trigate.status import inflight

OpenApp = Callable[..., AbstractAsyncContextManager[Served]]
TALKING = (Say(content("a")), Stall())


async def listed(served: Served, path: str = "", **headers: str) -> Any:  # Any: JSON
    """What ``GET /status/streams`` says."""
    return (await served.client.ask("GET", f"/status/streams{path}", headers=headers)).json


async def test_the_task_tree(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Phase, attempts with their reason, what is left of the deadline, what was sent."""
    config = make_config(
        {"a": {}, "b": {}}, models={"both": {"targets": ["a/m", "b/m"]}}, limits={"total_timeout_s": 100}
    )
    down = answers(b'{"error":{"message":"secret words"}}', status=500)
    async with open_app(config, {"a": Provider(down), "b": Provider(TALKING)}) as served:
        call = served.client.chat(model="both")
        await call.wait_for(b'"a"')
        await trio.sleep(10)
        body = await listed(served)
        [row] = body["data"]
        assert (body["count"], body["missing_workers"]) == (1, [])
        assert (row["phase"], row["model"], row["target"], row["events"]) == ("streaming", "both", "b/m", 1)
        assert row["bytes"] > 0
        assert row["deadline_left_s"] == pytest.approx(90, abs=0.1)
        assert row["max_attempts"] == 3
        first, second = row["attempts"]
        assert (first["target"], first["why"], first["outcome"], first["status"]) == (
            "a/m", "first", "upstream_unavailable", 502
        )  # fmt: skip
        assert (second["target"], second["why"], second["phase"]) == ("b/m", "failover", "streaming")
        assert "secret words" not in str(body)
        assert await listed(served, f"/{row['id']}") | {"age_s": 0, "deadline_left_s": 0} == row | {
            "age_s": 0, "deadline_left_s": 0
        }  # fmt: skip
        call.disconnect()
        await call.wait()
        assert (await listed(served))["data"] == []


@pytest.mark.parametrize("script", [(Stall(),), TALKING], ids=["before content", "after content"])
async def test_ending_one(open_app: OpenApp, autojump_clock: MockClock, script: Any) -> None:
    """Its client is told, the upstream closed at once; the others go on."""
    async with open_app(make_config(), Provider(script, TALKING)) as served:
        call = served.client.chat()
        await wait_all_tasks_blocked()
        other = served.client.chat()
        await other.wait_for(b'"a"')
        name = call.header("x-request-id") or (await listed(served))["data"][0]["id"]
        ended = await served.client.ask("DELETE", f"/status/streams/{name}")
        assert (ended.status, ended.json) == (200, {"id": name, "object": "stream.cancelled", "cancelled": 1})
        await call.wait()
        assert call.status == (200 if script is TALKING else 409)
        assert call.error["code"] == "stream_cancelled"
        assert b"[DONE]" not in call.body
        assert served.settled[0].outcome == "stream_cancelled"
        assert served.providers["up"].calls[0].ended == "closed"
        assert (await listed(served))["count"] == 1
        assert (await served.client.ask("DELETE", f"/status/streams/{name}")).status == 404
        other.disconnect()
        await other.wait()


async def test_who_waits_has_a_position(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """For a place here, or at the upstream; each of them can be ended."""
    here = make_config(limits={"max_exchanges": 1, "max_queued": 4})
    there = make_config({"up": {"max_connections": 1}})
    for config in (here, there):
        async with open_app(config, Provider((Pause(60), *says("x")))) as served:
            calls = []
            for _ in range(3):
                calls.append(served.client.chat())
                await wait_all_tasks_blocked()
            rows = (await listed(served))["data"]
            assert [(row["phase"], row["queue_position"]) for row in rows] == [
                ("connecting", None), ("queued", 1), ("queued", 2)
            ]  # fmt: skip
            await served.client.ask("DELETE", f"/status/streams/{rows[1]['id']}")
            assert (await calls[1].wait()).status == 409
            rows = (await listed(served))["data"]
            assert [row["queue_position"] for row in rows] == [None, 1]
            for call in (calls[0], calls[2]):
                call.disconnect()
                await call.wait()
            served.assert_clean()


async def test_a_key_sees_its_own(open_app: OpenApp) -> None:
    """Another key's streams are not there: neither seen nor ended."""
    config = make_config(keys={"ada": "key-of-ada", "bob": "key-of-bob"})
    async with open_app(config, Provider(TALKING)) as served:
        ada, bob = {"authorization": "Bearer key-of-ada"}, {"authorization": "Bearer key-of-bob"}
        body = {"model": "up/m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        call = served.client.start("POST", "/v1/chat/completions", body, headers={**ada, "x-request-id": "hers"})
        await call.wait_for(b'"a"')
        assert [row["id"] for row in (await listed(served, **ada))["data"]] == ["hers"]
        assert (await listed(served, **bob))["count"] == 0
        foreign = await served.client.ask("DELETE", "/status/streams/hers", headers=bob)
        absent = await served.client.ask("DELETE", "/status/streams/nobody", headers=bob)
        assert (foreign.status, foreign.body) == (absent.status, absent.body)
        assert foreign.status == 404
        assert (await served.client.ask("GET", "/status/streams")).status == 401
        assert served.settled == []
        assert (await served.client.ask("DELETE", "/status/streams/hers", headers=ada)).json["cancelled"] == 1
        await call.wait()


@pytest.mark.parametrize("limit", ["0", "1001", "x", "-1", "", "99999999999"])
async def test_a_bad_limit(open_app: OpenApp, limit: str) -> None:
    """It is a number, and not too large."""
    async with open_app() as served:
        call = await served.client.start("GET", f"/status/streams?limit={limit}").wait()
        assert (call.status, call.error["param"]) == (400, "limit")


async def test_two_workers(open_app: OpenApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shows and ends the streams of both; one that does not answer is named, and waited for only so long."""
    store = tmp_path / "s.db"
    monkeypatch.setattr(inflight, "ANSWER_TIMEOUT_S", 5.0)
    async with (
        open_app(make_config(), Provider(TALKING), store=store) as one,
        open_app(make_config(), Provider(TALKING), store=store) as two,
    ):
        await one.gateway.workers.join()
        await two.gateway.workers.join()
        while not (one.gateway.workers.count == two.gateway.workers.count == 2):  # noqa: ASYNC110 - rings say it
            await trio.sleep(0.005)
        calls = [one.client.chat(), two.client.chat()]
        for call in calls:
            await call.wait_for(b'"a"')
        for served in (one, two):
            body = await listed(served)
            assert (body["count"], body["missing_workers"]) == (2, [])
            assert {row["worker"] for row in body["data"]} == {one.gateway.workers.id, two.gateway.workers.id}
        name = calls[1].header("x-request-id")
        assert (await listed(one, f"/{name}"))["worker"] == two.gateway.workers.id
        assert (await one.client.ask("DELETE", f"/status/streams/{name}")).json["cancelled"] == 1
        assert (await calls[1].wait()).error["code"] == "stream_cancelled"
        monkeypatch.setattr(inflight, "ANSWER_TIMEOUT_S", 0.05)
        two.gateway.workers._callbacks[b"streams"] = []
        body = await listed(one)
        assert (body["count"], body["missing_workers"]) == (1, [two.gateway.workers.id])
        calls[0].disconnect()
        await calls[0].wait()


def test_an_answer_fits_into_a_ring() -> None:
    """As many rows as fit; how many there are is told beside them."""
    rows = [{"id": "x" * 1000}] * 100
    assert 40 < len(list(inflight._fitting(rows))) < 50
