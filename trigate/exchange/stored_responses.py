"""Responses that the gateway keeps for its clients, and those that it makes without them (``background``).

A response is stored when it is complete, before its client gets the end of it, so a client that has seen the end can
continue from it. A response in the background is an exchange without a client, in a nursery of this service. It is
stored when it begins, and again when it ends, however it ends: also when the gateway stops.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

import attrs
import msgspec
import trio

from trigate.concurrency.notify import RepeatedEvent
from trigate.dialects.openai_responses import failed_response, response_failed, response_head
from trigate.dialects.stream import TranslatedStream
from trigate.errors import CancelledByOperator, Draining, GatewayError
from trigate.exchange.exchange import Exchange
from trigate.exchange.shared_call import STOPPED
from trigate.openai import sse
from trigate.openai.answer import Usage
from trigate.openai.raw_json import split_fields
from trigate.openai.request import Call
from trigate.store.interface import Store
from trigate.store.records import StoredResponse

_LAST = (b"event: response.completed\n", b"event: response.incomplete\n")


@attrs.define(eq=False)
class LiveResponse:
    """A response that is made in the background.

    Attributes:
        events: The events of its stream so far; each is at the place of its ``sequence_number``.
        news: Set at each new event, and at the end.
    """

    exchange: Exchange | None = None
    events: list[bytes] = attrs.field(factory=list)
    news: RepeatedEvent = attrs.field(factory=RepeatedEvent)
    is_ended: bool = False

    def add(self, frames: bytes) -> None:
        """Adds events of the stream."""
        self.events += split_events(frames)
        self.news.set()


def split_events(frames: bytes) -> list[bytes]:
    """Splits whole events of a stream that the gateway has encoded, and leaves comments out.

    >>> split_events(b"event: a\\ndata: 1\\n\\n: keep-alive\\n\\nevent: b\\ndata: 2\\n\\n")
    [b'event: a\\ndata: 1\\n\\n', b'event: b\\ndata: 2\\n\\n']
    """
    return [event + b"\n\n" for event in frames.split(b"\n\n") if event.startswith(b"event:")]


class ResponseRecorder:
    """Stores the answer of one call. A `sink.Recorder`.

    Args:
        input_items: The items of the call's input, and of all responses that it continues, as JSON.
        live: Takes the events of a response in the background; None = it has a client.
        keeps_events: Whether the events are stored with it.
    """

    def __init__(
        self,
        store: Store,
        call: Call,
        *,
        owner: str,
        input_items: bytes,
        worker: str = "",
        live: LiveResponse | None = None,
        keeps_events: bool = False,
    ) -> None:
        assert call.identity is not None, "the gateway gives each response call an identity"
        self._store = store
        self._call = call
        self._identity = call.identity
        self._owner = owner
        self._input = input_items
        self._worker = worker
        self._live = live
        self._keeps_events = keeps_events
        self._body: bytes | None = None
        self.is_stored = False

    def feed(self, frames: bytes) -> None:
        """As `Recorder.feed`."""
        if self._live is not None:
            self._live.add(frames)
        if any(mark in frames for mark in _LAST):
            for event in split_events(frames):
                if event.startswith(_LAST):
                    self._body = bytes(split_fields(sse.data_of(event) or b"{}")["response"])

    def feed_answer(self, body: bytes) -> None:
        """As `Recorder.feed_answer`."""
        self._body = body

    async def complete(self, usage: Usage | None) -> None:
        """As `Recorder.complete`. The answer of an upstream that keeps its answers itself is not stored."""
        await trio.lowlevel.checkpoint()
        if self._body is not None and b'"%b"' % self._identity.id.encode() in self._body:
            await self._store.responses.put(self._record(self._body))
            self.is_stored = True

    async def begin(self) -> None:
        """Stores a response in the background that has not ended.

        Raises:
            StoreUnavailable: It cannot be stored.
        """
        await self._store.responses.put(self._record(self.head("in_progress"), worker=self._worker))

    def settle(self, error: GatewayError) -> None:
        """Stores a response in the background that has no answer. Synchronous: the write is queued."""
        if self.is_stored:
            return
        is_cancelled = isinstance(error, CancelledByOperator)
        response = failed_response(error, self._call, status="cancelled" if is_cancelled else "failed")
        self._store.responses.put(self._record(msgspec.json.encode(response)))

    def head(self, status: str) -> bytes:
        """Returns the response as it is before there is an answer."""
        identity = self._identity
        head = response_head(self._call, status, response_id=identity.id, created_at=identity.created_at)
        return msgspec.json.encode(head)

    def _record(self, body: bytes, *, worker: str = "") -> StoredResponse:
        events = b"".join(self._live.events) if self._live is not None and self._keeps_events else b""
        return StoredResponse(
            id=self._identity.id,
            owner=self._owner,
            at=time.time(),
            worker=worker,
            body=body,
            input=self._input,
            events=events,
        )


class BackgroundResponses:
    """The responses that this worker makes in the background. Opened by `open_background_responses`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._live: dict[str, LiveResponse] = {}

    def __repr__(self) -> str:
        return f"<BackgroundResponses, {len(self._live)} in progress>"

    def get(self, response_id: str) -> LiveResponse | None:
        """Returns a response that this worker is making; None = it makes none with this id."""
        return self._live.get(response_id)

    def start(self, response_id: str, exchange: Exchange, recorder: ResponseRecorder, live: LiveResponse) -> None:
        """Begins to make a response. Synchronous."""
        live.exchange = exchange
        self._live[response_id] = live
        self._nursery.start_soon(self._run, response_id, exchange, recorder, live)

    async def _run(self, response_id: str, exchange: Exchange, recorder: ResponseRecorder, live: LiveResponse) -> None:
        try:
            async with trio.open_nursery() as nursery:
                await exchange.run(nursery)
                nursery.cancel_scope.cancel()
        finally:
            self._end(response_id, exchange, recorder, live)

    def _end(self, response_id: str, exchange: Exchange, recorder: ResponseRecorder, live: LiveResponse) -> None:
        error = exchange.error
        if not recorder.is_stored:
            error = error or Draining(STOPPED)
            if exchange.call.stream:
                reader = exchange.source.reader if exchange.source is not None else None
                frame = reader.error_frame(error) if isinstance(reader, TranslatedStream) and live.events else None
                live.add(frame or response_failed(error, exchange.call, sequence=len(live.events)))
        if error is not None:
            recorder.settle(error)
        live.is_ended = True
        live.news.set()
        del self._live[response_id]


@contextlib.asynccontextmanager
async def open_background_responses() -> AsyncIterator[BackgroundResponses]:
    """Makes responses in the background until the block ends; those that are in progress then fail."""
    async with trio.open_nursery() as nursery:
        try:
            yield BackgroundResponses(nursery)
        finally:
            nursery.cancel_scope.cancel()
