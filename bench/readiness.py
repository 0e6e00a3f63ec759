"""Socket readiness: epoll where it exists, else `selectors`, behind three calls.

The mock upstream and the load generator are single loops over many sockets. On a small machine, each microsecond that
they spend on an event is taken from the measured gateway. So they are not Trio programs, and they call epoll directly:
`selectors` creates two objects for each ready socket.
"""

from __future__ import annotations

import resource
import select
import selectors
import sys
from collections.abc import Sequence

READ = 1
WRITE = 4
"""Readiness flags as in epoll (``EPOLLIN``, ``EPOLLOUT``). An end or an error of the connection counts as readable."""


class Poller:
    """Watches sockets by their descriptors."""

    if sys.platform == "linux":

        def __init__(self) -> None:
            self._epoll = select.epoll()
            self.add = self._epoll.register
            self.change = self._epoll.modify
            self.remove = self._epoll.unregister

        def wait(self, timeout_s: float | None) -> Sequence[tuple[int, int]]:
            """Returns ``(descriptor, readiness)`` after at most ``timeout_s``.

            epoll's own timeout is in whole milliseconds, which would be added to every latency counted from a scheduled
            time. The timeout of select is not, and an epoll descriptor can be selected. select is called only when
            nothing is ready.
            """
            if timeout_s is None:
                return self._epoll.poll(None, 1024)
            ready = self._epoll.poll(0, 1024)
            if ready or timeout_s <= 0:
                return ready
            select.select((self._epoll,), (), (), timeout_s)
            return self._epoll.poll(0, 1024)

    else:

        def __init__(self) -> None:
            self._selector = selectors.DefaultSelector()

        def add(self, fd: int, events: int) -> None:
            """Starts watching a socket."""
            self._selector.register(fd, _selector_events(events))

        def change(self, fd: int, events: int) -> None:
            """Watches a socket for other events."""
            self._selector.modify(fd, _selector_events(events))

        def remove(self, fd: int) -> None:
            """Stops watching a socket."""
            self._selector.unregister(fd)

        def wait(self, timeout_s: float | None) -> Sequence[tuple[int, int]]:
            """Returns ``(descriptor, readiness)`` after at most ``timeout_s``."""
            return [
                (key.fd, (READ if mask & selectors.EVENT_READ else 0) | (WRITE if mask & selectors.EVENT_WRITE else 0))
                for key, mask in self._selector.select(timeout_s)
            ]


def _selector_events(events: int) -> int:
    return (selectors.EVENT_READ if events & READ else 0) | (selectors.EVENT_WRITE if events & WRITE else 0)


def raise_descriptor_limit() -> int:
    """Raises this process's limit of file descriptors to the maximum and returns it. Child processes inherit it."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # macOS refuses a limit beyond its kernel's
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted
