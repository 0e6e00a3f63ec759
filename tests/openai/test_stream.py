"""The OpenAI wire format: what is refused by name, and what passes through byte for byte."""

from __future__ import annotations

import itertools
import json
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trigate.errors import BadRequest, ProtocolViolation, Rejected, StreamError, UnknownModel
from trigate.openai import sse
from trigate.openai.answer import Usage, decode_answer
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.request import decode_call
from trigate.openai.stream import StreamReader

CHAT = ENDPOINTS["/v1/chat/completions"]
RESPONSES = ENDPOINTS["/v1/responses"]
SPEECH = ENDPOINTS["/v1/audio/speech"]
HELLO = '"messages":[{"role":"user","content":"Hello"}]'

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
# Text that a careless replacement would take for the key and its value.
tricky_text = st.lists(
    st.sampled_from(
        ['"model":"up"', '\\"model\\":\\"up\\"', '"model": "', '"', "\\", "model", ":", "up", "\n", "\u2028", "é"]
    )
    | text,
    max_size=6,
).map("".join)
model_ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def _deep(prefix: str, suffix: str, depth: int = 100_000) -> bytes:
    return f"{prefix}{'[' * depth}{']' * depth}{suffix}".encode()


# -- the call ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b"", None, "empty"),
        (b" \r\n\t", None, "empty"),
        (b"hello", None, "not JSON"),
        (b"{", None, "not JSON"),
        (b"\x00", None, "not JSON"),
        (b"{'model': 'm'}", None, "not JSON"),
        (f'{{"model":"m",{HELLO},}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO}}} x'.encode(), None, "trailing"),
        (f'{{"model":"m",{HELLO}}}{{}}'.encode(), None, "trailing"),
        (f'{{"model":"m",{HELLO}}}\0'.encode(), None, "trailing"),
        (f'\ufeff{{"model":"m",{HELLO}}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"top_p":NaN}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"top_p":Infinity}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"x":[1,,2]}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"x":01}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"x":"a\nb"}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"x":"\\u12"}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"x":"'.encode() + b'\xff"}', None, "not UTF-8"),
        (f'{{"model":"m",{HELLO},"x":"'.encode() + b'\xed\xa0\x80"}', None, "not UTF-8"),
        (f'{{"model":"m",{HELLO}}}'.encode("utf-16"), None, "not UTF-8"),
        (_deep("", ""), None, ""),
        (b'{"a":' * 100_000, None, "nested too deeply"),
        (_deep(f'{{"model":"m",{HELLO},"x":', "}"), None, "nested too deeply"),
        (_deep('{"model":', "}"), None, "nested too deeply"),
        (_deep('{"model":"m","messages":', "}"), None, "nested too deeply"),
        (_deep('{"model":"m","messages":[{"role":"user","content":', "}]}"), None, "nested too deeply"),
        (b"[]", None, "must be a JSON object"),
        (b'"model"', None, "must be a JSON object"),
        (b"null", None, "must be a JSON object"),
        (b"1", None, "must be a JSON object"),
        (f"{{{HELLO}}}".encode(), "model", "must provide a model"),
        (f'{{"model":null,{HELLO}}}'.encode(), "model", "must provide a model"),
        (f'{{"model":"",{HELLO}}}'.encode(), "model", "non-empty"),
        (f'{{"model":5,{HELLO}}}'.encode(), "model", "string"),
        (f'{{"model":["m"],{HELLO}}}'.encode(), "model", "string"),
        (b'{"model":"m"}', "messages", "must provide messages"),
        (b'{"model":"m","messages":null}', "messages", "must provide messages"),
        (b'{"model":"m","messages": null }', "messages", "must provide messages"),
        (b'{"model":"m","messages":[]}', "messages", "at least one"),
        (b'{"model":"m","messages":{}}', "messages", "array"),
        (b'{"model":"m","messages":"Hello"}', "messages", "array"),
        (b'{"model":"m","messages":5}', "messages", "array"),
        (b'{"model":"m","messages":["Hello"]}', "messages[0]", "object"),
        (b'{"model":"m","messages":[{"role":"user"},null]}', "messages[1]", "object"),
        (b'{"model":"m","messages":[{"content":"Hello"}]}', "messages[0]", "role"),
        (b'{"model":"m","messages":[{"role":"user"},{"role":7}]}', "messages[1].role", "str"),
        (f'{{"model":"m",{HELLO},"stream":"true"}}'.encode(), "stream", "true or false"),
        (f'{{"model":"m",{HELLO},"stream":1}}'.encode(), "stream", "true or false"),
        (f'{{"model":"m",{HELLO},"stream":[]}}'.encode(), "stream", "true or false"),
        (f'{{"model":"m",{HELLO},"stream":true,"stream_options":1}}'.encode(), "stream_options", "object"),
        (f'{{"model":"m",{HELLO},"stream_options":{{}}}}'.encode(), "stream_options", "stream: true"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_bad_input(body: bytes, param: str | None, says: str) -> None:
    """Each malformed body is a 400 that says what is wrong and where, within 100 ms."""
    started = time.perf_counter()
    with pytest.raises(BadRequest) as caught:
        decode_call(CHAT, body)
    assert time.perf_counter() - started < 0.1
    assert caught.value.status == 400
    assert caught.value.param == param
    assert says in caught.value.message
    assert len(caught.value.message) < 500


def test_a_model_id_is_bounded() -> None:
    """It is logged and shown for every call, so it cannot be as large as a body."""
    longest = "m" * 4096
    assert decode_call(CHAT, f'{{"model":"{longest}",{HELLO}}}'.encode()).model == longest
    with pytest.raises(UnknownModel) as caught:
        decode_call(CHAT, f'{{"model":"{longest}m",{HELLO}}}'.encode())
    assert (caught.value.status, caught.value.param) == (404, "model")
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=list(ENDPOINTS))
def test_each_endpoint_names_what_it_needs(endpoint: Any) -> None:
    """A field without which no upstream could serve the call is asked for by name; with it the call is taken."""
    fields: dict[str, object] = {"model": "m", "messages": [{"role": "user"}], "prompt": "p", "input": "i"}
    assert decode_call(endpoint, json.dumps(fields).encode()).endpoint is endpoint
    for name in endpoint.required:
        with pytest.raises(BadRequest) as caught:
            decode_call(endpoint, json.dumps({**fields, name: None}).encode())
        assert caught.value.param == name


