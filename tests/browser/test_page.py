"""The page at ``GET /`` in Chromium: its views, a chat, the key, and texts that are full of HTML."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.site import Site, open_site
from tests.support import slow
from tests.support.provider import DONE, Head, Pause, Say, Script, Stall, completion, content, role, says, usage

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow

VIEWS = ("Now", "History", "Usage", "Keys", "Sessions and channels", "Configuration", "Connect", "Playground")
CLIENTS = ("Claude Code", "Codex", "Gemini CLI", "opencode", "Cline", "Copilot CLI", "curl", "Python", "TypeScript")
EVIL = "<img src=x onerror=\"window.stolen='yes'\"><b>bold</b>"
AXE = Path(__file__).parent.parent / "node" / "node_modules" / "axe-core" / "axe.min.js"
ADMIN, ADA = "admin-key-of-the-tests", "ada-key-of-the-tests"
KEYS: Mapping[str, Any] = {"admin": {"key": ADMIN}, "keys": {"ada": {"secret": ADA, "rpm": 60, "budget_usd": 5}}}
_CALL = """(headers, model, content) => fetch("/v1/chat/completions", {
    method: "POST", headers: {"content-type": "application/json", ...headers},
    body: JSON.stringify({model, messages: [{role: "user", content}], stream: true})})"""
_WORDS = [(Say(content(f"{word} ")), Pause(0.25)) for word in ("one", "two", "three", "four", "five", "six")]
SLOWLY: Script = (Say(role()), *[step for steps in _WORDS for step in steps], Say(usage(3, 6)), Say(DONE))
FOREVER: Script = (Say(role()), Say(content("begun ")), Stall())


def _second() -> float:
    """A second on a machine that has nothing else to do; more on one that is busy."""
    return max(1.0, slow.limit_s() / slow.LIMIT_S)


def _open(page: Page, site: Site, view: str = "Now") -> None:
    page.goto(f"{site.url}/")
    page.wait_for_selector("#gateway:has-text('Running')")
    _show(page, view)


def _show(page: Page, view: str) -> None:
    page.click(f"nav >> text='{view}'")
    page.wait_for_selector(f"nav a[aria-current]:has-text('{view}')")


def _give_key(page: Page, key: str) -> None:
    page.wait_for_selector("dialog[open]")
    page.fill("#ask-key", key)
    page.keyboard.press("Enter")


def _send(page: Page, text: str, model: str = "up/m") -> None:
    page.get_by_label("Model", exact=True).fill(model)
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


# -- the views --------------------------------------------------------------------------------------------------------


def test_all_views_without_an_error(page: Page) -> None:
    """Each view opens by its link and by its address, no script fails, and nothing violates the page's policy."""
    with open_site({"up": (says("Hello"),)}) as site:
        _open(page, site)
        for view in VIEWS:
            _show(page, view)
            page.wait_for_timeout(300)
            assert page.title() == f"{view} – Trigate"
            assert page.locator(".failure").count() == 0, page.locator(".failure").all_inner_texts()
        page.goto(f"{site.url}/#usage")
        page.wait_for_selector("figure:has-text('Cost by day')")


def test_interactive_within_a_second(page: Page) -> None:
    """From the address to the first sample, with nothing in the browser's cache."""
    with open_site({"up": (says("Hello"),)}) as site:
        _open(page, site)  # the control plane is imported, and the browser is warm
        best = 10.0
        for _ in range(3):
            began = time.monotonic()
            page.goto(f"{site.url}/?{began}")
            page.wait_for_selector("li.card")
            best = min(best, time.monotonic() - began)
    assert best < _second()


# -- a chat -----------------------------------------------------------------------------------------------------------


