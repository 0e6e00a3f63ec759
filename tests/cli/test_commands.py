"""The command line: the output and the exit code of each command."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click.testing
import pytest

import trigate
from tests.support.processes import SERVE, Gateway, configuration, environment, run_gateway
from tests.support.scripted_upstream import TEXT, seen, wait_closed
from trigate.cli import serve
from trigate.cli.commands import cli
from trigate.cli.configuration import gateway_url

KEY = "key-of-the-gateway"
TRIGATE = (sys.executable, "-m", "trigate")

Run = Callable[..., click.testing.Result]

GOOD = """
[server]
port = 0
[upstreams.mock]
base_url = "http://mock.invalid/v1"
api_key = "key-of-the-provider"
models = ["a", "b/c"]
[upstreams.asked]
base_url = "http://asked.invalid/v1"
[upstreams.off]
base_url = "http://off.invalid/v1"
api_key = {env = "NOT_SET"}
[upstreams.parrot]
kind = "echo"
[models.fast]
targets = ["mock/a", "asked/x"]
"""
PARROT = '[upstreams.parrot]\nkind = "echo"\n'


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process: in an empty directory, without the user's keys and settings."""
    monkeypatch.chdir(tmp_path)
    clean = dict.fromkeys(set(os.environ) - set(environment()))  # None = unset

    def run(*args: str, stdin: str | None = None, **env: str) -> click.testing.Result:
        runner = click.testing.CliRunner(env={**clean, **env})
        return runner.invoke(cli, args, input=stdin, prog_name="trigate")

    return run


def _file(directory: Path, text: str) -> str:
    path = directory / "given.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def _assert_failed(result: click.testing.Result, *messages: str) -> None:
    # The user would see a traceback of any exception other than SystemExit.
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1, result.output
    for message in messages:
        assert message in result.stderr


# -- help -------------------------------------------------------------------------------------------------------------


def test_help(run: Run) -> None:
    """The help lists every command, and each command has a help of its own."""
    result = run("--help")
    assert result.exit_code == 0
    for command in ("serve", "check", "models", "status", "chat"):
        assert f"\n  {command} " in result.stdout
        own = run(command, "-h")
        assert (own.exit_code, own.stderr) == (0, "")
        assert own.stdout.startswith(f"Usage: trigate {command}")


def test_version(run: Run) -> None:
    """The output has the name and the version of the package."""
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"trigate, version {trigate.__version__}\n")


@pytest.mark.parametrize(
    "args",
    [
        ("nonsense",),
        ("serve", "--port", "65536"),
        ("serve", "--port", "x"),
        ("serve", "--workers", "0"),
        ("chat",),
        ("status", "--watch", "--json"),
        ("status", "--watch", "--cancel", "x"),
        ("status", "--interval", "0"),
        ("status", "--interval", "nan"),
    ],
)
def test_a_wrong_command_line(run: Run, args: tuple[str, ...]) -> None:
    """The exit code is 2, and standard error has the usage."""
    result = run(*args)
    assert result.exit_code == 2
    assert "Usage: trigate" in result.stderr


# -- check ------------------------------------------------------------------------------------------------------------


def test_check_prints_what_the_file_makes(run: Run, tmp_path: Path) -> None:
    """The output has the store, upstreams, models and routes, and why one is disabled, and no secret."""
    path = _file(tmp_path, GOOD)
    result = run("check", "--config", path)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"{path}: ok",
        "listens on 127.0.0.1:0, 1 worker(s)",
        "keys: none (this machine only)",
        "store: in memory",
        "upstreams:",
        "  mock: openai http://mock.invalid/v1",
        "    mock/a",
        "    mock/b/c",
        "  asked: openai http://asked.invalid/v1",
        "    asked/… (asked for its models while serving)",
        "  off: openai http://off.invalid/v1 -- disabled: api_key: the environment variable NOT_SET is not set",
        "    off/… (asked for its models while serving)",
        "  parrot: echo",
        "    parrot/echo",
        "routes:",
        "  fast -> mock/a, then asked/x",
        "  default -> the first upstream that can serve",
    ]


def test_check_names_hooks_and_channels(run: Run, tmp_path: Path) -> None:
    """Hooks have their verification; disabled ones have the reason."""
    more = '[hooks.ci]\n[hooks.old]\nenabled = false\n[channels.bot]\ntype = "telegram"\ntoken = {env = "NOT_SET"}\n'
    result = run("check", "--config", _file(tmp_path, PARROT + more))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-3:] == [
        "hook /hooks/ci: default, verified by key",
        "hook /hooks/old: default, verified by key -- disabled: switched off in the configuration",
        "channel bot: telegram, default -- disabled: token: the environment variable NOT_SET is not set",
    ]


