"""What the store keeps: values."""

from __future__ import annotations

import builtins
from typing import Literal

import attrs
import msgspec

_json = msgspec.json.Encoder()

RunState = Literal["queued", "running", "completed", "failed", "cancelled"]


DeliveryState = Literal["pending", "sending", "delivered", "failed", "unknown"]


ENDED: frozenset[RunState] = frozenset(("completed", "failed", "cancelled"))
"""The states of a run that it does not leave any more."""


@attrs.frozen(kw_only=True)
class Session:
    """A conversation that is remembered.

    Attributes:
        owner: Who made it; a part of its identity.
        key: What its owner calls it.
        active_at: When something was appended to it last, or it was reset.
        epoch: How often it has been reset. Messages of earlier epochs are its archive.
        turns, messages, tokens: Of the current epoch.
        system: The system messages that its history begins with, as a JSON array; ``b"[]"`` = none, as after a reset.
        busy: A turn is in progress, or waits.
    """

    owner: str
    key: str
    created_at: float
    active_at: float
    epoch: int = 0
    turns: int = 0
    messages: int = 0
    tokens: int = 0
    system: bytes = attrs.field(default=b"[]", repr=False)
    busy: bool = False


@attrs.frozen(kw_only=True)
class Message:
    """One message of a session.

    Attributes:
        number: Ascending in the session; 0 until it is stored.
        turn: Which turn of its epoch brought it, from 1; 0 until it is stored.
        body: The message, a JSON object as OpenAI's API has it.
        tokens: Reported, or estimated.
        partial: It is an answer that was cut.
    """

    body: bytes = attrs.field(repr=False)
    tokens: int
    at: float
    partial: bool = False
    number: int = 0
    epoch: int = 0
    turn: int = 0


@attrs.frozen(kw_only=True)
class Turn:
    """What one turn appends to a session; makes the session where there is none.

    Attributes:
        system: The system messages from now on, as a JSON array; None = as they were.
        epoch: The epoch that it was composed in; None = whichever it is. Where the session has been reset since, the
            messages go to the archive, where they belong.
    """

    owner: str
    key: str
    messages: tuple[Message, ...]
    at: float
    system: bytes | None = attrs.field(default=None, repr=False)
    epoch: int | None = None


@attrs.frozen(kw_only=True)
class Ticket:
    """A place in the queue of a session's turns. The lowest number is the one whose turn it is.

    Attributes:
        run: The run that it is for; None = a call with ``x-session-key``.
    """

    number: int
    owner: str
    key: str
    worker: str
    run: str | None = None


@attrs.frozen(kw_only=True)
class SessionCounts:
    """How many sessions there are, how many are active, and how many are busy.

    One whose first turn is in progress is one already. Active is what is busy, or was active since a given time.
    """

    total: int
    active: int
    busy: int


@attrs.frozen(kw_only=True)
class Run:
    """One answer that a message asked for.

    Attributes:
        id: ``run_…``.
        channel: The hook or channel that it came by.
        owner, session: Whose session it belongs to, and its key; session None = it belongs to none.
        action: What was asked: ``chat`` and so on.
        request: What is needed to do it, as JSON; its shape is of `orders`.
        acknowledged: It has been promised (202): it is finished even if this process ends.
        worker: Who does it.
        starts: How often it has been begun.
        status: The HTTP status of its result; 0 = it has none yet.
        result: The body of its result, as JSON (of the answer, or of the error).
    """

    id: str
    channel: str
    owner: str
    session: str | None
    action: str
    request: bytes = attrs.field(repr=False)
    state: RunState
    acknowledged: bool
    worker: str
    created_at: float
    starts: int = 0
    finished_at: float | None = None
    status: int = 0
    result: bytes = attrs.field(default=b"", repr=False)


@attrs.frozen(kw_only=True)
class Claim:
    """What came of an attempt to claim a key.

    Attributes:
        run: The run that the key stands for: the one given, or an older one.
        is_new: It is the one given.
        differs: The older one was asked for with another body.
    """

    run: Run
    is_new: bool
    differs: bool = False


