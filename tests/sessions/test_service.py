"""`trigate.sessions`: one turn at a time, in order, remembered when it is complete, and invisible to other owners."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import attrs
import httpx2
import msgspec
import openai
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.asgi_client import ClientCall, chat
from tests.support.bomb import Bomb, armed
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.processes import configuration, run_gateway
from tests.support.provider import (
    DONE,
    Break,
    Head,
    Pause,
    Provider,
    Say,
    Script,
    Stall,
    answers,
    chunk,
    completion,
    content,
    open_socket_provider,
    says,
)
from tests.support.scripted_upstream import TEXT, open_upstream, seen
from trigate.asgi.application import GatewayApp
from trigate.config.sections import Seconds, SessionsConfig
from trigate.errors import GatewayError, RunStopped, SessionBusy, StoreUnavailable
from trigate.openai.accumulator import AnswerAccumulator
from trigate.openai.answer import Usage
from trigate.openai.endpoints import ENDPOINTS
from trigate.openai.request import Call, decode_call
from trigate.sessions import service
from trigate.sessions.service import Sessions
from trigate.store.interface import Store
from trigate.store.memory import MemoryStore
from trigate.store.pending_write import PendingWrite
from trigate.store.records import Message, Ticket, Turn
from trigate.store.sqlite import open_sqlite_store
from trigate.workers.membership import open_workers

LIMITS = SessionsConfig()
ENDPOINT = ENDPOINTS["/v1/chat/completions"]


# -- the service ------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_sessions(store: Store) -> AsyncIterator[Sessions]:
    """The service on a store, in a worker of its own."""
    async with open_workers(store) as workers:
        yield Sessions(store, workers)


@pytest.fixture
def store() -> MemoryStore:
    """A store in memory."""
    return MemoryStore()


@pytest.fixture
async def sessions(store: MemoryStore) -> AsyncIterator[Sessions]:
    """The service on the store in memory."""
    async with open_sessions(store) as found:
        yield found


def call_of(*messages: dict[str, Any], **fields: Any) -> Call:
    """A call."""
    given = list(messages) or [{"role": "user", "content": "Hi"}]
    return decode_call(ENDPOINT, msgspec.json.encode({"model": "m", "messages": given, **fields}))


def answer_of(text: str) -> AnswerAccumulator:
    """A complete answer."""
    answer = AnswerAccumulator()
    answer.feed_answer(completion(text))
    return answer


async def take_turn(sessions: Sessions, store: Store, key: str, text: str) -> Call:
    """Opens a turn, answers with the text in capitals, and appends both."""
    async with sessions.open_turn("", key, limits=LIMITS) as turn:
        composed = turn.compose(call_of({"role": "user", "content": text}))
        await trio.sleep(random.random() / 100)
        await store.sessions.append(
            turn.result(answer_of(text.upper()), None, at=time.time(), partial=False), ticket=turn.ticket
        )
        turn.note_ticket_returned()
    return composed


def texts(call: Call) -> list[str]:
    """The texts of a call's messages."""
    return [message["content"] for message in msgspec.json.decode(call.fields["messages"])]


async def test_a_turn_sees_what_was_said(sessions: Sessions, store: MemoryStore) -> None:
    """Messages and answers of earlier turns stand before those of the next one."""
    await take_turn(sessions, store, "k", "a")
    await take_turn(sessions, store, "k", "b")
    assert texts(await take_turn(sessions, store, "k", "c")) == ["a", "A", "b", "B", "c"]
    assert texts(await take_turn(sessions, store, "other", "c")) == ["c"]


@pytest.mark.slow
async def test_turns_are_in_order(sessions: Sessions, store: MemoryStore, autojump_clock: MockClock) -> None:
    """A hundred concurrent turns of one session run in the order of their tickets, and each sees all before it."""
    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(take_turn, sessions, store, "k", f"{number}")
            await wait_all_tasks_blocked()
    found = await store.sessions.messages("", "k", limit=1000)
    assert found is not None
    said = [msgspec.json.decode(message.body)["content"] for message in found]
    assert said == [text for number in range(100) for text in (f"{number}", f"{number}")]
    assert await store.sessions.tickets("", "k") == []


async def test_one_turn_at_a_time(sessions: Sessions, autojump_clock: MockClock) -> None:
    """One turn of a session runs at a time; turns of other sessions run meanwhile."""
    running: list[str] = []
    most = 0

    async def turn(key: str) -> None:
        nonlocal most
        async with sessions.open_turn("", key, limits=LIMITS):
            assert key not in running
            running.append(key)
            most = max(most, len(running))
            await trio.sleep(1)
            running.remove(key)

    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        for key in "abcabcabc":
            nursery.start_soon(turn, key)
    assert most == 3
    assert trio.current_time() - begun == pytest.approx(3)


async def test_the_wait_is_bounded(sessions: Sessions, store: MemoryStore, autojump_clock: MockClock) -> None:
    """A turn that has waited for `wait_s` raises `SessionBusy` and returns its ticket; 0 = it waits without a limit."""
    limits = attrs.evolve(LIMITS, wait_s=Seconds(3.0))
    begun = trio.current_time()
    async with sessions.open_turn("", "k", limits=limits) as first:
        with pytest.raises(SessionBusy) as caught:
            async with sessions.open_turn("", "k", limits=limits):
                pass
        assert caught.value.status == 409
        assert trio.current_time() - begun == pytest.approx(3)
        assert await store.sessions.tickets("", "k") == [first.ticket]
        with trio.move_on_after(1000) as scope:
            async with sessions.open_turn("", "k", limits=attrs.evolve(LIMITS, wait_s=Seconds(0.0))):
                pass
        assert scope.cancelled_caught
    assert await store.sessions.tickets("", "k") == []


