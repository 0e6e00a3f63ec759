"""One task that keeps the time for every exchange.

A task of its own for the limits of each exchange would cost a third of what a short call costs in all. So there is one
for all of them: it sleeps until the next check is due, makes it, and is told when the next one shall be. A check is a
function from the time to the time at which to ask again; it is synchronous, and must not raise.

A check that is due later than it said costs nothing: whoever's limits move on with each event of a stream (nearly all
do) moves nothing here, and looks again when it is asked.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
import trio

log = structlog.get_logger("trigate.concurrency.timers")

Check = Callable[[float], float]
"""From the time (`trio.current_time`) to when to ask again; ``math.inf`` = never."""

_SLACK = 64
"""How many stopped timers may lie about, besides as many as there are running ones."""


class Timer:
    """A check that is made again and again. Made by `Timers.start`."""

    __slots__ = ("_check", "_queued", "_timers")

    def __init__(self, timers: Timers, check: Check) -> None:
        self._timers = timers
        self._check: Check | None = check
        self._queued = False

    @property
    def is_stopped(self) -> bool:
        """Whether no further check will be made."""
        return self._check is None

    def stop(self) -> None:
        """Makes no further checks. May be called twice."""
        if self._check is not None:
            self._check = None
            if self._queued:
                self._timers._note_stopped()


class Timers:
    """Made by `open_timers`."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._stopped = 0
        self._sleeps_until = -math.inf
        self._earlier = trio.Event()

    def __repr__(self) -> str:
        return f"<Timers, {len(self)} running>"

    def __len__(self) -> int:
        return len(self._due) - self._stopped

    def start(self, at: float, check: Check) -> Timer:
        """Checks at a time for the first time, and then whenever the check says."""
        timer = Timer(self, check)
        self._push(at, timer)
        return timer

    def _push(self, at: float, timer: Timer) -> None:
        timer._queued = True
        heapq.heappush(self._due, (at, next(self._count), timer))
        if at < self._sleeps_until:
            self._earlier.set()

    def _note_stopped(self) -> None:
        # A stopped timer stays in the heap until it is due, or until half of the heap is such: constant on average.
        self._stopped += 1
        if self._stopped > _SLACK + len(self):
            self._due = [entry for entry in self._due if entry[2]._check is not None]
            heapq.heapify(self._due)
            self._stopped = 0

    async def run(self) -> None:
        """Makes the checks, for ever."""
        while True:
            now = trio.current_time()
            while self._due and self._due[0][0] <= now:
                _, _, timer = heapq.heappop(self._due)
                timer._queued = False
                if timer._check is None:
                    self._stopped -= 1
                    continue
                try:
                    again = timer._check(now)
                except Exception:
                    log.exception("timer_crashed")
                    again = math.inf
                if again < math.inf and not timer.is_stopped:
                    self._push(max(again, now + 1e-6), timer)
                else:
                    timer._check = None
            self._earlier = trio.Event()
            self._sleeps_until = self._due[0][0] if self._due else math.inf
            with trio.move_on_at(self._sleeps_until):
                await self._earlier.wait()
            self._sleeps_until = -math.inf


@asynccontextmanager
async def open_timers() -> AsyncIterator[Timers]:
    """Opens timers, and runs their task around a block."""
    timers = Timers()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timers.run, name="timers")
        try:
            yield timers
        finally:
            nursery.cancel_scope.cancel()
