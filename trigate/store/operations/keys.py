"""The operations on keys that are made at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from trigate.store.interface import Write
from trigate.store.operations.transactions import Transactions
from trigate.store.records import LoadedKey, VirtualKey


@attrs.define(eq=False, slots=False)
class KeyOperations:
    """Implements `interface.Keys`, which documents the methods."""

    _transactions: Transactions

    def add(self, key: VirtualKey) -> Write[bool]:
        return self._transactions.write(lambda tables: tables.add_key(key))

    def change(self, key_id: str, changes: Mapping[str, Any]) -> Write[VirtualKey | None]:
        return self._transactions.write(lambda tables: tables.change_key(key_id, changes))

    async def get(self, key: str) -> VirtualKey | None:
        return await self._transactions.read(lambda tables: tables.key(key))

    async def list(self, *, limit: int, after: str | None = None) -> Sequence[VirtualKey]:
        return await self._transactions.read(lambda tables: tables.keys(limit=limit, after=after))

    async def since(self, version: int) -> Sequence[LoadedKey]:
        return await self._transactions.read(lambda tables: tables.keys_since(version))
