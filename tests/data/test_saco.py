"""SA-Co style sets: pairs of picture and noun phrase, faults named and skipped."""

from __future__ import annotations

import numpy as np
import pytest
from benchmark_fixtures import saco_set, save_json, scenes, write_benchmark

from instructsam import masks
from instructsam.data.checks import Skips
from instructsam.data.saco import read_saco


@pytest.fixture
def read(tmp_path):
    def run(data=None, **options):
        write_benchmark("saco", tmp_path)
        save_json(tmp_path / "test.json", data or saco_set())
        return read_saco(tmp_path, "test", "saco", "{split}.json", tmp_path / "images", **options)

    return run


def turns(read) -> dict:
    return {turn.id: (sample, turn) for sample in read.samples for turn in sample.turns}


def test_every_pair_is_one_instruction_with_its_instances(read):
    split = read()
    found = turns(split)
    assert len(split.samples) == len(scenes())
    number = 10_000
    for scene in scenes():
        for asked in scene.asked:
            sample, turn = found.pop(f"saco/test/{number}")
            assert turn.instruction == asked.text and sample.image.name == f"{scene.name}.jpg"
            found_NHW = masks.decode_batch(turn.phrases[0].rles, scene.height, scene.width)
            np.testing.assert_array_equal(found_NHW, scene.masks[list(asked.indices)])
            number += 1
    assert not found


def test_crowd_regions_are_left_out(read):
    data = saco_set()
    data["annotations"][0]["iscrowd"] = 1
    assert turns(read(data))["saco/test/10000"][1].phrases[0].rles == ()


def annotation(**changes):
    return lambda data: data["annotations"][0].update(changes)


def pair(**changes):
    return lambda data: data["images"][0].update(changes)


def test_a_pair_that_lost_an_annotation_is_left_out_as_a_whole(read):
    data = saco_set()
    del data["annotations"][0]["id"]
    spoilt = f"saco/test/{data['annotations'][0]['image_id']}"
    assert spoilt in turns(read(saco_set())) and spoilt not in turns(read(data, skips=Skips("skip")))


FAULTS = {
    "phrase": (pair(text_input=""), r"image 10000: the phrase in text_input is empty", {"instructions": 1}),
    "no phrase": (pair(text_input=None), r"image 10000: the phrase in text_input is empty", {"instructions": 1}),
    "size": (pair(height=0), r"images\[0\]: height must be a positive number", {"images": 1, "annotations": 1}),
    "pair twice": (
        lambda data: data["images"].append(dict(data["images"][0])),
        r"images\[27\]: id 10000 occurs a second time",
        {"images": 1},
    ),
    "two points": (
        annotation(segmentation=[[1, 1, 9, 9]]),
        r"image 10000: annotations\[0\] \(id 0\): segmentation\[0\]: .*2 points",
        {"instructions": 1},
    ),
    "mask": (
        annotation(segmentation={"size": [96, 80], "counts": [7]}),
        r"image 10000: annotations\[0\] \(id 0\): segmentation: counts sum to 7",
        {"instructions": 1},
    ),
    "mask size": (
        annotation(segmentation=dict(masks.empty_rle(80, 96))),
        r"image 10000: annotations\[0\] .*size is 80x96 .*expected 96x80",
        {"instructions": 1},
    ),
    "no mask": (annotation(segmentation=None), r"annotations\[0\] .*expected the mask of one", {"instructions": 1}),
    "unknown pair": (annotation(image_id=5), r"annotations\[0\] \(id 0\): unknown image_id 5", {"annotations": 1}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_and_skipped(read, name):
    apply, message, skipped = FAULTS[name]
    data = saco_set()
    apply(data)
    with pytest.raises(ValueError, match=r"test\.json: .*" + message + r"|test\.json: " + message):
        read(data)
    split = read(data, skips=Skips("skip"))
    assert split.skipped == skipped
    assert len(turns(split)) == len(turns(read())) - (0 if name in ("pair twice", "unknown pair") else 1)


def test_missing_pictures_are_listed(read):
    data = saco_set()
    for entry in data["images"]:
        entry["file_name"] = f"elsewhere/{entry['file_name']}"
    with pytest.raises(ValueError, match=r"test\.json: 5 of 5 pictures are not in .*images: elsewhere/"):
        read(data)
