"""Response calls that the gateway answers itself: what it keeps of them, and ``/v1/responses/{id}``.

An upstream that has the Responses API keeps its answers itself, and its ids lead to it (`objects`). For any other
upstream, the gateway does: it stores each answer with its input, puts both before the input of a call that continues
it, and serves calls in the background.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qs

import attrs
import msgspec
import trio

from trigate.asgi.request import RequestHead
from trigate.dialects.endpoints import RESPONSES
from trigate.dialects.openai_responses import history
from trigate.errors import BadRequest, GatewayError, NotFound, PreviousResponseNotFound
from trigate.exchange.answers import JSON_HEADERS, stream_headers
from trigate.exchange.client_response import ClientResponse
from trigate.exchange.exchange import Exchange
from trigate.exchange.request import ExchangeRequest
from trigate.exchange.stored_responses import LiveResponse, ResponseRecorder, split_events
from trigate.gateway.gateway import Gateway
from trigate.keys.key import Key
from trigate.openai.passed_paths import Passed
from trigate.openai.raw_json import decode_any
from trigate.openai.request import Call, Identity
from trigate.openai.request_bounds import is_small
from trigate.openai.token_estimate import estimated_tokens
from trigate.store.records import StoredResponse

T = TypeVar("T")

_OWN = "resp_tg"
"""Begins the ids that the gateway gives: it asks no upstream for them."""
_POLL_S = 0.5
"""How often another worker's response is looked up while its events are awaited."""
_CANCEL_S = 5.0
"""How long a cancelled response may take to end."""
_MAX_ITEMS = 100


@attrs.frozen(kw_only=True)
class ResponseCall:
    """A response call, as it is served.

    Attributes:
        recorder: Stores its answer; None = the gateway does not keep it.
        live: It is served in the background, and this takes its events; None = it has a client.
    """

    call: Call
    recorder: ResponseRecorder | None = None
    live: LiveResponse | None = None


async def prepare(gateway: Gateway, call: Call, owner: str) -> ResponseCall:
    """Gives a call its identity, and the items that it continues or refers to.

    Raises:
        PreviousResponseNotFound: It continues a response that the gateway does not have for its key.
        BadRequest: It cannot be served in the background, or its input is malformed.
        StoreUnavailable: The store cannot be read.
    """
    identity = Identity(id=f"{_OWN}{secrets.token_hex(20)}", created_at=int(time.time()))
    call = attrs.evolve(call, identity=identity)
    previous = _text(call, "previous_response_id")
    earlier = None
    if previous is not None and previous.startswith(_OWN):
        earlier = await gateway.store.responses.get(owner, previous)
        if earlier is None:
            raise PreviousResponseNotFound(previous)
    translated = _translated(gateway, call.model)
    if translated == "none" and earlier is None:
        return ResponseCall(call=call)
    items = await _run(call, partial(history.items_of, call))
    known = await _items_by_id(gateway, owner, history.references_in(items))
    before: list[Any] = []
    if earlier is not None:
        if earlier.worker:
            raise BadRequest(f"The response {previous} has not ended.", param="previous_response_id")
        before = [*decode_any(earlier.input), *history.output_of(earlier.body)]
        identity = attrs.evolve(identity, previous_id=earlier.id)
        call = attrs.evolve(call, identity=identity)
    if before or known:
        call = await _run(call, partial(history.with_history, call, before, known.get, items))
    if translated == "none":
        return ResponseCall(call=call)
    keeps, in_background = not _is(call, "store", b"false"), _is(call, "background", b"true")
    if in_background and not keeps:
        raise BadRequest("background requires store.", param="background")
    if in_background and translated == "some":
        return ResponseCall(call=call)  # it goes to the target that can do it
    if not keeps:
        return ResponseCall(call=call)
    live = LiveResponse() if in_background else None
    if in_background:
        call = history.without_field(call, "background")
        call = attrs.evolve(call, identity=attrs.evolve(identity, is_background=True))
    kept = [*before, *(known.get(str(item.get("id")), item) for item in items)]
    recorder = ResponseRecorder(
        gateway.store,
        call,
        owner=owner,
        input_items=await _run(call, partial(msgspec.json.encode, kept)),
        worker=gateway.workers.id,
        live=live,
        keeps_events=in_background and call.stream,
    )
    return ResponseCall(call=call, recorder=recorder, live=live)


