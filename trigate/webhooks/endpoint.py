"""``POST /hooks/NAME``: what happens to a message between the socket and its run, in this order, and why in this one.

1. The name: which hook it is (404), or which channel's platform calls.
2. ``?token=`` is refused: what stands in a URL stands in logs.
3. The rate, before anything is read or computed for whoever exceeds it.
4. A gateway key or a bearer's secret, which need no body.
5. The body, in bounds.
6. The signature, on the bytes as they came.
7. A challenge of the platform is answered.
8. Only now what the bytes mean (`ingress`): the filter, the expressions, the action, the prompt.
9. The run is accepted: kept, under its idempotency key, or the older one is found that the key stands for.
10. It is done, in this request or beside it.

This room drives the client's `Downstream` itself, for the reasons that `connection` gives for the data plane.
"""

from __future__ import annotations

import functools
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qsl

import attrs
import msgspec
import trio

from trigate import signatures
from trigate.concurrency.rate_limiter import RateLimiter
from trigate.config import checks
from trigate.config.sections import Config, HookConfig
from trigate.errors import (
    BadRequest,
    Header,
    IdempotencyConflict,
    MethodNotAllowed,
    NotFound,
    RateLimited,
    RunStopped,
    UnsupportedMediaType,
    Unverified,
)
from trigate.exchange.exchange import STREAM_HEADERS, Downstream
from trigate.runs.execution import Unwatched
from trigate.runs.request import CLIENT_LEFT, RunRequest
from trigate.runs.service import RunHandle
from trigate.signatures import Verifier
from trigate.store.records import ENDED, Run
from trigate.webhooks import payload

if TYPE_CHECKING:
    from trigate.channels.adapter import Adapter
    from trigate.gateway.gateway import Gateway

_MAX_NAME_CHARS = 64
_KEY = re.compile(rb"[!-~]{1,256}")
_LAST_SEND_S = 2.0
_JSON: Header = (b"content-type", b"application/json")


@attrs.frozen(kw_only=True)
class Request:
    """The head of a request to a hook.

    Attributes:
        headers: By lower-case name.
        query: As it stands in the URL.
        client: The client's address; None = it has none.
        authorize: Gives the owner that the request's key stands for; raises as `access.authorize`.
    """

    name: str
    method: str
    headers: Mapping[bytes, bytes]
    query: bytes
    client: str | None
    authorize: Callable[[], str | None]


class Visit(Protocol):
    """A request that has been let in; its body is yet to be read."""

    body_bytes: int

    async def serve(self, body: bytes, down: Downstream) -> None:
        """Answers it. Cancelled when the client leaves.

        Raises:
            GatewayError: It cannot be served.
        """


@functools.lru_cache(maxsize=256)
def _verifier(scheme: signatures.Scheme, secrets: tuple[str, ...], tolerance_s: float) -> Verifier:
    return Verifier(scheme, secrets, tolerance_s=tolerance_s)


def _verifier_of(hook: HookConfig) -> Verifier | None:
    """What judges the requests of a hook; None = a key of the gateway does."""
    if hook.verification == "key":
        return None
    return _verifier(hook.verification, tuple(secret.literal or "" for secret in hook.secrets), hook.tolerance_s)


