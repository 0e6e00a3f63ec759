"""Decodes the messages of a request for a chat completion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import msgspec

from trigate.dialects.vocabulary import (
    Audio,
    File,
    Image,
    Message,
    Part,
    Reasoning,
    Text,
    ToolCall,
    ToolResult,
)
from trigate.errors import BadRequest, Untranslatable

ANTHROPIC_REASONING = "anthropic-claude-v1"
"""The ``format`` of the items of ``reasoning_details`` that have Anthropic's signature, as OpenRouter calls it."""
_PLAIN_REASONING = ("reasoning_content", "reasoning")
_CACHE_MARKS = ("cache_control", "prompt_cache_breakpoint")

_Role = Literal["system", "user", "assistant"]
_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


class ContentDecoder:
    """Decodes the messages of one request.

    Args:
        dropped: Takes the names of what is dropped.

    Attributes:
        wants_cache: A part is marked as the end of what the provider should cache.
    """

    def __init__(self, dropped: set[str]) -> None:
        self._dropped = dropped
        self.wants_cache = False
        self._function_calls: list[ToolCall] = []
        """The calls of the legacy form that have no result yet: they have no ids."""
        self._parts: Mapping[str, Callable[[_Json, str], Part | None]] = {
            "text": self._text,
            "refusal": self._refusal,
            "image_url": self._image,
            "input_audio": self._audio,
            "file": self._file,
        }

    def messages(self, messages: list[_Json]) -> tuple[Message, ...]:
        """Decodes the messages. Those of one role in a row become one, and the results of tools are the user's.

        Raises:
            BadRequest: A message is malformed.
            Untranslatable: A part cannot be expressed.
        """
        decoded: list[tuple[_Role, list[Part]]] = []
        for at, message in enumerate(messages):
            path = f"messages[{at}]"
            role, parts = self._message(message, path)
            if message.get("name") and message.get("role") != "function":
                self._dropped.add("messages.name")
            if decoded and decoded[-1][0] == role != "system":
                decoded[-1][1].extend(parts)
            else:
                decoded.append((role, list(parts)))
        return tuple([Message(role, tuple(parts)) for role, parts in decoded])

    def _message(self, message: _Json, path: str) -> tuple[_Role, Iterable[Part]]:
        content = message.get("content")
        match message.get("role"):
            case "system" | "developer":
                return "system", self._content(content, path, only=("text",))
            case "user":
                return "user", self._content(content, path, only=("text", "image_url", "input_audio", "file"))
            case "assistant":
                return "assistant", self._assistant(message, path)
            case "tool":
                return "user", [self._result(_string(message, "tool_call_id", path), content, path)]
            case "function":
                name = _string(message, "name", path)
                for call in self._function_calls:
                    if call.name == name:
                        self._function_calls.remove(call)
                        return "user", [self._result(call.id, content, path)]
                raise BadRequest(f"{path}: no function_call before it has the name {name[:100]!r}.", param=path)
        raise BadRequest(
            f"{path}.role must be developer, system, user, assistant, tool or function.", param=f"{path}.role"
        )

    # -- roles --------------------------------------------------------------------------------------------------------

    def _result(self, call: str, content: object, path: str) -> ToolResult:
        parts = self._content("" if content is None else content, path, only=("text", "image_url", "file"))
        return ToolResult(call, tuple(part for part in parts if isinstance(part, Text | Image | File)), path=path)

    def _assistant(self, message: _Json, path: str) -> Iterable[Part]:
        if message.get("audio"):
            raise Untranslatable(f"{path}.audio cannot be translated to the format of the upstream.", param=path)
        yield from _reasoning(message)
        content = message.get("content")
        if content is not None:
            yield from self._content(content, path, only=("text", "refusal"))
        refusal = message.get("refusal")
        if isinstance(refusal, str) and refusal:
            yield Text(refusal)
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, list):
            raise BadRequest(f"{path}.tool_calls must be a list.", param=f"{path}.tool_calls")
        for at, call in enumerate(calls or ()):
            yield _tool_call(call, f"{path}.tool_calls[{at}]")
        function = message.get("function_call")
        if function:
            here = f"{path}.function_call"
            if not isinstance(function, dict):
                raise BadRequest(f"{here} must be an object.", param=here)
            call = ToolCall(f"{path}.call", _string(function, "name", here), arguments_of(function.get("arguments")))
            self._function_calls.append(call)
            yield call

    # -- parts --------------------------------------------------------------------------------------------------------

    def _content(self, content: object, path: str, *, only: tuple[str, ...]) -> tuple[Part, ...]:
        path = f"{path}.content"
        if isinstance(content, str):
            return (Text(content),) if content else ()
        if not isinstance(content, list):
            raise BadRequest(f"{path} must be a string or a list of parts.", param=path)
        parts: list[Part] = []
        for at, part in enumerate(content):
            here = f"{path}[{at}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(kind, str):
                raise BadRequest(f"{here} must be an object with a type.", param=here)
            if kind not in self._parts or kind not in only:
                raise Untranslatable(
                    f"{here}: a part of the type {kind[:100]!r} cannot be translated to the format of the upstream.",
                    param=here,
                )
            if any(part.get(name) for name in _CACHE_MARKS):
                self.wants_cache = True
            made = self._parts[kind](part, here)
            if made is not None:
                parts.append(made)
        return tuple(parts)

    def _text(self, part: _Json, path: str) -> Part | None:
        text = _string(part, "text", path)
        return Text(text) if text else None

    def _refusal(self, part: _Json, path: str) -> Part | None:
        text = _string(part, "refusal", path)
        return Text(text) if text else None

    def _image(self, part: _Json, path: str) -> Part:
        image = part.get("image_url")
        image = {"url": image} if isinstance(image, str) else image
        if not isinstance(image, dict):
            raise BadRequest(f"{path}.image_url must be an object.", param=path)
        detail = image.get("detail")
        return Image(_string(image, "url", f"{path}.image_url"), detail if isinstance(detail, str) else None)

    def _audio(self, part: _Json, path: str) -> Part:
        audio = _object(part, "input_audio", path)
        where = f"{path}.input_audio"
        return Audio(_string(audio, "data", where), _string(audio, "format", where))

    def _file(self, part: _Json, path: str) -> Part:
        file = _object(part, "file", path)
        if file.get("file_id"):
            raise Untranslatable(f"{path}.file.file_id: the upstream does not have the file.", param=path)
        name = file.get("filename")
        return File(name if isinstance(name, str) and name else "document", _string(file, "file_data", f"{path}.file"))