async def test_a_ticket_taken_before(sessions: Sessions, store: MemoryStore, autojump_clock: MockClock) -> None:
    """A ticket keeps its position, whenever its turn is opened; a returned ticket does not delay other turns."""
    await sessions.stop("", "k")  # joins the other workers
    takings = [sessions.take_ticket("", "k", limits=LIMITS, run=f"run_{number}") for number in range(4)]
    turns = [await taking for taking in takings]
    order = []

    async def run_turn(number: int) -> None:
        async with sessions.open_turn("", "k", limits=LIMITS, turn=turns[number]):
            order.append(number)
            await trio.sleep(1)
        sessions.return_ticket(turns[number])

    async with trio.open_nursery() as nursery:
        for number in (3, 2, 0):
            nursery.start_soon(run_turn, number)
            await wait_all_tasks_blocked()
        sessions.return_ticket(turns[1])
    assert order == [0, 2, 3]
    assert await store.sessions.tickets("", "k") == []
    assert repr(sessions) == "<Sessions, 0 turns of 0>"


async def test_a_stop_ends_the_running_turn(sessions: Sessions, store: MemoryStore) -> None:
    """A stop ends the running turn only, at once. If the turn registers how to end it later, it ends then."""
    assert await sessions.stop("", "k") == []
    errors: list[GatewayError] = []
    async with sessions.open_turn("", "k", limits=LIMITS) as turn, trio.open_nursery() as nursery:
        nursery.start_soon(take_turn, sessions, store, "k", "x")
        await wait_all_tasks_blocked()
        assert await sessions.stop("", "k") == [turn.ticket]
        turn.stop_with(errors.append)
        assert await sessions.stop("", "k") == [turn.ticket]
        assert [type(each) for each in errors] == [RunStopped, RunStopped]
        nursery.cancel_scope.cancel()


async def test_n_must_be_one(sessions: Sessions) -> None:
    """A session remembers one answer, so n > 1 is refused."""
    async with sessions.open_turn("", "k", limits=LIMITS) as turn:
        assert texts(turn.compose(call_of(n=1))) == texts(turn.compose(call_of(n=None))) == ["Hi"]
        with pytest.raises(GatewayError, match="n must be 1") as caught:
            turn.compose(call_of(n=2))
        assert (caught.value.status, caught.value.param) == (400, "n")


