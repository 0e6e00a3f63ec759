"""The body of ``GET /metrics``: the samples of all workers of the machine, as they are now.

The worker that is asked sends a question to the others, and each sends its samples back, as notifications
(`trigate.workers`), as with `status.inflight`. The rules are:

* Every sample of a worker has the label ``worker``. The samples of several workers are never added up here: when a
  worker exits, a sum would fall, and Prometheus would take that for a counter that begins anew. With the label,
  ``sum(rate(…))`` is right whenever workers come and go.
* An answer is one datagram, compressed. A worker that has not answered within `ANSWER_TIMEOUT_S`, or whose samples do
  not fit, is missing in that answer, and counted in ``trigate_scrape_missing_workers``.
* What belongs to no worker (sessions, channels, the outbox) is taken from the status, once.
"""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Iterator

import attrs
import msgspec
import trio

from trigate.concurrency.notify import RepeatedEvent
from trigate.errors import StoreUnavailable
from trigate.metrics import exposition
from trigate.metrics.families import Sample
from trigate.status.reporter import StatusReporter
from trigate.status.schema import Status
from trigate.status.worker_metrics import WorkerMetrics
from trigate.workers.membership import Workers

ANSWER_TIMEOUT_S = 0.5
"""How long the other workers have to answer."""
MAX_ANSWER_BYTES = 60 * 1024
"""The size of a compressed answer. A notification is one datagram of at most 64 KiB."""
_QUESTION = "metrics-question"
_ANSWER = "metrics-answer"


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker answers."""

    question: str
    worker: str
    samples: tuple[Sample, ...]


@attrs.define(eq=False, kw_only=True)
class Scrapes:
    """Answers scrapes. Made by `gateway`; at most one for each `Workers`."""

    _workers: Workers
    _metrics: WorkerMetrics
    _status: StatusReporter
    _old_names: bool
    _answers: dict[str, dict[str, tuple[Sample, ...]]] = attrs.field(init=False, factory=dict)  # by question
    _answered: RepeatedEvent = attrs.field(init=False, factory=RepeatedEvent)

    def __attrs_post_init__(self) -> None:
        self._workers.on_notify(_QUESTION, self._on_question)
        self._workers.on_notify(_ANSWER, self._on_answer)

    async def expose(self, *, openmetrics: bool) -> bytes:
        """Makes the body of the answer, in OpenMetrics' format or in Prometheus' text format."""
        status = await self._status.status()
        workers, missing = await self._ask()
        return exposition.expose(
            [
                *_of_status(status),
                Sample("trigate_workers", (), len(workers) + missing),
                Sample("trigate_scrape_missing_workers", (), missing),
            ],
            workers,
            openmetrics=openmetrics,
            old_names=self._old_names,
        )

    async def _ask(self) -> tuple[dict[str, tuple[Sample, ...]], int]:
        """Returns the samples of each worker by its id, and how many workers have not answered."""
        await trio.lowlevel.checkpoint()
        try:
            others = {worker.id for worker in await self._workers.others()}
        except StoreUnavailable:  # then this worker knows of no other
            others = set()
        question = secrets.token_hex(8)
        answers = self._answers[question] = {self._workers.id: tuple(self._metrics.samples())}
        try:
            if others:
                self._workers.notify(_QUESTION, question.encode())
                with trio.move_on_after(ANSWER_TIMEOUT_S):
                    while not others <= answers.keys():
                        await self._answered.wait()
        finally:
            del self._answers[question]
        return dict(sorted(answers.items())), len(others - answers.keys())

    def _on_question(self, body: bytes) -> None:
        """Answers another worker. All workers get the answer; those that did not ask ignore it."""
        answer = _Answer(question=body.decode(), worker=self._workers.id, samples=tuple(self._metrics.samples()))
        data = zlib.compress(msgspec.msgpack.encode(answer), 1)
        if len(data) <= MAX_ANSWER_BYTES:
            self._workers.notify(_ANSWER, data)

    def _on_answer(self, body: bytes) -> None:
        """Takes the answer of another worker, if it is to a question that this worker still waits for."""
        if self._answers:
            answer = msgspec.msgpack.decode(zlib.decompress(body), type=_Answer)
            if answer.question in self._answers:
                self._answers[answer.question][answer.worker] = answer.samples
                self._answered.set()


def _of_status(status: Status) -> Iterator[Sample]:
    if (sessions := status.sessions) is not None:
        for state in ("total", "active", "busy"):
            yield Sample("trigate_sessions", (state,), getattr(sessions, state))
    if status.outbox is not None:
        yield Sample("trigate_outbox_waiting", (), status.outbox.depth)
    for channel in status.channels:
        yield Sample("trigate_channel_up", (channel.name,), int(channel.status == "connected"))
        for family, value in (
            ("trigate_channel_received", channel.received),
            ("trigate_channel_replied", channel.replied),
            ("trigate_channel_waiting", channel.queued),
        ):
            if value is not None:
                yield Sample(family, (channel.name,), value)
