"""The values that the store keeps, and those that its operations take and return.

**Units:** times that end in ``_at`` are POSIX seconds, ``_s`` seconds.
"""

from __future__ import annotations

import builtins
from typing import Annotated, Literal, NamedTuple

import attrs
import msgspec

_json = msgspec.json.Encoder()

Integer = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""An integer that SQLite can store. What a damaged journal has in its place is refused when it is decoded."""

RunState = Literal["queued", "running", "completed", "failed", "cancelled"]

DeliveryState = Literal["pending", "sending", "delivered", "failed", "unknown"]

ENDED: frozenset[RunState] = frozenset(("completed", "failed", "cancelled"))
"""The final states of a run."""


@attrs.frozen(kw_only=True)
class Session:
    """A remembered conversation.

    Attributes:
        owner: The name of the gateway key that created it; a part of its identity.
        key: Its name, given by the owner.
        active_at: When a turn was last appended, or the session was reset.
        epoch: How often it has been reset. The messages of earlier epochs are its archive.
        turns, messages, tokens: Counts of the current epoch.
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
        number: Ascending within the session; 0 until it is stored.
        turn: The number of the turn that appended it, within its epoch, from 1; 0 until it is stored.
        body: The message, a JSON object of OpenAI's API.
        tokens: Reported by the upstream, or estimated.
        partial: It is a truncated answer.
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
    """What one turn appends to a session. Creates the session if there is none.

    Attributes:
        system: The system messages from now on, as a JSON array; None = they do not change.
        epoch: The epoch in which the turn was composed; None = the current one. If the session has been reset since,
            the messages are added to the archive.
    """

    owner: str
    key: str
    messages: tuple[Message, ...]
    at: float
    system: bytes | None = attrs.field(default=None, repr=False)
    epoch: int | None = None


@attrs.frozen(kw_only=True)
class Ticket:
    """A position in the queue of a session's turns. The turn with the lowest number may run.

    Attributes:
        run: The run that holds it; None = a call with ``x-session-key``.
    """

    number: int
    owner: str
    key: str
    worker: str
    run: str | None = None


@attrs.frozen(kw_only=True)
class SessionCounts:
    """How many sessions there are, how many are active, and how many are busy.

    A session whose first turn is in progress counts. Active = busy, or active since a given time.
    """

    total: int
    active: int
    busy: int


@attrs.frozen(kw_only=True)
class Run:
    """A durable job that a message asked for.

    Attributes:
        id: ``run_…``.
        channel: The hook or channel that received the message.
        owner, session: The owner and the key of its session; session None = it has none.
        action: The kind of job: ``chat`` and so on.
        request: What is needed to execute it, as JSON; `trigate.runs.request` defines the shape.
        acknowledged: The client has been promised a result (202): the run is finished even if this process exits.
        worker: The worker that executes it.
        starts: How often its execution has begun.
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
    """The result of claiming an idempotency key.

    Attributes:
        run: The run that the key stands for: the given one, or an older one.
        is_new: It is the given one.
        differs: The older run was asked for with another body.
    """

    run: Run
    is_new: bool
    differs: bool = False


@attrs.frozen(kw_only=True)
class Delivery:
    """A message to the outside: a callback, a reply in a chat.

    Attributes:
        id: ``msg_…``; the same at each attempt, so that the receiver can recognise a repetition.
        channel: The hook or channel that sends it.
        target: Its destination: a URL, a chat.
        repeatable: The receiver recognises a repetition by the id. A delivery that is not repeatable is never sent
        again
            after a crash, since it may have arrived: it is then ``unknown``.
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
    """The stored state of a channel.

    Attributes:
        cursor: How far it has read its platform (an offset); ``""`` = it has read nothing.
        received, replied: Counted since the channel was first seen.
        holder: The worker that reads the platform; None = no worker does.
    """

    name: str
    cursor: str = ""
    received: int = 0
    replied: int = 0
    last_event_at: float | None = None
    holder: str | None = None


