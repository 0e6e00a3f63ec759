"""One request, one nursery: plan → attempt → COMMIT → relay → settle. The page to read first.

The request's nursery (opened in `connection`) is cancelled by the *watch* when the client leaves. Everything that is
done for the request happens inside, so when the nursery ends, nothing of the request is left anywhere.

The rules:

* Before COMMIT every failure is an exception and becomes a status; after it, every failure is an error event, and
  there is no ``[DONE]``. There is no third case.
* The *upstream half* (`Exchange._half`) is a cancel scope of its own: a deadline, a drain or a stalled client ends the
  upstream's part at once (that is the costly one), and what the client has to be told can still be told.
* A frame is sent whole or not begun: `Downstream` sees to it, so a cancellation lands between frames.
* Once the answer has begun, and where both ends are plain sockets, the `relay` engine moves the events while the
  exchange sleeps; everywhere else the loop in `_relay` does. Both feed the same `wire.StreamReader`.
* The limits in time are kept by one task for all exchanges (`timers`), which asks each one when it is due (`_on_time`).
* `settle` is synchronous and runs in ``finally``: exactly once, whatever happened.
"""

from __future__ import annotations

import contextlib
import math
import socket
from typing import TYPE_CHECKING, Literal, Protocol

import attrs
import structlog
import trio

from trigate import sse
from trigate.config import TimeoutPhase
from trigate.errors import (
    Draining,
    Garbled,
    GatewayError,
    Header,
    Internal,
    Stalled,
    Unavailable,
    UpstreamTimeout,
)
from trigate.routing import Target
from trigate.wire import Call, StreamReader, Usage, decode_answer

if TYPE_CHECKING:
    from trigate.gateway import Gateway, Generation
    from trigate.relay import Stream
    from trigate.timers import Timer
    from trigate.upstream import Reply

log = structlog.get_logger("trigate.exchange")

Deadline = Literal["total", "first_token", "idle", "stall"]

# How long the rest of an upstream's body (the end of its framing) may take after the last event, before the
# connection is closed instead of reused. The client has its answer by then.
_REST_S = 0.25
_LAST_WORDS_S = 1.0


class Downstream(Protocol):
    """The client's side of an exchange, as `downstream` offers it. What is sent is sent whole; no send raises when the
    client is gone (its nursery is being cancelled then)."""

    sending_since: float | None
    """Since when a send has been waiting for the client to read; None = none is."""
    last_sent_at: float
    patience_s: float
    """How long a send may wait for the client."""

    @property
    def committed(self) -> bool:
        """The status line is out."""

    @property
    def ended(self) -> bool:
        """The last byte of the answer has been handed over."""

    @property
    def gone(self) -> bool:
        """The client has left."""

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

    def hear(self, frames: bytes) -> None:
        """Takes whole events of a streamed answer, as they are about to go to the client."""

    def hear_answer(self, body: bytes) -> None:
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


@attrs.frozen(kw_only=True)
class Attempt:
    """One try at one target, and how it ended (None = well)."""

    target: Target
    error: str | None = None


