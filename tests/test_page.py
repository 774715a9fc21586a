"""The chat page in a real browser: type, stream, stop, edit. Needs playwright and Chromium; slow."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("llguidance")

from servers import save_model, serving  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium"),
]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page of a slow server with a key, without access to any network but this machine's."""
    from bitnet.decode.native import NativeSequences

    extend = NativeSequences.extend
    monkeypatch.setattr(NativeSequences, "extend", lambda self, work: time.sleep(0.04) or extend(self, work))
    with serving(save_model(tmp_path), api_key="secret") as address, playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            page = browser.new_page()
            page.route(lambda url: not url.startswith(address), lambda route: route.abort())
            problems: list[str] = []
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(address)
            yield page
            assert problems == []
        finally:
            browser.close()


def wait(page: Any, holds: Any) -> None:
    for _ in range(1000):
        if holds():
            return
        page.wait_for_timeout(50)
    raise AssertionError(page.inner_text("body"))


def test_the_page_chats_stops_keeps_and_edits(page: Any) -> None:
    wait(page, lambda: "API key" in page.inner_text("#model"))
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    wait(page, lambda: page.inner_text("#model") == "tiny")
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    wait(page, lambda: page.is_visible("#stop") and len(page.inner_text(".turn.assistant .text")) > 3)  # it streams
    page.click("#stop")
    wait(page, lambda: page.inner_text("#speed") == "stopped")
    assert page.locator(".turn").count() == 2
    assert page.locator(".error").count() == 0
    said = page.inner_text(".turn.assistant .text")
    page.wait_for_timeout(200)
    assert page.inner_text(".turn.assistant .text") == said
    page.fill("#text", "again")
    page.press("#text", "Enter")
    wait(page, lambda: "tokens/s" in page.inner_text("#speed"))
    page.reload()
    wait(page, lambda: page.locator(".turn").count() == 4)  # kept
    page.locator(".turn.user button").last.click()
    assert page.input_value("#text") == "again"
    assert page.locator(".turn").count() == 2
    page.click("#new")
    assert page.locator(".turn").count() == 0
