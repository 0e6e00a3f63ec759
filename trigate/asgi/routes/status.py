"""``GET /status``: the state of the gateway, and its exchanges in flight."""

from __future__ import annotations

import msgspec
from quart import Blueprint, Response, request

from trigate.asgi.quart_app import current_gateway, current_key
from trigate.config import shown
from trigate.errors import BadRequest, NotFound
from trigate.keys.errors import AdminRequired
from trigate.keys.key import ANYBODY
from trigate.status.inflight import MAX_LIMIT
from trigate.status.schema import StreamList
from trigate.status.warnings import warnings

blueprint = Blueprint("status", __name__)


def _owner() -> str | None:
    """The owner whose exchanges may be seen: the key's; None = everybody's, for the admin or without keys."""
    key = current_key()
    return None if key is ANYBODY or key.is_admin else key.name


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), content_type="application/json")


@blueprint.get("/status")
async def status() -> Response:
    """Returns version, uptime, workers, channels, sessions, store, upstreams, exchanges in flight and totals of all
    workers."""
    return _json(await current_gateway().status.status())


@blueprint.get("/status/config")
async def configuration() -> Response:
    """Returns the configuration in force, without its secrets, and warnings. With keys, only the admin's key may.

    Raises:
        AdminRequired: Another key asks.
    """
    key = current_key()
    if not (key is ANYBODY or key.is_admin):
        raise AdminRequired("Only the admin's key may see the configuration.")
    gateway = current_gateway()
    config, state = gateway.generations.config, await gateway.status.status()
    return _json(
        {
            "object": "config",
            "source": config.source,
            "sections": shown.shown(config),
            "changed": shown.changed(config),
            "warnings": list(warnings(config, state)),
        }
    )


def _limit() -> int:
    limit = request.args.get("limit", "100")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 6 and 1 <= int(limit) <= MAX_LIMIT):
        raise BadRequest(f"limit must be a number from 1 to {MAX_LIMIT}.", param="limit")
    return int(limit)


@blueprint.get("/status/streams")
async def list_streams() -> Response:
    """Lists the exchanges in flight, the oldest first."""
    found = await current_gateway().inflight.list(owner=_owner(), limit=_limit())
    return _json(StreamList(data=found.rows, count=found.count, missing_workers=found.missing_workers))


@blueprint.get("/status/streams/<stream>")
async def retrieve_stream(stream: str) -> Response:
    """Returns one exchange, or a list if clients have given several the same id."""
    found = await current_gateway().inflight.list(owner=_owner(), stream=stream)
    if not found.rows:
        raise NotFound("There is no such stream.")
    return _json(found.rows[0] if len(found.rows) == 1 else {"object": "list", "data": found.rows})


@blueprint.delete("/status/streams/<stream>")
async def delete_stream(stream: str) -> Response:
    """Cancels an exchange; its client gets the error `CancelledByOperator`."""
    found = await current_gateway().inflight.cancel(owner=_owner(), stream=stream)
    if not found.count:
        raise NotFound("There is no such stream.")
    return _json({"id": stream, "object": "stream.cancelled", "cancelled": found.cancelled})
