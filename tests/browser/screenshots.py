"""Makes the pictures of the page in ``docs/images``; ``scripts/screenshots`` runs it.

They show a running gateway with scripted upstreams, so every number in them was measured.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import threading
from pathlib import Path

import httpx2
from playwright.sync_api import Page, sync_playwright

from tests.browser.site import open_site
from tests.support.provider import DONE, Pause, Say, Script, content, role, usage
from trigate.store import opening

IMAGES = Path(__file__).parents[2] / "docs" / "images"
_POEM = (
    "A nursery opens, and tasks begin; each one is watched, each one kept in. When one of them fails the rest are "
    "told, and none of them drifts off into the cold. The block will not end till the last has come home: no thread "
    "left running, no task left to roam."
)
_PROSE = (
    "Structured concurrency ties the life of a task to a block of code. The block starts its tasks in a nursery, and "
    "it does not end before they do. If one fails, the others are cancelled, and the error arrives where the nursery "
    "was opened. So a function that has returned has left nothing behind."
)


def _says(text: str, pause_s: float) -> Script:
    words = text.split()
    steps = [step for word in words for step in (Say(content(f"{word} ")), Pause(pause_s))]
    return (Pause(0.15), Say(role()), *steps, Say(usage(31, len(words))), Say(DONE))


def _call(url: str, model: str, times: int) -> None:
    for _ in range(times):
        body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "What is a nursery?"}]}
        httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)


def _show(page: Page, view: str) -> None:
    page.click(f"nav >> text='{view}'")
    page.wait_for_timeout(900)


def _take(page: Page, name: str) -> None:
    page.mouse.move(0, 0)
    page.screenshot(path=IMAGES / f"{name}.png")


def main() -> None:
    """Makes all pictures."""
    opening.default_location = lambda: opening.MEMORY
    random.seed(14)
    chromium = os.environ.get("TRIGATE_TEST_CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        sys.exit("screenshots: Chromium was not found")
    IMAGES.mkdir(exist_ok=True)
    scripts = {"poet": (_says(_POEM, 0.07),), "scholar": (_says(_PROSE, 0.05),), "spare": (_says(_PROSE, 0.1),)}
    upstreams = {name: {"models": [f"{name}-1"]} for name in scripts}
    models = {
        "default": {"targets": ["scholar/scholar-1", "poet/poet-1"]},
        "steady": {"targets": ["spare/spare-1", "scholar/scholar-1"]},
    }
    prices = {f"{name}/{name}-1": {"input_usd": 2, "output_usd": 8} for name in scripts}
    with (
        open_site(scripts, upstreams, models=models, prices=prices, retries={}) as site,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1120, "height": 760}, color_scheme="light")
        page.goto(f"{site.url}/")
        page.wait_for_selector("li.card")
        earlier = [threading.Thread(target=_call, args=(site.url, model, 2)) for model in ("default", "poet/poet-1")]
        for thread in earlier:
            thread.start()
        for thread in earlier:
            thread.join()
        site.kill("spare")
        calls = [
            threading.Thread(target=_call, args=(site.url, model, 2))
            for model in ("default", "poet/poet-1", "steady", "scholar/scholar-1")
        ]
        for thread in calls:
            thread.start()
        _show(page, "Now")
        page.wait_for_timeout(4500)
        _take(page, "page-now")
        page.emulate_media(color_scheme="dark")
        _take(page, "page-now-dark")
        page.emulate_media(color_scheme="light")
        for thread in calls:
            thread.join()

        _show(page, "Playground")
        page.get_by_label("Model", exact=True).fill("poet/poet-1")
        page.get_by_label("Compare with").fill("scholar/scholar-1")
        page.get_by_label("Message").fill("What is a nursery?")
        page.get_by_role("button", name="Send").click()
        page.locator(".measures a").nth(1).wait_for(timeout=30_000)
        page.wait_for_timeout(1000)
        _take(page, "page-playground")

        _show(page, "History")
        page.get_by_label("Model", exact=True).fill("steady")
        page.get_by_role("button", name="Search").click()
        page.wait_for_timeout(500)
        page.locator("tbody button.link").first.click()
        page.wait_for_timeout(300)
        _take(page, "page-history")

        _show(page, "Usage")
        page.get_by_label("By", exact=True).select_option("model")
        page.wait_for_timeout(500)
        _take(page, "page-usage")

        page.set_viewport_size({"width": 390, "height": 760})
        _show(page, "Connect")
        _take(page, "page-phone")
        browser.close()


if __name__ == "__main__":
    main()
