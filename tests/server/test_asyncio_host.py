"""`trigate.server.asyncio_host`: driven by a scripted server, and then under real ones.

A test that runs on an asyncio loop is a plain function that calls `asyncio.run`: Trio would run an ``async def`` test.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib.util
import json
import math
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import sniffio
import trio
import trio.testing

from tests.support.logs import Logs
from tests.support.processes import run_gateway
from trigate.server import asyncio_host
from trigate.server.asyncio_host import AsyncioHost

Message = dict[str, Any]  # Any: an ASGI message has values of every type
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Handler = Callable[[Scope, Receive, Send], Awaitable[None]]

TIMEOUT_S = 10


class ServerError(Exception):
    """The exception of a scripted server, in place of a real server's own."""


class Exchange:
    """A scripted server's side of one call: the messages for the app, and those that it has sent."""

    def __init__(self, *messages: Message) -> None:
        self.inbox: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        self.heard = asyncio.Event()
        self.may_send = asyncio.Event()
        self.may_send.set()
        for message in messages:
            self.inbox.put_nowait(message)

    async def receive(self) -> Message:
        return await self.inbox.get()

    async def send(self, message: Message) -> None:
        await self.may_send.wait()
        self.sent.append(message)
        self.heard.set()

    @property
    def said(self) -> list[str]:
        """The last parts of the types of the sent messages: ``startup.complete``, ``start``, ``body``."""
        return [message["type"].removeprefix("lifespan.") for message in self.sent]

    def ask(self, host: AsyncioHost, type: str = "http", state: Message | None = None) -> asyncio.Task[None]:
        scope: Scope = {"type": type, "path": "/", "headers": []}
        if state is not None:
            scope["state"] = state
        call: Any = host  # Any: the scope of a real server has more keys
        return asyncio.create_task(call(scope, self.receive, self.send))


