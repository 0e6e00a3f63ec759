"""The control plane: everything but model traffic, webhooks and probes, as a Quart application.

Only `lazy_control_plane` imports this module, when the first such request arrives: Quart and its packages take a
fifth of the time to start and 10 MiB.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from quart import Response, current_app, request
from werkzeug.exceptions import HTTPException
from werkzeug.exceptions import MethodNotAllowed as WerkzeugMethodNotAllowed

from trigate import errors
from trigate.asgi import health, paths
from trigate.asgi.quart_app import ControlPlane
from trigate.asgi.routes import api, hooks, keys, metrics, models, ollama, page, reports, sessions, status
from trigate.dialects.endpoints import ENDPOINTS
from trigate.dialects.errors import error_response
from trigate.gateway.gateway import Gateway
from trigate.logs import log

PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "keys.list_keys": ("limit", "after"),
    "keys.list_limits": ("key",),
    "reports.get_usage": ("group_by", "from", "to", "key", "model", "format"),
    "reports.list_exchanges": ("id", "key", "model", "outcome", "failed", "from", "to", "limit", "after"),
    "sessions.list_sessions": ("limit", "after", "owner"),
    "sessions.retrieve_session": ("owner",),
    "sessions.list_messages": ("limit", "after", "archived", "owner"),
    "sessions.reset_session": ("owner",),
    "sessions.delete_session": ("owner",),
    "status.list_streams": ("limit",),
}
"""The query parameters of each view; a view that is not here has none. Those of OpenAI's own paths (`models`) are not
checked, since clients append some to every URL (``api-version``), nor are those of the page, to which links lead."""

_ELSEWHERE: Mapping[str, tuple[str, ...]] = {"/v1/realtime": ("GET",)}
"""The methods of paths that are served before a request comes here, by their paths."""


async def open_control_plane(gateway: Gateway) -> ControlPlane:
    """Makes the application of an open gateway, and starts it."""
    app = create_control_plane()
    app.gateway = gateway
    await app.startup()
    return app


def create_control_plane() -> ControlPlane:
    """Makes the application, without a gateway."""
    app = ControlPlane("trigate", static_folder=None)
    app.config["RESPONSE_TIMEOUT"] = None  # Quart would truncate a response after 60 s without a log line
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = True
    app.url_map.merge_slashes = False  # no redirects
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.parameters = PARAMETERS
    app.register_blueprint(api.blueprint)
    app.register_blueprint(hooks.blueprint)
    app.register_blueprint(keys.blueprint)
    app.register_blueprint(metrics.blueprint)
    app.register_blueprint(models.blueprint)
    app.register_blueprint(ollama.blueprint)
    app.register_blueprint(page.blueprint)
    app.register_blueprint(reports.blueprint)
    app.register_blueprint(sessions.blueprint)
    app.register_blueprint(status.blueprint)

    app.before_request(check_parameters)

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


async def check_parameters() -> None:  # noqa: ASYNC124 - so that Quart gives it no thread
    """Checks the query of the current request: an ignored parameter would look like one that selected everything.

    Raises:
        BadRequest: The endpoint does not know a parameter, or one is empty or given twice.
    """
    view = request.endpoint
    if view is None or request.blueprint in ("models", "ollama", "page") or request.method == "OPTIONS":
        return
    known = PARAMETERS.get(view, ())
    for name, values in request.args.lists():
        shown = name[:100]
        if name not in known:
            has = f"It has {', '.join(known)}." if known else "It has none."
            raise errors.BadRequest(f"{request.path[:200]} has no query parameter {shown!r}. {has}", param=shown)
        if len(values) > 1 or not values[0]:
            what = "is empty" if len(values) == 1 else "is given more than once"
            raise errors.BadRequest(f"The query parameter {shown!r} {what}.", param=shown)


def _error_for(error: HTTPException) -> errors.GatewayError:
    if isinstance(error, WerkzeugMethodNotAllowed):
        allowed = tuple(sorted(error.valid_methods or ()))
        return errors.MethodNotAllowed(request.method, request.path, allowed=allowed)
    if error.code == 404 and request.method not in (allowed := _ELSEWHERE.get(request.path, (request.method,))):
        return errors.MethodNotAllowed(request.method, request.path, allowed=allowed)
    if error.code == 404:
        asked: str = cast("Any", request.scope).get("trigate.asked_path", request.path)  # Any: our own entry
        known = [*ENDPOINTS, *health.PATHS, *(rule.rule for rule in current_app.url_map.iter_rules())]
        hint = paths.hint(asked, [path for path in known if "<" not in path and path != "/"])
        return errors.NotFound(f"There is nothing at {request.method} {asked[:200]}.{hint}")
    if error.code == 413:
        return errors.TooLarge("The body is too large.")
    return errors.BadRequest(error.description or error.name)


def _response_of(error: errors.GatewayError) -> Response:
    form = paths.format_of(request.path, [name.lower().encode() for name, _ in request.headers])
    request_id: str = cast("Any", request.scope).get("trigate.request_id", "")  # Any: our own entry
    status_code, headers, body = error_response(error, form, request_id)
    response: Any = Response(body, status=status_code)  # Any: Quart's headers are untyped
    response.headers.clear()
    for name, value in headers:
        response.headers.add(name.decode(), value.decode("latin-1"))
    response.headers["content-length"] = str(len(body))
    return response  # type: ignore[no-any-return]
