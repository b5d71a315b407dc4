"""What validation checks beyond the readers: pictures, texts, ids, numbers of instances; a fault counts once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from turned_pictures import exif_of

from instructsam.data import picture_checks
from instructsam.data.checks import Place, Problem, Skips
from instructsam.data.coco_instructions import stream_coco_instructions
from instructsam.data.picture_checks import Picture, PictureChecks, check_picture
from instructsam.data.sources import READERS, Source
from instructsam.data.table import write_table
from instructsam.data.validation import check_sample, validate_source, verify_table
from instructsam.data.validation_report import ValidationReport
from instructsam.errors import Consequence, DataError
from instructsam.masks import box_to_rle
from instructsam.processing.special_tokens import QWEN_IDS
from instructsam.structures import PhraseTarget, Sample, Turn

RLE = box_to_rle([2, 2, 8, 8], 20, 30)


def picture(folder: Path, name: str = "a.png", height: int = 20, width: int = 30, **options: Any) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name, **options)
    return folder / name


def check(path: Path, height: int = 20, width: int = 30) -> Problem | None:
    return check_picture(Picture(str(path), height, width, "s/1"))


# ---- pictures -----------------------------------------------------------------------------------------------------


def test_a_sound_picture_has_no_problem(tmp_path):
    assert check(picture(tmp_path)) is None
    assert check(picture(tmp_path, "turned.jpg", exif=exif_of(6)), 30, 20) is None  # upright


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_pictures_that_end_early_are_broken(tmp_path, name, share):
    path = picture(tmp_path, name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    found = check(path)
    assert found is not None and found.kind == "image broken" and found.place == Place(str(path), "s/1")
    assert str(path) not in found.reason


def test_other_faults_of_pictures_have_their_kind(tmp_path):
    faults = {
        "image missing": [tmp_path / "none.png", tmp_path],
        "image size": [picture(tmp_path, "tall.png", 30, 20), picture(tmp_path, "turned.jpg", exif=exif_of(6))],
    }
    for kind, paths in faults.items():
        for path in paths:
            found = check(path)
            assert found is not None and found.kind == kind, path
    thin = check(picture(tmp_path, "thin.png", 1, 300), 1, 300)
    assert thin is not None and thin.kind == "other" and "thinner" in thin.reason


def test_whatever_a_decoder_raises_is_a_broken_picture(tmp_path, monkeypatch):
    def fail(path: str) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(picture_checks, "load_image", fail)
    assert check(tmp_path) == Problem("image broken", Place(str(tmp_path), "s/1"), "list index out of range")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=[pytest.mark.multiprocess, pytest.mark.slow])])
def test_all_problems_come_out_in_order(tmp_path, workers):
    sound = str(picture(tmp_path))
    asked = [Picture(sound if k % 7 else f"{tmp_path}/none-{k}.png", 20, 30, str(k)) for k in range(150)]
    with PictureChecks(workers) as checks:
        found = [problem for one in asked for problem in checks.add(one)]
        found += list(checks.finish())
        assert list(checks.finish()) == []
    assert [problem.place.index for problem in found] == [str(k) for k in range(0, 150, 7)]


# ---- samples ------------------------------------------------------------------------------------------------------


def sample(identity: str = "s/1", *turns: Turn, image: Path | None = Path("a.png")) -> Sample:
    return Sample(identity, image, 20, 30, turns or (turn(),))


def turn(instruction: str = "find it", phrase: str = "it", instances: int = 1, **values: Any) -> Turn:
    return Turn(instruction, (PhraseTarget(phrase, (RLE,) * instances),), **values)


@pytest.mark.parametrize("token", QWEN_IDS)
def test_reserved_tokens_are_found_wherever_they_are(token):
    turns = [turn(f"find {token}"), turn(phrase=f"a{token}"), turn(answer=("so ", f"{token}."))]
    for number, one in enumerate(turns):
        found = list(check_sample(sample("s/1", *[turn()] * number, one)))
        assert [(problem.kind, problem.place) for problem in found] == [("text", Place("s/1", f"turns[{number}]"))]
        assert token in found[0].reason


@pytest.mark.parametrize("text", ["", "  ", "half \ud83d"])
def test_texts_that_cannot_be_asked_are_found(text):
    for one in (turn(text, id="q7"), turn(phrase=text, id="q7")):
        found = list(check_sample(sample("s/1", one)))
        assert [(problem.kind, problem.place.index) for problem in found] == [("text", "turns[0] (id 'q7')")]


def test_instances_are_counted_by_phrase():
    both = Turn("find", (PhraseTarget("a", (RLE,) * 10), PhraseTarget("b", (RLE,) * 11)))
    found = list(check_sample(sample("s/1", turn(instances=10), both)))
    assert [(problem.kind, problem.place.index) for problem in found] == [("too many instances", "turns[1]")]
    assert "'b' has 11 instances" in found[0].reason
    assert list(check_sample(sample("s/1", both), num_queries=None)) == []
    assert len(list(check_sample(sample("s/1", both), num_queries=5))) == 2


# ---- sources ------------------------------------------------------------------------------------------------------


def run(samples: Any, monkeypatch: Any, images: Any = (), **values: Any) -> tuple[list[Problem], dict[str, int]]:
    """Problems and notes of a source whose reader yields these samples; exceptions among them are raised."""

    def read(skips: Skips) -> Any:
        for one in samples:
            if isinstance(one, Exception):
                raise one
            yield one

    monkeypatch.setitem(READERS, "listed", read)
    found: list[Problem] = []
    with PictureChecks(0) as checks:
        notes = validate_source(Source("own", "listed", {}, **values), checks, found.append, images)
    return found, notes


def test_ids_that_occur_twice_are_found(tmp_path, monkeypatch):
    path = picture(tmp_path)
    found, notes = run([sample(name, image=path) for name in ("a", "b", "a")], monkeypatch)
    assert found == [Problem("duplicate", Place("a"), "another sample of the source has this id")]
    assert (notes["samples"], notes["instructions"], notes["instances"], notes["pictures"]) == (3, 3, 3, 1)


def test_a_picture_is_opened_once_and_its_problem_told_once(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(picture_checks, "check_picture", lambda one: opened.append(one) or check_picture(one))
    path = picture(tmp_path)
    gone = [sample(str(k), image=tmp_path / "gone.png") for k in range(3)]
    talk = Sample("t", None, 0, 0, (Turn("hello", answer=("hi",)),))
    other_size = Sample("o", path, 30, 30, (turn(),))
    found, notes = run([*gone, talk, sample("4", image=path), sample("5", image=path), other_size], monkeypatch)
    assert [(problem.kind, problem.place.index) for problem in found] == [("image missing", "0"), ("image size", "o")]
    assert len(opened) == 3 and notes["samples about no picture"] == 1


def test_a_source_that_breaks_off_is_a_problem(tmp_path, monkeypatch):
    gone = sample("1", image=tmp_path / "gone.png")
    found, notes = run([gone, DataError("x.json: is cut off", "json")], monkeypatch)
    assert [problem.kind for problem in found] == ["json", "image missing"] and notes["samples"] == 1
    assert found[0].place == Place("own") and found[0].reason.startswith("x.json: is cut off; what comes after")


def test_pictures_of_held_out_splits_are_counted(tmp_path, monkeypatch):
    path = picture(tmp_path, "COCO_train2014_000000000009.jpg")
    samples = [sample("a", image=path), sample("b", image=picture(tmp_path))]
    found, notes = run(samples, monkeypatch, {9}, held_out=True)
    assert found == [] and notes["samples"] == 1
    assert notes["samples left out: their pictures are in a validation or test split"] == 1
    found, notes = run(samples, monkeypatch, {9})
    assert found == [] and notes["samples"] == 2
    assert sum(number for note, number in notes.items() if note.startswith("samples kept")) == 1


def test_large_samples_are_noted_and_no_fault(tmp_path, monkeypatch):
    many = sample("a", *[turn(instances=10)] * 11, image=picture(tmp_path))
    found, notes = run([many], monkeypatch)
    assert found == []
    assert notes["samples of more than 10 phrases (a part is asked at a time)"] == 1
    assert notes["samples of more than 100 instances (a part is asked at a time)"] == 1


# ---- what follows from a fault ------------------------------------------------------------------------------------


def own_data(root: Path, images: list[Any], annotations: list[Any], lines: list[Any]) -> Path:
    folder = root / "train"
    (folder / "images").mkdir(parents=True)
    picture(folder / "images")
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "instructions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def line(identity: str, image: int, *ids: int) -> dict[str, Any]:
    phrases = [{"phrase": "it", "annotation_ids": list(ids)}]
    return {"id": identity, "image_id": image, "instruction": "find it", "phrases": phrases}


def test_what_a_fault_takes_with_it_is_counted_and_not_reported(tmp_path):
    sound = {"id": 1, "file_name": "a.png", "height": 20, "width": 30}
    images = [sound, {"id": 2, "file_name": "a.png", "height": 20}]  # no width
    annotations = [
        {"id": 1, "image_id": 1, "segmentation": RLE},
        {"id": 2, "image_id": 1, "segmentation": {**RLE, "counts": "~"}},
        {"id": 3, "image_id": 2, "segmentation": RLE},
        {"id": 4, "image_id": 99, "segmentation": RLE},
        {"id": 5, "image_id": 1, "segmentation": RLE, "iscrowd": 1},
    ]
    lines = [line("a", 1, 1), line("b", 1, 2), line("c", 2, 3), line("d", 1, 4), line("e", 1, 5), line("f", 1, 77)]
    root = own_data(tmp_path, images, annotations, lines)
    found: list[Problem] = []
    skips = Skips("skip", report=found.append)
    (only,) = stream_coco_instructions(root, "train", skips)
    assert [one.id for one in only.turns] == ["a"]
    told = [(problem.kind, problem.place.index) for problem in found]
    assert told == [
        ("field", "images[1]"),
        ("reference", "annotations[3] (id 4)"),
        ("rle characters", "annotations[1] (id 2)"),
        ("reference", "5"),  # a crowd is no instance: the instruction is to blame
        ("reference", "6"),
    ]
    assert skips.counts == {"images": 1, "annotations": 3, "instructions": 5}
    with pytest.raises(DataError, match="width must be"):  # the fault itself, where the first one is raised
        list(stream_coco_instructions(root, "train"))


def test_a_consequence_counts_towards_the_limit(caplog):
    skips = Skips("skip", max_bad=1)
    skips.bad("images", Place("x"), DataError("is bad"))
    with pytest.raises(DataError, match="2 bad entries"):
        skips.bad("instructions", Place("y"), Consequence("image 1 was left out"))
    assert "image 1" not in caplog.text


# ---- tables, report -------------------------------------------------------------------------------------------------


def test_a_table_whose_files_changed_is_found(tmp_path):
    found: list[Problem] = []
    assert not verify_table(tmp_path / "own", found.append)
    write_table(tmp_path / "own", [sample(str(k)) for k in range(5)], {})
    assert verify_table(tmp_path / "own", found.append) and found == []
    shard = tmp_path / "own" / "00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    assert verify_table(tmp_path / "own", found.append)
    assert len(found) == 1 and "00000.arrow" in found[0].reason


def test_the_report_lists_by_kind_and_keeps_texts_as_texts(tmp_path):
    with ValidationReport(tmp_path / "out", "Validation of x") as report:
        for k in range(25):
            report.add("own", Problem("mask empty", Place("a.json", f"[{k}]"), "the mask is empty"))
        report.add("b|c", Problem("text", Place("b.json"), "`| <b>\nnext"))
        report.close_source("own", {"samples": 1200, "records left out": 3, "nothing": 0})
    lines = [json.loads(text) for text in (tmp_path / "out" / "validation.jsonl").read_text().splitlines()]
    assert len(lines) == report.total == 26
    assert lines[0] == {
        "source": "own",
        "kind": "mask empty",
        "file": "a.json",
        "index": "[0]",
        "reason": "the mask is empty",
    }
    text = (tmp_path / "out" / "validation.md").read_text()
    assert "| mask empty | the mask has no pixel | 25 | own 25 |" in text
    assert "### mask empty (25, the first 20)" in text and text.count("`the mask is empty`") == 20
    assert "- b\\|c: `b.json`: `'| <b> next`" in text
    assert "1,200 samples" in text and "3 records left out" in text and "nothing" not in text
    assert "25  mask empty: the mask has no pixel (own 25)" in report.summary()
    assert list(report.by_kind()) == ["text", "mask empty"]  # in the order of KINDS


def test_an_interrupted_run_leaves_no_summary_of_another(tmp_path):
    with ValidationReport(tmp_path, "first"):
        pass
    with pytest.raises(RuntimeError), ValidationReport(tmp_path, "second"):
        raise RuntimeError
    assert not (tmp_path / "validation.md").exists()