def test_a_chat_streams_in(page: Page) -> None:
    """The words appear as they come, and then the measures of the answer: first token, rate, tokens, cost."""
    with open_site({"up": (SLOWLY,)}) as site:
        _open(page, site, "Playground")
        _send(page, "Count")
        answer = page.locator(".message.assistant .text")
        page.wait_for_selector(".message.assistant .text:has-text('one two')")
        assert "six" not in answer.inner_text()
        page.wait_for_selector(".message.assistant .text:has-text('six')")
        measures = page.locator(".message.assistant .measures")
        page.wait_for_selector(".message.assistant .measures a:has-text('req_')")
        for part in ("first token", "tokens/s", "3 + 6 tokens"):
            assert part in measures.inner_text()
        page.wait_for_selector(".message.assistant .measures:has-text('cost unknown')")
        sent = site.providers["up"].calls[0].json
        assert sent["messages"] == [{"role": "user", "content": "Count"}]
        assert sent["stream"] is True


def test_parameters_and_regenerate(page: Page) -> None:
    """The system prompt, the parameters and an image are sent; the answer is made again without the first one."""
    with open_site({"up": (says("first"), says("second"))}) as site:
        _open(page, site, "Playground")
        page.get_by_text("System prompt and parameters").click()
        page.get_by_label("System prompt", exact=True).fill("Be brief.")
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("Most tokens").fill("9")
        picture = {"name": "dot.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\n"}
        page.get_by_label("Images").set_input_files(picture)  # type: ignore[arg-type]
        page.wait_for_selector("text=Remove")
        _send(page, "Hi")
        page.wait_for_selector(".message.assistant .text:has-text('first')")
        page.get_by_role("button", name="Regenerate").click()
        page.wait_for_selector(".message.assistant .text:has-text('second')")
        assert page.locator(".message.assistant").count() == 1
        first, again = (call.json for call in site.providers["up"].calls)
        assert first == again
        assert (first["temperature"], first["max_tokens"]) == (0.5, 9)
        assert first["messages"][0] == {"role": "system", "content": "Be brief."}
        [text, image] = first["messages"][1]["content"]
        assert text == {"type": "text", "text": "Hi"}
        assert image["image_url"]["url"].startswith("data:image/png;base64,iVBORw")
        page.get_by_text("This call as code").click()
        for what in ("curl command", "Python program", "TypeScript program"):
            assert "Be brief." in page.get_by_role("region", name=what).inner_text()


def test_two_models_side_by_side(page: Page) -> None:
    """Both get the message, and each answer is in its own column. At the next turn each gets its own answer back."""
    with open_site({"up": (says("left"),), "other": (says("right"),)}) as site:
        _open(page, site, "Playground")
        page.get_by_label("Compare with").fill("other/m")
        for turn in (1, 2):
            _send(page, "Hi")
            page.locator(".message.assistant").nth(2 * turn - 1).wait_for()
            page.wait_for_selector("button[type=submit]:has-text('Send'):enabled")
        chats = page.locator(".chat")
        assert [chats.nth(index).locator("h3").inner_text() for index in (0, 1)] == ["up/m", "other/m"]
        assert chats.nth(1).locator(".message.assistant .text").all_inner_texts() == ["right", "right"]
        assert [message["content"] for message in site.providers["other"].calls[1].json["messages"]] == [
            "Hi",
            "right",
            "Hi",
        ]


def test_stop_cancels_the_upstream(page: Page) -> None:
    """The upstream's connection is closed."""
    with open_site({"up": (FOREVER,)}) as site:
        _open(page, site, "Playground")
        _send(page, "Hi")
        page.wait_for_selector(".message.assistant .text:has-text('begun')")
        provider = site.providers["up"]
        assert site.ask(lambda: provider.open_now) == 1
        page.get_by_role("button", name="Stop").click()
        site.wait("the end of the upstream's call", lambda: provider.open_now == 0)
        assert provider.calls[0].ended == "closed"
        page.wait_for_selector(".message.assistant .measures:has-text('stopped')")


# -- now --------------------------------------------------------------------------------------------------------------


def test_a_stream_is_shown_and_cancelled(page: Page) -> None:
    """A stream is in the list with its phase, and the button ends it: its client is told."""
    with open_site({"up": (FOREVER,)}) as site:
        _open(page, site, "Playground")
        _send(page, "Hi")
        page.wait_for_selector(".message.assistant .text:has-text('begun')")
        _show(page, "Now")
        row = page.get_by_role("region", name="Exchanges in flight").locator("tbody tr")
        row.locator("text=streaming").wait_for()
        assert "up/m" in row.inner_text()
        row.get_by_role("button", name=re.compile("^Cancel req_")).click()
        provider = site.providers["up"]
        site.wait("the end of the upstream's call", lambda: provider.open_now == 0)
        row.wait_for(state="detached")
        _show(page, "Playground")
        page.wait_for_selector(".message.assistant .failure")


