"""The body of a request: read from ASGI's ``receive``, decoded, bounded, and counted.

A body is bounded in its size, in the size that it decodes to, and in time. And the bodies of all requests of a worker
have a budget: what they take counts from the first byte until the request is over (`RequestBody.release`). Three
settings of ``[limits]`` bound the sum:

- ``bodies_bytes``: all bodies, including those of the calls in flight;
- ``arriving_bytes``: the bodies that are still arriving, so that slow or endless uploads cannot fill the memory;
- a quarter of that for bodies whose sender is not known yet (a webhook is signed over its body).

A body that is the only one is let in whatever the sum: its own limit is another setting.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import trio

from trigate.config.sections import LimitsConfig
from trigate.content_coding import Decoder, NotDecodable
from trigate.errors import BadRequest, BodyTimeout, Draining, Overloaded, TooLarge

if TYPE_CHECKING:  # hypercorn imports multiprocessing
    from hypercorn.typing import ASGIReceiveCallable

_PIECE_OVERHEAD_BYTES = 64
"""What Python adds to a piece that is kept as it is (`RequestBody.hold`): many one-byte pieces take far more than their
bytes."""
_LINGER_BYTES = 256 * 1024 * 1024
_LINGER_S = 2.0


@attrs.define(eq=False)
class BodyBudget:
    """What the request bodies of one worker take.

    Attributes:
        held_bytes: All of them.
        arriving_bytes: Those that are still arriving.
        unverified_bytes: Those of them whose sender is not known yet.
    """

    held_bytes: int = 0
    arriving_bytes: int = 0
    unverified_bytes: int = 0
    _reading: set[trio.CancelScope] = attrs.field(init=False, factory=set)
    _is_refused: bool = attrs.field(init=False, default=False)

    @contextmanager
    def reading(self, scope: trio.CancelScope) -> Iterator[None]:
        """A block in which a body arrives; `refuse` cancels the scope."""
        self._reading.add(scope)
        try:
            yield
        finally:
            self._reading.remove(scope)

    def refuse(self) -> None:
        """The gateway shuts down: refuses the bodies that are still arriving."""
        self._is_refused = True
        for scope in self._reading:
            scope.cancel()

    def check_refused(self) -> None:
        """Raises `Draining` after `refuse`."""
        if self._is_refused:
            raise Draining("The gateway is shutting down, and the request had not arrived yet. Try again.")


@attrs.frozen(kw_only=True)
class BodyLimits:
    """The limits of one body.

    Attributes:
        max_bytes: Its largest size, as it arrives and as it is decoded.
        timeout_s: How long it may take to arrive; 0 = any time.
        bytes_per_s: A body that arrives at this rate may take longer; 0 = none may.
        is_verified: Whether its sender is known.
        timeout_name: The setting of ``timeout_s``, for the message.
    """

    max_bytes: int
    timeout_s: float
    bytes_per_s: float = 0.0
    is_verified: bool = True
    timeout_name: str = "limits.body_timeout_s"

    @classmethod
    def of(cls, limits: LimitsConfig, *, max_bytes: int, is_verified: bool = True) -> BodyLimits:
        """Makes the limits of a body from the configuration."""
        if is_verified:
            rate = limits.body_bytes_per_s
            return cls(max_bytes=max_bytes, timeout_s=limits.body_timeout_s, bytes_per_s=rate)
        name = "limits.unverified_body_timeout_s"
        timeout_s = limits.unverified_body_timeout_s
        return cls(max_bytes=max_bytes, timeout_s=timeout_s, is_verified=False, timeout_name=name)


class RequestBody:
    """The body of one request.

    Attributes:
        complete: The whole body has been received, or the client has disconnected.
    """

    _held_bytes = _arriving_bytes = _unverified_bytes = 0

    def __init__(self, receive: ASGIReceiveCallable, budget: BodyBudget) -> None:
        self._receive = receive
        self._budget = budget
        self.complete = False

    async def receive(self) -> Any:  # Any: hypercorn's union of ASGI messages
        """Receives the next message."""
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self.complete = True
        return message

    async def read(self, body: BodyLimits, limits: LimitsConfig, *, coding: str = "identity") -> bytes | None:
        """Reads and decodes the whole body; None = the client disconnected meanwhile.

        It counts as arriving until `keep`.

        Args:
            body: The limits of this body.
            limits: The limits of all of them.
            coding: Its content coding; one of `trigate.content_coding.CODINGS`, or ``identity``.

        Raises:
            BadRequest: It cannot be decoded.
            TooLarge: It is larger than its limit.
            BodyTimeout: It did not arrive in time.
            Overloaded: There is no room for it.
            Draining: The gateway shuts down before it has arrived.
        """
        decoder = Decoder(coding) if coding != "identity" else None
        began_at = trio.current_time()
        timeout_s = body.timeout_s or math.inf
        first, whole = b"", None
        size = received = 0
        with trio.move_on_after(timeout_s) as scope, self._budget.reading(scope):
            while not self.complete:
                if received:  # so that a hundred uploads delay other requests by a hundred pieces, and not by more
                    await trio.lowlevel.checkpoint()
                message = await self.receive()
                if message["type"] != "http.request":
                    return None
                piece = message.get("body", b"")
                received += len(piece)
                if body.bytes_per_s:
                    timeout_s = max(timeout_s, received / body.bytes_per_s)
                    scope.deadline = began_at + timeout_s
                if decoder is not None:
                    decoder.feed(piece)
                    piece = await _next_piece(decoder)
                while piece:
                    size += len(piece)
                    if max(size, received) > body.max_bytes:
                        raise too_large(body.max_bytes)
                    self._grow(len(piece), body, limits)
                    if whole is not None:
                        whole.write(piece)
                    elif first:
                        whole = io.BytesIO(first)
                        whole.seek(0, io.SEEK_END)
                        whole.write(piece)
                        first = b""
                    else:
                        first = piece
                    piece = await _next_piece(decoder) if decoder is not None else b""
            if decoder is not None and received and not decoder.complete:
                raise BadRequest(f"The body ends before its content coding ({coding}) does.")
            # BytesIO gives its buffer away, which grows in place: a list of pieces and what joins them would take the
            # body's memory twice, and the heap of many small pieces stays large.
            return whole.getvalue() if whole is not None else first
        self._budget.check_refused()
        raise BodyTimeout(f"The body did not arrive within {timeout_s:g} s ({body.timeout_name}).")

    async def next_piece(self, timeout_s: float, limits: LimitsConfig) -> bytes | None:
        """Receives the next piece of a body that is not kept, which may be empty; None = the client has disconnected.

        Args:
            timeout_s: How long that may take.

        Raises:
            BodyTimeout: It did not arrive in time.
            Draining: The gateway shuts down before it has arrived.
        """
        with trio.move_on_after(timeout_s) as scope, self._budget.reading(scope):
            message = await self.receive()
            return message.get("body", b"") if message["type"] == "http.request" else None
        self._budget.check_refused()
        raise BodyTimeout(
            f"The body did not arrive within {limits.body_timeout_s:g} s, or at {limits.body_bytes_per_s:g} bytes a "
            "second (limits.body_timeout_s, limits.body_bytes_per_s)."
        )

    def hold(self, size: int, limits: LimitsConfig) -> None:
        """Takes the memory for a piece of a body that is kept for a while, until `release`.

        Raises:
            Overloaded: There is no room for it.
        """
        self._grow(size + _PIECE_OVERHEAD_BYTES, BodyLimits.of(limits, max_bytes=limits.body_bytes), limits)

    async def drain(self) -> None:
        """Reads and discards the rest of the body, at most 256 MiB in 2 s."""
        drained = 0
        with trio.move_on_after(_LINGER_S):
            while not self.complete and drained < _LINGER_BYTES:
                drained += len((await self.receive()).get("body", b""))
                await trio.lowlevel.checkpoint()  # see `read`

    # -- the budget ---------------------------------------------------------------------------------------------------

    def _grow(self, size: int, body: BodyLimits, limits: LimitsConfig) -> None:
        """Takes the memory for an arriving piece.

        Raises:
            Overloaded: There is no room for it.
        """
        budget = self._budget
        budget.held_bytes += size
        self._held_bytes += size
        budget.arriving_bytes += size
        self._arriving_bytes += size
        if not body.is_verified:
            budget.unverified_bytes += size
            self._unverified_bytes += size
            if self._unverified_bytes < budget.unverified_bytes > limits.arriving_bytes // 4:
                raise _no_room(limits.arriving_bytes // 4, "a quarter of limits.arriving_bytes")
        if self._arriving_bytes < budget.arriving_bytes > limits.arriving_bytes:
            raise _no_room(limits.arriving_bytes, "limits.arriving_bytes")
        if self._held_bytes < budget.held_bytes > limits.bodies_bytes:
            raise _no_room(limits.bodies_bytes, "limits.bodies_bytes")

    def keep(self, size: int, limits: LimitsConfig) -> None:
        """The whole body has been received and examined, and takes ``size`` bytes until `release`.

        Raises:
            Overloaded: There is no room for it.
        """
        self.release()
        self._held_bytes = size
        self._budget.held_bytes += size
        if size < self._budget.held_bytes > limits.bodies_bytes:
            raise _no_room(limits.bodies_bytes, "limits.bodies_bytes")

    def release(self) -> None:
        """Gives the memory back: the body is needed no more. A second call does nothing."""
        budget = self._budget
        budget.held_bytes -= self._held_bytes
        self._held_bytes = 0
        if self._arriving_bytes:
            budget.arriving_bytes -= self._arriving_bytes
            budget.unverified_bytes -= self._unverified_bytes
            self._arriving_bytes = self._unverified_bytes = 0


async def _next_piece(decoder: Decoder) -> bytes:
    """Decodes a piece. A checkpoint, since a few received bytes may become many pieces."""
    await trio.lowlevel.checkpoint()
    try:
        return decoder.next_piece()
    except NotDecodable as error:
        raise BadRequest(f"The body cannot be decoded: {error}.") from None


def too_large(max_bytes: int) -> TooLarge:
    """Makes the error for a body over the limit."""
    return TooLarge(f"The body is larger than {max_bytes} bytes, which is the limit here.")


def _no_room(limit: int, name: str) -> Overloaded:
    return Overloaded(f"The request bodies of this worker take up {limit} bytes, which is their limit ({name}).")
