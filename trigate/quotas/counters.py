"""Counters of what may be used: rates, exchanges in flight, budgets. Pure: the time is an argument.

A *counter* is one limit of one scope (a key, a group, a model, an upstream, all calls), as one worker counts it. The
worker does not have the whole limit, but a *lease* of it: a part that no other worker has. So a call is counted here,
without asking anybody, and the sum over all workers is within the limit. `quotas.service` gets leases from the store,
and gives back what other workers need.

A call *holds* an amount of each counter before it is served, and *settles* it when it has ended, with what it has used.
Both are synchronous and cannot fail. Between them, what is held is not available to others. `Limits` are all counters
of a call, and a `Reservation` is what it holds of them: of all, or of none.

* `Rate` is GCRA in the form of a bucket: it is full at first, a call takes what it needs, and it fills at the limit. So
  over any window of ``w`` seconds at most ``limit × (1 + w / 60)`` are used. A lease of it is a share of the limit, and
  the bucket of a share is as much smaller as it fills more slowly: the buckets of all workers are one bucket.
* `Slots` are exchanges in flight.
* `Budget` is money in one period. What has been settled does not come back.

A call may use more than it held (an answer may be longer than expected). The counter is then overdrawn: nothing is
available until it has recovered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import attrs

from trigate.config.key_sections import Period

_MINUTE_S = 60.0
_ROUNDING = 1e-6
"""Sums of levels are not exact, and a rounding error must not refuse the last call of a minute."""


class Amounts(NamedTuple):
    """What one call uses, or may use at most: ``tokens`` of its prompt and its answer, ``cost`` in micro-dollars. It is
    one request, and one exchange in flight."""

    tokens: int = 0
    cost: int = 0
    calls: int = 1


_TOKENS, _COST, _CALLS = range(3)


@attrs.define(eq=False, kw_only=True)
class Counter:
    """A limit of a scope, as this worker counts it.

    Attributes:
        name: Unique among all counters: that of the scope, and of the limit (``key:ada/rpm``).
        scope: Whose limit it is (``key:ada``).
        setting: The setting that sets it.
        limit: Of all workers together.
        ask_again_at: When the store may be asked for more of it again (Trio time).
    """

    which: ClassVar[int] = _CALLS
    """Which of the `Amounts` of a call it counts."""
    name: str
    scope: str
    setting: str
    limit: int
    ask_again_at: float = -math.inf

    def available(self, now: float) -> float:
        """How much of the lease is left; below 0 = it is overdrawn."""
        raise NotImplementedError

    def left(self, now: float) -> float:
        """How much of the whole limit is left, as far as this worker knows: what it has not leased counts as free."""
        raise NotImplementedError

    def add(self, amount: int, tokens: float, now: float) -> None:
        """Adds to the lease. ``tokens``: of a rate, how much of the amount may be used at once."""
        raise NotImplementedError

    def give_back(self, now: float, needed: int | None = None) -> int:
        """Takes from the lease what is not in use, and returns it.

        Args:
            needed: What another worker needs: this much, or half of what is not in use, if that is more; None = all.
        """
        spare = max(0, math.floor(self.available(now) + _ROUNDING))
        if needed is not None:
            spare = min(spare, max(needed, spare // 2))
        self._shrink(spare)
        return spare

    def follow(self, limit: int, now: float) -> int:
        """Follows a limit that has changed; returns what it takes from the lease.

        That is what is not in use, and of a lower limit also the part of the rest that is beyond it. The lease is then
        overdrawn, until calls have ended: what they give back is not used again.
        """
        amount = self.give_back(now)
        if limit < self.limit:
            beyond = self._beyond(limit)
            self._shrink(beyond)
            amount += beyond
        self.limit, self.ask_again_at = limit, -math.inf
        return amount

    def _beyond(self, limit: int) -> int:
        """How much of a lease that is all in use is beyond a lower limit, so that all workers together keep to it."""
        raise NotImplementedError

    def _shrink(self, amount: int) -> None:
        raise NotImplementedError

    @property
    def is_unused(self) -> bool:
        """Whether it may be forgotten: no call holds any of it, and it has no lease."""
        raise NotImplementedError

    def frees_in_s(self, amount: float, now: float) -> float | None:
        """Seconds until an amount will be available that is not now; None = that is not known."""
        raise NotImplementedError


@attrs.define(eq=False, kw_only=True)
class Rate(Counter):
    """Requests or tokens per minute: `Requests` or `Tokens`.

    Attributes:
        share: The lease: how much of the limit is this worker's.
        level: How much of it may be used at once, at the time ``at``.

    >>> rate = Requests(name="key:ada/rpm", scope="key:ada", setting="rpm", limit=60)
    >>> rate.add(60, 60.0, 0.0)
    >>> rate.available(0.0)
    60.0
    >>> reservation = Limits.of([rate]).reserve(Amounts(calls=60), 0.0)
    >>> rate.available(0.0), rate.available(2.0), rate.frees_in_s(1, 2.0), rate.frees_in_s(5, 2.0)
    (0.0, 2.0, 0.0, 3.0)
    """

    share: int = 0
    level: float = 0.0
    at: float = 0.0

    def available(self, now: float) -> float:
        share = self.share
        if self.level < share and now > self.at:
            self.level = min(float(share), self.level + share * (now - self.at) / _MINUTE_S)
        self.at = now
        return self.level

    def left(self, now: float) -> float:
        return self.available(now) + self.limit - self.share

    def add(self, amount: int, tokens: float, now: float) -> None:
        self.level = self.available(now) + tokens
        self.share += amount

    def _beyond(self, limit: int) -> int:
        return self.share - self.share * limit // self.limit

    def _shrink(self, amount: int) -> None:
        self.share -= amount
        self.level -= amount

    @property
    def is_unused(self) -> bool:
        return self.share == 0

    def frees_in_s(self, amount: float, now: float) -> float | None:
        if amount > self.limit:
            return None
        # Another worker may have the rest of the limit, which fills as well.
        missing = amount - self.available(now)
        return max(0.0, missing) * _MINUTE_S / (self.share if self.share >= amount else self.limit)


@attrs.define(eq=False, kw_only=True)
class Requests(Rate):
    """Requests per minute. What has been held does not come back: a request has been made, however it ended."""


@attrs.define(eq=False, kw_only=True)
class Tokens(Rate):
    """Tokens per minute."""

    which = _TOKENS


@attrs.define(eq=False, kw_only=True)
class Slots(Counter):
    """Exchanges in flight.

    Attributes:
        granted: The lease.
        held: Exchanges in flight.
    """

    granted: int = 0
    held: int = 0

    def available(self, now: float) -> float:
        return self.granted - self.held

    def left(self, now: float) -> float:
        return self.limit - self.held

    def add(self, amount: int, tokens: float, now: float) -> None:
        self.granted += amount

    def _beyond(self, limit: int) -> int:
        return self.granted - self.granted * limit // self.limit

    def _shrink(self, amount: int) -> None:
        self.granted -= amount

    @property
    def is_unused(self) -> bool:
        return self.granted == self.held == 0

    def frees_in_s(self, amount: float, now: float) -> float | None:
        return None


@attrs.define(eq=False, kw_only=True)
class Budget(Counter):
    """Money that may be spent in one period. In micro-dollars.

    Attributes:
        period: Its kind.
        soft_limit: From how much on a warning is given; None = there is none.
        first_day, end_day: The period, in days since 1970: it ends before ``end_day``.
        granted: All that this worker has leased, less what it has given back.
        settled: All that calls of this worker have cost.
        held: What calls in flight may cost at most.
        spent_elsewhere: What had been spent when the store was last asked, by other workers and before.
        episodes: What has been noted of this period: the soft limit, the limit.

    >>> budget = Budget(name="key:ada/usd/day/1", scope="key:ada", setting="budgets.day", limit=100, period="day",
    ...     first_day=1, end_day=2)
    >>> budget.add(100, 0.0, 0.0)
    >>> reservation = Limits.of([budget]).reserve(Amounts(cost=60), 0.0)
    >>> budget.available(0.0)
    40
    >>> reservation.settle(Amounts(cost=15), 0.0)
    >>> budget.available(0.0), budget.spent
    (85, 15)
    """

    which = _COST
    period: Period
    soft_limit: int | None = None
    first_day: int
    end_day: int
    granted: int = 0
    settled: int = 0
    held: int = 0
    spent_elsewhere: int = 0
    episodes: set[str] = attrs.field(factory=set)

    def available(self, now: float) -> float:
        return self.granted - self.settled - self.held

    def left(self, now: float) -> float:
        return self.limit - self.spent

    def add(self, amount: int, tokens: float, now: float) -> None:
        self.granted += amount

    def _beyond(self, limit: int) -> int:
        return self.held

    def _shrink(self, amount: int) -> None:
        self.granted -= amount

    @property
    def is_unused(self) -> bool:
        return self.held == 0 and self.granted <= self.settled

    def frees_in_s(self, amount: float, now: float) -> float | None:
        return None

    @property
    def spent(self) -> int:
        """What has been spent in the period, as far as this worker knows."""
        return self.spent_elsewhere + self.settled


@attrs.frozen(eq=False, kw_only=True)
class Limits:
    """The counters that a call counts for.

    They are kept by kind. A loop over counters of one kind takes a fraction of the time of one over several, since the
    interpreter adapts its code to one kind only.

    Attributes:
        all: The counters of all kinds.
    """

    all: tuple[Counter, ...] = ()
    requests: tuple[Requests, ...] = ()
    tokens: tuple[Tokens, ...] = ()
    slots: tuple[Slots, ...] = ()
    budgets: tuple[Budget, ...] = ()

    @classmethod
    def of(cls, counters: Iterable[Counter]) -> Limits:
        """Sorts counters by kind."""
        found = tuple(counters)
        return cls(
            all=found,
            requests=tuple(each for each in found if isinstance(each, Requests)),
            tokens=tuple(each for each in found if isinstance(each, Tokens)),
            slots=tuple(each for each in found if isinstance(each, Slots)),
            budgets=tuple(each for each in found if isinstance(each, Budget)),
        )

    def first_short(self, amounts: Amounts, now: float) -> Counter | None:
        """Returns a counter of which a call can have less than it needs; None = all have enough.

        A budget has enough for a call that costs nothing, but not when it is spent. Of several counters, the first is
        returned whose error tells the client best what to do: calls in flight end soon, and give back what they hold of
        a budget; to wait for a rate is useless while a budget is spent.
        """
        tokens, cost, calls = amounts
        cost = cost or 1
        for slots in self.slots:
            if slots.granted - slots.held < calls:
                return slots
        for budget in self.budgets:
            if budget.granted - budget.settled - budget.held < cost:
                return budget
        for requests in self.requests:
            if requests.available(now) + _ROUNDING < calls:
                return requests
        for rate in self.tokens:
            if rate.available(now) + _ROUNDING < tokens:
                return rate
        return None

    def reserve(self, amounts: Amounts, now: float) -> Reservation | None:
        """Holds the amounts of all counters, or of none; None = one has not enough (`first_short`)."""
        return self.hold(amounts) if self.first_short(amounts, now) is None else None

    def hold(self, amounts: Amounts) -> Reservation:
        """Holds the amounts of all counters, each of which has enough: `first_short` was called at the same time."""
        tokens, cost, calls = amounts
        for budget in self.budgets:
            budget.held += cost
        for slots in self.slots:
            slots.held += calls
        for requests in self.requests:
            requests.level -= calls
        for rate in self.tokens:
            rate.level -= tokens
        return Reservation(self, amounts)


NO_LIMITS = Limits()


@attrs.define(eq=False)
class Reservation:
    """What a call holds of its limits, until `settle`.

    Attributes:
        held: The amounts that it holds.
    """

    limits: Limits
    held: Amounts
    _is_settled: bool = False

    def settle(self, used: Amounts, now: float) -> None:
        """Counts what the call has used, in place of what it held. Only the first call has an effect."""
        if self._is_settled:
            return
        self._is_settled = True
        limits = self.limits
        held_tokens, held_cost, held_calls = self.held
        tokens, cost, _ = used
        for budget in limits.budgets:
            budget.held -= held_cost
            budget.settled += cost
        for slots in limits.slots:
            slots.held -= held_calls
        if tokens != held_tokens:
            for rate in limits.tokens:
                rate.level = min(float(rate.share), rate.available(now) + held_tokens - tokens)
