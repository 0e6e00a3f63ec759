"""The fast path (the socket relay) on real sockets: every byte arrives, and an ended stream leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import Any

import attrs
import httpx2
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.plain_socket import PlainClient
from tests.support.provider import DONE, content, event, usage
from trigate.concurrency.poller import Poller, open_poller
from trigate.errors import ProtocolViolation, Reported
from trigate.exchange.socket_relay import RelayedStream, SocketRelay
from trigate.openai.answer import Usage
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.stream import StreamReader
from trigate.upstream.response_parser import Framing

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="no epoll")

CHAT = ENDPOINTS["/v1/chat/completions"]
FIRST = content("first")
COMMENT = b": keep-alive\n\n"
HEADS = {
    "chunked": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    "close-delimited": b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n\r\n",
}


def public(*events: bytes) -> bytes:
    """The bytes that the client must receive for these events."""
    return b"".join(events).replace(b'"model":"m"', b'"model":"pub"')


@attrs.define(eq=False)
class Owner:
    """Records what the relay reports to its exchange."""

    relayed: list[tuple[float, int]] = attrs.field(factory=list)
    parked: list[float | None] = attrs.field(factory=list)

    def note_relayed(self, now: float, sent_bytes: int) -> None:
        self.relayed.append((now, sent_bytes))

    def note_blocked(self, since: float | None) -> None:
        self.parked.append(since)

    @property
    def is_parked(self) -> bool:
        """Whether the relay waits for the client."""
        return bool(self.parked) and self.parked[-1] is not None


@attrs.define(eq=False)
class Scene:
    """A stream, its relay, and the two far ends.

    Attributes:
        provider: The far end of the upstream.
        client: The far end of the client.
        near: The relay's ends of both connections.
        ended: Set when `RelayedStream.run` has returned or raised.
    """

    poller: Poller
    relay: SocketRelay
    framing: Framing
    reader: StreamReader
    provider: socket.socket
    client: socket.socket
    near: tuple[socket.socket, socket.socket]
    encoding: str
    chunked: bool
    plain: PlainClient
    stream: RelayedStream
    nursery: trio.Nursery
    owner: Owner = attrs.field(factory=Owner)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    ended: trio.Event = attrs.field(factory=trio.Event)
    error: Exception | None = None
    received: bytearray = attrs.field(factory=bytearray)

    async def run(self) -> None:
        """Runs as the exchange's task."""
        try:
            with self.scope:
                await self.stream.run(self.owner)
        except Exception as error:
            self.error = error
        finally:
            self.ended.set()

    async def until(self, holds: Callable[[], object]) -> None:
        """Waits for a condition that the relay's task brings about, and reads nothing."""
        while not holds():  # noqa: ASYNC110 - the condition changes in a callback that cannot notify this task
            await trio.sleep(0.001)

    def framed(self, data: bytes) -> bytes:
        """Frames a piece of the body as the provider sends it."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self.encoding == "chunked" else data

    async def say(self, data: bytes, *, raw: bool = False, step: int | None = None) -> None:
        """Sends a piece of the provider's body, this many bytes at a time."""
        wire = data if raw else self.framed(data)
        for at in range(0, len(wire), step or max(len(wire), 1)):
            rest = wire[at : at + (step or len(wire))]
            while rest:
                try:
                    rest = rest[self.provider.send(rest) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.provider)
            if step is not None:
                await trio.sleep(0)  # noqa: ASYNC115 - lets the relay run now and then, as a network would

    async def end(self, how: str = "fin") -> None:
        """Ends the provider's connection."""
        if how == "rst":
            self.provider.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.provider.close()
        await trio.lowlevel.checkpoint()

    def take(self) -> bytes:
        """Everything the client has received, including what it can read now."""
        with contextlib.suppress(BlockingIOError):
            while data := self.client.recv(2**20):
                self.received += data
        return bytes(self.received)

    async def take_until(self, holds: Callable[[], object]) -> bytes:
        """Reads at the client until a condition holds."""
        while not holds():
            self.take()
            await trio.sleep(0.001)
        return self.take()

    async def take_all(self) -> bytes:
        """Everything the client has when all sent bytes have arrived. Nothing can be sent afterwards."""
        self.near[1].shutdown(socket.SHUT_WR)
        while True:
            try:
                if not (data := self.client.recv(2**20)):
                    return bytes(self.received)
                self.received += data
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.client)

    def body(self, wire: bytes) -> bytes:
        """The client's body, decoded from its wire bytes, which must be complete frames."""
        if not self.chunked:
            return wire
        found = b""
        while wire:
            size, _, wire = wire.partition(b"\r\n")
            length = int(size, 16)
            assert wire[length : length + 2] == b"\r\n", "incomplete chunk"
            found += wire[:length]
            wire = wire[length + 2 :]
        return found

    def assert_empty(self) -> None:
        """Checks that the relay has forgotten the stream and that the exchange still owns the sockets."""
        assert self.relay.streams == 0
        assert len(self.poller) == 0
        assert all(each.fileno() >= 0 for each in self.near)
        assert not self.owner.is_parked


