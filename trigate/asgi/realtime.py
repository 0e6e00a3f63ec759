"""``/v1/realtime``: a client's WebSocket, which is relayed to an upstream. Any other WebSocket is refused.

It is an exchange like any request that is passed through. Before its handshake is accepted, a failure is a status.
After that, it is an event of the type ``error``, as OpenAI's API has it, and then the end of the WebSocket.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
import trio

from trigate.asgi.auth import authorize
from trigate.asgi.passthrough import asked_upstream, checked_model, path_with, query_pairs
from trigate.asgi.request import RequestHead
from trigate.dialects.errors import error_response
from trigate.errors import BadRequest, Draining, GatewayError, Header, WebSocketRefused
from trigate.exchange.client_response import ClientResponse
from trigate.exchange.exchange import Exchange
from trigate.exchange.request import ExchangeRequest, PassThrough
from trigate.exchange.websocket_answer import SWITCHING_PROTOCOLS
from trigate.gateway.gateway import Gateway
from trigate.keys.key import Key
from trigate.logs import log
from trigate.openai.passed_paths import REALTIME, is_realtime
from trigate.openai.request import Call
from trigate.tracebacks import drop_frames

_KEY_PREFIX = "openai-insecure-api-key."
_GOING_AWAY = 1001
_ABNORMAL = 1006
_INTERNAL_ERROR = 1011
_SERVICE_RESTART = 1012


class _Socket:
    """The client's end of a WebSocket, of any ASGI server: a `ClientSocket`, and a `send` for `ClientResponse`.

    Args:
        scope: ASGI's, of the type ``websocket``.

    Attributes:
        code: With which the client has closed; None = it has not.
        accepted: The handshake was accepted.
        is_closed: The end of the WebSocket has been sent.
    """

    def __init__(self, scope: Any, receive: Any, send: Any) -> None:  # Any: ASGI's, as in `application`
        self._receive = receive
        self._send = send
        self._may_refuse = "websocket.http.response" in (scope.get("extensions") or {})
        self._messages_in, self._messages = trio.open_memory_channel[str | bytes](0)
        # A key must not be sent on: it is the gateway's.
        self.subprotocols: Sequence[str] = [
            each for each in scope.get("subprotocols", ()) if not each.startswith(_KEY_PREFIX)
        ]
        self.subprotocol: str | None = None
        self.sends_text = True
        self.close_code = 1000
        self.close_reason = ""
        self.code: int | None = None
        self.accepted = self.is_closed = False

    async def pump(self, exchange: Exchange) -> None:
        """Receives the client's messages, one ahead, until it closes or leaves; notes both."""
        with self._messages_in:
            while (message := await self._receive())["type"] != "websocket.disconnect":
                text = message.get("text")
                await self._messages_in.send(text if text is not None else message["bytes"])
            self.code = self.close_code = int(message.get("code") or _ABNORMAL)
        if self.code == _ABNORMAL or not exchange.client or not exchange.client.committed:
            exchange.client_left()

    async def receive_message(self) -> str | bytes | None:
        """Returns the client's next message; None = it has closed."""
        try:
            return await self._messages.receive()
        except trio.EndOfChannel:
            return None

    async def send(self, message: Any) -> None:  # Any: ASGI's messages of a response
        """Sends what a response would be as what it is on a WebSocket."""
        if message["type"] == "http.response.start":
            await self._start(message["status"], message["headers"])
        elif self._may_refuse and not self.accepted:
            await self._send({**message, "type": "websocket.http.response.body"})
        elif self.accepted and message.get("more_body", False):
            data = message["body"]
            await self._send(
                {"type": "websocket.send", "text": data.decode(), "bytes": None}
                if self.sends_text
                else {"type": "websocket.send", "text": None, "bytes": data}
            )
        elif self.accepted:
            await self.close(self.close_code, self.close_reason)

    async def _start(self, status: int, headers: list[Header]) -> None:
        if status == SWITCHING_PROTOCOLS:
            self.accepted = True
            await self._send({"type": "websocket.accept", "subprotocol": self.subprotocol, "headers": headers})
        elif self._may_refuse:
            await self._send({"type": "websocket.http.response.start", "status": status, "headers": headers})
        else:
            await self._send({"type": "websocket.close", "code": 1000, "reason": None})

    async def close(self, code: int, reason: str) -> None:
        """Ends the WebSocket, unless it has ended."""
        if not self.is_closed and self.code is None:
            self.is_closed = True
            code = code if code not in (1005, _ABNORMAL) else 1000
            await self._send({"type": "websocket.close", "code": code, "reason": reason[:100]})

    async def tell(self, error: GatewayError) -> None:
        """Sends an error after the handshake was accepted, and ends the WebSocket."""
        if self.is_closed or self.code is not None:
            return
        event = {"type": "error", "error": {**error.payload, "event_id": None}}
        await self._send({"type": "websocket.send", "text": msgspec.json.encode(event).decode(), "bytes": None})
        await self.close(_SERVICE_RESTART if isinstance(error, Draining) else _INTERNAL_ERROR, error.code)


