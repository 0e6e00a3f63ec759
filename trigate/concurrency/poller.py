"""One epoll for many sockets, and one task that calls back.

Trio's own way to wait for a socket is a task that sleeps: right where something happens once a request, and dear where
it happens for each event of a stream. A `Poller` has an epoll of its own. One task waits until *that* is readable (an
epoll can wait for an epoll), takes what is ready, and calls a function for each. So a ready socket costs a call, and
the price of waking up is shared by all that are ready at the same time.

Rules for what is called back: it is synchronous, it may add, change and remove sockets (its own, and any other), and
it must not raise. What it wakes (`trio.lowlevel.reschedule`, `trio.CancelScope.cancel`) runs after this turn.

**When much happens, a turn is longer.** To wake a Trio task costs as much as to move an event. So while turns follow
each other closely (`CLOSE_S`), one goes on for `LINGER_S`, waiting for further sockets in its own epoll. Everything
else is held up for that long at the most; or for a millisecond, epoll's unit, where the traffic stops in that moment.

Bounds: at most ``turn`` callbacks are made between two looks at the clock.

Linux only (`select.epoll`); elsewhere `open_poller` gives None, and who would use one does without.
"""

from __future__ import annotations

import math
import select
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
import trio

log = structlog.get_logger("trigate.concurrency.poller")

TURN = 256
CLOSE_S = 0.0005
LINGER_S = 0.0005
_WAIT_S = 0.001

Callback = Callable[[int], None]
"""Takes the events that epoll tells, as a mask."""

if sys.platform == "linux":
    READABLE = select.EPOLLIN
    WRITABLE = select.EPOLLOUT
    PEER_CLOSED = select.EPOLLRDHUP
    """The peer has closed its sending side. (A reset, EPOLLHUP and EPOLLERR, is always told.)"""
else:
    READABLE, WRITABLE, PEER_CLOSED = 0x1, 0x4, 0x2000


class Poller:
    """Sockets and what to call when something happens on them. Made by `open_poller`."""

    def __init__(self, turn: int = TURN) -> None:
        self._turn = turn
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self.now = trio.current_time()
        """The time of this turn: asked for once, and not once for each socket."""

    def __repr__(self) -> str:
        return f"<Poller of {len(self._callbacks)} sockets>"

    def __len__(self) -> int:
        return len(self._callbacks)

    def add(self, fd: int, events: int, callback: Callback) -> None:
        """Calls back whenever one of these events is pending (it is level-triggered); 0 = only its end."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def remove(self, fd: int) -> None:
        """Forgets a socket, which must still be open. It is not called back any more, not even in this turn.

        Does nothing for one that it has forgotten by itself, since its callback crashed.
        """
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    async def run(self) -> None:
        """Calls back, for ever."""
        turn = self._turn
        poll, fileno, clock = self._epoll.poll, self._epoll.fileno(), time.perf_counter
        ended_at = -math.inf
        while True:
            await trio.lowlevel.wait_readable(fileno)
            began_at = clock()
            self.now = trio.current_time()
            self._call_back(poll(0, turn))
            if began_at - ended_at < CLOSE_S:
                while clock() - began_at < LINGER_S and (ready := poll(_WAIT_S, turn)):
                    self.now = trio.current_time()
                    self._call_back(ready)
            ended_at = clock()

    def _call_back(self, ready: list[tuple[int, int]]) -> None:
        callbacks = self._callbacks
        for fd, events in ready:
            callback = callbacks.get(fd)  # one that was called before it may have removed it
            if callback is not None:
                try:
                    callback(events)
                except Exception:
                    log.exception("callback_crashed", callback=repr(callback))
                    self.remove(fd)

    def close(self) -> None:
        """Closes the epoll. The sockets are their owners'."""
        self._epoll.close()


@asynccontextmanager
async def open_poller(*, turn: int = TURN) -> AsyncIterator[Poller | None]:
    """Opens a poller and runs its task around a block; None where there is no epoll.

    Args:
        turn: How many callbacks may come one after another.
    """
    if not hasattr(select, "epoll"):
        yield None
        return
    poller = Poller(turn)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poller.run, name="poller")
            try:
                yield poller
            finally:
                nursery.cancel_scope.cancel()
    finally:
        poller.close()  # now that its task, which may have been about to ask it, has ended
