"""A remembered answer goes back to a provider with the fields that it takes, and with no others."""

from __future__ import annotations

from typing import Any

import attrs
import msgspec
import pytest

from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.history_fields import history_fields_of, with_history_fields
from trigate.openai.request import decode_call

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SIGNED = {**CALL, "extra_content": {"google": {"thought_signature": "c2ln"}}}
ANSWER = {
    "role": "assistant",
    "content": None,
    "tool_calls": [SIGNED],
    "reasoning_content": "hm",
    "reasoning_details": [{"type": "reasoning.text", "text": "hm"}],
    "annotations": [{"type": "url_citation"}],
}


def sent_to(base_url: str, message: dict[str, Any]) -> Any:  # Any: JSON
    """The message as the provider at a base URL gets it."""
    return msgspec.json.decode(with_history_fields(msgspec.json.encode(message), history_fields_of(base_url)))


@pytest.mark.parametrize(
    ("base_url", "added", "signed"),
    [
        ("https://api.deepseek.com/v1", ["reasoning_content"], False),
        ("https://api.moonshot.ai/v1", ["reasoning_content"], False),
        ("https://openrouter.ai/api/v1", ["reasoning_details"], False),
        ("https://generativelanguage.googleapis.com/v1beta/openai", [], True),
        ("https://api.openai.com/v1", [], False),
        ("https://eu.openai.azure.com/openai/v1", [], False),
        ("https://api.mistral.ai/v1", [], False),
        ("https://api.cerebras.ai/v1", [], False),
        ("https://api.groq.com/openai/v1", [], False),
        ("http://127.0.0.1:8080/v1", ["reasoning_content", "reasoning_details"], True),
        ("https://api.deepseek.com.example/v1", ["reasoning_content", "reasoning_details"], True),
    ],
)
def test_each_provider(base_url: str, added: list[str], signed: bool) -> None:
    """OpenAI's own fields go to all, the others to the providers that take them. No provider gets annotations back."""
    expected = {"role": "assistant", "content": None, "tool_calls": [SIGNED if signed else CALL]}
    assert sent_to(base_url, ANSWER) == {**expected, **{name: ANSWER[name] for name in added}}


def test_other_messages() -> None:
    """Messages of users and tools are sent byte for byte, and so is an answer that has nothing to leave out."""
    for body in (
        b'{"role" : "user", "content": "Hi", "reasoning": 1, "x": 1.0}',
        b'{"role": "tool", "tool_call_id": "c", "x": 1}',
        b'{"role": "assistant" , "content": "Hi"}',
        b'{"content": "Hi", "x": 1}',
        b'{"role": "assistant", "tool_calls": 1}',
    ):
        assert msgspec.json.decode(with_history_fields(body, ())) == msgspec.json.decode(body)
    assert (
        with_history_fields(b'{"role": "assistant" , "content": "Hi"}', ())
        == b'{"role": "assistant" , "content": "Hi"}'
    )


def test_only_remembered_messages() -> None:
    """What the client sends itself stays as it is."""
    body = msgspec.json.encode({"model": "m", "messages": [ANSWER, {"role": "user", "content": "a"}, ANSWER]})
    call = attrs.evolve(decode_call(ENDPOINTS["/v1/chat/completions"], body), remembered=range(1))
    first, _, last = msgspec.json.decode(call.with_history_fields(()).fields["messages"])
    assert first == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert last == ANSWER
