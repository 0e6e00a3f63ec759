"""Runs the channels: one supervised task for each, so that an error of one channel affects no other.

When an adapter fails, it is started again after a pause that doubles each time, from `PAUSE_S` to `MAX_PAUSE_S`. The
pause has jitter, so that many channels do not reconnect at the same moment. After `GOOD_S` without an error, the pauses
start again at the short end. A rejected token waits for `MAX_PAUSE_S`: an operator has to replace it, and platforms
penalise repeated attempts.

On a reload, a channel whose configuration is unchanged keeps running. Any other is stopped, and its successor starts
only after the old task has ended, since a platform allows one reader at a time.

Webhooks are listed as channels too, but need no task: one is ready, or it is disabled.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal

import attrs
import httpx2
import trio

from trigate.channels.adapter import Adapter, Channel, ChannelServices, ChannelState, PlatformError, TokenRejected
from trigate.concurrency.notify import open_service
from trigate.config.sections import ChannelConfig, ConfigError, UpstreamConfig, Url
from trigate.errors import GatewayError
from trigate.logs import log, message_of
from trigate.runs.outbox import Outbox
from trigate.runs.service import Runs
from trigate.store.interface import Store
from trigate.upstream.generation import Generations
from trigate.upstream.transport import SocketTransport
from trigate.workers.membership import Workers

PAUSE_S = 1.0
MAX_PAUSE_S = 300.0
GOOD_S = 60.0
"""Seconds without an error after which the pauses start again at the short end."""

ChannelType = Literal["webhook", "telegram", "slack"]

Transports = Callable[[str, UpstreamConfig], httpx2.AsyncBaseTransport]
"""Makes the transport to a platform from the channel's name and its base URL."""


def _adapter_class(platform: Literal["telegram", "slack"]) -> type[Adapter]:
    # Imported on demand: most gateways have no such channel, and the modules take memory in every worker.
    if platform == "telegram":
        from trigate.channels.telegram.adapter import TelegramAdapter

        return TelegramAdapter
    from trigate.channels.slack.adapter import SlackAdapter

    return SlackAdapter


@attrs.frozen(kw_only=True)
class ChannelStatistics:
    """The state of a channel in this worker.

    Attributes:
        state: ``connected`` = the last request to its platform succeeded (a webhook: it can be called).
        since: POSIX seconds of the last change of the state.
        last_error: The most recent error, also after it has passed; of a disabled channel, the reason.
    """

    name: str
    type: ChannelType
    state: ChannelState
    since: float
    last_error: str | None = None


@attrs.define(eq=False)
class _Supervised:
    """A running channel.

    Attributes:
        ended: Set when its task has ended.
    """

    config: ChannelConfig
    channel: Channel
    adapter: Adapter
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    ended: trio.Event = attrs.field(factory=trio.Event)


