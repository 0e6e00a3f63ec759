"""Gemini's ``generateContent``, as a client's format and as an upstream's: requests, answers, events and errors.

Source: Gemini API reference ("generateContent", "streamGenerateContent", "Models"), and what Google's SDKs read of a
stream (python-genai ``_api_client.py``, js-genai ``_api_client.ts``): nothing but ``data:`` lines with JSON, and an
error as JSON without ``data:``. A comment makes both of them fail.
"""

from __future__ import annotations

from trigate.dialects.gemini.client import GeminiClient
from trigate.dialects.gemini.errors import error_frame, error_response
from trigate.dialects.gemini.models import encode_model, encode_model_list
from trigate.dialects.gemini.paths import METHODS, asks_for_events, is_own, model_and_method
from trigate.dialects.gemini.relay import GeminiRelay
from trigate.dialects.gemini.upstream import GeminiUpstream

__all__ = [
    "METHODS",
    "GeminiClient",
    "GeminiRelay",
    "GeminiUpstream",
    "asks_for_events",
    "encode_model",
    "encode_model_list",
    "error_frame",
    "error_response",
    "is_own",
    "model_and_method",
]
