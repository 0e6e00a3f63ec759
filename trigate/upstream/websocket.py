"""A WebSocket to an upstream (RFC 6455), over a connection of our own.

It is a `Reply`, so that a handshake that the upstream refuses is what any other refusal is: a status, and a body with
the reason. Frames are those of `wsproto`; extensions are not asked for. Pings are answered here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from trigate.errors import ProtocolViolation
from trigate.upstream.connect import Connection, Origin
from trigate.upstream.pool import ConnectionPool, Response
from trigate.upstream.reply import Reply, translated

_NO_CODE = 1005
_TOO_LARGE = 1009


class WebSocketReply(Reply):
    """The reply to a handshake, and the WebSocket behind it if its status is 200 (on the wire: 101).

    Attributes:
        socket: Sends and receives messages.
    """

    def __init__(self, name: str, socket: WebSocket) -> None:
        super().__init__(name, socket)
        self.socket = socket


class WebSocket:
    """The client's side of a WebSocket. As a `reply.Source`, it has the answer of an upstream that refuses it.

    Args:
        name: The upstream, for messages.
        max_bytes: The largest message.

    Attributes:
        status: Of the answer to the handshake; 200 = it was accepted.
        subprotocol: The one that the upstream chose; None = none.
        close_code, close_reason: With which the upstream has closed it.
    """

    response: Response | None = None

    def __init__(self, name: str, connection: Connection, *, max_bytes: int) -> None:
        self._name = name
        self._connection = connection
        self._protocol = WSConnection(ConnectionType.CLIENT)
        self._max_bytes = max_bytes
        self._events: list[Any] = []  # Any: wsproto's events have no narrower common type
        self._pieces: list[Any] = []  # Any: texts, or bytes
        self._size = 0
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.subprotocol: str | None = None
        self.close_code = _NO_CODE
        self.close_reason = ""

    def header(self, name: str) -> str:
        """The value of a header field of the answer to the handshake."""
        return self.headers.get(name, "")

    async def shake(self, host: str, target: str, headers: Mapping[str, str], subprotocols: Sequence[str]) -> None:
        """Sends the handshake, and receives the answer.

        Raises:
            GatewayError: There is none, or it is not HTTP.
        """
        fields = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        try:
            await self._send(Request(host=host, target=target, extra_headers=fields, subprotocols=list(subprotocols)))
            event = await self._next_event()
        except httpx2.TransportError as error:
            raise translated(error, self._name, answered=False) from error
        match event:
            case AcceptConnection():
                self.status, self.subprotocol = 200, event.subprotocol
            case RejectConnection():
                self.status = event.status_code
                self.headers = {
                    name.decode("latin-1").lower(): value.decode("latin-1") for name, value in event.headers
                }
                if not event.has_body:
                    self._events.append(None)
            case _:
                raise ProtocolViolation(f"The upstream {self._name} did not answer a WebSocket's handshake with HTTP.")

    async def receive(self) -> bytes | None:
        """Returns the next piece of the body of a refusal; None at its end."""
        event = await self._next_event()
        if isinstance(event, RejectData):
            if event.body_finished:
                self._events.append(None)
            return bytes(event.data)
        return None

    async def receive_message(self) -> str | bytes | None:
        """Returns the next message; None = the upstream has closed the WebSocket (`close_code`).

        Raises:
            Truncated: The connection broke.
            ProtocolViolation: What arrived is no frame, or a message is too large.
        """
        try:
            while True:
                event = await self._next_event()
                match event:
                    case TextMessage() | BytesMessage():
                        if (message := self._joined(event)) is not None:
                            return message
                    case Ping():
                        await self._send(event.response())
                    case CloseConnection() if self._protocol.state is ConnectionState.OPEN:
                        raise ProtocolViolation(f"The upstream {self._name} sent what is no frame: {event.reason}.")
                    case CloseConnection():
                        self.close_code, self.close_reason = int(event.code), event.reason or ""
                        await self._send(event.response())
                        return None
                    case None:
                        raise httpx2.RemoteProtocolError("the connection ended without the end of the WebSocket")
        except httpx2.TransportError as error:
            raise translated(error, self._name, answered=True) from error

    def _joined(self, event: Message[Any]) -> str | bytes | None:
        self._size += len(event.data)
        if self._size > self._max_bytes:
            raise ProtocolViolation(f"The upstream {self._name} sent a message of more than {self._max_bytes} bytes.")
        self._pieces.append(event.data)
        if not event.message_finished:
            return None
        pieces, self._pieces, self._size = self._pieces, [], 0
        return "".join(pieces) if isinstance(event, TextMessage) else b"".join(pieces)

    async def send_message(self, message: str | bytes) -> None:
        """Sends a message.

        Raises:
            Truncated: The connection broke.
        """
        try:
            await self._send(TextMessage(data=message) if isinstance(message, str) else BytesMessage(data=message))
        except httpx2.TransportError as error:
            raise translated(error, self._name, answered=True) from error

    async def close(self, code: int) -> None:
        """Sends the end of the WebSocket. Raises as `send_message`."""
        try:
            await self._send(CloseConnection(code=code if code not in (_NO_CODE, 1006) else 1000))
        except httpx2.TransportError as error:
            raise translated(error, self._name, answered=True) from error

    async def aclose(self) -> None:
        """Closes the connection."""
        self._connection.close()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _send(self, event: Any) -> None:  # Any: as above
        try:
            data = self._protocol.send(event)
        except LocalProtocolError:  # it has ended
            await trio.lowlevel.checkpoint()
            return
        await self._connection.send(memoryview(data))

    async def _next_event(self) -> Any:  # Any: as above
        """Returns the next event; None = the connection has ended, or the body of a refusal."""
        while not self._events:
            data = await self._connection.receive()
            if not data:
                return None
            try:
                self._protocol.receive_data(data)
                self._events += self._protocol.events()
            except RemoteProtocolError as error:
                raise ProtocolViolation(
                    f"The upstream {self._name} did not answer with a WebSocket: {error}."
                ) from None
        return self._events.pop(0)


@asynccontextmanager
async def open_websocket(
    pool: ConnectionPool,
    origin: Origin,
    *,
    name: str,
    host: str,
    target: str,
    headers: Mapping[str, str],
    subprotocols: Sequence[str],
    connect_timeout_s: float,
    max_bytes: int,
) -> AsyncIterator[WebSocketReply]:
    """Connects and shakes hands; the connection is closed at the end of the block.

    Raises:
        GatewayError: No connection could be made, or the handshake got no answer.
    """
    try:
        connection = await pool.connect(origin, connect_timeout_s)
    except httpx2.TransportError as error:
        raise translated(error, name, answered=False) from error
    try:
        socket = WebSocket(name, connection, max_bytes=max_bytes)
        await socket.shake(host, target, headers, subprotocols)
        yield WebSocketReply(name, socket)
    finally:
        pool.disconnect(connection)
