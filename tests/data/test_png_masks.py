"""Referring sets whose masks are PNG files, RoboRefIt's kind."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from random_damage import json_values
from turned_pictures import save_turned

from instructsam import masks
from instructsam.data.checks import Skips
from instructsam.data.png_masks import read_mask, read_png_masks
from instructsam.errors import KINDS, kind_of

KEYS = {"text_key": "text", "image_key": "rgb_path", "mask_key": "mask_path", "box_key": "bbox"}
TARGET = np.zeros((20, 30), dtype=bool)
TARGET[4:9, 6:21] = True


def records() -> list[dict]:
    size = {"height": 20, "width": 30}
    return [
        {"text": "The red can.", "rgb_path": "image/1.png", "mask_path": "mask/1.png", **size},
        {"text": "can left of the box", "rgb_path": "image\\1.png", "mask_path": "mask\\1.png", "bbox": [1, 2]},
        {"text": "the cup", "rgb_path": "image/2.png", "bbox": [6, 4, 15, 5], **size},
        {"text": "the lid", "rgb_path": "image/1.png", "mask_path": "mask/1.png"},
    ]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mask").mkdir()
    Image.fromarray((TARGET * 200).astype(np.uint8)).save(tmp_path / "mask" / "1.png")
    return tmp_path


def read(folder, entries: list, **options) -> list:
    (folder / "train.json").write_text(json.dumps(entries))
    return list(read_png_masks(folder / "train.json", folder, "robo", **{**KEYS, **options}))


def test_records_of_one_picture_in_a_row_are_one_sample(folder):
    samples = read(folder, records())
    assert [sample.id for sample in samples] == ["robo/0", "robo/2", "robo/3"]
    assert [sample.image for sample in samples] == [folder / f"image/{k}.png" for k in (1, 2, 1)]
    assert {(sample.height, sample.width) for sample in samples} == {(20, 30)}
    turns = [turn for sample in samples for turn in sample.turns]
    assert [turn.instruction for turn in turns] == ["the red can", "can left of the box", "the cup", "the lid"]
    assert {(turn.kind, turn.form) for turn in turns} == {("phrase", "phrase")}
    assert [turn.phrases[0].text for turn in turns] == [turn.instruction for turn in turns]
    assert [turn.phrases[0].box_only for turn in turns] == [False, False, True, False]
    for turn in turns:
        np.testing.assert_array_equal(masks.decode(turn.phrases[0].rles[0]), TARGET)


def test_boxes_by_their_corners(folder):
    (sample,) = read(folder, [{**records()[2], "bbox": [6, 4, 21, 9]}], box_form="xyxy")
    np.testing.assert_array_equal(masks.decode(sample.turns[0].phrases[0].rles[0]), TARGET)


def test_masks_in_a_folder_of_their_own(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "mask").mkdir()
    (folder / "mask" / "1.png").rename(other / "mask" / "1.png")
    (sample,) = read(folder, records()[:1], mask_root=other)
    assert sample.image == folder / "image/1.png" and masks.area(sample.turns[0].phrases[0].rles[0]) == TARGET.sum()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_masks_of_every_kind(tmp_path, mode):
    path = tmp_path / "mask.png"
    if mode == "I;16":
        Image.fromarray(TARGET.astype(np.uint16) * 256).save(path)
    elif mode == "P":  # index 1 may be shown black
        picture = Image.new("P", (30, 20), 0)
        picture.putpalette([255, 255, 255, 0, 0, 0])
        picture.putdata(TARGET.ravel().astype(int).tolist())
        picture.save(path)
    else:
        Image.fromarray((TARGET * 255).astype(np.uint8)).convert(mode).save(path)
    np.testing.assert_array_equal(read_mask(path), TARGET)


def test_transparent_pixels_are_no_target(tmp_path):
    colours = np.full((20, 30, 4), 255, dtype=np.uint8)
    colours[~TARGET, 3] = 0
    Image.fromarray(colours).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), TARGET)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"text": " "}, "text", "text is empty"),
        ({"rgb_path": None}, "field", "rgb_path must be the name"),
        ({"mask_path": 3}, "field", "mask_path must be the name"),
        ({"mask_path": "mask/2.png"}, "image missing", "no file"),
        ({"mask_path": "mask/half.png"}, "image broken", "truncated"),
        ({"mask_path": "mask/empty.png"}, "mask empty", "empty"),
        ({"height": 30, "width": 20}, "mask size", r"height and width \(20, 30\), the record says \(30, 20\)"),
        ({"height": 20, "width": None}, "field", "width must be a positive number of pixels"),
        ({"height": 2**20, "width": 2**20}, "field", "pixels are more than a mask can have"),
        ({"mask_path": None}, "field", "neither mask nor box"),
        ({"mask_path": None, "bbox": [1, 2, 3]}, "box form", "four numbers"),
        ({"mask_path": None, "bbox": [1, 2, float("nan"), 4]}, "box nan", "NaN"),
        ({"mask_path": None, "bbox": [1, 2, 10**400, 4]}, "box outside", "outside"),
        ({"mask_path": None, "bbox": [1, 2, 3, 4], "height": None, "width": None}, "field", "no height and width"),
    ],
)
def test_bad_records(folder, change, kind, words):
    Image.new("L", (30, 20)).save(folder / "mask/empty.png")
    (folder / "mask/half.png").write_bytes((folder / "mask/1.png").read_bytes()[:-30])
    entries = records()
    entries[0] |= change
    with pytest.raises(ValueError, match=rf"train\.json: \[0\]: .*{words}") as caught:
        read(folder, entries)
    assert kind_of(caught.value) == kind
    skips = Skips("skip")
    left = read(folder, entries, skips=skips)
    assert [t.instruction for s in left for t in s.turns] == ["can left of the box", "the cup", "the lid"]
    assert skips.counts == {"records": 1}


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA"])
def test_a_mask_with_an_orientation_is_turned_as_pictures_are(folder, mode):
    upright = Image.fromarray((TARGET * 255).astype(np.uint8)).convert("RGB")
    save_turned(upright, folder / "mask" / "1.png", 6, mode)
    (sample,) = read(folder, records()[:1])
    np.testing.assert_array_equal(masks.decode(sample.turns[0].phrases[0].rles[0]), TARGET)


def test_bad_settings_and_files(folder):
    with pytest.raises(ValueError, match="neither mask_key nor box_key"):
        read(folder, records(), mask_key=None, box_key=None)
    with pytest.raises(ValueError, match="box_form='cxcywh' is none of"):
        read(folder, records(), box_form="cxcywh")
    with pytest.raises(ValueError, match="has no mask"):
        read(folder, records()[2:3], box_key=None)
    with pytest.raises(ValueError, match=r"train\.json: expected a list of records"):
        read(folder, {"a": records()}, skips=Skips("skip"))


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(index=st.integers(0, 3), key=st.sampled_from([*KEYS.values(), "height", "width", None]), value=json_values)
def test_random_damage(tmp_path_factory, index, key, value):
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "mask").mkdir()
    Image.fromarray((TARGET * 200).astype(np.uint8)).save(folder / "mask" / "1.png")
    entries = records()
    if key is None:
        entries[index] = value
    else:
        entries[index][key] = value
    problems: list = []
    left = [
        turn for sample in read(folder, entries, skips=Skips("skip", report=problems.append)) for turn in sample.turns
    ]
    whole = [turn for sample in read(folder, records()) for turn in sample.turns]
    assert [t for t in left if t in whole[:index] + whole[index + 1 :]] == whole[:index] + whole[index + 1 :]
    assert len(left) + len(problems) == 4 and {problem.kind for problem in problems} <= KINDS.keys()
    if problems:
        with pytest.raises(ValueError, match=rf"train\.json: \[{index}\]"):
            read(folder, entries)
