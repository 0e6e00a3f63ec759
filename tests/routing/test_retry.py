"""Retry pauses, retry budgets and the providers' retry times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trigate.routing.retry import MAX_TOKENS, Budget, backoff_s, retry_after_s

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:30 GMT"}, 10.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:30 -0000"}, 10.0),
        ({"retry-after": "Tue, 14 Nov 2023 23:13:30 +0100"}, 10.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "1e9999"}, None),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after": "99999999"}, 3600.0),
        ({"retry-after": "9" * 40}, 3600.0),
        ({"retry-after-ms": "3600001"}, 3600.0),
        ({"retry-after": "Tue, 14 Nov 2024 22:13:20 GMT"}, 3600.0),
        ({"retry-after": ""}, None),
        ({"retry-after": "Tue, 99 Nov 99999999999 22:00:00 GMT"}, None),
    ],
)
def test_retry_times(headers: dict[str, str], expected: float | None) -> None:
    """Milliseconds take precedence, then seconds or a date, up to an hour. Unreadable values are ignored."""
    assert retry_after_s(headers, now_epoch_s=NOW) == expected


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_a_pause_is_bounded(tries: int, chance: float) -> None:
    """It never exceeds the longest pause, whatever the random number."""
    assert 0 <= backoff_s(tries, base_s=0.1, max_s=2.0, chance=chance) <= 2.0


@given(st.lists(st.tuples(st.sampled_from(["call", "take"]), st.floats(0, 5)), max_size=200), st.floats(0.01, 1))
def test_a_budget_is_never_exceeded(steps: list[tuple[str, float]], share: float) -> None:
    """Over any time there are at most the initial budget, a share of the calls, and one retry a second."""
    budget, now, calls, taken = Budget(share), 0.0, 0, 0
    for what, pause_s in steps:
        now += pause_s
        if what == "call":
            budget.note_call()
            calls += 1
        elif budget.take(now):
            taken += 1
        assert taken <= MAX_TOKENS + share * calls + now + 1e-6


def test_no_budget() -> None:
    """A share of 0 disables retries."""
    assert not Budget(0).take(0.0)
