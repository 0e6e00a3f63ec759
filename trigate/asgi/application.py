"""`create_app` makes the ASGI application. It owns the gateway, and passes each request to `dispatch`."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from trigate import errors, logs
from trigate.asgi.dispatch import serve_request
from trigate.asgi.lazy_control_plane import LazyControlPlane
from trigate.asgi.request_body import BodyBudget
from trigate.config.sections import Config
from trigate.gateway.gateway import Gateway, open_gateway
from trigate.logs import log
from trigate.server import hypercorn_firewall
from trigate.status.startup import startup_lines

if TYPE_CHECKING:  # hypercorn imports multiprocessing
    from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable


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
                await _refuse_websocket(scope, receive, send)

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


async def _refuse_websocket(scope: Any, receive: ASGIReceiveCallable, send: Any) -> None:  # Any: as above
    """Refuses a WebSocket handshake; where the server allows it, with the status on which clients go on by HTTP.

    (`trigate serve` refuses it before it reaches the application. The plain refusal of ASGI is a 403.)
    """
    await receive()
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": 1000, "reason": None})
        return
    status, headers, body = errors.WebSocketRefused().to_response()
    headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body, "more_body": False})


def calm_collector() -> None:
    """Runs Python's garbage collector less often, in a process that does nothing but serve.

    Imported modules are not garbage, and a call leaves no reference cycles. With the default thresholds the collector
    took an eighth of the time of a short call and found nothing.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


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
