"""The OpenAI wire format, as far as the gateway acts on it.

Forward what you got: a request body is taken apart into its top-level fields, each kept as the bytes that the client
sent (`msgspec.Raw`), and put together again with another ``model``. Only what the gateway acts on is decoded; numbers
of any size, unknown fields and their order pass through untouched.

Nothing here waits, reads a clock or knows a server.

Source: OpenAI API reference (chat/completions, completions, embeddings, responses, moderations, audio/speech,
images/generations); which events end a stream is from the "Streaming" pages of the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from trigate.errors import GatewayError, ProtocolViolation, StreamError, Truncated
from trigate.openai import sse
from trigate.openai.answer import Usage, _answer_fields, _usage
from trigate.openai.continuation import _without_roles
from trigate.openai.endpoints import Endpoint
from trigate.openai.raw_json import _fields, _has_plain_model_key, _join, decode_any

_ERROR_EVENT = re.compile(rb"event: ?error[\r\n]")
_BEHIND_TOP_LEVEL = re.compile(rb"[{}\r\n]")


# -- the call ---------------------------------------------------------------------------------------------------------


# -- the answer -------------------------------------------------------------------------------------------------------


class StreamReader:
    """A stream on its way through: bytes of the upstream in, bytes for the client out, in whole events.

    On the way it learns what the gateway must know: the first content, the end, an error, the usage; and it puts the
    public model id in the place of the upstream's. JSON is parsed only until the first content, and afterwards only in
    events that carry usage or an error, or may be the last one.

    Nearly every event of nearly every stream is one line, begins like the one before it up to and including the model
    id, and holds nothing that need be known. Such an event is *plain*: the public prefix takes the place of the
    upstream's, and a few searches see to it that the rest is as harmless as it looks (`_plain`). That costs a quarter
    of the general way. An event with the same prefix as one whose JSON was parsed has its model at the same place, so
    both ways give the same; a test feeds them the same streams.

    Args:
        model: The public model id, which replaces the upstream's in every event.
        upstream: The upstream's name, for messages.
        max_event_bytes: The bound on an event, and on what comes before the first content.
        choices: How many the client asked for.
        keep_bytes: So much of what is given out is kept, for another upstream to go on with (`kept`).
        seam: The stream goes on with one that broke off: what was the same in all of its events (``id``, ``created``).

    Attributes:
        has_content: Something of the answer has come. Until then nothing is given out.
        complete: The stream's last event has come; what follows is ignored.
        may_end: The stream may close now, or go on.
        usage: The last one that was reported.
        error: What is wrong with the stream, or what the upstream said is; it is of no use afterwards.
        events: How many have been given out.
    """

    __slots__ = (
        "_choices",
        "_endpoint",
        "_finished",
        "_held",
        "_keep_bytes",
        "_kept",
        "_max_bytes",
        "_needle",
        "_prefix",
        "_public",
        "_public_prefix",
        "_replacement",
        "_seam",
        "_seen",
        "_splitter",
        "_steady",
        "_typed",
        "_upstream",
        "complete",
        "error",
        "events",
        "has_content",
        "may_end",
        "usage",
    )

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        model: str,
        upstream: str,
        max_event_bytes: int = 2**24,
        choices: int = 1,
        keep_bytes: int = 0,
        seam: Mapping[str, msgspec.Raw] | None = None,
    ) -> None:
        self._choices = choices
        self._seen: set[object] = set()
        self._finished: set[object] = set()
        self._keep_bytes = keep_bytes
        self._kept: list[bytes] = []
        self._seam = seam
        self._endpoint = endpoint
        self._upstream = upstream
        self._public = msgspec.json.encode(model)
        self._max_bytes = max_event_bytes
        self._splitter = sse.EventSplitter(max_event_bytes=max_event_bytes)
        self._typed = endpoint.marks != (b"[DONE]",)
        self._prefix = b""
        self._public_prefix = b""
        self._needle = b""
        self._replacement = b""
        self._held = b""
        self._steady = False
        self.events = 0
        self.has_content = False
        self.complete = False
        self.may_end = False
        self.usage: Usage | None = None
        self.error: GatewayError | None = None

    def feed(self, piece: bytes) -> bytes:
        """Takes the next piece of the body, and returns what can go to the client now (``b""`` = nothing yet)."""
        if self._steady:
            plain = self._plain(piece)
            if plain is not None:
                if self._keep_bytes:
                    self._keep(plain)
                return plain
        too_large: sse.EventTooLarge | None = None
        try:
            events = self._splitter.feed(piece) if not self.complete else []
        except sse.EventTooLarge as error:
            events, too_large = error.before, error
        frames = [self._held]
        held_bytes = len(self._held)
        for event in events:
            frame = self.read(event)
            if self.error is not None:
                break
            if frame:
                frames.append(frame)
            if self.complete:
                break
            if not self.has_content:
                held_bytes += len(frame)
                if held_bytes > self._max_bytes:
                    self.error = ProtocolViolation(
                        f"The upstream {self._upstream} sent {held_bytes} bytes without any content."
                    )
                    break
        if too_large is not None and not self.complete and self.error is None:
            self.error = ProtocolViolation(f"The upstream {self._upstream} sent too much: {too_large}.")
        self.events += len(frames) - 1
        out = b"".join(frames)
        if not self.has_content and self.error is None:
            self._held = out
            return b""
        self._held = b""
        self._steady = (
            bool(self._prefix)
            and not self.complete
            and self.error is None
            and self._splitter.is_between_events
            and self._choices == 1
            and self._seam is None
        )
        if self._keep_bytes:
            self._keep(out)
        return out

    def _keep(self, frames: bytes) -> None:
        self._kept.append(frames)
        self._keep_bytes = max(0, self._keep_bytes - len(frames))

    @property
    def kept(self) -> list[bytes] | None:
        """Everything that was given out, where it was to be kept; None where it was not, or was too much."""
        return self._kept if self._keep_bytes else None

    @property
    def is_finished(self) -> bool:
        """Every choice that came has said how it ended, and there was one."""
        return bool(self._finished) and self._seen <= self._finished

    def feed_end(self) -> bytes:
        """Takes the end of the body. Sets ``complete``, or ``error`` where the stream was cut."""
        if not self.complete and self.error is None:
            if self.may_end:
                self.complete = True
            elif sse.data_of(self._splitter.pending + b"\n\n") == b"[DONE]":
                return self.feed(b"\n\n")  # complete, but for its last line end
            else:
                self.error = Truncated(f"The upstream {self._upstream} ended its stream before it was complete.")
        return b""

    def _plain(self, piece: bytes) -> bytes | None:
        """What goes to the client for a piece of plain events; None where something in it may be anything else."""
        if not piece.startswith(self._prefix) or not piece.endswith(b"\n\n") or len(piece) > self._max_bytes:
            return None
        size = len(self._prefix) - 1  # the last quote of the prefix is looked at together with what is behind it
        rest = piece[size:]
        if rest.find(b"\n") == len(rest) - 2:
            if self._needs_a_look(rest):
                return None
            self.events += 1
            return self._public_prefix + rest
        events = piece.split(b"\n\n")
        if events.pop():  # what is behind the last blank line
            return None
        rests = [event[size:] for event in events]
        for event, rest in zip(events, rests, strict=True):
            if not event.startswith(self._prefix) or b"\n" in rest or self._needs_a_look(rest):
                return None
        self.events += len(rests)
        return b"".join([part for rest in rests for part in (self._public_prefix, rest, b"\n\n")])

    def _needs_a_look(self, rest: bytes) -> bool:
        return (
            b'"error"' in rest
            or b'"model"' in rest
            or b"\\u006" in rest
            or b"\r" in rest
            or _says(rest, b'"usage"')
            or (self._endpoint.finishes and _says(rest, b'"finish_reason"'))
            or (self._typed and any(mark in rest for mark in self._endpoint.marks))
        )

    def read(self, event: bytes) -> bytes:
        """Takes one whole event, returns it as the client shall have it; ``b""`` where it is not for the client.

        Sets ``complete`` at the stream's last event, ``may_end`` where the stream may close now or go on, and ``error``
        at an error event (which is then not returned).
        """
        data = sse.data_of(event)
        if not data:
            return b""  # comments are the upstream's keep-alive; the gateway sends its own
        if _ERROR_EVENT.match(event) and b'"error"' not in data:  # the name says it, and no key does
            value = decode_any(data)
            self.error = StreamError(
                self._upstream, value if isinstance(value, dict) else data.decode(errors="replace")
            )
            return b""
        if self._endpoint.ends(data):
            if self._endpoint.finishes and not self.is_finished:
                said = "ended its stream without saying how the answer ended (finish_reason)"
                self.error = Truncated(f"The upstream {self._upstream} {said}.")
                return b""
            self.complete = not self._endpoint.repeats
            self.may_end = True
            self.has_content = True
        if (
            not self.has_content
            or b'"error"' in data
            or _says(data, b'"usage"')
            or (self._endpoint.finishes and (self._choices > 1 or _says(data, b'"finish_reason"')))
        ):
            self._look_into(data)
            if self.error is not None:
                return b""
        renamed = self._rename(sse.without_resumption(event), data)
        return renamed if self._seam is None else self._sewn(renamed)

    def _sewn(self, event: bytes) -> bytes:
        """An event of a stream that goes on with another: as an event of that one; ``b""`` for what comes before the
        first content, which the client has had already."""
        if not self.has_content:
            return b""
        data = sse.data_of(event) or b""
        try:
            fields = _answer_fields(data)
        except (ValueError, RecursionError):
            return event  # [DONE]
        same = {name: value for name, value in (self._seam or {}).items() if name in fields}
        if b'"role"' in bytes(fields.get("choices", b"")):
            same["choices"] = _without_roles(fields["choices"])
        return sse.with_data(event, _join({**fields, **same}, None))

    def _look_into(self, data: bytes) -> None:
        value = decode_any(data)
        if not isinstance(value, dict):
            if not self.complete:
                self.error = ProtocolViolation(
                    f"The upstream {self._upstream} sent an event that is not a JSON object."
                )
            return
        if value.get("error") and not self.complete:
            self.error = StreamError(self._upstream, value["error"])
            return
        if value.get("type") == "error":  # the responses API says it beside the type
            self.error = StreamError(self._upstream, {k: v for k, v in value.items() if k != "type"})
            return
        inner = value.get("response")
        usage = _usage(value.get("usage")) or (_usage(inner.get("usage")) if isinstance(inner, dict) else None)
        self.usage = usage or self.usage
        self.has_content = self.has_content or _carries_content(value)
        choices = value.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                index = choice.get("index", 0)
                index = index if isinstance(index, int) else 0
                self._seen.add(index)
                if choice.get("finish_reason"):
                    self._finished.add(index)

    def _rename(self, event: bytes, data: bytes) -> bytes:
        # Inside a JSON string every quote is escaped, so the bytes `"model"` are a whole string: a key, or a text that
        # is just that word. Where they stand once, at the top level, and the upstream's id follows, that is the one to
        # replace; where anything is unusual, the event's top level is taken apart.
        plain = _has_plain_model_key(data)
        if plain and self._needle:
            at = event.find(self._needle)
            if _is_at_top_level(event, at):
                return self._renamed(event, at)
        if not plain and b'"model"' not in data and b"\\u006" not in data:
            return event
        named = _model_of(data)
        if named is None:
            return event
        raw, renamed = named
        start = event.find(data)
        match = re.compile(rb'("model"\s*:\s*)' + re.escape(raw)).search(event, start) if plain and start >= 0 else None
        if match is None:  # or it stands on several lines
            return sse.with_data(event, renamed(self._public))
        self._needle, self._replacement = match[0], match[1] + self._public
        return self._renamed(event, match.start())

    def _renamed(self, event: bytes, at: int) -> bytes:
        """The event with the public id, whose model stands ``at`` there; what is before it is the next one's prefix."""
        end = at + len(self._needle)
        public_prefix = event[:at] + self._replacement
        # What begins so, and has nothing else in it that must be looked into, is what it is here: the same key.
        if event.startswith(b"data: {") and _is_at_top_level(event, at):
            prefix = event[:end]
            watched = (b'"error"', b'"usage"', b'"finish_reason"', *self._endpoint.marks)
            if not any(each in prefix for each in watched):
                self._prefix, self._public_prefix = prefix, public_prefix[:-1]
        return public_prefix + event[end:]


