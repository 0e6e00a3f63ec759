"""What a stream reports about itself: content, its end, errors and usage."""

from __future__ import annotations

import json

import pytest

from tests.openai.wire import CHAT, RESPONSES, make_delta, make_event, make_reader
from trigate.errors import ProtocolViolation, Rejected, Reported, Truncated
from trigate.openai.answer import Usage
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.stream import StreamReader


@pytest.mark.parametrize(
    ("event", "has_content"),
    [
        (make_delta(role="assistant", content=""), False),
        (make_delta(role="assistant"), False),
        (make_delta(role="assistant", content=None, tool_calls=None), False),
        (make_delta(), False),
        (make_event({"choices": []}), False),
        (make_event({"choices": [], "prompt_filter_results": [{}]}), False),
        (make_event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}), False),
        (make_delta(content="H"), True),
        (make_delta(content=" "), True),
        (make_delta(reasoning_content="hm"), True),
        (make_delta(refusal="no"), True),
        (make_delta(tool_calls=[{"index": 0}]), False),
        (make_delta(tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]), True),
        (make_delta(content=[{"type": "text", "text": ""}]), False),
        (make_event({"choices": [{"index": 0, "text": "H"}]}), True),
        (make_event({"choices": [{"index": 0, "text": ""}]}), False),
        (make_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}), True),
        (make_event({"choices": [{"delta": {"content": ""}}, {"index": 1, "delta": {"content": "H"}}]}), True),
        (make_event({"type": "response.created", "response": {}}), False),
        (make_event({"type": "response.in_progress", "response": {}}), False),
        (make_event({"type": "response.queued", "response": {}}), False),
        (make_event({"type": "response.output_text.delta", "delta": "H"}), True),
        (make_event({"type": "response.output_item.added", "item": {"type": "message", "content": []}}), False),
        (make_event({"type": "response.output_item.added", "item": {"type": "reasoning", "summary": []}}), False),
        (make_event({"type": "response.output_item.added", "item": {"type": "function_call", "name": "f"}}), True),
        (make_event({"type": "response.content_part.added", "part": {"type": "output_text", "text": ""}}), False),
        (make_event({"type": "keepalive", "sequence_number": 3}), False),
        (make_event({"type": "response.keep_alive"}), False),
        (b": ping\n\n", False),
        (b"id: 7\n\n", False),
    ],
    ids=repr,
)
def test_content(event: bytes, has_content: bool) -> None:
    """The first token is the first event that carries a part of the answer, or its end."""
    reader = make_reader(RESPONSES if b'"type": "' in event and b'"choices"' not in event else CHAT)
    reader.read(event)
    assert reader.has_content is has_content
    assert reader.error is None


def test_has_content_stays_true() -> None:
    """Once there was content, later events do not change that."""
    reader = make_reader()
    reader.read(make_delta(content="H"))
    reader.read(make_delta(content=""))
    assert reader.has_content


@pytest.mark.parametrize("more", [b"", b"id: 7\n"])
def test_an_event_of_type_error(more: bytes) -> None:
    """It is an error even if its data has no such key."""
    reader = make_reader()
    reader.read(make_delta(content="H"))
    assert reader.read(b"event: error\n" + more + b'data: {"message": "it broke"}\n\n') == b""
    assert isinstance(reader.error, Reported)
    assert reader.error.message == "it broke"


def test_comments_are_dropped() -> None:
    """Upstream comments and events without data do not reach the client. The gateway sends its own keep-alives."""
    reader = make_reader()
    for event in (b": ping\n\n", b"\n\n", b"event: ping\n\n", b"retry: 5\n\n"):
        assert reader.read(event) == b""
    assert not reader.complete


def test_an_event_with_empty_data_is_dropped() -> None:
    """By the standard, empty data makes no event. Clients that dispatch it anyway fail to parse it."""
    reader = make_reader()
    for event in (b"data:\n\n", b"data: \n\n", b"event: ping\ndata: \n\n"):
        assert reader.read(event) == b""
        assert reader.error is None
    reader.read(make_delta(content="H"))
    assert reader.read(b"data: \n\n") == b""


@pytest.mark.parametrize("done", [b"data: [DONE]\n\n", b"data:[DONE]\r\n\r\n", b"data: [DONE] \n\n"], ids=repr)
def test_done_ends_a_chat_stream(done: bytes) -> None:
    """``[DONE]`` completes the stream and reaches the client unchanged."""
    reader = make_reader()
    reader.read(make_event({"choices": [{"index": 0, "delta": {"content": "H"}, "finish_reason": "stop"}]}))
    before = reader.complete
    assert reader.read(done) == done
    assert (before, reader.complete) == (False, True)
    assert reader.error is None


HEARTBEATS = [
    b"null",
    b"{}",
    b'""',
    b": OPENROUTER PROCESSING",
    b'{"type": "ping"}',
    b'{"type": "keepalive", "sequence_number": 3}',
    b'{"type": "response.keep_alive"}',
    b'{"object": "heartbeat"}',
    b'{"id":"c","object":"chat.completion.chunk","created":1,"model":"up","choices":null}',
    b'{"id":"c","object":"chat.completion.chunk","created":1,"model":"up"}',
]


