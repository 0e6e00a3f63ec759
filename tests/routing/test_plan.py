"""Which target is tried next: without sockets, clocks or chance."""

from __future__ import annotations

import collections
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.gateway import make_config
from trigate.errors import (
    BadRequest,
    GatewayError,
    ProtocolViolation,
    Rejected,
    Throttled,
    Unavailable,
    UpstreamTimeout,
)
from trigate.routing.plan import Plan, Step
from trigate.routing.routes import Target
from trigate.routing.target_state import MAX_TARGETS, Targets

A, B, C = Target("a", "m"), Target("b", "m"), Target("c", "m")
DOWN = Unavailable("down", reachable=True)


def known(targets: int = 3, *, retries: Any = None, breaker: Any = None, **model: Any) -> tuple[Targets, Any]:
    """What is known of targets (nothing yet), and the configuration of a model ``x`` that has them."""
    names = "abc"[:targets]
    config = make_config(
        {name: {} for name in names},
        models={"x": {"targets": [f"{name}/m" for name in names], **model}},
        retries=retries or {},
        breaker=breaker or {},
    )
    states = Targets()
    states.apply(config)
    return states, config


def plan_of(states: Targets, config: Any) -> Plan:
    """A call for ``x``."""
    targets = tuple(map(Target.parse, config.models["x"].targets))
    return Plan("x", targets, states, config)


def walk(plan: Plan, *errors: GatewayError, now: float = 0.0, left_s: float = 100.0) -> list[Step]:
    """The steps of a call whose attempts fail so, one after the other."""
    steps = [plan.first(now, 0.5)]
    for error in errors:
        plan.end(steps[-1], now, error=error)
        step = plan.next(error, now, 0.5, left_s=left_s)
        if step is None:
            return steps
        steps.append(step)
    plan.end(steps[-1], now)
    return steps


def test_failover() -> None:
    """In order, at once, each once; then there are three attempts."""
    steps = walk(plan_of(*known()), DOWN, DOWN, DOWN)
    assert steps == [Step(A, "first"), Step(B, "failover"), Step(C, "failover")]


def test_the_same_target_again() -> None:
    """After a pause that grows; the first target has had as many tries as the second then."""
    states, config = known(2, retries={"max_attempts": 5, "backoff_s": 1})
    steps = walk(plan_of(states, config), *[DOWN] * 9)
    assert [(step.target, step.why, step.after_s) for step in steps] == [
        (A, "first", 0), (B, "failover", 0), (A, "retry", 0.5), (B, "retry", 0.5), (A, "retry", 1)
    ]  # fmt: skip
    assert [state.in_flight for _, state in states.items()] == [0, 0]


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (DOWN, 3),
        (Throttled("no", status=429), 3),
        (Rejected("no", status=408), 3),
        (Rejected("no", status=409), 3),
        (Rejected("no", status=400), 1),
        (Rejected("no", status=401), 1),
        (BadRequest("no"), 1),
        (UpstreamTimeout("slow", phase="first_token"), 1),
        (ProtocolViolation("nonsense"), 1),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_tried_again(error: GatewayError, attempts: int) -> None:
    """By one target alone: what may go better. Time is not wasted twice."""
    assert len(walk(plan_of(*known(1)), *[error] * 5)) == attempts


def test_a_slow_target_is_left_for_the_next_one() -> None:
    """A limit in time is a reason to try another one."""
    steps = walk(plan_of(*known(2)), UpstreamTimeout("slow", phase="first_token"), ProtocolViolation("nonsense"))
    assert [step.target for step in steps] == [A, B]


def test_no_time_left() -> None:
    """There is no attempt without time, and no pause that would use it up."""
    assert len(walk(plan_of(*known()), DOWN, left_s=0)) == 1
    assert len(walk(plan_of(*known(1, retries={"backoff_s": 10, "max_backoff_s": 10})), DOWN, left_s=4)) == 1


