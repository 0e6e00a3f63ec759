"""What is put before a request is the end of the conversation, in bounds, and no provider refuses it for its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import msgspec
from hypothesis import given
from hypothesis import strategies as st

from trigate.sessions.compose import bounded, compose
from trigate.store.records import Message

NO_LIMIT = 10**9


def encoded(role: str, content: str | None = "x", **fields: Any) -> bytes:  # Any: JSON
    """Encodes a message as a client does."""
    return msgspec.json.encode({"role": role, "content": content, **fields})


def calls(*ids: str) -> bytes:
    """An assistant message that calls tools."""
    return encoded("assistant", None, tool_calls=[{"id": each, "type": "function", "function": {}} for each in ids])


def answer(call: str) -> bytes:
    """A message that answers a call."""
    return encoded("tool", tool_call_id=call)


def stored(*turns: Sequence[bytes], tokens: int = 1) -> list[Message]:
    """Messages as the store returns them, one turn after the other."""
    bodies = [(turn, body) for turn, bodies in enumerate(turns, 1) for body in bodies]
    return [
        Message(body=body, tokens=tokens, at=0.0, number=number, turn=turn)
        for number, (turn, body) in enumerate(bodies, 1)
    ]


def kept(
    messages: Sequence[Message], *, max_messages: int = NO_LIMIT, max_tokens: int = NO_LIMIT, continues: bool = False
) -> list[int]:
    """The numbers of the messages that are kept."""
    found = bounded(messages, max_messages=max_messages, max_tokens=max_tokens, continues=continues)
    return [message.number for message in found]


U, A = encoded("user"), encoded("assistant")


def test_all_of_it_where_it_fits() -> None:
    """A history that fits exactly is kept completely."""
    assert kept(stored([U, A], [U, A]), max_messages=4, max_tokens=4) == [1, 2, 3, 4]
    assert kept([]) == []


def test_the_oldest_turns_go_first() -> None:
    """The oldest turns are left out, each as a whole, by the limit of messages and by that of tokens."""
    history = stored([U, A], [U, A], [U, A])
    assert kept(history, max_messages=5) == [3, 4, 5, 6]
    assert kept(history, max_tokens=5) == [3, 4, 5, 6]
    assert kept(history, max_messages=4, max_tokens=3) == [5, 6]


def test_a_newest_turn_that_is_too_large() -> None:
    """If the newest turn is too large, it is left out, and so is all before it: the history has no gap."""
    history = stored([U, A], [U, U, U, A])
    assert kept(history, max_messages=3) == []
    assert kept(history, max_messages=0) == []


def test_a_turn_of_which_only_the_end_was_read() -> None:
    """One message more than the limit is enough to tell that a turn is too large."""
    history = stored([U, A], [U, A], [U, A])[1:]
    assert kept(history, max_messages=4) == [3, 4, 5, 6]


def test_a_round_of_two_turns_stays_or_goes_as_one() -> None:
    """A turn that begins with answers belongs to the turn before it."""
    history = stored([U, A], [U, calls("a", "b")], [answer("a"), answer("b"), A], [U, A])
    assert kept(history, max_messages=7) == [3, 4, 5, 6, 7, 8, 9]
    assert kept(history, max_messages=6) == [8, 9]


def test_a_round_that_was_not_answered_is_left_out() -> None:
    """A round without all its answers is left out; the rest of its turn stays."""
    assert kept(stored([U, calls("a")], [U, A])) == [1, 3, 4]
    assert kept(stored([U, calls("a", "b")], [answer("a"), A])) == [1, 4]


def test_answers_without_calls_are_left_out() -> None:
    """At the beginning, after a plain message, and beside answers to other calls."""
    assert kept(stored([answer("a"), A], [U, answer("b"), A])) == [2, 3, 5]
    assert kept(stored([U, calls("a")], [answer("a"), answer("z"), A])) == [1, 2, 3, 5]


def test_the_round_that_the_request_answers() -> None:
    """That round stays without its answers and whatever its size, but only if the request has the answers."""
    history = stored([U, A], [U, calls("a")])
    assert kept(history, continues=True) == [1, 2, 3, 4]
    assert kept(history, continues=False) == [1, 2, 3]
    assert kept(history, max_messages=1, continues=True) == [4]
    assert kept(stored([U, calls("a")], tokens=100), max_tokens=99, continues=True) == [2]
    assert kept(stored([U, A]), max_messages=1, continues=True) == []


def test_the_older_function_call() -> None:
    """A `function_call` makes a round, like calls of tools."""
    called = encoded("assistant", None, function_call={"name": "f", "arguments": "{}"})
    history = stored([U, called], [encoded("function", name="f"), A])
    assert kept(history) == [1, 2, 3, 4]
    assert kept(history[:2]) == [1]


def test_unexpected_shapes() -> None:
    """A message with a role and any other content is a plain message."""
    odd = [
        encoded("assistant", tool_calls=5),
        encoded("assistant", tool_calls=[None]),
        encoded("assistant", tool_calls=None, function_call=None),
        b'{"role":"x"}',
    ]
    assert kept(stored(odd)) == [1, 2, 3, 4]


def composed(*messages: bytes, system: bytes = b"[]", history: Sequence[Message] = ()) -> Any:
    """A composition without limits."""
    given = b"[" + b" , ".join(messages) + b"]"
    return compose(given, system=system, history=history, max_messages=NO_LIMIT, max_tokens=NO_LIMIT)


def test_every_message_is_the_clients_bytes() -> None:
    """Spaces, escapes, large numbers and unknown fields are not changed."""
    odd = b'{ "x" : 12345678901234567890, "role":"user","content" : "\\u00e9" }'
    found = composed(odd, history=stored([odd, A]))
    assert found.messages == (odd, A, odd)
    assert found.new == (odd,)
    assert found.system is None


def test_system_messages_come_first() -> None:
    """System messages of the request replace the remembered ones; without any, the remembered ones apply."""
    old, new, developer = encoded("system", "old"), encoded("system", "new"), encoded("developer")
    history = stored([U, A])
    remembered = b"[" + old + b"]"
    found = composed(U, new, A, developer, system=remembered, history=history)
    assert found.messages == (new, developer, U, A, U, A)
    assert found.new == (U, A)
    assert found.system == b"[" + new + b"," + developer + b"]"
    found = composed(U, system=remembered, history=history)
    assert found.messages == (old, U, A, U)
    assert found.system is None


def test_a_request_that_answers_calls() -> None:
    """The calls stand directly before the answers."""
    found = composed(answer("a"), history=stored([U, calls("a")]))
    assert found.messages == (U, calls("a"), answer("a"))


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Conversations with rounds that are complete, incomplete, or without their calls, over one turn or several."""
    turns: list[list[bytes]] = []
    ids = iter(range(10_000))
    for _ in range(draw(st.integers(0, 6))):
        turn = [U] * draw(st.integers(0, 2))
        for _ in range(draw(st.integers(0, 2))):
            asked = [f"c{next(ids)}" for _ in range(draw(st.integers(1, 3)))]
            answers = [answer(each) for each in asked if draw(st.integers(0, 9))]
            turn += [calls(*asked)] if draw(st.integers(0, 9)) else []
            if draw(st.booleans()):
                turns.append(turn)
                turn = []
            turn += answers
        turns.append([*turn, A])
    sizes = draw(st.lists(st.integers(0, 9), min_size=sum(map(len, turns)), max_size=sum(map(len, turns))))
    return [attrs.evolve(each, tokens=size) for each, size in zip(stored(*turns), sizes, strict=True)]


