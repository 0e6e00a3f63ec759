"""Uploads over real sockets: they stream, they end with their client, and they are never sent twice."""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import attrs
import httpx2
import pytest
import trio

from tests.support.gateway import OpenServer, make_config
from tests.support.processes import configuration, run_gateway
from trigate.asgi.application import GatewayApp
from trigate.config.sections import Config

HEAD = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
END = b"\r\n--b--\r\n"
TYPE = b"content-type: multipart/form-data; boundary=b\r\n"
OK = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n{"id":"file-1"}'


@attrs.define(eq=False)
class Upstream:
    """An upstream that a test writes by hand.

    Attributes:
        received: What has arrived; ``keeps`` False = only its size counts.
    """

    answer: Callable[[Upstream, trio.SocketStream], Awaitable[None]]
    port: int = 0
    keeps: bool = True
    received: bytearray = attrs.field(factory=bytearray)
    size: int = 0
    connections: int = 0
    _news: trio.Event = attrs.field(factory=trio.Event)

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        try:
            await self.answer(self, stream)
        except trio.BrokenResourceError:
            pass
        finally:
            with trio.CancelScope(shield=True):
                await stream.aclose()

    async def read_until(self, stream: trio.SocketStream, end: bytes) -> None:
        tail = b""
        while end not in tail:
            data = await stream.receive_some(65536)
            if not data:
                return
            self.size += len(data)
            if self.keeps:
                self.received += data
            self._news.set()
            self._news = trio.Event()
            tail = tail[-len(end) :] + bytes(data)

    async def wait_for(self, text: bytes) -> None:
        """Waits until something has arrived."""
        with trio.fail_after(5):
            while text not in self.received:
                await self._news.wait()


async def accept(upstream: Upstream, stream: trio.SocketStream) -> None:
    """Reads a whole form, and answers."""
    await upstream.read_until(stream, END)
    if b"transfer-encoding: chunked" in upstream.received and not upstream.received.endswith(b"0\r\n\r\n"):
        await upstream.read_until(stream, b"0\r\n\r\n")
    await stream.send_all(OK)


@contextlib.asynccontextmanager
async def open_upstream(answer: Callable[[Upstream, trio.SocketStream], Awaitable[None]]) -> AsyncIterator[Upstream]:
    """Runs an upstream."""
    upstream = Upstream(answer)
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        upstream.port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, upstream.serve, [listener])
        yield upstream
        nursery.cancel_scope.cancel()


def _config(*ports: int) -> Config:
    return make_config(
        {f"u{at}": {"base_url": f"http://127.0.0.1:{port}/v1", "models": ["m"]} for at, port in enumerate(ports)}
    )


def _dead_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _connect(client: httpx2.AsyncClient) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", client.base_url.port or 0)


def _request(length: int | None, *, path: bytes = b"/v1/files") -> bytes:
    framing = b"transfer-encoding: chunked\r\n" if length is None else b"content-length: %d\r\n" % length
    return b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\n%b%b\r\n" % (path, TYPE, framing)


async def _answer(stream: trio.SocketStream) -> bytes:
    data = b""
    with trio.fail_after(10):
        while b"\r\n\r\n" not in data or not data.endswith(b"}"):
            more = await stream.receive_some(65536)
            if not more:
                break
            data += more
    return data


async def _assert_clean(app: GatewayApp) -> None:
    with trio.fail_after(5):
        await app.gateway.live.wait_none_left()
    assert [each.in_flight for each in app.gateway.generations.current.upstreams.values()] in ([0], [0, 0])
    assert app._bodies.held_bytes == app._bodies.arriving_bytes == 0


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_an_upload_arrives_as_it_was_sent(open_server: OpenServer, is_chunked: bool) -> None:
    """With its length, or in chunks; and it begins to arrive before its end has been sent."""
    body = HEAD + FILE + b"x" * 1000 + END
    async with open_upstream(accept) as upstream, open_server(_config(upstream.port)) as (client, app):
        async with await _connect(client) as stream:
            pieces = [body[:50], body[50:]]
            framed = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces] if is_chunked else pieces
            await stream.send_all(_request(None if is_chunked else len(body)) + framed[0])
            await upstream.wait_for(b'name="purpose')
            await stream.send_all(framed[1] + (b"0\r\n\r\n" if is_chunked else b""))
            assert b'{"id":"file-1"}' in await _answer(stream)
        head, _, sent = bytes(upstream.received).partition(b"\r\n\r\n")
        if is_chunked:
            assert b"transfer-encoding: chunked" in head
            assert sent == b"".join(framed) + b"0\r\n\r\n"
        else:
            assert sent == body
        assert b"user-agent: trigate" in head
        await _assert_clean(app)


async def test_an_upload_goes_to_the_next_upstream_if_none_of_it_was_sent(open_server: OpenServer) -> None:
    """A port that is closed costs an attempt, and nothing of the upload."""
    body = HEAD + FILE + END
    async with (
        open_upstream(accept) as upstream,
        open_server(_config(_dead_port(), upstream.port)) as (client, app),
        await _connect(client) as stream,
    ):
        await stream.send_all(_request(len(body)) + body)
        got = await _answer(stream)
        assert b"x-trigate-attempts: 2" in got
        assert bytes(upstream.received).endswith(body)
        await _assert_clean(app)


