"""The limits of a simulated gateway, counted a second time: from what its calls reserve and what its records cost.

`Books` notes each reservation when it is made and settled, and each record when its exchange is settled. It knows
neither leases nor the store, which have to come to the same sums.
"""

from __future__ import annotations

import contextlib
from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator

import attrs
import trio

from trigate.quotas.counters import Amounts, Budget, Counter, Limits, Rate, Requests, Reservation, Slots
from trigate.store.records import ExchangeRecord

_ROUNDING = 0.01
_DAY_S = 86_400
_MINUTE_S = 60.0


@attrs.define(eq=False)
class Bucket:
    """A rate: how much of it may be used at once, at a time."""

    limit: int
    level: float
    at: float

    def add(self, amount: float, now: float) -> None:
        """Adds to it, and lets it fill until now."""
        filled = self.level + self.limit * (now - self.at) / _MINUTE_S
        self.level, self.at = min(float(self.limit), filled + amount), now

    def follow(self, limit: int, now: float) -> None:
        """Follows a limit that has changed."""
        self.add(0.0, now)
        self.level, self.limit = self.level + limit - self.limit, limit


class Books:
    """The books of one gateway.

    Attributes:
        violate: Called with the description of a limit that has been exceeded.
        open: The reservations that have not been settled.
        spent: What each scope has spent on each day, in micro-dollars.
        costs: What each exchange has cost, by its id; None = that is not known.
    """

    def __init__(self, violate: Callable[[str], None]) -> None:
        self.violate = violate
        self.open: dict[Reservation, None] = {}
        self.spent: Count[tuple[str, int]] = Count()
        self.costs: dict[str, int | None] = {}
        self._held: Count[Counter] = Count()
        self._buckets: dict[Counter, Bucket] = {}

    def follow(self, counters: Iterable[Counter]) -> None:
        """Follows limits that have changed since the last step."""
        for counter in counters:
            bucket = self._buckets.get(counter)
            if bucket is not None and bucket.limit != counter.limit:
                bucket.follow(counter.limit, trio.current_time())

    def reserved(self, reservation: Reservation) -> None:
        """Checks that every limit has room for a reservation, and notes it."""
        self.open[reservation] = None
        now = trio.current_time()
        for counter in reservation.limits.all:
            amount = reservation.held[counter.which]
            held = self._held[counter]
            if isinstance(counter, Rate):
                bucket = self._buckets.setdefault(counter, Bucket(counter.limit, counter.limit, now))
                bucket.follow(counter.limit, now)
                bucket.add(-amount, now)
                if bucket.level < -_ROUNDING:
                    self.violate(f"{counter.name} is exceeded: {amount} were used, {-bucket.level:.3f} too many")
                continue
            if isinstance(counter, Budget):
                spent = sum(self.spent[counter.scope, day] for day in self._days(counter))
                if counter.scope.startswith("upstream:"):
                    held = 0  # an attempt gives back what it held before its call has ended and has its cost counted
                if spent + held + max(amount, 1) > counter.limit:
                    self.violate(
                        f"{counter.name} is exceeded: {spent} are spent, {held} held, and {amount} were given to a "
                        f"call; the limit is {counter.limit}"
                    )
            elif held + amount > counter.limit:
                self.violate(f"{counter.name} is exceeded: {held + amount} calls; the limit is {counter.limit}")
            self._held[counter] += amount

    def settled(self, reservation: Reservation, used: Amounts) -> None:
        """Notes that a reservation has been settled."""
        if reservation not in self.open:
            return
        del self.open[reservation]
        for counter in reservation.limits.all:
            held = reservation.held[counter.which]
            bucket = self._buckets.get(counter)
            if bucket is None:
                self._held[counter] -= held
            elif not isinstance(counter, Requests):
                bucket.add(held - used[counter.which], trio.current_time())

    def recorded(self, record: ExchangeRecord) -> None:
        """Notes what an exchange has cost."""
        self.costs[record.request_id] = record.cost
        scopes = ["all"]
        scopes += [f"key:{record.owner}"] if record.owner else []
        scopes += [f"group:{record.key_group}"] if record.key_group else []
        scopes += [f"model:{record.alias}"] if record.alias else []
        scopes += [f"upstream:{record.target.partition('/')[0]}"] if record.target is not None else []
        for scope in scopes:
            self.spent[scope, int(record.started_at // _DAY_S)] += record.cost or 0

    def held(self, counter: Counter) -> int:
        """What the open reservations hold of a counter."""
        return self._held[counter]

    def _days(self, budget: Budget) -> Iterable[int]:
        return [day for scope, day in self.spent if scope == budget.scope and budget.first_day <= day < budget.end_day]


@contextlib.contextmanager
def watched(books: Callable[[], Books]) -> Iterator[None]:
    """A block in which the current books note every reservation."""
    hold, settle = Limits.hold, Reservation.settle

    def held(self: Limits, amounts: Amounts) -> Reservation:
        reservation = hold(self, amounts)
        books().reserved(reservation)
        return reservation

    def settled(self: Reservation, used: Amounts, now: float) -> None:
        settle(self, used, now)
        books().settled(self, used)

    Limits.hold = held  # type: ignore[method-assign] # for the time of a simulation
    Reservation.settle = settled  # type: ignore[method-assign] # as above
    try:
        yield
    finally:
        Limits.hold = hold  # type: ignore[method-assign] # as above
        Reservation.settle = settle  # type: ignore[method-assign] # as above


def is_counted(counter: Counter) -> bool:
    """Whether a counter tells what calls hold of it."""
    return isinstance(counter, Slots | Budget)
