"""A receiver of traces over OTLP/HTTP, on a loopback port: it decodes what it is sent."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Receiver:
    """A receiver, with what it has been sent.

    Attributes:
        url: Its base URL.
        spans: The decoded spans, in their order.
        resources: The attributes of the resource of each request.
        paths: The path of each request.
        bodies: The bytes of each request, decompressed.
        status: What it answers.
        held: While it is set, no request is answered.
    """

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Any] = []  # Any: protobuf's messages have no types here
        self.resources: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.bodies: list[bytes] = []
        self.status = 200
        self.released = threading.Event()
        self.released.set()

    def take(self, path: str, body: bytes) -> None:
        """Decodes a request."""
        self.paths.append(path)
        self.bodies.append(body)
        request = ExportTraceServiceRequest.FromString(body)
        for of_resource in request.resource_spans:
            self.resources.append(attributes_of(of_resource.resource))
            for of_scope in of_resource.scope_spans:
                self.spans += of_scope.spans


def attributes_of(message: Any) -> dict[str, Any]:
    """The attributes of a span, an event or a resource."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in message.attributes}


@contextlib.contextmanager
def open_receiver() -> Iterator[Receiver]:
    """Receives traces for the block."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.released.wait(10)
            if receiver.status == 200:
                receiver.take(
                    self.path, gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
                )
            self.send_response(receiver.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        try:
            yield receiver
        finally:
            receiver.released.set()
            server.shutdown()
            thread.join()
