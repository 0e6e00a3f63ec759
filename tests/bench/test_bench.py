"""The bench: its statistics, the peers' files, its two tools over real sockets, and a short complete run."""

from __future__ import annotations

import doctest
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import cattrs
import pytest
import trio

import bench
from bench import gateways, keys, load, overload, scenarios, session
from bench.distribution import Histogram, Spread, pair_ratios, recovery
from bench.gateways import Gateway, GatewayFailed
from bench.load import Job, arrivals, share
from bench.process import HAS_PROC, open_generator, open_upstream
from bench.scenarios import QUICK
from bench.upstream import directive
from tests.support.slow import FULL

ROOT = Path(__file__).parents[2]
BENCH_PYTHON = Path(os.environ.get("TRIGATE_BENCH_PYTHON") or ROOT / ".venv-bench/bin/python")
PURE = ("distribution", "gateways", "load", "report", "scenarios", "upstream")


# -- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PURE)
def test_examples(name: str) -> None:
    """The examples in the docstrings hold."""
    module: ModuleType = importlib.import_module(f"bench.{name}")
    assert doctest.testmod(module).failed == 0


def test_a_percentile_is_within_a_bucket_of_the_value() -> None:
    """No percentile is off by more than a bucket's width, 1/64 of the value."""
    values = [int(1.01**step) for step in range(1, 1500)]
    histogram = Histogram(values)
    for percent in (1, 25, 50, 90, 99, 99.9):
        true = values[math.ceil(len(values) * percent / 100) - 1]
        assert histogram.percentile(percent) == pytest.approx(true, rel=1 / 64, abs=1)
    assert histogram.percentile(100) == pytest.approx(values[-1], rel=1 / 64)


def test_merged_histograms_equal_the_histogram_of_all_values() -> None:
    """The merged counts of several processes equal those of one."""
    whole, left, right = Histogram(range(5000)), Histogram(range(0, 5000, 2)), Histogram(range(1, 5000, 2))
    left.merge(right)
    left.merge(Histogram())
    assert left.to_json() == whole.to_json()
    assert Histogram.from_json(json.loads(json.dumps(left.to_json()))).to_json() == whole.to_json()


def test_without_values_there_is_no_number() -> None:
    """An empty histogram has no percentile, and rounds without a value have no spread."""
    assert math.isnan(Histogram().percentile(50))
    assert Spread.of([None, math.nan]) is None
    assert pair_ratios([1.0], [0.0]) is None


def test_a_ratio_is_taken_within_a_round() -> None:
    """A round in which everything is three times slower does not change the ratio."""
    assert pair_ratios([2.0, 6.0, 2.2], [1.0, 3.0, 1.1]) == Spread(2.0, 2.0, 2.0)


def test_recovery_that_did_not_happen() -> None:
    """Calls that stay slow have no recovery time. Without an effect of the burst it is 0."""
    calm = [(at, 10) for at in range(0, 1000, 10)]
    assert recovery([*calm, *((at, 99) for at in range(1000, 2000, 10))], burst_at=1000, slice_width=50) is None
    assert recovery([*calm, *((at, 11) for at in range(1000, 2000, 10))], burst_at=1000, slice_width=50) == 0


def test_poisson_arrivals_come_at_their_rate() -> None:
    """Random arrivals have the requested mean and are the same for the same seed."""
    job = Job(kind="open", port=1, body="", rate=1000, poisson=True, window_s=10)
    due = list(arrivals(job))
    assert due == list(arrivals(job))
    assert len(due) == pytest.approx(10_000, rel=0.05)
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert sum(gap < 1_000_000 for gap in gaps) / len(gaps) == pytest.approx(1 - math.exp(-1), abs=0.03)


def test_shares_add_up() -> None:
    """The parts of a job that is split among processes add up to the job, and evenly spaced arrivals interleave."""
    job = Job(kind="open", port=1, body="", connections=7, rate=100, window_s=1, burst_calls=5, burst_at_s=0.5)
    parts = share(job, 3)
    assert sum(part.connections for part in parts) == 7
    assert sum(part.burst_calls for part in parts) == 5
    due = sorted(part.begin_ns + at for part in parts for at in arrivals(part))
    assert len(due) == pytest.approx(105, abs=2)
    assert len(share(job, 99)) == 7


