"""Makes tables and lines from the bodies of ``GET /status`` and ``GET /status/streams``, for `trigate status`. Pure.

There are two renderers. `plain_lines`, in this module, aligns text by hand, for a pipe, a file, and a terminal without
rich. `trigate.cli.status_watch` draws with rich, on a terminal. Neither can replace the other without a loss to users:
rich is an optional extra, and outside a terminal it fits its lines into 80 columns, which breaks
``trigate status | grep``; a live view needs colours, and rows cut to the size of the terminal.

The bodies contain text that others chose: a client chose the name of a model, a provider the message of an error. So
each cell replaces the characters that could move the cursor of a terminal or change its colours (`printable`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import attrs
import msgspec

from trigate.status.schema import AttemptStatus, Status, Stream, StreamList, TargetStatus

Tone = Literal["plain", "good", "warning", "bad", "faint"]

PATHS = ("/status", "/status/streams")
"""The paths that a gateway is asked for."""
MAX_CELL = 60
"""Maximum length of a name in a cell, in characters."""


def read(status: dict[str, Any], streams: dict[str, Any]) -> tuple[Status, StreamList]:  # Any: JSON
    """Reads the two bodies. They may be of another version: see `trigate.status.schema`.

    Raises:
        ValueError: They are not the bodies of a gateway; the message names the first field that is wrong.
    """
    try:
        return msgspec.convert(status, Status), msgspec.convert(streams, StreamList)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


# -- tables and lines -------------------------------------------------------------------------------------------------


@attrs.frozen
class Cell:
    """A text, and how it stands out."""

    text: str
    tone: Tone = "plain"


EMPTY = Cell("")


@attrs.frozen
class Table:
    """Rows under headings. Each row has one cell for each heading."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def columns(self) -> list[int]:
        """Returns the indices of the columns that are not empty; only these are shown."""
        return [n for n in range(len(self.headings)) if any(row[n].text for row in self.rows)]


@attrs.frozen(kw_only=True)
class Overview:
    """Everything that is shown.

    Attributes:
        head: Lines that every view shows.
        details: Lines that `--watch` leaves out.
    """

    head: tuple[Cell, ...]
    details: tuple[Cell, ...]
    targets: Table
    streams: Table


NUMBERS = frozenset(
    (
        *("tried again in", "in flight", "first token", "cached", "age", "left", "queue"),
        *("events", "bytes", "tokens", "worker"),
    )
)
"""The headings of the columns that are aligned to the right."""


def overview(status: Status, streams: StreamList) -> Overview:
    """Makes the tables and lines."""
    return Overview(
        head=tuple(_head(status, streams)),
        details=tuple(_details(status)),
        targets=_targets(status.targets),
        streams=_streams(streams, {worker.id: worker.pid for worker in status.workers}),
    )


def _head(status: Status, streams: StreamList) -> Iterable[Cell]:
    totals, admission = status.totals, status.admission
    yield Cell(
        f"Trigate {_name(status.version)}: {_name(status.status)}, up {_name(status.uptime)}, "
        f"configured by {printable(status.config)}",
        "plain" if status.status == "ok" else "warning",
    )
    if status.reload_error is not None:
        yield Cell(f"the last reload was refused: {printable(status.reload_error)}", "bad")
    yield Cell(
        f"{status.streams.live} live; {totals.exchanges} ended: {totals.complete} complete, "
        f"{totals.cancelled} cancelled, {totals.failed} failed"
    )
    if admission is not None:
        late = admission.late_workers
        yield Cell(
            f"admission: {admission.in_flight} of {admission.limit} running, {admission.queued} waiting, "
            f"{admission.refused} refused; the event loop is {admission.lag_s * 1000:.0f} ms late"
            + (f", and {late} worker(s) refuse new calls" if late else ""),
            "bad" if late else "warning" if admission.queued else "plain",
        )
    ledger = status.ledger
    if ledger is not None and (ledger.error is not None or ledger.dropped):
        text = f"ledger: {_name(ledger.state)}" + (f", {ledger.dropped} records dropped" if ledger.dropped else "")
        yield attrs.evolve(_with_problem(text, ledger.error), tone="warning")
    tracing = status.tracing
    if tracing.error is not None or tracing.dropped:
        text = f"traces: {_name(tracing.state)}" + (f", {tracing.dropped} spans dropped" if tracing.dropped else "")
        yield attrs.evolve(_with_problem(text, tracing.error), tone="warning")
    if len(status.workers) > 1:
        workers = (
            f"{worker.pid}: {worker.live} live, up {worker.uptime_s:.0f} s"
            + (", draining" if worker.status == "draining" else "")
            for worker in status.workers
        )
        yield Cell(f"{len(status.workers)} workers ({'; '.join(workers)})")
    if streams.missing_workers:
        pids = {worker.id: str(worker.pid) for worker in status.workers}
        missing = ", ".join(pids.get(worker, _name(worker)) for worker in streams.missing_workers)
        yield Cell(f"no answer from worker {missing}: its streams are not shown", "warning")


