"""The tables of remembered reasoning and of the gateway's secrets: a part of `tables.Tables`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from trigate.store.records import ReasoningRecord

if TYPE_CHECKING:
    import apsw


def is_in(column: str, values: Sequence[str]) -> str:
    """Returns the condition that a column has one of some values, which follow as parameters."""
    return f"{column} IN ({', '.join('?' * len(values))})"


class ReasoningTables:
    """The statements on these tables, and how one is executed."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def _do(self, sql: str, *values: Any) -> int:
        """Executes a statement that changes rows; returns how many."""
        self._db.execute(sql, values)
        return self._db.changes()

    def put_reasoning(self, entries: Sequence[ReasoningRecord], *, most: int) -> None:
        """Keeps entries, and deletes the oldest ones in excess of ``most``."""
        for each in entries:
            self._do(
                "INSERT OR REPLACE INTO reasoning (owner, call, at, value) VALUES (?, ?, ?, ?)", *attrs.astuple(each)
            )
        self._do("DELETE FROM reasoning WHERE number <= (SELECT max(number) FROM reasoning) - ?", most)

    def reasoning(self, owner: str, calls: Sequence[str], since: float) -> dict[str, bytes]:
        """Returns the values of an owner's calls that were kept since a time."""
        sql = f"SELECT call, value FROM reasoning WHERE owner = ? AND {is_in('call', calls)} AND at >= ?"
        return dict(self._db.execute(sql, (owner, *calls, since)))

    def drop_reasoning(self, before: float, *, limit: int) -> int:
        """Deletes the oldest entries, from before a time; returns how many."""
        return self._do(
            "DELETE FROM reasoning WHERE number IN"
            " (SELECT number FROM (SELECT number, at FROM reasoning ORDER BY number LIMIT ?) WHERE at < ?)",
            limit,
            before,
        )

    def secret(self, name: str, new: bytes) -> bytes:
        """Returns a secret; ``new`` becomes it if there is none."""
        self._do("INSERT OR IGNORE INTO secrets VALUES (?, ?)", name, new)
        [[value]] = self._db.execute("SELECT value FROM secrets WHERE name = ?", (name,))
        return bytes(value)
