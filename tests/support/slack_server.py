"""A fake Slack workspace that speaks the Web API as it is documented, and sends events as Slack does.

`Workspace.answer` is the API; `open_slack` serves it over real sockets, `Workspace.transport` in memory. It enforces
the documented rules: tokens, content types, conversations, lengths, rates, and errors under status 200. A test makes
calls fail by `fail`, `throttle` and `lose_answer`.

Source: the references of ``auth.test``, ``chat.postMessage``, ``chat.update`` and ``chat.delete``; "Rate limits",
"The Events API", "Verifying requests from Slack", and the changelog of 2018-04 (truncation).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any

import attrs
import httpx2
import msgspec
import trio

from trigate.concurrency.notify import RepeatedEvent

TOKEN = "xoxb-1-2-aSlackTokenThatNobodyMaySee"
SECRET = "8f742231b10e8888abcd99yyyzzz85a5"
BOT = "UBOT00001"

EDIT_BYTES = 4000
MAX_CHARACTERS = 40_000
EVENT_TIMEOUT_S = 3.0

Response = tuple[int, dict[str, str], bytes]


@attrs.define
class Message:
    """A message in the workspace; ``texts`` are its versions, the current one last."""

    channel: str
    ts: str
    thread_ts: str | None
    texts: list[str]

    @property
    def text(self) -> str:
        """The current text."""
        return self.texts[-1]


@attrs.frozen
class Call:
    """A call of the Web API, and its result: ``ok``, or Slack's error."""

    method: str
    fields: Mapping[str, Any]
    result: str
    at: float


@attrs.define
class _Bucket:
    """A token bucket."""

    rate_per_s: float
    burst: float
    left: float
    at: float

    def take(self, now: float) -> float:
        self.left = min(self.burst, self.left + (now - self.at) * self.rate_per_s)
        self.at = now
        if self.left < 1:
            return (1 - self.left) / self.rate_per_s
        self.left -= 1
        return 0.0


