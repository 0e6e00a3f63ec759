"""Admission: limits the exchanges in flight, the rate of calls of each key, and the load of the event loop.

`Admission.slot` is a context manager that releases the slot at the end of its block. An exchange that finds no free
slot waits in a fair queue (`concurrency.fair_limiter`). It is refused at once if the queue is full, or if the expected
wait is longer than the exchange may wait: a call that fails now costs less than one that fails after a wait.

A refusal says when to try again. It is a 429 if the key exceeds a limit of its own, and a 503 if the gateway is
overloaded.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from types import TracebackType

import attrs
import trio

from trigate.concurrency.fair_limiter import Evicted, FairLimiter
from trigate.concurrency.notify import Wakeup
from trigate.concurrency.rate_limiter import RateLimiter
from trigate.config.sections import LimitsConfig
from trigate.errors import GatewayError, Overloaded, RateLimited
from trigate.exchange.state import ExchangeState
from trigate.logs import log

_SAMPLE_S = 0.25
_SAMPLES = 4


@attrs.frozen(kw_only=True)
class AdmissionStatistics:
    """A snapshot of `Admission`.

    Attributes:
        in_flight: Exchanges that have a slot.
        limit: The number of slots.
        queued: Exchanges that wait for a slot.
        refused: Exchanges that were refused since the start.
        is_late: New calls are refused until the event loop has caught up.
        lag_s: How late the event loop is.
    """

    in_flight: int
    limit: int
    queued: int
    refused: int
    is_late: bool
    lag_s: float


class Admission:
    """Admits exchanges.

    Args:
        max_exchanges: The bound of the process (file descriptors). The configuration cannot exceed it.

    Attributes:
        slots: The slots, and the queue for them.
        is_late: New calls are refused until the event loop has caught up.
        refused: How many exchanges were refused.
    """

    def __init__(self, max_exchanges: int) -> None:
        self._max_exchanges = max_exchanges
        self._rates = RateLimiter()
        self._lags: deque[float] = deque(maxlen=_SAMPLES)
        self._busy = Wakeup()
        self._max_lag_s = 0.0
        self.is_late = False
        self.slots = FairLimiter(max_exchanges)
        self.refused = 0

    def __repr__(self) -> str:
        return f"<Admission {self.slots}>"

    def apply(self, limits: LimitsConfig) -> None:
        """Applies the limits of a new configuration, also to queued exchanges."""
        self.slots.change(min(limits.max_exchanges, self._max_exchanges), key_limit=limits.max_exchanges_per_key)
        self._max_lag_s = limits.loop_lag_s

    @property
    def lag_s(self) -> float:
        """How late the event loop has been in all of the last samples."""
        return min(self._lags) if len(self._lags) == _SAMPLES else 0.0

    def statistics(self) -> AdmissionStatistics:
        """Returns a snapshot."""
        slots = self.slots
        return AdmissionStatistics(
            in_flight=slots.taken,
            limit=slots.limit,
            queued=slots.queued,
            refused=self.refused,
            is_late=self.is_late,
            lag_s=round(self.lag_s, 3),
        )

    def slot(self, exchange: ExchangeState) -> _Slot:
        """Returns a context manager that holds a slot: ``async with admission.slot(exchange):``.

        Raises:
            RateLimited: The key exceeds a limit of its own.
            Overloaded: The gateway is at its limit, or its event loop is late.

        **Cancels:** while the exchange is queued; it has no slot then.
        """
        return _Slot(self, exchange)

    def check(self, exchange: ExchangeState) -> None:
        """Counts a call against the rate of its key, and checks that the event loop is not late.

        Raises:
            RateLimited, Overloaded: As `slot`.
        """
        limits = exchange.generation.config.limits
        if limits.key_rate_per_s:
            wait_s = self._rates.take(
                exchange.owner, rate_per_s=limits.key_rate_per_s, burst=limits.key_burst, now=trio.current_time()
            )
            if wait_s:
                message = (
                    f"More than {limits.key_rate_per_s:g} calls a second, in the long run, exceed the key's limit."
                )
                raise self._refuse(RateLimited(message, retry_after_s=wait_s))
        if self._max_lag_s and not self._busy.is_set:
            self._busy.set()
        if self.is_late:
            message = f"The gateway is {self.lag_s:.1f} s behind, and takes no new calls until it has caught up."
            raise self._refuse(Overloaded(message))

    def _refuse(self, error: GatewayError) -> GatewayError:
        self.refused += 1
        return error

    async def wait(self, exchange: ExchangeState) -> None:
        """Waits in the queue. Refuses the exchange if the queue is full, or if a slot cannot be expected in time.

        Raises:
            RateLimited, Overloaded: As `slot`.
        """
        limits = exchange.generation.config.limits
        key, slots, priority = exchange.owner, self.slots, exchange.request.key.settings.priority
        is_own = slots.is_keys_own_limit(key)
        message = (
            f"{limits.max_exchanges_per_key} calls of this key are in flight, which is its limit."
            if is_own
            else f"{slots.limit} calls are in flight, which is the limit of this gateway."
        )
        allowed_s = min(limits.queue_timeout_s or math.inf, exchange.deadline_at - trio.current_time())
        expected_s = slots.expected_wait_s(key, priority)
        is_full = self._is_full(key, limits, is_own=is_own)
        if expected_s > allowed_s or (is_full and (is_own or not slots.evict_longest(key, priority))):
            retry_after_s = max(0.05, expected_s if slots.held_s else 1.0)
            raise self._refuse(_refusal(message, is_own=is_own, retry_after_s=retry_after_s))
        has_slot = False
        try:
            with exchange.waiting_in_queue(allowed_s, functools.partial(slots.position, key, exchange.task)):
                await slots.acquire(key, priority)
                has_slot = True
        except Evicted:
            message = f"{message} Other keys wait as well, and this one has the most calls in the queue."
        finally:
            if has_slot and exchange.is_cancelled:
                slots.release(key)
        if not has_slot:
            raise self._refuse(_refusal(message, is_own=is_own, retry_after_s=1.0))

    def _is_full(self, key: str, limits: LimitsConfig, *, is_own: bool) -> bool:
        """Whether the queue is full; by default it holds a quarter of the limit."""
        slots = self.slots
        if limits.max_queued is not None:
            return slots.queued >= limits.max_queued
        if is_own:
            return slots.queued_by(key) >= -(-limits.max_exchanges_per_key // 4)
        return slots.queued >= -(-slots.limit // 4)

    async def run(self) -> None:
        """Measures how late the event loop is, while exchanges are in flight and a limit is set; never returns."""
        while True:
            await self._busy.wait()
            while True:
                due_at = trio.current_time() + _SAMPLE_S
                await trio.sleep_until(due_at)
                self._lags.append(trio.current_time() - due_at)
                is_late = bool(self._max_lag_s) and self.lag_s > self._max_lag_s
                if is_late is not self.is_late:
                    self.is_late = is_late
                    log.warning("event_loop_late", late=is_late, lag_s=round(self.lag_s, 3))
                if not self.slots.taken and not is_late:
                    self._lags.clear()
                    break


def _refusal(message: str, *, is_own: bool, retry_after_s: float) -> GatewayError:
    """Makes the refusal for the key's own limit, or for the gateway's."""
    if is_own:
        return RateLimited(message, retry_after_s=retry_after_s)
    return Overloaded(message, retry_after_s=retry_after_s)


class _Slot:
    """See `Admission.slot`. A class, since a generator costs more, and every call needs one."""

    __slots__ = ("_admission", "_exchange")

    def __init__(self, admission: Admission, exchange: ExchangeState) -> None:
        self._admission = admission
        self._exchange = exchange

    async def __aenter__(self) -> None:
        admission, exchange = self._admission, self._exchange
        admission.check(exchange)
        if not admission.slots.acquire_nowait(exchange.owner):
            await admission.wait(exchange)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        exchange = self._exchange
        since = max(exchange.started_at, exchange.admitted_at)
        self._admission.slots.release(exchange.owner, trio.current_time() - since)
