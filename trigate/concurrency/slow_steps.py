"""Notices steps of tasks that hold the event loop: a Trio instrument.

A step is what a task does between two checkpoints. While it lasts, no other task runs, so a step that takes long delays
every stream of the process. The end of a step is the beginning of the next one, or of the wait for I/O: so the clock is
read once for each step.

**Bounds:** one line in the log for each name of a task in `AGAIN_S`, and `MAX_NAMES` names. The count misses nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import trio

from trigate.logs import log

SLOW_S = 0.05
"""How long a step may take."""
AGAIN_S = 10.0
"""How long a task of the same name is not logged again."""
MAX_NAMES = 100


class SlowSteps(trio.abc.Instrument):
    """Counts and logs slow steps. There is one for each process.

    Attributes:
        count: How many there were.
    """

    def __init__(self) -> None:
        self.count = 0
        self._name: str | None = None
        self._since = time.monotonic()  # not Trio's clock, which stands still in a step
        self._logged_at: dict[str, float] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """A block in which Trio calls it."""
        trio.lowlevel.add_instrument(self)
        try:
            yield
        finally:
            trio.lowlevel.remove_instrument(self)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """A task goes on; the step before it has ended."""
        now = time.monotonic()
        if now - self._since > SLOW_S and self._name is not None:
            self._note(self._name, now)
        self._since = now
        self._name = task.name

    def before_io_wait(self, timeout: float) -> None:
        """The last step of a round has ended."""
        if self._name is not None:
            now = time.monotonic()
            if now - self._since > SLOW_S:
                self._note(self._name, now)
            self._name = None

    def _note(self, name: str, now: float) -> None:
        self.count += 1
        if now - self._logged_at.get(name, -AGAIN_S) < AGAIN_S:
            return
        if len(self._logged_at) >= MAX_NAMES:
            self._logged_at.clear()
        self._logged_at[name] = now
        log.warning("slow_step", task=name, took_s=round(now - self._since, 4))