async def test_tokens(sessions: Sessions) -> None:
    """An answer has the reported tokens, but never more than it has bytes. Other messages are estimated."""
    async with sessions.open_turn("", "k", limits=LIMITS) as turn:
        turn.compose(call_of())
        size = len(answer_of("Hello").message())
        for reported, counted in ((3, 3), (3000, size), (None, -(-size // 4))):
            usage = Usage(prompt_tokens=9, completion_tokens=reported) if reported is not None else None
            question, answer = turn.result(answer_of("Hello"), usage, at=0.0, partial=False).messages
            assert answer.tokens == counted
            assert question.tokens == -(-len(question.body) // 4)


async def test_idle_reset(sessions: Sessions, store: MemoryStore) -> None:
    """A session that was idle for too long begins a new epoch, once; its archive stays."""
    old = time.time() - 100
    await store.sessions.append(Turn(owner="", key="k", at=old, messages=(Message(body=b"{}", tokens=1, at=old),)))
    async with sessions.open_turn("", "k", limits=attrs.evolve(LIMITS, idle_reset_s=Seconds(200.0))) as turn:
        assert turn.session is not None
        assert turn.session.epoch == 0
    for _ in range(2):
        async with sessions.open_turn("", "k", limits=attrs.evolve(LIMITS, idle_reset_s=Seconds(50.0))) as turn:
            assert turn.session is not None
            assert turn.session.epoch == 1
            assert texts(turn.compose(call_of())) == ["Hi"]
    archived = await store.sessions.messages("", "k", limit=9, archived=True)
    assert archived is not None
    assert len(archived) == 1


async def test_a_ticket_that_could_not_be_returned(sessions: Sessions, store: MemoryStore) -> None:
    """If the store failed when a turn ended, its ticket is still stored, but does not delay other turns."""
    async with sessions.open_turn("", "k", limits=LIMITS):
        store.failure = "disk full"
    store.failure = None
    assert len(await store.sessions.tickets("", "k")) == 1
    assert await sessions.stop("", "k") == []
    async with sessions.open_turn("", "k", limits=LIMITS) as turn:
        assert await store.sessions.tickets("", "k") == [turn.ticket]


async def test_a_store_that_does_not_issue_a_ticket(
    sessions: Sessions, store: MemoryStore, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for a ticket is shielded, but bounded. A ticket that is issued too late does not delay other turns."""
    await sessions.stop("", "k")  # joins the other workers
    write = store.sessions.take_ticket

    def too_late(*args: Any, **options: Any) -> PendingWrite[Ticket]:
        write(*args, **options)
        return PendingWrite[Ticket]()

    with monkeypatch.context() as patch, trio.move_on_after(1.0) as impatient:
        patch.setattr(store.sessions, "take_ticket", too_late)
        with pytest.raises(StoreUnavailable, match="within 30 s"):
            await sessions.take_ticket("", "k", limits=LIMITS)
        assert trio.current_time() == pytest.approx(service.TICKET_TIMEOUT_S)
        assert repr(sessions) == "<Sessions, 0 turns of 0>"
    assert impatient.cancel_called
    assert len(await store.sessions.tickets("", "k")) == 1
    async with sessions.open_turn("", "k", limits=LIMITS) as turn:
        assert await store.sessions.tickets("", "k") == [turn.ticket]


async def test_the_store_is_down(sessions: Sessions, store: MemoryStore) -> None:
    """No turn begins, and nothing is left in the queue."""
    await sessions.stop("", "k")
    store.failure = "disk full"
    with pytest.raises(StoreUnavailable):
        async with sessions.open_turn("", "k", limits=LIMITS):
            pass
    assert repr(sessions) == "<Sessions, 0 turns of 0>"


async def test_a_cancel_at_every_step(
    sessions: Sessions, store: MemoryStore, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled while it waits, or while it runs: no ticket is left, and the next turn runs."""
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr("trio._core._run._r", random.Random(2))
    for steps in range(1, 1000):
        scope = trio.CancelScope()
        bomb = Bomb(steps, scope.cancel)

        async def victim(scope: trio.CancelScope) -> None:
            with scope:
                await take_turn(sessions, store, f"{scope!r}", "x")
                await take_turn(sessions, store, "k", "x")

        with armed(bomb):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(take_turn, sessions, store, "k", "x")
                nursery.start_soon(victim, scope)
                nursery.start_soon(take_turn, sessions, store, "k", "x")
        assert await store.sessions.tickets("", "k") == []
        assert (await store.sessions.count(active_since=0)).busy == 0
        assert repr(sessions) == "<Sessions, 0 turns of 0>"
        if not bomb.fired:
            break
    assert steps > 20


# -- two workers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def database() -> Iterator[Path]:
    """The path of the store's file, short enough for the name of a socket beside it."""
    with tempfile.TemporaryDirectory(prefix="tri") as directory:
        yield Path(directory) / "trigate.db"


@pytest.mark.slow
async def test_turns_of_two_workers(database: Path) -> None:
    """Two workers share one queue, in the order of the tickets, and a stop reaches the worker that runs the turn."""
    async with (
        open_sqlite_store(str(database)) as store,
        open_sqlite_store(str(database)) as other_store,
        open_sessions(store) as here,
        open_sessions(other_store) as there,
    ):
        with trio.fail_after(60):
            for each in (here, there, here):
                await each.stop("", "k")  # joins, so that both know each other
            stopped = trio.Event()
            async with here.open_turn("", "k", limits=LIMITS) as turn, trio.open_nursery() as nursery:
                turn.stop_with(lambda _: stopped.set())
                nursery.start_soon(take_turn, there, other_store, "k", "second")
                while not stopped.is_set():  # the first notifications may come before they have joined
                    assert [ticket.number for ticket in await there.stop("", "k")] == [turn.ticket.number]
                    with trio.move_on_after(0.05):
                        await stopped.wait()
                turn.compose(call_of({"role": "user", "content": "first"}))
                result = turn.result(answer_of("FIRST"), None, at=time.time(), partial=False)
                await store.sessions.append(result, ticket=turn.ticket)
                turn.note_ticket_returned()
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(take_turn, *((here, store) if number % 2 else (there, other_store)), "k", "x")
            assert texts(await take_turn(here, store, "k", "last"))[:4] == ["first", "FIRST", "second", "SECOND"]
            session = await store.sessions.get("", "k")
            assert session is not None
            assert session.turns == 13


# -- over HTTP --------------------------------------------------------------------------------------------------------

KEYS = make_config(keys={"ann": "a" * 24, "bob": "b" * 24}, sessions={"wait_s": 5})
ANN, BOB = {"authorization": "Bearer " + "a" * 24}, {"authorization": "Bearer " + "b" * 24}


def say(
    served: Served, text: str, *, key: str = "k", stream: bool = True, headers: Any = (), **fields: Any
) -> ClientCall:
    """Starts a call that is a turn."""
    body = {**chat(stream=stream), "messages": [{"role": "user", "content": text}], **fields}
    return served.client.start("POST", "/v1/chat/completions", body, headers={"x-session-key": key, **dict(headers)})


async def remembered(served: Served, key: str = "k", owner: str = "") -> list[tuple[str, bool]]:
    """The remembered messages of a session: their texts, and whether they are partial."""
    found = await served.gateway.store.sessions.messages(owner, key, limit=1000)
    return [(msgspec.json.decode(each.body)["content"], each.partial) for each in found or ()]


async def assert_no_turn_is_left(served: Served, key: str = "k") -> None:
    """Asserts that no ticket and no turn is left."""
    await wait_all_tasks_blocked()
    assert await served.gateway.store.sessions.tickets("", key) == []
    assert repr(served.gateway.sessions) == "<Sessions, 0 turns of 0>"
    served.assert_clean()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_conversation(open_app: OpenApp, stream: bool) -> None:
    """The second request goes upstream with the earlier messages; nothing else of it changes."""
    script = says("Hel", "lo") if stream else answers(completion("Hello"))
    async with open_app(providers=Provider(script)) as served:
        for text in ("one", "two"):
            call = await say(served, text, stream=stream, seed=12345678901234567890).wait()
            assert call.status == 200
            assert call.header("x-session-key") == ""
        first, second = served.providers["up"].calls
        assert first.json["messages"] == [{"role": "user", "content": "one"}]
        assert second.json["messages"] == [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "two"},
        ]
        assert second.json["seed"] == 12345678901234567890
        assert second.json["model"] == "m"
        assert "x-session-key" not in second.headers
        assert (await remembered(served))[2:] == [("two", False), ("Hello", False)]
        await assert_no_turn_is_left(served)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("base_url", "configured", "goes_back"),
    [
        ("https://api.deepseek.com/v1", {}, True),
        ("https://api.mistral.ai/v1", {}, False),
        ("https://api.mistral.ai/v1", {"history_fields": ["reasoning_content"]}, True),
        ("http://up.invalid/v1", {}, True),
        ("http://up.invalid/v1", {"history_fields": []}, False),
    ],
)
async def test_what_a_provider_wants_back(
    open_app: OpenApp, stream: bool, base_url: str, configured: dict[str, Any], goes_back: bool
) -> None:
    """The reasoning of an answer that calls a tool is stored, and goes back to the providers that require it."""
    tool = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "reasoning_content": "I need it.", "tool_calls": [tool]}
    if stream:
        deltas = {"reasoning_content": "I need "}, {"reasoning_content": "it."}, {"tool_calls": [{"index": 0, **tool}]}
        end = chunk({}, finish_reason="tool_calls") + DONE
        script: Script = (Head(), *[Say(chunk(delta)) for delta in deltas], Say(end))
    else:
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
        script = answers(msgspec.json.encode({"choices": [choice]}))
    config = make_config({"up": {"base_url": base_url, **configured}})
    async with open_app(config, Provider(script)) as served:
        await say(served, "What time is it?", stream=stream).wait()
        await say(served, "", stream=stream, messages=[{"role": "tool", "tool_call_id": "c", "content": "10"}]).wait()
        _, sent, *_ = served.providers["up"].calls[1].json["messages"]
        if not goes_back:
            del message["reasoning_content"]
        assert sent == message
        stored = await served.gateway.store.sessions.messages("", "k", limit=9)
        assert stored is not None
        assert msgspec.json.decode(stored[1].body)["reasoning_content"] == "I need it."


async def test_a_picture_does_not_displace_the_history(open_app: OpenApp) -> None:
    """A photo of 160 kB fits into a history of 16 000 tokens, with all that was said before it."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + "/9j/4AAQ" * 20_000}}
    question = [{"role": "user", "content": [{"type": "text", "text": "What is in it?"}, picture]}]
    async with open_app() as served:
        await say(served, "My name is Ada.").wait()
        await say(served, "", messages=question).wait()
        last = await say(served, "Who am I?").wait()
        messages = served.providers["up"].calls[-1].json["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
        assert messages[2]["content"][1] == picture
        assert last.header("x-trigate-history-omitted") == ""


async def test_what_is_left_out_is_said(open_app: OpenApp) -> None:
    """The response says how many of the session's messages were not sent, also where the store did not read them."""
    config = make_config(sessions={"history_messages": 4}, server={"cors_origins": ["https://a.example"]})
    async with open_app(config) as served:
        said = []
        for number in range(5):
            origin = {"origin": "https://a.example"}
            call = await say(served, f"{number}", headers=origin).wait()
            said.append(call.header("x-trigate-history-omitted"))
            assert "x-trigate-history-omitted" in call.header("access-control-expose-headers")
        assert said == ["", "", "", "2", "4"]


async def test_without_the_header_nothing_is_remembered(open_app: OpenApp) -> None:
    """The ``user`` field does not select a session, and the store is not opened."""
    async with open_app() as served:
        await served.client.chat(user="someone").wait()
        assert not served.gateway.workers.is_joined
        assert (await served.gateway.store.sessions.count(active_since=0)).total == 0


@pytest.mark.parametrize("key", ["", "a/b", "a b", "\u00e9", "x" * 257, ".", ".."])
async def test_keys_that_cannot_be(open_app: OpenApp, key: str) -> None:
    """A key has 1 to 256 visible ASCII characters, without a slash, and nothing that a URL would lose."""
    async with open_app() as served:
        call = await say(served, "x", key=key).wait()
        assert (call.status, call.error["param"]) == (400, "x-session-key")


async def test_keys_that_can_be(open_app: OpenApp) -> None:
    """A key of 256 characters is valid, and every allowed character is."""
    every = "".join(map(chr, range(0x21, 0x7F))).replace("/", "")
    async with open_app() as served:
        for key in (every, "x" * 256, "...", "hook:ci:a%2Fb"):
            assert (await say(served, "x", key=key).wait()).status == 200


async def test_where_it_cannot_be_remembered(open_app: OpenApp) -> None:
    """Other endpoints, ``n`` > 1, and a repeated key header are refused; no session is created."""
    async with open_app() as served:
        body = {"model": "up/m", "input": "x"}
        call = await served.client.ask("POST", "/v1/embeddings", body, headers={"x-session-key": "k"})
        assert (call.status, call.error["param"]) == (400, "x-session-key")
        call = await say(served, "x", n=2).wait()
        assert (call.status, call.error["param"]) == (400, "n")
        twice = [("x-session-key", "k"), ("x-session-key", "l")]
        call = await served.client.ask("POST", "/v1/chat/completions", chat(), headers=twice)
        assert (call.status, call.error["code"]) == (400, "ambiguous_request")
        assert served.providers["up"].calls == []
        assert await remembered(served) == []
        await assert_no_turn_is_left(served)


async def test_a_busy_session(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The second turn waits, and is refused in time; the wait counts against no other limit."""
    script = (Say(content("a")), Pause(20), Say(DONE))
    config = make_config(sessions={"wait_s": 30}, limits={"total_timeout_s": 25})
    async with open_app(config, Provider(script)) as served:
        begun = trio.current_time()
        calls = []
        for _ in range(3):
            calls.append(say(served, "x"))
            await wait_all_tasks_blocked(0.01)
        for call in calls:
            await call.wait()
        assert [call.status for call in calls] == [200, 200, 409]
        assert calls[2].error["code"] == "session_busy"
        assert calls[1].body.endswith(DONE)
        assert calls[1].ended_at - begun == pytest.approx(40, abs=1)
        await assert_no_turn_is_left(served)


async def test_how_many_may_wait(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """As many turns as there may be exchanges run or wait; the next one gets 503."""
    config = make_config(limits={"max_exchanges": 2})
    async with open_app(config, Provider((Say(content("a")), Pause(5), Say(DONE)))) as served:
        calls = []
        for key in "kkl":
            calls.append(say(served, "x", key=key))
            await trio.sleep(0.5)
        for call in calls:
            await call.wait()
        assert [call.status for call in calls] == [200, 200, 503]
        assert calls[2].error["code"] == "overloaded"
        await assert_no_turn_is_left(served)


PHASES = {
    "before the upstream's head": ((Pause(5), *says("a")), False),
    "before the first content": ((Head(), Pause(5), *says("a")), False),
    "in the stream": ((Say(content("a")), Pause(5), Say(DONE)), True),
}


@pytest.mark.parametrize("phase", PHASES)
async def test_a_client_that_leaves(open_app: OpenApp, autojump_clock: MockClock, phase: str) -> None:
    """A truncated answer is remembered as partial. If the answer had not begun, nothing is, so that the client may try
    again."""
    script, has_content = PHASES[phase]
    async with open_app(providers=Provider(script)) as served:
        call = say(served, "x")
        await trio.sleep(1)
        call.disconnect()
        await call.wait()
        assert await remembered(served) == ([("x", False), ("a", True)] if has_content else [])
        await assert_no_turn_is_left(served)


async def test_a_client_that_leaves_while_it_waits(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Its ticket is returned, and the next turn moves up."""
    async with open_app(providers=Provider((Say(content("a")), Pause(5), Say(DONE)))) as served:
        calls = []
        for text in "abc":
            calls.append(say(served, text))
            await trio.sleep(0.5)
        calls[1].disconnect()
        for call in calls:
            await call.wait()
        assert calls[1].status == 0
        assert await remembered(served) == [("a", False), ("a", False), ("c", False), ("a", False)]
        await assert_no_turn_is_left(served)


async def test_a_connection_that_breaks_while_it_waits(
    open_server: Callable[..., AbstractAsyncContextManager[tuple[httpx2.AsyncClient, GatewayApp]]],
) -> None:
    """The same on real sockets: the ticket is returned at once, though the turn before it goes on."""
    async with open_socket_provider((Say(content("a")), Stall())) as (provider, url):
        config = make_config({"up": {"base_url": f"{url}/v1", "models": ["m"]}})
        async with open_server(config) as (client, app):
            store = app.gateway.store

            async def count(many: int) -> None:
                while True:
                    if len(await store.sessions.tickets("", "k")) == many:
                        return
                    await trio.sleep(0.002)

            def turn() -> AbstractAsyncContextManager[httpx2.Response]:
                headers = {"x-session-key": "k"}
                return client.stream("POST", "/v1/chat/completions", json=chat(), headers=headers)

            async def wait_in_vain(scope: trio.CancelScope) -> None:
                with scope:
                    async with turn():
                        pass

            with trio.fail_after(20):
                scope = trio.CancelScope()
                async with turn(), trio.open_nursery() as nursery:
                    nursery.start_soon(wait_in_vain, scope)
                    await count(2)
                    scope.cancel()
                    await count(1)
                    assert provider.opened == 1
                await count(0)


TRUNCATIONS: dict[str, tuple[tuple[Say | Break | Stall, ...], str]] = {
    "truncated": ((Say(content("a")), Break()), "upstream_truncated"),
    "silent": ((Say(content("a")), Stall()), "upstream_timeout"),
    "error event": ((Say(content("a")), Say(b'data: {"error":{"message":"m"}}\n\n')), "upstream_error"),
}


@pytest.mark.parametrize("cut", TRUNCATIONS)
async def test_a_truncated_answer(open_app: OpenApp, autojump_clock: MockClock, cut: str) -> None:
    """A truncated answer is remembered as partial, and its text is in the next request."""
    script, _ = TRUNCATIONS[cut]
    config = make_config(limits={"idle_timeout_s": 5})
    async with open_app(config, Provider(script, says("b"))) as served:
        call = await say(served, "x").wait()
        assert b'"error"' in call.body
        assert await remembered(served) == [("x", False), ("a", True)]
        await say(served, "y").wait()
        assert [each["content"] for each in served.providers["up"].calls[1].json["messages"]] == ["x", "a", "y"]
        await assert_no_turn_is_left(served)


async def test_calls_of_a_truncated_answer_are_not_remembered(open_app: OpenApp) -> None:
    """The client will not answer the calls for tools of a truncated answer."""
    tool = chunk({"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f"}}]})
    async with open_app(providers=Provider((Say(content("a")), Say(tool), Break()), (Say(tool), Break()))) as served:
        for _ in range(2):
            await say(served, "x").wait()
        found = await served.gateway.store.sessions.messages("", "k", limit=9)
        assert found is not None
        assert [each.body for each in found][1:] == [b'{"role":"assistant","content":"a"}']


