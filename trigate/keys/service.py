"""The keys of the gateway: finds the key of a request by its secret, and that of a stored owner by its name.

A key is found by the SHA-256 digest of its secret, in a dict. So the number of keys costs nothing, and no secret is
compared with a given one: the time of a look-up says nothing about the secrets that exist.

*Virtual keys* are made at run time (`keys.virtual`). The store has them, and every worker has all of them in memory. A
worker that changes one notifies the others, and each asks the store for changes every `POLL_S` seconds, since a
notification may be lost. There are virtual keys only while the configuration has an admin key; without one, nothing is
asked and nothing is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping

import attrs
import msgspec
import trio

from trigate.concurrency.notify import Wakeup, open_service
from trigate.concurrency.rate_limiter import RateLimiter
from trigate.config import converter
from trigate.config.key_sections import GroupConfig, KeyConfig, KeySettings
from trigate.config.sections import Config
from trigate.errors import RateLimited, StoreUnavailable, Unauthenticated
from trigate.keys.key import ANYBODY, Key
from trigate.logs import log
from trigate.store.interface import Store
from trigate.store.records import LoadedKey
from trigate.workers.membership import Workers

ADMIN = "admin"
"""The name of the admin's key."""
TOPIC = "keys"
"""The topic of the notification that keys have changed."""
POLL_S = 0.5
"""Seconds between two questions for changed keys: a revoked key is refused everywhere within a second."""
LOAD_S = 5.0
"""Seconds that the start waits for the keys of a store that is slow."""
FAILURES = 30
"""How many requests of an address may fail at once for want of a key; see `Keys.authenticate`."""
FAILURES_PER_S = 0.5
_MAX_WRONG = 10_000
_SETTINGS = [field.name for field in attrs.fields(KeySettings)]


