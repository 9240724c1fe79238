"""The browser helper sees what a reader would trip over."""

import io

import pytest
from PIL import Image
from tests import browser

GOOD = "<!doctype html><title>t</title><meta name=viewport content='width=device-width'><p style='height:1200px'>text"


@pytest.fixture
def page(tmp_path):
    browser.require()

    def write(text):
        path = tmp_path / "page.html"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("width", [400, 1400])
def test_a_sound_page_has_no_complaints_and_a_picture_of_its_width(page, tmp_path, width):
    assert browser.screenshot(page(GOOD), width, tmp_path / "out.png") == []
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width == width
        assert picture.height > 1200


def test_complaints_are_told(page, tmp_path):
    bad = GOOD + (
        "<div style='width:600px;height:1px'></div><script>console.error('oops'); missing();</script>"
        "<img src='http://127.0.0.1:9/x.png'>"
    )
    told = "\n".join(browser.screenshot(page(bad), 400, tmp_path / "out.png"))
    for text in ("console error: oops", "missing is not defined", "network: http://127.0.0.1:9/x.png", "px wider than"):
        assert text in told


def test_a_page_prints(page):
    with browser.opened(page(GOOD), 400) as tab:
        assert tab.pdf().startswith(b"%PDF")
        assert tab.evaluate("document.title") == "t"
        assert Image.open(io.BytesIO(tab.picture())).width == 400
