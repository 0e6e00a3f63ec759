"""The choice of the next target, without sockets, clocks or randomness."""

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
    Reported,
    Throttled,
    Unavailable,
    Unsupported,
    UpstreamTimeout,
)
from trigate.routing.plan import Plan, Step, relative_weights
from trigate.routing.routes import Target
from trigate.routing.target_state import MAX_TARGETS, Targets
from trigate.upstream.error_body import rejection

A, B, C = Target("a", "m"), Target("b", "m"), Target("c", "m")
DOWN = Unavailable("down")
CHAT = "/chat/completions"


def known(targets: int = 3, *, retries: Any = None, breaker: Any = None, **model: Any) -> tuple[Targets, Any]:
    """An empty state of the targets, and the configuration of a model ``x`` that has them."""
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
    """A plan for a call of ``x``."""
    targets = tuple(map(Target.parse, config.models["x"].targets))
    weights = relative_weights(config.models["x"], targets, targets)
    return Plan("x", CHAT, targets, states, config, weights=weights)


def walk(plan: Plan, *errors: GatewayError, now: float = 0.0, left_s: float = 100.0) -> list[Step]:
    """The steps of a call whose attempts fail in this way, one after the other."""
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
    """Each target is tried once, in order and without a pause, for three attempts."""
    steps = walk(plan_of(*known()), DOWN, DOWN, DOWN)
    assert steps == [Step(A, "first"), Step(B, "failover"), Step(C, "failover")]


def test_the_same_target_again() -> None:
    """It is tried after a growing pause, when the second target has had as many attempts as the first."""
    states, config = known(2, retries={"max_attempts": 5, "backoff_s": 1})
    steps = walk(plan_of(states, config), *[DOWN] * 9)
    assert [(step.target, step.why, step.after_s) for step in steps] == [
        (A, "first", 0), (B, "failover", 0), (A, "retry", 0.5), (B, "retry", 0.5), (A, "retry", 1)
    ]  # fmt: skip
    assert [state.in_flight for _, _, state in states.items()] == [0, 0]


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (DOWN, 3),
        (Throttled("no", status=429), 3),
        (Unavailable("busy", status=503, reachable=True, retry_after_s=0.1), 3),
        (Unavailable("busy", status=503, reachable=True), 1),
        (Unavailable("broke", reachable=True), 1),
        (Rejected("no", status=408), 1),
        (Rejected("no", status=409), 1),
        (Rejected("no", status=400), 1),
        (Unsupported("no", status=501), 1),
        (Rejected("no", status=401), 1),
        (BadRequest("no"), 1),
        (UpstreamTimeout("slow", phase="first_token"), 1),
        (ProtocolViolation("nonsense"), 1),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_which_failures_are_retried(error: GatewayError, attempts: int) -> None:
    """On a single target, only a call that it did not receive or explicitly refused is sent again: any other one may
    have been served."""
    assert len(walk(plan_of(*known(1)), *[error] * 5)) == attempts


RECEIVED = Unavailable("broke", reachable=True)
REFUSED = Throttled("no", status=429)


@pytest.mark.parametrize(
    ("resend", "retried"), [("never", [DOWN]), ("refused", [DOWN, REFUSED]), ("always", [DOWN, REFUSED, RECEIVED])]
)
def test_what_is_sent_again(resend: str, retried: list[GatewayError]) -> None:
    """``retries.resend`` decides about the same target. Another target may be asked in any case."""
    for error in (DOWN, REFUSED, RECEIVED):
        again = [step.why for step in walk(plan_of(*known(1, retries={"resend": resend})), error)]
        assert again == ["first", "retry"][: 1 + (error in retried)]
        assert walk(plan_of(*known(2, retries={"resend": resend})), error)[1].why == "failover"


def test_a_target_that_may_have_served_the_call_stays_out() -> None:
    """When the last target has refused the call, the one before it, which broke off, does not get it again."""
    steps = walk(plan_of(*known(2, retries={"max_attempts": 9})), RECEIVED, REFUSED, REFUSED)
    assert [step.target for step in steps] == [A, B, B, B]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 415, 422, 501])
