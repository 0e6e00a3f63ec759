"""The shutdown of the gateway, as the server controls it: hand over, drain, cancel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from trigate.errors import Draining
from trigate.exchange.live import LiveExchanges
from trigate.runs.outbox import Outbox


class Drain:
    """Controls the shutdown of the gateway; the lifespan state has it under ``drain``.

    Attributes:
        handing_over: Set once other processes take over the work that any process can do, such as polling.
        is_announced: ``GET /ready`` answers 503.
        on_cut: Called by `cut`, before it cancels the exchanges.
    """

    def __init__(self, live: LiveExchanges, outbox: Outbox) -> None:
        self._live = live
        self._outbox = outbox
        self.handing_over = trio.Event()
        self.is_announced = False
        self.on_cut: Callable[[], None] = lambda: None

    def step_aside(self) -> None:
        """Stops polling for messages, which another process can do. Requests are served as before."""
        self.handing_over.set()

    def announce(self) -> None:
        """Steps aside, and has ``GET /ready`` answer 503."""
        self.step_aside()
        self.is_announced = True

    def begin(self) -> None:
        """Announces the shutdown, and refuses new calls; running ones continue."""
        self.announce()
        self._live.is_draining = True

    async def wait_quiet(self) -> None:
        """Waits until no exchange is in flight, and the results of ended runs have been delivered."""
        await self._live.wait_none_left()
        await self._outbox.wait_idle()

    def cut(self) -> Sequence[str]:
        """Cancels the exchanges in flight: each stream gets an error event. Returns their request ids."""
        self.on_cut()
        return self._live.cancel_all(
            Draining("The gateway is shutting down; the answer up to here is incomplete. Try again.")
        )
