"""Hot restart: a new gateway replaces the one that serves the same address, and no connection is refused.

A listening socket is an object of the kernel; processes only have descriptors of it. Connections with a completed
handshake wait in *its* queue. As long as one process holds a descriptor, none of them is lost, whichever process
accepts them. (Two sockets that share a port by ``SO_REUSEPORT`` have a queue each, and closing one of them resets the
connections in its queue.) So the new process asks for the descriptors:

1. The serving gateway has a *handover socket* for each address that it listens on: a Unix socket that is named after
   the address.
2. The new process finds the address in use, connects to the handover socket, sends a request, and receives the
   listening sockets and the handover sockets.
3. It starts with all its workers, while the old gateway keeps serving.
4. When it is ready to accept connections, it reports that. The old gateway then accepts no more, and drains.

If the new process exits before step 4 for any reason, the kernel closes the connection between the two, and
nothing has changed. If the old gateway exits before that, the new process has all that it needs.

Handover sockets have names in the *abstract* namespace of Linux, which belongs to the network namespace, like the port.
There is no file, so a killed process leaves none behind, and two containers that share a network find each other.
Names there are free for every user. So each side asks the kernel for the other process (``SO_PEERCRED``), and accepts
only its own user. Other systems have neither, and no hot restart: there, the port is in use.

**Shape:** one connection with packets (``SOCK_SEQPACKET``) of JSON: `_Request`, then `_Sockets` or `_Refusal`, then
packets with `_FDS_IN_PACKET` descriptors each, first those of the listening sockets, then those of the handover
sockets; then `_READY`. Versions of Trigate talk to each other here, so the tags and names in JSON are fixed.

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
import trio

from trigate.logs import log

VERSION = 1
"""The version of the protocol. A gateway refuses another version."""
RESPONSE_TIMEOUT_S = 10.0
"""How long the serving gateway may take to respond. A gateway that is starting responds when it has started."""
REQUEST_TIMEOUT_S = 5.0
"""How long a connected process may take to send its request."""
_FDS_IN_PACKET = 64  # Linux allows 253
_PACKET_BYTES = 4096
_BACKLOG = 8
_READY = b"ready"


class HotRestartRefused(Exception):
    """The address cannot be taken over; the message is for the person who started the new process."""


class _Request(msgspec.Struct, tag="knock"):
    version: int


class _Sockets(msgspec.Struct, tag="handed"):
    listening: int
    handover: int = msgspec.field(name="doors")


class _Refusal(msgspec.Struct, tag="declined"):
    reason: str


_decode_response = msgspec.json.Decoder(_Sockets | _Refusal).decode
_decode_request = msgspec.json.Decoder(_Request).decode


def format_address(name: Any) -> str:  # Any: addresses of sockets are tuples of different lengths
    """Formats the address of a TCP socket.

    >>> format_address(("127.0.0.1", 80)), format_address(("::1", 80, 0, 0))
    ('127.0.0.1:80', '[::1]:80')
    """
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# -- the new process --------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Predecessor:
    """The gateway that is being replaced. Made by `request_sockets`.

    Attributes:
        pid: The id of its process; 0 = it is not visible from here (another container).
        listening: Its listening sockets. Owned by the caller.
        handover: Its handover sockets. Owned by the caller.
    """

    pid: int
    listening: Sequence[socket.socket]
    handover: Sequence[socket.socket]
    _connection: socket.socket

    def close(self) -> None:
        """Abandons the hot restart: the other gateway keeps serving. Closes the sockets too."""
        for sock in (self._connection, *self.listening, *self.handover):
            sock.close()

    def notify_ready(self) -> None:
        """Reports that this process is ready to accept connections, so that the other one drains. Synchronous.

        Never fails: if the other process has exited, this one serves all the same.
        """
        with self._connection, contextlib.suppress(OSError):
            self._connection.send(_READY)
        log.info("took_over", predecessor=self.pid)


def request_sockets(address: Any) -> Predecessor | None:
    """Asks the gateway that listens on an address for its sockets. Blocks for at most `RESPONSE_TIMEOUT_S` a packet.

    Args:
        address: As ``getsockname`` returns it.

    Returns:
        The gateway; None = no gateway has a handover socket for the address.

    Raises:
        HotRestartRefused: There is a gateway, and it cannot be replaced, or not now.
    """
    if sys.platform != "linux":
        return None
    where = format_address(address)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(RESPONSE_TIMEOUT_S)
    fds: list[int] = []
    try:
        try:
            connection.connect(_handover_name(where))
        except ConnectionRefusedError:
            connection.close()
            return None
        pid, uid = _peer_of(connection)
        if uid != os.geteuid():
            raise HotRestartRefused(
                f"{where} is served by a gateway of another user (uid {uid}): only that user can replace it"
            )
        connection.send(msgspec.json.encode(_Request(VERSION)))
        response = _decode_response(connection.recv(_PACKET_BYTES))
        if isinstance(response, _Refusal):
            raise HotRestartRefused(f"{where} cannot be taken over from process {pid}: {response.reason}")
        while len(fds) < response.listening + response.handover:
            data, more, _, _ = socket.recv_fds(connection, _PACKET_BYTES, _FDS_IN_PACKET)
            fds += more
            if not data or not more:
                raise ConnectionResetError("it closed the connection")
        sockets = [_socket_of(fd) for fd in fds]
    except (OSError, msgspec.DecodeError) as error:
        for fd in fds:
            os.close(fd)
        connection.close()
        reason = f"{where} cannot be taken over: the gateway there did not answer ({error})"
        raise HotRestartRefused(reason) from None
    except HotRestartRefused:
        connection.close()
        raise
    return Predecessor(pid, sockets[: response.listening], sockets[response.listening :], connection)


def _socket_of(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    sock.set_inheritable(False)  # the default for descriptors that Python opens, but not for received ones
    return sock


# -- the serving gateway ----------------------------------------------------------------------------------------------


def open_handover_sockets(listening: Sequence[socket.socket]) -> list[socket.socket]:
    """Opens a handover socket for each address that these sockets listen on.

    Returns:
        The sockets; an empty list where the system has none, or where one cannot be opened, which is logged.
    """
    handover: list[socket.socket] = []
    if sys.platform != "linux":
        return handover
    for where in dict.fromkeys(format_address(sock.getsockname()) for sock in listening):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        handover.append(sock)
        try:
            sock.bind(_handover_name(where))
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except OSError as error:
            log.warning("takeover_unavailable", address=where, reason=error.strerror or str(error))
            for opened in handover:
                opened.close()
            return []
    return handover


@attrs.define(eq=False)
class _Handover:
    listening: Sequence[socket.socket]
    handover: Sequence[socket.socket]
    on_ready: Callable[[int], None]
    successor: int | None = None  # the process that has received the sockets

    async def accept(self, handover_socket: socket.socket, nursery: trio.Nursery) -> None:
        listener = trio.socket.from_stdlib_socket(handover_socket)
        while True:
            try:
                connection, _ = await listener.accept()
            except OSError as error:
                log.warning("takeover_failed", successor=None, reason=str(error))
                await trio.sleep(1.0)  # most likely, there are no descriptors left
            else:
                nursery.start_soon(self.serve, connection, nursery)

    async def serve(self, connection: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        pid = None
        with connection:
            try:
                pid, uid = _peer_of(connection)
                if uid != os.geteuid():
                    log.warning("takeover_refused", successor=pid, uid=uid)
                    return
                if await self._hand_over(connection, pid):
                    log.info("taken_over", successor=pid)
                    self.on_ready(pid)
                    nursery.cancel_scope.cancel()
            except (OSError, msgspec.DecodeError) as error:
                log.warning("takeover_failed", successor=pid, reason=str(error))

    async def _hand_over(self, connection: trio.socket.SocketType, pid: int) -> bool:
        """Sends the sockets, and waits until the successor is ready. Returns False if it will not be."""
        request = None
        with trio.move_on_after(REQUEST_TIMEOUT_S):
            request = await connection.recv(_PACKET_BYTES)
        if not request:
            return False
        version = _decode_request(request).version
        if version != VERSION:
            reason = f"it has another version of the protocol ({VERSION}, not {version})"
        elif self.successor is not None:
            reason = f"process {self.successor} is already replacing it"
        else:
            self.successor = pid
            try:
                await self._send_sockets(connection)
                log.info("takeover_begun", successor=pid)
                ready = await connection.recv(_PACKET_BYTES) == _READY
            finally:
                self.successor = None
            if not ready:
                log.warning("takeover_failed", successor=pid, reason="it exited before it was ready")
            return ready
        await connection.send(msgspec.json.encode(_Refusal(reason)))
        return False

    async def _send_sockets(self, connection: trio.socket.SocketType) -> None:
        listening = [sock for sock in self.listening if sock.fileno() >= 0]  # the others had no worker during a stop
        await connection.send(msgspec.json.encode(_Sockets(len(listening), len(self.handover))))
        fds = [sock.fileno() for sock in (*listening, *self.handover)]
        for start in range(0, len(fds), _FDS_IN_PACKET):
            part = array.array("i", fds[start : start + _FDS_IN_PACKET])
            await connection.sendmsg([b"fds"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, part)])


async def serve_handover(
    handover: Sequence[socket.socket], listening: Sequence[socket.socket], on_ready: Callable[[int], None]
) -> None:
    """Serves the handover sockets until a successor is ready.

    Args:
        handover: The handover sockets. Owned.
        listening: The listening sockets that a successor receives.
        on_ready: Called with the process id of the successor (0 = it is not visible from here).

    **Cancels:** no process can take over any more. A process that has received the sockets keeps them.
    """
    try:
        async with trio.open_nursery() as nursery:
            server = _Handover(listening, handover, on_ready)
            for sock in handover:
                sock.listen(_BACKLOG)  # again: SO_PEERCRED returns the process that called ``listen`` last
                nursery.start_soon(server.accept, sock, nursery)
    finally:
        for sock in handover:
            sock.close()


# -- names ------------------------------------------------------------------------------------------------------------


def _handover_name(where: str) -> bytes:
    return b"\0trigate/" + where.encode()


def _peer_of(connection: socket.socket | trio.socket.SocketType) -> tuple[int, int]:
    """The process and the user at the other end, as they were when it connected, or called ``listen``."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", found)
    return pid, uid
