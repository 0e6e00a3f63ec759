"""The types of the bodies of ``GET /status`` and ``GET /status/streams``."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from trigate.status import schema
from trigate.status.schema import AttemptStatus, Status, Stream, StreamList

ENDPOINTS = Path(__file__).parents[2] / "docs" / "reference" / "endpoints.md"
TYPES = [each for each in vars(schema).values() if isinstance(each, type) and issubclass(each, msgspec.Struct)]


@pytest.mark.parametrize("schema_type", TYPES, ids=lambda each: each.__name__)
def test_each_field_is_documented(schema_type: type[msgspec.Struct]) -> None:
    """The reference has every field."""
    text = ENDPOINTS.read_text(encoding="utf-8")
    section = text[text.index("### `GET /status`") : text.index("### `GET /status/streams/{stream}`")]
    missing = [name for name in schema_type.__struct_fields__ if f"`{name}`" not in section]
    assert missing == ([] if schema_type is not StreamList else ["object", "data"])


def test_a_field_that_is_left_out() -> None:
    """What does not apply to an exchange or attempt is not in the body; null is."""
    attempt = AttemptStatus(target="u/m", why="first", phase="waiting")
    body = json.loads(msgspec.json.encode(Stream(id="x", model="m", phase="waiting", age_s=0.5, attempts=(attempt,))))
    assert body["attempts"] == [{"target": "u/m", "why": "first", "started_s": 0.0, "phase": "waiting"}]
    assert "shared_call" not in body
    assert body["deadline_left_s"] is None


def test_an_answer_of_another_version() -> None:
    """A body without the fields that can be missing, and with unknown fields, can be read."""
    status = msgspec.convert(
        {
            "status": "ok",
            "version": "9",
            "uptime": "0:00:01",
            "config": "x",
            "workers": [{"id": "w", "pid": 1, "status": "ok", "uptime_s": 1.0, "live": 0, "said_s_ago": 0.0}],
            "store": {"path": ":memory:", "state": "open"},
            "streams": {"live": 0},
            "totals": {"exchanges": 0, "complete": 0, "cancelled": 0, "failed": 0},
            "admission": {"in_flight": 0, "limit": 1, "queued": 0, "late": 1},
            "moon": {"phase": "full"},
        },
        Status,
    )
    assert status.workers[0].report_age_s == 0.0
    assert status.admission is not None
    assert status.admission.late_workers == 0
    row = {"id": "x", "model": "m", "phase": "queued", "age_s": 1.0, "attempts": [{"target": "u/m", "outcome": None}]}
    streams = msgspec.convert({"data": [row], "count": 1}, StreamList)
    assert streams.data[0].attempts[0].outcome is None
