"""The sockets that a gateway listens on: bound, or taken over from the gateway that runs there (`takeover`)."""

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
from trigate.server.hot_restart import TakeoverRefused, show


class ListenError(Exception):
    """The address cannot be listened on; the message says why, for the person who asked for it.

    Attributes:
        in_use: The address that somebody else listens on, if that is why.
    """

    def __init__(self, message: str, *, in_use: Any = None) -> None:  # Any: as sockets have it
        super().__init__(message)
        self.in_use = in_use


@attrs.frozen
class Listening:
    """What a gateway listens with. Owned by whoever serves.

    Attributes:
        sockets: For clients.
        doors: For the next gateway that takes over (`takeover.attend`).
        predecessor: The gateway that had them before, and serves until it is told.
    """

    sockets: Sequence[socket.socket]
    doors: Sequence[socket.socket] = ()
    predecessor: hot_restart.Predecessor | None = None


def open_listening(config: ServerConfig) -> Listening:
    """Listens as `open_sockets`; where a gateway of the same user does, with its sockets (`takeover`). Blocks.

    Raises:
        ListenError: An address is forbidden, does not exist, or is in use and cannot be taken over.
    """
    try:
        sockets = open_sockets(config)
    except ListenError as error:
        if error.in_use is None:
            raise
        try:
            predecessor = hot_restart.ask(error.in_use)
        except TakeoverRefused as refused:
            raise ListenError(str(refused)) from None
        if predecessor is None:
            raise
    else:
        return Listening(sockets, hot_restart.open_doors(sockets))
    try:
        sockets = open_sockets(config, taken=predecessor.listening)
    except BaseException:
        predecessor.close()
        raise
    return Listening(sockets, predecessor.doors, predecessor)


def open_sockets(config: ServerConfig, *, taken: Sequence[socket.socket] = ()) -> list[socket.socket]:
    """Binds and listens on ``config.host`` and ``config.port``: one socket for each address that the host has.

    Args:
        taken: Sockets that listen already, instead of new ones where their address is wanted. All of them must be:
            connections wait in each.

    Several workers get one each for each address, where the system spreads connections over them (Linux): in the order
    of the workers, for each address. On one socket for all, whoever is quicker takes nearly everything.

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
    left = list(taken)
    try:
        for family, address in dict.fromkeys((each[0], each[4]) for each in found):
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
                missing = error  # "localhost" often has an IPv6 address that the machine has not
            else:
                port = sock.getsockname()[1]
                if config.workers == 1 or sys.platform != "linux":
                    sockets.append(sock)
                    continue
                sock.close()  # it has shown that nobody else listens there, which those that share do not find out
                for _ in range(config.workers):
                    shared = _listen(
                        family, (address[0], port, *address[2:]), config, only_v6=len(found) > 1, share=True
                    )
                    sockets.append(shared)
        if missing is not None and not sockets:
            raise missing
        if left:
            others = ", ".join(dict.fromkeys(show(sock.getsockname()) for sock in left))
            raise ListenError(f"{where} cannot be taken over: the gateway there also listens on {others}")
    except ListenError:
        for sock in sockets:
            sock.close()
        raise
    except OSError as error:
        for sock in sockets:
            sock.close()
        taken_by_others = in_use if error.errno == errno.EADDRINUSE else None
        raise ListenError(_why_not(where, error), in_use=taken_by_others) from None
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
    """Listens as the configuration has it, or goes on doing so."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        timeout_ms = math.ceil(config.tcp_user_timeout_s * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    sock.listen(config.backlog)


def _why_not(where: str, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"{where} is in use by another program (choose another port, or stop that program)"
        case errno.EACCES | errno.EPERM:
            return f"{where} is forbidden to this user (ports under 1024 need a privilege)"
        case errno.EADDRNOTAVAIL:
            return f"{where} cannot be listened on: no interface of this machine has that address"
        case _:
            return f"{where} cannot be listened on: {error.strerror or error}"
