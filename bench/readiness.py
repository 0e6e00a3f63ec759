"""Which sockets are ready: epoll where there is one, else what `selectors` finds, behind three calls.

The mock upstream and the load generator are single loops over many sockets, and each microsecond of theirs for an event
is one that the measured gateway does not get on a small machine. That is why they are not Trio programs, and why
epoll is asked directly: `selectors` makes two objects for each ready socket.
"""

from __future__ import annotations

import resource
import select
import selectors
import sys
from collections.abc import Sequence

READ = 1
WRITE = 4
"""As epoll has them (``EPOLLIN``, ``EPOLLOUT``); an end or an error of the connection counts as readable."""


class Poller:
    """Watches sockets by their descriptors."""

    if sys.platform == "linux":

        def __init__(self) -> None:
            self._epoll = select.epoll()
            self.add = self._epoll.register
            self.change = self._epoll.modify
            self.remove = self._epoll.unregister

        def wait(self, timeout_s: float | None) -> Sequence[tuple[int, int]]:
            """Returns ``(descriptor, what it is ready for)``, at most ``timeout_s`` later.

            epoll's own time-out is in whole milliseconds, which would be added to every latency that is counted from a
            scheduled time; select's is not, and an epoll can be selected. It is asked only where nothing is ready.
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
            """Starts to watch a socket."""
            self._selector.register(fd, _selector_events(events))

        def change(self, fd: int, events: int) -> None:
            """Watches it for something else."""
            self._selector.modify(fd, _selector_events(events))

        def remove(self, fd: int) -> None:
            """No longer watches it."""
            self._selector.unregister(fd)

        def wait(self, timeout_s: float | None) -> Sequence[tuple[int, int]]:
            """Returns ``(descriptor, what it is ready for)``, at most ``timeout_s`` later."""
            return [
                (key.fd, (READ if mask & selectors.EVENT_READ else 0) | (WRITE if mask & selectors.EVENT_WRITE else 0))
                for key, mask in self._selector.select(timeout_s)
            ]


def _selector_events(events: int) -> int:
    return (selectors.EVENT_READ if events & READ else 0) | (selectors.EVENT_WRITE if events & WRITE else 0)


def raise_descriptor_limit() -> int:
    """Takes as many file descriptors as this process may have, and returns their number; its children inherit it."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # macOS refuses what its kernel cannot give
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted
