"""Requests that are passed through to one upstream: files, batches, transcriptions and so on (`openai.passed_paths`).

Each is an exchange, like a call. This module finds out where it goes: from the objects that it names (`objects`), from
the header ``x-trigate-upstream``, or from the model that it names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlencode

import attrs
import msgspec
import trio

from trigate.asgi import responses
from trigate.asgi.data_plane import read_body, wait_disconnected, watch_client
from trigate.asgi.objects import Objects
from trigate.asgi.request import RequestHead
from trigate.asgi.request_body import RequestBody
from trigate.asgi.upload import Upload
from trigate.errors import BadRequest, Draining, MethodNotAllowed, UnsupportedMediaType
from trigate.exchange.answers import JSON_HEADERS
from trigate.exchange.client_response import ClientResponse
from trigate.exchange.exchange import Exchange
from trigate.exchange.request import ExchangeRequest, PassThrough
from trigate.gateway.gateway import Gateway
from trigate.keys.key import Key
from trigate.openai.answer import Usage, find_usage, with_duration, with_images
from trigate.openai.multipart import boundary_of
from trigate.openai.passed_paths import Passed, objects_in
from trigate.openai.raw_json import decode_any, decode_client, problem_of, split_client_fields, with_model
from trigate.openai.request import Call

_FORM = b"multipart/form-data"
_MAX_MODEL_CHARS = 4096
_MAX_OBJECTS = 5000
_PARSED_BYTES = 1024 * 1024
"""A larger JSON body is parsed in a thread."""


@attrs.frozen(kw_only=True)
class _Read:
    """What is known of a request before it goes on.

    Attributes:
        body: Its JSON, or nothing.
        upload: Its form; None = it has none.
        fields: Of its JSON.
        query: Of its URL.
        model: The model that it names; None = it names none.
        objects: Texts in its JSON that may be ids of objects.
    """

    body: bytes = b""
    upload: Upload | None = None
    fields: Mapping[str, msgspec.Raw] = attrs.field(factory=dict)
    query: bytes
    model: str | None = None
    stream: bool = False
    objects: tuple[str, ...] = ()

    def body_for(self, model: str) -> bytes | Upload:
        """The body for an upstream's own model id."""
        if self.upload is not None:
            return self.upload.with_model(model)
        if model and "model" in self.fields and self.model is not None:
            return with_model(self.body, self.fields, msgspec.json.encode(model))
        return self.body

    def path_for(self, path: str, model: str) -> str:
        """The path for an upstream's own model id, with its query."""
        return path_with(path, self.query, model)


def path_with(path: str, query: bytes, model: str) -> str:
    """Returns a path with its query, and with an upstream's own id in place of a model in it.

    A key in the query is left out: clients of Google's put that of the gateway there.

    >>> path_with("/realtime", b"model=a&x=b%20c&key=k", "d/e"), path_with("/files", b"limit=2", "")
    ('/realtime?model=d%2Fe&x=b+c', '/files?limit=2')
    """
    text = query.decode("ascii")
    pairs = query_pairs(query)
    names = {name for name, _ in pairs}
    if "key" in names or (model and "model" in names):
        kept = [(name, model if model and name == "model" else value) for name, value in pairs if name != "key"]
        text = urlencode(kept)
    return f"{path}?{text}" if text else path


