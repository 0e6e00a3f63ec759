"""The seam to the server: one ASGI HTTP request, its nursery, and the two planes.

Quart-Trio makes an instance of `GatewayConnection` for each request (``asgi_http_class``). Calls that carry model
traffic (`wire.ENDPOINTS`) go straight to `exchange`, which drives ASGI's ``send`` itself: a stream must never pass
through a generator, and Quart's request and response objects cost as much as the exchange. Everything else is ordinary
Quart. Who may come in, CORS, request ids and error bodies are the same for both, and stand here.

What is known of the servers below, and dealt with here:

* Hypercorn recycles a keep-alive connection inside the app's *last* ``send``, and tells ``http.disconnect`` meanwhile:
  an app that cancels itself on that leaves the idle timer unarmed, for ever. So every send is shielded, and the watch
  stops watching once the answer is out.
* Hypercorn raises out of the connection when the app is cancelled inside ``http.response.start``: shielded too.
* A response that is sent while the client still sends its body is erased by the reset that closing the socket causes:
  the rest of the body is read, in bounds, before the last message.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import ipaddress
import math
import re
import secrets
import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable
from quart_trio.asgi import TrioASGIHTTPConnection, TrioASGIWebsocketConnection

from trigate import hooks
from trigate.errors import (
    Ambiguous,
    BadRequest,
    BodyTimeout,
    Draining,
    Forbidden,
    GatewayError,
    Header,
    HeadersTooLarge,
    Internal,
    MethodNotAllowed,
    Overloaded,
    TooLarge,
    Unauthenticated,
    UnsupportedMediaType,
)
from trigate.exchange import Exchange, Recorder
from trigate.request_head import MAX_FIELDS, MAX_FIELDS_BYTES
from trigate.sessions import SessionRecorder
from trigate.wire import ENDPOINTS, Call, Endpoint, decode_call

if TYPE_CHECKING:
    from trigate.application import GatewayApp
    from trigate.config import Config
    from trigate.gateway import Gateway
    from trigate.http1 import Client

log = structlog.get_logger("trigate.connection")

_CONTROL_PLANE_BYTES = 1024 * 1024
_LINGER_BYTES = 256 * 1024 * 1024
_LINGER_S = 2.0
_SESSION_KEY = re.compile(rb"[!-.0-~]{1,256}\Z")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}\Z")
_FORWARDED = {
    b"openai-beta": "openai-beta",
    b"idempotency-key": "idempotency-key",
    b"traceparent": "traceparent",
    b"tracestate": "tracestate",
}


class Head:
    """What is read of a request's head, once.

    Attributes:
        examined: `trigate serve` has judged it already.
    """

    def __init__(self, scope: Any) -> None:  # Any: an ASGI scope is a dict of anything
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.client: str | None = scope["client"][0] if scope.get("client") else None
        self.server: str | None = scope["server"][0] if scope.get("server") else None
        self._fields: list[tuple[bytes, bytes]] = scope["headers"]
        self.headers = {name.lower(): value for name, value in self._fields}
        self.examined = "trigate.client" in scope.get("extensions", {})

    def check(self) -> None:
        """Looks for what would make it another request to somebody else.

        Raises:
            Ambiguous: Its length is said twice, or in two ways (request smuggling begins like that).
            HeadersTooLarge: `trigate serve` has seen to that already; other servers may not.
        """
        fields, headers = self._fields, self.headers
        if len(headers) != len(fields):
            names = [name.lower() for name, _ in fields]
            for once in (b"content-length", b"host", b"authorization", b"x-session-key"):
                if names.count(once) > 1:
                    raise Ambiguous(f"The header {once.decode()} stands twice.")
        if not self.examined and (
            len(fields) > MAX_FIELDS or sum([len(name) + len(value) for name, value in fields]) > MAX_FIELDS_BYTES
        ):
            raise HeadersTooLarge(f"More than {MAX_FIELDS} header fields, or {MAX_FIELDS_BYTES} bytes of them.")
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise Ambiguous("Content-Length and Transfer-Encoding cannot go together.")

    @property
    def content_length(self) -> int | None:
        """The declared length of the body in bytes."""
        value = self.headers.get(b"content-length", b"")
        return int(value) if value.isdigit() and len(value) < 20 else None

    @property
    def origin(self) -> str | None:
        """The page that a browser sends this for."""
        value = self.headers.get(b"origin")
        return value.decode("latin-1") if value is not None else None

    def session_key(self, endpoint: Endpoint) -> str | None:
        """The session that a call belongs to; None = it belongs to none.

        Raises:
            BadRequest: It names one in a way that cannot be, or where nothing would be remembered.
        """
        key = self.headers.get(b"x-session-key")
        if key is None:
            return None
        if endpoint.path != "/chat/completions":
            raise BadRequest("x-session-key goes with /v1/chat/completions only.", param="x-session-key")
        if not _SESSION_KEY.match(key) or key in (b".", b".."):  # those two cannot stand in a path
            raise BadRequest(
                "x-session-key must be 1 to 256 visible ASCII characters without a slash.", param="x-session-key"
            )
        return bytes(key).decode()

    def forwarded(self) -> dict[str, str]:
        """The client's headers that go upstream."""
        return {
            name: self.headers[key].decode("latin-1")
            for key, name in _FORWARDED.items()
            if key in self.headers and self.headers[key].isascii()
        }


