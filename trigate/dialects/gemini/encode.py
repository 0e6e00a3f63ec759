"""Encodes a request in Gemini's format, for an upstream that speaks it.

Google's servers are strict: the turns of user and model alternate, the responses of functions follow their calls at
once and are as many, a response names its function, and models since Gemini 3 want the signature back with which they
called it. A call that another model made gets the signature that Google's documentation gives for this case.

Source: Gemini API reference ("generateContent", "Function calling", "Thinking", "Thought signatures"); for the budgets,
the table of ``reasoning_effort`` in Google's documentation of its OpenAI compatibility.
"""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from trigate.dialects.gemini.content import FORMAT
from trigate.dialects.vocabulary import (
    Audio,
    Effort,
    File,
    Image,
    Message,
    Reasoning,
    Request,
    Text,
    Tool,
    ToolCall,
    ToolResult,
    as_user_text,
)
from trigate.errors import BadRequest, Untranslatable

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""

FOREIGN = "skip_thought_signature_validator"
"""The signature of a call that another model made."""
_MODES: Mapping[str, str] = {"auto": "AUTO", "required": "ANY", "none": "NONE", "tool": "ANY"}
_VERSION = re.compile(r"gemini-(\d+)(?:\.(\d+))?")
_DATA_URL = re.compile(r"data:([^;,]*)(?:;[^,]*)?;base64,(.*)", re.DOTALL)
_AUDIO: Mapping[str, str] = {"mp3": "audio/mpeg", "m4a": "audio/mp4"}
_BUDGETS: Mapping[Effort, int] = {"minimal": 1024, "low": 1024, "medium": 8192, "high": 24576}
_LEVELS: Mapping[Effort, str] = {"none": "minimal", "minimal": "minimal", "low": "low", "medium": "medium"}
"""Every other one is ``high``."""


def encode_request(request: Request, *, model: str, with_ids: bool) -> tuple[bytes, tuple[str, ...]]:
    """Encodes a request.

    Args:
        model: The upstream's own model id.
        with_ids: Whether calls of functions have ids, which Vertex AI does not know.

    Returns:
        The body, and the names of the advisory fields that were dropped: of `vocabulary.Request`.

    Raises:
        BadRequest: A tool's result has no call, or the arguments of a call are no object.
        Untranslatable: Something in it cannot be expressed; ``param`` names it.
    """
    dropped: list[str] = []
    encoder = _ContentEncoder(is_modern=is_modern(model), with_ids=with_ids)
    system, contents = encoder.contents(request.messages)
    body: _Json = {"contents": contents}
    if system:
        body["systemInstruction"] = {"parts": system}
    if request.tools:
        body["tools"] = [{"functionDeclarations": [_declaration(tool) for tool in request.tools]}]
        choice = request.tool_choice
        if choice is not None:
            config: _Json = {"mode": _MODES[choice.mode]}
            if choice.mode == "tool":
                config["allowedFunctionNames"] = [choice.name]
            body["toolConfig"] = {"functionCallingConfig": config}
        if request.parallel_tool_calls is False:
            dropped.append("parallel_tool_calls")
        if any(tool.strict for tool in request.tools):
            dropped.append("strict")
    if config := _config(request, model, dropped):
        body["generationConfig"] = config
    if request.user is not None:
        dropped.append("user")
    if request.cache:  # Gemini caches by itself
        dropped.append("cache")
    return msgspec.json.encode(body), tuple(dropped)


def _declaration(tool: Tool) -> _Json:
    """``parametersJsonSchema`` takes any JSON schema, unlike ``parameters``."""
    found: _Json = {"name": tool.name}
    if tool.description is not None:
        found["description"] = tool.description
    if tool.schema.get("properties") or tool.schema.keys() - {"type", "properties"}:
        found["parametersJsonSchema"] = tool.schema
    return found


# -- generationConfig -------------------------------------------------------------------------------------------------


