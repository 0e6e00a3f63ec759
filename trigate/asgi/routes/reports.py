"""``/v1/usage`` and ``/v1/exchanges``: what was used, and what happened. A key sees its own; the admin's key, all."""

from __future__ import annotations

import csv
import datetime
import io
import math
import time
from collections.abc import Sequence
from typing import Any, cast, get_args

import msgspec
from quart import Blueprint, Response, request

from trigate.asgi.quart_app import current_gateway, current_key
from trigate.errors import BadRequest, Forbidden
from trigate.keys.key import ANYBODY
from trigate.ledger.usage import HOUR_S, Column, percentile_s, usage
from trigate.status.merge import iso_time
from trigate.store.records import ExchangeRecord
from trigate.store.reports import ExchangeQuery, UsageColumn, UsageTotals

blueprint = Blueprint("reports", __name__)

MAX_LIMIT = 1000
_DAY_S = 86_400
_DEFAULT_DAYS = 30
_COLUMNS: tuple[Column, ...] = (*get_args(UsageColumn), "tag")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_ENDED_WELL = ("complete", "cancelled", "finished")


# -- parameters -------------------------------------------------------------------------------------------------------


def _owner() -> str | None:
    """The owner whose calls are asked for; None = everybody's.

    Raises:
        Forbidden: It is another key, and the request does not have the admin's key.
    """
    key, asked = current_key(), request.args.get("key")
    if key is ANYBODY or key.is_admin:
        return asked
    if asked not in (None, key.name):
        raise Forbidden("Only the admin's key sees the calls of other keys.")
    return key.name


def _moment(name: str, *, ends: bool = False) -> float | None:
    """A parameter that is a date or a time of ISO 8601, in POSIX seconds; UTC if it has no offset.

    Args:
        ends: A date stands for its end, and not for its beginning.

    Raises:
        BadRequest: It is neither.
    """
    text = request.args.get(name)
    if text is None:
        return None
    try:
        if len(text) <= 10:  # a date
            day = datetime.datetime.combine(datetime.date.fromisoformat(text), datetime.time(), datetime.UTC)
            return day.timestamp() + (_DAY_S if ends else 0)
        at = datetime.datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
        return (at if at.tzinfo is not None else at.replace(tzinfo=datetime.UTC)).timestamp()
    except (ValueError, OverflowError):
        raise BadRequest(
            f"{name} must be a date (2026-11-30) or a time of ISO 8601 (2026-11-30T12:00:00Z), not {text[:60]!r}.",
            param=name,
        ) from None


def _times() -> tuple[float | None, float | None]:
    since, before = _moment("from"), _moment("to", ends=True)
    if since is not None and before is not None and since >= before:
        raise BadRequest("to must be later than from.", param="to")
    return since, before


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), content_type="application/json")


def _usd(micro_usd: int | None) -> str | None:
    """Micro-dollars as a text, which is exact."""
    return None if micro_usd is None else f"{micro_usd // 1_000_000}.{micro_usd % 1_000_000:06d}"


# -- use --------------------------------------------------------------------------------------------------------------


