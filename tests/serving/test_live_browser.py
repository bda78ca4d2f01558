"""The page in a real browser, which draws it without a window."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest

# Tests are no package, so that their helper is loaded by its place.
_spec = importlib.util.spec_from_file_location("live_chromium", Path(__file__).with_name("chromium.py"))
chromium = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(chromium)
pytestmark = pytest.mark.skipif(chromium.find_chromium() is None, reason="needs Chromium or Chrome")

PIXELS = """(() => {
  const image = document.querySelectorAll("img")[PLACE];
  if (!image.naturalWidth) return null;
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL("image/png").split(",")[1];
})()"""


@pytest.fixture(scope="module")
def browser():
    with chromium.Chromium() as found:
        yield found


def shown(browser, place=0):
    """What the page's picture shows just now, BGR."""
    import base64

    data = None
    while data is None:
        data = browser.evaluate(PIXELS.replace("PLACE", str(place)))
    return cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)


def figure(browser, name, place=0):
    text = browser.evaluate(f"document.querySelectorAll('dd[data-of={name}]')[{place}].textContent")
    return float(text.split()[0]) if text[0].isdigit() else 0.0


def test_the_page_lives(browser, live_run, is_drawn, until):
    """Moving pictures, changing numbers, a slider and chips that act; and the policy forbids none of it."""
    with live_run(("front", "back")) as run:
        browser.complaints.clear()
        browser.size(1200, 800)
        browser.call("Page.navigate", url=run.view.url)
        browser.wait_for("document.querySelectorAll('img').length === 2")
        first = shown(browser)
        until(lambda: np.abs(shown(browser)[105:].astype(int) - first[105:]).max() > 100)
        assert shown(browser, 1).shape == (120, 160, 3)
        count = figure(browser, "frames")
        until(lambda: figure(browser, "frames") > count and figure(browser, "fps") > 0)
        assert figure(browser, "p99") >= figure(browser, "p50") > 0
        assert is_drawn(shown(browser), "dog")
        browser.evaluate(
            "(() => { const slider = document.getElementById('score'); slider.value = 75; "
            "slider.dispatchEvent(new Event('input')); slider.dispatchEvent(new Event('change')); })()"
        )
        until(lambda: not is_drawn(shown(browser), "dog"))
        assert is_drawn(shown(browser), "cat")
        assert run.status()["controls"]["min_score"] == 0.75
        browser.wait_for("document.querySelectorAll('#seen button').length === 2")
        browser.evaluate(
            "[...document.querySelectorAll('#seen button')]"
            ".find((chip) => chip.textContent.startsWith('cat')).click()"
        )
        until(lambda: not is_drawn(shown(browser), "cat"))
        assert run.status()["controls"]["hidden"] == ["cat"]
        run.ask("/controls", "POST", {"min_score": 0.6, "hidden": []})  # another viewer does
        browser.wait_for("document.getElementById('score').value === '60'")
        browser.wait_for("document.querySelectorAll('#seen button[aria-pressed=true]').length === 2")
        assert browser.complaints == []
        assert "running" in browser.evaluate("document.getElementById('notice').textContent")
        run.cameras["back"].ended.set()
        run.cameras["front"].ended.set()
        browser.wait_for("document.getElementById('notice').textContent.includes('the run has ended')")
    browser.wait_for("document.getElementById('notice').textContent.includes('Not connected')")


def test_the_token_stays_out_of_the_address(browser, live_run):
    with live_run(token="secret-of-the-page") as run:
        browser.call("Page.navigate", url=run.view.url)
        browser.wait_for("document.body && document.body.textContent.includes('needs its token')")
        browser.call("Page.navigate", url=f"{run.view.url}?token=secret-of-the-page")
        browser.wait_for("document.querySelectorAll('img').length === 1")
        assert browser.evaluate("location.href") == run.view.url
        assert browser.evaluate("document.cookie") == ""  # not for scripts
        shown(browser)


def test_a_page_shows_more_sources_than_a_browser_opens_connections(browser, live_run):
    names = [f"cam{number}" for number in range(9)]
    with live_run(names) as run:
        browser.call("Page.navigate", url=run.view.url)
        browser.wait_for(
            "[...document.querySelectorAll('img')].filter((each) => each.naturalWidth).length === 9"
        )
        assert (
            browser.evaluate("[...document.querySelectorAll('h2')].map((each) => each.textContent)") == names
        )
        assert len(run.live.viewers) == 1


@pytest.mark.parametrize(("width", "columns"), [(360, 1), (1200, 2)])
def test_the_page_fits_the_screen(browser, live_run, width, columns):
    with live_run(("a-camera-with-a-long-name-" * 3, "b")) as run:
        browser.size(width, 700, phone=width < 500)
        browser.call("Page.navigate", url=run.view.url)
        browser.wait_for("document.querySelectorAll('img').length === 2")
        shown(browser)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        lefts = "[...document.querySelectorAll('main > *')].map((each) => each.getBoundingClientRect().left)"
        assert len(set(browser.evaluate(lefts))) == columns
        heights = (
            "[...document.querySelectorAll('button, input')]"
            ".filter((each) => each.offsetParent).map((each) => each.offsetHeight)"
        )
        assert min(browser.evaluate(heights)) >= 32  # CSS pixels, for a finger