def _says(data: bytes, key: bytes) -> bool:
    """Whether a key may have a value: many providers send a null with each event.

    >>> [_says(data, b'"usage"') for data in (b'{"usage":null}', b'{"usage": null}', b'{"a":1}', b'{"usage":{}}')]
    [False, False, False, True]
    """
    found = data.count(key)
    return found != 0 and found != data.count(key + b":null") and found != data.count(key + b": null")


def _is_at_top_level(event: bytes, at: int) -> bool:
    """Whether a key that stands ``at`` there is one of the event's own object, and not of one inside it.

    It may say no where it could not tell without parsing: a brace in a text before the key looks like an object.

    >>> [_is_at_top_level(event, event.find(b"k")) for event in (b'data: {"k"', b'data: [{"k"', b'data: {"a":{"k"')]
    [True, False, False]
    """
    start = event.find(b"{", 0, at) if at > 0 else -1
    return start >= 0 and event[:start] in (b"data: ", b"data:") and not _BEHIND_TOP_LEVEL.search(event, start + 1, at)


def _model_of(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]] | None:
    """Finds an event's model id: at its top level, or in the ``response`` of a responses API event.

    Returns:
        The id as it stands in the data, quotes and all, and a function that makes the data with another one (as JSON);
        None where there is no model id.
    """
    try:
        fields = _answer_fields(data)
        if "model" in fields:
            raw = bytes(fields["model"])
            return (raw, lambda public: _join(fields, public)) if raw.startswith(b'"') else None
        inner = _fields.decode(fields["response"]) if "response" in fields else {}
    except (ValueError, RecursionError):
        return None
    raw = bytes(inner.get("model", b""))
    if not raw.startswith(b'"'):
        return None
    return raw, lambda public: _join({**fields, "response": msgspec.Raw(_join(inner, public))}, None)


def _carries_content(value: dict[str, Any]) -> bool:
    """Whether an event has something of the answer in it, or ends a choice.

    A chunk that only announces the role, an empty delta, or a list of no choices (as Azure opens a stream) has not.

    >>> _carries_content({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
    False
    >>> _carries_content({"choices": [{"delta": {"tool_calls": [{}]}}]}), _carries_content({"choices": [{"text": "a"}]})
    (True, True)
    >>> _carries_content({"type": "response.created"}), _carries_content({"type": "response.output_text.delta"})
    (False, True)
    """
    choices = value.get("choices")
    if choices is None:
        kind = value.get("type")
        return not (isinstance(kind, str) and kind.endswith((".created", ".in_progress", ".queued")))
    if not isinstance(choices, list):
        return True
    for choice in choices:
        if not isinstance(choice, dict) or choice.get("finish_reason") or choice.get("text"):
            return True
        delta = choice.get("delta")
        if isinstance(delta, dict) and any(part for name, part in delta.items() if name != "role"):
            return True
    return False
