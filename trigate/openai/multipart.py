"""Multipart forms (RFC 7578), read as far as the gateway acts on them: the short fields at their beginning. Pure.

A form with a large file is not kept: it goes upstream as it arrives. `FormHead` is fed its beginning, piece by piece,
and finds the fields that were asked for, if they stand before the end of what it was fed. The bytes stay as they are,
but for the value of a field that is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import attrs

from trigate.errors import BadRequest

_MAX_PART_HEAD_BYTES = 16 * 1024
_MAX_VALUE_BYTES = 16 * 1024
_MAX_PADDING_BYTES = 80
_MAX_PARTS = 1000
_DISPOSITION = re.compile(rb"content-disposition[ \t]*:[ \t]*form-data\b([^\r\n]*)", re.IGNORECASE)
_PARAMETER = re.compile(rb";[ \t]*([^=;\s]+)[ \t]*=[ \t]*(?:\"((?:[^\"\\]|\\.)*)\"|([^;\s]+))")
_BOUNDARY = re.compile(rb";[ \t]*boundary[ \t]*=[ \t]*(?:\"([^\"]+)\"|([^;\s]+))", re.IGNORECASE)


def boundary_of(content_type: bytes) -> bytes:
    """Returns the boundary of a form, from the value of ``content-type``.

    Raises:
        BadRequest: There is none, or it is longer than 70 bytes.

    >>> boundary_of(b'multipart/form-data; charset=utf-8; boundary="a b"')
    b'a b'
    """
    found = _BOUNDARY.search(content_type)
    boundary = (found[1] or found[2]) if found is not None else b""
    if not 1 <= len(boundary) <= 70:  # RFC 2046, 5.1.1
        raise BadRequest("Content-Type multipart/form-data needs a boundary of 1 to 70 characters.")
    return boundary


@attrs.frozen
class Span:
    """Where the value of a field is, in the bytes of the form."""

    start: int
    end: int


class FormHead:
    """The beginning of a form.

    Args:
        boundary: As in its content type.
        wanted: The names of the fields that are looked for.

    Attributes:
        kept: Everything that it was fed.
        fields: The wanted fields that were found, by their names; of a repeated one, the last.
        complete: The end of the form has been found.
        is_in_file: The part that is being read is a file.
    """

    def __init__(self, boundary: bytes, wanted: Iterable[str]) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._wanted = frozenset(name.encode() for name in wanted)
        self._at = 0  # behind what has been read
        self._value: tuple[bytes, int] | None = None  # the part that is being read: its name, its first byte
        self._began = False
        self._parts = 0
        self.kept = bytearray()
        self.fields: dict[str, Span] = {}
        self.complete = False
        self.is_in_file = False

    def feed(self, data: bytes) -> None:
        """Takes the next bytes.

        Raises:
            BadRequest: They are no form.
        """
        self.kept += data
        while not self.complete and self._step():
            pass

    def text(self, name: str) -> str | None:
        """Returns the value of a field that was found; None = it was not.

        Raises:
            BadRequest: It is not UTF-8.
        """
        span = self.fields.get(name)
        if span is None:
            return None
        try:
            return self.kept[span.start : span.end].decode()
        except UnicodeDecodeError:
            raise BadRequest(f"{name} is not UTF-8.", param=name) from None

    def _step(self) -> bool:
        """Reads to the next delimiter, or the head of a part; returns whether it got further."""
        return self._read_head() if self._began and self._value is None else self._read_value()

    def _read_value(self) -> bool:
        """Skips to the next delimiter. What precedes the first one is no part."""
        kept, delimiter = self.kept, self._delimiter
        if not self._began and kept.startswith(delimiter[2:]):  # the first one may be at the very beginning
            found, end = 0, len(delimiter) - 2
        else:
            found = kept.find(delimiter, self._at)
            end = found + len(delimiter)
        if found < 0:
            if not self._began and len(kept) > _MAX_PART_HEAD_BYTES:
                raise BadRequest("The form does not begin with the boundary in its Content-Type.")
            self._at = max(self._at, len(kept) - len(delimiter) + 1)
            return False
        is_last = kept[end : end + 2] == b"--"
        line_end = kept.find(b"\r\n", end, end + _MAX_PADDING_BYTES)
        if not is_last:
            if line_end < 0 and len(kept) < end + _MAX_PADDING_BYTES:
                self._at = found
                return False
            if line_end < 0 or kept[end:line_end].strip(b" \t"):  # a longer line, which belongs to the value
                if not self._began:
                    raise BadRequest("The form does not begin with the boundary in its Content-Type.")
                self._at = end
                return True
        if self._value is not None:
            name, start = self._value
            if name in self._wanted and found - start <= _MAX_VALUE_BYTES:
                self.fields[name.decode()] = Span(min(start, found), found)
            self._value = None
            self.is_in_file = False
        self._began = True
        self.complete = is_last
        self._at = line_end
        return not is_last

    def _read_head(self) -> bool:
        """Reads the head of a part: `_at` is at the line break before it."""
        kept = self.kept
        end = kept.find(b"\r\n\r\n", self._at)
        if end < 0 or end - self._at > _MAX_PART_HEAD_BYTES:
            if len(kept) - self._at > _MAX_PART_HEAD_BYTES:
                raise BadRequest(f"The head of a part of the form has more than {_MAX_PART_HEAD_BYTES} bytes.")
            return False
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise BadRequest(f"The form has more than {_MAX_PARTS} parts.")
        name = _name_of(bytes(kept[self._at : end]))
        self._value = name, end + 4
        self.is_in_file = not name
        self._at = end + 2  # the delimiter of an empty value begins with the line break of the head
        return True


def _name_of(head: bytes) -> bytes:
    """The name of a part, from its head; empty if it is a file.

    >>> _name_of(b'\\r\\nContent-Disposition: form-data; name="model"'), _name_of(
    ...     b'\\r\\nContent-Disposition: form-data; name="file"; filename="a.wav"')
    (b'model', b'')
    """
    found = _DISPOSITION.search(head)
    parameters: Mapping[bytes, bytes] = {}
    if found is not None:
        parameters = {each[1].lower(): each[2] or each[3] or b"" for each in _PARAMETER.finditer(found[1])}
    if b"filename" in parameters or b"filename*" in parameters:
        return b""
    return parameters.get(b"name", b"")
