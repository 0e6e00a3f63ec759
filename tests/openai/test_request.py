"""A client's request: an invalid body is refused with the field's name, and everything else passes byte for byte."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.openai.wire import CHAT, HELLO, RESPONSES, SPEECH, deep, json_values, model_ids, text
from trigate.errors import BadRequest, UnknownModel
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.request import decode_call


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
        (f' \ufeff{{"model":"m",{HELLO}}}'.encode(), None, "not JSON"),
        (f'\ufeff\ufeff{{"model":"m",{HELLO}}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"top_p":NaN}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"top_p":Infinity}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"x":[1,,2]}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"x":01}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"x":"a\nb"}}'.encode(), None, "control character U+000A must be escaped"),
        (f'{{"model":"m",{HELLO},"x":"a\0b"}}'.encode(), None, "control character U+0000 must be escaped"),
        (f'{{"model":"m",{HELLO},"x":"\\ud8"}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"x":"\\ud8zz"}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"x":"\\u12"}}'.encode(), None, "not JSON"),
        (f'{{"model":"m",{HELLO},"x":"'.encode() + b'\xff"}', None, "not UTF-8"),
        (f'{{"model":"m",{HELLO},"x":"'.encode() + b'\xed\xa0\x80"}', None, "not UTF-8"),
        (f'{{"model":"m",{HELLO}}}'.encode("utf-16"), None, "not UTF-8, but UTF-16"),
        (deep("", ""), None, ""),
        (b'{"a":' * 100_000, None, "nested too deeply"),
        (deep(f'{{"model":"m",{HELLO},"x":', "}"), None, "nested too deeply"),
        (deep('{"model":', "}"), None, "nested too deeply"),
        (deep('{"model":"m","messages":', "}"), None, "nested too deeply"),
        (deep('{"model":"m","messages":[{"role":"user","content":', "}]}"), None, "nested too deeply"),
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
        (f'{{"model":"m",{HELLO},"stream":1e999}}'.encode(), "stream", "out of range"),
        (f'{{"model":"m",{HELLO},"stream":true,"stream_options":1}}'.encode(), "stream_options", "object"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_bad_input(body: bytes, param: str | None, says: str) -> None:
    """Each malformed body is a 400 within 100 ms that says what is wrong and where."""
    started = time.perf_counter()
    with pytest.raises(BadRequest) as caught:
        decode_call(CHAT, body)
    assert time.perf_counter() - started < 0.1
    assert caught.value.status == 400
    assert caught.value.param == param
    assert says in caught.value.message
    assert len(caught.value.message) < 500


def _call(content: bytes) -> bytes:
    return b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % content


@pytest.mark.parametrize(
    "content", [rb"\u0000", "\ufeff\uffff\x7f\u2028".encode(), rb"\ud83d\ude00", rb"\/", b"\xf4\x8f\xbf\xbf"]
)
def test_text_that_json_allows(content: bytes) -> None:
    """It passes as it came: NUL, byte order marks and other characters that few programs expect."""
    body = _call(content)
    assert decode_call(CHAT, body).body_for("m") == body


@pytest.mark.parametrize(
    ("content", "stored"),
    [
        (rb"a\ud83d", rb"a\ufffd"),
        (rb"\uDE00b", rb"\ufffdb"),
        (rb"\ude00\ud83d", rb"\ufffd\ufffd"),
        (rb"\ud83d\ud83d\ude00", rb"\ufffd\ud83d\ude00"),
        (rb"\ud83d\u00e9", rb"\ufffd\u00e9"),
        (rb"\\ud83d \ud83d", rb"\\ud83d \ufffd"),
    ],
)
def test_half_a_character(content: bytes, stored: bytes) -> None:
    """JSON allows it, but it is no text: it goes on, and into a session, as U+FFFD. All other bytes stay."""
    call = decode_call(CHAT, _call(content))
    assert call.body_for("m") == _call(stored)
    assert bytes(call.fields["messages"]) in _call(stored)


def test_a_byte_order_mark() -> None:
    """It is not part of the JSON, and does not go on."""
    assert decode_call(CHAT, b"\xef\xbb\xbf" + _call(b"Hi")).body_for("m") == _call(b"Hi")


@given(st.text(st.characters(exclude_categories=()), max_size=20), st.booleans())
def test_any_text_can_be_sent_again(content: str, escaped: bool) -> None:
    """Whatever a client's JSON has for text, what is kept of it is valid JSON with as many characters."""
    quoted = json.dumps(content, ensure_ascii=escaped)[1:-1].encode(errors="surrogatepass")
    try:
        call = decode_call(CHAT, _call(quoted))
    except BadRequest:
        assert not escaped
        assert any("\ud800" <= char <= "\udfff" for char in content)
        return
    [message] = json.loads(bytes(call.fields["messages"]).decode())
    message["content"].encode()
    assert message["content"] == json.loads(f'"{quoted.decode()}"').encode("utf-16-le", "surrogatepass").decode(
        "utf-16-le", "replace"
    )


