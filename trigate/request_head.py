"""Judges the head of a request on its raw bytes, before a parser sees it.

h11 merges and forgives what a proxy in front may have read differently (two equal Content-Lengths,
Content-Length beside Transfer-Encoding, bare LF, folded fields, any Host), and its limits depend on
how the bytes were segmented. `examine` refuses all of it; what it lets pass, the parser judges further.

Source: RFC 9112 sections 2.2, 3, 5.2 and 6.1 to 6.3; RFC 9110 section 7.2; RFC 9113 section 8.3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

MAX_LINE_BYTES = 8 * 1024
"""The longest request line, and the longest header field."""
MAX_FIELDS = 100
MAX_FIELDS_BYTES = 32 * 1024
"""All header fields together."""

_END = re.compile(rb"\n\r?\n")
_VERSION = re.compile(rb"HTTP/[0-9]+(?:\.[0-9]+)?\Z")
_HOST = re.compile(
    rb"""(?: \[ [0-9A-Fa-f:.]+ \]                                 # an IPv6 address
           | (?: [A-Za-z0-9._~!$&'()*+,;=-] | %[0-9A-Fa-f]{2} )*  # a name, or an IPv4 address
         ) (?: : [0-9]* )? \Z""",
    re.VERBOSE,
)


class HeadRefused(Exception):
    """The request is not served, and its connection ends.

    Args:
        status: What to answer.
        message: Why, for the client.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def examine(data: bytes) -> None:
    """Judges what has arrived of an HTTP/1 request head.

    Args:
        data: Everything from the first byte of the request line on. Bytes after the head are not
            looked at. Of a head that is not complete, only the size is judged.

    Raises:
        HeadRefused: It is not acceptable.

    >>> examine(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    >>> examine(b"GET / HTTP/1.1\\r\\nHost: a@b/c\\r\\n\\r\\n")
    Traceback (most recent call last):
    trigate.request_head.HeadRefused: The Host header is not a host.
    """
    end = _END.search(data)
    head = data[: end.start()] if end else data
    line, _, rest = head.partition(b"\n")
    if len(line) > MAX_LINE_BYTES:
        raise HeadRefused(414, f"The request line is longer than {MAX_LINE_BYTES} bytes.")
    if len(rest) > MAX_FIELDS_BYTES:
        raise HeadRefused(431, f"The header fields have more than {MAX_FIELDS_BYTES} bytes together.")
    if not end:
        return
    lines = data[: end.end()].split(b"\n")[:-2]
    if not all(each.endswith(b"\r") for each in lines) or data[end.start() : end.end()] == b"\n\n":
        raise HeadRefused(400, "A line of the request head does not end in CR LF.")
    method, version = _examine_request_line(lines[0][:-1])
    fields = _fields([each[:-1] for each in lines[1:]])
    _examine_framing(fields, version)
    hosts = fields.get(b"host", [])
    if len(hosts) > 1:
        raise HeadRefused(400, "The request has several Host headers.")
    if not hosts and version == b"HTTP/1.1":
        raise HeadRefused(400, "The request has no Host header.")
    if hosts and not _HOST.match(hosts[0]):
        raise HeadRefused(400, "The Host header is not a host.")
    if method == b"CONNECT":
        raise HeadRefused(501, "This server is not a proxy: it does not know CONNECT.")
    protocols = {token.strip().lower() for value in fields.get(b"upgrade", []) for token in value.split(b",")}
    if b"h2c" in protocols:
        raise HeadRefused(400, "HTTP/2 is spoken over TLS only; leave the Upgrade header out.")
    if b"websocket" in protocols:
        raise HeadRefused(400, "There is no WebSocket here.")


def _examine_request_line(line: bytes) -> tuple[bytes, bytes]:
    parts = line.split(b" ")
    if len(parts) != 3 or not _VERSION.match(parts[2]):
        raise HeadRefused(400, "The first line is not 'METHOD TARGET HTTP/1.1'.")
    method, _, version = parts
    if method == b"PRI":
        raise HeadRefused(400, "HTTP/2 is spoken over TLS only.")
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise HeadRefused(505, "The HTTP version is neither 1.0 nor 1.1.")
    return method, version


def _fields(lines: Sequence[bytes]) -> Mapping[bytes, list[bytes]]:
    if len(lines) > MAX_FIELDS:
        raise HeadRefused(431, f"The request has more than {MAX_FIELDS} header fields.")
    fields: dict[bytes, list[bytes]] = {}
    for line in lines:
        if len(line) > MAX_LINE_BYTES:
            raise HeadRefused(431, f"A header field is longer than {MAX_LINE_BYTES} bytes.")
        if line[:1] in (b" ", b"\t"):
            raise HeadRefused(400, "A header field is folded over several lines.")
        name, _, value = line.partition(b":")
        fields.setdefault(name.lower(), []).append(value.strip(b" \t"))
    return fields


def _examine_framing(fields: Mapping[bytes, list[bytes]], version: bytes) -> None:
    lengths = fields.get(b"content-length", [])
    codings = fields.get(b"transfer-encoding", [])
    if lengths and codings:
        raise HeadRefused(400, "The request has both Content-Length and Transfer-Encoding.")
    if len(lengths) > 1 or any(b"," in value for value in lengths):
        raise HeadRefused(400, "The request has several Content-Lengths.")
    if codings and version == b"HTTP/1.0":
        raise HeadRefused(400, "HTTP/1.0 has no Transfer-Encoding.")


def examine_h2(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Judges the head of an HTTP/2 request that h2 has let pass.

    Args:
        headers: With the pseudo-headers.

    Raises:
        HeadRefused: It is not acceptable.

    >>> examine_h2([(b":method", b"GET"), (b":path", b"/\\xff"), (b":scheme", b"https")])
    Traceback (most recent call last):
    trigate.request_head.HeadRefused: The method or the path is not ASCII.
    """
    if len(headers) > MAX_FIELDS:
        raise HeadRefused(431, f"The request has more than {MAX_FIELDS} header fields.")
    if any(len(name) + len(value) > MAX_LINE_BYTES for name, value in headers):
        raise HeadRefused(431, f"A header field is longer than {MAX_LINE_BYTES} bytes.")
    pseudo = {name: value for name, value in headers if name[:1] == b":"}
    if pseudo.get(b":method") == b"CONNECT":
        raise HeadRefused(501, "This server is not a proxy: it does not know CONNECT.")
    if not pseudo.get(b":method", b"").isascii() or not pseudo.get(b":path", b"").isascii():
        raise HeadRefused(400, "The method or the path is not ASCII.")
    if not _HOST.match(pseudo.get(b":authority", b"")):
        raise HeadRefused(400, "The :authority is not a host.")