async def _run(call: Call, function: Callable[[], T]) -> T:
    """Runs a function whose time grows with the body of a call; that of a large one would hold other calls up."""
    return function() if is_small(call.body) else await trio.to_thread.run_sync(function, abandon_on_cancel=True)


def _translated(gateway: Gateway, model: str) -> Literal["none", "some", "all"]:
    """Returns at how many targets of a model a call may be translated."""
    generation = gateway.generations.current
    try:
        targets = generation.route(model, RESPONSES).targets
    except GatewayError:
        return "none"  # its exchange says what is wrong
    upstreams = [generation.upstreams[target.upstream] for target in targets]
    found = [each.responses != "native" or each.config.kind not in ("openai", "azure") for each in upstreams]
    return "all" if all(found) else "some" if any(found) else "none"


async def _items_by_id(gateway: Gateway, owner: str, ids: Sequence[str]) -> dict[str, Any]:  # Any: an item
    """Returns the items with these ids, as far as the gateway has them."""
    found: dict[str, Any] = {}
    for response_id in dict.fromkeys([history.response_id_of(each) for each in ids[:_MAX_ITEMS]]):
        stored = await gateway.store.responses.get(owner, response_id) if response_id is not None else None
        if stored is not None:
            items = [*decode_any(stored.input), *history.output_of(stored.body)]
            found |= {item["id"]: item for item in items if item.get("id") in ids}
    return found


def _text(call: Call, name: str) -> str | None:
    raw = call.fields.get(name)
    value = decode_any(bytes(raw)) if raw is not None else None
    return value if isinstance(value, str) else None


def _is(call: Call, name: str, value: bytes) -> bool:
    return bytes(call.fields.get(name, b"")) == value


def counted(gateway: Gateway, model: str | None, body: bytes) -> bytes | None:
    """Returns the answer to a request to count the tokens of a call: an estimate, where no upstream of the model can
    count them; None = one can."""
    if model is None or _translated(gateway, model) != "all":
        return None
    return msgspec.json.encode({"object": "response.input_tokens", "input_tokens": estimated_tokens(body)})


# -- in the background ------------------------------------------------------------------------------------------------


async def serve_in_background(
    gateway: Gateway, asked: ResponseCall, request: ExchangeRequest, response: ClientResponse
) -> None:
    """Begins a response, and answers with its head, or with its events as they come. The response does not depend on
    the client.

    Raises:
        StoreUnavailable: It cannot be stored.
    """
    live, recorder, identity = asked.live, asked.recorder, asked.call.identity
    assert live is not None
    assert recorder is not None
    assert identity is not None
    await recorder.begin()
    exchange = Exchange(request=request, services=gateway.exchange_services, recorder=recorder)
    gateway.background_responses.start(identity.id, exchange, recorder, live)
    if asked.call.stream:
        await _follow(gateway, live, response, after=-1)
    else:
        await response.respond(200, JSON_HEADERS, recorder.head("queued"))


async def _follow(gateway: Gateway, live: LiveResponse, response: ClientResponse, *, after: int) -> None:
    """Sends the events behind a number as they come."""
    await response.start(200, stream_headers(RESPONSES.stream_type))
    keep_alive_s = gateway.generations.config.limits.keep_alive_s or 3600.0
    sent = after + 1
    while True:
        events, is_ended = live.events[sent:], live.is_ended
        sent += len(events)
        if events:
            await response.send(b"".join(events))
        elif is_ended:
            await response.end()
            return
        else:
            with trio.move_on_after(keep_alive_s) as silence:
                await live.news.wait()
            if silence.cancelled_caught:
                await response.send(b": keep-alive\n\n")


# -- /v1/responses/{id} -----------------------------------------------------------------------------------------------


