"""`trigate.concurrency.cancel_queue`, and the relayed streams of clients that disconnect."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.plain_socket import PlainClient
from trigate.concurrency.cancel_queue import SLICE, open_cancel_queue
from trigate.concurrency.poller import open_poller
from trigate.exchange.socket_relay import RelayedStream, SocketRelay
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.stream import StreamReader
from trigate.upstream.response_parser import Framing

needs_epoll = pytest.mark.skipif(sys.platform != "linux", reason="no epoll")


async def test_many_scopes_are_cancelled_in_slices() -> None:
    """Every queued scope is cancelled, and other tasks run between two slices."""
    count = 5 * SLICE
    ended = 0

    async def serve(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        nonlocal ended
        with trio.CancelScope() as scope:
            task_status.started(scope)
            await trio.sleep_forever()
        ended += 1

    async with open_cancel_queue() as queue, trio.open_nursery() as nursery:
        scopes = [await nursery.start(serve) for _ in range(count)]
        for scope in scopes:
            queue.cancel_soon(scope)
        assert repr(queue) == f"<CancelQueue of {count}>"
        seen = []
        while ended < count:
            await trio.lowlevel.checkpoint()
            seen.append(ended)
        # Trio runs tasks in no certain order: two slices may end between two steps of this task.
        assert all(after - before <= 2 * SLICE for before, after in zip([0, *seen], seen, strict=False))
        assert repr(queue) == "<CancelQueue of 0>"
        await wait_all_tasks_blocked()  # the queue sleeps


async def test_a_scope_that_has_ended_may_be_cancelled() -> None:
    """A request may end before its scope is cancelled."""
    async with open_cancel_queue() as queue:
        with trio.CancelScope() as scope:
            await trio.lowlevel.checkpoint()
        queue.cancel_soon(scope)
        await wait_all_tasks_blocked()


class _Owner:
    def __init__(self) -> None:
        self.blocked: list[bool] = []

    def note_relayed(self, now: float, sent_bytes: int) -> None:
        pass

    def note_blocked(self, since: float | None) -> None:
        self.blocked.append(since is not None)


@pytest.fixture
def ends() -> Iterator[list[socket.socket]]:
    """The sockets of the provider, the gateway (two) and the client."""
    sockets = [*socket.socketpair(), *socket.socketpair()]
    for sock in sockets:
        sock.setblocking(False)
    yield sockets
    for sock in sockets:
        sock.close()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
EVENT = b'data: {"model":"m","choices":[{"delta":{"content":"x"}}]}\n\n'


def _stream(relay: SocketRelay, ends: list[socket.socket]) -> RelayedStream:
    framing = Framing()
    framing.feed(HEAD)
    reader = StreamReader(ENDPOINTS["/v1/chat/completions"], model="up/m", upstream="up")
    return relay.stream(framing, ends[1], PlainClient(ends[2]), reader=reader)


@needs_epoll
async def test_a_released_stream_is_not_touched(ends: list[socket.socket]) -> None:
    """After its sockets are released, nothing is sent or read for it; its owner sleeps until it is cancelled."""
    async with open_poller() as poller, trio.open_nursery() as nursery:
        assert poller is not None
        relay, owner = SocketRelay(poller), _Owner()
        stream = _stream(relay, ends)
        nursery.start_soon(stream.run, owner)
        await wait_all_tasks_blocked()
        assert (relay.streams, len(poller)) == (1, 1)
        assert stream.release()
        assert not stream.release()
        assert (relay.streams, len(poller)) == (0, 0)
        stream.inject(b": keep-alive\n")
        ends[0].send(EVENT)
        await wait_all_tasks_blocked(0.01)
        with pytest.raises(BlockingIOError):
            ends[3].recv(1)
        assert len(nursery.child_tasks) == 1
        nursery.cancel_scope.cancel()


@needs_epoll
async def test_a_slow_reader_is_not_a_stalled_one(ends: list[socket.socket]) -> None:
    """A parked stream counts from the last time at which its client read something; the client gets every byte once."""
    ends[2].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    async with open_poller() as poller, trio.open_nursery() as nursery:
        assert poller is not None
        owner, stream = _Owner(), _stream(SocketRelay(poller), ends)
        nursery.start_soon(stream.run, owner)
        await wait_all_tasks_blocked()
        sent = EVENT * 500
        ends[0].send(sent)
        await wait_all_tasks_blocked(0.01)
        received = b""
        while len(owner.blocked) < 4:
            received += ends[3].recv(1024)
            await wait_all_tasks_blocked(0.001)
        assert owner.blocked[:3] == [True, True, True]
        while owner.blocked[-1]:
            received += ends[3].recv(1024)
            await wait_all_tasks_blocked(0.001)
        nursery.cancel_scope.cancel()
    received += ends[3].recv(2**20)
    assert received == sent.replace(b'"m"', b'"up/m"')
    assert stream._client.partial == b""  # type: ignore[attr-defined]


@needs_epoll
async def test_a_crash_ends_that_stream_only(ends: list[socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of the gateway is raised in the task that owns the stream, and the poller no longer has its sockets."""

    def feed(reader: StreamReader, piece: bytes) -> bytes:
        raise RuntimeError("a defect")

    monkeypatch.setattr(StreamReader, "feed", feed)
    async with open_poller() as poller:
        assert poller is not None
        relay = SocketRelay(poller)
        ends[0].send(EVENT)
        with pytest.raises(RuntimeError, match="a defect"):
            await _stream(relay, ends).run(_Owner())
        assert (relay.streams, len(poller)) == (0, 0)