async def serve_passed(
    gateway: Gateway,
    passed: Passed,
    head: RequestHead,
    request_body: RequestBody,
    response: ClientResponse,
    *,
    query: bytes,
    request_id: str,
    key: Key,
) -> None:
    """Passes one request through, in a nursery that ends when the client disconnects.

    Raises:
        GatewayError: It was refused before its exchange began.
    """
    arrived_at = trio.current_time()
    if passed.method not in passed.found.methods:
        raise MethodNotAllowed(passed.method, head.path, allowed=passed.found.methods)
    generation, endpoint = gateway.generations.current, passed.found.endpoint
    generation.passed_route(endpoint.path)  # does any upstream serve it? Asked first, since the body may be large
    timeout_s, sdk_timeout_s = head.timeout_s(), head.sdk_timeout_s()
    read = await _read(gateway, passed, head, request_body, response, query)
    if read is None:
        return
    if endpoint.path == "/responses/input_tokens":
        counted = responses.counted(gateway, read.model, read.body)
        if counted is not None:
            await response.respond(200, JSON_HEADERS, counted)
            return
    objects = Objects.of(gateway.store, key)
    upstream = await objects.upstream_of(passed.object_id, read.objects, asked=asked_upstream(head))
    is_new = passed.method == "POST" and passed.object_id is None
    route = generation.passed_route(endpoint.path, model=read.model, upstream=upstream, is_new=is_new)
    exchange = Exchange(
        request=ExchangeRequest(
            id=request_id,
            call=Call(
                endpoint=endpoint,
                model=read.model or "",
                names_model=read.model is not None,
                stream=read.stream and passed.found.streams,
                body=b"",
                fields={},
            ),
            generation=generation,
            headers=_forwarded(head, passed, request_id),
            key=key,
            arrived_at=arrived_at,
            client_timeout_s=timeout_s,
            sdk_timeout_s=sdk_timeout_s if read.upload is None else math.inf,
            passed=PassThrough(
                method=passed.method,
                route=route,
                path_for=partial(read.path_for, passed.path),
                body_for=read.body_for,
                upload=read.upload,
                is_repeatable=passed.method == "GET" or (passed.found.by_model and read.upload is None),
                take_answer=partial(_take_answer, passed, objects, read.model) if _is_taken(passed) else None,
            ),
        ),
        services=gateway.exchange_services,
        client=response,
    )
    async with trio.open_nursery() as nursery:
        if read.upload is None:
            watch_client(nursery, request_body, response, exchange.client_left)
        elif response.client is None or not response.client.watch(exchange.client_left):
            # The upload itself reads, and so notices the disconnect, until it has arrived.
            read.upload.on_arrived = partial(nursery.start_soon, wait_disconnected, request_body, exchange.client_left)
        if read.upload is not None:
            read.upload.leave = exchange.client_left
        await exchange.run(nursery)
        if nursery.child_tasks:
            nursery.cancel_scope.cancel()


# -- the request ------------------------------------------------------------------------------------------------------


async def _read(
    gateway: Gateway,
    passed: Passed,
    head: RequestHead,
    request_body: RequestBody,
    response: ClientResponse,
    query: bytes,
) -> _Read | None:
    """Reads as much of a request as decides where it goes; None = the client has disconnected.

    Raises:
        BadRequest: It is malformed, or lacks a model.
        UnsupportedMediaType: Its body is neither JSON nor a form.
        Draining, TooLarge, BodyTimeout, Overloaded: As `data_plane.read_body`.
    """
    if not query.isascii():
        raise BadRequest("The query must be percent-encoded.")
    asked = dict(query_pairs(query))
    read = _Read(
        query=query,
        model=checked_model(asked.get("model")),
        stream=asked.get("stream") == "true",
    )
    if passed.method != "POST":
        return read
    content_type = head.headers.get(b"content-type", b"")
    kind = content_type.partition(b";")[0].strip().lower()
    if kind == _FORM:
        if gateway.live.is_draining:
            raise Draining("The gateway is shutting down. Try again: another instance will answer.")
        head.content_coding(())  # a form goes on as it is
        upload = Upload(request_body, gateway.generations.config.limits, length_bytes=head.content_length)
        read = attrs.evolve(read, upload=upload)
        if passed.found.by_model:
            form = await upload.read_head(boundary_of(content_type))
            if form is None:
                return None
            read = attrs.evolve(
                read,
                model=checked_model(form.text("model")) or read.model,
                stream=form.text("stream") in ("true", "1", "True"),
            )
    else:
        body = await read_body(gateway, head, request_body, response)
        if body is None:
            return None
        if body and kind != b"application/json" and not kind.endswith(b"+json"):
            given = kind.decode("latin-1")[:100] or "none"
            raise UnsupportedMediaType(f"Content-Type must be application/json or multipart/form-data; got {given}.")
        if body:
            request_body.keep(len(body), gateway.generations.config.limits)
            parse = partial(_parsed, read, passed, body)
            read = parse() if len(body) <= _PARSED_BYTES else await trio.to_thread.run_sync(parse)
    needs_model = passed.found.by_model and not passed.found.endpoint.model_optional
    if needs_model and read.model is None and asked_upstream(head) is None:
        raise BadRequest("You must provide a model parameter.", param="model")
    return read


