"""A thousand calls by fifty keys over two workers, with errors and clients that leave: no cent is lost, and no limit is
exceeded by more than its stated bound."""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest
import trio

from tests.support.metered_upstream import MeteredUpstream, open_metered_upstream
from tests.support.processes import SERVE, Gateway, run_gateway

pytestmark = pytest.mark.slow

CALLS_PER_KEY = 20
SPREAD_S = 2.0
"""Half of the calls begin at once, and the others at random moments of so many seconds."""
SEED = 20_261_130
ADMIN = "the admin's key, which nobody guesses"
MAX_TOKENS = 40
"""Of each call; the provider never says more."""
PROMPT_TOKENS = 10
"""At most, as the provider counts: fewer than any estimate of the text."""

CROWD = 6
"""Exchanges in flight of the group of the first ten keys, together."""
PAIR = 2
"""Exchanges in flight of each of the second ten keys."""
PER_MINUTE = 6
BUDGET = 1000
"""Micro-dollars. A call costs at most 170, so a budget is for six to a few dozen."""
TOKENS_PER_MINUTE = 300

FREES_WITHIN_S = 5.0

KINDS = ("crowd", "pair", "rate", "budget", "tokens")
CODES = {
    "crowd": "concurrency_exceeded",
    "pair": "concurrency_exceeded",
    "rate": "rate_limit_exceeded",
    "budget": "insufficient_quota",
    "tokens": "tokens_exceeded",
}
"""The code of a refusal, by what limits a key."""
KEYS = [f"{kind}{number}" for kind in KINDS for number in range(10)]
LIMITS = {
    "crowd": 'group = "crowd"',
    "pair": f"max_exchanges = {PAIR}",
    "rate": f"rpm = {PER_MINUTE}",
    "budget": f'budget_usd = "0.{BUDGET:06}"\nbudget_period = "total"',
    "tokens": f"tpm = {TOKENS_PER_MINUTE}",
}


def kind_of(key: str) -> str:
    """What limits a key."""
    return key.rstrip("0123456789")


def cost_of(prompt_tokens: int, completion_tokens: int) -> int:
    """What a call costs at the prices of `configuration`, in micro-dollars."""
    return prompt_tokens + 4 * completion_tokens


def configuration(upstream: str, directory: Path) -> str:
    """Fifty keys, ten with each kind of limit, and a model at 1 $ and 4 $ for a million tokens."""
    keys = "\n".join(f'[keys.{key}]\nsecret = "secret-of-{key}"\n{LIMITS[kind_of(key)]}' for key in KEYS)
    return f"""
[server]
drain_timeout_s = 5
[store]
path = "{directory / "trigate.db"}"
[limits]
max_exchanges = 2000
max_exchanges_per_key = 0
key_rate_per_s = 0
[retries]
budget = 0
[breaker]
failures = 0
failure_rate = 0
[upstreams.up]
base_url = "{upstream}"
models = ["m"]
max_connections = 2000
[prices."up/m"]
input_usd = 1
output_usd = 4
[admin]
key = "{ADMIN}"
[groups.crowd]
max_exchanges = {CROWD}
{keys}
"""


@attrs.frozen(kw_only=True)
class Answered:
    """What a client got.

    Attributes:
        status: 0 = it left before the answer.
        is_whole: The answer was complete.
    """

    key: str
    text: str
    status: int
    code: str = ""
    cost: str = ""
    is_whole: bool = False