@attrs.frozen(kw_only=True)
class Worker:
    """A worker process.

    Attributes:
        id: Random; a new one at each start.
        address: The path of its notification socket (`trigate.workers.notify`); empty = it has none.
        snapshot: What it reports in `/status`, as JSON; `trigate.status.snapshot` defines the shape.
    """

    id: str
    pid: int
    address: str
    started_at: float
    seen_at: float
    snapshot: bytes = attrs.field(default=b"{}", repr=False)


@attrs.frozen(kw_only=True)
class UpstreamObject:
    """An object that an upstream keeps for a client: a file, a batch, a stored answer.

    Attributes:
        id: Given by the upstream, and unique there only.
        upstream: The upstream's name.
        owner: The name of the gateway key that it was made with; empty = the gateway had no keys.
        at: When it was noted.
    """

    id: str
    upstream: str
    owner: str
    at: float


@attrs.frozen
class ReasoningRecord:
    """What is remembered for a tool call.

    Attributes:
        owner: The name of the gateway key whose call was answered; empty = the gateway has no keys.
        call: The id of the tool call.
        value: As `trigate.exchange.reasoning_memory` encodes it.
    """

    owner: str
    call: str
    at: float
    value: bytes = attrs.field(repr=False)


@attrs.frozen
class VirtualKey:
    """A key that was made at run time.

    Attributes:
        id: ``key_…``.
        name: Unique, also among revoked keys.
        digest: The SHA-256 digest of its secret.
        shown: The beginning of its secret, by which people recognise it.
        settings: As `trigate.config.key_sections.KeySettings`: a JSON object.
        revoked_at: None = it is not.
        old_digest: The digest of the secret before the last rotation, which is valid until ``old_until``; empty = none.
    """

    id: str
    name: str
    digest: bytes = attrs.field(repr=False)
    shown: str
    settings: bytes
    created_at: float
    revoked_at: float | None = None
    old_digest: bytes = attrs.field(default=b"", repr=False)
    old_until: float = 0.0


class LoadedKey(NamedTuple):
    """A `VirtualKey` as each worker holds it: as many of them as there are keys. The attributes are those of the key.

    Attributes:
        version: Of all keys, that of the last change is the greatest.
    """

    id: str
    name: str
    version: int
    digest: bytes
    settings: bytes
    old_digest: bytes
    old_until: float
    is_revoked: int


@attrs.frozen(kw_only=True)
class StoredResponse:
    """A response that the gateway keeps for a client (the Responses API).

    Attributes:
        owner: The name of the gateway key that it was made with; empty = the gateway had no keys.
        at: When it was made.
        worker: The worker that makes it; empty = it has ended.
        body: The response, a JSON object.
        input: The items of its input and of all responses that it continues, a JSON array.
        events: The events of its stream, if they can be asked for.
    """

    id: str
    owner: str
    at: float
    worker: str = ""
    body: bytes = attrs.field(repr=False)
    input: bytes = attrs.field(repr=False)
    events: bytes = attrs.field(default=b"", repr=False)


@attrs.frozen(kw_only=True)
class LeaseWish:
    """What a worker wants of a limit that all workers share.

    Attributes:
        name: Of the limit (``key:ada/rpm``).
        scope: Whose limit it is (``key:ada``).
        worker: Its id, the same as in the records of its exchanges.
        limit: Of all workers together.
        least: What it needs now.
        most: What it takes, if there is as much.
        is_rate: The limit is one per minute: what has been used comes back.
        first_day, end_day: The period of a budget, in days since 1970; both 0 = it is none.
    """

    name: str
    scope: str
    worker: str
    limit: int
    least: int
    most: int
    at: float
    is_rate: bool = False
    first_day: int = 0
    end_day: int = 0


@attrs.frozen(kw_only=True)
class Lease:
    """What a worker has got of a limit.

    Attributes:
        amount: In addition to what it had.
        tokens: Of a rate: how much of the amount may be used at once.
        others: What other workers have.
        spent: Of a budget: what has been spent in its period by records that are in the store.
        held: All that the worker has, less what its records in the store have cost.
    """

    amount: int
    tokens: float
    others: int
    spent: int
    held: int


LOST = "lost"
"""The outcome of an exchange whose process exited before the exchange ended."""


