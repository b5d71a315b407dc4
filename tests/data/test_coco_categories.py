"""COCO, LVIS and Objects365: every category of a picture with all its instances, or not at all."""

from __future__ import annotations

import copy
import json
import logging
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_damage import json_values

from instructsam import masks
from instructsam.data import coco_grouped
from instructsam.data.checks import Skips
from instructsam.data.coco_categories import read_coco_categories, readable
from instructsam.errors import KINDS, kind_of

HEIGHT, WIDTH = 30, 40


def square(x: float, y: float, side: float = 6) -> list[float]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def uncompressed(mask_HW: np.ndarray) -> dict:
    """An RLE with counts as a list, as COCO writes crowd regions."""
    flat = mask_HW.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges.tolist(), flat.size]).tolist()
    return {"size": list(mask_HW.shape), "counts": counts if flat[0] == 0 else [0, *counts]}


def box_mask(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def annotation(identity: int, image: int, category: int, segmentation=None, **more) -> dict:
    entry = {"id": identity, "image_id": image, "category_id": category, "iscrowd": 0, "bbox": [2, 3, 10, 5], **more}
    return entry if segmentation is None else {**entry, "segmentation": segmentation}


def coco_file() -> dict:
    """Annotations in no order of pictures; one of every form a mask may have."""
    images = [
        {"id": i, "file_name": f"{i:012d}.jpg", "height": HEIGHT, "width": WIDTH, "license": 1} for i in (9, 25, 7, 8)
    ]
    crowd = {**annotation(6, 25, 1, uncompressed(box_mask(0, 0, 30, 20))), "iscrowd": 1}
    return {
        "info": {"year": 2017},
        "images": images,
        "annotations": [
            annotation(1, 25, 3, [square(3, 4)]),
            annotation(2, 9, 1, [square(1, 1), square(20, 11)]),  # one instance in two pieces
            annotation(3, 25, 1, [square(8, 2)]),
            annotation(4, 9, 3, uncompressed(box_mask(5, 5, 9, 30))),
            annotation(5, 9, 1, dict(masks.encode(box_mask(30, 0, 40, 9)))),
            crowd,
            annotation(7, 7, 90, [square(0, 0, 30)]),
        ],
        "categories": [
            {"id": 1, "name": "person", "supercategory": "person"},
            {"id": 3, "name": "car", "supercategory": "vehicle"},
            {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
        ],
    }


@pytest.fixture
def read(tmp_path):
    path = tmp_path / "instances_train2017.json"

    def read(content: dict, **options) -> list:
        path.write_text(json.dumps(content))
        return list(read_coco_categories(path, tmp_path / "train2017", "coco", **options))

    return read


def skipping() -> Skips:
    return Skips("skip", report=lambda problem: None)


def asked(samples) -> dict[str, dict[str, int]]:
    """Picture -> what is asked -> number of instances."""
    return {sample.id: {t.instruction: len(t.phrases[0].rles) for t in sample.turns} for sample in samples}


# ---- as published ---------------------------------------------------------------------------------------------------


def test_a_turn_for_every_category_with_all_its_instances(read, tmp_path):
    samples = read(coco_file())
    # 25 has a crowd of persons, 8 has nothing; the order is that of the images, not of the annotations.
    assert asked(samples) == {
        "coco/9": {"person": 2, "car": 1},
        "coco/25": {"car": 1},
        "coco/7": {"toothbrush": 1},
    }
    first = samples[0]
    assert first.image == tmp_path / "train2017" / "000000000009.jpg"
    assert (first.height, first.width, first.joint) == (HEIGHT, WIDTH, True)
    person, car = first.turns
    assert (person.kind, person.form, person.answer) == ("category", "category", ())
    assert person.phrases[0].text == "person" and not person.phrases[0].box_only
    pieces = box_mask(1, 1, 7, 7) | box_mask(20, 11, 26, 17)
    np.testing.assert_array_equal(masks.decode(person.phrases[0].rles[0]), pieces)
    np.testing.assert_array_equal(masks.decode(person.phrases[0].rles[1]), box_mask(30, 0, 40, 9))
    np.testing.assert_array_equal(masks.decode(car.phrases[0].rles[0]), box_mask(5, 5, 9, 30))
    assert car.phrases[0].rles[0] == masks.check_rle(car.phrases[0].rles[0])


def test_the_order_of_the_lists_does_not_matter(read):
    content = coco_file()
    assert read(dict(reversed(content.items()))) == read(content)


def test_absent_categories_are_asked_as_no_target(read):
    samples = {sample.id: sample for sample in read(coco_file(), absent=5)}
    assert asked(samples.values()) == {
        "coco/9": {"person": 2, "car": 1, "toothbrush": 0},
        "coco/25": {"car": 1, "toothbrush": 0},  # a crowd of persons is no absence
        "coco/7": {"toothbrush": 1, "person": 0, "car": 0},
        "coco/8": {"person": 0, "car": 0, "toothbrush": 0},
    }
    turn = samples["coco/9"].turns[-1]
    assert (turn.kind, turn.form, turn.phrases[0].text) == ("no-target", "category", "toothbrush")


def test_what_is_absent_is_drawn_from_seed_and_picture_alone(read):
    content = coco_file()
    content["categories"] += [{"id": 100 + k, "name": f"thing {k}"} for k in range(30)]
    whole = {s.id: s.turns for s in read(content, absent=3, seed=1)}
    assert [sum(t.kind == "no-target" for t in turns) for turns in whole.values()] == [3] * 4
    assert len({turns[-3:] for turns in whole.values()}) == 4
    fewer = {**content, "images": content["images"][2:], "annotations": content["annotations"][-1:]}
    assert {s.id: s.turns for s in read(fewer, absent=3, seed=1)}.items() <= whole.items()
    assert {s.id: s.turns for s in read(content, absent=3, seed=2)} != whole
    with pytest.raises(ValueError, match="absent=-1"):
        read(content, absent=-1)


def test_lvis_fields(read, tmp_path):
    content = coco_file()
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
        image |= {"neg_category_ids": [90, 1000], "not_exhaustive_category_ids": []}
    content["images"][0]["not_exhaustive_category_ids"] = [1]
    content["images"][3] |= {"neg_category_ids": []}
    samples = read(content, absent=9)
    assert asked(samples) == {
        "coco/9": {"car": 1, "toothbrush": 0},
        "coco/25": {"car": 1, "toothbrush": 0},
        "coco/7": {"toothbrush": 1},  # car was not looked for, and toothbrush is there whatever the list says
    }
    assert samples[0].image == tmp_path / "train2017" / "train2017" / "000000000009.jpg"
    content["images"][2]["not_exhaustive_category_ids"] = [3]
    content["images"][2]["neg_category_ids"] = [1, 3]
    assert asked(read(content, absent=9))["coco/7"] == {"toothbrush": 1, "person": 0}
    # Without the list nothing is known to be absent in a file where other pictures have it.
    del content["images"][0]["neg_category_ids"]
    assert asked(read(content, absent=9))["coco/9"] == {"car": 1}


def objects365_file() -> dict:
    return {
        "images": [
            {"id": 420917, "file_name": "images/v1/patch8/objects365_v1_00420917.jpg", "height": 30, "width": 40},
            {"id": 908726, "file_name": "images/v2/patch16/objects365_v2_00908726.jpg", "height": 30, "width": 40},
        ],
        "annotations": [
            {"id": 1, "iscrowd": 0, "isfake": 0, "area": 9.0, "isreflected": 0, "image_id": 420917, "category_id": 1}
            | {"bbox": [2.6, 3.4, 10.2, 5.0]},
            {"id": 2, "iscrowd": 1, "isfake": 0, "area": 9.0, "isreflected": 0, "image_id": 420917, "category_id": 57}
            | {"bbox": [2.0, 3.0, 10.0, 5.0]},
            {"id": 3, "iscrowd": 0, "isfake": 0, "area": 9.0, "isreflected": 0, "image_id": 908726, "category_id": 57}
            | {"bbox": [35.5, 20.0, 10.0, 10.0]},  # reaches over the border
        ],
        "categories": [{"id": 1, "name": "Person"}, {"id": 57, "name": "Wild Bird"}],
    }


def test_objects365_has_boxes_only_and_other_folders_on_disk(read, tmp_path):
    prefixes = {"images/v1/": "train/", "images/v2/": ""}
    person, bird = read(objects365_file(), prefixes=prefixes)
    assert person.image == tmp_path / "train2017/train/patch8/objects365_v1_00420917.jpg"
    assert bird.image == tmp_path / "train2017/patch16/objects365_v2_00908726.jpg"
    assert asked([person, bird]) == {"coco/420917": {"person": 1}, "coco/908726": {"wild bird": 1}}
    (target,) = person.turns[0].phrases
    assert target.box_only
    np.testing.assert_array_equal(masks.decode(target.rles[0]), box_mask(3, 3, 13, 8))
    np.testing.assert_array_equal(masks.decode(bird.turns[0].phrases[0].rles[0]), box_mask(35, 20, 40, 30))
    assert read(objects365_file())[0].image == tmp_path / "train2017/images/v1/patch8/objects365_v1_00420917.jpg"


def test_boxes_only_does_not_look_at_masks(read):
    content = coco_file()
    content["annotations"][0]["segmentation"] = "broken"
    samples = {sample.id: sample for sample in read(content, boxes_only=True)}
    (car,) = samples["coco/25"].turns[0].phrases
    assert car.box_only
    np.testing.assert_array_equal(masks.decode(car.rles[0]), box_mask(2, 3, 12, 8))


def test_masks_and_boxes_of_one_category_become_boxes(read):
    content = coco_file()
    del content["annotations"][4]["segmentation"]
    content["annotations"][3]["segmentation"] = []
    person, car = read(content)[0].turns
    assert person.phrases[0].box_only and car.phrases[0].box_only
    pieces, box = (masks.decode(rle) for rle in person.phrases[0].rles)
    np.testing.assert_array_equal(pieces, box_mask(1, 1, 26, 17))
    np.testing.assert_array_equal(box, box_mask(2, 3, 12, 8))


def test_categories_of_one_name_are_one(read):
    content = coco_file()
    content["categories"][1]["name"] = "Person"
    assert asked(read(content)) == {"coco/9": {"person": 3}, "coco/7": {"toothbrush": 1}}
    for image in content["images"]:
        image["neg_category_ids"] = [1]  # the other half of it was not looked for
    assert "person" not in asked(read(content, absent=9)).get("coco/7", {})
    content["images"][2]["neg_category_ids"] = [3, 1]
    assert asked(read(content, absent=9))["coco/7"] == {"toothbrush": 1, "person": 0}


def test_what_is_left_out_is_told(read, caplog):
    content = coco_file()
    content["images"][0]["not_exhaustive_category_ids"] = [3]
    with caplog.at_level(logging.INFO):
        read(content)
    assert "1 categories of a picture for crowd regions, 1 categories of a picture for incomplete labels" in caplog.text


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["baby_buggy", "hair drier", "first-aid kit"], ["baby buggy", "hair drier", "first-aid kit"]),
        (["cup_(drinking)", "mug"], ["cup", "mug"]),
        (["bow_(weapon)", "bow_(decorative_ribbons)"], ["bow (weapon)", "bow (decorative ribbons)"]),
        (["fish", "fish_(food)"], ["fish", "fish (food)"]),
        (["monitor_(computer_equipment) computer_monitor"], ["monitor"]),
        (["Person", "Wild Bird", "SUV", "CD"], ["person", "wild bird", "SUV", "CD"]),
        (["Chair/Stool", "Monitor / TV", "Barrel/bucket"], ["chair or stool", "monitor or TV", "barrel or bucket"]),
        (["(x)", "A", "ORANGE"], ["(x)", "a", "orange"]),
    ],
)
def test_readable_names(names, words):
    assert readable(names) == words


