"""Limits of real processes: what a worker had is free soon after it was killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx2
import pytest
import trio

from tests.support.processes import run_gateway

pytestmark = pytest.mark.slow

BODY = {"model": "echo/echo", "messages": [{"role": "user", "content": "word " * 200}], "stream": True}


def _toml(store: Path) -> str:
    return f"""
[store]
path = "{store}"
[upstreams.echo]
kind = "echo"
words_per_s = 5
[allowance]
max_exchanges = 2
"""


async def test_a_killed_worker_frees_what_it_held(tmp_path: Path) -> None:
    """Two gateways share a store and a limit of two calls. One has both, and is killed: the other one serves two calls
    within five seconds."""
    store = tmp_path / "trigate.db"
    for name in "ab":
        (tmp_path / name).mkdir()
    env = {"TRIGATE_STORE": str(store)}
    with (
        run_gateway(_toml(store), tmp_path / "a", env=env) as a,
        run_gateway(_toml(store), tmp_path / "b", env=env) as b,
    ):
        async with httpx2.AsyncClient(timeout=20, trust_env=False) as client, trio.open_nursery() as nursery:
            begun = [trio.Event(), trio.Event()]

            async def hold(number: int) -> None:
                try:
                    async with client.stream("POST", f"{a.url}/v1/chat/completions", json=BODY) as answer:
                        assert answer.status_code == 200, await answer.aread()
                        async for _ in answer.aiter_bytes():
                            begun[number].set()
                except httpx2.TransportError:
                    pass  # the gateway was killed

            for number in range(2):
                nursery.start_soon(hold, number)
            for event in begun:
                await event.wait()
            refused = await client.post(f"{b.url}/v1/chat/completions", json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_exceeded")
            os.killpg(a.process.pid, signal.SIGKILL)
            killed_at = time.monotonic()
            while True:
                async with client.stream("POST", f"{b.url}/v1/chat/completions", json=BODY) as first:
                    if first.status_code == 200:
                        async with client.stream("POST", f"{b.url}/v1/chat/completions", json=BODY) as second:
                            assert second.status_code == 200
                        break
                    await first.aread()
                await trio.sleep(0.1)
            assert time.monotonic() - killed_at < 5
