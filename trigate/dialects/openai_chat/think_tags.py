"""Reasoning that a server leaves in the text of an answer, between ``<think>`` and ``</think>``. Pure.

Servers that know a model's way to reason return its reasoning in a field of its own. Others return the text as the
model wrote it. `TagSplitter` and `with_reasoning_field` turn such events and answers into those of the first servers:
with a ``reasoning_content``, so that everything behind them knows one form.

Only an answer that begins with a tag has reasoning; blanks may stand before it. The reasoning ends at the first
``</think>``, or with the answer: the model may have been cut off. Tags anywhere else are text. So is an end tag without
its start tag (some chat templates begin the reasoning themselves), unless nothing stands before it: when it comes, the
text before it has already been sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum, auto

import msgspec

from trigate.dialects.openai_chat.fields import reasoning_of
from trigate.openai import sse
from trigate.openai.raw_json import decode_any, join_fields, split_provider_fields

_START, _END = "<think>", "</think>"
_MOST_BLANKS = 64
"""How many blanks may stand before the first tag: they are held back until it comes."""
_raws = msgspec.json.Decoder(list[msgspec.Raw])

_Fields = dict[str, msgspec.Raw]


class _State(Enum):
    BEFORE = auto()
    """Nothing but blanks, and a part of a tag, have come."""
    REASONING = auto()
    AFTER = auto()
    """The end tag has come, and only blanks behind it."""
    TEXT = auto()


class ThinkTags:
    """Separates the reasoning of one answer from its text, wherever the pieces were split.

    Blanks behind both tags are left out.

    >>> tags = ThinkTags()
    >>> tags.feed("<think>\\nHm."), tags.feed("</thi"), tags.feed("nk>\\n\\nYes."), tags.feed_end()
    (('Hm.', ''), ('', ''), ('', 'Yes.'), ('', ''))
    """

    __slots__ = ("_has_reasoning", "_held", "_state")

    def __init__(self) -> None:
        self._state = _State.BEFORE
        self._held = ""  # what may be a part of a tag
        self._has_reasoning = False

    @property
    def is_past(self) -> bool:
        """Everything that follows is text."""
        return self._state is _State.TEXT

    def feed(self, text: str) -> tuple[str, str]:
        """Takes the next piece, and returns what is known now: reasoning, and text after it."""
        text, self._held = self._held + text, ""
        reasoning = ""
        if self._state is _State.BEFORE:
            text = self._begin(text)
        if self._state is _State.REASONING:
            reasoning, text = self._reason(text)
        if self._state is _State.AFTER:
            text = text.lstrip()
            if text:
                self._state = _State.TEXT
        return reasoning, text

    def feed_end(self) -> tuple[str, str]:
        """Returns what was held back: no tag has come of it."""
        held, self._held = self._held, ""
        is_reasoning = self._state is _State.REASONING
        self._state = _State.TEXT
        return (held, "") if is_reasoning else ("", held)

    def _begin(self, text: str) -> str:
        """Returns what follows the first tag; the text itself if it begins with none."""
        rest = text.lstrip()
        if len(text) - len(rest) > _MOST_BLANKS:
            self._state = _State.TEXT
            return text
        for tag, state in ((_START, _State.REASONING), (_END, _State.AFTER)):
            if rest.startswith(tag):
                self._state = state
                return rest[len(tag) :]
        if _START.startswith(rest) or _END.startswith(rest):
            self._held = text
            return ""
        self._state = _State.TEXT
        return text

    def _reason(self, text: str) -> tuple[str, str]:
        """Returns the reasoning in a piece, and what follows the end tag."""
        if not self._has_reasoning:
            text = text.lstrip()
        reasoning, tag, text = text.partition(_END)
        if tag:
            self._state = _State.AFTER
        else:
            size = next((size for size in range(len(_END) - 1, 0, -1) if reasoning.endswith(_END[:size])), 0)
            reasoning, self._held = reasoning[: len(reasoning) - size], reasoning[len(reasoning) - size :]
        self._has_reasoning = self._has_reasoning or bool(reasoning)
        return reasoning, text


class TagSplitter(sse.EventSplitter):
    """Splits a streamed chat completion into events, with the reasoning in a field of its own.

    Once all choices have come to their text, events are not parsed any more.

    Args:
        max_event_bytes: As in `openai.sse.EventSplitter`.
        choices: How many choices the client asked for.
    """

    def __init__(self, *, max_event_bytes: int, choices: int) -> None:
        super().__init__(max_event_bytes=max_event_bytes)
        self._choices = choices
        self._tags: dict[object, ThinkTags] = {}
        self._past = 0

    def feed(self, data: bytes) -> list[bytes]:
        """As `openai.sse.EventSplitter.feed`."""
        try:
            events = super().feed(data)
        except sse.EventTooLarge as error:
            error.before = [*map(self._separated, error.before)]
            raise
        return [*map(self._separated, events)]

    def _separated(self, event: bytes) -> bytes:
        if self._past >= self._choices:
            return event
        data = sse.data_of(event)
        separated = _with_choices(data, self._choice) if data else data
        return event if separated is data or separated is None else sse.with_data(event, separated)

    def _choice(self, choice: _Fields) -> _Fields | None:
        """Returns the new fields of a choice; None = they stay."""
        if "delta" not in choice:
            return None
        number = decode_any(bytes(choice["index"])) if "index" in choice else 0
        tags = self._tags.setdefault(number if type(number) is int else 0, ThinkTags())
        if tags.is_past:
            return None
        is_last = bool("finish_reason" in choice and decode_any(bytes(choice["finish_reason"])))
        delta = _message(choice["delta"], tags, is_last=is_last)
        self._past += tags.is_past
        return None if delta is None else {**choice, "delta": msgspec.Raw(delta)}


def with_reasoning_field(body: bytes) -> bytes:
    """Returns a chat completion with the reasoning of each choice in a field of its own; unchanged if there is none.

    >>> with_reasoning_field(b'{"choices":[{"message":{"content":"<think>Hm.</think>Yes."}}]}')
    b'{"choices":[{"message":{"content":"Yes.","reasoning_content":"Hm."}}]}'
    """

    def separated(choice: _Fields) -> _Fields | None:
        message = _message(choice["message"], ThinkTags(), is_last=True) if "message" in choice else None
        return None if message is None else {**choice, "message": msgspec.Raw(message)}

    return _with_choices(body, separated)


def _with_choices(data: bytes, change: Callable[[_Fields], _Fields | None]) -> bytes:
    """Returns a chunk or an answer with changed choices. Everything else keeps its bytes; a body that is neither is
    returned as it is."""
    if b'"choices"' not in data:
        return data
    try:
        fields = split_provider_fields(data)
        choices = [split_provider_fields(choice) for choice in _items(bytes(fields["choices"]))]
    except (KeyError, ValueError, RecursionError):
        return data
    changed = [change(choice) for choice in choices]
    if not any(changed):
        return data
    parts = [join_fields(new or old) for new, old in zip(changed, choices, strict=True)]
    return join_fields({**fields, "choices": msgspec.Raw(b"[" + b",".join(parts) + b"]")})


def _items(data: bytes) -> list[bytes]:
    """Returns the items of a list. Raises ValueError or RecursionError if it is none."""
    try:
        return [bytes(raw) for raw in _raws.decode(data)]
    except (ValueError, RecursionError):
        value = decode_any(data)  # half of an emoji
        if not isinstance(value, list):
            raise
        return [json.dumps(item).encode() for item in value]


def _message(data: msgspec.Raw, tags: ThinkTags, *, is_last: bool) -> bytes | None:
    """Returns a message or a delta with its reasoning in a field of its own; None = it stays.

    Args:
        is_last: Nothing follows it.
    """
    value = decode_any(bytes(data))
    if not isinstance(value, dict):
        return None
    content, own = value.get("content"), reasoning_of(value)
    text = content if isinstance(content, str) else ""
    pieces = []
    if own:  # the server separates them itself
        pieces.append(tags.feed_end())
    if text:
        pieces.append(tags.feed(text))
    if is_last or value.get("tool_calls") or value.get("function_call"):
        pieces.append(tags.feed_end())
    reasoning = "".join([piece for piece, _ in pieces])
    rest = "".join([piece for _, piece in pieces])
    if not reasoning and rest == text:
        return None
    new = {"content": rest if rest or not reasoning else None}
    if reasoning:
        new["reasoning_content"] = reasoning + own
    return join_fields(
        split_provider_fields(bytes(data)) | {name: msgspec.Raw(_encoded(part)) for name, part in new.items()}
    )


def _encoded(text: str | None) -> bytes:
    try:
        return msgspec.json.encode(text)
    except UnicodeEncodeError:  # half of an emoji
        return json.dumps(text).encode()
