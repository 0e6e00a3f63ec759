"""`trigate doctor`: each check, by a fault that it finds."""

from __future__ import annotations

import datetime
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import click.testing
import pytest
import trustme

from tests.support.processes import environment
from trigate.cli import doctor
from trigate.cli.commands import cli

Run = Callable[..., click.testing.Result]
ECHO = '[upstreams.parrot]\nkind = "echo"\n'


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command on a configuration."""
    monkeypatch.chdir(tmp_path)
    clean = dict.fromkeys(set(os.environ) - set(environment()))

    def run(text: str, *args: str, **env: str) -> click.testing.Result:
        (tmp_path / "trigate.toml").write_text(text, encoding="utf-8")
        return click.testing.CliRunner(env={**clean, **env}).invoke(cli, ["doctor", *args], prog_name="trigate")

    return run


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_all_is_well(run: Run) -> None:
    """Every sentence is an ok, and the exit code 0."""
    result = run(f"{ECHO}[server]\nport = 0\n", "--offline")
    assert result.exit_code == 0, result.output
    assert {line.partition(":")[0] for line in result.stdout.splitlines()} == {"ok"}


def test_an_invalid_configuration(run: Run) -> None:
    """Its problems are listed as `trigate check` lists them."""
    result = run("[server]\nport = 'x'\n")
    assert result.exit_code == 1
    assert "trigate.toml:2:1: server.port: expected an integer" in result.stderr


def test_keys(run: Run) -> None:
    """A short key, an open gateway and a missing secret are found."""
    assert "warning:  The key a has fewer than 16" in run(f"{ECHO}[keys]\na = 'short'\n", "--offline").stdout
    opened = run(f"{ECHO}[server]\nhost = '0.0.0.0'\nport = 0\n", "--offline")
    assert opened.exit_code == 1
    assert "problem:  `trigate serve` is refusing to listen on 0.0.0.0 without a key" in opened.stdout
    missing = run(f"{ECHO}[upstreams.b]\nbase_url = 'http://b.example'\napi_key = {{env = 'NOT_SET'}}\n", "--offline")
    assert "warning:  b is disabled: api_key: the environment variable NOT_SET is not set." in missing.stdout


def test_a_port_in_use(run: Run) -> None:
    """Another program on the port is a problem."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and refuses connections
        port = taken.getsockname()[1]
        found = run(f"{ECHO}[server]\nport = {port}\n", "--offline")
    assert found.exit_code == 1
    assert f"problem:  127.0.0.1:{port} " in found.stdout


def test_the_limit_of_open_files(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few descriptors for the exchanges that are allowed is a warning."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 256))
    found = run(f"{ECHO}[server]\nport = 0\n", "--offline")
    assert "warning:  The limit of open files (ulimit -n) leaves room for 96 streams" in found.stdout


def test_the_store(run: Run, tmp_path: Path) -> None:
    """A directory in the place of the file cannot be written."""
    found = run(f"{ECHO}[server]\nport = 0\n[store]\npath = '{tmp_path}'\n", "--offline")
    assert f"problem:  The store {tmp_path} cannot be written." in found.stdout
    well = run(f"{ECHO}[server]\nport = 0\n[store]\npath = '{tmp_path}/a/b.db'\n", "--offline")
    assert f"ok:       The store {tmp_path}/a/b.db can be written, and is not there yet." in well.stdout
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("days", "level"), [(90, "ok"), (3, "warning"), (-1, "problem")])
def test_a_certificate(tmp_path: Path, days: int, level: str) -> None:
    """How long it is valid is found, also after its end."""
    certificate = trustme.CA().issue_cert(
        "gateway.example",
        not_before=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
        not_after=datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days),
    )
    for name, blob in (("cert.pem", certificate.cert_chain_pems[0]), ("key.pem", certificate.private_key_pem)):
        blob.write_to_path(str(tmp_path / name))
    left = doctor.certificate_days(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    assert (left < 0) == (level == "problem")
    assert (left > doctor.CERTIFICATE_DAYS) == (level == "ok")


@pytest.mark.slow
def test_the_upstreams_are_called(run: Run) -> None:
    """Each with one tiny call: one that answers, and one that does not."""
    port = _free_port()
    found = run(
        f"{ECHO}[server]\nport = 0\n[upstreams.dead]\nbase_url = 'http://127.0.0.1:{port}/v1'\nmodels = ['m']\n"
    )
    assert found.exit_code == 1
    assert "ok:       parrot answered in " in found.stdout
    assert "problem:  dead failed (502, m): The upstream dead cannot be reached" in found.stdout


@pytest.mark.slow
def test_a_gateway_that_runs_already(run: Run, tmp_path: Path) -> None:
    """Its port is not a problem: `trigate serve` would take over."""
    from tests.support.processes import run_gateway

    directory = tmp_path / "other"
    directory.mkdir()
    with run_gateway(ECHO, directory) as gateway:
        port = int(gateway.url.rpartition(":")[2])
        found = run(f"{ECHO}[server]\nport = {port}\n", "--offline")
    assert f"ok:       A gateway already serves 127.0.0.1:{port}" in found.stdout
