"""``GET /v1/models`` and ``GET /v1/models/{id}``: the models of all upstreams, under public ids.

A request with the header ``anthropic-version`` gets the answer in Anthropic's format, one with ``x-goog-api-key`` in
Gemini's, as every request to ``/v1beta/models``, and every other one in OpenAI's.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from quart import Blueprint, Response, jsonify, request

from trigate.asgi.paths import format_of
from trigate.asgi.quart_app import current_gateway, current_key
from trigate.dialects import gemini
from trigate.dialects.anthropic import encode_model, encode_model_list
from trigate.errors import BadRequest, GatewayError, Unavailable, UnknownModel
from trigate.keys.key import Key
from trigate.routing import routes
from trigate.upstream.generation import Generation

blueprint = Blueprint("models", __name__)


def _generation() -> Generation:
    return current_gateway().generations.current


def visible_ids(generation: Generation) -> Mapping[str, str]:
    """Returns the public model ids that the key of the current request may use, each with its upstream."""
    key, ids = current_key(), generation.public_ids()
    return (
        {model: owner for model, owner in ids.items() if may_use(key, generation, model)} if key.limits_models else ids
    )


def may_use(key: Key, generation: Generation, model: str) -> bool:
    """Whether a call of a model would be allowed, and have a target."""
    try:
        targets = generation.route(model).targets
    except GatewayError:
        return key.may_use(model, ())
    return key.may_use(model, [f"{target.upstream}/{target.model}" for target in targets])


def _model(generation: Generation, model: str, owner: str) -> dict[str, Any]:
    if _is_for_anthropic():
        return encode_model(model, _rfc3339(generation.created))
    if _is_for_google():
        return gemini.encode_model(model, generation.model_fields(model, owner))
    row = {"id": model, "object": "model", "created": generation.created, "owned_by": owner}
    fields = generation.model_fields(model, owner)
    if type(fields.get("created", 0)) is not int:  # the SDKs expect one
        del fields["created"]
    return row | fields


@blueprint.get("/v1/models")
@blueprint.get("/v1beta/models")
async def list_models() -> Response:
    """Lists the last known models of all upstreams, without a request to any of them.

    Raises:
        BadRequest: In Anthropic's format, ``limit`` is not a number from 1 to 1000; in Gemini's, ``pageSize``.
    """
    generation = _generation()
    if _is_for_anthropic():
        page = encode_model_list(
            visible_ids(generation),
            _rfc3339(generation.created),
            limit=_limit(request.args.get("limit", "20"), "limit"),
            after=request.args.get("after_id"),
            before=request.args.get("before_id"),
        )
        return jsonify(page)
    if _is_for_google():
        models = ((model, generation.model_fields(model, owner)) for model, owner in visible_ids(generation).items())
        size = min(_limit(request.args.get("pageSize", "50"), "pageSize"), 1000)
        return jsonify(gemini.encode_model_list(models, size=size, after=request.args.get("pageToken")))
    rows = [_model(generation, model, owner) for model, owner in visible_ids(generation).items()]
    return jsonify({"object": "list", "data": rows})


@blueprint.get("/v1/models/<path:model>")
@blueprint.get("/v1beta/models/<path:model>")
async def retrieve_model(model: str) -> Response:
    """Returns one entry of the list by its id, or a model that a pattern of the configuration stands for; slashes in
    the id may be encoded or not.

    Raises:
        UnknownModel: It is not listed.
    """
    generation = _generation()
    ids = visible_ids(generation)
    if model in ids:
        return jsonify(_model(generation, model, ids[model]))
    try:
        route = generation.route(model)  # says which upstreams have an ambiguous id
    except Unavailable as error:  # a call would get a 503; here the model is not listed
        raise UnknownModel(model, reason=error.message) from None
    if route.alias != model and may_use(current_key(), generation, model):
        return jsonify(_model(generation, model, route.targets[0].upstream))
    raise UnknownModel(model, closest=routes.closest(model, ids))


def _is_for_anthropic() -> bool:
    return "anthropic-version" in request.headers


def _is_for_google() -> bool:
    return format_of(request.path, [name.lower().encode() for name, _ in request.headers]) == "gemini"


def _rfc3339(epoch_s: int) -> str:
    return datetime.datetime.fromtimestamp(epoch_s, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _limit(given: str, name: str) -> int:
    if given.isascii() and given.isdigit() and 1 <= int(given[:5]) <= 1000:
        return int(given)
    raise BadRequest(f"{name} must be a whole number from 1 to 1000.", param=name)
