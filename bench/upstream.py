"""The mock upstream: a server whose answers and timing are set by each call, in three formats (`wire`).

``python -m bench.upstream`` serves on the loopback interface until its standard input ends. Its first line of output is
``{"port": N}``; from then on it answers each line of input, ``stats`` or ``reset``, with one line of JSON.

A directive in the text of a call's message sets its answer, since every gateway passes messages on unchanged::

    @bench{n=100 i=20 f=5 d=0 b=24 id=7}

    n   content events of a stream                  32
    i   milliseconds between two of them            0 = as fast as the connection accepts them
    f   milliseconds before the first               0
    d   milliseconds before a plain answer          0
    b   bytes of content in an event or an answer   24
    id  a name for the stream in ``closes``

The content of an event begins with ``@`` and the monotonic clock in nanoseconds, as 16 hexadecimal digits, read just
before the event is sent, so that a reader on the same machine can compute how long it took.

It is one loop over non-blocking sockets with prepared answers; llhttp parses the requests. An event costs it 6 to
10 microseconds, most of them in ``send``. A stream that is late stays on its schedule and catches up, and how late
events were is in the statistics: if that is more than about a millisecond, this program is the slow part.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from functools import cache

import attrs
import httptools

from bench.readiness import READ, WRITE, Poller, raise_descriptor_limit
from bench.wire import FORMATS, MODELS, format_of, reply

MAX_EVENTS_PER_TURN = 256
"""The time between two polls of the sockets, so that a flood of due events does not hide a disconnect."""

_DIRECTIVE = re.compile(rb"@bench\{([^}]{0,200})\}")
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_USAGE = re.compile(rb'"include_usage"\s*:\s*true')


@attrs.frozen(kw_only=True)
class Script:
    """The parameters of a call's directive, by name."""

    events: int = 32
    interval_ns: int = 0
    first_ns: int = 0
    answer_ns: int = 0
    content_bytes: int = 24
    key: str = ""

    @classmethod
    def read(cls, body: bytes) -> Script:
        """Reads the directive in a request's body.

        >>> Script.read(b'{"messages": [{"content": "@bench{n=3 i=0.5 id=x}"}]}').interval_ns
        500000
        """
        found = _DIRECTIVE.search(body)
        return _script(found[1]) if found else _NOTHING_ASKED


@cache  # an id makes a directive unique, so the streams of a run bound this cache, at some hundred bytes each
def _script(directive: bytes) -> Script:
    given = dict(part.split("=", 1) for part in directive.decode("ascii", "replace").split() if "=" in part)
    return Script(
        events=int(given.get("n", 32)),
        interval_ns=int(float(given.get("i", 0)) * 1e6),
        first_ns=int(float(given.get("f", 0)) * 1e6),
        answer_ns=int(float(given.get("d", 0)) * 1e6),
        content_bytes=int(given.get("b", 24)),
        key=given.get("id", ""),
    )


_NOTHING_ASKED = Script()


def directive(
    *,
    events: int = 32,
    interval_ms: float = 0,
    first_ms: float = 0,
    answer_ms: float = 0,
    content_bytes: int = 24,
) -> str:
    """Returns the text that asks for it, without an id.

    >>> directive(events=3, interval_ms=0.5)
    '@bench{n=3 i=0.5 f=0 d=0 b=24}'
    """
    return f"@bench{{n={events} i={interval_ms:g} f={first_ms:g} d={answer_ms:g} b={content_bytes}}}"


_CHAT = FORMATS[b"/chat/completions"]


