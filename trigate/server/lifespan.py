"""The server's side of the ASGI lifespan protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from trigate.logs import log
from trigate.server.http1 import Application, Message

SHUTDOWN_TIMEOUT_S = 10.0
"""How long the shutdown of an app may take."""


class StartupFailed(Exception):
    """The app could not start, or its certificate cannot be used; the message says why."""


@asynccontextmanager
async def open_lifespan(app: Application) -> AsyncIterator[dict[str, Any]]:
    """Runs the ASGI lifespan of an app for as long as the block lasts.

    An app that raises an exception before it completes its start-up has no lifespan, as the specification says, and is
    served without one. An exception that the app raises later ends the block.

    Yields:
        The lifespan ``state``.

    Raises:
        StartupFailed: The app has reported that its start-up failed.
    """
    state: dict[str, Any] = {}
    to_app, from_server = trio.open_memory_channel[Message](2)
    started, stopped = trio.Event(), trio.Event()
    failure: str | None = None

    async def send(message: Message) -> None:
        nonlocal failure
        await trio.lowlevel.checkpoint()
        match message["type"]:
            case "lifespan.startup.complete":
                started.set()
            case "lifespan.startup.failed":
                failure = message.get("message") or "the app gave no reason"
                started.set()
            case "lifespan.shutdown.complete":
                stopped.set()
            case "lifespan.shutdown.failed":
                log.error("shutdown_failed", reason=message.get("message", ""))
                stopped.set()
            case kind:
                raise ValueError(f"{kind} is not a message of an ASGI lifespan")

    async def run() -> None:
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": state,
        }
        try:
            await app(scope, from_server.receive, send)
        except* Exception as group:
            if started.is_set() and failure is None:
                raise
            log.debug("no_lifespan", reason=repr(group.exceptions[0]))
        finally:
            started.set()
            stopped.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        to_app.send_nowait({"type": "lifespan.startup"})
        await started.wait()
        if failure is None:
            yield state
            to_app.send_nowait({"type": "lifespan.shutdown"})
            with trio.move_on_after(SHUTDOWN_TIMEOUT_S):
                await stopped.wait()
            if not stopped.is_set():
                log.warning("shutdown_abandoned", after_s=SHUTDOWN_TIMEOUT_S)
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise StartupFailed(f"the app could not start: {failure}")