def _tcp_pair(buffer_bytes: int | None) -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection whose kernel buffers hold about this much in each direction."""
    with socket.socket() as listener, contextlib.ExitStack() as opened:
        far = opened.enter_context(socket.socket())
        for each in (listener, far):
            if buffer_bytes is not None:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        far.connect(listener.getsockname())
        near, _ = listener.accept()
        opened.pop_all()
    for each in (near, far):
        each.setblocking(False)
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


@contextlib.asynccontextmanager
async def open_scene(
    encoding: str = "chunked", *, chunked: bool = True, buffer_bytes: int | None = None, start: bool = True
) -> AsyncIterator[Scene]:
    """A stream that has sent its first content, with its exchange waiting in the relay."""
    async with open_poller() as poller, trio.open_nursery() as nursery:
        assert poller is not None
        upstream, provider = _tcp_pair(buffer_bytes if start else None)
        downstream, client = _tcp_pair(buffer_bytes)
        framing = Framing()
        framing.feed(HEADS[encoding])
        reader = StreamReader(CHAT, model="pub", upstream="up")
        assert reader.feed(FIRST) == public(FIRST)
        relay = SocketRelay(poller)
        plain = PlainClient(downstream, chunked)
        stream = relay.stream(framing, upstream, plain, reader=reader)
        scene = Scene(
            poller,
            relay,
            framing,
            reader,
            provider,
            client,
            (upstream, downstream),
            encoding,
            chunked,
            plain,
            stream,
            nursery,
        )
        with trio.fail_after(10), contextlib.ExitStack() as sockets:
            for each in (upstream, provider, downstream, client):
                sockets.enter_context(each)
            if start:
                nursery.start_soon(scene.run)
                await scene.until(lambda: relay.streams)
            try:
                yield scene
            finally:
                scene.scope.cancel()
            await scene.ended.wait()
            scene.assert_empty()
            nursery.cancel_scope.cancel()


EVENTS = (content("a"), content("Grüße \u2028🌍"), b": ping\n\n", content("x" * 300), usage(7, 11), DONE)


def whole(pieces: Iterable[bytes]) -> bytes:
    """What the client must receive for `EVENTS`: the upstream's comments are dropped."""
    return public(*(piece for piece in pieces if not piece.startswith(b":")))


# -- whole streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [True, False], ids=["client chunked", "client HTTP/1.0"])
@pytest.mark.parametrize("encoding", HEADS)
@pytest.mark.parametrize("step", [None, 7], ids=["event by event", "by 7 bytes"])
async def test_a_whole_stream(encoding: str, chunked: bool, step: int | None) -> None:
    """With any framing on either side and any segmentation, the client gets the provider's bytes under the public id in
    complete frames. Usage is read, and the exchange wakes at the last event."""
    async with open_scene(encoding, chunked=chunked) as scene:
        for piece in EVENTS:
            await scene.say(piece, step=step)
            await trio.sleep(0)  # noqa: ASYNC115 - as in `say`
        await scene.ended.wait()
        assert scene.body(await scene.take_all()) == whole(EVENTS)
        assert scene.reader.complete
        assert scene.reader.usage == Usage(prompt_tokens=7, completion_tokens=11)
        assert scene.reader.events == 7
        assert scene.stream.failure is None
        assert scene.error is None
        assert scene.plain.partial == b""
        assert scene.owner.parked == []
        assert sum(sent for _, sent in scene.owner.relayed) == len(whole(EVENTS))


