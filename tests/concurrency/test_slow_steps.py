"""Steps of tasks that hold the event loop."""

from __future__ import annotations

import time

import pytest
import trio

from tests.support.logs import Logs
from trigate.concurrency import slow_steps
from trigate.concurrency.slow_steps import SlowSteps


async def hold(seconds: float) -> None:
    """Holds the event loop."""
    time.sleep(seconds)  # noqa: ASYNC251 - this is what is tested
    await trio.lowlevel.checkpoint()


async def test_a_slow_step(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted, and logged with the name of its task once in a while; waiting is no step."""
    monkeypatch.setattr(slow_steps, "SLOW_S", 0.02)
    watch = SlowSteps()
    with watch.installed():
        await trio.sleep(0.03)
        assert watch.count == 0
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(hold, 0.025)
        await trio.lowlevel.checkpoint()
    [entry] = logs.named("slow_step")
    assert watch.count == 2
    assert entry["task"].endswith("hold")
    assert 0.025 <= entry["took_s"] < 1
    await hold(0.025)
    assert watch.count == 2  # it is not installed any more