def test_a_refusal_does_not_count(status: int) -> None:
    """However many calls a target refuses, its breaker stays closed: one client's mistake stops nobody else."""
    states, config = known(1, breaker={"failures": 1, "failure_rate": 0.1, "min_calls": 1})
    for _ in range(50):
        assert len(walk(plan_of(states, config), rejection("a", status, b""))) == 1
        assert len(walk(plan_of(states, config), Reported("no", error={}, status=status))) == 1
    assert states.of(A, CHAT).breaker.state(0.0) == "closed"


def test_each_endpoint_has_a_breaker() -> None:
    """A target that fails at one endpoint is called at the others."""
    states, config = known(1, retries={"max_attempts": 1}, breaker={"failures": 1})
    embeddings = Plan("x", "/embeddings", (A,), states, config)
    assert embeddings.end(embeddings.first(0.0, 0.5), 0.0, error=DOWN) == "opened"
    with pytest.raises(Unavailable):
        Plan("x", "/embeddings", (A,), states, config).first(1.0, 0.5)
    assert walk(plan_of(states, config), now=1.0) == [Step(A, "first")]


def test_the_end_of_a_call_tells_whether_a_breaker_has_changed() -> None:
    """It opens, opens again after a failed probe, and closes after a good one; nothing else is a change."""
    states, config = known(1, breaker={"failures": 2, "cooldown_s": 10})

    def call(now: float, error: GatewayError | None) -> str | None:
        plan = plan_of(states, config)
        return plan.end(plan.first(now, 0.5), now, error=error)

    calls = [(0, None), (0, DOWN), (0, DOWN), (10, DOWN), (30, None), (30, None)]
    assert [call(now, error) for now, error in calls] == [None, None, "opened", "opened", "closed", None]


@pytest.mark.parametrize("strategy", ["failover", "balance"])
def test_a_target_that_does_not_serve_an_endpoint_comes_last(strategy: str) -> None:
    """After a 501 the next target is tried, and for a minute it comes first; then the other one is asked again."""
    states, config = known(2, strategy=strategy)
    states.of(B, CHAT).in_flight = 9  # so that balancing prefers A
    steps = walk(plan_of(states, config), Unsupported("no", status=501))
    assert [(step.target, step.why) for step in steps] == [(A, "first"), (B, "failover")]
    assert [step.target for step in walk(plan_of(states, config), now=59.0)] == [B]
    assert [step.target for step in walk(plan_of(states, config), now=61.0)] == [A]
    alone = Plan("x", CHAT, (A,), states, config)
    assert [step.target for step in walk(alone, now=1.0)] == [A], "without another target, it is asked"


def test_no_hedge_at_a_target_that_does_not_serve_the_endpoint() -> None:
    """It would only cost the hedge."""
    states, config = known(2, strategy="hedge", hedge_delay_s=1)
    states.of(B, CHAT).unserved_until = 60.0
    plan = plan_of(states, config)
    plan.first(0.0, 0.5)
    assert plan.hedge(1.0) is None


def test_a_timeout_leads_to_the_next_target() -> None:
    """A timeout of one target is a reason to try the next one."""
    steps = walk(plan_of(*known(2)), UpstreamTimeout("slow", phase="first_token"), ProtocolViolation("nonsense"))
    assert [step.target for step in steps] == [A, B]


def test_no_time_left() -> None:
    """No attempt begins without time left, and no pause uses up the remaining time."""
    assert len(walk(plan_of(*known()), DOWN, left_s=0)) == 1
    assert len(walk(plan_of(*known(1, retries={"backoff_s": 10, "max_backoff_s": 10})), DOWN, left_s=4)) == 1


def test_retry_after_is_waited_for() -> None:
    """A wait that exceeds the limit is passed to the client instead."""
    soon = Unavailable("busy", status=503, reachable=True, retry_after_s=1.5)
    late = Unavailable("busy", status=503, reachable=True, retry_after_s=3)
    steps = walk(plan_of(*known(1)), soon)
    assert [(step.why, step.after_s) for step in steps] == [("first", 0), ("retry", 1.5)]
    assert len(walk(plan_of(*known(1)), late)) == 1


def test_a_kept_error_keeps_nothing_else() -> None:
    """The last error of a target is kept for messages, without its traceback, whose frames hold connections."""
    states, config = known()
    plan = plan_of(states, config)
    try:
        raise Unavailable("down") from OSError("refused")
    except Unavailable as error:
        plan.end(plan.first(0.0, 0.5), 0.0, error=error)
    kept = states.of(A, CHAT).last_error
    assert kept is not None
    assert (kept.message, kept.__traceback__, kept.__cause__, kept.__context__) == ("down", None, None, None)


