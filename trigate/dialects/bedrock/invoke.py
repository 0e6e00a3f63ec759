"""Anthropic's own format at Bedrock: ``InvokeModel``, for clients of that format and Anthropic's models.

Nothing has to be translated, so the markers of the cache, signatures and new blocks go through as they are. A request
differs in its envelope: the model is in the path, and betas are a field of the body. Bedrock refuses fields and betas
that it does not know, so only known ones are sent, and the others are named as dropped.

A stream has Anthropic's events, each in base64 in a message of AWS's framing.

**Source:** "Anthropic Claude Messages API" in the Amazon Bedrock User Guide; ``InvokeModelWithResponseStream`` in the
API reference; the package ``anthropic`` (``lib/bedrock``) for the envelope.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from trigate.dialects.bedrock.framing import EXCEPTION, FAULT, EventStreamSplitter
from trigate.dialects.bedrock.models import claude_version
from trigate.dialects.vocabulary import as_user_text
from trigate.errors import GatewayError, ProtocolViolation, Truncated
from trigate.openai import sse
from trigate.openai.answer import Usage
from trigate.openai.raw_json import decode_any, join_fields, split_fields
from trigate.openai.stream import StreamReader

BETAS = ("interleaved-thinking-2025-05-14", "context-1m-2025-08-07")
"""The betas that are sent if the configuration names none: newer models refuse the others."""

_VERSION = msgspec.Raw(b'"bedrock-2023-05-31"')
_FIELDS = frozenset(
    (
        *(
            "max_tokens",
            "messages",
            "system",
            "temperature",
            "top_p",
            "top_k",
            "stop_sequences",
            "tools",
            "tool_choice",
        ),
        *("thinking", "output_config", "metadata", "anthropic_version", "anthropic_beta"),
    )
)
_FIELDS_OF_BETAS = {"context_management": "context-management-"}
"""The fields that only a beta allows, and how its name begins."""
_ERROR_TYPES = {
    "validationException": "invalid_request_error",
    "throttlingException": "rate_limit_error",
    "serviceUnavailableException": "overloaded_error",
    "modelTimeoutException": "timeout_error",
}

_raws = msgspec.json.Decoder(list[msgspec.Raw])
_CHUNK = re.compile(rb'data: \{"chunk":\{"bytes":"([A-Za-z0-9+/]*={0,2})"')
_TYPE = re.compile(rb'\{"type":"([a-z_]{1,64})"')

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


def is_claude(model: str) -> bool:
    """Whether a model takes requests in Anthropic's format, as far as its id tells.

    >>> is_claude("eu.anthropic.claude-opus-4-6-v1"), is_claude("us.amazon.nova-pro-v1:0")
    (True, False)
    """
    return "anthropic.claude" in model


def invoke_body(
    fields: Mapping[str, msgspec.Raw], *, model: str, betas: Iterable[str], allowed: tuple[str, ...]
) -> tuple[bytes, tuple[str, ...]]:
    """Makes the body of a request.

    Args:
        fields: The top-level fields of the client's body.
        betas: The betas that the client asks for.
        allowed: Those that may be sent.

    Returns:
        The body, and the names of what was dropped.
    """
    given = decode_any(bytes(fields["anthropic_beta"])) if "anthropic_beta" in fields else None
    asked = [*betas, *(given if isinstance(given, list) else ())]
    sent = [beta for beta in dict.fromkeys(asked) if beta in allowed]
    dropped = [f"anthropic-beta:{beta}" for beta in dict.fromkeys(asked) if beta not in sent and isinstance(beta, str)]
    body: dict[str, msgspec.Raw] = {}
    for name, value in fields.items():
        beta = _FIELDS_OF_BETAS.get(name)
        if name in ("model", "stream"):
            continue
        if name in _FIELDS or (beta is not None and any(each.startswith(beta) for each in sent)):
            body[name] = value
        else:
            dropped.append(name)
    version = claude_version(model)
    if "output_config" in body and version is not None and version < (4, 5):
        config = decode_any(bytes(body["output_config"]))
        if isinstance(config, dict) and "format" not in config:  # what is advisory in it
            del body["output_config"]
            dropped.append("output_config")
    if "tools" in body and b'"defer_loading"' in bytes(body["tools"]):
        body["tools"] = _without_deferred(body["tools"], dropped)
    if b'"system"' in bytes(body["messages"]):
        body["messages"] = _without_system_role(body["messages"])
    body["anthropic_version"] = _VERSION
    body.pop("anthropic_beta", None)
    if sent:
        body["anthropic_beta"] = msgspec.Raw(msgspec.json.encode(sent))
    return join_fields(body), tuple(sorted(set(dropped)))


def _without_deferred(tools: msgspec.Raw, dropped: list[str]) -> msgspec.Raw:
    """Leaves out the tools whose schema a tool of Anthropic's would load, which Bedrock does not have. The others keep
    their bytes, but for the flag."""
    kept = []
    given = _raw_list(tools)
    if given is None:
        return tools
    for raw in given:
        tool = split_fields(raw) if b'"defer_loading"' in raw and raw.startswith(b"{") else {}
        if "defer_loading" in tool:
            if bytes(tool.pop("defer_loading")) == b"true":
                dropped.append("tools.defer_loading")
                continue
            raw = join_fields(tool)
        kept.append(raw)
    return msgspec.Raw(b"[" + b",".join(kept) + b"]")


def _without_system_role(messages: msgspec.Raw) -> msgspec.Raw:
    """Makes each message with the role ``system`` one of the user's, which Anthropic joins to the one before it. The
    others keep their bytes."""
    turns = []
    given = _raw_list(messages)
    if given is None:
        return messages
    for raw in given:
        message = decode_any(raw) if b'"system"' in raw else None
        if isinstance(message, dict) and message.get("role") == "system":
            raw = msgspec.json.encode({"role": "user", "content": _as_user_blocks(message.get("content"))})
        turns.append(raw)
    return msgspec.Raw(b"[" + b",".join(turns) + b"]")


def _as_user_blocks(content: object) -> list[_Json]:
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [
        {**block, "text": as_user_text(text.encode(errors="replace").decode())}
        for block in (blocks if isinstance(blocks, list) else ())
        if isinstance(block, dict) and isinstance(text := block.get("text"), str)
    ]


def _raw_list(value: msgspec.Raw) -> list[bytes] | None:
    """Returns the items of a list, each as it is; None if it is no list, which Bedrock refuses."""
    try:
        return [bytes(raw) for raw in _raws.decode(value)]
    except (ValueError, RecursionError):
        return None


class InvokeReader:
    """Reads a stream of Anthropic's events in AWS's framing. An `exchange.translation.Reader`.

    Args:
        inner: Reads the events themselves.
        upstream: The upstream's name, for messages.
        max_event_bytes: The size limit of a message.
    """

    __slots__ = ("_error", "_inner", "_splitter", "_upstream")

    def __init__(self, inner: StreamReader, *, upstream: str, max_event_bytes: int) -> None:
        self._inner = inner
        self._upstream = upstream
        # base64 makes it longer by a third, and padding follows it
        self._splitter = EventStreamSplitter(max_event_bytes=2 * max_event_bytes)
        self._error: GatewayError | None = None

    @property
    def events(self) -> int:
        """How many events have been returned."""
        return self._inner.events

    @events.setter
    def events(self, value: int) -> None:
        self._inner.events = value

    @property
    def has_content(self) -> bool:
        """A part of the answer has come."""
        return self._inner.has_content

    @property
    def complete(self) -> bool:
        """The last event has come."""
        return self._inner.complete

    @property
    def error(self) -> GatewayError | None:
        """What is wrong with the stream."""
        return self._inner.error or self._error

    @property
    def usage(self) -> Usage | None:
        """The usage that was reported last."""
        return self._inner.usage

    @property
    def kept(self) -> list[bytes] | None:
        """As `Reader.kept`."""
        return self._inner.kept

    @property
    def all_finished(self) -> bool:
        """As `Reader.all_finished`."""
        return self._inner.all_finished

    def feed(self, piece: bytes) -> bytes:
        """As `Reader.feed`."""
        problem = ""
        try:
            messages = self._splitter.feed(piece)
        except sse.EventTooLarge as error:
            messages, problem = error.before, str(error)
        events = []
        for message in messages:
            is_fault = message.startswith(FAULT)
            event = None if is_fault else _event_of(message)
            if event is None:
                problem = message[len(FAULT) :].decode().strip() if is_fault else "a message is no event"
                break
            events.append(event)
        data = self._inner.feed(b"".join(events)) if events else b""
        if problem and not self._inner.complete and self._inner.error is None:
            self._error = ProtocolViolation(f"The upstream {self._upstream} sent a broken stream: {problem}.")
        return data

    def feed_end(self) -> bytes:
        """As `Reader.feed_end`."""
        if self._splitter.pending and not self._inner.complete:
            self._error = Truncated(f"The upstream {self._upstream} ended its stream before it was complete.")
            return b""
        return self._inner.feed_end()


def _event_of(framed: bytes) -> bytes | None:
    """Returns the event in a message, or that of an exception; None = it has none. JSON is parsed only where the
    message is not written as usual."""
    if (found := _CHUNK.match(framed)) is not None and not len(found[1]) % 4:
        event = binascii.a2b_base64(found[1])
        if (kind := _TYPE.match(event)) is not None and b"\n" not in event and b"\r" not in event:
            return b"event: %b\ndata: %b\n\n" % (kind[1], event)
    data = sse.data_of(framed)
    value = decode_any(data) if data is not None else None
    if not isinstance(value, dict) or len(value) != 1:
        return None
    [(name, fields)] = value.items()
    fields = fields if isinstance(fields, dict) else {}
    if framed.startswith(EXCEPTION):
        name = name[:1].lower() + name[1:]
        text = fields.get("message")
        message = text if isinstance(text, str) and text else f"Bedrock reported {name}."
        error = {"type": _ERROR_TYPES.get(name, "api_error"), "message": message}
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode({"type": "error", "error": error})
    try:
        event = base64.b64decode(fields.get("bytes") or "", validate=True)
    except (binascii.Error, TypeError, ValueError):
        return None
    inner = decode_any(event)
    named = inner.get("type") if isinstance(inner, dict) else None
    if not isinstance(named, str) or not named.isascii() or not named.isprintable():
        return None
    return b"event: %b\ndata: %b\n\n" % (named.encode(), event.replace(b"\n", b" ").replace(b"\r", b" "))
