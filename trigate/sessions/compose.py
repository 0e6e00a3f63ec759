"""What of a session's past is put before a request. Pure.

A composed request is: the system messages (``system`` or ``developer``) of the request, or, where it has none, those
that were remembered; then the history; then the request's other messages. Every message is the bytes that a client
sent, or that an answer was put together to; nothing is decoded and encoded again.

The history is bounded, and what of it is left out follows these rules:

* Whole turns are left out, the oldest first. What was kept is the end of the conversation, without a gap.
* A *round* is an assistant message that calls for tools, and the messages behind it that answer the calls. It stays or
  goes as a whole: providers refuse calls without answers, and answers without calls. So a turn that begins with answers
  belongs to the turn before it; a round whose calls were not all answered is left out, and so is an answer to a call
  that is not there.
* The one round that may lack answers is the last, where the request begins with them: without it the request would
  make no sense. It is kept whatever its size, even where nothing else of its turn fits. That aside, a newest turn that
  is too large by itself is left out like any other, and there is no history.

**Units:** tokens of what no upstream has counted are estimated at four bytes each, rounded up. That is about right for
English prose, and too many for an image in a data URL.

Source: that calls and answers belong together is from the OpenAI API reference ("messages": the tool message).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import msgspec

from trigate.store.records import Message

_SYSTEM = ("system", "developer")
_ANSWERS = ("tool", "function")
_FUNCTION = ""  # stands for the id of a `function_call`, which has none

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_list = msgspec.json.Decoder(list[msgspec.Raw])
_any = msgspec.json.Decoder()


@attrs.frozen(kw_only=True)
class Composition:
    """A request with what is remembered.

    Attributes:
        messages: All of them, in the order in which they go upstream.
        new: Those of the request that a session has to remember: all but its system messages.
        system: The request's system messages as a JSON array; None = it has none.
    """

    messages: tuple[bytes, ...] = attrs.field(repr=False)
    new: tuple[bytes, ...] = attrs.field(repr=False)
    system: bytes | None = attrs.field(repr=False)


def compose(
    messages: bytes, *, system: bytes, history: Sequence[Message], max_messages: int, max_tokens: int
) -> Composition:
    """Puts what is remembered before a request's messages.

    Args:
        messages: Those of the request, as a JSON array.
        system: The system messages that are remembered, as a JSON array.
        history: The last messages of the session, oldest first; see `bounded`.
    """
    given = [(body, _read(body)) for body in map(bytes, _list.decode(messages))]
    own = [body for body, read in given if read.role in _SYSTEM]
    others = [(body, read) for body, read in given if read.role not in _SYSTEM]
    new = tuple(body for body, _ in others)
    continues = bool(others) and others[0][1].answers is not None
    kept = bounded(history, max_messages=max_messages, max_tokens=max_tokens, continues=continues)
    return Composition(
        messages=(*(own or map(bytes, _list.decode(system))), *(message.body for message in kept), *new),
        new=new,
        system=b"[" + b",".join(own) + b"]" if own else None,
    )


def bounded(
    messages: Sequence[Message], *, max_messages: int, max_tokens: int, continues: bool = False
) -> Sequence[Message]:
    """What of a history is put before a request.

    Args:
        messages: The end of the history, oldest first: all of it, or at least one message more than ``max_messages``
            (so that a turn of which only the end is here is seen to be too large).
        continues: The request begins with answers to the calls that the history ends with.
    """
    read = [(message, _read(message.body)) for message in messages]
    start = len(read)
    tokens = 0
    for first in reversed(_turns(read)):
        tokens += sum(message.tokens for message in messages[first:start])
        if len(read) - first > max_messages or tokens > max_tokens:
            break
        start = first
    if continues:
        start = min(start, _last_round(read))
    return _whole_rounds(read[start:], continues=continues)


@attrs.frozen
class _Read:
    """What matters of a message.

    Attributes:
        calls: The ids of the calls for tools.
        answers: The id of the call that it answers.
    """

    role: str
    calls: frozenset[str] = frozenset()
    answers: str | None = None


def _read(body: bytes) -> _Read:
    fields = _fields.decode(body)
    role = _value(fields, "role")
    if role in _ANSWERS:
        said = _value(fields, "tool_call_id")
        return _Read(role, answers=said if isinstance(said, str) else _FUNCTION)
    if role != "assistant":
        return _Read(str(role))
    calls = _value(fields, "tool_calls")
    ids = [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    if _value(fields, "function_call") is not None:
        ids.append(_FUNCTION)
    return _Read(role, calls=frozenset(each if isinstance(each, str) else _FUNCTION for each in ids))


def _value(fields: dict[str, msgspec.Raw], name: str) -> Any:  # Any: JSON of any shape; None where it is not there
    return _any.decode(fields[name]) if name in fields else None


_History = Sequence[tuple[Message, _Read]]


def _turns(history: _History) -> list[int]:
    """Where each turn begins; one that begins with answers belongs to the one before it."""
    return [
        at
        for at, (message, read) in enumerate(history)
        if at == 0 or (message.turn != history[at - 1][0].turn and read.answers is None)
    ]


def _last_round(history: _History) -> int:
    """Where the round begins that the history ends with; its end, where it ends with none."""
    at = len(history) - 1
    while at >= 0 and history[at][1].answers is not None:
        at -= 1
    return at if at >= 0 and history[at][1].calls else len(history)


def _whole_rounds(history: _History, *, continues: bool) -> Sequence[Message]:
    kept: list[Message] = []
    at = 0
    while at < len(history):
        message, read = history[at]
        end = at + 1
        while end < len(history) and history[end][1].answers is not None:
            end += 1
        answers = [(answer, said.answers) for answer, said in history[at + 1 : end] if said.answers in read.calls]
        if read.answers is None and (
            read.calls <= {said for _, said in answers} or (continues and end == len(history))
        ):
            kept += [message, *[answer for answer, _ in answers]]
        at = end
    return kept
