"""One run: starts everything, measures the gateways in turn, and makes one result.

Taking turns makes a run on a shared machine meaningful. In each round every gateway is measured once, one right after
the other, every other round in reverse order. A ratio is taken between two measurements of one round, and the result
shows the median of the ratios. A minute in which the machine is slow is slow for all gateways.

Each measurement ends by itself, whatever the gateway does: the load generator's jobs are bounded in time.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import trio

from bench import scenarios as catalogue
from bench.gateways import DIRECT, Gateway, GatewayFailed, Peer, open_gateway, summary
from bench.machine import this_machine, usable_cores
from bench.process import HAS_PROC, open_generator, open_upstream
from bench.scenarios import METRICS, Outcome, Scale, Scenario, Tools, add_over_direct, measure_ceiling

SCHEMA = "trigate-bench/1"

Say = Callable[[str, int, int], None]
"""Called before each measurement with its name, the number done and the total."""


@attrs.frozen(kw_only=True)
class Settings:
    """The settings of a run.

    Attributes:
        only: Names of scenarios or sweeps, or their prefixes if there is no such name. Empty = all.
        running: A gateway that is already running; it is measured first.
        upstream_port: 0 = any.
    """

    scale: Scale
    peers: Sequence[Peer] = ()
    running: Sequence[Gateway] = ()
    only: Sequence[str] = ()
    upstream_port: int = 0
    tool_processes: int = 0

    def chosen(self) -> list[Scenario]:
        """The scenarios to run.

        Raises:
            ValueError: A name matches no scenario.
        """
        everything = catalogue.scenarios(self.scale)
        chosen = set()
        for name in self.only:
            found = {each.name for each in everything if name in (each.name, each.sweep)}
            found = found or {each.name for each in everything if each.name.startswith(name)}
            if not found:
                names = ", ".join(dict.fromkeys(each.sweep or each.name for each in everything))
                raise ValueError(f"no scenario is called {name!r}; there are: {names}")
            chosen |= found
        return [each for each in everything if each.name in chosen or not self.only]


def tool_processes() -> int:
    """How many processes the load generator and the mock upstream get each, so that the gateway keeps a core."""
    return max(1, min(4, (usable_cores() - 1) // 3))


async def run(settings: Settings, say: Say, wait_for_gateway: Callable[[int], Any] | None = None) -> dict[str, Any]:
    """Runs the bench and returns the result as JSON; ``docs/explanation/performance.md`` describes it.

    Args:
        wait_for_gateway: Called with the mock upstream's port before the first measurement, where a running gateway
            must be configured for it.
    """
    chosen = settings.chosen()
    notes = [] if HAS_PROC else ["This system has no /proc: CPU time and memory were not measured."]
    processes = settings.tool_processes or tool_processes()
    if usable_cores() < 3:
        notes.append(
            "Fewer than three cores: the gateway, the mock upstream and the load generator share them, and requests/s "
            "and events/s at full load are what is left to the gateway. Where events wait for a core they then travel "
            "together, which makes each cheaper: compare gateways by the ratios of one run."
        )
    began = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    machine = this_machine()
    async with contextlib.AsyncExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trigate-bench-")))
        upstream = await stack.enter_async_context(open_upstream(processes=processes, port=settings.upstream_port))
        generator = await stack.enter_async_context(open_generator(processes=processes))
        tools = Tools(upstream=upstream, generator=generator, scale=settings.scale)
        direct = Gateway(name=DIRECT, title="direct", port=upstream.port, model="mock-model", ready="")
        if wait_for_gateway is not None:
            await trio.to_thread.run_sync(wait_for_gateway, upstream.port)
        gateways = list(settings.running)
        for peer in settings.peers:
            say(f"starting {peer.title}", 0, 1)
            (base / peer.name).mkdir()
            try:
                gateways.append(
                    await stack.enter_async_context(
                        open_gateway(peer, upstream_port=upstream.port, directory=base / peer.name, watch=HAS_PROC)
                    )
                )
            except GatewayFailed as error:
                notes.append(str(error))
        await trio.sleep(0.5)
        for gateway in gateways:
            resident = gateway.resident_bytes()
            if resident is not None:
                tools.idle_bytes[gateway.name] = resident
        say("measuring the maximum of the tool itself", 0, 1)
        tools.ceiling = await measure_ceiling(tools, direct)
        measured = await _measure_all(tools, chosen, gateways, direct, say)
    return {
        "schema": SCHEMA,
        "began": began.isoformat(),
        "machine": attrs.asdict(machine),
        "settings": {**attrs.asdict(settings.scale), "tool_processes": processes, "only": list(settings.only)},
        "tool": attrs.asdict(tools.ceiling),
        "notes": notes,
        "gateways": {gateway.name: _gateway(gateway, tools) for gateway in [*gateways, direct]},
        "metrics": {name: attrs.asdict(metric) for name, metric in METRICS.items()},
        "scenarios": measured,
    }


def _gateway(gateway: Gateway, tools: Tools) -> dict[str, Any]:
    resident = tools.idle_bytes.get(gateway.name)
    return {**summary(gateway), "idle_mib": None if resident is None else round(resident / 2**20, 1)}


async def _measure_all(
    tools: Tools, chosen: Sequence[Scenario], gateways: Sequence[Gateway], direct: Gateway, say: Say
) -> dict[str, Any]:
    plan = [
        (scenario, round_number, gateway)
        for scenario in chosen
        for round_number in range(scenario.rounds or tools.scale.rounds)
        for gateway in _turns(scenario, gateways, direct, round_number)
    ]
    outcomes: dict[tuple[str, int, str], Outcome] = {}
    for done, (scenario, round_number, gateway) in enumerate(plan):
        say(f"{scenario.name} · round {round_number + 1} · {gateway.title}", done, len(plan))
        outcomes[scenario.name, round_number, gateway.name] = await scenario.run(tools, gateway)
    result = {}
    for scenario in chosen:
        rounds: dict[str, list[Any]] = {}
        for (name, round_number, gateway_name), outcome in outcomes.items():
            if name == scenario.name:
                base = outcomes.get((name, round_number, DIRECT))
                if base is not None and gateway_name != DIRECT:
                    add_over_direct(outcome, base)
                rounds.setdefault(gateway_name, []).append(_outcome(outcome))
        result[scenario.name] = {
            "title": scenario.title,
            "does": scenario.does,
            "shows": list(scenario.shows),
            "sweep": scenario.sweep,
            "x": scenario.x,
            "x_title": scenario.x_title,
            "rounds": rounds,
        }
    return result


def _turns(scenario: Scenario, gateways: Sequence[Gateway], direct: Gateway, round_number: int) -> list[Gateway]:
    taking_part = [gateway for gateway in gateways if gateway.streams or not scenario.streams]
    if scenario.direct:
        taking_part.append(direct)
    return taking_part[::-1] if round_number % 2 else taking_part


def _outcome(outcome: Outcome) -> Mapping[str, Any]:
    return {
        "values": {
            name: None if value is None or math.isnan(value) else round(value, 4)
            for name, value in outcome.values.items()
        },
        "histograms": {name: histogram.to_json() for name, histogram in outcome.histograms.items()},
        "errors": outcome.errors,
        "error": outcome.error,
        "limited": outcome.limited,
    }
