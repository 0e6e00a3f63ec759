"""Decodes the messages of a request in Ollama's format.

Tool calls need no ids there: a result says only the name of its tool. So each call that has no id gets one by its
position, and a result belongs to the first call of that name, in the message before it, that has none yet.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from trigate.dialects.ollama.values import Json, list_at, text_at
from trigate.dialects.vocabulary import Image, Message, Part, Reasoning, Text, ToolCall, ToolResult
from trigate.errors import BadRequest, Untranslatable
from trigate.openai.raw_json import decode_any

_MEDIA_TYPES = {"iVBORw0KGgo": "image/png", "/9j/": "image/jpeg", "R0lGOD": "image/gif", "UklGR": "image/webp"}
"""By the beginning of a picture, in base64."""


def decode_images(images: list[Any], path: str) -> tuple[Image, ...]:  # Any: JSON of any shape
    """Decodes pictures, each in base64; their format is that of their first bytes.

    >>> decode_images(["/9j/4AAQ"], "images")
    (Image(url='data:image/jpeg;base64,/9j/4AAQ', detail=None),)

    Raises:
        BadRequest: One is not a PNG, JPEG, GIF or WebP in base64.
    """
    found = []
    for at, image in enumerate(images):
        here = f"{path}[{at}]"
        if not isinstance(image, str):
            raise BadRequest(f"{here} must be a string.", param=here)
        if image.startswith("data:image/"):
            found.append(Image(image))
            continue
        kinds = [kind for start, kind in _MEDIA_TYPES.items() if image.startswith(start)]
        if not kinds:
            raise BadRequest(f"{here} must be a PNG, JPEG, GIF or WebP picture in base64.", param=here)
        found.append(Image(f"data:{kinds[0]};base64,{image}"))
    return tuple(found)


def decode_messages(messages: list[Any]) -> tuple[Message, ...]:  # Any: JSON of any shape
    """Decodes a conversation.

    Raises:
        BadRequest: A message is malformed, or the result of no call.
        Untranslatable: The last message is the assistant's.
    """
    decoded: list[Message] = []
    pending: list[ToolCall] = []  # calls without a result
    is_result = False
    for at, message in enumerate(messages):
        path = f"messages[{at}]"
        if not isinstance(message, dict):
            raise BadRequest(f"{path} must be an object.", param=path)
        role = message.get("role")
        if role not in ("system", "user", "assistant", "tool"):
            raise BadRequest(f"{path}.role must be system, user, assistant or tool.", param=f"{path}.role")
        content = _content(message, path)
        if role == "tool":
            result = ToolResult(_call_of(message, pending, path), content, path=path)
            if is_result:
                decoded[-1] = Message("user", (*decoded[-1].parts, result))
            else:
                decoded.append(Message("user", (result,)))
        elif role == "assistant":
            thinking = text_at(message, "thinking", f"{path}.thinking")
            pending = [
                _call(call, at, index, f"{path}.tool_calls[{index}]")
                for index, call in enumerate(list_at(message, "tool_calls", f"{path}.tool_calls"))
            ]
            decoded.append(Message("assistant", (*([Reasoning(thinking)] if thinking else ()), *content, *pending)))
        else:
            decoded.append(_plain(role, content))
        is_result = role == "tool"
    if decoded[-1].role == "assistant":
        raise Untranslatable(
            f"messages[{len(messages) - 1}]: the upstream cannot continue an answer that the request begins "
            "(a prefill): the last message must be the user's, or the result of a tool.",
            param="messages",
        )
    return tuple(decoded)


def _plain(role: Literal["system", "user"], content: tuple[Part, ...]) -> Message:
    return Message(role, content)


def _content(message: Json, path: str) -> tuple[Text | Image, ...]:
    text = text_at(message, "content", f"{path}.content")
    images = decode_images(list_at(message, "images", f"{path}.images"), f"{path}.images")
    return (*([Text(text)] if text else ()), *images)


def _call(call: object, message: int, index: int, path: str) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise BadRequest(f"{path} must be an object with a function.", param=path)
    name = text_at(function, "name", f"{path}.function.name")
    if not name:
        raise BadRequest(f"{path}.function.name must be a non-empty string.", param=f"{path}.function.name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # as OpenAI's clients have them
        arguments = decode_any(arguments.encode()) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise BadRequest(f"{path}.function.arguments must be an object.", param=f"{path}.function.arguments")
    given = text_at(call, "id", f"{path}.id")
    return ToolCall(given or f"call_{message}_{index}", name, msgspec.json.encode(arguments).decode())


def _call_of(message: Json, pending: list[ToolCall], path: str) -> str:
    """Returns the id of the call that a result belongs to, and removes the call from those without one."""
    given = text_at(message, "tool_call_id", f"{path}.tool_call_id")
    name = text_at(message, "tool_name", f"{path}.tool_name") or text_at(message, "name", f"{path}.name")
    for at, call in enumerate(pending):
        if call.id == given if given else call.name == name if name else True:
            return pending.pop(at).id
    what = f"no tool call before it has the id {given[:100]!r}" if given else f"no call of {name[:100]!r} is open"
    raise BadRequest(f"{path}: {what if given or name else 'no tool call before it is open'}.", param=path)
