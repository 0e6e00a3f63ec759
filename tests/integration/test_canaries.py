"""Known secrets go through every path of a real gateway, and no output has them.

Each secret has a word in it that stands nowhere else. The upstream answers with whatever it was sent, in each of the
places that a provider has for text. Then every output is searched: the log, the answers, what the command line writes,
the files of the store, the spans, and what upstreams got that is not theirs.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, urlsplit

import attrs
import pytest

from tests.support.otlp import open_receiver
from tests.support.processes import environment, run_gateway

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WORD = "canary"
ALICE, BOB, ADMIN, WRONG = (f"sk-{WORD}-{name}-0123456789abcdef" for name in ("alice", "bob", "admin", "wrong"))
UPSTREAM = {name: f"up-{WORD}-{name}-0123456789abcdef" for name in ("openai", "anthropic", "gemini", "azure")}
EXTRA = f"hd-{WORD}-header-0123456789abcdef"
HOOK = f"hook-{WORD}-secret-0123456789abcdef"
ALERTS = f"{WORD}-alerts-0123456789abcdefgh".encode()
ALERTS_SECRET = "whsec_" + base64.b64encode(ALERTS).decode()
PROXY = f"pw-{WORD}-proxy-0123456789"
TELEGRAM = f"123456:{WORD}-telegram-0123456789abcdef"

CARRIERS = {
    "authorization": "Bearer {}",
    "AUTHORIZATION": "bearer {}",
    "x-api-key": "{}",
    "api-key": "{}",
    "x-goog-api-key": "{}",
}
SCRIPTS = (
    *("json-401", "json-403", "json-400", "json-404", "json-429", "json-500", "json-503"),
    *("text-400", "text-500", "html-502", "nested-400", "detail-422", "list-400", "form-400", "quoted-400"),
    *("header-400", "redirect", "garbage", "status-line", "json-200", "error-200", "stream-error", "stream-event"),
    *("cut", "not-json", "retry-after"),
)
"""How the upstream answers; the second half of its name is a status."""


class _Upstream(BaseHTTPRequestHandler):
    """Answers with all that it was sent in the head, as the model says."""

    protocol_version = "HTTP/1.1"

    def _all(self) -> str:
        return " ".join([self.path, *(f"{name}={value}" for name, value in self.headers.items())])

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self._all(), b""))  # type: ignore[attr-defined]
        self._answer(403, json.dumps({"error": {"message": f"no models for {self._all()}"}}))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.seen.append((self.path, self._all(), body))  # type: ignore[attr-defined]
        found = re.search(rb"script-([a-z0-9-]+)", self.path.encode() + body)
        self._play(found[1].decode() if found is not None else "json-200", self._all())

    def _play(self, script: str, text: str) -> None:
        kind, _, status = script.rpartition("-")
        code = int(status) if status.isdigit() else 200
        error = {"error": {"message": f"refused: {text}", "type": text, "code": text, "param": text}}
        match script if not status.isdigit() or code == 200 else kind:
            case "json":
                self._answer(code, json.dumps(error))
            case "text":
                self._answer(code, f"Oops: {text}", "text/plain")
            case "html":
                self._answer(code, f"<html><title>{text}</title><body><h1>{text}</h1></body></html>", "text/html")
            case "nested":
                self._answer(code, json.dumps({"error": json.dumps(error)}))
            case "detail":
                self._answer(code, json.dumps({"detail": [{"loc": ["body", text], "msg": text, "input": text}]}))
            case "list":
                self._answer(code, json.dumps([error]))
            case "form":
                self._answer(code, f"error={quote(text)}", "application/x-www-form-urlencoded")
            case "quoted":
                self._answer(code, json.dumps({"message": text.replace("=", '="')}))
            case "header":
                self._answer(code, "{}", headers={"x-echo": text, "x-request-id": text, "www-authenticate": text})
            case "redirect":
                self._answer(302, "", headers={"location": f"http://127.0.0.1:1/?{quote(text)}"})
            case "garbage":
                self.wfile.write(f"{text}\r\n\r\n".encode())
                self.close_connection = True
            case "status-line":
                self.wfile.write(f"HTTP/1.1 418 {text}\r\ncontent-length: 0\r\n\r\n".encode())
            case "error-200":
                self._answer(200, json.dumps(error))
            case "stream-error" | "stream-event" | "cut":
                first = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hi"}}]}
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.end_headers()
                name = "event: error\n" if script == "stream-event" else ""
                last = f"{name}data: {json.dumps(error)}\n\n" if script != "cut" else f"data: {text}"
                self.wfile.write(f"data: {json.dumps(first)}\n\n{last}".encode())
                self.close_connection = True
            case "not-json":
                self._answer(200, f"[{text}")
            case "retry-after":
                self._answer(429, json.dumps(error), headers={"retry-after": text, "x-ratelimit-reset-requests": text})
            case _:
                message = {"role": "assistant", "content": "Hello"}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                self._answer(200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}))

    def _answer(
        self, status: int, body: str, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"content-type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def _upstream() -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """Yields its address, and what it has been sent: the path, the head, the body."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Upstream) as server:
        server.daemon_threads = True
        server.seen = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", server.seen  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()


