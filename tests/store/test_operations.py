"""What every store does: the same tests over SQLite in a file, with its threads, and over SQLite in memory."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import trio

from trigate.store.interface import Store
from trigate.store.operations.store import StoreOperations
from trigate.store.records import (
    ENDED,
    AttemptRecord,
    ChannelRecord,
    Delivery,
    ExchangeRecord,
    Message,
    ReasoningRecord,
    Retention,
    Run,
    SessionCounts,
    StoredResponse,
    Turn,
    UpstreamObject,
    VirtualKey,
    Worker,
)
from trigate.store.reports import ExchangeQuery
from trigate.store.tables import Tables


def message(text: str = "hello", *, tokens: int = 2, at: float = 1.0, partial: bool = False) -> Message:
    """A message that is not stored yet."""
    return Message(body=b'{"content":"%s"}' % text.encode(), tokens=tokens, at=at, partial=partial)


def turn(key: str = "k", *texts: str, at: float = 1.0, **changes: Any) -> Turn:
    """A turn of one message for each text."""
    messages = tuple(message(text, at=at) for text in texts or ("hello",))
    return attrs.evolve(Turn(owner="o", key=key, messages=messages, at=at), **changes)


def run(run_id: str = "run_1", **changes: Any) -> Run:
    """An acknowledged run."""
    return attrs.evolve(
        Run(
            id=run_id,
            channel="hook",
            owner="o",
            session="k",
            action="chat",
            request=b'{"text":"hi"}',
            state="queued",
            acknowledged=True,
            worker="w1",
            created_at=10.0,
        ),
        **changes,
    )


def delivery(delivery_id: str = "msg_1", **changes: Any) -> Delivery:
    """A delivery, to a target of its own."""
    return attrs.evolve(
        Delivery(
            id=delivery_id,
            run_id="run_1",
            channel="hook",
            target=f"https://example.org/{delivery_id}",
            body=b"{}",
            created_at=10.0,
            due_at=10.0,
        ),
        **changes,
    )


def texts(messages: Any) -> list[str]:
    """The texts of messages."""
    return [each.body.decode().split('"')[3] for each in messages]


# -- writes -----------------------------------------------------------------------------------------------------------


async def test_a_write_that_is_not_awaited_is_done(store: Store) -> None:
    """A write is queued when it is called; the awaited write behind it is done after it."""
    store.sessions.append(turn("first"))
    await store.sessions.append(turn("second"))
    assert await store.sessions.get("o", "first") is not None


async def test_writes_are_done_in_the_order_of_their_calls(store: Store) -> None:
    """The order in which they are awaited does not matter."""
    writes = [store.sessions.append(turn("k", str(number))) for number in range(20)]
    assert (await writes[-1]).turns == 20
    assert [(await write).turns for write in writes[:-1]] == list(range(1, 20))
    page = await store.sessions.messages("o", "k", limit=100)
    assert texts(page) == [str(number) for number in range(20)]


async def test_a_write_whose_await_is_cancelled_is_done(store: Store) -> None:
    """The cancellation ends the wait, and not the write."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await store.sessions.append(turn("k"))
    assert scope.cancelled_caught
    await store.check()
    assert await store.sessions.get("o", "k") is not None


async def test_a_mistake_fails_one_write(store: Store) -> None:
    """A write that raises changes nothing; the writes before and behind it are done."""
    await store.deliveries.add(delivery())
    before = store.runs.add(run("run_0"))
    store.runs.add(run())
    wrong = store.runs.finish(
        "run_1", state="completed", status=200, result=b"{}", at=11.0, turn=turn(), deliveries=[delivery()]
    )
    twice = store.runs.add(run())
    behind = store.runs.add(run("run_2"))
    await before
    with pytest.raises(ValueError, match="msg_1 already"):
        await wrong
    with pytest.raises(ValueError, match="run_1 already"):
        await twice
    await behind
    found = await store.runs.get("run_1")
    assert found is not None
    assert found.state == "queued"
    assert await store.sessions.get("o", "k") is None
    assert [record.received for record in await store.channels.all()] == [3]


async def test_an_operation_that_raises_is_rolled_back(store: Store) -> None:
    """Whatever an operation has changed before it raises is undone; the writes around it are done."""
    assert isinstance(store, StoreOperations)

    def spoil(tables: Tables) -> None:
        tables.drop_session("o", "first")
        tables.put_run(run())
        raise RuntimeError("a defect")

    store.sessions.append(turn("first"))
    spoilt = store.write(spoil)
    await store.sessions.append(turn("second"))
    with pytest.raises(RuntimeError, match="a defect"):
        await spoilt
    assert [session.key for session in await store.sessions.list("o", limit=9)] == ["first", "second"]
    assert await store.runs.get("run_1") is None


async def test_many_tasks_at_once(store: Store) -> None:
    """Each of many concurrent writers and readers gets its own result."""

    async def work(number: int) -> None:
        key = f"k{number}"
        for at in range(3):
            made = await store.sessions.append(turn(key, str(at), at=float(at)))
            assert (made.key, made.turns) == (key, at + 1)
            found = await store.sessions.history("o", key, last=1)
            assert found is not None
            assert texts(found[1]) == [str(at)]

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(work, number)
    assert await store.sessions.count(active_since=0.0) == SessionCounts(total=20, active=20, busy=0)


async def test_any_text_and_any_bytes_come_back(store: Store) -> None:
    """Names with quotes, NUL, %, emoji, and empty names; bodies that are not UTF-8."""
    for key in ("", "'; --", "a\x00b", "%_*", "\N{GRINNING FACE}é\u2028", "K", "k"):
        body = bytes(range(256)) + key.encode()
        await store.sessions.append(turn(key, messages=(Message(body=body, tokens=0, at=1.0),), owner=key))
        found = await store.sessions.history(key, key, last=1)
        assert found is not None
        assert (found[0].owner, found[0].key, found[1][0].body) == (key, key, body)
    assert len(await store.sessions.list("k", limit=10)) == 1


# -- sessions ---------------------------------------------------------------------------------------------------------