def test_messages_are_chat_s_alone() -> None:
    """Where messages are not the input, a field of that name is anybody's and passes through."""
    body = b'{"model":"m","input":"i","messages":5}'
    assert decode_call(RESPONSES, body).body_for("m") == body


@pytest.mark.parametrize(
    ("more", "stream"),
    [({}, False), ({"stream": False}, False), ({"stream": None}, False), ({"stream": True}, True)],
    ids=repr,
)
def test_stream(more: dict[str, object], stream: bool) -> None:
    """Only ``stream: true`` asks for events; null is as good as absent."""
    body = json.dumps({"model": "m", "messages": [{"role": "user"}], **more}).encode()
    assert decode_call(CHAT, body).stream is stream


def test_speech_streams_by_its_format() -> None:
    """``stream_format: "sse"`` is how audio/speech asks for events, and nobody else."""
    assert decode_call(SPEECH, b'{"model":"m","input":"i","stream_format":"sse"}').stream
    assert not decode_call(SPEECH, b'{"model":"m","input":"i","stream_format":"audio"}').stream
    assert not decode_call(CHAT, f'{{"model":"m",{HELLO},"stream_format":"sse"}}'.encode()).stream


def test_values_pass_through_byte_for_byte() -> None:
    """Numbers of any size and spelling, escapes, key order, inner spaces and inner duplicates are kept."""
    body = (
        '{"z":1.0,"a":1,"big":123456789012345678901234567890,"exp":1E+2,"huge":1e999,"model":"m","neg":-0.0,'
        '"esc":"\\u00e9\\/\\ud83d\\ude00","raw":"é","inner":{ "b" : 1 , "a":2,"b":3 },' + HELLO + "}"
    ).encode()
    call = decode_call(CHAT, body)
    assert call.body_for("m") == body
    assert call.body_for('up/"x"') == body.replace(b'"model":"m"', b'"model":"up/\\"x\\""')


def test_duplicate_keys_leave_one() -> None:
    """Of a repeated top-level key the last value counts, for the gateway and for the upstream alike."""
    call = decode_call(CHAT, f'{{"model":"a","stream":true,{HELLO},"model":"b","stream":false}}'.encode())
    assert (call.model, call.stream) == ("b", False)
    assert call.body_for("up") == f'{{"model":"up","stream":false,{HELLO}}}'.encode()


