"""Keys over real sockets and with several workers."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.processes import SERVE, configuration, run_gateway
from tests.support.scripted_upstream import open_upstream

pytestmark = pytest.mark.slow

ADMIN = "the-key-of-the-admin"
CONNECTIONS = 8


class Connection:
    """A connection that is kept open."""

    def __init__(self, url: str, key: str) -> None:
        self._http = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Makes a request; returns the status and the JSON of the answer."""
        self._http.request(method, path, json.dumps(body) if body is not None else None, self._headers)
        answer = self._http.getresponse()
        return answer.status, json.loads(answer.read())

    def stream(self) -> http.client.HTTPResponse:
        """Begins a stream without an end."""
        call = {"model": "mock/endless", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
        self._http.request("POST", "/v1/chat/completions", json.dumps(call), self._headers)
        return self._http.getresponse()

    def close(self) -> None:
        self._http.close()


@contextlib.contextmanager
def connections(url: str, key: str, count: int) -> Iterator[list[Connection]]:
    """Some connections, which the workers share."""
    made = [Connection(url, key) for _ in range(count)]
    try:
        yield made
    finally:
        for each in made:
            each.close()


def test_a_revoked_key_is_refused_by_every_worker(tmp_path: Path) -> None:
    """Within a second, on connections that have used it, and its streams end with an error event that says so."""
    command = (*SERVE, "--workers", "2")
    env = {"TRIGATE_STORE": str(tmp_path / "store.db"), "TRIGATE_ADMIN_KEY": ADMIN}
    with (
        open_upstream() as upstream,
        run_gateway(configuration(upstream), tmp_path, command=command, env=env) as gateway,
        connections(gateway.url, ADMIN, 1) as [admin],
    ):
        status, made = admin.ask("POST", "/v1/keys", {"name": "eve"})
        assert status == 200, made
        with (
            connections(gateway.url, made["secret"], CONNECTIONS) as kept,
            connections(gateway.url, made["secret"], CONNECTIONS) as streaming,
        ):
            give_up_at = time.monotonic() + 1.0
            for each in kept:
                while (answer := each.ask("GET", "/v1/sessions"))[0] != 200:
                    assert time.monotonic() < give_up_at, answer
                    time.sleep(0.02)
            streams = [each.stream() for each in streaming]
            assert [stream.status for stream in streams] == [200] * CONNECTIONS
            workers = admin.ask("GET", "/status")[1]["workers"]
            assert len(workers) == 2
            assert admin.ask("DELETE", "/v1/keys/eve")[0] == 200
            revoked_at = time.monotonic()
            for each in kept:
                while each.ask("GET", "/v1/sessions")[0] != 401:
                    time.sleep(0.02)
            rest = [stream.read() for stream in streams]
            assert time.monotonic() - revoked_at < 1.0
            for body in rest:
                last = body.rstrip(b"\n").rpartition(b"\n")[2]
                assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "key_revoked"
                assert b"[DONE]" not in body
