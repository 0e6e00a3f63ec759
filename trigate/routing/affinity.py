"""Keeps the calls of a conversation at one target, whose prompt cache has their beginning. Pure: time is an argument.

Affinity decides about the *order* in which the targets of a model are tried, and about nothing else: a target that is
left out (its breaker is open, it is cooling down) stays out, whoever was pinned to it.

* A conversation is *pinned* to the target that served its last call. So after a failover it stays where its cache is
  now, instead of returning to a target that has lost it.
* Where the targets share the load (``balance``), the first call goes to the one of the highest rendezvous hash, by
  weight. Every worker and every gateway makes the same choice without talking to the others. A target that has more
  than its share of the calls in flight (`BOUND` times it) comes after those that have not.
* Otherwise the targets keep their order, which is that of the configuration.

Source: weighted rendezvous hashing as in Schindelhauer and Schomaker, *Weighted Distributed Hash Tables*; the bound as
in Mirrokni, Thorup and Zadimoghaddam, *Consistent Hashing with Bounded Loads*.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from trigate.routing.routes import Target

MAX_PINS = 16_384
"""How many conversations are remembered; those used longest ago are forgotten first."""
PINNED_S = 3600.0
"""How long a conversation is pinned after its last call has ended. The longest prompt cache of a provider holds that
long after a call has begun."""
BOUND = 1.5
"""How many times its share of the calls in flight a target may have."""


class Pins:
    """Which target served the last call of each conversation."""

    __slots__ = ("_pins",)

    def __init__(self) -> None:
        self._pins: dict[bytes, tuple[Target, float]] = {}

    def __repr__(self) -> str:
        return f"<Pins, {len(self._pins)} conversations>"

    def find(self, key: bytes, now: float) -> Target | None:
        """The target of a conversation; None = there is none, or it was too long ago."""
        target, until = self._pins.get(key, (None, 0.0))
        return target if until > now else None

    def note(self, key: bytes, target: Target, now: float) -> None:
        """Records that a target has served a call of a conversation."""
        self._pins.pop(key, None)  # so that it becomes the last one
        self._pins[key] = target, now + PINNED_S
        if len(self._pins) > MAX_PINS:
            del self._pins[next(iter(self._pins))]


def by_hash(targets: Sequence[Target], weights: Sequence[float], key: bytes) -> list[Target]:
    """The targets in the order of their rendezvous hashes for a conversation.

    >>> a, b = Target("a", "m"), Target("b", "m")
    >>> first = [by_hash((a, b), (1.5, 0.5), b"%d" % number)[0] for number in range(1000)]
    >>> 700 < first.count(a) < 800
    True
    """
    scores = {}
    for target, weight in zip(targets, weights, strict=True):
        digest = hashlib.blake2b(str(target).encode(), key=key[:64], digest_size=8).digest()
        share = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)  # between 0 and 1
        scores[target] = -weight / math.log(share)
    return sorted(scores, key=lambda target: -scores[target])


def is_crowded(in_flight: int, total: int, share: float) -> bool:
    """Whether a target with so many calls in flight has more than its share with one more.

    Args:
        total: The calls in flight at all targets that calls can go to.
        share: Of this target among them; 0 to 1.

    >>> is_crowded(0, 0, 0.5), is_crowded(2, 2, 0.5), is_crowded(3, 3, 0.5), is_crowded(3, 6, 0.5)
    (False, False, True, False)
    """
    return in_flight + 1 > math.ceil(BOUND * (total + 1) * share)
