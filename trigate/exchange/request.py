"""What an exchange is asked to do: a client's call, and what came with it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import trio

from trigate.config.sections import ModelConfig
from trigate.openai.request import Call
from trigate.upstream.generation import Generation

_UNNAMED = ModelConfig(targets=())
"""The rules of a model id that the configuration does not name."""


@attrs.define(eq=False, kw_only=True)
class ExchangeRequest:
    """A call, who makes it, and how long it may take. Not changed once it is made.

    Attributes:
        id: The request id. Clients may choose it, so several requests may have the same.
        generation: The configuration, with its upstreams, that the call is served by.
        headers: What goes upstream besides the upstream's own headers.
        owner: The name of the gateway key that the call was made with; empty = the gateway has no keys.
        arrived_at: When the request arrived (Trio time). The client's timeouts count from there.
        client_timeout_s: How long the client lets the whole call take.
        sdk_timeout_s: How long the client's SDK waits for the answer to begin; for one that is not streamed, to end.
    """

    id: str
    call: Call
    generation: Generation
    headers: Mapping[str, str] = attrs.field(factory=dict)
    owner: str = ""
    arrived_at: float = attrs.field(factory=trio.current_time)
    client_timeout_s: float = math.inf
    sdk_timeout_s: float = math.inf

    @property
    def model(self) -> ModelConfig:
        """What the configuration says of the model id that the client asked for."""
        return self.generation.config.models.get(self.call.model, _UNNAMED)
