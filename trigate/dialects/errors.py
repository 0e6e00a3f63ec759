"""Renders the gateway's errors in the format of the client."""

from __future__ import annotations

from trigate.dialects import anthropic
from trigate.errors import GatewayError, Header
from trigate.openai.endpoints import Format


def error_response(error: GatewayError, form: Format, request_id: str) -> tuple[int, list[Header], bytes]:
    """Renders an error as status, headers and JSON body (before COMMIT)."""
    return anthropic.error_response(error, request_id) if form == "anthropic" else error.to_response()


def error_frame(error: GatewayError, form: Format, request_id: str) -> bytes:
    """Renders an error as one server-sent event (after COMMIT)."""
    return anthropic.error_frame(error, request_id) if form == "anthropic" else error.to_frame()
