"""What has to be told to the outside, until it has been: attempts, back-off, and what became of them.

A delivery is a row of the store (`store.Delivery`) that is written with what it tells of. An attempt is: the row
becomes ``sending``, durably; it is sent by the carrier of its channel; what came of it is noted, durably. So at any
moment the row says what may have happened, and a process that dies leaves nothing but rows. Those of a dead worker are
taken over (`workers.Workers.adopt_with`): one that was being sent is sent again where the receiver can tell the
repetition by its id, and is ``unknown`` where it cannot.

Each target of a channel gets one delivery at a time, the one that has been due for the longest. The store sees to that
(`store.Deliveries.take`), over all workers. One that waits for its next attempt holds nobody up.

An attempt is shielded from cancellation, since nobody can say how far it has come when it is cut. It is bounded by
`ATTEMPT_S`; once the outbox closes, by `GRACE_S`.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

import attrs
import structlog
import trio

from trigate.errors import StoreUnavailable
from trigate.store.interface import Store
from trigate.store.records import Delivery, DeliveryState
from trigate.workers.membership import Workers

log = structlog.get_logger("trigate.runs.outbox")

ATTEMPT_S = 30.0
"""How long an attempt may take."""
AT_ONCE = 16
"""How many attempts a worker makes at once."""
GRACE_S = 3.0
"""How long attempts may go on when the outbox closes."""
SCHEDULE_S = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
"""How long the pause after each attempt is at most; after the last, there is no further attempt.

**Source:** the example of a schedule in the Standard Webhooks specification 1.0.0, "Deliverability and reliability".
"""
MAX_AFTER_S = 86_400.0
"""The longest pause that a receiver can ask for."""
LOOK_S = 60.0
"""How often the store is asked, whatever is known: another worker may have ended and left something for later."""
_RETRY_S = 0.25
_MAX_RETRY_S = 5.0
_NOTE_S = 2.0
"""How long the store may take, beyond the grace, when the outbox closes."""


@attrs.frozen(kw_only=True)
class Receipt:
    """How an attempt ended.

    Attributes:
        delivered: It arrived.
        again: Worth another attempt; else it has failed for good.
        after_s: The receiver said when: no further attempt is made before. None = it did not.
        status: HTTP's; 0 = there was none.
        error: What is wrong, without a secret in it.
        unsure: It may have arrived although nobody said so.
    """

    delivered: bool
    again: bool = False
    after_s: float | None = None
    status: int = 0
    error: str | None = None
    unsure: bool = False


_CUT = Receipt(delivered=False, again=True, error="the gateway was shutting down", unsure=True)


class Carrier(Protocol):
    """Who can deliver on a channel. Whatever it raises is an attempt that failed."""

    async def deliver(self, delivery: Delivery) -> Receipt:
        """Makes one attempt. Bounded in time by the outbox."""


def pause_s(attempts: int, *, after_s: float | None, chance: float) -> float | None:
    """How long to wait after so many attempts; None = there is no further one.

    Anything from nothing to what the schedule says ("full jitter"): receivers that come back should not be met by
    everybody at once. But never less than the receiver asked for, up to `MAX_AFTER_S`.

    Args:
        attempts: How many have been made, at least 1.
        after_s: What the receiver asked for.
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
    """What a delivery is after an attempt; ``pending`` = it is worth another one, as far as the schedule goes."""
    if receipt.delivered:
        return "delivered"
    if receipt.unsure and not delivery.repeatable:
        return "unknown"
    return "pending" if receipt.again else "failed"