async def _call(
    port: int, key: str, number: int, text: str, *, stream: bool, leaves_after_s: float | None, most: int = MAX_TOKENS
) -> Answered:
    """Makes one call on a connection of its own."""
    asked = {"model": "up/m", "stream": stream, "max_tokens": most}
    body = json.dumps({**asked, "messages": [{"role": "user", "content": text}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-request-id: {key}-{number}\r\n"
    head += f"authorization: Bearer secret-of-{key}\r\nconnection: close\r\ncontent-type: application/json\r\n"
    connection = await trio.open_tcp_stream("127.0.0.1", port)
    data = b""
    async with connection:
        with trio.move_on_after(60 if leaves_after_s is None else leaves_after_s) as scope:
            await connection.send_all(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            async for piece in connection:
                data += piece
    assert leaves_after_s is not None or not scope.cancelled_caught, f"{key}-{number} got no answer: {data!r}"
    if scope.cancelled_caught or not data:
        return Answered(key=key, text=text, status=0)
    given, _, content = data.partition(b"\r\n\r\n")
    first, *lines = given.decode("latin-1").lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    status = int(first.split()[1])
    code = ""
    if status != 200 and content.startswith(b"{"):
        code = json.loads(content)["error"]["code"]
    is_whole = status == 200 and (b"data: [DONE]" in content if stream else "content-length" in headers)
    cost = headers.get("x-trigate-cost-usd", "")
    return Answered(key=key, text=text, status=status, code=code, cost=cost, is_whole=is_whole)


def _text(chance: random.Random) -> str:
    [kind] = chance.choices(("ok", "silent", "fails", "refuses", "cut"), (70, 8, 8, 6, 8))
    prompt, completion = chance.randint(1, PROMPT_TOKENS), chance.randint(1, MAX_TOKENS)
    return f"{kind} {prompt} {completion} {chance.randint(5, 300)} of a call that says no more than this"


async def _storm(port: int) -> list[Answered]:
    """Makes all calls; two fifths of the clients leave before the end, and some at once."""
    chance = random.Random(SEED)
    answered: list[Answered] = []

    async def client(key: str, number: int, after_s: float, leaves_after_s: float | None) -> None:
        text, stream = texts[key, number]
        await trio.sleep(after_s)
        answered.append(await _call(port, key, number, text, stream=stream, leaves_after_s=leaves_after_s))

    calls = [(key, number) for key in KEYS for number in range(CALLS_PER_KEY)]
    texts = {each: (_text(chance), chance.random() < 0.5) for each in calls}
    async with trio.open_nursery() as nursery:
        for key, number in calls:
            leaves_after_s = chance.random() * chance.choice((0.01, 0.3, 1.0)) if chance.random() < 0.4 else None
            after_s = 0.0 if chance.random() < 0.5 else chance.random() * SPREAD_S
            nursery.start_soon(client, key, number, after_s, leaves_after_s)
    return answered


def _port(gateway: Gateway) -> int:
    return int(gateway.url.rpartition(":")[2])


def _admin(gateway: Gateway) -> httpx2.AsyncClient:
    headers = {"authorization": f"Bearer {ADMIN}"}
    return httpx2.AsyncClient(base_url=gateway.url, headers=headers, timeout=20, trust_env=False)


@asynccontextmanager
async def _serving(config: str, directory: Path) -> AsyncIterator[Gateway]:
    """Runs the gateway with two workers, both of which serve."""
    running = run_gateway(config, directory, command=(*SERVE, "--workers", "2"))
    gateway = await trio.to_thread.run_sync(running.__enter__)
    try:
        async with _admin(gateway) as client:
            with trio.fail_after(20):
                while len((await client.get("/status")).json()["workers"]) < 2:  # noqa: ASYNC110 - there is no event for it
                    await trio.sleep(0.05)
        yield gateway
    finally:
        await trio.to_thread.run_sync(running.__exit__, None, None, None)


async def _quiet(client: httpx2.AsyncClient, upstream: MeteredUpstream) -> None:
    """Waits until no call is in flight, at any worker."""
    with trio.fail_after(15):
        while upstream.busy or (await client.get("/status")).json()["streams"]["live"]:  # noqa: ASYNC110 - as above
            await trio.sleep(0.05)


async def _usage(client: httpx2.AsyncClient) -> dict[str, str]:
    """What each key has cost, as reported: once the workers, which write their records every few seconds, have written
    those of all calls."""
    with trio.fail_after(15):
        while True:
            ended = (await client.get("/status")).json()["totals"]["exchanges"]
            report = (await client.get("/v1/usage", params={"group_by": "key"})).json()
            if report["total"]["calls"] == ended:
                return {row["key"]: row["cost_usd"] for row in report["data"]}
            await trio.sleep(0.2)


def _rows(database: Path, query: str) -> list[dict[str, Any]]:
    connection = sqlite3.connect(database)
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute(query)]
    finally:
        connection.close()


def _most_at_once(upstream: MeteredUpstream, ended_at: dict[str, float], keys: Iterable[str]) -> int:
    """How many calls of some keys were in flight at once, at least: a call is from its arrival at the provider to its
    end there or in the gateway's record, whichever is earlier."""
    chosen = set(keys)
    moments: list[tuple[float, int]] = []
    for call in upstream.calls:
        if call.request_id.rpartition("-")[0] in chosen:
            ended = min(call.ended_at or time.time(), ended_at[call.request_id])
            if ended > call.began_at:
                moments += [(call.began_at, 1), (ended, -1)]
    now = most = 0
    for _, change in sorted(moments):
        now += change
        most = max(most, now)
    return most


async def test_a_thousand_calls(tmp_path: Path) -> None:
    """What each key has spent is the sum of its records, to the micro-dollar, and what its answers said; its limits
    held, within their bounds; afterwards nothing is reserved, and every key can use all it is allowed."""
    async with (
        open_metered_upstream() as upstream,
        _serving(configuration(upstream.url, tmp_path), tmp_path) as gateway,
        _admin(gateway) as client,
    ):
        began = time.monotonic()
        answered = await _storm(_port(gateway))
        took_s = time.monotonic() - began
        await _quiet(client, upstream)
        await _every_pair_is_free(_port(gateway))
        await _quiet(client, upstream)
        usage = await _usage(client)
        code, _ = await trio.to_thread.run_sync(gateway.stop)
        assert code == 0, gateway.log()
        faults = [line for line in gateway.log().splitlines() if "Traceback" in line or "internal_error" in line]
        assert faults == [], gateway.log()
    records = _rows(tmp_path / "trigate.db", "SELECT * FROM exchanges")
    storm = [record for record in records if not record["request_id"].startswith("probe-")]

    # each limit was reached, and refused with its own code
    codes = collections.Counter((kind_of(each.key), each.code) for each in answered if each.status == 429)
    assert set(codes) == set(CODES.items()), codes
    assert {each.status for each in answered} <= {0, 200, 400, 429, 500, 502}

    # every call has one record, and what was refused cost nothing
    assert len({record["request_id"] for record in storm}) == len(storm)
    arrived = {call.request_id for call in upstream.calls}
    assert len(arrived) == len(upstream.calls)
    assert [record for record in records if record["cost"] and record["request_id"] not in arrived] == []

    # complete answers cost what the provider counted, and said so
    by_request = {record["request_id"]: record for record in storm}
    texts = {call.request_id: call.text for call in upstream.calls}
    for request_id, text in texts.items():
        kind, prompt, completion, *_ = text.split()
        if not request_id.startswith("probe-") and by_request[request_id]["outcome"] == "complete" and kind == "ok":
            assert by_request[request_id]["cost"] == cost_of(int(prompt), int(completion)), by_request[request_id]
    for each in answered:
        if each.cost and each.text.startswith("ok"):
            _, prompt, completion, *_ = each.text.split()
            assert round(float(each.cost) * 1e6) == cost_of(int(prompt), int(completion))

    # spent = the sum of the records = the report, in each scope
    costs: collections.Counter[str] = collections.Counter()
    sums: collections.Counter[str] = collections.Counter()
    for record in records:
        cost = record["cost"] or 0
        costs[record["owner"]] += cost
        scopes = ["all", f"key:{record['owner']}"]
        scopes += [f"group:{record['key_group']}"] if record["key_group"] else []
        scopes += [f"upstream:{record['target'].partition('/')[0]}"] if record["target"] else []
        for scope in scopes:
            sums[scope] += cost
    assert usage == {key: f"{cost / 1e6:.6f}" for key, cost in costs.items()}
    query = "SELECT scope, sum(amount) AS amount FROM spent GROUP BY scope"
    spent = {row["scope"]: row["amount"] for row in _rows(tmp_path / "trigate.db", query)}
    assert spent == {scope: cost for scope, cost in sums.items() if cost}
    assert spent["all"] == spent["upstream:up"] > spent["group:crowd"]
    for key in KEYS:
        if kind_of(key) == "budget":
            assert spent[f"key:{key}"] <= BUDGET, key
    assert len({record["worker"] for record in storm}) == 2
    left = "SELECT name, amount FROM leases WHERE amount <> 0 AND name NOT LIKE '%/rpm' AND name NOT LIKE '%/tpm'"
    assert _rows(tmp_path / "trigate.db", left) == []  # what is left of a rate is the next worker's

    assert sum(costs[key] for key in KEYS if kind_of(key) == "budget") > 10 * BUDGET / 4  # what is held comes back

    # no limit was exceeded
    ended_at = {record["request_id"]: record["ended_at"] for record in records}
    assert _most_at_once(upstream, ended_at, [key for key in KEYS if kind_of(key) == "crowd"]) <= CROWD
    minutes = took_s / 60
    for key in KEYS:
        own = [call for call in upstream.calls if call.request_id.rpartition("-")[0] == key]
        if kind_of(key) == "pair":
            assert _most_at_once(upstream, ended_at, [key]) <= PAIR, key
        elif kind_of(key) == "rate":
            assert len(own) <= PER_MINUTE * (1 + minutes) + 1, key
        elif kind_of(key) == "tokens":
            served = [record for record in storm if record["owner"] == key and record["completion_tokens"]]
            used = sum(record["prompt_tokens"] + record["completion_tokens"] for record in served)
            assert used <= TOKENS_PER_MINUTE * (1 + minutes) + MAX_TOKENS + PROMPT_TOKENS, key


async def _every_pair_is_free(port: int) -> None:
    """Each key of two exchanges in flight can have two, and no third."""

    async def probe(key: str) -> None:
        with trio.fail_after(10):
            while True:
                statuses: list[int] = []

                async def stream(number: int, statuses: list[int] = statuses) -> None:
                    answered = await _held(port, key, number)
                    statuses.append(answered)

                async with trio.open_nursery() as nursery:
                    for number in range(PAIR + 1):
                        nursery.start_soon(stream, number)
                assert statuses.count(200) <= PAIR, (key, statuses)
                if statuses.count(200) == PAIR:
                    return
                await trio.sleep(0.2)

    async with trio.open_nursery() as nursery:
        for key in KEYS:
            if kind_of(key) == "pair":
                nursery.start_soon(probe, key)


async def _held(port: int, key: str, number: int) -> int:
    """Opens a stream, holds it for a moment, and returns its status."""
    body = json.dumps(
        {"model": "up/m", "stream": True, "messages": [{"role": "user", "content": "endless 1 1 1"}]}
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-request-id: probe-{key}-{number}\r\n"
    head += f"authorization: Bearer secret-of-{key}\r\nconnection: close\r\ncontent-type: application/json\r\n"
    async with await trio.open_tcp_stream("127.0.0.1", port) as connection:
        await connection.send_all(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        data = await connection.receive_some()
        await trio.sleep(0.5)
        return int(data.split()[1])


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_killed_worker_gives_back_what_it_held(tmp_path: Path, streamed: bool) -> None:
    """SIGKILL of a worker in the middle of a call: within five seconds its slot and its money are free again, but for
    what the call had cost, which is in the ledger."""
    config = f"""
[store]
path = "{tmp_path / "trigate.db"}"
[upstreams.up]
base_url = "URL"
models = ["m"]
[prices."up/m"]
input_usd = 1
output_usd = 4
[admin]
key = "{ADMIN}"
[keys.ada]
secret = "secret-of-ada"
max_exchanges = 1
budget_usd = "0.01"
budget_period = "total"
"""
    async with (
        open_metered_upstream() as upstream,
        _serving(config.replace("URL", upstream.url), tmp_path) as gateway,
        _admin(gateway) as client,
        trio.open_nursery() as nursery,
    ):
        text = "endless 1 1 1" if streamed else "ok 1 1 60000"
        ask = {"model": "up/m", "stream": streamed, "messages": [{"role": "user", "content": text}]}

        async def hold() -> None:
            headers = {"authorization": "Bearer secret-of-ada"}
            async with httpx2.AsyncClient(base_url=gateway.url, headers=headers, trust_env=False, timeout=60) as own:
                # holds 8 000 of 10 000 micro-dollars, until its worker is killed
                with pytest.raises(httpx2.TransportError):
                    await own.post("/v1/chat/completions", json={**ask, "max_tokens": 2000})

        async def try_again() -> tuple[int, str]:
            answered = await _call(_port(gateway), "ada", 0, "ok 1 1 1", stream=False, leaves_after_s=None, most=2000)
            return answered.status, answered.code

        nursery.start_soon(hold)
        with trio.fail_after(10):
            while not upstream.busy:  # noqa: ASYNC110 - there is no event for it
                await trio.sleep(0.02)
        assert await try_again() == (429, "concurrency_exceeded")
        workers = {worker["id"]: worker["pid"] for worker in (await client.get("/status")).json()["workers"]}
        [stream] = (await client.get("/status/streams")).json()["data"]
        os.kill(workers[stream["worker"]], signal.SIGKILL)
        began = time.monotonic()
        freed = trio.Event()

        async def try_until_freed() -> None:
            status, code = await try_again()
            if status == 200:
                freed.set()
            else:
                assert status == 429, code

        # one after another, without waiting for each: the connection that the killed worker had not accepted yet waits
        # for the next worker
        with trio.fail_after(20):
            while not freed.is_set():
                nursery.start_soon(try_until_freed)
                await trio.sleep(0.1)
        assert time.monotonic() - began < FREES_WITHIN_S
    rows = _rows(tmp_path / "trigate.db", "SELECT outcome FROM exchanges WHERE owner = 'ada' AND outcome = 'lost'")
    assert len(rows) == 1
