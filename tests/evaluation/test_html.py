"""report.html: what stands where, nothing from outside, texts that stay texts, a size that stays small."""

from __future__ import annotations

import base64
import hashlib
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from perturbed_records import perturbed_records
from PIL import Image

from instructsam import masks
from instructsam.evaluation import examples
from instructsam.evaluation.html import write_html
from instructsam.evaluation.metrics import evaluate_records, measure
from instructsam.visualization import jpeg_bytes

VOID = {"meta", "img", "input", "br", "hr", "link"}
BENCHMARK = {
    "name": "toy",
    "title": "Toy benchmark",
    "split": "val",
    "threshold": 0.3,
    "min_area": 0,
    "headline": ("giou", "AP50"),
    "conventions": {"prompt": "as it stands", "giou": "of the toy"},
    "published": (
        {"system": "Paper", "figure": "giou", "value": 0.625},
        {"system": "Paper", "figure": "giou", "kind": "spatial", "value": 0.894},
    ),
}


class Reader(HTMLParser):
    """Reads a page as a browser would: what stands inside a text as markup becomes an element here."""

    def __init__(self) -> None:
        super().__init__()
        self.builder = ElementTree.TreeBuilder()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.builder.start(tag, {name: value or "" for name, value in attrs})
        if tag in VOID:
            self.builder.end(tag)

    def handle_endtag(self, tag: str) -> None:
        self.builder.end(tag)

    def handle_data(self, data: str) -> None:
        self.builder.data(data)


def read(path: Path) -> ElementTree.Element:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n<html")
    reader = Reader()
    reader.feed(text.removeprefix("<!DOCTYPE html>\n").strip())
    return reader.builder.close()


