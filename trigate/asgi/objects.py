"""The objects that upstreams keep for clients: which upstream has one, and whose it is.

An *object* is a file, a batch, a vector store, a stored answer, a conversation or an upload. An upstream knows one key,
that of the gateway, so it would show each object to everybody. The store has the owner of each: to any other key, an
object does not exist. A gateway without keys has one owner, and shows everything that an upstream has.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import msgspec

from trigate.errors import BadRequest, NotFound, ProtocolViolation
from trigate.openai.raw_json import decode_any, split_provider_fields
from trigate.routing.endpoints import only_upstream
from trigate.store.interface import Store
from trigate.store.records import UpstreamObject

_raw_list = msgspec.json.Decoder(list[msgspec.Raw])


@attrs.frozen(kw_only=True)
class Objects:
    """The objects that one request may see.

    Attributes:
        owner: The name of its key.
        sees_all: The gateway has no keys.
    """

    store: Store
    owner: str
    sees_all: bool

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
