"""Who may come in: the head of a request, read once and judged. Keys, this machine, hosts, origins."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from trigate.errors import (
    Ambiguous,
    BadRequest,
    HeadersTooLarge,
)
from trigate.openai.endpoints import Endpoint
from trigate.server.request_head import MAX_FIELDS, MAX_FIELDS_BYTES

if TYPE_CHECKING:
    pass

_SESSION_KEY = re.compile(rb"[!-.0-~]{1,256}\Z")
_FORWARDED = {
    b"openai-beta": "openai-beta",
    b"idempotency-key": "idempotency-key",
    b"traceparent": "traceparent",
    b"tracestate": "tracestate",
}


class RequestHead:
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
