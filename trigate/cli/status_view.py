"""What `trigate status` shows, made of what ``GET /status`` and ``GET /status/streams`` say. Pure.

What stands in it was said by others: a model's name is a client's, an error a provider's. So whatever could move a
terminal's cursor, or colour it, is replaced in each cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import attrs
import msgspec

Tone = Literal["plain", "good", "warning", "bad", "faint"]

PATHS = ("/status", "/status/streams")
"""What a gateway is asked."""
MAX_CELL = 60
"""Characters of a cell."""


# -- what the gateway says --------------------------------------------------------------------------------------------

# Only what is shown, and what can be absent has a default: a gateway of another version is no reason to fail.


@attrs.frozen(kw_only=True)
class Attempt:
    """A try at a target, as ``/status/streams`` describes it."""

    target: str
    why: str = ""
    phase: str | None = None
    outcome: str | None = None
    status: int | None = None
    started_s: float = 0.0
    duration_s: float | None = None


@attrs.frozen(kw_only=True)
class Stream:
    """An exchange in flight."""

    id: str
    model: str
    phase: str
    age_s: float
    target: str | None = None
    deadline_left_s: float | None = None
    queue_position: int | None = None
    attempts: tuple[Attempt, ...] = ()
    max_attempts: int | None = None
    events: int = 0
    bytes: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    client_gone: bool = False
    worker: str = ""


@attrs.frozen(kw_only=True)
class Streams:
    """``GET /status/streams``."""

    data: tuple[Stream, ...]
    count: int
    missing_workers: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Target:
    """What one worker knows of a target."""

    target: str
    breaker: str
    opens_in_s: float = 0.0
    in_flight: int = 0
    first_token_s: float | None = None


@attrs.frozen(kw_only=True)
class Admission:
    """The door, of all workers together."""

    in_flight: int
    limit: int
    queued: int
    refused: int = 0
    late: int = 0
    lag_s: float = 0.0


@attrs.frozen(kw_only=True)
class Worker:
    """A worker process."""

    id: str
    pid: int
    status: str
    uptime_s: float
    live: int


@attrs.frozen(kw_only=True)
class Totals:
    """What has ended."""

    exchanges: int
    complete: int
    cancelled: int
    failed: int


@attrs.frozen(kw_only=True)
class Store:
    """Where it keeps what outlives it."""

    path: str
    state: str
    error: str | None = None


@attrs.frozen(kw_only=True)
class Ledger:
    """How the records of exchanges are kept."""

    state: str
    dropped: int = 0
    error: str | None = None


@attrs.frozen(kw_only=True)
class Sessions:
    """How many there are."""

    total: int
    active: int
    busy: int


@attrs.frozen(kw_only=True)
class Channel:
    """A hook, or a channel to a platform."""

    name: str
    type: str
    status: str
    last_error: str | None = None
    received: int | None = None
    replied: int | None = None
    queued: int | None = None


@attrs.frozen(kw_only=True)
class Upstream:
    """A provider."""

    name: str
    state: str
    in_flight: int
    models: int
    reason: str | None = None


@attrs.frozen(kw_only=True)
class Live:
    """How many exchanges are in flight, whoever sees them."""

    live: int


@attrs.frozen(kw_only=True)
class Status:
    """``GET /status``."""

    status: str
    version: str
    uptime: str
    config: str
    totals: Totals
    streams: Live
    store: Store
    workers: tuple[Worker, ...]
    reload_error: str | None = None
    sessions: Sessions | None = None
    channels: tuple[Channel, ...] = ()
    upstreams: tuple[Upstream, ...] = ()
    admission: Admission | None = None
    ledger: Ledger | None = None
    targets: tuple[Target, ...] = ()


def read(status: dict[str, Any], streams: dict[str, Any]) -> tuple[Status, Streams]:  # Any: JSON
    """Reads the two bodies.

    Raises:
        ValueError: They are not what a gateway says; the words say where.
    """
    try:
        return msgspec.convert(status, Status), msgspec.convert(streams, Streams)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


# -- what is shown of it ----------------------------------------------------------------------------------------------


@attrs.frozen
class Cell:
    """A few words, and how they are meant."""

    text: str
    tone: Tone = "plain"


EMPTY = Cell("")


@attrs.frozen
class Table:
    """Lines under headings."""

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]

    def columns(self) -> list[int]:
        """Those in which something stands; the others are not shown."""
        return [n for n in range(len(self.headings)) if any(line[n].text for line in self.lines)]


@attrs.frozen(kw_only=True)
class Overview:
    """What is shown.

    Attributes:
        head: What matters at each moment.
        more: What is shown once, and not again and again.
    """

    head: tuple[Cell, ...]
    more: tuple[Cell, ...]
    targets: Table
    streams: Table


NUMBERS = frozenset(
    {"tried again in", "in flight", "first token", "age", "left", "queue", "events", "bytes", "tokens", "worker"}
)
"""The headings whose cells stand to the right."""


def overview(status: Status, streams: Streams) -> Overview:
    """Puts together what is shown."""
    return Overview(
        head=tuple(_head(status, streams)),
        more=tuple(_more(status)),
        targets=_targets(status.targets),
        streams=_streams(streams, {worker.id: worker.pid for worker in status.workers}),
    )


def _head(status: Status, streams: Streams) -> Iterable[Cell]:
    totals, door = status.totals, status.admission
    yield Cell(
        f"Trigate {_word(status.version)}: {_word(status.status)}, up {_word(status.uptime)}, "
        f"configured by {printable(status.config)}",
        "plain" if status.status == "ok" else "warning",
    )
    if status.reload_error is not None:
        yield Cell(f"the last reload was refused: {printable(status.reload_error)}", "bad")
    yield Cell(
        f"{status.streams.live} live; {totals.exchanges} ended: {totals.complete} complete, "
        f"{totals.cancelled} cancelled, {totals.failed} failed"
    )
    if door is not None:
        yield Cell(
            f"admission: {door.in_flight} of {door.limit} running, {door.queued} waiting, {door.refused} refused"
            f"; the event loop is {door.lag_s * 1000:.0f} ms late"
            + (f", and {door.late} worker(s) let nobody in" if door.late else ""),
            "bad" if door.late else "warning" if door.queued else "plain",
        )
    ledger = status.ledger
    if ledger is not None and (ledger.error is not None or ledger.dropped):
        text = f"ledger: {_word(ledger.state)}" + (f", {ledger.dropped} records dropped" if ledger.dropped else "")
        yield attrs.evolve(_told(text, ledger.error), tone="warning")
    if len(status.workers) > 1:
        rows = (
            f"{row.pid}: {row.live} live, up {row.uptime_s:.0f} s" + (", draining" if row.status == "draining" else "")
            for row in status.workers
        )
        yield Cell(f"{len(status.workers)} workers ({'; '.join(rows)})")
    if streams.missing_workers:
        pids = {worker.id: str(worker.pid) for worker in status.workers}
        silent = ", ".join(pids.get(worker, _word(worker)) for worker in streams.missing_workers)
        yield Cell(f"no answer from worker {silent}: its streams are not shown", "warning")


def _more(status: Status) -> Iterable[Cell]:
    store = status.store
    yield _told(f"store {printable(store.path)}: {_word(store.state)}", store.error)
    if status.sessions is not None:
        yield Cell(f"sessions: {status.sessions.total}, {status.sessions.active} active, {status.sessions.busy} busy")
    for row in status.channels:
        counted = (
            "" if row.received is None else f"; {row.received} received, {row.replied} replied, {row.queued} queued"
        )
        told = _told(f"  {_word(row.type)} {_word(row.name)}: {_word(row.status)}", row.last_error)
        yield attrs.evolve(told, text=told.text + counted)
    for upstream in status.upstreams:
        told = _told(f"  {_word(upstream.name)}: {_word(upstream.state)}", upstream.reason)
        yield attrs.evolve(told, text=f"{told.text}, {upstream.in_flight} in flight, {upstream.models} models")


def _told(text: str, trouble: str | None) -> Cell:
    return Cell(f"{text} ({printable(trouble)})", "warning") if trouble else Cell(text)


_BREAKERS: dict[str, Tone] = {"open": "bad", "half_open": "warning", "closed": "good"}


def _targets(rows: Sequence[Target]) -> Table:
    """Each target once: its state in all workers, since none knows of the others' breakers."""
    by_name: dict[str, list[Target]] = {}
    for row in rows:
        by_name.setdefault(row.target, []).append(row)
    lines = []
    for name, same in by_name.items():
        counts = Counter(row.breaker for row in same)
        states = [state for state in _BREAKERS if state in counts] + sorted(counts.keys() - _BREAKERS.keys())
        breaker = ", ".join(f"{state} {counts[state]}" for state in states) if len(states) > 1 else states[0]
        opens = [row.opens_in_s for row in same if row.opens_in_s > 0]
        first = sorted(row.first_token_s for row in same if row.first_token_s is not None)
        lines.append(
            (
                Cell(_word(name)),
                Cell(_word(breaker), _BREAKERS.get(states[0], "plain")),
                Cell(duration(min(opens)) if opens else ""),
                Cell(str(sum(row.in_flight for row in same))),
                Cell(" to ".join(dict.fromkeys([duration(first[0]), duration(first[-1])])) if first else ""),
            )
        )
    return Table(
        f"targets: {len(lines)}",
        ("target", "breaker", "tried again in", "in flight", "first token"),
        tuple(lines),
    )


