"""What outlives the process: the interface of a store, and the values that it keeps. No implementation.

There are two: `sqlite_store` (a file that all workers of the machine share) and `memory_store` (a twin for tests, and
for ``[store] path = ":memory:"``). The same contract tests run over both; a third may come for several machines.

The rules of every implementation:

* **A write is queued when it is called, in the order of the calls, and done when it is awaited.** So a ``finally``
  can write without waiting (``store.sessions.leave(ticket)``), and what has been awaited is durable: it survives
  SIGKILL and the loss of power. Each write is one transaction: all of it, or nothing.
* A write whose waiter is cancelled is done nevertheless.
* What a caller got wrong (the id of a run or a delivery that is there already) is a ValueError, of that write alone.
* A write or read that cannot be done raises `StoreUnavailable`, with the reason; the next one tries again. Nothing
  has to be restarted when the reason has gone.
* *Durable* is what a caller relies on after an acknowledgement. Tickets, beats and counters of channels are not: they
  are seen by the other workers at once, and may be lost with the machine's power.
* Times are POSIX seconds, given by the caller. Bodies are bytes of JSON, and are given back as they came.
* Owners, keys, ids and names are any text that UTF-8 can say. Nothing here judges who may see what: the owner is a part
  of the key.

**Units:** ``_at`` POSIX seconds, ``_tokens`` tokens.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Sequence
from typing import Protocol, TypeVar

from trigate.store.records import (
    ChannelRecord,
    Claim,
    Delivery,
    DeliveryState,
    ExchangeRecord,
    Message,
    Retention,
    Run,
    RunState,
    Session,
    SessionCounts,
    StoreStatistics,
    Ticket,
    Turn,
    Worker,
)

T_co = TypeVar("T_co", covariant=True)


class Write(Awaitable[T_co], Protocol[T_co]):
    """A write that is on its way. Awaiting it gives its result once it is done; it may be awaited once, or never.

    Raises (when awaited):
        StoreUnavailable: It was not done.
    """


# -- sessions ---------------------------------------------------------------------------------------------------------


class Sessions(Protocol):
    """Conversations, and the queues of their turns."""

    def take_ticket(self, owner: str, key: str, *, worker: str, run: str | None = None) -> Write[Ticket]:
        """Queues for a turn. Not durable. A run that stands in a queue already keeps its place, and gets that."""

    async def tickets(self, owner: str, key: str) -> Sequence[Ticket]:
        """The queue of a session, first come first; of all workers."""

    def leave(self, ticket: Ticket) -> Write[None]:
        """Gives a place back, unless another worker has taken it over (`Runs.adopt`). Not durable; to leave twice is no
        fault."""

    def append(self, turn: Turn, *, leave: Ticket | None = None) -> Write[Session]:
        """Appends a turn, and gives the ticket back in the same transaction."""

    async def get(self, owner: str, key: str) -> Session | None:
        """One session; None = there is none."""

    async def history(self, owner: str, key: str, *, last: int) -> tuple[Session, Sequence[Message]] | None:
        """A session and the last messages of its current epoch, oldest first; None = there is none."""

    async def messages(
        self, owner: str, key: str, *, limit: int, after: int = 0, archived: bool = False
    ) -> Sequence[Message] | None:
        """A page of messages behind the number ``after``, oldest first, of the current epoch or (``archived``) of all;
        None = there is no such session."""

    async def list(self, owner: str, *, limit: int, after: str | None = None) -> Sequence[Session]:
        """A page of an owner's sessions, the last active first, behind the one with the key ``after``; behind one that
        there is not, there is nothing."""

    async def count(self, *, active_since: float) -> SessionCounts:
        """Counts the sessions of all owners."""

    def reset(self, owner: str, key: str, *, at: float) -> Write[Session | None]:
        """Begins a new epoch, and keeps the old ones as the archive; None = there is no such session."""

    def delete(self, owner: str, key: str) -> Write[bool]:
        """Forgets a session with all its epochs; False = there is none. Its queue stays: who is in it makes it anew."""


# -- runs -------------------------------------------------------------------------------------------------------------


class Runs(Protocol):
    """What was asked for by messages, and what became of it."""

    def add(self, run: Run) -> Write[None]:
        """Keeps a run. Counts as *received* by its channel. (With an idempotency key: `Idempotency.claim`.)"""

    async def get(self, run_id: str) -> Run | None:
        """One run; None = there is none."""

    def acknowledge(self, run_id: str) -> Write[None]:
        """Promises a run that was not promised: from now on it is finished even if this process ends."""

    def start(self, run_id: str, *, worker: str) -> Write[bool]:
        """Notes that a run is being done now; False = it has ended already, or is somebody else's."""

    def finish(
        self,
        run_id: str,
        *,
        state: RunState,
        status: int,
        result: bytes,
        at: float,
        turn: Turn | None = None,
        leave: Ticket | None = None,
        deliveries: Iterable[Delivery] = (),
        frees_key: bool = False,
    ) -> Write[bool]:
        """Ends a run: its result, what it appends to its session, its place in the queue, and what is to be delivered,
        in one transaction. False = it had ended already, or is unknown, and nothing was done (but the place is given
        back). One that is completed with nothing to deliver counts as *replied* by its channel: who waited has the
        answer, or can fetch it.

        Args:
            frees_key: Its idempotency key, if it has one, stands for nothing from now on: it may be tried again.
        """

    def adopt(self, worker: str, *, dead: Iterable[str], at: float) -> Write[Sequence[Run]]:
        """Takes over from workers that have died: their acknowledged runs become this worker's, ``queued``, with their
        places in the queues of their sessions, and are returned. Their other runs end as ``failed`` with status 503,
        and their idempotency keys are free again: nobody was promised anything, and who asked will ask again."""

    async def unfinished(self, channel: str) -> int:
        """How many runs of a channel are queued or running, in all workers."""


