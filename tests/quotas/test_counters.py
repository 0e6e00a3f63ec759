"""The counters: what they let pass, what they keep, and that nothing leaks, whatever the order of the calls."""

from __future__ import annotations

import random

import pytest

from trigate.quotas.answer_sizes import ENOUGH, UNKNOWN_TOKENS, AnswerSizes
from trigate.quotas.counters import Amounts, Budget, Counter, Limits, Rate, Requests, Reservation, Slots, Tokens
from trigate.quotas.periods import FOREVER, period_of


def rate(limit: int = 60, *, kind: type[Rate] = Requests, leased: bool = True) -> Rate:
    """A rate whose bucket is full."""
    made = kind(name="all/rate", scope="all", setting="rpm", limit=limit)
    if leased:
        made.add(limit, float(limit), 0.0)
    return made


def slots(limit: int = 2) -> Slots:
    """Slots, all of which are leased."""
    made = Slots(name="all/max_exchanges", scope="all", setting="max_exchanges", limit=limit)
    made.add(limit, 0.0, 0.0)
    return made


def budget(limit: int = 1000) -> Budget:
    """A budget, all of which is leased."""
    made = Budget(
        name="all/day/1", scope="all", setting="budgets.day", limit=limit, period="day", first_day=1, end_day=2
    )
    made.add(limit, 0.0, 0.0)
    return made


def reserved(limits: Limits, amounts: Amounts) -> Reservation:
    """Reserves at the time 0, as all limits have enough."""
    reservation = limits.reserve(amounts, 0.0)
    assert reservation is not None
    return reservation


def test_all_or_nothing() -> None:
    """A call that one counter refuses takes nothing of the others."""
    counters: tuple[Counter, ...] = (rate(), slots(1), budget(100))
    limits = Limits.of(counters)
    assert limits.all == counters
    first = reserved(limits, Amounts(cost=60))
    assert limits.first_short(Amounts(cost=1), 0.0) is counters[1]
    assert limits.first_short(Amounts(cost=41), 0.0) is counters[1]  # the call in flight may give back enough
    assert limits.reserve(Amounts(cost=1), 0.0) is None
    assert [counter.available(0.0) for counter in counters] == [59, 0, 40]
    first.settle(Amounts(cost=30), 0.0)
    assert [counter.available(0.0) for counter in counters] == [59, 1, 70]


def test_settling_twice_counts_once() -> None:
    """A second settlement changes nothing."""
    counters = (slots(2), budget(100))
    reservation = reserved(Limits.of(counters), Amounts(cost=60))
    for _ in range(2):
        reservation.settle(Amounts(cost=50), 0.0)
    assert (counters[0].held, counters[1].held, counters[1].settled) == (0, 0, 50)


def test_over_any_window_a_rate_holds() -> None:
    """Of 10 000 calls at random times, no minute has more than twice the limit, and a long time has the limit."""
    dice, limits, now, passed = random.Random(3), Limits.of([rate(60)]), 0.0, []
    for _ in range(10_000):
        now += dice.expovariate(3.0)
        reservation = limits.reserve(Amounts(), now)
        if reservation is not None:
            reservation.settle(Amounts(), now)
            passed.append(now)
    for begin in range(0, int(now) - 60, 20):
        assert sum(begin <= at < begin + 60 for at in passed) <= 120
    assert len(passed) == pytest.approx(60 + now, rel=0.01)


def test_tokens_are_corrected() -> None:
    """What a call held too much comes back; what it held too little is a debt that fills first."""
    counter = rate(600, kind=Tokens)
    reserved(Limits.of([counter]), Amounts(tokens=500)).settle(Amounts(tokens=100), 0.0)
    assert counter.available(0.0) == 500
    reserved(Limits.of([counter]), Amounts(tokens=500)).settle(Amounts(tokens=900), 0.0)
    assert counter.available(0.0) == -400
    assert counter.frees_in_s(100, 0.0) == pytest.approx(50)
    assert counter.available(40.0) == pytest.approx(0)
    assert counter.available(4000.0) == 600


def test_two_leases_of_a_rate_are_one_bucket() -> None:
    """A share moves with what may be used at once of it: two workers never have more than one would have."""
    whole, part = rate(60), rate(60, leased=False)
    for _ in range(20):
        reserved(Limits.of([whole]), Amounts())
    spare = whole.give_back(0.0)
    part.add(spare, float(spare), 0.0)
    assert (whole.share, whole.available(0.0), part.share, part.available(0.0)) == (20, 0, 40, 40)
    assert whole.available(30.0) + part.available(30.0) == pytest.approx(50)
    assert whole.available(90.0) + part.available(90.0) == pytest.approx(60)


def test_a_random_sequence_leaves_nothing() -> None:
    """After 10 000 calls that overlap at random, nothing is held, and what is settled is what the calls have cost."""
    dice = random.Random(7)
    counters: tuple[Counter, ...] = (rate(10**9, kind=Tokens), slots(50), budget(10**9))
    limits = Limits.of(counters)
    open_calls: list[Reservation] = []
    total = 0
    for _ in range(10_000):
        amounts = Amounts(tokens=dice.randrange(1000), cost=dice.randrange(100))
        if dice.random() < 0.6 and (reservation := limits.reserve(amounts, 0.0)) is not None:
            open_calls.append(reservation)
        elif open_calls:
            cost = dice.randrange(200)
            total += cost
            open_calls.pop(dice.randrange(len(open_calls))).settle(Amounts(cost=cost), 0.0)
    for each in open_calls:
        each.settle(Amounts(), 0.0)
    assert isinstance(counters[1], Slots)
    assert isinstance(counters[2], Budget)
    assert (counters[1].held, counters[2].held, counters[2].settled) == (0, 0, total)


def test_a_spent_budget_refuses_a_call_that_costs_nothing() -> None:
    """As its price may not be known."""
    counter = budget(10)
    limits = Limits.of([counter])
    reserved(limits, Amounts(cost=10)).settle(Amounts(cost=10), 0.0)
    assert limits.first_short(Amounts(), 0.0) is counter


def test_periods() -> None:
    """Weeks begin on Monday, months on their first day; the end of one is the beginning of the next."""
    for day in range(20_000, 20_800):
        for kind in ("day", "week", "month"):
            first, end = period_of(kind, day)
            assert first <= day < end
            assert period_of(kind, end)[0] == end
            assert period_of(kind, end - 1) == (first, end)
    assert period_of("total", 20_000) == (0, FOREVER)


def test_the_expected_size_of_an_answer() -> None:
    """It follows the last answers of the model, is never more than the call allows, and needs some answers first."""
    sizes = AnswerSizes()
    for _ in range(ENOUGH):
        assert sizes.expected("m", 128_000) == UNKNOWN_TOKENS
        sizes.note("m", 300)
    assert (sizes.expected("m", 128_000), sizes.expected("m", 50), sizes.expected("other", None)) == (300, 50, 4096)