def test_who_says_when_is_waited_for() -> None:
    """Not for longer than is allowed: the client is told instead."""
    soon = Unavailable("busy", status=503, reachable=True, retry_after_s=1.5)
    late = Unavailable("busy", status=503, reachable=True, retry_after_s=3)
    steps = walk(plan_of(*known(1)), soon)
    assert [(step.why, step.after_s) for step in steps] == [("first", 0), ("retry", 1.5)]
    assert len(walk(plan_of(*known(1)), late)) == 1


def test_an_open_breaker_is_passed_over() -> None:
    """And where all are open, the call fails at once and says for how long."""
    states, config = known(2, retries={"max_attempts": 1}, breaker={"failures": 1, "cooldown_s": 7})
    assert [step.target for step in walk(plan_of(states, config), DOWN)] == [A]
    assert [step.target for step in walk(plan_of(states, config), DOWN)] == [B]
    with pytest.raises(Unavailable) as caught:
        plan_of(states, config).first(2.0, 0.5)
    assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
    step = plan_of(states, config).first(7.0, 0.5)
    assert (step.target, step.why) == (A, "first")


def test_who_came_before_the_outage_does_not_end_its_probe() -> None:
    """A call that is under way since before the breaker opened: its end is not that of the probe."""
    states, config = known(1, breaker={"failures": 1, "cooldown_s": 7})
    early, other, probing = (plan_of(states, config) for _ in range(3))
    long = early.first(0.0, 0.5)
    other.end(other.first(0.0, 0.5), 0.0, error=DOWN)
    probe = probing.first(7.0, 0.5)
    early.end(long, 8.0, judged=False)
    with pytest.raises(Unavailable):
        plan_of(states, config).first(8.0, 0.5)
    probing.end(probe, 9.0)
    assert plan_of(states, config).first(9.0, 0.5).target == A


def test_an_outage_is_not_multiplied() -> None:
    """A thousand calls of one target that is down: a fifth more, and the few that a budget holds."""
    states, config = known(1, retries={"max_attempts": 10, "budget": 0.2}, breaker={"failures": 0, "failure_rate": 0})
    attempts = sum(len(walk(plan_of(states, config), *[DOWN] * 20)) for _ in range(1000))
    assert 1190 <= attempts <= 1211


def test_hedging() -> None:
    """The second attempt is at the next target, once; its budget bounds how many calls have one."""
    states, config = known(2, strategy="hedge", hedge_delay_s=0.5, hedge_budget=0.1)
    hedged = 0
    for _ in range(1000):
        plan = plan_of(states, config)
        first = plan.first(0.0, 0.5)
        assert plan.hedge_delay_s() == 0.5
        second = plan.hedge(0.0)
        if second is not None:
            hedged += 1
            assert (second.target, second.why) == (B, "hedge")
            assert plan.hedge(0.0) is None
            assert plan.hedge_delay_s() is None
            plan.end(second, 0.0, judged=False)
        plan.end(first, 0.0)
    assert 100 <= hedged <= 111


def test_rare_calls_are_hedged_rarely() -> None:
    """The budget is a share of the calls, however much time is between them."""
    states, config = known(2, strategy="hedge", hedge_delay_s=0.5, hedge_budget=0.1)
    hedged = 0
    for number in range(100):
        plan = plan_of(states, config)
        first, second = plan.first(10.0 * number, 0.5), plan.hedge(10.0 * number + 1)
        for step in (first, second):
            if step is not None:
                plan.end(step, 10.0 * number + 2)
        hedged += second is not None
    assert 10 <= hedged <= 11


def test_the_delay_adapts() -> None:
    """It is what 95 of 100 take; while too little is known there is no hedging."""
    states, config = known(2, strategy="hedge")
    assert plan_of(states, config).hedge_delay_s() is None
    for number in range(100):
        states.of(A).note_first_token(number / 100, 0.0)
    assert plan_of(states, config).hedge_delay_s() == pytest.approx(0.95)


