"""The indexes of streamed tool calls. Pure.

OpenAI's schema has an ``index`` in each delta of a tool call: it says to which call the delta belongs. Google's
endpoint leaves it out, and the SDKs fail on that or mix the calls up.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from trigate.openai.raw_json import decode_any

_INDEXED = re.compile(rb'"tool_calls":\s?(?:null|\[\s?(?:\]|\{\s?"index":\s?\d))')


class ToolCallIndexes:
    """Adds the indexes that are missing in the events of one stream.

    A call begins where a delta has another id than the one before it, or a name and no id. Other deltas belong to the
    last call.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, object]] = {}  # of each choice: the index and the id of its last call

    def added(self, data: bytes) -> bytes:
        """Returns the data of an event with its indexes; unchanged where none is missing.

        >>> data = b'{"choices":[{"delta":{"tool_calls":[{"id":"a"},{"id":"b"}]}}]}'
        >>> ToolCallIndexes().added(data)
        b'{"choices":[{"delta":{"tool_calls":[{"index":0,"id":"a"},{"index":1,"id":"b"}]}}]}'
        """
        if _INDEXED.search(data):
            return data
        value = decode_any(data)
        changed = False
        choices = value.get("choices") if isinstance(value, dict) else None
        for choice in choices if isinstance(choices, list) else ():
            delta = choice.get("delta") if isinstance(choice, dict) else None
            if isinstance(delta, dict) and isinstance(calls := delta.get("tool_calls"), list):
                number = choice.get("index")
                indexed = [self._with_index(number if type(number) is int else 0, call) for call in calls]
                changed = changed or indexed != calls
                delta["tool_calls"] = indexed
        if not changed:
            return data
        try:
            return msgspec.json.encode(value)
        except UnicodeEncodeError:  # a lone surrogate
            return json.dumps(value, separators=(",", ":")).encode()

    def _with_index(self, choice: int, call: Any) -> Any:  # Any: JSON of any shape
        if not isinstance(call, dict):
            return call
        last, last_id = self._last.get(choice, (-1, None))
        id_ = call.get("id") or None
        if type(call.get("index")) is int:
            self._last[choice] = call["index"], id_ or last_id
            return call
        function = call.get("function")
        is_named = isinstance(function, dict) and bool(function.get("name"))
        if last < 0 or (id_ != last_id if id_ is not None else is_named):
            last += 1
        self._last[choice] = last, id_ or (None if is_named else last_id)
        return {"index": last, **{name: part for name, part in call.items() if name != "index"}}
