"""The files of the page. They are read once, when this module is imported."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

import attrs

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The value of ``content-security-policy``: nothing is loaded from elsewhere, no script or style is inline, and no text
becomes HTML."""
PREFIX = "/page/"
"""Begins the paths of all files but ``index.html``, which is at ``/``."""
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@attrs.frozen(kw_only=True)
class Asset:
    """A file of the page.

    Attributes:
        etag: Without quotes.
    """

    body: bytes = attrs.field(repr=False)
    content_type: str
    etag: str


def _read() -> Mapping[str, Asset]:
    found = {}
    for path in sorted((Path(__file__).parent / "static").iterdir()):
        if (content_type := _TYPES.get(path.suffix)) is not None:
            body = path.read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(body).digest()[:12]).decode()
            found[path.name] = Asset(body=body, content_type=content_type, etag=digest)
    return found


ASSETS = _read()
"""By the name of the file."""


def is_open(path: str) -> bool:
    """Whether a path is the page's: its files are the same in every gateway, and need no key.

    >>> is_open("/"), is_open("/page/app.js"), is_open("/pages"), is_open("/status")
    (True, True, False, False)
    """
    return path == "/" or path.startswith(PREFIX)
