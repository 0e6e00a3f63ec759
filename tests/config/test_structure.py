"""The configuration: minimal files, invalid files, and the report of all faults at once by their paths."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path

import attrs
import pytest

from trigate.config import sections
from trigate.config import structure as configuration
from trigate.config.load import locate, read
from trigate.config.secrets import Secret
from trigate.config.sections import Config, ConfigError, LimitsConfig, ServerConfig, UpstreamConfig, Url

EXAMPLE = """
[upstreams.mock]
kind = "openai"
base_url = "http://127.0.0.1:9100/v1"

[models.default]
targets = ["mock/some-model"]
"""
SECRET = "sk-very-secret-0123456789"
MOCK = '[upstreams.mock]\nbase_url = "http://127.0.0.1:9100/v1"\n'
ALIAS = MOCK + '[models.a]\ntargets = ["mock/x"]\n'


AWS = "[upstreams.a]\nkind = 'bedrock'\nregion = 'us-east-1'\n"


def _structure(text: str, env: dict[str, str] | None = None) -> Config:
    return configuration.structure(tomllib.loads(text), env=env or {}, source="test.toml")


def _problems(text: str, env: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        _structure(text, env)
    assert caught.value.source == "test.toml"
    return caught.value.problems


def _secrets(config: Config) -> dict[str, str | None]:
    return {name: key.secret.literal for name, key in config.keys.items()}


def test_the_example_is_valid(tmp_path: Path) -> None:
    """The smallest configuration has one upstream and defines ``default``."""
    path = tmp_path / "trigate.toml"
    path.write_text(EXAMPLE)
    config = read(path, env={})
    assert config.source == str(path)
    assert config.upstreams == {"mock": UpstreamConfig(kind="openai", base_url=Url("http://127.0.0.1:9100/v1"))}
    assert config.models["default"].targets == ("mock/some-model",)
    assert config.disabled == {}
    assert config.keys == {}
    assert config.server.port == 18888
    assert config.limits.body_bytes == 32 * 1024 * 1024
    assert config.limits.keep_alive_s == sections.Seconds(15.0)


def test_an_empty_file_is_valid() -> None:
    """An empty file gives the defaults of the classes."""
    config = _structure("")
    assert config == Config(source="test.toml")


def test_every_setting_can_be_set() -> None:
    """The fields of each section are read. Integers are accepted for seconds."""
    config = _structure(
        """
        [server]
        host = "::1"
        port = 0
        workers = 2
        certfile = "c.pem"
        keyfile = "k.pem"
        keep_alive_timeout_s = 5
        insecure = true
        allowed_hosts = ["gateway.lan"]
        cors_origins = ["https://app.example"]
        [limits]
        body_bytes = 1000
        queue_timeout_s = 0.5
        [upstreams.a]
        base_url = "https://api.example/v1/"
        api_key = "k"
        headers = { X-Team = "t", X-Org = { env = "ORG" } }
        models = ["m", "org/m"]
        default_model = "m"
        max_connections = 3
        connect_timeout_s = 1
        [upstreams.b]
        kind = "local"
        gguf = "m.gguf"
        start = "startup"
        threads = 2
        [upstreams.c]
        kind = "echo"
        words_per_s = 2.5
        [models."org/alias"]
        targets = ["a/org/m", "c/echo"]
        [keys]
        alice = "alice-key"
        """,
        {"ORG": "o"},
    )
    assert config.server == ServerConfig(
        host="::1",
        port=sections.Port(0),
        workers=sections.Count(2),
        certfile="c.pem",
        keyfile="k.pem",
        keep_alive_timeout_s=sections.Seconds(5.0),
        insecure=True,
        allowed_hosts=(sections.HostName("gateway.lan"),),
        cors_origins=(sections.Origin("https://app.example"),),
    )
    assert type(config.server.keep_alive_timeout_s) is float
    assert config.limits.body_bytes == 1000
    assert config.upstreams["a"].base_url == "https://api.example/v1"
    assert config.upstreams["a"].models == ("m", "org/m")
    assert config.secrets["a"] == {"authorization": "Bearer k", "x-team": "t", "x-org": "o"}
    assert config.upstreams["b"].start == "startup"
    assert config.upstreams["c"].words_per_s == 2.5
    assert config.models["org/alias"].targets == ("a/org/m", "c/echo")
    assert _secrets(config) == {"alice": "alice-key"}


def test_a_wrong_type_hides_nothing() -> None:
    """Contradictory settings are reported beside a wrong type in the same table."""
    text = """
        [upstreams.a]
        max_connections = "many"
        headers = { host = "x" }
        [models.m]
        targets = ["a", 5]
    """
    with pytest.raises(ConfigError) as raised:
        configuration.structure(tomllib.loads(text), env={}, source="test")
    assert {problem.partition(":")[0] for problem in raised.value.problems} == {
        "upstreams.a.max_connections",
        "upstreams.a.base_url",
        "upstreams.a.headers.host",
        "models.m.targets",
        "models.m.targets.0",
    }


def test_a_configuration_is_frozen() -> None:
    """A running request keeps the configuration that it started with, so it must not change."""
    config = _structure(EXAMPLE)
    for value in (config, config.server, config.limits, config.upstreams["mock"], config.models["default"]):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            value.source = "x"  # type: ignore[misc, union-attr]


def test_all_problems_at_once() -> None:
    """Every fault is reported in one go, each with its path."""
    problems = _problems(
        """
        sever = 1
        [server]
        port = "80"
        insecure = "yes"
        prot = 1
        [limits]
        body_bytes = 0
        [upstreams.qwen]
        base_url = "dashscope"
        max_connections = 1.5
        typo = true
        [upstreams."no good"]
        kind = "echo"
        [upstreams.x]
        [models.a]
        targets = ["nowhere/m", "qwen"]
        [models.b]
        [keys]
        k = 5
        """
    )
    for path, what in {
        "sever": "unknown section",
        "server.port": "an integer, got a string",
        "server.insecure": "true or false, got a string",
        "server": "unknown key prot",
        "limits.body_bytes": "got 0",
        "upstreams.qwen.base_url": "not an http:// or https:// URL",
        "upstreams.qwen.max_connections": "an integer, got a number",
        "upstreams.qwen": "unknown key typo",
        "upstreams.no good": "a name has letters",
        "upstreams.x.base_url": "required",
        "models.a.targets.0": "no upstream 'nowhere'",
        "models.a.targets.1": "'upstream/model'",
        "models.b.targets": "missing",
        "keys.k": "expected a string",
    }.items():
        assert any(line.startswith(f"{path}: ") and what in line for line in problems), (path, problems)
    assert len(problems) == 14


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("server = 1", "server: expected a table, got an integer"),
        ("upstreams = []", "upstreams: expected a table, got an array"),
        ("models = 'x'", "models: expected a table, got a string"),
        ("keys = true", "keys: expected a table, got a boolean"),
        ("[upstreams]\nx = 1", "upstreams.x: expected a table, got an integer"),
        ("[server]\nport = 65536", "server.port: expected 0 to 65535, got 65536"),
        ("[server]\nport = true", "server.port: expected an integer, got a boolean"),
        ("[server]\nworkers = 0", "server.workers: expected 1 to"),
        ("[server]\nhost = 1", "server.host: expected a string, got an integer"),
        ("[server]\nallowed_hosts = 'x'", "server.allowed_hosts: expected an array of strings"),
        ("[server]\nallowed_hosts = [1]", "server.allowed_hosts: expected an array of strings"),
        ("[server]\nallowed_hosts = ['a:80']", "server.allowed_hosts.0: expected a host name without a port or a path"),
        ("[server]\nallowed_hosts = ['http://a']", "server.allowed_hosts.0: expected a host name without a port"),
        ("[server]\nallowed_hosts = ['']", "server.allowed_hosts.0: expected a host name"),
        ("[server]\ncors_origins = ['https://a/']", 'server.cors_origins.0: expected "*" or an origin without a path'),
        ("[server]\ncors_origins = ['a']", 'server.cors_origins.0: expected "*" or an origin without a path'),
        ("[server]\ncertfile = 'x'", "server.certfile: certfile and keyfile go together"),
        ("[limits]\nidle_timeout_s = -1", "limits.idle_timeout_s: expected 0 or more"),
        ("[limits]\nidle_timeout_s = nan", "limits.idle_timeout_s: expected 0 or more"),
        ("[limits]\nidle_timeout_s = inf", "limits.idle_timeout_s: expected 0 or more"),
        ("[limits]\nidle_timeout_s = '1s'", "limits.idle_timeout_s: expected a number, got a string"),
        ("[limits]\nidle_timeout_s = true", "limits.idle_timeout_s: expected a number, got a boolean"),
        (MOCK + "kind = 'cohere'", "upstreams.mock.kind: expected 'openai' or 'anthropic' or"),
        (MOCK + "models = 'all'", 'upstreams.mock.models: expected "discover" or an array of model ids'),
        (MOCK + "models = ['']", 'upstreams.mock.models: expected "discover" or an array of model ids'),
        (MOCK + "api_key = 5", "upstreams.mock.api_key: expected a string, {env"),
        (MOCK + "api_key = {env = 'A', file = 'b'}", "upstreams.mock.api_key: expected a string, {env"),
        (MOCK + "api_key = {evn = 'A'}", "upstreams.mock.api_key: expected a string, {env"),
        (MOCK + "api_key = {env = ''}", "upstreams.mock.api_key: expected a string, {env"),
        (MOCK + "headers = {x = 5}", "upstreams.mock.headers.x: expected a string, {env"),
        (MOCK + "headers = {'a b' = 'x'}", "upstreams.mock.headers.a b: not a header name"),
        (MOCK + "headers = {Host = 'x'}", "upstreams.mock.headers.Host: the gateway sets this header itself"),
        (MOCK + "headers = 'x'", "upstreams.mock.headers: expected a table"),
        (MOCK + "proxy = 3", "upstreams.mock.proxy: expected a URL, got an integer"),
        (MOCK + "proxy = 'socks5://x:1'", 'upstreams.mock.proxy: expected "direct" or http://HOST:PORT'),
        (MOCK + "proxy = 'http://u:p@x:1/path'", 'upstreams.mock.proxy: expected "direct" or http://HOST:PORT'),
        (MOCK + "proxy = 'http://x:99999'", 'upstreams.mock.proxy: expected "direct" or http://HOST:PORT'),
        (MOCK + "proxy = 'http://x y'", "upstreams.mock.proxy: has characters"),
        (MOCK + "http2 = 1", "upstreams.mock.http2: expected true or false, got an integer"),
        ("[upstreams.e]\nkind = 'echo'\nproxy = 'direct'", "upstreams.e.proxy: not used by kind 'echo'"),
        ("[upstreams.e]\nkind = 'local'\nhttp2 = true", "upstreams.e.http2: not used by kind 'local'"),
        (MOCK + "api_version = 'v'", "upstreams.mock.api_version: not used by kind 'openai'"),
        ("[upstreams.a]\nkind = 'bedrock'", "upstreams.a.region: required for kind 'bedrock'"),
        ("[upstreams.a]\nkind = 'bedrock'\nregion = 'a.b/c'", "upstreams.a.region: expected letters"),
        (AWS + "guardrail = 'abc'", "upstreams.a.guardrail: expected ID:VERSION"),
        (AWS + "guardrail = 'abc:x'", "upstreams.a.guardrail: expected ID:VERSION"),
        (AWS + "profile = 'p'\napi_key = 'k'", "upstreams.a.profile: not used beside api_key"),
        (MOCK + "region = 'x'", "upstreams.mock.region: not used by kind 'openai'"),
        (MOCK + "kind = 'azure'\napi_version = 'a b'", "upstreams.mock.api_version: expected letters"),
        (MOCK + "gguf = 'x'", "upstreams.mock.gguf: not used by kind 'openai'"),
        (MOCK + "words_per_s = 1", "upstreams.mock.words_per_s: not used by kind 'openai'"),
        (MOCK + "kind = 'echo'", "upstreams.mock.base_url: not used by kind 'echo'"),
        ("[upstreams.e]\nkind = 'local'\napi_key = 'x'", "upstreams.e.api_key: not used by kind 'local'"),
        ("[models.a]\ntargets = []", "models.a.targets: expected at least one target"),
        (MOCK + "[models.'a*b*']\ntargets = ['mock/m']", "models.a*b*: a pattern has one '*'"),
        (
            MOCK + "[models.'mock/*']\ntargets = ['mock/m']",
            "models.mock/*: matches nothing: an id that begins with mock/",
        ),
        (
            MOCK + "[models.'a-*']\ntargets = ['mock/*']",
            "models.a-*.targets.0: * stands for nothing here; there is {mod",
        ),
        (
            MOCK + "[models.'a-*']\ntargets = ['mock/{1}']",
            "models.a-*.targets.0: {1} stands for nothing here; there is",
        ),
        (
            MOCK + "[models.a]\ntargets = ['mock/x-{*}']",
            "models.a.targets.0: {*} stands for nothing here; there is {mod",
        ),
        ("[models.a]\ntargets = ['e/']", "models.a.targets.0: expected 'upstream/model', got 'e/'"),
        ("[retries]\nbudget = 2", "retries.budget: expected 0 to 1, got 2"),
        ("[upstreams.u]\nbase_url = 1", "upstreams.u.base_url: expected a URL, got an integer"),
        ("[server]\nallowed_hosts = ['[']", "server.allowed_hosts.0: expected a host name without a port or a path"),
        (ALIAS + "weights = [1]", "models.a.weights: not used by strategy 'failover'"),
        (
            ALIAS + "strategy = 'hedge'\naffinity = 'session'",
            "models.a.affinity: not used by strategy 'hedge', which asks two targets",
        ),
        (MOCK + "system_role = 'last'", "upstreams.mock.system_role: expected 'anywhere' or 'first' or 'as-user'"),
        (
            MOCK + "kind = 'anthropic'\nsystem_role = 'first'",
            "upstreams.mock.system_role: not used by kind 'anthropic'",
        ),
        (MOCK + "drop = ['stream']", "upstreams.mock.drop: stream cannot be dropped"),
        (MOCK + "history_fields = 'x'", "upstreams.mock.history_fields: expected an array of strings"),
        (MOCK + "drop = 'seed'", "upstreams.mock.drop: expected an array of strings"),
        (MOCK + "set = { model = 'x' }", "upstreams.mock.set: model cannot be set: it is the client's"),
        (MOCK + "rename = { a = 'messages' }", "upstreams.mock.rename: messages cannot be renamed, nor be a new name"),
        (MOCK + "rename = { a = 5 }", "upstreams.mock.rename.a: expected a string"),
        (MOCK + "rename = { a = 'c', b = 'c' }", "upstreams.mock.rename: several fields become c"),
        (MOCK + "drop = ['a']\nset = { a = 1 }", "upstreams.mock.drop: a is also in set"),
        (MOCK + "drop = ['a']\nrename = { a = 'b' }", "upstreams.mock.drop: a is also in rename"),
        (ALIAS + "on = ['errors']", "models.a.on.0: expected 'context_length' or 'content_filter' or"),
        (ALIAS + "on = 'error'", "models.a.on: expected an array of strings"),
        (
            ALIAS + "strategy = 'balance'\nweights = [1, 2]",
            "models.a.weights: expected one number above 0 for each target",
        ),
        (
            ALIAS + "strategy = 'balance'\nweights = [0]",
            "models.a.weights: expected one number above 0 for each target",
        ),
        ("[servr]", "servr: unknown section; there are server, upstreams,"),
        ("[upstream.x]\nbase_url = 'http://x'", "upstream: unknown section; there are server, upstreams,"),
        ("[limits]\nidle_timeout = 3", "limits: unknown key idle_timeout; did you mean idle_timeout_s?"),
        (MOCK + "api_base = 'x'", "upstreams.mock: unknown key api_base; did you mean base_url?"),
        (MOCK + "modles = ['x']", "upstreams.mock: unknown key modles; did you mean models?"),
        (MOCK + "api_key_env = 'X'", "upstreams.mock: unknown key api_key_env; did you mean api_key?"),
        ("[models]\ndefault = 'mock/x'", 'models.default: expected a table: write default = { targets = ["upstream/'),
        *[
            (
                MOCK + f"api_key = '{value}'",
                'upstreams.mock.api_key: is this text, not a variable: write {env = "A_KEY"}',
            )
            for value in ("env:A_KEY", "env.A_KEY", "$A_KEY", "${A_KEY}", "os.environ/A_KEY", "%A_KEY%", "$env:A_KEY")
        ],
        (MOCK + "api_key = 'file:/a/b'", 'upstreams.mock.api_key: is this text, not a file: write {file = "/a/b"}'),
        (MOCK + "api_key = 'null'", "upstreams.mock.api_key: 'null' is a text: leave the setting out"),
        (MOCK + "api_key = 'Bearer sk-1'", "upstreams.mock.api_key: the key alone, without 'Bearer'"),
        (
            MOCK + "headers = {authorization = 'Bearer ${A_KEY}'}",
            "upstreams.mock.headers.authorization: variables in a",
        ),
        (MOCK + "default_model = 'null'", "upstreams.mock.default_model: 'null' is a text: leave the setting out"),
        ("[keys]\nk = '$A_KEY'", 'keys.k: is this text, not a variable: write {env = "A_KEY"}'),
        ("[keys]\nk = ''", "keys.k: the value is empty"),
        ("[keys]\nk = {env = 'NO_SUCH'}", "keys.k: the environment variable NO_SUCH is not set"),
    ],
)
def test_one_problem(text: str, problem: str) -> None:
    """Each fault gives one line that begins with its path and says what is expected."""
    [line] = _problems(text)
    assert line.startswith(problem)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.example/v1",
        "ftp://api.example",
        "http://",
        "http://:80/v1",
        "http://api.example:port/v1",
        "http://api.example:99999/v1",
        "http://[::1/v1",
        "http://api.example/v1?key=x",
        "http://api.example/v1#x",
        "http://api.example/v 1",
        "http://äpi.example/v1",
    ],
)
def test_bad_urls(url: str) -> None:
    """Anything but a plain http or https base URL is refused."""
    [line] = _problems(f"[upstreams.u]\nbase_url = '{url}'")
    assert line.startswith("upstreams.u.base_url: ")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://api.example/v1/chat/completions", "write https://api.example/v1"),
        ("https://api.example/v1/chat/completions/", "write https://api.example/v1"),
        ("https://api.example/v1/responses", "write https://api.example/v1"),
        ("https://api.example/v1/models", "write https://api.example/v1"),
        ("https://api.example/v1/chat", "write https://api.example/v1"),
        ("http://unix:/run/llama.sock:/v1", "Unix sockets are not supported"),
        ("unix:///run/llama.sock", "Unix sockets are not supported"),
        ("http+unix://%2Frun%2Fllama.sock/v1", "Unix sockets are not supported"),
        ("/run/llama.sock", "Unix sockets are not supported"),
        ("api.example/v1", "write https://api.example/v1"),
        ("localhost:8000/v1", "write http://localhost:8000/v1"),
        ("127.0.0.1:8000/v1", "write http://127.0.0.1:8000/v1"),
        ("llama:8000", "write http://llama:8000"),
        ("null", "leave the setting out"),
    ],
)
def test_what_a_url_should_be(url: str, says: str) -> None:
    """Where it is clear what was meant, the message has the right spelling."""
    [line] = _problems(f"[upstreams.u]\nbase_url = '{url}'")
    assert line.startswith("upstreams.u.base_url: ")
    assert says in line
    assert not line.endswith("completions")


@pytest.mark.parametrize("name", ["chat", "my-models", "embeddings.example"])
def test_a_path_that_only_looks_like_an_endpoint(name: str) -> None:
    """It is accepted, and so is a host of that name."""
    assert _structure(f"[upstreams.u]\nbase_url = 'http://{name}/x-{name}'").upstreams["u"].base_url is not None


@pytest.mark.parametrize("key", ["sk-proj-$abc", "env", "none", "not-needed", "a:b", "$2b$10$abcdefghijkl"])
def test_secrets_that_only_look_like_a_reference(key: str) -> None:
    """They are accepted as they are."""
    assert _structure(MOCK + f"api_key = '{key}'").secrets["mock"] == {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{SECRET}@api.example/v1",
        f"ftp://user:{SECRET}@api.example/v1",
        f"http://user:{SECRET}@api.example:port/v1",
    ],
)
def test_a_password_in_a_url_is_not_quoted(url: str) -> None:
    """Credentials in a URL are refused, and the message, which may be logged, does not repeat them."""
    [line] = _problems(f"[upstreams.u]\nbase_url = '{url}'")
    assert SECRET not in line


@pytest.mark.parametrize("url", ["http://[::1]:8000/v1", "https://api.example", "http://127.0.0.1:1/a/b/"])
def test_good_urls(url: str) -> None:
    """IPv6 addresses, no path and any path are valid. A trailing slash is dropped."""
    assert _structure(f"[upstreams.u]\nbase_url = '{url}'").upstreams["u"].base_url == url.rstrip("/")


def test_hosts_and_origins_are_compared_in_lower_case() -> None:
    """Browsers send them in lower case, so the file's spelling does not matter."""
    server = _structure(
        "[server]\nallowed_hosts = ['MyBox.lan', '[::1]', '10.0.0.1']\n"
        "cors_origins = ['https://App.Example:8443', '*', 'http://[::1]:3000', 'moz-extension://0a']"
    ).server
    assert server.allowed_hosts == ("mybox.lan", "::1", "10.0.0.1")
    assert server.cors_origins == ("https://app.example:8443", "*", "http://[::1]:3000", "moz-extension://0a")


