"""How a server ends: what asks for it (signals, the supervisor, a hot restart), the drain, and the report.

**A shutdown, in order:** the readiness check fails (`Drainable.announce`), and for ``drain_notice_s`` nothing else
changes; the server stops accepting; new work is refused (`Drainable.begin`); idle connections are closed; running
exchanges may finish within ``drain_timeout_s``, with a connection or without; the rest are ended with an error
(`Drainable.cut`), which has `FINAL_ERROR_S` to reach the clients; what is left is aborted. A task that sends to a
client that does not read is shielded, so only `Connection.abort` ends every connection, and every way out of
`server.serve` calls it. If the server is cancelled, the connections get `FINAL_MESSAGE_S` before that.

**A hot restart** (`hot_restart`) begins more gently, as the clients do not know of it: no work is refused, and idle
connections stay open. Each response announces that it is the last one of its connection, and the client's next
connection reaches the successor. Connections that are still open after ``drain_timeout_s`` are shut down as above.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Sequence
from typing import Protocol, runtime_checkable

import attrs
import trio

from trigate.concurrency.notify import RepeatedEvent
from trigate.config.sections import ServerConfig
from trigate.logs import log
from trigate.server.connection import Connection, Service
from trigate.server.supervisor import HANDED_OVER, wait_parent_gone

FINAL_ERROR_S = 1.0
"""How long the errors with which a drain ends exchanges may take to reach the clients."""
MIN_DRAIN_S = 0.05
"""How long a drain waits at least for idle connections to close."""
FINAL_MESSAGE_S = 0.5
"""How long connections may take to send a final message when the server is cancelled."""
ABORT_TIMEOUT_S = 5.0
"""How long aborting all connections may take."""
SLICE = 100
"""How many connections are closed before other tasks run."""


@runtime_checkable
class Drainable(Protocol):
    """An object that an app leaves as ``state["drain"]`` at its start-up, to take part in the shutdown."""

    def step_aside(self) -> None:
        """Stops fetching new work, as another process does; work that arrives is still done."""

    def announce(self) -> None:
        """Does the same, and fails the readiness check."""

    def begin(self) -> None:
        """Refuses new work from now on."""

    async def wait_quiet(self) -> None:
        """Waits until work without a connection has ended."""

    def cut(self) -> Sequence[str]:
        """Ends every running exchange: cancels it upstream, and ends its response with an error. Returns the ids."""


@attrs.frozen(kw_only=True)
class ShutdownReport:
    """How the connections ended that were open when the drain began.

    Attributes:
        finished: Ended by themselves.
        cut: Ended with an error after `Drainable.cut`.
        forced: Aborted.
    """

    finished: int
    cut: int
    forced: int


@attrs.define(eq=False)
class Shutdown:
    """Asks a server to end.

    Attributes:
        begun: The server is to end.
        stop: No other process takes over: the server refuses new work. May be set after ``begun``.
        successor: The process that takes over; 0 = its id is not known here; None = none does.
    """

    begun: trio.Event = attrs.field(factory=trio.Event)
    stop: trio.Event = attrs.field(factory=trio.Event)
    successor: int | None = None

    def stop_now(self) -> None:
        """Begins a shutdown, or turns a hot restart into one."""
        self.stop.set()
        self.begun.set()

    def hand_over(self, successor: int) -> None:
        """Begins a hot restart: another process serves from now on."""
        if not self.begun.is_set():
            self.successor = successor
            self.begun.set()


async def follow_signals(received: AsyncIterator[int], shutdown: Shutdown, serving: trio.CancelScope) -> None:
    """Obeys signals: SIGTERM or SIGINT begins a shutdown, and a second one ends everything at once. Never returns.

    Args:
        received: The signals, among them `HANDED_OVER` from a supervisor: another gateway has taken over.
        shutdown: The shutdown to begin.
        serving: Cancelled by the second signal.
    """
    async for number in received:
        if number == HANDED_OVER:
            shutdown.hand_over(0)
            continue
        log.info("signal_received", signal=signal.Signals(number).name, again=shutdown.stop.is_set())
        if shutdown.stop.is_set():
            serving.cancel()
        shutdown.stop_now()


async def follow_supervisor(parent_fd: int, shutdown: Shutdown) -> None:
    """Begins a shutdown when the supervisor has exited.

    Args:
        parent_fd: The worker's end of the lifeline; see `supervisor`.
        shutdown: The shutdown to begin.
    """
    await wait_parent_gone(parent_fd)
    log.warning("supervisor_gone")
    shutdown.stop_now()


@attrs.define(eq=False)
class OpenConnections:
    """The open connections of a server."""

    live: set[Connection] = attrs.field(factory=set)
    _all_closed: RepeatedEvent = attrs.field(init=False, factory=RepeatedEvent)

    def discard(self, connection: Connection) -> None:
        """Removes a connection that has ended."""
        self.live.discard(connection)
        if not self.live:
            self._all_closed.set()

    async def wait_all_closed(self) -> None:
        """Waits until no connection is open."""
        while self.live:
            await self._all_closed.wait()


@attrs.define(eq=False, kw_only=True)
class ShutdownSequence:
    """The steps of a shutdown or a hot restart, for one server.

    Args:
        config: The configuration; its drain timeouts apply.
        service: What the connections share.
        connections: The open connections.
        app: The app's part in it; None = it has none.
        shutdown: Asks for it.
    """

    _config: ServerConfig
    _service: Service
    _connections: OpenConnections
    _app: Drainable | None
    _shutdown: Shutdown

    async def wait_until_closing(self) -> None:
        """Waits until the server is to stop accepting: asked to end, and the time of notice is over."""
        await self._shutdown.begun.wait()
        if self._shutdown.stop.is_set():
            await self._give_notice()

    async def _give_notice(self) -> None:
        """Fails the readiness check, and keeps serving for a while, so that load balancers notice."""
        if self._app is not None:
            self._app.announce()
        if self._config.drain_notice_s:
            self._service.announce_close()
            log.info("drain_announced", for_s=self._config.drain_notice_s)
        await trio.sleep(self._config.drain_notice_s)

    async def drain(self, nursery: trio.Nursery) -> ShutdownReport:
        """Ends the connections within the configured time. Connections that are still open then are the caller's.

        Args:
            nursery: The nursery of the connections.
        """
        live, app = self._connections.live, self._app
        began = len(live)
        timeout_s = self._config.drain_timeout_s
        ends_at = trio.current_time() + timeout_s
        log.info("draining", connections=began, timeout_s=timeout_s, successor=self._shutdown.successor)
        if not self._shutdown.stop.is_set():
            if app is not None:
                app.step_aside()
            self._service.announce_close()
            for connection in live:
                nursery.start_soon(connection.announce_close)
            await self._wait_moved(timeout_s)
        if app is not None:
            app.begin()
        await self._service.begin_drain()
        for number, connection in enumerate(list(live), 1):
            connection.close_if_idle()
            if number % SLICE == 0:
                await trio.lowlevel.checkpoint()
        is_quiet = await self._wait_quiet(max(ends_at - trio.current_time(), MIN_DRAIN_S))
        late = len(live)
        cut: Sequence[str] = ()
        if not is_quiet and app is not None:
            cut = app.cut()
            await self._wait_closed(FINAL_ERROR_S)
        left = len(live)
        report = ShutdownReport(finished=began - late, cut=late - left, forced=left)
        for connection in live:
            log.warning("connection_forced", client=connection.client)
        log.info("drained", **attrs.asdict(report), cut_exchanges=list(cut))
        return report

    async def abort(self, nursery: trio.Nursery, *, drained: bool) -> None:
        """Closes what is still open, at once. The caller shields it, for at most `ABORT_TIMEOUT_S`.

        Args:
            nursery: The nursery of the connections.
            drained: Whether `drain` has returned. If not, the apps are cancelled, and get `FINAL_MESSAGE_S` to send a
                final message before their connections are closed.
        """
        if not drained:
            nursery.cancel_scope.cancel()
            await self._wait_closed(FINAL_MESSAGE_S)
        for connection in list(self._connections.live):
            await connection.abort()

    async def _wait_moved(self, timeout_s: float) -> None:
        """Waits until all clients have moved to the successor, or the time is up, or the server is to stop."""
        async with trio.open_nursery() as nursery:

            async def wait_stop() -> None:
                await self._shutdown.stop.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_stop)
            await self._wait_quiet(timeout_s)
            nursery.cancel_scope.cancel()

    async def _wait_closed(self, timeout_s: float) -> None:
        with trio.move_on_after(timeout_s):
            await self._connections.wait_all_closed()

    async def _wait_quiet(self, timeout_s: float) -> bool:
        """Waits until no connection is open and the app has no other work. Returns False when the time is up."""
        with trio.move_on_after(timeout_s) as scope:
            await self._connections.wait_all_closed()
            if self._app is not None:
                await self._app.wait_quiet()
        return not scope.cancelled_caught
