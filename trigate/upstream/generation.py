"""A generation: the upstreams that one configuration makes, and the routes to them.

An exchange holds the generation that it started with. A reload opens the next generation and retires the current one,
which closes when its last exchange has ended.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

import attrs
import httpx2
import trio

from trigate.concurrency.notify import open_service
from trigate.config.sections import AttemptTimeouts, Config, ModelConfig, UpstreamConfig
from trigate.dialects.ollama import names_of
from trigate.errors import GatewayError
from trigate.openai.endpoints import Endpoint
from trigate.prices.prices import Prices
from trigate.routing import routes
from trigate.routing.endpoints import call_targets, passed_targets
from trigate.routing.plan import relative_weights
from trigate.routing.routes import Alias, Aliases, Known, Target
from trigate.upstream import echo
from trigate.upstream.auth import auth_of
from trigate.upstream.factory import TransportFactory, TrustStore, http_transport
from trigate.upstream.local_model import process as local_model
from trigate.upstream.local_model.process import LocalModel, LocalModelSettings
from trigate.upstream.model_list import ModelPoll
from trigate.upstream.transport import SocketTransport
from trigate.upstream.upstream import Upstream

_FIRST_LISTS_S = 0.3
"""How long the opening of a generation waits for the first lists of models."""

_MAX_ROUTES = 1024

_UNNAMED = ModelConfig(targets=())
"""The settings of a model id that has none in the configuration."""


@attrs.frozen
class Route:
    """Where the calls for a model id go.

    Attributes:
        targets: The targets in the order in which they are tried; at least one.
        timeouts: The timeouts of an attempt, by the name of its upstream.
        shortest_limit_s: The shortest time limit of all targets; ``math.inf`` = no limit.
        total_timeout_s: How long a call may take in all.
        alias: The name of the ``[models.NAME]`` whose settings apply; the id itself, if there is none.
        weights: Of the targets (`plan.relative_weights`).
    """

    targets: tuple[Target, ...]
    timeouts: Mapping[str, AttemptTimeouts]
    shortest_limit_s: float
    total_timeout_s: float
    alias: str
    weights: tuple[float, ...]


class Generation:
    """The upstreams of one configuration, and the routes to them. Made by `open_generation`.

    Attributes:
        aliases: The configured aliases.
        trust: The certificate authorities, as they were when this generation first needed them.
        prices: What the models of its upstreams cost.
        exchanges: The number of holds: exchanges that use this generation.
        created: When it was opened, in seconds since the epoch.
    """

    def __init__(self, config: Config, upstreams: Mapping[str, Upstream], trust: TrustStore) -> None:
        self.config = config
        self.upstreams = upstreams
        self.trust = trust
        self.prices = Prices(config)
        self.aliases = Aliases({name: tuple(map(Target.parse, model.targets)) for name, model in config.models.items()})
        self._narrowed = any(upstream.endpoints is not None for upstream in config.upstreams.values())
        self._routes: dict[str, Route] = {}
        self._named: dict[str, str] = {}
        self.exchanges = 0
        self.created = int(time.time())
        self._retired = False
        self._unused = trio.Event()

    def __repr__(self) -> str:
        state = ", retired" if self._retired else ""
        return f"<Generation from {self.config.source}, {self.exchanges} exchanges{state}>"

    def known(self) -> dict[str, Known]:
        """Returns the state of each upstream, as routing takes it."""
        return {name: upstream.known() for name, upstream in self.upstreams.items()}

    def route(self, model: str, endpoint: Endpoint | None = None) -> Route:
        """Returns the route of a public model id. Raises as `routing.endpoints.call_targets`.

        Args:
            endpoint: Its path has to be among the ``endpoints`` of an upstream; None = that does not matter.

        A route is kept until an upstream lists other models. That of ``default`` is not kept unless it is an alias,
        since it depends on which upstreams are up.
        """
        key = model if endpoint is None or not self._narrowed else f"{endpoint.path} {model}"
        found = self._routes.get(key)
        if found is not None:
            return found
        if endpoint is None or not self._narrowed:
            targets = routes.plan(model, aliases=self.aliases, upstreams=self.known())
        else:
            is_own = endpoint.format == "openai" and endpoint.path != "/responses"
            also = endpoint.path if is_own else "/chat/completions"
            targets = call_targets(endpoint.path, model, also=also, aliases=self.aliases, upstreams=self.known())
        found = self._route(targets, model)
        if model != "default" or model in self.aliases.exact:
            if len(self._routes) >= _MAX_ROUTES:
                self._routes.clear()  # clients choose the ids, so their number has no other bound
            self._routes[key] = found
        return found

    def alias_of(self, model: str) -> str:
        """Returns the name of the ``[models.NAME]`` whose settings apply to a public model id; the id itself, if there
        is none."""
        if not self.aliases.patterns or model in self.aliases.exact:
            return model
        if (route := self._routes.get(model)) is not None:
            return route.alias
        alias = self.aliases.find(model, self.upstreams)
        return alias.name if alias is not None else model

    def settings_of(self, model: str) -> ModelConfig:
        """Returns the settings of a public model id."""
        found = self.config.models.get(model)
        if found is None and self.aliases.patterns:
            found = self.config.models.get(self.alias_of(model))
        return found if found is not None else _UNNAMED

    def passed_route(
        self, path: str, *, model: str | None = None, upstream: str | None = None, is_new: bool = False
    ) -> Route:
        """Returns the route of a request that is passed through. As `routing.endpoints.passed_targets`."""
        targets = passed_targets(
            path, model=model, upstream=upstream, is_new=is_new, aliases=self.aliases, upstreams=self.known()
        )
        return self._route(targets, model or "")

    def _route(self, targets: tuple[Target, ...], model: str) -> Route:
        alias = self.aliases.find(model, self.upstreams) or Alias(model, targets)
        timeouts = {target.upstream: self.config.attempt_timeouts(target.upstream, alias.name) for target in targets}
        shortest_s = min(min(attrs.astuple(each)) for each in timeouts.values())
        # All attempts share one deadline: the longest total timeout of the targets.
        total_s = max(each.total_s for each in timeouts.values())
        weights = relative_weights(self.config.models.get(alias.name, _UNNAMED), alias.targets, targets)
        return Route(targets, timeouts, shortest_s, total_s, alias.name, weights)

    def forget_routes(self) -> None:
        """Drops the kept routes, because an upstream lists other models."""
        self._routes.clear()
        self._named.clear()

    def named(self, model: str) -> str:
        """Returns the public id that a client of Ollama's format means: it may add the tag ``latest``, or leave it
        out."""
        found = self._named.get(model)
        if found is None:
            ids = self.public_ids()
            names = names_of(model)
            found = next((name for name in names if name in ids), names[-1] if model.endswith(":latest") else model)
            if len(self._named) >= _MAX_ROUTES:
                self._named.clear()
            self._named[model] = found
        return found

    def public_ids(self) -> dict[str, str]:
        """Returns every listed model id with its owner."""
        return routes.public_ids(aliases=self.aliases, upstreams=self.known())

    def model_fields(self, model: str, owner: str) -> dict[str, Any]:  # Any: JSON
        """Returns what is known about a listed model: what its upstream says and what is configured; for an alias, that
        of its first usable target.

        Args:
            owner: The upstream that `public_ids` names.
        """
        alias = self.aliases.find(model, self.upstreams)
        if alias is not None:
            target = next(each for each in alias.targets if self.upstreams[each.upstream].unusable is None)
        elif model == "default":
            try:
                target = routes.default_target(self.known())
            except GatewayError:
                return {}
        else:
            target = Target(owner, model.removeprefix(f"{owner}/"))
        upstream = self.upstreams[target.upstream]
        listed, configured = upstream.model_fields.get(target.model, {}), upstream.config.model_info
        return {**listed, **configured.get(target.model, {}), **self.settings_of(model).info}

    @property
    def is_retired(self) -> bool:
        """No further exchange starts with it: it closes after its last one."""
        return self._retired

    def hold(self) -> None:
        """Keeps the generation open for one exchange, until `let_go`."""
        self.exchanges += 1

    def let_go(self) -> None:
        """Ends one hold."""
        self.exchanges -= 1
        if self._retired and not self.exchanges:
            self._unused.set()

    def retire(self) -> None:
        """Declares that no further exchange will start with this generation."""
        self._retired = True
        if not self.exchanges:
            self._unused.set()

    async def wait_unused(self) -> None:
        """Waits until the generation is retired and its last exchange has ended."""
        await self._unused.wait()


class Generations:
    """The generation in use. A reload replaces it; an exchange keeps the one that it started with.

    Attributes:
        current: The generation that new requests use.
    """

    def __init__(self, first: Generation) -> None:
        self.current = first

    def __repr__(self) -> str:
        return f"<Generations, current from {self.config.source}>"

    @property
    def config(self) -> Config:
        """The configuration in use."""
        return self.current.config

    def replace(self, generation: Generation) -> None:
        """Makes a generation the current one and retires the previous one, which closes after its last exchange."""
        retired, self.current = self.current, generation
        retired.retire()


@contextlib.asynccontextmanager
async def open_generation(config: Config, transports: TransportFactory | None = None) -> AsyncIterator[Generation]:
    """Opens the upstreams of a configuration and keeps their lists of models fresh.

    Waits for the first lists, but not longer than 0.3 s.

    Args:
        transports: Makes the transports of all upstreams but the echo; None = sockets (`factory.http_transport`).

    Raises:
        ConfigError: The configuration names files that cannot be used.
    """
    trust = TrustStore()
    if transports is None:
        transports = partial(http_transport, trust=trust)
    async with contextlib.AsyncExitStack() as stack:
        upstreams = {name: await _open_upstream(name, config, transports, stack) for name in config.upstreams}
        generation = Generation(config, upstreams, trust)
        pools = [each.transport for each in upstreams.values() if isinstance(each.transport, SocketTransport)]
        polls = [
            ModelPoll(upstream, generation.forget_routes)
            for upstream in upstreams.values()
            if upstream.config.kind in ("openai", "anthropic", "gemini", "ollama")
            and upstream.config.models == "discover"
            and upstream.unusable is None
        ]
        auths = [each.auth for each in upstreams.values() if each.auth is not None]
        async with open_service(
            *[each.run for each in pools], *[each.run for each in polls], *[each.run for each in auths]
        ):
            with trio.move_on_after(_FIRST_LISTS_S):
                for poll in polls:
                    await poll.tried.wait()
            yield generation


async def _open_upstream(
    name: str, config: Config, transports: TransportFactory, stack: contextlib.AsyncExitStack
) -> Upstream:
    settings = config.upstreams[name]
    transport: httpx2.AsyncBaseTransport
    match settings.kind:
        case "echo":
            transport = echo.EchoTransport(words_per_s=settings.words_per_s)
            await stack.enter_async_context(transport)
            return Upstream(name, config, transport, default_models=(echo.MODEL_ID,))
        case "local":
            unusable = local_model.why_unavailable(settings.gguf)
            model = await stack.enter_async_context(_open_local(settings)) if unusable is None else None
            transport = await stack.enter_async_context(transports(name, settings))
            return Upstream(
                name,
                config,
                transport,
                local_model=model,
                unusable=unusable,
                default_models=(local_model.model_id(settings.gguf),),
            )
        case "openai" | "anthropic" | "azure" | "bedrock" | "gemini" | "vertex" | "ollama":
            transport = await stack.enter_async_context(transports(name, settings))
            return Upstream(name, config, transport, auth=auth_of(name, settings))


def _open_local(settings: UpstreamConfig) -> contextlib.AbstractAsyncContextManager[LocalModel]:
    return local_model.open_local_model(
        LocalModelSettings(
            gguf=settings.gguf,
            start=settings.start,
            context_tokens=settings.context_tokens,
            parallel=settings.parallel,
            threads=settings.threads,
        )
    )
