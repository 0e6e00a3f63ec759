"""The client's side of an exchange: sends the answer, keep-alive comments and errors, and detects a stalled client."""

from __future__ import annotations

import math
import socket
import time

import trio

from trigate.dialects.anthropic import PING
from trigate.dialects.endpoints import RESPONSES
from trigate.dialects.errors import error_frame, error_response
from trigate.dialects.openai_responses import overloaded_response, response_failed
from trigate.dialects.stream import TranslatedStream
from trigate.errors import ClientStalled, GatewayError, Header, QuotaSpent, Rejected
from trigate.exchange.answers import stream_headers
from trigate.exchange.bill import bill_of
from trigate.exchange.client_response import ClientResponse
from trigate.exchange.deadlines import StallDetector
from trigate.exchange.shared_call import Subscription
from trigate.exchange.sink import PlainSocket
from trigate.exchange.state import ExchangeState
from trigate.openai import sse
from trigate.prices.price import usd
from trigate.quotas.headers import limit_headers

KEEP_ALIVE = "keep-alive"
"""Sent in a silence of a stream. In Anthropic's format it is a ping, but only behind the event that has to be the
first."""


class ClientSink:
    """The `Sink` of an exchange that has a client, and the `PlainSocket` behind it.

    The head of a JSON answer waits for its body, and both go out in one write.

    Args:
        nursery: The request's.

    Attributes:
        is_detached: Nothing more is sent to the client (`detach`).
    """

    __slots__ = (
        "_client",
        "_format",
        "_head",
        "_is_json",
        "_is_stream",
        "_keep_alive_s",
        "_keep_alive_with",
        "_nursery",
        "_stall",
        "_state",
        "is_detached",
    )

    def __init__(self, client: ClientResponse, state: ExchangeState, nursery: trio.Nursery) -> None:
        call, limits = state.call, state.generation.config.limits
        self._client = client
        self._format = call.endpoint.format
        self._nursery = nursery
        self._state = state
        self._is_stream = call.stream
        self._is_json = not call.stream and call.endpoint.answer == "json"
        self._head: tuple[int, list[Header]] | None = None
        self._keep_alive_with = call.endpoint.keep_alive
        keeps_alive = call.stream and self._keep_alive_with != "none"
        self._keep_alive_s = (limits.keep_alive_s or math.inf) if keeps_alive else math.inf
        self._stall = StallDetector(limits.stall_timeout_s or math.inf)
        self.is_detached = False

    @property
    def shortest_s(self) -> float:
        """The shortest of the client's time limits."""
        return min(self._keep_alive_s, self._stall.limit_s)

    # -- the answer ---------------------------------------------------------------------------------------------------

    @property
    def plain_socket(self) -> PlainSocket | None:
        # None while a keep-alive is being sent: a part of it may be out.
        client = self._client
        if client.socket is None or client.gone or client.sending_since is not None or self.is_detached:
            return None
        return self

    async def start(self, status: int, headers: list[Header]) -> None:
        if self._is_json:
            self._head = status, headers
        else:
            await self._commit(status, headers)

    async def _commit(self, status: int, headers: list[Header]) -> None:
        if not self._client.committed and not self.is_detached:
            self._note_commit()
            await self._client.start(status, headers)

    def _note_commit(self) -> None:
        state = self._state
        now = state.committed_at = trio.current_time()
        self._client.headers += answer_headers(state, now)
        state.first_byte_deadline = math.inf
        if state.source is not None:
            state.source.note_committed()

    async def send(self, data: bytes) -> None:
        if not self.is_detached:
            await self._client.send(data)

    async def end(self, data: bytes = b"") -> None:
        if self.is_detached:
            return
        if self._head is not None:
            self._note_commit()
            await self._client.respond(*self._head, data)
        else:
            await self._client.end(data)

    async def tell(self, error: GatewayError) -> None:
        """Sends an error: before COMMIT as a status, within a stream as an event. Within any other answer, it closes
        the connection instead."""
        client = self._client
        if self.is_detached:
            return
        if not client.committed:
            self._note_commit()
            rendered = error_response(error, self._format, self._state.id)
            if self._state.call.endpoint is RESPONSES:
                rendered = overloaded_response(error, rendered)
            await client.respond(*rendered)
        elif self._is_stream:
            await client.end(self._error_frame(error))
        else:
            client.abandon()

    def _error_frame(self, error: GatewayError) -> bytes:
        state = self._state
        reader = state.source.reader if state.source is not None else None
        # while something waits to be sent, the client does not have all that the reader has returned
        has_all = not any(attempt.is_sending for attempt in state.attempts)
        frame = reader.error_frame(error, state.id) if has_all and isinstance(reader, TranslatedStream) else None
        if frame is None and state.call.endpoint is RESPONSES:
            frame = response_failed(error, state.call, sequence=state.events)
        if frame is not None:
            return frame
        before, behind = state.call.endpoint.around_error
        return before + error_frame(error, self._format, state.id) + behind

    async def detach(self) -> None:
        """Sends nothing more, and waits for a send in progress. The client has disconnected, and the exchange
        continues."""
        self.is_detached = True
        await self._client.wait_sent()

    # -- the plain socket ---------------------------------------------------------------------------------------------

    @property
    def socket(self) -> socket.socket | None:
        return self._client.socket

    @property
    def chunked(self) -> bool:
        return self._client.chunked

    def note_sent(self, now: float) -> None:
        self._client.last_sent_at = now

    def note_blocked(self, since: float | None) -> None:
        self._client.sending_since = since

    def queue_partial(self, rest: bytes) -> None:
        self._client.queue_partial(rest)

    # -- time limits --------------------------------------------------------------------------------------------------

    def check_limits(self, now: float) -> list[float]:
        """Ends the exchange of a client that has stalled, and sends a keep-alive comment when one is due; returns when
        each is due next."""
        client, state = self._client, self._state
        if self.is_detached:
            return []
        stalled_at = math.inf
        if client.sending_since is not None:  # to see what a client acknowledges is a system call
            stalled_at = self._stall.due_at(
                now, sending_since=client.sending_since, acknowledged_bytes=client.acknowledged_bytes
            )
        if stalled_at <= now:
            limit_s = self._stall.limit_s
            self._end_stalled(
                ClientStalled(f"The client read nothing for {limit_s:g} s; its upstream stream was ended.")
            )
        # A queued exchange may still be refused with a status, so its keep-alive comments begin at its admission.
        quiet_since = max(client.last_sent_at, state.started_at, state.admitted_at)
        if client.sending_since is not None or client.gone or state.is_queued:
            quiet_since = math.inf
        if quiet_since + self._keep_alive_s <= now and self._may_keep_alive():
            if self._inject(self._comment()):
                client.last_sent_at = now
            else:
                # In a task of its own: the client may not read, and the stall limit applies to this send, too.
                self._nursery.start_soon(self._keep_alive)
            quiet_since = now
        return [stalled_at, quiet_since + self._keep_alive_s]

    def _may_keep_alive(self) -> bool:
        return not self._client.ended and not self._state.is_cancelled

    async def _keep_alive(self) -> None:
        client = self._client
        if not client.committed and self._may_keep_alive():
            await self._commit(200, stream_headers(self._state.call.endpoint.stream_type))
        # Checked again: the answer may have come meanwhile. A send in progress already breaks the silence, and a
        # keep-alive queued behind it could follow the last event.
        if self._may_keep_alive() and client.sending_since is None:
            comment = self._comment()
            if not self._inject(comment):
                await self.send(comment)

    def _comment(self) -> bytes:
        if self._keep_alive_with == "ping" and self._state.bytes_sent:
            return PING
        if self._keep_alive_with == "blank":
            return b"\n"
        return sse.comment(KEEP_ALIVE, self._state.generation.config.limits.keep_alive_form)

    def _inject(self, data: bytes) -> bool:
        source = self._state.source
        return source is not None and source.inject(data)

    def _end_stalled(self, error: ClientStalled) -> None:
        """Ends the exchange of a client that does not read, also if only the end of the answer is left to read."""
        state = self._state
        state.cancel(error)
        state.cancelled_with = state.cancelled_with or error
        self._nursery.start_soon(self._abort)

    async def _abort(self) -> None:
        if self._state.source is not None:
            # The exchange's task may be in a send that no cancellation reaches: close the reply from here.
            await self._state.source.close_reply()
        await self._client.abort()


