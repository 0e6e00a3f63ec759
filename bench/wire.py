"""The answers of the mock upstream, prepared: chat completions, Anthropic's Messages and OpenAI's Responses.

An answer is bytes, with their HTTP framing. Of a stream's content event, the timestamp alone is left open.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from bench import events

MODEL = "mock-model"
STAMP = b"0" * 16
"""Where the timestamp goes."""
_WORDS = b"the quick brown fox jumps over the lazy dog and runs on "
_INPUT_TOKENS = 9
_OUTPUT_TOKENS = 17

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """Frames a piece of a body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def reply(body: bytes, status: str = "200 OK") -> bytes:
    """Frames a whole JSON answer."""
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        status.encode(),
        len(body),
        body,
    )


def text(size: int) -> bytes:
    """A text of this many bytes."""
    return (_WORDS * (size // len(_WORDS) + 1))[:size]


def stamped(size: int) -> str:
    """The text of a content event, with the place of its timestamp."""
    return "@" + STAMP.decode() + text(size - 17).decode()


class Format:
    """A format of answers."""

    def begin(self) -> bytes:
        """The events before the first content."""
        raise NotImplementedError

    def content(self, size: int) -> tuple[bytes, bytes]:
        """The bytes of a content event before and after its timestamp."""
        before, after = self.content_event(stamped(size)).split(STAMP)
        return before, after

    def content_event(self, said: str) -> bytes:
        """A content event."""
        raise NotImplementedError

    def end(self, count: int, *, usage: bool) -> bytes:
        """The events after the last content.

        Args:
            count: The number of content events.
            usage: Whether the call asks for the usage.
        """
        raise NotImplementedError

    def answer(self, size: int) -> bytes:
        """A plain answer."""
        raise NotImplementedError


_IDS: Mapping[str, Any] = {"model": MODEL, "id": "chatcmpl-bench", "created": 1750000000}
_FINGERPRINT: Mapping[str, Any] = {"system_fingerprint": "fp_bench"}


class Chat(Format):
    """Chat completions."""

    def _event(self, delta: Mapping[str, str], finish_reason: str | None = None) -> bytes:
        return chunk(events.event(events.chunk(delta, finish_reason, **_IDS, **_FINGERPRINT)))

    def begin(self) -> bytes:
        return self._event({"role": "assistant", "content": ""})

    def content_event(self, said: str) -> bytes:
        return self._event({"content": said})

    def end(self, count: int, *, usage: bool) -> bytes:
        finish = self._event({}, "stop")
        counted = events.usage_chunk(events.tokens(_INPUT_TOKENS, count), **_IDS)
        return finish + (chunk(events.event(counted)) if usage else b"") + chunk(events.DONE) + END

    def answer(self, size: int) -> bytes:
        message = {"role": "assistant", "content": text(size).decode(), "refusal": None}
        choice = events.choice(message=message, logprobs=None, finish_reason="stop")
        tokens = events.tokens(_INPUT_TOKENS, _OUTPUT_TOKENS)
        return reply(events.encode(events.completion(choice, tokens, **_IDS, **_FINGERPRINT)))


def _named(kind: str, **fields: object) -> bytes:
    value = {"type": kind, **fields}
    return chunk(b"event: %b\ndata: %b\n\n" % (kind.encode(), events.encode(value)))


class Messages(Format):
    """Anthropic's Messages."""

    def _message(self, **fields: object) -> dict[str, object]:
        return {"id": "msg_bench", "type": "message", "role": "assistant", "model": MODEL, **fields}

    def _usage(self, count: int) -> dict[str, int]:
        cached = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        return {"input_tokens": _INPUT_TOKENS, **cached, "output_tokens": count}

    def begin(self) -> bytes:
        message = self._message(content=[], stop_reason=None, stop_sequence=None, usage=self._usage(1))
        block = {"type": "text", "text": ""}
        return _named("message_start", message=message) + _named("content_block_start", index=0, content_block=block)

    def content_event(self, said: str) -> bytes:
        return _named("content_block_delta", index=0, delta={"type": "text_delta", "text": said})

    def end(self, count: int, *, usage: bool) -> bytes:
        delta = {"stop_reason": "end_turn", "stop_sequence": None}
        stop = _named("content_block_stop", index=0)
        return stop + _named("message_delta", delta=delta, usage=self._usage(count)) + _named("message_stop") + END

    def answer(self, size: int) -> bytes:
        content = [{"type": "text", "text": text(size).decode()}]
        usage = self._usage(_OUTPUT_TOKENS)
        message = self._message(content=content, stop_reason="end_turn", stop_sequence=None, usage=usage)
        return reply(events.encode(message))


class Responses(Format):
    """OpenAI's Responses. The sequence numbers of the content events are all the same: a prepared event has no other.
    The text is not repeated behind the content, as OpenAI does, so that each piece of it is counted once."""

    def _response(self, status: str, **fields: object) -> dict[str, object]:
        rest: dict[str, object] = {
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "tools": [],
        }
        settings = {"parallel_tool_calls": True, "temperature": 1.0, "tool_choice": "auto", "top_p": 1.0}
        head = {"id": "resp_bench", "object": "response", "created_at": 1750000000, "status": status, "model": MODEL}
        return {**head, **rest, **settings, "output": [], "usage": None, **fields}

    def _usage(self, count: int) -> dict[str, object]:
        tokens = {"input_tokens": _INPUT_TOKENS, "output_tokens": count, "total_tokens": _INPUT_TOKENS + count}
        details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
        return {**tokens, **details}

    def _item(self, status: str, content: list[object]) -> dict[str, object]:
        return {"id": "msg_bench", "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self, said: str) -> dict[str, object]:
        return {"type": "output_text", "text": said, "annotations": [], "logprobs": []}

    def begin(self) -> bytes:
        part = {"item_id": "msg_bench", "output_index": 0, "content_index": 0, "part": self._part("")}
        return (
            _named("response.created", sequence_number=0, response=self._response("in_progress"))
            + _named("response.in_progress", sequence_number=1, response=self._response("in_progress"))
            + _named(
                "response.output_item.added", sequence_number=2, output_index=0, item=self._item("in_progress", [])
            )
            + _named("response.content_part.added", sequence_number=3, **part)
        )

    def content_event(self, said: str) -> bytes:
        place = {"item_id": "msg_bench", "output_index": 0, "content_index": 0, "logprobs": []}
        return _named("response.output_text.delta", sequence_number=4, **place, delta=said)

    def end(self, count: int, *, usage: bool) -> bytes:
        item = self._item("completed", [self._part("")])
        response = self._response("completed", output=[item], usage=self._usage(count))
        return (
            _named("response.output_item.done", sequence_number=5, output_index=0, item=item)
            + _named("response.completed", sequence_number=6, response=response)
            + END
        )

    def answer(self, size: int) -> bytes:
        item = self._item("completed", [self._part(text(size).decode())])
        return reply(json.dumps(self._response("completed", output=[item], usage=self._usage(_OUTPUT_TOKENS))).encode())


class Prepared:
    """A format with its answers, each made once."""

    def __init__(self, form: Format) -> None:
        self.begin = STREAM_HEAD + form.begin()
        self.content = cache(form.content)
        self.end = cache(form.end)
        self.answer = cache(form.answer)


FORMATS: Mapping[bytes, Prepared] = {
    b"/chat/completions": Prepared(Chat()),
    b"/messages": Prepared(Messages()),
    b"/responses": Prepared(Responses()),
}
"""The formats by the ends of their paths."""


def format_of(url: bytes) -> Prepared | None:
    """The format of a path; None = it is no call.

    >>> format_of(b"/v1/messages?beta=true") is FORMATS[b"/messages"], format_of(b"/v1/models") is None
    (True, True)
    """
    path = url.partition(b"?")[0]
    return next((form for end, form in FORMATS.items() if path.endswith(end)), None)


MODELS = reply(
    b'{"object":"list","data":[{"id":"%b","object":"model","created":1750000000,"owned_by":"bench"}]}' % MODEL.encode()
)
