"""Encodes a request as a body for Ollama's ``/api/chat``."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from trigate.dialects.ollama.values import Json
from trigate.dialects.vocabulary import Effort, Image, Message, Reasoning, Request, Text, Tool, ToolCall, ToolResult
from trigate.errors import BadRequest, Untranslatable

TOOL_ERROR = "[The tool failed] "
"""Begins the text of a tool's result that is an error."""

_HAS_LEVELS = re.compile(r"(?:.*/)?gpt-oss")
_LEVELS: dict[Effort, str] = {"minimal": "low", "low": "low", "medium": "medium"}
_DATA_URL = re.compile(r"data:[^,]*;base64,")


def encode_request(request: Request, *, model: str) -> tuple[bytes, tuple[str, ...]]:
    """Encodes a request. As `UpstreamFormat.encode_request`.

    Raises:
        BadRequest: A tool's result has no call.
        Untranslatable: Something in it cannot be expressed; ``param`` names it.
    """
    choice = request.tool_choice.mode if request.tool_choice is not None else "auto"
    if choice in ("required", "tool"):
        raise Untranslatable("The upstream cannot be made to call a tool.", param="tool_choice")
    body: Json = {"model": model, "messages": list(_messages(request.messages)), "stream": request.stream}
    if request.tools and choice != "none":
        body["tools"] = [_tool(tool) for tool in request.tools]
    if request.schema is not None:
        body["format"] = request.schema
    elif request.is_json:
        body["format"] = "json"
    if request.effort is not None:
        body["think"] = _think(request.effort, model)
    options: Json = {
        "num_predict": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": request.seed,
        "stop": list(request.stop) or None,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
    }
    if options := {name: value for name, value in options.items() if value is not None}:
        body["options"] = options
    advisory = {
        "parallel_tool_calls": request.tools and request.parallel_tool_calls is False,
        "user": request.user,
        "cache": request.cache,
    }
    return msgspec.json.encode(body), tuple(name for name, value in advisory.items() if value)


def _think(effort: Effort, model: str) -> bool | str:
    """Only models of gpt-oss have levels; all others refuse one."""
    if not _HAS_LEVELS.match(model):
        return effort != "none"
    return "low" if effort == "none" else _LEVELS.get(effort, "high")


def _tool(tool: Tool) -> Json:
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.schema}
    return {"type": "function", "function": function}


def _messages(messages: tuple[Message, ...]) -> Iterator[Json]:
    names: dict[str, str] = {}
    for message in messages:
        content: list[Text | Image] = []
        encoded: Json = {"role": message.role, "content": ""}
        for part in message.parts:
            match part:
                case Text() | Image():
                    content.append(part)
                case Reasoning(text):
                    if text:
                        encoded["thinking"] = encoded.get("thinking", "") + text
                case ToolCall(call, name, arguments):
                    names[call] = name
                    function = {"name": name, "arguments": msgspec.Raw(arguments.encode())}
                    encoded.setdefault("tool_calls", []).append({"id": call, "function": function})
                case ToolResult():
                    yield _result(part, names)
                case _:
                    raise Untranslatable(f"The upstream takes no {type(part).__name__.lower()}s.", param="messages")
        encoded |= _content(content)
        if content or len(encoded) > 2 or not any(isinstance(part, ToolResult) for part in message.parts):
            yield encoded


def _result(result: ToolResult, names: dict[str, str]) -> Json:
    name = names.get(result.call_id)
    if name is None:
        raise BadRequest(
            f"{result.path}: no tool call before it has the id {result.call_id[:100]!r}.",
            param=result.path or "messages",
        )
    content: list[Text | Image] = []
    for part in result.parts:
        if not isinstance(part, Text | Image):
            raise Untranslatable("The upstream takes no documents in the result of a tool.", param=result.path)
        content.append(part)
    encoded = _content(content)
    if result.is_error:
        encoded["content"] = TOOL_ERROR + encoded["content"]
    return {"role": "tool", "tool_name": name, "tool_call_id": result.call_id, **encoded}


def _content(parts: list[Text | Image]) -> Json:
    texts = [part.text for part in parts if isinstance(part, Text)]
    images = [_image(part) for part in parts if isinstance(part, Image)]
    encoded: Json = {"content": "\n\n".join(texts)}
    return {**encoded, "images": images} if images else encoded


def _image(image: Image) -> str:
    head = _DATA_URL.match(image.url)
    if head is None:
        raise Untranslatable("The upstream takes no picture by its URL, only the picture itself.", param="messages")
    return image.url[head.end() :]
