"""Statistics: histograms that can be merged and stored, medians with their range, ratios by pairs.

Pure: nothing here reads a clock.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import attrs

PRECISION_BITS = 6
"""A bucket is at most 1/64 of its value wide, so a percentile is off by at most 1.6 %."""

_SUB = 1 << PRECISION_BITS


def bucket_of(value: int) -> int:
    """Returns the bucket of a value: exact below 64, from there on 64 buckets for each power of two.

    >>> [bucket_of(value) for value in (0, 63, 64, 127, 128, 129, 130)]
    [0, 63, 64, 127, 128, 128, 129]
    """
    if value < _SUB:
        return max(value, 0)
    shift = value.bit_length() - 1 - PRECISION_BITS
    return ((shift + 1) << PRECISION_BITS) + (value >> shift) - _SUB


def value_of(bucket: int) -> int:
    """Returns the middle of a bucket.

    >>> [value_of(bucket) for bucket in (0, 63, 64, 127, 128, 129)]
    [0, 63, 64, 127, 129, 131]
    >>> all(bucket_of(value_of(bucket)) == bucket for bucket in range(3000))
    True
    """
    if bucket < _SUB:
        return bucket
    shift = (bucket >> PRECISION_BITS) - 1
    low = (_SUB + (bucket & (_SUB - 1))) << shift
    return low + ((1 << shift) >> 1)


class Histogram:
    """Counts of whole, non-negative values, in buckets whose width grows with the value.

    >>> latencies = Histogram([100, 200, 300, 400])
    >>> latencies.percentile(50), latencies.percentile(100), latencies.count, latencies.mean
    (201, 400, 4, 250.0)
    """

    def __init__(self, values: Iterable[int] = ()) -> None:
        self.buckets: dict[int, int] = {}
        self.count = 0
        self.total = 0
        self.low = 0
        self.high = 0
        self.add(values)

    def add(self, values: Iterable[int]) -> None:
        """Counts values. Negative ones, which can only result from arithmetic, count as 0."""
        buckets = self.buckets
        for value in values:
            value = max(value, 0)
            bucket = bucket_of(value)
            buckets[bucket] = buckets.get(bucket, 0) + 1
            self.low = min(self.low, value) if self.count else value
            self.high = max(self.high, value)
            self.count += 1
            self.total += value

    def merge(self, other: Histogram) -> None:
        """Adds the counts of another histogram.

        >>> both = Histogram([1, 2])
        >>> both.merge(Histogram([9]))
        >>> both.low, both.high, both.count
        (1, 9, 3)
        """
        if not other.count:
            return
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.low = min(self.low, other.low) if self.count else other.low
        self.high = max(self.high, other.high)
        self.count += other.count
        self.total += other.total

    @property
    def mean(self) -> float:
        """The mean of the exact values, not of their buckets; NaN if there are none."""
        return self.total / self.count if self.count else math.nan

    def percentile(self, percent: float) -> float:
        """Returns the least value that ``percent`` of the values do not exceed, within a bucket's width; NaN if there
        are none."""
        if not self.count:
            return math.nan
        wanted = max(1, math.ceil(self.count * percent / 100))
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= wanted:
                return min(max(value_of(bucket), self.low), self.high)
        return self.high

    def cumulative(self) -> list[tuple[int, float]]:
        """Returns ``(value, share of the values that do not exceed it)``, for a plot.

        >>> Histogram([1, 1, 2, 5]).cumulative()
        [(1, 0.5), (2, 0.75), (5, 1.0)]
        """
        points = []
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            points.append((value_of(bucket), seen / self.count))
        return points

    def to_json(self) -> dict[str, object]:
        """Returns the histogram as a JSON value for `from_json`."""
        return {
            "count": self.count,
            "total": self.total,
            "low": self.low,
            "high": self.high,
            "buckets": {str(bucket): count for bucket, count in sorted(self.buckets.items())},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> Histogram:
        """Reads a value of `to_json`.

        >>> Histogram.from_json(Histogram([3, 70_000]).to_json()).to_json() == Histogram([3, 70_000]).to_json()
        True
        """
        histogram = cls()
        buckets = value["buckets"]
        assert isinstance(buckets, Mapping)
        histogram.buckets = {int(bucket): int(count) for bucket, count in buckets.items()}
        for name in ("count", "total", "low", "high"):
            number = value[name]
            assert isinstance(number, int)
            setattr(histogram, name, number)
        return histogram


@attrs.frozen
class Spread:
    """The median of some rounds with the least and the greatest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Returns the spread of the values that are numbers; None if there are none.

        >>> Spread.of([3.0, 1.0, None, 2.0])
        Spread(median=2.0, low=1.0, high=3.0)
        """
        numbers = [value for value in values if value is not None and not math.isnan(value)]
        if not numbers:
            return None
        return cls(statistics.median(numbers), min(numbers), max(numbers))

    def overlaps(self, other: Spread) -> bool:
        """Whether the two ranges overlap: a difference between such spreads may be noise.

        >>> Spread(2, 1, 3).overlaps(Spread(4, 3, 5)), Spread(2, 1, 3).overlaps(Spread(5, 4, 6))
        (True, False)
        """
        return self.low <= other.high and other.low <= self.high


def pair_ratios(values: Sequence[float | None], base: Sequence[float | None]) -> Spread | None:
    """Returns the ratios of values from the same round, so that a slowdown of both cancels out.

    >>> pair_ratios([2.0, 8.0, None], [1.0, 2.0, 3.0])
    Spread(median=3.0, low=2.0, high=4.0)
    """
    return Spread.of(
        mine / theirs
        for mine, theirs in zip(values, base, strict=False)
        if mine is not None and theirs is not None and theirs > 0 and not math.isnan(mine)
    )


def recovery(
    samples: Iterable[tuple[int, int]], *, burst_at: int, slice_width: int, slack: int = 0, calm_slices: int = 4
) -> int | None:
    """Returns how long after a burst calls were served as before it again; None if they never were.

    Args:
        samples: ``(when the call was due, its latency)``, in one unit of time.
        burst_at: When the burst was due.
        slice_width: Calls are judged by the median of this much time.
        slack: "As before" is: at most twice the median before the burst, or so much more than it.
        calm_slices: This many slices in a row must be as before. A later slow slice is not caused by the burst.

    Returns:
        The time from the burst to the start of the first such row.

    >>> calm = [(at, 10) for at in range(0, 1000, 10)]
    >>> slow = [(at, 300) for at in range(1000, 1200, 10)]
    >>> recovery([*calm, *slow, *((at, 12) for at in range(1200, 2000, 10))], burst_at=1000, slice_width=50)
    200
    """
    before = []
    slices: dict[int, list[int]] = {}
    for at, latency in samples:
        if at < burst_at:
            before.append(latency)
        else:
            slices.setdefault((at - burst_at) // slice_width, []).append(latency)
    if not before:
        return None
    usual = statistics.median(before)
    limit = max(2 * usual, usual + slack)
    row: list[int] = []
    for index in sorted(slices):
        row = [*row, index] if statistics.median(slices[index]) <= limit else []
        if len(row) == calm_slices:
            return row[0] * slice_width
    return None
