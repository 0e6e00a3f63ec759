"""``/status/streams``: the exchanges in flight, listed and cancelled, on this worker and the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import Pause, Provider, Say, Stall, answers, content, says
from trigate.status import inflight
from trigate.status.schema import Stream

STREAMING = (Say(content("a")), Stall())


class Mute:
    """Workers that can be asked and do not answer."""

    id = "mute"

    def notify(self, topic: str, body: bytes = b"") -> None:
        """Sends nothing."""


async def listed(served: Served, path: str = "", **headers: str) -> Any:  # Any: JSON
    """The body of ``GET /status/streams``."""
    return (await served.client.ask("GET", f"/status/streams{path}", headers=headers)).json


async def test_a_row(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A row has the phase, the attempts with their reasons, the time until the deadline, and what was sent."""
    config = make_config(
        {"a": {}, "b": {}}, models={"both": {"targets": ["a/m", "b/m"]}}, limits={"total_timeout_s": 100}
    )
    down = answers(b'{"error":{"message":"secret words"}}', status=500)
    async with open_app(config, {"a": Provider(down), "b": Provider(STREAMING)}) as served:
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


@pytest.mark.parametrize("script", [(Stall(),), STREAMING], ids=["before content", "after content"])
async def test_cancelling_one(open_app: OpenApp, autojump_clock: MockClock, script: Any) -> None:
    """The client gets an error and the upstream is closed at once; other exchanges continue."""
    async with open_app(make_config(), Provider(script, STREAMING)) as served:
        call = served.client.chat()
        await wait_all_tasks_blocked()
        other = served.client.chat()
        await other.wait_for(b'"a"')
        name = call.header("x-request-id") or (await listed(served))["data"][0]["id"]
        cancelled = await served.client.ask("DELETE", f"/status/streams/{name}")
        assert (cancelled.status, cancelled.json) == (200, {"id": name, "object": "stream.cancelled", "cancelled": 1})
        await call.wait()
        assert call.status == (200 if script is STREAMING else 409)
        assert call.error["code"] == "stream_cancelled"
        assert b"[DONE]" not in call.body
        assert served.settled[0].outcome == "stream_cancelled"
        assert served.providers["up"].calls[0].ended == "closed"
        assert (await listed(served))["count"] == 1
        assert (await served.client.ask("DELETE", f"/status/streams/{name}")).status == 404
        other.disconnect()
        await other.wait()


async def test_positions_in_a_queue(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A call that waits for a slot, here or at the upstream, has a position, and can be cancelled."""
    at_admission = make_config(limits={"max_exchanges": 1, "max_queued": 4})
    at_upstream = make_config({"up": {"max_connections": 1}})
    for config in (at_admission, at_upstream):
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
    """A key can neither list nor cancel the exchanges of another key."""
    config = make_config(keys={"ada": "key-of-ada", "bob": "key-of-bob"})
    async with open_app(config, Provider(STREAMING)) as served:
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
    """A limit that is no number from 1 to 1000 is a 400."""
    async with open_app() as served:
        call = await served.client.start("GET", f"/status/streams?limit={limit}").wait()
        assert (call.status, call.error["param"]) == (400, "limit")


async def test_two_workers(open_app: OpenApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker lists and cancels the exchanges of both. One that does not answer in time is named."""
    store = tmp_path / "s.db"
    monkeypatch.setattr(inflight, "ANSWER_TIMEOUT_S", 5.0)
    async with (
        open_app(make_config(), Provider(STREAMING), store=store) as one,
        open_app(make_config(), Provider(STREAMING), store=store) as two,
    ):
        await one.gateway.workers.join()
        await two.gateway.workers.join()
        while not (one.gateway.workers.count == two.gateway.workers.count == 2):  # noqa: ASYNC110 - nothing notifies of it
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
        two.gateway.inflight._workers = Mute()  # type: ignore[assignment]
        body = await listed(one)
        assert (body["count"], body["missing_workers"]) == (1, [two.gateway.workers.id])
        calls[0].disconnect()
        await calls[0].wait()


@pytest.mark.parametrize("count", [0, 1, 100])
def test_an_answer_fits_into_a_datagram(count: int) -> None:
    """An answer has as many rows as fit, the oldest first."""
    rows = [Stream(id=f"{number:04}" + "x" * 1000, model="m", phase="queued", age_s=1.0) for number in range(count)]
    size = len(msgspec.json.encode(rows[0])) if rows else 0
    fitting = list(inflight._fitting(rows))
    assert fitting == rows[: len(fitting)]
    assert len(fitting) == min(count, 48 * 1024 // size if size else 0)


async def test_a_late_answer_is_dropped(open_app: OpenApp) -> None:
    """An answer to a question that is no longer open changes nothing."""
    async with open_app() as served:
        late = inflight._Answer(question="gone", worker="w_1", count=1, cancelled=0, rows=())
        served.gateway.inflight._on_answer(msgspec.json.encode(late))
        found = await served.gateway.inflight.list(owner=None)
        assert (found.count, found.rows, found.missing_workers) == (0, (), ())
