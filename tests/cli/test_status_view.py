"""The tables and lines of `trigate status`, from the bodies of a gateway."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from trio.testing import MockClock

from tests.support.gateway import OpenApp, make_config
from tests.support.provider import Provider, Say, Stall, answers, content
from trigate.cli.status_view import Overview, Table, overview, plain_lines, read
from trigate.status.schema import Status

STATUS: dict[str, Any] = {
    "status": "ok",
    "version": "0.1.0",
    "uptime_s": 760.2,
    "uptime": "0:12:40",
    "config": "trigate.toml",
    "reload_error": None,
    "workers": [
        {"id": "w1", "pid": 101, "status": "ok", "uptime_s": 760.2, "report_age_s": 0.0, "live": 2},
        {"id": "w2", "pid": 102, "status": "draining", "uptime_s": 9.0, "report_age_s": 0.4, "live": 1},
    ],
    "channels": [
        {"name": "ci", "type": "webhook", "status": "connected", "since": "2026-11-01T10:00:00+00:00",
         "last_event_at": None, "last_error": None, "received": 3, "replied": 2, "queued": 1},
        {"name": "bot", "type": "telegram", "status": "disconnected", "since": "2026-11-01T10:00:00+00:00",
         "last_event_at": None, "last_error": "401", "received": None, "replied": None, "queued": None},
    ],
    "sessions": {"total": 4, "active": 2, "busy": 1},
    "outbox": {"depth": 0},
    "store": {"kind": "sqlite", "path": "/var/lib/trigate.db", "state": "open", "error": None},
    "upstreams": [
        {"name": "a", "kind": "openai", "state": "down", "reason": "refused", "in_flight": 0, "queued": 0,
         "max_connections": 100, "models": 2, "last_error": "refused", "last_error_at": "2026-11-01T10:00:00+00:00"},
    ],
    "ledger": {"state": "ok", "begun": 12, "settled": 9, "lost": 0, "dropped": 0, "error": None},
    "admission": {"in_flight": 2, "limit": 5000, "queued": 1, "refused": 7, "late_workers": 0, "lag_s": 0.0124},
    "targets": [
        {"target": "a/m", "breaker": "open", "opens_in_s": 24.06, "in_flight": 0, "first_token_s": None},
        {"target": "b/m", "breaker": "closed", "opens_in_s": 0.0, "in_flight": 2, "first_token_s": 0.31,
         "prompt_tokens": 900, "cached_tokens": 720},
        {"target": "a/m", "breaker": "closed", "opens_in_s": 0.0, "in_flight": 1, "first_token_s": 0.4},
        {"target": "b/m", "breaker": "closed", "opens_in_s": 0.0, "in_flight": 0, "first_token_s": 1.26,
         "prompt_tokens": 100},
    ],
    "streams": {"live": 3, "by_phase": {"streaming": 2, "queued": 1}, "by_upstream": {"b": 2}, "oldest": []},
    "totals": {"exchanges": 9, "complete": 6, "cancelled": 2, "failed": 1, "events": 90, "bytes": 9000,
               "prompt_tokens": 10, "completion_tokens": 20},
}  # fmt: skip
ROW: dict[str, Any] = {
    "id": "req1", "model": "chat", "endpoint": "/chat/completions", "stream": True, "phase": "streaming", "age_s": 8.2,
    "deadline_left_s": 591.8, "target": "b/m", "events": 310, "bytes": 64_100, "prompt_tokens": None,
    "completion_tokens": None, "first_content_s": 1.5, "client_gone": False, "queue_position": None,
    "max_attempts": 3, "worker": "w1",
    "attempts": [
        {"target": "a/m", "why": "first", "started_s": 0.0, "outcome": "upstream_timeout", "duration_s": 0.61,
         "status": 504},
        {"target": "b/m", "why": "hedge", "started_s": 0.6, "phase": "streaming", "first_content_s": 0.4},
    ],
}  # fmt: skip
QUEUED = ROW | {
    "id": "req2", "phase": "queued", "age_s": 0.8, "deadline_left_s": 3.1, "target": None, "events": 0, "bytes": 0,
    "queue_position": 1, "attempts": [], "worker": "w2",
}  # fmt: skip
DONE = ROW | {
    "id": "req3", "phase": "ending", "age_s": 75.0, "deadline_left_s": None, "prompt_tokens": 12,
    "completion_tokens": 34, "client_gone": True, "attempts": ROW["attempts"][1:],
}  # fmt: skip
STREAMS: dict[str, Any] = {"object": "list", "data": [DONE, ROW, QUEUED], "count": 3, "missing_workers": []}

TEXT = """\
Trigate 0.1.0: ok, up 0:12:40, configured by trigate.toml
3 live; 9 ended: 6 complete, 2 cancelled, 1 failed
admission: 2 of 5000 running, 1 waiting, 7 refused; the event loop is 12 ms late
2 workers (101: 2 live, up 760 s; 102: 1 live, up 9 s, draining)
store /var/lib/trigate.db: open
sessions: 4, 2 active, 1 busy
  webhook ci: connected; 3 received, 2 replied, 1 queued
  telegram bot: disconnected (401)
  a: down (refused), 0 in flight, 2 models

