"""The scripted provider plays its script, both in memory and over a socket."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import cast

import httpx2
import pytest
import trio

from tests.support.provider import (
    DONE,
    Break,
    Head,
    Pause,
    Provider,
    Refuse,
    Say,
    Script,
    SlowConnect,
    Stall,
    answers,
    completion,
    content,
    open_socket_provider,
    says,
)

Opener = Callable[..., AbstractAsyncContextManager[tuple[Provider, httpx2.AsyncClient]]]


@contextlib.asynccontextmanager
async def _in_memory(*scripts: Script) -> AsyncIterator[tuple[Provider, httpx2.AsyncClient]]:
    provider = Provider(*scripts)
    async with httpx2.AsyncClient(transport=provider.transport(), base_url="http://up.invalid/v1") as client:
        yield provider, client


@contextlib.asynccontextmanager
async def _over_socket(*scripts: Script) -> AsyncIterator[tuple[Provider, httpx2.AsyncClient]]:
    async with (
        open_socket_provider(*scripts) as (provider, url),
        httpx2.AsyncClient(base_url=url, trust_env=False) as client,
    ):
        yield provider, client


@pytest.fixture(params=[_in_memory, _over_socket], ids=["memory", "socket"])
def opener(request: pytest.FixtureRequest) -> Opener:
    """Opens a provider of each kind with a client for it."""
    found: Opener = request.param
    return found


async def test_a_stream_is_sent_completely(opener: Opener) -> None:
    """Every event of a script arrives, the call is recorded as it came, and nothing stays open."""
    async with opener(says("a", "b")) as (provider, client):
        response = await client.post("/chat/completions", json={"model": "m"})
        assert response.headers["content-type"] == "text/event-stream"
        assert response.content.startswith(b"data: {")
        assert response.content.endswith(DONE)
        assert response.content.count(b"data: ") == 5
        [call] = provider.calls
        assert (call.method, call.path, call.json) == ("POST", "/v1/chat/completions", {"model": "m"})
        assert (provider.opened, provider.open_now, call.ended, call.pieces_read) == (1, 0, "complete", 4)
        assert provider.closed_at == []


async def test_scripts_are_played_in_order_and_the_last_one_repeats(opener: Opener) -> None:
    """Each call gets one script. A kept connection carries several calls."""
    async with opener(answers(b'{"error":{}}', status=429), answers(completion("x"))) as (provider, client):
        statuses = [(await client.post("/x")).status_code for _ in range(3)]
        assert statuses == [429, 200, 200]
        provider.play(answers(b"{}", status=404, headers={"retry-after": "7"}))
        response = await client.get("/models")
        assert (response.status_code, response.headers["retry-after"]) == (404, "7")


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_break_after_the_head_is_a_transport_error(opener: Opener, how: str) -> None:
    """A truncated reply can be told from a complete one, and its first piece has arrived."""
    async with opener((Say(content("a")), Pause(0.01), Break(how))) as (provider, client):  # type: ignore[arg-type]
        async with client.stream("POST", "/x") as response:
            pieces = response.aiter_raw()
            assert await anext(pieces) == content("a")
            with pytest.raises(httpx2.RemoteProtocolError if how == "fin" else httpx2.ReadError):
                await anext(pieces)
        assert provider.calls[0].ended == "broken"
        assert provider.open_now == 0


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_break_before_the_head_is_a_transport_error(opener: Opener, how: str) -> None:
    """There is no reply at all, for each of the two kinds of break."""
    async with opener((Break(how),)) as (provider, client):  # type: ignore[arg-type]
        with pytest.raises(httpx2.RemoteProtocolError if how == "fin" else httpx2.ReadError):
            await client.post("/x")
        assert provider.open_now == 0


@pytest.mark.parametrize(
    "script", [(Stall(),), (Head(), Stall()), (Say(b"x"), Stall())], ids=["connected", "head sent", "streaming"]
)
async def test_a_disconnect_is_noticed(opener: Opener, script: Script) -> None:
    """Whatever the provider is doing, it notices the disconnect and its time."""
    async with opener(script) as (provider, client), trio.open_nursery() as nursery:

        async def call() -> None:
            async with client.stream("POST", "/x") as response:
                try:
                    await response.aread()
                finally:
                    with trio.CancelScope(shield=True):  # httpx2's own close does not survive a cancellation
                        await cast(httpx2.AsyncByteStream, response.stream).aclose()

        nursery.start_soon(call)
        pieces_read = sum(isinstance(step, Say) for step in script)
        await provider.wait_until(
            lambda provider: provider.opened == 1 and provider.calls[0].pieces_read == pieces_read
        )
        assert provider.open_now == 1
        nursery.cancel_scope.cancel()
    with trio.fail_after(1):
        await provider.wait_until(lambda provider: provider.open_now == 0)
    assert provider.calls[0].ended == "closed"
    assert len(provider.closed_at) == 1


async def test_memory_connections_can_be_refused_or_slow(autojump_clock: trio.testing.MockClock) -> None:
    """The errors are those of a socket before it is connected, with the client's connect timeout."""
    async with _in_memory((Refuse(),), (SlowConnect(5), *says("x")), (SlowConnect(),)) as (provider, client):
        with pytest.raises(httpx2.ConnectError):
            await client.post("/x")
        begun = trio.current_time()
        assert (await client.post("/x", timeout=6)).status_code == 200
        assert trio.current_time() - begun == pytest.approx(5)
        with pytest.raises(httpx2.ConnectTimeout):
            await client.post("/x", timeout=2)
        assert provider.open_now == 0


async def test_pauses_take_virtual_time_in_memory(autojump_clock: trio.testing.MockClock) -> None:
    """A minute of script takes no real time."""
    async with _in_memory((Say(b"a"), Pause(60), Say(b"b"))) as (_, client):
        begun = trio.current_time()
        assert (await client.post("/x")).content == b"ab"
        assert trio.current_time() - begun == pytest.approx(60)
