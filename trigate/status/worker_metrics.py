"""The samples of this worker: what its services count, and what the system knows of the process."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator

import attrs
import trio

from trigate.concurrency.slow_steps import SlowSteps
from trigate.exchange import view
from trigate.exchange.admission import Admission
from trigate.exchange.live import LiveExchanges
from trigate.exchange.outcome import Phase
from trigate.ledger.ledger import Ledger
from trigate.metrics.families import Sample
from trigate.quotas.counters import Budget, Counter
from trigate.quotas.service import NO_LIMIT, Quotas
from trigate.routing.circuit_breaker import State
from trigate.routing.target_state import Targets
from trigate.store.interface import Store
from trigate.tracing.tracer import Tracing
from trigate.upstream.generation import Generations

MAX_LIMITS = 500
"""How many limits and budgets are shown: any number of keys may be made while the gateway runs."""
_BREAKER_STATES: tuple[State, ...] = ("closed", "half_open", "open")


@attrs.define(eq=False, kw_only=True)
class WorkerMetrics:
    """Makes the samples of this worker. Nothing is made, and hardly anything counted, before it is asked."""

    _live: LiveExchanges
    _generations: Generations
    _admission: Admission
    _targets: Targets
    _quotas: Quotas
    _ledger: Ledger
    _tracing: Tracing
    _store: Store
    _slow_steps: SlowSteps
    _is_draining: Callable[[], bool]
    _started_at: float = attrs.field(factory=time.time)

    def samples(self) -> list[Sample]:
        """Makes all samples. Its cost grows with the exchanges in flight, which are counted by phase."""
        return [
            *self._live.metrics.samples(self._generations.current.upstreams),
            *self._of_admission(),
            *self._of_live(),
            *self._of_upstreams(),
            *_of_limits(self._quotas.all_counters(), trio.current_time()),
            *self._of_stores(),
            Sample("trigate_slow_steps", (), self._slow_steps.count),
            Sample("trigate_draining", (), int(self._is_draining())),
            *_of_process(),
            Sample("process_start_time_seconds", (), self._started_at),
        ]

    def _of_admission(self) -> Iterator[Sample]:
        admission = self._admission.statistics()
        yield Sample("trigate_admission_refused", (), admission.refused)
        yield Sample("trigate_admission_queued", (), admission.queued)
        yield Sample("trigate_admission_in_flight", (), admission.in_flight)
        yield Sample("trigate_admission_limit", (), admission.limit)
        yield Sample("trigate_event_loop_lag_seconds", (), admission.lag_s)

    def _of_live(self) -> Iterator[Sample]:
        phases = collections.Counter([view.phase(exchange) for exchange in self._live])
        for phase in Phase:
            if phase is not Phase.ENDED:
                yield Sample("trigate_live_exchanges", (str(phase),), phases[phase])
        totals = self._live.totals  # of the settled ones
        yield Sample("trigate_relay_bytes", (), totals.bytes + sum([each.bytes_sent for each in self._live]))
        yield Sample("trigate_relay_events", (), totals.events + sum([each.events for each in self._live]))

    def _of_upstreams(self) -> Iterator[Sample]:
        now, upstreams = trio.current_time(), self._generations.current.upstreams
        breakers = collections.Counter(
            [(target.upstream, state.breaker.state(now)) for target, _, state in self._targets.items()]
        )
        for name, upstream in upstreams.items():
            statistics = upstream.statistics()
            for state in _BREAKER_STATES:
                yield Sample("trigate_breakers", (name, state), breakers[name, state])
            if statistics.state != "unknown":
                yield Sample("trigate_upstream_up", (name,), int(statistics.state == "up"))
            yield Sample("trigate_upstream_in_flight", (name,), statistics.in_flight)
            yield Sample("trigate_upstream_queued", (name,), statistics.queued)
            yield Sample("trigate_upstream_max_connections", (name,), statistics.max_connections)

    def _of_stores(self) -> Iterator[Sample]:
        ledger, store = self._ledger.statistics(), self._store.statistics()
        yield Sample("trigate_ledger_begun", (), ledger.begun)
        yield Sample("trigate_ledger_settled", (), ledger.settled)
        yield Sample("trigate_ledger_lost", (), ledger.lost)
        yield Sample("trigate_ledger_dropped", (), ledger.dropped)
        yield Sample("trigate_ledger_waiting", (), ledger.waiting)
        tracing = self._tracing.statistics()
        yield Sample("trigate_spans_exported", (), tracing.exported)
        yield Sample("trigate_spans_dropped", (), tracing.dropped)
        yield Sample("trigate_spans_waiting", (), tracing.waiting)
        yield Sample("trigate_store_writes", (), store.writes)
        yield Sample("trigate_store_write_seconds", (), store.write_s)


def _of_limits(counters: Iterable[Counter], now: float) -> Iterator[Sample]:
    budgets: dict[tuple[str, str], Budget] = {}
    for counter in itertools.islice(counters, MAX_LIMITS):
        labels = counter.scope, counter.setting
        if isinstance(counter, Budget):
            if counter.limit >= NO_LIMIT:  # only a soft budget is set
                continue
            other = budgets.get(labels)
            if other is None or other.first_day < counter.first_day:  # calls in flight may still hold some of the last
                budgets[labels] = counter
        else:
            yield Sample("trigate_limit", labels, counter.limit)
            yield Sample("trigate_limit_available", labels, max(0.0, counter.available(now)))
    for labels, budget in budgets.items():
        yield Sample("trigate_budget_usd", labels, budget.limit / 1e6)
        yield Sample("trigate_budget_left_usd", labels, max(0.0, budget.left(now)) / 1e6)


def _of_process() -> Iterator[Sample]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    yield Sample("process_cpu_seconds", (), usage.ru_utime + usage.ru_stime)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        yield Sample("process_max_fds", (), soft)
    with contextlib.suppress(OSError):  # another system than Linux, or no descriptor is left
        with open("/proc/self/statm", "rb") as statm:
            pages = int(statm.read().split()[1])
        yield Sample("process_resident_memory_bytes", (), pages * os.sysconf("SC_PAGE_SIZE"))
        yield Sample("process_open_fds", (), len(os.listdir("/proc/self/fd")) - 1)  # without that of the list
