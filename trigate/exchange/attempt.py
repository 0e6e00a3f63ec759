"""One attempt at one target."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import attrs
import trio

from trigate.errors import GatewayError, Header
from trigate.exchange.outcome import Outcome, Phase
from trigate.exchange.sink import Sink
from trigate.exchange.socket_relay import RelayedStream
from trigate.exchange.translation import Reader
from trigate.openai.answer import Usage
from trigate.routing.plan import Step
from trigate.routing.routes import Target
from trigate.upstream.reply import Reply
from trigate.upstream.upstream import Upstream


class Answer(Protocol):
    """Moves one kind of answer from an upstream's reply to a sink (`answers`)."""

    async def relay(self, attempt: Attempt, reply: Reply, sink: Sink) -> bytes | None:
        """Moves the answer.

        Returns:
            The last piece, which is still to be sent; None = it has been sent, or another attempt had content first.

        Raises:
            GatewayError: The reply is wrong, or ended early.
        """


@attrs.define(eq=False, kw_only=True)
class Attempt:
    """An attempt at a target. It has more fields than most classes: the log, the ledger or ``/status`` reads them, or a
    time limit counts from them.

    It has a cancel scope of its own: a time limit, or another attempt with content, ends the work at this upstream at
    once, and nothing else.

    Attributes:
        outcome: None while it is in progress; then an `Outcome` or an error code.
        error: Why it failed.
        requested_at: When its request was about to be sent (Trio time): it had a slot; None = it has had none.
        head_at: When the head of its reply had arrived.
        first_content_after_s: From its start.
        waiting_since: Since when its first content has been awaited (Trio time); infinite = it is not.
        head_due_from: Since when the head of its reply has been awaited.
        last_byte_at: The time from which the idle limit counts: the last bytes arrived then, or the sink took them.
        relayed: Its stream on the fast path; None = the fast path does not relay it now.
        is_reading: Its task is inside `Reply.receive`.
        is_sending: It waits for the sink (in the end, for the client) and not for the upstream.
        is_superseded: Another attempt had content first.
        is_delivered: The sink has the whole answer.
        failed_with: The error with which its scope was cancelled.
        span_id: Of its span in the trace of the call; None = it has sent none.
    """

    step: Step
    target: Target
    started_at: float
    on_connecting: Callable[[float], None]
    """Called when the request is about to be sent."""
    examine: Callable[[bytes], None] | None = None
    """Called with the beginning of its answer before that wins the call; raises a GatewayError if the next target may
    give a better one. None = any answer will do."""
    decided: trio.Event | None = None
    """Set when an attempt of the same race has content, or has failed."""
    phase: Phase = Phase.QUEUED
    outcome: str | None = None
    error: GatewayError | None = None
    requested_at: float | None = None
    head_at: float | None = None
    first_content_after_s: float | None = None
    ended_at: float | None = None
    reply: Reply | None = None
    reader: Reader | None = None
    relayed: RelayedStream | None = None
    usage: Usage | None = None
    dropped: tuple[str, ...] = ()
    """The names of the client's fields that its upstream did not get."""
    waiting_since: float = math.inf
    head_due_from: float = math.inf
    last_byte_at: float = math.inf
    is_reading: bool = False
    is_sending: bool = False
    is_superseded: bool = False
    is_delivered: bool = False
    task: trio.lowlevel.Task = attrs.field(factory=trio.lowlevel.current_task)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    failed_with: GatewayError | None = None
    span_id: str | None = None

    async def run(
        self, upstream: Upstream, opening: AbstractAsyncContextManager[Reply], answer: Answer, sink: Sink
    ) -> None:
        """Makes the attempt: a slot, a request, a reply whose answer goes to the sink.

        Args:
            opening: The block in which the request has been sent (`Upstream.open`).

        Returns early, with ``scope.cancelled_caught`` set, when the attempt was cancelled by `fail` or `supersede`.

        Raises:
            GatewayError: It failed.
        """
        with self.scope:
            async with opening as reply:
                self.reply = reply
                self.head_at = self.last_byte_at = trio.current_time()
                self.head_due_from = math.inf
                if not 200 <= reply.status < 300:
                    raise await upstream.error_of(reply)
                rest = await answer.relay(self, reply, sink)
            if rest is not None:
                # The upstream's slot is free already: a client that reads slowly does not hold it.
                self.reply, self.phase = None, Phase.ENDED
                await self.end(sink, rest)

    # While one of the sends below waits for the client, the upstream is not idle.

    async def start(self, sink: Sink, status: int, headers: list[Header]) -> None:
        """Sends the head of the answer."""
        self.is_sending = True
        await sink.start(status, headers)
        self.is_sending = False

    async def send(self, sink: Sink, data: bytes) -> None:
        """Sends a piece of the answer."""
        self.is_sending = True
        await sink.send(data)
        self.is_sending = False

    async def end(self, sink: Sink, data: bytes) -> None:
        """Sends the last piece of the answer."""
        self.is_sending = True
        await sink.end(data)
        self.is_sending = False
        self.is_delivered = True

    async def receive(self, reply: Reply) -> bytes | None:
        """Receives the next piece of the reply's body; None at its end."""
        self.is_reading = True
        self.last_byte_at = trio.current_time()  # the client may have delayed this read: its time does not count
        try:
            return await reply.receive()
        finally:
            self.is_reading = False

    def on_phase(self, phase: str) -> None:
        """Records the phase of its request, as `Upstream.open` reports it."""
        if phase == "queued":
            self.phase = Phase.QUEUED
        else:
            self.phase = Phase.CONNECTING
            now = self.requested_at = self.waiting_since = self.head_due_from = trio.current_time()
            self.on_connecting(now)

    @property
    def reported_usage(self) -> Usage | None:
        """The token counts of its answer, as far as the upstream has reported them."""
        return self.reader.usage if self.reader is not None else self.usage

    def note_content(self, now: float) -> None:
        """Its first content has arrived."""
        self.waiting_since = math.inf
        self.first_content_after_s = now - self.started_at
        if self.decided is not None:
            self.decided.set()

    def note_byte(self) -> None:
        """Bytes of the reply have arrived, or have been sent on: the idle limit counts from now."""
        self.last_byte_at = trio.current_time()

    def note_end(self, now: float) -> None:
        """It has ended: its limits no longer apply."""
        self.ended_at = now
        self.phase = Phase.ENDED
        self.reply = None
        self.waiting_since = self.last_byte_at = self.head_due_from = math.inf
        if self.outcome is None:
            self.outcome = Outcome.SUPERSEDED if self.is_superseded else Outcome.CANCELLED

    def fail(self, error: GatewayError) -> None:
        """Ends it now with this error. Synchronous; only the first call has an effect."""
        if self.failed_with is None and not self.is_superseded:
            self.failed_with = error
            self.scope.cancel()

    def supersede(self) -> None:
        """Ends it now: another attempt had content first."""
        if self.failed_with is None:
            self.is_superseded = True
            self.scope.cancel()


class UpstreamClock:
    """Measures the time spent waiting for upstreams: from a request to its first content or its failure."""

    __slots__ = ("_since", "_waited_s")

    def __init__(self) -> None:
        self._waited_s = 0.0
        self._since: float | None = None

    def start(self, now: float) -> None:
        """Waiting for an upstream begins; no effect if it has begun already."""
        if self._since is None:
            self._since = now

    def stop(self, now: float) -> None:
        """Waiting ends."""
        if self._since is not None:
            self._waited_s += now - self._since
            self._since = None

    def waited_s(self, now: float) -> float:
        """The time spent waiting so far."""
        return self._waited_s + (now - self._since if self._since is not None else 0.0)
