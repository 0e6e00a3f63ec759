"""Which calls belong together."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import pytest

from trigate.dialects.endpoints import ENDPOINTS
from trigate.exchange.affinity_key import affinity_key_of
from trigate.openai.request import decode_call

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


def key_of(
    body: dict[str, Any] | None = None,
    *,
    path: str = "chat/completions",
    owner: str = "o",
    affinity: Literal["session", "prefix"] = "session",
    header: tuple[str, str] | None = None,
) -> bytes | None:
    """The key of a call."""
    call = decode_call(ENDPOINTS[f"/v1/{path}"], msgspec.json.encode({"model": "m", **(body or HI)}))
    given = {header[0].encode(): header[1].encode()} if header is not None else {}
    return affinity_key_of(call, given, owner=owner, affinity=affinity)


@pytest.mark.parametrize(
    "name",
    ["x-session-key", "x-claude-code-session-id", "session-id", "thread-id", "x-session-affinity", "x-session-id"],
)
def test_a_header_names_the_conversation(name: str) -> None:
    """Its calls belong together, however they begin; those of another one do not, however alike they are."""
    other = {"messages": [{"role": "user", "content": "Something else"}]}
    assert key_of(header=(name, "1")) == key_of(other, header=(name, "1"))
    assert key_of(header=(name, "1")) != key_of(header=(name, "2"))
    assert key_of(header=(name, "")) == key_of()
    assert key_of(affinity="prefix", header=(name, "1")) == key_of(affinity="prefix")


def test_a_field_names_the_conversation() -> None:
    """``prompt_cache_key``, and what Claude Code puts into ``metadata``. A header of a session comes first."""
    for fields in ({"prompt_cache_key": "1"}, {"metadata": {"user_id": '{"session_id": "1"}'}}):
        key = key_of({**HI, **fields})
        assert key == key_of({**fields, "messages": [{"role": "user", "content": "x"}]})
        assert key != key_of()
        assert key_of({**HI, **fields}, header=("session-id", "s")) == key_of(header=("session-id", "s"))
    assert key_of({**HI, "prompt_cache_key": 5, "metadata": [1]}) == key_of()
    assert key_of({**HI, "prompt_cache_key": "1"}, header=("x-session-id", "s")) == key_of(
        {**HI, "prompt_cache_key": "1"}
    )


@pytest.mark.parametrize(
    ("path", "first", "second", "other"),
    [
        (
            "chat/completions",
            {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]},
            {
                "messages": [
                    {"role": "system", "content": [{"type": "text", "text": "S"}]},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Yes?"},
                    {"role": "user", "content": "More"},
                ]
            },
            {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Ho"}]},
        ),
        (
            "messages",
            {
                "max_tokens": 1,
                "system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=1;"}, {"text": "S"}],
                "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"a": 1}}]}],
            },
            {
                "max_tokens": 1,
                "system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=2;"}, {"text": "S"}],
                "messages": [{"role": "user", "content": "Hi"}, {"role": "system", "content": "now"}],
            },
            {"max_tokens": 1, "system": "T", "messages": [{"role": "user", "content": "Hi"}]},
        ),
        (
            "responses",
            {"instructions": "I", "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]},
            {"instructions": "I", "input": [{"role": "user", "content": "Hi"}, {"type": "reasoning"}]},
            {"instructions": "I", "input": "Ho"},
        ),
        ("completions", {"prompt": "x" * 2000 + "a"}, {"prompt": "x" * 2000 + "b"}, {"prompt": "y"}),
    ],
    ids=["chat", "messages", "responses", "completions"],
)
def test_the_beginning_identifies_a_conversation(
    path: str, first: dict[str, Any], second: dict[str, Any], other: dict[str, Any]
) -> None:
    """The instructions and the first message of the user; not what moves or changes from call to call."""
    affinities: tuple[Literal["session", "prefix"], ...] = ("session", "prefix")
    for affinity in affinities:
        keys = [key_of(body, path=path, affinity=affinity) for body in (first, second, other)]
        assert keys[0] is not None
        assert keys[0] == keys[1] != keys[2]


def test_a_conversation_has_one_owner_and_one_model() -> None:
    """Nobody shares one with another key by its name."""
    assert key_of(owner="a") != key_of(owner="b")
    assert key_of(owner="a", header=("session-id", "s")) != key_of(owner="b", header=("session-id", "s"))
    assert key_of({**HI, "model": "n"}, header=("session-id", "s")) != key_of(header=("session-id", "s"))


@pytest.mark.parametrize("body", [{"input": [1, 2]}, {"input": [[1], [2]]}])
def test_a_call_of_no_conversation(body: dict[str, Any]) -> None:
    """Calls without a beginning have no key."""
    assert key_of(body, path="embeddings") is None
