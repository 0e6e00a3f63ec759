"""The far end of the gateway's upstream connections: the requests received, the replies sent, and the open requests."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import httpx2
import msgspec
import trio

from tests.simulator import draws
from tests.simulator.pipes import End, SocketEnd, pair, socket_pair
from trigate.upstream.connect import Connection, Origin
from trigate.upstream.transport import SocketTransport

if TYPE_CHECKING:
    from tests.simulator.world import World

_HERE = ("10.0.0.1", 40000)
_THERE = ("10.0.0.2", 80)


class Dialled(Connection):
    """The gateway's end of an upstream connection in memory: a `trigate.upstream.connect.Connection`.
    `trigate.upstream.transport` sees a layer between HTTP and the socket, as with TLS."""

    def __init__(self, origin: Origin, end: End) -> None:
        self.origin = origin
        self.end = end
        self.socket = None  # type: ignore[assignment] # there is no socket
        self.stream = end  # type: ignore[assignment] # a stream, but not a TLS stream
        self.reused = False
        self.idle_since = -math.inf

    def is_quiet(self) -> bool:
        return self.end.is_quiet

    @property
    def closed(self) -> bool:
        """Whether the gateway has closed it."""
        return self.end.closed

    def close(self) -> None:
        self.end.close()


class Plain(Connection):
    """The gateway's end of a connection on a socket. Closing it notifies the other end."""

    def __init__(self, origin: Origin, sock: socket.socket, far: SocketEnd) -> None:
        super().__init__(origin, sock, None)
        self.far = far

    @property
    def closed(self) -> bool:
        """Whether the gateway has closed it."""
        return self.socket.fileno() == -1

    def close(self) -> None:
        super().close()
        self.far.peer_closed.set()


@attrs.define(eq=False)
class Line:
    """The connections of one upstream in one generation.

    Attributes:
        plain: They are sockets.
        dialling: How many are being opened.
        made: The gateway's ends.
    """

    world: World
    upstream: str
    plain: bool
    dialling: int = 0
    made: list[Dialled | Plain] = attrs.field(factory=list)
    transport: SocketTransport = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.transport = SocketTransport(dial=self.dial)

    @property
    def open(self) -> int:
        """How many connections the gateway has not closed."""
        self.made = [each for each in self.made if not each.closed]
        return len(self.made)

    async def dial(
        self, origin: Origin, trust: Callable[[], object], *, timeout_s: float = math.inf, refuse: object = None
    ) -> Connection:
        """Opens a connection with the signature of `trigate.upstream.connect.dial`."""
        world = self.world
        takes_s, accepts = draws.connecting(world.seed, self.upstream, next(world.dials), trio.current_time())
        self.dialling += 1
        try:
            with trio.move_on_after(timeout_s):
                await trio.sleep(takes_s)
                if not accepts:
                    raise httpx2.ConnectError("Connection refused")
                connection, far = self._connected(origin)
                self.made.append(connection)
                world.nursery.start_soon(_serve, world, self.upstream, far)
                return connection
        finally:
            self.dialling -= 1
        raise httpx2.ConnectTimeout(f"{origin} did not accept a connection within {timeout_s:g} s")

    def _connected(self, origin: Origin) -> tuple[Dialled | Plain, End | SocketEnd]:
        if not self.plain:
            near, far = pair(_HERE, _THERE)
            return Dialled(origin, near), far
        one, other = socket_pair()
        end = SocketEnd(other)
        return Plain(origin, one, end), end


@attrs.define(eq=False)
class Open:
    """A request that a provider has received and not yet answered completely."""

    id: str
    upstream: str
    end: End | SocketEnd

    @property
    def is_wanted(self) -> bool:
        """Whether the gateway has kept its connection open."""
        return not self.end.peer_closed.is_set()


async def _serve(world: World, upstream: str, end: End | SocketEnd) -> None:
    received = bytearray()
    try:
        while (request := await _read(end, received)) is not None:
            head, body = request
            if not await _answer(world, upstream, end, head, body):
                return
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # one of the two ends is closed
    finally:
        end.close()


async def _read(end: End | SocketEnd, received: bytearray) -> tuple[dict[str, str], bytes] | None:
    """Reads a request; None if the gateway closes the connection instead."""
    while b"\r\n\r\n" not in received:
        data = await end.receive_some()
        if not data:
            return None
        received += data
    head, _, _ = bytes(received).partition(b"\r\n\r\n")
    pairs = (line.partition(": ") for line in head.decode("latin-1").split("\r\n")[1:])
    headers = {name: value for name, _, value in pairs}
    end_at = len(head) + 4 + int(headers["content-length"])
    while len(received) < end_at:
        data = await end.receive_some()
        if not data:
            return None
        received += data
    body = bytes(received[len(head) + 4 : end_at])
    del received[:end_at]
    return headers, body


async def _answer(world: World, upstream: str, end: End | SocketEnd, headers: dict[str, str], body: bytes) -> bool:
    """Answers a request and returns whether the connection can carry another one."""
    if end.peer_closed.is_set():
        return False  # the gateway sent it and then closed the connection
    call = world.calls[headers["x-request-id"]]
    if call.returned or not call.entered:
        world.violate(f"{call.request.id} reached {upstream}, but its client does not wait for it")
    asked = call.request
    decoded = msgspec.json.decode(body)
    prefix = ""
    if "messages" in decoded and decoded["messages"][-1]["role"] == "assistant":
        prefix = decoded["messages"][-1]["content"]
        if not asked.text.startswith(prefix):
            world.violate(f"{asked.id} is to be continued after {prefix!r}, which is no prefix of {asked.text!r}")
    if decoded["model"] != f"m-{upstream}" or decoded["request"] != asked.number:
        world.violate(f"{asked.id} reached {upstream} as {decoded['model']} {decoded['request']}")
    number = len(call.replies)
    reply = draws.reply(world.seed, upstream, asked, number, prefix, trio.current_time())
    call.replies.append((upstream, reply))
    world.trace.note("asked", asked.id, upstream, number, len(prefix))
    taken = Open(asked.id, upstream, end)
    world.open[taken] = None
    try:
        reusable = await _play(end, reply)
    finally:
        del world.open[taken]
        world.trace.note("answered", asked.id, upstream, number, "disconnected" if end.peer_closed.is_set() else "")
    if reusable and reply.then_closes_s < math.inf:
        await _sleep(end, reply.then_closes_s)
        return False
    return reusable


async def _play(end: End | SocketEnd, reply: draws.Reply) -> bool:
    for step in reply.steps:
        match step:
            case draws.Say(data):
                await end.send_all(data)
            case draws.Pause(seconds):
                await _sleep(end, seconds)
                if end.peer_closed.is_set():
                    return False
            case draws.End("rst"):
                end.reset()
                return False
            case draws.End():
                return False
    return True


async def _sleep(end: End | SocketEnd, seconds: float) -> None:
    """Sleeps until the time has passed or the gateway closes its end."""
    with trio.move_on_after(seconds):
        await end.peer_closed.wait()


def lines(world: World) -> Callable[[str, object], SocketTransport]:
    """Makes the transports of a generation for `trigate.gateway.gateway.open_gateway`."""

    def make(name: str, _: object) -> SocketTransport:
        line = Line(world, name, plain=draws.is_plain(world.seed, "line", len(world.lines)))
        world.lines.append(line)
        return line.transport

    return make
