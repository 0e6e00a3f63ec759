"""One client connection: the TLS handshake, and then HTTP/1.1 (`http1`) or HTTP/2 (`http2`), as ALPN has chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import attrs
import trio

from trigate.concurrency.poller import Poller
from trigate.concurrency.timers import Timers, open_timers
from trigate.config.sections import ServerConfig
from trigate.logs import log
from trigate.server import http1
from trigate.server.http1 import Address, Application

if TYPE_CHECKING:  # imported where TLS is configured: hypercorn and h2 take 6 MiB
    from trigate.server.http2 import Http2Connection, Http2Service

HANDSHAKE_TIMEOUT_S = 10.0


@attrs.define(eq=False)
class Service:
    """What the connections of a server share.

    Args:
        http1: What the HTTP/1.1 connections share.
    """

    http1: http1.Service
    _config: ServerConfig
    _http2: Http2Service | None = attrs.field(init=False, default=None)

    def http2(self) -> Http2Service:
        """What the HTTP/2 connections share; made at the first call."""
        if self._http2 is None:
            from trigate.server.http2 import Http2Service, hypercorn_config

            self._http2 = Http2Service(self.http1, hypercorn_config(self._config))
        return self._http2

    def announce_close(self) -> None:
        """Has every connection announce its end, and end when its client knows. See `Connection.announce_close` for
        connections that send no response."""
        self.http1.announces_close = True

    async def begin_drain(self) -> None:
        """Has every connection end after the requests that it serves now."""
        self.http1.announces_close = self.http1.draining = True
        if self._http2 is not None:
            await self._http2.context.terminated.set()


@attrs.define(eq=False)
class Connection:
    """One connection, from its acceptance to its end.

    Args:
        service: What the connections share.
        stream: Owned. A `trio.SSLStream` makes it HTTPS, with HTTP/2 if the client chooses it.
        client: The client's address, for the scope.
        server: The server's address, for the scope.
    """

    _service: Service
    _stream: trio.abc.Stream
    client: Address | None = None
    server: Address | None = None
    _accepted_at: float = attrs.field(init=False, factory=trio.current_time)
    _protocol: http1.Connection | Http2Connection | None = attrs.field(init=False, default=None)
    _handshake: trio.CancelScope | None = attrs.field(init=False, default=None)

    async def run(self) -> None:
        """Serves the connection until it is closed."""
        if isinstance(self._stream, trio.SSLStream):
            async with aclosing(self._stream):
                alpn = await self._shake_hands(self._stream)
                if alpn == "h2":
                    await self._serve_http2(self._stream)
                elif alpn is not None:
                    await self._serve_http1()
        else:
            await self._serve_http1()

    def close_if_idle(self) -> None:
        """Closes the connection unless it is serving a request."""
        if self._protocol is not None:
            self._protocol.close_if_idle()
        elif self._handshake is not None:
            self._handshake.cancel()

    @property
    def idle_since(self) -> float | None:
        """Since when the connection has served no request, so that `close_if_idle` closes it; None = it serves one."""
        if self._protocol is not None:
            return self._protocol.idle_since
        return self._accepted_at if self._handshake is not None else None

    async def announce_close(self) -> None:
        """Tells an idle HTTP/2 client that its connection ends. HTTP/1.1 announces it in the next response."""
        if self._protocol is not None and not isinstance(self._protocol, http1.Connection):
            await self._protocol.announce_close()

    async def abort(self) -> None:
        """Closes the connection at once, even while its tasks use it."""
        if self._protocol is not None:
            await self._protocol.abort()
        else:
            await trio.aclose_forcefully(self._stream)

    async def _shake_hands(self, stream: trio.SSLStream[trio.abc.Stream]) -> str | None:
        """Returns the protocol that ALPN has chosen; None = the handshake failed or took too long."""
        with trio.move_on_after(HANDSHAKE_TIMEOUT_S) as self._handshake:
            try:
                await stream.do_handshake()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                log.debug("handshake_failed", client=self.client, reason=repr(error.__cause__ or error))
            else:
                return stream.selected_alpn_protocol() or "http/1.1"
        return None

    async def _serve_http1(self) -> None:
        self._protocol = http1.Connection(self._service.http1, self._stream, self.client, self.server)
        await self._protocol.run()

    async def _serve_http2(self, stream: trio.SSLStream[trio.abc.Stream]) -> None:
        from trigate.server.http2 import Http2Connection

        self._protocol = Http2Connection(self._service.http2(), stream, self.client, self.server)
        await self._protocol.run()


def make_service(
    app: Application, config: ServerConfig, state: Mapping[str, Any], timers: Timers, poller: Poller | None = None
) -> Service:
    """Makes what the connections of a server share.

    Args:
        app: A Trio-native ASGI app.
        config: The configuration; its timeouts apply.
        state: The lifespan state.
        timers: Close idle connections.
        poller: Reports disconnects; None = there is none.
    """
    head_timeout_s = config.head_timeout_s or math.inf
    return Service(http1.Service(app, timers, config.keep_alive_timeout_s, state, poller, head_timeout_s), config)


async def serve_connection(
    app: Application,
    stream: trio.abc.Stream,
    *,
    config: ServerConfig | None = None,
    state: Mapping[str, Any] | None = None,
    client: Address | None = None,
    server: Address | None = None,
) -> None:
    """Serves one connection on any stream, such as one of a pair of memory streams. Its exceptions are the caller's.

    Args:
        app: A Trio-native ASGI app. The caller runs its lifespan.
        stream: The server's end. Owned.
        config: The configuration; its timeouts apply.
        state: The lifespan state.
        client: The client's address, for the scope.
        server: The server's address, for the scope.
    """
    async with open_timers() as timers:
        service = make_service(app, config or ServerConfig(), state or {}, timers)
        await Connection(service, stream, client, server).run()
