"""One request to ``/hooks/NAME`` whose head has been checked: what happens with its body.

`PlatformCall` passes it to the adapter of a channel. `MessageCall` checks the signature, decodes the message, accepts a
run and answers: with the result, as a stream, or with 202. The steps and their order are described in `endpoint`.

A call drives the client's `ClientResponse` itself: the answer of a model must not pass through a web framework's
response objects, for the reasons that `trigate.asgi.dispatch` gives.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import attrs
import msgspec
import trio

from trigate import signatures
from trigate.channels.adapter import Adapter
from trigate.config.sections import HookConfig
from trigate.dialects.endpoints import CHAT
from trigate.errors import BadRequest, Header, IdempotencyConflict, MethodNotAllowed, RunStopped
from trigate.exchange.answers import stream_headers
from trigate.exchange.client_response import ClientResponse
from trigate.keys.key import Key
from trigate.runs.client import RunClient
from trigate.runs.request import CLIENT_LEFT, RunRequest
from trigate.runs.service import Runs
from trigate.signatures import Verifier
from trigate.store.records import ENDED, Run
from trigate.webhooks import payload

_IDEMPOTENCY_KEY = re.compile(rb"[!-~]{1,256}")
_DETACH_S = 2.0
_READ_INLINE_BYTES = 64 * 1024
"""How long a send in progress may take after its client has disconnected, in seconds."""
_JSON: Header = (b"content-type", b"application/json")


@attrs.frozen(kw_only=True)
class HookHead:
    """The head of a request to a hook.

    Attributes:
        headers: By lower-case name; of a repeated name, the last value.
        repeated: The names of the headers that occur more than once.
        query: The query of the URL, undecoded.
        client: The address of the client; None = the connection has none.
        authorize: Checks the gateway key of the request, and returns that (`ANYBODY` = the gateway has no keys). Raises
            `Unauthenticated` or `Forbidden`.
    """

    name: str
    method: str
    headers: Mapping[bytes, bytes]
    repeated: frozenset[bytes]
    query: bytes
    client: str | None
    authorize: Callable[[], Key]


class HookCall(Protocol):
    """A request whose head has been checked, and whose body is yet to be read.

    Attributes:
        body_bytes: The size limit of the body that its hook sets; None = it sets none.
        is_verified: Whether the sender is known before the body has been read.
    """

    body_bytes: int | None
    is_verified: bool

    async def serve(self, body: bytes, response: ClientResponse) -> None:
        """Answers the request. The caller cancels this when the client disconnects.

        Raises:
            GatewayError: The request cannot be served, and nothing has been sent.
        """


class PlatformCall:
    """A platform's request to its channel. The adapter authenticates and stores what it brings (`HookCall`)."""

    def __init__(self, adapter: Adapter, head: HookHead, hook: HookConfig) -> None:
        self._adapter = adapter
        self._headers = head.headers
        self.body_bytes: int | None = hook.body_bytes
        self.is_verified = False

    async def serve(self, body: bytes, response: ClientResponse) -> None:
        """Passes the body to the adapter, and sends what it returns.

        Raises:
            GatewayError: As `Adapter.receive`.
        """
        await response.respond(*await self._adapter.receive(self._headers, body))


