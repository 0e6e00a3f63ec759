"""The work at upstreams for one call: attempts, failover, retries, hedging, continuation.

An upstream call knows no client, only the `Sink` that its answer goes to. `routing.plan` decides which target is next,
when and why. This module decides only which attempt wins: the one whose content comes first. `UpstreamCall.claim` is
synchronous, so there is one winner.

Until an attempt has content, any other attempt may take its place. Afterwards only a continuation may: another target
continues a stream that has broken off, where the client cannot tell (``on_truncation = "continue"``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

import attrs
import trio

from trigate.concurrency.timers import Timers
from trigate.dialects.content_filter import is_withheld, withheld
from trigate.dialects.translated_call import TranslatedCall
from trigate.errors import GatewayError, UpstreamTimeout
from trigate.exchange.answers import BinaryAnswer, JsonAnswer, StreamAnswer
from trigate.exchange.attempt import Answer, Attempt, UpstreamClock
from trigate.exchange.attempt_headers import attempt_headers
from trigate.exchange.attempt_log import log_end
from trigate.exchange.continuation import NEW_STREAM, Continuation, may_be_continued
from trigate.exchange.deadlines import attempt_limits
from trigate.exchange.discovery import Discovering, translation_for
from trigate.exchange.outcome import Outcome, Phase
from trigate.exchange.preparation import encoded, prepare
from trigate.exchange.prompt_counts import PromptCounts
from trigate.exchange.reasoning_memory import ReasoningMemory
from trigate.exchange.request import ExchangeRequest
from trigate.exchange.sink import Sink
from trigate.exchange.socket_relay import RelayedStream, SocketRelay
from trigate.exchange.translation import Reader, Translation
from trigate.exchange.upstream_gate import gate_of
from trigate.openai.answer import Usage
from trigate.quotas.service import Quotas
from trigate.routing.plan import Plan, Step
from trigate.routing.routes import Target
from trigate.routing.target_state import Targets
from trigate.tracebacks import drop_frames
from trigate.upstream.generation import Route
from trigate.upstream.reply import Reply
from trigate.upstream.upstream import Upstream


@attrs.frozen(kw_only=True)
class UpstreamServices:
    """The services that upstream calls use.

    Attributes:
        targets: The state of each target.
        chance: A random number between 0 and 1, for pauses and choices.
        timers: Run the checks of time limits.
        socket_relay: The fast path; None = this system has no epoll.
        reasoning: What is remembered for the next call of a conversation.
        quotas: The limits of upstreams.
        prompt_counts: Has upstreams count prompts.
    """

    targets: Targets
    chance: Callable[[], float]
    timers: Timers
    socket_relay: SocketRelay | None
    reasoning: ReasoningMemory
    quotas: Quotas
    prompt_counts: PromptCounts


@attrs.define(eq=False, kw_only=True)
class UpstreamCall:
    """The upstream's side of an exchange, or of a shared call.

    Attributes:
        deadline_at: When the call has to be over. No attempt begins after it, and the remaining time is sent with each
            request.
        first_byte_deadline: When the answer has to have begun; infinite once something has been sent to the client.
        attempts: All attempts, in the order in which they began.
        live: The attempts in progress.
        winner: The attempt that has content.
        target: The target of the winner; before there is one, of the last attempt.
        cancelled_with: Why the call was cancelled.
        bytes_sent: Bytes of the answer that went to the sink.
        first_content_at: Trio time; None = no content has arrived.
    """

    request: ExchangeRequest
    services: UpstreamServices
    route: Route
    started_at: float
    deadline_at: float
    first_byte_deadline: float = math.inf
    attempts: list[Attempt] = attrs.field(factory=list)
    live: list[Attempt] = attrs.field(factory=list)
    winner: Attempt | None = None
    target: Target | None = None
    cancelled_with: GatewayError | None = None
    bytes_sent: int = 0
    first_content_at: float | None = None
    _usage: Usage | None = None
    _clock: UpstreamClock = attrs.field(factory=UpstreamClock)
    _continuation: Continuation = NEW_STREAM
    _pause: trio.CancelScope | None = None
    _is_last_attempt: bool = False

    # -- the answer ---------------------------------------------------------------------------------------------------

    async def fetch(self, sink: Sink) -> None:
        """Makes attempts until one has served the call. Returns when the sink has the whole answer.

        Raises:
            GatewayError: No attempt could serve the call, or it was cancelled (`cancel`).
        """
        request, chance = self.request, self.services.chance
        path, quotas, states = request.call.endpoint.path, self.services.quotas, self.services.targets
        gate = await gate_of(request, self.route.targets, states, quotas) if quotas.limits_upstreams else None
        plan = Plan(
            self.route.alias,
            path,
            self.route.targets,
            states,
            request.generation.config,
            weights=self.route.weights,
            key=request.affinity_key if len(self.route.targets) > 1 else None,
            gate=gate,
        )
        now = trio.current_time()
        step = plan.first(now, chance())
        while True:
            hedges = self.first_content_at is None and plan.hedge_delay_s() is not None
            error = await self._race(plan, step, sink) if hedges else await self._attempt(plan, step, sink, now)
            if error is None:
                return
            if self.cancelled_with is not None:
                raise self.cancelled_with
            following = self._after(plan, error)
            if following is None:
                raise error
            step = following
            if step.after_s > 0:
                await self._wait(plan, step)
            now = trio.current_time()

    def _after(self, plan: Plan, error: GatewayError) -> Step | None:
        """Returns the next step after a failed attempt; None = there is none."""
        now = trio.current_time()
        if self._is_last_attempt:
            return None
        if self.winner is not None:
            return self._continue(plan, error, now)
        # This includes a continuation that sent nothing: the client's partial answer is unchanged.
        left_s = min(self.deadline_at, self.first_byte_deadline) - now
        return plan.next(error, now, self.services.chance(), left_s=left_s)

    async def _race(self, plan: Plan, step: Step, sink: Sink) -> GatewayError | None:
        """Makes an attempt, and a second one beside it when the first one is slow to begin. The attempt whose content
        comes first wins; the other one is cancelled at once.

        Returns:
            None = an attempt has served the call; else the error of the last one.
        """
        errors: list[GatewayError] = []
        decided = trio.Event()

        async def run(step: Step) -> None:
            error = await self._attempt(plan, step, sink, trio.current_time(), decided)
            if error is not None:
                errors.append(error)
            decided.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, step)
            with trio.move_on_after(plan.hedge_delay_s() or 0.0):
                await decided.wait()
            if not decided.is_set() and self.cancelled_with is None and not self._is_last_attempt:
                second = plan.hedge(trio.current_time())
                if second is not None:
                    nursery.start_soon(run, second)
        return self.winner.error if self.winner is not None else errors[-1]

    async def _attempt(
        self, plan: Plan, step: Step, sink: Sink, now: float, decided: trio.Event | None = None
    ) -> GatewayError | None:
        """Makes one attempt, which begins ``now``, and records how it ended.

        Returns:
            The error; it is returned, since a nursery would wrap it in a group.
        """
        attempt = Attempt(
            step=step,
            target=step.target,
            started_at=now,
            on_connecting=self._clock.start,
            examine=partial(self._examine, plan) if "content_filter" in self.request.model.on else None,
            decided=decided,
        )
        self.attempts.append(attempt)
        self.live.append(attempt)
        if self.winner is None:
            self.target = attempt.target
        error: GatewayError | None = None
        try:
            await self._run(attempt, sink)
            if not attempt.is_superseded:
                attempt.outcome = Outcome.COMPLETE
        except GatewayError as raised:
            drop_frames(raised)
            error = attempt.error = raised
            attempt.outcome = raised.code
        finally:
            now = trio.current_time()
            self.live.remove(attempt)
            if not any(other.waiting_since < math.inf for other in self.live):
                self._clock.stop(now)
            attempt.note_end(now)
            usage = attempt.reported_usage
            self._usage = usage or self._usage
            change = plan.end(
                step,
                now,
                error=error,
                first_token_s=attempt.first_content_after_s,
                judged=attempt.outcome == Outcome.COMPLETE or (error is not None and error is not self.cancelled_with),
                usage=usage,
            )
            if change is not None or (error is not None and error is not self.cancelled_with):
                log_end(self.request, attempt, change, opens_in_s=plan.opens_in_s(step, now))
        return error

    async def _run(self, attempt: Attempt, sink: Sink) -> None:
        upstream = self.request.generation.upstreams[attempt.target.upstream]
        translation = translation_for(self.request.call, upstream, attempt.target.model)
        try:
            if isinstance(translation, TranslatedCall):
                model, owner = attempt.target.model, self.request.owner
                await prepare(translation, self.request.call, model, upstream, self.services.reasoning, owner)
            if self.cancelled_with is not None:
                attempt.scope.cancel()
            await attempt.run(upstream, self._open(attempt, upstream, translation), self._answer(translation), sink)
            if attempt.scope.cancelled_caught and not attempt.is_superseded and not attempt.is_delivered:
                cause = self.cancelled_with or attempt.failed_with
                assert cause is not None, "only fail() and supersede() cancel an attempt"
                raise cause
            if not attempt.is_superseded:
                upstream.note_up()
        except GatewayError as error:
            if attempt.is_superseded:
                return  # the error is an effect of the cancellation
            cause = self.cancelled_with or attempt.failed_with
            if cause is not None and error is not cause:
                raise cause from error  # a cancelled reply looks like a broken one to its reader
            upstream.note_failure(error)
            raise

    def _examine(self, plan: Plan, data: bytes) -> None:
        """Raises Reported for an answer that a content filter has withheld, if another attempt may give one."""
        if is_withheld(data) and (len(self.live) > 1 or plan.may_lead_on(trio.current_time())):
            raise withheld()

    def claim(self, attempt: Attempt) -> bool:
        """Makes an attempt that has content the winner, and cancels all others at once.

        Returns:
            False = another attempt was first.
        """
        if attempt.is_superseded:
            return False
        now = trio.current_time()
        attempt.note_content(now)
        for other in self.live:
            if other is not attempt:
                other.supersede()
        self.winner = attempt
        self.target = attempt.target
        if self.first_content_at is None:
            self.first_content_at = now
        self._clock.stop(now)
        return True

    async def _wait(self, plan: Plan, step: Step) -> None:
        """Waits before an attempt."""
        waited = False
        try:
            with trio.CancelScope() as self._pause:
                await trio.sleep(step.after_s)
                waited = True
        finally:
            self._pause = None
            if not waited or self.cancelled_with is not None:
                plan.end(step, trio.current_time(), judged=False)
        if self.cancelled_with is not None:
            raise self.cancelled_with

    # -- the request --------------------------------------------------------------------------------------------------

    def _open(
        self, attempt: Attempt, upstream: Upstream, translation: Translation
    ) -> AbstractAsyncContextManager[Reply]:
        """Returns the block in which the request has been sent. Its ``x-request-timeout`` is the time that is left for
        the answer."""
        if isinstance(translation, Discovering):
            return translation.open(lambda chosen: self._open(attempt, upstream, chosen))
        request = self.request
        call, headers = request.call, translation.headers(request.headers)
        if self._continuation.text:
            call = call.continued_from(self._continuation.text)
        over_at = min(self.deadline_at, self.started_at + self.route.timeouts[attempt.target.upstream].total_s)
        headers = attempt_headers(request, attempt, headers, over_at=over_at)
        model = attempt.target.model
        path, body, attempt.dropped = encoded(translation, call, model, upstream)
        return upstream.open(
            "POST",
            path,
            body,
            headers=headers,
            model=model,
            owner=request.owner,
            on_phase=attempt.on_phase,
        )

    def _answer(self, translation: Translation) -> Answer:
        """Makes the object that moves the answer from a reply to the sink."""
        call, limits = self.request.call, self.request.generation.config.limits
        if call.stream:
            return StreamAnswer(
                call=call,
                translation=translation,
                claim=self.claim,
                count=self._count,
                socket_relay=self.services.socket_relay,
                max_event_bytes=limits.event_bytes,
                keep_bytes=limits.buffered_bytes if may_be_continued(self.request) else 0,
                continues=self._continuation.head,
                prices=self.request.stream_prices,
            )
        if call.endpoint.answer == "json":
            return JsonAnswer(
                call=call,
                translation=translation,
                claim=self.claim,
                count=self._count,
                max_bytes=limits.response_bytes,
                max_decoded_bytes=limits.decoded_bytes,
            )
        return BinaryAnswer(claim=self.claim, count=self._count)

    def _count(self, sent_bytes: int) -> None:
        self.bytes_sent += sent_bytes

    # -- continuation -------------------------------------------------------------------------------------------------

    def _continue(self, plan: Plan, error: GatewayError, now: float) -> Step | None:
        """Returns the step by which another target continues a truncated stream; None = the stream cannot be
        continued."""
        if not error.retryable or self.request.model.on_truncation != "continue" or self.deadline_at <= now:
            return None
        reader = self.winner.reader if self.winner is not None else None
        if reader is None or self.request.call.choices > 1:
            return None
        continuation = self._continuation.after(reader)
        step = plan.continuation(now) if continuation is not None else None
        if step is not None and continuation is not None:
            self._continuation, self.winner = continuation, None
        return step

    # -- cancellation -------------------------------------------------------------------------------------------------

    def cancel(self, error: GatewayError) -> None:
        """Ends the call now; `fetch` raises ``error``. Synchronous; only the first call has an effect."""
        if self.cancelled_with is None:
            self.cancelled_with = error
            for attempt in self.live:
                attempt.fail(error)
            if self._pause is not None:
                self._pause.cancel()

    def finish(self, deadline_at: float) -> None:
        """The client has disconnected. The attempts in progress receive the answer to its end all the same, and the
        sink discards it."""
        self.deadline_at = deadline_at
        self._is_last_attempt = True
        stream = self._relayed_stream()
        if stream is not None:
            stream.detach()

    def note_committed(self) -> None:
        """The status line is out: the answer has begun in time."""
        self.first_byte_deadline = math.inf

    def abandon(self) -> bool:
        """Closes the upstream's connection now, from any task, if the fast path relays the stream.

        Returns:
            Whether it did. The task of the call then sleeps until it is cancelled, which is no longer urgent.
        """
        stream = self._relayed_stream()
        reply = self.winner.reply if self.winner is not None else None
        if stream is None or reply is None or not stream.release():
            return False
        reply.abandon()
        return True

    async def close_reply(self) -> None:
        """Closes the reply of a call whose task waits in a shielded send."""
        attempt = self.winner
        if attempt is not None and attempt.reply is not None and not attempt.is_reading:
            await attempt.reply.aclose()

    def inject(self, data: bytes) -> bool:
        """Sends bytes of the gateway's own (a keep-alive comment) between two events on the fast path. Returns whether
        the fast path relays the stream."""
        stream = self._relayed_stream()
        if stream is None:
            return False
        stream.inject(data)
        return True

    def _relayed_stream(self) -> RelayedStream | None:
        return self.winner.relayed if self.winner is not None else None

    def check_limits(self, now: float) -> list[float]:
        """Fails each attempt that has exceeded one of its limits; returns when each limit is due."""
        due_at = []
        for attempt in self.live:
            if attempt.is_sending and attempt.last_byte_at < math.inf:
                attempt.last_byte_at = now  # it waits for the client, so the upstream is not idle
            for due in attempt_limits(
                self.route.timeouts[attempt.target.upstream],
                head_due_from=attempt.head_due_from,
                waiting_since=attempt.waiting_since,
                last_byte_at=attempt.last_byte_at,
                started_at=self.started_at,
            ):
                if due.at <= now:
                    message = f"The upstream {attempt.target.upstream} {due.what} {due.limit_s:g} s."
                    attempt.fail(UpstreamTimeout(message, phase=due.phase))
                due_at.append(due.at)
        return due_at

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase | None:
        """The phase of the winner, else of the oldest attempt in progress; None = no attempt is in progress."""
        if self.winner is not None and self.winner.outcome is None:
            return self.winner.phase
        if self.live:
            return self.live[0].phase
        return Phase.PAUSING if self._pause is not None else None

    @property
    def is_requested(self) -> bool:
        """Whether a request has been sent, or is about to be, to an upstream."""
        return any(attempt.phase is not Phase.QUEUED for attempt in self.live)

    @property
    def is_delivered(self) -> bool:
        """Whether the sink has the whole answer."""
        return self.winner is not None and self.winner.is_delivered

    @property
    def reader(self) -> Reader | None:
        """The reader of the winner's stream."""
        return self.winner.reader if self.winner is not None else None

    @property
    def events(self) -> int:
        """How many events have gone to the sink."""
        return self._continuation.events + (self.reader.events if self.reader is not None else 0)

    @property
    def usage(self) -> Usage | None:
        """The last token counts that an upstream has reported."""
        return (self.reader.usage if self.reader is not None else None) or self._usage

    @property
    def dropped(self) -> tuple[str, ...]:
        """The names of the fields that the upstream did not get (`Translation.dropped`)."""
        attempt = self.winner or (self.attempts[-1] if self.attempts else None)
        return attempt.dropped if attempt is not None else ()

    def waited_s(self, now: float) -> float:
        """How long upstreams have been waited for."""
        return self._clock.waited_s(now)

    def queue_position(self) -> int | None:
        """The position of the oldest attempt in the queue of its upstream, from 1; None = it is not in one."""
        if not self.live:
            return None
        attempt = self.live[0]
        upstream = self.request.generation.upstreams[attempt.target.upstream]
        return upstream.queue_position(self.request.owner, attempt.task)
