"""How many tokens a text may have, where no upstream has counted them. Pure.

Four bytes count as a token, rounded up, which is about right for English prose. Media have a fixed price instead: in
base64, a photo has a hundred times as many bytes as a model reads tokens of it.

The body is not parsed, since an estimate must not hold up the event loop: one of 30 MB takes some tens of milliseconds.

**Source:** for a picture, OpenAI's and Anthropic's documentation of vision give 85 to 1 700 tokens, by its size.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator

MEDIUM_TOKENS = 1000
"""What a picture, a sound or a file counts, whether it is in the message or named by a URL or an id."""

MOST_QUICK_BYTES = 256 * 1024
"""To estimate a larger request takes so long that it is done only where a call needs it."""

_BYTES_PER_TOKEN = 4
_MAX_NAMED = 1000
# Every string of at least twice this size has a whole block in it that begins at a multiple of this size.
_BLOCK_BYTES = 1024
_BASE64 = (string.ascii_letters + string.digits + "+/=_-").encode()
_IN_URL, _IN_FILE_ID = b'_url"', b'"file_id"'
_URL = re.compile(rb'_url"\s*:\s*(?:\{[^{}]{0,200}?"url"\s*:\s*)?"https?:')
_FILE_ID = re.compile(rb'"file_id"\s*:\s*"')


def tokens_of_size(size_bytes: int) -> int:
    """Estimates the tokens of a text of this size.

    >>> tokens_of_size(0), tokens_of_size(4), tokens_of_size(5)
    (0, 1, 2)
    """
    return -(-size_bytes // _BYTES_PER_TOKEN)


def estimated_tokens(body: bytes) -> int:
    """Estimates the tokens of a message or a request body.

    >>> estimated_tokens(b'{"url":"data:image/png;base64,' + b"iVBORw0K" * 1000 + b'"}')
    1003
    """
    text_bytes, media = len(body), 0
    if text_bytes >= _BLOCK_BYTES:
        for literal in _long_strings(body):
            if _is_base64(literal):
                text_bytes -= len(literal)
                media += 1
    if _IN_URL in body:
        media += _count(body, _IN_URL, _URL)
    if _IN_FILE_ID in body:
        media += _count(body, _IN_FILE_ID, _FILE_ID)
    return tokens_of_size(text_bytes) + media * MEDIUM_TOKENS


def _long_strings(body: bytes) -> Iterator[bytes]:
    """The strings of a JSON text that have at least two blocks, and perhaps shorter ones."""
    at = 0
    while at + _BLOCK_BYTES <= len(body):
        if body.find(b'"', at, at + _BLOCK_BYTES) >= 0:
            at += _BLOCK_BYTES
            continue
        end = body.find(b'"', at)
        end = len(body) if end < 0 else end
        yield body[body.rfind(b'"', 0, at) + 1 : end]
        at = end + 1


def _is_base64(literal: bytes) -> bool:
    """Whether a string of JSON is base64, perhaps in a data URL.

    Its beginning decides: that of a text has spaces, escapes, or bytes that are not ASCII.
    """
    return len(literal[:_BLOCK_BYTES].translate(None, _BASE64)) < _BLOCK_BYTES // 20


def _count(body: bytes, mark: bytes, pattern: re.Pattern[bytes]) -> int:
    """How often a pattern that begins with these bytes occurs, at the first places of these bytes."""
    found, at = 0, -1
    for _ in range(_MAX_NAMED):
        at = body.find(mark, at + 1)
        if at < 0:
            break
        found += pattern.match(body, at) is not None
    return found