def test_a_killed_upstream_turns_red(page: Page) -> None:
    """Within a second after the first call that has found out."""
    with open_site({"up": (says("Hello"),)}, models={"default": {"targets": ["up/m"]}}, retries={}) as site:
        _open(page, site, "Playground")
        _send(page, "Hi", "default")
        page.wait_for_selector(".message.assistant .text:has-text('Hello')")
        _show(page, "Now")
        page.wait_for_selector("li.card.good:has-text('up')")
        site.kill("up")
        began = time.monotonic()
        status = page.evaluate(f"({_CALL})({{}}, 'default', 'Hi').then((answer) => answer.status)")
        page.wait_for_selector("li.card.bad:has-text('down')")
        assert time.monotonic() - began < _second()
        assert status >= 500
        page.wait_for_selector("#news:has-text('Upstream up is down')", state="attached")


def test_a_gateway_that_is_gone(page: Page) -> None:
    """The page says so, and goes on asking."""
    with open_site({"up": (says("Hello"),)}) as site:
        _open(page, site)
        page.route("**/status/events", lambda route: route.abort())
        page.evaluate("document.getElementById('key').click()")
        page.fill("#ask-key", "any")
        page.keyboard.press("Enter")  # the stream begins anew with the key
        page.wait_for_selector("#gateway.bad:has-text('cannot be reached')")
        page.unroute("**/status/events")
        page.wait_for_selector("#gateway:has-text('Running')")


def test_many_streams_do_not_freeze_it(page: Page) -> None:
    """Ten thousand exchanges in flight are a count, and two hundred rows; a click is answered meanwhile."""
    rows: list[dict[str, Any]] = [
        {"id": f"req_{n}", "key": "", "model": "up/m", "stream": True, "phase": "streaming", "age_s": n, "events": n,
         "attempts": [], "worker": "w", "deadline_left_s": None, "cost_microusd": 1, "tokens_per_s": 1.0}
        for n in range(200)
    ]  # fmt: skip
    with open_site({"up": (says("Hello"),)}) as site:
        _open(page, site)
        status = page.evaluate("fetch('/status').then((answer) => answer.json())")
        sample: dict[str, Any] = {
            "at": 0,
            "status": status,
            "streams": {"object": "list", "data": rows, "count": 10_000, "missing_workers": []},
        }
        events = ""
        for turn in range(40):  # twenty seconds of samples at once
            sample["at"] = 1000 + turn / 2
            for row in rows:
                row["events"] += 1
            events += f"data: {json.dumps(sample)}\n\n"
        page.route("**/status/events", lambda route: route.fulfill(content_type="text/event-stream", body=events))
        began = time.monotonic()
        page.goto(f"{site.url}/?many")
        page.wait_for_selector("text=The oldest 200 of 10,000")
        _show(page, "Connect")
        page.wait_for_selector("h2:has-text('Claude Code')")
        assert time.monotonic() - began < 10.0


# -- what has been ----------------------------------------------------------------------------------------------------


def test_history(page: Page) -> None:
    """An exchange is found by its id; opened, it has its attempts, their times, its error, and a curl command."""
    failing = (Head(500, "application/json"), Say(b'{"error": {"message": "no"}}'))
    models = {"both": {"targets": ["bad/m", "up/m"]}}
    with open_site({"up": (SLOWLY,), "bad": (failing,)}, models=models) as site:
        _open(page, site, "Playground")
        _send(page, "Hi", "both")
        page.wait_for_selector(".message.assistant .text:has-text('six')")
        _send(page, "Hi", "bad/m")
        page.wait_for_selector(".message.assistant .failure")
        _show(page, "History")
        page.wait_for_selector("text=2 exchanges")
        page.get_by_label("Model", exact=True).fill("both")
        page.get_by_role("button", name="Search").click()
        page.wait_for_selector("text=1 exchanges")
        page.locator("tbody button.link").click()
        panel = page.locator("section.panel")
        line = panel.get_by_role("img").get_attribute("aria-label") or ""
        for part in ("1. ", "2. connects, until the head", "2. until the first token", "2. answer"):
            assert part in line
        assert panel.locator("tbody tr").count() == 2
        assert "curl" in panel.inner_text()
        panel.get_by_role("button", name="Close").click()
        page.get_by_label("Model", exact=True).fill("")
        page.get_by_label("Failed only").check()
        page.get_by_role("button", name="Search").click()
        page.locator("tbody button.link").click()
        assert "It ended with" in panel.locator(".failure").inner_text()