def body(data: bytes = b"", more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def asgi(handler: Handler | None = None, *, events: list[str] | None = None) -> Callable[..., Awaitable[None]]:
    """Makes a Trio app: a complete lifespan, which records its events, around a handler."""
    notes: list[str] = [] if events is None else events

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert sniffio.current_async_library() == "trio"
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                assert (await receive())["type"] == f"lifespan.{phase}"
                notes.append(phase)
                await send({"type": f"lifespan.{phase}.complete"})
        elif handler is not None:
            await handler(scope, receive, send)

    return app


def hosted(app: Callable[..., Awaitable[None]]) -> AsyncioHost:
    host: Any = AsyncioHost  # Any: hypercorn's types are narrower than these apps
    built: AsyncioHost = host(app)
    return built


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Runs a function on a new loop, and checks that no task is left on it."""

    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await main()

    asyncio.run(bounded())


async def was_cancelled(task: asyncio.Task[None]) -> bool:
    """Waits for a task. Unlike awaiting it, this distinguishes its cancellation from the caller's."""
    await asyncio.wait((task,))
    return task.cancelled()


@asynccontextmanager
async def lifespan(host: AsyncioHost, state: Message | None = None) -> AsyncIterator[Exchange]:
    """Runs the server's side of a lifespan around the block."""
    server = Exchange({"type": "lifespan.startup"})
    task = server.ask(host, "lifespan", {} if state is None else state)
    await server.heard.wait()
    assert server.said == ["startup.complete"]
    yield server
    server.inbox.put_nowait({"type": "lifespan.shutdown"})
    await task


# -- lifespan -------------------------------------------------------------------------------------


def test_lifespan_encloses_the_requests() -> None:
    """The app starts before its first request, and shuts down after its last."""
    events: list[str] = []

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        events.append("request")
        await send(body())

    async def main() -> None:
        host = hosted(asgi(handler, events=events))
        async with lifespan(host) as server:
            await Exchange().ask(host)
        assert server.said == ["startup.complete", "shutdown.complete"]

    run(main)
    assert events == ["startup", "request", "shutdown"]


def test_farewell_comes_after_the_end_of_the_run() -> None:
    """The Trio run has ended when ``lifespan.shutdown.complete`` reaches the server."""
    seen: list[tuple[str, bool]] = []

    async def main() -> None:
        host = hosted(asgi())
        inbox: asyncio.Queue[Message] = asyncio.Queue()

        async def send(message: Message) -> None:
            seen.append((message["type"], trio.lowlevel.in_trio_run()))
            await inbox.put({"type": "lifespan.shutdown"})

        inbox.put_nowait({"type": "lifespan.startup"})
        call: Any = host  # Any: see Exchange.ask
        await call({"type": "lifespan", "state": {}}, inbox.get, send)

    run(main)
    assert seen == [("lifespan.startup.complete", True), ("lifespan.shutdown.complete", False)]


def test_lifespan_state_is_the_servers_own() -> None:
    """The app's lifespan state is the dict that the server passed."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["service"] = 1
        await asgi()(scope, receive, send)

    async def main() -> None:
        state: Message = {}
        async with lifespan(hosted(app), state):
            assert state == {"service": 1}

    run(main)


@pytest.mark.parametrize("goes_on", [False, True], ids=["returns", "receives again"])
def test_failed_startup_ends_the_lifespan_call_at_once(goes_on: bool) -> None:
    """When the server receives ``startup.failed``, the lifespan call returns within that step.

    hypercorn raises out of that ``send``, then checks whether the call is done, and takes a call that is not for a
    success. The app cleans up before, also if it waits for more, as Quart does.
    """
    events: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": "no disk"})
            await trio.lowlevel.checkpoint()
            events.append("cleaned up")
            if goes_on:
                await receive()
                events.append("received")
        finally:
            events.append("left")

    async def main() -> None:
        server = Exchange({"type": "lifespan.startup"})
        plain_send = server.send

        async def send(message: Message) -> None:
            assert events == ["cleaned up", "left"]
            await plain_send(message)
            raise ServerError(message["message"])

        server.send = send  # type: ignore[method-assign]
        host = hosted(app)
        task = server.ask(host, "lifespan", {})
        await server.heard.wait()
        assert task.done()
        with pytest.raises(ServerError, match="no disk"):
            await task
        with pytest.raises(RuntimeError, match="did not start: no disk"):
            await Exchange().ask(host)

    run(main)


def test_failed_shutdown_is_reported() -> None:
    """The server receives ``shutdown.failed`` with the app's message."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.failed", "message": "disk full"})

    async def main() -> None:
        async with lifespan(hosted(app)) as server:
            pass
        assert server.sent[-1] == {"type": "lifespan.shutdown.failed", "message": "disk full"}

    run(main)


@pytest.mark.parametrize("raises", [False, True])
def test_app_without_lifespan_serves(raises: bool, logs: Logs) -> None:
    """An app that ends its lifespan without an answer serves, as it would without this host.

    The server sees whether the app raised or returned.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            if raises:
                raise ServerError("lifespan?")
            return
        await send(body(b"hello"))

    async def main() -> None:
        host = hosted(app)
        server = Exchange({"type": "lifespan.startup"})
        task = server.ask(host, "lifespan", {})
        if raises:
            with pytest.raises(ServerError, match=r"lifespan\?"):
                await task
        else:
            await task
        assert server.sent == []
        client = Exchange()
        await client.ask(host)
        assert client.sent == [body(b"hello")]

    run(main)
    assert len(logs.named("lifespan_unsupported")) == (2 if raises else 0)


def test_app_whose_lifespan_returns_early_goes_on() -> None:
    """The lifespan of an app may return after its startup: the run lasts until the shutdown."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
        else:
            await send(body())

    async def main() -> None:
        host = hosted(app)
        async with lifespan(host) as server:
            await asyncio.sleep(0.01)
            client = Exchange()
            await client.ask(host)
            assert client.sent == [body()]
        assert server.said == ["startup.complete"]

    run(main)


def test_shutdown_ends_requests_before_the_app_hears_of_it() -> None:
    """Running requests are cancelled, and have cleaned up, when the app receives the shutdown."""
    events: list[str] = []

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await send(body(more=True))
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.02)
                await send(body(b"last words"))
            events.append("request ended")

    async def main() -> None:
        host = hosted(asgi(handler, events=events))
        client = Exchange()
        async with lifespan(host):
            task = client.ask(host)
            await client.heard.wait()
        await task
        assert client.sent == [body(more=True), body(b"last words")]
        with pytest.raises(RuntimeError, match="shut down"):
            await Exchange().ask(host)

    run(main)
    assert events == ["startup", "request ended", "shutdown"]


