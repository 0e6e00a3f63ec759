"""The client's end of a relayed stream: `trigate.exchange.sink.PlainSocket`, noted."""

from __future__ import annotations

import socket

import attrs


@attrs.define(eq=False)
class PlainClient:
    """A client's socket.

    Attributes:
        partial: The rest of a frame that the relay has queued.
    """

    socket: socket.socket
    chunked: bool = False
    partial: bytes = b""

    def note_sent(self, now: float) -> None:
        """Nothing is noted: the owner notes what is relayed."""

    def note_blocked(self, since: float | None) -> None:
        """Nothing is noted: the owner is told as well."""

    def queue_partial(self, rest: bytes) -> None:
        """Notes the rest of a frame; there is one at most."""
        assert not self.partial
        self.partial = rest
