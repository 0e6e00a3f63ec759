"""Serves an ASGI app on Trio: listeners, the crash firewall, signals, drain. Knows nothing of models.

**A connection is one task behind a firewall**: what is raised in it ends it, and it alone, as one
warning in the log. (Under hypercorn's Trio worker one malformed request can end the process.)

**The end, in order**: the app is told (`Drainable.begin`); no new connections; idle ones are closed; running
exchanges may finish within ``drain_timeout_s``, with a connection or without; the rest are told to end
(`Drainable.cut`) and get `CUT_TIMEOUT_S` for their last words; what is left is aborted. A task that sends to
a peer which does not read is shielded, so `Connection.abort` is the one thing that always ends a connection,
and every way out of `serve` goes through it."""

from __future__ import annotations

import errno
import math
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, runtime_checkable

import attrs
import structlog
import trio

from trigate.config import ServerConfig
from trigate.http1 import Address, Application, Message
from trigate.poller import open_poller
from trigate.protocol import Connection, Http2Service, open_service, serve_connection
from trigate.supervisor import wait_parent_gone
from trigate.timers import open_timers

__all__ = [
    "Drainable",
    "Drained",
    "ListenError",
    "StartupFailed",
    "open_lifespan",
    "open_sockets",
    "open_tls",
    "run",
    "serve",
    "serve_connection",
]

log = structlog.get_logger("trigate.server")

CUT_TIMEOUT_S = 2.0
ABORT_TIMEOUT_S = 5.0
SHUTDOWN_TIMEOUT_S = 10.0
ACCEPT_PAUSE_S = 0.1
SLICE = 100
"""How many connections are closed between two turns of everything else."""
_LEAVING_AT_ONCE = 1024  # all that the connections' poller tells is that a client has left: little is done at once then

_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}


class ListenError(Exception):
    """The address cannot be listened on; the message says why, for the person who asked for it."""


class StartupFailed(Exception):
    """The app or its certificate is not fit to serve; the message says why."""


@runtime_checkable
class Drainable(Protocol):
    """What an app leaves as ``state["drain"]`` at its start-up, to take part in an orderly end."""

    def begin(self) -> None:
        """Refuses new work from now on, and says so in the readiness check."""

    async def wait_quiet(self) -> None:
        """Waits until what goes on without a connection has ended."""

    def cut(self) -> None:
        """Ends every running exchange: upstream at once, the client with an error and a proper end."""


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


def open_sockets(config: ServerConfig) -> list[socket.socket]:
    """Binds and listens on ``config.host`` and ``config.port``: one socket for each address that the host has.

    Several workers get one each for each address, where the system spreads connections over them (Linux): in the order
    of the workers, for each address. On one socket for all, whoever is quicker takes nearly everything.

    Raises:
        ListenError: An address is in use, forbidden, or does not exist.
    """
    where = f"{config.host}:{config.port}"
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ListenError(f"{where} cannot be listened on: {reason}") from None
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    port = config.port
    try:
        for family, address in dict.fromkeys((each[0], each[4]) for each in found):
            try:
                sock = _listen(family, (address[0], port, *address[2:]), config, only_v6=len(found) > 1)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error  # "localhost" often has an IPv6 address that the machine has not
            else:
                port = sock.getsockname()[1]
                if config.workers == 1 or sys.platform != "linux":
                    sockets.append(sock)
                    continue
                sock.close()  # it has shown that nobody else listens there, which those that share do not find out
                for _ in range(config.workers):
                    shared = _listen(
                        family, (address[0], port, *address[2:]), config, only_v6=len(found) > 1, share=True
                    )
                    sockets.append(shared)
        if missing is not None and not sockets:
            raise missing
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise ListenError(_why_not(where, error)) from None
    return sockets