def text_of(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def table_under(page: ElementTree.Element, heading: str) -> list[list[str]]:
    """The table that follows a heading."""
    everything = list(page.iter())
    start = next(i for i, one in enumerate(everything) if one.tag in ("h2", "h3") and text_of(one) == heading)
    table = next(one for one in everything[start:] if one.tag == "table")
    return [[text_of(cell) for cell in row] for row in table.iter("tr")]


def cards(page: ElementTree.Element, gallery: str) -> list[str]:
    """The ids of the instructions in a gallery."""
    section = page.find(f".//section[@id='gallery-{gallery}']")
    return [] if section is None else [text_of(card.findall(".//dd")[-1]) for card in section.iter("article")]


def strip(start: int, stop: int) -> masks.RLE:
    mask = np.zeros((20, 40), bool)
    mask[5:9, start:stop] = True
    return masks.encode(mask)


def record(name: str, truths: list, found: list, scores: list[float], **rest: Any) -> dict[str, Any]:
    row = {"id": name, "height": 20, "width": 40, "gt_rles": truths, "pred_rles": found, "pred_scores": scores}
    return {**row, "image": None, "instruction": f"find {name}", "kind": "spatial", **rest}


RECORDS = [
    record("hit", [strip(0, 10)], [strip(0, 10)], [0.9], pred_phrases=["cup"], pred_phrase_ids=[0], answer="a cup"),
    record("half", [strip(0, 10)], [strip(0, 6)], [0.8]),
    record("missed, unsure", [strip(0, 10)], [strip(20, 30)], [0.4]),
    record("missed, sure", [strip(0, 10)], [strip(20, 30)], [0.7]),
    record("doubled", [strip(0, 10)], [strip(0, 10), strip(0, 9)], [0.9, 0.6]),
    record("rightly empty", [], [], [], kind="no_target"),
    record("wrongly found", [], [strip(0, 10)], [0.5], kind="no_target"),
]


def page_of(tmp_path: Path, records: list[dict[str, Any]] = RECORDS, **options: Any) -> ElementTree.Element:
    metrics = {**evaluate_records(records), **options.pop("more", {})}
    return read(write_html(tmp_path / "report.html", metrics, records, **options))


def test_galleries_hold_what_their_names_say(tmp_path):
    page = page_of(tmp_path)
    assert cards(page, "worst") == ["missed, sure", "missed, unsure"]
    assert cards(page, "best") == ["hit", "doubled", "half"]
    assert cards(page, "duplicates") == ["doubled"]
    assert cards(page, "false-positives") == ["wrongly found"]
    lines = page.findall(".//table[@id='all']/tbody/tr")
    assert [text_of(line[-1]) for line in lines][:3] == ["missed, unsure", "missed, sure", "wrongly found"]
    assert len(lines) == len(RECORDS)
    only = page_of(tmp_path, per_gallery=1)
    assert cards(only, "best") == ["hit"] and "Best (1 of 3)" in text_of(only)


def test_the_filter_finds_what_it_needs(tmp_path):
    page = page_of(tmp_path)
    line = next(line for line in page.iter("tr") if text_of(line).startswith("find hit"))
    expected = {"kind": "spatial", "count": "1", "target": "yes", "iou": "1.0000", "search": "find hit\ncup"}
    assert {name: line.get(f"data-{name}") for name in expected} == expected
    options = {select.get("id"): [one.get("value") for one in select] for select in page.iter("select")}
    assert options["filter-kind"] == ["", "no_target", "spatial"]
    assert options["filter-count"] == ["", "0", "1"]


def test_figures_beside_published_ones(tmp_path):
    checkpoint = {"path": "some/where", "sha256": "c0ffee", "layout": "instructsam"}
    more = {"benchmark": BENCHMARK, "checkpoint": checkpoint, "intervals": {"giou": (0.4, 0.8)}}
    page = page_of(tmp_path, more=more, title="Toy", settings={"seed": 7}, published={"Other": {"giou": 0.5}})
    tiles = [text_of(tile) for tile in page.iter("div") if tile.get("class") == "tile"]
    assert tiles[0] == "gIoU" + "0.514" + "0.400…0.800" + "Paper: 0.625" + "Paper (spatial): 0.894" + "Other: 0.500"
    assert tiles[1].startswith("AP50") and len(tiles) == 2
    figures = table_under(page, "Figures")
    assert figures[0] == ["figure", "this run", "interval", "Paper", "Other"]
    assert ["gIoU", "0.514", "0.400…0.800", "0.625", "0.500"] in figures
    assert ["gIoU (spatial)", "0.520", "–", "0.894", "–"] in figures
    kinds = table_under(page, "By instruction kind")
    assert kinds[0][:4] == ["kind", "n", "gIoU", "AP50"] and kinds[2][:3] == ["spatial", "5", "0.520"]
    for heading in ("By number of true instances", "By area of the true instances"):
        assert sum(int(row[1]) for row in table_under(page, heading)[1:]) == len(RECORDS)
    everything = text_of(page)
    for part in ("c0ffee", "Toy benchmark", '"seed": 7', "giou (benchmark)", "of the toy", "all-point interpolation"):
        assert part in everything


def test_charts_show_the_figures(tmp_path):
    page = page_of(tmp_path)
    overall = evaluate_records(RECORDS)["overall"]
    everything = text_of(page)
    for name, key in (("IoU 0.50", "AP50"), ("IoU 0.75", "AP75")):
        assert f"{name}: AP {overall[key]:.3f}" in everything
    assert len(page.findall(".//polyline")) == 3
    # One wrongly found, one doubled: 2 of 7 too many.
    assert "right number 71.4%, too few 0.0%, too many 28.6%" in everything
    assert "1 kept instances: 5 instructions" in everything and "1 true instances: 5 instructions" in everything
    assert "scores 0.9…1.0: precision 1.000, mean score 0.900, 2 predictions" in everything
    # Of the false positive, the two misses and the duplicate none hits: gaps 0.5, 0.4, 0.7, 0.6; of hits 0.1, 0.2, 0.1.
    assert "ECE 0.371" in everything


def test_scores_that_are_no_probabilities_have_no_calibration(tmp_path):
    page = page_of(tmp_path, [record("x", [strip(0, 10)], [strip(0, 10)], [7.0])])
    assert "No calibration: there are scores outside 0…1." in text_of(page)


def test_a_set_without_targets_or_predictions(tmp_path):
    page = page_of(tmp_path, [record("x", [], [], [])])
    assert not page.findall(".//polyline") and len(page.findall(".//svg")) == 1  # the numbers of instances
    assert [cards(page, name) for name in ("worst", "best", "duplicates", "false-positives")] == [[]] * 4


ATTACK = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&lt;b&gt;</script></style>"


def test_texts_stay_texts(tmp_path):
    """Wherever a text comes from data or settings, markup in it is shown and not obeyed."""
    fields = {"instruction": ATTACK, "kind": ATTACK, "answer": ATTACK, "pred_phrases": [ATTACK], "gt_phrases": [ATTACK]}
    records = [record(ATTACK, [strip(0, 10)], [strip(0, 10)], [0.9], pred_phrase_ids=[0], image=ATTACK, **fields)]
    benchmark = {**BENCHMARK, "title": ATTACK, "conventions": {ATTACK: ATTACK}}
    benchmark["published"] = [{"system": ATTACK, "figure": "giou", "kind": ATTACK, "value": 0.5}]
    more = {"benchmark": benchmark, "checkpoint": {"path": ATTACK}}
    page = page_of(tmp_path, records, title=ATTACK, settings={ATTACK: ATTACK}, more=more)
    assert len(list(page.iter("script"))) == 1 and len(list(page.iter("style"))) == 1
    assert not [one for one in page.iter() if any(name.startswith("on") for name in one.attrib)]
    assert all(image.get("src", "").startswith("data:image/jpeg;base64,") for image in page.iter("img"))
    assert len(list(page.iter("img"))) == 2 and not list(page.iter("b"))
    assert text_of(page.find(".//h1")) == ATTACK and text_of(page.find(".//article/h4")) == ATTACK
    assert page.find(".//article").get("data-kind") == ATTACK
    assert [option.get("value") for option in page.find(".//select[@id='filter-kind']")] == ["", ATTACK]


def test_half_characters_do_not_stop_the_page(tmp_path):
    page = page_of(tmp_path, [record("x", [strip(0, 10)], [], [], instruction="cup \ud83d"), *RECORDS])
    assert "cup ?" in text_of(page)


@pytest.mark.slow
def test_nothing_comes_from_outside(tmp_path, world):
    path = tmp_path / "report.html"
    records = perturbed_records(world)
    write_html(path, evaluate_records(records), records)
    page = read(path)
    for element in page.iter():
        for name in ("src", "href", "srcset", "action", "data"):
            assert element.get(name, "data:").startswith("data:"), ElementTree.tostring(element)[:200]
    style = page.find(".//style").text
    assert "url(" not in style and "@import" not in style
    policy = next(meta.get("content") for meta in page.iter("meta") if meta.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(page.find(".//script").text.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}'" in policy


@pytest.mark.slow
def test_pictures_are_small_and_counted(tmp_path, world, monkeypatch):
    records = perturbed_records(world)
    page = page_of(tmp_path, records)
    pictures = [base64.b64decode(image.get("src").split(",")[1]) for image in page.iter("img")]
    assert len(pictures) >= 20 and max(map(len, pictures)) <= 25_000
    for picture in pictures:
        with Image.open(io.BytesIO(picture)) as opened:
            assert opened.format == "JPEG" and max(opened.size) <= 320
    # A budget that is spent ends the galleries, and each says how many it leaves out.
    monkeypatch.setattr(examples, "MAX_PICTURES_BYTES", 60_000)
    short = page_of(tmp_path, records)
    fewer = [base64.b64decode(image.get("src").split(",")[1]) for image in short.iter("img")]
    assert 0 < sum(map(len, fewer)) <= 60_000 and len(fewer) < len(pictures)
    targets = page.findall(".//table[@id='all']/tbody/tr[@data-target='yes']")
    good = sum(float(line.get("data-iou")) >= 0.5 for line in targets)
    assert f" of {good})" in text_of(short)


def test_a_long_list_is_cut_with_its_length(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "MAX_LINES", 3)
    page = page_of(tmp_path)
    assert len(page.findall(".//table[@id='all']/tbody/tr")) == 3
    assert "(3 of 7, lowest IoU first)" in text_of(page)
    long = page_of(tmp_path, [record("x", [], [], [], instruction="word " * 1000)])
    assert text_of(long.find(".//table[@id='all']/tbody/tr/td")).endswith("…")


def test_long_texts_do_not_make_a_large_page(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "MAX_LINES_BYTES", 50_000)
    records = [record(f"{n}", [], [], [], instruction="&" * 5000) for n in range(100)]
    path = write_html(tmp_path / "report.html", evaluate_records(records), records)
    lines = len(read(path).findall(".//table[@id='all']/tbody/tr"))
    assert 5 < lines < 25 and f"({lines} of 100, " in path.read_text()
    assert path.stat().st_size < 100_000


def test_a_picture_gives_way_until_it_fits():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (320, 240, 3), dtype=np.uint8))
    sizes = {}
    for room in (100_000, 25_000, 5_000):
        file = jpeg_bytes(noise, room)
        assert len(file) <= room
        with Image.open(io.BytesIO(file)) as opened:
            sizes[room] = opened.size
    assert sizes[100_000] == (240, 320) and sizes[5_000][1] < sizes[25_000][1] <= 320
    with pytest.raises(ValueError, match="fits into 10 bytes"):
        jpeg_bytes(noise, 10)


