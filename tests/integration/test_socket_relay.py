"""Streams end to end over real sockets, on both paths: the fast path (the socket relay) and the exchange's own loop.

What the client gets, how the exchange ends and what it leaves behind must be the same on both paths.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import attrs
import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.asgi_client import chat
from tests.support.bomb import Bomb, armed
from tests.support.gateway import OpenServer, make_config
from tests.support.logs import Logs
from tests.support.provider import (
    DONE,
    FINISH,
    Break,
    Pause,
    Provider,
    Say,
    Script,
    Stall,
    chunk,
    content,
    event,
    open_socket_provider,
    usage,
)
from trigate.exchange.client_response import ClientResponse
from trigate.exchange.socket_relay import RelayedStream
from trigate.gateway import gateway as gateway_module
from trigate.gateway.gateway import Gateway

KEEP_ALIVE = b": keep-alive\n\n"
BOTH = ("relay", "loop") if hasattr(select, "epoll") else ("loop",)


def public(*events: bytes) -> bytes:
    """The bytes that the client must receive for these events."""
    return b"".join(events).replace(b'"model":"m"', b'"model":"up/m"')


@attrs.define(eq=False)
class Client:
    """One call on its own connection.

    Attributes:
        wire: All bytes received.
        over: The connection is closed.
    """

    stream: trio.SocketStream
    wire: bytearray = attrs.field(factory=bytearray)
    over: bool = False

    async def read(self) -> None:
        """Reads the next bytes."""
        try:
            data = await self.stream.receive_some()
        except trio.BrokenResourceError:
            data = b""
        self.wire += data
        self.over = not data

    async def read_until(self, text: bytes) -> None:
        """Reads until these bytes have arrived."""
        while text not in self.wire:
            assert not self.over, bytes(self.wire)
            await self.read()

    async def read_all(self) -> None:
        """Reads to the end of the connection."""
        while not self.over:
            await self.read()

    def close(self, how: str) -> None:
        """Closes the connection, synchronously."""
        if how == "rst":
            self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.stream.socket.close()

    @property
    def status(self) -> int:
        """The status of the answer."""
        return int(self.wire.split(b" ", 2)[1])

    @property
    def body(self) -> tuple[bytes, bool]:
        """The decoded body and whether it has its proper end (a body without framing never has)."""
        head, _, wire = bytes(self.wire).partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in head:
            return wire, False
        found = b""
        while wire:
            size, _, wire = wire.partition(b"\r\n")
            length = int(size, 16)
            if len(wire) < length + 2:
                return found + wire[:length], False
            assert wire[length : length + 2] == b"\r\n", "incomplete chunk"
            if not length:
                assert wire == b"\r\n", "bytes after the end"
                return found, True
            found += wire[:length]
            wire = wire[length + 2 :]
        return found, False


@attrs.define(eq=False)
class Setup:
    """A gateway on one port and an upstream on another, with what the test observes of both."""

    gateway: Gateway
    provider: Provider
    port: int
    path: str
    logs: Logs
    relayed: int = 0
    clients: list[Client] = attrs.field(factory=list)

    async def call(self, *, version: str = "1.1", buffer_bytes: int | None = None) -> Client:
        """Sends a call for a stream."""
        plain = socket.socket()
        if buffer_bytes is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        plain.connect(("127.0.0.1", self.port))  # the kernel accepts the connection
        client = Client(trio.SocketStream(trio.socket.from_stdlib_socket(plain)))
        self.clients.append(client)
        body = msgspec.json.encode(chat())
        head = f"POST /v1/chat/completions HTTP/{version}\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        await client.stream.send_all(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        return client

    @property
    def poller_size(self) -> int:
        """How many sockets the relay's poller has."""
        return (
            len(self.gateway.exchange_services.upstream.socket_relay.poller)
            if self.gateway.exchange_services.upstream.socket_relay is not None
            else 0
        )

    def assert_path(self, streams: int = 1) -> None:
        """Checks that the stream is on the tested path."""
        if self.path == "relay":
            assert self.gateway.exchange_services.upstream.socket_relay is not None
            assert self.gateway.exchange_services.upstream.socket_relay.streams == streams
        else:
            assert self.relayed == 0

    def assert_clean(self) -> None:
        """Checks that no call has left anything and that each exchange was settled once."""
        assert not self.gateway.live
        assert self.gateway.generations.current.exchanges == 0
        [upstream] = self.gateway.generations.current.upstreams.values()
        assert upstream.in_flight == 0
        assert upstream.statistics().queued == 0
        assert self.poller_size == 0
        if self.gateway.exchange_services.upstream.socket_relay is not None:
            assert self.gateway.exchange_services.upstream.socket_relay.streams == 0
        totals = self.gateway.live.totals
        assert totals.exchanges == totals.complete + totals.cancelled + totals.failed == len(self.outcomes)
        assert self.provider.open_now == 0

    @property
    def outcomes(self) -> list[str]:
        """The outcome of each exchange."""
        return [entry["outcome"] for entry in self.logs.named("exchange")]


