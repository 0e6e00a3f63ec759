"""The interface between the channel service and a platform: what an adapter implements, and what it gets.

An adapter is made once for each configuration of a channel, in every worker. `Adapter.run` is its supervised task: an
error that it raises stops only this task, which is started again after a pause. Independently of that task, the adapter
receives webhook calls, shows runs while they go on, and delivers replies.

Errors of a platform are `PlatformError`s, which are expected and may pass. `TokenRejected` needs an operator, and
`RequestRejected` concerns one request and not the channel. Any other exception from `run` is a defect, and is logged as
one.

**Secrets.** Some platforms want the token in the path of a URL. Therefore requests are sent here, below any client that
would log URLs; errors never contain a URL; and the text of every error passes through `Channel.describe` or
`Channel.redacted`, which remove the channel's secrets.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol

import attrs
import httpx2
import trio

from trigate.config.sections import ChannelConfig
from trigate.errors import Header
from trigate.logs import message_of
from trigate.runs.outbox import Carrier, Outbox
from trigate.runs.request import LiveView
from trigate.runs.service import Runs
from trigate.store.interface import Store
from trigate.workers.membership import Workers

ChannelState = Literal["connected", "connecting", "disconnected", "disabled"]

Response = tuple[int, list[Header], bytes]
"""Status, headers and body of the response to a call of ``/hooks/NAME``."""

CONNECT_TIMEOUT_S = 10.0
_MAX_ANSWER_BYTES = 16 * 1024 * 1024


class PlatformError(Exception):
    """The platform could not be reached, or could not do what it was asked. It may pass.

    Args:
        message: Without secrets; shown in ``/status``.
        after_s: Seconds until the platform accepts the next request; None = it did not say.
        unsure: The platform may have done what it was asked.
    """

    def __init__(self, message: str, *, after_s: float | None = None, unsure: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.after_s = after_s
        self.unsure = unsure


class TokenRejected(PlatformError):
    """The platform does not accept the token, or no longer does. An operator has to act."""


class RequestRejected(PlatformError):
    """The platform understood the request and will not do it, however often it is asked. The channel itself works.

    Args:
        code: The platform's own code for the reason.
        status: Of the HTTP response.
    """

    def __init__(self, message: str, *, code: str, status: int) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


@attrs.frozen(kw_only=True)
class PlatformAnswer:
    """The response of a platform to one request.

    Attributes:
        headers: By lower-case name.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class ChannelServices:
    """The services of the gateway that channels use.

    Attributes:
        handing_over: Set when this process begins to shut down: from then on, other processes read the platforms.
    """

    store: Store
    workers: Workers
    runs: Runs
    outbox: Outbox
    handing_over: trio.Event


@attrs.define(eq=False, repr=False)
class Channel:
    """One configured channel, as its adapter sees it: its settings, its state, and the connection to its platform.

    Attributes:
        name, config: Of ``[channels.NAME]``, with its secrets revealed.
        base_url: Of the platform's API, without a trailing slash.
        state, since: The state, and since when it has held, in POSIX seconds.
        last_error: The most recent error, also after it has passed.
    """

    name: str
    config: ChannelConfig
    services: ChannelServices
    _transport: httpx2.AsyncBaseTransport
    base_url: str = attrs.field(kw_only=True)
    state: ChannelState = attrs.field(default="connecting", init=False)
    since: float = attrs.field(factory=time.time, init=False)
    last_error: str | None = attrs.field(default=None, init=False)

    def __repr__(self) -> str:
        return f"<Channel {self.name} {self.config.type} {self.state}>"

    @property
    def token(self) -> str:
        """The bot's token."""
        return self.config.token.literal or ""

    def note_connected(self) -> None:
        """Records that the platform has just done what it was asked."""
        self._enter("connected")

    def note_disconnected(self, error: str) -> None:
        """Records that the platform failed, for a reason that is not a single request's.

        Args:
            error: Without secrets.
        """
        self.last_error = error
        self._enter("disconnected")

    def _enter(self, state: ChannelState) -> None:
        if state != self.state:
            self.state, self.since = state, time.time()

    def describe(self, error: BaseException) -> str:
        """The text of an error, without the channel's secrets."""
        return self.redacted(message_of(error))

    def redacted(self, text: str) -> str:
        """A text without the channel's secrets."""
        for secret in (self.config.token, *self.config.secrets):
            if secret.literal:
                text = text.replace(secret.literal, "[redacted]")
        return text

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str], *, at_most_once: bool = False
    ) -> PlatformAnswer:
        """Sends one request to the platform, and reads the whole response. The caller limits how long that may take.

        Args:
            path: Below the base URL, with its leading slash.
            at_most_once: The request must not arrive twice, so it is sent on a new connection. (Any other request is
                sent again if an idle connection turns out to be closed.)

        Raises:
            PlatformError: There is no response; ``unsure`` if the request may have arrived.
        """
        try:
            request = httpx2.Request(
                "POST",
                self.base_url + path,
                headers={"accept-encoding": "identity", "user-agent": "trigate", **headers},
                content=body,
                extensions={"timeout": {"connect": CONNECT_TIMEOUT_S}, "trigate.once": at_most_once},
            )
            response = await self._transport.handle_async_request(request)
            try:
                pieces = []
                size = 0
                async for piece in response.aiter_raw():
                    size += len(piece)
                    if size > _MAX_ANSWER_BYTES:
                        raise PlatformError(f"It answered with more than {_MAX_ANSWER_BYTES} bytes.", unsure=True)
                    pieces.append(piece)
            finally:
                with contextlib.suppress(httpx2.TransportError, OSError):
                    await response.aclose()
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            not_sent = (httpx2.InvalidURL, httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
            raise PlatformError(
                f"It cannot be reached: {self.describe(error)}", unsure=not isinstance(error, not_sent)
            ) from None  # the cause may contain the URL
        return PlatformAnswer(status=response.status_code, headers=response.headers, body=b"".join(pieces))


class Adapter(Carrier, LiveView, Protocol):
    """One channel on its platform. Constructed from a `Channel`."""

    default_base_url: ClassVar[str]
    """The base URL of the platform's API, unless the configuration sets another."""

    def __init__(self, channel: Channel) -> None: ...

    async def run(self) -> None:
        """Checks that the platform accepts the token, and reads the platform if it has to be read. Never returns.

        Raises:
            PlatformError: The channel is then disconnected until `Channel.note_connected`; `run` is called again after
                a pause.
        """

    async def receive(self, headers: Mapping[bytes, bytes], body: bytes) -> Response:
        """Takes one call of ``/hooks/NAME``, whose rate and size were checked, but not its signature. Returns once the
        message in it is durable. Called in any worker, also while `run` is not running.

        Args:
            headers: By lower-case name, as `signatures.Verifier.verify` takes them.

        Raises:
            GatewayError: The call is not from the platform, or its message cannot be stored.
        """
