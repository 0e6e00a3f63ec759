"""A gateway whose log nobody reads: a real process, a real pipe."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.support.processes import SERVE, configuration, environment
from tests.support.scripted_upstream import open_upstream

pytestmark = pytest.mark.slow

CHAT = {"model": "mock/hello", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


@contextlib.contextmanager
def _gateway(directory: Path, upstream: str) -> Iterator[tuple[str, int]]:
    """Runs a gateway with a small pipe as its standard error; yields its URL and the end of the pipe for reading."""
    config = directory / "trigate.toml"
    config.write_text(configuration(upstream), encoding="utf-8")
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen(
        SERVE, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=writing, env=environment(config)
    )
    os.close(writing)
    try:
        log = b""
        while (found := re.search(rb"(?i)listening on (https?://127\.0\.0\.1:[1-9]\d*)", log)) is None:
            data = os.read(reading, 4096)
            assert data, f"it did not start:\n{log.decode()}"
            log += data
        yield found[1].decode(), reading
    finally:
        process.terminate()
        process.wait(20)
        with contextlib.suppress(OSError):
            os.close(reading)


@pytest.mark.parametrize("is_closed", [False, True], ids=["full", "closed"])
def test_streams_flow_while_nobody_reads_the_log(tmp_path: Path, is_closed: bool) -> None:
    """The pipe is full after a dozen lines, or has no other end; streams go on, and so do refusals."""
    with open_upstream() as upstream, _gateway(tmp_path, upstream) as (url, reading):
        if is_closed:
            os.close(reading)
        with httpx2.Client(base_url=url, timeout=5, trust_env=False) as client:
            began_at = time.monotonic()
            for _ in range(100):
                assert client.post("/v1/chat/completions", json={"model": "none-such"}).status_code in (400, 404)
            with client.stream("POST", "/v1/chat/completions", json=CHAT) as answer:
                text = "".join(answer.iter_text())
            assert text.rstrip().endswith("data: [DONE]")
            assert time.monotonic() - began_at < 10
        if not is_closed:
            lines = b""
            while b" exchange " not in lines:
                lines += os.read(reading, 1 << 16)
            assert lines.count(b" refused ") + lines.count(b" exchange ") >= 100
