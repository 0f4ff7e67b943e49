"""The playground in a real browser. Needs Chromium, which a clean machine lacks: run with ``-m slow``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from aptp_ray.serve.run import update
from tests.serve.browser import Browser

pytestmark = pytest.mark.slow


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_a_prompt_is_drawn_before_ones_eyes(address: str, browser: Browser, width: int, height: int, tmp_path: Path) -> None:
    browser.open(f"{address}/", width, height)
    browser.wait("document.querySelector('#model').options.length === 3")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    browser.run(
        "window.sources = []; new MutationObserver(() => sources.push(document.querySelector('#expert-image').src))"
        ".observe(document.querySelector('#expert-image'), {attributes: true, attributeFilter: ['src']});"
        "document.querySelector('#steps').value = 12; document.querySelector('#seed').value = 3; null"
    )
    browser.run("document.querySelector('#prompt').focus()")
    browser.call("Input.insertText", text=" and a pear")
    for _ in range(5):  # by keyboard alone: seed, steps, guidance, more, and the button
        browser.press("Tab", 9)
    assert browser.run("document.activeElement.id") == "draw"
    browser.press("Enter", 13, "\r")
    browser.wait("document.querySelector('#status').textContent === 'Done.'")
    assert browser.run("new Set(sources).size") == 4  # three previews and the picture
    assert browser.run("document.querySelector('#expert-image').naturalWidth") == 16
    assert "expert-" in browser.run("document.querySelector('#expert-image').alt")
    assert browser.run("document.querySelectorAll('#bars tr').length") == 2
    assert browser.run("document.querySelectorAll('#bars tr.chosen').length") == 1
    assert browser.run("document.querySelectorAll('#recent img').length") == 1
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    unnamed = "[...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length).length"
    assert browser.run(unnamed) == 0
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5000
    assert browser.problems == []


def test_an_error_is_said_and_stopping_stops(address: str, browser: Browser) -> None:
    browser.open(f"{address}/", 800, 600)
    browser.wait("document.querySelector('#model').options.length === 3")
    browser.run("document.querySelector('#prompt').value = '   '; document.querySelector('#form').requestSubmit(); null")
    browser.wait("document.querySelector('#error').textContent.includes('blank')")
    browser.run(
        "document.querySelector('#prompt').value = 'sky'; document.querySelector('#steps').value = 200;"
        "document.querySelector('#form').requestSubmit(); document.querySelector('#stop').click(); null"
    )
    browser.wait("document.querySelector('#status').textContent === 'Stopped.'")
    assert browser.run("!document.querySelector('#draw').disabled")


def test_the_teacher_draws_beside_the_expert_and_a_key_is_asked_for(
    address: str, browser: Browser, run_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("open-sesame\n")
    try:
        update(str(run_dir), options={"teacher": True, "api_keys": str(tmp_path / "keys")})
        while httpx.get(f"{address}/v1/models").status_code != 401:
            pass
        browser.open(f"{address}/", 800, 600)
        browser.wait("!document.querySelector('#key-field').hidden")
        browser.run(
            "const key = document.querySelector('#key'); key.value = 'open-sesame';"
            "key.dispatchEvent(new Event('change')); null"
        )
        browser.wait("!document.querySelector('#compare-field').hidden")
        browser.run("document.querySelector('#form').requestSubmit(); null")
        browser.wait("document.querySelector('#status').textContent === 'Done.'")
        assert browser.run("document.querySelector('#teacher-image').naturalWidth") == 16
        assert browser.run("document.querySelector('#teacher-image').src !== document.querySelector('#expert-image').src")
    finally:
        update(str(run_dir))
