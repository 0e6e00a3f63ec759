"""What the gateway says of itself: the lines at start-up, and the body of ``GET /status``.

``/status`` is the same from every worker. Each says what it does once a second, as a `Part` in its beat
(`workers.Workers`); whoever is asked puts its own part, as it is now, beside what the others said last. What nobody
owns alone (sessions, counters of channels, the outbox) is counted in the store.

It must not cost more with more streams: exchanges are counted, and only the oldest are shown.
"""

from __future__ import annotations

import datetime
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import msgspec
import structlog
import trio

from trigate import __version__
from trigate.channels.service import ChannelStatistics
from trigate.errors import GatewayError, StoreUnavailable
from trigate.ledger.ledger import LedgerStatistics
from trigate.store import opening
from trigate.store.records import ChannelRecord, SessionCounts, Worker
from trigate.upstream.upstream import UpstreamStatistics

if TYPE_CHECKING:
    from trigate.exchange.exchange import Exchange
    from trigate.gateway.gateway import Gateway

log = structlog.get_logger("trigate.status.snapshot")

MAX_STREAMS = 100
"""How many exchanges ``/status`` shows one by one."""
MAX_TARGETS = 100
"""How many targets ``/status`` shows."""
MAX_CHANNELS = 100
"""How many channels it shows that no configuration names."""
STORE_TIMEOUT_S = 1.0
"""How long the store may take to tell."""


def startup_lines(gateway: Gateway) -> list[str]:
    """What was found, in three lines, or four where there are hooks or channels."""
    generation = gateway.generation
    config = generation.config
    where = gateway.store.statistics().path
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
    lines = [
        f"Trigate {__version__}, configured by {config.source}; {keys}; store {opening.describe_location(where)}",
        "Upstreams: " + ("; ".join(found) or "none"),
        f"Models: {len(generation.public_ids())} listed; {default}",
    ]
    callers = [name if hook.enabled else f"{name}: disabled" for name, hook in (config.hooks or {}).items()]
    for name in config.channels:
        reason = config.disabled.get(f"channels.{name}")
        callers.append(f"{name}: disabled ({reason})" if reason else name)
    if callers:
        lines.append("Hooks and channels: " + "; ".join(callers))
    return lines


def clock(seconds: float) -> str:
    """Writes a duration as H:MM:SS.

    >>> clock(59.9), clock(3_661), clock(360_000)
    ('0:00:59', '1:01:01', '100:00:00')
    """
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def moment(posix: float | None, *, timespec: str = "seconds") -> str | None:
    """Writes a time of POSIX seconds as ISO 8601 has it; None where there is none.

    >>> moment(1.25), moment(1.25, timespec="milliseconds"), moment(None)
    ('1970-01-01T00:00:01+00:00', '1970-01-01T00:00:01.250+00:00', None)
    """
    return datetime.datetime.fromtimestamp(posix, datetime.UTC).isoformat(timespec=timespec) if posix else None


# -- one worker -------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class StreamRow:
    """An exchange in flight, as ``/status`` shows it.

    Attributes:
        upstream: The target; None = it has none yet.
    """

    id: str
    model: str
    upstream: str | None
    stream: bool
    phase: str
    age_s: float
    events: int
    bytes: int


@attrs.frozen(kw_only=True)
class Part:
    """What one worker says of itself.

    Attributes:
        version: Another one's part may have another shape, which then cannot be read.
        by_phase, by_upstream: How many exchanges are in flight.
        oldest: At most `MAX_STREAMS` of them.
        totals: `gateway.Totals`.
        door: `admission.Admission.statistics`.
        targets: What is known of each target.
        ledger: How its records of exchanges are.
    """

    version: str
    uptime_s: float
    draining: bool
    config: str
    reload_error: str | None
    by_phase: dict[str, int]
    by_upstream: dict[str, int]
    oldest: tuple[StreamRow, ...]
    upstreams: tuple[UpstreamStatistics, ...]
    channels: tuple[ChannelStatistics, ...]
    totals: dict[str, int]
    door: dict[str, int | float]
    targets: tuple[dict[str, Any], ...]
    ledger: LedgerStatistics

    @property
    def live(self) -> int:
        """How many exchanges are in flight."""
        return sum(self.by_phase.values())


