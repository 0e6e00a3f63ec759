"""The pool is cancelled at every step: no slot is lost, and no connection that was read in part is reused."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import attrs
import httpx2
import pytest
import trio
import trustme

from tests.support.bomb import Bomb, armed
from tests.support.slow import FULL
from tests.upstream.socket_server import (
    OK,
    STREAM,
    Play,
    Server,
    Upload,
    answers,
    ask,
    contexts,
    counts,
    open_server,
    post,
    upload_head,
)
from trigate.upstream.pool import ConnectionPool, Opening
from trigate.upstream.transport import SocketTransport

Act = Callable[[SocketTransport, Server], Awaitable[None]]


async def _plain(pool: SocketTransport, server: Server) -> None:
    assert await ask(pool, server.origin) == b"ok"


async def _named(pool: SocketTransport, server: Server) -> None:
    assert await ask(pool, attrs.evolve(server.origin, host="localhost")) == b"ok"


async def _twice(pool: SocketTransport, server: Server) -> None:
    await _plain(pool, server)
    await _plain(pool, server)


async def _large(pool: SocketTransport, server: Server) -> None:
    size = 4_000_000 if server.origin.scheme == "http" else 300_000  # more than a socket takes; any, with TLS
    assert await ask(pool, server.origin, post(size)) == b"ok"


async def _upload(pool: SocketTransport, server: Server) -> None:
    body = Upload([bytes(100_000)] * 3, length_bytes=300_000)
    async with pool.pool.open(server.origin, upload_head(body), method="POST", stream=body) as response:
        assert await response.receive() == b"ok"


async def _queued(pool: SocketTransport, server: Server) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(_plain, pool, server)


async def _by_httpx2(pool: SocketTransport, server: Server) -> None:
    request = httpx2.Request("GET", f"{server.origin.scheme}://{server.origin}/", extensions={"timeout": {"read": 9}})
    response = await pool.handle_async_request(request)
    try:
        assert await response.aread() == b"ok"
    finally:
        await response.aclose()


async def _slowly(server: Server, stream: trio.abc.Stream) -> None:
    """Sends a stream in pieces, with checkpoints between them."""
    while await server.read(stream):
        for piece in (b"HTTP/1.1 100 Continue\r\n\r\n", STREAM, b"1\r\no\r\n", b"1\r\nk\r\n", b"0\r\n\r\n"):
            await stream.send_all(piece)
            await trio.lowlevel.checkpoint()


SCENES: dict[str, tuple[Act, Play]] = {
    "new connection": (_plain, answers(OK)),
    "by name": (_named, answers(OK)),
    "reused": (_twice, answers(OK)),
    "dies in reuse": (_twice, answers(OK, close_after=1)),
    "stream": (_twice, _slowly),
    "large body": (_large, answers(OK)),
    "upload": (_upload, answers(OK)),
    "queued": (_queued, answers(OK)),
    "through httpx2": (_by_httpx2, _slowly),
}


async def _sweep(act: Act, server: Server, pool: SocketTransport, *, kept: bool) -> int:
    """Cancels an act at step 1, 2, … until it ends before that step; returns how often a cancellation took effect.

    Args:
        kept: Whether each trial may reuse the connection of the previous trial; else it starts without one.
    """
    steps = cancelled = 0
    while True:
        steps += 1
        assert steps < 2000
        with trio.CancelScope() as scope:
            bomb = Bomb(steps, scope.cancel)
            with armed(bomb):
                await act(pool, server)
        opened, idle, waiting = counts(pool)
        assert (opened, waiting) == (idle, 0), f"step {steps}: {pool}"
        assert opened <= 1
        with trio.fail_after(5):
            assert await ask(pool, server.origin) == b"ok", f"step {steps}"
        assert counts(pool)[0] == counts(pool)[1] <= 1
        cancelled += scope.cancelled_caught
        if not kept:
            await pool.aclose()
            pool.pool._closed = False
        if not bomb.fired:
            return cancelled


@contextlib.asynccontextmanager
async def _opened(play: Play, authority: trustme.CA | None = None) -> AsyncIterator[tuple[Server, SocketTransport]]:
    serving, trust = contexts(authority, "127.0.0.1") if authority else (None, None)
    pool = SocketTransport(max_connections=1, trust=trust or httpx2.create_ssl_context)
    async with open_server(play, context=serving) as server, pool:
        yield server, pool


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("scene", SCENES)
async def test_cancelled_at_any_step(scene: str, kept: bool) -> None:
    """Cancelled at any step, the only slot is free afterwards, and the next request gets its own answer."""
    act, play = SCENES[scene]
    async with _opened(play) as (server, pool):
        assert await _sweep(act, server, pool, kept=kept) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("scene", ["new connection", "stream", "large body", "upload"])
async def test_cancelled_at_any_step_of_tls(scene: str, kept: bool) -> None:
    """Over TLS, too, the slot is free afterwards, and the next request gets its own answer."""
    act, play = SCENES[scene]
    async with _opened(play, trustme.CA()) as (server, pool):
        assert await _sweep(act, server, pool, kept=kept) > 0


def _lose_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConnectionPool, "_free_slot", lambda self: None)


def _keep_what_was_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def release(self: Opening) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool._put_back(connection)

    monkeypatch.setattr(Opening, "release", release)


@pytest.mark.parametrize("spoil", [_lose_slots, _keep_what_was_read_in_part])
async def test_the_sweep_finds_a_leak(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """The sweep fails if a slot is lost, or if a connection is kept whose response was read in part."""
    spoil(monkeypatch)
    async with _opened(_slowly) as (server, pool):
        with pytest.raises((AssertionError, httpx2.RemoteProtocolError)):
            await _sweep(_twice, server, pool, kept=True)


@pytest.mark.slow
async def test_thousands_of_cancels() -> None:
    """After as many cancels at random moments of thirty tasks on ten slots, ten requests are answered at once."""
    rng = random.Random(3)
    wanted = 10_000 if FULL else 4_000
    cancelled = answered = 0

    async def play(server: Server, stream: trio.abc.Stream) -> None:
        while request := await server.read(stream):
            server.requests.clear()
            number = request.split(b" ")[1][1:]
            await stream.send_all(STREAM)
            if rng.random() < 0.5:
                await trio.lowlevel.checkpoint()
            await stream.send_all(b"%x\r\n%b\r\n0\r\n\r\n" % (len(number), number))

    async with open_server(play) as server, SocketTransport(max_connections=10) as pool:

        async def call(number: int) -> None:
            request = b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % number
            assert await ask(pool, server.origin, request) == b"%d" % number

        live: dict[int, trio.CancelScope] = {}

        async def work(worker: int) -> None:
            nonlocal answered, cancelled
            number = worker
            while cancelled < wanted:
                number += 100
                with trio.CancelScope() as live[worker]:
                    await call(number)
                if live.pop(worker).cancelled_caught:
                    cancelled += 1
                else:
                    answered += 1
                assert counts(pool)[0] <= 10

        async with trio.open_nursery() as nursery:
            for worker in range(30):
                nursery.start_soon(work, worker)
            while cancelled < wanted:
                for _ in range(rng.randrange(3)):
                    await trio.lowlevel.checkpoint()
                if live:
                    live[rng.choice(list(live))].cancel()
                await trio.lowlevel.checkpoint()
            for scope in live.values():
                scope.cancel()
        opened, idle, waiting = counts(pool)
        assert (opened, waiting) == (idle, 0)
        assert answered > 100, "some requests must complete, else nothing was at risk"
        with trio.fail_after(2):
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(call, number)
        assert counts(pool)[2] == 0