@given(conversations(), st.integers(0, 20), st.integers(0, 60), st.booleans())
def test_what_always_holds(history: list[Message], max_messages: int, max_tokens: int, continues: bool) -> None:
    """The order is kept. There is no answer without its call, and no call without its answers. The bounds hold, and
    more of the history would not fit."""
    found = bounded(history, max_messages=max_messages, max_tokens=max_tokens, continues=continues)
    numbers = [message.number for message in found]
    assert numbers == sorted(set(numbers))
    open_calls: set[str] = set()
    for message in found:
        body = msgspec.json.decode(message.body)
        if body["role"] == "tool":
            assert body["tool_call_id"] in open_calls, "an answer without its call"
            open_calls.remove(body["tool_call_id"])
        else:
            assert not open_calls, "calls without their answers"
            open_calls = {call["id"] for call in body.get("tool_calls", ())}
    assert not open_calls or continues
    fits = len(found) <= max_messages and sum(message.tokens for message in found) <= max_tokens
    last_round = numbers and "tool_calls" in msgspec.json.decode(found[0].body)
    assert fits or (continues and last_round), "only the round that is being answered may be larger"
    # without bounds the same messages come at the end, and only whole turns are missing before them
    everything = bounded(history, max_messages=NO_LIMIT, max_tokens=NO_LIMIT, continues=continues)
    assert list(everything[len(everything) - len(found) :]) == list(found)
    # and reading only as much as could be needed makes no difference, unless a round is larger than that
    end = history[-(max_messages + 1) :]
    if not continues:
        assert list(bounded(end, max_messages=max_messages, max_tokens=max_tokens)) == list(found)