# -- the peers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(gateways.PEERS.glob("*.toml")), ids=lambda file: file.stem)
def test_a_peer_s_file(file: Path) -> None:
    """It can be read, has every field, and names no path of the machine on which it was written."""
    peer = gateways.read_peer(file)
    assert peer.name == file.stem
    assert "{port}" in " ".join((*peer.command, *peer.env.values()))
    assert peer.install
    assert not any(part.startswith("/") for part in peer.command)
    known = {"upstream", "upstream_port", "port", "port2", "config", "python", "peers"}
    values = dict.fromkeys(known, "x")
    filled = " ".join(gateways.fill(part, values) for part in (*peer.command, *peer.env.values()))
    assert "{" not in filled


def test_a_peer_s_file_with_a_mistake(tmp_path: Path) -> None:
    """An unknown key is an error."""
    file = tmp_path / "x.toml"
    file.write_text('title = "x"\ninstall = "x"\nprogram = "x"\ncommand = ["x"]\nmodle = "x"\n')
    with pytest.raises(cattrs.BaseValidationError):
        gateways.read_peer(file)


@pytest.mark.parametrize("url", ["http://example.org/v1", "https://127.0.0.1:1", "http://192.168.0.1:80"])
def test_only_this_machine_is_loaded(url: str) -> None:
    """The bench must not put load on other machines, and only this machine's clock times the events."""
    with pytest.raises(ValueError, match=r"127\.0\.0\.1"):
        gateways.running(url, model="m", path="/v1/chat/completions", headers={}, pid=None)


@pytest.mark.slow
async def test_a_gateway_that_does_not_start(tmp_path: Path) -> None:
    """The error contains the end of its output."""
    command = (sys.executable, "-c", "raise SystemExit('no licence {port}')")
    peer = gateways.Peer(title="Broken", install="-", program="{python}", command=command)
    with pytest.raises(GatewayFailed, match=r"Broken exited with 1:\nno licence \d+"):
        async with gateways.open_gateway(peer, upstream_port=1, directory=tmp_path, watch=False):
            pass


# -- the mock upstream and the load generator -------------------------------------------------------------------------


def _direct(port: int) -> Gateway:
    return Gateway(name="direct", title="direct", port=port, model="mock-model", ready="")


def _job(port: int, says: str, **changes: Any) -> Job:
    stream = changes.get("stream", False)
    body = scenarios.body(_direct(port), says, stream=stream)
    return attrs.evolve(Job(kind="closed", port=port, body=body, window_s=0.3), **changes)


@pytest.mark.slow
async def test_calls_are_counted_and_timed() -> None:
    """Plain calls and streams are counted and timed without errors, and the upstream counts the same number."""
    async with open_upstream(processes=1) as upstream, open_generator(processes=2) as generator:
        job = _job(upstream.port, directive(answer_ms=20), connections=4)
        report = await generator.report(await generator.start(job))
        assert report.errors == {}
        assert 20_000 <= report.latency.low <= report.latency.percentile(50) < 60_000
        assert report.calls <= 4 * 0.3 / 0.02
        assert report.connections == 4

        await upstream.statistics(reset=True)
        says = directive(events=7, interval_ms=5, first_ms=30)
        job = _job(upstream.port, says, connections=3, stream=True, events=7, first_ms=30)
        report = await generator.report(await generator.start(job))
        assert report.errors == {}
        assert report.calls >= 3
        assert report.events == pytest.approx(report.calls * 7, abs=3 * 7)
        assert report.delay.count == report.events
        assert 0 <= report.first_content.low < 30_000
        statistics = await upstream.statistics()
        assert statistics["streams"] == statistics["completed"]
        assert statistics["events"] == 7 * statistics["streams"]


@pytest.mark.slow
async def test_latency_counts_from_the_due_time() -> None:
    """With two connections and answers that take 100 ms, most of 40 calls a second wait, and their wait counts."""
    async with open_upstream(processes=1) as upstream, open_generator(processes=1) as generator:
        says = directive(answer_ms=100)
        job = _job(upstream.port, says, kind="open", rate=40, connections=2, window_s=0.5)
        report = await generator.report(await generator.start(job))
        assert report.connections == 2
        assert report.latency.count == 20
        assert report.latency.high > 400_000


@pytest.mark.slow
async def test_a_wrong_answer_is_an_error() -> None:
    """A stream of another length and a path with another answer count as errors, not as calls."""
    async with open_upstream(processes=1) as upstream, open_generator(processes=1) as generator:
        job = _job(upstream.port, directive(events=3), stream=True, events=4, window_s=0.05)
        report = await generator.report(await generator.start(job))
        assert set(report.errors) == {"fewer events than asked for"}
        assert (report.calls, report.latency.count) == (0, 0)
        job = _job(upstream.port, "", path="/v1/else", window_s=0.05)
        report = await generator.report(await generator.start(job))
        assert set(report.errors) == {"no choices"}
        assert report.calls == 0


