"""Serves an ASGI app on Trio: connections, the crash firewall, signals, drain. Knows nothing of models.

**A connection is one task behind a firewall**: what is raised in it ends it, and it alone, as one
warning in the log. (Under hypercorn's Trio worker one malformed request can end the process.)

**The end, in order**: the readiness check says so (`Drainable.announce`), for ``drain_notice_s`` before anything else
changes; no new connections; new work is refused (`Drainable.begin`); idle connections are closed; running
exchanges may finish within ``drain_timeout_s``, with a connection or without; the rest are told to end
(`Drainable.cut`) and get `CUT_TIMEOUT_S` for their last words; what is left is aborted. A task that sends to
a peer which does not read is shielded, so `Connection.abort` is the one thing that always ends a connection,
and every way out of `serve` goes through it; also where it is cancelled, but for `LAST_WORDS_S` before it.

**The end after a takeover** (`takeover`) begins more gently, since clients do not know of it: nothing is refused, and
idle connections stay open. Each response says that it is the last one of its connection, and the client's next
connection is its successor's. What is still open after ``drain_timeout_s`` ends as above."""

from __future__ import annotations

import errno
import math
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, runtime_checkable

import attrs
import structlog
import trio

from trigate.concurrency.poller import open_poller
from trigate.concurrency.timers import open_timers
from trigate.config.sections import ServerConfig
from trigate.server import hot_restart
from trigate.server.connection import Connection, Http2Service, open_service, serve_connection
from trigate.server.hot_restart import show
from trigate.server.http1 import Address, Application, Message
from trigate.server.listeners import open_sockets
from trigate.server.supervisor import SUCCEEDED, wait_parent_gone

__all__ = [
    "Drainable",
    "Drained",
    "StartupFailed",
    "open_lifespan",
    "open_tls",
    "run",
    "serve",
    "serve_connection",
]

log = structlog.get_logger("trigate.server.server")

CUT_TIMEOUT_S = 2.0
LAST_LOOK_S = 0.05
"""How long a drain waits at least for idle connections to close."""
LAST_WORDS_S = 0.5
"""What connections have for their last words where there is no drain, or no more: a server that is cancelled."""
ABORT_TIMEOUT_S = 5.0
SHUTDOWN_TIMEOUT_S = 10.0
ACCEPT_PAUSE_S = 0.1
SLICE = 100
"""How many connections are closed between two turns of everything else."""
_LEAVING_AT_ONCE = 1024  # all that the connections' poller tells is that a client has left: little is done at once then

_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}


class StartupFailed(Exception):
    """The app or its certificate is not fit to serve; the message says why."""


@runtime_checkable
class Drainable(Protocol):
    """What an app leaves as ``state["drain"]`` at its start-up, to take part in an orderly end."""

    def step_aside(self) -> None:
        """Fetches no new work from now on, as another process does; what comes is still done."""

    def announce(self) -> None:
        """The same, and says in the readiness check that no work should come."""

    def begin(self) -> None:
        """Refuses new work from now on."""

    async def wait_quiet(self) -> None:
        """Waits until what goes on without a connection has ended."""

    def cut(self) -> Sequence[str]:
        """Ends every running exchange: upstream at once, the client with an error and a proper end. Says which."""


@attrs.frozen(kw_only=True)
class Drained:
    """How the connections ended that were open when the drain began.

    Attributes:
        finished: By themselves.
        cut: Properly, after `Drainable.cut`.
        forced: Aborted.
    """

    finished: int
    cut: int
    forced: int


# -- the lifespan -----------------------------------------------------------------------------------


