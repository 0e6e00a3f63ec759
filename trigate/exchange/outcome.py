"""How far an exchange is, and how it ended."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """What an exchange is doing, as ``/status`` shows it.

    While an attempt is in progress, an exchange is in the phase of its attempt; of several, in that of the attempt that
    has content, else of the oldest one.
    """

    ADMITTED = "admitted"
    """It has begun, and no attempt has."""
    QUEUED = "queued"
    """It waits for an admission slot; an attempt: for a slot of its upstream."""
    WAITING = "waiting"
    """The reply has begun, and its first content has not come. An exchange: it waits for a shared call."""
    PAUSING = "pausing"
    """It waits before a retry."""
    CONNECTING = "connecting"
    """The request was sent, or is about to be, and the head of the reply has not come."""
    STREAMING = "streaming"
    READING = "reading"
    """A JSON answer is being received."""
    ENDING = "ending"
    """The last bytes are on their way to the client."""
    ENDED = "ended"


class Outcome(StrEnum):
    """How an exchange or an attempt ended, unless it failed: then its outcome is an error code (`errors.CODES`)."""

    COMPLETE = "complete"
    CANCELLED = "cancelled"
    """The client disconnected. An attempt: or its call ended for another reason."""
    FINISHED = "finished"
    """An exchange only: the client disconnected, and the upstream's answer was received to its end all the same."""
    SUPERSEDED = "superseded"
    """An attempt only: another attempt had content first."""
