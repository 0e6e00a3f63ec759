"""The seam to the server: one ASGI HTTP request, its nursery, and the two planes.

Quart-Trio makes an instance of `GatewayConnection` for each request (``asgi_http_class``). Calls that carry model
traffic (`wire.ENDPOINTS`) go straight to `exchange`, which drives ASGI's ``send`` itself: a stream must never pass
through a generator, and Quart's request and response objects cost as much as the exchange. Everything else is ordinary
Quart. Who may come in (`access`), CORS, request ids and error bodies are the same for both, and are seen to here.
"""

from __future__ import annotations

import functools
import math
import re
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable
from quart_trio.asgi import TrioASGIHTTPConnection, TrioASGIWebsocketConnection

from trigate.asgi.auth import authorize, cors_allows, cors_headers
from trigate.asgi.client import Downstream, RequestBody, too_large
from trigate.asgi.request import Head
from trigate.config.sections import Seconds
from trigate.errors import (
    Draining,
    GatewayError,
    Internal,
    MethodNotAllowed,
    Overloaded,
    UnsupportedMediaType,
)
from trigate.exchange.exchange import Exchange, Recorder
from trigate.exchange.shared_call import CoalescedExchange
from trigate.openai.endpoints import ENDPOINTS, Endpoint
from trigate.openai.request import Call, decode_call
from trigate.sessions.service import SessionRecorder
from trigate.webhooks import endpoint as hooks

if TYPE_CHECKING:
    from trigate.asgi.application import GatewayApp
    from trigate.config.sections import Config
    from trigate.gateway.gateway import Gateway

log = structlog.get_logger("trigate.asgi.dispatch")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}\Z")


