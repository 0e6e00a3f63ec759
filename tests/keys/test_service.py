"""`trigate.keys`: finding keys by their secrets, and administering virtual ones."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support import slow
from tests.support.gateway import make_config
from tests.support.logs import Logs
from trigate.config.sections import Config
from trigate.errors import BadRequest, NotFound, RateLimited, StoreUnavailable, Unauthenticated
from trigate.keys import service
from trigate.keys.key import ANYBODY, Key
from trigate.keys.service import FAILURES, Keys, digest_of, open_keys
from trigate.keys.virtual import PREFIX, VirtualKeys
from trigate.store.interface import Store
from trigate.store.memory import open_memory_store
from trigate.store.records import VirtualKey
from trigate.store.sqlite import open_sqlite_store
from trigate.workers.membership import open_workers

HOME = "192.0.2.1"
ADMIN = {"admin": {"key": "the-key-of-the-admin"}, "keys": {"ada": "a-key-of-ada"}}


def configured(**sections: Any) -> Config:
    """A configuration with an admin and one key."""
    return make_config(**{**ADMIN, **sections})


@contextlib.asynccontextmanager
async def opened(store: Store, config: Config) -> AsyncIterator[tuple[Keys, VirtualKeys]]:
    """The services of one worker over a store."""
    async with open_workers(store) as workers, open_keys(store, workers, config) as keys:
        yield keys, VirtualKeys(store, workers, keys)


@contextlib.asynccontextmanager
async def in_memory(config: Config) -> AsyncIterator[tuple[Keys, VirtualKeys]]:
    """The same over a store of its own."""
    async with open_memory_store() as store, opened(store, config) as services:
        yield services


async def test_keys_of_the_configuration() -> None:
    """Each is found by its secret and by its name, with its settings and its group."""
    table = {"secret": "a-key-of-bob", "rpm": 7, "group": "team"}
    config = configured(keys={"ada": "a-key-of-ada", "bob": table}, groups={"team": {"tpm": 9}})
    async with in_memory(config) as (keys, _):
        found = keys.find(b"a-key-of-bob")
        assert found is not None
        assert (found.name, found.settings.rpm, found.id, found.is_admin) == ("bob", 7, "", False)
        assert found.group is not None
        assert found.group.tpm == 9
        assert keys.named("bob") is found
        admin = keys.find(b"the-key-of-the-admin")
        assert admin is not None
        assert (admin.name, admin.is_admin) == ("admin", True)
        assert keys.find(b"another") is keys.find(b"") is None


async def test_owners_without_a_key() -> None:
    """A hook and a channel may go on; what belongs to a key that is gone may not, unless the gateway needs no keys."""
    async with in_memory(configured()) as (keys, _):
        assert [keys.named(name).is_gone for name in ("hook:ci", "channel:bot", "eve")] == [False, False, True]
        keys.apply(make_config())
        assert not keys.are_required
        assert not keys.named("eve").is_gone
        assert keys.named("") is ANYBODY


async def test_a_virtual_key() -> None:
    """Its secret has 256 bits and is stored as a digest only; it works at once, with its settings."""
    async with open_memory_store() as store, opened(store, configured()) as (keys, virtual):
        made, secret = await virtual.create("eve", {"models": ["up/*"], "budget_usd": "12.5"})
        assert secret.startswith(PREFIX)
        assert len(secret.removeprefix(PREFIX)) == 43  # base64 of 32 bytes
        assert made.digest == hashlib.sha256(secret.encode()).digest()
        stored = await store.keys.get("eve")
        assert stored == made
        assert secret not in repr(stored)
        key = keys.find(secret.encode())
        assert key is not None
        assert (key.name, key.id, key.settings.budget_usd) == ("eve", made.id, 12_500_000)
        assert keys.find(secret.encode()) is key is keys.named("eve")


async def test_changes_of_a_virtual_key() -> None:
    """A change holds at once; None unsets a setting, and others stay."""
    async with in_memory(configured()) as (keys, virtual):
        made, secret = await virtual.create("eve", {"rpm": 5, "tags": ["x"]})
        await virtual.update("eve", {"tpm": 8})
        await virtual.update(made.id, {"rpm": None})
        key = keys.find(secret.encode())
        assert key is not None
        assert (key.settings.rpm, key.settings.tpm, key.settings.tags) == (None, 8, ("x",))


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"rpn": 1}, None),
        ({"rpm": "many"}, "rpm"),
        ({"group": "none"}, "group"),
        ({"metadata": {"x": "y" * 20000}}, "metadata"),
    ],
)
async def test_invalid_settings(settings: dict[str, Any], param: str | None) -> None:
    """They are refused with their name, when a key is made and when it is changed."""
    async with in_memory(configured()) as (_, virtual):
        await virtual.create("eve", {})
        for attempt in (virtual.create("mallory", settings), virtual.update("eve", settings)):
            with pytest.raises(BadRequest) as caught:
                await attempt
            if param is not None:
                assert caught.value.param == param


@pytest.mark.parametrize("name", ["", "hook:x", "a b", "x" * 65, "admin", "ada", "gone"])
async def test_names_that_are_refused(name: str) -> None:
    """A name is short and has no colon, and is neither that of a key of the configuration nor of a revoked one, which
    owns what it has made."""
    async with in_memory(configured()) as (_, virtual):
        await virtual.create("gone", {})
        await virtual.revoke("gone")
        with pytest.raises(BadRequest):
            await virtual.create(name, {})


async def test_rotation(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old secret is valid during the overlap, and no longer; the one before it is not valid at all."""
    async with in_memory(configured()) as (keys, virtual):
        _, first = await virtual.create("eve", {})
        _, second = await virtual.rotate("eve", overlap_s=60)
        _, third = await virtual.rotate("eve", overlap_s=60)
        valid = [keys.find(secret.encode()) is not None for secret in (first, second, third)]
        assert valid == [False, True, True]
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 61)
        assert [keys.find(secret.encode()) is not None for secret in (second, third)] == [False, True]
        _, fourth = await virtual.rotate("eve", overlap_s=0)
        assert [keys.find(secret.encode()) is not None for secret in (third, fourth)] == [False, True]
        with pytest.raises(BadRequest):
            await virtual.rotate("eve", overlap_s=-1)


