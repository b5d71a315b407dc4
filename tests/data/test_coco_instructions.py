"""Reading own data: what is right is read as it stands, what is wrong is named with file, place and reason."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
from PIL import Image

from instructsam import masks
from instructsam.data.checks import Skips
from instructsam.data.coco_instructions import read_coco_instructions


def square(x: int, y: int, side: int = 4, size: int = 16) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def annotation(number: int, image_id: int, mask: np.ndarray, **more) -> dict:
    x1, y1, x2, y2 = masks.bbox(masks.encode(mask))
    entry = {"id": number, "image_id": image_id, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
    return {**entry, "segmentation": masks.encode(mask), "attributes": {"color": "red"}, **more}


def instruction(name: str, image_id: int, ids: list[int], **more) -> dict:
    phrases = [{"phrase": "squares", "annotation_ids": ids}]
    return {
        "id": name,
        "image_id": image_id,
        "instruction": f"all {name}",
        "kind": "category",
        "phrases": phrases,
        **more,
    }


class Folder:
    """Data of two pictures with two annotations each; tests change ``coco`` or ``lines`` and write it."""

    def __init__(self, root):
        self.root = root
        self.coco = {
            "images": [{"id": i, "file_name": f"{i}.png", "height": 16, "width": 16} for i in (1, 2)],
            "annotations": [
                annotation(10, 1, square(1, 1)),
                annotation(11, 1, square(8, 8)),
                annotation(20, 2, square(2, 3)),
                annotation(21, 2, square(9, 3)),
            ],
            "categories": [{"id": 1, "name": "square"}],
        }
        self.lines = [instruction("a", 1, [10, 11]), instruction("b", 2, [21]), instruction("c", 1, [])]
        folder = root / "val"
        (folder / "images").mkdir(parents=True)
        for i in (1, 2):
            Image.new("RGB", (16, 16)).save(folder / "images" / f"{i}.png")

    def write(self):
        (self.root / "val" / "instances.json").write_text(json.dumps(self.coco))
        lines = [line if isinstance(line, str) else json.dumps(line) for line in self.lines]
        (self.root / "val" / "instructions.jsonl").write_text("\n".join(lines) + "\n")
        return self

    def read(self, **options):
        return read_coco_instructions(self.write().root, "val", **options)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


def test_samples_are_images_with_all_their_turns(folder):
    first, second = folder.read()
    assert (first.id, first.height, first.width) == ("val/1", 16, 16)
    assert first.image == folder.root / "val" / "images" / "1.png"
    assert [(turn.id, turn.instruction, turn.kind) for turn in first.turns] == [
        ("a", "all a", "category"),
        ("c", "all c", "category"),
    ]
    (target,) = first.turns[0].phrases
    assert target.text == "squares" and not target.box_only
    np.testing.assert_array_equal(masks.decode_batch(target.rles, 16, 16), [square(1, 1), square(8, 8)])
    assert first.turns[1].phrases[0].rles == ()
    assert [turn.id for turn in second.turns] == ["b"]


def test_objects_hold_every_annotation_of_the_image(folder):
    second = folder.read()[1]
    assert [item["id"] for item in second.objects] == [20, 21]
    expected = {"id": 21, "category": "square", "bbox": [9, 3, 4, 4], "area": 16, "attributes": {"color": "red"}}
    assert {key: value for key, value in second.objects[1].items() if key != "rle"} == expected
    np.testing.assert_array_equal(masks.decode(second.objects[1]["rle"]), square(9, 3))


def test_images_without_instruction_are_left_out(folder):
    folder.lines = folder.lines[:1]
    assert [sample.id for sample in folder.read()] == ["val/1"]


def test_images_are_not_opened(folder):
    (folder.root / "val" / "images" / "1.png").write_bytes(b"no picture")
    assert len(folder.read()) == 2


def test_kind_category_attributes_and_box_are_optional(folder):
    for key in ("category_id", "attributes", "bbox"):
        del folder.coco["annotations"][0][key]
    del folder.coco["categories"][0], folder.lines[0]["kind"]
    for entry in folder.coco["annotations"][1:]:
        del entry["category_id"]
    first = folder.read()[0]
    assert first.turns[0].kind == ""
    assert first.objects[0]["category"] == "" and first.objects[0]["attributes"] == {}
    assert first.objects[0]["bbox"] == [1, 1, 4, 4]


def test_polygons_and_uncompressed_codes_are_understood(folder):
    folder.coco["annotations"][0]["segmentation"] = [[1, 1, 5, 1, 5, 5, 1, 5]]
    counts = [8 * 16 + 8, 4, 12, 4, 12, 4, 12, 4]
    folder.coco["annotations"][1]["segmentation"] = {"size": [16, 16], "counts": [*counts, 256 - sum(counts)]}
    rles = folder.read()[0].turns[0].phrases[0].rles
    np.testing.assert_array_equal(masks.decode_batch(rles, 16, 16), [square(1, 1), square(8, 8)])


def test_annotations_with_a_box_alone_stand_for_it(folder):
    for entry in folder.coco["annotations"][:2]:
        del entry["segmentation"]
    target = folder.read()[0].turns[0].phrases[0]
    assert target.box_only
    np.testing.assert_array_equal(masks.decode(target.rles[0]), square(1, 1))


def test_limit_takes_the_first_images_and_checks_no_others(folder):
    folder.coco["annotations"][2]["segmentation"] = {"size": [16, 16], "counts": "garbage!"}
    assert [sample.id for sample in folder.read(limit=1)] == ["val/1"]
    with pytest.raises(ValueError, match="annotations.2.*garbage|annotations.2"):
        folder.read(limit=2)


# ---- what is wrong ----------------------------------------------------------------------------------------------


def change(part: str, index: int, key: str | None, value):
    """A fault: set one field (None: the whole entry) of an entry of the images, annotations or lines."""

    def apply(folder: Folder) -> None:
        entries = folder.lines if part == "lines" else folder.coco[part]
        if key is None:
            entries[index] = value
        else:
            entries[index] = {**entries[index], key: value}

    return apply


def phrase(**more):
    return [{"phrase": "squares", "annotation_ids": [10], **more}]


EMPTY = masks.encode(np.zeros((16, 16), dtype=bool))
OTHER_SIZE = masks.encode(square(1, 1, size=20))
SHORT = {"size": [16, 16], "counts": [10, 5]}
FAULTS = {
    "image no object": (change("images", 1, None, 3), r"instances.json: images\[1\]: expected an object"),
    "image no id": (change("images", 1, "id", None), r"instances.json: images\[1\]: id must be"),
    "image twice": (change("images", 1, "id", 1), r"images\[1\]: id 1 occurs a second time"),
    "image no name": (change("images", 1, "file_name", ""), r"images\[1\]: has no file_name"),
    "image name nul": (change("images", 1, "file_name", "a\0b"), r"images\[1\]: no file can be called"),
    "image name half": (change("images", 1, "file_name", "\ud83d.png"), r"images\[1\]: .* holds half a character"),
    "image pixels": (change("images", 1, "height", 2**40), r"images\[1\]: .*pixels are more than a mask can have"),
    "image size": (change("images", 1, "height", 0), r"images\[1\]: height must be a positive number"),
    "image size text": (change("images", 1, "width", "16"), r"images\[1\]: width must be a positive number"),
    "image missing": (change("images", 1, "file_name", "no.png"), r"image 2: no file .*no\.png"),
    "image other size": (change("images", 1, "width", 20), r"annotations\[2\] \(id 20\).*16x16.*16x20"),
    "annotation no object": (change("annotations", 3, None, []), r"annotations\[3\]: expected an object"),
    "annotation twice": (change("annotations", 3, "id", 10), r"annotations\[3\] \(id 10\): id 10 occurs a second time"),
    "annotation of no image": (change("annotations", 3, "image_id", 9), r"annotations\[3\] .*unknown image_id 9"),
    "category": (change("annotations", 3, "category_id", 7), r"annotations\[3\] \(id 21\): unknown category_id 7"),
    "attributes": (change("annotations", 3, "attributes", "red"), r"annotations\[3\] .*attributes must be an object"),
    "box nan": (change("annotations", 3, "bbox", [1, 2, float("nan"), 4]), r"annotations\[3\] .*bbox must be four"),
    "box flat": (change("annotations", 3, "bbox", [1, 2, 0, 4]), r"annotations\[3\] .*no extent"),
    "mask empty": (change("annotations", 3, "segmentation", EMPTY), r"annotations\[3\] \(id 21\): .*empty \(area 0\)"),
    "mask size": (change("annotations", 3, "segmentation", OTHER_SIZE), r"annotations\[3\] \(id 21\).*20x20"),
    "mask sum": (change("annotations", 3, "segmentation", SHORT), r"annotations\[3\] \(id 21\).*sum to 15"),
    "polygon": (change("annotations", 3, "segmentation", [[1, 1, 2]]), r"annotations\[3\] \(id 21\)"),
    "line broken": (change("lines", 1, None, '{"id": "b",'), r"instructions.jsonl:2: "),
    "line list": (change("lines", 1, None, "[1]"), r"instructions.jsonl:2: expected an object, got list"),
    "line no id": (change("lines", 1, "id", None), r"instructions.jsonl:2: id must be"),
    "line id twice": (change("lines", 1, "id", "a"), r"instructions.jsonl:2: id 'a' is that of line 1 too"),
    "line of no image": (change("lines", 1, "image_id", 5), r"instructions.jsonl:2: unknown image_id 5"),
    "instruction": (change("lines", 1, "instruction", " "), r"instructions.jsonl:2: the instruction is empty"),
    "kind": (change("lines", 1, "kind", 3), r"instructions.jsonl:2: kind must be a string"),
    "no phrases": (change("lines", 1, "phrases", []), r"instructions.jsonl:2: phrases must be a list"),
    "phrase": (
        change("lines", 0, "phrases", phrase(phrase="")),
        r"instructions.jsonl:1: phrases\[0\]: the phrase is e",
    ),
    "ids": (change("lines", 0, "phrases", phrase(annotation_ids=None)), r":1: phrases\[0\]: annotation_ids must be a"),
    "ids twice": (change("lines", 0, "phrases", phrase(annotation_ids=[10, 10])), r":1: .*holds an id twice"),
    "unknown id": (change("lines", 0, "phrases", phrase(annotation_ids=[99])), r":1: phrases\[0\]: annotation_id 99"),
    "id elsewhere": (change("lines", 0, "phrases", phrase(annotation_ids=[20])), r":1: phrases\[0\]: annotation_id 20"),
    "crowd": (change("annotations", 1, "iscrowd", 1), r":1: phrases\[0\]: annotation_id 11 is no usable"),
    "mixed": (change("annotations", 1, "segmentation", None), r":1: phrases\[0\]: some .* masks, some only boxes"),
    "nothing": (change("annotations", 1, None, {"id": 11, "image_id": 1}), r"annotations\[1\].*neither segment"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(folder, name):
    apply, message = FAULTS[name]
    apply(folder)
    with pytest.raises(ValueError, match=message) as caught:
        folder.read()
    assert str(folder.root) in str(caught.value)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_skipped_with_a_summary_and_the_rest_is_kept(folder, name, caplog):
    whole = {turn.id for sample in copy.deepcopy(folder).read() for turn in sample.turns}
    FAULTS[name][0](folder)
    with caplog.at_level(logging.WARNING):
        samples = folder.read(skips=Skips("skip"))
    left = {turn.id for sample in samples for turn in sample.turns}
    assert left <= whole and len(left) == 2
    assert any("skipped:" in record.message for record in caplog.records)
    assert f"{len(samples)} images are left" in caplog.records[-1].message
    with pytest.raises(ValueError, match="more than the 0 allowed"):
        folder.read(skips=Skips("skip", 0))


@pytest.mark.parametrize("text", ["{", "[]", '{"images": []}', '{"images": {}, "annotations": []}'])
def test_a_broken_instances_file_is_an_error_in_any_case(folder, text):
    folder.write()
    (folder.root / "val" / "instances.json").write_text(text)
    with pytest.raises(ValueError, match="instances.json: "):
        read_coco_instructions(folder.root, "val", skips=Skips("skip"))


@pytest.mark.parametrize("name", ["instances.json", "instructions.jsonl"])
def test_a_missing_file_is_named(folder, name):
    folder.write()
    (folder.root / "val" / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: cannot be read"):
        read_coco_instructions(folder.root, "val", skips=Skips("skip"))


def test_nothing_usable_is_an_error(folder):
    folder.lines = []
    with pytest.raises(ValueError, match="no image with a usable instruction"):
        folder.read(skips=Skips("skip"))


def test_wrong_options_are_refused(folder):
    with pytest.raises(ValueError, match="on_bad"):
        folder.read(skips=Skips("ignore"))
    with pytest.raises(ValueError, match="limit=0"):
        folder.read(limit=0)


def test_bytes_that_are_not_utf8_are_named_with_their_line(folder):
    folder.write()
    path = folder.root / "val" / "instructions.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "\xff"}\n')
    with pytest.raises(ValueError, match=r"instructions.jsonl:4: "):
        read_coco_instructions(folder.root, "val")
