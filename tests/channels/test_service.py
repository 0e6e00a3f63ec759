"""Channels are supervised, each alone; and they follow the configuration."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import attrs
import httpx2
import pytest
import trio

from tests.support.gateway import make_config
from tests.support.logs import Logs
from trigate.channels import service as channels
from trigate.channels.adapter import Channel, Refused, Trouble
from trigate.channels.service import GOOD_S, MAX_PAUSE_S, PAUSE_S, Channels, ChannelStatistics, open_channels
from trigate.config.sections import Config, ConfigError
from trigate.errors import StoreUnavailable
from trigate.upstream.factory import http_transport
from trigate.upstream.transport import SocketTransport

TOKEN = "123456:token-of-a-test"


class Scripted:
    """An adapter that lives as its script says: seconds to live, then what it raises; then for ever."""

    default_base_url: ClassVar[str] = "http://platform.invalid"
    scripts: ClassVar[dict[str, list[tuple[float, Exception]]]] = {}
    begun: ClassVar[list[tuple[str, float]]] = []
    alive: ClassVar[set[str]] = set()

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    async def run(self) -> None:
        """As `Adapter.run`."""
        name = self.channel.name
        self.begun.append((name, trio.current_time()))
        assert name not in self.alive, "it runs twice"
        self.alive.add(name)
        try:
            script = self.scripts.get(name)
            lives_s, error = script.pop(0) if script else (None, None)
            if error is None or lives_s:
                self.channel.note_connected()
            await trio.sleep(lives_s if lives_s is not None else float("inf"))
            assert error is not None
            raise error
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.5)  # to end takes its time
            self.alive.discard(name)


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The platforms are scripted."""
    monkeypatch.setattr(channels, "_adapter_of", lambda kind: Scripted)
    monkeypatch.setattr(Scripted, "scripts", {})
    monkeypatch.setattr(Scripted, "begun", [])
    monkeypatch.setattr(Scripted, "alive", set())


def config_of(*names: str, **own: Any) -> Config:
    """A configuration with these channels."""
    return make_config(channels={name: {"type": "telegram", "token": TOKEN, **own} for name in names})


@contextlib.asynccontextmanager
async def open_service(config: Config) -> AsyncIterator[tuple[Channels, Any, Callable[[Config], None]]]:
    """The service, what it uses of a gateway, and how to give that another configuration."""
    gateway: Any = SimpleNamespace(
        generation=SimpleNamespace(config=config),
        runs=SimpleNamespace(live_views={}),
        outbox=SimpleNamespace(carriers={}, look=lambda: None),
    )

    def reload(config: Config) -> None:
        gateway.generation = SimpleNamespace(config=config)
        service.apply()

    async with open_channels(gateway, lambda name, upstream: httpx2.MockTransport(lambda _: None)) as service:  # type: ignore[arg-type, return-value]
        yield service, gateway, reload


def states(service: Channels) -> dict[str, str]:
    """Each channel's state."""
    return {each.name: each.state for each in service.statistics()}


def beginnings(name: str) -> list[float]:
    """When an adapter was begun."""
    return [at for who, at in Scripted.begun if who == name]


async def test_alone(autojump_clock: trio.testing.MockClock, logs: Logs) -> None:
    """A channel that crashes is logged once for each crash, and tried again; the other one goes on."""
    logs.expect_error("channel_crashed")
    Scripted.scripts = {"a": [(5.0, RuntimeError("a defect"))]}
    async with open_service(config_of("a", "b")) as (service, _, _):
        await trio.sleep(1)
        assert states(service) == {"a": "connected", "b": "connected"}
        await trio.sleep(4.6)
        assert states(service) == {"a": "disconnected", "b": "connected"}
        await trio.sleep(10)
        assert states(service) == {"a": "connected", "b": "connected"}
        assert service.statistics()[0].last_error == "a defect"
    assert (len(beginnings("a")), len(beginnings("b"))) == (2, 1)
    [entry] = logs.named("channel_crashed")
    assert (entry["channel"], entry["error"]) == ("a", "a defect")


async def test_pauses(autojump_clock: trio.testing.MockClock, logs: Logs) -> None:
    """Pauses double, with jitter, up to the longest; an outage is one line in the log."""
    Scripted.scripts = {"a": [(0.0, Trouble("nobody there"))] * 12}
    async with open_service(config_of("a")):
        await trio.sleep(20 * MAX_PAUSE_S)
    at = beginnings("a")
    assert len(at) == 13
    for number, pause_s in enumerate(after - before - 0.5 for before, after in itertools.pairwise(at)):
        longest_s = min(PAUSE_S * 2**number, MAX_PAUSE_S)
        assert longest_s / 2 <= round(pause_s, 6) <= longest_s
    [entry] = logs.named("channel_disconnected")
    assert entry["error"] == "nobody there"


async def test_good_while(autojump_clock: trio.testing.MockClock, logs: Logs) -> None:
    """After it has gone well for a good while, the pauses begin at the short end, and it is worth a line again."""
    Scripted.scripts = {"a": [*[(0.0, Trouble("nobody there"))] * 8, (GOOD_S, Trouble("nobody there"))]}
    async with open_service(config_of("a")):
        await trio.sleep(20 * MAX_PAUSE_S)
    *_, before, after = beginnings("a")
    assert after - before - GOOD_S - 0.5 <= PAUSE_S
    assert len(logs.named("channel_disconnected")) == 2


async def test_refused(autojump_clock: trio.testing.MockClock) -> None:
    """A token that is refused is tried again at the slow end, whatever else the adapter's nursery says."""
    group = ExceptionGroup("in a nursery", [Trouble("nobody there"), Refused("not this token")])
    Scripted.scripts = {"a": [(0.0, group)]}
    async with open_service(config_of("a")) as (service, _, _):
        await trio.sleep(MAX_PAUSE_S / 2)
        assert len(beginnings("a")) == 1
        assert service.statistics()[0].state == "disconnected"
        await trio.sleep(MAX_PAUSE_S)
        assert states(service) == {"a": "connected"}