@asynccontextmanager
async def open_lifespan(app: Application) -> AsyncIterator[dict[str, Any]]:
    """Runs the ASGI lifespan of an app around a block, and gives its ``state``.

    An app that raises on a lifespan scope before it completes its start-up has no lifespan, says the
    specification, and is served without one. What an app raises later ends the block.

    Raises:
        StartupFailed: The app said that its start-up failed.
    """
    state: dict[str, Any] = {}
    to_app, inbox = trio.open_memory_channel[Message](2)
    started, stopped = trio.Event(), trio.Event()
    failure: str | None = None

    async def send(message: Message) -> None:
        nonlocal failure
        await trio.lowlevel.checkpoint()
        match message["type"]:
            case "lifespan.startup.complete":
                started.set()
            case "lifespan.startup.failed":
                failure = message.get("message") or "the app gave no reason"
                started.set()
            case "lifespan.shutdown.complete":
                stopped.set()
            case "lifespan.shutdown.failed":
                log.error("shutdown_failed", reason=message.get("message", ""))
                stopped.set()
            case kind:
                raise ValueError(f"{kind} is not a message of an ASGI lifespan")

    async def run() -> None:  # noqa: ASYNC910 - the app waits
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": state,
        }
        try:
            await app(scope, inbox.receive, send)
        except* Exception as group:
            if started.is_set() and failure is None:
                raise
            log.debug("no_lifespan", reason=repr(group.exceptions[0]))
        finally:
            started.set()
            stopped.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        to_app.send_nowait({"type": "lifespan.startup"})
        await started.wait()
        if failure is None:
            yield state
            to_app.send_nowait({"type": "lifespan.shutdown"})
            with trio.move_on_after(SHUTDOWN_TIMEOUT_S):
                await stopped.wait()
            if not stopped.is_set():
                log.warning("shutdown_abandoned", after_s=SHUTDOWN_TIMEOUT_S)
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise StartupFailed(f"the app could not start: {failure}")


# -- the server -------------------------------------------------------------------------------------


def open_tls(config: ServerConfig) -> ssl.SSLContext | None:
    """Loads the certificate; None where there is none.

    Raises:
        StartupFailed: It cannot be used.
    """
    if config.certfile is None or config.keyfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        context.load_cert_chain(config.certfile, config.keyfile)
    except OSError as error:  # ssl.SSLError is one
        files = f"{config.certfile} and {config.keyfile}"
        raise StartupFailed(f"TLS: {files} cannot be used: {error.strerror or error}") from None
    return context