async def test_an_upload_that_breaks_is_not_sent_again(open_server: OpenServer) -> None:
    """A piece has been sent, so no other upstream gets the rest."""

    async def close(upstream: Upstream, stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)

    async with (
        open_upstream(close) as first,
        open_upstream(accept) as second,
        open_server(_config(first.port, second.port)) as (client, app),
        await _connect(client) as stream,
    ):
        await stream.send_all(_request(10_000_000) + HEAD)
        got = await _answer(stream)
        assert b" 502 " in got
        assert (first.connections, second.connections) == (1, 0)
        await _assert_clean(app)


async def test_an_early_answer(open_server: OpenServer) -> None:
    """An upstream that refuses an upload at once is heard at once; its connection is not used again."""

    async def refuse(upstream: Upstream, stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(
            b"HTTP/1.1 413 Too Large\r\ncontent-type: application/json\r\ncontent-length: 32\r\n\r\n"
            b'{"error":{"message":"too much"}}'
        )
        await trio.sleep_forever()

    async with (
        open_upstream(refuse) as upstream,
        open_server(_config(upstream.port)) as (client, app),
        await _connect(client) as stream,
    ):
        await stream.send_all(_request(10_000_000) + HEAD + FILE + b"x" * 200_000)
        got = await _answer(stream)
        assert b" 413 " in got
        await _assert_clean(app)


async def test_a_client_that_leaves_in_mid_upload(open_server: OpenServer) -> None:
    """The upstream's connection is closed at once, and its slot is free."""
    ended = trio.Event()

    async def read(upstream: Upstream, stream: trio.SocketStream) -> None:
        try:
            await upstream.read_until(stream, END)
        finally:
            ended.set()

    async with open_upstream(read) as upstream, open_server(_config(upstream.port)) as (client, app):
        async with await _connect(client) as stream:
            await stream.send_all(_request(10_000_000) + HEAD + FILE + b"x" * 100_000)
            await upstream.wait_for(b"x" * 100_000)
            assert app.gateway.generations.current.upstreams["u0"].in_flight == 1
        with trio.fail_after(1):
            await ended.wait()
        await _assert_clean(app)


async def test_a_download_that_breaks_off_is_not_complete(open_server: OpenServer) -> None:
    """The client's connection ends before the length that was announced."""

    async def cut(upstream: Upstream, stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; charset=x\r\ncontent-length: 100\r\n"
            b"content-disposition: attachment; filename=a\r\n\r\nhalf"
        )

    async with (
        open_upstream(cut) as upstream,
        open_server(_config(upstream.port)) as (client, app),
        await _connect(client) as stream,
    ):
        await stream.send_all(b"GET /v1/files/f/content HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        got = await _answer(stream)
        assert got.endswith(b"\r\n\r\nhalf")
        assert b"content-length: 100\r\n" in got
        assert b"content-type: text/plain; charset=x\r\n" in got
        assert b"content-disposition: attachment; filename=a\r\n" in got
        await _assert_clean(app)


@pytest.mark.slow
@pytest.mark.parametrize("path", [b"/v1/files", b"/v1/audio/transcriptions?model=u0/m"])
async def test_memory_is_bounded(open_server: OpenServer, path: bytes) -> None:
    """An upload of 200 MiB takes no memory of its size, also where the model is looked for in the form."""
    size = 200 * 1024 * 1024
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nu0/m\r\n' + FILE
    async with (
        open_upstream(accept) as upstream,
        open_server(_config(upstream.port)) as (client, app),
        await _connect(client) as stream,
    ):
        upstream.keeps = False
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await stream.send_all(_request(len(form) + size + len(END), path=path) + form)
        block = bytes(1024 * 1024)
        for _ in range(size // len(block)):
            await stream.send_all(block)
        await stream.send_all(END)
        assert b" 200 " in await _answer(stream)
        assert upstream.size > size
        await _assert_clean(app)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 32 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["trio", "asyncio"])
async def test_under_hypercorn(tmp_path: Path, worker: str) -> None:
    """Under a foreign server, too, an upload streams, and its upstream connection ends with its client."""
    ended = trio.Event()

    async def read(upstream: Upstream, stream: trio.SocketStream) -> None:
        head = await stream.receive_some(65536)
        if head.startswith(b"GET "):
            return
        upstream.received += head
        await upstream.read_until(stream, END)
        if END in upstream.received:
            await stream.send_all(OK)
        else:
            ended.set()

    command = (sys.executable, "-m", "hypercorn", "--bind", "127.0.0.1:0", "-k", worker, "trigate:app")
    body = HEAD + FILE + b"x" * 300_000
    async with open_upstream(read) as upstream:
        config = configuration(f"http://127.0.0.1:{upstream.port}").replace('kind = "openai"', 'models = ["hello"]')
        manager = run_gateway(config, tmp_path, command=command)
        gateway = await trio.to_thread.run_sync(manager.__enter__)
        try:
            port = int(gateway.url.rpartition(":")[2])
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(_request(len(body) + len(END)) + body)
                await upstream.wait_for(b"x" * 200_000)
                await stream.send_all(END)
                assert b'{"id":"file-1"}' in await _answer(stream)
            upstream.received.clear()
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(_request(len(body) + len(END)) + body)
                await upstream.wait_for(b"x" * 200_000)
            with trio.fail_after(2):
                await ended.wait()
            assert "Traceback" not in gateway.log()
        finally:
            manager.__exit__(None, None, None)
