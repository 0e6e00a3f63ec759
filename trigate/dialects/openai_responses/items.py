"""Decodes the input of a request: a text, or a list of items.

The items are a flat list; the vocabulary has turns. Adjacent reasoning, messages and tool calls of the assistant become
one message of it. The output of each call follows the message with the call at once, wherever it is in the list, since
other formats require that; a call without an output, and an output without a call, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from trigate.dialects.openai_responses.fields import CONTENT, ITEMS
from trigate.dialects.openai_responses.sealed import unseal
from trigate.dialects.openai_responses.tools import SEPARATOR
from trigate.dialects.request_values import Json, a_list, a_string, a_string_or_none, shown
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

_ROLES: Mapping[str, str] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_OUTPUTS = ("function_call_output", "custom_tool_call_output")
_OF_ASSISTANT = ("function_call", "custom_tool_call", "reasoning")


class InputDecoder:
    """Decodes the input of one request.

    Args:
        dropped: Takes the names of what is dropped.
    """

    def __init__(self, dropped: set[str]) -> None:
        self._dropped = dropped
        self._messages: list[Message] = []
        self._outputs: dict[str, list[tuple[int, ToolResult]]] = {}
        self._turn: list[tuple[int, Part]] = []

    def messages(self, instructions: str | None, value: object) -> tuple[Message, ...]:
        """Decodes the instructions and the input.

        Raises:
            BadRequest: An item is malformed; an output has no call, or a call no output.
            Untranslatable: An item cannot be expressed.
        """
        if instructions:
            self._messages.append(Message("system", (Text(instructions),)))
        if isinstance(value, str):
            self._messages.append(Message("user", (Text(value),)))
            return tuple(self._messages)
        if not isinstance(value, list):
            raise BadRequest("input must be a string or a list of items.", param="input")
        items = [self._checked(item, f"input[{at}]") for at, item in enumerate(value)]
        for at, (kind, item) in enumerate(items):
            if kind in _OUTPUTS:
                result = self._output(item, f"input[{at}]")
                self._outputs.setdefault(result.call_id, []).append((at, result))
        for at, (kind, item) in enumerate(items):
            self._take(at, kind, item, f"input[{at}]")
        self._end_turn()
        for results in self._outputs.values():
            for at, result in results:
                raise BadRequest(
                    f"No tool call found for the output with the call_id {result.call_id[:200]!r}.",
                    param=f"input[{at}]",
                )
        if not self._messages:
            raise BadRequest("input must have at least one item.", param="input")
        return tuple(self._messages)

    def _checked(self, item: object, path: str) -> tuple[str, Json]:
        """Returns the type of an item, and the item."""
        if not isinstance(item, dict):
            raise BadRequest(f"{path} must be an object.", param=path)
        kind = item.get("type", "message" if "role" in item else None)
        fate = ITEMS.get(kind) if isinstance(kind, str) else None
        if fate is None:
            raise Untranslatable(
                f"{path}: an item of the type {shown(kind)} cannot be translated to the format of the upstream.",
                param=path,
            )
        if kind == "item_reference":
            raise BadRequest(f"Item with id {shown(item.get('id'))} not found.", param=f"{path}.id")
        if fate == "dropped":
            self._dropped.add(f"input.{kind}")
        return str(kind), item

    def _take(self, at: int, kind: str, item: Json, path: str) -> None:
        if kind == "message":
            role = _ROLES.get(str(item.get("role")))
            if role is None:
                raise BadRequest(f"{path}.role must be user, assistant, system or developer.", param=f"{path}.role")
            parts = self._content(item.get("content"), f"{path}.content", is_system=role == "system")
            if role == "assistant":
                self._turn += [(at, part) for part in parts]
                return
            self._end_turn()
            self._add(Message("user" if role == "user" else "system", parts))
        elif kind in _OF_ASSISTANT:
            if kind == "reasoning" and any(isinstance(part, ToolCall) for _, part in self._turn):
                self._end_turn()  # it belongs to the next answer
            part = self._reasoning(item, path) if kind == "reasoning" else self._call(item, kind, path)
            if part is not None:
                self._turn.append((at, part))
        elif kind in _OUTPUTS:
            self._end_turn()

    def _end_turn(self) -> None:
        """Ends a message of the assistant; the outputs of its calls follow it."""
        if not self._turn:
            return
        turn, self._turn = self._turn, []
        self._messages.append(Message("assistant", tuple(part for _, part in turn)))
        results: list[Part] = []
        for at, part in turn:
            if isinstance(part, ToolCall):
                results.append(self._take_output(at, part))
        if results:
            self._messages.append(Message("user", tuple(results)))

    def _take_output(self, at: int, call: ToolCall) -> ToolResult:
        """Returns the output of a call: the next one with its id, since some models give the same id in each turn."""
        waiting = self._outputs.get(call.id, [])
        if not waiting:
            raise BadRequest(f"No tool output found for the call {call.id[:200]!r}.", param=f"input[{at}]")
        index = next((index for index, (where, _) in enumerate(waiting) if where > at), 0)
        return waiting.pop(index)[1]

    def _add(self, message: Message) -> None:
        """Adds a message of the user or the system; one of the user's is joined to the one before it."""
        if message.role == "user" and self._messages and self._messages[-1].role == "user":
            message = Message("user", self._messages.pop().parts + message.parts)
        self._messages.append(message)

    # -- items --------------------------------------------------------------------------------------------------------

    def _call(self, item: Json, kind: str, path: str) -> ToolCall:
        name = a_string(item, "name", path)
        namespace = a_string_or_none(item, "namespace", path)
        if namespace:
            name = f"{namespace}{SEPARATOR}{name}"
        if kind == "custom_tool_call":
            arguments = msgspec.json.encode({"input": a_string(item, "input", path)}).decode()
        else:
            arguments = a_string(item, "arguments", path) or "{}"
        return ToolCall(a_string(item, "call_id", path), name, arguments)

    def _output(self, item: Json, path: str) -> ToolResult:
        parts = self._content(item.get("output"), f"{path}.output", is_system=False)
        kept = tuple(part for part in parts if isinstance(part, Text | Image | File))
        if len(kept) < len(parts):
            raise Untranslatable(f"{path}.output: the output of a tool has no audio.", param=f"{path}.output")
        return ToolResult(a_string(item, "call_id", path), kept, path=path)

    def _reasoning(self, item: Json, path: str) -> Reasoning | None:
        sealed = a_string_or_none(item, "encrypted_content", path)
        if sealed is not None:
            opened = unseal(sealed)
            if opened is not None:
                return opened
            self._dropped.add("reasoning.encrypted_content")
        parts = a_list(item, "content", path) or a_list(item, "summary", path)
        texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
        return Reasoning("\n\n".join(texts)) if texts else None

    # -- content ------------------------------------------------------------------------------------------------------

    def _content(self, content: object, path: str, *, is_system: bool) -> tuple[Part, ...]:
        if isinstance(content, str):
            return (Text(content),)
        if not isinstance(content, list):
            raise BadRequest(f"{path} must be a string or a list of parts.", param=path)
        return tuple(self._part(part, f"{path}[{at}]", is_system) for at, part in enumerate(content))

    def _part(self, part: object, path: str, is_system: bool) -> Part:
        if not isinstance(part, dict):
            raise BadRequest(f"{path} must be an object.", param=path)
        kind = part.get("type")
        decode = _PARTS.get(kind) if isinstance(kind, str) else None
        if decode is None or (is_system and kind not in ("input_text", "output_text")):
            raise Untranslatable(
                f"{path}: a part of the type {shown(kind)} cannot be translated to the format of the upstream.",
                param=path,
            )
        if part.get("file_id"):
            raise Untranslatable(
                f"{path}.file_id: the upstream does not have the files that were uploaded to OpenAI. "
                "Send the file itself.",
                param=f"{path}.file_id",
            )
        return decode(part, path)


def _text(part: Json, path: str) -> Part:
    return Text(a_string(part, "text", path))


def _refusal(part: Json, path: str) -> Part:
    return Text(a_string(part, "refusal", path))


def _image(part: Json, path: str) -> Part:
    return Image(a_string(part, "image_url", path), a_string_or_none(part, "detail", path))


def _file(part: Json, path: str) -> Part:
    url = a_string_or_none(part, "file_url", path)
    name = a_string_or_none(part, "filename", path) or (url or "").rpartition("/")[2] or "document"
    return File(name, url if url is not None else a_string(part, "file_data", path))


def _audio(part: Json, path: str) -> Part:
    inner = part.get("input_audio")
    if not isinstance(inner, dict):
        raise BadRequest(f"{path}.input_audio must be an object.", param=f"{path}.input_audio")
    return Audio(a_string(inner, "data", f"{path}.input_audio"), a_string(inner, "format", f"{path}.input_audio"))


_PARTS: Mapping[str, Callable[[Json, str], Part]] = {
    "input_text": _text,
    "output_text": _text,
    "refusal": _refusal,
    "input_image": _image,
    "input_file": _file,
    "input_audio": _audio,
}
assert _PARTS.keys() == CONTENT.keys()
