"""Where Gemini's models are: at Google's API for developers, and at Vertex AI. Pure.

**Source:** Gemini API reference ("All methods"); "Generate content with the Gemini API in Vertex AI" of Google Cloud;
for the hosts of locations: python-genai ``_base_url.py`` and ``_api_client.py``.
"""

from __future__ import annotations

import re

from trigate.config.sections import UpstreamConfig

DEVELOPERS = "https://generativelanguage.googleapis.com"
_LARGE = ("us", "eu")
"""Locations of several regions."""
_VERSION = re.compile(r"/v\d+[a-z0-9]*(?:/|\Z)")


def url_of(config: UpstreamConfig) -> str:
    """Returns what precedes ``/models/{model}:{method}``. A base URL without a version gets one.

    >>> url_of(UpstreamConfig(kind="gemini"))
    'https://generativelanguage.googleapis.com/v1beta'
    >>> url_of(UpstreamConfig(kind="vertex", project="p", location="europe-west4"))
    'https://europe-west4-aiplatform.googleapis.com/v1/projects/p/locations/europe-west4/publishers/google'
    """
    if config.kind == "gemini":
        return _with_version(config.base_url or DEVELOPERS, "v1beta")
    base = _with_version(config.base_url or f"https://{_host(config.location)}", "v1")
    if config.project is None:  # a key tells the project
        return f"{base}/publishers/google"
    return f"{base}/projects/{config.project}/locations/{config.location}/publishers/google"


def _host(location: str) -> str:
    """
    >>> _host("global"), _host("eu"), _host("us-central1")
    ('aiplatform.googleapis.com', 'aiplatform.eu.rep.googleapis.com', 'us-central1-aiplatform.googleapis.com')
    """
    if location == "global":
        return "aiplatform.googleapis.com"
    return (
        f"aiplatform.{location}.rep.googleapis.com" if location in _LARGE else f"{location}-aiplatform.googleapis.com"
    )


def _with_version(base_url: str, version: str) -> str:
    return base_url if _VERSION.search(base_url.partition("://")[2]) else f"{base_url}/{version}"
