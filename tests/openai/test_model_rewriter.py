"""The public model id replaces the upstream's in each event, and nothing else changes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.openai.wire import RESPONSES, make_delta, make_event, make_reader, model_ids, tricky_text
from trigate.openai import sse


def test_every_event_gets_the_public_model_id() -> None:
    """The upstream's id is replaced in each event, however it is escaped. Every other byte stays."""
    reader = make_reader(model="my/model")
    for key, value in (
        (b'"model":', b'"up"'),
        (b'"model":', b'"up"'),
        (b'"model": ', b'"up"'),
        (b'"model" :  ', b'"up"'),
        (b'"model":', b'"up-2024"'),
        (b'"model":', b'"\\u0075p"'),
        (b'"model":', b'"u\\"p"'),
    ):
        more = b',"choices":[{"delta":{"content":"a\\u00e9"},"logprob":-1.0}]'
        event = b'event: x\r\ndata: {"id":"1",' + key + value + more + b"}\r\n\r\n"
        assert reader.read(event) == event.replace(key + value, key + b'"my/model"')


def test_a_pretty_printed_event_is_renamed() -> None:
    """An object over several ``data`` lines is one object."""
    reader = make_reader()
    text = json.dumps({"choices": [{"delta": {"content": "a"}}], "model": "up"}, indent=1)
    event = "".join(f"data: {line}\n" for line in text.split("\n")).encode() + b"\n"
    [out] = sse.EventSplitter(max_event_bytes=1000).feed(reader.read(event))
    assert json.loads(sse.data_of(out) or b"") == {**json.loads(text), "model": "mock/up"}


def test_a_response_s_model_is_replaced_inside_it() -> None:
    """In the responses API the model is within ``response``."""
    out = make_reader(RESPONSES).read(make_event({"type": "response.created", "response": {"id": "r", "model": "up"}}))
    assert json.loads(out[6:])["response"]["model"] == "mock/up"


def test_an_event_without_a_model_is_untouched() -> None:
    """No model is added where the upstream sent none."""
    event = make_delta(content="a")
    assert make_reader().read(event) == event


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(tricky_text, st.permutations(["id", "choices", "model"])), min_size=1, max_size=4),
    model_ids | st.just("up"),
    model_ids,
    st.booleans(),
    st.sampled_from([(",", ":"), (", ", ": ")]),
)
def test_only_the_model_of_an_event_changes(
    events: list[tuple[str, list[str]]], upstream_s: str, public: str, ascii_only: bool, separators: tuple[str, str]
) -> None:
    """Only the model id changes, whatever a text quotes and in whatever order the keys come."""
    reader = make_reader(model=public)
    for content, order in events:
        choices = [
            {
                "index": 0,
                "delta": {"content": content, "tool_calls": [{"index": 0, "function": {"arguments": content}}]},
            }
        ]
        values = {"id": content, "choices": choices, "model": upstream_s}
        chunk = {name: values[name] for name in order}
        out = reader.read(make_event(json.dumps(chunk, ensure_ascii=ascii_only, separators=separators).encode()))
        assert reader.error is None
        found = json.loads(sse.data_of(out) or b"")
        assert found == {**chunk, "model": public}
        assert list(found) == order


@pytest.mark.parametrize("order", [("model", "choices"), ("choices", "model")], ids=" before ".join)
@pytest.mark.parametrize(
    "inner", [{"model": "whisper"}, {"model": "up"}, {'"model': "up"}], ids=["another", "the same", "a quoted key"]
)
def test_a_model_inside_the_content_is_not_the_stream_s(inner: dict[str, str], order: tuple[str, str]) -> None:
    """A ``model`` deeper in an event belongs to its own object. Only the top-level one is replaced."""
    values = {"model": "up", "choices": [{"delta": {"content": "a", "x": inner}}]}
    chunk = {name: values[name] for name in order}
    out = make_reader().read(make_event(chunk))
    assert json.loads(out[6:]) == {**chunk, "model": "mock/up"}


def test_an_event_on_several_lines_stays_one() -> None:
    """When an object over several ``data`` lines is rewritten, each of its lines is still in ``data``."""
    value = {"choices": [{"delta": {"content": "a"}, "model": "inner"}], "model": "up"}
    event = "".join(f"data: {line}\n" for line in json.dumps(value, indent=1).split("\n")).encode() + b"\n"
    out = make_reader().read(event)
    assert json.loads(sse.data_of(out) or b"") == {**value, "model": "mock/up"}
