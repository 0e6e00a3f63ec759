"""Each channel is supervised on its own, and the channels follow the configuration."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import attrs
import httpx2
import pytest
import trio

from tests.channels.services import open_services
from tests.support.gateway import make_config
from tests.support.logs import Logs
from trigate.channels import service
from trigate.channels.adapter import Channel, ChannelServices, PlatformError, TokenRejected
from trigate.channels.service import (
    GOOD_S,
    MAX_PAUSE_S,
    PAUSE_S,
    Channels,
    ChannelStatistics,
    Transports,
    open_channels,
)
from trigate.config.sections import Config, ConfigError, UpstreamConfig
from trigate.errors import StoreUnavailable
from trigate.upstream.factory import TrustStore, http_transport
from trigate.upstream.generation import Generation, Generations
from trigate.upstream.transport import SocketTransport

TOKEN = "123456:token-of-a-test"


class Scripted:
    """An adapter that runs as its script says: each entry is how many seconds it runs, then what it raises. After the
    last entry it runs for ever."""

    default_base_url: ClassVar[str] = "http://platform.invalid"
    scripts: ClassVar[dict[str, list[tuple[float, Exception]]]] = {}
    begun: ClassVar[list[tuple[str, float]]] = []
    alive: ClassVar[set[str]] = set()

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    async def run(self) -> None:
        """Runs the next entry of the script."""
        name = self.channel.name
        self.begun.append((name, trio.current_time()))
        assert name not in self.alive, "it runs twice at the same time"
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
                await trio.sleep(0.5)  # stopping takes a while
            self.alive.discard(name)


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the platforms by scripted ones."""
    monkeypatch.setattr(service, "_adapter_class", lambda platform: Scripted)
    monkeypatch.setattr(Scripted, "scripts", {})
    monkeypatch.setattr(Scripted, "begun", [])
    monkeypatch.setattr(Scripted, "alive", set())


def config_of(*names: str, **own: Any) -> Config:
    """A configuration with these channels."""
    return make_config(channels={name: {"type": "telegram", "token": TOKEN, **own} for name in names})


def no_platform(name: str, upstream: UpstreamConfig) -> httpx2.AsyncBaseTransport:
    """A transport that is never used: the adapters are scripted."""

    def refuse(request: httpx2.Request) -> httpx2.Response:
        raise AssertionError(request)

    return httpx2.MockTransport(refuse)


@attrs.frozen
class Opened:
    """The service, what it uses, and how to give it another configuration."""

    channels: Channels
    services: ChannelServices
    generations: Generations

    def reload(self, config: Config) -> None:
        """Replaces the configuration."""
        self.generations.replace(Generation(config, {}, TrustStore()))
        self.channels.apply()


@contextlib.asynccontextmanager
async def open_configured(config: Config, transports: Transports = no_platform) -> AsyncIterator[Opened]:
    """Opens the channels of a configuration."""
    generations = Generations(Generation(config, {}, TrustStore()))
    async with (
        open_services() as services,
        open_channels(
            **attrs.asdict(services, recurse=False), generations=generations, transports=transports
        ) as channels,
    ):
        yield Opened(channels, services, generations)


def states(channels: Channels) -> dict[str, str]:
    """Each channel's state."""
    return {each.name: each.state for each in channels.statistics()}


def beginnings(name: str) -> list[float]:
    """The times at which an adapter was started."""
    return [at for started, at in Scripted.begun if started == name]


async def test_crash_affects_one_channel(autojump_clock: trio.testing.MockClock, logs: Logs) -> None:
    """A channel that crashes is logged once for each crash, and started again; the other channel keeps running."""
    logs.expect_error("channel_crashed")
    Scripted.scripts = {"a": [(5.0, RuntimeError("a defect"))]}
    async with open_configured(config_of("a", "b")) as opened:
        await trio.sleep(1)
        assert states(opened.channels) == {"a": "connected", "b": "connected"}
        await trio.sleep(4.6)
        assert states(opened.channels) == {"a": "disconnected", "b": "connected"}
        await trio.sleep(10)
        assert states(opened.channels) == {"a": "connected", "b": "connected"}
        assert opened.channels.statistics()[0].last_error == "a defect"
    assert (len(beginnings("a")), len(beginnings("b"))) == (2, 1)
    [entry] = logs.named("channel_crashed")
    assert (entry["channel"], entry["error"]) == ("a", "a defect")


