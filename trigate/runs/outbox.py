"""The outbox: delivers stored results to receivers outside, at least once where the receiver recognises repetitions.

A delivery is a row of the store (`store.records.Delivery`) that is written in the same transaction as the result that
it delivers (a transactional outbox). For each attempt the row becomes ``sending``, durably; the carrier of its channel
sends it; the outcome is recorded, durably. So the row always says what may have happened, and a process that crashes
leaves nothing but rows. Another worker takes over the rows of a dead one (`Workers.adopt_with`): a delivery that was
being sent is sent again where the receiver recognises the repetition by its id, and otherwise becomes ``unknown``.

Each target of a channel gets one delivery at a time, the one that has been due for the longest; the store ensures that
across all workers (`store.interface.Deliveries.take`). A delivery that waits for its next attempt does not hold up
others to the same target.

An attempt is shielded from cancellation, since a cancelled attempt may or may not have arrived. Each shield is bounded:
an attempt by `ATTEMPT_S`, and everything by `GRACE_S` and a little more once the outbox closes.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

import attrs
import trio

from trigate.concurrency.notify import RepeatedEvent, Wakeup, open_service
from trigate.errors import StoreUnavailable
from trigate.logs import log
from trigate.store.interface import Store
from trigate.store.records import Delivery, DeliveryState
from trigate.workers.membership import Workers

ATTEMPT_S = 30.0
"""How long one attempt may take, in seconds."""
CONCURRENCY = 16
"""How many attempts a worker makes at the same time."""
GRACE_S = 3.0
"""How long attempts in progress may continue when the outbox closes, in seconds."""
SCHEDULE_S = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
"""The longest pause after each failed attempt, in seconds; after the last pause there is one more attempt.

