"""One run while it is done: in its session's turn, by an exchange like any other, to one end that counts."""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING, assert_never

import attrs
import msgspec
import structlog
import trio

from trigate import errors
from trigate.config.sections import Seconds
from trigate.errors import (
    Draining,
    GatewayError,
    Internal,
    Overloaded,
    RunStopped,
    SessionBusy,
    StoreUnavailable,
)
from trigate.exchange.exchange import Exchange
from trigate.openai.accumulator import AnswerAccumulator
from trigate.openai.answer import Usage
from trigate.runs.request import CLIENT_LEFT, Live, RunRequest, RunResult, as_ended, body_of, is_final, is_work
from trigate.store.interface import Write
from trigate.store.records import Run, Turn

if TYPE_CHECKING:
    from trigate.exchange.exchange import Downstream
    from trigate.runs.service import Runs
    from trigate.sessions.service import SessionTurn

log = structlog.get_logger("trigate.runs.execution")

MAX_STARTS = 50
"""How often a run is begun: one that takes its process with it each time is not begun again."""


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
        self.headers: list[errors.Header] = []
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


class RunExecution:
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
        self._order = RunRequest.decode(run.request)
        self._down = down
        self._answer = AnswerAccumulator()
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
                if is_work(self._order.action):
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
        audience = self._runs.live_views.get(run.channel)
        if audience is not None and order.action == "chat" and order.reply_to is not None:
            self._live = await stack.enter_async_context(audience.watch(run, order))
        if order.session is not None:
            limits = self._gateway.generation.config.sessions
            if self._kept:  # nobody waits, and it was promised
                limits = attrs.evolve(limits, wait_s=Seconds(0.0))
            self._turn = await stack.enter_async_context(
                self._gateway.sessions.open_turn(
                    order.owner, order.session, limits=limits, run=run.id, turn=self._runs.turns.get(run.id)
                )
            )
        stopped: list[GatewayError] = []
        with trio.CancelScope() as waiting:

            def cut(error: GatewayError) -> None:
                stopped.append(error)
                waiting.cancel()

            if self._turn is not None:
                self._turn.stop_with(cut)
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
            owner=self._order.owner,
            recorder=self,
        )
        if self._turn is not None:
            self._turn.stop_with(exchange.cut)
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
            turn = self._turn.result(AnswerAccumulator(), None, at=time.time(), partial=False)
        await self._end(
            RunResult(state="completed", status=200, result=body_of(self._run, order, reply=None), turn=turn)
        )

    async def _reset(self) -> None:
        order = self._order
        await self._store.sessions.reset(order.owner, order.session or "", at=time.time())
        await self._end(RunResult(state="completed", status=200, result=body_of(self._run, order, reply=None)))

    async def _history(self) -> None:
        order = self._order
        last = self._gateway.generation.config.sessions.history_messages
        found = await self._store.sessions.history(order.owner, order.session or "", last=last)
        messages = [msgspec.Raw(each.body) for each in found[1]] if found is not None else []
        result = body_of(self._run, order, reply=None, messages=messages)
        await self._end(RunResult(state="completed", status=200, result=result))

    async def _stop(self) -> None:
        order = self._order
        stopped: list[dict[str, object]] = []
        for run in await self._runs.stop(order.owner, order.session or ""):
            said = msgspec.json.decode(run.result) if run.result else {}
            stopped.append({"id": run.id, "state": run.state, "reply": said.get("reply")})
        result = body_of(self._run, order, reply=None, stopped=stopped)
        await self._end(RunResult(state="completed", status=200, result=result))

    # -- the recorder -------------------------------------------------------------------------------------------------

    def feed(self, frames: bytes) -> None:
        """As `Recorder.feed`."""
        self._answer.feed(frames)
        if self._live is not None:
            self._live.show(self._answer.text)

    def feed_answer(self, body: bytes) -> None:
        """As `Recorder.feed_answer`."""
        self._answer.feed_answer(body)

    async def complete(self, usage: Usage | None) -> None:
        """As `Recorder.complete`."""
        answer = self._answer
        result = body_of(self._run, self._order, reply=answer.text, finish_reason=answer.finish_reason, usage=usage)
        turn = None
        if self._turn is not None:
            turn = self._turn.result(answer, usage, at=time.time(), partial=False)
        await self._end(RunResult(state="completed", status=200, result=result, turn=turn))

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
            if isinstance(error, RunStopped)
            else RunResult(
                state="failed", status=status, result=body, turn=self._partial(), frees_key=not is_final(status)
            )
        )
        try:
            await self._end(end)
        except StoreUnavailable:
            self._settle_soon(end)
            self._released = True
            self.ended = as_ended(self._run, end)
        if self._down is not None and not self._down.committed:
            await self._down.respond(status, headers, body)

    def _cut(self, status: int) -> RunResult:
        """How it ends when it is cut: what there was of the answer is kept."""
        reply = self._answer.text if self._order.action == "chat" else None
        result = body_of(self._run, self._order, reply=reply, usage=self._usage())
        left = status == CLIENT_LEFT
        return RunResult(state="cancelled", status=status, result=result, turn=self._partial(), frees_key=left)

    def _partial(self) -> Turn | None:
        if self._turn is None or self._exchange is None or not self._answer.has_content:
            return None
        return self._turn.result(self._answer, self._usage(), at=time.time(), partial=True)

    def _usage(self) -> Usage | None:
        return self._exchange.usage if self._exchange is not None else None

    async def _end(self, end: RunResult) -> None:
        """Ends the run, durably.

        Raises:
            StoreUnavailable: It could not be kept.
        """
        if self._live is not None:
            live, self._live = self._live, None
            end = attrs.evolve(end, extra=await live.end())
        if await self._write(end):
            self.ended = as_ended(self._run, end)
        else:  # another worker took this one for dead, and has done it
            self.ended = await self._runs.get(self._run.id)
        if self._turn is not None:
            self._turn.note_ticket_returned()
        self._runs.note_ended(self.ended, self._order)

    def release(self) -> None:
        """Ends a run whose task is being cancelled. Synchronous; one that was promised is left for the next start."""
        if self.ended is None and not self._kept and not self._released:
            self._released = True
            self._settle_soon(self._cut(CLIENT_LEFT))
            if self._turn is not None:
                self._turn.note_ticket_returned()

    def _write(self, end: RunResult) -> Write[bool]:
        return self._runs.write_end(self._run, end, order=self._order, turn=self._turn)

    def _settle_soon(self, end: RunResult) -> None:
        self._runs.settle_soon(self._run, end, order=self._order, turn=self._turn)
