"""What is exposed, as the parsers of Prometheus' own client library read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from trigate.metrics.exposition import expose
from trigate.metrics.families import FAMILIES, Sample
from trigate.metrics.histogram import Histogram


def parsed(body: bytes, *, openmetrics: bool) -> Mapping[str, Any]:  # Any: the library has no types for it
    """The families of an exposition by their names, as the library's parser reads it."""
    module: Any = openmetrics_parser if openmetrics else parser
    families = list(module.text_string_to_metric_families(body.decode()))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def one_of_each() -> list[Sample]:
    """A sample of every family."""
    return [
        Sample(family.name, tuple("v" for _ in family.labels), 1.5, (1,) * (len(family.bounds) + 1))
        if family.kind == "histogram"
        else Sample(family.name, tuple("v" for _ in family.labels), 3)
        for family in FAMILIES
    ]


@pytest.mark.parametrize("openmetrics", [False, True])
def test_every_family(openmetrics: bool) -> None:
    """Both parsers read every family, with its kind and its labels."""
    samples = one_of_each()
    shared = [sample for sample, family in zip(samples, FAMILIES, strict=True) if family.is_shared]
    own = [sample for sample, family in zip(samples, FAMILIES, strict=True) if not family.is_shared]
    body = expose(shared, {"w_1": own, "w_2": own}, openmetrics=openmetrics, old_names=True)
    found = parsed(body, openmetrics=openmetrics)
    assert list(found) == [family.name for family in FAMILIES]
    assert body.endswith(b"# EOF\n") is openmetrics
    for family in FAMILIES:
        read = found[family.name]
        assert (read.type, read.documentation) == (family.kind, family.help)
        if openmetrics:
            assert read.unit == family.unit
        labels = {*family.labels} | (set() if family.is_shared else {"worker"})
        assert all(set(sample.labels) - {"le"} == labels for sample in read.samples), family.name
        if family.kind == "histogram":
            buckets = [each for each in read.samples if each.labels.get("worker") == "w_1" and "le" in each.labels]
            assert [float(each.labels["le"]) for each in buckets] == [*family.bounds, float("inf")]
            assert [each.value for each in buckets] == [*range(1, len(buckets) + 1)]


def test_old_names_are_asked_for() -> None:
    """The names that the conventions have replaced are not there by default."""
    found = parsed(expose([], {"w_1": one_of_each()}, openmetrics=False), openmetrics=False)
    assert set(found) == {family.name for family in FAMILIES if not family.is_old}
    assert any(family.is_old for family in FAMILIES)


@pytest.mark.parametrize("openmetrics", [False, True])
@pytest.mark.parametrize("value", ['a"b', "a\\b", "a\nb", "é", "\\n", ""])
def test_values_of_labels(value: str, openmetrics: bool) -> None:
    """A name of the configuration may have any character."""
    body = expose([], {"w_1": [Sample("trigate_upstream_up", (value,), 1)]}, openmetrics=openmetrics)
    [sample] = parsed(body, openmetrics=openmetrics)["trigate_upstream_up"].samples
    assert sample.labels == {"upstream": value, "worker": "w_1"}


def test_a_worker_of_another_version() -> None:
    """Samples with other labels or buckets than this version's are left out."""
    samples = [
        Sample("trigate_upstream_up", (), 1),
        Sample("trigate_cancel_latency_seconds", (), 1.0, (1, 2)),
        Sample("trigate_new", (), 1),
        Sample("trigate_draining", (), 0),
    ]
    body = expose([], {"w_1": samples}, openmetrics=True)
    assert [family.name for family in parsed(body, openmetrics=True).values() if family.samples] == ["trigate_draining"]


def test_bounds_are_inclusive() -> None:
    """A value at a bound is in that bucket, as Prometheus defines it."""
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    assert (histogram.counts, histogram.total) == ([2, 2, 1], 7.0)
