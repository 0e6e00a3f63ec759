"""The class of the control plane's Quart application; `control_plane` makes one."""

from __future__ import annotations

from typing import cast

from quart import current_app
from quart_trio import QuartTrio

from trigate.gateway.gateway import Gateway


class ControlPlane(QuartTrio):
    """The Quart application of the control plane.

    Attributes:
        gateway: The open gateway.
    """

    gateway: Gateway


def current_gateway() -> Gateway:
    """Returns the gateway of the current request."""
    return cast("ControlPlane", current_app).gateway
