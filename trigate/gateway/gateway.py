"""The composition root: every service, opened in the order of its lifetime.

A *generation* is what one configuration makes: its upstreams, their connections and lists of models. An exchange keeps
the generation that it started with; a reload makes the next one, swaps a reference, and lets the old one end when its
last exchange has ended. A configuration that cannot be used changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import random
import resource
import signal
import ssl
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import httpx2
import structlog
import trio

from trigate.channels.service import Channels, open_channels
from trigate.concurrency.cancel_queue import Leaving, open_leaving
from trigate.concurrency.poller import open_poller
from trigate.concurrency.timers import Timers, open_timers
from trigate.config import load as structure_load
from trigate.config.sections import Config, ConfigError, TimeoutPhase, UpstreamConfig
from trigate.errors import Draining, Garbled, GatewayError, Rejected, words_of
from trigate.exchange.admission import Admission
from trigate.exchange.shared_call import Flights, open_flights
from trigate.exchange.socket_relay import Relay
from trigate.ledger.ledger import Accounts, open_accounts
from trigate.routing import routes
from trigate.routing.plan import Targets
from trigate.routing.routes import Known, Target
from trigate.runs.outbox import Outbox, open_outbox
from trigate.runs.service import Runs, open_runs
from trigate.sessions.service import Sessions
from trigate.status import snapshot
from trigate.status.inflight import Streams
from trigate.store import opening
from trigate.store.interface import Store
from trigate.upstream import discovery, echo
from trigate.upstream.local_model import process as local_model
from trigate.upstream.transport import SocketTransport
from trigate.upstream.upstream import Upstream
from trigate.webhooks.callbacks import Callbacks, open_callbacks
from trigate.webhooks.endpoint import Hooks
from trigate.workers.membership import Workers, open_workers

if TYPE_CHECKING:
    from trigate.exchange.exchange import Exchange

log = structlog.get_logger("trigate.gateway.gateway")

REFRESH_S = 60.0
"""How often an upstream is asked for its models."""
RETRY_S = 5.0
"""How soon it is asked again after it did not answer; doubles up to `REFRESH_S`."""
_FIRST_LOOK_S = 0.3
_WATCH_FILE_S = 1.0
_MAX_ROUTES = 1024

TransportFactory = Callable[[str, UpstreamConfig], httpx2.AsyncBaseTransport]


def http_transport(name: str, upstream: UpstreamConfig) -> httpx2.AsyncBaseTransport:
    """Makes the transport of an upstream on sockets. Places are counted by `Upstream`, so the pool sets no limit.

    Trigate's own speaks HTTP/1.1 to the upstream itself. Through a proxy, or with HTTP/2, it is httpx2's.
    """
    proxy = _proxy_to(upstream)
    secure = str(upstream.base_url).startswith("https:") or str(proxy).startswith("https:")
    if secure:
        _trust()  # what is wrong with it is the configuration's, and not the first call's
    if proxy is None and not upstream.http2:
        return SocketTransport(trust=_trust)
    if proxy is not None and not proxy.startswith(("http://", "https://")):
        return _Unreachable(f"the proxy that the environment names is one of {proxy.partition(':')[0]}, not of HTTP")
    return httpx2.AsyncHTTPTransport(
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=30.0),
        verify=_trust() if secure else False,
        trust_env=False,
        http2=upstream.http2,
        proxy=proxy,
    )


def _proxy_to(upstream: UpstreamConfig) -> str | None:
    """The proxy on the way: what the configuration says, else what the environment does, for other machines."""
    if upstream.proxy is not None or upstream.base_url is None:
        return upstream.proxy if upstream.proxy != "direct" else None
    url = httpx2.URL(upstream.base_url)
    if _is_here(url.host) or urllib.request.proxy_bypass(url.host):
        return None
    named = urllib.request.getproxies()
    proxy = named.get(url.scheme) or named.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _is_here(host: str) -> bool:
    """Whether a host is this machine, as far as its name tells.

    >>> [_is_here(host) for host in ("127.0.0.1", "::1", "localhost", "a.localhost", "localhost.example", "10.0.0.1")]
    [True, True, True, True, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class _Unreachable(httpx2.AsyncBaseTransport):
    """Says at each request why there can be none: one upstream's trouble must not stop the others."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError(self._reason)


@functools.cache
def _trust() -> ssl.SSLContext:
    # Loading the trust store costs more than everything else at start-up: once, and only where it is used.
    try:
        return httpx2.create_ssl_context()
    except OSError as error:  # also ssl.SSLError
        variables = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if name in os.environ]
        where = " and ".join(variables) or "the system's certificate authorities"
        raise ConfigError(where, (f"cannot be used: {error.strerror or error}",)) from error


@attrs.frozen
class Route:
    """Where the calls for a model id go.

    Attributes:
        targets: In the order in which they are tried; at least one.
        shortest_limit_s: The shortest of their limits in time; ``math.inf`` = there is none.
        total_timeout_s: How long a call may take in all.
    """

    targets: tuple[Target, ...]
    shortest_limit_s: float
    total_timeout_s: float


class Generation:
    """The upstreams of one configuration, and the routes to them."""

    def __init__(self, config: Config, upstreams: Mapping[str, Upstream]) -> None:
        self.config = config
        self.upstreams = upstreams
        self.aliases = {
            alias: tuple(Target.parse(target) for target in model.targets) for alias, model in config.models.items()
        }
        self.coalesced = frozenset(alias for alias, model in config.models.items() if model.coalesce)
        self._routes: dict[str, Route] = {}
        self.exchanges = 0
        self.created = int(time.time())
        self._retired = False
        self._unused = trio.Event()

    def known(self) -> dict[str, Known]:
        """The state of the upstreams, as routing takes it."""
        return {name: upstream.known() for name, upstream in self.upstreams.items()}

    def route(self, model: str) -> Route:
        """Returns the way to a public model id. Raises as `routing.plan`.

        It is kept until an upstream lists other models. Only that of ``default``, unless it is an alias, is not: it
        depends on who is up.
        """
        found = self._routes.get(model)
        if found is not None:
            return found
        targets = routes.plan(model, aliases=self.aliases, upstreams=self.known())
        phases: tuple[TimeoutPhase, ...] = ("response_head", "first_token", "idle", "total")
        limits_s = [self.config.timeout_s(target.upstream, phase, model) for target in targets for phase in phases]
        # one deadline for all attempts: the longest that one of the targets is given
        total_s = max(self.config.timeout_s(target.upstream, "total", model) for target in targets)
        found = Route(targets, min(limits_s), total_s)
        if model != "default" or model in self.aliases:
            if len(self._routes) >= _MAX_ROUTES:
                self._routes.clear()  # ids are whatever clients ask for
            self._routes[model] = found
        return found

    def forget_routes(self) -> None:
        """Finds them anew: an upstream lists other models."""
        self._routes.clear()

    def public_ids(self) -> dict[str, str]:
        """Every listed model id with its owner."""
        return routes.public_ids(aliases=self.aliases, upstreams=self.known())

    def hold(self) -> None:
        """Keeps the generation alive until `let_go`, once for each call."""
        self.exchanges += 1

    def let_go(self) -> None:
        """An exchange that held it has ended."""
        self.exchanges -= 1
        if self._retired and not self.exchanges:
            self._unused.set()

    def retire(self) -> None:
        """Says that no further exchange will start with it."""
        self._retired = True
        if not self.exchanges:
            self._unused.set()

    async def wait_unused(self) -> None:
        """Waits until it is retired, and its last exchange has ended."""
        await self._unused.wait()


@contextlib.asynccontextmanager
async def open_generation(config: Config, transports: TransportFactory) -> AsyncIterator[Generation]:
    """Opens the upstreams of a configuration and keeps their lists of models fresh."""
    async with contextlib.AsyncExitStack() as stack:
        upstreams: dict[str, Upstream] = {}
        for name, settings in config.upstreams.items():
            unusable = None
            process = None
            if settings.kind == "local":
                unusable = local_model.why_unavailable(settings.gguf)
                if unusable is None:
                    process = await stack.enter_async_context(
                        local_model.open_local_model(
                            local_model.LocalModelSettings(
                                gguf=settings.gguf,
                                start=settings.start,
                                context_tokens=settings.context_tokens,
                                parallel=settings.parallel,
                                threads=settings.threads,
                            )
                        )
                    )
            transport = (
                echo.EchoTransport(words_per_s=settings.words_per_s)
                if settings.kind == "echo"
                else transports(name, settings)
            )
            await stack.enter_async_context(transport)
            upstream = Upstream(name, config, transport, local_model=process, unusable=unusable)
            if settings.kind != "openai" and not upstream.models:
                upstream.models = (echo.MODEL_ID if settings.kind == "echo" else local_model.model_id(settings.gguf),)
            upstreams[name] = upstream
        generation = Generation(config, upstreams)
        async with trio.open_nursery() as nursery:
            for upstream in upstreams.values():
                if isinstance(upstream.transport, SocketTransport):
                    nursery.start_soon(upstream.transport.run)
            looked = []
            for upstream in upstreams.values():
                settings = upstream.config
                if settings.kind == "openai" and settings.models == "discover" and upstream.unusable is None:
                    first_look = trio.Event()
                    looked.append(first_look)
                    nursery.start_soon(_refresh_models, generation, upstream, first_look)
            with trio.move_on_after(_FIRST_LOOK_S):
                for event in looked:
                    await event.wait()
            try:
                yield generation
            finally:
                nursery.cancel_scope.cancel()


async def _refresh_models(generation: Generation, upstream: Upstream, first_look: trio.Event) -> None:
    """Asks an upstream for its models, for ever. While it does not answer, the last list stands."""
    pause_s = RETRY_S
    upstream.watched = True
    while True:
        try:
            with trio.move_on_after(10.0) as scope:
                async with upstream.open("GET", "/models") as reply:
                    if reply.status != 200:
                        raise await upstream.error_of(reply)
                    body = await reply.read(discovery.MAX_MODEL_LIST_BYTES)
                try:
                    upstream.models = discovery.decode_model_list(body)
                    generation.forget_routes()
                except ValueError as error:
                    raise Garbled(f"GET /models of {upstream.name} gave no model list: {error}.") from None
                upstream.note_up()
                pause_s = REFRESH_S
            if scope.cancelled_caught:
                raise Garbled(f"GET /models of {upstream.name} was not answered within 10 s.")
        except GatewayError as error:
            if isinstance(error, Rejected) and error.status not in (401, 403):
                upstream.note_up()  # it answers; it has no list, or none for us
            elif upstream.state != "down" or upstream.reason != error.message:
                log.warning("models_not_listed", upstream=upstream.name, error=error.message)
                upstream.note_down(error)
            pause_s = min(pause_s * 2, REFRESH_S)
        except Exception:  # whatever is wrong with one upstream, the others go on
            log.exception("models_refresh_crashed", upstream=upstream.name)
            pause_s = REFRESH_S
        first_look.set()
        await trio.sleep(pause_s)


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


class Drain:
    """How the server ends the gateway's work; found in the lifespan state under ``drain``."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def step_aside(self) -> None:
        """From now on nothing is fetched that another process can fetch; what comes is still done."""
        self._gateway.aside.set()

    def announce(self) -> None:
        """The same, and ``GET /ready`` says 503."""
        self.step_aside()
        self._gateway.ends = True

    def begin(self) -> None:
        """From now on ``GET /ready`` says 503 and new calls are refused; running ones go on."""
        self.announce()
        self._gateway.draining = True

    async def wait_quiet(self) -> None:
        """Waits until the runs that have begun have ended, and what can be told of them has been told."""
        while self._gateway.live:
            await self._gateway.quiet.wait()
        await self._gateway.outbox.wait_idle()

    def cut(self) -> Sequence[str]:
        """Ends what is still running: each stream gets an error event and its proper end. Returns the ids."""
        cut = list(self._gateway.live)
        for exchange in cut:
            exchange.cut(Draining("The gateway is shutting down; the answer up to here is incomplete. Try again."))
        return [exchange.id for exchange in cut]


class Gateway:
    """Everything that outlives a request. Made by `open_gateway`."""

    def __init__(
        self, load: Callable[[], Awaitable[Config]], timers: Timers, leaving: Leaving, relay: Relay | None, store: Store
    ) -> None:
        self._load = load
        self.timers = timers
        self.leaving = leaving
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
        self.accounts: Accounts
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
        self.accounts.begin(exchange)
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
        self.accounts.settle(exchange)
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
        self.accounts.apply(config.ledger)

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
        await self.workers.join_at_last()

    async def watch_file(self, path: Path) -> None:
        """Asks for a reload when the configuration file changes."""
        seen = await _fingerprint(path)
        while True:
            await trio.sleep(_WATCH_FILE_S)
            now = await _fingerprint(path)
            if now != seen:
                seen = now
                self.reload_soon()


async def _fingerprint(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = await trio.Path(path).stat()
    except OSError:
        return None  # noqa: ASYNC910 - a thread was asked
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@contextlib.contextmanager
def _reload_on_sighup(gateway: Gateway) -> Iterator[None]:
    """Makes SIGHUP a reload, where nobody else has claimed the signal. Works under Trio and in guest mode alike."""
    usable = hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread()
    if not usable or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        yield
        return
    token = trio.lowlevel.current_trio_token()

    def on_signal(number: int, frame: object) -> None:
        token.run_sync_soon(gateway.reload_soon, idempotent=True)

    signal.signal(signal.SIGHUP, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


async def read_config(path: Path | None, env: Mapping[str, str]) -> Config:
    """Reads the configuration file, or, where there is none, finds what can be found.

    Raises:
        ConfigError: It cannot be used.
    """
    if path is not None:
        await trio.lowlevel.checkpoint()
        return structure_load.read(path, env=env)
    async with httpx2.AsyncHTTPTransport(verify=False, trust_env=False) as transport:
        return await discovery.discover(env, transport=transport)


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
        open_leaving() as leaving,
        open_poller() as poller,
        opening.open_store(opening.location(first.store, environ)) as store,
    ):
        gateway = Gateway(load, timers, leaving, Relay(poller) if poller is not None else None, store)
        async with open_workers(store, functools.partial(snapshot.snapshot, gateway)) as gateway.workers:
            gateway.sessions = Sessions(store, gateway.workers)
            gateway.streams = Streams(gateway)
            async with (
                open_accounts(store) as gateway.accounts,
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
                        opening.keep_pruned, gateway.store, gateway.workers, lambda: gateway.generation.config
                    )
                    yield
            finally:
                nursery.cancel_scope.cancel()
