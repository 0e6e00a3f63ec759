"""Paths that people type: which path is meant by another one. Pure.

A base URL with a slash too many, with ``/v1`` twice or without it leads to paths that are not those of the API. Where
only one path of the API can be meant, `canonical` returns it, and the request is served. In all other cases `hint` says
what was probably meant, for the message of a 404.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Container, Iterable

from trigate.dialects import gemini
from trigate.dialects.endpoints import ENDPOINTS
from trigate.openai.endpoints import Format
from trigate.openai.passed_paths import is_administration

_MODELS = re.compile(r"/*(?:v1/+)*models(?:/+(.+))?", re.DOTALL)
_AZURE = re.compile(r"/*openai/+(?:v1/+)*(?!/|deployments/)")
"""Azure has OpenAI's API below it."""
_SIMILARITY = 0.85

OLLAMA_PATHS = ("/api/version", "/api/tags", "/api/show", "/api/ps")
"""The paths of Ollama's format that are no calls, and are served."""


def canonical(path: str) -> str:
    """Returns the path of the data plane or of the models that a path stands for, or else the path with one slash at
    its beginning.

    >>> canonical("//v1/chat/completions/"), canonical("/v1/v1//models"), canonical("/models/a//b"), canonical("//x/")
    ('/v1/chat/completions', '/v1/models', '/v1/models/a//b', '/x/')
    >>> canonical("/openai/v1/responses"), canonical("/openai/models"), canonical("/openai/v1/files/f")
    ('/v1/responses', '/v1/models', '/v1/files/f')
    """
    if (azure := _AZURE.match(path)) is not None:
        return canonical(f"/v1/{path[azure.end() :]}")
    tail = "/" + "/".join(_segments(path))
    if f"/v1{tail}" in ENDPOINTS:
        return f"/v1{tail}"
    if tail.startswith("/api/") and tail in (*ENDPOINTS, *OLLAMA_PATHS):
        return tail
    models = _MODELS.fullmatch(path.rstrip("/"))
    if models is not None:  # an id may contain two slashes, one after the other
        return f"/v1/models/{models[1]}" if models[1] else "/v1/models"
    return "/" + path.lstrip("/")


def format_of(path: str, headers: Container[bytes]) -> Format:
    """Returns the format in which a request expects its errors.

    Args:
        headers: The names of its headers, in lower case.

    >>> format_of("/v1/messages", ()), format_of("/v1/models", (b"anthropic-version",)), format_of("/v1/models", ())
    ('anthropic', 'anthropic', 'openai')
    >>> format_of("/v1beta/models/m:generateContent", ()), format_of("/v1/models", (b"x-goog-api-key",))
    ('gemini', 'gemini')
    """
    if gemini.is_own(path) or (b"x-goog-api-key" in headers and f"{path}/".startswith("/v1/models/")):
        return "gemini"
    if path.startswith("/api/") and not path.startswith("/api/v1/"):
        return "ollama"
    is_own = f"{path}/".startswith("/v1/messages/") or b"anthropic-version" in headers
    return "anthropic" if is_own else "openai"


def hint(path: str, known: Iterable[str]) -> str:
    """Returns a sentence about the path that was meant, with a space before it; empty if there is nothing to say.

    Args:
        path: The path of the request, where nothing is.
        known: The paths that exist.

    >>> known = ("/v1/chat/completions", "/v1/models", "/status")
    >>> hint("/api/v1/chat/completions", known), hint("/v1/Models", known), hint("/status/", known)
    (' Did you mean /v1/chat/completions?', ' Did you mean /v1/models?', ' Did you mean /status?')
    >>> hint("/v1/organization/users", known)
    " This part of OpenAI's API belongs to an account at a provider: call the provider itself."
    >>> hint("/v1/chat/completion", known), hint("/v1/x", known), hint("/x", known)
    (' Did you mean /v1/chat/completions?', '', ' The paths of the API begin with /v1.')
    """
    if is_administration(path):
        return " This part of OpenAI's API belongs to an account at a provider: call the provider itself."
    asked = "/" + "/".join(_segments(path.lower()))
    tails = {"/" + "/".join(_segments(each)): each for each in known}
    found = [tail for tail in tails if tail != "/" and asked.endswith(tail)]
    found = [max(found, key=len)] if found else difflib.get_close_matches(asked[:200], tails, n=1, cutoff=_SIMILARITY)
    if found:
        return f" Did you mean {tails[found[0]]}?"
    return "" if path.startswith("/v1/") else " The paths of the API begin with /v1."


def _segments(path: str) -> list[str]:
    """The parts of a path behind the ``v1`` at its beginning, if there is one, or several."""
    return list(itertools.dropwhile(lambda segment: segment == "v1", filter(None, path.split("/"))))
