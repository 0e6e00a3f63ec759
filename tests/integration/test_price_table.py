"""Newer prices, in the workers of a real gateway."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.processes import SERVE, run_gateway

pytestmark = pytest.mark.slow


def write(file: Path, rate: float) -> None:
    model = {"id": "m", "match": {"equals": "m"}, "prices": {"input_mtok": rate}}
    data = json.dumps([{"id": "p", "api_pattern": "http://127", "models": [model]}])
    new = file.with_suffix(".new")
    new.write_text(data, encoding="utf-8")
    new.replace(file)


def prices_when(client: httpx2.Client, holds: Any) -> Any:
    """What the status says of the prices of both workers, once that is so."""
    give_up_at = time.monotonic() + 30
    while True:
        status = client.get("/status").json()
        if len(status["workers"]) == 2 and holds(status["prices"]):
            return status["prices"]
        assert time.monotonic() < give_up_at, status["prices"]
        time.sleep(0.1)


def test_all_workers_have_the_newer_prices(tmp_path: Path) -> None:
    """At the start, and after SIGHUP, which reaches each worker. A file that is no table changes nothing."""
    file = tmp_path / "prices.json"
    write(file, 1)
    config = f"""
        [server]
        workers = 2
        [upstreams.up]
        base_url = "http://127.0.0.1:9/v1"
        models = ["m"]
        [price_table]
        file = {json.dumps(str(file))}
    """
    env = {"TRIGATE_STORE": str(tmp_path / "a.db")}
    with (
        run_gateway(config, tmp_path, command=SERVE, env=env) as gateway,
        httpx2.Client(base_url=gateway.url, timeout=10.0) as client,
    ):

        def is_one(prices: Any) -> bool:
            return prices["source"].startswith(str(file)) and "; " not in prices["source"]

        first = prices_when(client, is_one)
        write(file, 2)
        gateway.process.send_signal(signal.SIGHUP)
        second = prices_when(client, lambda prices: is_one(prices) and prices["source"] != first["source"])
        file.write_text("[]", encoding="utf-8")
        gateway.process.send_signal(signal.SIGHUP)
        third = prices_when(client, lambda prices: prices["refresh_error"] is not None)
        assert third["source"] == second["source"]
        assert gateway.stop()[0] == 0
