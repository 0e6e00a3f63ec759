"""Renders the gateway's errors in Ollama's format: one sentence.

What an upstream of the same format says goes to the client word for word.
"""

from __future__ import annotations

import msgspec

from trigate.dialects.ollama.lines import in_one_line
from trigate.errors import GatewayError, Header, Rejected
from trigate.openai.raw_json import decode_any


def error_response(error: GatewayError) -> tuple[int, list[Header], bytes]:
    """Renders an error as status, headers and JSON body (before COMMIT)."""
    headers: list[Header] = [(b"content-type", b"application/json"), *error.headers]
    if isinstance(error, Rejected) and error.body is not None and _is_own(error.body):
        return error.status, headers, error.body
    return error.status, headers, msgspec.json.encode({"error": error.message})


def error_line(error: GatewayError) -> bytes:
    """Renders an error as the last line of a stream (after COMMIT)."""
    return in_one_line({"error": error.message}) + b"\n"


def _is_own(body: bytes) -> bool:
    value = decode_any(body)
    return isinstance(value, dict) and isinstance(value.get("error"), str)
