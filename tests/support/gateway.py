"""A gateway for a test: its configuration, and the running gateway with its client and its providers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import attrs
import httpx2
import trio

from tests.support.asgi_client import AsgiClient
from tests.support.provider import Provider
from trigate.asgi import control_plane  # noqa: F401 - imported here, since a virtual clock does not wait for a thread
from trigate.asgi.application import GatewayApp, create_app
from trigate.config import structure as configuration
from trigate.config.sections import Config, Port
from trigate.gateway.gateway import Gateway, open_gateway
from trigate.server import lifespan, listeners, server
from trigate.store import opening
from trigate.upstream.factory import TransportFactory


def make_config(
    upstreams: Mapping[str, Mapping[str, Any]] | None = None, *, env: Mapping[str, str] | None = None, **sections: Any
) -> Config:
    """Makes a configuration from tables, as its file would.

    Args:
        upstreams: The settings of each upstream. An upstream without ``kind`` is of kind ``openai``, with an address
            that does not resolve and the model ``m``, unless it sets them. By default there is one upstream, ``up``.
        env: The environment variables.
        sections: ``limits``, ``models``, ``keys``, ``server``, … Retries and the circuit breaker are off unless
            ``retries`` and ``breaker`` are given.
    """
    sections = {"retries": {"budget": 0}, "breaker": {"failures": 0, "failure_rate": 0}, **sections}
    tables = {
        name: {**({} if "kind" in own else {"base_url": "http://up.invalid/v1", "models": ["m"]}), **own}
        for name, own in (upstreams if upstreams is not None else {"up": {}}).items()
    }
    return configuration.structure({"upstreams": tables, **sections}, env=env or {}, source="test")


@attrs.define(eq=False)
class Served:
    """An open gateway, its client, and the providers behind it.

    Attributes:
        app: The ASGI application.
        client: Sends requests to the application.
        providers: The scripted providers, by the upstream's name.
        state: The state of the ASGI lifespan.
        settled: The exchanges that were settled, in that order.
    """

    app: GatewayApp
    client: AsgiClient
    providers: Mapping[str, Provider]
    state: Mapping[str, Any]
    settled: list[Any] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        settle = self.gateway.live.settle

        def count(exchange: Any) -> None:
            self.settled.append(exchange)
            settle(exchange)

        self.gateway.live.settle = count  # type: ignore[method-assign]

    @property
    def gateway(self) -> Gateway:
        """The gateway behind the application."""
        return self.app.gateway

    def assert_clean(self) -> None:
        """Asserts that no exchange, slot, hold or connection is left, and that each exchange was settled once."""
        assert not len(self.gateway.live)
        for counter in self.gateway.exchange_services.quotas.all_counters():
            assert getattr(counter, "held", 0) == 0, counter
        for upstream in self.gateway.generations.current.upstreams.values():
            assert upstream.in_flight == 0, upstream
            assert upstream.statistics().queued == 0, upstream
        for provider in self.providers.values():
            assert provider.open_now == 0, provider
        assert len({id(exchange) for exchange in self.settled}) == len(self.settled)
        assert all(exchange.outcome is not None for exchange in self.settled)
        assert self.gateway.generations.current.exchanges == 0


OpenApp = Callable[..., AbstractAsyncContextManager[Served]]
OpenServer = Callable[..., AbstractAsyncContextManager[tuple[httpx2.AsyncClient, GatewayApp]]]


@contextlib.asynccontextmanager
async def open_app(
    config: Config | None = None,
    providers: Mapping[str, Provider] | Provider | None = None,
    *,
    store: str | os.PathLike[str] = opening.MEMORY,
) -> AsyncIterator[Served]:
    """Opens a gateway whose upstreams are scripted and in memory.

    Args:
        config: By default that of `make_config`.
        providers: The provider of each upstream, by its name. A single provider is that of the upstream ``up``.
        store: The location of the store.
    """
    settings = config if config is not None else make_config()
    if providers is None or isinstance(providers, Provider):
        providers = {"up": providers or Provider()}
    by_name = providers
    # Any: hypercorn's ASGI types are not those of the server
    app: Any = create_app(
        opener=lambda: open_gateway(
            settings, env={"TRIGATE_STORE": os.fspath(store)}, transports=lambda name, _: by_name[name].transport()
        )
    )
    async with lifespan.open_lifespan(app) as state, trio.open_nursery() as nursery:
        client = AsgiClient(app, nursery)
        try:
            yield Served(app, client, by_name, state)
        finally:
            client.cancel_all()
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def open_server(
    config: Config, *, transports: TransportFactory | None = None
) -> AsyncIterator[tuple[httpx2.AsyncClient, GatewayApp]]:
    """Serves a gateway on a loopback port, with upstreams on real sockets; yields a client with its base URL."""
    app: Any = create_app(opener=lambda: open_gateway(config, env={}, transports=transports))
    async with trio.open_nursery() as nursery:
        listening = listeners.open_sockets(attrs.evolve(config.server, port=Port(0)))
        urls = await nursery.start(partial(server.serve, app, config.server, sockets=listening))
        # without TLS verification: loading the certificate authorities takes longer than opening the gateway
        async with httpx2.AsyncClient(base_url=urls[0], timeout=10.0, trust_env=False, verify=False) as client:
            try:
                yield client, app
            finally:
                nursery.cancel_scope.cancel()
