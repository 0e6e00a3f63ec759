"""`trigate.asgi.application`: what reaches it besides requests."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from tests.support.gateway import OpenApp


async def _handshake(app: Any, extensions: dict[str, Any] | None) -> list[Any]:
    """Opens a WebSocket; returns what the app sends."""
    scope: dict[str, Any] = {"type": "websocket", "path": "/v1/responses", "headers": []}
    if extensions is not None:
        scope["extensions"] = extensions
    sent = []

    async def receive() -> Any:
        await trio.lowlevel.checkpoint()
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        await trio.lowlevel.checkpoint()
        sent.append(message)

    await app(scope, receive, send)
    return sent


async def test_a_websocket_is_refused_with_426(open_app: OpenApp) -> None:
    """Where the server can send a status: the one on which clients go on by HTTP."""
    async with open_app() as served:
        start, body = await _handshake(served.app, {"websocket.http.response": {}})
    assert start["status"] == 426
    assert (b"upgrade", b"websocket") in start["headers"]
    assert (b"content-length", b"%d" % len(body["body"])) in start["headers"]
    assert json.loads(body["body"])["error"]["code"] == "websocket_refused"
    assert not body["more_body"]


@pytest.mark.parametrize("extensions", [None, {}])
async def test_a_websocket_is_closed(open_app: OpenApp, extensions: dict[str, Any] | None) -> None:
    """Where the server cannot, the handshake is refused as ASGI has it."""
    async with open_app() as served:
        assert [message["type"] for message in await _handshake(served.app, extensions)] == ["websocket.close"]
