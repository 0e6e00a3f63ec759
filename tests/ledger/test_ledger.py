"""The ledger: one record for each exchange, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
from trio.testing import MockClock

from tests.support.asgi_client import chat
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.processes import run_gateway
from tests.support.provider import DONE, Pause, Provider, Say, Stall, answers, content, says
from tests.support.shortage import ERRORS, os_error
from trigate.ledger import ledger
from trigate.store.memory import MemoryStore
from trigate.store.records import AttemptRecord, ExchangeRecord
from trigate.store.tables import Tables

USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}\n\n'


async def listed(served: Served, query: str = "", **headers: str) -> Any:  # Any: JSON
    """The response of ``GET /v1/exchanges``."""
    return (await served.client.ask("GET", f"/v1/exchanges{query}", headers=headers)).json


async def test_a_record(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It has the owner, the request, the time, the outcome, the target and the cost."""
    provider = Provider((Say(content("a")), Say(content("b")), Say(USAGE), Say(DONE)))
    async with open_app(make_config(), provider) as served:
        await served.client.start("POST", "/v1/chat/completions", chat(), headers={"x-request-id": "mine"}).wait()
        body = await listed(served)
        [record] = body["data"]
        assert record.pop("id").startswith("ex_")
        assert record.pop("worker") == served.gateway.workers.id
        started_at, ended_at = record.pop("started_at"), record.pop("ended_at")
        assert started_at <= ended_at
        assert started_at.endswith("+00:00")
        [attempt] = record.pop("attempts")
        assert (attempt["target"], attempt["why"], attempt["outcome"]) == ("up/m", "first", "complete")
        for measured in ("duration_s", "first_content_s"):
            assert record.pop(measured) >= 0
        assert record.pop("bytes") > 100
        assert record == {
            "request_id": "mine",
            "key": "",
            "endpoint": "/chat/completions",
            "model": "up/m",
            "stream": True,
            "outcome": "complete",
            "status": 200,
            "target": "up/m",
            "prompt_tokens": 7,
            "completion_tokens": 2,
            "counted": False,
            "events": 4,
            "group": "",
            "cached_tokens": 0,
            "cache_write_tokens": 0,
            "reasoning_tokens": 0,
            "cost_usd": None,
            "alias": "",
            "waited_s": 0.0,
        }
        assert body["has_more"] is False


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (answers(b'{"error":{"message":"no"}}', status=400), ("upstream_rejected", 400, 0, None)),
        ((Say(content("a")),), ("upstream_truncated", 502, 1, 1)),
        (says("a", "b"), ("complete", 200, 5, 5)),
    ],
    ids=["refused", "truncated", "no usage"],
)
async def test_the_outcome_of_a_record(
    open_app: OpenApp, autojump_clock: MockClock, script: Any, expected: tuple[Any, ...]
) -> None:
    """It has the outcome, the status and the tokens, which are estimated when the upstream has sent content without a
    usage."""
    async with open_app(make_config(), Provider(script)) as served:
        await served.client.chat().wait()
        [record] = (await listed(served))["data"]
        assert (record["outcome"], record["status"], record["events"], record["completion_tokens"]) == expected
        assert record["counted"] == (record["prompt_tokens"] is not None) == (expected[3] is not None)


