"""One ASGI HTTP request: access control, then the data plane, a webhook, a probe or the control plane.

Calls that carry model traffic (`dialects.endpoints.ENDPOINTS`) go to `data_plane`, webhooks to `webhooks.endpoint` and
probes to `health`; all three send the response themselves. Everything else is ordinary Quart (`control_plane`). This
module does for all of them: access control (`auth`), CORS, request ids and error bodies.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import trio

from trigate.asgi import health, paths, status_events
from trigate.asgi.auth import authorize, cors_allows, cors_headers
from trigate.asgi.data_plane import read_body, serve_call, watch_client
from trigate.asgi.lazy_control_plane import LazyControlPlane
from trigate.asgi.passthrough import serve_passed
from trigate.asgi.request import RequestHead
from trigate.asgi.request_body import BodyBudget, BodyLimits, RequestBody, too_large
from trigate.asgi.responses import serve_stored
from trigate.config.sections import Config, LimitsConfig
from trigate.content_coding import CODINGS
from trigate.dialects.endpoints import ENDPOINTS, Found, find_endpoint
from trigate.dialects.errors import error_response
from trigate.errors import GatewayError, Internal
from trigate.exchange.client_response import ClientResponse
from trigate.gateway.gateway import Gateway
from trigate.logs import log
from trigate.openai.passed_paths import find_passed
from trigate.page.assets import is_open
from trigate.tracebacks import drop_frames
from trigate.webhooks.calls import HookHead

if TYPE_CHECKING:  # hypercorn imports multiprocessing
    from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable

_CONTROL_PLANE_BYTES = 1024 * 1024
_HOOK_BYTES = 1024 * 1024
_RUNNING = b"Ollama is running"
"""Clients compare it."""


async def serve_request(
    gateway: Gateway,
    control_plane: LazyControlPlane,
    bodies: BodyBudget,
    scope: Any,  # Any: hypercorn's type does not know our extension
    receive: ASGIReceiveCallable,
    send: ASGISendCallable,
) -> None:
    """Serves one HTTP request to the gateway."""
    config = gateway.generations.config
    head = RequestHead(scope)
    request_id = head.request_id()
    client = scope.get("extensions", {}).get("trigate.client")
    if client is not None and config.limits.half_close == "serve":
        client.serve_half_closed()
    response = ClientResponse(send, [(b"x-request-id", request_id.encode())], client)
    body = RequestBody(receive, bodies)
    try:
        head.check()
        response.headers += cors_headers(head.origin, config)
        if head.method == "OPTIONS" and await _answer_preflight(head, config, response):
            return
        endpoint = ENDPOINTS.get(head.path)
        found = Found(endpoint) if endpoint is not None else _find_endpoint(head, scope)
        if found is None or head.method == "GET":
            passed = find_passed(head.method, head.path)
            if passed is not None:
                key = authorize(head, config, gateway.keys)
                query: bytes = scope["query_string"]
                if await serve_stored(gateway, passed, head, response, query=query, key=key):
                    return
                await serve_passed(gateway, passed, head, body, response, query=query, request_id=request_id, key=key)
                return
        if found is not None:
            endpoint = found.endpoint
            if endpoint.format == "anthropic":
                response.headers.append((b"request-id", request_id.encode()))
            key = authorize(head, config, gateway.keys)
            await serve_call(gateway, found, head, body, response, request_id=request_id, key=key)
            return
        if head.path == "/" and _asks_whether_anything_is_there(head):
            await response.respond(200, [(b"content-type", b"text/plain")], b"" if head.method == "HEAD" else _RUNNING)
            return
        if head.path == status_events.PATH:
            await status_events.serve_events(
                gateway, head.method, body, response, lambda: authorize(head, gateway.generations.config, gateway.keys)
            )
            return
        hook, rest = _hook_of(head.path)
        if hook and not rest:
            await _serve_webhook(gateway, hook, scope["query_string"], head, body, response)
            return
        if hook:
            scope["trigate.readers"] = gateway.hooks.readers(
                hook, head.headers, functools.partial(authorize, head, config, gateway.keys)
            )
        elif head.path not in health.OPEN and not is_open(head.path):
            scope["trigate.key"] = authorize(head, config, gateway.keys)
        if head.path in health.PATHS:
            await health.answer_probe(gateway, head, response)
            return
        scope["trigate.request_id"] = request_id
        await _serve_control_plane(control_plane, scope, config.limits, head, body, response)
    except GatewayError as error:
        drop_frames(error)  # they hold what was read of the body, which is needed no more
        body.release()
        log.info("refused", request_id=request_id, path=head.path, status=error.status, code=error.code)
        await _refuse(error, head, request_id, body, response)
    except Exception:
        log.exception("request_crashed", request_id=request_id, path=head.path)
        if not response.committed:
            defect = Internal(f"The gateway failed. Request id: {request_id}.")
            form = paths.format_of(head.path, head.headers)
            await response.respond(*error_response(defect, form, request_id))
    finally:
        body.release()


def _asks_whether_anything_is_there(head: RequestHead) -> bool:
    """Whether a request to ``/`` is not a browser's: Claude Code and Ollama's clients begin with one."""
    return head.method == "HEAD" or (head.method == "GET" and b"text/html" not in head.headers.get(b"accept", b""))


def _find_endpoint(head: RequestHead, scope: Any) -> Found | None:
    """Finds the endpoint of a path that has the model in it, or that people type.

    A path that people type is replaced by the one that is meant, for all that follows.
    """
    path = paths.canonical(head.path)
    if path != head.path:
        scope["trigate.asked_path"], head.path, scope["path"] = head.path, path, path
        if (endpoint := ENDPOINTS.get(path)) is not None:
            return Found(endpoint)
    return find_endpoint(path, scope["query_string"])


async def _serve_control_plane(
    control_plane: LazyControlPlane,
    scope: Any,  # Any: as above
    limits: LimitsConfig,
    head: RequestHead,
    body: RequestBody,
    response: ClientResponse,
) -> None:
    """Passes the request to Quart, with its whole body: Quart does not bound one that is sent in chunks.

    Raises:
        UnsupportedMediaType, TooLarge, BadRequest, BodyTimeout, Overloaded: As `data_plane.read_body`.
    """
    if (head.content_length or 0) > _CONTROL_PLANE_BYTES:
        raise too_large(_CONTROL_PLANE_BYTES)
    own = BodyLimits.of(limits, max_bytes=_CONTROL_PLANE_BYTES)
    data = await body.read(own, limits, coding=head.content_coding(CODINGS))
    if data is None:
        return
    messages: list[Any] = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive() -> Any:  # Any: hypercorn's union of ASGI messages
        return messages.pop() if messages else await body.receive()

    async def send(message: Any) -> None:  # Any: hypercorn's union of ASGI messages
        piece = message.get("body", b"") if head.method != "HEAD" else b""
        if message["type"] == "http.response.start":
            await response.start(message["status"], list(message["headers"]))
        elif message.get("more_body", False):
            await response.send(piece)
        else:
            await response.end(piece)

    await control_plane(scope, receive, send)


async def _serve_webhook(
    gateway: Gateway, name: str, query: bytes, head: RequestHead, body: RequestBody, response: ClientResponse
) -> None:
    config = gateway.generations.config
    call = gateway.hooks.check_head(
        HookHead(
            name=name,
            method=head.method,
            headers=head.headers,
            repeated=head.repeated,
            query=query,
            client=head.client,
            authorize=functools.partial(authorize, head, config, gateway.keys),
        )
    )
    max_bytes = call.body_bytes or (_HOOK_BYTES if call.is_verified else config.limits.unverified_body_bytes)
    data = await read_body(gateway, head, body, response, max_bytes=max_bytes, is_verified=call.is_verified)
    if data is None:
        return
    body.keep(len(data), config.limits)
    error: GatewayError | None = None
    async with trio.open_nursery() as nursery:

        def leave() -> None:
            response.gone = True
            if not response.ended:
                nursery.cancel_scope.cancel()

        watch_client(nursery, body, response, leave)
        try:
            await call.serve(data, response)
        except GatewayError as raised:  # not through the nursery, which would wrap it in a group
            drop_frames(raised)
            error = raised
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error


def _hook_of(path: str) -> tuple[str, str]:
    """Splits a path into the name of a hook and the rest.

    >>> _hook_of("/hooks/ci"), _hook_of("/hooks/ci/runs/run_1"), _hook_of("/status"), _hook_of("/hooks/")
    (('ci', ''), ('ci', 'runs/run_1'), ('', ''), ('', ''))
    """
    if not path.startswith("/hooks/"):
        return "", ""
    name, slash, rest = path.removeprefix("/hooks/").partition("/")
    return name, rest or slash


async def _refuse(
    error: GatewayError, head: RequestHead, request_id: str, body: RequestBody, response: ClientResponse
) -> None:
    """Answers with an error before COMMIT.

    The rest of a body that is still arriving is read before the response ends. By then the client has the whole answer
    (its length is in its head), so that a reset cannot erase it.
    """
    if response.committed:
        return
    status, headers, data = error_response(error, paths.format_of(head.path, head.headers), request_id)
    await response.start(status, [*headers, (b"content-length", b"%d" % len(data))])
    await response.send(data)
    await body.drain()
    await response.end()


async def _answer_preflight(head: RequestHead, config: Config, response: ClientResponse) -> bool:
    """Answers a CORS preflight; False = it is not a preflight, or its origin is not allowed."""
    if head.origin is None or b"access-control-request-method" not in head.headers:
        return False
    if not cors_allows(head.origin, config):
        return False
    asked = head.headers.get(b"access-control-request-headers", b"")
    headers = [
        (b"access-control-allow-methods", b"GET, POST, PATCH, DELETE, OPTIONS"),
        (b"access-control-allow-headers", asked if asked.isascii() else b""),
        (b"access-control-max-age", b"600"),
    ]
    # Chromium asks this before a page of a public address calls a private one, such as this machine.
    if head.headers.get(b"access-control-request-private-network", b"").strip() == b"true":
        headers.append((b"access-control-allow-private-network", b"true"))
    await response.respond(204, headers, b"")
    return True
