"""PACO, PartImageNet and Pascal-Part: parts by the names of their categories."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from instructsam import masks
from instructsam.data.checks import Skips
from instructsam.data.coco_parts import read_coco_parts, split_name
from instructsam.errors import kind_of


def annotation(identity: int, image: int, category: int, owner: int | None = None, **more) -> dict:
    x = identity % 10 * 3
    polygon = [x, 2, x + 3, 2, x + 3, 9, x, 9]
    entry = {"id": identity, "image_id": image, "category_id": category, "iscrowd": 0, "segmentation": [polygon]}
    return {**entry, **({} if owner is None else {"obj_ann_id": owner}), **more}


def paco_file() -> dict:
    """Picture 1: two mugs with parts and a dog with one; 2: of two mugs one without parts, and a dog; 3: a dog."""
    return {
        "images": [
            {"id": i, "file_name": f"train2017/{i:012d}.jpg", "height": 20, "width": 40}
            | {"neg_category_ids": [], "not_exhaustive_category_ids": []}
            for i in (1, 2, 3)
        ],
        "annotations": [
            annotation(11, 1, 60, 11, attribute_ids=[3, 5], blur_level=0),
            annotation(12, 1, 60, 12),
            annotation(13, 1, 500, 11),
            annotation(14, 1, 500, 12),
            annotation(15, 1, 501, 12),
            annotation(16, 1, 40, 16),
            annotation(17, 1, 510, 16),
            annotation(21, 2, 60, 21),
            annotation(22, 2, 60, 22),
            annotation(23, 2, 500, 22),
            annotation(24, 2, 40, 24),
            annotation(25, 2, 510, 24),
            annotation(31, 3, 40, 31),
            annotation(32, 3, 510, 31),
        ],
        "categories": [
            {"id": 60, "name": "mug", "supercategory": "OBJECT"},
            {"id": 40, "name": "dog", "supercategory": "OBJECT"},
            {"id": 500, "name": "mug:handle", "supercategory": "PART"},
            {"id": 501, "name": "mug:inner_body", "supercategory": "PART"},
            {"id": 510, "name": "dog:ear", "supercategory": "PART"},
        ],
        "attributes": [{"id": 3, "name": "red"}],
    }


def part_image_net_file(*names: str) -> dict:
    return {
        "images": [{"id": 1, "file_name": "n01440764_1.JPEG", "height": 20, "width": 40}],
        "annotations": [annotation(number, 1, number) for number in range(len(names))],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
    }


@pytest.fixture
def read(tmp_path):
    path = tmp_path / "parts.json"

    def read(content: dict, **options) -> dict:
        path.write_text(json.dumps(content))
        samples = read_coco_parts(path, tmp_path, "parts", **options)
        return {sample.id: {turn.instruction: turn for turn in sample.turns} for sample in samples}

    return read


def counts(read: dict) -> dict:
    return {identity: {text: len(t.phrases[0].rles) for text, t in turns.items()} for identity, turns in read.items()}


def test_parts_and_objects(read):
    found = read(paco_file())
    assert counts(found) == {
        "parts/1": {
            "mug": 2,
            "handle of the mug": 2,
            "inner body of the mug": 1,
            "dog": 1,
            "ear of the dog": 1,
        },
        "parts/2": {"mug": 2, "dog": 1, "ear of the dog": 1},  # one mug's handle would be missing
        "parts/3": {"dog": 1, "ear of the dog": 1},
    }
    handle, mug = found["parts/1"]["handle of the mug"], found["parts/1"]["mug"]
    assert (handle.kind, handle.form, handle.phrases[0].text) == ("part", "phrase", "handle of the mug")
    assert (mug.kind, mug.form) == ("category", "category")
    expected = np.zeros((20, 40), dtype=bool)
    expected[2:9, 9:12] = True
    np.testing.assert_array_equal(masks.decode(handle.phrases[0].rles[0]), expected)


def test_parts_only(read):
    found = counts(read(paco_file(), objects=False))
    assert found["parts/1"] == {"handle of the mug": 2, "inner body of the mug": 1, "ear of the dog": 1}
    assert found["parts/2"] == {"ear of the dog": 1}


def test_what_is_left_out_for_want_of_labels_is_told(read, caplog):
    with caplog.at_level(logging.INFO):
        read(paco_file())
    assert "left out 1 parts of objects of which some have none labelled" in caplog.text


def test_without_links_all_parts_count(read):
    content = paco_file()
    for entry in content["annotations"]:
        del entry["obj_ann_id"]
    assert counts(read(content))["parts/2"]["handle of the mug"] == 1


def test_parts_of_objects_that_are_not_all_labelled_are_left_out(read):
    content = paco_file()
    content["images"][0]["not_exhaustive_category_ids"] = [60]
    content["annotations"].append(annotation(39, 3, 40, 39, iscrowd=1))
    found = counts(read(content))
    assert found["parts/1"] == {"dog": 1, "ear of the dog": 1}
    assert "parts/3" not in found


def test_a_bad_part_costs_its_own_category_only(read):
    content = paco_file()
    content["annotations"][6]["segmentation"] = [[1, 2]]  # the dog's only part: the dog does have one
    content["annotations"][3]["obj_ann_id"] = "12"
    skips = Skips("skip")
    found = counts(read(content, skips=skips))["parts/1"]
    assert found == {"mug": 2, "inner body of the mug": 1, "dog": 1}
    assert skips.counts == {"annotations": 2}
    with pytest.raises(ValueError, match=r"annotations\[3\] \(id 14\): obj_ann_id must be a whole number"):
        read(content)


def test_a_polygon_of_two_points_is_named(read):
    content = paco_file()
    content["annotations"][2]["segmentation"] = [[1, 2, 3, 4]]
    with pytest.raises(ValueError, match=r"annotations\[2\] \(id 13\): segmentation\[0\]: .*2 points") as caught:
        read(content)
    assert kind_of(caught.value) == "polygon points"
    assert "handle of the mug" not in counts(read(content, skips=Skips("skip")))["parts/1"]


def test_absent_parts_are_those_of_objects_that_are_not_there(read):
    content = paco_file()
    content["images"][2]["neg_category_ids"] = [60]
    found = counts(read(content, absent=9))
    # No mug, so no part of one. In pictures 1 and 2 nothing was looked for in vain.
    assert found["parts/3"] == {"dog": 1, "ear of the dog": 1, "handle of the mug": 0, "inner body of the mug": 0}
    assert found.keys() == {"parts/1", "parts/2", "parts/3"} and 0 not in found["parts/1"].values()
    turns = read(content, absent=1)["parts/3"]
    assert [(turn.kind, turn.form) for turn in turns.values()][2:] == [("no-target", "phrase")]
    content["annotations"].append(annotation(33, 3, 500))  # said to be absent, and there
    assert 0 not in counts(read(content, absent=9))["parts/3"].values()
    content["annotations"].pop()
    content["images"][2]["neg_category_ids"] = [500]  # of the handle alone nothing follows
    assert 0 not in counts(read(content, absent=9))["parts/3"].values()


def test_absent_parts_where_objects_are_no_categories(read):
    content = part_image_net_file("Car Body", "Bird Wing", "Bird Head")
    del content["annotations"][1:]
    found = counts(read(content, separator=" ", absent=9))["parts/1"]
    assert found == {"body of the car": 1, "wing of the bird": 0, "head of the bird": 0}
    content = part_image_net_file("Car Body", "Bird Wing", "Bird Head")
    del content["annotations"][2]  # the bird is there, its head may be hidden
    assert 0 not in counts(read(content, separator=" ", absent=9))["parts/1"].values()


def test_names_with_blanks(read):
    found = read(part_image_net_file("Quadruped Head", "Car Side Mirror"), separator=" ")
    assert list(found["parts/1"]) == ["head of the quadruped", "side mirror of the car"]
    names = ["potted plant", "potted plant pot", "bird_(animal) left_wing"]
    found = read(part_image_net_file(*names), separator=" ", object_names=["potted plant"])
    assert list(found["parts/1"]) == ["potted plant", "pot of the potted plant", "left wing of the bird"]


@pytest.mark.parametrize(
    ("name", "separator", "pair"),
    [
        ("mouse_(computer_equipment):left_button", ":", ("mouse_(computer_equipment)", "left_button")),
        ("mug", ":", ("mug", "")),
        ("mug:", ":", ("mug:", "")),
        (":handle", ":", (":handle", "")),
        ("bird_wing", "_", ("bird", "wing")),
    ],
)
def test_split_name(name, separator, pair):
    assert split_name(name, separator) == pair
    assert split_name("a b c", " ", ["a", "a b"]) == ("a b", "c")


def test_bad_settings(read):
    with pytest.raises(ValueError, match=r"parts\.json: no category is a part: none has '/'"):
        read(paco_file(), separator="/")
    with pytest.raises(ValueError, match="separator is empty"):
        read(paco_file(), separator="")
    with pytest.raises(ValueError, match="absent=-1"):
        read(paco_file(), absent=-1)
