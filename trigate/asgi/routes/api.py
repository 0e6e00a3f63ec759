"""``/openapi.json``, ``/docs`` and ``/llms.txt``: the API, for programs, people and language models."""

from __future__ import annotations

from typing import Any, cast

import trio
from quart import Blueprint, Response, current_app

from trigate.asgi.quart_app import ControlPlane

blueprint = Blueprint("api", __name__)

_made: dict[str, tuple[bytes, str]] = {}
"""The bodies that were asked for, and their policies. Nothing of the configuration is in them: they never change."""


def _make(app: ControlPlane, name: str) -> tuple[bytes, str]:
    """Makes a body, and the value of its ``content-security-policy``."""
    import msgspec

    from trigate.asgi import api_page, openapi, operations  # nothing else needs them

    document = openapi.document(operations.operations_of(app))
    match name:
        case "docs":
            return api_page.render(document), api_page.POLICY
        case "llms":
            return api_page.as_markdown(document), "default-src 'none'"
    return msgspec.json.encode(document), "default-src 'none'"


async def _answer(name: str, content_type: str) -> Response:
    if name not in _made:
        app: Any = current_app  # Any: a proxy, which is bound to this task
        found = cast("ControlPlane", app._get_current_object())
        _made[name] = await trio.to_thread.run_sync(_make, found, name)  # it takes a fraction of a second
    body, policy = _made[name]
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return Response(body, content_type=content_type, headers=headers)


@blueprint.get("/openapi.json")
async def description() -> Response:
    """Returns this description, in OpenAPI 3.1. Needs no key."""
    return await _answer("openapi", "application/json")


@blueprint.get("/docs")
async def docs() -> Response:
    """Returns this description as a page to read. It loads nothing, and has no script. Needs no key."""
    return await _answer("docs", "text/html; charset=utf-8")


@blueprint.get("/llms.txt")
async def llms() -> Response:
    """Returns a short list of all routes, as Markdown for language models. Needs no key."""
    return await _answer("llms", "text/plain; charset=utf-8")