def test_usage(page: Page) -> None:
    """The use is drawn and listed, and the CSV has the same rows."""
    with open_site({"up": (SLOWLY,)}) as site:
        _open(page, site, "Playground")
        _send(page, "Hi")
        page.wait_for_selector(".message.assistant .measures a")
        _show(page, "Usage")
        page.get_by_label("By", exact=True).select_option("model")
        page.get_by_label("Plot", exact=True).select_option("calls")
        row = page.get_by_role("region", name="Usage").locator("tr:has-text('up/m')")
        row.wait_for()
        page.wait_for_selector("figure:has-text('Calls by model')")
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Download CSV").click()
        text = Path(waiting.value.path()).read_text(encoding="utf-8")
        assert text.splitlines()[0].startswith("model,calls")
        assert text.splitlines()[1].startswith("up/m,1,")


# -- keys -------------------------------------------------------------------------------------------------------------


def test_the_key(page: Page) -> None:
    """Without a key the page asks for one, and again after a wrong one. It stores it nowhere."""
    with open_site({"up": (says("Hello"),)}, **KEYS) as site:
        page.goto(f"{site.url}/")
        _give_key(page, "a-wrong-key")
        page.wait_for_selector("#ask-why:has-text('Incorrect')")
        _give_key(page, ADA)
        page.wait_for_selector("#gateway:has-text('Running')")
        assert page.locator("dialog[open]").count() == 0
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert page.context.cookies() == []
        page.get_by_role("button", name="Forget the key").click()
        page.wait_for_selector("dialog[open]")
        page.keyboard.press("Escape")
        page.wait_for_selector("#gateway.bad")


def test_a_key_sees_its_own(page: Page, context: Any) -> None:
    """A key sees its own streams and no configuration; the admin's key sees and cancels all."""
    with open_site({"up": (FOREVER,)}, **KEYS) as site:
        page.goto(f"{site.url}/")
        _give_key(page, ADMIN)
        page.wait_for_selector("#gateway:has-text('Running')")
        _show(page, "Playground")
        _send(page, "Hi")
        page.wait_for_selector(".message.assistant .text:has-text('begun')")
        other = context.new_page()
        other.goto(f"{site.url}/")
        _give_key(other, ADA)
        other.wait_for_selector("#gateway:has-text('Running')")
        other.wait_for_selector("li.card")
        other.wait_for_selector("text=No call is in flight.")
        _show(other, "Configuration")
        other.wait_for_selector("text=Only the admin's key may see the configuration.")
        _show(other, "Keys")
        other.wait_for_selector("text=Its name is ada.")
        assert "60 of 60 left" in other.locator("main").inner_text()
        other.close()
        _show(page, "Now")
        page.wait_for_selector("tbody tr:has-text('key admin')")


