"""`create_app` makes the ASGI application. It owns the gateway, and passes each request to `dispatch`."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from trigate import logs
from trigate.asgi.dispatch import serve_request
from trigate.asgi.lazy_control_plane import LazyControlPlane
from trigate.asgi.realtime import serve_websocket
from trigate.asgi.request_body import BodyBudget
from trigate.config.sections import Config
from trigate.gateway.gateway import Gateway, open_gateway
from trigate.logs import log
from trigate.server import hypercorn_firewall
from trigate.status.startup import startup_lines

if TYPE_CHECKING:  # hypercorn imports multiprocessing
    from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable

_M_MMAP_THRESHOLD = -3
"""Of ``mallopt``, in glibc's ``malloc.h``."""


class GatewayApp:
    """The ASGI application.

    Attributes:
        gateway: The open gateway; set from the start of the lifespan to its end.
    """

    gateway: Gateway
    _control_plane: LazyControlPlane

    def __init__(self, opener: Callable[[], AbstractAsyncContextManager[Gateway]]) -> None:
        self._open_gateway = opener
        self._bodies = BodyBudget()

    async def __call__(
        self, scope: Any, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:  # Any: hypercorn's types do not know our entries of the scope
        match scope["type"]:
            case "http":
                await serve_request(self.gateway, self._control_plane, self._bodies, scope, receive, send)
            case "lifespan":
                await self._run_lifespan(scope, receive, send)
            case _:
                await serve_websocket(self.gateway, scope, receive, send)

    async def _run_lifespan(self, scope: Any, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Runs the ASGI lifespan. Its task owns the gateway, and so every service, for as long as the server runs."""
        hypercorn_firewall.install()
        await receive()
        async with contextlib.AsyncExitStack() as stack:
            try:
                self.gateway = gateway = await stack.enter_async_context(self._open_gateway())
            except Exception as error:
                message = logs.message_of(error)
                log.error("startup_failed", error=message)
                await send({"type": "lifespan.startup.failed", "message": message})
                return
            self._control_plane = LazyControlPlane(gateway)
            scope["state"]["drain"] = gateway.drain
            gateway.drain.on_cut = self._bodies.refuse
            for line in startup_lines(gateway.generations.current, store_path=gateway.store.statistics().path):
                log.info(line)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            gateway.drain.begin()
            gateway.drain.cut()
        await send({"type": "lifespan.shutdown.complete"})


def tune_memory() -> None:
    """Sets Python's garbage collector and the C library's allocator for a process that does nothing but serve.

    The collector runs less often: imported modules are not garbage, and a call leaves no reference cycles. With the
    default thresholds the collector took an eighth of the time of a short call and found nothing.

    glibc maps each buffer of 256 KiB or more for itself. By default this threshold rises to the largest buffer that was
    ever freed, up to 32 MiB; request bodies then lie in the heap, which neither grows in place nor shrinks. After four
    hundred refused uploads a worker kept 37 MiB, and 22 with this setting. Other C libraries have no such call.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 256 * 1024)


def create_app(
    config: Config | None = None,
    *,
    opener: Callable[[], AbstractAsyncContextManager[Gateway]] | None = None,
) -> GatewayApp:
    """Makes the application. Nothing is opened before its lifespan starts.

    Args:
        config: The configuration; None = it is located as in `trigate.gateway.gateway.open_gateway`.
        opener: Opens the gateway in place of ``open_gateway(config)``.
    """
    logs.configure(os.environ)
    return GatewayApp(opener or (lambda: open_gateway(config)))
