"""``GET /v1/models`` and ``GET /v1/models/{id}``: the models of all upstreams, under public ids."""

from __future__ import annotations

from typing import Any

from quart import Blueprint, Response, jsonify

from trigate.asgi.quart_app import current_gateway
from trigate.errors import Unavailable, UnknownModel
from trigate.routing import routes
from trigate.upstream.generation import Generation

blueprint = Blueprint("models", __name__)


def _generation() -> Generation:
    return current_gateway().generations.current


def _model(generation: Generation, model: str, owner: str) -> dict[str, Any]:
    row = {"id": model, "object": "model", "created": generation.created, "owned_by": owner}
    fields = generation.model_fields(model, owner)
    if type(fields.get("created", 0)) is not int:  # the SDKs expect one
        del fields["created"]
    return row | fields


@blueprint.get("/v1/models")
async def list_models() -> Response:
    """Lists the last known models of all upstreams, without a request to any of them."""
    generation = _generation()
    rows = [_model(generation, model, owner) for model, owner in generation.public_ids().items()]
    return jsonify({"object": "list", "data": rows})


@blueprint.get("/v1/models/<path:model>")
async def retrieve_model(model: str) -> Response:
    """Returns one entry of the list by its id; slashes in it may be encoded or not.

    Raises:
        UnknownModel: It is not listed.
    """
    generation = _generation()
    ids = generation.public_ids()
    if model in ids:
        return jsonify(_model(generation, model, ids[model]))
    try:
        generation.route(model)  # says which upstreams have an ambiguous id
    except Unavailable as error:  # a call would get a 503; here the model is not listed
        raise UnknownModel(model, reason=error.message) from None
    raise UnknownModel(model, closest=routes.closest(model, ids))
