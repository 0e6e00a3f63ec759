"""What is put before a request is the end of the conversation, in bounds, and no provider refuses it for its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import msgspec
from hypothesis import given
from hypothesis import strategies as st

from trigate.openai.token_estimate import estimated_tokens
from trigate.sessions.compose import bounded, compose
from trigate.store.records import Message

NO_LIMIT = 10**9


def encoded(role: str, content: str | None = "x", **fields: Any) -> bytes:  # Any: JSON
    """A message as a client writes it."""
    return msgspec.json.encode({"role": role, "content": content, **fields})


def calls(*ids: str) -> bytes:
    """An assistant message that calls for tools."""
    return encoded("assistant", None, tool_calls=[{"id": each, "type": "function", "function": {}} for each in ids])


def answer(call: str) -> bytes:
    """A message that answers a call."""
    return encoded("tool", tool_call_id=call)


def stored(*turns: Sequence[bytes], tokens: int = 1) -> list[Message]:
    """Messages as a store gives them, one turn after the other."""
    bodies = [(turn, body) for turn, bodies in enumerate(turns, 1) for body in bodies]
    return [
        Message(body=body, tokens=tokens, at=0.0, number=number, turn=turn)
        for number, (turn, body) in enumerate(bodies, 1)
    ]


def kept(
    messages: Sequence[Message], *, max_messages: int = NO_LIMIT, max_tokens: int = NO_LIMIT, continues: bool = False
) -> list[int]:
    """The numbers of what is kept."""
    found = bounded(messages, max_messages=max_messages, max_tokens=max_tokens, continues=continues)
    return [message.number for message in found]


U, A = encoded("user"), encoded("assistant")


def test_all_of_it_where_it_fits() -> None:
    """Nothing is left out that fits exactly."""
    assert kept(stored([U, A], [U, A]), max_messages=4, max_tokens=4) == [1, 2, 3, 4]
    assert kept([]) == []


def test_the_oldest_turns_go_first() -> None:
    """A turn goes as a whole, by messages as by tokens."""
    history = stored([U, A], [U, A], [U, A])
    assert kept(history, max_messages=5) == [3, 4, 5, 6]
    assert kept(history, max_tokens=5) == [3, 4, 5, 6]
    assert kept(history, max_messages=4, max_tokens=3) == [5, 6]


def test_a_newest_turn_that_is_too_large() -> None:
    """It is left out like any other: there is no history then, and no gap in it."""
    history = stored([U, A], [U, U, U, A])
    assert kept(history, max_messages=3) == []
    assert kept(history, max_messages=0) == []


def test_a_turn_of_which_only_the_end_was_read() -> None:
    """With one message more than the limit at hand, it is seen to be too large."""
    history = stored([U, A], [U, A], [U, A])[1:]
    assert kept(history, max_messages=4) == [3, 4, 5, 6]


def test_a_round_of_two_turns_stays_or_goes_as_one() -> None:
    """A turn that begins with answers belongs to the one before it."""
    history = stored([U, A], [U, calls("a", "b")], [answer("a"), answer("b"), A], [U, A])
    assert kept(history, max_messages=7) == [3, 4, 5, 6, 7, 8, 9]
    assert kept(history, max_messages=6) == [8, 9]


def test_a_round_that_was_not_answered_is_left_out() -> None:
    """Its turn stays without it; so does one whose answers are not all there."""
    assert kept(stored([U, calls("a")], [U, A])) == [1, 3, 4]
    assert kept(stored([U, calls("a", "b")], [answer("a"), A])) == [1, 4]


def test_answers_without_calls_are_left_out() -> None:
    """At the beginning, behind a plain message, and beside others that were called for."""
    assert kept(stored([answer("a"), A], [U, answer("b"), A])) == [2, 3, 5]
    assert kept(stored([U, calls("a")], [answer("a"), answer("z"), A])) == [1, 2, 3, 5]


def test_the_round_that_the_request_answers() -> None:
    """It stays without its answers, and whatever its size; but only where the request has them."""
    history = stored([U, A], [U, calls("a")])
    assert kept(history, continues=True) == [1, 2, 3, 4]
    assert kept(history, continues=False) == [1, 2, 3]
    assert kept(history, max_messages=1, continues=True) == [4]
    assert kept(stored([U, calls("a")], tokens=100), max_tokens=99, continues=True) == [2]
    assert kept(stored([U, A]), max_messages=1, continues=True) == []


def test_the_older_function_call() -> None:
    """It is a round like that of tools."""
    called = encoded("assistant", None, function_call={"name": "f", "arguments": "{}"})
    history = stored([U, called], [encoded("function", name="f"), A])
    assert kept(history) == [1, 2, 3, 4]
    assert kept(history[:2]) == [1]


def test_unexpected_shapes() -> None:
    """What a client has sent may be anything that has a role; it is a plain message then."""
    odd = [
        encoded("assistant", tool_calls=5),
        encoded("assistant", tool_calls=[None]),
        encoded("assistant", tool_calls=None, function_call=None),
        b'{"role":"x"}',
    ]
    assert kept(stored(odd)) == [1, 2, 3, 4]


def test_tokens_are_estimated() -> None:
    """Four bytes each, rounded up."""
    assert [estimated_tokens(b"x" * size) for size in (0, 1, 4, 5)] == [0, 1, 1, 2]


def composed(*messages: bytes, system: bytes = b"[]", history: Sequence[Message] = ()) -> Any:
    """A composition without limits."""
    given = b"[" + b" , ".join(messages) + b"]"
    return compose(given, system=system, history=history, max_messages=NO_LIMIT, max_tokens=NO_LIMIT)


def test_every_message_is_the_clients_bytes() -> None:
    """Spaces, escapes, large numbers and unknown fields stay."""
    odd = b'{ "x" : 12345678901234567890, "role":"user","content" : "\\u00e9" }'
    found = composed(odd, history=stored([odd, A]))
    assert found.messages == (odd, A, odd)
    assert found.new == (odd,)
    assert found.system is None


def test_system_messages_come_first() -> None:
    """The request's take the place of those that were remembered; where it has none, those stand."""
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
    """The calls stand right before the answers."""
    found = composed(answer("a"), history=stored([U, calls("a")]))
    assert found.messages == (U, calls("a"), answer("a"))


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Conversations with rounds that are whole, cut, or without their calls, over one turn or several."""
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
    """The order is kept; no answer without its call, no call without its answers; the bounds hold, and more of the
    history than is kept would not fit."""
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
    # with room for everything the same messages come at the end, and only whole turns are missing before them
    everything = bounded(history, max_messages=NO_LIMIT, max_tokens=NO_LIMIT, continues=continues)
    assert list(everything[len(everything) - len(found) :]) == list(found)
    # and reading only as much as could be needed makes no difference, unless a round is larger than that
    end = history[-(max_messages + 1) :]
    if not continues:
        assert list(bounded(end, max_messages=max_messages, max_tokens=max_tokens)) == list(found)
