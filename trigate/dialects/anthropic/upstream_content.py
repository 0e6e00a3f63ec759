"""Encodes the messages of a request in Anthropic's format.

The format is strict about a conversation: the roles alternate, the results of tools begin the user's turn right behind
the calls, ids have a pattern and occur once, and no text is empty. So a conversation is put together in turns:

* The system messages at the beginning become ``system``. Later ones become texts of the user's, in tags that say what
  they are: to move them to the beginning would change the prefix of every request, and so lose the provider's cache.
* Messages of one role in a row become one turn, in which the results of tools come first, in the order of their calls.
* Reasoning goes back with its signature only. What another provider thought is left out, since Anthropic refuses what
  it has not signed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable
from typing import Any, Literal

import attrs
import msgspec

from trigate.dialects.marks import is_mark
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
    as_user_text,
)
from trigate.errors import BadRequest, Untranslatable

_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}\Z")
_IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


@attrs.define(eq=False)
class _Turn:
    """One message that is sent.

    Attributes:
        results: The results of tools, which come first.
        calls: The id of each tool call, and the id that is sent for it.
    """

    role: Literal["user", "assistant"]
    results: list[tuple[ToolResult, _Json]] = attrs.field(factory=list)
    blocks: list[_Json] = attrs.field(factory=list)
    calls: dict[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Conversation:
    """The encoded messages.

    Attributes:
        system: ``""`` = there is no system prompt.
        is_prefilled: The last turn is the assistant's.
        tools: The names of the tools that have been called.
        ends_in_results_without_thinking: The last turn answers tool calls, in front of which there is no reasoning.
    """

    system: str
    messages: list[_Json]
    is_prefilled: bool
    tools: tuple[str, ...]
    ends_in_results_without_thinking: bool


def encode_messages(messages: Iterable[Message], *, thinks: bool) -> Conversation:
    """Encodes the messages of a request.

    Args:
        thinks: The model takes back reasoning.

    Raises:
        BadRequest: A tool's result has no call, or a call has no result; or there is no text at all.
        Untranslatable: A part cannot be expressed.
    """
    system: list[str] = []
    turns: list[_Turn] = []
    used: set[str] = set()
    for message in messages:
        if message.role == "system":
            text = "\n\n".join([part.text for part in message.parts if isinstance(part, Text) and part.text.strip()])
            if not text:
                continue
            if turns:
                _turn(turns, "user").blocks.append({"type": "text", "text": as_user_text(text)})
            else:
                system.append(text)
        elif message.role == "user":
            _add_user(turns, message)
        else:
            _add_assistant(turns, message, used, thinks=thinks)
    if not turns and system:  # a request needs a message
        turns.append(_Turn("user", blocks=[{"type": "text", "text": "\n\n".join(system)}]))
        system = []
    if not turns:
        raise BadRequest("messages must hold at least one message with a text.", param="messages")
    _check_pairs(turns)
    is_prefilled = turns[-1].role == "assistant"
    if is_prefilled and turns[-1].blocks[-1]["type"] == "text":
        turns[-1].blocks[-1]["text"] = turns[-1].blocks[-1]["text"].rstrip()  # blanks at the end are refused
    return Conversation(
        system="\n\n".join(system),
        messages=[_encode(turn) for turn in turns],
        is_prefilled=is_prefilled,
        tools=tuple({block["name"]: None for turn in turns for block in turn.blocks if block["type"] == "tool_use"}),
        ends_in_results_without_thinking=(
            bool(turns[-1].results) and turns[-2].blocks[0]["type"] not in ("thinking", "redacted_thinking")
        ),
    )


def _turn(turns: list[_Turn], role: Literal["user", "assistant"]) -> _Turn:
    """Returns the last turn if it has this role, else a new one."""
    if not turns or turns[-1].role != role:
        turns.append(_Turn(role))
    return turns[-1]


def _encode(turn: _Turn) -> _Json:
    blocks = [block for _, block in turn.results] + turn.blocks
    if len(blocks) == 1 and blocks[0]["type"] == "text":
        return {"role": turn.role, "content": blocks[0]["text"]}
    return {"role": turn.role, "content": blocks}


# -- the assistant's --------------------------------------------------------------------------------------------------


def _add_assistant(turns: list[_Turn], message: Message, used: set[str], *, thinks: bool) -> None:
    blocks: list[_Json] = []
    calls: dict[str, str] = {}
    for part in message.parts:
        match part:
            case Text(text):
                if text.strip():
                    blocks.append({"type": "text", "text": text})
            case Reasoning():
                if thinks:
                    blocks += _thinking(part)
            case ToolCall(call, name, arguments):
                calls[call] = _sent_id(call, used)
                blocks.append(
                    {
                        "type": "tool_use",
                        "id": calls[call],
                        "name": name,
                        "input": msgspec.Raw((arguments.strip() or "{}").encode()),
                    }
                )
            case _:
                raise Untranslatable(
                    f"A message of the assistant cannot have a {type(part).__name__}.", param="messages"
                )
    while blocks and blocks[-1]["type"] in ("thinking", "redacted_thinking"):
        blocks.pop()  # refused as the end of a turn
    if blocks:
        turn = _turn(turns, "assistant")
        turn.blocks += blocks
        turn.calls |= calls


def _thinking(part: Reasoning) -> list[_Json]:
    if (data := part.payloads.get("anthropic_redacted")) is not None:
        return [{"type": "redacted_thinking", "data": data}]
    signature = part.payloads.get("anthropic")
    if not signature or is_mark(signature):
        return []
    return [{"type": "thinking", "thinking": part.text, "signature": signature}]


def _sent_id(call: str, used: set[str]) -> str:
    """Returns an id that Anthropic takes, the same whenever the conversation is sent: most ids stay."""
    made = call
    number = 0
    while made in used or not _ID.match(made):
        made = "toolu_" + hashlib.blake2b(f"{number}:{call}".encode(), digest_size=12).hexdigest()
        number += 1
    used.add(made)
    return made


# -- the user's -------------------------------------------------------------------------------------------------------


def _add_user(turns: list[_Turn], message: Message) -> None:
    results = [part for part in message.parts if isinstance(part, ToolResult)]
    blocks = [
        _block(part)
        for part in message.parts
        if not isinstance(part, ToolResult) and not (isinstance(part, Text) and not part.text.strip())
    ]
    if not results and not blocks:
        return
    turn = _turn(turns, "user")
    calls = turns[-2].calls if len(turns) > 1 else {}
    for result in results:
        if result.call_id not in calls:
            raise BadRequest(
                f"{result.path or 'messages'}: no tool call of the message before it has the id "
                f"{result.call_id[:100]!r}.",
                param=result.path or "messages",
            )
        turn.results.append((result, _tool_result(result, calls[result.call_id])))
    order = {call: at for at, call in enumerate(calls)}
    turn.results.sort(key=lambda result: order[result[0].call_id])
    turn.blocks += blocks


def _tool_result(result: ToolResult, sent_id: str) -> _Json:
    block: _Json = {"type": "tool_result", "tool_use_id": sent_id}
    parts = [_block(part) for part in result.parts if not (isinstance(part, Text) and not part.text.strip())]
    if len(parts) == 1 and parts[0]["type"] == "text":
        block["content"] = parts[0]["text"]
    elif parts:
        block["content"] = parts
    if result.is_error:
        block["is_error"] = True
    return block


def _check_pairs(turns: list[_Turn]) -> None:
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        answered = {result.call_id for result, _ in following.results} if following is not None else set()
        for call in turn.calls:
            if call not in answered:
                raise BadRequest(
                    f"messages: the tool call {call[:100]!r} has no result in the messages behind it.",
                    param="messages",
                )


def _block(part: Part) -> _Json:
    match part:
        case Text(text):
            return {"type": "text", "text": text}
        case Image(url):
            return {"type": "image", "source": _image_source(url)}
        case File(name, url):
            return _document(name, url)
        case Audio():
            raise Untranslatable("Anthropic takes no sound (input_audio).", param="messages")
    raise Untranslatable(f"A message of the user cannot have a {type(part).__name__}.", param="messages")


def _image_source(url: str) -> _Json:
    if not url.startswith("data:"):
        return {"type": "url", "url": url}
    media_type, data = _split_data_url(url)
    media_type = "image/jpeg" if media_type == "image/jpg" else media_type
    if media_type not in _IMAGES:
        raise Untranslatable(
            f"Anthropic takes no picture of the type {media_type[:50]!r}, but {', '.join(_IMAGES)}.", param="messages"
        )
    return {"type": "base64", "media_type": media_type, "data": data}


def _document(name: str, url: str) -> _Json:
    if not url.startswith("data:"):
        return {"type": "document", "title": name, "source": {"type": "url", "url": url}}
    media_type, data = _split_data_url(url)
    if media_type == "application/pdf":
        source = {"type": "base64", "media_type": media_type, "data": data}
    elif media_type.startswith("text/"):
        try:
            text = base64.b64decode(data, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise BadRequest(f"The file {name[:100]!r} is not text in base64.", param="messages") from None
        source = {"type": "text", "media_type": "text/plain", "data": text}
    else:
        raise Untranslatable(
            f"Anthropic takes no file of the type {media_type[:50]!r}, but PDF and text.", param="messages"
        )
    return {"type": "document", "title": name, "source": source}


def _split_data_url(url: str) -> tuple[str, str]:
    """Returns the media type and the base64 of a data URL."""
    head, comma, data = url.partition(",")
    media_type, *parameters = head.removeprefix("data:").split(";")
    if not comma or "base64" not in parameters:
        raise BadRequest("A data URL must have base64: data:TYPE;base64,DATA.", param="messages")
    return media_type.lower(), data
