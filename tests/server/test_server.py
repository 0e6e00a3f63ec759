"""`trigate.server.server`, `shutdown` and `lifespan`: crashes, drain, signals, TLS, on real sockets."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import h2.events
import pytest
import trio
import trio.testing
import trustme

from tests.server.test_connection import H2_GET, H2Client, client_tls
from tests.server.test_http1 import HELLO, body_of, hello, read_all, read_until, say
from tests.server.test_request_head import BAD
from tests.support.processes import environment
from tests.support.shortage import ERRORS, no_descriptors, os_error
from trigate.concurrency import descriptors
from trigate.config.sections import Port, Seconds, ServerConfig
from trigate.server import acceptor, http2, listeners, request_head, server, shutdown
from trigate.server.http1 import Application, Message, Receive, Send
from trigate.server.lifespan import StartupFailed, open_lifespan
from trigate.server.listeners import ListenError, open_sockets
from trigate.server.server import serve
from trigate.server.shutdown import Shutdown, ShutdownReport

CONFIG = ServerConfig(port=Port(0), drain_timeout_s=Seconds(5.0))


def _set_event() -> trio.Event:
    event = trio.Event()
    event.set()
    return event


@attrs.define(eq=False)
class Drain:
    """The app's part in a shutdown: records the calls."""

    begun: trio.Event = attrs.field(factory=trio.Event)
    was_cut: trio.Event = attrs.field(factory=trio.Event)
    is_quiet: trio.Event = attrs.field(factory=_set_event)

    aside: trio.Event = attrs.field(factory=trio.Event)

    announced: trio.Event = attrs.field(factory=trio.Event)

    def step_aside(self) -> None:
        """Records the call."""
        self.aside.set()

    def announce(self) -> None:
        """Records the call."""
        self.announced.set()

    def begin(self) -> None:
        """Records the call."""
        self.begun.set()

    async def wait_quiet(self) -> None:
        """Waits for work without a connection, if there is any."""
        await self.is_quiet.wait()

    def cut(self) -> Sequence[str]:
        """Records the call."""
        assert self.begun.is_set()
        self.was_cut.set()
        return ["r1"]


@attrs.define(eq=False)
class App:
    """An app whose paths select its behaviour."""

    drain: Drain | None = attrs.field(factory=Drain)
    go_on: trio.Event = attrs.field(factory=trio.Event)
    lifespan: list[str] = attrs.field(factory=list)
    flooding: trio.Event = attrs.field(factory=trio.Event)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serves a request."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if scope["type"] == "websocket":
            refusal = b'{"error":{"message":"no"}}'
            await send({"type": "websocket.http.response.start", "status": 404, "headers": []})
            await send({"type": "websocket.http.response.body", "body": refusal})
            return
        match scope["path"]:
            case "/stream":
                await self._stream(send)
            case "/flood":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                self.flooding.set()
                while True:  # more than any kernel buffers: the send does not end before the client reads
                    await send({"type": "http.response.body", "body": bytes(2**25), "more_body": True})
            case "/bad-name":
                await send({"type": "http.response.start", "status": 200, "headers": [(b"bad name", b"x")]})
            case "/too-short":
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
                await send({"type": "http.response.body", "body": b"xx"})
            case _:
                await hello(scope, receive, send)

    async def _live(self, scope: Message, receive: Receive, send: Send) -> None:
        self.lifespan.append((await receive())["type"])
        if self.drain is not None:
            scope["state"]["drain"] = self.drain
        await send({"type": "lifespan.startup.complete"})
        self.lifespan.append((await receive())["type"])
        await send({"type": "lifespan.shutdown.complete"})

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        last = b"data: [DONE]\n\n"
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal last
                assert self.drain is not None
                await self.drain.was_cut.wait()
                last = b"data: error\n\n"
                nursery.cancel_scope.cancel()

            if self.drain is not None:
                nursery.start_soon(watch)
            await self.go_on.wait()
            nursery.cancel_scope.cancel()
        await send({"type": "http.response.body", "body": last})


