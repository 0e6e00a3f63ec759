"""The events of a stream that another upstream continues."""

from __future__ import annotations

import msgspec
import pytest

from trigate.openai.continuation import continuation_head, continued

HEAD = {"id": msgspec.Raw(b'"first"'), "created": msgspec.Raw(b"1")}


@pytest.mark.parametrize(
    ("frames", "head"),
    [
        ([b": keep-alive\n\n", b'data: {"id":"first","created":1,"model":"m"}\n\n'], HEAD),
        ([b"data: nonsense\n\n", b'data: {"id":"first"}\n\n'], {"id": HEAD["id"]}),
        ([b'data: {"id":"first"}\n\n', b'data: {"id":"second"}\n\n'], {"id": HEAD["id"]}),
        ([b"data: [DONE]\n\n"], {}),
        ([], {}),
    ],
)
def test_the_head_is_that_of_the_first_event(frames: list[bytes], head: dict[str, msgspec.Raw]) -> None:
    """Comments and events that are not JSON objects have none."""
    assert continuation_head(frames) == head


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (b'data: {"id":"second","created":2,"model":"m"}\n\n', b'data: {"id":"first","created":1,"model":"m"}\n\n'),
        (b'data: {"id":"second","choices":[]}\n\n', b'data: {"id":"first","choices":[]}\n\n'),
        (
            b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":"a"}}]}\n\n',
            b'data: {"choices":[{"index": 0, "delta": {"content": "a"}}]}\n\n',
        ),
        (b'data: {"choices":{"role":1}}\n\n', b'data: {"choices":{"role": 1}}\n\n'),
        (b'data: {"choices":"\\ud800 \\"role\\""}\n\n', None),
        (b"data: [DONE]\n\n", None),
        (b": keep-alive\n\n", None),
    ],
)
def test_an_event_gets_the_head_and_loses_its_role(event: bytes, expected: bytes | None) -> None:
    """A field that the event does not have is not added. None = the event is unchanged."""
    assert continued(event, HEAD) == (event if expected is None else expected)
