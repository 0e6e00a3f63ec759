"""A client that drives an ASGI app directly, under Trio and its clock, and can misbehave at a chosen moment.

It is as strict as a server: a message that ASGI does not allow at that point is an `AssertionError` in the app. Like
hypercorn it delivers ``http.disconnect`` during the app's last ``send``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import msgspec
import trio

from tests.support.provider import Pause, Stall

Piece = bytes | Pause | Stall


@attrs.define(eq=False)
class ClientCall:
    """One request and the response so far.

    Attributes:
        pieces: The pieces of the body, each with the Trio time at which it was sent.
        committed_at: When the response head was sent.
        ended_at: When the final piece was sent.
        returned_at: When the app returned. Without ``ended_at``, a server would break the connection then.
        scope: Cancel it to end the app, as a server does whose grace period has passed.
    """

    _app: Any
    _asgi: dict[str, Any]
    _body: Sequence[Piece]
    status: int = 0
    headers: list[tuple[bytes, bytes]] = attrs.field(factory=list)
    pieces: list[tuple[float, bytes]] = attrs.field(factory=list)
    committed_at: float = math.nan
    ended_at: float = math.nan
    returned_at: float = math.nan
    crash: BaseException | None = None
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    sends_waiting: int = 0
    _gone: trio.Event = attrs.field(factory=trio.Event)
    _returned: trio.Event = attrs.field(factory=trio.Event)
    _flows: trio.Event = attrs.field(factory=trio.Event)
    _news: trio.Event = attrs.field(factory=trio.Event)
    _unsent: Iterator[Piece] | None = None

    def __attrs_post_init__(self) -> None:
        self._flows.set()
        self._unsent = iter(self._body)

    # -- actions of the client ----------------------------------------------------------------------------------------

    def disconnect(self) -> None:
        """Disconnects. Synchronous; the app may be notified from now on."""
        self._gone.set()
        self._flows.set()

    def stall(self) -> None:
        """Stops reading, so that sends wait."""
        self._flows = trio.Event()

    def release(self) -> None:
        """Reads again."""
        self._flows.set()

    async def wait_for(self, text: bytes, *, times: int = 1) -> None:
        """Waits until the body contains these bytes."""
        while self.body.count(text) < times:
            assert not self._returned.is_set(), f"{text!r} never came: {self.status} {self.body!r}"
            await self._news.wait()

    async def wait_committed(self) -> None:
        """Waits for the response head."""
        while not self.status:
            assert not self._returned.is_set(), "no response head arrived"
            await self._news.wait()

    async def wait(self) -> ClientCall:
        """Waits until the app has returned, and raises what it raised."""
        await self._returned.wait()
        if self.crash is not None:
            raise self.crash
        return self

    # -- the response -------------------------------------------------------------------------------------------------

    @property
    def body(self) -> bytes:
        """The body received so far."""
        return b"".join(data for _, data in self.pieces)

    @property
    def json(self) -> Any:  # Any: an answer of any shape
        """The decoded body."""
        return msgspec.json.decode(self.body)

    @property
    def error(self) -> Any:  # Any: as json
        """The error object of a JSON answer or of a stream's last event."""
        if self.header("content-type").startswith("text/event-stream"):
            last = self.body.rstrip(b"\n").rpartition(b"\n")[2]
            assert last.startswith(b"data: {"), f"the stream does not end with an error: {self.body!r}"
            return msgspec.json.decode(last.removeprefix(b"data: "))["error"]
        return self.json["error"]

    @property
    def ended(self) -> bool:
        """Whether the answer ended properly."""
        return not math.isnan(self.ended_at)

    def header(self, name: str) -> str:
        """The value of a header, ``""`` if it is missing. It must not occur twice."""
        found = [value for key, value in self.headers if key.decode().lower() == name]
        assert len(found) < 2, f"{name} occurs {len(found)} times"
        return found[0].decode("latin-1") if found else ""

    # -- the server's part --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs the app."""
        try:
            with self.scope:
                await self._app(self._asgi, self._receive, self._send)
        except Exception as error:
            self.crash = error
        finally:
            self.returned_at = trio.current_time()
            self._returned.set()
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def _receive(self) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if self._unsent is not None:
            for piece in self._unsent:
                if isinstance(piece, bytes):
                    return {"type": "http.request", "body": piece, "more_body": True}
                with trio.move_on_after(piece.seconds if isinstance(piece, Pause) else math.inf):
                    await self._gone.wait()
                    return {"type": "http.disconnect"}
            self._unsent = None
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sends_waiting += 1
        try:
            await trio.lowlevel.checkpoint()
            await self._flows.wait()
        finally:
            self.sends_waiting -= 1
        assert not self.ended, f"{message} after the end of the answer"
        match message["type"]:
            case "http.response.start":
                assert not self.status, "a second head"
                self.status, self.headers = message["status"], list(message["headers"])
                self.committed_at = trio.current_time()
            case "http.response.body":
                assert self.status, "a body without a head"
                if not self._gone.is_set():
                    self.pieces.append((trio.current_time(), bytes(message.get("body", b""))))
                if not message.get("more_body", False):
                    self.ended_at = trio.current_time()
                    self._gone.set()
            case kind:
                raise AssertionError(f"{kind} is no message of an HTTP answer")
        self._tell()