@attrs.frozen(kw_only=True)
class Delivery:
    """Something that has to be told to the outside.

    Attributes:
        id: ``msg_…``; the same at each attempt, so that the receiver can tell a repetition.
        channel: The hook or channel that sends it, and knows how.
        target: Where to: a URL, a chat.
        repeatable: The receiver can tell a repetition by the id. What is not is never sent again after a crash, since
            it may have arrived: it is then ``unknown``.
        state: ``pending`` → ``sending`` → ``delivered``, ``failed`` or ``unknown``; or ``pending`` again.
        due_at: When the next attempt is due.
        last_status: The HTTP status of the last attempt; 0 = there was none.
    """

    id: str
    run_id: str
    channel: str
    target: str
    body: bytes = attrs.field(repr=False)
    created_at: float
    due_at: float
    repeatable: bool = True
    state: DeliveryState = "pending"
    attempts: int = 0
    worker: str | None = None
    last_status: int = 0
    last_error: str | None = None
    done_at: float | None = None


@attrs.frozen(kw_only=True)
class ChannelRecord:
    """What is kept of a channel.

    Attributes:
        cursor: How far it has read its platform (an offset); ``""`` = from the beginning.
        received, replied: Counted since the channel was first seen.
        holder: The worker that reads the platform; None = nobody.
    """

    name: str
    cursor: str = ""
    received: int = 0
    replied: int = 0
    last_event_at: float | None = None
    holder: str | None = None


@attrs.frozen(kw_only=True)
class Worker:
    """A process that serves.

    Attributes:
        id: Random; another one after each start.
        address: Where it can be rung (`bell`).
        snapshot: What it says of itself, as JSON; its shape is of `report`.
    """

    id: str
    pid: int
    address: str
    started_at: float
    seen_at: float
    snapshot: bytes = attrs.field(default=b"{}", repr=False)


LOST = "lost"
"""The outcome of an exchange whose process ended before it did."""


class AttemptRecord(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What became of one attempt of an exchange. Times in seconds.

    Attributes:
        why: Why it was made, as `plans.Step` has it.
        started_s: After the exchange began.
        outcome: As that of `attempt.Attempt`.
        status: Of the error that it ended with; None = it ended with none.
    """

    target: str
    why: str
    started_s: float
    duration_s: float | None
    outcome: str
    status: int | None
    first_content_s: float | None


class ExchangeRecord(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What became of one exchange. A structure of msgspec and not of attrs, since there is one for each call: it is
    written and read as an array of JSON, in C.

    Attributes:
        id: ``ex_…``; of the exchange alone, whatever a client has called it.
        request_id: ``x-request-id``.
        owner: The name of the gateway key; empty = the gateway has none.
        ended_at: None = nobody knows.
        outcome: ``complete``, ``cancelled``, ``finished``, ``lost``, or an error code.
        status: Of the answer, or of the error that came in its place or behind a part of it; None = nobody waited for
            one.
        target: The last one that was tried, or the one that answered.
        attempts: In order.
        counted: No upstream has reported the tokens: they are counted.
        first_content_s: How long after the start.
    """

    id: str
    request_id: str
    owner: str
    worker: str
    endpoint: str
    model: str
    stream: bool
    started_at: float
    ended_at: float | None = None
    outcome: str = LOST
    status: int | None = None
    target: str | None = None
    attempts: tuple[AttemptRecord, ...] = ()
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    counted: bool = False
    events: int = 0
    bytes: int = 0
    first_content_s: float | None = None

    def encode(self) -> builtins.bytes:
        """The record as an array of JSON."""
        return _json.encode(self)


@attrs.frozen(kw_only=True)
class StoreStatistics:
    """How a store is.

    Attributes:
        state: ``closed`` = nothing has needed it yet.
        error: Why it is unavailable.
    """

    kind: str
    path: str
    state: Literal["closed", "open", "unavailable"]
    error: str | None = None


@attrs.frozen(kw_only=True)
class Retention:
    """What may be forgotten. Runs that have not ended, and deliveries that are not done, never are.

    Attributes:
        sessions_before: Sessions that were last active before that time, and are not busy.
        archives_before: Messages of earlier epochs, from before that time.
        runs_before: Runs that ended before that time, with their deliveries and idempotency keys; and deliveries that
            were done before it, and belong to no run.
        exchanges_before: Records of exchanges from before that time.
        max_sessions, max_runs, max_exchanges: The oldest beyond so many, of all owners.
    """

    sessions_before: float
    archives_before: float
    runs_before: float
    max_sessions: int
    max_runs: int
    exchanges_before: float
    max_exchanges: int
