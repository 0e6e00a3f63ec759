"""Remembered conversations: one turn at a time, in order, across all workers of the machine.

*Tickets* in the store define the order: the turn whose ticket has the lowest number of its session may run. Within a
worker, the turns of a session wait in a queue. Only the first of them reads the store, and the next one is woken when
the first returns its ticket. Workers notify each other of that; the first turn of a queue also checks four times a
second, in case a notification was lost.

A turn takes its ticket when it is opened, or before (`Sessions.take_ticket`): an accepted message keeps the position in
which it was accepted, whichever worker received it, and whenever its run begins.

A ticket is returned by a write that is not awaited, because the task may be cancelled. Two rules follow:

* A read may still show such a ticket. So a ticket of this worker that no turn here holds is *abandoned*, and is
ignored.
* The write may have failed. So a turn that finds an abandoned ticket returns it again, and awaits that. Writes are done
  in order, so the messages that the earlier turn appended are stored by then.

**Shape:** the notifications ``turn`` ("check whose turn it is") and ``stop`` are JSON arrays: owner and key of the
session, worker and number of the ticket.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import attrs
import msgspec
import trio

from trigate.concurrency.notify import Wakeup
from trigate.config.sections import SessionsConfig
from trigate.errors import BadRequest, GatewayError, NotFound, RunStopped, SessionBusy, StoreUnavailable
from trigate.openai.accumulator import AnswerAccumulator
from trigate.openai.answer import Usage
from trigate.openai.history_fields import HISTORY_FIELDS, with_history_fields
from trigate.openai.request import Call
from trigate.openai.token_estimate import estimated_tokens
from trigate.sessions.compose import Composition, compose
from trigate.store.interface import Store, Write
from trigate.store.records import Message, Session, Ticket, Turn
from trigate.workers.membership import Workers

POLL_S = 0.25
"""Seconds between two checks by the first turn of a queue of whether turns of other workers have ended."""
TICKET_TIMEOUT_S = 30.0
"""Seconds that the store may take to issue a ticket. After that, the turn fails; its ticket is then an abandoned
one."""

_any = msgspec.json.Decoder()
_ticket_decoder = msgspec.json.Decoder(tuple[str, str, str, int])

Key = tuple[str, str]


class SessionTurn:
    """One turn of a session, from its ticket to what it appends.

    Attributes:
        ticket: Its position in the queue; returned when the turn ends, at the latest.
        session: The session as it was when the turn began; None = this is its first turn.
        is_ticket_returned: The ticket was returned in the transaction that stored the turn.
        wakeup: Set when it may be this turn's time.
    """

    def __init__(self, ticket: Ticket, limits: SessionsConfig) -> None:
        self.ticket = ticket
        self.session: Session | None = None
        self.is_ticket_returned = False
        self.wakeup = Wakeup()
        self._limits = limits
        self._history: Sequence[Message] = ()
        self._composition = Composition(messages=(), remembered=range(0), new=(), system=None)
        self._cancel: Callable[[GatewayError], None] | None = None
        self._stopped: RunStopped | None = None

    def __repr__(self) -> str:
        return f"<SessionTurn {self.ticket.number}{', ticket returned' if self.is_ticket_returned else ''}>"

    def stop_with(self, cancel: Callable[[GatewayError], None]) -> None:
        """Registers how to end what the turn does now (the `cancel` of its exchange); replaces the last registration.
        If the turn was stopped before, ``cancel`` is called at once.

        >>> turn = SessionTurn(Ticket(number=1, owner="", key="k", worker="w"), SessionsConfig())
        >>> turn.stop()
        >>> turn.stop_with(print)
        The turn was stopped by a later message of its session.
        """
        self._cancel = cancel
        if self._stopped is not None:
            cancel(self._stopped)

    def stop(self) -> None:
        """Ends the turn with `RunStopped`. Synchronous."""
        self._stopped = RunStopped("The turn was stopped by a later message of its session.")
        if self._cancel is not None:
            self._cancel(self._stopped)

    async def begin(self, store: Store) -> None:
        """Reads what is remembered, once it is this turn's time; begins a new epoch if the session was idle for too
        long.

        Raises:
            StoreUnavailable: The store cannot be read.
        """
        ticket, limits = self.ticket, self._limits
        # One message more, so that `compose` can tell that a turn of which only the end was read is too large.
        found = await store.sessions.history(ticket.owner, ticket.key, last=limits.history_messages + 1)
        if found is None:
            return
        self.session, self._history = found
        now = time.time()
        if limits.idle_reset_s and now - self.session.active_at > limits.idle_reset_s and self.session.turns:
            self.session = await store.sessions.reset(ticket.owner, ticket.key, at=now)
            self._history = ()

    def compose(self, call: Call) -> Call:
        """Returns the call with what is remembered before its own messages, system messages first.

        Raises:
            BadRequest: The call cannot be a turn (``n`` > 1).
        """
        n = _any.decode(call.fields["n"]) if "n" in call.fields else None
        if isinstance(n, int | float) and n > 1:
            raise BadRequest("A session remembers one answer: n must be 1.", param="n")
        self._composition = compose(
            bytes(call.fields["messages"]),
            system=self.session.system if self.session is not None else b"[]",
            history=self._history,
            max_messages=self._limits.history_messages,
            max_tokens=self._limits.history_tokens,
        )
        composed = call.with_messages(self._composition.messages)
        return attrs.evolve(composed, remembered=self._composition.remembered)

    @property
    def omitted(self) -> int:
        """How many messages of the session `compose` has left out, mostly because the history is bounded."""
        return (self.session.messages if self.session is not None else 0) - len(self._composition.remembered)

    def result(self, answer: AnswerAccumulator, usage: Usage | None, *, at: float, partial: bool) -> Turn:
        """Returns what the turn appends: the new messages of the composed call, and the answer.

        Args:
            usage: What the upstream reported; None = the tokens of the answer are estimated.
            at: POSIX seconds.
            partial: The answer is truncated.
        """
        messages = [Message(body=body, tokens=estimated_tokens(body), at=at) for body in self._composition.new]
        if answer.has_content:
            body = answer.message()
            sent_back = with_history_fields(body, HISTORY_FIELDS)
            tokens = estimated_tokens(sent_back)
            if usage is not None and not partial:
                tokens = min(usage.completion_tokens, len(sent_back))  # the count includes reasoning that is not given
            messages.append(Message(body=body, tokens=tokens, at=at, partial=partial))
        return Turn(
            owner=self.ticket.owner,
            key=self.ticket.key,
            messages=tuple(messages),
            at=at,
            system=self._composition.system,
            epoch=self.session.epoch if self.session is not None else None,
        )

    def note_ticket_returned(self) -> None:
        """Notes that the transaction that stored the turn has returned its ticket. Synchronous."""
        self.is_ticket_returned = True


class SessionRecorder:
    """Appends a turn when its answer is complete, durably, and before the client gets the end of the answer. A
    truncated answer is appended as partial. It is an `exchange.Recorder`."""

    def __init__(self, store: Store, turn: SessionTurn) -> None:
        self.answer = AnswerAccumulator()
        self._store = store
        self._turn = turn
        self._is_done = False

    def feed(self, frames: bytes) -> None:
        """Takes the next events of a stream, as encoded frames."""
        self.answer.feed(frames)

    def feed_answer(self, body: bytes) -> None:
        """Takes a whole JSON answer."""
        self.answer.feed_answer(body)

    async def complete(self, usage: Usage | None) -> None:
        """Appends the turn and returns its ticket. Awaited before the client gets the end of the answer.

        Raises:
            StoreUnavailable: The turn could not be stored; the client gets this error.
        """
        # Set before the write: if it fails, the client will try again, and `settle` must not append this turn as well.
        self._is_done = True
        turn = self._turn
        appended = turn.result(self.answer, usage, at=time.time(), partial=False)
        await self._store.sessions.append(appended, ticket=turn.ticket)
        turn.note_ticket_returned()

    def settle(self, usage: Usage | None) -> None:
        """Queues what was not appended as complete, as partial. Called at the end of every exchange. Synchronous.

        Nothing is stored of an answer that had not begun, since the client will try again.
        """
        if not self._is_done and self.answer.has_content:
            self._is_done = True
            appended = self._turn.result(self.answer, usage, at=time.time(), partial=True)
            self._store.sessions.append(appended, ticket=self._turn.ticket)
            self._turn.note_ticket_returned()


@attrs.define(eq=False)
class _Queue:
    """The turns of one session in this worker.

    Attributes:
        turns: By the numbers of their tickets. The lowest one runs, or checks whether it may.
        taking: How many tickets are being taken. Their numbers, and so the turns that will hold them, are not known
        yet.
    """

    turns: dict[int, SessionTurn] = attrs.field(factory=dict)
    taking: int = 0

    def wake(self) -> None:
        """Wakes the first turn, which checks whether it may run."""
        if self.turns:
            self.turns[min(self.turns)].wakeup.set()


class Sessions:
    """The sessions that this worker's turns belong to.

    Attributes:
        turns: How many are in progress or wait. Turns whose tickets were taken before they were opened are not counted:
            the runs that they belong to have bounds of their own.
    """

    def __init__(self, store: Store, workers: Workers) -> None:
        self._store = store
        self._workers = workers
        self._queues: dict[Key, _Queue] = {}
        self.turns = 0
        workers.on_notify("turn", self._on_turn)
        workers.on_notify("stop", self._on_stop)

    def __repr__(self) -> str:
        return f"<Sessions, {self.turns} turns of {len(self._queues)}>"

    def take_ticket(
        self, owner: str, key: str, *, limits: SessionsConfig, run: str | None = None
    ) -> Awaitable[SessionTurn]:
        """Queues for a turn that is opened later. The ticket is taken at the call, in the order of the store's writes.

        The result must be awaited; that waits for the store alone. Then the turn may be opened (`open_turn`), and in
        the end its ticket must be returned (`return_ticket`). Await `Workers.join` before all that.

        Args:
            run: The id of the run that the turn belongs to; None = a call with ``x-session-key``.

        Raises (when awaited):
            StoreUnavailable: There is no ticket.

        **Cancels:** not before the ticket is known, but within `TICKET_TIMEOUT_S`.
        """
        queue = self._queues.setdefault((owner, key), _Queue())
        queue.taking += 1
        write = self._store.sessions.take_ticket(owner, key, worker=self._workers.id, run=run)
        return self._await_ticket((owner, key), queue, write, limits)

    async def _await_ticket(
        self, name: Key, queue: _Queue, write: Write[Ticket], limits: SessionsConfig
    ) -> SessionTurn:
        try:
            # Shielded: the write is done whether it is awaited or not, and only its result tells what to return.
            with trio.move_on_after(TICKET_TIMEOUT_S, shield=True):
                ticket = await write
                turn = queue.turns[ticket.number] = SessionTurn(ticket, limits)
                return turn
            raise StoreUnavailable(f"The store has not issued a ticket within {TICKET_TIMEOUT_S:g} s.")
        finally:
            queue.taking -= 1
            queue.wake()
            self._drop_if_empty(name, queue)

    def return_ticket(self, turn: SessionTurn) -> None:
        """Returns the ticket of a turn, and lets the next turn check. Synchronous."""
        ticket = turn.ticket
        queue = self._queues[ticket.owner, ticket.key]
        del queue.turns[ticket.number]
        if not turn.is_ticket_returned:
            self._store.sessions.return_ticket(ticket)
        queue.wake()
        self._workers.notify("turn", _encode_ticket(ticket))
        self._drop_if_empty((ticket.owner, ticket.key), queue)

    @contextlib.asynccontextmanager
    async def open_turn(
        self,
        owner: str,
        key: str,
        *,
        limits: SessionsConfig,
        run: str | None = None,
        turn: SessionTurn | None = None,
    ) -> AsyncIterator[SessionTurn]:
        """Queues for a turn, waits for it, and reads what is remembered.

        Args:
            turn: A turn that was queued before (`take_ticket`). Its ticket stays with the caller: it can be opened
            again.

        Raises:
            SessionBusy: The turn before it did not end within ``limits.wait_s`` (0 = no limit).
            StoreUnavailable: The store cannot be used.
        """
        async with self._open_ticket(owner, key, limits=limits, run=run, turn=turn) as opened:
            with trio.move_on_after(limits.wait_s or math.inf) as scope:
                await self._wait(opened)
            if scope.cancelled_caught:
                raise SessionBusy(
                    f"Another turn of this session is in progress, and did not end within {limits.wait_s:g} s. "
                    "Try again when it has ended."
                )
            await opened.begin(self._store)
            yield opened

    async def delete(self, owner: str, key: str) -> None:
        """Deletes a session, unless a turn of it is in progress or waits: its answer would create the session again.

        Raises:
            NotFound: There is no such session.
            SessionBusy: A turn is in progress.
        """
        if await self._store.sessions.get(owner, key) is None:
            raise NotFound("There is no such session.")
        async with self._open_ticket(owner, key, limits=SessionsConfig()) as turn:
            if await self._first_ahead(turn) is not None:
                raise SessionBusy("A turn of this session is in progress. Delete it when it has ended.")
            if not await self._store.sessions.delete(owner, key):
                raise NotFound("There is no such session.")

    async def stop(self, owner: str, key: str) -> Sequence[Ticket]:
        """Ends the session's running turn with `errors.RunStopped`, in whichever worker it runs. Does not wait for its
        end.

        Returns:
            The ticket of that turn, or nothing if no turn runs.

        Raises:
            StoreUnavailable: The store cannot be read.
        """
        await self._workers.join()
        tickets = await self._store.sessions.tickets(owner, key)
        running = [ticket for ticket in tickets if not self._is_abandoned(ticket)][:1]
        for ticket in running:
            if ticket.worker == self._workers.id:
                self._stop_here(ticket)
            else:
                self._workers.notify("stop", _encode_ticket(ticket))
        return running

    # -- the queue ----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _open_ticket(
        self, owner: str, key: str, *, limits: SessionsConfig, run: str | None = None, turn: SessionTurn | None = None
    ) -> AsyncIterator[SessionTurn]:
        """Holds a ticket around a block: that of a queued turn, or a new one, which it returns."""
        if turn is not None:
            yield turn
            return
        self.turns += 1
        try:
            await self._workers.join()
            turn = await self.take_ticket(owner, key, limits=limits, run=run)
            yield turn
        finally:
            self.turns -= 1
            if turn is not None:
                self.return_ticket(turn)

    def _drop_if_empty(self, name: Key, queue: _Queue) -> None:
        if not queue.turns and not queue.taking:
            self._queues.pop(name, None)

    async def _wait(self, turn: SessionTurn) -> None:
        """Waits until a turn may run."""
        ticket = turn.ticket
        queue = self._queues[ticket.owner, ticket.key]
        while True:
            if min(queue.turns) != ticket.number:
                await turn.wakeup.wait()
                continue
            ahead = await self._first_ahead(turn)
            if ahead is None:
                return
            with trio.move_on_after(POLL_S) as scope:
                await turn.wakeup.wait()
            if scope.cancelled_caught and ahead.worker != self._workers.id:
                self._workers.notify("turn", _encode_ticket(ahead))

    async def _first_ahead(self, turn: SessionTurn) -> Ticket | None:
        """Returns the first ticket if it is ahead of a turn's own; None = the turn may run. Returns abandoned tickets
        to the store on the way."""
        while True:
            tickets = await self._store.sessions.tickets(turn.ticket.owner, turn.ticket.key)
            if not tickets or tickets[0].number >= turn.ticket.number:
                return None
            if not self._is_abandoned(tickets[0]):
                return tickets[0]
            await self._store.sessions.return_ticket(tickets[0])

    def _is_abandoned(self, ticket: Ticket) -> bool:
        """Whether a ticket is of this worker, and no turn here holds it."""
        if ticket.worker != self._workers.id:
            return False
        queue = self._queues.get((ticket.owner, ticket.key))
        return queue is None or (ticket.number not in queue.turns and not queue.taking)

    # -- notifications ------------------------------------------------------------------------------------------------

    def _on_turn(self, body: bytes) -> None:
        ticket = _decode_ticket(body)
        queue = self._queues.get((ticket.owner, ticket.key))
        if queue is not None:
            queue.wake()
        if self._is_abandoned(ticket):  # another worker waits for it
            self._store.sessions.return_ticket(ticket)

    def _on_stop(self, body: bytes) -> None:
        self._stop_here(_decode_ticket(body))

    def _stop_here(self, ticket: Ticket) -> None:
        queue = self._queues.get((ticket.owner, ticket.key))
        if queue is not None and ticket.number in queue.turns:
            queue.turns[ticket.number].stop()


def _encode_ticket(ticket: Ticket) -> bytes:
    return msgspec.json.encode((ticket.owner, ticket.key, ticket.worker, ticket.number))


def _decode_ticket(body: bytes) -> Ticket:
    owner, key, worker, number = _ticket_decoder.decode(body)
    return Ticket(number=number, owner=owner, key=key, worker=worker)
