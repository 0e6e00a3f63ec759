"""The scenarios: each one is a kind of load and the numbers that are read from it.

A scenario runs on one gateway at a time for some seconds and gives an `Outcome`. `session` runs each of them on all
gateways in turn, several times.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Literal

import attrs
import httpx2
import trio

from bench.distribution import Histogram, recovery
from bench.gateways import Gateway
from bench.load import Job, Report
from bench.process import Generator, Upstream
from bench.upstream import directive

NEAR = 0.8
"""A result above this share of the tool's own maximum is marked, since the tool may have limited it."""


@attrs.frozen(kw_only=True)
class Metric:
    """A number that a scenario gives.

    Attributes:
        title: The name with its unit.
        short: The name in a column beside the metric that it belongs to.
        better: Which direction is better; None = neither, the metric only explains.
        digits: Decimal places.
    """

    title: str
    short: str = ""
    better: Literal["lower", "higher"] | None = "lower"
    digits: int = 2


METRICS: Mapping[str, Metric] = {
    "latency_p50_ms": Metric(title="latency p50, ms"),
    "latency_p90_ms": Metric(title="latency p90, ms", short="p90, ms"),
    "latency_p99_ms": Metric(title="latency p99, ms", short="p99, ms"),
    "added_p50_ms": Metric(title="added p50, ms"),
    "added_p90_ms": Metric(title="added p90, ms", short="p90, ms"),
    "added_p99_ms": Metric(title="added p99, ms", short="p99, ms"),
    "first_p50_ms": Metric(title="first token p50, ms"),
    "first_p90_ms": Metric(title="first token p90, ms", short="p90, ms"),
    "first_p99_ms": Metric(title="first token p99, ms", short="p99, ms"),
    "requests_per_s": Metric(title="requests/s", better="higher", digits=0),
    "cpu_us_per_request": Metric(title="CPU, µs/request", digits=0),
    "events_per_s": Metric(title="events/s", better="higher", digits=0),
    "of_offered_percent": Metric(title="of offered, %", better="higher", digits=1),
    "cpu_us_per_event": Metric(title="CPU, µs/event", digits=1),
    "delay_p50_ms": Metric(title="event delay p50, ms"),
    "delay_p99_ms": Metric(title="event delay p99, ms", short="p99, ms"),
    "streams_held": Metric(title="streams held", better="higher", digits=0),
    "resident_mib": Metric(title="memory, MiB", digits=1),
    "idle_mib": Metric(title="idle, MiB", digits=1),
    "kib_per_stream": Metric(title="KiB/stream", digits=1),
    "close_p50_ms": Metric(title="close p50, ms"),
    "close_p99_ms": Metric(title="close p99, ms", short="p99, ms"),
    "close_max_ms": Metric(title="close max, ms", short="max, ms"),
    "not_closed": Metric(title="not closed", digits=0),
    "probe_max_ms": Metric(title="health meanwhile, ms", digits=0),
    "recovery_ms": Metric(title="recovery, ms", digits=0),
    "upstream_late_ms": Metric(title="mock late, ms", better=None),
}


@attrs.frozen(kw_only=True)
class Scale:
    """The size of a run.

    Attributes:
        window_s: The length of one measurement.
        rounds: Rounds over all gateways.
        rate: Calls per second of the open loads. Every gateway must be able to serve it, or its latency is that of a
            queue.
    """

    window_s: float
    rounds: int
    rate: float
    first_token_concurrency: tuple[int, ...]
    stream_counts: tuple[int, ...]
    idle_counts: tuple[int, ...]


QUICK = Scale(
    window_s=1.2,
    rounds=2,
    rate=100,
    first_token_concurrency=(1, 16, 64),
    stream_counts=(64, 1000),
    idle_counts=(500, 1000),
)
FULL = Scale(
    window_s=4,
    rounds=5,
    rate=100,
    first_token_concurrency=(1, 4, 16, 64, 256),
    stream_counts=(16, 64, 256, 1000, 2000, 4000),
    idle_counts=(500, 1000, 2000, 5000),
)