**Source:** the example schedule of the Standard Webhooks specification 1.0.0, "Deliverability and reliability".
"""
MAX_AFTER_S = 86_400.0
"""The longest pause that a receiver can ask for, in seconds."""
POLL_S = 60.0
"""How often the store is read without a notification, in seconds: a worker that has exited may have left deliveries
that become due later."""
_RETRY_S = 0.25
_MAX_RETRY_S = 5.0
_NOTE_S = 2.0
"""How long recording an outcome may take beyond the grace period when the outbox closes, in seconds."""


@attrs.frozen(kw_only=True)
class Receipt:
    """How an attempt ended.

    Attributes:
        delivered: The delivery has arrived.
        again: Another attempt makes sense; False = the delivery has failed for good.
        after_s: The shortest pause before the next attempt that the receiver asked for, in seconds; None = it did not.
        status: The HTTP status; 0 = there was no response.
        error: What went wrong, without secrets.
        unsure: The delivery may have arrived although no response confirms it.
    """

    delivered: bool
    again: bool = False
    after_s: float | None = None
    status: int = 0
    error: str | None = None
    unsure: bool = False


_SHUTDOWN = Receipt(delivered=False, again=True, error="the gateway was shutting down", unsure=True)


class Carrier(Protocol):
    """Delivers on a channel. An exception from it counts as a failed attempt."""

    async def deliver(self, delivery: Delivery) -> Receipt:
        """Makes one attempt. The outbox bounds its time."""


def pause_s(attempts: int, *, after_s: float | None, chance: float) -> float | None:
    """The pause before the next attempt, in seconds; None = there is no further attempt.

    The pause is random between zero and the schedule's value ("full jitter"), so that a receiver that recovers is not
    hit by all senders at once. It is never shorter than the receiver asked for, up to `MAX_AFTER_S`.

    Args:
        attempts: How many attempts have been made, at least 1.
        after_s: What the receiver asked for, in seconds.
        chance: A random number from 0 to 1.

    >>> [pause_s(number, after_s=None, chance=0.5) for number in (1, 2, 9, 10)]
    [2.5, 150.0, 43200.0, None]
    >>> pause_s(1, after_s=60.0, chance=0.5), pause_s(1, after_s=1e9, chance=0.5)
    (60.0, 86400.0)
    """
    if attempts > len(SCHEDULE_S):
        return None
    return max(SCHEDULE_S[attempts - 1] * chance, min(after_s or 0.0, MAX_AFTER_S))


def state_after(delivery: Delivery, receipt: Receipt) -> DeliveryState:
    """The state of a delivery after an attempt; ``pending`` = another attempt makes sense, if the schedule has one."""
    if receipt.delivered:
        return "delivered"
    if receipt.unsure and not delivery.repeatable:
        return "unknown"
    return "pending" if receipt.again else "failed"


@attrs.define(eq=False)
class Outbox:
    """The deliveries that this worker makes. Made by `open_outbox`.

    Attributes:
        carriers: By the name of the channel. May change at any time; call `wake` afterwards. Deliveries for a channel
            without a carrier stay pending.
    """

    _store: Store
    _workers: Workers
    _now: Callable[[], float]
    _chance: Callable[[], float]
    carriers: dict[str, Carrier] = attrs.field(factory=dict, init=False)
    _wakeup: Wakeup = attrs.field(factory=Wakeup, init=False)
    _idle: RepeatedEvent = attrs.field(factory=RepeatedEvent, init=False)
    _in_progress: int = attrs.field(default=0, init=False)
    _closes_at: float | None = attrs.field(default=None, init=False)  # in Trio's time
    _attempts: set[trio.CancelScope] = attrs.field(factory=set, init=False)
    _shields: set[trio.CancelScope] = attrs.field(factory=set, init=False)
    _is_halted: bool = attrs.field(default=False, init=False)

    def __repr__(self) -> str:
        return f"<Outbox {self._in_progress} in progress, for {len(self.carriers)} channels>"

    def wake(self) -> None:
        """Reads the store for deliveries now. Synchronous."""
        self._wakeup.set()

    async def wait_idle(self) -> None:
        """Waits until no delivery is in progress and none is due. Deliveries that are due later may remain."""
        if not self._workers.is_joined:  # the store has not been opened, so there are no deliveries
            await trio.lowlevel.checkpoint()
            return
        self.wake()
        await self._idle.wait()

    async def adopt(self, worker: str, dead: Sequence[str]) -> None:
        """Takes over the deliveries of dead workers."""
        for delivery in await self._store.deliveries.release(dead=dead):
            _log_attempt(delivery, state=delivery.state, status=0, error=delivery.last_error, next_in_s=None)
        self.wake()  # also to learn when the deliveries of dead workers become due

    # -- taking -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Delivers what is due, until it is cancelled."""
        await self._workers.wait_joined()
        retry_s = _RETRY_S
        async with trio.open_nursery() as nursery:
            while True:
                wait_s = POLL_S
                try:
                    with self._shield(_NOTE_S):  # a delivery that the store has given out must be attempted
                        wait_s = await self._take(nursery)
                    retry_s = _RETRY_S
                except StoreUnavailable as error:
                    self._note_halted(error)
                    wait_s, retry_s = retry_s, min(2 * retry_s, _MAX_RETRY_S)
                except Exception:  # a defect; deliveries in progress continue, and the next read may succeed
                    log.exception("outbox_crashed")
                if not self._in_progress and wait_s > 0 and not self._wakeup.is_set:
                    self._idle.set()
                with trio.move_on_after(wait_s):
                    await self._wakeup.wait()

    async def _take(self, nursery: trio.Nursery) -> float:
        """Starts as many attempts as possible. Returns for how long nothing more can be started, in seconds, unless
        `wake` is called."""
        free = CONCURRENCY - self._in_progress
        channels = tuple(self.carriers)
        if not free or not channels:
            await trio.lowlevel.checkpoint()
            return POLL_S
        at = self._now()
        taken = await self._store.deliveries.take(self._workers.id, at=at, limit=free, channels=channels)
        for delivery in taken:
            self._in_progress += 1
            nursery.start_soon(self._deliver, delivery)
        if len(taken) == free:
            self._workers.notify("outbox")  # there may be more than this worker can deliver
            return POLL_S
        due_at = await self._store.deliveries.next_due_at(channels)
        self._note_resumed()
        return POLL_S if due_at is None else min(max(due_at - self._now(), 0.0), POLL_S)

    # -- an attempt ---------------------------------------------------------------------------------------------------

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            with self._shield(_NOTE_S):
                receipt = await self._attempt(delivery)
                await self._record(delivery, receipt)
        except Exception:  # a defect; the row stays as it is, until another worker adopts it from this one
            log.exception("outbox_crashed")
            await trio.lowlevel.checkpoint()
        finally:
            self._in_progress -= 1
            self.wake()

    async def _attempt(self, delivery: Delivery) -> Receipt | None:
        """Makes an attempt; None = no attempt was made."""
        carrier = self.carriers.get(delivery.channel)
        if carrier is None or self._is_closing():
            await trio.lowlevel.checkpoint()
            return None
        receipt: Receipt | None = None
        with trio.move_on_after(ATTEMPT_S) as bound:
            self._attempts.add(bound)
            try:
                receipt = await carrier.deliver(delivery)
            except Exception as error:
                log.exception("delivery_crashed", delivery=delivery.id, channel=delivery.channel)
                receipt = Receipt(delivered=False, again=True, error=f"internal: {type(error).__name__}", unsure=True)
            finally:
                self._attempts.discard(bound)
        await trio.lowlevel.checkpoint()
        if receipt is not None:
            return receipt
        if self._is_closing():
            return _SHUTDOWN
        return Receipt(delivered=False, again=True, error=f"no answer within {ATTEMPT_S:g} s", unsure=True)

    async def _record(self, delivery: Delivery, receipt: Receipt | None) -> None:
        """Records how an attempt ended, however long the store is unavailable."""
        at = self._now()
        due_at: float | None = None
        if receipt is None:
            state: DeliveryState = "pending"
            due_at = delivery.due_at
            receipt = Receipt(delivered=False, status=delivery.last_status, error=delivery.last_error)
        else:
            state = state_after(delivery, receipt)
            if receipt is _SHUTDOWN and state == "pending":
                due_at = at  # the receiver did not fail, so there is no pause
            elif state == "pending":
                wait_s = pause_s(delivery.attempts, after_s=receipt.after_s, chance=self._chance())
                state, due_at = ("failed", None) if wait_s is None else ("pending", at + wait_s)
            next_in_s = None if due_at is None else round(due_at - at, 3)
            _log_attempt(delivery, state=state, status=receipt.status, error=receipt.error, next_in_s=next_in_s)
        retry_s = _RETRY_S
        while True:
            try:
                await self._store.deliveries.note(
                    delivery.id, state=state, at=at, due_at=due_at, status=receipt.status, error=receipt.error
                )
                self._note_resumed()
                return
            except StoreUnavailable as error:
                self._note_halted(error)
            await trio.sleep(retry_s)
            retry_s = min(2 * retry_s, _MAX_RETRY_S)

    # -- closing ------------------------------------------------------------------------------------------------------

    def begin_to_close(self) -> None:
        """Starts no more attempts, and bounds those in progress by `GRACE_S`. Synchronous."""
        self._closes_at = trio.current_time() + GRACE_S
        for bound in self._attempts:
            bound.deadline = min(bound.deadline, self._closes_at)
        for shield in self._shields:
            shield.deadline = self._closes_at + _NOTE_S

    def _is_closing(self) -> bool:
        return self._closes_at is not None

    @contextlib.contextmanager
    def _shield(self, beyond_s: float) -> Iterator[None]:
        """Shields a block from cancellation; once the outbox closes, until ``beyond_s`` after the grace period."""
        # bounded by: `begin_to_close`, which `open_outbox` calls before it cancels, sets the deadline
        with trio.CancelScope(shield=True) as scope:
            if self._closes_at is not None:
                scope.deadline = self._closes_at + beyond_s
            self._shields.add(scope)
            try:
                yield
            finally:
                self._shields.discard(scope)

    def _note_halted(self, error: StoreUnavailable) -> None:
        if not self._is_halted:  # log once, not at each try
            log.warning("outbox_halted", error=error.message)
        self._is_halted = True

    def _note_resumed(self) -> None:
        if self._is_halted:
            log.info("outbox_resumed")
        self._is_halted = False


