"""``./scripts/soak --real``: a gateway in a process, on real sockets and with a store in a file, under mixed load.

The simulation (`world`) finds wrong answers; this finds what grows. Clients and providers do what they do in reality,
with faults far more often, and each of a few hundred models, sessions and keys occurs again and again: whatever is
remembered for one of them is remembered early. So memory may grow while that happens and while the caches of SQLite
fill, in the first half of the time. In the second half it must not, and at the end nothing is open.

The growth is the slope of a line through the samples of the second half (least squares), since a single sample depends
on the moment.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import socket
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import attrs
import httpx2
import trio

from bench.events import DONE
from tests.support.processes import Gateway, run_gateway
from tests.support.provider import content

CLIENTS = 8
SAMPLE_S = 0.5
SESSIONS = 50
WARM_REQUESTS = 10_000
"""After so many requests, all caches are full."""
MAX_GROWTH_BYTES = 2 * 1024 * 1024
"""How much the second half may add to the memory of the gateway, by the slope of its samples, if it is warm before."""
MAX_COLD_GROWTH_BYTES = 4 * 1024 * 1024
"""The same for a shorter soak, or a slower machine: SQLite's caches (two of 2 MiB) may fill."""
MAX_QUIET_DESCRIPTORS = 40
"""How many descriptors a gateway without calls may have open: its files, and idle connections to the upstreams."""
_ANSWER = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}
_CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_STREAM = (*(content(word) for word in ("One ", "two ", "three.")), DONE)
BEHAVIOURS = ("answer", "answer", "answer", "refuse", "fail", "cut", "reset", "garble", "slow", "gzip", "close")
STATUSES = {200, 202, 400, 404, 405, 409, 429, 502, 503, 504}
"""What a client may get."""

CONFIG = """
[limits]
first_token_timeout_s = 2
idle_timeout_s = 2
[breaker]
failures = 0
failure_rate = 0
[store]
path = "{store}"
[sessions]
history_messages = 8
[upstreams.a]
base_url = "{url}"
models = ["m"]
[upstreams.b]
base_url = "{url}"
models = ["m"]
[models.default]
targets = ["a/m", "b/m"]
[models.hedged]
targets = ["a/m", "b/m"]
strategy = "hedge"
[models.shared]
targets = ["a/m", "b/m"]
coalesce = true
[hooks.h]
rate_per_s = 0
session = "none"
"""


class SoakFailed(Exception):
    """Something that must hold did not; the message says what."""


@attrs.frozen
class Sample:
    """The gateway at one moment.

    Attributes:
        at_s: Seconds since the start of the load.
        memory_bytes: Its resident memory.
        descriptors: How many it has open.
    """

    at_s: float
    memory_bytes: int
    descriptors: int


@attrs.frozen
class Report:
    """What a soak has found.

    Attributes:
        calls: How many requests were sent.
        outcomes: How often each outcome occurred.
        samples: In their order.
        growth_bytes: The growth in the second half, by the slope of its samples.
    """

    calls: int
    outcomes: Counter[str]
    samples: Sequence[Sample]
    growth_bytes: float

    def __str__(self) -> str:
        last = self.samples[-1]
        hourly = self.growth_bytes / (last.at_s / 2) * 3600
        return (
            f"{self.calls} requests in {last.at_s:.0f} s, {last.memory_bytes / 2**20:.1f} MiB; second half: "
            f"{self.growth_bytes / 2**20:+.2f} MiB, {hourly / 2**20:+.1f} MiB/h"
        )


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Returns the slope of the line through these points, by least squares.

    >>> slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)])
    2.0
    """
    count = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def growth_bytes(samples: Sequence[Sample]) -> float:
    """Returns the growth of the memory in the second half of the time, by the slope of its samples."""
    half_s = samples[-1].at_s / 2
    return slope([(each.at_s, each.memory_bytes) for each in samples if each.at_s >= half_s]) * half_s


def sample(pid: int, at_s: float) -> Sample:
    """Takes a sample of a process."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return Sample(at_s, pages * os.sysconf("SC_PAGESIZE"), len(os.listdir(f"/proc/{pid}/fd")))