async def test_revocation() -> None:
    """A revoked key is found no more, not even after a change, and its runs are refused. It stays in the list."""
    async with in_memory(configured()) as (keys, virtual):
        ended: list[str] = []
        keys.on_revoked = ended.append
        made, secret = await virtual.create("eve", {})
        await virtual.revoke("eve")
        assert keys.find(secret.encode()) is None
        assert keys.named("eve").is_gone
        assert ended == [made.id]
        assert made.id in keys.revoked
        for attempt in (virtual.update("eve", {"rpm": 1}), virtual.rotate("eve", overlap_s=0)):
            with pytest.raises(BadRequest, match="revoked"):
                await attempt
        assert [key.revoked_at is not None for key in await virtual.list(limit=9)] == [True]
        with pytest.raises(NotFound):
            await virtual.revoke("nobody")


async def test_expiry() -> None:
    """An expired key is refused, wherever it is."""
    keys_of = {"old": {"secret": "a-key-of-old", "expires_at": "2001-01-01"}}
    async with in_memory(configured(keys=keys_of)) as (keys, virtual):
        assert keys.find(b"a-key-of-old") is None
        _, secret = await virtual.create("eve", {"expires_at": time.time() + 100})
        assert keys.find(secret.encode()) is not None
        await virtual.update("eve", {"expires_at": "2001-01-01T00:00:00Z"})
        assert keys.find(secret.encode()) is None


async def test_without_an_admin_there_are_no_virtual_keys() -> None:
    """Those of the store are refused, and the store is not asked."""
    async with open_memory_store() as store:
        async with opened(store, configured()) as (_, virtual):
            _, secret = await virtual.create("eve", {})
        async with opened(store, make_config(keys=ADMIN["keys"])) as (keys, _):
            assert keys.find(secret.encode()) is None


