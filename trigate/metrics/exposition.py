"""Writes samples in Prometheus' text format and in OpenMetrics' one. The same samples give the same bytes.

Of the two, only OpenMetrics names units, calls a counter by its name without ``_total``, and has an end.

**Source:** Prometheus, "Exposition formats", 0.0.4; OpenMetrics 1.0.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trigate.metrics.families import FAMILIES, Family, Sample

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def prefers_openmetrics(accept: str) -> bool:
    """Whether an ``Accept`` header takes OpenMetrics rather than plain text.

    >>> prefers_openmetrics("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3")
    True
    >>> prefers_openmetrics("text/plain"), prefers_openmetrics("*/*"), prefers_openmetrics("")
    (False, False, False)
    >>> prefers_openmetrics("application/openmetrics-text;q=0, */*")
    False
    >>> prefers_openmetrics("application/openmetrics-text; version=1.0.0; q=0.3, text/plain; q=0.9")
    False
    """
    weights = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for each in accept.lower().split(","):
        name, *parameters = [part.strip() for part in each.split(";")]
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        if name in weights:
            weights[name] = max(weights[name], _number(weight))
    return weights["application/openmetrics-text"] > 0 and (
        weights["application/openmetrics-text"] >= weights["text/plain"]
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def expose(
    shared: Sequence[Sample],
    workers: Mapping[str, Sequence[Sample]],
    *,
    openmetrics: bool,
    old_names: bool = False,
) -> bytes:
    """Writes the samples of all workers. Samples of a family that this version does not have are left out.

    Args:
        shared: Those that belong to no worker.
        workers: Those of each worker, by its id.
        old_names: Whether families with an older name are written, too.

    >>> from trigate.metrics.families import Sample
    >>> own = [Sample("trigate_exchanges", ('a "b"',), 2), Sample("of another version", (), 1)]
    >>> print(expose([], {"w_1": own}, openmetrics=False).decode(), end="")
    # HELP trigate_exchanges_total Calls that have ended, by outcome.
    # TYPE trigate_exchanges_total counter
    trigate_exchanges_total{outcome="a \\"b\\"",worker="w_1"} 2
    """
    by_family: dict[str, list[tuple[Sample, str]]] = {}
    for sample in shared:
        by_family.setdefault(sample.family, []).append((sample, ""))
    for worker, samples in workers.items():
        for sample in samples:
            by_family.setdefault(sample.family, []).append((sample, worker))
    lines: list[str] = []
    for family in FAMILIES:
        found = by_family.get(family.name, ())
        if found and (old_names or not family.is_old):
            lines += _head(family, openmetrics=openmetrics)
            for sample, worker in found:
                if len(sample.labels) == len(family.labels) and len(sample.counts) in (0, len(family.bounds) + 1):
                    lines += _lines(family, sample, worker)
    if openmetrics:
        lines.append("# EOF")
    return "".join([f"{line}\n" for line in lines]).encode()


def _head(family: Family, *, openmetrics: bool) -> list[str]:
    name = family.name if openmetrics or family.kind != "counter" else f"{family.name}_total"
    unit = [f"# UNIT {name} {family.unit}"] if openmetrics and family.unit else []
    return [f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}", *unit]


def _lines(family: Family, sample: Sample, worker: str) -> list[str]:
    name = family.name
    pairs = [f'{label}="{_escaped(value)}"' for label, value in zip(family.labels, sample.labels, strict=True)]
    if not family.is_shared:
        pairs.append(f'worker="{_escaped(worker)}"')
    labels = ",".join(pairs)
    braces = f"{{{labels}}}" if labels else ""
    if family.kind != "histogram":
        return [f"{name}{'_total' if family.kind == 'counter' else ''}{braces} {_value(sample.value)}"]
    lines, count, before = [], 0, f"{labels}," if labels else ""
    for bound, more in zip([*map(repr, family.bounds), "+Inf"], sample.counts, strict=True):
        count += more
        lines.append(f'{name}_bucket{{{before}le="{bound}"}} {count}')
    return [*lines, f"{name}_count{braces} {count}", f"{name}_sum{braces} {_value(sample.value)}"]


def _value(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _escaped(value: str) -> str:
    r"""A label's value between its quotes.

    >>> _escaped('a"b\\c\nd')
    'a\\"b\\\\c\\nd'
    """
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