class Workspace:
    """A workspace with one app in it.

    Args:
        posts_per_s: The limit of ``chat.postMessage`` in each conversation; about one, by the documentation.
        updates_per_s: The limit of ``chat.update``: tier 3.
        burst: How many calls of each are allowed at once.
    """

    def __init__(self, *, posts_per_s: float = 1.0, updates_per_s: float = 50 / 60, burst: int = 20) -> None:
        self.token_error: str | None = None
        self.conversations = {"C1", "C2", "G1", "D1"}
        self.archived: set[str] = set()
        self.messages: list[Message] = []
        self.calls: list[Call] = []
        self._rates = {"chat.postMessage": posts_per_s, "chat.update": updates_per_s}
        self._burst = burst
        self._buckets: dict[str, _Bucket] = {}
        self._failing: dict[str, list[str]] = {}
        self._throttled: dict[str, list[int]] = {}
        self._lost: dict[str, int] = {}
        self._last_ts = 1_700_000_000_000_000
        self._changed = RepeatedEvent()

    def __repr__(self) -> str:
        return f"<Workspace {len(self.messages)} messages, {len(self.calls)} calls>"

    # -- faults -------------------------------------------------------------------------------------------------------

    def fail(self, method: str, *errors: str) -> None:
        """Makes the next calls of a method fail with these errors."""
        self._failing.setdefault(method, []).extend(errors)

    def throttle(self, method: str, *after_s: int) -> None:
        """Makes the next calls of a method fail with 429 and these values of ``Retry-After``."""
        self._throttled.setdefault(method, []).extend(after_s)

    def lose_answer(self, method: str, times: int = 1) -> None:
        """Executes the next calls of a method, and closes the connection instead of answering."""
        self._lost[method] = times

    def delete(self, message: Message) -> None:
        """A user deletes a message."""
        self.messages.remove(message)

    # -- observations -------------------------------------------------------------------------------------------------

    def texts(self, channel: str = "C1") -> list[str]:
        """The current texts of a conversation."""
        return [message.text for message in self.messages if message.channel == channel]

    def called(self, method: str) -> list[str]:
        """The results of all calls of a method."""
        return [call.result for call in self.calls if call.method == method]

    async def wait_until(self, holds: Callable[[Workspace], bool]) -> None:
        """Waits until a condition holds, for at most 20 s."""
        with trio.fail_after(20):
            while not holds(self):
                await self._changed.wait()

    async def wait_texts(self, *texts: str, channel: str = "C1") -> None:
        """Waits until a conversation has exactly these texts."""
        await self.wait_until(lambda each: each.texts(channel) == list(texts))

    # -- the Web API --------------------------------------------------------------------------------------------------

    def answer(self, method: str, headers: Mapping[str, str], body: bytes) -> Response | None:
        """Answers one call; None = the connection is closed instead."""
        try:
            fields = msgspec.json.decode(body) if body else {}
        except ValueError:
            fields = {}
        status, result, value, more = self._evaluate(method, headers, fields)
        self.calls.append(Call(method, fields, result, trio.current_time()))
        self._changed.set()
        if self._lost.get(method, 0) and result == "ok":
            self._lost[method] -= 1
            return None
        return status, {"content-type": "application/json; charset=utf-8", **more}, msgspec.json.encode(value)

    def _evaluate(
        self, method: str, headers: Mapping[str, str], fields: Any
    ) -> tuple[int, str, dict[str, Any], dict[str, str]]:
        def error(code: str) -> tuple[int, str, dict[str, Any], dict[str, str]]:
            return 200, code, {"ok": False, "error": code}, {}

        after_s = self._throttled.get(method) or []
        wait_s = float(after_s.pop(0)) if after_s else self._limit(method, fields)
        if wait_s > 0:
            again = {"retry-after": str(max(1, round(wait_s)))}
            return 429, "ratelimited", {"ok": False, "error": "ratelimited"}, again
        given = headers.get("authorization", "")
        if not given:
            return error("not_authed")
        if given != f"Bearer {TOKEN}":
            return error("invalid_auth")
        if self.token_error is not None:
            return error(self.token_error)
        if not headers.get("content-type", "").startswith("application/json"):
            return error("invalid_post_type")
        if self._failing.get(method):
            return error(self._failing[method].pop(0))
        match method:
            case "auth.test":
                value = {"url": "https://w.slack.com/", "team": "W", "user": "bot", "team_id": "T1", "user_id": BOT}
                return 200, "ok", {"ok": True, **value, "bot_id": "B1", "is_enterprise_install": False}, {}
            case "chat.postMessage" | "chat.update":
                found = self._post(fields) if method == "chat.postMessage" else self._update(fields)
                return (200, "ok", {"ok": True, **found}, {}) if isinstance(found, dict) else error(found)
            case "chat.delete":
                for message in self.messages:
                    if (message.channel, message.ts) == (fields.get("channel"), fields.get("ts")):
                        self.messages.remove(message)
                        return 200, "ok", {"ok": True, "channel": message.channel, "ts": message.ts}, {}
                return error("message_not_found")
            case _:
                return error("unknown_method")

    def _limit(self, method: str, fields: Any) -> float:
        rate = self._rates.get(method)
        if rate is None:
            return 0.0
        now = trio.current_time()
        key = f"{method} {fields.get('channel') if method == 'chat.postMessage' else ''}"
        bucket = self._buckets.setdefault(key, _Bucket(rate, self._burst, self._burst, now))
        return bucket.take(now)

    def _problem(self, fields: Any) -> str | None:
        if fields.get("channel") not in self.conversations:
            return "channel_not_found"
        if fields["channel"] in self.archived:
            return "is_archived"
        return None if fields.get("text") else "no_text"

    def _post(self, fields: Any) -> dict[str, Any] | str:
        problem = self._problem(fields)
        if problem is not None:
            return problem
        warnings: dict[str, Any] = {}
        text = fields["text"]
        if len(text) > MAX_CHARACTERS:
            text = text[:MAX_CHARACTERS]
            warnings = {"response_metadata": {"warnings": ["message_truncated"]}}
        message = Message(fields["channel"], self.new_ts(), fields.get("thread_ts"), [text])
        self.messages.append(message)
        return {"channel": message.channel, "ts": message.ts, "message": {"text": text, "bot_id": "B1"}, **warnings}

    def _update(self, fields: Any) -> dict[str, Any] | str:
        problem = self._problem(fields)
        if problem is not None:
            return problem
        if len(fields["text"].encode()) > EDIT_BYTES:
            return "msg_too_long"
        for message in self.messages:
            if (message.channel, message.ts) == (fields["channel"], fields.get("ts")):
                message.texts.append(fields["text"])
                return {"channel": message.channel, "ts": message.ts, "text": message.text}
        return "message_not_found"

    def new_ts(self) -> str:
        """A new timestamp, which is the id of a message."""
        self._last_ts += 1_000_000
        return f"{self._last_ts // 1_000_000}.{self._last_ts % 1_000_000:06d}"

    # -- in memory ----------------------------------------------------------------------------------------------------

    @property
    def open_now(self) -> int:
        """Always 0: no answer is a stream."""
        return 0

    def transport(self) -> httpx2.AsyncBaseTransport:
        """A transport that calls `answer` in memory."""
        return _MemoryTransport(self)


class _MemoryTransport(httpx2.AsyncBaseTransport):
    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = await request.aread()
        await trio.lowlevel.checkpoint()
        answer = self._workspace.answer(request.url.path.rpartition("/")[2], request.headers, body)
        if answer is None:
            raise httpx2.ReadError("")
        status, headers, content = answer
        return httpx2.Response(status, headers=headers, stream=_Body(content))