def _log_attempt(
    delivery: Delivery, *, state: DeliveryState, status: int, error: str | None, next_in_s: float | None
) -> None:
    log.info(
        "delivery",
        delivery=delivery.id,
        run=delivery.run_id,
        channel=delivery.channel,
        attempt=delivery.attempts,
        state=state,
        status=status or None,
        error=error,
        next_in_s=next_in_s,
    )


@contextlib.asynccontextmanager
async def open_outbox(
    store: Store,
    workers: Workers,
    *,
    now: Callable[[], float] = time.time,
    chance: Callable[[], float] = random.random,
) -> AsyncIterator[Outbox]:
    """Opens the outbox. It delivers what is due from the first `Workers.join` on, whichever service calls that.

    Args:
        now: Returns the POSIX time, in seconds.
        chance: Returns random numbers from 0 to 1.

    **Cancels:** attempts in progress may continue for `GRACE_S`. A delivery whose attempt has not ended by then is
    pending again where it can be repeated, otherwise ``unknown``; if that could not be recorded, the worker that adopts
    this one's rows does it (`Outbox.adopt`).
    """
    outbox = Outbox(store, workers, now, chance)
    workers.adopt_with(outbox.adopt)
    workers.on_notify("outbox", lambda _: outbox.wake())
    async with open_service(outbox.run):
        try:
            yield outbox
        finally:
            outbox.begin_to_close()
