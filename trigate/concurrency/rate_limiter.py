"""Limits how often something may happen, for each key. Pure: the time is an argument.

The algorithm is GCRA, the leaky bucket without a timer. It keeps one number for each key: the time at which the debt of
the key is paid. An allowed request adds ``1 / rate`` seconds to the debt, a refused one adds nothing, and the debt may
not exceed ``burst / rate``. So over any window of ``w`` seconds, at most ``burst + rate × w`` requests are allowed.

Memory is bounded by the number of keys. When there are too many, the key whose debt is paid first is forgotten. (Most
debts have been paid, and then nothing is lost.) Keys in debt are evicted last, so a flood of new keys does not reset a
limit.

Source: ITU-T Recommendation I.371, the Generic Cell Rate Algorithm in its virtual scheduling form.
"""

from __future__ import annotations

import heapq

_ROUNDING_S = 1e-9
"""Sums of intervals are not exact, and a rounding error must not refuse the last request of a burst."""


class RateLimiter:
    """The debts of the keys.

    Args:
        max_keys: How many keys are kept.
    """

    def __init__(self, *, max_keys: int = 10_000) -> None:
        self._max_keys = max_keys
        self._paid_at_s: dict[str, float] = {}
        # A heap of every item of the dict, and of outdated items: an outdated one stays until it comes to the front, or
        # until there are as many of them as there may be keys.
        self._order: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._paid_at_s)

    def __repr__(self) -> str:
        return f"RateLimiter({len(self)} of {self._max_keys} keys)"

    def wait_s(self, key: str, *, rate_per_s: float, burst: int, now: float) -> float:
        """As `take`, but counts nothing."""
        paid_at_s = max(self._paid_at_s.get(key, now), now)
        wait_s = paid_at_s - (burst - 1) / rate_per_s - now
        return wait_s if wait_s > _ROUNDING_S else 0.0

    def take(self, key: str, *, rate_per_s: float, burst: int, now: float) -> float:
        """Counts one request, if it is allowed.

        Args:
            key: The key that makes the request.
            rate_per_s: How many requests are allowed per second in the long run; more than 0.
            burst: How many requests are allowed at once; at least 1.
            now: Seconds of a monotonic clock.

        Returns:
            0.0 if the request is allowed; otherwise after how many seconds one will be.

        >>> rates = RateLimiter()
        >>> [rates.take("a", rate_per_s=2.0, burst=2, now=now) for now in (0.0, 0.0, 0.0, 0.25, 0.5)]
        [0.0, 0.0, 0.5, 0.25, 0.0]
        """
        wait_s = self.wait_s(key, rate_per_s=rate_per_s, burst=burst, now=now)
        if wait_s:
            return wait_s
        interval_s = 1 / rate_per_s
        paid_at_s = max(self._paid_at_s.get(key, now), now)
        if key not in self._paid_at_s and len(self) >= self._max_keys:
            self._forget_one()
        self._paid_at_s[key] = paid_at_s + interval_s
        heapq.heappush(self._order, (paid_at_s + interval_s, key))
        if len(self._order) > 2 * self._max_keys:
            self._order = [(paid_at_s, key) for key, paid_at_s in self._paid_at_s.items()]
            heapq.heapify(self._order)
        return 0.0

    def _forget_one(self) -> None:
        while True:
            paid_at_s, key = heapq.heappop(self._order)
            if self._paid_at_s.get(key) == paid_at_s:
                del self._paid_at_s[key]
                return
