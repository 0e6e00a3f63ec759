"""``/v1/sessions``: the stored sessions of a key. Sessions of other keys are not found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from quart import Blueprint, Response, jsonify, request

from trigate.asgi.quart_app import current_gateway, current_key
from trigate.errors import BadRequest, NotFound
from trigate.keys.errors import AdminRequired
from trigate.store.records import Message, Session

blueprint = Blueprint("sessions", __name__)

MAX_LIMIT = 100
_DEFAULT_LIMIT = 20


def _owner() -> str:
    """The owner of the sessions: the key's name. The admin may ask for those of another one (``?owner=NAME``).

    Raises:
        AdminRequired: Another key does.
    """
    key, asked = current_key(), request.args.get("owner")
    if asked is None or asked == key.name:
        return key.name
    if not key.is_admin:
        raise AdminRequired("Only the admin's key may see the sessions of another owner.")
    return asked


def _number(name: str, default: int, *, least: int, most: int) -> int:
    text = request.args.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise BadRequest(f"{name} must be a whole number from {least} to {most}.", param=name)
    return int(text)


def _limit() -> int:
    return _number("limit", _DEFAULT_LIMIT, least=1, most=MAX_LIMIT)


def _not_found() -> NotFound:
    return NotFound("There is no such session.")


def _session(session: Session) -> dict[str, Any]:
    return {
        "id": session.key,
        "object": "session",
        "created_at": int(session.created_at),
        "active_at": int(session.active_at),
        "busy": session.busy,
        "resets": session.epoch,
        "turns": session.turns,
        "messages": session.messages,
        "tokens": session.tokens,
    }


def _message(message: Message) -> dict[str, Any]:
    return {
        "id": str(message.number),
        "object": "session.message",
        "created_at": int(message.at),
        "epoch": message.epoch,
        "turn": message.turn,
        "partial": message.partial,
        "tokens": message.tokens,
        "message": msgspec.Raw(message.body),
    }


def _page(rows: Sequence[dict[str, Any]], limit: int) -> Response:
    """Makes a list in the format of OpenAI's API.

    Args:
        rows: One more than ``limit`` if there is another page.
    """
    shown = rows[:limit]
    body = msgspec.json.encode(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(rows) > limit,
        }
    )
    return Response(body, content_type="application/json")


@blueprint.get("/v1/sessions")
async def list_sessions() -> Response:
    """Lists the key's sessions, the last active first."""
    limit = _limit()
    found = await current_gateway().store.sessions.list(_owner(), limit=limit + 1, after=request.args.get("after"))
    return _page([_session(each) for each in found], limit)


@blueprint.get("/v1/sessions/<key>")
async def retrieve_session(key: str) -> Response:
    """Returns one session."""
    found = await current_gateway().store.sessions.get(_owner(), key)
    if found is None:
        raise _not_found()
    return jsonify(_session(found))


@blueprint.get("/v1/sessions/<key>/messages")
async def list_messages(key: str) -> Response:
    """Lists the messages since the last reset, or all of them, the oldest first."""
    limit = _limit()
    archived = request.args.get("archived", "false")
    if archived not in ("true", "false"):
        raise BadRequest("archived must be true or false.", param="archived")
    after = _number("after", 0, least=0, most=2**62)
    found = await current_gateway().store.sessions.messages(
        _owner(), key, limit=limit + 1, after=after, archived=archived == "true"
    )
    if found is None:
        raise _not_found()
    return _page([_message(each) for each in found], limit)


@blueprint.post("/v1/sessions/<key>/reset")
async def reset_session(key: str) -> Response:
    """Resets a session: its messages become the archive. The answer of a turn in progress goes there as well."""
    gateway = current_gateway()
    await gateway.workers.join()
    found = await gateway.store.sessions.reset(_owner(), key, at=time.time())
    if found is None:
        raise _not_found()
    return jsonify(_session(found))


@blueprint.delete("/v1/sessions/<key>")
async def delete_session(key: str) -> Response:
    """Deletes a session and its archive; 409 while a turn is in progress, which would create it again."""
    await current_gateway().sessions.delete(_owner(), key)
    return jsonify({"id": key, "object": "session.deleted", "deleted": True})
