"""Content codings of HTTP bodies (``gzip``, ``deflate``), decoded piece by piece within bounds. Pure.

A few hundred bytes can expand to any size (a *decompression bomb*), so two bounds apply. `Decoder` bounds the ratio,
and stops a bomb early. Its user bounds the size of the decoded body, as that of any body.

``deflate`` is the zlib format (RFC 9110 section 8.4.1.2). Some senders omit its header, which is recognised.
"""

from __future__ import annotations

import zlib

CODINGS = ("gzip", "deflate")
"""The codings that can be decoded, by the names that ``accept-encoding`` has for them."""
MAX_RATIO = 200
"""The most bytes to which one byte may expand. (Text reaches 3 to 20, a bomb 1 000; Apache's limit is 200, too.)"""
FREE_BYTES = 1024 * 1024
"""How many bytes a body may have in any case, whatever it expands from."""
PIECE_BYTES = 256 * 1024
"""The size of a decoded piece, at most."""

_ALIASES = {"x-gzip": "gzip", "": "identity"}
_GZIP_MAGIC = b"\x1f\x8b"


class NotDecodable(ValueError):
    """The body is not of its coding, or it expands too far."""


def coding_of(value: str) -> str:
    """Normalises the value of ``content-encoding``; without one, it is ``identity``.

    >>> coding_of(" X-GZip "), coding_of(""), coding_of("gzip, br")
    ('gzip', 'identity', 'gzip, br')
    """
    value = value.strip().lower()
    return _ALIASES.get(value, value)


class Decoder:
    """Decodes one body.

    >>> decoder = Decoder("deflate")
    >>> decoder.feed(zlib.compress(b"Hello."))
    >>> decoder.next_piece(), decoder.next_piece(), decoder.complete
    (b'Hello.', b'', True)

    Args:
        coding: One of `CODINGS`.

    Attributes:
        complete: The end of the coding has been decoded. Bytes behind it are ignored, unless another gzip member
            begins there.
    """

    def __init__(self, coding: str) -> None:
        assert coding in CODINGS, coding
        self._is_gzip = coding == "gzip"
        self._inflate = zlib.decompressobj(wbits=31) if self._is_gzip else None
        self._data = b""
        self._has_more = False  # the last piece was a full one: zlib may hold more, even if it has consumed all bytes
        self._fed_bytes = 0
        self._decoded_bytes = 0
        self.complete = False

    def feed(self, data: bytes) -> None:
        """Appends received bytes."""
        self._data = self._data + data if self._data else data
        self._fed_bytes += len(data)

    def next_piece(self) -> bytes:
        """Decodes up to `PIECE_BYTES`; ``b""`` = more bytes are needed, or the body is complete.

        Raises:
            NotDecodable: The bytes are not of this coding, or they expand too far.
        """
        while self._data or self._has_more:
            if self.complete:
                if self._is_gzip and self._data == _GZIP_MAGIC[:1]:
                    break
                if not (self._is_gzip and self._data.startswith(_GZIP_MAGIC)):
                    self._data = b""
                    break
                self._inflate, self.complete = zlib.decompressobj(wbits=31), False
            if self._inflate is None:
                if len(self._data) < 2:
                    break
                has_header = self._data[0] & 15 == 8 and int.from_bytes(self._data[:2]) % 31 == 0
                self._inflate = zlib.decompressobj(wbits=15 if has_header else -15)
            try:
                piece = self._inflate.decompress(self._data, PIECE_BYTES)
            except zlib.error as error:
                raise NotDecodable(str(error)) from None
            self.complete = self._inflate.eof
            self._data = self._inflate.unused_data if self.complete else self._inflate.unconsumed_tail
            self._has_more = len(piece) == PIECE_BYTES and not self.complete
            self._decoded_bytes += len(piece)
            if self._decoded_bytes > FREE_BYTES + MAX_RATIO * self._fed_bytes:
                raise NotDecodable(f"it expands to more than {MAX_RATIO} times its size")
            if piece:
                return piece
        return b""
