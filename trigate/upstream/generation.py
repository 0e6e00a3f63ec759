"""What one configuration makes: upstreams and routes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

import attrs
import structlog
import trio

from trigate.config.sections import Config, TimeoutPhase
from trigate.errors import GatewayError, ProtocolViolation, Rejected
from trigate.routing import routes
from trigate.routing.routes import Known, Target
from trigate.upstream import discovery, echo
from trigate.upstream.factory import TransportFactory
from trigate.upstream.local_model import process as local_model
from trigate.upstream.transport import SocketTransport
from trigate.upstream.upstream import Upstream

if TYPE_CHECKING:
    pass

log = structlog.get_logger("trigate.gateway")

REFRESH_S = 60.0
"""How often an upstream is asked for its models."""


RETRY_S = 5.0
"""How soon it is asked again after it did not answer; doubles up to `REFRESH_S`."""


_FIRST_LOOK_S = 0.3


_MAX_ROUTES = 1024


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


class Generations:
    """The generation in use. A reload replaces it; an exchange keeps the one that it started with.

    Attributes:
        current: What new requests use.
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
        """Makes a generation the current one, and retires the one before; it closes after its last exchange."""
        retired, self.current = self.current, generation
        retired.retire()


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
                    raise ProtocolViolation(f"GET /models of {upstream.name} gave no model list: {error}.") from None
                upstream.note_up()
                pause_s = REFRESH_S
            if scope.cancelled_caught:
                raise ProtocolViolation(f"GET /models of {upstream.name} was not answered within 10 s.")
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