# -- who may come in --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def is_loopback(host: str | None) -> bool:
    """Whether a name or address is this machine's own. A peer without an address is a Unix socket, which is.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("::ffff:127.0.0.1"), is_loopback("10.0.0.1")
    (True, True, True, False)
    """
    if not host or host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


@functools.lru_cache(maxsize=256)
def _hostname(text: str) -> str | None:
    try:
        return urlsplit(f"//{text}").hostname
    except ValueError:
        return None


def _hops(value: bytes) -> list[str]:
    """The addresses in an ``X-Forwarded-For`` or ``Forwarded`` (RFC 7239) header.

    >>> _hops(b"10.0.0.1, 127.0.0.1"), _hops(b'for="[2001:db8::1]:80";proto=http, for=192.0.2.1')
    (['10.0.0.1', '127.0.0.1'], ['2001:db8::1', '192.0.2.1'])
    """
    hops = []
    for hop in value.decode("latin-1").split(","):
        pairs = [pair.partition("=")[2] for pair in hop.split(";") if pair.strip().lower().startswith("for=")]
        text = pairs[0] if pairs else hop
        if text.strip() and (pairs or "=" not in text):
            hops.append(_hostname(text.strip().strip('"')) or text.strip())
    return hops


def authorize(head: Head, config: Config) -> str | None:
    """Decides whether a request may come in.

    Returns:
        The name of its key; None where no key is configured.

    Raises:
        Unauthenticated: A key is configured, and this is none.
        Forbidden: No key is configured, and the request is not from this machine, or is a page's that should not.
    """
    if config.keys:
        scheme, _, token = head.headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else b""
        found = None
        for name, key in config.keys.items():  # every key is compared, whichever matches
            if hmac.compare_digest(given, key.encode()):
                found = name
        if found is None:
            said = "Incorrect API key provided." if given else "You didn't provide an API key."
            raise Unauthenticated(f"{said} This gateway wants one: Authorization: Bearer YOUR_KEY.")
        return found
    if config.server.insecure:
        return None
    if not (is_loopback(head.server) and is_loopback(head.client)):
        raise Forbidden(
            "This gateway has no key configured, so it serves this machine only. Set TRIGATE_API_KEY (or [keys]) "
            "to serve others, or start it with --insecure."
        )
    for field in (b"x-forwarded-for", b"forwarded", b"x-real-ip"):
        if field in head.headers and not all(is_loopback(hop) for hop in _hops(head.headers.get(field, b""))):
            raise Forbidden(
                f"This request came through a proxy ({field.decode()}), and this gateway has no key configured, so it "
                "serves this machine only. Set TRIGATE_API_KEY (or [keys]), or start it with --insecure."
            )
    host = _hostname(head.headers.get(b"host", b"").decode("latin-1"))
    if host and not is_loopback(host) and host not in config.server.allowed_hosts:
        raise Forbidden(
            f"The Host {host[:200]!r} is not this machine (DNS rebinding?). Add it to server.allowed_hosts, "
            "or configure a key."
        )
    origin = head.origin
    if origin is not None and not cors_allows(origin, config):
        page = _hostname(origin.partition("://")[2])
        if page is None or not is_loopback(page):
            raise Forbidden(f"Pages of {origin[:200]!r} may not call this gateway. Add it to server.cors_origins.")
    return None


