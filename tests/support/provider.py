"""A provider that plays a script: the far end of every test of the exchange.

A script is a tuple of steps. Each call gets one script, and the last script repeats. `Provider.transport` plays it in
memory, on Trio's clock and so on a `MockClock`. `open_socket_provider` plays the same script over a real socket. Both
count what they have open, so a leak of the gateway shows up there.

Steps before the first `Head` or `Say` happen before the reply's head. A `Say` without a `Head` before it implies the
head of a stream. A script that ends without `Break` or `Stall` ends its reply properly.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, Literal

import attrs
import httpx2
import msgspec
import trio

from bench import events
from bench.events import event as event

FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
"""The event that finishes a choice. It contains no model id for the gateway to replace."""
DONE = FINISH + events.DONE
"""The end of a complete stream."""


def chunk(delta: Mapping[str, Any], *, finish_reason: str | None = None, model: str = "m") -> bytes:
    """Makes one event of a streamed chat completion."""
    return event(events.chunk(delta, finish_reason, model=model))


def role() -> bytes:
    """Makes the event that opens a stream. It has no content."""
    return chunk({"role": "assistant", "content": ""})


def content(text: str) -> bytes:
    """Makes an event with a part of the answer."""
    return chunk({"content": text})


def usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    """Makes the usage event that ``stream_options.include_usage`` asks for, before ``[DONE]``."""
    return event(events.usage_chunk(events.tokens(prompt_tokens, completion_tokens)))


def completion(text: str, *, model: str = "m") -> bytes:
    """Makes a complete chat completion."""
    message = {"role": "assistant", "content": text}
    return events.encode(
        events.completion(events.choice(message=message, finish_reason="stop"), events.tokens(3, 2), model=model)
    )


# -- the steps --------------------------------------------------------------------------------------------------------


@attrs.frozen
class Head:
    """Sends the status and the headers."""

    status: int = 200
    content_type: str = "text/event-stream"
    headers: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Say:
    """Sends bytes of the body, as one piece."""

    data: bytes


@attrs.frozen
class Pause:
    """Sends nothing for some seconds."""

    seconds: float


@attrs.frozen
class Stall:
    """Sends nothing for ever."""


@attrs.frozen
class Break:
    """Ends the connection, whatever the framing has announced."""

    how: Literal["fin", "rst"] = "fin"


@attrs.frozen
class Refuse:
    """Accepts no connection (in memory only: over a socket, use a port that is not listening)."""


@attrs.frozen
class SlowConnect:
    """Takes some seconds to accept the connection (in memory only)."""

    seconds: float = math.inf


Step = Head | Say | Pause | Stall | Break | Refuse | SlowConnect
Script = tuple[Step, ...]


def says(*texts: str) -> Script:
    """A stream that ends properly, with one event for each text."""
    return (Say(role()), *(Say(content(text)) for text in texts), Say(DONE))


def answers(body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Script:
    """A JSON answer."""
    return (Head(status, "application/json", headers or {}), Say(body))


# -- the provider -----------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Served:
    """One call that reached the provider.

    Attributes:
        target: The path as it was sent, with its query; empty over a socket.
        connection: The number of its connection; 0 in memory.
        pieces_read: How many pieces of the body the gateway has read.
        ended: None while it runs; then ``complete`` (the reply was read to its end), ``broken`` (by the script) or
            ``closed`` (by the gateway).
        ended_at: When it ended, in Trio time.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    _tell: Callable[[], None]
    target: str = ""
    connection: int = 0
    pieces_read: int = 0
    ended: str | None = None
    ended_at: float = math.nan

    @property
    def json(self) -> Any:  # Any: a request body of any shape
        """The decoded body."""
        return msgspec.json.decode(self.body)

    def take(self) -> None:
        """Counts a piece that was read."""
        self.pieces_read += 1
        self._tell()

    def end(self, how: str) -> None:
        """Records how the call ended. Only the first end counts."""
        if self.ended is None:
            self.ended, self.ended_at = how, trio.current_time()
            self._tell()