class Keys:
    """All keys. Made by `open_keys`.

    Attributes:
        are_required: A request needs a key; False = none is configured, and anybody may call.
        are_several: There may be more than one, whose objects are kept apart.
        are_virtual: There may be virtual ones.
        revoked: The ids of the keys that were revoked since the start of this worker.
        on_revoked: Called with the id of a key that has been revoked.
    """

    def __init__(self, store: Store, workers: Workers) -> None:
        self._store = store
        self._config = Config()
        self._own: dict[bytes, Key] = {}  # of the configuration, by digest
        self._by_digest: dict[bytes, Key] = {}  # all that have been used
        self._by_name: dict[str, Key] = {}
        self._loaded: dict[bytes, LoadedKey] = {}
        self._old: dict[bytes, LoadedKey] = {}  # by the digest before the last rotation
        self._by_id: dict[str, LoadedKey] = {}
        self._ids: dict[str, str] = {}  # by name
        self._version = 0
        self._is_loaded = False
        self._is_failing = False
        self._refreshing = trio.Lock()
        self._check_now = Wakeup()
        self._failures = RateLimiter()
        self._guesses = RateLimiter()
        self._wrong: dict[bytes, None] = {}  # the digests of the last keys that were found to be wrong
        self.are_required = False
        self.are_several = False
        self.are_virtual = False
        self.revoked: set[str] = set()
        self.on_revoked: Callable[[str], None] = lambda key_id: None
        workers.on_notify(TOPIC, lambda _: self._check_now.set())

    def __repr__(self) -> str:
        return f"<Keys: {len(self._own)} configured, {len(self._by_id)} made at run time>"

    def apply(self, config: Config) -> None:
        """Follows a configuration. Synchronous."""
        own: dict[bytes, Key] = {}
        for name, settings in config.keys.items():
            own[digest_of(_revealed(settings.secret.literal))] = _key_of(name, settings, config.groups)
        if config.admin.key is not None:
            own[digest_of(_revealed(config.admin.key.literal))] = Key(name=ADMIN, is_admin=True)
        for digest, key in own.items():  # where a key has been used from does not change with the configuration
            before = self._own.get(digest)
            if before is not None:
                key.addresses.update(before.addresses)
        self._config = config
        self._own = own
        self._forget_made()
        self.are_virtual = config.admin.key is not None
        self.are_required, self.are_several = bool(own), len(own) > 1 or self.are_virtual
        if self.are_virtual:
            self._check_now.set()

    def _forget_made(self) -> None:
        """Forgets the virtual keys as they were made of their rows: their groups may have changed."""
        self._by_digest = dict(self._own)
        self._by_name = {key.name: key for key in self._own.values()}

    # -- finding ------------------------------------------------------------------------------------------------------

    def authenticate(self, secret: bytes, address: str | None) -> Key:
        """Returns the key of a request.

        An address may fail `FAILURES` times at once, and `FAILURES_PER_S` in the long run; further failures are a 429.
        If it has failed so often with *different* keys, every key is refused, right or wrong, that has not been used
        from it before: it cannot guess. A client that repeats a wrong key, or has none, does not lock out its
        neighbours. An IPv6 address counts with all of its /64 network.

        Args:
            secret: What the request has; empty = nothing.
            address: Of the client; None = unknown.

        Raises:
            Unauthenticated: There is no such key, or it has expired or been revoked: the answer does not say which.
            RateLimited: The address has failed too often.
            StoreUnavailable: The key may be a virtual one, and these could not be read yet.
        """
        key = self._by_digest.get(digest_of(secret))
        if key is not None and address in key.addresses and key.settings.expires_at is None:
            return key  # the usual case, without a further look
        key = self.find(secret)
        if key is not None and address in key.addresses:
            return key
        if wait_s := self._wait_s(secret, _network(address), is_known=key is not None):
            raise RateLimited("Too many requests from this address had no valid key.", retry_after_s=wait_s)
        if key is None:
            if self.are_virtual and not self._is_loaded and secret:
                raise StoreUnavailable("The keys of this gateway cannot be read now.")
            problem = "Incorrect API key provided." if secret else "You didn't provide an API key."
            raise Unauthenticated(f"{problem} This gateway requires one: Authorization: Bearer YOUR_KEY.")
        key.note_address(address)
        return key

    def _wait_s(self, secret: bytes, network: str, *, is_known: bool) -> float:
        """Counts a request that has no key, or one that has not been used from its address; 0.0 = it is answered, else
        after how many seconds it would be."""
        now = trio.current_time()
        if is_known:
            return self._guesses.wait_s(network, rate_per_s=FAILURES_PER_S, burst=FAILURES, now=now)
        wait_s = self._failures.take(network, rate_per_s=FAILURES_PER_S, burst=FAILURES, now=now)
        if not secret or (digest := digest_of(secret)) in self._wrong:
            return wait_s
        guess_s = self._guesses.take(network, rate_per_s=FAILURES_PER_S, burst=FAILURES, now=now)
        if not guess_s:  # a guess that got no answer is none: the next time, it gets none either
            if len(self._wrong) >= _MAX_WRONG:
                del self._wrong[next(iter(self._wrong))]
            self._wrong[digest] = None
        return max(wait_s, guess_s)

    def find(self, secret: bytes) -> Key | None:
        """Returns the key with a secret; None = there is none, or it has expired."""
        digest = digest_of(secret)
        key = self._by_digest.get(digest)
        if key is None and (not self.are_virtual or (key := self._find_virtual(digest)) is None):
            return None
        expires_at = key.settings.expires_at
        return key if expires_at is None or time.time() < expires_at else None

    def _find_virtual(self, digest: bytes) -> Key | None:
        loaded = self._loaded.get(digest)
        is_old = loaded is None
        if loaded is None:
            loaded = self._old.get(digest)
            if loaded is None or time.time() >= loaded.old_until:
                return None
        key = self._made(loaded)
        if key.is_gone:
            return None
        if not is_old:
            self._by_digest[digest] = key
        return key

    def _made(self, loaded: LoadedKey) -> Key:
        """The key of a row. One whose name the configuration has since taken, or whose group is gone, is none."""
        key = self._by_name.get(loaded.name)
        if key is not None:
            return key if key.id == loaded.id else _gone(loaded.name)
        settings = settings_of(loaded.settings)
        group = self._config.groups.get(settings.group or "")
        if settings.group is not None and group is None:
            return _gone(loaded.name)
        key = self._by_name[loaded.name] = Key(name=loaded.name, id=loaded.id, settings=settings, group=group)
        return key

    def named(self, name: str) -> Key:
        """Returns the key that owns something, by its name.

        What a hook or a channel owns has no key: these get one without limits of its own. The key of an owner that is
        no more `is_gone`.
        """
        key = self._by_name.get(name)
        if key is not None:
            return key
        if not name:
            return ANYBODY
        if self.are_virtual and (key_id := self._ids.get(name)) is not None:
            return self._made(self._by_id[key_id])
        return Key(name=name, is_gone=self.are_required and ":" not in name)

    def is_known(self, name: str) -> bool:
        """Whether there is a key of that name now."""
        return self.is_configured(name) or name in self._by_name or name in self._ids

    def is_configured(self, name: str) -> bool:
        """Whether the configuration has a key of that name, or the admin's key has it."""
        return name == ADMIN or name in self._config.keys

    def has_group(self, name: str) -> bool:
        """Whether the configuration has a group of that name."""
        return name in self._config.groups

    # -- virtual keys -------------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Takes what has changed in the store.

        Raises:
            StoreUnavailable: It cannot be read.
        """
        async with self._refreshing:
            changed = await self._store.keys.since(self._version)
            if self._version:
                for row in changed:
                    self._take(row)
            else:  # all of them, perhaps very many
                self._by_id = {row.id: row for row in changed}
                self._ids = {row.name: row.id for row in changed}
                self._loaded = {row.digest: row for row in changed}
                self._old = {row.old_digest: row for row in changed if row.old_digest}
            if changed:
                self._version = changed[-1].version
            self._is_loaded = True

    def _take(self, row: LoadedKey) -> None:
        before = self._by_id.pop(row.id, None)
        if before is not None:
            for digest in (before.digest, before.old_digest):
                self._by_digest.pop(digest, None)
                self._loaded.pop(digest, None)
                self._old.pop(digest, None)
            if (made := self._by_name.get(row.name)) is not None and made.id == row.id:
                del self._by_name[row.name]
        if row.is_revoked:
            self._ids.pop(row.name, None)
            self.revoked.add(row.id)
            self.on_revoked(row.id)
            return
        self._by_id[row.id] = row
        self._ids[row.name] = row.id
        self._loaded[row.digest] = row
        if row.old_digest:
            self._old[row.old_digest] = row

    async def run(self) -> None:
        """Takes changed virtual keys, while there may be some; never returns."""
        while True:
            if self.are_virtual:
                try:
                    await self.refresh()
                except StoreUnavailable as error:
                    if not self._is_failing:
                        log.error("keys_unavailable", reason=error.message)
                    self._is_failing = True
                except Exception:  # a defect must not end the gateway
                    log.exception("keys_crashed")
                else:
                    self._is_failing = False
            with trio.move_on_after(POLL_S if self.are_virtual else float("inf")):
                await self._check_now.wait()

    async def load(self) -> None:
        """Waits until the virtual keys are there, if there may be some, but not longer than `LOAD_S`."""
        await trio.lowlevel.checkpoint()
        if not self.are_virtual:
            return
        with trio.move_on_after(LOAD_S), contextlib.suppress(StoreUnavailable):
            await self.refresh()


@contextlib.asynccontextmanager
async def open_keys(store: Store, workers: Workers, config: Config) -> AsyncIterator[Keys]:
    """Opens the service."""
    keys = Keys(store, workers)
    keys.apply(config)
    await keys.load()
    async with open_service(keys.run):
        yield keys


def digest_of(secret: bytes) -> bytes:
    """The SHA-256 digest of a secret. Secrets are random, so a slow hash would protect nothing more."""
    return hashlib.sha256(secret).digest()


def settings_of(stored: bytes) -> KeySettings:
    """Returns the settings of a virtual key. One with a setting that this version does not know gets none of them, and
    so may do nothing: that is safer than to leave a limit out."""
    problems: list[str] = []
    settings = converter.convert(KeySettings, msgspec.json.decode(stored), "", problems)
    return settings if settings is not None else KeySettings(models=(), hooks=())


def _revealed(secret: str | None) -> bytes:
    assert secret, "the configuration reveals the secrets of keys"
    return secret.encode()


def _key_of(name: str, config: KeyConfig, groups: Mapping[str, GroupConfig]) -> Key:
    settings = KeySettings(**{field: getattr(config, field) for field in _SETTINGS})
    return Key(name=name, settings=settings, group=groups.get(settings.group or ""))


def _gone(name: str) -> Key:
    return Key(name=name, is_gone=True)


def _network(address: str | None) -> str:
    """An address, or the network of it: one client has all of an IPv6 /64.

    >>> _network("192.0.2.1"), _network("2001:db8::1"), _network("2001:db8:0:0:5::1"), _network(None)
    ('192.0.2.1', '2001:db8:0:0', '2001:db8:0:0', '')
    """
    if address is None or ":" not in address or address.startswith("::ffff:"):
        return address or ""
    head, gap, tail = address.partition("::")
    groups = head.split(":") if head else []
    if gap:
        rest = tail.split(":") if tail else []
        groups += ["0"] * (8 - len(groups) - len(rest)) + rest
    return ":".join(groups[:4])