def test_white_space_around_the_body_is_allowed() -> None:
    """JSON may be surrounded by white space, and pretty-printed."""
    body = json.dumps({"model": "m", "messages": [{"role": "user"}]}, indent=2).encode()
    assert decode_call(CHAT, b"\r\n " + body + b"\n").model == "m"


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(text, json_values, max_size=4), model_ids, model_ids, st.booleans())
def test_only_the_model_changes(more: dict[str, Any], asked: str, upstream_s: str, ascii_only: bool) -> None:
    """Whatever other fields a call has, the upstream gets them, in their order, under its own model id."""
    fields = {**more, "model": asked, "messages": [{"role": "user"}]}
    for name in ("stream", "stream_options"):
        fields.pop(name, None)
    call = decode_call(CHAT, json.dumps(fields, ensure_ascii=ascii_only).encode())
    assert call.model == asked
    sent = json.loads(call.body_for(upstream_s))
    assert sent == {**fields, "model": upstream_s}
    assert list(sent) == list(fields)
    assert [repr(value) for value in sent.values()] == [
        repr(value) for value in {**fields, "model": upstream_s}.values()
    ]


def test_a_call_s_repr_has_no_content() -> None:
    """What people said is not in a repr, and so not in a log."""
    assert "Hello" not in repr(decode_call(CHAT, f'{{"model":"m",{HELLO}}}'.encode()))


# -- the answer -------------------------------------------------------------------------------------------------------


def test_an_answer_gets_the_public_model_id() -> None:
    """Of a JSON answer only the model changes; usage is read from it."""
    body = b'{"id":"c","model":"up","choices":[{"message":{"content":"\\"model\\":\\"up\\""}}],'
    body += b'"usage":{"prompt_tokens":3,"completion_tokens":4,"x":1.0}}'
    data, usage = decode_answer(body, model="mock/up", upstream="mock")
    assert data == body.replace(b'"model":"up"', b'"model":"mock/up"', 1)
    assert usage == Usage(prompt_tokens=3, completion_tokens=4)


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(text, json_values, max_size=4), model_ids)
def test_an_answer_is_otherwise_untouched(more: dict[str, Any], public: str) -> None:
    """Any answer keeps every field but its top-level model; without one it is passed on as it came."""
    more.pop("model", None)
    more["object"] = "x"
    body = json.dumps(more).encode()
    assert decode_answer(body, model=public, upstream="mock")[0] == body
    data, _ = decode_answer(json.dumps({**more, "model": "up"}).encode(), model=public, upstream="mock")
    assert json.loads(data) == {**more, "model": public}


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4}, (3, 4)),
        ({"input_tokens": 3, "output_tokens": 4}, (3, 4)),
        ({"prompt_tokens": 3, "total_tokens": 3}, (3, 0)),
        ({"prompt_tokens": "3", "completion_tokens": 4}, None),
        ({"prompt_tokens": True, "completion_tokens": 4}, None),
        ({}, None),
        (None, None),
        ([3, 4], None),
    ],
    ids=repr,
)
def test_usage(usage: object, read: tuple[int, int] | None) -> None:
    """Counts are read in both spellings; what is not a count is no usage, and never an error."""
    body = json.dumps({"object": "x", "usage": usage}).encode()
    expected = Usage(prompt_tokens=read[0], completion_tokens=read[1]) if read else None
    assert decode_answer(body, model="m", upstream="mock")[1] == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b'"ok"',
        b'{"object": ',
        b'{"error": {"message": "busy"}}',
        b'{"error": "busy"}',
        b'{"object": "\xff"}',
        b'{"object": "\\ud83d"',
        b'{"object": "\\ud83d", "x": \xff}',
        _deep("", ""),
    ],
    ids=lambda body: repr(body)[:30],
)
def test_an_answer_that_is_none(body: bytes) -> None:
    """Under a 200, what is not a JSON object, and an error object, is the provider's failure."""
    with pytest.raises(ProtocolViolation, match="mock"):
        decode_answer(body, model="m", upstream="mock")


def test_an_answer_that_is_merely_odd() -> None:
    """A byte order mark is dropped; half a surrogate pair, as it is where an emoji was cut, passes through."""
    body = b'{"model": "up", "choices": [{"text": "\\ud83d"}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}'
    data, usage = decode_answer(b"\xef\xbb\xbf" + body, model="m", upstream="mock")
    assert data == body.replace(b"up", b"m")
    assert usage == Usage(prompt_tokens=3, completion_tokens=4)
    twice = body[:-1] + b', "x": {"model": "up"}}'
    assert json.loads(decode_answer(twice, model="m", upstream="mock")[0]) == {**json.loads(twice), "model": "m"}


def test_a_null_error_is_no_error() -> None:
    """Answers of the responses API carry ``error: null``."""
    body = b'{"object":"response","error":null}'
    assert decode_answer(body, model="m", upstream="mock") == (body, None)


# -- the stream -------------------------------------------------------------------------------------------------------


def _event(value: object) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def _delta(**delta: object) -> bytes:
    return _event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


def _reader(endpoint: Any = CHAT, *, model: str = "mock/up") -> StreamReader:
    return StreamReader(endpoint, model=model, upstream="mock")


