"""Text is estimated by its size, and media at a fixed price, wherever they are in a body."""

from __future__ import annotations

import base64
import random

import msgspec
import pytest

from trigate.openai.token_estimate import MEDIUM_TOKENS, estimated_tokens

PHOTO = base64.b64encode(random.Random(1).randbytes(120_000)).decode()
PROSE = "Hello, this is a text of several words. " * 500


def of(*parts: object) -> int:
    """The estimate of a message with these content parts."""
    return estimated_tokens(msgspec.json.encode({"role": "user", "content": parts}))


def test_text() -> None:
    """Four bytes count as a token, rounded up, in any script and in any encoding."""
    assert [estimated_tokens(b"x" * size) for size in (0, 1, 4, 5)] == [0, 1, 1, 2]
    for text in (PROSE, "日本語の文章です。" * 500, "def f(x):\n    return x[1:] + g(x)\n" * 500):
        body = msgspec.json.encode({"role": "user", "content": text})
        assert estimated_tokens(body) == -(-len(body) // 4)
        assert estimated_tokens(ascii(text).encode()) == -(-len(ascii(text)) // 4)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{PHOTO}"}},
        {"type": "input_image", "detail": "auto", "image_url": f"data:image/jpeg;base64,{PHOTO}"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PHOTO}},
        {"type": "input_audio", "input_audio": {"data": PHOTO, "format": "wav"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PHOTO}"}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "image_url", "image_url": {"detail": "low", "url": "https://example.com/a.png"}},
        {"type": "input_image", "image_url": "https://example.com/a.png"},
        {"type": "file", "file": {"file_id": "file-1"}},
    ],
    ids=str,
)
def test_media(part: dict[str, object]) -> None:
    """A picture, a sound or a file counts once, however it is given and however slashes are written."""
    for count in (1, 2):
        parts = [part] * count
        assert MEDIUM_TOKENS * count < of(*parts) < MEDIUM_TOKENS * count + 100
        escaped = msgspec.json.encode({"content": parts}).replace(b"/", b"\\/")
        if b"data" in escaped:
            assert MEDIUM_TOKENS * count < estimated_tokens(escaped) < MEDIUM_TOKENS * count + 100


def test_text_beside_media() -> None:
    """Each counts by itself."""
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PHOTO}"}}
    both = of({"type": "text", "text": PROSE}, picture, {"type": "text", "text": PROSE})
    assert both == pytest.approx(2 * len(PROSE) / 4 + MEDIUM_TOKENS, abs=100)


def test_hostile_bodies() -> None:
    """The estimate takes time in proportion to the size: otherwise this test would take minutes."""
    for unit in (b'"image_url":{"url":1}', b'"', b'{"role":"user","content":"a"},', b"a" * 1023 + b'"', b'"file_id"'):
        assert estimated_tokens(unit * (2_000_000 // len(unit))) > 100_000
