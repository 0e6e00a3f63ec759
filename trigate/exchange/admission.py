"""Who may come in: how many exchanges at once, how many a second, and not at all while the event loop is late.

`Admission.place` is a context manager: the place is given back where its block ends, whatever ended it. Who cannot have
one now waits in a fair queue (`places`), or is refused at once: the queue is full, or it can be foreseen that the wait
would be longer than it may be. A call that is bound to fail later costs more than one that fails now.

What is refused says when to try again. It is a 429 where the key is over a limit of its own, and a 503 where it is the
gateway's.
"""

from __future__ import annotations

import math
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING

import structlog
import trio

from trigate.concurrency.fair_limiter import Evicted, FairLimiter
from trigate.concurrency.rate_limiter import RateLimiter
from trigate.errors import GatewayError, Overloaded, RateLimited

if TYPE_CHECKING:
    from trigate.config.sections import LimitsConfig
    from trigate.exchange.exchange import Exchange

log = structlog.get_logger("trigate.exchange.admission")

_LOOK_S = 0.25
_LOOKS = 4


class Admission:
    """The door. Made by `gateway`.

    Args:
        most: More exchanges than this there cannot be, whatever the configuration says: file descriptors.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._rates = RateLimiter()
        self._lags: deque[float] = deque(maxlen=_LOOKS)
        self._busy = trio.Event()
        self._most_lag_s = 0.0
        self.is_late = False
        """New calls are refused until the event loop has caught up."""
        self.places = FairLimiter(most)
        self.refused = 0
        """How many were refused, so far."""

    def __repr__(self) -> str:
        return f"<Admission {self.places}>"

    def apply(self, limits: LimitsConfig) -> None:
        """Takes the limits of a new configuration; who waits is let in by them."""
        self.places.change(min(limits.max_exchanges, self._most), key_limit=limits.max_exchanges_per_key)
        self._most_lag_s = limits.loop_lag_s

    @property
    def lag_s(self) -> float:
        """How late the event loop has been all the time, lately."""
        return min(self._lags) if len(self._lags) == _LOOKS else 0.0

    def statistics(self) -> dict[str, float]:
        """What ``/status`` shows of it."""
        places = self.places
        return {
            "in_flight": places.taken,
            "limit": places.limit,
            "queued": places.queued,
            "refused": self.refused,
            "late": int(self.is_late),
            "lag_s": round(self.lag_s, 3),
        }

    def place(self, exchange: Exchange) -> _Place:
        """A place for an exchange, for as long as a block lasts: ``async with admission.place(exchange):``.

        Raises:
            RateLimited: Its key is over a limit of its own.
            Overloaded: The gateway is.

        **Cancels:** while it waits; it has no place then.
        """
        return _Place(self, exchange)

    def check(self, exchange: Exchange) -> None:
        """Counts a call against the rate of its key, and looks whether the event loop keeps up."""
        limits = exchange.generation.config.limits
        if limits.key_rate_per_s:
            wait_s = self._rates.take(
                exchange.owner, rate_per_s=limits.key_rate_per_s, burst=limits.key_burst, now=trio.current_time()
            )
            if wait_s:
                said = (
                    f"More than {limits.key_rate_per_s:g} calls a second, in the long run, is over the limit of a key."
                )
                raise self._refuse(RateLimited(said, retry_after_s=wait_s))
        if self._most_lag_s and not self._busy.is_set():
            self._busy.set()
        if self.is_late:
            said = f"The gateway is {self.lag_s:.1f} s behind, and takes no new calls until it has caught up."
            raise self._refuse(Overloaded(said))

    def _refuse(self, error: GatewayError) -> GatewayError:
        self.refused += 1
        return error

    async def wait(self, exchange: Exchange) -> None:  # noqa: ASYNC910 - who is sent away has waited
        """Waits in the queue, if that is of use."""
        limits = exchange.generation.config.limits
        key, places = exchange.owner, self.places
        now = trio.current_time()
        own = places.is_keys_own_limit(key)
        said = (
            f"{limits.max_exchanges_per_key} calls of this key are in flight, which is its limit."
            if own
            else f"{places.limit} calls are in flight, which is the limit of this gateway."
        )
        allowed_s = min(limits.queue_timeout_s or math.inf, exchange.deadline_at - now)
        expected_s = places.expected_wait_s(key)
        if expected_s > allowed_s or (self._is_full(key, limits, own=own) and (own or not places.evict_longest(key))):
            after_s = max(0.05, expected_s if places.held_s else 1.0)
            raise self._refuse(_over(said, own=own, retry_after_s=after_s))
        has_place = False
        try:
            with exchange.waiting("queued", at_most_s=allowed_s):
                await places.acquire(key)
                has_place = True
        except Evicted:
            said = f"{said} Other keys wait as well, and this one has the most calls in the queue."
        finally:
            if has_place and exchange.is_cut:
                places.release(key)
        if not has_place:
            raise self._refuse(_over(said, own=own, retry_after_s=1.0))

    def _is_full(self, key: str, limits: LimitsConfig, *, own: bool) -> bool:
        """Whether as many wait as may."""
        places = self.places
        if limits.max_queued is not None:
            return places.queued >= limits.max_queued
        if own:
            return places.queued_by(key) >= -(-limits.max_exchanges_per_key // 4)
        return places.queued >= -(-places.limit // 4)

    async def run(self) -> None:
        """Looks how late the event loop is, while there are exchanges and it matters; for ever."""
        while True:
            await self._busy.wait()
            due = trio.current_time() + _LOOK_S
            await trio.sleep_until(due)
            self._lags.append(trio.current_time() - due)
            late = bool(self._most_lag_s) and self.lag_s > self._most_lag_s
            if late is not self.is_late:
                self.is_late = late
                log.warning("event_loop_late", late=late, lag_s=round(self.lag_s, 3))
            if not self.places.taken and not late:
                self._busy = trio.Event()
                self._lags.clear()


def _over(said: str, *, own: bool, retry_after_s: float) -> GatewayError:
    """A refusal for the key's own limit, or for the gateway's."""
    if own:
        return RateLimited(said, retry_after_s=retry_after_s)
    return Overloaded(said, retry_after_s=retry_after_s)


class _Place:
    """See `Admission.place`. Written out: this is on the way of every call."""

    __slots__ = ("_admission", "_exchange", "_since")

    def __init__(self, admission: Admission, exchange: Exchange) -> None:
        self._admission = admission
        self._exchange = exchange

    async def __aenter__(self) -> None:  # noqa: ASYNC910 - where a place is free
        admission, exchange = self._admission, self._exchange
        admission.check(exchange)
        if not admission.places.acquire_nowait(exchange.owner):
            await admission.wait(exchange)
        self._since = trio.current_time()

    async def __aexit__(  # noqa: ASYNC910
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._admission.places.release(self._exchange.owner, trio.current_time() - self._since)