def test_the_delay_is_that_of_who_is_tried() -> None:
    """Where the first target is passed over, how long it took says nothing."""
    states, config = known(2, strategy="hedge")
    for _ in range(100):
        states.of(A).note_first_token(0.1, 0.0)
        states.of(B).note_first_token(3.0, 0.0)
    states.of(A).breaker.fail(0.0, "call", retry_after_s=50)
    plan = plan_of(states, config)
    assert plan.first(0.0, 0.5).target == B
    assert plan.hedge_delay_s() == pytest.approx(3.0)


def test_no_hedge_at_a_broken_target() -> None:
    """Nor where there is no other one."""
    states, config = known(2, strategy="hedge", hedge_delay_s=0.1, max_attempts=3)
    states.of(B).breaker.fail(0.0, "call", retry_after_s=9)
    plan = plan_of(states, config)
    plan.first(0.0, 0.5)
    assert plan.hedge(0.0) is None


def test_balance_follows_the_weights() -> None:
    """Of targets that are alike: nearly as their weights say; the pair evens it out a little."""
    states, config = known(3, strategy="balance", weights=[1, 2, 5])
    chance = random.Random(7)
    got: collections.Counter[Target] = collections.Counter()
    running: list[tuple[Plan, Step]] = []
    for _ in range(3000):
        plan = plan_of(states, config)
        step = plan.first(0.0, chance.random())
        got[step.target] += 1
        running.append((plan, step))
        if len(running) > 80:
            done, ended = running.pop(chance.randrange(len(running)))
            done.end(ended, 0.0, first_token_s=0.1)
    assert got[A] < got[B] < got[C]
    assert got[C] > 1500


def test_weights_hold_for_calls_one_after_the_other() -> None:
    """Targets that take nearly the same time get what their weights say, also where nothing else is in flight."""
    states, config = known(2, strategy="balance", weights=[300, 100])
    chance = random.Random(7)
    got: collections.Counter[Target] = collections.Counter()
    now = 0.0
    for _ in range(1000):
        plan = plan_of(states, config)
        step = plan.first(now, chance.random())
        got[step.target] += 1
        seconds = chance.uniform(0.1, 0.11)
        now += seconds
        plan.end(step, now, first_token_s=seconds)
    assert 700 <= got[A] <= 800


def test_a_weight_is_its_targets() -> None:
    """Also where a target before it is switched off, and so is not among those of the call."""
    states, config = known(3, strategy="balance", weights=[1, 1, 8])
    chance = random.Random(7)
    got: collections.Counter[Target] = collections.Counter()
    for _ in range(300):
        plan = Plan("x", (B, C), states, config)
        step = plan.first(0.0, chance.random())
        got[step.target] += 1
        plan.end(step, 0.0, first_token_s=0.1)
    assert got[C] > 200


def test_who_was_slow_once_is_asked_again() -> None:
    """Time alone makes a peak less: it gets no calls that could show that it is over."""
    states, config = known(2, strategy="balance")
    states.of(A).note_first_token(5.0, 0.0)
    for now in range(120):
        states.of(B).note_first_token(0.1, float(now))
    assert plan_of(states, config).first(1.0, 0.3).target == B
    assert plan_of(states, config).first(119.0, 0.3).target == A


@pytest.mark.parametrize("answered", [True, False])
def test_balance_avoids_who_hangs(answered: bool) -> None:
    """A target that says nothing, or nothing any more, has no more calls than the other one, however long it lasts."""
    states, config = known(2, strategy="balance")
    if answered:
        states.of(A).note_first_token(0.1, 0.0)
    chance = random.Random(7)
    for second in range(200):
        plan = plan_of(states, config)
        step = plan.first(float(second), chance.random())
        if step.target == B:  # A never answers
            plan.end(step, second + 0.1, first_token_s=0.1)
    assert states.of(A).in_flight <= 2


