"""Affinity: the order of the targets for the calls of a conversation, without sockets, clocks or randomness."""

from __future__ import annotations

import collections
from typing import Any

import pytest

from tests.routing.test_plan import CHAT, DOWN, A, B, C, known
from trigate.errors import Unavailable
from trigate.routing.affinity import MAX_PINS, PINNED_S, Pins, by_hash
from trigate.routing.plan import Plan, relative_weights
from trigate.routing.target_state import Targets

KEYS = [b"%d" % number for number in range(400)]


def call(states: Targets, config: Any, key: bytes | None, *, now: float = 0.0, chance: float = 0.5) -> Plan:
    """A plan for a call of a conversation."""
    targets = (A, B, C)[: len(config.models["x"].targets)]
    weights = relative_weights(config.models["x"], targets, targets)
    return Plan("x", CHAT, targets, states, config, weights=weights, key=key)


def test_a_conversation_stays_at_its_target() -> None:
    """Whatever chance and the load say, within its share."""
    states, config = known(3, strategy="balance", affinity="session")
    got = collections.defaultdict(set)
    for chance in (0.0, 0.3, 0.6, 0.9):
        for key in KEYS:
            plan = call(states, config, key)
            step = plan.first(0.0, chance)
            got[key].add(step.target)
            plan.end(step, 0.0, first_token_s=chance)
    assert all(len(targets) == 1 for targets in got.values())
    assert min(collections.Counter(target for [target] in got.values()).values()) > 100, "all targets have some"


def test_weights() -> None:
    """The conversations are spread by weight."""
    states, config = known(2, strategy="balance", affinity="session", weights=[300, 100])
    first = []
    for key in KEYS:
        plan = call(states, config, key)
        step = plan.first(0.0, 0.5)
        first.append(step.target)
        plan.end(step, 0.0)
    assert 250 < first.count(A) < 350


def test_a_target_that_leaves_moves_only_its_own_conversations() -> None:
    """All others keep theirs."""
    before = {key: by_hash((A, B, C), (1, 1, 1), key)[0] for key in KEYS}
    after = {key: by_hash((A, B), (1, 1), key)[0] for key in KEYS}
    assert all(after[key] == before[key] for key in KEYS if before[key] != C)


@pytest.mark.parametrize("strategy", ["failover", "balance"])
def test_after_a_failover(strategy: str) -> None:
    """The conversation stays where its cache is now, for as long as a cache lives, and goes on from there."""
    states, config = known(2, strategy=strategy, affinity="session")
    key = next(key for key in KEYS if by_hash((A, B), (1, 1), key)[0] == A)
    plan = call(states, config, key)
    step = plan.first(0.0, 0.5)
    plan.end(step, 0.0, error=DOWN)
    second = plan.next(DOWN, 0.0, 0.5, left_s=9.0)
    assert second is not None
    assert (step.target, second.target) == (A, B)
    plan.end(second, 10.0)
    for now, target in ((11.0, B), (11.0 + PINNED_S - 2, B), (12.0 + 3 * PINNED_S, A)):
        plan = call(states, config, key)
        step = plan.first(now, 0.5)
        assert step.target == target
        plan.end(step, now)


def test_without_a_conversation_the_order_is_that_of_the_strategy() -> None:
    """A call without a key is not bound to any other one."""
    states, config = known(2, affinity="session")
    for key, target in ((b"k", A), (None, A)):
        plan = call(states, config, key)
        step = plan.first(0.0, 0.5)
        assert step.target == target
        plan.end(step, 0.0)
    assert repr(states.pins) == "<Pins, 1 conversations>"


@pytest.mark.parametrize("strategy", ["failover", "balance"])
def test_an_excluded_target_stays_out(strategy: str) -> None:
    """Affinity restores no target whose breaker is open, and puts none first that does not serve the endpoint."""
    states, config = known(2, strategy=strategy, affinity="session", breaker={"failures": 1, "cooldown_s": 10})
    states.pins.note(b"k", A, 0.0)
    states.of(A, CHAT).breaker.fail(0.0, "call")
    plan = call(states, config, b"k")
    step = plan.first(1.0, 0.5)
    assert step.target == B
    plan.end(step, 1.0, error=DOWN)
    assert plan.next(DOWN, 1.0, 0.5, left_s=9.0) is None, "both breakers are open"
    with pytest.raises(Unavailable):
        call(states, config, b"k").first(2.0, 0.5)
    states.pins.note(b"k", B, 20.0)
    states.of(B, CHAT).unserved_until = 80.0
    assert call(states, config, b"k").first(20.0, 0.5).target == A


def test_a_crowded_target_comes_later() -> None:
    """With balance, a target takes no more than its share and a half, also of those that are pinned to it; with
    failover, the order is that of the configuration, and no load changes it."""
    states, config = known(2, strategy="balance", affinity="session")
    states.pins.note(b"k", A, 0.0)
    states.of(A, CHAT).in_flight, states.of(B, CHAT).in_flight = 9, 9
    assert call(states, config, b"k").first(0.0, 0.5).target == A
    states.of(A, CHAT).in_flight, states.of(B, CHAT).in_flight = 9, 1
    assert call(states, config, b"k").first(0.0, 0.5).target == B
    states.of(B, CHAT).breaker.fail(0.0, "call", retry_after_s=60.0)
    assert call(states, config, b"k").first(0.0, 0.5).target == A, "it is the only one left"
    states, config = known(2, affinity="session")
    states.of(A, CHAT).in_flight = 99
    assert call(states, config, b"k").first(0.0, 0.5).target == A


def test_pins_are_bounded() -> None:
    """Those used longest ago are forgotten first."""
    pins = Pins()
    pins.note(b"old", A, 0.0)
    pins.note(b"used", A, 0.0)
    for number in range(MAX_PINS - 2):
        pins.note(b"%d" % number, B, 0.0)
    pins.note(b"used", A, 1.0)
    pins.note(b"new", B, 1.0)
    assert [pins.find(key, 1.0) for key in (b"old", b"used", b"new", b"unknown")] == [None, A, B, None]
