"""What exists is documented, and what is documented exists."""

from __future__ import annotations

import ast
import hashlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import click
import pytest

import trigate
from tests.test_layers import ROWS
from trigate import errors
from trigate.asgi import health, status_events
from trigate.asgi.control_plane import create_control_plane
from trigate.cli.commands import cli
from trigate.config import key_sections, sections, structure
from trigate.dialects import endpoints, gemini
from trigate.dialects.anthropic import errors as messages_errors
from trigate.dialects.anthropic import fields
from trigate.dialects.bedrock import fields as bedrock_fields
from trigate.dialects.gemini import errors as gemini_errors
from trigate.dialects.gemini import fields as gemini_fields
from trigate.dialects.ollama import fields as ollama_fields
from trigate.dialects.openai_chat import client_fields
from trigate.dialects.openai_responses import fields as responses_fields
from trigate.metrics.families import FAMILIES
from trigate.openai import passed_paths
from trigate.upstream import discovery

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PACKAGE = Path(trigate.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

ROW = re.compile(r"^\| (?!-)(.*) \|$", re.M)
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
BLOCKS = [
    pytest.param(body, id=f"{page.relative_to(ROOT)}:{page.read_text()[: found.start()].count(chr(10)) + 1}")
    for page in PAGES
    for found in FENCED.finditer(page.read_text(encoding="utf-8"))
    for language, body in [found.groups()]
    if language == "toml"
]


def _page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def _sections(text: str, level: str = "##") -> dict[str, str]:
    """The parts of a page by their headings, without backticks."""
    parts = re.split(rf"^{level} (.*)$", text, flags=re.M)
    return {title.replace("`", ""): body for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def _rows(text: str) -> Iterator[list[str]]:
    """The cells of every row of the tables in a text, their headers included."""
    for line in ROW.findall(text):
        yield [cell.strip() for cell in line.split(" | ")]


def _names(cell: str) -> list[str]:
    """What stands in backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def _first_names(text: str) -> dict[str, list[str]]:
    """The rows whose first cell begins with a backtick, by what stands in it."""
    return {_names(row[0])[0]: row for row in _rows(text) if row[0].startswith("`")}


# -- the configuration ------------------------------------------------------------------------------------------------

SECTIONS = {
    "[server]": sections.ServerConfig,
    "[upstreams.NAME]": sections.UpstreamConfig,
    "[models.ALIAS]": sections.ModelConfig,
    "[limits]": sections.LimitsConfig,
    "[retries]": sections.RetriesConfig,
    "[breaker]": sections.BreakerConfig,
    "[hooks.NAME]": sections.HookConfig,
    "[keys]": key_sections.KeyConfig,
    "[groups.NAME]": key_sections.GroupConfig,
    "[admin]": key_sections.AdminConfig,
    "[allowance]": key_sections.Allowance,
    "[prices]": key_sections.PriceConfig,
    "[store]": sections.StoreConfig,
    "[reasoning_memory]": sections.ReasoningMemoryConfig,
    "[sessions]": sections.SessionsConfig,
}


def _written(default: object) -> str:
    """A default value as the tables have it."""
    default = getattr(default, "factory", lambda: default)()
    match default:
        case attrs.NOTHING:
            return "required"
        case None:
            return "not set"
        case bool():
            return f"`{str(default).lower()}`"
        case int() | float():
            return f"`{int(default) if default == int(default) else default}`"
        case str():
            return f'`"{default}"`'
        case tuple():
            return f"`{list(default)}`".replace("'", '"')
    return f"`{default}`"


@pytest.mark.parametrize("title", SECTIONS)
def test_settings(title: str) -> None:
    """Each section has a table of exactly its settings, in their order, with their defaults."""
    documented = [
        (_names(row[0])[0], row[2])
        for row in _rows(_sections(_page("reference/configuration.md"))[title])
        if row[0].startswith("`")
    ]
    assert documented == [(field.name, _written(field.default)) for field in attrs.fields(SECTIONS[title])]


@pytest.mark.parametrize("title", SECTIONS)
def test_units(title: str) -> None:
    """The documented type of a setting is its own."""
    types = {
        "Seconds": "seconds",
        "Size": "bytes",
        "Count": "count",
        "Limit": "count or 0",
        "Share": "share",
        "Tokens": "number",
        "Rates": "table",
        "MicroUsd": "US dollars",
        "Mapping[Period, MicroUsd]": "table of US dollars",
        "Mapping[str, Factor]": "table of factors",
        "Period": '`"day"`, `"week"`, `"month"` or `"total"`',
        "tuple[Rate, ...]": "array of numbers",
        "Port": "port",
        "Url": "URL",
        "ProxyUrl": "proxy",
        "Secret": "secret",
        "bool": "true or false",
        "ResponsesMode": '`"native"`, `"translate"` or `"discover"`',
        "str": "string",
        "tuple[str, ...]": "array of strings",
        "tuple[HostName, ...]": "array of strings",
        "tuple[Origin, ...]": "array of strings",
        "Mapping[str, Secret]": "table of secrets",
        "Mapping[str, Any]": "table",
        "Mapping[str, str]": "table of strings",
        "Mapping[str, Expression]": "table of JMESPaths",
        "Expression": "JMESPath",
        "tuple[Secret, ...]": "array of secrets",
        "tuple[Action, ...]": "array of actions",
        "tuple[Reason, ...]": "array of reasons",
        'tuple[str, ...] | Literal["discover"]': '`"discover"` or array of strings',
        'tuple[str, ...] | Literal["pass"]': '`"pass"` or array of strings',
    }
    rates = {
        "words_per_s": "words per second",
        "rate_per_s": "requests per second",
        "key_rate_per_s": "calls per second",
        "body_bytes_per_s": "bytes per second",
    }
    documented = _first_names(_sections(_page("reference/configuration.md"))[title])
    for name, annotation in SECTIONS[title].__annotations__.items():  # strings, and no cattrs resolves them
        kind = annotation.removesuffix(" | None").replace("'", '"')
        said = documented[name][1]
        if kind.startswith("Literal"):
            assert _names(said) == re.findall(r'"[\w-]+"', kind)
        elif kind == "Rate":
            assert said == rates[name]
        else:
            assert said == types[kind], name


def test_sections() -> None:
    """Every section that the code knows is documented."""
    with pytest.raises(sections.ConfigError) as caught:
        structure.structure({"nonsense": 1}, env={}, source="test")
    [problem] = caught.value.problems
    known = problem.partition("there are ")[2].split(", ")
    titles = [title for title in _sections(_page("reference/configuration.md")) if title.startswith("[")]
    assert [title.strip("[]").partition(".")[0] for title in titles] == known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_in_prose(page: Path) -> None:
    """A setting that a page speaks of exists."""
    tables = {"server": sections.ServerConfig, "limits": sections.LimitsConfig, "store": sections.StoreConfig}
    text = re.sub(r"^\|.*$", "", page.read_text(encoding="utf-8"), flags=re.M)  # tables name modules
    for section, name in re.findall(r"`(server|limits|store)\.(\w+)`", text):
        assert name in attrs.fields_dict(tables[section]), f"{section}.{name}"


@pytest.mark.parametrize("body", BLOCKS)
def test_examples(body: str) -> None:
    """Each example is a configuration as it stands, once the environment has the variables that it names."""
    # long enough for every scheme, none like another, and base64 as well
    env = {
        name: "whsec_" + hashlib.sha256(name.encode()).hexdigest()[:48] for name in re.findall(r'env = "(\w+)"', body)
    }
    data = tomllib.loads(body)
    for name, secret in data.get("keys", {}).items():
        if isinstance(secret, dict) and "file" in secret:  # there is no such file here
            data["keys"][name] = "a-value"
    made = structure.structure(data, env=env, source="example")
    assert made.disabled == {}


def test_providers() -> None:
    """The providers that discovery knows are in its table, in its order."""
    documented = [
        (*(_names(cell)[0] for cell in row[:3]), _names(row[3])[0] if row[3].startswith("`") else "")
        for row in _rows(_sections(_page("reference/configuration.md"))["Discovery"])
        if row[0].startswith("`")
    ]
    assert documented == [attrs.astuple(provider)[:4] for provider in discovery.PROVIDERS]
    prose = _sections(_page("reference/configuration.md"))["Discovery"]
    for provider in discovery.PROVIDERS:
        assert provider.kind == "openai" or f"`{provider.name}` is of kind `{provider.kind}`" in prose


def test_local_servers() -> None:
    """So are the local servers and their ports."""
    prose = _sections(_page("reference/configuration.md"))["Discovery"]
    assert dict(re.findall(r"`(\w+)` on (\d+)", prose)) == {
        name: str(port) for name, port in discovery.LOCAL_SERVERS.items()
    }
    assert f"within {discovery.PROBE_TIMEOUT_S} seconds" in prose


def test_environment_variables() -> None:
    """The variables of Trigate's own that are in the sources are those that are documented."""
    used = {name for path in SOURCES for name in re.findall(r"\bTRIGATE_[A-Z_]+\b", path.read_text(encoding="utf-8"))}
    documented = _first_names(_sections(_page("reference/configuration.md"))["Environment variables"])
    assert set(documented) == used


# -- errors -----------------------------------------------------------------------------------------------------------


def _error_classes(cls: type[errors.GatewayError] = errors.GatewayError) -> Iterator[type[errors.GatewayError]]:
    for each in cls.__subclasses__():
        if each.__module__.startswith("trigate."):
            yield each
            yield from _error_classes(each)


def test_error_codes() -> None:
    """Every code is in the table with its status, its type and whether the next target may be tried."""
    rows = _first_names(_sections(_page("reference/errors.md"))["Codes"])
    found = {cls.code: cls for cls in _error_classes() if "code" in vars(cls)}
    assert set(rows) == set(found)
    assert set(rows) >= errors.codes()
    for code, cls in found.items():
        _, status, kind, following, *_ = rows[code]
        assert (_names(kind), following) == ([cls.openai_type], "yes" if cls.retryable else "no"), code
        if isinstance(getattr(cls, "status", None), int):
            assert status == str(cls.status), code


# -- endpoints --------------------------------------------------------------------------------------------------------


def test_endpoints() -> None:
    """Every path and method has a heading, and every heading is served."""
    served = {f"POST {path}" for path in endpoints.ENDPOINTS} | {"POST /hooks/{name}"}
    served |= {f"POST /v1beta/models/{{model}}:{method}" for method in gemini.METHODS}
    served |= {f"GET {path}" for path in (*health.PATHS, status_events.PATH)}
    for rule in create_control_plane().url_map.iter_rules():
        path = re.sub(r"<(?:[^<>]*:)?(\w+)>", r"{\1}", rule.rule)
        served |= {f"{method} {path}" for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}}
    titles = re.findall(r"^### `(.*)`$", _page("reference/endpoints.md"), re.M)
    assert sorted(titles) == sorted(served)


def test_passed_paths() -> None:
    """The table of the paths that are passed through has each with its methods."""
    rows = list(_rows(_sections(_page("reference/endpoints.md"))["Passed through"]))
    documented = [(path, tuple(_names(row[1]))) for row in rows for path in _names(row[0])]
    served = [(f"/v1{each.endpoint.path}", each.methods) for each in passed_paths.PASSED]
    assert sorted(documented) == sorted(served)


def test_headers() -> None:
    """Every header that the data plane reads or writes is in a table: under `Headers`, or with the errors."""
    rows = _rows(_sections(_page("reference/endpoints.md"))["Headers"])
    told = {name.partition(":")[0] for row in [*rows, *_rows(_page("reference/errors.md"))] for name in _names(row[0])}
    used: set[str] = set()
    for room in ("asgi.request", "asgi.auth", "asgi.data_plane", "asgi.passthrough", "exchange.client_sink", "errors"):
        path = PACKAGE / f"{room.replace('.', '/')}.py"
        used |= set(re.findall(r'b"(x-[a-z-]+)"', path.read_text(encoding="utf-8")))
    assert {"x-request-timeout", "x-trigate-attempts", "x-should-retry"} <= used
    assert used <= told | {"x-forwarded-for", "x-real-ip"}  # which are only looked at to tell that there is a proxy


def test_required_fields() -> None:
    """The table of the data plane says what each path requires."""
    rows = _first_names(_sections(_page("reference/endpoints.md"))["Data plane"])
    documented = {path: tuple(_names(row[1])) for path, row in rows.items()}
    assert documented == {path: endpoint.required for path, endpoint in endpoints.ENDPOINTS.items()}


@pytest.mark.parametrize(
    ("title", "fates"),
    [
        ("Fields", fields.FIELDS),
        ("Blocks", fields.BLOCKS),
        ("Fields of a chat completion", client_fields.FIELDS),
        ("Parts of messages", client_fields.PARTS),
    ],
)
def test_formats(title: str, fates: dict[str, str]) -> None:
    """The tables of the translated format say what becomes of each field and block, in the order of the code."""
    rows = _first_names(_sections(_page("reference/formats.md"), "###")[title])
    assert [(name, row[1]) for name, row in rows.items()] == list(fates.items())


@pytest.mark.parametrize(
    ("title", "fates"),
    [
        ("Fields of /api/chat", ollama_fields.CHAT_FIELDS),
        ("Fields of /api/generate", ollama_fields.GENERATE_FIELDS),
        ("Fields of /api/embed", ollama_fields.EMBED_FIELDS),
        ("Options", ollama_fields.OPTIONS),
    ],
)
def test_ollama(title: str, fates: dict[str, str]) -> None:
    """So do those of Ollama's format."""
    rows = _first_names(_sections(_page("reference/ollama.md"), "###")[title])
    assert [(name, row[1]) for name, row in rows.items()] == list(fates.items())


@pytest.mark.parametrize(
    ("title", "fates"),
    [
        ("Fields", responses_fields.FIELDS),
        ("Items", responses_fields.ITEMS),
        ("Content", responses_fields.CONTENT),
        ("Tools", responses_fields.TOOLS),
    ],
)
def test_responses(title: str, fates: dict[str, str]) -> None:
    """So do those of response calls."""
    rows = _first_names(_sections(_page("reference/responses.md"), "###")[title])
    assert [(name, row[1]) for name, row in rows.items()] == list(fates.items())


def test_fields_of_bedrock() -> None:
    """The table of Bedrock's format says what becomes of each field, in the order of the code."""
    rows = _first_names(_sections(_page("reference/formats.md"), "###")["Fields for Bedrock"])
    assert [(name, row[1]) for name, row in rows.items()] == list(bedrock_fields.FIELDS.items())


def test_statuses_of_formats() -> None:
    """So does the table of error types."""
    rows = [row for row in _rows(_sections(_page("reference/formats.md"), "###")["Errors"]) if row[0][0].isdigit()]
    documented = {
        int(status): _names(row[1])[0] for row in rows for status in re.findall(r"\d+", row[0].partition(" (")[0])
    }
    assert documented == {**messages_errors.TYPE_OF_STATUS, 500: "api_error", 502: "api_error"}


@pytest.mark.parametrize(
    ("title", "fates"),
    [
        ("Fields", gemini_fields.FIELDS),
        ("generationConfig", gemini_fields.GENERATION_CONFIG),
        ("Parts", gemini_fields.PARTS),
    ],
)
def test_gemini(title: str, fates: dict[str, str]) -> None:
    """So do the tables of Gemini's format."""
    rows = _first_names(_sections(_page("reference/gemini.md"), "###")[title])
    assert [(name, row[1]) for name, row in rows.items()] == list(fates.items())


def test_statuses_of_gemini() -> None:
    """And its table of Google's statuses."""
    rows = list(_rows(_sections(_page("reference/gemini.md"), "###")["Errors"]))
    documented = {int(code): _names(row[1])[0] for row in rows for code in re.findall(r"^\d+|(?<=, )\d+", row[0])}
    assert documented == gemini_errors.STATUS_NAMES


# -- the command line -------------------------------------------------------------------------------------------------


def _documented_options(text: str) -> set[str]:
    return {name.split()[0] for row in _rows(text) for name in _names(row[0])}


def _options(command: click.Command) -> set[str]:
    return {
        name
        for option in command.params
        if isinstance(option, click.Option) and not option.hidden
        for name in option.opts
    }


def test_commands() -> None:
    """Every command has a section, and every such section is a command."""
    titles = [title for title in _sections(_page("reference/command-line.md")) if title.startswith("trigate ")]
    assert set(titles) == {f"trigate {name}" for name in cli.commands}
    intro = _page("reference/command-line.md").partition("## ")[0]
    assert _documented_options(intro) == _options(cli) | set(cli.context_settings["help_option_names"])


COMMANDS = {
    name: [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
    for name, command in cli.commands.items()
}
"""Each command, with those of a group."""


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_command_options(name: str) -> None:
    """The options of a command are in its section with the variables that stand for them; so are its arguments, and the
    commands of a group."""
    text = _sections(_page("reference/command-line.md"))[f"trigate {name}"]
    assert _documented_options(text) == {option for command in COMMANDS[name] for option in _options(command)}
    for command in COMMANDS[name][1:]:
        assert f"trigate {name} {command.name}" in text
    for command in COMMANDS[name]:
        for parameter in command.params:
            if isinstance(parameter, click.Argument):
                assert parameter.make_metavar(click.Context(command)) in text
            elif isinstance(parameter.envvar, str):
                assert f"`{parameter.envvar}`" in text


# -- the metrics ------------------------------------------------------------------------------------------------------


def test_metrics() -> None:
    """The table of metrics has every family with its kind, its labels and its help, in the order of the answer."""
    rows = [row for row in _rows(_sections(_page("reference/metrics.md"))["All metrics"]) if row[0].startswith("`")]
    documented = [(_names(row[0])[0], row[1], tuple(_names(row[2])), row[3]) for row in rows]
    assert documented == [
        (f"{each.name}{'_total' if each.kind == 'counter' else ''}", each.kind, each.labels, each.help)
        for each in FAMILIES
    ]


# -- the log ----------------------------------------------------------------------------------------------------------

LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}


def _logged() -> Iterator[tuple[str, str, set[str]]]:
    """Every event that is logged under a literal name, with its level and the keys that are written out."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="log"), attr=method),
                    args=[ast.Constant(value=str(event))],
                ) if method in LEVELS:
                    keys = {keyword.arg for keyword in node.keywords if keyword.arg}
                    yield event, LEVELS[method], keys - {"exc_info"}


@pytest.mark.slow
def test_log_events() -> None:
    """Every event is documented with its level and its keys, and none that does not exist is."""
    documented = _first_names(_page("reference/logging.md"))
    found: dict[str, tuple[str, set[str]]] = {}
    for event, level, keys in _logged():
        found[event] = (level, keys | found.get(event, ("", set()))[1])
    assert {event for event, row in documented.items() if row[1] in LEVELS} == set(found)
    for event, (level, keys) in found.items():
        assert documented[event][1] == level, event
        assert keys <= set(_names(documented[event][2])), event


# -- the design -------------------------------------------------------------------------------------------------------


def test_packages() -> None:
    """The table of packages names every package and top-level module, in the order that the layer test enforces."""
    documented = [name for row in _rows(_sections(_page("design.md"))["The packages"]) for name in _names(row[0])]
    assert documented == [name for row in ROWS for name in row]


def test_dependencies() -> None:
    """The table of dependencies has those that are declared and imported, and no others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[=<>]", each)[0] for each in project["dependencies"]}
    sources = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    imported = {name.replace("_", "-") for name in re.findall(r"^ *(?:from|import) (\w+)", sources, re.M)}
    _, *rows = _rows(_sections(_page("design.md"))["Dependencies"])
    documented = [name for row in rows if "(optional)" not in row[1] for name in row[1].split(", ")]
    assert sorted(documented) == sorted(declared & imported)


# -- links ------------------------------------------------------------------------------------------------------------


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """Every relative link leads to a file that is there, and to a heading that is in it."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        if anchor:
            assert anchor in _anchors(target.read_text(encoding="utf-8")), link


def test_index() -> None:
    """Every page is in the index."""
    links: set[Any] = {(DOCS / link).resolve() for link in re.findall(r"\]\(([^)#]+)\)", _page("index.md"))}
    assert {page.resolve() for page in PAGES} - {DOCS / "index.md"} <= links
