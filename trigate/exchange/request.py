"""The input of an exchange: a client's call, its headers and its timeouts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import trio

from trigate.config.sections import ModelConfig
from trigate.exchange.affinity_key import affinity_key_of
from trigate.openai.request import Call
from trigate.upstream.generation import Generation


@attrs.define(eq=False, kw_only=True)
class ExchangeRequest:
    """A call, its owner, and how long it may take. It does not change.

    Attributes:
        id: The request id. Clients may choose it, so several requests may have the same.
        generation: The configuration that serves the call, with its upstreams.
        headers: The headers that are sent upstream, besides those of the upstream's configuration.
        client_headers: Those of the client's request, by lower-case name.
        owner: The name of the gateway key that the call was made with; empty = the gateway has no keys.
        arrived_at: When the request arrived (Trio time). The client's timeouts count from then.
        client_timeout_s: The client's timeout for the whole call.
        sdk_timeout_s: How long the client's SDK waits: for a stream, until it begins; for any other answer, until it
            is complete.
    """

    id: str
    call: Call
    generation: Generation
    headers: Mapping[str, str] = attrs.field(factory=dict)
    client_headers: Mapping[bytes, bytes] = attrs.field(factory=dict)
    owner: str = ""
    arrived_at: float = attrs.field(factory=trio.current_time)
    client_timeout_s: float = math.inf
    sdk_timeout_s: float = math.inf

    @property
    def affinity_key(self) -> bytes | None:
        """The conversation of the call; None = its model has no affinity, or the call belongs to none."""
        affinity = self.model.affinity
        if affinity == "none":
            return None
        return affinity_key_of(self.call, self.client_headers, owner=self.owner, affinity=affinity)

    @property
    def model(self) -> ModelConfig:
        """The settings of the model id in the call."""
        return self.generation.settings_of(self.call.model)