def is_modern(model: str) -> bool:
    """Whether a model is of Gemini 3 or later, as far as its name tells: the aliases of the latest ones are.

    >>> [is_modern(model) for model in ("gemini-2.5-pro", "gemini-3-flash-preview", "gemini-flash-latest", "gemma-3")]
    [False, True, True, False]
    """
    found = _VERSION.search(model)
    if found is not None:
        return int(found[1]) >= 3
    return "gemma" not in model and "learnlm" not in model


def _config(request: Request, model: str, dropped: list[str]) -> _Json:
    config: _Json = {
        name: value
        for name, value in (
            ("maxOutputTokens", request.max_tokens),
            ("temperature", request.temperature),
            ("topP", request.top_p),
            ("topK", request.top_k),
            ("seed", request.seed),
            ("presencePenalty", request.presence_penalty),
            ("frequencyPenalty", request.frequency_penalty),
        )
        if value is not None
    }
    if request.stop:
        config["stopSequences"] = list(request.stop)
    if request.schema is not None or request.is_json:
        config["responseMimeType"] = "application/json"
    if request.schema is not None:
        config["responseJsonSchema"] = request.schema
    thinking = _thinking(request.effort, model)
    if thinking is None:
        if request.effort is not None:
            dropped.append("effort")
        return config
    if request.wants_reasoning:
        thinking["includeThoughts"] = True
    if thinking:
        config["thinkingConfig"] = thinking
    return config


def _thinking(effort: Effort | None, model: str) -> _Json | None:
    """Returns how much a model thinks; None = it does not think, or its name does not tell.

    >>> [_thinking("none", model) for model in ("gemini-2.5-flash", "gemini-2.5-pro", "gemini-3-pro", "gemini-2.0-x")]
    [{'thinkingBudget': 0}, {'thinkingBudget': 128}, {'thinkingLevel': 'low'}, None]
    >>> _thinking("max", "gemini-2.5-pro"), _thinking("medium", "gemini-3-pro-preview"), _thinking(None, "gemini-3-pro")
    ({'thinkingBudget': 32768}, {'thinkingLevel': 'high'}, {})
    """
    is_pro = "pro" in model
    if is_modern(model):
        if effort is None:
            return {}
        level = _LEVELS.get(effort, "high")
        if is_pro and level == "minimal":
            level = "low"
        if level == "medium" and re.search(r"gemini-3-pro", model):
            level = "high"
        return {"thinkingLevel": level}
    if "gemini-2.5" not in model:
        return None
    if effort is None:
        return {}
    if effort == "none":
        return {"thinkingBudget": 128 if is_pro else 0}
    return {"thinkingBudget": _BUDGETS.get(effort, 32768 if is_pro else 24576)}


# -- contents ---------------------------------------------------------------------------------------------------------


