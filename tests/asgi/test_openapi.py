"""The description of the API: it has every route and every error, as OpenAPI and as a page."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import re

import pytest

from tests.support.gateway import OpenApp, make_config
from trigate import errors
from trigate.asgi import api_page, health, openapi, operations, status_events
from trigate.asgi.control_plane import create_control_plane
from trigate.dialects import endpoints, gemini
from trigate.openai import passed_paths


@pytest.fixture(scope="module")
def document() -> operations.Json:
    """The document of this version."""
    return openapi.document(operations.operations_of(create_control_plane()))


def _described(document: operations.Json) -> set[str]:
    return {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}


def test_every_route_is_described(document: operations.Json) -> None:
    """The calls, the paths that are passed through, the probes, the webhooks and the views of the control plane."""
    served = {f"POST {path}" for path in endpoints.ENDPOINTS}
    served |= {f"POST /v1beta/models/{{model}}:{method}" for method in gemini.METHODS}
    served |= {f"{method} /v1{each.endpoint.path}" for each in passed_paths.PASSED for method in each.methods}
    served |= {f"GET {path}" for path in (*health.PATHS, status_events.PATH, "/v1/realtime", "/hooks/{name}")} | {
        "POST /hooks/{name}"
    }
    for rule in create_control_plane().url_map.iter_rules():
        path = re.sub(r"<(?:[^<>]*:)?(\w+)>", r"{\1}", rule.rule)
        served |= {f"{method} {path}" for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}}
    assert _described(document) == served


def test_every_error_is_described(document: operations.Json) -> None:
    """Each code is at its status, also where each operation that can answer with it refers to it."""
    responses = document["components"]["responses"]
    for form in ("openai", "anthropic", "gemini", "ollama"):
        codes = {code for name, each in responses.items() if name.startswith(form) for code in each["x-codes"]}
        assert codes >= errors.codes()
    assert "overloaded" in responses["openai_503"]["x-codes"]
    assert "upstream_rejected" in responses["openai_4XX"]["x-codes"]
    chat, status = (document["paths"][path] for path in ("/v1/chat/completions", "/status"))
    assert {"400", "401", "429", "502", "503", "504"} <= set(chat["post"]["responses"])
    assert {"502", "4XX"} & set(status["get"]["responses"]) == set()


def test_references_lead_somewhere(document: operations.Json) -> None:
    """Each reference names a component that is there, and each operation has an id of its own."""
    text = str(document)
    for kind, name in re.findall(r"'#/components/(\w+)/(\w+)'", text):
        assert name in document["components"][kind]
    ids = re.findall(r"'operationId': '(\w+)'", text)
    assert len(ids) == len(set(ids)) == len(_described(document))


def test_parameters(document: operations.Json) -> None:
    """Each placeholder of a path is a parameter, and so is what the control plane knows in a query."""
    for path, methods in document["paths"].items():
        for operation in methods.values():
            in_path = {each["name"] for each in operation.get("parameters", ()) if each["in"] == "path"}
            assert in_path == set(re.findall(r"\{(\w+)\}", path))
    limit, *_ = document["paths"]["/status/streams"]["get"]["parameters"]
    assert (limit["name"], limit["schema"]["maximum"]) == ("limit", 1000)
    messages = document["paths"]["/v1/sessions/{key}/messages"]["get"]["parameters"]
    assert [each["name"] for each in messages] == ["key", "limit", "after", "archived", "owner"]


def test_bodies(document: operations.Json) -> None:
    """A call needs the fields that the gateway requires; a key has the settings of the configuration."""
    chat = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert chat["schema"]["required"] == ["model", "messages"]
    assert set(chat["example"]) == {"model", "messages"}
    key = document["paths"]["/v1/keys"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert key["required"] == ["name"]
    assert {"rpm", "models", "expires_at"} <= set(key["properties"])
    assert key["properties"]["rpm"]["description"]


class _Page(html.parser.HTMLParser):
    """What a page has in it."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.loads: list[str] = []
        self.style = ""
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given["id"]} if "id" in given else set()
        self.links |= {given["href"]} if tag == "a" else set()
        if tag in ("script", "img", "iframe", "object", "embed") or "src" in given or "style" in given:
            self.loads.append(tag)
        if tag == "link" and not given["href"].startswith("data:"):
            self.loads.append(tag)
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        self.style += data if self._in_style else ""


def test_the_page_loads_nothing(document: operations.Json) -> None:
    """It has no script and no address of another server; its policy allows its own style alone, by its digest."""
    text = api_page.render(document).decode()
    page = _Page()
    page.feed(text)
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert page.loads == []
    assert f"style-src 'sha256-{digest}'" in api_page.POLICY
    assert "default-src 'none'" in api_page.POLICY
    assert "unsafe" not in api_page.POLICY
    assert set(re.findall(r"https?://[\w.]+", text)) == {"http://127.0.0.1"}


def test_the_page_has_everything(document: operations.Json) -> None:
    """Each operation has a section to which a link leads, and each code a row."""
    text = api_page.render(document).decode()
    page = _Page()
    page.feed(text)
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["operationId"] in page.ids
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert all(f"<code>{code}</code>" in text for code in errors.codes())


def test_names_are_text() -> None:
    """What stands in a description is shown, not interpreted."""
    operation = operations.Operation(method="GET", path="/<b>", group="<i>", summary="<script>", description="`<u>`")
    text = api_page.render(openapi.document([operation])).decode()
    assert not re.search(r"<(?:script|b>[^A-Z]|i>|u>)", text)


@pytest.mark.parametrize(
    ("path", "kind", "begins"),
    [
        ("/openapi.json", "application/json", b'{"openapi":"3.1.0"'),
        ("/docs", "text/html; charset=utf-8", b"<!doctype html>"),
        ("/llms.txt", "text/plain; charset=utf-8", b"# Trigate\n"),
    ],
)
async def test_it_is_served_without_a_key(open_app: OpenApp, path: str, kind: str, begins: bytes) -> None:
    """A browser can send none. Nothing of the configuration is in it."""
    config = make_config(models={"secret-alias": {"targets": ["up/m"]}}, keys={"ada": "the-key-of-ada"})
    async with open_app(config) as served:
        call = await served.client.ask("GET", path)
        assert (call.status, call.header("content-type")) == (200, kind)
        assert call.body.startswith(begins)
        assert b"secret-alias" not in call.body
        assert b"the-key-of-ada" not in call.body
        assert call.header("content-security-policy").startswith("default-src 'none'")
        assert (await served.client.ask("GET", "/status")).status == 401


async def test_methods_that_a_path_does_not_have(open_app: OpenApp) -> None:
    """The answer names those that it has, also of a path that is served elsewhere or by several handlers."""
    async with open_app() as served:
        for method, path, allowed in [
            ("PUT", "/", "GET, HEAD, OPTIONS"),
            ("PUT", "/status/events", "GET, OPTIONS"),
            ("PUT", "/v1/realtime", "GET"),
            ("PUT", "/v1/chat/completions", "GET, POST"),
            ("PUT", "/v1/embeddings", "POST"),
            ("DELETE", "/api/tags", "GET, HEAD, OPTIONS"),
        ]:
            call = await served.client.ask(method, path)
            assert (call.status, call.header("allow")) == (405, allowed), path


async def test_a_client_that_leaves_is_no_failure(open_app: OpenApp) -> None:
    """A client that has disconnected before its answer is made leaves no error in the log."""
    async with open_app() as served:
        call = served.client.start("GET", "/openapi.json")
        call.disconnect()
        await call.wait()