def test_keys_are_made_changed_and_revoked(page: Page) -> None:
    """The secret is shown once, and works; a limit is changed; a revoked key is marked."""
    with open_site({"up": (says("Hello"),)}, **KEYS) as site:
        page.goto(f"{site.url}/#keys")
        _give_key(page, ADMIN)
        page.wait_for_selector("text=No key has been made yet.")
        page.wait_for_selector("tr:has-text('ada'):has-text('60 of 60 left')")
        page.get_by_label("Name", exact=True).fill("bob")
        page.get_by_label("Requests per minute").fill("7")
        page.get_by_role("button", name="Create the key").click()
        secret = page.get_by_role("region", name="secret").inner_text()
        assert secret.startswith("sk-trigate-")
        page.wait_for_selector("tr:has-text('bob'):has-text('7 of 7 left')")
        page.get_by_role("button", name="Change bob").click()
        page.get_by_label("Requests per minute").fill("9")
        page.get_by_role("button", name="Change the key").click()
        page.wait_for_selector("tr:has-text('bob'):has-text('9 of 9 left')")
        page.get_by_role("button", name="Rotate bob").click()
        page.get_by_role("button", name="Rotate bob: the old secret ends now").click()
        page.locator("[aria-label=secret]", has_not_text=secret).wait_for()
        page.get_by_role("button", name="Revoke bob").click()
        page.get_by_role("button", name="Revoke bob for good").click()
        page.wait_for_selector("tr:has-text('bob') .badge.bad:has-text('revoked')")


def test_sessions(page: Page) -> None:
    """A session is listed, opened and reset."""
    with open_site({"up": (says("Remembered"),)}) as site:
        _open(page, site)
        page.evaluate(f"({_CALL})({{'x-session-key': 'talk'}}, 'up/m', 'Hi there').then((answer) => answer.text())")
        _show(page, "Sessions and channels")
        page.get_by_role("button", name="talk", exact=True).click()
        page.wait_for_selector("section.panel:has-text('Hi there'):has-text('Remembered')")
        page.get_by_role("button", name="Reset talk").click()
        page.get_by_role("button", name="Reset talk").click()
        page.wait_for_selector("#news:has-text('talk is reset')", state="attached")


def test_configuration(page: Page) -> None:
    """What is set is shown, secrets are not, and what does not work is a warning."""
    secret = "sk-a-secret-of-the-tests"
    upstreams: dict[str, dict[str, Any]] = {"up": {"api_key": secret}, "off": {"api_key": {"env": "NOT_SET"}}}
    with open_site({"up": (says("Hello"),), "off": ()}, upstreams) as site:
        _open(page, site, "Configuration")
        page.wait_for_selector("pre:has-text('[upstreams.up]')")
        page.wait_for_selector(".warning:has-text('upstreams.off is disabled')")
        page.get_by_label("Also those that are as by default").check()
        page.wait_for_selector("pre:has-text('drain_timeout_s = 30')")
        text = page.content()
        assert secret not in text
        assert "•••" in text
        assert "NOT_SET" in text


def test_connect(page: Page) -> None:
    """The configurations have the address of this gateway, the chosen model, and the key if that is wanted."""
    with open_site({"up": (says("Hello"),)}, **KEYS) as site:
        page.goto(f"{site.url}/#connect")
        _give_key(page, ADA)
        page.get_by_label("Model").fill("a b/$(x)")
        for client in (
            "Claude Code",
            "Codex",
            "Gemini CLI",
            "opencode",
            "Cline",
            "Copilot CLI",
            "curl",
            "Python",
            "TypeScript",
        ):
            assert site.url in page.get_by_role("region", name=f"configuration for {client}", exact=True).inner_text()
        claude = page.get_by_role("region", name="configuration for Claude Code")
        assert "claude --model 'a b/$(x)'" in claude.inner_text()
        assert ADA not in page.content()
        page.get_by_label("With the key of this page").check()
        assert f"ANTHROPIC_AUTH_TOKEN={ADA}" in claude.inner_text()


# -- texts of others, and readers -------------------------------------------------------------------------------------