# -- secrets ----------------------------------------------------------------------------------------------------------


def test_a_secret_is_a_literal_a_variable_or_a_file(tmp_path: Path) -> None:
    """Each of the three gives the value, without white space around it."""
    path = tmp_path / "key"
    path.write_text(f"{SECRET}\n")
    for api_key in (f"' {SECRET} '", "{env = 'KEY'}", f"{{file = '{path}'}}"):
        config = _structure(MOCK + f"api_key = {api_key}", {"KEY": f"{SECRET}\n"})
        assert config.secrets["mock"] == {"authorization": f"Bearer {SECRET}"}
        assert config.disabled == {}


@pytest.mark.parametrize(
    ("api_key", "reason"),
    [
        ("''", "api_key: the value is empty"),
        ("' '", "api_key: the value is empty"),
        ("{env = 'KEY'}", "api_key: the environment variable KEY is not set"),
        ("{file = '/no/such/file'}", "api_key: the file /no/such/file cannot be read"),
        ('"two\\nlines"', "api_key: the value has characters"),
        ("'Schlüssel'", "api_key: the value has characters"),
    ],
)
def test_a_missing_secret_disables_that_upstream_only(api_key: str, reason: str) -> None:
    """The rest of the file stays valid. The upstream is disabled with the reason."""
    config = _structure(f"{MOCK}api_key = {api_key}\n[upstreams.other]\nkind = 'echo'\n", {"KEY": ""})
    assert list(config.disabled) == ["mock"]
    assert config.disabled["mock"].startswith(reason)
    assert set(config.upstreams) == {"mock", "other"}