async def serve_websocket(gateway: Gateway, scope: Any, receive: Any, send: Any) -> None:  # Any: as above
    """Serves one WebSocket, or refuses it with a status, where the server allows that."""
    await receive()  # `websocket.connect`
    query: bytes = scope.get("query_string") or b""
    head = RequestHead({**scope, "method": "GET", "query_string": query})
    request_id = head.request_id()
    socket = _Socket(scope, receive, send)
    client = (scope.get("extensions") or {}).get("trigate.client")
    response = ClientResponse(socket.send, [(b"x-request-id", request_id.encode())], client)
    try:
        head.check()
        if not is_realtime(head.path):
            raise WebSocketRefused
        for offered in scope.get("subprotocols", ()):
            if offered.startswith(_KEY_PREFIX) and b"authorization" not in head.headers:  # from a browser
                head.headers[b"authorization"] = b"Bearer " + offered.removeprefix(_KEY_PREFIX).encode("latin-1")
        key = authorize(head, gateway.generations.config, gateway.keys)
        exchange = _exchange_for(gateway, head, query, socket, response, request_id, key)
    except GatewayError as error:
        drop_frames(error)
        log.info("refused", request_id=request_id, path=head.path, status=error.status, code=error.code)
        status, headers, body = error_response(error, "openai", request_id)
        await response.respond(status, headers, body)
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(socket.pump, exchange)
        await exchange.run(nursery)
        if exchange.error is not None and socket.accepted:
            await socket.tell(exchange.error)
        nursery.cancel_scope.cancel()


def _exchange_for(
    gateway: Gateway,
    head: RequestHead,
    query: bytes,
    socket: _Socket,
    response: ClientResponse,
    request_id: str,
    key: Key,
) -> Exchange:
    """Makes the exchange of a WebSocket.

    Raises:
        GatewayError: No upstream serves it, or the request is malformed.
    """
    if gateway.live.is_draining:
        raise Draining("The gateway is shutting down. Try again: another instance will answer.")
    if not query.isascii():
        raise BadRequest("The query must be percent-encoded.")
    generation = gateway.generations.current
    model = checked_model(dict(query_pairs(query)).get("model"))
    route = generation.passed_route(REALTIME.path, model=model, upstream=asked_upstream(head), is_new=True)
    return Exchange(
        request=ExchangeRequest(
            id=request_id,
            call=Call(
                endpoint=REALTIME, model=model or "", names_model=model is not None, stream=False, body=b"", fields={}
            ),
            generation=generation,
            headers={"x-request-id": request_id, **head.forwarded(REALTIME)},
            key=key,
            client_timeout_s=head.timeout_s(),
            passed=PassThrough(
                method="GET",
                route=route,
                path_for=partial(path_with, REALTIME.path, query),
                body_for=lambda model: b"",
                is_repeatable=True,
                socket=socket,
            ),
        ),
        services=gateway.exchange_services,
        client=response,
    )