def test_check_finds_the_file(run: Run, tmp_path: Path) -> None:
    """``--config`` overrides ``$TRIGATE_CONFIG``, and that overrides ``./trigate.toml``."""
    (tmp_path / "trigate.toml").write_text(PARROT)
    (tmp_path / "other.toml").write_text(PARROT)
    assert run("check").stdout.startswith("trigate.toml: ok\n")
    assert run("check", TRIGATE_CONFIG="other.toml").stdout.startswith("other.toml: ok\n")
    given = _file(tmp_path, PARROT)
    assert run("check", "--config", given, TRIGATE_CONFIG="other.toml").stdout.startswith(f"{given}: ok\n")


@pytest.mark.parametrize("command", ["check", "serve"])
def test_config_leaves_the_environment_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """``--config`` is passed to the gateway, and not set as a variable of the process."""
    monkeypatch.delenv("TRIGATE_CONFIG", raising=False)
    run(command, "--config", _file(tmp_path, f'{PARROT}[server]\nport = 0\nhost = "192.0.2.1"\n'))
    assert "TRIGATE_CONFIG" not in os.environ


def test_check_names_every_problem(run: Run, tmp_path: Path) -> None:
    """Standard error has one line for each problem, with file, line and path; standard output has nothing."""
    path = _file(tmp_path, '[server]\nport = "x"\nspeed = 1\n[upstreams.a]\n[models.m]\ntargets = ["nobody/x"]\n')
    result = run("check", "--config", path)
    _assert_failed(result, "server.port: ", "upstreams.a.base_url: ", "models.m.targets.0: ", "unknown key speed")
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 4
    assert all(re.match(rf"trigate: {re.escape(path)}:\d+:\d+: ", line) for line in lines)


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_file_that_is_not_there(run: Run, tmp_path: Path, command: str) -> None:
    """The error names the missing file; no other configuration is used instead."""
    result = run(command, "--config", str(tmp_path / "missing.toml"))
    _assert_failed(result, "missing.toml: cannot be read: No such file or directory")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["check", "serve"])
@pytest.mark.parametrize("content", ["", "# nothing yet\n", "[server]\nport = 0\n"])
def test_a_file_without_an_upstream(run: Run, tmp_path: Path, command: str, content: str) -> None:
    """Such a gateway could serve nothing: both commands refuse the file and say what to write."""
    result = run(command, "--config", _file(tmp_path, content))
    _assert_failed(result, "upstreams: there are none. Add [upstreams.NAME]")
    assert result.stdout == ""


def test_authorities_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    """Where an upstream has TLS, `serve` would not start. `check` names the variable, and does not say "ok" before."""
    path = _file(tmp_path, '[server]\nport = 0\n[upstreams.a]\nbase_url = "https://a.invalid/v1"\nmodels = ["m"]\n')
    result = run("check", "--config", path, SSL_CERT_FILE=str(tmp_path / "none.pem"))
    _assert_failed(result, "SSL_CERT_FILE", "cannot be used")
    assert result.stdout == ""


@pytest.mark.slow  # local model servers get 0.3 s to answer
def test_check_without_a_file(run: Run) -> None:
    """Discovery finds a provider by its key, which is not printed, and always the echo."""
    result = run("check", OPENAI_API_KEY="sk-not-to-be-printed")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("discovery: ok\n")
    assert "  openai: openai https://api.openai.com/v1\n" in result.stdout
    assert "    trigate/echo\n" in result.stdout
    assert "sk-not" not in result.output


# -- listening without a key ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_an_open_gateway_is_refused(run: Run, tmp_path: Path, host: str) -> None:
    """`check` and `serve` refuse it before anything listens, and say what would help."""
    path = _file(tmp_path, f'{PARROT}[server]\nport = 0\nhost = "{host}"\n')
    for command in ("check", "serve"):
        result = run(command, "--config", path)
        _assert_failed(result, f"refusing to listen on {host} without a key", "TRIGATE_API_KEY", "--insecure")
        assert result.stdout == ""
    _assert_failed(run("serve", "--config", _file(tmp_path, PARROT), "--host", host), f"refusing to listen on {host}")


