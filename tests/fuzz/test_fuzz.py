"""The fuzz targets: request heads, chunked bodies, JSON bodies, server-sent events, webhooks, and the configuration."""

from __future__ import annotations

import json
import random
import tomllib
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlencode

import attrs
import pytest

from tests.fuzz.mutation import in_pieces, mutated
from tests.server.test_request_parser import CHUNKED, CORPUS, PARTS, STATUSES, parse
from tests.support.provider import DONE, chunk, content, role, usage
from tests.support.slow import FULL
from tests.test_signatures import VECTORS, Vector
from trigate.config import structure as configuration
from trigate.config.sections import ConfigError, HookConfig
from trigate.errors import CallError, Unverified
from trigate.exchange.call_key import call_key_of
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.request import Call, decode_call
from trigate.openai.stream import StreamReader
from trigate.openai.token_estimate import estimated_tokens
from trigate.sessions.compose import compose
from trigate.webhooks import payload

CASES = 50_000 if FULL else 15_000

pytestmark = pytest.mark.slow


def cases(originals: list[bytes], parts: list[bytes], chance: random.Random) -> Iterator[bytes]:
    """Mutations of the originals."""
    for _ in range(CASES):
        yield mutated(chance.choice(originals), chance, parts=parts, others=originals)


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["heads", "chunked bodies"])
def test_requests(kind: str) -> None:
    """Only refusals are raised, and the segmentation makes no difference."""
    chance = random.Random(20_26)
    if kind == "heads":
        originals = [data for data in CORPUS if len(data) < 400]
    else:
        chunks = [
            *(
                b"0\r\n\r\n",
                b"1\r\na\r\n0\r\n\r\n",
                b"A;x=y\r\n0123456789\r\n0\r\nT: v\r\n\r\n",
                b"00001\r\na\r\n0\r\n\r\n",
            ),
            *(b"ffffffffffffffff\r\na", b'1;a="b\\"c"\r\na\r\n0\r\n\r\n', b"4\r\nabcd\r\n" * 5 + b"0\r\n\r\n"),
        ]
        originals = [CHUNKED + body for body in chunks]
    statuses: Counter[int | None] = Counter()
    for number, data in enumerate(cases(originals, PARTS, chance)):
        whole = parse([data])
        assert parse(in_pieces(data, chance)) == whole, (number, data)
        statuses[whole[1]] += 1
    assert set(statuses) <= STATUSES
    assert statuses.total() == CASES
    assert statuses[None] > CASES / 20  # it gets beyond the first check
    assert statuses[400] > CASES / 20


# -- JSON bodies ------------------------------------------------------------------------------------------------------

