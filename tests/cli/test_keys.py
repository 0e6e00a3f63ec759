"""`trigate keys`: the keys of a running gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click.testing
import pytest

from tests.support.processes import Gateway, run_gateway
from trigate.cli.commands import cli

pytestmark = pytest.mark.slow

ADMIN = "the-key-of-the-admin"
CONFIG = f"""
[upstreams.parrot]
kind = "echo"
[admin]
key = "{ADMIN}"
[groups.team]
"""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with an admin."""
    with run_gateway(CONFIG, tmp_path_factory.mktemp("gateway")) as running:
        yield running


def keys(gateway: Gateway, *args: str, key: str | None = ADMIN) -> click.testing.Result:
    """Runs `trigate keys` with the admin's key."""
    runner = click.testing.CliRunner(
        env={"TRIGATE_ADMIN_KEY": key, "TRIGATE_URL": gateway.url, "TRIGATE_API_KEY": None}
    )
    return runner.invoke(cli, ["keys", *args], prog_name="trigate")


def models(gateway: Gateway, secret: str) -> int:
    """The exit code of `trigate models` with a key."""
    return click.testing.CliRunner().invoke(cli, ["models", "--url", gateway.url, "--key", secret]).exit_code


def test_a_key_from_its_making_to_its_end(gateway: Gateway) -> None:
    """The secret is the last line, so that a script can take it."""
    made = keys(
        gateway, "create", "eve", "--model", "parrot/*", "--rpm", "60", "--group", "team", "--metadata", '{"a": 1}'
    )
    assert made.exit_code == 0, made.output
    secret = made.output.splitlines()[-1]
    assert models(gateway, secret) == 0
    shown = json.loads(keys(gateway, "show", "eve", "--json").output)
    assert shown["settings"] == {"models": ["parrot/*"], "rpm": 60, "group": "team", "metadata": {"a": 1}}
    assert "secret" not in shown
    changed = keys(gateway, "update", shown["id"], "--unset", "rpm", "--tag", "a", "--tag", "b")
    assert "rpm" not in changed.output
    assert 'tags: ["a", "b"]' in changed.output
    other = keys(gateway, "rotate", "eve", "--overlap-s", "60").output.splitlines()[-1]
    assert [models(gateway, each) for each in (secret, other)] == [0, 0]
    assert "revoked" in keys(gateway, "revoke", "eve").output
    assert [models(gateway, each) for each in (secret, other)] == [1, 1]
    listed = keys(gateway, "list").output
    assert "eve" in listed
    assert "revoked" in listed
    assert secret not in listed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("show", "nobody"), "404: There is no key 'nobody'."),
        (("create", "x", "--group", "none"), "400: There is no group 'none' in the configuration."),
        (("create", "x", "--expires-at", "soon"), "expires_at: expected a date and time"),
        (("rotate", "x", "--overlap-s", "-1"), "overlap_s must be from 0"),
    ],
)
def test_what_the_gateway_refuses(gateway: Gateway, args: tuple[str, ...], message: str) -> None:
    """Its message is shown, and the exit code is 1."""
    result = keys(gateway, *args)
    assert result.exit_code == 1
    assert message in result.stderr


def test_check(tmp_path: Path) -> None:
    """`trigate check` says that there is an admin, and that keys may be elsewhere."""
    path = tmp_path / "trigate.toml"
    path.write_text(CONFIG, encoding="utf-8")
    runner = click.testing.CliRunner(env={"TRIGATE_CONFIG": str(path), "TRIGATE_API_KEY": None})
    result = runner.invoke(cli, ["check"], prog_name="trigate")
    assert "keys: none in the configuration\nadmin: has a key" in result.output, result.output


def test_without_the_admin_s_key(gateway: Gateway) -> None:
    """The command says what it needs; a wrong key is refused."""
    missing = keys(gateway, "list", key=None)
    assert (missing.exit_code, "TRIGATE_ADMIN_KEY" in missing.stderr) == (1, True)
    assert keys(gateway, "list", key="another").exit_code == 1
    assert keys(gateway, "update", "x").exit_code == 2
