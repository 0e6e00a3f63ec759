"""The paths of Gemini's format, which have the model in them.

``/v1beta/models/{model}:{method}``, with any version, and as Vertex AI has them (``…/publishers/google/models/…``). The
model may have slashes.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qs

_VERSION = r"/(?:v1(?:(?:alpha|beta)\d*)?)"
_PATH = re.compile(
    _VERSION + r"/(?:projects/[^/]+/locations/[^/]+/)?(?:publishers/[^/]+/)?(models|tunedModels)/(.+):([A-Za-z]+)",
    re.DOTALL,
)
_OWN_VERSION = re.compile(r"/v1(?:alpha|beta)\d*(?:/|\Z)")


def model_and_method(path: str) -> tuple[str, str] | None:
    """Returns the model and the method that a path names; None = it is none of these paths.

    Args:
        path: Decoded from its percent encoding.

    >>> model_and_method("/v1beta/models/up/m:8b:generateContent"), model_and_method("/v1beta/models/m")
    (('up/m:8b', 'generateContent'), None)
    """
    found = _PATH.fullmatch(path)
    if found is None:
        return None
    return f"tunedModels/{found[2]}" if found[1] == "tunedModels" else found[2], found[3]


def asks_for_events(query: bytes) -> bool:
    """Whether a query asks for server-sent events.

    >>> asks_for_events(b"alt=sse"), asks_for_events(b"key=k"), asks_for_events(b"$alt=sse;x")
    (True, False, False)
    """
    values = parse_qs(query.decode("latin-1"))
    return "sse" in values.get("alt", []) + values.get("$alt", [])


def is_own(path: str) -> bool:
    """Whether a path belongs to Gemini's format alone.

    >>> is_own("/v1beta/models"), is_own("/v1/models/m:generateContent"), is_own("/v1/models/m:8b")
    (True, True, False)
    """
    if _OWN_VERSION.match(path):
        return True
    found = model_and_method(path)
    return found is not None and found[1] in METHODS


METHODS = ("generateContent", "streamGenerateContent", "countTokens", "embedContent", "batchEmbedContents")
