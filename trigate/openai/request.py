"""A client's request, validated as far as the gateway acts on it.

A request is forwarded as it came: its body is split into its top-level fields (`trigate.openai.raw_json`), and joined
again with another ``model``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import attrs
import msgspec

from trigate.errors import BadRequest, UnknownModel
from trigate.openai.endpoints import Endpoint
from trigate.openai.history_fields import with_history_fields
from trigate.openai.raw_json import (
    decode_any,
    decode_strictly,
    find_model,
    join_fields,
    problem_of,
    split_client_fields,
    with_model,
)
from trigate.openai.request_bounds import examine

# The model id is in the log, in /status and in every event of a stream. Some servers use a path as the id.
_MAX_MODEL_CHARS = 4096
_DEFAULT = "default"


class _Message(msgspec.Struct):
    role: str


_messages_decoder = msgspec.json.Decoder(list[_Message])
_raw_messages_decoder = msgspec.json.Decoder(list[msgspec.Raw])


@attrs.frozen
class InPath:
    """What the path of a request says of a call.

    Attributes:
        in_body: The format has the model in the body as well, where that of the path replaces it.
    """

    model: str | None = None
    stream: bool | None = None
    in_body: bool = False


NOTHING = InPath()


@attrs.frozen(kw_only=True)
class Identity:
    """What the gateway itself says of its answer to a response call, which a provider of another format does not.

    Attributes:
        id: Of the answer.
        created_at: When the call arrived, in seconds since 1970.
        previous_id: Of the response that it continues.
        is_background: It is served without its client.
    """

    id: str
    created_at: int
    previous_id: str | None = None
    is_background: bool = False


@attrs.frozen(kw_only=True)
class Call:
    """A client's request, validated as far as the gateway acts on it.

    Attributes:
        model: The id that the client asked for; the answer has the same. ``default``, if the client named none.
        names_model: Whether the client named a model.
        stream: Whether the client asks for server-sent events.
        body: The body as it was received, except for what `raw_json.split_client_fields` replaces.
        fields: The body's top-level fields, each as it is in the body.
        model_at: Where the model id is in the body (`raw_json.find_model`); None = it has not been searched for.
        remembered: The positions of the messages that a session put into the call; None = there is no session.
        identity: What its answer says of itself, if the gateway makes it; None = it is no response call.
    """

    endpoint: Endpoint
    model: str
    names_model: bool = True
    stream: bool
    body: bytes = attrs.field(repr=False)
    fields: Mapping[str, msgspec.Raw] = attrs.field(repr=lambda fields: repr(sorted(fields)))
    remembered: range | None = None
    model_at: int | None = attrs.field(default=None, repr=False, eq=False)
    identity: Identity | None = attrs.field(default=None, eq=False)

    @property
    def public_model(self) -> str | None:
        """The model id of the answer; None = the upstream's own, as the client named none."""
        return self.model if self.names_model else None

    def body_for(self, model: str) -> bytes:
        """The body to send upstream: this call's, with the upstream's own model id, if the client named a model."""
        if not self.names_model:
            return self.body
        return with_model(self.body, self.fields, msgspec.json.encode(model), model_at=self.model_at)

    @property
    def choices(self) -> int:
        """How many answers the call asks for: ``n``, times the number of its prompts."""
        n = decode_any(bytes(self.fields["n"])) if "n" in self.fields else 1
        prompts = 1
        if "prompt" in self.endpoint.required and bytes(memoryview(self.fields["prompt"])[:1]) == b"[":
            found = decode_any(bytes(self.fields["prompt"]))
            if found and not isinstance(found[0], int):  # numbers are the tokens of a single prompt
                prompts = len(found)
        return (n if type(n) is int and n > 1 else 1) * prompts

    @property
    def speech_characters(self) -> int:
        """How many characters the text has that is to be read out; 0 = the call is for something else."""
        if self.endpoint.path != "/audio/speech":
            return 0
        text = decode_any(bytes(self.fields["input"]))
        return len(text) if isinstance(text, str) else 0

    def continued_from(self, text: str) -> Call:
        """The call with the beginning of the answer as its last message, for an upstream that continues it."""
        messages = [bytes(message) for message in _raw_messages_decoder.decode(self.fields["messages"])]
        return self.with_messages([*messages, msgspec.json.encode({"role": "assistant", "content": text})])

    def with_history_fields(self, fields: Collection[str]) -> Call:
        """The call whose remembered messages have only the fields that a provider takes back (`history_fields`)."""
        messages = [bytes(message) for message in _raw_messages_decoder.decode(self.fields["messages"])]
        for at in self.remembered or ():
            messages[at] = with_history_fields(messages[at], fields)
        return self.with_messages(messages)

    def with_messages(self, messages: Iterable[bytes]) -> Call:
        """The call with other messages, each a JSON object; every other field stays as it was received."""
        fields = {**self.fields, "messages": msgspec.Raw(b"[" + b",".join(messages) + b"]")}
        return attrs.evolve(self, body=join_fields(fields), fields=fields, model_at=None)


