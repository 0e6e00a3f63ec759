"""The items of a conversation that the gateway keeps: those of the input, with ids, and those of earlier responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import msgspec

from trigate.dialects.openai_responses.sealed import PREFIX
from trigate.dialects.request_values import Json
from trigate.errors import BadRequest
from trigate.openai.raw_json import decode_any, decode_strictly, join_fields, split_fields
from trigate.openai.request import Call

_PREFIXES: Mapping[str, str] = {
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
}
_raw_list = msgspec.json.Decoder(list[msgspec.Raw])


def items_of(call: Call) -> list[Json]:
    """Returns the items of a call's input, in the form in which they can be listed: each has a type, a content is a
    list, and an item without an id gets one.

    Raises:
        BadRequest: The input is neither a text nor a list of objects.
    """
    assert call.identity is not None, "the gateway gives each response call an identity"
    raw = call.fields.get("input")
    try:
        value = decode_strictly(raw) if raw is not None else None
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"input cannot be decoded: {error}.", param="input") from None
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRequest("input must be a string or a list of items.", param="input")
    return [_listed(item, at, call.identity.id) for at, item in enumerate(value)]


def _listed(item: Json, at: int, response_id: str) -> Json:
    kind = item.get("type", "message" if "role" in item else None)
    if kind == "item_reference":
        return item
    prefix = _PREFIXES.get(kind, "item") if isinstance(kind, str) and kind != "message" else "msg"
    listed: Json = {"id": f"{prefix}_{response_id.removeprefix('resp_')}_in{at}", **item, "type": kind}
    if kind == "message":
        content = item.get("content")
        if isinstance(content, str):
            name = "output_text" if item.get("role") == "assistant" else "input_text"
            extra: Json = {"annotations": []} if name == "output_text" else {}
            listed["content"] = [{"type": name, "text": content, **extra}]
        listed.setdefault("status", "completed")
    return listed


def references_in(items: Sequence[Json]) -> list[str]:
    """Returns the ids of the items that are only referred to."""
    return [str(item.get("id")) for item in items if item.get("type") == "item_reference"]


def response_id_of(item_id: str) -> str | None:
    """Returns the id of the response that has an item, as the gateway makes ids; None = it is none of these.

    >>> response_id_of("msg_0abc_3"), response_id_of("msg_0abc_in3"), response_id_of("msg_0abc")
    ('resp_0abc', 'resp_0abc', None)
    """
    _, _, rest = item_id.partition("_")
    tail, separator, _ = rest.rpartition("_")
    return f"resp_{tail}" if separator and tail else None


def with_history(call: Call, earlier: Sequence[Json], find: Callable[[str], Json | None], items: list[Json]) -> Call:
    """Returns a call whose input has all items: those of the responses that it continues, and those that it refers to.

    Args:
        earlier: The items of the responses.
        find: Returns the item that an id refers to; None = it is not known.
    """
    resolved = [find(str(item.get("id"))) or item if item.get("type") == "item_reference" else item for item in items]
    fields = {name: value for name, value in call.fields.items() if name != "previous_response_id"}
    fields["input"] = msgspec.Raw(msgspec.json.encode([*earlier, *resolved]))
    return attrs.evolve(call, body=join_fields(fields), fields=fields, model_at=None)


def without_field(call: Call, name: str) -> Call:
    """Returns a call without a field."""
    fields = {each: value for each, value in call.fields.items() if each != name}
    return attrs.evolve(call, body=join_fields(fields), fields=fields, model_at=None)


def output_of(response: bytes) -> list[Json]:
    """Returns the items of a response's output."""
    value = decode_any(response)
    output = value.get("output") if isinstance(value, dict) else None
    return [item for item in output if isinstance(item, dict)] if isinstance(output, list) else []


def without_own_reasoning(body: bytes) -> bytes:
    """Returns a request without the reasoning that the gateway has sealed, for an upstream that seals its own: it would
    refuse what it cannot open. Every byte of a request without such reasoning stays as it is.

    >>> without_own_reasoning(b'{"input": "a",  "n": 1.0}')
    b'{"input": "a",  "n": 1.0}'
    """
    if PREFIX.encode() not in body:
        return body
    fields = split_fields(body)
    try:
        items = _raw_list.decode(fields["input"])
    except (KeyError, msgspec.DecodeError):
        return body
    kept = [bytes(item) for item in items if not _is_sealed(item)]
    return join_fields({**fields, "input": msgspec.Raw(b"[" + b",".join(kept) + b"]")})


def _is_sealed(item: msgspec.Raw) -> bool:
    if PREFIX.encode() not in bytes(item):
        return False
    value = decode_any(bytes(item))
    sealed = value.get("encrypted_content") if isinstance(value, dict) else None
    return isinstance(sealed, str) and sealed.startswith(PREFIX)
