"""How the server ends the gateway's work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trigate.errors import Draining

if TYPE_CHECKING:
    from trigate.gateway.gateway import Gateway

if TYPE_CHECKING:
    pass


class Drain:
    """How the server ends the gateway's work; found in the lifespan state under ``drain``."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def step_aside(self) -> None:
        """From now on nothing is fetched that another process can fetch; what comes is still done."""
        self._gateway.aside.set()

    def announce(self) -> None:
        """The same, and ``GET /ready`` says 503."""
        self.step_aside()
        self._gateway.ends = True

    def begin(self) -> None:
        """From now on ``GET /ready`` says 503 and new calls are refused; running ones go on."""
        self.announce()
        self._gateway.live.is_draining = True

    async def wait_quiet(self) -> None:
        """Waits until the runs that have begun have ended, and what can be told of them has been told."""
        await self._gateway.live.wait_none_left()
        await self._gateway.outbox.wait_idle()

    def cut(self) -> Sequence[str]:
        """Ends what is still running: each stream gets an error event and its proper end. Returns the ids."""
        return self._gateway.live.cancel_all(
            Draining("The gateway is shutting down; the answer up to here is incomplete. Try again.")
        )