async def test_a_turn_makes_the_session(store: Store) -> None:
    """A first turn creates the session; counters, `get` and `history` show what was appended."""
    assert await store.sessions.get("o", "k") is None
    assert await store.sessions.history("o", "k", last=10) is None
    assert await store.sessions.messages("o", "k", limit=10) is None
    appended = turn("k", "hi", "ho", at=5.0, system=b'[{"role":"system"}]')
    made = await store.sessions.append(appended)
    assert (made.owner, made.key, made.created_at, made.active_at) == ("o", "k", 5.0, 5.0)
    assert (made.epoch, made.turns, made.messages, made.tokens, made.busy) == (0, 1, 2, 4, False)
    assert made.system == b'[{"role":"system"}]'
    assert await store.sessions.get("o", "k") == made
    found = await store.sessions.history("o", "k", last=10)
    assert found is not None
    assert found[0] == made
    assert found[1] == [
        attrs.evolve(each, number=number, turn=1) for number, each in enumerate(appended.messages, start=1)
    ]


async def test_a_turn_goes_behind_the_others(store: Store) -> None:
    """Numbers ascend, turns are counted, system messages stay unless the turn has new ones, and `partial` is stored."""
    await store.sessions.append(turn("k", "a", "b", at=1.0, system=b"[1]"))
    cut = (message("c", tokens=7, at=2.0, partial=True),)
    made = await store.sessions.append(turn("k", at=2.0, messages=cut))
    assert (made.created_at, made.active_at, made.turns, made.messages, made.tokens) == (1.0, 2.0, 2, 3, 11)
    assert made.system == b"[1]"
    page = await store.sessions.messages("o", "k", limit=10)
    assert page is not None
    assert [(each.number, each.turn, each.partial) for each in page] == [(1, 1, False), (2, 1, False), (3, 2, True)]
    assert (await store.sessions.append(turn("k", at=3.0, system=b"[]"))).system == b"[]"


async def test_history_is_the_last_messages(store: Store) -> None:
    """Oldest first, and no more than asked for."""
    await store.sessions.append(turn("k", *"abcdef"))
    for last, expected in ((0, ""), (1, "f"), (3, "def"), (9, "abcdef")):
        found = await store.sessions.history("o", "k", last=last)
        assert found is not None
        assert texts(found[1]) == list(expected)


async def test_messages_are_paged(store: Store) -> None:
    """The messages behind a number, oldest first, of the current epoch or of all."""
    await store.sessions.append(turn("k", *"abc"))
    await store.sessions.reset("o", "k", at=2.0)
    await store.sessions.append(turn("k", *"de"))

    async def page(**asked: Any) -> list[str]:
        return texts(await store.sessions.messages("o", "k", **asked))

    assert await page(limit=1) == ["d"]
    assert await page(limit=9) == ["d", "e"]
    assert await page(limit=9, after=4) == ["e"]
    assert await page(limit=2, archived=True) == ["a", "b"]
    assert await page(limit=9, after=2, archived=True) == ["c", "d", "e"]
    assert await page(limit=9, after=5, archived=True) == []


async def test_a_reset_begins_anew_and_keeps_the_archive(store: Store) -> None:
    """Counters and system messages are those of a new session."""
    assert await store.sessions.reset("o", "k", at=1.0) is None
    await store.sessions.append(turn("k", "old", at=1.0, system=b"[1]"))
    begun = await store.sessions.reset("o", "k", at=9.0)
    assert begun is not None
    assert (begun.epoch, begun.turns, begun.messages, begun.tokens) == (1, 0, 0, 0)
    assert (begun.created_at, begun.active_at, begun.system) == (1.0, 9.0, b"[]")
    assert await store.sessions.history("o", "k", last=9) == (begun, [])
    made = await store.sessions.append(turn("k", "new", at=10.0))
    assert (made.turns, made.messages) == (1, 1)
    page = await store.sessions.messages("o", "k", limit=9, archived=True)
    assert page is not None
    assert [(each.number, each.epoch, each.turn) for each in page] == [(1, 0, 1), (2, 1, 1)]


async def test_a_turn_of_an_earlier_epoch_goes_to_the_archive(store: Store) -> None:
    """If the session was reset while the turn was composed, the current epoch does not change."""
    await store.sessions.append(turn("k", "a", at=1.0))
    await store.sessions.reset("o", "k", at=2.0)
    current = await store.sessions.append(turn("k", "b", at=3.0, epoch=1))
    assert await store.sessions.append(turn("k", "late", at=4.0, epoch=0, system=b"[9]")) == current
    found = await store.sessions.history("o", "k", last=9)
    assert found is not None
    assert (found[0], texts(found[1])) == (current, ["b"])
    page = await store.sessions.messages("o", "k", limit=9, archived=True)
    assert page is not None
    assert [(*texts([each]), each.number, each.epoch, each.turn) for each in page] == [
        ("a", 1, 0, 1),
        ("b", 2, 1, 1),
        ("late", 3, 0, 2),
    ]


async def test_delete_removes_all_epochs(store: Store) -> None:
    """A session that is created again has nothing of the deleted one."""
    assert await store.sessions.delete("o", "k") is False
    await store.sessions.append(turn("k", "a"))
    await store.sessions.reset("o", "k", at=2.0)
    await store.sessions.append(turn("k", "b"))
    await store.sessions.append(turn("other", "c"))
    assert await store.sessions.delete("o", "k") is True
    assert await store.sessions.get("o", "k") is None
    await store.sessions.append(turn("k", "new"))
    assert texts(await store.sessions.messages("o", "k", limit=9, archived=True)) == ["new"]
    assert texts(await store.sessions.messages("o", "other", limit=9)) == ["c"]


async def test_an_owner_sees_only_its_own(store: Store) -> None:
    """The same key of two owners is two sessions."""
    await store.sessions.append(turn("k", "mine"))
    await store.sessions.append(turn("k", "theirs", owner="other"))
    assert texts(await store.sessions.messages("o", "k", limit=9)) == ["mine"]
    assert [each.owner for each in await store.sessions.list("o", limit=9)] == ["o"]
    assert await store.sessions.delete("nobody", "k") is False
    await store.sessions.delete("other", "k")
    assert texts(await store.sessions.messages("o", "k", limit=9)) == ["mine"]


async def test_sessions_are_listed_by_activity(store: Store) -> None:
    """The last active first, then by key. The pages contain each session once."""
    for key, at in (("c", 2.0), ("a", 1.0), ("b", 2.0), ("e", 3.0), ("d", 2.0)):
        await store.sessions.append(turn(key, at=at))
    assert [each.key for each in await store.sessions.list("o", limit=9)] == ["e", "b", "c", "d", "a"]
    found: list[str] = []
    while page := await store.sessions.list("o", limit=2, after=found[-1] if found else None):
        found += [each.key for each in page]
    assert found == ["e", "b", "c", "d", "a"]
    assert await store.sessions.list("o", limit=9, after="unknown") == []


