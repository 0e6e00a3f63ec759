"""Runs: each accepted request gets one result, whatever fails in between."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.asgi_client import ClientCall
from tests.support.bomb import Bomb, armed
from tests.support.gateway import OpenApp, Served, make_config
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

REPLY: Script = (
    Say(content("Hel")),
    Say(content("lo")),
    Say(chunk({}, finish_reason="stop")),
    Say(usage(7, 2)),
    Say(DONE),
)
DOWN = answers(b'{"error":{"message":"down"}}', status=500)


def request(**own: Any) -> RunRequest:  # Any: its fields
    """A request without a session."""
    default = {"channel": "h", "owner": "", "session": None, "action": "chat", "text": "Hi", "sender": "ada"}
    return RunRequest(**{**default, "model": "up/m", **own})


def config(path: object = ":memory:", **hook: Any) -> Any:  # Any: a Config
    """A configuration with a hook ``h``."""
    return make_config(store={"path": str(path)}, hooks={"h": {"model": "up/m", **hook}})


async def ended(service: Runs, run: Run) -> Run:
    """Waits until the run has ended, and returns it."""
    with trio.fail_after(100):
        return await service.wait_ended(run.id)


async def deliveries(served: Served, run: Run) -> list[Delivery]:
    """The deliveries of a run's result."""
    return list(await served.gateway.store.deliveries.of_run(run.id))


# -- acknowledgement --------------------------------------------------------------------------------------------------


async def test_an_acknowledged_run_is_left_when_the_gateway_stops(open_app: OpenApp, tmp_path: Path) -> None:
    """It does not end, not even as failed; the next start executes it, and it has one result."""
    path = tmp_path / "t.db"
    async with open_app(config(path), Provider((Say(content("a")), Stall()))) as served:
        service = served.gateway.runs
        [first, second] = [
            (await service.accept(request(text=text), acknowledged=True)).run for text in ("first", "second")
        ]
        service.execute_soon(first)
        await served.client.ask("GET", "/status")
        with trio.fail_after(30):
            while not served.gateway.live:  # noqa: ASYNC110 - there is no event
                await trio.lowlevel.checkpoint()
        served.gateway.drain.begin()
        service.execute_soon(second)  # accepted before the drain, started during it
        served.gateway.drain.cut()
        with trio.fail_after(30):
            while served.gateway.live:  # noqa: ASYNC110 - there is no event
                await trio.lowlevel.checkpoint()
        await wait_all_tasks_blocked(0.01)
        for run in (first, second):
            assert (await service.get(run.id)).state in ("queued", "running")
    async with open_app(config(path), Provider(REPLY)) as served:
        await served.gateway.workers.join()
        for run in (first, second):
            found = await ended(served.gateway.runs, run)
            assert (found.state, msgspec.json.decode(found.result)["reply"]) == ("completed", "Hello")
        assert len(served.providers["up"].calls) == 2


async def test_a_run_without_acknowledgement_fails_with_its_worker(open_app: OpenApp, tmp_path: Path) -> None:
    """No client was told that it would be finished; its idempotency key is free again."""
    path = tmp_path / "t.db"
    async with open_app(config(path)) as served:
        abandoned = (await served.gateway.runs.accept(request(), acknowledged=False, idempotency=("k", b"1"))).run
    async with open_app(config(path), Provider(REPLY)) as served:
        await served.gateway.workers.join()
        found = await ended(served.gateway.runs, abandoned)
        assert (found.state, found.status) == ("failed", 503)
        again = await served.gateway.runs.accept(request(), acknowledged=False, idempotency=("k", b"1"))
        assert again.is_new


async def test_a_run_that_crashes_its_process_each_time(open_app: OpenApp) -> None:
    """It is started a limited number of times, then fails."""
    async with open_app(config(), Provider(REPLY)) as served:
        run = (await served.gateway.runs.accept(request(), acknowledged=True)).run
        found = await served.gateway.runs.execute(attrs.evolve(run, starts=execution.MAX_STARTS))
        assert (found.state, found.status) == ("failed", 500)
        assert not served.providers["up"].calls


async def test_a_request_that_cannot_be_decoded(open_app: OpenApp, logs: Logs) -> None:
    """A row of another version, for example, fails alone; other runs continue."""
    logs.expect_error("run_crashed")
    async with open_app(config(), Provider(REPLY)) as served:
        service = served.gateway.runs
        bad = (await service.accept(request(), acknowledged=True)).run
        service.execute_soon(attrs.evolve(bad, request=b'{"future":1}'))
        assert (await ended(service, bad)).state == "failed"
        good = (await service.accept(request(), acknowledged=True)).run
        service.execute_soon(good)
        assert (await ended(service, good)).state == "completed"