async def test_pauses(autojump_clock: trio.testing.MockClock, logs: Logs) -> None:
    """Pauses double, with jitter, up to the maximum; an outage is one line in the log."""
    Scripted.scripts = {"a": [(0.0, PlatformError("connection refused"))] * 12}
    async with open_configured(config_of("a")):
        await trio.sleep(20 * MAX_PAUSE_S)
    at = beginnings("a")
    assert len(at) == 13
    for number, pause_s in enumerate(after - before - 0.5 for before, after in itertools.pairwise(at)):
        longest_s = min(PAUSE_S * 2**number, MAX_PAUSE_S)
        assert longest_s / 2 <= round(pause_s, 6) <= longest_s
    [entry] = logs.named("channel_disconnected")
    assert entry["error"] == "connection refused"


async def test_pauses_start_again_after_success(autojump_clock: trio.testing.MockClock, logs: Logs) -> None:
    """After `GOOD_S` without an error, the pauses start again at the short end, and the next outage is logged again."""
    Scripted.scripts = {
        "a": [*[(0.0, PlatformError("connection refused"))] * 8, (GOOD_S, PlatformError("connection refused"))]
    }
    async with open_configured(config_of("a")):
        await trio.sleep(20 * MAX_PAUSE_S)
    *_, before, after = beginnings("a")
    assert after - before - GOOD_S - 0.5 <= PAUSE_S
    assert len(logs.named("channel_disconnected")) == 2


async def test_rejected_token(autojump_clock: trio.testing.MockClock) -> None:
    """A rejected token is tried again after the maximum pause, also if it is one error of several in a group."""
    group = ExceptionGroup("in a nursery", [PlatformError("connection refused"), TokenRejected("not this token")])
    Scripted.scripts = {"a": [(0.0, group)]}
    async with open_configured(config_of("a")) as opened:
        await trio.sleep(MAX_PAUSE_S / 2)
        assert len(beginnings("a")) == 1
        assert opened.channels.statistics()[0].state == "disconnected"
        await trio.sleep(MAX_PAUSE_S)
        assert states(opened.channels) == {"a": "connected"}


async def test_platform_asks_for_a_pause(autojump_clock: trio.testing.MockClock) -> None:
    """If a platform asks for a pause, the adapter is not started again before its end."""
    Scripted.scripts = {"a": [(0.0, PlatformError("too often", after_s=33.0))]}
    async with open_configured(config_of("a")):
        await trio.sleep(100)
    first, second = beginnings("a")
    assert second - first >= 33.0


async def test_unavailable_store(autojump_clock: trio.testing.MockClock, logs: Logs) -> None:
    """An unavailable store is an error that may pass, and not a defect of the channel."""
    Scripted.scripts = {"a": [(0.0, StoreUnavailable("the disk is full"))]}
    async with open_configured(config_of("a")) as opened:
        await trio.sleep(10)
        assert opened.channels.statistics()[0].last_error == "the disk is full"
    assert logs.named("channel_crashed") == []


async def test_reload(autojump_clock: trio.testing.MockClock) -> None:
    """A reload keeps unchanged channels running, stops those that were removed, and starts those that are new or
    changed: a changed one after its old task has ended."""
    async with open_configured(config_of("same", "changed", "gone")) as opened:
        await trio.sleep(1)
        kept, before = opened.channels.adapter("same"), opened.channels.adapter("changed")
        own = config_of("same", "new")
        opened.reload(attrs.evolve(own, channels={**own.channels, **config_of("changed", model="other").channels}))
        await trio.sleep(1)
        assert Scripted.alive == {"same", "changed", "new"}
        assert opened.channels.adapter("same") is kept
        assert opened.channels.adapter("changed") not in (None, before)
        assert opened.channels.adapter("gone") is None
        assert (
            set(opened.services.runs.live_views) == set(opened.services.outbox.carriers) == {"same", "changed", "new"}
        )
        assert opened.services.outbox.carriers["changed"] is opened.channels.adapter("changed")
    assert len(beginnings("same")) == 1
    assert len(beginnings("changed")) == 2


