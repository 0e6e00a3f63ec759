"""The class of the control plane's Quart application; `control_plane` makes one."""

from __future__ import annotations

from typing import cast

from quart import current_app, request
from quart_trio import QuartTrio

from trigate.gateway.gateway import Gateway
from trigate.keys.key import Key


class ControlPlane(QuartTrio):
    """The Quart application of the control plane.

    Attributes:
        gateway: The open gateway.
    """

    gateway: Gateway


def current_gateway() -> Gateway:
    """Returns the gateway of the current request."""
    return cast("ControlPlane", current_app).gateway


def current_key() -> Key:
    """Returns the key of the current request."""
    return cast("Key", request.scope["trigate.key"])  # type: ignore[typeddict-item]