def test_crash_of_the_app_is_seen(logs: Logs) -> None:
    """A crash ends the requests, is raised to the server, is logged once, and is the cause of refusals.

    Neither the request in flight nor a later one hangs.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            async with trio.open_nursery() as nursery:
                scope["state"]["break"] = partial(nursery.start_soon, breaks)
                await receive()
        await send(body(more=True))
        await trio.sleep_forever()

    async def breaks() -> None:
        await trio.lowlevel.checkpoint()
        raise ServerError("a service broke")

    async def main() -> None:
        host = hosted(app)
        state: Message = {}
        server = Exchange({"type": "lifespan.startup"})
        whole = server.ask(host, "lifespan", state)
        await server.heard.wait()
        client = Exchange()
        task = client.ask(host)
        await client.heard.wait()
        state["break"]()
        await task
        with pytest.RaisesGroup(pytest.RaisesExc(ServerError, match="broke")) as caught:
            await whole
        for _ in range(2):
            with pytest.raises(RuntimeError, match="crashed") as refused:
                await Exchange().ask(host)
            assert refused.value.__cause__ is caught.value

    logs.expect_error("guest_run_crashed")
    run(main)
    assert len(logs.named("guest_run_crashed")) == 1


def test_cancelled_lifespan_call_shuts_the_app_down() -> None:
    """The app also shuts down in order if the server cancels the lifespan call instead."""
    events: list[str] = []

    async def main() -> None:
        host = hosted(asgi(events=events))
        server = Exchange({"type": "lifespan.startup"})
        task = server.ask(host, "lifespan", {})
        await server.heard.wait()
        task.cancel()
        assert await was_cancelled(task)
        assert not trio.lowlevel.in_trio_run()

    run(main)
    assert events == ["startup", "shutdown"]


@pytest.mark.parametrize("phase", ["startup", "shutdown"])
def test_stuck_app_is_cancelled_with_the_lifespan_call(phase: str) -> None:
    """An app that hangs in its startup or shutdown ends when the server cancels the lifespan call."""
    stuck = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for now in ("startup", "shutdown"):
            await receive()
            if now == phase:
                stuck.set()
                await trio.sleep_forever()
            await send({"type": f"lifespan.{now}.complete"})

    async def main() -> None:
        host = hosted(app)
        server = Exchange({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
        task = server.ask(host, "lifespan", {})
        await stuck.wait()
        task.cancel()
        assert await was_cancelled(task)
        assert not trio.lowlevel.in_trio_run()

    run(main)


# -- a server without lifespan --------------------------------------------------------------------


def test_first_request_starts_the_app_and_the_loops_end_ends_it() -> None:
    """Without a lifespan call, the app starts once for all requests, and is shut down at the end.

    Each request has a copy of the lifespan state, in addition to the state from the server.
    """
    events: list[str] = []
    states: list[Message] = []
    inherited: contextvars.ContextVar[str] = contextvars.ContextVar("inherited", default="none")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        events.append(f"{scope['type']} sees {inherited.get()}")
        if scope["type"] == "lifespan":
            scope["state"]["service"] = 1
        else:
            states.append(scope["state"])
            scope["state"]["mine"] = True
        await asgi(events=events)(scope, receive, send)

    async def main() -> None:
        host = hosted(app)
        inherited.set("the request's")
        await asyncio.gather(*(Exchange().ask(host) for _ in range(3)))

    run(main)
    assert events == [
        "lifespan sees none",
        "startup",
        *["http sees the request's"] * 3,
        "shutdown",
    ]
    assert states == [{"service": 1, "mine": True}] * 3
    assert states[0] is not states[1]


def test_failed_startup_refuses_every_request() -> None:
    """Without a lifespan call, a failed startup is an error of each request, and the app starts once."""
    starts: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        starts.append(1)
        await send({"type": "lifespan.startup.failed", "message": "no disk"})

    async def main() -> None:
        host = hosted(app)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="did not start: no disk"):
                await Exchange().ask(host)

    run(main)
    assert starts == [1]


def test_cancelled_first_request_does_not_stop_the_startup() -> None:
    """The startup belongs to all requests: cancelling one request does not affect the others."""
    starting = asyncio.Event()
    go_on: list[trio.Event] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            go_on.append(trio.Event())
            starting.set()
            await go_on[0].wait()
        await asgi(lambda scope, receive, send: send(body()))(scope, receive, send)

    async def main() -> None:
        host = hosted(app)
        first, second = Exchange(), Exchange()
        leaves, stays = first.ask(host), second.ask(host)
        await starting.wait()
        leaves.cancel()
        assert await was_cancelled(leaves)
        go_on[0].set()
        await stays
        assert (first.sent, second.sent) == ([], [body()])

    run(main)


@pytest.mark.parametrize("with_lifespan", [False, True])
def test_one_host_serves_one_loop_after_the_other(with_lifespan: bool) -> None:
    """Nothing is left of a loop that has ended: the app starts and stops on each loop."""
    events: list[str] = []

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        events.append("request")
        await send(body())

    host = hosted(asgi(handler, events=events))

    async def main() -> None:
        if with_lifespan:
            for _ in range(2):
                async with lifespan(host):
                    await Exchange().ask(host)
        else:
            await Exchange().ask(host)

    run(main)
    run(main)
    assert events == ["startup", "request", "shutdown"] * (4 if with_lifespan else 2)


# -- a request ------------------------------------------------------------------------------------


def test_request_and_websocket_pass_both_ways() -> None:
    """Messages pass unchanged, also for a WebSocket, and Trio's deadlines work."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "echo", "of": await receive()})
        with trio.move_on_after(0.01) as scope_of_time:
            await trio.sleep_forever()
        await send({"type": "late", "cancelled": scope_of_time.cancelled_caught})

    async def main() -> None:
        host = hosted(asgi(handler))
        async with lifespan(host):
            for type in ("http", "websocket"):
                client = Exchange({"type": "first"})
                await client.ask(host, type)
                assert client.sent == [
                    {"type": "echo", "of": {"type": "first"}},
                    {"type": "late", "cancelled": True},
                ]

    run(main)