class _Body(httpx2.AsyncByteStream):
    def __init__(self, content: bytes) -> None:
        self._rest = [content]

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self._rest:
            raise StopAsyncIteration
        return self._rest.pop()


# -- over a socket ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_slack(workspace: Workspace) -> AsyncIterator[str]:
    """Serves a workspace on loopback; yields the base URL of its API."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, partial(_serve, workspace), 0, host="127.0.0.1"))
        try:
            yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/api"
        finally:
            nursery.cancel_scope.cancel()


async def _serve(workspace: Workspace, stream: trio.SocketStream) -> None:
    received = bytearray()
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while True:
            while b"\r\n\r\n" not in received:
                data = await stream.receive_some()
                if not data:
                    return
                received += data
            head, _, rest = bytes(received).partition(b"\r\n\r\n")
            line, *lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
            received = bytearray(rest)
            length = int(headers.get("content-length", "0"))
            while len(received) < length:
                received += await stream.receive_some()
            body, received = bytes(received[:length]), received[length:]
            verb, path, _ = line.split(" ")
            assert verb == "POST", line
            answer = workspace.answer(path.removeprefix("/api/"), headers, body)
            if answer is None:
                await stream.aclose()
                return
            status, more, content = answer
            fields = [f"HTTP/1.1 {status} Slack", f"content-length: {len(content)}"]
            fields += [f"{name}: {value}" for name, value in more.items()]
            await stream.send_all("\r\n".join([*fields, "", ""]).encode() + content)


# -- events -----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Attempt:
    """One attempt to send an event: the response; status 0 = there was none in time."""

    status: int
    body: bytes
    headers: Mapping[str, str]


class EventSender:
    """Sends events to an app's request URL, as Slack does.

    Args:
        client: Sends requests to the app.
        path: The path of the request URL.
        pauses_s: The pauses before further attempts. Slack makes three: at once, after a minute, after five.
    """

    def __init__(
        self, client: httpx2.AsyncClient, path: str, *, secret: str = SECRET, pauses_s: tuple[float, ...] = (0, 0, 0)
    ) -> None:
        self._client = client
        self._path = path
        self._secret = secret
        self._pauses_s = pauses_s
        self._events = 0

    async def message(self, workspace: Workspace, text: str, *, kind: str = "message", **event: Any) -> str:
        """A user writes a message; returns its ``ts``. Fails unless the event is acknowledged."""
        fields = {
            "type": kind,
            "channel": "C1",
            "channel_type": "channel",
            "user": "U1",
            "text": text,
            "ts": event.get("ts") or workspace.new_ts(),
            **event,
        }
        if kind == "app_mention":
            del fields["channel_type"]
        attempts = await self.event(fields)
        assert attempts[-1].status == 200, attempts
        return str(fields["ts"])

    async def event(self, event: Mapping[str, Any]) -> list[Attempt]:
        """Sends an event until it is acknowledged, but no more often than Slack."""
        self._events += 1
        envelope = {
            "token": "deprecated",
            "team_id": "T1",
            "api_app_id": "A1",
            "event": event,
            "type": "event_callback",
            "event_id": f"Ev{self._events:08d}",
            "event_time": int(time.time()),
            "authorizations": [
                {"enterprise_id": None, "team_id": "T1", "user_id": BOT, "is_bot": True, "is_enterprise_install": False}
            ],
            "is_ext_shared_channel": False,
            "event_context": "4-x",
        }
        body = msgspec.json.encode(envelope)
        attempts = [await self.post(body)]
        for number, pause_s in enumerate(self._pauses_s, 1):
            last = attempts[-1]
            if 200 <= last.status < 300 or last.headers.get("x-slack-no-retry") == "1":
                break
            await trio.sleep(pause_s)
            reason = "http_timeout" if last.status == 0 else "http_error"
            attempts.append(await self.post(body, {"x-slack-retry-num": str(number), "x-slack-retry-reason": reason}))
        return attempts

    async def post(self, body: bytes, headers: Mapping[str, str] | None = None) -> Attempt:
        """Signs and sends one request, and waits at most `EVENT_TIMEOUT_S` for the response."""
        timestamp = str(int(time.time()))
        signed = f"v0:{timestamp}:".encode() + body
        signature = "v0=" + hmac.new(self._secret.encode(), signed, hashlib.sha256).hexdigest()
        fields = {
            "content-type": "application/json",
            "user-agent": "Slackbot 1.0 (+https://api.slack.com/robots)",
            "x-slack-request-timestamp": timestamp,
            "x-slack-signature": signature,
            **(headers or {}),
        }
        with trio.move_on_after(EVENT_TIMEOUT_S):
            response = await self._client.post(self._path, content=body, headers=fields)
            return Attempt(response.status_code, response.content, response.headers)
        return Attempt(0, b"", {})
