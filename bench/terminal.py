"""Prints results on the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bench.report import Cell, Result, Table, changes, head, ratios_note, tables


def print_result(result: Result, console: Console) -> None:
    """Prints a result on the terminal."""
    console.print(Text(head(result), style="bold"))
    console.print(Text(f"Median ×ratio; below, the least–greatest round. {ratios_note(result)}", style="dim"))
    for table in tables(result):
        drawn = RichTable(
            title=table.title, caption=_caption(table), title_justify="left", caption_justify="left", box=SIMPLE_HEAD
        )
        drawn.add_column("")
        for column in table.columns:
            drawn.add_column(column, justify="right")
        for title, cells in table.rows:
            drawn.add_row(title, *(_drawn(cell) for cell in cells))
        console.print()
        console.print(drawn)
    for note in result["notes"]:
        console.print()
        console.print(Text(note, style="yellow"))


def _drawn(cell: Cell) -> Text:
    """The median and the ratio in one line, with the range below."""
    text = Text(" ".join(filter(None, [cell.value(), cell.marks])))
    if cell.ratio is not None:
        text.append(" " + cell.times(), style={None: "dim", True: "red", False: "green"}[cell.worse])
    if cell.range():
        text.append("\n" + cell.range().strip("()"), style="dim")
    return text


def _caption(table: Table) -> str:
    marks = [f"\\[{chr(97 + number % 26)}] {text}" for number, text in enumerate(table.legend)]
    return "\n".join([table.does, *marks])


def print_comparison(before: Result, after: Result, console: Console) -> None:
    """Prints two results side by side."""
    console.print(f"before: {head(before)}")
    console.print(f"after:  {head(after)}")
    if before["machine"]["cpu"] != after["machine"]["cpu"] or before["machine"]["cores"] != after["machine"]["cores"]:
        console.print(Text("They are of different machines.", style="yellow"))
    table = RichTable(title="after / before", title_justify="left")
    for column in ("scenario", "gateway", "", "before", "after", "ratio", ""):
        table.add_column(column, justify="right" if column in ("before", "after", "ratio") else "left")
    for change in changes(before, after):
        about = after["metrics"][change.metric]
        ratio = f"{change.after.median / change.before.median:.2f}" if change.before.median > 0 else "–"
        table.add_row(
            change.scenario,
            after["gateways"][change.gateway]["title"],
            about["title"],
            Cell(spread=change.before, digits=about["digits"]).text(),
            Cell(spread=change.after, digits=about["digits"]).text(),
            ratio,
            Text(change.verdict, style={"better": "green", "worse": "red", "": ""}[change.verdict]),
        )
    console.print(table)