@pytest.mark.slow
async def test_refusals_are_counted_separately() -> None:
    """They are neither errors nor calls, and the connection stays open."""
    async with open_upstream(processes=1) as upstream, open_generator(processes=1) as generator:
        job = _job(upstream.port, "", refusals=(200,), window_s=0.1, connections=2)
        report = await generator.report(await generator.start(job))
        assert (report.errors, report.calls, report.latency.count, report.connections) == ({}, 0, 0, 2)
        assert report.refused.count > 10


@pytest.mark.slow
async def test_overload() -> None:
    """At least two thirds are refused. The rest is served: at full size, on a quiet machine, about as much as the
    capacity."""
    [measured] = await overload.run(rounds=1, window_s=1.0)
    assert measured.refused_share > 0.5
    assert measured.served_share > (0.5 if FULL else 0.0)
    assert any("p99 ratio" in line for line in overload.lines([measured]))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PROC, reason="the CPU time of a process cannot be read here")
async def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateways serve, each with its keys, and the result has a line for each."""
    monkeypatch.setattr(keys, "VIRTUAL_KEYS", 100)
    monkeypatch.setattr(keys, "SECRETS", {**keys.SECRETS, keys.MANY: f"{keys.SECRET} 99"})
    found = await keys.run(rounds=1, window_s=0.3)
    assert [each.name for each in found] == list(keys.CONFIGURATIONS)
    assert all(each.rounds[0] > 0 for each in found)
    assert len(keys.lines(found)) == 5


@pytest.mark.slow
async def test_a_closed_stream_is_reported_by_its_number() -> None:
    """The generator reports when it closed each stream, and the upstream when it noticed that."""
    async with open_upstream(processes=1) as upstream, open_generator(processes=2) as generator:
        says = directive(events=1000, interval_ms=50).replace("}", " id=@ID@}")
        job = _job(upstream.port, says, kind="hold", connections=9, stream=True, events=1000, window_s=10)
        busy = await generator.start(job)
        assert await generator.wait_steady(busy) == 9
        assert (await upstream.statistics())["active"] == 9
        report = await generator.close_streams(busy)
        assert await upstream.wait_active(0, at_most_s=5)
        seen = dict((await upstream.statistics())["closes"])
        assert seen.keys() == report.closed_ns.keys()
        assert len(seen) == 9
        assert all(0 < seen[key] - report.closed_ns[key] < 1_000_000_000 for key in seen)


# -- a complete run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a short run with figures: Trigate and the "hello" app in a few scenarios."""
    if not BENCH_PYTHON.exists():
        pytest.skip("scripts/test makes .venv-bench")
    if not FULL:
        pytest.skip("takes a minute: TRIGATE_TEST_FULL=1 runs it")
    room = tmp_path_factory.mktemp("bench")
    only = ("latency", "first-token-among-1", "streams-4", "idle-500", "disconnect-100")
    command = [str(BENCH_PYTHON), "-m", "bench", "--quick", "--window", "0.6", "--rounds", "1", "--against", "hello"]
    command += ["--output", str(room), *(part for name in only for part in ("--only", name))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Trigate" in done.stdout
    (file,) = room.glob("*.json")
    return file


@pytest.mark.slow
def test_a_run(result_file: Path) -> None:
    """One command measures without errors and gives plausible numbers."""
    result = json.loads(result_file.read_text(encoding="utf-8"))
    assert result["schema"] == session.SCHEMA
    assert list(result["gateways"]) == ["trigate", "hello", "direct"]
    assert result["tool"]["events_per_s"] > result["tool"]["requests_per_s"] / 10 > 0
    for scenario in result["scenarios"].values():
        for rounds in scenario["rounds"].values():
            assert [outcome["errors"] for outcome in rounds] == [{}]
    assert set(result["scenarios"]["latency"]["rounds"]) == {"trigate", "hello", "direct"}
    assert "hello" not in result["scenarios"]["streams-4"]["rounds"]
    (events,) = result["scenarios"]["streams-4"]["rounds"]["trigate"]
    assert events["values"]["of_offered_percent"] == pytest.approx(100, abs=20)
    (gone,) = result["scenarios"]["disconnect-100"]["rounds"]["trigate"]
    assert gone["values"]["not_closed"] == 0
    (idle,) = result["scenarios"]["idle-500"]["rounds"]["trigate"]
    assert idle["values"]["streams_held"] == 500
    if HAS_PROC:
        assert events["values"]["cpu_us_per_event"] > 1
        assert 1 < idle["values"]["kib_per_stream"] < 1000


@pytest.mark.slow
def test_the_figures_of_a_run(result_file: Path) -> None:
    """Each figure exists as PNG and as SVG."""
    for name in ("latency", "first-token-among", "idle"):
        png = result_file.with_name(f"{result_file.stem}-{name}.png")
        assert png.read_bytes().startswith(b"\x89PNG")
        assert "<svg" in png.with_suffix(".svg").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_tables_of_a_run(result_file: Path) -> None:
    """The page's tables are made from the result, with a row for each gateway and a cell for each number."""
    from bench import report

    result = json.loads(result_file.read_text(encoding="utf-8"))
    text = report.markdown(result)
    assert "### Added latency, plain calls" in text
    assert "| Trigate |" in text
    assert "×" in text
    assert all(line.count("|") > 2 for line in text.splitlines() if line.startswith("|"))


def test_a_comparison() -> None:
    """Two results get a verdict where their ranges are apart, and none where they overlap or no direction is better."""
    from bench import report

    def result(latency: list[float], late: list[float]) -> dict[str, Any]:
        rounds = [
            {"values": {"latency_p50_ms": one, "upstream_late_ms": other}}
            for one, other in zip(latency, late, strict=True)
        ]
        return {
            "gateways": {"trigate": {"title": "Trigate"}},
            "metrics": {name: attrs.asdict(metric) for name, metric in scenarios.METRICS.items()},
            "scenarios": {
                "latency": {"shows": ["latency_p50_ms", "upstream_late_ms"], "rounds": {"trigate": rounds}},
            },
        }

    def verdicts(before: list[float], after: list[float]) -> list[str]:
        changes = report.changes(result(before, before), result(after, after))
        return [change.verdict for change in changes]

    assert verdicts([1.0, 1.1], [2.0, 2.1]) == ["worse", ""]
    assert verdicts([2.0, 2.1], [1.0, 1.1]) == ["better", ""]
    assert verdicts([1.0, 2.0], [1.5, 3.0]) == ["", ""]


def test_scenarios_name_their_metrics() -> None:
    """Every column is an existing metric, names are unique, and a prefix without a match is an error."""
    everything = scenarios.scenarios(QUICK)
    assert len({scenario.name for scenario in everything}) == len(everything)
    for scenario in everything:
        assert set(scenario.shows) <= set(scenarios.METRICS)
    with pytest.raises(ValueError, match="no scenario is called 'latancy'"):
        session.Settings(scale=QUICK, only=("latancy",)).chosen()

    def chosen(*only: str) -> list[str]:
        return [each.name for each in session.Settings(scale=QUICK, only=only).chosen()]

    assert chosen("lat", "disconnect-100") == ["latency", "disconnect-100"]
    assert chosen("idle") == ["idle-500", "idle-1000"]
    assert chosen() == [each.name for each in everything]


def test_the_docstring_names_every_module() -> None:
    """The package's docstring names all of its modules."""
    assert bench.__doc__ is not None
    modules = {file.stem for file in Path(bench.__file__).parent.glob("*.py")} - {"__init__", "__main__"}
    assert {name for name in modules if f"`{name}`" not in bench.__doc__} == set()


def test_the_page_has_every_option_and_scenario() -> None:
    """docs/explanation/performance.md names the options of the command line and the scenarios."""
    page = (ROOT / "docs/explanation/performance.md").read_text(encoding="utf-8")
    source = (ROOT / "bench/cli.py").read_text(encoding="utf-8")
    options = {part.split('"')[0] for part in source.split('click.option("')[1:]}
    assert {option for option in options if option not in page} <= {"--no-plots"}
    names = {f"{each.sweep}-N" if each.sweep else each.name for each in scenarios.scenarios(QUICK)}
    assert {name for name in names if f"`{name}`" not in page} == {"streams-64", "streams-4", "disconnect-1000"}


async def test_jobs_survive_json() -> None:
    """A job and a report stay the same when they are sent as lines of JSON."""
    await trio.lowlevel.checkpoint()
    job = Job(kind="open", port=1, body="x", headers={"a": "b"}, rate=2.5)
    assert load.converter.structure(json.loads(json.dumps(load.converter.unstructure(job))), Job) == job
