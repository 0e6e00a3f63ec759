"""Tool calls without an index get theirs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.openai.wire import make_delta, make_event, make_reader
from trigate.openai import sse
from trigate.openai.accumulator import AnswerAccumulator


def tool(id_: str | None = None, name: str | None = None, arguments: str = "", **more: Any) -> dict[str, Any]:
    function = {"arguments": arguments, **({"name": name} if name else {})}
    return {"function": function, **({"id": id_, "type": "function"} if id_ is not None else {}), **more}


@pytest.mark.parametrize(
    ("deltas", "indexes"),
    [
        ([[tool("a", "f", "{}")]], [[0]]),
        ([[tool("a", "f"), tool("b", "f")]], [[0, 1]]),
        ([[tool("a", "f")], [tool("b", "f")], [tool("c", "f")]], [[0], [1], [2]]),
        ([[tool("a", "f")], [tool(None, None, "{")], [tool("", None, "}")], [tool("b", "f")]], [[0], [0], [0], [1]]),
        ([[tool("a", "f")], [tool("a", None, "{}")]], [[0], [0]]),
        ([[tool(None, "f", "{}")], [tool(None, "g", "{}")]], [[0], [1]]),
        ([[tool("a", "f", index=None)]], [[0]]),
        ([[tool("a", "f", index=3)], [tool(None, None, "{}")]], [[3], [3]]),
    ],
    ids=str,
)
def test_indexes(deltas: list[list[dict[str, Any]]], indexes: list[list[int]]) -> None:
    """A new id, or a name without one, begins a call; other deltas belong to the last one."""
    reader = make_reader()
    out = [reader.feed(make_delta(tool_calls=calls)) for calls in deltas]
    found = [json.loads(sse.data_of(event) or b"")["choices"][0]["delta"]["tool_calls"] for event in out]
    assert [[call["index"] for call in calls] for calls in found] == indexes
    for calls, before in zip(found, deltas, strict=True):
        assert [{**call, "index": 0} for call in calls] == [{**call, "index": 0} for call in before]


def test_events_with_indexes_stay_as_they_are() -> None:
    """Not a byte changes, and each choice counts for itself."""
    reader = make_reader()
    for event in (
        make_delta(tool_calls=[tool("a", "f", index=0)][:1]).replace(b'{"function"', b'{"index": 0, "function"'),
        make_delta(tool_calls=None),
        make_delta(tool_calls=[]),
    ):
        assert reader.feed(make_delta(content="x") + event).endswith(event)
    two = make_event({"choices": [{"index": n, "delta": {"tool_calls": [tool("a", "f")]}} for n in (0, 1)]})
    found = json.loads(reader.feed(two)[6:])
    assert [choice["delta"]["tool_calls"][0]["index"] for choice in found["choices"]] == [0, 0]


def test_calls_among_plain_events() -> None:
    """A delta that has both a text and a call, among texts, does not slip through the shortcut."""

    def chunk(**delta: Any) -> bytes:
        value = {"id": "c", "model": "mock/up", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        return make_event(json.dumps(value, separators=(",", ":")).encode())

    reader = make_reader()
    both = chunk(content="b", tool_calls=[tool("x", "f", "{}")])
    pieces = [
        chunk(content="a"),
        chunk(content="a"),
        both,
        chunk(tool_calls=[tool("y", "g", "{}")]),
        chunk(content="c"),
    ]
    out = b"".join(map(reader.feed, pieces))
    answer = AnswerAccumulator()
    answer.feed(out + b"data: [DONE]\n\n")
    assert [call["id"] for call in json.loads(answer.message())["tool_calls"]] == ["x", "y"]
    assert out.count(b'"index":0,"function"') + out.count(b'"index":1,"function"') == 2
