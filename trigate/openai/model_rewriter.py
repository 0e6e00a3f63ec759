"""Replaces the model id in the events of a stream.

Inside a JSON string every quote is escaped, so the bytes ``"model"`` are a whole string: a key, or a text that is just
that word. If they occur once in an event, at its top level, and the upstream's id follows, then that id is replaced in
place. In every other case the event's top level is parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from trigate.openai import sse
from trigate.openai.raw_json import has_plain_model_key, join_fields, split_fields, split_provider_fields

_NESTING_OR_LINE_END = re.compile(rb"[{}\r\n]")
# What follows the model id in an event of a stream of choices, up to where the events of one run differ: the beginning
# of a text, or the rest of a tool call that has its index. Fields that say something of the stream are null in it.
_UP_TO_CONTENT = re.compile(
    rb"""
    (?: ,\s? " (?!choices") (?: \w+":\s?null | (?!error"|usage"|finish_reason") \w+":\s? (?: "[^"\\]*" | -?\d+ ) ) )*
    ,\s? "choices":\s? \[ \{
    (?: "\w+":\s? (?: null | \d+ ) ,\s? )*
    (?: "text":\s?"
      | "delta":\s? \{ (?: "\w+":\s? (?: null | "" | "assistant" | \[\] ) ,\s? )*
        (?: "tool_calls":\s? \[ \{ "index":\s?\d+ ,\s? | "\w+":\s?" )
    )
    """,
    re.X,
)


class ModelRewriter:
    """Puts the public model id into the events of one stream.

    Args:
        model: The public model id; None = events keep the upstream's.
        watched: The part of a `prefix` up to the model id never contains one of these.
        in_choices: It is a stream of choices.

    Attributes:
        prefix: How an event began that was rewritten in place, from ``data: {`` to the end of the upstream's model id,
            or, in a stream of choices, to the beginning of its content; b"" if there was none. Another event with this
            prefix has its model at the same place.
        public_prefix: The same with the public id, without its last byte.
    """

    __slots__ = ("_found", "_in_choices", "_public", "_replacement", "_watched", "prefix", "public_prefix")

    def __init__(self, model: str | None, *, watched: tuple[bytes, ...], in_choices: bool) -> None:
        self._public = msgspec.json.encode(model) if model is not None else b""
        self._watched = watched
        self._in_choices = in_choices
        self._found = b""  # the key and the upstream's id, as the last event had them
        self._replacement = b""
        self.prefix = b""
        self.public_prefix = b""

    def rewrite(self, event: bytes, data: bytes) -> bytes:
        """Returns an event with the public model id; an event without a model is returned unchanged.

        Args:
            event: The whole event.
            data: Its data.
        """
        plain = has_plain_model_key(data)
        if plain and self._found:
            at = event.find(self._found)
            if _is_at_top_level(event, at):
                return self._replace(event, at)
        if (not plain and b'"model"' not in data and b"\\u006" not in data) or not self._public:
            return event
        named = _find_model(data)
        if named is None:
            return event
        raw, with_model = named
        start = event.find(data)
        match = re.compile(rb'("model"\s*:\s*)' + re.escape(raw)).search(event, start) if plain and start >= 0 else None
        if match is None:  # not a plain key, or the data is on several lines
            return sse.with_data(event, with_model(self._public))
        self._found, self._replacement = match[0], match[1] + self._public
        return self._replace(event, match.start())

    def _replace(self, event: bytes, at: int) -> bytes:
        """Replaces the key and id ``at`` this index, and remembers the event's beginning as the prefix."""
        end = at + len(self._found)
        public_prefix = event[:at] + self._replacement
        if event.startswith(b"data: {") and _is_at_top_level(event, at):
            rest = _UP_TO_CONTENT.match(event, end) if self._in_choices else None
            if (rest or not self._in_choices) and not any(text in event[:end] for text in self._watched):
                more = rest[0] if rest else b""
                self.prefix, self.public_prefix = event[:end] + more, (public_prefix + more)[:-1]
        return public_prefix + event[end:]


def _is_at_top_level(event: bytes, at: int) -> bool:
    """Whether a key at this index belongs to the event's own object, and not to one inside it.

    May return False where only parsing could tell: a brace in a text before the key looks like an object.

    >>> [_is_at_top_level(event, event.find(b"k")) for event in (b'data: {"k"', b'data: [{"k"', b'data: {"a":{"k"')]
    [True, False, False]
    """
    start = event.find(b"{", 0, at) if at > 0 else -1
    return (
        start >= 0 and event[:start] in (b"data: ", b"data:") and not _NESTING_OR_LINE_END.search(event, start + 1, at)
    )


def _find_model(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]] | None:
    """Finds an event's model id: at its top level, or in the ``response`` of a responses API event, or in the
    ``message`` of an event in Anthropic's format.

    Returns:
        The id as it is in the data, including its quotes, and a function that returns the data with another id (as
        JSON); None if there is no model id.
    """
    try:
        fields = split_provider_fields(data)
        if "model" in fields:
            raw = bytes(fields["model"])
            return (raw, lambda public: join_fields(fields, public)) if raw.startswith(b'"') else None
        within = "response" if "response" in fields else "message"
        inner = split_fields(fields[within]) if within in fields else {}
    except (ValueError, RecursionError):
        return None
    raw = bytes(inner.get("model", b""))
    if not raw.startswith(b'"'):
        return None
    return raw, lambda public: join_fields({**fields, within: msgspec.Raw(join_fields(inner, public))})
