"""Bounds what is in a large request body, before it is parsed. Pure.

A parser in C reads a body in one step, in which the process serves nobody else: a body of 28 MB with a million messages
would take half a second, and one with two million fields four seconds. So what a body may consist of is bounded, and
the bounds are checked on slices of it, between which other threads run. The caller runs `examine` in a thread; small
bodies need no examination (`is_small`).

Strings are cut out of the slices; of what remains, only brackets, commas and colons matter. JSON that is not valid is
no concern here: the parser refuses it.
"""

from __future__ import annotations

import codecs
import re

from trigate.errors import BadRequest
from trigate.openai.raw_json import not_utf8

MAX_ELEMENTS = 500_000
"""All elements of arrays and fields of objects together. (The largest inputs in use are arrays of 300 000 tokens.)"""
MAX_FIELDS = 10_000
"""The fields of the body itself."""
MAX_MESSAGES = 20_000
"""The elements of an array of a chat request: its messages, its tools."""
MAX_ESCAPES = 4_000_000
"""Backslashes in strings."""
MAX_DEPTH = 512

_SMALL_BYTES = 64 * 1024
_INLINE_BYTES = 1024 * 1024
_FEW_COMMAS = 10_000
_SLICE_BYTES = 64 * 1024
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.S)
_WHOLE_STRINGS = re.compile(rb'(?:[^"]++|"(?:[^"\\]++|\\.)*+")*+', re.S)
_REST_OF_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.S)
_NO_STRUCTURE = bytes(set(range(256)) - set(b"[]{},:"))
_INNERMOST = re.compile(rb"[\[{][,:]*+[\]}]")
_COLLAPSED_LEVELS = 8
_COMMA, _COLON = b",:"
_OPENING = frozenset(b"[{")
_TOKENS = re.compile(rb"[\[{]|[\]}]|[,:]+")


def is_small(body: bytes) -> bool:
    """Whether a body needs no examination. A few large strings (a picture) make no body large in this sense."""
    size = len(body)
    return size <= _SMALL_BYTES or (size <= _INLINE_BYTES and body.count(b",") <= _FEW_COMMAS)


def examine(body: bytes, *, has_messages: bool) -> None:
    """Checks the bounds of a request body, and that it is UTF-8. It takes up to half a second, in short steps.

    Args:
        has_messages: It is a chat request, whose arrays are checked one by one.

    Raises:
        BadRequest: It is not UTF-8, or exceeds a bound.
    """
    commas = escapes = 0
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(body), _SLICE_BYTES):
        piece = body[start : start + _SLICE_BYTES]
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(piece, final=start + _SLICE_BYTES >= len(body))
        except UnicodeDecodeError as error:
            raise not_utf8(body, error.reason, start - pending + error.start) from None
        commas += piece.count(b",")
        escapes += piece.count(b"\\")
        if escapes > MAX_ESCAPES:
            raise BadRequest(f"The body has more than {MAX_ESCAPES} escapes in its strings.")
    # Brackets without a comma cost the parser little, except in depth, which it bounds itself.
    if commas > _FEW_COMMAS:
        _examine_structure(body, has_messages=has_messages)


def _examine_structure(body: bytes, *, has_messages: bool) -> None:
    depth = elements = fields = messages = most = 0
    position, end = 0, len(body)
    while position < end:
        structure, position = _next_structure(body, position)
        elements += structure.count(b",") + structure.count(b"[") + structure.count(b"{")
        if elements > MAX_ELEMENTS:
            raise BadRequest(f"The body has more than {MAX_ELEMENTS} elements and fields.")
        # What lies within one slice is small, and goes. What is left is little, except in hostile bodies.
        for _ in range(_COLLAPSED_LEVELS):
            structure, count = _INNERMOST.subn(b"", structure)
            if not count:
                break
        for token in _TOKENS.findall(structure):
            first = token[0]
            if first in (_COMMA, _COLON):
                if depth == 1:
                    fields += token.count(b":")
                elif depth == 2 and has_messages:
                    messages += token.count(b",")
            elif first in _OPENING:
                depth += 1
                if depth == 2:
                    most, messages = max(most, messages), 0
                if depth > MAX_DEPTH:
                    raise BadRequest("The body is nested too deeply.")
            else:
                depth -= 1
        if fields > MAX_FIELDS:
            raise BadRequest(f"The body has more than {MAX_FIELDS} fields.")
        if max(most, messages) > MAX_MESSAGES:
            raise BadRequest(f"An array of the body has more than {MAX_MESSAGES} elements.")


def _next_structure(body: bytes, position: int) -> tuple[bytes, int]:
    """Returns the brackets, commas and colons outside of strings in the slice that begins there, outside of a string;
    and where the next one begins."""
    piece = body[position : position + _SLICE_BYTES]
    whole = _WHOLE_STRINGS.match(piece)
    assert whole is not None
    structure = _STRING.sub(b"", piece[: whole.end()])
    position += whole.end()
    if whole.end() < len(piece):  # a string that goes on behind the slice
        position = _end_of_string(body, position + 1)
    return structure.translate(None, _NO_STRUCTURE), position


def _end_of_string(body: bytes, position: int) -> int:
    """Returns the position behind the quote that ends the string in which ``position`` is."""
    end = len(body)
    while position < end:
        stop = min(position + _SLICE_BYTES, end)
        found = _REST_OF_STRING.match(body, position, stop)
        assert found is not None
        reached = found.end()
        if reached < stop and body[reached] == 0x22:
            return reached + 1
        if reached == position:  # a backslash that is the last byte of the slice, or of the body
            reached += 2
        position = reached
    return end