async def test_a_record_of_a_disconnected_client(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It is cancelled, has the size of the partial answer, and has no status."""
    async with open_app(make_config(), Provider((Say(content("a")), Stall()))) as served:
        call = served.client.chat()
        await call.wait_for(b'"a"')
        call.disconnect()
        await call.wait()
        [record] = (await listed(served))["data"]
        assert (record["outcome"], record["status"], record["completion_tokens"]) == ("cancelled", None, 1)


async def test_a_record_of_a_finished_answer(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """When the answer is read to its end after a disconnect, no client got it, so there is no status."""
    model = {"targets": ["up/m"], "on_disconnect": "finish", "finish_timeout_s": 10}
    scripts = (Say(content("a")), Pause(5), Say(content("b")), Say(DONE)), (Say(content("a")), Stall())
    async with open_app(make_config(models={"m": model}), Provider(*scripts)) as served:
        for _ in scripts:
            call = served.client.chat(model="m")
            await call.wait_for(b'"a"')
            call.disconnect()
            await call.wait()
        records = (await listed(served))["data"]
        assert [(each["outcome"], each["status"]) for each in records] == [("cancelled", None), ("finished", None)]


async def test_refused_calls_have_records(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """This covers an unknown model and a gateway that is full."""
    config = make_config(limits={"max_exchanges": 1, "max_queued": 0})
    async with open_app(config, Provider((Say(content("a")), Stall()))) as served:
        await served.client.chat(model="nobody/knows").wait()
        first = served.client.chat()
        await first.wait_for(b'"a"')
        await served.client.chat().wait()
        records = (await listed(served))["data"]
        assert [(each["outcome"], each["status"]) for each in records] == [
            ("overloaded", 503),
            ("model_not_found", 404),
        ]


async def test_a_key_sees_its_own_records(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Records can be paged and filtered by outcome. Invalid numbers are a 400."""
    config = make_config(keys={"a": "key-of-a", "b": "key-of-b"})
    async with open_app(config, Provider(*[says("a")] * 3)) as served:
        for key, model in (("a", "up/m"), ("b", "up/m"), ("a", "up/m"), ("a", "no/model")):
            headers = {"authorization": f"Bearer key-of-{key}"}
            await served.client.start("POST", "/v1/chat/completions", chat(model=model), headers=headers).wait()
        mine = await listed(served, authorization="Bearer key-of-a")
        assert [(each["key"], each["outcome"]) for each in mine["data"]] == [
            ("a", "model_not_found"),
            ("a", "complete"),
            ("a", "complete"),
        ]
        page = await listed(served, f"?limit=1&after={mine['data'][0]['id']}", authorization="Bearer key-of-a")
        assert (page["data"], page["has_more"]) == ([mine["data"][1]], True)
        lost = await listed(served, "?outcome=model_not_found", authorization="Bearer key-of-a")
        assert lost["data"] == mine["data"][:1]
        bad = await listed(served, "?limit=0", authorization="Bearer key-of-a")
        assert bad["error"]["param"] == "limit"


async def test_a_disabled_ledger(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """There are no records, and ``/status`` says so."""
    async with open_app(make_config(ledger={"enabled": False}), Provider(says("a"))) as served:
        await served.client.chat().wait()
        assert (await listed(served))["data"] == []
        status = (await served.client.ask("GET", "/status")).json
        assert status["ledger"] == {"state": "off", "begun": 0, "settled": 0, "lost": 0, "dropped": 0, "error": None}


async def test_a_failing_store_delays_no_call(
    open_app: OpenApp, autojump_clock: MockClock, logs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records wait in memory. Those that fit neither there nor in a journal are counted and reported."""
    logs.expect_error("records_dropped")
    monkeypatch.setattr(ledger, "MAX_WAITING", 2)
    async with open_app(make_config(), Provider(*[says("a")] * 3)) as served:
        store = served.gateway.store
        assert isinstance(store, MemoryStore)
        store.failure = "full"
        for _ in range(3):
            await served.client.chat().wait()
        await trio.sleep(10)
        assert len(logs.named("ledger_waits")) == 1
        assert (await listed(served))["error"]["code"] == "store_unavailable"
        store.failure = None
        assert len((await listed(served))["data"]) == 2
        status = (await served.client.ask("GET", "/status")).json
        assert (status["ledger"]["settled"], status["ledger"]["dropped"]) == (3, 1)


@pytest.mark.slow
async def test_records_that_exceed_memory_go_to_the_journal(
    open_app: OpenApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read from the journal."""
    monkeypatch.setattr(ledger, "MAX_WAITING", 2)
    async with open_app(make_config(), Provider(*[says("a")] * 9), store=tmp_path / "a.db") as served:
        for _ in range(9):
            await served.client.chat().wait()
        assert len((await listed(served))["data"]) == 9
        assert (await served.client.ask("GET", "/status")).json["ledger"]["dropped"] == 0


async def test_an_unwritable_journal(open_app: OpenApp, tmp_path: Path, logs: Any) -> None:
    """Calls are served. The failure is logged once, and so is the recovery. Records wait in memory meanwhile."""
    logs.expect_error("ledger_degraded")
    blocked = tmp_path / "room"
    blocked.write_text("not a directory")
    async with open_app(make_config(), Provider(*[says("a")] * 3), store=blocked / "a.db") as served:
        for _ in range(2):
            assert (await served.client.chat().wait()).status == 200
        ledger = (await served.client.ask("GET", "/status")).json["ledger"]
        assert (ledger["state"], ledger["settled"]) == ("degraded", 2)
        assert str(blocked) in ledger["error"]
        assert len(logs.named("ledger_degraded")) == 1
        blocked.unlink()
        served.gateway.ledger._retry_at = 0.0
        await served.client.chat().wait()
        assert len(logs.named("ledger_restored")) == 1
        with trio.fail_after(5):
            while (found := await listed(served)).get("error"):  # noqa: ASYNC110 - the store reopens without notice
                await trio.sleep(0.1)
        assert len(found["data"]) == 3
    assert [path.name for path in blocked.glob("*-exchanges-*")] == []


@pytest.mark.parametrize("tokens", [2**31, 2**63, 10**30, -1])
async def test_a_count_that_is_none(open_app: OpenApp, autojump_clock: MockClock, tokens: int) -> None:
    """An upstream's count that cannot be one of tokens is not recorded. The record and those beside it are."""
    odd = content("a") + b'data: {"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":1}}\n\n' % tokens
    async with open_app(make_config(), Provider((Say(odd), Say(DONE)), says("b"))) as served:
        for _ in range(2):
            await served.client.chat().wait()
        await trio.sleep(10)
        records = (await listed(served))["data"]
        assert [each["outcome"] for each in records] == ["complete"] * 2
        assert [each["counted"] for each in records] == [True, True]


def _journal(path: Path) -> bytes:
    """The lines of a process with exchanges that were settled and one that was not, with text of any kind."""
    for number in range(5):
        record = ExchangeRecord(
            id=f"ex_{path.name}_{number}",
            request_id="r\u2028\0\u00fc",
            owner="ada",
            worker="w",
            endpoint="/chat/completions",
            model="\U0001f30d" * 9,
            stream=True,
            started_at=1.5e9,
        )
        lines = record.encode() + b"\n"
        if number:
            record.outcome, record.status, record.ended_at, record.prompt_tokens = "complete", 200, 2e9, 10**6
            record.first_content_s = 0.25
            record.attempts = (
                AttemptRecord(
                    target="up/m",
                    why="first",
                    started_s=0.0,
                    duration_s=1.0,
                    outcome="complete",
                    status=None,
                    first_content_s=0.25,
                ),
            )
            lines += record.encode() + b"\n"
        with path.open("ab") as file:
            file.write(lines)
    return path.read_bytes()


@pytest.mark.slow
async def test_damaged_journals(open_app: OpenApp, tmp_path: Path, logs: Any) -> None:
    """Journals that are cut or flipped at every 64th byte: what is left of them is recorded, and the gateway serves."""
    logs.expect_error("journal_damaged")
    whole = _journal(tmp_path / "whole")
    for at in range(0, len(whole), 64):
        damaged = {"cut": whole[:at]}
        for mask in (0x01, 0x10, 0x20, 0x80, 0xFF):
            damaged[f"flipped{mask}"] = whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :]
        for name, data in damaged.items():
            # each with ids of its own
            data = data.replace(b"whole", b"%b%d" % (name.encode(), at))
            (tmp_path / f"a.db-exchanges-{name}.{at}").write_bytes(data)
    (tmp_path / "a.db-exchanges-directory.0").mkdir()
    async with open_app(make_config(), Provider(says("a")), store=tmp_path / "a.db") as served:
        with trio.fail_after(30):
            await served.gateway.ledger.flush()
        assert (await served.client.chat().wait()).status == 200
        after, found = "", 0
        while (page := await listed(served, f"?limit=100{after}"))["data"]:
            found += len(page["data"])
            after = f"&after={page['data'][-1]['id']}"
        statistics = served.gateway.ledger.statistics()
    # of each journal, all but the damaged line; and of a cut one, what is in front of the cut
    files = -(-len(whole) // 64)
    assert found > 5 * files * (5 - 1) + files * 5 / 3
    assert statistics.error is None
    [entry] = logs.named("journal_unusable")
    assert entry["reason"] == "It cannot be read: Is a directory."
    assert [path.name for path in tmp_path.glob("a.db-exchanges-*")] == ["a.db-exchanges-directory.0"]  # noqa: ASYNC240


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("call", ["os.open", "os.pread", "os.unlink"])
async def test_the_journal_of_another_process_cannot_be_used(
    open_app: OpenApp, tmp_path: Path, call: str, name: str, logs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reported once. Its records are stored once, and calls and the records of this process are not affected."""
    monkeypatch.setattr(ledger, "ORPHANS_S", 0.0)
    path = tmp_path / "a.db-exchanges-dead.0"
    _journal(path)
    function = getattr(os, call.removeprefix("os."))

    def fail(at: Any, *rest: Any) -> Any:
        if at == str(path) or (call == "os.pread" and os.readlink(f"/proc/self/fd/{at}") == str(path)):
            raise os_error(name)
        return function(at, *rest)

    monkeypatch.setattr(call, fail)
    async with open_app(make_config(), Provider(says("a")), store=tmp_path / "a.db") as served:
        for _ in range(3):
            await served.gateway.ledger.flush()
        assert (await served.client.chat().wait()).status == 200
        assert len((await listed(served))["data"]) == (6 if call == "os.unlink" else 1)
        assert served.gateway.ledger.statistics().error is None
        monkeypatch.setattr(call, function)
        [entry] = logs.named("journal_unusable")
        assert str(os_error(name).strerror) in entry["reason"]
        assert len(logs.named("exchanges_lost")) == (1 if call == "os.unlink" else 0)
        await served.gateway.ledger.flush()
        assert len((await listed(served))["data"]) == 6
        assert len(logs.named("exchanges_lost")) == 1
        assert path.exists() is (call == "os.unlink")


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("call", ["os.open", "os.write", "os.pread", "fcntl.flock"])
async def test_the_journal_of_this_process_cannot_be_used(
    open_app: OpenApp, tmp_path: Path, call: str, name: str, logs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls are served, and their records reach the store."""
    monkeypatch.setattr(ledger, "MAX_WAITING", 3)
    logs.expect_error("ledger_degraded")

    def fail(*_: object, **__: object) -> Any:
        raise os_error(name)

    async with open_app(make_config(), Provider(*[says("a")] * 9), store=tmp_path / "a.db") as served:
        await served.gateway.store.check()
        with monkeypatch.context() as patch:
            patch.setattr(call, fail)
            for _ in range(4 if call == "os.pread" else 2):
                assert (await served.client.chat().wait()).status == 200
            await served.gateway.ledger.flush()
            assert str(os_error(name).strerror) in (served.gateway.ledger.statistics().error or "")
            await served.client.chat().wait()
        served.gateway.ledger._retry_at = 0.0
        await served.client.chat().wait()
        await served.gateway.ledger.flush()
        assert len((await listed(served))["data"]) == (6 if call == "os.pread" else 4)
        assert served.gateway.ledger.statistics().error is None
    assert len(logs.named("ledger_degraded")) == 1


async def test_a_defect_does_not_end_the_gateway(
    open_app: OpenApp, autojump_clock: MockClock, logs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected exception while records are written is logged once, and the records are written later."""
    logs.expect_error("ledger_crashed")
    async with open_app(make_config(), Provider(*[says("a")] * 2)) as served:
        with monkeypatch.context() as patch:
            patch.setattr(Tables, "put_exchanges", lambda tables, records: 1 / 0)
            await served.client.chat().wait()
            await trio.sleep(30)
        await trio.sleep(10)
        assert served.gateway.ledger.statistics().error is None
        assert len((await listed(served))["data"]) == 1
    assert len(logs.named("ledger_crashed")) == 1


async def test_long_journals_are_replaced(open_app: OpenApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of running exchanges move to the next journal and are settled there."""
    monkeypatch.setattr(ledger, "ROTATE_BYTES", 1)
    provider = Provider((Say(content("a")), Stall()), says("b"))
    async with open_app(make_config(), provider, store=tmp_path / "a.db") as served:
        call = served.client.chat()
        await call.wait_for(b'"a"')
        await served.client.chat().wait()
        assert [each["outcome"] for each in (await listed(served))["data"]] == ["complete"]
        [journal] = tmp_path.glob("*-exchanges-*")  # noqa: ASYNC240
        assert journal.suffix == ".1"
        assert journal.read_bytes().count(b"\n") == 1
        call.disconnect()
        await call.wait()
        assert [each["outcome"] for each in (await listed(served))["data"]] == ["cancelled", "complete"]


def _rows(path: Path) -> list[tuple[str, str, str | None]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return list(db.execute("SELECT request_id, outcome, ended_at FROM exchanges ORDER BY request_id"))


@pytest.mark.slow
def test_records_after_sigkill(tmp_path: Path) -> None:
    """After SIGKILL the next process finds each exchange once: ended ones with their outcome, running ones as lost."""
    store = tmp_path / "a.db"
    config = """
        [upstreams.slow]
        kind = "echo"
        words_per_s = 5
    """
    body = {"model": "slow/echo", "messages": [{"role": "user", "content": "one two three " * 20}]}
    env = {"TRIGATE_STORE": str(store)}
    with run_gateway(config, tmp_path, env=env) as gateway, httpx2.Client(base_url=gateway.url) as client:
        quick = {**body, "messages": [{"role": "user", "content": "a"}]}
        for number in range(20):
            client.post("/v1/chat/completions", json=quick, headers={"x-request-id": f"a{number:02}"})
        long = {**body, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=long, headers={"x-request-id": "b"}) as stream:
            pieces = stream.iter_bytes()
            next(pieces)
            os.killpg(gateway.process.pid, signal.SIGKILL)
            gateway.process.wait()
    with run_gateway(config, tmp_path, env=env) as gateway, httpx2.Client(base_url=gateway.url) as client:
        give_up_at = time.monotonic() + 10
        while len(rows := client.get("/v1/exchanges").json()["data"]) < 21 and time.monotonic() < give_up_at:
            time.sleep(0.05)
        assert sorted((each["request_id"], each["outcome"]) for each in rows) == [
            *((f"a{number:02}", "complete") for number in range(20)),
            ("b", "lost"),
        ]
        assert "exchanges_lost" in gateway.log()
        assert client.get("/status").json()["ledger"]["lost"] == 1
        gateway.stop()
    assert len(_rows(store)) == 21
    assert list(tmp_path.glob("*-exchanges-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_records_after_a_second_signal(tmp_path: Path, workers: int) -> None:
    """Streams end at once, every client gets an error, and each record has its outcome."""
    store = tmp_path / "a.db"
    config = f"""
        [server]
        workers = {workers}
        [upstreams.slow]
        kind = "echo"
        words_per_s = 5
    """
    body = {"model": "slow/echo", "stream": True, "messages": [{"role": "user", "content": "one two three " * 50}]}
    with run_gateway(config, tmp_path, env={"TRIGATE_STORE": str(store)}) as gateway:
        with (
            httpx2.Client(base_url=gateway.url) as client,
            client.stream("POST", "/v1/chat/completions", json=body) as stream,
        ):
            pieces = stream.iter_text()
            next(pieces)
            gateway.process.terminate()
            give_up_at = time.monotonic() + 10
            while gateway.log().count("draining") < workers and time.monotonic() < give_up_at:
                time.sleep(0.05)
            gateway.process.terminate()
            assert '"code":"draining"' in "".join(pieces)
        assert gateway.process.wait(10) == 1
    [row] = _rows(store)
    assert "draining" in row
    assert list(tmp_path.glob("*-exchanges-*")) == []
