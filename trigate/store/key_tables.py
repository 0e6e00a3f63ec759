"""The table of keys that are made at run time: a part of `tables.Tables`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs

from trigate.store.reasoning_tables import ReasoningTables
from trigate.store.records import LoadedKey, VirtualKey

_NAMES = [field.name for field in attrs.fields(VirtualKey)]
_COLUMNS = ", ".join(_NAMES)
_loaded: Callable[[Sequence[Any]], LoadedKey] = partial(tuple.__new__, LoadedKey)
"""As `LoadedKey._make`, at half the cost: there may be a hundred thousand rows."""
_NEXT_VERSION = "(SELECT ifnull(max(version), 0) + 1 FROM keys)"


class KeyTables(ReasoningTables):
    """The statements on the table."""

    def add_key(self, key: VirtualKey) -> bool:
        """Adds a key; False = there is, or was, one of that name."""
        marks = ", ".join("?" * len(_NAMES))
        sql = f"INSERT INTO keys ({_COLUMNS}, version) VALUES ({marks}, {_NEXT_VERSION}) ON CONFLICT (name) DO NOTHING"
        return self._do(sql, *[getattr(key, name) for name in _NAMES]) == 1

    def key(self, key: str) -> VirtualKey | None:
        """Returns a key by its id or name."""
        return self._key("WHERE id = ?", key) or self._key("WHERE name = ?", key)

    def change_key(self, key_id: str, changes: Mapping[str, Any]) -> VirtualKey | None:
        """Sets columns of a key that is not revoked; returns it, or None."""
        columns = ", ".join(f"{name} = ?" for name in changes)
        sql = f"UPDATE keys SET {columns}, version = {_NEXT_VERSION} WHERE id = ? AND revoked_at IS NULL"
        return self._key("WHERE id = ?", key_id) if self._do(sql, *changes.values(), key_id) else None

    def keys(self, *, limit: int, after: str | None) -> Sequence[VirtualKey]:
        """Returns keys, the newest first."""
        sql = f"SELECT {_COLUMNS} FROM keys"
        if after is None:
            rows = self._db.execute(f"{sql} ORDER BY number DESC LIMIT ?", (limit,))
        else:
            number = "(SELECT number FROM keys WHERE id = ?)"
            rows = self._db.execute(f"{sql} WHERE number < {number} ORDER BY number DESC LIMIT ?", (after, limit))
        return [VirtualKey(*row) for row in rows]

    def keys_since(self, version: int) -> Sequence[LoadedKey]:
        """Returns the keys that have changed since a version, in the order of the changes. Revoked ones belong to the
        changes, but not to all keys."""
        only = " AND revoked_at IS NULL" if not version else ""
        rows = self._db.execute(
            "SELECT id, name, version, digest, settings, old_digest, old_until, revoked_at IS NOT NULL"
            f" FROM keys WHERE version > ?{only} ORDER BY version",
            (version,),
        )
        return list(map(_loaded, rows))

    def _key(self, where: str, value: str) -> VirtualKey | None:
        rows = list(self._db.execute(f"SELECT {_COLUMNS} FROM keys {where}", (value,)))
        return VirtualKey(*rows[0]) if rows else None
