"""One request, one nursery: admission, upstream call, COMMIT, settle. The page to read first.

The request's nursery (opened by `asgi.data_plane`, or by a run) is cancelled when the client disconnects. All work for
the request happens inside it, so nothing of the request remains when the nursery ends.

An exchange has two sides. The *client's side* is here and in `client_sink`: admission, the deadline of the whole call,
keep-alive comments, a client that does not read, and the answer or error that the client gets. The *upstream's side* is
an `UpstreamCall` (attempts, failover, hedging), or a `Subscription` to a call that several exchanges share. A `Sink`
joins the two; the upstream's side knows no client.

The rules:

* Before COMMIT (the status line goes out) every failure is an exception and becomes a status. After COMMIT every
  failure is an error event, and there is no ``[DONE]``. There is no third case.
* Each attempt has a cancel scope of its own. A deadline, a drain, a stalled client or another attempt's content ends
  the upstream's side at once (it is the costly one), and the client's side can still send the error.
* One deadline spans the call, from the arrival of the request: queue, pauses, attempts, the stream.
* A frame goes out whole or not at all (`client_response`), so a cancellation lands between frames.
* Settling is synchronous and runs in ``finally``: exactly once, on every path.
"""

from __future__ import annotations

import math

import attrs
import trio

from trigate.concurrency.cancel_queue import CancelQueue
from trigate.errors import ClientStalled, Draining, GatewayError, Internal, UpstreamError
from trigate.exchange import quota_hold, view
from trigate.exchange.admission import Admission
from trigate.exchange.call_key import call_key_of
from trigate.exchange.client_sink import ClientSink
from trigate.exchange.live import LiveExchanges
from trigate.exchange.outcome import Outcome
from trigate.exchange.passed_call import PassedCall
from trigate.exchange.shared_call import STOPPED, SharedCalls, Subscription
from trigate.exchange.sink import ContentSink, NotingSink, Recorder, RecordingSink, Sink
from trigate.exchange.state import ExchangeState
from trigate.exchange.upstream_call import UpstreamCall, UpstreamServices
from trigate.exchange.watchdog import Watchdog, call_timed_out
from trigate.logs import log
from trigate.quotas.service import Quotas
from trigate.tracebacks import drop_frames
from trigate.upstream.generation import Route

# How long a server that stops waits for a client to read its final message.
_FINAL_MESSAGE_S = 1.0


@attrs.frozen(kw_only=True)
class ExchangeServices:
    """The services that exchanges use; made once by the composition root."""

    admission: Admission
    live: LiveExchanges
    quotas: Quotas
    upstream: UpstreamServices
    shared_calls: SharedCalls
    cancel_queue: CancelQueue