# ---- faults -----------------------------------------------------------------------------------------------------


def bad_annotations() -> dict[str, tuple[dict, str, str]]:
    """What is changed in an annotation -> kind of fault and words of the reason."""
    rle = dict(masks.encode(box_mask(1, 1, 5, 5)))
    box = {"segmentation": None}
    return {
        "two points": ({"segmentation": [[1, 2, 3, 4]]}, "polygon points", "2 points"),
        "odd": ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "polygon form", "list of points"),
        "one bad polygon": ({"segmentation": [square(1, 1), [1, 2]]}, "polygon points", r"segmentation\[1\]"),
        "nan polygon": ({"segmentation": [[math.nan, *square(1, 1)[1:]]]}, "polygon nan", "NaN"),
        "huge polygon": (
            {"segmentation": [[10**400, *square(1, 1)[1:]]]},
            "polygon form",
            "expected a list of numbers",
        ),
        "outside polygon": ({"segmentation": [square(60, 60)]}, "polygon outside", "outside"),
        "thin polygon": ({"segmentation": [[1, 1, 5, 1, 1, 1]]}, "mask empty", "empty"),
        "text": ({"segmentation": "x"}, "polygon form", "polygon"),
        "size": ({"segmentation": {**rle, "size": [WIDTH, HEIGHT]}}, "mask size", "expected 30x40"),
        "counts": ({"segmentation": {**rle, "counts": [5, 5]}}, "rle short", "sum to 10"),
        "characters": ({"segmentation": {**rle, "counts": "é"}}, "rle characters", "ASCII"),
        "no target": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [1200]}}, "mask empty", "empty"),
        "nan box": ({**box, "bbox": [1, 2, math.nan, 4]}, "box nan", "NaN"),
        "infinite box": ({**box, "bbox": [1, 2, math.inf, 4]}, "box nan", "outside"),
        "huge box": ({**box, "bbox": [1, 2, 10**400, 4]}, "box outside", "outside"),
        "flat box": ({**box, "bbox": [1, 2, 0, 4]}, "box extent", "no extent"),
        "outside box": ({**box, "bbox": [50, 2, 5, 4]}, "box outside", "outside"),
        "no box": ({**box, "bbox": None}, "field", "no segmentation"),
        "short box": ({**box, "bbox": [1, 2, 3]}, "box form", "four numbers"),
        "text box": ({**box, "bbox": [1, 2, "3", 4]}, "box form", "four numbers"),
        "crowd": ({"iscrowd": "no"}, "field", "iscrowd"),
        "no id": ({"id": None}, "field", "id must be a whole number"),
        "text id": ({"id": "1"}, "field", "id must be a whole number"),
        "same id": ({"id": 2}, "duplicate", "a second time"),
    }


