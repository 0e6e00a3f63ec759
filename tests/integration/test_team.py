"""Every command of the how-to page on sharing a gateway with a team, run in order as written."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import standardwebhooks

from tests.support.processes import SERVE, environment, run_gateway
from tests.support.scripted_upstream import TEXT, open_upstream

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs/how-to/share-with-a-team.md").read_text(encoding="utf-8")
BLOCKS = [(language, text) for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)]
COMMANDS = [text for language, text in BLOCKS if language == "sh"]
CONFIGURATION, ALERTS = [text for language, text in BLOCKS if language == "toml"]
PRICE = """
[prices."openai/gpt-4o-mini"]
input_usd = "0.15"
output_usd = "0.6"
"""
"""That of the page's model: the gateway knows it by the provider's URL, which is another one here."""
HERE = "http://127.0.0.1:18888"
SECRETS = {
    "OPENAI_API_KEY": "the key at the provider",
    "TRIGATE_ADMIN_KEY": "0123456789abcdef-admin",
    "KEY_OF_CI": "0123456789abcdef-ci",
    "ALERTS_SECRET": "whsec_" + base64.b64encode(bytes(range(32))).decode(),
}
ASK = {"model": "fast", "max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}]}


@contextlib.contextmanager
def _receiver() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Receives alerts: yields its URL, and the list of the alerts, of which it has verified the signatures."""
    alerts: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            webhook = standardwebhooks.Webhook(SECRETS["ALERTS_SECRET"])
            webhook.verify(body, {name.lower(): value for name, value in self.headers.items()})
            alerts.append(json.loads(body))
            self.send_response(204)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/trigate", alerts
        finally:
            server.shutdown()
            thread.join()


def _secret_in(printed: str) -> str:
    """The secret that a command has printed on its last line."""
    secret = printed.splitlines()[-1]
    assert re.fullmatch(r"sk-trigate-[\w-]{43}", secret), printed
    return secret


def _keys_in(table: str) -> set[str]:
    """The keys that a report in CSV has."""
    return {line.split(",")[0] for line in table.splitlines()[1:]}


def test_the_page(tmp_path: Path) -> None:
    """A team gets its keys, uses them within their limits, and is reported; a spent budget is alerted."""
    with open_upstream() as upstream, _receiver() as (ops, alerts):
        config = f"{CONFIGURATION}\n{ALERTS}{PRICE}".replace("https://api.openai.com", upstream)
        config = config.replace("https://ops.example/trigate", ops)
        variables = {**SECRETS, "TRIGATE_STORE": str(tmp_path / "trigate.db")}
        commands = iter(COMMANDS)
        assert "trigate check" in next(commands)
        serve = next(commands).split()
        assert serve[:2] == ["trigate", "serve"]
        running = run_gateway(config, tmp_path, command=(*SERVE, *serve[2:]), env=variables)
        with running as gateway:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            env = environment(tmp_path / "trigate.toml", **variables, TRIGATE_URL=gateway.url, PATH=path)

            def run(command: str, begins: str) -> str:
                assert command.startswith(begins), command
                done = subprocess.run(
                    ["sh", "-c", command.replace(HERE, gateway.url)],
                    env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60,
                )  # fmt: skip
                assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
                assert '"error"' not in done.stdout, f"{command}\n{done.stdout}"
                return done.stdout

            def calls(secret: str, **more: Any) -> httpx2.Response:
                headers = {"authorization": f"Bearer {secret}"}
                return http.post("/v1/chat/completions", json={**ASK, **more}, headers=headers)

            with httpx2.Client(base_url=gateway.url, trust_env=False, timeout=30) as http:
                run(COMMANDS[0], "trigate check")
                ada = env["KEY_OF_ADA"] = _secret_in(run(next(commands), "trigate keys create ada"))
                assert TEXT in run(next(commands), "curl").encode().decode()
                bob = json.loads(run(next(commands), "curl"))["secret"]
                assert {"ada", "bob"} <= set(re.findall(r"\w+", run(next(commands), "trigate keys list")))

                headers = run(next(commands), "curl -si").lower()
                assert "x-ratelimit-limit-requests: 60" in headers
                assert "x-ratelimit-limit-tokens: 200000" in headers
                assert re.search(r"x-trigate-cost-usd: 0\.00000\d", headers)
                assert calls(ada, model="nobody/gpt").status_code in (403, 404)
                assert calls(ada, model="openai/gpt-4o").status_code == 200

                run(next(commands), "trigate keys update ada")
                assert "x-ratelimit-limit-tokens" not in calls(ada).headers
                env["KEY_OF_ADA"] = _secret_in(run(next(commands), "trigate keys rotate ada"))
                assert [calls(ada).status_code, calls(env["KEY_OF_ADA"]).status_code] == [200, 200]
                assert calls(bob).status_code == 200
                run(next(commands), "trigate keys revoke bob")
                time.sleep(1)
                assert [calls(bob).status_code for _ in range(4)] == [401] * 4

                assert re.search(r"ada +fast", run(next(commands), "trigate usage"))
                command, deadline = next(commands), time.monotonic() + 10
                while _keys_in(run(command, "curl")) != {"ada", "bob"}:  # the other worker's calls come later
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
                own = run(next(commands), "trigate usage --by model --api-key")
                assert "fast" in own
                assert "bob" not in own
                assert run(next(commands), "trigate exchanges").count("complete") >= 4
                assert list(commands) == []

                made = run("trigate keys create carl --budget-usd 0.00008 --budget-period day", "trigate")
                statuses = [calls(_secret_in(made)) for _ in range(10)]
                assert [answer.status_code for answer in statuses][::9] == [200, 429]
                assert statuses[-1].json()["error"]["code"] == "insufficient_quota"
                give_up_at = time.monotonic() + 10
                while not alerts and time.monotonic() < give_up_at:
                    time.sleep(0.05)
                assert [alert["type"] for alert in alerts] == ["alert.budget"]
                assert "carl" in alerts[0]["data"]["subject"]
            assert gateway.stop()[0] == 0
            errors = [line for line in gateway.log().splitlines() if "[error" in line or "Traceback" in line]
            assert errors == [], gateway.log()