@pytest.mark.parametrize("name", [b"", b"event: ping\n"])
@pytest.mark.parametrize("data", HEARTBEATS, ids=repr)
def test_heartbeats_are_dropped(data: bytes, name: bytes) -> None:
    """In a chat stream an event that says nothing is no content, and never reaches the client, before and after the
    first content, among plain events too."""
    plain = b'data: {"id":"c","model":"up","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    beat = name + b"data: " + data + b"\n\n"
    for pieces in ([beat, beat], [beat + plain], [plain, plain, beat, plain], [plain, plain + beat + plain]):
        reader = make_reader(model="up")
        out = b"".join(map(reader.feed, pieces))
        assert reader.error is None
        assert out == plain * b"".join(pieces).count(plain)
        assert reader.has_content == bool(out)


@pytest.mark.parametrize("data", [b"null", b"{}", b": x"])
def test_empty_events_are_dropped_everywhere(data: bytes) -> None:
    """Other streams keep an event that has a type, which clients expect, and lose those without."""
    reader = make_reader(RESPONSES)
    beat = make_event({"type": "response.keep_alive"})
    assert reader.read(beat) == beat
    assert reader.read(b"data: " + data + b"\n\n") == b""
    assert reader.error is None
    assert not reader.has_content


def test_events_of_a_relay_s_own_pass() -> None:
    """An event without choices that is neither a heartbeat nor an error passes, and is no content."""
    reader = make_reader()
    own = make_event({"event": {"type": "status", "data": {"description": "Searching"}}})
    assert reader.read(own) == own
    assert not reader.has_content
    reader.read(make_delta(content="H"))
    assert reader.read(own) == own


@pytest.mark.parametrize("usage", [b"", make_event({"choices": [], "usage": {"prompt_tokens": 1}})])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_stream_without_done(usage: bytes, cut: int) -> None:
    """Where every choice has ended, the end of the body completes the stream, and ``[DONE]`` is added. The last event
    may lack its blank line."""
    reader = make_reader()
    end = make_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    said = make_delta(content="H") + end + usage
    out = reader.feed(said[: len(said) - cut]) + reader.feed_end()
    assert (reader.complete, reader.error) == (True, None)
    assert out == said + b"data: [DONE]\n\n"
    assert reader.events == out.count(b"data:")


@pytest.mark.parametrize("ended", [[], [0], [1]])
def test_a_stream_without_done_needs_every_end(ended: list[int]) -> None:
    """Where one of the requested choices has not ended, or has not come, it is truncated."""
    reader = StreamReader(CHAT, model="m", upstream="mock", choices=2)
    reader.feed(make_delta(content="H"))
    for index in ended:
        reader.feed(make_event({"choices": [{"index": index, "delta": {}, "finish_reason": "stop"}]}))
    reader.feed_end()
    assert isinstance(reader.error, Truncated)


def test_other_streams_need_their_last_event() -> None:
    """The result of a response is in its last event, so nothing can take its place."""
    reader = make_reader(RESPONSES)
    reader.feed(make_event({"type": "response.output_text.done", "text": "H"}))
    reader.feed_end()
    assert isinstance(reader.error, Truncated)


@pytest.mark.parametrize(
    "value",
    [
        {"id": "x", "choices": None, "base_resp": {"status_code": 1002, "status_msg": "rate limit"}},
        {"code": "1302", "msg": "rate limit reached"},
        {"choices": [{"index": 0, "delta": {}, "error": {"message": "rate limit"}, "finish_reason": "error"}]},
    ],
)
@pytest.mark.parametrize("before", [b"", make_delta(content="H")])
def test_an_error_in_another_shape(before: bytes, value: object) -> None:
    """It is an error before and after the first content."""
    reader = make_reader()
    reader.feed(before)
    assert reader.feed(make_event(value)) == b""
    assert isinstance(reader.error, Reported)
    assert reader.error.status == 429
    assert "rate limit" in reader.error.message


def test_each_choice_must_end() -> None:
    """When one of two requested choices has not ended, the stream is truncated."""
    for last, complete in (([], False), ([1], True)):
        reader = StreamReader(CHAT, model="m", upstream="mock", choices=2)
        said = [
            make_event({"model": "u", "choices": [{"index": index, "delta": {"content": "H"}}]}) for index in (0, 1) * 3
        ]
        ends = [
            make_event({"choices": [{"index": index, "delta": {}, "finish_reason": "stop"}]}) for index in (0, *last)
        ]
        reader.feed(b"".join([*said, *ends, b"data: [DONE]\n\n"]))
        assert reader.complete == complete
        assert (reader.error is None) == complete


