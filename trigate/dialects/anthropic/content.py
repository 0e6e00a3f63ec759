"""Decodes the messages of a request in Anthropic's format: the system prompt, and the blocks of each message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from trigate.dialects.anthropic.fields import BLOCKS
from trigate.dialects.marks import PAYLOAD, is_mark
from trigate.dialects.vocabulary import (
    File,
    Image,
    Message,
    Part,
    Reasoning,
    Text,
    ToolCall,
    ToolResult,
    as_user_text,
)
from trigate.errors import BadRequest, Untranslatable

_BILLING = "x-anthropic-billing-header:"
"""Begins a block of the system prompt that is meant for Anthropic's accounting. It differs from call to call, and would
keep another provider from finding the prompt in its cache."""

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


class ContentDecoder:
    """Decodes the messages of one request.

    Args:
        dropped: Takes the names of what is dropped.
    """

    def __init__(self, dropped: set[str]) -> None:
        self._dropped = dropped
        self._blocks: Mapping[str, Callable[[_Json, str], Part | Iterable[Part]]] = {
            "text": self._text,
            "mid_conv_system": self._system,
            "image": self._image,
            "document": self._document,
            "search_result": self._search_result,
            "tool_use": self._tool_use,
            "tool_result": self._tool_result,
            "thinking": self._thinking,
            "redacted_thinking": self._redacted_thinking,
        }

    def messages(self, system: object, messages: list[_Json]) -> tuple[Message, ...]:
        """Decodes the system prompt and the messages. Messages of one role in a row become one.

        Raises:
            BadRequest: A block is malformed.
            Untranslatable: A block cannot be expressed.
        """
        decoded: list[Message] = []
        if system is not None:
            parts = self._content(system, "system", only=("text",))
            if parts:
                decoded.append(Message("system", parts))
        for at, message in enumerate(messages):
            path = f"messages[{at}]"
            role = message.get("role")
            if role not in ("user", "assistant", "system"):
                raise BadRequest(f"{path}.role must be user, assistant or system.", param=f"{path}.role")
            if "content" not in message:
                raise BadRequest(f"{path}.content is missing.", param=f"{path}.content")
            parts = self._content(message["content"], f"{path}.content")
            if decoded and decoded[-1].role == role != "system":
                parts = decoded.pop().parts + parts
            decoded.append(Message(role, parts))
        if decoded[-1].role == "assistant":
            raise Untranslatable(
                f"messages[{len(messages) - 1}]: the upstream cannot continue an answer that the request begins "
                "(a prefill): the last message must be the user's.",
                param="messages",
            )
        return tuple(decoded)

    # -- blocks -------------------------------------------------------------------------------------------------------

    def _content(self, content: object, path: str, *, only: tuple[str, ...] | None = None) -> tuple[Part, ...]:
        if isinstance(content, str):
            return (Text(content),) if content else ()
        if not isinstance(content, list):
            raise BadRequest(f"{path} must be a string or a list of blocks.", param=path)
        parts: list[Part] = []
        for at, block in enumerate(content):
            here = f"{path}[{at}]"
            kind = block.get("type") if isinstance(block, dict) else None
            if not isinstance(kind, str):
                raise BadRequest(f"{here} must be an object with a type.", param=here)
            if BLOCKS.get(kind) == "dropped":
                self._dropped.add(kind)
                continue
            if kind not in self._blocks or (only is not None and kind not in only):
                raise Untranslatable(
                    f"{here}: a block of the type {kind[:100]!r} cannot be translated to the format of the upstream.",
                    param=here,
                )
            for name in ("cache_control", "citations"):
                if block.get(name):
                    self._dropped.add(name)
            made = self._blocks[kind](block, here)
            if isinstance(made, Text) and made.text.startswith(_BILLING) and path == "system":
                self._dropped.add(_BILLING.rstrip(":"))
            elif isinstance(made, Part):
                parts.append(made)
            else:
                parts += made
        return tuple(parts)

    def _text(self, block: _Json, path: str) -> Part | Iterable[Part]:
        text = _string(block, "text", path)
        return Text(text) if text else ()

    def _system(self, block: _Json, path: str) -> Part:
        return Text(as_user_text(_string(block, "text", path)))

    def _image(self, block: _Json, path: str) -> Part:
        source = _source(block, path)
        if source.get("type") == "base64":
            return Image(f"data:{_string(source, 'media_type', path)};base64,{_string(source, 'data', path)}")
        if source.get("type") == "url":
            return Image(_string(source, "url", path))
        raise _unknown_source(source, path)

    def _document(self, block: _Json, path: str) -> Part | Iterable[Part]:
        source = _source(block, path)
        title = block.get("title")
        title = title if isinstance(title, str) else ""
        head = "".join([f"{each}\n" for each in (title, block.get("context")) if isinstance(each, str) and each])
        match source.get("type"):
            case "text":
                return Text(head + _string(source, "data", path))
            case "content":
                inner = self._content(source.get("content"), f"{path}.source.content", only=("text", "image"))
                return (Text(head), *inner) if head else inner
            case "base64":
                media_type = _string(source, "media_type", path)
                return File(title or "document", f"data:{media_type};base64,{_string(source, 'data', path)}")
        raise _unknown_source(source, path)

    def _search_result(self, block: _Json, path: str) -> Part:
        inner = self._content(block.get("content"), f"{path}.content", only=("text",))
        texts = [part.text for part in inner if isinstance(part, Text)]
        return Text("\n".join([_string(block, "title", path), _string(block, "source", path), *texts]))

    def _tool_use(self, block: _Json, path: str) -> Part:
        arguments = block.get("input")
        if not isinstance(arguments, dict):
            raise BadRequest(f"{path}.input must be an object.", param=f"{path}.input")
        text = msgspec.json.encode(arguments).decode()
        return ToolCall(_string(block, "id", path), _string(block, "name", path), text)

    def _tool_result(self, block: _Json, path: str) -> Part:
        only = ("text", "image", "document", "search_result")
        parts = self._content(block.get("content") or "", f"{path}.content", only=only)
        return ToolResult(
            _string(block, "tool_use_id", path),
            tuple(part for part in parts if isinstance(part, Text | Image | File)),
            is_error=block.get("is_error") is True,
            path=path,
        )

    def _thinking(self, block: _Json, path: str) -> Part:
        signature = block.get("signature")
        payloads = {}
        if isinstance(signature, str) and signature:
            payloads[PAYLOAD if is_mark(signature) else "anthropic"] = signature
        return Reasoning(_string(block, "thinking", path), payloads)

    def _redacted_thinking(self, block: _Json, path: str) -> Part:
        return Reasoning("", {"anthropic_redacted": _string(block, "data", path)})


def _string(block: _Json, name: str, path: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise BadRequest(f"{path}.{name} must be a string.", param=f"{path}.{name}")
    return value


def _source(block: _Json, path: str) -> _Json:
    source = block.get("source")
    if not isinstance(source, dict):
        raise BadRequest(f"{path}.source must be an object.", param=f"{path}.source")
    return source


def _unknown_source(source: _Json, path: str) -> Untranslatable:
    kind = str(source.get("type"))[:100]
    return Untranslatable(
        f"{path}.source: a source of the type {kind!r} cannot be translated to the format of the upstream.",
        param=f"{path}.source",
    )
