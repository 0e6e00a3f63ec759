"""Runs: an order becomes a result once, whatever happens in between."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.asgi_client import ClientCall
from tests.support.bomb import Bomb, armed
from tests.support.gateway import Served, make_config
from tests.support.logs import Logs
from tests.support.provider import (
    DONE,
    Head,
    Pause,
    Provider,
    Say,
    Script,
    SlowConnect,
    Stall,
    answers,
    chunk,
    content,
    usage,
)
from trigate.errors import StoreUnavailable
from trigate.runs import execution
from trigate.runs.request import RunRequest
from trigate.runs.service import Runs
from trigate.store.records import ENDED, Delivery, Run

OpenApp = Callable[..., AbstractAsyncContextManager[Served]]

REPLY: Script = (
    Say(content("Hel")),
    Say(content("lo")),
    Say(chunk({}, finish_reason="stop")),
    Say(usage(7, 2)),
    Say(DONE),
)
DOWN = answers(b'{"error":{"message":"down"}}', status=500)


def order(**own: Any) -> RunRequest:  # Any: its fields
    """An order that remembers nothing."""
    default = {"channel": "h", "owner": "", "session": None, "action": "chat", "text": "Hi", "sender": "ada"}
    return RunRequest(**{**default, "model": "up/m", **own})


def config(path: object = ":memory:", **hook: Any) -> Any:  # Any: a Config
    """One with a hook ``h``."""
    return make_config(store={"path": str(path)}, hooks={"h": {"model": "up/m", **hook}})


async def ended(service: Runs, run: Run) -> Run:
    """The run, once it has ended."""
    with trio.fail_after(100):
        return await service.wait_ended(run.id)


async def deliveries(served: Served, run: Run) -> list[Delivery]:
    """What is told of a run."""
    return list(await served.gateway.store.deliveries.of_run(run.id))


def test_an_order_is_kept_as_json() -> None:
    """All of it comes back."""
    every = order(
        session="s", system="x", parameters={"stop": ["a"]}, reply_to={"target": "c", "message": 5}, finish=True
    )
    assert RunRequest.decode(every.encode()) == every
    assert RunRequest.decode(order(reply_to="https://a.example/").encode()) == order(reply_to="https://a.example/")


# -- promises ---------------------------------------------------------------------------------------------------------


async def test_a_promised_run_is_left_when_the_gateway_stops(open_app: OpenApp, tmp_path: Path) -> None:
    """It does not end, not even as failed; the next start does it, and the result is there once."""
    where = tmp_path / "t.db"
    async with open_app(config(where), Provider((Say(content("a")), Stall()))) as served:
        service = served.gateway.runs
        [first, second] = [
            (await service.accept(order(text=text), acknowledged=True)).run for text in ("first", "second")
        ]
        service.execute_soon(first)
        await served.client.ask("GET", "/status")
        with trio.fail_after(30):
            while not served.gateway.live:  # noqa: ASYNC110 - there is no event
                await trio.lowlevel.checkpoint()
        served.gateway.drain.begin()
        service.execute_soon(second)  # accepted before, begun after
        served.gateway.drain.cut()
        with trio.fail_after(30):
            while served.gateway.live:  # noqa: ASYNC110 - there is no event
                await trio.lowlevel.checkpoint()
        await wait_all_tasks_blocked(0.01)
        for run in (first, second):
            assert (await service.get(run.id)).state in ("queued", "running")
    async with open_app(config(where), Provider(REPLY)) as served:
        await served.gateway.workers.join()
        for run in (first, second):
            found = await ended(served.gateway.runs, run)
            assert (found.state, msgspec.json.decode(found.result)["reply"]) == ("completed", "Hello")
        assert len(served.providers["up"].calls) == 2


async def test_what_was_not_promised_fails_with_its_worker(open_app: OpenApp, tmp_path: Path) -> None:
    """Nobody was told that it would be done, and its idempotency key is free again."""
    where = tmp_path / "t.db"
    async with open_app(config(where)) as served:
        lost = (await served.gateway.runs.accept(order(), acknowledged=False, idempotency=("k", b"1"))).run
    async with open_app(config(where), Provider(REPLY)) as served:
        await served.gateway.workers.join()
        found = await ended(served.gateway.runs, lost)
        assert (found.state, found.status) == ("failed", 503)
        again = await served.gateway.runs.accept(order(), acknowledged=False, idempotency=("k", b"1"))
        assert again.is_new


async def test_a_run_that_takes_its_process_with_it(open_app: OpenApp) -> None:
    """It is not begun for ever."""
    async with open_app(config(), Provider(REPLY)) as served:
        run = (await served.gateway.runs.accept(order(), acknowledged=True)).run
        found = await served.gateway.runs.execute(attrs.evolve(run, starts=execution.MAX_STARTS))
        assert (found.state, found.status) == ("failed", 500)
        assert not served.providers["up"].calls


async def test_a_request_that_cannot_be_read(open_app: OpenApp, logs: Logs) -> None:
    """One row that another version wrote, say, does not stop the others."""
    logs.expect_error("run_crashed")
    async with open_app(config(), Provider(REPLY)) as served:
        service = served.gateway.runs
        bad = (await service.accept(order(), acknowledged=True)).run
        service.execute_soon(attrs.evolve(bad, request=b'{"future":1}'))
        assert (await ended(service, bad)).state == "failed"
        good = (await service.accept(order(), acknowledged=True)).run
        service.execute_soon(good)
        assert (await ended(service, good)).state == "completed"


async def test_a_gateway_that_is_full_makes_a_promised_run_wait(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It is tried again until there is room."""
    full = make_config(store={"path": ":memory:"}, hooks={"h": {}}, limits={"max_exchanges": 1})
    async with open_app(full, Provider((Pause(5), *REPLY))) as served:
        service = served.gateway.runs
        both = [(await service.accept(order(), acknowledged=True)).run for _ in range(2)]
        doing = [service.execute_soon(run) for run in both]
        for each in doing:
            await each.done.wait()
        assert [each.run.state for each in doing] == ["completed", "completed"]
        served.assert_clean()