def test_request_leaves_nothing_behind() -> None:
    """When a call returns, its pending ``receive`` has ended, including its cleanup."""
    ends: list[str] = []

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    async def main() -> None:
        host = hosted(asgi(handler))
        async with lifespan(host):
            client = Exchange()

            async def receive() -> Message:
                async with AsyncExitStack() as stack:
                    stack.callback(ends.append, "receive")
                    stack.push_async_callback(asyncio.sleep, 0.01)
                    return await client.inbox.get()

            client.receive = receive  # type: ignore[method-assign]
            before = asyncio.all_tasks()
            await client.ask(host)
            assert asyncio.all_tasks() == before
            assert ends == ["receive"]

    run(main)


def test_crash_of_a_request_is_its_own() -> None:
    """An exception of the app is raised to the server unchanged; other requests and the run continue."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        if (await receive())["type"] == "crash":
            raise ServerError("bad request")
        await send(body())

    async def main() -> None:
        host = hosted(asgi(handler))
        async with lifespan(host):
            other = Exchange()
            running = other.ask(host)
            with pytest.raises(ServerError, match="bad request"):
                await Exchange({"type": "crash"}).ask(host)
            other.inbox.put_nowait({"type": "http.request"})
            await running
            assert other.sent == [body()]

    run(main)


def test_crash_of_a_request_at_shutdown_is_its_own() -> None:
    """A request that crashes because it is cancelled does not crash the shutdown."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        async def crashes() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ServerError("in cleanup")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(crashes)
            nursery.start_soon(trio.sleep_forever)
            await send(body(more=True))

    async def main() -> None:
        host = hosted(asgi(handler))
        client = Exchange()
        async with lifespan(host) as server:
            task = client.ask(host)
            await client.heard.wait()
        assert server.said == ["startup.complete", "shutdown.complete"]
        with pytest.RaisesGroup(pytest.RaisesExc(ServerError, match="in cleanup")):
            await task

    run(main)


