"""The paths of Ollama's format that are no calls: ``/api/version``, ``/api/tags``, ``/api/show`` and ``/api/ps``; and
those that manage the models of an Ollama server, which are refused."""

from __future__ import annotations

import datetime

import msgspec
from quart import Blueprint, Response, jsonify, request

from trigate.asgi.quart_app import current_gateway, current_key
from trigate.asgi.routes.models import may_use, visible_ids
from trigate.dialects.ollama import VERSION, encode_show, encode_tag
from trigate.errors import BadRequest, NotFound, UnknownModel
from trigate.openai.raw_json import decode_client
from trigate.upstream.generation import Generation

blueprint = Blueprint("ollama", __name__)

MANAGED = ("pull", "push", "create", "copy", "delete")
"""What an Ollama server does with its models, each at ``/api/NAME``."""


def _generation() -> Generation:
    return current_gateway().generations.current


def _created(generation: Generation) -> str:
    return datetime.datetime.fromtimestamp(generation.created, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@blueprint.get("/api/version")
async def version() -> Response:
    """Returns the version of Ollama's API that is served."""
    return jsonify({"version": VERSION})


@blueprint.get("/api/tags")
async def list_tags() -> Response:
    """Lists the last known models of all upstreams, without a request to any of them."""
    generation = _generation()
    created = _created(generation)
    models = [
        encode_tag(model, generation.model_fields(model, owner), created)
        for model, owner in visible_ids(generation).items()
    ]
    return jsonify({"models": models})


@blueprint.get("/api/ps")
async def list_running() -> Response:
    """Lists the models that are in memory: none, as upstreams do not say."""
    return jsonify({"models": []})


@blueprint.post("/api/show")
async def show() -> Response:
    """Returns what is known of a model.

    Raises:
        BadRequest: The body names none.
        UnknownModel: No upstream has it.
    """
    data = await request.get_data(cache=False)
    assert isinstance(data, bytes), "asked for no text"
    try:
        body = decode_client(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"The body is not JSON: {error}.") from None
    asked = (body.get("model") or body.get("name")) if isinstance(body, dict) else None
    if not isinstance(asked, str) or not asked:
        raise BadRequest("You must provide a model.", param="model")
    generation = _generation()
    model = generation.named(asked)
    if not may_use(current_key(), generation, model):
        raise UnknownModel(model)
    owner = generation.public_ids().get(model) or generation.route(model).targets[0].upstream
    return jsonify(encode_show(model, generation.model_fields(model, owner), _created(generation)))


@blueprint.route(f"/api/<any({', '.join(MANAGED)}):what>", methods=["POST", "DELETE"])
async def manage(what: str) -> Response:  # noqa: ASYNC124 - so that Quart gives it no thread
    """Refuses to manage models.

    Raises:
        NotFound: Always.
    """
    raise NotFound(f"This gateway has no models of its own to {what}. Do it at the server that runs the model.")
