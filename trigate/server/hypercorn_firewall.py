"""The firewall around each connection, for hypercorn's own Trio server (``hypercorn -k trio``).

hypercorn 0.18 runs the connections of a worker in one nursery. Its protocol classes raise on input that they do not
expect: a WebSocket upgrade with trailing bytes, a ``:path`` or ``:method`` that is not ASCII, CONNECT without a path,
DATA for a stream that was answered. Nothing contains the exception, so one packet ends the process and every stream in
it. `install` wraps ``TCPServer.run``, which serves one connection from its acceptance to its end: an exception ends
that connection and nothing else, as in `trigate.server.server`. The rules for editing it:

- **It contains, and changes nothing else.** How hypercorn parses, answers and closes stays hypercorn's.
- **It wraps the class**, so it holds for each hypercorn server of the process, and for connections accepted later. The
  release of hypercorn is pinned, and a test sends all known packets to it.
- **It imports nothing of hypercorn.** Under another server there is nothing to wrap.

Not covered: HTTP/3 (``--quic-bind``), whose connections share one socket and one task.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio

from trigate.logs import log

_MODULE = "hypercorn.trio.tcp_server"
_LOG_PERIOD_S = 1.0


def install() -> bool:
    """Wraps the connections of hypercorn's Trio server, if it is loaded. A second call changes nothing.

    Returns:
        Whether they are wrapped.
    """
    module: Any = sys.modules.get(_MODULE)  # Any: `run` is replaced
    if module is None:
        return False
    server = module.TCPServer
    if not hasattr(server.run, "__wrapped__"):
        server.run = _contained(server.run, _CrashLog())
    return True


@attrs.define(eq=False)
class _CrashLog:
    """Logs crashes, at most one a second: anyone can send these packets, as many as they like."""

    _times: int = 0
    _logged_at: float = -math.inf

    def note(self, client: object, group: ExceptionGroup) -> None:
        self._times += 1
        if trio.current_time() >= self._logged_at + _LOG_PERIOD_S:
            log.warning("connection_crashed", client=client, times=self._times, exc_info=group)
            self._times, self._logged_at = 0, trio.current_time()


def _contained(run: Callable[[Any], Awaitable[None]], crashes: _CrashLog) -> Callable[[Any], Awaitable[None]]:
    @functools.wraps(run)
    async def run_contained(connection: Any) -> None:  # Any: hypercorn's TCPServer
        try:
            await run(connection)
        except* Exception as group:
            crashes.note(getattr(getattr(connection, "protocol", None), "client", None), group)
            await trio.aclose_forcefully(connection.stream)

    return run_contained