@pytest.mark.parametrize(
    ("event", "has_content"),
    [
        (_delta(role="assistant", content=""), False),
        (_delta(role="assistant"), False),
        (_delta(role="assistant", content=None, tool_calls=None), False),
        (_delta(), False),
        (_event({"choices": []}), False),
        (_event({"choices": [], "prompt_filter_results": [{}]}), False),
        (_event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}), False),
        (_delta(content="H"), True),
        (_delta(content=" "), True),
        (_delta(reasoning_content="hm"), True),
        (_delta(refusal="no"), True),
        (_delta(tool_calls=[{"index": 0}]), True),
        (_event({"choices": [{"index": 0, "text": "H"}]}), True),
        (_event({"choices": [{"index": 0, "text": ""}]}), False),
        (_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}), True),
        (_event({"choices": [{"delta": {"content": ""}}, {"index": 1, "delta": {"content": "H"}}]}), True),
        (_event({"type": "response.created", "response": {}}), False),
        (_event({"type": "response.in_progress", "response": {}}), False),
        (_event({"type": "response.queued", "response": {}}), False),
        (_event({"type": "response.output_text.delta", "delta": "H"}), True),
        (b": ping\n\n", False),
        (b"id: 7\n\n", False),
    ],
    ids=repr,
)
def test_content(event: bytes, has_content: bool) -> None:
    """The first token is the first event with something of the answer in it, or the end of it."""
    reader = _reader()
    reader.read(event)
    assert reader.has_content is has_content
    assert reader.error is None


def test_content_stays() -> None:
    """Once there was content there was content."""
    reader = _reader()
    reader.read(_delta(content="H"))
    reader.read(_delta(content=""))
    assert reader.has_content


@pytest.mark.parametrize("more", [b"", b"id: 7\n"])
def test_an_event_that_is_named_error(more: bytes) -> None:
    """It is an error also where no key of its data says so."""
    reader = _reader()
    reader.read(_delta(content="H"))
    assert reader.read(b"event: error\n" + more + b'data: {"message": "it broke"}\n\n') == b""
    assert isinstance(reader.error, StreamError)
    assert reader.error.message == "it broke"


def test_comments_are_dropped() -> None:
    """An upstream's comments, and events without data, are not for the client: the gateway sends its own keep-alive."""
    reader = _reader()
    for event in (b": ping\n\n", b"\n\n", b"event: ping\n\n", b"retry: 5\n\n"):
        assert reader.read(event) == b""
    assert not reader.complete


def test_an_event_with_empty_data_is_dropped() -> None:
    """Data that is empty makes no event by the standard: clients that dispatch it all the same fail to parse it."""
    reader = _reader()
    for event in (b"data:\n\n", b"data: \n\n", b"event: ping\ndata: \n\n"):
        assert reader.read(event) == b""
        assert reader.error is None
    reader.read(_delta(content="H"))
    assert reader.read(b"data: \n\n") == b""


@pytest.mark.parametrize("done", [b"data: [DONE]\n\n", b"data:[DONE]\r\n\r\n", b"data: [DONE] \n\n"], ids=repr)
def test_done_ends_a_chat_stream(done: bytes) -> None:
    """``[DONE]`` completes the stream, and goes to the client as it came."""
    reader = _reader()
    reader.read(_event({"choices": [{"index": 0, "delta": {"content": "H"}, "finish_reason": "stop"}]}))
    before = reader.complete
    assert reader.read(done) == done
    assert (before, reader.complete) == (False, True)
    assert reader.error is None


@pytest.mark.parametrize(
    ("more", "choices"),
    [
        ('"prompt":"a"', 1),
        ('"prompt":"a","n":2', 2),
        ('"prompt":["a","b"]', 2),
        ('"prompt": [ "a" , "b" ] ,"n":3', 6),
        ('"prompt":[[1,2],[3]]', 2),
        ('"prompt":[1,2,3]', 1),
        ('"prompt":[],"n":"x"', 1),
    ],
)
def test_how_many_choices_are_asked_for(more: str, choices: int) -> None:
    """``n`` for each prompt, of which a completion may have several, as texts or as tokens."""
    assert decode_call(ENDPOINTS["/v1/completions"], f'{{"model":"m",{more}}}'.encode()).choices == choices


def test_each_choice_has_to_end() -> None:
    """Of two that were asked for, one that has not ended is a stream that was cut."""
    for last, complete in (([], False), ([1], True)):
        reader = StreamReader(CHAT, model="m", upstream="mock", choices=2)
        said = [
            _event({"model": "u", "choices": [{"index": index, "delta": {"content": "H"}}]}) for index in (0, 1) * 3
        ]
        ends = [_event({"choices": [{"index": index, "delta": {}, "finish_reason": "stop"}]}) for index in (0, *last)]
        reader.feed(b"".join([*said, *ends, b"data: [DONE]\n\n"]))
        assert reader.complete == complete
        assert (reader.error is None) == complete