@attrs.frozen(kw_only=True)
class Ceiling:
    """The maximum of the load generator and the mock upstream without a gateway between them."""

    requests_per_s: float
    events_per_s: float


@attrs.define(kw_only=True)
class Tools:
    """The tools of a scenario."""

    upstream: Upstream
    generator: Generator
    scale: Scale
    ceiling: Ceiling | None = None
    idle_bytes: dict[str, int] = attrs.Factory(dict)
    """The memory of each gateway after its start and one call."""


@attrs.define(kw_only=True)
class Outcome:
    """The result of one measurement.

    Attributes:
        values: By the names in `METRICS`; None where it cannot be measured here.
        histograms: In microseconds.
        limited: Why the tool and not the gateway may limit the number; empty if it does not.
    """

    values: dict[str, float | None] = attrs.Factory(dict)
    histograms: dict[str, Histogram] = attrs.Factory(dict)
    errors: dict[str, int] = attrs.Factory(dict)
    error: str = ""
    limited: str = ""


@attrs.frozen(kw_only=True)
class Scenario:
    """One kind of load.

    Attributes:
        shows: Metrics, in the order of the columns of its table.
        direct: The mock upstream is measured too, in the same rounds, and the difference is the gateway's share.
        rounds: As many as the run has, or fewer where a second one would not find a fresh gateway.
        sweep: The scenarios of a sweep share a table and a figure; they differ in ``x``, which has the name
            ``x_title``.
    """

    name: str
    title: str
    does: str
    shows: tuple[str, ...]
    run: Callable[[Tools, Gateway], Awaitable[Outcome]]
    streams: bool = True
    direct: bool = False
    rounds: int | None = None
    sweep: str = ""
    x: int = 0
    x_title: str = ""


def body(gateway: Gateway, says: str, *, stream: bool) -> str:
    """The body of a call, as a client would send it."""
    call: dict[str, object] = {
        "model": gateway.model,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant. Answer briefly and to the point."},
            {"role": "user", "content": says},
        ],
        "temperature": 0.7,
    }
    if stream:
        call["stream"] = True
    return json.dumps(call)


def _job(gateway: Gateway, *, says: str, kind: Literal["closed", "open", "hold"], stream: bool = False) -> Job:
    return Job(
        kind=kind,
        port=gateway.port,
        path=gateway.path,
        headers=gateway.headers,
        body=body(gateway, says, stream=stream),
        stream=stream,
    )


# -- one measurement --------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class _Measured:
    report: Report
    cpu_s: float | None
    resident_bytes: int | None
    late_ms: float
    limited: str


async def _measure(tools: Tools, gateway: Gateway, job: Job) -> _Measured:
    """Runs a job and reads the gateway's CPU time at both ends of its window."""
    await _settle(tools)
    await tools.upstream.statistics(reset=True)
    begin = time.monotonic() + 0.05
    busy = await tools.generator.start(attrs.evolve(job, begin_ns=int(begin * 1e9)))
    await _sleep_until(begin + job.warmup_s)
    before_s = gateway.cpu_s()
    mock_before_s = (await tools.upstream.statistics())["cpu_s"]
    await _sleep_until(begin + job.warmup_s + job.window_s)
    after_s = gateway.cpu_s()
    resident_bytes = gateway.resident_bytes() if job.stream else None
    statistics = await tools.upstream.statistics()
    report = await tools.generator.report(busy)
    late_ms = statistics["late_mean_us"] / 1000
    mock_busy = (statistics["cpu_s"] - mock_before_s) / job.window_s
    limited = ""
    if report.busy > NEAR:
        limited = f"the load generator used {report.busy:.0%} of a core"
    elif mock_busy > NEAR * len(tools.upstream.processes):
        limited = f"the mock upstream used {mock_busy:.0%} of a core"
    return _Measured(
        report=report,
        cpu_s=None if before_s is None or after_s is None else after_s - before_s,
        resident_bytes=resident_bytes,
        late_ms=late_ms,
        limited=limited,
    )


