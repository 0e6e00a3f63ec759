"""The destination of an upstream call's answer. An upstream call knows its client only as a `Sink`."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from trigate.errors import Header
from trigate.ledger.content import AnswerContent
from trigate.openai.answer import Usage


class PlainSocket(Protocol):
    """A client's socket to which body bytes may be written directly (`socket_relay`)."""

    @property
    def socket(self) -> socket.socket | None:
        """Non-blocking; nothing is encrypted on it."""

    @property
    def chunked(self) -> bool:
        """Whether the body is framed by ``Transfer-Encoding: chunked``."""

    def note_sent(self, now: float) -> None:
        """Bytes of the body were written to the socket."""

    def note_blocked(self, since: float | None) -> None:
        """Since when a frame has been waiting for the client to read (Trio time); None = none is waiting."""

    def queue_partial(self, rest: bytes) -> None:
        """Takes the rest of a frame that was written in part; it goes out before anything else."""


class Sink(Protocol):
    """Takes one answer: its head, its body, its end."""

    @property
    def plain_socket(self) -> PlainSocket | None:
        """The client's socket, if whole events may be written to it directly; None = not now."""

    async def start(self, status: int, headers: list[Header]) -> None:
        """Takes the head of the answer. For a streamed answer this is COMMIT: the status line goes out. An answer that
        continues another attempt's answer has no head of its own: a second ``start`` does nothing."""

    async def send(self, data: bytes) -> None:
        """Takes a piece of the body; of a stream, whole events. Waits while the sink is full."""

    async def end(self, data: bytes = b"") -> None:
        """Takes the last piece: the answer is complete.

        Raises:
            GatewayError: The answer cannot be stored (`RecordingSink`).
        """


class ClientSocket(Protocol):
    """The client's end.

    Attributes:
        subprotocols: Those that it offers.
        subprotocol: The one that is chosen; set before the handshake is accepted.
        sends_text: Whether the next piece that is sent is a text, and not bytes.
        close_code, close_reason: With which the client has closed; or, once the upstream has, with which it is closed.
    """

    subprotocols: Sequence[str]
    subprotocol: str | None
    sends_text: bool
    close_code: int
    close_reason: str

    async def receive_message(self) -> str | bytes | None:
        """Returns the next message; None = the client has closed the WebSocket."""


class NotingSink:
    """Passes an answer on, and shows its beginning to a function until that has found what it looks for.

    Until then, a stream is not relayed from socket to socket.
    """

    def __init__(self, sink: Sink, note: Callable[[bytes], bool]) -> None:
        self._sink = sink
        self._note = note
        self._is_done = False

    @property
    def plain_socket(self) -> PlainSocket | None:
        return self._sink.plain_socket if self._is_done else None

    async def start(self, status: int, headers: list[Header]) -> None:
        await self._sink.start(status, headers)

    async def send(self, data: bytes) -> None:
        self._is_done = self._is_done or self._note(data)
        await self._sink.send(data)

    async def end(self, data: bytes = b"") -> None:
        self._is_done = self._is_done or self._note(data)
        await self._sink.end(data)


class ContentSink:
    """Passes an answer on, and notes it for the log of contents. So a stream is not relayed from socket to socket."""

    plain_socket = None

    def __init__(self, sink: Sink, content: AnswerContent) -> None:
        self._sink = sink
        self._content = content

    async def start(self, status: int, headers: list[Header]) -> None:
        await self._sink.start(status, headers)

    async def send(self, data: bytes) -> None:
        self._content.add(data)
        await self._sink.send(data)

    async def end(self, data: bytes = b"") -> None:
        self._content.add(data)
        await self._sink.end(data)


class Recorder(Protocol):
    """Stores an answer: in a session, or as the result of a run."""

    def feed(self, frames: bytes) -> None:
        """Takes whole events of a streamed answer, as they are about to go to the client."""

    def feed_answer(self, body: bytes) -> None:
        """Takes a JSON answer, before it goes to the client."""

    async def complete(self, usage: Usage | None) -> None:
        """The answer is complete, and is about to be acknowledged.

        Raises:
            GatewayError: It cannot be stored; the client gets this error instead of the end of its answer.
        """


class RecordingSink:
    """Passes an answer to a recorder, and then to another sink, if there is one.

    A recorded stream is not relayed from socket to socket: the recorder reads each event.

    Args:
        is_stream: Whether the answer consists of server-sent events.
        usage: Gives the token counts of the answer, as far as they have been reported.
    """

    plain_socket = None

    def __init__(
        self, recorder: Recorder, sink: Sink | None, *, is_stream: bool, usage: Callable[[], Usage | None]
    ) -> None:
        self._recorder = recorder
        self._sink = sink
        self._is_stream = is_stream
        self._usage = usage

    def _record(self, data: bytes) -> None:
        if self._is_stream:
            self._recorder.feed(data)
        else:
            self._recorder.feed_answer(data)

    async def start(self, status: int, headers: list[Header]) -> None:
        if self._sink is not None:
            await self._sink.start(status, headers)

    async def send(self, data: bytes) -> None:
        self._record(data)
        if self._sink is not None:
            await self._sink.send(data)

    async def end(self, data: bytes = b"") -> None:
        if data:
            self._record(data)
        await self._recorder.complete(self._usage())
        if self._sink is not None:
            await self._sink.end(data)