targets: 2
  target  breaker           tried again in  in flight     first token  cached
  a/m     open 1, closed 1          24.1 s          1           0.4 s
  b/m     closed                                    2  0.3 s to 1.3 s    72 %

streams: 3
  id    model  phase                 target  attempt  why      age   left  queue  events   bytes  tokens  worker
  req3  chat   ending, client gone   b/m     1 of 3   hedge   1:15                   310  64.1 k   12/34     101
  req1  chat   streaming             b/m     2 of 3   hedge  8.2 s   9:52            310  64.1 k             101
               upstream_timeout 504  a/m     1        first  0.6 s
               streaming             b/m     2        hedge  7.6 s
  req2  chat   queued                                        0.8 s  3.1 s      1       0       0             102
"""


def made(status: dict[str, Any] | None = None, **streams: Any) -> Overview:
    """The overview of the bodies above, with these changes."""
    return overview(*read({**STATUS, **(status or {})}, {**STREAMS, **streams}))


def rows(table: Table) -> list[dict[str, str]]:
    """The cells of each row by their headings."""
    return [
        {name: cell.text for name, cell in zip(table.headings, row, strict=True) if cell.text} for row in table.rows
    ]


def test_as_text() -> None:
    """Plain text has lines, and tables with aligned columns; numbers are aligned to the right."""
    assert "".join(f"{line}\n" for line in plain_lines(made())) == TEXT


def test_nothing_in_flight() -> None:
    """A table without rows, a column without content, and the column of a single worker are left out."""
    quiet = made({"targets": [], "workers": STATUS["workers"][:1]}, data=[], count=0)
    assert not any("streams" in line or "targets" in line or "workers" in line for line in plain_lines(quiet))
    single = made({"workers": STATUS["workers"][:1]}, data=[ROW], count=1)
    assert "worker" not in rows(single.streams)[0]
    assert [single.streams.headings[n] for n in single.streams.columns()] == [
        "id", "model", "phase", "target", "attempt", "why", "age", "left", "events", "bytes"
    ]  # fmt: skip


def test_missing_rows_are_counted() -> None:
    """The title counts streams without a row; a line names a worker that did not answer."""
    assert made(count=120).streams.title == "streams: 120, of which the oldest 3 are shown"
    head = [cell.text for cell in made(missing_workers=["w2", "gone"]).head]
    assert head[-1] == "no answer from worker 102, gone: its streams are not shown"


@pytest.mark.parametrize(
    ("change", "line", "tone"),
    [
        ({"status": "draining"}, 0, "warning"),
        ({"reload_error": "x: unknown"}, 1, "bad"),
        ({"admission": STATUS["admission"] | {"queued": 0}}, 2, "plain"),
        ({"admission": STATUS["admission"]}, 2, "warning"),
        ({"admission": STATUS["admission"] | {"late_workers": 1}}, 2, "bad"),
    ],
)
def test_what_stands_out(change: dict[str, Any], line: int, tone: str) -> None:
    """A drain, a refused reload, waiting calls and refused calls stand out."""
    assert made(change).head[line].tone == tone


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, None),
        ({"state": "off"}, None),
        ({"state": "degraded", "error": "no space"}, "ledger: degraded (no space)"),
        ({"error": "a disk"}, "ledger: ok (a disk)"),
        ({"dropped": 3}, "ledger: ok, 3 records dropped"),
    ],
)
def test_a_ledger_with_a_problem_is_shown(change: dict[str, Any], text: str | None) -> None:
    """The ledger has a line only if it has an error, or has dropped records."""
    ledger = {"state": "ok", "begun": 5, "settled": 5, "lost": 0, "dropped": 0, "error": None, **change}
    found = [(cell.text, cell.tone) for cell in made({"ledger": ledger}).head if "ledger" in cell.text]
    assert found == ([(text, "warning")] if text else [])


def test_breakers_and_deadlines_stand_out() -> None:
    """An open breaker of any worker, a near deadline, a queue position and a failed attempt stand out."""
    shown = made()
    assert [row[2].tone for row in shown.targets.rows] == ["bad", "good"]
    tones = [
        {name: cell.tone for name, cell in zip(shown.streams.headings, row, strict=True)} for row in shown.streams.rows
    ]
    assert [tone["left"] for tone in tones] == ["plain", "plain", "plain", "plain", "bad"]
    assert (tones[1]["phase"], tones[2]["phase"], tones[4]["phase"]) == ("good", "bad", "warning")
    assert tones[4]["queue"] == "warning"


def test_an_unknown_breaker_state() -> None:
    """The state of a breaker that only another version knows is shown as it is."""
    odd = {"target": "a/m", "breaker": "ajar", "worker": "w1"}
    assert rows(made({"targets": [odd, odd | {"breaker": "open"}]}).targets)[0]["breaker"] == "open 1, ajar 1"


HOSTILE = "evil\x1b[2J\x1b]0;title\x07\r\n\u202e\ud800\x9b31m" + "x" * 500


@pytest.mark.parametrize(
    "path",
    [
        *(("streams", "data", 0, name) for name in ("id", "model", "phase", "target", "worker")),
        *(("streams", "data", 1, "attempts", 0, name) for name in ("target", "why", "outcome")),
        *(("status", name) for name in ("status", "version", "uptime", "config", "reload_error")),
        *(("status", "store", name) for name in ("path", "state", "error")),
        ("status", "ledger", "error"),
        *(("status", "upstreams", 0, name) for name in ("name", "state", "reason")),
        *(("status", "channels", 0, name) for name in ("name", "type", "status", "last_error")),
        *(("status", "targets", 0, name) for name in ("target", "breaker")),
        ("streams", "missing_workers", 0),
    ],
    ids=str,
)
def test_nothing_moves_the_cursor(path: tuple[Any, ...]) -> None:
    """Text that others chose, such as a client's model or a provider's error, is shown as one printable line."""
    bodies = copy.deepcopy({"status": STATUS, "streams": STREAMS | {"missing_workers": ["w1"]}})
    parent: Any = bodies
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = HOSTILE
    lines = list(plain_lines(overview(*read(bodies["status"], bodies["streams"]))))
    assert any("evil?[2J?]0;title??????31m" in line for line in lines)
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("status", "streams"),
    [
        ({}, STREAMS),
        (STATUS, {}),
        (STATUS | {"totals": None}, STREAMS),
        (STATUS | {"workers": "x"}, STREAMS),
        (STATUS, {"data": [{"id": 1}], "count": 1}),
    ],
)
def test_bodies_of_something_else(status: dict[str, Any], streams: dict[str, Any]) -> None:
    """Bodies that are not those of a gateway are refused, with the first wrong field."""
    with pytest.raises(ValueError, match=r"\$|required"):
        read(status, streams)


async def test_the_bodies_of_a_gateway(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """They can be read, and what is shown comes from them and not from defaults."""
    config = make_config({"a": {}, "b": {}}, models={"both": {"targets": ["a/m", "b/m"]}})
    down = answers(b'{"error":{"message":"no"}}', status=500)
    async with open_app(config, {"a": Provider(down), "b": Provider((Say(content("a")), Stall()))}) as served:
        call = served.client.chat(model="both")
        await call.wait_for(b'"a"')
        bodies = [(await served.client.ask("GET", path)).json for path in ("/status", "/status/streams")]
        call.disconnect()
        await call.wait()
    status, streams = read(*bodies)
    assert isinstance(status, Status)
    assert status.admission is not None
    assert (status.admission.in_flight, status.admission.limit) == (1, bodies[0]["admission"]["limit"])
    shown = overview(status, streams)
    [stream, first, second] = rows(shown.streams)
    assert (stream["attempt"], stream["why"]) == ("2 of 3", "failover")
    assert (stream["model"], stream["target"], stream["events"]) == ("both", "b/m", "1")
    assert (first["phase"], first["target"], first["why"]) == ("upstream_unavailable 502", "a/m", "first")
    assert (second["phase"], second["why"]) == ("streaming", "failover")
    assert [row["target"] for row in rows(shown.targets)] == ["a/m", "b/m"]
    assert {row["breaker"] for row in rows(shown.targets)} == {"closed"}