@pytest.mark.parametrize(
    ("more", "env"),
    [
        ("", {"TRIGATE_API_KEY": KEY}),
        (f'[keys]\nalice = "{KEY}"\n', {}),
        ("insecure = true\n", {}),
    ],
    ids=["environment", "file", "insecure"],
)
def test_an_address_with_a_key(run: Run, tmp_path: Path, more: str, env: dict[str, str]) -> None:
    """A key from the environment or the file, or ``insecure``, permits the address; keys are listed by name."""
    result = run("check", "--config", _file(tmp_path, f'{PARROT}[server]\nhost = "0.0.0.0"\n{more}'), **env)
    assert result.exit_code == 0, result.output
    assert KEY not in result.output


def test_insecure_on_the_command_line(run: Run, tmp_path: Path) -> None:
    """``--insecure`` permits the address; the command then fails because no machine has it."""
    result = run("serve", "--config", _file(tmp_path, PARROT), "--host", "192.0.2.1", "--port", "0", "--insecure")
    _assert_failed(result, "192.0.2.1:0 cannot be listened on")


# -- serve ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--certfile", "--keyfile"])
def test_a_certificate_without_its_key(run: Run, tmp_path: Path, option: str) -> None:
    """A chain without a key, or a key without a chain, is an invalid command line."""
    result = run("serve", option, _file(tmp_path, PARROT))
    assert result.exit_code == 2
    assert "--certfile and --keyfile must be given together." in result.stderr


@pytest.mark.parametrize(
    ("limits", "most", "raised"),
    [
        ((1024, 524288), 524288, 524288),
        ((4096, 4096), 4096, None),
        ((256, resource.RLIM_INFINITY), 10240, 10240),  # macOS
        ((256, resource.RLIM_INFINITY), 100_000, 2**16),
        ((20_000, resource.RLIM_INFINITY), 20_000, None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 10240, None),
    ],
)
def test_the_limit_of_open_files(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], most: int, raised: int | None
) -> None:
    """The soft limit is raised to the hard one, or as far as the system grants it, and is never lowered."""
    done: list[tuple[int, int]] = []

    def setrlimit(_: int, wanted: tuple[int, int]) -> None:
        if wanted[0] == resource.RLIM_INFINITY or wanted[0] > most:
            raise ValueError("current limit exceeds maximum limit")
        done.append(wanted)

    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    serve._raise_file_limit()
    assert done == ([] if raised is None else [(raised, limits[1])])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_in_use(run: Run, tmp_path: Path, workers: str) -> None:
    """The error names the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("serve", "--config", _file(tmp_path, PARROT), "--port", port, "--workers", workers)
    _assert_failed(result, f"127.0.0.1:{port} is in use")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", [("check",), ("serve",), ("serve", "--workers", "2")], ids=" ".join)
def test_a_certificate_that_cannot_be_used(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    """It is loaded once, before anything starts, and the error names it."""
    files = f'[server]\ncertfile = "{tmp_path}/no.pem"\nkeyfile = "{tmp_path}/no.pem"\nport = 0\n'
    result = run(*command, "--config", _file(tmp_path, files + PARROT))
    _assert_failed(result, f"TLS: {tmp_path}/no.pem and {tmp_path}/no.pem cannot be used: No such file")


@pytest.mark.slow
def test_workers_that_cannot_start(tmp_path: Path) -> None:
    """The last line says how the workers exited."""
    config = _file(tmp_path, '[upstreams.far]\nbase_url = "https://far.invalid/v1"\n')
    command = [*SERVE, "--workers", "2", "--config", config]
    env = environment(SSL_CERT_FILE=str(tmp_path / "none.pem"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60)
    assert done.returncode == 1
    assert "cannot be used: No such file" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("trigate: no worker keeps running: each of 2 exited 3 times")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("args", [("models",), ("status",), ("chat", "x", "--model", "mock/hello")])
def test_a_full_disk_under_its_output(gateway: Gateway, args: tuple[str, ...]) -> None:
    """The command fails with the reason, without a traceback."""
    with open("/dev/full", "wb") as full, _start(gateway, *args, stdout=full) as command:
        _, stderr = command.communicate(timeout=15)
    assert (command.returncode, stderr) == (1, b"trigate: No space left on device\n")


@pytest.mark.slow
def test_without_arguments_it_serves(tmp_path: Path) -> None:
    """``python -m trigate`` is ``python -m trigate serve``; with the log format JSON, every line is JSON."""
    env = {"TRIGATE_LOG_FORMAT": "json"}
    with run_gateway(f"{PARROT}[server]\nport = 0\n", tmp_path, command=TRIGATE, env=env) as gateway:
        code, _ = gateway.stop()
        assert code == 0, gateway.log()
        entries = [json.loads(line) for line in gateway.log().splitlines()]
        assert all({"event", "level", "timestamp"} <= set(entry) for entry in entries)
        assert any(entry["event"].startswith("Listening on http://127.0.0.1:") for entry in entries)


# -- requests to a running gateway ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateway(upstream: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that needs a key, with the provider as ``mock`` and the echo as ``parrot``."""
    more = PARROT + f'[keys]\nalice = "{KEY}"\n'
    with run_gateway(configuration(upstream, more=more), tmp_path_factory.mktemp("gateway")) as running:
        yield running


