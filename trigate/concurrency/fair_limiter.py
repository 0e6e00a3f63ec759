"""A bounded number of slots, with a queue that is fair between keys.

When no slot is free, a task waits. Slots that become free go round the waiting keys, one slot each. So a key with a
thousand calls in the queue delays the single call of another key by one slot, not by a thousand. Within a key, the
order is first come, first served.

A key may have a *priority*: a slot goes to a waiting key of the highest one, and round those of the same.

`FairLimiter.evict_longest` takes a waiting call of the key that has the most calls in the queue out of it, so that one
key cannot fill the whole queue.

A released slot goes straight to the next waiter. It is never observably free in between, and a waiter that is cancelled
never held it. No task waits while there is a free slot that it may have.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import attrs
import outcome
import trio

_SMOOTHING = 0.1


class Evicted(Exception):
    """The call lost its position in the queue to a call of another key."""


@attrs.define(eq=False)
class FairLimiter:
    """A number of slots. Each acquired slot is released with the same key.

    Args:
        limit: The number of slots.
        key_limit: How many slots one key may hold; 0 = all of them.

    Attributes:
        taken: How many slots are held.
        taken_by: The same for each key that holds a slot.
        held_s: How long a slot is held: a moving average, in seconds. 0.0 = not known yet.
    """

    _limit: int
    _key_limit: int = attrs.field(default=0, kw_only=True)
    _waiting: dict[str, deque[trio.lowlevel.Task]] = attrs.field(init=False, factory=dict)
    """The tasks of each key that has some; the key that is next comes first."""
    _priorities: dict[str, int] = attrs.field(init=False, factory=dict)
    """Those of the waiting keys that have another one than 0."""
    _queued: int = attrs.field(init=False, default=0)
    taken: int = attrs.field(init=False, default=0)
    taken_by: dict[str, int] = attrs.field(init=False, factory=dict)
    held_s: float = attrs.field(init=False, default=0.0)

    def __repr__(self) -> str:
        return f"<FairLimiter: {self.taken} of {self._limit} taken, {self._queued} wait>"

    @property
    def limit(self) -> int:
        """The number of slots."""
        return self._limit

    @property
    def queued(self) -> int:
        """How many tasks wait."""
        return self._queued

    def queued_by(self, key: str) -> int:
        """How many tasks of a key wait."""
        return len(self._waiting.get(key, ()))

    def position(self, key: str, task: trio.lowlevel.Task) -> int | None:
        """The position of a task in the queue of its key, from 1; None = it does not wait."""
        queue = self._waiting.get(key, ())
        return next((number for number, other in enumerate(queue, 1) if other is task), None)

    def change(self, limit: int, *, key_limit: int = 0) -> None:
        """Sets other limits. Slots that are held stay held."""
        if (limit, key_limit) != (self._limit, self._key_limit):
            self._limit, self._key_limit = limit, key_limit
            self._hand_over_slots()

    def is_free(self, key: str) -> bool:
        """Whether a key could acquire a slot now."""
        return self.taken < self._limit and (not self._key_limit or self.taken_by.get(key, 0) < self._key_limit)

    def is_keys_own_limit(self, key: str) -> bool:
        """Whether a key has reached its own limit."""
        return bool(self._key_limit) and self.taken_by.get(key, 0) >= self._key_limit

    def acquire_nowait(self, key: str) -> bool:
        """Acquires a slot if one is free. Returns whether it did."""
        if not self.is_free(key):
            return False
        self.taken += 1
        self.taken_by[key] = self.taken_by.get(key, 0) + 1
        return True

    async def acquire(self, key: str, priority: int = 0) -> None:
        """Waits for a slot in the queue, and holds it on return. Call it after `acquire_nowait` has returned False.

        Raises:
            Evicted: `evict_longest` took this task out of the queue. It holds no slot.

        **Cancels:** at any moment before it holds a slot.
        """
        task = trio.lowlevel.current_task()
        self._waiting.setdefault(key, deque()).append(task)
        self._queued += 1
        if priority:
            self._priorities[key] = priority

        def abort(_: Callable[[], BaseException]) -> trio.lowlevel.Abort:
            queue = self._waiting[key]
            queue.remove(task)
            if not queue:
                self._forget(key)
            self._queued -= 1
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _forget(self, key: str) -> None:
        """Removes a key that no longer waits."""
        del self._waiting[key]
        self._priorities.pop(key, None)

    def evict_longest(self, key: str, priority: int = 0) -> bool:
        """Makes a position in the queue available to one more call of a key.

        Evicts the last call of the key that has the most calls in the queue, unless that key would then have as few as
        ``key`` would have. If keys of a lower priority wait, it evicts one of theirs; it spares those of a higher one.

        Returns:
            Whether a call was evicted.
        """
        if not self._waiting:
            return False
        known = self._priorities
        longest = max(self._waiting, key=lambda other: (-known.get(other, 0), len(self._waiting[other])))
        queue, lowest = self._waiting[longest], known.get(longest, 0)
        if lowest > priority or (lowest == priority and len(queue) <= self.queued_by(key) + 1):
            return False
        self._queued -= 1
        trio.lowlevel.reschedule(queue.pop(), outcome.Error(Evicted()))
        if not queue:
            self._forget(longest)
        return True

    def release(self, key: str, held_s: float | None = None) -> None:
        """Releases a slot.

        Args:
            key: The key that acquired it.
            held_s: How long it was held, in seconds; None = this slot does not count in the average.
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
            self._hand_over_slots()

    def _hand_over_slots(self) -> None:
        while self._queued and self.taken < self._limit:
            key = self._next_key()
            if key is None:
                return
            queue = self._waiting.pop(key)
            task = queue.popleft()
            if queue:
                self._waiting[key] = queue  # behind the other keys
            else:
                self._priorities.pop(key, None)
            self._queued -= 1
            self.taken += 1
            self.taken_by[key] = self.taken_by.get(key, 0) + 1
            trio.lowlevel.reschedule(task)

    def _next_key(self) -> str | None:
        """The key that gets the next slot; None = no waiting key may have one more."""
        may_have = filter(self.is_free, self._waiting)
        if not self._priorities:
            return next(may_have, None)
        return max(may_have, key=lambda key: self._priorities.get(key, 0), default=None)  # of equal ones, the first

    def expected_wait_s(self, key: str, priority: int = 0) -> float:
        """Estimates how long one more call of a key would wait, in seconds, at the pace at which slots become free."""
        if self.is_keys_own_limit(key):
            return (self.queued_by(key) + 1) * self.held_s / self._key_limit
        keys, queued, before = len(self._waiting) + (key not in self._waiting), self._queued, 0
        if self._priorities or priority:  # those of a higher priority are before it, those of a lower one are not
            ranks = {other: self._priorities.get(other, 0) for other in self._waiting}
            before = sum(len(self._waiting[other]) for other, rank in ranks.items() if rank > priority)
            equal = {other for other, rank in ranks.items() if rank == priority}
            keys, queued = len(equal | {key}), sum(len(self._waiting[other]) for other in equal)
        ahead = before + min(queued, (self.queued_by(key) + 1) * keys - 1)
        return (ahead + 1) * self.held_s / self._limit if self._limit else math.inf
