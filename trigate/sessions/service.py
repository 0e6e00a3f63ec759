"""Conversations that are remembered: one turn at a time, in order, across all workers of the machine.

The order is that of the *tickets* in the store: the lowest number of a session is the one whose turn it is. In one
worker, turns of a session stand in a queue besides; only the first of them looks at the store, and the next one is
woken when it leaves. Other workers are rung, and look four times a second where a ring was lost.

A place in that order is taken when a turn is opened, or before (`Sessions.take_place`): a message that was accepted
stands where it was accepted, whichever worker it reached, and whenever that gets to it.

A ticket is given back by a write that nobody waits for, since who leaves may be cancelled. Two things follow. What a
read shows of this worker's own tickets may be old, so a ticket of this worker that nobody here holds counts for
nothing. And such a write may have failed; so whoever finds such a ticket gives it back again, and waits for that: then
everything that was queued before is written too, also what the turn before has appended.

**Shape:** the rings ``turn`` ("look whose turn it is") and ``stop`` are JSON arrays: owner and key of
the session, worker and number of a ticket.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import attrs
import msgspec
import trio

from trigate.config.sections import SessionsConfig
from trigate.errors import BadRequest, GatewayError, NotFound, RunStopped, SessionBusy
from trigate.openai.accumulator import AnswerAccumulator
from trigate.openai.answer import Usage
from trigate.openai.request import Call
from trigate.sessions import compose as history
from trigate.store import interface as records
from trigate.store import records as interface_records
from trigate.store.interface import Store
from trigate.workers.membership import Workers

POLL_S = 0.25
"""How often the first of a worker's queue looks whether turns of other workers have ended."""

_any = msgspec.json.Decoder()
_ring = msgspec.json.Decoder(tuple[str, str, str, int])

Key = tuple[str, str]


class SessionTurn:
    """One turn of a session, from its place in the queue to what it appends.

    Attributes:
        ticket: Its place; given back when the turn ends, at the latest.
        session: As it was when the turn began; None = it is the first.
    """

    def __init__(self, ticket: interface_records.Ticket, limits: SessionsConfig) -> None:
        self.ticket = ticket
        self.session: interface_records.Session | None = None
        self.has_left = False
        self.bell = trio.Event()
        self._limits = limits
        self._history: Sequence[interface_records.Message] = ()
        self._composition = history.Composition(messages=(), new=(), system=None)
        self._cut: Callable[[GatewayError], None] | None = None
        self._stopped: RunStopped | None = None

    def __repr__(self) -> str:
        return f"<SessionTurn {self.ticket.number}{', left' if self.has_left else ''}>"

    @property
    def cut(self) -> Callable[[GatewayError], None] | None:
        """What ends it from outside (`Exchange.cut`); set by who runs the turn. A stop that came before is told then.

        >>> from trigate.store.interface import Ticket
        >>> turn = SessionTurn(Ticket(number=1, owner="", key="k", worker="w"), SessionsConfig())
        >>> turn.stop()
        >>> turn.cut = print
        The turn was stopped by a later message of its session.
        """
        return self._cut

    @cut.setter
    def cut(self, cut: Callable[[GatewayError], None] | None) -> None:
        self._cut = cut
        if cut is not None and self._stopped is not None:
            cut(self._stopped)

    def stop(self) -> None:
        """Cuts it with `RunStopped`. Synchronous."""
        self._stopped = RunStopped("The turn was stopped by a later message of its session.")
        if self._cut is not None:
            self._cut(self._stopped)

    async def begin(self, store: Store) -> None:
        """It is its turn: reads what is remembered."""
        ticket, limits = self.ticket, self._limits
        # one more, so that a turn of which only the end is read is seen to be too large
        found = await store.sessions.history(ticket.owner, ticket.key, last=limits.history_messages + 1)
        if found is None:
            return
        self.session, self._history = found
        now = time.time()
        if limits.idle_reset_s and now - self.session.active_at > limits.idle_reset_s and self.session.turns:
            self.session = await store.sessions.reset(ticket.owner, ticket.key, at=now)
            self._history = ()

    def compose(self, call: Call) -> Call:
        """The call with what is remembered before its own messages, system messages first.

        Raises:
            BadRequest: It cannot be a turn (``n`` > 1).
        """
        n = _any.decode(call.fields["n"]) if "n" in call.fields else None
        if isinstance(n, int | float) and n > 1:
            raise BadRequest("A session remembers one answer: n must be 1.", param="n")
        self._composition = history.compose(
            bytes(call.fields["messages"]),
            system=self.session.system if self.session is not None else b"[]",
            history=self._history,
            max_messages=self._limits.history_messages,
            max_tokens=self._limits.history_tokens,
        )
        return call.with_messages(self._composition.messages)

    def result(
        self, answer: AnswerAccumulator, usage: Usage | None, *, at: float, partial: bool
    ) -> interface_records.Turn:
        """What the turn appends: the new messages of the call that was composed, and the answer."""
        messages = [
            interface_records.Message(body=body, tokens=history.estimated_tokens(body), at=at)
            for body in self._composition.new
        ]
        if answer.has_content:
            body = answer.message()
            tokens = history.estimated_tokens(body)
            if usage is not None and not partial:
                tokens = min(usage.completion_tokens, len(body))  # it counts reasoning too, which is not kept
            messages.append(interface_records.Message(body=body, tokens=tokens, at=at, partial=partial))
        return interface_records.Turn(
            owner=self.ticket.owner,
            key=self.ticket.key,
            messages=tuple(messages),
            at=at,
            system=self._composition.system,
            epoch=self.session.epoch if self.session is not None else None,
        )

    def note_left(self) -> None:
        """The ticket has been given back in the transaction that stored the turn."""
        self.has_left = True


