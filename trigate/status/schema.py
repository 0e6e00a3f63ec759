"""The bodies of ``GET /status`` and ``GET /status/streams``.

The server builds these types, and `trigate status` reads the bodies into them. The two may be of different versions, so
the rules for editing are:

* A new field has a default. The command line must read an answer that lacks it.
* Unknown fields are ignored (msgspec's default). The command line must read an answer that has more.
* A field that is sometimes left out of the body is `msgspec.UNSET` by default; null is a value.
* The fields are in the order of the body.

`docs/reference/endpoints.md` describes each field. The types say only what the reference does not. Pure.

**Units:** names that end in ``_s`` are seconds; times (``since``, ``…_at``) are ISO 8601 in UTC.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

# -- GET /status ------------------------------------------------------------------------------------------------------


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A worker process.

    Attributes:
        status: ``ok`` or ``draining``.
        report_age_s: Age of the worker's last report; 0 = the worker that answers the request.
        live: Number of exchanges in flight.
    """

    id: str
    pid: int
    status: str
    version: str = ""
    uptime_s: float
    report_age_s: float = 0.0
    live: int


class ChannelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A hook, or a channel of a chat platform.

    Attributes:
        received, replied, queued: None = the store could not be asked.
    """

    name: str
    type: str
    status: str
    since: str | None = None
    last_event_at: str | None = None
    last_error: str | None = None
    received: int | None = None
    replied: int | None = None
    queued: int | None = None


class SessionsStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How many sessions there are."""

    total: int
    active: int
    busy: int


class OutboxStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How many deliveries wait."""

    depth: int


class StoreStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The store, as the worker that answers the request sees it."""

    kind: str = ""
    path: str
    state: str
    error: str | None = None


class UpstreamStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A provider, as all workers see it together."""

    name: str
    kind: str = ""
    state: str
    reason: str | None = None
    in_flight: int
    queued: int = 0
    max_connections: int = 0
    models: int
    last_error: str | None = None
    last_error_at: str | None = None


class LedgerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The ledger of all workers: the worst state, and the sums of the counters."""

    state: str
    begun: int = 0
    settled: int = 0
    lost: int = 0
    dropped: int = 0
    error: str | None = None


class TracingStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The export of traces by all workers: the worst state, and the sums of the counters."""

    state: str = "off"
    exported: int = 0
    dropped: int = 0
    waiting: int = 0
    error: str | None = None


class AdmissionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Admission of all workers.

    Attributes:
        late_workers: Number of workers whose event loop is so late that they refuse new calls.
        lag_s: How late the event loop of the worst worker is.
    """

    in_flight: int
    limit: int
    queued: int
    refused: int = 0
    late_workers: int = 0
    lag_s: float = 0.0


class TargetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A target, as one worker sees it.

    Attributes:
        opens_in_s: How long an open breaker still refuses calls; 0 = it is not open.
        first_token_s: Moving average of the time to the first token; None = no data.
        prompt_tokens: Tokens of the prompts, as far as the target has reported them.
        cached_tokens: How many of them it has read from its cache.
        estimate_factor: By what the gateway multiplies its own estimate of a prompt, as the calls have taught it whose
            tokens were reported.
        estimate_error: The mean relative error of those estimates; None = no prompt was reported or counted.
    """

    target: str
    endpoint: str = ""
    breaker: str
    opens_in_s: float = 0.0
    in_flight: int = 0
    first_token_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    estimate_factor: float = 1.0
    estimate_error: float | None = None
    worker: str = ""


class OldestStream(msgspec.Struct, frozen=True, kw_only=True):
    """An exchange in flight, in short.

    Attributes:
        upstream: The target; None = none has been chosen yet.
        stream: Whether the client asked for a stream.
    """

    id: str
    model: str
    upstream: str | None = None
    stream: bool = False
    phase: str
    age_s: float
    events: int = 0
    bytes: int = 0
    worker: str = ""


class StreamsStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The exchanges in flight: how many, and the oldest ones.

    Attributes:
        live: Number of exchanges.
        by_phase, by_upstream: The same number by phase, and by upstream for those that have one.
    """

    live: int
    by_phase: dict[str, int] = msgspec.field(default_factory=dict)
    by_upstream: dict[str, int] = msgspec.field(default_factory=dict)
    oldest: tuple[OldestStream, ...] = ()


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """The exchanges that have ended since the start.

    Attributes:
        faults: How many of ``failed`` did so by the fault of a provider or of the gateway.
        cost_microusd: What those have cost whose cost is known.
        unpriced: How many have a cost that is not known.
    """

    exchanges: int
    complete: int
    cancelled: int
    failed: int
    faults: int = 0
    events: int = 0
    bytes: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_microusd: int = 0
    unpriced: int = 0


class PricesStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Where the prices come from, and which are missing.

    Attributes:
        source: Empty = no upstream needs public prices. Several, separated by ``; ``, if the workers do not have the
            same ones.
        unknown: The targets that were called and have no price; a call of theirs has no cost.
        refreshed_at: When they were read from the source that is configured; None = they were not. Of the worker that
            did so first.
        refresh_error: Why they could not be read the last time; None = they could, or none is configured.
    """

    source: str = ""
    unknown: tuple[str, ...] = ()
    refreshed_at: str | None = None
    refresh_error: str | None = None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The body of ``GET /status``.

    Attributes:
        sessions, outbox: None = the store could not be asked.
    """

    status: str
    version: str
    uptime_s: float = 0.0
    uptime: str
    config: str
    reload_error: str | None = None
    workers: tuple[WorkerStatus, ...]
    channels: tuple[ChannelStatus, ...] = ()
    sessions: SessionsStatus | None = None
    outbox: OutboxStatus | None = None
    store: StoreStatus
    upstreams: tuple[UpstreamStatus, ...] = ()
    ledger: LedgerStatus | None = None
    admission: AdmissionStatus | None = None
    targets: tuple[TargetStatus, ...] = ()
    streams: StreamsStatus
    totals: Totals
    prices: PricesStatus = PricesStatus()
    tracing: TracingStatus = TracingStatus()


# -- GET /status/streams ----------------------------------------------------------------------------------------------


class AttemptStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt of an exchange.

    Attributes:
        started_s: Seconds from the start of the exchange; negative for an attempt of a shared call that began earlier.
        phase: Only while the attempt runs.
        outcome, duration_s: Only once it has ended.
        status: Only if it failed: the HTTP status that stands for the error.
    """

    target: str
    why: str = ""
    started_s: float = 0.0
    phase: str | UnsetType | None = UNSET
    outcome: str | UnsetType | None = UNSET
    first_content_s: float | UnsetType | None = UNSET
    duration_s: float | UnsetType | None = UNSET
    status: int | UnsetType | None = UNSET


class SharedCallStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The shared call that an exchange has joined.

    Attributes:
        id: The request id of the call that started it.
        role: ``leader`` or ``joined``.
        subscribers: Number of subscribers.
    """

    id: str
    role: str | None = None
    subscribers: int = 0


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """An exchange in flight.

    Attributes:
        stream: Whether the client asked for a stream.
        deadline_left_s: None = the call has no deadline.
        queue_position: From 1; None = the call does not wait for a slot.
        target: None = none has been chosen yet.
        tokens_per_s: Of a stream, from its first content on, where one event counts as a token; None = there is none.
        cost_microusd: So far, as estimated; None = a price is not known, or the request is too large to estimate.
        shared_call: Only if the call may share its upstream call.
    """

    id: str
    key: str = ""
    model: str
    endpoint: str = ""
    stream: bool = False
    phase: str
    age_s: float
    deadline_left_s: float | None = None
    target: str | None = None
    events: int = 0
    bytes: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_content_s: float | None = None
    tokens_per_s: float | None = None
    cost_microusd: int | None = None
    client_gone: bool = False
    queue_position: int | None = None
    max_attempts: int | None = None
    attempts: tuple[AttemptStatus, ...] = ()
    shared_call: SharedCallStatus | UnsetType | None = UNSET
    worker: str = ""


class StreamList(msgspec.Struct, frozen=True, kw_only=True):
    """The body of ``GET /status/streams``.

    Attributes:
        data: The oldest first.
        count: Number of exchanges in flight; there may be fewer rows.
        missing_workers: The ids of workers that did not answer in time.
    """

    object: str = "list"
    data: tuple[Stream, ...]
    count: int
    missing_workers: tuple[str, ...] = ()


# -- GET /status/events -----------------------------------------------------------------------------------------------


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One event of ``GET /status/events``.

    Attributes:
        at: When it was made, in POSIX seconds.
        status: As ``GET /status``, without the oldest exchanges.
        streams: As ``GET /status/streams``.
    """

    at: float
    status: Status
    streams: StreamList
