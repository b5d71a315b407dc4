"""RefCOCO family and gRefCOCO: sentences with their masks as published, faults named and skipped."""

from __future__ import annotations

import json
import logging
import pickle

import numpy as np
import pytest
from benchmark_fixtures import refer_set, save_json, scenes, write_benchmark

from instructsam import masks
from instructsam.data.checks import Skips
from instructsam.data.referring import read_referring

FILES = {False: ("refcoco", "refs(unc).p"), True: ("grefcoco", "grefs(unc).json")}


class Refer:
    """A small set, pickled refs or gRefCOCO's; tests change ``refs`` or ``instances`` and read it."""

    def __init__(self, root, lists: bool):
        self.name, self.file = FILES[lists]
        self.root = root
        write_benchmark(self.name, root)
        self.refs, self.instances = refer_set(lists)

    def read(self, split="val", **options):
        base = self.root / self.name
        save_json(base / "instances.json", self.instances)
        if self.file.endswith(".p"):
            (base / self.file).write_bytes(pickle.dumps(self.refs, protocol=2))
        else:
            save_json(base / self.file, self.refs)
        return read_referring(self.root, split, self.name, self.name, self.file, self.root / "train2014", **options)


@pytest.fixture
def refcoco(tmp_path) -> Refer:
    return Refer(tmp_path, lists=False)


@pytest.fixture
def grefcoco(tmp_path) -> Refer:
    return Refer(tmp_path, lists=True)


def turns(read) -> dict:
    return {turn.id: (sample, turn) for sample in read.samples for turn in sample.turns}


def test_one_sentence_is_one_instruction_with_the_annotation_s_mask(refcoco):
    found = turns(refcoco.read())
    expected = {
        f"refcoco/val/{sentence['sent_id']}": (ref, sentence)
        for ref in refcoco.refs
        for sentence in ref["sentences"]
        if ref["split"] == "val"
    }
    assert found.keys() == expected.keys()
    for identity, (ref, sentence) in expected.items():
        sample, turn = found[identity]
        scene, shape = scenes()[ref["image_id"] - 1], ref["ann_id"] % 100
        assert turn.instruction == sentence["sent"] and turn.phrases[0].text == sentence["sent"].removesuffix(".")
        assert (sample.height, sample.width) == (scene.height, scene.width)
        (rle,) = turn.phrases[0].rles
        whole = scene.masks[shape]
        if shape == 0:  # given as the polygon of its box
            whole = masks.box_to_mask(masks.bbox(masks.encode(whole)), scene.height, scene.width)
        np.testing.assert_array_equal(masks.decode(rle), whole)


def test_pictures_are_found_by_image_id_and_not_by_the_ref_s_file_name(refcoco):
    read = refcoco.read()
    assert all(sample.image.is_file() for sample in read.samples)
    names = {ref["file_name"] for ref in refcoco.refs}
    assert not names & {sample.image.name for sample in read.samples}


def test_the_other_split_is_read_alone(refcoco):
    first, second = turns(refcoco.read("train")), turns(refcoco.read("val"))
    assert first and second and not {i.split("/")[-1] for i in first} & {i.split("/")[-1] for i in second}
    with pytest.raises(ValueError, match=r"has no split 'testA'; there is val \(\d+ refs\), train \(\d+ refs\)"):
        refcoco.read("testA")


def test_grefcoco_has_several_targets_and_none(grefcoco):
    found = turns(grefcoco.read())
    counts = {len(turn.phrases[0].rles) for _, turn in found.values()}
    assert {0, 1, 2, 3} <= counts
    for ref in grefcoco.refs:
        if ref["split"] == "val":
            _, turn = found[f"grefcoco/val/{ref['sent_ids'][0]}"]
            assert len(turn.phrases[0].rles) == (0 if ref["ann_id"] == [-1] else len(ref["ann_id"]))
    assert any(turn.phrases[0].text == "a purple elephant" for _, turn in found.values())  # no final period


