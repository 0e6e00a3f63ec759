"""The ``response`` object: its fields, the items of its output, its token counts.

Every field that OpenAI's API reference requires is there; the fields of the request are repeated as the client sent
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import msgspec

from trigate.dialects.formats import Asked
from trigate.dialects.openai_responses.request import SEALED
from trigate.dialects.openai_responses.sealed import seal
from trigate.dialects.openai_responses.tools import OwnTool, decode_tools, own_input
from trigate.dialects.request_values import Json
from trigate.dialects.vocabulary import Answer, Finish, Reasoning, TokenCounts, ToolCall
from trigate.errors import ProtocolViolation
from trigate.openai.raw_json import decode_any
from trigate.openai.request import Call

_NULL = msgspec.Raw(b"null")
_ECHOED: Mapping[str, bytes] = {
    "instructions": b"null",
    "max_output_tokens": b"null",
    "max_tool_calls": b"null",
    "parallel_tool_calls": b"true",
    "prompt_cache_key": b"null",
    "reasoning": b'{"effort":null,"summary":null}',
    "safety_identifier": b"null",
    "store": b"true",
    "temperature": b"null",
    "text": b'{"format":{"type":"text"}}',
    "tool_choice": b'"auto"',
    "tools": b"[]",
    "top_logprobs": b"0",
    "top_p": b"null",
    "truncation": b'"disabled"',
    "user": b"null",
    "metadata": b"{}",
}
"""The fields of a request that a response repeats, with what they are if the client leaves them out."""

INCOMPLETE: Mapping[str, str] = {
    "length": "max_output_tokens",
    "context_length": "max_output_tokens",
    "refusal": "content_filter",
}
"""Why a response is incomplete, by the reason of the end. Any other end is that of a complete one."""


@attrs.frozen(kw_only=True)
class Context:
    """What encoders have to know of a call.

    Attributes:
        response_id: Of the answer.
        own_tools: How the client knows its tools.
        seals: The client asked for sealed reasoning.
        has_summary: The client asked for a summary of the reasoning, and gets the reasoning as one.
    """

    asked: Asked
    response_id: str
    created_at: int
    own_tools: Mapping[str, OwnTool]
    seals: bool
    has_summary: bool

    def item_id(self, prefix: str, index: int) -> str:
        """Returns the id of an item of the output: it has that of the response in it."""
        return f"{prefix}_{self.response_id.removeprefix('resp_')}_{index}"

    def head(self, status: str) -> Json:
        """Returns a response without output, whose end is not known yet."""
        return response_head(self.asked.call, status, response_id=self.response_id, created_at=self.created_at)

    def end(self, finish: Finish, output: list[Json], size_bytes: int) -> Json:
        """Returns a response that has ended.

        Args:
            size_bytes: Of the answer: the token counts are estimated from it, if the provider has not counted.
        """
        reason = INCOMPLETE.get(finish.reason)
        response = self.head("completed" if reason is None else "incomplete")
        if reason is not None:
            response["incomplete_details"] = {"reason": reason}
        counts = finish.usage if finish.usage is not None else self.asked.estimate(size_bytes)
        response |= {"output": output, "usage": encode_usage(counts)}
        return response

    # -- items --------------------------------------------------------------------------------------------------------

    def own_tool(self, name: str) -> OwnTool:
        """Returns the tool that a function stands for.

        Raises:
            ProtocolViolation: The client has no such tool, and could not run it.
        """
        own = self.own_tools.get(name)
        if own is None:
            raise ProtocolViolation(f"The model called the tool {name[:100]!r}, which the request does not have.")
        return own

    def message_item(self, index: int, text: str, status: str) -> Json:
        """Returns a message of the output."""
        return {
            "id": self.item_id("msg", index),
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [text_part(text)],
        }

    def reasoning_item(self, index: int, reasoning: Reasoning, status: str) -> Json:
        """Returns a reasoning item of the output."""
        item: Json = {"id": self.item_id("rs", index), "type": "reasoning", "summary": [], "status": status}
        if reasoning.text and self.has_summary:
            item["summary"] = [{"type": "summary_text", "text": reasoning.text}]
        elif reasoning.text:
            item["content"] = [{"type": "reasoning_text", "text": reasoning.text}]
        if self.seals:
            item["encrypted_content"] = seal(reasoning)
        return item

    def call_item(self, index: int, call: ToolCall, status: str) -> Json:
        """Returns a tool call of the output. Raises as `own_tool`."""
        own = self.own_tool(call.name)
        item: Json
        if own.kind == "custom":
            item = {"id": self.item_id("ctc", index), "type": "custom_tool_call", "status": status}
            item |= {"call_id": call.id, "name": own.name, "input": own_input(call.arguments) if call.arguments else ""}
        else:
            item = {"id": self.item_id("fc", index), "type": "function_call", "status": status}
            item |= {"call_id": call.id, "name": own.name, "arguments": call.arguments}
        if own.namespace is not None:
            item["namespace"] = own.namespace
        return item


def response_head(call: Call, status: str, *, response_id: str, created_at: int) -> Json:
    """Returns a response without output, whose end is not known yet."""
    identity = call.identity
    response: Json = {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "status": status,
        "background": identity.is_background if identity is not None else False,
        "error": None,
        "incomplete_details": None,
        "model": call.model,
        "output": [],
        "previous_response_id": identity.previous_id if identity is not None else None,
        "usage": None,
    }
    for name, default in _ECHOED.items():
        raw = call.fields.get(name, _NULL)
        response[name] = msgspec.Raw(default) if bytes(memoryview(raw)[:5]) == b"null" else raw
    return response


def context_of(asked: Asked, answer_id: str) -> Context:
    """Makes the context of an answer.

    Args:
        answer_id: The provider's id of it, which counts if the gateway has given it none.
    """
    call = asked.call
    identity = call.identity
    include = _decoded(asked, "include")
    reasoning = _decoded(asked, "reasoning")
    return Context(
        asked=asked,
        response_id=identity.id if identity is not None else f"resp_{answer_id}",
        created_at=identity.created_at if identity is not None else int(asked.at),
        own_tools=decode_tools({"tools": _decoded(asked, "tools")}, set()).own,
        seals=isinstance(include, list) and SEALED in include,
        has_summary=isinstance(reasoning, dict) and bool(reasoning.get("summary")),
    )


def _decoded(asked: Asked, name: str) -> Any:  # Any: JSON of any shape
    raw = asked.call.fields.get(name)
    return None if raw is None else decode_any(bytes(raw))


def text_part(text: str) -> Json:
    """Returns a text as the content of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def encode_usage(counts: TokenCounts) -> Json:
    """Returns the value of ``usage``: as everywhere in OpenAI's formats, the input includes the tokens of the cache.

    >>> encode_usage(TokenCounts(input=3, cache_read=4, output=5))["input_tokens"]
    7
    """
    tokens = counts.input + counts.cache_read + counts.cache_write
    return {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": counts.cache_read, "cache_write_tokens": counts.cache_write},
        "output_tokens": counts.output,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning or 0},
        "total_tokens": tokens + counts.output,
    }


def encode_answer(answer: Answer, asked: Asked) -> bytes:
    """Encodes an answer that is not streamed.

    Raises:
        ProtocolViolation: The model called a tool that the client does not have.
    """
    context = context_of(asked, answer.id)
    is_cut = answer.finish.reason in INCOMPLETE
    output: list[Json] = []
    size_bytes = 0
    for index, part in enumerate(answer.parts):
        status = "incomplete" if is_cut and index == len(answer.parts) - 1 else "completed"
        if isinstance(part, ToolCall):
            output.append(context.call_item(index, part, status))
            size_bytes += len(part.name) + len(part.arguments.encode())
        elif isinstance(part, Reasoning):
            output.append(context.reasoning_item(index, part, status))
            size_bytes += len(part.text.encode())
        else:
            output.append(context.message_item(index, part.text, status))
            size_bytes += len(part.text.encode())
    return msgspec.json.encode(context.end(answer.finish, output, size_bytes))
