"""What the gateway says of itself: at its start, and in ``GET /status``."""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.conftest import Served, make_config
from tests.support.provider import Provider, Refuse, Say, Stall, answers, content
from trigate import __version__
from trigate.channels.service import ChannelStatistics
from trigate.config.sections import Config
from trigate.exchange.exchange import Exchange
from trigate.gateway.gateway import Gateway
from trigate.ledger.ledger import LedgerStatistics
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.request import decode_call
from trigate.routing.routes import Target
from trigate.status import snapshot as report
from trigate.store.memory import MemoryStore
from trigate.store.records import ChannelRecord, Delivery, Run, Turn
from trigate.upstream.upstream import UpstreamStatistics

OpenApp = Callable[..., AbstractAsyncContextManager[Served]]

CHAT = {"model": "up/m", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
GATEWAY_KEY = "key-of-the-gateway"
PROVIDER_KEY = "key-of-the-provider"
HEADER = "value-of-a-header"
WITH_SECRETS = make_config(
    {"up": {"api_key": PROVIDER_KEY, "headers": {"x-team": HEADER}}},
    keys={"alice": GATEWAY_KEY},
)


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0, "0:00:00"),
        (59.99, "0:00:59"),
        (60, "0:01:00"),
        (3_599, "0:59:59"),
        (86_400, "24:00:00"),
        (1e7, "2777:46:40"),
    ],
)
def test_clock(seconds: float, written: str) -> None:
    """Whole seconds, rounded down; hours go on beyond a day."""
    assert report.clock(seconds) == written


# -- status -----------------------------------------------------------------------------------------------------------


