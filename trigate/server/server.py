"""Serves an ASGI app on Trio: accepts connections, and contains their crashes. Knows nothing of models.

**A connection is one task behind a firewall:** an exception in it ends that connection and nothing else, and is logged
as one warning. (Under hypercorn's Trio worker, one malformed request can end the process.)

`lifespan` starts and stops the app, `acceptor` accepts connections within the limit of file descriptors, `connection`
serves one, and `shutdown` describes how a server ends.
`serve` runs until its `Shutdown` stops it; `run` adds signals, the supervisor and hot restarts.
"""

from __future__ import annotations

import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import attrs
import trio

from trigate.concurrency import descriptors
from trigate.concurrency.poller import open_poller
from trigate.concurrency.timers import open_timers
from trigate.config.sections import Seconds, ServerConfig
from trigate.errors import Overloaded
from trigate.logs import log
from trigate.server import hot_restart
from trigate.server.acceptor import Acceptor
from trigate.server.connection import Connection, Service, make_service
from trigate.server.hot_restart import format_address
from trigate.server.http1 import Address, Application, Message, Receive, Send
from trigate.server.lifespan import StartupFailed, open_lifespan
from trigate.server.listeners import open_sockets
from trigate.server.shutdown import (
    ABORT_TIMEOUT_S,
    Drainable,
    OpenConnections,
    Shutdown,
    ShutdownReport,
    ShutdownSequence,
    follow_signals,
    follow_supervisor,
)
from trigate.server.supervisor import HANDED_OVER

REFUSAL_S = 1.0
"""How long a connection beyond the limit may take to send a request, which is answered with 503."""
REFUSAL_TIMEOUT_S = 3.0
"""How long such a connection may take in all."""
_DISCONNECTS_PER_BATCH = 1024  # the connections' poller reports only disconnects, and its callbacks are short


