"""``GET /metrics``: the samples of all workers, for Prometheus."""

from __future__ import annotations

from quart import Blueprint, Response, request

from trigate.asgi.quart_app import current_gateway
from trigate.metrics.exposition import OPENMETRICS_TYPE, TEXT_TYPE, prefers_openmetrics

blueprint = Blueprint("metrics", __name__)


@blueprint.get("/metrics")
async def scrape() -> Response:
    """Returns all samples, in OpenMetrics' format if ``Accept`` asks for it, else in Prometheus' text format."""
    openmetrics = prefers_openmetrics(request.headers.get("accept", ""))
    body = await current_gateway().scrapes.expose(openmetrics=openmetrics)
    return Response(body, content_type=OPENMETRICS_TYPE if openmetrics else TEXT_TYPE, headers={"vary": "accept"})
