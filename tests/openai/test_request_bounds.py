"""`trigate.openai.request_bounds`: large bodies are measured right, however they are sliced."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trigate.errors import BadRequest
from trigate.openai import request_bounds
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.request import NOTHING, decode_call, decode_large_call
from trigate.openai.request_bounds import examine, is_small

CHAT = ENDPOINTS["/v1/chat/completions"]
NAMES = ("MAX_ELEMENTS", "MAX_FIELDS", "MAX_MESSAGES", "MAX_ESCAPES", "MAX_DEPTH")

values = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('a,:[]{}"\\ü😀\n'), max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from('abc:,"\\'), inner, max_size=4),
    max_leaves=40,
)


def measured(value: Any) -> dict[str, int]:
    """Measures a value, the slow way."""
    found = {"elements": 0, "depth": 0, "arrays": 0}

    def walk(inner: Any, depth: int) -> None:
        if isinstance(inner, dict | list):
            found["depth"] = max(found["depth"], depth)
            found["elements"] += 1 + max(0, len(inner) - 1)
            if depth == 2:
                found["arrays"] = max(found["arrays"], len(inner) - 1)
            for each in inner.values() if isinstance(inner, dict) else inner:
                walk(each, depth + 1)

    walk(value, 1)
    return found


def passes(monkeypatch: pytest.MonkeyPatch, body: bytes, slice_bytes: int, **bounds: int) -> bool:
    """Whether a body is within bounds, each 10**9 unless it is given."""
    with monkeypatch.context() as patch:
        patch.setattr(request_bounds, "_SLICE_BYTES", slice_bytes)
        patch.setattr(request_bounds, "_FEW_COMMAS", -1)
        for name in NAMES:
            patch.setattr(request_bounds, name, bounds.get(name, 10**9))
        try:
            examine(body, has_messages=True)
        except BadRequest:
            return False
        return True


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text(max_size=3), values, max_size=5), st.integers(1, 60), st.booleans(), st.booleans())
def test_a_body_is_measured_right(value: dict[str, Any], slice_bytes: int, ascii_only: bool, pretty: bool) -> None:
    """Exactly at each bound it passes, and beyond it does not: strings with quotes, brackets and backslashes count for
    nothing, and slices may end anywhere."""
    body = json.dumps(value, ensure_ascii=ascii_only, indent=1 if pretty else None).encode()
    found = measured(value)
    patch = pytest.MonkeyPatch()
    for name, exactly in (
        ("MAX_ELEMENTS", found["elements"]),
        ("MAX_FIELDS", len(value)),
        ("MAX_MESSAGES", found["arrays"]),
        ("MAX_ESCAPES", body.count(b"\\")),
    ):
        assert passes(patch, body, slice_bytes, **{name: exactly}), name
        # objects and arrays that lie within one slice are not counted one by one
        beyond = slice_bytes if name in ("MAX_ELEMENTS", "MAX_ESCAPES") else 1
        assert exactly <= 0 or not passes(patch, body, beyond, **{name: exactly - 1}), name
    assert passes(patch, body, slice_bytes, MAX_DEPTH=found["depth"])


@pytest.mark.parametrize("slice_bytes", [1, 2, 3, 5, 64])
def test_bytes_that_are_not_utf8_are_found(monkeypatch: pytest.MonkeyPatch, slice_bytes: int) -> None:
    """With the reason and the place that a small body gets."""
    monkeypatch.setattr(request_bounds, "_SLICE_BYTES", slice_bytes)
    for bad in (b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98x", b"\xed\xa0\x80"):
        for body in (b'{"a":"\xc3\xbc' + bad + b'"}', b'{"a":"\xf0\x9f\x98\x80' + bad):
            with pytest.raises(UnicodeDecodeError) as expected:
                body.decode()
            with pytest.raises(BadRequest) as found:
                examine(body, has_messages=True)
            assert f"{expected.value.reason} at byte {expected.value.start}." in found.value.message


@pytest.mark.parametrize("seed", range(20))
def test_other_bytes_do_no_harm(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Bytes that are no JSON end the examination, whatever it says."""
    chance = random.Random(seed)
    body = bytes(chance.choice(b'"\\[]{},:a ') for _ in range(500))
    passes(monkeypatch, body, chance.randint(1, 50), MAX_DEPTH=100)


HELLO = '{"role":"user","content":"Hi"}'
EXAMPLES = {
    "messages": (f'"messages":[{",".join([HELLO] * 21_000)}]', "more than 20000"),
    "tools": (f'"messages":[{HELLO}],"tools":[{",".join(["{ }"] * 21_000)}]', "more than 20000"),
    "fields": (",".join(f'"k{n}":1' for n in range(11_000)) + f',"messages":[{HELLO}]', "more than 10000 fields"),
    "parts": (f'"messages":[{{"role":"user","content":[{",".join(["1"] * 510_000)}]}}]', "more than 500000"),
    "depth": (f'"messages":[{HELLO}],"a":{"[1,2," * 11_000}1{"]" * 11_000}', "nested too deeply"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_bounds_of_a_chat_request(name: str) -> None:
    """What is beyond any use is refused with the bound."""
    text, message = EXAMPLES[name]
    body = f'{{"model":"m",{text}}}'.encode()
    assert not is_small(body)
    with pytest.raises(BadRequest, match=message):
        decode_large_call(CHAT, body, NOTHING)


def test_large_requests_that_are_in_use_pass() -> None:
    """A picture, a long conversation, a text with many commas, and the largest arrays of tokens."""
    ints = ",".join(["12345"] * 300_000)
    decode_large_call(ENDPOINTS["/v1/embeddings"], f'{{"model":"m","input":[{ints}]}}'.encode(), NOTHING)
    for text in (
        f'"messages":[{{"role":"user","content":"{"A" * 2_000_000}"}}]',
        f'"messages":[{",".join([HELLO] * 15_000)}]',
        f'"messages":[{{"role":"user","content":"{"1,2;" * 200_000}"}}]',
    ):
        body = f'{{"model":"m",{text}}}'.encode()
        assert not is_small(body)
        call = decode_large_call(CHAT, body, NOTHING)
        assert call == decode_call(CHAT, body)
        assert call.body_for("x") == decode_call(CHAT, body).body_for("x") == body.replace(b'"m"', b'"x"', 1)


def test_small_bodies() -> None:
    """Ordinary bodies are not examined: neither up to 64 KiB, nor up to a mebibyte with few commas."""
    assert is_small(b"," * 65_536)
    assert not is_small(b"," * 65_537)
    assert is_small(b"a" * 2**20)
    assert not is_small(b"a" * 2**20 + b"a")


@pytest.mark.slow
@pytest.mark.parametrize("body", [b'"' + b'\\"' * 900_000, b'["' + b"\\\\" * 900_000, b"[[" * 9 + b'","' * 900_000])
def test_the_examination_takes_linear_time(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    """Also for strings that do not end, or consist of quotes."""
    began = time.thread_time()
    passes(monkeypatch, body, 65_536)
    assert time.thread_time() - began < 3