@pytest.fixture
def ask(run: Run, gateway: Gateway) -> Run:
    """Runs a command with the address and the key of the gateway."""

    def ask(*args: str, **more: Any) -> click.testing.Result:
        return run(*args, **{"TRIGATE_URL": gateway.url, "TRIGATE_API_KEY": KEY, **more})

    return ask


@pytest.mark.slow
def test_models(ask: Run) -> None:
    """The output has one id per line, in the order of ``GET /v1/models``."""
    result = ask("models")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[:2] == ["default", "mock/hello"]
    assert "parrot/echo" in result.stdout.splitlines()


@pytest.mark.slow
def test_an_sdk_s_base_url_and_a_key_with_a_newline_are_accepted(ask: Run, gateway: Gateway) -> None:
    """A URL may end in ``/v1``, as for the SDKs, and a key in a newline, as from a file."""
    for command in (("models",), ("status",), ("chat", "Hello")):
        result = ask(*command, "--url", f"{gateway.url}/v1/", TRIGATE_API_KEY=f"{KEY}\n")
        assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_status(ask: Run) -> None:
    """The output is text with every upstream, or the gateway's answer with ``--json``."""
    result = ask("status")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"Trigate {trigate.__version__}: ok, up 0:0")
    assert "\n  mock: up, 0 in flight, 4 models\n" in result.stdout
    body = json.loads(ask("status", "--json").stdout)
    assert (body["version"], body["status"]) == (trigate.__version__, "ok")
    assert [row["name"] for row in body["upstreams"]] == ["mock", "parrot"]


@pytest.mark.slow
def test_chat(ask: Run) -> None:
    """Standard output has the answer and a newline, and nothing else; the model is ``default`` unless given."""
    result = ask("chat", "Hello")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{TEXT}\n", "")
    result = ask("chat", "Grüße,  liebe\nWelt 🌍", "--model", "parrot/echo")
    assert (result.exit_code, result.stdout) == (0, "Grüße,  liebe\nWelt 🌍\n")


@pytest.mark.slow
def test_chat_reads_the_question_from_standard_input(ask: Run) -> None:
    """The question ``-`` reads all of standard input."""
    result = ask("chat", "-", "--model", "parrot/echo", stdin="one\ntwo")
    assert (result.exit_code, result.stdout) == (0, "one\ntwo\n")


@pytest.mark.slow
def test_chat_with_a_system_message(ask: Run, upstream: str) -> None:
    """The system message comes before the question."""
    assert ask("chat", "Hello", "--system", "Be brief.", "--model", "mock/hello.system").exit_code == 0
    [body] = seen(upstream, "hello.system")["bodies"]
    assert json.loads(body)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]


@pytest.mark.slow
def test_chat_with_an_unknown_model(ask: Run) -> None:
    """The error is the gateway's own message."""
    result = ask("chat", "Hello", "--model", "nobody/x")
    _assert_failed(result, "404: The model 'nobody/x' does not exist here.")
    assert result.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("cut", "The answer of the upstream mock was truncated: "),
        ("reset", "The connection to the upstream mock broke during its answer."),
        ("short", "The upstream mock "),
    ],
)
def test_chat_that_is_truncated(ask: Run, part: str, message: str) -> None:
    """The partial answer is printed, and the command fails."""
    result = ask("chat", "Hello", "--model", f"mock/{part}.cli")
    _assert_failed(result, f"trigate: {message}")
    assert result.stdout == "Grüße, liebe\n"