def test_pictures_that_are_missing_or_of_another_size(tmp_path):
    page = page_of(tmp_path, [record("x", [strip(0, 10)], [strip(0, 5)], [0.5], image="not/here.png")])
    assert "The picture is not at the place that the record names." in text_of(page)
    assert len(list(page.iter("img"))) == 2
    Image.new("RGB", (41, 20)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"record 'x', picture .*wide\.png: mask 0 has shape \(20, 40\)"):
        page_of(tmp_path, [record("x", [strip(0, 10)], [], [], image=str(tmp_path / "wide.png"))])


def test_a_failed_page_leaves_the_old_one(tmp_path):
    page_of(tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(ValueError, match="occurs twice"):
        write_html(tmp_path / "report.html", evaluate_records(RECORDS), [*RECORDS, RECORDS[0]])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == before


def test_what_is_measured_already_gives_the_same_page(tmp_path):
    measured = measure(RECORDS, score_threshold=0.5)
    metrics = evaluate_records(measured)
    here = write_html(tmp_path / "here.html", metrics, RECORDS).read_bytes()
    assert write_html(tmp_path / "given.html", metrics, RECORDS, measured).read_bytes() == here


def test_the_threshold_of_the_figures_is_that_of_the_page(tmp_path):
    metrics = evaluate_records(RECORDS, score_threshold=0.5)
    page = read(write_html(tmp_path / "report.html", metrics, RECORDS))
    assert cards(page, "false-positives") == []  # its score is 0.5, which is not above
    line = next(line for line in page.iter("tr") if text_of(line).startswith("find missed, unsure"))
    assert [text_of(cell) for cell in line][2:4] == ["1", "0"]


def test_untrained_and_reliance_stand_on_the_page(tmp_path):
    metrics = evaluate_records(RECORDS)
    untrained = evaluate_records(
        [{**one, "pred_rles": [], "pred_scores": [], "pred_phrase_ids": []} for one in RECORDS]
    )
    reliance = {"slot_mean": {"real": metrics, "replaced": untrained}}
    page = page_of(tmp_path, baseline=untrained, reliance=reliance)
    assert table_under(page, "Figures")[0] == ["figure", "this run", "untrained", "change"]
    fall = table_under(page, "Query reliance")
    assert fall[1][:2] == ["all", "7"] and fall[1][2] == fall[1][4].removeprefix("+") and fall[1][3] == "0.000"