class GatewayConnection(TrioASGIHTTPConnection):
    """One HTTP request to the gateway."""

    app: GatewayApp

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:  # noqa: ASYNC910
        gateway = self.app.gateway
        config = gateway.generation.config
        scope: Any = self.scope  # Any: hypercorn's type does not know our extension
        head = Head(scope)
        given = head.headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.match(given) else f"req_{secrets.token_hex(12)}"
        client = scope.get("extensions", {}).get("trigate.client")
        down = Downstream(send, [(b"x-request-id", request_id.encode())], client)
        inbound = RequestBody(receive)
        try:
            head.check()
            down.headers += cors_headers(head.origin, config)
            if head.method == "OPTIONS" and await _preflight(head, config, down):
                return  # noqa: ASYNC910
            endpoint = ENDPOINTS.get(head.path)
            if endpoint is not None:
                owner = authorize(head, config) or ""
                await self._data_plane(endpoint, head, request_id, inbound, down, owner=owner)
                return
            hook, rest = _hook_of(head.path)
            if hook and not rest:
                await self._hook(hook, head, inbound, down)
                return
            if hook:
                scope["trigate.readers"] = hooks.readers(
                    hook, config, head.headers, functools.partial(authorize, head, config)
                )
            elif head.path != "/health":
                scope["trigate.owner"] = authorize(head, config) or ""
            await self._control_plane(head, inbound, down)
        except GatewayError as error:
            log.info("refused", request_id=request_id, path=self.scope["path"], status=error.status, code=error.code)
            await _refuse(error, inbound, down)
        except Exception:
            log.exception("request_crashed", request_id=request_id, path=self.scope["path"])
            if not down.committed:
                await down.respond(*Internal(f"The gateway failed. Request id: {request_id}.").to_response())

    async def _control_plane(self, head: Head, inbound: RequestBody, down: Downstream) -> None:
        async def send(message: Any) -> None:  # Any: hypercorn's union of ASGI messages
            body = message.get("body", b"") if head.method != "HEAD" else b""
            if message["type"] == "http.response.start":
                await down.start(message["status"], list(message["headers"]))
            elif message.get("more_body", False):
                await down.send(body)
            else:
                await down.end(body)

        await super().__call__(inbound.receive_bounded, send)

    async def _data_plane(
        self, endpoint: Endpoint, head: Head, request_id: str, inbound: RequestBody, down: Downstream, *, owner: str
    ) -> None:
        gateway = self.app.gateway
        arrived_at = trio.current_time()
        if head.method != "POST":
            raise MethodNotAllowed(head.method, head.path, allowed=("POST",))
        content_type = head.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if content_type != b"application/json" and not content_type.endswith(b"+json"):
            said = content_type.decode("latin-1")[:100] or "none"
            raise UnsupportedMediaType(f"Content-Type must be application/json; got {said}.")
        session = head.session_key(endpoint)
        coalesce = head.coalesce()
        timeout_s, sdk_timeout_s = head.timeout_s(), head.sdk_timeout_s()
        body = await self._read(head, inbound, down, max_bytes=gateway.generation.config.limits.body_bytes)
        if body is None:
            return
        call = decode_call(endpoint, body)
        del body
        exchange: Exchange | None = None
        failure: GatewayError | None = None
        async with trio.open_nursery() as nursery:

            def leave() -> None:
                down.gone = True
                if not down.ended:
                    if exchange is not None and exchange.finishes:
                        exchange.finish_alone()
                    elif exchange is not None and exchange.abandon_upstream():
                        gateway.cancel_queue.cancel_soon(nursery.cancel_scope)
                    else:
                        nursery.cancel_scope.cancel()

            def exchange_for(call: Call, recorder: Recorder | None = None) -> Exchange:
                nonlocal exchange
                shares = call.model in gateway.generation.coalesced if coalesce is None else coalesce
                kind = CoalescedExchange if shares and recorder is None else Exchange
                exchange = kind(
                    id=request_id,
                    call=call,
                    gateway=gateway,
                    generation=gateway.generation,
                    down=down,
                    headers={
                        "content-type": "application/json",
                        "accept": "text/event-stream" if call.stream else "application/json",
                        "x-request-id": request_id,
                        **head.forwarded(),
                    },
                    owner=owner,
                    arrived_at=arrived_at,
                    client_timeout_s=timeout_s,
                    sdk_timeout_s=sdk_timeout_s,
                    recorder=recorder,
                )
                return exchange

            _watch_client(nursery, inbound, down, leave)
            if session is None:
                await exchange_for(call).run(nursery)
            else:
                wait_s = min(timeout_s, sdk_timeout_s)
                failure = await _take_turn(gateway, owner, session, call, exchange_for, nursery, at_most_s=wait_s)
            if nursery.child_tasks:  # the watch, or a keep-alive that the client does not take
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _hook(self, name: str, head: Head, inbound: RequestBody, down: Downstream) -> None:
        config = self.app.gateway.generation.config
        visit = self.app.gateway.hooks.visit(
            hooks.Request(
                name=name,
                method=head.method,
                headers=head.headers,
                query=self.scope["query_string"],
                client=head.client,
                authorize=functools.partial(authorize, head, config),
            )
        )
        body = await self._read(head, inbound, down, max_bytes=visit.body_bytes)
        if body is None:
            return
        error: GatewayError | None = None
        async with trio.open_nursery() as nursery:

            def leave() -> None:
                down.gone = True
                if not down.ended:
                    nursery.cancel_scope.cancel()

            _watch_client(nursery, inbound, down, leave)
            try:
                await visit.serve(body, down)
            except GatewayError as raised:  # not through the nursery, which would make a group of it
                error = raised
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error

    async def _read(self, head: Head, inbound: RequestBody, down: Downstream, *, max_bytes: int) -> bytes | None:
        """Reads the body of a call that will cost something; None where the client left meanwhile.

        Raises:
            Draining: There will be no more calls.
            TooLarge, BodyTimeout: As `RequestBody.read`.
        """
        gateway = self.app.gateway
        if gateway.draining:
            raise Draining("The gateway is shutting down. Try again: another instance will answer.")
        if (head.content_length or 0) > max_bytes:
            raise too_large(max_bytes)
        if down.client is not None and down.client.body_is_here and head.content_length is not None:
            # nearly always: a deadline would cost more than this
            return (await inbound.receive()).get("body", b"")  # type: ignore[no-any-return]
        return await inbound.read(max_bytes=max_bytes, timeout_s=gateway.generation.config.limits.body_timeout_s)


