"""Draws `trigate status` on a terminal with rich: once, or again and again until a signal.

The live view uses the alternate screen of the terminal, so the previous content returns when the view ends. Signals are
received as values and never raise an exception in the middle of other code, so the terminal is restored in every case.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx2
import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from trigate.cli.client import RequestFailed, body_of, client_settings, not_a_gateway, translated_errors
from trigate.cli.status_view import NUMBERS, PATHS, Cell, Overview, Table, duration, overview, read

ANSWER_TIMEOUT_S = 10.0
"""How long the gateway may take to answer before it counts as unreachable."""

_STYLES = {"plain": "", "good": "green", "warning": "yellow", "bad": "bold red", "faint": "dim"}
_END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# -- drawing ----------------------------------------------------------------------------------------------------------


def draw_all(shown: Overview, width: int) -> RenderableType:
    """Draws everything, with as many lines as that takes.

    Args:
        width: Of the terminal, in columns.
    """
    parts: list[RenderableType] = [_text(cell) for cell in (*shown.head, *shown.details)]
    return Group(*parts, *_table(shown.targets, width), *_table(shown.streams, width))


def draw_fitted(shown: Overview, width: int, height: int, problem: str | None = None) -> RenderableType:
    """Draws the view of `--watch`: the head and the tables, with as many rows as fit on the terminal.

    The title of a table that does not fit has the number of rows that are left out. The targets get a third of the
    height.

    Args:
        width: Of the terminal, in columns.
        height: Of the terminal, in lines.
        problem: A line above everything else.
    """
    above = [Cell(problem, "bad")] if problem is not None else []
    parts: list[RenderableType] = [_text(cell, one_line=True) for cell in (*above, *shown.head)]
    targets = _crop(shown.targets, height // 3)
    streams = _crop(shown.streams, height - len(parts) - _height(targets))
    return Group(*parts, *_table(targets, width), *_table(streams, width))


_TABLE_HEAD = 3
"""Lines above the rows of a table: an empty one, its title, its headings."""


def _height(table: Table) -> int:
    return _TABLE_HEAD + len(table.rows) if table.rows else _TABLE_HEAD - 1


def _crop(table: Table, height: int) -> Table:
    rows = max(0, height - _TABLE_HEAD)
    if len(table.rows) <= rows:
        return table
    hidden = len(table.rows) - rows
    return Table(f"{table.title} ({hidden} lines more than fit)", table.headings, table.rows[:rows])


def _text(cell: Cell, *, one_line: bool = False) -> Text:
    return Text(cell.text, style=_STYLES[cell.tone], no_wrap=one_line, overflow="ellipsis" if one_line else None)


def _table(table: Table, width: int) -> list[RenderableType]:
    title = Text(f"\n{table.title}", style="bold", no_wrap=True, overflow="ellipsis")
    if not table.rows:
        return [title]
    drawn = RichTable(box=None, pad_edge=False, header_style="dim")
    columns = [n for n in table.columns() if width >= _NARROW or table.headings[n] not in _WIDE_ONLY]
    for n in columns:
        name = table.headings[n]
        heading = Text(name, no_wrap=True, overflow="ellipsis")
        # rich makes a no_wrap column narrower only when it cannot make the others narrower
        drawn.add_column(heading, justify="right" if name in NUMBERS else "left", no_wrap=name in _KEPT_WHOLE)
    for row in table.rows:
        drawn.add_row(*(_text(row[n], one_line=True) for n in columns))
    return [title, drawn]


_KEPT_WHOLE = NUMBERS | {"attempt"}
"""Columns that stay as wide as their content for as long as possible."""
_NARROW = 100
_WIDE_ONLY = {"events", "bytes", "worker"}
"""Columns that a terminal of less than `_NARROW` columns does not show."""


def show(shown: Overview) -> None:
    """Draws everything once, on standard output."""
    console = Console(highlight=False)
    console.print(draw_all(shown, console.width))


# -- the live view ----------------------------------------------------------------------------------------------------


def can_watch() -> bool:
    """Whether standard output is a terminal that has an alternate screen."""
    console = Console()
    return sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal


async def fetch(client: httpx2.AsyncClient, url: str) -> Overview:
    """Requests the state of the gateway.

    Raises:
        RequestFailed: The gateway did not answer or refused, or the server is no gateway.
    """
    status_path, streams_path = PATHS
    with translated_errors(url):
        status = body_of(await client.get(status_path), url)
        streams = body_of(await client.get(streams_path), url)
    try:
        return overview(*read(status, streams))
    except ValueError as error:
        raise not_a_gateway(url, str(error)) from error


class _Display:
    """The terminal, and what is drawn on it. Pass each new overview to `draw`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(
            console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._shown: Overview | None = None
        self._problem: str | None = None

    def draw(self, shown: Overview, problem: str | None = None) -> None:
        """Draws an overview. The first call switches to the alternate screen.

        Raises:
            OSError: The terminal is closed.
        """
        if not self._console.file.isatty():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._shown, self._problem = shown, problem
        self._live.start()
        self.redraw()

    def redraw(self) -> None:
        """Draws the last overview again, in the size that the terminal has now."""
        if self._shown is not None and self._live.is_started:
            width, height = self._console.size
            self._live.update(draw_fitted(self._shown, width, height, self._problem), refresh=True)

    def suspend(self) -> None:
        """Restores the screen and stops this process, as Ctrl-Z does; draws again when the shell continues it."""
        self._live.stop()
        os.kill(os.getpid(), signal.SIGSTOP)
        if self._shown is not None:
            self.draw(self._shown, self._problem)

    def close(self) -> None:
        """Restores the screen, if the terminal is still there."""
        with contextlib.suppress(OSError):
            self._live.stop()


async def watch(url: str, key: str | None, interval_s: float) -> int:
    """Shows the state of the gateway until a signal. If the gateway becomes unreachable, waits for it to return.

    Args:
        interval_s: Seconds between an answer and the next request.

    Returns:
        The number of the signal.

    Raises:
        RequestFailed: The first request failed.
        OSError: The terminal is closed.
    """
    await trio.lowlevel.checkpoint()
    display, end_signal, failure = _Display(Console(highlight=False)), 0, None

    async def receive(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        nonlocal end_signal
        async for number in signals:
            match number:
                case signal.SIGWINCH:
                    display.redraw()
                case signal.SIGTSTP:
                    display.suspend()
                case _:
                    end_signal = number
                    scope.cancel()
                    return

    with trio.open_signal_receiver(*_END_SIGNALS, signal.SIGWINCH, signal.SIGTSTP) as signals:
        try:
            async with httpx2.AsyncClient(**client_settings(url, key)) as client, trio.open_nursery() as nursery:
                nursery.start_soon(receive, signals, nursery.cancel_scope)
                await _refresh(functools.partial(fetch, client, url), display, interval_s)
        except* (RequestFailed, OSError) as group:
            failure = group.exceptions[0]
        finally:
            display.close()
    if failure is not None:
        raise failure
    return end_signal


async def _refresh(fetch: Callable[[], Awaitable[Overview]], display: _Display, interval_s: float) -> None:
    """Fetches and draws for ever. Once it has drawn an overview, it keeps that one while the gateway is unreachable.

    Raises:
        RequestFailed: The first request failed, or was not answered within `ANSWER_TIMEOUT_S`.
    """
    shown, fetched_at = None, trio.current_time()
    while True:
        try:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                shown = await fetch()
        except (RequestFailed, trio.TooSlowError) as error:
            reason = str(error) or f"no answer within {ANSWER_TIMEOUT_S:g} s."
            if shown is None:
                raise RequestFailed(reason) from error
            age = duration(trio.current_time() - fetched_at)
            display.draw(shown, f"This is {age} old, and the gateway is asked again: {reason}")
        else:
            fetched_at = trio.current_time()
            display.draw(shown)
        await trio.sleep(interval_s)