def test_a_finish_reason_is_not_the_end() -> None:
    """Usage may follow the last choice: only ``[DONE]`` completes a chat stream, and ``[DONE]`` in a text does not."""
    reader = _reader()
    reader.read(_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
    reader.read(_delta(content="[DONE]"))
    reader.read(_event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}))
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
    """Streams without ``[DONE]`` end with an event of a known type; that type inside a text ends nothing."""
    reader = _reader(ENDPOINTS[path])
    reader.read(_event({"type": "response.output_text.delta", "delta": json.dumps({"type": kind})}))
    reader.read(_event({"type": "x", "inner": {"type": kind}}))
    before = reader.complete
    last = _event({"type": kind, "usage": {"input_tokens": 3, "output_tokens": 4}, "response": {"error": None}})
    assert reader.read(last) == last
    assert (before, reader.complete) == (False, True)
    assert reader.error is None
    assert reader.usage == Usage(prompt_tokens=3, completion_tokens=4)


def test_a_stream_of_images_may_close_after_each() -> None:
    """Several images each have their own last event: the stream is whole if it closes after one, or it goes on."""
    reader = _reader(ENDPOINTS["/v1/images/generations"])
    reader.read(_event({"type": "image_generation.partial_image", "b64_json": "x"}))
    assert not reader.may_end
    for _ in range(2):
        reader.read(_event({"type": "image_generation.completed", "b64_json": "x"}))
        assert (reader.may_end, reader.complete, reader.error) == (True, False, None)
    reader.read(_event({"error": {"message": "the third failed"}}))
    assert isinstance(reader.error, StreamError)


def test_usage_of_a_response_is_inside_it() -> None:
    """The responses API reports usage in ``response.usage`` of its last event."""
    reader = _reader(RESPONSES)
    reader.read(_event({"type": "response.completed", "response": {"usage": {"input_tokens": 3, "output_tokens": 4}}}))
    assert reader.usage == Usage(prompt_tokens=3, completion_tokens=4)


def test_the_last_usage_counts() -> None:
    """Some upstreams count along with every event, or send null until the last: the last count is the usage."""
    reader = _reader()
    for usage in (
        None,
        {"prompt_tokens": 3, "completion_tokens": 1},
        {"prompt_tokens": 3, "completion_tokens": 2},
        None,
    ):
        reader.read(_event({"choices": [{"delta": {"content": "H"}}], "usage": usage}))
    assert reader.usage == Usage(prompt_tokens=3, completion_tokens=2)


@pytest.mark.parametrize("before", [[], [_delta(content="H")]], ids=["before content", "after content"])
def test_an_error_event(before: list[bytes]) -> None:
    """An error event is kept as the reader's error, its own type and code with it, and not returned."""
    reader = _reader()
    for event in before:
        reader.read(event)
    error = {"message": "out of memory", "type": "server_error", "code": 507}
    assert reader.read(b"event: error\n" + _event({"error": error})) == b""
    assert isinstance(reader.error, StreamError)
    assert reader.error.message == "out of memory"
    assert reader.error.payload == {"param": None, **error}
    assert not reader.complete


@pytest.mark.parametrize(
    ("error", "message"), [("busy", "busy"), ({}, None), ({"message": None}, "sent an error"), (5, "5")]
)
def test_odd_error_events(error: object, message: str | None) -> None:
    """An error of any shape has a message; an empty one is no error."""
    reader = _reader()
    reader.read(_event({"error": error}))
    if message is None:
        assert reader.error is None
    else:
        assert reader.error is not None
        assert message in reader.error.message
        assert json.loads(reader.error.to_frame()[6:])["error"]["type"] == "upstream_error"


def test_the_word_error_in_a_text_is_no_error() -> None:
    """Neither text that quotes an error event, nor ``error: null``, is an error."""
    reader = _reader()
    reader.read(_delta(content="H"))
    for event in (_delta(content='{"error": {"message": "no"}}'), _event({"choices": [], "error": None})):
        assert reader.read(event) == event
    assert reader.error is None


def test_an_error_event_of_the_responses_api() -> None:
    """The responses API's error event has its code and message beside ``type: error``, not inside ``error``."""
    reader = _reader(RESPONSES)
    reader.read(_event({"type": "response.created", "response": {}}))
    reader.read(b"event: error\n" + _event({"type": "error", "code": "server_error", "message": "busy", "param": None}))
    assert reader.error is not None
    assert reader.error.message == "busy"
    assert not reader.has_content


