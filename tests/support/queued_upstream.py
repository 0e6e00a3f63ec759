"""An upstream that answers the calls of an agent one after the other, and keeps each call as it came.

It runs on a thread, for clients in other processes. `scripted_upstream` chooses its script by the model id; here the
test gives the answers, in any format, and may look at the bytes of each call. `open_tap`, before the gateway, keeps
what the agent sent.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import attrs
import msgspec

PAUSE_S = 0.05


@attrs.frozen
class Call:
    """A call that reached the upstream. The names of ``headers`` are in lower case."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        """The decoded body."""
        value: dict[str, Any] = msgspec.json.decode(self.body)
        return value


@attrs.frozen
class Answer:
    """An answer.

    Attributes:
        pieces: Of the body; there is a pause of `PAUSE_S` between two of them.
        is_cut: The connection is closed before the body is complete.
    """

    pieces: tuple[bytes, ...]
    status: int = 200
    headers: Mapping[str, str] = attrs.field(factory=dict)
    is_cut: bool = False


def stream(*pieces: bytes, is_cut: bool = False) -> Answer:
    """An answer of server-sent events."""
    return Answer(pieces, headers={"content-type": "text/event-stream"}, is_cut=is_cut)


def error(status: int, value: object, **headers: str) -> Answer:
    """An error with a JSON body."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer((msgspec.json.encode(value),), status, {"content-type": "application/json", **named})


class QueuedUpstream:
    """The far end.

    Attributes:
        url: Without ``/v1``.
        calls: The POST requests so far.
        answers: What the next calls get; the last one is given again and again.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.calls: list[Call] = []
        self.answers: list[Answer] = []
        self.lock = threading.Lock()

    def play(self, *answers: Answer) -> None:
        """Forgets the calls so far, and answers the next ones with these."""
        with self.lock:
            self.calls, self.answers = [], list(answers)

    def take(self, call: Call) -> Answer:
        """Notes a call; returns its answer."""
        with self.lock:
            self.calls.append(call)
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = self.server.upstream.take(Call(self.path, headers, body))
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(sum(map(len, answer.pieces)) + answer.is_cut))
        self.end_headers()
        for at, piece in enumerate(answer.pieces):
            if at:
                time.sleep(PAUSE_S)
            self.wfile.write(piece)
        if answer.is_cut:
            self.close_connection = True


class _Tap(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _forward(self) -> None:
        tap = self.server.upstream
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        if self.command == "POST":
            tap.calls.append(Call(self.path, headers, body))
        there = http.client.HTTPConnection(tap.url.removeprefix("http://"))
        with contextlib.closing(there):
            there.request(self.command, self.path, body or None, dict(self.headers.items()))
            answer = there.getresponse()
            data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_POST = do_GET = do_HEAD = _forward


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    upstream: QueuedUpstream

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # the gateway closed the connection


@contextlib.contextmanager
def open_queued_upstream() -> Iterator[QueuedUpstream]:
    """Serves until the end of the block."""
    with _serve(_Handler) as server:
        server.upstream = QueuedUpstream(f"http://127.0.0.1:{server.server_port}")
        yield server.upstream


@contextlib.contextmanager
def open_tap(url: str) -> Iterator[tuple[str, list[Call]]]:
    """Passes requests on to a server until the end of the block; yields its own URL, and the list of POST requests."""
    with _serve(_Tap) as server:
        server.upstream = QueuedUpstream(url)
        yield f"http://127.0.0.1:{server.server_port}", server.upstream.calls


@contextlib.contextmanager
def _serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[_Server]:
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
