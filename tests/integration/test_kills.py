"""A thousand clients that are killed at random moments, on real sockets: nothing stays behind."""

from __future__ import annotations

import collections
import gc
import json
import os
import random
import socket
import struct
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest
import trio

from tests.support.slow import FULL
from trigate.asgi.application import create_app
from trigate.config.sections import Port
from trigate.config.structure import structure
from trigate.gateway.gateway import open_gateway
from trigate.server import server
from trigate.server.listeners import open_sockets
from trigate.upstream.factory import http_transport

CLIENTS = 1000 if FULL else 300
AT_ONCE = 50
EVENTS = 30
SEED = 20_261_127

pytestmark = pytest.mark.slow


class Upstream:
    """A provider that sends an event every few milliseconds.

    Attributes:
        open_now: Its connections that are in a request and that the gateway has not closed.
    """

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.busy = 0
        self.requests = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answers requests on a connection until it is closed."""
        data = b""
        try:
            while True:
                while b"\r\n\r\n" not in data:
                    more = await stream.receive_some(65536)
                    if not more:
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                while len(data) < length:
                    data += await stream.receive_some(65536)
                call, data = json.loads(data[:length]), data[length:]
                self.requests += 1
                self.busy += 1
                try:
                    await (self._stream if call["stream"] else self._answer)(stream)
                finally:
                    self.busy -= 1
        except trio.BrokenResourceError:
            return

    async def _pause(self) -> None:
        await trio.sleep(self._chance.random() * 0.004)

    async def _answer(self, stream: trio.SocketStream) -> None:
        for _ in range(EVENTS // 2):
            await self._pause()
        body = b'{"id":"c","object":"chat.completion","model":"m","choices":[{"index":0,"message":{"role":"assistant",'
        body += b'"content":"a"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1}}'
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        await stream.send_all(head + body)

    async def _stream(self, stream: trio.SocketStream) -> None:
        await self._pause()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        await stream.send_all(head)
        for number in range(EVENTS):
            await self._pause()
            end = b'"stop"' if number == EVENTS - 1 else b"null"
            event = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'
            event += b'"delta":{"content":"word "},"finish_reason":%s}]}\n\n' % end
            await stream.send_all(b"%x\r\n%s\r\n" % (len(event), event))
        await stream.send_all(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


async def _killed_client(chance: random.Random, port: int, number: int, outcomes: collections.Counter[str]) -> None:
    """Makes a request and closes or resets the connection, after a random time or number of bytes."""
    body = json.dumps(
        {"model": "up/m", "stream": chance.random() < 0.8, "messages": [{"role": "user", "content": "Hi"}]}
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-request-id: kill-{number}\r\n"
    )
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(head.encode() + body)
        if chance.random() < 0.5:
            await trio.sleep(chance.random() * EVENTS * 0.003)
            outcomes["after a while"] += 1
        else:
            remaining = chance.randrange(1, EVENTS * 170)
            while remaining > 0 and (data := await stream.receive_some(remaining)):
                remaining -= len(data)
            outcomes["after some bytes"] += 1
            if chance.random() < 0.5:  # the next packet is a reset
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _descriptors() -> int:
    gc.collect()
    return len(os.listdir(f"/proc/{os.getpid()}/fd")) if os.path.exists("/proc") else 0


@attrs.frozen
class Baseline:
    """The resources of an idle gateway."""

    descriptors: int
    tasks: int


def _at_rest(idle: int) -> Baseline:
    """The resources besides idle connections, of which each has two ends and one task of the provider."""
    return Baseline(_descriptors() - 2 * idle, trio.lowlevel.current_statistics().tasks_living - idle)


async def test_hundreds_of_clients_are_killed(tmp_path: Path) -> None:
    """Afterwards the pool, the file descriptors and the tasks are as before, and each has its record."""
    chance = random.Random(SEED)
    provider = Upstream(chance)
    outcomes: collections.Counter[str] = collections.Counter()
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, provider.serve, 0, host="127.0.0.1"))
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/v1"
        config = structure(
            {"upstreams": {"up": {"base_url": url, "models": ["m"]}}, "store": {"path": str(tmp_path / "a.db")}},
            env={},
            source="test",
        )
        app: Any = create_app(opener=lambda: open_gateway(config, env={}, transports=http_transport))
        listening = open_sockets(attrs.evolve(config.server, port=Port(0)))
        [base] = await nursery.start(partial(server.serve, app, config.server, sockets=listening))
        port = httpx2.URL(base).port
        assert port is not None
        gateway = app.gateway
        transport = gateway.generations.current.upstreams["up"].transport

        async def many(count: int, first: int) -> None:
            limit = trio.CapacityLimiter(AT_ONCE)

            async def run_client(number: int) -> None:
                async with limit:
                    await _killed_client(chance, port, number, outcomes)

            async with trio.open_nursery() as clients:
                for number in range(first, first + count):
                    clients.start_soon(run_client, number)

        async def quiet() -> None:
            with trio.fail_after(10):
                while gateway.live or provider.busy:  # noqa: ASYNC110 - there is no event for it
                    await trio.sleep(0.01)
                while transport.statistics().open != transport.statistics().idle:  # noqa: ASYNC110 - as above
                    await trio.sleep(0.01)

        async def settled() -> Baseline:
            """The resources once they no longer change."""
            await quiet()
            seen = [_at_rest(transport.statistics().idle)]
            with trio.move_on_after(10):
                while len(seen) < 10 or len(set(seen[-10:])) > 1:
                    await trio.sleep(0.05)
                    seen.append(_at_rest(transport.statistics().idle))
            return seen[-1]

        await many(20, -20)  # objects that are made once are made before the baseline: the store, threads
        await gateway.ledger.flush()
        before = await settled()
        await many(CLIENTS, 0)
        assert await settled() == before
        upstream = gateway.generations.current.upstreams["up"].statistics()
        assert (upstream.in_flight, upstream.queued, len(gateway.live)) == (0, 0, 0)
        assert min(outcomes.values()) > CLIENTS / 3
        async with httpx2.AsyncClient(base_url=base, trust_env=False) as client:
            records: list[dict[str, Any]] = []
            while True:
                query = f"?limit=1000{'&after=' + records[-1]['id'] if records else ''}"
                page = (await client.get(f"/v1/exchanges{query}")).json()
                records += page["data"]
                if not page["has_more"]:
                    break
            seen = collections.Counter(each["request_id"] for each in records)
            assert seen == collections.Counter(f"kill-{number}" for number in range(-20, CLIENTS))
            ended = collections.Counter(each["outcome"] for each in records)
            assert set(ended) == {"cancelled", "complete"}, ended
            assert ended["cancelled"] > CLIENTS / 2
            assert provider.requests <= CLIENTS + 20  # no request was made twice
            totals = (await client.get("/status")).json()["totals"]
            assert totals["exchanges"] == CLIENTS + 20
        nursery.cancel_scope.cancel()