def _details(status: Status) -> Iterable[Cell]:
    store = status.store
    yield _with_problem(f"store {printable(store.path)}: {_name(store.state)}", store.error)
    if status.sessions is not None:
        yield Cell(f"sessions: {status.sessions.total}, {status.sessions.active} active, {status.sessions.busy} busy")
    for channel in status.channels:
        counts = (
            f"; {channel.received} received, {channel.replied} replied, {channel.queued} queued"
            if channel.received is not None
            else ""
        )
        cell = _with_problem(
            f"  {_name(channel.type)} {_name(channel.name)}: {_name(channel.status)}", channel.last_error
        )
        yield attrs.evolve(cell, text=cell.text + counts)
    for upstream in status.upstreams:
        cell = _with_problem(f"  {_name(upstream.name)}: {_name(upstream.state)}", upstream.reason)
        yield attrs.evolve(cell, text=f"{cell.text}, {upstream.in_flight} in flight, {upstream.models} models")


def _with_problem(text: str, problem: str | None) -> Cell:
    return Cell(f"{text} ({printable(problem)})", "warning") if problem else Cell(text)


_BREAKERS: dict[str, Tone] = {"open": "bad", "half_open": "warning", "closed": "good"}
"""The states of a circuit breaker, the worst one first."""


def _targets(targets: Sequence[TargetStatus]) -> Table:
    """Makes one row for each target and endpoint. It combines all workers, because each worker has its own circuit
    breakers."""
    by_name: dict[tuple[str, str], list[TargetStatus]] = {}
    for target in targets:
        by_name.setdefault((target.target, target.endpoint), []).append(target)
    rows = []
    for (name, endpoint), same in by_name.items():
        counts = Counter(target.breaker for target in same)
        states = [state for state in _BREAKERS if state in counts] + sorted(counts.keys() - _BREAKERS.keys())
        breaker = ", ".join(f"{state} {counts[state]}" for state in states) if len(states) > 1 else states[0]
        opens = [target.opens_in_s for target in same if target.opens_in_s > 0]
        first = sorted(target.first_token_s for target in same if target.first_token_s is not None)
        prompt_tokens = sum(target.prompt_tokens for target in same)
        cached = sum(target.cached_tokens for target in same) / prompt_tokens if prompt_tokens else None
        rows.append(
            (
                Cell(_name(name)),
                Cell(_name(endpoint)),
                Cell(_name(breaker), _BREAKERS.get(states[0], "plain")),
                Cell(duration(min(opens)) if opens else ""),
                Cell(str(sum(target.in_flight for target in same))),
                Cell(" to ".join(dict.fromkeys([duration(first[0]), duration(first[-1])])) if first else ""),
                Cell(f"{100 * cached:.0f} %" if cached is not None else ""),
            )
        )
    return Table(
        f"targets: {len(rows)}",
        ("target", "endpoint", "breaker", "tried again in", "in flight", "first token", "cached"),
        tuple(rows),
    )


_PHASES: dict[str, Tone] = {"streaming": "good", "reading": "good", "queued": "warning", "pausing": "warning"}
_NEAR_S = 5.0
"""A deadline that is nearer than this stands out."""


