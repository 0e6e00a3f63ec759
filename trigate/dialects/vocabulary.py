"""What all formats say: messages of typed parts, answers, and the events of a streamed answer.

A value is immutable. Its fields mean the same whatever format they came from; what only one format knows is an opaque
payload, or is refused or dropped by the decoder of that format.

The events of one answer come in this order::

    Start  (PartStart  delta*  PartStop)*  Finish

The parts never overlap, also where a format interleaves them: a decoder holds back what belongs to a later part. Token
counts are in four *disjoint* buckets, since the formats disagree about which count includes which other one.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

# -- the parts of messages and answers --------------------------------------------------------------------------------


class Text(msgspec.Struct, frozen=True):
    """A text."""

    text: str


class Image(msgspec.Struct, frozen=True):
    """A picture.

    Attributes:
        url: Its URL, which may be a data URL with the picture itself.
        detail: How closely the model should look (``low``, ``high``, ``auto``); advisory.
    """

    url: str
    detail: str | None = None


class Audio(msgspec.Struct, frozen=True):
    """A sound.

    Attributes:
        data: In base64.
        format: As file names have it (``wav``).
    """

    data: str
    format: str


class File(msgspec.Struct, frozen=True):
    """A document that is not text.

    Attributes:
        url: A data URL with the document itself, or the URL where it is.
    """

    name: str
    url: str


class ToolCall(msgspec.Struct, frozen=True):
    """The model calls a tool.

    Attributes:
        id: Unique within the conversation; the result names it.
        arguments: A JSON object, as text.
        payloads: As those of `Reasoning`.
    """

    id: str
    name: str
    arguments: str
    payloads: dict[str, str] = {}


class ToolResult(msgspec.Struct, frozen=True):
    """The result of a call.

    Attributes:
        path: Where the request has it, for messages about it.
        is_error: The tool failed; the parts say how.
    """

    call_id: str
    parts: tuple[Text | Image | File, ...]
    is_error: bool = False
    path: str = ""


class Reasoning(msgspec.Struct, frozen=True):
    """What the model thought before it answered.

    Attributes:
        text: Empty if the provider keeps it to itself.
        payloads: What the provider of a format needs to recognise it, by the format's name (``anthropic``: a
            signature; ``anthropic_redacted``: reasoning that is encrypted, without a text). Another provider refuses
            it. ``trigate``: the mark of a gateway (`marks`), which is checked and taken off before a request is
            encoded.
    """

    text: str
    payloads: dict[str, str] = {}


Part = Text | Image | Audio | File | ToolCall | ToolResult | Reasoning
AnswerPart = Text | ToolCall | Reasoning


class Message(msgspec.Struct, frozen=True):
    """A message of a conversation.

    Attributes:
        role: ``system`` may occur anywhere in a conversation. The results of tools are parts of a ``user`` message.
    """

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


def as_user_text(system: str) -> str:
    """Returns what a system message becomes within a message of the user, where a format has no other place for it."""
    return f"<system-message>\n{system}\n</system-message>"


# -- a request --------------------------------------------------------------------------------------------------------

Schema = dict[str, Any]
"""A JSON schema. Any: JSON of any shape, which is sent on as it came."""
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call. ``strict``: its arguments have to match the schema exactly."""

    name: str
    description: str | None
    schema: Schema
    strict: bool | None = None


class ToolChoice(msgspec.Struct, frozen=True):
    """Whether the model calls tools: as it likes, at least one, none, or the one of this ``name``."""

    mode: Literal["auto", "required", "none", "tool"]
    name: str = ""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request for one answer. None = the client leaves it to the model.

    Attributes:
        model_max_tokens: The most tokens that the upstream's model can give, where it is known: for a format that
            requires ``max_tokens``.
        effort: How much the model should think; ``none`` = not at all.
        wants_reasoning: Whether the client takes reasoning as a part of the answer.
        schema: The answer has to be JSON that matches it.
        schema_name: How the client calls the schema.
        schema_strict: Whether the match has to be exact.
        is_json: The answer has to be JSON, of any shape.
        user: Tells one user of the client from another; not a name that a provider should see.
        cache: The client wants the beginning of the conversation cached, for the calls that follow.
    """

    messages: tuple[Message, ...]
    max_tokens: int | None = None
    model_max_tokens: int | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    effort: Effort | None = None
    wants_reasoning: bool = False
    schema: Schema | None = None
    schema_name: str | None = None
    schema_strict: bool | None = None
    is_json: bool = False
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: str | None = None
    cache: bool = False


# -- an answer --------------------------------------------------------------------------------------------------------

FinishReason = Literal["stop", "stop_sequence", "length", "tool_calls", "refusal", "context_length"]
"""Why an answer ended. ``length``: it has as many tokens as allowed; ``context_length``: as fit into the model."""


class TokenCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts. The first four are disjoint: their sum is what was processed.

    Attributes:
        input: Tokens of the request that were neither read from a cache nor written to one.
        reasoning: How many of ``output`` are reasoning; None = unknown.
    """

    input: int
    cache_read: int = 0
    cache_write: int = 0
    output: int
    reasoning: int | None = None


class Finish(msgspec.Struct, frozen=True):
    """The end of an answer; the last event of a stream.

    Attributes:
        stop_sequence: With the reason ``stop_sequence``: which one.
        usage: None = the provider did not say.
    """

    reason: FinishReason
    stop_sequence: str | None
    usage: TokenCounts | None


class Answer(msgspec.Struct, frozen=True):
    """A whole answer. ``id`` is the provider's, or made from its answer."""

    id: str
    parts: tuple[AnswerPart, ...]
    finish: Finish


# -- the events of a streamed answer ----------------------------------------------------------------------------------


class Start(msgspec.Struct, frozen=True):
    """The answer begins."""

    id: str


class TextStart(msgspec.Struct, frozen=True):
    """A text begins."""


class ReasoningStart(msgspec.Struct, frozen=True):
    """Reasoning begins."""


class ToolCallStart(msgspec.Struct, frozen=True):
    """A call begins; its id and name are final."""

    id: str
    name: str


class TextDelta(msgspec.Struct, frozen=True):
    """A piece of the text that is open; never empty."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True):
    """A piece of the reasoning that is open; never empty."""

    text: str


class ArgumentsDelta(msgspec.Struct, frozen=True):
    """A piece of the arguments of the call that is open; never empty. A call without any has the arguments ``{}``."""

    text: str


class Payload(msgspec.Struct, frozen=True):
    """An opaque payload of the reasoning or of the tool call that is open: an entry of its ``payloads``."""

    format: str
    value: str


class PartStop(msgspec.Struct, frozen=True):
    """The part that is open is complete."""


Delta = TextDelta | ReasoningDelta | ArgumentsDelta
Event = Start | TextStart | ReasoningStart | ToolCallStart | Delta | Payload | PartStop | Finish