@attrs.define(eq=False)
class _Server:
    """The connections of one `serve`, and how they end."""

    app: Application
    config: ServerConfig
    tls: ssl.SSLContext | None
    state: Mapping[str, Any]
    _service: Http2Service = attrs.field(init=False)
    _live: set[Connection] = attrs.field(init=False, factory=set)
    _quiet: trio.Event = attrs.field(init=False, factory=trio.Event)

    async def run(
        self,
        sockets: Sequence[socket.socket],
        end: End,
        before_accepting: Callable[[], Awaitable[None]] | None,
        task_status: trio.TaskStatus[list[str]],
    ) -> Drained:
        """Serves on these sockets until the end, then drains."""
        scheme = "https" if self.tls else "http"
        urls = list(dict.fromkeys(f"{scheme}://{show(sock.getsockname())}" for sock in sockets))
        found = self.state.get("drain")
        drain = found if isinstance(found, Drainable) else None
        is_started = has_ended = False
        async with (
            open_poller(batch=_LEAVING_AT_ONCE) as poller,
            open_timers() as timers,
            trio.open_nursery() as connections,
        ):
            self._service = open_service(self.app, self.config, self.state, timers, poller)
            try:
                async with trio.open_nursery() as accepting:
                    accepting.start_soon(self._wait_end, end, drain, accepting.cancel_scope)
                    if before_accepting is not None and not end.begun.is_set():
                        await before_accepting()
                    for sock in sockets:
                        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
                        accepting.start_soon(self.accept, listener, connections)
                    log.info(f"Listening on {', '.join(urls)}")
                    task_status.started(urls)
                    is_started = True
                if not is_started:
                    task_status.started(urls)
                for sock in sockets:
                    sock.close()
                drained = await self._end(drain, end, connections)
                has_ended = True
            finally:
                with trio.move_on_after(ABORT_TIMEOUT_S, shield=True):
                    if not has_ended:  # clients are told before their connections are closed
                        connections.cancel_scope.cancel()
                        await self._wait_quiet(LAST_WORDS_S)
                    for connection in list(self._live):
                        await connection.abort()
                connections.cancel_scope.cancel()
        return drained

    async def accept(self, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        """Accepts connections for ever; want of file descriptors or memory only slows it down."""
        failures, told_at = 0, -math.inf
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    raise
                failures += 1
                if trio.current_time() >= told_at + 1.0:
                    reason = errno.errorcode[error.errno]
                    log.warning("accept_failed", reason=reason, times=failures, connections=len(self._live))
                    failures, told_at = 0, trio.current_time()
                await trio.sleep(ACCEPT_PAUSE_S)
            else:
                self._start(stream, connections)

    def _start(self, stream: trio.SocketStream, connections: trio.Nursery) -> None:
        try:
            client, server = (
                _address(stream.socket.getpeername()),
                _address(stream.socket.getsockname()),
            )
        except OSError:  # reset before it was accepted
            stream.socket.close()
            return
        secured = trio.SSLStream(stream, self.tls, server_side=True, https_compatible=True) if self.tls else stream
        connection = Connection(self._service, secured, client, server)
        self._live.add(connection)
        connections.start_soon(self.run_connection, connection)

    async def run_connection(self, connection: Connection) -> None:  # noqa: ASYNC910 - it reads
        """The firewall: whatever a connection raises ends that connection and nothing else."""
        try:
            await connection.run()
        except* Exception as group:
            log.warning("connection_crashed", client=connection.client, exc_info=group)
        finally:
            self._live.discard(connection)
            if not self._live:
                self._quiet.set()

    async def _wait_end(self, end: End, drain: Drainable | None, accepting: trio.CancelScope) -> None:
        await end.begun.wait()
        if end.stop.is_set():
            await self._give_notice(drain)
        accepting.cancel()

    async def _give_notice(self, drain: Drainable | None) -> None:
        """Says that the end comes, and goes on as before for a while: who sends clients here must hear of it first."""
        if drain is not None:
            drain.announce()
        if self.config.drain_notice_s:
            self._service.begin_to_end()
            log.info("drain_announced", for_s=self.config.drain_notice_s)
        await trio.sleep(self.config.drain_notice_s)

    async def _end(self, drain: Drainable | None, end: End, connections: trio.Nursery) -> Drained:
        began = len(self._live)
        timeout_s = self.config.drain_timeout_s
        ends_at = trio.current_time() + timeout_s
        log.info("draining", connections=began, timeout_s=timeout_s, successor=end.successor)
        if not end.stop.is_set():
            if drain is not None:
                drain.step_aside()
            self._service.begin_to_end()
            for connection in self._live:
                connections.start_soon(connection.leave)
            await self._wait_gone(drain, end.stop, timeout_s)
        if drain is not None:
            drain.begin()
        await self._service.begin_drain()
        for number, connection in enumerate(list(self._live), 1):
            connection.close_if_idle()
            if number % SLICE == 0:
                await trio.lowlevel.checkpoint()
        is_quiet = await self._wait_quiet(max(ends_at - trio.current_time(), LAST_LOOK_S), drain)
        late = len(self._live)
        cut: Sequence[str] = ()
        if not is_quiet and drain is not None:
            cut = drain.cut()
            await self._wait_quiet(CUT_TIMEOUT_S)
        left = len(self._live)
        drained = Drained(finished=began - late, cut=late - left, forced=left)
        for connection in self._live:
            log.warning("connection_forced", client=connection.client)
        log.info("drained", **attrs.asdict(drained), cut_exchanges=list(cut))
        return drained

    async def _wait_gone(self, drain: Drainable | None, stop: trio.Event, timeout_s: float) -> None:
        """Waits until all clients have gone to the successor, or time is up, or there is no time for that."""
        async with trio.open_nursery() as nursery:

            async def wait_stop() -> None:
                await stop.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_stop)
            await self._wait_quiet(timeout_s, drain)
            nursery.cancel_scope.cancel()

    async def _wait_quiet(self, timeout_s: float, drain: Drainable | None = None) -> bool:
        self._quiet = trio.Event()
        if not self._live:
            self._quiet.set()
        with trio.move_on_after(timeout_s) as scope:
            await self._quiet.wait()
            if drain is not None:
                await drain.wait_quiet()
        return not scope.cancelled_caught


def _address(name: Any) -> Address | None:
    return (name[0], name[1]) if isinstance(name, tuple) else None


