"""Values and streams for several tests of the wire format."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from trigate.openai.endpoints import ENDPOINTS
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
# Text that a careless replacement would mistake for the key and its value.
tricky_text = st.lists(
    st.sampled_from(
        ['"model":"up"', '\\"model\\":\\"up\\"', '"model": "', '"', "\\", "model", ":", "up", "\n", "\u2028", "é"]
    )
    | text,
    max_size=6,
).map("".join)
model_ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def deep(prefix: str, suffix: str, depth: int = 100_000) -> bytes:
    return f"{prefix}{'[' * depth}{']' * depth}{suffix}".encode()


def make_event(value: object) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def make_delta(**delta: object) -> bytes:
    return make_event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


def make_reader(endpoint: Any = CHAT, *, model: str = "mock/up") -> StreamReader:
    return StreamReader(endpoint, model=model, upstream="mock")