async def test_an_acknowledged_run_waits_for_capacity(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A full gateway retries it until there is a free slot."""
    full = make_config(store={"path": ":memory:"}, hooks={"h": {}}, limits={"max_exchanges": 1})
    async with open_app(full, Provider((Pause(5), *REPLY))) as served:
        service = served.gateway.runs
        runs = [(await service.accept(request(), acknowledged=True)).run for _ in range(2)]
        handles = [service.execute_soon(run) for run in runs]
        for handle in handles:
            await handle.done.wait()
        assert [handle.run.state for handle in handles] == ["completed", "completed"]
        served.assert_clean()


async def test_a_retried_run_keeps_its_ticket(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """A later message of the session is answered after it."""
    full = make_config(store={"path": ":memory:"}, hooks={"h": {}}, limits={"max_exchanges": 1})
    async with open_app(full, Provider((Pause(2.5), *REPLY), REPLY)) as served:
        service = served.gateway.runs
        messages = [("0", None), ("1", "k"), ("2", "k")]
        accepted = [
            (await service.accept(request(text=text, session=session), acknowledged=True)).run
            for text, session in messages
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


class FailingStore:
    """Makes the store of a gateway refuse results, a number of times."""

    def __init__(self, served: Served, times: int) -> None:
        self._finish = served.gateway.store.runs.finish
        self.left = times
        served.gateway.store.runs.finish = self.finish  # type: ignore[method-assign]

    def finish(self, *args: Any, **kwargs: Any) -> Any:  # Any: as the store's
        """Fails while there are failures left."""
        if self.left <= 0:
            return self._finish(*args, **kwargs)
        self.left -= 1
        return self._refuse()

    async def _refuse(self) -> None:
        await trio.lowlevel.checkpoint()
        raise StoreUnavailable("The disk is full.")


async def test_an_acknowledged_run_whose_result_cannot_be_stored(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It is executed again until the result can be stored."""
    async with open_app(config(), Provider(REPLY)) as served:
        service = served.gateway.runs
        FailingStore(served, 2)
        run = (await service.accept(request(), acknowledged=True)).run
        handle = service.execute_soon(run)
        await handle.done.wait()
        assert handle.run.state == "completed"
        served.assert_clean()


async def test_an_answer_that_cannot_be_stored_is_not_sent(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The client gets the error; the run ends as failed once that can be stored."""
    async with open_app(config(session="none"), Provider(REPLY)) as served:
        FailingStore(served, 3)
        call = await served.client.ask("POST", "/hooks/h", {"text": "Hi"})
        assert (call.status, call.error["code"]) == (503, "store_unavailable")
        run = await ended(served.gateway.runs, await served.gateway.runs.get(call.header("x-run-id")))
        assert (run.state, run.status) == ("failed", 503)


async def test_nothing_is_accepted_without_a_store(open_app: OpenApp, tmp_path: Path, logs: Logs) -> None:
    """There is no 202 and no 200 for a message that is not stored."""
    logs.expect_error("store_unavailable")
    bad = tmp_path / "not a directory"
    bad.write_text("x")
    async with open_app(config(bad / "t.db"), Provider(REPLY)) as served:
        for prefer in ("respond-async", "x"):
            call = await served.client.ask("POST", "/hooks/h", {"text": "Hi", "from": "a"}, headers={"prefer": prefer})
            assert (call.status, call.error["code"]) == (503, "store_unavailable")
        assert not served.providers["up"].calls
        assert len(served.gateway.runs._queue) == 0


async def test_a_run_that_the_store_refused_leaves_no_task(open_app: OpenApp) -> None:
    """The client has the error, so nothing is retried: a store that fails for a while must not collect a task for each
    message."""
    async with open_app(config(session="none"), Provider(REPLY)) as served:
        await served.gateway.workers.join()

        async def refuse() -> None:
            await trio.lowlevel.checkpoint()
            raise StoreUnavailable("The disk is full.")

        served.gateway.store.runs.add = lambda run: refuse()  # type: ignore[method-assign]
        call = await served.client.ask("POST", "/hooks/h", {"text": "Hi"})
        assert (call.status, call.error["code"]) == (503, "store_unavailable")
        assert not served.gateway.runs._nursery.child_tasks


# -- deliveries and display-------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "state"), [(REPLY, "completed"), (DOWN, "failed")])
async def test_a_callback_is_written_with_the_result(open_app: OpenApp, script: Script, state: str) -> None:
    """There is one repeatable delivery, with the run as a client that fetches it sees it."""
    async with open_app(config(), Provider(script)) as served:
        service = served.gateway.runs
        run = (await service.accept(request(reply_to="https://a.example/x"), acknowledged=True)).run
        found = await service.execute(run)
        [delivery] = await deliveries(served, run)
        assert (delivery.channel, delivery.target, delivery.repeatable) == ("h", "https://a.example/x", True)
        body = msgspec.json.decode(delivery.body)
        assert body["type"] == f"run.{state}"
        assert body["data"]["id"] == run.id
        assert body["data"]["result"] == msgspec.json.decode(found.result)
        again = await service.execute(run)  # the run has ended
        assert again == await service.get(run.id)
        assert len(await deliveries(served, run)) == 1
        assert len(served.providers["up"].calls) == 1


class Shown:
    """A live view that keeps the texts that it displays."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.open = 0

    @contextlib.asynccontextmanager
    async def watch(self, run: Run, request: RunRequest) -> AsyncIterator[Shown]:
        """Counts the open displays."""
        self.open += 1
        try:
            await trio.lowlevel.checkpoint()
            yield self
        finally:
            self.open -= 1

    def show(self, text: str) -> None:
        """Keeps the text."""
        self.texts.append(text)

    async def end(self) -> Mapping[str, Any]:
        """Returns the id of a message."""
        await trio.lowlevel.checkpoint()
        return {"message": 7}


async def test_a_channel_displays_a_run_and_delivers_its_result(open_app: OpenApp) -> None:
    """The live view gets the growing text; the delivery has what the live view returned."""
    async with open_app(config(), Provider(REPLY)) as served:
        shown = served.gateway.runs.live_views["h"] = Shown()
        run = (await served.gateway.runs.accept(request(reply_to={"target": "c1", "to": 5}), acknowledged=True)).run
        await served.gateway.runs.execute(run)
        assert shown.texts[0] == "Hel"
        assert shown.texts[-1] == "Hello"
        assert shown.open == 0
        [delivery] = await deliveries(served, run)
        assert (delivery.target, delivery.repeatable) == ("c1", False)
        body = msgspec.json.decode(delivery.body)
        assert (body["reply_to"], body["live"]) == ({"target": "c1", "to": 5}, {"message": 7})
        assert body["data"]["result"]["reply"] == "Hello"


async def test_a_channel_that_crashes_fails_its_run_alone(open_app: OpenApp, logs: Logs) -> None:
    """An exception from a live view becomes the result of the run."""
    logs.expect_error("exchange_crashed")

    class Broken(Shown):
        def show(self, text: str) -> None:
            raise ValueError("no")

    async with open_app(config(), Provider(REPLY)) as served:
        served.gateway.runs.live_views["h"] = Broken()
        run = (await served.gateway.runs.accept(request(reply_to={"target": "c"}), acknowledged=True)).run
        assert (await served.gateway.runs.execute(run)).state == "failed"
        served.assert_clean()


# -- the sweep --------------------------------------------------------------------------------------------------------

SCENES: dict[str, Script] = {
    "answered": (SlowConnect(1), Head(), Pause(1), *REPLY),
    "refused": (Pause(1), *answers(b'{"error":{"message":"no"}}', status=400)),
}


@pytest.fixture
def steady_task_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Trio's task order the same in each test run (see test_cancellation)."""
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr("trio._core._run._r", random.Random(2))


@pytest.mark.slow
@pytest.mark.parametrize("acknowledged", [False, True])
@pytest.mark.parametrize("scene", SCENES)
async def test_a_run_that_is_cancelled_at_any_step(
    open_app: OpenApp, autojump_clock: MockClock, steady_task_order: None, scene: str, acknowledged: bool
) -> None:
    """During acceptance and execution. Afterwards the run has ended, was never stored, or is acknowledged and
    continues; no slot, exchange or waiting task is left."""
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
                claim = await service.accept(request(), acknowledged=acknowledged, idempotency=key)
                known.append(claim.run)
                await service.execute(claim.run)
            with trio.fail_after(100):
                if known:
                    assert (await ended(service, known[0])).state in ENDED
                while len(service._queue) or served.gateway.live:  # noqa: ASYNC110 - virtual time
                    await trio.sleep(0.1)
            # In every case the sender can retry, and gets an answer.
            again = await service.accept(request(), acknowledged=False, idempotency=key)
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
    """Sends a message from ada."""
    body = {"from": "ada", "action": action, **({"text": text} if text else {})}
    return await served.client.ask("POST", "/hooks/h", body, headers=headers)


async def remembered(served: Served) -> list[tuple[str, str]]:
    """The messages of ada's session: role and content."""
    call = await ask(served, "history")
    assert call.status == 200, call.body
    return [(message["role"], message["content"]) for message in call.json["messages"]]


async def test_a_session_remembers(open_app: OpenApp) -> None:
    """Earlier messages and notes precede the next message; a reset clears them; other senders do not see them."""
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
        assert await remembered(served) == [*sent[1:], ("assistant", "Hello")]
        await served.client.ask("POST", "/hooks/h", {"from": "bob", "text": "mine"})
        assert len(served.providers["up"].calls[-1].json["messages"]) == 2
        assert (await ask(served, "reset")).status == 200
        assert await remembered(served) == []
        counts = await served.gateway.store.sessions.count(active_since=0.0)
        assert (counts.total, counts.busy) == (2, 0)


async def test_stop_ends_the_running_turn(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It ends at once, and so does its upstream call. The result of ``stop`` lists it with its partial answer, and the
    session keeps that as partial."""
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
    """They wait neither for the running turn nor for a slot of a full hook."""
    async with open_app(config(concurrency=1, queue=1), Provider((Pause(5), *REPLY))) as served:
        for text in ("one", "two"):
            assert (await ask(served, "chat", text, prefer="respond-async")).status == 202
        await trio.sleep(1)
        begun = trio.current_time()
        assert (await ask(served, "chat", "three")).status == 503
        assert await remembered(served) == []
        assert len((await ask(served, "stop")).json["stopped"]) == 1
        assert trio.current_time() - begun < 1


async def test_stop_ends_a_turn_that_waits_for_a_slot(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The run has its session's turn while other runs hold the slots: it ends at once, and asks no upstream."""
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
    """One at a time, notes included; acknowledged runs wait without a limit."""
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
        texts = [text for role, text in await remembered(served) if role == "user"]
        assert texts == ["one", "two", "three"]
        served.assert_clean()


async def test_the_order_is_that_of_acceptance(open_app: OpenApp, tmp_path: Path) -> None:
    """Runs are executed in the order of acceptance, whenever they are started, and also by the next process."""
    path = tmp_path / "t.db"
    numbers = [f"{number}" for number in range(6)]
    async with open_app(config(path), Provider((Stall(),))) as served:
        service = served.gateway.runs
        for number in numbers:
            await service.accept(request(text=number, session="k"), acknowledged=True)
    async with open_app(config(path), Provider(REPLY)) as served:
        service = served.gateway.runs
        accepted = [
            (await service.accept(request(text=number, session="k"), acknowledged=True)).run for number in ("6", "7")
        ]
        for run in reversed(accepted):
            service.execute_soon(run)
        await ended(service, accepted[-1])
        found = await served.gateway.store.sessions.history("", "k", last=99)
        assert found is not None
        messages = [msgspec.json.decode(message.body) for message in found[1]]
        assert [message["content"] for message in messages if message["role"] == "user"] == [*numbers, "6", "7"]
        served.assert_clean()


async def test_a_waiting_session_does_not_delay_others(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """However many messages of one sender wait for their turns, another sender is answered at once."""
    async with open_app(config(concurrency=2), Provider((Pause(5), *REPLY))) as served:
        for text in "abcdefgh":
            assert (await ask(served, "chat", text, prefer="respond-async")).status == 202
        begun = trio.current_time()
        assert (await served.client.ask("POST", "/hooks/h", {"from": "bob", "text": "mine"})).status == 200
        assert trio.current_time() - begun == pytest.approx(5, abs=0.1)


async def test_a_turn_that_fails_is_not_remembered(open_app: OpenApp) -> None:
    """So a retry of the sender does not appear twice."""
    async with open_app(config(), Provider(DOWN, REPLY)) as served:
        assert (await ask(served, "chat", "one", **{"idempotency-key": "k"})).status == 502
        assert (await ask(served, "chat", "one", **{"idempotency-key": "k"})).status == 200
        assert await remembered(served) == [("user", "one"), ("assistant", "Hello")]


@pytest.mark.slow
async def test_a_turn_whose_client_disconnects_at_any_step(
    open_app: OpenApp, autojump_clock: MockClock, steady_task_order: None
) -> None:
    """No ticket is left, and the turn is appended once or not at all."""
    async with open_app(config(), Provider((Head(), Pause(1), *REPLY))) as served:
        await served.gateway.workers.join()
        steps = 0
        while True:
            steps += 1
            before = len(await remembered(served))
            call = served.client.start("POST", "/hooks/h", {"from": "ada", "text": "x"})
            bomb = Bomb(steps, call.disconnect)
            with armed(bomb):
                await call.wait()
            with trio.fail_after(100):
                while await served.gateway.store.runs.unfinished("h"):  # noqa: ASYNC110 - virtual time
                    await trio.sleep(0.1)
            assert not await served.gateway.store.sessions.tickets("", "hook:h:ada")
            assert len(await remembered(served)) - before in (0, 2)
            await ask(served, "reset")
            served.assert_clean()
            if not bomb.fired:
                break
        assert steps > 20
