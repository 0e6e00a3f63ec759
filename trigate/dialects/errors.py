"""Renders the gateway's errors in the format of the client."""

from __future__ import annotations

from trigate.dialects import anthropic, gemini, ollama, openai_chat
from trigate.errors import GatewayError, Header
from trigate.openai.endpoints import Format


def error_response(error: GatewayError, form: Format, request_id: str) -> tuple[int, list[Header], bytes]:
    """Renders an error as status, headers and JSON body (before COMMIT)."""
    match form:
        case "anthropic":
            return anthropic.error_response(error, request_id)
        case "gemini":
            return gemini.error_response(error)
        case "ollama":
            return ollama.error_response(error)
        case _:
            return openai_chat.error_response(error)


def error_frame(error: GatewayError, form: Format, request_id: str) -> bytes:
    """Renders an error as the last event or line of a stream (after COMMIT)."""
    match form:
        case "anthropic":
            return anthropic.error_frame(error, request_id)
        case "gemini":
            return gemini.error_frame(error)
        case "ollama":
            return ollama.error_line(error)
        case _:
            return openai_chat.error_frame(error)
