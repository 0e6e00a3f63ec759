"""Moves an answer from an upstream's reply to a sink: a stream of events, one JSON object, or bytes.

An answer that has content first claims the call (``claim``), synchronously, so that one attempt wins. Nothing goes to
the sink before that.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping

import attrs
import httpx2
import msgspec
import trio

from trigate.errors import GatewayError, Header, ProtocolViolation
from trigate.exchange.attempt import Attempt
from trigate.exchange.cost_reader import CostReader
from trigate.exchange.outcome import Phase
from trigate.exchange.sink import PlainSocket, Sink
from trigate.exchange.socket_relay import SocketRelay
from trigate.exchange.translation import Reader, Translation
from trigate.openai.conversion import BLANKS, are_events
from trigate.openai.request import Call
from trigate.prices.prices import Prices
from trigate.upstream.reply import Reply

# How long the rest of an upstream's body (the end of its HTTP framing) may take after the last event, before the
# connection is closed instead of kept. The client has its answer by then.
_REST_S = 0.25


@functools.cache
def stream_headers(content_type: str) -> list[Header]:
    """The headers of a stream; the list must not be changed."""
    return [
        (b"content-type", content_type.encode()),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]


JSON_HEADERS: list[Header] = [(b"content-type", b"application/json")]

Claim = Callable[[Attempt], bool]
"""Makes an attempt the winner; False = another attempt was first."""
Count = Callable[[int], None]
"""Adds bytes that went to the sink."""


@attrs.define(eq=False, kw_only=True)
class StreamAnswer:
    """A stream of server-sent events. Whole events go to the sink as they arrive, on the fast path if there is one.

    Args:
        socket_relay: The fast path; None = this system has none.
        keep_bytes: How many bytes of the answer are kept, so that another target can continue it; 0 = none.
        continues: The fields that all events of the continued stream have in common.
        prices: The client gets the cost with the token counts; None = it does not.
    """

    call: Call
    translation: Translation
    claim: Claim
    count: Count
    socket_relay: SocketRelay | None
    max_event_bytes: int
    keep_bytes: int
    continues: Mapping[str, msgspec.Raw] | None
    prices: Prices | None = None
    _attempt: Attempt = attrs.field(init=False)
    _client: PlainSocket = attrs.field(init=False)

    async def relay(self, attempt: Attempt, reply: Reply, sink: Sink) -> bytes | None:
        """Moves whole events until the stream is complete. As `Answer.relay`."""
        name = attempt.target.upstream
        attempt.phase = Phase.WAITING
        piece = await self._receive_first(attempt, reply)
        reader: Reader = self.translation.stream_reader(
            self.call,
            upstream=name,
            max_event_bytes=self.max_event_bytes,
            keep_bytes=self.keep_bytes,
            continues=self.continues,
        )
        attempt.reader = reader
        if self.prices is not None:
            reader = CostReader(reader, self.prices, attempt.target)
        claimed, has_sent, is_first = False, False, True
        while True:
            # Not before the first bytes: the server keeps the head until they come, and the content may have none yet
            # (a tool call, for a client that gets it whole).
            if has_sent and await self._run_fast_path(attempt, reply, reader, sink):
                if reader.complete:
                    return await self._end(attempt, reply, sink, b"")
                if reader.error is not None:
                    raise reader.error
            if not is_first:
                piece = await attempt.receive(reply)
            is_first = False
            data = reader.feed(piece) if piece is not None else reader.feed_end()
            if reader.error is not None and not claimed:
                raise reader.error  # nothing has been sent: the next target may answer
            if reader.has_content and not claimed:
                if attempt.examine is not None:
                    attempt.examine(data)
                if not self.claim(attempt):
                    return None
                claimed = True
                attempt.phase = Phase.STREAMING
                await attempt.start(sink, 200, stream_headers(self.call.endpoint.stream_type))
            self.count(len(data))
            if reader.complete:
                return await self._end(attempt, reply, sink, data)
            if data:
                await attempt.send(sink, data)
                has_sent = claimed
            if reader.error is not None:
                raise reader.error

    async def _receive_first(self, attempt: Attempt, reply: Reply) -> bytes | None:
        """Receives the first bytes of the body; JSON is received whole, and becomes a stream.

        Raises:
            ProtocolViolation: They are neither, or too many.
        """
        name, kind = attempt.target.upstream, reply.content_type
        while (piece := await attempt.receive(reply)) is not None:
            body = piece.lstrip(BLANKS)
            if kind in self.translation.stream_types:
                return piece
            if body.startswith((b"{", b"[")):
                pieces = [body]
                size = len(body)
                while (piece := await attempt.receive(reply)) is not None:
                    pieces.append(piece)
                    size += len(piece)
                    if size > self.max_event_bytes:
                        raise ProtocolViolation(
                            f"The upstream {name} answered with JSON of more than {self.max_event_bytes} bytes."
                        )
                return self.translation.events(self.call, b"".join(pieces), upstream=name)
            if body and (kind in ("text/event-stream", "") or are_events(body)):
                return piece
            if body:
                break
        if kind not in ("text/event-stream", ""):
            raise ProtocolViolation(f"The upstream {name} was asked for a stream and answered with {kind}.")
        return None

    async def _end(self, attempt: Attempt, reply: Reply, sink: Sink, data: bytes) -> bytes | None:
        """Ends the answer. The connection is kept only if the end of the reply's HTTP framing arrives soon.

        Returns:
            As `Answer.relay`.
        """
        response = reply.plain_response
        if response is not None and response.complete:
            return data
        await attempt.end(sink, data)
        with trio.move_on_after(_REST_S), contextlib.suppress(GatewayError):
            while await reply.receive() is not None:
                pass
        return None

    async def _run_fast_path(self, attempt: Attempt, reply: Reply, reader: Reader, sink: Sink) -> bool:
        """Lets the socket relay move the stream until it is complete, has an error, or its body has ended.

        Returns:
            Whether it did; False = not both ends are plain sockets now.
        """
        relay, response, client = self.socket_relay, reply.plain_response, sink.plain_socket
        if relay is None or client is None or response is None or response.socket is None or response.complete:
            return False
        stream = attempt.relayed = relay.stream(response, response.socket, client, reader=reader)
        self._attempt, self._client = attempt, client
        attempt.note_byte()
        try:
            await stream.run(self)
        finally:
            attempt.relayed = None
            attempt.is_sending = False
        if stream.failure is not None and not reader.complete:
            failure: httpx2.TransportError = stream.failure
            raise reply.truncation_error(failure) from failure
        return True

    def note_relayed(self, now: float, sent_bytes: int) -> None:
        """Bytes came from the upstream, and went to the client."""
        self._attempt.last_byte_at = now
        if sent_bytes:
            self.count(sent_bytes)
            self._client.note_sent(now)

    def note_blocked(self, since: float | None) -> None:
        """The client does not read, or reads again. Meanwhile the upstream is not read, so it is not idle."""
        self._attempt.is_sending = since is not None
        self._client.note_blocked(since)
        if since is None:
            self._attempt.note_byte()


@attrs.define(eq=False, kw_only=True)
class JsonAnswer:
    """One JSON object. It is read and checked before any of it goes to the sink."""

    call: Call
    translation: Translation
    claim: Claim
    count: Count
    max_bytes: int
    max_decoded_bytes: int

    async def relay(self, attempt: Attempt, reply: Reply, sink: Sink) -> bytes | None:
        """Reads the whole answer. As `Answer.relay`."""
        attempt.phase = Phase.READING
        attempt.waiting_since = math.inf
        body = await reply.read(self.max_bytes, max_decoded_bytes=self.max_decoded_bytes, on_piece=attempt.note_byte)
        if not body.startswith(b"{") and are_events(body.lstrip(BLANKS)[:8]):
            # rare, and as long as the answer: it must not hold other calls up
            collect = functools.partial(self.translation.collected, self.call, body, upstream=attempt.target.upstream)
            body = await trio.to_thread.run_sync(collect, abandon_on_cancel=True)
        data, usage = self.translation.answer(self.call, body, upstream=attempt.target.upstream)
        if attempt.examine is not None:
            attempt.examine(data)
        if not self.claim(attempt):
            return None
        attempt.usage = usage
        self.count(len(data))
        await attempt.start(sink, 200, JSON_HEADERS)
        return data


@attrs.define(eq=False, kw_only=True)
class BinaryAnswer:
    """Bytes (audio), which go to the sink as they come. Their HTTP framing is the only proof of completeness."""

    claim: Claim
    count: Count

    async def relay(self, attempt: Attempt, reply: Reply, sink: Sink) -> bytes | None:
        """Moves the bytes. As `Answer.relay`."""
        attempt.phase = Phase.WAITING
        headers = headers_of(reply)
        if "content-length" in reply.headers and "content-encoding" not in reply.headers:
            headers.append((b"content-length", reply.headers["content-length"].encode()))
        claimed = False
        while (piece := await attempt.receive(reply)) is not None:
            if not claimed:
                if not self.claim(attempt):
                    return None
                claimed = True
                attempt.phase = Phase.STREAMING
                await attempt.start(sink, reply.status, headers)
            self.count(len(piece))
            await attempt.send(sink, piece)
        if not claimed:
            if not self.claim(attempt):
                return None
            await attempt.start(sink, reply.status, headers)
        return b""


def headers_of(reply: Reply) -> list[Header]:
    """The headers of a reply that its client gets, where the body is not the gateway's."""
    fields = reply.headers
    headers: list[Header] = []
    if reply.status not in (204, 205):
        headers.append((b"content-type", fields.get("content-type", "application/octet-stream").encode("latin-1")))
    if "content-disposition" in fields:
        headers.append((b"content-disposition", fields["content-disposition"].encode("latin-1")))
    return headers
