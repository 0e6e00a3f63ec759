"""What a stream reports of itself: its first content, its end, an error, its usage.

Providers send events that say nothing (*heartbeats*), to keep a connection open: ``null``, ``{}``,
``{"type": "ping"}``, a chunk whose ``choices`` are null. They are no content. In a stream of choices clients fail to
read them, so they are dropped there.
"""

from __future__ import annotations

import re
from typing import Any

from trigate.errors import GatewayError, ProtocolViolation, Truncated
from trigate.openai.answer import Usage, find_usage, sum_of, with_images
from trigate.openai.endpoints import DONE, Endpoint
from trigate.openai.provider_error import is_error, reported
from trigate.openai.raw_json import decode_any

_ERROR_EVENT = re.compile(rb"event: ?error[\r\n]")
_HEARTBEAT = re.compile(r"(?:^|[._-])(?:ping|keep[._-]?alive|heart[._-]?beat)$", re.I)
_BEFORE_CONTENT = (".created", ".in_progress", ".queued", "message_start")
# The fields of a chunk that stand beside its choices, and say nothing without them.
_ENVELOPE = {"id", "object", "created", "model", "provider", "system_fingerprint", "service_tier", "choices", "usage"}
_LABELS = {"id", "type", "role", "index", "format", "status", "object", "phase"}


class CompletionTracker:
    """Follows a stream event by event.

    JSON is parsed until the first content; after it, only in events that carry usage or an error, or that may be the
    last one of a choice.

    Args:
        endpoint: Decides how the stream ends.
        upstream: The upstream's name, for messages.
        choices: How many choices the client asked for.
        hides_usage: The event that has nothing but token counts is not for the client.

    Attributes:
        has_content: An event with a part of the answer has come.
        complete: The stream's last event has come.
        may_end: The stream is complete if it closes now, but it may also continue.
        usage: The usage that was reported last.
        error: What is wrong with the stream, or the error that the upstream reported. The tracker must not be used
            after it is set.
        watched: Each event that may set an attribute after the first content contains one of these byte strings.
    """

    __slots__ = (
        "_choices",
        "_endpoint",
        "_finished",
        "_hides_usage",
        "_last_types",
        "_needs_finish_reason",
        "_seen",
        "_upstream",
        "complete",
        "error",
        "has_content",
        "may_end",
        "usage",
        "watched",
    )

    def __init__(self, endpoint: Endpoint, *, upstream: str, choices: int, hides_usage: bool = False) -> None:
        self._endpoint = endpoint
        self._upstream = upstream
        self._choices = choices
        self._hides_usage = hides_usage
        self._needs_finish_reason = endpoint.needs_finish_reason
        # `[DONE]` is an event of its own, so it cannot be a part of another event's JSON
        self._last_types = endpoint.end_markers if endpoint.end_markers != (DONE,) else ()
        self.watched = (b'"error"', b'"usage"', b'"finish_reason"', *endpoint.end_markers)
        self._seen: set[int] = set()
        self._finished: set[int] = set()
        self.has_content = False
        self.complete = False
        self.may_end = False
        self.usage: Usage | None = None
        self.error: GatewayError | None = None

    @property
    def all_finished(self) -> bool:
        """At least one choice has come, and every choice that came has had its ``finish_reason``."""
        return bool(self._finished) and self._seen <= self._finished

    @property
    def lacks_only_its_end(self) -> bool:
        """Every choice that the client asked for has ended, so only ``[DONE]`` is missing, which some servers never
        send."""
        return self._needs_finish_reason and self.all_finished and len(self._finished) >= self._choices

    def observe(self, event: bytes, data: bytes) -> bool:
        """Takes the next event.

        Sets `complete` at the stream's last event, `may_end` where the stream may close or continue, and `error` at an
        error event.

        Args:
            event: The whole event.
            data: Its data; not empty.

        Returns:
            Whether the event belongs to the answer; False if it is a heartbeat, or set `error`.
        """
        if event.startswith(b"event") and _ERROR_EVENT.match(event) and b'"error"' not in data:
            value = decode_any(data)  # only the event's name says that it is an error
            value = value if isinstance(value, dict) else data.decode(errors="replace")
            self.error = reported(self._upstream, {"error": value})
            return False
        endpoint = self._endpoint
        if endpoint.is_last_event(data):
            if self._needs_finish_reason and not self.all_finished:
                self.error = Truncated(
                    f"The upstream {self._upstream} ended its stream without saying how the answer ended "
                    "(finish_reason)."
                )
                return False
            self.complete = not endpoint.repeats_last_event
            self.may_end = True
            self.has_content = True
            if endpoint.makes_images:
                return self._examine(data)
        if (
            not self.has_content
            or b'"error"' in data
            or _has_value(data, b'"usage"')
            or (self._needs_finish_reason and (self._choices > 1 or _has_value(data, b'"finish_reason"')))
        ):
            return self._examine(data)
        # An event without results, after the content: all others are answered by one search.
        if self._needs_finish_reason and not data.count(b'"choices":[') and not data.count(b'"choices": ['):
            value = decode_any(data)
            return self._examine(data) if isinstance(value, dict) else not _is_empty(value, data)
        return len(data) > len(b"null") or data not in _NOTHING

    def may_matter(self, part: bytes) -> bool:
        """Whether an event after the first content may set an attribute, or has tool calls, which may lack their
        indexes, going by a part of its data.

        The part must hold every field that is not in each event of the stream. Never False where `observe` would set
        an attribute; only for streams of one choice.
        """
        # `count` is faster than `in`, see trigate.openai.stream
        if part.count(b'"error"') or (part.count(b'"usage"') and _has_value(part, b'"usage"')):
            return True
        if self._needs_finish_reason and (part.count(b'"tool_calls"') or _has_value(part, b'"finish_reason"')):
            return True
        if not self._last_types:
            return False
        return any(part.count(marker) for marker in self._last_types)

    def _examine(self, data: bytes) -> bool:
        """Parses an event and sets the attributes; returns as `observe`."""
        value = decode_any(data)
        if not isinstance(value, dict):
            if self.complete:
                return True
            if _is_empty(value, data):
                return False
            if isinstance(value, list) and value and isinstance(value[0], dict) and is_error(value[0]):
                self.error = reported(self._upstream, value)
            else:
                self.error = ProtocolViolation(
                    f"The upstream {self._upstream} sent an event that is not a JSON object."
                )
            return False
        if (value.get("error") and not self.complete) or value.get("type") == "error":
            self.error = reported(self._upstream, value)
            return False
        if self._endpoint.makes_images:
            self._add_image(value)
        else:
            self.usage = find_usage(value, self.usage) or self.usage
        choices = value.get("choices")
        if not choices and self._needs_finish_reason and not self.complete:
            if is_error(value):
                self.error = reported(self._upstream, value)
                return False
            return not (_is_heartbeat(value) or (self._hides_usage and value.get("usage")))
        if not value:
            return False
        self.has_content = self.has_content or _carries_content(value)
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                if choice.get("error"):  # OpenRouter
                    self.error = reported(self._upstream, choice)
                    return False
                index = choice.get("index", 0)
                index = index if isinstance(index, int) else 0
                self._seen.add(index)
                if choice.get("finish_reason"):
                    self._finished.add(index)
        return True

    def _add_image(self, value: dict[str, Any]) -> None:  # Any: JSON of any shape
        """Counts an image of a stream, and adds its token counts to those of the images before it."""
        found = find_usage(value)
        if str(value.get("type")).encode() in self._last_types:
            found = with_images(found, [value])
        if found is not None:
            self.usage = sum_of([self.usage, found]) if self.usage is not None else found


