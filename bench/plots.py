"""A result as figures, PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, SymmetricalLogLocator

from bench.distribution import Histogram, Spread
from bench.gateways import DIRECT
from bench.report import Result, names, values_of

# the colours of Okabe and Ito, which are also distinct to colour-blind readers; black is for the mock upstream
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B")
_DASHES = ("-", "--", "-.", ":")
_STYLE: Any = {  # Any: matplotlib's type for it is a list of 400 names
    "font.size": 11,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "legend.frameon": False,
    "svg.hashsalt": "trigate",  # so that the same result gives the same file
}


def draw(result: Result, stem: Path) -> list[Path]:
    """Draws the figures of a result into ``STEM-latency.png``, … and returns the files."""
    files = []
    with mpl.rc_context(_STYLE):
        for name, figure in _figures(result):
            for ending in ("png", "svg"):
                file = stem.with_name(f"{stem.name}-{name}.{ending}")
                figure.savefig(file, dpi=130, metadata={"Date": None} if ending == "svg" else None)
                files.append(file)
            plt.close(figure)
    return files


def _figures(result: Result) -> Iterator[tuple[str, Figure]]:
    distributions = [
        ("latency", "latency", "Plain calls"),
        ("first-token", "first_token", "First token, beyond the mock's wait"),
        ("streams-500", "delay", "Event delay, 500 streams"),
    ]
    there = [each for each in distributions if each[0] in result["scenarios"]]
    if there:
        yield "latency", _cumulative(result, there)
    sweeps: list[tuple[str, str, str, Callable[[Axes], None]]] = [
        ("first-token-among", "added_p50_ms", "Added time to the first token, ms (median)", _about_zero),
        ("hold", "events_per_s", "Events/s", _both_logarithmic),
        ("idle", "resident_mib", "Memory of the process tree, MiB", _from_zero),
    ]
    for sweep, metric, label, scale in sweeps:
        points = [each for each in result["scenarios"].values() if each["sweep"] == sweep]
        if points:
            figure = _against(result, points, metric, label, scale)
            if figure is not None:
                yield sweep, figure


def _look(result: Result, name: str) -> dict[str, Any]:
    if name == DIRECT:
        return {"color": "black", "linestyle": ":", "label": "direct, no gateway"}
    number = names(result).index(name)
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
        "label": result["gateways"][name]["title"],
    }


def _machine(result: Result) -> str:
    machine = result["machine"]
    return f"{result['began'][:10]} · {machine['cpu']}, {machine['cores']} cores · CPython {machine['python']}"


def _finish(figure: Figure, axes: Axes, result: Result) -> None:
    """Puts one legend under the plots, and the description of the machine under it."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(4, max(1, len(labels)))
    rows = -(-len(labels) // columns)
    height_in = figure.get_size_inches()[1]
    bottom = (0.42 + 0.26 * rows) / height_in
    figure.tight_layout(rect=(0, bottom, 1, 1), w_pad=2.5)
    figure.legend(
        handles, labels, loc="lower center", ncols=columns, bbox_to_anchor=(0.5, 0.3 / height_in), fontsize=10
    )
    figure.text(0.99, 0.08 / height_in, _machine(result), ha="right", va="bottom", fontsize=8, color="#666666")


def _cumulative(result: Result, distributions: list[tuple[str, str, str]]) -> Figure:
    figure, all_axes = plt.subplots(1, len(distributions), figsize=(5.2 * len(distributions), 4.6), squeeze=False)
    fullest = all_axes[0][0]
    most = 0
    for axes, (scenario, histogram, title) in zip(all_axes[0], distributions, strict=True):
        shown = 0
        for name in result["gateways"]:
            merged = Histogram()
            for outcome in result["scenarios"][scenario]["rounds"].get(name, ()):
                if histogram in outcome["histograms"]:
                    merged.merge(Histogram.from_json(outcome["histograms"][histogram]))
            if merged.count:
                values, shares = zip(*merged.cumulative(), strict=True)
                milliseconds = [max(value, 1) / 1000 for value in values]
                axes.step(milliseconds, [100 * share for share in shares], where="post", **_look(result, name))
                shown += 1
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        # at least three labels, whatever the range
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, 101)
        axes.set_title(title)
        axes.set_xlabel("milliseconds (logarithmic)")
        axes.set_ylabel("% that took no longer")
        if shown > most:
            fullest, most = axes, shown
    _finish(figure, fullest, result)
    return figure


def _against(
    result: Result, points: list[dict[str, Any]], metric: str, label: str, scale: Callable[[Axes], None]
) -> Figure | None:
    figure, axes = plt.subplots(figsize=(7.6, 5.2))
    for name in names(result):
        found = [(point["x"], Spread.of(values_of(point, name, metric))) for point in points]
        there = [(x, spread) for x, spread in found if spread is not None]
        if metric == "resident_mib" and there and result["gateways"][name]["idle_mib"] is not None:
            idle = result["gateways"][name]["idle_mib"]
            there.insert(0, (0, Spread(idle, idle, idle)))
        if not there:
            continue
        xs = [x for x, _spread in there]
        axes.plot(xs, [spread.median for _x, spread in there], marker="o", markersize=4, **_look(result, name))
        lows, highs = [spread.low for _x, spread in there], [spread.high for _x, spread in there]
        axes.fill_between(xs, lows, highs, color=_look(result, name)["color"], alpha=0.15, linewidth=0)
    if not axes.lines:
        plt.close(figure)
        return None
    if metric == "events_per_s":
        xs = [point["x"] for point in points]
        axes.plot(xs, [10 * x for x in xs], color="black", linestyle=":", linewidth=1, label="offered")
    scale(axes)
    axes.set_title(points[0]["title"])
    axes.set_xlabel(points[0]["x_title"])
    axes.set_ylabel(label)
    if metric == "added_p50_ms":
        axes.set_xscale("log", base=2)
        axes.set_xticks([point["x"] for point in points])
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _finish(figure, axes, result)
    return figure


def _thousands(value: float, _position: int) -> str:
    return f"{value:,.0f}".replace(",", " ")


def _from_zero(axes: Axes) -> None:
    if axes.get_ylim()[0] >= 0:
        axes.set_ylim(bottom=0)


def _about_zero(axes: Axes) -> None:
    """A scale that is logarithmic, but linear from -1 to 1: a difference may be 0, or negative by chance."""
    if axes.get_ylim()[1] > 10:
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.set_ylim(bottom=min(0.0, 1.2 * axes.dataLim.ymin))


def _both_logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_thousands))
        axis.set_minor_formatter(NullFormatter())