@pytest.mark.parametrize("case", bad_annotations())
def test_a_bad_annotation_costs_its_category_in_its_picture(read, case: str):
    change, kind, words = bad_annotations()[case]
    content = coco_file()
    content["annotations"][4] |= change  # the second person of picture 9
    with pytest.raises(ValueError, match=rf"instances_train2017.json: annotations\[4\].*{words}") as caught:
        read(content)
    assert kind_of(caught.value) == kind
    problems: list = []
    skips = Skips("skip", report=problems.append)
    expected = asked(read(coco_file(), absent=9))
    del expected["coco/9"]["person"]
    assert asked(read(content, absent=9, skips=skips)) == expected  # nor is person taken for absent
    assert skips.counts == {"annotations": 1}
    assert [problem.kind for problem in problems] == [kind]


def test_an_annotation_of_no_known_category_makes_its_picture_doubtful(read):
    for category in (4, None, [1], True):
        content = coco_file()
        content["annotations"][4]["category_id"] = category
        with pytest.raises(ValueError, match=r"annotations\[4\] \(id 5\): unknown category_id"):
            read(content)
        assert asked(read(content, skips=skipping())).keys() == {"coco/25", "coco/7"}


def test_an_annotation_of_no_known_picture_is_left_out_alone(read):
    for image in (4, None, {}):
        content = coco_file()
        content["annotations"].append(annotation(100, image, 1, [square(1, 1)]))
        with pytest.raises(ValueError, match=r"annotations\[7\] \(id 100\): unknown image_id"):
            read(content)
        assert read(content, skips=skipping()) == read(coco_file())


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"file_name": None}, "field", "file_name"),
        ({"file_name": "\udc80.jpg"}, "text", "the name of the picture holds half a character"),
        ({"file_name": "a\0.jpg"}, "text", "no file can be called"),
        ({"height": 0}, "field", "height must be a positive"),
        ({"width": "40"}, "field", "width must be a positive"),
        ({"height": 2**20, "width": 2**20}, "field", "more than a mask can have"),
        ({"neg_category_ids": [[1]]}, "field", "neg_category_ids must be a list"),
        ({"not_exhaustive_category_ids": 3}, "field", "not_exhaustive_category_ids must be a list"),
        ({"id": 25}, "duplicate", "a second time"),
        ({"id": 9.5}, "field", "object with an id"),
    ],
)
def test_a_bad_picture_is_left_out_with_its_annotations(read, change: dict, kind: str, words: str):
    content = coco_file()
    content["images"].insert(2, {**content["images"][0], "id": 77, **change})
    content["annotations"].append(annotation(100, 77, 1, [[1, 2]]))
    with pytest.raises(ValueError, match=rf"images\[2\]: .*{words}") as caught:
        read(content)
    assert kind_of(caught.value) == kind
    skips = skipping()
    assert read(content, skips=skips) == read(coco_file())
    # Its annotations are counted only where it cannot be told whose they are.
    assert skips.counts == {"images": 1, **({"annotations": 1} if "id" in change else {})}