class Outbox:
    """The deliveries that this worker makes. Made by `open_outbox`."""

    carriers: dict[str, Carrier]
    """By the name of the channel; may change at any time, and then `look` has to be told. What is for a channel that
    has none stays where it is."""

    def __init__(self, store: Store, workers: Workers, now: Callable[[], float], chance: Callable[[], float]) -> None:
        self.carriers = {}
        self._store = store
        self._workers = workers
        self._now = now
        self._chance = chance
        self._wanted = trio.Event()
        self._idle = trio.Event()
        self._under_way = 0
        self._closes_at: float | None = None  # in Trio's time, as scopes take it
        self._attempts: set[trio.CancelScope] = set()
        self._shields: set[trio.CancelScope] = set()
        self._troubled = False

    def __repr__(self) -> str:
        return f"<Outbox {self._under_way} under way, for {len(self.carriers)} channels>"

    def look(self) -> None:
        """There is something new to deliver. Synchronous."""
        self._wanted.set()

    async def wait_idle(self) -> None:
        """Waits until nothing is under way, and nothing can be begun now: what waits for a later time may remain."""
        if not self._workers.is_joined:  # there cannot be anything
            await trio.lowlevel.checkpoint()
            return
        self._idle = trio.Event()
        self.look()
        await self._idle.wait()

    async def adopt(self, worker: str, dead: Sequence[str]) -> None:
        """Takes over from workers that have died."""
        for delivery in await self._store.deliveries.release(dead=dead):
            _tell(delivery, state=delivery.state, status=0, error=delivery.last_error, next_in_s=None)
        self.look()  # also for what waits for a time that only they knew

    # -- taking -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Delivers what is due, for ever."""
        await self._workers.wait_joined()
        retry_s = _RETRY_S
        async with trio.open_nursery() as nursery:
            while True:
                self._wanted = trio.Event()
                wait_s = LOOK_S
                try:
                    with self._shield(_NOTE_S):  # what is taken must not get lost between the store and here
                        wait_s = await self._take(nursery)
                    retry_s = _RETRY_S
                except StoreUnavailable as error:
                    self._note_trouble(error)
                    wait_s, retry_s = retry_s, min(2 * retry_s, _MAX_RETRY_S)
                except Exception:  # a defect; what is under way goes on, and the next look may be better
                    log.exception("outbox_crashed")
                if not self._under_way and wait_s > 0 and not self._wanted.is_set():
                    self._idle.set()
                with trio.move_on_after(wait_s):
                    await self._wanted.wait()

    async def _take(self, nursery: trio.Nursery) -> float:
        """Begins as many attempts as may be; returns for how long nothing more can be done, unless `look` is told."""
        places = AT_ONCE - self._under_way
        channels = tuple(self.carriers)
        if not places or not channels:
            return LOOK_S  # noqa: ASYNC910 - who calls it waits
        at = self._now()
        taken = await self._store.deliveries.take(self._workers.id, at=at, limit=places, channels=channels)
        for delivery in taken:
            self._under_way += 1
            nursery.start_soon(self._deliver, delivery)
        if len(taken) == places:
            self._workers.notify("outbox")  # there may be more than can be done here
            return LOOK_S
        due_at = await self._store.deliveries.next_due_at(channels)
        self._note_no_trouble()
        return LOOK_S if due_at is None else min(max(due_at - self._now(), 0.0), LOOK_S)

    # -- an attempt ---------------------------------------------------------------------------------------------------

    async def _deliver(self, delivery: Delivery) -> None:  # noqa: ASYNC910 - who takes waits
        try:
            with self._shield(_NOTE_S):
                receipt = await self._attempt(delivery)
                await self._note(delivery, receipt)
        except Exception:  # a defect; it stays as it is, until another worker takes over from this one
            log.exception("outbox_crashed")
        finally:
            self._under_way -= 1
            self.look()

    async def _attempt(self, delivery: Delivery) -> Receipt | None:
        """Makes an attempt; None = it was not made."""
        carrier = self.carriers.get(delivery.channel)
        if carrier is None or self._is_closing():
            await trio.lowlevel.checkpoint()
            return None
        with trio.move_on_after(ATTEMPT_S) as bound:
            self._attempts.add(bound)
            try:
                return await carrier.deliver(delivery)
            except Exception as error:
                log.exception("delivery_crashed", delivery=delivery.id, channel=delivery.channel)
                return Receipt(  # noqa: ASYNC910 - noting it waits
                    delivered=False, again=True, error=f"internal: {type(error).__name__}", unsure=True
                )
            finally:
                self._attempts.discard(bound)
        if self._is_closing():
            return _CUT
        return Receipt(delivered=False, again=True, error=f"no answer within {ATTEMPT_S:g} s", unsure=True)

    async def _note(self, delivery: Delivery, receipt: Receipt | None) -> None:
        """Notes how an attempt ended, however long the store is unavailable."""
        at = self._now()
        due_at: float | None = None
        if receipt is None:
            state: DeliveryState = "pending"
            due_at = delivery.due_at
            receipt = Receipt(delivered=False, status=delivery.last_status, error=delivery.last_error)
        else:
            state = state_after(delivery, receipt)
            if receipt is _CUT and state == "pending":
                due_at = at  # the receiver is not to blame
            elif state == "pending":
                wait_s = pause_s(delivery.attempts, after_s=receipt.after_s, chance=self._chance())
                state, due_at = ("failed", None) if wait_s is None else ("pending", at + wait_s)
            next_in_s = None if due_at is None else round(due_at - at, 3)
            _tell(delivery, state=state, status=receipt.status, error=receipt.error, next_in_s=next_in_s)
        retry_s = _RETRY_S
        while True:
            try:
                await self._store.deliveries.note(
                    delivery.id, state=state, at=at, due_at=due_at, status=receipt.status, error=receipt.error
                )
                self._note_no_trouble()
                return
            except StoreUnavailable as error:
                self._note_trouble(error)
            await trio.sleep(retry_s)
            retry_s = min(2 * retry_s, _MAX_RETRY_S)

    # -- the end ------------------------------------------------------------------------------------------------------

    def begin_to_close(self) -> None:
        """From now on nothing is begun, and what is under way is bounded. Synchronous."""
        self._closes_at = trio.current_time() + GRACE_S
        for bound in self._attempts:
            bound.deadline = min(bound.deadline, self._closes_at)
        for shield in self._shields:
            shield.deadline = self._closes_at + _NOTE_S

    def _is_closing(self) -> bool:
        return self._closes_at is not None

    @contextlib.contextmanager
    def _shield(self, beyond_s: float) -> Iterator[None]:
        """Shields from cancellation; once the outbox closes, until so long after the grace."""
        with trio.CancelScope(shield=True) as scope:
            if self._closes_at is not None:
                scope.deadline = self._closes_at + beyond_s
            self._shields.add(scope)
            try:
                yield
            finally:
                self._shields.discard(scope)

    def _note_trouble(self, error: StoreUnavailable) -> None:
        if not self._troubled:  # once, and not at each try
            log.warning("outbox_halted", error=error.message)
        self._troubled = True

    def _note_no_trouble(self) -> None:
        if self._troubled:
            log.info("outbox_resumed")
        self._troubled = False


def _tell(delivery: Delivery, *, state: DeliveryState, status: int, error: str | None, next_in_s: float | None) -> None:
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
    """Opens the outbox; what is due is delivered from now on, once `workers.join` has been called by anybody.

    Args:
        now: Gives the POSIX time, in seconds.
        chance: Gives random numbers from 0 to 1.

    **Cancels:** attempts that are under way may go on for `GRACE_S`. What has not ended then is pending again where it
    can be repeated, else unknown; the worker that adopts what this one leaves looks for it (`Outbox.adopt`).
    """
    outbox = Outbox(store, workers, now, chance)
    workers.adopt_with(outbox.adopt)
    workers.on_notify("outbox", lambda _: outbox.look())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        try:
            yield outbox
        finally:
            outbox.begin_to_close()
            nursery.cancel_scope.cancel()