@attrs.define(eq=False)
class End:
    """How a server is told to end.

    Attributes:
        begun: The end has begun.
        stop: It is to stop: nobody serves in its place.
        successor: The process that does, otherwise; 0 = that is not known here.
    """

    begun: trio.Event = attrs.field(factory=trio.Event)
    stop: trio.Event = attrs.field(factory=trio.Event)
    successor: int | None = None

    def stop_now(self) -> None:
        """Begins the end, or goes on with it without regard to clients that are idle."""
        self.stop.set()
        self.begun.set()

    def succeed(self, pid: int) -> None:
        """Begins the end: another process serves."""
        if not self.begun.is_set():
            self.successor = pid
            self.begun.set()


async def serve(  # noqa: ASYNC128 - `_Server.run` calls it
    app: Application,
    config: ServerConfig,
    *,
    end: End | None = None,
    sockets: Sequence[socket.socket] | None = None,
    before_accepting: Callable[[], Awaitable[None]] | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> Drained:
    """Serves an app until it is told to end, and the connections have ended.

    Args:
        app: A Trio-native ASGI app, with or without a lifespan. See `Drainable` for what it may put into its ``state``.
        config: Where and how.
        sockets: Sockets that already listen (see `listeners.open_sockets`), instead of those that the config names.
            Owned: closed when the drain begins.
        end: Tells it to end. Without one, it serves until it is cancelled.
        before_accepting: Is awaited when everything is ready, before the first connection is accepted.
        task_status: Started with the base URLs, once connections are accepted.

    Returns:
        How the connections ended that were open when the end began.

    Raises:
        StartupFailed: It cannot start.

    Cancels: All connections are closed at once, and the app's lifespan is cancelled.
    """
    tls = open_tls(config)
    listening = list(sockets) if sockets is not None else open_sockets(config)
    try:
        async with open_lifespan(app) as state:
            return await _Server(app, config, tls, state).run(
                listening, End() if end is None else end, before_accepting, task_status
            )
    finally:
        for sock in listening:
            sock.close()


async def run(
    app: Application,
    config: ServerConfig,
    sockets: Sequence[socket.socket] | None = None,
    parent_fd: int | None = None,
    *,
    doors: Sequence[socket.socket] = (),
    before_accepting: Callable[[], Awaitable[None]] | None = None,
) -> bool:
    """Serves an app until SIGTERM or SIGINT: the first begins the drain, a second ends all at once; or until another
    gateway has taken over.

    Args:
        app: As `serve` has it.
        config: As `serve` has it.
        sockets: As `serve` has it.
        parent_fd: A descriptor whose end of file means that the supervisor is gone; the drain
            begins then. From a supervisor, `SUCCEEDED` says that another gateway has taken over.
        doors: At which another gateway may ask for the sockets; see `takeover.attend`. Owned.
        before_accepting: As `serve` has it.

    Returns:
        Whether it ended in order; False after a second signal.

    Raises:
        ListenError: The address cannot be listened on.
        StartupFailed: The app or the certificate is not fit to serve.
    """
    end = End()
    listening = list(sockets) if sockets is not None else open_sockets(config)
    attending = trio.CancelScope()

    async def obey(received: AsyncIterator[int]) -> None:
        async for number in received:
            if number == SUCCEEDED:
                end.succeed(0)
                continue
            log.info("signal_received", signal=signal.Signals(number).name, again=end.stop.is_set())
            if end.stop.is_set():
                serving.cancel()
            end.stop_now()

    async def follow(fd: int) -> None:
        await wait_parent_gone(fd)
        log.warning("supervisor_gone")
        end.stop_now()

    async def attend_no_longer() -> None:
        await end.stop.wait()
        await trio.sleep(config.drain_notice_s)
        attending.cancel()

    async def serve_all(task_status: trio.TaskStatus[list[str]]) -> None:  # noqa: ASYNC128 - `serve` calls it
        await serve(app, config, end=end, sockets=listening, before_accepting=before_accepting, task_status=task_status)
        nursery.cancel_scope.cancel()

    numbers = (signal.SIGTERM, signal.SIGINT) if parent_fd is None else (signal.SIGTERM, signal.SIGINT, SUCCEEDED)
    signals = trio.open_signal_receiver(*numbers)
    with signals as received, trio.CancelScope() as serving:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey, received)
            if parent_fd is not None:
                nursery.start_soon(follow, parent_fd)
            nursery.start_soon(attend_no_longer)
            await nursery.start(serve_all)
            with attending:
                await hot_restart.attend(doors, listening, end.succeed)
    return not serving.cancelled_caught
