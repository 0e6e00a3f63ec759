"""What the adapter of a platform is, and what it is given: the seam between `channels` and the platforms.

An adapter is made once for a channel's configuration, and lives in every worker. `Adapter.run` is its supervised life:
whatever it raises ends nothing but itself, and it is called again later. In between, and beside it, the adapter
receives, shows and delivers.

What goes wrong with a platform is a `Trouble`, which is expected, or a `Refused`, which only a person can help. All
else that `run` raises is a defect, and logged as such.

**Secrets.** Some platforms want the token in the path of a URL. So requests are made here, below a client that would
log URLs; errors never have a URL in them; and the words of every error go through `Channel.words_of`, which takes the
channel's secrets out.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import attrs
import httpx2

from trigate.config.sections import ChannelConfig
from trigate.errors import Header, message_of
from trigate.runs.outbox import Carrier
from trigate.runs.request import LiveView

if TYPE_CHECKING:
    from trigate.gateway.gateway import Gateway

ChannelState = Literal["connected", "connecting", "disconnected", "disabled"]

Response = tuple[int, list[Header], bytes]
"""Status, headers and body of what is answered to a call of ``/hooks/NAME``."""

CONNECT_TIMEOUT_S = 10.0
_MAX_ANSWER_BYTES = 16 * 1024 * 1024


class Trouble(Exception):
    """The platform could not be reached, or could not do what it was asked. It may pass.

    Args:
        message: Without a secret in it; shown in ``/status``.
        after_s: When the platform wants to be asked again; None = it did not say.
        unsure: The platform may have done it.
    """

    def __init__(self, message: str, *, after_s: float | None = None, unsure: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.after_s = after_s
        self.unsure = unsure


class Refused(Trouble):
    """The platform does not take the token, or not any more."""


@attrs.frozen(kw_only=True)
class Answer:
    """What a platform answered.

    Attributes:
        headers: By lower-case name.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = attrs.field(repr=False)


class Channel:
    """A channel, as its adapter has it: what it is, how it stands, and the way out.

    Attributes:
        name, config: Of ``[channels.NAME]``, its secrets revealed.
        gateway: The services that an adapter uses: runs, store, workers.
        state, since: And since when, in POSIX seconds.
        last_error: The last one, also when it has passed.
    """

    def __init__(
        self,
        name: str,
        config: ChannelConfig,
        gateway: Gateway,
        transport: httpx2.AsyncBaseTransport,
        *,
        base_url: str,
    ) -> None:
        self.name = name
        self.config = config
        self.gateway = gateway
        self.base_url = base_url
        self.state: ChannelState = "connecting"
        self.since = time.time()
        self.last_error: str | None = None
        self._transport = transport
        self._secrets = tuple(each.literal for each in (config.token, *config.secrets) if each.literal)

    def __repr__(self) -> str:
        return f"<Channel {self.name} {self.config.type} {self.state}>"

    @property
    def token(self) -> str:
        """The bot's."""
        return self.config.token.literal or ""

    def note_connected(self) -> None:
        """The platform has just done what it was asked."""
        self._enter("connected")

    def note_trouble(self, error: str) -> None:
        """The platform has just not done what it was asked, and that is the platform's state, not the request's."""
        self.last_error = error
        self._enter("disconnected")

    def _enter(self, state: ChannelState) -> None:
        if state != self.state:
            self.state, self.since = state, time.time()

    def words_of(self, error: BaseException) -> str:
        """What is wrong, in words, without the channel's secrets."""
        return self.redacted(message_of(error))

    def redacted(self, text: str) -> str:
        """A text without the channel's secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "[redacted]")
        return text

    async def post(self, path: str, body: bytes, headers: Mapping[str, str], *, once: bool = False) -> Answer:
        """Sends one request to the platform, and reads its answer whole. How long that may take is the caller's.

        Args:
            path: Below the base URL, with its leading slash.
            once: It must not arrive twice. (Any other is sent again where an idle connection turns out to have ended.)

        Raises:
            Trouble: There is no answer; ``unsure`` where the request may have arrived.
        """
        try:
            request = httpx2.Request(
                "POST",
                self.base_url + path,
                headers={"accept-encoding": "identity", "user-agent": "trigate", **headers},
                content=body,
                extensions={"timeout": {"connect": CONNECT_TIMEOUT_S}, "trigate.once": once},
            )
            response = await self._transport.handle_async_request(request)
            try:
                pieces = []
                size = 0
                async for piece in response.aiter_raw():
                    size += len(piece)
                    if size > _MAX_ANSWER_BYTES:
                        raise Trouble(f"It answered with more than {_MAX_ANSWER_BYTES} bytes.", unsure=True)
                    pieces.append(piece)
            finally:
                with contextlib.suppress(httpx2.TransportError, OSError):
                    await response.aclose()
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            never = (httpx2.InvalidURL, httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
            raise Trouble(
                f"It cannot be reached: {self.words_of(error)}", unsure=not isinstance(error, never)
            ) from None  # the cause may know the URL
        return Answer(status=response.status_code, headers=response.headers, body=b"".join(pieces))


class Adapter(Carrier, LiveView, Protocol):
    """A platform. Made of a `Channel`."""

    default_base_url: ClassVar[str]
    """Where its API is, unless the configuration says."""

    def __init__(self, channel: Channel) -> None: ...

    async def run(self) -> None:
        """Lives: finds out whether the platform takes the token, reads it where it has to be read, for ever.

        Raises:
            Trouble: As its class says; the channel is then disconnected until `Channel.note_connected`, and this is
                called again after a pause.
        """

    async def receive(self, headers: Mapping[bytes, bytes], body: bytes) -> Response:
        """Takes one call of ``/hooks/NAME``, whose rate and size have been judged, and nothing else. Returns once
        what it brought is durable. In any worker, also while `run` is not running.

        Args:
            headers: By lower-case name, as `verification.Verifier.verify` takes them.

        Raises:
            GatewayError: It is not from the platform, or cannot be kept.
        """
