"""Rates: over any window no more than the burst and what the rate gives, for each key by itself, in bounded memory."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trigate.concurrency.rate_limiter import RateLimiter

# Powers of two: sums and quotients of them are exact, and so can what is demanded of them be.
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
    """Between any two moments at most ``burst + rate × seconds`` are allowed."""
    allowed = _allowed(times, rate_per_s=rate_per_s, burst=burst)
    for first, last in itertools.combinations_with_replacement(range(len(allowed)), 2):
        assert last - first + 1 <= burst + rate_per_s * (allowed[last] - allowed[first])


@settings(deadline=None)
@given(gaps=st.lists(st.integers(0, 64), max_size=30), rate_per_s=rates_per_s, burst=bursts)
def test_who_keeps_to_the_rate(gaps: list[int], rate_per_s: float, burst: int) -> None:
    """Whoever never asks sooner than the rate says is never refused."""
    times = list(itertools.accumulate((1 / rate_per_s + 0.0625 * gap for gap in gaps), initial=1000.0))
    assert _allowed(times, rate_per_s=rate_per_s, burst=burst) == times


@settings(deadline=None)
@given(times=times, rate_per_s=rates_per_s, burst=bursts)
def test_the_wait_is_right(times: list[float], rate_per_s: float, burst: int) -> None:
    """Whoever waits as long as was said is allowed, and whoever waits less is not."""
    rates = RateLimiter()
    for now in times:
        wait_s = rates.take("key", rate_per_s=rate_per_s, burst=burst, now=now)
        if wait_s:
            assert 0 < wait_s <= 1 / rate_per_s
            assert rates.take("key", rate_per_s=rate_per_s, burst=burst, now=now + wait_s / 2) == wait_s / 2
            assert rates.take("key", rate_per_s=rate_per_s, burst=burst, now=now + wait_s) == 0.0
            return


def test_a_burst() -> None:
    """After silence as many as the burst are allowed at once; what is refused costs nothing."""
    assert _allowed([5.0] * 10, rate_per_s=1.0, burst=3) == [5.0] * 3
    assert _allowed([5.0] * 10 + [6.0] * 10, rate_per_s=1.0, burst=3) == [5.0] * 3 + [6.0]
    assert _allowed([5.0] * 10 + [500.0] * 10, rate_per_s=1.0, burst=3) == [5.0] * 3 + [500.0] * 3


@settings(deadline=None)
@given(turns=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 20)), max_size=40), rate_per_s=rates_per_s)
def test_keys_are_independent(turns: list[tuple[str, int]], rate_per_s: float) -> None:
    """What one key does makes no difference to another."""
    moments = list(itertools.accumulate((0.0625 * gap for _, gap in turns)))
    both = RateLimiter()
    alone = {"a": RateLimiter(), "b": RateLimiter()}
    for (key, _), now in zip(turns, moments, strict=True):
        together = both.take(key, rate_per_s=rate_per_s, burst=2, now=now)
        assert together == alone[key].take(key, rate_per_s=rate_per_s, burst=2, now=now)


@settings(deadline=None)
@given(keys=st.lists(st.integers(0, 30), max_size=200), max_keys=st.integers(1, 8))
def test_memory_is_bounded(keys: list[int], max_keys: int) -> None:
    """However many keys there are, and however often each comes, no more are kept than was said."""
    rates = RateLimiter(max_keys=max_keys)
    for now, key in enumerate(keys):
        rates.take(str(key), rate_per_s=1.0, burst=4, now=now / 4)
        assert len(rates) <= max_keys
        assert len(rates._order) <= 2 * max_keys
    assert repr(rates) == f"RateLimiter({len(rates)} of {max_keys} keys)"


def test_who_owes_nothing_goes_first() -> None:
    """When there are too many keys, those go whose debt has passed, though others came before them."""
    rates = RateLimiter(max_keys=2)
    for _ in range(5):
        rates.take("indebted", rate_per_s=0.1, burst=5, now=0.0)
    rates.take("paid", rate_per_s=10.0, burst=5, now=1.0)
    assert rates.take("new", rate_per_s=10.0, burst=5, now=2.0) == 0.0
    assert rates.take("indebted", rate_per_s=0.1, burst=5, now=2.0) == 8.0


def test_a_debt_cannot_be_washed_away() -> None:
    """Whoever has used up a burst stays refused, however many other keys come after."""
    rates = RateLimiter(max_keys=10)
    for _ in range(5):
        rates.take("indebted", rate_per_s=1.0, burst=5, now=0.0)
    for number in range(1000):
        rates.take(f"other-{number}", rate_per_s=1.0, burst=5, now=0.0)
    assert rates.take("indebted", rate_per_s=1.0, burst=5, now=0.0) == 1.0


def test_a_key_that_went_begins_anew() -> None:
    """A key that had to go is like one that never came, and nothing is left of it."""
    rates = RateLimiter(max_keys=1)
    assert rates.take("a", rate_per_s=1.0, burst=1, now=0.0) == 0.0
    assert rates.take("b", rate_per_s=1.0, burst=1, now=0.0) == 0.0
    assert rates.take("a", rate_per_s=1.0, burst=1, now=0.0) == 0.0
    assert rates.take("a", rate_per_s=1.0, burst=1, now=0.0) == 1.0


@pytest.mark.parametrize("rate_per_s", [3.0, 50.0, 0.7])
def test_a_burst_is_as_large_as_it_says(rate_per_s: float) -> None:
    """Whatever its intervals add up to in binary: all of it is allowed, and no more."""
    rates = RateLimiter()
    taken = [rates.take("a", rate_per_s=rate_per_s, burst=100, now=1e5) for _ in range(101)]
    assert [wait_s == 0.0 for wait_s in taken] == [True] * 100 + [False]
