"""The values of a run: their JSON, and the body of a callback."""

from __future__ import annotations

import json

import pytest

from tests.runs.test_service import request
from trigate.runs.request import RunRequest, callback_body


@pytest.mark.parametrize(
    "kept",
    [
        request(
            session="s", system="x", parameters={"stop": ["a"]}, reply_to={"target": "c", "message": 5}, finish=True
        ),
        request(reply_to="https://a.example/"),
    ],
)
def test_a_request_survives_its_json(kept: RunRequest) -> None:
    """Decoding the stored JSON gives an equal request."""
    assert RunRequest.decode(kept.encode()) == kept


def test_a_callback_has_the_shape_of_standard_webhooks() -> None:
    """The body has a type, a timestamp, and the run as given, byte for byte."""
    data = b'{"big": 12345678901234567890123, "text":"caf\xc3\xa9 \\u2028"}'
    body = callback_body(state="failed", at=1_667_507_170.344522, data=data)
    assert json.loads(body)["type"] == "run.failed"
    assert json.loads(body)["timestamp"] == "2022-11-03T20:26:10.344522Z"
    assert data in body
    whole = json.loads(callback_body(state="cancelled", at=1.0, data=b"{}"))
    assert whole == {"type": "run.cancelled", "timestamp": "1970-01-01T00:00:01.000000Z", "data": {}}
