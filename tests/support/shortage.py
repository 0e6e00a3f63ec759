"""Shortages: a process that can open no more files, and calls that fail with a given error."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator

ERRORS = ("EMFILE", "ENFILE", "ENOSPC", "EIO", "EROFS", "ENOMEM", "EINTR")
"""What the kernel may answer when something is opened, or written to."""


def os_error(name: str) -> OSError:
    """Returns the error with this name, as the system raises it."""
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


@contextlib.contextmanager
def no_descriptors(spare: int = 0) -> Iterator[None]:
    """Lowers the limit of this process, so that within the block it can open no more files but ``spare``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free: list[int] = []
    try:
        while len(free) <= spare:  # the kernel gives the lowest free number
            free.append(os.dup(0))
        limit = max(free)
    finally:
        for fd in free:
            os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
