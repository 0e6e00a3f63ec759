"""``GET /metrics`` of real processes: two workers in one answer, and what a scrape and an idle worker cost."""

from __future__ import annotations

import http.client
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.status.test_scrape import Scraped
from tests.support.processes import SERVE, configuration, run_gateway
from tests.support.scripted_upstream import open_upstream

pytestmark = pytest.mark.slow


def ask(url: str, method: str, path: str, body: str | None = None, accept: str = "*/*") -> bytes:
    """Makes a request on a connection of its own; returns the body of the answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        connection.request(method, path, body, {"content-type": "application/json", "accept": accept})
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.read()
    finally:
        connection.close()


def test_two_workers(tmp_path: Path) -> None:
    """Each scrape has both workers, whichever answers, and all of their calls; no counter falls."""
    env = {"TRIGATE_STORE": str(tmp_path / "store.db")}
    call = '{"model": "mock/hello", "messages": [{"role": "user", "content": "Hi"}]}'
    with (
        open_upstream() as upstream,
        run_gateway(configuration(upstream), tmp_path, command=(*SERVE, "--workers", "2"), env=env) as gateway,
    ):
        give_up_at = time.monotonic() + 20
        while Scraped(ask(gateway.url, "GET", "/metrics")).value("trigate_workers") != 2:
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
        for _ in range(24):
            ask(gateway.url, "POST", "/v1/chat/completions", call)
        for accept in ("text/plain", "application/openmetrics-text"):
            found = Scraped(ask(gateway.url, "GET", "/metrics", accept=accept), openmetrics="open" in accept)
            assert found.value("trigate_scrape_missing_workers") == 0
            workers = found.values("process_resident_memory_bytes", "worker")
            calls = [found.value("trigate_exchanges_total", outcome="complete", worker=worker) for worker in workers]
            assert len(calls) == 2
            assert sum(each or 0 for each in calls) == 24
            assert min(each or 0 for each in calls) > 0
