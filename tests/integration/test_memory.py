"""The memory of a gateway process, as its users start it, under refused answers and refused uploads."""

from __future__ import annotations

import contextlib
import gzip
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.support.processes import Gateway, configuration, run_gateway
from tests.support.slow import FULL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

MIB = 1024 * 1024
SIZE = 400_000
BIG = b'{"choices":["' + b"a" * SIZE
CALLS = 1000 if FULL else 100
"""Of each kind. 1000 take two minutes."""
JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"a" * SIZE + b'"}}]}\n\n'


def _sized(body: bytes, more: bytes = b"", *, head: bytes = JSON, declared: int | None = None) -> bytes:
    length = len(body) if declared is None else declared
    return head + more + b"content-length: %d\r\n\r\n" % length + body


REFUSED = {
    "bomb": _sized(gzip.compress(bytes(40 * MIB), 1), b"content-encoding: gzip\r\n"),
    "cut": _sized(BIG, declared=2 * SIZE),
    "too large": _sized(BIG + BIG),
    "not JSON": _sized(BIG),
    "500": _sized(BIG, head=JSON.replace(b"200", b"500")),
    "400": _sized(b'{"error":{"message":"' + b"a" * SIZE + b'"}}', head=JSON.replace(b"200", b"400")),
    "large event": SSE + b"data: " + BIG + BIG,
    "error event": SSE + b'data: {"error":{"message":"' + b"a" * SIZE + b'"}}\n\n',
    "cut stream": SSE + EVENT + EVENT,
}


def resident_bytes(pid: int, name: str = "VmRSS") -> int:
    """The resident memory of a process; ``VmHWM`` = its highest value so far."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


async def _answer(stream: trio.SocketStream) -> None:
    """Answers one request with the answer that its ``user`` names, and closes the connection."""
    async with stream:
        received = b""
        while b"}]" not in received:
            received += await stream.receive_some() or b"}]"
        name = received.partition(b'"user": "')[2].partition(b'"')[0].decode()
        with contextlib.suppress(trio.BrokenResourceError):  # refused before its end
            await stream.send_all(REFUSED[name] if name else _sized(b'{"data":[{"id":"hello"}]}'))


async def _ask(gateway: Gateway, name: str) -> bytes:
    stream = await trio.open_tcp_stream("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    async with stream:
        call = {"user": name, "model": "default", "stream": REFUSED[name].startswith(SSE), "messages": [{"role": "u"}]}
        body = json.dumps(call).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        await stream.send_all(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        return b"".join([bytes(data) async for data in stream])


@asynccontextmanager
async def _open_upstream() -> AsyncIterator[str]:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, _answer, 0, host="127.0.0.1"))
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


async def test_memory_stays_flat_over_refused_answers(tmp_path: Path) -> None:
    """A hundred of each kind and more, of 400 KB and more each. The process runs with the collector's thresholds that
    `serve` sets, so nothing may wait for the collector."""
    limits = f"[limits]\nresponse_bytes = {SIZE + 100_000}\nevent_bytes = {SIZE + 100_000}\n"
    grown: dict[str, float] = {}
    async with _open_upstream() as url:
        with run_gateway(configuration(url, more=limits), tmp_path) as gateway:
            for name in REFUSED:  # what the first of a kind loads stays
                await _ask(gateway, name)
            before = resident_bytes(gateway.process.pid)
            for name in REFUSED:

                async def ask_many(name: str = name) -> None:
                    for _ in range(CALLS // 4):
                        answer = await _ask(gateway, name)
                        assert b'"error"' in answer, (name, answer[:300])

                async with trio.open_nursery() as nursery:
                    for _ in range(4):
                        nursery.start_soon(ask_many)
                grown[name] = round((resident_bytes(gateway.process.pid) - before) / MIB, 1)
    assert max(grown.values()) <= 32, grown


# -- uploads ----------------------------------------------------------------------------------------------------------

CHAT = "/v1/chat/completions"
GIB = 1024 * MIB
KEYED = """
[keys]
one = "key-number-one"
[hooks.signed]
verification = "github"
secrets = ["github-secret-of-24-bytes-or-more"]
"""
ROUTES = ("/v1/chat/completions", "/hooks/signed", "/status", "/health")
FRAMINGS = {
    "chunked": (b"transfer-encoding: chunked\r\n\r\n", b"10000\r\n" + bytes(65_536) + b"\r\n"),
    "one chunk": (b"transfer-encoding: chunked\r\n\r\n40000000\r\n", bytes(65_536)),
    "declared": (b"content-length: %d\r\n\r\n" % GIB, bytes(65_536)),
    "more than declared": (b"content-length: %d\r\n\r\n" % (8 * MIB), bytes(65_536)),
}


async def _upload(port: int, head: bytes, framing: str, statuses: Counter[int]) -> None:
    """Uploads up to 1 GiB, until the connection ends or 5 seconds are over."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    end, piece = FRAMINGS[framing]
    received = b""
    with trio.move_on_after(5):
        async with stream, trio.open_nursery() as nursery:

            async def read() -> None:
                nonlocal received
                try:
                    async for data in stream:
                        received += data
                except trio.BrokenResourceError:
                    pass
                nursery.cancel_scope.cancel()

            nursery.start_soon(read)
            try:
                await stream.send_all(head + end)
                for _ in range(GIB // 65_536):
                    await stream.send_all(piece)
            except trio.BrokenResourceError:
                await trio.sleep(0.5)
            nursery.cancel_scope.cancel()
    statuses[int(received[9:12] or 0)] += 1


async def _probe(port: int, delays: list[float]) -> None:
    while True:
        began = time.perf_counter()
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            assert b" 200 " in bytes(await stream.receive_some())
        delays.append(time.perf_counter() - began)
        await trio.sleep(0.05)


@pytest.mark.parametrize("route", ROUTES)
async def test_a_hundred_uploads_of_a_gibibyte(tmp_path: Path, route: str) -> None:
    """However they are framed, with a key and without one: the memory grows by 64 MiB at most, every client that waits
    for a status gets one, and ``/health`` is answered meanwhile."""
    is_whole = FULL or route == CHAT
    uploads_at_once = 100 if is_whole else 40
    with run_gateway(configuration("http://127.0.0.1:9", more=KEYED), tmp_path) as gateway:
        port = int(gateway.url.rpartition(":")[2])
        before = resident_bytes(gateway.process.pid)
        for framing in FRAMINGS if is_whole else ("chunked", "more than declared"):
            for key in (b"authorization: Bearer key-number-one\r\n", b""):
                head = b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" % route.encode()
                statuses: Counter[int] = Counter()
                delays: list[float] = []
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_probe, port, delays)
                    async with trio.open_nursery() as uploads:
                        for _ in range(uploads_at_once):
                            uploads.start_soon(_upload, port, head + key, framing, statuses)
                    nursery.cancel_scope.cancel()
                assert set(statuses) <= {0, 400, 401, 405, 413, 429, 503}, statuses
                assert statuses[0] <= uploads_at_once // 2, statuses
                # the clients of this test take most of a processor themselves, so a quarter of a second is the median's
                assert sorted(delays)[len(delays) // 2] < 0.25, (framing, sorted(delays)[-5:])
        grown = resident_bytes(gateway.process.pid, "VmHWM") - before
        assert grown <= 64 * MIB, f"{grown / MIB:.0f} MiB"
