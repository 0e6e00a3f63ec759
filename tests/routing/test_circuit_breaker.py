"""The circuit breaker of one target."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trigate.config.sections import BreakerConfig, Count, Limit, Seconds, Share
from trigate.routing.circuit_breaker import MAX_COOLDOWN_S, Breaker, Entry

RULES = BreakerConfig(
    failures=Limit(3), failure_rate=Share(0.5), window_s=Seconds(10), min_calls=Count(10), cooldown_s=Seconds(4)
)


def tripped(at: float = 0.0) -> Breaker:
    """A breaker that has just opened."""
    breaker = Breaker(RULES)
    for _ in range(3):
        assert breaker.enter(at)
        breaker.fail(at, "call")
    return breaker


def test_consecutive_failures_open_it() -> None:
    """A success in between restarts the count."""
    breaker = Breaker(RULES)
    breaker.fail(0, "call")
    breaker.fail(0, "call")
    breaker.succeed(0, "call")
    breaker.fail(0, "call")
    breaker.fail(0, "call")
    assert (breaker.state(0), breaker.enter(0)) == ("closed", "call")
    breaker.fail(0, "call")
    assert (breaker.state(0), breaker.enter(0), breaker.opens_in_s(1)) == ("open", None, 3)


def test_a_failure_rate_opens_it() -> None:
    """Every other call fails: never three in a row, and half of ten."""
    breaker = Breaker(RULES)
    for _ in range(4):
        breaker.succeed(1, "call")
        breaker.fail(1, "call")
    assert breaker.state(1) == "closed"
    breaker.succeed(1, "call")
    breaker.fail(1, "call")
    assert breaker.state(1) == "open"


def test_old_calls_do_not_count() -> None:
    """The calls of a past window are ignored."""
    breaker = Breaker(RULES)
    for _ in range(4):
        breaker.fail(0, "call")
        breaker.succeed(0, "call")
    breaker.fail(100, "call")
    breaker.succeed(100, "call")
    breaker.fail(100, "call")
    assert breaker.state(100) == "closed"


def test_one_probe() -> None:
    """After the cool-down one call probes the target. The others are refused until it has ended."""
    breaker = tripped()
    assert not breaker.enter(3.9)
    assert breaker.state(4) == "half_open"
    assert [breaker.enter(4) for _ in range(3)] == ["probe", None, None]
    breaker.abandon("probe")
    assert [breaker.enter(5) for _ in range(2)] == ["probe", None]
    breaker.succeed(5, "probe")
    assert (breaker.state(5), breaker.enter(5)) == ("closed", "call")


@pytest.mark.parametrize(
    "end",
    [
        lambda breaker: breaker.abandon("call"),
        lambda breaker: breaker.fail(5, "call"),
        lambda breaker: breaker.succeed(5, "call"),
        lambda breaker: breaker.fail(5, "call", retry_after_s=1),
    ],
    ids=["abandoned", "failed", "went well", "failed and said when"],
)
def test_an_earlier_call_is_not_the_probe(end: Callable[[Breaker], None]) -> None:
    """However a call from before the opening ends, there is no second probe before the first one has ended."""
    breaker = tripped()
    assert breaker.enter(4) == "probe"
    end(breaker)
    assert (breaker.state(9), breaker.enter(9)) == ("half_open", None)
    breaker.succeed(9, "probe")
    assert breaker.enter(9) == "call"


def test_a_probe_does_not_override_retry_after() -> None:
    """An earlier call gets a retry time meanwhile. The probe began before that, so its success does not close the
    breaker."""
    breaker = tripped()
    assert breaker.enter(4) == "probe"
    breaker.fail(5, "call", retry_after_s=20)
    breaker.succeed(6, "probe")
    assert (breaker.opens_in_s(6), breaker.enter(24), breaker.enter(25)) == (19, None, "probe")


def test_a_failed_probe_doubles_the_wait() -> None:
    """The wait grows to at most a minute. After a success the first wait applies again."""
    breaker, now, waits = tripped(), 0.0, []
    for _ in range(6):
        waits.append(breaker.opens_in_s(now))
        now += breaker.opens_in_s(now)
        assert breaker.enter(now)
        breaker.fail(now, "probe")
    assert waits == [4, 8, 16, 32, MAX_COOLDOWN_S, MAX_COOLDOWN_S]
    now += breaker.opens_in_s(now)
    assert breaker.enter(now)
    breaker.succeed(now, "probe")
    for _ in range(3):
        breaker.fail(now, "call")
    assert breaker.opens_in_s(now) == 4


def test_retry_after_opens_it() -> None:
    """It opens at once for the given time. A later answer to an earlier call does not close it."""
    breaker = Breaker(RULES)
    assert breaker.enter(0)
    assert breaker.enter(0)
    breaker.fail(0, "call", retry_after_s=20)
    breaker.succeed(1, "call")
    assert breaker.opens_in_s(1) == 19
    breaker.fail(2, "call", retry_after_s=5)
    assert breaker.opens_in_s(2) == 18


@pytest.mark.parametrize("rules", [BreakerConfig(failures=Limit(0), failure_rate=Share(0))])
def test_a_disabled_breaker(rules: BreakerConfig) -> None:
    """Only a retry time of the provider opens it."""
    breaker = Breaker(rules)
    for _ in range(1000):
        breaker.fail(0, "call")
    assert breaker.enter(0)
    breaker.fail(0, "call", retry_after_s=1)
    assert not breaker.enter(0)


@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "succeed", "fail", "later", "abandon"]), st.floats(0, 9), st.integers(0, 9))
    )
)
def test_it_never_stays_open(steps: list[tuple[str, float, int]]) -> None:
    """In any order of events, some time after the last call has ended a call is admitted, and there are never two
    probes at once."""
    breaker, now = Breaker(RULES), 0.0
    inside: list[Entry] = []
    for what, pause_s, which in steps:
        now += pause_s
        if what == "enter":
            entry = breaker.enter(now)
            if entry is not None:
                inside.append(entry)
                assert inside.count("probe") <= 1
        elif inside:
            entry = inside.pop(which % len(inside))
            match what:
                case "succeed":
                    breaker.succeed(now, entry)
                case "fail":
                    breaker.fail(now, entry)
                case "later":
                    breaker.fail(now, entry, retry_after_s=pause_s)
                case _:
                    breaker.abandon(entry)
    for entry in inside:
        breaker.abandon(entry)
    assert breaker.enter(now + breaker.opens_in_s(now))
