"""report.html as a browser shows it: filters that work when used, no error, no request, a picture of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_fixtures import needs_chromium
from perturbed_records import perturbed_records
from PIL import Image

from instructsam.evaluation.html import write_html
from instructsam.evaluation.metrics import evaluate_records

ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)> find the quokka"

pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture(scope="module")
def records(world) -> list[dict[str, Any]]:
    found = perturbed_records(world)
    found[0]["instruction"] = ATTACK
    return found


@pytest.fixture(scope="module")
def report(records, tmp_path_factory) -> Path:
    return write_html(tmp_path_factory.mktemp("report") / "report.html", evaluate_records(records), records)


@pytest.fixture
def page(chromium, report) -> Iterator[Any]:
    """The page, opened as a file; at the end it must have been silent and alone."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    context.close()


def visible(page: Any, selector: str = "#all tbody tr") -> list[dict[str, str]]:
    """What the filter knows of all that can be seen, in order."""
    seen = [one for one in page.locator(selector).all() if one.is_visible()]
    return [one.evaluate("element => ({...element.dataset})") for one in seen]


def test_everything_is_shown_at_first(page, records):
    assert len(visible(page)) == len(records)
    assert page.locator("#shown").inner_text() == f"{len(records)} of {len(records)} instructions"
    assert page.evaluate("Array.from(document.images).every(image => image.complete && image.naturalWidth > 0)")
    assert page.locator(".gallery img").count() >= 20


def test_search_by_typing(page, records):
    page.locator("#filter-text").click()
    page.keyboard.type("Quokka")
    assert [one["search"].split("\n")[0] for one in visible(page)] == [ATTACK.lower()]
    assert page.locator("#shown").inner_text() == f"1 of {len(records)} instructions"
    assert all("quokka" in one["search"] for one in visible(page, ".card"))
    page.keyboard.type(" nowhere")
    assert visible(page) == visible(page, ".card") == []
    assert page.locator(".nothing").first.is_visible()
    page.locator("#filters button").click()
    page.locator("#all tbody tr").first.wait_for(state="visible")
    assert len(visible(page)) == len(records) and not page.locator(".nothing").first.is_visible()


def test_words_are_searched_in_phrases_too_and_in_any_order(page, records):
    phrase = next(phrase for record in records[1:] for phrase in record["pred_phrases"] if len(phrase.split()) > 1)
    page.locator("#filter-text").fill(" ".join(reversed(phrase.upper().split())))
    seen = visible(page)
    assert 0 < len(seen) < len(records)
    assert any(phrase in one["search"].split("\n") for one in seen)


def test_choices_by_keyboard_and_together(page, records):
    kinds = [record["kind"] for record in records]
    page.locator("#filter-kind").click()
    page.keyboard.type("spatial")
    page.keyboard.press("Enter")
    assert [one["kind"] for one in visible(page)] == ["spatial"] * kinds.count("spatial") != []
    page.select_option("#filter-kind", "")
    page.select_option("#filter-target", "no")
    assert {one["kind"] for one in visible(page)} == {"no_target"}
    assert len(visible(page)) == sum(not record["gt_rles"] for record in records)
    page.select_option("#filter-target", "yes")
    page.select_option("#filter-count", ">=2")
    assert len(visible(page)) == sum(len(record["gt_rles"]) >= 2 for record in records)
    assert {one["count"] for one in visible(page, ".card")} <= {">=2"}


def test_bounds_of_the_iou(page, records):
    page.locator("#filter-low").fill("0.5")
    page.locator("#filter-high").fill("0.8")
    seen = [float(one["iou"]) for one in visible(page)]
    assert seen and all(0.5 <= iou <= 0.8 for iou in seen)
    assert not visible(page, "#gallery-worst .card")
    page.locator("#filter-low").fill("")  # an empty field bounds nothing
    page.locator("#filter-high").fill("")
    assert len(visible(page)) == len(records)


def test_untrusted_texts_are_only_shown(page):
    assert page.locator("#all td", has_text="quokka").inner_text() == ATTACK
    assert page.evaluate("document.scripts.length") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots(page, scheme: str, tmp_path):
    page.emulate_media(color_scheme=scheme)
    path = tmp_path / f"report_{scheme}.png"
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as picture:
        assert picture.width == 1280 and picture.height > 3000  # as wide as the window: nothing sticks out
        corner = np.asarray(picture.convert("L"))[:8, :8]
    assert (corner > 200).all() if scheme == "light" else (corner < 60).all()
    assert page.evaluate("document.documentElement.scrollWidth") == 1280


def test_a_narrow_window_needs_no_scrolling_sideways(page):
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 400


def test_print(page, tmp_path):
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert os.path.getsize(tmp_path / "report.pdf") > 50_000
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("#filters").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
