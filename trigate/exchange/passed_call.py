"""A request that is passed through to one upstream (`openai.passed_paths`), with all that holds for a call.

It is an `UpstreamCall` with another request and another answer. Limits, deadlines, circuit breakers, the ledger and
``/status`` do not know the difference.

What differs is what may be repeated. An upload can be read only once, and to make an object twice is a mistake. So such
a request goes to the next target only if it has not been sent at all: no connection could be made, or the upstream had
no slot for it.
"""

from __future__ import annotations

import math
from contextlib import AbstractAsyncContextManager

import attrs
import trio

from trigate.errors import GatewayError, ProtocolViolation, Unavailable, UpstreamTimeout
from trigate.exchange.answers import BinaryAnswer, StreamAnswer, headers_of
from trigate.exchange.attempt import Answer, Attempt
from trigate.exchange.attempt_headers import attempt_headers
from trigate.exchange.outcome import Phase
from trigate.exchange.request import PassThrough
from trigate.exchange.sink import Sink
from trigate.exchange.translation import Translation
from trigate.exchange.upstream_call import UpstreamCall
from trigate.exchange.websocket_answer import WebSocketAnswer
from trigate.routing.plan import Plan, Step
from trigate.upstream.reply import Reply
from trigate.upstream.request_stream import RequestStream
from trigate.upstream.upstream import Upstream


@attrs.define(eq=False, kw_only=True)
class PassedCall(UpstreamCall):
    """The upstream's side of an exchange that passes a request through.

    Attributes:
        is_committed: The status line is out.
    """

    is_committed: bool = False

    @property
    def passed(self) -> PassThrough:
        """What is passed through."""
        passed = self.request.passed
        assert passed is not None, "an exchange makes a `PassedCall` only if there is something to pass"
        return passed

    def _open(
        self, attempt: Attempt, upstream: Upstream, translation: Translation
    ) -> AbstractAsyncContextManager[Reply]:
        passed, model = self.passed, attempt.target.model
        headers = attempt_headers(self.request, attempt, self.request.headers, over_at=self.deadline_at)
        if passed.socket is not None:
            return upstream.open_websocket(
                passed.path_for(model),
                headers=headers,
                subprotocols=passed.socket.subprotocols,
                max_bytes=self.request.generation.config.limits.event_bytes,
                owner=self.request.owner,
                on_phase=attempt.on_phase,
            )
        body = passed.body_for(model)
        return upstream.open(
            passed.method,
            passed.path_for(model),
            body if isinstance(body, bytes) else _TimedUpload(body, attempt),
            headers=headers,
            owner=self.request.owner,
            on_phase=attempt.on_phase,
        )

    def _answer(self, translation: Translation) -> Answer:
        call, limits = self.request.call, self.request.generation.config.limits
        if self.passed.socket is not None:
            return WebSocketAnswer(client=self.passed.socket, claim=self.claim, count=self._count)
        events = None
        if call.stream:
            events = StreamAnswer(
                call=call,
                translation=translation,
                claim=self.claim,
                count=self._count,
                socket_relay=self.services.socket_relay,
                max_event_bytes=limits.event_bytes,
                keep_bytes=0,
                continues=None,
            )
        return _PassedAnswer(
            call=self, events=events, max_bytes=limits.response_bytes, max_decoded_bytes=limits.decoded_bytes
        )

    def _after(self, plan: Plan, error: GatewayError) -> Step | None:
        passed = self.passed
        if not passed.is_repeatable and not _was_not_sent(error):
            return None
        if passed.upload is not None and passed.upload.begun:
            return None
        return super()._after(plan, error)

    def note_committed(self) -> None:
        super().note_committed()
        self.is_committed = True

    @property
    def is_requested(self) -> bool:
        """Whether a whole request has been sent, or is about to be: an upload cannot be finished without its client."""
        return self.passed.upload is None and super().is_requested


def _was_not_sent(error: GatewayError) -> bool:
    """Whether nothing of a request can have arrived at the upstream."""
    if isinstance(error, UpstreamTimeout):
        return error.phase in ("queue", "connect")
    return isinstance(error, Unavailable) and not error.sent


@attrs.define(eq=False)
class _TimedUpload:
    """A body on its way. The time limits of its upstream do not count while the client is waited for."""

    _body: RequestStream
    _attempt: Attempt

    @property
    def length_bytes(self) -> int | None:
        return self._body.length_bytes

    @property
    def begun(self) -> bool:
        return self._body.begun

    async def receive(self) -> bytes | None:
        attempt = self._attempt
        attempt.waiting_since = attempt.head_due_from = math.inf
        piece = await self._body.receive()
        attempt.waiting_since = attempt.head_due_from = trio.current_time()
        return piece


@attrs.define(eq=False, kw_only=True)
class _PassedAnswer:
    """An answer with the upstream's own status: events, an answer that is read first, or bytes as they come.

    Args:
        events: Moves a stream of events; None = the client has asked for none.
    """

    call: PassedCall
    events: StreamAnswer | None
    max_bytes: int
    max_decoded_bytes: int

    async def relay(self, attempt: Attempt, reply: Reply, sink: Sink) -> bytes | None:
        """Moves the answer. As `Answer.relay`."""
        call, kind = self.call, reply.content_type
        if self.events is not None and kind == "text/event-stream":
            return await self.events.relay(attempt, reply, sink)
        if call.is_committed:  # by a keep-alive comment, which has announced events
            raise ProtocolViolation(
                f"The upstream {attempt.target.upstream} was asked for a stream and answered with {kind}."
            )
        take = call.passed.take_answer
        if take is None or (kind == "text/event-stream" and call.passed.method == "POST"):
            return await BinaryAnswer(claim=call.claim, count=call._count).relay(attempt, reply, sink)
        attempt.phase = Phase.READING
        attempt.waiting_since = math.inf
        body = await reply.read(self.max_bytes, max_decoded_bytes=self.max_decoded_bytes, on_piece=attempt.note_byte)
        data, attempt.usage = await take(attempt.target.upstream, body)
        if not call.claim(attempt):
            return None
        call._count(len(data))
        headers = [*headers_of(reply), (b"content-length", b"%d" % len(data))]
        await attempt.start(sink, reply.status, headers)
        return data