def _row(exchange: Exchange, now: float) -> StreamRow:
    return StreamRow(
        id=exchange.id,
        model=exchange.call.model,
        upstream=str(exchange.target) if exchange.target else None,
        stream=exchange.call.stream,
        phase=exchange.phase,
        age_s=now - exchange.started_at,
        events=exchange.events,
        bytes=exchange.bytes_sent,
    )


def part(gateway: Gateway) -> Part:
    """What this worker does now. Made at each beat, beside ten thousand exchanges: they are counted, and
    nothing is made for each."""
    live, now = gateway.live, trio.current_time()
    return Part(
        version=__version__,
        uptime_s=gateway.uptime_s,
        draining=gateway.aside.is_set(),
        config=gateway.generation.config.source,
        reload_error=gateway.reload_error,
        by_phase=Counter([exchange.phase for exchange in live]),
        by_upstream=Counter([exchange.target.upstream for exchange in live if exchange.target is not None]),
        oldest=tuple(_row(exchange, now) for exchange in itertools.islice(live, MAX_STREAMS)),
        upstreams=tuple(upstream.statistics() for upstream in gateway.generation.upstreams.values()),
        channels=tuple(_channels(gateway)),
        totals=attrs.asdict(gateway.totals),
        door=gateway.admission.statistics(),
        targets=tuple(_targets(gateway, now)),
        ledger=gateway.ledger.statistics(),
    )


def _channels(gateway: Gateway) -> Sequence[ChannelStatistics]:
    if gateway.channels is not None:
        return gateway.channels.statistics()
    return [
        ChannelStatistics(
            name=name,
            type="webhook",
            state="connected" if hook.enabled else "disabled",
            since=gateway.workers.started_at,
        )
        for name, hook in (gateway.generation.config.hooks or {}).items()
    ]


def snapshot(gateway: Gateway) -> bytes:
    """This worker's part, as JSON: what its beat says."""
    return msgspec.json.encode(part(gateway))


# -- all of them ------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class _Said:
    """What a worker said, and how long ago."""

    id: str
    pid: int
    started_at: float
    part: Part
    ago_s: float


@attrs.frozen(kw_only=True)
class _Shared:
    """What is counted in the store. None, or empty, where it could not be asked, or nothing has been kept yet."""

    sessions: SessionCounts | None = attrs.field(factory=lambda: SessionCounts(total=0, active=0, busy=0))
    records: Mapping[str, ChannelRecord] = attrs.field(factory=dict)
    called: Sequence[str] = ()
    """Hooks that no configuration names."""
    unfinished: Mapping[str, int] = attrs.field(factory=dict)
    outbox: Mapping[str, int] | None = attrs.field(factory=dict)


async def status(gateway: Gateway) -> dict[str, Any]:
    """The body of ``GET /status``. Holds no text of any message, and no secret."""
    await trio.lowlevel.checkpoint()
    error = None
    others: Sequence[Worker] = ()
    shared = _Shared()
    store = gateway.store.statistics()
    if store.state == "closed":  # to ask would make a file
        if opening.is_needed(gateway.generation.config, store.path):  # something may be in it, and it is being opened
            shared = _Shared(sessions=None, outbox=None)
    else:
        try:
            with trio.fail_after(STORE_TIMEOUT_S):
                others = await gateway.workers.others()
                shared = await _ask_store(gateway)
        except StoreUnavailable as unavailable:
            error = unavailable.message
        except trio.TooSlowError:
            error = f"it did not answer within {STORE_TIMEOUT_S:g} s"
        if error is not None:
            shared = _Shared(sessions=None, outbox=None)
    said = _said(gateway, others)
    store = gateway.store.statistics()
    parts = [each.part for each in said]
    uptime_s = max(each.part.uptime_s + each.ago_s for each in said)
    return {
        "status": "draining" if all(each.draining for each in parts) else "ok",
        "version": __version__,
        "uptime_s": round(uptime_s, 3),
        "uptime": clock(uptime_s),
        "config": parts[0].config,
        "reload_error": next((each.reload_error for each in parts if each.reload_error is not None), None),
        "workers": [_worker_row(each) for each in said],
        "channels": _channel_rows(said, shared),
        "sessions": attrs.asdict(shared.sessions) if shared.sessions is not None else None,
        "outbox": {"depth": sum(shared.outbox.values())} if shared.outbox is not None else None,
        "store": {
            "kind": store.kind,
            "path": store.path,
            "state": "unavailable" if error is not None else store.state,
            "error": error if error is not None else store.error,
        },
        "upstreams": _upstream_rows(parts),
        "ledger": _ledger([each.ledger for each in parts]),
        "admission": _admission(parts),
        "targets": [{**row, "worker": each.id} for each in said for row in each.part.targets][:MAX_TARGETS],
        "streams": _streams(said),
        "totals": _sums(each.totals for each in parts),
    }


