"""The execution of one run: it waits for its session turn and a slot, runs an exchange, and stores one result.

The order in which an execution waits is fixed: first the session's turn, then the channel's execution slot. A run that
waits for its session must not hold a slot that runs of other sessions could use.

How an execution ends:

* With a result, stored by `RunExecution._finish`. The store keeps the first one: where another worker has taken the run
  over and finished it, that result counts.
* Without a result and with `RunExecution.should_retry` set: the run was acknowledged, and this gateway had no capacity
  or no store. The service executes it again after a pause.
* Without a result, because the gateway is shutting down: an acknowledged run stays in the store for the next start.
* Cancelled: a run that was not acknowledged is stored as ``cancelled`` with the partial answer, by a queued write.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import assert_never

import attrs
import msgspec
import trio

from trigate.config.sections import Seconds
from trigate.dialects.errors import error_response
from trigate.errors import (
    Draining,
    GatewayError,
    Internal,
    Overloaded,
    RunStopped,
    SessionBusy,
    StoreUnavailable,
)
from trigate.exchange.exchange import Exchange, ExchangeServices
from trigate.exchange.request import ExchangeRequest
from trigate.keys.service import Keys
from trigate.logs import log
from trigate.openai.accumulator import AnswerAccumulator
from trigate.openai.answer import Usage
from trigate.openai.request import Call
from trigate.runs.client import RunClient
from trigate.runs.queue import RunQueue
from trigate.runs.records import RunRecords
from trigate.runs.request import (
    CLIENT_LEFT,
    Live,
    LiveView,
    RunRequest,
    RunResult,
    is_final,
    result_body,
    waits_for_turn,
    with_result,
)
from trigate.sessions.service import Sessions, SessionTurn
from trigate.store.interface import Store
from trigate.store.records import Run, Turn
from trigate.tracebacks import drop_frames
from trigate.upstream.generation import Generations

MAX_STARTS = 50
"""How often a run is started. A run that crashes its process each time is not started again after that."""
_STOP_S = 5.0
"""How long ``stop`` waits for a stopped run to end, in seconds."""


@attrs.frozen(kw_only=True, eq=False)
class RunServices:
    """What the executions of a worker share.

    Attributes:
        live_views: The channels that display runs, by name; the channels change it at any time.
    """

    store: Store
    sessions: Sessions
    generations: Generations
    keys: Keys
    records: RunRecords
    queue: RunQueue
    live_views: Mapping[str, LiveView]
    exchange_services: ExchangeServices


class RunExecution:
    """One execution of a run. An `exchange.Recorder`: it reads the answer of its exchange.

    Attributes:
        ended: The run as stored, once it has ended.
        should_retry: Whether the run has no result and this worker should execute it again.
    """

    def __init__(self, services: RunServices, run: Run, client: RunClient | None) -> None:
        self._services = services
        self._records = services.records
        self._run = run
        self._request = RunRequest.decode(run.request)
        self._client = client
        self._answer = AnswerAccumulator()
        self._turn: SessionTurn | None = None
        self._live: Live | None = None
        self._exchange: Exchange | None = None
        self._is_settled = False
        self.ended: Run | None = None
        self.should_retry = False

    @property
    def _is_acknowledged(self) -> bool:
        return self._records.is_acknowledged(self._run)

    @property
    def must_finish(self) -> bool:
        """Whether the run was acknowledged and has no result yet."""
        return self._is_acknowledged and self.ended is None

    async def execute(self) -> None:
        """Executes the run. Every exception but `Cancelled` becomes the result of the run."""
        try:
            async with contextlib.AsyncExitStack() as stack:
                if waits_for_turn(self._request.action):
                    await self._enter_turn(stack)
                if not await self._records.start(self._run):
                    self.ended = await self._records.get(self._run.id)
                    return
                if self._run.starts >= MAX_STARTS:
                    raise Internal(f"The run was started {self._run.starts} times and never ended.")
                match self._request.action:
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
            drop_frames(error)
            await self._fail(error)
        except Exception as error:
            log.exception("run_crashed", run=self._run.id, channel=self._run.channel)
            await self._fail(Internal(f"The gateway failed ({type(error).__name__}). Run: {self._run.id}."))
        finally:
            self.settle_cancelled()

    async def _enter_turn(self, stack: contextlib.AsyncExitStack) -> None:
        """Starts the display, then waits for the session's turn, then for an execution slot of the channel. The stack
        holds all three.

        Raises:
            RunStopped: A later message stopped the run while it waited for a slot.
        """
        services, request, run = self._services, self._request, self._run
        live_view = services.live_views.get(run.channel)
        if live_view is not None and request.action == "chat" and request.reply_to is not None:
            self._live = await stack.enter_async_context(live_view.watch(run, request))
        if request.session is not None:
            limits = services.generations.config.sessions
            if self._is_acknowledged:  # no client waits, and the run must not fail: wait without a limit
                limits = attrs.evolve(limits, wait_s=Seconds(0.0))
            self._turn = await stack.enter_async_context(
                services.sessions.open_turn(
                    request.owner, request.session, limits=limits, run=run.id, turn=services.queue.turn_of(run)
                )
            )
        stopped: list[GatewayError] = []
        with trio.CancelScope() as waiting:

            def stop(error: GatewayError) -> None:
                stopped.append(error)
                waiting.cancel()

            if self._turn is not None:
                self._turn.stop_with(stop)
            await stack.enter_async_context(services.queue.execution_slot(run.channel))
        if stopped:
            raise stopped[0]

    # -- actions ------------------------------------------------------------------------------------------------------

    async def _chat(self) -> None:
        call = self._request.call()
        if self._turn is not None:
            call = self._turn.compose(call)
        exchange = self._exchange = self._make_exchange(call)
        if self._turn is not None:
            self._turn.stop_with(exchange.cancel)
        try:
            async with trio.open_nursery() as nursery:
                await exchange.run(nursery)
                nursery.cancel_scope.cancel()
            if self._client is not None:
                self._client.note_answered(exchange)
            if self.ended is None:
                await self._fail(exchange.error or Internal("The answer was not recorded."))
        finally:
            self.settle_cancelled()  # before the session's ticket is released

    def _make_exchange(self, call: Call) -> Exchange:
        services, run = self._services, self._run
        exchange = Exchange(
            request=ExchangeRequest(
                id=run.id,
                call=call,
                generation=services.generations.current,
                headers={"content-type": "application/json", "accept": "text/event-stream", "x-request-id": run.id},
                client_headers={b"x-session-key": (self._request.session or "").encode()},
                key=services.keys.named(self._request.owner),
            ),
            services=services.exchange_services,
            client=self._client.streamed_to if self._client is not None else None,
            recorder=self,
        )
        if self._client is not None:
            self._client.note_exchange(exchange)
        return exchange

    async def _note(self) -> None:
        turn = None
        if self._turn is not None:
            self._turn.compose(self._request.call())
            turn = self._turn.result(AnswerAccumulator(), None, at=time.time(), partial=False)
        await self._complete(result_body(self._run, self._request, reply=None), turn)

    async def _reset(self) -> None:
        request = self._request
        await self._services.store.sessions.reset(request.owner, request.session or "", at=time.time())
        await self._complete(result_body(self._run, request, reply=None))

    async def _history(self) -> None:
        services, request = self._services, self._request
        last = services.generations.config.sessions.history_messages
        found = await services.store.sessions.history(request.owner, request.session or "", last=last)
        messages = [msgspec.Raw(message.body) for message in found[1]] if found is not None else []
        await self._complete(result_body(self._run, request, reply=None, messages=messages))

    async def _stop(self) -> None:
        """Stops the running turn of the session. The result lists the run that was stopped, with its partial answer."""
        request = self._request
        tickets = await self._services.sessions.stop(request.owner, request.session or "")
        stopped: list[dict[str, object]] = []
        for run_id in [ticket.run for ticket in tickets if ticket.run is not None]:
            with trio.move_on_after(_STOP_S):
                run = await self._records.wait_ended(run_id)
                if run.state == "cancelled":
                    body = msgspec.json.decode(run.result) if run.result else {}
                    stopped.append({"id": run.id, "state": run.state, "reply": body.get("reply")})
        await self._complete(result_body(self._run, request, reply=None, stopped=stopped))

    # -- the recorder -------------------------------------------------------------------------------------------------

    def feed(self, frames: bytes) -> None:
        """Takes events of the streamed answer, and updates the display."""
        self._answer.feed(frames)
        if self._live is not None:
            self._live.show(self._answer.text)

    def feed_answer(self, body: bytes) -> None:
        """Takes a JSON answer."""
        self._answer.feed_answer(body)

    async def complete(self, usage: Usage | None) -> None:
        """Stores the complete answer as the result, before the client receives its end.

        Raises:
            StoreUnavailable: The result cannot be stored; the client gets this error instead.
        """
        answer = self._answer
        body = result_body(self._run, self._request, reply=answer.text, finish_reason=answer.finish_reason, usage=usage)
        turn = None
        if self._turn is not None:
            turn = self._turn.result(answer, usage, at=time.time(), partial=False)
        await self._complete(body, turn)

    # -- the result ---------------------------------------------------------------------------------------------------

    async def _complete(self, body: bytes, turn: Turn | None = None) -> None:
        await self._finish(RunResult(state="completed", status=200, result=body, turn=turn))

    async def _fail(self, error: GatewayError) -> None:
        """Ends the run with an error, and sends it to the client unless the answer has begun. An acknowledged run does
        not end with a transient error of this gateway."""
        if self.ended is not None:  # an error after the end does not change the result
            log.warning("run_failed_after_end", run=self._run.id, error=error.message)
            await trio.lowlevel.checkpoint()
            return
        if self._is_acknowledged and isinstance(error, Draining | Overloaded | SessionBusy | StoreUnavailable):
            self.should_retry = not isinstance(error, Draining)
            await trio.lowlevel.checkpoint()
            return
        status, _, body = error_response(error, "openai", self._run.id)
        if isinstance(error, RunStopped):
            result = self._cancelled(status)
        else:
            result = RunResult(
                state="failed", status=status, result=body, turn=self._partial_turn(), frees_key=not is_final(status)
            )
        try:
            await self._finish(result)
        except StoreUnavailable:
            self._finish_later(result)
            self._is_settled = True
            self.ended = with_result(self._run, result)
            await trio.lowlevel.checkpoint()
        if self._client is not None:
            await self._client.tell(error)

    def _cancelled(self, status: int) -> RunResult:
        """The result of a cancelled run: the partial answer."""
        reply = self._answer.text if self._request.action == "chat" else None
        body = result_body(self._run, self._request, reply=reply, usage=self._usage())
        return RunResult(
            state="cancelled",
            status=status,
            result=body,
            turn=self._partial_turn(),
            frees_key=status == CLIENT_LEFT,
        )

    def _partial_turn(self) -> Turn | None:
        if self._turn is None or self._exchange is None or not self._answer.has_content:
            return None
        return self._turn.result(self._answer, self._usage(), at=time.time(), partial=True)

    def _usage(self) -> Usage | None:
        return self._exchange.usage if self._exchange is not None else None

    async def _finish(self, result: RunResult) -> None:
        """Ends the display, and stores the result.

        Raises:
            StoreUnavailable: The result could not be stored.
        """
        if self._live is not None:
            live, self._live = self._live, None
            result = attrs.evolve(result, live=await live.end())
        if await self._records.finish(self._run, result, request=self._request, turn=self._turn):
            self.ended = with_result(self._run, result)
        else:  # another worker took this one for dead, adopted the run and ended it
            self.ended = await self._records.get(self._run.id)
        if self._turn is not None:
            self._turn.note_ticket_returned()
        self._records.note_ended(self.ended, self._request)

    def _finish_later(self, result: RunResult) -> None:
        self._records.finish_later(self._run, result, request=self._request, turn=self._turn)

    def settle_cancelled(self) -> None:
        """Queues the result ``cancelled`` for a run that has none, because its task is being cancelled. Synchronous;
        does nothing where the run has ended. An acknowledged run stays as it is, for the next start."""
        if self.ended is None and not self._is_acknowledged and not self._is_settled:
            self._is_settled = True
            self._finish_later(self._cancelled(CLIENT_LEFT))
            if self._turn is not None:
                self._turn.note_ticket_returned()
