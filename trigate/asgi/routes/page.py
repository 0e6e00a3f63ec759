"""``GET /`` and ``/page/…``: the page, for browsers."""

from __future__ import annotations

from quart import Blueprint, Response, request

from trigate.errors import NotFound
from trigate.page.assets import ASSETS, POLICY

blueprint = Blueprint("page", __name__)


def _answer(name: str) -> Response:
    asset = ASSETS.get(name)
    if asset is None:
        raise NotFound(f"The page has no file {name[:100]!r}.")
    headers = {
        "cache-control": "no-cache",  # it is asked for again, and answered with 304 while it is the same
        "content-security-policy": POLICY,
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "vary": "accept",
        "x-content-type-options": "nosniff",
    }
    is_known = request.if_none_match.contains_weak(asset.etag)
    response = Response(b"" if is_known else asset.body, status=304 if is_known else 200, headers=headers)
    response.content_type = asset.content_type
    response.set_etag(asset.etag)
    return response


@blueprint.get("/")
async def index() -> Response:
    """Returns the page, to a browser; any other client gets a line of text. Needs no key."""
    return _answer("index.html")


@blueprint.get("/page/<file>")
async def asset(file: str) -> Response:
    """Returns a script or style of the page. Needs no key.

    Raises:
        NotFound: The page has no such file.
    """
    return _answer(file)
