"""A WebSocket between a client and an upstream: both directions in one nursery, so that the end of one ends both.

It is the answer to a request that is passed through (`passed_call`). COMMIT is the acceptance of the client's
handshake: before it, a failure is a status, and another target may be tried.
"""

from __future__ import annotations

import math

import attrs
import trio

from trigate.errors import GatewayError
from trigate.exchange.answers import Claim, Count
from trigate.exchange.attempt import Attempt
from trigate.exchange.outcome import Phase
from trigate.exchange.sink import ClientSocket, Sink
from trigate.openai.answer import Usage, find_usage, sum_of
from trigate.openai.raw_json import decode_any
from trigate.upstream.reply import Reply

SWITCHING_PROTOCOLS = 101


@attrs.define(eq=False, kw_only=True)
class WebSocketAnswer:
    """Moves messages in both directions, until one end closes."""

    client: ClientSocket
    claim: Claim
    count: Count

    async def relay(self, attempt: Attempt, reply: Reply, sink: Sink) -> bytes | None:
        """Moves the messages. As `Answer.relay`."""
        from trigate.upstream.websocket import WebSocketReply  # here: its library takes long to import, and few use it

        assert isinstance(reply, WebSocketReply), "the opening is that of a WebSocket"
        upstream, client = reply.socket, self.client
        if not self.claim(attempt):
            return None
        attempt.phase = Phase.STREAMING
        client.subprotocol = upstream.subprotocol
        await attempt.start(sink, SWITCHING_PROTOCOLS, [])
        attempt.last_byte_at = math.inf  # a WebSocket may be silent for as long as it likes
        error: GatewayError | None = None
        async with trio.open_nursery() as nursery:

            async def send_on() -> None:
                nonlocal error
                try:
                    while (message := await client.receive_message()) is not None:
                        await upstream.send_message(message)
                    await upstream.close(client.close_code)
                except GatewayError as raised:  # not through the nursery, which would wrap it in a group
                    error = error or raised
                nursery.cancel_scope.cancel()

            nursery.start_soon(send_on)
            try:
                while (message := await upstream.receive_message()) is not None:
                    await self._send(attempt, message, sink)
                client.close_code, client.close_reason = upstream.close_code, upstream.close_reason
            except GatewayError as raised:
                error = error or raised
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error
        return b""

    async def _send(self, attempt: Attempt, message: str | bytes, sink: Sink) -> None:
        data = message.encode() if isinstance(message, str) else message
        if b'"response.done"' in data:
            attempt.usage = _sum(attempt.usage, data)
        self.count(len(data))
        self.client.sends_text = isinstance(message, str)
        await attempt.send(sink, data)


def _sum(before: Usage | None, event: bytes) -> Usage | None:
    """Adds the token counts of one answer of a session to those before it.

    >>> _sum(Usage(1, 2), b'{"type": "response.done", "response": {"usage": {"input_tokens": 3, "output_tokens": 4}}}')
    Usage(prompt_tokens=4, completion_tokens=6)
    """
    value = decode_any(event)
    found = find_usage(value) if isinstance(value, dict) and value.get("type") == "response.done" else None
    if found is None:
        return before
    return sum_of([before, found]) if before is not None else found
