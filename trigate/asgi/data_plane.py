"""Calls that carry model traffic (``POST /v1/…``): from the request to its exchange.

They bypass Quart. A stream must never pass through a generator (a cancellation would be raised in code that does not
expect it), and Quart's request and response objects cost as much as the whole exchange.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import attrs
import trio

from trigate.asgi import responses
from trigate.asgi.objects import Objects, is_kept, may_name_objects, named_by
from trigate.asgi.request import RequestHead
from trigate.asgi.request_body import BodyLimits, RequestBody, too_large
from trigate.config.sections import Seconds
from trigate.content_coding import CODINGS
from trigate.dialects.endpoints import RESPONSES, Found
from trigate.dialects.ollama import answer_without_upstream
from trigate.errors import (
    Draining,
    GatewayError,
    MethodNotAllowed,
    Overloaded,
    UnsupportedMediaType,
)
from trigate.exchange.client_response import ClientResponse
from trigate.exchange.exchange import Exchange
from trigate.exchange.request import ExchangeRequest
from trigate.exchange.sink import Recorder
from trigate.gateway.gateway import Gateway
from trigate.keys.key import Key
from trigate.openai.passed_paths import find_passed
from trigate.openai.request import Call, decode_call, decode_large_call
from trigate.openai.request_bounds import is_small
from trigate.routing.routes import Target
from trigate.sessions.service import SessionRecorder
from trigate.tracebacks import drop_frames

_OF_CURL = (b"", b"application/x-www-form-urlencoded")
_Note = Callable[[Target | None, bytes], bool]
"""As `ExchangeRequest.note`."""
_DECODING = trio.CapacityLimiter(1)
"""Large bodies are decoded one by one: each further thread would delay the event loop by a turn of the interpreter."""


async def serve_call(
    gateway: Gateway,
    found: Found,
    head: RequestHead,
    request_body: RequestBody,
    response: ClientResponse,
    *,
    request_id: str,
    key: Key,
) -> None:
    """Serves one call: reads and decodes it, and runs its exchange in a nursery that ends when the client disconnects.

    Raises:
        GatewayError: The call was refused before its exchange began.
    """
    arrived_at = trio.current_time()
    owner = key.name
    endpoint = found.endpoint
    if head.method != "POST":
        listed = find_passed("GET", head.path) is not None
        raise MethodNotAllowed(head.method, head.path, allowed=("GET", "POST") if listed else ("POST",))
    content_type = head.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    # Ollama takes any: its clients are told to use `curl -d`. A web page, which has an origin, cannot.
    is_curl = endpoint.format == "ollama" and head.origin is None and content_type in _OF_CURL
    if content_type != b"application/json" and not content_type.endswith(b"+json") and not is_curl:
        given = content_type.decode("latin-1")[:100] or "none"
        raise UnsupportedMediaType(f"Content-Type must be application/json; got {given}.")
    session = head.session_key(endpoint)
    coalesce = head.coalesce()
    timeout_s, sdk_timeout_s = head.timeout_s(), head.sdk_timeout_s()
    body = await read_body(gateway, head, request_body, response)
    if body is None:
        return
    if is_small(body):
        call = decode_call(endpoint, body, found.in_path)
    else:
        call = await trio.to_thread.run_sync(decode_large_call, endpoint, body, found.in_path, limiter=_DECODING)
    request_body.keep(len(body), gateway.generations.config.limits)
    del body
    if endpoint.format == "ollama":
        generation = gateway.generations.current
        call = attrs.evolve(call, model=generation.named(call.model))
        if (data := answer_without_upstream(call, time.time_ns())) is not None:
            generation.route(call.model)
            await response.respond(200, [(b"content-type", b"application/json")], data)
            return
    asked: responses.ResponseCall | None = None
    if endpoint is RESPONSES:
        asked = await responses.prepare(gateway, call, owner)
        call = asked.call
    upstream, note = await _objects_of(gateway, call, key)
    exchange: Exchange | None = None
    failure: GatewayError | None = None
    async with trio.open_nursery() as nursery:

        def leave() -> None:
            if exchange is not None:
                exchange.client_left()
            else:
                response.gone = True
                nursery.cancel_scope.cancel()

        def request_for(call: Call, exchange_id: str) -> ExchangeRequest:
            return ExchangeRequest(
                id=exchange_id,
                call=call,
                generation=gateway.generations.current,
                headers={
                    "content-type": "application/json",
                    "accept": "text/event-stream" if call.stream else "application/json",
                    "x-request-id": request_id,
                    **head.forwarded(endpoint),
                },
                client_headers=head.headers,
                key=key,
                arrived_at=arrived_at,
                client_timeout_s=timeout_s,
                sdk_timeout_s=sdk_timeout_s,
                upstream=upstream,
                note=note,
            )

        def exchange_for(call: Call, recorder: Recorder | None = None) -> Exchange:
            nonlocal exchange
            request = request_for(call, request_id)
            exchange = Exchange(
                request=request,
                services=gateway.exchange_services,
                client=response,
                recorder=recorder,
                shares=request.generation.settings_of(call.model).coalesce if coalesce is None else coalesce,
            )
            return exchange

        watch_client(nursery, request_body, response, leave)
        if asked is not None and asked.live is not None and call.identity is not None:
            timeout_s = sdk_timeout_s = math.inf
            try:
                await responses.serve_in_background(gateway, asked, request_for(call, call.identity.id), response)
            except GatewayError as error:  # not through the nursery, which would wrap it in a group
                drop_frames(error)
                failure = error
        elif session is None:
            await exchange_for(call, asked.recorder if asked is not None else None).run(nursery)
        else:
            wait_s = min(timeout_s, sdk_timeout_s)
            failure = await _take_turn(gateway, owner, session, call, response, exchange_for, nursery, at_most_s=wait_s)
        if nursery.child_tasks:  # the watch, or a keep-alive that the client does not read
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _objects_of(gateway: Gateway, call: Call, key: Key) -> tuple[str | None, _Note | None]:
    """Returns the upstream that has the objects that a call names, and what notes an answer that its upstream keeps."""
    names, keeps = may_name_objects(call, are_apart=gateway.keys.are_several), is_kept(call)
    if not (names or keeps):
        return None, None
    objects = Objects.of(gateway.store, key)
    upstream = None
    if names:
        find = partial(named_by, call)
        ids = find() if is_small(call.body) else await trio.to_thread.run_sync(find, limiter=_DECODING)
        upstream = await objects.upstream_of(None, ids, asked=None)
    return upstream, partial(objects.note_answer, call) if keeps else None


async def read_body(
    gateway: Gateway,
    head: RequestHead,
    request_body: RequestBody,
    response: ClientResponse,
    *,
    max_bytes: int | None = None,
    is_verified: bool = True,
) -> bytes | None:
    """Reads and decodes the body of a call or of a webhook; None = the client disconnected meanwhile.

    Args:
        max_bytes: Its size limit; None = that of calls.
        is_verified: Whether the sender is known. If not, the body must not be compressed: it is signed as it came.

    Raises:
        Draining: New calls are refused.
        UnsupportedMediaType: Its content coding is not served.
        TooLarge, BadRequest, BodyTimeout, Overloaded: As `RequestBody.read`.
    """
    if gateway.live.is_draining:
        raise Draining("The gateway is shutting down. Try again: another instance will answer.")
    limits = gateway.generations.config.limits
    if max_bytes is None:
        max_bytes = limits.body_bytes
    if (head.content_length or 0) > max_bytes:
        raise too_large(max_bytes)
    coding = head.content_coding(CODINGS if is_verified else ()) if b"content-encoding" in head.headers else "identity"
    client = response.client
    if client is not None and client.body_is_here and head.content_length is not None and coding == "identity":
        # The usual case, without the cost of a cancel scope: the body has arrived with the head.
        request_body.complete = True
        return client.take_body()
    own = BodyLimits.of(limits, max_bytes=max_bytes, is_verified=is_verified)
    return await request_body.read(own, limits, coding=coding)


def watch_client(
    nursery: trio.Nursery, request_body: RequestBody, response: ClientResponse, leave: Callable[[], None]
) -> None:
    """Calls ``leave`` when the client disconnects before its answer is out."""
    if response.client is None or not response.client.watch(leave):
        nursery.start_soon(wait_disconnected, request_body, leave)


async def wait_disconnected(request_body: RequestBody, leave: Callable[[], None]) -> None:
    """Waits for the disconnect in a task, under a server that has no callback for it."""
    while (await request_body.receive())["type"] != "http.disconnect":
        pass
    leave()


async def _take_turn(
    gateway: Gateway,
    owner: str,
    key: str,
    call: Call,
    response: ClientResponse,
    exchange_for: Callable[[Call, Recorder], Exchange],
    nursery: trio.Nursery,
    *,
    at_most_s: float,
) -> GatewayError | None:
    """Serves a call as a turn of a session.

    The exchange begins with the turn: a call that waits for its turn takes no admission slot. The wait is limited by
    ``sessions.wait_s`` and by the client's own timeout (``at_most_s``). Since each waiting call holds a connection and
    a body, the number of waiting calls is limited to ``limits.max_exchanges``.

    Returns:
        The error; it is returned, since the nursery would wrap it in a group.
    """
    config = gateway.generations.config
    limit = config.limits.max_exchanges
    if gateway.sessions.turns >= limit:
        return Overloaded(f"{limit} turns of sessions are in progress or wait, which is the limit of this gateway.")
    try:
        limits = config.sessions
        if at_most_s < (limits.wait_s or math.inf):
            limits = attrs.evolve(limits, wait_s=Seconds(at_most_s))
        async with gateway.sessions.open_turn(owner, key, limits=limits) as turn:
            recorder = SessionRecorder(gateway.store, turn)
            exchange = exchange_for(turn.compose(call), recorder)
            if turn.omitted:
                response.headers.append((b"x-trigate-history-omitted", b"%d" % turn.omitted))
            turn.stop_with(exchange.cancel)
            try:
                await exchange.run(nursery)
            finally:
                recorder.settle(exchange.usage)
    except GatewayError as error:
        drop_frames(error)
        return error
    return None
