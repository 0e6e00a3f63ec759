"""The composition root: every service, opened in the order of its lifetime.

A *generation* is what one configuration makes: its upstreams, their connections and lists of models. An exchange keeps
the generation that it started with; a reload makes the next one, swaps a reference, and lets the old one end when its
last exchange has ended. A configuration that cannot be used changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import structlog
import trio

from trigate.channels.service import Channels, open_channels
from trigate.concurrency.cancel_queue import CancelQueue, open_cancel_queue
from trigate.concurrency.poller import open_poller
from trigate.concurrency.timers import Timers, open_timers
from trigate.config import load as structure_load
from trigate.config.sections import Config, ConfigError
from trigate.errors import Draining, words_of
from trigate.exchange.admission import Admission
from trigate.exchange.shared_call import Flights, open_flights
from trigate.exchange.socket_relay import Relay
from trigate.gateway.drain import Drain
from trigate.gateway.reload import _WATCH_FILE_S, _fingerprint, _reload_on_sighup, read_config
from trigate.ledger.ledger import Ledger, open_ledger
from trigate.routing.plan import Targets
from trigate.runs.outbox import Outbox, open_outbox
from trigate.runs.service import Runs, open_runs
from trigate.sessions.service import Sessions
from trigate.status import snapshot
from trigate.status.inflight import Streams
from trigate.store import opening
from trigate.store.interface import Store
from trigate.store.retention import keep_pruned
from trigate.upstream.factory import TransportFactory, _trust, http_transport
from trigate.upstream.generation import Generation, open_generation
from trigate.webhooks.callbacks import Callbacks, open_callbacks
from trigate.webhooks.endpoint import Hooks
from trigate.workers.membership import Workers, open_workers

if TYPE_CHECKING:
    from trigate.exchange.exchange import Exchange

log = structlog.get_logger("trigate.gateway.gateway")


@attrs.define
class Totals:
    """Counters since the start."""

    exchanges: int = 0
    complete: int = 0
    cancelled: int = 0
    failed: int = 0
    events: int = 0
    bytes: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def _exchanges_by_descriptors() -> int:
    """How many exchanges the process has file descriptors for: two each, and some for everything else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, (soft - 64) // 2) if soft != resource.RLIM_INFINITY else 10**9


