"""A scripted upstream of Gemini's format, which accepts only what Google does (`gemini_rules`).

It runs on a thread, as `scripted_upstream` does. What follows the first dot of the model id, up to a second one,
selects the script: ``gemini-3-flash.tools``.

====================  ==================================================================================================
``hello``             sends `TEXT`, word by word; with a thought, if it is asked for
``tools``             calls each function of the request once; once responses are in the contents, sends them
``shell``             as ``tools``, with the one function that runs a command (`SHELLS`): it runs `COMMAND`
``json``              sends `JSON`, if the request has a schema
``long``, ``blocked`` ends with ``MAX_TOKENS``; blocks the prompt
``malformed``         ends with ``MALFORMED_FUNCTION_CALL``
``cut``, ``short``    streams two words, then closes the connection, or ends the reply without a ``finishReason``
``breaks``            streams two words, then an error as Google sends it
``endless``           streams a word every 5 ms, for ever
``overflow``          refuses, since the prompt is too long
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
from urllib.parse import unquote

import attrs

from tests.support.gemini_rules import SIGNATURE, problem_of
from tests.support.scripted_upstream import COMMAND, SHELLS, TEXT, WORDS

MODEL = "gemini-3-flash"
KEY = "of google"
JSON = '{"city": "Köln", "degrees": 21}'
THOUGHT = "Let me think."
ARGUMENTS = {"city": "Köln"}
OVERFLOW = "The input token count (9000) exceeds the maximum number of tokens allowed (8192)."
USAGE = {
    "promptTokenCount": 7,
    "cachedContentTokenCount": 4,
    "candidatesTokenCount": 6,
    "thoughtsTokenCount": 3,
    "totalTokenCount": 16,
}
_ENDS_EARLY = ("cut", "short", "breaks")
_STATUSES = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED"}
Part = dict[str, Any]


@attrs.frozen
class Gemini:
    """The upstream.

    Attributes:
        url: Without a version.
        requests: The accepted requests, in order: the model and the body.
        refused: Why the others were refused.
        closed_at: When the gateway has closed a connection in the middle: POSIX times.
    """

    url: str
    requests: list[tuple[str, dict[str, Any]]]
    refused: list[str]
    closed_at: list[float]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        names = [f"{MODEL}.{part}" for part in ("hello", "tools")]
        rows = [
            {
                "name": f"models/{name}",
                "version": "3",
                "displayName": name.title(),
                "inputTokenLimit": 1_048_576,
                "outputTokenLimit": 65_536,
                "supportedGenerationMethods": ["generateContent", "countTokens"],
            }
            for name in names
        ]
        if "pageToken=second" in self.path:
            self._json({"models": rows[1:]})
        else:
            self._json({"models": rows[:1], "nextPageToken": "second"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        path, _, query = self.path.partition("?")
        model, _, method = unquote(path).removeprefix("/v1beta/models/").rpartition(":")
        part = model.split(".")[1] if "." in model else ""
        if self.headers["x-goog-api-key"] != KEY or not path.startswith("/v1beta/models/"):
            self._error(404, f"no {self.path} with {self.headers['x-goog-api-key']}")
        elif method == "countTokens":
            self._json({"totalTokens": 14, "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 14}]})
        elif method == "embedContent":
            self._json({"embedding": {"values": [0.25, -1.5]}})
        elif method == "batchEmbedContents":
            if any(each["model"] != f"models/{model}" for each in body["requests"]):
                self._error(400, "The model of each request must be that of the path.")
            else:
                self._json({"embeddings": [{"values": [0.25, -1.5]} for _ in body["requests"]]})
        elif (problem := problem_of(body, model, alternates=False)) is not None:
            self.server.refused.append(problem)
            self._error(400, problem)
        else:
            self.server.requests.append((model, body))
            try:
                self._play(body, part, is_stream=method == "streamGenerateContent" and query == "alt=sse")
            except OSError:
                self.server.closed_at.append(time.time())
                self.close_connection = True

    def _play(self, body: dict[str, Any], part: str, *, is_stream: bool) -> None:
        if part.startswith("status-"):
            self._error(int(part.removeprefix("status-")), "said Google")
            return
        if part == "overflow":
            self._error(400, OVERFLOW)
            return
        parts, end = _answer(body, part)
        if not is_stream:
            self._json(_chunk(parts or None if "promptFeedback" in end else parts, **end))
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        pieces = list(_pieces(parts))
        for piece in pieces[:2] if part in _ENDS_EARLY else pieces:
            self._event(_chunk([piece]))
        while part == "endless":
            self._event(_chunk([{"text": "word "}]))
            self._wait_gone(0.005)
        if part in _ENDS_EARLY:
            time.sleep(0.05)  # what ends the stream must not overtake the words
            if part == "breaks":
                error = {"error": {"code": 503, "message": "said Google", "status": "UNAVAILABLE"}}
                self._piece(json.dumps(error, indent=2) + "\n")
            if part != "cut":
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = part == "cut"
            return
        self._event(_chunk([{"text": ""}] if "finishReason" in end else None, **end))
        self.wfile.write(b"0\r\n\r\n")

    # -- the wire

    def _error(self, status: int, message: str) -> None:
        name = _STATUSES.get(status, "UNAVAILABLE")
        self._json({"error": {"code": status, "message": message, "status": name}}, status)

    def _json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json; charset=UTF-8")
        self.send_header("content-length", str(len(body)))
        if status == 429:
            self.send_header("retry-after", "7")
        self.end_headers()
        self.wfile.write(body)

    def _event(self, value: object) -> None:
        self._piece(f"data: {json.dumps(value)}\r\n\r\n")

    def _piece(self, text: str) -> None:
        piece = text.encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def _wait_gone(self, at_most_s: float) -> None:
        readable, _, _ = select.select([self.connection], [], [], at_most_s)
        if readable:
            raise ConnectionError  # clients do not pipeline here, so readable means the end of the connection


def _chunk(parts: list[Part] | None, **end: Any) -> dict[str, Any]:
    head = {"usageMetadata": USAGE, "modelVersion": MODEL, "responseId": "r1"}
    if parts is None:
        return {**end, **head}
    return {"candidates": [{"content": {"parts": parts, "role": "model"}, "index": 0, **end}], **head}


def _answer(body: dict[str, Any], part: str) -> tuple[list[Part], dict[str, Any]]:
    """Returns the parts of the answer, and how it ends."""
    parts: list[Part] = []
    thinking = body.get("generationConfig", {}).get("thinkingConfig", {})
    if thinking.get("includeThoughts") or thinking.get("include_thoughts"):  # the Python SDK writes the latter
        parts.append({"text": THOUGHT, "thought": True})
    end = {"finishReason": "STOP"}
    if part == "blocked":
        return [], {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}
    if part == "malformed":
        return [], {"finishReason": "MALFORMED_FUNCTION_CALL", "finishMessage": "said Google"}
    if part in ("tools", "shell"):
        responses = [each["functionResponse"] for each in body["contents"][-1]["parts"] if "functionResponse" in each]
        if responses:
            said = "; ".join([f"{each['name']} says {json.dumps(each['response'])}" for each in responses])
            return [*parts, {"text": said}], end
        names = [each["name"] for tool in body.get("tools", ()) for each in tool.get("functionDeclarations", ())]
        if part == "shell":
            name = next(name for name in names if name in SHELLS)
            return [
                *parts,
                {"functionCall": {"name": name, "args": {SHELLS[name]: COMMAND}}, "thoughtSignature": SIGNATURE},
            ], end
        for at, name in enumerate(names):
            call: Part = {"functionCall": {"name": name, "args": ARGUMENTS if at == 0 else {}}}
            parts.append({**call, "thoughtSignature": SIGNATURE} if at == 0 else call)
        return parts, end
    if part == "json":
        has_schema = "responseJsonSchema" in body["generationConfig"] or "responseSchema" in body["generationConfig"]
        return [*parts, {"text": JSON if has_schema else "no schema"}], end
    return [*parts, {"text": TEXT}], {"finishReason": "MAX_TOKENS"} if part == "long" else end


def _pieces(parts: list[Part]) -> Iterator[Part]:
    for part in parts:
        if part.get("text") == TEXT:
            yield from ({"text": word} for word in WORDS)
        else:
            yield part


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.refused: list[str] = []
        self.closed_at: list[float] = []

    def handle_error(self, request: object, client_address: object) -> None:
        # The gateway may close an idle connection. Every other error is reported.
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def configuration(upstream: Gemini, name: str = "google") -> str:
    """The section of the upstream in the gateway's configuration."""
    return f'[upstreams.{name}]\nkind = "gemini"\nbase_url = "{upstream.url}"\napi_key = "{KEY}"\n'


@contextlib.contextmanager
def open_gemini() -> Iterator[Gemini]:
    """Serves the provider of this module's docstring on a free port."""
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            yield Gemini(url, server.requests, server.refused, server.closed_at)
        finally:
            server.shutdown()
            thread.join()
