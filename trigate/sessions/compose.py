"""What of a session's history is put before a request. Pure.

A composed request consists of the system messages (``system`` or ``developer``) of the request or, if it has none, the
remembered ones; then the history; then the request's other messages. Every message is the bytes that a client sent, or
that an answer was accumulated to: no message is decoded and encoded again.

The history is bounded. These rules decide what is left out:

* Whole turns are left out, the oldest first. What is kept is the end of the conversation, without a gap.
* A *round* is an assistant message that calls tools, and the messages behind it that answer the calls. It is kept or
  left out as a whole: providers refuse calls without answers, and answers without calls. So a turn that begins with
  answers belongs to the turn before it. A round whose calls were not all answered is left out, and so is an answer to a
  call that is not in the history.
* Only the last round may lack answers, if the request begins with them: without the round, the request would make no
  sense. It is kept regardless of its size, even if nothing else of its turn fits. Otherwise, a newest turn that is too
  large by itself is left out like any other, and the history is empty.

**Units:** tokens. What no upstream has counted is estimated (`trigate.openai.token_estimate`).

Source: the OpenAI API reference ("messages": the tool message) says that calls and answers belong together.
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
    """A request with the history before it.

    Attributes:
        messages: All messages, in the order in which they go upstream.
        remembered: The positions of the history in ``messages``.
        new: The messages of the request that the session has to remember: all but its system messages.
        system: The request's system messages as a JSON array; None = it has none.
    """

    messages: tuple[bytes, ...] = attrs.field(repr=False)
    remembered: range
    new: tuple[bytes, ...] = attrs.field(repr=False)
    system: bytes | None = attrs.field(repr=False)


def compose(
    messages: bytes, *, system: bytes, history: Sequence[Message], max_messages: int, max_tokens: int
) -> Composition:
    """Puts the history of a session before a request's messages.

    Args:
        messages: Those of the request, as a JSON array.
        system: The remembered system messages, as a JSON array.
        history: The last messages of the session, oldest first; see `bounded`.
        max_messages, max_tokens: The bounds of the history that is put before the request.
    """
    given = [(body, _read(body)) for body in map(bytes, _list.decode(messages))]
    own = [body for body, read in given if read.role in _SYSTEM]
    others = [(body, read) for body, read in given if read.role not in _SYSTEM]
    new = tuple(body for body, _ in others)
    continues = bool(others) and others[0][1].answers is not None
    kept = bounded(history, max_messages=max_messages, max_tokens=max_tokens, continues=continues)
    before = own or [bytes(body) for body in _list.decode(system)]
    return Composition(
        messages=(*before, *(message.body for message in kept), *new),
        remembered=range(len(before), len(before) + len(kept)),
        new=new,
        system=b"[" + b",".join(own) + b"]" if own else None,
    )


def bounded(
    messages: Sequence[Message], *, max_messages: int, max_tokens: int, continues: bool = False
) -> Sequence[Message]:
    """Returns the part of a history that is put before a request.

    Args:
        messages: The end of the history, oldest first: all of it, or at least one message more than ``max_messages``
            (so that a turn of which only the end is here counts as too large).
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
    """The fields of a message that the rules depend on.

    Attributes:
        calls: The ids of its calls of tools.
        answers: The id of the call that it answers; None = it answers none.
    """

    role: str
    calls: frozenset[str] = frozenset()
    answers: str | None = None


def _read(body: bytes) -> _Read:
    fields = _fields.decode(body)
    role = _value(fields, "role")
    if role in _ANSWERS:
        call_id = _value(fields, "tool_call_id")
        return _Read(role, answers=call_id if isinstance(call_id, str) else _FUNCTION)
    if role != "assistant":
        return _Read(str(role))
    calls = _value(fields, "tool_calls")
    ids = [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    if _value(fields, "function_call") is not None:
        ids.append(_FUNCTION)
    return _Read(role, calls=frozenset(each if isinstance(each, str) else _FUNCTION for each in ids))


def _value(fields: dict[str, msgspec.Raw], name: str) -> Any:  # Any: JSON of any shape; None if there is no such field
    return _any.decode(fields[name]) if name in fields else None


_History = Sequence[tuple[Message, _Read]]


def _turns(history: _History) -> list[int]:
    """Returns the index at which each turn begins. A turn that begins with answers belongs to the one before it."""
    return [
        at
        for at, (message, read) in enumerate(history)
        if at == 0 or (message.turn != history[at - 1][0].turn and read.answers is None)
    ]


def _last_round(history: _History) -> int:
    """Returns the index at which the round begins that the history ends with; its length, if it ends with none."""
    at = len(history) - 1
    while at >= 0 and history[at][1].answers is not None:
        at -= 1
    return at if at >= 0 and history[at][1].calls else len(history)


def _whole_rounds(history: _History, *, continues: bool) -> Sequence[Message]:
    """Leaves out rounds that lack answers, and answers that lack their calls."""
    kept: list[Message] = []
    at = 0
    while at < len(history):
        message, read = history[at]
        end = at + 1
        while end < len(history) and history[end][1].answers is not None:
            end += 1
        answers = [(answer, its.answers) for answer, its in history[at + 1 : end] if its.answers in read.calls]
        if read.answers is None and (
            read.calls <= {call_id for _, call_id in answers} or (continues and end == len(history))
        ):
            kept += [message, *[answer for answer, _ in answers]]
        at = end
    return kept
