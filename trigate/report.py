"""What the gateway says of itself: the lines at start-up, and the body of ``GET /status``."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

import attrs

from trigate import __version__
from trigate.errors import GatewayError

if TYPE_CHECKING:
    from trigate.exchange import Exchange
    from trigate.gateway import Gateway


def startup_lines(gateway: Gateway) -> list[str]:
    """What was found, in two or three lines."""
    generation = gateway.generation
    config = generation.config
    try:
        default = f"default is {generation.route('default').targets[0]}"
    except GatewayError as error:
        default = f"default cannot serve: {error}"
    found = []
    for name, upstream in generation.upstreams.items():
        statistics = upstream.statistics()
        note = f"{statistics.models} models" if statistics.state != "disabled" else f"disabled ({statistics.reason})"
        if statistics.state == "down":
            note = f"down ({statistics.reason})"
        found.append(f"{name}: {note}")
    keys = f"{len(config.keys)} keys ({', '.join(config.keys)})" if config.keys else "no key: this machine only"
    if not config.keys and config.server.insecure:
        keys = "NO KEY and --insecure: anybody who reaches it can use it"
    return [
        f"Trigate {__version__}, configured by {config.source}; {keys}",
        "Upstreams: " + ("; ".join(found) or "none"),
        f"Models: {len(generation.public_ids())} listed; {default}",
    ]


def clock(seconds: float) -> str:
    """Writes a duration as H:MM:SS.

    >>> clock(59.9), clock(3_661), clock(360_000)
    ('0:00:59', '1:01:01', '100:00:00')
    """
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def _time(posix: float | None) -> str | None:
    return datetime.datetime.fromtimestamp(posix, datetime.UTC).isoformat(timespec="seconds") if posix else None


def _stream(exchange: Exchange) -> dict[str, Any]:
    return {
        "id": exchange.id,
        "model": exchange.call.model,
        "upstream": str(exchange.target) if exchange.target else None,
        "stream": exchange.call.stream,
        "phase": exchange.phase,
        "age_s": round(exchange.age_s, 3),
        "events": exchange.events,
        "bytes": exchange.bytes_sent,
    }


def status(gateway: Gateway) -> dict[str, Any]:
    """The body of ``GET /status``. Holds no text of any message, and no secret."""
    generation = gateway.generation
    upstreams = []
    for upstream in generation.upstreams.values():
        row = attrs.asdict(upstream.statistics())
        row["last_error_at"] = _time(row["last_error_at"])
        upstreams.append(row)
    return {
        "status": "draining" if gateway.draining else "ok",
        "version": __version__,
        "uptime_s": round(gateway.uptime_s, 3),
        "uptime": clock(gateway.uptime_s),
        "config": generation.config.source,
        "reload_error": gateway.reload_error,
        "channels": [],
        "sessions": {"active": 0, "total": 0},
        "upstreams": upstreams,
        "streams": [_stream(exchange) for exchange in gateway.live],
        "totals": attrs.asdict(gateway.totals),
    }