# -- providers --------------------------------------------------------------------------------------------------------


async def _provide(chance: random.Random, stream: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async with stream:
            data = b""
            while True:
                while b"\r\n\r\n" not in data:
                    data += (piece := bytes(await stream.receive_some()))
                    if not piece:
                        return
                head, _, data = data.partition(b"\r\n\r\n")
                found = re.search(rb"(?i)content-length: (\d+)", head)
                while found is not None and len(data) < int(found[1]):
                    data += (piece := bytes(await stream.receive_some()))
                    if not piece:
                        return
                size = int(found[1]) if found is not None else 0
                body, data = data[:size], data[size:]
                if not await _answer(chance.choice(BEHAVIOURS), b'"stream":true' in body, stream):
                    return


async def _answer(behaviour: str, streamed: bool, stream: trio.SocketStream) -> bool:
    """Answers one request; returns whether the connection goes on."""
    body = json.dumps(_ANSWER).encode()
    events = [b"%x\r\n%b\r\n" % (len(event), event) for event in _STREAM]
    head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n"
    match behaviour:
        case "refuse" | "fail":
            error = b'{"error":{"message":"no","type":"x","param":null,"code":"x"}}'
            await stream.send_all(head % (400 if behaviour == "refuse" else 503, len(error), b"") + error)
            return True
        case "cut" | "reset":
            whole = _CHUNKED + events[0] if streamed else head % (200, len(body), b"") + body[:20]
            await stream.send_all(whole)
            if behaviour == "reset":
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        case "garble":
            await stream.send_all(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
            return False
        case "gzip" if not streamed:
            packed = gzip.compress(body)
            await stream.send_all(head % (200, len(packed), b"content-encoding: gzip\r\n") + packed)
            return True
        case "close":
            return False
    if not streamed:
        await stream.send_all(head % (200, len(body), b"") + body)
        return True
    await stream.send_all(_CHUNKED)
    for event in events:
        await stream.send_all(event)
        if behaviour == "slow":
            await trio.sleep(0.02)
    await stream.send_all(b"0\r\n\r\n")
    return True


# -- clients ----------------------------------------------------------------------------------------------------------


async def _ask(client: httpx2.AsyncClient, chance: random.Random) -> str:
    """Makes one request of a random kind; returns its outcome.

    Raises:
        SoakFailed: The answer is none that a client may get.
    """
    model = chance.choice(["default", "hedged", "shared", "a/m", f"a/m{chance.randrange(200)}", "nobody/m"])
    call: dict[str, object] = {"model": model, "messages": [{"role": "user", "content": f"Hi {chance.randrange(100)}"}]}
    headers = {"x-session-key": f"s{chance.randrange(SESSIONS)}"} if chance.random() < 0.2 else {}
    kind = chance.choice(["plain"] * 3 + ["stream"] * 3 + ["leave", "leave", "bad", "hook", "status", "models"])
    match kind:
        case "stream" | "leave":
            call["stream"] = True
            async with client.stream("POST", "/v1/chat/completions", json=call, headers=headers) as got:
                if kind == "leave":
                    return "left"
                data = await got.aread()
            if got.status_code == 200 and not (data.endswith(DONE) or b'data: {"error":' in data):
                raise SoakFailed(f"a stream ended without [DONE] and without an error: {data[-300:]!r}")
        case "plain":
            got = await client.post("/v1/chat/completions", json=call, headers=headers)
        case "bad":
            got = await client.post("/v1/chat/completions", content=chance.randbytes(200), headers=headers)
        case "hook":
            got = await client.post("/hooks/h", json={"text": "Hi"})
        case _:
            got = await client.get("/status" if kind == "status" else "/v1/models")
    if got.status_code not in STATUSES | {415}:
        raise SoakFailed(f"{kind}: {got.status_code} {got.text[:300]}")
    return f"{kind} {got.status_code}"


async def _run(
    gateway: Gateway, upstream: list[trio.SocketListener], chance: random.Random, duration_s: float
) -> Report:
    outcomes: Counter[str] = Counter()
    samples: list[Sample] = []
    began = time.monotonic()

    async def talk(seed: int) -> None:
        own = random.Random(seed)
        async with httpx2.AsyncClient(base_url=gateway.url, timeout=20.0, trust_env=False, verify=False) as client:
            while time.monotonic() - began < duration_s:
                outcomes[await _ask(client, own)] += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, partial(_provide, chance), upstream)
        async with trio.open_nursery() as clients:
            for _ in range(CLIENTS):
                clients.start_soon(talk, chance.getrandbits(32))
            while (at_s := time.monotonic() - began) < duration_s:
                samples.append(sample(gateway.process.pid, at_s))
                await trio.sleep(SAMPLE_S)
        await _check_quiet(gateway)
        nursery.cancel_scope.cancel()
    return Report(sum(outcomes.values()), outcomes, samples, growth_bytes(samples))


async def _check_quiet(gateway: Gateway) -> None:
    """Checks that nothing is left of the calls.

    Raises:
        SoakFailed: Something is.
    """
    async with httpx2.AsyncClient(base_url=gateway.url, trust_env=False, verify=False) as client:
        for _ in range(100):
            status = (await client.get("/status")).json()
            left = status["streams"]["live"] + sum(each["in_flight"] for each in status["upstreams"])
            if not left:
                break
            await trio.sleep(0.1)
        else:
            raise SoakFailed(f"{left} calls are in flight after the last client has left")
        if status["ledger"]["error"] is not None:
            raise SoakFailed(f"the ledger: {status['ledger']['error']}")
        found = sample(gateway.process.pid, 0.0)
        if found.descriptors > MAX_QUIET_DESCRIPTORS:
            raise SoakFailed(f"{found.descriptors} descriptors are open after the last client has left")


def soak(duration_s: float, seed: int, *, note: Callable[[str], None] = lambda line: None) -> Report:
    """Runs a gateway under load, and ends it.

    Args:
        duration_s: How long the load lasts.
        seed: Of the load. (The moments are those of real clocks, so it is not repeated exactly.)
        note: Takes a line about the result.

    Raises:
        SoakFailed: Something that must hold did not.
    """
    chance = random.Random(seed)
    listening = socket.create_server(("127.0.0.1", 0), backlog=100)
    listening.setblocking(False)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    with tempfile.TemporaryDirectory(prefix="soak") as place:
        config = CONFIG.format(store=Path(place) / "trigate.db", url=url)
        with run_gateway(config, Path(place)) as gateway:
            upstream = [trio.SocketListener(trio.socket.from_stdlib_socket(listening))]
            report = trio.run(_run, gateway, upstream, chance, duration_s)
            note(str(report))
            some = report.samples[:: len(report.samples) // 30 or 1]
            note("MiB: " + " ".join(f"{each.memory_bytes / 2**20:.1f}" for each in some))
            code, took_s = gateway.stop()
            log = gateway.log()
    if found := re.search(r"(?m)^.*(Traceback|\[error ).*$", log):
        raise SoakFailed(f"the log has an error: {found[0]}")
    if code != 0 or took_s > 10:
        raise SoakFailed(f"the gateway ended with {code} after {took_s:.1f} s")
    is_warm = report.calls >= 2 * WARM_REQUESTS
    if report.growth_bytes > (MAX_GROWTH_BYTES if is_warm else MAX_COLD_GROWTH_BYTES):
        raise SoakFailed(f"memory grows: {report}")
    return report
