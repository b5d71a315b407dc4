"""ReasonSeg's folders: shapes drawn as published, questions with their kind, faults named and skipped."""

from __future__ import annotations

import codecs
import json

import numpy as np
import pytest
from benchmark_fixtures import reasonseg_entry, save_json, scenes, write_benchmark

from instructsam import masks
from instructsam.data.checks import Skips
from instructsam.data.reasonseg import IGNORE, TARGET, draw_shapes, read_reasonseg


def rectangle(label: str, x1: int, y1: int, x2: int, y2: int) -> dict:
    return {"label": label, "points": [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]}


def test_borders_belong_to_a_shape_and_coordinates_are_cut():
    expected = np.zeros((8, 10), dtype=np.uint8)
    expected[1:5, 2:7] = TARGET
    np.testing.assert_array_equal(draw_shapes([rectangle("target", 2, 1, 6, 4)], 8, 10), expected)
    np.testing.assert_array_equal(draw_shapes([rectangle("target", 2.9, 1.9, 6.9, 4.9)], 8, 10), expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_small_shape_lies_on_top_of_a_large_one_in_whatever_order_they_come(reverse):
    shapes = [rectangle("target", 0, 0, 9, 7), rectangle("ignore", 1, 1, 6, 6), rectangle("Target", 2, 2, 3, 3)]
    labels = draw_shapes(shapes[::-1] if reverse else shapes, 8, 10)
    expected = np.full((8, 10), TARGET, dtype=np.uint8)
    expected[1:7, 1:7] = IGNORE
    expected[2:4, 2:4] = TARGET
    np.testing.assert_array_equal(labels, expected)


def test_flags_are_not_drawn_and_what_reaches_beyond_the_picture_is_cut_off():
    shapes = [{"label": "flag", "points": [[1, 1]]}, rectangle("target", -3, 5, 4, 11)]
    labels = draw_shapes(shapes, 8, 10)
    assert (labels[5:, :5] == TARGET).all() and (labels == TARGET).sum() == 15


@pytest.fixture
def root(tmp_path):
    write_benchmark("reasonseg", tmp_path)
    return tmp_path


def turns(read) -> dict:
    return {turn.id: (sample, turn) for sample in read.samples for turn in sample.turns}


def test_each_picture_is_asked_its_first_question(root):
    read = read_reasonseg(root, "val")
    found = turns(read)
    assert len(found) == len(scenes())
    for number, scene in enumerate(scenes()):
        sample, turn = found[f"reasonseg/val/{scene.name}"]
        assert (sample.height, sample.width) == (scene.height, scene.width)
        assert turn.instruction == scene.targeted.text and turn.kind == ("short" if number % 2 else "long")
        target = masks.decode(turn.phrases[0].rles[0])
        ignored = masks.decode(read.ignore_rles[turn.id])
        labels = draw_shapes(reasonseg_entry(scene, True)["shapes"], scene.height, scene.width)
        np.testing.assert_array_equal(np.where(ignored, IGNORE, target * TARGET), labels)
        assert ignored.sum() == 9 and not (ignored & target).any()


def test_all_questions_can_be_asked(root):
    found = turns(read_reasonseg(root, "val", questions="all"))
    assert len(found) == 2 * len(scenes())
    name = scenes()[0].name
    assert found[f"reasonseg/val/{name}-1"][1].instruction.endswith("in other words")
    with pytest.raises(ValueError, match="questions must be 'first' or 'all', got 'last'"):
        read_reasonseg(root, "val", questions="last")


def first_file(root):
    return root / "val" / f"{scenes()[0].name}.json"


def test_files_in_cp1252_are_read(root):
    entry = json.loads(first_file(root).read_text())
    entry["text"] = ["the café’s chair"]
    first_file(root).write_bytes(json.dumps(entry, ensure_ascii=False).encode("cp1252"))
    assert turns(read_reasonseg(root, "val"))[f"reasonseg/val/{scenes()[0].name}"][1].instruction == "the café’s chair"
    first_file(root).write_bytes(json.dumps(entry, ensure_ascii=False).encode("utf-8"))
    assert turns(read_reasonseg(root, "val"))[f"reasonseg/val/{scenes()[0].name}"][1].instruction == "the café’s chair"


def test_shapes_without_anything_to_ignore(root):
    entry = json.loads(first_file(root).read_text())
    entry["shapes"] = [shape for shape in entry["shapes"] if shape["label"] != "ignore"]
    save_json(first_file(root), entry)
    assert len(read_reasonseg(root, "val").ignore_rles) == len(scenes()) - 1


FAULTS = {
    "label": ({"shapes": [rectangle("person", 1, 1, 5, 5)]}, r"shapes\[0\]: the label must be target, ignore or flag"),
    "no object": ({"shapes": [3]}, r"shapes\[0\]: the label must be"),
    "no points": ({"shapes": [{"label": "target"}]}, r"shapes\[0\]\.points"),
    "two points": ({"shapes": [{"label": "target", "points": [[1, 1], [4, 4]]}]}, r"shapes\[0\]\.points.*has 2 points"),
    "outside": ({"shapes": [rectangle("target", 500, 1, 510, 5)]}, r"shapes\[0\]\.points.*outside the image"),
    "shapes gone": ({"shapes": ...}, "has no list 'shapes'"),
    "text gone": ({"text": ...}, "has no list 'text' with a question"),
    "is_sentence gone": ({"is_sentence": ...}, "is_sentence must be true or false, got None"),
    "no shapes": ({"shapes": None}, "has no list 'shapes'"),
    "no target": ({"shapes": [rectangle("ignore", 1, 1, 5, 5)]}, "no pixel of a target is left"),
    "hidden": ({"shapes": [rectangle("target", 1, 1, 5, 5), rectangle("ignore", 1, 1, 5, 5)]}, "no pixel of a target"),
    "no text": ({"text": []}, "has no list 'text' with a question"),
    "empty text": ({"text": [" "]}, r"text\[0\]: the instruction is empty"),
    "is_sentence": ({"is_sentence": "yes"}, "is_sentence must be true or false, got 'yes'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_and_skipped(root, name):
    changes, message = FAULTS[name]
    entry = {**json.loads(first_file(root).read_text()), **changes}
    save_json(first_file(root), {key: value for key, value in entry.items() if value is not ...})
    with pytest.raises(ValueError, match=rf"{scenes()[0].name}\.json: .*{message}|{scenes()[0].name}\.json: {message}"):
        read_reasonseg(root, "val")
    read = read_reasonseg(root, "val", skips=Skips("skip"))
    assert len(turns(read)) == len(scenes()) - 1 and read.skipped == {"instructions": 1}


def test_a_byte_order_mark_is_no_part_of_the_text(root):
    whole = turns(read_reasonseg(root, "val"))
    first_file(root).write_bytes(codecs.BOM_UTF8 + first_file(root).read_bytes())
    assert turns(read_reasonseg(root, "val")) == whole


@pytest.mark.parametrize("data", [b"{", b"[]", b"\x81\x8d", b"[" * 100_000])
def test_broken_files_are_named(root, data):
    first_file(root).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{scenes()[0].name}\.json: "):
        read_reasonseg(root, "val")
    assert len(turns(read_reasonseg(root, "val", skips=Skips("skip")))) == len(scenes()) - 1


def test_missing_pictures_and_folders_are_named(root):
    for scene in scenes()[:2]:
        (root / "val" / f"{scene.name}.jpg").unlink()
    with pytest.raises(ValueError, match=rf"2 of 5 pictures are not in .*{scenes()[0].name}\.jpg, "):
        read_reasonseg(root, "val")
    with pytest.raises(ValueError, match="test: holds no JSON files"):
        read_reasonseg(root, "test")
