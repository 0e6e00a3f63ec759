"""``GET /status``: what the gateway is doing."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from quart import Blueprint, Response, current_app, jsonify

from trigate import report

if TYPE_CHECKING:
    from trigate.application import GatewayApp

blueprint = Blueprint("status", __name__)


@blueprint.get("/status")
async def status() -> Response:
    """Version, uptime, channels, sessions, upstreams, live streams and totals."""
    return jsonify(report.status(cast("GatewayApp", current_app).gateway))
