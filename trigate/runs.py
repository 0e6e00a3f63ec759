"""Runs: what was asked for by messages of hooks and channels, from its acceptance to its result.

A run is a row in the store with a life of its own, and an exchange like any other while it is performed: in its own
nursery, with an in-process client, or in that of the webhook call that waits for it.

The rules:

* What a run appends to its session, what it delivers, its result and its place in the queue are one transaction
  (`store.Runs.finish`), and the first one counts. So a run that is done twice, since a process died in between, has
  been done once.
* A run that was *acknowledged* is finished whatever happens to this process. When the process stops, such a run is
  left as it is: the worker is then a dead one, and whoever adopts its runs does it again.
* A run that was not has a client that waits for it. When the process stops, or the store fails, the client is told so.
* A run ends however it ends: also where its task is cancelled, by a write that is queued and not waited for. What was
  not done is then tried again by the service, until it is.
* A key stands for a run and for its result, unless trying again is right: a run that failed by no fault of the message
  (`_is_final`), or whose client left, gives its idempotency key back.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, assert_never

import attrs
import msgspec
import structlog
import trio

from trigate import errors
from trigate.answers import AnswerRecord
from trigate.callbacks import callback_body
from trigate.config import Action, HookConfig, Seconds
from trigate.errors import (
    Draining,
    GatewayError,
    Internal,
    NotFound,
    Overloaded,
    SessionBusy,
    Stopped,
    StoreUnavailable,
)
from trigate.exchange import Exchange
from trigate.store import ENDED, Claim, Delivery, Run, RunState, Turn, Write
from trigate.wire import ENDPOINTS, Call, Usage, decode_call

if TYPE_CHECKING:
    from trigate.exchange import Downstream
    from trigate.gateway import Gateway
    from trigate.sessions import SessionTurn

log = structlog.get_logger("trigate.runs")

MAX_STARTS = 50
"""How often a run is begun: one that takes its process with it each time is not begun again."""
RETRY_S = 1.0
"""How soon what the gateway could not do is tried again; doubles up to `RETRY_MAX_S`."""
RETRY_MAX_S = 30.0
LOOK_S = 1.0
"""How often a run of another worker is looked at, whose bell may have been lost."""
CLIENT_LEFT = 499
"""The status of a run whose client did not wait for it. (No HTTP status: nobody is sent it.)"""
_STOP_S = 5.0

_CHAT = ENDPOINTS["/v1/chat/completions"]


@attrs.frozen(kw_only=True)
class Order:
    """What a message asks for; everything that is needed to do it, also after a restart with another configuration.
    Kept as JSON in `store.Run.request`.

    Attributes:
        channel: The hook or channel that it came by.
        owner, session: Whose session it belongs to, and its key; session None = nothing is remembered.
        text: The prompt (``chat``) or the note (``note``).
        sender: Who sent it.
        reply_to: Where the result goes: a callback's URL, or what the channel's adapter needs to reply, of which
            ``target`` names the place where one reply at a time arrives (the chat); None = it is fetched.
        finish: It goes on where the client that waits for it leaves.
    """

    channel: str
    owner: str
    session: str | None
    action: Action
    text: str
    sender: str
    model: str
    system: str | None = None
    parameters: Mapping[str, Any] = attrs.field(factory=dict)  # Any: JSON
    reply_to: Mapping[str, Any] | str | None = None
    finish: bool = False

    def encode(self) -> bytes:
        """Writes it as JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, request: bytes) -> Order:
        """Reads what `encode` has written."""
        return cls(**msgspec.json.decode(request))

    def call(self) -> Call:
        """The chat request that it stands for.

        Raises:
            BadRequest: It cannot be served.
        """
        messages = [{"role": "system", "content": self.system}] if self.system else []
        body = {
            **self.parameters,
            "model": self.model,
            "messages": [*messages, {"role": "user", "content": self.text}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return decode_call(_CHAT, msgspec.json.encode(body))


class Live(Protocol):
    """A reply that can be watched while it grows: what a channel shows of a run that goes on."""

    def show(self, text: str) -> None:
        """The text so far. Synchronous, and called often: whoever shows it takes the last one when it can."""

    async def end(self) -> Mapping[str, Any]:
        """Stops showing. Returns what the delivery of the final text has to know (the id of the message to edit), as
        JSON; with ``repeatable`` true, it may be delivered twice without harm."""


class Audience(Protocol):
    """A channel that shows runs while they go on; what it is told at the end is a delivery (`outbox.Carrier`)."""

    def watch(self, run: Run, order: Order) -> contextlib.AbstractAsyncContextManager[Live]:
        """Shows a run for as long as the context is open."""


class Unwatched:
    """The client of an exchange that nobody watches (`exchange.Downstream`)."""

    socket = None
    chunked = False
    taken_bytes = None

    def __init__(self) -> None:
        self.committed = False
        self.sending_since: float | None = None
        self.last_sent_at = trio.current_time()
        self.gone = False
        self.patience_s = math.inf
        self.ended = False

    def owe(self, rest: bytes) -> None:
        """There is no socket."""

    async def respond(self, status: int, headers: list[errors.Header], body: bytes) -> None:
        """As `Downstream.respond`."""
        self.ended = True
        await self.start(status, headers)

    async def start(self, status: int, headers: list[errors.Header]) -> None:
        """As `Downstream.start`."""
        self.committed = True
        await trio.lowlevel.checkpoint()

    async def send(self, data: bytes) -> None:
        """As `Downstream.send`."""
        self.last_sent_at = trio.current_time()
        await trio.lowlevel.checkpoint()

    async def end(self, data: bytes = b"") -> None:
        """As `Downstream.end`."""
        self.ended = True
        await trio.lowlevel.checkpoint()

    def abandon(self) -> None:
        """As `Downstream.abandon`."""

    async def abort(self) -> None:
        """As `Downstream.abort`."""
        await trio.lowlevel.checkpoint()


# -- results ----------------------------------------------------------------------------------------------------------


def body_of(
    run: Run,
    order: Order,
    *,
    reply: str | None,
    finish_reason: str | None = None,
    usage: Usage | None = None,
    **more: object,
) -> bytes:
    """The body of a result: the same fields whatever was asked, and ``more``."""
    counts = None
    if usage is not None:
        prompt_tokens, completion_tokens = usage.prompt_tokens, usage.completion_tokens
        counts = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
    return msgspec.json.encode(
        {
            "id": run.id,
            "hook": run.channel,
            "session": run.session,
            "action": run.action,
            "reply": reply,
            "model": order.model if run.action == "chat" else None,
            "finish_reason": finish_reason,
            "usage": counts,
            "created": int(run.created_at),
            **more,
        }
    )


def _is_final(status: int) -> bool:
    """Whether asking again under the same idempotency key gets this result again.

    A provider that is down, a limit, or a session that is busy says nothing about the message; senders try again then,
    and should be answered.

    >>> [_is_final(status) for status in (200, 400, 409, 429, 499, 502)]
    [True, True, False, False, False, False]
    """
    return status < 500 and status not in (408, 409, 429, CLIENT_LEFT)


@attrs.frozen(kw_only=True)
class _End:
    """How a run ends: what `store.Runs.finish` takes."""

    state: RunState
    status: int
    result: bytes
    turn: Turn | None = None
    extra: Mapping[str, Any] = attrs.field(factory=dict)  # Any: JSON of the channel's adapter
    frees_key: bool = False


def _as_ended(run: Run, end: _End) -> Run:
    return attrs.evolve(run, state=end.state, status=end.status, result=end.result, finished_at=time.time())


def view(run: Run) -> dict[str, Any]:  # Any: JSON
    """A run as its reader sees it: at ``GET /hooks/NAME/runs/ID``, and in what is delivered of it."""
    return {
        "id": run.id,
        "object": "run",
        "hook": run.channel,
        "session": run.session,
        "action": run.action,
        "state": run.state,
        "status": run.status or None,
        "created": int(run.created_at),
        "finished": int(run.finished_at) if run.finished_at is not None else None,
        "result": msgspec.Raw(run.result) if run.result else None,
    }


def _delivery(run: Run, order: Order, end: _End) -> Delivery | None:
    """What is to be told to the outside of a run that ends, if somebody is to be told.

    A callback's body is `callbacks.callback_body` of the `view`. That of a channel's adapter has ``reply_to`` and
    ``live`` besides, which are its own.
    """
    if order.reply_to is None:
        return None
    ended = _as_ended(run, end)
    now = ended.finished_at or 0.0
    body = callback_body(state=end.state, at=now, data=msgspec.json.encode(view(ended)))
    target = order.reply_to
    if not isinstance(target, str):
        own = {"reply_to": order.reply_to, "live": end.extra}
        body = msgspec.json.encode({**msgspec.json.decode(body), **own})
        target = str(target["target"])
    return Delivery(
        id=f"msg_{secrets.token_hex(12)}",
        run_id=run.id,
        channel=run.channel,
        target=target,
        body=body,
        created_at=now,
        due_at=now,
        # a channel knows where it has nothing left to do but edits; of a failure there is a line to write
        repeatable=isinstance(order.reply_to, str) or (end.state != "failed" and bool(end.extra.get("repeatable"))),
    )


# -- one run, being done ----------------------------------------------------------------------------------------------


class _Performance:
    """One run while it is done. An `exchange.Recorder`.

    Attributes:
        ended: The run as it is in the store, once it has ended.
        again: It is worth another try of this worker.
    """

    def __init__(self, runs: Runs, run: Run, down: Downstream | None) -> None:
        self._runs = runs
        self._gateway = runs.gateway
        self._store = runs.gateway.store
        self._run = run
        self._order = Order.decode(run.request)
        self._down = down
        self._answer = AnswerRecord()
        self._turn: SessionTurn | None = None
        self._live: Live | None = None
        self._exchange: Exchange | None = None
        self._released = False
        self.ended: Run | None = None
        self.again = False

    @property
    def _kept(self) -> bool:
        """It was promised."""
        return self._run.acknowledged or self._run.id in self._runs.promised

    @property
    def is_owed(self) -> bool:
        """It was promised, and has not ended."""
        return self._kept and self.ended is None

    async def perform(self) -> None:
        """Does the run. Whatever it raises besides `Cancelled` has become its result."""
        try:
            async with contextlib.AsyncExitStack() as stack:
                if _is_work(self._order.action):
                    await self._wait_for_its_turn(stack)
                if not await self._store.runs.start(self._run.id, worker=self._gateway.workers.id):
                    self.ended = await self._runs.get(self._run.id)
                    return
                if self._run.starts >= MAX_STARTS:
                    raise Internal(f"The run was begun {self._run.starts} times and never ended.")
                match self._order.action:
                    case "chat":
                        await self._chat()
                    case "note":
                        await self._note()
                    case "reset":
                        await self._reset()
                    case "history":
                        await self._history()
                    case "stop":
                        await self._stop()
                    case action:
                        assert_never(action)
        except GatewayError as error:
            await self._fail(error)
        except Exception as error:
            log.exception("run_crashed", run=self._run.id, channel=self._run.channel)
            await self._fail(Internal(f"The gateway failed ({type(error).__name__}). Run: {self._run.id}."))
        finally:
            self.release()

    async def _wait_for_its_turn(self, stack: contextlib.AsyncExitStack) -> None:
        """Enters what it holds while it is done. One of the hook's places comes last: who waits for a session must not
        stand in the way of other sessions."""
        order, run = self._order, self._run
        audience = self._runs.audiences.get(run.channel)
        if audience is not None and order.action == "chat" and order.reply_to is not None:
            self._live = await stack.enter_async_context(audience.watch(run, order))
        if order.session is not None:
            limits = self._gateway.generation.config.sessions
            if self._kept:  # nobody waits, and it was promised
                limits = attrs.evolve(limits, wait_s=Seconds(0.0))
            self._turn = await stack.enter_async_context(
                self._gateway.sessions.open_turn(
                    order.owner, order.session, limits=limits, run=run.id, place=self._runs.turns.get(run.id)
                )
            )
        stopped: list[GatewayError] = []
        with trio.CancelScope() as waiting:

            def cut(error: GatewayError) -> None:
                stopped.append(error)
                waiting.cancel()

            if self._turn is not None:
                self._turn.cut = cut
            await stack.enter_async_context(self._runs.limiter(run.channel))
        if stopped:
            raise stopped[0]

    # -- actions ------------------------------------------------------------------------------------------------------

    async def _chat(self) -> None:
        run, gateway, call = self._run, self._gateway, self._order.call()
        if self._turn is not None:
            call = self._turn.compose(call)
        exchange = self._exchange = Exchange(
            id=run.id,
            call=call,
            gateway=gateway,
            generation=gateway.generation,
            down=self._down if self._down is not None else Unwatched(),
            headers={"content-type": "application/json", "accept": "text/event-stream", "x-request-id": run.id},
            recorder=self,
        )
        if self._turn is not None:
            self._turn.cut = exchange.cut
        try:
            async with trio.open_nursery() as nursery:
                await exchange.run(nursery)
                nursery.cancel_scope.cancel()
            if self.ended is None:
                await self._fail(exchange.error or Internal("The answer was not kept."))
        finally:
            self.release()  # before its place in the session's queue is given back

    async def _note(self) -> None:
        order = self._order
        turn = None
        if self._turn is not None:
            self._turn.compose(order.call())
            turn = self._turn.result(AnswerRecord(), None, at=time.time(), partial=False)
        await self._end(_End(state="completed", status=200, result=body_of(self._run, order, reply=None), turn=turn))

    async def _reset(self) -> None:
        order = self._order
        await self._store.sessions.reset(order.owner, order.session or "", at=time.time())
        await self._end(_End(state="completed", status=200, result=body_of(self._run, order, reply=None)))

    async def _history(self) -> None:
        order = self._order
        last = self._gateway.generation.config.sessions.history_messages
        found = await self._store.sessions.history(order.owner, order.session or "", last=last)
        messages = [msgspec.Raw(each.body) for each in found[1]] if found is not None else []
        result = body_of(self._run, order, reply=None, messages=messages)
        await self._end(_End(state="completed", status=200, result=result))

    async def _stop(self) -> None:
        order = self._order
        stopped: list[dict[str, object]] = []
        for run in await self._runs.stop(order.owner, order.session or ""):
            said = msgspec.json.decode(run.result) if run.result else {}
            stopped.append({"id": run.id, "state": run.state, "reply": said.get("reply")})
        result = body_of(self._run, order, reply=None, stopped=stopped)
        await self._end(_End(state="completed", status=200, result=result))

    # -- the recorder -------------------------------------------------------------------------------------------------

    def hear(self, frames: bytes) -> None:
        """As `Recorder.hear`."""
        self._answer.hear(frames)
        if self._live is not None:
            self._live.show(self._answer.text)

    def hear_answer(self, body: bytes) -> None:
        """As `Recorder.hear_answer`."""
        self._answer.hear_answer(body)

    async def complete(self, usage: Usage | None) -> None:
        """As `Recorder.complete`."""
        answer = self._answer
        result = body_of(self._run, self._order, reply=answer.text, finish_reason=answer.finish_reason, usage=usage)
        turn = None
        if self._turn is not None:
            turn = self._turn.result(answer, usage, at=time.time(), partial=False)
        await self._end(_End(state="completed", status=200, result=result, turn=turn))

    # -- the end ------------------------------------------------------------------------------------------------------

    async def _fail(self, error: GatewayError) -> None:  # noqa: ASYNC910 - the store is waited for, or nothing is
        """Ends the run with an error, and tells the client if nobody has. One that was promised ends only where the
        error is not the gateway's own and passing."""
        if self.ended is not None:  # what came afterwards is not its end
            log.warning("run_ended_badly", run=self._run.id, error=error.message)
            await trio.lowlevel.checkpoint()
            return
        if self._kept and isinstance(error, Draining | Overloaded | SessionBusy | StoreUnavailable):
            self.again = not isinstance(error, Draining)
            await trio.lowlevel.checkpoint()
            return
        status, headers, body = error.to_response()
        end = (
            self._cut(status)
            if isinstance(error, Stopped)
            else _End(state="failed", status=status, result=body, turn=self._partial(), frees_key=not _is_final(status))
        )
        try:
            await self._end(end)
        except StoreUnavailable:
            self._settle_soon(end)
            self._released = True
            self.ended = _as_ended(self._run, end)
        if self._down is not None and not self._down.committed:
            await self._down.respond(status, headers, body)

    def _cut(self, status: int) -> _End:
        """How it ends when it is cut: what there was of the answer is kept."""
        reply = self._answer.text if self._order.action == "chat" else None
        result = body_of(self._run, self._order, reply=reply, usage=self._usage())
        left = status == CLIENT_LEFT
        return _End(state="cancelled", status=status, result=result, turn=self._partial(), frees_key=left)

    def _partial(self) -> Turn | None:
        if self._turn is None or self._exchange is None or not self._answer.has_content:
            return None
        return self._turn.result(self._answer, self._usage(), at=time.time(), partial=True)

    def _usage(self) -> Usage | None:
        return self._exchange.usage if self._exchange is not None else None

    async def _end(self, end: _End) -> None:
        """Ends the run, durably.

        Raises:
            StoreUnavailable: It could not be kept.
        """
        if self._live is not None:
            live, self._live = self._live, None
            end = attrs.evolve(end, extra=await live.end())
        if await self._write(end):
            self.ended = _as_ended(self._run, end)
        else:  # another worker took this one for dead, and has done it
            self.ended = await self._runs.get(self._run.id)
        if self._turn is not None:
            self._turn.note_left()
        self._runs.note_ended(self.ended, self._order)

    def release(self) -> None:
        """Ends a run whose task is being cancelled. Synchronous; one that was promised is left for the next start."""
        if self.ended is None and not self._kept and not self._released:
            self._released = True
            self._settle_soon(self._cut(CLIENT_LEFT))
            if self._turn is not None:
                self._turn.note_left()

    def _write(self, end: _End) -> Write[bool]:
        return self._runs.write_end(self._run, end, order=self._order, turn=self._turn)

    def _settle_soon(self, end: _End) -> None:
        self._runs.settle_soon(self._run, end, order=self._order, turn=self._turn)


# -- the service ------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Doing:
    """A run that the service does.

    Attributes:
        run: As it was; once ``done``, as it has ended. Of one that was left for the next start, as it was.
    """

    run: Run
    done: trio.Event = attrs.field(factory=trio.Event)


class Runs:
    """The runs of this worker. Made by `open_runs`.

    Attributes:
        audiences: By the name of the channel; may change at any time.
        promised: The ids of runs that were acknowledged after they had been begun.
        turns: The places of runs in the queues of their sessions, by the ids of the runs.
    """

    def __init__(self, gateway: Gateway, nursery: trio.Nursery) -> None:
        self.gateway = gateway
        self.audiences: dict[str, Audience] = {}
        self.promised: set[str] = set()
        self.turns: dict[str, SessionTurn] = {}
        self._nursery = nursery
        self._doing: dict[str, trio.CapacityLimiter] = {}
        self._places: dict[str, dict[str, None]] = {}
        self._bells: dict[str, trio.Event] = {}
        gateway.workers.adopt_with(self._adopt)
        gateway.workers.listen("run", self._ring)

    def __repr__(self) -> str:
        return f"<Runs {sum(map(len, self._places.values()))} accepted, {len(self._bells)} waited for>"

    async def accept(self, order: Order, *, acknowledged: bool, idempotency: tuple[str, bytes] | None = None) -> Claim:
        """Keeps an order as a run, durably. Whoever gets a new one does it at once (`perform`, `perform_soon`).

        Args:
            acknowledged: It is promised to be finished.
            idempotency: A key, and a digest of the body; unique in the channel, for its owner.

        Raises:
            StoreUnavailable: It could not be kept.
            Overloaded: As many runs of the channel go on and wait as may.

        **Cancels:** what may have been kept meanwhile ends as cancelled.
        """
        run = Run(
            id=f"run_{secrets.token_hex(12)}",
            channel=order.channel,
            owner=order.owner,
            session=order.session,
            action=order.action,
            request=order.encode(),
            state="queued",
            acknowledged=acknowledged,
            worker=self.gateway.workers.id,
            created_at=time.time(),
        )
        self._take_place(run)
        store = self.gateway.store
        claim: Claim | None = None
        may_be_there = False
        try:
            await self.gateway.workers.join()
            may_be_there = True
            keeping: Write[Claim] | Write[None]
            if idempotency is None:
                keeping = store.runs.add(run)
            else:
                key, digest = idempotency
                scope = f"{order.channel}/{order.owner}"
                keeping = store.idempotency.claim(scope, key, digest=digest, run=run)
            await self._queue(run)  # right behind it, so in the order in which messages are kept
            claim = await keeping or Claim(run=run, is_new=True)
            return claim
        except StoreUnavailable:
            may_be_there = False
            raise
        finally:
            if claim is None or not claim.is_new:
                self._give_place_back(run)
            if claim is None and may_be_there:  # cancelled meanwhile: nobody would do it
                self.settle_soon(run, _End(state="cancelled", status=CLIENT_LEFT, result=b"{}", frees_key=True))

    async def perform(self, run: Run, *, down: Downstream | None = None) -> Run:
        """Does a run in the caller's task, and returns it with its result. Cancelled with the caller, it ends as
        ``cancelled`` with what there was of the answer; one that was acknowledged goes on in the service.

        Args:
            down: The client that the answer is streamed to, as chunks of OpenAI's; None = nobody watches.
        """
        pause_s = RETRY_S
        performance: _Performance | None = None
        interrupted, crashed = True, False
        try:
            while True:
                performance = _Performance(self, run, down)
                await performance.perform()
                if not performance.again:
                    break
                log.warning("run_again", run=run.id, channel=run.channel, pause_s=pause_s)
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)
            interrupted = False
        except Exception:
            crashed = True
            raise
        finally:
            if performance is not None:
                performance.release()
            if performance is None or crashed or not performance.is_owed:
                self._give_place_back(run)
                self.promised.discard(run.id)
            elif interrupted and not self._nursery.cancel_scope.cancel_called:
                self.perform_soon(run)
            # Else it is left for the next start, and so is its place in the queue of its session.
        return performance.ended or run

    def perform_soon(self, run: Run, *, down: Downstream | None = None) -> Doing:
        """Does a run in the nursery of the service. Synchronous; whoever wants to know how it ended may wait for it."""
        doing = Doing(run)
        self._nursery.start_soon(self._perform_alone, doing, down)
        return doing

    async def _perform_alone(self, doing: Doing, down: Downstream | None) -> None:  # noqa: ASYNC910 - as `perform`
        run = doing.run
        try:
            doing.run = await self.perform(run, down=down)
        except Exception:  # one that cannot even be read is not the end of the others
            log.exception("run_crashed", run=run.id, channel=run.channel)
            status, _, body = Internal(f"The gateway failed. Run: {run.id}.").to_response()
            end = _End(state="failed", status=status, result=body)
            doing.run = _as_ended(run, end)
            self.settle_soon(run, end)
        finally:
            doing.done.set()

    def promise(self, run: Run) -> None:
        """Acknowledges a run that is being done: its client has left, and it shall go on. Synchronous."""
        self.promised.add(run.id)
        self.gateway.store.runs.acknowledge(run.id)

    async def get(self, run_id: str) -> Run:
        """One run.

        Raises:
            NotFound: There is none, or none any more.
        """
        run = await self.gateway.store.runs.get(run_id)
        if run is None:
            raise NotFound(f"There is no run {run_id[:100]}.")
        return run

    async def wait_ended(self, run_id: str) -> Run:
        """Waits until a run has ended, in whichever worker it is performed.

        Raises:
            NotFound: There is none.
        """
        while True:
            bell = self._bells.setdefault(run_id, trio.Event())
            try:
                run = await self.get(run_id)
                if run.state in ENDED:
                    return run
                with trio.move_on_after(LOOK_S):
                    await bell.wait()
            finally:
                if self._bells.get(run_id) is bell and not bell.statistics().tasks_waiting:
                    del self._bells[run_id]

    async def stop(self, owner: str, session: str) -> Sequence[Run]:
        """Stops the running turn of a session, and returns the runs that were cut, ended, with what there is of their
        answers in their results."""
        tickets = await self.gateway.sessions.stop(owner, session)
        found = []
        for run_id in [ticket.run for ticket in tickets if ticket.run is not None]:
            with trio.move_on_after(_STOP_S):
                run = await self.wait_ended(run_id)
                if run.state == "cancelled":
                    found.append(run)
        return found

    # -- for the runs themselves --------------------------------------------------------------------------------------

    def note_ended(self, run: Run, order: Order | None) -> None:
        """A run has ended: tells whoever waits for it, and the outbox. Synchronous."""
        self._ring(run.id.encode())
        self.gateway.workers.ring("run", run.id.encode())
        if order is not None and order.reply_to is not None:
            self.gateway.outbox.look()
        log.info(
            "run",
            run=run.id,
            channel=run.channel,
            action=run.action,
            state=run.state,
            status=run.status,
            duration_s=round(max(0.0, time.time() - run.created_at), 4),
        )

    def write_end(
        self, run: Run, end: _End, *, order: Order | None = None, turn: SessionTurn | None = None
    ) -> Write[bool]:
        """Queues the end of a run, with everything that belongs to it. Synchronous."""
        now = time.time()
        delivery = _delivery(run, order, end) if order is not None else None
        return self.gateway.store.runs.finish(
            run.id,
            state=end.state,
            status=end.status,
            result=end.result,
            at=now,
            turn=end.turn,
            leave=turn.ticket if turn is not None else None,
            deliveries=(delivery,) if delivery is not None else (),
            frees_key=end.frees_key,
        )

    def settle_soon(self, run: Run, end: _End, *, order: Order | None = None, turn: SessionTurn | None = None) -> None:
        """Ends a run from a task that cannot wait. Synchronous; what cannot be kept is tried again until it can."""
        write = self.write_end(run, end, order=order, turn=turn)
        self._nursery.start_soon(self._settle, write, run, end, order, turn)

    async def _settle(
        self, write: Write[bool], run: Run, end: _End, order: Order | None, turn: SessionTurn | None
    ) -> None:
        pause_s = RETRY_S
        while True:
            try:
                done = await write
                break
            except StoreUnavailable as error:
                log.warning("run_not_kept", run=run.id, error=error.message)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_MAX_S)
            write = self.write_end(run, end, order=order, turn=turn)
        if done:
            self.note_ended(attrs.evolve(run, state=end.state, status=end.status), order)

    # -- bounds -------------------------------------------------------------------------------------------------------

    def _settings(self, channel: str) -> HookConfig:
        return (self.gateway.generation.config.hooks or {}).get(channel) or _DEFAULTS

    def _take_place(self, run: Run) -> None:
        settings = self._settings(run.channel)
        places = self._places.setdefault(run.channel, {})
        if _is_work(run.action):
            if len(places) >= settings.concurrency + settings.queue:
                raise Overloaded(
                    f"{len(places)} messages of {run.channel} are being answered or wait, which is the limit."
                )
            places[run.id] = None

    async def _queue(self, *runs: Run) -> None:  # noqa: ASYNC910 - the store is waited for, or nothing is
        """Has runs stand in the queues of their sessions, in their order. One for which that fails does it later."""
        limits = self.gateway.generation.config.sessions
        takings = [
            (run.id, self.gateway.sessions.take_place(run.owner, run.session, limits=limits, run=run.id))
            for run in runs
            if run.session is not None and _is_work(run.action)
        ]
        for run_id, taking in takings:
            with contextlib.suppress(StoreUnavailable):
                self.turns[run_id] = await taking

    def _give_place_back(self, run: Run) -> None:
        turn = self.turns.pop(run.id, None)
        if turn is not None:
            self.gateway.sessions.give_back(turn)
        places = self._places.get(run.channel, {})
        places.pop(run.id, None)
        if not places:
            self._places.pop(run.channel, None)

    def limiter(self, channel: str) -> trio.CapacityLimiter:
        """What a run of a channel holds one of while it is done."""
        settings = self._settings(channel)
        limiter = self._doing.get(channel)
        if limiter is None:
            limiter = self._doing[channel] = trio.CapacityLimiter(settings.concurrency)
        limiter.total_tokens = settings.concurrency
        return limiter

    # -- other workers ------------------------------------------------------------------------------------------------

    async def _adopt(self, worker: str, dead: Sequence[str]) -> None:
        adopted = await self.gateway.store.runs.adopt(worker, dead=dead, at=time.time())
        await self._queue(*adopted)
        for run in adopted:
            log.info("run_adopted", run=run.id, channel=run.channel, starts=run.starts)
            self.perform_soon(run)

    def _ring(self, run_id: bytes) -> None:
        bell = self._bells.pop(run_id.decode(errors="replace"), None)
        if bell is not None:
            bell.set()


def _is_work(action: str) -> bool:
    """Whether it waits for its turn; what steers a session does not stand behind what it steers."""
    return action in ("chat", "note")


_DEFAULTS = HookConfig()


@contextlib.asynccontextmanager
async def open_runs(gateway: Gateway) -> AsyncIterator[Runs]:
    """Opens the service; what other workers left is adopted at `workers.join`."""
    async with trio.open_nursery() as nursery:
        try:
            yield Runs(gateway, nursery)
        finally:
            nursery.cancel_scope.cancel()
