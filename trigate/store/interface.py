"""The interface of a store: protocols without an implementation. The values that it keeps are in `records`.

There are two stores: `sqlite` (a file that all workers of the machine share) and `memory` (for tests, and for
``[store] path = ":memory:"``). The same contract tests run over both. A third may come for several machines.

The rules of every implementation:

* **A write is queued when it is called, in the order of the calls, and done when awaiting it returns.** So a
  ``finally`` can write without waiting (``store.sessions.return_ticket(ticket)``). A durable write that was awaited
  survives SIGKILL and a power failure. Each write is one transaction: all of it is done, or nothing.
* Cancelling the task that awaits a write does not cancel the write.
* A mistake of the caller (the id of a run or a delivery that exists already) is a ValueError of that write alone.
* A write or read that cannot be done raises `StoreUnavailable` with the reason. The next one tries again: once the
  reason is gone, the store works without a restart.
* *Durable* matters for what is promised to a client. Tickets, heartbeats and counters of channels are not durable: the
  other workers see them at once, but a power failure may lose them.
* The caller gives the times. Bodies are JSON as bytes, and are returned unchanged.
* Owners, keys, ids and names are any text that UTF-8 can encode. The store does not check access rights: the owner is a
  part of the key.

**Units:** ``_at`` POSIX seconds, ``_tokens`` tokens.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from trigate.store.records import (
    ChannelRecord,
    Claim,
    Delivery,
    DeliveryState,
    ExchangeRecord,
    Lease,
    LeaseWish,
    LoadedKey,
    Message,
    ReasoningRecord,
    Retention,
    Run,
    RunState,
    Session,
    SessionCounts,
    StoredResponse,
    StoreStatistics,
    Ticket,
    Turn,
    UpstreamObject,
    VirtualKey,
    Worker,
)
from trigate.store.reports import ExchangeQuery, UsageColumn, UsageTotals

T_co = TypeVar("T_co", covariant=True)


class Write(Awaitable[T_co], Protocol[T_co]):
    """A queued write. Awaiting it returns its result once it is done. It may be awaited once, or never.

    Raises (when awaited):
        StoreUnavailable: The write was not done.
    """


# -- sessions ---------------------------------------------------------------------------------------------------------


class Sessions(Protocol):
    """Conversations, and the tickets that put their turns in order."""

    def take_ticket(self, owner: str, key: str, *, worker: str, run: str | None = None) -> Write[Ticket]:
        """Queues for a turn. Not durable. A run that has a ticket already gets that one."""

    async def tickets(self, owner: str, key: str) -> Sequence[Ticket]:
        """Returns the tickets of a session, of all workers, the first in the queue first."""

    def return_ticket(self, ticket: Ticket) -> Write[None]:
        """Returns a ticket, unless another worker has adopted it (`Runs.adopt`). Not durable. Returning it twice is
        allowed."""

    def append(self, turn: Turn, *, ticket: Ticket | None = None) -> Write[Session]:
        """Appends a turn, and returns its ticket in the same transaction.

        Returns:
            The session as it is then; ``busy`` = other turns wait.
        """

    async def get(self, owner: str, key: str) -> Session | None:
        """Returns one session; None = there is none."""

    async def history(self, owner: str, key: str, *, last: int) -> tuple[Session, Sequence[Message]] | None:
        """Returns a session and the last messages of its current epoch, oldest first; None = there is no such
        session."""

    async def messages(
        self, owner: str, key: str, *, limit: int, after: int = 0, archived: bool = False
    ) -> Sequence[Message] | None:
        """Returns a page of messages behind the number ``after``, oldest first, of the current epoch or (``archived``)
        of all epochs; None = there is no such session."""

    async def list(self, owner: str, *, limit: int, after: str | None = None) -> Sequence[Session]:
        """Returns a page of an owner's sessions, the last active first, behind the one with the key ``after``; an empty
        page if there is no such session."""

    async def count(self, *, active_since: float) -> SessionCounts:
        """Counts the sessions of all owners."""

    def reset(self, owner: str, key: str, *, at: float) -> Write[Session | None]:
        """Begins a new epoch; the messages of the earlier ones are the archive. None = there is no such session."""

    def delete(self, owner: str, key: str) -> Write[bool]:
        """Deletes a session with all its epochs; False = there is none. Its tickets stay: the turns that hold them
        create the session again."""


# -- runs -------------------------------------------------------------------------------------------------------------


class Runs(Protocol):
    """Runs: the answers that messages asked for."""

    def add(self, run: Run) -> Write[None]:
        """Adds a run, and counts it as *received* by its channel. (With an idempotency key: `Idempotency.claim`.)

        Raises (when awaited):
            ValueError: There is a run with this id.
        """

    async def get(self, run_id: str) -> Run | None:
        """Returns one run; None = there is none."""

    def acknowledge(self, run_id: str) -> Write[None]:
        """Marks a run as acknowledged: from now on it is finished even if this process exits."""

    def start(self, run_id: str, *, worker: str) -> Write[bool]:
        """Notes that a run is executed now; False = it has ended already, or belongs to another worker."""

    def finish(
        self,
        run_id: str,
        *,
        state: RunState,
        status: int,
        result: bytes,
        at: float,
        turn: Turn | None = None,
        ticket: Ticket | None = None,
        deliveries: Iterable[Delivery] = (),
        frees_key: bool = False,
    ) -> Write[bool]:
        """Ends a run. One transaction stores its result, appends a turn to its session, returns the session's ticket,
        and adds deliveries. A run that is completed without deliveries counts as *replied* by its channel, since the
        client that waited has the answer or can fetch it.

        Args:
            ticket: Returned in any case, also if the run had ended.
            frees_key: Frees the run's idempotency key, so that the message may be sent again.

        Returns:
            False = the run had ended already, or is unknown: nothing but the ticket has changed.

        Raises (when awaited):
            ValueError: There is a delivery with one of these ids.
        """

    def adopt(self, worker: str, *, dead: Iterable[str], at: float) -> Write[Sequence[Run]]:
        """Takes over from workers that exited. Their acknowledged runs become this worker's, ``queued``, keep their
        tickets, and are returned. Their other runs end as ``failed`` with status 503, and their idempotency keys become
        free: these runs were not acknowledged, so the client will send the message again."""

    async def unfinished(self, channel: str) -> int:
        """Counts the runs of a channel that are queued or running, in all workers."""


# -- idempotency ------------------------------------------------------------------------------------------------------


class Idempotency(Protocol):
    """Keys by which a message that is sent twice is answered by one run."""

    def claim(self, scope: str, key: str, *, digest: bytes, run: Run) -> Write[Claim]:
        """Adds a run under a key, unless the key stands for a run already. Of several concurrent claims, one succeeds.

        Args:
            scope: The key is unique within it (the hook).
            digest: Of the body. The same key with another body is a mistake of the client (`Claim.differs`).
        """


# -- deliveries -------------------------------------------------------------------------------------------------------


class Deliveries(Protocol):
    """The outbox: messages to the outside, and the state of sending them."""

    def add(self, delivery: Delivery) -> Write[None]:
        """Adds a delivery. (Those of a run's result: `Runs.finish`.)

        Raises (when awaited):
            ValueError: There is a delivery with this id.
        """

    def take(self, worker: str, *, at: float, limit: int, channels: Iterable[str]) -> Write[Sequence[Delivery]]:
        """Takes deliveries that are due on these channels. They become ``sending``, by this worker, with one more
        attempt. Durable: an attempt must be noted before anything is sent.

        At most one delivery for each target of a channel is taken, the one that has been due for the longest, and none
        for a target to which any worker is sending. So each target gets one delivery at a time, in order, and every
        delivery that is returned can be sent at once."""

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
        """Notes how an attempt ended. ``delivered`` counts as *replied* by the channel, and is final: a later note,
        from a worker that was taken for dead, changes nothing."""

    def release(self, *, dead: Iterable[str]) -> Write[Sequence[Delivery]]:
        """Releases the deliveries that workers which exited were sending: a repeatable one is ``pending`` again, any
        other is ``unknown``. Returns them as they are now."""

    async def of_run(self, run_id: str) -> Sequence[Delivery]:
        """Returns the deliveries of a run, in the order in which they were added."""

    async def next_due_at(self, channels: Iterable[str]) -> float | None:
        """Returns when the next delivery of these channels can be taken, leaving out those whose target is being sent
        to. None = there is none."""

    async def depth(self) -> dict[str, int]:
        """Counts the deliveries that are pending or being sent, by channel; channels without any are left out."""


# -- channels and workers ---------------------------------------------------------------------------------------------


class Channels(Protocol):
    """Cursors, counters and holders of channels."""

    def advance(self, name: str, cursor: str) -> Write[None]:
        """Notes how far a channel has read its platform. Durable: the platform may delete what lies before the
        cursor."""

    def count(self, name: str, *, at: float, received: int = 0, replied: int = 0) -> Write[None]:
        """Counts events that neither a run nor a delivery counts. Not durable."""

    def hold(self, name: str, *, worker: str, dead: Iterable[str]) -> Write[bool]:
        """Makes a worker the one that reads the channel's platform. False = another worker, which is not in ``dead``,
        is."""

    def let_go(self, name: str, *, worker: str) -> Write[None]:
        """Ends `hold`. Changes nothing if another worker holds the channel."""

    async def all(self) -> Sequence[ChannelRecord]:
        """Returns every channel that was ever noted, by name."""


class Workers(Protocol):
    """The workers that share the store."""

    def heartbeat(self, worker: Worker) -> Write[None]:
        """Stores a worker's heartbeat: that it runs, and its snapshot. Not durable."""

    async def all(self) -> Sequence[Worker]:
        """Returns every worker that has not been removed, the oldest first."""

    def remove(self, ids: Iterable[str]) -> Write[None]:
        """Deletes workers with their tickets, and releases the channels that they held. Their work must have been
        adopted before (`Runs.adopt`, `Deliveries.release`)."""


# -- exchanges --------------------------------------------------------------------------------------------------------


class Exchanges(Protocol):
    """The records of exchanges."""

    def put(self, records: Sequence[bytes]) -> Write[None]:
        """Adds records, each as JSON (`ExchangeRecord.encode`): the ledger has encoded them for its journal already. A
        record whose id exists is ignored, unless the stored one is ``lost``. Not durable."""

    async def list(
        self, query: ExchangeQuery = ..., *, limit: int, after: str | None = None
    ) -> Sequence[ExchangeRecord]:
        """Returns a page of records, the last added first, behind the one with the id ``after``; an empty page if
        there is no such record."""

    async def usage(
        self,
        columns: Sequence[UsageColumn],
        first: int,
        end: int,
        *,
        owner: str | None = None,
        model: str | None = None,
    ) -> Sequence[UsageTotals]:
        """Returns the use within some hours (numbers since 1970; ``end`` is not one of them), with one value for each
        combination of values in some columns. The use is that of all records that were ever added, deleted ones
        included."""

    async def hours_used(self) -> tuple[int, int] | None:
        """Returns the first and the last hour with use; None = there is none."""


# -- objects of upstreams ---------------------------------------------------------------------------------------------


class Objects(Protocol):
    """Which upstream has an object, and which key made it."""

    def note(self, objects: Sequence[UpstreamObject], *, durable: bool = True) -> Write[None]:
        """Notes objects. One that is noted already, for the same upstream, keeps its owner."""

    async def find(self, ids: Sequence[str]) -> Sequence[UpstreamObject]:
        """Returns the objects with these ids, of all owners and upstreams."""

    def drop(self, object_id: str, upstream: str) -> Write[None]:
        """Forgets an object. Not durable."""


# -- reasoning --------------------------------------------------------------------------------------------------------


class Reasoning(Protocol):
    """What is remembered of the reasoning before tool calls."""

    def put(self, entries: Sequence[ReasoningRecord], *, most: int) -> Write[None]:
        """Keeps entries; of all owners, the oldest ones in excess of ``most`` are deleted. Not durable."""

    async def get(self, owner: str, calls: Sequence[str], *, since: float) -> Mapping[str, bytes]:
        """Returns the values of an owner's calls that were kept since a time, by the ids of the calls."""


# -- responses --------------------------------------------------------------------------------------------------------


class Responses(Protocol):
    """Responses that are kept for clients. One of another owner is absent."""

    def put(self, response: StoredResponse) -> Write[None]:
        """Stores a response, or replaces the one with its id."""

    async def get(self, owner: str | None, response_id: str) -> StoredResponse | None:
        """Returns one response, of any owner if that is None; None = there is none."""

    def delete(self, owner: str, response_id: str) -> Write[bool]:
        """Deletes a response; False = there is none."""


# -- quotas -----------------------------------------------------------------------------------------------------------


class Quotas(Protocol):
    """The limits that all workers share: which part of them each worker has.

    The parts of all workers, and what has been spent of a budget, are never more than the limit together. A record of
    an exchange that is added (`Exchanges.put`) moves its cost from the part of its worker to what has been spent.
    """

    def lease(self, wish: LeaseWish) -> Write[Lease]:
        """Adds to the part of a worker, as much as is free. Not durable."""

    def give_back(self, wish: LeaseWish, amount: int) -> Write[None]:
        """Takes an amount from the part of a worker. Of a rate, all of it may be used at once. Not durable."""

    async def spent(self, scope: str, *, first_day: int, end_day: int) -> int:
        """Returns what a scope has spent in a period, in micro-dollars: the sum of the records in the store."""


# -- keys -------------------------------------------------------------------------------------------------------------


class Keys(Protocol):
    """Keys that are made at run time, all of them: revoked ones keep their names."""

    def add(self, key: VirtualKey) -> Write[bool]:
        """Adds a key; False = there is, or was, one of that name."""

    def change(self, key_id: str, changes: Mapping[str, Any]) -> Write[VirtualKey | None]:
        """Sets fields of a key; None = there is none, or it is revoked."""

    async def get(self, key: str) -> VirtualKey | None:
        """Returns a key by its id or its name; None = there is none."""

    async def list(self, *, limit: int, after: str | None = None) -> Sequence[VirtualKey]:
        """Returns keys, the newest first.

        Args:
            after: Only those that are older than the one with this id.
        """

    async def since(self, version: int) -> Sequence[LoadedKey]:
        """Returns the keys that have changed since a version, in the order of the changes; with 0, all that are not
        revoked."""


# -- the store --------------------------------------------------------------------------------------------------------


class Store(Protocol):
    """A store. Opened by `sqlite.open_sqlite_store` or `memory.open_memory_store`; `opening.open_store` chooses."""

    sessions: Sessions
    runs: Runs
    idempotency: Idempotency
    deliveries: Deliveries
    channels: Channels
    workers: Workers
    exchanges: Exchanges
    objects: Objects
    reasoning: Reasoning
    responses: Responses
    quotas: Quotas
    keys: Keys

    def secret(self, name: str, new: bytes) -> Write[bytes]:
        """Returns a secret of the gateway, the same in all workers and after each restart; ``new`` becomes it if there
        is none."""

    def prune(self, retention: Retention) -> Write[int]:
        """Deletes what the retention does not keep; returns how many rows. It works in slices, so that no other write
        waits long."""

    async def check(self) -> None:
        """Checks that the store can be written to.

        Raises:
            StoreUnavailable: It cannot.
        """

    def statistics(self) -> StoreStatistics:
        """Returns the state of the store. Never blocks."""
