"""The files of the page: what a browser gets, and what its policy allows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import trigate.page
from tests.support.gateway import OpenApp, make_config
from trigate.page.assets import ASSETS, POLICY

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
STATIC = Path(trigate.page.__file__).parent / "static"


async def test_a_browser_gets_the_page_without_a_key(open_app: OpenApp) -> None:
    """The files are the same in every gateway; whatever they show needs the key."""
    async with open_app(make_config(keys={"ada": "the-key-of-ada"})) as served:
        page = await served.client.ask("GET", "/", headers=BROWSER)
        assert (page.status, page.header("content-type")) == (200, "text/html; charset=utf-8")
        assert page.header("content-security-policy") == POLICY
        assert page.header("vary") == "accept"
        for name, asset in ASSETS.items():
            found = await served.client.ask("GET", f"/page/{name}")
            assert (found.status, found.body, found.header("content-type")) == (200, asset.body, asset.content_type)
            assert found.header("x-content-type-options") == "nosniff"
        assert (await served.client.ask("GET", "/status", headers=BROWSER)).status == 401
        assert (await served.client.ask("GET", "/page/", headers=BROWSER)).status in (401, 404)
        assert (await served.client.ask("GET", "/page/none.js")).status == 404
        assert (await served.client.ask("GET", "/page/..%2f__init__.py")).status == 404


async def test_a_file_is_sent_once(open_app: OpenApp) -> None:
    """A browser that has a file asks with its ``ETag``, and gets 304 while it is the same."""
    async with open_app() as served:
        first = await served.client.ask("GET", "/page/app.js")
        again = await served.client.ask("GET", "/page/app.js", headers={"if-none-match": first.header("etag")})
        assert (again.status, again.body) == (304, b"")
        assert again.header("etag") == first.header("etag")
        other = await served.client.ask("GET", "/page/app.js", headers={"if-none-match": '"another"'})
        assert (other.status, other.body) == (200, first.body)


async def test_a_link_with_a_query(open_app: OpenApp) -> None:
    """Links to the page may have one: it is no parameter of the gateway's."""
    async with open_app() as served:
        assert (await served.client.ask("GET", "/?from=a-chat", headers=BROWSER)).status == 200


def test_the_policy() -> None:
    """Nothing is inline, and nothing is loaded from elsewhere."""
    assert "unsafe" not in POLICY
    assert POLICY.startswith("default-src 'none'")
    for name, asset in ASSETS.items():
        text = asset.body.decode()
        addresses = set(re.findall(r"https?://[\w.]+", text))
        assert addresses <= {"http://www.w3.org", "https://opencode.ai"}, name  # names, which nothing loads
        assert not re.search(
            r"\b(?:inner|outer)HTML\b|insertAdjacentHTML|document\.write|\beval\b|new Function", text
        ), name
        if name.endswith(".html"):
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)
            for path in re.findall(r"(?:src|href)=\"(/[^\"]+)\"", text):
                assert path.removeprefix("/page/") in ASSETS


@pytest.mark.parametrize("name", [name for name in ASSETS if name.endswith(".js")])
def test_imports(name: str) -> None:
    """Each module imports only files that are there, and names that they export."""
    for names, source in re.findall(r"import \{([^}]*)\} from \"\./([\w.]+)\"", ASSETS[name].body.decode()):
        exported = re.findall(r"export (?:async )?(?:function|const|class) (\w+)", ASSETS[source].body.decode())
        assert {each.strip() for each in names.split(",") if each.strip()} <= set(exported)


def test_every_file_is_served() -> None:
    """A file of another kind would be in the package for nothing."""
    assert {path.name for path in STATIC.iterdir()} == set(ASSETS)