_PHASES: dict[str, Tone] = {"streaming": "good", "reading": "good", "queued": "warning", "pausing": "warning"}
_SOON_S = 5.0
"""A deadline that is nearer stands out."""


def _streams(streams: Streams, pids: dict[str, int]) -> Table:
    lines: list[tuple[Cell, ...]] = []
    for row in streams.data:
        worker = str(pids.get(row.worker, row.worker)) if len(pids) > 1 else ""
        lines.append(_stream(row, worker))
        if len(row.attempts) > 1:
            lines += [_branch(n, attempt, row) for n, attempt in enumerate(row.attempts, 1)]
    hidden = streams.count - len(streams.data)
    return Table(
        f"streams: {streams.count}" + (f", of which the oldest {len(streams.data)} are shown" if hidden > 0 else ""),
        (
            "id",
            "model",
            "phase",
            "target",
            "attempt",
            "why",
            "age",
            "left",
            "queue",
            "events",
            "bytes",
            "tokens",
            "worker",
        ),
        tuple(lines),
    )


def _stream(row: Stream, worker: str) -> tuple[Cell, ...]:
    phase = f"{row.phase}, client gone" if row.client_gone else row.phase
    most = f" of {row.max_attempts}" if row.max_attempts is not None else ""
    attempt, why = (f"{len(row.attempts)}{most}", row.attempts[-1].why) if row.attempts else ("", "")
    left_s, tokens = row.deadline_left_s, (row.prompt_tokens, row.completion_tokens)
    return (
        Cell(_word(row.id)),
        Cell(_word(row.model)),
        Cell(_word(phase), _PHASES.get(row.phase, "plain")),
        Cell(_word(row.target or "")),
        Cell(attempt),
        Cell(_word(why)),
        Cell(duration(row.age_s)),
        Cell(duration(left_s), "bad" if left_s < _SOON_S else "plain") if left_s is not None else EMPTY,
        Cell(str(row.queue_position), "warning") if row.queue_position is not None else EMPTY,
        Cell(str(row.events)),
        Cell(size(row.bytes)),
        Cell("/".join("-" if each is None else str(each) for each in tokens)) if any(tokens) else EMPTY,
        Cell(_word(worker), "faint"),
    )