async def test_a_run_that_is_tried_again_keeps_its_place(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """What was said after it is answered after it."""
    full = make_config(store={"path": ":memory:"}, hooks={"h": {}}, limits={"max_exchanges": 1})
    async with open_app(full, Provider((Pause(2.5), *REPLY), REPLY)) as served:
        service = served.gateway.runs
        given = [("0", None), ("1", "k"), ("2", "k")]
        accepted = [
            (await service.accept(order(text=text, session=session), acknowledged=True)).run for text, session in given
        ]
        for run in accepted:
            service.execute_soon(run)
            await wait_all_tasks_blocked()
        assert [(await ended(service, run)).state for run in accepted] == ["completed"] * 3
        sent = [call.json["messages"][-1]["content"] for call in served.providers["up"].calls]
        assert sent == ["0", "1", "2"]
        await wait_all_tasks_blocked()
        assert await served.gateway.store.sessions.tickets("", "k") == []
        served.assert_clean()


class Ill:
    """A store whose runs cannot end, so many times."""

    def __init__(self, served: Served, times: int) -> None:
        self._finish = served.gateway.store.runs.finish
        self.left = times
        served.gateway.store.runs.finish = self.finish  # type: ignore[method-assign]

    def finish(self, *args: Any, **kwargs: Any) -> Any:  # Any: as the store's
        """Fails, or does it."""
        if self.left <= 0:
            return self._finish(*args, **kwargs)
        self.left -= 1
        return self._refuse()

    async def _refuse(self) -> None:
        await trio.lowlevel.checkpoint()
        raise StoreUnavailable("The disk is full.")


async def test_a_promised_run_whose_result_cannot_be_kept(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It is done again until it can be."""
    async with open_app(config(), Provider(REPLY)) as served:
        service = served.gateway.runs
        Ill(served, 2)
        run = (await service.accept(order(), acknowledged=True)).run
        doing = service.execute_soon(run)
        await doing.done.wait()
        assert doing.run.state == "completed"
        served.assert_clean()


async def test_an_answer_that_cannot_be_kept_is_not_given(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Who waits is told why; the run ends as failed once that can be kept."""
    async with open_app(config(session="none"), Provider(REPLY)) as served:
        Ill(served, 3)
        call = await served.client.ask("POST", "/hooks/h", {"text": "Hi"})
        assert (call.status, call.error["code"]) == (503, "store_unavailable")
        run = await ended(served.gateway.runs, await served.gateway.runs.get(call.header("x-run-id")))
        assert (run.state, run.status) == ("failed", 503)


async def test_nothing_is_accepted_without_a_store(open_app: OpenApp, tmp_path: Path, logs: Logs) -> None:
    """No 202 and no 200 without durability."""
    logs.expect_error("store_unavailable")
    bad = tmp_path / "not a directory"
    bad.write_text("x")
    async with open_app(config(bad / "t.db"), Provider(REPLY)) as served:
        for prefer in ("respond-async", "x"):
            call = await served.client.ask("POST", "/hooks/h", {"text": "Hi", "from": "a"}, headers={"prefer": prefer})
            assert (call.status, call.error["code"]) == (503, "store_unavailable")
        assert not served.providers["up"].calls
        assert len(served.gateway.runs._queue) == 0


async def test_what_the_store_refused_is_not_tried_again(open_app: OpenApp) -> None:
    """Nobody was promised anything: a store that is ill for a while must not leave a task for each message."""
    async with open_app(config(session="none"), Provider(REPLY)) as served:
        await served.gateway.workers.join()

        async def refuse() -> None:
            await trio.lowlevel.checkpoint()
            raise StoreUnavailable("The disk is full.")

        served.gateway.store.runs.add = lambda run: refuse()  # type: ignore[method-assign]
        call = await served.client.ask("POST", "/hooks/h", {"text": "Hi"})
        assert (call.status, call.error["code"]) == (503, "store_unavailable")
        assert not served.gateway.runs._nursery.child_tasks


# -- what is told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "state"), [(REPLY, "completed"), (DOWN, "failed")])
async def test_a_callback_is_written_with_the_result(open_app: OpenApp, script: Script, state: str) -> None:
    """One delivery, that a receiver can tell from another; it tells what the run's reader sees."""
    async with open_app(config(), Provider(script)) as served:
        service = served.gateway.runs
        run = (await service.accept(order(reply_to="https://a.example/x"), acknowledged=True)).run
        found = await service.execute(run)
        [told] = await deliveries(served, run)
        assert (told.channel, told.target, told.repeatable) == ("h", "https://a.example/x", True)
        body = msgspec.json.decode(told.body)
        assert body["type"] == f"run.{state}"
        assert body["data"]["id"] == run.id
        assert body["data"]["result"] == msgspec.json.decode(found.result)
        again = await service.execute(run)  # it has ended
        assert again == await service.get(run.id)
        assert len(await deliveries(served, run)) == 1
        assert len(served.providers["up"].calls) == 1


class Shown:
    """A channel that shows what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.open = 0

    @contextlib.asynccontextmanager
    async def watch(self, run: Run, order: RunRequest) -> AsyncIterator[Shown]:
        """As `LiveView.watch`."""
        self.open += 1
        try:
            await trio.lowlevel.checkpoint()
            yield self
        finally:
            self.open -= 1

    def show(self, text: str) -> None:
        """As `Live.show`."""
        self.texts.append(text)

    async def end(self) -> Mapping[str, Any]:
        """As `Live.end`."""
        await trio.lowlevel.checkpoint()
        return {"message": 7}


async def test_a_channel_shows_a_run_and_is_told_its_end(open_app: OpenApp) -> None:
    """The text as it grows; then a delivery that knows what was shown."""
    async with open_app(config(), Provider(REPLY)) as served:
        shown = served.gateway.runs.live_views["h"] = Shown()
        run = (await served.gateway.runs.accept(order(reply_to={"target": "c1", "to": 5}), acknowledged=True)).run
        await served.gateway.runs.execute(run)
        assert shown.texts[0] == "Hel"
        assert shown.texts[-1] == "Hello"
        assert shown.open == 0
        [told] = await deliveries(served, run)
        assert (told.target, told.repeatable) == ("c1", False)
        body = msgspec.json.decode(told.body)
        assert (body["reply_to"], body["live"]) == ({"target": "c1", "to": 5}, {"message": 7})
        assert body["data"]["result"]["reply"] == "Hello"


async def test_a_channel_that_crashes_fails_its_run_alone(open_app: OpenApp, logs: Logs) -> None:
    """Whatever an adapter raises becomes the run's end."""
    logs.expect_error("exchange_crashed")

    class Broken(Shown):
        def show(self, text: str) -> None:
            raise ValueError("no")

    async with open_app(config(), Provider(REPLY)) as served:
        served.gateway.runs.live_views["h"] = Broken()
        run = (await served.gateway.runs.accept(order(reply_to={"target": "c"}), acknowledged=True)).run
        assert (await served.gateway.runs.execute(run)).state == "failed"
        served.assert_clean()


# -- the sweep --------------------------------------------------------------------------------------------------------

SCENES: dict[str, Script] = {
    "answered": (SlowConnect(1), Head(), Pause(1), *REPLY),
    "refused": (Pause(1), *answers(b'{"error":{"message":"no"}}', status=400)),
}


@pytest.fixture
def steady_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Trio's order of tasks the same in each run (see test_cancellation)."""
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr("trio._core._run._r", random.Random(2))


@pytest.mark.slow
@pytest.mark.parametrize("promised", [False, True])
@pytest.mark.parametrize("scene", SCENES)
async def test_a_run_that_is_cancelled_at_any_step(
    open_app: OpenApp, autojump_clock: MockClock, steady_order: None, scene: str, promised: bool
) -> None:
    """Acceptance and performance: afterwards the run has ended, or was never there, or is promised and goes on; no
    place, no exchange and no waiting task is left."""
    async with open_app(config(), Provider(SCENES[scene])) as served:
        service, store = served.gateway.runs, served.gateway.store
        await served.gateway.workers.join()
        steps = fired = 0
        while True:
            steps += 1
            scope = trio.CancelScope()
            bomb = Bomb(steps, scope.cancel)
            key = (f"k{steps}", b"1")
            known: list[Run] = []
            with armed(bomb), scope:
                claim = await service.accept(order(), acknowledged=promised, idempotency=key)
                known.append(claim.run)
                await service.execute(claim.run)
            with trio.fail_after(100):
                if known:
                    assert (await ended(service, known[0])).state in ENDED
                while len(service._queue) or served.gateway.live:  # noqa: ASYNC110 - virtual time
                    await trio.sleep(0.1)
            # Whatever came of it, the sender may ask again, and gets an answer.
            again = await service.accept(order(), acknowledged=False, idempotency=key)
            if again.is_new:
                await service.execute(again.run)
            else:
                assert again.run.state in ENDED
            assert await store.runs.unfinished("h") == 0
            served.assert_clean()
            if not bomb.fired:
                break
            fired += 1
        assert fired > 10


# -- sessions ---------------------------------------------------------------------------------------------------------


async def ask(served: Served, action: str, text: str = "", **headers: str) -> ClientCall:
    """Sends a message of ada."""
    body = {"from": "ada", "action": action, **({"text": text} if text else {})}
    return await served.client.ask("POST", "/hooks/h", body, headers=headers)


async def said(served: Served) -> list[tuple[str, str]]:
    """What ada's session remembers."""
    call = await ask(served, "history")
    assert call.status == 200, call.body
    return [(message["role"], message["content"]) for message in call.json["messages"]]


async def test_a_session_remembers(open_app: OpenApp) -> None:
    """What was said and noted goes before the next message; a reset forgets it; nothing is told to another sender."""
    async with open_app(config(system="Be brief."), Provider(REPLY)) as served:
        first = await ask(served, "chat", "one")
        assert first.json["session"] == "hook:h:ada"
        noted = await ask(served, "note", "two")
        assert (noted.json["reply"], noted.json["action"], noted.json["model"]) == (None, "note", None)
        await ask(served, "chat", "three")
        sent = [(message["role"], message["content"]) for message in served.providers["up"].calls[-1].json["messages"]]
        assert sent == [
            ("system", "Be brief."),
            ("user", "one"),
            ("assistant", "Hello"),
            ("user", "two"),
            ("user", "three"),
        ]
        assert await said(served) == [*sent[1:], ("assistant", "Hello")]
        await served.client.ask("POST", "/hooks/h", {"from": "bob", "text": "mine"})
        assert len(served.providers["up"].calls[-1].json["messages"]) == 2
        assert (await ask(served, "reset")).status == 200
        assert await said(served) == []
        counts = await served.gateway.store.sessions.count(active_since=0.0)
        assert (counts.total, counts.busy) == (2, 0)


async def test_stop_ends_the_running_turn(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """At once, the upstream's part too; it says what was cut, and the session has it as partial."""
    async with open_app(config(), Provider((Say(content("Hel")), Stall()), REPLY)) as served:
        call = served.client.start("POST", "/hooks/h", {"from": "ada", "text": "one"})
        await trio.sleep(1)
        stop = await ask(served, "stop")
        assert trio.current_time() - served.providers["up"].closed_at[0] == pytest.approx(0, abs=0.05)
        await call.wait()
        assert (call.status, call.error["code"]) == (409, "stopped")
        run_id = call.header("x-run-id")
        assert stop.json["stopped"] == [{"id": run_id, "state": "cancelled", "reply": "Hel"}]
        run = await served.gateway.runs.get(run_id)
        assert (run.state, run.status) == ("cancelled", 409)
        found = await served.gateway.store.sessions.history("", "hook:h:ada", last=9)
        assert found is not None
        assert [message.partial for message in found[1]] == [False, True]
        assert (await ask(served, "stop")).json["stopped"] == []
        assert (await ask(served, "chat", "two")).status == 200
        served.assert_clean()


async def test_stop_and_history_do_not_queue(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Neither behind the turn, nor where the hook has no place left."""
    async with open_app(config(concurrency=1, queue=1), Provider((Pause(5), *REPLY))) as served:
        for text in ("one", "two"):
            assert (await ask(served, "chat", text, prefer="respond-async")).status == 202
        await trio.sleep(1)
        begun = trio.current_time()
        assert (await ask(served, "chat", "three")).status == 503
        assert await said(served) == []
        assert len((await ask(served, "stop")).json["stopped"]) == 1
        assert trio.current_time() - begun < 1


async def test_stop_ends_a_turn_that_waits_for_the_hook(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Its session's turn it is, but the hook is busy with others: it never begins, and is told so at once."""
    async with open_app(config(concurrency=1), Provider((Pause(5), *REPLY))) as served:
        first = served.client.start("POST", "/hooks/h", {"from": "bob", "text": "one"})
        await trio.sleep(1)
        call = served.client.start("POST", "/hooks/h", {"from": "ada", "text": "two"})
        await trio.sleep(1)
        begun = trio.current_time()
        stop = await ask(served, "stop")
        await call.wait()
        assert trio.current_time() - begun < 0.05
        assert (call.status, call.error["code"]) == (409, "stopped")
        assert [each["reply"] for each in stop.json["stopped"]] == [""]
        await first.wait()
        assert first.status == 200
        assert len(served.providers["up"].calls) == 1
        served.assert_clean()


async def test_turns_of_a_session_come_in_order(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """One at a time; those that were promised wait as long as it takes, and a note waits too."""
    settings = make_config(store={"path": ":memory:"}, sessions={"wait_s": 3}, hooks={"h": {"model": "up/m"}})
    async with open_app(settings, Provider((Pause(5), *REPLY))) as served:
        accepted = [
            await ask(served, action, text, prefer="respond-async")
            for action, text in (("chat", "one"), ("note", "two"), ("chat", "three"))
        ]
        await trio.sleep(1)
        assert (await ask(served, "chat", "four")).error["code"] == "session_busy"
        for call in accepted:
            run = await served.gateway.runs.wait_ended(call.json["id"])
            assert run.state == "completed"
        texts = [text for role, text in await said(served) if role == "user"]
        assert texts == ["one", "two", "three"]
        served.assert_clean()


async def test_the_order_is_that_of_acceptance(open_app: OpenApp, tmp_path: Path) -> None:
    """Whenever messages are begun, and also where another process does it after the one that accepted them."""
    where = tmp_path / "t.db"
    numbers = [f"{number}" for number in range(6)]
    async with open_app(config(where), Provider((Stall(),))) as served:
        service = served.gateway.runs
        for number in numbers:
            await service.accept(order(text=number, session="k"), acknowledged=True)
    async with open_app(config(where), Provider(REPLY)) as served:
        service = served.gateway.runs
        accepted = [
            (await service.accept(order(text=number, session="k"), acknowledged=True)).run for number in ("6", "7")
        ]
        for run in reversed(accepted):
            service.execute_soon(run)
        await ended(service, accepted[-1])
        found = await served.gateway.store.sessions.history("", "k", last=99)
        assert found is not None
        said = [msgspec.json.decode(message.body) for message in found[1]]
        assert [each["content"] for each in said if each["role"] == "user"] == [*numbers, "6", "7"]
        served.assert_clean()


async def test_a_session_that_waits_is_in_nobodys_way(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """However many messages of one sender wait for their turns, another sender is answered at once."""
    async with open_app(config(concurrency=2), Provider((Pause(5), *REPLY))) as served:
        for text in "abcdefgh":
            assert (await ask(served, "chat", text, prefer="respond-async")).status == 202
        begun = trio.current_time()
        assert (await served.client.ask("POST", "/hooks/h", {"from": "bob", "text": "mine"})).status == 200
        assert trio.current_time() - begun == pytest.approx(5, abs=0.1)


async def test_a_turn_that_fails_is_not_remembered(open_app: OpenApp) -> None:
    """So the sender's next try is not there twice."""
    async with open_app(config(), Provider(DOWN, REPLY)) as served:
        assert (await ask(served, "chat", "one", **{"idempotency-key": "k"})).status == 502
        assert (await ask(served, "chat", "one", **{"idempotency-key": "k"})).status == 200
        assert await said(served) == [("user", "one"), ("assistant", "Hello")]


@pytest.mark.slow
async def test_a_turn_whose_client_leaves_at_any_step(
    open_app: OpenApp, autojump_clock: MockClock, steady_order: None
) -> None:
    """No ticket is left, and what was appended was appended once."""
    async with open_app(config(), Provider((Head(), Pause(1), *REPLY))) as served:
        await served.gateway.workers.join()
        steps = 0
        while True:
            steps += 1
            before = len(await said(served))
            call = served.client.start("POST", "/hooks/h", {"from": "ada", "text": "x"})
            bomb = Bomb(steps, call.disconnect)
            with armed(bomb):
                await call.wait()
            with trio.fail_after(100):
                while await served.gateway.store.runs.unfinished("h"):  # noqa: ASYNC110 - virtual time
                    await trio.sleep(0.1)
            assert not await served.gateway.store.sessions.tickets("", "hook:h:ada")
            assert len(await said(served)) - before in (0, 2)
            await ask(served, "reset")
            served.assert_clean()
            if not bomb.fired:
                break
        assert steps > 20
