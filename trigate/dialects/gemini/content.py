"""Decodes the contents of a request in Gemini's format: the turns of the conversation, and their parts.

Calls of functions need no ids there: a response names the function, and responses come in the order of the calls. The
vocabulary has ids, so a call without one gets ``call_N``, N being its place in the conversation. It is the same in each
later request, so the prompt stays the same, and providers find it in their caches.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from trigate.dialects.gemini.fields import PARTS
from trigate.dialects.gemini.values import Json, list_of, object_of, text_of
from trigate.dialects.vocabulary import Audio, File, Image, Message, Part, Reasoning, Text, ToolCall, ToolResult
from trigate.errors import BadRequest, Untranslatable

FORMAT = "gemini"
"""The name of the format's payloads."""

_ROLES: Mapping[str, Any] = {"user": "user", "model": "assistant", "function": "user", "": "user"}  # Any: a role
_AUDIO = {"mpeg": "mp3", "x-wav": "wav", "wave": "wav", "vnd.wave": "wav", "x-flac": "flac", "mp4": "m4a"}
"""The formats of sounds, by their media types, where the names differ."""


class ContentDecoder:
    """Decodes the contents of one request.

    Args:
        dropped: Takes the names of what is dropped.
    """

    def __init__(self, dropped: set[str]) -> None:
        self._dropped = dropped
        self._calls = 0
        self._ids: set[str] = set()
        self._pending: list[ToolCall] = []
        self._kinds: Mapping[str, Callable[[Json, str], Part]] = {
            "inlineData": self._inline_data,
            "fileData": self._file_data,
            "functionCall": self._function_call,
            "functionResponse": self._function_response,
        }

    def messages(self, system: object, contents: object) -> tuple[Message, ...]:
        """Decodes the system instruction and the contents. Contents of one role in a row become one message.

        Raises:
            BadRequest: A part is malformed.
            Untranslatable: A part cannot be expressed.
        """
        decoded: list[Message] = []
        if system is not None:
            texts = self._system(system)
            if texts:
                decoded.append(Message("system", texts))
        turns = list_of(contents, "contents")
        self._ids = {call["id"] for call in _calls(turns) if isinstance(call.get("id"), str)}
        for at, turn in enumerate(turns):
            path = f"contents[{at}]"
            fields = object_of({"parts": [{"text": turn}]} if isinstance(turn, str) else turn, path)
            role = _ROLES.get(str(fields.get("role", "")).lower())
            if role is None:
                raise BadRequest(f"{path}.role: Please use a valid role: user, model.", param=f"{path}.role")
            if role == "assistant" and (not decoded or decoded[-1].role != "assistant"):
                self._pending = []
            parts = self._parts(fields.get("parts"), f"{path}.parts")
            if decoded and decoded[-1].role == role:
                parts = decoded.pop().parts + parts
            decoded.append(Message(role, parts))
        if not turns:
            raise BadRequest("GenerateContentRequest.contents: contents is not specified.", param="contents")
        if decoded[-1].role == "assistant":
            raise Untranslatable(
                f"contents[{len(turns) - 1}]: the upstream cannot continue an answer that the request begins (a "
                "prefill): the last content must be the user's.",
                param="contents",
            )
        return tuple(decoded)

    def _system(self, system: object) -> tuple[Text, ...]:
        if isinstance(system, str):
            return (Text(system),) if system else ()
        fields = object_of(system, "systemInstruction")
        found = []
        for at, part in enumerate(list_of(fields.get("parts"), "systemInstruction.parts")):
            path = f"systemInstruction.parts[{at}]"
            text = object_of(part, path).get("text")
            if not isinstance(text, str):
                raise Untranslatable(f"{path}: a system instruction can only have text.", param=path)
            if text:
                found.append(Text(text))
        return tuple(found)

    # -- parts --------------------------------------------------------------------------------------------------------

    def _parts(self, value: object, path: str) -> tuple[Part, ...]:
        parts: list[Part] = []
        for at, each in enumerate(list_of(value, path)):
            here = f"{path}[{at}]"
            part = object_of({"text": each} if isinstance(each, str) else each, here)
            for name in ("videoMetadata", "mediaResolution", "partMetadata"):
                if name in part:
                    self._dropped.add(name)
            if "text" in part:
                parts += self._text(part, here)
                continue
            kind = next((name for name in PARTS if name in part), None)
            if kind is None and set(part) <= {"thought", "thoughtSignature", "videoMetadata", "mediaResolution"}:
                continue  # a signature alone: the end of an answer whose text came before
            if kind not in self._kinds:
                name = kind or next(iter(part))
                raise Untranslatable(
                    f"{here}: a part of the kind {name[:100]!r} cannot be translated to the format of the upstream.",
                    param=here,
                )
            assert kind is not None, "it is one of the known kinds"
            made = self._kinds[kind](part, here)
            parts.append(made)
        return tuple(parts)

    def _text(self, part: Json, path: str) -> list[Part]:
        text, signature = part["text"], part.get("thoughtSignature")
        if not isinstance(text, str):
            raise BadRequest(f"{path}.text must be a string.", param=f"{path}.text")
        if part.get("thought") is True:
            return [Reasoning(text, _payloads(signature))] if text else []
        if signature is not None:  # advisory, unlike that of a function call
            self._dropped.add("thoughtSignature")
        return [Text(text)] if text else []

    def _inline_data(self, part: Json, path: str) -> Part:
        blob = object_of(part["inlineData"], f"{path}.inlineData")
        data = text_of(blob, "data", f"{path}.inlineData")
        media_type = text_of(blob, "mimeType", f"{path}.inlineData").partition(";")[0].strip().lower()
        kind, _, subtype = media_type.partition("/")
        if kind == "image":
            return Image(f"data:{media_type};base64,{data}")
        if kind == "audio":
            return Audio(data, _AUDIO.get(subtype, subtype))
        if kind == "text":
            try:
                return Text(base64.b64decode(data, altchars=b"-_" if set(data) & {"-", "_"} else None).decode())
            except (binascii.Error, UnicodeDecodeError):
                raise BadRequest(f"{path}.inlineData.data must be UTF-8 in base64.", param=path) from None
        if kind == "video":
            raise Untranslatable(f"{path}: a video cannot be translated to the format of the upstream.", param=path)
        name = blob.get("displayName")
        return File(name if isinstance(name, str) and name else "document", f"data:{media_type};base64,{data}")

    def _file_data(self, part: Json, path: str) -> Part:
        found = object_of(part["fileData"], f"{path}.fileData")
        uri = text_of(found, "fileUri", f"{path}.fileData")
        media_type = found.get("mimeType")
        is_stored = not uri.startswith(("http://", "https://")) or "generativelanguage.googleapis.com/" in uri
        if is_stored or not (isinstance(media_type, str) and media_type.startswith("image/")):
            raise Untranslatable(
                f"{path}.fileData: only a picture at a public URL can be translated to the format of the upstream.",
                param=path,
            )
        return Image(uri)

    # -- calls of functions -------------------------------------------------------------------------------------------

    def _function_call(self, part: Json, path: str) -> Part:
        found = object_of(part["functionCall"], f"{path}.functionCall")
        name = text_of(found, "name", f"{path}.functionCall")
        arguments = found.get("args", {})
        if not isinstance(arguments, dict):
            raise BadRequest(f"{path}.functionCall.args must be an object.", param=f"{path}.functionCall.args")
        given = found.get("id")
        payloads = _payloads(part.get("thoughtSignature"))
        call_id = given if isinstance(given, str) and given else self._next_id()
        call = ToolCall(call_id, name, msgspec.json.encode(arguments).decode(), payloads)
        self._pending.append(call)
        return call

    def _next_id(self) -> str:
        while True:
            made = f"call_{self._calls}"
            self._calls += 1
            if made not in self._ids:
                return made

    def _function_response(self, part: Json, path: str) -> Part:
        here = f"{path}.functionResponse"
        found = object_of(part["functionResponse"], here)
        name = text_of(found, "name", here)
        given = found.get("id")
        by_id = [call for call in self._pending if call.id == given]
        by_name = [call for call in self._pending if call.name == name]
        answered = next(iter(by_id or by_name), None)
        if answered is None:
            raise BadRequest(
                f"{here}: no function call before it is waiting for a response of {name[:100]!r}. Please ensure that "
                "function response turn comes immediately after a function call turn.",
                param=here,
            )
        self._pending.remove(answered)
        text, is_error = _result(found.get("response", {}), here)
        media: list[Image | File] = []
        for at, inner in enumerate(list_of(found.get("parts"), f"{here}.parts")):
            fields = object_of(inner, f"{here}.parts[{at}]")
            if "inlineData" not in fields:
                raise Untranslatable(f"{here}.parts[{at}] has no inlineData.", param=f"{here}.parts[{at}]")
            made = self._inline_data(fields, f"{here}.parts[{at}]")
            if not isinstance(made, Image | File):
                raise Untranslatable(f"{here}.parts[{at}] is neither a picture nor a document.", param=here)
            media.append(made)
        return ToolResult(answered.id, (*((Text(text),) if text else ()), *media), is_error=is_error, path=here)


def _payloads(signature: object) -> dict[str, str]:
    return {FORMAT: signature} if isinstance(signature, str) and signature else {}


def _result(response: object, path: str) -> tuple[str, bool]:
    """Returns the text of a response, and whether the function failed.

    Google's documentation: the keys ``output`` and ``error`` have the result; without them, the object is the result.
    Its Python SDK writes ``result``.
    """
    if not isinstance(response, dict):
        raise BadRequest(f"{path}.response must be an object.", param=f"{path}.response")
    if len(response) == 1:
        [(key, value)] = response.items()
        if key in ("output", "result", "error"):
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            return text, key == "error"
    return msgspec.json.encode(response).decode(), False


def _calls(turns: list[Any]) -> list[Json]:  # Any: JSON of any shape
    """The function calls of contents that have not been checked yet."""
    found = []
    for turn in turns:
        parts = turn.get("parts") if isinstance(turn, dict) else None
        for part in parts if isinstance(parts, list) else ():
            call = (part.get("functionCall") or part.get("function_call")) if isinstance(part, dict) else None
            if isinstance(call, dict):
                found.append(call)
    return found
