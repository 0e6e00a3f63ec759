"""A histogram: a count for each bucket, and a sum."""

from __future__ import annotations

from bisect import bisect_left


class Histogram:
    """Counts values by buckets. To observe a value costs a binary search and two additions.

    Args:
        bounds: The upper bounds of the buckets, each inclusive, in ascending order. The last bucket has none.

    Attributes:
        counts: How many values each bucket has.
        total: The sum of the values.

    >>> histogram = Histogram((1.0, 4.0))
    >>> for value in (0.5, 1.0, 3, 5): histogram.observe(value)
    >>> histogram.counts, histogram.total
    ([2, 1, 1], 9.5)
    """

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value
