"""Measures the admitted calls under overload: ``./scripts/bench --overload``.

The gateway has slots for 64 calls and a queue for 16, and the mock upstream takes 200 ms for each call, so the capacity
is 320 calls a second. The load is first a quarter of that, then three times as much, at random moments (Poisson), in
turns. The result gives the latency of the admitted calls beside the latency without overload, how soon the others were
refused, and whether as many calls were served as the capacity allows.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

import attrs

from bench.gateways import Gateway, open_gateway, peers
from bench.load import Job, Report
from bench.process import HAS_PROC, Generator, open_generator, open_upstream
from bench.upstream import directive

PLACES = 64
QUEUED = 16
ANSWER_MS = 200
SERVED_PER_S = PLACES * 1000 / ANSWER_MS
LIGHT, HEAVY = 0.25, 3.0


@attrs.frozen(kw_only=True)
class Round:
    """The result of one round."""

    light_p50_ms: float
    light_p99_ms: float
    heavy_p50_ms: float
    heavy_p99_ms: float
    refused_p50_ms: float
    refused_p99_ms: float
    refused_share: float
    served_share: float
    """The load as a share of the capacity."""


async def _load(gateway: Gateway, generator: Generator, *, share: float, window_s: float, seed: int) -> Report:
    call = {
        "model": gateway.model,
        "messages": [{"role": "user", "content": directive(answer_ms=ANSWER_MS)}],
    }
    job = Job(
        kind="open",
        port=gateway.port,
        path=gateway.path,
        headers=gateway.headers,
        body=json.dumps(call),
        refusals=(429, 503),
        connections=1000,
        rate=SERVED_PER_S * share,
        poisson=True,
        seed=seed,
        warmup_s=1.0,
        window_s=window_s,
    )
    report = await generator.report(await generator.start(job))
    if report.errors:
        raise RuntimeError(f"{report.errors}: {report.error}")
    return report


async def run(*, rounds: int, window_s: float) -> list[Round]:
    """Measures both loads in turns."""
    configuration = f"""
[limits]
max_exchanges = {PLACES}
max_queued = {QUEUED}
[upstreams.mock]
kind = "openai"
base_url = "{{upstream}}/v1"
models = ["mock-model"]
[models.default]
targets = ["mock/mock-model"]
"""
    peer = attrs.evolve(peers()["trigate"], files={"trigate.toml": configuration})
    found = []
    with tempfile.TemporaryDirectory() as directory:
        async with (
            open_upstream(processes=1) as upstream,
            open_generator(processes=1) as generator,
            open_gateway(peer, upstream_port=upstream.port, directory=Path(directory), watch=HAS_PROC) as gateway,
        ):
            for number in range(rounds):
                light = await _load(gateway, generator, share=LIGHT, window_s=window_s, seed=2 * number)
                heavy = await _load(gateway, generator, share=HEAVY, window_s=window_s, seed=2 * number + 1)
                if light.refused.count:
                    raise RuntimeError(f"{light.refused.count} calls were refused without overload")
                asked = heavy.latency.count + heavy.refused.count
                found.append(
                    Round(
                        light_p50_ms=light.latency.percentile(50) / 1000,
                        light_p99_ms=light.latency.percentile(99) / 1000,
                        heavy_p50_ms=heavy.latency.percentile(50) / 1000,
                        heavy_p99_ms=heavy.latency.percentile(99) / 1000,
                        refused_p50_ms=heavy.refused.percentile(50) / 1000,
                        refused_p99_ms=heavy.refused.percentile(99) / 1000,
                        refused_share=heavy.refused.count / asked,
                        served_share=heavy.calls / window_s / SERVED_PER_S,
                    )
                )
    return found


def lines(rounds: list[Round]) -> list[str]:
    """The readable result: medians, and the ratios by round."""

    def median(name: str) -> float:
        return statistics.median([float(getattr(each, name)) for each in rounds])

    ratios = [each.heavy_p99_ms / each.light_p99_ms for each in rounds]
    return [
        f"without overload: p50 {median('light_p50_ms'):.1f} ms, p99 {median('light_p99_ms'):.1f} ms",
        f"{HEAVY:g} times the capacity, admitted: p50 {median('heavy_p50_ms'):.1f} ms, "
        f"p99 {median('heavy_p99_ms'):.1f} ms; "
        f"p99 ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"refused ({median('refused_share'):.0%}): p50 {median('refused_p50_ms'):.1f} ms, "
        f"p99 {median('refused_p99_ms'):.1f} ms",
        f"served: {median('served_share'):.0%} of the capacity",
    ]
