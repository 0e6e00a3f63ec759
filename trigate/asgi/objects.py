"""The objects that upstreams keep for clients: which upstream has one, and whose it is.

An *object* is a file, a batch, a vector store, a stored answer, a conversation or an upload. An upstream knows one key,
that of the gateway, so it would show each object to everybody. The store has the owner of each: to any other key, an
object does not exist. A gateway without keys has one owner, and shows everything that an upstream has.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Self

import attrs
import msgspec

from trigate.errors import BadRequest, NotFound, ProtocolViolation
from trigate.keys.key import ANYBODY, Key
from trigate.openai import sse
from trigate.openai.passed_paths import objects_in
from trigate.openai.raw_json import decode_any, split_provider_fields
from trigate.openai.request import Call
from trigate.routing.endpoints import only_upstream
from trigate.routing.routes import Target
from trigate.store.interface import Store
from trigate.store.records import UpstreamObject

_NAMED_BY = {"previous_response_id", "conversation", "vector_store_ids", "file_id"}
_ESCAPED_LETTER = b"\\u00"  # a name may be written with escapes
_raw_list = msgspec.json.Decoder(list[msgspec.Raw])


@attrs.frozen(kw_only=True)
class Objects:
    """The objects that one request may see.

    Attributes:
        owner: The name of its key.
        sees_all: The gateway has no keys, or the request has that of the admin.
    """

    store: Store
    owner: str
    sees_all: bool

    @classmethod
    def of(cls, store: Store, key: Key) -> Self:
        """The objects that a key may see."""
        return cls(store=store, owner=key.name, sees_all=key.is_admin or key is ANYBODY)

    async def upstream_of(self, object_id: str | None, named: Sequence[str], *, asked: str | None) -> str | None:
        """Returns the upstream that a request has to go to; None = it names no object that is known.

        Args:
            object_id: The id in its path.
            named: Texts in its body that may be ids.
            asked: The upstream that the client names.

        Raises:
            NotFound: There is no such object for this key.
            BadRequest: The objects are at several upstreams, or not at the one that the client names.
            StoreUnavailable: The store cannot be read.
        """
        ids = tuple(dict.fromkeys([*([object_id] if object_id is not None else []), *named]))
        if not ids:
            return asked
        found = await self.store.objects.find(ids)
        own: dict[str, str] = {}
        for each in sorted(found, key=lambda each: (each.upstream == asked, each.at)):  # the last one counts
            if self._is_mine(each):
                own[each.id] = each.upstream
        foreign = {each.id for each in found} - own.keys()
        if object_id is not None and object_id not in own and not self.sees_all:
            raise _unknown(object_id)
        if foreign:
            raise _unknown(next(iter(foreign)))
        upstream = only_upstream(own)
        if asked is not None and upstream is not None and asked != upstream:
            raise BadRequest(
                f"{next(iter(own))} is at the upstream {upstream}, and not at {asked[:200]} (x-trigate-upstream)."
            )
        return upstream or asked

    def _is_mine(self, found: UpstreamObject) -> bool:
        return self.sees_all or found.owner == self.owner

    def note_answer(self, call: Call, target: Target | None, data: bytes) -> bool:
        """Notes the answer that an upstream keeps, from the first bytes of it: whole events, or all of its JSON.

        It does not wait until the store has it: an answer is not delayed for that. An answer that the gateway has made
        of another one (`Call.identity`) is not kept by an upstream.

        Returns:
            Whether it has an id.
        """
        object_id = _id_in(data)
        if object_id is None or target is None:
            return False
        if call.identity is not None and object_id == call.identity.id:
            return True
        noted = UpstreamObject(id=object_id, upstream=target.upstream, owner=self.owner, at=time.time())
        self.store.objects.note([noted], durable=False)
        return True

    async def note(self, upstream: str, ids: Iterable[Any]) -> None:  # Any: JSON of any shape
        """Notes that an upstream has made objects for this owner.

        Raises:
            StoreUnavailable: They cannot be stored.
        """
        now = time.time()
        noted = [
            UpstreamObject(id=each, upstream=upstream, owner=self.owner, at=now)
            for each in ids
            if isinstance(each, str) and 0 < len(each) <= 256
        ]
        if noted:
            await self.store.objects.note(noted)

    async def own_part(self, upstream: str, body: bytes) -> tuple[bytes, list[Any]]:  # Any: JSON of any shape
        """Returns a list without the objects of other keys, and the objects that are left.

        Raises:
            ProtocolViolation: It is no list.
            StoreUnavailable: The store cannot be read.
        """
        if self.sees_all:
            value = decode_any(body)
            data = value.get("data") if isinstance(value, dict) else None
            return body, data if isinstance(data, list) else []
        try:
            fields = split_provider_fields(body)
            rows = _raw_list.decode(fields["data"])
        except (ValueError, KeyError, RecursionError):
            raise ProtocolViolation(f"The upstream {upstream} was asked for a list and answered with none.") from None
        values = [decode_any(bytes(row)) for row in rows]
        ids = [value.get("id") if isinstance(value, dict) else None for value in values]
        found = await self.store.objects.find([each for each in ids if isinstance(each, str)])
        own = {each.id for each in found if each.upstream == upstream and self._is_mine(each)}
        kept = [at for at, each in enumerate(ids) if each in own]
        data = msgspec.Raw(b"[" + b",".join([bytes(rows[at]) for at in kept]) + b"]")
        return msgspec.json.encode({**fields, "data": data}), [values[at] for at in kept]


def _unknown(object_id: str) -> NotFound:
    return NotFound(f"There is no object {object_id!r} here.")


def may_name_objects(call: Call, *, are_apart: bool) -> bool:
    """Whether a call may name objects of its upstream: an earlier answer, files, vector stores.

    To search a body costs every call some microseconds, so it is done only where that keeps keys apart.

    Args:
        are_apart: The gateway has several keys.
    """
    path, fields = call.endpoint.path, call.fields
    if path == "/responses":
        if "previous_response_id" in fields or "conversation" in fields:
            return True
    elif path != "/chat/completions":
        return False
    if not are_apart:
        return False
    body = call.body
    return b'"file_id"' in body or b'"vector_store_ids"' in body or (b"\\" in body and _ESCAPED_LETTER in body)


def named_by(call: Call) -> tuple[str, ...]:
    """Returns the texts in a call that may be ids of objects."""
    return objects_in(_naming_parts(decode_any(call.body)))


def _naming_parts(value: Any) -> list[Any]:  # Any: JSON of any shape
    """The values of all fields that name an object, wherever they are."""
    found: list[Any] = []
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            found += [part for name, part in each.items() if name in _NAMED_BY]
            left += each.values()
        elif isinstance(each, list):
            left += each
    return found


def is_kept(call: Call) -> bool:
    """Whether the upstream keeps the answer of a call, so that its id can be asked for later."""
    if call.endpoint.path == "/responses":
        return bytes(call.fields.get("store", b"true")) == b"true"
    return call.endpoint.path == "/chat/completions" and bytes(call.fields.get("store", b"")) == b"true"


def _id_in(data: bytes) -> str | None:
    """The id of an answer, from its JSON, or from the first of its events that has one.

    >>> _id_in(b'{"id": "chatcmpl-1"}'), _id_in(b'event: x\\ndata: {"response": {"id": "resp_1"}}\\n\\n'), _id_in(b"")
    ('chatcmpl-1', 'resp_1', None)
    """
    events = [data] if data.startswith(b"{") else sse.EventSplitter(max_event_bytes=len(data) + 1).feed(data)
    for event in events:
        value = decode_any(event if data.startswith(b"{") else sse.data_of(event) or b"")
        inner = value.get("response") if isinstance(value, dict) else None
        holder = inner if isinstance(inner, dict) else value
        found = holder.get("id") if isinstance(holder, dict) else None
        if isinstance(found, str) and 0 < len(found) <= 256:
            return found
    return None
