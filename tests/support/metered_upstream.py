"""A provider whose callers say what each call costs: for tests of limits, budgets and costs over real sockets.

The text of a call's last message selects the answer: ``KIND PROMPT COMPLETION MS``, such as ``ok 12 30 50``. The usage
that it reports is ``PROMPT`` and ``COMPLETION`` tokens, and the answer takes about ``MS`` milliseconds.

============  ==========================================================================================================
``ok``        answers, plain or as a stream
``silent``    answers without usage
``fails``     answers 500
``refuses``   answers 400
``cut``       sends half of a stream and closes the connection; an answer that is not streamed is half sent
``endless``   streams a word every 20 ms, for ever
============  ==========================================================================================================
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import attrs
import trio

_WORDS = 8


@attrs.define(kw_only=True)
class Call:
    """A call as this provider saw it.

    Attributes:
        request_id: ``x-request-id``, as the gateway sent it.
        began_at, ended_at: POSIX times; None = it is still answered.
    """

    request_id: str
    text: str
    streamed: bool
    wants_usage: bool
    began_at: float
    ended_at: float | None = None


@attrs.define(eq=False)
class MeteredUpstream:
    """The provider.

    Attributes:
        url: Its base URL, with ``/v1``.
        calls: Every call, in the order of their arrival.
    """

    url: str = ""
    calls: list[Call] = attrs.field(factory=list)

    @property
    def busy(self) -> int:
        """How many calls are being answered."""
        return sum(call.ended_at is None for call in self.calls)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answers requests on a connection until it is closed."""
        data = b""
        async with stream:
            try:
                while True:
                    while b"\r\n\r\n" not in data:
                        more = await stream.receive_some()
                        if not more:
                            return
                        data += more
                    head, _, data = data.partition(b"\r\n\r\n")
                    _, *lines = head.decode("latin-1").lower().split("\r\n")
                    fields = dict(line.split(": ", 1) for line in lines)
                    length = int(fields.get("content-length", "0"))
                    while len(data) < length:
                        data += await stream.receive_some()
                    body, data = data[:length], data[length:]
                    if not body:  # the list of models
                        await _send(stream, 200, b'{"object":"list","data":[{"id":"m","object":"model"}]}')
                        continue
                    await self._answer(stream, fields, json.loads(body))
            except (trio.BrokenResourceError, trio.ClosedResourceError, _Cut):
                return

    async def _answer(self, stream: trio.SocketStream, fields: dict[str, str], asked: dict[str, object]) -> None:
        messages = asked["messages"]
        assert isinstance(messages, list)
        options = asked.get("stream_options") or {}
        assert isinstance(options, dict)
        call = Call(
            request_id=fields.get("x-request-id", ""),
            text=messages[-1]["content"],
            streamed=bool(asked.get("stream")),
            wants_usage=bool(options.get("include_usage")),
            began_at=time.time(),
        )
        self.calls.append(call)
        try:
            await _play(stream, call)
        finally:
            call.ended_at = time.time()


class _Cut(Exception):
    """The connection is to be closed."""


async def _play(stream: trio.SocketStream, call: Call) -> None:
    kind, prompt, completion, took_ms = call.text.split()[:4]
    pause_s = float(took_ms) / 1000 / _WORDS
    if kind in ("fails", "refuses"):
        await trio.sleep(pause_s)
        error = {"error": {"message": "said the upstream", "type": "t", "param": None, "code": "c"}}
        await _send(stream, 500 if kind == "fails" else 400, json.dumps(error).encode())
        return
    usage = {
        "prompt_tokens": int(prompt),
        "completion_tokens": int(completion),
        "total_tokens": int(prompt) + int(completion),
    }
    head: dict[str, object] = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
    if not call.streamed:
        await trio.sleep(pause_s * _WORDS)
        choice = {"index": 0, "message": {"role": "assistant", "content": "word " * _WORDS}, "finish_reason": "stop"}
        answer = {**head, "choices": [choice], **({} if kind == "silent" else {"usage": usage})}
        await _send(stream, 200, json.dumps(answer).encode(), half=kind == "cut")
        return
    await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    head["object"] = "chat.completion.chunk"
    number = 0
    while kind == "endless" or number < _WORDS:
        number += 1
        await trio.sleep(0.02 if kind == "endless" else pause_s)
        choice = {"index": 0, "delta": {"content": "word "}, "finish_reason": None}
        await _event(stream, {**head, "choices": [choice]})
        if kind == "cut" and number == _WORDS // 2:
            raise _Cut
    await _event(stream, {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if call.wants_usage and kind != "silent":
        await _event(stream, {**head, "choices": [], "usage": usage})
    await stream.send_all(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


async def _event(stream: trio.SocketStream, value: object) -> None:
    event = b"data: %b\n\n" % json.dumps(value).encode()
    await stream.send_all(b"%x\r\n%b\r\n" % (len(event), event))


async def _send(stream: trio.SocketStream, status: int, body: bytes, *, half: bool = False) -> None:
    head = b"HTTP/1.1 %d OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
    await stream.send_all(head + (body[: len(body) // 2] if half else body))
    if half:
        raise _Cut


@asynccontextmanager
async def open_metered_upstream() -> AsyncIterator[MeteredUpstream]:
    """Serves the provider of this module's docstring on a free port of this machine."""
    upstream = MeteredUpstream()
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, upstream.serve, 0, host="127.0.0.1"))
        upstream.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/v1"
        yield upstream
        nursery.cancel_scope.cancel()
