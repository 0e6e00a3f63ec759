"""What all tests share: the ban on errors in the log, and a gateway to call.

Tests whose time is virtual ask for ``autojump_clock`` *by name*: a fixture cannot set the clock for them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import attrs
import httpx2
import pytest
import structlog
import trio

from tests.support.asgi_client import AsgiClient
from tests.support.provider import Provider
from trigate.asgi.application import GatewayApp, create_app
from trigate.config import structure as configuration
from trigate.config.sections import Config, Port
from trigate.gateway.gateway import Gateway, open_gateway
from trigate.server import lifespan, listeners, server
from trigate.store import opening
from trigate.upstream.factory import TransportFactory, http_transport

# A shell's background job ignores Ctrl-C, and its children with it; the processes that tests start must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# -- the store --------------------------------------------------------------------------------------------------------

os.environ["TRIGATE_STORE"] = opening.MEMORY  # of processes, too, that are not started by `processes`


@pytest.fixture(autouse=True)
def no_store_of_mine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the data of whoever runs it: a store that nobody has named is in memory."""
    monkeypatch.setattr(opening, "default_location", lambda: opening.MEMORY)


# -- the log ----------------------------------------------------------------------------------------------------------

_BAD = ("error", "critical", "exception")


class Logs:
    """What was logged during a test, by structlog and by `logging`.

    Attributes:
        entries: Each with ``event``, ``log_level`` and its values.
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._expected: set[str] = set()

    def expect_error(self, event: str) -> None:
        """Says that this test logs an error of that name. If it then does not, it fails too."""
        self._expected.add(event)

    def named(self, event: str) -> list[dict[str, Any]]:
        """The entries of an event."""
        return [entry for entry in self.entries if entry["event"] == event]

    def check(self) -> None:
        """Raises AssertionError if there are errors that nobody asked for, or none where some were."""
        errors = [entry for entry in self.entries if entry["log_level"] in _BAD]
        unexpected = [entry for entry in errors if entry["event"] not in self._expected]
        assert not unexpected, f"logged at ERROR: {unexpected}"
        missing = self._expected - {entry["event"] for entry in errors}
        assert not missing, f"expected in the log at ERROR, but not there: {sorted(missing)}"

    def take(self, logger: object, method: str, entry: MutableMapping[str, Any]) -> Mapping[str, Any]:
        """The structlog processor."""
        self.entries.append({**entry, "log_level": method})
        raise structlog.DropEvent


class _Handler(logging.Handler):
    def __init__(self, logs: Logs) -> None:
        super().__init__(logging.ERROR)
        self._logs = logs

    def emit(self, record: logging.LogRecord) -> None:
        self._logs.entries.append({"event": record.getMessage(), "log_level": "error", "logger": record.name})


@pytest.fixture(autouse=True)
def logs() -> Iterator[Logs]:
    """Captures the log. A test in which an ERROR is logged fails, unless it said `Logs.expect_error`."""
    found = Logs()
    handler = _Handler(found)
    # Configured and not only captured: `trigate.logs.configure` leaves a configured structlog alone.
    structlog.configure(processors=[found.take], wrapper_class=structlog.BoundLogger, cache_logger_on_first_use=False)
    logging.getLogger().addHandler(handler)
    try:
        yield found
        found.check()
    finally:
        logging.getLogger().removeHandler(handler)
        structlog.reset_defaults()


# -- a gateway --------------------------------------------------------------------------------------------------------


def make_config(
    upstreams: Mapping[str, Mapping[str, Any]] | None = None, *, env: Mapping[str, str] | None = None, **sections: Any
) -> Config:
    """Makes a configuration as its file would.

    Args:
        upstreams: Their settings; what is left out of one is kind ``openai``, an address that nobody has, and the
            model ``m``. Left out as a whole: one of them, ``up``.
        sections: ``limits``, ``models``, ``keys``, ``server``, … Without ``retries``, no target is tried twice;
            without ``breaker``, none is left alone.
    """
    sections = {"retries": {"budget": 0}, "breaker": {"failures": 0, "failure_rate": 0}, **sections}
    tables = {
        name: {**({} if "kind" in own else {"base_url": "http://up.invalid/v1", "models": ["m"]}), **own}
        for name, own in (upstreams if upstreams is not None else {"up": {}}).items()
    }
    return configuration.structure({"upstreams": tables, **sections}, env=env or {}, source="test")


@attrs.define(eq=False)
class Served:
    """A gateway that is open, its client, and the providers behind it."""

    app: GatewayApp
    client: AsgiClient
    providers: Mapping[str, Provider]
    state: Mapping[str, Any]
    settled: list[Any] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        settle = self.gateway.settle

        def count(exchange: Any) -> None:
            self.settled.append(exchange)
            settle(exchange)

        self.gateway.settle = count  # type: ignore[method-assign]

    @property
    def gateway(self) -> Gateway:
        """The gateway behind the app."""
        return self.app.gateway

    def assert_clean(self) -> None:
        """Nothing is left of any exchange, and each was settled once."""
        assert not self.gateway.live
        for upstream in self.gateway.generation.upstreams.values():
            assert upstream.in_flight == 0, upstream
            assert upstream.statistics().queued == 0, upstream
        for provider in self.providers.values():
            assert provider.open_now == 0, provider
        assert len({id(exchange) for exchange in self.settled}) == len(self.settled)
        assert all(exchange.outcome is not None for exchange in self.settled)
        assert self.gateway.generation.exchanges == 0


@contextlib.asynccontextmanager
async def _open_app(
    config: Config | None = None,
    providers: Mapping[str, Provider] | Provider | None = None,
    *,
    store: str | os.PathLike[str] = opening.MEMORY,
) -> AsyncIterator[Served]:
    settings = config if config is not None else make_config()
    if providers is None or isinstance(providers, Provider):
        providers = {"up": providers or Provider()}
    found = providers
    # Any: hypercorn's ASGI types are not those of the server
    app: Any = create_app(
        opener=lambda: open_gateway(
            settings, env={"TRIGATE_STORE": os.fspath(store)}, transports=lambda name, _: found[name].transport()
        )
    )
    async with lifespan.open_lifespan(app) as state, trio.open_nursery() as nursery:
        client = AsgiClient(app, nursery)
        try:
            yield Served(app, client, providers, state)
        finally:
            client.leave()
            nursery.cancel_scope.cancel()


@pytest.fixture
def open_app() -> Callable[..., AbstractAsyncContextManager[Served]]:
    """Opens a gateway whose upstreams are scripted, in memory: ``async with open_app(config, providers) as served``."""
    return _open_app


@contextlib.asynccontextmanager
async def _open_server(
    config: Config, *, transports: TransportFactory = http_transport
) -> AsyncIterator[tuple[httpx2.AsyncClient, GatewayApp]]:
    """Serves a gateway on a port of loopback, with upstreams on real sockets; gives a client with its base URL."""
    app: Any = create_app(opener=lambda: open_gateway(config, env={}, transports=transports))
    async with trio.open_nursery() as nursery:
        listening = listeners.open_sockets(attrs.evolve(config.server, port=Port(0)))
        urls = await nursery.start(partial(server.serve, app, config.server, sockets=listening))
        # without TLS: to load the authorities costs more than to open the gateway
        async with httpx2.AsyncClient(base_url=urls[0], timeout=10.0, trust_env=False, verify=False) as client:
            try:
                yield client, app
            finally:
                nursery.cancel_scope.cancel()


@pytest.fixture
def open_server() -> Callable[..., AbstractAsyncContextManager[tuple[httpx2.AsyncClient, GatewayApp]]]:
    """Serves a gateway over real sockets: ``async with open_server(config) as (client, app)``."""
    return _open_server
