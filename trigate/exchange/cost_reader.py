"""The cost of a call, in the event of its stream that has the token counts. Only for clients that want it."""

from __future__ import annotations

import time

import attrs
import msgspec

from trigate.errors import GatewayError
from trigate.exchange.translation import Reader
from trigate.openai import sse
from trigate.openai.answer import Usage
from trigate.openai.raw_json import decode_any, join_fields, split_fields
from trigate.prices.price import usd
from trigate.prices.prices import Prices
from trigate.routing.routes import Target

_HOLDERS = ("usage", "response")


@attrs.define(eq=False)
class CostReader:
    """Feeds a reader of server-sent events, and adds ``cost`` to the ``usage`` in what it returns: US dollars, or null
    if the cost is not known.

    Args:
        reader: Returns whole events in the client's format.
        target: Whose prices apply.
    """

    _reader: Reader
    _prices: Prices
    _target: Target

    @property
    def events(self) -> int:
        """As `Reader.events`."""
        return self._reader.events

    @events.setter
    def events(self, count: int) -> None:
        self._reader.events = count

    @property
    def has_content(self) -> bool:
        """As `Reader.has_content`."""
        return self._reader.has_content

    @property
    def all_finished(self) -> bool:
        """As `Reader.all_finished`."""
        return self._reader.all_finished

    @property
    def usage(self) -> Usage | None:
        """As `Reader.usage`."""
        return self._reader.usage

    @property
    def kept(self) -> list[bytes] | None:
        """As `Reader.kept`."""
        return self._reader.kept

    @property
    def complete(self) -> bool:
        """As `Reader.complete`."""
        return self._reader.complete

    @property
    def error(self) -> GatewayError | None:
        """As `Reader.error`."""
        return self._reader.error

    def feed(self, piece: bytes) -> bytes:
        """As `Reader.feed`."""
        return self._priced(self._reader.feed(piece))

    def feed_end(self) -> bytes:
        """As `Reader.feed_end`."""
        return self._priced(self._reader.feed_end())

    def _priced(self, data: bytes) -> bytes:
        usage = self._reader.usage
        if usage is None or not data.count(b'"usage"'):
            return data
        micro = self._prices.cost(self._target.upstream, self._target.model, usage, time.time())
        cost = msgspec.Raw(usd(micro).encode() if micro is not None else b"null")
        events = sse.EventSplitter(max_event_bytes=len(data) + 1).feed(data)
        return b"".join([_with_cost(event, cost) for event in events])


def _with_cost(event: bytes, cost: msgspec.Raw) -> bytes:
    r"""Adds the cost to the usage of an event, or of the response in it.

    >>> _with_cost(b'data: {"usage":{"n":1.0}}\n\n', msgspec.Raw(b"0.5"))
    b'data: {"usage":{"n":1.0,"cost":0.5}}\n\n'
    >>> _with_cost(b'data: {"usage":null}\n\n', msgspec.Raw(b"0.5"))
    b'data: {"usage":null}\n\n'
    """
    data = sse.data_of(event)
    if not data or not data.count(b'"usage"') or not isinstance(decode_any(data), dict):
        return event
    fields = dict(split_fields(data))
    for holder in _HOLDERS:
        if holder not in fields or bytes(memoryview(fields[holder])[:1]) != b"{":
            continue
        inner = dict(split_fields(bytes(fields[holder])))
        if holder == "usage":
            inner["cost"] = cost
        elif "usage" in inner and bytes(memoryview(inner["usage"])[:1]) == b"{":
            inner["usage"] = msgspec.Raw(join_fields({**split_fields(bytes(inner["usage"])), "cost": cost}))
        else:
            continue
        fields[holder] = msgspec.Raw(join_fields(inner))
        return sse.with_data(event, join_fields(fields))
    return event
