"""`StatusReporter`: makes this worker's part of the status, and the status of all workers.

``GET /status`` returns the same from every worker. Each worker sends its part (`snapshot.Part`) with its heartbeat once
a second. The worker that answers a request merges its own part as it is now, the parts that the others reported last,
and what belongs to no worker (sessions, counters of channels, the outbox), which is counted in the store.

**Bounds:** the store has `STORE_TIMEOUT_S` to answer, and a worker that has just started has as long to join the
others. The store is asked for at most `MAX_CHANNELS` channels that no configuration names, because any client with a
key can call a hook under any name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import attrs
import msgspec
import trio

from trigate.channels.service import Channels, ChannelStatistics
from trigate.errors import StoreUnavailable
from trigate.exchange.admission import Admission
from trigate.exchange.live import LiveExchanges
from trigate.ledger.ledger import Ledger
from trigate.logs import log
from trigate.routing.target_state import Targets
from trigate.status import merge, schema, snapshot
from trigate.status.merge import UNKNOWN_COUNTS, Report, StoreCounts
from trigate.status.snapshot import Part
from trigate.store import opening
from trigate.store.interface import Store
from trigate.store.records import ChannelRecord, Worker
from trigate.tracing.tracer import Tracing
from trigate.upstream.generation import Generations
from trigate.version import __version__
from trigate.workers.membership import Workers

MAX_CHANNELS = 100
"""Maximum number of channels that ``/status`` lists although no configuration names them."""
STORE_TIMEOUT_S = 1.0
"""How long the store may take to answer."""


class ReloadState(Protocol):
    """What the status shows of reloads."""

    @property
    def error(self) -> str | None:
        """Why the last reload was refused; None = it was not."""


class PriceRefreshState(Protocol):
    """What the status shows of the refresh of prices."""

    @property
    def error(self) -> str | None:
        """Why the prices could not be refreshed the last time; None = they could."""

    @property
    def refreshed_at(self) -> float | None:
        """When they were refreshed (POSIX seconds); None = not yet."""


@attrs.define(eq=False, kw_only=True)
class StatusReporter:
    """Reports the status of this worker and of all workers. Made by `gateway`.

    It has one field for each service that it reports on.

    Attributes:
        channels: None = there is no channel service; then the hooks of the configuration are reported.
        started_at: When the gateway started, on Trio's clock.
        is_handing_over: Whether the gateway has begun to shut down, or to hand over to another process.
    """

    _live: LiveExchanges
    _generations: Generations
    _admission: Admission
    _targets: Targets
    _ledger: Ledger
    _tracing: Tracing
    _workers: Workers
    _store: Store
    _channels: Channels | None
    _started_at: float
    _reload: ReloadState
    _price_refresh: PriceRefreshState
    _is_handing_over: Callable[[], bool]

    def __repr__(self) -> str:
        return f"<StatusReporter of {self._workers.id}>"

    def part(self) -> Part:
        """Makes this worker's part. Its cost does not depend on the number of exchanges, except for counting them."""
        now, worker = trio.current_time(), self._workers.id
        generation = self._generations.current
        return Part(
            version=__version__,
            uptime_s=now - self._started_at,
            draining=self._is_handing_over(),
            config=generation.config.source,
            reload_error=self._reload.error,
            in_flight=snapshot.count_in_flight(self._live, worker=worker, now=now),
            upstreams=tuple(upstream.statistics() for upstream in generation.upstreams.values()),
            channels=tuple(self._channel_statistics()),
            totals=schema.Totals(**attrs.asdict(self._live.totals)),
            admission=self._admission.statistics(),
            targets=snapshot.list_targets(self._targets, worker=worker, now=now),
            ledger=self._ledger.statistics(),
            tracing=self._tracing.statistics(),
            prices=snapshot.list_prices(
                generation.prices,
                error=self._price_refresh.error,
                refreshed_at=merge.iso_time(self._price_refresh.refreshed_at),
            ),
        )

    def snapshot(self) -> bytes:
        """Makes this worker's part and encodes it; this is what a heartbeat carries."""
        return snapshot.encode(self.part())

    async def status(self) -> schema.Status:
        """Makes the body of ``GET /status``. It contains no message text and no secret.

        If the store is unavailable, the body has this worker's part only, and says why.
        """
        await trio.lowlevel.checkpoint()
        error = None
        others: Sequence[Worker] = ()
        counts = StoreCounts()
        store = self._store.statistics()
        if not self._workers.is_joined and store.error is None and self._is_store_needed():
            # A worker that has just started would know of itself alone.
            with trio.move_on_after(STORE_TIMEOUT_S):
                await self._workers.wait_joined()
            store = self._store.statistics()
        if store.state == "closed":  # a question would create the file
            if self._is_store_needed():  # it is being opened, and may have data
                counts = UNKNOWN_COUNTS
        else:
            try:
                with trio.fail_after(STORE_TIMEOUT_S):
                    others = await self._workers.others()
                    counts = await self._count_in_store()
            except StoreUnavailable as unavailable:
                error = unavailable.message
            except trio.TooSlowError:
                error = f"it did not answer within {STORE_TIMEOUT_S:g} s"
            if error is not None:
                counts = UNKNOWN_COUNTS
        store = self._store.statistics()
        return merge.merge(
            self._reports(others),
            counts,
            schema.StoreStatus(
                kind=store.kind,
                path=store.path,
                state="unavailable" if error is not None else store.state,
                error=error if error is not None else store.error,
            ),
        )

    def _is_store_needed(self) -> bool:
        return opening.is_needed(self._generations.config, self._store.statistics().path)

    def _reports(self, others: Iterable[Worker]) -> list[Report]:
        """This worker's part as it is now, and what the others reported last. A part that cannot be read, because the
        worker is of another version, is left out."""
        this, now = self._workers, time.time()
        reports = [Report(worker=this.id, pid=os.getpid(), started_at=this.started_at, part=self.part(), age_s=0.0)]
        for other in others:
            try:
                part = snapshot.decode(other.snapshot)
            except msgspec.DecodeError as error:
                log.debug("part_unreadable", worker=other.id, error=str(error))
                continue
            age_s = max(0.0, now - other.seen_at)
            reports.append(Report(worker=other.id, pid=other.pid, started_at=other.started_at, part=part, age_s=age_s))
        return reports

    def _channel_statistics(self) -> Sequence[ChannelStatistics]:
        if self._channels is not None:
            return self._channels.statistics()
        return [
            ChannelStatistics(
                name=name,
                type="webhook",
                state="connected" if hook.enabled else "disabled",
                since=self._workers.started_at,
            )
            for name, hook in (self._generations.config.hooks or {}).items()
        ]

    async def _count_in_store(self) -> StoreCounts:
        store, config = self._store, self._generations.config
        sessions = await store.sessions.count(active_since=time.time() - config.sessions.active_window_s)
        records = {record.name: record for record in await store.channels.all()}
        configured = {channel.name for channel in self._channel_statistics()}
        called: list[ChannelRecord] = []
        if config.hooks is None:  # then any name is a hook
            called = [record for name, record in records.items() if name not in configured and _is_hook(record)]
            called.sort(key=lambda record: record.last_event_at or 0.0, reverse=True)
            del called[MAX_CHANNELS:]
        listed = configured.intersection(records).union(record.name for record in called)  # one query for each of them
        return StoreCounts(
            sessions=sessions,
            records=records,
            called=tuple(record.name for record in called),
            unfinished={name: await store.runs.unfinished(name) for name in listed},
            outbox=await store.deliveries.depth(),
        )


def _is_hook(record: ChannelRecord) -> bool:
    """Whether a record is of a hook. Only a channel of a platform has a cursor or a holder."""
    return record.received > 0 and not record.cursor and record.holder is None
