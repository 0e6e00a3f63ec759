"""Who may come in: the head of a request, read once and judged. Keys, this machine, hosts, origins."""

from __future__ import annotations

import functools
import hmac
import ipaddress
import math
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trigate.errors import (
    Ambiguous,
    BadRequest,
    Forbidden,
    Header,
    HeadersTooLarge,
    Unauthenticated,
)
from trigate.openai.endpoints import Endpoint
from trigate.server.request_head import MAX_FIELDS, MAX_FIELDS_BYTES

if TYPE_CHECKING:
    from trigate.config.sections import Config

_SESSION_KEY = re.compile(rb"[!-.0-~]{1,256}\Z")
_FORWARDED = {
    b"openai-beta": "openai-beta",
    b"idempotency-key": "idempotency-key",
    b"traceparent": "traceparent",
    b"tracestate": "tracestate",
}
_EXPOSED = (
    b"x-request-id, x-trigate-upstream, x-trigate-attempts, x-trigate-overhead-ms, x-trigate-coalesced, "
    b"retry-after, retry-after-ms, x-should-retry"
)


class Head:
    """What is read of a request's head, once.

    Attributes:
        examined: `trigate serve` has judged it already.
    """

    def __init__(self, scope: Any) -> None:  # Any: an ASGI scope is a dict of anything
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.client: str | None = scope["client"][0] if scope.get("client") else None
        self.server: str | None = scope["server"][0] if scope.get("server") else None
        self._fields: list[tuple[bytes, bytes]] = scope["headers"]
        self.headers = {name.lower(): value for name, value in self._fields}
        self.examined = "trigate.client" in scope.get("extensions", {})

    def check(self) -> None:
        """Looks for what would make it another request to somebody else.

        Raises:
            Ambiguous: Its length is said twice, or in two ways (request smuggling begins like that).
            HeadersTooLarge: `trigate serve` has seen to that already; other servers may not.
        """
        fields, headers = self._fields, self.headers
        if len(headers) != len(fields):
            names = [name.lower() for name, _ in fields]
            for once in (b"content-length", b"host", b"authorization", b"x-session-key"):
                if names.count(once) > 1:
                    raise Ambiguous(f"The header {once.decode()} stands twice.")
        if not self.examined and (
            len(fields) > MAX_FIELDS or sum([len(name) + len(value) for name, value in fields]) > MAX_FIELDS_BYTES
        ):
            raise HeadersTooLarge(f"More than {MAX_FIELDS} header fields, or {MAX_FIELDS_BYTES} bytes of them.")
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise Ambiguous("Content-Length and Transfer-Encoding cannot go together.")

    @property
    def content_length(self) -> int | None:
        """The declared length of the body in bytes."""
        value = self.headers.get(b"content-length", b"")
        return int(value) if value.isdigit() and len(value) < 20 else None

    @property
    def origin(self) -> str | None:
        """The page that a browser sends this for."""
        value = self.headers.get(b"origin")
        return value.decode("latin-1") if value is not None else None

    def session_key(self, endpoint: Endpoint) -> str | None:
        """The session that a call belongs to; None = it belongs to none.

        Raises:
            BadRequest: It names one in a way that cannot be, or where nothing would be remembered.
        """
        key = self.headers.get(b"x-session-key")
        if key is None:
            return None
        if endpoint.path != "/chat/completions":
            raise BadRequest("x-session-key goes with /v1/chat/completions only.", param="x-session-key")
        if not _SESSION_KEY.match(key) or key in (b".", b".."):  # those two cannot stand in a path
            raise BadRequest(
                "x-session-key must be 1 to 256 visible ASCII characters without a slash.", param="x-session-key"
            )
        return bytes(key).decode()

    def coalesce(self) -> bool | None:
        """Whether the call may share the upstream call of another one (``x-coalesce``); None = it does not say.

        Raises:
            BadRequest: It is neither ``true`` nor ``false``.
        """
        given = self.headers.get(b"x-coalesce")
        if given is None:
            return None
        said = given.strip().lower()
        if said not in (b"true", b"false"):
            raise BadRequest("x-coalesce must be true or false.", param="x-coalesce")
        return bool(said == b"true")

    def timeout_s(self) -> float:
        """How long the client lets the whole call take (``x-request-timeout``, in seconds); ``math.inf`` = it does not
        say.

        Raises:
            BadRequest: It is not a number of seconds above 0.
        """
        given = self.headers.get(b"x-request-timeout")
        if given is None:
            return math.inf
        seconds = _seconds(given)
        if seconds is None:
            said = given.decode("latin-1")[:50]
            raise BadRequest(
                f"x-request-timeout must be a number of seconds above 0; got {said!r}.", param="x-request-timeout"
            )
        return seconds

    def sdk_timeout_s(self) -> float:
        """How long the client's SDK waits for an answer to begin, or for one that is not streamed to be there.

        The official SDKs send with each call what they are set to. openai-python sends its read timeout
        (``x-stainless-read-timeout``), which begins anew with each byte; openai-node (``x-stainless-timeout``) waits so
        long for the head of the response. So neither bounds a stream that has begun.
        """
        given = [self.headers.get(name, b"") for name in (b"x-stainless-read-timeout", b"x-stainless-timeout")]
        waits_s = min([seconds for seconds in map(_seconds, given) if seconds is not None], default=math.inf)
        # It has to hear of it before its own clock ends the call: then it would know nothing, and try again by itself.
        return waits_s - min(0.1 * waits_s, 0.25) if waits_s < math.inf else waits_s

    def forwarded(self) -> dict[str, str]:
        """The client's headers that go upstream."""
        return {
            name: self.headers[key].decode("latin-1")
            for key, name in _FORWARDED.items()
            if key in self.headers and self.headers[key].isascii()
        }


