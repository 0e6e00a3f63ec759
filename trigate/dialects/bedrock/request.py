"""Encodes a request for Converse.

Bedrock is strict where other formats are not. A conversation begins with the user and the roles alternate; no text is
blank; a message with a document has a text, too; documents have names of few characters, each once; ids of tool calls
and names of tools have few characters. What can be made to fit without another meaning is made to fit here.

A system message behind the beginning becomes a text of the user's, as for other formats without a place for it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec

from trigate.dialects.bedrock.fields import dropped_of
from trigate.dialects.bedrock.models import Traits, thinking_of, top_k_of, traits_of
from trigate.dialects.vocabulary import (
    Audio,
    File,
    Image,
    Message,
    Reasoning,
    Request,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    as_user_text,
)
from trigate.errors import BadRequest, Untranslatable
from trigate.openai.raw_json import decode_any

TOOL_ERROR = "[The tool failed] "
"""Begins the text of a tool's result that is an error, for a model that is not told otherwise."""
NO_OUTPUT = "(no output)"
"""Stands for the empty result of a tool, which is refused."""

_CACHE_POINT = {"cachePoint": {"type": "default"}}
_DATA_URL = re.compile(r"data:([a-z0-9.+-]+/[a-z0-9.+-]+)(?:;[^,;]*)*;base64,", re.IGNORECASE)
_IMAGES = {"image/png": "png", "image/jpeg": "jpeg", "image/jpg": "jpeg", "image/gif": "gif", "image/webp": "webp"}
_DOCUMENTS = {
    "application/pdf": "pdf",
    "text/csv": "csv",
    "text/html": "html",
    "text/plain": "txt",
    "text/markdown": "md",
    "application/msword": "doc",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "application/vnd.ms-excel": "xls",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
}
_CALL_ID = re.compile(r"[a-zA-Z0-9_.:-]{1,64}\Z")
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}\Z")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9()\[\] -]+")

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


def encode_request(request: Request, *, model: str, guardrail: str | None) -> tuple[bytes, tuple[str, ...]]:
    """Encodes a request.

    Args:
        model: The upstream's own model id.
        guardrail: ``ID:VERSION`` of the guardrail; None = none.

    Returns:
        The body, and the names of the advisory fields that were dropped: of `vocabulary.Request`.

    Raises:
        BadRequest: The arguments of a tool call are no object.
        Untranslatable: Something in it cannot be expressed; ``param`` names it.
    """
    dropped = dropped_of(request)
    traits = traits_of(model)
    system, messages = _Messages(traits).encode(request.messages)
    body: _Json = {"messages": messages}
    if system:
        body["system"] = system
    extra, output = _thinking(request, model, dropped)
    config: _Json = {}
    if request.max_tokens is not None:
        config["maxTokens"] = request.max_tokens
    if request.temperature is not None and "temperature" not in dropped:
        config["temperature"] = request.temperature
    if request.top_p is not None:
        config["topP"] = request.top_p
    if request.stop:
        config["stopSequences"] = list(request.stop)
    if config:
        body["inferenceConfig"] = config
    if request.top_k is not None and "top_k" not in dropped:
        limit = top_k_of(model, request.top_k)
        if limit is None:
            dropped.append("top_k")
        else:
            extra |= limit
    _add_tools(body, request)
    if request.cache:
        if traits.takes_cache_points:
            _add_cache_points(body)
        else:
            dropped.append("cache")
    if request.schema is not None:
        schema = {"schema": msgspec.json.encode(request.schema).decode(), "name": request.schema_name or "answer"}
        output["textFormat"] = {"type": "json_schema", "structure": {"jsonSchema": schema}}
    elif request.is_json:
        raise Untranslatable("The upstream promises JSON only with a schema for it.", param="response_format")
    if extra:
        body["additionalModelRequestFields"] = extra
    if output:
        body["outputConfig"] = output
    if guardrail is not None:
        identifier, _, version = guardrail.rpartition(":")
        body["guardrailConfig"] = {"guardrailIdentifier": identifier, "guardrailVersion": version}
    return msgspec.json.encode(body), tuple(dropped)