def test_crowd_regions_are_no_targets(grefcoco):
    ref = next(ref for ref in grefcoco.refs if len(ref["ann_id"]) == 3 and ref["split"] == "val")
    crowd = next(entry for entry in grefcoco.instances["annotations"] if entry["id"] == ref["ann_id"][1])
    crowd["iscrowd"] = 1
    for other in grefcoco.refs:
        if other is not ref and ref["ann_id"][1] in other["ann_id"]:
            other["ann_id"] = [-1]
    _, turn = turns(grefcoco.read())[f"grefcoco/val/{ref['sent_ids'][0]}"]
    assert len(turn.phrases[0].rles) == 2


def test_categories_boxes_and_crowd_flags_are_not_needed(refcoco, grefcoco):
    for data in (refcoco, grefcoco):
        whole = data.read()
        del data.instances["categories"]
        for entry in data.instances["annotations"]:
            for key in ("category_id", "bbox", "iscrowd"):
                del entry[key]
        for ref in data.refs:
            del ref["category_id"]
        assert data.read() == whole


def test_pictures_are_not_opened_but_looked_for(refcoco):
    for path in (refcoco.root / "train2014").iterdir():
        path.write_bytes(b"no picture")
    whole = refcoco.read()
    (refcoco.root / "train2014" / f"COCO_train2014_{scenes()[1].name}.jpg").unlink()
    (refcoco.root / "train2014" / f"COCO_train2014_{scenes()[2].name}.jpg").unlink()
    with pytest.raises(ValueError) as caught:
        refcoco.read()
    assert f"2 of {len(whole.samples)} pictures are not in {refcoco.root / 'train2014'}: COCO" in str(caught.value)
    assert scenes()[1].name in str(caught.value) and scenes()[2].name in str(caught.value)
    left = refcoco.read(skips=Skips("skip"))
    gone = {sample.image.name for sample in whole.samples} - {sample.image.name for sample in left.samples}
    assert len(gone) == 2 and left.skipped["images"] == 2
    assert left.skipped["instructions"] == len(turns(whole)) - len(turns(left))


def set_ref(**changes):
    return lambda data: data.refs[0].update(changes)


def set_sentence(**changes):
    return lambda data: data.refs[0]["sentences"][0].update(changes)


def set_annotation(**changes):
    """Change the annotation of the first ref."""

    def apply(data):
        ids = data.refs[0]["ann_id"]
        wanted = ids[0] if isinstance(ids, list) else ids
        next(entry for entry in data.instances["annotations"] if entry["id"] == wanted).update(changes)

    return apply


def repeat_annotation(data):
    ids = data.refs[0]["ann_id"]
    wanted = ids[0] if isinstance(ids, list) else ids
    entry = next(entry for entry in data.instances["annotations"] if entry["id"] == wanted)
    data.instances["annotations"].append(dict(entry))


