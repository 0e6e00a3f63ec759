"""`trigate init`, `trigate schema` and `trigate completion`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import click.testing
import pytest
import trio

from tests.support.processes import environment
from trigate.cli.commands import cli
from trigate.cli.init import SCHEMA_FILE, configuration_lines
from trigate.config import json_schema, load
from trigate.config.secrets import Secret
from trigate.config.sections import Config, Size, UpstreamConfig, Url
from trigate.upstream import discovery

Run = Callable[..., click.testing.Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty directory, on a machine without model servers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(discovery, "LOCAL_SERVERS", {})
    clean = dict.fromkeys(set(os.environ) - set(environment()))

    def run(*args: str, **env: str) -> click.testing.Result:
        return click.testing.CliRunner(env={**clean, **env}).invoke(cli, args, prog_name="trigate")

    return run


def _found(env: dict[str, str]) -> Config:
    async def discover() -> Config:
        import httpx2

        async with httpx2.AsyncHTTPTransport(verify=False, trust_env=False) as transport:
            return await discovery.discover(env, transport=transport, servers={})

    return trio.run(discover)


def test_init(run: Run, tmp_path: Path) -> None:
    """The file is valid, has the upstreams that discovery finds, and no key; its schema is beside it."""
    env = {"OPENAI_API_KEY": "sk-secret-value", "ANTHROPIC_API_KEY": "sk-ant-secret-value"}
    result = run("init", **env)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "trigate.toml").read_text()
    assert text.startswith(f"#:schema ./{SCHEMA_FILE}\n")
    assert "secret-value" not in text
    read = load.read(tmp_path / "trigate.toml", env=env)
    assert read.upstreams == _found(env).upstreams
    assert json.loads((tmp_path / SCHEMA_FILE).read_text()) == json_schema.schema()


def test_init_replaces_no_file(run: Run, tmp_path: Path) -> None:
    """A file that is there stays as it is, unless --force is given; --output names another one."""
    (tmp_path / "trigate.toml").write_text("mine")
    result = run("init")
    assert (result.exit_code, result.stderr) == (1, "trigate: trigate.toml exists; --force replaces it.\n")
    assert (tmp_path / "trigate.toml").read_text() == "mine"
    assert run("init", "--output", "other.toml").exit_code == 0
    assert run("init", "--force").exit_code == 0
    assert (tmp_path / "trigate.toml").read_text() == (tmp_path / "other.toml").read_text()


def test_every_setting_is_written(tmp_path: Path) -> None:
    """A configuration of any upstream reads back as it was."""
    upstream = UpstreamConfig(
        kind="azure",
        base_url=Url("https://a.example"),
        api_key=Secret(file="/a/b"),
        headers={"x-a.b": Secret(env="A")},
        models=("a", 'b"c'),
        rename={"a": "b"},
        http2=True,
        max_connections=Size(5),  # type: ignore[arg-type]
    )
    path = tmp_path / "a.toml"
    config = Config(upstreams={"odd.name": upstream})
    path.write_text("\n".join(configuration_lines(config)), encoding="utf-8")
    assert load.read(path, env={}).upstreams == config.upstreams


def test_schema(run: Run) -> None:
    """The output is the schema."""
    result = run("schema")
    assert (result.exit_code, json.loads(result.stdout)) == (0, json_schema.schema())


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion(run: Run, shell: str) -> None:
    """The output is a script for the shell, which asks trigate itself what comes next."""
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_TRIGATE_COMPLETE" in result.stdout


def test_completion_completes(run: Run) -> None:
    """Commands are completed by what they are."""
    result = run(_TRIGATE_COMPLETE="zsh_complete", COMP_WORDS="trigate do", COMP_CWORD="1")
    assert "doctor" in result.stdout