def _thinking(request: Request, model: str, dropped: list[str]) -> tuple[_Json, _Json]:
    """Returns the model's own fields and the output's that tell it to think."""
    if request.effort is None:
        return {}, {}
    choice = request.tool_choice
    must_call = choice is not None and choice.mode in ("required", "tool")
    thinking = thinking_of(model, request.effort, request.max_tokens)
    if thinking is None or (thinking.extra and must_call and traits_of(model).is_claude):
        dropped.append("effort")  # a model of Anthropic's that thinks cannot be made to call a tool
        return {}, {}
    dropped += [name for name in thinking.excludes if getattr(request, name) is not None]
    return dict(thinking.extra), {"effort": thinking.effort} if thinking.effort is not None else {}


# -- tools ------------------------------------------------------------------------------------------------------------


def _add_cache_points(body: _Json) -> None:
    """Asks for a cache of what precedes the conversation, and of the conversation so far."""
    if "system" in body:
        body["system"].append(dict(_CACHE_POINT))
    if body["messages"]:
        body["messages"][-1]["content"].append(dict(_CACHE_POINT))


def _add_tools(body: _Json, request: Request) -> None:
    choice = request.tool_choice
    used = [
        part.name for message in request.messages for part in message.parts if isinstance(part, ToolCall)
    ]  # they have to be declared, even where the request does not
    tools = request.tools or tuple(Tool(name, None, {"type": "object"}) for name in dict.fromkeys(used))
    if not tools:
        return
    if choice is not None and choice.mode == "none":
        if used:
            raise Untranslatable(
                "The upstream cannot be kept from calling the tools that the conversation has used.",
                param="tool_choice",
            )
        return
    config: _Json = {"tools": [_tool(tool) for tool in tools]}
    if choice is not None:
        config["toolChoice"] = _tool_choice(choice)
    body["toolConfig"] = config


def _tool(tool: Tool) -> _Json:
    if not _TOOL_NAME.match(tool.name):
        raise Untranslatable(
            f"The name of the tool {tool.name[:100]!r} has other characters than letters, digits, '_' and '-', "
            "or more than 64.",
            param="tools",
        )
    spec: _Json = {"name": tool.name, "inputSchema": {"json": tool.schema}}
    if tool.description:
        spec["description"] = tool.description
    if tool.strict is not None:
        spec["strict"] = tool.strict
    return {"toolSpec": spec}


def _tool_choice(choice: ToolChoice) -> _Json:
    match choice.mode:
        case "tool":
            return {"tool": {"name": choice.name}}
        case "required":
            return {"any": {}}
        case _:
            return {"auto": {}}


def _call_id(id_: str) -> str:
    """Returns the id of a call in the characters that are allowed; the same for the call and its result.

    >>> _call_id("call_1"), len(_call_id("a b"))
    ('call_1', 32)
    """
    return id_ if _CALL_ID.match(id_) else hashlib.blake2b(id_.encode(), digest_size=16).hexdigest()


# -- messages ---------------------------------------------------------------------------------------------------------