@pytest.fixture
def open_setup(open_server: OpenServer, logs: Logs, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens a setup whose streams use one of the two paths: ``async with open_setup(way, script,
    idle_timeout_s=…)``."""

    @contextlib.asynccontextmanager
    async def opened(path: str, *scripts: Script, **limits: Any) -> AsyncIterator[Setup]:
        async with open_socket_provider(*scripts) as (provider, url):
            config = make_config({"up": {"base_url": url, "models": ["m"]}}, limits=limits)
            if path == "loop":
                monkeypatch.setattr(gateway_module, "open_poller", contextlib.nullcontext)
            async with open_server(config) as (client, app):
                port = client.base_url.port
                assert port is not None
                setup = Setup(app.gateway, provider, port, path, logs)
                carry = RelayedStream.run

                async def counted(self: RelayedStream, owner: Any) -> None:
                    setup.relayed += 1
                    await carry(self, owner)

                monkeypatch.setattr(RelayedStream, "run", counted)
                try:
                    yield setup
                finally:
                    for each in setup.clients:
                        each.stream.socket.close()
                await trio.sleep(1)
                setup.assert_clean()
                assert bool(setup.relayed) == (path == "relay")

    return opened


@pytest.fixture
def clock(autojump_clock: MockClock) -> MockClock:
    """A virtual clock that waits for the kernel, so that bytes between two sockets do not count as silence."""
    autojump_clock.autojump_threshold = 0.003
    return autojump_clock


A, B = content("a"), content("b")
ERROR = event({"error": {"message": "said the upstream", "code": "c"}})


@attrs.frozen
class Scene:
    """A stream after its first event and a second of silence.

    Attributes:
        body: What the client gets after that event, without the error event, if there is one.
        code: The code of the error event that follows; None = the answer is complete.
        after_s: When it ends.
    """

    script: Script
    body: bytes
    code: str | None = None
    outcome: str = "complete"
    after_s: float = 1.0
    limits: dict[str, Any] = attrs.field(factory=dict)


LIMITS = {"idle_timeout_s": 50, "keep_alive_s": 0}
SCENES = {
    "complete": Scene(
        (Say(B), Say(chunk({}, finish_reason="stop")), Say(DONE)), B + chunk({}, finish_reason="stop") + DONE
    ),
    "several in one piece": Scene((Say(B + B + B + DONE),), B + B + B + DONE),
    "an event in two pieces": Scene(
        (Say(B[:20]), Pause(1), Say(B[20:] + DONE[:5]), Pause(1), Say(DONE[5:])), B + DONE, after_s=3
    ),
    "usage": Scene((Say(usage(7, 11)), Say(DONE)), DONE),
    "an upstream's comment": Scene((Say(b": ping\n\n"), Pause(1), Say(B), Say(DONE)), B + DONE, after_s=2),
    "never ends after DONE": Scene((Say(B), Say(DONE), Stall()), B + DONE),
    "DONE without a blank line": Scene((Say(B), Say(FINISH), Say(b"data: [DONE]")), B + DONE),
    "error event": Scene((Say(B), Pause(1), Say(ERROR), Say(B)), B, "c", "upstream_error", 2),
    "FIN": Scene((Say(B), Pause(1), Break("fin")), B, "upstream_truncated", "upstream_truncated", 2),
    "RST": Scene((Say(B), Pause(1), Break("rst")), B, "upstream_truncated", "upstream_truncated", 2),
    "FIN in an event": Scene(
        (Say(B + B[:9]), Pause(1), Break("fin")), B, "upstream_truncated", "upstream_truncated", 2
    ),
    "RST in an event": Scene(
        (Say(B + B[:9]), Pause(1), Break("rst")), B, "upstream_truncated", "upstream_truncated", 2
    ),
    "a proper end, but no DONE": Scene((Say(B),), B, "upstream_truncated", "upstream_truncated"),
    "too large": Scene(
        (Say(B + b"data: " + b"x" * 5000),), B, "upstream_garbled", "upstream_garbled", 1, {"event_bytes": 4096}
    ),
    "idle": Scene((Say(B), Stall()), B, "upstream_timeout", "upstream_timeout", 51),
    "total": Scene(
        (Pause(29), Say(B)) * 9, B * 3, "upstream_timeout", "upstream_timeout", 100, {"total_timeout_s": 100}
    ),
    "keep-alive": Scene(
        (Pause(39), Say(B), Pause(20), Say(DONE)),
        KEEP_ALIVE * 2 + B + KEEP_ALIVE + DONE,
        after_s=60,
        limits={"keep_alive_s": 15},
    ),
    "keep-alive, then idle": Scene(
        (Stall(),), KEEP_ALIVE * 2, "upstream_timeout", "upstream_timeout", 50, {"keep_alive_s": 20}
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(
    ("scene", "version"),
    [
        *((scene, "1.1") for scene in SCENES),
        *((scene, "1.0") for scene in ("complete", "RST in an event", "keep-alive")),
    ],
)
async def test_both_paths_give_the_same_answer(
    open_setup: Any, clock: MockClock, scene: str, path: str, version: str
) -> None:
    """The bytes, the final message, its time and the outcome are the same on both paths."""
    expected = SCENES[scene]
    script = (Say(A), Pause(1), *expected.script)
    async with open_setup(path, script, **{**LIMITS, **expected.limits}) as setup:
        began = trio.current_time()
        client = await setup.call(version=version)
        await client.read_until(b'"a"')
        await trio.sleep(0.5)
        setup.assert_path()
        await client.read_all()
        assert trio.current_time() - began == pytest.approx(expected.after_s, abs=0.3)
        body, ended = client.body
        assert client.status == 200
        assert ended == (version == "1.1")
        if expected.code is not None:
            body, _, last = body.rpartition(b"data: ")
            assert msgspec.json.decode(last)["error"]["code"] == expected.code
        assert body == public(A, expected.body)
    assert setup.outcomes == [expected.outcome]
    if scene == "usage":
        assert (setup.gateway.live.totals.prompt_tokens, setup.gateway.live.totals.completion_tokens) == (7, 11)


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("path", BOTH)
async def test_a_disconnect_closes_the_upstream(open_setup: Any, clock: MockClock, path: str, how: str) -> None:
    """It does so at once, even while the stream is silent."""
    async with open_setup(path, (Say(A), Stall()), **LIMITS) as setup:
        client = await setup.call()
        await client.read_until(b'"a"')
        await trio.sleep(0.5)
        setup.assert_path()
        left = trio.current_time()
        client.close(how)
        await setup.provider.wait_until(lambda provider: provider.open_now == 0)
        assert trio.current_time() - left < 0.3
    assert setup.outcomes == ["cancelled"]


@pytest.mark.parametrize("path", BOTH)
async def test_ending_a_drain_sends_an_error(open_setup: Any, clock: MockClock, path: str) -> None:
    """When the drain ends, the upstream is closed at once, and the client gets an error event and a proper end."""
    async with open_setup(path, (Say(A), Pause(1), Say(B[:9]), Stall()), **LIMITS) as setup:
        client = await setup.call()
        await client.read_until(b'"a"')
        await trio.sleep(2)
        setup.assert_path()
        setup.gateway.drain.cut()
        await client.read_all()
        body, ended = client.body
        assert ended
        body, _, last = body.rpartition(b"data: ")
        assert body == public(A)
        assert msgspec.json.decode(last)["error"]["code"] == "draining"
    assert setup.outcomes == ["draining"]


MUCH = tuple(Say(content(f"{n}:" + "x" * 50_000)) for n in range(200))


@pytest.mark.slow
@pytest.mark.parametrize("path", BOTH)
async def test_a_reader_that_stalls_ends_its_upstream(open_setup: Any, clock: MockClock, path: str) -> None:
    """The client's connection is closed after the stall limit, at most half of it later. The client has complete
    frames, except for the last one."""
    async with open_setup(path, (Say(A), Pause(1), *MUCH, Say(DONE)), stall_timeout_s=30, **LIMITS) as setup:
        client = await setup.call(buffer_bytes=8192)
        await client.read_until(b'"a"')
        await trio.sleep(25)
        setup.assert_path()
        assert setup.provider.open_now == 1
        [exchange] = setup.gateway.live
        assert exchange.client.sending_since is not None
        await trio.sleep(21)
        assert setup.provider.open_now == 0
        await client.read_all()
        body, ended = client.body
        assert not ended
        assert body == public(A, *(step.data for step in MUCH))[: len(body)]
    assert setup.outcomes == ["client_stalled"]


@pytest.mark.slow
@pytest.mark.parametrize("path", BOTH)
async def test_a_reader_that_stalls_for_a_while_misses_nothing(open_setup: Any, clock: MockClock, path: str) -> None:
    """It reads again before the limit. No keep-alive was sent meanwhile, and every byte arrives."""
    limits = {**LIMITS, "keep_alive_s": 5}
    async with open_setup(path, (Say(A), Pause(1), *MUCH, Say(DONE)), stall_timeout_s=30, **limits) as setup:
        client = await setup.call(buffer_bytes=8192)
        await client.read_until(b'"a"')
        await trio.sleep(20)
        setup.assert_path()
        await client.read_all()
        body, ended = client.body
        assert ended
        assert body == public(A, *(step.data for step in MUCH), DONE)
    assert setup.outcomes == ["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("path", BOTH)
async def test_a_slow_reader_is_not_stalled(open_setup: Any, clock: MockClock, path: str) -> None:
    """It reads a part of the waiting bytes again and again, and its stream continues however long that takes."""
    async with open_setup(path, (Say(A), Pause(1), *MUCH, Say(DONE)), stall_timeout_s=30, **LIMITS) as setup:
        client = await setup.call(buffer_bytes=8192)
        await client.read_until(b'"a"')
        for _ in range(8):
            await trio.sleep(15)
            before = len(client.wire)
            while len(client.wire) < before + 300_000:
                await client.read()
        assert setup.provider.open_now == 1
        await client.read_all()
        body, ended = client.body
        assert ended
        assert body == public(A, *(step.data for step in MUCH), DONE)
    assert setup.outcomes == ["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fin", "rst", "cut"])
@pytest.mark.parametrize("path", BOTH)
async def test_the_end_of_a_stalled_reader(open_setup: Any, clock: MockClock, path: str, how: str) -> None:
    """When the client disconnects or the server cancels, the upstream is closed at once. A client that reads on after
    the cancellation gets complete frames, then the error and a proper end."""
    async with open_setup(path, (Say(A), Pause(1), *MUCH, Say(DONE)), stall_timeout_s=30, **LIMITS) as setup:
        client = await setup.call(buffer_bytes=8192)
        await client.read_until(b'"a"')
        await trio.sleep(10)
        setup.assert_path()
        if how == "cut":
            setup.gateway.drain.cut()
            await trio.sleep(1)
            assert (
                setup.gateway.exchange_services.upstream.socket_relay is None
                or setup.gateway.exchange_services.upstream.socket_relay.streams == 0
            )
            await client.read_all()
            body, ended = client.body
            assert ended
            body, _, last = body.rpartition(b"data: ")
            assert msgspec.json.decode(last)["error"]["code"] == "draining"
            assert body == public(A, *(step.data for step in MUCH))[: len(body)]
            assert body.endswith(b"\n\n")
        else:
            client.close(how)
            await trio.sleep(1)
        assert setup.provider.open_now == 0
    assert setup.outcomes == ["draining" if how == "cut" else "cancelled"]


@pytest.mark.slow
@pytest.mark.parametrize("path", BOTH)
async def test_a_late_keep_alive_uses_the_path_of_the_stream(
    open_setup: Any, clock: MockClock, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """A keep-alive that was due before its stream moved to the fast path is sent by the relay as a frame of its own and
    returns at once. When the client does not read, it is not sent."""
    sends = 0
    send = ClientResponse.send

    async def counted(self: ClientResponse, data: bytes) -> None:
        nonlocal sends
        sends += 1
        await send(self, data)

    async with open_setup(path, (Say(A), Pause(10), *MUCH, Say(DONE)), stall_timeout_s=0, **LIMITS) as setup:
        client = await setup.call(buffer_bytes=8192)
        await client.read_until(b'"a"')
        await trio.sleep(0.5)
        setup.assert_path()
        [exchange] = setup.gateway.live
        sent_at = trio.current_time()
        monkeypatch.setattr(ClientResponse, "send", counted)
        await exchange._client_sink._keep_alive()
        assert sends == (path == "loop")
        await client.read_until(KEEP_ALIVE)
        await trio.sleep(20)
        assert exchange.client.sending_since is not None
        await exchange._client_sink._keep_alive()
        assert trio.current_time() - sent_at < 21
        await client.read_all()
        assert client.body == (public(A, KEEP_ALIVE, *(step.data for step in MUCH), DONE), True)


# -- the sweep --------------------------------------------------------------------------------------------------------


SWEPT: dict[str, tuple[Script, str]] = {
    "complete": ((Say(A), Pause(1), Say(B), Pause(1), Say(B[:9]), Pause(1), Say(B[9:]), Say(DONE)), "complete"),
    "keep-alives": ((Say(A), Pause(20), Say(B), Pause(20), Say(DONE)), "complete"),
    "truncated": ((Say(A), Pause(1), Say(B), Pause(1), Break("rst")), "upstream_truncated"),
    "error event": ((Say(A), Pause(1), Say(B), Pause(1), Say(ERROR)), "upstream_error"),
    "idle": ((Say(A), Pause(1), Say(B), Pause(100)), "upstream_timeout"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fin", "rst", "cut"])
@pytest.mark.parametrize("script", SWEPT)
async def test_a_disconnect_or_cancellation_at_any_step(
    open_setup: Any, clock: MockClock, monkeypatch: pytest.MonkeyPatch, script: str, how: str
) -> None:
    """At the n-th step of any task, for every n, the client disconnects or the server cancels. Nothing is left in the
    relay, the poller, the pool and the gateway, each exchange is settled once, and the next call is served."""
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr("trio._core._run._r", random.Random(2))
    clock.autojump_threshold = 0.001
    limits = {"idle_timeout_s": 50, "keep_alive_s": 15, "loop_lag_s": 0}  # so that its checks are no steps of a call
    async with open_setup(BOTH[0], SWEPT[script][0], **limits) as setup:
        steps = 0
        met = set()
        while True:
            steps += 1
            client = await setup.call()

            def end(client: Client = client) -> None:
                met.add(
                    setup.gateway.exchange_services.upstream.socket_relay.streams
                    if setup.gateway.exchange_services.upstream.socket_relay is not None
                    else 0
                )
                if how == "cut":
                    setup.gateway.drain.cut()
                else:
                    client.close(how)

            # The instrument cannot close the socket: a task would still wait for it.
            bomb = Bomb(steps, partial(trio.lowlevel.current_trio_token().run_sync_soon, end))
            with armed(bomb), contextlib.suppress(trio.ClosedResourceError, OSError):
                await client.read_all()
            await trio.sleep(1)
            setup.assert_clean()
            if how == "cut" and client.wire:
                body, ended = client.body
                assert client.status != 200 or (ended and body.endswith(DONE) != (b'"error"' in body)), steps
            client.stream.socket.close()
            if not bomb.fired:
                break
        assert steps > 20
        assert met == ({0, 1} if BOTH[0] == "relay" else {0}), (
            "the sweep reached the stream before, during and after the fast path"
        )
        assert set(setup.outcomes) == {"draining" if how == "cut" else "cancelled", SWEPT[script][1]}
        setup.provider.play((Say(A), Say(DONE)))
        client = await setup.call()
        await client.read_all()
        assert client.body == (public(A, DONE), True)


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="no epoll")
async def test_the_first_attempt_of_a_race_is_relayed(open_server: OpenServer, logs: Logs) -> None:
    """A keep-alive, and a client that disconnects, find the stream of the attempt that won, not of the last one."""
    async with (
        open_socket_provider((Pause(0.1), Say(content("a")), Stall())) as (first, first_url),
        open_socket_provider((Stall(),)) as (second, second_url),
    ):
        config = make_config(
            {"a": {"base_url": first_url, "models": ["m"]}, "b": {"base_url": second_url, "models": ["m"]}},
            models={"both": {"targets": ["a/m", "b/m"], "strategy": "hedge", "hedge_delay_s": 0.02, "hedge_budget": 1}},
        )
        async with open_server(config) as (client, app):
            gateway = app.gateway
            relay = gateway.exchange_services.upstream.socket_relay
            assert relay is not None
            async with (
                client.stream("POST", "/v1/chat/completions", json=chat(model="both")) as response,
                contextlib.aclosing(response.aiter_raw()) as body,
            ):
                assert b'"a"' in await anext(body)
                await wait_all_tasks_blocked(0.01)
                assert relay.streams == 1
                assert second.opened == 1
                [exchange] = gateway.live
                assert exchange.source is not None
                assert exchange.source.inject(b": between\n\n")
                assert await anext(body) == b": between\n\n"
            await gateway.live.wait_none_left()
            assert [entry["outcome"] for entry in logs.named("exchange")] == ["cancelled"]
            assert relay.streams == 0
        assert (first.open_now, second.open_now) == (0, 0)
