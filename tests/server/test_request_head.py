"""`trigate.server.request_head`: which heads are refused, and with which status, however they are segmented."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trigate.server.request_head import MAX_FIELDS, MAX_FIELDS_BYTES, MAX_LINE_BYTES, HeadRefused, examine, examine_h2

GOOD = {
    "plain": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "1.0 without a host": b"GET / HTTP/1.0\r\n\r\n",
    "host and port": b"GET / HTTP/1.1\r\nHost: localhost:18888\r\n\r\n",
    "IPv6": b"GET / HTTP/1.1\r\nhost: [::1]:18888\r\n\r\n",
    "length": b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
    "chunked": b"POST /v1/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bytes after the head are not looked at": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n\n\n"
    + b"x" * 50_000,
    "an upgrade that may be ignored": b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: TLS/1.0\r\n\r\n",
    "h2c": b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: !\r\n\r\n",
    "h2c among others": b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: foo\r\nUpgrade: bar, H2C\r\n\r\n",
    "websocket without the option": b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n",
    "websocket with a body": b"POST / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "websocket in HTTP/1.0": b"GET / HTTP/1.0\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "the longest line": b"GET /" + b"a" * (MAX_LINE_BYTES - 16) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "the longest field": b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * (MAX_LINE_BYTES - 3) + b"\r\n\r\n",
    "the most fields": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * (MAX_FIELDS - 1) + b"\r\n",
}

_POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
BAD = {
    "CL and TE": (400, _POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "TE and CL": (400, _POST + b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n"),
    "two lengths": (400, _POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n"),
    "two equal lengths": (400, _POST + b"Content-Length: 3\r\ncontent-length: 3\r\n\r\n"),
    "two lengths in one": (400, _POST + b"Content-Length: 3, 3\r\n\r\n"),
    "TE in HTTP/1.0": (400, b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "no host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "two hosts": (400, b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n"),
    "host with a user": (400, b"GET / HTTP/1.1\r\nHost: a@b/c\r\n\r\n"),
    "host with a space": (400, b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
    "bare LF": (400, b"GET / HTTP/1.1\nHost: x\n\n"),
    "one bare LF": (400, b"GET / HTTP/1.1\r\nA: b\nHost: x\r\n\r\n"),
    "a bare LF at the end": (400, b"GET / HTTP/1.1\r\nHost: x\r\n\n"),
    "a folded field": (400, b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n"),
    "HTTP/0.9": (400, b"GET /\r\n\r\n"),
    "garbage": (400, b"\x16\x03\x01garbage\r\n\r\n"),
    "HTTP/2.0": (505, b"GET / HTTP/2.0\r\nHost: x\r\n\r\n"),
    "HTTP/3.0": (505, b"GET / HTTP/3.0\r\nHost: x\r\n\r\n"),
    "HTTP/1.2": (505, b"GET / HTTP/1.2\r\nHost: x\r\n\r\n"),
    "the HTTP/2 preface": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "CONNECT": (501, b"CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\n\r\n"),
    "a long line": (414, b"GET /" + b"a" * MAX_LINE_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    "a line without end": (414, b"a" * (MAX_LINE_BYTES + 1)),
    "a long field": (431, b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * MAX_LINE_BYTES + b"\r\n\r\n"),
    "many fields": (431, b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * MAX_FIELDS + b"\r\n"),
    "large fields": (431, b"GET / HTTP/1.1\r\nHost: x\r\n" + (b"A: " + b"b" * 4000 + b"\r\n") * 9 + b"\r\n"),
    "fields without end": (431, b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * MAX_FIELDS_BYTES),
}


@pytest.mark.parametrize("data", GOOD.values(), ids=GOOD)
def test_good_heads_pass(data: bytes) -> None:
    """A valid head passes, and so does each of its prefixes."""
    head = data[: data.index(b"\r\n\r\n") + 4]
    for length in {*range(0, len(head), 97), *range(min(len(head), 200)), len(head), len(data)}:
        examine(data[:length])


@pytest.mark.parametrize(("status", "data"), BAD.values(), ids=BAD)
def test_bad_heads_are_refused(status: int, data: bytes) -> None:
    """A bad head is refused with its status and a message."""
    with pytest.raises(HeadRefused) as caught:
        examine(data)
    assert caught.value.status == status
    assert caught.value.message.endswith(".")


def status_of(data: bytes) -> int | None:
    """Returns the status of the refusal; None if there is none."""
    try:
        examine(data)
    except HeadRefused as error:
        return error.status
    return None


@pytest.mark.slow
@pytest.mark.parametrize(("status", "data"), BAD.values(), ids=BAD)
def test_segments_make_no_difference(status: int, data: bytes) -> None:
    """A head that arrives byte by byte is refused for the same reason."""
    found = (status_of(data[:length]) for length in range(len(data) + 1))
    assert next(filter(None, found)) == status


@given(st.binary() | st.lists(st.sampled_from([b"GET / HTTP/1.1", b"\r\n", b"\n", b"Host:", b" ", b"x"])).map(b"".join))
def test_any_bytes_are_judged(data: bytes) -> None:
    """Any bytes either pass or are refused."""
    assert status_of(data) in (None, 400, 414, 431, 501, 505)


_H2 = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"x"), (b":path", b"/")]


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (501, [(b":method", b"CONNECT"), (b":authority", b"x:1")]),
        (501, [(b":method", b"CONNECT"), (b":protocol", b"websocket"), *_H2[1:]]),
        (400, [(b":method", b"G\xc3T"), *_H2[1:]]),
        (400, [*_H2[:3], (b":path", b"/\xff")]),
        (400, [*_H2[:2], (b":authority", b"a@b"), _H2[3]]),
        (431, [*_H2, *[(b"a", b"b")] * MAX_FIELDS]),
        (431, [*_H2, (b"a", b"b" * MAX_LINE_BYTES)]),
    ],
)
def test_h2_heads_are_refused(status: int, headers: list[tuple[bytes, bytes]]) -> None:
    """HTTP/2 heads that h2 accepts are checked by the same rules."""
    with pytest.raises(HeadRefused) as caught:
        examine_h2(headers)
    assert caught.value.status == status


def test_a_good_h2_head_passes() -> None:
    """An ordinary HTTP/2 request passes, with an authority or without."""
    examine_h2(_H2)
    examine_h2([_H2[0], _H2[1], _H2[3], (b"host", b"x")])
