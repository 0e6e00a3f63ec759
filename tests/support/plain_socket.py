"""A recording client end of a relayed stream: a `trigate.exchange.sink.PlainSocket`."""

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
        """Records nothing: the owner records what is relayed."""

    def note_blocked(self, since: float | None) -> None:
        """Records nothing: the owner is notified too."""

    def queue_partial(self, rest: bytes) -> None:
        """Records the rest of a frame. There is one at most."""
        assert not self.partial
        self.partial = rest