class Connection:
    """A connection from a gateway, with the current request and its answer."""

    __slots__ = (
        "after",
        "before",
        "blocked",
        "body",
        "close_after",
        "fd",
        "format",
        "parser",
        "script",
        "sent_events",
        "server",
        "sock",
        "streaming",
        "tail",
        "url",
        "waiting",
    )

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.fd = sock.fileno()
        self.parser = httptools.HttpRequestParser(self)
        self.body = b""
        self.url = b""
        self.script = _NOTHING_ASKED
        self.waiting = False
        """A call is being answered."""
        self.streaming = False
        self.close_after = False
        self.blocked = bytearray()
        """What the peer's full window has kept back."""
        self.sent_events = 0
        self.before = self.after = self.tail = b""
        self.format = _CHAT

    # called by llhttp

    def on_message_begin(self) -> None:
        """A request begins."""
        self.body = self.url = b""

    def on_url(self, url: bytes) -> None:
        """Receives a part of the request target."""
        self.url += url

    def on_body(self, data: bytes) -> None:
        """Receives a part of the body."""
        self.body = self.body + data if self.body else data

    def on_message_complete(self) -> None:
        """The request is complete."""
        self.close_after = not self.parser.should_keep_alive()
        self.server.on_request(self)


class Server:
    """The event loop. All its counters are in `statistics`."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._poller = Poller()
        self._connections: dict[int, Connection] = {}
        self._due: list[tuple[int, int, Connection]] = []
        """When each stream's next event, or a delayed answer, is due; the second number only breaks ties."""
        self._ties = 0
        self._reset()

    def _reset(self) -> None:
        self._requests = self._streams = self._completed = self._aborted = self._events = 0
        self._active = sum(connection.streaming for connection in self._connections.values())
        self._most_active = self._active
        self._late_ns = self._latest_ns = 0
        self._closes: list[tuple[str, int]] = []
        self._cpu_before_s = time.process_time()

    def statistics(self) -> Mapping[str, object]:
        """The counters since the start, or since ``reset``. ``closes``: (id, monotonic ns) of each aborted stream."""
        return {
            "connections": len(self._connections),
            "requests": self._requests,
            "streams": self._streams,
            "active": self._active,
            "most_active": self._most_active,
            "completed": self._completed,
            "aborted": self._aborted,
            "events": self._events,
            "late_mean_us": self._late_ns / self._events / 1e3 if self._events else 0.0,
            "late_max_us": self._latest_ns / 1e3,
            "closes": self._closes,
            "cpu_s": time.process_time() - self._cpu_before_s,
            "now_ns": time.monotonic_ns(),
        }

    def serve(self, control_fd: int) -> None:
        """Serves until the control input ends."""
        self._poller.add(self._listener.fileno(), READ)
        self._poller.add(control_fd, READ)
        listener_fd = self._listener.fileno()
        connections = self._connections
        commands = b""
        while True:
            timeout_s = None if not self._due else max(0, self._due[0][0] - time.monotonic_ns()) / 1e9
            for fd, mask in self._poller.wait(timeout_s):
                connection = connections.get(fd)
                if connection is not None:
                    if mask & WRITE:
                        self._flush(connection)
                    if mask & ~WRITE and fd in connections:
                        self._read(connection)
                elif fd == listener_fd:
                    self._accept()
                elif fd == control_fd:
                    data = os.read(control_fd, 4096)
                    if not data:
                        return
                    *lines, commands = (commands + data).split(b"\n")
                    for line in lines:
                        self._command(line)
            if self._due:
                self._send_due()

    def _command(self, line: bytes) -> None:
        if line == b"reset":
            self._reset()
        print(json.dumps(self.statistics()), flush=True)

    def _accept(self) -> None:
        for _ in range(64):
            try:
                sock, _address = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(self, sock)
            self._connections[connection.fd] = connection
            self._poller.add(connection.fd, READ)

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(connection)
            return
        try:
            connection.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # an upgrade to HTTP/2 is not accepted; llhttp stops there, after the complete request
            connection.parser = httptools.HttpRequestParser(connection)
        except httptools.HttpParserError:
            self._close(connection)

    def on_request(self, connection: Connection) -> None:
        """Begins to answer."""
        if connection.waiting:  # gateways do not pipeline calls
            self._close(connection)
            return
        self._requests += 1
        form = format_of(connection.url)
        if form is None:
            if connection.url == b"/stats":
                self._send(connection, reply(json.dumps(self.statistics()).encode()))
            elif connection.url.endswith(b"/models"):
                self._send(connection, MODELS)
            else:
                self._send(connection, reply(b"{}"))
            self._end(connection)
            return
        connection.format = form
        script = connection.script = Script.read(connection.body)
        connection.waiting = True
        now = time.monotonic_ns()
        if _STREAM.search(connection.body):
            connection.streaming = True
            connection.sent_events = 0
            connection.before, connection.after = form.content(script.content_bytes)
            connection.tail = form.end(script.events, usage=_USAGE.search(connection.body) is not None)
            self._streams += 1
            self._active += 1
            self._most_active = max(self._most_active, self._active)
            self._push(connection, now + script.first_ns)
        elif script.answer_ns:
            self._push(connection, now + script.answer_ns)
        else:
            self._answer(connection)

    def _push(self, connection: Connection, due_ns: int) -> None:
        self._ties += 1
        heapq.heappush(self._due, (due_ns, self._ties, connection))

    def _answer(self, connection: Connection) -> None:
        self._send(connection, connection.format.answer(connection.script.content_bytes))
        self._end(connection)

    def _send_due(self) -> None:
        """Sends the events that are due, up to a limit."""
        due, pop, replace, clock = self._due, heapq.heappop, heapq.heapreplace, time.monotonic_ns
        for _ in range(MAX_EVENTS_PER_TURN):
            if not due:
                return
            due_ns, tie, connection = due[0]
            now = clock()
            if due_ns > now:
                return
            if connection.fd < 0:  # it was closed meanwhile
                pop(due)
                continue
            if not connection.streaming:
                pop(due)
                self._answer(connection)
                continue
            script = connection.script
            if connection.sent_events >= script.events:
                pop(due)
                connection.streaming = False
                self._active -= 1
                self._completed += 1
                self._send(connection, connection.tail)
                self._end(connection)
                continue
            data = b"%b%016x%b" % (connection.before, now, connection.after)
            if not connection.sent_events:
                data = connection.format.begin + data
            connection.sent_events += 1
            self._events += 1
            late = now - due_ns
            self._late_ns += late
            if late > self._latest_ns:
                self._latest_ns = late
            # without an interval there is no schedule to be late for
            next_ns = due_ns + script.interval_ns if script.interval_ns else now
            try:
                sent = connection.sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                pop(due)
                self._close(connection)
                continue
            if sent < len(data):
                pop(due)
                connection.blocked += data[sent:]
                self._poller.change(connection.fd, READ | WRITE)
            else:
                replace(due, (next_ns, tie, connection))

    def _send(self, connection: Connection, data: bytes) -> None:
        if connection.fd < 0:
            return
        if not connection.blocked:
            try:
                data = data[connection.sock.send(data) :]
            except BlockingIOError:
                pass
            except OSError:
                self._close(connection)
                return
            if not data:
                return
            self._poller.change(connection.fd, READ | WRITE)
        connection.blocked += data

    def _flush(self, connection: Connection) -> None:
        try:
            sent = connection.sock.send(connection.blocked)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)
            return
        del connection.blocked[:sent]
        if not connection.blocked:
            self._poller.change(connection.fd, READ)
            if connection.streaming:
                self._push(connection, time.monotonic_ns())
            elif connection.close_after and not connection.waiting:
                self._close(connection)

    def _end(self, connection: Connection) -> None:
        connection.waiting = False
        if connection.close_after and not connection.blocked:
            self._close(connection)

    def _close(self, connection: Connection) -> None:
        if connection.fd < 0:
            return
        if connection.streaming:
            self._active -= 1
            self._aborted += 1
            self._closes.append((connection.script.key, time.monotonic_ns()))
        connection.streaming = False
        self._poller.remove(connection.fd)
        del self._connections[connection.fd]
        connection.sock.close()
        connection.fd = -1


def listen(port: int, *, shared: bool = False) -> socket.socket:
    """Listens on the loopback interface; ``shared``: together with other processes on the same port."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(4096)
    listener.setblocking(False)
    return listener


def main() -> None:
    """Serves until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m bench.upstream", description="A mock upstream on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=0, help="default: one that is free")
    parser.add_argument("--shared", action="store_true", help="several processes on one port")
    options = parser.parse_args()
    raise_descriptor_limit()
    listener = listen(options.port, shared=options.shared)
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    Server(listener).serve(sys.stdin.fileno())


if __name__ == "__main__":
    main()