async def test_a_failure_before_any_content(open_app: OpenApp) -> None:
    """Nothing is remembered, so that a second try does not repeat the message."""
    down = answers(b'{"error":{"message":"down"}}', status=500)
    async with open_app(providers=Provider(down, says("a"))) as served:
        assert (await say(served, "x").wait()).status >= 500
        assert await remembered(served) == []
        assert (await say(served, "x").wait()).status == 200
        assert await remembered(served) == [("x", False), ("a", False)]
        await assert_no_turn_is_left(served)


@pytest.mark.parametrize("stream", [True, False])
async def test_the_store_fails_at_the_end(open_app: OpenApp, autojump_clock: MockClock, stream: bool) -> None:
    """The client does not get the end of the answer, but an error event without ``[DONE]``, or 503. A second try, when
    the store works again, repeats nothing."""
    script = (
        (Say(content("a")), Pause(5), Say(DONE))
        if stream
        else (Head(200, "application/json"), Pause(5), Say(completion("a")))
    )
    async with open_app(providers=Provider(script)) as served:
        store: Any = served.gateway.store
        call = say(served, "x", stream=stream)
        await trio.sleep(1)
        store.failure = "disk full"
        await call.wait()
        assert call.status == (200 if stream else 503)
        assert call.error["code"] == "store_unavailable"
        assert DONE not in call.body
        assert (await say(served, "x", stream=stream).wait()).status == 503
        assert (await served.client.chat(stream=stream).wait()).status == 200, "what needs no store goes on"
        store.failure = None
        assert (await say(served, "x", stream=stream).wait()).status == 200
        assert await remembered(served) == [("x", False), ("a", False)]
        await assert_no_turn_is_left(served)