@pytest.mark.parametrize(
    "data", [b"hello", b"[1]", b'"x"', b'{"choices": ', b"[" * 100_000], ids=lambda data: repr(data)[:20]
)
def test_a_first_event_that_is_not_an_object(data: bytes) -> None:
    """Before any content, data that is not a JSON object means that the upstream speaks something else."""
    reader = _reader()
    assert reader.read(b"data: " + data + b"\n\n") == b""
    assert isinstance(reader.error, ProtocolViolation)
    assert not isinstance(reader.error, Rejected)


def test_every_event_gets_the_public_model_id() -> None:
    """The upstream's id is replaced in each event, whatever its spelling; every other byte stays."""
    reader = _reader(model="my/model")
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
    reader = _reader()
    text = json.dumps({"choices": [{"delta": {"content": "a"}}], "model": "up"}, indent=1)
    event = "".join(f"data: {line}\n" for line in text.split("\n")).encode() + b"\n"
    [out] = sse.EventSplitter(max_event_bytes=1000).feed(reader.read(event))
    assert json.loads(sse.data_of(out) or b"") == {**json.loads(text), "model": "mock/up"}


def test_a_response_s_model_is_replaced_inside_it() -> None:
    """In the responses API the model stands inside ``response``."""
    out = _reader(RESPONSES).read(_event({"type": "response.created", "response": {"id": "r", "model": "up"}}))
    assert json.loads(out[6:])["response"]["model"] == "mock/up"


def test_an_event_without_a_model_is_untouched() -> None:
    """No model is added where the upstream sent none."""
    event = _delta(content="a")
    assert _reader().read(event) == event


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
    """Whatever a text quotes, and in whatever order the keys come, only the model id changes."""
    reader = _reader(model=public)
    for content, order in events:
        choices = [{"index": 0, "delta": {"content": content, "tool_calls": [{"function": {"arguments": content}}]}}]
        values = {"id": content, "choices": choices, "model": upstream_s}
        chunk = {name: values[name] for name in order}
        out = reader.read(_event(json.dumps(chunk, ensure_ascii=ascii_only, separators=separators).encode()))
        assert reader.error is None
        found = json.loads(sse.data_of(out) or b"")
        assert found == {**chunk, "model": public}
        assert list(found) == order


@pytest.mark.parametrize("order", [("model", "choices"), ("choices", "model")], ids=" before ".join)
@pytest.mark.parametrize(
    "inner", [{"model": "whisper"}, {"model": "up"}, {'"model': "up"}], ids=["another", "the same", "a quoted key"]
)
def test_a_model_inside_the_content_is_not_the_stream_s(inner: dict[str, str], order: tuple[str, str]) -> None:
    """A ``model`` deeper in an event belongs to whatever it is in: only the top-level one is replaced."""
    values = {"model": "up", "choices": [{"delta": {"content": "a", "x": inner}}]}
    chunk = {name: values[name] for name in order}
    out = _reader().read(_event(chunk))
    assert json.loads(out[6:]) == {**chunk, "model": "mock/up"}


# -- a stream, wherever its pieces were split -------------------------------------------------------------------------


def _chunk(content: str = "a", *, ids: str = "c-1", created: int = 1, model: str = "up", **more: object) -> bytes:
    choices = [{"index": 0, "delta": {"content": content}, "finish_reason": None}]
    value = {"id": ids, "created": created, "model": model, "choices": choices, **more}
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


