"""Encodes a request as a body for chat completions.

Two things have no place there, and get another one:

* A system message behind the conversation's beginning is refused by the templates of many models. Unless the upstream
  says otherwise (`system_role`), it becomes a text of the user's, in tags that say what it is. To move it to the
  beginning would change the prefix of every request, and so lose the provider's cache.
* The message of a tool has text only. Its pictures go into the user's message behind it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from trigate.dialects.openai_chat.traits import Traits
from trigate.dialects.vocabulary import (
    Audio,
    File,
    Image,
    Message,
    Reasoning,
    Request,
    Text,
    ToolCall,
    ToolChoice,
    ToolResult,
    as_user_text,
)
from trigate.errors import BadRequest, Untranslatable

TOOL_ERROR = "[The tool failed] "
"""Begins the text of a tool's result that is an error."""

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


def encode_request(request: Request, *, model: str, traits: Traits) -> tuple[bytes, tuple[str, ...]]:
    """Encodes a request.

    Args:
        model: The upstream's own model id.
        traits: What the upstream takes.

    Returns:
        The body, and the names of the advisory fields that were dropped: of `vocabulary.Request`.

    Raises:
        BadRequest: A tool's result has no call.
        Untranslatable: Something in it cannot be expressed; ``param`` names it.
    """
    dropped: list[str] = []
    body: _Json = {"model": model, "messages": _messages(request.messages, traits)}
    if request.stream:
        body["stream"] = True
        if traits.takes_include_usage:
            body["stream_options"] = {"include_usage": True}
    if request.max_tokens is not None:
        body[traits.max_tokens_field] = request.max_tokens
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.top_p is not None:
        body["top_p"] = request.top_p
    if request.top_k is not None:
        if traits.takes_top_k:
            body["top_k"] = request.top_k
        else:
            dropped.append("top_k")
    if request.stop:
        body["stop"] = list(request.stop)
    if request.tools:
        body["tools"] = [_tool(each) for each in request.tools]
        if request.tool_choice is not None:
            body["tool_choice"] = _tool_choice(request.tool_choice)
        if request.parallel_tool_calls is not None:
            body["parallel_tool_calls"] = request.parallel_tool_calls
    for name in ("seed", "presence_penalty", "frequency_penalty"):
        if (number := getattr(request, name)) is not None:
            body[name] = number
    if request.effort == "none":
        if (word := traits.effort_for_none(model)) is not None:
            body["reasoning_effort"] = word
        else:
            dropped.append("effort")
    elif request.effort is not None:
        if traits.takes_effort_at(model):
            known = traits.has_all_efforts or request.effort in ("low", "medium", "high")
            body["reasoning_effort"] = request.effort if known else "low" if request.effort == "minimal" else "high"
        else:
            dropped.append("effort")
    if request.schema is not None:
        strict = request.schema_strict is not False
        schema = {"name": request.schema_name or "answer", "schema": request.schema, "strict": strict}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif request.is_json:
        body["response_format"] = {"type": "json_object"}
    if request.user is not None:
        if traits.takes_user:  # at most 64 characters, and no name of a person
            body["safety_identifier"] = hashlib.sha256(request.user.encode()).hexdigest()
        else:
            dropped.append("user")
    if any(_is_lost(part, traits) for message in request.messages for part in message.parts):
        dropped.append("reasoning")
    return msgspec.json.encode(body), tuple(dropped)


def _is_lost(part: object, traits: Traits) -> bool:
    """Whether it is reasoning that the upstream takes in no form."""
    return isinstance(part, Reasoning) and (traits.reasoning_field is None or not part.text)


def _tool(tool: Any) -> _Json:  # Any: a `Tool`
    function: _Json = {"name": tool.name, "parameters": tool.schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice) -> str | _Json:
    return {"type": "function", "function": {"name": choice.name}} if choice.mode == "tool" else choice.mode


# -- messages ---------------------------------------------------------------------------------------------------------