async def test_events_that_arrive_together_are_sent_together() -> None:
    """Several events and the end of the framing in one read make one frame."""
    async with open_scene() as scene:
        await scene.say(b"".join(map(scene.framed, (content("a"), content("b"), DONE))) + b"0\r\n\r\n", raw=True)
        await scene.ended.wait()
        data = public(content("a"), content("b"), DONE)
        assert await scene.take_all() == b"%x\r\n%b\r\n" % (len(data), data)
        assert scene.framing.complete
        assert scene.framing.keep_alive, "the connection can serve the next call"


async def test_many_streams_at_once() -> None:
    """Fifty streams of one relay do not mix, and each ends on its own."""
    async with contextlib.AsyncExitStack() as stack:
        scenes = [await stack.enter_async_context(open_scene(chunked=bool(n % 2))) for n in range(20)]
        for number in range(10):
            for n, scene in enumerate(scenes):
                await scene.say(content(f"{n}:{number}"))
        for n, scene in enumerate(scenes):
            await scene.say(DONE)
            await scene.ended.wait()
            assert scene.body(await scene.take_all()) == public(
                *(content(f"{n}:{number}") for number in range(10)), DONE
            )


# -- truncated streams and errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "rest", "how", "failure"),
    [
        ("chunked", b"", "fin", httpx2.RemoteProtocolError),
        ("chunked", b"40\r\ndata: {", "fin", httpx2.RemoteProtocolError),
        ("chunked", b"", "rst", httpx2.ReadError),
        ("chunked", b"40\r\ndata: {", "rst", httpx2.ReadError),
        ("chunked", b"what is this\r\n", "fin", httpx2.RemoteProtocolError),
        ("chunked", b"0\r\n\r\n", "fin", None),
        ("close-delimited", b"", "fin", None),
        ("close-delimited", b"data: {", "fin", None),
        ("close-delimited", b"", "rst", httpx2.ReadError),
        ("HTTP/1.0", b"", "fin", None),
    ],
)
async def test_a_truncated_stream(
    encoding: str, rest: bytes, how: str, failure: type[httpx2.TransportError] | None
) -> None:
    """The client gets every complete event and no byte more. The exchange is woken with the kind of break. Where the
    framing ended properly, the exchange decides whether the stream is complete."""
    async with open_scene(encoding) as scene:
        await scene.say(content("a"))
        await scene.until(lambda: scene.owner.relayed)
        await scene.say(rest, raw=True)
        await trio.sleep(0.002)
        await scene.end(how)
        await scene.ended.wait()
        assert scene.body(await scene.take_all()) == public(content("a"))
        assert not scene.reader.complete
        assert scene.error is None
        if failure is None:
            assert scene.stream.failure is None
            assert scene.framing.complete
            assert scene.reader.feed_end() == b""
            assert scene.reader.error is not None
        else:
            assert isinstance(scene.stream.failure, failure)


async def test_a_framing_error_after_the_last_event_loses_nothing() -> None:
    """Data before an invalid chunk in the same read is sent. A complete stream stays complete."""
    async with open_scene() as scene:
        await scene.say(scene.framed(content("a")) + scene.framed(DONE) + b"nonsense\r\n", raw=True)
        await scene.ended.wait()
        assert scene.body(await scene.take_all()) == public(content("a"), DONE)
        assert scene.reader.complete


async def test_an_error_event_ends_the_stream() -> None:
    """Events before it are sent, including those from the same read. The exchange reports the error."""
    async with open_scene() as scene:
        await scene.say(content("a") + event({"error": {"message": "m"}}) + content("b"))
        await scene.ended.wait()
        assert scene.body(await scene.take_all()) == public(content("a"))
        assert isinstance(scene.reader.error, Reported)


