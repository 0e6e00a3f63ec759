"""Credentials that expire: fetched in a thread, renewed before they expire, one fetch at a time.

The libraries of the clouds block, and read files, environments and metadata servers. So they run in a thread, and never
while a request waits for something else: a credential that will expire soon is still used while its successor is
fetched beside the calls. Only a call that finds none waits for it.

The fetch belongs to no call, since every call shares its result: a service of the generation (`Credentials.run`) makes
it, and a call that is cancelled meanwhile stops nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import attrs
import trio

from trigate.concurrency.notify import RepeatedEvent, Wakeup
from trigate.errors import Unavailable
from trigate.logs import log

RENEW_BEFORE_S = 300.0
"""How long before its end a credential is renewed; half of its life, if that is shorter."""
UNUSED_BEFORE_S = 10.0
"""How long before its end a credential is no longer sent: the request has to arrive, and clocks differ."""
TIMEOUT_S = 30.0
"""How long a fetch may take."""
RETRY_S = 5.0
"""How long no fetch is tried again after one has failed: the calls meanwhile get its error."""
_DOUBT_S = 60.0
"""How often a refusal by the provider may renew a credential that has not expired."""
_MAX_MESSAGE_CHARS = 500

T = TypeVar("T")


class CredentialsError(Exception):
    """There are no credentials. The message says why, and what to do; the client sees it, so it holds no secret."""


@attrs.frozen
class Fetched(Generic[T]):
    """A credential as a library gave it.

    Attributes:
        expires_at: In seconds since the epoch; infinite = it is valid until further notice.
        secrets: The parts of it that no message may show.
    """

    value: T = attrs.field(repr=False)
    expires_at: float = math.inf
    secrets: tuple[str, ...] = attrs.field(default=(), repr=False)


class RequestAuth(Protocol):
    """Adds to each request of one upstream what proves who sends it."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """What is removed from messages of the provider."""

    async def headers(self, method: str, host: str, path: str, body: bytes) -> dict[str, str]:
        """Returns the header fields of a request, by names in lower case.

        Args:
            host: The value of its ``host`` field.
            path: Its target as it is sent, with its query.

        Raises:
            Unavailable: There are no credentials; nothing has been sent.
        """

    def note_refused(self) -> None:
        """The provider has refused the credentials: they are renewed, though they have not expired. Synchronous."""

    async def run(self) -> None:
        """Renews the credentials, until it is cancelled."""


class Credentials(Generic[T]):
    """The credential of one upstream.

    Args:
        fetch: Fetches it. Runs in a thread, and may block. Whatever it raises is the reason why there is none.
        upstream: The upstream's name, for messages.
        now: The time in seconds since the epoch.
    """

    def __init__(self, fetch: Callable[[], Fetched[T]], *, upstream: str, now: Callable[[], float] = time.time) -> None:
        self._fetch = fetch
        self._upstream = upstream
        self._now = now
        self._held: Fetched[T] | None = None
        self._renew_at = -math.inf
        self._doubt_at = -math.inf
        self._retry_at = -math.inf
        self._failure: str | None = None
        self._wanted = Wakeup()
        self._answered = RepeatedEvent()
        self._is_fetching = False
        # a fetch that hangs is abandoned, but no second one begins beside it
        self._one = trio.CapacityLimiter(1)

    def __repr__(self) -> str:
        state = self._failure or ("held" if self._held is not None else "not fetched yet")
        return f"<Credentials of {self._upstream}, {state}>"

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no message may show."""
        return self._held.secrets if self._held is not None else ()

    async def get(self) -> T:
        """Returns the credential: at once, unless there is none that has not expired.

        Raises:
            Unavailable: There is none; the message says why.
        """
        held, now = self._held, self._now()
        if held is not None and now < held.expires_at - UNUSED_BEFORE_S:
            if now >= self._renew_at:
                self._ask(now)
            return held.value
        if now >= self._retry_at:
            self._ask(now)
            await self._answered.wait()
            held = self._held
            if held is not None and self._failure is None:
                return held.value
        raise Unavailable(f"The upstream {self._upstream} has no credentials: {self._failure}", status=503)

    def note_refused(self) -> None:
        """The provider has refused the credential: it is renewed soon, and used until then."""
        now = self._now()
        if now >= self._doubt_at:
            self._renew_at = now

    def _ask(self, now: float) -> None:
        if not self._is_fetching and now >= self._retry_at:
            self._wanted.set()

    async def run(self) -> None:
        """Fetches the credential whenever a call needs it, until it is cancelled."""
        while True:
            await self._wanted.wait()
            self._is_fetching = True
            try:
                await self._renew()
            finally:
                self._is_fetching = False
            self._answered.set()

    async def _renew(self) -> None:
        failure: str | None = f"they could not be fetched within {TIMEOUT_S:g} s."
        with trio.move_on_after(TIMEOUT_S):
            try:
                fetched = await trio.to_thread.run_sync(self._fetch, abandon_on_cancel=True, limiter=self._one)
            except Exception as error:  # libraries raise what they like; no call must wait for ever for that
                failure = _sentence(error)
            else:
                failure = self._take(fetched)
        now = self._now()
        if failure is not None:
            self._retry_at = now + RETRY_S
            if failure != self._failure:
                log.warning("credentials_unavailable", upstream=self._upstream, error=failure)
        self._failure = failure

    def _take(self, fetched: Fetched[T]) -> str | None:
        now = self._now()
        life_s = fetched.expires_at - now
        if life_s <= UNUSED_BEFORE_S:
            return "those that were fetched have expired."
        self._held = fetched
        self._renew_at = fetched.expires_at - min(RENEW_BEFORE_S, life_s / 2)
        self._doubt_at = now + _DOUBT_S
        return None


def _sentence(error: Exception) -> str:
    """Returns what a library says, in one line."""
    text = " ".join(str(error).split())[:_MAX_MESSAGE_CHARS].rstrip(" .") or type(error).__name__
    return f"{text}." if isinstance(error, CredentialsError) else f"{type(error).__name__}: {text}."