def test_a_finish_reason_is_not_the_end() -> None:
    """Usage may follow the last choice. Only ``[DONE]`` completes a chat stream, and ``[DONE]`` within a text does
    not."""
    reader = make_reader()
    reader.read(make_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
    reader.read(make_delta(content="[DONE]"))
    reader.read(make_event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}))
    assert not reader.complete
    assert reader.usage == Usage(prompt_tokens=1, completion_tokens=2)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/responses", "response.completed"),
        ("/v1/responses", "response.incomplete"),
        ("/v1/responses", "response.failed"),
        ("/v1/audio/speech", "speech.audio.done"),
    ],
)
def test_other_streams_end_with_a_type(path: str, kind: str) -> None:
    """Streams without ``[DONE]`` end with an event of a known type. That type within a text ends nothing."""
    reader = make_reader(ENDPOINTS[path])
    reader.read(make_event({"type": "response.output_text.delta", "delta": json.dumps({"type": kind})}))
    reader.read(make_event({"type": "x", "inner": {"type": kind}}))
    before = reader.complete
    last = make_event({"type": kind, "usage": {"input_tokens": 3, "output_tokens": 4}, "response": {"error": None}})
    assert reader.read(last) == last
    assert (before, reader.complete) == (False, True)
    assert reader.error is None
    assert reader.usage == Usage(prompt_tokens=3, completion_tokens=4)


def test_a_stream_of_images_may_close_after_each() -> None:
    """Each of several images has its own final event. The stream is complete if it closes after one, and it may
    continue."""
    reader = make_reader(ENDPOINTS["/v1/images/generations"])
    reader.read(make_event({"type": "image_generation.partial_image", "b64_json": "x"}))
    assert not reader.may_end
    for _ in range(2):
        reader.read(make_event({"type": "image_generation.completed", "b64_json": "x"}))
        assert (reader.may_end, reader.complete, reader.error) == (True, False, None)
    reader.read(make_event({"error": {"message": "the third failed"}}))
    assert isinstance(reader.error, Reported)


def test_usage_of_a_response_is_inside_it() -> None:
    """The responses API reports usage in ``response.usage`` of its final event."""
    reader = make_reader(RESPONSES)
    reader.read(
        make_event({"type": "response.completed", "response": {"usage": {"input_tokens": 3, "output_tokens": 4}}})
    )
    assert reader.usage == Usage(prompt_tokens=3, completion_tokens=4)


def test_the_last_usage_counts() -> None:
    """Some upstreams send a count with every event, or null until the last one. The last count is the usage."""
    reader = make_reader()
    for usage in (
        None,
        {"prompt_tokens": 3, "completion_tokens": 1},
        {"prompt_tokens": 3, "completion_tokens": 2},
        None,
    ):
        reader.read(make_event({"choices": [{"delta": {"content": "H"}}], "usage": usage}))
    assert reader.usage == Usage(prompt_tokens=3, completion_tokens=2)


@pytest.mark.parametrize("before", [[], [make_delta(content="H")]], ids=["before content", "after content"])
def test_an_error_event(before: list[bytes]) -> None:
    """An error event is kept as the reader's error with its type and code, and is not returned."""
    reader = make_reader()
    for event in before:
        reader.read(event)
    error = {"message": "out of memory", "type": "server_error", "code": 507}
    assert reader.read(b"event: error\n" + make_event({"error": error})) == b""
    assert isinstance(reader.error, Reported)
    assert reader.error.message == "out of memory"
    assert reader.error.payload == {"param": None, **error}
    assert not reader.complete


@pytest.mark.parametrize(
    ("error", "message"), [("busy", "busy"), ({}, None), ({"message": None}, "reported an error"), (5, "reported")]
)
def test_unusual_error_events(error: object, message: str | None) -> None:
    """An error of any shape gives a message. An empty one is no error."""
    reader = make_reader()
    reader.read(make_event({"error": error}))
    if message is None:
        assert reader.error is None
    else:
        assert reader.error is not None
        assert message in reader.error.message
        assert json.loads(reader.error.to_frame()[6:])["error"]["type"] == "upstream_error"


def test_the_word_error_in_a_text_is_no_error() -> None:
    """Neither a text that quotes an error event nor ``error: null`` is an error."""
    reader = make_reader()
    reader.read(make_delta(content="H"))
    for event in (make_delta(content='{"error": {"message": "no"}}'), make_event({"choices": [], "error": None})):
        assert reader.read(event) == event
    assert reader.error is None


def test_an_error_event_of_the_responses_api() -> None:
    """The error event of the responses API has its code and message beside ``type: error``, not within ``error``."""
    reader = make_reader(RESPONSES)
    reader.read(make_event({"type": "response.created", "response": {}}))
    reader.read(
        b"event: error\n" + make_event({"type": "error", "code": "server_error", "message": "busy", "param": None})
    )
    assert reader.error is not None
    assert reader.error.message == "busy"
    assert not reader.has_content


@pytest.mark.parametrize(
    "data", [b"hello", b"[1]", b'"x"', b'{"choices": ', b"[" * 100_000], ids=lambda data: repr(data)[:20]
)
def test_a_first_event_that_is_not_an_object(data: bytes) -> None:
    """Before any content, data that is not a JSON object means that the upstream does not speak this protocol."""
    reader = make_reader()
    assert reader.read(b"data: " + data + b"\n\n") == b""
    assert isinstance(reader.error, ProtocolViolation)
    assert not isinstance(reader.error, Rejected)
