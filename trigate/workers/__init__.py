"""The worker processes of one machine: which of them run, what exited ones have left, and notifications between them.

The package knows processes and topics. It does not know what a worker does: a service registers what it reports, what
it takes over from a worker that exited, and which notifications it handles. Read `membership` first; `notify` is the
datagram socket below it.
"""

from trigate.workers.membership import Workers, open_workers

__all__ = ["Workers", "open_workers"]
