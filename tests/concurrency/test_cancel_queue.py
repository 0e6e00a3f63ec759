"""The end of requests whose clients have left, and what is done at once for it."""

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


async def test_many_end_a_few_at_a_time() -> None:
    """All that have left are cancelled, and between two slices everybody else has a turn."""
    count = 5 * SLICE
    ended = 0

    async def serve(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        nonlocal ended
        with trio.CancelScope() as scope:
            task_status.started(scope)
            await trio.sleep_forever()
        ended += 1

    async with open_cancel_queue() as leaving, trio.open_nursery() as nursery:
        scopes = [await nursery.start(serve) for _ in range(count)]
        for scope in scopes:
            leaving.cancel_soon(scope)
        assert repr(leaving) == f"<CancelQueue of {count}>"
        seen = []
        while ended < count:
            await trio.lowlevel.checkpoint()
            seen.append(ended)
        # Tasks run in no certain order: between two looks of this one, two slices may have ended.
        assert all(after - before <= 2 * SLICE for before, after in zip([0, *seen], seen, strict=False))
        assert repr(leaving) == "<CancelQueue of 0>"
        await wait_all_tasks_blocked()  # it does not go on looking


async def test_one_that_has_ended_may_be_cancelled() -> None:
    """Whether a request has ended meanwhile is nobody's concern."""
    async with open_cancel_queue() as leaving:
        with trio.CancelScope() as scope:
            await trio.lowlevel.checkpoint()
        leaving.cancel_soon(scope)
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
    """The provider's, the gateway's two, and the client's."""
    sockets = [*socket.socketpair(), *socket.socketpair()]
    for each in sockets:
        each.setblocking(False)
    yield sockets
    for each in sockets:
        each.close()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
EVENT = b'data: {"model":"m","choices":[{"delta":{"content":"x"}}]}\n\n'


def _stream(relay: SocketRelay, ends: list[socket.socket]) -> RelayedStream:
    framing = Framing()
    framing.feed(HEAD)
    reader = StreamReader(ENDPOINTS["/v1/chat/completions"], model="up/m", upstream="up")
    return relay.stream(framing, ends[1], PlainClient(ends[2]), reader=reader)


@needs_epoll
async def test_a_dropped_stream_is_left_alone(ends: list[socket.socket]) -> None:
    """Once its ends are let go, nothing is sent or read for it; its owner sleeps until it is cancelled."""
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
async def test_a_slow_reader_is_told_from_one_that_does_not_read(ends: list[socket.socket]) -> None:
    """A parked stream counts anew from whenever its client has taken something; what it has taken is exact."""
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
    """A defect of ours is raised where the stream is owned, not in the poller; nothing of it stays there."""

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
