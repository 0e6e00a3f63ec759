"""`trigate.store.opening`: where the store is, and when it is opened."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.gateway import make_config
from tests.support.processes import environment
from trigate.config.sections import Config, StoreConfig
from trigate.gateway.gateway import Gateway, open_gateway
from trigate.store import opening, sqlite

HOOKED = make_config(hooks={"ci": {}})


@pytest.fixture
def database() -> Iterator[Path]:
    """The path of the store's file, short enough for the name of a socket beside it."""
    with tempfile.TemporaryDirectory(prefix="tri") as directory:
        yield Path(directory) / "data" / "trigate.db"


async def _until(holds: Callable[[], Any]) -> None:
    with trio.fail_after(10):
        while not holds():  # noqa: ASYNC110 - other tasks do it, which say it to nobody
            await trio.sleep(0.005)


# -- location ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "env", "found"),
    [
        ("/a/b.db", {"TRIGATE_STORE": "/c.db"}, "/a/b.db"),
        (None, {"TRIGATE_STORE": "/c.db"}, "/c.db"),
        (":memory:", {"TRIGATE_STORE": "/c.db"}, ":memory:"),
        (None, {"TRIGATE_STORE": ":memory:"}, ":memory:"),
        ("here/b.db", {}, str(Path.cwd() / "here" / "b.db")),
        ("~/b.db", {}, str(Path.home() / "b.db")),
    ],
)
def test_location(path: str | None, env: dict[str, str], found: str) -> None:
    """The configuration takes precedence over the environment; a path is made absolute."""
    assert opening.location(StoreConfig(path=path), env) == found


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, {"TRIGATE_STORE": ""}], ids=["unset", "empty"])
def test_default_location(env: dict[str, str]) -> None:
    """The default is a file in the platform's directory for application data."""
    script = f"from trigate.store import opening; print(opening.location(opening.StoreConfig(), {env!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(HOME="/nobody", XDG_DATA_HOME="/nobody/data"),
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout.startswith("/nobody/")
    assert done.stdout.endswith("/trigate.db\n") or done.stdout.endswith("/trigate/trigate.db\n")


# -- when it is needed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "needed"),
    [
        ({}, False),
        ({"hooks": {}}, True),
        ({"hooks": {"ci": {}}}, True),
        ({"store": {"max_runs": 5}}, True),
        ({"sessions": {"wait_s": 1}}, True),
        ({"server": {"workers": 2}}, True),
        ({"server": {"port": 1}}, False),
    ],
    ids=str,
)
def test_what_needs_it(sections: dict[str, Any], needed: bool, tmp_path: Path) -> None:
    """The store is needed if the configuration uses it, if there are several workers, and if its file exists."""
    config = make_config(**sections)
    path = tmp_path / "trigate.db"
    assert opening.is_needed(config, str(path)) == needed
    path.touch()
    assert opening.is_needed(config, str(path))


@pytest.mark.slow
def test_a_worker_of_another_server(tmp_path: Path) -> None:
    """A server that starts its workers by multiprocessing may have several; they join each other in the store."""
    script = (
        "import multiprocessing, sys\n"
        "from trigate.config.sections import Config\n"
        "from trigate.store import opening\n"
        "def say(path):\n"
        "    print(opening.is_needed(Config(), path), flush=True)\n"
        "if __name__ == '__main__':\n"
        "    say(sys.argv[1])\n"
        "    process = multiprocessing.get_context('spawn').Process(target=say, args=(sys.argv[1],))\n"
        "    process.start()\n"
        "    process.join()\n"
    )
    path = tmp_path / "main.py"
    path.write_text(script)
    command = [sys.executable, str(path), str(tmp_path / "trigate.db")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.slow
def test_a_gateway_that_remembers_nothing(tmp_path: Path) -> None:
    """It serves `/status` without a file, and has imported only what it may need."""
    script = (
        "import sys, trio\n"
        "from trigate.config.sections import Config\n"
        "from trigate.gateway.gateway import open_gateway\n"
        "async def main():\n"
        "    async with open_gateway(Config()) as gateway:\n"
        "        await trio.testing.wait_all_tasks_blocked()\n"
        "        status = await gateway.status.status()\n"
        "        print(status.store.state, status.sessions.total, status.outbox.depth)\n"
        "        print([name for name in ('platformdirs', 'multiprocessing', 'quart') if name in sys.modules])\n"
        "import trio.testing\n"
        "trio.run(main)\n"
    )
    path = tmp_path / "trigate.db"
    env = environment(TRIGATE_STORE=str(path), TRIGATE_LOG_LEVEL="error")
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.stdout, done.stderr) == ("closed 0 0\n[]\n", "")
    assert list(tmp_path.iterdir()) == []


@contextlib.asynccontextmanager
async def _gateway(config: Config, database: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(config, env={"TRIGATE_STORE": str(database)}) as gateway:
        yield gateway


async def test_a_gateway_that_will_remember(database: Path) -> None:
    """The file exists soon after the start, and the worker has joined. So does the next gateway, whatever its
    configuration."""
    async with _gateway(HOOKED, database) as gateway:
        await _until(lambda: gateway.workers.is_joined)
        assert database.exists()  # noqa: ASYNC240 - a moment
    async with _gateway(make_config(), database) as gateway:
        await _until(lambda: gateway.workers.is_joined)


async def test_a_reload_that_needs_it(database: Path, tmp_path: Path) -> None:
    """A reloaded configuration that needs the store opens it, without a restart."""
    path = tmp_path / "trigate.toml"
    path.write_text('[upstreams.a]\nkind = "echo"\n')
    env = {"TRIGATE_STORE": str(database), "TRIGATE_CONFIG": str(path)}
    async with open_gateway(env=env) as gateway:
        await trio.testing.wait_all_tasks_blocked()
        assert not gateway.workers.is_joined
        path.write_text('[upstreams.a]\nkind = "echo"\n[hooks.ci]\n')
        gateway.reloader.request()
        await _until(lambda: gateway.workers.is_joined)


async def test_a_store_that_cannot_be_used(database: Path, logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway starts and serves; the worker joins as soon as the store can be used."""
    logs.expect_error("store_unavailable")
    monkeypatch.setattr(sqlite, "RETRY_S", 0.0)
    monkeypatch.setattr("trigate.workers.membership.RETRY_S", 0.02)
    database.parent.write_text("in the way")
    async with _gateway(HOOKED, database) as gateway:
        await _until(lambda: logs.named("heartbeat_failed"))
        assert gateway.not_ready() == []
        database.parent.unlink()
        await _until(lambda: gateway.workers.is_joined)
