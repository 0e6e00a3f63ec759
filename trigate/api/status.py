"""``GET /status``: what the gateway is doing."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import msgspec
from quart import Blueprint, Response, current_app

from trigate import report

if TYPE_CHECKING:
    from trigate.application import GatewayApp

blueprint = Blueprint("status", __name__)


@blueprint.get("/status")
async def status() -> Response:
    """Version, uptime, workers, channels, sessions, store, upstreams, live streams and totals; of all workers."""
    body = await report.status(cast("GatewayApp", current_app).gateway)
    return Response(msgspec.json.encode(body), content_type="application/json")
