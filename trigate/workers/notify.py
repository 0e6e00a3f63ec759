"""The Unix datagram socket by which workers notify each other, and by which they detect that one of them has exited.

The kernel closes a socket when its process ends, however it ends. So a worker has exited if, and only if, no socket is
bound to its address: no timeout is needed, and a worker that is merely slow or stopped is not taken for dead.

The socket lies beside the database, with the worker's id in its name. If no socket can be there (the path is too long,
or the file system has none), it lies in a directory of its own among the temporary files.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
from collections.abc import Iterable

import attrs
import trio

from trigate.errors import StoreUnavailable

_MAX_ADDRESS_BYTES = 103
"""The shortest ``sun_path`` of the supported systems (macOS), without its NUL."""
_MAX_DATAGRAM_BYTES = 64 * 1024
_DIRECTORY_PREFIX = "trigate-"
"""The names of the directories for sockets that cannot lie beside the database begin with this."""


@attrs.define(eq=False)
class NotifySocket:
    """A socket that receives datagrams, and one that sends them. Made by `open_notify_socket`.

    Attributes:
        address: The path of the receiving socket. It changes if `keep_reachable` has to bind another one.
    """

    address: str
    _database: str
    _worker: str
    _receiver: trio.socket.SocketType
    _sender: socket.socket

    async def receive(self) -> bytes:
        """Waits for the next datagram and returns it."""
        while True:
            with contextlib.suppress(trio.ClosedResourceError):  # `keep_reachable` has replaced the socket
                return await self._receiver.recv(_MAX_DATAGRAM_BYTES)

    def send(self, addresses: Iterable[str], datagram: bytes) -> None:
        """Sends a datagram to some addresses. Synchronous; a datagram that cannot be sent at once is dropped."""
        for address in addresses:
            with contextlib.suppress(OSError):
                self._sender.sendto(datagram, address)

    def keep_reachable(self) -> None:
        """Binds a new socket if the file of this one was removed: the others would take this worker for dead.

        Raises:
            StoreUnavailable: No socket can be bound. The old one stays open.
        """
        try:
            os.utime(self.address)  # keeps programs that delete old temporary files from removing it
        except FileNotFoundError:
            old = self._receiver
            self.address, self._receiver = _bind(self._database, self._worker)
            old.close()
        except OSError:  # a read-only file system: the socket is there
            return

    def close_receiver(self) -> None:
        """Stops receiving and removes the socket's file: from now on, the others take this worker for exited."""
        self._receiver.close()
        remove_socket(self.address)

    def close(self) -> None:
        """Closes the sending socket; call `close_receiver` first."""
        self._sender.close()


def open_notify_socket(database: str, worker: str) -> NotifySocket:
    """Opens the sockets of a worker.

    Args:
        database: The path of the store's file.
        worker: The id of the worker.

    Raises:
        StoreUnavailable: No socket can be bound.
    """
    address, receiver = _bind(database, worker)
    try:
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    except OSError as error:
        receiver.close()
        remove_socket(address)
        raise _unavailable(address, error) from error
    sender.setblocking(False)
    return NotifySocket(address, database, worker, receiver, sender)


def _bind(database: str, worker: str) -> tuple[str, trio.socket.SocketType]:
    address = f"{database}-{worker}"
    try:
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    except OSError as error:
        raise _unavailable(address, error) from error
    try:
        receiver.setblocking(False)
        try:
            if len(os.fsencode(address)) > _MAX_ADDRESS_BYTES:
                raise OSError("the path is too long for a socket")
            receiver.bind(address)
        except OSError:  # also raised by a file system without sockets
            address = os.path.join(tempfile.mkdtemp(prefix=_DIRECTORY_PREFIX), "notify")
            receiver.bind(address)
        os.chmod(address, 0o600)
    except OSError as error:
        receiver.close()
        raise _unavailable(address, error) from error
    return address, trio.socket.from_stdlib_socket(receiver)


def _unavailable(address: str, error: OSError) -> StoreUnavailable:
    return StoreUnavailable(
        f"This worker cannot join the other workers: no socket can be created at {address}: {error}."
    )


def is_dead(address: str) -> bool:
    """Whether no socket is bound to an address. Sends nothing, and does not depend on how full the receiver's queue
    is. Never fails."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            probe.setblocking(False)
            probe.connect(address)
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    except OSError:
        return False  # any other error is no evidence of an exit
    return False


def remove_socket(address: str) -> None:
    """Removes the file of a socket, and the directory that was made for it. Never fails."""
    directory = os.path.dirname(address)
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.lstat(address).st_mode):
            os.unlink(address)
        if os.path.basename(directory).startswith(_DIRECTORY_PREFIX):
            os.rmdir(directory)