def _branch(number: int, attempt: Attempt, row: Stream) -> tuple[Cell, ...]:
    """One of several attempts, under the columns of its stream."""
    status = f" {attempt.status}" if attempt.status is not None else ""
    how = f"{attempt.outcome}{status}" if attempt.outcome is not None else attempt.phase or ""
    lasted_s = attempt.duration_s if attempt.duration_s is not None else row.age_s - attempt.started_s
    return (
        EMPTY,
        EMPTY,
        Cell(_word(how), "bad" if attempt.status is not None else "faint"),
        Cell(_word(attempt.target), "faint"),
        Cell(str(number), "faint"),
        Cell(_word(attempt.why), "faint"),
        Cell(duration(lasted_s), "faint"),
        *[EMPTY] * 6,
    )


def duration(seconds: float) -> str:
    """Writes a duration in a few characters.

    >>> duration(0.25), duration(59.94), duration(61), duration(3_661), duration(-0.2)
    ('0.2 s', '59.9 s', '1:01', '1:01:01', '0.0 s')
    """
    if seconds < 59.95:
        return f"{max(0.0, seconds):.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def size(count: int) -> str:
    """Writes a number of bytes in a few characters.

    >>> size(999), size(1_000), size(1_234_567), size(5_000_000_000)
    ('999', '1.0 k', '1.2 M', '5.0 G')
    """
    if count < 1000:
        return str(count)
    value, units = count / 1000, iter("kMG")
    unit = next(units)
    while value >= 999.95 and unit != "G":
        value, unit = value / 1000, next(units)
    return f"{value:.1f} {unit}"


def printable(text: str, limit: int = 1000) -> str:
    r"""Replaces what is not to be seen, and cuts what is too long: one line, and a harmless one.

    >>> printable("a\x1b[2J\nb"), printable("x" * 100, 10)
    ('a?[2J?b', 'xxxxxxx...')
    """
    seen = "".join([each if each.isprintable() else "?" for each in text[: limit + 1]])
    return seen if len(seen) <= limit else seen[: limit - 3] + "..."


def _word(text: str) -> str:
    return printable(text, MAX_CELL)


# -- as text ----------------------------------------------------------------------------------------------------------


def written(shown: Overview) -> Iterable[str]:
    """The lines of plain text."""
    yield from (cell.text for cell in (*shown.head, *shown.more))
    for table in (shown.targets, shown.streams):
        if table.lines:
            yield ""
            yield table.title
            yield from _aligned(table)


def _aligned(table: Table) -> Iterable[str]:
    columns = table.columns()
    rows = [[table.headings[n] for n in columns], *([line[n].text for n in columns] for line in table.lines)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(columns))]
    for row in rows:
        padded = (
            text.rjust(width) if table.headings[n] in NUMBERS else text.ljust(width)
            for text, width, n in zip(row, widths, columns, strict=True)
        )
        yield ("  " + "  ".join(padded)).rstrip()