def _admission(parts: Sequence[Part]) -> dict[str, float]:
    rows = [each.door for each in parts]
    summed = {name: sum(row[name] for row in rows) for name in ("in_flight", "limit", "queued", "refused", "late")}
    return {**summed, "lag_s": max(row["lag_s"] for row in rows)}


def _ledger(parts: Sequence[LedgerStatistics]) -> dict[str, Any]:
    """The worst state, and the sums."""
    worst = max(parts, key=lambda each: ("off", "ok", "degraded").index(each.state))
    numbers = ("begun", "settled", "lost", "dropped")
    return {
        "state": worst.state,
        **{name: sum(getattr(each, name) for each in parts) for name in numbers},
        "error": next((each.error for each in parts if each.error is not None), None),
    }


def _targets(gateway: Gateway, now: float) -> list[dict[str, Any]]:
    return [
        {
            "target": str(target),
            "breaker": state.breaker.state(now),
            "opens_in_s": round(state.breaker.opens_in_s(now), 3),
            "in_flight": state.in_flight,
            "first_token_s": round(state.first_token_s, 4) if state.first_token_s is not None else None,
        }
        for target, state in gateway.targets.items()[:MAX_TARGETS]
    ]


async def _ask_store(gateway: Gateway) -> _Shared:
    store, config = gateway.store, gateway.generation.config
    sessions = await store.sessions.count(active_since=time.time() - config.sessions.active_window_s)
    records = {record.name: record for record in await store.channels.all()}
    named = {channel.name for channel in _channels(gateway)}
    called = []
    if config.hooks is None:  # any name is one
        called = [record for name, record in records.items() if name not in named and _is_hook(record)]
        called = sorted(called, key=lambda record: record.last_event_at or 0.0, reverse=True)[:MAX_CHANNELS]
    shown = named.intersection(records).union(record.name for record in called)  # each of them is a question
    return _Shared(
        sessions=sessions,
        records=records,
        called=tuple(record.name for record in called),
        unfinished={name: await store.runs.unfinished(name) for name in shown},
        outbox=await store.deliveries.depth(),
    )


def _is_hook(record: ChannelRecord) -> bool:
    return record.received > 0 and not record.cursor and record.holder is None


def _said(gateway: Gateway, others: Iterable[Worker]) -> list[_Said]:
    """This worker as it is, and the others as they said last, the oldest first. Whose words cannot be read, since it
    runs another version, is left out."""
    me, now = gateway.workers, time.time()
    said = [_Said(id=me.id, pid=os.getpid(), started_at=me.started_at, part=part(gateway), ago_s=0.0)]
    for worker in others:
        try:
            words = msgspec.json.decode(worker.snapshot, type=Part)
        except msgspec.DecodeError as error:
            log.debug("part_unreadable", worker=worker.id, error=str(error))
            continue
        ago_s = max(0.0, now - worker.seen_at)
        said.append(_Said(id=worker.id, pid=worker.pid, started_at=worker.started_at, part=words, ago_s=ago_s))
    return sorted(said, key=lambda each: (each.started_at, each.id))


