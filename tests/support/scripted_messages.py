"""A scripted upstream of Anthropic's format, which accepts only what Anthropic does (`messages_rules`).

It runs on a thread, as `scripted_upstream` does. What follows the first dot of the model id, up to a second one,
selects the script: ``claude-opus-5.tools``.

====================  ==================================================================================================
``hello``             sends `TEXT`, word by word; with thinking, if it is asked for
``tools``             calls each tool of the request once; once results are in the messages, sends them
``json``              sends `JSON`, if the request has a schema
``long``, ``refuses`` ends with ``max_tokens``, or ``refusal``
``swapped``           sends JSON to a streamed call, and a stream to a plain one
``cut``, ``short``    streams two words, then closes the connection, or ends the reply without ``message_stop``
``overloaded``        streams two words, then an error event
``endless``           streams a word every 5 ms, for ever
``status-N``          refuses with that status; 429 with ``retry-after: 7``
====================  ==================================================================================================
"""

from __future__ import annotations

import contextlib
import json
import select
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import attrs

from tests.support.messages_rules import problem_of, signature_of
from tests.support.scripted_upstream import TEXT, WORDS

MODEL = "claude-opus-5"
JSON = '{"city": "Köln", "degrees": 21}'
THOUGHT = "Let me think."
ARGUMENTS = {"city": "Köln"}
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}
_USAGE = {"input_tokens": 2, "cache_creation_input_tokens": 1, "cache_read_input_tokens": 4, "output_tokens": 1}
_END_USAGE = {"output_tokens": 9, "output_tokens_details": {"thinking_tokens": 3}}


@attrs.frozen
class Messages:
    """The upstream.

    Attributes:
        url: Without ``/v1``.
        requests: The accepted requests.
        closed_at: When the gateway has closed a connection in the middle: POSIX times.
    """

    url: str
    requests: list[dict[str, Any]]
    closed_at: list[float]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        row = {"type": "model", "id": MODEL, "display_name": "Claude", "created_at": "2026-01-01T00:00:00Z"}
        self._json({"data": [{**row, "max_tokens": 128_000}], "has_more": False, "first_id": MODEL, "last_id": MODEL})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path != "/v1/messages" or self.headers["x-api-key"] != "of anthropic":
            self._error(404, f"no {self.path} with {self.headers['x-api-key']}")
        elif (problem := problem_of(body)) is not None:
            self._error(400, problem)
        else:
            request = json.loads(body)
            self.server.requests.append(request)
            try:
                self._play(request, request["model"].split(".")[1])
            except OSError:
                self.server.closed_at.append(time.time())
                self.close_connection = True

    def _play(self, request: dict[str, Any], part: str) -> None:
        if part.startswith("status-"):
            self._error(int(part.removeprefix("status-")), "said Anthropic")
            return
        blocks, reason = _answer(request, part)
        if bool(request.get("stream")) == (part == "swapped"):
            usage = {**_USAGE, **_END_USAGE}
            self._json({**_message(request), "content": blocks, "stop_reason": reason, "usage": usage})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._event("message_start", message=_message(request))
        self._event("ping")
        self._stream(blocks, part)
        if part in ("cut", "short", "overloaded"):
            time.sleep(0.05)  # what ends the stream must not overtake the words
            if part == "overloaded":
                self._event("error", error={"type": "overloaded_error", "message": "Overloaded"})
            if part != "cut":
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = part == "cut"
            return
        self._event("message_delta", delta={"stop_reason": reason, "stop_sequence": None}, usage=_END_USAGE)
        self._event("message_stop")
        self.wfile.write(b"0\r\n\r\n")

    def _stream(self, blocks: list[dict[str, Any]], part: str) -> None:
        for index, block in enumerate(blocks):
            empty = {"text": "", "thinking": "", "signature": "", "input": {}}
            start = {name: empty.get(name, value) for name, value in block.items()}
            self._event("content_block_start", index=index, content_block=start)
            for delta in _deltas(block, part):
                self._event("content_block_delta", index=index, delta=delta)
                if part == "endless":
                    self._wait_gone(0.005)
            if part in ("cut", "short", "overloaded"):
                return
            self._event("content_block_stop", index=index)

    # -- the wire

    def _error(self, status: int, message: str) -> None:
        error = {"type": _ERRORS[status], "message": message}
        self._json({"type": "error", "error": error, "request_id": "req_up"}, status)

    def _json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        if status == 429:
            self.send_header("retry-after", "7")
        self.end_headers()
        self.wfile.write(body)

    def _event(self, kind: str, **fields: Any) -> None:
        piece = f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def _wait_gone(self, at_most_s: float) -> None:
        readable, _, _ = select.select([self.connection], [], [], at_most_s)
        if readable:
            raise ConnectionError  # clients do not pipeline here, so readable means the end of the connection