def test_html_stays_text(page: Page) -> None:
    """Ids of models, messages, answers, reasoning, errors, request ids and sessions that are HTML are shown as such."""
    refusing = (Head(400, "application/json"), Say(json.dumps({"error": {"message": EVIL, "code": EVIL}}).encode()))
    upstreams = {"up": {"models": [EVIL]}, "bad": {"models": [EVIL]}}
    with open_site({"up": (says(EVIL),), "bad": (refusing,)}, upstreams) as site:
        _open(page, site, "Playground")
        _send(page, EVIL, f"up/{EVIL}")
        page.wait_for_selector(".message.assistant .measures a")
        assert page.locator(".message .text").all_inner_texts() == [EVIL, EVIL]
        _send(page, EVIL, f"bad/{EVIL}")
        assert EVIL in page.locator(".message .failure").first.inner_text()
        named = {"x-session-key": re.sub(r"[^!-.0-~]", "", EVIL), "x-request-id": re.sub(r"[^!-~]", "", EVIL)}
        page.evaluate(f"(given) => ({_CALL})(...given).then((answer) => answer.text())", [named, f"up/{EVIL}", EVIL])
        for view in VIEWS:
            _show(page, view)
            page.wait_for_timeout(700)
            if view == "History":
                page.locator("tbody button.link").first.click()
                page.wait_for_selector("section.panel")
            assert page.locator("main b, main img:not([src^='data:'])").count() == 0
        assert page.evaluate("window.stolen") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_barrier(page: Page, scheme: Any) -> None:
    """axe finds nothing serious in any view, nor in the dialog for the key."""
    if not AXE.exists():
        pytest.skip("axe-core is not installed: ./scripts/test installs it with the other clients of Node")
    axe = AXE.read_text(encoding="utf-8")
    found: list[str] = []

    def examine(what: str) -> None:
        page.evaluate(axe)
        result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        for violation in result["violations"]:
            if violation["impact"] in ("serious", "critical"):
                targets = [node["target"] for node in violation["nodes"][:3]]
                found.append(f"{what}: {violation['id']} {targets} {violation['help']}")

    page.emulate_media(color_scheme=scheme)
    models = {"both": {"targets": ["bad/m", "up/m"]}}
    failing = (Head(500, "application/json"), Say(b'{"error": {"message": "no"}}'))
    with open_site({"up": (says("Hello"),), "bad": (failing,)}, models=models, **KEYS) as site:
        page.goto(f"{site.url}/")
        page.wait_for_selector("dialog[open]")
        examine("the dialog")
        _give_key(page, ADMIN)
        page.wait_for_selector("#gateway:has-text('Running')")
        _show(page, "Playground")
        _send(page, "Hi", "both")
        page.wait_for_selector(".message.assistant .measures a")
        for view in VIEWS:
            _show(page, view)
            page.wait_for_timeout(600)
            if view == "History":
                page.locator("tbody button.link").first.click()
            if view in ("Playground", "Keys"):
                page.locator("summary").first.click()
            examine(view)
    assert found == []


def test_keyboard(page: Page) -> None:
    """The first stop leads to the content; a view opens by the keyboard, and then the focus is in it."""
    with open_site({"up": (says("Hello"),)}) as site:
        page.goto(f"{site.url}/#now")
        page.wait_for_selector("li.card")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        page.locator("nav a", has_text="Connect").focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("h2:has-text('Claude Code')")
        assert page.evaluate("document.activeElement.id") == "main"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.matches('main *')")


def test_phone(page: Page) -> None:
    """Nothing is wider than a phone, in any view."""
    page.set_viewport_size({"width": 360, "height": 740})
    models = {"a-rather-long-name-of-a-model-that-does-not-break-anywhere": {"targets": ["up/m"]}}
    with open_site({"up": (says("Hello " + "x" * 200),)}, models=models, **KEYS) as site:
        page.goto(f"{site.url}/")
        _give_key(page, ADMIN)
        page.wait_for_selector("#gateway:has-text('Running')")
        _show(page, "Playground")
        _send(page, "y" * 200, "a-rather-long-name-of-a-model-that-does-not-break-anywhere")
        page.wait_for_selector(".message.assistant .measures a")
        for view in VIEWS:
            _show(page, view)
            page.wait_for_timeout(600)
            if view == "History":
                page.locator("tbody button.link").first.click()
            width = page.evaluate("document.scrollingElement.scrollWidth")
            assert width <= 360, (view, width)


def test_a_json_answer(page: Page) -> None:
    """Without streaming, the answer comes as a whole."""
    script = (Head(200, "application/json"), Say(completion("As a whole")))
    with open_site({"up": (script,)}) as site:
        _open(page, site, "Playground")
        page.get_by_text("System prompt and parameters").click()
        page.get_by_label("Stream the answer").uncheck()
        _send(page, "Hi")
        page.wait_for_selector(".message.assistant .text:has-text('As a whole')")
