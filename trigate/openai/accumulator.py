"""A chat model's answer, put together from its events. Pure.

Kept is the whole message, with the fields that a provider adds to OpenAI's own: reasoning, its signatures, annotations.
Which of them go back to which provider is decided when a request is sent (`trigate.openai.history_fields`). Dropped are
audio and images, which no provider takes back in this form and which can be megabytes, and all that is outside of the
message: log probabilities, usage.

An answer is *truncated* until it is known to be complete: a stream by ``[DONE]``, a JSON answer always. Tool calls of a
truncated answer may lack a part of their arguments, and will never be answered, so they are left out. So are the added
fields, since a part of a reasoning has no signature.

Source: how chunks become a message is from the OpenAI API reference ("The chat completion chunk object") and from
openai-node ``lib/ChatCompletionStream.ts``: texts and arguments are concatenated, the last id and name count. For the
added fields, from OpenRouter's documentation ("Preserving reasoning blocks"): the pieces of a list are joined by their
``index`` and ``type``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import attrs
import msgspec

from trigate.openai import sse
from trigate.openai.raw_json import decode_any


@attrs.define
class _Function:
    name: str = ""
    arguments: list[str] = attrs.field(factory=list)

    def feed(self, value: object) -> None:
        if not isinstance(value, dict):
            return
        if isinstance(name := value.get("name"), str) and name:
            self.name = name
        if isinstance(arguments := value.get("arguments"), str):
            self.arguments.append(arguments)

    def value(self) -> dict[str, str]:
        return {"name": joined_surrogates(self.name), "arguments": joined_surrogates("".join(self.arguments))}


@attrs.define
class _ToolCall:
    fields: dict[str, Any] = attrs.field(factory=dict)  # Any: JSON; fields that a provider adds are sent back to it
    function: _Function | None = None

    def feed(self, value: dict[str, Any]) -> None:
        for name, part in value.items():
            if name == "function":
                self.function = self.function or _Function()
                self.function.feed(part)
            elif name != "index" and part:
                self.fields[name] = part

    def value(self) -> dict[str, Any]:
        fields = {"type": "function", **self.fields} if self.function else self.fields
        return {**fields, "function": self.function.value()} if self.function else fields


_TEXT = {"role", "content"}
_OWN = {"role", "content", "refusal", "tool_calls", "function_call"}
_DROPPED = {"audio", "images"}
_JOINED = {
    *("reasoning_content", "reasoning", "reasoning_text", "thinking"),
    *("text", "summary", "content", "input", "arguments"),
}
_MAX_DEPTH = 20


class _Pieces(list[str]):
    """A text in the pieces in which it has come."""


def _merged(name: str, old: Any, new: Any, depth: int = 0) -> Any:  # Any: JSON, with `_Pieces` in the place of texts
    """Returns the value of an added field after its next piece; None in place of what is nested too deeply."""
    if depth > _MAX_DEPTH:
        return None
    if isinstance(new, str) and name in _JOINED:
        if not isinstance(old, _Pieces):
            return _Pieces([new])
        old.append(new)
        return old
    if isinstance(new, dict):
        fields = old if isinstance(old, dict) else {}
        for key, value in new.items():
            if value is not None or key not in fields:
                fields[key] = _merged(key, fields.get(key), value, depth + 1)
        return fields
    if isinstance(new, list):
        items: list[Any] = old if isinstance(old, list) else []
        for item in new:
            at = _place_of(item, items)
            if at is None:
                items.append(_merged("", None, item, depth + 1))
            else:
                items[at] = _merged("", items[at], item, depth + 1)
        return items
    return new


def _place_of(item: Any, items: list[Any]) -> int | None:
    """Returns the position of the item that a piece continues; None = it is a new one."""
    if not isinstance(item, dict) or type(item.get("index")) is not int:
        return None
    for at, other in enumerate(items):
        if isinstance(other, dict) and other.get("index") == item["index"] and other.get("type") == item.get("type"):
            return at
    return None


def _joined(value: Any) -> Any:
    """Returns an added field with its texts joined."""
    if isinstance(value, _Pieces):
        return joined_surrogates("".join(value))
    if isinstance(value, dict):
        return {name: _joined(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_joined(each) for each in value]
    return value


class AnswerAccumulator:
    r"""The first choice of a chat answer, while it arrives. Data of an unexpected shape is ignored.

    >>> answer = AnswerAccumulator()
    >>> answer.feed(b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":"Hel"}}]}\n\n')
    >>> answer.feed(b'data: {"choices":[{"delta":{"content":"lo"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n')
    >>> answer.message(), answer.finish_reason, answer.is_truncated
    (b'{"role":"assistant","content":"Hello"}', 'stop', False)

    Attributes:
        finish_reason: None until it has come.
        is_truncated: It is not known to be complete.
        is_only_text: So far it has had nothing but a role and text.
    """

    def __init__(self) -> None:
        # its input has already passed a splitter with a bound
        self._splitter = sse.EventSplitter(max_event_bytes=sys.maxsize)
        self._text: list[str] = []
        self._refusal: list[str] = []
        self._tool_calls: dict[int, _ToolCall] = {}
        self._function_call: _Function | None = None
        self._added: dict[str, Any] = {}  # Any: JSON; see `_merged`
        self.finish_reason: str | None = None
        self.is_truncated = True
        self.is_only_text = True

    def feed(self, frames: bytes) -> None:
        """Takes whole server-sent events."""
        for event in self._splitter.feed(frames):
            data = sse.data_of(event)
            if not data:
                continue
            if data.strip() == b"[DONE]":
                self.is_truncated = False
            else:
                self._feed_choice(data, "delta")

    def feed_answer(self, body: bytes) -> None:
        """Takes a whole JSON answer."""
        self.is_truncated = False
        self._feed_choice(body, "message")

    def _feed_choice(self, data: bytes, part: str) -> None:
        value = decode_any(data)
        choices = value.get("choices") if isinstance(value, dict) else None
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and choice.get("index", 0) == 0:
                if isinstance(reason := choice.get("finish_reason"), str):
                    self.finish_reason = reason
                if isinstance(inner := choice.get(part), dict):
                    self._feed_part(inner)
                return

    def _feed_part(self, part: dict[str, Any]) -> None:
        if not part.keys() <= _TEXT and any(value for name, value in part.items() if name not in _TEXT):
            self.is_only_text = False
        if isinstance(part.get("content"), list):  # a list of parts, some of which may be reasoning
            self.is_only_text = False
        if text := _text_of(part.get("content")):
            self._text.append(text)
        if isinstance(refusal := part.get("refusal"), str) and refusal:
            self._refusal.append(refusal)
        calls = part.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, dict):
                self._tool_call(call).feed(call)
        if isinstance(function := part.get("function_call"), dict):
            self._function_call = self._function_call or _Function()
            self._function_call.feed(function)
        for name, value in part.items():
            if name not in _OWN and name not in _DROPPED and value not in (None, "", [], {}):
                self._added[name] = _merged(name, self._added.get(name), value)

    def _tool_call(self, delta: dict[str, Any]) -> _ToolCall:
        index = delta.get("index")
        if type(index) is not int:  # JSON answers, and streams of providers that send each call in one piece
            last = max(self._tool_calls, default=-1)
            index = last + 1 if delta.get("id") or last < 0 else last
        return self._tool_calls.setdefault(index, _ToolCall())

    @property
    def text(self) -> str:
        """The content so far."""
        if len(self._text) > 1:
            self._text = ["".join(self._text)]
        return joined_surrogates(self._text[0]) if self._text else ""

    @property
    def is_exact(self) -> bool:
        """The text can be repeated to the character, which is not so if it has a lone surrogate."""
        return self.text.encode("utf-16") == "".join(self._text).encode("utf-16", "surrogatepass")

    @property
    def has_tool_calls(self) -> bool:
        """It has tool calls."""
        return bool(self._tool_calls) or self._function_call is not None

    @property
    def has_content(self) -> bool:
        """There is something to keep: text, a refusal, or, if it is not truncated, tool calls."""
        return bool(self._text or self._refusal or (self.has_tool_calls and not self.is_truncated))

    def message(self) -> bytes:
        """The assistant message so far, as JSON; of a truncated answer, only its text."""
        calls = self.has_tool_calls and not self.is_truncated
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if not self._text and (calls or self._refusal):
            message["content"] = None
        if self._refusal:
            message["refusal"] = joined_surrogates("".join(self._refusal))
        if calls and self._tool_calls:
            message["tool_calls"] = [self._tool_calls[index].value() for index in sorted(self._tool_calls)]
        if calls and self._function_call is not None:
            message["function_call"] = self._function_call.value()
        if not self.is_truncated:
            message |= _joined(self._added)
        try:
            return msgspec.json.encode(message)
        except UnicodeEncodeError:  # a lone surrogate in a field that a provider added
            return json.dumps(message, ensure_ascii=False).encode(errors="replace")


def _text_of(content: object) -> str:
    """The text of a ``content``, which a few providers send as a list of parts.

    >>> _text_of([{"type": "thinking", "thinking": []}, {"type": "text", "text": "Hi"}])
    'Hi'
    """
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    return "".join([text for text in texts if isinstance(text, str)])


def joined_surrogates(text: str) -> str:
    r"""The text with split surrogate pairs joined, and lone surrogates replaced.

    >>> joined_surrogates("\ud83d\ude00") == "\U0001f600", joined_surrogates("a\ud83d")
    (True, 'a\ufffd')
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
