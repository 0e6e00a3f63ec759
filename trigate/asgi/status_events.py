"""``GET /status/events``: the state of the gateway and its exchanges in flight, twice a second, as a stream of events.

It is served here and not by the control plane, since a stream must not pass through a generator. Its nursery ends with
the client's connection. A viewer that does not read is disconnected after ``limits.stall_timeout_s``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from trigate.asgi.data_plane import watch_client
from trigate.asgi.request_body import RequestBody
from trigate.errors import GatewayError, MethodNotAllowed
from trigate.exchange.client_response import ClientResponse
from trigate.gateway.gateway import Gateway
from trigate.keys.key import ANYBODY, Key
from trigate.tracebacks import drop_frames

PATH = "/status/events"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
_CHECK_S = 5.0
"""How often it is checked whether a viewer reads."""


async def serve_events(
    gateway: Gateway, method: str, body: RequestBody, response: ClientResponse, authorize: Callable[[], Key]
) -> None:
    """Sends a sample for each period, until the client disconnects, its key is no longer valid, or the gateway drains.

    Args:
        authorize: Returns the key of the request, as it is now.

    Raises:
        MethodNotAllowed: Only ``GET`` is.
        Overloaded: Too many clients watch.
        GatewayError: As ``authorize`` raises.
    """
    key = authorize()
    if method != "GET":
        raise MethodNotAllowed(method, PATH, allowed=("GET", "OPTIONS"))
    with gateway.sampler.watch(None if key is ANYBODY or key.is_admin else key.name) as viewer:
        async with trio.open_nursery() as nursery:

            def leave() -> None:
                response.gone = True
                nursery.cancel_scope.cancel()

            watch_client(nursery, body, response, leave)
            nursery.start_soon(_end_stalled, gateway, response, nursery.cancel_scope)
            await response.start(200, _HEADERS)
            while not response.gone:
                sample = await viewer.next_sample()
                try:
                    authorize()
                except GatewayError as error:
                    drop_frames(error)
                    break
                await response.send(b"data: %b\n\n" % sample)
                if gateway.drain.is_announced:
                    break
            await response.end()
            nursery.cancel_scope.cancel()


async def _end_stalled(gateway: Gateway, response: ClientResponse, scope: trio.CancelScope) -> None:
    """Closes the connection of a client that does not read."""
    while True:
        await trio.sleep(_CHECK_S)
        limit_s = gateway.generations.config.limits.stall_timeout_s or math.inf
        since = response.sending_since
        if since is not None and trio.current_time() - since > limit_s:
            await response.abort()
            scope.cancel()
