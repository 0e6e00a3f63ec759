"""Makes the head of an HTTP/1.1 response out of what an ASGI app says, and decides how its body is framed. Pure.

What would break the connection is refused here, before a byte of it is out: names that are no tokens, line breaks in
values, lengths that are no numbers. The framing is the server's alone: the app's ``transfer-encoding`` is dropped, and
of its ``connection`` only ``close`` is heeded.

Source: RFC 9112 sections 6 and 9.3; RFC 9110 sections 5.6.2, 6.6.1, 8.6, 15.3.5 and 15.4.5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import NamedTuple

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}
_TOKEN = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z")

_PLAIN, _LENGTH, _CODING, _CONNECTION, _DATE = range(5)
_KINDS = {b"content-length": _LENGTH, b"transfer-encoding": _CODING, b"connection": _CONNECTION, b"date": _DATE}
_known_names = dict(_KINDS)
"""Names that have been looked at, with their kinds."""
_MOST_NAMES = 1000


class ResponseHead(NamedTuple):
    """A head, and what follows from it.

    Attributes:
        data: Its bytes, with the empty line.
        length: How many bytes the body has; None where that is not declared.
        chunked: The body goes out in chunks.
        bodiless: There is no body, whatever the app sends: the answer to HEAD, 204, 304.
        persistent: The connection can be used further.
    """

    data: bytes
    length: int | None
    chunked: bool
    bodiless: bool
    persistent: bool


def build(
    status: int,
    headers: Iterable[tuple[bytes, bytes]],
    *,
    date: bytes,
    version: bytes = b"HTTP/1.1",
    method: bytes = b"GET",
    persistent: bool = True,
) -> ResponseHead:
    """Makes a head.

    Args:
        status: From 200 on.
        headers: As the app gives them.
        date: The value of the header ``date``, if the app gives none.
        version: The request's. HTTP/1.0 knows no chunks: there a body of unknown length ends with its connection.
        method: The request's.
        persistent: Whether the connection may be used further, as far as the server knows.

    Raises:
        ValueError: It cannot be sent.

    >>> build(200, [(b"content-length", b"2")], date=b"today").data
    b'HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\ndate: today\\r\\n\\r\\n'
    >>> build(200, [], date=b"today", persistent=False).data
    b'HTTP/1.1 200 OK\\r\\ndate: today\\r\\ntransfer-encoding: chunked\\r\\nconnection: close\\r\\n\\r\\n'
    """
    lines = [_STATUS_LINES.get(status) or _status_line(status)]
    length: int | None = None
    dated = False
    for name, value in headers:
        kind = _known_names.get(name)
        if kind is None:
            kind = _look_at(name)
        if kind:
            if kind == _LENGTH:
                if length is not None or not value.isdigit():
                    raise ValueError("content-length stands twice, or is no number")
                length = int(value)
                if status == 204:
                    continue
            elif kind == _DATE:
                dated = True
            else:
                if kind == _CONNECTION and b"close" in value.lower():
                    persistent = False
                continue
        lines.append(b"%b: %b\r\n" % (name, value))
    bodiless = method == b"HEAD" or status in (204, 304)
    chunked = False
    if not dated:
        lines.append(b"date: %b\r\n" % date)
    if length is None and status not in (204, 304):
        chunked = version != b"HTTP/1.0"
        if chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        else:
            persistent = persistent and bodiless
    if not persistent:
        lines.append(b"connection: close\r\n")
    elif version == b"HTTP/1.0":
        lines.append(b"connection: keep-alive\r\n")
    lines.append(b"\r\n")
    data = b"".join(lines)
    if data.count(b"\n") != len(lines) or data.count(b"\r") != len(lines) or b"\0" in data:
        raise ValueError("a header value has a line break or a NUL in it")
    return ResponseHead(data, length, chunked, bodiless, persistent)


def _status_line(status: int) -> bytes:
    if not 200 <= status <= 999:
        raise ValueError(f"{status} is not the status of a response")
    return b"HTTP/1.1 %d \r\n" % status


def _look_at(name: bytes) -> int:
    if not _TOKEN.match(name):
        raise ValueError(f"{name!r} is not a header name")
    kind = _KINDS.get(name.lower(), _PLAIN)
    if len(_known_names) < _MOST_NAMES:
        _known_names[bytes(name)] = kind
    return kind
