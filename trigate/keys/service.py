"""The keys of the gateway: finds the key of a request by its secret, and that of a stored owner by its name.

A key is found by the SHA-256 digest of its secret, in a dict. So the number of keys costs nothing, and no secret is
compared with a given one: the time of a look-up says nothing about the secrets that exist.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import attrs

from trigate.config.key_sections import GroupConfig, KeyConfig, KeySettings
from trigate.config.sections import Config
from trigate.keys.key import ANYBODY, Key

ADMIN = "admin"
"""The name of the admin's key."""
_SETTINGS = [field.name for field in attrs.fields(KeySettings)]


class Keys:
    """All keys.

    Attributes:
        are_required: A request needs a key; False = none is configured, and anybody may call.
        are_several: There may be more than one, whose objects are kept apart.
    """

    def __init__(self) -> None:
        self._by_digest: dict[bytes, Key] = {}
        self._by_name: dict[str, Key] = {}
        self.are_required = False
        self.are_several = False

    def __repr__(self) -> str:
        return f"<Keys {len(self._by_digest)}>"

    def apply(self, config: Config) -> None:
        """Follows a configuration. Synchronous."""
        by_digest: dict[bytes, Key] = {}
        for name, own in config.keys.items():
            by_digest[digest_of(_revealed(own.secret.literal))] = _key_of(name, own, config.groups)
        if config.admin.key is not None:
            by_digest[digest_of(_revealed(config.admin.key.literal))] = Key(name=ADMIN, is_admin=True)
        self._by_digest = by_digest
        self._by_name = {key.name: key for key in by_digest.values()}
        self.are_required, self.are_several = bool(by_digest), len(by_digest) > 1

    def find(self, secret: bytes) -> Key | None:
        """Returns the key with a secret; None = there is none."""
        return self._by_digest.get(digest_of(secret))

    def named(self, name: str) -> Key:
        """Returns the key that owns something, by its name.

        What a hook or a channel owns has no key, and neither has what is left of a key that is no more: these get one
        without limits of its own.
        """
        key = self._by_name.get(name)
        if key is not None:
            return key
        return Key(name=name) if name else ANYBODY


def digest_of(secret: bytes) -> bytes:
    """The SHA-256 digest of a secret. Secrets are random, so a slow hash would protect nothing more."""
    return hashlib.sha256(secret).digest()


def _revealed(secret: str | None) -> bytes:
    assert secret, "the configuration reveals the secrets of keys"
    return secret.encode()


def _key_of(name: str, config: KeyConfig, groups: Mapping[str, GroupConfig]) -> Key:
    settings = KeySettings(**{field: getattr(config, field) for field in _SETTINGS})
    return Key(name=name, settings=settings, group=groups.get(settings.group or ""))
