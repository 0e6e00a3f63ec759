"""The rules by which Anthropic's API refuses a request, in its own words.

`problem_of` is strict: it also refuses what the API tolerates and a gateway should not send (turns of one role in a
row). It uses the standard library only, and none of the gateway's tables.

Source: Anthropic, "Messages", "Errors", "Tool use", "Troubleshooting thinking", "Structured outputs", and the messages
of its 400s as users have reported them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from typing import Any

_FIELDS = {
    *(
        "model",
        "max_tokens",
        "messages",
        "system",
        "stream",
        "temperature",
        "top_p",
        "top_k",
        "stop_sequences",
        "tools",
    ),
    *("tool_choice", "thinking", "output_config", "metadata", "cache_control", "container", "service_tier"),
}
_ID = re.compile(r"[a-zA-Z0-9_-]+\Z")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}\Z")
_OLD = re.compile(r"claude-(?:3|(?:[a-z]+-)?4-[0-5](?!\d)|[a-z]+-4(?!-\d))")
_SAMPLES = re.compile(r"claude-(?:3|(?:[a-z]+-)?4-[0-6](?!\d)|[a-z]+-4(?!-\d))|(?!claude)")
_ALWAYS_THINKS = re.compile(r"claude-(?:fable|mythos|opus-5-5)")
_ONE_OF_BOTH = re.compile(r"claude-[a-z]+-4-[1-6](?!\d)")


def signature_of(thinking: str) -> str:
    """Returns the signature that belongs to a thinking block."""
    return base64.b64encode(hashlib.sha256(f"signed {thinking}".encode()).digest()).decode()


def problem_of(body: bytes) -> str | None:
    """Returns what is wrong with a request; None = it is accepted."""
    try:
        request = json.loads(body)
        _check(request)
    except _Problem as problem:
        return str(problem)
    except ValueError as error:
        return f"The request body is not valid JSON: {error}"
    return None


class _Problem(Exception):
    pass


def _must(condition: object, message: str) -> None:
    if not condition:
        raise _Problem(message)


def _check(request: Any) -> None:
    _must(isinstance(request, dict), "Input should be an object")
    for name in request:
        _must(name in _FIELDS, f"{name}: Extra inputs are not permitted")
    for name in ("model", "max_tokens", "messages"):
        _must(name in request, f"{name}: Field required")
    limit, model = request["max_tokens"], request["model"]
    _must(type(limit) is int and limit >= 1, "max_tokens: Input should be greater than or equal to 1")
    system = request.get("system", "x")
    _must(isinstance(system, str | list) and system, "system: text content blocks must be non-empty")
    if isinstance(system, list):
        for at, block in enumerate(system):
            _check_text(block, f"system.{at}")
    _check_sampling(request, model)
    _check_thinking(request, model)
    _check_tools(request)
    for sequence in request.get("stop_sequences", ()):
        _must(sequence.strip(), "stop_sequences: each stop sequence must contain non-whitespace")
    user = request.get("metadata", {}).get("user_id", "x")
    _must(isinstance(user, str) and 0 < len(user) <= 256, "metadata.user_id: String should have at most 256 characters")
    config = request.get("output_config", {})
    _must(set(config) <= {"effort", "format"}, "output_config: Extra inputs are not permitted")
    if "format" in config:
        _must(set(config["format"]) == {"type", "schema"}, "output_config.format: Extra inputs are not permitted")
        _must(not _OLD.match(model) or "4-5" in model, "output_config.format: not supported by this model")
        _check_schema(config["format"]["schema"], "output_config.format.schema")
    _Conversation(request).check()


def _check_sampling(request: Any, model: str) -> None:
    for name in ("temperature", "top_p", "top_k"):
        if name in request:
            _must(_SAMPLES.match(model), f"`{name}` is not supported by this model")
    _must(0 <= request.get("temperature", 1) <= 1, "temperature: range: 0..1")
    if _ONE_OF_BOTH.match(model):
        _must(
            not {"temperature", "top_p"} <= set(request),
            "`temperature` and `top_p` cannot both be specified for this model. Please use only one.",
        )


def _check_thinking(request: Any, model: str) -> None:
    thinking, kind = request.get("thinking"), request.get("thinking", {}).get("type")
    effort = request.get("output_config", {}).get("effort")
    _must(effort in (None, "low", "medium", "high", "xhigh", "max"), "output_config.effort: unknown")
    if thinking is None:
        return
    is_claude = model.startswith("claude")
    if kind == "adaptive":
        _must(is_claude and not _OLD.match(model), "adaptive thinking is not supported on this model")
        _must(set(thinking) <= {"type", "display"}, "thinking.adaptive: Extra inputs are not permitted")
    elif kind == "enabled":
        budget = thinking.get("budget_tokens")
        _must(
            not is_claude or _OLD.match(model),
            '"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive" and '
            '"output_config.effort" to control thinking behavior.',
        )
        _must(not model.startswith(("claude-3-o", "claude-3-h")), "thinking is not supported by this model")
        _must(type(budget) is int and budget >= 1024, "thinking.enabled.budget_tokens: should be at least 1024")
        _must(budget < request["max_tokens"], "`max_tokens` must be greater than `thinking.budget_tokens`")
        forced = request.get("tool_choice", {}).get("type") in ("any", "tool")
        _must(not forced, "Thinking may not be enabled when tool_choice forces tool use.")
    else:
        _must(kind in ("disabled", "between_tools"), "thinking.type: unknown")
        _must(not _ALWAYS_THINKS.match(model), '"thinking.type.disabled" is not supported for this model.')
    if kind in ("adaptive", "enabled"):
        for name in ("temperature", "top_k"):
            _must(name not in request, f"`{name}` may only be set to 1 when thinking is enabled")


def _check_tools(request: Any) -> None:
    names = []
    for at, tool in enumerate(request.get("tools", ())):
        path = f"tools.{at}.custom"
        _must(
            set(tool) <= {"type", "name", "description", "input_schema", "strict", "cache_control"},
            f"{path}: Extra inputs are not permitted",
        )
        _must(_NAME.match(tool.get("name", "")), f"{path}.name: String should match pattern '{_NAME.pattern}'")
        schema = tool.get("input_schema")
        _must(isinstance(schema, dict), f"{path}.input_schema: Input should be an object")
        _must(schema.get("type") == "object", f"{path}.input_schema.type: Field required")
        for name in ("oneOf", "allOf", "anyOf"):
            _must(
                name not in schema,
                f"{path}.input_schema: input_schema does not support oneOf, allOf, or anyOf at the top level",
            )
        if tool.get("strict"):
            _check_schema(schema, f"{path}.input_schema")
        names.append(tool["name"])
    _must(len(names) == len(set(names)), "tools: Tool names must be unique.")
    choice = request.get("tool_choice")
    if choice is not None:
        _must(names, "tool_choice: may only be specified while providing tools")
        _must(choice["type"] in ("auto", "any", "none", "tool"), "tool_choice.type: unknown")
        _must(choice["type"] != "none" or set(choice) == {"type"}, "tool_choice.none: Extra inputs are not permitted")
        if choice["type"] == "tool":
            _must(choice.get("name") in names, "tool_choice.tool.name: Tool not found in provided tools")


_SCHEMA = {
    *("type", "description", "title", "properties", "required", "items", "enum", "const", "anyOf", "allOf", "default"),
    *("additionalProperties", "$ref", "$defs", "definitions", "format", "minItems"),
}


def _check_schema(schema: Any, path: str) -> None:
    if not isinstance(schema, dict):
        return
    for name in schema:
        _must(name in _SCHEMA, f"{path}: For '{schema.get('type')}' type, property '{name}' is not supported")
    if schema.get("type") == "object":
        _must(
            schema.get("additionalProperties") is False,
            f"{path}: For 'object' type, 'additionalProperties' must be explicitly set to false",
        )
    for name in ("properties", "$defs", "definitions"):
        for key, inner in schema.get(name, {}).items():
            _check_schema(inner, f"{path}.{name}.{key}")
    for inner in (*schema.get("anyOf", ()), *schema.get("allOf", ()), schema.get("items")):
        _check_schema(inner, path)


def _check_text(block: Any, path: str) -> None:
    _must(block.get("type") == "text", f"{path}.type: Input should be 'text'")
    _must(isinstance(block.get("text"), str), f"{path}.text: Input should be a valid string")
    _must(block["text"], "messages: text content blocks must be non-empty")
    _must(block["text"].strip(), "messages: text content blocks must contain non-whitespace text")


class _Conversation:
    def __init__(self, request: Any) -> None:
        self.request = request
        self.messages = request["messages"]
        self.ids: set[str] = set()

    def check(self) -> None:
        messages, model = self.messages, self.request["model"]
        _must(isinstance(messages, list) and messages, "messages: at least one message is required")
        due: set[str] = set()
        for at, message in enumerate(messages):
            path = f"messages.{at}"
            _must(set(message) == {"role", "content"}, f"{path}: Extra inputs are not permitted")
            role = message["role"]
            _must(role in ("user", "assistant"), f"{path}.role: Input should be 'user' or 'assistant'")
            _must(at == 0 or messages[at - 1]["role"] != role, "messages: roles must alternate")
            content = message["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            _must(blocks, f"{path}: {role} messages must have non-empty content")
            if role == "user":
                self._check_user(blocks, due, path)
                due = set()
            else:
                due = self._check_assistant(blocks, path)
        _must(not due, self._unanswered(len(messages) - 1, due))
        if messages[-1]["role"] == "assistant":
            _must(
                _OLD.match(model) or not model.startswith("claude"),
                "This model does not support assistant message prefill. The conversation must end with a user message.",
            )
            text = messages[-1]["content"]
            text = text if isinstance(text, str) else text[-1].get("text", "")
            _must(text == text.rstrip(), "messages: final assistant content cannot end with trailing whitespace")
            _must("thinking" not in self.request, "messages: prefill is not supported with thinking")

    @staticmethod
    def _unanswered(at: int, ids: set[str]) -> str:
        return (
            f"messages.{at}: `tool_use` ids were found without `tool_result` blocks immediately after: "
            f"{', '.join(sorted(ids))}. Each `tool_use` block must have a corresponding `tool_result` block in the "
            "next message."
        )

    def _check_assistant(self, blocks: list[Any], path: str) -> set[str]:
        due = set()
        for at, block in enumerate(blocks):
            here = f"{path}.content.{at}"
            match block["type"]:
                case "text":
                    _check_text(block, here)
                case "thinking":
                    _must(set(block) == {"type", "thinking", "signature"}, f"{here}: Field required")
                    _must(
                        block["signature"] == signature_of(block["thinking"]),
                        f"{here}: Invalid `signature` in `thinking` block",
                    )
                case "redacted_thinking":
                    _must(
                        block["data"].startswith("encrypted:"), f"{here}: Invalid `data` in `redacted_thinking` block"
                    )
                case "tool_use":
                    _must(_ID.match(block["id"]), f"{here}.tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'")
                    _must(block["id"] not in self.ids, "messages: `tool_use` ids must be unique")
                    _must(isinstance(block["input"], dict), f"{here}.tool_use.input: Input should be an object")
                    _must(_NAME.match(block["name"]), f"{here}.tool_use.name: String should match pattern")
                    _must(
                        self.request.get("tools"),
                        "Requests which include `tool_use` or `tool_result` blocks must define tools",
                    )
                    self.ids.add(block["id"])
                    due.add(block["id"])
                case kind:
                    raise _Problem(f"{here}: Input tag '{kind}' found using 'type' does not match any of the expected")
        _must(
            blocks[-1]["type"] not in ("thinking", "redacted_thinking"),
            f"{path}: The final block in an assistant message cannot be `thinking`.",
        )
        return due

    def _check_user(self, blocks: list[Any], due: set[str], path: str) -> None:
        answered: list[str] = []
        for at, block in enumerate(blocks):
            here = f"{path}.content.{at}"
            if block["type"] == "tool_result":
                _must(at == len(answered), f"{path}: `tool_result` blocks must come first")
                _must(
                    block["tool_use_id"] in due,
                    f"{here}: unexpected `tool_use_id` found in `tool_result` blocks: {block['tool_use_id']}. Each "
                    "`tool_result` block must have a corresponding `tool_use` block in the previous message.",
                )
                _must(block["tool_use_id"] not in answered, f"{here}: each tool_use must have a single result.")
                answered.append(block["tool_use_id"])
                content = block.get("content", [])
                for inner in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                    _check_input(inner, here)
            else:
                _check_input(block, here)
        missing = due - set(answered)
        _must(not missing, self._unanswered(int(path.rpartition(".")[2]) - 1, missing))


def _check_input(block: Any, path: str) -> None:
    kind = block["type"]
    if kind == "text":
        _check_text(block, path)
        return
    _must(kind in ("image", "document"), f"{path}: Input tag '{kind}' does not match any of the expected tags")
    source = block["source"]
    if source["type"] == "url":
        _must(source["url"].startswith("https://"), f"{path}.source.url: Only HTTPS URLs are supported.")
        return
    if source["type"] == "base64":
        allowed = ("image/jpeg", "image/png", "image/gif", "image/webp") if kind == "image" else ("application/pdf",)
        _must(source["media_type"] in allowed, f"{path}.source.base64.media_type: Input should be one of {allowed}")
        try:
            base64.b64decode(source["data"], validate=True)
        except binascii.Error:
            raise _Problem(f"{path}.source.base64: invalid base64 data") from None
        return
    _must(kind == "document" and source["type"] == "text", f"{path}.source: unknown")
    _must(source["media_type"] == "text/plain", f"{path}.source.text.media_type: Input should be 'text/plain'")