async def _settle(tools: Tools) -> None:
    """Waits until the streams of the last measurement have ended."""
    await tools.upstream.wait_active(0, at_most_s=5)
    await trio.sleep(0.15)


async def _sleep_until(monotonic_s: float) -> None:
    await trio.sleep(max(0.0, monotonic_s - time.monotonic()))


def _outcome(measured: _Measured, values: dict[str, float | None], **histograms: Histogram) -> Outcome:
    return Outcome(
        values={**values, "upstream_late_ms": measured.late_ms},
        histograms=histograms,
        errors=measured.report.errors,
        error=measured.report.error,
        limited=measured.limited,
    )


def _percentiles(prefix: str, histogram: Histogram, *percents: int) -> dict[str, float | None]:
    if not histogram.count:
        return {f"{prefix}_p{percent}_ms": None for percent in percents}
    return {f"{prefix}_p{percent}_ms": histogram.percentile(percent) / 1000 for percent in percents}


def _each_us(cpu_s: float | None, count: int) -> float | None:
    return None if cpu_s is None or not count else cpu_s * 1e6 / count


# -- plain calls ------------------------------------------------------------------------------------------------------


async def _latency(tools: Tools, gateway: Gateway) -> Outcome:
    scale = tools.scale
    job = attrs.evolve(
        _job(gateway, says=directive(content_bytes=200), kind="open"),
        connections=256,
        rate=scale.rate,
        poisson=True,
        warmup_s=0.5,
        window_s=scale.window_s,
    )
    measured = await _measure(tools, gateway, job)
    latency = measured.report.latency
    return _outcome(measured, _percentiles("latency", latency, 50, 90, 99), latency=latency)


async def _requests(tools: Tools, gateway: Gateway) -> Outcome:
    job = attrs.evolve(
        _job(gateway, says=directive(content_bytes=200), kind="closed"),
        connections=16,
        warmup_s=0.5,
        window_s=tools.scale.window_s,
    )
    measured = await _measure(tools, gateway, job)
    report = measured.report
    per_s = report.calls / job.window_s
    outcome = _outcome(
        measured,
        {
            "requests_per_s": per_s,
            "cpu_us_per_request": _each_us(measured.cpu_s, report.calls),
            **_percentiles("latency", report.latency, 50, 99),
        },
        latency=report.latency,
    )
    ceiling = tools.ceiling
    if ceiling is not None and per_s > NEAR * ceiling.requests_per_s:
        outcome.limited = f"the tool's ceiling is {ceiling.requests_per_s:,.0f} requests/s"
    return outcome


async def _burst(tools: Tools, gateway: Gateway) -> Outcome:
    """Even arrivals, with a burst of several hundred calls among them."""
    scale = tools.scale
    burst_at_s, calls = 1.0, int(4 * scale.rate)
    job = attrs.evolve(
        _job(gateway, says=directive(content_bytes=200), kind="open"),
        connections=calls + 64,
        rate=scale.rate,
        window_s=max(4.0, scale.window_s + 2),
        burst_at_s=burst_at_s,
        burst_calls=calls,
        keep_samples=True,
    )
    measured = await _measure(tools, gateway, job)
    report = measured.report
    # only the calls after the burst show how the gateway recovers
    burst_us = int(burst_at_s * 1e6)
    took_us = recovery(
        [sample for sample in report.samples if not burst_us <= sample[0] < burst_us + 1000],
        burst_at=burst_us,
        slice_width=50_000,
        slack=5_000,
    )
    return _outcome(
        measured,
        {
            "recovery_ms": None if took_us is None else took_us / 1000,
            **_percentiles("latency", report.latency, 50, 99),
        },
        latency=report.latency,
    )


# -- streams ----------------------------------------------------------------------------------------------------------


