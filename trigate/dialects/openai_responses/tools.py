"""Decodes the tools of a request, and remembers how the client calls each of them.

A provider of another format has functions only. A *custom* tool, whose input is any text, becomes a function with one
argument, ``input``. The tools of a *namespace* become functions whose names have that of the namespace before them.
`OwnTool` is the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import attrs

from trigate.dialects.openai_responses.fields import TOOLS
from trigate.dialects.request_values import Json, a_list, a_string, a_string_or_none, shown
from trigate.dialects.vocabulary import Tool, ToolChoice
from trigate.errors import BadRequest, Untranslatable
from trigate.openai.raw_json import decode_any

SEPARATOR = "__"
"""Between the name of a namespace and that of its tool."""

_INPUT_SCHEMA = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
_NO_ARGUMENTS = {"type": "object", "properties": {}}


@attrs.frozen
class OwnTool:
    """A tool as the client knows it. ``namespace``: None = it is in none."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None = None


@attrs.frozen
class Tools:
    """The tools of one request: as functions, and how the client knows each, by the name of its function."""

    functions: tuple[Tool, ...]
    own: Mapping[str, OwnTool]


def decode_tools(value: Json, dropped: set[str]) -> Tools:
    """Decodes the field ``tools``.

    Args:
        value: The fields of the request.
        dropped: Takes the names of what is dropped.

    Raises:
        BadRequest: A tool is malformed, or two have the same name.
        Untranslatable: A tool runs at OpenAI.
    """
    decoder = _ToolDecoder(dropped)
    decoder.take(a_list(value, "tools"), "tools", None)
    return Tools(tuple(decoder.functions), decoder.own)


class _ToolDecoder:
    def __init__(self, dropped: set[str]) -> None:
        self._dropped = dropped
        self.functions: list[Tool] = []
        self.own: dict[str, OwnTool] = {}

    def take(self, tools: list[Any], path: str, namespace: str | None) -> None:  # Any: JSON of any shape
        for at, tool in enumerate(tools):
            here = f"{path}[{at}]"
            if not isinstance(tool, dict):
                raise BadRequest(f"{here} must be an object.", param=here)
            kind = tool.get("type")
            if kind == "namespace" and namespace is None:
                self.take(a_list(tool, "tools", here), f"{here}.tools", a_string(tool, "name", here))
            elif kind == "function":
                schema = tool.get("parameters")
                if schema is not None and not isinstance(schema, dict):
                    raise BadRequest(f"{here}.parameters must be an object.", param=f"{here}.parameters")
                self._add(tool, here, namespace, "function", schema or _NO_ARGUMENTS)
            elif kind == "custom":
                self._add(tool, here, namespace, "custom", _INPUT_SCHEMA)
            elif is_search_by_default(tool):
                self._dropped.add("tools.web_search")
            else:
                raise Untranslatable(
                    f"{here}: the tool {shown(kind)} runs at OpenAI. The upstream cannot run it; "
                    f"it takes tools of the types {', '.join(TOOLS)}.",
                    param=here,
                )

    def _add(
        self, tool: Json, path: str, namespace: str | None, kind: Literal["function", "custom"], schema: Json
    ) -> None:
        name = a_string(tool, "name", path)
        if not name:
            raise BadRequest(f"{path}.name must not be empty.", param=f"{path}.name")
        description = a_string_or_none(tool, "description", path)
        if kind == "custom":
            description = _with_grammar(description, tool.get("format"))
        full = name if namespace is None else f"{namespace}{SEPARATOR}{name}"
        if full in self.own:
            raise BadRequest(f"{path}: two tools have the name {full[:200]!r}.", param=path)
        strict = tool.get("strict")
        self.functions.append(Tool(full, description, schema, strict if isinstance(strict, bool) else None))
        self.own[full] = OwnTool(kind, name, namespace)


def is_search_by_default(tool: Json) -> bool:
    """Whether a tool is the web search that an agent sends with every call (Codex), and not one that a user wants."""
    return tool.get("type") == "web_search" and "external_web_access" in tool


def _with_grammar(description: str | None, form: object) -> str | None:
    """Adds the grammar of a custom tool's input to its description: a function has no place for it."""
    definition = form.get("definition") if isinstance(form, dict) else None
    if not isinstance(form, dict) or not isinstance(definition, str):
        return description
    syntax = shown(form.get("syntax"))
    grammar = f"The value of `input` has to match this grammar ({syntax}):\n{definition}"
    return f"{description}\n\n{grammar}" if description else grammar


def decode_tool_choice(value: object, tools: Tools) -> tuple[ToolChoice | None, tuple[Tool, ...]]:
    """Decodes the field ``tool_choice``.

    Returns:
        The choice, and the functions that it leaves.

    Raises:
        BadRequest: It is malformed.
        Untranslatable: It needs a tool that the upstream cannot call.
    """
    if value is None:
        return None, tools.functions
    if value in ("auto", "none", "required"):
        return _checked(ToolChoice(cast("Any", value)), tools.functions)  # Any: a literal of `ToolChoice`
    if not isinstance(value, dict):
        raise BadRequest("tool_choice must be auto, none, required or an object.", param="tool_choice")
    if value.get("type") == "allowed_tools":
        mode = value.get("mode", "auto")
        if mode not in ("auto", "required"):
            raise BadRequest("tool_choice.mode must be auto or required.", param="tool_choice.mode")
        names = {_function_of(each, tools) for each in a_list(value, "tools", "tool_choice")}
        left = tuple(each for each in tools.functions if each.name in names)
        return _checked(ToolChoice(mode), left)
    return ToolChoice("tool", _function_of(value, tools)), tools.functions


def _checked(choice: ToolChoice, left: tuple[Tool, ...]) -> tuple[ToolChoice, tuple[Tool, ...]]:
    if choice.mode == "required" and not left:
        raise Untranslatable("tool_choice requires a tool, and the upstream can call none.", param="tool_choice")
    return choice, left


def _function_of(chosen: object, tools: Tools) -> str:
    """Returns the name of the function that a choice names."""
    if isinstance(chosen, dict) and chosen.get("type") in ("function", "custom"):
        name, namespace = chosen.get("name"), chosen.get("namespace")
        for full, own in tools.own.items():
            if own.name == name and namespace in (None, own.namespace):
                return full
        if isinstance(name, str) and name in tools.own:
            return name
    kind = shown(chosen.get("type")) if isinstance(chosen, dict) else "other"
    named = shown(chosen.get("name")) if isinstance(chosen, dict) else "other"
    raise Untranslatable(
        f"tool_choice: the upstream can call no tool of the type {kind} with the name {named}.", param="tool_choice"
    )


def own_input(arguments: str) -> str:
    """Returns the input of a custom tool from the arguments of its function. Models now and then give another argument
    or none at all: one text is then the input, and otherwise the arguments as they are.

    >>> own_input('{"input": "*** Begin Patch"}'), own_input('{"patch": "x"}'), own_input("{}"), own_input('{"a":1}')
    ('*** Begin Patch', 'x', '', '{"a":1}')
    """
    value = decode_any(arguments.encode())
    if isinstance(value, dict):
        if isinstance(found := value.get("input"), str):
            return found
        if not value:
            return ""
        if len(value) == 1 and isinstance(found := next(iter(value.values())), str):
            return found
    return arguments