async def test_a_stop_ends_the_turn_and_its_upstream(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The turn ends at once; the part of the answer that has arrived is remembered as partial."""
    async with open_app(providers=Provider((Say(content("a")), Stall()))) as served:
        call = say(served, "x")
        await call.wait_committed()
        begun = trio.current_time()
        [ticket] = await served.gateway.sessions.stop("", "k")
        assert ticket.key == "k"
        await call.wait()
        assert call.error["code"] == "stopped"
        assert call.ended_at - begun < 0.05
        [closed_at] = served.providers["up"].closed_at
        assert closed_at - begun < 0.05
        assert await remembered(served) == [("x", False), ("a", True)]
        await assert_no_turn_is_left(served)


@pytest.mark.slow
async def test_a_hundred_turns_at_once(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """Over HTTP, too, the turns run in order, each with all that came before it."""
    config = make_config(sessions={"wait_s": 0, "history_messages": 1000})
    async with open_app(config, Provider((Say(content("a")), Pause(0.1), Say(DONE)))) as served:
        calls = []
        for number in range(100):
            calls.append(say(served, f"{number}"))
            await wait_all_tasks_blocked()
        for call in calls:
            await call.wait()
        for number, sent in enumerate(served.providers["up"].calls):
            said = [each["content"] for each in sent.json["messages"] if each["role"] == "user"]
            assert said == [f"{each}" for each in range(number + 1)]
        await assert_no_turn_is_left(served)


# -- the routes -------------------------------------------------------------------------------------------------------


async def test_text_that_is_kept_can_be_sent_again(open_app: OpenApp) -> None:
    """NUL, byte order marks and halves of characters, from the client and from the model: what a session keeps is valid
    JSON of valid text."""
    half = b'data: {"choices":[{"index":0,"delta":{"content":"b\\ud83d\\u0000"}}]}\n\n'
    async with open_app(providers=Provider((Say(half), *says("c")), says("d"))) as served:
        body = rb'{"model":"up/m","stream":true,"messages":[{"role":"user","content":"a\ud83d\u0000"}]}'
        headers = {"content-type": "application/json", "x-session-key": "k"}
        for _ in range(2):
            call = await served.client.ask("POST", "/v1/chat/completions", b"\xef\xbb\xbf" + body, headers=headers)
            assert call.status == 200
        sent = served.providers["up"].calls[1].json["messages"]
        texts = [message["content"] for message in sent]
        assert texts == ["a\ufffd\0", "b\ufffd\0c", "a\ufffd\0"]
        rows = (await served.client.ask("GET", "/v1/sessions/k/messages")).json["data"]
        assert [row["message"]["content"] for row in rows] == [*texts, "d"]


async def test_the_routes(open_app: OpenApp) -> None:
    """List, get, messages, reset, delete."""
    async with open_app(providers=Provider(says("a"))) as served:
        ask = served.client.ask
        assert (await ask("GET", "/v1/sessions")).json == {
            "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
        }  # fmt: skip
        await say(served, "one").wait()
        session = (await ask("GET", "/v1/sessions/k")).json
        assert abs(session.pop("created_at") - time.time()) < 60
        assert abs(session.pop("active_at") - time.time()) < 60
        assert session.pop("tokens") > 0
        assert session == {"id": "k", "object": "session", "busy": False, "resets": 0, "turns": 1, "messages": 2}
        call = await ask("GET", "/v1/sessions/k/messages")
        assert call.header("content-type") == "application/json"
        assert [(each["id"], each["message"]["content"]) for each in call.json["data"]] == [("1", "one"), ("2", "a")]
        call = await ask("POST", "/v1/sessions/k/reset")
        assert (call.status, call.json["resets"], call.json["messages"]) == (200, 1, 0)
        assert (await ask("GET", "/v1/sessions/k/messages")).json["data"] == []
        await say(served, "two").wait()
        assert [len(sent.json["messages"]) for sent in served.providers["up"].calls] == [1, 1]
        call = await ask("GET", "/v1/sessions/k/messages?archived=true")
        assert [(each["epoch"], each["turn"]) for each in call.json["data"]] == [(0, 1), (0, 1), (1, 1), (1, 1)]
        call = await ask("DELETE", "/v1/sessions/k")
        assert call.json == {"id": "k", "object": "session.deleted", "deleted": True}
        assert (await ask("GET", "/v1/sessions/k")).status == 404


async def test_pages(open_app: OpenApp) -> None:
    """``limit`` and ``after`` return every row once."""
    async with open_app(providers=Provider(says("a"))) as served:
        for number in range(5):
            await say(served, "x", key=f"s{number}").wait()
        for path, expected in (
            ("/v1/sessions", ["s4", "s3", "s2", "s1", "s0"]),
            ("/v1/sessions/s0/messages", ["1", "2"]),
        ):
            found: list[str] = []
            after = ""
            while True:
                page = (await served.client.ask("GET", f"{path}?limit=2{after}")).json
                found += [each["id"] for each in page["data"]]
                assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
                if not page["has_more"]:
                    break
                after = f"&after={page['last_id']}"
            assert found == expected


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=x", "limit=-1", "limit=", "limit=1.5", "limit=%C2%B2"]
)
async def test_bad_limits(open_app: OpenApp, query: str) -> None:
    """400, with the name of the parameter that is wrong."""
    async with open_app() as served:
        for path in ("/v1/sessions", "/v1/sessions/k/messages"):
            call = await served.client.ask("GET", f"{path}?{query}")
            assert (call.status, call.error["param"]) == (400, "limit")
        for name in ("after", "archived"):
            call = await served.client.ask("GET", f"/v1/sessions/k/messages?{name}=x")
            assert (call.status, call.error["param"]) == (400, name)


async def test_a_reset_while_a_turn_runs(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The session begins a new epoch at once; the turn goes on, and its messages are added to the archive."""
    async with open_app(providers=Provider(says("a"), (Say(content("b")), Pause(5), Say(DONE)))) as served:
        await say(served, "one").wait()
        call = say(served, "two")
        await call.wait_committed()
        assert (await served.client.ask("GET", "/v1/sessions/k")).json["busy"] is True
        assert (await served.client.ask("POST", "/v1/sessions/k/reset")).status == 200
        assert (await call.wait()).body.endswith(DONE)
        assert await remembered(served) == []
        archive = (await served.client.ask("GET", "/v1/sessions/k/messages?archived=true")).json["data"]
        assert [each["message"]["content"] for each in archive] == ["one", "a", "two", "b"]


async def test_a_delete_while_a_turn_runs(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """It is refused, since the answer would create the session again. After the turn, the session is deleted."""
    async with open_app(providers=Provider(says("a"), (Say(content("b")), Pause(5), Say(DONE)))) as served:
        await say(served, "one").wait()
        call = say(served, "two")
        await call.wait_committed()
        refused = await served.client.ask("DELETE", "/v1/sessions/k")
        assert (refused.status, refused.error["code"]) == (409, "session_busy")
        assert (await call.wait()).body.endswith(DONE)
        assert (await served.client.ask("DELETE", "/v1/sessions/k")).status == 200
        assert await remembered(served) == []
        await assert_no_turn_is_left(served)


async def test_the_routes_where_the_store_is_down(open_app: OpenApp) -> None:
    """503 with the reason; everything else works."""
    async with open_app() as served:
        store: Any = served.gateway.store
        store.failure = "disk full"
        for method, path in ROUTES:
            call = await served.client.ask(method, path.format(key="k"))
            assert (call.status, call.error["code"]) == (503, "store_unavailable"), path
            assert "disk full" in call.error["message"]
        assert (await served.client.ask("GET", "/v1/models")).status == 200


ROUTES = (
    ("GET", "/v1/sessions/{key}"),
    ("GET", "/v1/sessions/{key}/messages"),
    ("GET", "/v1/sessions/{key}/messages?archived=true"),
    ("POST", "/v1/sessions/{key}/reset"),
    ("DELETE", "/v1/sessions/{key}"),
)


async def test_the_foreign_session_matrix(open_app: OpenApp) -> None:
    """For another key the session does not exist: the answer is byte for byte that of a session that never existed. The
    other key cannot change the session, and has a session of its own under the same name."""
    async with open_app(KEYS, Provider(says("a"))) as served:
        for owner, headers in (("ann", ANN), ("bob", BOB)):
            await say(served, f"secret of {owner}", key=f"of-{owner}", headers=headers).wait()
        for mine, foreign in ((ANN, "of-bob"), (BOB, "of-ann")):
            for method, path in ROUTES:
                answers = [
                    await served.client.ask(method, path.format(key=key), headers={**mine, "x-request-id": "r"})
                    for key in (foreign, "absent")
                ]
                assert [answer.status for answer in answers] == [404, 404], (method, path)
                assert answers[0].json["error"]["code"] == "not_found"
                assert answers[0].body == answers[1].body
                assert answers[0].headers == answers[1].headers
            listed = (await served.client.ask("GET", "/v1/sessions", headers=mine)).json["data"]
            assert foreign not in [each["id"] for each in listed]
            paged = [
                await served.client.ask("GET", f"/v1/sessions?after={key}", headers=mine) for key in (foreign, "absent")
            ]
            assert paged[0].body == paged[1].body
        await say(served, "bob's own", key="of-ann", headers=BOB).wait()
        sent = served.providers["up"].calls[-1]
        assert b"secret of ann" not in sent.body
        assert await remembered(served, "of-ann", "ann") == [("secret of ann", False), ("a", False)]
        assert await remembered(served, "of-ann", "bob") == [("bob's own", False), ("a", False)]
        assert (await served.client.ask("DELETE", "/v1/sessions/of-ann", headers=BOB)).status == 200
        assert await remembered(served, "of-ann", "ann") == [("secret of ann", False), ("a", False)]
        for method, path in (*ROUTES, ("GET", "/v1/sessions")):
            assert (await served.client.ask(method, path.format(key="of-ann"))).status == 401


async def test_any_key_can_be_reached(open_app: OpenApp) -> None:
    """Also a key that a hook made from any sender: slashes and percent signs are encoded in the key, and once more in
    the path."""
    async with open_app() as served:
        key = "hook:ci:a%2Fb%25 \u00e9"
        message = Message(body=b'{"role":"user","content":"x"}', tokens=1, at=0.0)
        await served.gateway.store.sessions.append(Turn(owner="", key=key, at=0.0, messages=(message,)))
        assert (await served.client.ask("GET", f"/v1/sessions/{key}")).json["id"] == key
        assert (await served.client.ask("GET", f"/v1/sessions/{key}/messages")).status == 200


# -- many -------------------------------------------------------------------------------------------------------------


class CountingStore(MemoryStore):
    """A store that counts what its reads give back."""

    rows = 0

    async def read(self, operation: Any) -> Any:
        found = await super().read(operation)
        values = found[1] if isinstance(found, tuple) and len(found) == 2 else found
        self.rows += len(values) if isinstance(values, (list, tuple)) else 1
        return found


@pytest.mark.slow
async def test_ten_thousand_sessions() -> None:
    """Of which a thousand are active: a page, a count and a turn read as many rows as among ten, and the process keeps
    nothing of a session without a turn in progress."""
    store = CountingStore()
    now = time.time()
    async with open_sessions(store) as sessions:
        costs = []
        for many in (10, 10_000):
            for number in range(many):
                at = now if number % 10 == 0 else now - 10_000
                messages = tuple(Message(body=b'{"role":"user"}', tokens=1, at=at) for _ in range(4))
                await store.sessions.append(Turn(owner="", key=f"s{number}", at=at, messages=messages))
            cost = []
            for work in (
                lambda: store.sessions.list("", limit=20),
                lambda: store.sessions.count(active_since=now - 900),
                lambda: take_turn(sessions, store, "s1", "x"),
            ):
                before = store.rows
                await work()
                cost.append(store.rows - before)
            costs.append(cost)
        assert costs[1][0] <= 20
        assert costs[1][1] == costs[0][1] == 1
        assert costs[1][2] <= costs[0][2] + 6  # the messages of one turn more
        counts = await store.sessions.count(active_since=now - 900)
        assert (counts.total, counts.active, counts.busy) == (10_000, 1_001, 0)
        assert repr(sessions) == "<Sessions, 0 turns of 0>"


# -- the SDK ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_sdk(tmp_path: Path) -> None:
    """OpenAI's Python SDK, with one header: the model gets the earlier messages."""
    with (
        open_upstream() as upstream,
        run_gateway(configuration(upstream), tmp_path) as gateway,
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any") as client,
    ):
        for text in ("one", "two"):
            answer = client.chat.completions.create(
                model="mock/hello",
                messages=[{"role": "user", "content": text}],
                extra_headers={"x-session-key": "k"},
            )
            assert answer.choices[0].message.content == TEXT
        bodies = seen(upstream, "hello")["bodies"]
        said = [message["content"] for message in msgspec.json.decode(bodies[1])["messages"]]
        assert said == ["one", TEXT, "two"]
        page: Any = client.get("/sessions/k/messages", cast_to=object)
        assert [each["message"]["content"] for each in page["data"]] == ["one", TEXT, "two", TEXT]
