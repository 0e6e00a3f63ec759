"""A result as Markdown tables, and compared with another result. Pure; `terminal` prints the same tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from bench.distribution import Spread, pair_ratios
from bench.gateways import DIRECT

Result = Mapping[str, Any]  # Any: JSON, as `session.run` returns it


@attrs.frozen(kw_only=True)
class Cell:
    """A number in a table.

    Attributes:
        spread: None = not measured.
        ratio: The ratio to the first gateway, by pairs; None for the first one itself.
        worse: Whether the ratio means that this gateway does worse than the first; None = undecided.
        marks: Notes on the number, each a letter of `Table.legend`.
    """

    spread: Spread | None
    digits: int
    ratio: Spread | None = None
    worse: bool | None = None
    marks: str = ""

    def text(self) -> str:
        """``12.3 (11.0–14.1) ×1.25``, without unknown parts."""
        return " ".join(filter(None, [self.value(), self.range(), self.times(), self.marks]))

    def value(self) -> str:
        """The median."""
        return "–" if self.spread is None else _number(self.spread.median, self.digits)

    def range(self) -> str:
        """The least and the greatest round, if they differ."""
        if self.spread is None:
            return ""
        low, high = _number(self.spread.low, self.digits), _number(self.spread.high, self.digits)
        return "" if low == high else f"({low}–{high})"

    def times(self) -> str:
        """The ratio."""
        return "" if self.ratio is None else f"×{self.ratio.median:.2f}"


@attrs.define(kw_only=True)
class Table:
    """A table with gateways as rows and numbers as columns."""

    title: str
    does: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    legend: list[str] = attrs.Factory(list)


def _number(value: float, digits: int) -> str:
    """Formats a number with three or four digits, which is the precision of such a measurement.

    >>> _number(1234.56, 2), _number(12.345, 2), _number(1.234, 2), _number(1.234, 0)
    ('1 235', '12.3', '1.23', '1')
    """
    digits = min(digits, 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else digits)
    return f"{value:,.{digits}f}".replace(",", " ")


def values_of(scenario: Mapping[str, Any], gateway: str, metric: str) -> list[float | None]:
    """The values of a metric by round; empty if the gateway was not measured."""
    return [outcome["values"].get(metric) for outcome in scenario["rounds"].get(gateway, ())]


def names(result: Result) -> list[str]:
    """The gateways in order, without the mock upstream."""
    return [name for name in result["gateways"] if name != DIRECT]


def _cell(result: Result, scenario: Mapping[str, Any], gateway: str, metric: str, legend: list[str]) -> Cell:
    first = names(result)[0]
    about = result["metrics"][metric]
    mine = values_of(scenario, gateway, metric)
    ratio = None
    # a difference may be zero or negative, so its ratio would mean nothing
    if gateway not in (first, DIRECT) and not metric.startswith("added_"):
        ratio = pair_ratios(mine, values_of(scenario, first, metric))
    worse = None
    if ratio is not None and about["better"] is not None and not ratio.low <= 1 <= ratio.high:
        worse = (ratio.median > 1) == (about["better"] == "lower")
    return Cell(
        spread=Spread.of(mine),
        digits=about["digits"],
        ratio=ratio,
        worse=worse,
        marks=_marks(scenario, gateway, legend),
    )


def _marks(scenario: Mapping[str, Any], gateway: str, legend: list[str]) -> str:
    outcomes = scenario["rounds"].get(gateway, ())
    errors = sum(count for outcome in outcomes for count in outcome["errors"].values())
    found = []
    limited = next((outcome["limited"] for outcome in outcomes if outcome["limited"]), "")
    if limited:
        found.append(f"limited by the tool: {limited}")
    if errors:
        sample = next(outcome["error"] for outcome in outcomes if outcome["errors"])
        found.append(f"{errors} calls failed, the first with: {' '.join(sample.split())[:120]}")
    marks = []
    for text in found:
        if text not in legend:
            legend.append(text)
        marks.append(f"[{'abcdefghijklmnopqrstuvwxyz'[legend.index(text) % 26]}]")
    return "".join(marks)


def tables(result: Result) -> Iterator[Table]:
    """The tables of a result in the order of its scenarios. The scenarios of a sweep share a table."""
    if not names(result):
        return
    yield _starts(result)
    sweeps_done = set()
    for name, scenario in result["scenarios"].items():
        gateways = [each for each in result["gateways"] if each in scenario["rounds"]]
        if not scenario["sweep"]:
            table = Table(title=scenario["title"], does=scenario["does"], columns=[], rows=[])
            shown = [
                metric
                for metric in scenario["shows"]
                if any(value is not None for gateway in gateways for value in values_of(scenario, gateway, metric))
            ]
            table.columns = [
                result["metrics"][metric]["short"] or result["metrics"][metric]["title"] for metric in shown
            ]
            for gateway in gateways:
                cells = [_cell(result, scenario, gateway, metric, table.legend) for metric in shown]
                # a note on a measurement appears once
                cells = [cells[0], *(attrs.evolve(cell, marks="") for cell in cells[1:])] if cells else []
                table.rows.append((result["gateways"][gateway]["title"], cells))
            yield table
        elif scenario["sweep"] not in sweeps_done:
            sweeps_done.add(scenario["sweep"])
            points = [each for each in result["scenarios"].values() if each["sweep"] == scenario["sweep"]]
            yield from _sweep(result, points, name)


def _sweep(result: Result, points: Sequence[Mapping[str, Any]], name: str) -> Iterator[Table]:
    for metric in points[0]["shows"]:
        title = f"{points[0]['title']}: {result['metrics'][metric]['title']}"
        columns = [f"{_number(point['x'], 0)} {point['x_title']}" for point in points]
        table = Table(title=title, does=points[0]["does"], columns=columns, rows=[])
        for gateway in names(result):
            cells = [_cell(result, point, gateway, metric, table.legend) for point in points]
            if any(cell.spread is not None for cell in cells):
                table.rows.append((result["gateways"][gateway]["title"], cells))
        if table.rows:
            yield table


def _starts(result: Result) -> Table:
    table = Table(
        title="Start",
        does="From the start of the process to the first answered call; memory after it.",
        columns=["start, s", "memory, MiB"],
        rows=[],
    )
    for name in names(result):
        about = result["gateways"][name]
        numbers = [
            Cell(spread=None if about[key] is None else Spread(*[about[key]] * 3), digits=digits)
            for key, digits in (("start_s", 2), ("idle_mib", 1))
        ]
        table.rows.append((f"{about['title']} {about['version']}".strip(), numbers))
    return table


def head(result: Result) -> str:
    """The time and the machine of the measurement."""
    machine, settings, tool = result["machine"], result["settings"], result["tool"]
    load = "" if machine["load_1m"] is None else f", load {machine['load_1m']:.1f} before the run"
    return (
        f"{result['began'][:10]} · {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, "
        f"{machine['kernel']}, CPython {machine['python']}{load} · {settings['rounds']} rounds of "
        f"{settings['window_s']:g} s · the tool by itself: {_number(tool['requests_per_s'], 0)} requests/s, "
        f"{_number(tool['events_per_s'], 0)} events/s"
    )


def legend(result: Result) -> str:
    """How to read a cell."""
    return f"Median (least–greatest of the rounds) ×ratio. {ratios_note(result)}"


def ratios_note(result: Result) -> str:
    first = result["gateways"][names(result)[0]]["title"] if names(result) else "the first"
    return f"Ratios are to {first}: the median of those that were taken round by round."


def markdown(result: Result) -> str:
    """A result in the form of the performance page."""
    lines = [f"Measured {head(result)}.", "", legend(result)]
    for table in tables(result):
        lines += ["", f"### {table.title}", "", table.does, ""]
        lines.append("| | " + " | ".join(table.columns) + " |")
        lines.append("|---|" + "---:|" * len(table.columns))
        lines += [f"| {title} | " + " | ".join(cell.text() for cell in cells) + " |" for title, cells in table.rows]
        if table.legend:
            lines += ["", *(f"[{chr(97 + number % 26)}] {text}." for number, text in enumerate(table.legend))]
    lines += [line for note in result["notes"] for line in ("", " ".join(note.split()))]
    return "\n".join(lines) + "\n"


@attrs.frozen(kw_only=True)
class Change:
    """A metric in two results.

    Attributes:
        verdict: ``better``, ``worse``, or ``""`` if the ranges overlap or neither direction is better.
    """

    scenario: str
    gateway: str
    metric: str
    before: Spread
    after: Spread
    verdict: str


def changes(before: Result, after: Result) -> Iterator[Change]:
    """The metrics that both results have, side by side.

    Two runs are not rounds of one run: the machine or its load may have been different. There is a verdict only if even
    the closest rounds of the two differ in the same direction.
    """
    for name, scenario in after["scenarios"].items():
        other = before["scenarios"].get(name)
        if other is None:
            continue
        for gateway in after["gateways"]:
            for metric in scenario["shows"]:
                was = Spread.of(values_of(other, gateway, metric))
                now = Spread.of(values_of(scenario, gateway, metric))
                if was is None or now is None:
                    continue
                better = after["metrics"][metric]["better"]
                verdict = ""
                if better is not None and not was.overlaps(now):
                    verdict = "better" if (now.median < was.median) == (better == "lower") else "worse"
                yield Change(scenario=name, gateway=gateway, metric=metric, before=was, after=now, verdict=verdict)