def _has_value(data: bytes, key: bytes) -> bool:
    """Whether a key may have a value other than null: many providers send a null with each event.

    >>> [_has_value(data, b'"usage"') for data in (b'{"usage":null}', b'{"usage": null}', b'{"a":1}', b'{"usage":{}}')]
    [False, False, False, True]
    """
    found = data.count(key)
    return found != 0 and found != data.count(key + b":null") and found != data.count(key + b": null")


_NOTHING = (b"null", b"{}", b'""')


def _is_empty(value: object, data: bytes) -> bool:
    """Whether data that is no object says nothing: null, an empty text, or a comment that was sent as data."""
    return value == "" or (value is None and (data.strip() == b"null" or data.lstrip().startswith(b":")))


def _is_heartbeat(value: dict[str, Any]) -> bool:  # Any: JSON of any shape
    """Whether an event of a stream of choices that has no choices is a heartbeat.

    >>> [_is_heartbeat(value) for value in ({}, {"type": "ping"}, {"choices": None}, {"object": "keepalive"})]
    [True, True, True, True]
    >>> [_is_heartbeat(value) for value in ({"choices": []}, {"usage": {"prompt_tokens": 1}}, {"event": {"type": "x"}})]
    [False, False, False]
    """
    if any(isinstance(kind := value.get(name), str) and _HEARTBEAT.search(kind) for name in ("type", "object")):
        return True
    return value.get("choices") is None and not value.get("usage") and value.keys() <= _ENVELOPE


def is_filled(value: object) -> bool:
    """Whether a part of an answer has anything in it besides labels.

    >>> is_filled({"type": "message", "role": "assistant", "content": []}), is_filled([{"type": "text", "text": "a"}])
    (False, True)
    """
    if isinstance(value, dict):
        return any(is_filled(part) for name, part in value.items() if name not in _LABELS)
    return any(map(is_filled, value)) if isinstance(value, list) else bool(value)


def _carries_content(value: dict[str, Any]) -> bool:  # Any: JSON of any shape
    """Whether an event has a part of the answer, or ends a choice.

    A chunk that only announces the role, an empty delta, an empty list of choices (as Azure opens a stream), and an
    item that is announced and still empty have no content.

    >>> _carries_content({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
    False
    >>> _carries_content({"choices": [{"delta": {"tool_calls": [{"function": {"name": "f"}}]}}]})
    True
    >>> _carries_content({"choices": [{"text": "a"}]}), _carries_content({"type": "keepalive"})
    (True, False)
    >>> _carries_content({"type": "response.created"}), _carries_content({"type": "response.output_text.delta"})
    (False, True)
    """
    choices = value.get("choices")
    if choices is None:
        kind = value.get("type")
        if not isinstance(kind, str):
            return "choices" not in value
        if kind.endswith(".added"):  # an item or a part of one
            return is_filled(value.get("item") or value.get("part"))
        return not (kind.endswith(_BEFORE_CONTENT) or _HEARTBEAT.search(kind))
    if not isinstance(choices, list):
        return True
    for choice in choices:
        if not isinstance(choice, dict) or choice.get("finish_reason") or choice.get("text"):
            return True
        delta = choice.get("delta")
        if isinstance(delta, dict) and is_filled(delta):
            return True
    return False