@blueprint.get("/v1/usage")
async def get_usage() -> Response:
    """Sums up the calls of some time, in groups, as JSON or CSV.

    Raises:
        BadRequest: A parameter has an invalid value, or there are too many groups.
        Forbidden: As `_owner`.
        StoreUnavailable: The use cannot be read.
    """
    owner, columns, as_csv = _owner(), _columns(), _is_csv()
    since, before = _times()
    now = time.time()
    end = math.ceil((now if before is None else before) / HOUR_S)
    first = (end * HOUR_S // _DAY_S - _DEFAULT_DAYS) * 24 if since is None else math.floor(since / HOUR_S)
    gateway = current_gateway()
    found, total = await usage(
        gateway.store,
        gateway.ledger,
        columns,
        first,
        end,
        tags_of=lambda name: gateway.keys.named(name).settings.tags,
        owner=owner,
        model=request.args.get("model"),
    )
    if as_csv:
        return Response(_csv(columns, found), content_type="text/csv; charset=utf-8")
    return _json(
        {
            "object": "usage",
            "from": _iso(first * HOUR_S),
            "to": _iso(end * HOUR_S),
            "group_by": columns,
            "data": [_row(columns, use) for use in found],
            "total": _row((), total),
        }
    )


def _columns() -> list[Column]:
    names = [name.strip() for name in request.args.get("group_by", "").split(",") if name.strip()]
    for name in names:
        if name not in _COLUMNS:
            raise BadRequest(f"group_by must have some of {', '.join(_COLUMNS)}, not {name[:60]!r}.", param="group_by")
    if len(set(names)) < len(names):
        raise BadRequest("group_by has a word twice.", param="group_by")
    return cast("list[Column]", names)


def _is_csv() -> bool:
    form = request.args.get("format")
    if form not in (None, "csv", "json"):
        raise BadRequest("format must be json or csv.", param="format")
    best = request.accept_mimetypes.best_match(["application/json", "text/csv"], "application/json")
    return form == "csv" or (form is None and best == "text/csv")


def _iso(at: float) -> str:
    return datetime.datetime.fromtimestamp(min(max(at, 0), 253_402_300_799), datetime.UTC).isoformat()


def _shown(column: Column, value: str | int) -> str:
    """The value of a column: hours and days as ISO 8601."""
    if column == "hour":
        return _iso(int(value) * HOUR_S)
    return _iso(int(value) * _DAY_S)[:10] if column == "day" else str(value)


def _row(columns: Sequence[Column], use: UsageTotals) -> dict[str, Any]:
    outcomes = use.outcomes
    complete, cancelled = outcomes.get("complete", 0), outcomes.get("cancelled", 0) + outcomes.get("finished", 0)
    return {
        **{column: _shown(column, value) for column, value in zip(columns, use.group, strict=True)},
        "calls": use.calls,
        "complete": complete,
        "cancelled": cancelled,
        "failed": use.calls - complete - cancelled,
        "failures": {code: count for code, count in sorted(outcomes.items()) if code not in _ENDED_WELL},
        "prompt_tokens": use.prompt_tokens,
        "cached_tokens": use.cached_tokens,
        "cache_write_tokens": use.cache_write_tokens,
        "completion_tokens": use.completion_tokens,
        "reasoning_tokens": use.reasoning_tokens,
        "estimated_calls": use.estimated,
        "unpriced_calls": use.unpriced,
        "cost_usd": _usd(use.cost),
        "duration_p50_s": percentile_s(use.durations, 0.5),
        "duration_p95_s": percentile_s(use.durations, 0.95),
        "first_content_p50_s": percentile_s(use.first_contents, 0.5),
        "first_content_p95_s": percentile_s(use.first_contents, 0.95),
    }


def _csv(columns: Sequence[Column], found: Sequence[UsageTotals]) -> str:
    """Makes a table with a head. A text that a spreadsheet would take for a formula gets an apostrophe before it."""
    names = [name for name in _row((), UsageTotals()) if name != "failures"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*columns, *names])
    for use in found:
        row = _row(columns, use)
        shown = [
            f"'{row[name]}" if row[name][:1] in ("=", "+", "-", "@", "\t", "\r") else row[name] for name in columns
        ]
        writer.writerow([*shown, *[row[name] for name in names]])
    return text.getvalue()


# -- exchanges --------------------------------------------------------------------------------------------------------


@blueprint.get("/v1/exchanges")
async def list_exchanges() -> Response:
    """Lists the records of exchanges that have ended, the last settled first.

    Raises:
        BadRequest: A parameter has an invalid value.
        Forbidden: As `_owner`.
        StoreUnavailable: The records cannot be read.
    """
    owner, limit, failed = _owner(), request.args.get("limit", "100"), request.args.get("failed", "false")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 6 and 1 <= int(limit) <= MAX_LIMIT):
        raise BadRequest(f"limit must be a number from 1 to {MAX_LIMIT}.", param="limit")
    if failed not in ("true", "false"):
        raise BadRequest("failed must be true or false.", param="failed")
    since, before = _times()
    query = ExchangeQuery(
        owner=owner,
        id=request.args.get("id"),
        model=request.args.get("model"),
        outcome=request.args.get("outcome"),
        failed=failed == "true",
        since=since,
        before=before,
    )
    found = await current_gateway().ledger.list(query, limit=int(limit) + 1, after=request.args.get("after"))
    shown = [_exchange(each) for each in found[: int(limit)]]
    return _json({"object": "list", "data": shown, "has_more": len(found) > int(limit)})


def _rounded(seconds: float | None) -> float | None:
    return round(seconds, 4) if seconds is not None else None


def _exchange(record: ExchangeRecord) -> dict[str, Any]:
    shown = msgspec.structs.asdict(record)
    for name in ("owner", "key_group", "cost"):
        del shown[name]
    duration_s = record.ended_at - record.started_at if record.ended_at is not None else None
    return {
        **shown,
        "key": record.owner,
        "group": record.key_group,
        "started_at": iso_time(record.started_at, timespec="milliseconds"),
        "ended_at": iso_time(record.ended_at, timespec="milliseconds"),
        "cost_usd": _usd(record.cost),
        "waited_s": _rounded(record.attempts[0].started_s if record.attempts else None),
        "duration_s": _rounded(duration_s),
        "first_content_s": _rounded(record.first_content_s),
        "attempts": [
            {
                **msgspec.structs.asdict(attempt),
                "started_s": round(attempt.started_s, 4),
                "duration_s": _rounded(attempt.duration_s),
                "first_content_s": _rounded(attempt.first_content_s),
                "requested_s": _rounded(attempt.requested_s),
                "head_s": _rounded(attempt.head_s),
            }
            for attempt in record.attempts
        ],
    }
