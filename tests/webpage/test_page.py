"""The page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser_fixtures import needs_chromium
from PIL import Image
from pycocotools.coco import COCO


@pytest.fixture
def page(chromium, address, request) -> Iterator[Any]:
    """A visitor who must see no error in the console and send nothing elsewhere."""
    width, height = getattr(request, "param", (1280, 900))
    context = chromium.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
    page, said, asked = context.new_page(), [], []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda sent: asked.append(sent.url))
    page.goto(address)
    page.wait_for_selector("#ask")
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    context.close()


def upload(page: Any, path: str) -> None:
    page.set_input_files("#picture input[type=file]", path)
    page.wait_for_selector("#picture img")


def segment(page: Any, path: str, instruction: str = "", phrases: str = "") -> None:
    upload(page, path)
    page.fill("#instruction textarea", instruction)
    page.fill("#phrases textarea", phrases)
    page.click("#ask")


def told(page: Any) -> str:
    """The message that pops up, without its title."""
    message = page.wait_for_selector("[data-testid=toast-text]", timeout=300_000).inner_text()
    page.click(".toast-close")
    page.wait_for_selector(".toast-body", state="detached")  # or the next message would be sought in it
    return message


@pytest.mark.parametrize("page", [(1280, 900), (390, 844)], indirect=True, ids=["desktop", "phone"])
@pytest.mark.slow
@needs_chromium
def test_a_visit(page, examples, tmp_path, request):
    """Upload, ask, see, toggle, slide, ask again, look back, download."""
    segment(page, examples[-1][0], phrases="squares, circles")
    page.wait_for_selector("#overlay img", timeout=300_000)
    assert page.input_value("#answer textarea").count("[") == 2
    boxes = page.locator("#chosen input[type=checkbox]")
    before = boxes.count()
    assert before >= 3
    first = page.get_attribute("#overlay img", "src")
    boxes.first.uncheck()
    page.wait_for_function("src => document.querySelector('#overlay img').src != src", arg=first)
    page.wait_for_function("() => !document.querySelector('#table').innerText.includes('\\n1\\n')")
    page.locator("#threshold input[type=range]").focus()
    page.keyboard.press("End")
    page.wait_for_function("() => document.querySelectorAll('#chosen input[type=checkbox]').length == 0")
    page.locator("#threshold input[type=number]").fill("0.3")
    page.locator("#threshold input[type=number]").blur()
    page.fill("#phrases textarea", "")
    page.fill("#instruction textarea", "every square")
    page.press("#instruction textarea", "Enter")
    page.wait_for_selector("#history input[type=radio]")
    assert page.locator("#history input[type=radio]").count() == 2
    page.wait_for_function("() => document.querySelector('#timings').innerText.includes('picture known from before')")
    page.locator("#history input[type=radio]").first.check()
    page.wait_for_function(f"() => document.querySelectorAll('#chosen input[type=checkbox]').length == {before}")
    for name, suffix in (("png", "_overlay.png"), ("coco", "_coco.json"), ("labelme", "_labelme.json")):
        with page.expect_download() as download:
            page.click(f"#download-{name}")
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        assert path.name.endswith(suffix)
        if name == "coco":
            assert len(COCO(str(path)).getAnnIds()) == before
    boxes.first.uncheck()
    with page.expect_download() as download:
        page.click("#download-coco")
    assert len(COCO(download.value.path()).getAnnIds()) == before - 1, "of what is ticked now, not of the last time"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing sticks out"
    page.screenshot(path=str(tmp_path / "page.png"), full_page=True)


@pytest.mark.slow
@needs_chromium
def test_an_example(page):
    page.locator("tr", has_text="select every orange square").first.click()
    page.wait_for_selector("#picture img")
    page.click("#ask")
    page.wait_for_selector("#overlay img", timeout=300_000)
    assert "orange squares" in page.input_value("#answer textarea")
    assert page.locator("#chosen input[type=checkbox]").count() == 1


@pytest.mark.slow
@needs_chromium
def test_bad_visits_end_in_words(page, examples, tmp_path):
    page.click("#ask")
    assert told(page) == "Choose a picture first."
    segment(page, examples[0][0])
    assert told(page) == "nothing is asked: give an instruction or phrases"
    Image.new("L", (10_000, 10_000)).save(tmp_path / "huge.png")
    segment(page, str(tmp_path / "huge.png"), "every square")
    assert told(page) == "the picture has 10000 x 10000 pixels, more than 4,000,000"
    (tmp_path / "text.png").write_text("not a picture")
    page.locator("#picture button[aria-label='Remove Image']").click()
    page.set_input_files("#picture input[type=file]", str(tmp_path / "text.png"))
    page.wait_for_timeout(500)
    page.click("#ask")
    assert told(page) == "13 bytes that are no picture in PNG, JPEG, WEBP, BMP, TIFF or GIF"
    segment(page, examples[0][0], "every square")
    page.wait_for_selector("#overlay img", timeout=300_000)
