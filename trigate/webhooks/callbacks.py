"""Callbacks: how the result of a hook's run gets to a URL, signed by the Standard Webhooks scheme.

A callback is a POST that the gateway makes to where somebody else says. So it goes to public addresses only, unless the
hook allows others: each address is judged when it is about to be connected to (`dialing.dial`), after the name has been
looked up, and so no name can lead elsewhere. Redirects are not followed. No proxy is used: it would do the connecting.

**Source:** Standard Webhooks specification 1.0.0: the headers, the shape of the body, and that every answer but 2xx and
410 is worth another attempt.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import math
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping

import httpx2
import msgspec
import trio

from trigate import __version__
from trigate.config.sections import HookConfig
from trigate.runs.outbox import Outbox, Receipt
from trigate.signatures import sign_standard
from trigate.store.records import Delivery, RunState
from trigate.upstream.connect import Refused
from trigate.upstream.public_addresses import why_not_public
from trigate.upstream.transport import SocketTransport

CONNECT_S = 10.0
"""How long a connection may take, name and TLS included."""
_READ_S = 2.0
"""How long the body of an answer is waited for: its status has said everything."""
_READ_BYTES = 16_384


def callback_body(*, state: RunState, at: float, data: bytes) -> bytes:
    """Makes the body of a callback.

    Args:
        state: The run's, at its end.
        at: When that was, in POSIX seconds.
        data: The run as ``GET /hooks/NAME/runs/ID`` gives it, as JSON.

    >>> callback_body(state="completed", at=1674087231.5, data=b'{"id":"run_1"}').decode()
    '{"type":"run.completed","timestamp":"2023-01-19T00:13:51.500000Z","data":{"id":"run_1"}}'
    """
    moment = datetime.datetime.fromtimestamp(at, datetime.UTC).replace(tzinfo=None)
    timestamp = moment.isoformat(timespec="microseconds") + "Z"
    return msgspec.json.encode({"type": f"run.{state}", "timestamp": timestamp, "data": msgspec.Raw(data)})


def seconds_of(retry_after: str, *, at: float) -> float | None:
    """What a ``Retry-After`` header says, in seconds from ``at``; None = nothing.

    >>> seconds_of("120", at=0.0), seconds_of("Thu, 01 Jan 1970 00:02:00 GMT", at=60.0), seconds_of("soon", at=0.0)
    (120.0, 60.0, None)

    **Source:** RFC 9110, section 10.2.3.
    """
    text = retry_after.strip()
    if text.isascii() and text.isdecimal():
        return float(text[:10])  # longer than anybody waits
    try:
        moment = email.utils.parsedate_to_datetime(text)
        if moment.tzinfo is None:  # "-0000"
            moment = moment.replace(tzinfo=datetime.UTC)
        return max(moment.timestamp() - at, 0.0)
    except (ValueError, TypeError, IndexError, OverflowError):  # what that parser raises differs with its input
        return None


class Callbacks:
    """Delivers the results of all hooks' runs (`outbox.Carrier`). Made by `open_callbacks`."""

    def __init__(
        self, *, public: httpx2.AsyncBaseTransport, anywhere: httpx2.AsyncBaseTransport, now: Callable[[], float]
    ) -> None:
        self._public = public
        self._anywhere = anywhere
        self._now = now
        self._hooks: dict[str, HookConfig] = {}

    def __repr__(self) -> str:
        return f"<Callbacks of {len(self._hooks)} hooks>"

    def apply(self, hooks: Mapping[str, HookConfig], outbox: Outbox) -> None:
        """The configuration has changed: callbacks are made for these hooks from now on, as they say. What is for
        another one waits until that is there again. Synchronous."""
        for name in self._hooks:
            if outbox.carriers.get(name) is self:  # a channel may have taken the name
                del outbox.carriers[name]
        self._hooks = {name: hook for name, hook in hooks.items() if hook.enabled and hook.callback_secret is not None}
        for name in self._hooks:
            outbox.carriers[name] = self
        outbox.look()

    async def deliver(self, delivery: Delivery) -> Receipt:
        """Makes one attempt."""
        hook = self._hooks[delivery.channel]
        assert hook.callback_secret is not None
        assert hook.callback_secret.literal is not None
        at = math.floor(self._now())
        headers = {
            "content-type": "application/json",
            "user-agent": f"trigate/{__version__}",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(at),
            "webhook-signature": sign_standard(hook.callback_secret.literal, delivery.id, at, delivery.body),
        }
        transport = self._anywhere if hook.callback_private else self._public
        try:
            request = httpx2.Request(
                "POST",
                delivery.target,
                headers=headers,
                content=delivery.body,
                extensions={"timeout": {"connect": CONNECT_S}},
            )
            response = await transport.handle_async_request(request)
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            await trio.lowlevel.checkpoint()
            return _receipt_without_answer(error)
        await _read_to_its_end(response)
        return _receipt_of(response, at=self._now())


def _receipt_without_answer(error: httpx2.TransportError | httpx2.InvalidURL) -> Receipt:
    match error:
        case httpx2.InvalidURL() | httpx2.UnsupportedProtocol():
            return Receipt(delivered=False, error="the target is not an http:// or https:// URL")
        case Refused():
            # Nothing has gone out, and what stands in the way (a name server, a setting) may be put right.
            return Receipt(delivered=False, again=True, error=f"{error} (callback_private = true would allow it)")
        case httpx2.ConnectError() | httpx2.ConnectTimeout():
            return Receipt(delivered=False, again=True, error=f"no connection: {error}")
    return Receipt(delivered=False, again=True, error=f"no answer: {error}", unsure=True)


def _receipt_of(response: httpx2.Response, *, at: float) -> Receipt:
    status = response.status_code
    if 200 <= status < 300:
        return Receipt(delivered=True, status=status)
    if status == 410:
        return Receipt(delivered=False, status=status, error="the receiver wants no more (410)")
    error = f"the receiver answered {status}"
    if 300 <= status < 400:
        error += ", and redirects are not followed"
    after_s = seconds_of(response.headers.get("retry-after", ""), at=at)
    return Receipt(delivered=False, again=True, status=status, error=error, after_s=after_s)


async def _read_to_its_end(response: httpx2.Response) -> None:
    """Reads what is left of an answer, in bounds, so that its connection can be used again; else it is closed."""
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    try:
        with trio.move_on_after(_READ_S), contextlib.suppress(httpx2.TransportError):
            read = 0
            async for piece in response.stream:
                read += len(piece)
                if read > _READ_BYTES:
                    break
    finally:
        await response.aclose()  # noqa: ASYNC102 - never waits


@contextlib.asynccontextmanager
async def open_callbacks(
    *, trust: Callable[[], ssl.SSLContext], now: Callable[[], float] = time.time
) -> AsyncIterator[Callbacks]:
    """Opens the service; `Callbacks.apply` says for whom. It outlives the outbox, which ends in its own time.

    Args:
        trust: Gives the certificate authorities.
        now: Gives the POSIX time, in seconds.
    """
    async with (
        SocketTransport(trust=trust, refuse=why_not_public) as public,
        SocketTransport(trust=trust) as anywhere,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(public.run)
        nursery.start_soon(anywhere.run)
        try:
            yield Callbacks(public=public, anywhere=anywhere, now=now)
        finally:
            nursery.cancel_scope.cancel()
