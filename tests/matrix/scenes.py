"""What is said in each cell of the matrix, in a normal form that belongs to no format.

A *scene* is a request and what the provider answers. The writers of requests and of answers (`clients`, `providers`)
turn the normal form into the bytes of a format, and the readers turn bytes into the normal form. They are written from
the formats' references and share no code with the gateway.
"""

from __future__ import annotations

from typing import Any, Literal

import attrs

Json = dict[str, Any]
"""A JSON object. Any: JSON of any shape."""


@attrs.frozen
class Text:
    text: str


@attrs.frozen
class Image:
    media_type: str
    data: str


@attrs.frozen
class Reasoning:
    text: str


@attrs.frozen
class Call:
    """A tool call. An id that a format does not carry is empty."""

    id: str
    name: str
    arguments: Json


@attrs.frozen
class Result:
    call_id: str
    name: str
    text: str
    is_error: bool = False


Part = Text | Image | Reasoning | Call | Result


@attrs.frozen
class Turn:
    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


@attrs.frozen
class Tool:
    name: str
    description: str
    schema: Json


@attrs.frozen(kw_only=True)
class Ask:
    turns: tuple[Turn, ...] = (Turn("user", (Text("Hello"),)),)
    tools: tuple[Tool, ...] = ()
    max_tokens: int | None = 100
    temperature: float | None = None
    stop: tuple[str, ...] = ()
    effort: str | None = None
    schema: Json | None = None


@attrs.frozen(kw_only=True)
class Usage:
    """The four buckets are disjoint."""

    input: int = 30
    cache_read: int = 0
    cache_write: int = 0
    output: int = 12
    reasoning: int = 0


Finish = Literal["stop", "length", "tool_calls", "refusal"]


@attrs.frozen(kw_only=True)
class Reply:
    """What a provider answers, or what a client reads.

    Attributes:
        fails: How it ends instead of in order: an error in the stream, or a connection that breaks off.
    """

    parts: tuple[Part, ...] = (Text("Hel"),)
    finish: Finish | None = "stop"
    usage: Usage | None = Usage()
    fails: Literal["", "error", "cut"] = ""


@attrs.frozen
class Scene:
    name: str
    ask: Ask
    reply: Reply
    status: int = 200
    """That of the provider; another one than 200 comes with an error in the provider's shape."""
    only: Literal["", "stream", "plain"] = ""


WEATHER = Tool(
    "get_weather",
    "The weather of a city",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
TIME = Tool("get_time", "The time of a city", {"type": "object", "properties": {"city": {"type": "string"}}})
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SCHEMA: Json = {
    "type": "object",
    "properties": {"answer": {"type": "string"}},
    "required": ["answer"],
    "additionalProperties": False,
}
_BERLIN = Call("call_1", "get_weather", {"city": "Berlin"})
_PARIS = Call("call_2", "get_time", {"city": "Paris"})
_USER = Turn("user", (Text("Hello"),))

SCENES = (
    Scene(
        "text",
        Ask(turns=(Turn("system", (Text("Be brief."),)), _USER), temperature=0.5),
        Reply(parts=(Text("Hello, wörld 🙂"),)),
    ),
    Scene("tools", Ask(tools=(WEATHER,)), Reply(parts=(Text("Let me see."), _BERLIN), finish="tool_calls")),
    Scene("parallel tools", Ask(tools=(WEATHER, TIME)), Reply(parts=(_BERLIN, _PARIS), finish="tool_calls")),
    Scene(
        "tool results",
        Ask(
            turns=(
                _USER,
                Turn("assistant", (_BERLIN, _PARIS)),
                Turn(
                    "user",
                    (
                        Result("call_1", "get_weather", "sunny"),
                        Result("call_2", "get_time", "no such city", is_error=True),
                    ),
                ),
            ),
            tools=(WEATHER, TIME),
        ),
        Reply(parts=(Text("Sunny."),)),
    ),
    Scene(
        "images",
        Ask(turns=(Turn("user", (Text("What is it?"), Image("image/png", PIXEL))),)),
        Reply(parts=(Text("A pixel."),)),
    ),
    Scene(
        "reasoning",
        Ask(effort="high", max_tokens=30_000),
        Reply(parts=(Reasoning("Let me think."), Text("42")), usage=Usage(output=20, reasoning=8)),
    ),
    Scene("structured output", Ask(schema=SCHEMA), Reply(parts=(Text('{"answer":"42"}'),))),
    Scene("stop", Ask(stop=("END",)), Reply(parts=(Text("Until "),))),
    Scene("length", Ask(max_tokens=3), Reply(parts=(Text("One two"),), finish="length")),
    Scene("refusal", Ask(), Reply(parts=(Text("I cannot"),), finish="refusal")),
    Scene("cache", Ask(), Reply(usage=Usage(input=30, cache_read=60, cache_write=10, output=12))),
    Scene("error before", Ask(), Reply(), status=503),
    Scene("too long", Ask(), Reply(), status=400),
    Scene("error in the stream", Ask(), Reply(finish=None, usage=None, fails="error"), only="stream"),
    Scene("cut", Ask(), Reply(finish=None, usage=None, fails="cut"), only="stream"),
)