def test_no_usable_annotation_at_all(read):
    content = coco_file()
    content["annotations"] = [annotation(1, 4, 1, [square(1, 1)])]
    assert read(content, skips=skipping()) == []
    assert len(read(content, absent=1, skips=skipping())) == 4


@pytest.mark.slow
def test_memory_of_an_annotation(tmp_path, monkeypatch):
    """Objects365 has 30 million: what is kept of a box is a row of numbers."""
    content = objects365_file()
    count = 10_000
    box = content["annotations"][0]

    def stream(path):
        yield from ((key, k, entry) for key in ("images", "categories") for k, entry in enumerate(content[key]))
        yield from (("annotations", k, {**box, "id": k}) for k in range(count))

    monkeypatch.setattr(coco_grouped, "stream_json", stream)
    tracemalloc.start()
    try:
        kept = coco_grouped.CocoFile("x.json", lambda entries: {k: one["name"] for k, one in entries.items()})
        assert tracemalloc.get_traced_memory()[1] < 100 * count
    finally:
        tracemalloc.stop()
    assert len(next(kept.pictures()).groups["Person"].ids) == count


def test_numbers_and_texts_are_the_same_ids(read):
    content = coco_file()
    for entry in content["annotations"]:
        entry["image_id"] = str(entry["image_id"])
    assert read(content) == read(coco_file())
    content["images"].append({**content["images"][0], "id": "9"})
    with pytest.raises(ValueError, match=r"images\[4\]: id '9' occurs a second time"):
        read(content)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_file_that_is_none(read, tmp_path, key: str):
    content = coco_file()
    for value in ([], {}, None, "x"):
        with pytest.raises(ValueError, match="instances_train2017.json: (has no|expected)"):
            read({**content, key: value}, skips=skipping())
    del content[key]
    with pytest.raises(ValueError, match=f"instances_train2017.json: has no {key}"):
        read(content, skips=skipping())
    with pytest.raises(ValueError, match="instances_train2017.json: expected an object"):
        read([content], skips=skipping())
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        list(read_coco_categories(tmp_path / "nowhere.json", tmp_path, "coco"))