def test_every_missing_secret_is_named() -> None:
    """When a key and a header are both missing, the reason names both."""
    config = _structure(MOCK + "api_key = {env = 'A'}\nheaders = {x-b = {env = 'B'}}")
    assert "headers.x-b: the environment variable B is not set" in config.disabled["mock"]
    assert "api_key: the environment variable A is not set" in config.disabled["mock"]


def test_an_unreadable_file_of_a_secret(tmp_path: Path) -> None:
    """An empty file, a directory, a file that is no text and an impossible name are a missing secret and do not
    crash."""
    empty = tmp_path / "empty"
    empty.write_text(" \n")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    for path in (str(empty), str(binary), str(tmp_path), "~nobody-of-that-name/key", "a\0b"):
        with pytest.raises(LookupError, match=re.escape(path)):
            Secret(file=path).reveal({})


def test_a_secret_s_file_may_be_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``~`` is the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "key").write_text(SECRET)
    assert Secret(file="~/key").reveal({}) == SECRET


def test_no_repr_shows_a_secret() -> None:
    """No repr of a configuration or of a part of it shows a literal, a resolved value or a gateway key."""
    config = _structure(
        MOCK + "api_key = {env = 'KEY'}\n[upstreams.b]\nbase_url = 'http://b/v1'\n"
        f"api_key = '{SECRET}'\nheaders = {{x-key = '{SECRET}'}}\n[keys]\nalice = '{SECRET}'\n",
        {"KEY": SECRET, "TRIGATE_API_KEY": SECRET},
    )
    assert _secrets(config) == {"alice": SECRET, "TRIGATE_API_KEY": SECRET}
    for value in (config, config.upstreams["b"], config.upstreams["b"].api_key, config.server, config.keys.keys()):
        assert SECRET not in repr(value)
        assert SECRET not in str(value)
    assert "alice" in repr(config)


