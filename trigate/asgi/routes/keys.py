"""``/v1/keys``: the keys that are made at run time. Only the admin's key may use it. ``/v1/limits``: what is left of
the limits of a key."""

from __future__ import annotations

import time
from typing import Any

import attrs
import msgspec
from quart import Blueprint, Response, request

from trigate.asgi.quart_app import current_gateway, current_key
from trigate.errors import BadRequest, NotFound
from trigate.keys.errors import AdminRequired
from trigate.keys.key import ANYBODY
from trigate.keys.virtual import VirtualKeys
from trigate.openai.raw_json import decode_client
from trigate.quotas.left import limits_left
from trigate.store.records import VirtualKey

blueprint = Blueprint("keys", __name__)

_MAX_LIMIT = 1000


def _keys() -> VirtualKeys:
    """Returns the service. Raises AdminRequired."""
    gateway = current_gateway()
    if not current_key().is_admin:
        raise AdminRequired(
            "Only the admin's key may administer keys."
            if gateway.keys.are_virtual
            else "This gateway has no admin's key. Set [admin] key, or TRIGATE_ADMIN_KEY, to administer keys."
        )
    return gateway.virtual_keys


async def _body(*, may_be_empty: bool = False) -> dict[str, Any]:  # Any: JSON
    """Reads the body, a JSON object. Raises BadRequest."""
    data = await request.get_data(cache=False)
    assert isinstance(data, bytes), "asked for no text"
    if not data and may_be_empty:
        return {}
    try:
        body = decode_client(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"The body is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.")
    return body


def _view(key: VirtualKey, secret: str | None = None) -> dict[str, Any]:
    now = time.time()
    view = {
        "id": key.id,
        "object": "key",
        "name": key.name,
        "created_at": int(key.created_at),
        "revoked_at": int(key.revoked_at) if key.revoked_at is not None else None,
        "secret_begins_with": key.shown,
        "old_secret_until": int(key.old_until) if key.old_until > now else None,
        "settings": msgspec.Raw(key.settings),
    }
    return view if secret is None else {**view, "secret": secret}


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), content_type="application/json", headers={"cache-control": "no-store"})


@blueprint.post("/v1/keys")
async def create_key() -> Response:
    """Makes a key. The body has its ``name``, and settings as in ``[keys.NAME]``. The secret is shown once.

    Raises:
        AdminRequired: The request does not have the admin's key.
        BadRequest: The name is taken, or a value is invalid.
    """
    keys, body = _keys(), await _body()
    name = body.pop("name", None)
    if not isinstance(name, str):
        raise BadRequest("name must be a string.", param="name")
    return _json(_view(*await keys.create(name, {key: value for key, value in body.items() if value is not None})))


@blueprint.get("/v1/keys")
async def list_keys() -> Response:
    """Lists the keys, the newest first, those that are revoked included.

    Raises:
        AdminRequired: As `create_key`.
        BadRequest: ``limit`` is not a number from 1 to 1000.
    """
    keys, text = _keys(), request.args.get("limit", "100")
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= _MAX_LIMIT):
        raise BadRequest(f"limit must be a number from 1 to {_MAX_LIMIT}.", param="limit")
    limit = int(text)
    found = await keys.list(limit=limit + 1, after=request.args.get("after"))
    shown = [_view(key) for key in found[:limit]]
    return _json({"object": "list", "data": shown, "has_more": len(found) > limit})


@blueprint.get("/v1/keys/<key>")
async def retrieve_key(key: str) -> Response:
    """Returns a key by its id or its name.

    Raises:
        AdminRequired: As `create_key`.
        NotFound: There is none.
    """
    return _json(_view(await _keys().get(key)))


@blueprint.patch("/v1/keys/<key>")
async def update_key(key: str) -> Response:
    """Changes settings of a key; ``null`` unsets one.

    Raises:
        AdminRequired, BadRequest, NotFound: As above.
    """
    return _json(_view(await _keys().update(key, await _body())))


@blueprint.post("/v1/keys/<key>/rotate")
async def rotate_key(key: str) -> Response:
    """Gives a key another secret. The old one is valid for ``overlap_s`` seconds more, by default 0.

    Raises:
        AdminRequired, BadRequest, NotFound: As above.
    """
    keys, body = _keys(), await _body(may_be_empty=True)
    overlap_s = body.pop("overlap_s", 0)
    if body:
        raise BadRequest(f"Unknown field {next(iter(body))[:100]!r}: only overlap_s is taken.")
    if type(overlap_s) not in (int, float):
        raise BadRequest("overlap_s must be a number of seconds.", param="overlap_s")
    return _json(_view(*await keys.rotate(key, overlap_s=overlap_s)))


@blueprint.get("/v1/limits")
async def list_limits() -> Response:
    """Lists the limits of the calling key, of its group and of all calls, and what is left of each. With the admin's
    key, ``key=NAME`` asks for those of another key.

    Raises:
        AdminRequired: Another key asks for those of another one.
        NotFound: There is no such key.
        StoreUnavailable: What has been spent cannot be read.
    """
    gateway, key = current_gateway(), current_key()
    asked = request.args.get("key")
    if asked is not None and asked != key.name:
        if not (key.is_admin or key is ANYBODY):
            raise AdminRequired("Only the admin's key may see the limits of other keys.")
        key = gateway.keys.named(asked)
        if key.is_gone or not gateway.keys.is_known(asked):
            raise NotFound(f"There is no key {asked[:100]!r}.")
    found = await limits_left(gateway.exchange_services.quotas, gateway.store, key)
    return _json({"object": "list", "key": key.name, "data": [attrs.asdict(each) for each in found]})


@blueprint.delete("/v1/keys/<key>")
async def revoke_key(key: str) -> Response:
    """Revokes a key for good. Its streams in flight end with an error.

    Raises:
        AdminRequired, NotFound: As above.
    """
    return _json(_view(await _keys().revoke(key)))
