"""How a process shares its file descriptors: one part for clients, one for upstreams, and a reserve for its own files.

Every stream needs two connections, and everyone may connect. If clients could take all descriptors, a stranger who
connects and says nothing could keep the gateway from its upstreams, its store and its configuration. So a server has at
most as many connections as there can be pairs (`max_pairs`), and a connection to an upstream that would take one of the
last descriptors is given up (`is_spent`).

The second bound needs no bookkeeping: the kernel assigns the lowest free number, so a descriptor with the number N
shows that at least N are open. The limit of the process is read each time, since it may change.
"""

from __future__ import annotations

import os
import resource

RESERVE = 64
"""How many descriptors are kept for files: the store, journals, notifications, child processes, reloads. A process that
may open fewer than twice as many keeps half of them."""


def _limit() -> float:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 10**9 if soft == resource.RLIM_INFINITY else soft


def _reserve() -> int:
    return int(min(RESERVE, _limit() // 2))


def max_pairs() -> int:
    """Returns how many pairs of connections, one to a client and one to an upstream, leave the reserve free."""
    return max(1, int(_limit() - _reserve()) // 2)


def is_spent(fd: int) -> bool:
    """Whether a descriptor that was just opened is one of the last, which are left to the files.

    Where connections are paired, their last one is three quarters of the reserve away from these.
    """
    return fd >= _limit() - _reserve() // 4


def are_spent() -> bool:
    """Whether the next descriptor would be one of the last, or there is none."""
    try:
        fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    os.close(fd)
    return is_spent(fd)