_PLAIN = _chunk("plain")
_ODD = [
    _PLAIN,
    _chunk('"model":"up"'),
    _chunk('the "error" and the "usage"'),
    _chunk("data: [DONE]"),
    _chunk("[DONE]"),
    _chunk("ein\u2028Wort\u0085", usage=None),
    _chunk(usage=None),
    _chunk(usage={"prompt_tokens": 1, "completion_tokens": 2}),
    _chunk(ids="c-2"),
    _chunk(created=2),
    _chunk(model="up-2"),
    _chunk(model="u"),
    _chunk(x={"model": "up"}),
    _chunk(x=["model", "up"]),
    _chunk(error=None),
    _chunk("response.completed"),
    _PLAIN.replace(b'"model"', b'"\\u006dodel"'),
    _PLAIN[:-1] + b',"\\u006dodel":"up-3"}',
    _PLAIN[:-1] + b',"mode\\u006C":"up-3"}',
    _PLAIN[:-1] + b',"t":"\\u006a"}',
    _PLAIN[:-1] + b',"usage":null',  # not JSON
    _PLAIN[:-1] + b',"\\u0065rror":{"message":"m"},"usage":null}',
    _PLAIN[:-1] + b',"usage": null}',
    _PLAIN.replace(b'"up"', b'"up"usage":1'),
    _PLAIN.replace(b'"up"', b'"up"model":1'),
    _PLAIN.replace(b":", b": "),
    _PLAIN[:-1] + b', "model": "up-3"}',
    _PLAIN[:-1] + b',"a\rb": 1}',
    b'{"x":{"model":"up"},"choices":[{"delta":{"content":"nested"}}]}',
    b'{"choices":[{"delta":{"content":"first"}}],"model":"up"}',
    b'{"choices":[{"delta":{"content":"none"}}]}',
    b'{"choices":[{"delta":{"role":"assistant"}}],"model":"up"}',
    b'[{"model":"up"}]',
    b'{"type":"response.created","response":{"model":"up"}}',
    b'{"type":"response.output_text.delta","delta":"response.completed"}',
    b"5",
    b"",
]
_RARE = [
    b"[DONE]",
    b'{"error":{"message":"m"}}',
    _chunk(error={"message": "m"}),
    b'{"type":"response.completed","response":{"model":"up","usage":{"input_tokens":1,"output_tokens":2}}}',
    _chunk("long" * 200),
]
_LAYOUTS = [
    *(b"data: %b\n\n", b"data:%b\n\n", b"data: %b\r\n\r\n", b"data: %b\r\r", b"data: %b\r\n\n", b"data: %b\r\n\r\n\n"),
    *(b"data: %b\n\n\n", b"data: %b\n\n\n\n", b"\ndata: %b\n\n", b"data: %b\r: x\n\n", b"data: %b\rid: 1\n\n"),
    *(b"id: 1\ndata: %b\n\n", b"data: %b\nid: 1\n\n", b"event: x\ndata: %b\n\n", b": ping\n\ndata: %b\n\n"),
    *(b': "model":"up"\ndata: %b\n\n', b"data: %b\ndata: \n\n"),
]
_events = st.builds(
    lambda layout, data: layout % data,
    st.one_of(*[st.just(_LAYOUTS[0])] * 2, st.sampled_from(_LAYOUTS)),
    st.one_of(*[st.sampled_from(_ODD)] * 9, st.sampled_from(_RARE)),
)
_streams = st.builds(
    lambda opening, events, end: opening + b"".join(events) + end,
    st.sampled_from([b"", b"\xef\xbb\xbf", b": ping\n\n", b"data: " + _PLAIN + b"\n\n"]),
    st.lists(_events | st.just(b"data: " + _PLAIN + b"\n\n"), max_size=10),
    st.sampled_from([b"", b"data: [DONE]\n\n", b"data: [DONE]", b"data: [DONE]\n", b"data: " + _PLAIN, b"\n"]).flatmap(
        lambda end: st.sampled_from([end, _event({"choices": [{"delta": {}, "finish_reason": "stop"}]}) + end])
    ),
)


class _SlowReader(StreamReader):
    """Takes each event apart."""

    def _plain(self, piece: bytes) -> None:
        return None


def _fed(pieces: list[bytes], endpoint: Any, kind: type[StreamReader], max_bytes: int) -> tuple[bytes, list[object]]:
    """What a reader makes of a stream: what goes to the client, and all that can be known afterwards."""
    reader = kind(endpoint, model="pub/lic", upstream="mock", max_event_bytes=max_bytes)
    out = []
    for piece in pieces:
        out.append(reader.feed(piece))
        if reader.complete or reader.error is not None:
            break
    else:
        out.append(reader.feed_end())
    known = [reader.complete, reader.may_end, reader.has_content, reader.usage, reader.events, repr(reader.error)]
    given_out = b"".join(out)
    if any(b"\r" in piece for piece in pieces):
        # An event that was split between its last CR and LF has been given out without that LF: it is the same event.
        given_out = re.sub(rb"\n\n+", b"\n\n", given_out.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
    return given_out, known


def _split(data: bytes, at: list[int]) -> list[bytes]:
    cuts = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[start:end] for start, end in itertools.pairwise(cuts)]


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(_streams, st.sampled_from([CHAT, RESPONSES]), st.lists(st.integers(0, 2**12), max_size=8), st.data())
def test_it_is_all_the_same_how_a_stream_is_split(stream: bytes, endpoint: Any, at: list[int], data: Any) -> None:
    """Fed whole, byte by byte, event by event or split at random, by the short way for plain events or without it: the
    same bytes go to the client, and the same is known."""
    max_bytes = data.draw(st.sampled_from([2**20, 700]))
    ends = [place for place in range(1, len(stream)) if stream[:place].endswith(b"\n\n")]
    expected = _fed([stream], endpoint, _SlowReader, max_bytes)
    ways = {
        "whole": [stream],
        "byte by byte": _split(stream, list(range(len(stream)))),
        "event by event": _split(stream, ends),
        "some events at once": _split(stream, data.draw(st.lists(st.sampled_from(ends), max_size=4)) if ends else []),
        "at random": _split(stream, at),
    }
    for way, pieces in ways.items():
        assert _fed(pieces, endpoint, StreamReader, max_bytes) == expected, way
        assert _fed(pieces, endpoint, _SlowReader, max_bytes) == expected, way


