"""The order of the packages: imports point down only, no module is part of a cycle, and pure modules stay pure.

A package may import the packages below its row; packages of one row do not import each other. Imports for type checkers
count: a type that a module needs is a dependency.
"""

from __future__ import annotations

import ast
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import trigate

PACKAGE = Path(trigate.__file__).parent

ROWS = (
    ("__main__",),
    ("cli",),
    ("__init__",),  # `trigate:app`, which is built at its first call
    ("asgi",),
    ("gateway",),
    ("status",),
    ("webhooks",),
    ("channels",),
    ("runs",),
    ("exchange",),
    ("ledger", "sessions", "quotas"),
    ("keys",),
    ("workers",),
    ("upstream",),
    ("routing",),
    ("store",),
    ("dialects", "prices"),
    ("openai",),
    ("server", "tracing"),
    ("concurrency",),
    ("config",),
    ("content_coding", "metrics", "page", "signatures"),
    ("errors", "logs", "tracebacks", "version"),
)
RANK = {package: rank for rank, row in enumerate(ROWS) for package in row}

PURE = (
    *("errors", "tracebacks", "content_coding", "signatures", "config", "dialects", "openai", "routing"),
    *("metrics", "prices", "keys.key"),
    *("quotas.counters", "quotas.answer_sizes", "quotas.headers", "quotas.periods", "quotas.refusals"),
    "concurrency.rate_limiter",
    *("server.request_head", "server.request_parser", "server.response_head", "upstream.public_addresses"),
    *("upstream.no_proxy",),
    *("exchange.call_key", "exchange.affinity_key", "sessions.compose", "webhooks.payload"),
    *("exchange.semantic_conventions", "tracing.context", "tracing.span"),
    *("cli.status_view", "status.schema"),
    *("channels.message_split", "channels.slack.messages", "channels.telegram.messages"),
)
"""Packages and modules without an await, a clock or randomness: time and seed are arguments."""
DATES = {"config.checks", "prices.published", "quotas.headers", "quotas.periods"}
"""Pure modules that read or write a date, but no clock."""
IMPURE_MODULES = {
    *("trio", "anyio", "asyncio", "httpx2", "quart", "quart_trio", "hypercorn"),
    *("time", "datetime", "random", "secrets", "uuid", "socket", "threading", "subprocess"),
}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
each_module = pytest.mark.parametrize("module", MODULES)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below this one that exists when the program runs."""
    for child in ast.iter_child_nodes(node):
        if _is_type_checking(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield other
                yield from _run_time(other)
        else:
            yield child
            yield from _run_time(child)


def _imports(module: str, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The absolute dotted names of what is imported; of ``from a import b``, ``a.b`` where that is a module of ours."""
    here = ["trigate", *module.split(".")]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # An `__init__` is its package: one part less.
            base = here[: len(here) - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}".removeprefix("trigate.")
                yield f"trigate.{inner}" if inner in MODULES or f"{inner}.__init__" in MODULES else source


def _modules_imported(module: str) -> set[str]:
    """The modules of ours that a module imports anywhere, also within functions and for type checkers alone."""
    names = {name.removeprefix("trigate.") for name in _imports(module, ast.walk(MODULES[module]))}
    found = {name if name in MODULES else f"{name}.__init__" for name in names}
    return (found & MODULES.keys()) - {module}


GRAPH = {module: _modules_imported(module) for module in MODULES}


def _is_pure(module: str) -> bool:
    return any(f"{module}.".startswith(f"{pure}.") for pure in PURE)


def _own_scope(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of the functions inside it."""
    for child in ast.iter_child_nodes(function):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from _own_scope(child)


def _functions(tree: ast.AST, path: str = "") -> Iterator[tuple[str, ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(tree):
        name = (
            f"{path}.{child.name}" if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else path
        )
        if isinstance(child, ast.AsyncFunctionDef):
            yield name.lstrip("."), child
        yield from _functions(child, name)


def test_every_package_has_its_place() -> None:
    """A new package fails here until it has a row, and a row without a package is removed."""
    assert {_package(module) for module in MODULES} == set(RANK)
    assert len(RANK) == sum(map(len, ROWS))


@each_module
def test_arrows_point_down(module: str) -> None:
    """A module imports only from its own package and from packages below its row."""
    here = _package(module)
    up = {other for other in GRAPH[module] if _package(other) != here and RANK[_package(other)] <= RANK[here]}
    assert up == set()


def test_no_cycles() -> None:
    """No module imports itself through others."""
    waiting = dict(GRAPH)
    while leaves := [module for module, others in waiting.items() if not others & waiting.keys()]:
        for module in leaves:
            del waiting[module]
    assert not waiting, f"in a cycle, or importing one: {sorted(waiting)}"


def test_importing_the_package_imports_nothing_of_it() -> None:
    """``import trigate`` is cheap: at module level it imports the standard library's typing and the version."""
    top_level = (node for node in MODULES["__init__"].body if not _is_type_checking(node))
    assert set(_imports("__init__", top_level)) <= {"__future__", "typing", "trigate.version"}


@pytest.mark.parametrize("module", [module for module in MODULES if _is_pure(module)])
def test_pure_modules_are_pure(module: str) -> None:
    """What can be decided from arguments does not wait, reads no clock, throws no dice and knows no server."""
    nodes = list(_run_time(MODULES[module]))
    imported = {name.partition(".")[0] for name in _imports(module, iter(nodes))}
    assert imported & IMPURE_MODULES <= ({"datetime"} if module in DATES else set())
    waits = [
        ast.unparse(node)[:60]
        for node in nodes
        if isinstance(node, ast.Await | ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith)
        or (isinstance(node, ast.comprehension) and node.is_async)
    ]
    assert waits == []


@each_module
def test_examples_in_docstrings(module: str) -> None:
    """What a docstring shows as an example is what happens."""
    if ">>> " in ast.unparse(MODULES[module]):
        found = doctest.testmod(importlib.import_module(f"trigate.{module}"))
        assert found.attempted > 0
        assert found.failed == 0


@each_module
def test_every_module_says_what_it_is(module: str) -> None:
    """Each module opens with a docstring that begins with a sentence."""
    docstring = ast.get_docstring(MODULES[module])
    assert docstring
    assert docstring[0].isupper() or docstring[0] == "`"


@each_module
def test_no_async_generators(module: str) -> None:
    """A cancellation can land between the yields of an async generator: there are none but context managers.

    The one exception is the echo's body, which is an async iterable by the transport's interface, and holds no scope,
    nursery or resource across its yields.
    """
    allowed = {("upstream.echo", "_Events.__aiter__")}
    found = {
        (module, name)
        for name, function in _functions(MODULES[module])
        if any(isinstance(node, ast.Yield) for node in _own_scope(function))
        and not any(ast.unparse(each).endswith("asynccontextmanager") for each in function.decorator_list)
    }
    found |= {
        (module, ast.unparse(node))
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.GeneratorExp)
        and (
            any(each.is_async for each in node.generators)
            or any(isinstance(inner, ast.Await) for inner in ast.walk(node.elt))
        )
    }
    assert found <= allowed


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__main__", "upstream.local_model.child"}))
def test_only_the_edge_exits(module: str) -> None:
    """Nothing but what is a process's main ends the process: a library raises."""
    exits = [
        ast.unparse(node)
        for node in _run_time(MODULES[module])
        if (isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "exit", "quit"))
        or (isinstance(node, ast.Raise) and "SystemExit" in ast.unparse(node))
    ]
    assert exits == []
