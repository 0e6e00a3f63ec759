"""What the log of contents has of one exchange: the request and the texts of the answer, redacted and bounded. Pure.

An answer is kept as it goes to the client. A stream is taken apart when it has ended: the texts of its events are put
together before they are redacted, since a secret may be spread over several events.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

_RAW_PER_TEXT = 16
"""How many bytes of a stream there may be for each byte of its text."""
_MAX_DEPTH = 50
REDACTED = "[redacted]"
_TEXTS = frozenset(
    {
        *("content", "text", "delta", "arguments", "partial_json", "thinking", "reasoning", "reasoning_content"),
        *("refusal", "response", "name"),
    }
)
"""The fields of events whose texts are pieces of an answer, in all formats."""
_REPEATED = ("response.created", "response.in_progress", "response.completed", "response.incomplete")
"""The events that repeat what other ones have, besides those whose type ends in ``.done``."""


class AnswerContent:
    """The answer of an exchange in progress.

    Args:
        entry_bytes: How long the text of an entry may be.

    Attributes:
        size: The bytes that it keeps.
    """

    def __init__(self, entry_bytes: int) -> None:
        self._pieces: list[bytes] = []
        self._left = _RAW_PER_TEXT * entry_bytes
        self.size = 0

    def add(self, data: bytes) -> None:
        """Takes the next piece. What is too long is left out."""
        data = data[: self._left]
        if data:
            self._pieces.append(data)
            self._left -= len(data)
            self.size += len(data)

    def taken(self) -> bytes:
        """Returns all pieces."""
        return b"".join(self._pieces)


def entry_of(
    facts: dict[str, Any], request: bytes, answer: bytes, *, patterns: Sequence[re.Pattern[str]], entry_bytes: int
) -> bytes:
    """Makes a line of the log.

    Args:
        facts: About the exchange.
        request: Its body.
        answer: As `AnswerContent` has kept it.
        patterns: Whatever matches one of them in a text is redacted.
        entry_bytes: How long the request and the answer may be, each; of a longer one, the beginning is kept.

    >>> stream = b'data: {"delta":{"content":"sk-"}}\\n\\ndata: {"delta":{"content":"abc!"}}\\n'
    >>> entry_of({"id": "ex_1"}, b'{"model":"m"}', stream, patterns=[re.compile("sk-[a-z]+")], entry_bytes=99)
    b'{"id":"ex_1","request":{"model":"m"},"answer":{"content":"[redacted]!"}}\\n'
    """

    def redacted(text: str) -> str:
        for pattern in patterns:
            text = pattern.sub(REDACTED, text)
        return text

    def clean(value: Any, depth: int = 0) -> Any:  # Any: JSON
        if isinstance(value, str):
            return redacted(value)
        if depth > _MAX_DEPTH:
            return None
        if isinstance(value, list):
            return [clean(each, depth + 1) for each in value]
        if isinstance(value, dict):
            return {redacted(name): clean(each, depth + 1) for name, each in value.items()}
        return value

    def bounded(value: Any) -> Any:  # Any: JSON
        cleaned = clean(value)
        encoded = msgspec.json.encode(cleaned)
        if len(encoded) <= entry_bytes:
            return cleaned
        return {"beginning": encoded[:entry_bytes].decode(errors="ignore"), "bytes": len(encoded)}

    entry = {**facts, "request": bounded(_value_of(request)), "answer": bounded(_value_of(answer))}
    return msgspec.json.encode(entry) + b"\n"


def _value_of(data: bytes) -> Any:  # Any: JSON
    """The JSON value of a body, or the texts of a stream by the names of their fields; of anything else, its text."""
    try:
        return msgspec.json.decode(data) if data else None
    except (msgspec.DecodeError, RecursionError):
        pass
    texts: dict[str, list[str]] = {}
    for event in _events(data):
        kind = event.get("type") if isinstance(event, dict) else None
        if not (isinstance(kind, str) and (kind.endswith(".done") or kind in _REPEATED)):
            for name, text in _texts(event):
                texts.setdefault(name, []).append(text)
    return {name: "".join(pieces) for name, pieces in texts.items()} or data.decode(errors="replace")


def _events(data: bytes) -> Iterator[Any]:  # Any: JSON
    """The values of a stream, of server-sent events or of lines of JSON."""
    for line in data.splitlines():
        try:
            yield msgspec.json.decode(line.removeprefix(b"data:").strip())
        except (msgspec.DecodeError, RecursionError):
            continue


def _texts(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:  # Any: JSON
    if isinstance(value, str):
        if name in _TEXTS and value:
            yield name, value
    elif depth > _MAX_DEPTH:
        return
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, name, depth + 1)
    elif isinstance(value, dict):
        for inner, each in value.items():
            yield from _texts(each, inner, depth + 1)
