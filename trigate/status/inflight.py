"""The exchanges in flight, one by one, of all workers: seen, and ended.

Each worker knows its own. Who is asked rings the others (`workers`), who answer with a ring of their own, in one
datagram: as many rows as fit, and how many there are. Whoever does not answer in time is named, and keeps nobody
waiting.

Who has a key sees, and ends, what is done with that key; where the gateway has no keys, everything.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import attrs
import msgspec
import trio

from trigate.errors import CancelledByOperator

if TYPE_CHECKING:
    from trigate.exchange.exchange import Exchange
    from trigate.gateway.gateway import Gateway

MAX_LIMIT = 1000
ANSWER_TIMEOUT_S = 0.5
_MAX_ANSWER_BYTES = 48 * 1024  # of one worker, beside the frame: a ring holds 64 KiB


@attrs.frozen(kw_only=True)
class _Question:
    """What is asked, of this worker or another.

    Attributes:
        id: Of the question.
        owner: Whose exchanges are meant; None = everybody's.
        stream: The id of an exchange; empty = all.
        what: ``tell`` of them, or ``end`` them.
    """

    id: str
    owner: str | None
    stream: str
    what: Literal["tell", "end"]
    limit: int


@attrs.frozen(kw_only=True)
class _Answer:
    """What one worker says.

    Attributes:
        count: How many exchanges are meant, of which there may be fewer rows.
        ended: How many were ended.
    """

    question: str
    worker: str
    count: int
    ended: int
    rows: list[dict[str, Any]]


@attrs.frozen(kw_only=True)
class Found:
    """What was found, of all workers.

    Attributes:
        rows: The oldest first.
        count: How many there are.
        ended: How many have been ended.
        missing_workers: Who has not answered.
    """

    rows: list[dict[str, Any]]
    count: int
    ended: int
    missing_workers: list[str]


class Streams:
    """Made by `gateway`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._asked: dict[str, list[_Answer]] = {}
        self._heard = trio.Event()
        gateway.workers.on_notify("streams", self._heed)
        gateway.workers.on_notify("streams-told", self._note)

    async def tell(self, *, owner: str | None, stream: str = "", limit: int = MAX_LIMIT) -> Found:
        """Returns what is in flight, the oldest first.

        Args:
            owner: Whose; None = everybody's.
            stream: Only those with this request id. Clients choose it, so there may be several.
        """
        return await self._ask("tell", owner, stream, limit)

    async def end(self, *, owner: str | None, stream: str) -> Found:
        """Ends the exchanges with this request id; their clients are told."""
        return await self._ask("end", owner, stream, MAX_LIMIT)

    async def _ask(self, what: Literal["tell", "end"], owner: str | None, stream: str, limit: int) -> Found:
        workers = self._gateway.workers
        question = _Question(id=secrets.token_hex(8), owner=owner, stream=stream, what=what, limit=limit)
        others = {worker.id for worker in await workers.others()}
        answers = self._asked[question.id] = []
        try:
            if others:
                workers.notify("streams", msgspec.json.encode(attrs.asdict(question)))
            answers.append(self._answer(question))
            with trio.move_on_after(ANSWER_TIMEOUT_S):
                while not others <= {answer.worker for answer in answers}:
                    self._heard = trio.Event()
                    await self._heard.wait()
        finally:
            del self._asked[question.id]
        rows = sorted((row for answer in answers for row in answer.rows), key=lambda row: -row["age_s"])
        return Found(
            rows=rows[:limit],
            count=sum(answer.count for answer in answers),
            ended=sum(answer.ended for answer in answers),
            missing_workers=sorted(others - {answer.worker for answer in answers}),
        )

    def _meant(self, question: _Question) -> list[Exchange]:
        return [
            exchange
            for exchange in self._gateway.live
            if (question.owner is None or exchange.owner == question.owner)
            and (not question.stream or exchange.id == question.stream)
        ]

    def _answer(self, question: _Question) -> _Answer:
        meant = self._meant(question)
        worker, now, ended = self._gateway.workers.id, trio.current_time(), 0
        if question.what == "end":
            for exchange in meant:
                ended += not exchange.is_cut
                exchange.cut(CancelledByOperator("The call was ended by a request to DELETE /status/streams."))
        rows = [{**exchange.describe(now), "worker": worker} for exchange in meant[: question.limit]]
        return _Answer(question=question.id, worker=worker, count=len(meant), ended=ended, rows=rows)

    def _heed(self, ring: bytes) -> None:
        """Another worker asks."""
        question = _Question(**msgspec.json.decode(ring))
        answer = self._answer(question)
        fitting = attrs.evolve(answer, rows=list(_fitting(answer.rows)))
        self._gateway.workers.notify("streams-told", msgspec.json.encode(attrs.asdict(fitting)))

    def _note(self, ring: bytes) -> None:
        """Another worker answers: somebody."""
        answer = _Answer(**msgspec.json.decode(ring))
        if answer.question in self._asked:
            self._asked[answer.question].append(answer)
            self._heard.set()


def _fitting(rows: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    size = 0
    for row in rows:
        size += len(msgspec.json.encode(row))
        if size > _MAX_ANSWER_BYTES:
            return
        yield row
