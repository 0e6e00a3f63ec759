"""Virtual keys: made, changed, rotated and revoked at run time, by the admin.

A secret has 256 random bits and is shown once. The store has its SHA-256 digest only. A revoked key stays in the store,
so that its name is not given to another one, which would own what the revoked key has made.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import msgspec

from trigate.config import converter
from trigate.config.key_sections import KeySettings
from trigate.errors import BadRequest, NotFound
from trigate.keys.service import TOPIC, Keys, digest_of
from trigate.store.interface import Store
from trigate.store.records import VirtualKey
from trigate.workers.membership import Workers

PREFIX = "sk-trigate-"
"""All secrets of virtual keys begin with this, so that scanners find them in published code."""
MAX_OVERLAP_S = 30 * 86400.0
_SECRET_BYTES = 32
_SHOWN_CHARS = len(PREFIX) + 4
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_MAX_SETTINGS_BYTES = 16 * 1024


@attrs.frozen(eq=False)
class VirtualKeys:
    """What the admin does with virtual keys. Every change holds in this worker when a method returns, and in the others
    within a second."""

    _store: Store
    _workers: Workers
    _keys: Keys

    async def create(self, name: str, settings: Mapping[str, Any]) -> tuple[VirtualKey, str]:  # Any: JSON
        """Makes a key; returns it with its secret.

        Raises:
            BadRequest: The name is taken or invalid, or a setting is.
            StoreUnavailable: It cannot be stored.
        """
        if not _NAME.fullmatch(name):
            raise BadRequest(
                "name must be 1 to 64 letters, digits, '.', '_', '-' and '@', beginning with a letter or digit.",
                param="name",
            )
        secret, now = _new_secret(), time.time()
        key = VirtualKey(
            id=f"key_{secrets.token_hex(12)}",
            name=name,
            digest=digest_of(secret.encode()),
            shown=secret[:_SHOWN_CHARS],
            settings=self._checked(settings),
            created_at=now,
        )
        await self._workers.join()
        if self._keys.is_configured(name) or not await self._store.keys.add(key):
            raise BadRequest(
                f"There is, or was, a key named {name!r}. What it has made belongs to its name, so another key cannot "
                "have it. Rotate a key to give it another secret.",
                param="name",
            )
        await self._changed()
        return key, secret

    async def list(self, *, limit: int, after: str | None = None) -> Sequence[VirtualKey]:
        """Returns keys, the newest first, those that are revoked included.

        Raises:
            StoreUnavailable: They cannot be read.
        """
        return await self._store.keys.list(limit=limit, after=after)

    async def get(self, key: str) -> VirtualKey:
        """Returns a key by its id or its name.

        Raises:
            NotFound: There is none.
            StoreUnavailable: It cannot be read.
        """
        found = await self._store.keys.get(key)
        if found is None:
            raise _unknown(key)
        return found

    async def update(self, key: str, changes: Mapping[str, Any]) -> VirtualKey:  # Any: JSON
        """Changes settings; None unsets one.

        Raises:
            BadRequest: A setting is invalid, or the key is revoked.
            NotFound, StoreUnavailable: As `get`.
        """
        found = await self.get(key)
        settings = {**msgspec.json.decode(found.settings), **changes}
        checked = self._checked({name: value for name, value in settings.items() if value is not None})
        return await self._change(found, settings=checked)

    async def rotate(self, key: str, *, overlap_s: float) -> tuple[VirtualKey, str]:
        """Gives a key another secret, and returns both. The old one is valid for ``overlap_s`` seconds more, and one
        from an earlier rotation no longer.

        Raises:
            BadRequest: The key is revoked, or the time is not 0 to `MAX_OVERLAP_S`.
            NotFound, StoreUnavailable: As `get`.
        """
        if not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise BadRequest(f"overlap_s must be from 0 to {MAX_OVERLAP_S:.0f} seconds.", param="overlap_s")
        found, secret = await self.get(key), _new_secret()
        changed = await self._change(
            found,
            digest=digest_of(secret.encode()),
            shown=secret[:_SHOWN_CHARS],
            old_digest=found.digest if overlap_s else b"",
            old_until=time.time() + overlap_s if overlap_s else 0.0,
        )
        return changed, secret

    async def revoke(self, key: str) -> VirtualKey:
        """Revokes a key for good: its calls are refused, and those in flight end with an error.

        Raises:
            NotFound, StoreUnavailable: As `get`.
        """
        found = await self.get(key)
        if found.revoked_at is not None:
            return found
        return await self._change(found, revoked_at=time.time())

    async def _change(self, key: VirtualKey, **changes: Any) -> VirtualKey:  # Any: values of fields
        await self._workers.join()
        changed = await self._store.keys.change(key.id, changes)
        if changed is None:
            raise BadRequest(f"The key {key.name} is revoked.")
        await self._changed()
        return changed

    async def _changed(self) -> None:
        await self._keys.refresh()
        self._workers.notify(TOPIC)

    def _checked(self, settings: Mapping[str, Any]) -> bytes:  # Any: JSON
        """Returns settings as the store has them. Raises BadRequest."""
        problems: list[str] = []
        checked = converter.convert(KeySettings, dict(settings), "", problems)
        if checked is None:
            where, _, problem = problems[0].lstrip(".").partition(": ")
            raise BadRequest(f"{where}: {problem}." if where else f"{problem}.", param=where or None)
        if checked.group is not None and not self._keys.has_group(checked.group):
            raise BadRequest(f"There is no group {checked.group[:100]!r} in the configuration.", param="group")
        encoded = msgspec.json.encode(settings)
        if len(encoded) > _MAX_SETTINGS_BYTES:
            raise BadRequest(f"The settings of a key have at most {_MAX_SETTINGS_BYTES} bytes.", param="metadata")
        return encoded


def _new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def _unknown(key: str) -> NotFound:
    return NotFound(f"There is no key {key[:100]!r}.")