def test_balance_avoids_who_is_slow() -> None:
    """The faster one of a pair is tried; the slow one gets few."""
    states, config = known(2, strategy="balance")
    states.of(A).note_first_token(5.0, 0.0)
    states.of(B).note_first_token(0.1, 0.0)
    plan = plan_of(states, config)
    assert plan.first(0.0, 0.3).target == B
    assert plan.next(DOWN, 0.0, 0.3, left_s=9).target == A  # type: ignore[union-attr]


def test_a_peak_is_forgotten() -> None:
    """One slow answer counts at once, and less and less."""
    states, _ = known()
    state = states.of(A)
    state.note_first_token(0.1, 0.0)
    state.note_first_token(4.0, 1.0)
    assert state.first_token_s == 4.0
    state.note_first_token(0.1, 31.0)
    assert 0.1 < (state.first_token_s or 0) < 0.4


def test_onward() -> None:
    """A stream that broke off goes on at another target, and at the same one where there is no other."""
    plan = plan_of(*known(2))
    plan.first(0.0, 0.5)
    assert plan.continuation(0.0) == Step(B, "continue")
    alone = plan_of(*known(1))
    alone.first(0.0, 0.5)
    assert alone.continuation(0.0) == Step(A, "continue")


def test_a_client_says_nothing_of_a_target() -> None:
    """Attempts without a verdict, errors of the gateway's, and waits for a place here open no breaker."""
    states, config = known(1, breaker={"failures": 2})
    full = UpstreamTimeout("no place", phase="queue")
    for error, judged in [(None, False), (BadRequest("x"), True), (full, True), (full, True)] * 5:
        plan = plan_of(states, config)
        plan.end(plan.first(0.0, 0.5), 0.0, error=error, judged=judged)
    assert states.of(A).breaker.state(0.0) == "closed"


def test_a_reload() -> None:
    """What is known stays, with the new rules; of an upstream that has moved, nothing does."""
    states, _ = known(2)
    states.of(A).breaker.fail(0.0, "call", retry_after_s=50)
    states.of(B).breaker.fail(0.0, "call", retry_after_s=50)
    moved = make_config({"a": {}, "b": {"base_url": "http://else.invalid/v1"}}, breaker={"failures": 1})
    states.apply(moved)
    assert not states.of(A).breaker.enter(0.0)
    assert states.of(B).breaker.enter(0.0)
    assert states.of(A).breaker.rules.failures == 1


def test_made_up_models_do_not_stay() -> None:
    """The number of targets is bounded; one that is being tried stays."""
    states, config = known(1)
    step = plan_of(states, config).first(0.0, 0.5)
    for number in range(2 * MAX_TARGETS):
        states.of(Target("a", f"made-up-{number}"))
    assert len(states.items()) == MAX_TARGETS
    assert states.of(step.target).in_flight == 1


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.lists(st.sampled_from([DOWN, Throttled("no", status=429), UpstreamTimeout("x", phase="idle")]), max_size=12),
    st.sampled_from(["failover", "balance", "hedge"]),
    st.randoms(use_true_random=False),
)
def test_any_call(targets: int, most: int, errors: list[GatewayError], strategy: str, chance: random.Random) -> None:
    """Never more than the most attempts, no target twice before each had its turn, and nothing in flight at the end."""
    more = {"hedge_delay_s": 1} if strategy == "hedge" else {}
    states, config = known(targets, retries={"max_attempts": most}, strategy=strategy, **more)
    plan = plan_of(states, config)
    steps = [plan.first(0.0, chance.random())]
    for error in errors:
        plan.end(steps[-1], 0.0, error=error)
        step = plan.next(error, 0.0, chance.random(), left_s=10)
        if step is None:
            break
        steps.append(step)
    else:
        plan.end(steps[-1], 0.0)
    assert len(steps) <= most
    assert len({step.target for step in steps[:targets]}) == min(len(steps), targets)
    assert all(state.in_flight == 0 for _, state in states.items())