def _streams(streams: StreamList, pids: dict[str, int]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for stream in streams.data:
        worker = str(pids.get(stream.worker, stream.worker)) if len(pids) > 1 else ""
        rows.append(_stream(stream, worker))
        if len(stream.attempts) > 1:
            rows += [_attempt(n, attempt, stream) for n, attempt in enumerate(stream.attempts, 1)]
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
        tuple(rows),
    )


def _stream(stream: Stream, worker: str) -> tuple[Cell, ...]:
    """Makes the row of an exchange.

    Args:
        worker: What to show as the worker; empty if there is only one.
    """
    phase = f"{stream.phase}, client gone" if stream.client_gone else stream.phase
    maximum = f" of {stream.max_attempts}" if stream.max_attempts is not None else ""
    attempt, why = (f"{len(stream.attempts)}{maximum}", stream.attempts[-1].why) if stream.attempts else ("", "")
    left_s, tokens = stream.deadline_left_s, (stream.prompt_tokens, stream.completion_tokens)
    return (
        Cell(_name(stream.id)),
        Cell(_name(stream.model)),
        Cell(_name(phase), _PHASES.get(stream.phase, "plain")),
        Cell(_name(stream.target or "")),
        Cell(attempt),
        Cell(_name(why)),
        Cell(duration(stream.age_s)),
        Cell(duration(left_s), "bad" if left_s < _NEAR_S else "plain") if left_s is not None else EMPTY,
        Cell(str(stream.queue_position), "warning") if stream.queue_position is not None else EMPTY,
        Cell(str(stream.events)),
        Cell(size(stream.bytes)),
        Cell("/".join("-" if count is None else str(count) for count in tokens)) if any(tokens) else EMPTY,
        Cell(_name(worker), "faint"),
    )


def _attempt(number: int, attempt: AttemptStatus, stream: Stream) -> tuple[Cell, ...]:
    """Makes the row of one of several attempts, under the row of its exchange."""
    status = f" {attempt.status}" if attempt.status else ""
    state = f"{attempt.outcome}{status}" if attempt.outcome else attempt.phase or ""
    # `or` would take a duration of 0 for none
    duration_s = attempt.duration_s if isinstance(attempt.duration_s, float) else stream.age_s - attempt.started_s
    return (
        EMPTY,
        EMPTY,
        Cell(_name(state), "bad" if status else "faint"),
        Cell(_name(attempt.target), "faint"),
        Cell(str(number), "faint"),
        Cell(_name(attempt.why), "faint"),
        Cell(duration(duration_s), "faint"),
        *[EMPTY] * 6,
    )


def duration(seconds: float) -> str:
    """Formats a duration in a few characters.

    >>> duration(0.25), duration(59.94), duration(61), duration(3_661), duration(-0.2)
    ('0.2 s', '59.9 s', '1:01', '1:01:01', '0.0 s')
    """
    if seconds < 59.95:
        return f"{max(0.0, seconds):.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def size(count: int) -> str:
    """Formats a number of bytes in a few characters.

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
    r"""Replaces each character that is not printable, and truncates the text: the result is one harmless line.

    Args:
        limit: Maximum length of the result, in characters.

    >>> printable("a\x1b[2J\nb"), printable("x" * 100, 10)
    ('a?[2J?b', 'xxxxxxx...')
    """
    replaced = "".join([char if char.isprintable() else "?" for char in text[: limit + 1]])
    return replaced if len(replaced) <= limit else replaced[: limit - 3] + "..."


def _name(text: str) -> str:
    return printable(text, MAX_CELL)


# -- plain text -------------------------------------------------------------------------------------------------------


def plain_lines(shown: Overview) -> Iterable[str]:
    """Renders everything as lines of plain text, as wide as they need to be."""
    yield from (cell.text for cell in (*shown.head, *shown.details))
    for table in (shown.targets, shown.streams):
        if table.rows:
            yield ""
            yield table.title
            yield from _aligned(table)


def _aligned(table: Table) -> Iterable[str]:
    columns = table.columns()
    lines = [[table.headings[n] for n in columns], *([row[n].text for n in columns] for row in table.rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    for line in lines:
        padded = (
            text.rjust(width) if table.headings[n] in NUMBERS else text.ljust(width)
            for text, width, n in zip(line, widths, columns, strict=True)
        )
        yield ("  " + "  ".join(padded)).rstrip()