def _listen(family: int, address: Any, config: ServerConfig, *, only_v6: bool, share: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if family == socket.AF_INET6 and only_v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT") and config.tcp_user_timeout_s:
            sock.setsockopt(
                socket.IPPROTO_TCP,
                socket.TCP_USER_TIMEOUT,
                math.ceil(config.tcp_user_timeout_s * 1000),
            )
        sock.setblocking(False)
        sock.bind(address)
        sock.listen(config.backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def _why_not(where: str, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"{where} is in use by another program (choose another port, or stop that program)"
        case errno.EACCES | errno.EPERM:
            return f"{where} is forbidden to this user (ports under 1024 need a privilege)"
        case errno.EADDRNOTAVAIL:
            return f"{where} cannot be listened on: no interface of this machine has that address"
        case _:
            return f"{where} cannot be listened on: {error.strerror or error}"


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
        stop: trio.Event,
        task_status: trio.TaskStatus[list[str]],
    ) -> Drained:
        """Serves on these sockets until ``stop`` is set, then drains."""
        scheme = "https" if self.tls else "http"
        urls = [f"{scheme}://{_show(sock.getsockname())}" for sock in sockets]
        drain = self.state.get("drain")
        async with (
            open_poller(turn=_LEAVING_AT_ONCE) as poller,
            open_timers() as timers,
            trio.open_nursery() as connections,
        ):
            self._service = open_service(self.app, self.config, self.state, timers, poller)
            try:
                async with trio.open_nursery() as accepting:
                    for sock in sockets:
                        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
                        accepting.start_soon(self.accept, listener, connections)
                    log.info(f"Listening on {', '.join(urls)}")
                    task_status.started(urls)
                    await stop.wait()
                    accepting.cancel_scope.cancel()
                for sock in sockets:
                    sock.close()
                drained = await self._drain(drain if isinstance(drain, Drainable) else None)
            finally:
                with trio.move_on_after(ABORT_TIMEOUT_S, shield=True):
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

    async def _drain(self, drain: Drainable | None) -> Drained:
        began = len(self._live)
        log.info("draining", connections=began, timeout_s=self.config.drain_timeout_s)
        if drain is not None:
            drain.begin()
        await self._service.begin_drain()
        for number, connection in enumerate(list(self._live), 1):
            connection.close_if_idle()
            if number % SLICE == 0:
                await trio.lowlevel.checkpoint()
        await self._wait_quiet(self.config.drain_timeout_s, drain)
        late = len(self._live)
        if late and drain is not None:
            drain.cut()
            await self._wait_quiet(CUT_TIMEOUT_S)
        left = len(self._live)
        drained = Drained(finished=began - late, cut=late - left, forced=left)
        log.info("drained", **attrs.asdict(drained))
        return drained

    async def _wait_quiet(self, timeout_s: float, drain: Drainable | None = None) -> None:
        self._quiet = trio.Event()
        if not self._live:
            self._quiet.set()
        with trio.move_on_after(timeout_s):
            await self._quiet.wait()
            if drain is not None:
                await drain.wait_quiet()


def _address(name: Any) -> Address | None:
    return (name[0], name[1]) if isinstance(name, tuple) else None


async def serve(  # noqa: ASYNC128 - `_Server.run` calls it
    app: Application,
    config: ServerConfig,
    *,
    stop: trio.Event | None = None,
    sockets: Sequence[socket.socket] | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> Drained:
    """Serves an app until ``stop`` is set and the connections have ended.

    Args:
        app: A Trio-native ASGI app, with or without a lifespan. See `Drainable` for what it may put into its ``state``.
        config: Where and how.
        sockets: Sockets that already listen (see `open_sockets`), instead of those that the config names. Owned: closed
            when the drain begins.
        stop: Set it to begin the drain. Without one, it serves until it is cancelled.
        task_status: Started with the base URLs, once connections are accepted.

    Returns:
        How the connections ended that were open when ``stop`` was set.

    Raises:
        StartupFailed: It cannot start.

    Cancels: All connections are closed at once, and the app's lifespan is cancelled.
    """
    tls = open_tls(config)
    listening = list(sockets) if sockets is not None else open_sockets(config)
    try:
        async with open_lifespan(app) as state:
            return await _Server(app, config, tls, state).run(
                listening, trio.Event() if stop is None else stop, task_status
            )
    finally:
        for sock in listening:
            sock.close()


def _show(name: Any) -> str:
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def run(
    app: Application,
    config: ServerConfig,
    sockets: Sequence[socket.socket] | None = None,
    parent_fd: int | None = None,
) -> bool:
    """Serves an app until SIGTERM or SIGINT: the first begins the drain, a second ends all at once.

    Args:
        app: As `serve` has it.
        config: As `serve` has it.
        sockets: As `serve` has it.
        parent_fd: A descriptor whose end of file means that the supervisor is gone; the drain
            begins then.

    Returns:
        Whether it ended in order; False after a second signal.

    Raises:
        ListenError: The address cannot be listened on.
        StartupFailed: The app or the certificate is not fit to serve.
    """
    stop = trio.Event()

    async def obey(received: AsyncIterator[int]) -> None:
        async for number in received:
            log.info("signal_received", signal=signal.Signals(number).name, again=stop.is_set())
            if stop.is_set():
                serving.cancel()
            stop.set()

    async def follow(fd: int) -> None:
        await wait_parent_gone(fd)
        log.warning("supervisor_gone")
        stop.set()

    signals = trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT)
    with signals as received, trio.CancelScope() as serving:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey, received)
            if parent_fd is not None:
                nursery.start_soon(follow, parent_fd)
            await serve(app, config, stop=stop, sockets=sockets)
            nursery.cancel_scope.cancel()
    return not serving.cancelled_caught