def open_tls(config: ServerConfig) -> ssl.SSLContext | None:
    """Loads the certificate. Returns None if none is configured.

    Raises:
        StartupFailed: The certificate or its key cannot be used.
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
    """The sockets and connections of one `serve`."""

    app: Application
    config: ServerConfig
    tls: ssl.SSLContext | None
    state: Mapping[str, Any]  # Any: values of the app
    connections: OpenConnections = attrs.field(init=False, factory=OpenConnections)
    _service: Service = attrs.field(init=False)
    _refusing: Service = attrs.field(init=False)
    _acceptor: Acceptor = attrs.field(init=False)
    _nursery: trio.Nursery = attrs.field(init=False)

    async def run(
        self,
        sockets: Sequence[socket.socket],
        shutdown: Shutdown,
        before_accepting: Callable[[], Awaitable[None]] | None,
        task_status: trio.TaskStatus[list[str]],
    ) -> ShutdownReport:
        """Serves on these sockets until the server is to end, then drains."""
        scheme = "https" if self.tls else "http"
        urls = list(dict.fromkeys(f"{scheme}://{format_address(sock.getsockname())}" for sock in sockets))
        drain = self.state.get("drain")
        is_started = drained = False
        async with (
            open_poller(batch=_DISCONNECTS_PER_BATCH) as poller,
            open_timers() as timers,
            trio.open_nursery() as nursery,
        ):
            self._nursery = nursery
            self._service = make_service(self.app, self.config, self.state, timers, poller)
            refusal_config = attrs.evolve(self.config, keep_alive_timeout_s=Seconds(REFUSAL_S))
            self._refusing = make_service(_refuse, refusal_config, {}, timers, poller)
            self._refusing.announce_close()
            self._acceptor = Acceptor(self.connections, descriptors.max_pairs(), self._start, self._start_refusal)
            if self.tls is not None:
                self._service.http2()  # loaded now, and not in the first handshake
            sequence = ShutdownSequence(
                config=self.config,
                service=self._service,
                connections=self.connections,
                app=drain if isinstance(drain, Drainable) else None,
                shutdown=shutdown,
            )
            try:
                async with trio.open_nursery() as accepting:
                    accepting.start_soon(self._stop_accepting, sequence, accepting.cancel_scope)
                    if before_accepting is not None and not shutdown.begun.is_set():
                        await before_accepting()
                    for sock in sockets:
                        accepting.start_soon(self._acceptor.run, sock)
                    log.info(f"Listening on {', '.join(urls)}")
                    task_status.started(urls)
                    is_started = True
                if not is_started:
                    task_status.started(urls)
                for sock in sockets:
                    sock.close()
                report = await sequence.drain(nursery)
                drained = True
            finally:
                with trio.move_on_after(ABORT_TIMEOUT_S, shield=True):
                    await sequence.abort(nursery, drained=drained)
                nursery.cancel_scope.cancel()
        return report

    async def _stop_accepting(self, sequence: ShutdownSequence, accepting: trio.CancelScope) -> None:
        await sequence.wait_until_closing()
        accepting.cancel()

    def _start(self, stream: trio.SocketStream) -> None:
        connection = self._make(self._service, stream)
        if connection is not None:
            self.connections.live.add(connection)
            self._nursery.start_soon(self.run_connection, connection)

    def _start_refusal(self, stream: trio.SocketStream) -> None:
        connection = self._make(self._refusing, stream)
        if connection is not None:
            self._nursery.start_soon(self._run_refusal, connection)
        else:
            self._acceptor.note_refused()

    def _make(self, service: Service, stream: trio.SocketStream) -> Connection | None:
        try:
            client, server = (
                _address(stream.socket.getpeername()),
                _address(stream.socket.getsockname()),
            )
        except OSError:  # reset before it was accepted
            stream.socket.close()
            return None
        secured = trio.SSLStream(stream, self.tls, server_side=True, https_compatible=True) if self.tls else stream
        return Connection(service, secured, client, server)

    async def run_connection(self, connection: Connection) -> None:
        """Serves a connection behind the firewall: an exception ends this connection and nothing else."""
        try:
            await connection.run()
        except* Exception as group:
            log.warning("connection_crashed", client=connection.client, exc_info=group)
        finally:
            self.connections.discard(connection)

    async def _run_refusal(self, connection: Connection) -> None:
        with trio.move_on_after(REFUSAL_TIMEOUT_S):
            await self.run_connection(connection)
        self._acceptor.note_refused()


async def _refuse(scope: Message, receive: Receive, send: Send) -> None:
    """The app of the connections beyond the limit."""
    error = Overloaded("The gateway has no file descriptor left for another connection.", retry_after_s=1.0)
    status, headers, body = error.to_response()
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _address(name: Any) -> Address | None:  # Any: socket addresses are tuples of different lengths, or strings
    return (name[0], name[1]) if isinstance(name, tuple) else None


async def serve(  # noqa: ASYNC128 - `_Server.run` calls it
    app: Application,
    config: ServerConfig,
    *,
    shutdown: Shutdown | None = None,
    sockets: Sequence[socket.socket] | None = None,
    before_accepting: Callable[[], Awaitable[None]] | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> ShutdownReport:
    """Serves an app until it is asked to end and the connections have ended.

    Args:
        app: A Trio-native ASGI app, with or without a lifespan. See `Drainable` for what it may put into its ``state``.
        config: The address, the certificate and the timeouts.
        shutdown: Asks the server to end. Without one, it serves until it is cancelled.
        sockets: Listening sockets (see `listeners.open_sockets`), in place of those that the configuration names.
            Owned: closed when the drain begins.
        before_accepting: Awaited when everything is ready, before the first connection is accepted.
        task_status: Started with the base URLs, once connections are accepted.

    Returns:
        How the connections ended that were open when the drain began.

    Raises:
        StartupFailed: The app or the certificate is not usable.
        ListenError: The address cannot be listened on.

    **Cancels:** closes all connections at once, and cancels the app's lifespan.
    """
    tls = open_tls(config)
    listening = list(sockets) if sockets is not None else open_sockets(config)
    try:
        async with open_lifespan(app) as state:
            return await _Server(app, config, tls, state).run(
                listening, Shutdown() if shutdown is None else shutdown, before_accepting, task_status
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
    handover_sockets: Sequence[socket.socket] = (),
    before_accepting: Callable[[], Awaitable[None]] | None = None,
) -> bool:
    """Serves an app until SIGTERM or SIGINT, or until another gateway has taken over.

    The first signal begins the drain; a second one ends everything at once.

    Args:
        app: A Trio-native ASGI app; see `serve`.
        config: The address, the certificate and the timeouts.
        sockets: Listening sockets, in place of those that the configuration names. Owned.
        parent_fd: The worker's end of the supervisor's lifeline: its end of file means that the supervisor has exited,
            and begins the drain. With a supervisor, the signal `HANDED_OVER` says that another gateway has taken over.
        handover_sockets: Where another gateway may ask for the listening sockets; see `hot_restart.serve_handover`.
            Owned.
        before_accepting: Awaited when everything is ready, before the first connection is accepted.

    Returns:
        Whether it ended in order; False after a second signal.

    Raises:
        ListenError: The address cannot be listened on.
        StartupFailed: The app or the certificate is not usable.
    """
    shutdown = Shutdown()
    listening = list(sockets) if sockets is not None else open_sockets(config)
    handing_over = trio.CancelScope()

    async def end_handover() -> None:
        await shutdown.stop.wait()
        await trio.sleep(config.drain_notice_s)
        handing_over.cancel()

    async def serve_all(task_status: trio.TaskStatus[list[str]]) -> None:  # noqa: ASYNC128 - `serve` calls it
        await serve(
            app,
            config,
            shutdown=shutdown,
            sockets=listening,
            before_accepting=before_accepting,
            task_status=task_status,
        )
        nursery.cancel_scope.cancel()

    numbers = (signal.SIGTERM, signal.SIGINT) if parent_fd is None else (signal.SIGTERM, signal.SIGINT, HANDED_OVER)
    signals = trio.open_signal_receiver(*numbers)
    with signals as received, trio.CancelScope() as serving:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow_signals, received, shutdown, serving)
            if parent_fd is not None:
                nursery.start_soon(follow_supervisor, parent_fd, shutdown)
            nursery.start_soon(end_handover)
            await nursery.start(serve_all)
            with handing_over:
                await hot_restart.serve_handover(handover_sockets, listening, shutdown.hand_over)
    return not serving.cancelled_caught
