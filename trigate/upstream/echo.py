"""The embedded ``echo`` upstream: answers with the last user message, word by word.

The echo is deterministic. It is an `httpx2.AsyncBaseTransport` that speaks OpenAI's dialect, so a call to it runs
through the same code as a call to any provider. It serves demonstrations and tests, as ``trigate/echo``.

It supports ``n``, ``stop``, ``max_tokens`` / ``max_completion_tokens``, ``stream`` and
``stream_options.include_usage``. Its usage counts *words*, as ``system_fingerprint`` states. It has no tools.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import attrs
import httpx2
import msgspec
import trio

MODEL_ID = "echo"
_FINGERPRINT = "trigate-echo; usage counts words"
_WORD = re.compile(r"\s*\S+")


@attrs.frozen(kw_only=True)
class _Answer:
    """The text of one choice.

    Attributes:
        words: The words with the white space before each; joined, they are the text.
    """

    words: tuple[str, ...]
    finish_reason: str

    @property
    def text(self) -> str:
        return "".join(self.words)


def _text_of(content: object) -> str:
    """Returns the text of a message's content, which is a string or a list of parts; empty if it has no text.

    >>> _text_of([{"type": "text", "text": "a "}, {"type": "image_url"}, {"type": "text", "text": "b"}]), _text_of(None)
    ('a b', '')
    """
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return ""


def answer(payload: dict[str, Any]) -> _Answer:
    """Returns the echo's answer to a chat request: the last user message, limited by ``stop`` and the token limit.

    >>> answer({"messages": [{"role": "user", "content": "Hello,  dear world"}], "max_tokens": 2})
    _Answer(words=('Hello,', '  dear'), finish_reason='length')
    >>> answer({"messages": [{"role": "user", "content": "one two three"}], "stop": ["two"]}).text
    'one '
    """
    contents = [message.get("content") for message in payload.get("messages", []) if message.get("role") == "user"]
    text = _text_of(contents[-1]) if contents else ""
    stop_option = payload.get("stop")
    for stop in stop_option if isinstance(stop_option, list) else [stop_option]:
        if isinstance(stop, str) and stop:
            text = text.partition(stop)[0]
    words = _WORD.findall(text)
    if words:
        words[-1] += text[len("".join(words)) :]
    elif text:
        words = [text]
    limit = payload.get("max_completion_tokens") or payload.get("max_tokens")
    if isinstance(limit, int) and len(words) > limit:
        return _Answer(words=tuple(words[: max(limit, 0)]), finish_reason="length")
    return _Answer(words=tuple(words), finish_reason="stop")


def _usage(payload: dict[str, Any], answered: _Answer, n: int) -> dict[str, int]:
    prompt = sum(len(_text_of(message.get("content")).split()) for message in payload.get("messages", []))
    completion = len(answered.words) * n
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class _Events(httpx2.AsyncByteStream):
    """The body of a streamed answer: SSE events, with a pause before each."""

    def __init__(self, events: list[bytes], pause_s: float) -> None:
        self._events = events
        self._pause_s = pause_s

    async def __aiter__(self) -> AsyncIterator[bytes]:  # noqa: ASYNC900
        # This generator holds no scope, nursery or resource across its yields, so it can be abandoned at any of them.
        for event in self._events:
            await trio.sleep(self._pause_s)
            yield event


class EchoTransport(httpx2.AsyncBaseTransport):
    """Answers chat completions like a provider, without a socket.

    Args:
        words_per_s: The pace of a streamed answer in words per second; 0 = as fast as it is read.
    """

    def __init__(self, *, words_per_s: float = 0.0) -> None:
        self._pause_s = 1 / words_per_s if words_per_s else 0.0
        self._count = 0

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = await request.aread()
        if not request.url.path.endswith("/chat/completions"):
            return _error(404, f"The echo model serves chat/completions only, not {request.url.path}.", None)
        try:
            payload = msgspec.json.decode(body)
        except (ValueError, RecursionError) as error:
            # the gateway forwards fields that it does not decode: 1e400, half a surrogate pair
            return _error(400, f"The echo model cannot read this body: {error}.", None)
        n = 1 if payload.get("n") is None else payload["n"]
        if type(n) is not int or not 1 <= n <= 128:
            return _error(400, "n must be an integer from 1 to 128.", "n")
        self._count += 1
        answered = answer(payload)
        head = {
            "id": f"chatcmpl-echo{self._count}",
            "object": "chat.completion.chunk" if payload.get("stream") else "chat.completion",
            "created": 0,
            "model": MODEL_ID,
            "system_fingerprint": _FINGERPRINT,
        }
        if not payload.get("stream"):
            message = {"role": "assistant", "content": answered.text, "refusal": None}
            choices = [
                {"index": i, "message": message, "logprobs": None, "finish_reason": answered.finish_reason}
                for i in range(n)
            ]
            await trio.lowlevel.checkpoint()
            return httpx2.Response(200, json={**head, "choices": choices, "usage": _usage(payload, answered, n)})

        def chunk(index: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            return {**head, "choices": [choice]}

        chunks = [chunk(i, {"role": "assistant", "content": ""}) for i in range(n)]
        chunks += [chunk(i, {"content": word}) for word in answered.words for i in range(n)]
        chunks += [chunk(i, {}, answered.finish_reason) for i in range(n)]
        options = payload.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            chunks.append({**head, "choices": [], "usage": _usage(payload, answered, n)})
        events = [b"data: " + msgspec.json.encode(event) + b"\n\n" for event in chunks]
        events.append(b"data: [DONE]\n\n")
        return httpx2.Response(
            200, headers={"content-type": "text/event-stream"}, stream=_Events(events, self._pause_s)
        )


def _error(status: int, message: str, param: str | None) -> httpx2.Response:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    return httpx2.Response(status, json={"error": error})