@attrs.define(eq=False, repr=False)
class Channels:
    """The channels of the current configuration. Made by `open_channels`."""

    _services: ChannelServices
    _generations: Generations
    _transports: Transports
    _nursery: trio.Nursery
    _running: dict[str, _Supervised] = attrs.field(factory=dict, init=False)
    _ending: dict[str, trio.Event] = attrs.field(factory=dict, init=False)
    """By name: set when the last stopped task of this name has ended."""
    _without_task: dict[str, ChannelStatistics] = attrs.field(factory=dict, init=False)
    """Webhooks, and channels that are disabled or cannot start."""

    def __repr__(self) -> str:
        states = (f"{name} {running.channel.state}" for name, running in self._running.items())
        return f"<Channels {', '.join(states)}>"

    def adapter(self, name: str) -> Adapter | None:
        """The adapter that takes the calls of ``/hooks/NAME``; None = there is no such channel, or it is disabled."""
        running = self._running.get(name)
        return running.adapter if running is not None else None

    def apply(self) -> None:
        """Starts, stops and restarts channels after a change of the configuration. Synchronous."""
        config = self._generations.config
        wanted = {name: own for name, own in config.channels.items() if f"channels.{name}" not in config.disabled}
        for name in [name for name, running in self._running.items() if wanted.get(name) != running.config]:
            self._stop(name)
        without_task = [
            _without_task(name, "webhook", "connected" if hook.enabled else "disabled")
            for name, hook in (config.hooks or {}).items()
        ]
        for name, own in config.channels.items():
            reason = config.disabled.get(f"channels.{name}")
            if reason is not None:
                without_task.append(_without_task(name, own.type, "disabled", reason))
        # An unchanged state keeps the time since which it has held.
        self._without_task = {
            new.name: self._without_task[new.name] if _is_unchanged(new, self._without_task.get(new.name)) else new
            for new in without_task
        }
        for name, own in wanted.items():
            if name not in self._running:
                self._start(name, own)

    def _start(self, name: str, config: ChannelConfig) -> None:
        adapter_class = _adapter_class(config.type)
        base_url = str(config.base_url or adapter_class.default_base_url)
        try:
            transport = self._transports(f"channels.{name}", UpstreamConfig(base_url=Url(base_url)))
            channel = Channel(name, config, self._services, transport, base_url=base_url)
            adapter = adapter_class(channel)
        except (ConfigError, ValueError) as error:  # for example, certificates that cannot be read
            log.error("channel_unusable", channel=name, error=message_of(error))
            self._without_task[name] = _without_task(name, config.type, "disconnected", message_of(error))
            return
        running = _Supervised(config, channel, adapter)
        self._running[name] = running
        self._services.runs.live_views[name] = adapter
        self._services.outbox.carriers[name] = adapter
        self._services.outbox.wake()
        self._nursery.start_soon(self._supervise, running, transport, self._ending.pop(name, None))

    def _stop(self, name: str) -> None:
        running = self._running.pop(name)
        self._ending[name] = running.ended
        running.scope.cancel()
        del self._services.runs.live_views[name]
        del self._services.outbox.carriers[name]

    def statistics(self) -> Sequence[ChannelStatistics]:
        """All channels, webhooks included, in the order of the configuration."""
        config = self._generations.config
        return [
            self._without_task[name] if name in self._without_task else _statistics_of(self._running[name].channel)
            for name in (*(config.hooks or {}), *config.channels)
            if name in self._without_task or name in self._running
        ]

    # -- supervision --------------------------------------------------------------------------------------------------

    async def _supervise(
        self, running: _Supervised, transport: httpx2.AsyncBaseTransport, predecessor: trio.Event | None
    ) -> None:
        tasks = (transport.run,) if isinstance(transport, SocketTransport) else ()
        try:
            async with transport, open_service(*tasks):
                if predecessor is not None:  # also if this one is stopped meanwhile, so that its successor waits too
                    await predecessor.wait()
                with running.scope:
                    await self._keep_running(running)
        finally:
            running.ended.set()

    async def _keep_running(self, running: _Supervised) -> None:
        channel = running.channel
        pause_s = PAUSE_S
        logged: str | None = None
        while True:
            began_at = trio.current_time()
            wait_s = 0.0
            try:
                await running.adapter.run()
                raise AssertionError("an adapter runs until it is cancelled")
            except Exception as error:
                if trio.current_time() - began_at >= GOOD_S:
                    pause_s, logged = PAUSE_S, None
                expected = _platform_error_of(error)
                text = channel.redacted(expected.message) if expected is not None else channel.describe(error)
                channel.note_disconnected(text)
                if expected is None:
                    log.error("channel_crashed", channel=channel.name, error=text, exc_info=error)
                elif text != logged:  # one line for an outage, not one for each attempt
                    log.warning("channel_disconnected", channel=channel.name, error=text)
                logged = text
                if isinstance(expected, TokenRejected):
                    pause_s = MAX_PAUSE_S
                elif expected is not None and expected.after_s is not None:
                    wait_s = expected.after_s
            await trio.sleep(max(wait_s, pause_s * random.uniform(0.5, 1.0)))
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


def _platform_error_of(error: Exception) -> PlatformError | None:
    """The expected error that an adapter raised, alone or in a group; None = at least one of the errors is a defect."""
    if isinstance(error, PlatformError):
        return error
    if isinstance(error, GatewayError):  # for example, of the store
        return PlatformError(error.message)
    if not isinstance(error, ExceptionGroup):
        return None
    found = [_platform_error_of(inner) for inner in error.exceptions]
    if None in found:
        return None
    return next((inner for inner in found if isinstance(inner, TokenRejected)), found[0])


def _without_task(name: str, kind: ChannelType, state: ChannelState, reason: str | None = None) -> ChannelStatistics:
    return ChannelStatistics(name=name, type=kind, state=state, since=time.time(), last_error=reason)


def _is_unchanged(new: ChannelStatistics, old: ChannelStatistics | None) -> bool:
    return old is not None and attrs.evolve(new, since=old.since) == old


def _statistics_of(channel: Channel) -> ChannelStatistics:
    return ChannelStatistics(
        name=channel.name,
        type=channel.config.type,
        state=channel.state,
        since=channel.since,
        last_error=channel.last_error,
    )


@contextlib.asynccontextmanager
async def open_channels(
    *,
    store: Store,
    workers: Workers,
    runs: Runs,
    outbox: Outbox,
    generations: Generations,
    handing_over: trio.Event,
    transports: Transports,
) -> AsyncIterator[Channels]:
    """Opens the channels of the current configuration.

    Args:
        generations: Its ``config`` is the configuration in use; after a change, `Channels.apply` has to be called.
        handing_over: Set when this process begins to shut down: from then on, other processes read the platforms.
        transports: Makes the transports to the platforms.

    **Cancels:** all channels stop when the block ends. Messages that were taken are durable.
    """
    services = ChannelServices(store=store, workers=workers, runs=runs, outbox=outbox, handing_over=handing_over)
    async with open_service() as nursery:
        channels = Channels(services, generations, transports, nursery)
        channels.apply()
        yield channels
