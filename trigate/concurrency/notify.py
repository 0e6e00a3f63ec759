"""Wakes tasks again and again, and runs background tasks around a block.

A `trio.Event` happens once. Code that waits for the next change of something used to replace the event each time, in an
order that each place decided anew. The two classes here fix that order:

* `RepeatedEvent` has any number of waiting tasks. ``set`` wakes those that wait at that moment and is not remembered: a
  task checks its condition, and waits if it does not hold, without a checkpoint in between.
* `Wakeup` has one consumer. ``set`` is remembered until the consumer has waited, so none is lost while it works.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import trio


class RepeatedEvent:
    """An event that happens many times. ``set`` wakes every task that waits at that moment."""

    __slots__ = ("_event", "waiting")

    def __init__(self) -> None:
        self._event = trio.Event()
        self.waiting = 0
        """How many tasks wait. (``Event.statistics`` knows, too, and costs more than the rest of `set`.)"""

    def __repr__(self) -> str:
        return f"<RepeatedEvent, {self.waiting} waiting>"

    def set(self) -> None:
        """Wakes the tasks that wait now. Synchronous."""
        if self.waiting:
            self._event, happened = trio.Event(), self._event
            happened.set()

    async def wait(self) -> None:
        """Waits until the next ``set``."""
        self.waiting += 1
        try:
            await self._event.wait()
        finally:
            self.waiting -= 1


class Wakeup:
    """Wakes one consumer. ``set`` is remembered until the consumer's next ``wait``; setting twice wakes once."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = trio.Event()

    def __repr__(self) -> str:
        return f"<Wakeup{' set' if self.is_set else ''}>"

    @property
    def is_set(self) -> bool:
        """Whether the next ``wait`` returns at once."""
        return self._event.is_set()

    def set(self) -> None:
        """Wakes the consumer, now or at its next ``wait``. Synchronous."""
        self._event.set()

    async def wait(self) -> None:
        """Waits for a ``set`` that has not been waited for yet, and forgets it.

        **Cancels:** before it has been set; a ``set`` is then not forgotten.
        """
        await self._event.wait()
        self._event = trio.Event()


@contextlib.asynccontextmanager
async def open_service(*tasks: Callable[[], Awaitable[None]]) -> AsyncIterator[trio.Nursery]:
    """Runs background tasks for as long as the block lasts, and cancels them when it ends.

    Yields:
        The nursery of the tasks, for a service that starts more of them.
    """
    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(task)
        try:
            yield nursery
        finally:
            nursery.cancel_scope.cancel()