BODIES = {
    "/v1/chat/completions": {
        "model": "up/m",
        "messages": [
            {"role": "system", "content": "é\u2028"},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": {"name": "f"}}]},
            {"role": "tool", "tool_call_id": "a", "content": "1"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": 2,
        "temperature": 0.0,
        "seed": 12345678901234567890,
    },
    "/v1/completions": {"model": "m", "prompt": ["a", "b"], "n": 1},
    "/v1/embeddings": {"model": "m", "input": [1, 2, 3]},
    "/v1/responses": {"model": "m", "input": "Hi", "stream": False},
    "/v1/audio/speech": {"model": "m", "input": "Hi", "voice": "a", "stream_format": "sse"},
}
JSON_PARTS = [
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"-", b"1e999", b"0", b"NaN", b"\\", b"\\ud800"),
    *(
        b"\\u006d",
        b'"model":',
        b'"model":"x",',
        b'"messages":[],',
        b'"n":99999999999,',
        b'"role":',
        b"\xff",
        b"\0",
        b" ",
    ),
    *(b"\xef\xbb\xbf", b"\xed\xa0\x80", b"[" * 300, b'{"a":' * 300),
]


def test_json_bodies() -> None:
    """A body is refused with a 4xx, or goes upstream as JSON with another model, and nothing that is computed of it on
    the way fails."""
    chance = random.Random(20_27)
    originals = {path: json.dumps(body, ensure_ascii=False).encode() for path, body in BODIES.items()}
    accepted = 0
    for _ in range(CASES):
        path = chance.choice(list(originals))
        data = mutated(originals[path], chance, parts=JSON_PARTS, others=list(originals.values()))
        try:
            call = decode_call(ENDPOINTS[path], data)
        except CallError:
            continue
        accepted += 1
        sent = json.loads(call.body_for("other"))
        assert sent.get("model") == ("other" if "model" in call.fields else None), data
        assert estimated_tokens(data) >= 0
        assert call.choices >= 1, data
        assert call_key_of(call, {}, sampled=True) != b"", data
        if "messages" in call.endpoint.required:
            _check_messages(call)
    assert CASES / 20 < accepted < CASES * 9 / 10


def _check_messages(call: Call) -> None:
    json.loads(call.continued_from("x").body)
    composed = compose(bytes(call.fields["messages"]), system=b"[]", history=(), max_messages=9, max_tokens=9)
    whole = attrs.evolve(call.with_messages(composed.messages), remembered=range(len(composed.messages)))
    json.loads(whole.with_history_fields(("reasoning",)).body)


# -- server-sent events -----------------------------------------------------------------------------------------------

STREAMS = [
    role() + content("Hel") + content("lo\u2028") + chunk({}, finish_reason="stop") + usage(1, 2) + DONE,
    content("a").replace(b"\n", b"\r\n") + b": ping\r\n\r\n" + chunk({}, finish_reason="stop") + DONE,
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]})
    + chunk({}, finish_reason="tool_calls")
    + DONE,
    b'event: response.created\ndata: {"type":"response.created","response":{"model":"up"}}\n\n'
    b'event: x\ndata: {"type":"response.output_text.delta","delta":"a"}\n\n'
    b'data: {"type":"response.completed","response":{"model":"up","usage":{"input_tokens":1,"output_tokens":2}}}\n\n',
    b'data: {"error":{"message":"m"}}\n\n',
]
EVENT_PARTS = [
    *(b"\n", b"\r", b"\r\n", b"\n\n", b"data: ", b"data:", b": x\n", b"id: 1\n", b"retry: 5\n", b"event: x\n", DONE),
    *(
        b"[DONE]",
        b'"model":"x"',
        b'"error":{}',
        b'"usage":{}',
        b'"finish_reason":"stop"',
        b'"choices":null',
        b"\xef\xbb\xbf",
    ),
    *(b"\\ud83d", b"\xff", b"\0", b"[" * 300, b"1e999", b"data: {}\n\n", b"data: null\n\n", b'"index":99999999999'),
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_events(path: str) -> None:
    """Whatever an upstream sends is forwarded in whole events, or is an error of the upstream. The segmentation makes
    no difference."""
    chance = random.Random(20_28)
    ends: Counter[str] = Counter()
    for data in cases(STREAMS, EVENT_PARTS, chance):
        whole = _read(path, [data])
        assert _read(path, in_pieces(data, chance)) == whole, data
        ends[whole[1]] += 1
    assert ends.keys() <= {"complete", "upstream_error", "upstream_garbled", "upstream_truncated"}
    assert min(ends["complete"], ends["upstream_truncated"]) > CASES / 50


def _read(path: str, pieces: list[bytes]) -> tuple[bytes, str]:
    """What the client gets of a stream, with one kind of line ends, and how it ends. (Where a piece ends within a CRLF,
    the LF is left out: the CR has ended the line.)"""
    reader = StreamReader(ENDPOINTS[path], model="up/m", upstream="up")
    out = b""
    for piece in pieces:
        out += reader.feed(piece)
        if reader.error is not None or reader.complete:
            break
    else:
        out += reader.feed_end()
    out = out.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return out, reader.error.code if reader.error is not None else "complete" if reader.complete else "open"


# -- webhooks ---------------------------------------------------------------------------------------------------------

HEADER_PARTS = [b"v1,", b"sha256=", b"t=", b",", b" ", b"=", b"0", b"9" * 30, b"-1", b"\xff", b"\0", b"Bearer ", b"v0="]
HOOKS = [
    HookConfig(session="none"),
    HookConfig(
        session="sender",
        filter="length(@) > `0`",  # type: ignore[arg-type]
        expressions={"text": "text", "from": "from.id", "action": "action"},  # type: ignore[dict-item]
    ),
    HookConfig(session="none", expressions={"x": "*.a"}, template="{x} {text}"),  # type: ignore[dict-item]
]
MESSAGES = [
    b'{"text": "Hi", "from": {"id": 7}, "action": "chat", "callback_url": "http://a.example/"}',
    b'[{"text": 1.5}, null]',
    urlencode({"payload": '{"text": "Hi", "from": "ada"}'}).encode(),
    b"text=Hi+there&from=ada&from=bob&action=note",
]


def test_webhooks() -> None:
    """A request is verified or is not, and a body is a message or a 4xx. A changed body with the old signature is never
    verified."""
    chance = random.Random(20_29)
    verified = messages = 0
    for _ in range(CASES // 2):
        vector = chance.choice(VECTORS)
        headers, body = _mutated_request(vector, chance)
        try:
            attrs.evolve(vector, headers=headers, body=body).verify()
        except Unverified:
            continue
        verified += 1
        assert vector.scheme in ("bearer", "telegram") or body == vector.body, (headers, body)
    for _ in range(CASES // 2):
        body = mutated(chance.choice(MESSAGES), chance, parts=[*JSON_PARTS, b"&", b"=", b"%", b"+"], others=MESSAGES)
        try:
            decoded = payload.decode(body, chance.choice(["application/json", payload.FORM, "text/plain", ""]))
            messages += payload.read("h", chance.choice(HOOKS), decoded) is not None
        except CallError:
            pass
    assert 0 < verified < CASES / 2
    assert messages > CASES / 50


def _mutated_request(vector: Vector, chance: random.Random) -> tuple[dict[bytes, bytes], bytes]:
    headers = dict(vector.headers)
    if chance.random() < 0.5:
        return headers, mutated(vector.body, chance, parts=JSON_PARTS, others=[vector.body])
    name = chance.choice(list(headers))
    if chance.random() < 0.1:
        del headers[name]
    else:
        headers[name] = mutated(headers[name], chance, parts=HEADER_PARTS, others=list(headers.values()))
    return headers, vector.body


# -- the configuration ------------------------------------------------------------------------------------------------

DOCUMENTS = [
    b'[server]\nhost = "::1"\nport = 0\nworkers = 2\n',
    b'[upstreams.a]\nbase_url = "http://127.0.0.1:9/v1"\napi_key = { env = "KEY" }\n[models.m]\ntargets = ["a/x"]\n',
    b'[upstreams.e]\nkind = "echo"\nwords_per_s = 0.5\n[limits]\nidle_timeout_s = 1e3\n',
    b'[keys]\nk = "secret-secret"\n[hooks.h]\nverification = "github"\nsecrets = ["0123456789012345678901234"]\n',
    b'[hooks.h]\nexpressions = { text = "a.b" }\ntemplate = "{text}"\nfilter = "a"\n[sessions]\nhistory_tokens = 5\n',
    b'[channels.c]\ntype = "telegram"\ntoken = "t"\nallow = ["1"]\n[store]\nrun_retention_s = 0\n',
]
TOML_PARTS = [
    *(
        b"\n",
        b"=",
        b'"',
        b"'",
        b"[",
        b"]",
        b"[[",
        b"{",
        b"}",
        b",",
        b".",
        b"#",
        b'"""',
        b"\\",
        b"\\u0000",
        b"-1",
        b"1e999",
    ),
    *(
        b"inf",
        b"nan",
        b"true",
        b"1979-05-27",
        b"0x7f",
        b"9" * 30,
        b"\xff",
        b"\0",
        b"null",
        b"[upstreams.b]\n",
        b"a.b.c = 1\n",
    ),
    *(
        b'base_url = "http://[::1"\n',
        b'"http://x:99999/"',
        b'"${KEY}"',
        b'"env:KEY"',
        b'"a/"',
        b"{ file = '/nonexistent' }",
    ),
]


def test_configurations() -> None:
    """A file is a configuration, is not TOML, or has problems that are named."""
    chance = random.Random(20_30)
    results: Counter[str] = Counter()
    for data in cases(DOCUMENTS, TOML_PARTS, chance):
        try:
            document = tomllib.loads(data.decode())
        except (UnicodeDecodeError, tomllib.TOMLDecodeError):
            results["not TOML"] += 1
            continue
        try:
            configuration.structure(document, env={"KEY": "k"}, source="fuzz")
            results["valid"] += 1
        except ConfigError as error:
            results["problems" if error.problems else "no reason"] += 1
    assert results.keys() == {"not TOML", "problems", "valid"}
    assert min(results.values()) > CASES / 50