@pytest.mark.slow
def test_each_oddity_between_plain_events() -> None:
    """Each odd event, in each way to write it down, ends up as when every event is taken apart: before, behind and
    between plain ones, alone or in one piece with them."""
    plain = b"data: " + _PLAIN + b"\n\n"
    for layout in _LAYOUTS:
        for data in _ODD + _RARE:
            odd = layout % data
            expected = _fed([plain * 3 + odd + plain * 2], CHAT, _SlowReader, 2**20)
            at = odd.find(b"\n") + 2
            for pieces in (
                [plain, plain * 2, odd, plain, plain],
                [plain, plain, plain + odd + plain, plain],
                [plain, plain * 2, odd[:at], odd[at:], plain, plain],
            ):
                assert _fed(pieces, CHAT, StreamReader, 2**20) == expected, odd


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([data for data in _ODD if data.startswith(b"{")]), max_size=6), st.booleans())
def test_exactly_the_model_is_replaced(found: list[bytes], one_piece: bool) -> None:
    """Whatever else is in a stream: the JSON of each event is what it was, but for the model at its top level or that
    of its ``response``; and where no key is escaped, so is every other byte."""
    found = [_PLAIN, *(data for data in found if _is_json(data) and not json.loads(data).get("error"))]
    pieces = [b"data: " + data + b"\n\n" for data in found]
    reader = StreamReader(CHAT, model="pub/lic", upstream="mock")
    out = b"".join(reader.feed(piece) for piece in ([b"".join(pieces)] if one_piece else pieces))
    assert reader.error is None
    given_out = out.split(b"\n\n")
    assert given_out.pop() == b""
    assert len(given_out) == len(found)
    for before, after in zip(found, given_out, strict=True):
        value = json.loads(before)
        holder = value if "model" in value or "response" not in value else value["response"]
        if "model" in holder:
            holder["model"] = "pub/lic"
        assert json.loads(after.removeprefix(b"data: ")) == value
        if b"\\u006" not in before and before.count(b'"model"') == 1 and b'{"model"' not in before:
            was = next(raw for raw in (b'"up"', b'"up-2"', b'"u"') if b'"model":' + raw in before.replace(b": ", b":"))
            assert after == b"data: " + before.replace(was, b'"pub/lic"', 1)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def test_plain_events_take_the_short_way() -> None:
    """Else the tests above prove nothing about it: it is taken by each piece of plain events after the first."""
    taken = []

    class Reader(StreamReader):
        def _plain(self, piece: bytes) -> bytes | None:
            taken.append(super()._plain(piece))
            return taken[-1]

    reader = Reader(CHAT, model="pub/lic", upstream="mock")
    event = b"data: " + _PLAIN + b"\n\n"
    for piece in (event, event, event * 3, event + b": ping\n\n", event):
        reader.feed(piece)
    public = event.replace(b'"up"', b'"pub/lic"')
    assert taken == [public, public * 3, None, public]


def test_what_came_before_an_event_too_large_is_given_out() -> None:
    """The bound refuses that event, and takes none of the whole ones before it away, also where all came together."""
    event = b"data: " + _PLAIN + b"\n\n"
    for pieces in ([event * 2 + b"data: " + b"x" * 500], [event, event, b"data: " + b"x" * 500]):
        reader = StreamReader(CHAT, model="up", upstream="mock", max_event_bytes=300)
        assert b"".join(map(reader.feed, pieces)) == event * 2
        assert isinstance(reader.error, ProtocolViolation)


def test_an_event_on_several_lines_stays_one() -> None:
    """Taken apart and put together again, an object over several ``data`` lines has each of its lines in ``data``."""
    value = {"choices": [{"delta": {"content": "a"}, "model": "inner"}], "model": "up"}
    event = "".join(f"data: {line}\n" for line in json.dumps(value, indent=1).split("\n")).encode() + b"\n"
    out = _reader().read(event)
    assert json.loads(sse.data_of(out) or b"") == {**value, "model": "mock/up"}
