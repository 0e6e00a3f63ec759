"""The part of ``GET /status`` that one worker knows. It travels to the other workers with the worker's heartbeat.

A part is made once a second, even with ten thousand exchanges in flight. So it counts them, and lists only the oldest.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import msgspec

from trigate.channels.service import ChannelStatistics
from trigate.exchange import view
from trigate.exchange.admission import AdmissionStatistics
from trigate.exchange.state import ExchangeState
from trigate.ledger.ledger import LedgerStatistics
from trigate.prices.prices import Prices
from trigate.routing.target_state import Targets
from trigate.status.schema import OldestStream, PricesStatus, TargetStatus, Totals
from trigate.tracing.tracer import TracingStatistics
from trigate.upstream.upstream import UpstreamStatistics

MAX_STREAMS = 100
"""Maximum number of exchanges that ``/status`` lists."""
MAX_TARGETS = 100
"""Maximum number of targets that ``/status`` lists."""
MAX_UNKNOWN = 100
"""Maximum number of targets without a price that ``/status`` lists."""


class InFlight(msgspec.Struct, frozen=True, kw_only=True):
    """The exchanges of one worker that are in flight.

    Attributes:
        by_phase: How many there are, by phase.
        by_upstream: How many there are, by upstream; those without a target are left out.
        oldest: At most `MAX_STREAMS` of them.
    """

    by_phase: dict[str, int]
    by_upstream: dict[str, int]
    oldest: tuple[OldestStream, ...]

    @property
    def live(self) -> int:
        """How many there are."""
        return sum(self.by_phase.values())


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """The status of one worker. The part of a worker of another version may have another shape."""

    version: str
    uptime_s: float
    draining: bool
    config: str
    reload_error: str | None
    in_flight: InFlight
    upstreams: tuple[UpstreamStatistics, ...]
    channels: tuple[ChannelStatistics, ...]
    totals: Totals
    admission: AdmissionStatistics
    targets: tuple[TargetStatus, ...]
    ledger: LedgerStatistics
    prices: PricesStatus = PricesStatus()
    tracing: TracingStatistics = TracingStatistics()


def list_prices(prices: Prices, *, error: str | None = None, refreshed_at: str | None = None) -> PricesStatus:
    """Describes the prices: where they come from, and which are missing."""
    unknown = tuple(list(prices.unknown)[:MAX_UNKNOWN])
    return PricesStatus(source=prices.source, unknown=unknown, refreshed_at=refreshed_at, refresh_error=error)


def encode(part: Part) -> bytes:
    """Encodes a part as JSON."""
    return msgspec.json.encode(part)


def decode(data: bytes) -> Part:
    """Decodes the part of a worker.

    Raises:
        msgspec.DecodeError: It has another shape.
    """
    return msgspec.json.decode(data, type=Part)


def count_in_flight(live: Iterable[ExchangeState], *, worker: str, now: float) -> InFlight:
    """Counts the exchanges in flight.

    Args:
        live: The exchanges in the order of their arrival. Iterated three times.
        worker: The id of this worker.
        now: Trio's clock.
    """
    return InFlight(
        by_phase=Counter([view.phase(exchange) for exchange in live]),
        by_upstream=Counter([exchange.target.upstream for exchange in live if exchange.target is not None]),
        oldest=tuple(_oldest_stream(exchange, worker, now) for exchange in itertools.islice(live, MAX_STREAMS)),
    )


def _oldest_stream(exchange: ExchangeState, worker: str, now: float) -> OldestStream:
    return OldestStream(
        id=exchange.id,
        model=exchange.call.model,
        upstream=str(exchange.target) if exchange.target else None,
        stream=exchange.call.stream,
        phase=view.phase(exchange),
        age_s=now - exchange.started_at,
        events=exchange.events,
        bytes=exchange.bytes_sent,
        worker=worker,
    )


def list_targets(targets: Targets, *, worker: str, now: float) -> tuple[TargetStatus, ...]:
    """Describes the targets that this worker has tried, by endpoint, at most `MAX_TARGETS` of them.

    Args:
        worker: The id of this worker.
        now: Trio's clock.
    """
    return tuple(
        TargetStatus(
            target=str(target),
            endpoint=endpoint,
            breaker=state.breaker.state(now),
            opens_in_s=round(state.breaker.opens_in_s(now), 3),
            in_flight=state.in_flight,
            first_token_s=round(state.first_token_s, 4) if state.first_token_s is not None else None,
            prompt_tokens=state.prompt_tokens,
            cached_tokens=state.cached_tokens,
            estimate_factor=round(state.ratios.prompt.factor, 3),
            estimate_error=round(state.ratios.prompt.error, 3) if state.ratios.prompt.error is not None else None,
            worker=worker,
        )
        for target, endpoint, state in targets.items()[:MAX_TARGETS]
    )