class SessionRecorder:
    """Appends a turn when its answer is complete, durably before the client is told so; and what there is of an answer
    that was cut, as partial. An `exchange.Recorder`."""

    def __init__(self, store: Store, turn: SessionTurn) -> None:
        self.answer = AnswerAccumulator()
        self._store = store
        self._turn = turn
        self._is_done = False

    def feed(self, frames: bytes) -> None:
        """As `Recorder.feed`."""
        self.answer.feed(frames)

    def feed_answer(self, body: bytes) -> None:
        """As `Recorder.feed_answer`."""
        self.answer.feed_answer(body)

    async def complete(self, usage: Usage | None) -> None:
        """As `Recorder.complete`."""
        # Done also where it fails: the client is told to try again, and nothing of this must then be there twice.
        self._is_done = True
        turn = self._turn
        appended = turn.result(self.answer, usage, at=time.time(), partial=False)
        await self._store.sessions.append(appended, ticket=turn.ticket)
        turn.note_left()

    def settle(self, usage: Usage | None) -> None:
        """The exchange has ended, however: what was not appended as complete is queued as partial. Synchronous. Of an
        answer that had not begun nothing is kept, so that a client may try again."""
        if not self._is_done and self.answer.has_content:
            self._is_done = True
            appended = self._turn.result(self.answer, usage, at=time.time(), partial=True)
            self._store.sessions.append(appended, ticket=self._turn.ticket)
            self._turn.note_left()


@attrs.define(eq=False)
class _Queue:
    """The turns of one session in this worker.

    Attributes:
        turns: By the numbers of their tickets; the lowest runs, or looks whether it may.
        taking: How many tickets are being taken: who will hold one of these is not known yet.
    """

    turns: dict[int, SessionTurn] = attrs.field(factory=dict)
    taking: int = 0

    def wake(self) -> None:
        """Has the first one look."""
        if self.turns:
            self.turns[min(self.turns)].bell.set()


