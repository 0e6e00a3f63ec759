"""The client that waits for a run."""

from __future__ import annotations

import attrs
import trio

from trigate.errors import GatewayError
from trigate.exchange.client_response import ClientResponse
from trigate.exchange.client_sink import answer_headers
from trigate.exchange.exchange import Exchange


@attrs.define(eq=False)
class RunClient:
    """A client that waits for the answer of a run.

    Attributes:
        is_streamed: The answer goes to it event by event. Otherwise the caller sends the result once it is stored, and
            only an error goes out from here.
        is_detached: It has disconnected, and the run continues without it.
    """

    response: ClientResponse
    is_streamed: bool
    is_detached: bool = False
    _exchange: Exchange | None = None

    @property
    def streamed_to(self) -> ClientResponse | None:
        """Where the answer goes event by event; None = nowhere."""
        return self.response if self.is_streamed and not self.is_detached else None

    def note_exchange(self, exchange: Exchange) -> None:
        """The run's exchange is about to begin."""
        self._exchange = exchange

    def note_answered(self, exchange: Exchange) -> None:
        """The run's exchange has ended. A response that does not stream the answer gets the same headers as one that
        does."""
        if not self.is_streamed:
            content_at = exchange.source.first_content_at if exchange.source is not None else None
            self.response.headers += answer_headers(exchange, content_at or trio.current_time())

    async def tell(self, error: GatewayError) -> None:
        """Sends an error, unless the response has begun."""
        if self.is_detached or self.response.committed:
            await trio.lowlevel.checkpoint()
        else:
            await self.response.respond(*error.to_response())

    async def detach(self) -> None:
        """Sends nothing more, and waits for a send in progress: the client has disconnected, and the run continues."""
        self.is_detached = True
        if self._exchange is None:
            await trio.lowlevel.checkpoint()
        else:
            await self._exchange.detach_client()
