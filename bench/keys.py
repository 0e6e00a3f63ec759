"""Measures what keys, limits, prices and budgets cost: ``./scripts/bench --keys``.

Four gateways are measured in turn, with plain calls of a few clients, so that they keep up and the result is CPU time:

- one without any of it;
- one whose calls have a key with requests and tokens per minute, exchanges in flight, and a budget for a month and one
  for a day, in a group with a budget, and a price;
- that one with a hundred thousand keys that were made at run time, of which the calls have one;
- one with all these limits of the key, the group, the model, the upstream, and everybody: 25 in all.

The ratios are those of one round, to the first one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import apsw
import attrs

from bench.gateways import Gateway, Peer, cpu_spent, open_gateway, peers
from bench.load import Job
from bench.process import Generator, Upstream, open_generator, open_upstream
from bench.upstream import directive
from trigate.store.sqlite import open_sqlite_store

CALLERS = 4
VIRTUAL_KEYS = 100_000
SECRET = "a key of the bench"

_PLAIN = """
[upstreams.mock]
kind = "openai"
base_url = "{upstream}/v1"
models = ["mock-model"]
max_connections = 20000
%s
[models.default]
targets = ["mock/mock-model"]
%s
"""
# far above what the bench does: a limit that is never reached costs what one costs
_LIMITS = """
rpm = 100_000_000
tpm = 1_000_000_000_000
max_exchanges = 10_000
budget_usd = 1_000_000
budgets = { day = 100_000 }
"""
_PRICE = """
[prices."mock/mock-model"]
input_usd = 1
output_usd = 4
"""
_KEY = f"""
[groups.team]
budget_usd = 1_000_000
[keys.bench]
secret = "{SECRET}"
group = "team"
models = ["mock/*", "default"]
{_LIMITS}
"""
_EVERYWHERE = _KEY.replace("budget_usd = 1_000_000\n[keys", f"{_LIMITS}\n[keys") + f"[allowance]\n{_LIMITS}"
_ADMIN = """
[admin]
key = "the admin of the bench"
"""
OFF, ON, MANY, ALL = "off", "on", f"on, {VIRTUAL_KEYS:,} keys", "every limit everywhere"
CONFIGURATIONS: Mapping[str, str] = {
    OFF: _PLAIN % ("", ""),
    ON: _PLAIN % ("", _PRICE + _KEY),
    MANY: _PLAIN % ("", _PRICE + _KEY + _ADMIN),
    ALL: _PLAIN % (_LIMITS, _LIMITS + _PRICE + _EVERYWHERE),
}
SECRETS: Mapping[str, str] = {ON: SECRET, MANY: f"{SECRET} {VIRTUAL_KEYS - 1}", ALL: SECRET}
_SETTINGS = {
    "group": "team",
    "models": ["mock/*", "default"],
    "rpm": 10**8,
    "tpm": 10**12,
    "max_exchanges": 10_000,
    "budget_usd": 10**6,
    "budgets": {"day": 10**5},
}


@attrs.define(kw_only=True)
class Measured:
    """The rounds of one gateway: CPU time of a plain call, in microseconds.

    Attributes:
        start_s: From its start to its first answer.
        resident_mib: Its memory after the last round.
    """

    name: str
    start_s: float
    rounds: list[float] = attrs.field(factory=list)
    resident_mib: float = 0


def _peer(name: str) -> Peer:
    headers = {"authorization": f"Bearer {SECRETS[name]}"} if name in SECRETS else {}
    return attrs.evolve(peers()["trigate"], title=name, files={"trigate.toml": CONFIGURATIONS[name]}, headers=headers)


async def make_keys(path: Path, many: int) -> None:
    """Writes keys into a store, as `POST /v1/keys` makes them; their secrets are `SECRET` with a number."""
    async with open_sqlite_store(path) as store:
        await store.check()  # makes the file
    settings = json.dumps(_SETTINGS).encode()
    rows = (
        (f"key_{number}", f"n{number}", number + 1, hashlib.sha256(f"{SECRET} {number}".encode()).digest(), settings)
        for number in range(many)
    )
    with contextlib.closing(apsw.Connection(str(path))) as database, database:
        database.executemany(
            "INSERT INTO keys (id, name, version, digest, shown, settings, created_at, old_digest, old_until)"
            " VALUES (?, ?, ?, ?, '', ?, 0.0, x'', 0.0)",
            rows,
        )


async def _call_us(upstream: Upstream, generator: Generator, gateway: Gateway, window_s: float) -> float:
    call = {
        "model": gateway.model,
        "max_tokens": 1000,
        "messages": [{"role": "user", "content": directive(content_bytes=200)}],
    }
    job = Job(
        kind="closed",
        port=gateway.port,
        path=gateway.path,
        headers=gateway.headers,
        body=json.dumps(call),
        connections=CALLERS,
        window_s=window_s,
    )
    spent_s, report = await cpu_spent(upstream, generator, gateway, job)
    return spent_s * 1e6 / report.latency.count


async def run(*, rounds: int, window_s: float) -> list[Measured]:
    """Measures the gateways in turn."""
    found: list[Measured] = []
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(open_upstream(processes=1))
        generator = await stack.enter_async_context(open_generator(processes=1))
        running: list[tuple[Measured, Gateway]] = []
        for name in CONFIGURATIONS:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if name == MANY:
                await make_keys(directory / "trigate.db", VIRTUAL_KEYS)
            gateway = await stack.enter_async_context(
                open_gateway(_peer(name), upstream_port=upstream.port, directory=directory, watch=True)
            )
            assert gateway.start_s is not None
            running.append((Measured(name=name, start_s=gateway.start_s), gateway))
            await _call_us(upstream, generator, gateway, 0.5)  # what a gateway does once does not count
        for _ in range(rounds):
            for measured, gateway in running:
                measured.rounds.append(await _call_us(upstream, generator, gateway, window_s))
        for measured, gateway in running:
            measured.resident_mib = (gateway.resident_bytes() or 0) / 2**20
            found.append(measured)
    return found


def lines(found: list[Measured]) -> list[str]:
    """The readable result: medians, and ratios by round."""
    off = found[0]
    made = [f"{'keys, limits, prices, budgets':<32} {'µs/call':>8} {'ratio':>20} {'start, s':>9} {'MiB':>6}"]
    for each in found:
        ratios = [ours / theirs for ours, theirs in zip(each.rounds, off.rounds, strict=True)]
        ratio = "" if each is off else f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        call_us = statistics.median(each.rounds)
        made.append(f"{each.name:<32} {call_us:>8.0f} {ratio:>20} {each.start_s:>9.2f} {each.resident_mib:>6.1f}")
    return made
