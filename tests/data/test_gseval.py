"""GSEval: captions with their class and mask, faults named by line and skipped."""

from __future__ import annotations

import json

import numpy as np
import pytest
from benchmark_fixtures import gseval_lines, scenes, write_benchmark

from instructsam import masks
from instructsam.data.checks import Skips
from instructsam.data.gseval import read_gseval

CLASSES = {0: "stuff", 1: "part", 2: "multi", 3: "single"}


@pytest.fixture
def read(tmp_path):
    def run(lines=None, **options):
        write_benchmark("gseval", tmp_path)
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines or gseval_lines()]
        (tmp_path / "test.jsonl").write_text("\n".join(texts))
        return read_gseval(tmp_path, "test", "gseval", "{split}.jsonl", tmp_path / "images", CLASSES, **options)

    return run


def turns(read) -> dict:
    return {turn.id: (sample, turn) for sample in read.samples for turn in sample.turns}


def test_one_caption_is_one_instruction_of_its_class(read):
    found = turns(read())
    assert [turn.kind for _, turn in found.values()] == ["stuff", "part", "multi", "single", "stuff"]
    for number, scene in enumerate(scenes()):
        sample, turn = found[f"gseval/test/{number}"]
        assert turn.instruction == scene.targeted.text
        assert (sample.height, sample.width) == (scene.height, scene.width)
        expected = scene.masks[list(scene.targeted.indices)].any(axis=0)
        np.testing.assert_array_equal(masks.decode(turn.phrases[0].rles[0]), expected)


def test_polygons_take_the_size_from_the_picture(read):
    lines = gseval_lines()
    lines[0]["segmentation"] = [[1, 1, 9, 1, 9, 5, 1, 5], [20, 20, 22, 20, 22, 22, 20, 22]]
    sample, turn = turns(read(lines))["gseval/test/0"]
    assert (sample.height, sample.width) == (scenes()[0].height, scenes()[0].width)
    assert [masks.area(rle) for rle in turn.phrases[0].rles] == [36]


def test_several_masks_of_a_caption_are_joined(read):
    scene, lines = scenes()[0], gseval_lines()
    lines[0]["segmentation"] = scene.rles((0, 1))
    (rle,) = turns(read(lines))["gseval/test/0"][1].phrases[0].rles
    np.testing.assert_array_equal(masks.decode(rle), scene.masks[:2].any(axis=0))


def test_classes_may_be_configured_as_text(read, tmp_path):
    read()
    split = read_gseval(tmp_path, "test", "x", "test.jsonl", tmp_path / "images", {str(k): f"k{k}" for k in CLASSES})
    assert {turn.kind for _, turn in turns(split).values()} == {"k0", "k1", "k2", "k3"}


FAULTS = {
    "broken": ('{"idx": 1', "Expecting"),
    "list": ("[1]", "expected an object, got list"),
    "class": ({"class_id": 9}, "class_id 9 is none of 0, 1, 2, 3"),
    "no class": ({"class_id": None}, "class_id None is none of"),
    "id": ({"idx": None}, "idx must be a number or a string"),
    "id twice": ({"idx": 0}, r"id '0' is that of .*test\.jsonl:1 too"),
    "image": ({"image_path": ""}, "image_path must be the name of a picture"),
    "caption": ({"caption": " "}, "the instruction is empty"),
    "no caption": ({"caption": None}, "the instruction must be a string"),
    "no mask": ({"segmentation": []}, "has no segmentation"),
    "mask": ({"segmentation": {"size": [96, 80], "counts": "garbage!"}}, "segmentation: "),
    "two points": ({"segmentation": [[1, 1, 9, 9]]}, r"segmentation\[0\]: .*2 points"),
    "size": ({"height": 80, "width": 96}, r"segmentation: size is 96x80 .*expected 80x96"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_and_skipped(read, name):
    change, message = FAULTS[name]
    lines = gseval_lines()
    lines[1] = change if isinstance(change, str) else {**lines[1], **change}
    with pytest.raises(ValueError, match=r"test\.jsonl:2: .*" + message):
        read(lines)
    split = read(lines, skips=Skips("skip"))
    assert len(turns(split)) == len(scenes()) - 1 and split.skipped == {"instructions": 1}


def test_missing_pictures_are_listed(read):
    lines = gseval_lines()
    lines[2]["image_path"] = "gone.jpg"
    with pytest.raises(ValueError, match=r"test\.jsonl: 1 of 5 pictures are not in .*images: gone\.jpg"):
        read(lines)