def decode_large_call(endpoint: Endpoint, body: bytes, in_path: InPath) -> Call:
    """Decodes a request body that is not small (`request_bounds.is_small`), in a thread.

    Raises:
        BadRequest: The body exceeds a bound; or as `decode_call`.
        UnknownModel: As `decode_call`.
    """
    examine(body, has_messages="messages" in endpoint.required or endpoint.format == "ollama")
    call = decode_call(endpoint, body, in_path, is_text=True)
    if not call.names_model or "model" not in call.fields:
        return call
    return attrs.evolve(call, model_at=find_model(call.body, bytes(call.fields["model"])))  # searching it takes long


def decode_call(endpoint: Endpoint, body: bytes, in_path: InPath = NOTHING, *, is_text: bool = False) -> Call:
    """Decodes a request body.

    Args:
        in_path: What the path says, which then counts.
        is_text: It is known to be UTF-8.

    Raises:
        BadRequest: The body cannot be served; ``param`` names the invalid field.
        UnknownModel: The model id is longer than any known one.
    """
    if not body.strip():
        raise BadRequest("The body is empty; expected a JSON object.")
    try:
        body, fields = split_client_fields(body, is_text=is_text)
    except msgspec.ValidationError as error:
        raise BadRequest(f"The body must be a JSON object: {error}.") from None
    except msgspec.DecodeError as error:
        raise BadRequest(f"The body is not JSON: {problem_of(error, body)}.") from None
    except RecursionError:
        raise BadRequest("The body is nested too deeply.") from None
    if in_path.in_body:
        fields = {**fields, "model": msgspec.Raw(msgspec.json.encode(in_path.model))}
        body = join_fields(fields)
    model = in_path.model or _decoded(fields, "model")
    names_model = model is not None and (in_path.model is None or in_path.in_body)
    if model is None:
        if not endpoint.model_optional:
            raise BadRequest("You must provide a model.", param="model")
        model = _DEFAULT
    if not isinstance(model, str) or not model:
        raise BadRequest("model must be a non-empty string.", param="model")
    if len(model) > _MAX_MODEL_CHARS:
        raise UnknownModel(model, reason=f"No model id has more than {_MAX_MODEL_CHARS} characters.")
    stream = _decoded(fields, "stream")
    if stream is not None and not isinstance(stream, bool):
        raise BadRequest("stream must be true or false.", param="stream")
    if stream is None:
        stream = endpoint.streams_by_default
    if in_path.stream is not None:
        stream = in_path.stream
    for name in endpoint.required:
        if name not in fields or (bytes(memoryview(fields[name])[:5]) == b"null" and name not in endpoint.nullable):
            raise BadRequest(f"You must provide {name}.", param=name)
    if "messages" in endpoint.required:
        _check_messages(fields["messages"])
    options = _decoded(fields, "stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadRequest("stream_options must be an object.", param="stream_options")
    # audio/speech asks for events with `stream_format: "sse"`
    events = bool(stream) or (endpoint.answer == "bytes" and _decoded(fields, "stream_format") == "sse")
    return Call(endpoint=endpoint, model=model, names_model=names_model, stream=events, body=body, fields=fields)


def _decoded(fields: Mapping[str, msgspec.Raw], name: str) -> Any:  # Any: JSON of any shape, checked by the caller
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return decode_strictly(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"{name} cannot be decoded: {error}.", param=name) from None


def _check_messages(raw: msgspec.Raw) -> None:
    try:
        messages = _messages_decoder.decode(raw)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        param = "messages" + where.rstrip("`")
        raise BadRequest(f"{param}: {what}.", param=param) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"messages cannot be decoded: {error}.", param="messages") from None
    if not messages:
        raise BadRequest("messages must hold at least one message.", param="messages")
