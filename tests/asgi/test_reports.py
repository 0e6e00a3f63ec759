"""``/v1/usage`` and ``/v1/exchanges``."""

from __future__ import annotations

import csv
import datetime
import io
from typing import Any

import pytest
from trio.testing import MockClock

from tests.support.asgi_client import chat
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import DONE, Provider, Say, answers, content
from trigate.store.records import ExchangeRecord

USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}\n\n'
KEYS = {"ada": "key-of-ada", "ben": "key-of-ben"}
ADMIN = {"authorization": "Bearer key-of-the-admin"}


async def asked(served: Served, path: str, **headers: str) -> Any:  # Any: JSON
    """The body of a response."""
    return (await served.client.ask("GET", path, headers=headers)).json


async def _call(served: Served, name: str, **more: Any) -> None:
    headers = {"authorization": f"Bearer {KEYS[name]}", "x-request-id": f"of-{name}"}
    await served.client.start("POST", "/v1/chat/completions", chat(**more), headers=headers).wait()


async def test_use_by_key(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A key sees its own use, the admin's key all of it, grouped as asked."""
    config = make_config(keys=KEYS, admin={"key": "key-of-the-admin"})
    good = (Say(content("a")), Say(USAGE), Say(DONE))
    async with open_app(config, Provider(good, good, answers(b'{"error":{"message":"no"}}', status=400))) as served:
        await _call(served, "ada")
        await _call(served, "ben")
        await _call(served, "ada")
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        body = await asked(served, "/v1/usage?group_by=key,model,day", **ADMIN)
        shown = [
            {name: row[name] for name in ("key", "model", "day", "calls", "complete", "failed", "prompt_tokens")}
            for row in body["data"]
        ]
        same = {"model": "up/m", "day": today}
        assert shown == [
            {"key": "ada", **same, "calls": 2, "complete": 1, "failed": 1, "prompt_tokens": 7},
            {"key": "ben", **same, "calls": 1, "complete": 1, "failed": 0, "prompt_tokens": 7},
        ]
        assert body["data"][0]["failures"] == {"upstream_rejected": 1}
        assert body["total"]["completion_tokens"] == 4
        assert body["total"]["duration_p95_s"] > 0
        mine = await asked(served, "/v1/usage?group_by=key", authorization="Bearer key-of-ada")
        assert [(row["key"], row["calls"]) for row in mine["data"]] == [("ada", 2)]
        for path in ("/v1/usage", "/v1/exchanges"):
            other = await served.client.ask("GET", f"{path}?key=ben", headers={"authorization": "Bearer key-of-ada"})
            assert other.status == 403, path
            chosen = await asked(served, f"{path}?key=ben", **ADMIN)
            assert (chosen["total"]["calls"] if "total" in chosen else len(chosen["data"])) == 1
        found = await asked(served, "/v1/exchanges?failed=true&from=2020-01-01", **ADMIN)
        assert [(row["key"], row["request_id"], row["outcome"]) for row in found["data"]] == [
            ("ada", "of-ada", "upstream_rejected")
        ]
        assert len((await asked(served, "/v1/exchanges?id=of-ben", **ADMIN))["data"]) == 1
        assert (await asked(served, "/v1/exchanges?to=2020-01-01", **ADMIN))["data"] == []


async def test_tags(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The calls of a key with two tags are in two rows, and once in the total."""
    keys = {"ada": {"secret": "key-of-ada", "tags": ["red", "blue"]}, "ben": "key-of-ben"}
    config = make_config(keys=keys, admin={"key": "key-of-the-admin"})
    good = (Say(content("a")), Say(USAGE), Say(DONE))
    async with open_app(config, Provider(good, good)) as served:
        await _call(served, "ada")
        await _call(served, "ben")
        body = await asked(served, "/v1/usage?group_by=key,tag", **ADMIN)
        assert [(row["key"], row["tag"], row["calls"]) for row in body["data"]] == [
            ("ada", "blue", 1),
            ("ada", "red", 1),
            ("ben", "", 1),
        ]
        assert body["total"]["calls"] == 2


def _record(number: int, at: str, **changes: Any) -> bytes:
    started_at = datetime.datetime.fromisoformat(f"{at}+00:00").timestamp()
    given: dict[str, Any] = {"model": "m", "cost": 1_250_000, "outcome": "complete", "ended_at": started_at + 1}
    return ExchangeRecord(
        id=f"ex_{number}",
        request_id="r",
        owner="",
        worker="w",
        endpoint="/e",
        stream=True,
        started_at=started_at,
        **given | changes,
    ).encode()


async def test_times(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Dates are whole days of UTC, times count from their hour on; money is exact."""
    async with open_app(make_config(), Provider()) as served:
        await served.gateway.store.exchanges.put(
            [
                _record(1, "2026-01-01T00:00:00"),
                _record(2, "2026-01-01T23:59:59", cost=None, prompt_tokens=1),
                _record(3, "2026-01-02T00:00:00"),
                _record(4, "2026-02-01T12:30:00", outcome="timeout"),
            ]
        )

        async def calls(query: str) -> list[tuple[str, int, str]]:
            body = await asked(served, f"/v1/usage?{query}")
            return [(row[body["group_by"][0]], row["calls"], row["cost_usd"]) for row in body["data"]]

        assert await calls("group_by=day&from=2026-01-01&to=2026-01-01") == [("2026-01-01", 2, "1.250000")]
        assert await calls("group_by=month&from=2026-01-01") == [("2026-01", 3, "2.500000"), ("2026-02", 1, "1.250000")]
        assert await calls("group_by=hour&from=2026-02-01T13:00:00%2B01:00&to=2026-02-01T13:00:00Z") == [
            ("2026-02-01T12:00:00+00:00", 1, "1.250000")
        ]
        assert await calls("group_by=hour&from=2026-02-01T13:00:00+01:00") != []  # a plus that is not escaped
        total = (await asked(served, "/v1/usage?from=2026-01-01&to=2026-12-31"))["total"]
        assert (total["cost_usd"], total["unpriced_calls"], total["failed"]) == ("3.750000", 1, 1)
        listed = await asked(served, "/v1/exchanges?from=2026-01-02&to=2026-01-02")
        assert [row["id"] for row in listed["data"]] == ["ex_3"]


async def test_csv(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """By ``format`` or ``Accept``; the names of models are no formulas."""
    async with open_app(make_config(), Provider()) as served:
        await served.gateway.store.exchanges.put([_record(1, "2026-01-01T00:00:00", model="=1+1")])
        for path, accept in (("/v1/usage?format=csv&", "*/*"), ("/v1/usage?", "text/csv")):
            answer = await served.client.ask(
                "GET", f"{path}group_by=model,day&from=2026-01-01", headers={"accept": accept}
            )
            assert dict(answer.headers)[b"content-type"] == b"text/csv; charset=utf-8"
            [row] = csv.DictReader(io.StringIO(answer.body.decode()))
            assert (row["model"], row["day"], row["calls"], row["cost_usd"]) == ("'=1+1", "2026-01-01", "1", "1.250000")
        assert (await asked(served, "/v1/usage", accept="*/*"))["object"] == "usage"


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/usage?group_by=colour", "group_by"),
        ("/v1/usage?group_by=day,day", "group_by"),
        ("/v1/usage?from=yesterday", "from"),
        ("/v1/usage?to=2026-13-01", "to"),
        ("/v1/usage?from=2026-01-02&to=2026-01-01", "to"),
        ("/v1/usage?format=xml", "format"),
        ("/v1/usage?since=1", "since"),
        ("/v1/exchanges?limit=0", "limit"),
        ("/v1/exchanges?failed=yes", "failed"),
        ("/v1/exchanges?from=12", "from"),
    ],
)
async def test_bad_parameters(open_app: OpenApp, autojump_clock: MockClock, path: str, param: str) -> None:
    """A 400 that names the parameter."""
    async with open_app(make_config(), Provider()) as served:
        answer = await served.client.ask("GET", path)
        assert (answer.status, answer.json["error"]["param"]) == (400, param)