class Provider:
    """A scripted provider.

    Attributes:
        calls: The calls received, in order.
    """

    def __init__(self, *scripts: Script) -> None:
        self._scripts = list(scripts) or [says("Hello", "!")]
        self.calls: list[Served] = []
        self._news = trio.Event()

    def __repr__(self) -> str:
        return f"<Provider {self.open_now} open of {len(self.calls)}>"

    def play(self, *scripts: Script) -> None:
        """Replaces the scripts for the following calls."""
        self._scripts = list(scripts)

    @property
    def open_now(self) -> int:
        """How many calls have an open connection or reply."""
        return sum(call.ended is None for call in self.calls)

    @property
    def opened(self) -> int:
        """How many calls were received."""
        return len(self.calls)

    @property
    def closed_at(self) -> list[float]:
        """When the gateway closed calls before the end of their reply."""
        return [call.ended_at for call in self.calls if call.ended == "closed"]

    def begin(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[Served, Script]:
        """Records a call and returns its script."""
        call = Served(method, path, headers, body, self._tell)
        self.calls.append(call)
        self._tell()
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        return call, script

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def wait_until(self, holds: Callable[[Provider], bool]) -> None:
        """Waits until a condition on the provider holds."""
        while not holds(self):
            await self._news.wait()

    def transport(self) -> MemoryTransport:
        """Makes the in-memory transport."""
        return MemoryTransport(self)


# -- in memory --------------------------------------------------------------------------------------------------------


class MemoryTransport(httpx2.AsyncBaseTransport):
    """Plays the script without a socket, with the exceptions that `httpx2.AsyncHTTPTransport` raises."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self.closed = False

    async def aclose(self) -> None:
        self.closed = True

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        assert not self.closed, "a call on a closed transport"
        body = await request.aread()
        call, script = self._provider.begin(request.method, request.url.path, request.headers, body)
        call.target = request.url.raw_path.decode("ascii")
        try:
            await trio.lowlevel.checkpoint()
            for position, step in enumerate(script):
                match step:
                    case Refuse():
                        raise httpx2.ConnectError("All connection attempts failed")
                    case SlowConnect(seconds):
                        await self._connect(seconds, request.extensions["timeout"]["connect"])
                    case Break("fin"):
                        raise httpx2.RemoteProtocolError("Server disconnected without sending a response.")
                    case Break():
                        raise httpx2.ReadError("")
                    case Head(status, content_type, headers):
                        return self._response(call, status, content_type, headers, script[position + 1 :])
                    case Say():
                        return self._response(call, 200, "text/event-stream", {}, script[position:])
                    case _:
                        await _wait(step)
            return self._response(call, 200, "text/event-stream", {}, ())
        except httpx2.TransportError:
            call.end("broken")
            raise
        except BaseException:
            call.end("closed")
            raise

    async def _connect(self, seconds: float, timeout_s: float | None) -> None:
        with trio.move_on_after(math.inf if timeout_s is None else timeout_s) as scope:
            await trio.sleep(seconds)
        if scope.cancelled_caught:
            raise httpx2.ConnectTimeout("")

    def _response(
        self, call: Served, status: int, content_type: str, headers: Mapping[str, str], rest: Script
    ) -> httpx2.Response:
        return httpx2.Response(
            status, headers={"content-type": content_type, **headers}, stream=_MemoryBody(call, rest)
        )


class _MemoryBody(httpx2.AsyncByteStream):
    def __init__(self, call: Served, steps: Script) -> None:
        self._call = call
        self._steps = iter(steps)
        self._reading = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        assert not self._reading, "two tasks read the same reply"
        self._reading = True
        try:
            await trio.lowlevel.checkpoint()
            if self._call.ended is not None:
                raise StopAsyncIteration
            for step in self._steps:
                match step:
                    case Say(data):
                        self._call.take()
                        return data
                    case Break(how):
                        self._call.end("broken")
                        if how == "fin":
                            raise httpx2.RemoteProtocolError(
                                "peer closed connection without sending complete message body (incomplete chunked read)"
                            )
                        raise httpx2.ReadError("")
                    case _:
                        await _wait(step)
            self._call.end("complete")
            raise StopAsyncIteration
        finally:
            self._reading = False

    async def aclose(self) -> None:
        assert not self._reading, "closed by one task while another one reads"
        await (
            trio.lowlevel.checkpoint()
        )  # a close that is cancelled here closes nothing, like a close that first sends a goodbye
        self._call.end("closed")


async def _wait(step: Step) -> None:
    match step:
        case Pause(seconds):
            await trio.sleep(seconds)
        case Stall():
            await trio.sleep_forever()
        case _:
            raise AssertionError(f"{step} is not allowed here")


# -- over a socket ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_socket_provider(*scripts: Script) -> AsyncIterator[tuple[Provider, str]]:
    """Serves a scripted provider on loopback, as raw HTTP/1.1 with chunked replies. Yields it and its base URL."""
    provider = Provider(*scripts)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            partial(trio.serve_tcp, partial(_serve_connection, provider), 0, host="127.0.0.1")
        )
        try:
            yield provider, f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/v1"
        finally:
            nursery.cancel_scope.cancel()


async def _serve_connection(provider: Provider, stream: trio.SocketStream) -> None:
    received = bytearray()
    while (request := await _read_request(stream, received)) is not None:
        call, script = provider.begin(*request)
        call.connection = id(stream)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_watch, stream, call, received, nursery.cancel_scope)
                with contextlib.suppress(trio.BrokenResourceError):
                    await _play(stream, call, script)
                nursery.cancel_scope.cancel()
        finally:
            call.end("closed")
        if call.ended != "complete":
            return


async def _read_request(
    stream: trio.SocketStream, received: bytearray
) -> tuple[str, str, dict[str, str], bytes] | None:
    async def more() -> bool:
        try:
            data = await stream.receive_some()
        except trio.BrokenResourceError:
            return False
        received.extend(data)
        return bool(data)

    while b"\r\n\r\n" not in received:
        if not await more():
            return None
    head, _, rest = bytes(received).partition(b"\r\n\r\n")
    line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
    length = int(headers.get("content-length", "0"))
    received[:] = rest
    while len(received) < length:
        if not await more():
            return None
    body = bytes(received[:length])
    del received[:length]
    method, path, _ = line.split(" ")
    return method, path, headers, body


async def _watch(stream: trio.SocketStream, call: Served, received: bytearray, scope: trio.CancelScope) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while data := await stream.receive_some():
            received.extend(data)  # the next request: the previous reply has just ended
    call.end("closed")
    scope.cancel()


async def _play(stream: trio.SocketStream, call: Served, script: Script) -> None:
    headed = False

    async def say_head(head: Head) -> None:
        lines = [f"HTTP/1.1 {head.status} Scripted", f"content-type: {head.content_type}"]
        lines += [f"{name}: {value}" for name, value in head.headers.items()]
        if "content-length" not in head.headers:
            lines.append("transfer-encoding: chunked")
        await stream.send_all("\r\n".join([*lines, "", ""]).encode())

    framed = True
    for step in script:
        match step:
            case Head():
                framed = "content-length" not in step.headers
                headed = True
                await say_head(step)
            case Say(data):
                if not headed:
                    headed = True
                    await say_head(Head())
                call.take()
                await stream.send_all(b"%x\r\n%s\r\n" % (len(data), data) if framed else data)
            case Break(how):
                call.end("broken")
                if how == "rst":
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await stream.aclose()
                return
            case _:
                await _wait(step)
    if not headed:
        await say_head(Head())
    call.end("complete")  # before the last bytes, since the reader may check at once
    if framed:
        await stream.send_all(b"0\r\n\r\n")