@attrs.define(eq=False, kw_only=True)
class Exchange:
    """A request in flight. Its public attributes are what ``/status`` shows.

    Attributes:
        phase: ``admitted``, ``queued`` (for a place at the upstream), ``connecting`` (until the reply's head),
            ``waiting`` (for the first content), ``streaming``, ``reading`` (a JSON answer), ``ending``.
        outcome: None while it runs; then ``complete``, ``cancelled`` (the client left), or an error code.
    """

    id: str
    call: Call
    gateway: Gateway
    generation: Generation
    down: Downstream
    headers: dict[str, str] = attrs.field(factory=dict)
    """What goes upstream besides the upstream's own headers."""
    phase: str = "admitted"
    target: Target | None = None
    bytes_sent: int = 0
    attempts: list[Attempt] = attrs.field(factory=list)
    usage: Usage | None = None
    outcome: str | None = None
    first_content_after_s: float | None = None
    error: GatewayError | None = None
    """What the client was told, or would have been."""
    recorder: Recorder | None = None
    started_at: float = attrs.field(factory=trio.current_time)
    _half: trio.CancelScope | None = None
    _cut: GatewayError | None = None
    _reply: Reply | None = None
    _attempt_at: float = math.inf
    _heard_at: float = math.inf
    _reader: StreamReader | None = None
    _carried: Stream | None = None
    _waits_since: float = math.inf
    _stalled_since: float = math.inf
    _taken_bytes: int | None = None
    _shortest_s: float = math.inf
    _nursery: trio.Nursery = attrs.field(init=False)
    _relayed: bool = False
    _reading: bool = False

    @property
    def events(self) -> int:
        """How many events have been sent."""
        return self._reader.events if self._reader is not None else 0

    @property
    def age_s(self) -> float:
        """How long it has been running."""
        return trio.current_time() - self.started_at

    # -- the way of a request -----------------------------------------------------------------------------------------

    async def run(self, nursery: trio.Nursery) -> None:
        """Serves the call. Returns when the client has its answer, whichever it is.

        **Cancels:** at any point; the upstream is closed and the exchange settled as ``cancelled``.
        """
        self.outcome = "cancelled"
        timer: Timer | None = None
        try:
            self.gateway.admit(self)
            route = self.generation.route(self.call.model)
            self._nursery = nursery
            stall_s = self.generation.config.limits.stall_timeout_s or math.inf
            self._shortest_s = min(route.shortest_limit_s, self._keep_alive_s(), stall_s)
            timer = self.gateway.timers.start(self.started_at + self._shortest_s, self._on_time)
            await self._try(route.targets)
            self.outcome = "complete"
        except GatewayError as error:
            self.outcome = error.code
            await self._fail(error)
        except Exception as error:
            log.exception("exchange_crashed", request_id=self.id, model=self.call.model)
            self.outcome = Internal.code
            await self._fail(Internal(f"The gateway failed ({type(error).__name__}). Request id: {self.id}."))
        finally:
            down = self.down
            try:
                if self.outcome == "cancelled" and isinstance(self._cut, Stalled):
                    self.outcome = self._cut.code  # its connection was closed for that
                elif self.outcome == "cancelled" and down.ended:
                    self.outcome = "complete"  # only the rest of the upstream's framing was cut
                elif self.outcome == "cancelled" and not down.gone and down.sending_since is None:
                    # It was not the client who cut the answer, but a server that stops.
                    down.patience_s = _LAST_WORDS_S
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + 2 * _LAST_WORDS_S):
                        await self._fail(Draining("The server stopped; the answer is incomplete. Try again."))
            finally:
                if timer is not None:
                    timer.stop()
                self._settle()

    async def _try(self, plan: tuple[Target, ...]) -> None:  # noqa: ASYNC910 - a plan has at least one target
        for target in plan:
            ended: str | None = "cancelled"
            try:
                await self._attempt(target)
                ended = None
                return
            except GatewayError as error:
                ended = error.code
                last = target is plan[-1]
                if last or self._relayed or not error.retryable or self._total_left_s() <= 0:
                    raise
                log.info("attempt_failed", request_id=self.id, target=str(target), error=error.message)
            finally:
                self.attempts.append(Attempt(target=target, error=ended))

    async def _attempt(self, target: Target) -> None:
        self.target = target
        upstream = self.generation.upstreams[target.upstream]
        try:
            with trio.CancelScope() as self._half:
                if self._cut is not None:
                    self._half.cancel()
                async with upstream.open(
                    "POST",
                    self.call.endpoint.path,
                    self.call.body_for(target.model),
                    headers=self.headers,
                    on_phase=self._enter,
                ) as self._reply:
                    self._heard_at = trio.current_time()
                    if not 200 <= self._reply.status < 300:
                        raise await upstream.error_of(self._reply)
                    if self.call.stream:
                        await self._relay(self._reply)
                    elif self.call.endpoint.answer == "json":
                        await self._answer(self._reply)
                    else:
                        await self._pass_on(self._reply)
            if self._half.cancelled_caught and self.phase != "ending":
                raise self._cut_error()
            upstream.note_up()
        except GatewayError as error:
            if self._cut is not None and error is not self._cut:
                raise self._cut_error() from error  # it is what the cut looks like from the reader's side
            if (isinstance(error, Unavailable) and not error.reachable) or (
                isinstance(error, UpstreamTimeout) and error.phase == "connect"
            ):
                upstream.note_down(error)
            elif error.blame == "provider":
                upstream.note_error(error)
            raise
        finally:
            if self._reader is not None:
                self.usage = self._reader.usage
            self._half = self._reply = None
            self._attempt_at = self._heard_at = math.inf

    def _enter(self, phase: str) -> None:
        self.phase = phase
        if phase == "connecting":
            self._attempt_at = trio.current_time()

    async def _relay(self, reply: Reply) -> None:
        """Moves whole events from the upstream to the client until the stream is complete."""
        name = self.target.upstream if self.target else ""
        if reply.content_type not in ("text/event-stream", ""):
            raise Garbled(f"The upstream {name} was asked for a stream and answered with {reply.content_type}.")
        self.phase = "waiting"
        reader = self._reader = StreamReader(
            self.call.endpoint,
            model=self.call.model,
            upstream=name,
            max_event_bytes=self.generation.config.limits.event_bytes,
        )
        down = self.down
        while True:
            if self._relayed and await self._be_carried(reply, reader):
                if reader.complete:
                    return await self._end_stream(reply, b"")
                if reader.error is not None:
                    raise reader.error
            piece = await self._receive(reply)
            data = reader.feed(piece) if piece is not None else reader.feed_end()
            if reader.error is not None and not self._relayed:
                raise reader.error  # nothing is out yet: a status, or the next target
            if reader.has_content and not self._relayed:
                self._relayed = True
                self._attempt_at = math.inf
                self.first_content_after_s = self.age_s
                self.phase = "ending" if reader.complete else "streaming"
                if not down.committed:
                    await down.start(200, STREAM_HEADERS)
            self.bytes_sent += len(data)
            if self.recorder is not None and data:
                self.recorder.hear(data)
            if reader.complete:
                return await self._end_stream(reply, data)
            if data:
                await down.send(data)
            if reader.error is not None:
                raise reader.error

    async def _end_stream(self, reply: Reply, data: bytes) -> None:
        if self.recorder is not None:
            await self.recorder.complete(self._reader.usage if self._reader is not None else None)
        self.phase = "ending"
        await self.down.end(data)
        response = reply.plain_response
        if response is None or not response.complete:
            await self._finish(reply)

    async def _be_carried(self, reply: Reply, reader: StreamReader) -> bool:
        """Has the engine move the stream, until it is complete, has an error, or its body has ended.

        Returns:
            Whether it did; False where the two ends are not both plain sockets.
        """
        relay, response, client = self.gateway.relay, reply.plain_response, self.down.socket
        if self.recorder is not None:
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
        self._heard_at = now
        if sent_bytes:
            self.bytes_sent += sent_bytes
            self.down.last_sent_at = now

    def note_parked(self, since: float | None) -> None:
        """For the engine: since when the client has not been reading."""
        self.down.sending_since = since
        if since is None:
            self._hear()  # what the upstream has sent meanwhile is yet to be read

    def owe(self, rest: bytes) -> None:
        """For the engine: what is left of a frame."""
        self.down.owe(rest)

    async def _receive(self, reply: Reply) -> bytes | None:
        self._reading = True
        try:
            return await reply.receive()
        finally:
            self._reading = False
            self._hear()

    async def _answer(self, reply: Reply) -> None:
        """Takes a JSON answer whole, and sends it on under the public model id."""
        self.phase = "reading"
        self._attempt_at = math.inf
        name = self.target.upstream if self.target else ""
        body = await reply.read(self.generation.config.limits.response_bytes, on_piece=self._hear)
        data, self.usage = decode_answer(body, model=self.call.model, upstream=name)
        if self.recorder is not None:
            self.recorder.hear_answer(data)
            await self.recorder.complete(self.usage)
        self.phase = "ending"
        self._relayed = True
        self.bytes_sent = len(data)
        await self.down.respond(200, [(b"content-type", b"application/json")], data)

    def _hear(self) -> None:
        self._heard_at = trio.current_time()

    async def _pass_on(self, reply: Reply) -> None:
        """Moves an answer of bytes (audio) as it comes. Its only proof of completeness is its framing."""
        self.phase = "waiting"
        headers: list[Header] = [(b"content-type", (reply.content_type or "application/octet-stream").encode())]
        if "content-length" in reply.headers and "content-encoding" not in reply.headers:
            headers.append((b"content-length", reply.headers["content-length"].encode()))
        while (piece := await self._receive(reply)) is not None:
            if not self._relayed:
                self._relayed = True
                self._attempt_at = math.inf
                self.phase = "streaming"
                self.first_content_after_s = self.age_s
                await self.down.start(200, headers)
            self.bytes_sent += len(piece)
            await self.down.send(piece)
        self.phase = "ending"
        if not self.down.committed:
            await self.down.start(200, headers)
        await self.down.end()

    async def _finish(self, reply: Reply) -> None:  # noqa: ASYNC910 - as `Reply.receive`
        """Reads what is left of the upstream's framing, so that its connection can serve the next call."""
        with trio.move_on_after(_REST_S), contextlib.suppress(GatewayError):
            while await reply.receive() is not None:
                pass

    async def _fail(self, error: GatewayError) -> None:  # noqa: ASYNC910 - as the sends of `Downstream`
        """Tells the client, in the one way that is left."""
        self.phase = "ending"
        self.error = error
        down = self.down
        if not down.committed:
            await down.respond(*error.to_response())
        elif self.call.stream:
            await down.end(error.to_frame())
        else:
            down.abandon()

    # -- what can end the upstream half -------------------------------------------------------------------------------

    def cut(self, error: GatewayError) -> None:
        """Ends the upstream half now; the client gets ``error``. Synchronous, and only the first one counts."""
        if self._cut is None and self.phase != "ending":
            self._cut = error
            if self._half is not None:
                self._half.cancel()

    def abandon_upstream(self) -> bool:
        """The client has left: closes the upstream's connection now, and from here, where the engine carries the
        stream.

        Returns:
            Whether it did. The exchange then sleeps until it is cancelled, which is no longer urgent.
        """
        if self._carried is None or self._reply is None or not self._carried.drop():
            return False
        self._reply.abandon()
        return True

    def _cut_error(self) -> GatewayError:
        error = self._cut
        assert error is not None, "the upstream half is cancelled by cut() only"
        if isinstance(error, UpstreamTimeout) and error.phase != "total":
            self._cut = None  # the next target has deadlines of its own
        return error

    def _total_left_s(self) -> float:
        return self._timeout_s("total") - self.age_s

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
        # While a first token is awaited, or the client keeps the relay waiting, the upstream is not idle.
        idle_since = self._heard_at if self._attempt_at == math.inf and not sending else math.inf
        deadlines: tuple[tuple[Deadline, float, float], ...] = (
            ("total", self.started_at, self._timeout_s("total")),
            ("first_token", self._attempt_at, self._timeout_s("first_token")),
            ("idle", idle_since, self._timeout_s("idle")),
            ("stall", *self._stall(now)),
        )
        for deadline, since, timeout_s in deadlines:
            if since + timeout_s <= now:
                self._expire(deadline, timeout_s)
        quiet_since = math.inf if sending else max(down.last_sent_at, self.started_at)
        if quiet_since + keep_alive_s <= now and self._may_keep_alive():
            if self._carried is not None:
                self._carried.inject(sse.comment("keep-alive"))
                down.last_sent_at = now
            else:
                # In a task of its own: the client may not read, and the stall limit holds for this send too.
                self._nursery.start_soon(self._keep_alive)
            quiet_since = now
        due = [quiet_since + keep_alive_s, *(since + timeout_s for _, since, timeout_s in deadlines)]
        return min([now + self._shortest_s, *(at for at in due if at > now)])

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
            await down.start(200, STREAM_HEADERS)
        # Asked again: the answer may have come meanwhile. Whatever is being sent breaks the silence as well, and who
        # waits for it may come behind the end.
        if self._may_keep_alive() and down.sending_since is None:
            if self._carried is not None:
                self._carried.inject(sse.comment("keep-alive"))
            else:
                await down.send(sse.comment("keep-alive"))

    def _may_keep_alive(self) -> bool:
        return self._cut is None and self.phase != "ending"

    def _timeout_s(self, phase: TimeoutPhase) -> float:
        config = self.generation.config
        if self.target is None:
            return getattr(config.limits, f"{phase}_timeout_s") or math.inf
        return config.timeout_s(self.target.upstream, phase)

    def _expire(self, deadline: Deadline, timeout_s: float) -> None:
        name = self.target.upstream if self.target else None
        match deadline:
            case "total":
                self.cut(UpstreamTimeout(f"The call took longer than {timeout_s:g} s in all.", phase="total"))
            case "first_token":
                said = f"The upstream {name} sent no content within {timeout_s:g} s."
                self.cut(UpstreamTimeout(said, phase="first_token"))
            case "idle":
                self.cut(UpstreamTimeout(f"The upstream {name} fell silent for {timeout_s:g} s.", phase="idle"))
            case "stall":
                self._nursery.start_soon(self._cut_stalled, timeout_s)

    async def _cut_stalled(self, timeout_s: float) -> None:
        reply, ending = self._reply, self.phase == "ending"
        self.cut(Stalled(f"The client read nothing for {timeout_s:g} s; its upstream stream was ended."))
        if reply is not None and not self._reading:
            # The relay may sit in a send that no cancellation reaches: close from here.
            await reply.aclose()
        if not ending:
            await self.down.abort()
        else:
            await trio.lowlevel.checkpoint()

    # -- the end ------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Accounts for the exchange, once: the totals and one log line."""
        self.gateway.settle(self)
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
        if self.call.stream:
            said["events"] = self.events
        if self.first_content_after_s is not None:
            said["first_content_s"] = round(self.first_content_after_s, 4)
        if self.usage is not None:
            said["prompt_tokens"] = self.usage.prompt_tokens
            said["completion_tokens"] = self.usage.completion_tokens
        log.info("exchange", **said)
