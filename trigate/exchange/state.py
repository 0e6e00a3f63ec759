"""The state of an exchange, while it runs and afterwards, as the log, the ledger and ``/status`` read it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import attrs
import trio

from trigate.errors import GatewayError
from trigate.exchange.attempt import Attempt
from trigate.exchange.client_response import ClientResponse
from trigate.exchange.outcome import Phase
from trigate.exchange.request import ExchangeRequest
from trigate.exchange.shared_call import Subscription
from trigate.exchange.upstream_call import UpstreamCall
from trigate.ledger.content import AnswerContent
from trigate.openai.answer import Usage
from trigate.openai.request import Call
from trigate.quotas.counters import NO_LIMITS, Limits, Reservation
from trigate.routing.routes import Target
from trigate.store.records import ExchangeRecord
from trigate.upstream.generation import Generation


@attrs.define(eq=False, kw_only=True)
class ExchangeState:
    """The state of an `exchange.Exchange`, which is the only class that derives from it.

    Attributes:
        client: The response to its client; None = only a recorder takes the answer.
        deadline_at: When the whole call has to be over (Trio time).
        first_byte_deadline: When its answer has to have begun; infinite once the status line is out.
        source: The source of the answer; None = the exchange has not been admitted.
        idle_phase: Its phase while no attempt is in progress.
        outcome: None while it runs; then an `Outcome` or an error code.
        error: The error that ended it; the client got it unless it had disconnected.
        cancelled_with: Why it was cancelled.
        is_finishing: The client has disconnected, and the answer is received to its end all the same.
        admitted_at: When it got its admission slot, if it had to wait for it (Trio time).
        overhead_s: The gateway's own share of the time to the head of the answer; None = there was no head.
        committed_at: When the status line went out (Trio time); None = it has not.
        left_at: When its client disconnected (Trio time); None = it has not.
        record: Its record in the ledger, completed when it has ended; None = it has not begun.
        content: Notes its answer for the log of contents; None = it is not logged.
        limits: Those that it counts for.
        reservation: What it holds of them; None = nothing.
        task: The task that serves it.
    """

    request: ExchangeRequest
    client: ClientResponse | None = None
    started_at: float = attrs.field(factory=trio.current_time)
    deadline_at: float = math.inf
    first_byte_deadline: float = math.inf
    source: UpstreamCall | Subscription | None = None
    idle_phase: Phase = Phase.ADMITTED
    outcome: str | None = None
    error: GatewayError | None = None
    cancelled_with: GatewayError | None = None
    is_finishing: bool = False
    admitted_at: float = -math.inf
    overhead_s: float | None = None
    committed_at: float | None = None
    left_at: float | None = None
    record: ExchangeRecord | None = None
    content: AnswerContent | None = None
    limits: Limits = NO_LIMITS
    reservation: Reservation | None = None
    task: trio.lowlevel.Task = attrs.field(factory=trio.lowlevel.current_task)
    _queue: trio.CancelScope | None = None
    _position: Callable[[], int | None] | None = None

    def cancel(self, error: GatewayError) -> None:
        """Ends the upstream's side now; the client gets ``error``.

        Synchronous. Only the first call has an effect, and none has once the last bytes are being sent.
        """
        if self.cancelled_with is None and not self.is_ended:
            self.cancelled_with = error
            if self.source is not None:
                self.source.cancel(error)
            if self._queue is not None:
                self._queue.cancel()

    @contextlib.contextmanager
    def waiting_in_queue(self, at_most_s: float, position: Callable[[], int | None]) -> Iterator[None]:
        """A block in which the exchange waits for its admission slot; `cancel` ends the wait.

        Args:
            position: Gives its position in the queue.

        Raises:
            GatewayError: It was cancelled, in the block or before.
        """
        self.idle_phase = Phase.QUEUED
        self._position = position
        try:
            with trio.move_on_after(at_most_s) as self._queue:
                if self.cancelled_with is not None:
                    self._queue.cancel()
                yield
        finally:
            self._queue = None
            self.admitted_at = trio.current_time()
        if self.cancelled_with is not None:
            raise self.cancelled_with

    @property
    def allowed_s(self) -> float:
        """How long the call was allowed to take, for the message to its client."""
        request = self.request
        client_s = request.client_timeout_s
        if not self.call.stream or self.first_byte_deadline < math.inf:
            client_s = min(client_s, request.sdk_timeout_s)
        return min(client_s, request.route().total_timeout_s)

    @property
    def is_queued(self) -> bool:
        """It waits for its admission slot."""
        return self._queue is not None

    def queue_position(self) -> int | None:
        """Its position in the queue for admission or for an upstream, among those of its owner, from 1; None = it is
        not queued."""
        if self._queue is not None and self._position is not None:
            return self._position()
        return self.source.queue_position() if self.source is not None else None

    @property
    def id(self) -> str:
        """The request id."""
        return self.request.id

    @property
    def call(self) -> Call:
        """The client's call."""
        return self.request.call

    @property
    def generation(self) -> Generation:
        """The configuration that serves it."""
        return self.request.generation

    @property
    def owner(self) -> str:
        """The name of the gateway key that the call was made with; empty = the gateway has no keys."""
        return self.request.owner

    @property
    def is_cancelled(self) -> bool:
        """It was cancelled: no further attempt begins."""
        return self.cancelled_with is not None

    @property
    def is_ended(self) -> bool:
        """The last bytes of the answer are being sent, or have been."""
        if self.client is not None and self.client.ended:
            return True
        return self.source is not None and self.source.is_delivered

    @property
    def is_client_gone(self) -> bool:
        """The client has disconnected."""
        return self.client is not None and self.client.gone

    @property
    def attempts(self) -> Sequence[Attempt]:
        """In the order in which they began."""
        return self.source.attempts if self.source is not None else ()

    @property
    def target(self) -> Target | None:
        """The target that answers; before one does, that of the last attempt."""
        return self.source.target if self.source is not None else None

    @property
    def usage(self) -> Usage | None:
        """The token counts that are recorded with it, as far as they have been reported."""
        return self.source.usage if self.source is not None else None

    @property
    def is_billed(self) -> bool:
        """Whether the tokens are recorded with it, and not with another exchange that shared the upstream call."""
        if isinstance(self.source, Subscription):
            return self.source.is_billed
        return self.request.call.endpoint.counts_tokens

    @property
    def events(self) -> int:
        """How many events of the answer have been sent."""
        return self.source.events if self.source is not None else 0

    @property
    def bytes_sent(self) -> int:
        """How many bytes of the answer have been sent."""
        return self.source.bytes_sent if self.source is not None else 0

    @property
    def first_content_after_s(self) -> float | None:
        """From its start; None = no content has arrived."""
        first_at = self.source.first_content_at if self.source is not None else None
        return first_at - self.started_at if first_at is not None else None
