"""What of a session stands before a request: how much of it, and in which order. Pure.

Two rules decide how much. The newest turns are the ones that stay, as long as all that stays is within the bounds. And
what a model asked of tools stays together with what the tools said: a provider refuses one without the other. So what
is left out is left out in *passages*: a turn, with the turns behind it that begin with the answers of tools to it.

The one exception to the bounds: where the request itself begins with the answers of tools, the passage that they belong
to stays, whatever its size. Without it the request could not be served at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import attrs
import msgspec

from trigate.store import Message

_BYTES_PER_TOKEN = 4


class _Shape(msgspec.Struct):
    role: str
    tool_calls: msgspec.Raw | None = None
    function_call: msgspec.Raw | None = None


_shape = msgspec.json.Decoder(_Shape)
_raws = msgspec.json.Decoder(list[msgspec.Raw])


def estimated_tokens(body: bytes) -> int:
    """How many tokens a message has, about: a quarter of its bytes, rounded up. What models count differs, and a count
    would need the tokenizer of each; for a bound it is near enough.

    >>> estimated_tokens(b""), estimated_tokens(b"abcde")
    (0, 2)
    """
    return -(-len(body) // _BYTES_PER_TOKEN)


def bounded(
    messages: Sequence[Message], *, max_messages: int, max_tokens: int, answers_tools: bool = False
) -> list[Message]:
    """Returns the newest messages that may stand before a request.

    Args:
        messages: The last ones of a session, oldest first, from anywhere within a turn.
        answers_tools: The request begins with what tools said to the last of them.
    """
    passages = _passages(messages)
    kept: list[list[Message]] = []
    count = tokens = 0
    for passage in reversed(passages):
        count += len(passage)
        tokens += sum(message.tokens for message in passage)
        is_needed = answers_tools and not kept
        if not is_needed and (count > max_messages or tokens > max_tokens):
            break
        kept.append(passage)
    return _without_unanswered(list(itertools.chain(*reversed(kept))), answers_tools)


def _passages(messages: Sequence[Message]) -> list[list[Message]]:
    found: list[list[Message]] = []
    turn = None
    for message in messages:
        if turn == (message.epoch, message.turn) and found:
            found[-1].append(message)
            continue
        turn = (message.epoch, message.turn)
        if not _is_of_tools(message.body):
            found.append([message])
        elif found:
            found[-1].append(message)
        else:
            turn = None  # what it answers is not here
    return found


def _without_unanswered(messages: list[Message], answers_tools: bool) -> list[Message]:
    """Leaves out messages that call for tools and are not followed by what the tools said."""
    kept = []
    for message, following in itertools.zip_longest(messages, messages[1:]):
        is_answered = _is_of_tools(following.body) if following is not None else answers_tools
        if is_answered or not _calls_tools(message.body):
            kept.append(message)
    return kept


def _is_of_tools(body: bytes | msgspec.Raw) -> bool:
    return _shape.decode(body).role in ("tool", "function")


def _calls_tools(body: bytes) -> bool:
    shape = _shape.decode(body)
    return any(calls is not None and bytes(calls) not in (b"null", b"[]") for calls in (shape.tool_calls, shape.function_call))


@attrs.frozen(kw_only=True)
class Request:
    """The messages of a request, apart; each as the client sent it.

    Attributes:
        system: What the model is to be; system and developer messages.
        others: Everything else.
    """

    system: tuple[bytes, ...]
    others: tuple[bytes, ...]

    @property
    def answers_tools(self) -> bool:
        """It begins with what tools said."""
        return bool(self.others) and _is_of_tools(self.others[0])


def split(messages: bytes) -> Request:
    """Takes the messages of a request apart, a JSON array of objects with a role (as `wire.decode_call` has checked).

    >>> split(b'[{"role": "user", "content": 1.0}, {"role":"system"}]')
    Request(system=(b'{"role":"system"}',), others=(b'{"role": "user", "content": 1.0}',))
    """
    system: list[bytes] = []
    others: list[bytes] = []
    for raw in _raws.decode(messages):
        (system if _shape.decode(raw).role in ("system", "developer") else others).append(bytes(raw))
    return Request(system=tuple(system), others=tuple(others))


def joined(messages: Iterable[bytes]) -> bytes:
    """Puts messages together, as a JSON array.

    >>> joined([b'{"a": 1}', b"{}"]), joined([])
    (b'[{"a": 1},{}]', b'[]')
    """
    return b"[" + b",".join(messages) + b"]"


def composed(request: Request, *, remembered: bytes, history: Iterable[Message]) -> bytes:
    """The messages of a request with a session's before them, as a JSON array. The request's own system messages take
    the place of the remembered ones.

    Args:
        remembered: System messages, as a JSON array.
    """
    system = request.system or tuple(bytes(raw) for raw in _raws.decode(remembered))
    return joined((*system, *(message.body for message in history), *request.others))
