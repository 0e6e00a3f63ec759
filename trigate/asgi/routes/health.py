"""``GET /health`` (is the process alive) and ``GET /ready`` (should it get work)."""

from __future__ import annotations

from quart import Blueprint, Response, jsonify

from trigate.asgi.quart_app import current_gateway

blueprint = Blueprint("health", __name__)


@blueprint.get("/health")
async def health() -> Response:
    """Says that the process answers; needs no key."""
    return jsonify({"status": "ok"})


@blueprint.get("/ready")
async def ready() -> tuple[Response, int]:
    """Says 200, or 503 with the reasons: it drains, or no upstream can serve."""
    reasons = current_gateway().not_ready()
    if reasons:
        return jsonify({"status": "not ready", "reasons": reasons}), 503
    return jsonify({"status": "ready", "reasons": []}), 200
