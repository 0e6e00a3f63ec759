"""The relay engine: one task moves the events of all streams whose two ends are plain sockets.

An exchange whose answer has begun, and whose upstream and client are both sockets without TLS, hands the two over and
sleeps (`Stream.carry`). From then on the `Poller`'s task does for each piece what the plain loop of `exchange` does in
a task of its own: receive, unframe (`framing`), find whole events (`wire.StreamReader`), send. That is a few function
calls a piece, and no task is woken for it.

**The exchange still owns everything.** It sleeps in `trio.lowlevel.wait_task_rescheduled`, whose abort function takes
the two sockets out of the poller. So a cancellation, at whatever moment, finds both ends with the task, and not a trace
of them here. The rules:

- A client that does not take a frame at once parks the stream: its upstream is not read until the rest is out. So what
  is held for a stream is one piece.
- A frame that is begun goes out whole, also when the stream is cut: what is left of it is its owner's to send
  (`Owner.owe`), before anything else.
- What happens on a stream ends that stream: errors are told to its exchange, defects are raised in it, and nothing is
  raised into the poller.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

import httpx2
import outcome
import trio

from trigate.concurrency.poller import READABLE, WRITABLE, Poller
from trigate.openai.stream import StreamReader
from trigate.upstream.response_parser import Framing

# One event is some hundred bytes; what arrived together is moved together. The kernel gives what is there, and CPython
# shrinks the buffer: the size costs nothing here.
_RECEIVE_BYTES = 64 * 1024


class Owner(Protocol):
    """The exchange, as far as the engine knows it: where its limits in time are measured, and what it sends next."""

    def note_relayed(self, now: float, sent_bytes: int) -> None:
        """Something came, and so much of it was for the client."""

    def note_parked(self, since: float | None) -> None:
        """Since when a frame has been waiting for the client to read anything; None = none is waiting."""

    def owe(self, rest: bytes) -> None:
        """These bytes are what is left of a frame that was begun: they go out before anything else."""


class Relay:
    """The engine. Made by `gateway`."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self.streams = 0
        """How many it has now."""

    def __repr__(self) -> str:
        return f"<Relay of {self.streams} streams>"

    def stream(
        self, framing: Framing, upstream: socket.socket, client: socket.socket, *, chunked: bool, reader: StreamReader
    ) -> Stream:
        """Makes a stream of two plain, non-blocking sockets, both of them their owner's.

        Args:
            framing: What the upstream's bytes are fed to. It has no pieces.
            chunked: How the client's body is framed.
            reader: Has seen the first content.
        """
        return Stream(self, framing, upstream, client, chunked=chunked, reader=reader)


class Stream:
    """The two ends of a stream, while the engine has them.

    Attributes:
        failure: How the upstream broke, or what of its framing is wrong.
    """

    __slots__ = (
        "_carrying",
        "_chunked",
        "_client",
        "_client_fd",
        "_framing",
        "_owner",
        "_parked",
        "_poller",
        "_reader",
        "_relay",
        "_rest",
        "_task",
        "_upstream",
        "_upstream_fd",
        "failure",
    )

    def __init__(
        self,
        relay: Relay,
        framing: Framing,
        upstream: socket.socket,
        client: socket.socket,
        *,
        chunked: bool,
        reader: StreamReader,
    ) -> None:
        self._relay = relay
        self._poller = relay._poller
        self._framing = framing
        self._upstream = upstream
        self._upstream_fd = upstream.fileno()
        self._client = client
        self._client_fd = client.fileno()
        self._chunked = chunked
        self._reader = reader
        self._carrying = False
        self._parked = False
        self._rest = b""
        self.failure: httpx2.TransportError | None = None
        self._owner: Owner
        self._task: trio.lowlevel.Task

    async def carry(self, owner: Owner) -> None:
        """Sleeps while the engine carries the stream; returns when the reader is complete or has an error, or the
        upstream's body has ended, or there is a `failure`.

        **Cancels:** at any moment; the engine then has no trace of it.
        """
        self._owner = owner
        self._task = trio.lowlevel.current_task()
        self._poller.add(self._upstream_fd, READABLE, self._on_readable)
        self._carrying = True
        self._relay.streams += 1

        def abort(_: Callable[[], BaseException]) -> trio.lowlevel.Abort:
            self.drop()
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def drop(self) -> bool:
        """Lets go of both ends; the owner sleeps on until it is cancelled. Says whether the engine had them."""
        if not self._carrying:
            return False
        self._let_go()
        return True

    def hand_back(self) -> None:
        """Lets go of both ends, and wakes the owner, who goes on by himself."""
        if self.drop():
            trio.lowlevel.reschedule(self._task)

    def inject(self, data: bytes) -> None:
        """Sends something of the gateway's own between two events, unless the client does not read anyway, or the
        stream has just ended: its owner may have to send the rest of a frame first."""
        if self._carrying and not self._parked:
            self._send(self._framed(data))
            if self._rest:
                self._park()

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def _on_readable(self, _: int) -> None:
        try:
            ended = self._move()
        except Exception as error:
            self._let_go()
            trio.lowlevel.reschedule(self._task, outcome.Error(error))
        else:
            if ended:
                self._let_go()
                trio.lowlevel.reschedule(self._task)
            elif self._rest:
                self._park()

    def _move(self) -> bool:
        """Takes what is there from the upstream to the client; says whether the stream is to end."""
        framing, reader = self._framing, self._reader
        try:
            data = self._upstream.recv(_RECEIVE_BYTES)
            if data:
                framing.feed(data)
            else:
                framing.feed_eof()
        except BlockingIOError:
            return False
        except OSError as error:
            self.failure = httpx2.ReadError(error.strerror or str(error))
        except httpx2.TransportError as error:
            self.failure = error
        sent_bytes = 0
        pieces = framing.pieces
        if pieces:  # also where something is wrong with what came behind them
            data = reader.feed(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            pieces.clear()
            if data:
                sent_bytes = len(data)
                self._send(b"%x\r\n%b\r\n" % (sent_bytes, data) if self._chunked else data)
        self._owner.note_relayed(self._poller.now, sent_bytes)
        return framing.complete or reader.complete or reader.error is not None or self.failure is not None

    def _send(self, frame: bytes) -> None:
        try:
            sent = self._client.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # the client is gone: whoever watches it is told, and cancels
        if sent < len(frame):
            self._rest = frame[sent:]

    def _park(self) -> None:
        self._parked = True
        self._poller.remove(self._upstream_fd)
        self._poller.add(self._client_fd, WRITABLE, self._on_writable)
        self._owner.note_parked(trio.current_time())

    def _on_writable(self, _: int) -> None:
        rest, self._rest = self._rest, b""
        self._send(rest)
        if not self._rest:
            self._parked = False
            self._poller.remove(self._client_fd)
            self._poller.add(self._upstream_fd, READABLE, self._on_readable)
            self._owner.note_parked(None)
        elif len(self._rest) < len(rest):
            self._owner.note_parked(trio.current_time())  # it reads, if slowly

    def _let_go(self) -> None:
        self._carrying = False
        self._relay.streams -= 1
        if self._parked:
            self._parked = False
            self._poller.remove(self._client_fd)
            self._owner.note_parked(None)
        else:
            self._poller.remove(self._upstream_fd)
        if self._rest:
            self._owner.owe(self._rest)