async def serve_stored(
    gateway: Gateway, passed: Passed, head: RequestHead, response: ClientResponse, *, query: bytes, key: Key
) -> bool:
    """Serves a request for a response that the gateway keeps; False = an upstream may have it.

    Raises:
        NotFound: The gateway has made it, and does not keep it for this key.
        BadRequest: The request makes no sense for the response.
        StoreUnavailable: The store cannot be read.
    """
    path, response_id = passed.found.endpoint.path, passed.object_id
    if response_id is None or not path.startswith("/responses/{id}") or passed.method not in passed.found.methods:
        return False
    stored = await gateway.store.responses.get(None if key.is_admin else key.name, response_id)
    if stored is None:
        if response_id.startswith(_OWN):
            raise NotFound(f"Response with id {response_id!r} not found.")
        return False
    stored = await _current(gateway, stored)
    given = parse_qs(query.decode("latin-1"))
    if path.endswith("/input_items"):
        await response.respond(200, JSON_HEADERS, _page(decode_any(stored.input), given))
    elif path.endswith("/cancel"):
        await response.respond(200, JSON_HEADERS, await _cancel(gateway, stored))
    elif passed.method == "DELETE":
        if stored.worker:
            await _cancel(gateway, stored)
        await gateway.store.responses.delete(stored.owner, response_id)
        deleted = {"id": response_id, "object": "response", "deleted": True}
        await response.respond(200, JSON_HEADERS, msgspec.json.encode(deleted))
    elif given.get("stream") == ["true"]:
        await _serve_events(gateway, stored, response, after=_number(given, "starting_after", -1))
    else:
        await response.respond(200, JSON_HEADERS, stored.body)
    return True


async def _current(gateway: Gateway, stored: StoredResponse) -> StoredResponse:
    """Returns a response; one whose worker has exited without an answer has failed."""
    if not stored.worker or gateway.background_responses.get(stored.id) is not None:
        return stored
    if stored.worker != gateway.workers.id and stored.worker in {each.id for each in await gateway.store.workers.all()}:
        return stored
    again = await gateway.store.responses.get(stored.owner, stored.id) or stored  # it may have ended meanwhile
    if not again.worker:
        return again
    error = {"code": "server_error", "message": "The process that made this response has ended."}
    body = msgspec.json.encode({**decode_any(again.body), "status": "failed", "error": error})
    return attrs.evolve(again, body=body, worker="")


async def _cancel(gateway: Gateway, stored: StoredResponse) -> bytes:
    """Cancels a response in the background, at whichever worker it is; returns it as it is then."""
    if not decode_any(stored.body).get("background"):
        raise BadRequest("Only a response in the background can be cancelled.")
    if stored.worker:
        await gateway.inflight.cancel(owner=stored.owner, stream=stored.id)
        with trio.move_on_after(_CANCEL_S):
            while stored.worker:
                await trio.sleep(0.01)
                stored = await gateway.store.responses.get(stored.owner, stored.id) or attrs.evolve(stored, worker="")
    return stored.body


async def _serve_events(gateway: Gateway, stored: StoredResponse, response: ClientResponse, *, after: int) -> None:
    """Sends the events of a response in the background behind a number."""
    live = gateway.background_responses.get(stored.id)
    if live is not None and live.exchange is not None and live.exchange.call.stream:
        await _follow(gateway, live, response, after=after)
        return
    while stored.worker and live is None:  # another worker has its events; they are stored at its end
        await trio.sleep(_POLL_S)
        found = await gateway.store.responses.get(stored.owner, stored.id)
        if found is None:
            raise NotFound(f"Response with id {stored.id!r} not found.")
        stored = await _current(gateway, found)
    if not stored.events:
        raise BadRequest(
            "Only the events of a response that was made in the background and streamed can be asked for.",
            param="stream",
        )
    await response.start(200, stream_headers(RESPONSES.stream_type))
    await response.end(b"".join(split_events(stored.events)[after + 1 :]))


def _page(items: list[Any], given: dict[str, list[str]]) -> bytes:  # Any: an item
    """Returns a page of items. Raises BadRequest."""
    order = given.get("order", ["desc"])[-1]
    if order not in ("asc", "desc"):
        raise BadRequest("order must be asc or desc.", param="order")
    limit = _number(given, "limit", 20)
    if not 1 <= limit <= _MAX_ITEMS:
        raise BadRequest(f"limit must be 1 to {_MAX_ITEMS}.", param="limit")
    ordered = items if order == "asc" else items[::-1]
    after = given.get("after", [""])[-1]
    if after:
        at = next((at for at, item in enumerate(ordered) if item.get("id") == after), None)
        if at is None:
            raise BadRequest(f"There is no item with the id {after[:200]!r}.", param="after")
        ordered = ordered[at + 1 :]
    page = ordered[:limit]
    found = {
        "object": "list",
        "data": page,
        "first_id": page[0].get("id") if page else None,
        "last_id": page[-1].get("id") if page else None,
        "has_more": len(ordered) > limit,
    }
    return msgspec.json.encode(found)


def _number(given: dict[str, list[str]], name: str, default: int) -> int:
    text = given.get(name, [""])[-1]
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise BadRequest(f"{name} must be a whole number.", param=name)
    return int(text)
