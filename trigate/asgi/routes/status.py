"""``GET /status``: the state of the gateway, its exchanges in flight, and the ledger."""

from __future__ import annotations

from typing import Any

import msgspec
from quart import Blueprint, Response, request

from trigate.asgi.quart_app import current_gateway, current_key
from trigate.errors import BadRequest, NotFound
from trigate.keys.key import ANYBODY
from trigate.status.inflight import MAX_LIMIT
from trigate.status.merge import iso_time
from trigate.status.schema import StreamList
from trigate.store.records import ExchangeRecord

blueprint = Blueprint("status", __name__)


def _owner() -> str | None:
    """The owner whose exchanges may be seen: the key's; None = everybody's, for the admin or without keys."""
    key = current_key()
    return None if key is ANYBODY or key.is_admin else key.name


def _rounded(seconds: float | None) -> float | None:
    return round(seconds, 4) if seconds is not None else None


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), content_type="application/json")


@blueprint.get("/status")
async def status() -> Response:
    """Returns version, uptime, workers, channels, sessions, store, upstreams, exchanges in flight and totals of all
    workers."""
    return _json(await current_gateway().status.status())


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


@blueprint.get("/status/ledger")
async def list_records() -> Response:
    """Lists the ledger's records, the last settled first."""
    limit = _limit()
    found = await current_gateway().ledger.list(
        limit=limit + 1, owner=_owner(), outcome=request.args.get("outcome"), after=request.args.get("after")
    )
    return _json({"object": "list", "data": [_record(each) for each in found[:limit]], "has_more": len(found) > limit})


def _record(record: ExchangeRecord) -> dict[str, Any]:
    return {
        **msgspec.structs.asdict(record),
        "started_at": iso_time(record.started_at, timespec="milliseconds"),
        "ended_at": iso_time(record.ended_at, timespec="milliseconds"),
        "duration_s": _rounded(record.ended_at - record.started_at if record.ended_at is not None else None),
        "first_content_s": _rounded(record.first_content_s),
        "attempts": [
            {
                **msgspec.structs.asdict(attempt),
                "started_s": round(attempt.started_s, 4),
                "duration_s": _rounded(attempt.duration_s),
                "first_content_s": _rounded(attempt.first_content_s),
            }
            for attempt in record.attempts
        ],
    }
