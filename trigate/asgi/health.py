"""``GET /health`` (liveness) and ``GET /ready`` (readiness).

They are answered without the control plane, so that a probe does not load it.
"""

from __future__ import annotations

import msgspec

from trigate.asgi.request import RequestHead
from trigate.errors import MethodNotAllowed
from trigate.exchange.client_response import ClientResponse
from trigate.gateway.gateway import Gateway

PATHS = ("/health", "/ready")
OPEN = ("/health", "/docs", "/openapi.json", "/llms.txt")
"""The paths that need no key: a probe, and the description of the API, which is the same for every gateway."""
_ALLOWED = ("GET", "HEAD", "OPTIONS")


async def answer_probe(gateway: Gateway, head: RequestHead, response: ClientResponse) -> None:
    """Answers a request to one of `PATHS`.

    ``/health`` answers 200 as long as the process runs. ``/ready`` answers 200, or 503 with the reasons: the gateway
    drains, or no upstream is usable.

    Raises:
        MethodNotAllowed: The method is another one.
    """
    if head.method == "OPTIONS":
        await response.respond(200, [(b"allow", ", ".join(_ALLOWED).encode())], b"")
        return
    if head.method not in _ALLOWED:
        raise MethodNotAllowed(head.method, head.path, allowed=_ALLOWED)
    status, body = 200, b'{"status":"ok"}'
    if head.path == "/ready":
        reasons = gateway.not_ready()
        status = 503 if reasons else 200
        body = msgspec.json.encode({"status": "not ready" if reasons else "ready", "reasons": reasons})
    await response.start(status, [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))])
    await response.end(b"" if head.method == "HEAD" else body)