class Gateway:
    """Everything that outlives a request. Made by `open_gateway`."""

    def __init__(
        self,
        load: Callable[[], Awaitable[Config]],
        timers: Timers,
        cancel_queue: CancelQueue,
        relay: Relay | None,
        store: Store,
    ) -> None:
        self._load = load
        self.timers = timers
        self.cancel_queue = cancel_queue
        self.relay = relay
        """Carries streams between plain sockets; None where there is no epoll."""
        self.store = store
        self.workers: Workers
        self.sessions: Sessions
        self.streams: Streams
        self.flights: Flights
        self.runs: Runs
        self.callbacks: Callbacks
        self.outbox: Outbox
        self.hooks = Hooks(self)
        self.channels: Channels | None = None
        self.targets = Targets()
        self.admission = Admission(_exchanges_by_descriptors())
        self.ledger: Ledger
        self.chance = random.random
        """Chance, between 0 and 1: for pauses and choices."""
        self.generation: Generation
        self.live: dict[Exchange, None] = {}  # in the order of their arrival
        self.quiet = trio.Event()
        """Set when none is live; another one once there is one again."""
        self.totals = Totals()
        self.ends = False
        """Whether the readiness check says that no calls should be sent here."""
        self.draining = False
        """Whether calls are refused."""
        self.aside = trio.Event()
        """Set when the gateway begins to leave: others fetch what is to be fetched."""
        self.drain = Drain(self)
        self.started_at = trio.current_time()
        self.reload_error: str | None = None
        self._reload_asked = trio.Event()
        self._reloaded = trio.Event()

    def __repr__(self) -> str:
        return f"<Gateway {len(self.live)} live of {self.totals.exchanges} exchanges>"

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return trio.current_time() - self.started_at

    def admit(self, exchange: Exchange) -> None:
        """Takes an exchange among those that are live; `settle` takes it out again.

        Raises:
            Draining: The gateway is shutting down.
        """
        self.ledger.begin(exchange)
        if self.draining:
            raise Draining("The gateway is shutting down. Try again: another instance will answer.")
        if self.quiet.is_set():
            self.quiet = trio.Event()
        self.live[exchange] = None
        exchange.generation.hold()

    def settle(self, exchange: Exchange) -> None:
        """Lets an exchange out, if it was let in, and adds it to the totals."""
        if exchange in self.live:
            del self.live[exchange]
            exchange.generation.let_go()
            if not self.live:
                self.quiet.set()
        self.ledger.settle(exchange)
        totals = self.totals
        totals.exchanges += 1
        totals.events += exchange.events
        totals.bytes += exchange.bytes_sent
        if exchange.usage is not None:
            totals.prompt_tokens += exchange.usage.prompt_tokens
            totals.completion_tokens += exchange.usage.completion_tokens
        if exchange.outcome == "complete":
            totals.complete += 1
        elif exchange.outcome in ("cancelled", "finished"):  # the client left
            totals.cancelled += 1
        else:
            totals.failed += 1

    def not_ready(self) -> list[str]:
        """Why new calls should not be sent here; empty = they should."""
        if self.ends:
            return ["draining"]
        known = self.generation.known().values()
        if not known:
            return ["no upstream is configured"]
        reasons = [each.unusable or each.down for each in known]
        return [] if None in reasons else [str(reason) for reason in reasons]

    # -- reload -------------------------------------------------------------------------------------------------------

    def reload_soon(self) -> None:
        """Asks for a reload. Synchronous; from the Trio thread."""
        self._reload_asked.set()

    async def run_generations(
        self,
        first: Config,
        transports: TransportFactory,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Opens the first generation, and the next one at each reload."""
        async with trio.open_nursery() as nursery:
            self.generation = await nursery.start(self._run_generation, first, transports)
            self._apply(first)
            self.callbacks.apply(first.hooks or {}, self.outbox)
            task_status.started()
            while True:
                await self._reload_asked.wait()
                self._reload_asked = trio.Event()
                old = self.generation
                try:
                    config = await self._load()
                    if not config.upstreams:  # many a program empties a file before it writes it
                        raise ConfigError(config.source, ("upstreams: there are none",))
                    self.generation = await nursery.start(self._run_generation, config, transports)
                except ConfigError as error:
                    self.reload_error = str(error)
                    log.error("reload_refused", source=error.source, problems=list(error.problems))
                    continue
                except Exception as error:  # whatever is wrong with the new one, the old one goes on
                    words = f"cannot be put to use: {words_of(error)}"
                    self.reload_error = f"{old.config.source}: {words}"
                    log.exception("reload_refused", source=old.config.source, problems=[words])
                    continue
                self.reload_error = None
                old.retire()
                self._apply(config)
                self.callbacks.apply(config.hooks or {}, self.outbox)
                if self.channels is not None:
                    self.channels.apply()
                self._reloaded.set()
                log.info("reloaded", source=config.source, upstreams=list(config.upstreams))

    def _apply(self, config: Config) -> None:
        """Has the services that outlive a generation follow the next one's configuration."""
        self.targets.apply(config)
        self.admission.apply(config.limits)
        self.ledger.apply(config.ledger)

    async def _run_generation(
        self, config: Config, transports: TransportFactory, *, task_status: trio.TaskStatus[Generation]
    ) -> None:
        async with open_generation(config, transports) as generation:
            task_status.started(generation)
            await generation.wait_unused()

    async def use_store(self) -> None:
        """Opens the store as soon as the configuration needs it; whoever else does, opens it himself."""
        while not opening.is_needed(self.generation.config, self.store.statistics().path):
            await self._reloaded.wait()
            self._reloaded = trio.Event()
        await self.workers.join_eventually()

    async def watch_file(self, path: Path) -> None:
        """Asks for a reload when the configuration file changes."""
        seen = await _fingerprint(path)
        while True:
            await trio.sleep(_WATCH_FILE_S)
            now = await _fingerprint(path)
            if now != seen:
                seen = now
                self.reload_soon()


@contextlib.asynccontextmanager
async def open_gateway(
    config: Config | None = None,
    *,
    env: Mapping[str, str] | None = None,
    transports: TransportFactory = http_transport,
    adjust: Callable[[Config], Config] = lambda config: config,
) -> AsyncIterator[Gateway]:
    """Opens the gateway.

    Args:
        config: What to serve. Left out: the file of ``TRIGATE_CONFIG``, else ``./trigate.toml``, else discovery; then
            it follows SIGHUP and changes of the file.
        env: Where secrets are looked up; the process's environment by default.
        transports: How upstreams other than the echo are reached.
        adjust: Applied to each configuration that is read (what the command line says goes first).

    Raises:
        ConfigError: The configuration cannot be used.
    """
    environ = os.environ if env is None else env
    path = structure_load.locate(environ) if config is None else None

    async def load() -> Config:
        await trio.lowlevel.checkpoint()
        return adjust(config if config is not None else await read_config(path, environ))

    first = await load()
    async with (
        open_timers() as timers,
        open_cancel_queue() as cancel_queue,
        open_poller() as poller,
        opening.open_store(opening.location(first.store, environ)) as store,
    ):
        gateway = Gateway(load, timers, cancel_queue, Relay(poller) if poller is not None else None, store)
        async with open_workers(store) as gateway.workers:
            gateway.workers.report_with(functools.partial(snapshot.snapshot, gateway))
            gateway.sessions = Sessions(store, gateway.workers)
            gateway.streams = Streams(gateway)
            async with (
                open_ledger(store) as gateway.ledger,
                open_callbacks(trust=_trust) as gateway.callbacks,
                open_outbox(store, gateway.workers) as gateway.outbox,
                _running(gateway, first, transports, path),
            ):
                yield gateway


@contextlib.asynccontextmanager
async def _running(
    gateway: Gateway, first: Config, transports: TransportFactory, path: Path | None
) -> AsyncIterator[None]:
    with _reload_on_sighup(gateway):
        async with trio.open_nursery() as nursery:
            await nursery.start(gateway.run_generations, first, transports)
            nursery.start_soon(gateway.admission.run)
            try:
                # Flights and runs have exchanges, so they end before the generations; and runs adopt, so they are there
                # before anybody joins the other workers.
                async with (
                    open_flights(gateway) as gateway.flights,
                    open_runs(gateway) as gateway.runs,
                    open_channels(gateway, http_transport) as gateway.channels,
                ):
                    if path is not None:
                        nursery.start_soon(gateway.watch_file, path)
                    nursery.start_soon(gateway.use_store)
                    nursery.start_soon(
                        keep_pruned, gateway.store, gateway.workers.wait_joined, lambda: gateway.generation.config
                    )
                    yield
            finally:
                nursery.cancel_scope.cancel()