# -- idempotency ------------------------------------------------------------------------------------------------------


class Idempotency(Protocol):
    """Keys that make sure that what is sent twice is done once."""

    def claim(self, scope: str, key: str, *, digest: bytes, run: Run) -> Write[Claim]:
        """Adds a run under a key, unless the key stands for one already. One of many that try at once succeeds.

        Args:
            scope: What the key is unique in (the hook).
            digest: Of the body; the same key with another body is a mistake.
        """


# -- deliveries -------------------------------------------------------------------------------------------------------


class Deliveries(Protocol):
    """The outbox."""

    def add(self, delivery: Delivery) -> Write[None]:
        """Keeps something to deliver. (That of a run's result: `Runs.finish`.)"""

    def take(self, worker: str, *, at: float, limit: int, channels: Iterable[str]) -> Write[Sequence[Delivery]]:
        """Takes what is due on these channels: it becomes ``sending``, by this worker, with one attempt more. Durable:
        what was not noted as begun must not have been sent.

        At most one of each target of a channel, the one that has been due for the longest; and none of a target to
        which something is being sent, by whichever worker. So each target gets one at a time, in order, and whatever
        is taken can be sent at once."""

    def note(
        self,
        delivery_id: str,
        *,
        state: DeliveryState,
        at: float,
        due_at: float | None = None,
        status: int = 0,
        error: str | None = None,
    ) -> Write[None]:
        """Notes how an attempt ended. ``delivered`` counts as *replied* by its channel, and is final: what comes later,
        from a worker that was thought dead, changes nothing."""

    def release(self, *, dead: Iterable[str]) -> Write[Sequence[Delivery]]:
        """What workers that have died were sending is pending again where it is repeatable, and else ``unknown``;
        returns them as they now are."""

    async def of_run(self, run_id: str) -> Sequence[Delivery]:
        """All of a run, in the order in which they were added."""

    async def next_due_at(self, channels: Iterable[str]) -> float | None:
        """When the next one of these channels can be taken, as things are: those that wait for another one to the same
        target are left out. None = there is none."""

    async def depth(self) -> dict[str, int]:
        """How many are pending or being sent, by channel; channels with none are left out."""


# -- channels and workers ---------------------------------------------------------------------------------------------


class Channels(Protocol):
    """What is kept of channels."""

    def advance(self, name: str, cursor: str) -> Write[None]:
        """Notes how far a channel has read its platform. Durable: what lies before is the store's now."""

    def count(self, name: str, *, at: float, received: int = 0, replied: int = 0) -> Write[None]:
        """Counts what is not counted by a run or a delivery. Not durable."""

    def hold(self, name: str, *, worker: str, dead: Iterable[str]) -> Write[bool]:
        """Makes a worker the one that reads the channel's platform, unless another one is that is not dead."""

    def let_go(self, name: str, *, worker: str) -> Write[None]:
        """Gives that up."""

    async def all(self) -> Sequence[ChannelRecord]:
        """Every channel that was ever noted, by name."""


class Workers(Protocol):
    """Who serves."""

    def beat(self, worker: Worker) -> Write[None]:
        """Says that a worker is there, and what it does. Not durable."""

    async def all(self) -> Sequence[Worker]:
        """Every worker that has not been removed, the oldest first."""

    def remove(self, ids: Iterable[str]) -> Write[None]:
        """Forgets workers, with their tickets and the channels that they held. What they were doing has to be adopted
        before (`Runs.adopt`, `Deliveries.release`)."""


# -- exchanges --------------------------------------------------------------------------------------------------------


class Exchanges(Protocol):
    """What became of the calls."""

    def put(self, records: Sequence[bytes]) -> Write[None]:
        """Keeps records, each as JSON (`ExchangeRecord.encode`), since who has them has them written so already. Of one
        that is there nothing is changed, unless it said ``lost``. Not durable."""

    async def list(
        self, *, limit: int, owner: str | None = None, outcome: str | None = None, after: str | None = None
    ) -> Sequence[ExchangeRecord]:
        """A page of them, the last kept first, behind the one with the id ``after``; behind one that there is not,
        there is nothing. ``owner`` None = everybody's."""


# -- the whole --------------------------------------------------------------------------------------------------------


class Store(Protocol):
    """All of it. Opened by `sqlite_store.open_sqlite_store` or `memory_store.open_memory_store`."""

    sessions: Sessions
    runs: Runs
    idempotency: Idempotency
    deliveries: Deliveries
    channels: Channels
    workers: Workers
    exchanges: Exchanges

    def prune(self, retention: Retention) -> Write[int]:
        """Forgets what may be forgotten; returns how many rows. Done in slices, so that no other write waits long."""

    async def check(self) -> None:
        """Raises `StoreUnavailable` where nothing could be written now."""

    def statistics(self) -> StoreStatistics:
        """How it is. Does not wait."""
