"""`create_app` makes the ASGI application: lifespan, dispatch, routes, error bodies."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, LifespanScope
from quart import Response, request
from werkzeug.exceptions import HTTPException
from werkzeug.exceptions import MethodNotAllowed as WerkzeugMethodNotAllowed

from trigate import errors
from trigate.asgi.dispatch import GatewayConnection, NoWebsocket
from trigate.asgi.quart_app import GatewayApp
from trigate.asgi.routes import health, hooks, models, sessions, status
from trigate.config.sections import Config
from trigate.gateway.gateway import Gateway, open_gateway
from trigate.status.startup import startup_lines

log = structlog.get_logger("trigate.asgi.application")


class GatewayLifespan:
    """The ASGI lifespan. Its task owns the gateway, and so every service, for as long as the server runs."""

    def __init__(self, app: GatewayApp, scope: LifespanScope) -> None:
        self._app = app
        self._scope = scope

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        app = self._app
        await receive()
        async with contextlib.AsyncExitStack() as stack:
            try:
                app.gateway = await stack.enter_async_context(app.open_gateway())
                app.nursery = await stack.enter_async_context(trio.open_nursery())
                await app.startup()
            except Exception as error:
                message = errors.message_of(error)
                log.error("startup_failed", error=message)
                await send({"type": "lifespan.startup.failed", "message": message})
                return
            self._scope["state"]["drain"] = app.gateway.drain
            for line in startup_lines(app.gateway.generations.current, store_path=app.gateway.store.statistics().path):
                log.info(line)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            app.gateway.drain.begin()
            app.gateway.drain.cut()
            await app.shutdown()
        await send({"type": "lifespan.shutdown.complete"})


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
    app = GatewayApp("trigate", static_folder=None)
    app.asgi_http_class = GatewayConnection
    app.asgi_lifespan_class = GatewayLifespan  # type: ignore[assignment]
    app.asgi_websocket_class = NoWebsocket
    app.open_gateway = opener or (lambda: open_gateway(config))
    app.config["RESPONSE_TIMEOUT"] = None  # Quart would truncate a response after 60 s without a log line
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = True
    app.url_map.merge_slashes = False  # no redirects
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.register_blueprint(health.blueprint)
    app.register_blueprint(hooks.blueprint)
    app.register_blueprint(models.blueprint)
    app.register_blueprint(sessions.blueprint)
    app.register_blueprint(status.blueprint)

    @app.errorhandler(errors.GatewayError)
    async def on_gateway_error(error: errors.GatewayError) -> Response:
        return _response_of(error)

    @app.errorhandler(HTTPException)
    async def on_http_error(error: HTTPException) -> Response:
        return _response_of(_error_for(error))

    @app.errorhandler(Exception)
    async def on_crash(error: Exception) -> Response:
        log.exception("request_crashed", path=request.path)
        return _response_of(errors.Internal("The gateway failed. See its log."))

    return app


def _error_for(error: HTTPException) -> errors.GatewayError:
    if isinstance(error, WerkzeugMethodNotAllowed):
        allowed = tuple(sorted(error.valid_methods or ()))
        return errors.MethodNotAllowed(request.method, request.path, allowed=allowed)
    if error.code == 404:
        return errors.NotFound(f"There is nothing at {request.method} {request.path[:200]}.")
    if error.code == 413:
        return errors.TooLarge("The body is too large.")
    return errors.BadRequest(error.description or error.name)


def _response_of(error: errors.GatewayError) -> Response:
    status_code, headers, body = error.to_response()
    response: Any = Response(body, status=status_code)  # Any: Quart's headers are untyped
    response.headers.clear()
    for name, value in headers:
        response.headers.add(name.decode(), value.decode("latin-1"))
    response.headers["content-length"] = str(len(body))
    return response  # type: ignore[no-any-return]
