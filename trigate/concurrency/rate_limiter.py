"""Limits how often something may happen, for each key. Pure: the time is an argument.

The algorithm is GCRA, the leaky bucket without a timer. One number is kept for each key: when its debt will be paid.
What is allowed adds ``1 / rate`` to the debt, what is refused adds nothing, and the debt may not exceed
``burst / rate``. So over any window of ``w`` seconds at most ``burst + rate × w`` are allowed.

Memory is bounded by the number of keys. When there are too many, the one goes whose debt will be paid first (that of
most has been, and then nothing is lost). One with a large debt stays: nobody gets rid of theirs by asking under many
other names.

Source: ITU-T Recommendation I.371, the Generic Cell Rate Algorithm in its virtual scheduling form.
"""

from __future__ import annotations

import heapq

_ROUNDING_S = 1e-9
"""Sums of intervals are not exact, and the last one of a burst must not be refused for that."""


class RateLimiter:
    """The debts of the keys.

    Args:
        max_keys: How many are kept.
    """

    def __init__(self, *, max_keys: int = 10_000) -> None:
        self._max_keys = max_keys
        self._paid_at_s: dict[str, float] = {}
        # Every pair of the dict, and pairs that were in it: the latter are left until they come to the front, or are
        # as many as the former could be.
        self._order: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._paid_at_s)

    def __repr__(self) -> str:
        return f"RateLimiter({len(self)} of {self._max_keys} keys)"

    def take(self, key: str, *, rate_per_s: float, burst: int, now: float) -> float:
        """Counts one, if it is allowed.

        Args:
            key: Whose it is.
            rate_per_s: How many are allowed in the long run; more than 0.
            burst: How many are allowed at once; at least 1.
            now: Seconds of a clock that does not go back.

        Returns:
            0.0 if it is allowed; otherwise in how many seconds one will be.

        >>> rates = RateLimiter()
        >>> [rates.take("a", rate_per_s=2.0, burst=2, now=now) for now in (0.0, 0.0, 0.0, 0.25, 0.5)]
        [0.0, 0.0, 0.5, 0.25, 0.0]
        """
        interval_s = 1 / rate_per_s
        paid_at_s = max(self._paid_at_s.get(key, now), now)
        wait_s = paid_at_s - (burst - 1) * interval_s - now
        if wait_s > _ROUNDING_S:
            return wait_s
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