@attrs.define
class Searched:
    """All outputs, by where they were found."""

    words: list[bytes]
    leaks: list[str] = attrs.field(factory=list)

    def look(self, where: str, data: bytes | str) -> None:
        """Searches an output."""
        raw = data.encode() if isinstance(data, str) else data
        for word in self.words:
            at = raw.find(word)
            if at >= 0:
                self.leaks.append(f"{where}: …{raw[max(0, at - 100) : at + 60]!r}")


class Client:
    """Makes requests, and has their answers searched."""

    def __init__(self, url: str, found: Searched) -> None:
        self._address = urlsplit(url)
        self._found = found

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
        """Makes a request; returns the status and the body of its answer."""
        connection = http.client.HTTPConnection(self._address.netloc, timeout=20)
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {"content-type": "application/json", **fields})
            answer = connection.getresponse()
            head = f"{answer.status} {answer.reason} {answer.headers}"
            text = b""
            with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
                text = answer.read()
        finally:
            connection.close()
        self._found.look(f"answer to {method} {path[:60]} {sorted(fields)}", head.encode() + text)
        return answer.status, text

    def raw(self, data: bytes) -> None:
        """Sends bytes, and reads until the end."""
        with socket.create_connection((self._address.hostname, self._address.port), timeout=5) as connection:
            connection.sendall(data)
            answer = b""
            with contextlib.suppress(OSError):
                connection.settimeout(0.3)
                while more := connection.recv(65536):
                    answer += more
        self._found.look(f"answer to {data[:40]!r}", answer)


def _config(upstream: str) -> str:
    tables = "".join(
        f"""
[upstreams.{kind}]
kind = "{kind}"
base_url = "{upstream}{"/v1" if kind == "openai" else ""}"
api_key = {{ env = "KEY_{kind.upper()}" }}
"""
        for kind in UPSTREAM
    )
    return f"""
{tables}
[upstreams.anthropic.headers]
x-extra = {{ env = "EXTRA" }}
[upstreams.proxied]
base_url = "http://nowhere.invalid/v1"
proxy = "http://user:{PROXY}@127.0.0.1:1"
models = ["m"]
[retries]
budget = 0
[breaker]
failures = 0
failure_rate = 0
[keys.alice]
secret = {{ env = "ALICE" }}
[keys.bob]
secret = "{BOB}"
[admin]
key = {{ env = "ADMIN" }}
[alerts]
url = "{upstream}/alerts"
secret = {{ env = "ALERTS_SECRET" }}
window_s = 1
min_calls = 1
[hooks.git]
verification = "github"
secrets = [{{ env = "HOOK" }}]
model = "openai/script-json-500"
[channels.tele]
type = "telegram"
base_url = "{upstream}"
token = {{ env = "TELEGRAM" }}
model = "openai/script-json-401"
"""


ENV = {
    **{f"KEY_{kind.upper()}": value for kind, value in UPSTREAM.items()},
    "EXTRA": EXTRA,
    "ALICE": ALICE,
    "ADMIN": ADMIN,
    "ALERTS_SECRET": ALERTS_SECRET,
    "HOOK": HOOK,
    "TELEGRAM": TELEGRAM,
    "TRIGATE_LOG_LEVEL": "debug",
    "OTEL_BSP_SCHEDULE_DELAY": "100",
}