async def test_told_when(autojump_clock: trio.testing.MockClock) -> None:
    """A platform that says when it wants to be asked again is not asked before."""
    Scripted.scripts = {"a": [(0.0, Trouble("too often", after_s=33.0))]}
    async with open_service(config_of("a")):
        await trio.sleep(100)
    first, second = beginnings("a")
    assert second - first >= 33.0


async def test_store_is_trouble(autojump_clock: trio.testing.MockClock, logs: Logs) -> None:
    """What the store cannot do is a trouble that passes, and no defect of the channel."""
    Scripted.scripts = {"a": [(0.0, StoreUnavailable("the disk is full"))]}
    async with open_service(config_of("a")) as (service, _, _):
        await trio.sleep(10)
        assert service.statistics()[0].last_error == "the disk is full"
    assert logs.named("channel_crashed") == []


async def test_reload(autojump_clock: trio.testing.MockClock) -> None:
    """A reload leaves alone what is as it was, ends what is gone, and begins what is new or changed: when what it was
    before has ended."""
    async with open_service(config_of("same", "changed", "gone")) as (service, gateway, reload):
        await trio.sleep(1)
        kept, before = service.adapter("same"), service.adapter("changed")
        own = config_of("same", "new")
        reload(attrs.evolve(own, channels={**own.channels, **config_of("changed", model="other").channels}))
        await trio.sleep(1)
        assert Scripted.alive == {"same", "changed", "new"}
        assert service.adapter("same") is kept
        assert service.adapter("changed") not in (None, before)
        assert service.adapter("gone") is None
        assert set(gateway.runs.live_views) == set(gateway.outbox.carriers) == {"same", "changed", "new"}
        assert gateway.outbox.carriers["changed"] is service.adapter("changed")
    assert len(beginnings("same")) == 1
    assert len(beginnings("changed")) == 2


async def test_changed_in_a_row(autojump_clock: trio.testing.MockClock) -> None:
    """Several changes in a row leave the last one, and never two at once."""
    async with open_service(config_of("a")) as (service, _, reload):
        await trio.sleep(1)
        for model in ("b", "c", "", "d"):
            reload(config_of("a", model=model) if model else config_of())
        await trio.sleep(5)
        assert states(service) == {"a": "connected"}
        assert service._running["a"].config.model == "d"


async def test_disabled(autojump_clock: trio.testing.MockClock) -> None:
    """What is switched off, or has no token, is disabled, and says why; it takes no calls."""
    config = make_config(
        channels={
            "off": {"type": "telegram", "token": TOKEN, "enabled": False},
            "none": {"type": "telegram", "token": {"env": "NOT_SET"}},
        }
    )
    async with open_service(config) as (service, _, _):
        assert states(service) == {"off": "disabled", "none": "disabled"}
        assert all(each.last_error for each in service.statistics())
        assert service.adapter("off") is None
    assert Scripted.begun == []


async def test_unusable(autojump_clock: trio.testing.MockClock, logs: Logs) -> None:
    """A channel that cannot be begun is disconnected, and no other one is touched; the next reload tries again."""
    logs.expect_error("channel_unusable")
    gateway: Any = SimpleNamespace(
        generation=SimpleNamespace(config=config_of("a", "b")),
        runs=SimpleNamespace(live_views={}),
        outbox=SimpleNamespace(carriers={}, look=lambda: None),
    )
    failures = [ConfigError("SSL_CERT_FILE", ("cannot be used",))]

    def make(name: str, upstream: Any) -> httpx2.AsyncBaseTransport:
        if failures:
            raise failures.pop()
        return http_transport(name, upstream)

    async with open_channels(gateway, make) as service:
        await trio.sleep(1)
        assert states(service) == {"a": "disconnected", "b": "connected"}
        service.apply()
        await trio.sleep(1)
        assert states(service) == {"a": "connected", "b": "connected"}


async def test_hooks(autojump_clock: trio.testing.MockClock) -> None:
    """A hook is a channel: connected when it is ready. It has been so since it was, through reloads."""
    own = make_config(hooks={"a": {}, "b": {"enabled": False}}, channels={"c": {"type": "telegram", "token": TOKEN}})
    async with open_service(own) as (service, _, reload):
        assert [each.type for each in service.statistics()] == ["webhook", "webhook", "telegram"]
        assert states(service) | {"c": ""} == {"a": "connected", "b": "disabled", "c": ""}
        before: ChannelStatistics = service.statistics()[0]
        reload(own)
        assert service.statistics()[0] == before
        reload(make_config(hooks={"a": {"enabled": False}}))
        assert states(service) == {"a": "disabled"}


async def test_transports(autojump_clock: trio.testing.MockClock) -> None:
    """What a platform is reached by is made as for an upstream, and closed with the channel."""
    made: list[httpx2.AsyncBaseTransport] = []

    def make(name: str, upstream: Any) -> httpx2.AsyncBaseTransport:
        assert (name, upstream.base_url) == ("channels.a", "http://platform.invalid")
        made.append(http_transport(name, upstream))
        return made[-1]

    gateway: Any = SimpleNamespace(
        generation=SimpleNamespace(config=config_of("a")),
        runs=SimpleNamespace(live_views={}),
        outbox=SimpleNamespace(carriers={}, look=lambda: None),
    )
    async with open_channels(gateway, make):
        await trio.sleep(1)
    [transport] = made
    assert isinstance(transport, SocketTransport)
    assert Scripted.alive == set()