def _worker_row(said: _Said) -> dict[str, Any]:
    return {
        "id": said.id,
        "pid": said.pid,
        "status": "draining" if said.part.draining else "ok",
        "version": said.part.version,
        "uptime_s": round(said.part.uptime_s + said.ago_s, 3),
        "said_s_ago": round(said.ago_s, 3),
        "live": said.part.live,
    }


def _sums(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    summed: Counter[str] = Counter()
    for each in counts:
        summed.update(each)
    return dict(summed)


def _streams(said: Sequence[_Said]) -> dict[str, Any]:
    rows = [(row.age_s + each.ago_s, row, each.id) for each in said for row in each.part.oldest]
    rows.sort(key=lambda row: -row[0])
    return {
        "live": sum(each.part.live for each in said),
        "by_phase": _sums(each.part.by_phase for each in said),
        "by_upstream": _sums(each.part.by_upstream for each in said),
        "oldest": [
            attrs.asdict(row) | {"age_s": round(age_s, 3), "worker": worker}
            for age_s, row, worker in rows[:MAX_STREAMS]
        ],
    }


_KNOWS = ("disabled", "unknown", "down", "up")
"""The states of an upstream: what one worker knows better than the others goes for all."""


def _upstream_rows(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Each upstream once: what is in flight is added up, and the state is that of the worker that it serves best."""
    by_name: dict[str, list[UpstreamStatistics]] = {}
    for each in parts:
        for upstream in each.upstreams:
            by_name.setdefault(upstream.name, []).append(upstream)
    rows = []
    for same in by_name.values():
        row = attrs.asdict(max(same, key=lambda upstream: _KNOWS.index(upstream.state)))
        last = max(same, key=lambda upstream: upstream.last_error_at or 0.0)
        row["in_flight"] = sum(upstream.in_flight for upstream in same)
        row["queued"] = sum(upstream.queued for upstream in same)
        row["max_connections"] = sum(upstream.max_connections for upstream in same)
        row["models"] = max(upstream.models for upstream in same)
        row["last_error"], row["last_error_at"] = last.last_error, moment(last.last_error_at)
        rows.append(row)
    return rows


def _channel_rows(said: Sequence[_Said], shared: _Shared) -> list[dict[str, Any]]:
    by_name: dict[str, list[tuple[str, ChannelStatistics]]] = {}
    for each in said:
        for channel in each.part.channels:
            by_name.setdefault(channel.name, []).append((each.id, channel))
    shown = [_state_of(same, shared.records.get(name)) for name, same in by_name.items()]
    since = said[0].started_at
    shown.extend(
        ChannelStatistics(name=name, type="webhook", state="connected", since=since)
        for name in shared.called
        if name not in by_name
    )
    return [_channel_row(channel, shared) for channel in shown]


def _state_of(same: Sequence[tuple[str, ChannelStatistics]], record: ChannelRecord | None) -> ChannelStatistics:
    """One channel as the workers see it: as the one that reads its platform does; where none does alone, the last
    change is the news, and a state in which all agree is as old as the first of them."""
    holder = record.holder if record is not None else None
    for worker, channel in same:
        if worker == holder:
            return channel
    channels = [channel for _, channel in same]
    if len({channel.state for channel in channels}) == 1:
        return min(channels, key=lambda channel: channel.since)
    return max(channels, key=lambda channel: channel.since)


def _channel_row(channel: ChannelStatistics, shared: _Shared) -> dict[str, Any]:
    counted = shared.records.get(channel.name, ChannelRecord(name=channel.name))
    known = shared.outbox is not None
    waiting = shared.outbox.get(channel.name, 0) if shared.outbox is not None else 0
    return {
        "name": channel.name,
        "type": channel.type,
        "status": channel.state,
        "since": moment(channel.since),
        "last_event_at": moment(counted.last_event_at),
        "last_error": channel.last_error,
        "received": counted.received if known else None,
        "replied": counted.replied if known else None,
        "queued": shared.unfinished.get(channel.name, 0) + waiting if known else None,
    }