async def test_tickets_queue(store: Store) -> None:
    """First come, first served. Returning a ticket twice is harmless, and numbers are never used again."""
    first = await store.sessions.take_ticket("o", "k", worker="w1")
    second = await store.sessions.take_ticket("o", "k", worker="w2", run="run_1")
    await store.sessions.take_ticket("o", "other", worker="w1")
    assert (first.owner, first.key, first.worker, first.run) == ("o", "k", "w1", None)
    assert (second.worker, second.run) == ("w2", "run_1")
    assert await store.sessions.tickets("o", "k") == [first, second]
    await store.sessions.return_ticket(first)
    await store.sessions.return_ticket(first)
    assert await store.sessions.tickets("o", "k") == [second]
    await store.sessions.return_ticket(second)
    third = await store.sessions.take_ticket("o", "k", worker="w1")
    assert first.number < second.number < third.number


async def test_a_run_keeps_its_ticket(store: Store) -> None:
    """A run has one ticket, however often it takes one. The worker that adopts the run has the ticket then."""
    await store.runs.add(run("run_1", worker="dead"))
    first = await store.sessions.take_ticket("o", "k", worker="dead", run="run_1")
    second = await store.sessions.take_ticket("o", "k", worker="w", run="run_2")
    await store.runs.adopt("w", dead=["dead"], at=20.0)
    await store.workers.remove(["dead"])
    kept = attrs.evolve(first, worker="w")
    assert await store.sessions.take_ticket("o", "k", worker="w", run="run_1") == kept
    await store.sessions.return_ticket(first)  # a worker that was taken for dead returns it late
    assert await store.sessions.tickets("o", "k") == [kept, second]
    await store.sessions.return_ticket(kept)
    assert await store.sessions.tickets("o", "k") == [second]


async def test_a_turn_returns_its_ticket(store: Store) -> None:
    """Appending a turn returns its ticket in the same transaction. A session with tickets is busy."""
    ticket = await store.sessions.take_ticket("o", "k", worker="w")
    waiting = await store.sessions.take_ticket("o", "k", worker="w")
    made = await store.sessions.append(turn("k"), ticket=ticket)
    assert made.busy
    assert await store.sessions.tickets("o", "k") == [waiting]
    [listed] = await store.sessions.list("o", limit=1)
    assert listed == made == await store.sessions.get("o", "k")
    made = await store.sessions.append(turn("k"), ticket=waiting)
    assert not made.busy
    assert made == await store.sessions.get("o", "k")


async def test_sessions_are_counted(store: Store) -> None:
    """Sessions of all owners are counted. A busy one is active, and one whose first turn is in progress counts."""
    assert await store.sessions.count(active_since=0.0) == SessionCounts(total=0, active=0, busy=0)
    for number, at in enumerate((1.0, 2.0, 3.0)):
        await store.sessions.append(turn(str(number), at=at, owner=str(number)))
    assert await store.sessions.count(active_since=2.0) == SessionCounts(total=3, active=2, busy=0)
    await store.sessions.take_ticket("0", "0", worker="w")
    await store.sessions.take_ticket("2", "2", worker="w")
    await store.sessions.take_ticket("2", "2", worker="w")
    assert await store.sessions.count(active_since=2.0) == SessionCounts(total=3, active=3, busy=2)
    await store.sessions.take_ticket("3", "new", worker="w")
    assert await store.sessions.count(active_since=9.0) == SessionCounts(total=4, active=3, busy=3)


# -- runs -------------------------------------------------------------------------------------------------------------


async def test_a_run_comes_back_as_it_was(store: Store) -> None:
    """With every attribute; it is counted as received by its channel."""
    assert await store.runs.get("run_1") is None
    every = run(
        session=None, state="failed", acknowledged=False, starts=3, finished_at=12.5, status=502, result=b"\xff{}"
    )
    await store.runs.add(every)
    assert await store.runs.get("run_1") == every
    await store.runs.add(run("run_2", created_at=11.0))
    assert await store.channels.all() == [ChannelRecord(name="hook", received=2, last_event_at=11.0)]


async def test_a_run_is_started_by_its_worker(store: Store) -> None:
    """Each start is counted. Another worker cannot start it, nor can an ended or unknown run be started."""
    await store.runs.add(run())
    assert await store.runs.start("run_1", worker="w2") is False
    assert await store.runs.start("run_1", worker="w1") is True
    assert await store.runs.start("run_1", worker="w1") is True
    found = await store.runs.get("run_1")
    assert found == run(state="running", starts=2)
    for state in sorted(ENDED):
        await store.runs.add(run(state, state=state))
        assert await store.runs.start(state, worker="w1") is False
    assert await store.runs.start("unknown", worker="w1") is False


async def test_a_run_can_be_acknowledged_later(store: Store) -> None:
    """`acknowledge` changes nothing else of the run."""
    await store.runs.add(run(acknowledged=False))
    await store.runs.acknowledge("run_1")
    await store.runs.acknowledge("unknown")
    assert await store.runs.get("run_1") == run()


async def test_a_run_ends_in_one_transaction(store: Store) -> None:
    """Result, turn, ticket and deliveries are stored together."""
    await store.runs.add(run(state="running"))
    ticket = await store.sessions.take_ticket("o", "k", worker="w1", run="run_1")
    done = await store.runs.finish(
        "run_1",
        state="completed",
        status=200,
        result=b'{"reply":"ho"}',
        at=12.0,
        turn=turn("k", "hi", "ho"),
        ticket=ticket,
        deliveries=iter([delivery("msg_2"), delivery("msg_1")]),
    )
    assert done is True
    found = await store.runs.get("run_1")
    assert found == run(state="completed", finished_at=12.0, status=200, result=b'{"reply":"ho"}')
    assert texts(await store.sessions.messages("o", "k", limit=9)) == ["hi", "ho"]
    assert await store.sessions.tickets("o", "k") == []
    assert await store.deliveries.of_run("run_1") == [delivery("msg_2"), delivery("msg_1")]
    assert await store.runs.unfinished("hook") == 0


async def test_a_run_ends_once(store: Store) -> None:
    """A second end does nothing but return the ticket; so does the end of an unknown run."""
    await store.runs.add(run())
    await store.runs.finish("run_1", state="cancelled", status=499, result=b"1", at=12.0)
    for run_id in ("run_1", "unknown"):
        ticket = await store.sessions.take_ticket("o", "k", worker="w1")
        done = await store.runs.finish(
            run_id,
            state="completed",
            status=200,
            result=b"2",
            at=13.0,
            turn=turn(),
            ticket=ticket,
            deliveries=[delivery()],
        )
        assert done is False
        assert await store.sessions.tickets("o", "k") == []
    assert await store.runs.get("run_1") == run(state="cancelled", status=499, result=b"1", finished_at=12.0)
    assert await store.sessions.get("o", "k") is None
    assert await store.deliveries.of_run("run_1") == []


