"""Responses from bytes: every kind of body and every bound, whole and split anywhere."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from itertools import pairwise

import httpx2
import pytest

from trigate.upstream import response_parser
from trigate.upstream.response_parser import MAX_HEAD_BYTES, MAX_INTERIM, Framing, NotHttp

OK = b"HTTP/1.1 200 OK\r\n"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nlink: x\r\n\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


def _taken(framed: Framing) -> bytes:
    body = b"".join(framed.pieces)
    framed.pieces.clear()
    return body


def _feed(framed: Framing, pieces: Iterable[bytes]) -> None:
    for piece in pieces:
        framed.feed(piece)


def _cut(data: bytes, *at: int) -> list[bytes]:
    edges = [0, *at, len(data)]
    return [data[low:high] for low, high in pairwise(edges) if low < high]


def _ways(data: bytes) -> list[list[bytes]]:
    """The data whole, byte by byte, and split in two at every byte."""
    return [[data], [data[at : at + 1] for at in range(len(data))], *(_cut(data, at) for at in range(1, len(data)))]


@pytest.mark.parametrize(
    ("method", "data", "body", "keep_alive"),
    [
        ("POST", OK + b"Content-Length: 5\r\n\r\nhello", b"hello", True),
        ("POST", OK + b"content-length: 0\r\n\r\n", b"", True),
        ("POST", CHUNKED + b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n", b"hello world", True),
        ("POST", CHUNKED + b"A\r\n0123456789\r\n0\r\nx-sum: 1\r\nother: 2\r\n\r\n", b"0123456789", True),
        ("POST", OK + b"Connection: close\r\ncontent-length: 2\r\n\r\nok", b"ok", False),
        ("POST", b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", b"ok", False),
        ("POST", b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok", b"ok", True),
        ("POST", b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
        ("GET", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", b"", True),
        ("HEAD", OK + b"content-length: 5\r\n\r\n", b"", True),
        ("HEAD", CHUNKED, b"", True),
        ("POST", INTERIM + OK + b"content-length: 2\r\n\r\nok", b"ok", True),
        ("POST", b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nok", b"ok", True),
        ("POST", OK + b"upgrade: h2\r\nconnection: upgrade\r\ncontent-length: 2\r\n\r\nok", b"ok", True),
    ],
)  # fmt: skip
def test_a_message_however_it_is_cut(method: str, data: bytes, body: bytes, keep_alive: bool) -> None:
    """Whole, byte by byte, and split in two at each byte, a message has the same head, body and end."""
    seen = set()
    for pieces in _ways(data):
        framed = Framing(method)
        for number, piece in enumerate(pieces):
            assert not framed.complete, (number, piece)
            framed.feed(piece)
        assert framed.complete
        assert framed.keep_alive is keep_alive
        assert _taken(framed) == body
        seen.add((framed.status, tuple(framed.headers)))
    [(status, headers)] = seen
    assert status == int(data.rpartition(b"HTTP/1.")[2][2:5])
    assert all(name == name.lower() for name, _ in headers)
    assert not {b"x-sum", b"other", b"link"} & {name for name, _ in headers}, "trailers and interim heads are dropped"


@pytest.mark.parametrize(
    "data",
    [
        OK + b"content-length: 2\r\n\r\nok",
        CHUNKED + b"2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        OK + b"connection: close\r\ncontent-length: 2\r\n\r\nok",
    ],
)
@pytest.mark.parametrize("extra", [b"x", b"H", OK + b"content-length: 6\r\n\r\nstolen"])
def test_what_follows_the_end(data: bytes, extra: bytes) -> None:
    """Bytes behind the end of a message are not part of it, and its connection is not reused."""
    for pieces in ([data + extra], [data, extra]):
        framed = Framing()
        _feed(framed, pieces)
        assert framed.complete
        assert not framed.keep_alive
        assert (framed.status, _taken(framed)) in ((200, b"ok"), (204, b""))


@pytest.mark.parametrize("head", [OK + b"content-length: 5\r\n\r\n", CHUNKED])
def test_a_body_for_head(head: bytes) -> None:
    """A body in answer to HEAD is dropped, and its connection is not reused."""
    body = b"5\r\nhello\r\n" if head is CHUNKED else b"hello"
    for pieces in ([head + body], [head, body]):
        framed = Framing("HEAD")
        _feed(framed, pieces)
        assert (framed.complete, framed.keep_alive, framed.pieces) == (True, False, [])


def test_a_body_that_ends_with_its_connection() -> None:
    """Without a length, the end of the connection is the end of the body."""
    framed = Framing()
    framed.feed(OK + b"content-type: text/plain\r\n\r\nab")
    framed.feed(b"c")
    states = [framed.complete]
    framed.feed_eof()
    states.append(framed.complete)
    assert states == [False, True]
    assert not framed.keep_alive
    assert framed.pieces == [b"ab", b"c"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "disconnected without sending a response"),
        (b"HTTP/1.1 200 OK\r\nserver", "disconnected without sending a response"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "disconnected without sending a response"),
        (OK + b"content-length: 5\r\n\r\nhell", "without sending complete message body.*content-length"),
        (CHUNKED + b"5\r\nhello\r\n", "without sending complete message body.*chunked"),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", "without sending complete message body.*chunked"),
    ],
)
def test_an_end_too_early(data: bytes, message: str) -> None:
    """An end of the connection before the end of the message is an error, whatever has been received."""
    framed = Framing()
    if data:
        framed.feed(data)
    with pytest.raises(httpx2.RemoteProtocolError, match=message) as caught:
        framed.feed_eof()
    assert type(caught.value) is httpx2.RemoteProtocolError, "a truncated response is not invalid HTTP"
    assert not framed.complete
    assert not framed.keep_alive
    assert framed.received_any == bool(data)


def test_an_end_after_the_end() -> None:
    """The peer may close the connection after the message."""
    framed = Framing()
    framed.feed(OK + b"content-length: 2\r\n\r\nok")
    framed.feed_eof()
    assert framed.complete
    assert not framed.keep_alive


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-OpenSSH_9\r\n", "Expected HTTP/"),
        (b"<html>", "Expected HTTP/"),
        (b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n", "HTTP/2.0"),
        (b"HTTP/0.9 200 OK\r\ncontent-length: 0\r\n\r\n", "HTTP/0.9"),
        (b"HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n", "status 999"),
        (b"HTTP/1.1 600 Odd\r\ncontent-length: 0\r\n\r\n", "status 600"),
        (b"HTTP/1.1 099 Odd\r\ncontent-length: 0\r\n\r\n", "status 99"),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", "status 101"),
        (b"HTTP/1.1 101 Switching\r\n\r\n", "status 101"),
        (OK + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", "Content-Length"),
        (OK + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n", "Content-Length"),
        (OK + b"content-length: 5\r\ncontent-length: 5\r\n\r\n", "Content-Length"),
        (OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", "Content-Length"),
        (OK + b"content-length: 5, 5\r\n\r\n", "Content-Length"),
        (OK + b"content-length: -5\r\n\r\n", "Content-Length"),
        (OK + b"transfer-encoding: gzip, chunked\r\n\r\n", "transfer coding"),
        (OK + b"transfer-encoding: gzip\r\n\r\n", "transfer coding"),
        (OK + b"transfer-encoding: identity\r\n\r\n", "transfer coding"),
        (OK + b"transfer-encoding : chunked\r\n\r\n", "header field"),
        (OK + b"a: b\r\n c\r\n\r\n", "whitespace"),
        (OK + b"a: b\x00c\r\n\r\n", "."),
        (b"HTTP/1.1 200 OK\ncontent-length: 0\n\n", "CR"),
        (CHUNKED + b"x\r\n", "chunk size"),
        (CHUNKED + b"2\nok\n0\n\n", "CR"),
        (CHUNKED + b"2\r\nokay\r\n", "."),
        (CHUNKED + b"ffffffffffffffffff\r\n", "."),
    ],
)
def test_what_is_refused(data: bytes, message: str) -> None:
    """Bytes that are not HTTP, contradict themselves or were not asked for are refused, whole and byte by byte."""
    for pieces in ([data], [data[at : at + 1] for at in range(len(data))]):
        framed = Framing()
        with pytest.raises(NotHttp, match=message):
            _feed(framed, pieces)
        assert not framed.complete


def test_interim_responses_are_counted() -> None:
    """The allowed number of interim responses passes, and one more does not."""
    interim = b"HTTP/1.1 102 Processing\r\n\r\n"
    framed = Framing()
    framed.feed(interim * MAX_INTERIM + OK + b"content-length: 0\r\n\r\n")
    assert framed.complete
    framed = Framing()
    with pytest.raises(NotHttp, match="interim"):
        framed.feed(interim * (MAX_INTERIM + 1))


def _in(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("segment_bytes", [1000, MAX_HEAD_BYTES - 1, MAX_HEAD_BYTES, MAX_HEAD_BYTES + 7, 10**6])
@pytest.mark.parametrize("field", [b"a: b\r\n", b"x: " + b"y" * 90_000 + b"\r\n"], ids=["many fields", "one field"])
def test_the_head_is_bounded(segment_bytes: int, field: bytes) -> None:
    """The bound counts the bytes of the head, however they are split; a body in the same segment does not count."""
    tail = b"content-length: 100000\r\n\r\n"
    room = MAX_HEAD_BYTES - len(OK) - len(tail)
    fitting = b"x: " + b"y" * (room - len(b"x: \r\n") - 1) + b"\r\n"
    framed = Framing()
    _feed(framed, _in(OK + fitting + tail + bytes(100_000), segment_bytes))
    assert framed.complete
    assert len(_taken(framed)) == 100_000
    framed = Framing()
    with pytest.raises(NotHttp, match="response head"):
        _feed(framed, _in(OK + field * (1 + 90_000 // len(field)) + tail, segment_bytes))
    assert not framed.begun


@pytest.mark.parametrize(
    "endless", [b"5;" + b"x" * 100_000, b"0\r\n" + b"a: b\r\n" * 20_000, b"0\r\na: " + b"b" * 100_000]
)
def test_what_is_no_body_is_bounded(endless: bytes) -> None:
    """Endless chunk extensions and trailers are refused."""
    framed = Framing()
    framed.feed(CHUNKED)
    with pytest.raises(NotHttp, match="between two pieces"):
        _feed(framed, _in(endless, 1000))


def test_a_long_stream_in_small_segments_is_no_flood() -> None:
    """Framing that arrives without a body counts only up to the next piece of the body."""
    framed = Framing()
    framed.feed(CHUNKED)
    for _ in range(MAX_HEAD_BYTES // 2):
        framed.feed(b"1\r\n")
        framed.feed(b"x\r\n")
        assert _taken(framed) == b"x"
    framed.feed(b"0\r\n\r\n")
    assert framed.complete


@pytest.mark.slow
def test_a_closed_one_is_no_garbage() -> None:
    """`close` breaks the reference cycle with the parser, and what was parsed stays."""
    gc.collect()
    gc.disable()
    try:
        framed = Framing()
        framed.feed(OK + b"content-length: 2\r\n\r\nok")
        framed.close()
        assert framed.pieces == [b"ok"]
        with pytest.raises(httpx2.ReadError, match="closed"):
            framed.feed(b"x")
        del framed
        assert not any(isinstance(each, response_parser.Framing) for each in gc.get_objects())
    finally:
        gc.enable()


def test_pieces_stay_one_list() -> None:
    """``pieces`` stays the same list."""
    framed = Framing()
    pieces = framed.pieces
    framed.feed(CHUNKED + b"1\r\na\r\n")
    pieces.clear()
    framed.feed(b"1\r\nb\r\n")
    assert pieces == [b"b"]
    assert framed.pieces is pieces