class AttemptRecord(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The record of one attempt of an exchange. Times in seconds.

    Attributes:
        why: Why it was made; the values are those of `trigate.routing.plan.Step`.
        started_s: Time from the start of the exchange.
        outcome: How it ended; the values are those of `trigate.exchange.attempt.Attempt`.
        status: The status of the error that it ended with; None = it ended without one.
        requested_s, head_s, first_content_s: Time from its own start until its request was about to be sent, until the
            head of its reply was there, and until its first content was; None = that did not happen.
    """

    target: str
    why: str
    started_s: float
    duration_s: float | None
    outcome: str
    status: int | None
    first_content_s: float | None
    requested_s: float | None = None
    head_s: float | None = None


class ExchangeRecord(msgspec.Struct, kw_only=True, array_like=True):
    """The record of one exchange. It is a msgspec structure and not an attrs class, since there is one for each call:
    msgspec encodes and decodes it as a JSON array, in C. It is made when the exchange begins, and completed when it has
    ended (`exchange.record`).

    Attributes:
        id: ``ex_…``; unique, unlike ``request_id``, which a client may choose.
        request_id: ``x-request-id``.
        owner: The name of the gateway key; empty = the gateway has none.
        ended_at: None = unknown (the exchange is ``lost``).
        outcome: ``complete``, ``cancelled``, ``finished``, ``lost``, or an error code.
        status: Of the answer, or of the error that was sent instead of it or after a part of it; None = there was no
            client to answer.
        target: The target that answered, or the last one that was tried.
        attempts: In the order in which they began.
        counted: No upstream has reported the tokens: the gateway has counted or estimated them.
        first_content_s: Time from the start to the first content.
        key_group: The group of the key; empty = it has none.
        cached_tokens, cache_write_tokens: How many of the prompt's tokens the provider read from its cache, or wrote
            into it.
        reasoning_tokens: How many of the answer's tokens are reasoning.
        cost: Micro-dollars; None = the price is not known.
        alias: The name of the ``[models.NAME]`` that serves its model; empty = there is none.
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
    status: Integer | None = None
    target: str | None = None
    attempts: tuple[AttemptRecord, ...] = ()
    prompt_tokens: Integer | None = None
    completion_tokens: Integer | None = None
    counted: bool = False
    events: Integer = 0
    bytes: Integer = 0
    first_content_s: float | None = None
    key_group: str = ""
    cached_tokens: Integer = 0
    cache_write_tokens: Integer = 0
    reasoning_tokens: Integer = 0
    cost: Integer | None = None
    alias: str = ""

    def encode(self) -> builtins.bytes:
        """Returns the record as a JSON array."""
        return _json.encode(self)


@attrs.frozen(kw_only=True)
class StoreStatistics:
    """The state of a store.

    Attributes:
        state: ``closed`` = nothing has needed the file yet.
        error: Why it is unavailable; None = it is available.
        writes: How many groups of writes this worker has committed, or failed to.
        write_s: How long these have taken, in all.
    """

    kind: str
    path: str
    state: Literal["closed", "open", "unavailable"]
    error: str | None = None
    writes: int = 0
    write_s: float = 0.0


@attrs.frozen(kw_only=True)
class Retention:
    """What `Store.prune` deletes. It never deletes runs that have not ended, or deliveries that are not done.

    Attributes:
        sessions_before: Sessions that were last active before this time, and are not busy.
        archives_before: Messages of earlier epochs that are older than this time.
        runs_before: Runs that ended before this time, with their deliveries and idempotency keys, and deliveries of no
            run that were done before it.
        exchanges_before, usage_before: Records of exchanges that began before this time; the use per hour before it.
        objects_before: Objects of upstreams that were noted before this time.
        reasoning_before, responses_before: Reasoning and responses that were made before this time.
        max_sessions, max_runs, max_exchanges, max_objects, max_responses: How many are kept, of all owners; the oldest
            ones in excess are deleted.
    """

    sessions_before: float
    archives_before: float
    runs_before: float
    max_sessions: int
    max_runs: int
    exchanges_before: float
    max_exchanges: int
    objects_before: float = 0.0
    max_objects: int = 2**63 - 1
    reasoning_before: float = 0.0
    responses_before: float = 0.0
    usage_before: float = 0.0
    max_responses: int = 2**63 - 1
