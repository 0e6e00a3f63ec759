"""The head of a request: its validation, and the headers that the gateway reads. (Access control: `auth`.)"""

from __future__ import annotations

import math
import random
import re
from typing import Any

from trigate.content_coding import coding_of
from trigate.errors import Ambiguous, BadRequest, HeadersTooLarge, UnsupportedMediaType
from trigate.openai.endpoints import Endpoint
from trigate.server.request_head import MAX_FIELDS, MAX_FIELDS_BYTES

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}\Z")
_SESSION_KEY = re.compile(rb"[!-.0-~]{1,256}\Z")
_UNIQUE = (
    *(
        b"content-length",
        b"host",
        b"origin",
        b"authorization",
        b"x-api-key",
        b"api-key",
        b"x-goog-api-key",
        b"x-session-key",
    ),
)
_FORWARDED = {
    b"openai-beta": "openai-beta",
    b"idempotency-key": "idempotency-key",
    b"baggage": "baggage",
    b"traceparent": "traceparent",
    b"tracestate": "tracestate",
}


class RequestHead:
    """The head of a request.

    Attributes:
        method, path: Of the request line.
        query: The query, as it was received. It may have a key in it, so no message or log shows it.
        client, server: The addresses of the two ends; None = unknown.
        headers: By lower-case name; of a repeated name, the last value.
        examined: `trigate serve` has checked the size limits already.
    """

    def __init__(self, scope: Any) -> None:  # Any: an ASGI scope is a dict of anything
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.client: str | None = scope["client"][0] if scope.get("client") else None
        self.server: str | None = scope["server"][0] if scope.get("server") else None
        self._fields: list[tuple[bytes, bytes]] = scope["headers"]
        self.examined = "trigate.client" in scope.get("extensions", {})
        # `trigate serve` gives the names in lower case
        self.headers = dict(self._fields) if self.examined else {name.lower(): value for name, value in self._fields}

    def request_id(self) -> str:
        """Returns the id of the request: that of the client (``x-request-id``), or a new one."""
        given = self.headers.get(b"x-request-id", b"")
        return given.decode() if _REQUEST_ID.match(given) else f"req_{random.getrandbits(96):024x}"

    def check(self) -> None:
        """Rejects heads that another HTTP parser could read differently (request smuggling), or that are too large.

        Raises:
            Ambiguous: A header that must be unique occurs twice, or the length is declared in two ways.
            HeadersTooLarge: There are too many fields, or too many bytes of them. `trigate serve` checks this earlier;
                other servers may not.
        """
        fields, headers = self._fields, self.headers
        if len(headers) != len(fields):
            names = [name.lower() for name, _ in fields]
            for once in _UNIQUE:
                if names.count(once) > 1:
                    raise Ambiguous(f"The header {once.decode()} occurs twice.")
        if not self.examined and (
            len(fields) > MAX_FIELDS or sum([len(name) + len(value) for name, value in fields]) > MAX_FIELDS_BYTES
        ):
            raise HeadersTooLarge(f"More than {MAX_FIELDS} header fields, or {MAX_FIELDS_BYTES} bytes of them.")
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise Ambiguous("A request cannot have both Content-Length and Transfer-Encoding.")

    def joined(self, name: bytes) -> bytes:
        """The values of a header that may be repeated, as one list."""
        return b",".join([value for given, value in self._fields if given.lower() == name])

    @property
    def repeated(self) -> frozenset[bytes]:
        """The names of the headers that occur more than once."""
        if len(self.headers) == len(self._fields):
            return frozenset()
        names = [name.lower() for name, _ in self._fields]
        return frozenset(name for name in self.headers if names.count(name) > 1)

    @property
    def content_length(self) -> int | None:
        """The declared length of the body in bytes."""
        value = self.headers.get(b"content-length", b"")
        return int(value) if value.isdigit() and len(value) < 20 else None

    @property
    def origin(self) -> str | None:
        """The origin of the web page that makes the request; None = the request has no such header."""
        value = self.headers.get(b"origin")
        return value.decode("latin-1") if value is not None else None

    def content_coding(self, accepted: tuple[str, ...]) -> str:
        """Returns the content coding of the body: one of those, or ``identity``.

        Raises:
            UnsupportedMediaType: It is another one, or there are several.
        """
        coding = coding_of(self.headers.get(b"content-encoding", b"").decode("latin-1"))
        if coding != "identity" and coding not in accepted:
            served = ", ".join(accepted) or "identity"
            raise UnsupportedMediaType(
                f"Content-Encoding {coding[:100]!r} is not served here; accepted: {served}.", accept_encoding=served
            )
        return coding

    def session_key(self, endpoint: Endpoint) -> str | None:
        """Returns the session of a call (``x-session-key``); None = it has none.

        Raises:
            BadRequest: The key is not valid, or the endpoint has no sessions.
        """
        key = self.headers.get(b"x-session-key")
        if key is None:
            return None
        if endpoint.path != "/chat/completions":
            raise BadRequest("x-session-key is valid with /v1/chat/completions only.", param="x-session-key")
        if not _SESSION_KEY.match(key) or key in (b".", b".."):  # a URL's path cannot contain these two
            raise BadRequest(
                "x-session-key must be 1 to 256 visible ASCII characters without a slash.", param="x-session-key"
            )
        return bytes(key).decode()

    def coalesce(self) -> bool | None:
        """Whether the call may share an upstream call with others (``x-coalesce``); None = the header is missing.

        Raises:
            BadRequest: It is neither ``true`` nor ``false``.
        """
        given = self.headers.get(b"x-coalesce")
        if given is None:
            return None
        value = given.strip().lower()
        if value not in (b"true", b"false"):
            raise BadRequest("x-coalesce must be true or false.", param="x-coalesce")
        return bool(value == b"true")

    def timeout_s(self) -> float:
        """The client's timeout for the whole call in seconds (``x-request-timeout``); infinite = the header is missing.

        Raises:
            BadRequest: It is not a number of seconds above 0.
        """
        given = self.headers.get(b"x-request-timeout")
        if given is None:
            return math.inf
        seconds = _seconds(given)
        if seconds is None:
            shown = given.decode("latin-1")[:50]
            raise BadRequest(
                f"x-request-timeout must be a number of seconds above 0; got {shown!r}.", param="x-request-timeout"
            )
        return seconds

    def sdk_timeout_s(self) -> float:
        """How long the client's SDK waits: for a stream, until it begins; for any other answer, until it is complete.

        The official SDKs send their timeout with each call. That of openai-python (``x-stainless-read-timeout``) starts
        again with each byte; that of openai-node (``x-stainless-timeout``) ends with the head of the response. So
        neither bounds a stream that has begun.
        """
        given = [self.headers.get(name, b"") for name in (b"x-stainless-read-timeout", b"x-stainless-timeout")]
        waits_s = min([seconds for seconds in map(_seconds, given) if seconds is not None], default=math.inf)
        # Fail just before the SDK's own timeout; otherwise it times out first and retries silently.
        return waits_s - min(0.1 * waits_s, 0.25) if waits_s < math.inf else waits_s

    def forwarded(self, endpoint: Endpoint) -> dict[str, str]:
        """The client's headers that go upstream. In Anthropic's format, these are also all of Anthropic's own: they
        choose the version of the format, and features that may be newer than the gateway."""
        found = {
            name: self.headers[key].decode("latin-1")
            for key, name in _FORWARDED.items()
            if key in self.headers and self.headers[key].isascii()
        }
        if len(self.headers) != len(self._fields):
            self._join_trace(found)
        if endpoint.format == "anthropic":
            for key in self.headers:
                if key.startswith(b"anthropic-") and self.joined(key).isascii():
                    found[key.decode()] = self.joined(key).decode()
        return found

    def _join_trace(self, found: dict[str, str]) -> None:
        """Corrects the headers of a trace that occur more than once: two are lists, and the third is not valid then."""
        repeated = self.repeated
        for name in (b"tracestate", b"baggage"):
            if name in repeated and (value := self.joined(name)).isascii():
                found[name.decode()] = value.decode()
        if b"traceparent" in repeated:
            found.pop("traceparent", None)
            found.pop("tracestate", None)


def _seconds(given: bytes) -> float | None:
    """Parses a number of seconds; None = it is not a number above 0.

    >>> _seconds(b"2.5"), _seconds(b"0"), _seconds(b"1e999"), _seconds(b"soon"), _seconds(b"1_0")
    (2.5, None, None, None, None)
    """
    if not given or b"_" in given:  # `float` accepts underscores
        return None
    try:
        seconds = float(given)
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None