@attrs.define(eq=False, kw_only=True)
class Exchange(ExchangeState):
    """A request in flight.

    Attributes:
        recorder: Stores the answer; None = it is not stored.
        shares: Whether it may share its upstream call with equal calls.
    """

    services: ExchangeServices
    recorder: Recorder | None = None
    shares: bool = False
    _client_sink: ClientSink | None = None
    _nursery: trio.Nursery = attrs.field(init=False)

    async def run(self, nursery: trio.Nursery) -> None:
        """Serves the call. Returns when the client has its answer, or an error.

        **Cancels:** at any point; the upstream is closed and the exchange settled as ``cancelled``.
        """
        self.outcome = Outcome.CANCELLED  # unless it is set below
        self._nursery = nursery
        if self.client is not None:
            self._client_sink = ClientSink(self.client, self, nursery)
        watchdog: Watchdog | None = None
        try:
            self.services.live.begin(self)
            route = self.request.route()
            watchdog = self._watch(route)
            if (needed := quota_hold.hold_nowait(self, route, self.services.upstream)) is not None:
                await quota_hold.hold(self, needed, self.services.quotas)
            async with self.services.admission.slot(self):
                self.source = self._open_source(route)
                await self.source.fetch(self._sink())
            self._note_success()
        except GatewayError as error:
            await self._fail(error)
        except Exception as defect:
            log.exception("exchange_crashed", request_id=self.id, model=self.call.model)
            await self._fail(Internal(f"The gateway failed ({type(defect).__name__}). Request id: {self.id}."))
        finally:
            try:
                if self.outcome is Outcome.CANCELLED and self.error is None:
                    await self._note_cancelled()  # noqa: ASYNC102 - what it waits for is shielded, and ends in time
            finally:
                if watchdog is not None:
                    watchdog.stop()
                self._settle()
                self._client_sink = None  # it refers to this exchange: a call leaves no reference cycle behind

    # -- the two sides ------------------------------------------------------------------------------------------------

    def _open_source(self, route: Route) -> UpstreamCall | Subscription:
        """Returns the source of the answer: an upstream call of its own, or a subscription to a shared one."""
        if self.cancelled_with is not None:
            raise self.cancelled_with
        request = self.request
        if self.shares and self.recorder is None:
            digest = call_key_of(request.call, request.headers, sampled=request.model.coalesce_sampled)
            if digest is not None:
                return self.services.shared_calls.join(request, digest)
        return (UpstreamCall if request.passed is None else PassedCall)(
            request=request,
            services=self.services.upstream,
            route=route,
            started_at=self.started_at,
            deadline_at=self.deadline_at,
            first_byte_deadline=self.first_byte_deadline,
        )

    def _sink(self) -> Sink:
        """Returns the destination of the answer: the client, the recorder, or both."""
        sink: Sink | None = self._client_sink
        if self.recorder is not None:
            sink = RecordingSink(self.recorder, sink, is_stream=self.call.stream, usage=lambda: self.usage)
        assert sink is not None, "an exchange has a client, or a recorder, or both"
        if self.content is not None:
            sink = ContentSink(sink, self.content)
        note = self.request.note
        return sink if note is None else NotingSink(sink, lambda data: note(self.target, data))

    # -- how it ends --------------------------------------------------------------------------------------------------

    def _note_success(self) -> None:
        if isinstance(self.cancelled_with, ClientStalled):  # it did not read the end of the answer
            self.outcome, self.error = self.cancelled_with.code, self.cancelled_with
        else:
            self.outcome = Outcome.FINISHED if self.is_finishing else Outcome.COMPLETE

    async def _fail(self, error: GatewayError) -> None:
        """Records the error, and sends it to the client in the form that is still possible."""
        drop_frames(error)
        if self.source is not None and self.source.is_delivered:
            self._note_success()  # the client has its answer; the upstream's connection failed afterwards
            return
        self.outcome = Outcome.CANCELLED if self.is_finishing else error.code
        self.error = error
        if isinstance(error, UpstreamError) and self.attempts:
            error.attempts = tuple(view.describe_attempt(attempt, self.started_at) for attempt in self.attempts)
        if self._client_sink is not None:
            await self._client_sink.tell(error)

    def _settle(self) -> None:
        """Records how the exchange ended: in the ledger, in the totals, and with one log line."""
        try:
            self.services.live.settle(self)
        finally:
            quota_hold.settle(self, self.services.quotas)
        log.info("exchange", **view.log_line(self, trio.current_time()))

    async def _note_cancelled(self) -> None:
        """Finds out why the request's nursery was cancelled, and tells the client if the server stops."""
        if isinstance(self.cancelled_with, ClientStalled):
            self.outcome = self.cancelled_with.code  # the gateway closed the connection for this reason
        elif self.is_ended:
            self._note_success()  # only the rest of the upstream's HTTP framing was cancelled
        elif not self.is_client_gone:
            if self.client is not None:
                self.client.patience_s = _FINAL_MESSAGE_S
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 2 * _FINAL_MESSAGE_S):
                await self._fail(Draining(STOPPED))

    def client_left(self) -> None:
        """The client has disconnected: ends the exchange, unless ``on_disconnect = "finish"`` applies."""
        assert self.client is not None, "only a client disconnects"
        self.client.gone, self.left_at = True, trio.current_time()
        if self.client.ended:
            return
        if self.request.model.on_disconnect == "finish" and self._may_finish():
            self._finish()
        elif self.source is not None and self.source.abandon():
            # Its upstream connection is closed already, so the cancellation is not urgent.
            self.services.cancel_queue.cancel_soon(self._nursery.cancel_scope)
        else:
            self._nursery.cancel_scope.cancel()

    def _may_finish(self) -> bool:
        source = self.source
        if self.is_finishing:
            return True
        if source is None or (isinstance(source, Subscription) and not source.may_finish):
            return False
        return source.is_requested  # before that, an attempt without a client would only waste tokens

    def _finish(self) -> None:
        """Continues without a client: the rest of the answer is read for its token counts, and discarded."""
        self.is_finishing = True
        finish_s = self.request.model.finish_timeout_s or math.inf
        self.deadline_at = min(self.deadline_at, trio.current_time() + finish_s)
        if self.source is not None:
            self.source.finish(self.deadline_at)

    async def detach_client(self) -> None:
        """Continues without the client, and waits for a send in progress: for a run that outlives its client."""
        self.client = None
        if self._client_sink is not None:
            await self._client_sink.detach()

    # -- time limits --------------------------------------------------------------------------------------------------

    def _watch(self, route: Route) -> Watchdog:
        """Sets the deadlines of the call, and starts the watchdog."""
        request = self.request
        client_s = request.client_timeout_s
        if self.call.stream:
            self.first_byte_deadline = request.arrived_at + request.sdk_timeout_s
        else:
            client_s = min(client_s, request.sdk_timeout_s)
        # Waiting for a session turn counts against the client's timeout, not against the configured one.
        self.deadline_at = min(self.started_at + route.total_timeout_s, request.arrived_at + client_s)
        shortest_s = route.shortest_limit_s
        if self._client_sink is not None:
            shortest_s = min(shortest_s, self._client_sink.shortest_s)
        if request.model.on_disconnect == "finish":
            shortest_s = min(shortest_s, request.model.finish_timeout_s or math.inf)
        first_at = min(self.started_at + shortest_s, self.deadline_at, self.first_byte_deadline)
        return Watchdog(self.services.upstream.timers, self._check_limits, first_at=first_at, shortest_s=shortest_s)

    def _check_limits(self, now: float) -> list[float]:
        due_at = [self.deadline_at, self.first_byte_deadline]
        if min(due_at) <= now:
            self.cancel(call_timed_out(self.allowed_s))
        if self.source is not None:
            due_at += self.source.check_limits(now)
        if self._client_sink is not None:
            due_at += self._client_sink.check_limits(now)
        return due_at
