"""The tables of what is spent and leased: a part of `tables.Tables`.

``spent`` has what each scope has spent on each day: the sum of the records of exchanges, those that have been deleted
since included. ``leases`` has the part of a limit that a worker has. When a record is added, the leases of its worker
shrink by its cost: what is leased and what is spent are never more than the limit together.
``unleased`` has, of a rate, how much may be used at once of the part that no worker has (``level``), and the limit
(``full``); a limit that it does not have has not been used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from trigate.store.records import Lease, LeaseWish
from trigate.store.report_tables import Used

if TYPE_CHECKING:
    import apsw

_MINUTE_S = 60.0


def _scopes(used: Used) -> Iterator[str]:
    """Whose money some calls have spent."""
    yield "all"
    if used.owner:
        yield f"key:{used.owner}"
    if used.key_group:
        yield f"group:{used.key_group}"
    if used.alias:
        yield f"model:{used.alias}"
    if used.target:
        yield f"upstream:{used.target.partition('/')[0]}"


class QuotaTables:
    """The statements on these tables."""

    _db: apsw.Connection

    def lease(self, wish: LeaseWish) -> Lease:
        """Adds to the part of a worker what is free, up to ``most``."""
        held, others = self._leased(wish)
        spent = self.spent(wish.scope, wish.first_day, wish.end_day) if wish.end_day else 0
        free = wish.limit - spent - held - others
        amount = max(0, min(free, wish.most))
        tokens = 0.0
        if wish.is_rate:
            level = self._level(wish, free)
            tokens = min(level, float(amount))
            self._put_level(wish, level - tokens)
        if amount:
            self._add(wish, amount)
        return Lease(amount=amount, tokens=tokens, others=others, spent=spent, held=held + amount)

    def give_back(self, wish: LeaseWish, amount: int) -> None:
        """Takes an amount from the part of a worker."""
        held, others = self._leased(wish)
        if wish.is_rate:
            self._put_level(wish, self._level(wish, wish.limit - held - others) + amount)
        self._add(wish, -amount)
        self._db.execute("DELETE FROM leases WHERE worker = ? AND name = ? AND amount = 0", (wish.worker, wish.name))

    def spent(self, scope: str, first_day: int, end_day: int) -> int:
        """Returns what a scope has spent in a period."""
        sql = "SELECT coalesce(sum(amount), 0) FROM spent WHERE scope = ? AND day >= ? AND day < ?"
        [[total]] = self._db.execute(sql, (scope, first_day, end_day))
        return int(total)

    def count_spent(self, used: Sequence[Used]) -> None:
        """Counts what calls have cost."""
        spent: dict[tuple[str, int], int] = {}
        by_worker: dict[tuple[str, str, int], int] = {}
        for each in used:
            if not each.cost:
                continue
            day = each.hour // 24
            for scope in _scopes(each):
                spent[scope, day] = spent.get((scope, day), 0) + each.cost
                leased = each.worker, scope, day
                by_worker[leased] = by_worker.get(leased, 0) + each.cost
        for (scope, day), cost in spent.items():
            self._db.execute(
                "INSERT INTO spent (scope, day, amount) VALUES (?, ?, ?)"
                " ON CONFLICT DO UPDATE SET amount = amount + excluded.amount",
                (scope, day, cost),
            )
        for (worker, scope, day), cost in by_worker.items():
            self._db.execute(
                "UPDATE leases SET amount = amount - ?"
                " WHERE worker = ? AND scope = ? AND first_day <= ? AND end_day > ?",
                (cost, worker, scope, day, day),
            )

    def drop_leases(self, worker: str) -> None:
        """Deletes what a worker has."""
        self._db.execute("DELETE FROM leases WHERE worker = ?", (worker,))

    def _leased(self, wish: LeaseWish) -> tuple[int, int]:
        """Returns what the worker has, and what all others have. A worker whose calls have cost more than it had has
        less than nothing, until it leases again: what they have cost is spent, and nothing of it is for others."""
        held = others = 0
        for worker, amount in self._db.execute("SELECT worker, amount FROM leases WHERE name = ?", (wish.name,)):
            if worker == wish.worker:
                held = amount
            else:
                others += max(0, amount)
        return held, others

    def _add(self, wish: LeaseWish, amount: int) -> None:
        self._db.execute(
            "INSERT INTO leases (worker, name, scope, first_day, end_day, amount) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (name, worker) DO UPDATE SET amount = amount + excluded.amount",
            (wish.worker, wish.name, wish.scope, wish.first_day, wish.end_day, amount),
        )

    def _level(self, wish: LeaseWish, free: int) -> float:
        """How much of a rate may be used at once, of the part ``free`` that no worker has."""
        rows: list[Any] = list(self._db.execute("SELECT level, at, full FROM unleased WHERE name = ?", (wish.name,)))
        share = max(0, free)
        if not rows:
            return float(share)
        [[level, at, full]] = rows
        raised = wish.limit - full  # a limit that is raised is so at once
        return float(max(0.0, min(share, level + raised + share * max(0.0, wish.at - at) / _MINUTE_S)))

    def _put_level(self, wish: LeaseWish, level: float) -> None:
        self._db.execute("INSERT OR REPLACE INTO unleased VALUES (?, ?, ?, ?)", (wish.name, level, wish.at, wish.limit))
