"""The inspect command on the tiny world, and what its page and pictures show."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_fixtures import settings_of

from instructsam.data.augmentation import PictureChange
from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.inspect import inspect
from instructsam.inspection.page import Shown, answer_text, page
from instructsam.inspection.pictures import GREY, Asked, contact_sheet, describe_turn, picture_of, turn_overlay
from instructsam.inspection.statistics import facts_of, statistics
from instructsam.masks import box_to_rle
from instructsam.structures import PhraseTarget, Sample, Turn

pytestmark = pytest.mark.slow

ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)> the quokka"


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def picture(folder: Path, height: int = 60, width: int = 80) -> Path:
    Image.fromarray(np.full((height, width, 3), 200, dtype=np.uint8)).save(folder / "a.png")
    return folder / "a.png"


def sample(image: Path | None, *turns: Turn) -> Sample:
    return Sample("file.json/7", image, 60 if image else 0, 80 if image else 0, turns)


def turn(text: str = "find it", *boxes: list[int], **values: Any) -> Turn:
    return Turn(text, (PhraseTarget("the thing", tuple(box_to_rle(box, 60, 80) for box in boxes)),), **values)


def of(samples: list[Sample], **values: Any) -> dict[str, Any]:
    figures = statistics([(list(map(facts_of, samples)), 1.0)])
    own = {"samples": 1000, "counted": len(samples), "epoch": 3000, "left_out": {"records": 2}, "aside": {"points": 7}}
    return {"sources": {"own": {**own, **figures}}, "all": figures}


def shown(*samples: Sample) -> Page:
    return Page(page("Samples", of(list(samples)), [Shown("own", one) for one in samples], ["a note"]).decode())


def test_the_page_shows_samples_with_all_their_turns(tmp_path):
    turns = [turn(f"instruction {k}", [1, 1, 9, 9]) for k in range(6)]
    found = shown(sample(picture(tmp_path), *turns))
    for k in range(6):
        assert f"instruction {k}" in found.text
    assert "file.json/7" in found.text and "60×80" in found.text and "2 more" in found.text and "a note" in found.text
    images = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 4 and all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert "→ [the thing: 1]" in found.text and "3,000" in found.text and "2 records" in found.text
    assert "7 points" in found.text
    assert found.count("svg") == 8


def test_texts_of_the_data_stay_texts_and_nothing_is_fetched(tmp_path):
    one = turn(ATTACK, [1, 1, 9, 9], kind=ATTACK, answer=(ATTACK, ATTACK))
    found = shown(sample(picture(tmp_path), one, *[one] * 5))
    assert found.count("script") == 0 and ATTACK in found.text
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    linked = [value for _, found_ in found.tags for name, value in found_.items() if name in ("src", "href")]
    assert all(str(value).startswith("data:") for value in linked)
    policies = [found_["content"] for _, found_ in found.tags if found_.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_samples_without_a_picture_that_can_be_shown_are_shown_all_the_same(tmp_path):
    talk = Turn("hello", answer=("Good day.",))
    gone = sample(tmp_path / "gone.png", turn("find it", [1, 1, 9, 9]))
    small = sample(picture(tmp_path, 30, 40), turn("find it", [1, 1, 9, 9]))
    found = shown(sample(None, talk), gone, small)
    assert "no picture" in found.text and "→ Good day." in found.text and "text only" in found.text
    assert "gone.png: no such image file" in found.text and "is 30x40 (height x width)" in found.text
    assert found.count("img") == 2
    grey, reason = picture_of(gone)
    assert grey is not None and grey.size == (80, 60) and grey.getpixel((0, 0)) == GREY and reason
    sheet = contact_sheet([Asked("own", one, one.turns[0]) for one in (sample(None, talk), gone, small)], columns=2)
    assert sheet.width == 2 * 300 + 3 * 16


def test_turns_are_described():
    assert describe_turn(turn("x")) == "no target"
    assert describe_turn(turn("x", [1, 1, 9, 9])) == "1 instance"
    boxes = PhraseTarget("b", (box_to_rle([1, 1, 9, 9], 60, 80),), True)
    assert describe_turn(Turn("x", (boxes, boxes))) == "2 instances, 2 phrases, boxes only"
    assert (
        answer_text(Turn("x", (boxes, PhraseTarget("c")), answer=("It is ", " not ", ".")))
        == "It is [b: 1] not [c: 0]."
    )


def test_tiny_instances_get_a_ring(tmp_path):
    large = Image.new("RGB", (3000, 3000), (200, 200, 200))
    tiny = Turn("x", (PhraseTarget("dot", (box_to_rle([1500, 1500, 1503, 1503], 3000, 3000),)),))
    pixels = np.asarray(turn_overlay(large, tiny, 300)).astype(int)
    coloured = np.argwhere(np.ptp(pixels, axis=2) > 60)
    assert len(coloured) > 30
    low, high = coloured.min(axis=0), coloured.max(axis=0)
    assert (high - low > 12).all() and (abs((low + high) / 2 - 150) < 2).all()
    big = Turn("x", (PhraseTarget("square", (box_to_rle([1500, 1500, 2500, 2500], 3000, 3000),)),))
    plain = np.asarray(turn_overlay(large, big, 300)).astype(int)
    assert np.argwhere(np.ptp(plain, axis=2) > 60).min() >= 149  # nothing around it


def test_the_command_on_the_tiny_world(world, tmp_path):
    settings = settings_of("inspect", f"data.root={world}", f"output_dir={tmp_path}", "num=5", "columns=3")
    found = inspect(settings)
    assert json.loads((tmp_path / "statistics.json").read_text()) == found
    samples = read_coco_instructions(world, "train")
    instructions = sum(len(one.turns) for one in samples)
    instances = [sum(len(phrase.rles) for phrase in one.phrases) for scene in samples for one in scene.turns]
    own = found["sources"]["tiny_world"]
    assert (own["samples"], own["counted"], own["left_out"]) == (len(samples), len(samples), {})
    # An epoch asks 8 instructions of an image; with a larger number all of them.
    assert own["turns_per_sample"]["mean"] == np.mean([min(len(one.turns), 8) for one in samples])
    found = inspect({**settings, "data": {**settings["data"], "turns_per_image": 100}})
    own = found["sources"]["tiny_world"]
    assert own["turns_per_sample"]["mean"] == pytest.approx(instructions / len(samples))
    assert found["all"]["instances_per_instruction"]["mean"] == pytest.approx(np.mean(instances))
    assert found["all"]["no_target"] == pytest.approx(instances.count(0) / instructions)
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width == 3 * 300 + 4 * 16 and sheet.height > 600
    text = Page((tmp_path / "index.html").read_text())
    ids = {one.id for one in samples}
    assert sum(f"tiny_world: {identity} " in text.text for identity in ids) == 5
    assert (tmp_path / "index.html").stat().st_size < 2_000_000
    before = (tmp_path / "index.html").read_bytes()
    inspect({**settings, "statistics_limit": 6})
    assert (tmp_path / "index.html").read_bytes() != before
    assert "tiny_world (6 of 12)" in (tmp_path / "index.html").read_text()


def test_figures_and_page_are_of_what_training_asks(world, tmp_path):
    base = settings_of("inspect", f"data.root={world}", f"output_dir={tmp_path}", "num=12")
    whole = inspect(base)["all"]
    text = Page((tmp_path / "index.html").read_text()).text
    assert "max_length" in text and "Phrases of more than 10 instances" in text

    def changed(**data: Any) -> dict[str, Any]:
        return inspect({**base, "num_queries": 2, "data": {**base["data"], **data}})["all"]

    assert whole["instances_per_phrase"]["max"] > 2 and whole["turns_per_sample"]["max"] > 1
    assert changed(too_many_instances="truncate")["instances_per_phrase"]["max"] == 2
    dropped = changed(too_many_instances="drop", turns_per_image=100)
    assert dropped["instances_per_phrase"]["max"] == 2
    kept = changed(too_many_instances="truncate", turns_per_image=100)
    assert dropped["turns_per_sample"]["mean"] < kept["turns_per_sample"]["mean"]
    assert changed(turns_per_image=1)["turns_per_sample"]["max"] == 1


def test_a_flipped_picture_is_shown_flipped(tmp_path):
    pixels = np.zeros((60, 80, 3), dtype=np.uint8)
    pixels[:, :40] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    one = sample(tmp_path / "a.png", turn("find it", [0, 0, 9, 9]))
    plain, flipped = (picture_of(one, PictureChange(flip=flip))[0] for flip in (False, True))
    assert plain.getpixel((0, 0)) == flipped.getpixel((79, 0)) == (255, 255, 255)
    assert flipped.getpixel((0, 0)) == (0, 0, 0)
    sheets = [
        np.asarray(contact_sheet([Asked("own", one, one.turns[0], change)]))
        for change in (PictureChange(), PictureChange(True))
    ]
    assert not np.array_equal(*sheets)


@pytest.mark.parametrize("key", ["num", "seed", "statistics_limit", "num_queries"])
def test_settings_out_of_range_are_refused(key, tmp_path):
    settings = settings_of("inspect", f"output_dir={tmp_path}")
    with pytest.raises(ValueError, match=f"{key}=-1"):
        inspect({**settings, key: -1})
