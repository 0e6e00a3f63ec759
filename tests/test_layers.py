"""The order of the rooms: imports point down only, and the pure rooms stay pure.

The order is the one in which a request walks the rooms, edge first. A room may import what stands below its row; rooms
of one row do not know each other. What is imported under ``if TYPE_CHECKING:`` is a name and no dependency.
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
    ("cli.commands",),
    ("cli.status_watch",),
    ("cli.client",),
    ("cli.status_view",),
    ("__init__",),  # its functions build the app; at import it depends on nothing, so every room may read __version__
    ("server.server", "server.asyncio_host"),
    (
        "server.supervisor",
        "server.connection",
        "server.listeners",
    ),  # the supervisor knows no server: it starts processes, and tells them who they are
    ("server.http1", "server.hot_restart"),
    ("asgi.application",),
    ("asgi.routes.health", "asgi.routes.hooks", "asgi.routes.models", "asgi.routes.sessions", "asgi.routes.status"),
    ("asgi.dispatch",),
    ("gateway.gateway", "asgi.request", "asgi.client"),
    ("status.snapshot", "webhooks.endpoint"),
    ("channels.service",),
    ("channels.telegram.adapter", "channels.slack.adapter"),
    ("channels.adapter", "channels.replies"),
    ("runs.service",),
    ("runs.execution", "exchange.shared_call"),
    ("runs.request",),
    ("exchange.exchange", "webhooks.callbacks"),
    ("exchange.attempt", "exchange.admission", "status.inflight"),
    ("sessions.service", "runs.outbox", "upstream.discovery", "ledger.ledger"),
    ("store.opening",),
    ("workers.membership",),
    ("upstream.upstream",),
    ("concurrency.fair_limiter",),
    (
        "upstream.local_model.process",
        "upstream.local_model.child",
        "upstream.echo",
        "upstream.transport",
        "exchange.socket_relay",
    ),
    ("upstream.connect",),
    ("logs", "server.client_stream"),
    (
        "upstream.response_parser",
        "concurrency.cancel_queue",
        "concurrency.poller",
        "concurrency.timers",
        "channels.live_message",
    ),
    ("store.sqlite", "store.memory"),
    ("store.sqlite_file",),
    ("store.operations", "store.tables", "sessions.compose", "webhooks.payload", "ledger.journal"),
    ("openai.accumulator", "store.interface"),
    ("routing.plan", "exchange.call_key"),
    ("routing.circuit_breaker", "routing.retry"),
    (
        "openai.stream",
        "routing.routes",
        "channels.slack.messages",
        "upstream.public_addresses",
        "channels.telegram.messages",
    ),
    ("server.request_parser", "server.response_head"),
    ("openai.sse", "server.request_head", "channels.message_split"),
    ("config.structure",),
    ("config.checks",),
    ("signatures", "concurrency.rate_limiter"),  # the configuration asks the former what is wrong with a secret
    ("errors",),
)
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}

PURE = (
    *(
        "server.request_head",
        "server.request_parser",
        "server.response_head",
        "openai.sse",
        "openai.stream",
        "routing.routes",
        "config.structure",
        "errors",
        "upstream.public_addresses",
    ),
    *("routing.plan", "routing.circuit_breaker", "routing.retry", "cli.status_view", "exchange.call_key"),
    *(
        "openai.accumulator",
        "sessions.compose",
        "webhooks.payload",
        "channels.message_split",
        "channels.slack.messages",
        "channels.telegram.messages",
        "signatures",
        "concurrency.rate_limiter",
    ),
)
"""No await, no clock, no randomness: time and seed are arguments."""
IMPURE_MODULES = {
    *("trio", "anyio", "asyncio", "httpx2", "quart", "quart_trio", "hypercorn"),
    *("time", "datetime", "random", "secrets", "uuid", "socket", "threading", "subprocess"),
}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
each_module = pytest.mark.parametrize("module", MODULES)


def _room(module: str) -> str:
    """The module itself; a package's ``__init__`` stands for the package, except for that of ``trigate``."""
    return module.removesuffix(".__init__")


def _is_docstring_only(tree: ast.Module) -> bool:
    return all(isinstance(node, ast.Expr) for node in tree.body)


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


def _rooms_imported(module: str, nodes: Iterator[ast.AST]) -> set[str]:
    found = set()
    for name in _imports(module, nodes):
        if name == "trigate":
            found.add("__init__")
        elif name.startswith("trigate."):
            found.add(_room(name.removeprefix("trigate.")))
    return {room for room in found if room in RANK} - {_room(module)}


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


def test_every_room_has_its_place() -> None:
    """A new module fails here until somebody has said where it stands, and a place without a module is removed."""
    rooms = {_room(module) for module, tree in MODULES.items() if not _is_docstring_only(tree)}
    assert rooms == set(RANK)
    assert len(RANK) == sum(map(len, ROWS))


@each_module
def test_arrows_point_down(module: str) -> None:
    """A room imports only rooms that stand below it."""
    up = {
        room
        for room in _rooms_imported(module, _run_time(MODULES[module]))
        # The package itself is nobody's dependency: importing it loads nothing (see below).
        if room != "__init__" and RANK[room] <= RANK.get(_room(module), len(ROWS))
    }
    assert up == set()


def test_importing_the_package_imports_nothing_of_it() -> None:
    """``import trigate`` is cheap: at module level it imports the standard library's typing, and no room."""
    top_level = (node for node in MODULES["__init__"].body if not _is_type_checking(node))
    assert set(_imports("__init__", top_level)) <= {"__future__", "typing"}


@pytest.mark.parametrize("module", [module for module in MODULES if _room(module) in PURE])
def test_pure_rooms_are_pure(module: str) -> None:
    """What can be decided from arguments does not wait, reads no clock, throws no dice and knows no server."""
    nodes = list(_run_time(MODULES[module]))
    imported = {name.partition(".")[0] for name in _imports(module, iter(nodes))}
    assert imported & IMPURE_MODULES == set()
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


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"cli.commands", "__main__", "upstream.local_model.child"}))
def test_only_the_edge_exits(module: str) -> None:
    """Nothing but what is a process's main ends the process: a library raises."""
    exits = [
        ast.unparse(node)
        for node in _run_time(MODULES[module])
        if (isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "exit", "quit"))
        or (isinstance(node, ast.Raise) and "SystemExit" in ast.unparse(node))
    ]
    assert exits == []
