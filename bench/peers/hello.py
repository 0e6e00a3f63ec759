"""An ASGI app that reads a call and answers "hello", in the shape of an answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

ANSWER = (
    b'{"id":"chatcmpl-hello","object":"chat.completion","created":1750000000,"model":"mock-model","choices":[{"index":0'
    b',"message":{"role":"assistant","content":"hello"},"finish_reason":"stop"}]}'
)
HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]


async def app(
    scope: Mapping[str, Any],  # Any: ASGI as servers type it
    receive: Callable[[], Awaitable[Mapping[str, Any]]],
    send: Callable[[Mapping[str, Any]], Awaitable[None]],
) -> None:
    """Answers."""
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": ANSWER})