def _reasoning(message: _Json) -> Iterable[Reasoning]:
    """The reasoning of an assistant's message: with signatures if the client kept them, else its text."""
    details = message.get("reasoning_details")
    signed = [_signed(item) for item in (details if isinstance(details, list) else ()) if isinstance(item, dict)]
    found = [reasoning for reasoning in signed if reasoning is not None]
    if found:
        yield from found
        return
    for name in _PLAIN_REASONING:
        if isinstance(text := message.get(name), str) and text:
            yield Reasoning(text)
            return


def _signed(item: _Json) -> Reasoning | None:
    if item.get("format") != ANTHROPIC_REASONING:
        return None
    text, signature, data = item.get("text"), item.get("signature"), item.get("data")
    if item.get("type") == "reasoning.text" and isinstance(signature, str) and signature:
        return Reasoning(text if isinstance(text, str) else "", {"anthropic": signature})
    if item.get("type") == "reasoning.encrypted" and isinstance(data, str) and data:
        return Reasoning("", {"anthropic_redacted": data})
    return None


def _tool_call(call: object, path: str) -> ToolCall:
    if not isinstance(call, dict):
        raise BadRequest(f"{path} must be an object.", param=path)
    if call.get("type") not in (None, "function"):
        raise Untranslatable(f"{path}: only calls of functions can be translated.", param=path)
    function = _object(call, "function", path)
    name = _string(function, "name", f"{path}.function")
    return ToolCall(_string(call, "id", path), name, arguments_of(function.get("arguments")), _payloads(call))


def _payloads(call: _Json) -> dict[str, str]:
    """The opaque payloads of a call, as Gemini's look-alike of this format has them."""
    found: Any = call
    for name in ("extra_content", "google", "thought_signature"):
        found = found.get(name) if isinstance(found, dict) else None
    return {"gemini": found} if isinstance(found, str) and found else {}


def arguments_of(value: object) -> str:
    """Returns the arguments of a call as a JSON object. What is none is kept in an object, under the name by which
    Anthropic's documentation hands it back: an agent tells the model so what it did wrong.

    >>> arguments_of('{"a": 1}'), arguments_of(""), arguments_of('{"a')
    ('{"a": 1}', '{}', '{"INVALID_JSON":"{\\\\"a"}')
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return "{}"
    if isinstance(value, dict):
        return msgspec.json.encode(value).decode()
    if isinstance(value, str):
        try:
            if isinstance(msgspec.json.decode(value), dict):
                return value
        except (ValueError, RecursionError):
            pass
        return msgspec.json.encode({"INVALID_JSON": value}).decode()
    return msgspec.json.encode({"INVALID_JSON": msgspec.json.encode(value).decode()}).decode()


def _object(value: _Json, name: str, path: str) -> _Json:
    found = value.get(name)
    if not isinstance(found, dict):
        raise BadRequest(f"{path}.{name} must be an object.", param=f"{path}.{name}")
    return found


def _string(value: _Json, name: str, path: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or (not found and name in ("name", "id", "tool_call_id", "url")):
        raise BadRequest(
            f"{path}.{name} must be a {'non-empty ' if found == '' else ''}string.", param=f"{path}.{name}"
        )
    return found
