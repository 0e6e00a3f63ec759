"""The services that channels use, without a gateway."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import cast

import attrs
import trio

from trigate.channels.adapter import ChannelServices
from trigate.runs.outbox import open_outbox
from trigate.runs.request import LiveView
from trigate.runs.service import Runs
from trigate.store.memory import open_memory_store
from trigate.workers.membership import open_workers


@attrs.define(eq=False)
class RegisteredViews:
    """`Runs` that take no messages: adapters can only be registered."""

    live_views: dict[str, LiveView] = attrs.field(factory=dict)


@contextlib.asynccontextmanager
async def open_services() -> AsyncIterator[ChannelServices]:
    """Opens an empty store in memory, with its workers and its outbox. This worker has not joined the others, so the
    outbox makes no attempts."""
    async with (
        open_memory_store() as store,
        open_workers(store) as workers,
        open_outbox(store, workers) as outbox,
    ):
        yield ChannelServices(
            store=store,
            workers=workers,
            runs=cast("Runs", RegisteredViews()),
            outbox=outbox,
            handing_over=trio.Event(),
        )
