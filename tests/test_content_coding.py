"""`trigate.content_coding`: whatever is compressed comes out again, in bounded pieces, and a bomb does not."""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trigate.content_coding import CODINGS, FREE_BYTES, MAX_RATIO, PIECE_BYTES, Decoder, NotDecodable


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "deflate without its header": raw_deflate,
}


def decode(coding: str, packed: bytes, *, step: int = 2**30) -> tuple[bytes, bool]:
    """Decodes in steps of so many bytes; returns the body, and whether its end has come."""
    decoder = Decoder(coding)
    pieces = []
    for start in range(0, len(packed), step):
        decoder.feed(packed[start : start + step])
        while piece := decoder.next_piece():
            assert len(piece) <= PIECE_BYTES
            pieces.append(piece)
    return b"".join(pieces), decoder.complete


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("step", [1, 2, 7, 2**30])
def test_what_was_compressed_comes_out(name: str, step: int) -> None:
    """However the bytes are split; an end that is missing is noticed."""
    data = b"Hello, hello. " * 40
    packed = PACKERS[name](data)
    coding = name.partition(" ")[0]
    assert decode(coding, packed, step=step) == (data, True)
    assert decode(coding, packed[:-1], step=step)[1] is False


@given(st.binary(max_size=3000), st.integers(1, 300), st.integers(0, 9))
def test_gzip_of_any_bytes(data: bytes, step: int, level: int) -> None:
    """Empty bodies and all levels included."""
    assert decode("gzip", gzip.compress(data, level), step=step) == (data, True)


def test_large_bodies_come_in_pieces() -> None:
    """No byte is lost where zlib has consumed its input and still holds output."""
    data = random.Random(1).randbytes(1000) * 2000
    assert decode("gzip", gzip.compress(data)) == (data, True)
    assert decode("deflate", zlib.compress(b"a" * (3 * PIECE_BYTES))) == (b"a" * (3 * PIECE_BYTES), True)


def test_gzip_may_have_several_members() -> None:
    """RFC 1952, section 2.2. Other bytes behind the end are ignored."""
    packed = gzip.compress(b"one, ") + gzip.compress(b"two")
    assert decode("gzip", packed, step=1) == (b"one, two", True)
    assert decode("gzip", packed[:-3])[1] is False
    assert decode("gzip", gzip.compress(b"one") + b"\0\0junk") == (b"one", True)
    assert decode("deflate", zlib.compress(b"one") + zlib.compress(b"two")) == (b"one", True)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_is_stopped_early(coding: str) -> None:
    """What a few bytes expand to is bounded, and never made: only the bound and one piece."""
    packed = PACKERS[coding](bytes(4 * 1024 * 1024))
    decoder = Decoder(coding)
    decoder.feed(packed[:2000])
    decoded = 0

    def decode_all() -> None:
        nonlocal decoded
        while piece := decoder.next_piece():
            decoded += len(piece)

    with pytest.raises(NotDecodable, match="200 times"):
        decode_all()
    assert decoded <= FREE_BYTES + MAX_RATIO * 2000


@pytest.mark.parametrize("coding", CODINGS)
def test_other_bytes_are_refused(coding: str) -> None:
    """JSON under the wrong name, and a body that is corrupt in its middle."""
    for packed in (b'{"model": "a"}', b"\x1f\x8b\x08\x00" + bytes(20), b"\xff" * 20):
        with pytest.raises(NotDecodable):
            decode(coding, packed)
