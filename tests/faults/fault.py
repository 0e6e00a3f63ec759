"""The values of the catalogue: the steps of a faulty provider, what a client may get, and a fault made of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs

# -- what the provider does -------------------------------------------------------------------------------------------


@attrs.frozen
class Send:
    """Sends bytes unchanged, except that an HTTP date 30 seconds in the future replaces `DATE`."""

    data: bytes


@attrs.frozen
class Pause:
    """Sends nothing for some seconds."""

    seconds: float


@attrs.frozen
class Repeat:
    """Sends the same bytes until the client disconnects, with a pause before each time."""

    data: bytes
    every_s: float = 0.0


@attrs.frozen
class SendSlowly:
    """Sends bytes one by one, with a pause after each of them."""

    data: bytes
    every_s: float


@attrs.frozen
class Hang:
    """Sends nothing more, and reads until the client disconnects."""


@attrs.frozen
class Fin:
    """Closes the connection with a FIN."""


@attrs.frozen
class Rst:
    """Closes the connection with a RST."""


Step = Send | Pause | Repeat | SendSlowly | Hang | Fin | Rst
Script = tuple[Step, ...]
"""After a script without `Hang`, `Fin` or `Rst`, the connection takes the next request."""

DATE = b"<the date in 30 s>"

Endpoint = Literal[
    "plain",
    "closed port",
    "full accept queue",
    "unknown name",
    "name server hangs",
    "one address of two",
    "TLS",
    "TLS, unknown authority",
    "TLS, expired",
    "TLS, other name",
    "https to plain",
]
"""How the upstream can be reached. ``https to plain``: the gateway uses TLS, and the provider does not."""


# -- what the client gets ---------------------------------------------------------------------------------------------


@attrs.frozen
class Complete:
    """Status 200 and the complete answer.

    Attributes:
        body: The exact body.
        tokens: The recorded usage, prompt and completion; None = the provider reported none.
        note: A remark for the page.
    """

    body: bytes
    tokens: tuple[int, int] | None = None
    note: str = ""

    @property
    def outcome(self) -> str:
        """The recorded outcome."""
        return "complete"

    def __str__(self) -> str:
        return ", ".join(filter(None, ("the whole answer", self.note)))


@attrs.frozen
class Refusal:
    """An error before COMMIT: a status and an error object.

    Attributes:
        code: The ``code`` of the object.
        outcome: The recorded outcome, if a provider's own ``code`` is passed on.
        says: A part of the message.
        phase: The phase of a timeout.
        headers: Expected headers: one value, several allowed values, or None = absent.
        body: The exact body, if a provider's own body is passed on.
        final: No other target is tried: the call itself was refused, or its deadline has passed.
    """

    status: int
    code: str | int | None
    outcome: str = attrs.field(default=attrs.Factory(lambda self: self.code, takes_self=True), kw_only=True)
    says: str = attrs.field(default="", kw_only=True)
    phase: str | None = attrs.field(default=None, kw_only=True)
    headers: Mapping[str, str | tuple[str, ...] | None] = attrs.field(factory=dict, kw_only=True)
    body: bytes | None = attrs.field(default=None, kw_only=True)
    final: bool = attrs.field(default=False, kw_only=True)

    def __str__(self) -> str:
        told = [f"{self.status} {_code(self)}" if self.body is None else f"{self.status}, its own body"]
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
class StreamError:
    """An error after COMMIT: status 200, the events that arrived, and an error event instead of ``[DONE]``.

    Attributes:
        body: Exactly the events that arrived; of an endless stream, the bytes that repeat.
        code: The ``code`` of the error.
        outcome: The recorded outcome, if a provider's own ``code`` is passed on.
    """

    body: bytes
    code: str | None
    outcome: str = attrs.field(default=attrs.Factory(lambda self: self.code, takes_self=True), kw_only=True)
    says: str = attrs.field(default="", kw_only=True)
    phase: str | None = attrs.field(default=None, kw_only=True)
    endless: bool = attrs.field(default=False, kw_only=True)

    def __str__(self) -> str:
        phase = f", phase `{self.phase}`" if self.phase is not None else ""
        return f"what came, then an error event {_code(self)}{phase}"


def _code(error: Refusal | StreamError) -> str:
    return f"`{error.code}`" if error.code == error.outcome else "with its own `code`"


Expected = Complete | Refusal | StreamError


# -- a fault ----------------------------------------------------------------------------------------------------------

Case = Literal["one-stream", "one-json", "two-stream", "two-json", "continued-stream"]
"""One target; two targets, the second of which answers well; the same with ``on_truncation = "continue"``."""


@attrs.frozen(kw_only=True)
class Fault:
    """Something that a provider does wrong or unusually.

    Attributes:
        name: The description in the page.
        stream: The script for a request of a stream.
        json: The script for a request of a JSON answer; None if the fault exists only in streams.
        expected: What the client gets in each case.
        at: How the provider can be reached.
        unread: The provider does not read the request.
        asks: Additional fields of the request.
    """

    name: str
    stream: Script
    json: Script | None
    expected: Mapping[Case, Expected]
    at: Endpoint = "plain"
    unread: bool = False
    asks: Mapping[str, object] = attrs.field(factory=dict)