EMPTY = dict(masks.empty_rle(scenes()[0].height, scenes()[0].width))
FAULTS = {
    "no such annotation": (set_ref(ann_id=99999), r"\[0\] \(ref_id 0\): ann_id 99999 has no annotation in .*instances"),
    "annotation of another image": (set_ref(ann_id=200), r"\[0\] .*ann_id 200 belongs to image 2, but the ref to 1"),
    "no such image": (set_ref(image_id=77), r"\[0\] .*unknown image_id 77"),
    "image id list": (set_ref(image_id=[1]), r"\[0\] .*unknown image_id \[1\]"),
    "no annotation": (set_ref(ann_id=None), r"\[0\] .*ann_id must be an id or a list of ids, got None"),
    "no sentences": (set_ref(sentences=[]), r"\[0\] .*has no list of sentences"),
    "empty text": (set_sentence(sent="  "), r"\[0\] .* sentences\[0\]: the instruction is empty"),
    "no text": (set_sentence(sent=None), r"\[0\] .* sentences\[0\]: the instruction must be a string"),
    "no sentence id": (set_sentence(sent_id=None), r"\[0\] .* sentences\[0\]: expected an object with sent and"),
    "sentence id twice": (set_sentence(sent_id=1001), r"sentences\[1\]: id '1001' is that of .*sentences\[0\] too"),
    "annotation twice": (repeat_annotation, r"\[0\] .*occurs 2 times"),
    "no mask": (
        set_annotation(segmentation=[]),
        r"\[0\] .*annotations\[0\] \(id 100\): segmentation: expected the mask",
    ),
    "mask of another size": (
        set_annotation(segmentation=dict(masks.empty_rle(8, 8))),
        r"annotations\[0\] \(id 100\): segmentation: size is 8x8 .*expected 96x80",
    ),
    "counts short": (set_annotation(segmentation={"size": [96, 80], "counts": [5, 5]}), r"counts sum to 10, but 96x80"),
    "empty mask": (set_annotation(segmentation=EMPTY), r"annotations\[0\] .*the mask is empty"),
    "polygon outside": (set_annotation(segmentation=[[90, 1, 95, 1, 95, 9]]), r"annotations\[0\] .*outside the image"),
    "polygon of two points": (set_annotation(segmentation=[[1, 1, 9, 9]]), r"annotations\[0\] .*has 2 points"),
    "polygon nan": (set_annotation(segmentation=[[1, 1, 9, float("nan"), 5, 5]]), r"annotations\[0\] .*NaN"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_and_skipped(refcoco, name, caplog):
    whole = turns(refcoco.read())
    apply, message = FAULTS[name]
    apply(refcoco)
    with pytest.raises(ValueError, match=message) as caught:
        refcoco.read()
    assert str(refcoco.root / "refcoco") in str(caught.value)
    with caplog.at_level(logging.WARNING):
        read = refcoco.read(skips=Skips("skip"))
    left = turns(read)
    assert len(whole) - 4 <= len(left) < len(whole) and left.keys() <= whole.keys()
    assert sum(read.skipped.values()) >= 1 and f"{len(left)} instructions are left" in caplog.text
    with pytest.raises(ValueError, match="more than the 0 allowed"):
        refcoco.read(skips=Skips("skip", 0))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "must be an id or a list of ids"),
        ([100, -1], "ann_id -1 has no annotation"),
        ([100, 100], "holds an id twice"),
        ([[100]], "must be an id or a list of ids"),
    ],
)
def test_faults_of_annotation_lists_are_named(grefcoco, ids, message):
    grefcoco.refs[0]["ann_id"] = ids
    with pytest.raises(ValueError, match=rf"\[0\] \(ref_id 0\): .*{message}"):
        grefcoco.read()


def test_a_ref_to_crowds_alone_is_bad(grefcoco):
    for entry in grefcoco.instances["annotations"]:
        entry["iscrowd"] = int(entry["id"] == grefcoco.refs[0]["ann_id"][0])
    with pytest.raises(ValueError, match=r"\[0\] .*names crowd regions only"):
        grefcoco.read()


def test_broken_files_are_named_in_any_case(refcoco, grefcoco):
    for refs, message in (({"a": 1}, "expected a list of refs, got dict"), ([{"split": "val"}, 3], r"\[1\]: expected")):
        refcoco.refs = refs
        with pytest.raises(ValueError, match=rf"refs\(unc\)\.p: {message}"):
            refcoco.read(skips=Skips("skip"))
    path = grefcoco.root / "grefcoco" / "grefs(unc).json"
    path.write_text(json.dumps(grefcoco.refs)[:-20])
    with pytest.raises(ValueError, match=r"grefs\(unc\)\.json: is not valid JSON"):
        read_referring(grefcoco.root, "val", "grefcoco", "grefcoco", path.name, grefcoco.root)


def test_a_truncated_pickle_is_named(refcoco):
    path = refcoco.root / "refcoco" / "refs(unc).p"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: is no readable pickle"):
        read_referring(refcoco.root, "val", "refcoco", "refcoco", path.name, refcoco.root)