def _call(client: Client) -> None:
    """Calls with good keys, in each way that a key can come, to upstreams that fail in each way."""
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    for name, form in CARRIERS.items():
        for key in (ALICE, BOB, WRONG):
            headers = {name: form.format(key)}
            client.ask("POST", "/v1/chat/completions", {**chat, "model": "openai/m"}, **headers)
            client.ask("POST", "/v1/nothing", {**chat, "model": "openai/m"}, **headers)
            client.ask("GET", "/v1/models", **headers)
            client.ask("POST", "/v1/chat/completions", b"{not json", **headers)
    for script in SCRIPTS:
        for number, upstream in enumerate(UPSTREAM):
            model = f"{upstream}/script-{script}"
            for stream in (False, True) if upstream == "openai" else (number % 2 == 0,):
                call = {**chat, "model": model, "stream": stream}
                client.ask("POST", "/v1/chat/completions", call, authorization=f"Bearer {ALICE}")
        messages = {**chat, "model": f"anthropic/script-{script}", "max_tokens": 9}
        client.ask("POST", "/v1/messages", messages, x_api_key=ALICE)
        embedding = {"input": "Hi", "model": f"openai/script-{script}"}
        client.ask("POST", "/v1/embeddings", embedding, authorization=f"Bearer {ALICE}")
    client.ask("POST", "/v1/chat/completions", {**chat, "model": "proxied/m"}, authorization=f"Bearer {ALICE}")


def _misuse(client: Client) -> None:
    """Keys in places where they do not belong, in requests that are refused."""
    chat = {"messages": [{"role": "user", "content": "Hi"}], "model": "openai/script-json-401"}
    gemini = {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}
    for key in (ALICE, WRONG):
        for path in (
            f"/v1beta/models/openai%2Fscript-json-401:generateContent?key={key}",
            f"/v1beta/models/openai%2Fscript-json-401:streamGenerateContent?alt=sse&key={key}",
            f"/v1beta/models?key={key}",
            f"/v1/files?key={key}",
            f"/nothing?key={key}",
            f"/v1/chat/completions?api_key={key}&key={key}",
        ):
            client.ask("POST", path, gemini)
            client.ask("GET", path)
        client.ask("POST", "/v1/chat/completions", chat, authorization=f"Bearer {key}", x_api_key=BOB)
        client.ask("POST", "/v1/chat/completions", chat, authorization=f"Basic {key}")
        client.ask("POST", "/v1/chat/completions", chat, authorization=key)
        client.ask("GET", "/v1/realtime?model=openai/m", upgrade="websocket", connection="upgrade")
        line = f"GET /v1/realtime?model=openai/script-json-401&key={key} HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        upgrade = "upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n"
        client.raw(
            f"{line}{upgrade}sec-websocket-key: {base64.b64encode(secrets.token_bytes(16)).decode()}\r\n"
            f"sec-websocket-protocol: realtime, openai-insecure-api-key.{key}\r\n\r\n".encode()
        )
        for head in (
            f"GET /?key={key} HTTP/9.9\r\n\r\n",
            f"GET /?key={key} HTTP/1.1\r\nauthorization: Bearer {key}\r\nauthorization: Bearer {key}\r\n\r\n",
            f"GET / HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\x01\r\n\r\n",
            f"{key} / HTTP/1.1\r\nhost: x\r\n\r\n",
            f"GET / HTTP/1.1\r\nhost: {key}\r\nauthorization Bearer {key}\r\n\r\n",
            f"POST / HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: {key}\r\n\r\n",
        ):
            client.raw(head.encode())


def _administer(client: Client) -> str:
    """The control plane; returns the secret of a key that is made."""
    admin = {"authorization": f"Bearer {ADMIN}"}
    status, made = client.ask("POST", "/v1/keys", {"name": "carol"}, **admin)
    assert status == 200, made
    secret: str = json.loads(made)["secret"]
    for path in (
        *("/status", "/status/streams", "/metrics", "/v1/models", "/v1/keys", "/openapi.json", "/docs", "/llms.txt"),
        *("/v1/exchanges", "/v1/usage", "/v1/sessions", "/v1/files", "/health", "/ready", "/nothing"),
    ):
        client.ask("GET", path, **admin)
        client.ask("GET", path, authorization=f"Bearer {ALICE}")
        client.ask("GET", path)
    body = b'{"text":"Hi"}'
    client.ask("POST", "/hooks/git", body, x_hub_signature_256=f"sha256={HOOK}")
    client.ask("POST", "/hooks/git", body, authorization=f"Bearer {HOOK}")
    client.ask("POST", "/hooks/none", body, authorization=f"Bearer {ALICE}")
    client.ask("PATCH", "/v1/keys/carol", {"secret": ALICE}, **admin)
    client.ask("POST", "/v1/keys", {"name": BOB[:3], "secret": BOB, "models": [1]}, **admin)
    chat = {"messages": [{"role": "user", "content": "Hi"}], "model": "openai/script-json-401"}
    client.ask("POST", "/v1/chat/completions", chat, authorization=f"Bearer {secret}")
    return secret


