"""Channels: where messages come in and replies go out. Supervised: what is wrong with one is that one's alone.

Each channel of a platform has a nursery of its own inside the service's. When its adapter fails, it is tried again
after a pause that doubles each time, from `PAUSE_S` to `MAX_PAUSE_S`, with jitter, so that many do not come back at
once; one that has gone well for `GOOD_S` begins again at the short end. A token that is refused waits at the long end:
it takes a person, and platforms do not like to be asked with it.

A webhook is a channel too, but there is nothing to supervise: it is ready, or it is switched off.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Literal

import attrs
import httpx2
import structlog
import trio

from trigate.channels.adapter import Adapter, Channel, ChannelState, Refused, Trouble
from trigate.config.sections import ChannelConfig, ConfigError, UpstreamConfig, Url
from trigate.errors import GatewayError, message_of
from trigate.upstream.transport import SocketTransport

if TYPE_CHECKING:
    from trigate.gateway.gateway import Gateway

log = structlog.get_logger("trigate.channels.service")

PAUSE_S = 1.0
MAX_PAUSE_S = 300.0
GOOD_S = 60.0
"""After how long without a failure the pauses begin again at the short end."""


def _adapter_of(kind: Literal["telegram", "slack"]) -> type[Adapter]:
    # Loaded when there is such a channel: most gateways have none, and each process would hold them.
    if kind == "telegram":
        from trigate.channels.telegram.adapter import TelegramAdapter

        return TelegramAdapter
    from trigate.channels.slack.adapter import SlackAdapter

    return SlackAdapter


Transports = Callable[[str, UpstreamConfig], httpx2.AsyncBaseTransport]


@attrs.frozen(kw_only=True)
class ChannelStatistics:
    """How a channel is, as this worker sees it.

    Attributes:
        state: ``connected`` = the last exchange with its platform succeeded (a webhook: it is ready to be called).
        since: POSIX seconds of the last change of the state.
        last_error: The last one, also when it has passed; for one that is disabled, why.
    """

    name: str
    type: Literal["webhook", "telegram", "slack"]
    state: ChannelState
    since: float
    last_error: str | None = None


@attrs.define(eq=False)
class _Supervised:
    """A channel of a platform that runs; ``ended`` once nothing of it is left."""

    config: ChannelConfig
    channel: Channel
    adapter: Adapter
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    ended: trio.Event = attrs.field(factory=trio.Event)


class Channels:
    """The channels of the current configuration. Made by `open_channels`."""

    def __init__(self, gateway: Gateway, transports: Transports, nursery: trio.Nursery) -> None:
        self._gateway = gateway
        self._transports = transports
        self._nursery = nursery
        self._running: dict[str, _Supervised] = {}
        self._ending: dict[str, trio.Event] = {}  # the last of each name that was stopped
        self._still: dict[str, ChannelStatistics] = {}  # webhooks, and what is switched off

    def __repr__(self) -> str:
        return f"<Channels {', '.join(f'{name} {each.channel.state}' for name, each in self._running.items())}>"

    def adapter(self, name: str) -> Adapter | None:
        """The adapter that takes the calls of ``/hooks/NAME``; None = there is no such channel, or it is off."""
        found = self._running.get(name)
        return found.adapter if found is not None else None

    def apply(self) -> None:
        """The configuration has changed: starts, stops and changes what has to be. Synchronous."""
        config = self._gateway.generation.config
        wanted = {name: own for name, own in config.channels.items() if f"channels.{name}" not in config.disabled}
        for name in [name for name, each in self._running.items() if wanted.get(name) != each.config]:
            self._stop(name)
        still = [
            _still(name, "webhook", "connected" if hook.enabled else "disabled")
            for name, hook in (config.hooks or {}).items()
        ]
        for name, own in config.channels.items():
            why = config.disabled.get(f"channels.{name}")
            if why is not None:
                still.append(_still(name, own.type, "disabled", why))
        # One that is as it was has been so since it was.
        self._still = {
            each.name: self._still[each.name] if _is_as(each, self._still.get(each.name)) else each for each in still
        }
        for name, own in wanted.items():
            if name not in self._running:
                self._start(name, own)

    def _start(self, name: str, config: ChannelConfig) -> None:
        kind = _adapter_of(config.type)
        base_url = str(config.base_url or kind.default_base_url)
        try:
            transport = self._transports(f"channels.{name}", UpstreamConfig(base_url=Url(base_url)))
            channel = Channel(name, config, self._gateway, transport, base_url=base_url)
            adapter = kind(channel)
        except (ConfigError, ValueError) as error:  # certificates that cannot be read, for one
            log.error("channel_unusable", channel=name, error=message_of(error))
            self._still[name] = _still(name, config.type, "disconnected", message_of(error))
            return
        each = _Supervised(config, channel, adapter)
        self._running[name] = each
        self._gateway.runs.live_views[name] = each.adapter
        self._gateway.outbox.carriers[name] = each.adapter
        self._gateway.outbox.wake()
        self._nursery.start_soon(self._supervise, each, transport, self._ending.pop(name, None))

    def _stop(self, name: str) -> None:
        each = self._running.pop(name)
        self._ending[name] = each.ended
        each.scope.cancel()
        del self._gateway.runs.live_views[name]
        del self._gateway.outbox.carriers[name]

    def statistics(self) -> Sequence[ChannelStatistics]:
        """All channels, hooks included, in the order of the configuration."""
        config = self._gateway.generation.config
        return [
            self._still[name] if name in self._still else _moment(self._running[name].channel)
            for name in (*(config.hooks or {}), *config.channels)
            if name in self._still or name in self._running
        ]

    # -- supervision --------------------------------------------------------------------------------------------------

    async def _supervise(
        self, each: _Supervised, transport: httpx2.AsyncBaseTransport, after: trio.Event | None
    ) -> None:
        try:
            async with transport, trio.open_nursery() as nursery:
                if isinstance(transport, SocketTransport):
                    nursery.start_soon(transport.run)
                if after is not None:  # a platform is read by one at a time: also if this one is stopped meanwhile
                    await after.wait()
                with each.scope:
                    await self._keep_running(each)
                nursery.cancel_scope.cancel()
        finally:
            each.ended.set()

    async def _keep_running(self, each: _Supervised) -> None:
        channel = each.channel
        pause_s = PAUSE_S
        complained: str | None = None
        while True:
            begun_at = trio.current_time()
            wait_s = 0.0
            try:
                await each.adapter.run()
                raise AssertionError("an adapter runs until it is cancelled")
            except Exception as error:
                if trio.current_time() - begun_at >= GOOD_S:
                    pause_s, complained = PAUSE_S, None
                trouble = _trouble_in(error)
                words = channel.redacted(trouble.message) if trouble is not None else channel.words_of(error)
                channel.note_trouble(words)
                if trouble is None:
                    log.error("channel_crashed", channel=channel.name, error=words, exc_info=error)
                elif words != complained:  # an outage is one line, not one at each attempt
                    log.warning("channel_disconnected", channel=channel.name, error=words)
                complained = words
                if isinstance(trouble, Refused):
                    pause_s = MAX_PAUSE_S
                elif trouble is not None and trouble.after_s is not None:
                    wait_s = trouble.after_s
            await trio.sleep(max(wait_s, pause_s * random.uniform(0.5, 1.0)))
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


def _trouble_in(error: Exception) -> Trouble | None:
    """The trouble that an adapter raised, alone or out of its nursery; None = something else was raised too."""
    if isinstance(error, Trouble):
        return error
    if isinstance(error, GatewayError):  # the store, for one
        return Trouble(error.message)
    if not isinstance(error, ExceptionGroup):
        return None
    found = [_trouble_in(each) for each in error.exceptions]
    if None in found:
        return None
    return next((each for each in found if isinstance(each, Refused)), found[0])


def _still(
    name: str, kind: Literal["webhook", "telegram", "slack"], state: ChannelState, why: str | None = None
) -> ChannelStatistics:
    return ChannelStatistics(name=name, type=kind, state=state, since=time.time(), last_error=why)


def _is_as(one: ChannelStatistics, other: ChannelStatistics | None) -> bool:
    return other is not None and attrs.evolve(one, since=other.since) == other


def _moment(channel: Channel) -> ChannelStatistics:
    return ChannelStatistics(
        name=channel.name,
        type=channel.config.type,
        state=channel.state,
        since=channel.since,
        last_error=channel.last_error,
    )


@contextlib.asynccontextmanager
async def open_channels(gateway: Gateway, transports: Transports) -> AsyncIterator[Channels]:
    """Opens the channels, each in a nursery of its own.

    Args:
        transports: How platforms are reached.
    """
    async with trio.open_nursery() as nursery:
        channels = Channels(gateway, transports, nursery)
        channels.apply()
        try:
            yield channels
        finally:
            nursery.cancel_scope.cancel()
