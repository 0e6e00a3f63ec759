"""The merge of the parts of all workers into the body of ``GET /status``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import msgspec
import pytest

from trigate.channels.service import ChannelStatistics
from trigate.exchange.admission import AdmissionStatistics
from trigate.ledger.ledger import LedgerStatistics
from trigate.status.merge import UNKNOWN_COUNTS, Report, StoreCounts, h_mm_ss, merge
from trigate.status.schema import OldestStream, Status, StoreStatus, TargetStatus, Totals
from trigate.status.snapshot import InFlight, Part, decode, encode
from trigate.store.records import ChannelRecord
from trigate.upstream.upstream import UpstreamStatistics

REASONS = {"down": "it is", "disabled": "it is"}
UPSTREAM = UpstreamStatistics(
    name="u",
    kind="openai",
    state="up",
    reason=None,
    in_flight=1,
    queued=2,
    max_connections=3,
    models=4,
    last_error=None,
    last_error_at=None,
)
LEDGER = LedgerStatistics(state="ok", begun=3, settled=2, lost=1, dropped=0)
PART = Part(
    version="1",
    uptime_s=5.0,
    draining=False,
    config="test",
    reload_error=None,
    in_flight=InFlight(by_phase={"queued": 1, "streaming": 2}, by_upstream={"u": 2}, oldest=()),
    upstreams=(),
    channels=(),
    totals=Totals(exchanges=4, complete=2, cancelled=1, failed=1, events=9),
    admission=AdmissionStatistics(in_flight=2, limit=10, queued=1, refused=3, is_late=False, lag_s=0.1),
    targets=(),
    ledger=LEDGER,
)
STORE = StoreStatus(kind="memory", path=":memory:", state="open")


def merged(parts: Sequence[Part], counts: StoreCounts = StoreCounts()) -> Status:  # noqa: B008 - it is frozen
    """The status of workers with these parts: ``w_0`` is the oldest and answers, the others reported 2 s ago."""
    reports = [
        Report(
            worker=f"w_{number}", pid=100 + number, started_at=50.0 + number, part=part, age_s=2.0 if number else 0.0
        )
        for number, part in enumerate(parts)
    ]
    return merge(reports, counts, STORE)


def changed(**fields: Any) -> Part:
    """The part, with other fields."""
    return msgspec.structs.replace(PART, **fields)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.99, "0:00:59"),
        (60, "0:01:00"),
        (3_599, "0:59:59"),
        (86_400, "24:00:00"),
        (1e7, "2777:46:40"),
    ],
)
def test_h_mm_ss(seconds: float, text: str) -> None:
    """A duration has whole seconds, rounded down; the hours go on beyond a day."""
    assert h_mm_ss(seconds) == text


def test_a_part_survives_its_journey() -> None:
    """A part is the same after a heartbeat has carried it."""
    part = changed(
        upstreams=(UPSTREAM,),
        channels=(ChannelStatistics(name="c", type="telegram", state="connected", since=1.5),),
        targets=(TargetStatus(target="u/m", breaker="open", opens_in_s=1.5, worker="w_0"),),
    )
    assert decode(encode(part)) == part


def test_counters_are_summed() -> None:
    """Totals, exchanges in flight, admission and ledger are sums; the lag is that of the worst worker."""
    late = attrs.evolve(PART.admission, is_late=True, lag_s=0.7)
    status = merged([PART, changed(admission=late), changed(admission=late)])
    assert status.totals == Totals(exchanges=12, complete=6, cancelled=3, failed=3, events=27)
    assert (status.streams.live, status.streams.by_phase) == (9, {"queued": 3, "streaming": 6})
    assert status.streams.by_upstream == {"u": 6}
    admission = status.admission
    assert admission is not None
    assert (admission.in_flight, admission.limit, admission.queued, admission.refused) == (6, 30, 3, 9)
    assert (admission.late_workers, admission.lag_s) == (2, 0.7)
    assert status.ledger is not None
    assert (status.ledger.begun, status.ledger.settled, status.ledger.lost) == (9, 6, 3)


def test_workers() -> None:
    """The oldest worker is first; ages grow by the age of the report."""
    status = merged([PART, changed(uptime_s=9.0, draining=True)])
    first, second = status.workers
    assert (first.id, first.pid, first.status, first.uptime_s, first.report_age_s) == ("w_0", 100, "ok", 5.0, 0.0)
    assert (second.id, second.status, second.uptime_s, second.report_age_s) == ("w_1", "draining", 11.0, 2.0)
    assert (status.uptime_s, status.uptime) == (11.0, "0:00:11")
    assert (first.live, second.live) == (3, 3)


@pytest.mark.parametrize(("draining", "status"), [((False, True), "ok"), ((True, True), "draining")])
def test_a_gateway_drains_when_all_its_workers_do(draining: tuple[bool, ...], status: str) -> None:
    """One worker that drains, in a rolling restart, does not make the gateway drain."""
    assert merged([changed(draining=each) for each in draining]).status == status


def test_the_oldest_streams() -> None:
    """The oldest hundred of all workers are listed, by their age now."""

    def part(worker: str, *ages: float) -> Part:
        rows = tuple(
            OldestStream(id=f"{worker}-{age:g}", model="m", phase="queued", age_s=age, worker=worker) for age in ages
        )
        return changed(in_flight=InFlight(by_phase={}, by_upstream={}, oldest=rows))

    rows = merged([part("w_0", 9.0, 3.0), part("w_1", 8.0, 1.5)]).streams.oldest
    assert [(row.id, row.age_s, row.worker) for row in rows] == [
        ("w_1-8", 10.0, "w_1"),
        ("w_0-9", 9.0, "w_0"),
        ("w_1-1.5", 3.5, "w_1"),
        ("w_0-3", 3.0, "w_0"),
    ]
    many = [float(age) for age in range(100, 0, -1)]
    assert len(merged([part("w_0", *many), part("w_1", *many)]).streams.oldest) == 100


def test_the_first_reload_error_is_shown() -> None:
    """A reload that one worker refused is not hidden by another that accepted it."""
    assert merged([PART, changed(reload_error="no")]).reload_error == "no"
    assert merged([PART, PART]).reload_error is None


@pytest.mark.parametrize(
    ("states", "worst"),
    [(("ok", "degraded"), "degraded"), (("off", "ok"), "ok"), (("off", "off"), "off")],
)
def test_the_worst_state_of_the_ledger(states: Any, worst: str) -> None:
    """A journal that one worker cannot write is a problem of the gateway."""
    ledger = merged([changed(ledger=attrs.evolve(LEDGER, state=state)) for state in states]).ledger
    assert ledger is not None
    assert ledger.state == worst


def test_counts_that_are_unknown() -> None:
    """If the store could not be asked, counts are null, which is not zero."""
    hook = ChannelStatistics(name="ci", type="webhook", state="connected", since=1.0)
    for counts, received in ((UNKNOWN_COUNTS, None), (StoreCounts(), 0)):
        status = merged([changed(channels=(hook,))], counts)
        assert (status.sessions is None) == (status.outbox is None) == (received is None)
        [channel] = status.channels
        assert (channel.received, channel.replied, channel.queued) == (received, received, received)


@pytest.mark.parametrize(
    ("states", "found"),
    [
        (("up", "down"), ("up", None)),
        (("down", "unknown"), ("down", "it is")),
        (("unknown", "unknown"), ("unknown", None)),
        (("disabled", "disabled"), ("disabled", "it is")),
    ],
)
def test_an_upstream_as_several_workers_see_it(states: tuple[str, ...], found: tuple[str, str | None]) -> None:
    """A worker that knows the state overrules one that does not; an upstream that serves one worker is up."""
    parts = [changed(upstreams=(attrs.evolve(UPSTREAM, state=state, reason=REASONS.get(state)),)) for state in states]
    [upstream] = merged(parts).upstreams
    assert (upstream.state, upstream.reason) == found
    assert (upstream.in_flight, upstream.queued, upstream.max_connections, upstream.models) == (2, 4, 6, 4)


@pytest.mark.parametrize(
    ("states", "holder", "found"),
    [
        ((("connected", 5.0, None), ("connected", 3.0, None)), None, ("connected", 3, None)),
        ((("connected", 5.0, None), ("disconnected", 6.0, "x")), None, ("disconnected", 6, "x")),
        ((("connected", 7.0, None), ("disconnected", 6.0, "x")), None, ("connected", 7, None)),
        ((("connecting", 9.0, None), ("disconnected", 6.0, "x")), "w_1", ("disconnected", 6, "x")),
        ((("connecting", 9.0, None), ("disconnected", 6.0, "x")), "w_dead", ("connecting", 9, None)),
    ],
    ids=["agreed", "latest change", "earlier change", "held", "held by a dead worker"],
)
def test_a_channel_as_several_workers_see_it(states: Any, holder: str | None, found: Any) -> None:
    """The worker that reads the platform decides; without one, the latest change does."""
    parts = [
        changed(channels=(ChannelStatistics(name="c", type="telegram", state=state, since=since, last_error=error),))
        for state, since, error in states
    ]
    [channel] = merged(parts, StoreCounts(records={"c": ChannelRecord(name="c", holder=holder)})).channels
    state, since_s, error = found
    assert (channel.status, channel.since, channel.last_error) == (state, f"1970-01-01T00:00:0{since_s}+00:00", error)
