"""Encodes a request in Anthropic's format. `upstream_content` encodes its messages; `traits` has what its model takes.

What only steers the answer is dropped where the model refuses it: an agent that always sends a temperature could not
use the newest models otherwise.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from trigate.dialects.anthropic.traits import Traits
from trigate.dialects.anthropic.upstream_content import Conversation, encode_messages
from trigate.dialects.anthropic.upstream_schema import closed_schema, tool_schema
from trigate.dialects.vocabulary import Effort, Request, Tool
from trigate.errors import Untranslatable

JSON_ONLY = "Answer with one JSON object and nothing else: no code fence, and no text before or behind it."
"""Added to the system prompt of a request for JSON of any shape."""
MIN_BUDGET = 1024
BUDGETS: dict[Effort, int] = {
    "minimal": 1024,
    "low": 2048,
    "medium": 8192,
    "high": 16384,
    "xhigh": 24576,
    "max": 32000,
}
"""How many tokens a model thinks at most that is asked by a budget."""
_NEAREST: dict[Effort, Effort] = {"minimal": "low", "xhigh": "high", "max": "high"}
_CHOICES = {"auto": "auto", "required": "any", "none": "none", "tool": "tool"}

_Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


def encode_request(request: Request, *, model: str, traits: Traits) -> tuple[bytes, tuple[str, ...]]:
    """Encodes a request.

    Args:
        model: The upstream's own model id.
        traits: What the model takes.

    Returns:
        The body, and the names of the advisory fields that were dropped: of `vocabulary.Request`.

    Raises:
        BadRequest: The messages make no sense.
        Untranslatable: Something in it cannot be expressed; ``param`` names it.
    """
    dropped: set[str] = set()
    talk = encode_messages(request.messages, thinks=traits.thinking != "none")
    if talk.is_prefilled and not traits.takes_prefill:
        raise Untranslatable(
            f"messages: {model} cannot continue an answer that the request begins: the last message must be the "
            "user's, or a tool's.",
            param="messages",
        )
    limit = request.max_tokens or request.model_max_tokens or traits.max_tokens
    body: _Json = {"model": model, "max_tokens": limit, "messages": talk.messages}
    system = talk.system
    if request.is_json and request.schema is None:
        system = f"{system}\n\n{JSON_ONLY}" if system else JSON_ONLY
        dropped.add("is_json")
    if system:
        body["system"] = system
    if request.stream:
        body["stream"] = True
    if request.cache:
        body["cache_control"] = {"type": "ephemeral"}
    if request.stop:
        body["stop_sequences"] = _stop(request.stop)
    if request.user is not None:  # no name of a person
        body["metadata"] = {"user_id": hashlib.sha256(request.user.encode()).hexdigest()}
    if tools := _tools(request, traits, talk, dropped):
        body["tools"] = tools
        if choice := _tool_choice(request):
            body["tool_choice"] = choice
    config: _Json = {}
    if request.schema is not None:
        if not traits.takes_schema:
            raise Untranslatable(f"{model} takes no schema for its answer.", param="schema")
        config["format"] = {"type": "json_schema", "schema": closed_schema(request.schema, "schema")}
    _add_thinking(body, config, request, traits, talk, dropped)
    if config:
        body["output_config"] = config
    _add_sampling(body, request, traits, dropped)
    for name in ("seed", "presence_penalty", "frequency_penalty"):
        if getattr(request, name):
            dropped.add(name)
    return msgspec.json.encode(body), tuple(sorted(dropped))


def _stop(sequences: tuple[str, ...]) -> list[str]:
    for sequence in sequences:
        if not sequence.strip():
            raise Untranslatable("stop: Anthropic takes no stop sequence that is blank.", param="stop")
    return list(sequences)


# -- tools ------------------------------------------------------------------------------------------------------------


def _tools(request: Request, traits: Traits, talk: Conversation, dropped: set[str]) -> list[_Json]:
    if not request.tools:
        # a conversation with tool calls needs tools; the choice then forbids to call them
        return [{"name": name, "input_schema": tool_schema({}, "tools")} for name in talk.tools]
    return [_tool(tool, f"tools[{at}]", traits, dropped) for at, tool in enumerate(request.tools)]


def _tool(tool: Tool, path: str, traits: Traits, dropped: set[str]) -> _Json:
    encoded: _Json = {"name": tool.name, "input_schema": tool_schema(tool.schema, path)}
    if tool.description:
        encoded["description"] = tool.description
    if tool.strict:
        if traits.takes_schema:
            encoded |= {"strict": True, "input_schema": closed_schema(encoded["input_schema"], path)}
        else:
            dropped.add("strict")
    return encoded


def _tool_choice(request: Request) -> _Json:
    if not request.tools:
        return {"type": "none"}
    choice = request.tool_choice
    encoded: _Json = {"type": _CHOICES[choice.mode] if choice is not None else "auto"}
    if choice is not None and choice.mode == "tool":
        encoded["name"] = choice.name
    if request.parallel_tool_calls is False and encoded["type"] != "none":
        encoded["disable_parallel_tool_use"] = True
    return encoded if choice is not None or len(encoded) > 1 else {}


# -- thinking and sampling --------------------------------------------------------------------------------------------


def _add_thinking(
    body: _Json, config: _Json, request: Request, traits: Traits, talk: Conversation, dropped: set[str]
) -> None:
    effort = request.effort
    if effort is None:
        return
    if effort == "none":
        if traits.thinking_off is None:
            config["effort"] = "low"  # the least that it knows
        elif traits.thinking_off:
            body["thinking"] = {"type": traits.thinking_off}
        return
    if traits.thinking == "adaptive":
        body["thinking"] = {"type": "adaptive", "display": "summarized" if request.wants_reasoning else "omitted"}
        nearest = effort if effort in traits.efforts else _NEAREST[effort]
        config["effort"] = nearest
        return
    is_forced = request.tool_choice is not None and request.tool_choice.mode in ("required", "tool")
    if (
        traits.thinking == "none"
        or body["max_tokens"] < 2 * MIN_BUDGET
        or is_forced
        or talk.is_prefilled
        or talk.ends_in_results_without_thinking
    ):
        dropped.add("effort")
        return
    budget = min(BUDGETS[effort], body["max_tokens"] - MIN_BUDGET)
    body["thinking"] = {"type": "enabled", "budget_tokens": budget}


def _add_sampling(body: _Json, request: Request, traits: Traits, dropped: set[str]) -> None:
    thinks = body.get("thinking", {}).get("type") in ("adaptive", "enabled")
    for name in ("temperature", "top_p", "top_k"):
        value = getattr(request, name)
        if value is None:
            continue
        is_second = name == "top_p" and "temperature" in body and not traits.takes_both
        if thinks or not traits.takes_sampling or is_second:
            dropped.add(name)
        else:
            body[name] = min(value, 1) if name == "temperature" else value
