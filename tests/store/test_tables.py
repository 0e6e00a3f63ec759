"""`trigate.store.tables`: query plans and types, which the contract of a store does not mention."""

from __future__ import annotations

from typing import Any

import apsw
import pytest

from trigate.store.records import Session
from trigate.store.report_tables import conditions
from trigate.store.reports import ExchangeQuery
from trigate.store.schema import MIGRATIONS
from trigate.store.tables import Tables

SESSION = Session(owner="o", key="k", created_at=1.0, active_at=1.0)
GROWING = ("sessions", "messages", "runs", "deliveries", "claims", "objects", "reasoning", "responses")


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("session", {"owner": "o", "key": "k"}),
        ("sessions", {"owner": "o", "limit": 9, "after": None}),
        ("sessions", {"owner": "o", "limit": 9, "after": SESSION}),
        ("idle_sessions", {"before": 9.0, "limit": 9}),
        ("drop_session", {"owner": "o", "key": "k"}),
        ("last_message", {"owner": "o", "key": "k"}),
        ("last_message", {"owner": "o", "key": "k", "epoch": 1}),
        ("history", {"owner": "o", "key": "k", "epoch": 1, "last": 9}),
        ("messages", {"owner": "o", "key": "k", "epoch": 1, "limit": 9, "after": 0}),
        ("messages", {"owner": "o", "key": "k", "epoch": None, "limit": 9, "after": 0}),
        ("tickets", {"owner": "o", "key": "k"}),
        ("run", {"run_id": "r"}),
        ("drop_run", {"run_id": "r"}),
        ("unfinished_of", {"workers": ["a", "b"]}),
        ("count_unfinished", {"channel": "c"}),
        ("settled_runs", {"before": 9.0, "limit": 9}),
        ("claimed", {"scope": "s", "key": "k"}),
        ("drop_claims", {"run_id": "r"}),
        ("delivery", {"delivery_id": "d"}),
        ("due", {"at": 9.0, "channels": ["a", "b"], "limit": 9}),
        ("sending", {"workers": ["a", "b"]}),
        ("deliveries", {"run_id": "r"}),
        ("drop_orphans", {"before": 9.0, "limit": 9}),
        ("objects", {"ids": ["a", "b"]}),
        ("drop_object", {"object_id": "a", "upstream": "u"}),
        ("reasoning", {"owner": "o", "calls": ["a", "b"], "since": 1.0}),
        ("response", {"owner": "o", "response_id": "r"}),
        ("drop_response", {"owner": "o", "response_id": "r"}),
    ],
)
def test_no_table_that_grows_is_walked(name: str, args: dict[str, Any]) -> None:
    """Each query finds its rows by an index, and sorts only a few of them: one for each target, or those of some
    workers."""
    db = apsw.Connection(":memory:")
    for migration in MIGRATIONS:
        db.execute(migration)
    asked: list[str] = []

    def trace(cursor: apsw.Cursor, sql: str, bindings: Any) -> bool:
        asked.append(sql)
        return True

    db.exec_trace = trace
    getattr(Tables(db), name)(**args)
    db.exec_trace = None
    assert asked
    for sql in asked:
        steps = [step for *_, step in db.execute(f"EXPLAIN QUERY PLAN {sql}", (None,) * sql.count("?"))]
        assert not [step for step in steps if step.startswith(tuple(f"SCAN {table}" for table in (*GROWING, "d")))], (
            steps
        )
        if name not in ("due", "sending", "unfinished_of"):
            assert not [step for step in steps if "TEMP B-TREE FOR ORDER" in step], steps


def test_times_come_back_as_they_were() -> None:
    """A time is returned to the last bit, also infinity. An int comes back as an equal float."""
    db = apsw.Connection(":memory:")
    for migration in MIGRATIONS:
        db.execute(migration)
    tables = Tables(db)
    for at in (1764000000.1234567, 0.1 + 0.2, float("inf"), 7):
        tables.put_session(Session(owner="o", key=str(at), created_at=at, active_at=at))
        found = tables.session("o", str(at))
        assert found is not None
        assert found.created_at == at


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ({"id": "ex_1"}, "sqlite_autoindex_exchanges_1"),
        ({"owner": "o"}, "exchanges_of_owner"),
        ({"outcome": "timeout", "owner": "o"}, "exchanges_not_complete"),
        ({"failed": True, "owner": "o"}, "exchanges_failed"),
        ({"since": 1.0, "before": 9.0}, "exchanges_by_time"),
    ],
)
def test_records_are_found_by_an_index(query: dict[str, Any], index: str) -> None:
    """Each query for records uses the index that leads to the fewest of them."""
    db = apsw.Connection(":memory:")
    for migration in MIGRATIONS:
        db.execute(migration)
    found = [*conditions(ExchangeQuery(**query))]
    where = " AND ".join(condition for condition, _ in found)
    sql = f"EXPLAIN QUERY PLAN SELECT * FROM exchanges WHERE {where} ORDER BY number DESC LIMIT 9"
    steps = [step for *_, step in db.execute(sql, [value for _, values in found for value in values])]
    assert any(index in step for step in steps), steps
    assert not [step for step in steps if "TEMP B-TREE" in step], steps