@attrs.define(eq=False)
class Running:
    """A running server.

    Attributes:
        url: Its base URL.
        shutdown: Ends it.
        outcome: The report that `serve` has returned.
    """

    url: str
    shutdown: Shutdown
    outcome: ShutdownReport | None = None
    _clients: list[trio.SocketStream] = attrs.field(factory=list)
    _ended: trio.Event = attrs.field(factory=trio.Event)

    async def run(  # noqa: ASYNC128 - `serve` calls it
        self, app: Application, config: ServerConfig, *, task_status: trio.TaskStatus[list[str]]
    ) -> None:
        """Serves the app."""
        self.outcome = await serve(app, config, shutdown=self.shutdown, task_status=task_status)
        self._ended.set()

    async def wait_ended(self) -> ShutdownReport:
        """Waits until `serve` has returned, and returns its report."""
        await self._ended.wait()
        assert self.outcome is not None
        return self.outcome

    async def connect(self) -> trio.SocketStream:
        """Opens a connection, which `close_clients` closes."""
        stream = await trio.open_tcp_stream("127.0.0.1", int(self.url.rpartition(":")[2]))
        self._clients.append(stream)
        return stream

    async def close_clients(self) -> None:
        """Closes the connections of `connect`."""
        for stream in self._clients:
            await stream.aclose()

    async def ask(self, path: str) -> trio.SocketStream:
        """Opens a connection and sends a request."""
        stream = await self.connect()
        await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return stream

    async def assert_alive(self) -> None:
        """Checks that another client is served."""
        async with await self.ask("/alive") as stream:
            with trio.fail_after(1):
                assert body_of(await read_until(stream, b"/alive")) == b"GET /alive"


@contextlib.asynccontextmanager
async def open_server(app: Application, config: ServerConfig = CONFIG) -> AsyncIterator[Running]:
    """Serves an app for as long as the block lasts, and then ends the server at once, and the clients after it."""
    running = Running("", Shutdown())

    async with trio.open_nursery() as nursery:
        [running.url] = await nursery.start(partial(running.run, app, config))
        with trio.fail_after(20):
            yield running
        nursery.cancel_scope.cancel()
    await running.close_clients()


# -- the firewall -----------------------------------------------------------------------------------------------------

POISON = {
    "ws-upgrade+trailing": (
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\ntrailing-data"
    ),
    "h2c-prior": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\ngarbage-garbage-garbage",
    "garbage": b"\x16\x03\x01garbage\r\n\r\n",
    "non-ascii-path": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "huge-header": b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 200_000 + b"\r\n\r\n",
    "bad-chunk": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
}


@pytest.mark.slow
async def test_poison_is_answered(logs: Any) -> None:
    """Requests that crash other servers get a JSON error within 100 ms, whole or in pieces; the server continues."""
    async with open_server(App()) as running:
        for name, data in {**POISON, **{name: data for name, (_, data) in BAD.items()}}.items():
            for step in (len(data), 1 if len(data) < 1000 else 1000):
                async with await running.connect() as stream:
                    began = trio.current_time()
                    response = await exchange(stream, data, step)
                    took_s = trio.current_time() - began
                    assert response.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")), name
                    assert json.loads(body_of(response))["error"]["message"], name
                    assert took_s < 0.1 or step == 1, (name, took_s)
        await running.assert_alive()
    assert not logs.named("connection_crashed")


async def exchange(stream: trio.SocketStream, data: bytes, step: int) -> bytes:
    """Sends in pieces, and meanwhile reads until the connection ends."""

    async def send() -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            for start in range(0, len(data), step):
                await stream.send_all(data[start : start + step])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        with trio.fail_after(5):
            response = await read_all(stream)
        nursery.cancel_scope.cancel()
    return response


async def test_a_refusal_is_read_before_the_reset() -> None:
    """A client that has sent far more than was read still gets its response, and not a reset in its place."""
    for _ in range(20):
        async with open_connection_pair() as (client, _):
            response = await exchange(client, b"GET / HTTP/2.0\r\n\r\n" + b"x" * 900_000, 10**6)
            assert response.startswith(b"HTTP/1.1 505 ")


@contextlib.asynccontextmanager
async def open_connection_pair() -> AsyncIterator[tuple[trio.SocketStream, Running]]:
    """Yields a connection to a server."""
    async with open_server(App()) as running, await running.connect() as client:
        yield client, running