def _messages(messages: Iterable[Message], traits: Traits) -> list[_Json]:
    encoded: list[_Json] = []
    for message in messages:
        match message.role:
            case "system":
                _add_system(encoded, message, traits)
            case "user":
                _add_user(encoded, message, traits)
            case "assistant":
                encoded.append(_assistant(message, traits))
    return encoded


def _add_system(encoded: list[_Json], message: Message, traits: Traits) -> None:
    text = "\n\n".join([part.text for part in message.parts if isinstance(part, Text)])
    is_first = all(each["role"] == "system" for each in encoded)
    if encoded and encoded[0]["role"] == "system" and (is_first or traits.system_role == "first"):
        encoded[0]["content"] += f"\n\n{text}"
        return
    if is_first or traits.system_role != "as-user":
        at = 0 if traits.system_role == "first" else len(encoded)
        encoded.insert(at, {"role": "system", "content": text})
        return
    part = {"type": "text", "text": as_user_text(text)}
    if encoded[-1]["role"] != "user":
        encoded.append({"role": "user", "content": part["text"]})
        return
    content = encoded[-1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    encoded[-1]["content"] = [*parts, part]


def _add_user(encoded: list[_Json], message: Message, traits: Traits) -> None:
    """Appends the results of tools, in the order of their calls, and then the rest of the message."""
    calls = encoded[-1].get("tool_calls", ()) if encoded else ()
    order = {call["id"]: at for at, call in enumerate(calls)}
    results = [part for part in message.parts if isinstance(part, ToolResult)]
    for result in results:
        if result.call_id not in order:
            raise BadRequest(
                f"{result.path}: no tool call of the message before it has the id {result.call_id[:100]!r}.",
                param=result.path,
            )
    content: list[_Json] = []
    for result in sorted(results, key=lambda result: order[result.call_id]):
        text = "\n\n".join([part.text for part in result.parts if isinstance(part, Text)])
        encoded.append(
            {"role": "tool", "tool_call_id": result.call_id, "content": TOOL_ERROR + text if result.is_error else text}
        )
        media = [_content_part(part, traits) for part in result.parts if not isinstance(part, Text)]
        if media:
            content.append({"type": "text", "text": f"From the result of the tool call {result.call_id}:"})
            content += media
    content += [_content_part(part, traits) for part in message.parts if not isinstance(part, ToolResult)]
    if len(content) == 1 and content[0]["type"] == "text":
        encoded.append({"role": "user", "content": content[0]["text"]})
    elif content or not results:
        encoded.append({"role": "user", "content": content or ""})


def _content_part(part: object, traits: Traits) -> _Json:
    match part:
        case Text(text):
            return {"type": "text", "text": text}
        case Image(url, detail):
            return {
                "type": "image_url",
                "image_url": {"url": url} if detail is None else {"url": url, "detail": detail},
            }
        case Audio(data, form):
            return {"type": "input_audio", "input_audio": {"data": data, "format": form}}
        case File(name, data_url) if traits.takes_files:
            return {"type": "file", "file": {"filename": name, "file_data": data_url}}
        case File(name):
            raise Untranslatable(f"The upstream takes no documents such as {name[:100]!r}.", param="messages")
    raise Untranslatable(f"A message of the user cannot have a {type(part).__name__}.", param="messages")


def _assistant(message: Message, traits: Traits) -> _Json:
    text = "".join([part.text for part in message.parts if isinstance(part, Text)])
    calls = [part for part in message.parts if isinstance(part, ToolCall)]
    encoded: _Json = {"role": "assistant", "content": text if text or not calls else None}
    if calls:
        encoded["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    if traits.reasoning_field is not None:
        reasoning = "".join([part.text for part in message.parts if isinstance(part, Reasoning)])
        if reasoning or (calls and traits.needs_reasoning):
            encoded[traits.reasoning_field] = reasoning
    return encoded
