"""The control plane is loaded by the first request to it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from tests.support.gateway import OpenApp
from tests.support.processes import environment
from tests.support.shortage import ERRORS, os_error
from trigate.asgi import lazy_control_plane

HEAVY = ("quart", "flask", "werkzeug", "jinja2", "hypercorn", "h2", "h11", "wsproto", "multiprocessing")


async def test_two_first_requests(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests that arrive while it is being loaded, in a thread, are answered by the same application."""
    monkeypatch.delitem(sys.modules, lazy_control_plane._MODULE)
    async with open_app() as served:
        first = served.client.start("GET", "/v1/models")
        second = served.client.start("GET", "/status")
        assert (await first.wait()).status == 200
        assert (await second.wait()).status == 200
        assert lazy_control_plane._MODULE in sys.modules


@pytest.mark.parametrize(
    "error", [*map(os_error, ERRORS), ImportError("no module"), RuntimeError("can't start new thread")], ids=str
)
async def test_it_cannot_be_loaded(open_app: OpenApp, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """That request gets 503 and the time to try again; the next one tries again, and other requests are served."""

    def refuse(name: str) -> None:
        raise error

    monkeypatch.delitem(sys.modules, lazy_control_plane._MODULE)
    async with open_app() as served:
        with monkeypatch.context() as patch:
            patch.setattr(importlib, "import_module", refuse)
            refused = await served.client.ask("GET", "/status")
            assert (refused.status, refused.header("retry-after")) == (503, "1")
            assert refused.json["error"]["code"] == "overloaded"
            assert (await served.client.ask("GET", "/health")).status == 200
        assert (await served.client.ask("GET", "/status")).status == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes(open_app: OpenApp, path: str) -> None:
    """Probes answer GET, HEAD and OPTIONS, and refuse other methods as every path does."""
    async with open_app() as served:
        got = await served.client.ask("GET", path)
        assert (got.status, got.header("content-type")) == (200, "application/json")
        head = await served.client.ask("HEAD", path)
        assert (head.status, head.body, head.header("content-length")) == (200, b"", str(len(got.body)))
        options = await served.client.ask("OPTIONS", path)
        assert (options.status, options.header("allow")) == (200, "GET, HEAD, OPTIONS")
        post = await served.client.ask("POST", path)
        assert (post.status, post.header("allow")) == (405, "GET, HEAD, OPTIONS")


@pytest.mark.slow
def test_what_a_start_imports() -> None:
    """The application of a gateway imports neither Quart nor another web server."""
    script = (
        f"import sys, trigate.asgi.application, trigate.server.server; print(sorted(set({HEAVY}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"
