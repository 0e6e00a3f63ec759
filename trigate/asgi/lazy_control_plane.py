"""Loads the control plane when the first request to it arrives."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import trio

from trigate.errors import Overloaded
from trigate.gateway.gateway import Gateway

_MODULE = "trigate.asgi.control_plane"


class LazyControlPlane:
    """The control plane as an ASGI application, which is imported and made at its first call.

    Raises:
        Overloaded: It cannot be imported now; the next request tries again.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._opening = trio.Lock()
        self._app: Any = None  # Any: Quart is not imported before it is needed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # Any: ASGI as servers type it
        if self._app is None:
            async with self._opening:
                if self._app is None:
                    self._app = await self._open()
        await self._app(scope, receive, send)

    async def _open(self) -> Any:
        module: Any = sys.modules.get(_MODULE)
        if not hasattr(module, "open_control_plane"):  # in a thread: streams go on meanwhile
            try:
                module = await trio.to_thread.run_sync(importlib.import_module, _MODULE)
            except (OSError, ImportError, RuntimeError) as error:  # no descriptor, or no thread
                raise Overloaded(f"The control plane cannot be loaded now: {error}.") from error
        return await module.open_control_plane(self._gateway)
