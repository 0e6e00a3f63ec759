"""The rules by which Google's servers refuse a request in Gemini's format, in their words. It shares no code with the
gateway."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

Json = dict[str, Any]

PARTS = ("text", "inlineData", "fileData", "functionCall", "functionResponse")
CONFIG = frozenset(
    (
        *("maxOutputTokens", "temperature", "topP", "topK", "stopSequences", "seed", "presencePenalty"),
        *("frequencyPenalty", "candidateCount", "responseMimeType", "responseSchema", "responseJsonSchema"),
        *("responseModalities", "thinkingConfig", "responseLogprobs", "logprobs", "mediaResolution"),
    )
)
BODY = frozenset(("contents", "systemInstruction", "tools", "toolConfig", "generationConfig", "safetySettings"))
SKIP = ("skip_thought_signature_validator", "context_engineering_is_the_way_to_go")
SIGNATURE = base64.b64encode(b"a signature of the provider").decode()
"""What this provider signs its calls with."""


def problem_of(body: Json, model: str, *, alternates: bool = True) -> str | None:
    """Returns why Google refuses a request; None = it does not.

    Args:
        alternates: Whether turns of one role in a row are refused. Today's servers take them for one turn, and Google's
            own SDK sends them.
    """
    if unknown := body.keys() - BODY:
        return f'Invalid JSON payload received. Unknown name "{min(unknown)}": Cannot find field.'
    contents = body.get("contents")
    if contents and not alternates:
        contents = _merged(contents)
    if not contents:
        return "* GenerateContentRequest.contents: contents is not specified"
    problem = _config(body, model) or _tools(body)
    if problem is not None:
        return problem
    before = None
    calls: list[Json] = []
    for at, content in enumerate(contents):
        role, parts = content.get("role", "user"), content.get("parts")
        if role not in ("user", "model"):
            return "Please use a valid role: user, model."
        if role == before:
            return "Please ensure that multiturn requests alternate between user and model."
        before = role
        if not parts:
            return f"* GenerateContentRequest.contents[{at}].parts: contents.parts must not be empty."
        for part in parts:
            if sum(name in part for name in PARTS) != 1:
                return (
                    f"* GenerateContentRequest.contents[{at}].parts[0].data: required oneof field 'data' must have one "
                    "initialized field"
                )
        responses = [part["functionResponse"] for part in parts if "functionResponse" in part]
        if len(responses) != len(calls):
            return (
                "Please ensure that the number of function response parts is equal to the number of function call "
                "parts of the function call turn."
            )
        if [each.get("name") for each in responses] != [each["name"] for each in calls]:
            return "Function response name does not match that of the function call."
        if not all(isinstance(each.get("response"), dict) for each in responses):
            return f"Invalid value at 'contents[{at}].parts[0].function_response.response' (Map), \"\""
        calls = [part["functionCall"] for part in parts if "functionCall" in part]
        if calls and role != "model":
            return "Please ensure that function call turn comes immediately after a user turn."
        for place, part in enumerate(part for part in parts if "functionCall" in part):
            if not isinstance(part["functionCall"].get("args", {}), dict):
                return f"Invalid value at 'contents[{at}].parts[0].function_call.args' (Map), \"\""
            problem = _signature(part, place, model)
            if problem is not None:
                return problem
    if before != "user":
        return "Please ensure that multiturn requests end with a user role or a function response."
    return None


def _merged(contents: list[Json]) -> list[Json]:
    found: list[Json] = []
    for content in contents:
        role, parts = content.get("role", "user"), content.get("parts") or []
        if found and found[-1]["role"] == role:
            found[-1] = {"role": role, "parts": [*found[-1]["parts"], *parts]}
        else:
            found.append({"role": role, "parts": parts})
    return found


def _signature(part: Json, place: int, model: str) -> str | None:
    given = part.get("thoughtSignature")
    if given is None:
        if place == 0 and model.startswith("gemini-3"):
            return (
                f"Function call is missing a thought_signature in functionCall parts. This is required for tools to "
                f"work correctly. Additional data, function call `default_api:{part['functionCall']['name']}`."
            )
        return None
    try:
        base64.b64decode(given, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return "Invalid value at 'contents[0].parts[0].thought_signature' (TYPE_BYTES), Base64 decoding failed"
    return None if given == SIGNATURE or given in SKIP else "Thought signature is not valid."


def _config(body: Json, model: str) -> str | None:
    config = body.get("generationConfig", {})
    if unknown := config.keys() - CONFIG:
        return f"Invalid JSON payload received. Unknown name \"{min(unknown)}\" at 'generation_config'."
    if len(config.get("stopSequences", ())) > 5:
        return "The number of stop sequences must be at most 5."
    thinking = config.get("thinkingConfig", {})
    if "thinkingLevel" in thinking and "thinkingBudget" in thinking:
        return "You can only set only one of thinking budget and thinking level."
    if "thinkingLevel" in thinking and not model.startswith("gemini-3"):
        return "Thinking level is not supported for this model."
    if thinking.get("thinkingBudget") == 0 and "pro" in model:
        return "Budget 0 is invalid. This model only works in thinking mode."
    system = body.get("systemInstruction")
    if system is not None and not all(isinstance(part.get("text"), str) for part in system["parts"]):
        return "Invalid value at 'system_instruction.parts'"
    return None


def _tools(body: Json) -> str | None:
    names: list[str] = []
    for tool in body.get("tools", ()):
        for at, function in enumerate(tool.get("functionDeclarations", ())):
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.:-]{0,127}", function["name"]):
                return f"* GenerateContentRequest.tools[0].function_declarations[{at}].name: Invalid function name."
            if "parameters" in function and "parametersJsonSchema" in function:
                return "Only one of parameters and parameters_json_schema can be set."
            names.append(function["name"])
    if len(set(names)) != len(names):
        return "Duplicate function declaration found."
    config = body.get("toolConfig", {}).get("functionCallingConfig", {})
    if set(config.get("allowedFunctionNames", ())) - set(names):
        return "Allowed function names must be declared."
    return None
