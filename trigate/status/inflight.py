"""Lists and cancels the exchanges in flight on all workers.

Each worker knows only its own exchanges. The worker that gets the request sends a question to the other workers, and
each of them sends its answer back, as notifications (`trigate.workers`). The rules are:

* An answer is one datagram. It has as many rows as fit into `_MAX_ANSWER_BYTES`, the oldest first, and the full count.
* The worker waits `ANSWER_TIMEOUT_S` for the answers. A worker that has not answered by then is named in the result.
* An answer that arrives late is dropped.
* A gateway with keys shows and cancels only the exchanges of the key that asks; a gateway without keys, all exchanges.

Workers of two versions may meet while one replaces the other. So when the shape of `_Question` or `_Answer` changes,
change the names of the topics too: a worker then never receives a message that it cannot decode.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Literal

import attrs
import msgspec
import trio

from trigate.concurrency.notify import RepeatedEvent
from trigate.errors import CancelledByOperator
from trigate.exchange import view
from trigate.exchange.live import LiveExchanges
from trigate.exchange.state import ExchangeState
from trigate.status.schema import Stream
from trigate.workers.membership import Workers

MAX_LIMIT = 1000
"""Maximum number of rows in one result."""
ANSWER_TIMEOUT_S = 0.5
"""How long the other workers have to answer."""
_MAX_ANSWER_BYTES = 48 * 1024
"""Size of the rows in one answer. A notification is one datagram of at most 64 KiB."""
_QUESTION = "inflight-question"
_ANSWER = "inflight-answer"


class _Question(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker asks the others.

    Attributes:
        owner: Whose exchanges are selected; None = everybody's.
        stream: The request id of the selected exchanges; empty = any.
        limit: Maximum number of rows in the answer.
    """

    id: str
    action: Literal["list", "cancel"]
    owner: str | None
    stream: str
    limit: int


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker answers.

    Attributes:
        question: The id of the question.
        count: Number of selected exchanges; there may be fewer rows.
        cancelled: Number of exchanges that this question has cancelled.
        rows: The oldest first.
    """

    question: str
    worker: str
    count: int
    cancelled: int
    rows: tuple[Stream, ...]


@attrs.frozen(kw_only=True)
class Found:
    """The exchanges of all workers that were selected.

    Attributes:
        rows: The oldest first.
        count: Number of selected exchanges; there may be fewer rows.
        cancelled: Number of exchanges that were cancelled.
        missing_workers: The ids of the workers that did not answer in time.
    """

    rows: tuple[Stream, ...]
    count: int
    cancelled: int
    missing_workers: tuple[str, ...]


@attrs.define(eq=False, kw_only=True)
class InflightRequests:
    """Lists and cancels the exchanges in flight. Made by `gateway`; at most one for each `Workers`.

    Attributes:
        live: The exchanges of this worker that are in flight, in the order of their arrival.
    """

    _workers: Workers
    _live: LiveExchanges
    _answers: dict[str, list[_Answer]] = attrs.field(init=False, factory=dict)  # by question
    _answered: RepeatedEvent = attrs.field(init=False, factory=RepeatedEvent)

    def __attrs_post_init__(self) -> None:
        self._workers.on_notify(_QUESTION, self._on_question)
        self._workers.on_notify(_ANSWER, self._on_answer)

    async def list(self, *, owner: str | None, stream: str = "", limit: int = MAX_LIMIT) -> Found:
        """Lists exchanges in flight, the oldest first.

        Args:
            owner: Whose; None = everybody's.
            stream: Only those with this request id; empty = any. Clients choose it, so several may have the same one.
            limit: Maximum number of rows.

        Raises:
            StoreUnavailable: The other workers cannot be looked up.
        """
        return await self._ask("list", owner, stream, limit)

    async def cancel(self, *, owner: str | None, stream: str) -> Found:
        """Cancels the exchanges with this request id. Their clients get `CancelledByOperator`.

        Args:
            owner: Whose; None = everybody's.

        Raises:
            StoreUnavailable: The other workers cannot be looked up; nothing was cancelled.
        """
        return await self._ask("cancel", owner, stream, MAX_LIMIT)

    async def _ask(self, action: Literal["list", "cancel"], owner: str | None, stream: str, limit: int) -> Found:
        question = _Question(id=secrets.token_hex(8), action=action, owner=owner, stream=stream, limit=limit)
        others = {worker.id for worker in await self._workers.others()}
        answers = self._answers[question.id] = []
        try:
            if others:
                self._workers.notify(_QUESTION, msgspec.json.encode(question))
            answers.append(self._answer(question))
            with trio.move_on_after(ANSWER_TIMEOUT_S):
                while not others <= {answer.worker for answer in answers}:
                    await self._answered.wait()
        finally:
            del self._answers[question.id]
        rows = sorted((row for answer in answers for row in answer.rows), key=lambda row: -row.age_s)
        return Found(
            rows=tuple(rows[:limit]),
            count=sum(answer.count for answer in answers),
            cancelled=sum(answer.cancelled for answer in answers),
            missing_workers=tuple(sorted(others - {answer.worker for answer in answers})),
        )

    def _answer(self, question: _Question) -> _Answer:
        """Answers a question for this worker."""
        selected = [
            exchange
            for exchange in self._live
            if (question.owner is None or exchange.owner == question.owner)
            and (not question.stream or exchange.id == question.stream)
        ]
        cancelled = 0
        if question.action == "cancel":
            for exchange in selected:
                cancelled += not exchange.is_cancelled
                exchange.cancel(CancelledByOperator("The call was ended by a request to DELETE /status/streams."))
        now = trio.current_time()
        return _Answer(
            question=question.id,
            worker=self._workers.id,
            count=len(selected),
            cancelled=cancelled,
            rows=tuple(self._row(exchange, now) for exchange in selected[: question.limit]),
        )

    def _row(self, exchange: ExchangeState, now: float) -> Stream:
        return msgspec.convert({**view.describe(exchange, now), "worker": self._workers.id}, Stream)

    def _on_question(self, body: bytes) -> None:
        """Answers another worker. All workers get the answer; those that did not ask ignore it."""
        question = msgspec.json.decode(body, type=_Question)
        answer = self._answer(question)
        fitting = msgspec.structs.replace(answer, rows=tuple(_fitting(answer.rows)))
        self._workers.notify(_ANSWER, msgspec.json.encode(fitting))

    def _on_answer(self, body: bytes) -> None:
        """Takes the answer of another worker, if it is to a question that this worker still waits for."""
        answer = msgspec.json.decode(body, type=_Answer)
        if answer.question in self._answers:
            self._answers[answer.question].append(answer)
            self._answered.set()


def _fitting(rows: Iterable[Stream]) -> Iterable[Stream]:
    """Yields the first rows, as many as fit into one answer."""
    size = 0
    for row in rows:
        size += len(msgspec.json.encode(row))
        if size > _MAX_ANSWER_BYTES:
            return
        yield row
