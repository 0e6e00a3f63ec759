"""Builds the head of an HTTP/1.1 response from the messages of an ASGI app, and decides how the body is framed. Pure.

It rejects a head that would break the connection before a byte of it is sent: names that are not tokens, line breaks in
values, lengths that are not numbers. Only the server decides about the framing: it drops the app's
``transfer-encoding``, and reads only ``close`` and ``upgrade`` in the app's ``connection``.

Source: RFC 9112 sections 6 and 9.3; RFC 9110 sections 5.6.2, 6.6.1, 8.6, 15.3.5 and 15.4.5.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import NamedTuple

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}
_TOKEN = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z")

# Kinds of header fields: all but the first one affect the framing or the connection.
_PLAIN, _LENGTH, _CODING, _CONNECTION, _DATE = range(5)
_KINDS = {b"content-length": _LENGTH, b"transfer-encoding": _CODING, b"connection": _CONNECTION, b"date": _DATE}


class ResponseHead(NamedTuple):
    """A response head, and how its body is framed.

    Attributes:
        data: The bytes of the head, with the empty line.
        length: The declared length of the body in bytes; None = it is not declared.
        chunked: The body is sent in chunks.
        bodiless: The response has no body, even if the app sends one: a response to HEAD, 204, 304.
        persistent: The connection stays open for another request.
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
    """Makes a response head.

    Args:
        status: At least 200.
        headers: The header fields of the app.
        date: The value of the header ``date``, if the app sends none.
        version: The version of the request. HTTP/1.0 has no chunks: a body of unknown length ends with its connection.
        method: The method of the request.
        persistent: Whether client and server allow another request on the connection.

    Raises:
        ValueError: The head is invalid and must not be sent.

    >>> build(200, [(b"content-length", b"2")], date=b"today").data
    b'HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\ndate: today\\r\\n\\r\\n'
    >>> build(200, [], date=b"today", persistent=False).data
    b'HTTP/1.1 200 OK\\r\\ndate: today\\r\\ntransfer-encoding: chunked\\r\\nconnection: close\\r\\n\\r\\n'
    """
    lines = [_STATUS_LINES.get(status) or _status_line(status)]
    length: int | None = None
    dated = False
    options = b""
    for name, value in headers:
        kind = _kind_of(name)
        if kind:
            if kind == _LENGTH:
                if length is not None or not value.isdigit():
                    raise ValueError("content-length occurs twice, or is not a number")
                length = int(value)
                if status == 204:
                    continue
            elif kind == _DATE:
                dated = True
            else:
                if kind == _CONNECTION:
                    if b"close" in value.lower():
                        persistent = False
                    if b"upgrade" in value.lower():
                        options = b"upgrade, "
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
        lines.append(b"connection: %bclose\r\n" % options)
    elif version == b"HTTP/1.0":
        lines.append(b"connection: keep-alive\r\n")
    lines.append(b"\r\n")
    data = b"".join(lines)
    if data.count(b"\n") != len(lines) or data.count(b"\r") != len(lines) or b"\0" in data:
        raise ValueError("a header value contains a line break or a NUL")
    return ResponseHead(data, length, chunked, bodiless, persistent)


def _status_line(status: int) -> bytes:
    if not 200 <= status <= 999:
        raise ValueError(f"{status} is not the status of a final response")
    return b"HTTP/1.1 %d \r\n" % status


@functools.lru_cache(maxsize=1000)
def _kind_of(name: bytes) -> int:
    """Classifies a header name. Cached, as apps send the same few names with each response."""
    if not _TOKEN.match(name):
        raise ValueError(f"{name!r} is not a header name")
    return _KINDS.get(name.lower(), _PLAIN)
