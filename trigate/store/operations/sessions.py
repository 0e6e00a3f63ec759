"""Operations on sessions, their messages, and the tickets that put their turns in order."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from trigate.store.interface import Write
from trigate.store.operations.transactions import Transactions
from trigate.store.records import Message, Session, SessionCounts, Ticket, Turn
from trigate.store.tables import Tables


def append_turn(tables: Tables, turn: Turn) -> Session:
    """Appends a turn to its session, which is created if there is none; returns the session as it is then.

    A turn of an earlier epoch (the session was reset while the turn was in progress) is added to the archive, and the
    session stays as it was.
    """
    owner, key = turn.owner, turn.key
    session = tables.session(owner, key) or Session(owner=owner, key=key, created_at=turn.at, active_at=turn.at)
    is_current = turn.epoch is None or turn.epoch >= session.epoch
    epoch = session.epoch if turn.epoch is None or is_current else turn.epoch
    if is_current:
        session = attrs.evolve(
            session,
            active_at=max(session.active_at, turn.at),
            turns=session.turns + 1,
            messages=session.messages + len(turn.messages),
            tokens=session.tokens + sum(message.tokens for message in turn.messages),
            system=session.system if turn.system is None else turn.system,
        )
        tables.put_session(session)
        number_of_turn = session.turns
    else:
        before = tables.last_message(owner, key, epoch)
        number_of_turn = before.turn + 1 if before else 1
    last = tables.last_message(owner, key)
    for number, message in enumerate(turn.messages, last.number + 1 if last else 1):
        tables.add_message(owner, key, attrs.evolve(message, number=number, epoch=epoch, turn=number_of_turn))
    return session


def _reset(tables: Tables, owner: str, key: str, at: float) -> Session | None:
    session = tables.session(owner, key)
    if session is None:
        return None
    begun = attrs.evolve(
        session,
        epoch=session.epoch + 1,
        active_at=max(session.active_at, at),
        turns=0,
        messages=0,
        tokens=0,
        system=b"[]",
    )
    tables.put_session(begun)
    return begun


@attrs.define(eq=False, slots=False)
class SessionOperations:
    """Implements `interface.Sessions`, which documents the methods."""

    _transactions: Transactions

    def take_ticket(self, owner: str, key: str, *, worker: str, run: str | None = None) -> Write[Ticket]:
        """Returns the ticket that the run has already, or a new one."""

        def operation(tables: Tables) -> Ticket:
            kept = tables.ticket_of(run) if run is not None else None
            return kept or tables.add_ticket(owner, key, worker, run)

        return self._transactions.write(operation, durable=False)

    async def tickets(self, owner: str, key: str) -> Sequence[Ticket]:
        """Returns the tickets, the lowest number first."""
        return await self._transactions.read(lambda tables: tables.tickets(owner, key))

    def return_ticket(self, ticket: Ticket) -> Write[None]:
        """Changes nothing if another worker has the ticket now."""
        return self._transactions.write(lambda tables: tables.drop_ticket(ticket), durable=False)

    def append(self, turn: Turn, *, ticket: Ticket | None = None) -> Write[Session]:
        """Returns the session, ``busy`` if other turns of it wait."""

        def operation(tables: Tables) -> Session:
            if ticket is not None:
                tables.drop_ticket(ticket)
            session = append_turn(tables, turn)
            return attrs.evolve(session, busy=bool(tables.tickets(turn.owner, turn.key)))

        return self._transactions.write(operation)

    async def get(self, owner: str, key: str) -> Session | None:
        return await self._transactions.read(lambda tables: tables.session(owner, key))

    async def history(self, owner: str, key: str, *, last: int) -> tuple[Session, Sequence[Message]] | None:
        """Reads the session and its messages in one transaction."""

        def operation(tables: Tables) -> tuple[Session, Sequence[Message]] | None:
            session = tables.session(owner, key)
            return None if session is None else (session, tables.history(owner, key, session.epoch, last=last))

        return await self._transactions.read(operation)

    async def messages(
        self, owner: str, key: str, *, limit: int, after: int = 0, archived: bool = False
    ) -> Sequence[Message] | None:

        def operation(tables: Tables) -> Sequence[Message] | None:
            session = tables.session(owner, key)
            if session is None:
                return None
            return tables.messages(owner, key, None if archived else session.epoch, limit=limit, after=after)

        return await self._transactions.read(operation)

    async def list(self, owner: str, *, limit: int, after: str | None = None) -> Sequence[Session]:
        """Returns an empty page if there is no session ``after``."""

        def operation(tables: Tables) -> Sequence[Session]:
            last = None if after is None else tables.session(owner, after)
            return [] if after is not None and last is None else tables.sessions(owner, limit=limit, after=last)

        return await self._transactions.read(operation)

    async def count(self, *, active_since: float) -> SessionCounts:
        return await self._transactions.read(lambda tables: tables.count_sessions(active_since))

    def reset(self, owner: str, key: str, *, at: float) -> Write[Session | None]:
        """Returns the session in its new epoch."""
        return self._transactions.write(lambda tables: _reset(tables, owner, key, at))

    def delete(self, owner: str, key: str) -> Write[bool]:
        """Keeps the tickets of the session."""
        return self._transactions.write(lambda tables: tables.drop_session(owner, key) > 0)
