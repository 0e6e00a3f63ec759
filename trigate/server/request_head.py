"""Checks the head of a request on its raw bytes, before a parser sees it.

Parsers merge and tolerate input that a proxy in front may have read differently (request smuggling): two equal
Content-Lengths, Content-Length beside Transfer-Encoding, bare LF, folded fields, any Host. And their limits depend on
how the bytes were segmented. `examine` refuses all of it. llhttp then checks the rest: the characters of methods,
targets, names and values. The check costs a few searches over the whole head, and parses only the fields that affect
the framing, the connection or the host.

Source: RFC 9112 sections 2.2, 3, 5.2 and 6.1 to 6.3; RFC 9110 sections 7.2, 7.8 and 10.1.1; RFC 9113 section 8.3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from trigate.errors import BadRequest, GatewayError, Header

MAX_LINE_BYTES = 8 * 1024
"""The size of the request line, and of each header field."""
MAX_FIELDS = 100
MAX_FIELDS_BYTES = 32 * 1024
"""The size of all header fields together."""

_END = re.compile(rb"\n\r?\n")
_VERSION = re.compile(rb"HTTP/[0-9]+(?:\.[0-9]+)?\Z")
_HOST = re.compile(
    rb"""(?: \[ [0-9A-Fa-f:.]+ \]                                 # an IPv6 address
           | (?: [A-Za-z0-9._~!$&'()*+,;=-] | %[0-9A-Fa-f]{2} )*  # a name, or an IPv4 address
         ) (?: : [0-9]* )? \Z""",
    re.VERBOSE,
)
_DECISIVE = re.compile(
    rb"\n(host|content-length|transfer-encoding|connection|upgrade|expect):[ \t]*([^\r\n]*)", re.IGNORECASE
)
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)


class HeadRefused(Exception):
    """The request is invalid: it is refused, and its connection ends.

    Args:
        status: The status of the response.
        message: The reason, for the client.
        error: The error that the client gets; None = ``invalid_request``.
    """

    def __init__(self, status: int, message: str, *, error: GatewayError | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self._error = error

    def to_response(self) -> tuple[int, list[Header], bytes]:
        """Renders the refusal as status, headers and a JSON body in OpenAI's shape."""
        return (self._error or BadRequest(self.message[:300], status=self.status)).to_response()


class RequestHead(NamedTuple):
    """The parts of a request head that a server acts on.

    Attributes:
        end: The offset of its end in the examined bytes, its empty line included.
        method: As the client sent it.
        target: In origin form: path and query. ``*`` with OPTIONS.
        version: ``HTTP/1.1`` or ``HTTP/1.0``.
        content_length: In bytes; None = none is declared.
        chunked: Whether the body is sent in chunks.
        persistent: Whether the client allows another request on the connection.
        expects_continue: Whether the client waits for status 100 before it sends the body.
        offers_websocket: Whether it is a WebSocket's handshake, as far as ``upgrade`` and ``connection`` say.
    """

    end: int
    method: bytes
    target: bytes
    version: bytes
    content_length: int | None
    chunked: bool
    persistent: bool
    expects_continue: bool
    offers_websocket: bool = False


def examine(data: bytes) -> RequestHead | None:
    """Checks the received part of an HTTP/1 request head.

    Args:
        data: All bytes from the first byte of the request line on. Bytes after the head are ignored. Only the size of
            an incomplete head is checked.

    Returns:
        The head; None = it is incomplete.

    Raises:
        HeadRefused: The head is not acceptable.

    >>> examine(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n")
    >>> examine(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n").target
    b'/'
    >>> examine(b"GET / HTTP/1.1\\r\\nHost: a@b/c\\r\\n\\r\\n")
    Traceback (most recent call last):
    trigate.server.request_head.HeadRefused: The Host header is not a host.
    """
    end = data.find(b"\r\n\r\n")
    lines = data.count(b"\r\n", 0, end + 2) if end >= 0 else 0
    if not lines or data.count(b"\n", 0, end + 2) != lines:
        _examine_unusual(data)  # no end has arrived yet, or one with a bare LF
        return None
    line_end = data.find(b"\n")
    if line_end > MAX_LINE_BYTES:
        raise HeadRefused(414, f"The request line is longer than {MAX_LINE_BYTES} bytes.")
    if end - line_end > MAX_FIELDS_BYTES:
        raise HeadRefused(431, f"The header fields have more than {MAX_FIELDS_BYTES} bytes together.")
    method, target, version = _split(data[: line_end - 1])
    if lines > MAX_FIELDS + 1:
        raise HeadRefused(431, f"The request has more than {MAX_FIELDS} header fields.")
    if end - line_end > MAX_LINE_BYTES and max(map(len, data[line_end + 1 : end].split(b"\r\n"))) > MAX_LINE_BYTES:
        raise HeadRefused(431, f"A header field is longer than {MAX_LINE_BYTES} bytes.")
    if data.find(b"\n ", 0, end) >= 0 or data.find(b"\n\t", 0, end) >= 0:
        raise HeadRefused(400, "A header field is folded over several lines.")

    host: bytes | None = None
    length: bytes | None = None
    coding: bytes | None = None
    connection = upgrades = expectation = b""
    for name, value in _DECISIVE.findall(data, line_end, end):
        match name.lower():
            case b"host":
                if host is not None:
                    raise HeadRefused(400, "The request has several Host headers.")
                host = value.rstrip(b" \t")
            case b"connection":
                connection += b"," + value.lower()
            case b"content-length":
                if length is not None:
                    raise HeadRefused(400, "The request has several Content-Lengths.")
                length = value.rstrip(b" \t")
            case b"transfer-encoding":
                coding = value if coding is None else coding + b"," + value
            case b"upgrade":
                upgrades += b"," + value.lower()
            case _:
                expectation = value.rstrip(b" \t").lower()

    content_length = _content_length(length, coding) if length is not None else None
    if coding is not None:
        _examine_coding(coding, version)
    if host is None:
        if version == b"HTTP/1.1":
            raise HeadRefused(400, "The request has no Host header.")
    elif not _HOST.match(host):
        raise HeadRefused(400, "The Host header is not a host.")
    if method == b"CONNECT":
        raise HeadRefused(501, "This server is not a proxy: it does not support CONNECT.")
    offers_websocket = False
    if upgrades and method == b"GET" and version == b"HTTP/1.1":
        # Every other offer is ignored (RFC 9110 7.8): Java's HTTP client and ``curl --http2`` offer ``h2c`` each time.
        offers_websocket = _has(upgrades, b"websocket") and _has(connection, b"upgrade")
    if target[:1] != b"/" or b"#" in target:
        target = _origin_form(method, target, host)
    persistent = version == b"HTTP/1.1"
    if connection:
        tokens = [token.strip(b" \t") for token in connection.split(b",")]
        persistent = b"close" not in tokens and (persistent or b"keep-alive" in tokens)
    return RequestHead(
        end + 4,
        method,
        target,
        version,
        content_length,
        coding is not None,
        persistent,
        expectation == b"100-continue" and version == b"HTTP/1.1",
        offers_websocket,
    )


def _examine_unusual(data: bytes) -> None:
    """Checks a head without a valid end: its size, and its first end, valid or not.

    A head of a given size must be refused whether it arrives in pieces or not. So an incomplete head may have 2 bytes
    more: they may be the start of its end.
    """
    end = _END.search(data)
    line, _, rest = (data[: end.start()] if end else data).partition(b"\n")
    if len(line) > MAX_LINE_BYTES:
        raise HeadRefused(414, f"The request line is longer than {MAX_LINE_BYTES} bytes.")
    if len(rest) > MAX_FIELDS_BYTES + (0 if end else 2):
        raise HeadRefused(431, f"The header fields have more than {MAX_FIELDS_BYTES} bytes together.")
    if end:
        raise HeadRefused(400, "A line of the request head does not end in CR LF.")


def _split(line: bytes) -> tuple[bytes, bytes, bytes]:
    parts = line.split(b" ")
    if len(parts) != 3 or not _VERSION.match(parts[2]):
        raise HeadRefused(400, "The first line is not 'METHOD TARGET HTTP/1.1'.")
    method, target, version = parts
    if method == b"PRI":
        raise HeadRefused(400, "HTTP/2 is available over TLS only.")
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise HeadRefused(505, "The HTTP version is neither 1.0 nor 1.1.")
    return method, target, version


def _content_length(length: bytes, coding: bytes | None) -> int:
    if coding is not None:
        raise HeadRefused(400, "The request has both Content-Length and Transfer-Encoding.")
    if b"," in length:
        raise HeadRefused(400, "The request has several Content-Lengths.")
    if not length.isdigit() or len(length) > 18:
        raise HeadRefused(400, "The Content-Length is not a number of bytes.")
    return int(length)


def _examine_coding(coding: bytes, version: bytes) -> None:
    if version == b"HTTP/1.0":
        raise HeadRefused(400, "HTTP/1.0 has no Transfer-Encoding.")
    if coding.strip(b" \t").lower() != b"chunked":
        raise HeadRefused(501, "The only Transfer-Encoding that this server supports is chunked, once.")


def _has(values: bytes, token: bytes) -> bool:
    """Whether a list in lower case has a token."""
    return any(value.strip(b" \t") == token for value in values.split(b","))


def _origin_form(method: bytes, target: bytes, host: bytes | None) -> bytes:
    """Converts a target that is not a plain path and query to one."""
    if target == b"*" and method == b"OPTIONS":
        return target
    absolute = _ABSOLUTE.match(target)
    if absolute is None and target[:1] != b"/":
        raise HeadRefused(400, "The target is neither a path nor a URL.")
    if b"#" in target:
        raise HeadRefused(400, "The target has a fragment.")
    assert absolute is not None
    if host is not None and absolute[1].lower() != host.lower():
        raise HeadRefused(400, "The target and the Host header name different hosts.")
    if not _HOST.match(absolute[1]):
        raise HeadRefused(400, "The target's host is not a host.")
    path = target[absolute.end() :]
    return path if path[:1] == b"/" else b"/" + path


def examine_h2(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Checks the head of an HTTP/2 request that h2 has accepted.

    Args:
        headers: The header fields, with the pseudo-headers.

    Raises:
        HeadRefused: The head is not acceptable.

    >>> examine_h2([(b":method", b"GET"), (b":path", b"/\\xff"), (b":scheme", b"https")])
    Traceback (most recent call last):
    trigate.server.request_head.HeadRefused: The method or the path is not ASCII.
    """
    if len(headers) > MAX_FIELDS:
        raise HeadRefused(431, f"The request has more than {MAX_FIELDS} header fields.")
    if any(len(name) + len(value) > MAX_LINE_BYTES for name, value in headers):
        raise HeadRefused(431, f"A header field is longer than {MAX_LINE_BYTES} bytes.")
    pseudo = {name: value for name, value in headers if name[:1] == b":"}
    if pseudo.get(b":method") == b"CONNECT":
        raise HeadRefused(501, "This server is not a proxy: it does not support CONNECT.")
    if not pseudo.get(b":method", b"").isascii() or not pseudo.get(b":path", b"").isascii():
        raise HeadRefused(400, "The method or the path is not ASCII.")
    if not _HOST.match(pseudo.get(b":authority", b"")):
        raise HeadRefused(400, "The :authority is not a host.")
