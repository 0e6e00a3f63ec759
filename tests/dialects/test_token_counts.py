"""The requests that count a prompt, in each format."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from trigate.dialects.token_counts import count_requests, decode_count


@pytest.mark.parametrize(
    ("kind", "path", "body", "expected"),
    [
        (
            "vertex",
            "/models/m:generateContent",
            {"contents": [], "system_instruction": {}, "safetySettings": [], "toolConfig": {}},
            [("/models/m:countTokens", False, {"contents": [], "system_instruction": {}})],
        ),
        (
            "gemini",
            "/tunedModels/x:streamGenerateContent?alt=sse",
            {"contents": [], "toolConfig": {}},
            [
                (
                    "/tunedModels/x:countTokens",
                    False,
                    {"generateContentRequest": {"contents": [], "toolConfig": {}, "model": "tunedModels/x"}},
                )
            ],
        ),
        ("gemini", "/models/m:embedContent", {"content": {}}, []),
        ("anthropic", "/messages/count_tokens", {"model": "m"}, []),
        (
            "openai",
            "/responses",
            {"model": "m", "input": "Hi", "stream": True, "store": False, "max_output_tokens": 9},
            [("/responses/input_tokens", False, {"model": "m", "input": "Hi"})],
        ),
        (
            "openai",
            "/completions",
            {"model": "m", "prompt": 'a"b', "stream": True},
            [
                ("/tokenize", True, {"model": "tunedModels/x", "prompt": 'a"b'}),
                ("/tokenize", True, {"content": 'a"b', "add_special": True}),
            ],
        ),
        ("openai", "/completions", {"model": "m", "prompt": [1, 2]}, []),
        ("openai", "/completions", {"model": "m"}, []),
        ("openai", "/embeddings", {"model": "m", "input": "Hi"}, []),
    ],
)
def test_the_requests(kind: str, path: str, body: dict[str, Any], expected: list[tuple[str, bool, Any]]) -> None:
    """They have the fields that count, and no others; what cannot be counted has none."""
    found = count_requests(kind, path, msgspec.json.encode(body), "tunedModels/x")
    assert [(each.path, each.at_root, msgspec.json.decode(each.body)) for each in found] == expected


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (b'{"input_tokens":12,"object":"response.input_tokens"}', 12),
        (b'{"totalTokens":12,"promptTokensDetails":[]}', 12),
        (b'{"count":3,"max_model_len":9,"tokens":[1,2,3]}', 3),
        (b'{"tokens":[{"id":1,"piece":"a"},{"id":2,"piece":[200]}]}', 2),
        (b'{"count":-1}', None),
        (b'{"count":true}', None),
        (b'{"count":1e3}', None),
        (b'{"count":99999999999}', None),
        (b'{"tokens":"ab"}', None),
        (b"{}", None),
        (b"[5]", None),
        (b"", None),
        (b"[" * 100_000, None),
    ],
)
def test_the_answers(body: bytes, count: int | None) -> None:
    """Anything that is no count of tokens is none."""
    assert decode_count(body) == count
