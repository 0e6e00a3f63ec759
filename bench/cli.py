"""The command line: ``./scripts/bench``, ``python -m bench``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import click
import trio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import gateways, report, session, terminal
from bench.process import HAS_PROC
from bench.readiness import raise_descriptor_limit
from bench.scenarios import FULL, QUICK, Scale

MICRO = Path(__file__).parent / "micro.py"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--quick", is_flag=True, help="About two minutes for each gateway: fewer and shorter rounds.")
@click.option("--only", multiple=True, metavar="NAME", help="Only scenarios whose names begin with NAME; repeatable.")
@click.option("--against", multiple=True, metavar="PEERS", help="Other gateways, separated by commas; `all`.")
@click.option(
    "--gateway",
    default="trigate",
    show_default=True,
    metavar="PEER",
    help="The gateway to compare the others to.",
)
@click.option("--url", metavar="URL", help="Measure a gateway that already runs on this machine, instead of --gateway.")
@click.option("--model", default="mock-model", show_default=True, help="The model id of the calls; with --url.")
@click.option(
    "--path", default="/chat/completions", show_default=True, help="Path of the calls, below /v1; with --url."
)
@click.option("--header", multiple=True, metavar="NAME:VALUE", help="Sent with each call; with --url.")
@click.option("--pid", type=int, help="The gateway's process id, for its CPU time and memory; with --url.")
@click.option("--upstream-port", type=int, default=0, help="Port of the mock upstream, which --url must call.")
@click.option("--rounds", type=click.IntRange(1, 100), help="How many times each gateway is measured, in turn.")
@click.option("--window", type=click.FloatRange(0.2, 120), metavar="SECONDS", help="The length of one measurement.")
@click.option("--rate", type=click.FloatRange(1, 100_000), help="Calls per second of the loads with Poisson arrivals.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="The directory of the result.")
@click.option("--no-plots", is_flag=True, help="Write only JSON.")
@click.option("--compare", nargs=2, type=click.Path(exists=True, path_type=Path), metavar="A.json B.json")
@click.option(
    "--markdown", type=click.Path(exists=True, path_type=Path), metavar="RESULT.json", help="Print its tables."
)
@click.option("--plots", type=click.Path(exists=True, path_type=Path), metavar="RESULT.json", help="Draw its figures.")
@click.option("--micro", is_flag=True, help="Micro-benchmarks of pure modules (pytest-benchmark).")
@click.option("--hooks", is_flag=True, help="Durable acknowledgements of webhooks, compared with what the disk can do.")
@click.option("--overload", is_flag=True, help="Three times as many calls as there are slots.")
@click.option("--formats", is_flag=True, help="Calls in three formats, translated and as they are.")
@click.option("--keys", is_flag=True, help="Plain calls with keys, limits, prices and budgets, and without.")
@click.option("--list", "list_peers", is_flag=True, help="List the known gateways, and whether each is installed.")
def main(**options: Any) -> None:  # Any: the decorators give each option its type
    """Measures Trigate and other gateways in turn, with a mock upstream on this machine."""
    # SIGTERM ends the child processes, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    console = Console()
    if options["list_peers"]:
        for peer in gateways.peers().values():
            state = "installed" if peer.is_installed() else f"not installed: {peer.install}"
            console.print(f"{peer.name:<28}{peer.title} – {state}", markup=False, highlight=False)
    elif options["micro"]:
        # the bench's own settings instead of the tests'; -s shows the cost of an event
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "no:cacheprovider", "-q", "-s", str(MICRO)]
        columns = "--benchmark-columns=min,median,iqr,ops"
        sys.exit(subprocess.run([*command, columns, "--benchmark-disable-gc"], check=False).returncode)
    elif options["hooks"]:
        from bench import acknowledgements

        rounds = options["rounds"] or (2 if options["quick"] else 5)
        found = trio.run(lambda: acknowledgements.run(rounds=rounds, window_s=options["window"] or 3.0))
        for line in acknowledgements.lines(found):
            console.print(line, markup=False, highlight=False)
    elif options["overload"]:
        from bench import overload

        rounds = options["rounds"] or (2 if options["quick"] else 5)
        measured = trio.run(lambda: overload.run(rounds=rounds, window_s=options["window"] or 5.0))
        for line in overload.lines(measured):
            console.print(line, markup=False, highlight=False)
    elif options["formats"]:
        from bench import formats

        names = [name for given in options["against"] for name in given.split(",")]
        rounds = options["rounds"] or (2 if options["quick"] else 5)
        costs = trio.run(lambda: formats.run(names, rounds=rounds, window_s=options["window"] or 3.0))
        for line in formats.lines(costs):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    elif options["keys"]:
        from bench import keys

        rounds = options["rounds"] or (2 if options["quick"] else 9)
        spent = trio.run(lambda: keys.run(rounds=rounds, window_s=options["window"] or 2.0))
        for line in keys.lines(spent):
            console.print(line, markup=False, highlight=False)
    elif options["compare"]:
        before, after = (_read(file) for file in options["compare"])
        terminal.print_comparison(before, after, console)
    elif options["markdown"]:
        print(report.markdown(_read(options["markdown"])), end="")
    elif options["plots"]:
        from bench.plots import draw

        for file in draw(_read(options["plots"]), options["plots"].with_suffix("")):
            print(file)
    else:
        _run(options, console)


def _read(file: Path) -> report.Result:
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))  # Any: JSON
    if result.get("schema") != session.SCHEMA:
        raise click.ClickException(f"{file} is not a result of this bench ({session.SCHEMA})")
    return result


def _run(options: dict[str, Any], console: Console) -> None:
    raise_descriptor_limit()
    settings = _settings(options, console)

    def wait_for_gateway(port: int) -> None:
        click.echo(f"The mock upstream is at http://127.0.0.1:{port}/v1 (model: mock-model).", err=True)

    with _progress() as say, _plain_errors():
        result = trio.run(session.run, settings, say, wait_for_gateway if options["url"] else None)
    terminal.print_result(result, console)
    stamp = result["began"].replace(":", "").replace("-", "")[:13].replace("T", "-")
    directory = (options["output"] or Path("bench-results")) / f"{stamp}-{'-'.join(report.names(result))[:60]}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    file = directory.with_suffix(".json")
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"\n{file}", highlight=False, soft_wrap=True)
    if not options["no_plots"]:
        from bench.plots import draw

        for figure in draw(result, directory):
            console.print(str(figure), highlight=False, soft_wrap=True)
    if not result["scenarios"] or not report.names(result):
        sys.exit(1)


def _settings(options: dict[str, Any], console: Console) -> session.Settings:
    scale: Scale = QUICK if options["quick"] else FULL
    given = {"rounds": options["rounds"], "window_s": options["window"], "rate": options["rate"]}
    scale = attrs.evolve(scale, **{name: value for name, value in given.items() if value is not None})
    running = []
    wanted = [] if options["url"] else [options["gateway"]]
    if options["url"]:
        headers = dict(header.split(":", 1) for header in options["header"] if ":" in header)
        with _plain_errors():
            running.append(
                gateways.running(
                    options["url"],
                    model=options["model"],
                    path="/v1" + options["path"],
                    headers=headers,
                    pid=options["pid"] if HAS_PROC else None,
                )
            )
    known = gateways.peers()
    for names in options["against"]:
        wanted += list(known) if names == "all" else names.split(",")
    peers = []
    for name in dict.fromkeys(wanted):
        if name not in known:
            raise click.ClickException(f"no peer is called {name!r}; there are: {', '.join(known)}")
        if known[name].is_installed():
            peers.append(known[name])
        else:
            console.print(
                f"{known[name].title} is left out, for it is not installed: {known[name].install}", markup=False
            )
    settings = session.Settings(
        scale=scale,
        peers=peers,
        running=running,
        only=options["only"],
        upstream_port=options["upstream_port"],
    )
    with _plain_errors():
        settings.chosen()
    return settings


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def _progress() -> Iterator[session.Say]:
    """Shows a bar on a terminal, and otherwise a line for each measurement."""
    console = Console(stderr=True)
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)

        def say(what: str, done: int, total: int) -> None:
            if console.is_terminal:
                progress.update(task, description=what, completed=done, total=total)
            else:
                click.echo(f"[{done}/{total}, {time.monotonic() - began:.0f} s] {what}", err=True)

        yield say
