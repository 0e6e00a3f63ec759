"""Remembered conversations: the order of their turns, and what of their history is put before a request.

The package knows sessions, tickets and messages. It does not know how a turn is executed (an exchange, or a run): that
code opens a turn around what it does. Read `service` first; `compose` is the pure part.
"""

from trigate.sessions.service import SessionRecorder, Sessions, SessionTurn

__all__ = ["SessionRecorder", "SessionTurn", "Sessions"]