async def test_changes_in_a_row(autojump_clock: trio.testing.MockClock) -> None:
    """After several changes in a row, the last one runs, and never two at the same time."""
    async with open_configured(config_of("a")) as opened:
        await trio.sleep(1)
        for model in ("b", "c", "", "d"):
            opened.reload(config_of("a", model=model) if model else config_of())
        await trio.sleep(5)
        assert states(opened.channels) == {"a": "connected"}
        assert opened.channels._running["a"].config.model == "d"


async def test_disabled(autojump_clock: trio.testing.MockClock) -> None:
    """A channel that is switched off or has no token is disabled, reports why, and takes no calls."""
    config = make_config(
        channels={
            "off": {"type": "telegram", "token": TOKEN, "enabled": False},
            "none": {"type": "telegram", "token": {"env": "NOT_SET"}},
        }
    )
    async with open_configured(config) as opened:
        assert states(opened.channels) == {"off": "disabled", "none": "disabled"}
        assert all(each.last_error for each in opened.channels.statistics())
        assert opened.channels.adapter("off") is None
    assert Scripted.begun == []


async def test_unusable(autojump_clock: trio.testing.MockClock, logs: Logs) -> None:
    """A channel that cannot start is disconnected, the other one runs, and the next reload starts it."""
    logs.expect_error("channel_unusable")
    failures = [ConfigError("SSL_CERT_FILE", ("cannot be used",))]

    def make(name: str, upstream: Any) -> httpx2.AsyncBaseTransport:
        if failures:
            raise failures.pop()
        return http_transport(name, upstream)

    async with open_configured(config_of("a", "b"), make) as opened:
        await trio.sleep(1)
        assert states(opened.channels) == {"a": "disconnected", "b": "connected"}
        opened.channels.apply()
        await trio.sleep(1)
        assert states(opened.channels) == {"a": "connected", "b": "connected"}


async def test_hooks(autojump_clock: trio.testing.MockClock) -> None:
    """A webhook is listed as a channel, connected when it is enabled. A reload keeps the time of an unchanged state."""
    own = make_config(hooks={"a": {}, "b": {"enabled": False}}, channels={"c": {"type": "telegram", "token": TOKEN}})
    async with open_configured(own) as opened:
        assert [each.type for each in opened.channels.statistics()] == ["webhook", "webhook", "telegram"]
        assert states(opened.channels) | {"c": ""} == {"a": "connected", "b": "disabled", "c": ""}
        before: ChannelStatistics = opened.channels.statistics()[0]
        opened.reload(own)
        assert opened.channels.statistics()[0] == before
        opened.reload(make_config(hooks={"a": {"enabled": False}}))
        assert states(opened.channels) == {"a": "disabled"}


async def test_transports(autojump_clock: trio.testing.MockClock) -> None:
    """The transport to a platform is made as for an upstream, and closed with the channel."""
    made: list[httpx2.AsyncBaseTransport] = []

    def make(name: str, upstream: Any) -> httpx2.AsyncBaseTransport:
        assert (name, upstream.base_url) == ("channels.a", "http://platform.invalid")
        made.append(http_transport(name, upstream))
        return made[-1]

    async with open_configured(config_of("a"), make):
        await trio.sleep(1)
    [transport] = made
    assert isinstance(transport, SocketTransport)
    assert Scripted.alive == set()


@pytest.mark.slow
def test_platforms_are_imported_on_demand() -> None:
    """Importing the service, or the whole gateway, imports no platform: most gateways have no such channel."""
    code = (
        "import sys, trigate.channels.service, trigate.gateway.gateway\n"
        "print([name for name in sys.modules if '.telegram' in name or '.slack' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