def test_no_problem_quotes_a_secret() -> None:
    """A message about an invalid value of a secret does not show the value."""
    text = f"[upstreams.u]\nbase_url = 'x'\napi_key = {{evn = '{SECRET}'}}\nheaders = {{x = ['{SECRET}']}}\n"
    text += f"[keys]\nk = ['{SECRET}']"
    with pytest.raises(ConfigError) as caught:
        _structure(text)
    assert len(caught.value.problems) == 4
    assert SECRET not in str(caught.value)


def test_with_upstreams_resolves_secrets() -> None:
    """Discovered upstreams get their secrets, or a reason, like configured ones."""
    found = {
        "a": UpstreamConfig(base_url=Url("http://a/v1"), api_key=Secret(env="A")),
        "b": UpstreamConfig(base_url=Url("http://b/v1"), api_key=Secret(env="B")),
    }
    config = configuration.with_upstreams(Config(source="discovery"), found, env={"A": SECRET})
    assert config.upstreams == found
    assert config.secrets["a"] == {"authorization": f"Bearer {SECRET}"}
    assert list(config.disabled) == ["b"]


def test_the_gateway_s_key_from_the_environment() -> None:
    """``TRIGATE_API_KEY`` is an additional key. Set but empty it is a fault, since it would open the gateway."""
    assert _secrets(_structure("", {"TRIGATE_API_KEY": "k"})) == {"TRIGATE_API_KEY": "k"}
    assert _secrets(_structure("[keys]\na = 'b'", {"TRIGATE_API_KEY": "k"})) == {"a": "b", "TRIGATE_API_KEY": "k"}
    assert _secrets(_structure("", {"TRIGATE_API_KEY": " k\n"})) == {"TRIGATE_API_KEY": "k"}
    for empty in ("", " "):
        assert _problems("", {"TRIGATE_API_KEY": empty})[0].startswith("TRIGATE_API_KEY: set, but empty")
    [line] = _problems("", {"TRIGATE_API_KEY": "Schlüssel"})
    assert line == "TRIGATE_API_KEY: the value has characters that an HTTP header cannot carry"


