"""The QuartTrio application class; `application.create_app` makes an application."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, cast

from quart import current_app
from quart_trio import QuartTrio

from trigate.gateway.gateway import Gateway


class GatewayApp(QuartTrio):
    """The ASGI application.

    Attributes:
        gateway: The open gateway; set from the start of the lifespan to its end.
        open_gateway: Opens the gateway for the lifespan.
    """

    gateway: Gateway
    open_gateway: Callable[[], AbstractAsyncContextManager[Gateway]]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # Any: ASGI as servers type it
        if scope["type"] == "http":
            await self.asgi_http_class(self, scope)(receive, send)  # as in Quart, without its indirections
        else:
            await super().__call__(scope, receive, send)


def current_gateway() -> Gateway:
    """Returns the gateway of the current request."""
    return cast("GatewayApp", current_app).gateway