class Hooks:
    """The webhooks of the current configuration."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._rates = RateLimiter()

    def visit(self, request: Request) -> Visit:
        """Judges a request by its head.

        Raises:
            NotFound: There is no such hook, or it is switched off.
            MethodNotAllowed: It is neither a message nor a challenge.
            BadRequest: It has a secret in its URL.
            RateLimited: Its client asks too often.
            Unauthenticated, Forbidden, Unverified: It may not come in.
            UnsupportedMediaType: It comes in by a key, and is not JSON.
        """
        name, config = request.name, self._gateway.generation.config
        query = dict(parse_qsl(request.query.decode("latin-1"), keep_blank_values=True))
        adapter = self._adapter(name, config)
        hook = HookConfig() if adapter is not None else find(name, config)
        if request.method != "POST" and not (request.method == "GET" and "hub.mode" in query):
            raise MethodNotAllowed(request.method, f"/hooks/{name}", allowed=("POST",))
        if "token" in query:
            raise BadRequest("A token in the URL is not taken: URLs are logged on their way.", param="token")
        self._count(request, hook)
        if adapter is not None:
            return _PlatformVisit(adapter, request, hook)
        owner = f"hook:{name}"
        verifier = _verifier_of(hook)
        if verifier is None:
            owner = request.authorize() or ""
            _check_json(request)  # a page's form is not: a browser asks before it sends JSON to another site
        elif verifier.scheme == "bearer":
            verifier.verify(request.headers, b"", now=time.time())
        return _HookVisit(self._gateway, request, hook, verifier, owner, query)

    def _adapter(self, name: str, config: Config) -> Adapter | None:
        channel = config.channels.get(name)
        if channel is None or (channel.type == "telegram" and channel.mode != "webhook"):
            return None
        return self._gateway.channels.adapter(name) if self._gateway.channels is not None else None

    def _count(self, request: Request, hook: HookConfig) -> None:
        if hook.rate_per_s:
            wait_s = self._rates.take(
                f"{request.name} {request.client}",
                rate_per_s=hook.rate_per_s,
                burst=hook.burst,
                now=trio.current_time(),
            )
            if wait_s:
                raise RateLimited(
                    f"More than {hook.rate_per_s:g} requests a second to {request.name}.", retry_after_s=wait_s
                )


def find(name: str, config: Config) -> HookConfig:
    """The configuration of a hook. Without ``[hooks]``, any name has the one by default.

    Raises:
        NotFound: There is no such hook, or it is switched off.
    """
    if config.hooks is None:
        known = len(name) <= _MAX_NAME_CHARS and checks.NAME.match(name) and name not in config.channels
        hook = HookConfig() if known else None
    else:
        hook = config.hooks.get(name)
    if hook is None or not hook.enabled:
        raise NotFound(f"There is no hook {name[:_MAX_NAME_CHARS]!r}.")
    return hook


def readers(name: str, config: Config, headers: Mapping[bytes, bytes], authorize: Callable[[], str | None]) -> set[str]:
    """Whose runs of a hook the sender of a request may read: those of its key, and those that the hook's own
    verification let in. The secret of a hook with verification ``bearer`` opens the latter alone. Runs of a channel are
    for whoever has a key.

    What was accepted can be read also where the hook or the channel has been removed since.

    Raises:
        Unauthenticated, Forbidden: As `Hooks.visit`.
    """
    try:
        hook = (config.hooks or {}).get(name)
        verifier = _verifier_of(hook) if hook is not None else None
        if verifier is not None and verifier.scheme == "bearer":
            verifier.verify(headers, b"", now=time.time())
            return {f"hook:{name}"}
    except Unverified:
        pass  # it may be a key
    return {authorize() or "", f"hook:{name}", f"channel:{name}"}


def _check_json(request: Request) -> None:
    content_type = request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if request.method == "POST" and content_type != b"application/json" and not content_type.endswith(b"+json"):
        said = content_type.decode("latin-1")[:100] or "none"
        raise UnsupportedMediaType(f"Content-Type must be application/json; got {said}.")


class _PlatformVisit:
    """A platform calls its channel, whose adapter judges and keeps what it says."""

    def __init__(self, adapter: Adapter, request: Request, hook: HookConfig) -> None:
        self._adapter = adapter
        self._headers = request.headers
        self.body_bytes: int = hook.body_bytes

    async def serve(self, body: bytes, down: Downstream) -> None:
        await down.respond(*await self._adapter.receive(self._headers, body))


class _HookVisit:
    """A request to a configured hook."""

    def __init__(
        self,
        gateway: Gateway,
        request: Request,
        hook: HookConfig,
        verifier: Verifier | None,
        owner: str,
        query: Mapping[str, str],
    ) -> None:
        self._runs = gateway.runs
        self._request = request
        self._hook = hook
        self._verifier = verifier
        self._owner = owner
        self._query = query
        self._prefers_async = payload.prefers_async(request.headers.get(b"prefer", b""))
        self._is_async = self._prefers_async or hook.reply == "callback"
        self._wants_events = payload.accepts_events(request.headers.get(b"accept", b""))
        self.body_bytes: int = hook.body_bytes

    async def serve(self, body: bytes, down: Downstream) -> None:
        request, hook, verifier = self._request, self._hook, self._verifier
        signed_id = None
        if verifier is not None and request.method == "POST":
            signed_id = verifier.verify(request.headers, body, now=time.time()).event_id
        challenge = signatures.challenge(
            verifier.scheme if verifier is not None else None,
            request.method,
            self._query,
            body,
            tokens=(hook.verify_token.literal or "",) if hook.verify_token is not None else (),
        )
        if challenge is not None:
            await down.respond(*challenge.to_response())
            return
        if request.method != "POST":
            raise MethodNotAllowed(request.method, f"/hooks/{request.name}", allowed=("POST",))
        message = payload.read(request.name, hook, payload.decode(body))
        if message is None:
            await down.respond(204, [], b"")
            return
        # What was signed goes first: under a key of their own choice, others could send a copy again.
        key = signed_id or self._header_key() or message.event_id
        await self._answer(self._order(message), (key, hashlib.sha256(body).digest()) if key else None, down)

    def _header_key(self) -> str | None:
        key = self._request.headers.get(b"idempotency-key")
        if key is None:
            return None
        if not _KEY.fullmatch(key):
            raise BadRequest("Idempotency-Key has 1 to 256 visible ASCII characters.", param="Idempotency-Key")
        return key.decode()

    def _order(self, message: payload.Message) -> RunRequest:
        hook, name = self._hook, self._request.name
        callback_url = (message.callback_url or hook.callback_url) if self._is_async else None
        if hook.reply == "callback" and callback_url is None:
            raise BadRequest("You must provide callback_url.", param="callback_url")
        return RunRequest(
            channel=name,
            owner=self._owner,
            session=payload.session_key(name, hook.session, message.sender),
            action=message.action,
            text=message.text,
            sender=message.sender,
            model=hook.model,
            system=payload.system_message(hook),
            parameters=hook.parameters,
            reply_to=callback_url,
            finish=hook.on_disconnect == "finish",
        )

    async def _answer(self, order: RunRequest, idempotency: tuple[str, bytes] | None, down: Downstream) -> None:
        while True:
            claim = await self._runs.accept(order, acknowledged=self._is_async, idempotency=idempotency)
            if claim.differs:
                raise IdempotencyConflict("This idempotency key was used for a message with another body.")
            run = claim.run
            headers = [(b"x-run-id", run.id.encode())]
            if not claim.is_new:
                headers.append((b"idempotency-replayed", b"true"))
            if self._is_async and (claim.is_new or run.acknowledged or run.state in ENDED):
                if claim.is_new:
                    self._runs.perform_soon(run)
                await self._acknowledge(run, headers, down)
                return
            if not claim.is_new:
                run = await self._runs.wait_ended(run.id)
                if run.status == CLIENT_LEFT:  # it gave the key back: one of those who wait for it takes over
                    continue
                if self._is_async:
                    await self._acknowledge(run, headers, down)
                    return
                break
            run = await self._perform(run, order, headers, down)
            break
        if not down.committed:
            await self._tell(run, headers, down)

    async def _acknowledge(self, run: Run, headers: list[Header], down: Downstream) -> None:
        where = f"/hooks/{run.channel}/runs/{run.id}".encode()
        if self._prefers_async:
            headers = [*headers, (b"preference-applied", b"respond-async")]
        body = {
            "id": run.id,
            "hook": run.channel,
            "session": run.session,
            "action": run.action,
            "state": run.state,
            "created": int(run.created_at),
        }
        await down.respond(202, [_JSON, (b"location", where), *headers], msgspec.json.encode(body))

    async def _perform(self, run: Run, order: RunRequest, headers: list[Header], down: Downstream) -> Run:
        streams = self._wants_events and order.action == "chat"
        client = _Streamed(down, headers) if streams else _Waiting(down, headers)
        if not order.finish:
            return await self._runs.perform(run, down=client)
        doing: RunHandle = self._runs.perform_soon(run, down=client)
        try:
            await doing.done.wait()
        finally:
            if not doing.done.is_set():
                self._runs.promise(run)
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _LAST_SEND_S):
                    await client.detach()
        return doing.run

    async def _tell(self, run: Run, headers: list[Header], down: Downstream) -> None:
        """Answers with the result of a run."""
        if run.state == "completed":
            if self._wants_events and run.action == "chat":
                await down.start(200, [*STREAM_HEADERS, *headers])
                await down.end(events_of(run))
            else:
                await down.respond(200, [_JSON, *headers], run.result)
        elif run.state == "failed":
            if run.status in (429, 503):
                headers = [*headers, (b"retry-after", b"1")]
            await down.respond(run.status, [_JSON, *headers], run.result)
        else:
            status, own, body = RunStopped(
                f"The run {run.id} was stopped before its answer was complete."
            ).to_response()
            await down.respond(status, [*own, *headers], body)


def events_of(run: Run) -> bytes:
    """A stored result as the chunks that a stream of it would have."""
    result = msgspec.json.decode(run.result)

    def chunk(**more: object) -> bytes:
        head = {"id": run.id, "object": "chat.completion.chunk", "created": result["created"], "model": result["model"]}
        return b"data: " + msgspec.json.encode({**head, **more}) + b"\n\n"

    def choice(delta: dict[str, object], finish_reason: str | None) -> list[dict[str, object]]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]

    frames = [
        chunk(choices=choice({"role": "assistant", "content": result["reply"]}, None)),
        chunk(choices=choice({}, result["finish_reason"])),
    ]
    if result["usage"] is not None:
        frames.append(chunk(choices=[], usage=result["usage"]))
    return b"".join(frames) + b"data: [DONE]\n\n"


class _Waiting(Unwatched):
    """The client of a run whose reply it is sent whole, when that is stored. Only an error that comes before the answer
    goes to it as it is, with the headers that say when to try again."""

    def __init__(self, down: Downstream, headers: list[Header]) -> None:
        super().__init__()
        self._down: Downstream | None = down
        self.headers = headers

    async def detach(self) -> None:
        """The client has left, and the run goes on: sends nothing more."""
        self._down = None
        await trio.lowlevel.checkpoint()

    async def respond(self, status: int, headers: list[Header], body: bytes) -> None:
        """As `Downstream.respond`."""
        await super().respond(status, headers, body)
        if self._down is not None:
            await self._down.respond(status, [*headers, *self.headers], body)


class _Streamed:
    """The client of a run whose reply is streamed to it, for as long as it stays (`exchange.Downstream`)."""

    socket = None
    chunked = False

    def __init__(self, down: Downstream, headers: list[Header]) -> None:
        self._down = down
        self.headers = headers
        self._detached = False
        self._sends = 0
        self._idle = trio.Event()
        self._idle.set()

    async def detach(self) -> None:
        """The client has left, and the run goes on: sends nothing more, and waits until nothing is being sent."""
        self._detached = True
        await self._idle.wait()

    @property
    def committed(self) -> bool:
        """As `Downstream.committed`."""
        return self._down.committed

    @property
    def ended(self) -> bool:
        """As `Downstream.ended`."""
        return self._down.ended

    @property
    def gone(self) -> bool:
        """As `Downstream.gone`; one that nobody misses is not gone."""
        return self._down.gone and not self._detached

    @gone.setter
    def gone(self, gone: bool) -> None:
        self._down.gone = gone

    @property
    def sending_since(self) -> float | None:
        """As `Downstream.sending_since`."""
        return self._down.sending_since if not self._detached else None

    @sending_since.setter
    def sending_since(self, since: float | None) -> None:
        self._down.sending_since = since

    @property
    def last_sent_at(self) -> float:
        """As `Downstream.last_sent_at`."""
        return self._down.last_sent_at if not self._detached else trio.current_time()

    @last_sent_at.setter
    def last_sent_at(self, at: float) -> None:
        self._down.last_sent_at = at

    @property
    def patience_s(self) -> float:
        """As `Downstream.patience_s`."""
        return self._down.patience_s

    @patience_s.setter
    def patience_s(self, seconds: float) -> None:
        self._down.patience_s = seconds

    @property
    def taken_bytes(self) -> int | None:
        """As `Downstream.taken_bytes`."""
        return self._down.taken_bytes

    def owe(self, rest: bytes) -> None:
        """Nobody writes to its socket."""

    async def respond(self, status: int, headers: list[Header], body: bytes) -> None:
        """As `Downstream.respond`."""
        await self._send(self._down.respond, status, [*headers, *self.headers], body)

    async def start(self, status: int, headers: list[Header]) -> None:
        """As `Downstream.start`."""
        await self._send(self._down.start, status, [*headers, *self.headers])

    async def send(self, data: bytes) -> None:
        """As `Downstream.send`."""
        await self._send(self._down.send, data)

    async def end(self, data: bytes = b"") -> None:
        """As `Downstream.end`."""
        await self._send(self._down.end, data)

    def abandon(self) -> None:
        """As `Downstream.abandon`."""
        if not self._detached:
            self._down.abandon()

    async def abort(self) -> None:
        """As `Downstream.abort`."""
        await self._send(self._down.abort)

    async def _send(self, send: Callable[..., Awaitable[None]], *args: object) -> None:
        if self._detached:
            await trio.lowlevel.checkpoint()
            return
        if not self._sends:
            self._idle = trio.Event()
        self._sends += 1
        try:
            await send(*args)
        finally:
            self._sends -= 1
            if not self._sends:
                self._idle.set()