def _seconds(given: bytes) -> float | None:
    """Reads a header's number of seconds; None where it is none, or not above 0.

    >>> _seconds(b"2.5"), _seconds(b"0"), _seconds(b"1e999"), _seconds(b"soon"), _seconds(b"1_0")
    (2.5, None, None, None, None)
    """
    if not given or b"_" in given:  # the second is Python's own way of writing numbers
        return None
    try:
        seconds = float(given)
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None


# -- who may come in --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def is_loopback(host: str | None) -> bool:
    """Whether a name or address is this machine's own. A peer without an address is a Unix socket, which is.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("::ffff:127.0.0.1"), is_loopback("10.0.0.1")
    (True, True, True, False)
    """
    if not host or host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


@functools.lru_cache(maxsize=256)
def _hostname(text: str) -> str | None:
    try:
        return urlsplit(f"//{text}").hostname
    except ValueError:
        return None


def _hops(value: bytes) -> list[str]:
    """The addresses in an ``X-Forwarded-For`` or ``Forwarded`` (RFC 7239) header.

    >>> _hops(b"10.0.0.1, 127.0.0.1"), _hops(b'for="[2001:db8::1]:80";proto=http, for=192.0.2.1')
    (['10.0.0.1', '127.0.0.1'], ['2001:db8::1', '192.0.2.1'])
    """
    hops = []
    for hop in value.decode("latin-1").split(","):
        pairs = [pair.partition("=")[2] for pair in hop.split(";") if pair.strip().lower().startswith("for=")]
        text = pairs[0] if pairs else hop
        if text.strip() and (pairs or "=" not in text):
            hops.append(_hostname(text.strip().strip('"')) or text.strip())
    return hops


def authorize(head: Head, config: Config) -> str | None:
    """Decides whether a request may come in.

    Returns:
        The name of its key; None where no key is configured.

    Raises:
        Unauthenticated: A key is configured, and this is none.
        Forbidden: No key is configured, and the request is not from this machine, or is a page's that should not.
    """
    if config.keys:
        scheme, _, token = head.headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else b""
        found = None
        for name, key in config.keys.items():  # every key is compared, whichever matches
            if hmac.compare_digest(given, key.encode()):
                found = name
        if found is None:
            said = "Incorrect API key provided." if given else "You didn't provide an API key."
            raise Unauthenticated(f"{said} This gateway wants one: Authorization: Bearer YOUR_KEY.")
        return found
    if config.server.insecure:
        return None
    if not (is_loopback(head.server) and is_loopback(head.client)):
        raise Forbidden(
            "This gateway has no key configured, so it serves this machine only. Set TRIGATE_API_KEY (or [keys]) "
            "to serve others, or start it with --insecure."
        )
    for field in (b"x-forwarded-for", b"forwarded", b"x-real-ip"):
        if field in head.headers and not all(is_loopback(hop) for hop in _hops(head.headers.get(field, b""))):
            raise Forbidden(
                f"This request came through a proxy ({field.decode()}), and this gateway has no key configured, so it "
                "serves this machine only. Set TRIGATE_API_KEY (or [keys]), or start it with --insecure."
            )
    host = _hostname(head.headers.get(b"host", b"").decode("latin-1"))
    if host and not is_loopback(host) and host not in config.server.allowed_hosts:
        raise Forbidden(
            f"The Host {host[:200]!r} is not this machine (DNS rebinding?). Add it to server.allowed_hosts, "
            "or configure a key."
        )
    origin = head.origin
    if origin is not None and not cors_allows(origin, config):
        page = _hostname(origin.partition("://")[2])
        if page is None or not is_loopback(page):
            raise Forbidden(f"Pages of {origin[:200]!r} may not call this gateway. Add it to server.cors_origins.")
    return None


def cors_allows(origin: str, config: Config) -> bool:
    """Whether pages of an origin may read answers."""
    return origin in config.server.cors_origins or "*" in config.server.cors_origins


def cors_headers(origin: str | None, config: Config) -> list[Header]:
    if not config.server.cors_origins:
        return []
    headers: list[Header] = [(b"vary", b"origin")]
    if origin is not None and cors_allows(origin, config):
        headers.append((b"access-control-allow-origin", origin.encode("latin-1")))
        headers.append((b"access-control-expose-headers", _EXPOSED))
    return headers