async def test_unfinished_runs_are_counted(store: Store) -> None:
    """Those of one channel, in all workers."""
    await store.runs.add(run("run_1"))
    await store.runs.add(run("run_2", worker="w2", state="running"))
    await store.runs.add(run("run_3", channel="other"))
    await store.runs.add(run("run_4", state="failed"))
    assert [await store.runs.unfinished(name) for name in ("hook", "other", "none")] == [2, 1, 0]


async def test_runs_of_exited_workers_are_adopted(store: Store) -> None:
    """Acknowledged runs go on, in their order; the others have failed, and their keys are free."""
    await store.runs.add(run("run_2", worker="d1", state="running", starts=1))
    await store.runs.add(run("run_1", worker="d2"))
    await store.runs.add(run("run_3", worker="d1", state="completed"))
    await store.runs.add(run("run_4", worker="alive"))
    lost = run("run_5", worker="d1", acknowledged=False, state="running")
    await store.idempotency.claim("hook", "key", digest=b"1", run=lost)
    kept = run("run_6", worker="d1")
    await store.idempotency.claim("hook", "kept", digest=b"1", run=kept)
    adopted = await store.runs.adopt("w9", dead=iter(["d1", "d2"]), at=20.0)
    assert adopted == [run("run_2", worker="w9", starts=1), run("run_1", worker="w9"), run("run_6", worker="w9")]
    for each in adopted:
        assert await store.runs.get(each.id) == each
    failed = await store.runs.get("run_5")
    assert failed is not None
    assert (failed.state, failed.status, failed.finished_at) == ("failed", 503, 20.0)
    assert b'"error"' in failed.result
    again = await store.idempotency.claim("hook", "key", digest=b"1", run=run("run_7"))
    assert again.is_new
    again = await store.idempotency.claim("hook", "kept", digest=b"1", run=run("run_8"))
    assert again.run.id == "run_6"
    assert await store.runs.adopt("w9", dead=["d1", "d2"], at=21.0) == []
    assert await store.runs.adopt("w9", dead=[], at=21.0) == []


# -- idempotency ------------------------------------------------------------------------------------------------------


async def test_a_key_stands_for_one_run(store: Store) -> None:
    """The first claim adds the run. Later claims return it as it is then, and tell whether the body differs."""
    first = await store.idempotency.claim("hook", "key", digest=b"1", run=run("run_1"))
    assert (first.run, first.is_new, first.differs) == (run("run_1"), True, False)
    assert await store.runs.get("run_1") == run("run_1")
    await store.runs.finish("run_1", state="completed", status=200, result=b"{}", at=12.0)
    assert [(each.received, each.replied) for each in await store.channels.all()] == [(1, 1)]
    again = await store.idempotency.claim("hook", "key", digest=b"1", run=run("run_2"))
    assert (again.run.id, again.run.state, again.is_new, again.differs) == ("run_1", "completed", False, False)
    other = await store.idempotency.claim("hook", "key", digest=b"2", run=run("run_3"))
    assert (other.run.id, other.is_new, other.differs) == ("run_1", False, True)
    assert await store.runs.get("run_2") is None
    assert (await store.idempotency.claim("another", "key", digest=b"1", run=run("run_4"))).is_new
    [record] = await store.channels.all()
    assert record.received == 2


async def test_a_run_may_free_its_key(store: Store) -> None:
    """One later message may then claim the key; the run itself stays."""
    await store.idempotency.claim("hook", "key", digest=b"1", run=run("run_1"))
    await store.runs.finish("run_1", state="failed", status=502, result=b"{}", at=12.0, frees_key=True)
    again = await store.idempotency.claim("hook", "key", digest=b"2", run=run("run_2"))
    assert (again.run.id, again.is_new, again.differs) == ("run_2", True, False)
    kept = await store.runs.get("run_1")
    assert kept is not None
    assert kept.state == "failed"
    # A run that had ended does not free a key that stands for another run now.
    assert not await store.runs.finish("run_1", state="failed", status=502, result=b"{}", at=13.0, frees_key=True)
    assert not (await store.idempotency.claim("hook", "key", digest=b"2", run=run("run_3"))).is_new


async def test_a_run_that_ended_may_free_its_key(store: Store) -> None:
    """A message whose run failed may be sent again; it makes another run."""
    await store.idempotency.claim("hook", "key", digest=b"1", run=run("run_1"))
    await store.runs.finish("run_1", state="failed", status=503, result=b"{}", at=12.0, frees_key=True)
    again = await store.idempotency.claim("hook", "key", digest=b"2", run=run("run_2"))
    assert (again.run.id, again.is_new) == ("run_2", True)
    assert await store.runs.finish("run_1", state="failed", status=503, result=b"{}", at=13.0, frees_key=True) is False
    again = await store.idempotency.claim("hook", "key", digest=b"2", run=run("run_3"))
    assert again.run.id == "run_2"


async def test_one_of_many_claims_at_once_succeeds(store: Store) -> None:
    """All other claims return its run."""
    claims = [store.idempotency.claim("hook", "key", digest=b"1", run=run(f"run_{n}")) for n in range(100)]
    found = [await claim for claim in claims]
    assert [claim.is_new for claim in found] == [True] + 99 * [False]
    assert {claim.run.id for claim in found} == {"run_0"}


# -- deliveries -------------------------------------------------------------------------------------------------------


async def test_a_delivery_comes_back_as_it_was(store: Store) -> None:
    """With every attribute; a second delivery with the same id is refused."""
    every = delivery(
        repeatable=False, state="failed", attempts=3, worker="w", last_status=500, last_error="no", done_at=11.0
    )
    await store.deliveries.add(every)
    assert await store.deliveries.of_run("run_1") == [every]
    with pytest.raises(ValueError, match="msg_1 already"):
        await store.deliveries.add(delivery())


