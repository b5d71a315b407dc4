"""The segment command: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from safetensors.numpy import save_file

from instructsam import segment as command
from instructsam.inference.model import InstructSAM
from instructsam.segmenting.jobs import find_pictures

pytestmark = pytest.mark.slow


def test_everything_is_written(run, lines, photos, usual, tmp_path, capsys):
    kinds = "overlay,masks,coco,labelme"
    assert run(photos, "-p", "red circles", "-p", "stars", *usual, "--top-k", 3, "--write", kinds) == 0
    out = tmp_path / "out"
    found = lines(out)
    assert [line["asked"]["image"] for line in found] == [str(path) for path in find_pictures([str(photos)])]
    assert all(len(line["result"]["instances"]) == 3 for line in found)
    coco = COCO(str(out / "coco.json"))
    assert len(coco.getImgIds()) == 3 and len(coco.getAnnIds()) == 9
    for line, image_id in zip(found, coco.getImgIds(), strict=True):
        masks = sorted((out / "masks" / line["id"]).iterdir())
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        for path, annotation in zip(masks, annotations, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(path)), coco.annToMask(annotation).astype(bool))
        labelme = json.loads((out / "labelme" / f"{line['id']}.json").read_text())
        assert (out / "labelme" / labelme["imagePath"]).resolve() == Path(line["asked"]["image"]).resolve()
        assert Image.open(out / "overlays" / f"{line['id']}.png").size == (480, 480)
    said = capsys.readouterr().out
    assert "1. " in said and f"written to {out}" in said


def test_bad_pictures_spoil_no_other(run, lines, photos, usual, tmp_path, capsys):
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:200])
    Image.new("RGB", (500, 2)).save(photos / "thin.png")
    names = ["a.png", "notes.txt", "broken.png", "thin.png", "b.PNG"]
    assert run(*(photos / name for name in names), "-i", "stars", *usual) == 1
    said = capsys.readouterr()
    for reason in ("notes: FAILED: ", "not an image", "broken: FAILED: ", "thin: FAILED: ", "thinner than 1:200"):
        assert reason in said.err
    assert "3 of 5 jobs failed" in said.err
    assert ["error" in line for line in lines(tmp_path / "out")] == [False, True, True, True, False]
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes())
    assert run(*(photos / name for name in names), "-i", "stars", *usual) == 1
    said = capsys.readouterr().err
    assert "2 of 5 jobs are done already" in said and "2 of 5 jobs failed" in said
    assert "result" in [line for line in lines(tmp_path / "out") if line["id"] == "broken"][-1]


def test_json_for_scripts(run, photos, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = ["--checkpoint", checkpoint, "--device", "cpu", "--json"]
    assert run(photos / "a.png", photos / "notes.txt", "-i", "stars", *usual) == 1
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said[0]["result"]["instruction"] == "stars" and "not an image" in said[1]["error"]
    assert not (tmp_path / "outputs").exists()


def test_the_choices_are_honoured(run, lines, photos, checkpoint, tmp_path, monkeypatch):
    scores = {}
    runs = {"default": [], "trained": ["--decoding", "trained"], "released": ["--decoding", "released"]}
    runs["half"] = ["--decoding", "released", "--dtype", "bfloat16"]
    usual = ["--checkpoint", checkpoint, "--device", "cpu", "--threshold", 0, "--write", ""]
    for name, choice in runs.items():
        assert run(photos / "a.png", "-p", "red circles", *usual, "--output", tmp_path / name, *choice) == 0
        scores[name] = [instance["score"] for instance in lines(tmp_path / name)[0]["result"]["instances"]]
    assert scores["default"] == scores["trained"] != scores["released"]
    assert scores["half"] != scores["released"]
    assert sorted(scores["half"]) == pytest.approx(sorted(scores["released"]), abs=0.02)


def test_jobs_of_both_kinds_in_one_run(run, lines, photos, usual, tmp_path):
    jobs = [{"image": "a.png", "instruction": "stars"}, {"image": "a.png", "phrases": ["stars", "dots"]}] * 2
    (photos / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    assert run("--jobs", photos / "jobs.jsonl", *usual) == 0
    assert [line["result"]["phrases"] for line in lines(tmp_path / "out")][1::2] == [["stars", "dots"]] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no picture is given"),
        (["a.png"], "nothing is asked: give --instruction, --phrase or --jobs"),
        (["nowhere.png", "-i", "x"], "nowhere.png: no such file or folder"),
        (["*.tiff", "-i", "x"], "*.tiff: no file fits this pattern"),
        (["empty", "-i", "x"], "empty: no picture in this folder"),
        (["a.png", "-i", " "], "an empty --instruction"),
        (
            ["a.png", "-i", "x", "-i", "y", "-p", "z"],
            "--phrase is the answer to one instruction, and several are given",
        ),
        (["a.png", "--jobs", "jobs.jsonl"], "--jobs says all that is to be done"),
        (["--jobs", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["a.png", "-i", "x", "--write", "yolo"], "--write yolo: not one of overlay, masks, coco, labelme"),
        (["a.png", "-i", "x", "--threshold", "3"], "threshold=3.0: must be a number between 0 and 1"),
        (["a.png", "-i", "x", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["a.png", "-i", "x", "--checkpoint", "nowhere"], "InstructSAM: no folder nowhere"),
        (["a.png", "-i", "x", "--checkpoint", "other"], "holds a 'bert' model"),
        (["a.png", "-i", "x", "--decoding", "publishd"], "decoding='publishd' is not one of trained, released"),
        (["a.png", "-i", "x", "--dtype", "int8"], "dtype='int8' is not one of auto"),
        (["a.png", "-i", "x", "--device", "gpu"], "device='gpu' is no device"),
        (["a.png", "-i", "x", "-i", "the [SEG] stars"], "reserved token '[SEG]'"),
        (["a.png", *(word for k in range(11) for word in ("-p", f"p{k}"))], "11 phrases, more than max_phrases=10"),
    ],
)
def test_what_cannot_be_started(run, photos, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    (photos / "empty").mkdir()
    (photos / "other").mkdir()
    (photos / "other/config.json").write_text('{"model_type": "bert"}')
    save_file({"embeddings.weight": np.zeros((2, 2), np.float32)}, photos / "other/model.safetensors")
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not [path for path in photos.rglob("outputs/**/*") if path.is_file() and path.name != ".lock"]


@pytest.mark.parametrize("output", ["a.png", "a.png/inside", "closed"])
def test_output_where_nothing_can_be_written(run, photos, usual, output, monkeypatch, capsys):
    """Found before the weights are loaded."""
    (photos / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")
    monkeypatch.setattr(InstructSAM, "from_pretrained", None)
    assert run(photos / "a.png", "-i", "x", *usual, "--output", photos / output) == 2
    assert f"error: {photos / output}: no folder that can be written to" in capsys.readouterr().err


def test_faulty_lines_of_a_file_of_jobs(run, lines, photos, usual, tmp_path, capsys):
    jobs = [
        {"image": "a.png", "instruction": "the [SEG] stars"},
        {"image": "a.png", "instruction": "stars"},
        {"image": "b.PNG", "phrases": [f"p{k}" for k in range(11)]},
        {"image": "nowhere.png", "instruction": "stars"},
        {"image": "null\0.png", "instruction": "stars"},
    ]
    path = photos / "jobs.jsonl"
    path.write_text("\n".join(map(json.dumps, jobs)))
    assert run("--jobs", path, *usual) == 1
    errors = [line.get("error", "") for line in lines(tmp_path / "out")]
    assert errors[1] == "" and errors[0].startswith(f"{path}:1: ") and "reserved token '[SEG]'" in errors[0]
    assert errors[2] == f"{path}:3: 11 phrases, more than max_phrases=10"
    assert errors[3] == f"{path}:4: {photos / 'nowhere.png'}: no such image file"
    assert "4 of 5 jobs failed" in capsys.readouterr().err
    (photos / "nowhere.png").write_bytes((photos / "a.png").read_bytes())
    assert run("--jobs", path, *usual) == 1
    assert [line["id"] for line in lines(tmp_path / "out") if "result" in line] == ["a.2", "nowhere"]


def test_what_does_not_fit_into_memory_fails_alone(run, lines, photos, usual, tmp_path, monkeypatch):
    Image.new("RGB", (600, 500)).save(photos / "large.png")
    answer = InstructSAM.answer

    def small_memory(self, images, *rest):
        if any(image.width == 600 for image in images):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return answer(self, images, *rest)

    monkeypatch.setattr(InstructSAM, "answer", small_memory)
    assert run(*(photos / name for name in ("a.png", "large.png", "b.PNG")), "-i", "stars", *usual) == 1
    errors = [line.get("error", "") for line in lines(tmp_path / "out")]
    assert errors[0] == errors[2] == "" and "a picture of 600x500 pixels: not enough memory" in errors[1]


def test_faults_of_the_program_are_no_failed_jobs(photos, usual, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(InstructSAM, "answer", broken)
    with pytest.raises(ZeroDivisionError):
        command.main([str(argument) for argument in (photos / "a.png", "-i", "stars", *usual)])
