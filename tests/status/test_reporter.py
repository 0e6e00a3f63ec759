"""`StatusReporter`: the status of one worker and of all workers, in a whole gateway."""

from __future__ import annotations

import datetime
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import Provider, Say, Stall, answers, content
from trigate.exchange.exchange import Exchange
from trigate.exchange.outcome import Phase
from trigate.exchange.request import ExchangeRequest
from trigate.exchange.upstream_call import UpstreamCall
from trigate.gateway import gateway as gateway_module
from trigate.gateway.gateway import Gateway
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.request import decode_call
from trigate.routing.routes import Target
from trigate.status import reporter, snapshot
from trigate.status.reporter import StatusReporter
from trigate.status.schema import OldestStream
from trigate.status.startup import startup_lines
from trigate.store.memory import MemoryStore
from trigate.store.records import Delivery, Run, Turn

CHAT = {"model": "up/m", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
GATEWAY_KEY = "key-of-the-gateway"
PROVIDER_KEY = "key-of-the-provider"
HEADER = "value-of-a-header"
WITH_SECRETS = make_config(
    {"up": {"api_key": PROVIDER_KEY, "headers": {"x-team": HEADER}}},
    keys={"alice": GATEWAY_KEY},
)


async def status_of(served: Served) -> Any:  # Any: JSON
    """The body of ``GET /status``."""
    return json.loads(msgspec.json.encode(await served.gateway.status.status()))


# -- one worker -------------------------------------------------------------------------------------------------------


async def test_status_of_a_gateway_at_work(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The body has exactly these fields, in this order, and no message text."""
    config = make_config({"up": {}, "bad": {}, "off": {"api_key": {"env": "NOT_SET"}}})
    providers = {
        "up": Provider((Say(content("the answer")), Stall())),
        "bad": Provider(answers(b"{}", status=500)),
        "off": Provider(),
    }
    async with open_app(config, providers) as served:
        await served.client.chat(model="bad/m").wait()
        await served.client.chat(messages=[{"role": "user", "content": "the question"}]).wait_for(b"answer")
        await trio.sleep(7)
        status = await status_of(served)
        assert list(status) == [
            "status",
            "version",
            "uptime_s",
            "uptime",
            "config",
            "reload_error",
            "workers",
            "channels",
            "sessions",
            "outbox",
            "store",
            "upstreams",
            "ledger",
            "admission",
            "targets",
            "streams",
            "totals",
            "prices",
            "tracing",
        ]
        up, bad, off = status["upstreams"]
        assert set(up) == set(bad) == set(off)
        assert (up["name"], up["kind"], up["in_flight"], up["models"]) == ("up", "openai", 1, 1)
        assert (up["last_error"], up["last_error_at"]) == (None, None)
        assert datetime.datetime.fromisoformat(bad["last_error_at"]).tzinfo is datetime.UTC
        assert off["state"] == "disabled"
        assert "NOT_SET" in off["reason"]
        streams = status["streams"]
        assert (streams["live"], streams["by_phase"], streams["by_upstream"]) == (1, {"streaming": 1}, {"up": 1})
        [stream] = streams["oldest"]
        assert (stream["model"], stream["upstream"], stream["phase"]) == ("up/m", "up/m", "streaming")
        assert stream["age_s"] == pytest.approx(7, abs=0.5)
        assert (status["totals"]["exchanges"], status["totals"]["failed"]) == (1, 1)
        assert "the question" not in json.dumps(status)
        assert "the answer" not in json.dumps(status)


async def test_the_status_while_draining(open_app: OpenApp) -> None:
    """It is ``draining`` once the drain has begun, and ``ok`` before."""
    async with open_app() as served:
        assert (await status_of(served))["status"] == "ok"
        served.gateway.drain.begin()
        assert (await status_of(served))["status"] == "draining"


@pytest.mark.parametrize("status", [401, 400, 500, 503])
async def test_no_secret_is_shown(open_app: OpenApp, status: int) -> None:
    """Keys and headers are not shown, even if the provider quotes them in an error. Names of keys are shown."""
    quoted = json.dumps({"error": {"message": f"refused: {PROVIDER_KEY} {HEADER}"}}).encode()
    async with open_app(WITH_SECRETS, Provider(answers(quoted, status=status))) as served:
        headers = {"authorization": f"Bearer {GATEWAY_KEY}"}
        body = {"model": "up/m", "messages": [{"role": "user", "content": "Hi"}]}
        call = await served.client.ask("POST", "/v1/chat/completions", body, headers=headers)
        assert call.status >= 400
        assert served.providers["up"].calls[0].headers["authorization"] == f"Bearer {PROVIDER_KEY}"
        lines = startup_lines(served.gateway.generations.current, store_path=served.gateway.store.statistics().path)
        shown = json.dumps(await status_of(served)) + "\n".join(lines)
        for secret in (GATEWAY_KEY, PROVIDER_KEY, HEADER):
            assert secret not in shown
        assert "alice" in shown


# -- all workers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store's file, for several gateways that are then workers of one; with frequent heartbeats."""
    monkeypatch.setattr("trigate.workers.membership.HEARTBEAT_S", 0.02)
    with tempfile.TemporaryDirectory(prefix="tri") as directory:  # pytest's own paths are too long for a socket's name
        yield Path(directory) / "trigate.db"


_CHANGING = ("uptime_s", "uptime", "report_age_s", "age_s")


def _lasting(value: Any) -> Any:
    """A part of ``/status`` without the numbers that change all the time."""
    if isinstance(value, dict):
        return {key: _lasting(each) for key, each in value.items() if key not in _CHANGING}
    return [_lasting(each) for each in value] if isinstance(value, list) else value


async def _agreed(*all_served: Served, holds: Callable[[Any], bool]) -> Any:
    """Waits until all workers return the same status and the condition holds; returns the status."""
    with trio.fail_after(10):
        while True:
            answers = [await status_of(served) for served in all_served]
            if all(_lasting(each) == _lasting(answers[0]) for each in answers) and holds(answers[0]):
                return answers[0]
            await trio.sleep(0.005)


async def test_all_workers_return_the_same(open_app: OpenApp, database: Path) -> None:
    """Each worker returns what is in flight and what has ended on both, the workers, and the counts of the store."""
    config = make_config({"up": {"max_connections": 10}}, hooks={"ci": {}, "off": {"enabled": False}})
    scripts = (Say(content("a")), Stall())
    async with (
        open_app(config, Provider(scripts), store=database) as one,
        open_app(config, Provider(answers(b"{}", status=500)), store=database) as two,
    ):
        first = one.client.start("POST", "/v1/chat/completions", CHAT, headers={"x-request-id": "id-1"})
        await first.wait_for(b"a")
        await two.client.chat().wait()
        both = (one.gateway.workers.id, two.gateway.workers.id)
        status = await _agreed(one, two, holds=lambda body: len(body["workers"]) == 2 and body["totals"]["failed"] == 1)
        assert sorted(row["id"] for row in status["workers"]) == sorted(both)
        assert {row["id"]: row["live"] for row in status["workers"]} == {both[0]: 1, both[1]: 0}
        assert all(row["pid"] == os.getpid() and row["status"] == "ok" for row in status["workers"])
        streams = status["streams"]
        assert (streams["live"], streams["by_phase"], streams["by_upstream"]) == (1, {"streaming": 1}, {"up": 1})
        assert [(row["id"], row["worker"]) for row in streams["oldest"]] == [("id-1", both[0])]
        counts = {name: count for name, count in status["admission"].items() if name != "lag_s"}
        assert json.dumps(counts["in_flight"]) == "1"  # and not 1.0
        assert all(isinstance(count, int) for count in counts.values())
        [upstream] = status["upstreams"]
        assert (upstream["in_flight"], upstream["max_connections"], upstream["state"]) == (1, 20, "unknown")
        assert "500" in upstream["last_error"]
        assert upstream["last_error_at"] is not None
        assert [(row["name"], row["type"], row["status"]) for row in status["channels"]] == [
            ("ci", "webhook", "connected"),
            ("off", "webhook", "disabled"),
        ]
        assert status["store"] == {"kind": "sqlite", "path": str(database), "state": "open", "error": None}

        two.gateway.drain.begin()
        status = await _agreed(
            one, two, holds=lambda body: {row["status"] for row in body["workers"]} == {"ok", "draining"}
        )
        assert status["status"] == "ok"


async def test_what_is_counted_in_the_store(open_app: OpenApp, database: Path) -> None:
    """Sessions, counters of channels and waiting deliveries come from the store, the same for every worker."""
    config = make_config(hooks={"ci": {}})
    now = time.time()
    async with open_app(config, store=database) as one, open_app(config, store=database) as two:
        store = one.gateway.store
        await store.sessions.append(Turn(owner="a", key="old", messages=(), at=now - 901))
        await store.sessions.append(Turn(owner="a", key="new", messages=(), at=now))
        await store.sessions.take_ticket("b", "first", worker=one.gateway.workers.id)
        await store.runs.add(_run("run_1", "ci", now))
        await store.deliveries.add(
            Delivery(id="msg_1", run_id="run_1", channel="ci", target="", body=b"{}", created_at=now, due_at=now)
        )
        status = await _agreed(one, two, holds=lambda body: body["outbox"]["depth"] == 1 and len(body["workers"]) == 2)
        assert status["sessions"] == {"total": 3, "active": 2, "busy": 1}
        [channel] = status["channels"]
        assert (channel["received"], channel["replied"], channel["queued"]) == (1, 0, 2)
        for name in ("since", "last_event_at"):
            assert datetime.datetime.fromisoformat(channel[name]).tzinfo is datetime.UTC


@pytest.mark.slow
async def test_hooks_under_any_name_are_bounded(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand called names make ``/status`` neither long nor slow: the store is asked for the listed ones only."""
    async with open_app() as served:
        store = served.gateway.store
        for number in range(10_000):
            store.channels.count(f"name-{number}", at=float(number), received=1)
        asked = []
        unfinished = store.runs.unfinished

        async def count(channel: str) -> int:
            asked.append(channel)
            return await unfinished(channel)

        monkeypatch.setattr(store.runs, "unfinished", count)
        channels = (await status_of(served))["channels"]
        assert [row["name"] for row in channels] == [f"name-{number}" for number in range(9_999, 9_899, -1)]
        assert len(asked) == 100


async def test_hooks_that_no_configuration_names(open_app: OpenApp) -> None:
    """Without ``[hooks]``, the hooks that were called are listed, the last called first; with it, only its own."""
    for config, shown in ((make_config(), ["new", "old"]), (make_config(hooks={"ci": {}}), ["ci"])):
        async with open_app(config) as served:
            channels = served.gateway.store.channels
            await channels.count("old", at=1.0, received=1)
            await channels.count("new", at=2.0, received=1)
            await channels.count("a platform's", at=3.0, received=1)
            await channels.advance("a platform's", "17")
            assert [row["name"] for row in (await status_of(served))["channels"]] == shown


async def test_a_store_that_is_broken(open_app: OpenApp) -> None:
    """The body still has this worker's part, and the reason why the rest is missing."""
    async with open_app(make_config(hooks={"ci": {}})) as served:
        store = served.gateway.store
        assert isinstance(store, MemoryStore)
        store.failure = "the disk is full"
        status = await status_of(served)
        assert status["store"]["state"] == "unavailable"
        assert "the disk is full" in status["store"]["error"]
        assert (status["sessions"], status["outbox"]) == (None, None)
        assert [row["id"] for row in status["workers"]] == [served.gateway.workers.id]
        assert [upstream["name"] for upstream in status["upstreams"]] == ["up"]
        [channel] = status["channels"]
        assert (channel["status"], channel["received"], channel["queued"]) == ("connected", None, None)


async def test_before_the_store_is_open(open_app: OpenApp, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are null while a store with data is being opened, and zero if there is no store."""

    async def stay_closed(gateway: Gateway) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(gateway_module, "_use_store", stay_closed)
    monkeypatch.setattr(reporter, "STORE_TIMEOUT_S", 0.02)
    async with open_app(make_config(hooks={"ci": {}}), store=database) as served:
        status = await status_of(served)
        assert (status["store"]["state"], status["store"]["error"]) == ("closed", None)
        assert (status["sessions"], status["outbox"], status["channels"][0]["received"]) == (None, None, None)
    async with open_app(store=database) as served:
        assert (await status_of(served))["sessions"] == {"total": 0, "active": 0, "busy": 0}


async def test_a_worker_that_is_about_to_join(
    open_app: OpenApp, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that has just started, such as one that replaces another, returns the status of all at its first
    request: it waits until it knows them."""
    use_store = gateway_module._use_store

    async def join_late(gateway: Gateway) -> None:
        await trio.sleep(0.05)
        await use_store(gateway)

    config = make_config(hooks={"ci": {}})
    async with open_app(config, store=database) as one:
        await one.gateway.workers.wait_joined()
        monkeypatch.setattr(gateway_module, "_use_store", join_late)
        async with open_app(config, store=database) as two:
            both = {one.gateway.workers.id, two.gateway.workers.id}
            for served in (two, one):
                assert {row["id"] for row in (await status_of(served))["workers"]} == both


async def test_a_store_that_does_not_answer(
    open_app: OpenApp, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reporter stops waiting after a second."""

    async def count(active_since: float) -> None:
        await trio.sleep(60)

    async with open_app() as served:
        monkeypatch.setattr(served.gateway.store.sessions, "count", count)
        status = await status_of(served)
        assert status["store"]["error"] == "it did not answer within 1 s"


async def test_a_part_of_another_version(open_app: OpenApp, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that cannot be read is left out, so ``/status`` works while workers of a new version replace the old."""
    config = make_config(hooks={"ci": {}})
    async with open_app(config, store=database) as one:
        monkeypatch.setattr(StatusReporter, "snapshot", lambda reporter: b'{"shape": "another"}')
        async with open_app(config, store=database) as two:
            with trio.fail_after(10):
                while len(await one.gateway.workers.all()) < 2:  # noqa: ASYNC110 - nothing notifies of it
                    await trio.sleep(0.005)
            assert [row["id"] for row in (await status_of(one))["workers"]] == [one.gateway.workers.id]
            assert {row["id"] for row in (await status_of(two))["workers"]} >= {two.gateway.workers.id}


async def test_ten_thousand_streams(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted, and the oldest hundred get a row. Nothing is made for the others, here or in a heartbeat."""
    made = []
    make_row = snapshot._oldest_stream

    def count(*arguments: Any) -> OldestStream:
        made.append(arguments)
        return make_row(*arguments)

    monkeypatch.setattr(snapshot, "_oldest_stream", count)
    async with open_app() as served:
        gateway = served.gateway
        call = decode_call(ENDPOINTS["/v1/chat/completions"], json.dumps({**CHAT, "model": "up/m"}).encode())
        for number in range(10_000):
            generation = gateway.generations.current
            request = ExchangeRequest(id=f"req_{number}", call=call, generation=generation)
            exchange = Exchange(request=request, services=gateway.exchange_services)
            exchange.idle_phase = Phase.STREAMING if number % 4 else Phase.QUEUED
            if number % 4:
                exchange.source = UpstreamCall(
                    request=request,
                    services=gateway.exchange_services.upstream,
                    route=generation.route("up/m"),
                    started_at=exchange.started_at,
                    deadline_at=math.inf,
                    target=Target("up", "m"),
                )
            gateway.live._live[exchange] = None
        answer = await served.client.ask("GET", "/status")
        heartbeat = gateway.status.snapshot()
        gateway.live._live.clear()
        streams = answer.json["streams"]
        assert streams["live"] == answer.json["workers"][0]["live"] == 10_000
        assert streams["by_phase"] == {"queued": 2_500, "streaming": 7_500}
        assert streams["by_upstream"] == {"up": 7_500}
        assert [row["id"] for row in streams["oldest"]] == [f"req_{number}" for number in range(100)]
        assert len(made) == 200
        assert len(answer.body) < 30_000
        assert len(heartbeat) < 30_000


def _run(run_id: str, channel: str, at: float) -> Run:
    return Run(
        id=run_id,
        channel=channel,
        owner="",
        session=None,
        action="chat",
        request=b"{}",
        state="queued",
        acknowledged=True,
        worker="w_1",
        created_at=at,
    )
