"""`trigate.exchange.reasoning_memory`: end to end in memory, and what it asks of the store."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.dialects.chat import call, chunk, message_of, tool, translated, usage
from tests.exchange.test_messages import NATIVE, NATIVE_START, NATIVE_STOP, body_of, named
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.logs import Logs
from tests.support.provider import DONE, Provider, Say, Script, says
from trigate.config.sections import ReasoningMemoryConfig, Seconds, Size
from trigate.dialects.memory import Remembered
from trigate.dialects.vocabulary import Reasoning
from trigate.exchange.reasoning_memory import ReasoningMemory
from trigate.store.interface import Store, Write
from trigate.store.memory import open_memory_store
from trigate.store.records import ReasoningRecord

TAKES = {"history_fields": ["reasoning_content"]}
THINKS: Script = tuple(
    map(Say, (chunk({"reasoning_content": "hm"}), tool(0, "f", "{}", "call_a"), chunk({}, "tool_calls"), usage(), DONE))
)
USE = {"type": "tool_use", "id": "call_a", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "call_a", "content": "ok"}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": [USE]},
    {"role": "user", "content": [RESULT]},
]


async def ask(served: Served, *, key: str | None = None, model: str = "up/m", **fields: Any) -> Any:
    """Makes a call."""
    headers = {"x-api-key": key} if key else {}
    return await served.client.start("POST", "/v1/messages", body_of(model=model, **fields), headers=headers).wait()


def reasoning_sent(served: Served) -> str | None:
    """The reasoning of the second message of the last request."""
    found: str | None = served.providers["up"].calls[-1].json["messages"][1].get("reasoning_content")
    return found


# -- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [True, False])
async def test_it_is_put_back(open_app: OpenApp, is_stream: bool) -> None:
    """The client sees no reasoning, and the provider gets it back with the result of the tool."""
    async with open_app(make_config({"up": TAKES}), Provider(THINKS)) as served:
        first = await ask(served, stream=is_stream)
        assert b"hm" not in first.body
        served.providers["up"].play(says("done"))
        await ask(served, messages=TURNS)
        assert reasoning_sent(served) == "hm"


SIGNED: Script = tuple(
    map(
        Say,
        (
            NATIVE_START,
            named("content_block_start", index=0, content_block={"type": "thinking", "thinking": "", "signature": ""}),
            named("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "hm"}),
            named("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "EqQB"}),
            named("content_block_stop", index=0),
            named("content_block_start", index=1, content_block={**USE, "id": "toolu_1"}),
            named("content_block_stop", index=1),
            named(
                "message_delta", delta={"stop_reason": "tool_use", "stop_sequence": None}, usage={"output_tokens": 5}
            ),
            NATIVE_STOP,
        ),
    )
)


async def test_a_signature_comes_back_to_anthropic(open_app: OpenApp) -> None:
    """A client of chat completions has no place for it, or drops it; Anthropic refuses a tool's result without it."""
    function = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    config = make_config({"up": {}, "native": NATIVE})
    async with open_app(config, {"up": Provider(), "native": Provider(SIGNED)}) as served:
        ask_chat: dict[str, Any] = {
            "model": "native/c",
            "stream": True,
            "reasoning_effort": "high",
            "tools": [function],
        }
        question = {"role": "user", "content": "q"}
        await served.client.chat(messages=[question], **ask_chat).wait()
        made = {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        result = {"role": "tool", "tool_call_id": "toolu_1", "content": "ok"}
        keeps: list[dict[str, Any]] = [{}, {"reasoning_content": "hm"}]
        for kept in keeps:
            turn = {"role": "assistant", "content": None, "tool_calls": [made], **kept}
            await served.client.chat(messages=[question, turn, result], **ask_chat).wait()
            sent = served.providers["native"].calls[-1].json["messages"][1]["content"]
            assert sent[0] == {"type": "thinking", "thinking": "hm", "signature": "EqQB"}
            assert sent[1]["type"] == "tool_use"


async def test_never_across_keys(open_app: OpenApp) -> None:
    """Another key gets nothing of it, though it names the same call."""
    config = make_config({"up": TAKES}, keys={"a": "key-of-a", "b": "key-of-b"})
    async with open_app(config, Provider(THINKS)) as served:
        await ask(served, key="key-of-a")
        served.providers["up"].play(says("done"))
        await ask(served, key="key-of-b", messages=TURNS)
        assert reasoning_sent(served) is None
        await ask(served, key="key-of-a", messages=TURNS)
        assert reasoning_sent(served) == "hm"


async def test_another_worker_has_it_and_so_has_a_restart(open_app: OpenApp, tmp_path: Path) -> None:
    """The store has it, and the key of the marks: a block that one worker marked is known to the other."""
    path = tmp_path / "store.db"
    async with open_app(make_config({"up": TAKES}), Provider(THINKS), store=path) as one:
        call_ = await ask(one, thinking={"type": "adaptive"})
        thinking = message_of(call_.body)["content"][0]
        async with open_app(make_config({"up": TAKES}), Provider(says("done")), store=path) as other:
            await ask(other, messages=TURNS)
            assert reasoning_sent(other) == "hm"
    async with open_app(make_config({"up": TAKES}), Provider(says("done")), store=path) as again:
        await ask(again, messages=TURNS)
        assert reasoning_sent(again) == "hm"
        turn = {"role": "assistant", "content": [thinking, {"type": "text", "text": "a"}]}
        known = await ask(again, messages=[TURNS[0], turn, TURNS[0]])
        assert reasoning_sent(again) == "hm"
        assert known.header("x-trigate-dropped") == ""
        foreign = {**turn, "content": [{**thinking, "thinking": "another text"}, *turn["content"][1:]]}
        dropped = await ask(again, messages=[TURNS[0], foreign, TURNS[0]])
        assert reasoning_sent(again) is None
        assert dropped.header("x-trigate-dropped") == "thinking"


async def test_it_may_be_switched_off(open_app: OpenApp) -> None:
    """Nothing is remembered then."""
    async with open_app(make_config({"up": TAKES}, reasoning_memory={"enabled": False}), Provider(THINKS)) as served:
        await ask(served)
        served.providers["up"].play(says("done"))
        await ask(served, messages=TURNS)
        assert reasoning_sent(served) is None


async def test_a_store_that_fails(open_app: OpenApp, logs: Logs) -> None:
    """Calls do not notice: what this worker has is put back all the same."""
    async with open_app(make_config({"up": TAKES}), Provider(THINKS)) as served:
        logs.expect_error("records_dropped")  # the ledger's
        served.gateway.store.failure = "full"  # type: ignore[attr-defined]
        thinking = await ask(served, thinking={"type": "adaptive"})
        assert message_of(thinking.body)["content"][0]["signature"].startswith("trigate.r2.")
        served.providers["up"].play(says("done"))
        assert (await ask(served, messages=TURNS)).status == 200
        assert reasoning_sent(served) == "hm"


async def test_a_provider_that_takes_none(open_app: OpenApp) -> None:
    """Nothing is remembered for it: what it would not get is not called dropped."""
    async with open_app(make_config({"up": {"history_fields": []}}), Provider(THINKS)) as served:
        await ask(served)
        served.providers["up"].play(says("done"))
        answer = await ask(served, messages=TURNS)
        assert (reasoning_sent(served), answer.header("x-trigate-dropped")) == (None, "")
        assert served.gateway.exchange_services.upstream.reasoning._entries == {}


async def test_the_same_format_is_not_touched(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the store nor the memory is asked for calls that go through as they are."""
    config = make_config({"up": {}, "native": NATIVE})

    async def use_for(self: object, *args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(ReasoningMemory, "use_for", use_for)
    async with open_app(config, {"up": Provider(says("x")), "native": Provider(says("x"))}) as served:
        assert (await served.client.chat().wait()).status == 200
        await ask(served, model="native/c", messages=TURNS)
        assert served.providers["native"].calls[0].json["messages"] == TURNS


async def test_a_foreign_mark_never_reaches_anthropic(open_app: OpenApp) -> None:
    """Whoever made it: the block is removed, and the header says so."""
    block = {"type": "thinking", "thinking": "a", "signature": "trigate.r2.0123"}
    signed = {"type": "thinking", "thinking": "b", "signature": "EqQB"}
    turn = {"role": "assistant", "content": [block, signed, {"type": "text", "text": "t"}]}
    config = make_config({"up": {}, "native": NATIVE})
    async with open_app(config, {"up": Provider(), "native": Provider()}) as served:
        answer = await ask(served, model="native/c", messages=[TURNS[0], turn, TURNS[0]], stream=False)
        assert answer.header("x-trigate-dropped") == "thinking"
        assert served.providers["native"].calls[0].json["messages"][1]["content"] == turn["content"][1:]


async def test_betas_of_an_upstream(open_app: OpenApp) -> None:
    """An upstream gets only those that it takes; what is left out is said."""
    config = make_config({"up": {}, "native": {**NATIVE, "betas": ["a-1", "c-3"]}})
    async with open_app(config, {"up": Provider(), "native": Provider()}) as served:
        for given, sent, dropped in (
            ("a-1,b-2, c-3", "a-1,c-3", "anthropic-beta"),
            ("a-1", "a-1", ""),
            ("b-2", None, "anthropic-beta"),
        ):
            headers = {"anthropic-beta": given}
            body = body_of(model="native/c", stream=False)
            answer = await served.client.start("POST", "/v1/messages", body, headers=headers).wait()
            assert served.providers["native"].calls[-1].headers.get("anthropic-beta") == sent
            assert answer.header("x-trigate-dropped") == dropped


# -- what it asks of the store ----------------------------------------------------------------------------------------


class _Reasoning:
    """Counts what is asked of a store."""

    def __init__(self, store: Store) -> None:
        self._inner = store.reasoning
        self.asked: list[list[str]] = []
        self.put_calls: list[str] = []

    def put(self, entries: Sequence[ReasoningRecord], *, most: int) -> Write[None]:
        self.put_calls += [each.call for each in entries]
        return self._inner.put(entries, most=most)

    async def get(self, owner: str, calls: Sequence[str], *, since: float) -> Mapping[str, bytes]:
        self.asked.append(list(calls))
        return await self._inner.get(owner, calls, since=since)


@pytest.fixture
async def store() -> AsyncIterator[Any]:
    """A store whose `reasoning` is counted."""
    async with open_memory_store() as made:
        made.reasoning = _Reasoning(made)
        yield made


def turns_of(*ids: str) -> list[dict[str, Any]]:
    """A conversation with a call each turn."""
    turns = [TURNS[0]]
    for each in ids:
        turns += [
            {"role": "assistant", "content": [{**USE, "id": each}]},
            {"role": "user", "content": [{**RESULT, "tool_use_id": each}]},
        ]
    return turns


async def use(memory: ReasoningMemory, *ids: str, owner: str = "o") -> None:
    """Prepares a call with these tool calls."""
    await memory.use_for(translated(call(messages=turns_of(*ids))), owner)


async def test_a_conversation_without_reasoning(store: Any) -> None:
    """Asks the store once for each turn, and only for what is new; the first call without tool calls does not ask."""
    memory = ReasoningMemory(store)
    await memory.use_for(translated(call()), "o")
    assert store.reasoning.asked == []
    await use(memory, "a")
    await use(memory, "a", "b")
    await use(memory, "a", "b", "c")
    assert store.reasoning.asked == [["a"], ["a", "b"], ["b", "c"]]
    assert store.reasoning.put_calls == []


async def test_what_the_worker_has_is_not_asked_for(store: Any) -> None:
    """It wrote it, or has read it before; another owner's is not meant."""
    memory = ReasoningMemory(store)
    memory._keep("o", {"a": Remembered((Reasoning("hm"),))})
    await use(memory, "a")
    assert store.reasoning.asked == []
    other = ReasoningMemory(store)
    await use(other, "a")
    await use(other, "a")
    assert store.reasoning.asked == [["a"]]
    await use(other, "a", owner="p")
    assert len(store.reasoning.asked) == 2


async def test_the_latest_call_is_asked_for_again(store: Any) -> None:
    """Another worker may be about to write it."""
    memory, writer = ReasoningMemory(store), ReasoningMemory(store)
    await use(memory, "a")
    writer._keep("o", {"a": Remembered((Reasoning("hm"),))})
    made = translated(call(messages=turns_of("a")))
    await memory.use_for(made, "o")
    assert made.lost == ()


async def test_it_is_bounded(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes: the entries that were used last stay. And by time."""
    memory = ReasoningMemory(store)
    memory.apply(ReasoningMemoryConfig(memory_bytes=Size(1000)))
    for number in range(100):
        memory._keep("o", {f"c{number}": Remembered((Reasoning("x" * 100),))})
    assert memory._size_bytes <= 1000
    assert list(memory._entries) == [("o", "c98"), ("o", "c99")]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    made = translated(call(messages=turns_of("c99")))
    await memory.use_for(made, "o")
    assert made.lost == ("c99",)
    memory.apply(ReasoningMemoryConfig(enabled=False, retention_s=Seconds(1.0)))
    assert repr(memory) == "<ReasoningMemory 0 entries, 0 bytes>"


async def test_a_store_that_is_slow(store: Any, autojump_clock: MockClock) -> None:
    """A call waits a second for it, and goes out as it is."""
    memory = ReasoningMemory(store)
    await use(memory, "x")  # the key of the marks

    async def never(*args: object, **more: object) -> Mapping[str, bytes]:
        await trio.sleep_forever()
        raise AssertionError

    store.reasoning.get = never
    began = trio.current_time()
    await use(memory, "a")
    assert trio.current_time() - began == 1.0