async def test_a_name_or_a_group_that_the_configuration_takes_away() -> None:
    """A virtual key whose name the configuration has, or whose group it has no more, is refused."""
    config = configured(groups={"team": {}})
    async with in_memory(config) as (keys, virtual):
        _, eve = await virtual.create("eve", {})
        _, bob = await virtual.create("bob", {"group": "team"})
        assert keys.find(eve.encode()) is not keys.find(bob.encode()) is not None
        keys.apply(configured(keys={"eve": "another-secret"}))
        assert keys.find(eve.encode()) is keys.find(bob.encode()) is None
        keys.apply(config)
        assert None not in (keys.find(eve.encode()), keys.find(bob.encode()))


@pytest.mark.slow
async def test_changes_reach_other_workers(tmp_path: Path) -> None:
    """Within a second, also where a notification is lost: the other worker has not joined, so it gets none."""
    path = tmp_path / "store.db"
    async with (
        open_sqlite_store(path) as one,
        open_sqlite_store(path) as two,
        opened(one, configured()) as (_, virtual),
        opened(two, configured()) as (others, _),
    ):
        _, secret = await virtual.create("eve", {})
        with trio.fail_after(1):
            while others.find(secret.encode()) is None:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
        await virtual.revoke("eve")
        with trio.fail_after(1):
            while others.find(secret.encode()) is not None:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)


# -- failures ---------------------------------------------------------------------------------------------------------


def outcome(keys: Keys, secret: bytes, address: str | None = HOME) -> str | type[Exception]:
    """The name of the key, or the error."""
    try:
        return keys.authenticate(secret, address).name
    except Exception as error:
        return type(error)


async def test_an_address_that_fails_too_often(autojump_clock: MockClock) -> None:
    """It gets 429, with a wrong key and with a right one, so that it cannot guess. A key that has been used from there,
    and other addresses, are not affected. It may try again after a while."""
    config = make_config(keys={"ada": "a-key-of-ada", "bob": "a-key-of-bob"})
    async with in_memory(config) as (keys, _):
        assert outcome(keys, b"a-key-of-ada") == "ada"
        assert {outcome(keys, b"guess %d" % number) for number in range(FAILURES)} == {Unauthenticated}
        assert outcome(keys, b"guess") is outcome(keys, b"a-key-of-bob") is RateLimited
        assert outcome(keys, b"a-key-of-ada") == "ada"
        assert outcome(keys, b"a-key-of-bob", "192.0.2.2") == "bob"
        keys.apply(config)  # a reload does not lock neighbours out
        assert outcome(keys, b"a-key-of-ada") == "ada"
        await trio.sleep(3)
        assert outcome(keys, b"a-key-of-bob") == "bob"
        assert outcome(keys, b"guess") is Unauthenticated


async def test_a_client_that_repeats_a_wrong_key(autojump_clock: MockClock) -> None:
    """It gets 429 like one that sends none, but keys that are new at its address are not refused for that, as behind a
    proxy; a guess that got no answer is not told from a key."""
    config = make_config(keys={"ada": "a-key-of-ada", "bob": "a-key-of-bob"})
    async with in_memory(config) as (keys, _):
        for secret in (b"the-old-key", b""):
            said = [outcome(keys, secret) for _ in range(2 * FAILURES)]
            assert said[-1] is RateLimited
        assert outcome(keys, b"a-key-of-ada") == "ada"
        for number in range(FAILURES):
            outcome(keys, b"guess %d" % number)
        await trio.sleep(1)
        assert {outcome(keys, secret) for secret in (b"guess", b"guess", b"a-key-of-bob")} == {RateLimited}


async def test_settings_of_a_later_version() -> None:
    """A key with a setting that is not known may use nothing, since the setting may be a limit."""
    async with open_memory_store() as store, opened(store, configured()) as (keys, _):
        row = VirtualKey("key_1", "eve", digest_of(b"a-secret"), "sk", b'{"rpd":5}', 0.0)
        await store.keys.add(row)
        await keys.refresh()
        key = keys.find(b"a-secret")
        assert key is not None
        assert not key.may_use("up/m", ["up/m"])
        assert not key.may_call_hook("ci")