async def _first_token(tools: Tools, gateway: Gateway) -> Outcome:
    events = 5
    job = attrs.evolve(
        _job(gateway, says=directive(events=events, interval_ms=10, first_ms=20), kind="open", stream=True),
        events=events,
        first_ms=20,
        connections=256,
        rate=tools.scale.rate / 2,
        poisson=True,
        warmup_s=0.5,
        window_s=tools.scale.window_s,
    )
    measured = await _measure(tools, gateway, job)
    first = measured.report.first_content
    return _outcome(measured, _percentiles("first", first, 50, 90, 99), first_token=first)


def _first_token_among(clients: int) -> Callable[[Tools, Gateway], Awaitable[Outcome]]:
    async def run(tools: Tools, gateway: Gateway) -> Outcome:
        events, interval_ms, first_ms = 20, 20.0, 20.0
        job = attrs.evolve(
            _job(
                gateway,
                says=directive(events=events, interval_ms=interval_ms, first_ms=first_ms),
                kind="closed",
                stream=True,
            ),
            events=events,
            first_ms=first_ms,
            connections=clients,
            ramp_s=0.4,
            warmup_s=0.6,
            window_s=tools.scale.window_s,
            drain_s=2,
            sample_every=8,
        )
        measured = await _measure(tools, gateway, job)
        first = measured.report.first_content
        return _outcome(measured, _percentiles("first", first, 50, 99), first_token=first)

    return run


