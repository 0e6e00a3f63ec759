"""An upload: the body of a request that goes upstream as it arrives.

At most one piece of it is in memory. The beginning of a form is an exception: it is kept until the field with the model
id has arrived, which decides where the form goes. It is bounded by ``limits.body_bytes``, counts in the budget of all
bodies, and is sent on first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from trigate.asgi.request_body import RequestBody
from trigate.config.sections import LimitsConfig
from trigate.errors import BadRequest
from trigate.openai.multipart import FormHead

MODEL = "model"
_FIELDS = (MODEL, "stream")


class Upload:
    """The body of one request. It is a `RequestStream` for the upstream.

    Args:
        body: Where it comes from.
        length_bytes: Its declared length; None = it has none.

    Attributes:
        begun: A piece has gone on.
        leave: Called when the client disconnects while a piece is waited for.
        on_arrived: Called when the whole body has arrived.
    """

    def __init__(self, body: RequestBody, limits: LimitsConfig, *, length_bytes: int | None) -> None:
        self._body = body
        self._limits = limits
        self._given_bytes = length_bytes
        self._form: FormHead | None = None
        self._model: bytes | None = None
        self._added_bytes = 0
        self._received = 0
        self._waited_s = 0.0
        self.begun = False
        self.leave: Callable[[], None] = lambda: None
        self.on_arrived: Callable[[], None] = lambda: None

    @property
    def length_bytes(self) -> int | None:
        """The length of what is sent; None = unknown."""
        return self._given_bytes + self._added_bytes if self._given_bytes is not None else None

    async def read_head(self, boundary: bytes) -> FormHead | None:
        """Receives the beginning of a form: up to its first file, or its end, and in any case up to the model id.

        Returns:
            What was found; None = the client has disconnected.

        Raises:
            BadRequest: It is no form, or the model id is too far behind its beginning.
            Overloaded: There is no room for the beginning.
            BodyTimeout, Draining: As `RequestBody.next_piece`.
        """
        self._form = form = FormHead(boundary, _FIELDS)
        while not (form.complete or self._body.complete or _is_enough(form)):
            piece = await self._next_piece()
            if piece is None:
                return None
            self._body.hold(len(piece), self._limits)
            form.feed(piece)
            if len(form.kept) > self._limits.body_bytes and not _is_enough(form):
                raise BadRequest(
                    f"The first {self._limits.body_bytes} bytes of the form (limits.body_bytes) have no field {MODEL}. "
                    "Send it before the file.",
                    param=MODEL,
                )
        return form

    def with_model(self, model: str) -> Upload:
        """Replaces the model id in the form, if it has one; before anything was sent."""
        form = self._form
        if form is not None and model and MODEL in form.fields:
            span, self._model = form.fields[MODEL], model.encode()
            self._added_bytes = len(self._model) - (span.end - span.start)
        return self

    async def receive(self) -> bytes | None:
        """Returns the next piece; None at the end. As `RequestStream.receive`."""
        self.begun = True
        form, self._form = self._form, None
        if form is not None and form.kept:
            if self._model is None:
                return bytes(form.kept)
            span, view = form.fields[MODEL], memoryview(form.kept)
            return b"".join((view[: span.start], self._model, view[span.end :]))
        self._body.release()  # what was kept has been sent
        while not self._body.complete:
            piece = await self._next_piece()
            if piece is None:
                self.leave()
                await trio.sleep_forever()  # until that has cancelled this task
            if piece:
                return piece
        self.on_arrived()
        return None

    async def _next_piece(self) -> bytes | None:
        """Receives the next piece; the time that the upstream takes for those before it does not count."""
        limits = self._limits
        allowed_s = limits.body_timeout_s or math.inf
        if limits.body_bytes_per_s:
            allowed_s = max(allowed_s, self._received / limits.body_bytes_per_s)
        since = trio.current_time()
        piece = await self._body.next_piece(max(0.0, allowed_s - self._waited_s), limits)
        self._waited_s += trio.current_time() - since
        self._received += len(piece or b"")
        return piece


def _is_enough(form: FormHead) -> bool:
    """Whether all is known of a form that the gateway acts on."""
    return MODEL in form.fields and (form.is_in_file or len(form.fields) == len(_FIELDS))
