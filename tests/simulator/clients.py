"""Clients: what they ask, how they read and disconnect, and the outcome of each call."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import attrs
import httptools
import trio

from tests.simulator import draws
from tests.simulator.pipes import End, SocketEnd

if TYPE_CHECKING:
    from tests.simulator.world import World

PATIENCE_S = 60.0
"""No answer takes longer than this, whatever happens."""
_RECEIVES_BYTES = 400


class Answer:
    """A response that is parsed while its bytes arrive.

    Attributes:
        status: 0 until the response head has arrived.
        complete: The response ended properly.
        received_bytes: Size of the response so far, including its head.
        late: Bytes arrived after the end.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.complete = self.keep_alive = self.late = False
        self.received_bytes = 0
        self.begun_at = self.ended_at = math.nan
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Parses the received bytes. Raises httptools.HttpParserError if they are no HTTP response."""
        if self.complete:
            self.late = True
            return
        self.received_bytes += len(data)
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.begun_at = trio.current_time()
        self.status = self._parser.get_status_code()
        self.keep_alive = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True
        self.ended_at = trio.current_time()


@attrs.define(eq=False)
class Call:
    """One request of a client and everything that is known about it.

    Attributes:
        sent_at: When the last byte of its body was sent; NaN = it was not sent completely.
        fresh: Its connection carried no earlier request.
        disconnected: The client disconnected before the answer's end, at ``disconnected_at``.
        stalled: The client stopped reading for a while.
        over: The client is finished with it.
        entered: How often the app was called.
        returned: The app has returned, at ``returned_at``.
        before: The previous request on the same connection.
        admitted: How many exchanges were begun for it; the last one at ``admitted_at``.
        silent_from: Since when it is due keep-alives: it is admitted and no longer queued.
        settled: How often such an exchange was settled.
        judged: The invariants have been checked.
        outcome, events, bytes: Those of its exchange.
        continued: A second provider continued the answer of the first one.
        total_s: Its total time limit.
        keep_alive_s: The length of silence after which its stream gets a comment.
        quiet_s: The longest silence.
        replies: The providers' replies, in the order in which the request reached them.
    """

    request: draws.Request
    fresh: bool = True
    answer: Answer = attrs.field(factory=Answer)
    begun_at: float = attrs.field(factory=trio.current_time)
    sent_at: float = math.nan
    disconnected: bool = False
    disconnected_at: float = math.inf
    stalled: bool = False
    over: bool = False
    entered: int = 0
    returned: bool = False
    returned_at: float = math.inf
    before: Call | None = attrs.field(default=None, repr=False)
    admitted: int = 0
    admitted_at: float = math.nan
    silent_from: float = math.inf
    settled: int = 0
    judged: bool = False
    outcome: str | None = None
    events: int = 0
    bytes: int = 0
    continued: bool = False
    total_s: float = math.inf
    keep_alive_s: float = math.inf
    quiet_s: float = 0.0
    replies: list[tuple[str, draws.Reply]] = attrs.field(factory=list)


async def run_client(world: World) -> None:
    """Makes one call after the other until there are no more requests, or the gateway does not listen."""
    end: End | SocketEnd | None = None
    call: Call | None = None
    try:
        while (request := world.next_request(kept=end is not None)) is not None:
            await trio.sleep(request.pause_s)
            fresh = end is None
            if end is None:
                end = world.connect()
            if end is None:
                world.note_turned_away(request)
                return
            before = call if not fresh else None
            call = await _make(world, end, Call(request, fresh, before=before))
            if not fresh and not call.answer.received_bytes and not call.entered and not call.disconnected:
                # The idle connection was closed at the moment of its use. Retry once, as real clients do.
                end.close()
                end = world.connect()
                if end is None:
                    world.note_turned_away(request)
                    return
                call = await _make(world, end, Call(request))
            if call.disconnected or not call.answer.complete or not call.answer.keep_alive:
                end.close()
                end = None
    finally:
        if end is not None:
            end.close()


async def _make(world: World, end: End | SocketEnd, call: Call) -> Call:
    request = call.request
    world.begin(call)
    try:
        with trio.move_on_after(PATIENCE_S) as time_limit:
            with trio.move_on_after(request.disconnect_after_s) as disconnect_timer:
                with contextlib.suppress(trio.BrokenResourceError):
                    await _exchange(end, call)
            if disconnect_timer.cancelled_caught:
                call.disconnected = True
            if call.disconnected:
                await _disconnect(end, call)
        if time_limit.cancelled_caught:
            world.violate(f"{request.id} was not answered within {PATIENCE_S:g} s")
    except httptools.HttpParserError as error:
        world.violate(f"{request.id} got an answer that is not HTTP: {error}")
    finally:
        call.over = True
        world.judge(call)
    return call


async def _exchange(end: End | SocketEnd, call: Call) -> None:
    request, answer = call.request, call.answer
    with contextlib.suppress(trio.BrokenResourceError):  # an early answer may have closed the connection
        await _ask(end, call)
    while not answer.complete:
        if answer.received_bytes >= request.disconnect_after_bytes:
            call.disconnected = True
            return
        if not call.stalled and answer.received_bytes >= request.stalls_bytes:
            call.stalled = True
            await trio.sleep(request.stalls_s)
        begun_at = trio.current_time()
        data = await end.receive_some(_RECEIVES_BYTES)
        call.quiet_s = max(call.quiet_s, trio.current_time() - max(begun_at, call.silent_from))
        if not data:
            return
        answer.feed(data)


async def _ask(end: End | SocketEnd, call: Call) -> None:
    uploads = call.request.uploads
    head, body = call.request.wire
    if uploads:
        await end.send_all(head)
        size = len(body) // len(uploads) + 1
        for position, pause_s in enumerate(uploads):
            await trio.sleep(pause_s)
            await end.send_all(body[position * size : (position + 1) * size])
    else:
        await end.send_all(head + body)
    call.sent_at = trio.current_time()


async def _disconnect(end: End | SocketEnd, call: Call) -> None:
    call.disconnected_at = trio.current_time()
    match call.request.how:
        case "close":
            end.close()
        case "reset":
            end.reset()
        case "half-close":  # reads what is still sent
            with contextlib.suppress(trio.BrokenResourceError):
                await end.send_eof()
                while data := await end.receive_some():
                    call.answer.feed(data)
