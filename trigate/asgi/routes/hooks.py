"""``GET /hooks/NAME/runs/ID``: the run of a message. (``POST /hooks/NAME`` is `trigate.webhooks.endpoint`.)"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import msgspec
from quart import Blueprint, Response, request

from trigate.asgi.quart_app import current_gateway
from trigate.errors import NotFound
from trigate.runs.request import view
from trigate.store.records import Delivery

blueprint = Blueprint("hooks", __name__)


@blueprint.get("/hooks/<name>/runs/<run_id>")
async def run(name: str, run_id: str) -> Response:
    """Returns a run with its result and its deliveries.

    Raises:
        NotFound: There is no such run, or it belongs to another owner.
        StoreUnavailable: It cannot be looked up.
    """
    gateway = current_gateway()
    readers: set[str] | None = request.scope["trigate.readers"]  # type: ignore[typeddict-item]
    await gateway.workers.join()
    found = await gateway.store.runs.get(run_id)
    if found is None or found.channel != name or (readers is not None and found.owner not in readers):
        raise NotFound(f"There is no run {run_id[:100]}.")
    deliveries = await gateway.store.deliveries.of_run(run_id)
    shown = {**view(found), "deliveries": [_delivery(each) for each in deliveries]}
    return Response(msgspec.json.encode(shown), content_type="application/json")


def _delivery(delivery: Delivery) -> dict[str, Any]:
    """The view of a delivery. Its URL has no query, which may contain a secret."""
    parts = urlsplit(delivery.target)
    return {
        "id": delivery.id,
        "url": f"{parts.scheme}://{parts.netloc}{parts.path}" if parts.scheme in ("http", "https") else None,
        "state": delivery.state,
        "attempts": delivery.attempts,
        "last_status": delivery.last_status or None,
        "last_error": delivery.last_error,
    }
