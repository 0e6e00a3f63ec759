"""A drain whose clients do not read, in a process."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.support.processes import configuration, run_gateway

pytestmark = pytest.mark.slow

CLIENTS = 20
DRAIN_S = 1.0
MARGIN_S = 2.0
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
EVENT = b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n'


def _flood(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.recv(65536)
        connection.sendall(HEAD)
        while True:
            connection.sendall(EVENT % (b"x" * 8000))


@contextlib.contextmanager
def _flooding_upstream() -> Iterator[str]:
    """Serves streams without an end, as fast as they are taken."""
    with socket.create_server(("127.0.0.1", 0), backlog=CLIENTS) as listening:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=_flood, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_clients_that_do_not_read_do_not_delay_the_end(tmp_path: Path) -> None:
    """With 20 clients that have stopped reading, the gateway ends within ``drain_timeout_s`` and two seconds."""
    more = f'[server]\ndrain_timeout_s = {DRAIN_S}\n[limits]\nstall_timeout_s = 60\n[upstreams.echo]\nkind = "echo"'
    body = json.dumps({"model": "mock/hello", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
    with _flooding_upstream() as upstream, contextlib.ExitStack() as stack:
        config = configuration(upstream, more=more).replace('/v1"\n', '/v1"\nmodels = ["hello"]\n', 1)
        with run_gateway(config, tmp_path) as gateway:
            for _ in range(CLIENTS):
                client = stack.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", int(gateway.url.rpartition(":")[2])))
                client.sendall(request.replace(b"host: x", b"host: 127.0.0.1") + b"%d\r\n\r\n" % len(body) + body)
            with httpx2.Client(base_url=gateway.url) as observer:
                give_up_at = time.monotonic() + 20
                while observer.get("/status").json()["streams"]["live"] < CLIENTS and time.monotonic() < give_up_at:
                    time.sleep(0.05)
            time.sleep(1.0)  # the buffers of the kernel fill
            code, took_s = gateway.stop()
        assert code == 0
        assert "forced=0" not in gateway.log()
        assert DRAIN_S <= took_s < DRAIN_S + MARGIN_S
