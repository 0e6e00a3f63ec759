"""Accepts connections, within the number that the process has file descriptors for.

**At the limit, idle connections make room:** those that have waited for a request the longest are closed, several at a
time. So connections that say nothing, however many, keep nobody out. Where every connection serves a request, a new one
is answered with 503 and the time to try again. At most `REFUSALS` are answered so at the same time; any further one is
closed at once.

**Where the system has no descriptor or no memory for a connection,** it waits in the kernel's queue, and its client
waits without an answer. So a spare descriptor is kept: it is closed, the waiting connections are accepted and closed
one after the other, and it is opened again. Then accepting pauses for `PAUSE_S`.

Neither costs anything below the limit: a connection is accepted, counted and started.

**Source:** nginx, ``ngx_drain_connections``: the idle connections that are closed at once are an eighth, at most 32.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import math
import os
import socket
from collections.abc import Callable

import attrs
import trio

from trigate.logs import log
from trigate.server.connection import Connection
from trigate.server.shutdown import OpenConnections

PAUSE_S = 0.1
"""The pause after a failure to accept, and between two searches for idle connections that found none."""
LOG_AGAIN_S = 1.0
"""Seconds between two lines in the log that say the same."""
REFUSALS = 16
"""How many connections are answered with 503 at the same time."""
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
_MAX_CLOSED = 32
_CLOSED_SHARE = 8

Start = Callable[[trio.SocketStream], None]


@attrs.define(eq=False)
class _Counts:
    """Counts something that happens many times, for at most one line in the log for each `LOG_AGAIN_S`."""

    _counts: dict[str, int] = attrs.field(init=False, factory=dict)
    _taken_at: float = attrs.field(init=False, default=-math.inf)

    def count(self, name: str, times: int = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + times

    def take(self) -> dict[str, int] | None:
        """Returns the counts for a line in the log; None = it is too early for one, or there is nothing to say."""
        if not self._counts or trio.current_time() < self._taken_at + LOG_AGAIN_S:
            return None
        counts, self._counts = self._counts, {}
        self._taken_at = trio.current_time()
        return counts


@attrs.define(eq=False)
class Acceptor:
    """Accepts the connections of a server.

    Args:
        connections: The open connections.
        max_connections: How many may be open.
        start: Starts to serve a connection, which is one of ``connections`` from then on.
        refuse: Starts to answer a connection with 503, and calls `note_refused` at its end.
    """

    _connections: OpenConnections
    _max_connections: int
    _start: Start
    _refuse: Start
    _room: int = attrs.field(init=False, default=0)  # how many more the closed idle connections make room for
    _full_until: float = attrs.field(init=False, default=-math.inf)  # until then, no idle ones are looked for
    _refusing: int = attrs.field(init=False, default=0)
    _spare: int | None = attrs.field(init=False, default=None)
    _failures: _Counts = attrs.field(init=False, factory=_Counts)
    _at_limit: _Counts = attrs.field(init=False, factory=_Counts)

    async def run(self, listening: socket.socket) -> None:
        """Accepts connections. Never returns, and no error of the system ends it.

        Args:
            listening: Accepts the connections.
        """
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        self._keep_spare()
        try:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:  # Trio's error for a closed socket is another one
                    if error.errno in _OUT_OF_RESOURCES:
                        self._make_room()
                        self._close_waiting(listening)
                    self._failures.count("times")
                    reason = errno.errorcode.get(error.errno or 0, str(error))
                    if (counts := self._failures.take()) is not None:
                        log.warning("accept_failed", reason=reason, connections=len(self._connections.live), **counts)
                    await trio.sleep(PAUSE_S)
                else:
                    self._admit(stream)
        finally:
            self._release_spare()

    def note_refused(self) -> None:
        """Notes that a connection given to ``refuse`` has ended."""
        self._refusing -= 1

    # -- the limit of connections -------------------------------------------------------------------------------------

    def _admit(self, stream: trio.SocketStream) -> None:
        if len(self._connections.live) < self._max_connections:
            self._room = 0
            self._start(stream)
        elif self._room or self._make_room():
            self._room -= 1
            self._start(stream)
        else:
            self._at_limit.count("refused")
            if self._refusing < REFUSALS:
                self._refusing += 1
                self._refuse(stream)
            else:
                stream.socket.close()
        if len(self._connections.live) >= self._max_connections:
            counts = self._at_limit.take()
            if counts is not None:
                log.warning("connection_limit", limit=self._max_connections, **counts)

    def _make_room(self) -> int:
        """Closes some of the connections that have been idle the longest; returns how many."""
        now = trio.current_time()
        if now < self._full_until:
            return 0
        idle: list[tuple[float, int, Connection]] = []
        for number, connection in enumerate(self._connections.live):
            since = connection.idle_since
            if since is not None:
                idle.append((since, number, connection))
        most = max(1, min(_MAX_CLOSED, len(idle) // _CLOSED_SHARE))
        closed = heapq.nsmallest(most, idle)
        for _, _, connection in closed:
            connection.close_if_idle()
        self._room = len(closed)
        if closed:
            self._at_limit.count("closed", len(closed))
        else:
            self._full_until = now + PAUSE_S
        return len(closed)

    # -- no descriptor ------------------------------------------------------------------------------------------------

    def _close_waiting(self, listening: socket.socket) -> None:
        self._release_spare()
        try:
            while True:
                waiting, _ = listening.accept()
                waiting.close()
                self._failures.count("closed")
        except OSError:  # there is none, or there is still no descriptor
            pass
        self._keep_spare()

    def _keep_spare(self) -> None:
        if self._spare is None:
            with contextlib.suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _release_spare(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
