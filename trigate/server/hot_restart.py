"""A gateway takes the place of the one that serves the same address, and no connection is refused: the listening
sockets change hands.

A socket that listens is an object of the kernel; processes only have descriptors of it. Connections whose handshake is
done wait in *its* queue, so as long as one process holds a descriptor, none of them is lost, whichever process accepts
them. (Two sockets that share a port by ``SO_REUSEPORT`` have a queue each, and what waits in that of the one that is
closed is reset.) So the newcomer asks for descriptors:

1. The gateway that serves has a *door* for each address that it listens on: a Unix socket by the name of that address.
2. The newcomer finds the address in use, knocks at its door, and is handed the listening sockets, and the doors.
3. It starts, with all its workers, while the other one serves as before.
4. When it could accept connections, it says so. Then the other one accepts no more, and lets its clients go.

If the newcomer ends before the fourth step, for whatever reason, the line between the two is closed by the kernel, and
nothing has happened. If the other one ends before, the newcomer has what it needs.

Doors have names in the *abstract* namespace of Linux, which is that of the network, as the port is. There is no file,
so none is left behind by a process that was killed, and two containers that share a network find each other. Names
there are free to everybody; so each side asks the kernel who the other one is (``SO_PEERCRED``), and talks to nobody
but its own user. Other systems have neither, and no takeover: there the port is in use, and that is that.

**Shape:** one connection, packets (``SOCK_SEQPACKET``) of JSON: `_Knock`, then `_Handed` (or `_Declined`), then packets
that carry `_FDS_IN_PACKET` descriptors each, first those that listen and then the doors; then `_READY`.

**Source:** unix(7), "Abstract sockets", ``SCM_RIGHTS``, ``SO_PEERCRED``; socket(7), ``SO_REUSEPORT``.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import msgspec
import structlog
import trio

log = structlog.get_logger("trigate.server.hot_restart")

VERSION = 1
"""Of the shape. One of another version declines."""
ANSWER_S = 10.0
"""How long the gateway that serves may take to answer. One that is starting answers when it has."""
SAY_S = 5.0
"""How long whoever knocks may take to say what for."""
_FDS_IN_PACKET = 64  # Linux takes 253
_PACKET_BYTES = 4096
_DOOR_BACKLOG = 8
_READY = b"ready"


class TakeoverRefused(Exception):
    """The address cannot be taken over; the message says why, for the person who asked for it."""


class _Knock(msgspec.Struct, tag="knock"):
    version: int


class _Handed(msgspec.Struct, tag="handed"):
    listening: int
    doors: int


class _Declined(msgspec.Struct, tag="declined"):
    reason: str


_decode_answer = msgspec.json.Decoder(_Handed | _Declined).decode
_decode_knock = msgspec.json.Decoder(_Knock).decode


def show(name: Any) -> str:  # Any: addresses of sockets are tuples of different lengths
    """Writes the address of a TCP socket.

    >>> show(("127.0.0.1", 80)), show(("::1", 80, 0, 0))
    ('127.0.0.1:80', '[::1]:80')
    """
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# -- the newcomer -----------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Predecessor:
    """The gateway whose place is being taken. Made by `ask`.

    Attributes:
        pid: Of its process; 0 = it is not to be seen from here.
        listening: Its sockets. The caller's.
        doors: Its doors. The caller's.
    """

    pid: int
    listening: Sequence[socket.socket]
    doors: Sequence[socket.socket]
    _line: socket.socket

    def close(self) -> None:
        """Gives it up: the other one goes on. Closes the sockets too."""
        for sock in (self._line, *self.listening, *self.doors):
            sock.close()

    def succeed(self) -> None:
        """Says that this process is ready to accept connections: the other one goes. Synchronous, never fails."""
        with self._line, contextlib.suppress(OSError):  # it is gone already
            self._line.send(_READY)
        log.info("took_over", predecessor=self.pid)


def ask(address: Any) -> Predecessor | None:
    """Asks the gateway that listens on an address for its sockets; None = no gateway is to be found there. Blocks.

    Args:
        address: As ``getsockname`` gives it.

    Raises:
        TakeoverRefused: There is one, which cannot be taken over, or not now.
    """
    if sys.platform != "linux":
        return None
    where = show(address)
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.settimeout(ANSWER_S)
    fds: list[int] = []
    try:
        try:
            line.connect(_door_name(where))
        except ConnectionRefusedError:
            line.close()
            return None
        pid, uid = _who_is(line)
        if uid != os.geteuid():
            raise TakeoverRefused(f"{where} is served by a gateway of another user (uid {uid}), who alone may do that")
        line.send(msgspec.json.encode(_Knock(VERSION)))
        answer = _decode_answer(line.recv(_PACKET_BYTES))
        if isinstance(answer, _Declined):
            raise TakeoverRefused(f"{where} cannot be taken over from process {pid}: {answer.reason}")
        while len(fds) < answer.listening + answer.doors:
            data, more, _, _ = socket.recv_fds(line, _PACKET_BYTES, _FDS_IN_PACKET)
            fds += more
            if not data or not more:
                raise ConnectionResetError("it broke off")
        sockets = [_socket_of(fd) for fd in fds]
    except (OSError, msgspec.DecodeError) as error:
        for fd in fds:
            os.close(fd)
        line.close()
        raise TakeoverRefused(f"{where} cannot be taken over: the gateway there did not answer ({error})") from None
    except TakeoverRefused:
        line.close()
        raise
    return Predecessor(pid, sockets[: answer.listening], sockets[answer.listening :], line)


def _socket_of(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    sock.set_inheritable(False)  # as every descriptor that Python opens, but not one that has been received
    return sock


# -- the one that serves ----------------------------------------------------------------------------------------------


def open_doors(listening: Sequence[socket.socket]) -> list[socket.socket]:
    """Opens a door for each address that these listen on. Where that cannot be, there is none, and the log says so."""
    doors: list[socket.socket] = []
    if sys.platform != "linux":
        return doors
    for where in dict.fromkeys(show(sock.getsockname()) for sock in listening):
        door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        doors.append(door)
        try:
            door.bind(_door_name(where))
            door.listen(_DOOR_BACKLOG)
            door.setblocking(False)
        except OSError as error:
            log.warning("takeover_unavailable", address=where, reason=error.strerror or str(error))
            for each in doors:
                each.close()
            return []
    return doors


@attrs.define(eq=False)
class _Porter:
    listening: Sequence[socket.socket]
    doors: Sequence[socket.socket]
    succeeded: Callable[[int], None]
    asking: int | None = None  # the process that has been handed the sockets

    async def wait_at(self, door: socket.socket, nursery: trio.Nursery) -> None:
        listener = trio.socket.from_stdlib_socket(door)
        while True:
            try:
                line, _ = await listener.accept()
            except OSError as error:
                log.warning("takeover_failed", successor=None, reason=str(error))
                await trio.sleep(1.0)  # no descriptors, most likely
            else:
                nursery.start_soon(self.answer, line, nursery)

    async def answer(  # noqa: ASYNC910 - it has read
        self, line: trio.socket.SocketType, nursery: trio.Nursery
    ) -> None:
        pid = None
        with line:
            try:
                pid, uid = _who_is(line)
                if uid != os.geteuid():
                    log.warning("takeover_refused", successor=pid, uid=uid)
                    await trio.lowlevel.checkpoint()
                    return
                if await self._hand_over(line, pid):
                    log.info("taken_over", successor=pid)
                    self.succeeded(pid)
                    nursery.cancel_scope.cancel()
            except (OSError, msgspec.DecodeError) as error:
                log.warning("takeover_failed", successor=pid, reason=str(error))

    async def _hand_over(self, line: trio.socket.SocketType, pid: int) -> bool:
        """Hands the sockets over, and waits until the successor is ready. False = it will not be."""
        knock = None
        with trio.move_on_after(SAY_S):
            knock = await line.recv(_PACKET_BYTES)
        if not knock:
            return False
        version = _decode_knock(knock).version
        if version != VERSION:
            reason = f"it is of another version ({VERSION}, and not {version})"
        elif self.asking is not None:
            reason = f"process {self.asking} is about to do that"
        else:
            self.asking = pid
            try:
                await self._send_sockets(line)
                log.info("takeover_begun", successor=pid)
                ready = await line.recv(_PACKET_BYTES) == _READY
            finally:
                self.asking = None
            if not ready:
                log.warning("takeover_failed", successor=pid, reason="it has ended before it was ready")
            return ready
        await line.send(msgspec.json.encode(_Declined(reason)))
        return False

    async def _send_sockets(self, line: trio.socket.SocketType) -> None:
        await line.send(msgspec.json.encode(_Handed(len(self.listening), len(self.doors))))
        fds = [sock.fileno() for sock in (*self.listening, *self.doors)]
        for start in range(0, len(fds), _FDS_IN_PACKET):
            some = array.array("i", fds[start : start + _FDS_IN_PACKET])
            await line.sendmsg([b"fds"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, some)])


async def attend(
    doors: Sequence[socket.socket], listening: Sequence[socket.socket], succeeded: Callable[[int], None]
) -> None:
    """Attends the doors until a successor is ready.

    Args:
        doors: Owned.
        listening: What a successor is handed.
        succeeded: Is called with its process id (0 = it is not to be seen from here).

    Cancels: Nobody can take over any more. Who has been handed the sockets keeps them.
    """
    try:
        async with trio.open_nursery() as nursery:
            porter = _Porter(listening, doors, succeeded)
            for door in doors:
                door.listen(_DOOR_BACKLOG)  # again: who asks is told who listens by the last one who has said so
                nursery.start_soon(porter.wait_at, door, nursery)
    finally:
        for door in doors:
            door.close()


# -- names ------------------------------------------------------------------------------------------------------------


def _door_name(where: str) -> bytes:
    return b"\0trigate/" + where.encode()


def _who_is(line: socket.socket | trio.socket.SocketType) -> tuple[int, int]:
    """The process and the user at the other end: of the moment at which it connected, or began to listen."""
    found = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", found)
    return pid, uid
