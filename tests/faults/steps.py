"""What a hostile provider can do, as values; and what a client may get, as values. `catalogue` is made of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs

# -- what the provider does -------------------------------------------------------------------------------------------


@attrs.frozen
class Send:
    """Sends bytes, as they are. `DATE` in them is replaced by the HTTP date in 30 seconds."""

    data: bytes


@attrs.frozen
class Pause:
    """Says nothing for some seconds."""

    seconds: float


@attrs.frozen
class Repeat:
    """Sends the same again and again until the other side leaves, with a pause before each."""

    data: bytes
    every_s: float = 0.0


@attrs.frozen
class Spell:
    """Sends bytes one by one, with a pause after each."""

    data: bytes
    every_s: float


@attrs.frozen
class Hang:
    """Says nothing more, and reads until the other side leaves."""


@attrs.frozen
class Fin:
    """Ends the connection in order."""


@attrs.frozen
class Rst:
    """Ends the connection with a reset."""


Step = Send | Pause | Repeat | Spell | Hang | Fin | Rst
Script = tuple[Step, ...]
"""One that ends without `Hang`, `Fin` or `Rst` is followed by the next request on the same connection."""

DATE = b"<the date in 30 s>"

Place = Literal[
    "plain",
    "nobody listens",
    "accepts nothing",
    "unknown name",
    "name server hangs",
    "one address of two",
    "TLS",
    "TLS, unknown authority",
    "TLS, expired",
    "TLS, other name",
    "https to plain",
]
"""Where the upstream is, and what speaks before HTTP does. ``https to plain``: TLS is spoken to what knows none."""


# -- what the client gets ---------------------------------------------------------------------------------------------


@attrs.frozen
class Whole:
    """200 and all of an answer.

    Attributes:
        body: Exactly.
        tokens: What is accounted of it: prompt and completion; None = nothing was reported.
        note: What people should know of it.
    """

    body: bytes
    tokens: tuple[int, int] | None = None
    note: str = ""

    @property
    def outcome(self) -> str:
        """How it is accounted."""
        return "complete"

    def __str__(self) -> str:
        return ", ".join(filter(None, ("the whole answer", self.note)))


@attrs.frozen
class Refusal:
    """An error before COMMIT: a status and an error object.

    Attributes:
        code: The ``code`` of the object.
        outcome: What the gateway calls it, where a provider's own ``code`` is passed on.
        says: Part of the message.
        phase: Of a deadline.
        headers: That must be there: with this value, one of these values, or (None) not at all.
        body: Exactly, where a provider's own is passed on.
        final: No other target is tried: the call itself was refused, or its time is over.
    """

    status: int
    code: str | None
    outcome: str = attrs.field(default=attrs.Factory(lambda self: self.code, takes_self=True), kw_only=True)
    says: str = attrs.field(default="", kw_only=True)
    phase: str | None = attrs.field(default=None, kw_only=True)
    headers: Mapping[str, str | tuple[str, ...] | None] = attrs.field(factory=dict, kw_only=True)
    body: bytes | None = attrs.field(default=None, kw_only=True)
    final: bool = attrs.field(default=False, kw_only=True)

    def __str__(self) -> str:
        told = [f"{self.status} {_written(self)}" if self.body is None else f"{self.status}, its own body"]
        if self.phase is not None:
            told.append(f"phase `{self.phase}`")
        for name, value in self.headers.items():
            first = value if isinstance(value, str) else value[-1] if value is not None else None
            if first is None:
                told.append(f"no `{name}`")
            else:
                told.append(f"`{name}: {first}`" if self.body is None else f"`{name}` as it came")
        return ", ".join(told)


@attrs.frozen
class Cut:
    """An error after COMMIT: 200, what came, and an error event in the place of ``[DONE]``.

    Attributes:
        body: What came, exactly; of an endless stream, what is repeated in it.
        code: The ``code`` of the error.
        outcome: As that of `Refusal`.
    """

    body: bytes
    code: str | None
    outcome: str = attrs.field(default=attrs.Factory(lambda self: self.code, takes_self=True), kw_only=True)
    says: str = attrs.field(default="", kw_only=True)
    phase: str | None = attrs.field(default=None, kw_only=True)
    endless: bool = attrs.field(default=False, kw_only=True)

    def __str__(self) -> str:
        phase = f", phase `{self.phase}`" if self.phase is not None else ""
        return f"what came, then an error event {_written(self)}{phase}"


def _written(error: Refusal | Cut) -> str:
    return f"`{error.code}`" if error.code == error.outcome else "with its own `code`"


Expected = Whole | Refusal | Cut


# -- a fault ----------------------------------------------------------------------------------------------------------

Case = Literal["one-stream", "one-json", "two-stream", "two-json", "continued-stream"]
"""One target; or a second one behind it that answers well; the same with ``on_truncation = "continue"``."""


@attrs.frozen(kw_only=True)
class Fault:
    """Something that a provider does wrong, or oddly.

    Attributes:
        name: In the words of people.
        stream: What it does when it is asked for a stream.
        json: What it does when it is asked for a JSON answer; None: the fault is one of streams.
        expected: What the client gets, case by case.
        at: Where it is.
        unread: It does not read the request.
        asks: What the client says besides the usual.
    """

    name: str
    stream: Script
    json: Script | None
    expected: Mapping[Case, Expected]
    at: Place = "plain"
    unread: bool = False
    asks: Mapping[str, object] = attrs.field(factory=dict)
