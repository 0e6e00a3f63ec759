"""Trigate: an OpenAI-compatible gateway in which a request is one Trio nursery.

``trigate:app`` is an ASGI app for any server: ``hypercorn trigate:app``, ``hypercorn -k trio trigate:app``,
``uvicorn trigate:app``. It is built at its first call, from ``TRIGATE_CONFIG``, else ``./trigate.toml``, else from
discovered providers. Importing this module opens, reads and starts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trigate.version import __version__

if TYPE_CHECKING:
    from trigate.asgi.application import create_app

__all__ = ["__version__", "app", "create_app"]


class _LazyApp:
    """Builds the app when a server first calls it, and hosts Trio where that server runs asyncio.

    A plain instance rather than a module ``__getattr__``: hypercorn looks the name up in the module's own namespace.
    """

    def __init__(self) -> None:
        self._built: Any = None  # Any: an ASGI callable

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # Any: ASGI as servers type it
        if self._built is None:
            self._built = _build()
        await self._built(scope, receive, send)


def _build() -> Any:
    import trio

    from trigate.asgi.application import create_app, tune_memory

    built = create_app()
    tune_memory()
    if trio.lowlevel.in_trio_run():
        return built
    from trigate.server.asyncio_host import AsyncioHost

    return AsyncioHost(built)


app = _LazyApp()


def __getattr__(name: str) -> Any:
    if name == "create_app":
        from trigate.asgi.application import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
