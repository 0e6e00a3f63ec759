"""`trigate.concurrency.rate_limiter`: the bound holds over any window, for each key separately, in bounded memory."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trigate.concurrency.rate_limiter import RateLimiter

# Powers of two: their sums and quotients are exact, so the assertions can be exact too.
rates_per_s = st.sampled_from([0.125, 0.5, 1.0, 2.0, 8.0])
bursts = st.integers(1, 6)
times = st.lists(st.integers(0, 48), max_size=60).map(
    lambda gaps: [0.0625 * ticks for ticks in itertools.accumulate(gaps)]
)


def _allowed(times: list[float], *, rate_per_s: float, burst: int) -> list[float]:
    rates = RateLimiter()
    return [now for now in times if rates.take("key", rate_per_s=rate_per_s, burst=burst, now=now) == 0.0]


@settings(deadline=None)
@given(times=times, rate_per_s=rates_per_s, burst=bursts)
def test_any_window(times: list[float], rate_per_s: float, burst: int) -> None:
    """Between any two times, at most ``burst + rate × seconds`` requests are allowed."""
    allowed = _allowed(times, rate_per_s=rate_per_s, burst=burst)
    for first, last in itertools.combinations_with_replacement(range(len(allowed)), 2):
        assert last - first + 1 <= burst + rate_per_s * (allowed[last] - allowed[first])


@settings(deadline=None)
@given(gaps=st.lists(st.integers(0, 64), max_size=30), rate_per_s=rates_per_s, burst=bursts)
def test_a_key_that_keeps_to_the_rate(gaps: list[int], rate_per_s: float, burst: int) -> None:
    """A key that never asks sooner than its rate allows is never refused."""
    times = list(itertools.accumulate((1 / rate_per_s + 0.0625 * gap for gap in gaps), initial=1000.0))
    assert _allowed(times, rate_per_s=rate_per_s, burst=burst) == times


@settings(deadline=None)
@given(times=times, rate_per_s=rates_per_s, burst=bursts)
def test_the_wait_is_right(times: list[float], rate_per_s: float, burst: int) -> None:
    """A request after the returned wait is allowed, and an earlier one is not."""
    rates = RateLimiter()
    for now in times:
        wait_s = rates.take("key", rate_per_s=rate_per_s, burst=burst, now=now)
        if wait_s:
            assert 0 < wait_s <= 1 / rate_per_s
            assert rates.take("key", rate_per_s=rate_per_s, burst=burst, now=now + wait_s / 2) == wait_s / 2
            assert rates.take("key", rate_per_s=rate_per_s, burst=burst, now=now + wait_s) == 0.0
            return


def test_a_burst() -> None:
    """After an idle time, a whole burst is allowed at once; a refused request costs nothing."""
    assert _allowed([5.0] * 10, rate_per_s=1.0, burst=3) == [5.0] * 3
    assert _allowed([5.0] * 10 + [6.0] * 10, rate_per_s=1.0, burst=3) == [5.0] * 3 + [6.0]
    assert _allowed([5.0] * 10 + [500.0] * 10, rate_per_s=1.0, burst=3) == [5.0] * 3 + [500.0] * 3


@settings(deadline=None)
@given(requests=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 20)), max_size=40), rate_per_s=rates_per_s)
def test_keys_are_independent(requests: list[tuple[str, int]], rate_per_s: float) -> None:
    """The requests of one key do not affect another key."""
    moments = list(itertools.accumulate((0.0625 * gap for _, gap in requests)))
    both = RateLimiter()
    separate = {"a": RateLimiter(), "b": RateLimiter()}
    for (key, _), now in zip(requests, moments, strict=True):
        together = both.take(key, rate_per_s=rate_per_s, burst=2, now=now)
        assert together == separate[key].take(key, rate_per_s=rate_per_s, burst=2, now=now)


@settings(deadline=None)
@given(keys=st.lists(st.integers(0, 30), max_size=200), max_keys=st.integers(1, 8))
def test_memory_is_bounded(keys: list[int], max_keys: int) -> None:
    """However many keys there are, and however often each one asks, no more than ``max_keys`` are kept."""
    rates = RateLimiter(max_keys=max_keys)
    for now, key in enumerate(keys):
        rates.take(str(key), rate_per_s=1.0, burst=4, now=now / 4)
        assert len(rates) <= max_keys
        assert len(rates._order) <= 2 * max_keys
    assert repr(rates) == f"RateLimiter({len(rates)} of {max_keys} keys)"


def test_a_paid_debt_is_forgotten_first() -> None:
    """When there are too many keys, those whose debt is paid are forgotten, though other keys are older."""
    rates = RateLimiter(max_keys=2)
    for _ in range(5):
        rates.take("indebted", rate_per_s=0.1, burst=5, now=0.0)
    rates.take("paid", rate_per_s=10.0, burst=5, now=1.0)
    assert rates.take("new", rate_per_s=10.0, burst=5, now=2.0) == 0.0
    assert rates.take("indebted", rate_per_s=0.1, burst=5, now=2.0) == 8.0


def test_a_flood_of_keys_does_not_reset_a_debt() -> None:
    """A key that has used up its burst stays refused, however many other keys follow."""
    rates = RateLimiter(max_keys=10)
    for _ in range(5):
        rates.take("indebted", rate_per_s=1.0, burst=5, now=0.0)
    for number in range(1000):
        rates.take(f"other-{number}", rate_per_s=1.0, burst=5, now=0.0)
    assert rates.take("indebted", rate_per_s=1.0, burst=5, now=0.0) == 1.0


def test_a_forgotten_key_starts_again() -> None:
    """A forgotten key is treated like a new one."""
    rates = RateLimiter(max_keys=1)
    assert rates.take("a", rate_per_s=1.0, burst=1, now=0.0) == 0.0
    assert rates.take("b", rate_per_s=1.0, burst=1, now=0.0) == 0.0
    assert rates.take("a", rate_per_s=1.0, burst=1, now=0.0) == 0.0
    assert rates.take("a", rate_per_s=1.0, burst=1, now=0.0) == 1.0


@pytest.mark.parametrize("rate_per_s", [3.0, 50.0, 0.7])
def test_a_burst_is_as_large_as_it_says(rate_per_s: float) -> None:
    """Rounding of the intervals does not matter: the whole burst is allowed, and no more."""
    rates = RateLimiter()
    taken = [rates.take("a", rate_per_s=rate_per_s, burst=100, now=1e5) for _ in range(101)]
    assert [wait_s == 0.0 for wait_s in taken] == [True] * 100 + [False]