# -- timeouts, files --------------------------------------------------------------------------------------------------


def test_timeouts() -> None:
    """An upstream's own timeout takes precedence over the limits. 0 disables either."""
    config = _structure(
        MOCK + "connect_timeout_s = 2\nidle_timeout_s = 0\n[limits]\nconnect_timeout_s = 7\nqueue_timeout_s = 0"
    )
    assert config.timeout_s("mock", "connect") == 2
    assert config.timeout_s("mock", "idle") == math.inf
    assert config.timeout_s("mock", "queue") == math.inf
    assert config.timeout_s("mock", "total") == LimitsConfig().total_timeout_s


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[server", "is not TOML"),
        (b"a = 1\na = 2", "is not TOML"),
        (b"x = '\xff'", "is not UTF-8"),
        (b"x = " + 20_000 * b"[", "nested"),
    ],
)
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes, says: str) -> None:
    """The message names the file and the position in it."""
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        read(path, env={})
    assert caught.value.source == str(path)


def test_a_byte_order_mark_opens_the_file(tmp_path: Path) -> None:
    """Some editors write one."""
    path = tmp_path / "trigate.toml"
    path.write_text(EXAMPLE, encoding="utf-8-sig")
    assert set(read(path, env={}).upstreams) == {"mock"}


def test_an_unreadable_file(tmp_path: Path) -> None:
    """For a missing file and for a directory, the message is the system's."""
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(tmp_path / "none.toml", env={})
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read(tmp_path, env={})


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ``TRIGATE_CONFIG``, whether that file exists or not, else ``./trigate.toml`` if it exists, else none."""
    monkeypatch.chdir(tmp_path)
    assert locate({}) is None
    assert locate({"TRIGATE_CONFIG": ""}) is None
    assert locate({"TRIGATE_CONFIG": "none.toml"}) == Path("none.toml")
    (tmp_path / "trigate.toml").write_text("")
    assert locate({}) == Path("trigate.toml")
    assert locate({"TRIGATE_CONFIG": "other.toml"}) == Path("other.toml")


def test_the_password_of_a_proxy_is_not_shown() -> None:
    """The URL of a proxy may contain credentials. Neither the printed configuration nor an error repeats them."""
    good = "http://user:hidden-word@proxy.example:3128"
    table = {"base_url": "http://x/v1", "proxy": good + "/"}
    made = configuration.structure({"upstreams": {"a": table}}, env={}, source="test")
    assert made.upstreams["a"].proxy == good
    assert "hidden-word" not in repr(made)
    with pytest.raises(ConfigError) as caught:
        configuration.structure({"upstreams": {"a": {**table, "proxy": good + "/?x"}}}, env={}, source="test")
    assert "hidden-word" not in str(caught.value)