def _hook_of(path: str) -> tuple[str, str]:
    """The name of the hook that a path leads to, and what stands behind it.

    >>> _hook_of("/hooks/ci"), _hook_of("/hooks/ci/runs/run_1"), _hook_of("/status"), _hook_of("/hooks/")
    (('ci', ''), ('ci', 'runs/run_1'), ('', ''), ('', ''))
    """
    if not path.startswith("/hooks/"):
        return "", ""
    name, slash, rest = path.removeprefix("/hooks/").partition("/")
    return name, rest or slash


def _watch_client(nursery: trio.Nursery, inbound: RequestBody, down: Downstream, leave: Callable[[], None]) -> None:
    """Has ``leave`` called when the client leaves before its answer is out."""
    if down.client is None or not down.client.watch(leave):
        nursery.start_soon(_watch, inbound, leave)


async def _take_turn(
    gateway: Gateway,
    owner: str,
    key: str,
    call: Call,
    exchange_for: Callable[[Call, Recorder], Exchange],
    nursery: trio.Nursery,
    *,
    at_most_s: float,
) -> GatewayError | None:
    """Serves a call as a turn of a session. Until its turn has come, there is no exchange: to wait costs no place, and
    no limit in time but its own and the client's (``at_most_s``). How many may wait is bounded as exchanges are: each
    holds a connection and a body.

    Returns:
        Why it could not; returned, since the nursery would make a group of it.
    """
    config = gateway.generation.config
    limit = config.limits.max_exchanges
    if gateway.sessions.turns >= limit:
        said = f"{limit} turns of sessions are in progress or wait, which is the limit of this gateway."
        return Overloaded(said)  # noqa: ASYNC910 - the caller goes on
    try:
        limits = config.sessions
        if at_most_s < (limits.wait_s or math.inf):
            limits = attrs.evolve(limits, wait_s=Seconds(at_most_s))
        async with gateway.sessions.open_turn(owner, key, limits=limits) as turn:
            composed = turn.compose(call)
            recorder = SessionRecorder(gateway.store, turn)
            exchange = exchange_for(composed, recorder)
            turn.stop_with(exchange.cut)
            try:
                await exchange.run(nursery)
            finally:
                recorder.settle(exchange.usage)
    except GatewayError as error:
        return error  # noqa: ASYNC910 - to open a turn is a checkpoint
    return None


async def _watch(inbound: RequestBody, leave: Callable[[], None]) -> None:
    """Waits for the client to leave before the answer is out, where the server has no cheaper way to tell."""
    while (await inbound.receive())["type"] != "http.disconnect":
        pass
    leave()


async def _refuse(error: GatewayError, inbound: RequestBody, down: Downstream) -> None:
    """Answers with an error before COMMIT. A body that is still arriving is drained before the response ends: the
    client has the whole answer by then (it is as long as it said), and no reset can take it away."""
    if down.committed:
        return  # noqa: ASYNC910
    status, headers, body = error.to_response()
    await down.start(status, [*headers, (b"content-length", b"%d" % len(body))])
    await down.send(body)
    await inbound.drain()
    await down.end()


async def _preflight(head: Head, config: Config, down: Downstream) -> bool:
    """Answers a CORS preflight; False where it is none, or not an allowed one."""
    if head.origin is None or b"access-control-request-method" not in head.headers:
        return False  # noqa: ASYNC910 - the caller goes on
    if not cors_allows(head.origin, config):
        return False  # noqa: ASYNC910 - the caller goes on
    asked = head.headers.get(b"access-control-request-headers", b"")
    await down.respond(
        204,
        [
            (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
            (b"access-control-allow-headers", asked if asked.isascii() else b""),
            (b"access-control-max-age", b"600"),
        ],
        b"",
    )
    return True


class NoWebsocket(TrioASGIWebsocketConnection):
    """There are no WebSocket endpoints: the handshake is refused, before Quart makes anything of it."""

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        await receive()
        await send({"type": "websocket.close", "code": 1000, "reason": None})
