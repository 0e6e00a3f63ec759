"""The circuit breaker of one target."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trigate.breaker import MAX_COOLDOWN_S, Breaker
from trigate.config import BreakerConfig, Count, Limit, Seconds, Share

RULES = BreakerConfig(
    failures=Limit(3), failure_rate=Share(0.5), window_s=Seconds(10), min_calls=Count(10), cooldown_s=Seconds(4)
)


def tripped(at: float = 0.0) -> Breaker:
    """One that has just opened."""
    breaker = Breaker(RULES)
    for _ in range(3):
        assert breaker.enter(at)
        breaker.fail(at)
    return breaker


def test_failures_in_a_row_open_it() -> None:
    """One that goes well in between begins the row anew."""
    breaker = Breaker(RULES)
    breaker.fail(0)
    breaker.fail(0)
    breaker.succeed(0)
    breaker.fail(0)
    breaker.fail(0)
    assert (breaker.state(0), breaker.enter(0)) == ("closed", True)
    breaker.fail(0)
    assert (breaker.state(0), breaker.enter(0), breaker.opens_in_s(1)) == ("open", False, 3)


def test_a_rate_opens_it() -> None:
    """Every other call fails: never three in a row, and half of ten."""
    breaker = Breaker(RULES)
    for _ in range(4):
        breaker.succeed(1)
        breaker.fail(1)
    assert breaker.state(1) == "closed"
    breaker.succeed(1)
    breaker.fail(1)
    assert breaker.state(1) == "open"


def test_old_calls_count_no_more() -> None:
    """A window that is long over says nothing."""
    breaker = Breaker(RULES)
    for _ in range(4):
        breaker.fail(0)
        breaker.succeed(0)
    breaker.fail(100)
    breaker.succeed(100)
    breaker.fail(100)
    assert breaker.state(100) == "closed"


def test_one_probe() -> None:
    """After the cool-down one call tries it; the others are refused until that one has ended."""
    breaker = tripped()
    assert not breaker.enter(3.9)
    assert breaker.state(4) == "half_open"
    assert [breaker.enter(4) for _ in range(3)] == [True, False, False]
    breaker.abandon()
    assert [breaker.enter(5) for _ in range(2)] == [True, False]
    breaker.succeed(5)
    assert (breaker.state(5), breaker.enter(5)) == ("closed", True)


def test_a_probe_that_fails_doubles_the_wait() -> None:
    """Up to a minute; once it has gone well, the wait is the first one again."""
    breaker, now, waits = tripped(), 0.0, []
    for _ in range(6):
        waits.append(breaker.opens_in_s(now))
        now += breaker.opens_in_s(now)
        assert breaker.enter(now)
        breaker.fail(now)
    assert waits == [4, 8, 16, 32, MAX_COOLDOWN_S, MAX_COOLDOWN_S]
    now += breaker.opens_in_s(now)
    assert breaker.enter(now)
    breaker.succeed(now)
    for _ in range(3):
        breaker.fail(now)
    assert breaker.opens_in_s(now) == 4


def test_a_provider_that_says_when() -> None:
    """It is taken at its word at once; a later answer of a call that was under way does not close it again."""
    breaker = Breaker(RULES)
    assert breaker.enter(0)
    assert breaker.enter(0)
    breaker.fail(0, retry_after_s=20)
    breaker.succeed(1)
    assert breaker.opens_in_s(1) == 19
    breaker.fail(2, retry_after_s=5)
    assert breaker.opens_in_s(2) == 18


@pytest.mark.parametrize("rules", [BreakerConfig(failures=Limit(0), failure_rate=Share(0))])
def test_switched_off(rules: BreakerConfig) -> None:
    """It opens for nothing but a word of the provider."""
    breaker = Breaker(rules)
    for _ in range(1000):
        breaker.fail(0)
    assert breaker.enter(0)
    breaker.fail(0, retry_after_s=1)
    assert not breaker.enter(0)


@given(st.lists(st.tuples(st.sampled_from(["enter", "succeed", "fail", "later", "abandon"]), st.floats(0, 9))))
def test_it_never_stays_shut(steps: list[tuple[str, float]]) -> None:
    """Whatever happens, some time after the last call has ended one is let through; and never two probes at once."""
    breaker, now, inside, probes = Breaker(RULES), 0.0, 0, 0
    for what, pause_s in steps:
        now += pause_s
        if what == "enter":
            half_open = breaker.state(now) == "half_open"
            if breaker.enter(now):
                inside += 1
                probes += half_open
                assert probes <= 1
        elif inside:
            inside -= 1
            probes = 0
            match what:
                case "succeed":
                    breaker.succeed(now)
                case "fail":
                    breaker.fail(now)
                case "later":
                    breaker.fail(now, retry_after_s=pause_s)
                case _:
                    breaker.abandon()
    for _ in range(inside):
        breaker.abandon()
    later = now + breaker.opens_in_s(now) + MAX_COOLDOWN_S
    breaker.abandon()
    assert breaker.enter(later)