async def test_failures_need_bounded_memory(autojump_clock: MockClock) -> None:
    """Addresses are forgotten in excess of a number, also those from which one key has been used, and an IPv6 client
    has one allowance for its whole network."""
    async with in_memory(make_config(keys={"ada": "a-key-of-ada"})) as (keys, _):
        for number in range(11_000):
            outcome(keys, b"guess %d" % number, f"198.51.{number // 256}.{number % 256}")
        assert {len(kept) for kept in (keys._failures, keys._guesses, keys._wrong)} == {10_000}
        for number in range(100):
            assert outcome(keys, b"a-key-of-ada", f"203.0.113.{number}") == "ada"
        assert len(keys.named("ada").addresses) == 64
        for number in range(FAILURES):
            assert outcome(keys, b"guess", f"2001:db8::{number:x}") is Unauthenticated
        assert outcome(keys, b"guess", "2001:db8::ffff") is RateLimited


async def test_failures_do_not_tell_which_keys_exist() -> None:
    """An unknown key, an expired one and a revoked one get the same answer."""
    async with in_memory(configured()) as (keys, virtual):
        _, expired = await virtual.create("eve", {"expires_at": 1})
        _, revoked = await virtual.create("bob", {})
        await virtual.revoke("bob")
        said = set()
        for secret in (expired, revoked, PREFIX + "x" * 43, "short"):
            with pytest.raises(Unauthenticated) as caught:
                keys.authenticate(secret.encode(), HOME)
            said.add((caught.value.message, caught.value.status, caught.value.code))
        assert len(said) == 1


async def test_a_store_that_cannot_be_read(logs: Logs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of the configuration work; any other one gets 503 and not 401, since it may be right."""
    logs.expect_error("store_unavailable")
    logs.expect_error("keys_unavailable")
    monkeypatch.setattr(service, "LOAD_S", 0.1)
    async with open_sqlite_store(tmp_path) as store, opened(store, configured()) as (keys, _):  # a directory
        assert outcome(keys, b"a-key-of-ada") == "ada"
        assert outcome(keys, b"another") is StoreUnavailable
        with trio.fail_after(5):
            while not logs.named("keys_unavailable"):  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.001)


# -- many keys --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_hundred_thousand_keys(tmp_path: Path) -> None:
    """They are loaded within a second, and a look-up costs as much as with one."""
    path, many = tmp_path / "store.db", 100_000
    async with open_sqlite_store(path) as store:
        await store.check()
    import apsw

    with contextlib.closing(apsw.Connection(str(path))) as db, db:
        db.executemany(
            "INSERT INTO keys (id, name, version, digest, shown, settings, created_at, old_digest, old_until)"
            " VALUES (?, ?, ?, ?, '', x'7b7d', 0.0, x'', 0.0)",
            ((f"key_{n}", f"n{n}", n + 1, hashlib.sha256(b"secret %d" % n).digest()) for n in range(many)),
        )
    config = configured()
    async with open_sqlite_store(path) as store:
        allowed_s = max(1.0, slow.limit_s() / slow.LIMIT_S)  # on a machine as slow as this one is now
        began = time.process_time()  # of all threads
        async with opened(store, config) as (keys, _):
            assert time.process_time() - began < allowed_s
            assert keys.find(b"secret 99999") is not None
            costs = []
            for secret in (b"secret 99999", b"a-key-of-ada"):
                costs.append(min(_cost_s(keys, secret) for _ in range(5)))
            assert costs[0] < 2 * costs[1] + 1e-6


def _cost_s(keys: Keys, secret: bytes) -> float:
    began = time.perf_counter()
    for _ in range(1000):
        keys.find(secret)
    return (time.perf_counter() - began) / 1000


# -- what a key may do ------------------------------------------------------------------------------------------------


def test_lists_of_a_key_and_of_its_group() -> None:
    """Both hold: a model must be on each of the lists."""
    config = configured(
        keys={"ada": {"secret": "a-key-of-ada", "models": ["fast", "openai/*"], "group": "team"}},
        groups={"team": {"models": ["openai/gpt-5*"]}},
    )
    key = Key(settings=config.keys["ada"], group=config.groups["team"])
    assert key.limits_models
    assert key.may_use("gpt-5", ["openai/gpt-5"])
    assert not key.may_use("gpt-4", ["openai/gpt-4"])
    assert not key.may_use("fast", ["groq/x"])
    assert not key.may_use("", ["openai/"])
    assert not Key().limits_models
