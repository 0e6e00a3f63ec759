"""Callbacks: POST the result of a hook's run to a URL, signed by the Standard Webhooks scheme.

The URL of a callback may come from the sender of a message, so a callback must not reach the internal network (SSRF).
It connects to public addresses only, unless the hook allows others. Each address is checked right before the connection
(`upstream.connect.dial`), after the name has been resolved, so DNS rebinding does not get round the check. Redirects
are not followed. No proxy is used, since a proxy would open the connection itself.

**Source:** Standard Webhooks specification 1.0.0: the headers, and that every status but 2xx and 410 is worth another
attempt.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import math
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping

import attrs
import httpx2
import trio

from trigate.concurrency.notify import open_service
from trigate.config.report_sections import AlertsConfig
from trigate.config.secrets import Secret
from trigate.config.sections import HookConfig
from trigate.runs.outbox import Outbox, Receipt
from trigate.signatures import sign_standard
from trigate.store.records import Delivery
from trigate.upstream.connect import Refused
from trigate.upstream.public_addresses import why_not_public
from trigate.upstream.transport import SocketTransport
from trigate.version import __version__

CONNECT_S = 10.0
"""How long connecting may take, including name resolution and TLS, in seconds."""
_READ_S = 2.0
"""How long the body of a response may take, in seconds. Only its status counts; the body is read to reuse the
connection."""
_READ_BYTES = 16_384
ALERTS = "!alerts"
"""The channel of alerts in the outbox; no hook can have this name. Their URL is in the configuration, so they may go to
any address."""
_NO_ALERTS = AlertsConfig()


def seconds_of(retry_after: str, *, at: float) -> float | None:
    """The value of a ``Retry-After`` header, in seconds from ``at``; None = the header is invalid.

    Args:
        retry_after: The header: seconds, or a date.
        at: The current POSIX time, in seconds.

    >>> seconds_of("120", at=0.0), seconds_of("Thu, 01 Jan 1970 00:02:00 GMT", at=60.0), seconds_of("soon", at=0.0)
    (120.0, 60.0, None)

    **Source:** RFC 9110, section 10.2.3.
    """
    text = retry_after.strip()
    if text.isascii() and text.isdecimal():
        return float(text[:10])  # ten digits are more than any pause; more could overflow
    try:
        date = email.utils.parsedate_to_datetime(text)
        if date.tzinfo is None:  # "-0000"
            date = date.replace(tzinfo=datetime.UTC)
        return max(date.timestamp() - at, 0.0)
    except (ValueError, TypeError, IndexError, OverflowError):  # the parser raises any of these on invalid input
        return None


@attrs.frozen
class _Sender:
    """How the deliveries of a hook, or alerts, are signed, and the transport that decides where they may go."""

    secret: Secret
    transport: httpx2.AsyncBaseTransport


@attrs.define(eq=False, kw_only=True)
class Callbacks:
    """Delivers the results of the runs of all hooks, and alerts (`outbox.Carrier`). Made by `open_callbacks`."""

    _public: httpx2.AsyncBaseTransport
    _anywhere: httpx2.AsyncBaseTransport
    _now: Callable[[], float]
    _senders: dict[str, _Sender] = attrs.field(factory=dict, init=False)

    def __repr__(self) -> str:
        return f"<Callbacks of {len(self._senders)} channels>"

    def apply(self, hooks: Mapping[str, HookConfig], outbox: Outbox, alerts: AlertsConfig = _NO_ALERTS) -> None:
        """Follows a changed configuration: delivers for these hooks, and alerts, from now on. Deliveries for a hook
        that is gone stay pending until it is configured again. Synchronous."""
        for name in self._senders:
            if outbox.carriers.get(name) is self:  # otherwise a channel has taken the name
                del outbox.carriers[name]
        self._senders = {
            name: _Sender(hook.callback_secret, self._anywhere if hook.callback_private else self._public)
            for name, hook in hooks.items()
            if hook.enabled and hook.callback_secret is not None
        }
        if alerts.url is not None and alerts.secret is not None:
            self._senders[ALERTS] = _Sender(alerts.secret, self._anywhere)
        for name in self._senders:
            outbox.carriers[name] = self
        outbox.wake()

    async def deliver(self, delivery: Delivery) -> Receipt:
        """Makes one attempt: signs the body, sends it and waits for the status."""
        sender = self._senders[delivery.channel]
        assert sender.secret.literal is not None, "the configuration has revealed it"
        at = math.floor(self._now())
        headers = {
            "content-type": "application/json",
            "user-agent": f"trigate/{__version__}",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(at),
            "webhook-signature": sign_standard(sender.secret.literal, delivery.id, at, delivery.body),
        }
        try:
            request = httpx2.Request(
                "POST",
                delivery.target,
                headers=headers,
                content=delivery.body,
                extensions={"timeout": {"connect": CONNECT_S}},
            )
            response = await sender.transport.handle_async_request(request)
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            await trio.lowlevel.checkpoint()
            return _receipt_without_response(error)
        await _read_rest(response)
        return _receipt_of(response, at=self._now())


def _receipt_without_response(error: httpx2.TransportError | httpx2.InvalidURL) -> Receipt:
    match error:
        case httpx2.InvalidURL() | httpx2.UnsupportedProtocol():
            return Receipt(delivered=False, error="the target is not an http:// or https:// URL")
        case Refused():
            # Nothing has been sent, and the cause (a DNS record, a setting) may be corrected.
            return Receipt(delivered=False, again=True, error=f"{error} (callback_private = true would allow it)")
        case httpx2.ConnectError() | httpx2.ConnectTimeout():
            return Receipt(delivered=False, again=True, error=f"no connection: {error}")
    return Receipt(delivered=False, again=True, error=f"no answer: {error}", unsure=True)


def _receipt_of(response: httpx2.Response, *, at: float) -> Receipt:
    status = response.status_code
    if 200 <= status < 300:
        return Receipt(delivered=True, status=status)
    if status == 410:
        return Receipt(delivered=False, status=status, error="the receiver asked for no more deliveries (410)")
    error = f"the receiver answered {status}"
    if 300 <= status < 400:
        error += ", and redirects are not followed"
    after_s = seconds_of(response.headers.get("retry-after", ""), at=at)
    return Receipt(delivered=False, again=True, status=status, error=error, after_s=after_s)


async def _read_rest(response: httpx2.Response) -> None:
    """Reads the body of a response, so that its connection can be reused. If the body is too long or too slow, the
    connection is closed instead."""
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    try:
        with trio.move_on_after(_READ_S), contextlib.suppress(httpx2.TransportError):
            read = 0
            async for piece in response.stream:
                read += len(piece)
                if read > _READ_BYTES:
                    break
    finally:
        await response.aclose()  # noqa: ASYNC102 - does not block


@contextlib.asynccontextmanager
async def open_callbacks(
    *, trust: Callable[[], ssl.SSLContext], now: Callable[[], float] = time.time
) -> AsyncIterator[Callbacks]:
    """Opens the service; `Callbacks.apply` sets its hooks. Open it before the outbox, whose attempts in progress use it
    until the outbox has closed.

    Args:
        trust: Returns the TLS context with the certificate authorities.
        now: Returns the POSIX time, in seconds.
    """
    async with (
        SocketTransport(trust=trust, refuse=why_not_public) as public,
        SocketTransport(trust=trust) as anywhere,
        open_service(public.run, anywhere.run),
    ):
        yield Callbacks(public=public, anywhere=anywhere, now=now)
