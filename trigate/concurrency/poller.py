"""One epoll for many sockets, and one task that calls their callbacks.

Trio's own way to wait for a socket is a task that sleeps. That is right where something happens once per request, and
expensive where it happens for each event of a stream. A `Poller` has an epoll of its own. One task waits until *that*
epoll is readable (an epoll can wait for an epoll), fetches the ready sockets, and calls a function for each. So a ready
socket costs one call, and all sockets that are ready at the same time share the cost of one wake-up. `timers` says when
not to use this.

Rules for a callback: it is synchronous, it may add and remove sockets (its own and any other), and it must not raise.
A task that it wakes (`trio.lowlevel.reschedule`, `trio.CancelScope.cancel`) runs after the current batch.

**Under load, a batch takes longer.** Waking a Trio task costs as much as moving an event. So while batches follow each
other within `CLOSE_S`, one batch continues for `LINGER_S` and waits for further sockets in its own epoll. That delays
all other tasks by at most that time, or by a millisecond (epoll's unit) if the traffic stops at that moment.

Bounds: at most ``batch`` callbacks are called between two readings of the clock.

Linux only (`select.epoll`). On other systems `open_poller` yields None, and the caller works without a poller.
"""

from __future__ import annotations

import errno
import math
import os
import select
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from trigate.concurrency.notify import open_service
from trigate.logs import log

BATCH = 256
CLOSE_S = 0.0005
LINGER_S = 0.0005
_WAIT_S = 0.001

Callback = Callable[[int], None]
"""Takes the events that epoll reports, as a mask."""

if sys.platform == "linux":
    READABLE = select.EPOLLIN
    WRITABLE = select.EPOLLOUT
    PEER_CLOSED = select.EPOLLRDHUP
    """The peer has closed its sending side."""
    RESET = select.EPOLLHUP | select.EPOLLERR
    """The connection has ended in both directions. epoll always reports this."""
else:
    READABLE, WRITABLE, PEER_CLOSED, RESET = 0x1, 0x4, 0x2000, 0x18


class Poller:
    """Sockets and their callbacks. Made by `open_poller`.

    Args:
        batch: How many callbacks may be called one after another.

    Attributes:
        now: The time of the current batch (`trio.current_time`). It is read once per batch, not once per socket.
    """

    def __init__(self, batch: int = BATCH) -> None:
        self._batch = batch
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self.now = trio.current_time()

    def __repr__(self) -> str:
        return f"<Poller of {len(self._callbacks)} sockets>"

    def __len__(self) -> int:
        return len(self._callbacks)

    def add(self, fd: int, events: int, callback: Callback) -> None:
        """Calls back whenever one of these events is pending.

        Args:
            fd: The descriptor of the socket.
            events: A mask of `READABLE`, `WRITABLE` and `PEER_CLOSED`, level-triggered; 0 = only a reset.
            callback: Called with the pending events.

        Raises:
            OSError: The kernel has no memory for it, or none of the user's watches is left; or the poller is closed.
        """
        try:
            self._epoll.register(fd, events)
        except ValueError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None
        self._callbacks[fd] = callback

    def remove(self, fd: int) -> None:
        """Removes a socket, which must still be open. Its callback is not called again, not even in this batch.

        Never fails, since tasks call it while they are cancelled. It does nothing for a socket that the poller has
        removed itself because its callback crashed, or after `close`.
        """
        if self._callbacks.pop(fd, None) is not None:
            try:
                self._epoll.unregister(fd)
            except OSError as error:  # the kernel has removed it: it was closed before
                log.error("poller_lost_a_socket", reason=error.strerror)

    async def run(self) -> None:
        """Calls the callbacks. Never returns."""
        batch = self._batch
        poll, fileno, clock = self._epoll.poll, self._epoll.fileno(), time.perf_counter
        ended_at = -math.inf
        while True:
            await trio.lowlevel.wait_readable(fileno)
            began_at = clock()
            self.now = trio.current_time()
            self._call_back(poll(0, batch))
            if began_at - ended_at < CLOSE_S:
                while clock() - began_at < LINGER_S and (ready := poll(_WAIT_S, batch)):
                    self.now = trio.current_time()
                    self._call_back(ready)
            ended_at = clock()

    def _call_back(self, ready: list[tuple[int, int]]) -> None:
        callbacks = self._callbacks
        for fd, events in ready:
            callback = callbacks.get(fd)  # None: a callback of this batch has removed the socket
            if callback is not None:
                try:
                    callback(events)
                except Exception:
                    log.exception("callback_crashed", callback=repr(callback))
                    self.remove(fd)

    def close(self) -> None:
        """Closes the epoll. The sockets belong to their owners and stay open."""
        self._callbacks.clear()
        self._epoll.close()


@asynccontextmanager
async def open_poller(*, batch: int = BATCH) -> AsyncIterator[Poller | None]:
    """Opens a poller and runs its task for as long as the block lasts.

    Args:
        batch: How many callbacks may be called one after another.

    Yields:
        The poller; None where the system has no epoll.
    """
    if not hasattr(select, "epoll"):
        yield None
        return
    poller = Poller(batch)
    try:
        async with open_service(poller.run):
            yield poller
    finally:
        poller.close()  # after its task has ended, which may have been about to use it
