"""``GET /health`` (liveness) and ``GET /ready`` (readiness)."""

from __future__ import annotations

from quart import Blueprint, Response, jsonify

from trigate.asgi.quart_app import current_gateway

blueprint = Blueprint("health", __name__)


@blueprint.get("/health")
async def health() -> Response:
    """Answers 200 as long as the process runs; needs no key."""
    return jsonify({"status": "ok"})


@blueprint.get("/ready")
async def ready() -> tuple[Response, int]:
    """Answers 200, or 503 with the reasons: the gateway drains, or no upstream is usable."""
    reasons = current_gateway().not_ready()
    if reasons:
        return jsonify({"status": "not ready", "reasons": reasons}), 503
    return jsonify({"status": "ready", "reasons": []}), 200