async def test_what_is_due_is_taken_once(store: Store) -> None:
    """The longest due first, on the given channels, and no more than asked for."""
    for number, due_at in ((1, 30.0), (2, 10.0), (3, 20.0), (4, 99.0), (5, 20.0)):
        await store.deliveries.add(delivery(f"msg_{number}", due_at=due_at))
    await store.deliveries.add(delivery("msg_6", channel="other"))
    taken = await store.deliveries.take("w1", at=30.0, limit=3, channels=iter(["hook", "none"]))
    assert [each.id for each in taken] == ["msg_2", "msg_3", "msg_5"]
    assert taken[0] == delivery("msg_2", state="sending", worker="w1", attempts=1)
    assert [each.id for each in await store.deliveries.take("w2", at=30.0, limit=3, channels=["hook"])] == ["msg_1"]
    assert await store.deliveries.take("w2", at=30.0, limit=3, channels=["hook"]) == []
    assert await store.deliveries.take("w2", at=30.0, limit=3, channels=[]) == []
    many = [f"hook{number}" for number in range(2000)]
    assert await store.deliveries.take("w2", at=30.0, limit=3, channels=many) == []
    assert taken[0] in await store.deliveries.of_run("run_1")


async def test_a_target_gets_one_at_a_time(store: Store) -> None:
    """The delivery that has been due for the longest, for each target of each channel, whichever worker takes."""
    for number, due_at in ((1, 20.0), (2, 10.0), (3, 10.0), (4, 99.0)):
        await store.deliveries.add(delivery(f"msg_{number}", target="t", due_at=due_at))
    await store.deliveries.add(delivery("msg_5", target="u", due_at=30.0))
    await store.deliveries.add(delivery("msg_6", target="t", channel="other", due_at=40.0))

    async def take(worker: str, at: float, *channels: str) -> list[str]:
        return [each.id for each in await store.deliveries.take(worker, at=at, limit=9, channels=channels)]

    assert await take("w1", 20.0, "hook", "other") == ["msg_2"]
    assert await take("w1", 20.0, "hook", "other") == await take("w2", 20.0, "hook", "other") == []
    assert await store.deliveries.next_due_at(["hook", "other"]) == 30.0
    assert await take("w2", 40.0, "hook", "other") == ["msg_5", "msg_6"]
    assert await store.deliveries.next_due_at(["hook", "other"]) is None
    await store.deliveries.note("msg_2", state="pending", at=21.0, due_at=25.0)
    assert await store.deliveries.next_due_at(["hook"]) == 10.0
    assert await take("w2", 40.0, "hook") == ["msg_3"]
    await store.deliveries.note("msg_3", state="delivered", at=41.0)
    assert await take("w2", 40.0, "hook") == ["msg_1"]
    await store.deliveries.note("msg_1", state="failed", at=42.0)
    assert await take("w1", 99.0, "hook") == ["msg_2"]
    assert len(await store.deliveries.release(dead=["w1"])) == 1
    assert await take("w1", 99.0, "hook") == ["msg_2"]


async def test_the_end_of_an_attempt_is_noted(store: Store) -> None:
    """It is pending again until it is delivered, which counts as replied, once."""
    await store.deliveries.add(delivery())
    await store.deliveries.take("w1", at=10.0, limit=1, channels=["hook"])
    await store.deliveries.note("msg_1", state="pending", at=11.0, due_at=16.0, status=503, error="busy")
    [found] = await store.deliveries.of_run("run_1")
    assert found == delivery(due_at=16.0, attempts=1, last_status=503, last_error="busy")
    assert await store.channels.all() == []
    assert await store.deliveries.take("w1", at=15.0, limit=1, channels=["hook"]) == []
    [taken] = await store.deliveries.take("w1", at=16.0, limit=1, channels=["hook"])
    assert taken.attempts == 2
    await store.deliveries.note("msg_1", state="delivered", at=17.0, status=200)
    await store.deliveries.note("msg_1", state="delivered", at=18.0, status=200)
    await store.deliveries.note("msg_1", state="pending", at=18.0)
    [found] = await store.deliveries.of_run("run_1")
    assert found == delivery(due_at=16.0, state="delivered", attempts=2, last_status=200, done_at=17.0)
    assert await store.channels.all() == [ChannelRecord(name="hook", replied=1, last_event_at=17.0)]
    await store.deliveries.note("unknown", state="failed", at=1.0)


async def test_what_failed_is_done(store: Store) -> None:
    """A failed delivery is not taken again, and does not count as replied."""
    await store.deliveries.add(delivery())
    await store.deliveries.note("msg_1", state="failed", at=11.0, status=410, error="gone")
    assert await store.deliveries.of_run("run_1") == [
        delivery(state="failed", last_status=410, last_error="gone", done_at=11.0)
    ]
    assert await store.deliveries.take("w", at=99.0, limit=9, channels=["hook"]) == []
    assert await store.channels.all() == []


async def test_deliveries_of_exited_workers_are_released(store: Store) -> None:
    """A repeatable delivery is pending again, any other is unknown."""
    await store.deliveries.add(delivery("msg_1"))
    await store.deliveries.add(delivery("msg_2", repeatable=False))
    await store.deliveries.take("dead", at=10.0, limit=9, channels=["hook"])
    await store.deliveries.add(delivery("msg_3"))
    await store.deliveries.take("alive", at=10.0, limit=9, channels=["hook"])
    ended = "the process that was sending it has ended"
    released = [
        delivery("msg_1", attempts=1, last_error=ended),
        delivery("msg_2", attempts=1, last_error=ended, repeatable=False, state="unknown"),
    ]
    assert await store.deliveries.release(dead=iter(["dead", "other"])) == released
    assert await store.deliveries.release(dead=["dead"]) == []
    assert await store.deliveries.release(dead=[]) == []
    assert await store.deliveries.of_run("run_1") == [
        *released,
        delivery("msg_3", attempts=1, state="sending", worker="alive"),
    ]


async def test_a_worker_that_was_taken_for_dead_may_note_an_outcome(store: Store) -> None:
    """A delivery that has arrived is not sent again, and is not unknown any more."""
    for number, repeatable in ((1, True), (2, False)):
        await store.deliveries.add(delivery(f"msg_{number}", repeatable=repeatable))
    await store.deliveries.take("slow", at=10.0, limit=9, channels=["hook"])
    await store.deliveries.release(dead=["slow"])
    for number in (1, 2):
        await store.deliveries.note(f"msg_{number}", state="delivered", at=11.0, status=200)
    assert [each.state for each in await store.deliveries.of_run("run_1")] == ["delivered", "delivered"]
    assert await store.deliveries.take("w", at=99.0, limit=9, channels=["hook"]) == []


