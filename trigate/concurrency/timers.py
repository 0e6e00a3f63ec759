"""One task that checks the timeouts of every exchange and connection.

**The second scheduler, and when not to use it.** `poller`, `timers` and `cancel_queue` are together a second scheduler
inside Trio's: callbacks for ready sockets, callbacks for deadlines, and delayed cancellation. Plain Trio is the
default: a task that sleeps, ``trio.move_on_after``, a nursery, ``CancelScope.cancel()``. It is shorter, it nests, a
traceback shows where it waits, and cancellation reaches it. Use plain Trio unless all of these hold:

1. The work happens **for each event of a stream or for each call**, not once per start or reload. To relay an event
   costs 184 to 250 µs with a sleeping task, and 18 to 30 µs with a callback.
2. The work is **short, synchronous, and cannot fail**. A callback that has to wait needs a task anyway. A slow callback
   delays every socket and every timeout of the process.
3. A task **owns the resource and outlives the callback**. A callback has no scope of its own: the owner stops the
   timer (`Timer.stop`) or removes the socket (`Poller.remove`) in a ``finally``, before it closes the descriptor. Where
   you cannot name that ``finally``, use a task.
4. A **benchmark before and after** shows the gain (`python -m bench`).

`cancel_queue` has one more condition: the urgent part (closing the upstream connection) has already been done, so that
it does not matter when the scope is cancelled.

**Why timers.** A task for the timeouts of each exchange would cost a third of a short call. Instead, one task sleeps
until the next check is due, calls it, and gets from it the time of the following check. A check is a function from the
current time to the time at which to call it again. It is synchronous, and must not raise.

A check that is called early costs little: it returns a later time. So a timeout that moves with each event of a stream
(nearly all do) changes nothing here; the check compares again when it is called.

Bounds: a stopped timer stays in the heap until it is due, but at most `_SLACK` more than there are running ones.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from trigate.concurrency.notify import Wakeup, open_service
from trigate.logs import log

Check = Callable[[float], float]
"""From the current time (`trio.current_time`) to the time of the next check; ``math.inf`` = none follows."""

_SLACK = 64
"""Stopped timers that are tolerated in the heap, beyond the number of running ones, before it is compacted."""


class Timer:
    """A check that is called again and again. Made by `Timers.start`."""

    __slots__ = ("_check", "_queued", "_timers")

    def __init__(self, timers: Timers, check: Check) -> None:
        self._timers = timers
        self._check: Check | None = check
        self._queued = False

    @property
    def is_stopped(self) -> bool:
        """Whether the check will not be called again."""
        return self._check is None

    def stop(self) -> None:
        """Stops the timer: the check is not called again. May be called twice."""
        if self._check is not None:
            self._check = None
            if self._queued:
                self._timers._note_stopped()


class Timers:
    """The running timers of one task. Made by `open_timers`."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._stopped = 0
        self._sleeps_until = -math.inf
        self._due_earlier = Wakeup()

    def __repr__(self) -> str:
        return f"<Timers, {len(self)} running>"

    def __len__(self) -> int:
        return len(self._due) - self._stopped

    def start(self, at: float, check: Check) -> Timer:
        """Starts a timer.

        Args:
            at: The time of the first check (`trio.current_time`).
            check: Returns the time of the next check.
        """
        timer = Timer(self, check)
        self._push(at, timer)
        return timer

    def _push(self, at: float, timer: Timer) -> None:
        timer._queued = True
        heapq.heappush(self._due, (at, next(self._count), timer))
        if at < self._sleeps_until:
            self._due_earlier.set()

    def _note_stopped(self) -> None:
        # A stopped timer stays in the heap until it is due, or until half of the heap is such: constant on average.
        self._stopped += 1
        if self._stopped > _SLACK + len(self):
            self._due = [entry for entry in self._due if entry[2]._check is not None]
            heapq.heapify(self._due)
            self._stopped = 0

    async def run(self) -> None:
        """Calls the checks. Never returns."""
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
            self._sleeps_until = self._due[0][0] if self._due else math.inf
            with trio.move_on_at(self._sleeps_until):
                await self._due_earlier.wait()
            self._sleeps_until = -math.inf


@asynccontextmanager
async def open_timers() -> AsyncIterator[Timers]:
    """Opens timers, and runs their task for as long as the block lasts."""
    timers = Timers()
    async with open_service(timers.run):
        yield timers
