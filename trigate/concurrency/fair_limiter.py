"""A bounded number of places, and a fair queue before them.

Who finds no place free waits, and places that come free go round the keys that wait, one each: a key with a thousand
calls in the queue keeps another one's single call waiting for one place, not for a thousand. Within a key it is first
come, first served.

Who waits may be sent away for somebody else (`FairLimiter.evict_longest`), so that one key does not fill the whole
queue.

A place is handed over: it never looks free to a third one in between, and who is cancelled while it waits has never had
one. Nobody waits while there is a place that it may have.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import outcome
import trio

_SMOOTHING = 0.1


class Evicted(Exception):
    """Another key's call has got the place in the queue."""


class FairLimiter:
    """Some places. Who has taken one gives it back, with the same key.

    Args:
        limit: How many there are.
        key_limit: How many of them one key may have; 0 = all.
    """

    __slots__ = ("_key_limit", "_limit", "_queued", "_waiting", "held_s", "taken", "taken_by")

    def __init__(self, limit: int, *, key_limit: int = 0) -> None:
        self._limit = limit
        self._key_limit = key_limit
        self._waiting: dict[str, deque[trio.lowlevel.Task]] = {}  # the next key first
        self._queued = 0
        self.taken = 0
        self.taken_by: dict[str, int] = {}
        self.held_s = 0.0
        """For how long places are held: a moving average."""

    def __repr__(self) -> str:
        return f"<FairLimiter: {self.taken} of {self._limit} taken, {self._queued} wait>"

    @property
    def limit(self) -> int:
        """How many there are."""
        return self._limit

    @property
    def queued(self) -> int:
        """How many wait."""
        return self._queued

    def queued_by(self, key: str) -> int:
        """How many of a key wait."""
        return len(self._waiting.get(key, ()))

    def position(self, key: str, task: trio.lowlevel.Task) -> int | None:
        """At which place in its key's queue a task waits, from 1; None = it does not."""
        queue = self._waiting.get(key, ())
        return next((number for number, other in enumerate(queue, 1) if other is task), None)

    def change(self, limit: int, *, key_limit: int = 0) -> None:
        """Sets other limits. Who has a place keeps it."""
        if (limit, key_limit) != (self._limit, self._key_limit):
            self._limit, self._key_limit = limit, key_limit
            self._hand_on()

    def is_free(self, key: str) -> bool:
        """Whether a key could have one now."""
        return self.taken < self._limit and (not self._key_limit or self.taken_by.get(key, 0) < self._key_limit)

    def is_keys_own_limit(self, key: str) -> bool:
        """Whether it is for its own limit that a key gets none."""
        return bool(self._key_limit) and self.taken_by.get(key, 0) >= self._key_limit

    def acquire_nowait(self, key: str) -> bool:
        """Takes a place, if one is free."""
        if not self.is_free(key):
            return False
        self.taken += 1
        self.taken_by[key] = self.taken_by.get(key, 0) + 1
        return True

    async def acquire(self, key: str) -> None:
        """Waits for a place, and has it then.

        Raises:
            Evicted: It must not wait any more (`evict_longest`), and has no place.

        **Cancels:** at any moment before it has one.
        """
        task = trio.lowlevel.current_task()
        self._waiting.setdefault(key, deque()).append(task)
        self._queued += 1

        def leave(_: Callable[[], BaseException]) -> trio.lowlevel.Abort:
            queue = self._waiting[key]
            queue.remove(task)
            if not queue:
                del self._waiting[key]
            self._queued -= 1
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(leave)

    def evict_longest(self, key: str) -> bool:
        """Makes room in the queue for one more of a key: the last call of the key that has the most is sent away. Not
        where it would have as few then as this one has; returns whether it was done."""
        if not self._waiting:
            return False
        longest = max(self._waiting, key=lambda other: len(self._waiting[other]))
        queue = self._waiting[longest]
        if len(queue) <= self.queued_by(key) + 1:
            return False
        self._queued -= 1
        trio.lowlevel.reschedule(queue.pop(), outcome.Error(Evicted()))
        return True

    def release(self, key: str, held_s: float | None = None) -> None:
        """Gives a place back.

        Args:
            held_s: For how long it was held, where that says how long places are held.
        """
        self.taken -= 1
        left = self.taken_by[key] - 1
        if left:
            self.taken_by[key] = left
        else:
            del self.taken_by[key]
        if held_s is not None:
            self.held_s += (held_s - self.held_s) * (_SMOOTHING if self.held_s else 1.0)
        if self._queued:
            self._hand_on()

    def _hand_on(self) -> None:
        while self._queued and self.taken < self._limit:
            key = next(filter(self.is_free, self._waiting), None)
            if key is None:
                return
            queue = self._waiting.pop(key)
            task = queue.popleft()
            if queue:
                self._waiting[key] = queue  # behind the other keys
            self._queued -= 1
            self.taken += 1
            self.taken_by[key] = self.taken_by.get(key, 0) + 1
            trio.lowlevel.reschedule(task)

    def expected_wait_s(self, key: str) -> float:
        """How long one more would wait, as far as can be told: for its turn, at the pace at which places come free."""
        if self.is_keys_own_limit(key):
            return (self.queued_by(key) + 1) * self.held_s / self._key_limit
        keys = len(self._waiting) + (key not in self._waiting)
        ahead = min(self._queued, (self.queued_by(key) + 1) * keys - 1)
        return (ahead + 1) * self.held_s / self._limit if self._limit else math.inf
