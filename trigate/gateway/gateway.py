"""The composition root: opens every service, in the order of their lifetimes, and passes each the services it uses.

No service uses the gateway. `Gateway` has the services that the ASGI application uses.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import AsyncIterator, Callable, Mapping

import attrs
import trio

from trigate.channels.service import Channels, open_channels
from trigate.concurrency import descriptors
from trigate.concurrency.cancel_queue import open_cancel_queue
from trigate.concurrency.notify import open_service
from trigate.concurrency.poller import open_poller
from trigate.concurrency.slow_steps import SlowSteps
from trigate.concurrency.timers import open_timers
from trigate.config import load
from trigate.config.sections import Config
from trigate.exchange.admission import Admission
from trigate.exchange.exchange import ExchangeServices
from trigate.exchange.live import LiveExchanges
from trigate.exchange.prompt_counts import open_prompt_counts
from trigate.exchange.reasoning_memory import ReasoningMemory
from trigate.exchange.shared_call import open_shared_calls
from trigate.exchange.socket_relay import SocketRelay
from trigate.exchange.stored_responses import BackgroundResponses, open_background_responses
from trigate.exchange.upstream_call import UpstreamServices
from trigate.gateway.drain import Drain
from trigate.gateway.price_refresh import PriceRefresh
from trigate.gateway.reload import Reloader, read_config, reload_on_sighup
from trigate.keys.service import Keys, open_keys
from trigate.keys.virtual import VirtualKeys
from trigate.ledger.content_log import open_content_log
from trigate.ledger.ledger import Ledger, open_ledger
from trigate.logs import log
from trigate.metrics.families import OLD_NAMES, OPT_IN
from trigate.quotas.service import open_quotas
from trigate.routing.target_state import Targets
from trigate.runs.outbox import open_outbox
from trigate.runs.service import Runs, open_runs
from trigate.sessions.service import Sessions
from trigate.status.inflight import InflightRequests
from trigate.status.reporter import StatusReporter
from trigate.status.sampler import StatusSampler
from trigate.status.scrape import Scrapes
from trigate.status.worker_metrics import WorkerMetrics
from trigate.store import opening
from trigate.store.interface import Store
from trigate.store.retention import keep_pruned
from trigate.tracing.tracer import open_tracer
from trigate.upstream.factory import TransportFactory, http_transport
from trigate.upstream.generation import Generation, Generations, open_generation
from trigate.webhooks.alerts import Alerts
from trigate.webhooks.callbacks import open_callbacks
from trigate.webhooks.endpoint import Hooks
from trigate.workers.membership import Workers, open_workers


@attrs.frozen(eq=False, kw_only=True)
class Gateway:
    """The services that outlive a request, for the ASGI application. Made by `open_gateway`."""

    generations: Generations
    keys: Keys
    virtual_keys: VirtualKeys
    exchange_services: ExchangeServices
    live: LiveExchanges
    store: Store
    ledger: Ledger
    workers: Workers
    sessions: Sessions
    runs: Runs
    background_responses: BackgroundResponses
    hooks: Hooks
    alerts: Alerts
    channels: Channels
    inflight: InflightRequests
    status: StatusReporter
    scrapes: Scrapes
    sampler: StatusSampler
    reloader: Reloader
    drain: Drain

    def __repr__(self) -> str:
        return f"<Gateway, {self.live!r}>"

    def not_ready(self) -> list[str]:
        """Returns why a load balancer should not send new calls here; empty = it should."""
        if self.drain.is_announced:
            return ["draining"]
        upstreams = self.generations.current.known().values()
        if not upstreams:
            return ["no upstream is configured"]
        reasons = [upstream.unusable or upstream.down for upstream in upstreams]
        return [] if None in reasons else [str(reason) for reason in reasons]


@contextlib.asynccontextmanager
async def open_gateway(
    config: Config | None = None,
    *,
    env: Mapping[str, str] | None = None,
    transports: TransportFactory | None = None,
    adjust: Callable[[Config], Config] = lambda config: config,
    chance: Callable[[], float] = random.random,
) -> AsyncIterator[Gateway]:
    """Opens the gateway.

    Args:
        config: The configuration. None: the file in ``TRIGATE_CONFIG``, else ``./trigate.toml``, else the discovered
            upstreams; the gateway then reloads it at SIGHUP and when the file changes.
        env: The environment variables, for secrets; those of the process by default.
        transports: Makes the transports of all upstreams but the echo; None = sockets.
        adjust: Applied to each configuration that is read, for the options of the command line.
        chance: A random number between 0 and 1, for pauses and choices.

    Raises:
        ConfigError: The configuration cannot be used.
    """
    environ = os.environ if env is None else env
    path = load.locate(environ) if config is None else None

    async def read() -> Config:
        await trio.lowlevel.checkpoint()
        return adjust(config if config is not None else await read_config(path, environ))

    first = await read()
    started_at = trio.current_time()
    targets, admission = Targets(), Admission(descriptors.max_pairs())
    async with (
        open_timers() as timers,
        open_cancel_queue() as cancel_queue,
        open_poller() as poller,
        opening.open_store(opening.location(first.store, environ)) as store,
        open_workers(store) as workers,
        open_keys(store, workers, first) as keys,
        open_ledger(store, worker=workers.id) as ledger,
        open_content_log() as contents,
        open_quotas(store, workers) as quotas,
        open_tracer(environ, worker=workers.id) as tracing,
        open_service(admission.run) as background,
        open_prompt_counts() as prompt_counts,
    ):
        open_next = functools.partial(_open_generation, background, transports)
        generations = Generations(await open_next(first))
        workers.adopt_with(ledger.adopt)
        reasoning = ReasoningMemory(store)
        upstream_services = UpstreamServices(
            targets=targets,
            chance=chance,
            timers=timers,
            socket_relay=SocketRelay(poller) if poller is not None else None,
            reasoning=reasoning,
            quotas=quotas,
            prompt_counts=prompt_counts,
        )
        sessions = Sessions(store, workers)
        live = LiveExchanges(ledger, contents)
        live.tracer = tracing.tracer
        live.revoked_keys, keys.on_revoked = keys.revoked, live.cancel_key
        # Shared calls, runs and channels have exchanges, so they close before the generations do. The runs service
        # adopts the runs of exited workers, so it opens before this worker joins the others (`_use_store`).
        async with (
            open_callbacks(trust=lambda: generations.current.trust.context()) as callbacks,
            open_outbox(store, workers) as outbox,
            open_shared_calls(upstream_services) as shared_calls,
        ):
            drain = Drain(live, outbox)
            alerts = Alerts(store=store, workers=workers, outbox=outbox, live=live, targets=targets)
            quotas.on_budget = alerts.note_budget
            price_refresh = PriceRefresh(generations, workers)
            background.start_soon(alerts.run)
            background.start_soon(price_refresh.run)

            def apply_config(config: Config) -> None:
                """Applies a configuration to the services that outlive generations."""
                keys.apply(config)
                quotas.apply(config)
                targets.apply(config)
                admission.apply(config.limits)
                ledger.apply(config.ledger)
                contents.apply(config.content_log)
                reasoning.apply(config.reasoning_memory)
                callbacks.apply(config.hooks or {}, outbox, config.alerts)
                alerts.apply(config.alerts)
                price_refresh.apply(config.price_table)
                log.override_level(config.log.level)

            exchange_services = ExchangeServices(
                admission=admission,
                live=live,
                quotas=quotas,
                upstream=upstream_services,
                shared_calls=shared_calls,
                cancel_queue=cancel_queue,
            )
            apply_config(first)
            async with (
                open_runs(
                    store=store,
                    workers=workers,
                    sessions=sessions,
                    outbox=outbox,
                    generations=generations,
                    keys=keys,
                    exchange_services=exchange_services,
                ) as runs,
                open_background_responses() as background_responses,
                open_channels(
                    store=store,
                    workers=workers,
                    runs=runs,
                    outbox=outbox,
                    generations=generations,
                    handing_over=drain.handing_over,
                    transports=lambda name, config: http_transport(name, config, trust=generations.current.trust),
                ) as channels,
            ):
                hooks = Hooks(runs=runs, generations=generations, channel_adapter=channels.adapter)

                def apply_next(config: Config) -> None:
                    apply_config(config)
                    channels.apply()
                    hooks.apply()

                reloader = Reloader(generations, read=read, open_generation=open_next, apply=apply_next)
                status = StatusReporter(
                    live=live,
                    generations=generations,
                    admission=admission,
                    targets=targets,
                    ledger=ledger,
                    tracing=tracing,
                    workers=workers,
                    store=store,
                    channels=channels,
                    started_at=started_at,
                    reload=reloader,
                    price_refresh=price_refresh,
                    is_handing_over=drain.handing_over.is_set,
                )
                workers.report_with(status.snapshot)
                slow_steps = SlowSteps()
                metrics = WorkerMetrics(
                    live=live,
                    generations=generations,
                    admission=admission,
                    targets=targets,
                    quotas=quotas,
                    ledger=ledger,
                    tracing=tracing,
                    store=store,
                    slow_steps=slow_steps,
                    is_draining=drain.handing_over.is_set,
                )
                old_names = OLD_NAMES in environ.get(OPT_IN, "").replace(" ", "").split(",")
                inflight = InflightRequests(workers=workers, live=live)
                gateway = Gateway(
                    generations=generations,
                    keys=keys,
                    virtual_keys=VirtualKeys(store, workers, keys),
                    exchange_services=exchange_services,
                    live=live,
                    store=store,
                    ledger=ledger,
                    workers=workers,
                    sessions=sessions,
                    runs=runs,
                    background_responses=background_responses,
                    hooks=hooks,
                    alerts=alerts,
                    channels=channels,
                    inflight=inflight,
                    status=status,
                    scrapes=Scrapes(workers=workers, metrics=metrics, status=status, old_names=old_names),
                    sampler=StatusSampler(status=status, inflight=inflight),
                    reloader=reloader,
                    drain=drain,
                )
                with reload_on_sighup(reloader), slow_steps.installed():
                    background.start_soon(reloader.run)
                    background.start_soon(gateway.sampler.run)
                    if path is not None:
                        background.start_soon(reloader.watch_file, path)
                    background.start_soon(_use_store, gateway)
                    background.start_soon(keep_pruned, store, workers.wait_joined, lambda: generations.config)
                    yield gateway


async def _open_generation(nursery: trio.Nursery, transports: TransportFactory | None, config: Config) -> Generation:
    """Opens a generation in a task of its own, which closes it after its last exchange."""

    async def run(*, task_status: trio.TaskStatus[Generation]) -> None:
        async with open_generation(config, transports) as generation:
            task_status.started(generation)
            await generation.wait_unused()

    generation: Generation = await nursery.start(run)
    return generation


async def _use_store(gateway: Gateway) -> None:
    """Opens the store as soon as the configuration needs it. Otherwise it is opened when a service first uses it."""
    while not opening.is_needed(gateway.generations.config, gateway.store.statistics().path):
        await gateway.reloader.wait_reloaded()
    await gateway.workers.join_eventually()
