"""Conversations that are remembered: one turn at a time, in order, across all workers of the machine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from trigate import store as records
from trigate.answers import AnswerRecord
from trigate.config import SessionsConfig
from trigate.errors import GatewayError
from trigate.store import Store
from trigate.wire import Call, Usage
from trigate.workers import Workers


class SessionTurn:
    """One turn of a session, from its place in the queue to what it appends.

    Attributes:
        ticket: Its place; given back when the turn ends, at the latest.
        session: As it was when the turn began; None = it is the first.
        cut: What ends it from outside (`Exchange.cut`); set by who runs the turn.
    """

    ticket: records.Ticket
    session: records.Session | None
    cut: Callable[[GatewayError], None] | None

    def compose(self, call: Call) -> Call:
        """The call with what is remembered before its own messages, system messages first.

        Raises:
            BadRequest: It cannot be a turn (``n`` > 1).
        """
        raise NotImplementedError

    def result(self, answer: AnswerRecord, usage: Usage | None, *, at: float, partial: bool) -> records.Turn:
        """What the turn appends: the new messages of the call that was composed, and the answer."""
        raise NotImplementedError

    def note_left(self) -> None:
        """The ticket has been given back in the transaction that stored the turn."""
        raise NotImplementedError


class SessionRecorder:
    """Appends a turn when its answer is complete, durably before the client is told so; and what there is of an answer
    that was cut, as partial. An `exchange.Recorder`."""

    def __init__(self, store: Store, turn: SessionTurn) -> None:
        self.answer = AnswerRecord()

    def hear(self, frames: bytes) -> None:
        """As `Recorder.hear`."""
        raise NotImplementedError

    def hear_answer(self, body: bytes) -> None:
        """As `Recorder.hear_answer`."""
        raise NotImplementedError

    async def complete(self, usage: Usage | None) -> None:
        """As `Recorder.complete`."""
        raise NotImplementedError

    def settle(self, usage: Usage | None) -> None:
        """The exchange has ended, however: what was not appended as complete is queued as partial. Synchronous."""
        raise NotImplementedError


class Sessions:
    """The sessions that this worker's turns belong to."""

    def __init__(self, store: Store, workers: Workers) -> None:
        self._store = store
        self._workers = workers

    @contextlib.asynccontextmanager
    async def open_turn(
        self, owner: str, key: str, *, limits: SessionsConfig, run: str | None = None
    ) -> AsyncIterator[SessionTurn]:
        """Queues for a turn, waits for it, and reads what is remembered.

        Raises:
            SessionBusy: The turn before it did not end within ``limits.wait_s``.
            StoreUnavailable: It cannot be remembered.
        """
        raise NotImplementedError
        yield

    async def stop(self, owner: str, key: str) -> Sequence[records.Ticket]:
        """Cuts the session's running turn, in whichever worker it runs, with `errors.Stopped`, and returns the tickets
        that it found; it does not wait for the turn to have ended."""
        raise NotImplementedError
