"""Messages in AWS's event-stream framing, written by hand."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import msgspec


def frame(name: str, payload: Any = None, *, kind: str = "event", body: bytes | None = None) -> bytes:
    """Makes a message.

    Args:
        payload: JSON of any shape.
        body: The bytes of the payload, instead.
    """
    named = {f":{kind}-type": name, ":content-type": "application/json", ":message-type": kind}
    return message(b"".join(header(key, value) for key, value in named.items()), body or msgspec.json.encode(payload))


def header(name: str, value: str) -> bytes:
    """Makes a header whose value is a string."""
    return bytes([len(name)]) + name.encode() + b"\x07" + struct.pack(">H", len(value)) + value.encode()


def message(headers: bytes, body: bytes) -> bytes:
    """Makes a message of its headers and its payload."""
    prelude = struct.pack(">II", 16 + len(headers) + len(body), len(headers))
    head = prelude + struct.pack(">I", zlib.crc32(prelude)) + headers + body
    return head + struct.pack(">I", zlib.crc32(head))


def start(role: str = "assistant") -> bytes:
    """Begins an answer."""
    return frame("messageStart", {"role": role, "p": "abcd"})


def delta(index: int, **fields: Any) -> bytes:
    """Adds to a block."""
    return frame("contentBlockDelta", {"contentBlockIndex": index, "delta": fields, "p": "ab"})


def tool(index: int, id_: str, name: str) -> bytes:
    """Begins a tool call."""
    call = {"toolUse": {"toolUseId": id_, "name": name}}
    return frame("contentBlockStart", {"contentBlockIndex": index, "start": call})


def stop(index: int) -> bytes:
    """Ends a block."""
    return frame("contentBlockStop", {"contentBlockIndex": index})


def end(reason: str = "end_turn", **usage: int) -> bytes:
    """Ends an answer."""
    counts = {"inputTokens": 30, "outputTokens": 20, "totalTokens": 50, **usage}
    return frame("messageStop", {"stopReason": reason}) + frame(
        "metadata", {"usage": counts, "metrics": {"latencyMs": 9}}
    )
