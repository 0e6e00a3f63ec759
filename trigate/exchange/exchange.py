"""One request, one nursery: plan → attempt → COMMIT → relay → settle. The page to read first.

The request's nursery (opened in `connection`) is cancelled by the *watch* when the client leaves. Everything that is
done for the request happens inside, so when the nursery ends, nothing of the request is left anywhere.

The rules:

* Before COMMIT every failure is an exception and becomes a status; after it, every failure is an error event, and
  there is no ``[DONE]``. There is no third case.
* An attempt's *half* (`Attempt.half`) is a cancel scope of its own: a deadline, a drain, a stalled client or another
  attempt that was first ends the upstream's part at once (that is the costly one), and what the client has to be told
  can still be told.
* Which target is next, when and why, is `plans`' to say. Whose content comes first wins (`_claim`): synchronously, so
  there is one winner.
* One deadline spans all of it, from the arrival of the request: queue, pauses, attempts, the stream.
* A frame is sent whole or not begun: `Downstream` sees to it, so a cancellation lands between frames.
* Once the answer has begun, and where both ends are plain sockets, the `relay` engine moves the events while the
  exchange sleeps; everywhere else the loop in `_relay` does. Both feed the same `wire.StreamReader`.
* The limits in time are kept by one task for all exchanges (`timers`), which asks each one when it is due (`_on_time`).
* `settle` is synchronous and runs in ``finally``: exactly once, whatever happened.
"""

from __future__ import annotations

import contextlib
import functools
import math
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import attrs
import structlog
import trio

from trigate.config.sections import ModelConfig, TimeoutPhase
from trigate.errors import (
    ClientStalled,
    Draining,
    GatewayError,
    Header,
    Internal,
    ProtocolViolation,
    Unavailable,
    UpstreamError,
    UpstreamTimeout,
)
from trigate.exchange.attempt import Attempt
from trigate.openai import sse
from trigate.openai.accumulator import AnswerAccumulator
from trigate.openai.answer import Usage, decode_answer
from trigate.openai.continuation import continuation_head
from trigate.openai.request import Call
from trigate.openai.stream import StreamReader
from trigate.routing.plan import Plan, Step
from trigate.routing.routes import Target

if TYPE_CHECKING:
    from msgspec import Raw

    from trigate.concurrency.timers import Timer
    from trigate.exchange.socket_relay import Stream
    from trigate.gateway.gateway import Gateway
    from trigate.upstream.generation import Generation, Route
    from trigate.upstream.upstream import Reply

log = structlog.get_logger("trigate.exchange.exchange")

_PLAIN_MODEL = ModelConfig(targets=())
"""The rules of a model id that the configuration does not name."""

# How long the rest of an upstream's body (the end of its framing) may take after the last event, before the
# connection is closed instead of reused. The client has its answer by then.
_REST_S = 0.25
_LAST_WORDS_S = 1.0
STOPPED = "The server stopped; the answer is incomplete. Try again."
"""What is said where a server ends without a drain."""


class Downstream(Protocol):
    """The client's side of an exchange, as `downstream` offers it. What is sent is sent whole; no send raises when the
    client is gone (its nursery is being cancelled then)."""

    sending_since: float | None
    """Since when a send has been waiting for the client to read; None = none is."""
    last_sent_at: float
    headers: list[Header]
    """What every response says in its head."""
    gone: bool
    """The client has left."""
    patience_s: float
    """How long a send may wait for the client."""

    @property
    def committed(self) -> bool:
        """The status line is out."""

    @property
    def ended(self) -> bool:
        """The last byte of the answer has been handed over."""

    @property
    def socket(self) -> socket.socket | None:
        """The client's socket, where pieces of the body may be written to it directly once the head is out."""

    @property
    def chunked(self) -> bool:
        """How what is written there has to be framed."""

    @property
    def taken_bytes(self) -> int | None:
        """A number that grows while a send waits, whenever the client takes something; None = that cannot be seen."""

    def owe(self, rest: bytes) -> None:
        """Takes what is left of a frame that was begun at the socket; it goes out before anything else."""

    async def respond(self, status: int, headers: list[Header], body: bytes) -> None:
        """Sends a whole response."""

    async def start(self, status: int, headers: list[Header]) -> None:
        """COMMIT: sends the head of a streamed response."""

    async def send(self, data: bytes) -> None:
        """Sends a piece of a streamed response."""

    async def end(self, data: bytes = b"") -> None:
        """Sends the last piece."""

    def abandon(self) -> None:
        """Ends a streamed response without its proper end, where nothing else can say that it is incomplete."""

    async def abort(self) -> None:
        """Closes the connection of a client that does not read."""


