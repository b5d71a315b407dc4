"""The tiny world on disk: what is written can be read, is the same every time, and is never half there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from instructsam import masks
from instructsam.data import tiny_world
from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.data.shape_instructions import GENERIC_PHRASE, INSTRUCTION_KINDS
from instructsam.data.shape_wordings import COMMON, ORDINALS, TIMES
from instructsam.data.tiny_world import main, make_example, make_tiny_world

SETTINGS = {"train": 4, "val": 4, "seed": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("worlds") / "world"
    make_tiny_world(root, **SETTINGS)
    return root


def contents(root) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_written_is_what_was_made(world, split):
    samples = read_coco_instructions(world, split)
    assert len(samples) == 4
    for index, sample in enumerate(samples):
        scene, instructions = make_example(3, split, index)
        np.testing.assert_array_equal(np.asarray(Image.open(sample.image)), scene.image)
        rles = [item["rle"] for item in sample.objects]
        np.testing.assert_array_equal(masks.decode_batch(rles, 96, 96), scene.masks)
        for item, shape, mask in zip(sample.objects, scene.shapes, scene.masks, strict=True):
            assert (item["category"], item["area"]) == (shape.kind, shape.area)
            assert item["attributes"] == {"color": shape.color, "size": shape.size, "texture": shape.texture}
            ys, xs = np.nonzero(mask)
            assert item["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        for turn, made in zip(sample.turns, instructions, strict=True):
            assert (turn.instruction, turn.kind) == (made.text, made.kind)
            got = [(target.text, list(target.rles)) for target in turn.phrases]
            assert got == [(phrase, [rles[i] for i in indices]) for phrase, indices in made.phrases]


def test_instruction_ids_are_unique(world):
    ids = [t.id for split in ("train", "val") for s in read_coco_instructions(world, split) for t in s.turns]
    assert len(ids) == len(set(ids)) > 40


def test_no_picture_of_val_is_in_train():
    def pictures(split: str) -> set[bytes]:
        return {make_example(0, split, i)[0].image.tobytes() for i in range(40)}

    train, val = pictures("train"), pictures("val")
    assert len(train) == len(val) == 40
    assert not train & val


def test_scenes_do_not_depend_on_how_many_there_are(world, tmp_path):
    make_tiny_world(tmp_path / "more", **{**SETTINGS, "train": 6})
    few, more = contents(world), contents(tmp_path / "more")
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) == 8 and all(few[name] == more[name] for name in pictures)
    lines = [(root / "train/instructions.jsonl").read_text().splitlines() for root in (world, tmp_path / "more")]
    assert lines[1][: len(lines[0])] == lines[0] and len(lines[1]) > len(lines[0])


@pytest.mark.multiprocess
def test_another_process_writes_the_same_bytes(world, tmp_path):
    command = [sys.executable, "-m", "instructsam.make_tiny_world", "--root", str(tmp_path / "again")]
    command += ["--train", "4", "--val", "4", "--seed", "3"]
    environment = {**os.environ, "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "instructions: category" in done.stdout
    assert contents(tmp_path / "again") == contents(world)


def test_another_seed_gives_another_world(world):
    assert not np.array_equal(make_example(4, "val", 0)[0].image, make_example(3, "val", 0)[0].image)


def test_world_file_and_tokenizer(world):
    description = json.loads((world / "world.json").read_text())
    assert description["settings"] == {"format": tiny_world.FORMAT, "image_size": 96, **SETTINGS}
    assert set(description["instructions"]["val"]) == set(INSTRUCTION_KINDS)
    assert sum(description["instructions"]["val"].values()) == 20
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    for sample in read_coco_instructions(world, "train"):
        for turn in sample.turns:
            assert tokenizer.unk_token_id not in tokenizer(turn.instruction).input_ids


def test_contrast_asks_for_what_there_is_and_for_what_there_is_not(tmp_path):
    root = tmp_path / "world"
    world = make_tiny_world(root, train=1, val=1, contrast=40)
    assert world["settings"]["contrast"] == 40
    kinds = Counter()
    for sample in read_coco_instructions(root, "contrast"):
        for turn in sample.turns:
            [phrase] = turn.phrases
            assert (turn.kind == "no_target") == (len(phrase.rles) == 0) and phrase.text == GENERIC_PHRASE
            assert any(word in turn.instruction for word in (*ORDINALS, *TIMES.values(), *COMMON)), turn.instruction
            kinds[turn.kind] += 1
    assert set(kinds) == {"ordinal", "counting", "no_target"}
    assert kinds["no_target"] > 0.8 * (kinds["ordinal"] + kinds["counting"]) > 80


def test_contrast_changes_no_other_split(world, tmp_path):
    make_tiny_world(tmp_path / "more", **SETTINGS, contrast=1)
    more = {name: what for name, what in contents(tmp_path / "more").items() if not name.startswith("contrast")}
    del more["world.json"]
    assert more.items() <= contents(world).items() and len(more) == len(contents(world)) - 1
    with pytest.raises(ValueError, match="contrast=-1"):
        make_tiny_world(tmp_path / "none", train=1, val=1, contrast=-1)


def test_the_same_world_is_left_alone(world, capsys):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    make_tiny_world(world, **SETTINGS, overwrite=True)
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in world.rglob("*")}


def test_another_world_is_replaced_on_request_only(tmp_path):
    root = tmp_path / "world"
    make_tiny_world(root, train=2, val=2)
    before = contents(root)
    with pytest.raises(ValueError, match="overwrite"):
        make_tiny_world(root, train=3, val=2)
    assert contents(root) == before
    make_tiny_world(root, train=3, val=2, overwrite=True)
    assert len(read_coco_instructions(root, "train")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_a_folder_of_something_else_is_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no tiny world"):
        make_tiny_world(tmp_path, train=1, val=1, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interrupted_run_leaves_no_world(tmp_path, monkeypatch):
    write = tiny_world._write_split

    def interrupted(folder, split, *rest):
        if split == "val":
            raise KeyboardInterrupt
        return write(folder, split, *rest)

    monkeypatch.setattr(tiny_world, "_write_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_tiny_world(tmp_path / "world", train=1, val=1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    make_tiny_world(tmp_path / "world", train=1, val=1)
    assert len(read_coco_instructions(tmp_path / "world", "val")) == 1


def test_command_line_says_what_is_wrong(tmp_path):
    with pytest.raises(SystemExit, match="train=0"):
        main(["--root", str(tmp_path / "world"), "--train", "0"])
    with pytest.raises(SystemExit, match="image_size=20"):
        main(["--root", str(tmp_path / "world"), "--train", "1", "--val", "1", "--image-size", "20"])
    assert list(tmp_path.iterdir()) == []