def _streams(count: int, *, events_per_s: float, events: int = 100) -> Callable[[Tools, Gateway], Awaitable[Outcome]]:
    async def run(tools: Tools, gateway: Gateway) -> Outcome:
        interval_ms = 1000 / events_per_s
        # the starts are spread over the length of a stream, so that as many begin as end in each second
        ramp_s = min(2.0, max(0.2, events / events_per_s))
        job = attrs.evolve(
            _job(gateway, says=directive(events=events, interval_ms=interval_ms), kind="closed", stream=True),
            events=events,
            connections=count,
            ramp_s=ramp_s,
            warmup_s=ramp_s + 0.5,
            window_s=tools.scale.window_s,
            drain_s=0,
            sample_every=max(1, count // 32),
        )
        measured = await _measure(tools, gateway, job)
        report = measured.report
        per_s = report.events / job.window_s
        offered_per_s = count * events_per_s
        resident = measured.resident_bytes
        outcome = _outcome(
            measured,
            {
                "events_per_s": per_s,
                "of_offered_percent": 100 * per_s / offered_per_s,
                "cpu_us_per_event": _each_us(measured.cpu_s, report.events),
                **_percentiles("delay", report.delay, 50, 99),
                "resident_mib": None if resident is None else resident / 2**20,
            },
            delay=report.delay,
        )
        ceiling = tools.ceiling
        if ceiling is not None and per_s > NEAR * ceiling.events_per_s:
            outcome.limited = f"the tool's ceiling is {ceiling.events_per_s:,.0f} events/s"
        return outcome

    return run


def _hold(gateway: Gateway, count: int, *, interval_ms: float, time_s: float, close_over_s: float = 0) -> Job:
    says = directive(events=1_000_000, interval_ms=interval_ms).replace("}", " id=@ID@}")
    return attrs.evolve(
        _job(gateway, says=says, kind="hold", stream=True),
        events=1_000_000,
        connections=count,
        # even a slow gateway accepts a thousand in a second; the measurement comes after that
        ramp_s=count / 1000,
        window_s=time_s,
        close_over_s=close_over_s,
    )


def _idle(count: int) -> Callable[[Tools, Gateway], Awaitable[Outcome]]:
    async def run(tools: Tools, gateway: Gateway) -> Outcome:
        await _settle(tools)
        patience_s = 15 + count / 100
        job = _hold(gateway, count, interval_ms=1_000_000, time_s=patience_s)
        busy = await tools.generator.start(job)
        streams = await tools.generator.wait_steady(busy)
        await trio.sleep(0.5)
        resident = gateway.resident_bytes()
        report = await tools.generator.close_streams(busy)
        idle = tools.idle_bytes.get(gateway.name)
        values: dict[str, float | None] = {"streams_held": streams, "resident_mib": None, "idle_mib": None}
        if resident is not None and idle is not None:
            values |= {
                "resident_mib": resident / 2**20,
                "idle_mib": idle / 2**20,
                "kib_per_stream": (resident - idle) / 1024 / streams if streams else None,
            }
        return Outcome(values=values, errors=report.errors, error=report.error)

    return run


def _disconnect(count: int, *, over_s: float) -> Callable[[Tools, Gateway], Awaitable[Outcome]]:
    async def run(tools: Tools, gateway: Gateway) -> Outcome:
        await _settle(tools)
        await tools.upstream.statistics(reset=True)
        job = _hold(gateway, count, interval_ms=count, time_s=15 + count / 100, close_over_s=over_s)
        busy = await tools.generator.start(job)
        streams = await tools.generator.wait_steady(busy)
        probes: list[float] = []
        async with trio.open_nursery() as nursery:
            if gateway.ready:
                nursery.start_soon(_check_health, gateway, probes)
            await trio.sleep(0.3)
            probes.clear()
            report = await tools.generator.close_streams(busy)
            await tools.upstream.wait_active(0, at_most_s=5)
            await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
        seen = dict((await tools.upstream.statistics())["closes"])
        took = Histogram((seen[key] - at_ns) // 1000 for key, at_ns in report.closed_ns.items() if key in seen)
        return Outcome(
            values={
                **_percentiles("close", took, 50, 99),
                "close_max_ms": took.high / 1000 if took.count else None,
                "not_closed": len(report.closed_ns) - took.count,
                "streams_held": streams,
                "probe_max_ms": max(probes) if probes else None,
            },
            histograms={"close": took},
            errors=report.errors,
            error=report.error,
        )

    return run


async def _check_health(gateway: Gateway, took_ms: list[float]) -> None:
    """Calls the health check again and again."""
    async with httpx2.AsyncClient(timeout=10, trust_env=False, verify=False) as client:
        while True:
            began = time.monotonic()
            with contextlib.suppress(httpx2.HTTPError):  # the time until a failure counts too
                await client.get(f"http://127.0.0.1:{gateway.port}{gateway.ready}")
            took_ms.append((time.monotonic() - began) * 1000)
            await trio.sleep(0.005)


# -- all scenarios ----------------------------------------------------------------------------------------------------


def scenarios(scale: Scale) -> list[Scenario]:
    """All scenarios in the order of the run. Those that need a fresh gateway come first."""
    event_columns = (
        "events_per_s",
        "of_offered_percent",
        "cpu_us_per_event",
        "delay_p50_ms",
        "delay_p99_ms",
        "resident_mib",
    )
    return [
        *(
            Scenario(
                name=f"idle-{count}",
                title="Memory of idle streams",
                does="Streams that have had one event, and wait for the next; against the memory after the first call.",
                shows=("kib_per_stream", "resident_mib"),
                run=_idle(count),
                rounds=1,
                sweep="idle",
                x=count,
                x_title="streams",
            )
            for count in scale.idle_counts
        ),
        Scenario(
            name="latency",
            title="Added latency, plain calls",
            does=f"Poisson arrivals, {scale.rate:g} calls/s; latency from the moment a call was due.",
            shows=(
                "latency_p50_ms",
                "latency_p90_ms",
                "latency_p99_ms",
                "added_p50_ms",
                "added_p90_ms",
                "added_p99_ms",
            ),
            run=_latency,
            streams=False,
            direct=True,
        ),
        Scenario(
            name="first-token",
            title="Added time to the first token",
            does=f"Poisson arrivals, {scale.rate / 2:g} streams/s of 5 events, without the 20 ms before the first.",
            shows=("first_p50_ms", "first_p90_ms", "first_p99_ms", "added_p50_ms", "added_p90_ms", "added_p99_ms"),
            run=_first_token,
            direct=True,
        ),
        Scenario(
            name="requests",
            title="Plain calls, as many as it takes",
            does="Closed loop, 16 clients.",
            shows=("requests_per_s", "cpu_us_per_request", "latency_p50_ms", "latency_p99_ms"),
            run=_requests,
            streams=False,
        ),
        *(
            Scenario(
                name=f"streams-{count}",
                title=f"{count} streams × {rate} events/s",
                does=f"Closed loop, streams of 100 events; {count * rate:,} events/s offered.",
                shows=event_columns,
                run=_streams(count, events_per_s=rate),
            )
            for count, rate in ((500, 50), (64, 500), (4, 100))
        ),
        *(
            Scenario(
                name=f"first-token-among-{clients}",
                title="First token against concurrency",
                does="Closed loop, streams of 20 events 20 ms apart; the 20 ms before the first are taken off.",
                shows=("added_p50_ms", "added_p99_ms"),
                run=_first_token_among(clients),
                direct=True,
                sweep="first-token-among",
                x=clients,
                x_title="concurrent streams",
            )
            for clients in scale.first_token_concurrency
        ),
        *(
            Scenario(
                name=f"hold-{count}",
                title="Events/s against streams",
                does="Closed loop, 10 events/s from each stream, streams of 50 events.",
                shows=("events_per_s", "cpu_us_per_event", "delay_p99_ms"),
                run=_streams(count, events_per_s=10, events=50),
                sweep="hold",
                x=count,
                x_title="streams",
            )
            for count in scale.stream_counts
        ),
        Scenario(
            name="disconnect-100",
            title="Client gone → upstream closed, 100 streams one by one",
            does="100 streams of 10 events/s; their clients close one after another, over one second.",
            shows=("close_p50_ms", "close_p99_ms", "close_max_ms", "not_closed", "probe_max_ms", "streams_held"),
            run=_disconnect(100, over_s=1),
        ),
        Scenario(
            name="disconnect-1000",
            title="Client gone → upstream closed, 1 000 at once",
            does="1 000 streams of 1 event/s; all clients close at once.",
            shows=("close_p50_ms", "close_p99_ms", "close_max_ms", "not_closed", "probe_max_ms", "streams_held"),
            run=_disconnect(1000, over_s=0),
        ),
        Scenario(
            name="burst",
            title="Recovery after a burst",
            does=f"Even arrivals, {scale.rate:g} calls/s, and {4 * scale.rate:g} calls at once among them.",
            shows=("recovery_ms", "latency_p50_ms", "latency_p99_ms"),
            run=_burst,
            streams=False,
        ),
    ]


def add_over_direct(outcome: Outcome, direct: Outcome) -> None:
    """Records what a gateway adds to the mock upstream's own time, percentile by percentile.

    >>> slow, base = Outcome(values={"first_p50_ms": 25.0}), Outcome(values={"first_p50_ms": 21.0})
    >>> add_over_direct(slow, base)
    >>> slow.values["added_p50_ms"]
    4.0
    """
    for percent in (50, 90, 99):
        for prefix in ("latency", "first"):
            mine = outcome.values.get(f"{prefix}_p{percent}_ms")
            base = direct.values.get(f"{prefix}_p{percent}_ms")
            if mine is not None and base is not None:
                outcome.values[f"added_p{percent}_ms"] = mine - base


async def measure_ceiling(tools: Tools, direct: Gateway) -> Ceiling:
    """Measures the maximum of the tool itself."""
    window_s = min(2.0, tools.scale.window_s)
    plain = attrs.evolve(
        _job(direct, says=directive(content_bytes=200), kind="closed"), connections=16, warmup_s=0.3, window_s=window_s
    )
    requests = await _measure(tools, direct, plain)
    # as many connections as a gateway would have for 500 streams: with fewer, more events wait for each poll
    streams = attrs.evolve(
        _job(direct, says=directive(events=500, interval_ms=0), kind="closed", stream=True),
        events=500,
        connections=128,
        warmup_s=0.3,
        window_s=window_s,
        drain_s=0,
        sample_every=4,
    )
    events = await _measure(tools, direct, streams)
    return Ceiling(requests_per_s=requests.report.calls / window_s, events_per_s=events.report.events / window_s)