class Recorder(Protocol):
    """Somebody who keeps the answer of an exchange: a session, a run. A stream that is recorded is not carried by the
    engine."""

    def feed(self, frames: bytes) -> None:
        """Takes whole events of a streamed answer, as they are about to go to the client."""

    def feed_answer(self, body: bytes) -> None:
        """Takes a JSON answer, before it goes to the client."""

    async def complete(self, usage: Usage | None) -> None:
        """The answer is complete, and is about to be acknowledged.

        Raises:
            GatewayError: It cannot be kept; the client is told that instead.
        """


STREAM_HEADERS: list[Header] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@attrs.define(eq=False, kw_only=True)
class Exchange:
    """A request in flight. Its public attributes are what ``/status`` shows.

    Attributes:
        owner: The name of the gateway key that it is made with; empty = the gateway has none.
        arrived_at: When the client's request came: its time is counted from there.
        client_timeout_s: How long the client lets the whole call take.
        sdk_timeout_s: How long it waits for the answer to begin; for one that is not streamed, to be there.
        deadline_at: When the call has to be over, wherever it is then.
        attempts: In the order in which they began.
        outcome: None while it runs; then ``complete``, ``cancelled`` (the client left), ``finished`` (it left, and the
            upstream's answer was taken to its end all the same), or an error code.
    """

    id: str
    call: Call
    gateway: Gateway
    generation: Generation
    down: Downstream
    headers: dict[str, str] = attrs.field(factory=dict)
    """What goes upstream besides the upstream's own headers."""
    owner: str = ""
    arrived_at: float = attrs.field(factory=trio.current_time)
    client_timeout_s: float = math.inf
    sdk_timeout_s: float = math.inf
    target: Target | None = None
    bytes_sent: int = 0
    attempts: list[Attempt] = attrs.field(factory=list)
    usage: Usage | None = None
    outcome: str | None = None
    first_content_after_s: float | None = None
    error: GatewayError | None = None
    """What the client was told, or would have been."""
    recorder: Recorder | None = None
    is_billed: bool = True
    """The tokens of its upstream call are accounted with it, and not with another exchange that shares the call."""
    started_at: float = attrs.field(factory=trio.current_time)
    deadline_at: float = math.inf
    _begin_by: float = math.inf
    _ending: bool = False
    _alone: bool = False
    _state: str = "admitted"
    _live: list[Attempt] = attrs.field(factory=list)
    _winner: Attempt | None = None
    _pause: trio.CancelScope | None = None
    _cut: GatewayError | None = None
    _carried: Stream | None = None
    _events_before: int = 0
    _waits_since: float = math.inf
    _stalled_since: float = math.inf
    _taken_bytes: int | None = None
    _shortest_s: float = math.inf
    _silent_since: float = -math.inf
    _upstream_s: float = 0.0
    _upstream_since: float | None = None
    _seam: Mapping[str, Raw] | None = None
    _text: str = ""
    _nursery: trio.Nursery = attrs.field(init=False)
    _task: trio.lowlevel.Task = attrs.field(init=False)
    _relayed: bool = False
    _stamped: bool = False

    @property
    def phase(self) -> str:
        """``admitted``; ``queued``; that of its attempt, the one which is farthest; ``pausing`` between two of them;
        ``ending``."""
        if self._ending:
            return "ending"
        if self._winner is not None and self._winner.outcome is None:
            return self._winner.phase
        return self._live[0].phase if self._live else self._state

    @property
    def events(self) -> int:
        """How many events have been sent."""
        reader = self._winner.reader if self._winner is not None else None
        return self._events_before + (reader.events if reader is not None else 0)

    @property
    def age_s(self) -> float:
        """How long it has been running."""
        return trio.current_time() - self.started_at

    def describe(self, now: float) -> dict[str, object]:
        """What can be told of it while it runs; times in seconds, ages from its start."""
        return {
            "id": self.id,
            "model": self.call.model,
            "endpoint": self.call.endpoint.path,
            "stream": self.call.stream,
            "phase": self.phase,
            "age_s": round(now - self.started_at, 3),
            "deadline_left_s": round(self.deadline_at - now, 3) if self.deadline_at < math.inf else None,
            "target": str(self.target) if self.target is not None else None,
            "events": self.events,
            "bytes": self.bytes_sent,
            "prompt_tokens": self.usage.prompt_tokens if self.usage is not None else None,
            "completion_tokens": self.usage.completion_tokens if self.usage is not None else None,
            "first_content_s": self.first_content_after_s,
            "client_gone": self.down.gone,
            "queue_position": self._queue_position(),
            "max_attempts": self.generation.config.max_attempts(self.call.model),
            "attempts": [attempt.describe(self.started_at) for attempt in self.attempts],
        }

    def _queue_position(self) -> int | None:
        if self.phase != "queued":
            return None
        if not self._live:
            return self.gateway.admission.places.position(self.owner, self._task)
        attempt = self._live[0]
        return self.generation.upstreams[attempt.target.upstream].queue_position(self.owner, attempt.task)

    # -- the way of a request -----------------------------------------------------------------------------------------

    async def run(self, nursery: trio.Nursery) -> None:
        """Serves the call. Returns when the client has its answer, whichever it is.

        **Cancels:** at any point; the upstream is closed and the exchange settled as ``cancelled``.
        """
        self.outcome = "cancelled"
        timer: Timer | None = None
        self._nursery = nursery
        self._task = trio.lowlevel.current_task()
        try:
            self.gateway.admit(self)
            route = self.generation.route(self.call.model)
            timer = self._set_limits(route)
            async with self.gateway.admission.place(self):
                await self._serve(Plan(self.call.model, route.targets, self.gateway.targets, self.generation.config))
            if isinstance(self._cut, ClientStalled):
                self.outcome, self.error = self._cut.code, self._cut  # it did not read the end
            else:
                self.outcome = self._well
        except GatewayError as error:
            self.outcome = error.code if not self._alone else "cancelled"
            await self._fail(error)
        except Exception as error:
            self.outcome = Internal.code
            await self._fail(self._crash_of(error))
        finally:
            down = self.down
            try:
                if self.outcome == "cancelled" and isinstance(self._cut, ClientStalled):
                    self.outcome = self._cut.code  # its connection was closed for that
                elif self.outcome == "cancelled" and down.ended and self.error is None:
                    self.outcome = self._well  # only the rest of the upstream's framing was cut
                elif self.outcome == "cancelled" and not down.gone:
                    # It was not the client who cut the answer, but a server that stops.
                    self.outcome = Draining.code
                    down.patience_s = _LAST_WORDS_S
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + 2 * _LAST_WORDS_S):
                        await self._fail(Draining(STOPPED))
            finally:
                if timer is not None:
                    timer.stop()
                self._settle()

    @property
    def _well(self) -> str:
        """The outcome of one that went well."""
        return "complete" if not self._alone else "finished"

    def _crash_of(self, error: Exception) -> Internal:
        """Logs a defect, inside of its ``except``; returns what is said of it."""
        log.exception("exchange_crashed", request_id=self.id, model=self.call.model)
        return Internal(f"The gateway failed ({type(error).__name__}). Request id: {self.id}.")

    def _set_limits(self, route: Route) -> Timer:
        """Finds when the call has to be over, and has its limits in time watched."""
        limits = self.generation.config.limits
        client_s = self.client_timeout_s
        if not self.call.stream:
            client_s = min(client_s, self.sdk_timeout_s)
        elif self.sdk_timeout_s < math.inf:
            self._begin_by = self.arrived_at + self.sdk_timeout_s
        # Who waits for a turn of a session waits on the client's time, not on that of the configuration.
        self.deadline_at = min(self.started_at + route.total_timeout_s, self.arrived_at + client_s)
        stall_s = limits.stall_timeout_s or math.inf
        self._shortest_s = min(route.shortest_limit_s, self._keep_alive_s(), stall_s)
        if self._model().on_disconnect == "finish":
            self._shortest_s = min(self._shortest_s, self._model().finish_timeout_s or math.inf)
        first = min(self.started_at + self._shortest_s, self.deadline_at, self._begin_by)
        return self.gateway.timers.start(first, self._on_time)

    async def _serve(self, plan: Plan) -> None:  # noqa: ASYNC910 - an attempt is a checkpoint
        """Makes attempts as the plan says, until one has served the call. All of retries, failover and hedging."""
        chance = self.gateway.chance
        step = plan.first(trio.current_time(), chance())
        while True:
            error = await self._race(plan, step) if self._hedges(plan) else await self._attempt(plan, step)
            if error is None:
                return
            if self._cut is not None:
                raise self._cut
            if self._alone:
                raise error  # another attempt would be made for nobody
            now = trio.current_time()
            # Who has had a keep-alive comment does not wait for the beginning any more.
            over_at = self.deadline_at if self.down.committed else min(self.deadline_at, self._begin_by)
            if self._relayed and self._winner is not None:
                following = self._onward(plan, error, now)
            else:  # or who was to go on with a stream said nothing: what the client has is what it was
                following = plan.next(error, now, chance(), left_s=over_at - now)
            if following is None:
                raise error
            log.info(
                "attempt_failed",
                request_id=self.id,
                target=str(step.target),
                error=error.message,
                next=str(following.target),
                why=following.why,
                after_s=round(following.after_s, 3),
            )
            step = following
            if step.after_s > 0:
                await self._wait(plan, step)

    def _hedges(self, plan: Plan) -> bool:
        return not self._relayed and plan.hedge_delay_s() is not None

    async def _race(self, plan: Plan, step: Step) -> GatewayError | None:
        """Makes an attempt, and a second one beside it where the first one is slow to begin. The first content wins;
        the other one is cancelled at once.

        Returns:
            None = one has served the call; else why the last one did not.
        """
        errors: list[GatewayError] = []
        decided = trio.Event()

        async def one(step: Step) -> None:
            error = await self._attempt(plan, step, decided)
            if error is not None:
                errors.append(error)
            decided.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, step)
            with trio.move_on_after(plan.hedge_delay_s() or 0.0):
                await decided.wait()
            if not decided.is_set() and self._cut is None and not self._alone:
                second = plan.hedge(trio.current_time())
                if second is not None:
                    nursery.start_soon(one, second)
        return self._winner.error if self._winner is not None else errors[-1]

    async def _attempt(self, plan: Plan, step: Step, decided: trio.Event | None = None) -> GatewayError | None:
        """Makes one attempt, and accounts for it.

        Returns:
            Why it failed; returned, since a nursery would make a group of it.
        """
        attempt = Attempt(step=step, target=step.target, started_at=trio.current_time())
        self.attempts.append(attempt)
        self._live.append(attempt)
        if self._winner is None:
            self.target = attempt.target
        error: GatewayError | None = None
        try:
            await self._try(attempt, decided)
            if not attempt.lost:
                attempt.outcome = "complete"
        except GatewayError as raised:
            error = attempt.error = raised
            attempt.outcome = raised.code
        finally:
            now = attempt.ended_at = trio.current_time()
            self._live.remove(attempt)
            if not any(other.sent_at < math.inf for other in self._live):
                self._note_silent(now)
            attempt.phase = "ended"
            if attempt.outcome is None:
                attempt.outcome = "lost" if attempt.lost else "cancelled"
            plan.end(
                step,
                now,
                error=error,
                first_token_s=attempt.first_content_after_s,
                judged=attempt.outcome == "complete" or (error is not None and error is not self._cut),
            )
        return error  # noqa: ASYNC910 - it was raised by what waited, or nothing was to wait for

    async def _try(self, attempt: Attempt, decided: trio.Event | None) -> None:
        upstream = self.generation.upstreams[attempt.target.upstream]
        try:
            with attempt.half:
                if self._cut is not None:
                    attempt.half.cancel()
                async with upstream.open(
                    "POST",
                    self.call.endpoint.path,
                    self._body_for(attempt),
                    headers=self._headers_for(attempt),
                    owner=self.owner,
                    on_phase=functools.partial(self._enter, attempt),
                ) as reply:
                    attempt.reply = reply
                    attempt.heard_at = trio.current_time()
                    attempt.head_due_from = math.inf
                    if not 200 <= reply.status < 300:
                        raise await upstream.error_of(reply)
                    last: bytes | None = None
                    if self.call.stream:
                        last = await self._relay(attempt, reply, decided)
                    elif self.call.endpoint.answer == "json":
                        last = await self._answer(attempt, reply, decided)
                    else:
                        await self._pass_on(attempt, reply, decided)
                if last is not None:
                    # The upstream has done its part: its place is free, however long the client takes.
                    attempt.reply, attempt.phase = None, "ended"
                    if self.call.stream:
                        await self.down.end(last)
                    else:
                        await self.down.respond(200, [(b"content-type", b"application/json")], last)
            if attempt.half.cancelled_caught and not attempt.lost and not self._ending:
                raise self._cause_of(attempt)
            if not attempt.lost:
                upstream.note_up()
        except GatewayError as error:
            if attempt.lost:
                return  # noqa: ASYNC910 - whatever it looks like from here, it was cancelled
            if (self._cut or attempt.cause) is not None and error is not (self._cut or attempt.cause):
                raise self._cause_of(attempt) from error  # it is what the cut looks like from the reader's side
            if (isinstance(error, Unavailable) and not error.reachable) or (
                isinstance(error, UpstreamTimeout) and error.phase == "connect"
            ):
                upstream.note_down(error)
            elif error.blame == "provider":
                upstream.note_error(error)
            raise
        finally:
            if attempt.reader is not None:
                self.usage = attempt.reader.usage or self.usage
            attempt.reply = None
            attempt.sent_at = attempt.heard_at = attempt.head_due_from = math.inf

    def _cause_of(self, attempt: Attempt) -> GatewayError:
        cause = self._cut or attempt.cause
        assert cause is not None, "a half is cancelled by cut() and lose() only"
        return cause

    def _enter(self, attempt: Attempt, phase: str) -> None:
        attempt.phase = phase
        if phase == "connecting":
            now = attempt.sent_at = attempt.head_due_from = trio.current_time()
            if self._upstream_since is None:
                self._upstream_since = now

    def upstream_s(self, now: float) -> float:
        """For how long an upstream has been waited for."""
        return self._upstream_s + (now - self._upstream_since if self._upstream_since is not None else 0.0)

    def _note_silent(self, now: float) -> None:
        """No upstream is waited for any more."""
        if self._upstream_since is not None:
            self._upstream_s += now - self._upstream_since
            self._upstream_since = None

    def _body_for(self, attempt: Attempt) -> bytes:
        call = self.call if not self._text else self.call.continued_from(self._text)
        return call.body_for(attempt.target.model)

    def _headers_for(self, attempt: Attempt) -> dict[str, str]:
        """What goes upstream, and with it how long the upstream's answer is of use."""
        own_s = self.generation.config.timeout_s(attempt.target.upstream, "total", self.call.model)
        over_at = min(self.deadline_at, self.started_at + own_s)
        if over_at == math.inf:
            return self.headers
        left_s = max(0.001, over_at - trio.current_time())
        return {**self.headers, "x-request-timeout": f"{left_s:.3f}"}

    def _claim(self, attempt: Attempt, decided: trio.Event | None) -> bool:
        """Has an attempt be the one that answers, for it has content; the others are cancelled at once.

        Returns:
            False where another one was first.
        """
        if attempt.lost:
            return False
        now = trio.current_time()
        attempt.sent_at = math.inf
        attempt.first_content_after_s = now - attempt.started_at
        for other in self._live:
            if other is not attempt:
                other.lose()
        self._winner = attempt
        self.target = attempt.target
        self._relayed = True
        if self.first_content_after_s is None:
            self.first_content_after_s = now - self.started_at
        self._note_silent(now)
        if decided is not None:
            decided.set()
        return True

    async def _wait(self, plan: Plan, step: Step) -> None:
        """Waits before an attempt."""
        waited = False
        try:
            with self.waiting("pausing"):
                await trio.sleep(step.after_s)
                waited = True
        finally:
            if not waited or self._cut is not None:
                plan.end(step, trio.current_time(), judged=False)

    @contextlib.contextmanager
    def waiting(self, phase: str, *, at_most_s: float = math.inf) -> Iterator[None]:
        """A block in which nothing is done for the exchange but waiting. What cuts the exchange ends the wait.

        Raises:
            GatewayError: It was cut, then or before.
        """
        self._state = phase
        try:
            with trio.move_on_after(at_most_s) as self._pause:
                if self._cut is not None:
                    self._pause.cancel()
                yield
        finally:
            self._pause = None
            if phase == "queued":
                self._silent_since = trio.current_time()
        if self._cut is not None:
            raise self._cut

    @property
    def is_cut(self) -> bool:
        """Something has ended it: nothing more is begun for it."""
        return self._cut is not None

    def _onward(self, plan: Plan, error: GatewayError, now: float) -> Step | None:
        """Has another target go on with a stream that has broken off, where that can be done without a seam.

        Only text can: what has been sent becomes the beginning of an assistant's message, which the next one goes on
        with. Half a call for a tool, or reasoning, cannot be gone on with.
        """
        if not error.retryable or self._model().on_truncation != "continue" or self.deadline_at <= now:
            return None
        reader = self._winner.reader if self._winner is not None else None
        kept = reader.kept if reader is not None else None
        if reader is None or kept is None or reader.all_finished or self.call.choices > 1:
            return None
        said = AnswerAccumulator()
        for frames in kept:
            said.feed(frames)
        if not (said.is_only_text and said.is_exact):
            return None
        step = plan.continuation(now)
        if step is not None:
            self._text += said.text
            self._seam = self._seam or continuation_head(kept)
            self._events_before += reader.events
            self._winner = None
        return step

    async def _relay(self, attempt: Attempt, reply: Reply, decided: trio.Event | None) -> bytes | None:
        """Moves whole events from the upstream to the client until the stream is complete.

        Returns:
            The last frame, which is still to be sent; None = it has been, or another attempt was first.
        """
        name = attempt.target.upstream
        if reply.content_type not in ("text/event-stream", ""):
            raise ProtocolViolation(
                f"The upstream {name} was asked for a stream and answered with {reply.content_type}."
            )
        attempt.phase = "waiting"
        limits = self.generation.config.limits
        reader = attempt.reader = StreamReader(
            self.call.endpoint,
            model=self.call.model,
            upstream=name,
            max_event_bytes=limits.event_bytes,
            choices=self.call.choices,
            keep_bytes=limits.buffered_bytes if self._may_continue() else 0,
            head=self._seam,
        )
        down = self.down
        relayed = False
        while True:
            if relayed and await self._be_carried(reply, reader):
                if reader.complete:
                    return await self._end_stream(attempt, reply, b"")
                if reader.error is not None:
                    raise reader.error
            piece = await self._receive(attempt, reply)
            data = reader.feed(piece) if piece is not None else reader.feed_end()
            if reader.error is not None and not relayed:
                raise reader.error  # nothing is out yet: a status, or the next target
            if reader.has_content and not relayed:
                if not self._claim(attempt, decided):
                    return None  # noqa: ASYNC910 - it was received
                relayed = True
                attempt.phase = "streaming"
                if not down.committed:
                    self._stamp()
                    await down.start(200, STREAM_HEADERS)
            self.bytes_sent += len(data)
            if self.recorder is not None and data:
                self.recorder.feed(data)
            if reader.complete:
                return await self._end_stream(attempt, reply, data)
            if data:
                await down.send(data)
            if reader.error is not None:
                raise reader.error

    def _may_continue(self) -> bool:
        return self._model().on_truncation == "continue" and self.call.endpoint.path == "/chat/completions"

    async def _end_stream(self, attempt: Attempt, reply: Reply, data: bytes) -> bytes | None:
        """Returns as `_relay`."""
        if self.recorder is not None:
            await self.recorder.complete(attempt.reader.usage if attempt.reader is not None else None)
        self._ending = True
        response = reply.plain_response
        if response is not None and response.complete:
            return data  # noqa: ASYNC910 - it is about to be sent
        await self.down.end(data)
        await self._finish(reply)
        return None

    async def _be_carried(self, reply: Reply, reader: StreamReader) -> bool:
        """Has the engine move the stream, until it is complete, has an error, or its body has ended.

        Returns:
            Whether it did; False where the two ends are not both plain sockets.
        """
        relay, response, client = self.gateway.relay, reply.plain_response, self.down.socket
        if self.recorder is not None or self.down.gone:
            return False  # noqa: ASYNC910 - what the engine sends is not heard here
        if relay is None or response is None or response.socket is None or response.complete or client is None:
            return False  # noqa: ASYNC910 - the caller goes on
        if self.down.sending_since is not None:
            return False  # noqa: ASYNC910 - a keep-alive is half out: the next piece waits for it, and then we see
        stream = relay.stream(response, response.socket, client, chunked=self.down.chunked, reader=reader)
        self._carried = stream
        try:
            await stream.carry(self)
        finally:
            self._carried = None
        if stream.failure is not None and not reader.complete:
            raise reply.cut_error(stream.failure) from stream.failure
        return True

    def note_relayed(self, now: float, sent_bytes: int) -> None:
        """For the engine: something came, and was sent on."""
        if self._winner is not None:
            self._winner.heard_at = now
        if sent_bytes:
            self.bytes_sent += sent_bytes
            self.down.last_sent_at = now

    def note_parked(self, since: float | None) -> None:
        """For the engine: since when the client has not been reading."""
        self.down.sending_since = since
        if since is None and self._winner is not None:
            self._winner.heard_at = trio.current_time()  # what the upstream has sent meanwhile is yet to be read

    def owe(self, rest: bytes) -> None:
        """For the engine: what is left of a frame."""
        self.down.owe(rest)

    async def _receive(self, attempt: Attempt, reply: Reply) -> bytes | None:
        attempt.reading = True
        try:
            return await reply.receive()
        finally:
            attempt.reading = False
            attempt.heard_at = trio.current_time()

    async def _answer(self, attempt: Attempt, reply: Reply, decided: trio.Event | None) -> bytes | None:
        """Takes a JSON answer whole.

        Returns:
            What is to be sent, under the public model id; None = another attempt was first.
        """
        attempt.phase = "reading"
        attempt.sent_at = math.inf

        def feed() -> None:
            attempt.heard_at = trio.current_time()

        body = await reply.read(self.generation.config.limits.response_bytes, on_piece=feed)
        data, usage = decode_answer(body, model=self.call.model, upstream=attempt.target.upstream)
        if not self._claim(attempt, decided):
            return None
        self.usage = usage
        if self.recorder is not None:
            self.recorder.feed_answer(data)
            await self.recorder.complete(usage)
        self._ending = True
        self.bytes_sent = len(data)
        self._stamp()
        return data

    async def _pass_on(self, attempt: Attempt, reply: Reply, decided: trio.Event | None) -> None:
        """Moves an answer of bytes (audio) as it comes. Its only proof of completeness is its framing."""
        attempt.phase = "waiting"
        headers: list[Header] = [(b"content-type", (reply.content_type or "application/octet-stream").encode())]
        if "content-length" in reply.headers and "content-encoding" not in reply.headers:
            headers.append((b"content-length", reply.headers["content-length"].encode()))
        while (piece := await self._receive(attempt, reply)) is not None:
            if not self._relayed:
                if not self._claim(attempt, decided):
                    return
                attempt.phase = "streaming"
                self._stamp()
                await self.down.start(200, headers)
            self.bytes_sent += len(piece)
            await self.down.send(piece)
        if not self._relayed and not self._claim(attempt, decided):
            return
        self._ending = True
        if not self.down.committed:
            self._stamp()
            await self.down.start(200, headers)
        await self.down.end()

    async def _finish(self, reply: Reply) -> None:  # noqa: ASYNC910 - as `Reply.receive`
        """Reads what is left of the upstream's framing, so that its connection can serve the next call."""
        with trio.move_on_after(_REST_S), contextlib.suppress(GatewayError):
            while await reply.receive() is not None:
                pass

    async def _fail(self, error: GatewayError) -> None:  # noqa: ASYNC910 - as the sends of `Downstream`
        """Tells the client, in the one way that is left."""
        self._ending = True
        self.error = error
        if self.attempts and isinstance(error, UpstreamError):
            error.attempts = tuple(attempt.describe(self.started_at) for attempt in self.attempts)
        down = self.down
        self._stamp()
        if not down.committed:
            await down.respond(*error.to_response())
        elif self.call.stream:
            await down.end(error.to_frame())
        else:
            down.abandon()

    def _stamp(self) -> None:
        """Says in the head of the response who answered, at which attempt, and what of the time was the gateway's."""
        if self._stamped or self.down.committed:
            return
        self._stamped = True
        now = trio.current_time()
        upstream_s = self.upstream_s(now)
        headers = self.down.headers
        if self.target is not None and self.attempts:
            headers.append((b"x-trigate-upstream", self.target.upstream.encode()))
        headers.append((b"x-trigate-attempts", b"%d" % len(self.attempts)))
        headers.append((b"x-trigate-overhead-ms", b"%.3f" % (max(0.0, now - self.arrived_at - upstream_s) * 1000)))

    # -- what can end the upstream's part -----------------------------------------------------------------------------

    def cut(self, error: GatewayError) -> None:
        """Ends the upstream's part now; the client gets ``error``. Synchronous, and only the first one counts."""
        if self._cut is None and not self._ending:
            self._cut = error
            for attempt in self._live:
                attempt.cut(error)
            if self._pause is not None:
                self._pause.cancel()

    @property
    def finishes(self) -> bool:
        """The upstream's answer is taken to its end also where the client leaves (``on_disconnect``). Where no upstream
        is at work, nothing is begun for nobody."""
        return self._model().on_disconnect == "finish" and (self._alone or self._is_asked)

    @property
    def _is_asked(self) -> bool:
        """An upstream is at work for it."""
        return any(attempt.phase != "queued" for attempt in self._live)

    def finish_alone(self) -> None:
        """The client has left, and `finishes`: the rest of the upstream's answer is accounted, and nobody gets it."""
        self.down.gone = True
        self.deadline_at = min(self.deadline_at, trio.current_time() + (self._model().finish_timeout_s or math.inf))
        self._alone = True
        if self._carried is not None:
            self._carried.hand_back()

    def _model(self) -> ModelConfig:
        return self.generation.config.models.get(self.call.model, _PLAIN_MODEL)

    def abandon_upstream(self) -> bool:
        """The client has left: closes the upstream's connection now, and from here, where the engine carries the
        stream.

        Returns:
            Whether it did. The exchange then sleeps until it is cancelled, which is no longer urgent.
        """
        reply = self._winner.reply if self._winner is not None else None
        if self._carried is None or reply is None or not self._carried.drop():
            return False
        reply.abandon()
        return True

    def _keep_alive_s(self) -> float:
        return (self.generation.config.limits.keep_alive_s or math.inf) if self.call.stream else math.inf

    def _on_time(self, now: float) -> float:
        """Looks whether a limit in time has been reached, and says when to look again.

        That is when the next one is due, and never later than the shortest of them all: whatever starts to run
        meanwhile cannot be due before. So a piece of the stream costs a timestamp, not a timer.
        """
        down = self.down
        keep_alive_s = self._keep_alive_s()
        sending = down.sending_since is not None
        due = [self.deadline_at]
        if not down.committed:
            due.append(self._begin_by)
        if min(due) <= now:
            self.cut(UpstreamTimeout(f"The call took longer than {self._allowed_s():g} s in all.", phase="total"))
        for attempt in self._live:
            due += self._look_at(attempt, now, sending=sending)
        stalled_since, stall_s = self._stall(now)
        if stalled_since + stall_s <= now:
            self._nursery.start_soon(self._cut_stalled, stall_s)
        due.append(stalled_since + stall_s)
        # Who may still be refused at the door is to get a status: silence counts from when it is in.
        at_the_door = self._pause is not None and self._state == "queued"
        quiet_since = max(down.last_sent_at, self.started_at, self._silent_since)
        if sending or down.gone or at_the_door:
            quiet_since = math.inf
        if quiet_since + keep_alive_s <= now and self._may_keep_alive():
            if self._carried is not None:
                self._carried.inject(sse.comment("keep-alive"))
                down.last_sent_at = now
            else:
                # In a task of its own: the client may not read, and the stall limit holds for this send too.
                self._nursery.start_soon(self._keep_alive)
            quiet_since = now
        due.append(quiet_since + keep_alive_s)
        return min([now + self._shortest_s, *(at for at in due if at > now)])

    def _allowed_s(self) -> float:
        """What the call was allowed in all: who looks at a deadline that is over says which it was."""
        own_s = self.client_timeout_s if self.call.stream else min(self.client_timeout_s, self.sdk_timeout_s)
        if not self.down.committed:
            own_s = min(own_s, self.sdk_timeout_s)
        return min(own_s, self.generation.route(self.call.model).total_timeout_s)

    def _look_at(self, attempt: Attempt, now: float, *, sending: bool) -> list[float]:
        """Looks whether an attempt has reached one of its limits; returns when each is due."""
        config = self.generation.config
        target = attempt.target.upstream
        if sending and not attempt.reading and attempt.heard_at < math.inf:
            attempt.heard_at = now  # it is the client that keeps the relay waiting: the upstream is not idle
        idle_since = attempt.heard_at if attempt.sent_at == math.inf else math.inf
        limits: tuple[tuple[TimeoutPhase, float, str], ...] = (
            ("response_head", attempt.head_due_from, "did not begin to answer within"),
            ("first_token", attempt.sent_at, "sent no content within"),
            ("idle", idle_since, "fell silent for"),
            ("total", self.started_at, "took longer than"),
        )
        due = []
        for phase, since, what in limits:
            timeout_s = config.timeout_s(target, phase, self.call.model)
            if since + timeout_s <= now:
                attempt.cut(UpstreamTimeout(f"The upstream {target} {what} {timeout_s:g} s.", phase=phase))
            due.append(since + timeout_s)
        return due

    def _stall(self, now: float) -> tuple[float, float]:
        """Since when the client has taken nothing of what waits for it, and how long it may.

        One that reads slowly does take something, if not the whole of what waits. That shows between two looks: a send
        of which the first look comes late is given half of the limit for a second one.
        """
        limit_s = self.generation.config.limits.stall_timeout_s or math.inf
        down = self.down
        if down.sending_since is None:
            return math.inf, limit_s
        taken_bytes = down.taken_bytes
        if self._waits_since != down.sending_since:
            self._waits_since = self._stalled_since = down.sending_since
            if taken_bytes is not None:
                self._stalled_since = max(down.sending_since, now - limit_s / 2)
        elif taken_bytes is not None and self._taken_bytes is not None and taken_bytes > self._taken_bytes:
            self._stalled_since = now
        self._taken_bytes = taken_bytes
        return self._stalled_since, limit_s

    async def _keep_alive(self) -> None:  # noqa: ASYNC910 - as the sends of `Downstream`
        down = self.down
        if not down.committed and self._may_keep_alive():
            self._stamp()
            await down.start(200, STREAM_HEADERS)
        # Asked again: the answer may have come meanwhile. Whatever is being sent breaks the silence as well, and who
        # waits for it may come behind the end.
        if self._may_keep_alive() and down.sending_since is None:
            if self._carried is not None:
                self._carried.inject(sse.comment("keep-alive"))
            else:
                await down.send(sse.comment("keep-alive"))

    def _may_keep_alive(self) -> bool:
        return self._cut is None and not self._ending

    async def _cut_stalled(self, timeout_s: float) -> None:
        attempt = self._winner
        reply = attempt.reply if attempt is not None else None
        stalled = ClientStalled(f"The client read nothing for {timeout_s:g} s; its upstream stream was ended.")
        self.cut(stalled)
        self._cut = self._cut or stalled  # also where it is the end that the client does not read
        if reply is not None and attempt is not None and not attempt.reading:
            # The relay may sit in a send that no cancellation reaches: close from here.
            await reply.aclose()
        await self.down.abort()

    # -- the end ------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Accounts for the exchange, once: the totals and one log line."""
        self.gateway.settle(self)
        log.info("exchange", **self._line())

    def _line(self) -> dict[str, object]:
        said: dict[str, object] = {
            "request_id": self.id,
            "model": self.call.model,
            "target": str(self.target) if self.target else None,
            "stream": self.call.stream,
            "outcome": self.outcome,
            "duration_s": round(self.age_s, 4),
            "bytes": self.bytes_sent,
            "attempts": len(self.attempts),
        }
        if len(self.attempts) > 1:
            said["tried"] = [f"{attempt.target} {attempt.outcome or attempt.phase}" for attempt in self.attempts]
        if self.call.stream:
            said["events"] = self.events
        if self.first_content_after_s is not None:
            said["first_content_s"] = round(self.first_content_after_s, 4)
        if self.usage is not None:
            said["prompt_tokens"] = self.usage.prompt_tokens
            said["completion_tokens"] = self.usage.completion_tokens
        return said
