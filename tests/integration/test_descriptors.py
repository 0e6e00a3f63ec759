"""Shortages of file descriptors in a process as people start it, and what it imports when it is too late for that."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import trio

from tests.support.processes import SERVE, Gateway, run_gateway

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

KEY = "a-key-of-thirty-two-characters-.."
CONFIG = f"""
[keys]
ada = "{KEY}"
[upstreams.echo]
kind = "echo"
words_per_s = 0
[upstreams.slow]
kind = "echo"
words_per_s = 20
[models.default]
targets = ["echo/echo"]
"""
BODY = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}
LONG = {"model": "slow/echo", "stream": True, "messages": [{"role": "user", "content": "one two three " * 5}]}


def _limited(limit: int) -> list[str]:
    """The command that serves with at most this many descriptors."""
    return ["/bin/sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *SERVE]


@contextlib.contextmanager
def _silent(url: str, count: int) -> Iterator[list[socket.socket]]:
    """Connects and says nothing."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            found.append(stack.enter_context(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 5)))
        yield found


def _call(gateway: Gateway) -> int:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=gateway.url, timeout=5.0, headers=headers) as client:
        return client.post("/v1/chat/completions", json=BODY).status_code


@pytest.mark.parametrize(("limit", "silent"), [(64, 150), (1024, 1044)])
def test_silent_strangers(limit: int, silent: int, tmp_path: Path) -> None:
    """More silent connections than there are descriptors, after one call, whose record is written seconds later: calls
    are served all the time, and the log has at most a line a second about it."""
    store = tmp_path / "a.db"
    with run_gateway(CONFIG, tmp_path, command=_limited(limit), env={"TRIGATE_STORE": str(store)}) as gateway:
        assert _call(gateway) == 200
        began = time.monotonic()
        with _silent(gateway.url, silent):
            while time.monotonic() - began < 6.5:
                assert _call(gateway) == 200
                time.sleep(0.5)
            took_s = time.monotonic() - began
            assert store.exists()
        assert _call(gateway) == 200
        with httpx2.Client(base_url=gateway.url, headers={"authorization": f"Bearer {KEY}"}) as client:
            status = client.get("/status").json()
        assert status["store"]["state"] == "open"
        assert status["ledger"]["error"] is None
        log = gateway.log()
        assert 1 <= log.count("connection_limit") <= took_s + 1
        assert not re.search("error  |Traceback", log), log
        assert gateway.stop()[0] == 0


def test_more_streams_than_descriptors(tmp_path: Path) -> None:
    """Each of 150 streams is whole, or refused with 503 and a time to try again, or closed before an answer. Then the
    gateway serves within a second."""
    outcomes: list[str] = []

    async def stream(url: str) -> None:
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx2.AsyncClient(base_url=url, timeout=20.0, headers=headers) as client:
            try:
                async with client.stream("POST", "/v1/chat/completions", json=LONG) as answer:
                    data = await answer.aread()
            except httpx2.TransportError as error:
                outcomes.append(type(error).__name__)
                return
        if answer.status_code == 200:
            outcomes.append("whole" if data.endswith(b"data: [DONE]\n\n") else f"cut: {data[-200:]!r}")
        else:
            code = json.loads(data)["error"]["code"]
            outcomes.append(f"{answer.status_code} {code} {'retry-after' in answer.headers}")

    async def streams(url: str) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(150):
                nursery.start_soon(stream, url)

    store = str(tmp_path / "a.db")
    with run_gateway(CONFIG, tmp_path, command=_limited(64), env={"TRIGATE_STORE": store}) as gateway:
        trio.run(streams, gateway.url)
        allowed = {"whole", "503 overloaded True", "ReadError", "RemoteProtocolError", "ConnectError", "WriteError"}
        assert set(outcomes) <= allowed
        assert "whole" in outcomes
        give_up_at = time.monotonic() + 1.0
        while _call(gateway) != 200:
            assert time.monotonic() < give_up_at
            time.sleep(0.02)
        assert not re.search("error  |Traceback", gateway.log()), gateway.log()
        assert gateway.stop()[0] == 0


_NOTE_IMPORTS = """
import sys
from trigate.cli.commands import main
from trigate.server import server

class Log:
    def __init__(self, log): self.log = log
    def __getattr__(self, name): return getattr(self.log, name)
    def info(self, event, **values):
        self.log.info(event, **values)
        if event.startswith("Listening"):
            sys.addaudithook(lambda event, values: event == "import" and print("imported", values[0], flush=True))

server.log = Log(server.log)
main()
"""


def test_nothing_is_imported_later(tmp_path: Path) -> None:
    """Calls, their failures, sessions, webhooks, callbacks, reloads and the end of a gateway import nothing. Only the
    control plane does, at its first request."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    config = f"""
        [upstreams.named]
        base_url = "http://localhost:{port}/v1"
        models = ["m"]
        [upstreams.unknown]
        base_url = "http://unknown.invalid/v1"
        models = ["m"]
        [upstreams.tls]
        base_url = "https://127.0.0.1:{port}/v1"
        models = ["m"]
        [upstreams.echo]
        kind = "echo"
        words_per_s = 0
        [models.fallback]
        targets = ["named/m", "unknown/m", "tls/m", "echo/echo"]
        [models.default]
        targets = ["echo/echo"]
        [hooks.plain]
        expressions = {{ text = "a.b" }}
        template = "{{text}}"
        session = "none"
        [hooks.callback]
        session = "none"
        reply = "callback"
        callback_url = "https://localhost:{port}/"
        callback_secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
        callback_private = true
    """
    command = [sys.executable, "-c", _NOTE_IMPORTS, "serve", "--port", "0"]
    env = {"TRIGATE_STORE": str(tmp_path / "a.db")}
    with (
        run_gateway(config, tmp_path, command=command, env=env) as gateway,
        httpx2.Client(base_url=gateway.url, timeout=10.0) as client,
    ):
        for model in ("default", "named/m", "unknown/m", "tls/m", "fallback", "nothing"):
            for stream in (False, True):
                client.post("/v1/chat/completions", json={**BODY, "model": model, "stream": stream})
        client.post("/v1/chat/completions", json=BODY, headers={"x-session-key": "k"})
        for bad in (b"{", b"\xff", b"[" * 100_000):
            for path in ("/v1/chat/completions", "/hooks/plain"):
                client.post(path, content=bad, headers={"content-type": "application/json"})
        assert client.post("/hooks/plain", json={"a": {"b": "Hi"}}).status_code == 200
        assert client.post("/hooks/callback", json={"text": "Hi"}).status_code == 202
        os.kill(gateway.process.pid, signal.SIGHUP)
        (tmp_path / "trigate.toml").write_text("x =")
        time.sleep(6.5)  # the file is seen, and the ledger has written its records
        assert "reload_refused" in gateway.log()
        assert gateway.stop()[0] == 0
        assert re.findall("^imported .*", gateway.log(), re.M) == []
