"""The release's evaluation JSON: all four forms as published, faults named and skipped."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from benchmark_fixtures import release_records, save_json, scenes, write_benchmark

from instructsam import masks
from instructsam.data.checks import Skips
from instructsam.data.release_eval import LAYOUTS, read_release_eval

WRITTEN = {"inst2seg": "inst2seg", "grefcoco": "grefcoco_release", "reasonseg": "reasonseg_release"}


@pytest.fixture
def read(tmp_path):
    """Read records of a form (by default the small set's)."""

    def run(form: str, records=None, **options):
        write_benchmark(WRITTEN.get(form, form), tmp_path)
        save_json(tmp_path / "x_val.json", release_records(form) if records is None else records)
        return read_release_eval(tmp_path, "val", form, form, "x_{split}.json", tmp_path / "images", **options)

    return run


def turns(read) -> dict:
    return {turn.id: (sample, turn) for sample in read.samples for turn in sample.turns}


def decoded(sample, turn) -> np.ndarray:
    return masks.decode_batch(turn.phrases[0].rles, sample.height, sample.width)


def test_inst2seg_knows_every_form_of_masks(read):
    found = turns(read("inst2seg"))
    for number, scene in enumerate(scenes()):
        for place, asked in enumerate(scene.asked):
            sample, turn = found.pop(f"inst2seg/val/{number}-{place}")
            assert turn.instruction == asked.text.strip() and turn.phrases[0].text == ""
            np.testing.assert_array_equal(decoded(sample, turn), scene.masks[list(asked.indices)])
        count = len(scene.targeted.indices)
        assert len(found.pop(f"inst2seg/val/{number}-{len(scene.asked)}")[1].phrases[0].rles) == 1
        assert len(found.pop(f"inst2seg/val/{number}-{len(scene.asked) + 1}")[1].phrases[0].rles) == count
    assert not found


def test_grefcoco_pairs_expressions_with_masks(read):
    found = turns(read("grefcoco"))
    assert len(found) == sum(len(scene.asked) for scene in scenes())
    for number, scene in enumerate(scenes()):
        for place, asked in enumerate(scene.asked):
            sample, turn = found[f"grefcoco/val/{number}-{place}"]
            assert turn.phrases[0].text == asked.text.removesuffix(".")
            np.testing.assert_array_equal(decoded(sample, turn), scene.masks[list(asked.indices)])


def test_reasonseg_has_one_mask_its_kind_and_what_to_ignore(read):
    split = read("reasonseg")
    found = turns(split)
    for number, scene in enumerate(scenes()):
        sample, turn = found[f"reasonseg/val/{number}"]
        assert turn.kind == ("short" if number % 2 else "long")
        assert (sample.height, sample.width) == (scene.height, scene.width)  # from the masks
        np.testing.assert_array_equal(decoded(sample, turn), [scene.masks[list(scene.targeted.indices)].any(axis=0)])
    assert list(split.ignore_rles) == ["reasonseg/val/0"]
    ignored = masks.decode(split.ignore_rles["reasonseg/val/0"])
    assert ignored[:3].all() and not ignored[3:].any()


def test_reasonseg_of_polygons_takes_the_size_from_the_picture(read):
    records = release_records("reasonseg")
    records[1] = {**records[1], "mask": [[1, 1, 9, 1, 9, 5, 1, 5]]}
    sample, turn = turns(read("reasonseg", records))["reasonseg/val/1"]
    assert (sample.height, sample.width) == (scenes()[1].height, scenes()[1].width)
    assert decoded(sample, turn).sum() == 32


def test_roborefit_asks_questions_or_expressions(read):
    found = turns(read("roborefit"))
    for number, scene in enumerate(scenes()):
        _, turn = found[f"roborefit/val/{number}"]
        assert turn.instruction == scene.targeted.text
        assert turn.phrases[0].text == ("" if number % 2 else scene.targeted.text)
        assert len(turn.phrases[0].rles) == len(scene.targeted.indices)


def with_first(form: str, **changes):
    records = release_records(form)
    return form, [{**records[0], **changes}, *records[1:]]


def annotation(**changes):
    first = release_records("inst2seg")[0]["annotation"]
    return with_first("inst2seg", annotation=[{**first[0], **changes}, *first[1:]])


SMALL = dict(masks.empty_rle(4, 4))
FAULTS = {
    "no object": (("inst2seg", [3, *release_records("inst2seg")[1:]]), r"\[0\]: expected an object, got int"),
    "no image": (with_first("inst2seg", image=None), r"\[0\]: image must be the name of a picture, got None"),
    "size": (with_first("inst2seg", height=0), r"\[0\] annotation\[0\]: height must be a positive number of pixels"),
    "other size": (with_first("inst2seg", height=95), r"\[0\] annotation\[0\]: mask: size is 96x80 .*expected 95x80"),
    "no list": (with_first("inst2seg", annotation={}), r"\[0\]: has no list 'annotation'"),
    "annotation": (with_first("inst2seg", annotation=[3]), r"\[0\]: annotation\[0\]: expected an object, got int"),
    "empty text": (annotation(text=""), r"\[0\] annotation\[0\]: the instruction is empty"),
    "no text": (annotation(text=None), r"\[0\] annotation\[0\]: the instruction must be a string, got None"),
    "two points": (annotation(mask=[[1, 1, 9, 9]]), r"\[0\] annotation\[0\]: mask\[0\]: .*2 points"),
    "two points in lists": (annotation(mask=[[[1, 1, 9, 9]]]), r"\[0\] annotation\[0\]: mask\[0\]\[0\]: .*2 points"),
    "mask size": (annotation(mask=[SMALL]), r"\[0\] annotation\[0\]: mask\[0\]: size is 4x4"),
    "mask form": (annotation(mask="abc"), r"\[0\] annotation\[0\]: mask: expected an RLE"),
    "polygon outside": (annotation(mask=[[200, 1, 210, 1, 210, 9]]), r"\[0\] annotation\[0\]: .*outside the image"),
    "lengths": (with_first("grefcoco", masks=[None]), r"\[0\]: has 6 expressions in cat, but 1 masks"),
    "is_sentence": (with_first("reasonseg", is_sentence=1), r"\[0\]: is_sentence must be true or false, got 1"),
    "no mask": (with_first("reasonseg", mask=[]), r"\[0\]: has no mask"),
    "ignore": (with_first("reasonseg", ignore_mask=SMALL), r"\[0\]: ignore_mask: size is 4x4"),
    "no question": (with_first("roborefit", expression=None), r"\[0\]: needs either a question or an expression"),
    "two questions": (with_first("roborefit", question="which?"), r"\[0\]: needs either a question or an expression"),
    "no masks": (with_first("roborefit", masks=None), r"\[0\]: has no masks"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_and_skipped(read, name, caplog):
    (form, records), message = FAULTS[name]
    with pytest.raises(ValueError, match=r"x_val\.json: " + message):
        read(form, records)
    with caplog.at_level(logging.WARNING):
        split = read(form, records, skips=Skips("skip"))
    whole, left = turns(read(form)), turns(split)
    assert left.keys() < whole.keys() and not {i for i in whole if "/0" not in i} - left.keys()
    assert sum(split.skipped.values()) >= 1 and f"{len(left)} instructions are left" in caplog.text


def test_missing_pictures_are_listed(read, tmp_path):
    records = release_records("inst2seg")
    records[1]["image"], records[3]["image"] = "gone.jpg", "gone too.jpg"
    with pytest.raises(ValueError, match=r"2 of 5 pictures are not in .*images: gone\.jpg, gone too\.jpg"):
        read("inst2seg", records)


def test_broken_files_are_named(read, tmp_path):
    with pytest.raises(ValueError, match=r"x_val\.json: expected a list of records, got dict"):
        read("inst2seg", {"records": []}, skips=Skips("skip"))
    with pytest.raises(ValueError, match="layout='lvis' is none of inst2seg, grefcoco"):
        read_release_eval(tmp_path, "val", "x", "lvis", "x.json", tmp_path)
    with pytest.raises(ValueError, match=r"none\.json: cannot be read"):
        read_release_eval(tmp_path, "val", "x", next(iter(LAYOUTS)), "none.json", tmp_path)
