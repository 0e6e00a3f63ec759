"""Measures what a durable acknowledgement costs: ``./scripts/bench --hooks``.

64 senders call a webhook with ``Prefer: respond-async``, each again as soon as it has its 202. The 202 is sent after
the run is on the disk. Meanwhile the runs are executed, up to a hook's default limit at a time, and the mock upstream
takes a second for each, as a model would. In turn the bench measures what the same disk gives to a program that does
nothing else: rows of the same size, written by SQLite with one commit each, and with 64 to a commit. The database is in
the current directory, since the directory for temporary files may be in memory.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import apsw
import attrs
import trio

from bench.gateways import Gateway, open_gateway, peers
from bench.load import Job
from bench.process import HAS_PROC, Generator, open_generator, open_upstream
from bench.upstream import directive

SENDERS = 64
_ROW_BYTES = 400  # about the size of a stored run


@attrs.frozen(kw_only=True)
class Round:
    """The result of one round, per second."""

    acknowledged_per_s: float
    p50_ms: float
    p99_ms: float
    grouped_rows_per_s: float
    single_commits_per_s: float


def raw_rows_per_s(path: Path, *, rows_per_commit: int, window_s: float) -> float:
    """Writes rows with SQLite alone, each commit on the disk before the next, and returns the rows per second."""
    connection = apsw.Connection(os.fspath(path))
    try:
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", "full")
        connection.execute("CREATE TABLE IF NOT EXISTS row(id TEXT PRIMARY KEY, body BLOB)")
        body = bytes(_ROW_BYTES)
        began = time.monotonic()
        rows = 0
        while time.monotonic() - began < window_s:
            with connection:
                for _ in range(rows_per_commit):
                    rows += 1
                    connection.execute("INSERT INTO row VALUES (hex(randomblob(12)), ?)", (body,))
        return rows / (time.monotonic() - began)
    finally:
        connection.close()


async def _acknowledgements(gateway: Gateway, generator: Generator, window_s: float) -> tuple[float, float, float]:
    job = Job(
        kind="closed",
        port=gateway.port,
        path="/hooks/bench",
        headers={"prefer": "respond-async"},
        body=json.dumps({"text": directive(events=20, interval_ms=50), "from": "bench", "action": "chat"}),
        status=202,
        connections=SENDERS,
        warmup_s=0.3,
        window_s=window_s,
    )
    report = await generator.report(await generator.start(job))
    if report.errors:
        raise RuntimeError(f"{report.errors}: {report.error}")
    latency = report.latency
    return report.calls / window_s, latency.percentile(50) / 1000, latency.percentile(99) / 1000


async def run(*, rounds: int, window_s: float) -> list[Round]:
    """Measures both in turns."""
    configuration = """
[store]
path = "trigate.db"
[upstreams.mock]
kind = "openai"
base_url = "{upstream}/v1"
models = ["mock-model"]
[models.default]
targets = ["mock/mock-model"]
[hooks.bench]
session = "none"
rate_per_s = 0
queue = 1000000
"""
    peer = attrs.evolve(peers()["trigate"], files={"trigate.toml": configuration})
    found = []
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as directory:
        base = Path(directory)
        async with (
            open_upstream(processes=1) as upstream,
            open_generator(processes=1) as generator,
        ):
            for number in range(rounds):
                # a new gateway in each round: the previous one is still executing its acknowledged runs
                (base / str(number)).mkdir()
                async with open_gateway(
                    peer, upstream_port=upstream.port, directory=base / str(number), watch=HAS_PROC
                ) as gateway:
                    per_s, p50_ms, p99_ms = await _acknowledgements(gateway, generator, window_s)
                raw = base / f"raw-{number}.db"
                found.append(
                    Round(
                        acknowledged_per_s=per_s,
                        p50_ms=p50_ms,
                        p99_ms=p99_ms,
                        grouped_rows_per_s=raw_rows_per_s(raw, rows_per_commit=SENDERS, window_s=window_s / 2),
                        single_commits_per_s=raw_rows_per_s(raw, rows_per_commit=1, window_s=window_s / 2),
                    )
                )
                await trio.lowlevel.checkpoint()
    return found


def lines(rounds: list[Round]) -> list[str]:
    """The readable result: medians, and the ratios by round."""

    def median(name: str) -> float:
        return statistics.median([float(getattr(each, name)) for each in rounds])

    grouped = statistics.median(each.acknowledged_per_s / each.grouped_rows_per_s for each in rounds)
    single = statistics.median(each.acknowledged_per_s / each.single_commits_per_s for each in rounds)
    return [
        f"durable acknowledgements, {SENDERS} senders: {median('acknowledged_per_s'):,.0f}/s "
        f"(p50 {median('p50_ms'):.1f} ms, p99 {median('p99_ms'):.1f} ms)",
        f"SQLite alone, {SENDERS} rows a commit: {median('grouped_rows_per_s'):,.0f} rows/s; ratio {grouped:.3f}",
        f"SQLite alone, one row a commit: {median('single_commits_per_s'):,.0f} rows/s; ratio {single:.2f}",
    ]
