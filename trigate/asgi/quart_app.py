"""The class of the control plane's Quart application; `control_plane` makes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from quart import current_app, request
from quart.wrappers import base
from quart_trio import QuartTrio

from trigate.gateway.gateway import Gateway
from trigate.keys.key import Key

_LEFT: type[Exception] = getattr(base, "ClientDisconnectedError", ConnectionError)
"""Quart raises it when it would answer a client that has left; older versions send to nobody."""


class ControlPlane(QuartTrio):
    """The Quart application of the control plane.

    Attributes:
        gateway: The open gateway.
        parameters: The query parameters that each view knows.
    """

    gateway: Gateway
    parameters: Mapping[str, tuple[str, ...]]

    async def asgi_app(self, scope: Any, receive: Any, send: Any) -> None:  # Any: ASGI as Quart types it
        """Serves one request; that of a client that has left before its answer is no failure."""
        try:
            await super().asgi_app(scope, receive, send)
        except* _LEFT:
            pass


def current_gateway() -> Gateway:
    """Returns the gateway of the current request."""
    return cast("ControlPlane", current_app).gateway


def current_key() -> Key:
    """Returns the key of the current request."""
    return cast("Key", request.scope["trigate.key"])  # type: ignore[typeddict-item]
