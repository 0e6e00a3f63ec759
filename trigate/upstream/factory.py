"""Makes the transport that an upstream's configuration asks for."""

from __future__ import annotations

import functools
import ipaddress
import os
import ssl
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING

import httpx2

from trigate.config.sections import ConfigError, UpstreamConfig
from trigate.upstream.transport import SocketTransport

if TYPE_CHECKING:
    pass

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