async def test_the_outbox_is_measured(store: Store) -> None:
    """When the next delivery is due, and how many each channel has."""
    assert await store.deliveries.next_due_at(["hook"]) is None
    assert await store.deliveries.depth() == {}
    for number, due_at in ((1, 30.0), (2, 20.0), (3, 10.0)):
        await store.deliveries.add(delivery(f"msg_{number}", due_at=due_at))
    await store.deliveries.add(delivery("msg_4", channel="other", due_at=5.0))
    await store.deliveries.note("msg_4", state="failed", at=6.0)
    await store.deliveries.take("w", at=10.0, limit=1, channels=["hook"])
    assert await store.deliveries.next_due_at(iter(["hook", "other"])) == 20.0
    assert await store.deliveries.next_due_at(["other"]) is None
    assert await store.deliveries.next_due_at([]) is None
    assert await store.deliveries.depth() == {"hook": 3}


# -- channels and workers ---------------------------------------------------------------------------------------------


async def test_channels_are_kept(store: Store) -> None:
    """Cursors and counters, ordered by name."""
    assert await store.channels.all() == []
    await store.channels.advance("b", "41")
    await store.channels.advance("b", "42")
    await store.channels.count("b", at=5.0, received=2)
    await store.channels.count("b", at=4.0, replied=1)
    await store.channels.count("a", at=1.0, received=1)
    assert await store.channels.all() == [
        ChannelRecord(name="a", received=1, last_event_at=1.0),
        ChannelRecord(name="b", cursor="42", received=2, replied=1, last_event_at=5.0),
    ]


async def test_a_channel_has_one_holder(store: Store) -> None:
    """Until the holder lets go, or is dead."""

    async def hold(worker: str, *dead: str) -> bool:
        return await store.channels.hold("telegram", worker=worker, dead=iter(dead))

    assert await hold("w1") is True
    assert await hold("w1") is True
    assert await hold("w2") is False
    assert await hold("w2", "w3", "w1") is True
    await store.channels.let_go("telegram", worker="w1")
    assert await hold("w1") is False
    await store.channels.let_go("telegram", worker="w2")
    await store.channels.let_go("unknown", worker="w2")
    assert await store.channels.all() == [ChannelRecord(name="telegram")]
    assert await hold("w1") is True


async def test_heartbeats(store: Store) -> None:
    """The last heartbeat of each worker, the oldest worker first."""
    young = Worker(id="a", pid=2, address="@a", started_at=2.0, seen_at=2.0)
    old = Worker(id="b", pid=1, address="@b", started_at=1.0, seen_at=1.0)
    for worker in (young, old, attrs.evolve(old, seen_at=5.0, snapshot=b'{"streams":3}')):
        await store.workers.heartbeat(worker)
    assert await store.workers.all() == [attrs.evolve(old, seen_at=5.0, snapshot=b'{"streams":3}'), young]


async def test_workers_are_removed(store: Store) -> None:
    """With their tickets and the channels that they held; those of other workers stay."""
    for worker_id in ("w1", "w2"):
        await store.workers.heartbeat(Worker(id=worker_id, pid=1, address="", started_at=1.0, seen_at=1.0))
        await store.sessions.take_ticket("o", "k", worker=worker_id)
        await store.channels.hold(worker_id, worker=worker_id, dead=[])
    await store.workers.remove(iter(["w1", "unknown"]))
    assert [each.id for each in await store.workers.all()] == ["w2"]
    assert [each.worker for each in await store.sessions.tickets("o", "k")] == ["w2"]
    assert [each.holder for each in await store.channels.all()] == [None, "w2"]


# -- the whole --------------------------------------------------------------------------------------------------------

ALL = Retention(
    sessions_before=0.0,
    archives_before=0.0,
    runs_before=0.0,
    max_sessions=1000,
    max_runs=1000,
    exchanges_before=0.0,
    max_exchanges=1000,
)
"""Under which nothing is forgotten."""


async def test_idle_sessions_are_deleted(store: Store) -> None:
    """With their messages; busy sessions stay."""
    for key, at in (("old", 1.0), ("busy", 1.0), ("new", 9.0)):
        await store.sessions.append(turn(key, "a", "b", at=at))
    await store.sessions.take_ticket("o", "busy", worker="w")
    assert await store.prune(ALL) == 0
    assert await store.prune(attrs.evolve(ALL, sessions_before=9.0)) == 3
    assert [each.key for each in await store.sessions.list("o", limit=9)] == ["new", "busy"]
    assert texts(await store.sessions.messages("o", "new", limit=9)) == ["a", "b"]


async def test_the_oldest_sessions_beyond_the_number_are_deleted(store: Store) -> None:
    """The number is that of all owners. Busy sessions stay, even if there are too many then."""
    for number in range(5):
        await store.sessions.append(turn(str(number), at=float(number), owner=f"o{number % 2}"))
    await store.sessions.take_ticket("o0", "0", worker="w")
    assert await store.prune(attrs.evolve(ALL, max_sessions=3)) == 4
    assert (await store.sessions.count(active_since=0.0)).total == 3
    assert await store.sessions.get("o0", "0") is not None
    assert await store.prune(attrs.evolve(ALL, max_sessions=0)) == 4
    assert (await store.sessions.count(active_since=0.0)).total == 1


async def test_archives_are_deleted(store: Store) -> None:
    """Old messages of earlier epochs are deleted, never those of the current one."""
    await store.sessions.append(turn("k", "a", at=1.0))
    await store.sessions.append(turn("k", "b", at=5.0))
    await store.sessions.reset("o", "k", at=6.0)
    await store.sessions.append(turn("k", "c", at=2.0))
    assert await store.prune(attrs.evolve(ALL, archives_before=5.0)) == 1
    assert texts(await store.sessions.messages("o", "k", limit=9, archived=True)) == ["b", "c"]


async def test_old_runs_are_deleted(store: Store) -> None:
    """With their deliveries and keys; runs that have not ended or are not delivered stay."""
    await store.idempotency.claim("hook", "key", digest=b"1", run=run("old"))
    for run_id in ("waits", "undelivered", "new"):
        await store.runs.add(run(run_id))
    for run_id, at, delivered in (("old", 20.0, True), ("undelivered", 20.0, False), ("new", 30.0, True)):
        told = delivery(f"msg_{run_id}", run_id=run_id)
        await store.runs.finish(run_id, state="completed", status=200, result=b"{}", at=at, deliveries=[told])
        if delivered:
            await store.deliveries.note(told.id, state="delivered", at=at)
    assert await store.prune(ALL) == 0
    await store.prune(attrs.evolve(ALL, runs_before=30.0))
    found = {run_id: await store.runs.get(run_id) for run_id in ("old", "waits", "undelivered", "new")}
    assert [run_id for run_id, each in found.items() if each is None] == ["old"]
    assert await store.deliveries.of_run("old") == []
    assert len(await store.deliveries.of_run("new")) == 1
    assert (await store.idempotency.claim("hook", "key", digest=b"2", run=run("again"))).is_new