def test_a_target_with_an_open_breaker_is_skipped() -> None:
    """When all breakers are open, the call fails at once with a retry time."""
    states, config = known(2, retries={"max_attempts": 1}, breaker={"failures": 1, "cooldown_s": 7})
    assert [step.target for step in walk(plan_of(states, config), DOWN)] == [A]
    assert [step.target for step in walk(plan_of(states, config), DOWN)] == [B]
    with pytest.raises(Unavailable) as caught:
        plan_of(states, config).first(2.0, 0.5)
    assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
    step = plan_of(states, config).first(7.0, 0.5)
    assert (step.target, step.why) == (A, "first")


def test_a_call_from_before_the_outage_does_not_end_its_probe() -> None:
    """A call began before the breaker opened. Its end is not the end of the probe."""
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
    """A thousand calls to one target that is down cause a fifth more attempts, and the few that the budget holds at
    first."""
    states, config = known(1, retries={"max_attempts": 10, "budget": 0.2}, breaker={"failures": 0, "failure_rate": 0})
    attempts = sum(len(walk(plan_of(states, config), *[DOWN] * 20)) for _ in range(1000))
    assert 1190 <= attempts <= 1211


def test_hedging() -> None:
    """The second attempt goes to the next target, once. The budget limits how many calls have one."""
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
    """The budget is a share of the calls, however much time passes between them."""
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


def test_the_hedge_delay_adapts() -> None:
    """It is the time in which 95 of 100 calls are answered. Without enough data there is no hedging."""
    states, config = known(2, strategy="hedge")
    assert plan_of(states, config).hedge_delay_s() is None
    for number in range(100):
        states.of(A, CHAT).note_first_token(number / 100, 0.0)
    assert plan_of(states, config).hedge_delay_s() == pytest.approx(0.95)


def test_the_hedge_delay_is_that_of_the_first_attempt() -> None:
    """When the first target is skipped, its latency does not count."""
    states, config = known(2, strategy="hedge")
    for _ in range(100):
        states.of(A, CHAT).note_first_token(0.1, 0.0)
        states.of(B, CHAT).note_first_token(3.0, 0.0)
    states.of(A, CHAT).breaker.fail(0.0, "call", retry_after_s=50)
    plan = plan_of(states, config)
    assert plan.first(0.0, 0.5).target == B
    assert plan.hedge_delay_s() == pytest.approx(3.0)


def test_no_hedge_at_an_open_breaker() -> None:
    """There is no hedge without a second target either."""
    states, config = known(2, strategy="hedge", hedge_delay_s=0.1, max_attempts=3)
    states.of(B, CHAT).breaker.fail(0.0, "call", retry_after_s=9)
    plan = plan_of(states, config)
    plan.first(0.0, 0.5)
    assert plan.hedge(0.0) is None


def test_balance_follows_the_weights() -> None:
    """Equal targets get nearly their weights' share. Choosing from a pair evens it out slightly."""
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


def test_weights_hold_for_sequential_calls() -> None:
    """Targets of nearly equal latency get their weights' share even when nothing else is in flight."""
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


def test_a_weight_belongs_to_its_target() -> None:
    """This holds too when a target before it is disabled and not among those of the call."""
    states, config = known(3, strategy="balance", weights=[1, 1, 8])
    chance = random.Random(7)
    got: collections.Counter[Target] = collections.Counter()
    weights = relative_weights(config.models["x"], (A, B, C), (B, C))
    for _ in range(300):
        plan = Plan("x", CHAT, (B, C), states, config, weights=weights)
        step = plan.first(0.0, chance.random())
        got[step.target] += 1
        plan.end(step, 0.0, first_token_s=0.1)
    assert got[C] > 200


def test_a_once_slow_target_is_tried_again() -> None:
    """Its estimate decays over time. Otherwise it would get no calls that show its recovery."""
    states, config = known(2, strategy="balance")
    states.of(A, CHAT).note_first_token(5.0, 0.0)
    for now in range(120):
        states.of(B, CHAT).note_first_token(0.1, float(now))
    assert plan_of(states, config).first(1.0, 0.3).target == B
    assert plan_of(states, config).first(119.0, 0.3).target == A