class Sessions:
    """The sessions that this worker's turns belong to.

    Attributes:
        turns: How many are in progress or wait. Those whose places were taken before are not among them: whoever takes
            places has bounds of its own.
    """

    def __init__(self, store: Store, workers: Workers) -> None:
        self._store = store
        self._workers = workers
        self._queues: dict[Key, _Queue] = {}
        self.turns = 0
        workers.on_notify("turn", self._heed_turn)
        workers.on_notify("stop", self._heed_stop)

    def __repr__(self) -> str:
        return f"<Sessions, {self.turns} turns of {len(self._queues)}>"

    def take_place(
        self, owner: str, key: str, *, limits: SessionsConfig, run: str | None = None
    ) -> Awaitable[SessionTurn]:
        """Queues for a turn that is opened later. The place is taken at the call, in the order of the store's writes;
        what this returns is to be awaited in any case, and waits for the store alone. Then the turn may be opened
        (`open_turn`), and in the end its place is given back (`give_back`). `Workers.join` comes before all that.

        Raises:
            StoreUnavailable: There is no place.
        """
        queue = self._queues.setdefault((owner, key), _Queue())
        queue.taking += 1
        write = self._store.sessions.take_ticket(owner, key, worker=self._workers.id, run=run)
        return self._hold((owner, key), queue, write, limits)

    async def _hold(
        self, name: Key, queue: _Queue, write: records.Write[interface_records.Ticket], limits: SessionsConfig
    ) -> SessionTurn:
        try:
            # Shielded: a write is done, waited for or not, and who does not wait would not know what to give back.
            with trio.CancelScope(shield=True):
                ticket = await write
            turn = queue.turns[ticket.number] = SessionTurn(ticket, limits)
        finally:
            queue.taking -= 1
            queue.wake()
            self._forget(name, queue)
        return turn

    def give_back(self, turn: SessionTurn) -> None:
        """Gives the place of a turn back. Synchronous."""
        ticket = turn.ticket
        queue = self._queues[ticket.owner, ticket.key]
        del queue.turns[ticket.number]
        if not turn.has_left:
            self._store.sessions.return_ticket(ticket)
        queue.wake()
        self._workers.notify("turn", _rung(ticket))
        self._forget((ticket.owner, ticket.key), queue)

    @contextlib.asynccontextmanager
    async def open_turn(
        self,
        owner: str,
        key: str,
        *,
        limits: SessionsConfig,
        run: str | None = None,
        place: SessionTurn | None = None,
    ) -> AsyncIterator[SessionTurn]:
        """Queues for a turn, waits for it, and reads what is remembered.

        Args:
            place: One that was taken before (`take_place`). Its owner keeps it: it can be opened again.

        Raises:
            SessionBusy: The turn before it did not end within ``limits.wait_s`` (0 = it waits without an end).
            StoreUnavailable: It cannot be remembered.
        """
        async with self._open_place(owner, key, limits=limits, run=run, place=place) as turn:
            with trio.move_on_after(limits.wait_s or math.inf) as scope:
                await self._wait(turn)
            if scope.cancelled_caught:
                raise SessionBusy(
                    f"Another turn of this session is in progress, and did not end within {limits.wait_s:g} s. "
                    "Try again when it has ended."
                )
            await turn.begin(self._store)
            yield turn

    async def delete(self, owner: str, key: str) -> None:
        """Forgets a session, unless a turn of it is in progress or waits: it would come back with its answer.

        Raises:
            NotFound: There is no such session.
            SessionBusy: A turn is in progress.
        """
        if await self._store.sessions.get(owner, key) is None:
            raise NotFound("There is no such session.")
        async with self._open_place(owner, key, limits=SessionsConfig()) as turn:
            if await self._head(turn) is not None:
                raise SessionBusy("A turn of this session is in progress. Delete it when it has ended.")
            if not await self._store.sessions.delete(owner, key):
                raise NotFound("There is no such session.")

    async def stop(self, owner: str, key: str) -> Sequence[interface_records.Ticket]:
        """Ends the session's running turn with `errors.RunStopped`, in whichever worker it runs, and returns its ticket
        (or nothing, where none runs); it does not wait for the turn to have ended."""
        await self._workers.join()
        tickets = await self._store.sessions.tickets(owner, key)
        running = [ticket for ticket in tickets if not self._is_gone(ticket)][:1]
        for ticket in running:
            if ticket.worker == self._workers.id:
                self._stop_here(ticket)
            else:
                self._workers.notify("stop", _rung(ticket))
        return running

    # -- the queue ----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _open_place(
        self, owner: str, key: str, *, limits: SessionsConfig, run: str | None = None, place: SessionTurn | None = None
    ) -> AsyncIterator[SessionTurn]:
        if place is not None:
            yield place
            return
        self.turns += 1
        try:
            await self._workers.join()
            place = await self.take_place(owner, key, limits=limits, run=run)
            yield place
        finally:
            self.turns -= 1
            if place is not None:
                self.give_back(place)

    def _forget(self, name: Key, queue: _Queue) -> None:
        if not queue.turns and not queue.taking:
            self._queues.pop(name, None)

    async def _wait(self, turn: SessionTurn) -> None:
        ticket = turn.ticket
        queue = self._queues[ticket.owner, ticket.key]
        while True:
            turn.bell = trio.Event()
            if min(queue.turns) != ticket.number:
                await turn.bell.wait()
                continue
            head = await self._head(turn)
            if head is None:
                return
            with trio.move_on_after(POLL_S) as scope:
                await turn.bell.wait()
            if scope.cancelled_caught and head.worker != self._workers.id:
                self._workers.notify("turn", _rung(head))

    async def _head(self, turn: SessionTurn) -> interface_records.Ticket | None:
        """The first ticket before a turn's; None = it is its turn."""
        while True:
            tickets = await self._store.sessions.tickets(turn.ticket.owner, turn.ticket.key)
            if not tickets or tickets[0].number >= turn.ticket.number:
                return None
            if not self._is_gone(tickets[0]):
                return tickets[0]
            await self._store.sessions.return_ticket(tickets[0])

    def _is_gone(self, ticket: interface_records.Ticket) -> bool:
        """Whether a ticket is this worker's, and nobody holds it here."""
        if ticket.worker != self._workers.id:
            return False
        queue = self._queues.get((ticket.owner, ticket.key))
        return queue is None or (ticket.number not in queue.turns and not queue.taking)

    # -- rings --------------------------------------------------------------------------------------------------------

    def _heed_turn(self, body: bytes) -> None:
        ticket = _ticket_of(body)
        queue = self._queues.get((ticket.owner, ticket.key))
        if queue is not None:
            queue.wake()
        if self._is_gone(ticket):  # somebody waits for it
            self._store.sessions.return_ticket(ticket)

    def _heed_stop(self, body: bytes) -> None:
        self._stop_here(_ticket_of(body))

    def _stop_here(self, ticket: interface_records.Ticket) -> None:
        queue = self._queues.get((ticket.owner, ticket.key))
        if queue is not None and ticket.number in queue.turns:
            queue.turns[ticket.number].stop()


def _rung(ticket: interface_records.Ticket) -> bytes:
    return msgspec.json.encode((ticket.owner, ticket.key, ticket.worker, ticket.number))


def _ticket_of(body: bytes) -> interface_records.Ticket:
    owner, key, worker, number = _ring.decode(body)
    return interface_records.Ticket(number=number, owner=owner, key=key, worker=worker)