async def test_a_crash_ends_one_connection(logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in a connection's task ends that connection and no other, and its traceback is logged."""

    examine = request_head.examine

    def crash(data: bytes) -> request_head.RequestHead | None:
        if b"/crash" in data:
            raise ZeroDivisionError("a defect")
        return examine(data)

    monkeypatch.setattr(request_head, "examine", crash)
    app = App()
    async with open_server(app) as running:
        other = await running.ask("/stream")
        await read_until(other, b"data: 1\n\n\r\n")
        async with await running.ask("/crash") as stream:
            assert await read_all(stream) == b""
        await running.assert_alive()
        app.go_on.set()
        await read_until(other, b"data: [DONE]\n\n\r\n0\r\n\r\n")
    [entry] = logs.named("connection_crashed")
    assert entry["log_level"] == "warning"
    assert isinstance(entry["exc_info"].exceptions[0], ExceptionGroup | ZeroDivisionError)
    assert entry["client"][0] == "127.0.0.1"


async def test_a_malformed_answer_of_the_app(logs: Any) -> None:
    """An app that violates HTTP causes a 500, or, if its response has begun, ends only its own connection."""
    logs.expect_error("app_crashed")
    async with open_server(App()) as running:
        async with await running.ask("/bad-name") as stream:
            assert (await read_until(stream, b"}}")).startswith(b"HTTP/1.1 500 ")
        async with await running.ask("/too-short") as stream:
            assert (await read_all(stream)).endswith(b"\r\n\r\nxx")
        await running.assert_alive()
    assert len(logs.named("app_crashed")) == 2


async def test_many_clients_come_and_go() -> None:
    """Connections that are reset at random moments leave nothing behind."""
    async with open_server(App()) as running:
        for number in range(50):
            stream = await running.connect()
            await stream.send_all(HELLO[: number % len(HELLO)])
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await stream.aclose()
        await running.assert_alive()
        running.shutdown.stop_now()
        drained = await running.wait_ended()
        assert drained.forced == 0


# -- the drain --------------------------------------------------------------------------------------------------------


async def test_a_drain_lets_streams_finish(logs: Any) -> None:
    """Idle connections are closed at once, a running stream finishes, and the lifespan ends after it."""
    app = App()
    async with open_server(app) as running:
        idle, stream = await running.ask("/"), await running.ask("/stream")
        await read_until(idle, b"GET /")
        await read_until(stream, b"data: 1\n\n\r\n")
        running.shutdown.stop_now()
        with trio.fail_after(1):
            assert await read_all(idle) == b""
            assert app.drain is not None
            await app.drain.begun.wait()
        with pytest.raises(OSError, match="connect"):
            await running.connect()
        assert app.lifespan == ["lifespan.startup"]
        app.go_on.set()
        assert (await read_all(stream)).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert await running.wait_ended() == ShutdownReport(finished=2, cut=0, forced=0)
        assert not app.drain.was_cut.is_set()
    assert app.lifespan == ["lifespan.startup", "lifespan.shutdown"]
    [line] = logs.named("drained")
    assert (line["finished"], line["cut"], line["forced"]) == (2, 0, 0)


async def test_a_drain_waits_for_what_has_no_connection() -> None:
    """The drain waits until the app is quiet, or its time is up."""
    app = App()
    assert app.drain is not None
    app.drain.is_quiet = trio.Event()
    async with open_server(app) as running:
        running.shutdown.stop_now()
        await app.drain.begun.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert app.lifespan == ["lifespan.startup"]
        app.drain.is_quiet.set()
        assert await running.wait_ended() == ShutdownReport(finished=0, cut=0, forced=0)
    app = App()
    assert app.drain is not None
    app.drain.is_quiet = trio.Event()
    async with open_server(app, attrs.evolve(CONFIG, drain_timeout_s=Seconds(0.05))) as running:
        running.shutdown.stop_now()
        assert await running.wait_ended() == ShutdownReport(finished=0, cut=0, forced=0)


async def test_an_answer_in_a_drain_says_close() -> None:
    """A response that begins in a drain announces the end of its connection."""
    began, release = trio.Event(), trio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            began.set()
            await release.wait()
            await say(send, b"last")

    async with open_server(app) as running:
        stream = await running.ask("/")
        await began.wait()
        running.shutdown.stop_now()
        await trio.testing.wait_all_tasks_blocked()
        release.set()
        response = await read_all(stream)
        assert b"\r\nconnection: close\r\n" in response
        assert body_of(response) == b"last"


async def test_a_request_behind_the_last_one_does_not_hold_up_a_drain() -> None:
    """A request that was pipelined behind the last one is not served, and not waited for."""
    app = App()
    async with open_server(app) as running:
        stream = await running.ask("/stream")
        await read_until(stream, b"data: 1\n\n\r\n")
        await stream.send_all(HELLO)
        await trio.testing.wait_all_tasks_blocked(0.02)
        running.shutdown.stop_now()
        await trio.testing.wait_all_tasks_blocked()
        app.go_on.set()
        with trio.fail_after(1):
            assert (await read_all(stream)).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        await stream.aclose()
        with trio.fail_after(1):
            assert await running.wait_ended() == ShutdownReport(finished=1, cut=0, forced=0)


async def test_a_drain_cuts_what_takes_too_long() -> None:
    """After the drain timeout, the app ends its streams, and the responses are complete."""
    async with open_server(App(), attrs.evolve(CONFIG, drain_timeout_s=Seconds(0.05))) as running:
        stream = await running.ask("/stream")
        await read_until(stream, b"data: 1\n\n\r\n")
        running.shutdown.stop_now()
        assert (await read_all(stream)).endswith(b"data: error\n\n\r\n0\r\n\r\n")
        assert await running.wait_ended() == ShutdownReport(finished=0, cut=1, forced=0)


async def test_the_readiness_check_comes_first(logs: Any) -> None:
    """During the notice, the readiness check fails, requests are served as before, and responses announce the end of
    their connections."""
    app = App()
    assert app.drain is not None
    async with open_server(app, attrs.evolve(CONFIG, drain_notice_s=Seconds(0.2))) as running:
        kept = await running.ask("/")
        await read_until(kept, b"GET /")
        running.shutdown.stop_now()
        await app.drain.announced.wait()
        assert b"\r\nconnection: close\r\n" in await read_all(await running.ask("/new"))
        assert not app.drain.begun.is_set()
        await kept.send_all(HELLO)
        assert b"\r\nconnection: close\r\n" in await read_all(kept)
        await app.drain.begun.wait()
        with pytest.raises(OSError, match="connect"):
            await running.connect()
        await running.wait_ended()
    assert logs.named("drain_announced")[0]["for_s"] == 0.2


async def test_the_report_names_what_was_cut(logs: Any) -> None:
    """The log has the ids of the exchanges, also without a connection, and the addresses of aborted clients."""
    app = App()
    assert app.drain is not None
    app.drain.is_quiet = trio.Event()
    async with open_server(app, attrs.evolve(CONFIG, drain_timeout_s=Seconds(0.05))) as running:
        running.shutdown.stop_now()
        assert await running.wait_ended() == ShutdownReport(finished=0, cut=0, forced=0)
    assert logs.named("drained")[0]["cut_exchanges"] == ["r1"]


# -- hot restart ------------------------------------------------------------------------------------------------------


async def test_clients_go_to_the_successor_by_themselves(logs: Any) -> None:
    """Nothing is refused or closed. A response announces the end of each connection. If a response has begun before,
    the connection serves one more request. Then the server ends."""
    app = App()
    assert app.drain is not None
    async with open_server(app) as running:
        idle, streaming = await running.ask("/"), await running.ask("/stream")
        await read_until(idle, b"GET /")
        await read_until(streaming, b"data: 1\n\n\r\n")
        running.shutdown.hand_over(42)
        await app.drain.aside.wait()
        with pytest.raises(OSError, match="connect"):
            await running.connect()
        app.go_on.set()
        await read_until(streaming, b"data: [DONE]\n\n\r\n0\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not app.drain.begun.is_set()
        for stream in (idle, streaming):
            await stream.send_all(HELLO)
            last = await read_all(stream)
            assert b"\r\nconnection: close\r\n" in last
            assert body_of(last) == b"GET /"
        assert await running.wait_ended() == ShutdownReport(finished=2, cut=0, forced=0)
        assert not app.drain.announced.is_set()
    assert logs.named("draining")[0]["successor"] == 42


async def test_a_takeover_does_not_wait_for_ever() -> None:
    """After the drain timeout, idle connections are closed, and running exchanges are ended with an error."""
    async with open_server(App(), attrs.evolve(CONFIG, drain_timeout_s=Seconds(0.1))) as running:
        idle, streaming = await running.ask("/"), await running.ask("/stream")
        await read_until(idle, b"GET /")
        await read_until(streaming, b"data: 1\n\n\r\n")
        running.shutdown.hand_over(42)
        assert await read_all(idle) == b""
        assert (await read_all(streaming)).endswith(b"data: error\n\n\r\n0\r\n\r\n")
        assert await running.wait_ended() == ShutdownReport(finished=1, cut=1, forced=0)


async def test_a_takeover_becomes_a_stop() -> None:
    """After a signal, idle connections are closed at once, and streams may finish."""
    app = App()
    async with open_server(app) as running:
        idle, streaming = await running.ask("/"), await running.ask("/stream")
        await read_until(idle, b"GET /")
        await read_until(streaming, b"data: 1\n\n\r\n")
        running.shutdown.hand_over(42)
        await trio.testing.wait_all_tasks_blocked(0.02)
        running.shutdown.stop_now()
        with trio.fail_after(1):
            assert await read_all(idle) == b""
        app.go_on.set()
        assert (await read_all(streaming)).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert await running.wait_ended() == ShutdownReport(finished=2, cut=0, forced=0)


@pytest.mark.parametrize("drain", [None, Drain], ids=["without cut", "cut in vain"])
async def test_a_client_that_does_not_read_is_aborted(drain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shielded send to a stalled client ends with the drain."""
    monkeypatch.setattr(shutdown, "FINAL_ERROR_S", 0.05)
    app = App(drain=drain and drain())
    async with open_server(app, attrs.evolve(CONFIG, drain_timeout_s=Seconds(0.05))) as running:
        await running.ask("/flood")
        await app.flooding.wait()
        await trio.testing.wait_all_tasks_blocked()
        running.shutdown.stop_now()
        assert await running.wait_ended() == ShutdownReport(finished=0, cut=0, forced=1)


@pytest.mark.slow
async def test_cancelled_means_now() -> None:
    """Cancelling `serve` also ends stalled tasks, without a drain."""
    app = App()
    async with open_server(app) as running:
        await running.ask("/flood")
        await app.flooding.wait()
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
    assert trio.current_time() - began < 1.0


# -- the lifespan -----------------------------------------------------------------------------------------------------


async def test_a_failed_startup_is_an_error() -> None:
    """An app that reports a failed start-up is not served, and the error has its message."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    with pytest.raises(StartupFailed, match="no database"):
        await serve(app, CONFIG)


async def test_an_app_without_lifespan_is_served() -> None:
    """An app that raises on a lifespan scope, or returns, is served without a lifespan."""

    async def raises(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await hello(scope, receive, send)

    async def returns(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await hello(scope, receive, send)

    for app in (raises, returns):
        async with open_server(app) as running:
            await running.assert_alive()


async def test_a_lifespan_that_crashes_later_ends_the_server() -> None:
    """An exception of the app's lifespan task ends the server."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        raise ZeroDivisionError

    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with open_lifespan(app):
            await trio.sleep_forever()


# -- sockets ----------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_named() -> None:
    """A port that is in use gives an error that names it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=rf"127\.0\.0\.1:{port} is in use"):
            open_sockets(ServerConfig(port=Port(port)))


def test_an_address_of_elsewhere_is_named() -> None:
    """An address that the machine does not have, and a name that does not resolve, are named in the error."""
    with pytest.raises(ListenError, match=r"192\.0\.2\.1:0 cannot be listened on: no interface"):
        open_sockets(ServerConfig(host="192.0.2.1", port=Port(0)))
    with pytest.raises(ListenError, match=r"nobody\.invalid:0 cannot be listened on"):
        open_sockets(ServerConfig(host="nobody.invalid", port=Port(0)))


def test_a_forbidden_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that the user may not use is named in the error."""

    def listen(*_: object, **__: object) -> socket.socket:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(listeners, "_listen", listen)
    with pytest.raises(ListenError, match=r"127\.0\.0\.1:80 is forbidden"):
        open_sockets(ServerConfig(port=Port(80)))


@pytest.mark.parametrize(("host", "show"), [("localhost", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("::1", "::1")])
def test_all_addresses_of_a_host(host: str, show: str) -> None:
    """The server listens on each address of a host that the machine has, on one port."""
    if host == "::1" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    sockets = open_sockets(ServerConfig(host=host, port=Port(0)))
    try:
        assert show in {sock.getsockname()[0] for sock in sockets}
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
    finally:
        for sock in sockets:
            sock.close()


def has_ipv6() -> bool:
    """Whether the loopback interface has IPv6."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
async def test_accepted_sockets_have_a_user_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each accepted socket has a TCP user timeout, which bounds a client that acknowledges nothing."""
    found = []
    start = server._Server._start

    def look(self: Any, stream: trio.SocketStream) -> None:
        found.append(stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
        start(self, stream)

    monkeypatch.setattr(server._Server, "_start", look)
    async with open_server(App(), attrs.evolve(CONFIG, tcp_user_timeout_s=Seconds(1.5))) as running:
        await running.assert_alive()
    assert found == [1500]


# -- file descriptors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ERRORS)
async def test_a_failure_to_accept_is_survived(name: str, logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system answers, the server keeps trying, logs one line a second, and then serves again."""
    accept, failures = trio.SocketListener.accept, 0

    async def starved(self: trio.SocketListener) -> trio.SocketStream:
        nonlocal failures
        if failures < 5:
            failures += 1
            raise os_error(name)
        return await accept(self)

    monkeypatch.setattr(trio.SocketListener, "accept", starved)
    monkeypatch.setattr(acceptor, "PAUSE_S", 0.005)
    async with open_server(App()) as running:
        while failures < 5:  # noqa: ASYNC110 - the listener does not know this task
            await trio.sleep(0.005)
        await running.assert_alive()
    [line] = logs.named("accept_failed")
    assert line["reason"] == name
    assert failures == 5


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is lowered below open files")
async def test_no_descriptor_is_left(logs: Any) -> None:
    """New connections are closed at once, running streams continue, and there is at most one line a second in the log.
    As soon as there are descriptors again, the server serves again."""
    app = App()
    async with open_server(app) as running:
        stream = await running.ask("/stream")
        await read_until(stream, b"data: 1\n\n\r\n")
        port = int(running.url.rpartition(":")[2])
        new = [trio.socket.socket() for _ in range(20)]
        with no_descriptors(), trio.fail_after(1):
            for sock in new:
                await sock.connect(("127.0.0.1", port))
            for sock in new:
                assert await sock.recv(1) == b""
        for sock in new:
            sock.close()
        with trio.fail_after(1):
            await running.assert_alive()
        app.go_on.set()
        await read_until(stream, b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert 1 <= len(logs.named("accept_failed")) <= 2
    assert {line["reason"] for line in logs.named("accept_failed")} == {"EMFILE"}


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is lowered below open files")
async def test_an_idle_connection_makes_room_for_a_descriptor(logs: Any) -> None:
    """Where no descriptor is left, an idle connection is closed for a new one."""
    async with open_server(App()) as running:
        idle = [await running.connect() for _ in range(3)]
        await running.assert_alive()
        client = trio.SocketStream(trio.socket.socket())
        with no_descriptors(), trio.fail_after(2):
            while True:
                await client.socket.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
                await client.send_all(HELLO)
                try:
                    assert body_of(await read_until(client, b"GET /")) == b"GET /"
                    break
                except (AssertionError, trio.BrokenResourceError):  # it was closed: it comes again
                    assert await idle[0].receive_some() == b""
                    await client.aclose()
                    client = trio.SocketStream(trio.socket.socket())
        await client.aclose()


async def test_silent_tls_connections_make_room(
    authority: trustme.CA, tls_config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So do connections that do not begin their TLS handshake, and idle HTTP/2 connections."""
    limited(monkeypatch, 3)
    async with open_server(App(), tls_config) as running:
        silent = [await running.connect() for _ in range(2)]
        for _ in range(3):
            trust = client_tls(authority, "h2")
            stream = trio.SSLStream(await running.connect(), trust, server_hostname="127.0.0.1", https_compatible=True)
            client = H2Client(stream)
            number = await client.ask(H2_GET)
            await client.read(h2.events.StreamEnded, number)
        for each in silent:
            with trio.fail_after(1):
                await read_all(each)


def limited(monkeypatch: pytest.MonkeyPatch, connections: int) -> None:
    """Lets a server have this many connections."""
    monkeypatch.setattr(descriptors, "max_pairs", lambda: connections)


async def test_idle_connections_make_room(logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent connections keep nobody out: at the limit, those that have been idle the longest are closed. A connection
    that serves a request is not."""
    limited(monkeypatch, 10)
    app = App()
    async with open_server(app) as running:
        busy = await running.ask("/stream")
        await read_until(busy, b"data: 1\n\n\r\n")
        silent = [await running.connect() for _ in range(9)]
        await silent[0].send_all(b"GET / HTT")  # a part of a head is still silence
        await trio.testing.wait_all_tasks_blocked(0.01)
        for _ in range(30):
            await running.assert_alive()
        more = [await running.connect() for _ in range(30)]
        await running.assert_alive()
        for stream in (*silent, *more[:20]):
            with trio.fail_after(1):
                await read_all(stream)
        app.go_on.set()
        await read_until(busy, b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert 1 <= len(logs.named("connection_limit")) <= 2
    assert logs.named("connection_limit")[0]["limit"] == 10


@pytest.mark.parametrize("speaks", [True, False], ids=["with a request", "silent"])
async def test_beyond_the_limit(speaks: bool, logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every connection serves a request, a new one gets 503 with the time to try again; a silent one is closed,
    and so are those beyond the number of answers at once. Then new ones are served again."""
    limited(monkeypatch, 2)
    monkeypatch.setattr(acceptor, "REFUSALS", 3)
    if not speaks:
        monkeypatch.setattr(server, "REFUSAL_S", 0.1)
    monkeypatch.setattr(acceptor, "PAUSE_S", 0.01)
    app = App()
    async with open_server(app) as running:
        busy = [await running.ask("/stream") for _ in range(2)]
        for stream in busy:
            await read_until(stream, b"data: 1\n\n\r\n")
        held = [await running.connect() for _ in range(3)]
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert await read_all(await running.connect()) == b""
        for stream in held:
            if speaks:
                await stream.send_all(HELLO)
            with trio.fail_after(1):
                response = await read_all(stream)
            if speaks:
                assert response.startswith(b"HTTP/1.1 503 ")
                assert b"\r\nretry-after: 1\r\n" in response
                assert b"\r\nconnection: close\r\n" in response
                assert json.loads(body_of(response))["error"]["code"] == "overloaded"
            else:
                assert response == b""
        app.go_on.set()
        for stream in busy:
            await read_until(stream, b"data: [DONE]\n\n\r\n0\r\n\r\n")
        await trio.sleep(acceptor.PAUSE_S)
        await running.assert_alive()
    [line] = logs.named("connection_limit")
    assert line["refused"] >= 1


# -- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority for the tests."""
    return trustme.CA()


@pytest.fixture
def tls_config(authority: trustme.CA, tmp_path: Path) -> ServerConfig:
    """A configuration with a certificate for 127.0.0.1."""
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    for pem in issued.cert_chain_pems:
        pem.write_to_path(tmp_path / "cert.pem", append=True)
    return attrs.evolve(CONFIG, certfile=str(tmp_path / "cert.pem"), keyfile=str(tmp_path / "key.pem"))


@pytest.mark.parametrize("alpn", ["h2", "http/1.1", None])
async def test_tls(authority: trustme.CA, tls_config: ServerConfig, alpn: str | None) -> None:
    """With a certificate, the server speaks HTTPS, with HTTP/2 for clients that choose it; plain HTTP fails quietly."""
    trust = client_tls(authority, alpn)
    async with open_server(App(), tls_config) as running:
        assert running.url.startswith("https://127.0.0.1:")
        async with await running.ask("/") as plain:
            assert not (await read_all(plain)).startswith(b"HTTP")
        stream = trio.SSLStream(await running.connect(), trust, server_hostname="127.0.0.1", https_compatible=True)
        if alpn == "h2":
            client = H2Client(stream)
            number = await client.ask(H2_GET)
            await client.read(h2.events.StreamEnded, number)
            assert client.bodies == {number: b"GET /"}
        else:
            await stream.send_all(HELLO)
            assert body_of(await read_until(stream, b"GET /")) == b"GET /"
        running.shutdown.stop_now()
        assert (await running.wait_ended()).forced == 0
        await stream.aclose()


async def test_a_drain_lets_an_h2_stream_finish(authority: trustme.CA, tls_config: ServerConfig) -> None:
    """An HTTP/2 stream finishes too, arrives completely, and the connection ends after it."""
    trust = client_tls(authority, "h2")
    app = App()
    async with open_server(app, tls_config) as running:
        stream = trio.SSLStream(await running.connect(), trust, server_hostname="127.0.0.1", https_compatible=True)
        client = H2Client(stream)
        path = (b":path", b"/stream")
        number = await client.ask((*H2_GET[:3], path))
        await client.read(h2.events.DataReceived, number)
        running.shutdown.stop_now()
        assert app.drain is not None
        await app.drain.begun.wait()
        app.go_on.set()
        assert await client.read(h2.events.StreamEnded, number) is not None
        assert client.bodies[number] == b"data: 1\n\ndata: [DONE]\n\n"
        assert await client.read(h2.events.StreamReset) is None
        await stream.aclose()
        assert await running.wait_ended() == ShutdownReport(finished=1, cut=0, forced=0)


@pytest.mark.parametrize("busy", [False, True])
async def test_an_h2_client_goes_to_the_successor(
    authority: trustme.CA, tls_config: ServerConfig, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An HTTP/2 client gets GOAWAY when it waits for no response. A request that it sends meanwhile is the last one."""
    monkeypatch.setattr(http2, "LINGER_S", 0.1)
    trust = client_tls(authority, "h2")
    app = App()
    async with open_server(app, tls_config) as running:
        stream = trio.SSLStream(await running.connect(), trust, server_hostname="127.0.0.1", https_compatible=True)
        client = H2Client(stream)
        number = await client.ask((*H2_GET[:3], (b":path", b"/stream" if busy else b"/")))
        await client.read(h2.events.DataReceived if busy else h2.events.StreamEnded, number)
        running.shutdown.hand_over(42)
        assert app.drain is not None
        await app.drain.aside.wait()
        if busy:
            app.go_on.set()
            assert await client.read(h2.events.StreamEnded, number) is not None
            assert client.bodies[number].endswith(b"data: [DONE]\n\n")
        late = await client.ask(H2_GET)
        goodbye = await client.read(h2.events.ConnectionTerminated)
        assert (goodbye.error_code, goodbye.last_stream_id) == (0, 2**31 - 1)
        # h2 accepts no frame after this one, though RFC 9113 allows them
        assert late not in client.bodies
        assert b"GET /" in b"".join([bytes(piece) async for piece in stream])
        assert await running.wait_ended() == ShutdownReport(finished=1, cut=0, forced=0)
        await stream.aclose()


async def test_a_bad_certificate_is_named(tmp_path: Path) -> None:
    """Missing or invalid files are named in the error."""
    config = attrs.evolve(CONFIG, certfile=str(tmp_path / "cert.pem"), keyfile=str(tmp_path / "key.pem"))
    with pytest.raises(StartupFailed, match=r"cert\.pem"):
        await serve(App(), config)
    (tmp_path / "cert.pem").write_text("no certificate")
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(StartupFailed, match=r"cert\.pem"):
        await serve(App(), config)


# -- signals ----------------------------------------------------------------------------------------------------------


async def test_a_signal_begins_the_drain() -> None:
    """`run` drains at the first SIGTERM, and returns True."""
    app = App()
    async with open_run(app) as (running, outcome):
        stream = await running.ask("/stream")
        await read_until(stream, b"data: 1\n\n\r\n")
        os.kill(os.getpid(), signal.SIGTERM)
        assert app.drain is not None
        await app.drain.begun.wait()
        app.go_on.set()
        assert (await read_all(stream)).endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
    assert outcome == [True]


@pytest.mark.slow
async def test_a_second_signal_is_now() -> None:
    """A second signal of either kind ends everything at once, also stalled clients; `run` returns False."""
    app = App()
    async with open_run(app) as (running, outcome):
        await running.ask("/flood")
        await app.flooding.wait()
        await trio.testing.wait_all_tasks_blocked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert app.drain is not None
        await app.drain.begun.wait()
        began = trio.current_time()
        os.kill(os.getpid(), signal.SIGINT)
    assert outcome == [False]
    assert trio.current_time() - began < 1.0


async def test_the_end_of_the_supervisor_begins_the_drain() -> None:
    """`run` drains when the other end of the pipe to its supervisor is closed."""
    read_end, write_end = os.pipe()
    try:
        async with open_run(App(), read_end) as (running, outcome):
            await running.assert_alive()
            os.close(write_end)
        assert outcome == [True]
    finally:
        os.close(read_end)


@contextlib.asynccontextmanager
async def open_run(app: Application, parent_fd: int | None = None) -> AsyncIterator[tuple[Running, list[bool]]]:
    """Runs `run` until it ends by itself; yields a client, and a list for its return value."""
    sockets = open_sockets(CONFIG)
    outcome: list[bool] = []
    running = Running(f"http://127.0.0.1:{sockets[0].getsockname()[1]}", Shutdown())

    async def run() -> None:
        outcome.append(await server.run(app, CONFIG, sockets, parent_fd))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.testing.wait_all_tasks_blocked()
            yield running, outcome
    await running.close_clients()


@pytest.mark.slow
def test_a_process_ends_in_order(tmp_path: Path) -> None:
    """A process exits with 0 after SIGTERM, although a client does not read."""
    script = tmp_path / "serve.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, trio
            from trigate.server import server
            from trigate.config.sections import ServerConfig
            from trigate.server.listeners import open_sockets

            async def app(scope, receive, send):
                if scope["type"] == "http":
                    await send({"type": "http.response.start", "status": 200, "headers": []})
                    while True:
                        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})

            config = ServerConfig(port=0, drain_timeout_s=0.2)
            sockets = open_sockets(config)
            print(sockets[0].getsockname()[1], flush=True)
            sys.exit(0 if trio.run(server.run, app, config, sockets) else 1)
            """
        )
    )
    env = environment()
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(HELLO)
            client.recv(1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