BROKEN = f"""
[upstreams.openai]
api_key = ["{UPSTREAM["openai"]}"]
base_url = "http://user:{PROXY}@127.0.0.1:1/v1"
[upstreams.two]
base_url = "http://127.0.0.1:1/v1"
api_key = "{UPSTREAM["azure"]} \\u0000"
apikey = "{UPSTREAM["azure"]}"
proxy = "ftp://user:{PROXY}@127.0.0.1:1"
headers = {{ x = ["{EXTRA}"] }}
[keys]
alice = 7
bob = ["{BOB}"]
[keys.carol]
secret = {{ literal = "{ALICE}", env = "X" }}
[admin]
key = {{ name = "{ADMIN}" }}
[alerts]
secret = "whsec_{base64.b64encode(ALERTS).decode()}!"
url = "no:url"
[hooks.git]
verification = "github"
secrets = "{HOOK}"
"""


def test_no_output_has_a_secret(tmp_path: Path) -> None:
    """Every secret, every path, every output."""
    store = tmp_path / "store"
    store.mkdir()
    found = Searched([WORD.encode(), base64.b64encode(ALERTS)[:24]])
    with open_receiver() as receiver, _upstream() as (upstream, seen):
        env = {**ENV, "TRIGATE_STORE": str(store / "trigate.db"), "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
        with run_gateway(_config(upstream), tmp_path, env=env) as gateway:
            client = Client(gateway.url, found)
            _call(client)
            _misuse(client)
            made = _administer(client)
            found.words.append(made.encode())
            for command in (
                ["check"],
                ["models"],
                ["status"],
                ["status", "--json"],
                ["keys", "list"],
                ["doctor"],
                ["chat", "Hi", "--model", "openai/script-json-401"],
            ):
                for key in (ALICE, WRONG) if command == ["models"] else (ALICE,):
                    own = {**env, "TRIGATE_URL": gateway.url, "TRIGATE_API_KEY": key, "TRIGATE_ADMIN_KEY": ADMIN}
                    _run(found, command, environment(tmp_path / "trigate.toml", **own), tmp_path)
            config = tmp_path / "trigate.toml"
            config.write_text(BROKEN)
            _run(found, ["check"], environment(config, **ENV), tmp_path)
            gateway.process.send_signal(signal.SIGHUP)
            give_up_at = time.monotonic() + 10
            while "reload_refused" not in gateway.log():
                assert time.monotonic() < give_up_at
                time.sleep(0.05)
            Client(gateway.url, found).ask("GET", "/status", authorization=f"Bearer {ADMIN}")
            assert gateway.stop()[0] == 0
            log = gateway.log()
        for line in log.splitlines():
            found.look("log", line)
        assert log.count(" exchange ") > 100
        assert log.count("attempt_failed") > 50
        assert log.count("[redacted]") > 50
        files = [path for path in store.rglob("*") if path.is_file()]
        assert files
        for file in files:
            found.look(f"file {file.name}", file.read_bytes())
        assert len(receiver.spans) > 100
        for body in receiver.bodies:
            found.look("spans", body)
        for path, head, body in seen:
            for key in (ALICE, BOB, ADMIN, WRONG, made, HOOK):
                if key in head or key.encode() in body:
                    found.leaks.append(f"upstream at {path}: a key of the gateway")
    assert not found.leaks, f"{len(found.leaks)} leaks:\n" + "\n".join(sorted(set(found.leaks))[:40])


def _run(found: Searched, command: list[str], env: dict[str, str], directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trigate", *command],
        env=env,
        cwd=directory,
        capture_output=True,
        timeout=60,
        check=False,
    )
    found.look(f"trigate {' '.join(command)}: stdout", done.stdout)
    found.look(f"trigate {' '.join(command)}: stderr", done.stderr)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
