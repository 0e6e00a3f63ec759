"""`trigate usage` and `trigate exchanges`, against a gateway in a process of its own."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import click.testing
import httpx2
import pytest

from tests.support.processes import Gateway, environment, run_gateway
from trigate.cli.commands import cli

CONFIG = """
[server]
port = 0
[upstreams.parrot]
kind = "echo"
[keys]
ada = "key-of-ada"
ben = "key-of-ben"
[admin]
key = "key-of-the-admin"
"""
Ask = Callable[..., click.testing.Result]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that has been called by two keys."""
    with run_gateway(CONFIG, tmp_path_factory.mktemp("gateway")) as running:
        for name, model in (("ada", "parrot/echo"), ("ada", "no-such-model"), ("ben", "parrot/echo")):
            httpx2.post(
                f"{running.url}/v1/chat/completions",
                json={"model": model, "messages": [{"role": "user", "content": "one two"}]},
                headers={"authorization": f"Bearer key-of-{name}", "x-request-id": f"of-{name}"},
            )
        yield running


@pytest.fixture
def ask(gateway: Gateway) -> Ask:
    """Runs a command with the address of the gateway and the admin's key."""
    clean = dict.fromkeys(set(os.environ) - set(environment()))  # None = unset

    def ask(*args: str, **env: str) -> click.testing.Result:
        given = {"TRIGATE_URL": gateway.url, **(env or {"TRIGATE_ADMIN_KEY": "key-of-the-admin"})}
        return click.testing.CliRunner(env={**clean, **given}).invoke(cli, args, prog_name="trigate")

    return ask


@pytest.mark.slow
def test_usage(ask: Ask) -> None:
    """A row for each group, and the total; a key sees its own."""
    lines = ask("usage", "--by", "key", "--last", "1h").output.splitlines()
    assert lines[0].split()[:3] == ["key", "calls", "failed"]
    assert [line.split()[:3] for line in lines[1:4]] == [["ada", "2", "1"], ["ben", "1", "0"], ["total", "3", "1"]]
    own = ask("usage", "--by", "", TRIGATE_API_KEY="key-of-ada").output.splitlines()
    assert own[1].split()[:2] == ["2", "1"]
    assert ask("usage", "--key", "ben", TRIGATE_API_KEY="key-of-ada").exit_code == 1


def test_usage_for_programs(ask: Ask) -> None:
    """As the gateway's JSON, and as CSV."""
    body = json.loads(ask("usage", "--json", "--by", "model", "--key", "ben").output)
    assert [(row["model"], row["calls"]) for row in body["data"]] == [("parrot/echo", 1)]
    rows = list(csv.DictReader(io.StringIO(ask("usage", "--csv", "--by", "key,day").output)))
    assert [(row["key"], row["calls"]) for row in rows] == [("ada", "2"), ("ben", "1")]


@pytest.mark.slow
def test_exchanges(ask: Ask) -> None:
    """By key and by outcome; one in detail, by the id of its request."""
    lines = ask("exchanges", "--last", "1h", "--key", "ada", "--failed").output.splitlines()
    assert len(lines) == 2
    assert {"of-ada", "ada", "no-such-model", "model_not_found", "404"} <= set(lines[1].split())
    detail = ask("exchanges", "of-ben").output
    assert "outcome: complete" in detail
    assert "attempt 1: target parrot/echo" in detail
    listed: list[dict[str, Any]] = json.loads(ask("exchanges", "--json", "--limit", "2").output)["data"]
    assert [each["request_id"] for each in listed] == ["of-ben", "of-ada"]
    assert "There are more than 2" in ask("exchanges", "--limit", "2").output
    unknown = ask("exchanges", "of-nobody")
    assert (unknown.exit_code, "no exchange" in unknown.output) == (1, True)


@pytest.mark.parametrize(
    "args",
    [("usage", "--last", "soon"), ("usage", "--csv", "--json"), ("exchanges", "--last", "1h", "--from", "2026-01-01")],
)
def test_invalid_options(ask: Ask, args: tuple[str, ...]) -> None:
    """Exit code 2."""
    assert ask(*args).exit_code == 2
