"""The dashboard and the alert rules read what the gateway exports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trigate.errors import GatewayError
from trigate.metrics.families import FAMILIES

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "trigate.json").read_text(encoding="utf-8"))
NAME = re.compile(r"\b(?:trigate|gen_ai|process)_\w+(?=[\[{ )]|$)", re.M)


def exported() -> dict[str, set[str]]:
    """The names of all samples, each with the labels of its family."""
    names = {}
    for family in FAMILIES:
        labels = {*family.labels} | (set() if family.is_shared else {"worker"})
        match family.kind:
            case "counter":
                names[f"{family.name}_total"] = labels
            case "gauge":
                names[family.name] = labels
            case "histogram":
                names |= {f"{family.name}_bucket": labels | {"le"}}
                names |= {f"{family.name}_{part}": labels for part in ("sum", "count")}
    return names


def expressions() -> Iterator[str]:
    """Those of the dashboard's panels."""
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def names_in(expression: str) -> set[str]:
    """The metrics of an expression. What it groups by are labels."""
    return set(NAME.findall(re.sub(r"\b(?:by|without) \([^)]*\)", "", expression)))


def check(expression: str) -> None:
    """Asserts that an expression has metrics and labels that exist."""
    known = exported()
    names = names_in(expression)
    assert names - {"up"} <= set(known), expression
    labels = set().union(*(known.get(name, set()) for name in names)) | {"job", "instance"}
    grouped = {each.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for each in group.split(",")}
    matched = set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression))
    assert grouped | matched <= labels, expression


def test_the_dashboard() -> None:
    """Each expression has only metrics and labels that are exported; the panels do not overlap."""
    found = list(expressions())
    assert len(found) > 30
    for expression in found:
        assert names_in(expression), expression
        check(expression)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in DASHBOARD["panels"]})


def test_the_rules() -> None:
    """So have the alert rules, and the outcomes that they name exist."""
    text = RULES.read_text(encoding="utf-8")
    found = re.findall(r"expr: (?:\|\n((?: {10}.*\n)+)|(.*))", text)
    assert len(found) == text.count("- alert:") > 5
    for block, line in found:
        check(block or line)
    codes = {each.code for each in _subclasses(GatewayError) if "code" in vars(each)}
    named = set(re.findall(r'outcome!~"([^"]+)"', text)[0].split("|"))
    assert named <= codes | {"complete", "cancelled", "finished"}


def _subclasses(cls: Any) -> Iterator[Any]:
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not installed")
def test_promtool() -> None:
    """Prometheus itself takes the configuration with its rules."""
    config = DEPLOY / "prometheus" / "prometheus.yml"
    ran = subprocess.run(["promtool", "check", "config", config], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