async def test_the_oldest_runs_beyond_the_number_are_deleted(store: Store) -> None:
    """Runs that have not ended stay."""
    for number in range(5):
        await store.runs.add(run(f"run_{number}"))
    for number in range(1, 5):
        await store.runs.finish(f"run_{number}", state="failed", status=502, result=b"", at=100.0 - number)
    assert await store.prune(attrs.evolve(ALL, max_runs=3)) == 2
    left = [number for number in range(5) if await store.runs.get(f"run_{number}") is not None]
    assert left == [0, 1, 2]
    await store.prune(attrs.evolve(ALL, max_runs=0))
    assert [number for number in range(5) if await store.runs.get(f"run_{number}") is not None] == [0]


async def test_deliveries_without_a_run_are_deleted(store: Store) -> None:
    """Once they are done and old, also those whose state is unknown."""
    for number, state in enumerate(("pending", "delivered", "unknown", "delivered"), start=1):
        await store.deliveries.add(delivery(f"msg_{number}", state=state, done_at=[None, 11.0, None, 50.0][number - 1]))
    assert await store.prune(attrs.evolve(ALL, runs_before=20.0)) == 2
    assert [each.id for each in await store.deliveries.of_run("run_1")] == ["msg_1", "msg_4"]


async def test_much_is_deleted_in_one_call(store: Store) -> None:
    """More rows than a slice has; a write that is queued behind does not wait for all of them."""
    for number in range(350):
        store.sessions.append(turn(str(number), at=1.0))
    everything = store.prune(attrs.evolve(ALL, sessions_before=2.0))
    await store.check()
    assert await everything == 700
    assert await store.sessions.count(active_since=0.0) == SessionCounts(total=0, active=0, busy=0)


async def test_statistics(store: Store) -> None:
    """The statistics of an open store; `check` raises nothing while it can be written to."""
    await store.check()
    found = store.statistics()
    assert (found.state, found.error) == ("open", None)
    assert found.kind in ("sqlite", "memory")


# -- exchanges --------------------------------------------------------------------------------------------------------


def record(number: int, **changes: Any) -> ExchangeRecord:
    """A record in which every field is set."""
    said: dict[str, Any] = {
        "id": f"ex_{number}",
        "request_id": "req_1",
        "owner": "o",
        "worker": "w",
        "endpoint": "/chat/completions",
        "model": "m",
        "stream": True,
        "started_at": float(number),
        "ended_at": number + 1.5,
        "outcome": "complete",
        "status": 200,
        "target": "up/m",
        "attempts": (
            AttemptRecord(
                target="up/m",
                why="first",
                started_s=0.5,
                duration_s=1.0,
                outcome="complete",
                status=None,
                first_content_s=0.25,
            ),
        ),
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "counted": False,
        "events": 5,
        "bytes": 600,
        "first_content_s": 0.25,
    }
    return ExchangeRecord(**said | changes)


async def test_records_come_back_as_they_were(store: Store) -> None:
    """With every field, the last added first."""
    records = [record(1), record(2, outcome="lost", ended_at=None, status=None, stream=False, counted=True)]
    await store.exchanges.put([each.encode() for each in records])
    assert await store.exchanges.list(limit=10) == records[::-1]


async def test_a_record_is_kept_once(store: Store) -> None:
    """A stored record does not change, unless it is lost: the new one knows more."""
    await store.exchanges.put([record(1).encode(), record(2, outcome="lost").encode()])
    later = [record(1, outcome="lost"), record(1, events=9), record(2, outcome="cancelled")]
    await store.exchanges.put([each.encode() for each in later])
    assert [(each.id, each.outcome, each.events) for each in await store.exchanges.list(limit=10)] == [
        ("ex_2", "cancelled", 5),
        ("ex_1", "complete", 5),
    ]


async def test_records_are_paged_and_chosen(store: Store) -> None:
    """By owner, by outcome, and behind a record; the page behind an unknown record is empty."""
    await store.exchanges.put(
        [
            record(n, owner="a" if n % 2 else "b", outcome="lost" if n % 3 == 0 else "complete").encode()
            for n in range(1, 10)
        ]
    )

    async def listed(**asked: Any) -> list[int]:
        limit, after = asked.pop("limit", 100), asked.pop("after", None)
        found = await store.exchanges.list(ExchangeQuery(**asked), limit=limit, after=after)
        return [int(each.id[3:]) for each in found]

    assert await listed() == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert await listed(limit=2) == [9, 8]
    assert await listed(limit=2, after="ex_8") == [7, 6]
    assert await listed(owner="a") == [9, 7, 5, 3, 1]
    assert await listed(outcome="lost") == [9, 6, 3]
    assert await listed(outcome="complete", owner="b", after="ex_8") == [4, 2]
    assert await listed(after="ex_99") == []
    assert await listed(failed=True) == [9, 6, 3]
    assert await listed(failed=True, owner="b") == [6]
    assert await listed(id="ex_4") == [4]
    assert await listed(id="req_1", owner="a", limit=1) == [9]
    assert (
        await listed(id="req_2")
        == await listed(model="x")
        == await listed(since=10.0)
        == await listed(before=1.0)
        == []
    )
    assert await listed(since=3.0, before=6.0, model="m") == [5, 4, 3]


async def test_old_records_are_deleted(store: Store) -> None:
    """By age, and the oldest in excess of a number."""
    await store.exchanges.put([record(n).encode() for n in range(1, 2501)])
    assert await store.prune(attrs.evolve(ALL, exchanges_before=1001.0, max_exchanges=10_000)) == 1000
    assert await store.prune(attrs.evolve(ALL, max_exchanges=3)) == 1497
    assert [each.id for each in await store.exchanges.list(limit=10)] == ["ex_2500", "ex_2499", "ex_2498"]


# -- objects of upstreams ---------------------------------------------------------------------------------------------


def an_object(object_id: str, *, upstream: str = "u", owner: str = "o", at: float = 1.0) -> UpstreamObject:
    """An object of an upstream."""
    return UpstreamObject(id=object_id, upstream=upstream, owner=owner, at=at)


