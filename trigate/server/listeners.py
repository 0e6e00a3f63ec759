"""The sockets that a gateway listens on: new ones, or those of the gateway that it replaces (`hot_restart`)."""

from __future__ import annotations

import errno
import math
import socket
import sys
from collections.abc import Sequence
from typing import Any

import attrs

from trigate.config.sections import ServerConfig
from trigate.server import hot_restart
from trigate.server.hot_restart import HotRestartRefused, format_address


class ListenError(Exception):
    """The address cannot be listened on; the message is for the person who started the gateway.

    Attributes:
        in_use: The address that another process listens on, if that is the reason.
    """

    def __init__(self, message: str, *, in_use: Any = None) -> None:  # Any: an address of a socket
        super().__init__(message)
        self.in_use = in_use


@attrs.frozen
class Listening:
    """The sockets of a gateway. Owned by the server or the supervisor.

    Attributes:
        sockets: The listening sockets.
        handover_sockets: Where the next gateway may ask for them (`hot_restart.serve_handover`).
        predecessor: The gateway that had them before. It serves until it is notified.
    """

    sockets: Sequence[socket.socket]
    handover_sockets: Sequence[socket.socket] = ()
    predecessor: hot_restart.Predecessor | None = None


def open_listening(config: ServerConfig) -> Listening:
    """Opens the sockets; if a gateway of the same user listens there, asks for its sockets (`hot_restart`). Blocks.

    Raises:
        ListenError: An address is forbidden, does not exist, or is in use and cannot be taken over.
    """
    try:
        sockets = open_sockets(config)
    except ListenError as error:
        if error.in_use is None:
            raise
        try:
            predecessor = hot_restart.request_sockets(error.in_use)
        except HotRestartRefused as refused:
            raise ListenError(str(refused)) from None
        if predecessor is None:
            raise
    else:
        return Listening(sockets, hot_restart.open_handover_sockets(sockets))
    try:
        sockets = open_sockets(config, inherited=predecessor.listening)
    except BaseException:
        predecessor.close()
        raise
    return Listening(sockets, predecessor.handover, predecessor)


def open_sockets(config: ServerConfig, *, inherited: Sequence[socket.socket] = ()) -> list[socket.socket]:
    """Binds and listens on ``config.host`` and ``config.port``: one socket for each address of the host.

    With several workers, each one gets a socket of its own for each address, where the system spreads connections over
    them (Linux). With one socket for all, the fastest worker would accept nearly all connections.

    Args:
        config: The address, the backlog and the number of workers.
        inherited: Sockets that listen already, used in place of new ones. The configuration must name the address of
            each of them, as connections may wait in each.

    Returns:
        The sockets, ordered by address, and for each address by worker.

    Raises:
        ListenError: An address is in use, forbidden, or does not exist.
    """
    where = f"{config.host}:{config.port}"
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ListenError(f"{where} cannot be listened on: {reason}") from None
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    in_use: Any = None
    port = config.port
    left = list(inherited)
    try:
        for family, address in dict.fromkeys((info[0], info[4]) for info in found):
            these = [sock for sock in left if sock.getsockname() == address]
            if these:
                left = [sock for sock in left if sock not in these]
                sockets += these
                for sock in these:
                    _tune(sock, config)
                continue
            in_use = (address[0], port)
            try:
                sock = _listen(family, (address[0], port, *address[2:]), config, only_v6=len(found) > 1)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error  # "localhost" often resolves to an IPv6 address on a machine without IPv6
            else:
                port = sock.getsockname()[1]
                if config.workers == 1 or sys.platform != "linux":
                    sockets.append(sock)
                    continue
                sock.close()  # no other process listens there, which sockets that share a port would not detect
                for _ in range(config.workers):
                    shared = _listen(
                        family, (address[0], port, *address[2:]), config, only_v6=len(found) > 1, share=True
                    )
                    sockets.append(shared)
        if missing is not None and not sockets:
            raise missing
        if left:
            others = ", ".join(dict.fromkeys(format_address(sock.getsockname()) for sock in left))
            raise ListenError(f"{where} cannot be taken over: the gateway there also listens on {others}")
    except ListenError:
        for sock in sockets:
            sock.close()
        raise
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise ListenError(_reason(where, error), in_use=in_use if error.errno == errno.EADDRINUSE else None) from None
    return sockets


def _listen(family: int, address: Any, config: ServerConfig, *, only_v6: bool, share: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if family == socket.AF_INET6 and only_v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        sock.bind(address)
        _tune(sock, config)
    except BaseException:
        sock.close()
        raise
    return sock


def _tune(sock: socket.socket, config: ServerConfig) -> None:
    """Sets the backlog and the timeout of the configuration, also on a socket that listens already."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        timeout_ms = math.ceil(config.tcp_user_timeout_s * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    sock.listen(config.backlog)


def _reason(where: str, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"{where} is in use by another program (choose another port, or stop that program)"
        case errno.EACCES | errno.EPERM:
            return f"{where} is forbidden to this user (ports under 1024 need a privilege)"
        case errno.EADDRNOTAVAIL:
            return f"{where} cannot be listened on: no interface of this machine has that address"
        case _:
            return f"{where} cannot be listened on: {error.strerror or error}"
