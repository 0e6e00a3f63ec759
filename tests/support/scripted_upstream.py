"""A scripted OpenAI-compatible upstream for clients of any kind: the synchronous SDK, another interpreter, Node.

It runs on a thread, and the *model id* of a call selects its script. The part of the id after the first dot only
separates the records of two tests: ``endless.a1`` and ``endless.b2`` select the same script.

====================  ==================================================================================================
``hello``             sends `TEXT`, in one piece or word by word
``tools``             asks for a tool; once a tool's result is in the messages, sends it
``shell``             as ``tools``, with the tool by which an agent runs a command (`SHELLS`): it runs `COMMAND`
``endless``           streams a word every 5 ms, for ever
``silent``            reads the call and sends nothing
``cut``, ``reset``    streams two words, then closes the connection, or resets it
``short``             streams two words, then ends the reply properly, but without ``[DONE]``
``overflow``          refuses, since the request is too long
``status-N``          refuses with that status and `REFUSAL`; 429 with ``retry-after: 7``
====================  ==================================================================================================

``GET /seen/MODEL`` returns what reached a model: ``hits``, the ``bodies`` as text, ``open`` (calls that are being
served) and ``closed_at`` (POSIX time at which the gateway last closed a connection, or null).

`provider` scripts the same far end step by step on Trio. This one is for clients that do not run on Trio. It uses the
standard library only: `sdk_scenarios` imports it in environments without this project's dependencies.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import select
import socket
import struct
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from bench import events

MODELS = ("hello", "org/deep/model", "tools", "endless")
# Careless readers of server-sent events take U+2028 and U+0085 for line ends. Both may appear raw in JSON.
WORDS = ("Grüße,", " liebe", "\u2028Welt", " 🌍\u0085!")
TEXT = "".join(WORDS)
REFUSAL = {"error": {"message": "said the upstream", "type": "some_type", "param": "p", "code": "some_code"}}
USAGE = events.tokens(7, 4)
SPEECH = bytes(range(256)) * 300
IMAGE = base64.b64encode(b"not really a picture").decode()
EMBEDDING = (0.25, -1.5, 3.0)
TOOL_ARGUMENTS = '{"city": "Köln"}'
COMMAND = "echo from-the-tool"
SHELLS = {"exec_command": "cmd", "Bash": "command", "run_shell_command": "command"}
"""The tools of agents that run a command, with the argument that it is."""
OVERFLOW = {
    "error": {
        "message": "This model's maximum context length is 1000 tokens. However, you requested 2000 tokens.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": None,
    }
}


@dataclasses.dataclass
class Seen:
    """The calls that reached one model id."""

    hits: int = 0
    bodies: list[str] = dataclasses.field(default_factory=list)
    open: int = 0
    closed_at: float | None = None


class _Gone(Exception):
    """The gateway closed the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/seen/"):
            self._json(dataclasses.asdict(self.server.seen_of(self.path.removeprefix("/seen/"))))
        elif self.path == "/v1/models":
            rows = [{"id": model, "object": "model", "created": 1, "owned_by": "them"} for model in MODELS]
            self._json({"object": "list", "data": rows})
        else:
            self._json(REFUSAL, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        call = json.loads(body)
        with self.server.lock:
            seen = self.server.seen.setdefault(call["model"], Seen())
            seen.hits += 1
            seen.open += 1
            seen.bodies.append(body)
        try:
            self._play(call)
        except (_Gone, OSError):
            seen.closed_at = time.time()
            self.close_connection = True
        finally:
            with self.server.lock:
                seen.open -= 1

    # -- the parts

    def _play(self, call: dict[str, Any]) -> None:
        part = call["model"].partition(".")[0]
        if part.startswith("status-"):
            self._json(REFUSAL, int(part.removeprefix("status-")))
        elif part == "overflow":
            self._json(OVERFLOW, 400)
        elif part == "silent":
            self._wait_gone(60.0)
        elif self.path != "/v1/chat/completions":
            self._other_endpoint(call)
        elif call.get("stream"):
            self._chat_stream(call, part)
        else:
            answer = _answer(_message(call, part))
            self._json(events.completion(answer, USAGE, model=call["model"], x_unknown={"kept": [1.0, 1e2]}))

    def _chat_stream(self, call: dict[str, Any], part: str) -> None:
        chunk = partial(events.chunk, model=call["model"])
        self._start_stream()
        self._event(chunk({"role": "assistant", "content": ""}))
        if part == "endless":
            while True:
                self._event(chunk({"content": "word "}))
                self._wait_gone(0.005)
        message = _message(call, part)
        if message.get("tool_calls"):
            [tool] = message["tool_calls"]
            arguments = tool["function"]["arguments"]
            deltas: list[dict[str, Any]]
            deltas = [{"tool_calls": [{"index": 0, **tool, "function": {**tool["function"], "arguments": ""}}]}]
            deltas += [
                {"tool_calls": [{"index": 0, "function": {"arguments": arguments[at : at + 4]}}]}
                for at in range(0, len(arguments), 4)
            ]
            finish = "tool_calls"
        else:
            words = WORDS if message["content"] == TEXT else (message["content"],)
            deltas = [{"content": word} for word in words]
            finish = "stop"
        if part in ("cut", "reset", "short"):
            for delta in deltas[:2]:
                self._event(chunk(delta))
            time.sleep(0.05)  # a reset must not overtake the words
            if part == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            if part == "short":
                self._end_stream()
            self.close_connection = part != "short"
            return
        for delta in deltas:
            self._event(chunk(delta))
        self._event(chunk({}, finish))
        if (call.get("stream_options") or {}).get("include_usage"):
            self._event(events.usage_chunk(USAGE, model=call["model"]))
        self._event("[DONE]")
        self._end_stream()

    def _other_endpoint(self, call: dict[str, Any]) -> None:
        model = call["model"]
        if self.path == "/v1/audio/speech":
            self._bytes(SPEECH, "audio/mpeg")
        elif self.path == "/v1/images/generations":
            self._json({"created": 1, "data": [{"b64_json": IMAGE}]})
        elif self.path == "/v1/moderations":
            self._json({"id": "modr-1", "model": model, "results": [{"flagged": True}]})
        elif self.path == "/v1/embeddings":
            encoded = base64.b64encode(struct.pack(f"<{len(EMBEDDING)}f", *EMBEDDING)).decode()
            vector = encoded if call.get("encoding_format") == "base64" else EMBEDDING
            row = {"object": "embedding", "index": 0, "embedding": vector}
            self._json({"object": "list", "model": model, "data": [row], "usage": USAGE})
        elif self.path == "/v1/completions":
            head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": model}
            if not call.get("stream"):
                choice = {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
                self._json({**head, "choices": [choice], "usage": USAGE})
                return
            self._start_stream()
            for word in WORDS:
                self._event({**head, "choices": [{"index": 0, "text": word, "finish_reason": None}]})
            self._event({**head, "choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
            self._event("[DONE]")
            self._end_stream()
        else:
            self._responses(call)

    def _responses(self, call: dict[str, Any]) -> None:
        content = [{"type": "output_text", "text": TEXT, "annotations": []}]
        answer = {
            "id": "resp-1",
            "object": "response",
            "created_at": 1,
            "status": "completed",
            "model": call["model"],
            "output": [
                {"type": "message", "id": "msg-1", "status": "completed", "role": "assistant", "content": content}
            ],
            "usage": {"input_tokens": 7, "output_tokens": 4, "total_tokens": 11},
        }
        if not call.get("stream"):
            self._json(answer)
            return
        self._start_stream()
        started = {**answer, "status": "in_progress", "output": [], "usage": None}
        self._event({"type": "response.created", "sequence_number": 0, "response": started}, "response.created")
        for number, word in enumerate(WORDS, 1):
            delta = {"item_id": "msg-1", "output_index": 0, "content_index": 0, "delta": word}
            kind = "response.output_text.delta"
            self._event({"type": kind, "sequence_number": number, **delta}, kind)
        self._event({"type": "response.completed", "sequence_number": 9, "response": answer}, "response.completed")
        self._end_stream()

    # -- the wire

    def _json(self, value: object, status: int = 200) -> None:
        self._bytes(json.dumps(value, ensure_ascii=False).encode(), "application/json", status)

    def _bytes(self, body: bytes, content_type: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        if status == 429:
            self.send_header("retry-after", "7")
        self.end_headers()
        self.wfile.write(body)

    def _start_stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def _event(self, value: object, kind: str = "") -> None:
        data = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        event = (f"event: {kind}\n" if kind else "") + f"data: {data}\n\n"
        piece = event.encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def _end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def _wait_gone(self, at_most_s: float) -> None:
        readable, _, _ = select.select([self.connection], [], [], at_most_s)
        if readable:
            raise _Gone  # clients do not pipeline here, so readable means the end of the connection


def _answer(message: dict[str, Any]) -> dict[str, Any]:
    return events.choice(
        logprobs=None, message=message, finish_reason="tool_calls" if "tool_calls" in message else "stop"
    )


def _message(call: dict[str, Any], part: str) -> dict[str, Any]:
    if part not in ("tools", "shell"):
        return {"role": "assistant", "content": TEXT}
    last = call["messages"][-1]
    if last["role"] == "tool":
        return {"role": "assistant", "content": f"{last['tool_call_id']} says {last['content']}"}
    names = [tool["function"]["name"] for tool in call["tools"]]
    function = {"name": names[0], "arguments": TOOL_ARGUMENTS}
    if part == "shell":
        name = next(name for name in names if name in SHELLS)
        function = {"name": name, "arguments": json.dumps({SHELLS[name]: COMMAND})}
    tool = {"id": "call-1", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [tool]}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.seen: dict[str, Seen] = {}

    def seen_of(self, model: str) -> Seen:
        return self.seen.get(model, Seen())

    def handle_error(self, request: object, client_address: object) -> None:
        # The gateway may close an idle connection. Every other error is reported.
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextlib.contextmanager
def open_upstream() -> Iterator[str]:
    """Serves the provider of this module's docstring on a free port and yields its URL, without ``/v1``."""
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def seen(upstream: str, model: str) -> dict[str, Any]:
    """The record of a model of `open_upstream`."""
    with urllib.request.urlopen(f"{upstream}/seen/{model}", timeout=5) as response:
        return json.load(response)  # type: ignore[no-any-return]


def wait_closed(upstream: str, model: str) -> float:
    """Waits until the gateway has closed the connection of a model and returns the POSIX time of that."""
    give_up_at = time.monotonic() + 5.0
    while time.monotonic() < give_up_at:
        state = seen(upstream, model)
        if state["closed_at"] is not None and not state["open"]:
            return float(state["closed_at"])
        time.sleep(0.005)
    raise AssertionError(f"the upstream's stream of {model} is still open after 5 s")
