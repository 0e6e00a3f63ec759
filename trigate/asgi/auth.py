"""Access control: keys, loopback, hosts and origins."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from trigate.asgi.request import RequestHead
from trigate.config.checks import FILE_ORIGIN, host_of, host_of_origin, is_loopback
from trigate.dialects import gemini
from trigate.errors import BadRequest, Forbidden, Header
from trigate.keys.key import ANYBODY, Key
from trigate.keys.service import Keys

if TYPE_CHECKING:
    from trigate.config.sections import Config

_OF_FILES = ("null", FILE_ORIGIN)
_EXPOSED = (
    b"x-request-id, x-trigate-upstream, x-trigate-attempts, x-trigate-overhead-ms, x-trigate-cost-usd, "
    b"x-trigate-coalesced, "
    b"x-trigate-history-omitted, x-trigate-dropped, request-id, retry-after, retry-after-ms, x-should-retry, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens, x-trigate-budget-warning"
)


def _hops(value: bytes) -> list[str]:
    """Returns the addresses in an ``X-Forwarded-For`` or ``Forwarded`` (RFC 7239) header.

    >>> _hops(b"10.0.0.1, 127.0.0.1"), _hops(b'for="[2001:db8::1]:80";proto=http, for=192.0.2.1')
    (['10.0.0.1', '127.0.0.1'], ['2001:db8::1', '192.0.2.1'])
    """
    hops = []
    for hop in value.decode("latin-1").split(","):
        pairs = [pair.partition("=")[2] for pair in hop.split(";") if pair.strip().lower().startswith("for=")]
        text = pairs[0] if pairs else hop
        if text.strip() and (pairs or "=" not in text):
            hops.append(_address(text.strip().strip('"')))
    return hops


def _address(hop: str) -> str:
    """The host of a hop, which may have a port. What is not one stays as it is, and so is no loopback address."""
    return host_of(hop) or host_of(f"[{hop}]") or hop


def _given_key(head: RequestHead) -> bytes:
    """The key of a request: OpenAI's ``Authorization: Bearer``, Anthropic's ``x-api-key``, Azure's ``api-key``, or
    Google's ``x-goog-api-key`` and ``?key=``.

    Raises:
        BadRequest: There are two different ones.
    """
    headers = head.headers
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    given = token.strip() if scheme.lower() == b"bearer" else b""
    if b"x-api-key" in headers or b"api-key" in headers or b"x-goog-api-key" in headers or b"key=" in head.query:
        names = (b"x-api-key", b"api-key", b"x-goog-api-key")
        found = {given, _key_in(head), *[headers.get(name, b"").strip() for name in names]} - {b""}
        if len(found) > 1:
            raise BadRequest(
                "The request has different keys in authorization, x-api-key, api-key, x-goog-api-key or ?key=. Send "
                "one of them."
            )
        given = found.pop() if found else b""
    return given


def _key_in(head: RequestHead) -> bytes:
    """The key in the query, where Google's format has it (``?key=``)."""
    if not gemini.is_own(head.path):
        return b""
    values = parse_qs(head.query.decode("latin-1")).get("key", [])
    return values[0].strip().encode() if len(values) == 1 else b""


def authorize(head: RequestHead, config: Config, keys: Keys) -> Key:
    """Decides whether a request is allowed.

    Returns:
        Its key; `ANYBODY` = no key is configured.

    Raises:
        Unauthenticated, RateLimited, StoreUnavailable: Keys are configured; as `Keys.authenticate`.
        BadRequest: Keys are configured, and the request has two different ones.
        Forbidden: No key is configured, and the request is not from this machine, or it is from a web page whose origin
            is not allowed.
    """
    if keys.are_required:
        return keys.authenticate(_given_key(head), head.client)
    if config.server.insecure:
        return ANYBODY
    if not (is_loopback(head.server) and is_loopback(head.client)):
        raise Forbidden(
            "This gateway has no key configured, so it serves this machine only. Set TRIGATE_API_KEY (or [keys]) "
            "to serve others, or start it with --insecure."
        )
    for field in (b"x-forwarded-for", b"forwarded", b"x-real-ip"):
        if field in head.headers and not all(is_loopback(hop) for hop in _hops(head.joined(field))):
            raise Forbidden(
                f"This request came through a proxy ({field.decode()}), and this gateway has no key configured, so it "
                "serves this machine only. Set TRIGATE_API_KEY (or [keys]), or start it with --insecure."
            )
    given = head.headers.get(b"host", b"").decode("latin-1")
    host = host_of(given)
    if given and (host is None or not (is_loopback(host) or host in config.server.allowed_hosts)):
        raise Forbidden(
            f"The Host {given[:200]!r} is not this machine (DNS rebinding?). Add it to server.allowed_hosts, "
            "or configure a key."
        )
    origin = head.origin
    if origin is not None and not cors_allows(origin, config):
        page = host_of_origin(origin)
        if page is None or not is_loopback(page):
            raise Forbidden(f"Pages of {origin[:200]!r} may not call this gateway. Add it to server.cors_origins.")
    return ANYBODY


def cors_allows(origin: str, config: Config) -> bool:
    """Whether web pages of an origin may read answers. ``*`` allows each valid origin, and those of files."""
    allowed = config.server.cors_origins
    return origin in allowed or ("*" in allowed and (origin in _OF_FILES or host_of_origin(origin) is not None))


def cors_headers(origin: str | None, config: Config) -> list[Header]:
    """Returns the CORS headers of every response to a request from an origin; None = it has none."""
    if not config.server.cors_origins:
        return []
    headers: list[Header] = [(b"vary", b"origin")]
    if origin is not None and cors_allows(origin, config):
        headers.append((b"access-control-allow-origin", origin.encode("latin-1")))
        headers.append((b"access-control-expose-headers", _EXPOSED))
    return headers
