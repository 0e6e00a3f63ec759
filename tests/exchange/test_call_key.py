"""The key of a shared call: which calls are identical."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from trigate.exchange import call_key
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.request import decode_call

HEADERS = {"content-type": "application/json", "accept": "text/event-stream"}
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "Hi"}],
    "temperature": 0,
    "stream": True,
}


def of(
    body: object, *, path: str = "/v1/chat/completions", sampled: bool = False, headers: Any = HEADERS
) -> bytes | None:
    """The key of a call with this body."""
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return call_key.call_key_of(decode_call(ENDPOINTS[path], data), headers, sampled=sampled)


@pytest.mark.parametrize(
    "body",
    [
        b'{"stream":true,"temperature":0,"messages":[{"content":"Hi","role":"user"}],"model":"m"}',
        b'{ "model" : "m",\n\t"messages": [ {"role":"user", "content": "\\u0048i"} ], "temperature": 0, "stream":true}',
    ],
    ids=["order", "white space and escapes"],
)
def test_equal_calls_have_one_key(body: bytes) -> None:
    """Key order, white space and escapes do not count."""
    assert of(body) == of(CHAT) is not None


@pytest.mark.parametrize("own", ["x-request-id", "traceparent", "tracestate"])
def test_per_request_headers_do_not_count(own: str) -> None:
    """Headers that differ with every request are not part of the key."""
    assert of(CHAT, headers={**HEADERS, own: "1"}) == of(CHAT)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"messages": [{"role": "user", "content": "Hi "}]},
        {"messages": [{"role": "system", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}]},
        {"stream": False},
        {"temperature": 0.0},
        {"seed": 1},
        {"max_tokens": 5},
        {"user": "ada"},
        {"stream_options": {"include_usage": True}},
        {"n": 2},
        {"unknown": None},
    ],
    ids=str,
)
def test_different_calls_have_different_keys(change: dict[str, Any]) -> None:
    """Any difference in a value, or in how a number is written, makes a different call."""
    both = of(CHAT), of({**CHAT, **change})
    assert None not in both
    assert both[0] != both[1]


def test_the_order_within_a_schema_counts() -> None:
    """Structured output has its fields in the order of the schema."""
    one = {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {}, "b": {}}}}}
    other = {"type": "json_schema", "json_schema": {"schema": {"properties": {"b": {}, "a": {}}}}}
    assert of({**CHAT, "response_format": one}) != of({**CHAT, "response_format": other})


@pytest.mark.parametrize("name", ["idempotency-key", "openai-beta"])
def test_headers_that_go_upstream_count(name: str) -> None:
    """Calls with two idempotency keys differ, and so do calls with and without one."""
    found = {of(CHAT), of(CHAT, headers={**HEADERS, name: "1"}), of(CHAT, headers={**HEADERS, name: "2"})}
    assert len(found) == 3


def test_numbers_too_large_for_a_float_stay_distinct() -> None:
    """They are compared as text, never as numbers."""
    seeds = (12345678901234567890123456789, 12345678901234567890123456788)
    bodies = [b'{"model":"m","prompt":"x","temperature":0,"seed":%d}' % seed for seed in seeds]
    one, other = (of(body, path="/v1/completions") for body in bodies)
    assert one is not None
    assert one != other


def test_the_endpoint_counts() -> None:
    """The same body at another path is a different call."""
    body = {"model": "m", "input": "x"}
    found = of(body, path="/v1/embeddings"), of(body, path="/v1/moderations")
    assert None not in found
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("fields", "is_deterministic"),
    [
        ({}, False),
        ({"temperature": 0}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 0.1}, False),
        ({"temperature": 1, "seed": 7}, True),
        ({"seed": 0}, True),
        ({"seed": None}, False),
        ({"seed": "7"}, False),
        ({"temperature": None}, False),
        ({"temperature": False}, False),
        ({"top_p": 0}, False),
    ],
    ids=str,
)
def test_a_call_with_a_random_answer_is_not_shared(fields: dict[str, Any], is_deterministic: bool) -> None:
    """It is shared only where that is explicitly allowed."""
    body = {"model": "m", "messages": CHAT["messages"], **fields}
    assert (of(body) is not None) is is_deterministic
    assert of(body, sampled=True) is not None


@pytest.mark.parametrize(
    ("path", "shared"),
    [("/v1/embeddings", True), ("/v1/moderations", True), ("/v1/audio/speech", False)],
)
def test_deterministic_endpoints(path: str, shared: bool) -> None:
    """An embedding is the same each time. Speech is not."""
    assert (of({"model": "m", "input": "x"}, path=path) is not None) is shared


@pytest.mark.parametrize("name", ["tools", "functions", "mcp_servers", "plugins", "web_search_options"])
def test_a_call_with_tools_is_not_shared(name: str) -> None:
    """Each client executes the tool calls that it gets. An empty list offers no tools."""
    assert of({**CHAT, name: [{"type": "function"}]}, sampled=True) is None
    assert of({**CHAT, name: []}, sampled=True) is not None


@pytest.mark.parametrize(
    ("path", "fields", "shared"),
    [
        ("/v1/chat/completions", {"store": True}, False),
        ("/v1/chat/completions", {"store": False}, True),
        ("/v1/responses", {}, False),
        ("/v1/responses", {"store": None}, False),
        ("/v1/responses", {"store": False}, True),
        ("/v1/responses", {"store": False, "background": True}, False),
        ("/v1/responses", {"store": False, "conversation": "c1"}, False),
    ],
    ids=str,
)
def test_a_stored_answer_is_not_shared(path: str, fields: dict[str, Any], shared: bool) -> None:
    """A stored answer has an id, with which other clients could continue it."""
    body = {"model": "m", "messages": CHAT["messages"], "input": "x", "temperature": 0, **fields}
    assert (of(body, path=path) is not None) is shared


def test_a_duplicate_json_key_makes_no_call_key() -> None:
    """JSON parsers disagree about duplicate keys."""
    twice = b'{"role":"user","role":"system","content":"x"}'
    assert of(b'{"model":"m","temperature":0,"messages":[' + twice + b"]}") is None


def test_a_deeply_nested_body_makes_no_call_key() -> None:
    """The body is not parsed to its end, and nothing is raised."""
    assert call_key.canonical(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}") is None


def test_a_large_body_is_compared_byte_by_byte() -> None:
    """In a large body the key order counts. The same bytes have the same key."""
    text = b'"' + b"x" * call_key.MAX_JSON_BYTES + b'"'
    one = b'{"model":"m","temperature":0,"prompt":' + text + b"}"
    other = b'{"temperature":0,"model":"m","prompt":' + text + b"}"
    assert of(one, path="/v1/completions") == of(one, path="/v1/completions") is not None
    assert of(one, path="/v1/completions") != of(other, path="/v1/completions")
