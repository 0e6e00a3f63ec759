"""A worker that is killed at any point gives back all it held within five seconds, and no cost is lost or counted
twice."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import time
from pathlib import Path

import httpx2
import pytest
import trio

from tests.support.killed_gateway import POINTS
from tests.support.metered_upstream import open_metered_upstream
from tests.support.processes import Gateway, run_gateway
from trigate.ledger.journal import journals

pytestmark = pytest.mark.slow

FREES_WITHIN_S = 5.0
COST = 13
"""Of the call of the killed worker, in micro-dollars: 1 token of its prompt, and 3 of its answer."""
BUDGET = 10_000
HELD = 4_000
"""About what a call holds of the budget: so two fit, if nothing else is held."""


def _configuration(upstream: str, store: Path, *, slots: int) -> str:
    return f"""
[store]
path = "{store}"
[limits]
max_exchanges = {slots}
[upstreams.up]
base_url = "{upstream}"
models = ["m"]
[prices."up/m"]
input_usd = 1
output_usd = 4
[keys.ada]
secret = "secret-of-ada"
max_exchanges = 2
rpm = 1000
budgets = {{ day = "0.0{BUDGET}", total = "0.0{BUDGET}" }}
[keys.bob]
secret = "secret-of-bob"
"""


async def _call(gateway: Gateway, text: str, *, stream: bool = False, key: str = "ada") -> int:
    """Makes a call; returns its status, or 0 if it got no answer."""
    asked = {"model": "up/m", "stream": stream, "max_tokens": HELD // 4}
    async with httpx2.AsyncClient(timeout=20, trust_env=False) as client:
        with contextlib.suppress(httpx2.TransportError):
            answer = await client.post(
                f"{gateway.url}/v1/chat/completions",
                json={**asked, "messages": [{"role": "user", "content": text}]},
                headers={"authorization": f"Bearer secret-of-{key}"},
            )
            return answer.status_code
    return 0


async def _pair(gateway: Gateway, took_ms: int) -> list[int]:
    """Makes two calls at once; returns their statuses."""
    statuses: list[int] = []

    async def one() -> None:
        statuses.append(await _call(gateway, f"ok 1 3 {took_ms}"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        nursery.start_soon(one)
    return statuses


@pytest.mark.parametrize("point", POINTS)
async def test_killed_at(tmp_path: Path, point: str) -> None:
    """Two workers share a store. One kills itself at a point, and soon the other one has every limit for itself."""
    store = tmp_path / "trigate.db"
    for name in "ab":
        (tmp_path / name).mkdir()
    command = (sys.executable, "-m", "tests.support.killed_gateway", point, "serve", "--port", "0")
    env = {"TRIGATE_STORE": str(store)}

    async with open_metered_upstream() as upstream, contextlib.AsyncExitStack() as running:

        async def start(name: str) -> Gateway:
            toml = _configuration(upstream.url, store, slots=1 if name == "a" and point == "queued" else 100)
            process = (
                run_gateway(toml, tmp_path / name, command=command, env=env)
                if name == "a"
                else run_gateway(toml, tmp_path / name, env=env)
            )
            gateway = await trio.to_thread.run_sync(process.__enter__)
            running.push(lambda *exc: process.__exit__(None, None, None))
            return gateway

        if point == "returned":  # the one that is killed has all leases
            a = await start("a")
            assert await _call(a, "ok 1 3 1") == 200
            b = await start("b")
        else:
            b = await start("b")
            assert await _call(b, "ok 1 3 1") == 200
            a = await start("a")
        async with trio.open_nursery() as nursery:
            if point == "queued":
                nursery.start_soon(lambda: _call(a, "endless 1 1 1", stream=True, key="bob"))
                await trio.sleep(0.5)
            if point == "asked":  # nothing is left for it
                nursery.start_soon(_pair, b, 2000)
                await trio.sleep(0.5)
            with trio.fail_after(20):
                while a.process.poll() is None:
                    await _call(b if point == "returned" else a, "ok 1 3 1")
                    await trio.sleep(0.02)
            killed_at = time.monotonic()
            if point == "asked":
                await trio.sleep(1.6)  # until the two calls have ended
            with trio.fail_after(20):
                # longer than a call waits for a lease: they are served at the same time
                while await _pair(b, 600) != [200, 200]:  # noqa: ASYNC110 - there is no event for it
                    await trio.sleep(0.05)
            assert time.monotonic() - killed_at < FREES_WITHIN_S
        code, _ = await trio.to_thread.run_sync(b.stop)
        assert code == 0, b.log()
        assert "Traceback" not in b.log()

    with contextlib.closing(sqlite3.connect(store)) as db:
        records = list(db.execute("SELECT worker, outcome, cost, request_id FROM exchanges WHERE owner = 'ada'"))
        [[spent]] = db.execute("SELECT sum(amount) FROM spent WHERE scope = 'key:ada'")
        assert spent == sum(cost or 0 for _, _, cost, _ in records)
        assert {outcome for _, outcome, _, _ in records} <= {
            "complete",
            "lost",
            "concurrency_exceeded",
            "rate_limit_exceeded",
            "insufficient_quota",
        }
        assert {cost for _, outcome, cost, _ in records if outcome == "complete"} == {COST}
        served = sum(call.text.startswith("ok") for call in upstream.calls)
        ended = [outcome for _, outcome, _, _ in records]
        complete, lost = ended.count("complete"), ended.count("lost")
        # the upstream may have answered a call that was in flight when its worker was killed
        assert complete <= served <= complete + lost, "each call is billed, once"
        left = "SELECT * FROM leases WHERE amount > 0 AND name NOT LIKE '%/rpm'"
        assert list(db.execute(left)) == []
    assert journals(str(store)) == [], "they are in the store"