def cors_allows(origin: str, config: Config) -> bool:
    """Whether pages of an origin may read answers."""
    return origin in config.server.cors_origins or "*" in config.server.cors_origins


def _cors_headers(origin: str | None, config: Config) -> list[Header]:
    if not config.server.cors_origins:
        return []
    headers: list[Header] = [(b"vary", b"origin")]
    if origin is not None and cors_allows(origin, config):
        headers.append((b"access-control-allow-origin", origin.encode("latin-1")))
        headers.append((b"access-control-expose-headers", b"x-request-id, retry-after, retry-after-ms, x-should-retry"))
    return headers


# -- the client's side ------------------------------------------------------------------------------------------------


class Downstream:
    """The client's side of a request: ASGI's ``send``, with the rules of this module.

    Attributes:
        committed: The status line is out.
        ended: The last byte of the answer has been handed over.
        gone: The client has left.
        sending_since: Since when a send has been waiting; None = none is.
        last_sent_at: When something was sent last (trio time).
        patience_s: How long a send may wait for the client; finite only for the last words of a server that stops.
    """

    def __init__(self, send: ASGISendCallable, headers: Iterable[Header], client: Client | None = None) -> None:
        self._send = send
        self.client = client
        self.headers = list(headers)
        self._emitting: trio.CancelScope | None = None
        self._sent: trio.Event | None = None
        self._owed = b""
        self.committed = False
        self.ended = False
        self.gone = False
        self.sending_since: float | None = None
        self.last_sent_at = trio.current_time()
        self.patience_s = math.inf

    @property
    def socket(self) -> socket.socket | None:
        """The client's socket, where pieces of the body may be written to it directly once the head is out."""
        return self.client.socket if self.client is not None else None

    @property
    def chunked(self) -> bool:
        """How what is written there has to be framed."""
        return self.client is not None and self.client.chunked

    @property
    def taken_bytes(self) -> int | None:
        """A number that grows while a send waits, whenever the client takes something; None = that cannot be seen."""
        return self.client.taken_bytes if self.client is not None else None

    def owe(self, rest: bytes) -> None:
        """Takes what is left of a frame that was begun at the socket; it goes out before anything else."""
        self._owed = rest

    # None of the sends is a checkpoint for certain: that is the server's affair, and costs too much to add per event.

    async def _emit(self, *messages: Any) -> None:  # noqa: ASYNC910 - Any: hypercorn's union of ASGI messages
        piece = messages[0].get("more_body", False)
        if piece and self.client is not None and self.sending_since is None and not self._owed:
            # This server cuts no message in two. A piece that a cancellation leaves out is missed by nobody; a head and
            # an end that are noted have to go out.
            await self._emit_now(messages)
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self.patience_s) as self._emitting:
            while self.sending_since is not None:  # a keep-alive, or the relay while one is sent
                if self._sent is None:
                    self._sent = trio.Event()
                await self._sent.wait()
            await self._emit_now(messages)

    async def _emit_now(self, messages: tuple[Any, ...]) -> None:  # noqa: ASYNC910 - Any: as above
        self.sending_since = trio.current_time()
        try:
            if self._owed:
                await self._pay()
            for message in messages:
                await self._send(message)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client is gone; the watch is told so, and cancels
        finally:
            self._note_sent()

    def _note_sent(self) -> None:
        self.sending_since = None
        self.last_sent_at = trio.current_time()
        if self._sent is not None:
            self._sent.set()
            self._sent = None

    async def _pay(self) -> None:  # noqa: ASYNC910 - it is shielded
        """Sends what is left of a frame."""
        rest, self._owed = memoryview(self._owed), b""
        with trio.CancelScope(shield=True):
            while rest and self.socket is not None:
                await trio.lowlevel.wait_writable(self.socket)
                with contextlib.suppress(BlockingIOError):
                    rest = rest[self.socket.send(rest) :]

    async def start(self, status: int, headers: list[Header]) -> None:
        """Sends the head. This is COMMIT."""
        self.committed = True
        await self._emit({"type": "http.response.start", "status": status, "headers": [*headers, *self.headers]})

    async def send(self, data: bytes) -> None:  # noqa: ASYNC910
        """Sends a piece of the body."""
        if not self.ended:
            await self._emit({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """Sends the last piece of the body."""
        self.ended = True
        await self._emit({"type": "http.response.body", "body": data, "more_body": False})

    async def respond(self, status: int, headers: list[Header], body: bytes) -> None:
        """Sends a whole response."""
        self.committed = self.ended = True
        if self.client is not None and self.sending_since is None:
            self.sending_since = trio.current_time()
            try:
                await self.client.respond(status, headers + self.headers, body)
            finally:
                self._note_sent()
            return
        headers = [*headers, (b"content-length", b"%d" % len(body)), *self.headers]
        await self._emit(
            {"type": "http.response.start", "status": status, "headers": headers},
            {"type": "http.response.body", "body": body, "more_body": False},
        )

    async def abort(self) -> None:
        """Closes the client's connection now, whatever waits to be sent on it; where the server lets us.

        Under `trigate serve` HTTP/1.1 connections offer it (`trigate.client` in the scope's extensions); under asyncio
        servers the send that waits is given up; under ``hypercorn -k trio`` nothing can reach it.
        """
        self.ended = True
        if self._emitting is not None:
            self._emitting.cancel()
        if self.client is not None:
            await self.client.abort()
        else:
            await trio.lowlevel.checkpoint()

    def abandon(self) -> None:
        """Leaves the response without its end: the server then closes the connection, which is what tells."""
        self.ended = True


class Inbound:
    """The request's body: ASGI's ``receive``, counted.

    Attributes:
        complete: The whole body has been received, or its client has left.
    """

    def __init__(self, receive: ASGIReceiveCallable) -> None:
        self._receive = receive
        self._received_bytes = 0
        self.complete = False

    async def receive(self) -> Any:  # Any: hypercorn's union of ASGI messages
        """Receives the next message."""
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self.complete = True
        return message

    async def receive_bounded(self) -> Any:  # Any: as above
        """Receives for the control plane, which has no use for a large body: more than a bound is a client that left.

        (Quart keeps whatever arrives, and its own limit does not see chunked bodies.)
        """
        message = await self.receive()
        self._received_bytes += len(message.get("body", b""))
        return message if self._received_bytes <= _CONTROL_PLANE_BYTES else {"type": "http.disconnect"}

    async def read(self, *, max_bytes: int, timeout_s: float) -> bytes | None:
        """Reads the body, which must end in time and in bounds; None where the client left meanwhile.

        Raises:
            TooLarge: It is larger than ``max_bytes``.
            BodyTimeout: It did not end within ``timeout_s``.
        """
        pieces: list[bytes] = []
        size = 0
        with trio.move_on_after(timeout_s or math.inf):
            while True:
                message = await self.receive()
                if message["type"] != "http.request":
                    return None
                piece = message.get("body", b"")
                size += len(piece)
                if size > max_bytes:
                    raise too_large(max_bytes)
                pieces.append(piece)
                if self.complete:
                    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        raise BodyTimeout(f"The body did not arrive within {timeout_s:g} s (limits.body_timeout_s).")

    async def drain(self) -> None:  # noqa: ASYNC910 - there may be nothing to drain
        """Throws away what is left of the body, in bounds of bytes and time."""
        drained = 0
        with trio.move_on_after(_LINGER_S):
            while not self.complete and drained < _LINGER_BYTES:
                drained += len((await self.receive()).get("body", b""))


def too_large(max_bytes: int) -> TooLarge:
    """The error for a body over the limit."""
    return TooLarge(f"The body is larger than {max_bytes} bytes, which is the limit here.")


class GatewayConnection(TrioASGIHTTPConnection):
    """One HTTP request to the gateway."""

    app: GatewayApp

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:  # noqa: ASYNC910
        gateway = self.app.gateway
        config = gateway.generation.config
        scope: Any = self.scope  # Any: hypercorn's type does not know our extension
        head = Head(scope)
        given = head.headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.match(given) else f"req_{secrets.token_hex(12)}"
        client = scope.get("extensions", {}).get("trigate.client")
        down = Downstream(send, [(b"x-request-id", request_id.encode())], client)
        inbound = Inbound(receive)
        try:
            head.check()
            down.headers += _cors_headers(head.origin, config)
            if head.method == "OPTIONS" and await _preflight(head, config, down):
                return  # noqa: ASYNC910
            hook, rest = _hook_of(head.path)
            if hook and not rest:
                await self._hook(hook, head, inbound, down)
                return
            owner = ""
            if hook:
                scope["trigate.readers"] = hooks.readers(
                    hook, config, head.headers, functools.partial(authorize, head, config)
                )
            elif head.path != "/health":
                owner = authorize(head, config) or ""
            endpoint = ENDPOINTS.get(head.path)
            if endpoint is None:
                scope["trigate.owner"] = owner
                await self._control_plane(head, inbound, down)
            else:
                await self._data_plane(endpoint, head, request_id, inbound, down, owner=owner)
        except GatewayError as error:
            log.info("refused", request_id=request_id, path=self.scope["path"], status=error.status, code=error.code)
            await _refuse(error, inbound, down)
        except Exception:
            log.exception("request_crashed", request_id=request_id, path=self.scope["path"])
            if not down.committed:
                await down.respond(*Internal(f"The gateway failed. Request id: {request_id}.").to_response())

    async def _control_plane(self, head: Head, inbound: Inbound, down: Downstream) -> None:
        async def send(message: Any) -> None:  # Any: hypercorn's union of ASGI messages
            body = message.get("body", b"") if head.method != "HEAD" else b""
            if message["type"] == "http.response.start":
                await down.start(message["status"], list(message["headers"]))
            elif message.get("more_body", False):
                await down.send(body)
            else:
                await down.end(body)

        await super().__call__(inbound.receive_bounded, send)

    async def _data_plane(
        self, endpoint: Endpoint, head: Head, request_id: str, inbound: Inbound, down: Downstream, *, owner: str
    ) -> None:
        gateway = self.app.gateway
        if head.method != "POST":
            raise MethodNotAllowed(head.method, head.path, allowed=("POST",))
        content_type = head.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if content_type != b"application/json" and not content_type.endswith(b"+json"):
            said = content_type.decode("latin-1")[:100] or "none"
            raise UnsupportedMediaType(f"Content-Type must be application/json; got {said}.")
        session = head.session_key(endpoint)
        body = await self._read(head, inbound, down, max_bytes=gateway.generation.config.limits.body_bytes)
        if body is None:
            return
        call = decode_call(endpoint, body)
        del body
        exchange: Exchange | None = None
        failure: GatewayError | None = None
        async with trio.open_nursery() as nursery:

            def leave() -> None:
                down.gone = True
                if not down.ended:
                    if exchange is not None and exchange.abandon_upstream():
                        gateway.leaving.cancel_soon(nursery.cancel_scope)
                    else:
                        nursery.cancel_scope.cancel()

            def exchange_for(call: Call, recorder: Recorder | None = None) -> Exchange:
                nonlocal exchange
                exchange = Exchange(
                    id=request_id,
                    call=call,
                    gateway=gateway,
                    generation=gateway.generation,
                    down=down,
                    headers={
                        "content-type": "application/json",
                        "accept": "text/event-stream" if call.stream else "application/json",
                        "x-request-id": request_id,
                        **head.forwarded(),
                    },
                    recorder=recorder,
                )
                return exchange

            _watch_client(nursery, inbound, down, leave)
            if session is None:
                await exchange_for(call).run(nursery)
            else:
                failure = await _take_turn(gateway, owner, session, call, exchange_for, nursery)
            if nursery.child_tasks:  # the watch, or a keep-alive that the client does not take
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _hook(self, name: str, head: Head, inbound: Inbound, down: Downstream) -> None:
        config = self.app.gateway.generation.config
        visit = self.app.gateway.hooks.visit(
            hooks.Request(
                name=name,
                method=head.method,
                headers=head.headers,
                query=self.scope["query_string"],
                client=head.client,
                authorize=functools.partial(authorize, head, config),
            )
        )
        body = await self._read(head, inbound, down, max_bytes=visit.body_bytes)
        if body is None:
            return
        error: GatewayError | None = None
        async with trio.open_nursery() as nursery:

            def leave() -> None:
                down.gone = True
                if not down.ended:
                    nursery.cancel_scope.cancel()

            _watch_client(nursery, inbound, down, leave)
            try:
                await visit.serve(body, down)
            except GatewayError as raised:  # not through the nursery, which would make a group of it
                error = raised
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error

    async def _read(self, head: Head, inbound: Inbound, down: Downstream, *, max_bytes: int) -> bytes | None:
        """Reads the body of a call that will cost something; None where the client left meanwhile.

        Raises:
            Draining: There will be no more calls.
            TooLarge, BodyTimeout: As `Inbound.read`.
        """
        gateway = self.app.gateway
        if gateway.draining:
            raise Draining("The gateway is shutting down. Try again: another instance will answer.")
        if (head.content_length or 0) > max_bytes:
            raise too_large(max_bytes)
        if down.client is not None and down.client.body_is_here and head.content_length is not None:
            # nearly always: a deadline would cost more than this
            return (await inbound.receive()).get("body", b"")  # type: ignore[no-any-return]
        return await inbound.read(max_bytes=max_bytes, timeout_s=gateway.generation.config.limits.body_timeout_s)


def _hook_of(path: str) -> tuple[str, str]:
    """The name of the hook that a path leads to, and what stands behind it.

    >>> _hook_of("/hooks/ci"), _hook_of("/hooks/ci/runs/run_1"), _hook_of("/status"), _hook_of("/hooks/")
    (('ci', ''), ('ci', 'runs/run_1'), ('', ''), ('', ''))
    """
    if not path.startswith("/hooks/"):
        return "", ""
    name, slash, rest = path.removeprefix("/hooks/").partition("/")
    return name, rest or slash


def _watch_client(nursery: trio.Nursery, inbound: Inbound, down: Downstream, leave: Callable[[], None]) -> None:
    """Has ``leave`` called when the client leaves before its answer is out."""
    if down.client is None or not down.client.watch(leave):
        nursery.start_soon(_watch, inbound, leave)


async def _take_turn(
    gateway: Gateway,
    owner: str,
    key: str,
    call: Call,
    exchange_for: Callable[[Call, Recorder], Exchange],
    nursery: trio.Nursery,
) -> GatewayError | None:
    """Serves a call as a turn of a session. Until its turn has come, there is no exchange: to wait costs no place, and
    no limit in time but its own. How many may wait is bounded as exchanges are: each holds a connection and a body.

    Returns:
        Why it could not; returned, since the nursery would make a group of it.
    """
    config = gateway.generation.config
    limit = config.limits.max_exchanges
    if gateway.sessions.turns >= limit:
        said = f"{limit} turns of sessions are in progress or wait, which is the limit of this gateway."
        return Overloaded(said)  # noqa: ASYNC910 - the caller goes on
    try:
        async with gateway.sessions.open_turn(owner, key, limits=config.sessions) as turn:
            composed = turn.compose(call)
            recorder = SessionRecorder(gateway.store, turn)
            exchange = exchange_for(composed, recorder)
            turn.cut = exchange.cut
            try:
                await exchange.run(nursery)
            finally:
                recorder.settle(exchange.usage)
    except GatewayError as error:
        return error  # noqa: ASYNC910 - to open a turn is a checkpoint
    return None


async def _watch(inbound: Inbound, leave: Callable[[], None]) -> None:
    """Waits for the client to leave before the answer is out, where the server has no cheaper way to tell."""
    while (await inbound.receive())["type"] != "http.disconnect":
        pass
    leave()


async def _refuse(error: GatewayError, inbound: Inbound, down: Downstream) -> None:
    """Answers with an error before COMMIT. A body that is still arriving is drained before the response ends: the
    client has the whole answer by then (it is as long as it said), and no reset can take it away."""
    if down.committed:
        return  # noqa: ASYNC910
    status, headers, body = error.to_response()
    await down.start(status, [*headers, (b"content-length", b"%d" % len(body))])
    await down.send(body)
    await inbound.drain()
    await down.end()


async def _preflight(head: Head, config: Config, down: Downstream) -> bool:
    """Answers a CORS preflight; False where it is none, or not an allowed one."""
    if head.origin is None or b"access-control-request-method" not in head.headers:
        return False  # noqa: ASYNC910 - the caller goes on
    if not cors_allows(head.origin, config):
        return False  # noqa: ASYNC910 - the caller goes on
    asked = head.headers.get(b"access-control-request-headers", b"")
    await down.respond(
        204,
        [
            (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
            (b"access-control-allow-headers", asked if asked.isascii() else b""),
            (b"access-control-max-age", b"600"),
        ],
        b"",
    )
    return True


class NoWebsocket(TrioASGIWebsocketConnection):
    """There are no WebSocket endpoints: the handshake is refused, before Quart makes anything of it."""

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        await receive()
        await send({"type": "websocket.close", "code": 1000, "reason": None})