@pytest.mark.slow
@pytest.mark.parametrize("command", [("models",), ("status",), ("chat", "Hello")])
def test_a_wrong_key(ask: Run, command: tuple[str, ...]) -> None:
    """The error is the gateway's message; it does not contain the key."""
    result = ask(*command, "--key", "no-such-key")
    _assert_failed(result, "401: Incorrect API key provided.")
    assert "no-such-key" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize("key", ["secret\nkey", "secret\rkey", "secretä", "secret\0key"])
def test_a_key_with_invalid_characters(run: Run, key: str) -> None:
    """The command refuses the key, and does not print it."""
    result = run("models", "--key", key)
    _assert_failed(result, "characters that an HTTP header cannot carry")
    assert "secret" not in result.output


@pytest.mark.parametrize("command", [("models",), ("status",), ("status", "--json"), ("chat", "Hello")])
def test_no_gateway_at_the_address(run: Run, command: tuple[str, ...]) -> None:
    """The error has the address and the likely reason."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    _assert_failed(run(*command, "--url", url), f"cannot reach {url}: ", "Is `trigate serve` running there?")


@pytest.mark.parametrize("url", ["127.0.0.1:18888", "http://", "ftp://127.0.0.1", "http://[", "http://127.0.0.1:x"])
@pytest.mark.parametrize("command", [("models",), ("chat", "Hello")])
def test_an_invalid_url(run: Run, url: str, command: tuple[str, ...]) -> None:
    """The error has the URL, and there is no traceback."""
    _assert_failed(run(*command, "--url", url), url)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "url"),
    [
        ('[server]\nport = 1\n[upstreams.a]\napi_key = { env = "NOT_SET" }\n', "http://127.0.0.1:1"),
        ('[server]\nhost = "0.0.0.0"\nport = 1\n', "http://127.0.0.1:1"),
        ('[server]\nhost = "::"\nport = 1\n', "http://[::1]:1"),
        ('[server]\nhost = "10.0.0.1"\nport = 1\ncertfile = "c"\nkeyfile = "k"\n', "https://10.0.0.1:1"),
        ("[server]\nport = 0\n", "http://127.0.0.1:18888"),
        ("[server]\nport = true\n", "http://127.0.0.1:18888"),
        ("not TOML", "http://127.0.0.1:18888"),
        (None, "http://127.0.0.1:18888"),
    ],
)
def test_the_gateway_of_the_configuration(run: Run, tmp_path: Path, content: str | None, url: str) -> None:
    """Without ``--url``, the commands call the address in the configuration file, also if its secrets are not here."""
    if content is not None:
        (tmp_path / "trigate.toml").write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRIGATE_CONFIG", raising=False)
        assert gateway_url() == url
    assert "as the configuration file says" in " ".join(run("status", "--help").stdout.split())


def test_another_server_at_the_address(run: Run, upstream: str) -> None:
    """The error of a server that is no gateway is printed, without a traceback."""
    _assert_failed(run("status", "--url", upstream), "404: said the upstream")


@pytest.mark.slow
def test_control_characters_are_replaced(run: Run, tmp_path: Path) -> None:
    """The message of a server is printed as one printable line."""
    script = """
import http.server
class Evil(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(500)
        self.end_headers()
        self.wfile.write(b"no\\x1b[2J\\nno\\n")
server = http.server.HTTPServer(("127.0.0.1", 0), Evil)
print(server.server_port, flush=True)
server.serve_forever()
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            result = run("status", "--url", f"http://127.0.0.1:{server.stdout.readline().strip()}")
        finally:
            server.kill()
    _assert_failed(result)
    assert result.stderr == "trigate: 500: no?[2J?no\n"


@pytest.mark.slow
def test_a_web_page_at_the_address(run: Run, tmp_path: Path) -> None:
    """A 200 with a body that is not a gateway's is an error, without a traceback."""
    (tmp_path / "status").write_text("<html>")
    # `-u`: the first line, which has the port, is not buffered
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            url = server.stdout.readline().partition("(")[2].partition("/)")[0]
            _assert_failed(run("status", "--url", url), url)
        finally:
            server.kill()


# -- interruptions ----------------------------------------------------------------------------------------------------


def _start(gateway: Gateway, *args: str, **pipes: Any) -> subprocess.Popen[bytes]:
    env = environment(TRIGATE_URL=gateway.url, TRIGATE_API_KEY=KEY)
    return subprocess.Popen([*TRIGATE, *args], env=env, stderr=subprocess.PIPE, **pipes)


def _interrupt(process: subprocess.Popen[bytes]) -> bytes:
    """Sends SIGINT until the process exits; returns its standard error.

    One signal may not be enough: CPython checks for signals some instructions before a blocking system call, and acts
    on a signal that arrives in between only when the call returns.
    """
    for _ in range(15):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=1)[1]
    raise AssertionError("the command does not exit at Ctrl-C")