def _parsed(read: _Read, passed: Passed, body: bytes) -> _Read:
    """Returns what a JSON body says. Raises BadRequest."""
    try:
        body, fields = split_client_fields(body)
        value = decode_client(body)
    except msgspec.DecodeError as error:
        raise BadRequest(f"The body is not a JSON object: {problem_of(error, body)}.") from None
    except RecursionError:
        raise BadRequest("The body is nested too deeply.") from None
    read = attrs.evolve(read, body=body, fields=fields)
    if passed.found.by_model:
        model = value.get("model")
        if model is not None and not isinstance(model, str):
            raise BadRequest("model must be a string.", param="model")
        read = attrs.evolve(read, model=checked_model(model) or read.model, stream=value.get("stream") is True)
    if passed.found.names_objects:
        objects = objects_in(value)
        if len(objects) > _MAX_OBJECTS:
            raise BadRequest(f"The body has more than {_MAX_OBJECTS} texts that may be ids of objects.")
        read = attrs.evolve(read, objects=objects)
    return read


def checked_model(model: str | None) -> str | None:
    """Returns the model that a request names. Raises BadRequest if it is empty or too long."""
    if model is not None and not 0 < len(model) <= _MAX_MODEL_CHARS:
        raise BadRequest(f"model must have 1 to {_MAX_MODEL_CHARS} characters.", param="model")
    return model


def query_pairs(query: bytes) -> list[tuple[str, str]]:
    """Splits a query. Raises BadRequest."""
    try:
        return parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=100, errors="strict")
    except ValueError:
        raise BadRequest("The query has more than 100 fields, or is not UTF-8.") from None


def asked_upstream(head: RequestHead) -> str | None:
    """The upstream that the client names (``x-trigate-upstream``)."""
    given = head.headers.get(b"x-trigate-upstream")
    return given.decode("latin-1").strip() if given is not None else None


def _forwarded(head: RequestHead, passed: Passed, request_id: str) -> dict[str, str]:
    """The headers that go upstream.

    Raises:
        BadRequest: The content type is not ASCII.
    """
    headers = {"accept": "*/*", "x-request-id": request_id, **head.forwarded(passed.found.endpoint)}
    accept, content_type = head.headers.get(b"accept", b""), head.headers.get(b"content-type", b"")
    if accept and accept.isascii():
        headers["accept"] = accept.decode()
    if passed.method == "POST" and content_type:
        if not content_type.isascii():
            raise BadRequest("Content-Type must be ASCII.")
        headers["content-type"] = content_type.decode()
    return headers


# -- the answer -------------------------------------------------------------------------------------------------------


def _is_taken(passed: Passed) -> bool:
    """Whether a JSON answer has to be read before the client gets it."""
    return passed.method != "GET" or passed.found.lists or passed.found.endpoint.path == "/batches/{id}"


async def _take_answer(
    passed: Passed, objects: Objects, model: str | None, upstream: str, body: bytes
) -> tuple[bytes, Usage | None]:
    """Notes the objects in an upstream's answer, hides those of other keys, and puts the client's model id in.

    Raises:
        ProtocolViolation: A list is none.
        StoreUnavailable: The objects cannot be stored.
    """
    path = passed.found.endpoint.path
    if passed.method == "GET" and passed.found.lists:
        body, rows = await objects.own_part(upstream, body)
        await objects.note(upstream, [each for row in rows for each in _made_by(path, row)])
        return body, None
    value = decode_any(body)
    if not isinstance(value, dict):
        return body, None
    if passed.method == "DELETE" and passed.object_id is not None and path.endswith("/{id}"):
        await objects.store.objects.drop(passed.object_id, upstream)
        return body, None
    made = [value.get("id")] if passed.found.makes else []
    await objects.note(upstream, [*made, *_made_by(path, value)])
    if model is not None and isinstance(value.get("model"), str):
        _, fields = split_client_fields(body)
        body = with_model(body, fields, msgspec.json.encode(model))
    usage = find_usage(value)
    if path in ("/audio/transcriptions", "/audio/translations"):
        return body, with_duration(usage, value)
    return body, with_images(usage, value.get("data")) if passed.found.endpoint.makes_images else usage


def _made_by(path: str, value: Any) -> list[Any]:  # Any: JSON of any shape
    """The ids of objects that an upstream has made of another one: the results of a batch, the file of an upload."""
    if not isinstance(value, dict):
        return []
    if path.startswith("/batches"):
        return [value.get("output_file_id"), value.get("error_file_id")]
    if path == "/uploads/{id}/complete" and isinstance(value.get("file"), dict):
        return [value["file"].get("id")]
    return []
