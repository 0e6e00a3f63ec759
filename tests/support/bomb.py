"""Used by the cancellation sweeps: calls a function after a given number of steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import trio


class Bomb(trio.abc.Instrument):
    """Calls a function after the n-th step of any task."""

    def __init__(self, steps: int, fuse: Callable[[], object]) -> None:
        self._left = steps
        self._fuse = fuse
        self.fired = False

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left == 0:
            self.fired = True
            self._fuse()


@contextlib.contextmanager
def armed(bomb: Bomb) -> Iterator[None]:
    """Counts steps during the block."""
    trio.lowlevel.add_instrument(bomb)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(bomb)
