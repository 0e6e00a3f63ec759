"""The official Python SDK's files, uploads, batches and so on, through a real gateway."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, TextMessage
from wsproto.utilities import generate_accept_token

from tests.support.processes import SERVE, configuration, run_gateway

pytestmark = pytest.mark.slow

COMMANDS = {
    "trigate serve": SERVE,
    "hypercorn -k trio": (sys.executable, "-m", "hypercorn", "--bind", "127.0.0.1:0", "-k", "trio", "trigate:app"),
}
KEYS = {"ada": "the key of ada", "bob": "the key of bob"}
DELTA = {"type": "transcript.text.delta", "delta": "hel"}
DONE = {"type": "transcript.text.done", "text": "hello"}
IMAGE = {"type": "image_edit.completed", "b64_json": "aGk=", "created_at": 1}


class _Upstream(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, dict[str, Any]] = {}
        self.bytes: dict[str, bytes] = {}
        self.seen: list[str] = []
        self.lock = threading.Lock()

    def make(self, kind: str, prefix: str, **fields: Any) -> dict[str, Any]:
        with self.lock:
            made = {"id": f"{prefix}{len(self.objects)}", "object": kind, "created_at": 1, **fields}
            self.objects[made["id"]] = made
            return made


class _Handler(BaseHTTPRequestHandler):
    """A small part of OpenAI's API, with objects that are kept."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Upstream

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _form(self) -> dict[str, bytes]:
        head = f"content-type: {self.headers['content-type']}\r\n\r\n".encode()
        message: Any = BytesParser(policy=HTTP).parsebytes(head + self._body())  # Any: its parts are typed as texts
        return {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in message.iter_parts()
        }

    def _json(self, value: object, status: int = 200) -> None:
        self._bytes(json.dumps(value).encode(), "application/json", status)

    def _bytes(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _events(self, *events: object) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for each in events:
            frame = b"data: " + json.dumps(each).encode() + b"\n\n"
            self.wfile.write(b"%x\r\n%b\r\n" % (len(frame), frame))
        self.wfile.write(b"0\r\n\r\n")

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        path, _, query = self.path.removeprefix("/v1").partition("?")
        self.server.seen.append(f"{method} {path}")
        assert self.headers["authorization"] is None, "a key of the gateway"
        for pattern, name in ROUTES.items():
            found = re.fullmatch(pattern, f"{method} {path}")
            if found is not None:
                getattr(self, name)(*found.groups())
                return
        self._json({"error": {"message": f"no {method} {path}?{query}"}}, 404)

    def _models(self) -> None:
        self._json({"object": "list", "data": [{"id": "hello", "object": "model"}]})

    def _make_file(self) -> None:
        form = self._form()
        made = self.server.make(
            "file", "file-", bytes=len(form["file"]), filename="a", purpose=form["purpose"].decode(), status="processed"
        )
        self.server.bytes[made["id"]] = form["file"]
        self._json(made)

    def _content(self, object_id: str) -> None:
        self._bytes(self.server.bytes[object_id], "application/octet-stream")

    def _list(self, kind: str) -> None:
        names = {"files": "file", "batches": "batch", "vector_stores": "vector_store"}
        rows = [each for each in self.server.objects.values() if each["object"] == names[kind]]
        self._json({"object": "list", "data": rows, "has_more": False})

    def _get(self, kind: str, object_id: str) -> None:
        found = self.server.objects.get(object_id)
        self._json(found or {"error": {"message": "gone"}}, 200 if found else 404)

    def _delete(self, kind: str, object_id: str) -> None:
        found = self.server.objects.pop(object_id)
        self._json({"id": object_id, "object": found["object"] + ".deleted", "deleted": True})

    def _make_upload(self) -> None:
        asked = json.loads(self._body())
        self._json(self.server.make("upload", "upload_", status="pending", parts=[], **asked))

    def _make_part(self, object_id: str) -> None:
        made = self.server.make("upload.part", "part_", upload_id=object_id)
        self.server.bytes[made["id"]] = self._form()["data"]
        self._json(made)

    def _complete(self, object_id: str) -> None:
        parts = json.loads(self._body())["part_ids"]
        data = b"".join(self.server.bytes[each] for each in parts)
        made = self.server.make("file", "file-", bytes=len(data), filename="a", purpose="batch", status="processed")
        self.server.bytes[made["id"]] = data
        self._json({**self.server.objects[object_id], "status": "completed", "file": made})

    def _make_batch(self) -> None:
        asked = json.loads(self._body())
        result = self.server.make("file", "file-", bytes=2, filename="out", purpose="batch_output", status="processed")
        self.server.bytes[result["id"]] = b"{}"
        made = self.server.make("batch", "batch_", status="completed", output_file_id=result["id"], **asked)
        self._json(made)

    def _cancel(self, kind: str, object_id: str) -> None:
        self._body()
        self._json({**self.server.objects[object_id], "status": "cancelled"})

    def _make(self, kind: str) -> None:
        names = {"vector_stores": ("vector_store", "vs_"), "conversations": ("conversation", "conv_")}
        self._json(self.server.make(*names[kind], **json.loads(self._body() or b"{}")))

    def _below(self, object_id: str, rest: str) -> None:
        asked = json.loads(self._body() or b"{}")
        self._json(
            {
                "id": asked.get("file_id", "x"),
                "object": "vector_store.file",
                "vector_store_id": object_id,
                "status": "completed",
                "created_at": 1,
            }
        )

    def _transcribe(self) -> None:
        form = self._form()
        assert form["model"] == b"gpt-4o-transcribe"
        assert form["file"] == b"RIFF" * 100_000
        if form.get("stream") == b"true":
            self._events(DELTA, DONE)
        elif form.get("response_format") == b"text":
            self._bytes(b"hello\n", "text/plain; charset=utf-8")
        else:
            self._json({"text": "hello"})

    def _edit(self) -> None:
        form = self._form()
        assert (form["model"], form["image"]) == (b"gpt-image-1", b"PNG")
        if form.get("stream") == b"true":
            self._events(IMAGE)
        else:
            self._json({"created": 1, "data": [{"b64_json": "aGk="}]})

    def _realtime(self) -> None:
        """Greets, and answers each session's change, until the client closes."""
        self.close_connection = True
        self.send_response(101)
        self.send_header("upgrade", "websocket")
        self.send_header("connection", "Upgrade")
        accept = generate_accept_token(self.headers["sec-websocket-key"].encode())
        self.send_header("sec-websocket-accept", accept.decode())
        self.end_headers()
        protocol = Connection(ConnectionType.SERVER)
        model = self.path.partition("model=")[2]
        self._say(protocol, {"type": "session.created", "session": {"type": "realtime", "model": model}})
        while data := self.connection.recv(65536):
            protocol.receive_data(data)
            for event in protocol.events():
                if isinstance(event, TextMessage):
                    self._say(protocol, {"type": "session.updated", "session": json.loads(event.data)["session"]})
                elif isinstance(event, CloseConnection):
                    self.connection.sendall(protocol.send(event.response()))
                    return

    def _say(self, protocol: Connection, event: dict[str, Any]) -> None:
        self.connection.sendall(protocol.send(TextMessage(data=json.dumps({"event_id": "e", **event}))))


ROUTES = {
    "GET /realtime": "_realtime",
    "GET /models": "_models",
    "POST /files": "_make_file",
    "GET /files/(.+)/content": "_content",
    "GET /(files|batches|vector_stores)": "_list",
    "GET /(files|batches|vector_stores|conversations)/([^/]+)": "_get",
    "DELETE /(files|vector_stores|conversations)/([^/]+)": "_delete",
    "POST /uploads": "_make_upload",
    "POST /uploads/(.+)/parts": "_make_part",
    "POST /uploads/(.+)/complete": "_complete",
    "POST /(batches|uploads)/(.+)/cancel": "_cancel",
    "POST /batches": "_make_batch",
    "POST /(vector_stores|conversations)": "_make",
    "POST /vector_stores/([^/]+)/(files)": "_below",
    "POST /audio/transcriptions": "_transcribe",
    "POST /images/edits": "_edit",
}


@pytest.fixture(scope="module")
def upstream() -> Iterator[_Upstream]:
    """An upstream that keeps objects."""
    server = _Upstream()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module", params=COMMANDS)
def base_url(
    request: pytest.FixtureRequest, upstream: _Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A gateway with two keys, under its own server and under another one."""
    keys = "".join(f'{name} = "{key}"\n' for name, key in KEYS.items())
    models = {"talk": "gpt-realtime", "hear": "gpt-4o-transcribe", "paint": "gpt-image-1"}
    aliases = "".join(f'[models.{alias}]\ntargets = ["mock/{model}"]\n' for alias, model in models.items())
    config = configuration(f"http://127.0.0.1:{upstream.server_port}", more=f"[keys]\n{keys}{aliases}")
    command = COMMANDS[request.param]
    with run_gateway(config, tmp_path_factory.mktemp("gateway"), command=command) as gateway:
        yield f"{gateway.url}/v1"
        assert gateway.process.poll() is None, gateway.log()
        errors = [line for line in gateway.log().splitlines() if "[error" in line or "Traceback" in line]
        assert errors == [], gateway.log()


@pytest.fixture
def ada(base_url: str) -> Iterator[openai.OpenAI]:
    """The client of one key."""
    with openai.OpenAI(base_url=base_url, api_key=KEYS["ada"], max_retries=0) as client:
        yield client


@pytest.fixture
def bob(base_url: str) -> Iterator[openai.OpenAI]:
    """The client of the other key."""
    with openai.OpenAI(base_url=base_url, api_key=KEYS["bob"], max_retries=0) as client:
        yield client


def test_files(ada: openai.OpenAI, bob: openai.OpenAI) -> None:
    """A file is made, listed, read and deleted by its key, and by no other."""
    data = b"x" * 1_000_000
    made = ada.files.create(file=("a.jsonl", data), purpose="batch")
    other = bob.files.create(file=b"y", purpose="batch")
    assert made.bytes == len(data)
    assert [each.id for each in ada.files.list() if each.id in (made.id, other.id)] == [made.id]
    assert ada.files.retrieve(made.id) == made
    assert ada.files.content(made.id).read() == data
    for ask in (bob.files.retrieve, bob.files.content, bob.files.delete):
        with pytest.raises(openai.NotFoundError, match="There is no object"):
            ask(made.id)
    assert ada.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        ada.files.retrieve(made.id)


def test_uploads(ada: openai.OpenAI, bob: openai.OpenAI) -> None:
    """An upload in parts; its file belongs to the key as well."""
    upload = ada.uploads.create(bytes=6, filename="a", mime_type="text/plain", purpose="batch")
    parts = [ada.uploads.parts.create(upload.id, data=data) for data in (b"abc", b"def")]
    with pytest.raises(openai.NotFoundError):
        bob.uploads.parts.create(upload.id, data=b"ghi")
    done = ada.uploads.complete(upload.id, part_ids=[part.id for part in parts])
    assert done.file is not None
    assert ada.files.content(done.file.id).read() == b"abcdef"
    with pytest.raises(openai.NotFoundError):
        bob.files.content(done.file.id)
    assert ada.uploads.cancel(upload.id).status == "cancelled"


def test_batches(ada: openai.OpenAI, bob: openai.OpenAI) -> None:
    """A batch of the key's own file, and its results."""
    made = ada.files.create(file=b"{}", purpose="batch")
    with pytest.raises(openai.NotFoundError, match=made.id):
        bob.batches.create(input_file_id=made.id, endpoint="/v1/chat/completions", completion_window="24h")
    batch = ada.batches.create(input_file_id=made.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert ada.batches.retrieve(batch.id).output_file_id == batch.output_file_id is not None
    assert ada.files.content(batch.output_file_id or "").read() == b"{}"
    assert batch.id in [each.id for each in ada.batches.list()]
    assert batch.id not in [each.id for each in bob.batches.list()]
    assert ada.batches.cancel(batch.id).status == "cancelled"


def test_vector_stores(ada: openai.OpenAI, bob: openai.OpenAI) -> None:
    """A store, and what is below it."""
    made = ada.files.create(file=b"text", purpose="assistants")
    store = bob.vector_stores.create(name="s")
    with pytest.raises(openai.NotFoundError, match=made.id):
        bob.vector_stores.files.create(store.id, file_id=made.id)
    with pytest.raises(openai.NotFoundError, match=store.id):
        ada.vector_stores.files.create(store.id, file_id=made.id)
    own = ada.vector_stores.create(name="s")
    assert ada.vector_stores.files.create(own.id, file_id=made.id).vector_store_id == own.id
    assert bob.vector_stores.delete(store.id).deleted


def test_conversations(ada: openai.OpenAI, bob: openai.OpenAI) -> None:
    """A conversation is its key's."""
    made = ada.conversations.create(metadata={"a": "b"})
    assert ada.conversations.retrieve(made.id).id == made.id
    with pytest.raises(openai.NotFoundError):
        bob.conversations.retrieve(made.id)


def test_transcriptions(ada: openai.OpenAI) -> None:
    """As JSON, as text, and as events; the model is an alias."""
    audio = ("a.wav", b"RIFF" * 100_000)
    assert ada.audio.transcriptions.create(model="hear", file=audio).text == "hello"
    assert ada.audio.transcriptions.create(model="hear", file=audio, response_format="text") == "hello\n"
    events = list(ada.audio.transcriptions.create(model="hear", file=audio, stream=True))
    assert [each.type for each in events] == [DELTA["type"], DONE["type"]]


def test_image_edits(ada: openai.OpenAI) -> None:
    """As JSON and as events."""
    [image] = ada.images.edit(model="paint", image=b"PNG", prompt="p").data or []
    assert image.b64_json == "aGk="
    [event] = ada.images.edit(model="paint", image=b"PNG", prompt="p", stream=True)
    assert event.type == "image_edit.completed"


def test_realtime(ada: openai.OpenAI, bob: openai.OpenAI) -> None:
    """A session over a WebSocket; one of a model that does not exist is refused with its status."""
    with ada.realtime.connect(model="talk") as connection:
        first = connection.recv()
        assert first.type == "session.created"
        assert first.session.model == "gpt-realtime"  # type: ignore[union-attr]
        for number in range(3):
            connection.session.update(session={"type": "realtime", "instructions": f"number {number}"})
            changed = connection.recv()
            assert changed.type == "session.updated"
            assert changed.session.instructions == f"number {number}"  # type: ignore[union-attr]
    with pytest.raises(Exception, match="404"), bob.realtime.connect(model="nope"):
        pass


def test_what_no_gateway_has(ada: openai.OpenAI) -> None:
    """Administration is a 404 that says where to go."""
    for ask in (ada.fine_tuning.jobs.list, ada.evals.list):
        with pytest.raises(openai.NotFoundError, match="call the provider itself"):
            ask()
