"""Makes the transport that an upstream's configuration asks for, and loads the certificate authorities for TLS."""

from __future__ import annotations

import ipaddress
import os
import ssl
import urllib.request
from collections.abc import Callable

import httpx2

from trigate.config.sections import ConfigError, UpstreamConfig
from trigate.upstream.no_proxy import is_exempt
from trigate.upstream.transport import SocketTransport

TransportFactory = Callable[[str, UpstreamConfig], httpx2.AsyncBaseTransport]
"""Makes the transport of an upstream from its name and its configuration."""


class TrustStore:
    """The certificate authorities by which TLS connections are verified, loaded when they are first needed.

    Loading costs more than everything else at start-up (30 to 250 ms), so nothing loads it that makes no TLS
    connection. A store never reloads: each generation has a store of its own, so a reload of the configuration reads
    the authorities again.

    **Source:** ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` of the environment, else those that `httpx2` uses by default.
    """

    def __init__(self) -> None:
        self._context: ssl.SSLContext | None = None

    def __repr__(self) -> str:
        return f"<TrustStore{'' if self._context is None else ' loaded'}>"

    def context(self) -> ssl.SSLContext:
        """Returns the TLS context, the same at each call.

        Raises:
            ConfigError: The authorities cannot be read.
        """
        if self._context is None:
            try:
                self._context = httpx2.create_ssl_context()
            except OSError as error:  # includes ssl.SSLError
                variables = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if name in os.environ]
                where = " and ".join(variables) or "the system's certificate authorities"
                raise ConfigError(where, (f"cannot be used: {error.strerror or error}",)) from error
        return self._context


def http_transport(
    name: str, upstream: UpstreamConfig, *, trust: TrustStore | None = None
) -> httpx2.AsyncBaseTransport:
    """Makes the transport of an upstream on sockets. `Upstream` counts slots, so the pool sets no limit.

    Trigate's own transport speaks HTTP/1.1 to the upstream itself. Through a proxy, or with HTTP/2, it is httpx2's.

    Args:
        trust: The certificate authorities; None = a store for this transport alone.

    Raises:
        ConfigError: The transport needs TLS, and the certificate authorities cannot be read.
    """
    trust = TrustStore() if trust is None else trust
    proxy = _proxy_to(upstream)
    secure = str(upstream.base_url).startswith("https:") or str(proxy).startswith("https:")
    if secure:
        trust.context()  # so that an unreadable bundle is an error of the configuration, not of the first call
    if proxy is None and not upstream.http2:
        return SocketTransport(trust=trust.context)
    if proxy is not None and not proxy.startswith(("http://", "https://")):
        return _Unreachable(f"the proxy that the environment names is one of {proxy.partition(':')[0]}, not of HTTP")
    return httpx2.AsyncHTTPTransport(
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=30.0),
        verify=trust.context() if secure else False,
        trust_env=False,
        http2=upstream.http2,
        proxy=proxy,
    )


def _proxy_to(upstream: UpstreamConfig) -> str | None:
    """Returns the proxy to an upstream: the configured one, else, for other machines, that of the environment."""
    if upstream.proxy is not None or upstream.base_url is None:
        return upstream.proxy if upstream.proxy != "direct" else None
    url = httpx2.URL(upstream.base_url)
    proxies = urllib.request.getproxies()
    port = url.port or (443 if url.scheme == "https" else 80)
    if _is_this_machine(url.host) or is_exempt(url.host, port, proxies.get("no", "")):
        return None
    if "no" not in proxies and urllib.request.proxy_bypass(url.host):  # the settings of macOS and Windows
        return None
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _is_this_machine(host: str) -> bool:
    """Returns whether a host is this machine, as far as its name tells.

    >>> hosts = ("127.0.0.1", "::1", "localhost", "a.localhost", "localhost.example", "10.0.0.1")
    >>> [_is_this_machine(host) for host in hosts]
    [True, True, True, True, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class _Unreachable(httpx2.AsyncBaseTransport):
    """Fails each request with the reason why none can be sent: one upstream's error must not stop the others."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError(self._reason)