class _Messages:
    """Encodes the messages of one request."""

    def __init__(self, traits: Traits) -> None:
        self._traits = traits
        self._names: set[str] = set()

    def encode(self, messages: tuple[Message, ...]) -> tuple[list[_Json], list[_Json]]:
        """Returns the blocks of the system prompt, and the messages."""
        system: list[_Json] = []
        encoded: list[_Json] = []
        for message in messages:
            if message.role == "system":
                text = "\n\n".join([part.text for part in message.parts if isinstance(part, Text)])
                if not text.strip():
                    continue
                if not encoded:
                    system.append({"text": text})
                    continue
                role, content = "user", [{"text": as_user_text(text)}]
            else:
                role = message.role
                content = [block for part in message.parts for block in self._blocks(part)]
            if encoded and encoded[-1]["role"] == role:
                encoded[-1]["content"] += content
            elif content:
                encoded.append({"role": role, "content": content})
        for each in encoded:
            if each["role"] == "user":
                each["content"] = _in_order(each["content"])
        return system, encoded

    def _blocks(self, part: object) -> list[_Json]:
        match part:
            case Text(text):
                return [{"text": text}] if text.strip() else []
            case Image():
                return [_image(part)]
            case Audio(data, form):
                return [{"audio": {"format": form, "source": {"bytes": data}}}]
            case File():
                return [self._document(part)]
            case ToolCall(id_, name, arguments):
                return [{"toolUse": {"toolUseId": _call_id(id_), "name": name, "input": _object(arguments, name)}}]
            case ToolResult():
                return [self._result(part)]
            case Reasoning(text, payloads):
                return self._reasoning(text, payloads)
        raise Untranslatable(f"The upstream takes no {type(part).__name__}.", param="messages")

    def _reasoning(self, text: str, payloads: dict[str, str]) -> list[_Json]:
        """Only Anthropic's models take reasoning back, and only with their own signature."""
        if not self._traits.is_claude:
            return []
        if (hidden := payloads.get("bedrock")) is not None:
            return [{"reasoningContent": {"redactedContent": hidden}}]
        if (signature := payloads.get("anthropic")) is None:
            return []
        return [{"reasoningContent": {"reasoningText": {"text": text, "signature": signature}}}]

    def _result(self, result: ToolResult) -> _Json:
        content = [block for part in result.parts for block in self._blocks(part)] or [{"text": NO_OUTPUT}]
        block: _Json = {"toolUseId": _call_id(result.call_id), "content": content}
        if result.is_error and self._traits.takes_tool_errors:
            block["status"] = "error"
        elif result.is_error:
            block["content"] = [{"text": TOOL_ERROR.strip()}, *content]
        return {"toolResult": block}

    def _document(self, file: File) -> _Json:
        source = _source(file.url, f"the document {file.name[:100]!r}")
        media_type = (_DATA_URL.match(file.url) or [None, ""])[1]
        form = _DOCUMENTS.get(media_type.lower()) if media_type else file.url.rpartition(".")[2].lower()
        if form not in _DOCUMENTS.values():
            raise Untranslatable(
                f"The upstream takes no document of the type {(media_type or form or 'unknown')[:100]!r}.",
                param="messages",
            )
        return {"document": {"format": form, "name": self._name(file.name), "source": source}}

    def _name(self, name: str) -> str:
        """Returns a name of allowed characters that no other document of the request has."""
        plain = " ".join(_NOT_IN_NAMES.sub("-", name).split())[:190] or "document"
        found, number = plain, 1
        while found in self._names:
            number += 1
            found = f"{plain} ({number})"
        self._names.add(found)
        return found


def _in_order(content: list[_Json]) -> list[_Json]:
    """Returns the content of a user's message with the results of tools first, and with a text beside a document."""
    ordered = sorted(content, key=lambda block: "toolResult" not in block)
    if any("document" in block for block in ordered) and not any("text" in block for block in ordered):
        names = ", ".join([block["document"]["name"] for block in ordered if "document" in block])
        ordered.append({"text": f"Attached: {names}"})
    return ordered


def _image(image: Image) -> _Json:
    source = _source(image.url, "a picture")
    found = _DATA_URL.match(image.url)
    form = _IMAGES.get(found[1].lower()) if found else image.url.rpartition(".")[2].lower().replace("jpg", "jpeg")
    if form not in _IMAGES.values():
        raise Untranslatable(
            f"The upstream takes no picture of the type {(found[1] if found else str(form))[:100]!r}.", param="messages"
        )
    return {"image": {"format": form, "source": source}}


def _source(url: str, what: str) -> _Json:
    found = _DATA_URL.match(url)
    if found is not None:
        return {"bytes": url[found.end() :]}
    if url.startswith("s3://"):
        return {"s3Location": {"uri": url}}
    raise Untranslatable(
        f"The upstream fetches nothing from the web: send {what} itself, as a data URL, or as an s3:// URL.",
        param="messages",
    )


def _object(arguments: str, name: str) -> _Json:
    value = decode_any(arguments.encode(errors="replace")) if arguments.strip() else {}
    if not isinstance(value, dict):
        raise BadRequest(f"The arguments of the tool call {name[:100]!r} are no JSON object.", param="messages")
    return value