def answer_headers(state: ExchangeState, now: float) -> list[Header]:
    """The response headers that describe a call: the upstream, the number of attempts, and the gateway's own share of
    the time from the arrival of the request to ``now`` (Trio time)."""
    source = state.source
    headers: list[Header] = []
    waited_s = 0.0
    if source is not None:
        if isinstance(source, Subscription):
            headers.append((b"x-trigate-coalesced", source.role.encode()))
        if source.target is not None and source.attempts:
            headers.append((b"x-trigate-upstream", source.target.upstream.encode()))
            if source.dropped:
                headers.append((b"x-trigate-dropped", ",".join(source.dropped).encode()))
        waited_s = source.waited_s(now)
        if not state.call.stream and state.error is None:
            cost = bill_of(state).cost
            if cost is not None:
                headers.append((b"x-trigate-cost-usd", usd(cost).encode()))
    headers.append((b"x-trigate-attempts", b"%d" % len(state.attempts)))
    overhead_s = state.overhead_s = max(0.0, now - state.request.arrived_at - waited_s)
    headers.append((b"x-trigate-overhead-ms", b"%.3f" % (overhead_s * 1000)))
    if state.limits.all and not isinstance(state.error, Rejected):  # which has those of the provider
        is_refused = isinstance(state.error, QuotaSpent)
        headers += limit_headers(state.limits, state.call.endpoint.format, now, time.time(), is_refused=is_refused)
    return headers
