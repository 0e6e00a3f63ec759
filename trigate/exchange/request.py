"""The input of an exchange: a client's call, its headers and its timeouts."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping

import attrs
import trio

from trigate.config.sections import ModelConfig
from trigate.errors import BadRequest
from trigate.exchange.affinity_key import affinity_key_of
from trigate.exchange.sink import ClientSocket
from trigate.keys.errors import ModelNotAllowed
from trigate.keys.key import ANYBODY, Key
from trigate.openai.answer import Usage
from trigate.openai.request import Call
from trigate.prices.prices import Prices
from trigate.routing.routes import Target
from trigate.tracing.tracer import Trace
from trigate.upstream.generation import Generation, Route
from trigate.upstream.request_stream import RequestStream


@attrs.frozen(kw_only=True)
class PassThrough:
    """What an exchange passes through to one upstream, in place of a call (`openai.passed_paths`).

    Attributes:
        method: Of the request.
        route: The targets of the request.
        path_for: Returns where it goes, below the base URL of an upstream, for the upstream's own model id.
        body_for: Returns its body for such an id; of an upload, always the same stream.
        upload: Its body, if that is sent as it arrives.
        is_repeatable: It may be sent to another target after it has arrived at one, like a call.
        socket: The client's WebSocket, if the request is its handshake; None = it is an ordinary request.
        take_answer: Takes the name of the upstream and its whole answer, if that is no stream; returns what the client
            gets, and the token counts in it. None = the answer goes to the client as it comes.
    """

    method: str
    route: Route
    path_for: Callable[[str], str]
    body_for: Callable[[str], bytes | RequestStream]
    is_repeatable: bool
    upload: RequestStream | None = None
    socket: ClientSocket | None = None
    take_answer: Callable[[str, bytes], Awaitable[tuple[bytes, Usage | None]]] | None = None


@attrs.define(eq=False, kw_only=True)
class ExchangeRequest:
    """A call, its owner, and how long it may take. It does not change.

    Attributes:
        id: The request id. Clients may choose it, so several requests may have the same.
        generation: The configuration that serves the call, with its upstreams.
        headers: The headers that are sent upstream, besides those of the upstream's configuration.
        client_headers: Those of the client's request, by lower-case name.
        key: The gateway key that the call was made with.
        arrived_at: When the request arrived (Trio time). The client's timeouts count from then.
        client_timeout_s: The client's timeout for the whole call.
        sdk_timeout_s: How long the client's SDK waits: for a stream, until it begins; for any other answer, until it
            is complete.
        upstream: The only upstream that may serve the call, since it has the objects that the call names; None = any
            may.
        note: Takes the target and the next bytes of the answer, until it returns True: it has found the
            id under which the upstream keeps the answer. None = the upstream does not keep it.
        passed: What is passed through. Its call has no body then, only a path and perhaps a model.
        trace: Its place in a trace, which it gets when its exchange begins; None = it is not traced.
        model: The settings of the model id in the call.
    """

    id: str
    call: Call
    generation: Generation
    headers: Mapping[str, str] = attrs.field(factory=dict)
    client_headers: Mapping[bytes, bytes] = attrs.field(factory=dict)
    key: Key = ANYBODY
    arrived_at: float = attrs.field(factory=trio.current_time)
    client_timeout_s: float = math.inf
    sdk_timeout_s: float = math.inf
    upstream: str | None = None
    note: Callable[[Target | None, bytes], bool] | None = None
    passed: PassThrough | None = None
    trace: Trace | None = None
    model: ModelConfig = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.model = self.generation.settings_of(self.call.model)

    @property
    def owner(self) -> str:
        """The name of its key; empty = the gateway has no keys."""
        return self.key.name

    @property
    def stream_prices(self) -> Prices | None:
        """The prices, if the client wants the cost in its stream and its format is one of server-sent events."""
        wants = self.key.settings.include_cost or self.client_headers.get(b"x-trigate-include-cost") in (b"1", b"true")
        has_place = self.call.endpoint.stream_type.startswith("text/event-stream")
        return self.generation.prices if wants and has_place else None

    def route(self) -> Route:
        """Returns the targets of the request.

        Raises:
            BadRequest: The model is not one of the upstream that has the objects which the call names.
            ModelNotAllowed: The key may not use the model.
            GatewayError: As `Generation.route`.
        """
        if self.passed is not None:
            route = self.passed.route
        else:
            route = self.generation.route(self.call.model, self.call.endpoint)
        if self.key.limits_models:
            targets = (f"{target.upstream}/{target.model}" for target in route.targets)
            if not self.key.may_use(self.call.model, targets):
                raise ModelNotAllowed(self.call.model)
        if self.passed is not None:
            return route
        if self.upstream is None:
            return route
        own = tuple(target for target in route.targets if target.upstream == self.upstream)
        if not own:
            raise BadRequest(
                f"The model {self.call.model[:200]!r} is not one of the upstream {self.upstream}, which has an object "
                "that the call names.",
                param="model",
            )
        return attrs.evolve(route, targets=own, weights=())

    @property
    def affinity_key(self) -> bytes | None:
        """The conversation of the call; None = its model has no affinity, or the call belongs to none."""
        affinity = self.model.affinity
        if affinity == "none" or self.passed is not None:
            return None
        return affinity_key_of(self.call, self.client_headers, owner=self.owner, affinity=affinity)