class MessageCall:
    """A message to a configured hook (`HookCall`)."""

    def __init__(
        self,
        runs: Runs,
        head: HookHead,
        hook: HookConfig,
        verifier: Verifier | None,
        owner: str,
        query: Mapping[str, str],
    ) -> None:
        self._runs = runs
        self._head = head
        self._hook = hook
        self._verifier = verifier
        self._owner = owner
        self._query = query
        self._prefers_async = payload.prefers_async(head.headers.get(b"prefer", b""))
        self._is_async = self._prefers_async or hook.reply == "callback"
        self._wants_events = payload.accepts_events(head.headers.get(b"accept", b""))
        self.body_bytes: int | None = hook.body_bytes
        self.is_verified = verifier is None or verifier.scheme == "bearer"

    async def serve(self, body: bytes, response: ClientResponse) -> None:
        """Verifies the signature, then answers a challenge, or accepts the message as a run and answers with its
        result.

        Raises:
            GatewayError: The message is refused, or cannot be stored.
        """
        head, hook, verifier = self._head, self._hook, self._verifier
        signed_id = None
        if verifier is not None and head.method == "POST":
            signed_id = verifier.verify(head.headers, body, now=time.time()).event_id
        challenge = signatures.challenge(
            verifier.scheme if verifier is not None else None,
            head.method,
            self._query,
            body,
            tokens=(hook.verify_token.literal or "",) if hook.verify_token is not None else (),
        )
        if challenge is not None:
            await response.respond(*challenge.to_response())
            return
        if head.method != "POST":
            raise MethodNotAllowed(head.method, f"/hooks/{head.name}", allowed=("POST",))
        if len(body) <= _READ_INLINE_BYTES:
            message = self._read(body)
        else:  # expressions over a large body take long
            message = await trio.to_thread.run_sync(self._read, body)
        if message is None:
            await response.respond(204, [], b"")
            return
        # The signed id comes first: otherwise an attacker could replay a recorded request under another key.
        key = signed_id or self._header_key() or message.event_id
        await self._answer(self._run_request(message), (key, hashlib.sha256(body).digest()) if key else None, response)

    def _read(self, body: bytes) -> payload.Message | None:
        kind = payload.media_type(self._head.headers.get(b"content-type", b""))
        return payload.read(self._head.name, self._hook, payload.decode(body, kind))

    def _header_key(self) -> str | None:
        key = self._head.headers.get(b"idempotency-key")
        if key is None:
            return None
        if not _IDEMPOTENCY_KEY.fullmatch(key):
            raise BadRequest("Idempotency-Key must be 1 to 256 visible ASCII characters.", param="Idempotency-Key")
        return key.decode()

    def _run_request(self, message: payload.Message) -> RunRequest:
        hook, name = self._hook, self._head.name
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

    async def _answer(
        self, request: RunRequest, idempotency: tuple[str, bytes] | None, response: ClientResponse
    ) -> None:
        """Accepts a run, or finds the one that its idempotency key stands for, and answers with 202 or its result."""
        while True:
            claim = await self._runs.accept(request, acknowledged=self._is_async, idempotency=idempotency)
            if claim.differs:
                raise IdempotencyConflict("This idempotency key was used for a message with another body.")
            run = claim.run
            headers = [(b"x-run-id", run.id.encode())]
            if not claim.is_new:
                headers.append((b"idempotency-replayed", b"true"))
            if self._is_async and (claim.is_new or run.acknowledged or run.state in ENDED):
                if claim.is_new:
                    self._runs.execute_soon(run)
                await self._accepted(run, headers, response)
                return
            if not claim.is_new:
                run = await self._runs.wait_ended(run.id)
                if run.status == CLIENT_LEFT:  # its key is free again: one of the requests that waited claims it
                    continue
                if self._is_async:
                    await self._accepted(run, headers, response)
                    return
                break
            run = await self._execute(run, request, headers, response)
            headers = []  # they are in the response
            break
        if not response.committed:
            await self._send_result(run, headers, response)

    async def _accepted(self, run: Run, headers: list[Header], response: ClientResponse) -> None:
        """Answers 202, with the location where the run can be fetched."""
        location = f"/hooks/{run.channel}/runs/{run.id}".encode()
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
        await response.respond(202, [_JSON, (b"location", location), *headers], msgspec.json.encode(body))

    async def _execute(self, run: Run, request: RunRequest, headers: list[Header], response: ClientResponse) -> Run:
        """Executes a run for the client that waits. With ``on_disconnect = "finish"`` the service executes it, so that
        it continues after the client has disconnected; otherwise this task does."""
        response.headers += headers
        client = RunClient(response, is_streamed=self._wants_events and request.action == "chat")
        if not request.finish:
            return await self._runs.execute(run, client=client)
        handle = self._runs.execute_soon(run, client=client)
        try:
            await handle.done.wait()
        finally:
            if not handle.done.is_set():
                self._runs.acknowledge_late(run)
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _DETACH_S):
                    await client.detach()
        return handle.run

    async def _send_result(self, run: Run, headers: list[Header], response: ClientResponse) -> None:
        """Answers with the stored result of a run."""
        if run.state == "completed":
            if self._wants_events and run.action == "chat":
                await response.start(200, [*stream_headers(CHAT.stream_type), *headers])
                await response.end(events_of(run))
            else:
                await response.respond(200, [_JSON, *headers], run.result)
        elif run.state == "failed":
            if run.status in (429, 503):
                headers = [*headers, (b"retry-after", b"1")]
            await response.respond(run.status, [_JSON, *headers], run.result)
        else:
            status, own, body = RunStopped(
                f"The run {run.id} was stopped before its answer was complete."
            ).to_response()
            await response.respond(status, [*own, *headers], body)


def events_of(run: Run) -> bytes:
    """Encodes a stored result as the events of a stream: the whole reply, the finish reason, the usage, ``[DONE]``."""
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