@attrs.define(eq=False)
class AsgiClient:
    """Makes requests to an app.

    Args:
        nursery: Runs the apps in the background.
    """

    app: Any
    nursery: trio.Nursery
    client: tuple[str, int] | None = ("127.0.0.1", 50000)
    server: tuple[str, int] | None = ("127.0.0.1", 18888)
    calls: list[ClientCall] = attrs.field(factory=list)

    def cancel_all(self) -> None:
        """Cancels every call, so that none outlives its test."""
        for call in self.calls:
            call.disconnect()

    @staticmethod
    def encode(body: object) -> bytes:
        """Encodes a request body."""
        return msgspec.json.encode(body)

    def start(
        self,
        method: str,
        path: str,
        body: object = b"",
        *,
        headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        raw: Sequence[Piece] | None = None,
    ) -> ClientCall:
        """Starts a request.

        Args:
            body: Bytes, or a value that is sent as JSON.
            raw: The body in pieces, with pauses, instead of ``body``; it has no content-length then.
        """
        fields = [(b"host", b"127.0.0.1:18888")]
        if isinstance(body, bytes):
            data = body
        else:
            data = self.encode(body)
            fields.append((b"content-type", b"application/json"))
        if raw is None:
            fields.append((b"content-length", b"%d" % len(data)))
        for name, value in headers.items() if isinstance(headers, Mapping) else headers:
            key = name.lower().encode()
            if isinstance(headers, Mapping):
                fields = [each for each in fields if each[0] != key]
            fields.append((key, value.encode("latin-1")))
        target, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": target,
            "raw_path": target.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": fields,
            "client": self.client,
            "server": self.server,
            "state": {},
            "extensions": {},
        }
        call = ClientCall(self.app, scope, raw if raw is not None else [data] if data else [])
        self.calls.append(call)
        self.nursery.start_soon(call.run)
        return call

    async def ask(self, method: str, path: str, body: object = b"", **kwargs: Any) -> ClientCall:  # Any: as start
        """Makes a request and waits for its end."""
        return await self.start(method, path, body, **kwargs).wait()

    def chat(self, *, stream: bool = True, model: str = "up/m", **fields: Any) -> ClientCall:  # Any: JSON
        """Starts a chat completion."""
        return self.start("POST", "/v1/chat/completions", chat(stream=stream, model=model, **fields))


def chat(*, stream: bool = True, model: str = "up/m", **fields: Any) -> dict[str, Any]:  # Any: JSON
    """The body of a chat completion request."""
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], "stream": stream, **fields}