def _message(request: dict[str, Any]) -> dict[str, Any]:
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": request["model"], "content": []}
    return {**head, "stop_reason": None, "stop_sequence": None, "usage": _USAGE}


def _answer(request: dict[str, Any], part: str) -> tuple[list[dict[str, Any]], str]:
    """Returns the blocks of the answer, and why it ends."""
    blocks: list[dict[str, Any]] = []
    if request.get("thinking", {}).get("type") in ("adaptive", "enabled"):
        blocks.append({"type": "thinking", "thinking": THOUGHT, "signature": signature_of(THOUGHT)})
    last = request["messages"][-1]["content"]
    if part == "tools":
        results = [block for block in last if block["type"] == "tool_result"] if isinstance(last, list) else []
        if not results:
            calls = [
                {"type": "tool_use", "id": f"toolu_{at}", "name": tool["name"], "input": ARGUMENTS if at == 0 else {}}
                for at, tool in enumerate(request["tools"])
            ]
            return [*blocks, *calls], "tool_use"
        said = "; ".join([f"{block['tool_use_id']} says {block['content']}" for block in results])
        return [*blocks, {"type": "text", "text": said}], "end_turn"
    if part == "json":
        text = JSON if "format" in request.get("output_config", {}) else "no schema"
        return [*blocks, {"type": "text", "text": text}], "end_turn"
    reason = {"long": "max_tokens", "refuses": "refusal"}.get(part, "end_turn")
    return [*blocks, {"type": "text", "text": TEXT}], reason


def _deltas(block: dict[str, Any], part: str) -> Iterator[dict[str, Any]]:
    if part == "endless":
        while True:
            yield {"type": "text_delta", "text": "word "}
    if block["type"] == "text":
        words = WORDS if block["text"] == TEXT else (block["text"],)
        for word in words[:2] if part in ("cut", "short", "overloaded") else words:
            yield {"type": "text_delta", "text": word}
    elif block["type"] == "thinking":
        yield {"type": "thinking_delta", "thinking": block["thinking"]}
        yield {"type": "signature_delta", "signature": block["signature"]}
    elif block["input"]:
        text = json.dumps(block["input"], ensure_ascii=False)
        for at in range(0, len(text), 4):
            yield {"type": "input_json_delta", "partial_json": text[at : at + 4]}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.closed_at: list[float] = []

    def handle_error(self, request: object, client_address: object) -> None:
        # The gateway may close an idle connection. Every other error is reported.
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextlib.contextmanager
def open_messages() -> Iterator[Messages]:
    """Serves the upstream on a free port."""
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield Messages(f"http://127.0.0.1:{server.server_address[1]}", server.requests, server.closed_at)
        finally:
            server.shutdown()
            thread.join()


def configuration(messages: Messages) -> str:
    """The section of a configuration in TOML with it as ``native``."""
    return f"""
[upstreams.native]
kind = "anthropic"
base_url = "{messages.url}/v1"
api_key = "of anthropic"
"""