def test_a_model_id_is_bounded() -> None:
    """The id is logged and shown for every call, so its size is limited."""
    longest = "m" * 4096
    assert decode_call(CHAT, f'{{"model":"{longest}",{HELLO}}}'.encode()).model == longest
    with pytest.raises(UnknownModel) as caught:
        decode_call(CHAT, f'{{"model":"{longest}m",{HELLO}}}'.encode())
    assert (caught.value.status, caught.value.param) == (404, "model")
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=list(ENDPOINTS))
def test_each_endpoint_names_its_required_fields(endpoint: Any) -> None:
    """A missing field without which no upstream could serve the call is named. With it the call is accepted."""
    fields: dict[str, object] = {"model": "m", "messages": [{"role": "user"}], "prompt": "p", "input": "i"}
    assert decode_call(endpoint, json.dumps(fields).encode()).endpoint is endpoint
    for name in endpoint.required:
        for body in ({**fields, name: None}, {key: value for key, value in fields.items() if key != name}):
            if name in body and name in endpoint.nullable:
                assert decode_call(endpoint, json.dumps(body).encode()).choices == 1
                continue
            with pytest.raises(BadRequest) as caught:
                decode_call(endpoint, json.dumps(body).encode())
            assert caught.value.param == name


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=list(ENDPOINTS))
def test_a_call_without_a_model(endpoint: Any) -> None:
    """Where OpenAI's API allows it, it goes to ``default`` as it came, and the answer keeps the upstream's id."""
    fields: dict[str, object] = {"messages": [{"role": "user"}], "prompt": "p", "input": "i"}
    for sent in (fields, {"model": None, **fields}):
        body = json.dumps(sent).encode()
        if endpoint.model_optional:
            call = decode_call(endpoint, body)
            assert (call.model, call.public_model) == ("default", None)
            assert call.body_for("m") == body
        else:
            with pytest.raises(BadRequest) as caught:
                decode_call(endpoint, body)
            assert caught.value.param == "model"
    assert endpoint.model_optional is (endpoint.path in ("/responses", "/moderations", "/images/generations"))


@pytest.mark.parametrize("stream", [{}, {"stream": False}, {"stream": None}], ids=repr)
def test_stream_options_are_the_upstreams_to_judge(stream: dict[str, object]) -> None:
    """Also without a stream: OpenAI's document allows them, and its models differ in what they accept."""
    body = json.dumps({"model": "m", "messages": [{"role": "user"}], "stream_options": {}, **stream}).encode()
    call = decode_call(CHAT, body)
    assert not call.stream
    assert call.body_for("m") == body


def test_messages_are_checked_for_chat_only() -> None:
    """On other endpoints a field of that name passes through."""
    body = b'{"model":"m","input":"i","messages":5}'
    assert decode_call(RESPONSES, body).body_for("m") == body


@pytest.mark.parametrize(
    ("more", "stream"),
    [({}, False), ({"stream": False}, False), ({"stream": None}, False), ({"stream": True}, True)],
    ids=repr,
)
def test_stream(more: dict[str, object], stream: bool) -> None:
    """Only ``stream: true`` asks for events. Null counts as absent."""
    body = json.dumps({"model": "m", "messages": [{"role": "user"}], **more}).encode()
    assert decode_call(CHAT, body).stream is stream


def test_speech_streams_by_its_format() -> None:
    """Only audio/speech uses ``stream_format: "sse"`` to ask for events."""
    assert decode_call(SPEECH, b'{"model":"m","input":"i","stream_format":"sse"}').stream
    assert not decode_call(SPEECH, b'{"model":"m","input":"i","stream_format":"audio"}').stream
    assert not decode_call(CHAT, f'{{"model":"m",{HELLO},"stream_format":"sse"}}'.encode()).stream


def test_values_pass_through_byte_for_byte() -> None:
    """Numbers of any size and spelling, escapes, key order, inner spaces and nested duplicate keys are kept."""
    body = (
        '{"z":1.0,"a":1,"big":123456789012345678901234567890,"exp":1E+2,"huge":1e999,"model":"m","neg":-0.0,'
        '"esc":"\\u00e9\\/\\ud83d\\ude00","raw":"é","inner":{ "b" : 1 , "a":2,"b":3 },' + HELLO + "}"
    ).encode()
    call = decode_call(CHAT, body)
    assert call.body_for("m") == body
    assert call.body_for('up/"x"') == body.replace(b'"model":"m"', b'"model":"up/\\"x\\""')


def test_the_last_duplicate_key_counts() -> None:
    """Of a repeated top-level key the last value counts, for the gateway and the upstream alike."""
    call = decode_call(CHAT, f'{{"model":"a","stream":true,{HELLO},"model":"b","stream":false}}'.encode())
    assert (call.model, call.stream) == ("b", False)
    assert call.body_for("up") == f'{{"model":"up","stream":false,{HELLO}}}'.encode()


def test_white_space_around_the_body_is_allowed() -> None:
    """JSON may be surrounded by white space and may be pretty-printed."""
    body = json.dumps({"model": "m", "messages": [{"role": "user"}]}, indent=2).encode()
    assert decode_call(CHAT, b"\r\n " + body + b"\n").model == "m"


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(text, json_values, max_size=4), model_ids, model_ids, st.booleans())
def test_only_the_model_changes(more: dict[str, Any], asked: str, upstream_s: str, ascii_only: bool) -> None:
    """The upstream gets all other fields in their order, under its own model id."""
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
    """The content of messages is not in a repr, and so not in a log."""
    assert "Hello" not in repr(decode_call(CHAT, f'{{"model":"m",{HELLO}}}'.encode()))


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
def test_the_number_of_requested_choices(more: str, choices: int) -> None:
    """It is ``n`` for each prompt. A completion may have several prompts, as texts or as tokens."""
    assert decode_call(ENDPOINTS["/v1/completions"], f'{{"model":"m",{more}}}'.encode()).choices == choices