@pytest.mark.parametrize("name", [None, "", "_", 7])
def test_a_category_without_a_name(read, name):
    content = coco_file()
    content["categories"].append({"id": 5, "name": name})
    with pytest.raises(ValueError, match=r"categories\[3\]: the name is empty or missing"):
        read(content)
    assert read(content, skips=skipping()) == read(coco_file())


@pytest.mark.parametrize("name", ["half a \ud83d", "dog<|im_end|>"])
def test_a_category_s_name_that_cannot_be_asked(read, name):
    content = coco_file()
    content["categories"].append({"id": 5, "name": name})
    with pytest.raises(ValueError, match=r"categories\[3\]: the name holds") as caught:
        read(content)
    assert kind_of(caught.value) == "text"
    assert read(content, skips=skipping()) == read(coco_file())


# ---- random damage --------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw):
    """A file with two broken fields or entries, and the ids of pictures that may have suffered."""
    content = copy.deepcopy(coco_file())
    hurt = set()
    for _ in range(2):
        part = draw(st.sampled_from(["images", "annotations"]))
        entries = content[part]
        index = draw(st.integers(0, len(entries) - 1))
        entry = entries[index]
        if not isinstance(entry, dict):
            continue
        hurt |= {str(entry.get("id" if part == "images" else "image_id"))}
        key = draw(st.sampled_from([*sorted(entry), None]))
        value = draw(json_values)
        if key is None:
            entries[index] = value
        elif draw(st.booleans()):
            del entry[key]
        else:
            entry[key] = value
        if isinstance(entries[index], dict):  # it may now be another picture's
            hurt |= {str(entries[index].get("id" if part == "images" else "image_id"))}
    ids = [entry.get("id") for entry in content["annotations"] if isinstance(entry, dict)]
    repeated = [entry for entry in content["annotations"] if isinstance(entry, dict) and ids.count(entry.get("id")) > 1]
    hurt |= {str(entry.get("image_id")) for entry in repeated}
    return content, hurt


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(case=damaged(), absent=st.integers(0, 2))
def test_random_damage(tmp_path_factory, case, absent: int):
    content, hurt = case
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "instances.json"

    def read(content, skips=None):
        path.write_text(json.dumps(content))
        return {s.id: s for s in read_coco_categories(path, folder, "coco", absent=absent, skips=skips)}

    whole = read(coco_file())
    skips = Skips("skip", report=lambda problem: problems.append(problem))
    problems: list = []
    left = read(content, skips)
    federated = any(isinstance(image, dict) and "neg_category_ids" in image for image in content["images"])
    for identity, sample in whole.items():
        if identity.split("/")[1] not in hurt and not federated:
            assert left[identity].turns == sample.turns
    for sample in left.values():
        for turn in sample.turns:
            for rle in turn.phrases[0].rles:
                assert masks.area(rle) > 0 and rle["size"] == [sample.height, sample.width]
    assert {problem.kind for problem in problems} <= KINDS.keys()
    if problems:
        with pytest.raises(ValueError, match=r"instances\.json: (images|annotations)\["):
            read(content)
    else:
        assert read(content) == left