def test_cancelled_call_waits_for_the_app() -> None:
    """The server's cancellation cancels the app, waits for its cleanup, and then continues.

    The server may cancel several times, and the app may still send meanwhile.
    """
    events: list[str] = []
    cleaning = asyncio.Event()

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await send(body(more=True))
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                cleaning.set()
                await trio.sleep(0.02)
                await send(body(b"last words"))
            events.append("clean")

    async def main() -> None:
        host = hosted(asgi(handler))
        async with lifespan(host):
            client = Exchange()
            task = client.ask(host)
            await client.heard.wait()
            task.cancel()
            await cleaning.wait()
            task.cancel()
            assert await was_cancelled(task)
            assert events == ["clean"]
            assert client.sent[1:] == [body(b"last words")]

    run(main)


def test_crash_of_a_cancelled_call_is_logged(logs: Logs) -> None:
    """The server gets its own cancellation, so the crash is logged."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await send(body(more=True))
        try:
            await trio.sleep_forever()
        finally:
            raise ServerError("in cleanup")

    async def main() -> None:
        host = hosted(asgi(handler))
        async with lifespan(host):
            client = Exchange()
            task = client.ask(host)
            await client.heard.wait()
            task.cancel()
            assert await was_cancelled(task)

    logs.expect_error("request_crashed_when_cancelled")
    run(main)


def test_stalled_client_cannot_hold_up_a_cancelled_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shielded send to a client that does not read fails after `_FINAL_MESSAGE_S`."""
    monkeypatch.setattr(asyncio_host, "_FINAL_MESSAGE_S", 0.02)
    errors: list[OSError] = []

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await send(body(more=True))
        with trio.CancelScope(shield=True):
            for _ in range(2):
                try:
                    await send(body())
                except OSError as error:
                    errors.append(error)

    async def main() -> None:
        host = hosted(asgi(handler))
        async with lifespan(host):
            client = Exchange()
            task = client.ask(host)
            await client.heard.wait()
            client.may_send.clear()
            task.cancel()
            assert await was_cancelled(task)
            assert client.sent == [body(more=True)]

    run(main)
    assert [str(error) for error in errors] == [
        "the server has ended this request",
        "this request is over",
    ]


# -- receive and send -----------------------------------------------------------------------------


def test_cancelled_receive_loses_no_message() -> None:
    """The message that a cancelled ``receive`` waited for goes to the next one, and the order is kept.

    The server's own ``receive`` is not cancelled, as it might lose a message then.
    """
    got: list[str] = []
    received: list[str] = []

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(3):
            with trio.move_on_after(0.001):
                got.append((await receive())["type"])
        await send(body(more=True))
        while got[-1:] != ["last"]:
            got.append((await receive())["type"])

    async def main() -> None:
        host = hosted(asgi(handler))
        async with lifespan(host):
            client = Exchange()

            async def receive() -> Message:
                received.append("begun")
                message = await client.inbox.get()
                received.append(message["type"])
                return message

            client.receive = receive  # type: ignore[method-assign]
            task = client.ask(host)
            await client.heard.wait()
            for type in ("first", "second", "last"):
                client.inbox.put_nowait({"type": type})
            await task

    run(main)
    assert got == ["first", "second", "last"]
    assert received == ["begun", "first", "begun", "second", "begun", "last"]


