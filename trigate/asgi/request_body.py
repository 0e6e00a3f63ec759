"""The body of a request: ASGI's ``receive``, counted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import trio

from trigate.errors import BodyTimeout, TooLarge

if TYPE_CHECKING:  # hypercorn imports multiprocessing
    from hypercorn.typing import ASGIReceiveCallable

_CONTROL_PLANE_BYTES = 1024 * 1024
_LINGER_BYTES = 256 * 1024 * 1024
_LINGER_S = 2.0


class RequestBody:
    """The request's body: ASGI's ``receive``, counted.

    Attributes:
        complete: The whole body has been received, or the client has disconnected.
    """

    def __init__(self, receive: ASGIReceiveCallable) -> None:
        self._receive = receive
        self._received_bytes = 0
        self.complete = False

    async def receive(self) -> Any:  # Any: hypercorn's union of ASGI messages
        """Receives the next message."""
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self.complete = True
        return message

    async def receive_bounded(self) -> Any:  # Any: as above
        """Receives a message for the control plane. A body over 1 MiB counts as a disconnect.

        (The control plane has no use for large bodies. Quart keeps the whole body in memory, and its own limit does
        not apply to chunked bodies.)
        """
        message = await self.receive()
        self._received_bytes += len(message.get("body", b""))
        return message if self._received_bytes <= _CONTROL_PLANE_BYTES else {"type": "http.disconnect"}

    async def read(self, *, max_bytes: int, timeout_s: float) -> bytes | None:
        """Reads the whole body; None = the client disconnected meanwhile.

        Raises:
            TooLarge: It is larger than ``max_bytes``.
            BodyTimeout: It did not end within ``timeout_s``.
        """
        pieces: list[bytes] = []
        size = 0
        with trio.move_on_after(timeout_s or math.inf):
            while True:
                message = await self.receive()
                if message["type"] != "http.request":
                    return None
                piece = message.get("body", b"")
                size += len(piece)
                if size > max_bytes:
                    raise too_large(max_bytes)
                pieces.append(piece)
                if self.complete:
                    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        raise BodyTimeout(f"The body did not arrive within {timeout_s:g} s (limits.body_timeout_s).")

    async def drain(self) -> None:
        """Reads and discards the rest of the body, at most 256 MiB in 2 s."""
        drained = 0
        with trio.move_on_after(_LINGER_S):
            while not self.complete and drained < _LINGER_BYTES:
                drained += len((await self.receive()).get("body", b""))


def too_large(max_bytes: int) -> TooLarge:
    """Makes the error for a body over the limit."""
    return TooLarge(f"The body is larger than {max_bytes} bytes, which is the limit here.")