async def test_an_event_over_the_limit_ends_the_stream() -> None:
    """The event is held no longer than the limit allows: the exchange is woken with the reader's error."""
    async with open_scene() as scene:
        scene.reader._splitter._max = 1000
        await scene.say(content("a") + b"data: " + b"x" * 2000)
        await scene.ended.wait()
        assert scene.body(await scene.take_all()) == public(content("a"))
        assert isinstance(scene.reader.error, ProtocolViolation)


async def test_an_internal_error_is_raised_in_its_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected exception of a reader is raised in its exchange. The relay keeps running and has forgotten the
    stream."""

    def crash(self: object, piece: bytes) -> bytes:
        raise ZeroDivisionError("in a reader")

    async with open_scene() as scene, open_scene() as other:
        with monkeypatch.context() as patch:
            patch.setattr(StreamReader, "feed", crash)
            await scene.say(content("a"))
            await scene.ended.wait()
        assert isinstance(scene.error, ZeroDivisionError)
        scene.assert_empty()
        await other.say(DONE)
        await other.ended.wait()
        assert other.reader.complete


def _refuse_watches(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the kernel refuse every further watch of the poller."""

    def refuse(fd: int, events: int, callback: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(scene.poller, "add", refuse)


@pytest.mark.parametrize("moment", ["at the start", "parked by an event", "parked by a comment", "resumed"])
async def test_a_refused_watch_ends_its_stream(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel refuses to watch a socket, the exchange is woken with a failure, and the relay keeps running."""
    small = moment.startswith("parked") or moment == "resumed"
    async with open_scene(start=moment != "at the start", buffer_bytes=8192 if small else None) as scene:
        match moment:
            case "at the start":
                _refuse_watches(scene, monkeypatch)
                scene.nursery.start_soon(scene.run)
            case "parked by an event":
                _refuse_watches(scene, monkeypatch)
                await scene.say(content("x" * 2_000_000))
            case "parked by a comment":
                _refuse_watches(scene, monkeypatch)
                scene.stream.inject(b":" + b"x" * 2_000_000 + b"\n")
            case "resumed":
                _, talking = await _park(scene)
                talking.cancel()
                _refuse_watches(scene, monkeypatch)
                await scene.take_until(scene.ended.is_set)
        await scene.ended.wait()
        assert str(scene.stream.failure) == "No space left on device"
        assert scene.error is None


# -- a client that does not read --------------------------------------------------------------------------------------


async def _park(scene: Scene, *, size: int = 4000) -> tuple[list[bytes], trio.CancelScope]:
    """Makes the provider send events until the client's socket is full. The provider's task continues in the
    nursery."""
    sent: list[bytes] = []
    scope = trio.CancelScope()

    async def talk() -> None:
        with scope:
            while True:
                sent.append(content(f"{len(sent)}:" + "x" * size))
                await scene.say(sent[-1])
                await trio.sleep(0)  # noqa: ASYNC115 - as in `say`

    scene.nursery.start_soon(talk)
    await scene.until(lambda: scene.owner.is_parked)
    return sent, scope


@pytest.mark.parametrize("chunked", [True, False], ids=["client chunked", "client HTTP/1.0"])
async def test_a_client_that_does_not_read_parks_the_stream(chunked: bool) -> None:
    """The upstream is not read meanwhile, so its provider blocks and only one read is held. When the client reads again
    the relay resumes, and no byte is lost, duplicated or out of order."""
    async with open_scene(chunked=chunked, buffer_bytes=8192) as scene:
        sent, talking = await _park(scene)
        relayed = len(scene.owner.relayed)
        assert len(scene.poller) == 1
        await wait_all_tasks_blocked(0.02)  # the provider is blocked too
        assert scene.owner.is_parked
        assert len(scene.owner.relayed) == relayed
        assert len(scene.owner.parked) == 1
        assert len(scene.stream._rest) <= 64 * 1024 + 16
        count = len(sent)
        await scene.take_until(lambda: len(sent) > count + 20)
        talking.cancel()
        await scene.take_until(lambda: not scene.owner.is_parked)
        scene.scope.cancel()
        assert set(map(type, scene.owner.parked[::2])) == {float}
        assert set(scene.owner.parked[1::2]) == {None}, "parked and resumed several times"
        body = scene.body(await scene.take_all())
        assert body == public(*sent)[: len(body)]
        assert len(body) > 20 * 4000


async def test_a_slow_client_has_every_byte() -> None:
    """A stream many times larger than all buffers, read in small pieces, arrives complete and byte for byte."""
    async with open_scene(buffer_bytes=8192) as scene:
        events = [content(f"{n}:" + "y" * 2000) for n in range(200)]

        async def talk() -> None:
            for each in (*events, DONE):
                await scene.say(each)

        scene.nursery.start_soon(talk)
        await scene.until(lambda: scene.owner.is_parked)
        while not scene.ended.is_set():
            with contextlib.suppress(BlockingIOError):
                scene.received += scene.client.recv(1500)
            await trio.sleep(0)  # noqa: ASYNC115 - as in `say`
        assert scene.body(await scene.take_all() + scene.plain.partial) == public(*events, DONE)
        assert scene.reader.complete


@pytest.mark.parametrize("chunked", [True, False], ids=["client chunked", "client HTTP/1.0"])
async def test_a_final_frame_that_does_not_fit(chunked: bool) -> None:
    """When the client does not take the final frame, the exchange is woken at once and the rest of the frame is
    queued."""
    async with open_scene(chunked=chunked, buffer_bytes=8192, start=False) as scene:
        last = content("z" * 50_000) + DONE
        await scene.say(last)
        await scene.run()
        assert scene.reader.complete
        assert scene.plain.partial
        assert scene.owner.parked == []
        assert scene.near[1].fileno() >= 0
        assert scene.body(await scene.take_all() + scene.plain.partial) == public(last)


@pytest.mark.parametrize("sipped", [0, 1, 5, 3000, 20_000])
async def test_a_cancellation_while_parked_queues_the_rest(sipped: int) -> None:
    """The exchange has to finish a frame that was begun: the bytes sent and the queued rest are complete frames."""
    async with open_scene(buffer_bytes=8192) as scene:
        sent, talking = await _park(scene)
        while len(scene.received) < sipped:
            with contextlib.suppress(BlockingIOError):
                scene.received += scene.client.recv(sipped - len(scene.received))
            await trio.sleep(0.001)
        await scene.until(lambda: scene.owner.is_parked)
        talking.cancel()
        scene.scope.cancel()
        scene.assert_empty()  # at the same moment
        await scene.ended.wait()
        assert scene.plain.partial
        body = scene.body(await scene.take_all() + scene.plain.partial)
        assert body == public(*sent)[: len(body)]
        assert body.endswith(b"\n\n")


# -- cancellation and client disconnects ------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", range(8))
async def test_a_cancellation_between_two_reads(pieces: int) -> None:
    """After any number of reads, within an event or between two, the exchange gets both sockets back at once. The
    client has complete frames, and bytes that the provider sends later are not read."""
    async with open_scene() as scene:
        wire = b"".join(map(scene.framed, (content("a"), content("b"), content("c"))))
        step = len(wire) // 8
        for n in range(pieces):
            await scene.say(wire[n * step : (n + 1) * step], raw=True)
            await scene.until(partial(lambda taken: len(scene.owner.relayed) == taken, n + 1))
        scene.scope.cancel()
        scene.assert_empty()
        await scene.say(wire[pieces * step :], raw=True)
        await scene.ended.wait()
        assert len(scene.owner.relayed) == pieces
        body = scene.body(await scene.take_all())
        assert body in [public(*(content("a"), content("b"))[:n]) for n in range(3)]
        assert scene.plain.partial == b""
        assert scene.near[0].recv(2**16) == wire[pieces * step :], "the bytes are still unread"


async def test_a_cancellation_before_it_begins() -> None:
    """An exchange that is already cancelled does not wait, and nothing is read."""
    async with open_scene(start=False) as scene:
        await scene.say(content("a"))
        scene.scope.cancel()
        await scene.run()
        assert scene.owner.relayed == []
        scene.assert_empty()


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("parked", [False, True], ids=["reading", "parked"])
async def test_a_client_that_is_gone_raises_nothing(how: str, parked: bool) -> None:
    """The task that watches the client cancels. Until then the relay only finds that the client takes no frames."""
    async with open_scene(buffer_bytes=8192) as scene:
        if parked:
            _, talking = await _park(scene)
            talking.cancel()
        if how == "rst":
            scene.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        scene.client.close()
        await scene.until(lambda: not scene.owner.is_parked)
        if not parked:
            for _ in range(5):
                await scene.say(content("into the void"))
                await trio.sleep(0.002)
            assert scene.owner.relayed
        assert not scene.ended.is_set()
        assert scene.relay.streams == 1
        scene.scope.cancel()
        await scene.ended.wait()
        assert scene.error is None
        assert scene.plain.partial == b""


# -- keep-alive comments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [True, False], ids=["client chunked", "client HTTP/1.0"])
async def test_a_comment_between_two_events(chunked: bool) -> None:
    """A comment is a frame of its own, even while an event is incomplete."""
    async with open_scene(chunked=chunked) as scene:
        wire = scene.framed(content("a")) + scene.framed(content("b"))
        scene.stream.inject(COMMENT)
        await scene.say(wire[:-30], raw=True)
        await scene.until(lambda: scene.owner.relayed)
        scene.stream.inject(COMMENT)
        await scene.say(wire[-30:] + scene.framed(DONE), raw=True)
        await scene.ended.wait()
        assert scene.body(await scene.take_all()) == public(COMMENT, content("a"), COMMENT, content("b"), DONE)


async def test_a_blocked_client_is_sent_no_comment() -> None:
    """While a frame waits, no comment is queued: comments would wait too and pile up."""
    async with open_scene(buffer_bytes=8192) as scene:
        sent, talking = await _park(scene)
        rest = scene.stream._rest
        for _ in range(1000):
            scene.stream.inject(COMMENT)
        assert scene.stream._rest == rest
        talking.cancel()
        await scene.take_until(lambda: not scene.owner.is_parked)
        assert COMMENT not in scene.take()
        assert sent


async def test_a_comment_that_goes_out_partly_parks_the_stream() -> None:
    """The rest of the comment is sent before the next event, and the bytes are complete frames in order."""
    async with open_scene(buffer_bytes=8192) as scene:
        comment = b": " + b"k" * 5000 + b"\n"
        count = 0
        while not scene.owner.is_parked:
            scene.stream.inject(comment)
            count += 1
        assert 0 < len(scene.stream._rest) < len(comment) + 16
        assert len(scene.poller) == 1
        await scene.say(content("a") + DONE)
        await scene.take_until(scene.ended.is_set)
        assert scene.body(await scene.take_all() + scene.plain.partial) == comment * count + public(content("a"), DONE)
        assert scene.owner.parked == [scene.owner.parked[0], None]


async def test_a_cancellation_queues_the_rest_of_a_comment() -> None:
    """The relay is parked by a comment and cancelled: the rest is queued like that of any frame."""
    async with open_scene(buffer_bytes=8192) as scene:
        comment = b": " + b"k" * 5000 + b"\n"
        count = 0
        while not scene.owner.is_parked:
            scene.stream.inject(comment)
            count += 1
        scene.scope.cancel()
        scene.assert_empty()
        assert scene.plain.partial
        assert scene.body(await scene.take_all() + scene.plain.partial) == comment * count


def test_the_repr_of_a_relay_shows_its_streams() -> None:
    """Assertions and people look for the count."""
    poller: Any = None
    assert repr(SocketRelay(poller)) == "<SocketRelay of 0 streams>"