class _ContentEncoder:
    """Encodes the messages of one request.

    Args:
        is_modern: The model wants signatures, and takes media within the response of a function.
    """

    def __init__(self, *, is_modern: bool, with_ids: bool) -> None:
        self._is_modern = is_modern
        self._with_ids = with_ids
        self._calls: list[ToolCall] = []

    def contents(self, messages: tuple[Message, ...]) -> tuple[list[_Json], list[_Json]]:
        """Returns the parts of the system instruction, and the contents, whose roles alternate."""
        system: list[_Json] = []
        contents: list[_Json] = []
        for message in messages:
            role = "model" if message.role == "assistant" else "user"
            if message.role == "system":
                texts = [part.text for part in message.parts if isinstance(part, Text) and part.text]
                if not contents:
                    system += [{"text": text} for text in texts]
                    continue
                parts = [{"text": as_user_text("\n\n".join(texts))}] if texts else []
            elif message.role == "assistant":
                parts = self._assistant(message)
            else:
                parts = self._user(message)
            if not parts:
                continue
            if contents and contents[-1]["role"] == role:
                contents[-1]["parts"] += parts
            else:
                contents.append({"role": role, "parts": parts})
        if not contents:  # Google wants a turn of the user's
            contents.append({"role": "user", "parts": [{"text": " "}]})
        if contents[-1]["role"] == "model":
            raise Untranslatable(
                "The upstream cannot continue an answer that the request begins (a prefill): the last message must be "
                "the user's.",
                param="messages",
            )
        return system, contents

    def _assistant(self, message: Message) -> list[_Json]:
        parts: list[_Json] = []
        calls: list[ToolCall] = []
        for part in message.parts:
            match part:
                case Text(text):
                    if text:
                        parts.append({"text": text})
                case Reasoning(text, payloads) if FORMAT in payloads:
                    parts.append({"text": text, "thought": True, "thoughtSignature": payloads[FORMAT]})
                case Reasoning():  # of another model, which this one cannot use
                    pass
                case ToolCall():
                    parts.append(self._call(part, is_first=not calls))
                    calls.append(part)
                case _:
                    raise Untranslatable(
                        f"A message of the assistant cannot have a {type(part).__name__}.", param="messages"
                    )
        if calls:
            self._calls = calls
        return parts

    def _call(self, call: ToolCall, *, is_first: bool) -> _Json:
        try:
            arguments = msgspec.json.decode(call.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise BadRequest(
                f"The arguments of the tool call {call.id[:100]!r} must be a JSON object.", param="messages"
            )
        function: _Json = {"name": call.name, "args": arguments}
        if self._with_ids:
            function["id"] = call.id
        part: _Json = {"functionCall": function}
        if signature := call.payloads.get(FORMAT):
            part["thoughtSignature"] = signature
        elif is_first and self._is_modern:
            part["thoughtSignature"] = FOREIGN
        return part

    def _user(self, message: Message) -> list[_Json]:
        """The results of tools, in the order of their calls, and then the rest of the message."""
        order = {call.id: at for at, call in enumerate(self._calls)}
        results = [part for part in message.parts if isinstance(part, ToolResult)]
        for result in results:
            if result.call_id not in order:
                raise BadRequest(
                    f"{result.path}: no tool call of the message before it has the id {result.call_id[:100]!r}.",
                    param=result.path or "messages",
                )
        parts: list[_Json] = []
        beside: list[_Json] = []
        for result in sorted(results, key=lambda result: order[result.call_id]):
            parts.append(self._result(result, self._calls[order[result.call_id]].name, beside))
        return parts + beside + [_content(part) for part in message.parts if not isinstance(part, ToolResult)]

    def _result(self, result: ToolResult, name: str, beside: list[_Json]) -> _Json:
        text = "\n\n".join([part.text for part in result.parts if isinstance(part, Text)])
        function: _Json = {"name": name, "response": {"error" if result.is_error else "output": text}}
        if self._with_ids:
            function["id"] = result.call_id
        media = [_content(part) for part in result.parts if not isinstance(part, Text)]
        if media and self._is_modern and all("inlineData" in part for part in media):
            function["parts"] = media
        elif media:
            beside += [{"text": f"From the result of the function {name}:"}, *media]
        return {"functionResponse": function}


def _content(part: object) -> _Json:
    match part:
        case Text(text):
            return {"text": text}
        case Image(url):
            return _media(url, "image/jpeg")
        case Audio(data, form):
            return {"inlineData": {"mimeType": _AUDIO.get(form, f"audio/{form}"), "data": data}}
        case File(name, url):
            return _media(url, mimetypes.guess_type(name)[0] or "application/pdf")
    raise Untranslatable(f"A message of the user cannot have a {type(part).__name__}.", param="messages")


def _media(url: str, media_type: str) -> _Json:
    """Returns what a data URL holds, or the URL with its media type, which is guessed from its name."""
    found = _DATA_URL.fullmatch(url)
    if found is not None:
        return {"inlineData": {"mimeType": found[1] or media_type, "data": found[2]}}
    if url.startswith("data:"):
        raise Untranslatable("A data URL must be in base64.", param="messages")
    guessed = mimetypes.guess_type(url.partition("?")[0])[0]
    return {"fileData": {"mimeType": guessed or media_type, "fileUri": url}}
