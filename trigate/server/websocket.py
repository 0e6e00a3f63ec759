"""A WebSocket of a client (RFC 6455): the ASGI scope ``websocket`` on a connection of HTTP/1.1.

The application decides: it accepts the handshake, or refuses it with a response of its own (the ASGI extension
``websocket.http.response``). The connection then ends with the WebSocket.

Frames are those of `wsproto`. Extensions are not offered: a compressed message could be of any size. Pings are answered
here. A message is bounded, and so is what is read ahead of the application: nothing.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeAlias

import trio
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, TextMessage
from wsproto.utilities import LocalProtocolError, generate_accept_token

from trigate.errors import Header, Internal, WebSocketRefused
from trigate.logs import log
from trigate.server.client_stream import ClientStream
from trigate.server.request_parser import RequestParser
from trigate.tracebacks import drop_frames

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_MAX_EARLY_BYTES = 64 * 1024
"""How much may arrive before the handshake is accepted. A client waits for that."""
_ABNORMAL = 1006
_TOO_LARGE = 1009
_INTERNAL_ERROR = 1011
_MAX_REASON_BYTES = 123

# Any: the values of an ASGI message depend on its type, and the specification has no narrower one.
AsgiMessage: TypeAlias = MutableMapping[str, Any]
Respond: TypeAlias = Callable[[int, list[Header], bytes], Awaitable[None]]


def key_of(headers: Iterable[Header]) -> bytes | None:
    """Returns the key of a handshake; None = it is none, or one of another version than 13."""
    fields = dict(headers)
    key = fields.get(b"sec-websocket-key", b"")
    try:
        is_key = len(base64.b64decode(key, validate=True)) == 16
    except binascii.Error:
        is_key = False
    return key if is_key and fields.get(b"sec-websocket-version", b"").strip() == b"13" else None


def subprotocols_of(headers: Iterable[Header]) -> list[str]:
    """Returns the subprotocols that a handshake offers.

    >>> subprotocols_of([(b"sec-websocket-protocol", b"realtime, x"), (b"sec-websocket-protocol", b"y")])
    ['realtime', 'x', 'y']
    """
    offered = b",".join([value for name, value in headers if name == b"sec-websocket-protocol"])
    return [each.strip() for each in offered.decode("latin-1").split(",") if each.strip()]


def scope_of(scope: AsgiMessage, headers: Iterable[Header]) -> AsgiMessage:
    """Returns the scope of a WebSocket, from that of its handshake."""
    websocket = {
        **scope,
        "type": "websocket",
        "asgi": {"spec_version": "2.3", "version": "3.0"},
        "scheme": "wss" if scope["scheme"] == "https" else "ws",
        "subprotocols": subprotocols_of(headers),
        "extensions": {**scope["extensions"], "websocket.http.response": {}},
    }
    del websocket["method"]
    return websocket


async def serve(
    app: Callable[[AsgiMessage, Any, Any], Awaitable[None]],  # Any: ASGI's receive and send
    scope: AsgiMessage,
    stream: ClientStream,
    parser: RequestParser,
    respond: Respond,
) -> None:
    """Calls the app for a WebSocket whose handshake is the current request. The connection has to end afterwards."""
    key = key_of(parser.headers) if parser.complete else None
    if key is None:
        await respond(*WebSocketRefused().to_response())
        return
    websocket = WebSocket(stream, key, parser.take_rest(), respond)
    try:
        await app(scope_of(scope, parser.headers), websocket.receive, websocket.send)
    except* Exception as group:
        log.error("app_crashed", method="GET", path=scope["path"], exc_info=group)
        drop_frames(group)
    finally:
        stream.on_disconnect = None
    if websocket.accepted:
        await websocket.close()
        parser.complete = False  # what still arrives is read, since a reset would overtake the last frame
    elif not websocket.answered and not stream.disconnected:
        await respond(*Internal("The server failed on this request.").to_response())


class WebSocket:
    """The WebSocket of one connection; its `receive` and `send` are those of ASGI.

    Args:
        stream: The client.
        key: The key of the handshake.
        rest: The bytes that have arrived behind the head.
        respond: Sends a whole HTTP response.

    Attributes:
        accepted: The handshake was accepted.
        answered: It was accepted, or refused.
    """

    def __init__(self, stream: ClientStream, key: bytes, rest: bytes, respond: Respond) -> None:
        self._stream = stream
        self._key = key
        self._respond = respond
        self._connection = Connection(ConnectionType.SERVER)
        self._unparsed = rest
        self._connected = False
        self._disconnected_with: int | None = None
        self._pieces: list[str] | list[bytes] = []
        self._size = 0
        self._refusal: AsgiMessage = {}
        self._refusal_body = b""
        self.accepted = False
        self.answered = False

    # -- from the client ----------------------------------------------------------------------------------------------

    async def receive(self) -> AsgiMessage:
        """Returns the next message: ``websocket.connect``, the client's messages, ``websocket.disconnect``."""
        if not self._connected:
            self._connected = True
            await trio.lowlevel.checkpoint()
            return {"type": "websocket.connect"}
        while self._disconnected_with is None:
            message = await self._next_message() if self.accepted else None
            if message is not None:
                return message
            if self._disconnected_with is None:
                await self._read()
        return {"type": "websocket.disconnect", "code": self._disconnected_with, "reason": ""}

    async def _read(self) -> None:
        """Reads more bytes; those that arrive before the handshake is accepted wait, and are bounded."""
        data = await self._stream.read()
        if not data:
            self._stream.note_disconnect()
            self._disconnected_with = _ABNORMAL
        elif self.accepted:
            self._feed(data)
        else:
            self._unparsed += data
            if len(self._unparsed) > _MAX_EARLY_BYTES:
                self._disconnected_with = _ABNORMAL

    def _feed(self, data: bytes) -> None:
        self._connection.receive_data(data)

    async def _next_message(self) -> AsgiMessage | None:
        """Returns the next whole message among the received frames; answers pings and the end; None = there is none."""
        if self._unparsed:
            data, self._unparsed = self._unparsed, b""
            self._feed(data)
        for event in self._connection.events():
            if isinstance(event, Message):
                if (message := await self._joined(event)) is not None:
                    return message
            elif isinstance(event, Ping):
                await self._write(event.response())
            elif isinstance(event, CloseConnection):
                is_close = self._connection.state is not ConnectionState.OPEN  # otherwise it is no frame
                if self._connection.state is ConnectionState.REMOTE_CLOSING:
                    await self._write(event.response())
                elif not is_close:
                    await self.close(int(event.code), event.reason or "")
                self._disconnected_with = int(event.code) if is_close else _ABNORMAL
            if self._disconnected_with is not None:
                break
        return None

    async def _joined(self, event: Message[Any]) -> AsgiMessage | None:
        """Joins the parts of a message; None = it is not complete, or too large."""
        self._size += len(event.data)
        if self._size > MAX_MESSAGE_BYTES:
            await self._write(CloseConnection(code=_TOO_LARGE, reason="The message is too large."))
            self._disconnected_with = _ABNORMAL
            return None
        self._pieces.append(event.data)
        if not event.message_finished:
            return None
        pieces, self._pieces, self._size = self._pieces, [], 0
        if isinstance(event, TextMessage):
            return {"type": "websocket.receive", "text": "".join(pieces), "bytes": None}  # type: ignore[arg-type]
        return {"type": "websocket.receive", "bytes": b"".join(pieces), "text": None}  # type: ignore[arg-type]

    # -- to the client ------------------------------------------------------------------------------------------------

    async def send(self, message: AsgiMessage) -> None:
        """Takes a message of the application."""
        match message["type"]:
            case "websocket.accept" if not self.answered:
                await self._accept(message.get("subprotocol"), message.get("headers", ()))
            case "websocket.send" if self.accepted:
                data = message.get("bytes")
                await self._write(TextMessage(data=message["text"]) if data is None else BytesMessage(data=data))
            case "websocket.close" if self.accepted:
                await self.close(int(message.get("code", 1000)), message.get("reason") or "")
            case "websocket.close" if not self.answered:
                self.answered = True
                await self._respond(403, [], b"")
            case "websocket.http.response.start" if not self.answered:
                self._refusal = message
                self.answered = True
            case "websocket.http.response.body" if self._refusal:
                self._refusal_body += message.get("body", b"")
                if not message.get("more_body", False):
                    headers = [field for field in self._refusal.get("headers", ()) if field[0] != b"content-length"]
                    await self._respond(self._refusal["status"], headers, self._refusal_body)
            case kind:
                raise RuntimeError(f"unexpected ASGI message: {kind}")

    async def _accept(self, subprotocol: str | None, headers: Iterable[Header]) -> None:
        fields = [
            (b"upgrade", b"websocket"),
            (b"connection", b"Upgrade"),
            (b"sec-websocket-accept", generate_accept_token(self._key)),
            *([(b"sec-websocket-protocol", subprotocol.encode("latin-1"))] if subprotocol is not None else []),
            *headers,
        ]
        head = b"".join([b"%b: %b\r\n" % field for field in fields])
        if head.count(b"\n") != len(fields) or head.count(b"\r") != len(fields):
            raise RuntimeError("a header has a line break in it")
        self.accepted = self.answered = True
        await self._stream.write(b"HTTP/1.1 101 Switching Protocols\r\n" + head + b"\r\n")

    async def _write(self, event: Any) -> None:  # Any: wsproto's events to send have no narrower type
        """Sends a frame; does nothing once the WebSocket has ended."""
        try:
            data = self._connection.send(event)
        except LocalProtocolError:
            await trio.lowlevel.checkpoint_if_cancelled()
            return
        await self._stream.write(data)

    async def close(self, code: int = _INTERNAL_ERROR, reason: str = "") -> None:
        """Ends the WebSocket, unless it has ended. A reason is cut to what a frame can hold."""
        cut = reason.encode()[:_MAX_REASON_BYTES].decode(errors="ignore")
        await self._write(CloseConnection(code=code, reason=cut or None))