def test_two_receivers_share_the_messages() -> None:
    """Each message goes to exactly one of the app's waiting tasks."""
    got: list[str] = []

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        async def one() -> None:
            got.append((await receive())["type"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            await send(body(more=True))

    async def main() -> None:
        host = hosted(asgi(handler))
        async with lifespan(host):
            client = Exchange()
            task = client.ask(host)
            await client.heard.wait()
            client.inbox.put_nowait({"type": "a"})
            client.inbox.put_nowait({"type": "b"})
            await task

    run(main)
    assert sorted(got) == ["a", "b"]


def test_abandoned_send_goes_out_whole_before_the_next() -> None:
    """Cancelling a ``send`` that the server has begun releases the app, and the message is sent completely."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        with trio.move_on_after(0.01) as impatience:
            await send(body(b"one", more=True))
        assert impatience.cancelled_caught
        with trio.move_on_after(0.01):  # the server has not begun it: it is dropped
            await send(body(b"two", more=True))
        freed.set()
        await send(body(b"three"))

    async def main() -> None:
        host = hosted(asgi(handler))
        async with lifespan(host):
            client = Exchange()
            client.may_send.clear()
            task = client.ask(host)
            await freed.wait()
            client.may_send.set()
            await task
            assert client.sent == [body(b"one", more=True), body(b"three")]

    freed = asyncio.Event()
    run(main)


def test_abandoned_send_does_not_outlive_its_request() -> None:
    """The call ends with the app, although its client never reads the abandoned message."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        with trio.move_on_after(0.01):
            await send(body())

    async def main() -> None:
        host = hosted(asgi(handler))
        async with lifespan(host):
            client = Exchange()
            client.may_send.clear()
            before = asyncio.all_tasks()
            await client.ask(host)
            assert asyncio.all_tasks() == before
            assert client.sent == []

    run(main)


def test_errors_of_the_server_reach_the_app() -> None:
    """An exception of ``receive`` or ``send`` is raised in the app, which may call them again.

    It makes no difference whether they raise at once or after a wait.
    """
    seen: list[str] = []

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        for call in (receive, partial(send, body()), receive, partial(send, body())):
            try:
                await call()
            except ServerError as error:
                seen.append(str(error))

    async def main() -> None:
        host = hosted(asgi(handler))
        async with lifespan(host):
            client = Exchange()
            waits = iter((0.0, 0.0, 0.01, 0.01))

            async def broken(message: Message | None = None) -> Message:
                if wait := next(waits):
                    await asyncio.sleep(wait)
                raise ServerError("receive" if message is None else "send")

            client.receive = broken  # type: ignore[method-assign]
            client.send = broken  # type: ignore[method-assign, assignment]
            await client.ask(host)

    run(main)
    assert seen == ["receive", "send", "receive", "send"]


def test_send_after_the_request_is_an_error() -> None:
    """A task of the app that outlives its request gets an `OSError`, and cannot hang."""
    kept: list[Send] = []
    caught: list[OSError] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            kept.append(send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        try:
            await kept[0](body())
        except OSError as error:
            caught.append(error)

    async def main() -> None:
        host = hosted(app)
        async with lifespan(host):
            await Exchange().ask(host)

    run(main)
    assert len(caught) == 1


def test_server_runs_in_its_own_world() -> None:
    """``receive`` and ``send`` run in asyncio tasks, in a context of the server.

    So the server's timeouts work, and libraries detect the right event loop.
    """
    place: contextvars.ContextVar[str] = contextvars.ContextVar("place")
    seen: list[str] = []

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(f"app: {place.get()}, {sniffio.current_async_library()}")
        place.set("app")
        await receive()
        await send(body())

    async def main() -> None:
        place.set("server")
        host = hosted(asgi(handler))
        async with lifespan(host):
            client = Exchange()

            async def timed(message: Message | None = None) -> Message:
                seen.append(f"server: {place.get()}, {sniffio.current_async_library()}")
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.001):
                        await asyncio.sleep(TIMEOUT_S)
                return {"type": "http.request"}

            client.receive = timed  # type: ignore[method-assign]
            client.send = timed  # type: ignore[method-assign, assignment]
            await client.ask(host)

    run(main)
    assert seen == ["app: server, trio", *["server: server, asyncio"] * 2]


def test_send_that_need_not_wait_does_not_put_the_run_to_sleep() -> None:
    """A ``send`` that ends at once costs no round trip through the thread that waits for I/O."""

    class Sleeps(trio.abc.Instrument):
        count = 0

        def before_io_wait(self, timeout: float) -> None:
            self.count += timeout > 0

    counted: list[int] = []

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        sleeps = Sleeps()
        trio.lowlevel.add_instrument(sleeps)
        await receive()
        for _ in range(20):
            await send(body(more=True))
        counted.append(sleeps.count)
        await trio.sleep(0.001)
        counted.append(sleeps.count)
        trio.lowlevel.remove_instrument(sleeps)

    async def main() -> None:
        host = hosted(asgi(handler))
        async with lifespan(host):
            client = Exchange({"type": "http.request"})
            await client.ask(host)
            assert len(client.sent) == 20

    run(main)
    assert counted[0] == 0
    assert counted[1] > 0  # otherwise the instrument does not work


# -- real servers ---------------------------------------------------------------------------------

SERVED = """
import time
from pathlib import Path

import trio
from quart_trio import QuartTrio

from trigate.server.asyncio_host import AsyncioHost

quart = QuartTrio(__name__)
released = {}  # filled later: an event belongs to a run
moments = {}

def note(line):
    with Path(__file__).with_name("phases.log").open("a") as file:
        file.write(line + "\\n")

@quart.before_serving
async def start():
    released["event"] = trio.Event()
    note("started")

@quart.after_serving
async def stop():
    note("stopped")

@quart.get("/health")
async def health():
    return "ok"

@quart.get("/release")
async def release():
    released["event"].set()
    return "released"

@quart.get("/moments")
async def show_moments():
    return moments

@quart.get("/quart/hold")
async def hold():
    return await until_cancelled("quart")

async def until_cancelled(who):
    moments[f"{who} began"] = time.monotonic()
    try:
        await trio.sleep_forever()
    finally:
        moments[f"{who} ended"] = time.monotonic()

async def stream(send, receive, hold):
    async def watch():
        while (await receive())["type"] != "http.disconnect":
            pass
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await (until_cancelled("raw") if hold else released["event"].wait())
        await send({"type": "http.response.body", "body": b"two", "more_body": False})
        nursery.cancel_scope.cancel()

async def trio_app(scope, receive, send):
    if scope["type"] == "http" and scope["path"].startswith("/raw/"):
        await stream(send, receive, scope["path"].endswith("hold"))
    else:
        await quart(scope, receive, send)

app = AsyncioHost(trio_app)
"""

HYPERCORN = (sys.executable, "-m", "hypercorn", "--bind", "127.0.0.1:0", "--graceful-timeout", "1")
UVICORN = (sys.executable, "-m", "uvicorn", "--port", "0", "--timeout-graceful-shutdown", "1")
UVICORN_BARE = (*UVICORN, "--lifespan", "off")
needs_uvicorn = pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="uvicorn is not installed")
servers = pytest.mark.parametrize(
    "command",
    [
        pytest.param(HYPERCORN, id="hypercorn"),
        pytest.param(UVICORN, id="uvicorn", marks=needs_uvicorn),
        pytest.param(UVICORN_BARE, id="uvicorn without lifespan", marks=needs_uvicorn),
    ],
)


@attrs.frozen
class Served:
    """A server process that serves `SERVED`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Callable[[], str]
    phases: Callable[[], list[str]]

    def ask(self, path: str) -> socket.socket:
        """Sends a request, and returns the connection."""
        stream = socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S)
        stream.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        return stream

    def text(self, path: str) -> str:
        """Requests a short page, and returns its text."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            said: bytes = answer.read()
        return said.decode()

    def moment(self, name: str, after: float) -> float:
        """Returns when the app recorded an event, on the clock that all processes share."""
        while (noted := json.loads(self.text("/moments")).get(name, -math.inf)) < after:
            time.sleep(0.005)
        return float(noted)


@contextmanager
def served(room: Path, command: tuple[str, ...]) -> Iterator[Served]:
    """Runs a server from its command line for as long as the block lasts."""
    (room / "served.py").write_text(SERVED)
    phases = room / "phases.log"
    with run_gateway("", room, command=(*command, "served:app")) as gateway:
        yield Served(
            gateway.process,
            int(gateway.url.rpartition(":")[2]),
            gateway.log,
            lambda: phases.read_text().split(),
        )


def read_past(stream: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        piece = stream.recv(65536)
        assert piece, f"it ended after {data!r}"
        data += piece
    return data


@pytest.mark.slow
@servers
def test_stream_arrives_as_it_is_sent(command: tuple[str, ...], tmp_path: Path) -> None:
    """The client receives the first piece of a stream before the app makes the second."""
    with served(tmp_path, command) as server, server.ask("/raw/stream") as stream:
        assert b"two" not in read_past(stream, b"one")
        assert server.text("/release") == "released"
        read_past(stream, b"two")


@pytest.mark.slow
@servers
@pytest.mark.parametrize("who", ["raw", "quart"])
def test_client_that_leaves_cancels_its_request(command: tuple[str, ...], who: str, tmp_path: Path) -> None:
    """The app's task is cancelled within 50 ms after the client disconnects."""
    took_s: list[float] = []
    with served(tmp_path, command) as server:
        for _ in range(5):  # a busy machine may be late once
            asked_at = time.monotonic()
            with server.ask(f"/{who}/hold"):
                server.moment(f"{who} began", after=asked_at)
                left_at = time.monotonic()
            took_s.append(server.moment(f"{who} ended", after=left_at) - left_at)
            if took_s[-1] < 0.05:
                break
    assert min(took_s) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@servers
def test_signal_ends_the_server_and_the_app(command: tuple[str, ...], streaming: bool, tmp_path: Path) -> None:
    """A signal ends the process in order, including the app's shutdown, also with a running stream.

    uvicorn without lifespan gets SIGINT: at SIGTERM it kills itself before its loop is closed. hypercorn on Python 3.12
    and later waits for its clients, so the client disconnects there.
    """
    number = signal.SIGINT if command is UVICORN_BARE else signal.SIGTERM
    with served(tmp_path, command) as server, ExitStack() as stack:
        if streaming:
            read_past(stack.enter_context(server.ask("/raw/hold")), b"one")
        server.process.send_signal(number)
        if command is HYPERCORN and sys.version_info >= (3, 12):
            stack.close()
        code = server.process.wait(TIMEOUT_S)
        # uvicorn raises the signal again after an orderly shutdown.
        assert code in ((0,) if command is HYPERCORN else (0, -number)), server.log()
        assert server.phases() == ["started", "stopped"], server.log()
        assert "crashed" not in server.log()
        assert "abandoned" not in server.log()


@pytest.mark.slow
def test_two_workers_serve_and_end(tmp_path: Path) -> None:
    """Each worker process has a run of its own: importing the app starts nothing."""
    with served(tmp_path, (*HYPERCORN, "--workers", "2")) as server:
        assert server.text("/health") == "ok"
        while len(server.phases()) < 2:
            time.sleep(0.01)
        server.process.terminate()
        assert server.process.wait(TIMEOUT_S) == 0, server.log()
        # hypercorn's master terminates its workers; one that has only just started may not get to its shutdown
        assert server.phases().count("started") == 2
        assert "Traceback" not in server.log()