async def test_status_of_a_gateway_at_work(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Exactly these fields, as JSON has them, with a live stream, an upstream that failed, and one without a key."""
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
        status = await report.status(served.gateway)
        assert json.loads(json.dumps(status, allow_nan=False)) == status
        assert set(status) == {
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
        }
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


async def test_status_while_draining(open_app: OpenApp) -> None:
    """It says so; before that it is ok."""
    async with open_app() as served:
        assert (await report.status(served.gateway))["status"] == "ok"
        served.gateway.drain.begin()
        assert (await report.status(served.gateway))["status"] == "draining"


@pytest.mark.parametrize("status", [401, 400, 500, 503])
async def test_no_secret_is_told(open_app: OpenApp, status: int) -> None:
    """Neither key nor header, even when the provider quotes them as it refuses them. Names of keys are told."""
    quoted = json.dumps({"error": {"message": f"refused: {PROVIDER_KEY} {HEADER}"}}).encode()
    async with open_app(WITH_SECRETS, Provider(answers(quoted, status=status))) as served:
        mine = {"authorization": f"Bearer {GATEWAY_KEY}"}
        body = {"model": "up/m", "messages": [{"role": "user", "content": "Hi"}]}
        call = await served.client.ask("POST", "/v1/chat/completions", body, headers=mine)
        assert call.status >= 400
        assert served.providers["up"].calls[0].headers["authorization"] == f"Bearer {PROVIDER_KEY}"
        said = json.dumps(await report.status(served.gateway)) + "\n".join(report.startup_lines(served.gateway))
        for secret in (GATEWAY_KEY, PROVIDER_KEY, HEADER):
            assert secret not in said
        assert "alice" in said


# -- of all workers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store's file, for several gateways that are then workers of one, and beats that a test need not wait for."""
    monkeypatch.setattr("trigate.workers.membership.HEARTBEAT_S", 0.02)
    with tempfile.TemporaryDirectory(prefix="tri") as room:  # pytest's own paths leave no room for a socket's name
        yield Path(room) / "trigate.db"


_OF_THE_MOMENT = ("uptime_s", "uptime", "said_s_ago", "age_s")


def _lasting(value: Any) -> Any:
    """A part of ``/status`` without what is another number each time."""
    if isinstance(value, dict):
        return {key: _lasting(each) for key, each in value.items() if key not in _OF_THE_MOMENT}
    return [_lasting(each) for each in value] if isinstance(value, list) else value


async def _agree(*all_served: Served, on: Callable[[Any], bool]) -> Any:
    """Waits until all workers say the same, and something of it; returns it, as the first one says it."""
    with trio.fail_after(10):
        while True:
            answers = [json.loads(json.dumps(await report.status(served.gateway))) for served in all_served]
            if all(_lasting(each) == _lasting(answers[0]) for each in answers) and on(answers[0]):
                return answers[0]
            await trio.sleep(0.005)


async def test_workers_say_the_same(open_app: OpenApp, database: Path) -> None:
    """What is in flight, and what has ended, anywhere; who serves; and what is kept."""
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
        status = await _agree(one, two, on=lambda said: len(said["workers"]) == 2 and said["totals"]["failed"] == 1)
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
        status = await _agree(
            one, two, on=lambda said: {row["status"] for row in said["workers"]} == {"ok", "draining"}
        )
        assert status["status"] == "ok"


async def test_what_is_counted_in_the_store(open_app: OpenApp, database: Path) -> None:
    """Sessions, what a channel received and replied, what waits; the same from every worker."""
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
        status = await _agree(one, two, on=lambda said: said["outbox"]["depth"] == 1 and len(said["workers"]) == 2)
        assert status["sessions"] == {"total": 3, "active": 2, "busy": 1}
        [channel] = status["channels"]
        assert (channel["received"], channel["replied"], channel["queued"]) == (1, 0, 2)
        for name in ("since", "last_event_at"):
            assert datetime.datetime.fromisoformat(channel[name]).tzinfo is datetime.UTC


async def test_hooks_under_any_name_are_bounded(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who calls ten thousand names makes ``/status`` neither long nor slow: the store is asked for what is shown."""
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
        channels = (await report.status(served.gateway))["channels"]
        assert [row["name"] for row in channels] == [f"name-{number}" for number in range(9_999, 9_899, -1)]
        assert len(asked) == 100


async def test_hooks_that_no_configuration_names(open_app: OpenApp) -> None:
    """Where any name is a hook, those that were called are shown; where names are given, no others are."""
    for sections, shown in (({}, ["new", "old"]), ({"hooks": {"ci": {}}}, ["ci"])):
        async with open_app(make_config(**sections)) as served:
            channels = served.gateway.store.channels
            await channels.count("old", at=1.0, received=1)
            await channels.count("new", at=2.0, received=1)
            await channels.count("a platform's", at=3.0, received=1)
            await channels.advance("a platform's", "17")
            assert [row["name"] for row in (await report.status(served.gateway))["channels"]] == shown


@pytest.mark.parametrize(
    ("states", "found"),
    [
        (("up", "down"), ("up", None)),
        (("down", "unknown"), ("down", "it is")),
        (("unknown", "unknown"), ("unknown", None)),
        (("disabled", "disabled"), ("disabled", "it is")),
    ],
)
def test_an_upstream_as_several_workers_see_it(states: tuple[str, ...], found: tuple[str, str | None]) -> None:
    """What one knows goes before what another does not; an upstream that serves one of them is up."""
    parts = [
        attrs.evolve(EMPTY, upstreams=(attrs.evolve(UPSTREAM, state=state, reason=REASONS.get(state)),))
        for state in states
    ]
    [row] = report._upstream_rows(parts)
    assert (row["state"], row["reason"]) == found
    assert (row["in_flight"], row["queued"], row["max_connections"], row["models"]) == (2, 4, 6, 4)


@pytest.mark.parametrize(
    ("states", "holder", "found"),
    [
        ((("connected", 5.0, None), ("connected", 3.0, None)), None, ("connected", 3.0, None)),
        ((("connected", 5.0, None), ("disconnected", 6.0, "x")), None, ("disconnected", 6.0, "x")),
        ((("connected", 7.0, None), ("disconnected", 6.0, "x")), None, ("connected", 7.0, None)),
        ((("connecting", 9.0, None), ("disconnected", 6.0, "x")), "w_1", ("disconnected", 6.0, "x")),
        ((("connecting", 9.0, None), ("disconnected", 6.0, "x")), "w_dead", ("connecting", 9.0, None)),
    ],
    ids=["agreed", "news", "older news", "held", "held by the dead"],
)
def test_a_channel_as_several_workers_see_it(states: Any, holder: str | None, found: Any) -> None:
    """As the one that reads its platform does; else the last change is the news."""
    same = [
        (f"w_{number}", ChannelStatistics(name="c", type="telegram", state=state, since=since, last_error=error))
        for number, (state, since, error) in enumerate(states)
    ]
    seen = report._state_of(same, ChannelRecord(name="c", holder=holder))
    assert (seen.state, seen.since, seen.last_error) == found


async def test_a_store_that_is_broken(open_app: OpenApp) -> None:
    """This worker's part is told all the same, and why the rest is not."""
    async with open_app(make_config(hooks={"ci": {}})) as served:
        store = served.gateway.store
        assert isinstance(store, MemoryStore)
        store.failure = "the disk is full"
        status = await report.status(served.gateway)
        assert status["store"]["state"] == "unavailable"
        assert "the disk is full" in status["store"]["error"]
        assert (status["sessions"], status["outbox"]) == (None, None)
        assert [row["id"] for row in status["workers"]] == [served.gateway.workers.id]
        assert [upstream["name"] for upstream in status["upstreams"]] == ["up"]
        [channel] = status["channels"]
        assert (channel["status"], channel["received"], channel["queued"]) == ("connected", None, None)


async def test_before_the_store_is_open(open_app: OpenApp, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been kept is not known yet, which is not nothing; where nothing is kept, it is."""

    async def stay_closed(gateway: Gateway) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Gateway, "use_store", stay_closed)
    async with open_app(make_config(hooks={"ci": {}}), store=database) as served:
        status = await report.status(served.gateway)
        assert (status["store"]["state"], status["store"]["error"]) == ("closed", None)
        assert (status["sessions"], status["outbox"], status["channels"][0]["received"]) == (None, None, None)
    async with open_app(store=database) as served:
        assert (await report.status(served.gateway))["sessions"] == {"total": 0, "active": 0, "busy": 0}


async def test_a_store_that_does_not_answer(
    open_app: OpenApp, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not waited for without end."""

    async def count(active_since: float) -> None:
        await trio.sleep(60)

    async with open_app() as served:
        monkeypatch.setattr(served.gateway.store.sessions, "count", count)
        status = await report.status(served.gateway)
        assert status["store"]["error"] == "it did not answer within 1 s"


async def test_words_of_another_version(open_app: OpenApp, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is left out: while workers are replaced by newer ones, ``/status`` goes on."""
    config = make_config(hooks={"ci": {}})
    async with open_app(config, store=database) as one:
        monkeypatch.setattr(report, "snapshot", lambda gateway: b'{"shape": "another"}')
        async with open_app(config, store=database) as two:
            with trio.fail_after(10):
                while len(await one.gateway.workers.all()) < 2:  # noqa: ASYNC110 - the other one says it to nobody
                    await trio.sleep(0.005)
            assert [row["id"] for row in (await report.status(one.gateway))["workers"]] == [one.gateway.workers.id]
            assert {row["id"] for row in (await report.status(two.gateway))["workers"]} >= {two.gateway.workers.id}


async def test_ten_thousand_streams(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted, and the oldest hundred shown: nothing is made for each of the others, here or in a beat."""
    rows = []
    make_row = report._row
    monkeypatch.setattr(report, "_row", lambda *of: rows.append(of) or make_row(*of))
    async with open_app() as served:
        gateway = served.gateway
        call = decode_call(ENDPOINTS["/v1/chat/completions"], json.dumps({**CHAT, "model": "up/m"}).encode())
        nobody: Any = None
        for number in range(10_000):
            exchange = Exchange(
                id=f"req_{number}", call=call, gateway=gateway, generation=gateway.generation, down=nobody
            )
            exchange._state = "streaming" if number % 4 else "queued"
            exchange.target = Target("up", "m") if number % 4 else None
            gateway.live[exchange] = None
        answer = await served.client.ask("GET", "/status")
        snapshot = report.snapshot(gateway)
        gateway.live.clear()
        streams = answer.json["streams"]
        assert streams["live"] == answer.json["workers"][0]["live"] == 10_000
        assert streams["by_phase"] == {"queued": 2_500, "streaming": 7_500}
        assert streams["by_upstream"] == {"up": 7_500}
        assert [row["id"] for row in streams["oldest"]] == [f"req_{number}" for number in range(100)]
        assert len(rows) == 200
        assert len(answer.body) < 30_000
        assert len(snapshot) < 30_000


REASONS = {"down": "it is", "disabled": "it is"}
UPSTREAM = UpstreamStatistics(
    name="u",
    kind="openai",
    state="up",
    reason=None,
    in_flight=1,
    queued=2,
    max_connections=3,
    models=4,
    last_error=None,
    last_error_at=None,
)
EMPTY = report.Part(
    version="1",
    uptime_s=0.0,
    draining=False,
    config="test",
    reload_error=None,
    by_phase={},
    by_upstream={},
    oldest=(),
    upstreams=(),
    channels=(),
    totals={},
    door={"in_flight": 0, "limit": 1, "queued": 0, "refused": 0, "late": 0, "lag_s": 0.0},
    targets=(),
    ledger=LedgerStatistics(state="ok", begun=0, settled=0, lost=0, dropped=0),
)


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


# -- at the start -----------------------------------------------------------------------------------------------------


def _insecure(config: Config) -> Config:
    return attrs.evolve(config, server=attrs.evolve(config.server, insecure=True))


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (make_config(), "no key: this machine only"),
        (make_config(keys={"alice": "a" * 20, "bob": "b" * 20}), "2 keys (alice, bob)"),
        (_insecure(make_config()), "NO KEY and --insecure: anybody who reaches it can use it"),
        (_insecure(make_config(keys={"alice": "a" * 20})), "1 keys (alice)"),
    ],
    ids=["no key", "keys", "insecure", "insecure with a key"],
)
async def test_who_may_come_in(open_app: OpenApp, config: Config, first: str) -> None:
    """The first line says it, with version and source; an open gateway shouts."""
    async with open_app(config) as served:
        assert report.startup_lines(served.gateway) == [
            f"Trigate {__version__}, configured by test; {first}; store in memory",
            "Upstreams: up: 1 models",
            "Models: 2 listed; default is up/m",
        ]


async def test_who_may_call(open_app: OpenApp) -> None:
    """Hooks and channels are named, and why one is off: a token that is missing is seen at the start."""
    hooks = {"ci": {}, "old": {"enabled": False}}
    channels = {"bot": {"type": "telegram", "token": {"env": "NO_SUCH"}}}
    async with open_app(make_config(hooks=hooks, channels=channels)) as served:
        assert report.startup_lines(served.gateway)[3:] == [
            "Hooks and channels: ci; old: disabled; bot: disabled (token: the environment variable NO_SUCH is not set)"
        ]


@pytest.mark.parametrize(
    ("upstreams", "scripts", "found", "default"),
    [
        ({}, {}, "none", "default cannot serve: No upstream can serve now (none is configured)"),
        (
            {"off": {"api_key": {"env": "NOT_SET"}}},
            {},
            "off: disabled (api_key: the environment variable NOT_SET is not set)",
            "default cannot serve: No upstream can serve now (off: api_key: the environment variable NOT_SET",
        ),
        ({"gone": {"models": "discover"}}, {"gone": (Refuse(),)}, "gone: down (", "default cannot serve: "),
        (
            {"gone": {"models": "discover"}, "up": {"models": ["a", "b"]}},
            {"gone": (Refuse(),)},
            "up: 2 models",
            "default is up/a",
        ),
        ({"parrot": {"kind": "echo"}}, {}, "parrot: 1 models", "default is parrot/echo"),
    ],
    ids=["none", "disabled", "down", "down and up", "echo"],
)
async def test_what_was_found(
    open_app: OpenApp,
    autojump_clock: MockClock,
    upstreams: dict[str, Any],
    scripts: dict[str, Any],
    found: str,
    default: str,
) -> None:
    """Each upstream with its models, or with the reason why not; and what ``default`` means now."""
    providers = {name: Provider(scripts[name]) if name in scripts else Provider() for name in upstreams}
    async with open_app(make_config(upstreams), providers) as served:
        _, second, third = report.startup_lines(served.gateway)
        assert second.startswith("Upstreams: ")
        assert found in second
        assert f"{len(served.gateway.generation.public_ids())} listed; {default}" in third
