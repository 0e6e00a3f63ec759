"""`trigate status` on a terminal, by rich: once, or again and again until a signal.

The live picture is drawn on the terminal's other screen, so that what stood there before comes back when it ends. A
signal is received, and never raised in the middle of something: so the terminal is put in order however it ends.
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

from trigate.cli.client import AskFailed, body_of, no_gateway, settings, translated
from trigate.cli.status_view import NUMBERS, PATHS, Cell, Overview, Table, duration, overview, read

ANSWER_TIMEOUT_S = 10.0
"""How long the gateway may take to answer; then it is asked again."""

_STYLES = {"plain": "", "good": "green", "warning": "yellow", "bad": "bold red", "faint": "dim"}
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# -- what is drawn ----------------------------------------------------------------------------------------------------


def drawn(shown: Overview, width: int) -> RenderableType:
    """Draws everything, with as many lines as it takes."""
    parts: list[RenderableType] = [_text(cell) for cell in (*shown.head, *shown.more)]
    return Group(*parts, *_table(shown.targets, width), *_table(shown.streams, width))


def fitted(shown: Overview, width: int, height: int, trouble: str | None = None) -> RenderableType:
    """Draws what matters at each moment, in so many lines. Of a table that does not fit, it is said how much is not
    shown; the targets get a third.

    Args:
        trouble: What stands above it.
    """
    above = [Cell(trouble, "bad")] if trouble is not None else []
    parts: list[RenderableType] = [_text(cell, cut=True) for cell in (*above, *shown.head)]
    targets = _cut(shown.targets, height // 3)
    streams = _cut(shown.streams, height - len(parts) - _height(targets))
    return Group(*parts, *_table(targets, width), *_table(streams, width))


_ABOVE = 3
"""Lines above those of a table: an empty one, its title, its headings."""


def _height(table: Table) -> int:
    return _ABOVE + len(table.lines) if table.lines else _ABOVE - 1


def _cut(table: Table, height: int) -> Table:
    space = max(0, height - _ABOVE)
    if len(table.lines) <= space:
        return table
    hidden = len(table.lines) - space
    return Table(f"{table.title} ({hidden} lines more than fit)", table.headings, table.lines[:space])


def _text(cell: Cell, *, cut: bool = False) -> Text:
    return Text(cell.text, style=_STYLES[cell.tone], no_wrap=cut, overflow="ellipsis" if cut else None)


def _table(table: Table, width: int) -> list[RenderableType]:
    title = Text(f"\n{table.title}", style="bold", no_wrap=True, overflow="ellipsis")
    if not table.lines:
        return [title]
    made = RichTable(box=None, pad_edge=False, header_style="dim")
    columns = [n for n in table.columns() if width >= _NARROW or table.headings[n] not in _SPARED]
    for n in columns:
        name = table.headings[n]
        heading = Text(name, no_wrap=True, overflow="ellipsis")
        # without a wrap, a column is made narrower only when nothing else helps
        made.add_column(heading, justify="right" if name in NUMBERS else "left", no_wrap=name in _WHOLE)
    for line in table.lines:
        made.add_row(*(_text(line[n], cut=True) for n in columns))
    return [title, made]


_WHOLE = NUMBERS | {"attempt"}
_NARROW = 100
_SPARED = {"events", "bytes", "worker"}
"""Columns that a terminal of less than `_NARROW` columns does not show."""


def show(shown: Overview) -> None:
    """Shows it once, on standard output."""
    console = Console(highlight=False)
    console.print(drawn(shown, console.width))


# -- again and again --------------------------------------------------------------------------------------------------


def can_watch() -> bool:
    """Whether standard output is a terminal on which a picture can be drawn anew."""
    console = Console()
    return sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal


async def look(client: httpx2.AsyncClient, url: str) -> Overview:
    """Asks the gateway what it is doing.

    Raises:
        AskFailed: It did not answer, or it is none.
    """
    with translated(url):
        status, streams = [body_of(await client.get(path), url) for path in PATHS]
    try:
        return overview(*read(status, streams))  # noqa: ASYNC910 - it has asked
    except ValueError as error:
        raise no_gateway(url, str(error)) from error


class _Picture:
    """What is on the terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(
            console=self.console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._shown: Overview | None = None
        self._trouble: str | None = None

    def draw(self, shown: Overview, trouble: str | None = None) -> None:
        """Draws it; from the first time on the terminal is in use.

        Raises:
            OSError: There is no terminal any more: its window was closed.
        """
        if not self.console.file.isatty():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._shown, self._trouble = shown, trouble
        self.live.start()
        self.draw_again()

    def draw_again(self) -> None:
        """The terminal has another size."""
        if self._shown is not None and self.live.is_started:
            width, height = self.console.size
            self.live.update(fitted(self._shown, width, height, self._trouble), refresh=True)

    def pause(self) -> None:
        """Ctrl-Z: the terminal is the shell's until this process goes on."""
        self.live.stop()
        os.kill(os.getpid(), signal.SIGSTOP)
        if self._shown is not None:
            self.draw(self._shown, self._trouble)


async def watch(url: str, key: str | None, interval_s: float) -> int:
    """Shows what the gateway is doing until a signal ends it. A gateway that goes away is waited for.

    Args:
        interval_s: Between two looks.

    Returns:
        The number of the signal.

    Raises:
        AskFailed: The first look failed.
        OSError: The terminal is gone.
    """
    picture, ended_by, failed = _Picture(Console(highlight=False)), 0, None

    async def heed(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        nonlocal ended_by
        async for number in signals:
            match number:
                case signal.SIGWINCH:
                    picture.draw_again()
                case signal.SIGTSTP:
                    picture.pause()
                case _:
                    ended_by = number
                    scope.cancel()
                    return

    with trio.open_signal_receiver(*_ENDING, signal.SIGWINCH, signal.SIGTSTP) as signals:
        try:
            async with httpx2.AsyncClient(**settings(url, key)) as client, trio.open_nursery() as nursery:
                nursery.start_soon(heed, signals, nursery.cancel_scope)
                await _look_on(functools.partial(look, client, url), picture, interval_s)
        except* (AskFailed, OSError) as group:
            failed = group.exceptions[0]
        finally:
            with contextlib.suppress(OSError):  # the terminal may be gone
                picture.live.stop()
    if failed is not None:
        raise failed
    return ended_by  # noqa: ASYNC910 - it has waited for the signal


async def _look_on(ask: Callable[[], Awaitable[Overview]], picture: _Picture, interval_s: float) -> None:
    shown, seen_at = None, trio.current_time()
    while True:
        try:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                shown = await ask()
        except (AskFailed, trio.TooSlowError) as error:
            words = str(error) or f"no answer within {ANSWER_TIMEOUT_S:g} s."
            if shown is None:
                raise AskFailed(words) from error
            ago = duration(trio.current_time() - seen_at)
            picture.draw(shown, f"This is {ago} old, and it is asked again: {words}")
        else:
            seen_at = trio.current_time()
            picture.draw(shown)
        await trio.sleep(interval_s)
