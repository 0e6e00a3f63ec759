"""Merges the parts of all workers into the body of ``GET /status``.

The result is the same in every worker, except that each has its own part as it is now and the others' parts as they
last reported them. Where the workers disagree, the rules are:

* an upstream has the best state that a worker knows (`_UPSTREAM_STATES`);
* a channel has the state that the worker which holds it sees, else the latest change (`_seen_by_workers`);
* the ledger and the export of traces have the worst state;
* counters are summed.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import attrs
import msgspec

from trigate.channels.service import ChannelStatistics
from trigate.exchange.admission import AdmissionStatistics
from trigate.ledger.ledger import LedgerStatistics
from trigate.status import schema
from trigate.status.snapshot import MAX_STREAMS, MAX_TARGETS, MAX_UNKNOWN, Part
from trigate.store.records import ChannelRecord, SessionCounts
from trigate.tracing.tracer import TracingStatistics
from trigate.upstream.upstream import UpstreamStatistics
from trigate.version import __version__


@attrs.frozen(kw_only=True)
class Report:
    """What one worker reported.

    Attributes:
        worker: The id of the worker.
        started_at: POSIX seconds.
        age_s: How long ago it reported this; 0 for the worker that merges.
    """

    worker: str
    pid: int
    started_at: float
    part: Part
    age_s: float


@attrs.frozen(kw_only=True)
class StoreCounts:
    """What is counted in the store. The defaults are those of a store in which nothing has been written yet.

    Attributes:
        sessions, outbox: None = the store could not be asked.
        records: The records of channels by their names.
        called: The names of the hooks that were called although no configuration names them, the last called first.
        unfinished: Number of unfinished runs by channel.
        outbox: Number of waiting deliveries by channel.
    """

    sessions: SessionCounts | None = attrs.field(factory=lambda: SessionCounts(total=0, active=0, busy=0))
    records: Mapping[str, ChannelRecord] = attrs.field(factory=dict)
    called: Sequence[str] = ()
    unfinished: Mapping[str, int] = attrs.field(factory=dict)
    outbox: Mapping[str, int] | None = attrs.field(factory=dict)


UNKNOWN_COUNTS = StoreCounts(sessions=None, outbox=None)
"""The store could not be asked."""


def merge(reports: Iterable[Report], counts: StoreCounts, store: schema.StoreStatus) -> schema.Status:
    """Merges the reports of all workers.

    Args:
        reports: At least one, in any order.
    """
    reports = sorted(reports, key=lambda report: (report.started_at, report.worker))
    parts = [report.part for report in reports]
    uptime_s = max(report.part.uptime_s + report.age_s for report in reports)
    return schema.Status(
        status="draining" if all(part.draining for part in parts) else "ok",
        version=__version__,
        uptime_s=round(uptime_s, 3),
        uptime=h_mm_ss(uptime_s),
        config=parts[0].config,
        reload_error=next((part.reload_error for part in parts if part.reload_error is not None), None),
        workers=tuple(_worker(report) for report in reports),
        channels=tuple(_channels(reports, counts)),
        sessions=_sessions(counts.sessions) if counts.sessions is not None else None,
        outbox=schema.OutboxStatus(depth=sum(counts.outbox.values())) if counts.outbox is not None else None,
        store=store,
        upstreams=tuple(_upstreams(parts)),
        ledger=_ledger([part.ledger for part in parts]),
        admission=_admission([part.admission for part in parts]),
        targets=tuple(target for part in parts for target in part.targets)[:MAX_TARGETS],
        streams=_streams(reports),
        totals=_totals([part.totals for part in parts]),
        prices=_prices([part.prices for part in parts]),
        tracing=_tracing([part.tracing for part in parts]),
    )


def _worker(report: Report) -> schema.WorkerStatus:
    return schema.WorkerStatus(
        id=report.worker,
        pid=report.pid,
        status="draining" if report.part.draining else "ok",
        version=report.part.version,
        uptime_s=round(report.part.uptime_s + report.age_s, 3),
        report_age_s=round(report.age_s, 3),
        live=report.part.in_flight.live,
    )


def _sessions(counts: SessionCounts) -> schema.SessionsStatus:
    return schema.SessionsStatus(total=counts.total, active=counts.active, busy=counts.busy)


def _ledger(ledgers: Sequence[LedgerStatistics]) -> schema.LedgerStatus:
    worst = max(ledgers, key=lambda ledger: ("off", "ok", "degraded").index(ledger.state))
    return schema.LedgerStatus(
        state=worst.state,
        begun=sum(ledger.begun for ledger in ledgers),
        settled=sum(ledger.settled for ledger in ledgers),
        lost=sum(ledger.lost for ledger in ledgers),
        dropped=sum(ledger.dropped for ledger in ledgers),
        error=next((ledger.error for ledger in ledgers if ledger.error is not None), None),
    )


def _tracing(workers: Sequence[TracingStatistics]) -> schema.TracingStatus:
    worst = max(workers, key=lambda worker: ("off", "ok", "failing", "unavailable").index(worker.state))
    return schema.TracingStatus(
        state=worst.state,
        exported=sum(worker.exported for worker in workers),
        dropped=sum(worker.dropped for worker in workers),
        waiting=sum(worker.waiting for worker in workers),
        error=worst.error,
    )


def _admission(admissions: Sequence[AdmissionStatistics]) -> schema.AdmissionStatus:
    return schema.AdmissionStatus(
        in_flight=sum(admission.in_flight for admission in admissions),
        limit=sum(admission.limit for admission in admissions),
        queued=sum(admission.queued for admission in admissions),
        refused=sum(admission.refused for admission in admissions),
        late_workers=sum(admission.is_late for admission in admissions),
        lag_s=max(admission.lag_s for admission in admissions),
    )


def _streams(reports: Sequence[Report]) -> schema.StreamsStatus:
    in_flight = [report.part.in_flight for report in reports]
    aged = [(row.age_s + report.age_s, row) for report in reports for row in report.part.in_flight.oldest]
    aged.sort(key=lambda pair: -pair[0])
    return schema.StreamsStatus(
        live=sum(each.live for each in in_flight),
        by_phase=_sum_by_key(each.by_phase for each in in_flight),
        by_upstream=_sum_by_key(each.by_upstream for each in in_flight),
        oldest=tuple(msgspec.structs.replace(row, age_s=round(age_s, 3)) for age_s, row in aged[:MAX_STREAMS]),
    )


def _sum_by_key(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def _prices(prices: Sequence[schema.PricesStatus]) -> schema.PricesStatus:
    unknown = sorted({target for each in prices for target in each.unknown})
    return schema.PricesStatus(
        source="; ".join(dict.fromkeys(each.source for each in prices)),
        unknown=tuple(unknown[:MAX_UNKNOWN]),
        refreshed_at=min((each.refreshed_at for each in prices if each.refreshed_at is not None), default=None),
        refresh_error=next((each.refresh_error for each in prices if each.refresh_error is not None), None),
    )


def _totals(totals: Sequence[schema.Totals]) -> schema.Totals:
    return schema.Totals(
        **{name: sum(getattr(each, name) for each in totals) for name in schema.Totals.__struct_fields__}
    )


_UPSTREAM_STATES = ("disabled", "unknown", "down", "up")
"""The states of an upstream, the best one last. ``unknown`` gives way to what another worker knows."""


def _upstreams(parts: Sequence[Part]) -> Iterable[schema.UpstreamStatus]:
    by_name: dict[str, list[UpstreamStatistics]] = {}
    for part in parts:
        for upstream in part.upstreams:
            by_name.setdefault(upstream.name, []).append(upstream)
    for same in by_name.values():
        best = max(same, key=lambda upstream: _UPSTREAM_STATES.index(upstream.state))
        failed_last = max(same, key=lambda upstream: upstream.last_error_at or 0.0)
        yield schema.UpstreamStatus(
            name=best.name,
            kind=best.kind,
            state=best.state,
            reason=best.reason,
            in_flight=sum(upstream.in_flight for upstream in same),
            queued=sum(upstream.queued for upstream in same),
            max_connections=sum(upstream.max_connections for upstream in same),
            models=max(upstream.models for upstream in same),
            last_error=failed_last.last_error,
            last_error_at=iso_time(failed_last.last_error_at),
        )


def _channels(reports: Sequence[Report], counts: StoreCounts) -> Iterable[schema.ChannelStatus]:
    by_name: dict[str, list[tuple[str, ChannelStatistics]]] = {}
    for report in reports:
        for channel in report.part.channels:
            by_name.setdefault(channel.name, []).append((report.worker, channel))
    for name, same in by_name.items():
        yield _channel(_seen_by_workers(same, counts.records.get(name)), counts)
    since = reports[0].started_at
    for name in counts.called:
        if name not in by_name:
            called = ChannelStatistics(name=name, type="webhook", state="connected", since=since)
            yield _channel(called, counts)


def _seen_by_workers(same: Sequence[tuple[str, ChannelStatistics]], record: ChannelRecord | None) -> ChannelStatistics:
    """Chooses one worker's view of a channel.

    It is the view of the worker that reads the platform, if there is one. Otherwise, if all workers see the same state,
    it is the view of the worker that has seen it for longest; if not, the latest change.

    Args:
        same: The ids of the workers, each with its view.
        record: The channel's record in the store, which names the worker that reads the platform.
    """
    holder = record.holder if record is not None else None
    for worker, channel in same:
        if worker == holder:
            return channel
    channels = [channel for _, channel in same]
    if len({channel.state for channel in channels}) == 1:
        return min(channels, key=lambda channel: channel.since)
    return max(channels, key=lambda channel: channel.since)


def _channel(channel: ChannelStatistics, counts: StoreCounts) -> schema.ChannelStatus:
    record = counts.records.get(channel.name, ChannelRecord(name=channel.name))
    is_known = counts.outbox is not None
    deliveries = counts.outbox.get(channel.name, 0) if counts.outbox is not None else 0
    return schema.ChannelStatus(
        name=channel.name,
        type=channel.type,
        status=channel.state,
        since=iso_time(channel.since),
        last_event_at=iso_time(record.last_event_at),
        last_error=channel.last_error,
        received=record.received if is_known else None,
        replied=record.replied if is_known else None,
        queued=counts.unfinished.get(channel.name, 0) + deliveries if is_known else None,
    )


def h_mm_ss(seconds: float) -> str:
    """Formats a duration; whole seconds, rounded down.

    >>> h_mm_ss(59.9), h_mm_ss(3_661), h_mm_ss(360_000)
    ('0:00:59', '1:01:01', '100:00:00')
    """
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def iso_time(posix: float | None, *, timespec: str = "seconds") -> str | None:
    """Formats POSIX seconds as ISO 8601 in UTC; None remains None.

    >>> iso_time(1.25), iso_time(1.25, timespec="milliseconds"), iso_time(None)
    ('1970-01-01T00:00:01+00:00', '1970-01-01T00:00:01.250+00:00', None)
    """
    return datetime.datetime.fromtimestamp(posix, datetime.UTC).isoformat(timespec=timespec) if posix else None