async def test_an_object_keeps_its_owner(store: Store) -> None:
    """Whoever notes it later; two upstreams may give out the same id."""
    await store.objects.note([an_object("a"), an_object("b", owner="p")])
    await store.objects.note([an_object("a", owner="thief"), an_object("a", upstream="v", owner="p")])
    found = await store.objects.find(["a", "unknown", *(str(number) for number in range(2500))])
    assert sorted((each.upstream, each.owner) for each in found) == [("u", "o"), ("v", "p")]
    await store.objects.drop("a", "u")
    assert [each.upstream for each in await store.objects.find(["a"])] == ["v"]


async def test_objects_are_bounded_by_age_and_count(store: Store) -> None:
    """The oldest ones are forgotten."""
    await store.objects.note([an_object(str(number), at=float(number)) for number in range(9)])
    keep = attrs.evolve(ALL, objects_before=3.0)
    assert await store.prune(keep) == 3
    assert await store.prune(attrs.evolve(keep, max_objects=4)) == 2
    found = await store.objects.find([str(number) for number in range(9)])
    assert sorted(each.id for each in found) == ["5", "6", "7", "8"]


# -- reasoning and secrets --------------------------------------------------------------------------------------------


async def test_reasoning_is_found_by_its_owner(store: Store) -> None:
    """By the ids of the calls, not by another owner, and not once it is too old. The last one of an id counts."""
    await store.reasoning.put([ReasoningRecord("a", "c1", 5.0, b"one"), ReasoningRecord("b", "c1", 5.0, b"b")], most=9)
    await store.reasoning.put([ReasoningRecord("a", "c2", 7.0, b"two")], most=9)
    assert await store.reasoning.get("a", ["c1", "c2", "c3"], since=5.0) == {"c1": b"one", "c2": b"two"}
    assert await store.reasoning.get("a", ["c1", "c2"], since=6.0) == {"c2": b"two"}
    assert await store.reasoning.get("", ["c1"], since=0.0) == {}
    await store.reasoning.put([ReasoningRecord("a", "c1", 8.0, b"new")], most=9)
    assert await store.reasoning.get("a", ["c1"], since=6.0) == {"c1": b"new"}


async def test_reasoning_is_bounded(store: Store) -> None:
    """The oldest entries in excess go at once, and those that are too old when the store is pruned."""
    for number in range(5):
        await store.reasoning.put([ReasoningRecord("a", f"c{number}", float(number), b"v")], most=3)
    ids = [f"c{number}" for number in range(5)]
    assert sorted(await store.reasoning.get("a", ids, since=0.0)) == ["c2", "c3", "c4"]
    assert await store.prune(attrs.evolve(ALL, reasoning_before=4.0)) == 2
    assert sorted(await store.reasoning.get("a", ids, since=0.0)) == ["c4"]


async def test_a_secret_is_made_once(store: Store) -> None:
    """Whoever comes first makes it; everybody gets the same."""
    assert await store.secret("marks", b"first") == b"first"
    assert await store.secret("marks", b"second") == b"first"
    assert await store.secret("other", b"third") == b"third"


# -- responses --------------------------------------------------------------------------------------------------------


def a_response(response_id: str, *, owner: str = "o", at: float = 1.0, body: bytes = b"{}") -> StoredResponse:
    """A response that the gateway keeps."""
    return StoredResponse(id=response_id, owner=owner, at=at, body=body, input=b"[]")


async def test_a_response_belongs_to_its_owner(store: Store) -> None:
    """To another owner it is absent; putting it again replaces it."""
    await store.responses.put(a_response("r"))
    await store.responses.put(a_response("r", body=b'{"a":1}'))
    found = await store.responses.get("o", "r")
    assert found == a_response("r", body=b'{"a":1}')
    assert await store.responses.get("p", "r") is None
    assert await store.responses.delete("p", "r") is False
    assert await store.responses.delete("o", "r") is True
    assert await store.responses.get("o", "r") is None


async def test_responses_are_bounded_by_age_and_count(store: Store) -> None:
    """The oldest ones are deleted."""
    for number in range(9):
        await store.responses.put(a_response(str(number), at=float(number)))
    keep = attrs.evolve(ALL, responses_before=3.0)
    assert await store.prune(keep) == 3
    assert await store.prune(attrs.evolve(keep, max_responses=4)) == 2
    assert [number for number in range(9) if await store.responses.get("o", str(number)) is not None] == [5, 6, 7, 8]


# -- keys -------------------------------------------------------------------------------------------------------------


def a_key(key_id: str, *, name: str = "") -> VirtualKey:
    """A key that was made at run time."""
    return VirtualKey(
        id=key_id, name=name or key_id, digest=key_id.encode(), shown="sk", settings=b"{}", created_at=1.0
    )


async def test_keys(store: Store) -> None:
    """A name is given once; a key is found by its id and its name; the newest come first."""
    assert await store.keys.add(a_key("k1", name="ada"))
    assert not await store.keys.add(a_key("k2", name="ada"))
    assert await store.keys.add(a_key("k3"))
    assert await store.keys.get("k1") == await store.keys.get("ada") == a_key("k1", name="ada")
    assert await store.keys.get("k2") is None
    assert [key.id for key in await store.keys.list(limit=9)] == ["k3", "k1"]
    assert [key.id for key in await store.keys.list(limit=9, after="k3")] == ["k1"]


async def test_changes_of_keys(store: Store) -> None:
    """Each has a version of its own; a revoked key changes no more, and is among the changes, but not among all."""
    await store.keys.add(a_key("k1"))
    await store.keys.add(a_key("k2"))
    [first, second] = await store.keys.since(0)
    assert first.version < second.version
    changed = await store.keys.change("k1", {"settings": b'{"rpm":1}', "old_digest": b"old", "old_until": 5.0})
    assert changed == attrs.evolve(a_key("k1"), settings=b'{"rpm":1}', old_digest=b"old", old_until=5.0)
    [news] = await store.keys.since(second.version)
    assert (news.id, news.settings, news.old_digest, news.is_revoked) == ("k1", b'{"rpm":1}', b"old", 0)
    assert await store.keys.change("k1", {"revoked_at": 7.0}) is not None
    assert await store.keys.change("k1", {"settings": b"{}"}) is None
    assert await store.keys.change("none", {"settings": b"{}"}) is None
    [news] = await store.keys.since(news.version)
    assert (news.id, news.is_revoked) == ("k1", 1)
    assert [key.id for key in await store.keys.since(0)] == ["k2"]