@pytest.mark.parametrize("answered", [True, False])
def test_balance_avoids_a_hanging_target(answered: bool) -> None:
    """A target that does not respond, or stops responding, has no more calls than the other one, however long that
    lasts."""
    states, config = known(2, strategy="balance")
    if answered:
        states.of(A, CHAT).note_first_token(0.1, 0.0)
    chance = random.Random(7)
    for second in range(200):
        plan = plan_of(states, config)
        step = plan.first(float(second), chance.random())
        if step.target == B:  # A never answers
            plan.end(step, second + 0.1, first_token_s=0.1)
    assert states.of(A, CHAT).in_flight <= 2


def test_balance_avoids_a_slow_target() -> None:
    """The faster target of a pair is tried. The slow one gets few calls."""
    states, config = known(2, strategy="balance")
    states.of(A, CHAT).note_first_token(5.0, 0.0)
    states.of(B, CHAT).note_first_token(0.1, 0.0)
    plan = plan_of(states, config)
    assert plan.first(0.0, 0.3).target == B
    assert plan.next(DOWN, 0.0, 0.3, left_s=9).target == A  # type: ignore[union-attr]


def test_a_latency_peak_decays() -> None:
    """One slow answer counts at once and then less and less."""
    states, _ = known()
    state = states.of(A, CHAT)
    state.note_first_token(0.1, 0.0)
    state.note_first_token(4.0, 1.0)
    assert state.first_token_s == 4.0
    state.note_first_token(0.1, 31.0)
    assert 0.1 < (state.first_token_s or 0) < 0.4


def test_continuation() -> None:
    """A truncated stream continues at another target, or at the same one if there is no other."""
    plan = plan_of(*known(2))
    plan.first(0.0, 0.5)
    assert plan.continuation(0.0) == Step(B, "continue")
    alone = plan_of(*known(1))
    alone.first(0.0, 0.5)
    assert alone.continuation(0.0) == Step(A, "continue")


def test_unjudged_attempts_open_no_breaker() -> None:
    """Attempts without a verdict, errors of the gateway and waits for an upstream slot open no breaker."""
    states, config = known(1, breaker={"failures": 2})
    full = UpstreamTimeout("no place", phase="queue")
    for error, judged in [(None, False), (BadRequest("x"), True), (full, True), (full, True)] * 5:
        plan = plan_of(states, config)
        plan.end(plan.first(0.0, 0.5), 0.0, error=error, judged=judged)
    assert states.of(A, CHAT).breaker.state(0.0) == "closed"


def test_a_reload() -> None:
    """The state of a target stays, with the new settings. An upstream with a new address starts afresh."""
    states, _ = known(2)
    states.of(A, CHAT).breaker.fail(0.0, "call", retry_after_s=50)
    states.of(B, CHAT).breaker.fail(0.0, "call", retry_after_s=50)
    moved = make_config({"a": {}, "b": {"base_url": "http://else.invalid/v1"}}, breaker={"failures": 1})
    states.apply(moved)
    assert not states.of(A, CHAT).breaker.enter(0.0)
    assert states.of(B, CHAT).breaker.enter(0.0)
    assert states.of(A, CHAT).breaker.rules.failures == 1


def test_invented_models_are_forgotten() -> None:
    """The number of targets is bounded. One with an attempt in progress stays."""
    states, config = known(1)
    step = plan_of(states, config).first(0.0, 0.5)
    for number in range(2 * MAX_TARGETS):
        states.of(Target("a", f"made-up-{number}"), CHAT)
    assert len(states.items()) == MAX_TARGETS
    assert states.of(step.target, CHAT).in_flight == 1


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.lists(st.sampled_from([DOWN, Throttled("no", status=429), UpstreamTimeout("x", phase="idle")]), max_size=12),
    st.sampled_from(["failover", "balance", "hedge"]),
    st.randoms(use_true_random=False),
)
def test_any_call(targets: int, most: int, errors: list[GatewayError], strategy: str, chance: random.Random) -> None:
    """There are never more than the maximum of attempts, no target is tried twice before the others, and nothing is in
    flight at the end."""
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
    assert all(state.in_flight == 0 for _, _, state in states.items())