@pytest.mark.slow
def test_ctrl_c_during_an_answer(gateway: Gateway, upstream: str) -> None:
    """The exit code is 130, without a traceback, and the upstream's stream is closed."""
    with _start(gateway, "chat", "x", "--model", "mock/endless.ctrlc", stdout=subprocess.PIPE) as chat:
        assert chat.stdout is not None
        assert chat.stdout.read(5) == b"word "
        stderr = _interrupt(chat)
    assert (chat.returncode, stderr) == (130, b"")
    wait_closed(upstream, "endless.ctrlc")


@pytest.mark.slow
def test_ctrl_c_before_an_answer(gateway: Gateway, upstream: str) -> None:
    """The exit code is 130 before the first word too."""
    with _start(gateway, "chat", "x", "--model", "mock/silent.ctrlc", stdout=subprocess.PIPE) as chat:
        while not seen(upstream, "silent.ctrlc")["open"]:
            assert chat.poll() is None
        chat.send_signal(signal.SIGINT)
        stdout, stderr = chat.communicate(timeout=15)
    assert (chat.returncode, stdout, stderr) == (130, b"", b"")


@pytest.mark.slow
def test_ctrl_c_while_it_reads_the_question(gateway: Gateway) -> None:
    """The exit code is 130, without a traceback."""
    with _start(gateway, "chat", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as chat:
        assert chat.stdin is not None
        chat.stdin.write(b"x" * 1_000_000)  # more than a pipe holds: it returns when there is a reader
        stderr = _interrupt(chat)
    assert b"Traceback" not in stderr
    assert chat.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize("command", ["models", "status"])
def test_ctrl_c_while_the_gateway_does_not_answer(command: str) -> None:
    """The exit code is 130, without a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        env = environment(TRIGATE_URL=f"http://127.0.0.1:{mute.getsockname()[1]}")
        with subprocess.Popen([*TRIGATE, command], env=env, stderr=subprocess.PIPE) as asking:
            connection, _ = mute.accept()
            with connection:
                assert connection.recv(4) == b"GET "
                stderr = _interrupt(asking)
    assert b"Traceback" not in stderr
    assert asking.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize("args", [("models",), ("status",), ("chat", "x", "--model", "mock/endless.pipe")])
def test_a_closed_pipe(gateway: Gateway, args: tuple[str, ...]) -> None:
    """If the reader of a pipe exits, as in ``trigate models | head -1``, the command exits without a message."""
    reading, writing = os.pipe()
    os.close(reading)
    with _start(gateway, *args, stdout=writing) as command:
        os.close(writing)
        _, stderr = command.communicate(timeout=15)
    assert stderr == b""


# -- the package ------------------------------------------------------------------------------------------------------


def _in_a_process(script: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["trigate", "trigate.cli.commands"])
def test_importing_is_cheap(module: str) -> None:
    """An import loads no heavy package, so that ``--help`` is quick, and changes no thread, signal handler or file."""
    script = f"""
import json, os, signal, sys, threading
def state():
    files = os.listdir("/dev/fd")
    return threading.active_count(), len(files), [str(signal.getsignal(n)) for n in (2, 15, 1)]
before = state()
import {module}
loaded = [name for name in sys.modules if "." not in name]
print(json.dumps([before == state(), loaded]))
"""
    unchanged, loaded = _in_a_process(script)
    assert unchanged
    assert "trigate" in loaded
    assert not {"trio", "quart", "quart_trio", "hypercorn", "httpx2", "structlog", "attrs", "cattrs"} & set(loaded)


def test_public_names() -> None:
    """The package has these public names; any other name is an `AttributeError`."""
    assert sorted(trigate.__all__) == ["__version__", "app", "create_app"]
    assert callable(trigate.create_app)
    with pytest.raises(AttributeError, match=r"module 'trigate' has no attribute 'nonsense'"):
        _ = trigate.nonsense


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    ["from trigate import *", "from trigate import app, create_app", "from trigate import create_app, app"],
)
def test_the_app_is_an_app(imports: str) -> None:
    """``trigate.app`` is what a server calls, whatever was imported before."""
    script = f"import json\n{imports}\nimport trigate\nprint(json.dumps([callable(app), callable(trigate.app)]))"
    assert _in_a_process(script) == [True, True]
