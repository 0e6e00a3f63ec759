"""The phases and outcomes of exchanges and attempts."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """What an exchange is doing, as ``/status`` shows it.

    While an attempt is in progress, the exchange has the phase of that attempt. Of several attempts, the one that has
    content counts, else the oldest one.
    """

    ADMITTED = "admitted"
    """The exchange has begun, and no attempt has."""
    QUEUED = "queued"
    """An exchange waits for an admission slot, an attempt for a slot of its upstream."""
    WAITING = "waiting"
    """An attempt has the head of its reply, and no content yet. An exchange waits for a shared call."""
    PAUSING = "pausing"
    """The exchange waits before a retry."""
    CONNECTING = "connecting"
    """The request is being sent, or has been, and the head of the reply has not arrived."""
    STREAMING = "streaming"
    READING = "reading"
    """A JSON answer is being received."""
    ENDING = "ending"
    """The last bytes are being sent to the client."""
    ENDED = "ended"


class Outcome(StrEnum):
    """How an exchange or an attempt ended. The outcome of one that failed is an error code (`errors.codes`)."""

    COMPLETE = "complete"
    CANCELLED = "cancelled"
    """The client disconnected. Of an attempt also: its call ended for another reason."""
    FINISHED = "finished"
    """The client disconnected, and the answer was received to its end all the same (``on_disconnect = "finish"``).
    Exchanges only."""
    SUPERSEDED = "superseded"
    """Another attempt had content first. Attempts only."""
